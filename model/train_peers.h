// Sums of gradients, of their norm and of losses over ranks that have peer windows: train_ranks.h.
#ifndef DITMOE_TRAIN_PEERS_H
#define DITMOE_TRAIN_PEERS_H

#include "model/train.h"
#include "runtime/peers.h"

struct peer_sums;

int peer_sums_new(struct trainer *t, struct peer_windows *windows, struct peer_sums **out);
void peer_sums_free(struct trainer *t, struct peer_sums *s);
int peer_sums_commit(struct trainer *t,
                     struct peer_sums *s); // after trainer_commit()'s memory is there
// A block's gradients are complete, or the rest's (-1): begins to sum them.
int peer_sums_block(struct trainer *t, struct peer_sums *s, int block);
// Waits, on the device, for all sums: the squared norm is in t->control, the mean loss in t->mean.
int peer_sums_finish(struct trainer *t, struct peer_sums *s);

#endif
