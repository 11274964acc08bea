// The optimiser's pass over all parameters: gradient norm, then AdamW and EMA, one launch for each slab
// of memory that holds parameters of one kind.
#include "model/train.h"

#include <stdlib.h>
#include <string.h>

// Parameters that one pass of the optimiser goes through.
struct span {
    struct tensor w, low, m, v, ema, g; // low: no shape where w is f32
};

static struct tensor slab_part(const struct tensor *slab, int64_t count)
{
    struct tensor part = *slab;
    part.shape[0] = count;
    return part;
}

// The span of the weights in slab `i` of each class, all f32.
static struct span plain_span(struct plan *p, int i)
{
    const struct tensor *w, *m, *v, *ema, *g;
    plan_slabs(p, PLAN_WEIGHTS, &w), plan_slabs(p, PLAN_MOMENT1, &m);
    plan_slabs(p, PLAN_MOMENT2, &v), plan_slabs(p, PLAN_EMA, &ema);
    plan_slabs(p, PLAN_GRADIENTS, &g);
    return (struct span){.w = w[i], .m = m[i], .v = v[i], .ema = ema[i], .g = g[i]};
}

// Where products read bf16, those weights are the first part of each slab, in two halves; the f32 ones
// are the rest.
static struct span half_span(struct plan *p)
{
    const struct tensor *high, *low;
    BUG_IF(plan_slabs(p, PLAN_HALF, &high) != 1 || plan_slabs(p, PLAN_LOW, &low) != 1);
    const int64_t count = 2 * tensor_count(&high[0]); // told as f32
    struct span s = plain_span(p, 0);
    s.m = slab_part(&s.m, count), s.v = slab_part(&s.v, count);
    s.ema = slab_part(&s.ema, count), s.g = slab_part(&s.g, count);
    s.w = slab_part(&high[0], count), s.low = slab_part(&low[0], count);
    s.w.dtype = s.low.dtype = BF16;
    return s;
}

static int commit_rest(struct trainer *t)
{
    struct plan *p = t->dit->plan;
    if (!t->dit->half || t->options.early)
        return 0;
    const struct span half = half_span(p), s = plain_span(p, 0);
    const int64_t count = tensor_count(&half.m);
    const int64_t rest = tensor_count(&s.w);
    TRY(plan_view(p, &s.m, count, &t->rest[0], 1, &rest));
    TRY(plan_view(p, &s.v, count, &t->rest[1], 1, &rest));
    TRY(plan_view(p, &s.ema, count, &t->rest[2], 1, &rest));
    return plan_view(p, &s.g, count, &t->rest[3], 1, &rest);
}

static int update(struct trainer *t, struct span s, const struct tensor *control)
{
    return op_adamw(&t->dit->ctx, &s.w, &s.m, &s.v, &s.ema, &s.g, control,
                    s.low.ndim ? &s.low : NULL, &t->options.adamw);
}

// One launch for each slab, or part of a slab, of weights of one kind.
static int update_all(struct trainer *t, const struct tensor *control)
{
    struct dit *d = t->dit;
    const struct tensor *g;
    const int n = plan_slabs(d->plan, PLAN_GRADIENTS, &g);
    if (d->half) {
        struct span rest = plain_span(d->plan, 0);
        rest.m = t->rest[0], rest.v = t->rest[1], rest.ema = t->rest[2], rest.g = t->rest[3];
        TRY(update(t, half_span(d->plan), control));
        return update(t, rest, control);
    }
    for (int i = 0; i < n; i++)
        TRY(update(t, plain_span(d->plan, i), control));
    return 0;
}

// Norm of all gradients, and from it and the losses what the step is to do.
static int judge(struct trainer *t)
{
    struct context *c = &t->dit->ctx;
    const struct tensor *g;
    const int n = plan_slabs(t->dit->plan, PLAN_GRADIENTS, &g);
    for (int i = 0; i < n; i++)
        TRY(op_norm2(c, &t->control, &g[i], i > 0));
    return op_adamw_control(c, &t->control, &t->counts, &t->losses, &t->options.adamw);
}

// ---- early updates ------------------------------------------------------------------------------

int trainer_begin_early(struct trainer *t)
{
    struct context *c = &t->dit->ctx;
    TRY(tensor_zero(c, &t->control)); // the norm is not known: the loss alone decides
    return op_adamw_control(c, &t->control, &t->counts, &t->losses, &t->options.adamw);
}

int trainer_update_block(void *trainer, int layer)
{
    struct trainer *t = trainer;
    struct dit *d = t->dit;
    struct context *c = &d->ctx;
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        if (p->block != layer || p->frozen || p->start > 0)
            continue;
        struct tensor *w = param_tensor(&d->w, p), *g = param_tensor(&d->g, p);
        TRY(op_norm2(c, &t->control, g, true));
        TRY(op_adamw_guard(c, &t->control, &t->counts));
        TRY(op_adamw(c, w, param_tensor(&d->m, p), param_tensor(&d->v, p), param_tensor(&d->ema, p),
                     g, &t->control, w->low, &t->options.adamw));
    }
    return 0;
}

// ---- updates beside the next forward pass -------------------------------------------------------
//
// AdamW is bound by memory, the forward pass by products: so a device that can do both at once updates
// the weights of a step while the next step's forward pass runs, block by block, each block before
// the pass needs it. The arithmetic is that of an update at once. Until then, or until trainer_flush(),
// the weights are those before the step.

