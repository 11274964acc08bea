// ditmoe upcycle: a dense model becomes a mixture of experts.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/upcycle.h"
#include "tools/ckpt.h"

struct upcycle_settings {
    struct ckpt_options from;
    int experts, topk, shared, moe, dtype;
    uint64_t seed;
};

static const char *const moe_choices[] = {"all", "alternate", "shallow", "deep", NULL};
static const char *const dtype_choices[] = {"as is", "f32", "f16", "bf16", NULL};
static const int dtypes[] = {-1, ST_F32, ST_F16, ST_BF16};

#define AT(member) offsetof(struct upcycle_settings, member)
static const struct option_spec upcycle_options[] = {
    {"experts", 0, OPTION_INT, "N", "8", "routed experts of a block", AT(experts), 2, 512, NULL},
    {"topk", 0, OPTION_INT, "N", "2", "experts that each token goes to", AT(topk), 1, 64, NULL},
    {"shared", 0, OPTION_INT, "N", "-1",
     "shared experts (SwiGLU) beside them, which start by adding nothing; -1: none, or what a "
     "one-expert model has",
     AT(shared), -1, 64, NULL},
    {"moe", 0, OPTION_CHOICE, "WHERE", "all",
     "blocks of a plain DiT that get experts: all, alternate, shallow, deep", AT(moe), 0, 0,
     moe_choices},
    {"seed", 's', OPTION_UINT64, "K", "0", "of the routers, N(0, 0.02)", AT(seed), 0, 0, NULL},
    {"dtype", 0, OPTION_CHOICE, "TYPE", "as is", "f32, f16 or bf16, rounded to nearest", AT(dtype),
     0, 0, dtype_choices},
    {"weights", 0, OPTION_CHOICE, "WHICH", "auto",
     "ema, model, or auto: the averaged weights (EMA) where the file has them", AT(from.weights), 0,
     0, weights_choices},
    {0},
};

// --topk is that of the result, and a dense model has none.
static const struct option_spec dense_options[] = {
    {"heads", 0, OPTION_INT, "N", "0", "attention heads; 0: of the published model of this width",
     AT(from.heads), 0, 1024, NULL},
    {"diffusion", 0, OPTION_CHOICE, "WHAT", "auto", "rf, ddpm, or auto, as published",
     AT(from.diffusion), 0, 0, diffusion_hints},
    {0},
};
#undef AT

static int upcycle(const struct upcycle_settings *o, const char *in, const char *out)
{
    struct checkpoint *file;
    const size_t n = strlen(out);
    const bool pt = n > 3 && !strcmp(out + n - 3, ".pt");
    const struct upcycle_options options = {.experts = o->experts,
                                            .topk = o->topk,
                                            .shared = o->shared,
                                            .moe = (enum moe_blocks)o->moe,
                                            .seed = o->seed,
                                            .dtype = dtypes[o->dtype]};
    TRY(ckpt_open_path(in, &o->from, &file));
    int code = upcycle_model(file, (enum weights_choice)o->from.weights, &options, out,
                             pt ? WEIGHTS_AS_TORCH : WEIGHTS_AS_SAFETENSORS);
    ckpt_close(file);
    return code;
}

int cmd_upcycle(int argc, char **argv)
{
    struct upcycle_settings o = {0};
    const struct option_group groups[] = {
        {"the mixture", upcycle_options, &o},
        {"a dense file without a configuration", dense_options, &o},
        {0},
    };
    const struct command command = {
        .name = "upcycle",
        .summary = "Makes a mixture of experts of a dense model.",
        .positional = "DENSE OUT",
        .about =
            "Writes a DiT-MoE whose every expert is a copy of the dense model's MLP: a plain DiT "
            "such as DiT-XL/2 (its experts are GELU MLPs with biases), or a model of one expert. "
            "It answers as the dense one does: the weights of a token's experts sum to 1, and "
            "new shared experts start by adding nothing. 'ditmoe train --init OUT' goes on "
            "from there.",
        .example = "ditmoe upcycle DiT-XL-2-256x256.pt moe.safetensors --experts 8 --topk 2",
        .groups = groups,
        .positional_min = 2,
        .positional_max = 2,
    };
    const char *paths[2];
    int status;
    if (!options_parse(&command, argc, argv, paths, &status))
        return status;
    if (upcycle(&o, paths[0], paths[1]) < 0)
        return report_failure("upcycle");
    printf("%s\n", paths[1]);
    return 0;
}
