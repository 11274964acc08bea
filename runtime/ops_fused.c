// Operations that join what lies between two branches of a block. Each is given whole to devices that
// have it in one pass over memory; elsewhere it is a composition of the single operations, whose
// checks hold for both.
#include "runtime/ops_internal.h"

bool op_combine_norm_fuses(const struct context *c, int64_t width)
{
    return width <= c->dev->fused_width && width % 8 == 0;
}

int op_residual_norm_fwd(struct context *c, struct tensor *y, struct tensor *h,
                         struct tensor *stats, struct tensor *logits, const struct tensor *x,
                         const struct tensor *z, const struct tensor *mod, struct norm_columns at,
                         const struct tensor *router_w)
{
    BUG_IF(!logits != !router_w);
    TRY(op_gate_residual_fwd(c, y, x, z, mod, at.gate));
    TRY(op_layernorm_mod_fwd(c, h, stats, y, mod, at.shift, at.scale));
    return logits ? op_linear(c, logits, h, router_w, NULL) : 0;
}

int op_combine_norm_fwd(struct context *c, struct tensor *y, struct tensor *h, struct tensor *stats,
                        struct tensor *z, const struct tensor *x, const struct tensor *rows,
                        const struct tensor *slot, const struct tensor *weight,
                        const struct tensor *shared, const struct tensor *mod,
                        struct norm_columns at)
{
    struct tensor unkept = *x; // stands for a z that is not kept while shapes are checked
    BUG_IF(!z && !(c->dry && op_combine_norm_fuses(c, x->shape[1])));
    if (!z)
        z = &unkept;
    TRY(op_combine_fwd(c, z, rows, slot, weight, shared));
    TRY(op_gate_residual_fwd(c, y, x, z, mod, at.gate));
    return op_layernorm_mod_fwd(c, h, stats, y, mod, at.shift, at.scale);
}

int op_norm_gate_bwd(struct context *c, struct tensor *dx, struct tensor *dz, struct tensor *dmod,
                     struct tensor *dh, const struct tensor *drows, const struct tensor *slot,
                     const struct tensor *dlogits, const struct tensor *router_w,
                     const struct tensor *y, const struct tensor *stats, const struct tensor *z,
                     const struct tensor *mod, struct norm_columns at)
{
    BUG_IF(!drows != !slot || !dlogits != !router_w || (dz && !z));
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
    return op_linear_dw(c, dw, NULL, dlogits, h);
}
