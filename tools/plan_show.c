// A plan as text and as JSON. See plan.h.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tools/plan.h"
#include "tools/topology_show.h"

enum {
    PLACES_MOST = 1 << 22
}; // a placement of more experts is not part of the JSON; --out writes it

// ---- text ---------------------------------------------------------------------------------------

static void print_head(const struct plan_settings *o, const struct machines *m,
                       const struct plan_result *r, FILE *out)
{
    const struct cluster *c = &r->cluster;
    const struct config_counts n = config_count(&r->config);
    fprintf(out, "%s, %.2f billion parameters, %s, %s, %d images a %s\n", r->title,
            (double)n.total / 1e9, o->what ? "sampling" : "training", o->precision ? "bf16" : "f32",
            r->batch, o->what ? (o->guided ? "pass, each with its null class" : "pass") : "step");
    for (int i = 0; i < m->count; i++)
        fprintf(out, "%s%s%s (%s)\n", i ? "and " : "", r->nodes > 1 && !i ? "many of " : "",
                m->list[i]->objects[0].name[0] ? m->list[i]->objects[0].name : "machine",
                m->list[i]->source);
    fprintf(out, "%d %s, %d ranks; ", r->nodes * m->count,
            r->nodes * m->count > 1 ? "machines" : "machine", c->ranks * c->copies);
    if (r->one.groups > 1)
        fprintf(out, "each has all experts\n");
    else
        fprintf(out, "%d share a set of experts (groups: %d)\n", c->ranks, c->copies);
    if (r->nodes * m->count > 1)
        fprintf(out, "network %.1f GB/s a machine, one way (%s)\n", m->network / 1e9, m->words);
    fprintf(out, "rates: %s\n",
            m->guessed ? "published peaks times measured shares (docs/placement.md)"
                       : "measured (ditmoe calibrate)");
}

static void count_experts(const struct plan_result *r, int rank, int homes[HOMES])
{
    enum expert_home home;
    memset(homes, 0, HOMES * sizeof *homes);
    for (int l = 0; l < r->one.layers; l++)
        for (int e = 0; e < r->one.experts; e++)
            if (placement_holds(&r->one, rank, l, e, &home))
                homes[home]++;
}

static void print_rank(const struct plan_result *r, int i, FILE *out)
{
    const struct rank_forecast *f = &r->forecast.rank[i];
    int homes[HOMES];
    count_experts(r, i, homes);
    fprintf(out,
            "%4d  %-26.26s %6d %7d %5d %5d %7.1f %7.1f %7.1f %7.1f %7.1f %7.1f %6.1f of %.1f\n", i,
            r->cluster.rank[i].name, r->one.share[i], homes[HOME_DEVICE], homes[HOME_STREAMED],
            homes[HOME_HOST], 1e3 * f->dense, 1e3 * f->expert, 1e3 * (f->exchange + f->stream),
            1e3 * f->reduce, 1e3 * f->update, 1e3 * f->wait, f->memory / (1 << 30),
            (double)r->cluster.rank[i].memory / (1 << 30));
}

static void print_policies(const struct plan_settings *o, const struct plan_result *r, FILE *out)
{
    fprintf(out, "policies:");
    for (int p = 0; p < POLICIES; p++) {
        if (isinf(r->policies[p]))
            fprintf(out, "%s %s does not fit", p ? "," : "", policy_names[p]);
        else
            fprintf(out, "%s %s %.1f ms", p ? "," : "", policy_names[p], 1e3 * r->policies[p]);
    }
    fprintf(out, "; above: %s\n", o->placement ? o->placement : policy_names[o->policy]);
}

static void print_missing(const struct plan_result *r, FILE *out)
{
    const struct forecast *f = &r->forecast;
    fprintf(out, "does not fit: %.0f bytes (%.1f GiB) are missing", f->missing,
            f->missing / (1 << 30));
    if (f->missing_rank >= 0)
        fprintf(out, ", most on rank %d, which needs %.1f GiB and has %.1f", f->missing_rank,
                f->rank[f->missing_rank].memory / (1 << 30),
                (double)r->cluster.rank[f->missing_rank].memory / (1 << 30));
    fprintf(out, "; a smaller batch, more devices or --recompute would help\n");
}

// How to run a plan of this machine: the devices in the order of its ranks.
static void print_command(const struct plan_settings *o, const struct plan_result *r, FILE *out)
{
    fprintf(out, "to run it: ditmoe %s --device ", o->what ? "sample" : "train");
    for (int i = 0; i < r->cluster.ranks; i++) {
        const char *name = r->cluster.rank[i].name;
        fprintf(out, "%s%.*s", i ? "," : "", (int)strcspn(name, " "), name);
    }
    fprintf(out, " --placement %s --headroom %g ...\n", o->out ? o->out : "FILE (--out writes it)",
            (double)o->headroom);
}

