#include "model/checkpoint.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/collect.h"
#include "model/diffusers.h"
#include "model/infer.h"
#include "model/weights_file.h"

// ---- opening ------------------------------------------------------------------------------------

static int parse_metadata(const char *key, const char *text, json_t **out)
{
    json_error_t error;
    *out = json_loads(text, 0, &error);
    if (!*out)
        return fail(ERR_INPUT, "metadata '%s' is not JSON: %s", key, error.text);
    return 0;
}

// A file that says what its network is may not be told otherwise; what it was trained to answer may
// be another thing than a configuration from elsewhere says.
static int apply_hints(struct config *c, const struct config_hints *hints)
{
    if (hints->heads > 0 && hints->heads != c->heads)
        return fail(ERR_INPUT, "--heads %d: its configuration says %d", hints->heads, c->heads);
    if (hints->topk > 0 && hints->topk != c->topk)
        return fail(ERR_INPUT, "--topk %d: its configuration says %d", hints->topk, c->topk);
    if (hints->diffusion >= 0)
        c->diffusion = (enum diffusion)hints->diffusion;
    return 0;
}

static int read_config(struct checkpoint *c, const struct config_hints *hints)
{
    const char *text = safetensors_metadata(c->file, "ditmoe.config");
    if (!text)
        return config_infer(c->file, c->has_model || !c->has_ema ? "" : "ema.", hints, &c->config,
                            &c->sources);
    json_t *json;
    TRY(parse_metadata("ditmoe.config", text, &json));
    int code = config_from_json(json, &c->config);
    json_decref(json);
    c->has_config = code >= 0;
    return code < 0 ? code : apply_hints(&c->config, hints);
}

static int read_run(struct checkpoint *c)
{
    const char *text = safetensors_metadata(c->file, "ditmoe.train");
    if (!text)
        return 0;
    json_t *json;
    TRY(parse_metadata("ditmoe.train", text, &json));
    json_int_t step = -1, applied = 0, skipped = 0, batch = 0, accumulate = 0;
    const char *seed = NULL, *cursor = NULL;
    int bad = json_unpack(json, "{s:I, s:I, s:I, s:s, s:s, s:I, s:I}", "step", &step, "applied",
                          &applied, "skipped", &skipped, "seed", &seed, "cursor", &cursor, "batch",
                          &batch, "accumulate", &accumulate);
    if (!bad && step >= 0 && batch > 0 && batch < 1 << 24 && accumulate > 0 && accumulate < 1 << 24) {
        c->run = (struct run_state){.step = step,
                                    .applied = (int32_t)applied,
                                    .skipped = (int32_t)skipped,
                                    .seed = strtoull(seed, NULL, 10),
                                    .cursor = strtoull(cursor, NULL, 10),
                                    .batch = (int)batch,
                                    .accumulate = (int)accumulate};
        c->has_run = true;
    }
    json_decref(json);
    return c->has_run ? 0 : fail(ERR_INPUT, "metadata 'ditmoe.train' lacks a field or has a wrong one");
}

// Every parameter is there under `prefix`, with its shape.
static int expect_all(const struct safetensors *s, const struct params *p, const char *prefix)
{
    for (int i = 0; i < p->count; i++) {
        const struct param *q = &p->list[i];
        const struct st_tensor *found;
        char name[128];
        snprintf(name, sizeof name, "%s%s", prefix, q->name);
        if (q->frozen && *prefix && !safetensors_find(s, name))
            continue; // one copy of what is not trained is enough
        TRY(safetensors_expect(s, name, -1, q->ndim, q->shape, &found));
    }
    return 0;
}

static int check_tensors(struct checkpoint *c)
{
    struct params p;
    TRY(params_new(&c->config, &p));
    int code = c->has_model || !c->has_ema ? expect_all(c->file, &p, "") : 0;
    if (code >= 0 && c->has_ema)
        code = expect_all(c->file, &p, "ema.");
    if (code >= 0 && c->has_moments) {
        code = expect_all(c->file, &p, "adam.m.");
        if (code >= 0)
            code = expect_all(c->file, &p, "adam.v.");
    }
    params_free(&p);
    return code;
}

