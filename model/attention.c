// Multi-head self-attention over an image's tokens, with optional LayerNorm per head on q and k.
#include "model/dit.h"

static const struct tensor *attention_input(const struct dit *d, const struct block_act *a)
{
    return d->config.qk_norm ? &a->qk : &a->qkv;
}

int attention_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    const int heads = d->config.heads;
    TRY(op_linear(c, &a->qkv, &a->h1, &w->qkv_w, &w->qkv_b));
    struct tensor *lse = d->options.train ? &a->lse : NULL;
    if (d->config.qk_norm && (!d->options.train || d->lean)) { // normalised q and k are not kept
        TRY(op_qk_attention_fwd(c, &a->o, lse, lse ? &a->qk : &a->qkv, &a->qk_stats, &a->qkv,
                                &w->q_norm_w, &w->q_norm_b, &w->k_norm_w, &w->k_norm_b,
                                d->options.batch, heads));
        return op_linear(c, &a->attn, &a->o, &w->proj_w, &w->proj_b);
    }
    if (d->config.qk_norm)
        TRY(op_qk_norm_fwd(c, &a->qk, &a->qk_stats, &a->qkv, &w->q_norm_w, &w->q_norm_b,
                           &w->k_norm_w, &w->k_norm_b, heads));
    TRY(op_attention_fwd(c, &a->o, lse, attention_input(d, a), d->options.batch, heads));
    return op_linear(c, &a->attn, &a->o, &w->proj_w, &w->proj_b);
}

int attention_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct block_act *a = dit_act(d, layer);
    struct block_grad *s = &d->grads[layer];
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    const int heads = d->config.heads;
    const struct tensor *dattn = &a->attn;
    TRY(op_linear_dw(c, &g->proj_w, &g->proj_b, dattn, &a->o));
    TRY(op_linear_dx(c, &s->dh, dattn, &w->proj_w, false)); // d o
    if (s->qk.ndim)
        TRY(op_qk_norm_fwd(c, &s->qk, &a->qk_stats, &a->qkv, &w->q_norm_w, &w->q_norm_b,
                           &w->k_norm_w, &w->k_norm_b, heads));
    TRY(op_attention_bwd(c, &s->dqkv, &s->delta, &s->dh, &a->o, &a->lse,
                         s->qk.ndim ? &s->qk : attention_input(d, a), d->options.batch, heads));
    if (d->config.qk_norm)
        TRY(op_qk_norm_bwd(c, &s->dqkv, &g->q_norm_w, &g->q_norm_b, &g->k_norm_w, &g->k_norm_b,
                           &a->qkv, &a->qk_stats, &w->q_norm_w, &w->k_norm_w, heads));
    if (d->lean)
        TRY(op_layernorm_mod_fwd(c, &s->h1, &a->stats1, &d->x[layer], &d->mod,
                                 dit_column(d, layer, SHIFT1), dit_column(d, layer, SCALE1)));
    TRY(op_linear_dw(c, &g->qkv_w, &g->qkv_b, &s->dqkv, dit_kept(&a->h1, &s->h1)));
    return op_linear_dx(c, &s->dh, &s->dqkv, &w->qkv_w, false); // d h1
}
