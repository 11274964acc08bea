// Autoencoders against what diffusers makes of the same weights (tests/vae/make_vae.py): both
// kinds, every layout of files, whole and in tiles, on CPU and GPU forms, in f32 and bf16; and
// files that are not what they should be.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/vae.h"
#include "tests/op_table.h"

// ---- helpers ------------------------------------------------------------------------------------

static const char *fixture(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/vae/%s", TEST_DATA, name);
    return path;
}

// A tensor of expected.safetensors; freed by the caller.
static float *expected(const char *model, const char *what, int64_t shape[4])
{
    char name[64];
    struct safetensors *file;
    const struct st_tensor *t;
    snprintf(name, sizeof name, "%s.%s", model, what);
    if (safetensors_open(fixture("expected.safetensors"), &file) < 0)
        return NULL;
    float *values = NULL;
    if ((t = safetensors_find(file, name)) && t->ndim == 4) {
        values = malloc((size_t)t->count * sizeof *values);
        memcpy(shape, t->shape, 4 * sizeof *shape);
        BUG_IF(!values || safetensors_read_f32(file, t, values, 0, t->count) < 0);
    }
    safetensors_close(file);
    return values;
}

static int64_t count_of(const int64_t shape[4])
{
    return shape[0] * shape[1] * shape[2] * shape[3];
}

// Largest difference from `want`, over the root mean square of that.
static double distance(const float *got, const float *want, int64_t count)
{
    double worst = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) {
        const double d = fabs((double)got[i] - (double)want[i]);
        worst = d <= worst ? worst : d; // NaN is the worst
        squares += (double)want[i] * (double)want[i];
    }
    return worst / sqrt(squares / (double)count);
}

struct coder {
    struct stream *stream;
    struct vae_file file;
    struct vae *vae;
};

static int coder_open(struct coder *c, unsigned flags, const char *name, enum vae_part part,
                      int batch, const int64_t shape[4], int tile)
{
    struct device *dev = test_device(flags);
    *c = (struct coder){0};
    if (!dev)
        return -1;
    TRY(dev->api->stream_new(dev, &c->stream));
    TRY(vae_file_open(fixture(name), &c->file));
    const struct vae_options o = {.part = part,
                                  .batch = batch,
                                  .height = (int)shape[2],
                                  .width = (int)shape[3],
                                  .tile = tile};
    return vae_new(dev, c->stream, &c->file, &o, &c->vae);
}

static void coder_close(struct coder *c, unsigned flags)
{
    vae_free(c->vae);
    vae_file_close(&c->file);
    test_device(flags)->api->stream_free(c->stream);
}

// The largest difference, in parts of the outputs' root mean square. Measured: 5e-6 in f32, 0.05 in
// bf16, which rounds the outputs of some 40 layers to 8 bits.
static double bound(unsigned flags)
{
    return flags & OPEN_BF16 ? 0.1 : 3e-5;
}

// ---- decoding -----------------------------------------------------------------------------------

static int check_decode(const char *name, const char *model, const char *what, unsigned flags,
                        int batch, int tile)
{
    int64_t shape[4], out[4];
    struct coder c;
    float *latents = expected(model, "latent", shape), *want = expected(model, what, out);
    CHECK(latents && want, "fixture");
    float *images = malloc((size_t)count_of(out) * sizeof *images);
    OK(coder_open(&c, flags, name, VAE_DECODER, batch, shape, tile));
    OK(vae_decode(c.vae, latents, (int)shape[0], images));
    const double d = distance(images, want, count_of(out));
    CHECK(d <= bound(flags), "%s, batch %d, tile %d, %s: %.3g", name, batch, tile,
          op_flags_name(flags), d);
    const uint64_t allocations = test_device(flags)->allocations;
    OK(vae_decode(c.vae, latents, (int)shape[0], images)); // again, with what the first left
    CHECK(distance(images, want, count_of(out)) == d, "another result the second time");
    CHECK(test_device(flags)->allocations == allocations, "device memory was allocated in a run");
    coder_close(&c, flags);
    free(latents), free(want), free(images);
    return PASSED;
}

