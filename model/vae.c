// A part of an autoencoder on a device: memory, weights, and runs over batches and tiles.
#include "model/vae.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/vae_net.h"
#include "runtime/recording.h"

enum { TILE_OVERLAP = 4 }; // tiles overlap by a quarter of their side

struct vae {
    struct vae_file file; // a copy: no longer open
    struct vae_options options;
    struct vae_net net;
    struct plan *plan;
    struct context ctx;
    struct tensor input, output; // [N,C,H,W] f32
    int height, width;           // of the input, at present
    float *host_in, *host_out;   // of one run
    struct recording recording;  // of the network, where there are no tiles
};

// ---- sizes --------------------------------------------------------------------------------------

// Of the part's input, and how much larger or smaller its output is.
static int in_channels(const struct vae *v)
{
    return v->options.part == VAE_ENCODER ? v->file.image_channels : v->file.latent_channels;
}

static int out_channels(const struct vae *v)
{
    if (v->options.part == VAE_DECODER)
        return v->file.image_channels;
    return v->file.kind == VAE_KL ? 2 * v->file.latent_channels : v->file.latent_channels;
}

static void resize(struct vae *v, int height, int width)
{
    const struct vae_value *out = &v->net.values[v->net.out];
    vae_net_resize(&v->net, v->options.batch, height, width);
    v->height = height;
    v->width = width;
    v->input.shape[2] = height;
    v->input.shape[3] = width;
    v->output.shape[2] = out->height;
    v->output.shape[3] = out->width;
}

// ---- one run ------------------------------------------------------------------------------------

static const struct tensor *weight(const struct vae_net *n, int i)
{
    return i < 0 ? NULL : &n->weights[i].t;
}

static int run_step(struct vae *v, const struct vae_step *s)
{
    struct vae_net *n = &v->net;
    struct tensor *out = &n->values[s->out].t, *in = &n->values[s->in].t;
    switch (s->kind) {
    case VAE_CONV:
        return op_conv2d(&v->ctx, out, 0, in, weight(n, s->weight), weight(n, s->bias), &s->conv);
    case VAE_NORM:
        return op_group_norm(&v->ctx, out, in, weight(n, s->weight), weight(n, s->bias),
                             v->options.batch, v->file.groups, 1e-6f, s->silu);
    case VAE_ATTENTION:
        return op_attention_single(&v->ctx, out, in, &n->values[s->keys].t, &n->values[s->values].t,
                                   v->options.batch);
    }
    return 0;
}

// input -> output
static int forward(struct vae *v)
{
    TRY(op_patchify(&v->ctx, &v->net.values[0].t, &v->input, 1, PATCH_PQC));
    for (int i = 0; i < v->net.step_count; i++) {
        profile_layer(&v->ctx, i);
        TRY(run_step(v, &v->net.steps[i]));
    }
    return op_rows_to_images(&v->ctx, &v->output, &v->net.values[v->net.out].t);
}

static int forward_of(void *user)
{
    return forward(user);
}

int vae_run(struct vae *v)
{
    if (v->options.tile)
        return forward(v);
    return recording_run(&v->ctx, &v->recording, forward_of, v);
}

double vae_flops(const struct vae *v)
{
    double flops = 0;
    for (int i = 0; i < v->net.step_count; i++) {
        const struct vae_step *s = &v->net.steps[i];
        const struct vae_value *out = &v->net.values[s->out];
        const double pixels = (double)out->height * out->width, columns = (double)out->columns;
        if (s->kind == VAE_CONV)
            flops += 2 * pixels * (double)tensor_count(&v->net.weights[s->weight].t);
        else if (s->kind == VAE_ATTENTION)
            flops += 4 * pixels * pixels * columns;
    }
    return flops * v->options.batch;
}

struct context *vae_context(struct vae *v)
{
    return &v->ctx;
}

// ---- memory -------------------------------------------------------------------------------------

