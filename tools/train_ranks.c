// What a training run on ranks does beside its steps: RUN_DIR/ranks.csv, and experts that move.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/train_move.h"
#include "runtime/rng.h"
#include "tools/train_run.h"

enum {
    EVERY = 100,
    PREPARING = 3
}; // steps between rows of ranks.csv; first ones that are not timed
static const double WORTH_IT =
    0.05; // of the busiest ranks' rows: less is no reason to move experts

int train_ranks_new(const struct config *c, const char *dir, struct train_ranks *out)
{
    *out = (struct train_ranks){
        .began = now_seconds(), .before = exchange_figures(ranks_exchange()), .predicted = NAN};
    if (!ranks_exchange())
        return 0;
    const size_t experts = (size_t)c->layers * (size_t)c->experts;
    out->load = calloc(experts, sizeof *out->load);
    out->total = calloc(experts, sizeof *out->total);
    if (!out->load || !out->total)
        return fail(ERR_NOMEM, "out of memory");
    snprintf(out->path, sizeof out->path, "%s/ranks.csv", dir);
    return 0;
}

void train_ranks_free(struct train_ranks *r)
{
    free(r->load), free(r->total);
    *r = (struct train_ranks){0};
}

// ---- ranks.csv ----------------------------------------------------------------------------------

// One rank's figures since the last time, [layers + 1, 3]: of each layer rows sent, rows received
// and seconds waited; then seconds, seconds waited in all, bytes summed.
static int own_figures(struct train_ranks *r, struct trainer *t, double *out)
{
    const int L = t->dit->config.layers;
    const struct exchange_figures f = exchange_figures(ranks_exchange());
    for (int l = 0; l < L; l++) {
        struct moe_traffic m = {0};
        if (config_is_moe(&t->dit->config, l))
            TRY(moe_exchange_traffic(t->dit, l, &m));
        out[3 * l] = (double)m.sent, out[3 * l + 1] = (double)m.received, out[3 * l + 2] = m.waited;
    }
    const double now = now_seconds();
    out[3 * L] = now - r->began;
    out[3 * L + 1] = f.waited - r->before.waited;
    out[3 * L + 2] = (double)(f.summed - r->before.summed);
    r->began = now;
    r->before = f;
    return 0;
}

// Empty where it is not known.
static const char *milliseconds(double seconds, char out[32])
{
    out[0] = 0;
    if (isfinite(seconds))
        snprintf(out, 32, "%.3f", 1e3 * seconds);
    return out;
}

static int append(const struct train_ranks *r, const struct trainer *t, int64_t steps,
                  const double *all)
{
    const int L = t->dit->config.layers, width = 3 * (L + 1);
    const bool fresh = access(r->path, F_OK) != 0;
    char predicted[32], measured[32];
    FILE *f = fopen(r->path, "ab");
    if (!f)
        return fail(ERR_IO, "%s: %s", r->path, strerror(errno));
    if (fresh)
        fprintf(f, "step,steps,rank,layer,sent,received,waited,seconds,summed,predicted_ms,"
                   "measured_ms\n");
    for (int rank = 0; rank < ranks_count(); rank++) {
        const double *v = all + (size_t)rank * (size_t)width;
        for (int l = 0; l < L; l++)
            if (config_is_moe(&t->dit->config, l))
                fprintf(f, "%lld,%lld,%d,%d,%.0f,%.0f,%.6f,,,,\n", (long long)t->step,
                        (long long)steps, rank, l, v[3 * l], v[3 * l + 1], v[3 * l + 2]);
        fprintf(f, "%lld,%lld,%d,all,,,%.6f,%.6f,%.0f,%s,%s\n", (long long)t->step,
                (long long)steps, rank, v[3 * L + 1], v[3 * L], v[3 * L + 2],
                milliseconds(r->predicted, predicted),
                milliseconds(r->part / (double)r->part_steps, measured));
    }
    const bool bad = ferror(f) != 0;
    if (fclose(f) != 0 || bad)
        return fail(ERR_IO, "%s: %s", r->path, strerror(errno));
    return 0;
}