static int test_decode(void)
{
    for (int f = 0; f < 4; f++)
        for (int batch = 1; batch <= 2; batch++) {
            if (check_decode("kl.safetensors", "kl", "decoded", op_flags[f], batch, 0) ||
                check_decode("tiny.safetensors", "tiny", "decoded", op_flags[f], batch, 0) ||
                check_decode("plain.safetensors", "plain", "decoded", op_flags[f], batch, 0))
                return FAILED;
        }
    return PASSED;
}

// Tiles of 8 latents over 13 x 9: rows of 8, 7 and 1 latents, columns of 8 and 3.
static int test_tiles(void)
{
    for (int f = 0; f < 4; f++)
        if (check_decode("kl.safetensors", "kl", "tiled", op_flags[f], 1 + f % 2, 8))
            return FAILED;
    return PASSED;
}

// One tile that holds all is the whole. Smaller ones differ from it as far as their statistics do:
// of latents that are alike everywhere, but for the borders.
static int test_tiles_and_whole(void)
{
    enum { SIDE = 56, IMAGE = 2 * SIDE, FLOATS = 3 * IMAGE * IMAGE };
    const int64_t shape[4] = {1, 4, SIDE, SIDE};
    static float latents[4 * SIDE * SIDE], a[FLOATS], b[FLOATS];
    struct coder whole, large, small;
    struct op_run random = {.state = 7};
    for (int i = 0; i < 4 * SIDE * SIDE; i++) {
        const int c = i / (SIDE * SIDE), y = i / SIDE % SIDE, x = i % SIDE;
        latents[i] = y < 4 && x < 4 ? (float)op_uniform(&random, -2, 2)
                                    : latents[(c * SIDE + y % 4) * SIDE + x % 4];
    }
    OK(coder_open(&whole, 0, "kl.safetensors", VAE_DECODER, 1, shape, 0));
    OK(coder_open(&large, 0, "kl.safetensors", VAE_DECODER, 1, shape, SIDE));
    OK(coder_open(&small, 0, "kl.safetensors", VAE_DECODER, 1, shape, 32));
    CHECK(vae_memory(small.vae) < vae_memory(whole.vae), "tiles need no less memory");
    OK(vae_decode(whole.vae, latents, 1, a));
    OK(vae_decode(large.vae, latents, 1, b));
    CHECK(distance(a, b, FLOATS) == 0, "one tile is not the whole");
    OK(vae_decode(small.vae, latents, 1, b));
    double squares = 0, all = 0;
    for (int i = 0; i < FLOATS; i++) {
        squares += pow((double)a[i] - (double)b[i], 2);
        all += pow((double)a[i], 2);
    }
    CHECK(squares < 0.15 * 0.15 * all, "tiles are %.3g away from the whole", sqrt(squares / all));
    coder_close(&whole, 0), coder_close(&large, 0), coder_close(&small, 0);
    return PASSED;
}

// ---- encoding -----------------------------------------------------------------------------------

static int check_encode(const char *name, const char *model, unsigned flags, int batch)
{
    int64_t shape[4], out[4];
    struct coder c;
    float *images = expected(model, "image", shape), *mean = expected(model, "mean", out);
    float *logvar = expected(model, "logvar", out);
    CHECK(images && mean && (logvar || !strcmp(model, "tiny")), "fixture");
    const int64_t each = count_of(out) / out[0];
    float *moments = malloc((size_t)count_of(out) * 2 * sizeof *moments);
    OK(coder_open(&c, flags, name, VAE_ENCODER, batch, shape, 0));
    OK(vae_encode(c.vae, images, (int)shape[0], moments));
    for (int64_t i = 0; i < out[0]; i++) {
        double d = distance(moments + 2 * i * each, mean + i * each, each);
        CHECK(d <= bound(flags), "%s, batch %d, %s, mean of image %lld: %.3g", name, batch,
              op_flags_name(flags), (long long)i, d);
        for (int64_t k = 0; !logvar && k < each; k++)
            CHECK(moments[(2 * i + 1) * each + k] == -30, "a variance where there is none");
        d = logvar ? distance(moments + (2 * i + 1) * each, logvar + i * each, each) : 0;
        CHECK(d <= bound(flags), "%s, batch %d, %s, log variance of image %lld: %.3g", name, batch,
              op_flags_name(flags), (long long)i, d);
    }
    coder_close(&c, flags);
    free(images), free(mean), free(logvar), free(moments);
    return PASSED;
}

