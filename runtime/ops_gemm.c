// Linear layers and the experts' matrices: shapes in, struct gemm out (devices/device.h).
#include "runtime/ops_internal.h"

#include <stddef.h>

static int64_t rows_of(const struct tensor *t)
{
    BUG_IF(t->ndim != 2);
    return t->shape[0];
}

// Runs g with c->space as its scratch; in a dry context only asks for it.
static int multiply(struct context *c, struct gemm *g)
{
    BUG_IF((g->type_a != F32 && g->type_a != BF16) || (g->type_b != F32 && g->type_b != BF16) ||
           (g->type_c != F32 && g->type_c != BF16));
    op_want_space(c, c->dev->api->gemm_space(c->dev, g));
    if (c->dry)
        return 0;
    g->space = c->space.mem;
    if (c->profile)
        TRY(profile_begin(c->profile));
    TRY(c->dev->api->gemm(c->stream, g));
    return c->profile ? profile_end_gemm(c->profile, g) : 0;
}

// The product of g, whose B is the weight w, transposed: with w's packed copy where there is one.
static int multiply_weight(struct context *c, struct gemm *g, const struct tensor *w)
{
    if (!w->packed || c->dry)
        return multiply(c, g);
    g->packed = w->packed->copy.mem;
    if (!w->packed->fresh)
        TRY(c->dev->api->gemm_pack(c->stream, g));
    w->packed->fresh = true;
    return multiply(c, g);
}

size_t op_packed_bytes(const struct context *c, const struct tensor *w)
{
    const bool ragged = w->ndim == 3;
    struct gemm g = {.ragged = ragged ? GEMM_RAGGED_M : GEMM_PLAIN,
                     .m = 1,
                     .n = arg_int(w->shape[ragged]),
                     .k = arg_int(w->shape[ragged + 1]),
                     .trans_b = true,
                     .groups = ragged ? arg_int(w->shape[0]) : 0};
    BUG_IF(w->ndim < 2 || w->dtype != F32);
    return c->dev->api->gemm_packed ? c->dev->api->gemm_packed(c->dev, &g) : 0;
}

static struct gemm product(const struct tensor *out, const struct tensor *a, const struct tensor *b)
{
    return (struct gemm){.a = a->mem,
                         .b = b->mem,
                         .c = out->mem,
                         .type_a = a->dtype,
                         .type_b = b->dtype,
                         .type_c = out->dtype};
}

static bool is_weight(const struct tensor *w)
{
    return w->dtype == F32 || w->dtype == BF16;
}

// ---- linear layers ------------------------------------------------------------------------------

static struct gemm linear(const struct tensor *y, const struct tensor *x, const struct tensor *w)
{
    int64_t m = rows_of(x), k = x->shape[1], n = rows_of(w);
    BUG_IF(!has_shape2(y, m, n) || w->shape[1] != k || !is_weight(w));
    struct gemm g = product(y, x, w);
    g.m = arg_int(m);
    g.n = arg_int(n);
    g.k = arg_int(k);
    g.trans_b = true;
    return g;
}

int op_linear(struct context *c, struct tensor *y, const struct tensor *x, const struct tensor *w,
              const struct tensor *bias)
{
    struct gemm g = linear(y, x, w);
    BUG_IF(bias && (tensor_count(bias) != g.n || bias->dtype != F32));
    g.bias = bias ? bias->mem : NULL;
    return multiply_weight(c, &g, w);
}

int op_linear_add(struct context *c, struct tensor *y, const struct tensor *x,
                  const struct tensor *w, const struct tensor *bias)
{
    struct gemm g = linear(y, x, w);
    BUG_IF(bias && (tensor_count(bias) != g.n || bias->dtype != F32));
    g.bias = bias ? bias->mem : NULL;
    g.accumulate = true;
    return multiply_weight(c, &g, w);
}

static struct gemm linear_dx(const struct tensor *dx, const struct tensor *dy,
                             const struct tensor *w)
{
    int64_t m = rows_of(dy), k = dy->shape[1], n = dx->shape[1];
    BUG_IF(!has_shape2(dx, m, n) || !has_shape2(w, k, n) || !is_weight(w));
    struct gemm g = product(dx, dy, w);
    g.m = arg_int(m);
    g.n = arg_int(n);
    g.k = arg_int(k);
    return g;
}

int op_linear_dx(struct context *c, struct tensor *dx, const struct tensor *dy,
                 const struct tensor *w, bool accumulate)
{
    struct gemm g = linear_dx(dx, dy, w);
    g.accumulate = accumulate;
    return multiply(c, &g);
}

