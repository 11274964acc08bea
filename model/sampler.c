#include "model/sampler.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

// Enough rows for a good product, in little memory.
int sampler_ahead(const struct device *dev, const struct config *c, int rows, int64_t passes)
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

enum sampler_kind sampler_default(const struct config *c)
{
    return c->diffusion == DIFFUSION_DDPM ? SAMPLER_DDPM : SAMPLER_EULER;
}

int sampler_default_channels(const struct config *c)
{
    return c->diffusion == DIFFUSION_DDPM && c->channels > 3 ? 3 : 0;
}

int sampler_schedule(const struct config *c, const struct sample_options *o, struct schedule *out)
{
    TRY(schedule_init(out, c->diffusion, o->kind, o->respacing ? 1 : o->steps));
    out->eta = (double)o->eta;
    out->learned = c->learn_sigma;
    out->clip = o->clip;
    return o->respacing ? schedule_respace(out, o->respacing) : 0;
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
    struct schedule way;
    const int passes = sampler_schedule(c, o, &way) < 0 ? 1 : schedule_passes(&way);
    return (struct dit_options){.batch = rows,
                                .limit = o->limit,
                                .offload = o->offload,
                                .ranks = o->ranks,
                                .pack = o->pack,
                                .ahead = sampler_ahead(dev, c, rows, passes)};
}

static int plan_images(struct sampler *s, const char *name, struct tensor *out)
{
    const struct config *c = &s->dit->config;
    return PLAN_TENSOR(s->dit->plan, name, PLAN_INPUT, F32, 0, PLAN_FOREVER, out, s->batch,
                       c->channels, c->size, c->size);
}

static int plan_tensors(struct sampler *s)
{
    struct plan *plan = s->dit->plan;
    TRY(plan_images(s, "z", &s->z));
    TRY(PLAN_TENSOR(plan, "updates", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->updates, s->passes,
                    STEP_COUNT));
    TRY(PLAN_TENSOR(plan, "update", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->update, STEP_COUNT));
    if (schedule_keeps(&s->schedule))
        TRY(plan_images(s, "kept", &s->kept));
    if (!schedule_random(&s->schedule))
        return 0;
    TRY(plan_images(s, "step noise", &s->noise));
    return PLAN_TENSOR(plan, "numbers", PLAN_INPUT, I32, 0, PLAN_FOREVER, &s->numbers, s->batch);
}

// Is the class's answer guided in this pass?
static bool is_guided(const struct sampler *s, const struct pass *p)
{
    const struct sample_options *o = &s->options;
    const float t = (float)(s->schedule.diffusion == DIFFUSION_DDPM ? p->t / DDPM_STEPS : p->t);
    return !o->interval || (t >= o->cfg_from && t <= o->cfg_to);
}

// Each pass's coefficients, and the guidance scale at its time.
static int write_updates(struct sampler *s)
{
    for (int i = 0; i < s->passes; i++) {
        const struct pass p = schedule_pass(&s->schedule, i);
        float *k = s->coefficients + (size_t)i * STEP_COUNT;
        k[STEP_Z] = (float)p.z;
        k[STEP_V] = (float)p.v;
        k[STEP_KEPT] = (float)p.kept;
        k[STEP_KEEP_Z] = (float)p.keep_z;
        k[STEP_KEEP_V] = (float)p.keep_v;
        k[STEP_CFG] = is_guided(s, &p) ? s->options.cfg : 1;
        k[STEP_CLIP_Z] = (float)p.clip_z;
        k[STEP_CLIP_V] = (float)p.clip_v;
        k[STEP_NOISE] = (float)p.noise;
        k[STEP_SPREAD] = (float)p.spread;
    }
    return tensor_write(&s->dit->ctx, &s->updates, s->coefficients);
}

static size_t image_floats(const struct sampler *s)
{
    const struct config *c = &s->dit->config;
    return (size_t)c->channels * (size_t)c->size * (size_t)c->size;
}