int checkpoint_open(const char *path, const struct config_hints *hints, struct checkpoint *out)
{
    const char *probe = "final_layer.linear.weight", *ema = "ema.final_layer.linear.weight";
    *out = (struct checkpoint){0};
    snprintf(out->path, sizeof out->path, "%s", path);
    TRY(weights_file_open(path, &out->file));
    if (diffusers_is(out->file))
        TRY(diffusers_adopt(&out->file));
    out->has_model = safetensors_find(out->file, probe) != NULL;
    out->has_ema = safetensors_find(out->file, ema) != NULL;
    out->has_moments = safetensors_find(out->file, "adam.m.final_layer.linear.weight") != NULL;
    int code = read_config(out, hints ? hints : &NO_HINTS);
    if (code >= 0)
        code = read_run(out);
    if (code >= 0)
        code = check_tensors(out);
    if (code < 0) {
        if (!strstr(error_message(), path))
            fail_in(code, "%s", path);
        checkpoint_close(out);
    }
    return code;
}

void checkpoint_close(struct checkpoint *c)
{
    safetensors_close(c->file);
    c->file = NULL;
}

// ---- loading ------------------------------------------------------------------------------------

static int check_finite(const struct checkpoint *c, const char *name, const float *host, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(host[i]))
            return fail(ERR_INPUT, "%s: %s: element %" PRId64 " is %g; the weights are damaged", c->path,
                        name, i, (double)host[i]);
    return 0;
}

int checkpoint_tensor(const struct checkpoint *c, const struct param *p, const char *prefix,
                      const struct st_tensor **out)
{
    char name[128];
    snprintf(name, sizeof name, "%s%s", prefix, p->name);
    *out = safetensors_find(c->file, name);
    if (!*out && p->frozen) // one copy, under whichever prefix
        *out = safetensors_find(c->file, p->name);
    return *out ? 0 : fail(ERR_INPUT, "%s: %s is missing", c->path, name);
}

static int load_param(const struct checkpoint *c, struct dit *d, struct weights *to,
                      const struct param *p, const char *prefix)
{
    const struct st_tensor *t;
    TRY(checkpoint_tensor(c, p, prefix, &t));
    const int64_t count = param_count(p);
    float *host = malloc((size_t)count * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for %s", t->name);
    int code = safetensors_read_f32(c->file, t, host, 0, count);
    if (code >= 0)
        code = check_finite(c, t->name, host, count);
    if (code >= 0)
        code = param_write(&d->ctx, to, p, host);
    free(host);
    return code;
}

static int load_all(const struct checkpoint *c, struct dit *d, struct weights *to, const char *prefix,
                    bool frozen)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        if ((frozen || !p->frozen) && p->start != PARAM_ELSEWHERE)
            TRY(load_param(c, d, to, p, prefix));
    }
    return 0;
}

int checkpoint_prefix(const struct checkpoint *c, enum weights_choice which, const char **prefix)
{
    if (which == WEIGHTS_EMA && !c->has_ema)
        return fail(ERR_INPUT, "%s holds no EMA weights; use --weights model", c->path);
    if (which == WEIGHTS_MODEL && !c->has_model)
        return fail(ERR_INPUT, "%s holds EMA weights only; use --weights ema", c->path);
    *prefix = which != WEIGHTS_MODEL && c->has_ema ? "ema." : "";
    return 0;
}

int checkpoint_load(const struct checkpoint *c, struct dit *d, enum weights_choice which)
{
    const char *prefix = "";
    TRY(checkpoint_prefix(c, which, &prefix));
    return load_all(c, d, &d->w, prefix, true);
}