static int plan_weights(struct vae *v)
{
    for (int i = 0; i < v->net.weight_count; i++) {
        struct vae_weight *w = &v->net.weights[i];
        const struct conv shape = {.kernel_h = w->kernel_h, .kernel_w = w->kernel_w};
        const bool half = v->ctx.dev->half_weights && !w->vector;
        const int64_t columns = w->vector ? 1 : conv_columns(&shape, w->channels);
        const int64_t dims[] = {w->rows, columns};
        TRY(plan_tensor(v->plan, w->from->name, half ? PLAN_HALF : PLAN_WEIGHTS, half ? BF16 : F32,
                        0, PLAN_FOREVER, &w->t, w->vector ? 1 : 2, dims));
        const size_t packed = w->vector || half ? 0 : op_packed_bytes(&v->ctx, &w->t);
        if (packed == 0)
            continue;
        TRY(PLAN_TENSOR(v->plan, "packed", PLAN_PACKED, F32, 0, PLAN_FOREVER, &w->packed.copy,
                        (int64_t)(packed / sizeof(float))));
        w->t.packed = &w->packed;
    }
    return 0;
}

static int plan_values(struct vae *v)
{
    for (int i = 0; i < v->net.value_count; i++) {
        struct vae_value *x = &v->net.values[i];
        TRY(PLAN_TENSOR(v->plan, "pixels", PLAN_ACTIVATIONS, x->f32 ? F32 : v->ctx.dev->act,
                        x->first, x->last, &x->t, (int64_t)v->options.batch * x->height * x->width,
                        x->columns));
    }
    const struct vae_value *out = &v->net.values[v->net.out];
    TRY(PLAN_TENSOR(v->plan, "input", PLAN_INPUT, F32, 0, PLAN_FOREVER, &v->input, v->options.batch,
                    in_channels(v), v->height, v->width));
    return PLAN_TENSOR(v->plan, "output", PLAN_INPUT, F32, 0, PLAN_FOREVER, &v->output,
                       v->options.batch, out_channels(v), out->height, out->width);
}

// Tiles begin at multiples of tile_step(); those that reach the end of a side are shorter.
static int tile_step(const struct vae *v)
{
    return v->options.tile - v->options.tile / TILE_OVERLAP;
}

static int tile_side(const struct vae *v, int from, int side)
{
    return side - from < v->options.tile ? side - from : v->options.tile;
}

// Scratch does for each size that will come.
static int plan_scratch(struct vae *v)
{
    const struct vae_options *o = &v->options;
    const int height = v->height, width = v->width;
    v->ctx.dry = true;
    for (int y = 0; o->tile && y < o->height; y += tile_step(v))
        for (int x = 0; x < o->width; x += tile_step(v)) {
            resize(v, tile_side(v, y, o->height), tile_side(v, x, o->width));
            TRY(forward(v));
        }
    resize(v, height, width);
    TRY(forward(v));
    if (v->ctx.space_wanted == 0)
        return 0;
    return PLAN_TENSOR(v->plan, "scratch", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &v->ctx.space,
                       (int64_t)((v->ctx.space_wanted + 3) / 4));
}

static int plan_all(struct vae *v)
{
    TRY(plan_new(v->ctx.dev, &v->plan));
    TRY(plan_weights(v));
    TRY(plan_values(v));
    TRY(plan_scratch(v));
    TRY(plan_layout(v->plan, v->options.limit));
    TRY(plan_commit(v->plan));
    v->ctx.dry = false;
    v->host_in = malloc(tensor_bytes(&v->input));
    v->host_out = malloc(tensor_bytes(&v->output));
    return v->host_in && v->host_out
               ? 0
               : fail(ERR_NOMEM, "no host memory for %d images", v->options.batch);
}

// ---- weights ------------------------------------------------------------------------------------

static uint16_t round_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static int write_weight(struct vae *v, const struct vae_weight *w, const float *laid)
{
    const int64_t count = tensor_count(&w->t);
    if (w->t.dtype == F32)
        return tensor_write(&v->ctx, &w->t, laid);
    uint16_t *half = malloc((size_t)count * sizeof *half);
    if (!half)
        return fail(ERR_NOMEM, "no host memory for %s", w->from->name);
    for (int64_t i = 0; i < count; i++)
        half[i] = round_bf16(laid[i]);
    const int code = tensor_write(&v->ctx, &w->t, half);
    free(half);
    return code;
}

