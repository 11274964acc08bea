#include "model/train_ranks.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

// A gradient that several ranks have a part of: a whole tensor, or one expert's part of it.
struct piece {
    const struct param *param;
    struct tensor *gradient;
    int64_t start, count;
    bool straight;      // summed on the devices (runtime/roads.h); else in the host's memory
    size_t at;          // in `host`
    const int *holders; // NULL: all ranks
    int holder_count;
};

struct reduction {
    struct exchange *exchange;
    struct roads *roads;
    struct transfers *transfers;
    // In the order of the backward pass: blocks descending, then the rest; of a block first what all ranks
    // have, which is the same list on each, then experts that some have.
    struct piece *pieces;
    int count, *holders; // the lists that pieces point into
    float *host;         // all pieces that pass through it
    float *noise;        // [N,C,S,S]
};

// ---- what is shared -----------------------------------------------------------------------------

static int list_holders(const struct placement *p, int layer, int expert, int *list)
{
    int count = 0;
    for (int r = 0; r < p->ranks; r++)
        if (placement_holds(p, r, layer, expert, NULL))
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
    if (p->expert == NO_EXPERT) {
        if (p->start != 0 || !all) // a slice of a tensor that is there already
            return;
        piece->count = tensor_count(piece->gradient);
    } else {
        int *list = r->holders + (size_t)r->count * (size_t)place->ranks;
        piece->holder_count = list_holders(place, p->block, p->expert, list);
        piece->holders = piece->holder_count < place->ranks ? list : NULL;
        if (p->start == PARAM_ELSEWHERE || piece->holder_count < 2 || all != !piece->holders)
            return;
        piece->start = p->start;
        piece->count = param_count(p);
    }
    piece->straight = !piece->holders && roads_all(r->roads);
    *at += piece->straight ? 0 : (size_t)piece->count;
    r->count++;
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
    r->host = malloc((total + 1) * sizeof *r->host);
    return r->host
               ? 0
               : fail(ERR_NOMEM, "no host memory for gradients to be summed, %zu floats", total);
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
    r->noise = malloc(tensor_bytes(&t->noise) + sizeof *r->noise);
    if (!r->noise)
        return fail(ERR_NOMEM, "no host memory for noise");
    TRY(PLAN_TENSOR(t->dit->plan, "mean loss", PLAN_INPUT, F32, 0, PLAN_FOREVER, &t->mean, 1));
    TRY(list_pieces(t));
    return transfers_new(r->exchange, &r->transfers);
}

void reduction_free(struct reduction *r)
{
    if (!r)
        return;
    transfers_free(r->transfers);
    free(r->pieces), free(r->holders), free(r->host), free(r->noise);
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

int reduction_block(void *trainer, int layer)
{
    struct trainer *t = trainer;
    struct reduction *r = t->reduction;
    if (t->micro + 1 < t->options.accumulate)
        return 0;
    exchange_doing(r->exchange, "summing gradients", layer);
    TRY(sum_straight(t, layer));
    for (int i = 0; i < r->count;) {
        const struct piece *first = &r->pieces[i];
        size_t count = 0;
        if (first->param->block != layer || first->straight) {
            i++;
            continue;
        }
        do {
            TRY(read_piece(t, &r->pieces[i], r->host + r->pieces[i].at));
            count += (size_t)r->pieces[i++].count;
        } while (!first->holders && i < r->count && r->pieces[i].param->block == layer &&
                 !r->pieces[i].holders);
        TRY(exchange_sum_floats(r->transfers, r->host + first->at, count, first->holders,
                                first->holder_count));
    }
    return 0;
}

static int write_back(struct trainer *t)
{
    struct reduction *r = t->reduction;
    struct context *c = &t->dit->ctx;
    TRY(roads_join(r->roads, LANE_SUMS));
    TRY(exchange_wait(r->transfers));
    for (int i = 0; i < r->count; i++) {
        const struct piece *p = &r->pieces[i];
        if (!p->straight)
            TRY(c->dev->api->write(c->stream, p->gradient->mem, (size_t)p->start * sizeof(float),
                                   r->host + p->at, (size_t)p->count * sizeof(float)));
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
        if (p->frozen || p->start != 0 || (p->expert != NO_EXPERT) != experts ||
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
    float *at = p->straight ? malloc((size_t)p->count * sizeof *at) : t->reduction->host + p->at;
    if (!at)
        return fail(ERR_NOMEM, "no host memory for %lld gradients", (long long)p->count);
    int code = p->straight ? read_piece(t, p, at) : 0;
    for (int64_t k = 0; k < p->count && code >= 0; k++)
        *sum += (double)at[k] * (double)at[k];
    if (p->straight)
        free(at);
    return code;
}

// The squares of those experts' gradients that another rank counts, in tensors that hold others too, to
// be left out here.
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
    exchange_doing(r->exchange, "waiting for sums of gradients", -1);
    TRY(write_back(t));
    if (first) // the same on every rank, so one counts
        TRY(device_norm(t, false, &shared));
    TRY(device_norm(t, true, &experts));
    TRY(counted_twice(t, &twice));
    TRY(local_loss(t, &loss));
    const double images = (double)t->all * t->options.accumulate;
    double sums[2] = {shared + experts - twice, loss / images};
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
    rng_normal_fill(t->options.seed, rng_stream(RNG_NOISE, (uint64_t)micro), first, r->noise,
                    count);
    return tensor_write(&t->dit->ctx, &t->noise, r->noise);
}
