#include "model/checkpoint.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/torch_file.h"

// ---- inferring the configuration of a file without metadata ------------------------------------------------

static const struct st_tensor *find(const struct safetensors *s, const char *prefix, const char *name)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return safetensors_find(s, full);
}

static const struct st_tensor *find_block(const struct safetensors *s, const char *prefix, int block,
                                          const char *suffix)
{
    char name[112];
    snprintf(name, sizeof name, "blocks.%d.%s", block, suffix);
    return find(s, prefix, name);
}

static bool is_matrix(const struct st_tensor *t, int ndim)
{
    if (!t || t->ndim != ndim)
        return false;
    for (int i = 0; i < ndim; i++)
        if (t->shape[i] < 1 || t->shape[i] > 1 << 24)
            return false;
    return true;
}

// Experts of a block: how many there are, and the shared width.
static int count_experts(const struct safetensors *s, const char *prefix, int block)
{
    int n = 0;
    char suffix[64];
    do
        snprintf(suffix, sizeof suffix, "moe.experts.%d.gate_proj.weight", n++);
    while (n < 1024 && find_block(s, prefix, block, suffix));
    return n - 1;
}

static int infer_moe(const struct safetensors *s, const char *prefix, struct config *c)
{
    c->moe = MOE_NONE;
    c->experts = 1, c->topk = 1;
    for (int l = 0; l < c->layers; l++) {
        int experts = count_experts(s, prefix, l);
        if (!experts)
            continue;
        const struct st_tensor *shared = find_block(s, prefix, l, "moe.shared_experts.gate_proj.weight");
        c->experts = experts;
        c->shared = is_matrix(shared, 2) ? (int)(shared->shape[0] / c->hidden) : 0;
        break;
    }
    for (int m = MOE_ALL; m < MOE_NONE; m++) {
        bool same = true;
        for (int l = 0; l < c->layers && same; l++) {
            c->moe = (enum moe_blocks)m;
            same = config_is_moe(c, l) == (find_block(s, prefix, l, "moe.gate.weight") != NULL);
        }
        if (same)
            return 0;
    }
    c->moe = MOE_NONE;
    return 0;
}

static int infer_heads(const struct safetensors *s, const char *prefix,
                       const struct checkpoint_hints *hints, struct config *c)
{
    static const int known[][2] = {{384, 6}, {768, 12}, {1024, 16}, {1152, 16}, {1408, 16}};
    const struct st_tensor *q = find_block(s, prefix, 0, "attn.q_norm.weight");
    c->qk_norm = q != NULL;
    c->heads = 0;
    if (is_matrix(q, 1))
        c->heads = (int)(c->hidden / q->shape[0]);
    for (int i = 0; i < 5 && !c->heads; i++)
        if (known[i][0] == c->hidden)
            c->heads = known[i][1];
    if (hints && hints->heads > 0)
        c->heads = hints->heads;
    if (!c->heads)
        return fail(ERR_INPUT, "the number of heads cannot be told from the file (hidden %d is no "
                               "preset's): give --heads", c->hidden);
    return 0;
}

static int infer_config(const struct safetensors *s, const char *prefix,
                        const struct checkpoint_hints *hints, struct config *c)
{
    const struct st_tensor *patch = find(s, prefix, "x_embedder.proj.weight");
    const struct st_tensor *pos = find(s, "", "pos_embed"), *labels, *head;
    if (!pos)
        pos = find(s, prefix, "pos_embed");
    labels = find(s, prefix, "y_embedder.embedding_table.weight");
    head = find(s, prefix, "final_layer.linear.weight");
    if (!is_matrix(patch, 4) || !is_matrix(pos, 3) || !is_matrix(labels, 2) || !is_matrix(head, 2))
        return fail(ERR_INPUT, "not a DiT: x_embedder.proj.weight, pos_embed, "
                               "y_embedder.embedding_table.weight or final_layer.linear.weight is missing "
                               "or has another rank");
    *c = (struct config){.hidden = (int)patch->shape[0],
                         .channels = (int)patch->shape[1],
                         .patch = (int)patch->shape[2],
                         .size = (int)lround(sqrt((double)pos->shape[1])) * (int)patch->shape[2],
                         .classes = (int)labels->shape[0] - 1,
                         .balance = 0.01f,
                         .class_dropout = 0.1f};
    while (c->layers < 1024 && find_block(s, prefix, c->layers, "adaLN_modulation.1.weight"))
        c->layers++;
    c->learn_sigma = head->shape[0] == 2 * (int64_t)c->channels * c->patch * c->patch;
    TRY(infer_heads(s, prefix, hints, c));
    TRY(infer_moe(s, prefix, c));
    c->topk = c->experts < 2 ? 1 : 2;
    if (hints && hints->topk > 0)
        c->topk = hints->topk;
    return config_check(c);
}

