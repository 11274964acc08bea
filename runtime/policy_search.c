// The search of the policy `cost`: from a placement, move by move to where no move makes the
// forecast better. A step's time is the sum of its layers' and a rest, so a move of an expert
// computes one layer anew, a move of images all (layers that are alike once).
//
// A layer takes as long as its slowest rank, so where several are equally slow no single move
// helps. Therefore the search goes twice: first by the time plus a small part of all ranks' own
// work, which goes down such plateaus, then by the time alone; and small cases are searched again
// from random changes. Memory that is missing counts more than any time.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/policy.h"

static const double GUIDE = 0.05;

struct search {
    const struct cluster *c;
    const struct model_cost *m;
    const double *load;
    struct placement *p;
    double *seconds, *work; // [layers]
    int *device, *streamed, *host, *held,
        *away;          // [ranks] experts by home, all, and all not on the device
    double *rows;       // [ranks] expected, of experts on the device
    double *host_bytes; // [nodes] scratch
    double guide;       // weight of all ranks' work beside the time
};

static const double *layer_load(const struct search *s, int l)
{
    return s->load ? s->load + (size_t)l * (size_t)s->m->experts : NULL;
}

// ---- the state ----------------------------------------------------------------------------------

static void compute_layer(struct search *s, int l)
{
    s->seconds[l] = forecast_layer(s->c, s->m, layer_load(s, l), s->p, l, NULL, &s->work[l]);
}

static bool same_layers(const struct search *s, int a, int b)
{
    const size_t n = (size_t)s->m->experts;
    return s->m->moe[a] == s->m->moe[b] &&
           (!s->load || !memcmp(layer_load(s, a), layer_load(s, b), n * sizeof *s->load)) &&
           !memcmp(placement_owner(s->p, 0, a, 0), placement_owner(s->p, 0, b, 0),
                   n * sizeof(int)) &&
           !memcmp(placement_home(s->p, 0, a, 0), placement_home(s->p, 0, b, 0), n);
}

static void compute_layers(struct search *s)
{
    for (int l = 0; l < s->m->layers; l++) {
        if (l > 0 && same_layers(s, l, l - 1)) {
            s->seconds[l] = s->seconds[l - 1];
            s->work[l] = s->work[l - 1];
        } else {
            compute_layer(s, l);
        }
    }
}

static void count(struct search *s, int l, int e, int sign)
{
    const int r = *placement_owner(s->p, 0, l, e);
    const uint8_t home = *placement_home(s->p, 0, l, e);
    const double part = s->load ? layer_load(s, l)[e] : 1.0 / s->m->experts;
    s->device[r] += home == HOME_DEVICE ? sign : 0;
    s->streamed[r] += home == HOME_STREAMED ? sign : 0;
    s->host[r] += home == HOME_HOST ? sign : 0;
    s->held[r] += sign;
    s->away[r] += home == HOME_DEVICE ? 0 : sign;
    if (home != HOME_HOST)
        s->rows[r] += sign * part * s->p->batch * s->m->passes * s->m->rows;
}

// Bytes that are missing, all devices and hosts together.
static double missing(struct search *s)
{
    const struct cluster *c = s->c;
    double sum = 0;
    memset(s->host_bytes, 0, (size_t)c->nodes * sizeof *s->host_bytes);
    for (int r = 0; r < c->ranks; r++) {
        const bool idle = s->p->share[r] == 0 && s->held[r] == 0;
        const double need = idle ? 0
                                 : forecast_memory(s->m, s->p->share[r], s->device[r],
                                                   s->streamed[r], fmax(0, s->rows[r]));
        double *host = &s->host_bytes[c->rank[r].node];
        *host += (s->streamed[r] + s->host[r]) * s->m->host_expert;
        *host += c->rank[r].kind == DEVICE_CPU ? need : 0;
        sum += fmax(0, need - (double)c->rank[r].memory);
    }
    for (int n = 0; n < c->nodes; n++)
        sum += fmax(0, s->host_bytes[n] - (double)c->host_memory[n]);
    return sum;
}

