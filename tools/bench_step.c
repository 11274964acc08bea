#include "tools/bench_step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/sampler.h"
#include "model/train.h"
#include "tools/bench_profile.h"
#include "tools/bench_ranks.h"
#include "tools/progress.h"

#define LONG_RUN 0.5 // seconds

enum { PEERS = 2, ROUNDS_MAX = 1000, STEPS_GPU = 20, STEPS_CPU = 4 };

// A model under measurement: one of trainer and sampler.
struct subject {
    struct device *dev;
    struct stream *stream;
    const struct config *config;
    int batch, steps;
    char name[160];
    struct trainer *trainer;
    struct sampler *sampler;
    float *images, *latents;
    int32_t *labels;
    double times[3 * ROUNDS_MAX]; // seconds a step
    int count;
    const char *placement; // one of o->ranks.placement's
    struct rank_plan ranks;
    double seconds, waited; // all rounds; of them, for other ranks
    double copying;         // of the last pass or step, waiting for experts from host memory
};

// ---- random weights and inputs ------------------------------------------------------------------

enum { SHIFTS = 4096 }; // each parameter starts at another number of one long list

// Noise as it is, as bf16, and around 1 for the gains of norms.
struct noise {
    float *values, *gains;
    uint16_t *halves;
};

static int make_noise(size_t count, struct noise *out)
{
    out->values = malloc(count * sizeof *out->values);
    out->halves = malloc(count * sizeof *out->halves);
    out->gains = malloc(SHIFTS * sizeof *out->gains);
    if (!out->values || !out->halves || !out->gains)
        return fail(ERR_NOMEM, "out of host memory for random weights");
    noise_fill(out->values, count, 1);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        out->values[i] *= 0.02f;
        memcpy(&bits, &out->values[i], sizeof bits);
        out->halves[i] = (uint16_t)(bits >> 16);
    }
    for (size_t i = 0; i < SHIFTS; i++)
        out->gains[i] = 1 + out->values[i];
    return 0;
}

// Every parameter is random, for the published start has zeros that make whole branches zero:
// normal with standard deviation 0.02, around 1 for the gains of norms.
static int randomise(struct dit *d)
{
    size_t most = 0;
    struct noise n = {0};
    for (int i = 0; i < d->params.count; i++) {
        const size_t count = (size_t)param_count(&d->params.list[i]);
        most = count > most ? count : most;
    }
    int code = make_noise(most + SHIFTS, &n);
    for (int i = 0; i < d->params.count && code >= 0; i++) {
        const struct param *p = &d->params.list[i];
        const struct tensor *t = param_tensor(&d->w, p);
        const size_t from = (size_t)i * 1009 % SHIFTS;
        if (p->start == PARAM_ELSEWHERE)
            continue;
        const bool gain = p->init == INIT_ONE && param_count(p) <= SHIFTS;
        code = t->dtype == BF16 && !t->low
                   ? param_write_bf16(&d->ctx, &d->w, p, n.halves + from)
                   : param_write(&d->ctx, &d->w, p, gain ? n.gains : n.values + from);
    }
    free(n.values), free(n.halves), free(n.gains);
    return code;
}

static int make_inputs(struct subject *s)
{
    const struct config *c = s->config;
    const size_t n = (size_t)s->batch, pixels = (size_t)c->channels * (size_t)(c->size * c->size);
    s->images = malloc(sizeof(float) * n * pixels);
    s->latents = malloc(sizeof(float) * n * pixels);
    s->labels = malloc(sizeof *s->labels * n);
    if (!s->images || !s->latents || !s->labels)
        return fail(ERR_NOMEM, "out of memory for %d images", s->batch);
    noise_fill(s->images, n * pixels, 2);
    for (size_t i = 0; i < n; i++)
        s->labels[i] = (int32_t)(i * 2654435761u % (size_t)c->classes);
    return 0;
}

static void subject_free(struct subject *s)
{
    trainer_free(s->trainer);
    sampler_free(s->sampler);
    ranks_plan_free(&s->ranks);
    free(s->images), free(s->latents), free(s->labels);
    free(s);
}

static struct dit *subject_dit(const struct subject *s)
{
    return s->trainer ? s->trainer->dit : s->sampler->dit;
}

