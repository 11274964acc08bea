// The head: LN + adaLN, one Linear to patches, patches to an image.
#include "model/dit.h"

int final_plan(struct dit *d)
{
    struct final_act *a = &d->final;
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int L = c->layers;
    const int64_t N = d->options.batch, D = c->hidden, M = N * config_tokens(c);
    const int64_t P = (int64_t)c->patch * c->patch * config_out_channels(c);
    // written by the last block, whose last sum is followed by this LayerNorm
    const int entry = 5 - PHASES;
    ACTIVATION(d, L, "final.stats", F32, entry, 1, 2, &a->stats, M, 2);
    ACTIVATION(d, L, "final.h", act, entry, 2, 1, &a->h, M, D);
    ACTIVATION(d, L, "final.patches", act, 2, 3, 1, &a->patches, M, P);
    if (!d->options.train)
        return 0;
    const int from = time_backward(d, L, 0), to = time_backward(d, L, PHASES - 1);
    return PLAN_TENSOR(d->plan, "final.dh", PLAN_ACTIVATIONS, act, from, to, &a->dh, M, D);
}

int final_forward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct final_act *a = &d->final;
    TRY(op_linear(c, &a->patches, &a->h, &d->w.final_w, &d->w.final_b));
    return op_unpatchify(c, &d->output, &a->patches, d->config.patch);
}

// Starts the residual gradient dx; leaves d out of the last block.
int final_backward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct final_act *a = &d->final;
    const int L = d->config.layers;
    struct tensor *dpatches = &a->patches; // in place
    TRY(op_patchify(c, dpatches, &d->doutput, d->config.patch, PATCH_PQC));
    TRY(op_linear_dw(c, &d->g.final_w, &d->g.final_b, dpatches, &a->h));
    TRY(op_linear_dx(c, &a->dh, dpatches, &d->w.final_w, false));
    TRY(tensor_zero(c, &d->dx));
    return block_leave_backward(d, L - 1, &a->dh, &d->x[L], &a->stats, dit_column(d, L, SHIFT1));
}
