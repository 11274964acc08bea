// The machines of a plan, from topologies and rates: which devices are ranks, how fast they are,
// and by which road each reaches each other. See plan.h; docs/placement.md names what is assumed.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "devices/host.h"
#include "tools/plan.h"

// Shares of nominal rates that transfers get, and what starting one costs, where nothing was
// measured.
static const double NVLINK_SHARE = 0.75, PCIE_SHARE = 0.8, NETWORK_SHARE = 0.8, FAR_SHARE = 0.8;
static const double NCCL_START = 12e-6, NETWORK_START = 20e-6;
static const double ETHERNET = 1.25e9, NO_NETWORK = 12.5e9;
static const double HOST_USABLE = 0.9;

// ---- which accelerators are ranks ---------------------------------------------------------------

// Is the key one of "cuda:0,opencl:1"?
static bool listed(const char *list, const char *key)
{
    const size_t n = strlen(key);
    for (const char *at = list; n && (at = strstr(at, key)) != NULL; at += n)
        if ((at == list || at[-1] == ',') && (at[n] == 0 || at[n] == ','))
            return true;
    return false;
}

static bool has_gpu(const struct topology *t)
{
    for (int a = 0; a < t->accelerators; a++)
        if (t->objects[t->accelerator[a]].accelerator != DEVICE_CPU)
            return true;
    return false;
}

// A CPU is a rank where there is nothing else, or where it is asked for.
static bool is_rank(const struct topology *t, const struct plan_settings *o, int a)
{
    const struct topology_object *k = &t->objects[t->accelerator[a]];
    if (t->here && !k->key[0])
        return false;
    if (o->devices && t->here)
        return listed(o->devices, k->key) || (k->device && listed(o->devices, k->device->twin));
    return k->accelerator != DEVICE_CPU || o->cpu || !has_gpu(t);
}

// Accelerator of rank r of a machine.
static int nth_rank(const struct topology *t, const struct plan_settings *o, int r)
{
    for (int a = 0; a < t->accelerators; a++)
        if (is_rank(t, o, a) && r-- == 0)
            return a;
    return -1;
}

static int ranks_of(const struct topology *t, const struct plan_settings *o)
{
    int count = 0;
    for (int a = 0; a < t->accelerators; a++)
        count += is_rank(t, o, a);
    return count;
}

int machines_ranks(const struct machines *m, const struct plan_settings *o)
{
    int count = 0;
    for (int i = 0; i < m->count; i++)
        count += ranks_of(m->list[i], o);
    return count;
}

// ---- the network --------------------------------------------------------------------------------

static bool is_fabric(const char *name)
{
    return !strncmp(name, "mlx", 3) || !strncmp(name, "ib", 2) || !strncmp(name, "hfi", 3) ||
           !strncmp(name, "hsn", 3) || !strncmp(name, "bnxt_re", 7) || !strncmp(name, "efa", 3);
}

// InfiniBand and its like run at the pace of their PCIe link; an Ethernet card often does not, and
// says nothing of it here: 10 Gb/s are taken.
static double network_of(const struct topology *t, int *fabrics, int *cards)
{
    double fabric = 0;
    *fabrics = *cards = 0;
    for (int i = 0; i < t->count; i++) {
        const struct topology_object *k = &t->objects[i];
        if (k->kind != TOPOLOGY_NETWORK)
            continue;
        if (is_fabric(k->name)) {
            fabric += NETWORK_SHARE * k->slowest;
            ++*fabrics;
        } else {
            ++*cards;
        }
    }
    return *fabrics ? fabric : *cards ? ETHERNET : NO_NETWORK;
}

static void find_network(struct machines *m, const struct plan_settings *o)
{
    m->network = INFINITY;
    for (int i = 0; i < m->count; i++) {
        int fabrics, cards;
        const double rate = network_of(m->list[i], &fabrics, &cards);
        if (rate >= m->network)
            continue;
        m->network = rate;
        if (fabrics)
            snprintf(m->words, sizeof m->words, "%d adapters at %.0f%% of their PCIe links",
                     fabrics, 100 * NETWORK_SHARE);
        else
            snprintf(m->words, sizeof m->words,
                     cards ? "Ethernet, 10 Gb/s taken" : "none seen, 100 Gb/s taken");
    }
    if (o->network > 0) {
        m->network = 1e9 * (double)o->network;
        snprintf(m->words, sizeof m->words, "as given");
    }
}

