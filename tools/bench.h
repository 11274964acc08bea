// `ditmoe bench`: each part of it fills `rows` (a JSON array, one object a row) and prints the same
// as a table to `table`.
#ifndef DITMOE_BENCH_H
#define DITMOE_BENCH_H

#include <jansson.h>
#include <stdio.h>

#include "devices/device.h"

// Matrix products at the model's shapes: median GFLOP/s of the device's own kernels, of OpenBLAS on
// as many threads as the device has compute units (CPU devices; loaded when the program runs, "-"
// where it is absent) and of CLBlast (only where the environment has DITMOE_CLBLAST=1: its first
// call compiles for 15 s), all in interleaved rounds, and the ratio own / OpenBLAS. Ragged products
// are one OpenBLAS call an expert. `filter`: only rows whose name contains it; NULL for all. Of a
// row:
// {"bench": "gemm", "name", "m", "n", "k", "own", "openblas", "clblast", "ratio"}; absent: null.
// Returns 0 or a negative code.
int bench_gemm(struct device *dev, const char *filter, json_t *rows, FILE *table);

#endif
