#include "model/train_ranks.h"

#include <stdlib.h>
#include <string.h>

#include "model/train_peers.h"
#include "runtime/ops.h"
#include "runtime/rng.h"
#include "runtime/window.h"

// A gradient that several ranks have a part of: a whole tensor, or one expert's part of it.
struct piece {
    const struct param *param;
    struct tensor *gradient;
    int64_t start, count;
    bool straight;      // summed by the devices' own road (runtime/roads.h); else by way of `host`
    size_t at;          // in `host`, floats; the same on all ranks
    const int *holders; // NULL: all ranks
    int holder_count;
};

struct reduction {
    struct exchange *exchange;
    struct roads *roads;
    struct peer_sums *peers; // where ranks have peer windows, which then do it all; or NULL
    struct transfers *transfers;
    // In the order of the backward pass: blocks descending, then the rest; of a block first what
    // all ranks have, which is the same list on each, then experts that some have.
    struct piece *pieces;
    int count, *holders; // the lists that pieces point into
    // Pieces that are not straight. Where all ranks see each other's, each device adds them up from
    // there; else MPI does, in it.
    struct window *host;
    int begun, taken;        // pieces from here to there are being taken, and are not yet summed
    struct tensor sum, part; // [CHUNK], where devices add up
    bool nothing; // this rank has neither images nor experts: it keeps out of sums and updates
    float *noise; // [N,C,S,S]
};

enum { CHUNK = 4 << 20 }; // floats that a device adds up at a time

// ---- what is shared -----------------------------------------------------------------------------

static int list_holders(const struct placement *p, int layer, int expert, int *list)
{
    int count = 0;
    for (int r = 0; r < p->ranks; r++)
        if (placement_holds(p, r, layer, expert, NULL))
            list[count++] = r;
    return count;
}

bool reduction_idle(const struct placement *p)
{
    bool idle = false;
    for (int r = 1; r < p->ranks; r++)
        idle = idle || placement_nothing(p, r);
    return idle;
}

static int list_busy(const struct placement *p, int *list)
{
    int count = 0;
    for (int r = 0; r < p->ranks; r++)
        if (!placement_nothing(p, r))
            list[count++] = r;
    return count;
}

// Adds a parameter's gradient if it is summed over all ranks, or over some.
static void add_piece(struct trainer *t, const struct param *p, bool all, size_t *at)
{
    struct reduction *r = t->reduction;
    const struct placement *place = t->options.ranks->placement;
    struct piece *piece = &r->pieces[r->count];
    *piece = (struct piece){.param = p, .gradient = param_tensor(&t->dit->g, p), .at = *at};
    int *list = r->holders + (size_t)r->count * (size_t)place->ranks;
    bool elsewhere = p->start == PARAM_ELSEWHERE;
    if (p->expert == NO_EXPERT) {
        if (p->start != 0 || !all) // a slice of a tensor that is there already
            return;
        piece->holder_count = list_busy(place, list);
        piece->holders = piece->holder_count < place->ranks ? list : NULL;
        piece->count = tensor_count(piece->gradient);
        elsewhere = r->nothing;
    } else {
        piece->holder_count = list_holders(place, p->block, p->expert, list);
        piece->holders = piece->holder_count < place->ranks ? list : NULL;
        if (piece->holder_count < 2 || all != !piece->holders)
            return;
        piece->start = p->start;
        piece->count = param_count(p);
    }
    piece->straight = !piece->holders && roads_all(r->roads);
    *at += piece->straight ? 0 : (size_t)piece->count;
    r->count += !elsewhere;
}

static int list_pieces(struct trainer *t)
{
    struct reduction *r = t->reduction;
    const struct params *all = &t->dit->params;
    const size_t ranks = (size_t)t->options.ranks->placement->ranks;
    size_t total = 0;
    r->pieces = calloc((size_t)all->count, sizeof *r->pieces);
    r->holders = calloc((size_t)all->count * ranks, sizeof *r->holders);
    if (!r->pieces || !r->holders)
        return fail(ERR_NOMEM, "no host memory for %d parameters", all->count);
    for (int l = t->dit->config.layers - 1; l >= -1; l--)
        for (int i = 0; i < 2 * all->count; i++) {
            const struct param *p = &all->list[i % all->count];
            if (p->block == l && !p->frozen)
                add_piece(t, p, i < all->count, &total);
        }
    for (int i = 0; i < r->count; i++)
        if (r->pieces[i].gradient->home)
            return fail(
                ERR_INPUT,
                "expert %d of block %d lives in the host memory of a rank and has copies on "
                "others: in training only experts without copies can be streamed",
                r->pieces[i].param->expert, r->pieces[i].param->block);
    TRY(window_open(r->exchange, t->dit->ctx.dev, t->dit->ctx.stream, total * sizeof(float),
                    &r->host));
    if (total == 0 || !window_all(r->host))
        return 0;
    TRY(PLAN_TENSOR(t->dit->plan, "sum", PLAN_INPUT, F32, 0, PLAN_FOREVER, &r->sum,
                    total < CHUNK ? (int64_t)total : CHUNK));
    return PLAN_TENSOR(t->dit->plan, "part of a sum", PLAN_INPUT, F32, 0, PLAN_FOREVER, &r->part,
                       r->sum.shape[0]);
}

