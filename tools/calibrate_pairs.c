// The roads between ranks. See calibrate.h.
#include "tools/calibrate.h"

#include <stdlib.h>

#include "runtime/window.h"
#include "tools/measure.h"

enum { LARGE = 8 << 20, STRAIGHT = 64 << 20, ROUNDS = 7, TAG = 77, SMALL = 64 };
enum { PIECE = 512 << 10 }; // of an expert's rows from one rank, about

struct pair {
    struct exchange *x;
    struct roads *roads;
    struct device *dev;
    struct stream *stream;
    struct transfers *t;
    struct window *window;
    struct mem *mem, *other;
    char said, heard;
};

static int open_pair(struct pair *p)
{
    const size_t bytes = p->roads ? STRAIGHT : LARGE;
    TRY(p->dev->api->alloc(p->dev, bytes, &p->mem));
    TRY(p->dev->api->alloc(p->dev, bytes, &p->other));
    TRY(p->dev->api->fill(p->stream, p->mem, 0, bytes, 0));
    TRY(p->dev->api->fill(p->stream, p->other, 0, bytes, 0));
    TRY(window_open(p->x, p->dev, p->stream, LARGE, &p->window));
    return transfers_new(p->x, &p->t);
}

static void close_pair(struct pair *p)
{
    transfers_free(p->t);
    window_close(p->window);
    if (p->mem)
        p->dev->api->free(p->mem);
    if (p->other)
        p->dev->api->free(p->other);
}

static size_t piece_of(size_t bytes, size_t at)
{
    return bytes - at < PIECE ? bytes - at : PIECE;
}

// As rows of experts go, one after the other (model/moe_exchange.c): by a window, where the peer's
// is seen, or by messages.
static int send_it(struct pair *p, int peer, size_t bytes, bool device)
{
    const bool seen = window_of(p->window, peer) != NULL && device;
    if (device) {
        TRY(window_after(p->window));
        for (size_t at = 0; at < bytes; at += PIECE)
            TRY(window_take(p->window, p->mem, at, at, piece_of(bytes, at)));
        TRY(window_done(p->window));
    }
    const void *from = seen ? (void *)&p->said : window_of(p->window, exchange_rank(p->x));
    TRY(exchange_send(p->t, from, seen ? 1 : bytes, peer, TAG));
    return exchange_wait(p->t);
}

static int receive_it(struct pair *p, int peer, size_t bytes, bool device)
{
    const int self = exchange_rank(p->x);
    const bool seen = window_of(p->window, peer) != NULL && device;
    void *to = seen ? (void *)&p->heard : window_of(p->window, self);
    TRY(exchange_receive(p->t, to, seen ? 1 : bytes, peer, TAG));
    TRY(exchange_wait(p->t));
    if (!device)
        return 0;
    for (size_t at = 0; at < bytes; at += PIECE)
        TRY(window_give(p->window, seen ? peer : self, at, p->other, at, piece_of(bytes, at)));
    return p->dev->api->sync(p->stream);
}

// Both ways at once.
static int swap_straight(struct pair *p, int peer, size_t bytes)
{
    TRY(roads_begin(p->roads, LANE_ROWS));
    TRY(roads_receive(p->roads, LANE_ROWS, p->other, 0, bytes, peer));
    TRY(roads_send(p->roads, LANE_ROWS, p->mem, 0, bytes, peer));
    TRY(roads_end(p->roads, LANE_ROWS));
    TRY(roads_join(p->roads, LANE_ROWS));
    return p->dev->api->sync(p->stream);
}

static int time_straight(struct pair *p, int peer, size_t bytes, double *seconds)
{
    double times[ROUNDS];
    for (int i = -2; i < ROUNDS; i++) {
        const double start = now_seconds();
        TRY(swap_straight(p, peer, bytes));
        if (i >= 0)
            times[i] = now_seconds() - start;
    }
    *seconds = median_of(times, ROUNDS);
    return 0;
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

static int measure_straight(struct pair *p, int peer, struct link_rate *out)
{
    double small, large;
    TRY(time_straight(p, peer, SMALL, &small));
    TRY(time_straight(p, peer, STRAIGHT, &large));
    *out = (struct link_rate){.latency = small,
                              .bandwidth = STRAIGHT / (large > small ? large - small : large),
                              .staged = false};
    return 0;
}

static int measure_road(struct pair *p, int peer, bool first, bool device, struct link_rate *out)
{
    double small, large;
    if (device && roads_straight(p->roads, peer))
        return measure_straight(p, peer, out);
    TRY(ping(p, peer, first, SMALL, device, &small));
    TRY(ping(p, peer, first, LARGE, device, &large));
    *out = (struct link_rate){.latency = small,
                              .bandwidth = LARGE / (large > small ? large - small : large),
                              .staged = true};
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

int calibrate_pairs(struct exchange *x, struct roads *roads, struct device *dev,
                    struct stream *stream, struct rates *rates)
{
    struct pair p = {.x = x, .roads = roads, .dev = dev, .stream = stream};
    int code = open_pair(&p);
    for (int a = 0; a < exchange_ranks(x); a++)
        for (int b = a + 1; b < exchange_ranks(x) && code >= 0; b++)
            code = one_pair(&p, a, b, rates);
    close_pair(&p);
    return code;
}
