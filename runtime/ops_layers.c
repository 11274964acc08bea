// Embedding, elementwise operations, LayerNorm with modulation, gated residual, q/k LayerNorm.
#include "runtime/ops_internal.h"

// ---- embedding ----------------------------------------------------------------------------------

// Checks rows[N*T, C*p*p] against image[N,C,H,W]; returns the number of runs of p pixels.
static int64_t patch_runs(const struct tensor *rows, const struct tensor *image, int patch)
{
    const int64_t *s = image->shape;
    BUG_IF(image->ndim != 4 || image->dtype != F32 || patch < 1);
    BUG_IF(s[2] % patch || s[3] % patch);
    int64_t tokens = s[2] / patch * (s[3] / patch);
    BUG_IF(!has_shape2(rows, s[0] * tokens, s[1] * patch * patch));
    return s[0] * tokens * s[1] * patch;
}

int op_patchify(struct context *c, struct tensor *out, const struct tensor *x, int patch,
                enum patch_order order)
{
    int64_t runs = patch_runs(out, x, patch);
    BUG_IF(!is_act(c, out));
    return LAUNCH(c, KERNEL_patchify, cover(runs, 64), 1, 1, BUF(out), BUF(x), INT(x->shape[1]),
                  INT(x->shape[2]), INT(x->shape[3]), INT(patch), INT(order == PATCH_PQC),
                  UINT(runs));
}

int op_unpatchify(struct context *c, struct tensor *out, const struct tensor *in, int patch)
{
    int64_t runs = patch_runs(in, out, patch);
    BUG_IF(!is_act(c, in));
    return LAUNCH(c, KERNEL_unpatchify, cover(runs, 64), 1, 1, BUF(out), BUF(in),
                  INT(out->shape[1]), INT(out->shape[2]), INT(out->shape[3]), INT(patch),
                  UINT(runs));
}

int op_timestep_embed(struct context *c, struct tensor *out, const struct tensor *t, bool full)
{
    int64_t images = tensor_count(t), half = out->shape[1] / 2;
    BUG_IF(!has_shape2(out, images, 2 * half) || !is_act(c, out) || t->dtype != F32);
    return LAUNCH(c, KERNEL_timestep_embed, cover(images * half, 64), 1, 1, BUF(out), BUF(t),
                  INT(half), FLOAT((float)(full && half > 1 ? half - 1 : half)), UINT(images * half));
}

int op_embed_fwd(struct context *c, struct tensor *out, const struct tensor *table,
                 const struct tensor *y)
{
    int64_t images = tensor_count(y), width = table->shape[1];
    BUG_IF(!has_shape2(out, images, width) || !is_act(c, out));
    BUG_IF(table->ndim != 2 || table->dtype != F32 || y->dtype != I32);
    return LAUNCH(c, KERNEL_embed_fwd, cover(images * width, 64), 1, 1, BUF(out), BUF(table),
                  BUF(y), INT(width), UINT(images * width));
}

int op_embed_bwd(struct context *c, struct tensor *dtable, const struct tensor *dout,
                 const struct tensor *y)
{
    int64_t images = tensor_count(y), width = dtable->shape[1];
    BUG_IF(!has_shape2(dout, images, width) || !is_act(c, dout));
    BUG_IF(dtable->ndim != 2 || dtable->dtype != F32 || y->dtype != I32);
    return LAUNCH(c, KERNEL_embed_bwd, cover(width, 64), 1, 1, BUF(dtable), BUF(dout), BUF(y),
                  INT(width), INT(images));
}

// ---- elementwise --------------------------------------------------------------------------------

// Elements an item of a CPU form takes: a multiple of 16, so that vectors have no tail inside.
static int64_t element_chunk(const struct context *c, int64_t count)
{
    return cover(op_chunk(c, count, 1024, 16384), 16) * 16;
}

static int64_t element_groups(const struct context *c, int64_t count, int64_t chunk)
{
    return c->dev->cpu_forms ? cover(count, chunk) : cover(count, 256);
}

static int unary(struct context *c, enum kernel kernel, struct tensor *y, const struct tensor *x)
{
    int64_t count = tensor_count(y), chunk = element_chunk(c, count);
    BUG_IF(!is_act(c, y) || !is_act(c, x) || tensor_count(x) != count);
    return LAUNCH(c, kernel, element_groups(c, count, chunk), 1, 1, BUF(y), BUF(x), UINT(count),
                  UINT(chunk));
}

static int unary_back(struct context *c, enum kernel kernel, struct tensor *dx,
                      const struct tensor *dy, const struct tensor *x)
{
    int64_t count = tensor_count(dx), chunk = element_chunk(c, count);
    BUG_IF(!is_act(c, dx) || !is_act(c, dy) || !is_act(c, x));
    BUG_IF(tensor_count(dy) != count || tensor_count(x) != count);
    return LAUNCH(c, kernel, element_groups(c, count, chunk), 1, 1, BUF(dx), BUF(dy), BUF(x),
                  UINT(count), UINT(chunk));
}

