// Sample grids during training: a second, small model on the same device, filled from the EMA.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/grid.h"
#include "tools/train_run.h"

static int sample_batch(const struct config *c)
{
    int rows = c->classes < SAMPLE_ROWS ? c->classes : SAMPLE_ROWS;
    return rows * SAMPLE_COLUMNS < SAMPLE_BATCH ? rows * SAMPLE_COLUMNS : SAMPLE_BATCH;
}

static struct sample_options sample_options(const struct config *c, const struct train_settings *o,
                                            const struct rank_plan *ranks,
                                            const struct offload *offload)
{
    return (struct sample_options){.kind = sampler_default(c),
                                   .steps = o->sample_steps,
                                   .cfg = c->class_dropout > 0 ? o->sample_cfg : 1.0f,
                                   .cfg_channels = sampler_default_channels(c),
                                   .seed = o->seed,
                                   .ranks = ranks_of(ranks),
                                   .limit = UINT64_MAX / 2, // what is used is known before
                                   .offload = *offload};
}

// The run's placement, for a batch of samples.
static int plan_ranks(const struct config *c, const struct train_settings *o,
                      const struct rank_plan *ranks, struct rank_plan *out)
{
    const struct sample_options plain = sample_options(c, o, out, &(struct offload){0});
    return ranks_replan(ranks, sample_batch(c), plain.cfg != 1 ? 2 : 1, out);
}

int train_samples_plan(const struct session *s, const struct config *c,
                       const struct train_settings *o, const struct rank_plan *ranks,
                       const struct offload *offload, uint64_t *bytes)
{
    struct rank_plan mine = {0};
    TRY(plan_ranks(c, o, ranks, &mine));
    const struct sample_options options = sample_options(c, o, &mine, offload);
    const struct dit_options model = sampler_model(s->dev, c, sample_batch(c), &options);
    struct dit *d = NULL;
    int code = dit_new(s->dev, s->stream, c, &model, &d);
    if (code >= 0)
        code = dit_layout(d);
    if (d) {
        *bytes = plan_total(d->plan);
        dit_free(d);
    }
    ranks_plan_free(&mine);
    return code;
}

int train_samples_new(const struct session *s, const struct config *c,
                      const struct train_settings *o, const struct rank_plan *ranks,
                      const struct offload *offload, struct train_samples *out)
{
    *out = (struct train_samples){.vae = o->vae};
    TRY(plan_ranks(c, o, ranks, &out->ranks));
    const struct sample_options options = sample_options(c, o, &out->ranks, offload);
    out->rows = c->classes < SAMPLE_ROWS ? c->classes : SAMPLE_ROWS;
    out->count = out->rows * SAMPLE_COLUMNS;
    for (int i = 0; i < out->count; i++)
        out->classes[i] = i / SAMPLE_COLUMNS;
    return sampler_new(s->dev, s->stream, c, sample_batch(c), &options, &out->sampler);
}

void train_samples_free(struct train_samples *s)
{
    if (s->sampler)
        sampler_free(s->sampler);
    s->sampler = NULL;
    ranks_plan_free(&s->ranks);
}

// The sampler's weights become the trainer's EMA; the fixed position table has only weights.
static int copy_ema(struct dit *to, struct dit *from)
{
    for (int i = 0; i < from->params.count; i++) {
        const struct param *p = &from->params.list[i];
        if (p->start == 0) // else a slice of a tensor copied whole with its first parameter
            TRY(weight_copy(&to->ctx, param_tensor(&to->w, p),
                            param_tensor(p->frozen ? &from->w : &from->ema, p)));
    }
    return 0;
}

static int stop_when_wanted(void *user, int done, int total)
{
    (void)user, (void)done, (void)total;
    bool stop;
    TRY(ranks_stop(&stop));
    return stop ? fail(ERR_STOPPED, "stopped while sampling") : 0;
}

static int write_grid(const struct train_samples *s, const struct trainer *t,
                      const struct dataset *d, const struct pictures *pictures, const char *dir)
{
    char path[4200], title[64], text[128];
    const char *labels[SAMPLE_ROWS];
    snprintf(path, sizeof path, "%s/samples", dir);
    if (mkdir(path, 0777) != 0 && errno != EEXIST)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    snprintf(path, sizeof path, "%s/samples/step-%08lld.png", dir, (long long)t->step);
    snprintf(title, sizeof title, "step %lld", (long long)t->step);
    snprintf(text, sizeof text, "step %lld, %d %s steps, cfg %g, seed %llu, EMA weights",
             (long long)t->step, s->sampler->options.steps,
             t->dit->config.diffusion == DIFFUSION_DDPM ? "DDPM" : "Euler",
             (double)s->sampler->options.cfg,
             (unsigned long long)s->sampler->options.seed);
    for (int i = 0; i < s->rows; i++)
        labels[i] = d->class_names ? d->class_names[i] : "";
    struct image_text texts[] = {{"Software", "ditmoe " DITMOE_VERSION}, {"parameters", text}};
    struct grid grid = {.latents = pictures->values,
                        .count = s->count,
                        .channels = pictures->channels,
                        .size = pictures->width,
                        .rows = s->rows,
                        .columns = SAMPLE_COLUMNS,
                        .labels = d->class_names ? labels : NULL,
                        .title = title};
    return grid_write(path, &grid, texts, 2);
}

static int write_pictures(const struct train_samples *s, const struct trainer *t,
                          const struct dataset *d, float *latents, const char *dir)
{
    const struct config *c = &t->dit->config;
    struct pictures pictures = {latents, s->count, c->channels, c->size, c->size};
    if (!s->vae.vae)
        return write_grid(s, t, d, &pictures, dir);
    const struct session session = {t->dit->ctx.dev, t->dit->ctx.stream};
    TRY(pictures_decode_on(&session, &s->vae, latents, s->count, c->channels, c->size, c->size,
                           &pictures));
    const int code = write_grid(s, t, d, &pictures, dir);
    free(pictures.values);
    return code;
}

int train_samples_write(struct train_samples *s, struct trainer *t, const struct dataset *d,
                        const char *dir)
{
    const struct config *c = &t->dit->config;
    size_t pixels = (size_t)c->channels * (size_t)c->size * (size_t)c->size;
    float *latents = malloc(sizeof(float) * pixels * (size_t)s->count);
    if (!latents)
        return fail(ERR_NOMEM, "out of memory for samples");
    int code = copy_ema(s->sampler->dit, t->dit);
    if (code >= 0)
        code = sampler_run(s->sampler, s->count, s->classes, NULL, latents, stop_when_wanted, NULL);
    if (code >= 0 && ranks_first())
        code = write_pictures(s, t, d, latents, dir);
    free(latents);
    return code;
}