// out[n] += sum over the rows of a[m,n]: parts of `rows` rows each, then the parts in order.
static int add_column_sums(struct context *c, struct tensor *out, const struct tensor *a)
{
    int64_t m = rows_of(a), n = a->shape[1], rows = op_chunk(c, m, 32, 256),
            chunks = cover(m, rows);
    if (a->dtype == BF16 && c->dev->fused_width > 0) {
        op_want_space(c, SUM_PARTS * (size_t)n * sizeof(float));
        const struct column_sums args = {out->mem, a->mem, c->space.mem, arg_int(m), arg_int(n)};
        int code = ACCELERATE(c, ACCELERATE_COLUMN_SUMS, &args, out, a);
        if (code != NOT_MINE)
            return code;
    }
    op_want_space(c, (size_t)(chunks * n) * sizeof(float));
    TRY(LAUNCH(c, FORM(c, column_sums_part), c->dev->cpu_forms ? 1 : cover(n, 64), chunks, 1,
               BUF(&c->space), BUF(a), INT(a->dtype == BF16), INT(m), INT(n), INT(rows)));
    return LAUNCH(c, KERNEL_column_sums, cover(n, 64), 1, 1, BUF(out), BUF(&c->space), INT(chunks),
                  INT(n));
}

int op_linear_dw(struct context *c, struct tensor *dw, struct tensor *dbias,
                 const struct tensor *dy, const struct tensor *x)
{
    int64_t k = rows_of(dy), m = dy->shape[1], n = x->shape[1];
    BUG_IF(rows_of(x) != k || !has_shape2(dw, m, n) || dw->dtype != F32);
    BUG_IF(dbias && (tensor_count(dbias) != m || dbias->dtype != F32));
    struct gemm g = product(dw, dy, x);
    g.m = arg_int(m);
    g.n = arg_int(n);
    g.k = arg_int(k);
    g.trans_a = true;
    g.accumulate = !c->fresh_gradients;
    TRY(multiply(c, &g));
    return dbias ? add_column_sums(c, dbias, dy) : 0;
}

// ---- experts ------------------------------------------------------------------------------------

static int expert_count(const struct tensor *w, const struct tensor *offsets)
{
    BUG_IF(w->ndim != 3 || !is_weight(w) || offsets->dtype != I32);
    BUG_IF(tensor_count(offsets) != w->shape[0] + 1);
    return arg_int(w->shape[0]);
}

static struct gemm experts(const struct tensor *y, const struct tensor *x, const struct tensor *w,
                           const struct tensor *offsets)
{
    struct gemm g = product(y, x, w);
    g.ragged = GEMM_RAGGED_M;
    g.groups = expert_count(w, offsets);
    g.offsets = offsets->mem;
    BUG_IF(!has_shape2(x, rows_of(y), w->shape[2]) || y->shape[1] != w->shape[1]);
    g.m = arg_int(rows_of(x));
    g.n = arg_int(w->shape[1]);
    g.k = arg_int(w->shape[2]);
    g.trans_b = true;
    return g;
}

int op_experts(struct context *c, struct tensor *y, const struct tensor *x, const struct tensor *w,
               const struct tensor *offsets)
{
    struct gemm g = experts(y, x, w, offsets);
    return multiply_weight(c, &g, w);
}

static struct gemm experts_dx(const struct tensor *dx, const struct tensor *dy,
                              const struct tensor *w, const struct tensor *offsets)
{
    struct gemm g = product(dx, dy, w);
    g.ragged = GEMM_RAGGED_M;
    g.groups = expert_count(w, offsets);
    g.offsets = offsets->mem;
    BUG_IF(!has_shape2(dy, rows_of(dx), w->shape[1]) || dx->shape[1] != w->shape[2]);
    g.m = arg_int(rows_of(dy));
    g.n = arg_int(w->shape[2]);
    g.k = arg_int(w->shape[1]);
    return g;
}

int op_experts_dx(struct context *c, struct tensor *dx, const struct tensor *dy,
                  const struct tensor *w, const struct tensor *offsets)
{
    struct gemm g = experts_dx(dx, dy, w, offsets);
    return multiply(c, &g);
}

// The product of two tensors of `rows` rows into dw, without its operands.
static struct gemm experts_dw(const struct context *c, const struct tensor *dw, int64_t rows)
{
    BUG_IF(dw->ndim != 3 || dw->dtype != F32);
    return (struct gemm){.ragged = GEMM_RAGGED_K,
                         .groups = arg_int(dw->shape[0]),
                         .m = arg_int(dw->shape[1]),
                         .n = arg_int(dw->shape[2]),
                         .k = arg_int(rows),
                         .trans_a = true,
                         .type_a = c->dev->act,
                         .type_b = c->dev->act,
                         .type_c = F32,
                         .accumulate = !c->fresh_gradients};
}

int64_t op_experts_dw_norms(const struct context *c, const struct tensor *dw, int64_t rows)
{
    const struct gemm g = experts_dw(c, dw, rows);
    return c->dev->api->gemm_norms ? c->dev->api->gemm_norms(c->dev, &g) : 0;
}

