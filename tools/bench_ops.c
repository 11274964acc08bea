// The operations other than matrix products and routing, at the shapes of the demo model and of
// S/2: median time and what it means, beside a copy of the same run.
#include "tools/bench.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime/ops.h"

enum { ROUNDS = 9, TENSORS = 16 };

struct bench {
    struct context c;
    struct tensor t[TENSORS];
    int count;
    double copy; // bytes a second of a device copy at the same time
    json_t *rows;
    FILE *table;
};

struct shape {
    const char *name;
    int images, tokens, heads, hd;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- tensors ------------------------------------------------------------------------------------

static uint32_t noise(uint32_t i)
{
    i = (i ^ i >> 16) * 0x7feb352du;
    i = (i ^ i >> 15) * 0x846ca68bu;
    return i ^ i >> 16;
}

// Numbers in [-1, 1): in bf16 two of them from one word.
static int fill_noise(struct bench *b, const struct tensor *t)
{
    size_t bytes = tensor_bytes(t);
    uint32_t *host = malloc(bytes + 4);
    if (!host)
        return fail(ERR_NOMEM, "out of host memory");
    for (uint32_t i = 0; i < bytes / 4; i++) {
        float v = (float)(noise(i) >> 8) / 8388608.0f - 1.0f;
        memcpy(&host[i], &v, 4);
        if (t->dtype == BF16)
            host[i] = host[i] >> 16 | (host[i] & 0xffff0000u);
    }
    int code = b->c.dev->api->write(b->c.stream, t->mem, 0, host, bytes & ~(size_t)3);
    free(host);
    return code;
}

static int new_tensor(struct bench *b, struct tensor *t, enum dtype type, int64_t rows,
                      int64_t columns)
{
    *t = (struct tensor){.dtype = type, .ndim = 2, .shape = {rows, columns}};
    TRY(b->c.dev->api->alloc(b->c.dev, tensor_bytes(t) + 4, &t->mem));
    return fill_noise(b, t);
}

static void free_tensors(struct bench *b)
{
    for (int i = 0; i < b->count; i++)
        b->c.dev->api->free(b->t[i].mem);
    if (b->c.space.mem)
        b->c.dev->api->free(b->c.space.mem);
    memset(&b->c.space, 0, sizeof b->c.space);
    b->count = 0;
}

// ---- timing -------------------------------------------------------------------------------------

typedef int bench_op(struct bench *b, const struct shape *s);

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Median seconds of one call; each round times as many calls as take about 5 ms.
static int time_op(struct bench *b, bench_op *op, const struct shape *s, double *seconds)
{
    double rounds[ROUNDS];
    int calls = 1;
    TRY(op(b, s));
    TRY(b->c.dev->api->sync(b->c.stream));
    for (int i = -1; i < ROUNDS; i++) {
        double start = now();
        for (int k = 0; k < calls; k++)
            TRY(op(b, s));
        TRY(b->c.dev->api->sync(b->c.stream));
        double each = (now() - start) / calls;
        if (i < 0)
            calls = each < 5e-3 ? 1 + (int)(5e-3 / (each + 1e-7)) : 1;
        else
            rounds[i] = each;
    }
    qsort(rounds, ROUNDS, sizeof *rounds, by_value);
    *seconds = rounds[ROUNDS / 2];
    return 0;
}

// Scratch for an operation: its wish in a dry context, then the memory.
static int prepare(struct bench *b, bench_op *op, const struct shape *s)
{
    b->c.dry = true;
    b->c.space_wanted = 0;
    TRY(op(b, s));
    b->c.dry = false;
    if (b->c.space.mem)
        b->c.dev->api->free(b->c.space.mem);
    memset(&b->c.space, 0, sizeof b->c.space);
    if (b->c.space_wanted == 0)
        return 0;
    return new_tensor(b, &b->c.space, F32, 1, (int64_t)(b->c.space_wanted + 3) / 4);
}

static void report(struct bench *b, const char *op, const struct shape *s, double seconds,
                   double bytes, double flops)
{
    double rate = (flops > 0 ? flops : bytes) / seconds / 1e9, share = bytes / seconds / b->copy;
    fprintf(b->table, "%-18s %-10s %9.1f us %8.1f ", op, s->name, seconds * 1e6, rate);
    if (flops > 0)
        fprintf(b->table, "GFLOP/s\n");
    else
        fprintf(b->table, "GB/s %5.0f%% of a copy\n", 100 * share);
    json_t *row = json_pack("{s:s, s:s, s:s, s:s, s:f, s:f}", "bench", "ops", "name", op, "what",
                            s->name, "type", dtype_name(b->c.dev->act), "seconds", seconds,
                            flops > 0 ? "gflops" : "gbps", rate);
    if (row && flops <= 0)
        json_object_set_new(row, "of_copy", json_real(share));
    json_array_append_new(b->rows, row);
}

// ---- the operations -----------------------------------------------------------------------------
//
// Tensors of a shape: 0..3 activations [M,D]; 4, 5 mod and dmod [N,6D]; 6, 7 qkv and dqkv [M,3D];
// 8 stats; 9, 10 lse and delta; 11 q/k parameters and their gradients [8, hd] one after the other.

enum { X0, X1, X2, X3, MOD, DMOD, QKV, DQKV, STATS, LSE, DELTA, WQ, BQ, WK, BK };

static int tensors(struct bench *b, const struct shape *s)
{
    int64_t rows = (int64_t)s->images * s->tokens, width = (int64_t)s->heads * s->hd;
    enum dtype act = b->c.dev->act;
    const struct {
        enum dtype type;
        int64_t rows, columns;
    } what[] = {
        {act, rows, width},
        {act, rows, width},
        {act, rows, width},
        {act, rows, width},
        {act, s->images, 6 * width},
        {act, s->images, 6 * width},
        {act, rows, 3 * width},
        {act, rows, 3 * width},
        {F32, rows, 4 * s->heads},
        {F32, rows, s->heads},
        {F32, rows, s->heads},
        {F32, 1, s->hd},
        {F32, 1, s->hd},
        {F32, 1, s->hd},
        {F32, 1, s->hd},
    };
    for (b->count = 0; b->count < (int)(sizeof what / sizeof what[0]); b->count++)
        TRY(new_tensor(b, &b->t[b->count], what[b->count].type, what[b->count].rows,
                       what[b->count].columns));
    return 0;
}

static int run_copy(struct bench *b, const struct shape *s)
{
    (void)s;
    return tensor_copy(&b->c, &b->t[X1], &b->t[X0]);
}

static int run_add(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_add(&b->c, &b->t[X1], &b->t[X0]);
}

static int run_silu(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_silu_fwd(&b->c, &b->t[X1], &b->t[X0]);
}

static int run_gelu(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_gelu_fwd(&b->c, &b->t[X1], &b->t[X0]);
}

static int run_gelu_bwd(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_gelu_bwd(&b->c, &b->t[X2], &b->t[X1], &b->t[X0]);
}

// statistics of [M,2] in the room of [M,4H]
static struct tensor row_stats(struct bench *b)
{
    struct tensor t = b->t[STATS];
    t.shape[1] = 2;
    return t;
}

static int run_norm(struct bench *b, const struct shape *s)
{
    (void)s;
    struct tensor stats = row_stats(b);
    return op_layernorm_mod_fwd(&b->c, &b->t[X1], &stats, &b->t[X0], &b->t[MOD], 0,
                                s->heads * s->hd);
}

static int run_norm_bwd(struct bench *b, const struct shape *s)
{
    struct tensor stats = row_stats(b);
    return op_layernorm_mod_bwd(&b->c, &b->t[X2], &b->t[DMOD], &b->t[X1], &b->t[X0], &stats,
                                &b->t[MOD], 0, s->heads * s->hd);
}

static int run_gate(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_gate_residual_fwd(&b->c, &b->t[X2], &b->t[X1], &b->t[X0], &b->t[MOD], 0);
}

static int run_gate_bwd(struct bench *b, const struct shape *s)
{
    (void)s;
    return op_gate_residual_bwd(&b->c, &b->t[X2], &b->t[DMOD], &b->t[X1], &b->t[X0], &b->t[MOD], 0);
}

static int run_qk(struct bench *b, const struct shape *s)
{
    return op_qk_norm_fwd(&b->c, &b->t[DQKV], &b->t[STATS], &b->t[QKV], &b->t[WQ], &b->t[BQ],
                          &b->t[WK], &b->t[BK], s->heads);
}

static int run_qk_bwd(struct bench *b, const struct shape *s)
{
    return op_qk_norm_bwd(&b->c, &b->t[DQKV], &b->t[BQ], &b->t[BQ], &b->t[BK], &b->t[BK],
                          &b->t[QKV], &b->t[STATS], &b->t[WQ], &b->t[WK], s->heads);
}

static int run_attention(struct bench *b, const struct shape *s)
{
    return op_attention_fwd(&b->c, &b->t[X1], &b->t[LSE], &b->t[QKV], s->images, s->heads);
}

static int run_attention_bwd(struct bench *b, const struct shape *s)
{
    return op_attention_bwd(&b->c, &b->t[DQKV], &b->t[DELTA], &b->t[X0], &b->t[X1], &b->t[LSE],
                            &b->t[QKV], s->images, s->heads);
}

static const struct {
    const char *name;
    bench_op *run;
    int passes; // over [M,D], reads and writes
    int flops;  // per T*T*hd of a head
} ops[] = {
    {"add", run_add, 3, 0},
    {"silu_fwd", run_silu, 2, 0},
    {"gelu_fwd", run_gelu, 2, 0},
    {"gelu_bwd", run_gelu_bwd, 3, 0},
    {"layernorm_mod_fwd", run_norm, 2, 0},
    {"layernorm_mod_bwd", run_norm_bwd, 4, 0},
    {"gate_residual_fwd", run_gate, 3, 0},
    {"gate_residual_bwd", run_gate_bwd, 3, 0},
    {"qk_norm_fwd", run_qk, 6, 0},
    {"qk_norm_bwd", run_qk_bwd, 6, 0},
    {"attention_fwd", run_attention, 0, 4},
    {"attention_bwd", run_attention_bwd, 0, 10},
};

static int bench_shape(struct bench *b, const struct shape *s, const char *filter)
{
    double rows = (double)s->images * s->tokens, width = (double)s->heads * s->hd, seconds;
    double pass = rows * width * (double)dtype_size(b->c.dev->act);
    double product = rows * s->tokens * width;
    TRY(time_op(b, run_copy, s, &seconds));
    b->copy = 2 * pass / seconds;
    report(b, "copy", s, seconds, 2 * pass, 0);
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
        if (filter && !strstr(ops[i].name, filter))
            continue;
        TRY(prepare(b, ops[i].run, s));
        TRY(time_op(b, ops[i].run, s, &seconds));
        report(b, ops[i].name, s, seconds, ops[i].passes * pass, ops[i].flops * product);
    }
    return 0;
}

int bench_ops(struct device *dev, const char *filter, json_t *rows, FILE *table)
{
    static const struct shape shapes[] = {
        {"demo T16", 64, 16, 4, 64},   {"demo T64", 64, 64, 6, 64},   {"S/2 T256", 8, 256, 6, 64},
        {"XL/2 T256", 2, 256, 16, 72}, {"S/2 T1024", 2, 1024, 6, 64},
    };
    struct bench b = {.c.dev = dev, .rows = rows, .table = table};
    int code = 0;
    TRY(dev->api->stream_new(dev, &b.c.stream));
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0] && code == 0; i++) {
        code = tensors(&b, &shapes[i]);
        if (code == 0)
            code = bench_shape(&b, &shapes[i], filter);
        free_tensors(&b);
    }
    dev->api->stream_free(b.c.stream);
    return code;
}
