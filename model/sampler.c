#include "model/sampler.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

// Steps whose conditioning is computed at once: enough rows for a good product, in little memory.
static int steps_ahead(const struct device *dev, const struct config *c, int rows, int steps)
{
    const int64_t most_rows = 1024, most_bytes = 256 << 20;
    const int64_t row = config_modulations(c) * (int64_t)dtype_size(dev->act);
    int64_t ahead = most_rows / rows;
    if (ahead * rows * row > most_bytes)
        ahead = most_bytes / (rows * row);
    ahead = ahead < steps ? ahead : steps;
    return ahead > 1 ? (int)ahead : 1;
}

struct dit_options sampler_model(const struct device *dev, const struct config *c, int batch,
                                 const struct sample_options *o)
{
    const int rows = o->cfg != 1 ? 2 * batch : batch;
    return (struct dit_options){.batch = rows,
                                .limit = o->limit,
                                .pack = o->pack,
                                .ahead = steps_ahead(dev, c, rows, o->steps)};
}

static int plan_sampler(struct sampler *s, struct device *dev, struct stream *stream,
                        const struct config *c)
{
    const struct dit_options d = sampler_model(dev, c, s->batch, &s->options);
    TRY(dit_new(dev, stream, c, &d, &s->dit));
    TRY(PLAN_TENSOR(s->dit->plan, "z", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->z, s->batch,
                    c->channels, c->size, c->size));
    TRY(dit_layout(s->dit));
    TRY(dit_commit(s->dit));
    const size_t conditions = (size_t)d.batch * (size_t)d.ahead;
    s->labels = calloc(conditions, sizeof *s->labels);
    s->times = calloc(conditions, sizeof *s->times);
    s->host = malloc(tensor_bytes(&s->z));
    if (!s->labels || !s->times || !s->host)
        return fail(ERR_NOMEM, "no host memory for a batch of %d", s->batch);
    return 0;
}

int sampler_new(struct device *dev, struct stream *stream, const struct config *c, int batch,
                const struct sample_options *o, struct sampler **out)
{
    *out = NULL;
    if (o->steps < 1)
        return fail(ERR_INPUT, "%d sampling steps: must be 1 or more", o->steps);
    if (o->cfg != 1 && config_label_rows(c) == c->classes)
        return fail(ERR_INPUT,
                    "guidance scale %g: this model was trained without label dropout and has "
                    "no null class; use 1",
                    (double)o->cfg);
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "no host memory for a sampler");
    s->options = *o;
    s->batch = batch;
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
    dit_free(s->dit);
    free(s->labels), free(s->times), free(s->host);
    free(s);
}

// What the device does in a step, the same in each.
static int euler_pass(void *user)
{
    struct sampler *s = user;
    struct dit *d = s->dit;
    struct context *c = &d->ctx;
    const size_t bytes = tensor_bytes(&s->z);
    for (size_t at = 0; at < tensor_bytes(&d->input); at += bytes) // both halves start from z
        TRY(c->dev->api->copy(c->stream, d->input.mem, at, s->z.mem, 0, bytes));
    TRY(dit_forward(d));
    return op_flow_euler(c, &s->z, &d->output, s->options.cfg, d->config.channels,
                         1.0f / (float)s->options.steps);
}

// Step number `step` of options.steps, from t = 1 - step/steps on.
static int euler_step(struct sampler *s, int step)
{
    struct dit *d = s->dit;
    const int ahead = d->options.ahead, rows = d->options.batch, steps = s->options.steps;
    if (step % ahead == 0) {
        for (int i = 0; i < ahead * rows; i++) // past the last step: not used
            s->times[i] = (float)(steps - step - i / rows) / (float)steps;
        TRY(tensor_write(&d->ctx, &d->t, s->times));
        TRY(dit_condition(d));
    }
    TRY(dit_use_step(d, step % ahead));
    return recording_run(&d->ctx, &s->pass, euler_pass, s);
}

// Images first..first+count-1; the rest of the batch is filled with copies of the last image.
static int start_batch(struct sampler *s, int first, int count, const int32_t *classes,
                       const float *noise)
{
    struct dit *d = s->dit;
    const size_t image = (size_t)tensor_count(&s->z) / (size_t)s->batch;
    const size_t rows = (size_t)d->options.batch;
    for (int n = 0; n < s->batch; n++) {
        const int i = first + (n < count ? n : count - 1);
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

int sampler_run(struct sampler *s, int count, const int32_t *classes, const float *noise,
                float *latents, sample_progress progress, void *user)
{
    struct dit *d = s->dit;
    const size_t image = (size_t)tensor_count(&s->z) / (size_t)s->batch;
    const int steps = s->options.steps, batches = (count + s->batch - 1) / s->batch;
    for (int first = 0, done = 0; first < count; first += s->batch) {
        const int now = count - first < s->batch ? count - first : s->batch;
        TRY(start_batch(s, first, now, classes, noise));
        for (int step = 0; step < steps; step++) {
            TRY(euler_step(s, step));
            if (progress) {
                TRY(d->ctx.dev->api->sync(d->ctx.stream));
                TRY(progress(user, ++done, steps * batches));
            }
        }
        TRY(tensor_read(&d->ctx, &s->z, s->host));
        memcpy(latents + (size_t)first * image, s->host, (size_t)now * image * sizeof *latents);
    }
    return 0;
}
