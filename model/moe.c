// The feed-forward half of a block: a mixture of experts with a shared expert (DiT-MoE section
// 3.1), or DiT's plain MLP. Routing stays on the device: tokens are sorted by expert and every
// projection is one ragged matrix product over the experts.
#include "model/dit.h"

static int router_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_route *r = &d->routes[layer];
    const bool train = d->options.train;
    return op_router_route(c, &a->probs, &a->weight, &r->index, &r->offsets, &a->slot, &a->token,
                           train ? &r->fraction : NULL, train ? &r->mean_prob : NULL, &a->logits,
                           d->config.renormalise);
}

// A tensor that is planned only where the device needs it.
static struct tensor *if_planned(struct tensor *t)
{
    return t->ndim ? t : NULL;
}

// The shared expert comes in two parts of work, between which others may be put.
static int shared_up(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    // nor is it written where the backward pass makes it again
    struct tensor *gu = d->grads[layer].shared_gu.ndim ? NULL : if_planned(&a->shared_gu);
    return op_linear_swiglu(c, &a->shared_hidden, gu, &a->h2, &w->shared_gu);
}

static int shared_down(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    return op_linear(&d->ctx, &a->shared, &a->shared_hidden, &d->w.blocks[layer].shared_down, NULL);
}

// The experts are spread over ranks; while rows travel, the device computes the shared expert. A
// rank without images has no rows, but may have experts.
static int spread_forward(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    const bool any = d->options.batch > 0;
    if (any) {
        TRY(router_forward(d, layer));
        if (!moe_windows(d))
            TRY(op_dispatch_fwd(&d->ctx, &a->rows, &a->h2, &a->token, &a->slot));
    }
    TRY(moe_exchange_send(d, layer));
    if (any && d->config.shared > 0)
        TRY(shared_up(d, layer));
    TRY(moe_exchange_serve(d, layer));
    if (any && d->config.shared > 0)
        TRY(shared_down(d, layer));
    return moe_exchange_take(d, layer);
}

static bool has_gelu(const struct dit *d)
{
    return d->config.expert == EXPERT_GELU;
}

int moe_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    const struct tensor *offsets = &d->routes[layer].offsets;
    if (d->moe)
        return spread_forward(d, layer);
    TRY(router_forward(d, layer));
    if (d->config.shared > 0) {
        TRY(shared_up(d, layer));
        TRY(shared_down(d, layer));
    }
    TRY(op_dispatch_fwd(c, &a->rows, &a->h2, &a->token, &a->slot));
    TRY(streamed_use(d, layer));
    if (has_gelu(d)) {
        struct tensor *pre = a->gu.ndim ? &a->gu : &a->hidden;
        const struct expert_rows r = {&a->rows, pre, &a->hidden, &a->y, offsets};
        TRY(gelu_experts_forward(c, w, &r));
        return streamed_used(d, layer);
    }
    TRY(op_experts_swiglu(c, &a->hidden, if_planned(&a->gu), &a->rows, &w->experts_gu, offsets));
    TRY(op_experts(c, &a->y, &a->hidden, &w->experts_down, offsets));
    return streamed_used(d, layer);
}

// d y in `dy` -> gradients of the experts; dy becomes d rows.
static int experts_backward(struct dit *d, int layer, struct tensor *dy)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    const struct tensor *offsets = &d->routes[layer].offsets;
    struct tensor *hidden = dit_kept(&a->hidden, &s->hidden), *rows = dit_kept(&a->rows, &s->rows);
    TRY(streamed_use(d, layer));
    TRY(streamed_use_gradients(d, layer));
    if (has_gelu(d)) {
        const struct expert_rows r = {rows, &a->gu, hidden, dy, offsets};
        if (d->lean)
            TRY(op_dispatch_fwd(c, rows, &s->h2, &a->token, &a->slot));
        TRY(gelu_experts_backward(c, g, w, &r, &s->dhidden));
        return streamed_used(d, layer);
    }
    TRY(op_experts_swiglu_dx(c, &a->gu, if_planned(&s->dhidden), if_planned(&s->hidden),
                             if_planned(&s->dots), dy, &w->experts_down, offsets));
    TRY(op_experts_dw(c, &g->experts_down, if_planned(&s->norms_down), dy, hidden, offsets));
    if (d->lean)
        TRY(op_dispatch_fwd(c, rows, &s->h2, &a->token, &a->slot));
    TRY(op_experts_dw(c, &g->experts_gu, if_planned(&s->norms_gu), &a->gu, rows, offsets));
    TRY(op_experts_dx(c, dy, &a->gu, &w->experts_gu, offsets));
    return streamed_used(d, layer);
}

