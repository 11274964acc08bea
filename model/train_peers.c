// The reduction of train_ranks.h where ranks have peer windows: no host in it, so that a step is
// recorded like one rank's.
//
// Of every gradient that all ranks have, each rank adds up a slice: when all have computed a
// block's gradients, it copies the others' parts of its slice here, adds them to its own in the
// order of ranks, and copies the sums to where the others have them. Copies are the copy engines'
// work and go on, on a stream of their own, beside the backward pass, of which only the additions
// take a little. A slice is added up by one rank, so all have the same bits.
#include "model/train_peers.h"

#include <stdlib.h>
#include <string.h>

#include "model/moe_exchange.h"
#include "runtime/ops.h"

enum { CHUNK = 4 << 20, UNIT = 1024 }; // floats: added up at a time; slices are multiples of

// A gradient tensor that all ranks have.
struct piece {
    const struct tensor *gradient;
    int block, number;   // as a window
    int64_t from, count; // this rank's slice
    struct tensor *mine; // [chunks] views of it
    int chunks;
};

// Gradients that lie beside each other, for the norm.
struct span {
    int64_t start, end; // of the slab
    bool experts;
    struct tensor part;
};

struct peer_sums {
    struct peer_windows *windows;
    struct stream *stream;
    struct event *start, *done;
    struct piece *pieces;
    int count;
    struct span *spans;
    int span_count;
    struct tensor scratch; // [CHUNK] or less
    struct tensor all;     // [ranks,2] window: norms and losses
    int all_number;
    bool begun; // something was put on the stream since the last join
};

// ---- the plan -----------------------------------------------------------------------------------

static bool has_copies(const struct placement *p, const struct param *q)
{
    int holders = 0;
    for (int r = 0; r < p->ranks && q->expert != NO_EXPERT; r++)
        holders += placement_holds(p, r, q->block, q->expert, NULL);
    return holders > 1;
}

static int list_pieces(struct trainer *t, struct peer_sums *s)
{
    struct params *all = &t->dit->params;
    const struct placement *place = t->options.ranks->placement;
    s->pieces = calloc((size_t)all->count, sizeof *s->pieces);
    s->spans = calloc((size_t)all->count, sizeof *s->spans);
    if (!s->pieces || !s->spans)
        return fail(ERR_NOMEM, "no host memory for %d parameters", all->count);
    for (int i = 0; i < all->count; i++) {
        const struct param *p = &all->list[i];
        if (has_copies(place, p))
            return fail(ERR_INPUT,
                        "peer windows are for experts that one rank has: this placement has "
                        "copies, use --fabric nccl or mpi");
        if (p->frozen || p->expert != NO_EXPERT || p->start != 0)
            continue;
        const struct tensor *gradient = param_tensor(&t->dit->g, p);
        if (embed_gathers(t->dit, gradient))
            continue;
        struct piece *piece = &s->pieces[s->count++];
        *piece = (struct piece){.gradient = gradient, .block = p->block};
        piece->number = peer_windows_add(s->windows, PLAN_GRADIENTS, piece->gradient);
        TRY(piece->number);
    }
    return 0;
}

int peer_sums_new(struct trainer *t, struct peer_windows *windows, struct peer_sums **out)
{
    struct plan *plan = t->dit->plan;
    struct device *dev = t->dit->ctx.dev;
    const int ranks = peer_windows_ranks(windows);
    struct peer_sums *s = *out = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "no host memory for sums over ranks");
    s->windows = windows;
    plan_share(plan, PLAN_GRADIENTS);
    TRY(list_pieces(t, s));
    TRY(PLAN_TENSOR(plan, "part of a sum", PLAN_INPUT, F32, 0, PLAN_FOREVER, &s->scratch, CHUNK));
    TRY(PLAN_TENSOR(plan, "sums of ranks", PLAN_WINDOWS, F32, 0, PLAN_FOREVER, &s->all, ranks, 2));
    s->all_number = peer_windows_add(windows, PLAN_WINDOWS, &s->all);
    TRY(s->all_number);
    TRY(peer_stream(dev, &s->stream));
    TRY(dev->api->event_new(dev, &s->start));
    return dev->api->event_new(dev, &s->done);
}

