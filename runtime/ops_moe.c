// Mixture of experts: SwiGLU, the router, the sort by expert, gather and scatter of rows, balance.
//
// CPU forms take a chunk of rows a work-item; GPU forms cover the columns in x and stride over the
// rows in y, in at most MOST_ROWS groups.
#include "runtime/ops_internal.h"

enum {
    MAX_EXPERTS = 512,
    MAX_CHOICES = 64,
    MOST_ROWS = 32768,
    COLUMN_GROUP = 256, // columns a work-group of the GPU forms
    ROW_GROUP = 64      // rows a work-group of the router's GPU forms
};

// The y groups of a GPU form and the chunk of a CPU form for `rows` rows.
static int64_t row_groups(int64_t rows)
{
    return rows < MOST_ROWS ? rows : MOST_ROWS;
}

// Groups of 256 for a GPU form whose items take an element each, or four where D allows.
static int64_t place_groups(int64_t rows, int64_t D)
{
    int64_t groups = cover(rows * (D % 4 == 0 ? D / 4 : D), 256);
    BUG_IF(groups > UINT32_MAX / 256);
    return groups;
}

static int64_t row_chunk(const struct context *c, int64_t rows)
{
    return op_chunk(c, rows, 1, 256);
}

static bool same_shape2(const struct tensor *a, const struct tensor *b)
{
    return b->ndim == 2 && has_shape2(a, b->shape[0], b->shape[1]);
}

static bool is_i32(const struct tensor *t)
{
    return t->dtype == I32;
}

static bool is_f32(const struct tensor *t)
{
    return t->dtype == F32;
}

// ---- biases of experts --------------------------------------------------------------------------

static int64_t expert_count(const struct tensor *bias, const struct tensor *rows,
                            const struct tensor *offsets)
{
    const int64_t E = tensor_count(offsets) - 1;
    BUG_IF(rows->ndim != 2 || !is_i32(offsets) || E < 1 || E > MAX_EXPERTS || !is_f32(bias));
    BUG_IF(tensor_count(bias) != E * rows->shape[1]);
    return E;
}

int op_expert_bias_fwd(struct context *c, struct tensor *y, const struct tensor *bias,
                       const struct tensor *offsets)
{
    const int64_t E = expert_count(bias, y, offsets), R = y->shape[0], O = y->shape[1];
    BUG_IF(!is_act(c, y));
    const int64_t chunk = row_chunk(c, R);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_expert_bias_fwd_cpu, cover(R, chunk), 1, 1, BUF(y), BUF(bias),
                      BUF(offsets), UINT(R), UINT(O), UINT(E), UINT(chunk));
    return LAUNCH(c, KERNEL_expert_bias_fwd, cover(O, COLUMN_GROUP), row_groups(R), 1, BUF(y),
                  BUF(bias), BUF(offsets), UINT(R), UINT(O), UINT(E));
}

int op_expert_bias_bwd(struct context *c, struct tensor *dbias, const struct tensor *dy,
                       const struct tensor *offsets)
{
    const int64_t E = expert_count(dbias, dy, offsets), O = dy->shape[1];
    BUG_IF(!is_act(c, dy));
    return LAUNCH(c, FORM(c, expert_bias_bwd), cover(O, 64), E, 1, BUF(dbias), BUF(dy),
                  BUF(offsets), UINT(O));
}

// ---- SwiGLU -------------------------------------------------------------------------------------

int op_swiglu_fwd(struct context *c, struct tensor *h, const struct tensor *gu)
{
    BUG_IF(h->ndim != 2 || !is_act(c, h) || !is_act(c, gu));
    int64_t R = h->shape[0], F = h->shape[1];
    BUG_IF(!has_shape2(gu, R, 2 * F));
    int64_t chunk = row_chunk(c, R);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_swiglu_fwd_cpu, cover(R, chunk), 1, 1, BUF(h), BUF(gu), UINT(R),
                      UINT(F), UINT(chunk));
    return LAUNCH(c, KERNEL_swiglu_fwd, cover(F, COLUMN_GROUP), row_groups(R), 1, BUF(h), BUF(gu),
                  UINT(R), UINT(F));
}