int op_silu_fwd(struct context *c, struct tensor *y, const struct tensor *x)
{
    return unary(c, FORM(c, silu_fwd), y, x);
}

int op_silu_bwd(struct context *c, struct tensor *dx, const struct tensor *dy,
                const struct tensor *x)
{
    return unary_back(c, FORM(c, silu_bwd), dx, dy, x);
}

int op_gelu_fwd(struct context *c, struct tensor *y, const struct tensor *x)
{
    return unary(c, FORM(c, gelu_fwd), y, x);
}

int op_gelu_bwd(struct context *c, struct tensor *dx, const struct tensor *dy,
                const struct tensor *x)
{
    return unary_back(c, FORM(c, gelu_bwd), dx, dy, x);
}

// y += x, x repeated to the length of y
static int add_repeated(struct context *c, struct tensor *y, const struct tensor *x)
{
    int64_t count = tensor_count(y), period = tensor_count(x), chunk = element_chunk(c, count);
    BUG_IF(!is_act(c, y) && y->dtype != F32);
    BUG_IF(!is_act(c, x) && x->dtype != F32);
    return LAUNCH(c, FORM(c, add), element_groups(c, count, chunk), 1, 1, BUF(y), BUF(x),
                  UINT(count), UINT(period), INT(y->dtype == F32), INT(x->dtype == F32),
                  UINT(chunk));
}

int op_add(struct context *c, struct tensor *y, const struct tensor *x)
{
    BUG_IF(tensor_count(y) != tensor_count(x));
    return add_repeated(c, y, x);
}

int op_add_pos(struct context *c, struct tensor *x, const struct tensor *sum,
               const struct tensor *pos)
{
    BUG_IF(x->ndim != 2 || pos->ndim != 2 || x->shape[1] != pos->shape[1]);
    BUG_IF(x->shape[0] % pos->shape[0] || pos->dtype != F32);
    if (!x->low) {
        BUG_IF(sum != x);
        return add_repeated(c, x, pos);
    }
    const int64_t count = tensor_count(x);
    BUG_IF(x->dtype != BF16 || sum->dtype != F32 || tensor_count(sum) != count);
    return LAUNCH(c, KERNEL_round_bf16, cover(count, 256), 1, 1, BUF(x), BUF(x->low), BUF(sum),
                  BUF(pos), UINT(tensor_count(pos)), UINT(count), UINT(0));
}

// ---- LayerNorm, adaLN, gated residual -----------------------------------------------------------

// Checks x[M,D] against mod[N,W] with D columns from `column`; returns T, rows an image.
static int64_t mod_tokens(const struct context *c, const struct tensor *x, const struct tensor *mod,
                          int column)
{
    BUG_IF(x->ndim != 2 || mod->ndim != 2 || !is_act(c, x) || !is_act(c, mod));
    BUG_IF(x->shape[0] % mod->shape[0]);
    BUG_IF(column < 0 || column + x->shape[1] > mod->shape[1]);
    return x->shape[0] / mod->shape[0];
}

static bool like(const struct context *c, const struct tensor *a, const struct tensor *x)
{
    return is_act(c, a) && has_shape2(a, x->shape[0], x->shape[1]);
}

enum { LAYERNORM_ROWS = 4 }; // rows a group of layernorm_mod_fwd

// Forward: rows an item of the CPU form takes, and the groups of either form.
static int64_t row_groups(const struct context *c, int64_t rows, int64_t width, int64_t *chunk)
{
    *chunk = op_chunk(c, rows, 1, cover(16384, width));
    return c->dev->cpu_forms ? cover(rows, *chunk) : rows;
}

// Backward: rows of one image a group sums over. CPU: the whole image when there are images enough.
static int64_t sum_chunk(const struct context *c, int64_t images, int64_t tokens)
{
    if (!c->dev->cpu_forms)
        return tokens < 32 ? tokens : 32; // NORM_CHUNK
    int64_t chunk = op_chunk(c, images * tokens, 16, tokens);
    return cover(tokens, cover(tokens, chunk)); // even chunks
}

int op_layernorm_mod_fwd(struct context *c, struct tensor *y, struct tensor *stats,
                         const struct tensor *x, const struct tensor *mod, int shift, int scale)
{
    int64_t rows = x->shape[0], width = x->shape[1], chunk;
    int64_t tokens = mod_tokens(c, x, mod, shift);
    mod_tokens(c, x, mod, scale);
    BUG_IF(!like(c, y, x) || stats->dtype != F32 || tensor_count(stats) != 2 * rows);
    const struct norm_forward args = {.h = y->mem,
                                      .stats = stats->mem,
                                      .x = x->mem,
                                      .x_low = MEM(x->low),
                                      .mod = mod->mem,
                                      .images = arg_int(mod->shape[0]),
                                      .tokens = arg_int(tokens),
                                      .width = arg_int(width),
                                      .mod_width = arg_int(mod->shape[1]),
                                      .shift = shift,
                                      .scale = scale};
    int code = ACCELERATE(c, ACCELERATE_NORM_FWD, &args, y, stats, x, x->low, mod);
    if (code != NOT_MINE)
        return code;
    op_only_fused(c, x->low, width);
    int64_t groups = row_groups(c, rows, width, &chunk);
    if (!c->dev->cpu_forms)
        groups = cover(rows, LAYERNORM_ROWS);
    return LAUNCH(c, FORM(c, layernorm_mod_fwd), groups, 1, 1, BUF(y), BUF(stats), BUF(x), BUF(mod),
                  INT(width), INT(tokens), INT(mod->shape[1]), INT(shift), INT(scale), INT(rows),
                  INT(chunk));
}

