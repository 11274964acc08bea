// The rates of one device. See calibrate.h, runtime/rates.h.
#include "tools/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/cost.h"
#include "tools/bench_step.h"
#include "tools/measure.h"

enum { EXPERTS = 4, ROUNDS = 5, STEP_LAYERS = 2, HEAD = 64, TOKENS = 256 };
static const double ROUND_SECONDS = 0.02,
                    CALL_MOST = 0.25; // a product that takes longer tells nothing new

// One thing to be timed: a product, an attention, or a copy.
struct work {
    struct context c;
    struct plan *plan;
    struct gemm gemm;
    struct tensor a, b, y, offsets, space;
    void *host;
    size_t bytes;
    int images;
};

static int time_work(struct work *w, int (*run)(void *user), double *seconds)
{
    return measure_calls(w->c.dev, w->c.stream, ROUNDS, ROUND_SECONDS, run, w, seconds);
}

static int begin(struct work *w, struct device *dev, struct stream *stream)
{
    *w = (struct work){.c = {.dev = dev, .stream = stream}};
    return plan_new(dev, &w->plan);
}

static void end(struct work *w)
{
    if (w->plan)
        plan_free(w->plan);
    free(w->host);
}

static int fill(struct work *w, const struct tensor *t)
{
    return noise_fill_device(w->c.dev, w->c.stream, t->mem, tensor_bytes(t), t->dtype);
}

// ---- products -----------------------------------------------------------------------------------

static int run_product(void *user)
{
    struct work *w = user;
    return w->c.dev->api->gemm(w->c.stream, &w->gemm);
}

// y[rows,n] = a[rows,k] b[n,k]^T, or of EXPERTS matrices b with as many rows each.
static int plan_product(struct work *w, int rows, int n, int k, bool ragged)
{
    struct device *dev = w->c.dev;
    const enum dtype weights = dev->half_weights ? BF16 : F32;
    const int64_t m = ragged ? (int64_t)EXPERTS * rows : rows, many = ragged ? EXPERTS : 1;
    TRY(PLAN_TENSOR(w->plan, "a", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &w->a, m, k));
    TRY(PLAN_TENSOR(w->plan, "b", PLAN_ACTIVATIONS, weights, 0, PLAN_FOREVER, &w->b, many, n, k));
    TRY(PLAN_TENSOR(w->plan, "y", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &w->y, m, n));
    TRY(PLAN_TENSOR(w->plan, "offsets", PLAN_ACTIVATIONS, I32, 0, PLAN_FOREVER, &w->offsets,
                    EXPERTS + 1));
    w->gemm = (struct gemm){.m = (int)m, .n = n, .k = k, .trans_b = true};
    w->gemm.ragged = ragged ? GEMM_RAGGED_M : GEMM_PLAIN;
    w->gemm.groups = ragged ? EXPERTS : 0;
    w->gemm.type_a = w->gemm.type_c = dev->act;
    w->gemm.type_b = weights;
    const size_t space = dev->api->gemm_space(dev, &w->gemm);
    return PLAN_TENSOR(w->plan, "space", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &w->space,
                       (int64_t)(space / 4 + 1));
}

static int measure_product(struct work *w, int rows, double *seconds)
{
    int32_t offsets[EXPERTS + 1];
    for (int e = 0; e <= EXPERTS; e++)
        offsets[e] = e * rows;
    TRY(plan_layout(w->plan, 0));
    TRY(plan_commit(w->plan));
    TRY(fill(w, &w->a));
    TRY(fill(w, &w->b));
    TRY(tensor_write(&w->c, &w->offsets, offsets));
    w->gemm.a = w->a.mem;
    w->gemm.b = w->b.mem;
    w->gemm.c = w->y.mem;
    w->gemm.offsets = w->offsets.mem;
    w->gemm.space = w->space.mem;
    return time_work(w, run_product, seconds);
}

static int product_rate(struct device *dev, struct stream *stream, int rows, int n, int k,
                        bool ragged, double *rate, double *seconds)
{
    struct work w;
    int code = begin(&w, dev, stream);
    if (code >= 0)
        code = plan_product(&w, rows, n, k, ragged);
    if (code >= 0)
        code = measure_product(&w, rows, seconds);
    if (code >= 0)
        *rate = 2.0 * w.gemm.m * n * k / *seconds;
    end(&w);
    return code;
}

