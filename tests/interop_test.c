// Files of other tools (tests/interop/make_interop.py): shards with an index, DeepSpeed's
// directories, configurations inferred from shapes.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/convert.h"
#include "model/diffusers.h"
#include "model/weights_file.h"

// ---- helpers ------------------------------------------------------------------------------------

static const char *fixture(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/interop/%s", TEST_DATA, name);
    return path;
}

static const char *scratch(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", test_directory(), name);
    return path;
}

static int put_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    if (!f)
        return -1;
    fputs(text, f);
    return fclose(f);
}

static int one_line(const char *path)
{
    const char *m = error_message();
    return *m && !strchr(m, '\n') && strstr(m, path) == m;
}

// Every tensor of `known` is in `read`, within `tolerance` of its largest value.
static int same_numbers(struct safetensors *known, struct safetensors *read, double tolerance)
{
    static float a[1 << 16], b[1 << 16];
    CHECK(safetensors_count(known) == safetensors_count(read), "%d tensors of %d",
          safetensors_count(read), safetensors_count(known));
    for (int i = 0; i < safetensors_count(known); i++) {
        const struct st_tensor *t = safetensors_at(known, i), *u;
        OK(safetensors_expect(read, t->name, -1, t->ndim, t->shape, &u));
        OK(safetensors_read_f32(known, t, a, 0, t->count));
        OK(safetensors_read_f32(read, u, b, 0, u->count));
        double error = 0, most = 0;
        for (int64_t k = 0; k < t->count; k++) {
            error = fmax(error, fabs((double)a[k] - (double)b[k]));
            most = fmax(most, fabs((double)a[k]));
        }
        CHECK(error <= tolerance * most, "%s is off by %g", t->name, error);
        // any range of it reads the same
        const int64_t first = t->count / 3, n = t->count - first - t->count / 5;
        OK(safetensors_read_f32(read, u, a, first, n));
        CHECK(!memcmp(a, b + first, (size_t)n * sizeof *a), "%s: a range", t->name);
    }
    return PASSED;
}

// `inexact`: a tensor that the file holds in 16 bits only.
static int compare(const char *name, const char *format, const char *inexact)
{
    struct safetensors *known, *read;
    OK(weights_file_open(fixture("tiny.safetensors"), &known));
    OK(weights_file_open(fixture(name), &read));
    CHECK(!strcmp(safetensors_format(read), format), "%s is '%s'", name, safetensors_format(read));
    CHECK(same_numbers(known, read, inexact ? 4e-3 : 0) == PASSED, "%s", name);
    for (int i = 0; i < safetensors_count(read); i++) {
        const struct st_tensor *t = safetensors_at(read, i);
        const bool half = t->dtype == ST_F16 || t->dtype == ST_BF16;
        CHECK(half == (inexact && !strcmp(t->name, inexact)), "%s: %s is %s", name, t->name,
              st_dtype_name(t->dtype));
    }
    safetensors_close(known), safetensors_close(read);
    return PASSED;
}

// ---- what opens ---------------------------------------------------------------------------------

static int test_shards(void)
{
    static const char *const names[][2] = {
        {"sharded", "safetensors in 4 files"},
        {"sharded/model.safetensors.index.json", "safetensors in 4 files"},
        {"consolidated", "PyTorch in 4 files"},
        {"consolidated/pytorch_model.bin.index.json", "PyTorch in 4 files"}};
    for (int i = 0; i < 4; i++)
        CHECK(compare(names[i][0], names[i][1], NULL) == PASSED, "%s", names[i][0]);
    return PASSED;
}

// f32 from the optimizer's parts; what is frozen as training has it.
static int test_deepspeed(void)
{
    CHECK(compare("zero2", "DeepSpeed, ZeRO 2 of 3 ranks", "pos_embed") == PASSED, "ZeRO 2");
    CHECK(compare("zero2/global_step7", "DeepSpeed, ZeRO 2 of 3 ranks", "pos_embed") == PASSED,
          "a step");
    return compare("zero1", "DeepSpeed, ZeRO 1 of 2 ranks", "pos_embed");
}

