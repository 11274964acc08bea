// `ditmoe bench ops`: the operations of a block.
#ifndef DITMOE_BENCH_OPS_H
#define DITMOE_BENCH_OPS_H

#include "tools/measure.h"

// The operations that a block of the model is made of, forward and backward, on `batch` images:
// median seconds; FLOP/s of products; GB/s of the least traffic (every operand once, twice where it
// is read and written); and the share of the ceiling that is nearer. On GPUs several sets of
// operands take turns, so that caches do not hold them. `filter`: only rows whose name contains it;
// NULL for all. Of a row: {"bench": "ops", "name", "what": model, "type", "batch", "shape",
// "seconds", "gbps", "of_copy"} and, of products, "gflops" and "of_product". Returns 0 or a
// negative code.
int bench_ops(struct device *dev, struct stream *stream, const struct config *c, const char *model,
              int batch, const struct ceilings *ceilings, const char *filter, json_t *rows,
              FILE *table);

#endif