static int plan_ranks(struct subject *s, bool train, const struct step_settings *o)
{
    struct rank_options options = o->ranks;
    const struct rank_work work = {.train = train,
                                   .recompute = o->recompute != 0,
                                   .early = o->early != 0,
                                   .batch = s->batch,
                                   .copies = 1,
                                   .memory = o->memory.memory};
    options.placement = s->placement;
    return ranks_plan(&options, s->config, &work, &s->ranks);
}

static int subject_open(struct subject *s, bool train, const struct step_settings *o)
{
    TRY(make_inputs(s));
    if (!o->alone)
        TRY(plan_ranks(s, train, o));
    struct offload offload;
    TRY(offload_choose(&o->memory, s->dev, &s->ranks, &offload));
    if (train) {
        struct train_options t = train_defaults();
        t.limit = o->memory.memory;
        t.offload = offload;
        t.ranks = ranks_of(&s->ranks);
        t.batch = ranks_share(&s->ranks, s->batch);
        t.recompute = o->recompute;
        t.early = o->early;
        TRY(trainer_new(s->dev, s->stream, s->config, &t, &s->trainer));
        TRY(trainer_commit(s->trainer));
    } else { // without guidance: one forward pass of `batch` images
        struct sample_options plain = {
            .steps = s->steps, .cfg = 1, .pack = true, .ranks = ranks_of(&s->ranks)};
        plain.limit = o->memory.memory;
        plain.offload = offload;
        TRY(sampler_new(s->dev, s->stream, s->config, s->batch, &plain, &s->sampler));
    }
    return randomise(subject_dit(s));
}

// ---- measuring ----------------------------------------------------------------------------------

static int train_one(struct subject *s)
{
    bool done;
    return trainer_micro(s->trainer, s->images, s->labels, &done);
}

static int sample_all(struct subject *s)
{
    const struct sample_noise noise = {.start = s->images};
    return sampler_run(s->sampler, s->batch, s->labels, &noise, s->latents, NULL, NULL);
}

// One round: a training step, or a run of sampling steps; until the device is done.
static int run_round(struct subject *s)
{
    TRY(s->sampler ? sample_all(s) : train_one(s));
    return s->dev->api->sync(s->stream);
}

// Seconds that this rank has stood still for others since the last call: its host, its device.
static int take_waited(struct subject *s, double *seconds)
{
    static double before;
    const double now = exchange_figures(ranks_exchange()).waited;
    *seconds = 0;
    TRY(moe_exchange_waited(subject_dit(s), seconds));
    *seconds += now - before;
    before = now;
    return 0;
}

static int measure(struct subject *s, int rounds)
{
    double waited;
    const int warm_up = s->sampler ? 1 : 3, each = s->sampler ? s->steps : 1;
    for (int i = -warm_up; i < rounds && s->count < 3 * ROUNDS_MAX; i++) {
        double start = now_seconds();
        TRY(run_round(s));
        double seconds = now_seconds() - start;
        TRY(take_waited(s, &waited));
        if (i >= 0) {
            s->times[s->count++] = seconds / each;
            s->seconds += seconds, s->waited += waited;
        } else if (s->sampler && (seconds > LONG_RUN || ranks_exchange())) // its many steps are a mean already
            rounds = rounds > 3 ? 3 : rounds;
    }
    return streamed_waited(subject_dit(s), &s->copying);
}

// ---- the peer -----------------------------------------------------------------------------------

// Runs the peer once; it prints one line of JSON with "ms". NULL, with the reason set, if it does
// not.
static json_t *run_peer(const struct step_settings *o, const struct config *c, int batch,
                        bool train, bool compiled)
{
    char command[4096], line[4096], last[4096] = "";
    int n = snprintf(command, sizeof command,
                     "%s --layers %d --hidden %d --heads %d --patch %d --size %d --channels %d "
                     "--classes %d --experts %d --topk %d --shared %d --batch %d --rounds %d "
                     "--compiled %d --what %s",
                     o->peer, c->layers, c->hidden, c->heads, c->patch, c->size, c->channels,
                     c->classes, c->experts, c->topk, c->shared, batch, o->rounds, compiled,
                     train ? "train" : "sample");
    FILE *pipe = n < (int)sizeof command ? popen(command, "r") : NULL;
    if (!pipe) {
        fail(ERR_IO, "cannot run the peer: %s", o->peer);
        return NULL;
    }
    while (fgets(line, sizeof line, pipe))
        if (line[0] == '{')
            memcpy(last, line, sizeof last);
    int status = pclose(pipe);
    json_t *json = last[0] ? json_loads(last, 0, NULL) : NULL;
    if (status != 0 || !(json_number_value(json_object_get(json, "ms")) > 0)) {
        fail(ERR_INPUT, "the peer failed (status %d) or printed no line of JSON with \"ms\": %s",
             status, command);
        json_decref(json);
        return NULL;
    }
    return json;
}

