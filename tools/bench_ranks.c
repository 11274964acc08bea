#include "tools/bench_ranks.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static json_t *real_or_null(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *parts(const struct forecast *f)
{
    json_t *list = json_array();
    for (int r = 0; r < f->ranks; r++) {
        const struct rank_forecast *k = &f->rank[r];
        json_array_append_new(list, json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "dense",
                                              k->dense, "experts", k->expert, "exchange",
                                              k->exchange, "stream", k->stream, "reduce", k->reduce,
                                              "update", k->update, "wait", k->wait));
    }
    return list;
}

// How many times its even share of rows the busiest rank's experts get, the mean over blocks: what
// it takes longer there, the others wait. Of placements without copies.
static json_t *busiest(const json_t *load, const struct placement *p)
{
    double sum = 0;
    int blocks = 0;
    for (int l = 0; l < p->layers && p->groups == 1; l++) {
        const json_t *list = json_array_get(load, (size_t)l);
        double all = 0, most = 0;
        for (int r = 0; r < p->ranks && json_is_array(list); r++) {
            double rows = 0;
            for (int e = 0; e < p->experts; e++)
                if (*placement_owner(p, 0, l, e) == r)
                    rows += json_number_value(json_array_get(list, (size_t)e));
            all += rows;
            most = rows > most ? rows : most;
        }
        sum += all > 0 ? most * p->ranks / all : 0;
        blocks += all > 0;
    }
    return blocks > 0 ? json_real(sum / blocks) : json_null();
}

int bench_ranks_add(json_t *row, const char *name, const struct rank_plan *p, double seconds,
                    double waited)
{
    const int ranks = ranks_count();
    if (!p->ranks.exchange)
        return 0;
    double *all = calloc((size_t)ranks, sizeof *all);
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    int code = exchange_gather(ranks_exchange(), &waited, all, sizeof waited);
    json_t *images = json_array(), *experts = json_array(), *waits = json_array();
    for (int r = 0; r < ranks; r++) {
        json_array_append_new(images, json_integer(p->placement.share[r]));
        json_array_append_new(experts, json_integer(placement_held(&p->placement, r)));
        json_array_append_new(waits, json_real(all[r]));
    }
    free(all);
    json_object_set_new(row, "busiest", busiest(json_object_get(row, "load"), &p->placement));
    json_object_set_new(row, "placement", json_string(name));
    json_object_set_new(row, "predicted_ms", real_or_null(1e3 * p->predicted));
    json_object_set_new(row, "off", real_or_null(p->predicted / seconds - 1));
    json_object_set_new(row, "images", images);
    json_object_set_new(row, "experts", experts);
    json_object_set_new(row, "waited", waits);
    json_object_set_new(row, "forecast", parts(&p->forecast));
    return code;
}

// "48:16", or "20% 3%".
static const char *join(const json_t *list, const char *form, double scale, const char *between,
                        char out[128])
{
    size_t i, n = 0;
    const json_t *value;
    out[0] = 0;
    json_array_foreach(list, i, value)
    {
        if (n < 120)
            n += (size_t)snprintf(out + n, 128 - n, "%s", i ? between : "");
        if (n < 120)
            n += (size_t)snprintf(out + n, 128 - n, form, scale * json_number_value(value));
    }
    return out;
}

static double number(const json_t *row, const char *key)
{
    const json_t *value = json_object_get(row, key);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

void bench_ranks_print(const json_t *row, FILE *table)
{
    char waits[128], forecast[80] = "no forecast";
    const char *name = json_string_value(json_object_get(row, "placement"));
    if (!name)
        return;
    if (isfinite(number(row, "predicted_ms")))
        snprintf(forecast, sizeof forecast, "predicted %.2f ms (%+.1f%%)",
                 number(row, "predicted_ms"), 100 * number(row, "off"));
    fprintf(table, "%-12s on %.0f ranks, %s: %s; they wait %s of the time for each other", "",
            number(row, "ranks"), name, forecast,
            join(json_object_get(row, "waited"), "%.0f%%", 100, " ", waits));
    if (isfinite(number(row, "busiest")))
        fprintf(table, "; the busiest rank's experts get %.2f times an even share",
                number(row, "busiest"));
    fputc('\n', table);
}

void bench_ranks_table(const json_t *rows, FILE *table)
{
    size_t i, count = 0;
    const json_t *row;
    char images[128], experts[128];
    json_array_foreach(rows, i, row) count += json_object_get(row, "placement") != NULL;
    if (count < 2)
        return;
    fprintf(table, "\n%-6s %-20s %14s %14s %13s %13s %8s\n", "step", "placement", "images",
            "experts", "predicted", "measured", "error");
    json_array_foreach(rows, i, row)
    {
        const char *name = json_string_value(json_object_get(row, "placement"));
        if (!name)
            continue;
        fprintf(table, "%-6s %-20s %14s %14s ", json_string_value(json_object_get(row, "what")),
                name, join(json_object_get(row, "images"), "%.0f", 1, ":", images),
                join(json_object_get(row, "experts"), "%.0f", 1, ":", experts));
        if (json_object_get(row, "error"))
            fprintf(table, "has not the memory\n");
        else if (isfinite(number(row, "predicted_ms")))
            fprintf(table, "%10.2f ms %10.2f ms %+7.1f%%\n", number(row, "predicted_ms"),
                    number(row, "ms"), 100 * number(row, "off"));
        else
            fprintf(table, "%13s %10.2f ms\n", "-", number(row, "ms"));
    }
}