// By rows, until a product takes long or does not fit: what is left is as fast as the last.
static int measure_table(struct device *dev, struct stream *stream, int n, int k, bool ragged,
                         double table[RATE_CLASSES])
{
    double seconds = 0;
    for (int i = 0; i < RATE_CLASSES; i++) {
        table[i] = i ? table[i - 1] : 0;
        if (i > 0 && 4 * seconds > CALL_MOST)
            continue;
        int code = product_rate(dev, stream, rate_rows[i], n, k, ragged, &table[i], &seconds);
        if (code == ERR_NOMEM && i > 0)
            continue;
        TRY(code);
        table[i] = i && table[i] < table[i - 1] ? table[i - 1]
                                                : table[i]; // noise: more rows are not slower
    }
    return 0;
}

// ---- the others ---------------------------------------------------------------------------------

static int run_attention(void *user)
{
    struct work *w = user;
    return op_attention_fwd(&w->c, &w->y, NULL, &w->a, w->images, (int)(w->y.shape[1] / HEAD));
}

static int measure_attention(struct device *dev, struct stream *stream, int width, double *rate)
{
    struct work w;
    double seconds;
    int code = begin(&w, dev, stream);
    w.images = dev->info.kind == DEVICE_CPU ? 4 : 64;
    const int64_t D = width > HEAD ? width / HEAD * HEAD : HEAD, M = (int64_t)w.images * TOKENS;
    if (code >= 0)
        code =
            PLAN_TENSOR(w.plan, "qkv", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &w.a, M, 3 * D);
    if (code >= 0)
        code = PLAN_TENSOR(w.plan, "o", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &w.y, M, D);
    if (code >= 0)
        code = plan_layout(w.plan, 0);
    if (code >= 0)
        code = plan_commit(w.plan);
    if (code >= 0)
        code = fill(&w, &w.a);
    if (code >= 0)
        code = time_work(&w, run_attention, &seconds);
    if (code >= 0)
        *rate = 4.0 * w.images * TOKENS * TOKENS * (double)D / seconds;
    end(&w);
    return code;
}

static int run_silu(void *user)
{
    struct work *w = user;
    return op_silu_fwd(&w->c, &w->y, &w->a);
}

static int run_write(void *user)
{
    struct work *w = user;
    return w->c.dev->api->write(w->c.stream, w->a.mem, 0, w->host, w->bytes);
}

static int run_read(void *user)
{
    struct work *w = user;
    return w->c.dev->api->read(w->c.stream, w->a.mem, 0, w->host, w->bytes);
}

// From and to memory that is locked where it can be, as windows between ranks are.
static int measure_copies(struct work *w, struct device_rates *out)
{
    struct device *dev = w->c.dev;
    const bool pinned = dev->api->pin && dev->api->pin(dev, w->host, w->bytes) == 0;
    double seconds;
    int code = time_work(w, run_read, &seconds);
    if (code >= 0) {
        out->to_host = (double)w->bytes / seconds;
        code = time_work(w, run_write, &seconds);
        out->to_device = (double)w->bytes / seconds;
    }
    if (pinned)
        dev->api->unpin(dev, w->host);
    return code;
}

// An operation on next to nothing; copies from and to the host.
static int measure_memory(struct work *w, struct device_rates *out)
{
    const struct device *dev = w->c.dev;
    const int64_t many = (dev->info.kind == DEVICE_CPU ? 16 : 128) << 18;
    struct tensor a, y;
    TRY(PLAN_TENSOR(w->plan, "a", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &w->a, many));
    TRY(PLAN_TENSOR(w->plan, "small", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &a, 64));
    TRY(PLAN_TENSOR(w->plan, "small too", PLAN_ACTIVATIONS, dev->act, 0, PLAN_FOREVER, &y, 64));
    TRY(plan_layout(w->plan, 0));
    TRY(plan_commit(w->plan));
    TRY(fill(w, &w->a));
    w->bytes = tensor_bytes(&w->a);
    w->host = malloc(w->bytes);
    if (!w->host)
        return fail(ERR_NOMEM, "no host memory for %zu bytes", w->bytes);
    TRY(measure_copies(w, out));
    w->a = a;
    w->y = y;
    TRY(fill(w, &w->a));
    return time_work(w, run_silu, &out->launch);
}

// ---- real steps ---------------------------------------------------------------------------------

