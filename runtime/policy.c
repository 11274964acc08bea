// See policy.h: the policies that follow a rule. The search of `cost` is policy_search.c.
#include "runtime/policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const policy_names[] = {"uniform", "memory", "frequency", "cost", NULL};

enum { APART_MOST = 16 }; // ranks: with more, groups are found by their size (tools/plan_make.c)

static double load_at(const struct model_cost *m, const double *load, int l, int e)
{
    return load ? load[(size_t)l * (size_t)m->experts + (size_t)e] : 1.0 / m->experts;
}

// Whole parts of `total` in proportion to weight[count], the sum exact: largest remainders.
static int divide(const double *weight, int count, int total, int *out)
{
    double sum = 0, *rest = calloc((size_t)count, sizeof *rest);
    int left = total;
    if (!rest)
        return fail(ERR_NOMEM, "no host memory for a placement");
    for (int i = 0; i < count; i++)
        sum += weight[i];
    for (int i = 0; i < count; i++) {
        const double exact = sum > 0 ? total * weight[i] / sum : (double)total / count;
        out[i] = (int)exact;
        rest[i] = exact - out[i];
        left -= out[i];
    }
    for (; left > 0; left--) {
        int best = 0;
        for (int i = 1; i < count; i++)
            if (rest[i] > rest[best] + 1e-12)
                best = i;
        out[best]++;
        rest[best] -= 1;
    }
    free(rest);
    return 0;
}

// ---- memory -------------------------------------------------------------------------------------

// Experts of each layer in proportion to `room` [ranks]; what rounding took in one layer is given
// back in the next.
static int spread_by(const double *room, const struct model_cost *m, struct placement *p)
{
    double sum = 0;
    double *due = calloc((size_t)p->ranks, sizeof *due);
    if (!due)
        return fail(ERR_NOMEM, "no host memory for a placement");
    for (int r = 0; r < p->ranks; r++)
        sum += room[r];
    for (int l = 0; l < p->layers; l++) {
        if (!m->moe[l])
            continue;
        for (int r = 0; r < p->ranks; r++)
            due[r] += m->experts * (sum > 0 ? room[r] / sum : 1.0 / p->ranks);
        for (int e = 0; e < m->experts; e++) {
            int most = 0;
            for (int r = 1; r < p->ranks; r++)
                if (due[r] > due[most] + 1e-9)
                    most = r;
            *placement_owner(p, 0, l, e) = most;
            due[most] -= 1;
        }
    }
    free(due);
    return 0;
}

static int by_memory(const struct cluster *c, const struct model_cost *m, struct placement *p)
{
    double *room = calloc((size_t)c->ranks, sizeof *room);
    if (!room)
        return fail(ERR_NOMEM, "no host memory for a placement");
    for (int r = 0; r < c->ranks; r++)
        room[r] = fmax(0, (double)c->rank[r].memory - m->fixed_memory);
    int code = divide(room, c->ranks, p->batch, p->share);
    for (int r = 0; r < c->ranks; r++)
        room[r] = fmax(0, room[r] - p->share[r] * m->passes * m->image_memory);
    if (code >= 0)
        code = spread_by(room, m, p);
    free(room);
    return code;
}

// ---- frequency, and speed -----------------------------------------------------------------------

// The experts of a layer, the most loaded first (the lower number among equals).
static void sort_by_load(const struct model_cost *m, const double *load, int l, int *order)
{
    for (int e = 0; e < m->experts; e++) {
        int at = e;
        for (; at > 0 && load_at(m, load, l, order[at - 1]) < load_at(m, load, l, e); at--)
            order[at] = order[at - 1];
        order[at] = e;
    }
}

