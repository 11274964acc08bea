#include "model/dit.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/profile.h"

// ---- times --------------------------------------------------------------------------------------

int time_forward(const struct dit *d, int layer, int phase)
{
    (void)d;
    return (layer + 1) * PHASES + phase;
}

int time_backward(const struct dit *d, int layer, int phase)
{
    const int L = d->config.layers;
    return (L + 2) * PHASES + (L - layer) * PHASES + phase;
}

int plan_activation(struct dit *d, int layer, const char *name, enum dtype type, int from, int to,
                    int back, struct tensor *t, int ndim, const int64_t *shape)
{
    const int L = d->config.layers;
    int first = time_forward(d, layer, from), last = time_forward(d, layer, to);
    if (d->options.train && back != NEVER)
        last = time_backward(d, layer, back);
    if (d->options.recompute && layer >= 0 && layer < L) // one set for all blocks, in both passes
        first = time_forward(d, 0, 0), last = time_backward(d, 0, PHASES - 1);
    return plan_tensor(d->plan, name, PLAN_ACTIVATIONS, type, first, last, t, ndim, shape);
}

// ---- making a model -----------------------------------------------------------------------------

// When gradients that pass, or lie among the activations, live: a block's from its backward pass
// on, the modulations' from the end, where one product writes them.
static void gradient_lives(const struct dit *d, struct block_life *lives)
{
    const int L = d->config.layers, end = time_backward(d, -1, PHASES);
    const bool pass = d->options.block_done;
    for (int l = 0; l < L; l++) {
        lives[l].first = time_backward(d, l, 0);
        lives[l].last = pass ? time_backward(d, l, PHASES - 1) : end;
    }
    lives[L] = (struct block_life){time_backward(d, -1, 0), pass ? PLAN_FOREVER : end};
    lives[L + 1] = (struct block_life){time_backward(d, L, 0), pass ? PLAN_FOREVER : end};
}

static int plan_all_gradients(struct dit *d)
{
    const size_t L = (size_t)d->config.layers;
    struct block_life *lives = NULL;
    if (d->options.block_done || d->options.one_backward) {
        lives = calloc(L + 2, sizeof *lives);
        if (!lives)
            return fail(ERR_NOMEM, "no host memory for %zu blocks", L);
        gradient_lives(d, lives);
    }
    if (d->options.one_backward)
        plan_host(d->plan, PLAN_ACTIVATIONS, PLAN_GRADIENTS);
    int code = weights_plan_passing(&d->g, &d->params, d->plan, PLAN_GRADIENTS, lives);
    free(lives);
    return code;
}

static int plan_parameters(struct dit *d)
{
    const struct dit_options *o = &d->options;
    d->half = d->ctx.dev->half_weights;
    if (d->half)
        TRY(weights_plan_half(&d->w, o->optimiser ? &d->low : NULL, &d->params, d->plan));
    else
        TRY(weights_plan(&d->w, &d->params, d->plan, PLAN_WEIGHTS));
    if (o->train)
        TRY(plan_all_gradients(d));
    if (o->optimiser) {
        TRY(weights_plan(&d->m, &d->params, d->plan, PLAN_MOMENT1));
        TRY(weights_plan(&d->v, &d->params, d->plan, PLAN_MOMENT2));
    }
    return o->ema ? weights_plan(&d->ema, &d->params, d->plan, PLAN_EMA) : 0;
}