void peer_sums_free(struct trainer *t, struct peer_sums *s)
{
    if (!s)
        return;
    const struct backend *api = t->dit->ctx.dev->api;
    if (s->stream)
        api->stream_free(s->stream);
    if (s->start)
        api->event_free(s->start);
    if (s->done)
        api->event_free(s->done);
    for (int i = 0; i < s->count; i++)
        free(s->pieces[i].mine);
    free(s->pieces), free(s->spans);
    free(s);
}

// ---- when the memory is there -------------------------------------------------------------------

// The slice of a piece that a rank adds up.
static int64_t slice_of(int64_t count, int rank, int ranks, int64_t *from)
{
    const int64_t each = (count + ranks - 1) / ranks, whole = (each + UNIT - 1) / UNIT * UNIT;
    *from = whole * rank < count ? whole * rank : count;
    return *from + whole < count ? whole : count - *from;
}

static int cut(struct trainer *t, const struct peer_sums *s, struct piece *p)
{
    const int rank = peer_windows_rank(s->windows), ranks = peer_windows_ranks(s->windows);
    p->count = slice_of(tensor_count(p->gradient), rank, ranks, &p->from);
    p->chunks = (int)((p->count + CHUNK - 1) / CHUNK);
    p->mine = calloc((size_t)p->chunks + 1, sizeof *p->mine);
    if (!p->mine)
        return fail(ERR_NOMEM, "no host memory for parts of gradients");
    for (int k = 0; k < p->chunks; k++) {
        const int64_t at = (int64_t)k * CHUNK, left = p->count - at;
        const int64_t count = left < CHUNK ? left : CHUNK;
        TRY(plan_view(t->dit->plan, p->gradient, p->from + at, &p->mine[k], 1, &count));
    }
    return 0;
}

