// Drawing images from a checkpoint: what `ditmoe sample` and `ditmoe eval` share.
#ifndef DITMOE_DRAW_H
#define DITMOE_DRAW_H

#include "model/sampler.h"
#include "tools/ckpt.h"
#include "tools/offload.h"
#include "tools/ranks.h"

struct draw_options {
    struct ckpt_options from;
    int steps, batch;
    float cfg;
    int sampler;           // index into draw_samplers
    const char *respacing; // NULL: steps
    float eta;
    int clip;
    int cfg_channels; // index into draw_channels
    bool interval;    // guidance only for cfg_from <= t <= cfg_to
    float cfg_from, cfg_to;
    uint64_t seed;
    struct device_options device;
    struct rank_options ranks; // all zero: one process
    struct memory_options memory; // all zero: what there is, and nothing in host memory
};
extern const struct option_spec draw_option_list[];
extern const struct option_spec draw_way_list[]; // --sampler and its options, and guidance's
extern const char *const draw_samplers[];        // auto, then in the order of enum sampler_kind
extern const char *const draw_channels[];        // auto, all, 3

// After the options of draw_way_list are parsed: 0, or exit status 2 after saying what is wrong.
int draw_check(const char *command, struct draw_options *o);

// The guidance scale: as asked, or 1 where none was asked for and the model has no null class.
float draw_cfg(const struct draw_options *o, const struct config *c);

// What these options come to for a model: auto is its family's default (model/sampler.h).
struct sample_options draw_sampling(const struct draw_options *o, const struct config *c);
const char *draw_sampler_title(enum sampler_kind kind);
// In words: the sampler and its steps; and what guidance acts on, "" where on everything.
void draw_way_text(const struct sample_options *s, char *out, size_t size);
void draw_guidance_text(const struct sample_options *s, char *out, size_t size);

// A model on its device, ready to draw.
struct drawing {
    struct session session;
    struct rank_plan ranks;
    struct sampler *sampler; // it reads `ranks`: a drawing stays where it is
};
// For batches of o->batch, or of `count` where that is less.
int drawing_open(const struct draw_options *o, const struct checkpoint *file, int count,
                 struct drawing *out);
void drawing_close(struct drawing *d); // also of a zeroed struct

// Draws `count` images on the device, or on all ranks' devices into rank 0's latents, with progress
// on stderr; noise as in sampler_run().
int draw_samples(const struct draw_options *o, const struct checkpoint *file, int count,
                 const int32_t *classes, const struct sample_noise *noise, float *latents);

// Writes `latents` [count,C,S,S] and `labels` [count].
int draw_write_latents(const char *path, const struct config *c, int count, const int32_t *classes,
                       const float *latents);

static inline size_t image_elements(const struct config *c)
{
    return (size_t)c->channels * (size_t)c->size * (size_t)c->size;
}

#endif
