#include "model/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/ddpm.h"
#include "model/train_ranks.h"
#include "runtime/rng.h"

int flow_time_parse(const char *name, enum flow_time *out)
{
    static const char *const names[] = {"logit-normal", "uniform", "stratified"};
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, names[i])) {
            *out = (enum flow_time)i;
            return 0;
        }
    return fail(ERR_INPUT, "time distribution '%s' is none of logit-normal, uniform, stratified", name);
}

struct train_options train_defaults(void)
{
    return (struct train_options){
        .batch = 64,
        .accumulate = 1,
        .adamw = {.rate = 1e-4f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .ema = 0.9999f},
    };
}

// ---- random draws of a micro-step ---------------------------------------------------------------

// Inverse of the standard normal distribution, by bisection: exact enough for f32, and it runs only
// `batch` times a step.
static double normal_quantile(double p)
{
    double low = -10, high = 10;
    for (int i = 0; i < 60; i++) {
        double mid = 0.5 * (low + high);
        if (0.5 * erfc(-mid * M_SQRT1_2) < p)
            low = mid;
        else
            high = mid;
    }
    return 0.5 * (low + high);
}

void flow_draw_times(enum flow_time kind, uint64_t seed, int64_t micro, int count, float *t)
{
    const uint64_t stream = rng_stream(RNG_TIME, (uint64_t)micro);
    for (int n = 0; n < count; n++) {
        double z = 0;
        if (kind == TIME_LOGIT_NORMAL)
            z = (double)rng_normal(seed, stream, (uint64_t)n);
        if (kind == TIME_STRATIFIED)
            z = normal_quantile((n + (double)rng_uniform(seed, stream, (uint64_t)n)) / count);
        t[n] = kind == TIME_UNIFORM ? rng_uniform(seed, stream, (uint64_t)n) : (float)(1 / (1 + exp(-z)));
    }
}

void ddpm_draw_times(uint64_t seed, int64_t micro, int count, float *t)
{
    const uint64_t stream = rng_stream(RNG_TIME, (uint64_t)micro);
    for (int n = 0; n < count; n++)
        t[n] = floorf(DDPM_STEPS * rng_uniform(seed, stream, (uint64_t)n)); // below 1 by 2^-24: 999
}

static void drop_labels(const struct trainer *t, int64_t micro, const int32_t *labels, int32_t *out)
{
    const struct config *c = &t->dit->config;
    const uint64_t stream = rng_stream(RNG_DROP, (uint64_t)micro);
    for (int n = 0; n < t->options.batch; n++) {
        bool drop = rng_uniform(t->options.seed, stream, (uint64_t)(t->first + n)) < c->class_dropout;
        out[n] = drop ? c->classes : labels[n];
    }
}

// ---- making a trainer ---------------------------------------------------------------------------

static int plan_trainer(struct trainer *t)
{
    struct dit *d = t->dit;
    const struct config *c = &d->config;
    const int64_t N = t->options.batch, S = c->size;
    TRY(PLAN_TENSOR(d->plan, "images", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->images, N, c->channels, S, S));
    TRY(PLAN_TENSOR(d->plan, "noise", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->noise, N, c->channels, S, S));
    TRY(PLAN_TENSOR(d->plan, "at", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->at, N, TIME_COLUMNS));
    if (c->diffusion == DIFFUSION_DDPM) {
        TRY(PLAN_TENSOR(d->plan, "terms", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->terms, 2, N));
        TRY(PLAN_TENSOR(d->plan, "step terms", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->step_terms,
                        t->options.accumulate, 2, N));
    }
    TRY(PLAN_TENSOR(d->plan, "loss", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->loss, N));
    TRY(PLAN_TENSOR(d->plan, "losses", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->losses,
                    N * t->options.accumulate));
    TRY(PLAN_TENSOR(d->plan, "control", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->control, CONTROL_COUNT));
    return PLAN_TENSOR(d->plan, "counts", PLAN_INPUT, I32, 0, PLAN_FOREVER, &t->counts, 2);
}

// Scratch that the optimiser's operations want; their slabs do not exist yet, so on a stand-in.
static int plan_optimiser(struct trainer *t)
{
    struct context *c = &t->dit->ctx;
    int64_t count = config_count(&t->dit->config).total;
    struct tensor slab = {.dtype = F32, .ndim = 1, .shape = {count}};
    return op_norm2(c, &t->control, &slab, false);
}

// The gradients of a block, or of the rest (-1), are complete.
static int block_ready(void *user, int layer)
{
    struct trainer *t = user;
    if (t->reduction)
        TRY(reduction_block(t, layer));
    const bool last = t->micro + 1 == t->options.accumulate;
    return layer < 0 ? 0 : streamed_gradients(t->dit, layer, &t->control, last);
}