static int check_peer(const struct config *c)
{
    if (c->moe == MOE_ALL && !c->qk_norm && c->learn_sigma && !c->renormalise)
        return 0;
    return fail(ERR_INPUT, "--peer compares models with experts in all blocks, learned sigma, and "
                           "without q/k norm and renormalisation");
}

// Own rounds before, between and after the peer's, so that a slow moment meets both.
static int measure_beside_peer(struct subject *s, const struct step_settings *o, bool train,
                               json_t *peers)
{
    TRY(measure(s, o->rounds));
    if (!o->peer)
        return 0;
    TRY(check_peer(s->config));
    for (int compiled = 0; compiled < PEERS; compiled++) {
        json_t *row = run_peer(o, s->config, s->batch, train, compiled);
        if (!row)
            return ERR_INPUT;
        json_object_set_new(row, "mode", json_string(compiled ? "compiled" : "eager"));
        json_array_append_new(peers, row);
        TRY(measure(s, o->rounds));
    }
    return 0;
}

// ---- rows ---------------------------------------------------------------------------------------

static double number(const json_t *row, const char *key)
{
    return json_number_value(json_object_get(row, key));
}

static const char *text(const json_t *row, const char *key)
{
    return json_string_value(json_object_get(row, key));
}

static void print_head(FILE *table)
{
    fprintf(table, "%-12s %-6s %5s %11s %10s %15s %7s %10s %10s\n", "model", "step", "batch",
            "time", "images/s", "model work", "of peak", "planned", "allocated");
}

static void print_row(FILE *table, const json_t *row)
{
    char planned[32], allocated[32], rate[32];
    size_t i;
    const json_t *peer;
    if (strlen(text(row, "name")) > 12) // a model that options changed: its sizes, on a line
        fprintf(table, "%s\n%-12s ", text(row, "name"), "");
    else
        fprintf(table, "%-12s ", text(row, "name"));
    fprintf(table, "%-6s %5.0f %8.2f ms %10.1f %15s %6.1f%% %10s %10s\n", text(row, "what"),
            number(row, "batch"), number(row, "ms"), number(row, "images_per_s"),
            format_rate(1e9 * number(row, "gflops"), "FLOP", rate), 100 * number(row, "of_product"),
            format_bytes(number(row, "memory"), planned),
            format_bytes(number(row, "allocated"), allocated));
    bench_ranks_print(row, table);
    if (number(row, "offload") > 0)
        fprintf(table, "%-12s experts of %.0f of %.0f blocks from host memory: %s in, %s out; %.1f ms "
                "wait for them\n", "", number(row, "offload"), number(row, "offload_of"),
                format_bytes(number(row, "offload_in"), planned),
                format_bytes(number(row, "offload_out"), allocated), 1e3 * number(row, "offload_wait"));
    json_array_foreach(json_object_get(row, "peers"), i, peer)
    {
        fprintf(table, "%-12s %-12s %8.2f ms  own speed / peer's: %.2f\n", "", text(peer, "mode"),
                number(peer, "ms"), number(peer, "ratio"));
    }
    fflush(table);
}

// Rows that each expert got in the last pass: a list a block, null of one without experts.
static int add_load(struct subject *s, json_t *row)
{
    const struct config *c = s->config;
    json_t *layers = json_array();
    int32_t load[512];
    json_object_set_new(row, "load", layers);
    for (int l = 0; l < c->layers; l++) {
        json_t *list = config_is_moe(c, l) ? json_array() : json_null();
        json_array_append_new(layers, list);
        if (!config_is_moe(c, l))
            continue;
        TRY(dit_read_load(subject_dit(s), l, load));
        for (int e = 0; e < c->experts; e++)
            json_array_append_new(list, json_integer(load[e]));
    }
    return 0;
}