int op_experts_dw(struct context *c, struct tensor *dw, struct tensor *norms, const struct tensor *dy,
                  const struct tensor *x, const struct tensor *offsets)
{
    struct gemm g = experts_dw(c, dw, rows_of(dy));
    BUG_IF(expert_count(dw, offsets) != g.groups || dy->dtype != x->dtype);
    BUG_IF(!has_shape2(x, g.k, g.n) || dy->shape[1] != g.m);
    BUG_IF(norms && (norms->dtype != F32 || tensor_count(norms) != op_experts_dw_norms(c, dw, g.k)));
    g.a = dy->mem, g.b = x->mem, g.c = dw->mem;
    g.type_a = dy->dtype, g.type_b = x->dtype;
    g.offsets = offsets->mem;
    g.norms = norms ? norms->mem : NULL;
    return multiply(c, &g);
}

// ---- products and SwiGLU ------------------------------------------------------------------------

bool op_swiglu_fuses(const struct context *c, int64_t columns)
{
    return c->dev->swiglu_columns > 0 && columns % c->dev->swiglu_columns == 0;
}

bool op_swiglu_rebuilds(const struct context *c, int64_t columns)
{
    return c->dev->rebuilds_hidden && op_swiglu_fuses(c, columns);
}

bool op_swiglu_dots(const struct context *c, int64_t experts, int64_t D, int64_t F)
{
    return experts <= c->dev->swiglu_dots && D % 8 == 0 && F % 64 == 0 && op_swiglu_rebuilds(c, F);
}

// The tensor [rows, columns] without memory: shapes are checked against it.
static struct tensor matrix(const struct context *c, int64_t rows, int64_t columns)
{
    return (struct tensor){.dtype = c->dev->act, .ndim = 2, .shape = {rows, columns}};
}

// g: the product gu = x w^T.
static int swiglu_fwd(struct context *c, struct tensor *h, struct tensor *gu, struct gemm *g,
                      const struct tensor *w)
{
    BUG_IF(!has_shape2(h, g->m, g->n / 2) || g->n % 2 != 0 || !is_act(c, h));
    if (op_swiglu_fuses(c, g->n / 2)) {
        g->swiglu = SWIGLU_FORWARD;
        g->h = h->mem;
        return multiply_weight(c, g, w);
    }
    BUG_IF(!gu);
    TRY(multiply_weight(c, g, w));
    return op_swiglu_fwd(c, h, gu);
}

// g: the product dh = dy w, whose C is not set.
static int swiglu_bwd(struct context *c, struct tensor *gu, struct tensor *dh, struct tensor *h,
                      struct gemm *g)
{
    BUG_IF(!has_shape2(gu, g->m, 2 * g->n) || !is_act(c, gu));
    BUG_IF(h && (!op_swiglu_rebuilds(c, g->n) || !has_shape2(h, g->m, g->n) || !is_act(c, h)));
    if (op_swiglu_fuses(c, g->n)) {
        g->swiglu = SWIGLU_BACKWARD;
        g->c = gu->mem;
        g->h = h ? h->mem : NULL;
        return multiply(c, g);
    }
    BUG_IF(!dh || !has_shape2(dh, g->m, g->n) || !is_act(c, dh));
    g->c = dh->mem;
    TRY(multiply(c, g));
    return op_swiglu_bwd(c, gu, dh, gu);
}

int op_linear_swiglu(struct context *c, struct tensor *h, struct tensor *gu, const struct tensor *x,
                     const struct tensor *w)
{
    struct tensor shape = matrix(c, rows_of(x), rows_of(w));
    struct gemm g = linear(gu ? gu : &shape, x, w);
    return swiglu_fwd(c, h, gu, &g, w);
}

int op_linear_swiglu_dx(struct context *c, struct tensor *gu, struct tensor *dh, struct tensor *h,
                        const struct tensor *dy, const struct tensor *w)
{
    struct tensor shape = matrix(c, rows_of(dy), w->shape[1]);
    struct gemm g = linear_dx(&shape, dy, w);
    return swiglu_bwd(c, gu, dh, h, &g);
}

int op_experts_swiglu(struct context *c, struct tensor *h, struct tensor *gu,
                      const struct tensor *x, const struct tensor *w, const struct tensor *offsets)
{
    struct tensor shape = matrix(c, rows_of(x), w->shape[1]);
    struct gemm g = experts(gu ? gu : &shape, x, w, offsets);
    return swiglu_fwd(c, h, gu, &g, w);
}

int op_experts_swiglu_dx(struct context *c, struct tensor *gu, struct tensor *dh, struct tensor *h,
                         struct tensor *dots, const struct tensor *dy, const struct tensor *w,
                         const struct tensor *offsets)
{
    struct tensor shape = matrix(c, rows_of(dy), w->shape[2]);
    struct gemm g = experts_dx(&shape, dy, w, offsets);
    if (dots) {
        BUG_IF(!op_swiglu_dots(c, w->shape[0], w->shape[1], g.n) || dots->dtype != F32);
        BUG_IF(!has_shape2(dots, g.n / 64, g.m));
        g.dots = dots->mem;
    }
    return swiglu_bwd(c, gu, dh, h, &g);
}