// A trainer whose model is at least so lean, with experts of so many blocks in host memory; *out is there
// when it only does not fit.
static int new_trainer(struct device *dev, struct stream *stream, const struct config *c,
                       const struct train_options *o, enum lean lean, int blocks,
                       struct trainer **out)
{
    const struct offload offload = {blocks, o->offload.which};
    *out = NULL;
    if (o->accumulate < 1)
        return fail(ERR_INPUT, "accumulate %d: must be 1 or more", o->accumulate);
    if (o->early && (o->accumulate > 1 || o->adamw.clip > 0))
        return fail(ERR_INPUT, "early updates know neither all gradients' norm nor more than one "
                               "micro-batch: leave out clipping and accumulation");
    if (o->early && o->ranks)
        return fail(ERR_INPUT, "early updates are for one rank: gradients of others join them at "
                               "the end of the backward pass");
    if (o->early && (blocks > 0 || offload.which))
        return fail(ERR_INPUT, "early updates are for experts on the device, not in host memory");
    struct trainer *t = calloc(1, sizeof *t);
    if (!t)
        return fail(ERR_NOMEM, "no host memory for a trainer");
    t->options = *o;
    t->all = o->ranks ? o->ranks->placement->batch : o->batch;
    const struct dit_options d = {.batch = o->batch, .train = true, .optimiser = true, .ema = true,
                                  .recompute = o->recompute, .lean = lean, .limit = o->limit,
                                  .offload = offload, .ranks = o->ranks, .block_ready = block_ready,
                                  .block_done = o->early ? trainer_update_block : NULL, .user = t,
                                  .one_backward = o->accumulate == 1 && !o->early && !o->ranks &&
                                                  !o->as_ranks,
                                  .as_ranks = o->as_ranks};
    int code = dit_new(dev, stream, c, &d, &t->dit);
    if (code >= 0) {
        t->first = moe_first_image(t->dit);
        t->t_host = calloc((size_t)t->all, sizeof *t->t_host);
        t->at_host = calloc((size_t)o->batch + 1, TIME_COLUMNS * sizeof *t->at_host);
        t->y_host = calloc((size_t)o->batch + 1, sizeof *t->y_host);
        t->entropy = calloc((size_t)c->layers, sizeof *t->entropy);
        t->passes = calloc((size_t)o->accumulate, sizeof *t->passes);
        if (!t->t_host || !t->at_host || !t->y_host || !t->entropy || !t->passes)
            code = fail(ERR_NOMEM, "no host memory for a batch of %d", o->batch);
    }
    if (code >= 0)
        t->dit->balance_scale = 1.0f / (float)o->accumulate;
    if (code >= 0)
        code = plan_trainer(t);
    if (code >= 0)
        code = reduction_new(t);
    if (code >= 0)
        code = plan_optimiser(t);
    if (code < 0) {
        trainer_free(t);
        return code;
    }
    *out = t;
    return dit_layout(t->dit);
}

// As it fits: first by making more again in the backward pass.
static int fitting_trainer(struct device *dev, struct stream *stream, const struct config *c,
                           const struct train_options *o, int blocks, struct trainer **out)
{
    int code = new_trainer(dev, stream, c, o, LEAN_NOTHING, blocks, out);
    while (code == ERR_NOMEM && *out && (*out)->dit->lean < LEAN_PRODUCTS && !dev->cpu_forms &&
           !o->recompute && (!o->ranks || o->ranks->peers) && !o->as_ranks) {
        const enum lean leaner = (*out)->dit->lean + 1;
        trainer_free(*out);
        code = new_trainer(dev, stream, c, o, leaner, blocks, out);
    }
    return code;
}

int trainer_new(struct device *dev, struct stream *stream, const struct config *c,
                const struct train_options *o, struct trainer **out)
{
    const bool choose = o->offload.blocks == OFFLOAD_AUTO && !o->offload.which;
    int code = fitting_trainer(dev, stream, c, o, choose ? 0 : o->offload.blocks, out);
    if (!choose || code != ERR_NOMEM || !*out || o->early)
        return code;
    const int most = streamed_most((*out)->dit);
    struct train_options tight = *o;
    tight.limit = offload_limit(dev, o->limit);
    int too_few = 0, enough = most + 1, blocks = most;
    while (enough - too_few > 1) {
        trainer_free(*out);
        code = fitting_trainer(dev, stream, c, &tight, blocks, out);
        if (code < 0 && (code != ERR_NOMEM || !*out))
            return code;
        *(code < 0 ? &too_few : &enough) = blocks;
        if (enough - too_few > 1)
            blocks = (too_few + enough) / 2;
    }
    if (enough > most || blocks == enough)
        return code;
    trainer_free(*out);
    return fitting_trainer(dev, stream, c, &tight, enough, out);
}

