#include "tools/draw.h"

#include <stdio.h>
#include <stdlib.h>

#include "tools/progress.h"

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
#undef AT

float draw_cfg(const struct draw_options *o, const struct config *c)
{
    bool has_null = config_label_rows(c) > c->classes;
    return has_null || options_given("cfg") ? o->cfg : 1.0f;
}

const char *const draw_samplers[] = {"auto", "euler", "heun", "dpm++", "ddim", "ddpm", NULL};
const char *const draw_channels[] = {"auto", "all", "3", NULL};

const char *draw_sampler_title(enum sampler_kind kind)
{
    static const char *const titles[] = {"Euler", "Heun", "DPM-Solver++(2M)", "DDIM", "DDPM"};
    return titles[kind];
}

struct sample_options draw_sampling(const struct draw_options *o, const struct config *c)
{
    const bool ddpm = c->diffusion == DIFFUSION_DDPM;
    const bool three = o->cfg_channels ? o->cfg_channels == 2 : ddpm && c->channels > 3;
    return (struct sample_options){
        .kind = o->sampler ? (enum sampler_kind)(o->sampler - 1)
                : ddpm     ? SAMPLER_DDPM
                           : SAMPLER_EULER,
        .steps = o->steps,
        .respacing = o->respacing,
        .eta = o->eta,
        .clip = o->clip != 0,
        .cfg = draw_cfg(o, c),
        .cfg_channels = three ? 3 : 0,
        .interval = o->interval,
        .cfg_from = o->cfg_from,
        .cfg_to = o->cfg_to,
        .seed = o->seed,
        .pack = true,
    };
}

static int show(void *user, int done, int total)
{
    (void)total;
    progress_update(user, done, "sampling");
    TRY(ranks_stop());
    return stop_wanted ? fail(ERR_STOPPED, "stopped; nothing was written") : 0;
}

int drawing_open(const struct draw_options *o, const struct checkpoint *file, int count,
                 struct drawing *out)
{
    const int batch = o->batch < count ? o->batch : count;
    struct sample_options options = draw_sampling(o, &file->config);
    *out = (struct drawing){0};
    TRY(ranks_plan(&o->ranks, &file->config, batch, options.cfg != 1 ? 2 : 1, &out->ranks));
    options.ranks = ranks_of(&out->ranks);
    int code = session_open(&o->device, &out->session);
    stop_on_signals();
    if (code >= 0)
        code = sampler_new(out->session.dev, out->session.stream, &file->config, batch, &options,
                           &out->sampler);
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

int draw_samples(const struct draw_options *o, const struct checkpoint *file, int count,
                 const int32_t *classes, const struct sample_noise *noise, float *latents)
{
    struct drawing d;
    struct progress progress;
    TRY(drawing_open(o, file, count, &d));
    const int64_t batches = (count + d.sampler->all - 1) / d.sampler->all;
    progress_start(&progress, "step", 0, batches * d.sampler->schedule.steps, 0);
    int code = sampler_run(d.sampler, count, classes, noise, latents, show, &progress);
    progress_clear(&progress);
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
