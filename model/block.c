// A DiT block (Peebles & Xie 2023, adaLN-Zero) with a mixture of experts in place of the MLP:
//   mid = x + gate1 * attention(LN(x) (1 + scale1) + shift1)
//   out = mid + gate2 * moe(LN(mid) (1 + scale2) + shift2)
// where the six modulations come from the conditioning, in this order of columns.
#include "model/dit.h"

enum modulation { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2, MODULATIONS };

static int plan_attention_half(struct dit *d, int l, struct block_act *a)
{
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, T = config_tokens(c), M = N * T;
    ACTIVATION(d, l, "mod", act, 0, 5, 7, &a->mod, N, MODULATIONS * D);
    ACTIVATION(d, l, "stats1", F32, 0, 0, 6, &a->stats1, M, 2);
    ACTIVATION(d, l, "h1", act, 0, 0, 6, &a->h1, M, D);
    ACTIVATION(d, l, "qkv", act, 0, 1, 6, &a->qkv, M, 3 * D);
    if (c->qk_norm) {
        ACTIVATION(d, l, "qk", act, 0, 1, 5, &a->qk, M, 3 * D);
        ACTIVATION(d, l, "qk_stats", F32, 0, 1, 6, &a->qk_stats, M, 2 * c->heads, 2);
    }
    ACTIVATION(d, l, "o", act, 1, 2, 5, &a->o, M, D);
    if (d->options.train)
        ACTIVATION(d, l, "lse", F32, 1, 1, 5, &a->lse, N, c->heads, T);
    ACTIVATION(d, l, "attn", act, 2, 2, 4, &a->attn, M, D);
    ACTIVATION(d, l, "mid", act, 2, 5, 3, &a->mid, M, D);
    ACTIVATION(d, l, "stats2", F32, 2, 2, 3, &a->stats2, M, 2);
    ACTIVATION(d, l, "h2", act, 2, 3, 3, &a->h2, M, D);
    ACTIVATION(d, l, "out", act, 5, 5, 3, &a->out, M, D);
    return 0;
}

static int plan_moe_half(struct dit *d, int l, struct block_act *a)
{
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t D = c->hidden, M = d->options.batch * (int64_t)config_tokens(c), K = c->topk;
    const int64_t R = M * K, F = MLP_RATIO * D, Fs = D * c->shared, E = c->experts;
    ACTIVATION(d, l, "router.logits", F32, 2, 2, NEVER, &a->logits, M, E);
    ACTIVATION(d, l, "router.probs", F32, 2, 2, 3, &a->probs, M, E);
    ACTIVATION(d, l, "router.weight", F32, 2, 5, 3, &a->weight, M, K);
    ACTIVATION(d, l, "router.slot", I32, 2, 5, 3, &a->slot, M, K);
    ACTIVATION(d, l, "router.token", I32, 2, 3, NEVER, &a->token, R);
    ACTIVATION(d, l, "experts.rows", act, 3, 3, 2, &a->rows, R, D);
    if (d->options.train || !op_swiglu_fuses(&d->ctx, F))
        ACTIVATION(d, l, "experts.gu", act, 3, 3, 2, &a->gu, R, 2 * F);
    ACTIVATION(d, l, "experts.hidden", act, 3, 4, 1, &a->hidden, R, F);
    ACTIVATION(d, l, "experts.y", act, 4, 5, 3, &a->y, R, D);
    if (c->shared) {
        if (d->options.train || !op_swiglu_fuses(&d->ctx, Fs))
            ACTIVATION(d, l, "shared.gu", act, 2, 2, 3, &a->shared_gu, M, 2 * Fs);
        ACTIVATION(d, l, "shared.hidden", act, 2, 2, 3, &a->shared_hidden, M, Fs);
        ACTIVATION(d, l, "shared.out", act, 2, 5, NEVER, &a->shared, M, D);
    }
    return 0;
}

static int plan_mlp_half(struct dit *d, int l, struct block_act *a)
{
    const enum dtype act = d->ctx.dev->act;
    const int64_t M = d->options.batch * (int64_t)config_tokens(&d->config);
    const int64_t F = MLP_RATIO * (int64_t)d->config.hidden;
    ACTIVATION(d, l, "mlp.fc1", act, 3, 3, 2, &a->fc1, M, F);
    ACTIVATION(d, l, "mlp.act", act, 3, 4, 1, &a->act, M, F);
    return 0;
}

static int plan_route(struct dit *d, int l)
{
    const struct config *c = &d->config;
    struct block_route *r = &d->routes[l];
    const int64_t E = c->experts, M = d->options.batch * (int64_t)config_tokens(c);
    const int64_t groups = c->balance_per_sequence ? d->options.batch : 1;
    TRY(PLAN_TENSOR(d->plan, "route.index", PLAN_ACTIVATIONS, I32, 0, PLAN_FOREVER, &r->index, M,
                    c->topk));
    TRY(PLAN_TENSOR(d->plan, "route.offsets", PLAN_ACTIVATIONS, I32, 0, PLAN_FOREVER, &r->offsets,
                    E + 1));
    if (!d->options.train)
        return 0;
    TRY(PLAN_TENSOR(d->plan, "route.fraction", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER,
                    &r->fraction, groups, E));
    return PLAN_TENSOR(d->plan, "route.mean_prob", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER,
                       &r->mean_prob, groups, E);
}

