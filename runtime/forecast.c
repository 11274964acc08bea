// See forecast.h. Times of a rank are its device's rates times what the model counts; where ranks
// meet, the slowest sets the pace.
#include "runtime/forecast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void cluster_free(struct cluster *c)
{
    free(c->rank);
    free(c->host_memory);
    free(c->host);
    free(c->link);
    *c = (struct cluster){0};
}

void forecast_free(struct forecast *f)
{
    free(f->rank);
    *f = (struct forecast){0};
}

// Bytes of a parameter in host memory that come to the device to be updated: weight, gradient,
// moments, average.
static const double STREAMED_UPDATE = 20;

static double ratio(double work, double rate)
{
    return work > 0 ? work / rate : 0;
}

// How much longer real steps take than their parts, as calibrate found.
static double correction(const struct model_cost *m, const struct device_rates *r)
{
    return m->train ? r->train : r->sample;
}

// What a device's kind makes of the model.
static const struct kind_cost *on(const struct model_cost *m, enum device_kind kind)
{
    return kind == DEVICE_CPU ? &m->cpu : &m->gpu;
}

// ---- one rank, one layer, one forward pass ------------------------------------------------------

struct dense_time {
    double before, shared; // the exchange; the shared expert, which can hide it
};

static struct dense_time dense_time(const struct model_cost *m, const struct cluster_rank *c,
                                    int share, bool moe)
{
    const struct device_rates *r = &c->rates;
    const struct kind_cost *k = on(m, c->kind);
    const double images = (double)share * m->passes, rows = images * m->tokens;
    const double rate = rate_at(r->dense, rows);
    struct dense_time t = {0};
    if (share == 0)
        return t;
    t.before = ratio(images * (m->flops + (moe ? 0 : m->plain_flops)), rate) +
               ratio(images * m->attention_flops, r->attention) +
               ratio(images * k->bytes, r->memory) + k->launches * r->launch;
    t.shared = moe ? ratio(images * m->shared_flops, rate) : 0;
    t.before *= correction(m, r);
    t.shared *= correction(m, r);
    return t;
}

// Experts with these rows in all; an expert's products run at the rate of its own rows.
static double expert_time(const struct model_cost *m, const struct device_rates *r,
                          enum device_kind kind, double rows, int experts)
{
    const struct kind_cost *k = on(m, kind);
    if (experts == 0 || rows <= 0)
        return 0;
    return correction(m, r) *
           (ratio(rows * m->expert_flops, rate_at(r->ragged, rows / experts)) +
            ratio(rows * k->expert_bytes, r->memory) + k->expert_launches * r->launch);
}

// ---- roads --------------------------------------------------------------------------------------

// What a rank's rows cost on their way to experts and back. By the host's memory: `out`, its own to
// there; `in`, those of others from there; and `back_out`, `back_in` on the way back. A straight
// road carries both ways at once, and all peers share its port.
struct road_time {
    double out, in, back_out, back_in, straight;
};

// owned [groups, ranks]: the share of a group's rows that goes to each rank. Of a road by the
// host's memory the sender's half is what copies to there take, the rest is the receiver's.
static struct road_time road_time(const struct cluster *c, const struct model_cost *m,
                                  const struct placement *p, const double *owned, int rank)
{
    struct road_time t = {0};
    double away = 0, here = 0;
    const double row_bytes = m->rows * m->passes * m->row_bytes;
    for (int s = 0; s < c->ranks; s++) {
        const struct link_rate *there = cluster_link(c, rank, s), *back = cluster_link(c, s, rank);
        const double send = p->share[rank] * owned[p->group[rank] * c->ranks + s] * row_bytes;
        const double receive = p->share[s] * owned[p->group[s] * c->ranks + rank] * row_bytes;
        if (s == rank || send + receive <= 0)
            continue;
        if (!there->staged) {
            away += ratio(send, there->bandwidth);
            here += ratio(receive, back->bandwidth);
            continue;
        }
        const double out = fmin(0.9 / there->bandwidth, 1 / c->rank[rank].rates.to_host);
        const double in =
            1 / back->bandwidth - fmin(0.9 / back->bandwidth, 1 / c->rank[s].rates.to_host);
        t.out += send * out;
        t.in += receive * in;
        t.back_out += receive * out;
        t.back_in += send * in;
    }
    t.straight = fmax(away, here);
    return t;
}

