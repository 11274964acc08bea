// A tensor: device memory with a storage type and a shape, contiguous, row-major; and the context
// that operations run in. Letters, fixed once: N images, T tokens an image, M = N*T rows, D model
// width, H heads, E routed experts, K active experts a token, R = M*K routed rows, F expert width.
#ifndef DITMOE_TENSOR_H
#define DITMOE_TENSOR_H

#include "devices/device.h"

enum { TENSOR_DIMS = 5 };

struct packed;
struct profile;

// Memory of the host where a tensor lives that comes to the device for its use only (model/streamed.h);
// its `mem` is then the buffer that it is in, or NULL.
struct home {
    unsigned char *at;
    uint64_t version; // counts changes
};

struct tensor {
    struct mem *mem; // a view; NULL until the plan is committed
    enum dtype dtype;
    int ndim;
    int64_t shape[TENSOR_DIMS];
    struct packed *packed; // a weight's copy for products, or NULL
    struct home *home;     // or NULL: it lives in mem
    struct tensor *low;    // of a bf16 tensor in two halves: the 16 bits that rounding took away, or NULL
};

// An f32 in two halves: the nearest bf16, and in `low` (typed BF16, but raw bits) the signed
// difference of the f32's bits from it: f32 = (high << 16) + low. So is, on devices that want it,
//   - in training, a weight that products read as bf16 (device.h half_weights): the optimiser's
//     weights are f32 to the last bit in the memory of one f32;
//   - where activations are bf16, the residual stream of a forward pass (op_residual_norm_fwd).

// A copy of a weight in the form that the device's products read (op_packed_bytes). Products make
// it when they meet the weight first and after it was written, so it is never stale; who writes a
// weight other than by the functions below calls tensor_changed().
struct packed {
    struct tensor copy; // [bytes / 4] F32
    bool fresh;
};

static inline void tensor_changed(const struct tensor *t)
{
    if (t->packed)
        t->packed->fresh = false;
    if (t->home)
        t->home->version++;
}

int64_t tensor_count(const struct tensor *t);  // elements
size_t tensor_bytes(const struct tensor *t);

// Where operations run: one device, one stream, one scratch area. In a dry context (plan time)
// operations check their shapes, note how much scratch they would want, and launch nothing.
struct context {
    struct device *dev;
    struct stream *stream;
    bool dry;
    bool fresh_gradients; // products write weight gradients instead of adding to them
    size_t space_wanted;  // dry: the largest scratch any operation asked for, bytes
    struct tensor space;  // the scratch; planned from space_wanted
    struct profile *profile; // where operations note their times (runtime/profile.h), or NULL
};

// Host transfers of a whole tensor; `host` holds tensor_bytes() bytes.
int tensor_write(struct context *c, const struct tensor *t, const void *host);
int tensor_read(struct context *c, const struct tensor *t, void *host);
int tensor_zero(struct context *c, const struct tensor *t);
int tensor_copy(struct context *c, const struct tensor *to, const struct tensor *from);

#endif