// ---- opening ------------------------------------------------------------------------------------

static int read_topologies(const char *list, struct machines *out)
{
    char path[4096];
    while (*list) {
        const size_t n = strcspn(list, ",");
        if (n >= sizeof path || out->count == MACHINES_MOST)
            return fail(ERR_INPUT, "--topology: more than %d files, or too long a name",
                        MACHINES_MOST);
        snprintf(path, sizeof path, "%.*s", (int)n, list);
        TRY(topology_read(path, &out->list[out->count]));
        out->count++;
        list += n + (list[n] == ',');
    }
    return 0;
}

static int open_all(const struct plan_settings *o, struct machines *out)
{
    if (o->here) {
        TRY(topology_here(&out->list[0]));
        out->count = 1;
    }
    if (o->topology)
        TRY(read_topologies(o->topology, out));
    if (o->rates)
        TRY(rates_read(o->rates, &out->rates));
    else
        rates_load(&out->rates);
    for (int i = 0; i < out->count; i++)
        if (ranks_of(out->list[i], o) == 0)
            return fail(ERR_NODEVICE, "%s: no device to plan for%s", out->list[i]->source,
                        o->devices ? " with these --device keys" : "");
    find_network(out, o);
    return 0;
}

int machines_open(const struct plan_settings *o, struct machines *out)
{
    *out = (struct machines){0};
    int code = open_all(o, out);
    if (code < 0)
        machines_close(out);
    return code;
}

void machines_close(struct machines *m)
{
    for (int i = 0; i < m->count; i++)
        topology_free(m->list[i]);
    rates_free(&m->rates);
    *m = (struct machines){0};
}

// ---- ranks --------------------------------------------------------------------------------------

// Ranks on the CPUs of a machine share their cores.
static int sharing_of(const struct topology *t, const struct plan_settings *o,
                      const struct topology_object *k)
{
    int count = 0;
    for (int a = 0; a < t->accelerators && k->accelerator == DEVICE_CPU; a++)
        count += is_rank(t, o, a) && t->objects[t->accelerator[a]].accelerator == DEVICE_CPU;
    return count > 1 ? count : 1;
}

// As measured on this device; else on one of its name; else published.
static int fill_rates(struct machines *m, const struct plan_settings *o, const struct topology *t,
                      const struct topology_object *k, struct device_rates *out)
{
    const bool bf16 = o->precision;
    const int sharing = sharing_of(t, o, k);
    const struct device_rates *found = NULL;
    if (k->device && (found = rates_find(&m->rates, k->device, bf16, sharing)) != NULL) {
        *out = *found;
        return 0;
    }
    found = k->device ? rates_find(&m->rates, k->device, bf16, 1) : NULL;
    if (!found && k->device && o->rates)
        return fail(
            ERR_INPUT,
            "%s has no %s rates of %s (%.60s, driver %.40s): it is of another machine, driver or "
            "precision; ditmoe calibrate measures this one",
            o->rates, bf16 ? "bf16" : "f32", k->key, k->name, k->device->driver);
    if (!found)
        found = rates_like(&m->rates, k->name, bf16);
    if (found) {
        *out = rates_shared(found, sharing);
        return 0;
    }
    m->guessed = true;
    TRY(rates_guess(k->name, k->accelerator, k->cores, bf16, k->slowest, out));
    *out = rates_shared(out, sharing);
    return 0;
}

static uint64_t usable_memory(const struct topology_object *k, const struct plan_settings *o)
{
    const struct published *p = k->memory ? NULL : rates_published(k->name);
    const double most = DEVICE_USABLE * (double)(k->memory ? k->memory : p ? p->bytes : 0);
    const double share =
        k->accelerator == DEVICE_CPU && !k->device ? HOST_USABLE / DEVICE_USABLE : 1;
    const uint64_t memory = (uint64_t)(most * share);
    return o->memory && o->memory < memory ? o->memory : memory;
}

