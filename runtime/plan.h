// The memory plan. Nothing is allocated while a model runs: a dry pass names every tensor with its
// lifetime, the plan gives each an offset in one slab per class, commit() allocates the slabs and
// makes the views. The plan can be printed before anything is loaded; a run that cannot fit says so
// in a second, with the table.
//
// Time is a counter of the dry pass: a tensor whose life [first,last] overlaps no other's may share
// its bytes. KEEP / RECOMPUTE / SCRATCH are therefore lifetimes, not different code.
#ifndef DITMOE_PLAN_H
#define DITMOE_PLAN_H

#include <stdio.h>
#include "runtime/tensor.h"

enum plan_class {
    PLAN_WEIGHTS,
    PLAN_GRADIENTS,
    PLAN_MOMENT1, // Adam's first moment
    PLAN_MOMENT2, // Adam's second moment
    PLAN_EMA,
    PLAN_HALF,   // weights that products read as bf16 (struct tensor)
    PLAN_LOW,    // and the lower halves of their f32
    PLAN_STREAMED, // buffers for weights that live in host memory
    PLAN_PACKED, // weights once more, in the form that products read
    PLAN_ACTIVATIONS,
    PLAN_INPUT, // batch, noise, results
    PLAN_WINDOWS, // what other ranks' devices write (runtime/peers.h)
    PLAN_CLASSES
};
const char *plan_class_name(enum plan_class class);

enum { PLAN_FOREVER = 1 << 30 };

struct plan;

int plan_new(struct device *dev, struct plan **out);
void plan_free(struct plan *p); // frees views and slabs

// Declares a tensor: sets dtype and shape of *t now, its memory at commit. `t` must stay where it
// is. The class gives the slab; lifetimes share bytes only within a class. A tensor whose life ends
// at PLAN_FOREVER shares with nobody; these lie first in their slab, in the order of declaration,
// so that classes declared alike (weights, gradients, moments, EMA) have the same layout: element i
// of one slab belongs to element i of the other, also where one class is f32 and the other bf16.
//
// After plan_host() the tensors of class `guest`, which have lifetimes in the same clock, lie in
// the slabs of class `host`: in the order of declaration, as if they lived for ever, but their
// bytes are also the host's while they do not live. What rounding leaves between them is nobody's
// and stays zero.
void plan_host(struct plan *p, enum plan_class host, enum plan_class guest);
int plan_tensor(struct plan *p, const char *name, enum plan_class class, enum dtype type, int first,
                int last, struct tensor *t, int ndim, const int64_t *shape);
#define PLAN_TENSOR(p, name, class, type, first, last, t, ...)                                     \
    plan_tensor(p, name, class, type, first, last, t,                                              \
                (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                         \
                (int64_t[]){__VA_ARGS__})

// The slabs of a class are memory that other processes of the machine can map (device.h:
// alloc_shared).
void plan_share(struct plan *p, enum plan_class class);
// After the commit: the id of a shared class, for reach(). ERR_NODEVICE when it is not one slab.
int plan_share_id(const struct plan *p, enum plan_class class, unsigned char id[SHARE_ID]);

// Gives offsets (deterministic). Fails with ERR_NOMEM, naming need and limit, when the total is
// more than `limit` bytes (0: what is left of the device's memory), or when one tensor is larger
// than the device's largest allocation; the table can still be printed then.
int plan_layout(struct plan *p, uint64_t limit);
// Allocates and makes the views; plan_layout() first. The slabs of weights, gradients, moments and
// EMA are zeroed, so that operations on whole slabs find nothing in the gaps between tensors.
int plan_commit(struct plan *p);

// Whether `bytes` more would fit in the plan as it was laid out last, under the same limit.
bool plan_has_room(const struct plan *p, uint64_t limit, uint64_t bytes);
uint64_t plan_total(const struct plan *p);
uint64_t plan_class_bytes(const struct plan *p, enum plan_class class); // a host's with its guest's
void plan_print(const struct plan *p, FILE *out, bool every_tensor);

// *out becomes a part of t, from element `start` (whose byte offset must be a multiple of the
// device's alignment) with the given shape and t's type; freed with the plan. Before the commit the
// view is noted and made then: t and *out must stay where they are.
int plan_view(struct plan *p, const struct tensor *t, int64_t start, struct tensor *out, int ndim,
              const int64_t *shape);

// Where t, which was declared here, lies after plan_layout(): the number of its class's slab;
// *start and *end: the slab's elements of 4 bytes that it has, rounding included.
int plan_place(const struct plan *p, const struct tensor *t, int64_t *start, int64_t *end);

// The slabs of a class as flat f32 tensors (for operations on all parameters at once): returns how
// many there are, *slabs points to them. Classes declared alike have slabs that match one by one.
int plan_slabs(const struct plan *p, enum plan_class class, const struct tensor **slabs);

#endif
