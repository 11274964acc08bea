// The roads between ranks. See calibrate.h.
#include "tools/calibrate.h"

#include <stdlib.h>
#include <string.h>

#include "tools/measure.h"

enum { LARGE = 8 << 20, ROUNDS = 7, TAG = 77, SMALL = 64 };

struct pair {
    struct exchange *x;
    struct device *dev;
    struct stream *stream;
    struct transfers *t;
    struct mem *mem;
    void *host;
};

static int open_pair(struct pair *p)
{
    p->host = malloc(LARGE);
    if (!p->host)
        return fail(ERR_NOMEM, "no host memory for %d bytes", LARGE);
    memset(p->host, 1, LARGE);
    TRY(p->dev->api->alloc(p->dev, LARGE, &p->mem));
    TRY(p->dev->api->write(p->stream, p->mem, 0, p->host, LARGE));
    return transfers_new(p->x, &p->t);
}

static void close_pair(struct pair *p)
{
    transfers_free(p->t);
    if (p->mem)
        p->dev->api->free(p->mem);
    free(p->host);
}

static int send_it(struct pair *p, int peer, size_t bytes, bool device)
{
    if (device)
        TRY(p->dev->api->read(p->stream, p->mem, 0, p->host, bytes));
    TRY(exchange_send(p->t, p->host, bytes, peer, TAG));
    return exchange_wait(p->t);
}

static int receive_it(struct pair *p, int peer, size_t bytes, bool device)
{
    TRY(exchange_receive(p->t, p->host, bytes, peer, TAG));
    TRY(exchange_wait(p->t));
    if (!device)
        return 0;
    TRY(p->dev->api->write(p->stream, p->mem, 0, p->host, bytes));
    return p->dev->api->sync(p->stream);
}

// There and back: half the median time of a round.
static int ping(struct pair *p, int peer, bool first, size_t bytes, bool device, double *seconds)
{
    double times[ROUNDS];
    for (int i = -2; i < ROUNDS; i++) {
        const double start = now_seconds();
        if (first)
            TRY(send_it(p, peer, bytes, device));
        TRY(receive_it(p, peer, bytes, device));
        if (!first)
            TRY(send_it(p, peer, bytes, device));
        if (i >= 0)
            times[i] = (now_seconds() - start) / 2;
    }
    *seconds = median_of(times, ROUNDS);
    return 0;
}

static int measure_road(struct pair *p, int peer, bool first, bool device, struct link_rate *out)
{
    double small, large;
    TRY(ping(p, peer, first, SMALL, device, &small));
    TRY(ping(p, peer, first, LARGE, device, &large));
    *out = (struct link_rate){small, LARGE / (large > small ? large - small : large), true};
    return 0;
}

struct found {
    char from[160], to[160];
    struct link_rate device, host;
};

// Rank a measures with b; the others wait. Everybody hears of it, rank 0 keeps it.
static int one_pair(struct pair *p, int a, int b, struct rates *rates)
{
    const int self = exchange_rank(p->x), ranks = exchange_ranks(p->x);
    struct found mine = {0}, *all = calloc((size_t)ranks, sizeof *all);
    int code = all ? exchange_barrier(p->x) : fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    if (code >= 0 && (self == a || self == b)) {
        code = measure_road(p, self == a ? b : a, self == a, true, &mine.device);
        if (code >= 0)
            code = measure_road(p, self == a ? b : a, self == a, false, &mine.host);
    }
    rates_identity(&p->dev->info, mine.from);
    if (code >= 0)
        code = exchange_gather(p->x, &mine, all, sizeof mine);
    if (code >= 0 && self == 0) {
        rates->staged = all[a].host;
        code = rates_put_link(rates, all[a].from, all[b].from, all[a].device);
        if (code >= 0)
            code = rates_put_link(rates, all[b].from, all[a].from, all[b].device);
    }
    free(all);
    return code;
}

int calibrate_pairs(struct exchange *x, struct device *dev, struct stream *stream,
                    struct rates *rates)
{
    struct pair p = {.x = x, .dev = dev, .stream = stream};
    int code = open_pair(&p);
    for (int a = 0; a < exchange_ranks(x); a++)
        for (int b = a + 1; b < exchange_ranks(x) && code >= 0; b++)
            code = one_pair(&p, a, b, rates);
    close_pair(&p);
    return code;
}
