// ditmoe forward: one pass on tensors from a file, so that anyone can compare this program with
// another one. Without --loss: the output and the experts chosen, in evaluation mode. With
// --loss rf or ddpm: that loss of x, t, y and noise, and every gradient under its published name;
// the balance loss takes part in the gradients but not in the loss.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/ddpm.h"
#include "model/train.h"
#include "tools/ckpt.h"

static const char *const loss_choices[] = {"none", "rf", "ddpm", NULL};
enum { LOSS_NONE, LOSS_RF, LOSS_DDPM };

struct forward_options {
    struct ckpt_options from;
    const char *input, *output;
    int loss;
    struct device_options device;
};

#define AT(member) offsetof(struct forward_options, member)
static const struct option_spec forward_options[] = {
    {"input", 'i', OPTION_STRING, "FILE", NULL,
     "safetensors file with x [N,C,H,W], t [N], y [N] (the null class is the number after the "
     "last), and noise [N,C,H,W] for --loss; --loss ddpm: t whole numbers from 0 to 999",
     AT(input), 0, 0, NULL},
    {"output", 'o', OPTION_STRING, "FILE", NULL,
     "file to write: out [N,C,H,W] and experts.LAYER [N*T,K]; with --loss loss [1] and grad.NAME "
     "of every parameter, with --loss ddpm mse [N] and vb [N] too; the balance loss is in the "
     "metadata",
     AT(output), 0, 0, NULL},
    {"loss", 0, OPTION_CHOICE, "WHICH", "none",
     "none; rf: rectified flow; ddpm: the hybrid loss of DDPM with learned variance", AT(loss), 0,
     0, loss_choices},
    {0},
};
#undef AT

struct inputs {
    int images;
    float *x, *t, *noise;
    int32_t *y;
};

static void inputs_free(struct inputs *in)
{
    free(in->x), free(in->t), free(in->noise), free(in->y);
}

// ---- reading ------------------------------------------------------------------------------------

static int read_floats(const struct safetensors *file, const char *name, int ndim,
                       const int64_t *shape, float **out)
{
    const struct st_tensor *t;
    TRY(safetensors_expect(file, name, -1, ndim, shape, &t));
    *out = malloc(sizeof **out * (size_t)(t->count ? t->count : 1));
    if (!*out)
        return fail(ERR_NOMEM, "%s: out of memory for %s", safetensors_path(file), name);
    return safetensors_read_f32(file, t, *out, 0, t->count);
}

static int read_labels(const struct safetensors *file, const struct config *c, int count,
                       int32_t *out)
{
    const struct st_tensor *t;
    const int64_t shape[] = {count};
    TRY(safetensors_expect(file, "y", -1, 1, shape, &t));
    for (int i = 0; i < count; i++) {
        int64_t label;
        TRY(safetensors_read_i64(file, t, &label, i, 1));
        if (label < 0 || label >= config_label_rows(c))
            return fail(ERR_INPUT, "%s: y[%d] is %lld; labels are 0 to %d%s",
                        safetensors_path(file), i, (long long)label, c->classes - 1,
                        config_label_rows(c) > c->classes ? ", and the null class after them" : "");
        out[i] = (int32_t)label;
    }
    return 0;
}

// DDPM's t are steps.
static int check_steps(const struct safetensors *file, const struct inputs *in)
{
    for (int i = 0; i < in->images; i++)
        if (!(in->t[i] >= 0 && in->t[i] < DDPM_STEPS && in->t[i] == floorf(in->t[i])))
            return fail(ERR_INPUT, "%s: t[%d] is %g; --loss ddpm wants whole numbers from 0 to %d",
                        safetensors_path(file), i, (double)in->t[i], DDPM_STEPS - 1);
    return 0;
}

static int read_tensors(const struct safetensors *file, const struct config *c, int loss,
                        struct inputs *in)
{
    const struct st_tensor *x;
    int64_t shape[] = {-1, c->channels, c->size, c->size};
    TRY(safetensors_expect(file, "x", -1, 4, shape, &x));
    if (x->shape[0] < 1 || x->shape[0] > 65536)
        return fail(ERR_INPUT, "%s: x holds %lld images; from 1 to 65536 are possible",
                    safetensors_path(file), (long long)x->shape[0]);
    shape[0] = x->shape[0];
    in->images = (int)shape[0];
    in->y = calloc((size_t)in->images, sizeof *in->y);
    if (!in->y)
        return fail(ERR_NOMEM, "out of memory");
    TRY(read_floats(file, "x", 4, shape, &in->x));
    TRY(read_floats(file, "t", 1, shape, &in->t));
    TRY(read_labels(file, c, in->images, in->y));
    if (loss == LOSS_DDPM)
        TRY(check_steps(file, in));
    return loss ? read_floats(file, "noise", 4, shape, &in->noise) : 0;
}

