// A white picture to draw on with cairo, and text on it: what all figures begin and end with.
#ifndef DITMOE_CANVAS_H
#define DITMOE_CANVAS_H

#include <stdbool.h>

#include <cairo.h>

#include "model/image.h"

struct canvas {
    cairo_surface_t *surface;
    cairo_t *cairo;
    int width, height;
};

int canvas_new(int width, int height, struct canvas *c);
void canvas_free(struct canvas *c);
// A PNG file that appears whole or not at all, with the given text chunks.
int canvas_write(const char *path, struct canvas *c, const struct image_text *texts, int count);

void set_font(cairo_t *c, double size, bool bold);
double text_width(cairo_t *c, const char *text);
// `align` 0: starts at x; 0.5: centred on x; 1: ends at x. y is the middle of the digits.
void draw_text(cairo_t *c, double x, double y, double align, const char *text);

#endif
