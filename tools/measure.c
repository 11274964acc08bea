#include "tools/measure.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NOISE_COUNT = 1 << 20, ROUNDS = 5 };

// ---- numbers ------------------------------------------------------------------------------------

// xorshift64*; the upper half, as a number in [0,1).
static double uniform(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)(*state * 2685821657736338717u >> 32) * 0x1p-32;
}

void noise_fill(float *out, size_t count, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
    for (size_t i = 0; i < count; i += 2) { // Box and Muller 1958: two at a time
        double radius = sqrt(-2 * log(1 - uniform(&state))), angle = 2 * M_PI * uniform(&state);
        out[i] = (float)(radius * cos(angle));
        if (i + 1 < count)
            out[i + 1] = (float)(radius * sin(angle));
    }
}

static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int noise_fill_device(struct device *dev, struct stream *stream, struct mem *mem, size_t bytes,
                      enum dtype type)
{
    static float values[NOISE_COUNT];
    static uint16_t halves[NOISE_COUNT];
    if (values[0] == 0)
        noise_fill(values, NOISE_COUNT, 1);
    if (type == BF16 && halves[0] == 0)
        for (size_t i = 0; i < NOISE_COUNT; i++)
            halves[i] = to_bf16(values[i]);
    const void *from = type == BF16 ? (const void *)halves : values;
    size_t ready = NOISE_COUNT * dtype_size(type);
    ready = ready < bytes ? ready : bytes;
    TRY(dev->api->write(stream, mem, 0, from, ready));
    while (ready < bytes) { // what is there, once more behind it
        size_t more = bytes - ready < ready ? bytes - ready : ready;
        TRY(dev->api->copy(stream, mem, ready, mem, 0, more));
        ready += more;
    }
    return 0;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median_of(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return count ? values[count / 2] : NAN;
}

// ---- timing -------------------------------------------------------------------------------------

int measure_calls(struct device *dev, struct stream *stream, int rounds, double seconds,
                  int (*work)(void *user), void *user, double *each)
{
    enum { MOST = 64, CALLS_MOST = 1000 };
    double times[MOST];
    int calls = 1;
    rounds = rounds < MOST ? rounds : MOST;
    TRY(work(user));
    TRY(dev->api->sync(stream));
    for (int i = -1; i < rounds; i++) { // round -1 finds out how many calls fill a round
        double start = now_seconds();
        for (int k = 0; k < calls; k++)
            TRY(work(user));
        TRY(dev->api->sync(stream));
        double one = (now_seconds() - start) / calls;
        if (i >= 0)
            times[i] = one;
        else
            calls = one * CALLS_MOST < seconds ? CALLS_MOST : 1 + (int)(seconds / one);
    }
    *each = median_of(times, rounds);
    return 0;
}

// ---- ceilings -----------------------------------------------------------------------------------

struct ceiling_work {
    struct device *dev;
    struct stream *stream;
    struct gemm gemm;
    struct mem *mem[4]; // A, B, C, scratch
    size_t bytes;       // of A, B and C
};

static int run_product(void *user)
{
    struct ceiling_work *w = user;
    return w->dev->api->gemm(w->stream, &w->gemm);
}

static int run_copy(void *user)
{
    struct ceiling_work *w = user;
    return w->dev->api->copy(w->stream, w->mem[1], 0, w->mem[0], 0, w->bytes);
}

static int measure_both(struct ceiling_work *w, struct ceilings *out)
{
    const struct backend *api = w->dev->api;
    const double n = out->size;
    double seconds;
    for (int i = 0; i < 3; i++) {
        TRY(api->alloc(w->dev, w->bytes, &w->mem[i]));
        TRY(noise_fill_device(w->dev, w->stream, w->mem[i], w->bytes, w->dev->act));
    }
    w->gemm.a = w->mem[0];
    w->gemm.b = w->mem[1];
    w->gemm.c = w->mem[2];
    const size_t space = api->gemm_space(w->dev, &w->gemm);
    if (space > 0)
        TRY(api->alloc(w->dev, space, &w->mem[3]));
    w->gemm.space = w->mem[3];
    TRY(measure_calls(w->dev, w->stream, ROUNDS, 0.02, run_product, w, &seconds));
    out->flops = 2 * n * n * n / seconds;
    TRY(measure_calls(w->dev, w->stream, ROUNDS, 0.02, run_copy, w, &seconds));
    out->copy = 2 * (double)w->bytes / seconds;
    out->copied = w->bytes;
    return 0;
}

// n x n x n: less on devices that would take long, or that have not the memory.
static int product_size(const struct device *dev)
{
    int n = dev->info.kind == DEVICE_CPU ? 2048 : 8192;
    uint64_t room = dev->info.memory > dev->allocated ? dev->info.memory - dev->allocated : 0;
    while (n > 512 && 4 * (uint64_t)n * (uint64_t)n * dtype_size(dev->act) > room)
        n /= 2;
    return n;
}

int measure_ceilings(struct device *dev, struct stream *stream, struct ceilings *out)
{
    struct ceiling_work w = {.dev = dev, .stream = stream};
    const int n = product_size(dev);
    *out = (struct ceilings){.size = n};
    w.bytes = (size_t)n * (size_t)n * dtype_size(dev->act);
    w.gemm = (struct gemm){.m = n, .n = n, .k = n, .trans_b = true};
    w.gemm.type_a = w.gemm.type_b = w.gemm.type_c = dev->act;
    int code = measure_both(&w, out);
    for (int i = 0; i < 4; i++)
        dev->api->free(w.mem[i]);
    return code;
}

const char *format_rate(double per_second, const char *unit, char out[32])
{
    const bool tera = per_second >= 0.9995e12;
    const double value = per_second / (tera ? 1e12 : 1e9);
    snprintf(out, 32, "%.*f %c%s/s",
             value < 10    ? 2
             : value < 100 ? 1
                           : 0,
             value, tera ? 'T' : 'G', unit);
    return out;
}

void print_ceilings(const struct ceilings *c, const struct device *dev, FILE *table)
{
    char product[32], copy[32];
    fprintf(table, "ceilings: product %dx%dx%d in %s %s; copy of %zu MiB %s\n", c->size, c->size,
            c->size, dtype_name(dev->act), format_rate(c->flops, "FLOP", product), c->copied >> 20,
            format_rate(c->copy, "B", copy));
}

json_t *ceilings_json(const struct ceilings *c, const struct device *dev)
{
    return json_pack("{s:s, s:s, s:s, s:s, s:i, s:f, s:f}", "bench", "ceilings", "device",
                     dev->info.key, "name", dev->info.name, "type", dtype_name(dev->act), "size",
                     c->size, "gflops", 1e-9 * c->flops, "gbps", 1e-9 * c->copy);
}