static int plan_gradients(struct dit *d, int l)
{
    const struct config *c = &d->config;
    struct block_grad *s = &d->grads[l];
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, T = config_tokens(c), M = N * T;
    const int64_t K = c->topk, F = MLP_RATIO * D;
#define SCRATCH(name, type, from, to, t, ...)                                                      \
    TRY(PLAN_TENSOR(d->plan, name, PLAN_ACTIVATIONS, type, time_backward(d, l, from),              \
                    time_backward(d, l, to), t, __VA_ARGS__))
    SCRATCH("dmod", act, 0, 7, &s->dmod, N, MODULATIONS * D);
    SCRATCH("dh", act, 2, 7, &s->dh, M, D);
    SCRATCH("dqkv", act, 5, 6, &s->dqkv, M, 3 * D);
    SCRATCH("delta", F32, 5, 5, &s->delta, N, c->heads, T);
    if (!config_is_moe(c, l)) {
        SCRATCH("mlp.dact", act, 1, 3, &s->dact, M, F);
        return 0;
    }
    if (!op_swiglu_fuses(&d->ctx, F))
        SCRATCH("experts.dhidden", act, 1, 2, &s->dhidden, M * K, F);
    SCRATCH("router.dweight", F32, 0, 3, &s->dweight, M, K);
    SCRATCH("router.dlogits", F32, 3, 3, &s->dlogits, M, c->experts);
    if (c->shared && !op_swiglu_fuses(&d->ctx, D * c->shared))
        SCRATCH("shared.dhidden", act, 3, 3, &s->dshared_hidden, M, D * c->shared);
#undef SCRATCH
    return 0;
}

int block_plan(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    const bool moe = config_is_moe(&d->config, layer);
    // with recompute one set serves all blocks: the first block of each kind declares it
    if (!a->mod.ndim)
        TRY(plan_attention_half(d, layer, a));
    if (moe && !a->rows.ndim)
        TRY(plan_moe_half(d, layer, a));
    if (!moe && !a->fc1.ndim)
        TRY(plan_mlp_half(d, layer, a));
    if (moe)
        TRY(plan_route(d, layer));
    return d->options.train ? plan_gradients(d, layer) : 0;
}

int block_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    const int D = d->config.hidden;
    const struct tensor *x = &d->x[layer];
    TRY(op_linear(c, &a->mod, &d->embed.cs, &w->ada_w, &w->ada_b));

    TRY(op_layernorm_mod_fwd(c, &a->h1, &a->stats1, x, &a->mod, SHIFT1 * D, SCALE1 * D));
    TRY(attention_forward(d, layer));
    TRY(op_gate_residual_fwd(c, &a->mid, x, &a->attn, &a->mod, GATE1 * D));

    TRY(op_layernorm_mod_fwd(c, &a->h2, &a->stats2, &a->mid, &a->mod, SHIFT2 * D, SCALE2 * D));
    TRY(config_is_moe(&d->config, layer) ? moe_forward(d, layer) : mlp_forward(d, layer));
    return op_gate_residual_fwd(c, &d->x[layer + 1], &a->mid, &a->out, &a->mod, GATE2 * D);
}

// d x[layer+1] (in d->dx) -> d x[layer] (in d->dx); the residual's own gradient is dx itself.
int block_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const int D = d->config.hidden;
    if (d->options.recompute)
        TRY(block_forward(d, layer));

    TRY(op_gate_residual_bwd(c, &a->out, &s->dmod, &d->dx, &a->out, &a->mod, GATE2 * D));
    TRY(config_is_moe(&d->config, layer) ? moe_backward(d, layer) : mlp_backward(d, layer));
    TRY(op_layernorm_mod_bwd(c, &d->dx, &s->dmod, &s->dh, &a->mid, &a->stats2, &a->mod, SHIFT2 * D,
                             SCALE2 * D));

    TRY(op_gate_residual_bwd(c, &a->attn, &s->dmod, &d->dx, &a->attn, &a->mod, GATE1 * D));
    TRY(attention_backward(d, layer));
    TRY(op_layernorm_mod_bwd(c, &d->dx, &s->dmod, &s->dh, &d->x[layer], &a->stats1, &a->mod,
                             SHIFT1 * D, SCALE1 * D));

    TRY(op_linear_dw(c, &g->ada_w, &g->ada_b, &s->dmod, &d->embed.cs));
    return op_linear_dx(c, &d->embed.dcs, &s->dmod, &d->w.blocks[layer].ada_w, true);
}
