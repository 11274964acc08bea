// See convert.h.
#include "model/convert.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/atomic_file.h"
#include "model/weight_list.h"

// ---- ours and PyTorch's -------------------------------------------------------------------------

// The weights under `prefix`, named with `named`.
static int list_set(const struct checkpoint *from, const struct params *p, const char *prefix,
                    const char *named, int dtype, struct weight_list *list)
{
    char name[WEIGHT_NAME];
    for (int i = 0; i < p->count; i++) {
        const struct st_tensor *t;
        if (*named && p->list[i].frozen)
            continue; // is there once
        TRY(checkpoint_tensor(from, &p->list[i], prefix, &t));
        snprintf(name, sizeof name, "%s%s", named, p->list[i].name);
        TRY(weight_list_add(list, name, t, dtype, NULL));
    }
    return 0;
}

static int list_model(const struct checkpoint *from, enum weights_choice which, int dtype,
                      struct weight_list *list)
{
    struct params p;
    const char *prefix = "";
    const bool both = which == WEIGHTS_AUTO && from->has_model && from->has_ema;
    TRY(checkpoint_prefix(from, both ? WEIGHTS_MODEL : which, &prefix));
    TRY(params_new(&from->config, &p));
    int code = list_set(from, &p, prefix, "", dtype, list);
    if (code >= 0 && both)
        code = list_set(from, &p, "ema.", "ema.", dtype, list);
    params_free(&p);
    return code;
}

int convert_model(const struct checkpoint *from, enum weights_choice which, int dtype,
                  const char *path, enum weights_format format)
{
    struct weight_list list = {0};
    json_t *json = config_to_json(&from->config);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    const char *const metadata[][2] = {{"ditmoe.config", text}, {"format", "pt"}};
    int code = text ? list_model(from, which, dtype, &list)
                    : fail(ERR_NOMEM, "no host memory for the configuration");
    if (code >= 0)
        code = weight_list_write(&list, from->file, path, format, metadata,
                                 format == WEIGHTS_AS_SAFETENSORS ? 2 : 1);
    weight_list_free(&list);
    json_decref(json);
    free(text);
    return code;
}

int convert_tensors(const struct safetensors *from, int dtype, const char *path,
                    enum weights_format format)
{
    static const char *const metadata[][2] = {{"format", "pt"}};
    struct weight_list list = {0};
    int code = 0;
    for (int i = 0; code >= 0 && i < safetensors_count(from); i++) {
        const struct st_tensor *t = safetensors_at(from, i);
        code = weight_list_add(&list, t->name, t, dtype, NULL);
    }
    if (code >= 0)
        code = weight_list_write(&list, from, path, format, metadata,
                                 format == WEIGHTS_AS_SAFETENSORS);
    weight_list_free(&list);
    return code;
}

// ---- diffusers ----------------------------------------------------------------------------------

struct renaming {
    const struct checkpoint *from;
    const struct params *params;
    const char *prefix;
    int dtype;
    struct weight_list *list;
};

// Part `part` of `parts` of our parameter's rows, under another name.
static int rename_part(const struct renaming *r, const char *ours, const char *theirs, int part,
                       int parts)
{
    const struct param *p = params_find(r->params, ours);
    const struct st_tensor *t;
    struct weight_item *item;
    BUG_IF(!p);
    TRY(checkpoint_tensor(r->from, p, r->prefix, &t));
    TRY(weight_list_add(r->list, theirs, t, r->dtype, &item));
    item->shape[0] /= parts;
    item->first = part * (t->count / parts);
    return 0;
}

// Weight and bias of a layer; the names are formats of the block's number.
static int rename_layer(const struct renaming *r, int block, const char *ours, const char *theirs,
                        int part, int parts)
{
    static const char *const kinds[] = {"weight", "bias"};
    for (int i = 0; i < 2; i++) {
        char a[WEIGHT_NAME], b[WEIGHT_NAME];
        int n = block < 0 ? 0 : snprintf(a, sizeof a, "blocks.%d.", block);
        snprintf(a + n, sizeof a - (size_t)n, "%s.%s", ours, kinds[i]);
        n = block < 0 ? 0 : snprintf(b, sizeof b, "transformer_blocks.%d.", block);
        snprintf(b + n, sizeof b - (size_t)n, "%s.%s", theirs, kinds[i]);
        TRY(rename_part(r, a, b, part, parts));
    }
    return 0;
}