int reduction_new(struct trainer *t)
{
    const struct dit_ranks *ranks = t->options.ranks;
    if (!ranks)
        return 0;
    struct reduction *r = t->reduction = calloc(1, sizeof *r);
    if (!r)
        return fail(ERR_NOMEM, "no host memory for a sum over ranks");
    r->exchange = ranks->exchange;
    r->roads = ranks->roads;
    r->nothing = placement_nothing(ranks->placement, exchange_rank(r->exchange));
    r->noise = malloc(tensor_bytes(&t->noise) + sizeof *r->noise);
    if (!r->noise)
        return fail(ERR_NOMEM, "no host memory for noise");
    TRY(PLAN_TENSOR(t->dit->plan, "mean loss", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->mean, 1));
    if (moe_windows(t->dit))
        return peer_sums_new(t, moe_windows(t->dit), &r->peers);
    TRY(list_pieces(t));
    return transfers_new(r->exchange, &r->transfers);
}

bool reduction_nothing(const struct reduction *r)
{
    return r && r->nothing;
}

int reduction_commit(struct trainer *t)
{
    struct reduction *r = t->reduction;
    return r && r->peers ? peer_sums_commit(t, r->peers) : 0;
}

int reduction_watched(const struct trainer *t)
{
    if (!t->reduction)
        return 0;
    exchange_doing(t->reduction->exchange, "at work", -1);
    return exchange_watched(t->reduction->exchange);
}

bool reduction_recorded(const struct trainer *t)
{
    return moe_exchange_recorded(t->dit) && (!t->reduction || t->reduction->peers);
}

void reduction_free(struct trainer *t)
{
    struct reduction *r = t->reduction;
    if (!r)
        return;
    peer_sums_free(t, r->peers);
    transfers_free(r->transfers);
    window_close(r->host);
    free(r->pieces), free(r->holders), free(r->noise);
    free(r);
}

// ---- sums ---------------------------------------------------------------------------------------

static int read_piece(struct trainer *t, const struct piece *p, float *to)
{
    struct context *c = &t->dit->ctx;
    return c->dev->api->read(c->stream, p->gradient->mem, (size_t)p->start * sizeof(float), to,
                             (size_t)p->count * sizeof(float));
}

// Sums what `layer` has on the straight road, as one step.
static int sum_straight(struct trainer *t, int layer)
{
    struct reduction *r = t->reduction;
    bool any = false;
    int code = 0;
    for (int i = 0; i < r->count && code >= 0; i++) {
        const struct piece *p = &r->pieces[i];
        if (!p->straight || p->param->block != layer)
            continue;
        if (!any)
            TRY(roads_begin(r->roads, LANE_SUMS));
        any = true;
        code = roads_sum(r->roads, LANE_SUMS, p->gradient->mem, (size_t)p->start * sizeof(float),
                         (size_t)p->count);
    }
    TRY(code);
    return any ? roads_end(r->roads, LANE_SUMS) : 0;
}

// Where MPI sums: waits for the copies that are under way and begins to sum them.
static int sum_taken(struct trainer *t)
{
    struct reduction *r = t->reduction;
    float *host = (float *)(void *)window_of(r->host, exchange_rank(r->exchange));
    if (r->begun == r->taken || window_all(r->host))
        return 0;
    TRY(window_done(r->host));
    while (r->begun < r->taken) {
        const struct piece *first = &r->pieces[r->begun];
        size_t count = 0;
        do
            count += (size_t)r->pieces[r->begun++].count;
        while (!first->holders && r->begun < r->taken && !r->pieces[r->begun].holders);
        TRY(exchange_sum_floats(r->transfers, host + first->at, count, first->holders,
                                first->holder_count));
    }
    return 0;
}