void plan_show(const struct plan_settings *o, const struct machines *m, const struct plan_result *r,
               FILE *out)
{
    const struct forecast *f = &r->forecast;
    double host = 0;
    print_head(o, m, r, out);
    fprintf(out, "\n%-32s %6s %19s %55s\n", "", "", "experts", "milliseconds a step     ");
    fprintf(out, "%4s  %-26s %6s %7s %5s %5s %7s %7s %7s %7s %7s %7s %s\n", "rank", "device",
            "images", "device", "strm", "host", "dense", "experts", "exchng", "reduce", "update",
            "wait", "memory, GiB");
    for (int i = 0; i < r->cluster.ranks; i++) {
        print_rank(r, i, out);
        host += f->rank[i].host_memory;
    }
    fprintf(out, "\n%s %.1f ms; ", o->what ? "pass" : "step", 1e3 * f->step);
    if (o->what)
        fprintf(out, "%.1f images/s at %d steps", f->images_per_second / o->steps, o->steps);
    else
        fprintf(out, "%.1f images/s", f->images_per_second);
    fprintf(out, "; exchange %.1f%%, sums of gradients %.1f%% of it\n", 100 * f->exchange_share,
            100 * f->reduce_share);
    if (host > 0)
        fprintf(out, "%.1f GiB of experts live in host memory, streamed to devices\n",
                host / (1 << 30));
    for (int i = 0; i < r->cluster.ranks; i++)
        if (f->rank[i].memory <= 0)
            fprintf(out, "rank %d has nothing to do: leave it out\n", i);
    print_policies(o, r, out);
    if (f->missing > 0)
        print_missing(r, out);
    else if (o->here && (r->cluster.ranks > 1 || host > 0))
        print_command(o, r, out);
}

void points_print(const struct plan_settings *o, const struct plan_point *list, int count,
                  FILE *out)
{
    fprintf(out, "%8s %6s %6s %8s %10s %12s %11s %9s %8s\n", "machines", "ranks", "group", "images",
            o->what ? "pass, ms" : "step, ms", "images/s", "efficiency", "exchange", "sums");
    for (int i = 0; i < count; i++) {
        const struct plan_point *p = &list[i];
        const double one = list[0].images_per_second / list[0].ranks;
        fprintf(out, "%8d %6d %6d %8d %10.1f %12.1f %10.1f%% %8.1f%% %7.1f%%%s\n", p->nodes,
                p->ranks, p->group, p->batch, 1e3 * p->step,
                o->what ? p->images_per_second / o->steps : p->images_per_second,
                100 * p->images_per_second / p->ranks / one, 100 * p->exchange, 100 * p->reduce,
                p->missing > 0 ? "  does not fit" : "");
    }
}

// ---- JSON ---------------------------------------------------------------------------------------

static json_t *rank_json(const struct plan_result *r, int i)
{
    const struct cluster_rank *k = &r->cluster.rank[i];
    const struct rank_forecast *f = &r->forecast.rank[i];
    int homes[HOMES];
    count_experts(r, i, homes);
    json_t *json = json_pack("{s:s, s:i, s:b, s:i, s:i, s:i, s:i}", "device", k->name, "machine",
                             k->node, "measured", k->rates.measured, "images", r->one.share[i],
                             "experts_device", homes[HOME_DEVICE], "experts_streamed",
                             homes[HOME_STREAMED], "experts_host", homes[HOME_HOST]);
    json_t *seconds = json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "dense", f->dense, "experts",
                                f->expert, "exchange", f->exchange, "stream", f->stream, "reduce",
                                f->reduce, "update", f->update, "wait", f->wait);
    json_object_set_new(json, "seconds", seconds);
    json_object_set_new(json, "memory", json_integer((json_int_t)f->memory));
    json_object_set_new(json, "memory_limit", json_integer((json_int_t)k->memory));
    json_object_set_new(json, "host_memory", json_integer((json_int_t)f->host_memory));
    return json;
}

json_t *plan_to_json(const struct plan_settings *o, const struct plan_result *r)
{
    const struct forecast *f = &r->forecast;
    struct placement all;
    json_t *ranks = json_array(), *policies = json_object(), *placement = NULL;
    for (int i = 0; i < r->cluster.ranks; i++)
        json_array_append_new(ranks, rank_json(r, i));
    for (int p = 0; p < POLICIES; p++)
        json_object_set_new(policies, policy_names[p],
                            isinf(r->policies[p]) ? json_null() : json_real(r->policies[p]));
    const double places =
        (double)r->cluster.copies * r->one.groups * r->one.layers * r->one.experts;
    if (places <= PLACES_MOST && plan_expand(r, &all) >= 0) {
        placement = placement_to_json(&all);
        placement_free(&all);
    }
    return json_pack(
        "{s:s, s:s, s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:I, s:o, s:o, s:o?}", "model",
        r->title, "what", o->what ? "sample" : "train", "policy",
        o->placement ? "manual" : policy_names[o->policy], "batch", r->batch, "group",
        r->cluster.ranks, "groups", r->cluster.copies, "step", f->step, "images_per_second",
        o->what ? f->images_per_second / o->steps : f->images_per_second, "exchange_share",
        f->exchange_share, "reduce_share", f->reduce_share, "missing", (json_int_t)f->missing,
        "ranks", ranks, "policies", policies, "placement", placement);
}
