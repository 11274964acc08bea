// See rates.h.
#include "runtime/rates.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "devices/cache.h"

const int rate_rows[RATE_CLASSES] = {16, 64, 256, 1024, 4096, 16384};

double rate_at(const double table[RATE_CLASSES], double rows)
{
    if (rows <= rate_rows[0]) // the weights are read whatever the rows: time stays
        return table[0] * fmax(rows, 1e-3) / rate_rows[0];
    for (int i = 1; i < RATE_CLASSES; i++) {
        if (rows > rate_rows[i])
            continue;
        const double low = log(rate_rows[i - 1]), high = log(rate_rows[i]);
        const double k = (log(rows) - low) / (high - low);
        return exp((1 - k) * log(table[i - 1]) + k * log(table[i]));
    }
    return table[RATE_CLASSES - 1];
}

// ---- published ----------------------------------------------------------------------------------

// Dense peaks (no sparsity) of data sheets. The longest name that is found counts, so "H100 PCIe"
// is not taken for an H100.
static const struct published table[] = {
    {"B200", 2250e12, 75e12, 7.7e12, 900e9, 180ull << 30},
    {"GH200", 989e12, 67e12, 4.0e12, 450e9, 96ull << 30},
    {"H200", 989e12, 67e12, 4.8e12, 450e9, 141ull << 30},
    {"H100", 989e12, 67e12, 3.35e12, 450e9, 80ull << 30},
    {"H100 PCIe", 756e12, 51e12, 2.0e12, 0, 80ull << 30},
    {"A100", 312e12, 19.5e12, 1.55e12, 300e9, 40ull << 30},
    {"A100 80GB PCIe", 312e12, 19.5e12, 1.94e12, 0, 80ull << 30},
    {"A100-SXM4-80GB", 312e12, 19.5e12, 2.04e12, 300e9, 80ull << 30},
    {"L40S", 362e12, 91.6e12, 0.864e12, 0, 48ull << 30},
    {"RTX 4090", 165e12, 82.6e12, 1.01e12, 0, 24ull << 30},
    {"V100-SXM3-32GB", 0, 16.4e12, 0.98e12, 150e9, 32ull << 30},
    {"V100", 0, 15.7e12, 0.9e12, 150e9, 16ull << 30},
    {"P100-SXM2", 0, 10.6e12, 0.73e12, 80e9, 16ull << 30},
    {"MI300X", 0, 163.4e12, 5.3e12, 0, 192ull << 30},
    {"MI250X", 0, 47.9e12, 3.2e12, 0, 128ull << 30},
    {"RX 7900 XTX", 0, 61.4e12, 0.96e12, 0, 24ull << 30},
    {"RX 6900 XT", 0, 23.0e12, 0.512e12, 0, 16ull << 30},
    {"Max 1550", 0, 52.4e12, 3.2e12, 0, 128ull << 30},
    {"Arc A770", 0, 19.7e12, 0.56e12, 0, 16ull << 30},
};

const struct published *rates_published(const char *name)
{
    const struct published *best = NULL;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcasestr(name, table[i].name) &&
            (!best || strlen(table[i].name) > strlen(best->name)))
            best = &table[i];
    return best;
}

// Shares of the peak that products reach by rows (docs/placement.md): bf16 on matrix units, from
// steps measured on an H200; f32 by OpenCL, H100; f32 on a CPU by PoCL, of 32 flops a cycle and
// core at 3 GHz.
static const double tensor_share[RATE_CLASSES] = {0.05, 0.16, 0.36, 0.58, 0.66, 0.69};
static const double vector_share[RATE_CLASSES] = {0.05, 0.15, 0.35, 0.55, 0.63, 0.66};
static const double cpu_share[RATE_CLASSES] = {0.30, 0.55, 0.80, 0.90, 0.90, 0.90};

static const double TRAIN_LONGER = 1.05; // than the parts, as measured there

static void fill_rates(struct device_rates *d, double peak, const double share[RATE_CLASSES])
{
    for (int i = 0; i < RATE_CLASSES; i++) {
        d->dense[i] = peak * share[i];
        d->ragged[i] = peak * share[i] * 0.97;
    }
}