// What the slowest pair of ranks that do something costs a layer beside all work: measured (struct
// link_rate), else by its latency, with which ranks meet three times in a forward pass, twice more
// in a backward one. busy [ranks].
static double between(const struct cluster *c, const struct model_cost *m, const bool *busy)
{
    enum { MEETINGS = 3, BACKWARD = 2 };
    const double meetings = MEETINGS + (m->train ? BACKWARD : 0);
    double most = 0;
    for (int r = 0; r < c->ranks; r++)
        for (int s = 0; s < c->ranks && busy[r]; s++) {
            const struct link_rate *l = cluster_link(c, r, s);
            const double measured = l->layer[m->train];
            if (busy[s] && c->ranks > 1)
                most = fmax(most, measured > 0 || r == s ? measured : meetings * l->latency);
        }
    return most;
}

// ---- a layer ------------------------------------------------------------------------------------

// What the placement makes of each rank in a layer.
struct load_of {
    double images;  // whose rows its experts get, as parts of all of an image's
    double at_host; // of these, those of experts computed by the host
    int experts, hosted, streamed;
};

// Whether a group before `g` has the same owner of the expert: then it is counted already.
static bool owned_before(const struct placement *p, int g, int layer, int e)
{
    for (int before = 0; before < g; before++)
        if (*placement_owner(p, before, layer, e) == *placement_owner(p, g, layer, e))
            return true;
    return false;
}

static double group_images(const struct placement *p, int g)
{
    double images = 0;
    for (int r = 0; r < p->ranks; r++)
        images += p->group[r] == g ? p->share[r] : 0;
    return images;
}

static void sum_loads(const struct model_cost *m, const double *load, const struct placement *p,
                      int layer, struct load_of *out, double *owned)
{
    const size_t ranks = (size_t)p->ranks;
    memset(out, 0, ranks * sizeof *out);
    memset(owned, 0, ranks * (size_t)p->groups * sizeof *owned);
    for (int g = 0; g < p->groups; g++) {
        const double images = group_images(p, g);
        for (int e = 0; e < m->experts; e++) {
            const int owner = *placement_owner(p, g, layer, e),
                      home = *placement_home(p, g, layer, e);
            struct load_of *o = &out[owner];
            const double part = load ? load[e] : 1.0 / m->experts;
            const bool first = g == 0 || !owned_before(p, g, layer, e);
            owned[g * p->ranks + owner] += part;
            o->images += images * part;
            o->at_host += home == HOME_HOST ? images * part : 0;
            o->hosted += first && home == HOME_HOST;
            o->experts += first && home != HOME_HOST;
            o->streamed += first && home == HOME_STREAMED;
        }
    }
}

// The host's CPU works on its rows while the device works on its own; rows go there and back.
static double host_time(const struct cluster *c, const struct model_cost *m, int rank, double rows,
                        int experts)
{
    const struct cluster_rank *k = &c->rank[rank];
    const struct device_rates *host = &c->host[k->node];
    if (experts == 0)
        return 0;
    if (host->memory <= 0)
        return INFINITY;
    return expert_time(m, host, DEVICE_CPU, rows, experts) +
           ratio(rows * m->row_bytes, k->rates.to_host) +
           ratio(rows * m->row_bytes, k->rates.to_device);
}

// One pass of a rank over a layer, seconds. Ranks meet when all have told their counts of rows,
// when all rows to experts are in the host's memory, and when all results are.
struct phases {
    double before;   // results of the layer before come in; attention, router
    double out;      // rows to the host's memory
    double shared;   // beside that
    double work;     // rows come in, experts, results to the host's memory
    double straight; // beside the shared expert; and back
    double stream;   // its streamed experts on their way
    double exchange; // of these, rows on their way that nothing hides
    double dense, expert;
};

