#include "tools/bench_step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/sampler.h"
#include "model/train.h"
#include "tools/progress.h"

enum { WARM_UP = 2, PEERS = 2, ROUNDS_MAX = 1000 };

// A model under measurement: one of trainer and sampler.
struct subject {
    const struct config *config;
    int batch;
    struct trainer *trainer;
    struct sampler *sampler;
    float *images, *latents;
    int32_t *labels;
    double times[3 * ROUNDS_MAX], last;
    int count, skip; // times measured; rounds still to warm up
};

// ---- random weights and inputs ------------------------------------------------------------------

// xorshift64*, uniform in (-1,1): there may be hundreds of millions to draw.
static float draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((double)(int64_t)(*state * 2685821657736338717u) * 0x1p-63);
}

// Every parameter is random (zero ones would make whole branches zero), scaled so that activations
// stay near 1.
static int randomise(struct dit *d)
{
    uint64_t state = 88172645463325252u;
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const size_t count = (size_t)param_count(p);
        float *host = malloc(sizeof *host * count);
        if (!host)
            return fail(ERR_NOMEM, "out of memory for %s", p->name);
        double inputs = p->ndim > 1 ? (double)count / (double)p->shape[0] : 100;
        float scale = (float)sqrt(3 / inputs), base = p->init == INIT_ONE ? 1 : 0;
        for (size_t k = 0; k < count; k++)
            host[k] = base + scale * draw(&state);
        int code = param_write(&d->ctx, &d->w, p, host);
        free(host);
        TRY(code);
    }
    return 0;
}

static int make_inputs(struct subject *s)
{
    const struct config *c = s->config;
    const size_t n = (size_t)s->batch, pixels = (size_t)c->channels * (size_t)(c->size * c->size);
    uint64_t state = 1181783497276652981u;
    s->images = malloc(sizeof(float) * n * pixels);
    s->latents = malloc(sizeof(float) * n * pixels);
    s->labels = malloc(sizeof *s->labels * n);
    if (!s->images || !s->latents || !s->labels)
        return fail(ERR_NOMEM, "out of memory for %d images", s->batch);
    for (size_t i = 0; i < n * pixels; i++)
        s->images[i] = draw(&state);
    for (size_t i = 0; i < n; i++)
        s->labels[i] = (int32_t)(i % (size_t)c->classes);
    return 0;
}

static void subject_free(struct subject *s)
{
    trainer_free(s->trainer);
    sampler_free(s->sampler);
    free(s->images), free(s->latents), free(s->labels);
    free(s);
}

static struct dit *subject_dit(const struct subject *s)
{
    return s->trainer ? s->trainer->dit : s->sampler->dit;
}

static int subject_open(struct device *dev, struct stream *stream, struct subject *s, bool train)
{
    TRY(make_inputs(s));
    if (train) {
        struct train_options t = train_defaults();
        t.batch = s->batch;
        TRY(trainer_new(dev, stream, s->config, &t, &s->trainer));
        TRY(trainer_commit(s->trainer));
    } else { // without guidance: one forward pass of `batch` images
        struct sample_options o = {.steps = 1, .cfg = 1, .pack = true};
        TRY(sampler_new(dev, stream, s->config, s->batch, &o, &s->sampler));
    }
    return randomise(subject_dit(s));
}

// ---- measuring ----------------------------------------------------------------------------------

static void note_time(struct subject *s)
{
    double now = now_seconds();
    if (s->skip > 0)
        s->skip--;
    else if (s->count < 3 * ROUNDS_MAX)
        s->times[s->count++] = now - s->last;
    s->last = now;
}

static int sampled(void *user, int done, int total)
{
    (void)done, (void)total;
    note_time(user);
    return 0;
}

