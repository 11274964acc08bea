// ditmoe bench: how fast the parts and the whole are on a device.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench.h"
#include "tools/bench_compare.h"
#include "tools/bench_inception.h"
#include "tools/bench_ops.h"
#include "tools/bench_step.h"
#include "tools/bench_vae.h"

struct bench_settings {
    int json;
    const char *filter, *compare;
    struct device_options device;
    struct step_settings step;
    struct bench_vae_settings vae;
};

static const char *const part_choices[] = {"decode", "encode", "both", NULL};
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
    {"what", 0, OPTION_CHOICE, "WHICH", "both", "step: both, train or sample (without guidance)",
     AT(what), 0, 0, what_choices},
    {"rounds", 0, OPTION_INT, "N", "9", "step: rounds measured; the median is told", AT(rounds), 1,
     1000, NULL},
    {"steps", 0, OPTION_INT, "N", NULL,
     "step: sampling steps of a round [20 on GPUs, 4 on CPUs]; long rounds are done three times",
     AT(steps), 1, 1000, NULL},
    {"recompute", 0, OPTION_FLAG, NULL, "no", "step: train with recomputed activations",
     AT(recompute), 0, 0, NULL},
    {"early-update", 0, OPTION_FLAG, NULL, "no",
     "step: train with each block's weights updated in the backward pass", AT(early), 0, 0, NULL},
    {"profile", 0, OPTION_FLAG, NULL, "no",
     "step: time every operation of one more step on the device: a table on stderr", AT(profile), 0,
     0, NULL},
    {"trace", 0, OPTION_STRING, "FILE", NULL,
     "step: write that step's operations as JSON for chrome://tracing or ui.perfetto.dev",
     AT(trace), 0, 0, NULL},
    {"peer", 0, OPTION_STRING, "COMMAND", NULL,
     "step: run this beside, with the model's options added and --compiled 0 and 1; it prints a "
     "line of "
     "JSON with its \"ms\"",
     AT(peer), 0, 0, NULL},
    {0},
};
#undef AT

#define AT(member) offsetof(struct bench_vae_settings, member)
static const struct option_spec vae_options[] = {
    {"vae", 0, OPTION_STRING, "FILE", NULL,
     "the autoencoder [Stable Diffusion's architecture with random weights]", AT(vae), 0, 0, NULL},
    {"image-size", 0, OPTION_STRING, "N", "256", "sides of images, with commas between them",
     AT(sizes), 0, 0, NULL},
    {"part", 0, OPTION_CHOICE, "WHICH", "decode", "decode, encode or both", AT(part), 0, 0,
     part_choices},
    {0},
};
#undef AT

// ---- the command --------------------------------------------------------------------------------

struct bench {
    const struct bench_settings *settings;
    const char *part;
    struct session session;
    struct ceilings ceilings;
    json_t *rows;
    FILE *table;
};

static int ops_of(void *user, const char *title, const struct config *c, int batch)
{
    struct bench *b = user;
    return bench_ops(b->session.dev, b->session.stream, c, title, batch, &b->ceilings,
                     b->settings->filter, b->rows, b->table);
}

static int run_session(struct bench *b)
{
    struct session *s = &b->session;
    if (!strcmp(b->part, "gemm"))
        return bench_gemm(s->dev, b->settings->filter, b->rows, b->table);
    TRY(measure_ceilings(s->dev, s->stream, &b->ceilings));
    print_ceilings(&b->ceilings, s->dev, b->table);
    json_array_append_new(b->rows, ceilings_json(&b->ceilings, s->dev));
    if (!strcmp(b->part, "ops"))
        return bench_each(&b->settings->step, ops_of, b);
    if (!strcmp(b->part, "vae"))
        return bench_vae(s->dev, s->stream, &b->settings->vae, &b->settings->step, &b->ceilings,
                         b->rows, b->table);
    if (!strcmp(b->part, "inception"))
        return bench_inception(s->dev, s->stream, &b->settings->step, &b->ceilings, b->rows,
                               b->table);
    return bench_step(s->dev, s->stream, &b->settings->step, &b->ceilings, b->rows, b->table);
}

