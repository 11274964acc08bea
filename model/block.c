// A DiT block (Peebles & Xie 2023, adaLN-Zero) with a mixture of experts in place of the MLP:
//   mid = x + gate1 * attention(LN(x) (1 + scale1) + shift1)
//   out = mid + gate2 * moe(LN(mid) (1 + scale2) + shift2)
// A residual sum and the LayerNorm after it are one operation, and so are their gradients (dit.h
// says where blocks meet).
#include "model/dit.h"

// A tensor that is first written where the block before it ends: at that block's last sum.
enum { ENTRY = 5 - PHASES };

// The LayerNorm that follows block `layer`: the next block's first, or the head's.
struct next_norm {
    struct tensor *h, *stats;
    int shift, scale;
};

static struct next_norm next_norm(struct dit *d, int layer)
{
    const int next = layer + 1;
    struct next_norm n = {&d->final.h, &d->final.stats, dit_column(d, next, SHIFT1),
                          dit_column(d, next, SCALE1)};
    if (next < d->config.layers) {
        n.h = &dit_act(d, next)->h1;
        n.stats = &dit_act(d, next)->stats1;
    }
    return n;
}

// ---- the plan -----------------------------------------------------------------------------------

// Whether the products of the backward pass write hidden[.,columns] again.
static bool rebuilds(const struct dit *d, int64_t columns)
{
    return d->lean && op_swiglu_rebuilds(&d->ctx, columns);
}

// Whether the gradient of the choices' weights comes out of those products too, so that the
// experts' rows y are not kept.
static bool drops_y(const struct dit *d)
{
    const int64_t D = d->config.hidden;
    return d->options.train && !d->options.recompute && !d->moe &&
           d->config.expert != EXPERT_GELU &&
           op_swiglu_dots(&d->ctx, d->config.experts, D, MLP_RATIO * D);
}

// Whether the shared expert's g | u is made again, which costs a product.
static bool remakes_shared(const struct dit *d)
{
    return d->lean == LEAN_PRODUCTS && op_swiglu_fuses(&d->ctx, d->config.hidden * d->config.shared);
}

// Whether `mid` is left out of the forward pass: its sum goes into the block's last one unrounded,
// which keeps bf16 nearer to f32, and the backward pass makes it again.
static bool leaves_mid_out(const struct dit *d, int layer)
{
    return config_is_moe(&d->config, layer) && (!d->options.train || d->lean) &&
           op_combine_norm_fuses(&d->ctx, d->config.hidden);
}

static int plan_attention_half(struct dit *d, int l, struct block_act *a)
{
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, T = config_tokens(c), M = N * T;
    ACTIVATION(d, l, "stats1", F32, ENTRY, 0, 7, &a->stats1, M, 2);
    ACTIVATION(d, l, "h1", act, ENTRY, 0, d->lean ? NEVER : 6, &a->h1, M, D);
    ACTIVATION(d, l, "qkv", act, 0, 1, 6, &a->qkv, M, 3 * D);
    if (c->qk_norm) {
        if (d->options.train)
            ACTIVATION(d, l, "qk", act, 0, 1, d->lean ? NEVER : 5, &a->qk, M, 3 * D);
        ACTIVATION(d, l, "qk_stats", F32, 0, 1, 6, &a->qk_stats, M, 2 * c->heads, 2);
    }
    ACTIVATION(d, l, "o", act, 1, 2, 5, &a->o, M, D);
    if (d->options.train)
        ACTIVATION(d, l, "lse", F32, 1, 1, 5, &a->lse, N, c->heads, T);
    ACTIVATION(d, l, "attn", act, 2, 5, 4, &a->attn, M, D);
    if (!leaves_mid_out(d, l)) {
        ACTIVATION(d, l, "mid", act, 2, 5, d->lean ? NEVER : 4, &a->mid, M, D);
        if (op_combine_norm_fuses(&d->ctx, D)) {
            ACTIVATION(d, l, "mid.low", BF16, 2, 5, NEVER, &a->mid_low, M, D);
            a->mid.low = &a->mid_low;
        }
    }
    ACTIVATION(d, l, "stats2", F32, 2, 2, 4, &a->stats2, M, 2);
    ACTIVATION(d, l, "h2", act, 2, 3, d->lean ? NEVER : 3, &a->h2, M, D);
    ACTIVATION(d, l, "out", act, 5, 5, 3, &a->out, M, D);
    return 0;
}