// `work` is the pass's work in forward passes.
static struct phases rank_phases(const struct cluster *c, const struct model_cost *m,
                                 const struct placement *place, const struct load_of *l,
                                 const double *owned, int rank, double work, bool back)
{
    const struct cluster_rank *k = &c->rank[rank];
    const double rows = m->passes * m->rows; // of an image
    const struct dense_time d = dense_time(m, k, place->share[rank], true);
    const struct road_time road = road_time(c, m, place, owned, rank);
    const double device =
        expert_time(m, &k->rates, k->kind, rows * (l->images - l->at_host), l->experts);
    const double host = host_time(c, m, rank, rows * l->at_host, l->hosted);
    struct phases p = {.dense = work * (d.before + d.shared), .expert = work * fmax(device, host)};
    p.before = road.back_in + road.straight + work * d.before;
    p.out = road.out;
    p.shared = work * d.shared;
    p.straight = road.straight;
    p.work = road.in + p.expert + road.back_out;
    p.exchange = road.out + road.in + road.back_out + road.back_in + 2 * road.straight -
                 m->overlap * fmin(p.shared, fmax(road.out, road.straight));
    p.stream =
        ratio(l->streamed * m->expert_params * on(m, k->kind)->weight_bytes, k->rates.to_device);
    if (back) // gradients go the other way
        p.stream = fmax(p.stream, ratio(l->streamed * m->expert_params * 4, k->rates.to_host));
    return p;
}

// How long until all are done: as long as the slowest takes; ranks that share cores, whose rates
// are those of all at work, leave them to each other. own [ranks].
static double all_done(const struct cluster *c, const double *own)
{
    double most = 0;
    for (int r = 0; r < c->ranks; r++) {
        double sum = 0;
        for (int q = 0; q < c->ranks && c->rank[r].cores; q++)
            sum += c->rank[q].cores == c->rank[r].cores ? own[q] / c->rank[q].rates.sharing : 0;
        most = fmax(most, c->rank[r].cores ? sum : own[r]);
    }
    return most;
}

// What a rank does after `met`, the time until all rows are in the host's memory: the rest of the
// shared expert's work, or waiting for rows on a straight road, then the experts'.
static double after(const struct model_cost *m, const struct phases *p, double met)
{
    if (m->overlap <= 0)
        return p->shared + p->straight + p->work;
    return fmax(fmax(0, p->shared - m->overlap * met), p->straight) + p->work;
}

// A pass takes as long as its slowest ranks, which meet between its phases if rows travel at all;
// streamed experts come during the layer before.
static double pass_time(const struct cluster *c, const struct model_cost *m,
                        const struct placement *place, const struct load_of *load,
                        const double *owned, double work, bool back, struct phases *p, double *own,
                        struct rank_forecast *parts, double *sum)
{
    double roads = 0, stream = 0, met;
    for (int r = 0; r < c->ranks; r++) {
        p[r] = rank_phases(c, m, place, &load[r], owned, r, work, back);
        roads = fmax(roads, p[r].exchange);
        stream = fmax(stream, p[r].stream);
        own[r] = p[r].dense + p[r].expert;
        if (sum)
            *sum += own[r] + p[r].exchange + p[r].stream;
    }
    if (roads > 0) {
        double out = 0;
        for (int r = 0; r < c->ranks; r++) {
            own[r] = p[r].before + (back ? p[r].out : 0);
            out = fmax(out, p[r].out);
        }
        met = all_done(c, own) + (back ? 0 : out);
        for (int r = 0; r < c->ranks; r++) // in the backward pass nobody waits for counts
            own[r] = after(m, &p[r], back ? met - p[r].before : out);
    } else {
        met = 0;
    }
    met += all_done(c, own);
    const double total = fmax(met, stream);
    for (int r = 0; parts && r < c->ranks; r++) {
        const double late = fmax(0, p[r].stream - met);
        const double busy = p[r].dense + p[r].expert + p[r].exchange;
        const double scale = busy > met ? met / busy : 1; // of cores that others leave to it
        parts[r].dense += scale * p[r].dense;
        parts[r].expert += scale * p[r].expert;
        parts[r].exchange += scale * p[r].exchange;
        parts[r].stream += late;
        parts[r].wait += total - scale * busy - late;
    }
    return total;
}