static int run_part(const struct bench_settings *o, const char *part, json_t *rows, FILE *table)
{
    struct bench b = {.settings = o, .part = part, .rows = rows, .table = table};
    TRY(session_open(&o->device, &b.session));
    const struct device *dev = b.session.dev;
    TRY(ranks_connect(&o->step.ranks, b.session.dev, b.session.stream));
    say("%s: %s, %s\n", dev->info.key, dev->info.name, dtype_name(dev->act));
    int code = run_session(&b);
    session_close(&b.session);
    return code;
}

static int bench_run(const struct bench_settings *o, const char *part)
{
    json_t *rows = json_array();
    FILE *table = o->json || !ranks_first() ? fopen("/dev/null", "w") : stdout;
    if (!rows || !table)
        return fail(ERR_NOMEM, "out of memory");
    int code = run_part(o, part, rows, table);
    if (code >= 0 && o->compare)
        code = bench_compare(o->compare, rows, table);
    if (o->json && ranks_first() && json_array_size(rows) > 0) { // what was measured before a failure too
        json_dumpf(rows, stdout, JSON_INDENT(2));
        printf("\n");
    }
    if (table != stdout)
        fclose(table);
    json_decref(rows);
    return code;
}

static int nothing(void *user, const char *title, const struct config *c, int batch)
{
    (void)user, (void)title, (void)c, (void)batch;
    return 0;
}

int cmd_bench(int argc, char **argv)
{
    struct bench_settings o = {0};
    model_options_init(&o.step.overrides);
    const struct option_group groups[] = {
        {"benchmark", bench_options, &o},
        {"step, ops", step_options, &o.step},
        {"step, ops: changes to the preset", model_option_list, &o.step.overrides},
        {"step, ops: images", image_option_list, &o.step.overrides},
        {"vae (it and inception take --batch, --rounds, --profile, --trace too)", vae_options,
         &o.vae},
        {"device", device_option_list, &o.device},
        {"step: memory", memory_option_list, &o.step.memory},
        {"step: " RANK_OPTIONS_TITLE, rank_option_list, &o.step.ranks},
        {0},
    };
    const struct command command = {
        .name = "bench",
        .summary = "Measures speed.",
        .positional = "gemm|ops|step|vae|inception",
        .about =
            "gemm: matrix products at the model's shapes beside OpenBLAS and CLBlast. "
            "ops: the operations of a model, as shares of a large matrix product or of a copy. "
            "step: whole training and sampling steps on random weights; on several devices also with "
            "several placements, predicted beside measured (--placement uniform,cost,48:16/6:2). vae: decoding and "
            "encoding of images. inception: the network of 'ditmoe eval fid'. Medians of several "
            "rounds.",
        .example = "ditmoe bench step --model S/2-8E2A --batch 16,128 --precision bf16 --profile",
        .groups = groups,
        .positional_min = 1,
        .positional_max = 1,
    };
    const char *part;
    int status;
    if (!options_parse(&command, argc, argv, &part, &status))
        return status;
    static const char *const parts[] = {"gemm", "ops", "step", "vae", "inception"};
    bool known = false;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        known |= !strcmp(part, parts[i]);
    if (!known)
        return usage_error("bench", "%s: not gemm, ops, step, vae or inception", part);
    if (bench_each(&o.step, nothing, NULL) < 0)
        return usage_error("bench", "%s", error_message());
    const bool alone = strcmp(part, "step") || o.step.peer || o.step.profile || o.step.trace;
    if (alone && (ranks_count() > 1 || strchr(o.device.device, ',')))
        return usage_error("bench", "only steps, without a peer or a profile, are measured on ranks");
    status = ranks_launch(o.device.device, "bench", argc, argv);
    if (status)
        return status;
    if (ranks_same_start(&command) < 0)
        return report_failure("bench");
    return bench_run(&o, part) < 0 ? report_failure("bench") : 0;
}