int rates_guess(const char *name, enum device_kind kind, int cores, bool bf16, double pcie,
                struct device_rates *out)
{
    static const double per_core = 96e9, memory_of_cpu = 40e9, most_memory = 300e9;
    const struct published *p = kind == DEVICE_CPU ? NULL : rates_published(name);
    const double link = pcie > 0 ? 0.8 * pcie : 12e9;
    *out =
        (struct device_rates){.bf16 = bf16, .sharing = 1, .width = 1152, .sample = 1, .train = 1};
    snprintf(out->name, sizeof out->name, "%s", name);
    snprintf(out->driver, sizeof out->driver, "published");
    if (kind == DEVICE_CPU) {
        fill_rates(out, per_core * cores, cpu_share);
        out->attention = 0.5 * per_core * cores;
        out->memory =
            fmin(most_memory, memory_of_cpu * sqrt(cores)); // channels grow slower than cores
        out->launch = 10e-6;
        out->to_device = out->to_host = out->memory / 2;
        return 0;
    }
    if (!p)
        return fail(ERR_INPUT,
                    "no published rates of '%s'; give them by --rates (docs/placement.md)", name);
    const bool units = bf16 && p->tensor > 0;
    out->train = TRAIN_LONGER;
    fill_rates(out, units ? p->tensor : p->vector, units ? tensor_share : vector_share);
    out->attention = units ? 0.45 * p->tensor : 0.45 * p->vector;
    out->memory = 0.84 * p->memory;
    out->launch = 4e-6;
    out->to_device = out->to_host = link;
    return 0;
}

// ---- sets ---------------------------------------------------------------------------------------

void rates_free(struct rates *r)
{
    free(r->list);
    free(r->links);
    *r = (struct rates){0};
}

void rates_identity(const struct device_info *d, char out[160])
{
    snprintf(out, 160, "%.128s%s%s", d->name, d->pci[0] ? " " : "", d->pci);
}

const struct device_rates *rates_find(const struct rates *r, const struct device_info *d, bool bf16,
                                      int sharing)
{
    for (int i = 0; i < r->count; i++) {
        const struct device_rates *e = &r->list[i];
        if (e->bf16 == bf16 && !strcmp(e->name, d->name) && !strcmp(e->pci, d->pci) &&
            !strcmp(e->driver, d->driver) && e->sharing == sharing)
            return e;
    }
    return NULL;
}

struct device_rates rates_shared(const struct device_rates *alone, int sharing)
{
    struct device_rates d = *alone;
    for (int i = 0; i < RATE_CLASSES; i++) {
        d.dense[i] /= sharing;
        d.ragged[i] /= sharing;
    }
    d.attention /= sharing;
    d.memory /= sharing;
    d.sharing = sharing;
    return d;
}

const struct device_rates *rates_like(const struct rates *r, const char *name, bool bf16)
{
    for (int i = 0; i < r->count; i++)
        if (r->list[i].bf16 == bf16 && r->list[i].sharing == 1 && !strcmp(r->list[i].name, name))
            return &r->list[i];
    return NULL;
}

struct link_rate rates_staged_road(const struct rates *r, const struct device_rates *a,
                                   const struct device_rates *b)
{
    static const double start = 40e-6, host_copy = 10e9;
    const bool known = r->staged.bandwidth > 0;
    const double copy = known ? r->staged.bandwidth : host_copy;
    return (struct link_rate){.latency = known ? r->staged.latency : start,
                              .bandwidth = 1 / (1 / a->to_host + 1 / copy + 1 / b->to_device),
                              .staged = true};
}

struct link_rate rates_straight_road(const char *name)
{
    static const double start = 12e-6, pcie = 20e9, nvlink_share = 0.75;
    const struct published *p = rates_published(name);
    return (struct link_rate){.latency = start,
                              .bandwidth = p && p->nvlink > 0 ? nvlink_share * p->nvlink : pcie,
                              .staged = false};
}

int rates_put(struct rates *r, const struct device_rates *d)
{
    for (int i = 0; i < r->count; i++) {
        struct device_rates *e = &r->list[i];
        if (e->bf16 == d->bf16 && e->sharing == d->sharing && !strcmp(e->name, d->name) &&
            !strcmp(e->pci, d->pci)) {
            *e = *d;
            return 0;
        }
    }
    struct device_rates *list = realloc(r->list, ((size_t)r->count + 1) * sizeof *list);
    if (!list)
        return fail(ERR_NOMEM, "no host memory for rates");
    r->list = list;
    r->list[r->count++] = *d;
    return 0;
}

int rates_put_link(struct rates *r, const char *from, const char *to, struct link_rate rate)
{
    for (int i = 0; i < r->link_count; i++) {
        if (!strcmp(r->links[i].from, from) && !strcmp(r->links[i].to, to)) {
            r->links[i].rate = rate;
            return 0;
        }
    }
    struct rates_link *links = realloc(r->links, ((size_t)r->link_count + 1) * sizeof *links);
    if (!links)
        return fail(ERR_NOMEM, "no host memory for rates");
    r->links = links;
    struct rates_link *l = &links[r->link_count++];
    snprintf(l->from, sizeof l->from, "%s", from);
    snprintf(l->to, sizeof l->to, "%s", to);
    l->rate = rate;
    return 0;
}

const struct link_rate *rates_link(const struct rates *r, const char *from, const char *to)
{
    for (int i = 0; i < r->link_count; i++)
        if (!strcmp(r->links[i].from, from) && !strcmp(r->links[i].to, to))
            return &r->links[i].rate;
    return NULL;
}
