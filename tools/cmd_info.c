// ditmoe info: what a preset or a checkpoint is, and what it costs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/weights_file.h"
#include "tools/ckpt.h"
#include "tools/progress.h"

struct info_options {
    int json;
    int diffusion; // as in struct ckpt_options
    struct model_options model;
};

#define AT(member) offsetof(struct info_options, member)
static const struct option_spec output_options[] = {
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON", AT(json), 0, 0, NULL},
    {"diffusion", 0, OPTION_CHOICE, "WHAT", "auto",
     "of a file without a configuration: rf, ddpm, or auto, as published", AT(diffusion), 0, 0,
     diffusion_hints},
    {0},
};
#undef AT

// 199307552 -> "199,307,552"
static const char *with_commas(int64_t n, char out[32])
{
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%lld", (long long)n), used = 0;
    for (int i = 0; i < length; i++) {
        if (i && (length - i) % 3 == 0)
            out[used++] = ',';
        out[used++] = digits[i];
    }
    out[used] = 0;
    return out;
}

// Four significant digits, but never fewer than the paper gives: 15.43, 219.3.
static const char *giga(double n, char out[32])
{
    n *= 1e-9;
    snprintf(out, 32, n < 0.1 ? "%.4f" : n < 100 ? "%.2f" : "%.1f", n);
    return out;
}

static bool is_file(const char *name)
{
    struct stat s;
    const char *dot = strrchr(name, '.');
    return stat(name, &s) == 0 || (dot && (!strcmp(dot, ".safetensors") || !strcmp(dot, ".pt")));
}

// ---- a file's tensors ---------------------------------------------------------------------------

enum { TOP = 5 };

struct census {
    int count;
    uint64_t bytes;
    int of_type[ST_DTYPES], others;
    const struct st_tensor *top[TOP]; // the largest, first
};

static void rank(struct census *c, const struct st_tensor *t)
{
    for (int i = 0; i < TOP; i++)
        if (!c->top[i] || t->bytes > c->top[i]->bytes) {
            memmove(&c->top[i + 1], &c->top[i], (size_t)(TOP - 1 - i) * sizeof *c->top);
            c->top[i] = t;
            return;
        }
}

static struct census take_census(const struct safetensors *s)
{
    struct census c = {.count = safetensors_count(s)};
    for (int i = 0; i < c.count; i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        c.bytes += t->bytes;
        if (t->other)
            c.others++;
        else
            c.of_type[t->dtype]++;
        rank(&c, t);
    }
    return c;
}

static void shape_text(const struct st_tensor *t, char out[160])
{
    int n = snprintf(out, 160, "[");
    for (int i = 0; i < t->ndim; i++)
        n += snprintf(out + n, (size_t)(160 - n), "%s%lld", i ? "," : "", (long long)t->shape[i]);
    snprintf(out + n, (size_t)(160 - n), "]");
}

static void print_census(const struct safetensors *s)
{
    const struct census c = take_census(s);
    char size[32], shape[160];
    printf("%-18s %s\n", "format", safetensors_format(s));
    printf("%-18s %d, %s:", "tensors", c.count, format_bytes((double)c.bytes, size));
    for (int i = 0; i < ST_DTYPES; i++)
        if (c.of_type[i])
            printf(" %d %s", c.of_type[i], st_dtype_name((enum st_dtype)i));
    printf(c.others ? " %d of other types\n" : "\n", c.others);
    for (int i = 0; i < TOP && c.top[i]; i++) {
        shape_text(c.top[i], shape);
        printf("%-18s %s %s %s\n", i ? "" : "largest", c.top[i]->name, shape,
               c.top[i]->other ? c.top[i]->other : st_dtype_name(c.top[i]->dtype));
    }
}