int op_swiglu_bwd(struct context *c, struct tensor *dgu, const struct tensor *dh,
                  const struct tensor *gu)
{
    BUG_IF(dh->ndim != 2 || !is_act(c, dgu) || !is_act(c, dh) || !is_act(c, gu));
    int64_t R = dh->shape[0], F = dh->shape[1];
    BUG_IF(!has_shape2(gu, R, 2 * F) || !has_shape2(dgu, R, 2 * F));
    int64_t chunk = row_chunk(c, R);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_swiglu_bwd_cpu, cover(R, chunk), 1, 1, BUF(dgu), BUF(dh), BUF(gu),
                      UINT(R), UINT(F), UINT(chunk));
    return LAUNCH(c, KERNEL_swiglu_bwd, cover(F, COLUMN_GROUP), row_groups(R), 1, BUF(dgu), BUF(dh),
                  BUF(gu), UINT(R), UINT(F));
}

// ---- router -------------------------------------------------------------------------------------

int op_router_fwd(struct context *c, struct tensor *probs, struct tensor *weight,
                  struct tensor *index, const struct tensor *logits, bool renormalise)
{
    BUG_IF(logits->ndim != 2 || index->ndim != 2 || !same_shape2(probs, logits));
    int64_t M = logits->shape[0], E = logits->shape[1], K = index->shape[1];
    BUG_IF(E > MAX_EXPERTS || K < 1 || K > MAX_CHOICES || K > E);
    BUG_IF(index->shape[0] != M || !same_shape2(weight, index) || !is_i32(index));
    BUG_IF(!is_f32(probs) || !is_f32(weight) || !is_f32(logits));
    int64_t chunk = row_chunk(c, M);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_router_fwd_cpu, cover(M, chunk), 1, 1, BUF(probs), BUF(weight),
                      BUF(index), BUF(logits), UINT(M), UINT(E), UINT(K), INT(renormalise),
                      UINT(chunk));
    return LAUNCH(c, KERNEL_router_fwd, cover(M, ROW_GROUP), 1, 1, BUF(probs), BUF(weight),
                  BUF(index), BUF(logits), UINT(M), UINT(E), UINT(K), INT(renormalise));
}

int op_router_bwd(struct context *c, struct tensor *dlogits, const struct tensor *dweight,
                  const struct tensor *probs, const struct tensor *index,
                  const struct tensor *fraction, float alpha, bool renormalise)
{
    BUG_IF(index->ndim != 2 || !same_shape2(dlogits, probs) || !same_shape2(dweight, index));
    BUG_IF(!is_f32(dlogits) || !is_f32(dweight) || !is_f32(probs) || !is_i32(index));
    int64_t M = probs->shape[0], E = probs->shape[1], K = index->shape[1], rows = M;
    BUG_IF(index->shape[0] != M || (alpha != 0.0f && !fraction));
    if (fraction) {
        BUG_IF(fraction->ndim != 2 || fraction->shape[1] != E || !is_f32(fraction));
        BUG_IF(fraction->shape[0] < 1 || M % fraction->shape[0] != 0);
        rows = M / fraction->shape[0];
    }
    if (M == 0)
        return 0;
    float balance =
        alpha / (float)M; // alpha/G for the mean over groups, G/M for the mean over rows
    const struct tensor *f = fraction ? fraction : probs; // not read when balance is 0
    int64_t chunk = row_chunk(c, M);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_router_bwd_cpu, cover(M, chunk), 1, 1, BUF(dlogits), BUF(dweight),
                      BUF(probs), BUF(index), BUF(f), FLOAT(balance), UINT(M), UINT(E), UINT(K),
                      UINT(rows), INT(renormalise), UINT(chunk));
    return LAUNCH(c, KERNEL_router_bwd, cover(M, ROW_GROUP), 1, 1, BUF(dlogits), BUF(dweight),
                  BUF(probs), BUF(index), BUF(f), FLOAT(balance), UINT(M), UINT(E), UINT(K),
                  UINT(rows), INT(renormalise));
}

// ---- routing ------------------------------------------------------------------------------------

// Pairs a chunk: a GPU's work-group goes through whole tiles of 256, in at most 256 groups, so that
// the scan over chunks stays short.
static int64_t route_chunk(const struct context *c, int64_t R)
{
    if (c->dev->cpu_forms)
        return op_chunk(c, R, 256, 1 << 20);
    int64_t tiles = cover(R, 256);
    return 256 * cover(tiles > 0 ? tiles : 1, 256);
}

