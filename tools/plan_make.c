// Making a plan: how many ranks share a set of experts, where these are, what it takes. See plan.h.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/plan.h"

enum { GROUP_MOST = 64 }; // ranks that share one set of experts, at most

// ---- expert load --------------------------------------------------------------------------------

static int normalise(const json_t *rows, int layers, int experts, double *out)
{
    if (json_array_size(rows) != (size_t)layers)
        return fail(ERR_INPUT, "\"load\" is not an array of %d layers", layers);
    for (int l = 0; l < layers; l++) {
        const json_t *row = json_array_get(rows, (size_t)l);
        double sum = 0, *to = out + (size_t)l * (size_t)experts;
        if (json_is_null(row)) // a layer without experts
            continue;
        if (json_array_size(row) != (size_t)experts)
            return fail(ERR_INPUT, "layer %d of \"load\" is not an array of %d numbers", l,
                        experts);
        for (int e = 0; e < experts; e++) {
            const json_t *value = json_array_get(row, (size_t)e);
            to[e] = json_number_value(value);
            if (!json_is_number(value) || !isfinite(to[e]) || to[e] < 0)
                return fail(ERR_INPUT, "layer %d of \"load\", expert %d: not a number from 0 up", l,
                            e);
            sum += to[e];
        }
        for (int e = 0; e < experts; e++)
            to[e] = sum > 0 ? to[e] / sum : 1.0 / experts;
    }
    return 0;
}

int load_read(const char *path, int layers, int experts, double **out)
{
    json_error_t wrong;
    json_t *json = json_load_file(path, JSON_REJECT_DUPLICATES, &wrong);
    *out = NULL;
    if (!json && json_error_code(&wrong) == json_error_cannot_open_file)
        return fail(ERR_IO, "%s: cannot be read", path);
    if (!json)
        return fail(ERR_INPUT, "%s: not JSON: line %d: %s", path, wrong.line, wrong.text);
    double *load = calloc((size_t)layers * (size_t)experts + 1, sizeof *load);
    int code = 0;
    if (!load)
        code = fail(ERR_NOMEM, "no host memory for %d layers", layers);
    else if (json_integer_value(json_object_get(json, "ditmoe_load")) != 1)
        code = fail(ERR_INPUT, "not a file of expert loads (no \"ditmoe_load\": 1)");
    else
        code = normalise(json_object_get(json, "load"), layers, experts, load);
    json_decref(json);
    if (code < 0) {
        free(load);
        return fail_in(code, "%s", path);
    }
    *out = load;
    return 0;
}

// ---- the model ----------------------------------------------------------------------------------

static int make_cost(const struct plan_settings *o, const struct cluster *c, int batch,
                     struct plan_result *r)
{
    struct cost_options options = {.kind = DEVICE_CPU, .bf16 = o->precision, .train = o->what == 0};
    for (int i = 0; i < c->ranks; i++)
        if (c->rank[i].kind != DEVICE_CPU)
            options.kind = c->rank[i].kind;
    options.recompute = o->recompute;
    options.early = o->early;
    options.guided = o->guided;
    options.batch = batch / c->ranks > 0 ? batch / c->ranks : 1;
    options.alone = c->ranks == 1;
    options.headroom = (double)o->headroom;
    options.overlap = o->overlap;
    model_cost_free(&r->cost);
    r->options = options;
    TRY(model_cost_new(&r->config, &options, &r->cost));
    model_title(o->model, &r->config, r->title);
    return 0;
}

// ---- how many ranks share experts ---------------------------------------------------------------

// All devices of a set alike, so that any part of it is like any other.
static bool alike(const struct cluster *c)
{
    for (int r = 1; r < c->ranks; r++)
        if (strcmp(c->rank[r].rates.name, c->rank[0].rates.name) ||
            c->rank[r].memory != c->rank[0].memory)
            return false;
    return true;
}