static int load_weight(struct vae *v, const struct vae_weight *w)
{
    float *from = malloc((size_t)w->from->count * sizeof *from + 1);
    float *laid = calloc((size_t)tensor_count(&w->t), sizeof *laid);
    int code = from && laid ? 0 : fail(ERR_NOMEM, "no host memory for %s", w->from->name);
    if (code == 0)
        code = safetensors_read_f32(v->file.file, w->from, from, 0, w->from->count);
    for (int64_t i = 0; code == 0 && i < w->from->count; i++)
        if (!isfinite(from[i]))
            code = fail(ERR_INPUT, "%s: %s has a value that is not finite", v->file.path,
                        w->from->name);
    if (code == 0 && w->vector)
        memcpy(laid, from, (size_t)w->from->count * sizeof *laid);
    else if (code == 0)
        conv_weight(laid, from, w->out, w->channels, w->kernel_h, w->kernel_w);
    if (code == 0)
        code = write_weight(v, w, laid);
    free(from);
    free(laid);
    return code;
}

// ---- making and freeing -------------------------------------------------------------------------

static int check_options(const struct vae_file *f, const struct vae_options *o)
{
    const int unit = o->part == VAE_ENCODER ? f->factor : 1;
    if (o->batch < 1 || o->height < 1 || o->width < 1 || o->height % unit || o->width % unit)
        return fail(ERR_INPUT,
                    "%s: %d x %d pixels: the autoencoder takes sides that are multiples of %d",
                    f->path, o->height, o->width, unit);
    if (o->tile != 0 && (o->tile < 8 || o->tile % TILE_OVERLAP || o->part == VAE_ENCODER))
        return fail(ERR_INPUT,
                    "tiles of %d latents: at least 8, a multiple of %d, and for decoding", o->tile,
                    TILE_OVERLAP);
    // so that rows of pixels can be counted in 31 bits
    const int64_t side = 65536 / f->factor, most = o->part == VAE_ENCODER ? 65536 : side;
    if (o->height > most || o->width > most)
        return fail(ERR_INPUT, "an image of %d x %d is too large for the autoencoder", o->height,
                    o->width);
    const int64_t scale = o->part == VAE_ENCODER ? 1 : f->factor;
    const int64_t h = o->tile && o->tile < o->height ? o->tile : o->height;
    const int64_t w = o->tile && o->tile < o->width ? o->tile : o->width;
    if (o->batch * h * scale * w * scale > INT32_MAX / 4)
        return fail(ERR_INPUT, "%d images of %d x %d at a time are too many for the autoencoder",
                    o->batch, o->height, o->width);
    return 0;
}

// Kernels count elements, or fours of them, in 32 bits.
static int check_counts(const struct vae *v)
{
    for (int i = 0; i < v->net.value_count; i++) {
        const struct vae_value *x = &v->net.values[i];
        const int64_t rows = (int64_t)v->options.batch * x->height * x->width;
        if (rows * x->columns / (x->columns % 4 ? 1 : 4) > UINT32_MAX)
            return fail(ERR_NOMEM, "%d images of %d x %d at a time are too many for the autoencoder",
                        v->options.batch, v->options.height, v->options.width);
    }
    return 0;
}

int vae_new(struct device *dev, struct stream *stream, const struct vae_file *f,
            const struct vae_options *options, struct vae **out)
{
    *out = NULL;
    TRY(check_options(f, options));
    struct vae *v = calloc(1, sizeof *v);
    if (!v)
        return fail(ERR_NOMEM, "no host memory for an autoencoder");
    v->file = *f;
    v->options = *options;
    v->ctx.dev = dev;
    v->ctx.stream = stream;
    if (options->tile >= options->height && options->tile >= options->width)
        v->options.tile = 0;
    v->input.ndim = v->output.ndim = 4;
    int code = vae_net_build(&v->file, options->part, &v->net);
    const int tile = v->options.tile;
    if (code == 0) {
        resize(v, tile && tile < options->height ? tile : options->height,
               tile && tile < options->width ? tile : options->width);
        code = check_counts(v);
        if (code == 0)
            code = plan_all(v);
    }
    for (int i = 0; code == 0 && i < v->net.weight_count; i++)
        code = load_weight(v, &v->net.weights[i]);
    if (code < 0) {
        vae_free(v);
        return code;
    }
    v->file.file = NULL;
    *out = v;
    return 0;
}