// Each expert, the most loaded first, to the rank that will be done with its own first (Graham
// 1969); among equals to the one that has had least in the layers before. speed [ranks], 0: gets
// none.
static int spread_load(const struct model_cost *m, const double *load, const double *speed,
                       struct placement *p)
{
    const size_t n = (size_t)p->ranks;
    double *sum = calloc(2 * n, sizeof *sum), *all = sum + n;
    int *order = calloc((size_t)m->experts, sizeof *order);
    for (int l = 0; sum && order && l < p->layers; l++) {
        if (!m->moe[l])
            continue;
        memset(sum, 0, n * sizeof *sum);
        sort_by_load(m, load, l, order);
        for (int i = 0; i < m->experts; i++) {
            const double part = load_at(m, load, l, order[i]);
            int best = 0;
            while (speed[best] <= 0)
                best++;
            for (int r = best + 1; r < p->ranks; r++) {
                if (speed[r] <= 0)
                    continue;
                const double gain = (sum[best] + part) / speed[best] - (sum[r] + part) / speed[r];
                if (gain > 1e-12 ||
                    (fabs(gain) <= 1e-12 && all[r] / speed[r] < all[best] / speed[best]))
                    best = r;
            }
            *placement_owner(p, 0, l, order[i]) = best;
            sum[best] += part;
            all[best] += part;
        }
    }
    const bool good = sum && order;
    free(sum);
    free(order);
    return good ? 0 : fail(ERR_NOMEM, "no host memory for a placement");
}

static int by_frequency(const struct model_cost *m, const double *load, struct placement *p)
{
    double *speed = malloc((size_t)p->ranks * sizeof *speed);
    if (!speed)
        return fail(ERR_NOMEM, "no host memory for a placement");
    for (int r = 0; r < p->ranks; r++)
        speed[r] = 1;
    int code = spread_load(m, load, speed, p);
    free(speed);
    return code;
}

// What each device does in a second, of products with these rows.
static void find_speeds(const struct cluster *c, const struct model_cost *m, double rows,
                        bool ragged, double *speed)
{
    for (int r = 0; r < c->ranks; r++) {
        const struct device_rates *k = &c->rank[r].rates;
        speed[r] = rate_at(ragged ? k->ragged : k->dense, rows) / (m->train ? k->train : k->sample);
    }
}

// The `count` fastest keep their speed, the others get none: a rank that is slow enough is better
// left out. Returns whether the last of them is faster than the next, so that the cut is one.
static bool leave_out(const double *by, int ranks, int count, double *speed)
{
    double last = INFINITY, next = 0;
    for (int r = 0; r < ranks; r++) {
        int before = 0;
        for (int q = 0; q < ranks; q++)
            before += by[q] > by[r] || (by[q] == by[r] && q < r);
        if (before >= count)
            speed[r] = 0;
        last = before == count - 1 ? by[r] : last;
        next = before == count ? by[r] : next;
    }
    return last > 1.01 * next;
}

// Shares and experts in proportion to speed, on the `count` fastest ranks: a start for the search.
// *cut: whether these are a number of ranks of their own.
static int by_speed(const struct cluster *c, const struct model_cost *m, const double *load,
                    int count, struct placement *p, bool *cut)
{
    const double rows = fmax(1, (double)p->batch * m->passes * m->rows / count);
    double *by = malloc(2 * (size_t)p->ranks * sizeof *by), *speed = by + p->ranks;
    if (!by)
        return fail(ERR_NOMEM, "no host memory for a placement");
    find_speeds(c, m, rows / m->topk, false, by);
    find_speeds(c, m, rows / m->topk, false, speed);
    *cut = leave_out(by, p->ranks, count, speed);
    int code = divide(speed, c->ranks, p->batch, p->share);
    find_speeds(c, m, rows / m->experts, true, speed);
    leave_out(by, p->ranks, count, speed);
    if (code >= 0)
        code = spread_load(m, load, speed, p);
    free(by);
    return code;
}

// ---- memory that is not there -------------------------------------------------------------------

