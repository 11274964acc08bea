// Improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator has them: the
// manifold of a set is the union of balls around its features that reach to the third nearest other
// one. Precision is the share of samples within the reference's manifold, recall the reverse.
//
// Distances are products of blocks on the device in f32. (ADM's evaluator rounds them to float16
// where none overflows, which moves both figures a little: docs/evaluation.md.)
#ifndef DITMOE_MANIFOLD_H
#define DITMOE_MANIFOLD_H

#include <stdint.h>

#include "devices/device.h"

enum { MANIFOLD_NEIGHBOUR = 3 };

struct feature_rows {
    const float *rows; // [count,dim]
    int64_t count;
};

// Told after each of manifold_blocks() blocks; < 0 stops.
typedef int (*manifold_progress)(void *user, int64_t done, int64_t total);
int64_t manifold_blocks(int64_t reference, int64_t samples);

// Both sets need more than MANIFOLD_NEIGHBOUR images (ERR_INPUT).
int manifold_compare(struct device *dev, struct stream *stream, int dim,
                     const struct feature_rows *reference, const struct feature_rows *samples,
                     double *precision, double *recall, manifold_progress progress, void *user);

#endif
