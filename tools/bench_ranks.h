// What `ditmoe bench step` tells of a model that lies on several ranks: predicted beside measured.
#ifndef DITMOE_BENCH_RANKS_H
#define DITMOE_BENCH_RANKS_H

#include <jansson.h>
#include <stdio.h>

#include "tools/ranks.h"

// Adds to a row {"busiest" (see there; of "load", which the row has), "placement", "predicted_ms"
// (null: not known), "off" (predicted over measured, less 1), "images": [rank], "experts": [rank],
// "waited": [rank] (shares of the time), "forecast": [{"dense", "experts", "exchange", "stream",
// "reduce", "update", "wait"} of a rank, seconds]}. A collective call; `waited` is of this rank.
int bench_ranks_add(json_t *row, const char *name, const struct rank_plan *p, double seconds,
                    double waited);
// Under the row: a line.
void bench_ranks_print(const json_t *row, FILE *table);
// A table of all rows on ranks, where there are several.
void bench_ranks_table(const json_t *rows, FILE *table);

#endif
