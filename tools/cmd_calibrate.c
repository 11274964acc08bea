// ditmoe calibrate: measures devices and the roads between them for the forecasts of `ditmoe plan`,
// and keeps the figures in the user's cache.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/calibrate.h"
#include "tools/measure.h"
#include "tools/ranks.h"

enum { DEVICES_MOST = 64 };

static const char *const precision_choices[] = {"f32", "bf16", NULL};

#define AT(member) offsetof(struct calibrate_settings, member)
static const struct option_spec calibrate_options[] = {
    {"device", 'd', OPTION_STRING, "KEYS", "all",
     "one device; several with commas between them: then, under mpirun, the roads between them "
     "too; all: "
     "every device of this machine, one after the other",
     AT(devices), 0, 0, NULL},
    {"precision", 0, OPTION_CHOICE, "TYPE", "f32", "f32 or bf16; each is kept for itself",
     AT(precision), 0, 0, precision_choices},
    {"model", 'm', OPTION_STRING, "PRESET", "S/2-8E2A",
     "whose width products have, and two layers of which are timed as a whole", AT(model), 0, 0,
     NULL},
    {"batch", 'b', OPTION_INT, "N", "0", "images of those steps; 0: 64 on GPUs, 4 on CPUs",
     AT(batch), 0, 65536, NULL},
    {"force", 'f', OPTION_FLAG, NULL, "no", "measure also what is known", AT(force), 0, 0, NULL},
    {"out", 'o', OPTION_STRING, "FILE", NULL, "write all rates there too, for --rates elsewhere",
     AT(out), 0, 0, NULL},
    {"json", 0, OPTION_FLAG, NULL, "no", "print all rates as JSON", AT(json), 0, 0, NULL},
    {0},
};
#undef AT

// ---- showing ------------------------------------------------------------------------------------

static void print_rates(const struct device_rates *d)
{
    char a[32], b[32], c[32];
    printf("%s %s, %s, driver %s", d->key, d->name, d->bf16 ? "bf16" : "f32", d->driver);
    if (d->sharing > 1)
        printf(", one of %d ranks on these cores", d->sharing);
    printf("\n");
    printf("  %-10s", "rows");
    for (int i = 0; i < RATE_CLASSES; i++)
        printf(" %14d", rate_rows[i]);
    printf("\n  %-10s", "product");
    for (int i = 0; i < RATE_CLASSES; i++)
        printf(" %14s", format_rate(d->dense[i], "FLOP", a));
    printf("\n  %-10s", "an expert");
    for (int i = 0; i < RATE_CLASSES; i++)
        printf(" %14s", format_rate(d->ragged[i], "FLOP", a));
    printf("\n  attention %s, memory %s, an operation %.1f us\n",
           format_rate(d->attention, "FLOP", a), format_rate(d->memory, "B", b), 1e6 * d->launch);
    printf("  from the host %s, to it %s\n", format_rate(d->to_device, "B", b),
           format_rate(d->to_host, "B", c));
    printf("  a step takes longer than its parts: sampling %.2f times, training %.2f times\n",
           d->sample, d->train);
}

static void print_links(const struct rates *r)
{
    char a[32];
    for (int i = 0; i < r->link_count; i++)
        printf("%s to %s: %.0f us and %s\n", r->links[i].from, r->links[i].to,
               1e6 * r->links[i].rate.latency, format_rate(r->links[i].rate.bandwidth, "B", a));
}

// ---- measuring ----------------------------------------------------------------------------------

// Opens the device, measures it where it is not known, and, with other ranks, the roads to theirs.
// All ranks know the rates of all; roads, and steps on several ranks, which are forecast from
// these.
static int measure_together(const struct calibrate_settings *o, const struct session *s,
                            int experts, struct rates *rates, struct device_rates *mine)
{
    struct exchange *x = ranks_exchange();
    struct device_rates *all = calloc((size_t)ranks_count(), sizeof *all);
    int code = all ? exchange_gather(x, mine, all, sizeof *mine)
                   : fail(ERR_NOMEM, "no host memory for %d ranks", ranks_count());
    for (int r = 0; code >= 0 && r < ranks_count(); r++)
        code = rates_put(rates, &all[r]);
    if (code >= 0)
        code = calibrate_pairs(x, ranks_roads(), s->dev, s->stream, rates);
    if (code >= 0)
        code = calibrate_steps(x, s->dev, s->stream, o, experts, all, rates);
    if (code >= 0) // rank 0 has made them better
        code = exchange_broadcast(x, all, (size_t)ranks_count() * sizeof *all, 0);
    if (code >= 0)
        *mine = all[ranks_number()];
    free(all);
    return code;
}

// Devices are measured one after the other, for they may share cores; those that do, CPUs of one
// machine, together, as they will work (`my_turn`: the first of these).
static int measure(const struct calibrate_settings *o, const char *key,
                   const struct device_info *info, int my_turn, const struct device_rates *known,
                   struct rates *rates, struct device_rates *out)
{
    const struct device_options device = {key, o->precision, 0};
    struct calibrate_settings s = *o;
    struct session session;
    struct config c;
    s.batch = o->batch ? o->batch : info->kind == DEVICE_CPU ? 4 : 64;
    TRY(model_config(o->model, &o->overrides, &c));
    TRY(session_open(&device, &session));
    int code = ranks_connect(&(struct rank_options){0}, session.dev, session.stream);
    for (int turn = 0; turn < ranks_count() && code >= 0; turn++) {
        if (turn == my_turn && known)
            *out = *known;
        else if (turn == my_turn)
            code = calibrate_device(session.dev, session.stream, &s, &c, out);
        if (code >= 0 && ranks_exchange())
            code = exchange_barrier(ranks_exchange());
    }
    if (code >= 0 && ranks_exchange())
        code = measure_together(&s, &session, c.experts, rates, out);
    session_close(&session);
    return code;
}