int reduction_block(void *trainer, int layer)
{
    struct trainer *t = trainer;
    struct reduction *r = t->reduction;
    if (t->micro + 1 < t->options.accumulate)
        return 0;
    if (r->peers)
        return peer_sums_block(t, r->peers, layer);
    exchange_doing(r->exchange, "summing gradients", layer);
    TRY(sum_straight(t, layer));
    TRY(sum_taken(t)); // of the block before, while the device was at this one
    int from = 0;
    while (from < r->count && (r->pieces[from].param->block != layer || r->pieces[from].straight))
        from++;
    if (from == r->count)
        return 0;
    TRY(window_after(r->host));
    r->begun = r->taken = from;
    for (; r->taken < r->count && r->pieces[r->taken].param->block == layer; r->taken++) {
        const struct piece *p = &r->pieces[r->taken];
        TRY(window_take(r->host, p->gradient->mem, (size_t)p->start * sizeof(float),
                        p->at * sizeof(float), (size_t)p->count * sizeof(float)));
    }
    return 0;
}

// Adds up [count] floats of a piece, from element `from`, on the device: what ranks hold, in their
// order, so that every rank gets the same bits.
static int add_up(struct trainer *t, const struct piece *p, int64_t from, int64_t count)
{
    struct reduction *r = t->reduction;
    struct context *c = &t->dit->ctx;
    const size_t at = (p->at + (size_t)from) * sizeof(float), bytes = (size_t)count * sizeof(float);
    const size_t own = (size_t)(p->start + from) * sizeof(float);
    const int ranks = p->holders ? p->holder_count : exchange_ranks(r->exchange);
    struct tensor sum = r->sum, part = r->part;
    sum.shape[0] = part.shape[0] = count;
    for (int i = 0; i < ranks; i++) {
        const int rank = p->holders ? p->holders[i] : i;
        const struct tensor *to = i ? &part : &sum;
        if (rank == exchange_rank(r->exchange))
            TRY(c->dev->api->copy(c->stream, to->mem, 0, p->gradient->mem, own, bytes));
        else
            TRY(window_give(r->host, rank, at, to->mem, 0, bytes));
        if (i)
            TRY(op_add(c, &sum, &part));
    }
    return c->dev->api->copy(c->stream, p->gradient->mem, own, sum.mem, 0, bytes);
}

static int write_back(struct trainer *t)
{
    struct reduction *r = t->reduction;
    const int rank = exchange_rank(r->exchange);
    const bool adds = window_all(r->host);
    TRY(roads_join(r->roads, LANE_SUMS));
    TRY(sum_taken(t));
    if (adds) {
        TRY(window_done(r->host));
        TRY(window_meet(r->host, r->transfers));
    }
    TRY(exchange_wait(r->transfers));
    for (int i = 0; i < r->count; i++) {
        const struct piece *p = &r->pieces[i];
        for (int64_t k = 0; k < p->count && adds && !p->straight; k += CHUNK)
            TRY(add_up(t, p, k, p->count - k < CHUNK ? p->count - k : CHUNK));
        if (!adds && !p->straight)
            TRY(window_give(r->host, rank, p->at * sizeof(float), p->gradient->mem,
                            (size_t)p->start * sizeof(float), (size_t)p->count * sizeof(float)));
    }
    return 0;
}

// ---- the norm -----------------------------------------------------------------------------------

// An expert that several ranks hold is counted by the first of them.
static bool counts_elsewhere(const struct reduction *r, const struct piece *p)
{
    const int first = p->holders ? p->holders[0] : 0;
    return p->param->expert != NO_EXPERT && first != exchange_rank(r->exchange);
}

// Are all experts of this tensor counted elsewhere?
static bool all_elsewhere(const struct reduction *r, const struct tensor *gradient)
{
    int64_t count = 0;
    for (int i = 0; i < r->count; i++)
        if (r->pieces[i].gradient == gradient && counts_elsewhere(r, &r->pieces[i]))
            count += r->pieces[i].count;
    return count == tensor_count(gradient);
}