static int test_encode(void)
{
    for (int f = 0; f < 4; f++)
        for (int batch = 1; batch <= 3; batch += 2) {
            if (check_encode("kl.safetensors", "kl", op_flags[f], batch) ||
                check_encode("tiny.safetensors", "tiny", op_flags[f], batch) ||
                check_encode("plain.safetensors", "plain", op_flags[f], batch))
                return FAILED;
        }
    return PASSED;
}

static int test_sample(void)
{
    const float moments[] = {1, -2, -30, 1.5f}, noise[] = {1000, -1};
    float out[2];
    vae_sample(moments, NULL, 2, 0.5f, 0.25f, out);
    CHECK(out[0] == 0.375f && out[1] == -1.125f, "means %g %g", (double)out[0], (double)out[1]);
    vae_sample(moments, noise, 2, 1, 0, out);
    CHECK(fabsf(out[0] - 1) < 1e-3f && fabs((double)out[1] + 2 + exp(0.75)) < 1e-6, "samples %g %g",
          (double)out[0], (double)out[1]);
    return PASSED;
}

// ---- files --------------------------------------------------------------------------------------

static int test_layouts(void)
{
    struct vae_file f, old;
    for (int flags = 0; flags <= OPEN_GPU_FORMS; flags += OPEN_GPU_FORMS)
        if (check_decode("kl_old.bin", "kl", "decoded", (unsigned)flags, 2, 0) ||
            check_encode("kl_old.bin", "kl", (unsigned)flags, 2) ||
            check_decode("taesd_decoder.pth", "tiny", "decoded", (unsigned)flags, 1, 0) ||
            check_encode("taesd_encoder.pth", "tiny", (unsigned)flags, 1))
            return FAILED;
    OK(vae_file_open(fixture("kl.safetensors"), &f));
    OK(vae_file_open(fixture("kl_old.bin"), &old));
    CHECK(f.kind == VAE_KL && f.factor == 2 && f.latent_channels == 4 && f.image_channels == 3 &&
              f.groups == 8 && f.scale == 0.18215f && f.shift == 0,
          "inferred: factor %d, latents %d, groups %d", f.factor, f.latent_channels, f.groups);
    CHECK(strlen(f.identity) == 16 && strcmp(f.identity, old.identity), "identity");
    vae_file_close(&f), vae_file_close(&old);
    OK(vae_file_open(fixture("tiny.safetensors"), &f));
    CHECK(f.kind == VAE_TINY && f.factor == 4 && f.scale == 1, "inferred: factor %d", f.factor);
    vae_file_close(&f);
    return PASSED;
}

static int put(const char *directory, const char *name, const void *data, size_t bytes)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    const size_t n = file ? fwrite(data, 1, bytes, file) : 0;
    return file && !fclose(file) && n == bytes ? 0 : -1;
}