static int plan_moe_half(struct dit *d, int l, struct block_act *a)
{
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t D = c->hidden, M = d->options.batch * (int64_t)config_tokens(c), K = c->topk;
    const int64_t R = M * K, F = MLP_RATIO * D, Fs = D * c->shared, E = c->experts;
    const bool gelu = c->expert == EXPERT_GELU; // keeps what fc1 gives in gu, and rebuilds nothing
    ACTIVATION(d, l, "router.logits", F32, 2, 2, NEVER, &a->logits, M, E);
    ACTIVATION(d, l, "router.probs", F32, 2, 2, 3, &a->probs, M, E);
    ACTIVATION(d, l, "router.weight", F32, 2, 5, 3, &a->weight, M, K);
    ACTIVATION(d, l, "router.slot", I32, 2, 5, 4, &a->slot, M, K);
    ACTIVATION(d, l, "router.token", I32, 2, 3, d->lean ? 2 : NEVER, &a->token, R);
    if (!moe_windows(d)) // which rows go into straight
        ACTIVATION(d, l, "experts.rows", act, d->moe ? 2 : 3, 3, d->lean || d->moe ? NEVER : 2,
                   &a->rows, R, D); // those that travel are made before the shared expert works
    if (!d->moe && (d->options.train || (!gelu && !op_swiglu_fuses(&d->ctx, F))))
        ACTIVATION(d, l, "experts.gu", act, 3, 3, 2, &a->gu, R, gelu ? F : 2 * F);
    if (!d->moe)
        ACTIVATION(d, l, "experts.hidden", act, 3, 4, !gelu && rebuilds(d, F) ? NEVER : 1,
                   &a->hidden, R, F);
    if (!moe_windows(d)) // else moe_exchange_plan() declares it
        ACTIVATION(d, l, "experts.y", act, 4, 5, drops_y(d) ? NEVER : 4, &a->y, R, D);
    if (c->shared) {
        const bool again = remakes_shared(d);
        if ((d->options.train && !again) || !op_swiglu_fuses(&d->ctx, Fs))
            ACTIVATION(d, l, "shared.gu", act, 2, 2, 3, &a->shared_gu, M, 2 * Fs);
        ACTIVATION(d, l, "shared.hidden", act, 2, d->moe ? 4 : 2, again || rebuilds(d, Fs) ? NEVER : 3,
                   &a->shared_hidden, M, Fs);
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
    TRY(PLAN_TENSOR(d->plan, "route.fraction", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &r->fraction,
                    groups, E));
    return PLAN_TENSOR(d->plan, "route.mean_prob", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER,
                       &r->mean_prob, groups, E);
}

#define SCRATCH(name, type, from, to, t, ...)                                         \
    TRY(PLAN_TENSOR(d->plan, name, PLAN_ACTIVATIONS, type, time_backward(d, l, from), \
                    time_backward(d, l, to), t, __VA_ARGS__))

static int plan_moe_gradients(struct dit *d, int l)
{
    const struct config *c = &d->config;
    struct block_grad *s = &d->grads[l];
    const enum dtype act = d->ctx.dev->act;
    const int64_t D = c->hidden, M = d->options.batch * (int64_t)config_tokens(c), K = c->topk;
    const int64_t R = M * K, F = MLP_RATIO * D, Fs = D * c->shared;
    const bool gelu = c->expert == EXPERT_GELU;
    SCRATCH("router.dweight", F32, 0, 3, &s->dweight, M, K);
    SCRATCH("router.dlogits", F32, 3, 4, &s->dlogits, M, c->experts);
    if (!d->moe && (gelu || !op_swiglu_fuses(&d->ctx, F)))
        SCRATCH("experts.dhidden", act, 1, 2, &s->dhidden, R, F);
    if (!d->moe && d->lean)
        SCRATCH("experts.rows again", act, gelu ? 1 : 2, 2, &s->rows, R, D);
    if (!d->moe && !gelu && rebuilds(d, F))
        SCRATCH("experts.hidden again", act, 1, 1, &s->hidden, R, F);
    if (drops_y(d)) {
        SCRATCH("experts.dy", act, 0, 4, &s->dy, R, D);
        SCRATCH("experts.dots", F32, 1, 2, &s->dots, F / 64, R);
    }
    if (!c->shared)
        return 0;
    if (!op_swiglu_fuses(&d->ctx, Fs))
        SCRATCH("shared.dhidden", act, 3, 3, &s->dshared_hidden, M, Fs);
    if (remakes_shared(d))
        SCRATCH("shared.gu again", act, 3, 3, &s->shared_gu, M, 2 * Fs);
    if (remakes_shared(d) || rebuilds(d, Fs))
        SCRATCH("shared.hidden again", act, 3, 3, &s->shared_hidden, M, Fs);
    return 0;
}

static int plan_gradients(struct dit *d, int l)
{
    const struct config *c = &d->config;
    struct block_grad *s = &d->grads[l];
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, T = config_tokens(c), M = N * T;
    SCRATCH("dh", act, 2, 7, &s->dh, M, D);
    SCRATCH("dqkv", act, 5, 6, &s->dqkv, M, 3 * D);
    SCRATCH("delta", F32, 5, 5, &s->delta, N, c->heads, T);
    if (d->lean) {
        SCRATCH("h1 again", act, 6, 6, &s->h1, M, D);
        SCRATCH("h2 again", act, 0, 3, &s->h2, M, D);
        SCRATCH("mid again", act, 0, 4, &s->mid, M, D);
        if (c->qk_norm)
            SCRATCH("qk again", act, 5, 5, &s->qk, M, 3 * D);
    }
    if (config_is_moe(c, l))
        return plan_moe_gradients(d, l);
    SCRATCH("mlp.dact", act, 1, 3, &s->dact, M, MLP_RATIO * D);
    return 0;
}
#undef SCRATCH

int block_plan(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    const bool moe = config_is_moe(&d->config, layer);
    // with recompute one set serves all blocks: the first block of each kind declares it
    if (!a->h1.ndim)
        TRY(plan_attention_half(d, layer, a));
    if (moe && !a->slot.ndim)
        TRY(plan_moe_half(d, layer, a));
    if (!moe && !a->fc1.ndim)
        TRY(plan_mlp_half(d, layer, a));
    if (moe)
        TRY(plan_route(d, layer));
    if (moe && d->moe)
        TRY(moe_exchange_plan(d, layer));
    return d->options.train ? plan_gradients(d, layer) : 0;
}

// ---- forward ------------------------------------------------------------------------------------

int block_enter(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    const struct tensor x = dit_stream(d, layer);
    return op_layernorm_mod_fwd(&d->ctx, &a->h1, &a->stats1, &x, &d->mod,
                                dit_column(d, layer, SHIFT1), dit_column(d, layer, SCALE1));
}

// The modulations between the two halves of a block.
static struct norm_columns middle_columns(const struct dit *d, int layer)
{
    return (struct norm_columns){dit_column(d, layer, GATE1), dit_column(d, layer, SHIFT2),
                                 dit_column(d, layer, SCALE2)};
}

// h1 -> mid and what the feed-forward half leaves.
static int block_body(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    const bool moe = config_is_moe(&d->config, layer);
    const struct norm_columns at = middle_columns(d, layer);
    const struct tensor x = dit_stream(d, layer);
    TRY(attention_forward(d, layer));
    TRY(op_residual_norm_fwd(&d->ctx, leaves_mid_out(d, layer) ? NULL : &a->mid, &a->h2, &a->stats2,
                             moe ? &a->logits : NULL, &x, &a->attn, &d->mod, at,
                             moe ? &d->w.blocks[layer].gate_w : NULL));
    return moe ? moe_forward(d, layer) : mlp_forward(d, layer);
}

static const struct tensor *shared_out(const struct dit *d, const struct block_act *a)
{
    return d->config.shared > 0 ? &a->shared : NULL;
}

int block_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct tensor x = dit_stream(d, layer), y = dit_stream(d, layer + 1);
    const struct next_norm n = next_norm(d, layer);
    const struct norm_columns at = {dit_column(d, layer, GATE2), n.shift, n.scale};
    TRY(block_body(d, layer));
    if (!config_is_moe(&d->config, layer))
        return op_residual_norm_fwd(c, &y, n.h, n.stats, NULL, &a->mid, &a->out, &d->mod, at, NULL);
    const bool keep = d->options.train || !op_combine_norm_fuses(c, d->config.hidden);
    const bool left_out = leaves_mid_out(d, layer);
    return op_combine_norm_fwd(c, &y, n.h, n.stats, keep ? &a->out : NULL,
                               left_out ? &x : &a->mid, left_out ? &a->attn : NULL,
                               dit_column(d, layer, GATE1), &a->y, &a->slot, &a->weight,
                               shared_out(d, a), &d->mod, at);
}