static int fill_rank(struct machines *m, const struct plan_settings *o, const struct topology *t,
                     int a, int node, struct cluster_rank *out)
{
    const struct topology_object *k = &t->objects[t->accelerator[a]];
    *out = (struct cluster_rank){.node = node, .kind = k->accelerator};
    snprintf(out->name, sizeof out->name, "%s%s%.120s", k->key, k->key[0] ? " " : "", k->name);
    TRY(fill_rates(m, o, t, k, &out->rates));
    out->memory = usable_memory(k, o);
    out->cores = out->rates.sharing > 1 ? node + 1 : 0;
    return out->memory ? 0
                       : fail(ERR_INPUT, "%s: the memory of %s is not known", t->source, k->name);
}

// What a machine's host offers: memory for experts, and with --host its CPU, where that is no rank
// itself.
static int fill_host(struct machines *m, const struct plan_settings *o, const struct topology *t,
                     struct device_rates *out, uint64_t *memory)
{
    *out = (struct device_rates){0};
    const uint64_t free = o->here ? host_memory("") : UINT64_MAX; // as a run here will ask
    *memory = free < UINT64_MAX ? free : (uint64_t)(HOST_USABLE * (double)topology_memory(t));
    for (int a = 0; o->host && a < t->accelerators; a++) {
        const struct topology_object *k = &t->objects[t->accelerator[a]];
        if (k->accelerator == DEVICE_CPU && !is_rank(t, o, a))
            return fill_rates(m, o, t, k, out);
    }
    return 0;
}

// ---- roads --------------------------------------------------------------------------------------

static bool by_cuda(const struct topology_object *k)
{
    return !strncmp(k->key, "cuda", 4) || strstr(k->drivers, "cuda") || strstr(k->drivers, "nvml");
}

static struct link_rate staged_road(const struct machines *m, const struct device_rates *a,
                                    const struct device_rates *b, bool far)
{
    struct link_rate road = rates_staged_road(&m->rates, a, b);
    road.bandwidth *= far ? FAR_SHARE : 1;
    return road;
}

static struct link_rate road_within(const struct machines *m, const struct plan_settings *o,
                                    const struct topology *t, int a, int b,
                                    const struct cluster_rank *from, const struct cluster_rank *to)
{
    const struct topology_object *x = &t->objects[t->accelerator[a]];
    const struct topology_object *y = &t->objects[t->accelerator[b]];
    const bool far =
        topology_node_of(t, t->accelerator[a]) != topology_node_of(t, t->accelerator[b]);
    const double nvlink = t->nvlink[a * t->accelerators + b];
    char one[160], other[160];
    if (x->device && y->device) {
        rates_identity(x->device, one);
        rates_identity(y->device, other);
        const struct link_rate *measured = rates_link(&m->rates, one, other);
        if (measured)
            return *measured;
    }
    if (o->exchange == ROAD_HOST || !by_cuda(x) || !by_cuda(y))
        return staged_road(m, &from->rates, &to->rates, far);
    if (nvlink > 0)
        return (struct link_rate){
            .latency = NCCL_START, .bandwidth = NVLINK_SHARE * nvlink, .staged = false};
    const double pcie =
        fmin(x->slowest > 0 ? x->slowest : 12e9, y->slowest > 0 ? y->slowest : 12e9);
    return (struct link_rate){.latency = NCCL_START,
                              .bandwidth = PCIE_SHARE * (far ? FAR_SHARE : 1) * pcie,
                              .staged = false};
}

// Ranks of a machine share its adapters. Without GPUDirect bytes go through the host's memory too.
static struct link_rate road_between(const struct machines *m, const struct plan_settings *o,
                                     const struct cluster_rank *from, const struct cluster_rank *to,
                                     bool direct, int ranks)
{
    const double share = m->network / ranks;
    if (direct && o->exchange == ROAD_NCCL)
        return (struct link_rate){.latency = NETWORK_START, .bandwidth = share, .staged = false};
    const struct link_rate staged = staged_road(m, &from->rates, &to->rates, false);
    return (struct link_rate){.latency = NETWORK_START + staged.latency,
                              .bandwidth = 1 / (1 / share + 1 / staged.bandwidth),
                              .staged = true};
}

// ---- a cluster ----------------------------------------------------------------------------------

