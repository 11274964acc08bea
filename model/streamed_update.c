// The optimiser's pass over experts at home in host memory: parts of fixed size come in, are
// updated and go out, two at a time, the road used in both directions at once.
#include "model/streamed_internal.h"

static bool in_update(struct dit *d, int part)
{
    return streamed_part(d, (enum part)part) != NULL;
}

int streamed_plan_update(struct dit *d)
{
    struct streamed *s = d->streamed;
    const int end = time_backward(d, -1, PHASES); // beside the gradients of other weights
    int64_t count = 0;
    for (int l = 0; l < d->config.layers; l++)
        count = s->blocks[l].count > count ? s->blocks[l].count : count;
    if (count > UPDATE_CHUNK)
        count = UPDATE_CHUNK;
    for (int k = 0; k < TURNS; k++)
        for (int part = 0; part < PARTS; part++) {
            const bool half = d->half && part <= PART_LOW;
            if (in_update(d, part))
                TRY(PLAN_TENSOR(d->plan, "update of experts", PLAN_ACTIVATIONS, half ? BF16 : F32,
                                end, end, &s->update[k].at[part], count));
        }
    return 0;
}

int streamed_commit_update(struct dit *d)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    for (int k = 0; k < TURNS; k++) {
        TRY(api->event_new(d->ctx.dev, &s->update[k].full));
        TRY(api->event_new(d->ctx.dev, &s->update[k].done));
        TRY(api->event_new(d->ctx.dev, &s->update[k].gone));
    }
    TRY(api->event_new(d->ctx.dev, &s->update_began));
    return api->event_new(d->ctx.dev, &s->update_ended);
}

void streamed_free_update(struct streamed *s, const struct backend *api)
{
    for (int k = 0; k < TURNS; k++) {
        api->event_free(s->update[k].full), api->event_free(s->update[k].done);
        api->event_free(s->update[k].gone);
    }
    api->event_free(s->update_began), api->event_free(s->update_ended);
}

// Elements from..from+count of a block through buffer k.
static int update_part(struct dit *d, int layer, int64_t from, int64_t count, int k,
                       struct tensor *control, const struct adamw *how)
{
    struct streamed *s = d->streamed;
    struct context *c = &d->ctx;
    const struct backend *api = c->dev->api;
    struct update_buffer *u = &s->update[k];
    struct tensor now[PARTS];
    TRY(api->wait(s->in, u->gone));
    for (int part = 0; part < PARTS; part++) {
        now[part] = u->at[part];
        if (!in_update(d, part))
            continue;
        const size_t size = dtype_size(now[part].dtype);
        now[part].shape[0] = count;
        TRY(api->write_begin(s->in, now[part].mem, 0,
                             s->blocks[layer].gu[part].at + (size_t)from * size,
                             (size_t)count * size));
    }
    TRY(api->record(s->in, u->full));
    TRY(api->wait(c->stream, u->full));
    TRY(op_adamw(c, &now[PART_WEIGHT], &now[PART_MOMENT1], &now[PART_MOMENT2], &now[PART_EMA],
                 &now[PART_GRADIENT], control, d->half ? &now[PART_LOW] : NULL, how));
    TRY(api->record(c->stream, u->done));
    TRY(api->wait(s->out, u->done));
    for (int part = 0; part < PARTS; part++) {
        const size_t size = dtype_size(now[part].dtype);
        if (in_update(d, part) && part != PART_GRADIENT)
            TRY(api->read_begin(s->out, now[part].mem, 0,
                                s->blocks[layer].gu[part].at + (size_t)from * size,
                                (size_t)count * size));
    }
    return api->record(s->out, u->gone);
}

int streamed_update(struct dit *d, struct tensor *control, const struct adamw *how)
{
    struct streamed *s = d->streamed;
    struct context *c = &d->ctx;
    const struct backend *api = c->dev->api;
    int turn = 0;
    if (!s)
        return 0;
    TRY(api->record(c->stream, s->update_began));
    TRY(api->wait(s->in, s->free));    // the buffers lie where activations were
    TRY(api->wait(s->in, s->settled)); // gradients
    for (int l = d->config.layers - 1; l >= 0; l--) {
        struct streamed_block *b = &s->blocks[l];
        for (int64_t from = 0; b->here && from < b->count; from += UPDATE_CHUNK, turn ^= 1)
            TRY(update_part(d, l, from,
                            b->count - from < UPDATE_CHUNK ? b->count - from : UPDATE_CHUNK, turn,
                            control, how));
        b->gu[PART_WEIGHT].version++;
    }
    TRY(api->record(s->out, s->settled));
    TRY(api->wait(c->stream, s->settled)); // so whoever waits for the device finds all at home
    TRY(api->wait(s->in, s->settled));
    TRY(api->record(c->stream, s->update_ended));
    s->updated = true;
    return 0;
}