static void sum_up(struct train_ranks *r, const double *all, int layers)
{
    const int width = 3 * (layers + 1);
    double most = 0;
    for (int rank = 0; rank < ranks_count(); rank++) {
        const double *v = all + (size_t)rank * (size_t)width;
        for (int l = 0; l < layers; l++)
            r->sent += v[3 * l];
        r->waited += v[3 * layers + 1] / ranks_count();
        most = v[3 * layers] > most ? v[3 * layers] : most;
    }
    r->seconds += most;
}

int train_ranks_note(struct train_ranks *r, struct trainer *t, bool last)
{
    const int L = t->dit->config.layers, width = 3 * (L + 1);
    if (!ranks_exchange() || t->step == r->noted || (!last && t->step - r->noted < EVERY))
        return 0;
    double *mine = calloc((size_t)width * (size_t)(ranks_count() + 1), sizeof *mine);
    if (!mine)
        return fail(ERR_NOMEM, "out of memory");
    int code = own_figures(r, t, mine);
    if (code >= 0)
        code = exchange_gather(ranks_exchange(), mine, mine + width, (size_t)width * sizeof *mine);
    if (code >= 0 && ranks_first())
        code = append(r, t, t->step - r->noted, mine + width);
    sum_up(r, mine + width, L);
    free(mine);
    r->noted = t->step;
    r->part = 0, r->part_steps = 0;
    return code;
}

void train_ranks_step(struct train_ranks *r, double seconds)
{
    if (!ranks_exchange() || r->skipped++ < PREPARING)
        return;
    r->part += seconds, r->part_steps++;
    r->took += seconds, r->steps++;
}

void train_ranks_say(const struct train_ranks *r, int64_t rows)
{
    if (ranks_exchange() && r->seconds > 0)
        say("ranks   waited %.1f%% of the time for each other; %.1f%% of the rows went to another "
            "rank's experts\n",
            100 * r->waited / r->seconds, rows > 0 ? 100 * r->sent / (double)rows : 0.0);
    if (ranks_exchange() && r->steps > 0 && isfinite(r->predicted))
        say("ranks   predicted %.1f ms a step, measured %.1f: %+.0f%%\n", 1e3 * r->predicted,
            1e3 * r->took / (double)r->steps,
            100 * (r->predicted * (double)r->steps / r->took - 1));
}

// ---- experts that move --------------------------------------------------------------------------

int train_ranks_load(struct train_ranks *r, struct trainer *t)
{
    const struct config *c = &t->dit->config;
    int32_t load[512];
    if (!ranks_exchange())
        return 0;
    for (int l = 0; l < c->layers; l++) {
        if (!config_is_moe(c, l))
            continue;
        TRY(dit_read_load(t->dit, l, load));
        for (int e = 0; e < c->experts; e++) {
            const size_t at = (size_t)l * (size_t)c->experts + (size_t)e;
            r->load[at] += load[e];
            r->total[at] += load[e];
        }
    }
    return 0;
}

int train_ranks_write_load(const struct train_ranks *r, const struct config *c, const char *dir)
{
    char path[4200];
    if (!ranks_exchange() || !ranks_first())
        return 0;
    json_t *layers = json_array(),
           *json = json_pack("{s:i, s:o}", "ditmoe_load", 1, "load", layers);
    for (int l = 0; l < c->layers; l++) {
        json_t *row = config_is_moe(c, l) ? json_array() : json_null();
        for (int e = 0; e < c->experts && config_is_moe(c, l); e++)
            json_array_append_new(
                row,
                json_integer((json_int_t)r->total[(size_t)l * (size_t)c->experts + (size_t)e]));
        json_array_append_new(layers, row);
    }
    snprintf(path, sizeof path, "%s/load.json", dir);
    int code = json ? write_json_file(path, json) : fail(ERR_NOMEM, "%s: out of memory", path);
    json_decref(json);
    return code;
}

// Rows of the rank with most for each expert that it holds, in a layer.
static double busiest(const struct placement *p, int layer, const double *load)
{
    double most = 0;
    for (int r = 0; r < p->ranks; r++) {
        double rows = 0;
        int held = 0;
        for (int e = 0; e < p->experts; e++)
            if (*placement_owner(p, 0, layer, e) == r)
                rows += load[e], held++;
        if (held > 0 && rows / held > most)
            most = rows / held;
    }
    return most;
}

