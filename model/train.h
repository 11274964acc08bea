// Training, by rectified flow (t = 1 is noise: x_t = (1-t) x + t e, v = e - x) or DDPM
// (model/ddpm.h; t uniform in 0..999, the hybrid loss), as the configuration says: the step,
// without files or printing. One optimiser step = `accumulate` micro-batches of `batch` images,
// gradients averaged over all of them, then one AdamW+EMA pass; nothing in it waits for the host.
// Random numbers are functions of (seed, micro-step, image): nothing to save but the step.
#ifndef DITMOE_TRAIN_H
#define DITMOE_TRAIN_H

#include "model/dit.h"
#include "runtime/recording.h"

// Rectified flow's distribution of t: sigmoid of a normal; uniform; sigmoid of a normal, one draw
// per 1/N quantile.
enum flow_time { TIME_LOGIT_NORMAL, TIME_UNIFORM, TIME_STRATIFIED };
int flow_time_parse(const char *name, enum flow_time *out); // ERR_INPUT names the choices

struct train_options {
    int batch, accumulate;
    bool recompute;
    bool early; // update each block at the end of its backward pass: no memory for all gradients
                // at once, but neither clipping nor accumulation
    enum flow_time time;
    struct adamw adamw;
    uint64_t seed;
    uint64_t limit; // device memory to plan with, bytes; 0: all
    struct offload offload; // experts that live in host memory, with all their state; not with early
    const struct dit_ranks *ranks; // `batch` is then this rank's part of each, 0 or more; NULL: one rank
    bool as_ranks; // keep and make again what ranks do, so that memory grows evenly with the batch
};
struct train_options train_defaults(void);

struct trainer {
    struct train_options options;
    struct dit *dit;
    int64_t step;   // steps taken
    int micro;      // micro-batches of the current step done
    int all, first; // images of a batch on all ranks, and the number of this rank's first
    struct tensor images, noise, loss, losses, control, counts;
    struct tensor at;    // [N,TIME_COLUMNS] what the images' t mean
    struct tensor terms; // [2,N] DDPM: mse and the bound's term of the last micro-batch
    struct tensor step_terms; // [A,2,N] and of all micro-batches of a step
    struct tensor rest[4]; // moments, EMA, gradients of the weights that stay f32 (half_weights)
    struct tensor mean; // [1] with ranks: the loss of all images of a step
    struct reduction *reduction; // with ranks (model/train_ranks.h), else NULL
    struct tensor *spans; // parts of the gradients whose norm is taken by a pass over them; NULL: all
    int span_count;
    float *t_host, *at_host; // [all]; [N,TIME_COLUMNS]
    int32_t *y_host;
    double *entropy; // [L], for reports
    struct recording *passes; // [accumulate] the device's work on each micro-batch of a step
};

// What a finished step tells.
struct train_report {
    double loss;       // mean over the step's images
    double mse, vb;    // DDPM: its two parts (vb 0 where no variance is learned), likewise
    double balance;    // sum of the layers' balance losses, last micro-batch
    double grad_norm;  // before clipping
    double rate;
    bool skipped;      // not finite: parameters untouched
    int32_t applied, skips;
    double load_max;   // max over layers of (largest expert load / mean load), last micro-batch
    double *entropy;   // [MoE layers] load entropy / ln E; owned by the trainer
    int layers;        // number of MoE layers
};

// Plans (dit_new + the trainer's own tensors + dit_layout). ERR_NOMEM leaves *out usable for
// plan_print((*out)->dit->plan) and trainer_free().
int trainer_new(struct device *dev, struct stream *stream, const struct config *c,
                const struct train_options *o, struct trainer **out);
int trainer_commit(struct trainer *t); // allocates; then dit_init or checkpoint_load_training
void trainer_free(struct trainer *t);

// One micro-batch: this rank's images [N,C,S,S] in [-1,1], labels [N]. After `accumulate` calls the
// optimiser runs and the step is complete (*done = true).
int trainer_micro(struct trainer *t, const float *images, const int32_t *labels, bool *done);
// Reads the last complete step's scalars; waits for the device.
int trainer_report(struct trainer *t, struct train_report *out);

// The optimiser's own counters, for checkpoints.
int trainer_counts(struct trainer *t, int32_t *applied, int32_t *skipped);
int trainer_restore(struct trainer *t, int64_t step, int32_t applied, int32_t skipped);

// The optimiser alone: norm, clipping, AdamW and EMA with the gradients as they are.
int trainer_apply(struct trainer *t);
// With options.early: what follows the loss; the update of one block, or of the rest (-1).
int trainer_begin_early(struct trainer *t);
int trainer_update_block(void *trainer, int layer);
int optimiser_commit(struct trainer *t); // its views of memory; trainer_commit() calls it

// The parity door: loss of given x, t, y, noise; gradients stay in t->dit->g (not applied).
int trainer_loss(struct trainer *t, const float *x, const float *time, const int32_t *y,
                 const float *noise, double *loss);

// Draws `count` values of t for a micro-step: of rectified flow; of DDPM, whole numbers.
void ddpm_draw_times(uint64_t seed, int64_t micro, int count, float *t);
void flow_draw_times(enum flow_time kind, uint64_t seed, int64_t micro, int count, float *t);

#endif
