// ditmoe plan: which device computes what of a model, and how long a step would take: on this
// machine or on machines that are not here.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/plan.h"

enum { POINTS_MOST = 32, NODES_MOST = 65536 };

static const char *const precision_choices[] = {"f32", "bf16", NULL};
static const char *const road_choices[] = {"nccl", "host", NULL};

#define AT(member) offsetof(struct plan_settings, member)
static const struct option_spec plan_options[] = {
    {"model", 'm', OPTION_STRING, "PRESET", "XL/2-8E2A", "size, patch, experts and active experts",
     AT(model), 0, 0, NULL},
    {"batch", 'b', OPTION_INT, "N", "64", "images of a step, all ranks together", AT(batch), 1, 1e8,
     NULL},
    {"sample", 0, OPTION_FLAG, NULL, "no", "sampling; otherwise training", AT(what), 0, 0, NULL},
    {"train", 0, OPTION_FLAG, NULL, "no", "training (what is planned without --sample)", AT(train),
     0, 0, NULL},
    {"policy", 'p', OPTION_CHOICE, "HOW", "cost",
     "uniform: equal parts; memory: by memory; frequency: by measured load; cost: by forecast time",
     AT(policy), 0, 0, policy_names},
    {"placement", 0, OPTION_STRING, "FILE", NULL, "a placement made by hand, instead of a policy",
     AT(placement), 0, 0, NULL},
    {"load", 0, OPTION_STRING, "FILE", NULL,
     "measured load of experts, {\"ditmoe_load\": 1, \"load\": [[tokens, ...] a layer, ...]}; "
     "otherwise "
     "even",
     AT(load), 0, 0, NULL},
    {"precision", 0, OPTION_CHOICE, "TYPE", "bf16", "f32 or bf16", AT(precision), 0, 0,
     precision_choices},
    {"recompute", 0, OPTION_FLAG, NULL, "no", "training: as in ditmoe train", AT(recompute), 0, 0,
     NULL},
    {"early-update", 0, OPTION_FLAG, NULL, "no", "training: as in ditmoe train", AT(early), 0, 0,
     NULL},
    {"guided", 0, OPTION_FLAG, NULL, "yes", "sampling: with guidance, twice the work", AT(guided),
     0, 0, NULL},
    {"steps", 0, OPTION_INT, "N", "50", "sampling: passes that make an image", AT(steps), 1, 100000,
     NULL},
    {0},
};

static const struct option_spec machine_options[] = {
    {"here", 0, OPTION_FLAG, NULL, "no", "on this machine", AT(here), 0, 0, NULL},
    {"device", 0, OPTION_STRING, "KEYS", NULL, "with --here: only these, such as cuda:0,opencl:1",
     AT(devices), 0, 0, NULL},
    {"topology", 't', OPTION_STRING, "FILES", NULL,
     "on the machines that these hwloc XML files describe, separated by commas", AT(topology), 0, 0,
     NULL},
    {"nodes", 'n', OPTION_STRING, "N,...", "1",
     "so many sets of these machines; several numbers make a table, with a batch that grows with "
     "them",
     AT(nodes), 0, 0, NULL},
    {"group", 0, OPTION_INT, "RANKS", "0", "that share one set of experts; 0: the fastest",
     AT(group), 0, 64, NULL},
    {"cpu", 0, OPTION_FLAG, NULL, "no", "CPUs are ranks too where there are GPUs", AT(cpu), 0, 0,
     NULL},
    {"host", 0, OPTION_FLAG, NULL, "no", "experts may be computed by the CPU in the host's memory",
     AT(host), 0, 0, NULL},
    {"memory", 0, OPTION_BYTES, "BYTES", "0", "device memory to use at most; 0: what there is",
     AT(memory), 0, 0, NULL},
    {"headroom", 0, OPTION_FLOAT, "X", "2",
     "room for received rows, in multiples of what is expected", AT(headroom), 1, 64, NULL},
    {"rates", 0, OPTION_STRING, "FILE", NULL,
     "rates of devices instead of those that ditmoe calibrate has kept", AT(rates), 0, 0, NULL},
    {"network", 0, OPTION_FLOAT, "GB/S", "0", "of a machine, one way; 0: from its adapters",
     AT(network), 0, 1e5, NULL},
    {"exchange", 0, OPTION_CHOICE, "ROAD", "nccl",
     "between NVIDIA GPUs: nccl, or by the host's memory as between others (with --here: host, "
     "unless it "
     "is given)",
     AT(exchange), 0, 0, road_choices},
    {"overlap", 0, OPTION_FLAG, NULL, "yes", "transfers are hidden behind work beside them",
     AT(overlap), 0, 0, NULL},
    {0},
};

static const struct option_spec output_options[] = {
    {"out", 'o', OPTION_STRING, "FILE", NULL, "write the placement", AT(out), 0, 0, NULL},
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON", AT(json), 0, 0, NULL},
    {"png", 0, OPTION_STRING, "FILE", NULL, "draw the plan, or the table", AT(png), 0, 0, NULL},
    {0},
};
#undef AT

// "1,2,4": ascending numbers. Returns how many, or 0.
static int parse_nodes(const char *text, int nodes[POINTS_MOST])
{
    int count = 0;
    while (count < POINTS_MOST) {
        char *end;
        const long n = strtol(text, &end, 10);
        if (end == text || n < 1 || n > NODES_MOST || (count && n <= nodes[count - 1]))
            return 0;
        nodes[count++] = (int)n;
        if (*end == 0)
            return count;
        if (*end != ',')
            return 0;
        text = end + 1;
    }
    return 0;
}