void vae_free(struct vae *v)
{
    if (!v)
        return;
    if (v->plan) {
        recording_reset(&v->ctx, &v->recording);
        plan_free(v->plan);
    }
    vae_net_free(&v->net);
    free(v->host_in);
    free(v->host_out);
    free(v);
}

uint64_t vae_memory(const struct vae *v)
{
    return plan_total(v->plan);
}

// ---- batches ------------------------------------------------------------------------------------

// TAESD's images are in [0,1], and it squeezes the latents that it gets into [-3,3].
static void tidy_in(const struct vae *v, float *x, int64_t count)
{
    if (v->file.kind == VAE_KL)
        return;
    for (int64_t i = 0; i < count; i++)
        x[i] = v->options.part == VAE_ENCODER ? (x[i] + 1) / 2 : tanhf(x[i] / 3) * 3;
}

static void tidy_out(const struct vae *v, float *y, int64_t count)
{
    if (v->file.kind == VAE_KL || v->options.part == VAE_ENCODER)
        return;
    for (int64_t i = 0; i < count; i++)
        y[i] = 2 * y[i] - 1;
}

// A rectangle of images [N, channels, height, width] in host memory.
struct area {
    int height, width; // of the whole
    int y, x;
};

// Up to a batch of images, each the present size at `from`, into v->host_out.
static int run_batch(struct vae *v, const float *in, int count, struct area from)
{
    const int planes = count * in_channels(v);
    const size_t row = (size_t)v->width * sizeof *in;
    const int64_t values = (int64_t)planes * v->height * v->width;
    float *to = v->host_in;
    memset(v->host_in, 0, tensor_bytes(&v->input));
    for (int p = 0; p < planes; p++)
        for (int y = 0; y < v->height; y++, to += v->width)
            memcpy(to, in + ((int64_t)p * from.height + from.y + y) * from.width + from.x, row);
    tidy_in(v, v->host_in, values);
    TRY(tensor_write(&v->ctx, &v->input, v->host_in));
    TRY(vae_run(v));
    TRY(tensor_read(&v->ctx, &v->output, v->host_out));
    tidy_out(v, v->host_out, tensor_count(&v->output));
    return 0;
}

// ---- encoding -----------------------------------------------------------------------------------

// What the encoder made of one image as mean and log variance.
static void write_moments(const struct vae *v, const float *made, float *moments)
{
    const int64_t half = (int64_t)v->file.latent_channels * v->output.shape[2] * v->output.shape[3];
    memcpy(moments, made, (size_t)half * sizeof *moments);
    for (int64_t i = half; i < 2 * half; i++)
        moments[i] = v->file.kind == VAE_TINY ? -30 : fminf(fmaxf(made[i], -30), 20);
}

int vae_encode(struct vae *v, const float *images, int count, float *moments)
{
    BUG_IF(v->options.part != VAE_ENCODER);
    const int64_t in = tensor_count(&v->input) / v->options.batch;
    const int64_t made = tensor_count(&v->output) / v->options.batch;
    const int64_t latents = v->output.shape[2] * v->output.shape[3] * v->file.latent_channels;
    for (int first = 0; first < count; first += v->options.batch) {
        const int n = count - first < v->options.batch ? count - first : v->options.batch;
        TRY(run_batch(v, images + first * in, n, (struct area){v->height, v->width, 0, 0}));
        for (int i = 0; i < n; i++)
            write_moments(v, v->host_out + i * made, moments + (first + i) * 2 * latents);
    }
    return 0;
}

// ---- decoding, whole and in tiles ---------------------------------------------------------------

static int decode_whole(struct vae *v, const float *latents, int count, float *images)
{
    const int64_t made = tensor_count(&v->output) / v->options.batch;
    TRY(run_batch(v, latents, count, (struct area){v->height, v->width, 0, 0}));
    memcpy(images, v->host_out, (size_t)(count * made) * sizeof *images);
    return 0;
}

// Tiles as they were blended but before they are cut: the next ones are blended with what hangs
// over.
struct mosaic {
    float *above, *left; // a tile for each column; the one to the left
    int64_t room;        // floats of a tile
    int64_t above_height, left_width;
};