static int add_row(struct subject *s, const struct ceilings *ceilings, json_t *peers, json_t *rows,
                   FILE *table)
{
    const bool train = s->trainer != NULL;
    const double seconds = median_of(s->times, s->count);
    const struct config_counts n = config_count(s->config);
    const double flops = 2 * (n.macs + n.macs_attention) * s->batch * (train ? 3 : 1) / seconds;
    size_t i;
    json_t *peer;
    json_array_foreach(peers, i, peer)
    {
        json_object_set_new(peer, "ratio", json_real(number(peer, "ms") / (1e3 * seconds)));
    }
    json_t *row =
        json_pack("{s:s, s:s, s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:I, s:I, s:i, s:O}", "bench", "step",
                  "name", s->name, "what", train ? "train" : "sample", "type",
                  dtype_name(s->dev->act), "batch", s->batch, "ms", 1e3 * seconds, "images_per_s",
                  s->batch / seconds, "gflops", 1e-9 * flops, "of_product", flops / ceilings->flops / ranks_count(),
                  "memory", (json_int_t)plan_total(subject_dit(s)->plan), "allocated",
                  (json_int_t)s->dev->allocated, "ranks", ranks_count(), "peers", peers);
    const struct streamed_figures f = streamed_figures(subject_dit(s));
    json_object_update_new(row, json_pack("{s:i, s:i, s:I, s:I, s:f}", "offload", f.blocks,
                                          "offload_of", f.of, "offload_in", (json_int_t)f.in,
                                          "offload_out", (json_int_t)f.out, "offload_wait",
                                          s->copying));
    json_array_append_new(rows, row);
    TRY(add_load(s, row));
    TRY(bench_ranks_add(row, s->placement, &s->ranks, seconds, s->waited / s->seconds));
    print_row(table, row);
    return 0;
}

// ---- a profile ----------------------------------------------------------------------------------

// What run_round() does, operation by operation: after one that is not noted.
static int profile_round(struct subject *s, struct bench_profile *out)
{
    struct dit *d = subject_dit(s);
    struct profile *p;
    TRY(profile_new(&d->ctx, &p));
    int code = run_round(s);
    if (code >= 0)
        code = profile_start(p);
    if (code >= 0)
        code = s->sampler ? sample_all(s) : train_one(s);
    int stopped = profile_stop(p);
    code = code < 0 ? code : stopped;
    if (code >= 0)
        code = bench_profile_add(out, p, s->name, s->trainer ? "train" : "sample", s->batch,
                                 s->sampler ? s->steps : 1);
    profile_free(p);
    return code;
}

// ---- all rows -----------------------------------------------------------------------------------

// Where one rank has not the memory, none goes on.
static int agree(int code, bool alone)
{
    bool failed;
    if (alone || (code < 0 && code != ERR_NOMEM))
        return code;
    TRY(exchange_any(ranks_exchange(), code < 0, &failed));
    return failed && code >= 0 ? fail(ERR_NOMEM, "another rank has not the memory") : code;
}

static int bench_one(struct subject *s, const struct step_settings *o, bool train,
                     const struct ceilings *ceilings, struct bench_profile *profile, json_t *rows,
                     FILE *table)
{
    json_t *peers = json_array();
    int code = agree(subject_open(s, train, o), o->alone);
    if (code >= 0)
        code = measure_beside_peer(s, o, train, peers);
    if (code >= 0)
        code = add_row(s, ceilings, peers, rows, table);
    if (code >= 0 && profile)
        code = profile_round(s, profile);
    json_decref(peers);
    return code < 0 && code != ERR_NOMEM ? fail_in(code, "%s, batch %d", s->name, s->batch) : code;
}

// The next item of a list, copied to `item`: where to go on, or NULL at its end.
static const char *next_item(const char *list, char *item, size_t size)
{
    const size_t length = strcspn(list, ",");
    if (!*list)
        return NULL;
    snprintf(item, size, "%.*s", (int)length, list);
    return list[length] ? list + length + 1 : list + length;
}

