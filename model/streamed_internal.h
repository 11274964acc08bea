// Inside the streaming of experts: what streamed.c (the passes) and streamed_update.c (the
// optimiser) share.
#ifndef DITMOE_STREAMED_INTERNAL_H
#define DITMOE_STREAMED_INTERNAL_H

#include "model/dit.h"

enum { TURNS = 2 }; // buffers of each kind

// What host memory keeps of a block's experts; LOW where weights are in two halves; GRADIENT and
// what follows in training.
enum part { PART_WEIGHT, PART_LOW, PART_GRADIENT, PART_MOMENT1, PART_MOMENT2, PART_EMA, PARTS };

struct matrices {
    struct tensor gu, down;
};

struct streamed_block {
    bool here;
    int64_t count;                      // elements of all its matrices
    struct matrices w[TURNS], g[TURNS]; // places in the buffers
    struct home gu[PARTS], down[PARTS]; // down follows gu
    struct event *before[2], *after[2]; // waiting for weights: forward, backward
    bool waited[2];                     // those are of the last pass
};

struct buffer {
    struct tensor whole;
    struct event *full, *used; // filled on one stream; used on the other
    int layer;                 // whose weights it has, -1: none
    uint64_t version;          // of them
};

// A part of all parameters on its way through the update.
struct update_buffer {
    struct tensor at[PARTS]; // [UPDATE_CHUNK]
    struct event *full, *done, *gone;
};
enum { UPDATE_CHUNK = 4 << 20 };

struct streamed {
    struct device *dev; // NULL until committed
    int layers;
    int count;                     // blocks
    struct streamed_block *blocks; // [layers]
    struct buffer weights[TURNS], gradients[TURNS];
    struct update_buffer update[TURNS];
    struct stream *in, *out;      // copies from and to host memory
    struct event *free, *settled; // activations are no longer needed; everything is at home
    struct event *update_began, *update_ended;
    bool backward, updated;
    bool normed;             // squares of this pass's gradients are in control already
    int last, last_gradient; // buffers used last
    unsigned char *memory;
    uint64_t bytes;
    unsigned char **locked; // [blocks * PARTS] pieces that are page-locked
    int locked_count, piece_count;
};

static inline struct tensor *streamed_gu(struct weights *w, int layer)
{
    return &w->blocks[layer].experts_gu;
}

static inline struct tensor *streamed_down(struct weights *w, int layer)
{
    return &w->blocks[layer].experts_down;
}

// The weights that a part is of, or NULL where this model has none.
struct weights *streamed_part(struct dit *d, enum part part);

int streamed_plan_update(struct dit *d);
int streamed_commit_update(struct dit *d);
void streamed_free_update(struct streamed *s, const struct backend *api);

#endif
