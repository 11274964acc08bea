// Experts at home in host memory (placement.h: HOME_STREAMED), for models that are larger than the
// device. The routed experts of a block, gate, up and down matrices, live there as one piece of
// memory, page-locked where the device can; they are copied, on a stream of their own, ahead of use
// into one of two buffers in turn, while the device works on the block before. Nothing else
// differs: the same products read the same bits from a buffer. In training
//   - a block's gradients are written to one of two buffers, and copied out while the device goes
//     on;
//   - the optimiser then goes over the experts in parts of fixed size: weights, gradients, moments
//     and average come in, the same update is made of them as of all others, and they go out again.
// Forward, backward and update of a weight of 2 bytes thus bring 2 + 2 + 20 bytes in, 4 + 16 out.
//
// Blocks are streamed whole: with one of a rank's experts in a block all of them
// (placement_streams()). Biases of EXPERT_GELU stay on the device.
#ifndef DITMOE_STREAMED_H
#define DITMOE_STREAMED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/ops.h"

struct dit;
struct streamed;

// Which blocks' experts: those of which[layers], or, where that is NULL, `blocks` of those that
// have experts, evenly spread.
struct offload {
    int blocks; // OFFLOAD_AUTO: as few as memory allows (sampler_new(), trainer_new())
    const bool *which;
};
enum { OFFLOAD_AUTO = -1 };

// Bytes to plan with where what goes to host memory is chosen by what is free: a little less, since
// drivers take memory beside ours.
static inline uint64_t offload_limit(const struct device *dev, uint64_t limit)
{
    const uint64_t left = dev->info.memory > dev->allocated ? dev->info.memory - dev->allocated : 0;
    return limit ? limit : left - left / 64;
}

// How many blocks there are whose experts this rank could stream.
int streamed_most(const struct dit *d);
bool streamed_block(const struct dit *d, int layer);

// Called by dit_new() in this order: marks parameters before they are planned; then buffers.
int streamed_new(struct dit *d);
int streamed_plan(struct dit *d);
int streamed_commit(struct dit *d); // takes host memory; ERR_NOMEM says how much is missing
void streamed_free(struct streamed *s);
void streamed_zero_moments(struct dit *d);

// The passes. begin: before the first block of a pass. use and used: around the work on a block's
// experts, whose tensors are on the device in between.
int streamed_begin(struct dit *d, bool backward);
int streamed_use(struct dit *d, int layer);
int streamed_used(struct dit *d, int layer);
int streamed_use_gradients(struct dit *d, int layer); // beside use
// A block's backward pass is done: its gradients go out. `complete`, in a step's last micro-batch:
// their squares are added up in control (op_norm2), from 0 in the first block that comes.
int streamed_gradients(struct dit *d, int layer, struct tensor *control, bool complete);
int streamed_end_backward(struct dit *d);
// The update of all that is streamed.
int streamed_update(struct dit *d, struct tensor *control, const struct adamw *how);

// What it comes to: blocks, experts, bytes of host memory, bytes that a pass (of training: a step)
// brings in and takes out, by plan. All 0 without streamed experts.
struct streamed_figures {
    int blocks, of, experts;
    uint64_t host, in, out;
    bool locked; // all host memory is page-locked, or not taken yet, or needs it not
};
struct streamed_figures streamed_figures(const struct dit *d);
// Seconds of the last pass in which the device had nothing to do but wait for copies; the device
// has finished it.
int streamed_waited(struct dit *d, double *seconds);

#endif