int trainer_commit(struct trainer *t)
{
    TRY(dit_commit(t->dit));
    TRY(optimiser_commit(t));
    TRY(reduction_commit(t));
    TRY(tensor_zero(&t->dit->ctx, &t->control));
    return tensor_zero(&t->dit->ctx, &t->counts);
}

void trainer_free(struct trainer *t)
{
    if (!t)
        return;
    for (int i = 0; t->passes && i < t->options.accumulate; i++)
        recording_reset(&t->dit->ctx, &t->passes[i]);
    reduction_free(t);
    dit_free(t->dit);
    free(t->t_host), free(t->at_host), free(t->y_host), free(t->entropy), free(t->passes);
    free(t->spans);
    free(t);
}

// ---- the step -----------------------------------------------------------------------------------

// The images' t to the device: for the network, and what they mean for the loss.
static int write_times(struct trainer *t, const float *time)
{
    const int N = t->options.batch;
    if (t->dit->config.diffusion == DIFFUSION_DDPM) {
        ddpm_training(time, N, t->at_host);
    } else {
        for (int n = 0; n < N; n++) {
            t->at_host[n * TIME_COLUMNS + TIME_SIGNAL] = 1.0f - time[n];
            t->at_host[n * TIME_COLUMNS + TIME_NOISE] = time[n];
        }
    }
    TRY(tensor_write(&t->dit->ctx, &t->at, t->at_host));
    return tensor_write(&t->dit->ctx, &t->dit->t, time);
}

static int loss_of_output(struct trainer *t)
{
    struct dit *d = t->dit;
    struct context *c = &d->ctx;
    const float scale = 1.0f / (float)((int64_t)t->all * t->options.accumulate);
    const size_t bytes = tensor_bytes(&t->terms);
    if (d->config.diffusion != DIFFUSION_DDPM)
        return op_flow_loss(c, &t->loss, &d->doutput, &d->output, &t->images, &t->noise, scale);
    TRY(op_ddpm_loss(c, &t->loss, &t->terms, &d->doutput, &d->output, &t->images, &t->noise, &t->at,
                     scale));
    return c->dev->api->copy(c->stream, t->step_terms.mem, (size_t)t->micro * bytes, t->terms.mem,
                             0, bytes);
}

// x_t from what is on the device, and the loss.
static int loss_pass(struct trainer *t)
{
    struct dit *d = t->dit;
    struct context *c = &d->ctx;
    const size_t bytes = tensor_bytes(&t->loss);
    if (t->options.batch == 0)
        return dit_forward(d); // of other ranks' images
    TRY(op_diffuse(c, &d->input, &t->images, &t->noise, &t->at));
    TRY(dit_forward(d));
    TRY(loss_of_output(t));
    return c->dev->api->copy(c->stream, t->losses.mem, (size_t)t->micro * bytes, t->loss.mem, 0, bytes);
}

// The loss, and its gradients (added; from zero in a step's first).
static int gradient_pass(struct trainer *t)
{
    struct dit *d = t->dit;
    TRY(loss_pass(t));
    if (t->options.early)
        TRY(trainer_begin_early(t));
    if (t->micro == 0)
        TRY(dit_zero_gradients(d));
    return dit_backward(d);
}

// All that the device does between the inputs of a micro-batch and its end.
static int micro_pass(void *user)
{
    struct trainer *t = user;
    TRY(gradient_pass(t));
    return t->micro + 1 == t->options.accumulate ? trainer_apply(t) : 0;
}

// What a micro-batch starts from, on the device. With ranks, the part of what one rank would draw.
static int write_inputs(struct trainer *t, int64_t micro, const float *images, const int32_t *labels)
{
    struct dit *d = t->dit;
    struct context *c = &d->ctx;
    if (t->options.batch == 0)
        return 0;
    if (d->config.diffusion == DIFFUSION_DDPM)
        ddpm_draw_times(t->options.seed, micro, t->all, t->t_host);
    else
        flow_draw_times(t->options.time, t->options.seed, micro, t->all, t->t_host);
    drop_labels(t, micro, labels, t->y_host);
    TRY(tensor_write(c, &t->images, images));
    TRY(write_times(t, t->t_host + t->first));
    TRY(tensor_write(c, &d->labels, t->y_host));
    if (t->reduction)
        return reduction_noise(t, micro);
    return op_normal(c, &t->noise, t->options.seed, rng_stream(RNG_NOISE, (uint64_t)micro), 0);
}