static double meeting_time(const struct cluster *c, const struct model_cost *m,
                           const struct placement *place, const struct load_of *load, bool *busy,
                           struct rank_forecast *parts, double *sum)
{
    for (int r = 0; r < c->ranks; r++)
        busy[r] = place->share[r] > 0 || load[r].experts + load[r].hosted > 0;
    const double seconds = between(c, m, busy);
    for (int r = 0; r < c->ranks; r++) {
        if (sum)
            *sum += busy[r] ? seconds : 0;
        if (parts)
            *(busy[r] ? &parts[r].exchange : &parts[r].wait) += seconds;
    }
    return seconds;
}

// A layer without experts: no rank waits for another.
static double plain_time(const struct cluster *c, const struct model_cost *m, const int *share,
                         double *own, struct rank_forecast *parts, double *sum)
{
    for (int r = 0; r < c->ranks; r++) {
        own[r] = dense_time(m, &c->rank[r], share[r], false).before * (1 + m->backward);
        if (sum)
            *sum += own[r];
    }
    const double most = all_done(c, own);
    for (int r = 0; parts && r < c->ranks; r++) {
        parts[r].dense += fmin(own[r], most);
        parts[r].wait += most - fmin(own[r], most);
    }
    return most;
}

double forecast_layer(const struct cluster *c, const struct model_cost *m, const double *load,
                      const struct placement *place, int layer, struct rank_forecast *parts,
                      double *work)
{
    enum { FEW = 16 };
    struct load_of few_loads[FEW], *loads = few_loads;
    struct phases few_phases[FEW], *phases = few_phases;
    double few_owned[2 * FEW], *owned = few_owned, *own;
    bool few_busy[FEW], *busy = few_busy;
    const size_t n = (size_t)c->ranks, g = (size_t)place->groups;
    const bool many = n * g > FEW;
    if (work)
        *work = 0;
    if (many) {
        loads =
            malloc(n * (sizeof *loads + sizeof *phases + (g + 1) * sizeof *owned + sizeof *busy));
        if (!loads)
            return INFINITY;
        phases = (struct phases *)(loads + n);
        owned = (double *)(phases + n);
    }
    own = owned + n * g;
    if (many)
        busy = (bool *)(own + n);
    double seconds;
    if (m->moe[layer]) {
        sum_loads(m, load, place, layer, loads, owned);
        seconds = pass_time(c, m, place, loads, owned, 1, false, phases, own, parts, work);
        if (m->backward > 0)
            seconds +=
                pass_time(c, m, place, loads, owned, m->backward, true, phases, own, parts, work);
        seconds += meeting_time(c, m, place, loads, busy, parts, work);
    } else {
        seconds = plain_time(c, m, place->share, own, parts, work);
    }
    if (many)
        free(loads);
    return seconds;
}

// ---- the rest of a step -------------------------------------------------------------------------

// A rank without images and experts keeps out of sums and updates; the first, which writes files,
// does not.
static bool is_idle(const int *share, const int *held, int rank)
{
    return rank > 0 && share[rank] == 0 && held[rank] == 0;
}

// Sums of `bytes` over the ranks that have something to do. By the memory of one machine every rank
// copies those of the others to its device and adds them up; else a ring over the slowest road,
// where every byte goes twice. *hidden: whether it goes beside the backward pass, as straight roads
// do.
static double sum_time(const struct cluster *c, const int *share, const int *held, int rank,
                       double bytes, bool *hidden)
{
    double slowest = INFINITY, latency = 0, n = 0, copies = 0;
    bool near = true;
    *hidden = true;
    for (int r = 0; r < c->ranks; r++) {
        n += !is_idle(share, held, r);
        near = near && c->rank[r].node == c->rank[rank].node;
        for (int s = 0; s < c->ranks; s++) {
            const struct link_rate *l = cluster_link(c, r, s);
            if (r == s || is_idle(share, held, r) || is_idle(share, held, s))
                continue;
            slowest = fmin(slowest, l->staged ? l->bandwidth / 2 : l->bandwidth);
            latency = fmax(latency, l->latency);
            *hidden = *hidden && !l->staged;
        }
    }
    const struct device_rates *k = &c->rank[rank].rates;
    if (n > 1 && near && !*hidden) {
        copies = ratio(bytes * (n - 1), k->to_device) + ratio(bytes * (3 * n - 1), k->memory);
        return latency + copies;
    }
    return n > 1 ? 2 * (n - 1) * latency + ratio(2 * bytes * (n - 1) / n, slowest) : 0;
}