// The squares of gradients that all ranks have, or of this rank's experts, added up on the device.
static int device_norm(struct trainer *t, bool experts, double *sum)
{
    struct dit *d = t->dit;
    bool any = false;
    float value = 0;
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const struct tensor *gradient = param_tensor(&d->g, p);
        if (p->frozen || p->start != 0 || (p->expert != NO_EXPERT) != experts || gradient->home ||
            (experts && all_elsewhere(t->reduction, gradient)))
            continue;
        TRY(op_norm2(&d->ctx, &t->control, gradient, any));
        any = true;
    }
    if (any)
        TRY(d->ctx.dev->api->read(d->ctx.stream, t->control.mem, CONTROL_NORM2 * sizeof value,
                                  &value, sizeof value));
    *sum = (double)value;
    return 0;
}

static int squares_of(struct trainer *t, const struct piece *p, double *sum)
{
    float *at = malloc((size_t)p->count * sizeof *at);
    if (!at)
        return fail(ERR_NOMEM, "no host memory for %lld gradients", (long long)p->count);
    const int code = read_piece(t, p, at);
    for (int64_t k = 0; k < p->count && code >= 0; k++)
        *sum += (double)at[k] * (double)at[k];
    free(at);
    return code;
}

// The squares of those experts' gradients that another rank counts, in tensors that hold others
// too, to be left out here.
static int counted_twice(struct trainer *t, double *sum)
{
    const struct reduction *r = t->reduction;
    *sum = 0;
    for (int i = 0; i < r->count; i++)
        if (counts_elsewhere(r, &r->pieces[i]) && !all_elsewhere(r, r->pieces[i].gradient))
            TRY(squares_of(t, &r->pieces[i], sum));
    return 0;
}

static int local_loss(struct trainer *t, double *sum)
{
    const size_t count = (size_t)tensor_count(&t->losses);
    *sum = 0;
    if (count == 0)
        return 0;
    float *host = malloc(count * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for %zu losses", count);
    int code = tensor_read(&t->dit->ctx, &t->losses, host);
    for (size_t i = 0; i < count; i++)
        *sum += (double)host[i];
    free(host);
    return code;
}

int reduction_finish(struct trainer *t)
{
    struct reduction *r = t->reduction;
    struct context *c = &t->dit->ctx;
    const bool first = exchange_rank(r->exchange) == 0;
    double shared = 0, experts = 0, twice = 0, loss = 0;
    float streamed = 0;
    if (r->peers)
        return peer_sums_finish(t, r->peers);
    exchange_doing(r->exchange, "waiting for sums of gradients", -1);
    if (t->dit->streamed) // added up as they came
        TRY(c->dev->api->read(c->stream, t->control.mem, CONTROL_NORM2 * sizeof streamed, &streamed,
                              sizeof streamed));
    TRY(write_back(t));
    if (first) // the same on every rank, so one counts
        TRY(device_norm(t, false, &shared));
    TRY(device_norm(t, true, &experts));
    TRY(counted_twice(t, &twice));
    TRY(local_loss(t, &loss));
    const double images = (double)t->all * t->options.accumulate;
    double sums[2] = {shared + experts + (double)streamed - twice, loss / images};
    TRY(c->dev->api->sync(c->stream)); // nobody takes gradients before all have read the last ones
    exchange_doing(r->exchange, "summing the norm and the loss", -1);
    TRY(exchange_sum(r->exchange, sums, 2));
    const float norm2 = (float)(sums[0] > 0 || sums[0] != sums[0] ? sums[0] : 0);
    const float mean = (float)sums[1];
    TRY(c->dev->api->write(c->stream, t->control.mem, CONTROL_NORM2 * sizeof norm2, &norm2,
                           sizeof norm2));
    return tensor_write(c, &t->mean, &mean);
}

int reduction_sum(const struct trainer *t, double *values, size_t count)
{
    return t->reduction ? exchange_sum(t->reduction->exchange, values, count) : 0;
}

// ---- noise --------------------------------------------------------------------------------------

int reduction_noise(struct trainer *t, int64_t micro)
{
    struct reduction *r = t->reduction;
    const size_t count = (size_t)tensor_count(&t->noise);
    if (count == 0)
        return 0;
    const uint64_t first = (uint64_t)t->first * (count / (size_t)t->options.batch);
    if (first % 4 == 0)
        return op_normal(&t->dit->ctx, &t->noise, t->options.seed,
                         rng_stream(RNG_NOISE, (uint64_t)micro), first);
    rng_normal_fill(t->options.seed, rng_stream(RNG_NOISE, (uint64_t)micro), first, r->noise,
                    count);
    return tensor_write(&t->dit->ctx, &t->noise, r->noise);
}