static int test_model_states_alone(void)
{
    struct safetensors *known, *read;
    OK(weights_file_open(fixture("tiny.safetensors"), &known));
    OK(weights_file_open(fixture("zero1/global_step7/mp_rank_00_model_states.pt"), &read));
    CHECK(same_numbers(known, read, 4e-3) == PASSED, "module");
    safetensors_close(known), safetensors_close(read);
    return PASSED;
}

// ---- what does not ------------------------------------------------------------------------------

static int test_bad_indexes(void)
{
    static const char *const rows[][2] = {
        {"{\"weight_map\": {\"a\": \"../interop_test.c\"}}", "no name of a file beside it"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "no name of a file beside it"},
        {"{\"weight_map\": {\"a\": \"\"}}", "no name of a file beside it"},
        {"{\"weight_map\": {\"a\": 3}}", "other than names"},
        {"{\"weight_map\": {\"a\": \"none.safetensors\"}}", "No such file"},
        {"{\"weight_map\": {\"a\": \"x.index.json\"}}", "not a whole safetensors file"},
        {"{\"weight_map\": {}}", "no weight_map"},
        {"{}", "no weight_map"},
        {"[1]", "no weight_map"},
        {"{", "not JSON"},
        {"", "empty"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *path = scratch("x.index.json");
        struct safetensors *s;
        CHECK(put_text(path, rows[i][0]) == 0, "cannot write");
        CHECK(weights_file_open(path, &s) < 0 && !s, "row %zu opens", i);
        CHECK(one_line(path) && strstr(error_message(), rows[i][1]), "row %zu: %s", i,
              error_message());
    }
    return PASSED;
}

static int test_missing_tensor(void)
{
    const char *path = scratch("y.index.json");
    char text[1200];
    struct safetensors *s;
    snprintf(text, sizeof text, "cp %s %s", fixture("tiny.safetensors"), test_directory());
    CHECK(system(text) == 0, "cannot copy");
    CHECK(put_text(path, "{\"weight_map\": {\"absent\": \"tiny.safetensors\"}}") == 0,
          "cannot write");
    CHECK(weights_file_open(path, &s) == ERR_INPUT && strstr(error_message(), "is not there"), "%s",
          error_message());
    return PASSED;
}

// A copy of a DeepSpeed directory with something done to it by a shell command.
static int damaged(const char *what, const char *command, const char *says)
{
    char text[4096], path[600];
    struct safetensors *s;
    snprintf(path, sizeof path, "%s/ds", test_directory());
    snprintf(text, sizeof text, "rm -rf %s && cp -r %s %s && chmod -R u+w %s && cd %s && %s", path,
             fixture("zero2"), path, path, path, command);
    CHECK(system(text) == 0, "%s: %s", what, command);
    CHECK(weights_file_open(path, &s) < 0 && !s, "%s: opens", what);
    CHECK(one_line(path) && strstr(error_message(), says), "%s: %s", what, error_message());
    return PASSED;
}

static int test_bad_deepspeed(void)
{
    static const char *const rows[][3] = {
        {"a rank is missing", "rm */zero_pp_rank_2*", "2 optimizer files"},
        {"the first rank is missing",
         "mv */zero_pp_rank_2* keep && mv */zero_pp_rank_1* keep && "
         "mv keep global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt",
         "1 optimizer files"},
        {"no step", "rm -r global_step7", "No such file"},
        {"another step", "echo global_step8 >latest", "No such file"},
        {"a way out", "echo ../zero2/global_step7 >latest", "names no directory"},
        {"up", "echo .. >latest", "names no directory"},
        {"nothing named", "echo >latest", "names no directory"},
        {"a rank is cut", "truncate -s 9000 */zero_pp_rank_1*", "not a whole PyTorch file"},
        {"a rank is another's", "cp */mp_rank_00_model_states.pt */zero_pp_rank_1*",
         "rank 1 has no part"},
        {"ZeRO 3",
         "cp */mp_rank_00_model_states.pt global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt",
         "zero_to_fp32.py"},
        {"model parallel",
         "cp */mp_rank_00_model_states.pt global_step7/mp_rank_01_model_states.pt", "mp_rank_01"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        CHECK(damaged(rows[i][0], rows[i][1], rows[i][2]) == PASSED, "%s", rows[i][0]);
    return PASSED;
}

static int test_bad_directories(void)
{
    struct safetensors *s;
    char path[600];
    snprintf(path, sizeof path, "%s/empty", test_directory());
    CHECK(mkdir(path, 0777) == 0, "mkdir");
    CHECK(weights_file_open(path, &s) == ERR_IO && one_line(path) &&
              strstr(error_message(), "no weights in it"),
          "%s", error_message());
    CHECK(weights_file_open(fixture("nowhere"), &s) == ERR_IO && one_line(fixture("nowhere")), "%s",
          error_message());
    return PASSED;
}

// ---- configurations -----------------------------------------------------------------------------

static int test_inferred(void)
{
    struct checkpoint c;
    CHECK(checkpoint_open(fixture("tiny.safetensors"), NULL, &c) == ERR_INPUT &&
              strstr(error_message(), "give --heads"),
          "%s", error_message());
    struct config_hints hints = {.heads = 2, .topk = 0, .diffusion = -1};
    OK(checkpoint_open(fixture("tiny.safetensors"), &hints, &c));
    const struct config *g = &c.config;
    CHECK(g->layers == 2 && g->hidden == 8 && g->experts == 3 && g->shared == 1 && g->patch == 2 &&
              g->size == 4 && g->classes == 3 && g->channels == 4 && g->learn_sigma &&
              !g->qk_norm && g->moe == MOE_ALL && g->topk == 2 && g->heads == 2,
          "shapes");
    CHECK(g->diffusion == DIFFUSION_DDPM && c.sources.diffusion == SOURCE_HABIT &&
              c.sources.heads == SOURCE_GIVEN && c.sources.topk == SOURCE_HABIT,
          "where it is from");
    checkpoint_close(&c);
    hints = (struct config_hints){.heads = 4, .topk = 1, .diffusion = DIFFUSION_RF};
    OK(checkpoint_open(fixture("zero2"), &hints, &c));
    CHECK(c.config.heads == 4 && c.config.topk == 1 && c.config.diffusion == DIFFUSION_RF &&
              c.sources.topk == SOURCE_GIVEN && c.sources.diffusion == SOURCE_GIVEN,
          "what is given goes before");
    checkpoint_close(&c);
    OK(checkpoint_open(fixture("dense.pt"), &hints, &c));
    CHECK(c.config.moe == MOE_NONE && c.config.hidden == 16 && c.config.size == 8, "a plain DiT");
    checkpoint_close(&c);
    return PASSED;
}

// ---- converting ---------------------------------------------------------------------------------

static const char *golden(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/golden/%s/model.safetensors", TEST_DATA, name);
    return path;
}

// A model to .pt and back: the numbers to the bit, and the configuration.
static int there_and_back(const char *name)
{
    struct checkpoint from, pt, back;
    char a[600], b[600];
    snprintf(a, sizeof a, "%s/a.pt", test_directory());
    snprintf(b, sizeof b, "%s/b.safetensors", test_directory());
    OK(checkpoint_open(golden(name), NULL, &from));
    OK(convert_model(&from, WEIGHTS_AUTO, -1, a, WEIGHTS_AS_TORCH));
    OK(checkpoint_open(a, NULL, &pt));
    CHECK(pt.has_config && config_equal(&pt.config, &from.config), "the configuration");
    CHECK(pt.has_model && !pt.has_ema, "one set of weights has become two");
    CHECK(!strcmp(safetensors_format(pt.file), "PyTorch"), "%s", safetensors_format(pt.file));
    CHECK(same_numbers(from.file, pt.file, 0) == PASSED, "%s", a);
    for (int i = 0; i < safetensors_count(pt.file); i++)
        CHECK((uintptr_t)safetensors_at(pt.file, i)->data % 64 == 0, "storage %d is not aligned",
              i);
    OK(convert_model(&pt, WEIGHTS_AUTO, -1, b, WEIGHTS_AS_SAFETENSORS));
    OK(checkpoint_open(b, NULL, &back));
    CHECK(same_numbers(from.file, back.file, 0) == PASSED, "%s", b);
    checkpoint_close(&from), checkpoint_close(&pt), checkpoint_close(&back);
    return PASSED;
}

static int test_there_and_back(void)
{
    static const char *const names[] = {"s_qkv", "xl_wqkv", "dense", "alternate"};
    for (int i = 0; i < 4; i++)
        CHECK(there_and_back(names[i]) == PASSED, "%s", names[i]);
    return PASSED;
}

// A file with an average keeps both, or becomes the one asked for.
static int test_both_sets(void)
{
    struct checkpoint from, both, one;
    char path[600], in[600];
    const struct config_hints hints = {2, 2, DIFFUSION_RF};
    snprintf(path, sizeof path, "%s/both.pt", test_directory());
    snprintf(in, sizeof in, "%s/torch/s_qkv.pt", TEST_DATA);
    OK(checkpoint_open(in, &hints, &from));
    OK(convert_model(&from, WEIGHTS_AUTO, ST_F32, path, WEIGHTS_AS_TORCH));
    OK(checkpoint_open(path, NULL, &both));
    CHECK(both.has_model && both.has_ema, "model and EMA");
    CHECK(safetensors_at(both.file, 0)->dtype == ST_F32, "the type");
    checkpoint_close(&both);
    OK(convert_model(&from, WEIGHTS_MODEL, ST_BF16, path, WEIGHTS_AS_SAFETENSORS));
    OK(checkpoint_open(path, NULL, &one));
    CHECK(one.has_model && !one.has_ema && safetensors_at(one.file, 0)->dtype == ST_BF16,
          "one set");
    checkpoint_close(&one);
    checkpoint_close(&from);
    return PASSED;
}

static float of_half(uint16_t h)
{
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    return exponent ? ldexpf((float)(1024 + fraction), exponent - 25)
                    : ldexpf((float)fraction, -24);
}

// Every f16 is itself; a number between two goes to the nearer, and halfway to the even one.
static int test_rounding(void)
{
    uint16_t out[2];
    for (unsigned h = 0; h < 0x7bff; h++) {
        const float a = of_half((uint16_t)h), b = of_half((uint16_t)(h + 1)), middle = (a + b) / 2;
        const float in[] = {a, -a, nextafterf(middle, 0), middle, nextafterf(middle, 1e9f)};
        const unsigned want[] = {h, h | 0x8000, h, h + (h & 1), h + 1};
        for (int i = 0; i < 5; i++) {
            OK(weights_round(&in[i], 1, ST_F16, out));
            CHECK(out[0] == want[i], "%g is %04x, not %04x", (double)in[i], out[0], want[i]);
        }
    }
    const float big[] = {65519.9f, 65520, 1e30f, INFINITY, 3.3895314e38f};
    OK(weights_round(&big[0], 1, ST_F16, out));
    CHECK(out[0] == 0x7bff, "the largest f16");
    for (int i = 1; i < 3; i++)
        CHECK(weights_round(&big[i], 1, ST_F16, out) == ERR_INPUT &&
                  strstr(error_message(), "too large for f16"),
              "%g fits f16", (double)big[i]);
    OK(weights_round(&big[3], 1, ST_F16, out));
    CHECK(out[0] == 0x7c00, "infinity stays");
    const float b[] = {1.0f, 1.00390625f, 1.01171875f, -1.005f}; // 1, halfway down, halfway up
    const uint16_t want[] = {0x3f80, 0x3f80, 0x3f82, 0xbf81};
    for (int i = 0; i < 4; i++) {
        OK(weights_round(&b[i], 1, ST_BF16, out));
        CHECK(out[0] == want[i], "%g is bf16 %04x", (double)b[i], out[0]);
    }
    return PASSED;
}

// What diffusers' own save_pretrained() wrote of the same weights.
static int test_diffusers(void)
{
    struct checkpoint from;
    struct safetensors *known, *made;
    char path[600];
    const struct config_hints hints = {2, 0, -1};
    snprintf(path, sizeof path, "%s/dit", test_directory());
    OK(checkpoint_open(fixture("dense.pt"), &hints, &from));
    OK(diffusers_write(&from, WEIGHTS_AUTO, -1, path));
    OK(weights_file_open(path, &made));
    OK(weights_file_open(fixture("dense_diffusers"), &known));
    CHECK(same_numbers(known, made, 0) == PASSED, "diffusers");
    snprintf(path, sizeof path, "%s/dit/config.json", test_directory());
    json_t *ours = json_load_file(path, 0, NULL);
    json_t *theirs = json_load_file(fixture("dense_diffusers/transformer/config.json"), 0, NULL);
    static const char *const keys[] = {"_class_name",
                                       "num_attention_heads",
                                       "attention_head_dim",
                                       "in_channels",
                                       "out_channels",
                                       "num_layers",
                                       "sample_size",
                                       "patch_size",
                                       "num_embeds_ada_norm",
                                       "activation_fn",
                                       "norm_type",
                                       "attention_bias",
                                       "norm_elementwise_affine"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        CHECK(json_equal(json_object_get(ours, keys[i]), json_object_get(theirs, keys[i])), "%s",
              keys[i]);
    json_decref(ours), json_decref(theirs);
    safetensors_close(known), safetensors_close(made);
    checkpoint_close(&from);
    OK(checkpoint_open(golden("s_qkv"), NULL, &from));
    CHECK(diffusers_write(&from, WEIGHTS_AUTO, -1, path) == ERR_INPUT &&
              strstr(error_message(), "no layout for a mixture of experts"),
          "%s", error_message());
    checkpoint_close(&from);
    return PASSED;
}

// Read, it is the model that was written; and so is what we write of that.
static int test_diffusers_read(void)
{
    struct checkpoint dense, read, again;
    const struct config_hints hints = {2, 0, -1};
    const char *path = scratch("theirs");
    OK(checkpoint_open(fixture("dense.pt"), &hints, &dense));
    OK(checkpoint_open(fixture("dense_diffusers"), NULL, &read));
    CHECK(!strcmp(safetensors_format(read.file), "safetensors of diffusers"), "%s",
          safetensors_format(read.file));
    CHECK(same_numbers(dense.file, read.file, 1e-6) == PASSED, "weights");
    CHECK(read.has_config && read.config.full_frequencies && !dense.config.full_frequencies, "kind");
    struct config c = read.config;
    c.full_frequencies = false;
    CHECK(config_equal(&c, &dense.config), "another configuration");
    OK(diffusers_write(&read, WEIGHTS_AUTO, ST_BF16, path));
    OK(checkpoint_open(path, NULL, &again));
    CHECK(config_equal(&read.config, &again.config), "not as it was read");
    CHECK(same_numbers(read.file, again.file, 4e-3) == PASSED, "weights again");
    checkpoint_close(&again);
    OK(diffusers_write(&dense, WEIGHTS_AUTO, -1, path));
    OK(checkpoint_open(path, NULL, &again));
    CHECK(config_equal(&dense.config, &again.config), "not as it was written");
    checkpoint_close(&again), checkpoint_close(&read), checkpoint_close(&dense);
    return PASSED;
}

static int read_values(const struct safetensors *s, const char *name, float **out)
{
    const struct st_tensor *t = safetensors_find(s, name);
    CHECK(t && (*out = malloc((size_t)t->count * sizeof **out)), "%s", name);
    if (t->dtype == ST_I64)
        for (int64_t i = 0; i < t->count; i++) {
            int64_t v;
            OK(safetensors_read_i64(s, t, &v, i, 1));
            (*out)[i] = (float)v;
        }
    else
        OK(safetensors_read_f32(s, t, *out, 0, t->count));
    return PASSED;
}

// It answers as diffusers' own network did (dense_input.safetensors).
static int test_diffusers_answers(void)
{
    enum { IMAGES = 3 };
    struct device *dev = test_device(0);
    struct checkpoint file;
    struct safetensors *input;
    struct stream *stream;
    struct dit *d;
    float *x, *t, *y, *want;
    if (!dev)
        return SKIPPED;
    OK(checkpoint_open(fixture("dense_diffusers"), NULL, &file));
    OK(safetensors_open(fixture("dense_input.safetensors"), &input));
    CHECK(!read_values(input, "x", &x) && !read_values(input, "t", &t) &&
              !read_values(input, "y", &y) && !read_values(input, "out", &want),
          "input");
    OK(dev->api->stream_new(dev, &stream));
    OK(dit_new(dev, stream, &file.config, &(struct dit_options){.batch = IMAGES}, &d));
    OK(dit_layout(d));
    OK(dit_commit(d));
    OK(checkpoint_load(&file, d, WEIGHTS_AUTO));
    OK(tensor_write(&d->ctx, &d->input, x));
    OK(tensor_write(&d->ctx, &d->t, t));
    OK(tensor_write(&d->ctx, &d->labels,
                    (int32_t[IMAGES]){(int32_t)y[0], (int32_t)y[1], (int32_t)y[2]}));
    OK(dit_forward(d));
    const int64_t n = tensor_count(&d->output);
    float *out = malloc((size_t)n * sizeof *out);
    double error = 0, most = 0;
    OK(tensor_read(&d->ctx, &d->output, out));
    for (int64_t i = 0; i < n; i++) {
        error = fmax(error, fabs((double)out[i] - (double)want[i]));
        most = fmax(most, fabs((double)want[i]));
    }
    CHECK(error <= 2e-4 * most, "off by %g of %g", error, most);
    free(x), free(t), free(y), free(want), free(out);
    dit_free(d);
    dev->api->stream_free(stream);
    safetensors_close(input);
    checkpoint_close(&file);
    return PASSED;
}

// The fixture with `with` in place of `what` in its config.json, as "bad-diffusers".
static int put_config(const char *what, const char *with)
{
    char text[4096] = "", changed[8192], path[1100];
    const char *directory = scratch("bad-diffusers");
    FILE *f = fopen(fixture("dense_diffusers/transformer/config.json"), "rb");
    CHECK(f, "no fixture");
    const size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    const char *at = strstr(text, what);
    CHECK(n && at, "%s is not there", what);
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, with, at + strlen(what));
    mkdir(directory, 0777);
    snprintf(path, sizeof path, "%s/config.json", directory);
    CHECK(put_text(path, changed) == 0, "%s", path);
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", directory);
    unlink(path);
    CHECK(symlink(fixture("dense_diffusers/transformer/diffusion_pytorch_model.safetensors"), path) == 0,
          "%s", path);
    return PASSED;
}

// That does not open, and says `why`.
static int bad_config(const char *what, const char *with, const char *why)
{
    const char *directory = scratch("bad-diffusers");
    struct checkpoint c;
    CHECK(put_config(what, with) == PASSED, "%s", what);
    CHECK(checkpoint_open(directory, NULL, &c) == ERR_INPUT, "%s opens", with);
    CHECK(one_line(directory) && strstr(error_message(), why), "%s: %s", with, error_message());
    return PASSED;
}

// A block with an embedding of t of its own.
static int own_embedding(void)
{
    static const char *const name =
        "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias";
    const char *from = fixture("dense_diffusers/transformer/diffusion_pytorch_model.safetensors");
    char path[1100];
    struct safetensors *s;
    OK(safetensors_open(from, &s));
    const uint64_t at = safetensors_find(s, name)->offset;
    safetensors_close(s);
    FILE *f = fopen(from, "rb");
    static unsigned char bytes[1 << 18];
    const size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    uint64_t header;
    memcpy(&header, bytes, sizeof header);
    CHECK(n < sizeof bytes && 8 + header + at < n, "%zu bytes", n);
    bytes[8 + header + at] ^= 1;
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", scratch("bad-diffusers"));
    unlink(path);
    f = fopen(path, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "%s", path);
    struct checkpoint c;
    CHECK(checkpoint_open(scratch("bad-diffusers"), NULL, &c) == ERR_INPUT &&
              strstr(error_message(), "differs from that of the first block"),
          "%s", error_message());
    return PASSED;
}

static int test_bad_diffusers(void)
{
    static const char *const cases[][3] = {
        {"\"DiTTransformer2DModel\"", "\"UNet2DModel\"", "not DiTTransformer2DModel"},
        {"\"gelu-approximate\"", "\"gelu\"", "'activation_fn' is 'gelu'"},
        {"\"ada_norm_zero\"", "\"layer_norm\"", "'norm_type' is 'layer_norm'"},
        {"\"norm_elementwise_affine\": false", "\"norm_elementwise_affine\": true", "have no weights"},
        {"1e-05", "0.1", "'norm_eps' is 0.1"},
        {"\"num_layers\": 2", "\"num_layers\": 3", "transformer_blocks.2"},
        {"\"num_layers\": 2", "\"num_layers\": \"2\"", "'num_layers' is missing"},
        {"\"num_layers\": 2", "\"num_layers\": 2000000000", "'num_layers' is missing, or not from 1 to 1024"},
        {"\"attention_head_dim\": 8", "\"attention_head_dim\": 128", "shape is"},
        {"\"sample_size\": 8", "\"sample_size\": 4096", "'sample_size'"},
        {"\"num_embeds_ada_norm\": 3", "\"num_embeds_ada_norm\": 999999", "shape is"},
        {"\"out_channels\": 8", "\"out_channels\": 5", "'out_channels' is 5"},
        {"{", "", "not"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(bad_config(cases[i][0], cases[i][1], cases[i][2]) == PASSED, "case %zu", i);
    CHECK(put_config("{", "{") == PASSED && own_embedding() == PASSED, "an own embedding");
    char path[600];
    snprintf(path, sizeof path, "%s/config.json", scratch("bad-diffusers"));
    unlink(path);
    struct checkpoint c;
    CHECK(checkpoint_open(scratch("bad-diffusers"), NULL, &c) == ERR_INPUT &&
              strstr(error_message(), "config.json must lie beside it"),
          "%s", error_message());
    return PASSED;
}

const struct test interop_tests[] = {{"shards", test_shards},
                                     {"deepspeed", test_deepspeed},
                                     {"model_states_alone", test_model_states_alone},
                                     {"bad_indexes", test_bad_indexes},
                                     {"missing_tensor", test_missing_tensor},
                                     {"bad_deepspeed", test_bad_deepspeed},
                                     {"bad_directories", test_bad_directories},
                                     {"inferred", test_inferred},
                                     {"there_and_back", test_there_and_back},
                                     {"both_sets", test_both_sets},
                                     {"rounding", test_rounding},
                                     {"diffusers", test_diffusers},
                                     {"diffusers_read", test_diffusers_read},
                                     {"diffusers_answers", test_diffusers_answers},
                                     {"bad_diffusers", test_bad_diffusers},
                                     {0}};
