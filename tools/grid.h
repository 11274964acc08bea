// Samples, [count, channels, size, size] floats in [-1,1], as a picture: figure.h's grid.
#ifndef DITMOE_GRID_H
#define DITMOE_GRID_H

#include "model/figure.h"

struct grid {
    const float *latents;
    int count, channels, size; // channels 1 or 3
    int rows, columns;         // rows * columns >= count
    const char *const *labels; // [rows] or NULL
    const char *title;         // or NULL
};
int grid_write(const char *path, const struct grid *g, const struct image_text *texts, int count);

#endif
