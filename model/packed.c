// Packed copies of the weights, for models whose weights stay as they are from one forward pass to
// the next: products on CPU devices read B in panels, and packing it anew costs a part of every
// step.
#include "model/dit.h"

#include <stdlib.h>

// Calls `visit` for every weight that the forward pass multiplies by.
typedef int (*weight_visitor)(struct dit *d, struct tensor *w, void *user);

static int visit_weights(struct dit *d, weight_visitor visit, void *user)
{
    struct weights *w = &d->w;
    struct tensor *outer[] = {&w->patch_w, &w->t0_w, &w->t2_w, &w->ada_w, &w->final_w};
    for (size_t i = 0; i < sizeof outer / sizeof *outer; i++)
        TRY(visit(d, outer[i], user));
    for (int l = 0; l < d->config.layers; l++) {
        struct block_weights *b = &w->blocks[l];
        struct tensor *inner[] = {&b->qkv_w,     &b->proj_w,      &b->gate_w,
                                  &b->experts_gu, &b->shared_gu, &b->shared_down, &b->experts_down,
                                  &b->fc1_w,      &b->fc2_w};
        for (size_t i = 0; i < sizeof inner / sizeof *inner; i++)
            if (inner[i]->ndim && !inner[i]->home)
                TRY(visit(d, inner[i], user));
    }
    return 0;
}

struct total {
    uint64_t bytes;
    int count;
};

static size_t packed_bytes(const struct dit *d, const struct tensor *w)
{
    const size_t bytes = op_packed_bytes(&d->ctx, w);
    return bytes <= d->ctx.dev->info.max_alloc ? bytes : 0;
}

static int add_up(struct dit *d, struct tensor *w, void *user)
{
    struct total *t = user;
    const size_t bytes = packed_bytes(d, w), align = d->ctx.dev->info.align;
    if (bytes == 0)
        return 0;
    t->bytes += (bytes + align - 1) / align * align;
    t->count++;
    return 0;
}

static int plan_copy(struct dit *d, struct tensor *w, void *user)
{
    const size_t bytes = packed_bytes(d, w);
    (void)user;
    if (bytes == 0)
        return 0;
    w->packed = &d->packed[d->packed_count++];
    return PLAN_TENSOR(d->plan, "packed", PLAN_PACKED, F32, 0, PLAN_FOREVER, &w->packed->copy,
                       (int64_t)(bytes / sizeof(float)));
}

int packed_plan(struct dit *d)
{
    struct total total = {0};
    TRY(visit_weights(d, add_up, &total));
    if (total.count == 0 || d->packed || !plan_has_room(d->plan, d->options.limit, total.bytes))
        return 0;
    d->packed = calloc((size_t)total.count, sizeof *d->packed);
    if (!d->packed)
        return fail(ERR_NOMEM, "no host memory for the places of %d weights", total.count);
    TRY(visit_weights(d, plan_copy, NULL));
    return plan_layout(d->plan, d->options.limit);
}
