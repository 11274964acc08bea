#include "tools/command.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "model/atomic_file.h"
#include "tools/ranks.h"

int report_failure(const char *name)
{
    const char *message = error_message();
    char who[32];
    if (ranks_tell(who))
        fprintf(stderr, "ditmoe %s: %s%s\n", name, who, message[0] ? message : "failed");
    return 1;
}

int finish_output(const char *name, int status)
{
    if ((fflush(stdout) != 0 || ferror(stdout)) && status == 0) {
        fprintf(stderr, "ditmoe %s: cannot write to standard output: %s\n", name, strerror(errno));
        return 1;
    }
    return status;
}

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- device -------------------------------------------------------------------------------------

static const char *const precision_choices[] = {"f32", "bf16", NULL};

#define AT(member) offsetof(struct device_options, member)
const struct option_spec device_option_list[] = {
    {"device", 'd', OPTION_STRING, "KEY", "auto",
     "device to run on, as 'ditmoe devices' lists them; auto: the best",
     AT(device), 0, 0, NULL},
    {"precision", 0, OPTION_CHOICE, "TYPE", "f32",
     "storage of activations: f32 or bf16 (sums are f32 in both)", AT(precision), 0, 0,
     precision_choices},
    {"portable", 0, OPTION_FLAG, NULL, "no", "use no code that was tuned for one kind of device",
     AT(portable), 0, 0, NULL},
    {0},
};
#undef AT

int session_open(const struct device_options *o, struct session *out)
{
    struct device_info info;
    *out = (struct session){0};
    TRY(ranks_device(o->device, &info));
    unsigned flags = (o->precision ? OPEN_BF16 : 0u) | (o->portable ? OPEN_PORTABLE : 0u);
    const char *forms = getenv("DITMOE_FORMS"); // "gpu": a CPU device does as GPUs do, to look for errors
    flags |= forms && !strcmp(forms, "gpu") ? OPEN_GPU_FORMS : 0u;
    TRY(info.backend->open(&info, flags, &out->dev));
    int code = info.backend->stream_new(out->dev, &out->stream);
    if (code < 0) {
        info.backend->close(out->dev);
        *out = (struct session){0};
    }
    return code;
}

void session_close(struct session *s)
{
    if (!s->dev)
        return;
    const struct backend *api = s->dev->api;
    ranks_disconnect(s->dev);
    if (s->stream)
        api->stream_free(s->stream);
    api->close(s->dev);
    *s = (struct session){0};
}

// ---- model --------------------------------------------------------------------------------------

static const char *const expert_choices[] = {"swiglu", "gelu", NULL}; // as enum expert_kind
static const char *const moe_choices[] = {"all", "alternate", "shallow", "deep", "none", NULL};

#define AT(member) offsetof(struct model_options, member)
const struct option_spec model_option_list[] = {
    {"layers", 0, OPTION_INT, "N", NULL, "blocks", AT(layers), 1, 1000, NULL},
    {"hidden", 0, OPTION_INT, "N", NULL, "model width", AT(hidden), 1, 65536, NULL},
    {"heads", 0, OPTION_INT, "N", NULL, "attention heads; must divide the width", AT(heads), 1,
     1024, NULL},
    {"patch", 0, OPTION_INT, "N", NULL, "side of a patch; must divide the image's", AT(patch), 1,
     256, NULL},
    {"experts", 0, OPTION_INT, "N", NULL, "routed experts of a block", AT(experts), 1, 512, NULL},
    {"topk", 0, OPTION_INT, "N", NULL, "experts that each token goes to", AT(topk), 1, 64, NULL},
    {"shared", 0, OPTION_INT, "N", NULL, "shared experts, which every token goes to", AT(shared), 0,
     64, NULL},
    {"moe", 0, OPTION_CHOICE, "WHERE", NULL,
     "blocks with experts: all, alternate, shallow, deep, none", AT(moe), 0, 0, moe_choices},
    {"expert-kind", 0, OPTION_CHOICE, "KIND", NULL,
     "what a routed expert is: swiglu, as published; gelu, DiT's MLP with biases", AT(expert), 0, 0,
     expert_choices},
    {"qk-norm", 0, OPTION_FLAG, NULL, NULL,
     "LayerNorm on queries and keys (presets XL and G have it)", AT(qk_norm), 0, 0, NULL},
    {"learn-sigma", 0, OPTION_FLAG, NULL, NULL,
     "a second half of output channels, as published (rectified flow ignores it)", AT(learn_sigma),
     0, 0, NULL},
    {"renormalise", 0, OPTION_FLAG, NULL, NULL, "make the weights of a token's experts sum to 1",
     AT(renormalise), 0, 0, NULL},
    {"balance", 0, OPTION_FLOAT, "A", NULL,
     "factor of the balance loss (0.01 as in the published code; the paper says 0.005)",
     AT(balance), 0, 1e3, NULL},
    {"balance-per-sequence", 0, OPTION_FLAG, NULL, NULL,
     "balance experts within every image instead of over the batch", AT(balance_per_sequence), 0, 0,
     NULL},
    {"class-dropout", 0, OPTION_FLOAT, "P", NULL,
     "share of labels dropped in training; 0: no null class, and no guidance", AT(class_dropout), 0,
     1, NULL},
    {0},
};
const struct option_spec image_option_list[] = {
    {"channels", 0, OPTION_INT, "N", NULL, "channels of an image or latent", AT(channels), 1, 64,
     NULL},
    {"size", 0, OPTION_INT, "N", NULL, "side of an image or latent", AT(size), 1, 4096, NULL},
    {"classes", 0, OPTION_INT, "N", NULL, "classes", AT(classes), 1, 1000000, NULL},
    {0},
};
#undef AT