// Where rank r of many sets of machines is.
struct seat {
    const struct topology *t;
    int accelerator, node, ranks; // ranks of its machine
};

static struct seat seat_of(const struct machines *m, const struct plan_settings *o, int r)
{
    const int all = machines_ranks(m, o), set = r / all;
    int left = r % all;
    for (int i = 0; i < m->count; i++) {
        const int ranks = ranks_of(m->list[i], o);
        if (left < ranks)
            return (struct seat){m->list[i], nth_rank(m->list[i], o, left), set * m->count + i,
                                 ranks};
        left -= ranks;
    }
    BUG_IF(true);
}

static int fill_cluster(struct machines *m, const struct plan_settings *o, struct cluster *c)
{
    for (int r = 0; r < c->ranks; r++) {
        const struct seat s = seat_of(m, o, r);
        TRY(fill_rank(m, o, s.t, s.accelerator, s.node, &c->rank[r]));
        TRY(fill_host(m, o, s.t, &c->host[s.node], &c->host_memory[s.node]));
        if (c->ranks < machines_ranks(m, o)) // the host's memory is for all groups of this machine
            c->host_memory[s.node] /= (uint64_t)(s.ranks / c->ranks > 0 ? s.ranks / c->ranks : 1);
    }
    for (int r = 0; r < c->ranks; r++) {
        const struct seat a = seat_of(m, o, r);
        for (int q = 0; q < c->ranks; q++) {
            const struct seat b = seat_of(m, o, q);
            const bool direct = by_cuda(&a.t->objects[a.t->accelerator[a.accelerator]]) &&
                                by_cuda(&b.t->objects[b.t->accelerator[b.accelerator]]);
            if (r == q)
                continue;
            c->link[r * c->ranks + q] =
                a.node == b.node
                    ? road_within(m, o, a.t, a.accelerator, b.accelerator, &c->rank[r], &c->rank[q])
                    : road_between(m, o, &c->rank[r], &c->rank[q], direct,
                                   a.ranks > b.ranks ? a.ranks : b.ranks);
        }
    }
    return 0;
}

// Copies of the group lie in the same set of machines, then in others: their road is the slower of
// both.
static void fill_between(struct machines *m, const struct plan_settings *o, int nodes, int in_set,
                         struct cluster *c)
{
    const struct seat a = seat_of(m, o, 0);
    struct link_rate road = {.latency = 1e-6, .bandwidth = INFINITY};
    if (c->ranks < in_set) { // the same rank of the next group of this set
        const struct seat b = seat_of(m, o, c->ranks);
        struct cluster_rank to = c->rank[0];
        road = a.node == b.node
                   ? road_within(m, o, a.t, a.accelerator, b.accelerator, &c->rank[0], &to)
                   : road_between(m, o, &c->rank[0], &to, true, a.ranks);
    }
    if (nodes * in_set > c->ranks && nodes > 1) {
        const bool direct = by_cuda(&a.t->objects[a.t->accelerator[a.accelerator]]);
        const struct link_rate far = road_between(m, o, &c->rank[0], &c->rank[0], direct, a.ranks);
        road.latency += far.latency;
        road.bandwidth = fmin(road.bandwidth, far.bandwidth);
    }
    c->between = road;
}

int machines_cluster(struct machines *m, const struct plan_settings *o, int nodes, int ranks,
                     struct cluster *out)
{
    const int in_set = machines_ranks(m, o);
    const size_t n = (size_t)ranks;
    *out = (struct cluster){.ranks = ranks, .copies = nodes * in_set / ranks};
    out->nodes = m->count * ((ranks + in_set - 1) / in_set);
    out->rank = calloc(n, sizeof *out->rank);
    out->link = calloc(n * n, sizeof *out->link);
    out->host_memory = calloc((size_t)out->nodes, sizeof *out->host_memory);
    out->host = calloc((size_t)out->nodes, sizeof *out->host);
    int code = 0;
    if (!out->rank || !out->link || !out->host_memory || !out->host)
        code = fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    if (code >= 0)
        code = fill_cluster(m, o, out);
    if (code >= 0 && out->copies > 1)
        fill_between(m, o, nodes, in_set, out);
    if (code < 0)
        cluster_free(out);
    return code;
}