static int group_batch(const struct plan_settings *o, const struct cluster *c, int batch)
{
    (void)o;
    return (batch + c->copies - 1) / c->copies;
}

// The forecast with a rule's placement, for a group of this size.
static int forecast_group(const struct plan_settings *o, struct machines *m, int nodes, int ranks,
                          int batch, struct plan_result *r, double *step, double *missing)
{
    struct cluster c = {0};
    struct placement p = {0};
    struct forecast f = {0};
    TRY(machines_cluster(m, o, nodes, ranks, &c));
    const int images = group_batch(o, &c, batch);
    int code = make_cost(o, &c, images, r);
    if (code >= 0)
        code = policy_place(POLICY_UNIFORM, &c, &r->cost, r->load, images, &p);
    if (code >= 0)
        code = forecast_step(&c, &r->cost, r->load, &p, &f);
    *step = f.step;
    *missing = f.missing;
    placement_free(&p);
    forecast_free(&f);
    cluster_free(&c);
    return code;
}

// Is a group of `ranks` possible: whole parts of a set, or whole sets?
static bool group_possible(int ranks, int in_set, int nodes, int batch)
{
    const int total = in_set * nodes;
    return ranks >= 1 && ranks <= GROUP_MOST && total % ranks == 0 &&
           (in_set % ranks == 0 || ranks % in_set == 0) && batch >= total / ranks;
}

// May a group be a part of a set of machines? Where all its devices are alike.
static int can_divide(const struct plan_settings *o, struct machines *m, int nodes, bool *out)
{
    struct cluster set;
    TRY(machines_cluster(m, o, nodes, machines_ranks(m, o), &set));
    *out = alike(&set) && m->count == 1;
    cluster_free(&set);
    return 0;
}

// The size of group with the fastest forecast; whole sets where their devices are not alike.
static int choose_group(const struct plan_settings *o, struct machines *m, int nodes, int batch,
                        bool divisible, struct plan_result *r, int *out)
{
    const int in_set = machines_ranks(m, o);
    double best_step = INFINITY, best_missing = INFINITY;
    *out = 0;
    for (int ranks = 1; ranks <= in_set * nodes && ranks <= GROUP_MOST; ranks++) {
        double step, missing;
        if (!group_possible(ranks, in_set, nodes, batch) || (ranks < in_set && !divisible))
            continue;
        TRY(forecast_group(o, m, nodes, ranks, batch, r, &step, &missing));
        if (missing < best_missing || (missing == best_missing && step < best_step * (1 - 1e-9))) {
            best_step = step;
            best_missing = missing;
            *out = ranks;
        }
    }
    if (*out == 0)
        return fail(ERR_INPUT, "a batch of %d images is too small for %d ranks in groups of %d",
                    batch, in_set * nodes, in_set);
    return 0;
}

// ---- a plan -------------------------------------------------------------------------------------

static int place(const struct plan_settings *o, bool compare, struct plan_result *r, int images)
{
    for (int policy = 0; policy < POLICIES; policy++) {
        struct placement p = {0};
        struct forecast f = {0};
        if (!compare && policy != o->policy)
            continue;
        int code = policy_place((enum policy)policy, &r->cluster, &r->cost, r->load, images, &p);
        if (code >= 0)
            code = forecast_step(&r->cluster, &r->cost, r->load, &p, &f);
        r->policies[policy] = f.missing > 0 ? INFINITY : f.step;
        if (code >= 0 && policy == o->policy && !o->placement) {
            placement_stream_whole(&p); // at the same pace: copies go on from layer to layer
            r->one = p;
            r->forecast = f;
        } else {
            placement_free(&p);
            forecast_free(&f);
        }
        TRY(code);
    }
    if (!o->placement)
        return 0;
    TRY(placement_read(o->placement, &r->one));
    TRY(placement_matches(&r->one, r->cluster.ranks, r->cost.layers, r->cost.experts, r->cost.moe));
    placement_rescale(&r->one, images);
    return forecast_step(&r->cluster, &r->cost, r->load, &r->one, &r->forecast);
}