int checkpoint_load_training(const struct checkpoint *c, struct dit *d)
{
    if (!c->has_run || !c->has_moments || !c->has_ema)
        return fail(ERR_INPUT, "%s cannot be resumed: it holds no %s (it is a model for sampling)",
                    c->path, !c->has_moments ? "Adam moments" : !c->has_ema ? "EMA" : "run state");
    TRY(load_all(c, d, &d->w, "", true));
    TRY(load_all(c, d, &d->ema, "ema.", false));
    TRY(load_all(c, d, &d->m, "adam.m.", false));
    return load_all(c, d, &d->v, "adam.v.", false);
}

// ---- saving -------------------------------------------------------------------------------------

struct part {
    const char *prefix;
    struct weights *from;
};

static int declare_part(struct safetensors_writer *w, const struct dit *d, const struct part *part)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        char name[128];
        snprintf(name, sizeof name, "%s%s", part->prefix, p->name);
        if (!p->frozen || part->from == &d->w)
            TRY(safetensors_declare(w, name, ST_F32, p->ndim, p->shape));
    }
    return 0;
}

// w NULL: on a rank that does not write, but has parameters for the one that does.
static int write_part(struct safetensors_writer *w, struct dit *d, const struct part *part)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        if (p->frozen && part->from != &d->w)
            continue;
        const size_t bytes = (size_t)param_count(p) * sizeof(float);
        float *host = malloc(bytes);
        if (!host)
            return fail(ERR_NOMEM, "no host memory to save %s", p->name);
        int code = collect_param(d, part->from, p, host);
        if (code >= 0 && w)
            code = safetensors_write(w, host, bytes);
        free(host);
        TRY(code);
    }
    return 0;
}

static int set_json(struct safetensors_writer *w, const char *key, json_t *json)
{
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    int code = text ? safetensors_set_metadata(w, key, text)
                    : fail(ERR_NOMEM, "no host memory for metadata '%s'", key);
    free(text);
    return code;
}

static json_t *run_to_json(const struct run_state *r)
{
    char seed[24], cursor[24]; // as text: JSON numbers lose bits of 64-bit integers elsewhere
    snprintf(seed, sizeof seed, "%" PRIu64, r->seed);
    snprintf(cursor, sizeof cursor, "%" PRIu64, r->cursor);
    return json_pack("{s:I, s:i, s:i, s:s, s:s, s:i, s:i}", "step", (json_int_t)r->step, "applied",
                     (int)r->applied, "skipped", (int)r->skipped, "seed", seed, "cursor", cursor,
                     "batch", r->batch, "accumulate", r->accumulate);
}

static int save_parts(struct safetensors_writer *w, struct dit *d, const struct run_state *run,
                      const struct part *parts, int count)
{
    for (int i = 0; i < count; i++)
        TRY(declare_part(w, d, &parts[i]));
    TRY(safetensors_set_metadata(w, "format", "pt"));
    TRY(set_json(w, "ditmoe.config", config_to_json(&d->config)));
    if (run)
        TRY(set_json(w, "ditmoe.train", run_to_json(run)));
    TRY(safetensors_begin(w));
    for (int i = 0; i < count; i++)
        TRY(write_part(w, d, &parts[i]));
    return 0;
}

int checkpoint_save(const char *path, struct dit *d, const struct run_state *run)
{
    struct part parts[4] = {{"", &d->w}};
    int count = 1;
    if (d->options.ema)
        parts[count++] = (struct part){"ema.", &d->ema};
    if (d->options.optimiser && run) {
        parts[count++] = (struct part){"adam.m.", &d->m};
        parts[count++] = (struct part){"adam.v.", &d->v};
    }
    struct safetensors_writer *w;
    if (!collect_writes(d)) {
        for (int i = 0; i < count; i++)
            TRY(write_part(NULL, d, &parts[i]));
        return 0;
    }
    TRY(safetensors_create(path, &w));
    int code = save_parts(w, d, run, parts, count);
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    return safetensors_commit(w);
}