static int parse_batch(const char *item, int *batch)
{
    char *end;
    long value = strtol(item, &end, 10);
    if (end == item || *end || value < 1 || value > 65536)
        return fail(ERR_INPUT, "--batch %s: not a number from 1 to 65536", item);
    *batch = (int)value;
    return 0;
}

int bench_each(const struct step_settings *o, bench_visit *visit, void *user)
{
    char model[64], size[64], title[160];
    int batch = 0;
    for (const char *m = o->models; (m = next_item(m, model, sizeof model)) != NULL;)
        for (const char *b = o->batches; (b = next_item(b, size, sizeof size)) != NULL;) {
            struct config c;
            TRY(model_config(model, &o->overrides, &c));
            TRY(parse_batch(size, &batch));
            TRY(visit(user, model_title(model, &c, title), &c, batch));
        }
    return 0;
}

// What the visits share.
struct bench {
    struct device *dev;
    struct stream *stream;
    const struct step_settings *settings;
    const struct ceilings *ceilings;
    struct bench_profile *profile;
    json_t *rows;
    FILE *table;
    int measured;
};

// A model too large for the device: a row that says so, and on to the next.
static void add_failure(const struct bench *b, const struct subject *s, bool train)
{
    fprintf(b->table, "%-12s %-6s %5d  %s\n", s->name, train ? "train" : "sample", s->batch,
            error_message());
    json_t *row = json_pack("{s:s, s:s, s:s, s:s, s:i, s:s}", "bench", "step", "name", s->name,
                            "what", train ? "train" : "sample", "type", dtype_name(s->dev->act),
                            "batch", s->batch, "error", error_message());
    if (ranks_exchange())
        json_object_set_new(row, "placement", json_string(s->placement));
    json_array_append_new(b->rows, row);
}

static int bench_placed(struct bench *b, const char *title, const struct config *c, int batch,
                        bool train, const char *placement)
{
    const struct step_settings *o = b->settings;
    bool cpu; // is there one?
    TRY(exchange_any(o->alone ? NULL : ranks_exchange(), b->dev->info.kind == DEVICE_CPU, &cpu));
    struct subject *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "out of memory");
    s->dev = b->dev, s->stream = b->stream;
    s->config = c;
    s->batch = batch;
    s->steps = o->steps ? o->steps : cpu ? STEPS_CPU : STEPS_GPU;
    s->placement = placement;
    snprintf(s->name, sizeof s->name, "%s", title);
    int code = bench_one(s, o, train, b->ceilings, b->profile, b->rows, b->table);
    if (code == ERR_NOMEM)
        add_failure(b, s, train);
    b->measured += code >= 0;
    subject_free(s);
    return code == ERR_NOMEM ? 0 : code;
}

static int bench_model(void *user, const char *title, const struct config *c, int batch)
{
    struct bench *b = user;
    const struct step_settings *o = b->settings;
    char placement[256] = "";
    for (int train = 1; train >= 0; train--) {
        if ((o->what == 1 && !train) || (o->what == 2 && train))
            continue;
        const char *next = o->alone || !o->ranks.placement ? "uniform" : o->ranks.placement;
        while ((next = next_item(next, placement, sizeof placement)) != NULL)
            TRY(bench_placed(b, title, c, batch, train, placement));
    }
    return 0;
}

int bench_step(struct device *dev, struct stream *stream, const struct step_settings *o,
               const struct ceilings *ceilings, json_t *rows, FILE *table)
{
    struct bench_profile profile = {.ceilings = ceilings};
    struct bench b = {.dev = dev, .stream = stream, .settings = o, .ceilings = ceilings};
    b.rows = rows, b.table = table;
    b.profile = o->profile || o->trace ? &profile : NULL;
    print_head(table);
    int code = bench_each(o, bench_model, &b);
    if (code >= 0 && b.measured == 0)
        code = ERR_NOMEM; // of the last one
    if (ranks_first())
        bench_ranks_table(rows, table);
    if (code >= 0 && o->profile)
        bench_profile_print(&profile, stderr);
    if (code >= 0 && o->trace)
        code = bench_profile_trace(&profile, o->trace);
    bench_profile_free(&profile);
    return code;
}