static int plan_inputs(struct dit *d)
{
    const struct config *c = &d->config;
    const int64_t N = d->options.batch, S = c->size, Co = config_out_channels(c);
    const int64_t conditions = N * (d->options.ahead ? d->options.ahead : 1);
    TRY(PLAN_TENSOR(d->plan, "input", PLAN_INPUT, F32, 0, PLAN_FOREVER, &d->input, N, c->channels, S, S));
    TRY(PLAN_TENSOR(d->plan, "t", PLAN_INPUT, F32, 0, PLAN_FOREVER, &d->t, conditions));
    TRY(PLAN_TENSOR(d->plan, "labels", PLAN_INPUT, I32, 0, PLAN_FOREVER, &d->labels, conditions));
    TRY(PLAN_TENSOR(d->plan, "output", PLAN_INPUT, F32, 0, PLAN_FOREVER, &d->output, N, Co, S, S));
    if (!d->options.train)
        return 0;
    return PLAN_TENSOR(d->plan, "doutput", PLAN_INPUT, F32, 0, PLAN_FOREVER, &d->doutput, N, Co, S, S);
}

// The residual stream: x[l] is written by block l-1 and read by block l, in both passes. A block
// that is recomputed writes its output again, after the next block's backward. Its low half lives
// for the forward pass, or as long as x where blocks are recomputed: they must route as they did.
static int plan_residual(struct dit *d)
{
    const struct config *c = &d->config;
    const int L = c->layers;
    const enum dtype act = d->ctx.dev->act;
    const int64_t D = c->hidden, M = d->options.batch * (int64_t)config_tokens(c);
    for (int l = 0; l <= L; l++) {
        int last = time_forward(d, l, PHASES - 1);
        if (d->options.train)
            last = time_backward(d, d->options.recompute && l > 0 ? l - 1 : l, PHASES - 1);
        TRY(PLAN_TENSOR(d->plan, "x", PLAN_ACTIVATIONS, act, time_forward(d, l - 1, 0), last, &d->x[l],
                        M, D));
        if (l == L || !op_combine_norm_fuses(&d->ctx, D))
            continue;
        last = d->options.recompute ? last : time_forward(d, l, PHASES - 1);
        TRY(PLAN_TENSOR(d->plan, "x.low", PLAN_ACTIVATIONS, BF16, time_forward(d, l - 1, 0), last,
                        &d->x_low[l], M, D));
    }
    if (!d->options.train)
        return 0;
    return PLAN_TENSOR(d->plan, "dx", PLAN_ACTIVATIONS, act, time_backward(d, L, 0),
                       time_backward(d, -1, PHASES - 1), &d->dx, M, D);
}

