// Operations that join what lies between two branches of a block. Each is given whole to devices
// that have it in one pass over memory; elsewhere it is a composition of the single operations,
// whose checks hold for both.
#include "runtime/ops_internal.h"

// N, T, D and W of x[N*T,D] and mod[N,W], and the columns, for either struct
#define NORM_SIZES(x, mod, at)                                                                 \
    .images = arg_int((mod)->shape[0]), .tokens = arg_int((x)->shape[0] / (mod)->shape[0]),    \
    .width = arg_int((x)->shape[1]), .mod_width = arg_int((mod)->shape[1]), .gate = (at).gate, \
    .shift = (at).shift, .scale = (at).scale

bool op_combine_norm_fuses(const struct context *c, int64_t width)
{
    return width <= c->dev->fused_width && width % 128 == 0;
}

int op_residual_norm_fwd(struct context *c, struct tensor *y, struct tensor *h,
                         struct tensor *stats, struct tensor *logits, const struct tensor *x,
                         const struct tensor *z, const struct tensor *mod, struct norm_columns at,
                         const struct tensor *router_w)
{
    BUG_IF(!logits != !router_w);
    const struct norm_forward args = {.y = MEM(y),
                                      .y_low = MEM(LOW(y)),
                                      .h = h->mem,
                                      .stats = stats->mem,
                                      .logits = MEM(logits),
                                      .x = x->mem,
                                      .x_low = MEM(x->low),
                                      .z = z->mem,
                                      .mod = mod->mem,
                                      .router_w = MEM(router_w),
                                      NORM_SIZES(x, mod, at),
                                      .experts = logits ? arg_int(router_w->shape[0]) : 0};
    int code = ACCELERATE(c, ACCELERATE_NORM_FWD, &args, y, LOW(y), h, stats, logits, x, x->low, z,
                          mod, router_w);
    if (code != NOT_MINE)
        return code;
    op_only_fused(c, !y || y->low || x->low, x->shape[1]);
    struct tensor unkept = *x; // stands for y while shapes are checked
    y = y ? y : &unkept;
    TRY(op_gate_residual_fwd(c, y, x, z, mod, at.gate));
    TRY(op_layernorm_mod_fwd(c, h, stats, y, mod, at.shift, at.scale));
    return logits ? op_linear(c, logits, h, router_w, NULL) : 0;
}

int op_combine_norm_fwd(struct context *c, struct tensor *y, struct tensor *h, struct tensor *stats,
                        struct tensor *z, const struct tensor *x, const struct tensor *z1,
                        int gate1, const struct tensor *rows, const struct tensor *slot,
                        const struct tensor *weight, const struct tensor *shared,
                        const struct tensor *mod, struct norm_columns at)
{
    const struct norm_forward args = {.y = y->mem,
                                      .y_low = MEM(y->low),
                                      .h = h->mem,
                                      .stats = stats->mem,
                                      .kept = MEM(z),
                                      .x = x->mem,
                                      .x_low = MEM(x->low),
                                      .z1 = MEM(z1),
                                      .rows = rows->mem,
                                      .slot = slot->mem,
                                      .weight = weight->mem,
                                      .shared = MEM(shared),
                                      .mod = mod->mem,
                                      NORM_SIZES(x, mod, at),
                                      .gate1 = z1 ? gate1 : 0,
                                      .choices = arg_int(slot->shape[1])};
    int code = ACCELERATE(c, ACCELERATE_NORM_FWD, &args, y, y->low, h, stats, z, x, x->low, z1, rows,
                          slot, weight, shared, mod);
    if (code != NOT_MINE)
        return code;
    op_only_fused(c, !z || y->low || x->low, x->shape[1]);
    struct tensor unkept = *x; // stands for z while shapes are checked
    z = z ? z : &unkept;
    TRY(op_combine_fwd(c, z, rows, slot, weight, shared));
    if (z1)
        TRY(op_gate_residual_fwd(c, y, x, z1, mod, gate1));
    TRY(op_gate_residual_fwd(c, y, z1 ? y : x, z, mod, at.gate));
    return op_layernorm_mod_fwd(c, h, stats, y, mod, at.shift, at.scale);
}