// ---- memory to the byte -------------------------------------------------------------------------

// A rank that needs what the one before it needs: as many images, experts and rows.
static bool like_before(const struct placement *p, int rank)
{
    if (rank == 0 || p->share[rank] != p->share[rank - 1])
        return false;
    for (int l = 0; l < p->layers; l++)
        if (placement_list(p, rank, l, NULL) != placement_list(p, rank - 1, l, NULL) ||
            placement_streams(p, rank, l) != placement_streams(p, rank - 1, l))
            return false;
    return true;
}

static bool at_host(const struct placement *p)
{
    for (int i = 0; i < p->groups * p->layers * p->experts; i++)
        if (p->home[i] == HOME_HOST)
            return true;
    return false;
}

// Bytes of hosts' memory that are missing: for experts, and for CPU devices.
static int missing_at_hosts(const struct plan_result *r, double *missing)
{
    const struct cluster *c = &r->cluster;
    double *need = calloc((size_t)c->nodes, sizeof *need);
    if (!need)
        return fail(ERR_NOMEM, "no host memory for %d machines", c->nodes);
    for (int i = 0; i < c->ranks; i++) {
        const struct rank_forecast *f = &r->forecast.rank[i];
        need[c->rank[i].node] +=
            f->host_memory + (c->rank[i].kind == DEVICE_CPU ? f->memory : 0);
    }
    *missing = 0;
    for (int n = 0; n < c->nodes; n++)
        *missing += fmax(0, need[n] - (double)c->host_memory[n]);
    free(need);
    return 0;
}

// The plan of the model itself in the place of the line through some of its plans; *over: by how
// much the line was short where that makes a rank too large.
static int plan_each_rank(struct plan_result *r, double *over)
{
    struct forecast *f = &r->forecast;
    double bytes = 0;
    *over = 0;
    if (at_host(&r->one))
        return 0;
    f->missing = 0;
    f->missing_rank = -1;
    for (int i = 0; i < r->cluster.ranks; i++) {
        const double limit = (double)r->cluster.rank[i].memory, line = f->rank[i].memory;
        if (line <= 0) // idle
            continue;
        if (!like_before(&r->one, i))
            TRY(model_memory_rank(&r->config, &r->options, &r->one, i, &bytes));
        f->rank[i].memory = bytes;
        if (bytes <= limit)
            continue;
        f->missing += bytes - limit;
        f->missing_rank = i;
        *over = line <= limit && bytes - line > *over ? bytes - line : *over;
    }
    TRY(missing_at_hosts(r, &bytes));
    f->missing += bytes;
    return 0;
}

// A process by itself, with no file to follow: its experts in host memory are those that a run would take
// there by itself (--offload auto).
static int place_alone(struct plan_result *r, int images)
{
    const struct cluster_rank *k = &r->cluster.rank[0];
    struct placement *p = &r->one;
    int layers, left;
    double bytes;
    TRY(model_offload(&r->config, &r->options, images * r->cost.passes, (double)k->memory, &layers,
                      &bytes));
    left = layers * p->experts;
    for (int e = 0; e < p->experts; e++) // evenly: copies go on from layer to layer
        for (int l = 0; l < p->layers; l++)
            if (r->cost.moe[l])
                *placement_home(p, 0, l, e) = left-- > 0 ? HOME_STREAMED : HOME_DEVICE;
    forecast_free(&r->forecast);
    TRY(forecast_step(&r->cluster, &r->cost, r->load, p, &r->forecast));
    placement_stream_whole(p);
    struct rank_forecast *f = &r->forecast.rank[0];
    f->memory = bytes;
    TRY(missing_at_hosts(r, &r->forecast.missing));
    r->forecast.missing_rank = bytes > (double)k->memory ? 0 : -1;
    r->forecast.missing += fmax(0, bytes - (double)k->memory);
    return 0;
}

