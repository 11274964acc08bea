// Work that is the same every time, recorded once and replayed as a whole where the device can
// (CUDA graphs): launching a few hundred small kernels one by one would keep the device waiting.
//
// The first run does the work as it is, so that everything made at first use is there; the second
// records it; the others replay. The work must use the same memory each time, and neither read from
// the device, write from the host nor wait. A context with a profile always works step by step.
#ifndef DITMOE_RECORDING_H
#define DITMOE_RECORDING_H

#include "runtime/tensor.h"

struct recording {
    struct graph *graph;
    bool warm; // has run once
};

int recording_run(struct context *c, struct recording *r, int (*work)(void *user), void *user);

// Forgets what was recorded: the next run is a first one again.
void recording_reset(struct context *c, struct recording *r);

#endif
