// Where the time of a step goes. A context that has a profile records a device event before and
// after each operation that passes through runtime/ (kernel launches, matrix products, operations
// that the device took over, transfers of tensors); a context without one tests a pointer.
//
//     struct profile *p;
//     profile_new(c, &p);
//     profile_start(p);           // operations of c are noted from here on
//     ... one step, launched operation by operation: who replays graphs asks c->profile first ...
//     profile_stop(p);            // waits for the stream; p->list[0..p->count) is complete
//     profile_free(p);
#ifndef DITMOE_PROFILE_H
#define DITMOE_PROFILE_H

#include "runtime/tensor.h"

struct profile_op {
    char name[56];         // "layernorm_mod_fwd", "gemm nt 8192x1152x384 +bias"
    int layer;             // as told by profile_layer(), or -1
    double bytes;          // of its operands, each counted once: the least that it moves
    double flops;          // of a product or of attention, else 0
    double start, seconds; // on the device, from the first operation on
};

struct profile {
    struct context *c;
    struct profile_op *list;
    int count, room;
    int layer;
    struct event **events; // two an operation
    struct mem *busy;      // what the device is given to do before the first operation
    double span;           // from the start of the first operation to the end of the last, seconds
    double event_seconds;  // what two events with nothing between them show: part of every time
};

int profile_new(struct context *c, struct profile **out);
void profile_free(struct profile *p);

// Starts with something for a GPU to do, so that the host is ahead of it from the first operation
// on and its own pace is not measured.
int profile_start(struct profile *p);
int profile_stop(struct profile *p);

// Operations from here on belong to block `layer` (-1: to none).
static inline void profile_layer(struct context *c, int layer)
{
    if (c->profile)
        c->profile->layer = layer;
}

// What profiles call an operation that a device takes over.
const char *accelerated_name(enum accelerated op);

// ---- for runtime/: around an operation ---------------------------------------------------------
//
// A begin without an end (the operation was not done after all) is forgotten at the next begin.

int profile_begin(struct profile *p);
// The operands' bytes are those of `mems`, each once, without NULLs and the context's scratch.
int profile_end(struct profile *p, const char *name, const struct mem *const *mems, int count,
                double flops);
int profile_end_kernel(struct profile *p, enum kernel kernel, const union arg *args);
int profile_end_gemm(struct profile *p, const struct gemm *g);
int profile_end_accelerated(struct profile *p, enum accelerated op, const void *args,
                            const struct tensor *const *operands, int count);

#endif