// Plans the model with so many blocks' experts in host memory.
static int plan_model(struct sampler *s, struct device *dev, struct stream *stream,
                      const struct config *c, int blocks)
{
    struct dit_options d = sampler_model(dev, c, s->all, &s->options);
    d.offload.blocks = blocks;
    dit_free(s->dit);
    s->dit = NULL;
    TRY(dit_new(dev, stream, c, &d, &s->dit));
    TRY(plan_tensors(s));
    return dit_layout(s->dit);
}

// With OFFLOAD_AUTO: all on the device, or else as few in host memory as the device's memory allows.
static int plan_fitting(struct sampler *s, struct device *dev, struct stream *stream,
                        const struct config *c)
{
    const int asked = s->options.offload.blocks;
    int code = plan_model(s, dev, stream, c, asked == OFFLOAD_AUTO ? 0 : asked);
    if (asked != OFFLOAD_AUTO || s->options.offload.which || code != ERR_NOMEM || !s->dit)
        return code;
    const int most = streamed_most(s->dit);
    s->options.limit = offload_limit(dev, s->options.limit);
    int too_few = 0, enough = most + 1, blocks = most;
    while (enough - too_few > 1) {
        code = plan_model(s, dev, stream, c, blocks);
        if (code < 0 && (code != ERR_NOMEM || !s->dit))
            return code;
        *(code < 0 ? &too_few : &enough) = blocks;
        if (enough - too_few > 1)
            blocks = (too_few + enough) / 2;
    }
    return enough > most || blocks == enough ? code : plan_model(s, dev, stream, c, enough);
}

static int plan_sampler(struct sampler *s, struct device *dev, struct stream *stream,
                        const struct config *c)
{
    TRY(plan_fitting(s, dev, stream, c));
    TRY(dit_commit(s->dit));
    const struct dit_options d = s->dit->options;
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
    int code = sampler_schedule(c, o, &s->schedule);
    s->passes = schedule_passes(&s->schedule);
    if (code >= 0)
        code = plan_sampler(s, dev, stream, c);
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
    const int all = config_out_channels(&d->config), most = s->options.cfg_channels;
    const int channels = !most ? d->config.channels : most < all ? most : all;
    const size_t bytes = tensor_bytes(&s->z);
    if (s->batch == 0)
        return dit_forward(d); // of other ranks' images
    for (size_t at = 0; at < tensor_bytes(&d->input); at += bytes) // both halves start from z
        TRY(c->dev->api->copy(c->stream, d->input.mem, at, s->z.mem, 0, bytes));
    TRY(dit_forward(d));
    return op_sample_step(c, &s->z, s->kept.ndim ? &s->kept : NULL, &d->output,
                          s->noise.ndim ? &s->noise : NULL, &s->update, channels);
}

static int condition_ahead(struct sampler *s, int pass)
{
    struct dit *d = s->dit;
    const int ahead = d->options.ahead, rows = d->options.batch;
    for (int i = 0; i < ahead * rows; i++) { // past the last pass: not used
        const int at = pass + i / rows < s->passes ? pass + i / rows : s->passes - 1;
        s->times[i] = (float)schedule_pass(&s->schedule, at).t;
    }
    TRY(tensor_write(&d->ctx, &d->t, s->times));
    return dit_condition(d);
}

// A batch under way, of all ranks: images first..first+count-1.
struct part {
    int first, count;
    const struct sample_noise *noise;
    int all; // images of all batches
};

// The number of this rank's image n; the rest of the batch is filled with copies of the last image.
static int image_number(const struct sampler *s, const struct part *b, int n)
{
    n += s->first;
    return b->first + (n < b->count ? n : b->count - 1);
}

// The noise of a pass that takes some: drawn, or from the caller.
static int write_noise(struct sampler *s, const struct part *b, int pass)
{
    struct context *c = &s->dit->ctx;
    const size_t image = image_floats(s);
    if (s->coefficients[(size_t)pass * STEP_COUNT + STEP_NOISE] == 0 || s->batch == 0)
        return 0;
    if (!b->noise || !b->noise->steps)
        return op_normal_images(c, &s->noise, &s->numbers, s->options.seed,
                                rng_stream(RNG_STEP, (uint64_t)pass << 32));
    const float *given = b->noise->steps + (size_t)pass * (size_t)b->all * image;
    for (int n = 0; n < s->batch; n++)
        memcpy(s->host + (size_t)n * image, given + (size_t)image_number(s, b, n) * image,
               image * sizeof *s->host);
    return tensor_write(c, &s->noise, s->host);
}