// Every block of diffusers' has an embedding of t and class of its own; all are the same here.
static int rename_block(const struct renaming *r, int l)
{
    static const char *const embedder = "norm1.emb.timestep_embedder.linear_";
    for (int i = 0; i < 2; i++) {
        char a[64], b[WEIGHT_NAME];
        for (int bias = 0; bias < 2; bias++) {
            snprintf(a, sizeof a, "t_embedder.mlp.%d.%s", 2 * i, bias ? "bias" : "weight");
            snprintf(b, sizeof b, "transformer_blocks.%d.%s%d.%s", l, embedder, i + 1,
                     bias ? "bias" : "weight");
            TRY(rename_part(r, a, b, 0, 1));
        }
    }
    char table[WEIGHT_NAME];
    snprintf(table, sizeof table,
             "transformer_blocks.%d.norm1.emb.class_embedder.embedding_table.weight", l);
    TRY(rename_part(r, "y_embedder.embedding_table.weight", table, 0, 1));
    TRY(rename_layer(r, l, "adaLN_modulation.1", "norm1.linear", 0, 1));
    TRY(rename_layer(r, l, "attn.qkv", "attn1.to_q", 0, 3));
    TRY(rename_layer(r, l, "attn.qkv", "attn1.to_k", 1, 3));
    TRY(rename_layer(r, l, "attn.qkv", "attn1.to_v", 2, 3));
    TRY(rename_layer(r, l, "attn.proj", "attn1.to_out.0", 0, 1));
    TRY(rename_layer(r, l, "mlp.fc1", "ff.net.0.proj", 0, 1));
    return rename_layer(r, l, "mlp.fc2", "ff.net.2", 0, 1);
}

static int rename_all(const struct renaming *r)
{
    TRY(rename_layer(r, -1, "x_embedder.proj", "pos_embed.proj", 0, 1));
    for (int l = 0; l < r->from->config.layers; l++)
        TRY(rename_block(r, l));
    TRY(rename_layer(r, -1, "final_layer.adaLN_modulation.1", "proj_out_1", 0, 1));
    return rename_layer(r, -1, "final_layer.linear", "proj_out_2", 0, 1);
}

static int write_config(const struct config *c, const char *path)
{
    struct atomic_file *f;
    json_t *json =
        json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:s, s:f, s:b, s:b}",
                  "_class_name", "DiTTransformer2DModel", "_diffusers_version", "0.21.0",
                  "num_attention_heads", c->heads, "attention_head_dim", c->hidden / c->heads,
                  "in_channels", c->channels, "out_channels", config_out_channels(c), "num_layers",
                  c->layers, "sample_size", c->size, "patch_size", c->patch, "num_embeds_ada_norm",
                  c->classes, "activation_fn", "gelu-approximate", "norm_type", "ada_norm_zero",
                  "norm_eps", 1e-6, "norm_elementwise_affine", 0, "attention_bias", 1);
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

static int check_diffusers(const struct checkpoint *c)
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

int convert_diffusers(const struct checkpoint *from, enum weights_choice which, int dtype,
                      const char *directory)
{
    static const char *const metadata[][2] = {{"format", "pt"}};
    char path[4096];
    struct params params;
    struct weight_list list = {0};
    const char *prefix = "";
    TRY(check_diffusers(from));
    TRY(checkpoint_prefix(from, which, &prefix));
    if (mkdir(directory, 0777) && errno != EEXIST)
        return fail(ERR_IO, "%s: cannot be made: %s", directory, strerror(errno));
    TRY(params_new(&from->config, &params));
    const struct renaming r = {from, &params, prefix, dtype, &list};
    int code = rename_all(&r);
    if (code >= 0) {
        snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", directory);
        code = weight_list_write(&list, from->file, path, WEIGHTS_AS_SAFETENSORS, metadata, 1);
    }
    if (code >= 0) {
        snprintf(path, sizeof path, "%s/config.json", directory);
        code = write_config(&from->config, path);
    }
    weight_list_free(&list);
    params_free(&params);
    return code;
}