int op_norm_gate_bwd(struct context *c, struct tensor *dx, struct tensor *dz, struct tensor *dmod,
                     struct tensor *dh, const struct tensor *drows, const struct tensor *slot,
                     const struct tensor *dlogits, const struct tensor *router_w,
                     const struct tensor *y, const struct tensor *stats, const struct tensor *z,
                     const struct tensor *mod, struct norm_columns at)
{
    BUG_IF(!drows != !slot || !dlogits != !router_w || (dz && !z));
    op_want_norm_backward(c, y, mod);
    const struct norm_backward args = {.dx = dx->mem,
                                       .dz = MEM(dz),
                                       .dmod = dmod->mem,
                                       .partial = c->space.mem,
                                       .dh = dh->mem,
                                       .drows = MEM(drows),
                                       .slot = MEM(slot),
                                       .dlogits = MEM(dlogits),
                                       .router_w = MEM(router_w),
                                       .y = y->mem,
                                       .stats = stats->mem,
                                       .z = dz ? MEM(z) : NULL,
                                       .mod = mod->mem,
                                       NORM_SIZES(y, mod, at),
                                       .experts = dlogits ? arg_int(router_w->shape[0]) : 0,
                                       .choices = slot ? arg_int(slot->shape[1]) : 0};
    int code = ACCELERATE(c, ACCELERATE_NORM_BWD, &args, dx, dz, dmod, dh, drows, slot, dlogits,
                          router_w, y, stats, z, mod);
    if (code != NOT_MINE)
        return code;
    if (drows)
        TRY(op_dispatch_bwd(c, dh, drows, slot));
    if (dlogits)
        TRY(op_linear_dx(c, dh, dlogits, router_w, true));
    TRY(op_layernorm_mod_bwd(c, dx, dmod, dh, y, stats, mod, at.shift, at.scale));
    return dz ? op_gate_residual_bwd(c, dz, dmod, dx, z, mod, at.gate) : 0;
}

int op_router_dw(struct context *c, struct tensor *dw, const struct tensor *dlogits,
                 const struct tensor *h)
{
    if (c->dev->fused_width > 0)
        op_want_space(c, SUM_PARTS * tensor_bytes(dw));
    const struct router_gradient args = {.dw = dw->mem,
                                         .dlogits = dlogits->mem,
                                         .h = h->mem,
                                         .partial = c->space.mem,
                                         .rows = arg_int(h->shape[0]),
                                         .width = arg_int(h->shape[1]),
                                         .experts = arg_int(dw->shape[0]),
                                         .added = !c->fresh_gradients};
    int code = ACCELERATE(c, ACCELERATE_ROUTER_DW, &args, dw, dlogits, h);
    return code != NOT_MINE ? code : op_linear_dw(c, dw, NULL, dlogits, h);
}

int op_router_route(struct context *c, struct tensor *probs, struct tensor *weight,
                    struct tensor *index, struct tensor *offsets, struct tensor *slot,
                    struct tensor *token, struct tensor *fraction, struct tensor *mean_prob,
                    const struct tensor *logits, bool renormalise)
{
    const int64_t M = logits->shape[0], E = logits->shape[1];
    BUG_IF(!fraction != !mean_prob);
    if (c->dev->fused_width > 0)
        op_want_space(c, (size_t)(2 * cover(M, ROUTE_ROWS) * E) * sizeof(float));
    const struct route args = {.probs = probs->mem,
                               .weight = weight->mem,
                               .index = index->mem,
                               .offsets = offsets->mem,
                               .slot = slot->mem,
                               .token = token->mem,
                               .fraction = MEM(fraction),
                               .mean_prob = MEM(mean_prob),
                               .logits = logits->mem,
                               .partial = c->space.mem,
                               .rows = arg_int(M),
                               .experts = arg_int(E),
                               .choices = arg_int(index->shape[1]),
                               .groups = fraction ? arg_int(fraction->shape[0]) : 1,
                               .renormalise = renormalise};
    int code = ACCELERATE(c, ACCELERATE_ROUTE, &args, probs, weight, index, offsets, slot, token,
                          fraction, mean_prob, logits);
    if (code != NOT_MINE)
        return code;
    TRY(op_router_fwd(c, probs, weight, index, logits, renormalise));
    TRY(op_route(c, offsets, slot, token, index));
    return fraction ? op_balance(c, fraction, mean_prob, index, probs) : 0;
}
