// The step of a trainer whose model is spread over ranks: gradients of what several ranks hold are
// summed while the backward pass goes on, and all ranks judge the step by the same norm and loss.
#ifndef DITMOE_TRAIN_RANKS_H
#define DITMOE_TRAIN_RANKS_H

#include "model/train.h"

struct reduction;

// For t->options.ranks; NULL: nothing to do. After dit_new, before dit_layout.
int reduction_new(struct trainer *t);
// Has this rank neither images nor experts? It keeps out of sums of gradients and updates nothing,
// so its weights are old; rank 0, which writes checkpoints, never does. And: is there such a rank?
bool reduction_nothing(const struct reduction *r); // of NULL: false
bool reduction_idle(const struct placement *p);
int reduction_commit(struct trainer *t); // when the plan's memory is there
void reduction_free(struct trainer *t);
int reduction_watched(const struct trainer *t); // before a step: ERR_LOST when a rank is lost
bool reduction_recorded(const struct trainer *t); // can a step be? Not where the host takes part

// dit_options.block_ready: sums what is shared of a block's gradients, or the rest's (-1), at the
// last micro-batch of a step.
int reduction_block(void *trainer, int layer);
// After the backward pass: waits for the sums; then the squared norm of all gradients, each
// expert's once, is in t->control, and the mean loss of all images in t->mean.
int reduction_finish(struct trainer *t);

// Noise of this rank's images: elements of the whole batch's noise, as one rank would draw them.
int reduction_noise(struct trainer *t, int64_t micro);

// Sums over ranks in place; without ranks nothing.
int reduction_sum(const struct trainer *t, double *values, size_t count);

#endif