// d out -> gradients of the shared expert; starts d h2. In two parts, as forward.
static int shared_down_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    struct tensor *gu = dit_kept(&a->shared_gu, &s->shared_gu), *h2 = dit_kept(&a->h2, &s->h2);
    const bool again = s->shared_gu.ndim;
    if (again)
        TRY(op_linear_swiglu(c, &s->shared_hidden, gu, h2, &w->shared_gu));
    TRY(op_linear_swiglu_dx(c, gu, if_planned(&s->dshared_hidden),
                            again ? NULL : if_planned(&s->shared_hidden), &a->out,
                            &w->shared_down));
    return op_linear_dw(c, &g->shared_down, NULL, &a->out,
                        dit_kept(&a->shared_hidden, &s->shared_hidden));
}

static int shared_up_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    struct tensor *gu = dit_kept(&a->shared_gu, &s->shared_gu), *h2 = dit_kept(&a->h2, &s->h2);
    TRY(op_linear_dw(c, &g->shared_gu, NULL, gu, h2));
    return op_linear_dx(c, &s->dh, gu, &w->shared_gu, false);
}

// The router's gradient comes from the gate weights and from the balance loss, which is of all
// ranks' tokens.
static int router_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_route *r = &d->routes[layer];
    struct block_grad *s = &d->grads[layer];
    const double share = (double)r->index.shape[0] / (double)moe_all_tokens(d);
    TRY(op_router_bwd(c, &s->dlogits, &s->dweight, &a->probs, &r->index, &r->fraction,
                      d->config.balance * d->balance_scale * (float)share, d->config.renormalise));
    TRY(op_router_dw(c, &d->g.blocks[layer].gate_w, &s->dlogits, dit_kept(&a->h2, &s->h2)));
    return d->config.shared > 0
               ? 0
               : op_linear_dx(c, &s->dh, &s->dlogits, &d->w.blocks[layer].gate_w, false);
}

int moe_backward(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    const bool any = d->options.batch > 0, dots = s->dots.ndim;
    struct tensor *dy = dit_kept(&a->y, &s->dy);
    if (any)
        TRY(op_combine_bwd(&d->ctx, dy, dots ? NULL : &s->dweight, &a->out, dots ? NULL : &a->y,
                           &a->slot, &a->weight));
    TRY(d->moe ? moe_exchange_send_back(d, layer) : experts_backward(d, layer, dy));
    if (dots)
        TRY(op_combine_weight_bwd(&d->ctx, &s->dweight, &s->dots, &a->slot, &a->weight));
    if (any && d->config.shared > 0)
        TRY(shared_down_backward(d, layer));
    if (d->moe)
        TRY(moe_exchange_serve_back(d, layer));
    if (any && d->config.shared > 0)
        TRY(shared_up_backward(d, layer));
    if (any)
        TRY(router_backward(d, layer));
    return d->moe ? moe_exchange_take_back(d, layer) : 0;
}

int mlp_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    TRY(op_linear(c, &a->fc1, &a->h2, &w->fc1_w, &w->fc1_b));
    TRY(op_gelu_fwd(c, &a->act, &a->fc1));
    return op_linear(c, &a->out, &a->act, &w->fc2_w, &w->fc2_b);
}

int mlp_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    TRY(op_linear_dw(c, &g->fc2_w, &g->fc2_b, &a->out, &a->act));
    TRY(op_linear_dx(c, &s->dact, &a->out, &w->fc2_w, false));
    TRY(op_gelu_bwd(c, &s->dact, &s->dact, &a->fc1));
    TRY(op_linear_dw(c, &g->fc1_w, &g->fc1_b, &s->dact, dit_kept(&a->h2, &s->h2)));
    return op_linear_dx(c, &s->dh, &s->dact, &w->fc1_w, false);
}
