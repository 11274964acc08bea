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

// Bytes of a parameter in host memory that come to the device to be updated: weight, gradient, moments, average.
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

// ---- one rank, one layer, one forward pass ------------------------------------------------------

struct dense_time {
    double before, shared; // the exchange; the shared expert, which can hide it
};

static struct dense_time dense_time(const struct model_cost *m, const struct device_rates *r,
                                    int share, bool moe)
{
    const double images = (double)share * m->passes, rows = images * m->tokens;
    const double rate = rate_at(r->dense, rows);
    struct dense_time t = {0};
    if (share == 0)
        return t;
    t.before = ratio(images * (m->flops + (moe ? 0 : m->plain_flops)), rate) +
               ratio(images * m->attention_flops, r->attention) +
               ratio(images * m->bytes, r->memory) + m->launches * r->launch;
    t.shared = moe ? ratio(images * m->shared_flops, rate) : 0;
    t.before *= correction(m, r);
    t.shared *= correction(m, r);
    return t;
}

// Experts with these rows in all; an expert's products run at the rate of its own rows.
static double expert_time(const struct model_cost *m, const struct device_rates *r, double rows,
                          int experts)
{
    if (experts == 0 || rows <= 0)
        return 0;
    return correction(m, r) *
           (ratio(rows * m->expert_flops, rate_at(r->ragged, rows / experts)) +
            ratio(rows * m->expert_bytes, r->memory) + m->expert_launches * r->launch);
}

// ---- roads --------------------------------------------------------------------------------------

// Seconds in which `rank` sends its rows to experts' owners and gets those of others. A direct road
// carries both ways at once and all peers share its port; by the host's memory they take turns.
// owned [groups, ranks]: the share of a group's rows that goes to each rank.
static double exchange_time(const struct cluster *c, const struct model_cost *m,
                            const struct placement *p, const double *owned, int rank)
{
    double out = 0, in = 0, staged = 0, start = 0;
    const double row_bytes = m->rows * m->passes * m->row_bytes;
    for (int s = 0; s < c->ranks; s++) {
        const struct link_rate *there = cluster_link(c, rank, s), *back = cluster_link(c, s, rank);
        const double send = p->share[rank] * owned[p->group[rank] * c->ranks + s] * row_bytes;
        const double receive = p->share[s] * owned[p->group[s] * c->ranks + rank] * row_bytes;
        if (s == rank || send + receive <= 0)
            continue;
        if (there->staged) {
            staged +=
                there->latency + ratio(send, there->bandwidth) + ratio(receive, back->bandwidth);
        } else {
            out += ratio(send, there->bandwidth);
            in += ratio(receive, back->bandwidth);
            start = fmax(start, there->latency);
        }
    }
    return staged + start + fmax(out, in);
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
    return expert_time(m, host, rows, experts) + ratio(rows * m->row_bytes, k->rates.to_host) +
           ratio(rows * m->row_bytes, k->rates.to_device);
}

struct phases {
    double first, second, stream; // seconds of a rank; of its streamed experts on their way
    double exchange;              // of these, rows on their way that nothing hides
    double dense, expert;
};

// One pass over a layer: `work` is its work in forward passes.
static struct phases rank_phases(const struct cluster *c, const struct model_cost *m,
                                 const struct placement *place, const struct load_of *l,
                                 const double *owned, int rank, double work, bool back)
{
    const struct device_rates *r = &c->rank[rank].rates;
    const double rows = m->passes * m->rows; // of an image
    const struct dense_time d = dense_time(m, r, place->share[rank], true);
    const double road = exchange_time(c, m, place, owned, rank);
    const double hidden = m->overlap * fmin(road, work * d.shared);
    const double device = expert_time(m, r, rows * (l->images - l->at_host), l->experts);
    const double host = host_time(c, m, rank, rows * l->at_host, l->hosted);
    struct phases p = {.dense = work * (d.before + d.shared), .expert = work * fmax(device, host)};
    p.first = p.dense + road - hidden;
    p.second = p.expert + road;
    p.exchange = 2 * road - hidden;
    p.stream = ratio(l->streamed * m->expert_params * m->weight_bytes, r->to_device);
    if (back) // gradients go the other way
        p.stream = fmax(p.stream, ratio(l->streamed * m->expert_params * 4, r->to_host));
    return p;
}

// A pass takes as long as its slowest ranks, which meet between its phases if rows travel at all;
// streamed experts come during the layer before.
static double pass_time(const struct cluster *c, const struct model_cost *m,
                        const struct placement *place, const struct load_of *load,
                        const double *owned, double work, bool back, struct phases *p,
                        struct rank_forecast *parts, double *sum)
{
    double first = 0, second = 0, both = 0, roads = 0, stream = 0;
    for (int r = 0; r < c->ranks; r++) {
        p[r] = rank_phases(c, m, place, &load[r], owned, r, work, back);
        first = fmax(first, p[r].first);
        second = fmax(second, p[r].second);
        both = fmax(both, p[r].first + p[r].second);
        roads = fmax(roads, p[r].exchange);
        stream = fmax(stream, p[r].stream);
        if (sum)
            *sum += p[r].first + p[r].second + p[r].stream;
    }
    const double met = roads > 0 ? first + second : both, total = fmax(met, stream);
    for (int r = 0; parts && r < c->ranks; r++) {
        const double late = fmax(0, p[r].stream - met);
        parts[r].dense += p[r].dense;
        parts[r].expert += p[r].expert;
        parts[r].exchange += p[r].exchange;
        parts[r].stream += late;
        parts[r].wait += total - p[r].first - p[r].second - late;
    }
    return total;
}

