// Checkpoints: safetensors with the published parameter names. NAME is the model's weight,
// "ema.NAME" its EMA, "adam.m.NAME" and "adam.v.NAME" the moments. The metadata holds the whole
// configuration ("ditmoe.config", JSON) and, for training checkpoints, the state of the run
// ("ditmoe.train", JSON: struct run_state). Written to a temporary name, synced, renamed.
// PyTorch files (model/torch_file.h) open too. Without our metadata the configuration is inferred from names and shapes.
#ifndef DITMOE_CHECKPOINT_H
#define DITMOE_CHECKPOINT_H

#include "model/dit.h"
#include "model/safetensors.h"

// What a run needs, beside tensors, to go on as if it had never stopped.
struct run_state {
    int64_t step;    // optimiser steps taken (skipped ones counted)
    int32_t applied; // of these applied
    int32_t skipped; // not finite
    uint64_t seed;
    uint64_t cursor; // images consumed from the data stream
    int batch, accumulate;
};

enum weights_choice { WEIGHTS_AUTO, WEIGHTS_EMA, WEIGHTS_MODEL }; // auto: EMA if the file has it

struct checkpoint {
    struct safetensors *file;
    char path[4096];
    struct config config;
    bool has_config;  // from metadata; else inferred
    bool has_ema, has_moments, has_run;
    struct run_state run;
};

// Opens and validates: every parameter of the configuration is there with its shape, or ERR_INPUT
// names the first that is not. `heads` > 0 and `topk` > 0 override what a file without metadata
// cannot tell.
struct checkpoint_hints {
    int heads, topk;
};
int checkpoint_open(const char *path, const struct checkpoint_hints *hints, struct checkpoint *out);
void checkpoint_close(struct checkpoint *c);

// Loads weights into d->w; a value that is not finite is ERR_INPUT naming the parameter.
int checkpoint_load(const struct checkpoint *c, struct dit *d, enum weights_choice which);
// Loads weights, EMA and moments of a training checkpoint; ERR_INPUT when one is missing.
int checkpoint_load_training(const struct checkpoint *c, struct dit *d);

// Writes weights, EMA, moments as d has them, and the run's state (NULL: weights and EMA only).
int checkpoint_save(const char *path, struct dit *d, const struct run_state *run);

#endif
