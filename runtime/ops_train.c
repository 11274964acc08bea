// Diffusion, normal noise and the optimiser.
#include "runtime/ops_internal.h"

#include <math.h>

enum { GROUP = 256, NORMAL_GROUP = 64, NORM_PART = 4096, MOST_IMAGES = 32768 };

// A 64-bit number as the two 32-bit arguments that kernels take.
#define HALVES(n) UINT((int64_t)((uint64_t)(n)&0xffffffffu)), UINT((int64_t)((uint64_t)(n) >> 32))

static bool is_f32_images(const struct tensor *t)
{
    return t->ndim == 4 && t->dtype == F32;
}

// Values an image.
static int64_t image_size(const struct tensor *t)
{
    return t->shape[1] * t->shape[2] * t->shape[3];
}

static bool same_images(const struct tensor *a, const struct tensor *b)
{
    for (int i = 0; i < 4; i++)
        if (a->shape[i] != b->shape[i])
            return false;
    return is_f32_images(a) && is_f32_images(b);
}

static bool is_f32_vector(const struct tensor *t, int64_t count)
{
    return t->dtype == F32 && tensor_count(t) == count;
}

static bool is_bf16_vector(const struct tensor *t, int64_t count)
{
    return t->dtype == BF16 && tensor_count(t) == count;
}

// ---- diffusion ----------------------------------------------------------------------------------

int op_diffuse(struct context *c, struct tensor *xt, const struct tensor *x,
               const struct tensor *noise, const struct tensor *at)
{
    BUG_IF(!same_images(xt, x) || !same_images(noise, x));
    int64_t N = x->shape[0], P = image_size(x);
    BUG_IF(!is_f32_vector(at, N * TIME_COLUMNS));
    int64_t chunk = cover(op_chunk(c, N * P, 256, P > 256 ? P : 256), 16) * 16;
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_diffuse_cpu, cover(P, chunk), N, 1, BUF(xt), BUF(x), BUF(noise),
                      BUF(at), UINT(P), UINT(chunk));
    return LAUNCH(c, KERNEL_diffuse, cover(P, GROUP), N < MOST_IMAGES ? N : MOST_IMAGES, 1, BUF(xt),
                  BUF(x), BUF(noise), BUF(at), UINT(N), UINT(P));
}

// out has the sizes of x and at least its channels; dout those of out.
static bool answers(const struct tensor *out, const struct tensor *dout, const struct tensor *x)
{
    return is_f32_images(out) && (!dout || same_images(dout, out)) &&
           out->shape[0] == x->shape[0] && out->shape[1] >= x->shape[1] &&
           out->shape[2] == x->shape[2] && out->shape[3] == x->shape[3];
}

int op_flow_loss(struct context *c, struct tensor *loss, struct tensor *dout,
                 const struct tensor *out, const struct tensor *x, const struct tensor *noise,
                 float scale)
{
    int64_t N = x->shape[0], P = image_size(x), Q = image_size(out);
    BUG_IF(!same_images(noise, x) || !answers(out, dout, x) || !is_f32_vector(loss, N));
    float factor = (float)(2.0 * (double)scale / (double)P);
    return LAUNCH(c, FORM(c, flow_loss), N, 1, 1, BUF(loss), BUF_OR_NULL(dout), BUF(out), BUF(x),
                  BUF(noise), UINT(P), UINT(Q), FLOAT(factor));
}

int op_ddpm_loss(struct context *c, struct tensor *loss, struct tensor *terms, struct tensor *dout,
                 const struct tensor *out, const struct tensor *x, const struct tensor *noise,
                 const struct tensor *at, float scale)
{
    int64_t N = x->shape[0], P = image_size(x), Q = image_size(out);
    BUG_IF(!same_images(noise, x) || !answers(out, dout, x) || !is_f32_vector(loss, N));
    BUG_IF((Q != P && Q != 2 * P) || !is_f32_vector(terms, 2 * N));
    BUG_IF(!is_f32_vector(at, N * TIME_COLUMNS));
    return LAUNCH(c, FORM(c, ddpm_loss), N, 1, 1, BUF(loss), BUF(terms), BUF_OR_NULL(dout),
                  BUF(out), BUF(x), BUF(noise), BUF(at), UINT(N), UINT(P), UINT(Q),
                  FLOAT((float)((double)scale / (double)P)));
}

