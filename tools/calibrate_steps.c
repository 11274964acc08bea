// What steps on several ranks take beside the work that the forecast counts: real steps of a
// shallow model with one image a rank, of each device alone and of every pair. See calibrate.h.
#include "tools/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench_step.h"

enum { SHALLOW = 1, DEEP = 3, BUSY = 8 }; // layers; characters of a rank in a placement

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
    s.rounds = 7;
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

static int measure(struct device *dev, struct stream *stream, const struct calibrate_settings *o,
                   const char *placement, int images, bool train, struct link_rate *out)
{
    double shallow, deep, less, more;
    TRY(time_step(dev, stream, o, placement, images, SHALLOW, train, &shallow, &less));
    TRY(time_step(dev, stream, o, placement, images, DEEP, train, &deep, &more));
    if (less <= 0 || more <= 0) // no forecast: of another machine, whose cache is not ours
        return 0;
    const double layer = (deep - shallow - (more - less)) / (DEEP - SHALLOW);
    out->layer[train] = fmax(layer, 1e-9);
    out->step[train] = fmax(shallow - less - SHALLOW * fmax(layer, 0), 1e-9);
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

int calibrate_steps(struct exchange *x, struct device *dev, struct stream *stream,
                    const struct calibrate_settings *o, int experts, struct rates *rates)
{
    const int ranks = exchange_ranks(x);
    const struct link_rate none = {.layer = {1e-9, 1e-9}, .step = {1e-9, 1e-9}};
    const size_t size = (size_t)ranks * 2 * BUSY;
    char mine[160], (*all)[160] = calloc((size_t)ranks, sizeof *all), *placement = malloc(size);
    rates_identity(&dev->info, mine);
    int code = all && placement ? exchange_gather(x, mine, all, sizeof mine)
                                : fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    for (int a = 0; a < ranks && code >= 0; a++)
        for (int b = a; b < ranks && code >= 0; b++) {
            code = store(rates, all[a], all[b], &none);
            if (code >= 0)
                code = store(rates, all[b], all[a], &none);
        }
    if (exchange_node_rank(x) == 0 && code >= 0)
        rates_store(rates); // the forecasts of these steps read it
    code = code >= 0 ? exchange_barrier(x) : code;
    struct link_rate *found = calloc((size_t)(ranks * ranks), sizeof *found);
    code = code >= 0 && !found ? fail(ERR_NOMEM, "no host memory for %d ranks", ranks) : code;
    for (int a = 0; a < ranks; a++)
        for (int b = a; b < ranks; b++)
            for (int train = 0; train < 2 && code >= 0; train++) {
                name_placement(ranks, a, b, experts, placement, size);
                code = measure(dev, stream, o, placement, a == b ? 1 : 2, train,
                               &found[a * ranks + b]);
            }
    for (int a = 0; a < ranks; a++) // of alike devices what a pair takes counts, not one alone
        for (int b = a; b < ranks && code >= 0; b++) {
            code = store(rates, all[a], all[b], &found[a * ranks + b]);
            if (code >= 0)
                code = store(rates, all[b], all[a], &found[a * ranks + b]);
        }
    free(found), free(all), free(placement);
    return code;
}
