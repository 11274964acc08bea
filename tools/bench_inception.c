#include "tools/bench_inception.h"

#include <stdlib.h>

#include "model/inception.h"
#include "tools/bench_profile.h"
#include "tools/progress.h"

struct bench {
    struct device *dev;
    struct stream *stream;
    const struct step_settings *o;
    const struct ceilings *ceilings;
    struct bench_profile *profile; // or NULL
    json_t *rows;
    FILE *table;
};

static const char name[] = "Inception v3, FID's";

static void add_row(const struct bench *b, const struct inception *n, double seconds)
{
    char rate[32], memory[32];
    const double flops = inception_flops(n) / seconds, bytes = (double)plan_total(n->plan);
    fprintf(b->table, "%-20s %5d %9.2f ms %10.2f %15s %6.1f%% %10s\n", name, n->batch,
            1e3 * seconds, n->batch / seconds, format_rate(flops, "FLOP", rate),
            100 * flops / b->ceilings->flops, format_bytes(bytes, memory));
    fflush(b->table);
    json_array_append_new(b->rows,
                          json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:I}", "bench",
                                    "inception", "name", name, "type", dtype_name(b->dev->act),
                                    "batch", n->batch, "seconds", seconds, "images_per_s",
                                    n->batch / seconds, "gflops", 1e-9 * flops, "of_product",
                                    flops / b->ceilings->flops, "memory", (json_int_t)bytes));
}

// Images of 256 x 256 whose pixels are noise.
static int fill_input(struct inception *n)
{
    enum { SIDE = 256 };
    struct image *images = calloc((size_t)n->batch, sizeof *images), one;
    int code = images ? image_new(SIDE, SIDE, 3, &one) : fail(ERR_NOMEM, "out of memory");
    if (code >= 0) {
        uint32_t state = 1;
        for (int i = 0; i < 3 * SIDE * SIDE; i++)
            one.pixels[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
        for (int i = 0; i < n->batch; i++)
            images[i] = one;
        code = inception_put(n, images, n->batch);
        image_free(&one);
    }
    free(images);
    return code;
}

static int run(void *user)
{
    return inception_run(user);
}

static int profile_run(const struct bench *b, struct inception *n)
{
    struct profile *p;
    TRY(profile_new(&n->ctx, &p));
    int code = profile_start(p);
    if (code >= 0)
        code = inception_run(n);
    const int stopped = profile_stop(p);
    code = code < 0 ? code : stopped;
    if (code >= 0)
        code = bench_profile_add(b->profile, p, name, "features", n->batch, 1);
    profile_free(p);
    return code;
}

static int bench_batch(const struct bench *b, int batch)
{
    struct inception *n;
    double seconds = 0;
    TRY(inception_new(b->dev, b->stream, NULL, batch, INCEPTION_PYTORCH_FID, 0, &n));
    int code = fill_input(n);
    if (code >= 0)
        code = measure_calls(b->dev, b->stream, b->o->rounds, 0.2, run, n, &seconds);
    if (code >= 0)
        add_row(b, n, seconds);
    if (code >= 0 && b->profile)
        code = profile_run(b, n);
    inception_free(n);
    return code;
}

static int bench_batches(const struct bench *b)
{
    for (const char *batch = b->o->batches; *batch;) {
        char *end;
        const long n = strtol(batch, &end, 10);
        if (end == batch || n < 1 || n > 1024 || (*end && *end != ','))
            return fail(ERR_INPUT, "--batch %s: not a list of numbers such as 1,8", b->o->batches);
        TRY(bench_batch(b, (int)n));
        batch = *end ? end + 1 : end;
    }
    return 0;
}

int bench_inception(struct device *dev, struct stream *stream, const struct step_settings *o,
                    const struct ceilings *ceilings, json_t *rows, FILE *table)
{
    struct bench_profile profile = {.ceilings = ceilings};
    const struct bench b = {.dev = dev,
                            .stream = stream,
                            .o = o,
                            .ceilings = ceilings,
                            .profile = o->profile || o->trace ? &profile : NULL,
                            .rows = rows,
                            .table = table};
    fprintf(table, "%-20s %5s %12s %10s %15s %7s %10s\n", "network", "batch", "time", "images/s",
            "rate", "product", "memory");
    int code = bench_batches(&b);
    if (code >= 0 && o->profile)
        bench_profile_print(&profile, stderr);
    if (code >= 0 && o->trace)
        code = bench_profile_trace(&profile, o->trace);
    bench_profile_free(&profile);
    return code;
}