// Between copies, each rank with its likes, in a tree of latency log2.
static double copies_time(const struct cluster *c, double bytes)
{
    if (c->copies == 1)
        return 0;
    return 2 * log2(c->copies) * c->between.latency +
           ratio(2 * bytes * (c->copies - 1) / c->copies, c->between.bandwidth);
}

// Operations outside of layers.
static double outside_time(const struct model_cost *m, const struct device_rates *k, int share)
{
    const double images = (double)share * m->passes;
    return correction(m, k) * (1 + m->backward) *
           (ratio(images * m->image_flops, rate_at(k->dense, images)) +
            ratio(images * m->image_bytes, k->memory));
}

static double update_time(const struct model_cost *m, const struct cluster_rank *k, int held,
                          int away)
{
    const double bytes = on(m, k->kind)->update_bytes;
    return bytes * ratio(m->dense_params + (held - away) * m->expert_params, k->rates.memory) +
           away * m->expert_params *
               fmax(bytes / k->rates.memory, STREAMED_UPDATE / k->rates.to_device);
}

double forecast_rest(const struct cluster *c, const struct model_cost *m, const int *share,
                     const int *held, const int *away, int twice, double layers_seconds,
                     struct rank_forecast *parts)
{
    const double dense_bytes = 4 * m->dense_params;
    const double backward = layers_seconds * m->backward / (1 + m->backward);
    double outside = 0, reduce = 0, update = 0, meet = 0;
    for (int r = 0; r < c->ranks; r++)
        for (int q = 0; q < c->ranks && c->ranks > 1 && !is_idle(share, held, r); q++)
            if (!is_idle(share, held, q))
                meet = fmax(meet, cluster_link(c, r, q)->step[m->train]);
    for (int r = 0; r < c->ranks; r++) {
        const struct cluster_rank *k = &c->rank[r];
        const double own = outside_time(m, &k->rates, share[r]);
        bool hidden;
        outside = fmax(outside, own);
        if (parts)
            parts[r].dense += own;
        if (!m->train || is_idle(share, held, r))
            continue;
        const double optimiser = update_time(m, k, held[r], away[r]);
        const double among =
            copies_time(c, dense_bytes / c->ranks + 4 * held[r] * m->expert_params);
        const double sums = among + sum_time(c, share, held, r,
                                             dense_bytes + 4 * twice * m->expert_params, &hidden);
        const double seen =
            hidden ? fmax(sums - m->overlap * backward, sums / fmax(1, m->layers)) : sums;
        update = fmax(update, optimiser);
        reduce = fmax(reduce, seen);
        if (parts) {
            parts[r].update += optimiser;
            parts[r].reduce += seen;
        }
    }
    for (int r = 0; parts && r < c->ranks; r++)
        parts[r].wait += update - parts[r].update + reduce - parts[r].reduce;
    return outside + reduce + update + meet;
}

double forecast_memory(const struct model_cost *m, int share, int held, int streamed, double rows)
{
    // two buffers for the experts of a layer, and in training two for their gradients
    const double layer = ceil((held + streamed) / fmax(1, m->layers));
    const double buffers =
        streamed > 0 ? 2 * layer * m->expert_params * (m->gpu.weight_bytes + (m->train ? 4 : 0))
                     : 0;
    return m->fixed_memory + share * m->passes * m->image_memory + held * m->expert_memory +
           m->headroom * rows * m->row_memory + buffers;
}

// ---- all of it ----------------------------------------------------------------------------------

// Counts of a rank over all layers.
struct holding {
    int device, streamed, host; // experts by home
    double rows;                // expected, of those on the device
};

static void count_expert(const struct model_cost *m, const double *load, const struct placement *p,
                         int l, int e, struct holding *out, int *twice)
{
    bool again = false;
    for (int g = 0; g < p->groups; g++) {
        struct holding *h = &out[*placement_owner(p, g, l, e)];
        const uint8_t home = *placement_home(p, g, l, e);
        const bool first = g == 0 || !owned_before(p, g, l, e);
        const double part = load ? load[l * m->experts + e] : 1.0 / m->experts;
        h->device += first && home == HOME_DEVICE;
        h->streamed += first && home == HOME_STREAMED;
        h->host += first && home == HOME_HOST;
        if (home != HOME_HOST)
            h->rows += part * group_images(p, g) * m->passes * m->rows;
        again |= g > 0 && first && group_images(p, g) > 0;
    }
    *twice += again;
}