int trainer_micro(struct trainer *t, const float *images, const int32_t *labels, bool *done)
{
    const int A = t->options.accumulate;
    *done = false;
    TRY(write_inputs(t, t->step * A + t->micro, images, labels));
    TRY(reduction_watched(t));
    if (!reduction_recorded(t))
        TRY(micro_pass(t));
    else
        TRY(recording_run(&t->dit->ctx, &t->passes[t->micro], micro_pass, t));
    if (++t->micro < A)
        return 0;
    t->micro = 0;
    t->step++;
    *done = true;
    return 0;
}

int trainer_loss(struct trainer *t, const float *x, const float *time, const int32_t *y,
                 const float *noise, double *loss)
{
    struct dit *d = t->dit;
    struct context *c = &d->ctx;
    t->micro = 0;
    TRY(tensor_write(c, &t->images, x));
    TRY(tensor_write(c, &t->noise, noise));
    TRY(write_times(t, time));
    TRY(tensor_write(c, &d->labels, y));
    TRY(gradient_pass(t));
    float *host = malloc(tensor_bytes(&t->loss));
    if (!host)
        return fail(ERR_NOMEM, "no host memory for %d losses", t->options.batch);
    int code = tensor_read(c, &t->loss, host);
    *loss = 0;
    for (int n = 0; n < t->options.batch; n++)
        *loss += (double)host[n] / t->options.batch;
    free(host);
    return code;
}

// ---- reports ------------------------------------------------------------------------------------

// Entropy of a layer's load over ln E (1: even), and the largest load over the mean.
static void load_statistics(const int32_t *load, int E, double *entropy, double *largest)
{
    double sum = 0, most = 0;
    for (int e = 0; e < E; e++) {
        sum += load[e];
        most = load[e] > most ? load[e] : most;
    }
    *entropy = 0;
    for (int e = 0; e < E; e++)
        if (load[e] > 0)
            *entropy -= load[e] / sum * log(load[e] / sum);
    *entropy = E > 1 ? *entropy / log(E) : 1;
    *largest = sum > 0 ? most * E / sum : 1;
}

// This rank's part of the means of mse and vb over the step's images.
static int read_terms(struct trainer *t, double *mse, double *vb)
{
    const int64_t N = t->options.batch, A = t->options.accumulate;
    if (t->dit->config.diffusion != DIFFUSION_DDPM || N == 0)
        return 0;
    float *host = malloc(tensor_bytes(&t->step_terms));
    if (!host)
        return fail(ERR_NOMEM, "no host memory for the parts of %lld losses", (long long)(A * N));
    const int code = tensor_read(&t->dit->ctx, &t->step_terms, host);
    for (int64_t i = 0; i < 2 * A * N; i++)
        *(i / N % 2 ? vb : mse) += (double)host[i] / (double)(A * t->all);
    free(host);
    return code;
}

int trainer_report(struct trainer *t, struct train_report *out)
{
    struct dit *d = t->dit;
    float control[CONTROL_COUNT];
    int32_t load[512];
    TRY(tensor_read(&d->ctx, &t->control, control));
    *out = (struct train_report){
        .loss = (double)control[CONTROL_SUM],
        .grad_norm = sqrt((double)control[CONTROL_NORM2]),
        .rate = (double)control[CONTROL_RATE],
        .skipped = control[CONTROL_SKIPPED] != 0,
        .entropy = t->entropy,
    };
    TRY(trainer_counts(t, &out->applied, &out->skips));
    for (int l = 0; l < d->config.layers; l++) {
        double balance, largest;
        if (!config_is_moe(&d->config, l))
            continue;
        balance = 0;
        if (t->options.batch > 0)
            TRY(dit_read_balance(d, l, &balance));
        TRY(dit_read_load(d, l, load));
        load_statistics(load, d->config.experts, &t->entropy[out->layers++], &largest);
        out->balance += balance * t->options.batch / t->all;
        out->load_max = largest > out->load_max ? largest : out->load_max;
    }
    double sums[] = {out->balance, 0, 0};
    TRY(read_terms(t, &sums[1], &sums[2]));
    TRY(reduction_sum(t, sums, 3));
    out->balance = sums[0], out->mse = sums[1], out->vb = sums[2];
    return 0;
}

int trainer_counts(struct trainer *t, int32_t *applied, int32_t *skipped)
{
    int32_t counts[2];
    TRY(tensor_read(&t->dit->ctx, &t->counts, counts));
    *applied = counts[0], *skipped = counts[1];
    return 0;
}

int trainer_restore(struct trainer *t, int64_t step, int32_t applied, int32_t skipped)
{
    const int32_t counts[2] = {applied, skipped};
    t->step = step;
    t->micro = 0;
    return tensor_write(&t->dit->ctx, &t->counts, counts);
}
