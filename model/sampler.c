#include "model/sampler.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

enum { MOST_STEPS = 1000000 };

// Passes whose conditioning is computed at once: enough rows for a good product, in little memory.
static int passes_ahead(const struct device *dev, const struct config *c, int rows, int64_t passes)
{
    const int64_t most_rows = 1024, most_bytes = 256 << 20;
    const int64_t row = config_modulations(c) * (int64_t)dtype_size(dev->act);
    if (rows == 0)
        return 1;
    int64_t ahead = most_rows / rows;
    if (ahead * rows * row > most_bytes)
        ahead = most_bytes / (rows * row);
    ahead = ahead < passes ? ahead : passes;
    return ahead > 1 ? (int)ahead : 1;
}

// This rank's images of `batch`.
static int share(const struct sample_options *o, int batch)
{
    if (!o->ranks)
        return batch;
    const struct placement *p = o->ranks->placement;
    BUG_IF(p->batch != batch || o->ranks->copies != (o->cfg != 1 ? 2 : 1));
    return p->share[exchange_rank(o->ranks->exchange)];
}

struct dit_options sampler_model(const struct device *dev, const struct config *c, int batch,
                                 const struct sample_options *o)
{
    const int rows = (o->cfg != 1 ? 2 : 1) * share(o, batch);
    const int64_t passes = (int64_t)o->steps * schedule_passes(o->kind);
    return (struct dit_options){.batch = rows,
                                .limit = o->limit,
                                .ranks = o->ranks,
                                .pack = o->pack,
                                .ahead = passes_ahead(dev, c, rows, passes)};
}

static int plan_tensors(struct sampler *s, const struct config *c)
{
    struct plan *plan = s->dit->plan;
    TRY(PLAN_TENSOR(plan, "z", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->z, s->batch, c->channels,
                    c->size, c->size));
    TRY(PLAN_TENSOR(plan, "updates", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->updates, s->passes,
                    FLOW_STEP_COUNT));
    TRY(PLAN_TENSOR(plan, "update", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->update, FLOW_STEP_COUNT));
    if (!schedule_keeps(s->options.kind))
        return 0;
    return PLAN_TENSOR(plan, "kept", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->kept, s->batch,
                       c->channels, c->size, c->size);
}

// Each pass's coefficients, and the guidance scale at its time.
static int write_updates(struct sampler *s)
{
    const struct sample_options *o = &s->options;
    for (int i = 0; i < s->passes; i++) {
        const struct pass p = schedule_pass(o->kind, o->steps, i);
        const float t = (float)p.t;
        const bool guided = !o->interval || (t >= o->cfg_from && t <= o->cfg_to);
        float *k = s->coefficients + (size_t)i * FLOW_STEP_COUNT;
        k[FLOW_STEP_Z] = (float)p.z;
        k[FLOW_STEP_V] = (float)p.v;
        k[FLOW_STEP_KEPT] = (float)p.kept;
        k[FLOW_STEP_KEEP_Z] = (float)p.keep_z;
        k[FLOW_STEP_KEEP_V] = (float)p.keep_v;
        k[FLOW_STEP_CFG] = guided ? o->cfg : 1;
    }
    return tensor_write(&s->dit->ctx, &s->updates, s->coefficients);
}

static size_t image_floats(const struct sampler *s)
{
    const struct config *c = &s->dit->config;
    return (size_t)c->channels * (size_t)c->size * (size_t)c->size;
}

static int plan_sampler(struct sampler *s, struct device *dev, struct stream *stream,
                        const struct config *c)
{
    const struct dit_options d = sampler_model(dev, c, s->all, &s->options);
    TRY(dit_new(dev, stream, c, &d, &s->dit));
    TRY(plan_tensors(s, c));
    TRY(dit_layout(s->dit));
    TRY(dit_commit(s->dit));
    const size_t conditions = (size_t)d.batch * (size_t)d.ahead;
    s->labels = calloc(conditions + 1, sizeof *s->labels);
    s->times = calloc(conditions + 1, sizeof *s->times);
    s->coefficients = malloc(tensor_bytes(&s->updates));
    s->host = malloc(image_floats(s) * (size_t)s->all * sizeof *s->host);
    s->first = moe_first_image(s->dit);
    if (d.ranks)
        TRY(transfers_new(d.ranks->exchange, &s->transfers));
    if (!s->labels || !s->times || !s->coefficients || !s->host)
        return fail(ERR_NOMEM, "no host memory for a batch of %d", s->batch);
    return write_updates(s);
}

int sampler_new(struct device *dev, struct stream *stream, const struct config *c, int batch,
                const struct sample_options *o, struct sampler **out)
{
    *out = NULL;
    if (o->steps < 1 || o->steps > MOST_STEPS)
        return fail(ERR_INPUT, "%d sampling steps: must be 1 to %d", o->steps, MOST_STEPS);
    if (o->cfg != 1 && config_label_rows(c) == c->classes)
        return fail(ERR_INPUT,
                    "guidance scale %g: this model was trained without label dropout and has "
                    "no null class; use 1",
                    (double)o->cfg);
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "no host memory for a sampler");
    s->options = *o;
    s->all = batch;
    s->batch = share(o, batch);
    s->passes = o->steps * schedule_passes(o->kind);
    int code = plan_sampler(s, dev, stream, c);
    if (code < 0) {
        sampler_free(s);
        return code;
    }
    *out = s;
    return 0;
}