// Seconds, and a million for each expert's worth of bytes that is missing.
static double judge(struct search *s)
{
    double seconds = 0, work = 0;
    const double lack = missing(s);
    for (int l = 0; l < s->m->layers; l++) {
        seconds += s->seconds[l];
        work += s->work[l];
    }
    seconds += forecast_rest(s->c, s->m, s->p->share, s->held, s->away, 0, seconds, NULL);
    seconds += s->guide * work / s->c->ranks;
    return lack > 0 ? seconds + 1e6 * (1 + ceil(lack / fmax(1, s->m->expert_memory))) : seconds;
}

static bool gains(double now, double best)
{
    return now < best * (1 - 1e-12);
}

// ---- moves of experts ---------------------------------------------------------------------------

struct seat {
    int owner;
    uint8_t home;
};

static struct seat seat_of(const struct search *s, int l, int e)
{
    return (struct seat){*placement_owner(s->p, 0, l, e), *placement_home(s->p, 0, l, e)};
}

static void sit(struct search *s, int l, int e, struct seat seat)
{
    count(s, l, e, -1);
    *placement_owner(s->p, 0, l, e) = seat.owner;
    *placement_home(s->p, 0, l, e) = seat.home;
    count(s, l, e, 1);
}

// Homes that make sense on a rank: a CPU device has no host memory of its own kind.
static bool home_makes_sense(const struct search *s, int r, int home)
{
    const struct cluster_rank *k = &s->c->rank[r];
    if (home == HOME_DEVICE)
        return true;
    return k->kind != DEVICE_CPU && (home == HOME_STREAMED || s->c->host[k->node].memory > 0);
}

// The best seat for one expert, the others staying.
static bool move_expert(struct search *s, int l, int e, double *best)
{
    const struct seat old = seat_of(s, l, e);
    struct seat to = old;
    for (int r = 0; r < s->c->ranks; r++) {
        for (int home = 0; home < HOMES; home++) {
            if ((r == old.owner && home == old.home) || !home_makes_sense(s, r, home))
                continue;
            sit(s, l, e, (struct seat){r, (uint8_t)home});
            compute_layer(s, l);
            const double now = judge(s);
            if (gains(now, *best)) {
                *best = now;
                to = (struct seat){r, (uint8_t)home};
            }
        }
    }
    sit(s, l, e, to);
    compute_layer(s, l);
    return to.owner != old.owner || to.home != old.home;
}

static bool exchange_experts(struct search *s, int l, int e, int f, double *best)
{
    const struct seat a = seat_of(s, l, e), b = seat_of(s, l, f);
    if (a.owner == b.owner && a.home == b.home)
        return false;
    sit(s, l, e, b);
    sit(s, l, f, a);
    compute_layer(s, l);
    const double now = judge(s);
    if (gains(now, *best)) {
        *best = now;
        return true;
    }
    sit(s, l, e, a);
    sit(s, l, f, b);
    compute_layer(s, l);
    return false;
}

// What was good for the layer before, where that is better here too.
static bool copy_layer(struct search *s, int l, double *best)
{
    const int from = l - 1, experts = s->m->experts;
    bool differs = false;
    struct seat *old = l > 0 && s->m->moe[from] ? malloc((size_t)experts * sizeof *old) : NULL;
    if (!old)
        return false;
    for (int e = 0; e < experts; e++) {
        old[e] = seat_of(s, l, e);
        const struct seat new = seat_of(s, from, e);
        differs |= new.owner != old[e].owner || new.home != old[e].home;
        sit(s, l, e, new);
    }
    compute_layer(s, l);
    const double now = judge(s);
    const bool better = differs && gains(now, *best);
    if (better)
        *best = now;
    for (int e = 0; e < experts && !better; e++)
        sit(s, l, e, old[e]);
    compute_layer(s, l);
    free(old);
    return better;
}

static bool improve_layer(struct search *s, int l, double *best)
{
    bool any = copy_layer(s, l, best), moved = true;
    for (int round = 0; moved && round < 64; round++) {
        moved = false;
        for (int e = 0; e < s->m->experts; e++)
            moved |= move_expert(s, l, e, best);
        for (int e = 0; e < s->m->experts; e++)
            for (int f = 0; f < e; f++)
                moved |= exchange_experts(s, l, e, f, best);
        any |= moved;
    }
    return any;
}

