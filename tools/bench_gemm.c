// Matrix products at the model's shapes, against OpenBLAS and CLBlast. See bench.h.
#include "tools/bench.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 7, EXPERTS = 8, ROUND_MS = 25 };
enum way { OWN, OPENBLAS, CLBLAST, WAYS };

static const char *const way_names[WAYS] = {"own", "openblas", "clblast"};

// One product: forward y = x w^T, its dx = dy w and dw = dy^T x; m rows, w [out,in].
enum form { FORWARD, DX, DW };
struct row {
    const char *name;
    enum form form;
    bool ragged; // over EXPERTS experts
    int m, out, in;
};

// Everything that the ways need to run one row.
struct bench {
    struct device *dev;
    struct stream *stream;
    struct row row;
    struct gemm gemm;
    int offsets[EXPERTS + 1];
    float *a, *b, *c; // the same on the host, for OpenBLAS
    size_t count_a, count_b, count_c;
    struct mem *offsets_mem;
};

// ---- OpenBLAS, found when the program runs ------------------------------------------------------

// cblas_sgemm's signature and numbers, so that no header is needed to build.
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef void sgemm_function(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                            const float *a, int lda, const float *b, int ldb, float beta, float *c,
                            int ldc);

static sgemm_function *sgemm;

static void *symbol(void *library, const char *name)
{
    return library ? dlsym(library, name) : NULL;
}

// OpenBLAS does not know CPUs newer than itself and then takes an SSE3 kernel: name it a modern
// one.
static void name_core(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
    else if (__builtin_cpu_supports("avx2"))
        setenv("OPENBLAS_CORETYPE", "Haswell", 0);
#endif
}

static void open_blas(int threads, FILE *table)
{
    name_core();
    // its idle threads spin for 2^26 cycles on the cores that the device is measured on: make it
    // 2^20, which still bridges the gap between two of its own products
    setenv("OPENBLAS_THREAD_TIMEOUT", "20", 0);
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    void *set_threads = symbol(library, "openblas_set_num_threads");
    void *corename = symbol(library, "openblas_get_corename");
    void *function = symbol(library, "cblas_sgemm");
    if (!set_threads || !corename || !function) {
        fprintf(table, "OpenBLAS: not found\n");
        return;
    }
    void (*set)(int);
    char *(*core)(void);
    memcpy(&set, &set_threads, sizeof set); // ISO C has no cast from void * to a function
    memcpy(&core, &corename, sizeof core);
    memcpy(&sgemm, &function, sizeof sgemm);
    set(threads);
    fprintf(table, "OpenBLAS: %s kernels, %d threads\n", core(), threads);
}

static void run_sgemm(const struct bench *b, int m, int n, int k, size_t at_a, size_t at_b,
                      size_t at_c)
{
    const struct gemm *g = &b->gemm;
    sgemm(ROW_MAJOR, g->trans_a ? TRANS : NO_TRANS, g->trans_b ? TRANS : NO_TRANS, m, n, k, 1.0f,
          b->a + at_a, g->trans_a ? g->m : g->k, b->b + at_b, g->trans_b ? g->k : g->n,
          g->accumulate ? 1.0f : 0.0f, b->c + at_c, g->n);
}

static void run_openblas(const struct bench *b)
{
    const struct gemm *g = &b->gemm;
    size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    if (g->ragged == GEMM_PLAIN)
        run_sgemm(b, g->m, g->n, g->k, 0, 0, 0);
    for (int e = 0; e < g->groups; e++) {
        int count = b->offsets[e + 1] - b->offsets[e];
        size_t first = (size_t)b->offsets[e], number = (size_t)e;
        if (g->ragged == GEMM_RAGGED_M)
            run_sgemm(b, count, g->n, g->k, first * k, number * n * k, first * n);
        else
            run_sgemm(b, g->m, g->n, count, first * m, first * n, number * m * n);
    }
}

// ---- operands -----------------------------------------------------------------------------------

static struct gemm product(const struct row *r)
{
    struct gemm g = {.type_a = F32, .type_b = F32, .type_c = F32};
    g.ragged = !r->ragged ? GEMM_PLAIN : r->form == DW ? GEMM_RAGGED_K : GEMM_RAGGED_M;
    g.groups = r->ragged ? EXPERTS : 0;
    g.m = r->form == DW ? r->out : r->m;
    g.n = r->form == FORWARD ? r->out : r->in;
    g.k = r->form == FORWARD ? r->in : r->form == DX ? r->out : r->m;
    g.trans_a = r->form == DW;
    g.trans_b = r->form == FORWARD;
    g.accumulate = r->form == DW;
    return g;
}

