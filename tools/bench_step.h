// Whole steps of a model, training and sampling, on random weights and inputs; and beside them the
// same steps by another program (tests/peer/peer_cpu.py is one).
#ifndef DITMOE_BENCH_STEP_H
#define DITMOE_BENCH_STEP_H

#include "tools/measure.h"
#include "tools/offload.h"
#include "tools/ranks.h"

struct step_settings {
    const char *models, *batches; // lists, separated by commas
    const char *peer, *trace;
    struct model_options overrides;
    int rounds, steps, what; // what: 0 both, 1 train, 2 sample; steps 0: by the device
    int recompute, early, profile;
    struct rank_options ranks; // placement: a list too
    struct memory_options memory;
    bool alone; // this rank measures by itself, whatever the others do
};

// Every model at every batch. Training: median time of single steps. Sampling (without guidance:
// one forward pass of the batch a step): median over runs of `steps` steps each, divided by their
// number. On ranks `batch` is all ranks' together, and `ranks` says how the model lies on them.
// Appends one object a row: {"bench": "step", "name", "what", "type", "batch", "ms",
// "images_per_s", "gflops" (2 a multiply-accumulate of active parameters and attention; three
// forwards in training), "of_product" (share of the ceiling of one device, of each with ranks),
// "ranks", "memory" (planned bytes), "allocated" (by the device), "peers": [{"mode", "ms",
// "ratio"}]}. ratio: the peer's time over ours. On ranks every placement has a row, with what
// tools/bench_ranks.h adds.
int bench_step(struct device *dev, struct stream *stream, const struct step_settings *o,
               const struct ceilings *ceilings, json_t *rows, FILE *table);

// Calls visit() with every model at every batch; ERR_INPUT says what is wrong with the lists.
typedef int bench_visit(void *user, const char *title, const struct config *c, int batch);
int bench_each(const struct step_settings *o, bench_visit *visit, void *user);

#endif
