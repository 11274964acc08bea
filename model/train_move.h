// Experts move between ranks in the middle of a run: weights, both moments and EMA, bit for bit.
#ifndef DITMOE_TRAIN_MOVE_H
#define DITMOE_TRAIN_MOVE_H

#include "model/train.h"

// *t, between two steps, becomes a trainer with the placement of `to` (same shares) and the same
// state. Called by all ranks. The state waits in host memory, four floats a parameter held, while
// the device's memory is planned anew. After a failure *t is NULL.
int trainer_move(struct trainer **t, const struct dit_ranks *to);

// What several ranks hold (all but experts without copies) becomes what the first of them has. Each
// updates its own from the same gradients, so they differ by rounding alone, and only where devices
// do. Called by all ranks; `t` may be without ranks.
int trainer_agree(struct trainer *t);

#endif