static int keep(const struct rates *rates, const struct calibrate_settings *o)
{
    if (!rates_store(rates))
        fprintf(stderr,
                "ditmoe calibrate: the cache cannot be written; --out FILE keeps the rates\n");
    json_t *json = rates_to_json(rates);
    int code = o->out ? write_json_file(o->out, json) : 0;
    if (code >= 0 && o->json) {
        json_dumpf(json, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6));
        printf("\n");
    }
    json_decref(json);
    return code;
}

static void tell(const struct calibrate_settings *o, const struct device_rates *d, bool known)
{
    if (o->json)
        return;
    print_rates(d);
    if (known)
        printf("  (known; --force measures again)\n");
}

// Every device of the machine, one process, no roads. Of twins the one through CUDA.
static int each_device(const struct calibrate_settings *o, struct rates *rates)
{
    struct device_info list[DEVICES_MOST];
    const int count = devices_list(list, DEVICES_MOST);
    int found = 0;
    TRY(count);
    for (int i = 0; i < count; i++) {
        if (strcmp(o->devices, "all") && strcmp(o->devices, list[i].key))
            continue;
        if (list[i].twin[0] && strcmp(list[i].backend->name, "cuda") && !strcmp(o->devices, "all"))
            continue;
        const struct device_rates *old = rates_find(rates, &list[i], o->precision, 1);
        struct device_rates rate = {.sharing = 1};
        const bool known = old && !o->force;
        if (known)
            rate = *old;
        else
            TRY(measure(o, list[i].key, &list[i], 0, NULL, rates, &rate));
        TRY(rates_put(rates, &rate));
        tell(o, &rate, known);
        found++;
    }
    if (!found)
        return devices_find(o->devices, &list[0]) < 0 ? ERR_NODEVICE
                                                      : fail(ERR_NODEVICE, "no device to measure");
    return 0;
}

// How many ranks of this machine are on CPUs, if this one is, for they share the cores; and the
// first of them, else this rank.
static int count_sharing(const struct device_info *info, int *sharing, int *first)
{
    const int ranks = ranks_count();
    const int mine = info->kind == DEVICE_CPU ? exchange_machine(ranks_exchange()) : -1;
    int *all = calloc((size_t)ranks, sizeof *all);
    int code = all ? exchange_gather(ranks_exchange(), &mine, all, sizeof mine)
                   : fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    *sharing = 0;
    *first = ranks_number();
    for (int r = ranks - 1; code >= 0 && r >= 0; r--)
        if (mine >= 0 && all[r] == mine)
            ++*sharing, *first = r;
    *sharing = *sharing > 1 ? *sharing : 1;
    free(all);
    return code;
}

// One rank of several: its device and the roads; rank 0 keeps everything.
static int this_rank(const struct calibrate_settings *o, struct rates *rates)
{
    struct device_info info;
    struct device_rates mine = {0}, *all = calloc((size_t)ranks_count(), sizeof *all);
    const char *devices = strcmp(o->devices, "all") ? o->devices : "auto";
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks_count());
    int code = ranks_device(devices, &info), sharing = 1, turn = 0;
    if (code >= 0)
        code = count_sharing(&info, &sharing, &turn);
    const struct device_rates *old =
        code >= 0 ? rates_find(rates, &info, o->precision, sharing) : NULL;
    mine.sharing = sharing;
    if (code >= 0)
        code = measure(o, devices, &info, turn, o->force ? NULL : old, rates, &mine);
    if (code >= 0)
        code = exchange_gather(ranks_exchange(), &mine, all, sizeof mine);
    for (int r = 0; code >= 0 && ranks_first() && r < ranks_count(); r++)
        tell(o, &all[r], false);
    if (code >= 0 && ranks_first() && !o->json)
        print_links(rates);
    free(all);
    return code;
}

int cmd_calibrate(int argc, char **argv)
{
    struct calibrate_settings o = {0};
    struct config config;
    struct rates rates;
    model_options_init(&o.overrides);
    const struct option_group groups[] = {
        {"calibration", calibrate_options, &o},
        {"changes to the preset", model_option_list, &o.overrides},
        {0}};
    const struct command command = {
        .name = "calibrate",
        .summary = "Measures devices, and the roads between them, for ditmoe plan.",
        .about = "Measures matrix products by their rows, attention, memory, copies and whole "
                 "steps of two "
                 "layers, and keeps the rates in the user's cache by the device's name, PCI id and "
                 "driver: "
                 "what is known is not measured again until the device or its driver changes.",
        .example = "ditmoe calibrate --device cuda:0,opencl:1 --precision bf16",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (model_config(o.model, &o.overrides, &config) < 0)
        return usage_error("calibrate", "%s", error_message());
    status = ranks_launch(o.devices, "calibrate", argc, argv);
    if (status)
        return status;
    rates_load(&rates);
    int code = ranks_exchange() ? this_rank(&o, &rates) : each_device(&o, &rates);
    if (code >= 0 && ranks_first())
        code = keep(&rates, &o);
    rates_free(&rates);
    return code < 0 ? report_failure("calibrate") : 0;
}