// A layer without experts: no rank waits for another.
static double plain_time(const struct cluster *c, const struct model_cost *m, const int *share,
                         struct rank_forecast *parts, double *sum)
{
    double most = 0;
    for (int r = 0; r < c->ranks; r++)
        most = fmax(most, dense_time(m, &c->rank[r].rates, share[r], false).before);
    for (int r = 0; r < c->ranks; r++) {
        const double own = dense_time(m, &c->rank[r].rates, share[r], false).before;
        if (sum)
            *sum += own * (1 + m->backward);
        if (!parts)
            continue;
        parts[r].dense += own * (1 + m->backward);
        parts[r].wait += (most - own) * (1 + m->backward);
    }
    return most * (1 + m->backward);
}

double forecast_layer(const struct cluster *c, const struct model_cost *m, const double *load,
                      const struct placement *place, int layer, struct rank_forecast *parts,
                      double *work)
{
    enum { FEW = 16 };
    struct load_of few_loads[FEW], *loads = few_loads;
    struct phases few_phases[FEW], *phases = few_phases;
    double few_owned[FEW], *owned = few_owned;
    const size_t n = (size_t)c->ranks, g = (size_t)place->groups;
    if (work)
        *work = 0;
    if (!m->moe[layer])
        return plain_time(c, m, place->share, parts, work);
    const bool many = n * g > FEW;
    if (many) {
        loads = malloc(n * (sizeof *loads + sizeof *phases + g * sizeof *owned));
        if (!loads)
            return INFINITY;
        phases = (struct phases *)(loads + n);
        owned = (double *)(phases + n);
    }
    sum_loads(m, load, place, layer, loads, owned);
    double seconds = pass_time(c, m, place, loads, owned, 1, false, phases, parts, work);
    if (m->backward > 0)
        seconds += pass_time(c, m, place, loads, owned, m->backward, true, phases, parts, work);
    if (many)
        free(loads);
    return seconds;
}

// ---- the rest of a step -------------------------------------------------------------------------

// A rank without images and experts is left out of the run.
static bool is_idle(const int *share, const int *held, int rank)
{
    return share[rank] == 0 && held[rank] == 0;
}

// A ring over the slowest road between ranks: every byte goes there twice.
static double ring_time(const struct cluster *c, const int *share, const int *held, double bytes)
{
    double slowest = INFINITY, latency = 0, n = 0;
    for (int r = 0; r < c->ranks; r++) {
        n += !is_idle(share, held, r);
        for (int s = 0; s < c->ranks; s++) {
            const struct link_rate *l = cluster_link(c, r, s);
            if (r == s || is_idle(share, held, r) || is_idle(share, held, s))
                continue;
            slowest = fmin(slowest, l->staged ? l->bandwidth / 2 : l->bandwidth);
            latency = fmax(latency, l->latency);
        }
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

double forecast_rest(const struct cluster *c, const struct model_cost *m, const int *share,
                     const int *held, const int *away, int twice, double layers_seconds,
                     struct rank_forecast *parts)
{
    const double dense_bytes = 4 * m->dense_params;
    const double backward = layers_seconds * m->backward / (1 + m->backward);
    const double ring =
        m->train ? ring_time(c, share, held, dense_bytes + 4 * twice * m->expert_params) : 0;
    double outside = 0, reduce = 0, update = 0;
    for (int r = 0; r < c->ranks; r++) {
        const struct device_rates *k = &c->rank[r].rates;
        const double images = (double)share[r] * m->passes;
        const double own = correction(m, k) * (1 + m->backward) *
                           (ratio(images * m->image_flops, rate_at(k->dense, images)) +
                            ratio(images * m->image_bytes, k->memory));
        outside = fmax(outside, own);
        if (parts)
            parts[r].dense += own;
        if (!m->train || is_idle(share, held, r))
            continue;
        const double optimiser =
            m->update_bytes *
                ratio(m->dense_params + (held[r] - away[r]) * m->expert_params, k->memory) +
            away[r] * m->expert_params *
                fmax(m->update_bytes / k->memory, STREAMED_UPDATE / k->to_device);
        const double sums =
            ring + copies_time(c, dense_bytes / c->ranks + 4 * held[r] * m->expert_params);
        const double seen = fmax(sums - m->overlap * backward, sums / fmax(1, m->layers));
        update = fmax(update, optimiser);
        reduce = fmax(reduce, seen);
        if (parts) {
            parts[r].update += optimiser;
            parts[r].reduce += seen;
        }
    }
    for (int r = 0; parts && r < c->ranks; r++)
        parts[r].wait += update - parts[r].update + reduce - parts[r].reduce;
    return outside + reduce + update;
}

double forecast_memory(const struct model_cost *m, int share, int held, int streamed, double rows)
{
    // two buffers for the experts of a layer, and in training two for their gradients
    const double layer = ceil((held + streamed) / fmax(1, m->layers));
    const double buffers =
        streamed > 0 ? 2 * layer * m->expert_params * (m->weight_bytes + (m->train ? 4 : 0)) : 0;
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