static int measure(struct subject *s, int rounds)
{
    struct train_report report;
    s->skip = WARM_UP;
    s->last = now_seconds();
    if (s->sampler) {
        s->sampler->options.steps = rounds + WARM_UP;
        return sampler_run(s->sampler, s->batch, s->labels, s->images, s->latents, sampled, s);
    }
    for (int i = 0; i < rounds + WARM_UP; i++) {
        bool done;
        TRY(trainer_micro(s->trainer, s->images, s->labels, &done));
        TRY(trainer_report(s->trainer, &report)); // waits for the step
        note_time(s);
    }
    return 0;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(struct subject *s)
{
    qsort(s->times, (size_t)s->count, sizeof *s->times, ascending);
    return s->count ? s->times[s->count / 2] : NAN;
}

// ---- the peer -----------------------------------------------------------------------------------

// Runs the peer once; it prints one line of JSON with "ms". NULL, with the reason set, if it does
// not.
static json_t *run_peer(const struct step_settings *o, const struct config *c, bool train,
                        bool compiled)
{
    char command[4096], line[4096], last[4096] = "";
    int n = snprintf(command, sizeof command,
                     "%s --layers %d --hidden %d --heads %d --patch %d --size %d --channels %d "
                     "--classes %d --experts %d --topk %d --shared %d --batch %d --rounds %d "
                     "--compiled %d --what %s",
                     o->peer, c->layers, c->hidden, c->heads, c->patch, c->size, c->channels,
                     c->classes, c->experts, c->topk, c->shared, o->batch, o->rounds, compiled,
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
        json_t *row = run_peer(o, s->config, train, compiled);
        if (!row)
            return ERR_INPUT;
        json_object_set_new(row, "mode", json_string(compiled ? "compiled" : "eager"));
        json_array_append_new(peers, row);
        TRY(measure(s, o->rounds));
    }
    return 0;
}

// ---- rows ---------------------------------------------------------------------------------------

static void print_row(FILE *table, const json_t *row, const json_t *peers)
{
    char bytes[32];
    size_t i;
    const json_t *peer;
    fprintf(table, "%s\n  %-7s batch %-5d %9.1f ms %9.1f images/s %8.1f GFLOP/s  %s\n",
            json_string_value(json_object_get(row, "name")),
            json_string_value(json_object_get(row, "what")),
            (int)json_integer_value(json_object_get(row, "batch")),
            json_number_value(json_object_get(row, "ms")),
            json_number_value(json_object_get(row, "images_per_s")),
            json_number_value(json_object_get(row, "gflops")),
            format_bytes((double)json_integer_value(json_object_get(row, "memory")), bytes));
    json_array_foreach((json_t *)peers, i, peer)
    {
        fprintf(table, "  %-7s %-11s %9.1f ms  own speed / peer's: %.2f\n", "peer",
                json_string_value(json_object_get(peer, "mode")),
                json_number_value(json_object_get(peer, "ms")),
                json_number_value(json_object_get(peer, "ratio")));
    }
    fflush(table);
}

static void add_row(const struct subject *s, const struct step_settings *o, bool train,
                    double seconds, json_t *peers, json_t *rows, FILE *table)
{
    char title[160];
    struct config_counts n = config_count(s->config);
    double flops = 2 * (n.macs + n.macs_attention) * s->batch * (train ? 3 : 1);
    size_t i;
    json_t *peer;
    json_array_foreach(peers, i, peer)
    {
        double ms = json_number_value(json_object_get(peer, "ms"));
        json_object_set_new(peer, "ratio", json_real(ms / (1e3 * seconds)));
    }
    json_t *row = json_pack("{s:s, s:s, s:s, s:i, s:f, s:f, s:f, s:I, s:O}", "bench", "step",
                            "name", model_title(o->model, s->config, title), "what",
                            train ? "train" : "sample", "batch", s->batch, "ms", 1e3 * seconds,
                            "images_per_s", s->batch / seconds, "gflops", 1e-9 * flops / seconds,
                            "memory", (json_int_t)plan_total(subject_dit(s)->plan), "peers", peers);
    print_row(table, row, peers);
    json_array_append_new(rows, row);
}

static int bench_one(struct device *dev, struct stream *stream, const struct config *c,
                     const struct step_settings *o, bool train, json_t *rows, FILE *table)
{
    struct subject *s = calloc(1, sizeof *s);
    json_t *peers = json_array();
    if (!s || !peers)
        return fail(ERR_NOMEM, "out of memory");
    s->config = c;
    s->batch = o->batch;
    int code = subject_open(dev, stream, s, train);
    if (code >= 0)
        code = measure_beside_peer(s, o, train, peers);
    if (code >= 0)
        add_row(s, o, train, median(s), peers, rows, table);
    json_decref(peers);
    subject_free(s);
    return code;
}

int bench_step(struct device *dev, struct stream *stream, const struct config *c,
               const struct step_settings *o, json_t *rows, FILE *table)
{
    if (o->what != 2)
        TRY(bench_one(dev, stream, c, o, true, rows, table));
    return o->what != 1 ? bench_one(dev, stream, c, o, false, rows, table) : 0;
}
