#include "model/train_move.h"

#include <stdlib.h>

#include "model/train_ranks.h"

enum { PARTS = 4 };

static struct weights *part_of(struct dit *d, int i)
{
    struct weights *const parts[PARTS] = {&d->w, &d->ema, &d->m, &d->v};
    return parts[i];
}

// Parameters of the network whose values a rank has: all with a place here, in each part that has
// them.
static bool has(const struct param *p, int part)
{
    return p->start != PARAM_ELSEWHERE && (part == 0 || !p->frozen);
}

// The values of every parameter held here, [PARTS, parameters], NULL where there are none.
struct held {
    int count;
    float **values;
};

static void held_free(struct held *h)
{
    for (int i = 0; h->values && i < PARTS * h->count; i++)
        free(h->values[i]);
    free(h->values);
    *h = (struct held){0};
}

static int held_read(struct dit *d, struct held *h)
{
    h->count = d->params.count;
    h->values = calloc((size_t)PARTS * (size_t)h->count, sizeof *h->values);
    if (!h->values)
        return fail(ERR_NOMEM, "no host memory to move experts");
    for (int part = 0; part < PARTS; part++)
        for (int i = 0; i < h->count; i++) {
            const struct param *p = &d->params.list[i];
            float **values = &h->values[part * h->count + i];
            if (!has(p, part))
                continue;
            *values = malloc((size_t)param_count(p) * sizeof **values);
            if (!*values)
                return fail(ERR_NOMEM, "no host memory for %s while experts move", p->name);
            TRY(param_read(&d->ctx, part_of(d, part), p, *values));
        }
    return 0;
}

// ---- to the new holders -------------------------------------------------------------------------

static int first_holder(const struct placement *p, const struct param *q)
{
    int r = 0;
    if (q->expert == NO_EXPERT)
        return 0;
    while (!placement_holds(p, r, q->block, q->expert, NULL))
        r++;
    return r;
}

// Sends an expert's values to who gets it and had it not, from its first holder; *values come in
// where this rank is one of them.
static int travel(const struct placement *from, const struct dit_ranks *to, const struct param *p,
                  struct transfers *t, float **values)
{
    const size_t bytes = (size_t)param_count(p) * sizeof **values;
    const int rank = exchange_rank(to->exchange), source = first_holder(from, p);
    for (int r = 0; r < from->ranks; r++) {
        if (!placement_holds(to->placement, r, p->block, p->expert, NULL) ||
            placement_holds(from, r, p->block, p->expert, NULL))
            continue;
        if (rank == source)
            TRY(exchange_send(t, *values, bytes, r, 0));
        if (rank != r)
            continue;
        *values = malloc(bytes);
        if (!*values)
            return fail(ERR_NOMEM, "no host memory for %s, which moves here", p->name);
        TRY(exchange_receive(t, *values, bytes, source, 0));
    }
    return exchange_wait(t);
}

static int held_write(struct dit *d, const struct placement *from, const struct dit_ranks *to,
                      struct transfers *t, struct held *h)
{
    for (int part = 0; part < PARTS; part++)
        for (int i = 0; i < h->count; i++) {
            const struct param *p = &d->params.list[i];
            float **values = &h->values[part * h->count + i];
            exchange_doing(to->exchange, "moving experts", p->block);
            if (p->expert != NO_EXPERT)
                TRY(travel(from, to, p, t, values));
            if (has(p, part))
                TRY(param_write(&d->ctx, part_of(d, part), p, *values));
            free(*values);
            *values = NULL;
        }
    return 0;
}

// ---- the move -----------------------------------------------------------------------------------

// A trainer like `old`, which is freed, without its state.
static int make_again(struct trainer **t, const struct dit_ranks *to)
{
    struct trainer *old = *t;
    struct train_options o = old->options;
    const struct config config = old->dit->config;
    struct device *dev = old->dit->ctx.dev;
    struct stream *stream = old->dit->ctx.stream;
    o.ranks = to;
    BUG_IF(to->placement->share[exchange_rank(to->exchange)] != o.batch);
    trainer_free(old);
    *t = NULL;
    TRY(trainer_new(dev, stream, &config, &o, t));
    return trainer_commit(*t);
}

static int move(struct trainer **t, const struct dit_ranks *to, struct transfers *transfers,
                struct held *h)
{
    const struct placement *from = (*t)->options.ranks->placement;
    const int64_t step = (*t)->step;
    int32_t applied, skipped;
    TRY(trainer_counts(*t, &applied, &skipped));
    TRY(held_read((*t)->dit, h));
    TRY(make_again(t, to));
    TRY(held_write((*t)->dit, from, to, transfers, h));
    return trainer_restore(*t, step, applied, skipped);
}

int trainer_move(struct trainer **t, const struct dit_ranks *to)
{
    struct transfers *transfers;
    struct held h = {0};
    if (reduction_idle((*t)->dit->options.ranks->placement)) // whose weights are old
        TRY(trainer_agree(*t));
    TRY(transfers_new(to->exchange, &transfers));
    int code = move(t, to, transfers, &h);
    held_free(&h);
    transfers_free(transfers);
    if (code < 0) {
        trainer_free(*t);
        *t = NULL;
    }
    return code;
}

// ---- copies that agree --------------------------------------------------------------------------

static bool holds(const struct placement *p, int rank, const struct param *q)
{
    return q->expert == NO_EXPERT || placement_holds(p, rank, q->block, q->expert, NULL);
}

// One parameter's values from its first holder to the others.
static int share(struct dit *d, struct weights *part, const struct param *p, struct transfers *t,
                 float *host)
{
    const struct dit_ranks *ranks = d->options.ranks;
    const size_t bytes = (size_t)param_count(p) * sizeof *host;
    const int rank = exchange_rank(ranks->exchange), first = first_holder(ranks->placement, p);
    if (!holds(ranks->placement, rank, p))
        return 0;
    if (rank != first) {
        TRY(exchange_receive(t, host, bytes, first, 0));
        TRY(exchange_wait(t));
        return param_write(&d->ctx, part, p, host);
    }
    TRY(param_read(&d->ctx, part, p, host));
    for (int r = first + 1; r < ranks->placement->ranks; r++)
        if (holds(ranks->placement, r, p))
            TRY(exchange_send(t, host, bytes, r, 0));
    return exchange_wait(t);
}

int trainer_agree(struct trainer *t)
{
    struct dit *d = t->dit;
    struct transfers *transfers;
    int64_t largest = 0;
    if (!d->options.ranks)
        return 0;
    for (int i = 0; i < d->params.count; i++)
        if (param_count(&d->params.list[i]) > largest)
            largest = param_count(&d->params.list[i]);
    float *host = malloc((size_t)largest * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for a parameter of %lld floats", (long long)largest);
    int code = transfers_new(d->options.ranks->exchange, &transfers);
    exchange_doing(d->options.ranks->exchange, "bringing copies of weights together", -1);
    for (int part = 0; part < PARTS && code >= 0; part++)
        for (int i = 0; i < d->params.count && code >= 0; i++)
            if (!d->params.list[i].frozen)
                code = share(d, part_of(d, part), &d->params.list[i], transfers, host);
    transfers_free(transfers);
    free(host);
    return code;
}
