// Whole steps of a model, training and sampling, on random weights and inputs; and beside them the
// same steps by another program (tests/peer/peer_cpu.py is one).
#ifndef DITMOE_BENCH_STEP_H
#define DITMOE_BENCH_STEP_H

#include "tools/command.h"

struct step_settings {
    const char *model, *peer;
    struct model_options overrides;
    int batch, rounds, what; // what: 0 both, 1 train, 2 sample
};

// Appends one object a row: {"bench": "step", "name", "what", "batch", "ms", "images_per_s",
// "gflops" (2 a multiply-accumulate of active parameters and attention; three forwards in
// training), "memory", "peers": [{"mode", "ms", "ratio"}]}. ratio: the peer's time over ours.
int bench_step(struct device *dev, struct stream *stream, const struct config *c,
               const struct step_settings *o, json_t *rows, FILE *table);

#endif