// Sends experts of `rank` to host memory until the rest fits: one of each layer in turn, so that
// there is work in every layer behind which they can come.
static void stream_experts(const struct cluster *c, const struct model_cost *m, const double *load,
                           int rank, struct placement *p)
{
    double rows = 0;
    int device = 0, streamed = 0;
    for (int l = 0; l < p->layers; l++)
        for (int e = 0; m->moe[l] && e < m->experts; e++)
            if (*placement_owner(p, 0, l, e) == rank) {
                const uint8_t home = *placement_home(p, 0, l, e);
                device += home == HOME_DEVICE;
                streamed += home == HOME_STREAMED;
                rows +=
                    home == HOME_HOST ? 0 : load_at(m, load, l, e) * p->batch * m->passes * m->rows;
            }
    for (int e = 0; e < m->experts; e++)
        for (int l = 0; l < p->layers; l++) {
            if (forecast_memory(m, p->share[rank], device, streamed, rows) <=
                (double)c->rank[rank].memory)
                return;
            if (!m->moe[l] || *placement_owner(p, 0, l, e) != rank ||
                *placement_home(p, 0, l, e) != HOME_DEVICE)
                continue;
            *placement_home(p, 0, l, e) = HOME_STREAMED;
            device--;
            streamed++;
        }
}

int policy_fit(const struct cluster *c, const struct model_cost *m, const double *load,
               struct placement *p)
{
    for (int r = 0; r < c->ranks; r++)
        if (c->rank[r].kind != DEVICE_CPU) // whose memory is the host's
            stream_experts(c, m, load, r, p);
    return 0;
}

// ---- the policies -------------------------------------------------------------------------------

static int follow(enum policy policy, const struct cluster *c, const struct model_cost *m,
                  const double *load, int batch, struct placement *out)
{
    TRY(placement_uniform(c->ranks, m->layers, m->experts, m->moe, batch, out));
    int code = policy == POLICY_MEMORY      ? by_memory(c, m, out)
               : policy == POLICY_FREQUENCY ? by_frequency(m, load, out)
                                            : 0;
    if (code >= 0)
        code = policy_fit(c, m, load, out);
    if (code < 0)
        placement_free(out);
    return code;
}

// Whether a is the better forecast: what fits before what does not, then the faster.
static bool better(const struct forecast *a, const struct forecast *b)
{
    if (a->missing != b->missing)
        return a->missing < b->missing;
    return a->step < b->step;
}

struct best {
    struct placement place;
    struct forecast forecast;
};

// Improves p, and keeps it where it is the best so far. Takes p over.
static int consider(const struct cluster *c, const struct model_cost *m, const double *load,
                    struct placement *p, struct best *best)
{
    struct forecast f = {0};
    int code = policy_improve(c, m, load, p);
    if (code >= 0)
        code = forecast_step(c, m, load, p, &f);
    if (code >= 0 && (!best->place.owner || better(&f, &best->forecast))) {
        placement_free(&best->place);
        forecast_free(&best->forecast);
        *best = (struct best){*p, f};
        return 0;
    }
    placement_free(p);
    forecast_free(&f);
    return code;
}

// ---- each rank by itself ------------------------------------------------------------------------

// Every rank a group of its own with all experts: no rows travel. Ranks without images hold
// nothing; what they would send goes to the rank with most.
static int own_experts(const struct model_cost *m, const int *share, int ranks, int batch,
                       struct placement *p)
{
    int most = 0;
    TRY(placement_new(ranks, ranks, m->layers, m->experts, p));
    p->batch = batch;
    for (int r = 0; r < ranks; r++) {
        p->share[r] = share[r];
        p->group[r] = r;
        most = share[r] > share[most] ? r : most;
    }
    for (int g = 0; g < ranks; g++)
        for (int l = 0; l < m->layers; l++)
            for (int e = 0; m->moe[l] && e < m->experts; e++)
                *placement_owner(p, g, l, e) = share[g] > 0 ? g : most;
    return 0;
}

static int forecast_apart(const struct cluster *c, const struct model_cost *m, const double *load,
                          const int *share, int batch, struct forecast *f)
{
    struct placement p;
    TRY(own_experts(m, share, c->ranks, batch, &p));
    int code = forecast_step(c, m, load, &p, f);
    placement_free(&p);
    return code;
}

