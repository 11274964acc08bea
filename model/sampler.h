// Sampling: rectified flow from t = 1 (noise) to 0 by one of the rules of model/schedule.h, with
// classifier-free guidance (v = v_null + s (v_class - v_null), Ho & Salimans 2022), in batches of
// the planned size.
#ifndef DITMOE_SAMPLER_H
#define DITMOE_SAMPLER_H

#include "model/dit.h"
#include "model/schedule.h"
#include "runtime/recording.h"

struct sample_options {
    enum sampler_kind kind;
    int steps;        // equal in t
    float cfg;        // guidance scale; 1: none (one forward pass an image instead of two)
    int cfg_channels; // guide the first so many channels only; 0: all
    bool interval;    // guide only in passes with cfg_from <= t <= cfg_to; each costs the same
    float cfg_from, cfg_to;
    uint64_t seed;
    uint64_t limit;   // device memory to plan with, bytes; 0: all
    const struct dit_ranks *ranks; // that share each batch (copies: 2 with guidance); NULL: one rank
    bool pack;        // faster steps for the weights' memory once more (where there is that much)
};

struct sampler {
    struct dit *dit;        // planned for 2*batch images with guidance, else batch
    struct sample_options options;
    int all;                // images at a time, on all ranks
    int batch, first;       // of these, this rank's: how many, and the number of its first
    int passes;             // of the network through one batch: one or two a step
    struct tensor z, kept;  // [batch,C,S,S]; kept: by samplers that keep an image
    struct tensor updates;  // [passes,FLOW_STEP_COUNT] coefficients of every pass
    struct tensor update;   // [FLOW_STEP_COUNT] those of this pass
    int32_t *labels;        // of the rows of options.ahead passes, and their times
    float *times;
    float *coefficients;    // [passes,FLOW_STEP_COUNT] as in updates
    struct transfers *transfers; // with ranks
    struct recording pass;  // the device's work on a pass, the same for all
    float *host;            // [all,C,S,S]
};

// Called after each step of each batch; NULL: no one looks. Return < 0 to stop.
typedef int (*sample_progress)(void *user, int done, int total);

// The model that sampler_new() plans, for those who ask beforehand what it needs.
struct dit_options sampler_model(const struct device *dev, const struct config *c, int batch,
                                 const struct sample_options *o);

// Plans and allocates a model for sampling; weights are loaded into (*out)->dit afterwards.
int sampler_new(struct device *dev, struct stream *stream, const struct config *c, int batch,
                const struct sample_options *o, struct sampler **out);
void sampler_free(struct sampler *s);

// Draws `count` images of the given classes (with ranks: on all of them together, into rank 0's) into latents [count,C,S,S]. noise [count,C,S,S] is the
// start, or NULL: image i starts from normals (seed, RNG_SAMPLE stream i), the same on every device
// and whatever the batch size.
int sampler_run(struct sampler *s, int count, const int32_t *classes, const float *noise,
                float *latents, sample_progress progress, void *user);

#endif
