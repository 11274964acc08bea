// The optimiser's pass over all parameters: gradient norm, then AdamW and EMA, one launch for each
// slab of memory that holds parameters of one kind.
#include "model/train_ranks.h"

#include <stdlib.h>

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

// Where products read bf16, those weights are the first part of each slab, in two halves; the f32
// ones are the rest.
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

// ---- the parts of the gradients -----------------------------------------------------------------

static int add_span(struct trainer *t, const struct tensor *slab, int64_t from, int64_t to)
{
    const int64_t count = to - from;
    return count > 0 ? plan_view(t->dit->plan, slab, from, &t->spans[t->span_count++], 1, &count) : 0;
}

// Finds what lies between the experts' gradients, whose norms their products leave (dit.norms); a
// block's two lie beside each other.
static int find_spans(struct trainer *t)
{
    struct dit *d = t->dit;
    const struct tensor *slab;
    int64_t at = 0, start, end, next;
    if (!d->norms.ndim || plan_slabs(d->plan, PLAN_GRADIENTS, &slab) != 1)
        return 0;
    TRY(tensor_zero(&d->ctx, &d->norms));
    t->spans = calloc((size_t)d->config.layers + 1, sizeof *t->spans);
    if (!t->spans)
        return fail(ERR_NOMEM, "no host memory for %d blocks", d->config.layers);
    for (int l = 0; l < d->config.layers; l++) {
        const struct block_weights *g = &d->g.blocks[l];
        if (!d->grads[l].norms_gu.ndim)
            continue;
        plan_place(d->plan, &g->experts_gu, &start, &end);
        BUG_IF(start < at);
        TRY(add_span(t, slab, at, start));
        plan_place(d->plan, &g->experts_down, &next, &at);
        BUG_IF(next != end);
    }
    return add_span(t, slab, at, tensor_count(slab));
}

int optimiser_commit(struct trainer *t)
{
    struct plan *p = t->dit->plan;
    if (!t->options.early)
        TRY(find_spans(t));
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

static int update(struct trainer *t, struct span s)
{
    return op_adamw(&t->dit->ctx, &s.w, &s.m, &s.v, &s.ema, &s.g, &t->control,
                    s.low.ndim ? &s.low : NULL, &t->options.adamw);
}

// One launch for each slab, or part of a slab, of weights of one kind.
static int update_all(struct trainer *t)
{
    struct dit *d = t->dit;
    const struct tensor *g;
    const int n = plan_slabs(d->plan, PLAN_GRADIENTS, &g);
    if (d->half) {
        struct span rest = plain_span(d->plan, 0);
        rest.m = t->rest[0], rest.v = t->rest[1], rest.ema = t->rest[2], rest.g = t->rest[3];
        TRY(update(t, half_span(d->plan)));
        return update(t, rest);
    }
    for (int i = 0; i < n; i++)
        TRY(update(t, plain_span(d->plan, i)));
    return 0;
}

// Norm of all gradients, and from it and the losses what the step is to do.
static int judge(struct trainer *t)
{
    struct context *c = &t->dit->ctx;
    const struct tensor *g;
    const int n = t->spans ? t->span_count : plan_slabs(t->dit->plan, PLAN_GRADIENTS, &g);
    if (t->reduction) {
        TRY(reduction_finish(t));
        return op_adamw_control(c, &t->control, &t->counts, &t->mean, &t->options.adamw);
    }
    for (int i = 0; i < n; i++)
        TRY(op_norm2(c, &t->control, t->spans ? &t->spans[i] : &g[i], i > 0 || t->dit->streamed));
    if (t->spans)
        TRY(op_norm2(c, &t->control, &t->dit->norms, true));
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
        if (p->block != layer || p->frozen || p->start != 0)
            continue;
        struct tensor *w = param_tensor(&d->w, p), *g = param_tensor(&d->g, p);
        TRY(op_norm2(c, &t->control, g, true));
        TRY(op_adamw_guard(c, &t->control, &t->counts));
        TRY(op_adamw(c, w, param_tensor(&d->m, p), param_tensor(&d->v, p), param_tensor(&d->ema, p),
                     g, &t->control, w->low, &t->options.adamw));
    }
    return 0;
}

// ---- the end of a step --------------------------------------------------------------------------

int trainer_apply(struct trainer *t)
{
    if (t->options.early) // the blocks are done
        return trainer_update_block(t, -1);
    TRY(judge(t));
    if (reduction_nothing(t->reduction))
        return 0;
    TRY(update_all(t));
    return streamed_update(t->dit, &t->control, &t->options.adamw);
}
