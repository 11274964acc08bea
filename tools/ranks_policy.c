#include "tools/ranks_policy.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/cost.h"
#include "runtime/policy.h"
#include "tools/plan.h"

// ---- what each rank is --------------------------------------------------------------------------

// A rank as it tells the others of itself.
struct card {
    struct device_rates rates;
    char identity[160], key[24];
    uint64_t memory;
    int32_t machine, kind, bf16;
    int32_t known;    // rates are measured
    int32_t straight; // reached by NCCL from others that are
};

// Ranks on CPUs of one machine, if this one is on one: their rates are for so many.
static int sharing_of(const struct card *all, int ranks, const struct card *mine)
{
    int count = 0;
    for (int r = 0; r < ranks && mine->kind == DEVICE_CPU; r++)
        count += all[r].kind == DEVICE_CPU && all[r].machine == mine->machine;
    return count > 1 ? count : 1;
}

static void find_rates(const struct rates *rates, const struct device_info *info, int sharing,
                       struct card *mine)
{
    const struct device_rates *found = rates_find(rates, info, mine->bf16, sharing);
    const struct device_rates *alone = rates_find(rates, info, mine->bf16, 1);
    mine->known = found || alone;
    if (found)
        mine->rates = *found;
    else if (alone)
        mine->rates = rates_shared(alone, sharing);
}

static int gather_cards(struct exchange *x, const struct device *dev, const struct roads *roads,
                        const struct rank_work *w, const struct rates *rates, struct card *all)
{
    const struct device_info *info = &dev->info;
    struct card mine = {.machine = exchange_machine(x),
                        .kind = (int32_t)info->kind,
                        .bf16 = dev->act == BF16,
                        .straight = roads_members(roads) > 1};
    mine.memory = w->memory ? w->memory : (uint64_t)(DEVICE_USABLE * (double)info->memory);
    snprintf(mine.key, sizeof mine.key, "%s", info->key);
    rates_identity(info, mine.identity);
    TRY(exchange_gather(x, &mine, all, sizeof mine));
    find_rates(rates, info, sharing_of(all, exchange_ranks(x), &mine), &mine);
    return exchange_gather(x, &mine, all, sizeof mine);
}

// ---- the cluster that they are ------------------------------------------------------------------

static struct link_rate link_of(const struct rates *rates, const struct card *a,
                                const struct card *b)
{
    const bool straight = a != b && a->straight && b->straight;
    const struct link_rate *measured = rates_link(rates, a->identity, b->identity);
    if (a == b && !measured)
        return (struct link_rate){0};
    if (measured && measured->staged != straight)
        return *measured;
    if (straight)
        return rates_straight_road(a->identity);
    return rates_staged_road(rates, &a->rates, &b->rates);
}

static int fill_cluster(const struct card *all, const struct rates *rates, struct cluster *c)
{
    for (int r = 0; r < c->ranks; r++) {
        struct cluster_rank *k = &c->rank[r];
        *k = (struct cluster_rank){.node = all[r].machine,
                                   .kind = (enum device_kind)all[r].kind,
                                   .rates = all[r].rates,
                                   .cores = all[r].rates.sharing > 1 ? all[r].machine + 1 : 0,
                                   .memory = all[r].memory};
        snprintf(k->name, sizeof k->name, "%s %.120s", all[r].key, all[r].rates.name);
        c->host_memory[all[r].machine] = UINT64_MAX / 4;
        for (int s = 0; s < c->ranks; s++)
            c->link[r * c->ranks + s] = link_of(rates, &all[r], &all[s]);
    }
    return 0;
}

static int make_cluster(const struct card *all, int ranks, const struct rates *rates,
                        struct cluster *out)
{
    const size_t n = (size_t)ranks;
    *out = (struct cluster){.ranks = ranks, .nodes = ranks, .copies = 1};
    out->rank = calloc(n, sizeof *out->rank);
    out->link = calloc(n * n, sizeof *out->link);
    out->host_memory = calloc(n, sizeof *out->host_memory);
    out->host = calloc(n, sizeof *out->host);
    if (!out->rank || !out->link || !out->host_memory || !out->host) {
        cluster_free(out);
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    }
    return fill_cluster(all, rates, out);
}

static int make_cost(const struct card *all, int ranks, const struct rank_options *o,
                     const struct config *c, const struct rank_work *w, struct model_cost *out)
{
    struct cost_options options = {.kind = DEVICE_CPU, .bf16 = all[0].bf16, .train = w->train};
    for (int r = 0; r < ranks; r++)
        if (all[r].kind != DEVICE_CPU)
            options.kind = (enum device_kind)all[r].kind;
    options.recompute = w->recompute;
    options.early = w->early;
    options.guided = w->copies > 1;
    options.batch = w->batch > ranks ? w->batch / ranks : 1;
    options.headroom = o->headroom > 0 ? (double)o->headroom : ranks; // 0: for any load
    options.overlap = 1;
    return model_cost_new(c, &options, out);
}

