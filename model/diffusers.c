// See diffusers.h.
#include "model/diffusers.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/atomic_file.h"
#include "model/safetensors_internal.h"
#include "model/weight_list.h"
#include "runtime/json_file.h"

enum { NAME = WEIGHT_NAME, SIDE_MAX = 128, CONFIG_BYTES = 1 << 16 };

// ---- names --------------------------------------------------------------------------------------

// A layer with weight and bias; ours is `parts` of theirs, one below the other.
struct layer {
    const char *ours, *theirs;
    int part, parts;
};
static const struct layer outside[] = {{"x_embedder.proj", "pos_embed.proj", 0, 1},
                                       {"final_layer.adaLN_modulation.1", "proj_out_1", 0, 1},
                                       {"final_layer.linear", "proj_out_2", 0, 1}};
static const struct layer in_blocks[] = {{"adaLN_modulation.1", "norm1.linear", 0, 1},
                                         {"attn.qkv", "attn1.to_q", 0, 3},
                                         {"attn.qkv", "attn1.to_k", 1, 3},
                                         {"attn.qkv", "attn1.to_v", 2, 3},
                                         {"attn.proj", "attn1.to_out.0", 0, 1},
                                         {"mlp.fc1", "ff.net.0.proj", 0, 1},
                                         {"mlp.fc2", "ff.net.2", 0, 1}};
// Once here, in every block there.
static const char *const embeddings[][2] = {
    {"t_embedder.mlp.0.weight", "norm1.emb.timestep_embedder.linear_1.weight"},
    {"t_embedder.mlp.0.bias", "norm1.emb.timestep_embedder.linear_1.bias"},
    {"t_embedder.mlp.2.weight", "norm1.emb.timestep_embedder.linear_2.weight"},
    {"t_embedder.mlp.2.bias", "norm1.emb.timestep_embedder.linear_2.bias"},
    {"y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight"}};

#define COUNT(list) (sizeof(list) / sizeof *(list))

// One tensor of theirs: part `part` of `parts` of ours; `copy`: another of what is once here.
struct pair {
    char ours[NAME], theirs[NAME];
    int part, parts;
    bool copy;
};
typedef int (*pair_visitor)(void *user, const struct pair *p);

static int visit_layers(const struct layer *list, size_t count, int block, pair_visitor visit,
                        void *user)
{
    static const char *const kinds[] = {"weight", "bias"};
    char ours[32] = "", theirs[40] = "";
    if (block >= 0) {
        snprintf(ours, sizeof ours, "blocks.%d.", block);
        snprintf(theirs, sizeof theirs, "transformer_blocks.%d.", block);
    }
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < count; i++) {
            struct pair p = {.part = list[i].part, .parts = list[i].parts};
            snprintf(p.ours, NAME, "%s%s.%s", ours, list[i].ours, kinds[k]);
            snprintf(p.theirs, NAME, "%s%s.%s", theirs, list[i].theirs, kinds[k]);
            TRY(visit(user, &p));
        }
    }
    return 0;
}

// All tensors of theirs; those that make one of ours follow one another.
static int visit_all(int layers, pair_visitor visit, void *user)
{
    TRY(visit_layers(outside, COUNT(outside), -1, visit, user));
    for (int l = 0; l < layers; l++) {
        for (size_t i = 0; i < COUNT(embeddings); i++) {
            struct pair p = {.parts = 1, .copy = l > 0};
            snprintf(p.ours, NAME, "%s", embeddings[i][0]);
            snprintf(p.theirs, NAME, "transformer_blocks.%d.%s", l, embeddings[i][1]);
            TRY(visit(user, &p));
        }
        TRY(visit_layers(in_blocks, COUNT(in_blocks), l, visit, user));
    }
    return 0;
}

bool diffusers_is(const struct safetensors *file)
{
    return safetensors_find(file, "transformer_blocks.0.attn1.to_q.weight") &&
           safetensors_find(file, "pos_embed.proj.weight");
}

// ---- reading the configuration ------------------------------------------------------------------

static int field(const json_t *j, const char *key, int low, int high, int *out)
{
    const json_t *v = json_object_get(j, key);
    if (!json_is_integer(v) || json_integer_value(v) < low || json_integer_value(v) > high)
        return fail(ERR_INPUT, "'%s' is missing, or not from %d to %d", key, low, high);
    *out = (int)json_integer_value(v);
    return 0;
}