int op_sample_step(struct context *c, struct tensor *z, struct tensor *kept,
                   const struct tensor *out, const struct tensor *noise, const struct tensor *k,
                   int channels)
{
    BUG_IF(!is_f32_images(z) || !is_f32_images(out) || (kept && !same_images(kept, z)));
    int64_t N = z->shape[0], C = z->shape[1], P = image_size(z), Q = image_size(out);
    bool guided = out->shape[0] != N;
    BUG_IF(out->shape[1] < C || out->shape[2] != z->shape[2] || out->shape[3] != z->shape[3]);
    BUG_IF((guided && out->shape[0] != 2 * N) || !is_f32_vector(k, STEP_COUNT));
    BUG_IF(channels < 0 || channels > out->shape[1] || (noise && !same_images(noise, z)));
    int64_t first = guided ? channels * z->shape[2] * z->shape[3] : 0;
    return LAUNCH(c, KERNEL_sample_step, cover(P, GROUP), N < MOST_IMAGES ? N : MOST_IMAGES, 1,
                  BUF(z), BUF_OR_NULL(kept), BUF(out), BUF_OR_NULL(noise), BUF(k), UINT(first),
                  UINT(N), UINT(P), UINT(Q));
}

int op_normal(struct context *c, struct tensor *out, uint64_t seed, uint64_t stream, uint64_t first)
{
    BUG_IF(out->dtype != F32 || first % 4 != 0);
    int64_t count = tensor_count(out), chunk = op_chunk(c, count, 64, 1 << 16) / 64 * 64;
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_normal_cpu, cover(count, chunk), 1, 1, BUF(out), HALVES(count),
                      HALVES(seed), HALVES(stream), UINT((int64_t)(first / 4)), UINT(chunk));
    return LAUNCH(c, KERNEL_normal, cover(cover(count, 4), NORMAL_GROUP), 1, 1, BUF(out),
                  HALVES(count), HALVES(seed), HALVES(stream), UINT((int64_t)(first / 4)));
}

int op_normal_images(struct context *c, struct tensor *out, const struct tensor *image,
                     uint64_t seed, uint64_t stream)
{
    int64_t N = out->shape[0], P = tensor_count(out) / N;
    BUG_IF(out->dtype != F32 || image->dtype != I32 || tensor_count(image) != N);
    BUG_IF((uint32_t)stream != 0);
    return LAUNCH(c, KERNEL_normal_images, cover(cover(P, 4), NORMAL_GROUP),
                  N < MOST_IMAGES ? N : MOST_IMAGES, 1, BUF(out), BUF(image), UINT(N), UINT(P),
                  HALVES(seed), UINT((int64_t)(stream >> 32)));
}

// ---- optimiser ----------------------------------------------------------------------------------

int op_norm2(struct context *c, struct tensor *control, const struct tensor *g, bool accumulate)
{
    BUG_IF(!is_f32_vector(control, CONTROL_COUNT) || g->dtype != F32);
    int64_t count = tensor_count(g), parts = cover(count, NORM_PART);
    op_want_space(c, (size_t)(parts > NORM2_PARTS ? parts : NORM2_PARTS) * sizeof(float));
    const struct norm2 args = {.control = control->mem,
                               .g = g->mem,
                               .partial = c->space.mem,
                               .count = (unsigned long long)count,
                               .added = accumulate};
    int code = ACCELERATE(c, ACCELERATE_NORM2, &args, control, g);
    if (code != NOT_MINE)
        return code;
    const struct tensor *partial = &c->space;
    int64_t chunk = op_chunk(c, parts, 1, 16);
    if (c->dev->cpu_forms)
        TRY(LAUNCH(c, KERNEL_norm2_partial_cpu, cover(parts, chunk), 1, 1, BUF(partial), BUF(g),
                   HALVES(count), UINT(chunk)));
    else
        TRY(LAUNCH(c, KERNEL_norm2_partial, parts, 1, 1, BUF(partial), BUF(g), HALVES(count)));
    return LAUNCH(c, KERNEL_norm2_total, 1, 1, 1, BUF(control), BUF(partial), UINT(parts),
                  INT(accumulate));
}