// The forward pass of a block whose activations were not kept, up to `out`.
static int block_again(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    TRY(block_enter(d, layer));
    TRY(block_body(d, layer));
    if (!config_is_moe(&d->config, layer))
        return 0;
    return op_combine_fwd(&d->ctx, &a->out, &a->y, &a->slot, &a->weight, shared_out(d, a));
}

// ---- backward -----------------------------------------------------------------------------------

int block_leave_backward(struct dit *d, int layer, struct tensor *dh, const struct tensor *y,
                         const struct tensor *stats, int shift)
{
    // with recompute, `out` is not there yet: block_backward makes d out itself
    const bool with_gate = layer >= 0 && !d->options.recompute;
    struct tensor *out = with_gate ? &dit_act(d, layer)->out : NULL;
    const struct norm_columns at = {with_gate ? dit_column(d, layer, GATE2) : 0, shift,
                                    shift + d->config.hidden};
    return op_norm_gate_bwd(&d->ctx, &d->dx, out, &d->dmod, dh, NULL, NULL, NULL, NULL, y, stats,
                            out, &d->mod, at);
}

// d of the feed-forward half's input -> dx, d attn.
static int middle_backward(struct dit *d, int layer)
{
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    const bool moe = config_is_moe(&d->config, layer), rest = moe && d->config.shared > 0;
    const struct norm_columns at = middle_columns(d, layer);
    return op_norm_gate_bwd(&d->ctx, &d->dx, &a->attn, &d->dmod, &s->dh,
                            moe ? dit_kept(&a->y, &s->dy) : NULL,
                            moe ? &a->slot : NULL, rest ? &s->dlogits : NULL,
                            rest ? &d->w.blocks[layer].gate_w : NULL, dit_kept(&a->mid, &s->mid),
                            &a->stats2, &a->attn, &d->mod, at);
}

int block_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    if (d->options.recompute) {
        TRY(block_again(d, layer));
        TRY(op_gate_residual_bwd(c, &a->out, &d->dmod, &d->dx, &a->out, &d->mod,
                                 dit_column(d, layer, GATE2)));
    }
    if (d->lean)
        TRY(op_residual_norm_fwd(c, &s->mid, &s->h2, &a->stats2, NULL, &d->x[layer], &a->attn,
                                 &d->mod, middle_columns(d, layer), NULL));
    TRY(config_is_moe(&d->config, layer) ? moe_backward(d, layer) : mlp_backward(d, layer));
    TRY(middle_backward(d, layer));
    TRY(attention_backward(d, layer));
    return block_leave_backward(d, layer - 1, &s->dh, &d->x[layer], &a->stats1,
                                dit_column(d, layer, SHIFT1));
}
