// Sampling: from noise to images by one of the rules of model/schedule.h, for the family that the
// model belongs to, with classifier-free guidance (v = v_null + s (v_class - v_null), Ho & Salimans
// 2022), in batches of the planned size.
#ifndef DITMOE_SAMPLER_H
#define DITMOE_SAMPLER_H

#include "model/dit.h"
#include "model/schedule.h"
#include "runtime/recording.h"

struct sample_options {
    enum sampler_kind kind;
    int steps;        // as schedule_init() has them; ignored with `respacing`
    const char *respacing; // DDPM: which steps, see ddpm_respace(); NULL: `steps`
    float eta;        // of ddim: 0 no noise, 1 as much as ancestral sampling
    bool clip;        // the predicted image to [-1,1] in every pass
    float cfg;        // guidance scale; 1: none (one forward pass an image instead of two)
    int cfg_channels; // guide the first so many channels of the answer only (as in the published code,
                      // for images of fewer this reaches into the variance); 0: the image's, all
    bool interval;    // guide only in passes with cfg_from <= t <= cfg_to (DDPM: t / 1000); each costs
                      // the same
    float cfg_from, cfg_to;
    uint64_t seed;
    uint64_t limit;   // device memory to plan with, bytes; 0: all
    struct offload offload; // experts that live in host memory
    const struct dit_ranks *ranks; // that share each batch (copies: 2 with guidance); NULL: one rank
    bool pack;        // faster steps for the weights' memory once more (where there is that much)
};

struct sampler {
    struct dit *dit;        // planned for 2*batch images with guidance, else batch
    struct sample_options options;
    int all;                // images at a time, on all ranks
    int number;             // of the first image of a run: what its noise depends on (0)
    int batch, first;       // of these, this rank's: how many, and the number of its first
    struct schedule schedule;
    int passes;             // of the network through one batch: one or two a step
    struct tensor z, kept;  // [batch,C,S,S]; kept: by samplers that keep an image
    struct tensor noise;    // [batch,C,S,S] of this pass, and image numbers [batch]: samplers that
    struct tensor numbers;  // take noise
    struct tensor updates;  // [passes,STEP_COUNT] coefficients of every pass
    struct tensor update;   // [STEP_COUNT] those of this pass
    int32_t *labels;        // of the rows of options.ahead passes, and their times
    float *times;
    float *coefficients;    // [passes,STEP_COUNT] as in updates
    struct transfers *transfers; // with ranks
    struct recording pass;  // the device's work on a pass, the same for all
    float *host;            // [all,C,S,S]
};

// Called after each step of each batch; NULL: no one looks. Return < 0 to stop.
typedef int (*sample_progress)(void *user, int done, int total);

// As published: rectified flow by Euler, guided on all channels (0); DDPM by ancestral sampling,
// guided on the first 3 of more channels.
enum sampler_kind sampler_default(const struct config *c);
int sampler_default_channels(const struct config *c);

// The way that these options describe for a model.
int sampler_schedule(const struct config *c, const struct sample_options *o, struct schedule *out);

// The model that sampler_new() plans, for those who ask beforehand what it needs.
struct dit_options sampler_model(const struct device *dev, const struct config *c, int batch,
                                 const struct sample_options *o);

// Passes whose conditioning is computed at once, of `rows` images each, guidance's copies included.
int sampler_ahead(const struct device *dev, const struct config *c, int rows, int64_t passes);

// Plans and allocates a model for sampling; weights are loaded into (*out)->dit afterwards.
int sampler_new(struct device *dev, struct stream *stream, const struct config *c, int batch,
                const struct sample_options *o, struct sampler **out);
void sampler_free(struct sampler *s);

// Noise from elsewhere. Each may be NULL: image i then starts from normals (seed, RNG_SAMPLE stream
// i) and takes those of (seed, RNG_STEP stream of pass and i), the same on every device and
// whatever the batch size.
struct sample_noise {
    const float *start; // [count,C,S,S]
    const float *steps; // [passes,count,C,S,S] in the order of use; the last pass takes none
};

// Draws `count` images of the given classes (with ranks: on all of them together, into rank 0's)
// into latents [count,C,S,S]. noise may be NULL.
int sampler_run(struct sampler *s, int count, const int32_t *classes,
                const struct sample_noise *noise, float *latents, sample_progress progress,
                void *user);

#endif