// The first rows of `made` (`down`; else columns) become a mix with the last of `other`, which has
// the same length the other way.
static void blend(float *made, int64_t height, int64_t width, const float *other,
                  int64_t other_side, int planes, int64_t extent, bool down)
{
    const int64_t side = down ? height : width;
    extent = extent < side ? extent : side;
    extent = extent < other_side ? extent : other_side;
    const int64_t other_height = down ? other_side : height;
    const int64_t other_width = down ? width : other_side;
    for (int p = 0; p < planes; p++)
        for (int64_t y = 0; y < (down ? extent : height); y++)
            for (int64_t x = 0; x < (down ? width : extent); x++) {
                const int64_t oy = down ? other_height - extent + y : y;
                const int64_t ox = down ? x : other_width - extent + x;
                const float share = (float)(down ? y : x) / (float)extent;
                float *at = made + (p * height + y) * width + x;
                *at = other[(p * other_height + oy) * other_width + ox] * (1 - share) + *at * share;
            }
}

// The tile at (y, x), in latents, is in v->host_out: blends it, keeps it for the next, and copies
// what is its own into the images.
static void lay_tile(struct vae *v, struct mosaic *m, int y, int x, int planes, float *images)
{
    const int f = v->file.factor;
    const int64_t height = v->output.shape[2], width = v->output.shape[3];
    const int64_t extent = v->options.tile * f / TILE_OVERLAP, own = tile_step(v) * f;
    const int64_t whole_width = (int64_t)v->options.width * f;
    const int64_t whole_height = (int64_t)v->options.height * f;
    float *above = m->above + x / tile_step(v) * m->room;
    if (y > 0)
        blend(v->host_out, height, width, above, m->above_height, planes, extent, true);
    if (x > 0)
        blend(v->host_out, height, width, m->left, m->left_width, planes, extent, false);
    memcpy(above, v->host_out, (size_t)(planes * height * width) * sizeof *above);
    memcpy(m->left, v->host_out, (size_t)(planes * height * width) * sizeof *above);
    m->left_width = width;
    for (int p = 0; p < planes; p++)
        for (int64_t row = 0; row < height && row < own; row++)
            memcpy(images + ((p * whole_height) + y * f + row) * whole_width + (int64_t)x * f,
                   v->host_out + (p * height + row) * width,
                   (size_t)(width < own ? width : own) * sizeof *images);
}

static int decode_tiles(struct vae *v, const float *latents, int count, float *images)
{
    const struct vae_options *o = &v->options;
    const int64_t side = (int64_t)o->tile * v->file.factor, planes = count * out_channels(v);
    struct mosaic m = {.room = planes * side * side};
    m.above = malloc((size_t)(m.room * (o->width / tile_step(v) + 1)) * sizeof *m.above);
    m.left = malloc((size_t)m.room * sizeof *m.left);
    int code = m.above && m.left ? 0 : fail(ERR_NOMEM, "no host memory for the tiles of an image");
    for (int y = 0; code == 0 && y < o->height; y += tile_step(v)) {
        for (int x = 0; code == 0 && x < o->width; x += tile_step(v)) {
            resize(v, tile_side(v, y, o->height), tile_side(v, x, o->width));
            code = run_batch(v, latents, count, (struct area){o->height, o->width, y, x});
            if (code == 0)
                lay_tile(v, &m, y, x, (int)planes, images);
        }
        m.above_height = v->output.shape[2];
    }
    free(m.above);
    free(m.left);
    return code;
}

int vae_decode(struct vae *v, const float *latents, int count, float *images)
{
    BUG_IF(v->options.part != VAE_DECODER);
    const int64_t pixels = (int64_t)v->options.height * v->options.width;
    const int64_t in = pixels * in_channels(v);
    const int64_t made = pixels * v->file.factor * v->file.factor * out_channels(v);
    for (int first = 0; first < count; first += v->options.batch) {
        const int n = count - first < v->options.batch ? count - first : v->options.batch;
        TRY((v->options.tile ? decode_tiles : decode_whole)(v, latents + first * in, n,
                                                            images + first * made));
    }
    return 0;
}

void vae_sample(const float *moments, const float *noise, int64_t count, float scale, float shift,
                float *out)
{
    for (int64_t i = 0; i < count; i++) {
        const float spread = noise ? expf(moments[count + i] / 2) * noise[i] : 0;
        out[i] = (moments[i] + spread - shift) * scale;
    }
}
