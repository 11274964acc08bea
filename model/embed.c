// Patch, timestep and label embedding; and c, the conditioning that every block's adaLN reads.
//   x[0] = patches W^T + b + pos          cond = MLP(sincos(t)) + labels[y]         cs = silu(cond)
//   mods = cs W^T + b: the modulations of all layers, one product. They depend on t and y alone, so
//   a sampler computes those of several steps at once (dit_options.ahead).
#include "model/dit.h"

static int plan_condition(struct dit *d)
{
    struct embed_act *a = &d->embed;
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, W = config_modulations(c);
    const int64_t rows = N * (d->options.ahead ? d->options.ahead : 1);
    const int end = PHASES - 1; // what backward reads lives to its end
    ACTIVATION(d, -1, "embed.features", act, 0, 0, end, &a->features, rows, TIMESTEP_FEATURES);
    ACTIVATION(d, -1, "embed.t0", act, 0, 1, end, &a->t0, rows, D);
    ACTIVATION(d, -1, "embed.ts", act, 1, 2, end, &a->ts, rows, D);
    ACTIVATION(d, -1, "embed.cond", act, 2, 3, end, &a->cond, rows, D);
    ACTIVATION(d, -1, "embed.cs", act, 2, 3, end, &a->cs, rows, D);
    TRY(PLAN_TENSOR(d->plan, "embed.mods", PLAN_ACTIVATIONS, act, 0, PLAN_FOREVER, &a->mods, rows,
                    W));
    if (d->options.ahead)
        return PLAN_TENSOR(d->plan, "mod", PLAN_ACTIVATIONS, act, 0, PLAN_FOREVER, &d->mod, N, W);
    return plan_view(d->plan, &a->mods, 0, &d->mod, 2, (int64_t[]){N, W});
}

// With peer windows, the modulations' weight, a large part of all that every rank has, is not
// summed over ranks: what its gradient is a product of is gathered, one row an image, which is far
// less.
static int plan_gathered(struct dit *d)
{
    struct embed_act *a = &d->embed;
    const enum dtype act = d->ctx.dev->act;
    const int64_t D = d->config.hidden, W = config_modulations(&d->config);
    const int64_t N = moe_all_tokens(d) / config_tokens(&d->config);
    struct peer_windows *w = moe_windows(d);
    if (!w)
        return 0;
    TRY(PLAN_TENSOR(d->plan, "dmod of all", PLAN_WINDOWS, act, 0, PLAN_FOREVER, &a->all_dmod, N, W));
    TRY(PLAN_TENSOR(d->plan, "cs of all", PLAN_WINDOWS, act, 0, PLAN_FOREVER, &a->all_cs, N, D));
    a->dmod_number = peer_windows_add(w, PLAN_WINDOWS, &a->all_dmod);
    TRY(a->dmod_number);
    a->cs_number = peer_windows_add(w, PLAN_WINDOWS, &a->all_cs);
    return a->cs_number < 0 ? a->cs_number : 0;
}

int embed_plan(struct dit *d)
{
    struct embed_act *a = &d->embed;
    const struct config *c = &d->config;
    const enum dtype act = d->ctx.dev->act;
    const int64_t N = d->options.batch, D = c->hidden, M = N * config_tokens(c);
    const int first = time_backward(d, c->layers, 0), from = time_backward(d, -1, 0);
    const int end = time_backward(d, -1, PHASES - 1);
    ACTIVATION(d, -1, "embed.patches", act, 0, 0, PHASES - 1, &a->patches, M,
               (int64_t)c->channels * c->patch * c->patch);
    if (d->x_low[0].ndim)
        ACTIVATION(d, -1, "embed.sum", F32, 0, 0, NEVER, &a->sum, M, D);
    TRY(plan_condition(d));
    if (!d->options.train)
        return 0;
    TRY(PLAN_TENSOR(d->plan, "dmod", PLAN_ACTIVATIONS, act, first, end, &d->dmod, N,
                    config_modulations(c)));
    TRY(plan_gathered(d));
    TRY(PLAN_TENSOR(d->plan, "embed.dcs", PLAN_ACTIVATIONS, act, from, end, &a->dcs, N, D));
    return PLAN_TENSOR(d->plan, "embed.dts", PLAN_ACTIVATIONS, act, from, end, &a->dts, N, D);
}

int embed_forward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    TRY(op_patchify(c, &a->patches, &d->input, d->config.patch, PATCH_CPQ));
    struct tensor x = dit_stream(d, 0), *sum = x.low ? &a->sum : &x;
    TRY(op_linear(c, sum, &a->patches, &d->w.patch_w, &d->w.patch_b));
    return op_add_pos(c, &x, sum, &d->w.pos);
}

int condition_forward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    TRY(op_timestep_embed(c, &a->features, &d->t, d->config.full_frequencies));
    TRY(op_linear(c, &a->t0, &a->features, &d->w.t0_w, &d->w.t0_b));
    TRY(op_silu_fwd(c, &a->ts, &a->t0));
    TRY(op_linear(c, &a->cond, &a->ts, &d->w.t2_w, &d->w.t2_b));
    TRY(op_embed_fwd(c, &a->cond, &d->w.labels, &d->labels));
    TRY(op_silu_fwd(c, &a->cs, &a->cond));
    return op_linear(c, &a->mods, &a->cs, &d->w.ada_w, &d->w.ada_b);
}

bool embed_gathers(const struct dit *d, const struct tensor *gradient)
{
    return d->embed.all_dmod.ndim && (gradient == &d->g.ada_w || gradient == &d->g.ada_b);
}

static int modulation_backward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    struct peer_windows *w = moe_windows(d);
    const bool any = d->options.batch > 0;
    if (!a->all_dmod.ndim)
        return op_linear_dw(c, &d->g.ada_w, &d->g.ada_b, &d->dmod, &a->cs);
    if (!c->dry) {
        TRY(peer_windows_meet(w));
        if (any)
            TRY(peer_give_rows(c, w, a->dmod_number, moe_first_image(d), &d->dmod));
        if (any)
            TRY(peer_give_rows(c, w, a->cs_number, moe_first_image(d), &a->cs));
        TRY(peer_say(c, w, PEER_ROWS));
        TRY(peer_wait(c, w, PEER_ROWS, NULL));
    }
    return op_linear_dw(c, &d->g.ada_w, &d->g.ada_b, &a->all_dmod, &a->all_cs);
}

int embed_serve_backward(struct dit *d)
{
    return d->embed.all_dmod.ndim ? modulation_backward(d) : 0;
}

static int condition_backward(struct dit *d)
{
    struct context *c = &d->ctx;
    struct embed_act *a = &d->embed;
    struct tensor *dcond = &a->dcs; // in place
    TRY(modulation_backward(d));
    TRY(op_linear_dx(c, &a->dcs, &d->dmod, &d->w.ada_w, false));
    TRY(op_silu_bwd(c, dcond, &a->dcs, &a->cond));
    TRY(op_embed_bwd(c, &d->g.labels, dcond, &d->labels));
    TRY(op_linear_dw(c, &d->g.t2_w, &d->g.t2_b, dcond, &a->ts));
    TRY(op_linear_dx(c, &a->dts, dcond, &d->w.t2_w, false));
    TRY(op_silu_bwd(c, &a->dts, &a->dts, &a->t0));
    return op_linear_dw(c, &d->g.t0_w, &d->g.t0_b, &a->dts, &a->features);
}

int embed_backward(struct dit *d)
{
    TRY(op_linear_dw(&d->ctx, &d->g.patch_w, &d->g.patch_b, &d->dx, &d->embed.patches));
    return condition_backward(d);
}
