// What steps on several ranks take beside the work that the forecast counts: real steps of a
// shallow model with one image a rank, of each device alone and of every pair. See calibrate.h.
#include "tools/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench_step.h"

enum { SHALLOW = 1, DEEP = 3, BUSY = 8 }; // layers; characters of a rank in a placement
enum { MANY = 64, FEW = 8 };              // images of a GPU and a CPU
static const double MOST = 5;             // times as long as forecast is not believed

// "1:0:1/4:0:4": ranks a and b have an image each and the experts between them.
static void name_placement(int ranks, int a, int b, int experts, char *out, size_t size)
{
    size_t n = 0;
    for (int half = 0; half < 2; half++)
        for (int r = 0; r < ranks; r++) {
            const int all = half ? experts : 1, own = half ? experts / 2 : 1;
            const int value = a == b   ? (r == a ? all : 0)
                              : r == a ? own
                              : r == b ? all - (half ? own : 0)
                                       : 0;
            n += (size_t)snprintf(out + n, size - n, "%s%d", r ? ":" : half ? "/" : "", value);
        }
}

// Seconds of a step, and of its forecast without what is looked for; on rank 0.
static int time_step(struct device *dev, struct stream *stream, const struct calibrate_settings *o,
                     const char *placement, int images, int layers, bool train, double *seconds,
                     double *forecast)
{
    char batch[16];
    struct ceilings ceilings = {.size = 1, .flops = 1, .copy = 1};
    struct step_settings s = {.models = o->model, .overrides = o->overrides, .batches = batch};
    json_t *rows = json_array();
    FILE *nowhere = fopen("/dev/null", "w");
    snprintf(batch, sizeof batch, "%d", images);
    s.overrides.layers = layers;
    s.rounds = 5;
    s.steps = 4;
    s.what = train ? 1 : 2;
    s.ranks.placement = placement;
    s.ranks.quiet = true;
    int code = rows && nowhere ? bench_step(dev, stream, &s, &ceilings, rows, nowhere)
                               : fail(ERR_IO, "/dev/null: cannot be written");
    const json_t *row = json_array_get(rows, 0);
    *seconds = 1e-3 * json_number_value(json_object_get(row, "ms"));
    *forecast = 1e-3 * json_number_value(json_object_get(row, "predicted_ms"));
    json_decref(rows);
    if (nowhere)
        fclose(nowhere);
    return code;
}

// Seconds of a layer, and of what is beside the layers; and what the forecast says of these.
struct times {
    double layer, rest, forecast_layer, forecast_rest;
};

static int measure(struct device *dev, struct stream *stream, const struct calibrate_settings *o,
                   const char *placement, int images, bool train, struct times *t)
{
    double shallow, deep, less, more;
    TRY(time_step(dev, stream, o, placement, images, SHALLOW, train, &shallow, &less));
    TRY(time_step(dev, stream, o, placement, images, DEEP, train, &deep, &more));
    t->layer = (deep - shallow) / (DEEP - SHALLOW);
    t->rest = shallow - SHALLOW * t->layer;
    t->forecast_layer = (more - less) / (DEEP - SHALLOW);
    t->forecast_rest = less - SHALLOW * t->forecast_layer;
    return 0;
}

static const double LITTLE = 1e-9; // seconds: measured, and next to nothing

static void beside(const struct times *t, double scale, bool train, struct link_rate *out)
{
    out->layer[train] = fmax(t->layer - scale * t->forecast_layer, LITTLE);
    out->step[train] = fmax(t->rest - t->forecast_rest, LITTLE);
}

// One rank at work, with one image and with many: the difference says how much longer its work
// takes than the forecast has it, what is left of one image's time is beside all work.
static int measure_alone(struct device *dev, struct stream *stream,
                         const struct calibrate_settings *o, int experts, int rank, int ranks,
                         char *placement, size_t size, struct device_rates *rates,
                         struct link_rate *out)
{
    const int many = rates->pci[0] ? MANY : FEW; // a CPU has no place on PCI
    for (int train = 0; train < 2; train++) {
        struct times one, all;
        name_placement(ranks, rank, rank, experts, placement, size);
        TRY(measure(dev, stream, o, placement, 1, train, &one));
        TRY(measure(dev, stream, o, placement, many, train, &all));
        const double work = all.forecast_layer - one.forecast_layer;
        double scale = work > 0 ? (all.layer - one.layer) / work : 1;
        scale = scale > MOST ? MOST : scale > 1 / MOST ? scale : 1;
        *(train ? &rates->train : &rates->sample) *= scale;
        beside(&one, scale, train, out);
    }
    return 0;
}