static int64_t round_to(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

// For the optimiser: norms that the products of the experts' gradients leave, if both of a block
// do.
static int plan_norms(struct dit *d)
{
    const int64_t R = d->options.batch * (int64_t)config_tokens(&d->config) * d->config.topk;
    const int64_t align = (int64_t)d->ctx.dev->info.align, unit = align > 128 ? align / 4 : 32;
    int first = 0, blocks = 0;
    while (first < d->config.layers && !config_is_moe(&d->config, first))
        first++;
    for (int l = first; l < d->config.layers; l++)
        blocks += config_is_moe(&d->config, l);
    if (blocks == 0 || d->config.expert == EXPERT_GELU)
        return 0;
    const int64_t gu = op_experts_dw_norms(&d->ctx, &d->g.blocks[first].experts_gu, R);
    const int64_t down = op_experts_dw_norms(&d->ctx, &d->g.blocks[first].experts_down, R);
    const int64_t place = round_to(gu, unit), both = place + round_to(down, unit);
    if (!gu || !down)
        return 0;
    TRY(PLAN_TENSOR(d->plan, "norms", PLAN_INPUT, F32, 0, PLAN_FOREVER, &d->norms, blocks * both));
    int64_t at = 0;
    for (int l = first; l < d->config.layers; l++) {
        if (!config_is_moe(&d->config, l) || streamed_block(d, l))
            continue;
        TRY(plan_view(d->plan, &d->norms, at, &d->grads[l].norms_gu, 1, &gu));
        TRY(plan_view(d->plan, &d->norms, at + place, &d->grads[l].norms_down, 1, &down));
        at += both;
    }
    return 0;
}

static int plan_model(struct dit *d)
{
    TRY(plan_parameters(d));
    TRY(streamed_plan(d));
    TRY(plan_inputs(d));
    TRY(plan_residual(d));
    if (d->options.optimiser && !d->options.block_done && !d->options.ranks)
        TRY(plan_norms(d));
    TRY(embed_plan(d));
    for (int l = 0; l < d->config.layers; l++)
        TRY(block_plan(d, l));
    TRY(final_plan(d));
    d->ctx.dry = true; // operations check shapes and ask for scratch
    if (d->options.batch > 0)
        TRY(condition_forward(d));
    TRY(dit_forward(d));
    return d->options.train ? dit_backward(d) : 0;
}

// What is made again costs time and saves activations: little beside the parameters' state
// (weights, moments, gradients and EMA) where that is far larger. On H200, percent of a step and of
// the activations: LEAN_PASSES 3 and 33, LEAN_PRODUCTS 2 and 15. With recompute one block's
// activations are kept anyway, and on CPU devices a pass over memory is dear.
static enum lean lean_for(const struct dit *d)
{
    const struct config *c = &d->config;
    const struct dit_options *o = &d->options;
    const double D = c->hidden, rows = (double)o->batch * config_tokens(c) * c->layers;
    const double columns = D * (2 * MLP_RATIO * c->topk + 2 * c->shared + 8); // g | u, and the rest
    const double state = 20.0 * (double)config_count(c).total;
    const double share = rows * columns * (double)dtype_size(d->ctx.dev->act) / state;
    const enum lean least = share > 0.4 ? LEAN_PRODUCTS : share > 0.2 ? LEAN_PASSES : LEAN_NOTHING;
    if (!o->train || o->recompute || d->ctx.dev->cpu_forms)
        return LEAN_NOTHING;
    if (o->as_ranks || (o->ranks && !o->ranks->peers)) // each plans by itself what all must do alike
        return LEAN_PASSES;
    return least > o->lean ? least : o->lean;
}

int dit_new(struct device *dev, struct stream *stream, const struct config *c,
            const struct dit_options *options, struct dit **out)
{
    TRY(config_check(c));
    if (options->batch < (options->ranks ? 0 : 1))
        return fail(ERR_INPUT, "batch %d: must be 1 or more", options->batch);
    BUG_IF((options->pack || options->ahead) && options->train);
    struct dit *d = calloc(1, sizeof *d);
    if (!d)
        return fail(ERR_NOMEM, "no host memory for a model");
    d->config = *c;
    d->options = *options;
    d->ctx.dev = dev;
    d->ctx.stream = stream;
    d->balance_scale = 1;
    d->lean = lean_for(d);
    const size_t L = (size_t)c->layers;
    d->x = calloc(L + 1, sizeof *d->x);
    d->x_low = calloc(L, sizeof *d->x_low);
    d->acts = calloc(L, sizeof *d->acts);
    d->routes = calloc(L, sizeof *d->routes);
    d->grads = calloc(L, sizeof *d->grads);
    const struct dit_ranks *r = options->ranks;
    int code = 0;
    if (!d->x || !d->x_low || !d->acts || !d->routes || !d->grads)
        code = fail(ERR_NOMEM, "no host memory for a model of %d layers", c->layers);
    if (code < 0 ||
        (code = params_new_part(c, r ? r->placement : NULL, r ? exchange_rank(r->exchange) : 0,
                                &d->params)) < 0 ||
        (code = streamed_new(d)) < 0 || (code = moe_exchange_new(d)) < 0 ||
        (code = plan_new(dev, &d->plan)) < 0 ||
        (code = moe_exchange_windows(d)) < 0 ||
        (code = plan_model(d)) < 0) {
        dit_free(d);
        return code;
    }
    *out = d;
    return 0;
}

int dit_layout(struct dit *d)
{
    struct context *c = &d->ctx;
    if (c->space_wanted && !c->space.ndim)
        TRY(PLAN_TENSOR(d->plan, "scratch", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &c->space,
                        (int64_t)((c->space_wanted + 3) / 4)));
    TRY(plan_layout(d->plan, d->options.limit));
    return d->options.pack && !d->half ? packed_plan(d) : 0;
}

int dit_commit(struct dit *d)
{
    TRY(plan_commit(d->plan));
    d->ctx.dry = false;
    return streamed_commit(d);
}

void dit_free(struct dit *d)
{
    if (!d)
        return;
    streamed_free(d->streamed); // ends copies
    weights_free(&d->w), weights_free(&d->g), weights_free(&d->m), weights_free(&d->v);
    weights_free(&d->ema), weights_free(&d->low);
    params_free(&d->params);
    moe_exchange_free(d->moe); // its windows, before the memory they lie in
    if (d->plan)
        plan_free(d->plan);
    free(d->x), free(d->x_low), free(d->acts), free(d->routes), free(d->grads), free(d->packed);
    free(d);
}

// ---- parameters ---------------------------------------------------------------------------------

static int zero_class(struct dit *d, enum plan_class class)
{
    const struct tensor *slabs;
    int n = plan_slabs(d->plan, class, &slabs);
    for (int i = 0; i < n; i++)
        TRY(tensor_zero(&d->ctx, &slabs[i]));
    return 0;
}

// Is the gradient one matrix product of the backward pass, which can write it?
static bool is_product(const struct param *p)
{
    bool labels = p->block < 0 && p->member == offsetof(struct weights, labels);
    return p->ndim > 1 && !labels;
}

// Zeroes the gradients of one block, or of the rest (-1), that products do not write. (A rank
// without images has products of experts only.)
static int zero_gradients(struct dit *d, int block)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const bool written = is_product(p) && (d->options.batch > 0 || p->expert != NO_EXPERT);
        if (p->block == block && !p->frozen && !written && p->start == 0) // once a tensor
            TRY(tensor_zero(&d->ctx, param_tensor(&d->g, p)));
    }
    return 0;
}