// diffusers' directory: config.json beside the weights.
static int test_directory_form(void)
{
    static char model[200000];
    char directory[500];
    struct vae_file f;
    FILE *file = fopen(fixture("kl.safetensors"), "rb");
    const size_t bytes = file ? fread(model, 1, sizeof model, file) : 0;
    CHECK(bytes > 1000 && bytes < sizeof model && fclose(file) == 0, "fixture");
    snprintf(directory, sizeof directory, "%s/vae", test_directory());
    CHECK(mkdir(directory, 0777) == 0, "mkdir");
    CHECK(vae_file_open(directory, &f) == ERR_IO && strstr(error_message(), "no autoencoder"), "%s",
          error_message());
    CHECK(put(directory, "diffusion_pytorch_model.safetensors", model, bytes) == 0, "put");
    OK(vae_file_open(directory, &f));
    CHECK(f.scale == 0.18215f, "scale %g", (double)f.scale);
    vae_file_close(&f);
    static const struct {
        const char *json, *says; // NULL: opens
    } rows[] = {{"{\"scaling_factor\": 1.5, \"shift_factor\": 0.25, \"norm_num_groups\": 4}", NULL},
                {"{\"scaling_factor\": \"x\"}", "scaling_factor is no number"},
                {"{\"scaling_factor\": 0}", "scaling_factor is no number from"},
                {"{\"norm_num_groups\": 3}", "normalises 8 channels in 3 groups"},
                {"{", "config.json: line 1"}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        CHECK(put(directory, "config.json", rows[i].json, strlen(rows[i].json)) == 0, "put");
        const int code = vae_file_open(directory, &f);
        if (rows[i].says) {
            CHECK(code == ERR_INPUT && strstr(error_message(), rows[i].says), "%s: %s",
                  rows[i].json, error_message());
            continue;
        }
        CHECK(code == 0 && f.scale == 1.5f && f.shift == 0.25f && f.groups == 4, "%s",
              error_message());
        vae_file_close(&f);
    }
    return PASSED;
}

// The fixture with one tensor left out, or of another shape, or with a value that is not finite.
enum damage { LEFT_OUT, RESHAPED, NOT_FINITE };
static int write_damaged(const char *from, const char *name, enum damage how, const char *path)
{
    struct safetensors *in;
    struct safetensors_writer *out;
    float buffer[20000];
    TRY(safetensors_open(fixture(from), &in));
    TRY(safetensors_create(path, &out));
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < safetensors_count(in); i++) {
            const struct st_tensor *t = safetensors_at(in, i);
            const bool hit = !strcmp(t->name, name);
            if (hit && how == LEFT_OUT)
                continue;
            if (pass == 0) {
                const int64_t flat[] = {t->count, 1};
                TRY(safetensors_declare(out, t->name, ST_F32, hit && how == RESHAPED ? 2 : t->ndim,
                                        hit && how == RESHAPED ? flat : t->shape));
                continue;
            }
            TRY(safetensors_read_f32(in, t, buffer, 0, t->count));
            if (hit && how == NOT_FINITE)
                buffer[t->count - 1] = NAN;
            TRY(safetensors_write(out, buffer, (size_t)t->count * sizeof *buffer));
        }
        if (pass == 0)
            TRY(safetensors_begin(out));
    }
    safetensors_close(in);
    return safetensors_commit(out);
}