// ---- one plan -----------------------------------------------------------------------------------

static int write_placement(const char *path, const struct plan_result *r)
{
    struct placement all;
    TRY(plan_expand(r, &all));
    json_t *json = placement_to_json(&all);
    int code = write_json_file(path, json);
    json_decref(json);
    placement_free(&all);
    return code;
}

static void print_json(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    printf("\n");
    json_decref(json);
}

static int one_plan(const struct plan_settings *o, struct machines *m, int nodes, bool *fits)
{
    struct plan_result r;
    TRY(plan_make(o, m, nodes, o->batch, true, &r));
    int code = o->png ? plan_draw(o->png, o, &r) : 0;
    if (code >= 0 && o->json)
        print_json(plan_to_json(o, &r));
    else if (code >= 0)
        plan_show(o, m, &r, stdout);
    *fits = r.forecast.missing <= 0;
    if (code >= 0 && o->out)
        code = *fits ? write_placement(o->out, &r)
                     : fail(ERR_NOMEM, "%s is not written: %.0f bytes are missing", o->out,
                            r.forecast.missing);
    plan_result_free(&r);
    return code;
}

// ---- a table over numbers of machines -----------------------------------------------------------

static json_t *point_json(const struct plan_settings *o, const struct plan_point *p)
{
    return json_pack(
        "{s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:I}", "machines", p->nodes, "ranks", p->ranks,
        "group", p->group, "batch", p->batch, "step", p->step, "images_per_second",
        o->what ? p->images_per_second / o->steps : p->images_per_second, "exchange_share",
        p->exchange, "reduce_share", p->reduce, "missing", (json_int_t)p->missing);
}

static int table(const struct plan_settings *o, struct machines *m, const int *nodes, int count,
                 bool *fits)
{
    struct plan_point list[POINTS_MOST];
    json_t *points = json_array();
    int code = 0;
    for (int i = 0; i < count && code >= 0; i++) {
        struct plan_result r = {0};
        const int64_t batch = (int64_t)o->batch * nodes[i] / nodes[0];
        code = batch > INT32_MAX ? fail(ERR_INPUT, "--batch %d grows too large at %d machines",
                                        o->batch, nodes[i])
                                 : plan_make(o, m, nodes[i], (int)batch, false, &r);
        if (code < 0)
            break;
        list[i] = (struct plan_point){nodes[i] * m->count,       r.cluster.ranks * r.cluster.copies,
                                      r.cluster.ranks,           r.batch,
                                      r.forecast.step,           r.forecast.images_per_second,
                                      r.forecast.exchange_share, r.forecast.reduce_share,
                                      r.forecast.missing};
        *fits = *fits && r.forecast.missing <= 0;
        json_array_append_new(points, point_json(o, &list[i]));
        plan_result_free(&r);
    }
    if (code >= 0 && o->png)
        code = points_draw(o->png, o, m, list, count);
    if (code >= 0 && o->json)
        print_json(json_incref(points));
    else if (code >= 0)
        points_print(o, list, count, stdout);
    json_decref(points);
    return code;
}

// ---- the command --------------------------------------------------------------------------------

static int run(const struct plan_settings *o, const int *nodes, int count)
{
    struct machines m;
    bool fits = true;
    if (machines_open(o, &m) < 0)
        return report_failure("plan");
    int code = count == 1 ? one_plan(o, &m, nodes[0], &fits) : table(o, &m, nodes, count, &fits);
    machines_close(&m);
    return code < 0 ? report_failure("plan") : fits ? 0 : 1;
}

int cmd_plan(int argc, char **argv)
{
    struct plan_settings o = {0};
    int nodes[POINTS_MOST], status;
    struct config config;
    model_options_init(&o.overrides);
    const struct option_group groups[] = {
        {"plan", plan_options, &o},
        {"changes to the preset", model_option_list, &o.overrides},
        {"images", image_option_list, &o.overrides},
        {"machines", machine_options, &o},
        {"output", output_options, &o},
        {0},
    };
    const struct command command = {
        .name = "plan",
        .summary = "Plans one model on many devices.",
        .about =
            "Says which device computes how many images and holds which experts, what a step would "
            "take and what memory each device needs. Exits with 1 when it does not fit. "
            "docs/placement.md explains what is computed and what is assumed.",
        .example = "ditmoe plan --model XL/2-8E2A --batch 256 --topology tests/topologies/hgx8.xml",
        .groups = groups,
    };
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    const int count = parse_nodes(o.nodes, nodes);
    if (count == 0)
        return usage_error("plan",
                           "--nodes %s: not ascending numbers from 1 to %d, separated by commas",
                           o.nodes, NODES_MOST);
    if (!o.here == !o.topology)
        return usage_error("plan", "either --here or --topology FILES is needed");
    if (o.here && !options_given("exchange"))
        o.exchange = ROAD_HOST;
    if (o.train && o.what)
        return usage_error("plan", "--train and --sample: one of them");
    if (count > 1 && (o.out || o.placement))
        return usage_error("plan", "--%s needs one number of --nodes", o.out ? "out" : "placement");
    if (model_config(o.model, &o.overrides, &config) < 0)
        return usage_error("plan", "%s", error_message());
    return run(&o, nodes, count);
}