// `alone` [2]: what either of them takes alone, which is in the forecast.
static int measure_pair(struct device *dev, struct stream *stream,
                        const struct calibrate_settings *o, const char *placement,
                        const struct link_rate *const alone[2], struct link_rate *out)
{
    for (int train = 0; train < 2; train++) {
        struct times t;
        TRY(measure(dev, stream, o, placement, 2, train, &t));
        t.forecast_layer -= fmax(alone[0]->layer[train], alone[1]->layer[train]);
        t.forecast_rest -= fmax(alone[0]->step[train], alone[1]->step[train]);
        beside(&t, 1, train, out);
    }
    return 0;
}

// The road as it is known; of a device with itself nothing but what is measured here.
static struct link_rate road_of(const struct rates *rates, const char *from, const char *to)
{
    const struct link_rate *known = rates_link(rates, from, to);
    return known ? *known : (struct link_rate){.latency = 1e-9, .bandwidth = 1e12, .staged = true};
}

static int store(struct rates *rates, const char *from, const char *to, const struct link_rate *new)
{
    struct link_rate road = road_of(rates, from, to);
    for (int i = 0; i < 2; i++)
        road.layer[i] = new->layer[i], road.step[i] = new->step[i];
    return rates_put_link(rates, from, to, road);
}

static int store_both(struct rates *rates, const char *a, const char *b,
                      const struct link_rate *new)
{
    TRY(store(rates, a, b, new));
    return store(rates, b, a, new);
}

// The forecasts of the steps to come read what is stored.
static int publish(struct exchange *x, const struct rates *rates)
{
    if (exchange_node_rank(x) == 0)
        rates_store(rates);
    return exchange_barrier(x);
}

static int all_steps(struct exchange *x, struct device *dev, struct stream *stream,
                     const struct calibrate_settings *o, int experts, struct device_rates *devices,
                     char (*names)[160], char *placement, size_t size, struct rates *rates)
{
    const int ranks = exchange_ranks(x);
    struct link_rate found = {.layer = {LITTLE, LITTLE}, .step = {LITTLE, LITTLE}};
    for (int a = 0; a < ranks; a++)
        for (int b = a; b < ranks; b++)
            TRY(store_both(rates, names[a], names[b], &found));
    TRY(publish(x, rates));
    for (int a = 0; a < ranks; a++) {
        TRY(measure_alone(dev, stream, o, experts, a, ranks, placement, size, &devices[a], &found));
        TRY(rates_put(rates, &devices[a]));
        TRY(store(rates, names[a], names[a], &found));
    }
    TRY(publish(x, rates));
    for (int a = 0; a < ranks; a++)
        for (int b = a + 1; b < ranks; b++) { // of alike devices: in place of what one alone takes
            name_placement(ranks, a, b, experts, placement, size);
            const struct link_rate self[2] = {road_of(rates, names[a], names[a]),
                                              road_of(rates, names[b], names[b])};
            TRY(measure_pair(dev, stream, o, placement,
                             (const struct link_rate *const[]){&self[0], &self[1]}, &found));
            TRY(store_both(rates, names[a], names[b], &found));
        }
    return 0;
}

int calibrate_steps(struct exchange *x, struct device *dev, struct stream *stream,
                    const struct calibrate_settings *o, int experts, struct device_rates *devices,
                    struct rates *rates)
{
    const size_t ranks = (size_t)exchange_ranks(x), size = ranks * 2 * BUSY;
    char mine[160], (*names)[160] = calloc(ranks, sizeof *names), *placement = malloc(size);
    rates_identity(&dev->info, mine);
    int code = names && placement ? exchange_gather(x, mine, names, sizeof mine)
                                  : fail(ERR_NOMEM, "no host memory for %zu ranks", ranks);
    if (code >= 0)
        code = all_steps(x, dev, stream, o, experts, devices, names, placement, size, rates);
    free(names), free(placement);
    return code;
}