static int test_damaged(void)
{
    static const struct {
        const char *from, *name;
        enum damage how;
        const char *says;
    } rows[] = {
        {"kl.safetensors", "decoder.conv_out.weight", LEFT_OUT,
         "decoder.conv_out.weight is missing"},
        {"kl.safetensors", "encoder.mid_block.resnets.0.norm2.weight", LEFT_OUT,
         "encoder.mid_block.resnets.0.norm2.weight is missing"},
        {"kl.safetensors", "decoder.mid_block.attentions.0.to_k.weight", LEFT_OUT,
         "to_k.weight is missing"},
        {"kl.safetensors", "decoder.mid_block.resnets.1.conv2.weight", RESHAPED, "another shape"},
        {"kl.safetensors", "decoder.mid_block.resnets.1.norm1.bias", RESHAPED, "another shape"},
        {"kl.safetensors", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", LEFT_OUT,
         "does not fit the residual"},
        {"kl.safetensors", "decoder.up_blocks.0.upsamplers.0.conv.weight", LEFT_OUT,
         "decoder does not fit"},
        {"kl.safetensors", "decoder.conv_in.weight", NOT_FINITE, "not finite"},
        {"tiny.safetensors", "decoder.layers.2.conv.2.weight", LEFT_OUT,
         "2.conv.2.weight is missing"},
        {"tiny.safetensors", "encoder.layers.0.weight", RESHAPED, ""},
    };
    char path[500];
    snprintf(path, sizeof path, "%s/damaged.safetensors", test_directory());
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct vae_file f;
        struct vae *v = NULL;
        struct device *dev = test_device(0);
        struct stream *stream;
        const struct vae_options o = {.part = VAE_DECODER, .batch = 1, .height = 2, .width = 2};
        OK(write_damaged(rows[i].from, rows[i].name, rows[i].how, path));
        OK(dev->api->stream_new(dev, &stream));
        int code = vae_file_open(path, &f);
        if (code == 0) {
            code = vae_new(dev, stream, &f, &o, &v);
            vae_file_close(&f);
        }
        // TAESD's decoder is whole without the encoder
        CHECK(rows[i].says[0] ? code == ERR_INPUT : code == 0, "%s: %d", rows[i].name, code);
        CHECK(code == 0 || (strstr(error_message(), rows[i].says) &&
                            strstr(error_message(), path) == error_message()),
              "%s: %s", rows[i].name, error_message());
        vae_free(v);
        dev->api->stream_free(stream);
    }
    return PASSED;
}

static int test_refused(void)
{
    static const struct {
        const char *file;
        struct vae_options o;
        const char *says;
    } rows[] = {
        {"kl.safetensors", {VAE_ENCODER, 1, 7, 8, 0, 0}, "multiples of 2"},
        {"kl.safetensors", {VAE_ENCODER, 1, 8, 0, 0, 0}, "multiples of 2"},
        {"kl.safetensors", {VAE_DECODER, 0, 8, 8, 0, 0}, "multiples of 1"},
        {"kl.safetensors", {VAE_DECODER, 1, 8, 8, 7, 0}, "tiles of 7"},
        {"kl.safetensors", {VAE_ENCODER, 1, 8, 8, 8, 0}, "tiles of 8"},
        {"kl.safetensors", {VAE_DECODER, 1, 40000, 8, 0, 0}, "too large"},
        {"kl.safetensors", {VAE_DECODER, 1 << 20, 100, 100, 0, 0}, "too many"},
        {"kl.safetensors", {VAE_DECODER, 4, 64, 64, 0, 1 << 20}, "MiB"},
        {"taesd_encoder.pth", {VAE_DECODER, 1, 8, 8, 0, 0}, "holds no decoder"},
        {"taesd_decoder.pth", {VAE_ENCODER, 1, 8, 8, 0, 0}, "holds no encoder"},
    };
    struct device *dev = test_device(0);
    struct stream *stream;
    struct vae_file f;
    OK(dev->api->stream_new(dev, &stream));
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct vae *v;
        OK(vae_file_open(fixture(rows[i].file), &f));
        const int code = vae_new(dev, stream, &f, &rows[i].o, &v);
        CHECK(code < 0 && !v && strstr(error_message(), rows[i].says), "row %zu: %s", i,
              error_message());
        vae_file_close(&f);
    }
    dev->api->stream_free(stream);
    CHECK(vae_file_open(fixture("expected.safetensors"), &f) == ERR_INPUT &&
              strstr(error_message(), "no autoencoder"),
          "%s", error_message());
    CHECK(vae_file_open(fixture("nowhere"), &f) == ERR_IO, "%s", error_message());
    return PASSED;
}

const struct test vae_tests[] = {
    {"decode", test_decode},
    {"tiles", test_tiles},
    {"tiles_and_whole", test_tiles_and_whole},
    {"encode", test_encode},
    {"sample", test_sample},
    {"layouts", test_layouts},
    {"directory", test_directory_form},
    {"damaged", test_damaged},
    {"refused", test_refused},
    {NULL, NULL},
};