static int by_start(const void *a, const void *b)
{
    const struct span *x = a, *y = b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static int list_spans(struct trainer *t, struct peer_sums *s)
{
    struct params *all = &t->dit->params;
    const struct tensor *slab;
    int found = 0;
    BUG_IF(plan_slabs(t->dit->plan, PLAN_GRADIENTS, &slab) != 1);
    for (int i = 0; i < all->count; i++) {
        const struct param *p = &all->list[i];
        struct span *span = &s->spans[found];
        if (p->frozen || p->start != 0 || param_tensor(&t->dit->g, p)->home)
            continue;
        plan_place(t->dit->plan, param_tensor(&t->dit->g, p), &span->start, &span->end);
        span->experts = p->expert != NO_EXPERT;
        found++;
    }
    qsort(s->spans, (size_t)found, sizeof *s->spans, by_start);
    s->span_count = 0;
    for (int i = 0; i < found; i++) {
        struct span *last = &s->spans[s->span_count - (s->span_count > 0)];
        const struct span next = s->spans[i];
        if (s->span_count > 0 && last->end == next.start && last->experts == next.experts)
            last->end = next.end;
        else
            s->spans[s->span_count++] = next;
    }
    for (int i = 0; i < s->span_count; i++) {
        struct span *span = &s->spans[i];
        const int64_t count = span->end - span->start;
        TRY(plan_view(t->dit->plan, slab, span->start, &span->part, 1, &count));
    }
    return 0;
}

int peer_sums_commit(struct trainer *t, struct peer_sums *s)
{
    for (int i = 0; i < s->count; i++)
        TRY(cut(t, s, &s->pieces[i]));
    return list_spans(t, s);
}

// ---- sums ---------------------------------------------------------------------------------------

// The others' parts of this rank's slice, added to its own.
static int take(struct context *c, struct peer_sums *s, const struct piece *p)
{
    const int rank = peer_windows_rank(s->windows), ranks = peer_windows_ranks(s->windows);
    for (int k = 0; k < p->chunks; k++)
        for (int i = 1; i < ranks; i++) {
            const int from = (rank + i) % ranks;
            struct tensor part = s->scratch;
            part.shape[0] = p->mine[k].shape[0];
            TRY(c->dev->api->copy(
                c->stream, part.mem, 0, peer_windows_at(s->windows, p->number, from),
                (size_t)(p->from + (int64_t)k * CHUNK) * sizeof(float), tensor_bytes(&part)));
            TRY(op_add(c, &p->mine[k], &part));
        }
    return 0;
}

static int give(struct context *c, const struct peer_sums *s, const struct piece *p)
{
    const int rank = peer_windows_rank(s->windows), ranks = peer_windows_ranks(s->windows);
    const size_t at = (size_t)p->from * sizeof(float), bytes = (size_t)p->count * sizeof(float);
    for (int i = 1; i < ranks; i++)
        TRY(c->dev->api->copy(c->stream, peer_windows_at(s->windows, p->number, (rank + i) % ranks),
                              at, p->gradient->mem, at, bytes));
    return 0;
}

int peer_sums_block(struct trainer *t, struct peer_sums *s, int block)
{
    const struct context *main = &t->dit->ctx;
    struct context c = *main;
    TRY(peer_windows_meet(s->windows));
    if (s->stream) {
        c.stream = s->stream;
        TRY(c.dev->api->record(main->stream, s->start));
        TRY(c.dev->api->wait(s->stream, s->start));
    }
    TRY(peer_say(&c, s->windows, PEER_SUMS));
    TRY(peer_wait(&c, s->windows, PEER_SUMS, NULL));
    for (int i = 0; i < s->count; i++)
        if (s->pieces[i].block == block)
            TRY(take(&c, s, &s->pieces[i]));
    for (int i = 0; i < s->count; i++)
        if (s->pieces[i].block == block)
            TRY(give(&c, s, &s->pieces[i]));
    s->begun = true;
    return 0;
}

// The device's stream goes on when all sums are here.
static int join(struct trainer *t, struct peer_sums *s)
{
    struct context c = t->dit->ctx;
    struct stream *main = c.stream;
    if (!s->begun)
        return 0;
    if (s->stream)
        c.stream = s->stream;
    TRY(peer_say(&c, s->windows, PEER_SUMS));
    TRY(peer_wait(&c, s->windows, PEER_SUMS, NULL));
    s->begun = false;
    if (!s->stream)
        return 0;
    TRY(c.dev->api->record(s->stream, s->done));
    return c.dev->api->wait(main, s->done);
}

// Squares of this rank's experts' gradients, and of its share of those that all have.
static int add_norms(struct trainer *t, struct peer_sums *s, bool experts)
{
    const int rank = peer_windows_rank(s->windows), ranks = peer_windows_ranks(s->windows);
    int number = 0;
    for (int i = 0; i < s->span_count; i++) {
        const struct span *span = &s->spans[i];
        if (span->experts == experts && (experts || number++ % ranks == rank))
            TRY(op_norm2(&t->dit->ctx, &t->control, &span->part, true));
    }
    return 0;
}

int peer_sums_finish(struct trainer *t, struct peer_sums *s)
{
    struct context *c = &t->dit->ctx;
    const float images = (float)((double)t->all * t->options.accumulate);
    if (!t->dit->streamed) // else those of streamed experts were added up as they came
        TRY(c->dev->api->fill(c->stream, t->control.mem, CONTROL_NORM2 * sizeof(float),
                              sizeof(float), 0));
    TRY(add_norms(t, s, true));
    TRY(join(t, s));
    TRY(add_norms(t, s, false));
    return peer_total(c, s->windows, s->all_number, &s->all, &t->control, &t->losses, &t->mean,
                      1 / images);
}