void sampler_free(struct sampler *s)
{
    if (!s)
        return;
    if (s->dit)
        recording_reset(&s->dit->ctx, &s->pass);
    transfers_free(s->transfers);
    dit_free(s->dit);
    free(s->labels), free(s->times), free(s->coefficients), free(s->host);
    free(s);
}

// What the device does in a pass, the same in each: what differs is in device memory.
static int device_pass(void *user)
{
    struct sampler *s = user;
    struct dit *d = s->dit;
    struct context *c = &d->ctx;
    const int channels = d->config.channels, most = s->options.cfg_channels;
    const size_t bytes = tensor_bytes(&s->z);
    if (s->batch == 0)
        return dit_forward(d); // of other ranks' images
    for (size_t at = 0; at < tensor_bytes(&d->input); at += bytes) // both halves start from z
        TRY(c->dev->api->copy(c->stream, d->input.mem, at, s->z.mem, 0, bytes));
    TRY(dit_forward(d));
    return op_flow_step(c, &s->z, s->kept.ndim ? &s->kept : NULL, &d->output, &s->update,
                        most && most < channels ? most : channels);
}

static int condition_ahead(struct sampler *s, int pass)
{
    struct dit *d = s->dit;
    const int ahead = d->options.ahead, rows = d->options.batch;
    for (int i = 0; i < ahead * rows; i++) { // past the last pass: not used
        const int at = pass + i / rows < s->passes ? pass + i / rows : s->passes - 1;
        s->times[i] = (float)schedule_pass(s->options.kind, s->options.steps, at).t;
    }
    TRY(tensor_write(&d->ctx, &d->t, s->times));
    return dit_condition(d);
}

static int run_pass(struct sampler *s, int pass)
{
    struct context *c = &s->dit->ctx;
    const int ahead = s->dit->options.ahead;
    const size_t bytes = tensor_bytes(&s->update);
    if (s->batch == 0)
        return device_pass(s);
    if (pass % ahead == 0)
        TRY(condition_ahead(s, pass));
    TRY(dit_use_step(s->dit, pass % ahead));
    TRY(c->dev->api->copy(c->stream, s->update.mem, 0, s->updates.mem, (size_t)pass * bytes,
                          bytes));
    if (s->options.ranks) // the host takes part: nothing to record
        return device_pass(s);
    return recording_run(c, &s->pass, device_pass, s);
}

// This rank's of the images first..first+count-1; the rest of the batch is filled with copies of the
// last image.
static int start_batch(struct sampler *s, int first, int count, const int32_t *classes,
                       const float *noise)
{
    struct dit *d = s->dit;
    const size_t image = image_floats(s), rows = (size_t)d->options.batch;
    if (s->batch == 0)
        return 0;
    for (int n = 0; n < s->batch; n++) {
        const int i = first + (s->first + n < count ? s->first + n : count - 1);
        s->labels[n] = classes[i];
        if (d->options.batch > s->batch)
            s->labels[s->batch + n] = d->config.classes;
        float *z = s->host + (size_t)n * image;
        if (noise)
            memcpy(z, noise + (size_t)i * image, image * sizeof *z);
        else
            rng_normal_fill(s->options.seed, rng_stream(RNG_SAMPLE, (uint64_t)i), 0, z, image);
    }
    for (int step = 1; step < d->options.ahead; step++)
        memcpy(s->labels + (size_t)step * rows, s->labels, rows * sizeof *s->labels);
    TRY(tensor_write(&d->ctx, &d->labels, s->labels));
    return tensor_write(&d->ctx, &s->z, s->host);
}

// The batch's images, of all ranks, into rank 0's s->host.
static int collect_images(struct sampler *s)
{
    const struct dit_ranks *ranks = s->options.ranks;
    const size_t image = image_floats(s) * sizeof *s->host;
    if (s->batch > 0)
        TRY(tensor_read(&s->dit->ctx, &s->z, s->host));
    if (!ranks)
        return 0;
    exchange_doing(ranks->exchange, "bringing images together", -1);
    if (exchange_rank(ranks->exchange) > 0) {
        if (s->batch > 0)
            TRY(exchange_send(s->transfers, s->host, (size_t)s->batch * image, 0, 0));
        return exchange_wait(s->transfers);
    }
    unsigned char *at = (unsigned char *)s->host + (size_t)s->batch * image;
    for (int r = 1; r < ranks->placement->ranks; r++) {
        const size_t bytes = (size_t)ranks->placement->share[r] * image;
        if (bytes > 0)
            TRY(exchange_receive(s->transfers, at, bytes, r, 0));
        at += bytes;
    }
    return exchange_wait(s->transfers);
}

int sampler_run(struct sampler *s, int count, const int32_t *classes, const float *noise,
                float *latents, sample_progress progress, void *user)
{
    struct dit *d = s->dit;
    const size_t image = image_floats(s);
    const int batches = (count + s->all - 1) / s->all;
    const int steps = s->options.steps, each = schedule_passes(s->options.kind);
    for (int first = 0, done = 0; first < count; first += s->all) {
        const int now = count - first < s->all ? count - first : s->all;
        TRY(start_batch(s, first, now, classes, noise));
        for (int pass = 0; pass < s->passes; pass++) {
            TRY(run_pass(s, pass));
            if (progress && (pass + 1) % each == 0) {
                TRY(d->ctx.dev->api->sync(d->ctx.stream));
                TRY(progress(user, ++done, steps * batches));
            }
        }
        TRY(collect_images(s));
        memcpy(latents + (size_t)first * image, s->host, (size_t)now * image * sizeof *latents);
    }
    return 0;
}
