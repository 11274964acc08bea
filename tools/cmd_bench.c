// ditmoe bench: how fast the parts and the whole are on a device.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench.h"
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
    {"compare", 0, OPTION_STRING, "FILE", NULL, "an earlier --json of this: prints new speed / old",
     AT(compare), 0, 0, NULL},
    {0},
};
#undef AT
#define AT(member) offsetof(struct step_settings, member)
static const struct option_spec step_options[] = {
    {"model", 'm', OPTION_STRING, "PRESET", "S/4-8E2A", "the model of 'step'", AT(model), 0, 0,
     NULL},
    {"batch", 'b', OPTION_INT, "N", "64", "images a step", AT(batch), 1, 65536, NULL},
    {"what", 0, OPTION_CHOICE, "WHICH", "both", "both, train or sample (without guidance)",
     AT(what), 0, 0, what_choices},
    {"rounds", 0, OPTION_INT, "N", "9", "steps measured; the median is told", AT(rounds), 1, 1000,
     NULL},
    {"peer", 0, OPTION_STRING, "COMMAND", NULL,
     "run this beside, with the model's options added and --compiled 0 and 1; it prints a line of "
     "JSON "
     "with its \"ms\"",
     AT(peer), 0, 0, NULL},
    {0},
};
#undef AT

// ---- comparison with an earlier run -------------------------------------------------------------

// What is larger when faster, under the names that the parts use.
static double speed_of(const json_t *row)
{
    static const char *const names[] = {"own", "gflops", "gbps", "speed"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const json_t *value = json_object_get(row, names[i]);
        if (json_is_number(value))
            return json_number_value(value);
    }
    return NAN;
}

static bool same_text(const json_t *a, const json_t *b, const char *key)
{
    const char *x = json_string_value(json_object_get(a, key));
    const char *y = json_string_value(json_object_get(b, key));
    return x == y || (x && y && !strcmp(x, y));
}

static const json_t *find_row(const json_t *rows, const json_t *like)
{
    static const char *const keys[] = {"bench", "name", "what", "type"};
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        bool same = json_equal(json_object_get(row, "batch"), json_object_get(like, "batch")) ||
                    (!json_object_get(row, "batch") && !json_object_get(like, "batch"));
        for (size_t k = 0; k < sizeof keys / sizeof keys[0]; k++)
            same = same && same_text(row, like, keys[k]);
        if (same)
            return row;
    }
    return NULL;
}

static int compare_rows(const char *path, const json_t *rows, FILE *table)
{
    json_error_t wrong;
    json_t *old = json_load_file(path, 0, &wrong);
    if (!old)
        return fail(ERR_INPUT, "%s: %s", path, wrong.text);
    fprintf(table, "\nnew speed / that of %s\n", path);
    for (size_t i = 0; i < json_array_size(rows); i++) {
        json_t *row = json_array_get(rows, i);
        const json_t *before = find_row(old, row);
        double ratio = before ? speed_of(row) / speed_of(before) : NAN;
        const char *what = json_string_value(json_object_get(row, "what"));
        if (!isfinite(ratio))
            continue;
        json_object_set_new(row, "ratio_to_earlier", json_real(ratio));
        fprintf(table, "%-40s %-7s %.2f\n", json_string_value(json_object_get(row, "name")),
                what ? what : "", ratio);
    }
    json_decref(old);
    return 0;
}

// ---- the command --------------------------------------------------------------------------------

static int run_part(const struct bench_settings *o, const char *part, const struct config *c,
                    json_t *rows, FILE *table)
{
    struct session s;
    TRY(session_open(&o->device, &s));
    fprintf(stderr, "%s: %s, %s\n", s.dev->info.key, s.dev->info.name, dtype_name(s.dev->act));
    int code = !strcmp(part, "gemm")  ? bench_gemm(s.dev, o->filter, rows, table)
               : !strcmp(part, "ops") ? bench_ops(s.dev, o->filter, rows, table)
                                      : bench_step(s.dev, s.stream, c, &o->step, rows, table);
    session_close(&s);
    return code;
}

static int bench_run(const struct bench_settings *o, const char *part, const struct config *c)
{
    json_t *rows = json_array();
    FILE *table = o->json ? fopen("/dev/null", "w") : stdout;
    if (!rows || !table)
        return fail(ERR_NOMEM, "out of memory");
    int code = run_part(o, part, c, rows, table);
    if (code >= 0 && o->compare)
        code = compare_rows(o->compare, rows, table);
    if (code >= 0 && o->json) {
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
    struct config config = {0};
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
        .about = "gemm: matrix products at the model's shapes beside OpenBLAS and CLBlast. "
                 "ops: the other operations beside a copy. "
                 "step: whole training and sampling steps. Medians of several rounds.",
        .example =
            "ditmoe bench step --model S/4-8E2A --batch 32 --peer 'python3 tests/peer/peer_cpu.py'",
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
    if (!strcmp(part, "step") && model_config(o.step.model, &o.step.overrides, &config) < 0)
        return usage_error("bench", "%s", error_message());
    return bench_run(&o, part, &config) < 0 ? report_failure("bench") : 0;
}