static bool improve_experts(struct search *s, double *best)
{
    bool any = false;
    for (int l = 0; l < s->m->layers; l++)
        if (s->m->moe[l])
            any |= improve_layer(s, l, best);
    return any;
}

// ---- moves of images ----------------------------------------------------------------------------

static double try_shares(struct search *s, int from, int to, int images)
{
    s->p->share[from] -= images;
    s->p->share[to] += images;
    compute_layers(s);
    return judge(s);
}

// Images from one rank to another: half of what it has, a quarter, ... one.
static bool move_images(struct search *s, double *best)
{
    bool any = false;
    for (int from = 0; from < s->c->ranks; from++) {
        for (int to = 0; to < s->c->ranks; to++) {
            for (int images = s->p->share[from]; from != to && images > 0; images /= 2) {
                if (s->p->share[from] < images)
                    continue;
                const double now = try_shares(s, from, to, images);
                if (gains(now, *best)) {
                    *best = now;
                    any = true;
                } else {
                    try_shares(s, to, from, images);
                }
            }
        }
    }
    return any;
}

// ---- the search ---------------------------------------------------------------------------------

struct saved {
    int *share, *owner;
    uint8_t *home;
};

static size_t places(const struct placement *p)
{
    return (size_t)p->layers * (size_t)p->experts;
}

static void save(const struct placement *p, struct saved *to)
{
    memcpy(to->share, p->share, (size_t)p->ranks * sizeof *p->share);
    memcpy(to->owner, p->owner, places(p) * sizeof *p->owner);
    memcpy(to->home, p->home, places(p));
}

static void restore(struct search *s, const struct saved *from)
{
    struct placement *p = s->p;
    memcpy(p->share, from->share, (size_t)p->ranks * sizeof *p->share);
    memcpy(p->owner, from->owner, places(p) * sizeof *p->owner);
    memcpy(p->home, from->home, places(p));
    const size_t n = (size_t)p->ranks;
    memset(s->device, 0, n * sizeof(int));
    memset(s->streamed, 0, n * sizeof(int));
    memset(s->host, 0, n * sizeof(int));
    memset(s->held, 0, n * sizeof(int));
    memset(s->away, 0, n * sizeof(int));
    memset(s->rows, 0, n * sizeof(double));
    for (int l = 0; l < p->layers; l++)
        for (int e = 0; s->m->moe[l] && e < p->experts; e++)
            count(s, l, e, 1);
    compute_layers(s);
}

// All images of a rank to another, and its experts wherever the forecast wants them: a rank without
// work need not take part.
static bool evacuate(struct search *s, int from, int to, double *best, struct saved *kept)
{
    save(s->p, kept);
    s->p->share[to] += s->p->share[from];
    s->p->share[from] = 0;
    for (int l = 0; l < s->m->layers; l++)
        for (int e = 0; s->m->moe[l] && e < s->m->experts; e++)
            if (*placement_owner(s->p, 0, l, e) == from)
                sit(s, l, e, (struct seat){to, *placement_home(s->p, 0, l, e)});
    compute_layers(s);
    double now = judge(s);
    improve_experts(s, &now);
    if (gains(now, *best)) {
        *best = now;
        return true;
    }
    restore(s, kept);
    return false;
}

static bool evacuate_ranks(struct search *s, double *best, struct saved *kept)
{
    bool any = false;
    for (int from = 0; from < s->c->ranks; from++)
        for (int to = 0; to < s->c->ranks; to++)
            if (from != to && (s->p->share[from] > 0 || s->held[from] > 0))
                any |= evacuate(s, from, to, best, kept);
    return any;
}

static void descend(struct search *s, double guide)
{
    bool moved = true;
    s->guide = guide;
    double best = judge(s);
    for (int round = 0; moved && round < 32; round++) {
        moved = improve_experts(s, &best);
        moved |= move_images(s, &best);
    }
    s->guide = 0;
}

static void descend_twice(struct search *s)
{
    descend(s, GUIDE);
    descend(s, 0);
}

// ---- looking further ----------------------------------------------------------------------------

