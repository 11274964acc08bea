// Experts that are DiT's plain MLP: fc2 gelu(fc1 x + b1) + b2, over rows sorted by expert. What an
// upcycled DiT has (model/upcycle.h).
#include "model/dit.h"

int gelu_experts_forward(struct context *c, const struct block_weights *w,
                         const struct expert_rows *r)
{
    TRY(op_experts(c, r->pre, r->rows, &w->experts_gu, r->offsets));
    TRY(op_expert_bias_fwd(c, r->pre, &w->experts_fc1_b, r->offsets));
    TRY(op_gelu_fwd(c, r->hidden, r->pre));
    TRY(op_experts(c, r->y, r->hidden, &w->experts_down, r->offsets));
    return op_expert_bias_fwd(c, r->y, &w->experts_fc2_b, r->offsets);
}

int gelu_experts_backward(struct context *c, struct block_weights *g, const struct block_weights *w,
                          const struct expert_rows *r, struct tensor *dhidden)
{
    TRY(op_experts_dx(c, dhidden, r->y, &w->experts_down, r->offsets));
    TRY(op_experts_dw(c, &g->experts_down, NULL, r->y, r->hidden, r->offsets));
    TRY(op_expert_bias_bwd(c, &g->experts_fc2_b, r->y, r->offsets));
    TRY(op_gelu_bwd(c, dhidden, dhidden, r->pre));
    TRY(op_experts_dw(c, &g->experts_gu, NULL, dhidden, r->rows, r->offsets));
    TRY(op_expert_bias_bwd(c, &g->experts_fc1_b, dhidden, r->offsets));
    return op_experts_dx(c, r->y, dhidden, &w->experts_gu, r->offsets);
}