static int run_pass(struct sampler *s, const struct part *b, int pass)
{
    struct context *c = &s->dit->ctx;
    const int ahead = s->dit->options.ahead;
    const size_t bytes = tensor_bytes(&s->update);
    if (s->options.ranks)
        TRY(exchange_watched(s->options.ranks->exchange));
    if (s->batch == 0)
        return moe_exchange_recorded(s->dit) ? recording_run(c, &s->pass, device_pass, s)
                                             : device_pass(s);
    if (pass % ahead == 0)
        TRY(condition_ahead(s, pass));
    TRY(dit_use_step(s->dit, pass % ahead));
    TRY(c->dev->api->copy(c->stream, s->update.mem, 0, s->updates.mem, (size_t)pass * bytes,
                          bytes));
    TRY(write_noise(s, b, pass));
    if (!moe_exchange_recorded(s->dit))
        return device_pass(s);
    return recording_run(c, &s->pass, device_pass, s);
}

static int write_numbers(struct sampler *s, const struct part *b)
{
    int32_t *number = malloc(sizeof *number * (size_t)s->batch);
    if (!number)
        return fail(ERR_NOMEM, "no host memory for a batch of %d", s->batch);
    for (int n = 0; n < s->batch; n++)
        number[n] = s->number + image_number(s, b, n);
    int code = tensor_write(&s->dit->ctx, &s->numbers, number);
    free(number);
    return code;
}

static int start_batch(struct sampler *s, const struct part *b, const int32_t *classes)
{
    struct dit *d = s->dit;
    const size_t image = image_floats(s), rows = (size_t)d->options.batch;
    if (s->batch == 0)
        return 0;
    for (int n = 0; n < s->batch; n++) {
        const int i = image_number(s, b, n);
        s->labels[n] = classes[i];
        if (d->options.batch > s->batch)
            s->labels[s->batch + n] = d->config.classes;
        float *z = s->host + (size_t)n * image;
        if (b->noise && b->noise->start)
            memcpy(z, b->noise->start + (size_t)i * image, image * sizeof *z);
        else
            rng_normal_fill(s->options.seed, rng_stream(RNG_SAMPLE, (uint64_t)(s->number + i)), 0,
                            z, image);
    }
    for (int step = 1; step < d->options.ahead; step++)
        memcpy(s->labels + (size_t)step * rows, s->labels, rows * sizeof *s->labels);
    TRY(tensor_write(&d->ctx, &d->labels, s->labels));
    if (s->numbers.ndim)
        TRY(write_numbers(s, b));
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

int sampler_run(struct sampler *s, int count, const int32_t *classes,
                const struct sample_noise *noise, float *latents, sample_progress progress,
                void *user)
{
    struct dit *d = s->dit;
    const size_t image = image_floats(s);
    const int batches = (count + s->all - 1) / s->all, steps = s->schedule.steps;
    for (int first = 0, done = 0; first < count; first += s->all) {
        const int now = count - first < s->all ? count - first : s->all;
        const struct part b = {.first = first, .count = now, .noise = noise, .all = count};
        TRY(start_batch(s, &b, classes));
        for (int pass = 0; pass < s->passes; pass++) {
            TRY(run_pass(s, &b, pass));
            if (progress && schedule_pass(&s->schedule, pass).ends) {
                TRY(d->ctx.dev->api->sync(d->ctx.stream));
                TRY(progress(user, ++done, steps * batches));
            }
        }
        TRY(collect_images(s));
        memcpy(latents + (size_t)first * image, s->host, (size_t)now * image * sizeof *latents);
    }
    return 0;
}
