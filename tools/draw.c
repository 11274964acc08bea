#include "tools/draw.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/progress.h"

const char *const draw_samplers[] = {"auto", "euler", "heun", "dpm++", "ddim", "ddpm", NULL};
const char *const draw_channels[] = {"auto", "all", "3", NULL};

#define AT(member) offsetof(struct draw_options, member)
const struct option_spec draw_option_list[] = {
    {"steps", 'n', OPTION_INT, "N", "50",
     "steps from noise to image; at most 1000 with a DDPM model", AT(steps), 1, 100000, NULL},
    {"cfg", 0, OPTION_FLOAT, "S", "2", "guidance scale; 1: no guidance, half the time", AT(cfg), 0,
     1000, NULL},
    {"seed", 's', OPTION_UINT64, "K", "0", "of the noise; the same on every device", AT(seed), 0, 0,
     NULL},
    {"batch", 'b', OPTION_INT, "N", "16", "images at a time; does not change them", AT(batch), 1,
     65536, NULL},
    {0},
};
const struct option_spec draw_way_list[] = {
    {"sampler", 0, OPTION_CHOICE, "NAME", "auto",
     "euler; heun: second order, two passes of the network a step; dpm++: DPM-Solver++(2M), second "
     "order in one pass; ddim; ddpm: with noise in every step; auto: ddpm for a DDPM model, else "
     "euler",
     AT(sampler), 0, 0, draw_samplers},
    {"respacing", 0, OPTION_STRING, "SPEC", NULL,
     "DDPM models: which of the 1000 steps, in place of --steps: N, or A,B,C for steps in equal "
     "sections of t, or ddimN for N steps a whole number apart",
     AT(respacing), 0, 0, NULL},
    {"eta", 0, OPTION_FLOAT, "E", "0", "noise of ddim: 0 none, 1 as in ancestral sampling", AT(eta),
     0, 1, NULL},
    {"clip", 0, OPTION_FLAG, NULL, "no",
     "clip the predicted image to [-1,1] in every step: for pixels, not for latents", AT(clip), 0,
     0, NULL},
    {"cfg-channels", 0, OPTION_CHOICE, "WHICH", "auto",
     "guide all channels, or the first 3 only; the others then follow the class as it is; auto: 3 "
     "for a DDPM model with more, as published, else all",
     AT(cfg_channels), 0, 0, draw_channels},
    {"cfg-from", 0, OPTION_FLOAT, "T", "0",
     "guide only in passes at t of T and more (0: image; DDPM: t/1000)", AT(cfg_from), 0, 1, NULL},
    {"cfg-to", 0, OPTION_FLOAT, "T", "1", "and of T and less (1: noise); steps cost the same",
     AT(cfg_to), 0, 1, NULL},
    {0},
};
#undef AT

float draw_cfg(const struct draw_options *o, const struct config *c)
{
    bool has_null = config_label_rows(c) > c->classes;
    return has_null || options_given("cfg") ? o->cfg : 1.0f;
}

const char *draw_sampler_title(enum sampler_kind kind)
{
    static const char *const titles[] = {"Euler", "Heun", "DPM-Solver++(2M)", "DDIM", "DDPM"};
    return titles[kind];
}

// What the guidance scale acts on, "" where on everything.
void draw_guidance_text(const struct sample_options *s, char *out, size_t size)
{
    char interval[56] = "";
    if (s->interval)
        snprintf(interval, sizeof interval, " for t %g to %g", (double)s->cfg_from,
                 (double)s->cfg_to);
    snprintf(out, size, "%s%s", s->cfg_channels ? " on 3 channels" : "", interval);
}

// The sampler and its steps: "50 Euler steps", "DDIM steps by ddim25, eta 0.5".
void draw_way_text(const struct sample_options *s, char *out, size_t size)
{
    char eta[32] = "";
    const char *title = draw_sampler_title(s->kind);
    if (s->kind == SAMPLER_DDIM)
        snprintf(eta, sizeof eta, ", eta %g", (double)s->eta);
    if (s->respacing)
        snprintf(out, size, "%s steps by %.60s%s%s", title, s->respacing, eta,
                 s->clip ? ", clipped" : "");
    else
        snprintf(out, size, "%d %s steps%s%s", s->steps, title, eta, s->clip ? ", clipped" : "");
}

int draw_check(const char *command, struct draw_options *o)
{
    static const char *const interval[] = {"cfg-from", "cfg-to", NULL};
    const char *extra = options_given_of(interval);
    const char *sampler = draw_samplers[o->sampler];
    if (o->eta > 0 && strcmp(sampler, "ddim"))
        return usage_error(command, "--eta %g goes with --sampler ddim, not with %s",
                           (double)o->eta, sampler);
    if (o->respacing && options_given("steps"))
        return usage_error(command, "--steps and --respacing both say how many steps: give one");
    if (extra && options_given("cfg") && o->cfg == 1)
        return usage_error(command, "--%s: with --cfg 1 nothing is guided", extra);
    o->interval = options_given("cfg-from") || options_given("cfg-to");
    if (o->cfg_from > o->cfg_to)
        return usage_error(command, "--cfg-from %g is above --cfg-to %g", (double)o->cfg_from,
                           (double)o->cfg_to);
    return 0;
}