// The second stage: dmod columns from partial[images, chunks, parts, width] in c->space.
static int sum_partials(struct context *c, struct tensor *dmod, int64_t width, int column0,
                        int column1, int64_t chunks, int parts)
{
    int64_t groups = c->dev->cpu_forms ? 1 : cover(width, 64);
    return LAUNCH(c, FORM(c, sum_partials), groups, parts, dmod->shape[0], BUF(dmod),
                  BUF(&c->space), INT(width), INT(dmod->shape[1]), INT(column0), INT(column1),
                  INT(chunks), INT(parts));
}

int op_layernorm_mod_bwd(struct context *c, struct tensor *dx, struct tensor *dmod,
                         const struct tensor *dy, const struct tensor *x,
                         const struct tensor *stats, const struct tensor *mod, int shift, int scale)
{
    int64_t rows = x->shape[0], width = x->shape[1], images = mod->shape[0];
    int64_t tokens = mod_tokens(c, x, mod, shift);
    mod_tokens(c, x, dmod, scale);
    mod_tokens(c, x, mod, scale);
    BUG_IF(!like(c, dx, x) || !like(c, dy, x) || !like(c, dmod, mod));
    BUG_IF(stats->dtype != F32 || tensor_count(stats) != 2 * rows);
    op_want_norm_backward(c, x, mod);
    const struct norm_backward args = {.dx = dx->mem,
                                       .dmod = dmod->mem,
                                       .partial = c->space.mem,
                                       .dh = dy->mem,
                                       .y = x->mem,
                                       .stats = stats->mem,
                                       .mod = mod->mem,
                                       .images = arg_int(images),
                                       .tokens = arg_int(tokens),
                                       .width = arg_int(width),
                                       .mod_width = arg_int(mod->shape[1]),
                                       .shift = shift,
                                       .scale = scale};
    int code = ACCELERATE(c, ACCELERATE_NORM_BWD, &args, dx, dmod, dy, x, stats, mod);
    if (code != NOT_MINE)
        return code;
    int64_t chunk = sum_chunk(c, images, tokens), chunks = cover(tokens, chunk);
    op_want_space(c, (size_t)(images * chunks * 2 * width) * sizeof(float));
    TRY(LAUNCH(c, FORM(c, layernorm_mod_bwd), chunks, images, 1, BUF(dx), BUF(&c->space), BUF(dy),
               BUF(x), BUF(stats), BUF(mod), INT(width), INT(tokens), INT(mod->shape[1]),
               INT(scale), INT(chunk)));
    return sum_partials(c, dmod, width, shift, scale, chunks, 2);
}

int op_gate_residual_fwd(struct context *c, struct tensor *y, const struct tensor *x,
                         const struct tensor *z, const struct tensor *mod, int gate)
{
    int64_t rows = x->shape[0], width = x->shape[1], chunk;
    int64_t tokens = mod_tokens(c, x, mod, gate);
    BUG_IF(!like(c, y, x) || !like(c, z, x));
    int64_t groups = row_groups(c, rows, width, &chunk);
    return LAUNCH(c, FORM(c, gate_residual_fwd), groups, 1, 1, BUF(y), BUF(x), BUF(z), BUF(mod),
                  INT(width), INT(tokens), INT(mod->shape[1]), INT(gate), INT(rows), INT(chunk));
}

int op_gate_residual_bwd(struct context *c, struct tensor *dz, struct tensor *dmod,
                         const struct tensor *dy, const struct tensor *z, const struct tensor *mod,
                         int gate)
{
    int64_t width = z->shape[1], images = mod->shape[0], tokens = mod_tokens(c, z, mod, gate);
    BUG_IF(!like(c, dz, z) || !like(c, dy, z) || !like(c, dmod, mod));
    int64_t chunk = sum_chunk(c, images, tokens), chunks = cover(tokens, chunk);
    op_want_space(c, (size_t)(images * chunks * width) * sizeof(float));
    TRY(LAUNCH(c, FORM(c, gate_residual_bwd), chunks, images, 1, BUF(dz), BUF(&c->space), BUF(dy),
               BUF(z), BUF(mod), INT(width), INT(tokens), INT(mod->shape[1]), INT(gate),
               INT(chunk)));
    return sum_partials(c, dmod, width, gate, gate, chunks, 1);
}