// Every rank keeps its number of experts in the layer, and so its memory and the part of the work
// that the placement meant for it; the busiest experts are given out first, each to the rank that
// has least for its number of experts (Graham's longest processing time first).
static void even_out(struct placement *p, int layer, const double *load, double *rows, int *room)
{
    bool given[512] = {false};
    for (int r = 0; r < p->ranks; r++)
        rows[r] = 0, room[r] = 0;
    for (int e = 0; e < p->experts; e++)
        room[*placement_owner(p, 0, layer, e)]++;
    for (int r = 0; r < p->ranks; r++)
        rows[r] = room[r] > 0 ? 1.0 / room[r] : 0; // among equals the rank with most experts
    for (int n = 0; n < p->experts; n++) {
        int expert = -1, best = -1;
        for (int e = 0; e < p->experts; e++)
            if (!given[e] && (expert < 0 || load[e] > load[expert]))
                expert = e;
        for (int r = 0; r < p->ranks; r++)
            if (room[r] > 0 && (best < 0 || rows[r] < rows[best]))
                best = r;
        given[expert] = true;
        *placement_owner(p, 0, layer, expert) = best;
        rows[best] += load[expert];
        room[best]--;
    }
}

// DITMOE_REPLAN=random: any expert anywhere, to test that nothing depends on it.
static bool at_random(struct placement *p, uint64_t seed, int64_t step)
{
    const char *wish = getenv("DITMOE_REPLAN");
    if (!wish || strcmp(wish, "random"))
        return false;
    for (int l = 0; l < p->layers; l++)
        for (int e = 0; e < p->experts; e++)
            if (*placement_owner(p, 0, l, e) != NO_OWNER)
                *placement_owner(p, 0, l, e) =
                    (int)(rng_u32(seed, (uint64_t)step, (uint64_t)(l * p->experts + e)) %
                          (uint32_t)p->ranks);
    return true;
}

// The better placement for the load measured since the last time; returns what it saves, a share of
// the rows that the busiest ranks had.
static double improve(const struct train_ranks *r, struct placement *p)
{
    double before = 0, after = 0;
    double *rows = calloc((size_t)p->ranks, sizeof *rows);
    int *room = calloc((size_t)p->ranks, sizeof *room);
    for (int l = 0; l < p->layers && rows && room; l++) {
        const double *load = r->load + (size_t)l * (size_t)p->experts;
        if (*placement_owner(p, 0, l, 0) == NO_OWNER)
            continue;
        const double was = busiest(p, l, load);
        even_out(p, l, load, rows, room);
        before += was, after += busiest(p, l, load);
    }
    free(rows), free(room);
    return before > 0 ? 1 - after / before : 0;
}

int train_ranks_move(struct train_ranks *r, const struct rank_plan *now, uint64_t seed,
                     int64_t step, struct rank_plan *next, bool *moved)
{
    const struct placement *p = &now->placement;
    *moved = false;
    if (p->groups > 1)
        return fail(ERR_INPUT,
                    "--replan: this placement has copies of experts; it is for placements "
                    "of one group");
    if (now->streamed)
        return fail(ERR_INPUT,
                    "--replan: this placement has experts in host memory; with --offload N "
                    "they may move");
    // ranks that keep out of the exchange know of no load
    TRY(exchange_broadcast(ranks_exchange(), r->load,
                           (size_t)p->layers * (size_t)p->experts * sizeof *r->load, 0));
    TRY(ranks_replan(now, p->batch, now->ranks.copies, next));
    if (at_random(&next->placement, seed, step)) {
        *moved = true;
    } else {
        const double saves = improve(r, &next->placement);
        *moved = saves > WORTH_IT;
        if (*moved)
            say("experts move after step %lld: the busiest ranks get %.0f%% fewer rows\n",
                (long long)step, 100 * saves);
    }
    memset(r->load, 0, (size_t)p->layers * (size_t)p->experts * sizeof *r->load);
    if (!*moved)
        ranks_plan_free(next);
    return 0;
}