// Random values on the host and on the device.
static int operand(struct bench *b, size_t count, float **host, struct mem **mem)
{
    uint32_t state = 12345;
    *host = malloc(count * sizeof **host);
    if (!*host)
        return fail(ERR_NOMEM, "bench: out of host memory");
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        (*host)[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    TRY(b->dev->api->alloc(b->dev, count * sizeof **host, mem));
    return b->dev->api->write(b->stream, *mem, 0, *host, count * sizeof **host);
}

// Uneven experts, as a router leaves them: half to one and a half of the mean.
static int split_rows(struct bench *b)
{
    static const int share[EXPERTS] = {11, 5, 9, 13, 7, 8, 6, 5}; // of 64
    int sum = 0;
    for (int e = 0; e < EXPERTS; e++) {
        b->offsets[e] = (int)((int64_t)b->row.m * sum / 64);
        sum += share[e];
    }
    b->offsets[EXPERTS] = b->row.m;
    TRY(b->dev->api->alloc(b->dev, sizeof b->offsets, &b->offsets_mem));
    return b->dev->api->write(b->stream, b->offsets_mem, 0, b->offsets, sizeof b->offsets);
}

static int make_operands(struct bench *b)
{
    struct gemm *g = &b->gemm;
    size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    b->count_a = m * k;
    b->count_b = n * k * (g->ragged == GEMM_RAGGED_M ? EXPERTS : 1);
    b->count_c = m * n * (g->ragged == GEMM_RAGGED_K ? EXPERTS : 1);
    TRY(operand(b, b->count_a, &b->a, &g->a));
    TRY(operand(b, b->count_b, &b->b, &g->b));
    TRY(operand(b, b->count_c, &b->c, &g->c));
    TRY(split_rows(b));
    g->offsets = b->offsets_mem;
    size_t space = b->dev->api->gemm_space(b->dev, g);
    return space ? b->dev->api->alloc(b->dev, space, &g->space) : 0;
}

static void free_operands(struct bench *b)
{
    struct mem *mems[] = {b->gemm.a, b->gemm.b, b->gemm.c, b->gemm.space, b->offsets_mem};
    for (size_t i = 0; i < sizeof mems / sizeof *mems; i++)
        if (mems[i])
            b->dev->api->free(mems[i]);
    free(b->a);
    free(b->b);
    free(b->c);
}

// ---- timing -------------------------------------------------------------------------------------

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool has_way(const struct bench *b, enum way way)
{
    const char *clblast = getenv("DITMOE_CLBLAST");
    if (way == OPENBLAS)
        return sgemm && b->dev->info.kind == DEVICE_CPU;
    return way == OWN || (clblast && !strcmp(clblast, "1") && !b->row.ragged);
}

// Seconds a product: `repeats` of them, and the wait for the last.
static int time_way(struct bench *b, enum way way, int repeats, double *seconds)
{
    unsigned flags = b->dev->flags;
    int code = 0;
    if (way == OPENBLAS) {
        double from = now();
        for (int i = 0; i < repeats; i++)
            run_openblas(b);
        *seconds = (now() - from) / repeats;
        usleep(40000); // its threads spin for 30 ms after a call: not while others are timed
        return 0;
    }
    b->dev->flags = way == OWN ? flags | OPEN_PORTABLE : flags & ~(unsigned)OPEN_PORTABLE;
    double from = now();
    for (int i = 0; i < repeats && code >= 0; i++)
        code = b->dev->api->gemm(b->stream, &b->gemm);
    if (code >= 0)
        code = b->dev->api->sync(b->stream);
    *seconds = (now() - from) / repeats;
    b->dev->flags = flags;
    return code;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Median seconds of each way, 0 for a way that is not there; rounds are interleaved.
static int time_ways(struct bench *b, double median[WAYS])
{
    double seconds[WAYS][ROUNDS], once;
    int repeats[WAYS];
    for (enum way w = 0; w < WAYS; w++)
        if (has_way(b, w)) {
            TRY(time_way(b, w, 1, &once));
            TRY(time_way(b, w, 1, &once));
            repeats[w] = 1 + (int)(1e-3 * ROUND_MS / (once + 1e-6));
        }
    for (int i = 0; i < ROUNDS; i++)
        for (enum way w = 0; w < WAYS; w++)
            if (has_way(b, w))
                TRY(time_way(b, w, repeats[w], &seconds[w][i]));
    for (enum way w = 0; w < WAYS; w++) {
        median[w] = 0;
        if (has_way(b, w)) {
            qsort(seconds[w], ROUNDS, sizeof(double), by_value);
            median[w] = seconds[w][ROUNDS / 2];
        }
    }
    return 0;
}

// ---- the table ----------------------------------------------------------------------------------

static void print_figure(FILE *table, double value, const char *format)
{
    if (value > 0)
        fprintf(table, format, value);
    else
        fprintf(table, "%9s", "-");
}

static void report(const struct bench *b, const double median[WAYS], json_t *rows, FILE *table)
{
    const struct row *r = &b->row;
    double flop = 2.0 * r->m * r->out * r->in, figure[WAYS];
    json_t *object = json_pack("{s:s, s:s, s:i, s:i, s:i}", "bench", "gemm", "name", r->name, "m",
                               b->gemm.m, "n", b->gemm.n, "k", b->gemm.k);
    fprintf(table, "%-20s %6d %6d %6d", r->name, b->gemm.m, b->gemm.n, b->gemm.k);
    for (enum way w = OWN; w < WAYS; w++) {
        figure[w] = median[w] > 0 ? 1e-9 * flop / median[w] : 0;
        print_figure(table, figure[w], "%9.1f");
        json_object_set_new(object, way_names[w],
                            figure[w] > 0 ? json_real(figure[w]) : json_null());
    }
    double ratio = figure[OPENBLAS] > 0 ? figure[OWN] / figure[OPENBLAS] : 0;
    print_figure(table, ratio, "%9.2f");
    json_object_set_new(object, "ratio", ratio > 0 ? json_real(ratio) : json_null());
    fprintf(table, "\n");
    fflush(table);
    json_array_append_new(rows, object);
}

static int bench_row(struct device *dev, const struct row *row, json_t *rows, FILE *table)
{
    struct bench b = {.dev = dev, .row = *row, .gemm = product(row)};
    double median[WAYS];
    int code;
    TRY_OUT(dev->api->stream_new(dev, &b.stream));
    TRY_OUT(make_operands(&b));
    TRY_OUT(time_ways(&b, median));
    report(&b, median, rows, table);
    code = 0;
out:
    free_operands(&b);
    if (b.stream)
        dev->api->stream_free(b.stream);
    return code;
}

// The matrices of a block of width d on m tokens, each in its three forms.
static int bench_block(struct device *dev, const char *filter, int d, int m, json_t *rows,
                       FILE *table)
{
    const struct row layers[] = {
        {"qkv", FORWARD, false, m, 3 * d, d},
        {"proj", FORWARD, false, m, d, d},
        {"experts gate-up", FORWARD, true, 2 * m, 8 * d, d},
        {"experts down", FORWARD, true, 2 * m, d, 4 * d},
        {"adaLN", FORWARD, false, m / 64, 6 * d, d},
    };
    static const char *const forms[] = {"", " dx", " dw"};
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        for (int form = FORWARD; form <= DW; form++) {
            struct row row = layers[i];
            char name[64];
            snprintf(name, sizeof name, "%s%s", row.name, forms[form]);
            row.name = name;
            row.form = (enum form)form;
            if (!filter || strstr(name, filter))
                TRY(bench_row(dev, &row, rows, table));
        }
    return 0;
}

int bench_gemm(struct device *dev, const char *filter, json_t *rows, FILE *table)
{
    static const int sizes[][2] = {{384, 512}, {384, 2048}, {384, 8192}, {256, 2048}, {1152, 1024}};
    if (dev->info.kind == DEVICE_CPU && !sgemm)
        open_blas(dev->info.compute_units, table);
    fprintf(table, "matrix products, GFLOP/s, medians of %d rounds\n", ROUNDS);
    fprintf(table, "%-20s %6s %6s %6s%9s%9s%9s%9s\n", "product", "m", "n", "k", "own", "openblas",
            "clblast", "own/blas");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        TRY(bench_block(dev, filter, sizes[i][0], sizes[i][1], rows, table));
    return 0;
}
