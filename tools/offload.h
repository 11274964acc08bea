// What a run does with less device memory than its model needs: the options, and what is told of
// it.
#ifndef DITMOE_TOOLS_OFFLOAD_H
#define DITMOE_TOOLS_OFFLOAD_H

#include "model/dit.h"
#include "tools/options.h"
#include "tools/ranks.h"

struct memory_options {
    uint64_t memory;     // 0: what the device has
    const char *offload; // "auto", or how many blocks
};
extern const struct option_spec memory_option_list[];

// The blocks whose experts live in host memory: the placement's, where it says so (which[] is then
// its own), else what --offload says. ERR_INPUT where that is no number.
int offload_choose(const struct memory_options *o, const struct device *dev,
                   const struct rank_plan *ranks, struct offload *out);
// One line on stderr where experts live in host memory.
void offload_say(const struct dit *d);
// And at the end: how long the device waited for copies in the last pass or step, beside the mean
// time of one. The device is done.
int offload_say_waited(struct dit *d, double mean);

#endif
