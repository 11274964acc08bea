// ditmoe bench: how fast the parts and the whole are on a device.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench.h"
#include "tools/bench_compare.h"
#include "tools/bench_step.h"

struct bench_settings {
    int json;
    const char *filter, *compare;
    struct device_options device;
    struct step_settings step;
};

static const char *const what_choices[] = {"both", "train", "sample", NULL};

#define AT(member) offsetof(struct bench_settings, member)
static const struct option_spec bench_options[] = {
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON instead of the table", AT(json), 0, 0, NULL},
    {"filter", 0, OPTION_STRING, "TEXT", NULL, "gemm, ops: only rows whose name contains this",
     AT(filter), 0, 0, NULL},
    {"compare", 0, OPTION_STRING, "FILE", NULL,
     "an earlier --json of this, or a peer's: prints this run's speed over that", AT(compare), 0, 0,
     NULL},
    {0},
};
#undef AT
#define AT(member) offsetof(struct step_settings, member)
static const struct option_spec step_options[] = {
    {"model", 'm', OPTION_STRING, "PRESETS", "S/4-8E2A", "models, with commas between them",
     AT(models), 0, 0, NULL},
    {"batch", 'b', OPTION_STRING, "N", "64", "images a step; several with commas between them",
     AT(batches), 0, 0, NULL},
    {"what", 0, OPTION_CHOICE, "WHICH", "both", "both, train or sample (without guidance)",
     AT(what), 0, 0, what_choices},
    {"rounds", 0, OPTION_INT, "N", "9", "rounds measured; the median is told", AT(rounds), 1, 1000,
     NULL},
    {"steps", 0, OPTION_INT, "N", NULL,
     "sampling steps of a round; 20 on GPUs and 4 on CPUs unless given, and then a third of the "
     "rounds",
     AT(steps), 1, 1000, NULL},
    {"recompute", 0, OPTION_FLAG, NULL, "no", "train with recomputed activations", AT(recompute), 0,
     0, NULL},
    {"profile", 0, OPTION_FLAG, NULL, "no",
     "time every operation of one more step on the device: a table on stderr", AT(profile), 0, 0,
     NULL},
    {"trace", 0, OPTION_STRING, "FILE", NULL,
     "write that step's operations as JSON for chrome://tracing or ui.perfetto.dev", AT(trace), 0,
     0, NULL},
    {"peer", 0, OPTION_STRING, "COMMAND", NULL,
     "run this beside, with the model's options added and --compiled 0 and 1; it prints a line of "
     "JSON with its \"ms\"",
     AT(peer), 0, 0, NULL},
    {0},
};
#undef AT

// ---- the command --------------------------------------------------------------------------------

static int run_part(const struct bench_settings *o, const char *part, json_t *rows, FILE *table)
{
    struct session s;
    struct ceilings ceilings;
    int code = 0;
    TRY(session_open(&o->device, &s));
    fprintf(stderr, "%s: %s, %s\n", s.dev->info.key, s.dev->info.name, dtype_name(s.dev->act));
    if (strcmp(part, "gemm") != 0) {
        code = measure_ceilings(s.dev, s.stream, &ceilings);
        if (code >= 0) {
            print_ceilings(&ceilings, s.dev, table);
            json_array_append_new(rows, ceilings_json(&ceilings, s.dev));
        }
    }
    if (code >= 0)
        code = !strcmp(part, "gemm") ? bench_gemm(s.dev, o->filter, rows, table)
               : !strcmp(part, "ops")
                   ? bench_ops(s.dev, o->filter, rows, table)
                   : bench_step(s.dev, s.stream, &o->step, &ceilings, rows, table);
    session_close(&s);
    return code;
}

static int bench_run(const struct bench_settings *o, const char *part)
{
    json_t *rows = json_array();
    FILE *table = o->json ? fopen("/dev/null", "w") : stdout;
    if (!rows || !table)
        return fail(ERR_NOMEM, "out of memory");
    int code = run_part(o, part, rows, table);
    if (code >= 0 && o->compare)
        code = bench_compare(o->compare, rows, table);
    if (o->json && json_array_size(rows) > 0) { // what was measured before a failure too
        json_dumpf(rows, stdout, JSON_INDENT(2));
        printf("\n");
    }
    if (table != stdout)
        fclose(table);
    json_decref(rows);
    return code;
}

int cmd_bench(int argc, char **argv)
{
    struct bench_settings o = {0};
    model_options_init(&o.step.overrides);
    const struct option_group groups[] = {
        {"benchmark", bench_options, &o},
        {"step", step_options, &o.step},
        {"step: changes to the preset", model_option_list, &o.step.overrides},
        {"step: images", image_option_list, &o.step.overrides},
        {"device", device_option_list, &o.device},
        {0},
    };
    const struct command command = {
        .name = "bench",
        .summary = "Measures speed.",
        .positional = "gemm|ops|step",
        .about =
            "gemm: matrix products at the model's shapes beside OpenBLAS and CLBlast. "
            "ops: the operations of a model, as shares of a large matrix product or of a copy. "
            "step: whole training and sampling steps on random weights. Medians of several "
            "rounds.",
        .example = "ditmoe bench step --model S/2-8E2A,XL/2-8E2A --batch 16,128 --precision bf16 "
                   "--what sample --profile",
        .groups = groups,
        .positional_min = 1,
        .positional_max = 1,
    };
    const char *part;
    int status;
    if (!options_parse(&command, argc, argv, &part, &status))
        return status;
    if (strcmp(part, "gemm") && strcmp(part, "ops") && strcmp(part, "step"))
        return usage_error("bench", "%s: not gemm, ops or step", part);
    if (bench_step_check(&o.step) < 0)
        return usage_error("bench", "%s", error_message());
    return bench_run(&o, part) < 0 ? report_failure("bench") : 0;
}