static json_t *census_json(const struct safetensors *s)
{
    const struct census c = take_census(s);
    json_t *types = json_object(), *top = json_array();
    for (int i = 0; i < ST_DTYPES; i++)
        if (c.of_type[i])
            json_object_set_new(types, st_dtype_name((enum st_dtype)i), json_integer(c.of_type[i]));
    for (int i = 0; i < TOP && c.top[i]; i++) {
        json_t *shape = json_array();
        for (int k = 0; k < c.top[i]->ndim; k++)
            json_array_append_new(shape, json_integer(c.top[i]->shape[k]));
        json_array_append_new(top, json_pack("{s:s, s:o, s:I}", "name", c.top[i]->name, "shape",
                                             shape, "bytes", (json_int_t)c.top[i]->bytes));
    }
    return json_pack("{s:s, s:i, s:I, s:o, s:o}", "format", safetensors_format(s), "tensors",
                     c.count, "bytes", (json_int_t)c.bytes, "types", types, "largest", top);
}

// ---- the model ----------------------------------------------------------------------------------

static void print_weights(const struct checkpoint *file)
{
    char assumed[200];
    const bool model = file->has_model, ema = file->has_ema;
    printf("%-18s %s%s%s%s\n", "weights", model ? "model" : "", model && ema ? ", " : "",
           ema ? "EMA" : "", file->has_moments ? ", Adam moments" : "");
    printf("%-18s %s%s\n", "configuration",
           file->has_config ? "in the file" : "inferred from the tensors; ",
           file->has_config ? "" : ckpt_assumed(file, assumed));
    if (file->has_run)
        printf("%-18s step %lld (%d applied, %d skipped), batch %d x %d, seed %llu\n", "training",
               (long long)file->run.step, file->run.applied, file->run.skipped, file->run.batch,
               file->run.accumulate, (unsigned long long)file->run.seed);
}

static void print_config(const struct config *c)
{
    printf("%-18s %d, width %d, %d heads of %d%s\n", "blocks", c->layers, c->hidden, c->heads,
           c->hidden / c->heads, c->qk_norm ? ", LayerNorm on queries and keys" : "");
    if (c->moe == MOE_NONE)
        printf("%-18s none: plain MLP of width %d\n", "experts", MLP_RATIO * c->hidden);
    else
        printf("%-18s %d %s of width %d, %d active, %d shared; in %s blocks; weights %s\n",
               "experts", c->experts, c->expert == EXPERT_GELU ? "GELU MLPs" : "SwiGLU",
               MLP_RATIO * c->hidden, c->topk, c->shared, moe_blocks_name(c->moe),
               c->renormalise ? "renormalised" : "not renormalised");
    printf("%-18s %d x %d, %d channels, patch %d: %d tokens\n", "images", c->size, c->size,
           c->channels, c->patch, config_tokens(c));
    printf("%-18s %d%s\n", "classes", c->classes,
           c->class_dropout > 0 ? " and the null class" : "");
    printf("%-18s %d channels%s\n", "output", config_out_channels(c),
           c->learn_sigma ? " (learned sigma)" : "");
    printf("%-18s %s%s\n", "diffusion",
           c->diffusion == DIFFUSION_DDPM ? "DDPM, 1000 steps" : "rectified flow",
           c->full_frequencies ? "; frequencies of t as in diffusers" : "");
    printf("%-18s factor %g %s; label dropout %g\n", "balance loss", (double)c->balance,
           c->balance_per_sequence ? "per image" : "over the batch", (double)c->class_dropout);
}

static void print_text(const char *name, const struct config *c, const struct checkpoint *file)
{
    struct config_counts n = config_count(c);
    char a[32], b[32];
    printf("%s\n", name);
    print_config(c);
    printf("%-18s %s\n", "parameters", with_commas(n.total, a));
    printf("%-18s %s\n", "active per token", with_commas(n.active, a));
    printf("%-18s %s (the paper's way), %s with attention's products\n", "GMAC an image",
           giga(n.macs, a), giga(n.macs + n.macs_attention, b));
    if (file) {
        print_weights(file);
        print_census(file->file);
    }
}