void model_options_init(struct model_options *o)
{
    *o = (struct model_options){-1, -1, -1, -1,  -1,  -1, -1, -1, -1,
                                -1, -1, -1, NAN, NAN, -1, -1, -1, -1, -1};
}

static void override_int(int *to, int value)
{
    if (value >= 0)
        *to = value;
}

static void override_bool(bool *to, int value)
{
    if (value >= 0)
        *to = value != 0;
}

int model_config(const char *preset, const struct model_options *o, struct config *out)
{
    TRY(config_preset(preset, out));
    return model_override(o, out);
}

int model_override(const struct model_options *o, struct config *out)
{
    override_int(&out->layers, o->layers);
    override_int(&out->hidden, o->hidden);
    override_int(&out->heads, o->heads);
    override_int(&out->patch, o->patch);
    override_int(&out->experts, o->experts);
    override_int(&out->topk, o->topk);
    override_int(&out->shared, o->shared);
    override_int(&out->channels, o->channels);
    override_int(&out->size, o->size);
    override_int(&out->classes, o->classes);
    override_bool(&out->qk_norm, o->qk_norm);
    override_bool(&out->learn_sigma, o->learn_sigma);
    override_bool(&out->renormalise, o->renormalise);
    override_bool(&out->balance_per_sequence, o->balance_per_sequence);
    if (o->moe >= 0)
        TRY(moe_blocks_parse(moe_choices[o->moe], &out->moe));
    if (o->expert >= 0)
        out->expert = (enum expert_kind)o->expert;
    if (o->diffusion >= 0)
        out->diffusion = (enum diffusion)o->diffusion;
    if (!isnan(o->balance))
        out->balance = o->balance;
    if (!isnan(o->class_dropout))
        out->class_dropout = o->class_dropout;
    return config_check(out);
}

const char *model_title(const char *preset, const struct config *c, char out[160])
{
    struct config p;
    if (config_preset(preset, &p) >= 0 && p.layers == c->layers && p.hidden == c->hidden &&
        p.heads == c->heads && p.patch == c->patch && p.experts == c->experts &&
        p.topk == c->topk && p.shared == c->shared && p.moe == c->moe && p.expert == c->expert)
        snprintf(out, 160, "%.150s", preset);
    else if (c->moe == MOE_NONE)
        snprintf(out, 160, "DiT, %d blocks of width %d, patch %d, no experts", c->layers, c->hidden,
                 c->patch);
    else
        snprintf(out, 160,
                 "DiT-MoE, %d blocks of width %d, patch %d, %d%s experts, %d active, %d shared",
                 c->layers, c->hidden, c->patch, c->experts,
                 c->expert == EXPERT_GELU ? " GELU" : "", c->topk, c->shared);
    return out;
}

// ---- checkpoints --------------------------------------------------------------------------------

const char *const weights_choices[] = {"auto", "ema", "model", NULL};

int checkpoint_path(const char *path, char *out, size_t size)
{
    struct stat s;
    if (stat(path, &s) != 0)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISDIR(s.st_mode)) {
        snprintf(out, size, "%s", path);
        return 0;
    }
    long long newest = -1;
    DIR *dir = opendir(path);
    if (!dir)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        long long step;
        int end = 0;
        if (sscanf(e->d_name, "step-%lld.safetensors%n", &step, &end) == 1 && end > 0 &&
            !e->d_name[end] && step > newest) {
            newest = step;
            snprintf(out, size, "%s/%s", path, e->d_name);
        }
    }
    closedir(dir);
    if (newest < 0)
        snprintf(out, size, "%s", path);
    return 0;
}

// ---- stopping -----------------------------------------------------------------------------------

volatile sig_atomic_t stop_wanted;

static void on_signal(int signal_number)
{
    if (stop_wanted)
        _exit(128 + signal_number);
    stop_wanted = 1;
}

void stop_on_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL); // what batch systems and mpirun send before they make an end
}

// ---- files --------------------------------------------------------------------------------------

int write_text_file(const char *path, const char *text, size_t bytes)
{
    struct atomic_file *f = NULL;
    TRY(atomic_file_create(path, &f));
    int code = atomic_file_write(f, text, bytes);
    if (code < 0) {
        atomic_file_abort(f);
        return code;
    }
    return atomic_file_commit(f);
}

int write_json_file(const char *path, const json_t *json)
{
    char *text = json_dumps(json, JSON_INDENT(2));
    if (!text)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = write_text_file(path, text, strlen(text));
    free(text);
    return code;
}
