// Pictures for people: a labelled grid of images, and curves over axes. Both are PNG files that
// appear whole or not at all, with the given text chunks.
#ifndef DITMOE_FIGURE_H
#define DITMOE_FIGURE_H

#include "model/image.h"

struct figure_grid {
    const struct image *images; // [rows * columns], row by row, all of one size and channel count;
                                // one with pixels == NULL leaves its place empty
    int rows, columns;
    const char *const *labels; // [rows], at the left of each row; NULL: none
    const char *title;         // above, or NULL
    int scale;                 // pixels of the figure a pixel of an image; 0: chosen
};
int figure_write_grid(const char *path, const struct figure_grid *grid,
                      const struct image_text *texts, int count);

struct figure_curve {
    const char *name;    // for the legend; NULL: not in it
    const double *x, *y; // [count], x ascending; values that are not finite are gaps
    int count;
    double smooth; // 0: drawn as it is. Otherwise raw in a light tone and, dark, its running
                   // mean over about this many points
};
struct figure_chart {
    const char *title;    // or NULL
    const char *subtitle; // or NULL
    const char *x_label, *y_label;
    const struct figure_curve *curves;
    int curve_count;
    int width, height; // pixels; 0: 1200 x 700
};
int figure_write_chart(const char *path, const struct figure_chart *chart,
                       const struct image_text *texts, int count);

#endif
