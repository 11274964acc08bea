// See canvas.h.
#include "model/canvas.h"

#include <string.h>

static const char *const FONT = "sans-serif";

void canvas_free(struct canvas *c)
{
    cairo_destroy(c->cairo);
    cairo_surface_destroy(c->surface);
}

int canvas_new(int width, int height, struct canvas *c)
{
    struct image probe; // the same limits as images
    TRY(image_new(width, height, 3, &probe));
    image_free(&probe);
    c->surface = cairo_image_surface_create(CAIRO_FORMAT_RGB24, width, height);
    c->cairo = cairo_create(c->surface);
    c->width = width;
    c->height = height;
    if (cairo_status(c->cairo) != CAIRO_STATUS_SUCCESS) {
        canvas_free(c);
        return fail(ERR_NOMEM, "out of memory for a figure of %d x %d pixels", width, height);
    }
    cairo_set_source_rgb(c->cairo, 1, 1, 1);
    cairo_paint(c->cairo);
    return 0;
}

int canvas_write(const char *path, struct canvas *c, const struct image_text *texts, int count)
{
    struct image image;
    TRY(image_new(c->width, c->height, 3, &image));
    cairo_surface_flush(c->surface);
    const uint8_t *data = cairo_image_surface_get_data(c->surface);
    int stride = cairo_image_surface_get_stride(c->surface);
    uint8_t *to = image.pixels;
    for (int y = 0; y < c->height; y++) {
        for (int x = 0; x < c->width; x++, to += 3) {
            uint32_t pixel;
            memcpy(&pixel, data + (size_t)y * (size_t)stride + (size_t)x * 4, 4);
            to[0] = (uint8_t)(pixel >> 16);
            to[1] = (uint8_t)(pixel >> 8);
            to[2] = (uint8_t)pixel;
        }
    }
    int code = image_write_png(path, &image, texts, count);
    image_free(&image);
    return code;
}

void set_font(cairo_t *c, double size, bool bold)
{
    cairo_select_font_face(c, FONT, CAIRO_FONT_SLANT_NORMAL,
                           bold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL);
    cairo_set_font_size(c, size);
}

double text_width(cairo_t *c, const char *text)
{
    cairo_text_extents_t e;
    cairo_text_extents(c, text, &e);
    return e.x_advance;
}

void draw_text(cairo_t *c, double x, double y, double align, const char *text)
{
    cairo_text_extents_t digits;
    cairo_text_extents(c, "0", &digits);
    cairo_move_to(c, x - align * text_width(c, text), y - digits.y_bearing / 2.0);
    cairo_show_text(c, text);
    cairo_new_path(c);
}
