// `ditmoe bench --compare FILE`: this run beside an earlier one, or beside the PyTorch peer's.
#ifndef DITMOE_BENCH_COMPARE_H
#define DITMOE_BENCH_COMPARE_H

#include <jansson.h>
#include <stdio.h>

// FILE is an earlier --json of `ditmoe bench`, or what a peer writes: a list of
//     [step, preset, experts, way, batch, compilation, "12.34 ms", "5.6 GiB"]
// such as ["sample", "S/2", "8", "grouped", "16", "reduce-overhead", "4.34 ms", "0.9 GiB"]. Prints
// speed over that of each row of FILE for the same work (and memory over its memory), a peer's
// fastest first, and notes it in `rows` as "compared": [{"with", "ratio", ...}]. ERR_INPUT: FILE
// cannot be read as either, or has nothing of what was measured.
int bench_compare(const char *path, json_t *rows, FILE *table);

#endif
