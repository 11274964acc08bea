// What the benchmarks share: a device's two ceilings, random numbers in bulk, medians.
#ifndef DITMOE_MEASURE_H
#define DITMOE_MEASURE_H

#include <stdio.h>

#include "tools/command.h"

// What the device does at its best, measured: figures of the benchmarks are shares of these.
struct ceilings {
    int size;      // of the matrix product n x n x n, operands in the activations' type
    double flops;  // of that product, a second
    double copy;   // bytes a second, read and written, of a copy within the device's memory
    size_t copied; // bytes of that copy, one way
};

// Median of several rounds each. The product is plain, by the device's fastest way (as large as its
// memory allows, up to 8192 on GPUs, 2048 on CPUs); the copy is of one of its matrices.
int measure_ceilings(struct device *dev, struct stream *stream, struct ceilings *out);
void print_ceilings(const struct ceilings *c, const struct device *dev, FILE *table);
json_t *ceilings_json(const struct ceilings *c, const struct device *dev);

// `count` normal numbers of mean 0 and standard deviation 1, in f32. Never zeros: devices run
// faster on those.
void noise_fill(float *out, size_t count, uint64_t seed);

// Fills device memory with such numbers as f32 or bf16; `bytes` may be any number. The same few
// megabytes are repeated.
int noise_fill_device(struct device *dev, struct stream *stream, struct mem *mem, size_t bytes,
                      enum dtype type);

// Sorts values[0..count) and returns the middle one; NAN of none.
double median_of(double *values, int count);

// The median time of one work(user), over `rounds` rounds of as many calls as take about `seconds`.
// Waits for the device once a round.
int measure_calls(struct device *dev, struct stream *stream, int rounds, double seconds,
                  int (*work)(void *user), void *user, double *each);

// "812.3 GFLOP/s", "3.02 TB/s": a rate with a unit that leaves up to four digits before the point.
const char *format_rate(double per_second, const char *unit, char out[32]);

#endif
