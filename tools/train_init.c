// Training that begins with the weights of a file (--init): its configuration, and loading it.
#include <stdlib.h>

#include "tools/ckpt.h"
#include "tools/train_run.h"

// What training may change of a model without changing its tensors.
static bool same_tensors(const struct config *a, const struct config *b)
{
    struct config c = *a;
    c.balance = b->balance;
    c.balance_per_sequence = b->balance_per_sequence;
    c.topk = b->topk;
    c.renormalise = b->renormalise;
    c.diffusion = b->diffusion;
    return config_equal(&c, b);
}

static int open_init(const struct train_settings *o, struct checkpoint **out)
{
    const struct ckpt_options hints = {
        .heads = o->overrides.heads > 0 ? o->overrides.heads : 0,
        .diffusion = options_given("diffusion") ? o->diffusion + 1 : 0,
    };
    return ckpt_open_path(o->init, &hints, out);
}

// The configuration of the file, or of the run that began with it.
static int read_config(const struct train_settings *o, struct config *out)
{
    struct checkpoint *file = NULL;
    if (o->resume && o->out && run_directory_has_checkpoint(o->out)) {
        file = calloc(1, sizeof *file);
        if (!file)
            return fail(ERR_NOMEM, "out of memory");
        int code = run_checkpoint_open(o->out, file);
        if (code < 0) {
            free(file);
            return code;
        }
    } else {
        TRY(open_init(o, &file));
    }
    *out = file->config;
    ckpt_close(file);
    return 0;
}

int train_config(const struct train_settings *o, const struct model_options *overrides,
                 struct config *out)
{
    struct config base;
    if (!o->init)
        return model_config(o->model, overrides, out);
    TRY(read_config(o, &base));
    struct model_options changes = *overrides;
    if (!options_given("diffusion"))
        changes.diffusion = -1;
    *out = base;
    TRY(model_override(&changes, out));
    if (out->size != base.size || out->channels != base.channels || out->classes != base.classes)
        return fail(ERR_INPUT,
                    "%s is of images %dx%dx%d in %d classes, but the data are %dx%dx%d in %d",
                    o->init, base.size, base.size, base.channels, base.classes, out->size,
                    out->size, out->channels, out->classes);
    if (!same_tensors(out, &base))
        return fail(ERR_INPUT,
                    "%s holds another model than these options give ('ditmoe info' shows it); only "
                    "--topk, --renormalise, --balance and the diffusion may differ",
                    o->init);
    return 0;
}

int train_load_init(const struct train_settings *o, struct dit *d)
{
    struct checkpoint *file;
    TRY(open_init(o, &file));
    int code = checkpoint_load(file, d, WEIGHTS_AUTO);
    ckpt_close(file);
    return code < 0 ? code : dit_copy_ema(d);
}