static int place_exactly(const struct plan_settings *o, bool compare, struct plan_result *r,
                         int images)
{
    double over;
    TRY(place(o, compare, r, images));
    if (r->cluster.ranks == 1 && r->cluster.rank[0].kind != DEVICE_CPU && !o->placement &&
        !at_host(&r->one))
        return place_alone(r, images);
    TRY(plan_each_rank(r, &over));
    if (over <= 0 || o->placement)
        return 0;
    r->cost.fixed_memory += over; // the line is too low: once more, with what it left out
    placement_free(&r->one);
    forecast_free(&r->forecast);
    TRY(place(o, compare, r, images));
    return plan_each_rank(r, &over);
}

static int make(const struct plan_settings *o, struct machines *m, int nodes, int batch,
                bool compare, struct plan_result *r)
{
    const int in_set = machines_ranks(m, o);
    int group = o->group;
    TRY(model_config(o->model, &o->overrides, &r->config));
    if (o->load)
        TRY(load_read(o->load, r->config.layers, r->config.experts, &r->load));
    bool divisible;
    TRY(can_divide(o, m, nodes, &divisible));
    if (group && (!group_possible(group, in_set, nodes, batch) || (group < in_set && !divisible)))
        return fail(
            ERR_INPUT,
            "--group %d: %d machines of %d ranks and %d images cannot be so divided (%d at most)",
            group, nodes, in_set, batch, GROUP_MOST);
    if (!group)
        TRY(choose_group(o, m, nodes, batch, divisible, r, &group));
    TRY(machines_cluster(m, o, nodes, group, &r->cluster));
    const int images = group_batch(o, &r->cluster, batch);
    TRY(make_cost(o, &r->cluster, images, r));
    return place_exactly(o, compare, r, images);
}

int plan_make(const struct plan_settings *o, struct machines *m, int nodes, int batch, bool compare,
              struct plan_result *out)
{
    *out = (struct plan_result){.nodes = nodes, .batch = batch};
    int code = make(o, m, nodes, batch, compare, out);
    if (code < 0)
        plan_result_free(out);
    return code;
}

void plan_result_free(struct plan_result *r)
{
    cluster_free(&r->cluster);
    model_cost_free(&r->cost);
    placement_free(&r->one);
    forecast_free(&r->forecast);
    free(r->load);
    *r = (struct plan_result){0};
}

int plan_expand(const struct plan_result *r, struct placement *out)
{
    const struct placement *one = &r->one;
    const int ranks = r->cluster.ranks, copies = r->cluster.copies;
    const size_t places = (size_t)one->groups * (size_t)one->layers * (size_t)one->experts;
    struct placement part = *one;
    TRY(placement_new(ranks * copies, one->groups * copies, one->layers, one->experts, out));
    out->batch = r->batch;
    part.share = malloc((size_t)ranks * sizeof *part.share);
    for (int g = 0; part.share && g < copies; g++) {
        memcpy(part.share, one->share, (size_t)ranks * sizeof *part.share);
        part.batch = one->batch;
        placement_rescale(&part, r->batch / copies + (g < r->batch % copies));
        for (int i = 0; i < ranks; i++) {
            out->share[g * ranks + i] = part.share[i];
            out->group[g * ranks + i] = g * one->groups + one->group[i];
        }
        for (size_t i = 0; i < places; i++) {
            const int owner = one->owner[i];
            out->owner[(size_t)g * places + i] = owner == NO_OWNER ? NO_OWNER : owner + g * ranks;
            out->home[(size_t)g * places + i] = one->home[i];
        }
    }
    if (!part.share) {
        placement_free(out);
        return fail(ERR_NOMEM, "no host memory for a placement");
    }
    free(part.share);
    return 0;
}