static int read_inputs(const char *path, const struct config *c, int loss, struct inputs *in)
{
    struct safetensors *file = NULL;
    TRY(safetensors_open(path, &file));
    int code = read_tensors(file, c, loss, in);
    safetensors_close(file);
    return code;
}

// ---- writing ------------------------------------------------------------------------------------

static int declare_forward(struct safetensors_writer *w, const struct dit *d)
{
    const struct config *c = &d->config;
    char name[64];
    const int64_t rows = (int64_t)d->options.batch * config_tokens(c);
    TRY(safetensors_declare(
        w, "out", ST_F32, 4,
        (int64_t[]){d->options.batch, config_out_channels(c), c->size, c->size}));
    for (int l = 0; l < c->layers; l++) {
        if (!config_is_moe(c, l))
            continue;
        snprintf(name, sizeof name, "experts.%d", l);
        TRY(safetensors_declare(w, name, ST_I64, 2, (int64_t[]){rows, c->topk}));
    }
    return safetensors_begin(w);
}

static int write_experts(struct safetensors_writer *w, struct dit *d, int layer)
{
    const size_t count =
        (size_t)d->options.batch * (size_t)config_tokens(&d->config) * (size_t)d->config.topk;
    int32_t *index = malloc(sizeof *index * count);
    int64_t *wide = malloc(sizeof *wide * count);
    int code = index && wide ? dit_read_experts(d, layer, index)
                             : fail(ERR_NOMEM, "out of memory for the experts of layer %d", layer);
    if (code >= 0) {
        for (size_t i = 0; i < count; i++)
            wide[i] = index[i];
        code = safetensors_write(w, wide, sizeof *wide * count);
    }
    free(index);
    free(wide);
    return code;
}

static int write_forward(struct safetensors_writer *w, struct dit *d)
{
    TRY(declare_forward(w, d));
    float *out = malloc(tensor_bytes(&d->output));
    int code = out ? tensor_read(&d->ctx, &d->output, out) : fail(ERR_NOMEM, "out of memory");
    if (code >= 0)
        code = safetensors_write(w, out, tensor_bytes(&d->output));
    free(out);
    TRY(code);
    for (int l = 0; l < d->config.layers; l++)
        if (config_is_moe(&d->config, l))
            TRY(write_experts(w, d, l));
    return 0;
}

static int write_gradient(struct safetensors_writer *w, struct dit *d, const struct param *p)
{
    const size_t count = (size_t)param_count(p);
    float *host = malloc(sizeof *host * count);
    int code = host ? param_read(&d->ctx, &d->g, p, host)
                    : fail(ERR_NOMEM, "out of memory for the gradient of %s", p->name);
    if (code >= 0)
        code = safetensors_write(w, host, sizeof *host * count);
    free(host);
    return code;
}

// Sum of the layers' balance losses.
static int total_balance(struct dit *d, double *sum)
{
    *sum = 0;
    for (int l = 0; l < d->config.layers; l++) {
        double balance;
        if (!config_is_moe(&d->config, l))
            continue;
        TRY(dit_read_balance(d, l, &balance));
        *sum += balance;
    }
    return 0;
}

// mse and vb of every image; vb where the variance is learned.
static int declare_terms(struct safetensors_writer *w, const struct trainer *t)
{
    const int64_t images = t->options.batch;
    if (!t->terms.ndim)
        return 0;
    TRY(safetensors_declare(w, "mse", ST_F32, 1, &images));
    return t->dit->config.learn_sigma ? safetensors_declare(w, "vb", ST_F32, 1, &images) : 0;
}

static int write_terms(struct safetensors_writer *w, struct trainer *t)
{
    if (!t->terms.ndim)
        return 0;
    float *host = malloc(tensor_bytes(&t->terms));
    int code = host ? tensor_read(&t->dit->ctx, &t->terms, host) : fail(ERR_NOMEM, "out of memory");
    if (code >= 0)
        code = safetensors_write(w, host,
                                 tensor_bytes(&t->terms) / (t->dit->config.learn_sigma ? 1 : 2));
    free(host);
    return code;
}