int op_adamw_control(struct context *c, struct tensor *control, struct tensor *counts,
                     const struct tensor *loss, const struct adamw *a)
{
    BUG_IF(!is_f32_vector(control, CONTROL_COUNT) || loss->dtype != F32);
    BUG_IF(counts->dtype != I32 || tensor_count(counts) != 2);
    return LAUNCH(c, KERNEL_adamw_control, 1, 1, 1, BUF(control), BUF(counts), BUF(loss),
                  UINT(tensor_count(loss)), FLOAT((float)a->rate), FLOAT((float)log(a->beta1)),
                  FLOAT((float)log(a->beta2)), FLOAT((float)a->clip), FLOAT((float)a->warmup),
                  FLOAT((float)a->ema));
}

// w as one f32 slab, or as bf16 beside the low halves.
static bool is_weights(const struct tensor *w, const struct tensor *low, int64_t count)
{
    return low ? is_bf16_vector(w, count) && is_bf16_vector(low, count) : is_f32_vector(w, count);
}

int op_adamw(struct context *c, struct tensor *w, struct tensor *m, struct tensor *v,
             struct tensor *ema, const struct tensor *g, const struct tensor *control,
             struct tensor *low, const struct adamw *a)
{
    int64_t count = tensor_count(w), chunk = op_chunk(c, count, 256, 8192) / 16 * 16;
    BUG_IF(!is_weights(w, low, count) || !is_f32_vector(m, count) || !is_f32_vector(v, count));
    BUG_IF(!is_f32_vector(g, count) || (ema && !is_f32_vector(ema, count)));
    BUG_IF(!is_f32_vector(control, CONTROL_COUNT) || (low && c->dev->cpu_forms));
    const struct adamw_step step = {.w = w->mem,
                                    .m = m->mem,
                                    .v = v->mem,
                                    .ema = MEM(ema),
                                    .g = g->mem,
                                    .control = control->mem,
                                    .low = MEM(low),
                                    .count = (unsigned long long)count,
                                    .beta1 = (float)a->beta1,
                                    .rest1 = (float)(1.0 - a->beta1),
                                    .beta2 = (float)a->beta2,
                                    .rest2 = (float)(1.0 - a->beta2),
                                    .eps = (float)a->eps,
                                    .decay = (float)a->decay};
    int code = ACCELERATE(c, ACCELERATE_ADAMW, &step, w, m, v, ema, g, control, low);
    if (code != NOT_MINE)
        return code;
#define SCALARS                                                                                    \
    HALVES(count), FLOAT((float)a->beta1), FLOAT((float)(1.0 - a->beta1)), FLOAT((float)a->beta2), \
        FLOAT((float)(1.0 - a->beta2)), FLOAT((float)a->eps), FLOAT((float)a->decay)
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_adamw_cpu, cover(count, chunk), 1, 1, BUF(w), BUF(m), BUF(v),
                      BUF_OR_NULL(ema), BUF(g), BUF(control), SCALARS, UINT(chunk));
    return LAUNCH(c, KERNEL_adamw, cover(count, GROUP), 1, 1, BUF(w), BUF(m), BUF(v),
                  BUF_OR_NULL(ema), BUF(g), BUF(control), BUF_OR_NULL(low), SCALARS);
#undef SCALARS
}

int op_adamw_guard(struct context *c, struct tensor *control, struct tensor *counts)
{
    BUG_IF(!is_f32_vector(control, CONTROL_COUNT) || counts->dtype != I32);
    return LAUNCH(c, KERNEL_adamw_guard, 1, 1, 1, BUF(control), BUF(counts));
}

int op_round(struct context *c, struct tensor *high, struct tensor *low, const struct tensor *w)
{
    int64_t count = tensor_count(w);
    BUG_IF(!is_f32_vector(w, count) || !is_bf16_vector(high, count));
    BUG_IF(low && !is_bf16_vector(low, count));
    return LAUNCH(c, KERNEL_round_bf16, cover(count, GROUP), 1, 1, BUF(high), BUF_OR_NULL(low),
                  BUF(w), NO_BUF, UINT(1), HALVES(count));
}

int op_widen(struct context *c, struct tensor *out, const struct tensor *high,
             const struct tensor *low)
{
    int64_t count = tensor_count(out);
    BUG_IF(!is_f32_vector(out, count) || !is_bf16_vector(high, count));
    BUG_IF(low && !is_bf16_vector(low, count));
    return LAUNCH(c, KERNEL_widen_bf16, cover(count, GROUP), 1, 1, BUF(out), BUF(high),
                  BUF_OR_NULL(low), HALVES(count));
}