static int must_be(const json_t *j, const char *key, const char *value)
{
    const char *is = json_string_value(json_object_get(j, key));
    if (!is || strcmp(is, value))
        return fail(ERR_INPUT, "'%s' is '%s': only '%s' is known here", key,
                    st_shown(is ? is : "missing").text, value);
    return 0;
}

// What this network has no other form of.
static int check_kind(const json_t *j)
{
    const char *class = json_string_value(json_object_get(j, "_class_name"));
    if (!class || (strcmp(class, "DiTTransformer2DModel") && strcmp(class, "Transformer2DModel")))
        return fail(ERR_INPUT, "'_class_name' is '%s', not DiTTransformer2DModel",
                    st_shown(class ? class : "missing").text);
    TRY(must_be(j, "activation_fn", "gelu-approximate"));
    TRY(must_be(j, "norm_type", "ada_norm_zero"));
    if (json_is_true(json_object_get(j, "norm_elementwise_affine")))
        return fail(ERR_INPUT, "'norm_elementwise_affine': DiT's norms have no weights");
    const json_t *eps = json_object_get(j, "norm_eps");
    if (json_is_number(eps) && json_number_value(eps) > 1.01e-5)
        return fail(ERR_INPUT, "'norm_eps' is %g: here it is 1e-6", json_number_value(eps));
    return 0;
}

static int read_fields(const json_t *j, struct config *c)
{
    int head = 0, out = 0;
    TRY(check_kind(j));
    *c = (struct config){.experts = 1,
                         .topk = 1,
                         .moe = MOE_NONE,
                         .balance = 0.01f,
                         .class_dropout = 0.1f,
                         .diffusion = DIFFUSION_DDPM,
                         .full_frequencies = true};
    TRY(field(j, "num_attention_heads", 1, 1024, &c->heads));
    TRY(field(j, "attention_head_dim", 1, 128, &head));
    TRY(field(j, "in_channels", 1, 1024, &c->channels));
    TRY(field(j, "num_layers", 1, 1024, &c->layers));
    TRY(field(j, "patch_size", 1, 64, &c->patch));
    TRY(field(j, "sample_size", 1, SIDE_MAX * c->patch, &c->size));
    TRY(field(j, "num_embeds_ada_norm", 1, 1000000, &c->classes));
    if (json_is_null(json_object_get(j, "out_channels")) || !json_object_get(j, "out_channels"))
        out = c->channels;
    else
        TRY(field(j, "out_channels", 1, 2048, &out));
    if (out != c->channels && out != 2 * c->channels)
        return fail(ERR_INPUT, "'out_channels' is %d, neither in_channels nor twice that", out);
    c->learn_sigma = out != c->channels;
    c->hidden = c->heads * head;
    // what convert writes: the weights are of a DiT with its own frequencies
    const char *own = json_string_value(json_object_get(j, "_ditmoe_frequencies"));
    c->full_frequencies = !own || strcmp(own, "half");
    return config_check(c);
}

static int read_config(const char *weights, struct config *out)
{
    char path[4096];
    struct stat info;
    const char *slash = strrchr(weights, '/');
    const int n = slash ? (int)(slash - weights + 1) : 0;
    if (snprintf(path, sizeof path, "%.*sconfig.json", n, weights) >= (int)sizeof path)
        return fail(ERR_INPUT, "name too long");
    if (stat(path, &info) || info.st_size > CONFIG_BYTES)
        return fail(ERR_INPUT, "a model of diffusers', whose config.json must lie beside it");
    json_t *json;
    TRY(json_read(path, &json));
    const int code = read_fields(json, out);
    json_decref(json);
    return code < 0 ? fail_in(code, "%s", path) : 0;
}

// ---- reading the weights ------------------------------------------------------------------------

struct reading {
    const struct safetensors *file;
    struct params params;
    struct st_joined joined;
    int piece_count;
};

// Of what is once here, in block 0 there, the other blocks' copies.
static int check_copy(const struct reading *r, const struct pair *p, const struct st_tensor *copy)
{
    const struct st_tensor *t = r->joined.tensors;
    while (strcmp(t->name, p->ours)) // it came with block 0
        t++;
    if (t->dtype == copy->dtype && !memcmp(t->pieces->data, copy->data, copy->bytes))
        return 0;
    return fail(ERR_INPUT,
                "tensor '%s' differs from that of the first block: here all blocks share one "
                "embedding of t and class",
                p->theirs);
}