// Gradients that share memory: each block's are zeroed when its turn comes.
static bool zeroed_in_turn(const struct dit *d)
{
    return d->options.block_done || d->options.one_backward;
}

int dit_zero_gradients(struct dit *d)
{
    for (int l = -1; l < (zeroed_in_turn(d) ? 0 : d->config.layers); l++)
        TRY(zero_gradients(d, l));
    d->ctx.fresh_gradients = true;
    return 0;
}

int dit_copy_ema(struct dit *d)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        if (!p->frozen && p->start == 0) // once a tensor
            TRY(weight_copy(&d->ctx, param_tensor(&d->ema, p), param_tensor(&d->w, p)));
    }
    return 0;
}

int dit_init(struct dit *d, uint64_t seed)
{
    int64_t largest = 0;
    for (int i = 0; i < d->params.count; i++) {
        int64_t n = param_count(&d->params.list[i]);
        largest = n > largest ? n : largest;
    }
    float *host = malloc((size_t)largest * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for a parameter of %lld floats", (long long)largest);
    int code = 0;
    for (int i = 0; i < d->params.count && code >= 0; i++) {
        const struct param *p = &d->params.list[i];
        if (p->start == PARAM_ELSEWHERE)
            continue;
        param_init(&d->params, p, seed, host);
        code = param_write(&d->ctx, &d->w, p, host);
    }
    free(host);
    TRY(code);
    if (d->options.optimiser) {
        TRY(zero_class(d, PLAN_MOMENT1));
        TRY(zero_class(d, PLAN_MOMENT2));
        streamed_zero_moments(d);
    }
    return d->options.ema ? dit_copy_ema(d) : 0;
}

// ---- the two passes -----------------------------------------------------------------------------

static int block_ready(struct dit *d, int layer)
{
    return d->options.block_ready && !d->ctx.dry ? d->options.block_ready(d->options.user, layer) : 0;
}

// A rank without images has only experts to care for.
static int serve_forward(struct dit *d)
{
    for (int l = 0; l < d->config.layers; l++)
        if (config_is_moe(&d->config, l))
            TRY(moe_forward(d, l));
    return 0;
}

static int serve_backward(struct dit *d)
{
    for (int l = d->config.layers - 1; l >= 0; l--) {
        const bool moe = config_is_moe(&d->config, l);
        if (moe && d->options.recompute)
            TRY(moe_forward(d, l));
        if (moe)
            TRY(moe_backward(d, l));
        TRY(block_ready(d, l));
    }
    TRY(embed_serve_backward(d));
    TRY(block_ready(d, -1));
    d->ctx.fresh_gradients = false;
    return streamed_end_backward(d);
}

int dit_forward(struct dit *d)
{
    TRY(streamed_begin(d, false));
    if (d->options.batch == 0)
        return serve_forward(d);
    if (!d->options.ahead)
        TRY(condition_forward(d));
    TRY(embed_forward(d));
    TRY(block_enter(d, 0));
    for (int l = 0; l < d->config.layers; l++) {
        profile_layer(&d->ctx, l);
        TRY(block_forward(d, l));
    }
    profile_layer(&d->ctx, -1);
    return final_forward(d);
}

int dit_condition(struct dit *d)
{
    BUG_IF(!d->options.ahead);
    return d->options.batch > 0 ? condition_forward(d) : 0;
}

int dit_use_step(struct dit *d, int at)
{
    const size_t bytes = tensor_bytes(&d->mod);
    BUG_IF(at < 0 || at >= d->options.ahead);
    return d->ctx.dev->api->copy(d->ctx.stream, d->mod.mem, 0, d->embed.mods.mem,
                                 (size_t)at * bytes, bytes);
}

int dit_backward(struct dit *d)
{
    TRY(streamed_begin(d, true));
    if (d->options.batch == 0)
        return serve_backward(d);
    BUG_IF(zeroed_in_turn(d) && !d->ctx.fresh_gradients && !d->ctx.dry);
    TRY(final_backward(d));
    for (int l = d->config.layers - 1; l >= 0; l--) {
        profile_layer(&d->ctx, l);
        if (zeroed_in_turn(d))
            TRY(zero_gradients(d, l));
        TRY(block_backward(d, l));
        if (d->options.block_done && !d->ctx.dry)
            TRY(d->options.block_done(d->options.user, l));
        TRY(block_ready(d, l));
    }
    profile_layer(&d->ctx, -1);
    TRY(embed_backward(d));
    TRY(block_ready(d, -1));
    d->ctx.fresh_gradients = false;
    return streamed_end_backward(d);
}

// ---- what the host may look at ------------------------------------------------------------------

int dit_read_experts(struct dit *d, int layer, int32_t *index)
{
    return tensor_read(&d->ctx, &d->routes[layer].index, index);
}

int dit_read_load(struct dit *d, int layer, int32_t *load)
{
    const int E = d->config.experts;
    int32_t offsets[513];
    BUG_IF(E > 512);
    if (d->moe)
        return moe_exchange_load(d, layer, load);
    TRY(tensor_read(&d->ctx, &d->routes[layer].offsets, offsets));
    for (int e = 0; e < E; e++)
        load[e] = offsets[e + 1] - offsets[e];
    return 0;
}

int dit_read_balance(struct dit *d, int layer, double *loss)
{
    const struct block_route *r = &d->routes[layer];
    const int64_t n = tensor_count(&r->fraction);
    float *host = malloc((size_t)n * 2 * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for balance statistics");
    int code = tensor_read(&d->ctx, &r->fraction, host);
    if (code >= 0)
        code = tensor_read(&d->ctx, &r->mean_prob, host + n);
    double sum = 0;
    for (int64_t i = 0; i < n && code >= 0; i++)
        sum += (double)host[i] * (double)host[n + i];
    *loss = (double)d->config.balance * sum / (double)r->fraction.shape[0];
    free(host);
    return code;
}