// Moves `images` from one rank to another where that makes the forecast better.
static int try_move(const struct cluster *c, const struct model_cost *m, const double *load,
                    int from, int to, int images, int *share, int batch, struct forecast *best,
                    bool *moved)
{
    struct forecast f = {0};
    if (images < 1 || share[from] < images || from == to)
        return 0;
    share[from] -= images;
    share[to] += images;
    TRY(forecast_apart(c, m, load, share, batch, &f));
    if (better(&f, best)) {
        forecast_free(best);
        *best = f;
        *moved = true;
        return 0;
    }
    forecast_free(&f);
    share[from] += images;
    share[to] -= images;
    return 0;
}

// The best shares from these on: halves of a rank's images to another, then quarters, down to
// single ones.
static int balance(const struct cluster *c, const struct model_cost *m, const double *load,
                   int *share, int batch, struct forecast *best)
{
    bool moved = true;
    for (int round = 0; moved && round < 16; round++) {
        moved = false;
        for (int from = 0; from < c->ranks; from++)
            for (int to = 0; to < c->ranks; to++)
                for (int part = 1; part <= batch; part *= 2)
                    TRY(try_move(c, m, load, from, to, (share[from] + part - 1) / part, share,
                                 batch, best, &moved));
    }
    return 0;
}

// Ranks by themselves, where that is better than `best`.
static int consider_apart(const struct cluster *c, const struct model_cost *m, const double *load,
                          int batch, struct best *best)
{
    struct forecast f = {0};
    double *speed = calloc((size_t)c->ranks, sizeof *speed);
    int *share = calloc((size_t)c->ranks, sizeof *share);
    int code = speed && share ? 0 : fail(ERR_NOMEM, "no host memory for a placement");
    if (code >= 0)
        find_speeds(c, m, fmax(1, (double)batch * m->tokens * m->passes / c->ranks), false, speed);
    if (code >= 0)
        code = divide(speed, c->ranks, batch, share);
    if (code >= 0)
        code = forecast_apart(c, m, load, share, batch, &f);
    if (code >= 0)
        code = balance(c, m, load, share, batch, &f);
    if (code >= 0 && better(&f, &best->forecast)) {
        placement_free(&best->place);
        code = own_experts(m, share, c->ranks, batch, &best->place);
    }
    forecast_free(&f);
    free(speed);
    free(share);
    return code;
}

// ---- cost ---------------------------------------------------------------------------------------

// The rules' placements, and those by speed on all ranks and on the fastest alone, each improved;
// and every rank by itself.
static int by_cost(const struct cluster *c, const struct model_cost *m, const double *load,
                   int batch, struct placement *out)
{
    struct best best = {0};
    int code = 0;
    for (int rule = 0; rule < POLICY_COST && code >= 0; rule++) {
        struct placement p;
        code = follow((enum policy)rule, c, m, load, batch, &p);
        if (code >= 0)
            code = consider(c, m, load, &p, &best);
    }
    for (int count = c->ranks; count > 0 && code >= 0; count--) {
        struct placement p;
        bool cut = true;
        code = placement_uniform(c->ranks, m->layers, m->experts, m->moe, batch, &p);
        if (code >= 0)
            code = by_speed(c, m, load, count, &p, &cut);
        if (code >= 0 && (cut || count == c->ranks))
            code = policy_fit(c, m, load, &p) < 0 ? ERR_NOMEM : consider(c, m, load, &p, &best);
        else
            placement_free(&p);
    }
    if (code >= 0 && c->ranks > 1 && c->ranks <= APART_MOST)
        code = consider_apart(c, m, load, batch, &best);
    forecast_free(&best.forecast);
    if (code < 0)
        placement_free(&best.place);
    *out = best.place;
    return code;
}

int policy_place(enum policy policy, const struct cluster *c, const struct model_cost *m,
                 const double *load, int batch, struct placement *out)
{
    if (policy == POLICY_COST)
        return by_cost(c, m, load, batch, out);
    return follow(policy, c, m, load, batch, out);
}