// ---- opening -------------------------------------------------------------------------------------------

static int parse_metadata(const char *key, const char *text, json_t **out)
{
    json_error_t error;
    *out = json_loads(text, 0, &error);
    if (!*out)
        return fail(ERR_INPUT, "metadata '%s' is not JSON: %s", key, error.text);
    return 0;
}

static int read_config(struct checkpoint *c, const char *prefix, const struct checkpoint_hints *hints)
{
    const char *text = safetensors_metadata(c->file, "ditmoe.config");
    if (!text)
        return infer_config(c->file, prefix, hints, &c->config);
    json_t *json;
    TRY(parse_metadata("ditmoe.config", text, &json));
    int code = config_from_json(json, &c->config);
    json_decref(json);
    c->has_config = code >= 0;
    return code;
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

static int check_tensors(struct checkpoint *c, bool has_model)
{
    struct params p;
    TRY(params_new(&c->config, &p));
    int code = has_model ? expect_all(c->file, &p, "") : 0;
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

int checkpoint_open(const char *path, const struct checkpoint_hints *hints, struct checkpoint *out)
{
    *out = (struct checkpoint){0};
    snprintf(out->path, sizeof out->path, "%s", path);
    TRY(torch_file_is(path) ? torch_file_open(path, &out->file)
                            : safetensors_open(path, &out->file));
    const char *probe = "final_layer.linear.weight";
    bool has_model = find(out->file, "", probe) != NULL;
    out->has_ema = find(out->file, "ema.", probe) != NULL;
    out->has_moments = find(out->file, "adam.m.", probe) != NULL;
    int code = read_config(out, has_model || !out->has_ema ? "" : "ema.", hints);
    if (code >= 0)
        code = read_run(out);
    if (code >= 0)
        code = check_tensors(out, has_model || !out->has_ema);
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

// ---- loading -------------------------------------------------------------------------------------------

static int check_finite(const struct checkpoint *c, const char *name, const float *host, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(host[i]))
            return fail(ERR_INPUT, "%s: %s: element %" PRId64 " is %g; the weights are damaged", c->path,
                        name, i, (double)host[i]);
    return 0;
}

static int load_param(const struct checkpoint *c, struct dit *d, struct weights *to,
                      const struct param *p, const char *prefix)
{
    char name[128];
    snprintf(name, sizeof name, "%s%s", prefix, p->name);
    const struct st_tensor *t = safetensors_find(c->file, name);
    if (!t && p->frozen) // one copy, under whichever prefix
        t = safetensors_find(c->file, p->name);
    if (!t)
        return fail(ERR_INPUT, "%s: %s is missing", c->path, name);
    const int64_t count = param_count(p);
    float *host = malloc((size_t)count * sizeof *host);
    if (!host)
        return fail(ERR_NOMEM, "no host memory for %s", name);
    int code = safetensors_read_f32(c->file, t, host, 0, count);
    if (code >= 0)
        code = check_finite(c, name, host, count);
    if (code >= 0)
        code = param_write(&d->ctx, to, p, host);
    free(host);
    return code;
}

static int load_all(const struct checkpoint *c, struct dit *d, struct weights *to, const char *prefix,
                    bool frozen)
{
    for (int i = 0; i < d->params.count; i++)
        if (frozen || !d->params.list[i].frozen)
            TRY(load_param(c, d, to, &d->params.list[i], prefix));
    return 0;
}

int checkpoint_load(const struct checkpoint *c, struct dit *d, enum weights_choice which)
{
    bool model = safetensors_find(c->file, "final_layer.linear.weight") != NULL;
    if (which == WEIGHTS_EMA && !c->has_ema)
        return fail(ERR_INPUT, "%s holds no EMA weights; use --weights model", c->path);
    if (which == WEIGHTS_MODEL && !model)
        return fail(ERR_INPUT, "%s holds EMA weights only; use --weights ema", c->path);
    return load_all(c, d, &d->w, which != WEIGHTS_MODEL && c->has_ema ? "ema." : "", true);
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

// ---- saving --------------------------------------------------------------------------------------------

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
        int code = param_read(&d->ctx, part->from, p, host);
        if (code >= 0)
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
    TRY(safetensors_create(path, &w));
    int code = save_parts(w, d, run, parts, count);
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    return safetensors_commit(w);
}