static int write_loss(struct safetensors_writer *w, struct trainer *t, double loss)
{
    char name[96], text[32];
    struct dit *d = t->dit;
    double balance;
    TRY(total_balance(d, &balance));
    snprintf(text, sizeof text, "%.9g", balance);
    TRY(safetensors_set_metadata(w, "balance", text));
    TRY(safetensors_declare(w, "loss", ST_F32, 1, (int64_t[]){1}));
    TRY(declare_terms(w, t));
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        snprintf(name, sizeof name, "grad.%s", p->name);
        if (!p->frozen)
            TRY(safetensors_declare(w, name, ST_F32, p->ndim, p->shape));
    }
    TRY(safetensors_begin(w));
    const float scalar = (float)loss;
    TRY(safetensors_write(w, &scalar, sizeof scalar));
    TRY(write_terms(w, t));
    for (int i = 0; i < d->params.count; i++)
        if (!d->params.list[i].frozen)
            TRY(write_gradient(w, d, &d->params.list[i]));
    return 0;
}

// Of a trainer the loss and the gradients, else the output.
static int write_output(const char *path, struct dit *d, struct trainer *t, double loss)
{
    struct safetensors_writer *w = NULL;
    TRY(safetensors_create(path, &w));
    int code = t ? write_loss(w, t, loss) : write_forward(w, d);
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    return safetensors_commit(w);
}

// ---- the passes ---------------------------------------------------------------------------------

static int run_forward(const struct forward_options *o, const struct session *s,
                       const struct checkpoint *file, const struct inputs *in)
{
    struct dit *d = NULL;
    struct dit_options options = {.batch = in->images};
    int code = dit_new(s->dev, s->stream, &file->config, &options, &d);
    if (code < 0)
        return code;
    TRY_OUT(dit_layout(d));
    TRY_OUT(dit_commit(d));
    TRY_OUT(checkpoint_load(file, d, (enum weights_choice)o->from.weights));
    TRY_OUT(tensor_write(&d->ctx, &d->input, in->x));
    TRY_OUT(tensor_write(&d->ctx, &d->t, in->t));
    TRY_OUT(tensor_write(&d->ctx, &d->labels, in->y));
    TRY_OUT(dit_forward(d));
    code = write_output(o->output, d, NULL, 0);
out:
    dit_free(d);
    return code;
}

static int run_loss(const struct forward_options *o, const struct session *s,
                    const struct checkpoint *file, const struct inputs *in)
{
    struct trainer *t = NULL;
    struct train_options options = train_defaults();
    double loss = 0;
    options.batch = in->images;
    struct config config = file->config;
    config.diffusion = o->loss == LOSS_DDPM ? DIFFUSION_DDPM : DIFFUSION_RF;
    int code = trainer_new(s->dev, s->stream, &config, &options, &t);
    if (code >= 0) {
        TRY_OUT(trainer_commit(t));
        TRY_OUT(checkpoint_load(file, t->dit, (enum weights_choice)o->from.weights));
        TRY_OUT(trainer_loss(t, in->x, in->t, in->y, in->noise, &loss));
        code = write_output(o->output, t->dit, t, loss);
    }
out:
    trainer_free(t);
    return code;
}

static int run_pass(const struct forward_options *o, const struct checkpoint *file)
{
    struct inputs in = {0};
    struct session session = {0};
    int code = read_inputs(o->input, &file->config, o->loss, &in);
    if (code >= 0)
        code = session_open(&o->device, &session);
    if (code >= 0)
        code = (o->loss ? run_loss : run_forward)(o, &session, file, &in);
    session_close(&session);
    inputs_free(&in);
    return code;
}

static int forward_run(const struct forward_options *o)
{
    struct checkpoint *file;
    TRY(ckpt_open(&o->from, &file));
    int code = run_pass(o, file);
    ckpt_close(file);
    return code;
}

int cmd_forward(int argc, char **argv)
{
    struct forward_options o = {0};
    const struct option_group groups[] = {
        {"the model", ckpt_option_list, &o.from},
        {"pass", forward_options, &o},
        {"device", device_option_list, &o.device},
        {0},
    };
    const struct command command = {
        .name = "forward",
        .summary = "Runs one pass on given tensors.",
        .about =
            "Runs one forward pass, in evaluation mode, on tensors from a file and writes what "
            "comes out, or (--loss) the loss and every gradient: the door for comparing this "
            "program "
            "with another one.",
        .example = "ditmoe forward --ckpt model.safetensors --input in.safetensors --output "
                   "out.safetensors",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.from.ckpt || !o.input || !o.output)
        return usage_error("forward", "--%s FILE is needed",
                           !o.from.ckpt ? "ckpt"
                           : !o.input ? "input"
                                      : "output");
    return forward_run(&o) < 0 ? report_failure("forward") : 0;
}