int op_route(struct context *c, struct tensor *offsets, struct tensor *slot, struct tensor *token,
             const struct tensor *index)
{
    BUG_IF(index->ndim != 2 || offsets->ndim != 1 || !same_shape2(slot, index));
    BUG_IF(!is_i32(offsets) || !is_i32(slot) || !is_i32(token) || !is_i32(index));
    int64_t E = offsets->shape[0] - 1, K = index->shape[1], R = tensor_count(index);
    BUG_IF(E < 1 || E > MAX_EXPERTS || tensor_count(token) != R);
    int64_t chunk = route_chunk(c, R), chunks = cover(R, chunk);
    op_want_space(c, (size_t)(chunks * E) * sizeof(int32_t));
    const struct tensor *count = &c->space;
    TRY(LAUNCH(c, FORM(c, route_count), chunks, 1, 1, BUF(count), BUF(index), UINT(R), UINT(E),
               UINT(chunk)));
    TRY(LAUNCH(c, KERNEL_route_scan, 1, 1, 1, BUF(offsets), BUF(count), UINT(chunks), UINT(E)));
    return LAUNCH(c, FORM(c, route_place), chunks, 1, 1, BUF(slot), BUF(token), BUF(index),
                  BUF(offsets), BUF(count), UINT(R), UINT(K), UINT(E), UINT(chunk));
}

// ---- dispatch and combine -----------------------------------------------------------------------

int op_dispatch_fwd(struct context *c, struct tensor *rows, const struct tensor *x,
                    const struct tensor *token, const struct tensor *slot)
{
    BUG_IF(rows->ndim != 2 || x->ndim != 2 || !is_act(c, rows) || !is_act(c, x) || !is_i32(token));
    int64_t R = rows->shape[0], D = rows->shape[1];
    BUG_IF(x->shape[1] != D || tensor_count(token) != R || !is_i32(slot));
    BUG_IF(slot->ndim != 2 || slot->shape[0] != x->shape[0] || tensor_count(slot) != R);
    const struct dispatch args = {.rows = rows->mem,
                                  .x = x->mem,
                                  .slot = slot->mem,
                                  .tokens = arg_int(slot->shape[0]),
                                  .choices = arg_int(slot->shape[1]),
                                  .width = arg_int(D)};
    int code = ACCELERATE(c, ACCELERATE_DISPATCH_FWD, &args, rows, x, slot);
    if (code != NOT_MINE)
        return code;
    int64_t chunk = row_chunk(c, R);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_dispatch_fwd_cpu, cover(R, chunk), 1, 1, BUF(rows), BUF(x),
                      BUF(token), UINT(R), UINT(D), UINT(chunk));
    return LAUNCH(c, KERNEL_dispatch_fwd, place_groups(R, D), 1, 1, BUF(rows),
                  BUF(x), BUF(token), UINT(R), UINT(D));
}

// What the other three share: x[M,D] a tensor of tokens, rows[M*K,D] one of routed rows.
static void check_rows(const struct context *c, const struct tensor *x, const struct tensor *rows,
                       const struct tensor *slot)
{
    BUG_IF(x->ndim != 2 || slot->ndim != 2 || slot->shape[0] != x->shape[0]);
    BUG_IF(!has_shape2(rows, tensor_count(slot), x->shape[1]));
    BUG_IF(!is_act(c, x) || !is_act(c, rows) || !is_i32(slot));
}

int op_dispatch_bwd(struct context *c, struct tensor *dx, const struct tensor *drows,
                    const struct tensor *slot)
{
    check_rows(c, dx, drows, slot);
    int64_t M = dx->shape[0], D = dx->shape[1], K = slot->shape[1], chunk = row_chunk(c, M);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_dispatch_bwd_cpu, cover(M, chunk), 1, 1, BUF(dx), BUF(drows),
                      BUF(slot), UINT(M), UINT(K), UINT(D), UINT(chunk));
    return LAUNCH(c, KERNEL_dispatch_bwd, cover(D, COLUMN_GROUP), row_groups(M), 1, BUF(dx),
                  BUF(drows), BUF(slot), UINT(M), UINT(K), UINT(D));
}

int op_combine_fwd(struct context *c, struct tensor *out, const struct tensor *rows,
                   const struct tensor *slot, const struct tensor *weight,
                   const struct tensor *shared)
{
    check_rows(c, out, rows, slot);
    BUG_IF(!same_shape2(weight, slot) || !is_f32(weight));
    BUG_IF(shared && (!same_shape2(shared, out) || !is_act(c, shared)));
    int64_t M = out->shape[0], D = out->shape[1], K = slot->shape[1], chunk = row_chunk(c, M);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_combine_fwd_cpu, cover(M, chunk), 1, 1, BUF(out), BUF(rows),
                      BUF(slot), BUF(weight), BUF_OR_NULL(shared), UINT(M), UINT(K), UINT(D),
                      UINT(chunk));
    return LAUNCH(c, KERNEL_combine_fwd, place_groups(M, D), 1, 1, BUF(out),
                  BUF(rows), BUF(slot), BUF(weight), BUF_OR_NULL(shared), UINT(M), UINT(K),
                  UINT(D));
}

