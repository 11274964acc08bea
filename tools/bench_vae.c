#include "tools/bench_vae.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/vae.h"
#include "tools/bench_profile.h"
#include "tools/progress.h"

// ---- Stable Diffusion's autoencoder with random weights -----------------------------------------

// Written to a file twice: names and shapes, then values.
struct random_file {
    struct safetensors_writer *file;
    bool values;
    float *noise;
};

enum { NOISE = 1 << 20, WIDEST = 512 };

static int put(struct random_file *f, const char *name, const char *what, int ndim,
               const int64_t *shape, double scale)
{
    char full[200];
    snprintf(full, sizeof full, "%s.%s", name, what);
    if (!f->values)
        return safetensors_declare(f->file, full, ST_F16, ndim, shape);
    float piece[4096];
    int64_t count = 1;
    for (int i = 0; i < ndim; i++)
        count *= shape[i];
    for (int64_t at = 0; at < count; at += 4096) {
        const int64_t n = count - at < 4096 ? count - at : 4096;
        for (int64_t i = 0; i < n; i++)
            piece[i] = (float)scale * f->noise[(at + i) % NOISE];
        TRY(safetensors_write_as(f->file, ST_F16, piece, n));
    }
    return 0;
}

static int put_conv(struct random_file *f, const char *name, int out, int in, int kernel)
{
    TRY(put(f, name, "weight", 4, (int64_t[]){out, in, kernel, kernel},
            sqrt(1.0 / (in * kernel * kernel))));
    return put(f, name, "bias", 1, (int64_t[]){out}, 0.1);
}

static int put_norm(struct random_file *f, const char *name, int channels)
{
    TRY(put(f, name, "weight", 1, (int64_t[]){channels}, 1));
    return put(f, name, "bias", 1, (int64_t[]){channels}, 0.1);
}

#define NAME(name, ...) \
    char name[120];     \
    snprintf(name, sizeof name, __VA_ARGS__)

static int put_resnet(struct random_file *f, const char *part, const char *at, int number, int in,
                      int out)
{
    static const char *const parts[] = {"norm1", "conv1", "norm2", "conv2", "conv_shortcut"};
    char name[5][120];
    for (int i = 0; i < 5; i++)
        snprintf(name[i], sizeof name[i], "%s.%s.resnets.%d.%s", part, at, number, parts[i]);
    TRY(put_norm(f, name[0], in));
    TRY(put_conv(f, name[1], out, in, 3));
    TRY(put_norm(f, name[2], out));
    TRY(put_conv(f, name[3], out, out, 3));
    return in == out ? 0 : put_conv(f, name[4], out, in, 1);
}

static int put_middle(struct random_file *f, const char *part)
{
    static const char *const products[] = {"to_q", "to_k", "to_v", "to_out.0"};
    NAME(norm, "%s.mid_block.attentions.0.group_norm", part);
    TRY(put_resnet(f, part, "mid_block", 0, WIDEST, WIDEST));
    TRY(put_norm(f, norm, WIDEST));
    for (int i = 0; i < 4; i++) {
        NAME(product, "%s.mid_block.attentions.0.%s", part, products[i]);
        TRY(put_conv(f, product, WIDEST, WIDEST, 1));
    }
    return put_resnet(f, part, "mid_block", 1, WIDEST, WIDEST);
}

static int put_ends(struct random_file *f, const char *part, int in, int first, int last, int out)
{
    NAME(conv_in, "%s.conv_in", part);
    NAME(norm, "%s.conv_norm_out", part);
    NAME(conv_out, "%s.conv_out", part);
    TRY(put_conv(f, conv_in, first, in, 3));
    TRY(put_norm(f, norm, last));
    return put_conv(f, conv_out, out, last, 3);
}

// One level: `count` blocks, then what changes the size.
static int put_level(struct random_file *f, bool down, int level, int in, int out, int count,
                     bool last)
{
    const char *part = down ? "encoder" : "decoder", *way = down ? "down" : "up";
    NAME(at, "%s_blocks.%d", way, level);
    NAME(sampler, "%s.%s_blocks.%d.%ssamplers.0.conv", part, way, level, way);
    for (int i = 0; i < count; i++)
        TRY(put_resnet(f, part, at, i, i ? out : in, out));
    return last ? 0 : put_conv(f, sampler, out, out, 3);
}

