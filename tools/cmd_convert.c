// ditmoe convert: weights from one format to another.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/convert.h"
#include "model/diffusers.h"
#include "model/weights_file.h"
#include "tools/ckpt.h"

enum target { TO_NAME, TO_SAFETENSORS, TO_PT, TO_DIFFUSERS };

static const char *const target_choices[] = {"auto", "safetensors", "pt", "diffusers", NULL};
static const char *const dtype_choices[] = {"as is", "f32", "f16", "bf16", NULL};
static const int dtypes[] = {-1, ST_F32, ST_F16, ST_BF16};

struct convert_settings {
    struct ckpt_options from;
    int to, dtype;
};

#define AT(member) offsetof(struct convert_settings, member)
static const struct option_spec convert_options[] = {
    {"to", 0, OPTION_CHOICE, "FORMAT", "auto",
     "safetensors (this program's checkpoints), pt (PyTorch and the published code), diffusers (a "
     "directory; plain DiT only), or auto: by OUT's ending",
     AT(to), 0, 0, target_choices},
    {"dtype", 0, OPTION_CHOICE, "TYPE", "as is", "f32, f16 or bf16, rounded to nearest", AT(dtype),
     0, 0, dtype_choices},
    {"weights", 0, OPTION_CHOICE, "WHICH", "auto",
     "ema, model, or auto: both where the file has both (diffusers: ema)", AT(from.weights), 0, 0,
     weights_choices},
    {0},
};
#undef AT

static bool ends_in(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

static enum target target_of(const struct convert_settings *o, const char *out)
{
    if (o->to != TO_NAME)
        return (enum target)o->to;
    if (ends_in(out, ".safetensors"))
        return TO_SAFETENSORS;
    return ends_in(out, ".pt") || ends_in(out, ".pth") ? TO_PT : TO_NAME;
}

static int convert_dit(const struct convert_settings *o, const struct checkpoint *file,
                       enum target to, const char *out)
{
    const enum weights_choice which = (enum weights_choice)o->from.weights;
    const bool full = file->config.full_frequencies;
    if (to == TO_DIFFUSERS && !full)
        fprintf(stderr, "note: diffusers' embedding of t has other frequencies than this model's: "
                        "its answers there differ a little\n");
    if (to == TO_PT && full)
        fprintf(stderr, "note: the published code has other frequencies in its embedding of t than "
                        "this model of diffusers': its answers there differ a little\n");
    if (to == TO_DIFFUSERS)
        return diffusers_write(file, which, dtypes[o->dtype], out);
    if (file->has_moments)
        fprintf(stderr, "the state of training (Adam moments) is left out\n");
    return convert_model(file, which, dtypes[o->dtype], out,
                         to == TO_PT ? WEIGHTS_AS_TORCH : WEIGHTS_AS_SAFETENSORS);
}

// A file that is no DiT (a VAE, Inception): its tensors as they are.
static int convert_other(const struct convert_settings *o, const char *in, enum target to,
                         const char *out)
{
    struct safetensors *s;
    if (to == TO_DIFFUSERS)
        return fail_in(ERR_INPUT, "only a plain DiT can become diffusers'");
    TRY(weights_file_open(in, &s));
    fprintf(stderr, "%s is no DiT: its tensors keep their names\n", in);
    int code = convert_tensors(s, dtypes[o->dtype], out,
                               to == TO_PT ? WEIGHTS_AS_TORCH_BARE : WEIGHTS_AS_SAFETENSORS);
    safetensors_close(s);
    return code;
}

static int convert(const struct convert_settings *o, const char *in, enum target to,
                   const char *out)
{
    struct checkpoint *file;
    int code = ckpt_open_path(in, &o->from, &file);
    if (code < 0)
        return strstr(error_message(), "not a DiT") ? convert_other(o, in, to, out) : code;
    code = convert_dit(o, file, to, out);
    ckpt_close(file);
    return code;
}

int cmd_convert(int argc, char **argv)
{
    struct convert_settings o = {0};
    const struct option_group groups[] = {
        {"conversion", convert_options, &o},
        {"a file without a configuration", hint_option_list, &o.from},
        {0},
    };
    const struct command command = {
        .name = "convert",
        .summary = "Converts weights between formats.",
        .positional = "IN OUT",
        .about =
            "Writes the weights of IN (whatever --ckpt of other commands opens, or any file of "
            "tensors) to OUT: this program's checkpoints (safetensors), PyTorch's .pt, which "
            "torch.load(weights_only=True) and the published code read, or diffusers' DiT. "
            "OUT appears whole or not at all, and memory does not grow with the model.",
        .example = "ditmoe convert run dit.pt --dtype f16",
        .groups = groups,
        .positional_min = 2,
        .positional_max = 2,
    };
    const char *paths[2];
    int status;
    if (!options_parse(&command, argc, argv, paths, &status))
        return status;
    const enum target to = target_of(&o, paths[1]);
    if (to == TO_NAME)
        return usage_error("convert", "%s: ends in neither .safetensors nor .pt: give --to",
                           paths[1]);
    if (convert(&o, paths[0], to, paths[1]) < 0)
        return report_failure("convert");
    printf("%s\n", paths[1]);
    return 0;
}