// Compute units that the updates get: as long as the forward pass takes, and enough of them already
// move as much as the memory can.
static int aside_units(const struct trainer *t)
{
    const struct dit *d = t->dit;
    const struct config_counts n = config_count(&d->config);
    const char *asked = getenv("DITMOE_UPDATE_UNITS");
    const int all = d->ctx.dev->info.compute_units;
    // seconds of both on the whole of an H200, 36 bytes a parameter and two thirds of its peak
    const double update = (double)n.total * 36 / 4e12;
    const double forward = (n.macs + n.macs_attention) * 2 * d->options.batch / 4.5e14;
    const int units = (int)(all * update / (update + forward)), most = all / 3;
    if (asked)
        return atoi(asked);
    return units < 8 ? 8 : units > most ? most : units;
}

static int aside_commit(struct trainer *t)
{
    struct context *c = &t->dit->ctx;
    struct aside *a = &t->aside;
    const struct backend *api = c->dev->api;
    const int units = aside_units(t);
    if (!t->dit->half || !api->capture || t->options.early || t->dit->config.layers < 2 ||
        units < 1 || units >= c->dev->info.compute_units)
        return 0;
    a->done = calloc((size_t)t->dit->config.layers, sizeof(struct event *));
    if (!a->done)
        return fail(ERR_NOMEM, "no host memory for %d events", t->dit->config.layers);
    a->c = (struct context){.dev = c->dev, .units = units};
    TRY(api->stream_new(c->dev, &a->c.stream));
    TRY(api->event_new(c->dev, &a->start));
    for (int i = 0; i < t->dit->config.layers; i++)
        TRY(api->event_new(c->dev, &a->done[i]));
    a->on = true;
    return 0;
}

void aside_free(struct trainer *t)
{
    struct aside *a = &t->aside;
    const struct backend *api = t->dit ? t->dit->ctx.dev->api : NULL;
    if (a->c.stream)
        api->stream_free(a->c.stream);
    if (a->start)
        api->event_free(a->start);
    for (int i = 0; a->done && i < t->dit->config.layers; i++)
        if (a->done[i])
            api->event_free(a->done[i]);
    free(a->done);
    *a = (struct aside){0};
}

// No update is due: what is launched all the same does nothing.
static int nothing_due(struct trainer *t)
{
    const float one = 1;
    uint32_t bits;
    memcpy(&bits, &one, sizeof bits);
    t->aside.due = false;
    return t->dit->ctx.dev->api->fill(t->dit->ctx.stream, t->update.mem,
                                      CONTROL_SKIPPED * sizeof one, sizeof one, bits);
}

static int update_block(struct trainer *t, struct context *c, int layer)
{
    struct dit *d = t->dit;
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        if (p->block != layer || p->frozen || p->start > 0)
            continue;
        struct tensor *w = param_tensor(&d->w, p);
        TRY(op_adamw(c, w, param_tensor(&d->m, p), param_tensor(&d->v, p), param_tensor(&d->ema, p),
                     param_tensor(&d->g, p), &t->update, w->low, &t->options.adamw));
    }
    return 0;
}

int aside_begin(struct trainer *t)
{
    struct dit *d = t->dit;
    const struct backend *api = d->ctx.dev->api;
    if (!t->aside.on)
        return 0;
    if (d->ctx.profile) // one after the other, to be seen
        return update_all(t, &t->update);
    // what the pass needs at once, on the whole device
    TRY(update_block(t, &d->ctx, -1));
    TRY(update_block(t, &d->ctx, 0));
    TRY(api->record(d->ctx.stream, t->aside.start));
    TRY(api->wait(t->aside.c.stream, t->aside.start));
    for (int l = 1; l < d->config.layers; l++) {
        TRY(update_block(t, &t->aside.c, l));
        TRY(api->record(t->aside.c.stream, t->aside.done[l]));
    }
    d->ctx.dev->reserved_units = t->aside.c.units;
    t->aside.running = true;
    return 0;
}

int aside_needed(void *trainer, int layer)
{
    struct trainer *t = trainer;
    struct context *c = &t->dit->ctx;
    const bool waits = t->aside.running && layer > 0;
    return waits ? c->dev->api->wait(c->stream, t->aside.done[layer]) : 0;
}

void aside_end(struct trainer *t)
{
    t->dit->ctx.dev->reserved_units = 0;
    t->aside.running = false;
}

int trainer_flush(struct trainer *t)
{
    if (!t->aside.due)
        return 0;
    TRY(update_all(t, &t->update));
    return nothing_due(t);
}

// ---- the end of a step --------------------------------------------------------------------------

int optimiser_commit(struct trainer *t)
{
    TRY(commit_rest(t));
    TRY(tensor_zero(&t->dit->ctx, &t->update));
    TRY(nothing_due(t));
    return aside_commit(t);
}

int trainer_apply(struct trainer *t)
{
    if (t->options.early) // the blocks are done
        return trainer_update_block(t, -1);
    TRY(judge(t));
    return update_all(t, &t->control);
}

int optimiser_step(struct trainer *t)
{
    if (!t->aside.on)
        return trainer_apply(t);
    TRY(judge(t));
    return tensor_copy(&t->dit->ctx, &t->update, &t->control);
}