static int count_holdings(const struct cluster *c, const struct model_cost *m, const double *load,
                          const struct placement *p, struct holding *out, int *twice)
{
    for (int l = 0; l < m->layers; l++) {
        for (int e = 0; m->moe[l] && e < m->experts; e++) {
            for (int g = 0; g < p->groups; g++) {
                const int owner = *placement_owner(p, g, l, e);
                if (owner < 0 || owner >= c->ranks)
                    return fail(ERR_INPUT, "expert %d of layer %d has no owner among %d ranks", e,
                                l, c->ranks);
            }
            count_expert(m, load, p, l, e, out, twice);
        }
    }
    return 0;
}

static void judge_memory(const struct cluster *c, const struct model_cost *m,
                         const struct placement *p, const struct holding *h, double *host,
                         struct forecast *out)
{
    double most = 0;
    memset(host, 0, (size_t)c->nodes * sizeof *host);
    for (int r = 0; r < c->ranks; r++) {
        struct rank_forecast *f = &out->rank[r];
        f->memory = forecast_memory(m, p->share[r], h[r].device, h[r].streamed, h[r].rows);
        if (p->share[r] == 0 && h[r].device + h[r].streamed + h[r].host == 0)
            f->memory = 0; // idle
        f->host_memory = (h[r].streamed + h[r].host) * m->host_expert;
        f->rows = h[r].rows / fmax(1, m->layers);
        host[c->rank[r].node] += f->host_memory;
        // a CPU device's memory is the host's
        if (c->rank[r].kind == DEVICE_CPU)
            host[c->rank[r].node] += f->memory;
        const double over = f->memory - (double)c->rank[r].memory;
        if (over > 0) {
            out->missing += over;
            out->missing_rank = over > most ? r : out->missing_rank;
            most = fmax(most, over);
        }
    }
    for (int n = 0; n < c->nodes; n++)
        out->missing += fmax(0, host[n] - (double)c->host_memory[n]);
}

int forecast_step(const struct cluster *c, const struct model_cost *m, const double *load,
                  const struct placement *p, struct forecast *out)
{
    int code = 0, twice = 0;
    *out = (struct forecast){.ranks = c->ranks, .missing_rank = -1};
    BUG_IF(p->ranks != c->ranks || p->layers != m->layers || p->experts != m->experts);
    struct holding *h = calloc((size_t)c->ranks, sizeof *h);
    int *held = calloc(2 * (size_t)c->ranks, sizeof *held), *away = held + c->ranks;
    double *host = calloc((size_t)c->nodes, sizeof *host);
    out->rank = calloc((size_t)c->ranks, sizeof *out->rank);
    if (!h || !held || !host || !out->rank)
        code = fail(ERR_NOMEM, "no host memory for a forecast of %d ranks", c->ranks);
    if (code >= 0)
        code = count_holdings(c, m, load, p, h, &twice);
    for (int l = 0; code >= 0 && l < m->layers; l++)
        out->step += forecast_layer(c, m, load ? load + (size_t)l * (size_t)m->experts : NULL, p, l,
                                    out->rank, NULL);
    for (int r = 0; code >= 0 && r < c->ranks; r++) {
        away[r] = h[r].streamed + h[r].host;
        held[r] = h[r].device + away[r];
    }
    if (code >= 0) {
        out->step += forecast_rest(c, m, p->share, held, away, twice, out->step, out->rank);
        judge_memory(c, m, p, h, host, out);
        for (int r = 0; r < c->ranks; r++) {
            out->exchange_share += out->rank[r].exchange / out->step / c->ranks;
            out->reduce_share += out->rank[r].reduce / out->step / c->ranks;
        }
        out->images_per_second = (double)p->batch * c->copies / out->step;
    }
    free(h);
    free(held);
    free(host);
    if (code < 0)
        forecast_free(out);
    return code;
}
