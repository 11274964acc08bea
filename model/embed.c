// Patch, timestep and label embedding; and c, the conditioning that every block's adaLN reads.
//   x[0] = patches W^T + b + pos          cond = MLP(sincos(t)) + labels[y]         cs = silu(cond)
#include "model/dit.h"

int embed_plan(struct dit *d)
{
    struct embed_act *a = &d->embed;
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, M = N * config_tokens(c);
    const int end = PHASES - 1; // every embedding tensor that backward reads lives to its end
    ACTIVATION(d, -1, "embed.patches", act, 0, 0, end, &a->patches, M,
               (int64_t)c->channels * c->patch * c->patch);
    ACTIVATION(d, -1, "embed.features", act, 0, 0, end, &a->features, N, TIMESTEP_FEATURES);
    ACTIVATION(d, -1, "embed.t0", act, 0, 1, end, &a->t0, N, D);
    ACTIVATION(d, -1, "embed.ts", act, 1, 2, end, &a->ts, N, D);
    ACTIVATION(d, -1, "embed.cond", act, 2, 3, end, &a->cond, N, D);
    // read by every block
    TRY(PLAN_TENSOR(d->plan, "embed.cs", PLAN_ACTIVATIONS, act, 0, PLAN_FOREVER, &a->cs, N, D));
    if (!d->options.train)
        return 0;
    TRY(PLAN_TENSOR(d->plan, "embed.dcs", PLAN_ACTIVATIONS, act, time_backward(d, c->layers, 0),
                    time_backward(d, -1, end), &a->dcs, N, D));
    return PLAN_TENSOR(d->plan, "embed.dts", PLAN_ACTIVATIONS, act, time_backward(d, -1, 0),
                       time_backward(d, -1, end), &a->dts, N, D);
}

int embed_forward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    TRY(op_patchify(c, &a->patches, &d->input, d->config.patch, PATCH_CPQ));
    TRY(op_linear(c, &d->x[0], &a->patches, &d->w.patch_w, &d->w.patch_b));
    TRY(op_add_pos(c, &d->x[0], &d->w.pos));

    TRY(op_timestep_embed(c, &a->features, &d->t));
    TRY(op_linear(c, &a->t0, &a->features, &d->w.t0_w, &d->w.t0_b));
    TRY(op_silu_fwd(c, &a->ts, &a->t0));
    TRY(op_linear(c, &a->cond, &a->ts, &d->w.t2_w, &d->w.t2_b));
    TRY(op_embed_fwd(c, &a->cond, &d->w.labels, &d->labels));
    return op_silu_fwd(c, &a->cs, &a->cond);
}

int embed_backward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    TRY(op_linear_dw(c, &d->g.patch_w, &d->g.patch_b, &d->dx, &a->patches));

    struct tensor *dcond = &a->dcs; // in place
    TRY(op_silu_bwd(c, dcond, &a->dcs, &a->cond));
    TRY(op_embed_bwd(c, &d->g.labels, dcond, &d->labels));
    TRY(op_linear_dw(c, &d->g.t2_w, &d->g.t2_b, dcond, &a->ts));
    TRY(op_linear_dx(c, &a->dts, dcond, &d->w.t2_w, false));
    TRY(op_silu_bwd(c, &a->dts, &a->dts, &a->t0));
    return op_linear_dw(c, &d->g.t0_w, &d->g.t0_b, &a->dts, &a->features);
}
