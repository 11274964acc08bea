// Checkpoints: safetensors with the published parameter names. NAME is the model's weight,
// "ema.NAME" its EMA, "adam.m.NAME" and "adam.v.NAME" the moments. The metadata holds the whole
// configuration ("ditmoe.config", JSON) and, for training checkpoints, the state of the run
// ("ditmoe.train", JSON: struct run_state). Written to a temporary name, synced, renamed.
// What others write (model/weights_file.h) opens too; without our metadata the configuration is
// inferred (model/infer.h).
#ifndef DITMOE_CHECKPOINT_H
#define DITMOE_CHECKPOINT_H

#include "model/dit.h"
#include "model/infer.h"
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
    struct config_sources sources; // where it comes from
    bool has_config;               // from metadata; else inferred
    bool has_model, has_ema, has_moments, has_run;
    struct run_state run;
};

// Opens whatever model/weights_file.h does, and validates: every parameter of the configuration is
// there with its shape, or ERR_INPUT names the first that is not. `hints` (NULL: none) say what a
// file without metadata cannot tell; for one with metadata they must agree with it.
int checkpoint_open(const char *path, const struct config_hints *hints, struct checkpoint *out);
void checkpoint_close(struct checkpoint *c);

// The prefix of the names that a choice takes, or ERR_INPUT where the file has not got them; and a
// parameter's tensor under it (one that is not trained exists once, under whichever prefix).
int checkpoint_prefix(const struct checkpoint *c, enum weights_choice which, const char **prefix);
int checkpoint_tensor(const struct checkpoint *c, const struct param *p, const char *prefix,
                      const struct st_tensor **out);

// Loads weights into d->w; a value that is not finite is ERR_INPUT naming the parameter.
int checkpoint_load(const struct checkpoint *c, struct dit *d, enum weights_choice which);
// Loads weights, EMA and moments of a training checkpoint; ERR_INPUT when one is missing.
int checkpoint_load_training(const struct checkpoint *c, struct dit *d);

// Writes weights, EMA, moments as d has them, and the run's state (NULL: weights and EMA only).
int checkpoint_save(const char *path, struct dit *d, const struct run_state *run);

#endif