int op_combine_bwd(struct context *c, struct tensor *drows, struct tensor *dweight,
                   const struct tensor *dout, const struct tensor *rows, const struct tensor *slot,
                   const struct tensor *weight)
{
    check_rows(c, dout, drows, slot);
    BUG_IF(!rows != !dweight || !same_shape2(weight, slot) || !is_f32(weight));
    BUG_IF(rows && (!same_shape2(drows, rows) || !is_act(c, rows)));
    BUG_IF(dweight && (!same_shape2(dweight, slot) || !is_f32(dweight)));
    int64_t M = dout->shape[0], D = dout->shape[1], K = slot->shape[1], R = M * K;
    const struct combine_backward args = {.drows = drows->mem,
                                          .dweight = MEM(dweight),
                                          .dout = dout->mem,
                                          .rows = MEM(rows),
                                          .slot = slot->mem,
                                          .weight = weight->mem,
                                          .tokens = arg_int(M),
                                          .choices = arg_int(K),
                                          .width = arg_int(D)};
    int code = ACCELERATE(c, ACCELERATE_COMBINE_BWD, &args, drows, dweight, dout, rows, slot,
                          weight);
    if (code != NOT_MINE)
        return code;
    int64_t chunk = row_chunk(c, M);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_combine_bwd_cpu, cover(M, chunk), 1, 1, BUF(drows),
                      BUF_OR_NULL(dweight), BUF(dout), BUF_OR_NULL(rows), BUF(slot), BUF(weight),
                      UINT(R), UINT(K), UINT(D), UINT(chunk));
    return LAUNCH(c, KERNEL_combine_bwd, R, 1, 1, BUF(drows), BUF_OR_NULL(dweight), BUF(dout),
                  BUF_OR_NULL(rows), BUF(slot), BUF(weight), UINT(R), UINT(K), UINT(D));
}

int op_combine_weight_bwd(struct context *c, struct tensor *dweight, const struct tensor *dots,
                          const struct tensor *slot, const struct tensor *weight)
{
    const int64_t R = tensor_count(slot);
    BUG_IF(!same_shape2(dweight, slot) || !same_shape2(weight, slot) || !is_i32(slot));
    BUG_IF(dots->ndim != 2 || dots->shape[1] != R);
    BUG_IF(!is_f32(dweight) || !is_f32(dots) || !is_f32(weight));
    return LAUNCH(c, KERNEL_combine_weight_bwd, cover(R, 64), 1, 1, BUF(dweight), BUF(dots),
                  BUF(slot), BUF(weight), UINT(R), UINT(dots->shape[0]));
}

// ---- balance ------------------------------------------------------------------------------------

int op_balance(struct context *c, struct tensor *fraction, struct tensor *mean_prob,
               const struct tensor *index, const struct tensor *probs)
{
    BUG_IF(probs->ndim != 2 || fraction->ndim != 2 || index->ndim != 2);
    int64_t M = probs->shape[0], E = probs->shape[1], K = index->shape[1], G = fraction->shape[0];
    BUG_IF(!same_shape2(mean_prob, fraction) || fraction->shape[1] != E || index->shape[0] != M);
    BUG_IF(!is_f32(fraction) || !is_f32(mean_prob) || !is_f32(probs) || !is_i32(index));
    BUG_IF(G < 1 || M < G || M % G != 0 || E > MAX_EXPERTS);
    int64_t rows = M / G, chunk = op_chunk(c, M, 64, 1024), chunks = cover(rows, chunk);
    // the counts fill the first part of the scratch, the sums the second
    int64_t entries = G * chunks * E;
    op_want_space(c, (size_t)entries * 2 * sizeof(float));
    TRY(LAUNCH(c, FORM(c, balance_sum), chunks, G, 1, BUF(&c->space), UINT(entries), BUF(index),
               BUF(probs), UINT(rows), UINT(E), UINT(K), UINT(chunk)));
    return LAUNCH(c, KERNEL_balance_mean, cover(G * E, ROW_GROUP), 1, 1, BUF(fraction),
                  BUF(mean_prob), BUF(&c->space), UINT(entries), UINT(G * E), UINT(rows), UINT(E),
                  UINT(K), UINT(chunks));
}
