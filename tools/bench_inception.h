// `ditmoe bench inception`: the network that evaluations look at images with.
#ifndef DITMOE_BENCH_INCEPTION_H
#define DITMOE_BENCH_INCEPTION_H

#include "tools/bench_step.h"

// FID's Inception with random weights at every batch of `o`: the network alone, images being on the
// device, as the median over rounds. Appends one object a row: {"bench": "inception", "name",
// "type", "batch", "seconds", "images_per_s", "gflops", "of_product", "memory"}. `o` also says
// whether to profile.
int bench_inception(struct device *dev, struct stream *stream, const struct step_settings *o,
                    const struct ceilings *ceilings, json_t *rows, FILE *table);

#endif