// Seconds of a step by bench_step, NAN when the model is too large for the device.
static int measure_step(struct device *dev, struct stream *stream,
                        const struct calibrate_settings *o, int layers, int batch, bool train,
                        double *seconds)
{
    char images[16];
    struct step_settings s = {.models = o->model, .overrides = o->overrides, .alone = true};
    struct ceilings ceilings = {.size = 1, .flops = 1, .copy = 1};
    json_t *rows = json_array();
    FILE *nowhere = fopen("/dev/null", "w");
    snprintf(images, sizeof images, "%d", batch);
    s.batches = images;
    s.overrides.layers = layers;
    s.rounds = 5;
    s.what = train ? 1 : 2;
    int code = nowhere && rows ? bench_step(dev, stream, &s, &ceilings, rows, nowhere)
                               : fail(ERR_IO, "/dev/null: cannot be written");
    const double ms = json_number_value(json_object_get(json_array_get(rows, 0), "ms"));
    *seconds = ms > 0 ? 1e-3 * ms : NAN;
    json_decref(rows);
    if (nowhere)
        fclose(nowhere);
    return code == ERR_NOMEM ? 0 : code;
}

static int forecast_seconds(const struct device_rates *rates, enum device_kind kind,
                            const struct config *c, int batch, bool train, double *seconds)
{
    const struct cost_options options = {.kind = kind,
                                         .bf16 = rates->bf16,
                                         .train = train,
                                         .batch = batch,
                                         .alone = true,
                                         .overlap = 1};
    struct cluster_rank rank = {.kind = kind, .rates = *rates, .memory = UINT64_MAX};
    struct link_rate self = {0};
    uint64_t host = UINT64_MAX;
    struct device_rates none = {0};
    const struct cluster cluster = {.ranks = 1,
                                    .rank = &rank,
                                    .nodes = 1,
                                    .host_memory = &host,
                                    .host = &none,
                                    .link = &self,
                                    .copies = 1};
    struct model_cost cost = {0};
    struct placement p = {0};
    struct forecast f = {0};
    int code = model_cost_new(c, &options, &cost);
    if (code >= 0)
        code = placement_uniform(1, cost.layers, cost.experts, cost.moe, batch, &p);
    if (code >= 0)
        code = forecast_step(&cluster, &cost, NULL, &p, &f);
    *seconds = f.step;
    forecast_free(&f);
    placement_free(&p);
    model_cost_free(&cost);
    return code;
}

static int measure_correction(struct device *dev, struct stream *stream,
                              const struct calibrate_settings *o, const struct config *c,
                              bool train, struct device_rates *rates)
{
    struct config shallow = *c;
    double measured, forecast;
    shallow.layers = c->layers < STEP_LAYERS ? c->layers : STEP_LAYERS;
    TRY(measure_step(dev, stream, o, shallow.layers, o->batch, train, &measured));
    TRY(forecast_seconds(rates, dev->info.kind, &shallow, o->batch, train, &forecast));
    if (isfinite(measured) && forecast > 0)
        *(train ? &rates->train : &rates->sample) = measured / forecast;
    return 0;
}

// ---- all ----------------------------------------------------------------------------------------

int calibrate_device(struct device *dev, struct stream *stream, const struct calibrate_settings *o,
                     const struct config *c, struct device_rates *out)
{
    const struct device_info *info = &dev->info;
    const int D = c->hidden;
    struct ceilings ceilings;
    struct work w;
    *out = (struct device_rates){.bf16 = dev->act == BF16,
                                 .sharing = out->sharing > 1 ? out->sharing : 1,
                                 .width = D,
                                 .sample = 1,
                                 .train = 1,
                                 .measured = true};
    snprintf(out->name, sizeof out->name, "%s", info->name);
    snprintf(out->driver, sizeof out->driver, "%s", info->driver);
    snprintf(out->pci, sizeof out->pci, "%s", info->pci);
    snprintf(out->key, sizeof out->key, "%s", info->key);
    TRY(measure_ceilings(dev, stream, &ceilings));
    out->memory = ceilings.copy;
    TRY(measure_table(dev, stream, 3 * D, D, false, out->dense));
    TRY(measure_table(dev, stream, 2 * MLP_RATIO * D, D, true, out->ragged));
    TRY(measure_attention(dev, stream, D, &out->attention));
    int code = begin(&w, dev, stream);
    if (code >= 0)
        code = measure_memory(&w, out);
    end(&w);
    TRY(code);
    TRY(measure_correction(dev, stream, o, c, false, out));
    return measure_correction(dev, stream, o, c, true, out);
}