static int put_all(struct random_file *f)
{
    static const int widths[] = {128, 256, 512, 512};
    TRY(put_ends(f, "encoder", 3, widths[0], WIDEST, 8));
    TRY(put_ends(f, "decoder", 4, WIDEST, widths[0], 3));
    for (int i = 0; i < 4; i++) {
        TRY(put_level(f, true, i, widths[i ? i - 1 : 0], widths[i], 2, i == 3));
        TRY(put_level(f, false, i, widths[i ? 4 - i : 3], widths[3 - i], 3, i == 3));
    }
    TRY(put_middle(f, "encoder"));
    TRY(put_middle(f, "decoder"));
    TRY(put_conv(f, "quant_conv", 8, 8, 1));
    return put_conv(f, "post_quant_conv", 4, 4, 1);
}

static int write_random(const char *path)
{
    struct random_file f = {.noise = malloc(NOISE * sizeof(float))};
    if (!f.noise)
        return fail(ERR_NOMEM, "out of memory");
    noise_fill(f.noise, NOISE, 1);
    int code = safetensors_create(path, &f.file);
    if (code == 0)
        code = put_all(&f);
    if (code == 0)
        code = safetensors_begin(f.file);
    f.values = true;
    if (code == 0)
        code = put_all(&f);
    if (code == 0)
        code = safetensors_commit(f.file);
    else
        safetensors_abort(f.file);
    free(f.noise);
    return code;
}

// The file of random weights is gone from its directory once it is open.
static int open_random(struct vae_file *out)
{
    const char *directory = getenv("TMPDIR");
    char path[4200];
    snprintf(path, sizeof path, "%.4000s/ditmoe-vae-%ld.safetensors",
             directory ? directory : "/tmp", (long)getpid());
    TRY(write_random(path));
    const int code = vae_file_open(path, out);
    unlink(path);
    return code;
}

// ---- rows ---------------------------------------------------------------------------------------

struct bench {
    struct device *dev;
    struct stream *stream;
    const struct vae_file *file;
    const struct step_settings *o;
    const struct ceilings *ceilings;
    struct bench_profile *profile; // or NULL
    json_t *rows;
    FILE *table;
};

static void add_row(const struct bench *b, struct vae *v, const char *name, const char *what,
                    int batch, double seconds)
{
    char rate[32], memory[32];
    const double flops = vae_flops(v) / seconds;
    fprintf(b->table, "%-20s %-6s %5d %9.2f ms %10.2f %15s %6.1f%% %10s\n", name, what, batch,
            1e3 * seconds, batch / seconds, format_rate(flops, "FLOP", rate),
            100 * flops / b->ceilings->flops, format_bytes((double)vae_memory(v), memory));
    fflush(b->table);
    json_array_append_new(b->rows, json_pack("{s:s, s:s, s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:I}",
                                             "bench", "vae", "name", name, "what", what, "type",
                                             dtype_name(b->dev->act), "batch", batch, "seconds",
                                             seconds, "images_per_s", batch / seconds, "gflops",
                                             1e-9 * flops, "of_product", flops / b->ceilings->flops,
                                             "memory", (json_int_t)vae_memory(v)));
}

static int run(void *user)
{
    return vae_run(user);
}

static int profile_run(const struct bench *b, struct vae *v, const char *name, const char *what,
                       int batch)
{
    struct context *c = vae_context(v);
    struct profile *p;
    TRY(profile_new(c, &p));
    int code = profile_start(p);
    if (code >= 0)
        code = vae_run(v);
    const int stopped = profile_stop(p);
    code = code < 0 ? code : stopped;
    if (code >= 0)
        code = bench_profile_add(b->profile, p, name, what, batch, 1);
    profile_free(p);
    return code;
}