// ---- the placement ------------------------------------------------------------------------------

// "48:16": numbers of all ranks; returns the end, or NULL.
static const char *numbers(const char *at, int ranks, int *out)
{
    for (int r = 0; r < ranks; r++) {
        char *end;
        const long n = strtol(at, &end, 10);
        if (end == at || n < 0 || n > 1 << 24 || (r + 1 < ranks && *end != ':'))
            return NULL;
        out[r] = (int)n;
        at = r + 1 < ranks ? end + 1 : end;
    }
    return at;
}

// "48:16/6:2": images of each rank, and how many experts of every layer it has.
static int place_by_numbers(const char *text, const struct model_cost *m, int batch,
                            struct placement *p)
{
    int images = 0, experts = 0, code = 0;
    int *held = calloc((size_t)p->ranks, sizeof *held);
    if (!held)
        return fail(ERR_NOMEM, "no host memory for a placement");
    const char *at = numbers(text, p->ranks, p->share);
    at = at && *at == '/' ? numbers(at + 1, p->ranks, held) : NULL;
    for (int r = 0; r < p->ranks; r++)
        images += p->share[r], experts += held[r];
    if (!at || *at || images == 0 || experts != m->experts)
        code = fail(ERR_INPUT,
                    "--placement %s: not the images of %d ranks, a stroke, and their experts of "
                    "each layer, %d in all, such as 48:16/6:2",
                    text, p->ranks, m->experts);
    for (int l = 0; l < p->layers && code >= 0; l++)
        for (int e = 0, r = 0, given = 0; m->moe[l] && e < m->experts; e++) {
            while (given == held[r])
                r++, given = 0;
            *placement_owner(p, 0, l, e) = r;
            given++;
        }
    free(held);
    p->batch = images;
    if (code >= 0)
        placement_rescale(p, batch);
    return code;
}

static int policy_of(const char *name)
{
    for (int p = 0; name && policy_names[p]; p++)
        if (!strcmp(name, policy_names[p]))
            return p;
    return -1;
}

static int place_by_file(const char *path, const struct model_cost *m, int ranks, int batch,
                         struct placement *out)
{
    TRY(placement_read(path, out));
    int code = placement_matches(out, ranks, m->layers, m->experts, m->moe);
    if (code < 0) {
        placement_free(out);
        return fail_in(code, "%s", path);
    }
    placement_rescale(out, batch);
    return 0;
}

static int choose(const char *name, const struct cluster *c, const struct model_cost *m,
                  const double *load, int batch, struct placement *out)
{
    const int policy = policy_of(name ? name : "uniform");
    if (policy ==
        POLICY_UNIFORM) // whatever memory there is: what does not fit, the plan of the run says
        return placement_uniform(c->ranks, m->layers, m->experts, m->moe, batch, out);
    if (policy >= 0)
        return policy_place((enum policy)policy, c, m, load, batch, out);
    if (!strcmp(name, "replicated"))
        return placement_replicated(c->ranks, m->layers, m->experts, m->moe, batch, out);
    if (!strchr(name, '/') || strspn(name, "0123456789:/") != strlen(name))
        return place_by_file(name, m, c->ranks, batch, out);
    TRY(placement_uniform(c->ranks, m->layers, m->experts, m->moe, batch, out));
    int code = place_by_numbers(name, m, batch, out);
    if (code < 0)
        placement_free(out);
    return code;
}

static int say_unknown(const struct card *all, int ranks, int unknown)
{
    char keys[1024] = "";
    for (int r = 0, n = 0; r < ranks && n < (int)sizeof keys; r++)
        n += snprintf(keys + n, sizeof keys - (size_t)n, "%s%s", r ? "," : "", all[r].key);
    return fail(ERR_INPUT,
                "the rates of rank %d (%s, %.80s) are not known; first run: ditmoe calibrate "
                "--device %s%s",
                unknown, all[unknown].key, all[unknown].identity, keys,
                all[unknown].bf16 ? " --precision bf16" : "");
}

// The gradients of several batches are summed and applied once.
static double step_of(const struct forecast *f, int batches)
{
    double reduce = 0, update = 0;
    for (int r = 0; r < f->ranks; r++) {
        reduce = fmax(reduce, f->rank[r].reduce);
        update = fmax(update, f->rank[r].update);
    }
    return f->step + (batches - 1) * (f->step - reduce - update);
}

