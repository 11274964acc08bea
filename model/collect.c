#include "model/collect.h"

static int move(struct exchange *x, float *host, size_t bytes, int peer, bool send)
{
    struct transfers *t;
    TRY(transfers_new(x, &t));
    int code =
        send ? exchange_send(t, host, bytes, peer, 0) : exchange_receive(t, host, bytes, peer, 0);
    if (code >= 0)
        code = exchange_wait(t);
    transfers_free(t);
    return code;
}

// The first rank that holds an expert's copy.
static int holder(const struct placement *p, const struct param *q)
{
    int r = 0;
    while (r < p->ranks && !placement_holds(p, r, q->block, q->expert, NULL))
        r++;
    BUG_IF(r == p->ranks);
    return r;
}

int collect_param(struct dit *d, struct weights *from, const struct param *p, float *host)
{
    const struct dit_ranks *ranks = d->options.ranks;
    const size_t bytes = (size_t)param_count(p) * sizeof *host;
    if (!ranks)
        return param_read(&d->ctx, from, p, host);
    const int rank = exchange_rank(ranks->exchange);
    const int first = p->expert == NO_EXPERT ? 0 : holder(ranks->placement, p);
    if (rank == first)
        TRY(param_read(&d->ctx, from, p, host));
    if (first == 0 || (rank != first && rank != 0))
        return 0;
    exchange_doing(ranks->exchange, "bringing a checkpoint together", p->block);
    return move(ranks->exchange, host, bytes, rank == 0 ? first : 0, rank == first);
}