static void print_json(const char *name, const struct config *c, const struct checkpoint *file)
{
    struct config_counts n = config_count(c);
    json_t *json =
        json_pack("{s:s, s:o, s:I, s:I, s:f, s:f}", "name", name, "config", config_to_json(c),
                  "parameters", (json_int_t)n.total, "active", (json_int_t)n.active, "macs", n.macs,
                  "macs_with_attention", n.macs + n.macs_attention);
    if (file) {
        const struct config_sources *from = &file->sources;
        json_object_set_new(json, "file", census_json(file->file));
        json_object_set_new(json, "model", json_boolean(file->has_model));
        json_object_set_new(json, "ema", json_boolean(file->has_ema));
        json_object_set_new(json, "moments", json_boolean(file->has_moments));
        json_object_set_new(
            json, "from",
            json_pack("{s:s, s:s, s:s, s:s}", "config", config_source_name(from->others), "heads",
                      config_source_name(from->heads), "topk", config_source_name(from->topk),
                      "diffusion", config_source_name(from->diffusion)));
        if (file->has_run)
            json_object_set_new(json, "step", json_integer(file->run.step));
    }
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(json);
}

// A file whose tensors are no DiT's is told about all the same.
static int info_other(const struct info_options *o, const char *path)
{
    char why[600];
    struct safetensors *s;
    snprintf(why, sizeof why, "%s", error_message());
    if (weights_file_open(path, &s) < 0)
        return fail(ERR_INPUT, "%s", why);
    if (o->json) {
        json_t *json =
            json_pack("{s:s, s:o, s:s}", "name", path, "file", census_json(s), "no_model", why);
        json_dumpf(json, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(json);
    } else {
        printf("%s\n", path);
        print_census(s);
        printf("%-18s none that is known: %s\n", "model", why);
    }
    safetensors_close(s);
    return 0;
}

static int info_file(const struct info_options *o, const char *name)
{
    const struct config_hints hints = {o->model.heads, o->model.topk, o->diffusion - 1};
    struct checkpoint *file = calloc(1, sizeof *file);
    char path[4096];
    if (!file)
        return fail(ERR_NOMEM, "out of memory");
    int code = checkpoint_path(name, path, sizeof path);
    if (code >= 0) {
        code = checkpoint_open(path, &hints, file);
        if (code >= 0) {
            (o->json ? print_json : print_text)(path, &file->config, file);
            checkpoint_close(file);
        } else if (strstr(error_message(), "not a DiT")) {
            code = info_other(o, path);
        }
    }
    free(file);
    return code;
}

int cmd_info(int argc, char **argv)
{
    struct info_options o;
    model_options_init(&o.model);
    const struct option_group groups[] = {
        {"output", output_options, &o},
        {"changes to a preset; --heads and --topk of a file without a configuration",
         model_option_list, &o.model},
        {"images (presets: 256 x 256 as 32 x 32 latents of 4 channels, 1000 classes)",
         image_option_list, &o.model},
        {0},
    };
    const struct command command = {
        .name = "info",
        .summary = "Prints the configuration, parameters and cost of a model.",
        .positional = "PRESET|FILE",
        .about =
            "Prints the configuration of a preset (S/2-8E2A: size S, patch 2, 8 experts, 2 active; "
            "sizes S, B, L, XL, G), of a checkpoint or of a run's newest checkpoint: parameters in "
            "all and active per token, multiply-accumulates an image; and of a file what is in it "
            "and where its configuration is from.",
        .example = "ditmoe info XL/2-8E2A",
        .groups = groups,
        .positional_min = 1,
        .positional_max = 1,
    };
    const char *name;
    int status;
    if (!options_parse(&command, argc, argv, &name, &status))
        return status;
    if (is_file(name))
        return info_file(&o, name) < 0 ? report_failure("info") : 0;
    struct config config;
    if (model_config(name, &o.model, &config) < 0)
        return usage_error("info", "%s", error_message());
    (o.json ? print_json : print_text)(name, &config, NULL);
    return 0;
}