static void begin_tensor(struct reading *r, const struct param *ours, const struct st_tensor *first)
{
    struct st_tensor *t = &r->joined.tensors[r->joined.count++];
    *t = (struct st_tensor){.name = ours->name, .dtype = first->dtype, .ndim = ours->ndim};
    memcpy(t->shape, ours->shape, sizeof ours->shape);
    t->pieces = &r->joined.pieces[r->piece_count];
}

// Their tensor is ours, or the next piece of it.
static int read_pair(void *user, const struct pair *p)
{
    struct reading *r = user;
    const struct param *ours = params_find(&r->params, p->ours);
    const struct st_tensor *part;
    int64_t shape[4];
    BUG_IF(!ours);
    memcpy(shape, ours->shape, sizeof shape);
    shape[0] /= p->parts;
    TRY(safetensors_expect(r->file, p->theirs, -1, ours->ndim, shape, &part));
    if (part->strided || part->pieces)
        return fail(ERR_INPUT, "tensor '%s': its elements do not follow one another", p->theirs);
    if (p->copy)
        return check_copy(r, p, part);
    if (p->part == 0)
        begin_tensor(r, ours, part);
    struct st_tensor *t = &r->joined.tensors[r->joined.count - 1];
    if (part->dtype != t->dtype)
        return fail(ERR_INPUT, "tensor '%s': its type is not that of its neighbours", p->theirs);
    r->joined.pieces[r->piece_count++] = (struct st_piece){part->data, part->count};
    t->piece_count++;
    t->count += part->count;
    t->bytes += part->bytes;
    return 0;
}

// The position table, which diffusers computes.
static void add_position(struct reading *r, const struct param *p, float *table)
{
    struct st_tensor *t = &r->joined.tensors[r->joined.count++];
    param_init(&r->params, p, 0, table);
    *t = (struct st_tensor){.name = p->name,
                            .dtype = ST_F32,
                            .ndim = p->ndim,
                            .count = param_count(p),
                            .bytes = (uint64_t)param_count(p) * sizeof(float),
                            .data = table};
    memcpy(t->shape, p->shape, sizeof p->shape);
}

// The parameters' names move to memory that stays.
static void keep_names(struct reading *r, char *to)
{
    for (int i = 0; i < r->joined.count; i++) {
        struct st_tensor *t = &r->joined.tensors[i];
        const size_t n = strlen(t->name) + 1;
        memcpy(to, t->name, n);
        t->name = to;
        to += n;
    }
}

// The file has all that the configuration speaks of before there is memory for what it has not.
static int read_weights(struct reading *r, const struct config *c)
{
    TRY(params_new(c, &r->params));
    const size_t count = (size_t)r->params.count;
    const struct param *position = params_find(&r->params, "pos_embed");
    const size_t table = (size_t)param_count(position) * sizeof(float);
    r->joined.tensors = calloc(count, sizeof *r->joined.tensors);
    r->joined.pieces = calloc(3 * count, sizeof *r->joined.pieces);
    if (!r->joined.tensors || !r->joined.pieces)
        return fail(ERR_NOMEM, "out of memory");
    TRY(visit_all(c->layers, read_pair, r));
    r->joined.names = malloc(table + count * sizeof position->name);
    if (!r->joined.names)
        return fail(ERR_NOMEM, "out of memory");
    add_position(r, position, (float *)(void *)r->joined.names);
    keep_names(r, r->joined.names + table);
    return 0;
}

static int set_config(struct safetensors *s, const struct config *c)
{
    json_t *json = config_to_json(c);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    const int code = text ? st_set_metadata(s, "ditmoe.config", text, strlen(text))
                          : fail(ERR_NOMEM, "no host memory for the configuration");
    free(text);
    return code;
}

