// Measuring what the forecast of a placement needs: the rates of one device, and of the roads
// between ranks.
#ifndef DITMOE_CALIBRATE_H
#define DITMOE_CALIBRATE_H

#include "runtime/exchange.h"
#include "runtime/rates.h"
#include "runtime/roads.h"
#include "tools/command.h"

struct calibrate_settings {
    const char *devices, *model, *out;
    struct model_options overrides;
    int precision, batch, force, json;
};

// The device's rates at the model's width; then real steps of the model, cut to a few layers, whose
// time over the forecast's is kept beside them. Takes seconds on a GPU, up to a minute on a CPU.
int calibrate_device(struct device *dev, struct stream *stream, const struct calibrate_settings *o,
                     const struct config *c, struct device_rates *out);

// Every pair of ranks in turn: bytes from the memory of one's device to the other's and back, on
// the road that rows of experts take (NCCL, windows, messages), and from host to host. Collective;
// rank 0 gets the roads put into `rates`.
int calibrate_pairs(struct exchange *x, struct roads *roads, struct device *dev,
                    struct stream *stream, struct rates *rates);

// Real steps of each rank (devices [ranks]) alone and of every pair, an image each, for what they
// take beside the work that is counted (struct link_rate). Collective; the rates of all devices and
// roads must be known on rank 0.
int calibrate_steps(struct exchange *x, struct device *dev, struct stream *stream,
                    const struct calibrate_settings *o, int experts, struct device_rates *devices,
                    struct rates *rates);

#endif
