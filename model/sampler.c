#include "model/sampler.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

int sampler_new(struct device *dev, struct stream *stream, const struct config *c, int batch,
                const struct sample_options *o, struct sampler **out)
{
    *out = NULL;
    if (o->steps < 1)
        return fail(ERR_INPUT, "%d sampling steps: must be 1 or more", o->steps);
    if (o->cfg != 1 && config_label_rows(c) == c->classes)
        return fail(ERR_INPUT, "guidance scale %g: this model was trained without label dropout and has "
                               "no null class; use 1", (double)o->cfg);
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "no host memory for a sampler");
    s->options = *o;
    s->batch = batch;
    const int rows = o->cfg != 1 ? 2 * batch : batch;
    const struct dit_options d = {.batch = rows, .limit = o->limit, .pack = o->pack};
    int code = dit_new(dev, stream, c, &d, &s->dit);
    if (code >= 0)
        code = PLAN_TENSOR(s->dit->plan, "z", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->z, batch,
                           c->channels, c->size, c->size);
    if (code >= 0)
        code = dit_layout(s->dit);
    if (code >= 0)
        code = dit_commit(s->dit);
    s->labels = calloc((size_t)rows, sizeof *s->labels);
    s->times = calloc((size_t)rows, sizeof *s->times);
    s->host = s->dit && s->z.ndim ? malloc(tensor_bytes(&s->z)) : NULL;
    if (code >= 0 && (!s->labels || !s->times || !s->host))
        code = fail(ERR_NOMEM, "no host memory for a batch of %d", batch);
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
    dit_free(s->dit);
    free(s->labels), free(s->times), free(s->host);
    free(s);
}

// One Euler step from t to t - dt.
static int euler_step(struct sampler *s, float t, float dt)
{
    struct dit *d = s->dit;
    struct context *c = &d->ctx;
    const size_t bytes = tensor_bytes(&s->z);
    const int rows = d->options.batch;
    for (int n = 0; n < rows; n++)
        s->times[n] = t;
    TRY(tensor_write(c, &d->t, s->times));
    for (size_t at = 0; at < tensor_bytes(&d->input); at += bytes) // both halves start from z
        TRY(c->dev->api->copy(c->stream, d->input.mem, at, s->z.mem, 0, bytes));
    TRY(dit_forward(d));
    return op_flow_euler(c, &s->z, &d->output, s->options.cfg, d->config.channels, dt);
}

// Images first..first+count-1; the rest of the batch is filled with copies of the last image.
static int start_batch(struct sampler *s, int first, int count, const int32_t *classes,
                       const float *noise)
{
    struct dit *d = s->dit;
    const size_t image = (size_t)tensor_count(&s->z) / (size_t)s->batch;
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
    TRY(tensor_write(&d->ctx, &d->labels, s->labels));
    return tensor_write(&d->ctx, &s->z, s->host);
}

int sampler_run(struct sampler *s, int count, const int32_t *classes, const float *noise,
                float *latents, sample_progress progress, void *user)
{
    const size_t image = (size_t)tensor_count(&s->z) / (size_t)s->batch;
    const int steps = s->options.steps, batches = (count + s->batch - 1) / s->batch;
    for (int first = 0, done = 0; first < count; first += s->batch) {
        const int now = count - first < s->batch ? count - first : s->batch;
        TRY(start_batch(s, first, now, classes, noise));
        for (int k = steps; k > 0; k--) {
            TRY(euler_step(s, (float)k / (float)steps, 1.0f / (float)steps));
            if (progress) {
                TRY(s->dit->ctx.dev->api->sync(s->dit->ctx.stream));
                TRY(progress(user, ++done, steps * batches));
            }
        }
        TRY(tensor_read(&s->dit->ctx, &s->z, s->host));
        memcpy(latents + (size_t)first * image, s->host, (size_t)now * image * sizeof *latents);
    }
    return 0;
}