struct sample_options draw_sampling(const struct draw_options *o, const struct config *c)
{
    const int channels[] = {sampler_default_channels(c), 0, 3}; // as in draw_channels
    return (struct sample_options){
        .kind = o->sampler ? (enum sampler_kind)(o->sampler - 1) : sampler_default(c),
        .steps = o->steps,
        .respacing = o->respacing,
        .eta = o->eta,
        .clip = o->clip != 0,
        .cfg = draw_cfg(o, c),
        .cfg_channels = channels[o->cfg_channels],
        .interval = o->interval,
        .cfg_from = o->cfg_from,
        .cfg_to = o->cfg_to,
        .seed = o->seed,
        .pack = true,
    };
}

// Progress, and when the first step was done and the last: a device's first step prepares much.
struct watch {
    struct progress progress;
    double first, last;
    int first_step, last_step;
};

static int show(void *user, int done, int total)
{
    struct watch *w = user;
    (void)total;
    progress_update(&w->progress, done, "sampling");
    w->last = now_seconds(), w->last_step = done;
    if (!w->first_step)
        w->first = w->last, w->first_step = done;
    bool stop;
    TRY(ranks_stop(&stop));
    return stop ? fail(ERR_STOPPED, "stopped; nothing was written") : 0;
}

int drawing_open(const struct draw_options *o, const struct checkpoint *file, int count,
                 struct drawing *out)
{
    const int batch = o->batch < count ? o->batch : count;
    struct sample_options options = draw_sampling(o, &file->config);
    *out = (struct drawing){0};
    const struct rank_work work = {.batch = batch, .copies = options.cfg != 1 ? 2 : 1, .memory = o->memory.memory};
    int code = session_open(&o->device, &out->session);
    stop_on_signals();
    options.limit = o->memory.memory;
    if (code >= 0)
        code = ranks_connect(&o->ranks, out->session.dev, out->session.stream);
    if (code >= 0)
        code = ranks_plan(&o->ranks, &file->config, &work, &out->ranks);
    options.ranks = ranks_of(&out->ranks);
    if (code >= 0)
        code = offload_choose(&o->memory, out->session.dev, &out->ranks, &options.offload);
    if (code >= 0)
        code = sampler_new(out->session.dev, out->session.stream, &file->config, batch, &options,
                           &out->sampler);
    if (code >= 0)
        offload_say(out->sampler->dit);
    if (code >= 0)
        code = checkpoint_load(file, out->sampler->dit, (enum weights_choice)o->from.weights);
    if (code < 0)
        drawing_close(out);
    return code;
}

void drawing_close(struct drawing *d)
{
    if (d->sampler)
        sampler_free(d->sampler);
    ranks_plan_free(&d->ranks);
    session_close(&d->session);
    *d = (struct drawing){0};
}

// On ranks: what a pass took beside what was predicted.
static void say_pace(const struct drawing *d, const struct watch *w)
{
    const double steps = w->last_step - w->first_step;
    const double passes = steps * d->sampler->passes / fmax(1, d->sampler->schedule.steps);
    const double predicted = d->ranks.predicted, measured = (w->last - w->first) / passes;
    if (ranks_exchange() && isfinite(predicted) && passes > 0)
        say("predicted %.1f ms a pass, measured %.1f: %+.0f%%\n", 1e3 * predicted, 1e3 * measured,
            100 * (predicted / measured - 1));
}

int draw_samples(const struct draw_options *o, const struct checkpoint *file, int count,
                 const int32_t *classes, const struct sample_noise *noise, float *latents)
{
    struct drawing d;
    struct watch w = {0};
    TRY(drawing_open(o, file, count, &d));
    const int64_t batches = (count + d.sampler->all - 1) / d.sampler->all;
    progress_start(&w.progress, "step", 0, batches * d.sampler->schedule.steps, 0);
    const double began = now_seconds();
    int code = sampler_run(d.sampler, count, classes, noise, latents, show, &w);
    progress_clear(&w.progress);
    if (code >= 0)
        say_pace(&d, &w);
    if (code >= 0)
        code = offload_say_waited(d.sampler->dit, (now_seconds() - began) /
                                                      (double)(batches * d.sampler->passes));
    drawing_close(&d);
    return code;
}

static int write_latents(struct safetensors_writer *w, const struct config *c, int count,
                         const int32_t *classes, const float *latents)
{
    const int64_t shape[] = {count, c->channels, c->size, c->size};
    TRY(safetensors_declare(w, "latents", ST_F32, 4, shape));
    TRY(safetensors_declare(w, "labels", ST_I64, 1, shape));
    TRY(safetensors_set_metadata(w, "software", "ditmoe " DITMOE_VERSION));
    TRY(safetensors_begin(w));
    TRY(safetensors_write(w, latents, sizeof(float) * image_elements(c) * (size_t)count));
    for (int i = 0; i < count; i++) {
        int64_t label = classes[i];
        TRY(safetensors_write(w, &label, sizeof label));
    }
    return 0;
}

int draw_write_latents(const char *path, const struct config *c, int count, const int32_t *classes,
                       const float *latents)
{
    struct safetensors_writer *w = NULL;
    TRY(safetensors_create(path, &w));
    int code = write_latents(w, c, count, classes, latents);
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    return safetensors_commit(w);
}
