#include "tools/ckpt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const diffusion_hints[] = {"auto", "rf", "ddpm", NULL};

#define AT(member) offsetof(struct ckpt_options, member)
#define HINTS                                                                                     \
    {"heads",                                                                                     \
     0,                                                                                           \
     OPTION_INT,                                                                                  \
     "N",                                                                                         \
     "0",                                                                                         \
     "of a file without a configuration: attention heads; 0: from shapes or the published sizes", \
     AT(heads),                                                                                   \
     0,                                                                                           \
     1024,                                                                                        \
     NULL},                                                                                       \
        {"topk",   0,   OPTION_INT,                                                               \
         "N",      "0", "of a file without a configuration: active experts; 0: 2",                \
         AT(topk), 0,   64,                                                                       \
         NULL},                                                                                   \
        {"diffusion",                                                                             \
         0,                                                                                       \
         OPTION_CHOICE,                                                                           \
         "WHAT",                                                                                  \
         "auto",                                                                                  \
         "of a file without a configuration: rf, ddpm, or auto: rf where q and k are normalised " \
         "(XL, G), else ddpm, as published",                                                      \
         AT(diffusion),                                                                           \
         0,                                                                                       \
         0,                                                                                       \
         diffusion_hints},

const struct option_spec hint_option_list[] = {HINTS{0}};

const struct option_spec ckpt_option_list[] = {
    {"ckpt", 'c', OPTION_STRING, "FILE", NULL,
     "checkpoint: safetensors, PyTorch's .pt, an index of shards, DeepSpeed's or diffusers' directory; or a "
     "run's "
     "directory: its newest",
     AT(ckpt), 0, 0, NULL},
    {"weights", 0, OPTION_CHOICE, "WHICH", "auto",
     "ema, model, or auto: the averaged weights (EMA) where the file has them", AT(weights), 0, 0,
     weights_choices},
    HINTS{0}};
#undef HINTS
#undef AT

struct config_hints ckpt_hints(const struct ckpt_options *o)
{
    return (struct config_hints){o->heads, o->topk, o->diffusion - 1};
}

const char *ckpt_assumed(const struct checkpoint *c, char out[200])
{
    const struct config_sources *from = &c->sources;
    char experts[64] = "";
    if (c->config.moe != MOE_NONE)
        snprintf(experts, sizeof experts, ", %d active experts (%s)", c->config.topk,
                 config_source_name(from->topk));
    snprintf(out, 200, "%d heads (%s)%s, %s (%s)", c->config.heads, config_source_name(from->heads),
             experts, c->config.diffusion == DIFFUSION_DDPM ? "DDPM" : "rectified flow",
             config_source_name(from->diffusion));
    return out;
}

int ckpt_open_path(const char *name, const struct ckpt_options *o, struct checkpoint **out)
{
    char path[4096], assumed[200];
    const struct config_hints hints = ckpt_hints(o);
    *out = NULL;
    TRY(checkpoint_path(name, path, sizeof path));
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c)
        return fail(ERR_NOMEM, "out of memory");
    int code = checkpoint_open(path, &hints, c);
    if (code < 0) {
        free(c);
        return code;
    }
    if (!c->has_config)
        fprintf(stderr, "no configuration in %s; from its tensors: %s\n", path,
                ckpt_assumed(c, assumed));
    *out = c;
    return 0;
}

int ckpt_open(const struct ckpt_options *o, struct checkpoint **out)
{
    return ckpt_open_path(o->ckpt, o, out);
}

void ckpt_close(struct checkpoint *c)
{
    if (c)
        checkpoint_close(c);
    free(c);
}