int diffusers_adopt(struct safetensors **file)
{
    struct config c;
    struct reading r = {.file = *file};
    char *path = strdup(safetensors_path(*file));
    int code = path ? read_config(path, &c) : fail(ERR_NOMEM, "out of memory");
    if (code >= 0)
        code = read_weights(&r, &c);
    if (code < 0 && path && !strstr(error_message(), path))
        fail_in(code, "%s", path);
    params_free(&r.params);
    if (code >= 0 && !(r.joined.files.list = malloc(sizeof *r.joined.files.list)))
        code = fail(ERR_NOMEM, "out of memory");
    if (code < 0) {
        free(r.joined.tensors), free(r.joined.pieces), free(r.joined.names);
        safetensors_close(*file);
        *file = NULL;
    } else {
        char format[64];
        snprintf(format, sizeof format, "%.40s of diffusers", safetensors_format(*file));
        r.joined.files.list[r.joined.files.count++] = *file;
        code = safetensors_join(path, format, &r.joined, file);
        if (code >= 0)
            code = set_config(*file, &c);
    }
    free(path);
    return code;
}

// ---- writing ------------------------------------------------------------------------------------

struct writing {
    const struct checkpoint *from;
    struct params params;
    const char *prefix;
    int dtype;
    struct weight_list list;
};

static int write_pair(void *user, const struct pair *p)
{
    struct writing *w = user;
    const struct param *ours = params_find(&w->params, p->ours);
    const struct st_tensor *t;
    struct weight_item *item;
    BUG_IF(!ours);
    TRY(checkpoint_tensor(w->from, ours, w->prefix, &t));
    TRY(weight_list_add(&w->list, p->theirs, t, w->dtype, &item));
    item->shape[0] /= p->parts;
    item->first = p->part * (t->count / p->parts);
    return 0;
}

// Keys that begin with _ are nothing to diffusers.
static int write_config(const struct config *c, const char *path)
{
    struct atomic_file *f;
    json_t *json = json_pack(
        "{s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:s, s:f, s:b, s:b}",
        "_class_name", "DiTTransformer2DModel", "_diffusers_version", "0.21.0",
        "_ditmoe_frequencies", c->full_frequencies ? "full" : "half", "num_attention_heads",
        c->heads, "attention_head_dim", c->hidden / c->heads, "in_channels", c->channels,
        "out_channels", config_out_channels(c), "num_layers", c->layers, "sample_size", c->size,
        "patch_size", c->patch, "num_embeds_ada_norm", c->classes, "activation_fn",
        "gelu-approximate", "norm_type", "ada_norm_zero", "norm_eps", 1e-6,
        "norm_elementwise_affine", 0, "attention_bias", 1);
    char *text = json ? json_dumps(json, JSON_INDENT(2)) : NULL;
    json_decref(json);
    if (!text)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = atomic_file_create(path, &f);
    if (code >= 0) {
        code = atomic_file_write(f, text, strlen(text));
        if (code < 0)
            atomic_file_abort(f);
        else
            code = atomic_file_commit(f);
    }
    free(text);
    return code;
}

static int check_writable(const struct checkpoint *c)
{
    if (c->config.moe != MOE_NONE)
        return fail(ERR_INPUT,
                    "%s: diffusers has no layout for a mixture of experts; .pt and safetensors do",
                    c->path);
    if (c->config.qk_norm)
        return fail(ERR_INPUT, "%s: diffusers' DiT has no normalised queries and keys", c->path);
    if (config_label_rows(&c->config) == c->config.classes)
        return fail(ERR_INPUT, "%s: diffusers' DiT wants a null class, which this one lacks",
                    c->path);
    return 0;
}

int diffusers_write(const struct checkpoint *from, enum weights_choice which, int dtype,
                    const char *directory)
{
    static const char *const metadata[][2] = {{"format", "pt"}};
    struct writing w = {.from = from, .prefix = "", .dtype = dtype};
    char path[4096];
    TRY(check_writable(from));
    TRY(checkpoint_prefix(from, which, &w.prefix));
    if (mkdir(directory, 0777) && errno != EEXIST)
        return fail(ERR_IO, "%s: cannot be made: %s", directory, strerror(errno));
    TRY(params_new(&from->config, &w.params));
    int code = visit_all(from->config.layers, write_pair, &w);
    if (code >= 0) {
        snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", directory);
        code = weight_list_write(&w.list, from->file, path, WEIGHTS_AS_SAFETENSORS, metadata, 1);
    }
    if (code >= 0) {
        snprintf(path, sizeof path, "%s/config.json", directory);
        code = write_config(&from->config, path);
    }
    weight_list_free(&w.list);
    params_free(&w.params);
    return code;
}