static uint32_t draw(uint32_t *state, uint32_t below)
{
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(*state >> 8) * below >> 24);
}

static void kick_layer(struct search *s, int l, uint32_t *state)
{
    const uint32_t experts = (uint32_t)s->m->experts, ranks = (uint32_t)s->c->ranks;
    for (uint32_t moves = 1 + draw(state, experts); moves > 0; moves--)
        sit(s, l, (int)draw(state, experts), (struct seat){(int)draw(state, ranks), HOME_DEVICE});
}

// Changes a placement at random: some experts of one layer, or of every layer, and some images.
static void kick(struct search *s, bool everywhere, uint32_t *state)
{
    const int layers = s->m->layers, ranks = s->c->ranks;
    const int one = (int)draw(state, (uint32_t)layers);
    for (int l = 0; l < layers; l++)
        if (s->m->moe[l] && (everywhere || l == one))
            kick_layer(s, l, state);
    const int from = (int)draw(state, (uint32_t)ranks), to = (int)draw(state, (uint32_t)ranks);
    const int images = (int)draw(state, (uint32_t)s->p->share[from] + 1);
    s->p->share[from] -= images;
    s->p->share[to] += images;
    compute_layers(s);
}

// Cases in which moves that undo much can be tried.
static bool is_small(const struct search *s)
{
    return s->c->ranks * s->c->ranks * s->m->layers * s->m->experts <= 8192;
}

// Kicks and descents, from the best so far each time (iterated local search); as many as a small
// case leaves time for.
static void look_further(struct search *s, struct saved *kept)
{
    enum { WORK = 4000, KICKS_MOST = 120 };
    const int size = s->c->ranks * s->m->layers * s->m->experts;
    const int kicks = WORK / (size > 0 ? size : 1);
    uint32_t state = 1;
    double best = judge(s);
    save(s->p, kept);
    for (int i = 0; i < (kicks < KICKS_MOST ? kicks : KICKS_MOST); i++) {
        kick(s, i % 3 == 0, &state);
        if (i % 2)
            descend_twice(s);
        else
            descend(s, 0);
        if (gains(judge(s), best)) {
            best = judge(s);
            save(s->p, kept);
        } else {
            restore(s, kept);
        }
    }
}

static bool search_room(struct search *s, struct saved *kept)
{
    const size_t L = (size_t)s->m->layers, R = (size_t)s->c->ranks, n = places(s->p);
    s->seconds = calloc(2 * L, sizeof *s->seconds);
    s->rows = calloc(R, sizeof *s->rows);
    s->device = calloc(5 * R, sizeof *s->device);
    s->host_bytes = calloc((size_t)s->c->nodes, sizeof *s->host_bytes);
    kept->share = malloc(R * sizeof *kept->share);
    kept->owner = malloc((n + 1) * sizeof *kept->owner);
    kept->home = malloc(n + 1);
    if (!s->seconds || !s->rows || !s->device || !s->host_bytes || !kept->share || !kept->owner ||
        !kept->home)
        return false;
    s->work = s->seconds + L;
    s->streamed = s->device + R;
    s->host = s->streamed + R;
    s->held = s->host + R;
    s->away = s->held + R;
    return true;
}

int policy_improve(const struct cluster *c, const struct model_cost *m, const double *load,
                   struct placement *p)
{
    struct search s = {.c = c, .m = m, .load = load, .p = p};
    struct saved kept = {0};
    int code = 0;
    BUG_IF(p->groups != 1);
    if (search_room(&s, &kept)) {
        save(p, &kept);
        restore(&s, &kept);
        const double before = judge(&s);
        descend_twice(&s);
        if (judge(&s) > before) // the guided part went astray
            restore(&s, &kept);
        double best = judge(&s);
        if (is_small(&s) && evacuate_ranks(&s, &best, &kept))
            descend_twice(&s);
        look_further(&s, &kept);
    } else {
        code = fail(ERR_NOMEM, "no host memory for a search over %d ranks", c->ranks);
    }
    free(s.seconds);
    free(s.rows);
    free(s.device);
    free(s.host_bytes);
    free(kept.share);
    free(kept.owner);
    free(kept.home);
    return code;
}
