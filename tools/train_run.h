// A training run: its settings, its directory, its log. See cmd_train.c for what each option means.
//
// RUN_DIR holds run.json (options, configuration, data), log.csv (a row a step),
// step-XXXXXXXX.safetensors (checkpoints, whole or not there), samples/step-XXXXXXXX.png, and at
// the end loss.png and model.safetensors (weights and EMA, for sampling).
#ifndef DITMOE_TRAIN_RUN_H
#define DITMOE_TRAIN_RUN_H

#include "model/data.h"
#include "model/sampler.h"
#include "model/train.h"
#include "tools/command.h"
#include "tools/decoder.h"
#include "tools/offload.h"
#include "tools/progress.h"
#include "tools/ranks.h"

struct train_settings {
    const char *model, *data, *out, *init;
    int diffusion; // enum diffusion
    struct model_options overrides;
    struct device_options device;
    struct vae_settings vae; // for sample grids
    struct rank_options ranks;
    int64_t steps;
    int batch, accumulate;
    float rate, beta1, beta2, decay, clip, ema;
    int warmup;
    int time; // enum flow_time
    uint64_t seed;
    int recompute, early, flip;
    int image_size, channels, threads;
    int64_t checkpoint_every, sample_every, log_every, replan;
    int sample_steps, keep;
    float sample_cfg;
    int resume, dry_run;
    struct memory_options memory;
};

// ---- log.csv (train_log.c) ----------------------------------------------------------------------

struct train_log {
    FILE *file;
    bool terms; // DDPM: the columns mse and vb
    char path[4096];
};

// Opens DIR/log.csv with its header; keeps the rows up to `step` of an earlier run and cuts off
// what comes after them.
int train_log_open(const char *dir, const struct config *c, int64_t step, struct train_log *out);
int train_log_row(struct train_log *log, int64_t step, const struct train_report *r, int images,
                  double seconds);
int train_log_close(struct train_log *log); // also of a zeroed struct
// Draws DIR/loss.png from DIR/log.csv.
int train_log_chart(const char *dir, const struct config *c, const char *title);

// ---- the run's directory (train_files.c) --------------------------------------------------------

// Makes the directory and takes its lock, so that two runs never write into one. Returns the lock
// in *fd (closed by the caller).
int run_directory_open(const char *dir, int *fd);
bool run_directory_has_checkpoint(const char *dir);
void run_checkpoint_path(const char *dir, int64_t step, char *out, size_t size);
// Opens the newest checkpoint that is whole; a damaged newer one is told on stderr and passed over.
// Returns 1, or 0 when there is none.
int run_checkpoint_open(const char *dir, struct checkpoint *out);
// Removes all checkpoints but the newest `keep` (0: keeps all).
void run_checkpoint_prune(const char *dir, int keep);

// ---- the model (train_init.c) -------------------------------------------------------------------

// The configuration: the preset's, or that of --init FILE, with what options and data change.
// ERR_INPUT where they want other tensors than the file has.
int train_config(const struct train_settings *o, const struct model_options *overrides,
                 struct config *out);
// Weights and their average become those of --init FILE (its average where it has one).
int train_load_init(const struct train_settings *o, struct dit *d);

// ---- sample grids (train_samples.c) -------------------------------------------------------------

enum { SAMPLE_ROWS = 10, SAMPLE_COLUMNS = 4, SAMPLE_BATCH = 16 };

struct train_samples {
    struct sampler *sampler;
    struct vae_settings vae;
    struct rank_plan ranks; // of a batch of samples
    int rows, count;
    int32_t classes[SAMPLE_ROWS * SAMPLE_COLUMNS];
};

// Bytes that sampling will take on the device.
int train_samples_plan(const struct session *s, const struct config *c,
                       const struct train_settings *o, const struct rank_plan *ranks,
                       const struct offload *offload, uint64_t *bytes);
int train_samples_new(const struct session *s, const struct config *c,
                      const struct train_settings *o, const struct rank_plan *ranks,
                      const struct offload *offload, struct train_samples *out);
void train_samples_free(struct train_samples *s);
// Draws with the trainer's EMA weights and writes DIR/samples/step-XXXXXXXX.png.
int train_samples_write(struct train_samples *s, struct trainer *t, const struct dataset *d,
                        const char *dir);

// ---- ranks (train_ranks.c) ----------------------------------------------------------------------

// Nothing of this does anything in a process by itself.
struct train_ranks {
    char path[4200];
    double *load;   // [layers, experts] rows since it was last asked whether experts should move
    double *total;  // and of this process's whole run
    int64_t noted;  // the step of the last rows in ranks.csv
    double began;
    struct exchange_figures before;
    double sent, waited, seconds; // of the run: rows, mean of ranks, time
    double predicted;             // seconds of a step; NAN: not known
    double part, took;            // seconds of steps since the last rows, and of the run
    int64_t part_steps, steps;    // of so many
    int skipped;                  // a run's first steps, which prepare much
};
int train_ranks_new(const struct config *c, const char *dir, struct train_ranks *out);
void train_ranks_free(struct train_ranks *r);
// After a step of so many seconds on this rank.
void train_ranks_step(struct train_ranks *r, double seconds);
// After a step: its load; and every hundred steps, or at the `last`, rows of RUN_DIR/ranks.csv: of
// each rank and layer rows sent to others and received and seconds waited in `steps` steps, and in
// layer "all" seconds waited and in all, bytes of gradients summed, and milliseconds of a step,
// predicted and measured.
int train_ranks_load(struct train_ranks *r, struct trainer *t);
int train_ranks_note(struct train_ranks *r, struct trainer *t, bool last);
// RUN_DIR/load.json: the rows that each expert got, for 'ditmoe plan --load'.
int train_ranks_write_load(const struct train_ranks *r, const struct config *c, const char *dir);
// What it came to; `rows` of all ranks that have been routed.
void train_ranks_say(const struct train_ranks *r, int64_t rows);
// Whether experts should lie elsewhere, and where (*next, when *moved).
int train_ranks_move(struct train_ranks *r, const struct rank_plan *now, uint64_t seed, int64_t step,
                     struct rank_plan *next, bool *moved);

// ---- the run (train_run.c) ----------------------------------------------------------------------

// Trains; `command` is echoed into run.json. Returns 0 or a negative code; ERR_STOPPED never: a
// stopped run has written its checkpoint and is a success.
int train_run(const struct train_settings *o, const struct command *command);

#endif