// What the network reads is noise.
static int fill_input(struct vae *v, const struct vae_file *f, const struct vae_options *o,
                      int size)
{
    const size_t pixels = (size_t)o->batch * (size_t)size * (size_t)size;
    const size_t count = pixels * (size_t)(f->image_channels + 2 * f->latent_channels);
    float *in = malloc(count * sizeof *in), *out = malloc(count * sizeof *out);
    int code = in && out ? 0 : fail(ERR_NOMEM, "out of memory for %d images", o->batch);
    if (code == 0) {
        noise_fill(in, count, 2);
        code = o->part == VAE_ENCODER ? vae_encode(v, in, o->batch, out)
                                      : vae_decode(v, in, o->batch, out);
    }
    free(in);
    free(out);
    return code;
}

static int bench_part(const struct bench *b, enum vae_part part, int size, int batch)
{
    const struct vae_file *f = b->file;
    const int side = part == VAE_ENCODER ? size : size / f->factor;
    const struct vae_options options = {
        .part = part, .batch = batch, .height = side, .width = side};
    const char *what = part == VAE_ENCODER ? "encode" : "decode";
    struct vae *v;
    char name[64];
    double seconds = 0;
    if (size % f->factor)
        return fail(ERR_INPUT, "images of %d: the autoencoder takes multiples of %d", size,
                    f->factor);
    snprintf(name, sizeof name, "%s %d", f->kind == VAE_KL ? "AutoencoderKL" : "AutoencoderTiny",
             size);
    TRY(vae_new(b->dev, b->stream, f, &options, &v));
    int code = fill_input(v, f, &options, size);
    if (code == 0)
        code = measure_calls(b->dev, b->stream, b->o->rounds, 0.2, run, v, &seconds);
    if (code == 0)
        add_row(b, v, name, what, batch, seconds);
    if (code == 0 && b->profile)
        code = profile_run(b, v, name, what, batch);
    vae_free(v);
    return code;
}

// Calls bench_part() for every number of both lists.
static int bench_lists(const struct bench *b, const struct bench_vae_settings *v)
{
    for (const char *size = v->sizes; *size;) {
        char *size_end, *batch_end;
        const long s = strtol(size, &size_end, 10);
        if (size_end == size || s < 1 || s > 8192 || (*size_end && *size_end != ','))
            return fail(ERR_INPUT, "--image-size %s: not a list of numbers such as 256,512",
                        v->sizes);
        for (const char *batch = b->o->batches; *batch;) {
            const long n = strtol(batch, &batch_end, 10);
            if (batch_end == batch || n < 1 || n > 4096 || (*batch_end && *batch_end != ','))
                return fail(ERR_INPUT, "--batch %s: not a list of numbers such as 1,8",
                            b->o->batches);
            if (v->part != 1)
                TRY(bench_part(b, VAE_DECODER, (int)s, (int)n));
            if (v->part != 0)
                TRY(bench_part(b, VAE_ENCODER, (int)s, (int)n));
            batch = *batch_end ? batch_end + 1 : batch_end;
        }
        size = *size_end ? size_end + 1 : size_end;
    }
    return 0;
}

int bench_vae(struct device *dev, struct stream *stream, const struct bench_vae_settings *v,
              const struct step_settings *o, const struct ceilings *ceilings, json_t *rows,
              FILE *table)
{
    struct vae_file file;
    struct bench_profile profile = {.ceilings = ceilings};
    TRY(v->vae ? vae_file_open(v->vae, &file) : open_random(&file));
    const struct bench b = {.dev = dev,
                            .stream = stream,
                            .file = &file,
                            .o = o,
                            .ceilings = ceilings,
                            .profile = o->profile || o->trace ? &profile : NULL,
                            .rows = rows,
                            .table = table};
    fprintf(table, "%-20s %-6s %5s %12s %10s %15s %7s %10s\n", "autoencoder", "part", "batch",
            "time", "images/s", "rate", "product", "memory");
    int code = bench_lists(&b, v);
    if (code >= 0 && o->profile)
        bench_profile_print(&profile, stderr);
    if (code >= 0 && o->trace)
        code = bench_profile_trace(&profile, o->trace);
    bench_profile_free(&profile);
    vae_file_close(&file);
    return code;
}