static int plan(const struct card *all, const struct cluster *c, const struct rank_options *o,
                const struct model_cost *m, const double *load, const struct rank_work *w,
                struct rank_place *out)
{
    int unknown = -1;
    for (int r = c->ranks - 1; r >= 0; r--)
        unknown = all[r].known ? unknown : r;
    if (unknown >= 0 && policy_of(o->placement) == POLICY_COST)
        return fail_in(say_unknown(all, c->ranks, unknown), "--placement cost");
    TRY(choose(o->placement, c, m, load, w->batch, &out->placement));
    if (unknown < 0)
        TRY(forecast_step(c, m, load, &out->placement, &out->forecast));
    if (policy_of(o->placement) >= 0) // in the same time: copies go on from layer to layer
        placement_stream_whole(&out->placement);
    if (unknown < 0) {
        out->predicted = step_of(&out->forecast, w->accumulate > 1 ? w->accumulate : 1);
        return 0;
    }
    say_unknown(all, c->ranks, unknown);
    say("no forecast: %s\n", error_message());
    return 0;
}

// On rank 0.
static int plan_here(const struct card *all, int ranks, const struct rates *rates,
                     const struct rank_options *o, const struct config *c,
                     const struct rank_work *w, struct rank_place *out)
{
    struct cluster cluster = {0};
    struct model_cost cost = {0};
    double *load = NULL;
    int code = o->load ? load_read(o->load, c->layers, c->experts, &load) : 0;
    if (code >= 0)
        code = make_cluster(all, ranks, rates, &cluster);
    if (code >= 0)
        code = make_cost(all, ranks, o, c, w, &cost);
    if (code >= 0)
        code = plan(all, &cluster, o, &cost, load, w, out);
    cluster_free(&cluster);
    model_cost_free(&cost);
    free(load);
    return code;
}

// ---- everybody's --------------------------------------------------------------------------------

static int give(struct exchange *x, struct rank_place *p, int code)
{
    json_t *json = code >= 0 && exchange_rank(x) == 0 ? placement_to_json(&p->placement) : NULL;
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    double head[2] = {text ? (double)strlen(text) + 1 : 0, p->predicted};
    json_decref(json);
    int sent = exchange_broadcast(x, head, sizeof head, 0);
    if (sent >= 0 && head[0] > 0 && !text)
        text = malloc((size_t)head[0]);
    if (sent >= 0 && head[0] > 0)
        sent = text ? exchange_broadcast(x, text, (size_t)head[0], 0)
                    : fail(ERR_NOMEM, "no host memory for a placement");
    if (code >= 0 && sent >= 0 && head[0] <= 0)
        code = fail(ERR_INPUT, "rank 0 has made no placement");
    if (code >= 0 && sent >= 0 && exchange_rank(x) > 0) {
        json = json_loads(text, 0, NULL);
        code = placement_from_json(json, &p->placement);
        json_decref(json);
        p->predicted = head[1];
    }
    free(text);
    return code < 0 ? code : sent;
}

int ranks_place(struct exchange *x, const struct device *dev, const struct roads *roads,
                const struct rank_options *o, const struct config *c, const struct rank_work *w,
                struct rank_place *out)
{
    const int ranks = exchange_ranks(x);
    struct rates rates;
    *out = (struct rank_place){.predicted = NAN};
    struct card *all = calloc((size_t)ranks, sizeof *all);
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    rates_load(&rates);
    int code = gather_cards(x, dev, roads, w, &rates, all);
    if (code >= 0) {
        if (exchange_rank(x) == 0)
            code = plan_here(all, ranks, &rates, o, c, w, out);
        code = give(x, out, code);
    }
    rates_free(&rates);
    free(all);
    return code;
}

// ---- telling ------------------------------------------------------------------------------------

void ranks_place_say(const struct rank_options *o, const struct rank_work *w,
                     const struct rank_place *p)
{
    if (o->quiet)
        return;
    enum { MOST = 16 }; // ranks that are listed
    char images[256] = "", experts[256] = "", forecast[80] = "no forecast";
    const struct placement *q = &p->placement;
    for (int r = 0, i = 0, e = 0; r < q->ranks && q->ranks <= MOST; r++) {
        i += snprintf(images + i, sizeof images - (size_t)i, "%s%d", r ? ":" : " ", q->share[r]);
        e +=
            snprintf(experts + e, sizeof experts - (size_t)e, "%s%d", r ? ":" : " ", placement_held(q, r));
    }
    if (isfinite(p->predicted))
        snprintf(forecast, sizeof forecast, "predicted %.1f ms a %s", 1e3 * p->predicted,
                 w->train ? "step" : "pass");
    say("plan    %s: images%s, experts%s; %s\n", o->placement ? o->placement : "uniform", images,
        experts, forecast);
}
