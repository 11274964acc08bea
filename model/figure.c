// Figures drawn with cairo; see figure.h.
#include "model/figure.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/canvas.h"

// ---- grid ---------------------------------------------------------------------------------------

// Everything in pixels of the figure.
struct grid_layout {
    int scale, cell_width, cell_height, gap, margin, label, title;
    double font;
};

static const struct image *first_image(const struct figure_grid *g)
{
    for (int i = 0; i < g->rows * g->columns; i++)
        if (g->images[i].pixels)
            return &g->images[i];
    return NULL;
}

static int check_grid(const struct figure_grid *g)
{
    const struct image *first = g->rows > 0 && g->columns > 0 ? first_image(g) : NULL;
    if (!first)
        return fail(ERR_INPUT, "a grid of %d x %d without an image", g->rows, g->columns);
    for (int i = 0; i < g->rows * g->columns; i++)
        if (g->images[i].pixels &&
            (g->images[i].width != first->width || g->images[i].height != first->height))
            return fail(ERR_INPUT, "the images of a grid are not all of one size");
    return 0;
}

// Small images are enlarged to about 96 pixels.
static int choose_scale(const struct image *image)
{
    int side = image->width > image->height ? image->width : image->height;
    return side >= 96 ? 1 : 96 / side;
}

static double widest_label(const struct figure_grid *g, double font)
{
    cairo_surface_t *surface = cairo_image_surface_create(CAIRO_FORMAT_RGB24, 8, 8);
    cairo_t *c = cairo_create(surface);
    double widest = 0;
    set_font(c, font, false);
    for (int r = 0; g->labels && r < g->rows; r++)
        widest = fmax(widest, text_width(c, g->labels[r]));
    cairo_destroy(c);
    cairo_surface_destroy(surface);
    return widest;
}

static struct grid_layout lay_out(const struct figure_grid *g)
{
    const struct image *image = first_image(g);
    struct grid_layout l = {.scale = g->scale > 0 ? g->scale : choose_scale(image)};
    l.cell_width = image->width * l.scale;
    l.cell_height = image->height * l.scale;
    l.gap = l.cell_height / 24 < 2 ? 2 : l.cell_height / 24;
    l.font = fmin(fmax(l.cell_height / 5.0, 10), 22);
    l.margin = (int)l.font;
    l.label = g->labels ? (int)ceil(widest_label(g, l.font) + l.font * 0.8) : 0;
    l.title = g->title ? (int)(l.font * 2.2) : 0;
    return l;
}

static void draw_cell(struct canvas *canvas, const struct image *image, int x0, int y0, int scale)
{
    cairo_surface_flush(canvas->surface);
    uint8_t *data = cairo_image_surface_get_data(canvas->surface);
    size_t stride = (size_t)cairo_image_surface_get_stride(canvas->surface);
    for (int y = 0; y < image->height * scale; y++) {
        for (int x = 0; x < image->width * scale; x++) {
            const uint8_t *p =
                image->pixels + ((size_t)(y / scale) * (size_t)image->width + (size_t)(x / scale)) *
                                    (size_t)image->channels;
            uint32_t r = p[0], gr = image->channels == 3 ? p[1] : r,
                     b = image->channels == 3 ? p[2] : r;
            uint32_t pixel = r << 16 | gr << 8 | b;
            memcpy(data + (size_t)(y0 + y) * stride + (size_t)(x0 + x) * 4, &pixel, 4);
        }
    }
    cairo_surface_mark_dirty(canvas->surface);
}

static void draw_grid(struct canvas *canvas, const struct figure_grid *g,
                      const struct grid_layout *l)
{
    cairo_t *c = canvas->cairo;
    int left = l->margin + l->label, top = l->margin + l->title;
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    if (g->title) {
        set_font(c, l->font * 1.1, true);
        draw_text(c, left, l->margin + l->font * 0.55, 0, g->title);
    }
    set_font(c, l->font, false);
    for (int r = 0; r < g->rows; r++) {
        int y = top + r * (l->cell_height + l->gap);
        if (g->labels)
            draw_text(c, left - l->font * 0.8, y + l->cell_height / 2.0, 1, g->labels[r]);
        for (int k = 0; k < g->columns; k++) {
            const struct image *image = &g->images[r * g->columns + k];
            if (image->pixels)
                draw_cell(canvas, image, left + k * (l->cell_width + l->gap), y, l->scale);
        }
    }
}

int figure_write_grid(const char *path, const struct figure_grid *grid,
                      const struct image_text *texts, int count)
{
    int code = check_grid(grid);
    if (code < 0)
        return fail_in(code, "%s", path);
    struct grid_layout l = lay_out(grid);
    int width = 2 * l.margin + l.label + grid->columns * (l.cell_width + l.gap) - l.gap;
    int height = 2 * l.margin + l.title + grid->rows * (l.cell_height + l.gap) - l.gap;
    struct canvas canvas;
    code = canvas_new(width, height, &canvas);
    if (code < 0)
        return fail_in(code, "%s", path);
    draw_grid(&canvas, grid, &l);
    code = canvas_write(path, &canvas, texts, count);
    canvas_free(&canvas);
    return code;
}

// ---- chart: scales ------------------------------------------------------------------------------

struct axis {
    double low, high, step; // values; step between ticks
    double from, to;        // pixels of low and high
};

static double to_pixel(const struct axis *a, double value)
{
    return a->from + (value - a->low) / (a->high - a->low) * (a->to - a->from);
}

// 1, 2, 2.5 or 5 times a power of ten: the smallest that gives at most `most` steps.
static double nice_step(double range, int most)
{
    static const double nice[] = {1, 2, 2.5, 5, 10};
    double power = pow(10, floor(log10(range / most)));
    for (int i = 0; i < 5; i++)
        if (nice[i] * power * most >= range * (1 - 1e-9))
            return nice[i] * power;
    return 10 * power;
}

static void set_axis(struct axis *a, double low, double high, int most, bool widen)
{
    if (!(high > low)) { // one point, or none
        double pad = fabs(low) > 0 ? fabs(low) / 2 : 1;
        low -= pad;
        high += pad;
    }
    a->step = nice_step(high - low, most);
    a->low = widen ? floor(low / a->step + 1e-9) * a->step : low;
    a->high = widen ? ceil(high / a->step - 1e-9) * a->step : high;
}

static void format_tick(char *text, size_t size, double value, double step)
{
    double magnitude = fmax(fabs(value), step);
    int digits = (int)fmax(0, ceil(-log10(step) - 1e-9));
    double tenths = step * pow(10, digits);
    if (fabs(tenths - round(tenths)) > 1e-6) // steps of 2.5
        digits++;
    if (fabs(value) < step * 1e-6)
        snprintf(text, size, "0");
    else if (magnitude >= 1e6 || step < 1e-5)
        snprintf(text, size, "%g", value);
    else
        snprintf(text, size, "%.*f", digits, value);
}

// ---- chart: curves ------------------------------------------------------------------------------

static const double colours[6][3] = {{0.12, 0.38, 0.65}, {0.80, 0.36, 0.10}, {0.16, 0.53, 0.31},
                                     {0.55, 0.27, 0.60}, {0.62, 0.16, 0.19}, {0.30, 0.30, 0.30}};

static const double *colour(int i)
{
    return colours[i % 6];
}

// A running mean of about `smooth` points around each. Near the ends, and at the start, where a
// loss falls fast, fewer: the line neither lags nor cuts the corner.
static double *smoothed(const struct figure_curve *curve)
{
    const int count = curve->count, widest = (int)(curve->smooth / 2);
    double *y = malloc((size_t)count * sizeof *y);
    for (int i = 0; y && i < count; i++) {
        int half = widest < i / 8 ? widest : i / 8, n = 0;
        half = half < count - 1 - i ? half : count - 1 - i;
        double sum = 0;
        for (int k = i - half; k <= i + half; k++)
            if (isfinite(curve->y[k])) {
                sum += curve->y[k];
                n++;
            }
        y[i] = isfinite(curve->y[i]) ? sum / n : curve->y[i];
    }
    return y;
}

static void draw_line(cairo_t *c, const struct figure_curve *curve, const double *y,
                      const struct axis axes[2])
{
    bool down = false;
    for (int i = 0; i < curve->count; i++) {
        if (!isfinite(curve->x[i]) || !isfinite(y[i])) {
            down = false;
            continue;
        }
        double px = to_pixel(&axes[0], curve->x[i]), py = to_pixel(&axes[1], y[i]);
        if (!down)
            cairo_move_to(c, px, py);
        cairo_line_to(c, px, py); // to itself at first: a lone point becomes a dot
        down = true;
    }
    cairo_stroke(c);
}

static int draw_curve(cairo_t *c, const struct figure_curve *curve, int number,
                      const struct axis axes[2])
{
    const double *k = colour(number);
    cairo_set_line_join(c, CAIRO_LINE_JOIN_ROUND);
    cairo_set_line_cap(c, CAIRO_LINE_CAP_ROUND);
    cairo_set_line_width(c, curve->smooth > 0 ? 1.0 : curve->count == 1 ? 8 : 2.5);
    cairo_set_source_rgba(c, k[0], k[1], k[2], curve->smooth > 0 ? 0.28 : 1.0);
    draw_line(c, curve, curve->y, axes);
    if (curve->smooth <= 0)
        return 0;
    double *y = smoothed(curve);
    if (!y)
        return fail(ERR_NOMEM, "out of memory for a curve of %d points", curve->count);
    cairo_set_line_width(c, curve->count == 1 ? 8 : 2.5);
    cairo_set_source_rgb(c, k[0], k[1], k[2]);
    draw_line(c, curve, y, axes);
    free(y);
    return 0;
}

// ---- chart: ranges ------------------------------------------------------------------------------

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The range of y leaves out the few highest of a smoothed curve's raw points, so that a first spike
// or a bad step does not flatten the rest; they are clipped. The smoothed line itself is always
// inside.
static int range_of(const struct figure_curve *curve, double x[2], double y[2])
{
    double *values = malloc(((size_t)curve->count + 1) * sizeof *values);
    double *smooth = curve->smooth > 0 ? smoothed(curve) : NULL;
    size_t n = 0;
    for (int i = 0; values && i < curve->count; i++) {
        if (!isfinite(curve->x[i]) || !isfinite(curve->y[i]))
            continue;
        x[0] = fmin(x[0], curve->x[i]);
        x[1] = fmax(x[1], curve->x[i]);
        y[1] = fmax(y[1], smooth ? smooth[i] : curve->y[i]);
        y[0] = fmin(y[0], smooth ? smooth[i] : curve->y[i]);
        values[n++] = curve->y[i];
    }
    if (values && n) {
        qsort(values, n, sizeof *values, by_value);
        y[0] = fmin(y[0], values[n / 200]);
        y[1] = fmax(y[1], values[smooth ? n - 1 - n / 100 : n - 1]);
    }
    free(smooth);
    free(values);
    return values ? 0 : fail(ERR_NOMEM, "out of memory for a curve of %d points", curve->count);
}

static int set_axes(const struct figure_chart *chart, struct axis axes[2])
{
    double x[2] = {INFINITY, -INFINITY}, y[2] = {INFINITY, -INFINITY};
    for (int i = 0; i < chart->curve_count; i++)
        TRY(range_of(&chart->curves[i], x, y));
    if (!isfinite(x[0]))
        return fail(ERR_INPUT, "a chart without a point to draw");
    if (x[0] > 0 && x[0] < 0.02 * x[1]) // zero is near: show it
        x[0] = 0;
    if (y[0] > 0 && y[0] < 0.35 * y[1])
        y[0] = 0;
    set_axis(&axes[0], x[0], x[1], 8, false);
    set_axis(&axes[1], y[0], y[1], 7, true);
    return 0;
}

// ---- chart: frame -------------------------------------------------------------------------------

enum { FONT_TICK = 15, FONT_LABEL = 17, FONT_TITLE = 22 };

static void draw_ticks_x(cairo_t *c, const struct axis axes[2])
{
    const struct axis *x = &axes[0];
    char text[32];
    for (double k = ceil(x->low / x->step - 1e-9); k * x->step <= x->high + 1e-9 * x->step; k++) {
        double at = to_pixel(x, k * x->step);
        cairo_set_source_rgb(c, 0.35, 0.35, 0.35);
        cairo_move_to(c, round(at) + 0.5, axes[1].from);
        cairo_rel_line_to(c, 0, 6);
        cairo_stroke(c);
        format_tick(text, sizeof text, k * x->step, x->step);
        draw_text(c, at, axes[1].from + 20, 0.5, text);
    }
}

static void draw_ticks_y(cairo_t *c, const struct axis axes[2])
{
    const struct axis *y = &axes[1];
    char text[32];
    for (double k = round(y->low / y->step); k * y->step <= y->high + 1e-9 * y->step; k++) {
        double at = round(to_pixel(y, k * y->step)) + 0.5;
        cairo_set_source_rgb(c, 0.90, 0.90, 0.90);
        cairo_move_to(c, axes[0].from, at);
        cairo_line_to(c, axes[0].to, at);
        cairo_stroke(c);
        cairo_set_source_rgb(c, 0.35, 0.35, 0.35);
        format_tick(text, sizeof text, k * y->step, y->step);
        draw_text(c, axes[0].from - 10, at, 1, text);
    }
}

static void draw_frame(cairo_t *c, const struct figure_chart *chart, const struct axis axes[2])
{
    cairo_set_line_width(c, 1);
    set_font(c, FONT_TICK, false);
    draw_ticks_y(c, axes);
    draw_ticks_x(c, axes);
    cairo_set_source_rgb(c, 0.35, 0.35, 0.35);
    cairo_move_to(c, axes[0].from, round(axes[1].from) + 0.5);
    cairo_line_to(c, axes[0].to, round(axes[1].from) + 0.5);
    cairo_stroke(c);
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    set_font(c, FONT_LABEL, false);
    if (chart->x_label)
        draw_text(c, (axes[0].from + axes[0].to) / 2, axes[1].from + 48, 0.5, chart->x_label);
    if (chart->y_label) {
        cairo_save(c);
        cairo_translate(c, 26, (axes[1].from + axes[1].to) / 2);
        cairo_rotate(c, -acos(-1.0) / 2);
        draw_text(c, 0, 0, 0.5, chart->y_label);
        cairo_restore(c);
    }
}

static void draw_titles(cairo_t *c, const struct figure_chart *chart, double left)
{
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    set_font(c, FONT_TITLE, true);
    if (chart->title)
        draw_text(c, left, 32, 0, chart->title);
    set_font(c, FONT_TICK, false);
    cairo_set_source_rgb(c, 0.40, 0.40, 0.40);
    if (chart->subtitle)
        draw_text(c, left, chart->title ? 60 : 32, 0, chart->subtitle);
}

// At the top right, one line a curve, over a white ground so that curves do not cross it.
static void draw_legend(cairo_t *c, const struct figure_chart *chart, const struct axis axes[2])
{
    enum { LINE = 26, SAMPLE = 30, PAD = 10 };
    double widest = 0;
    int lines = 0;
    set_font(c, FONT_TICK, false);
    for (int i = 0; i < chart->curve_count; i++) {
        if (chart->curves[i].name) {
            widest = fmax(widest, text_width(c, chart->curves[i].name));
            lines++;
        }
    }
    double width = widest + SAMPLE + 3 * PAD, left = axes[0].to - width, y = axes[1].to + PAD;
    if (!lines)
        return;
    cairo_set_source_rgba(c, 1, 1, 1, 0.85);
    cairo_rectangle(c, left, y, width, lines * LINE + PAD);
    cairo_fill(c);
    y += PAD / 2.0 + LINE / 2.0;
    for (int i = 0; i < chart->curve_count; i++) {
        if (!chart->curves[i].name)
            continue;
        cairo_set_source_rgb(c, colour(i)[0], colour(i)[1], colour(i)[2]);
        cairo_set_line_width(c, 3);
        cairo_move_to(c, left + PAD, y);
        cairo_rel_line_to(c, SAMPLE, 0);
        cairo_stroke(c);
        cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
        draw_text(c, left + 2 * PAD + SAMPLE, y, 0, chart->curves[i].name);
        y += LINE;
    }
}

static int draw_chart(struct canvas *canvas, const struct figure_chart *chart, struct axis axes[2])
{
    cairo_t *c = canvas->cairo;
    double head = (chart->title ? 26 : 0) + (chart->subtitle ? 28 : 0);
    char widest[2][32];
    set_font(c, FONT_TICK, false);
    format_tick(widest[0], sizeof widest[0], axes[1].high, axes[1].step);
    format_tick(widest[1], sizeof widest[1], axes[1].high - axes[1].step, axes[1].step);
    double ticks = fmax(text_width(c, widest[0]), text_width(c, widest[1]));
    axes[0].from = round((chart->y_label ? 46 : 16) + ticks + 14);
    axes[0].to = canvas->width - 36;
    axes[1].from = canvas->height - (chart->x_label ? 74 : 46);
    axes[1].to = 34 + head;
    draw_titles(c, chart, axes[0].from);
    draw_frame(c, chart, axes);
    cairo_save(c);
    cairo_rectangle(c, axes[0].from, axes[1].to - 2, axes[0].to - axes[0].from + 2,
                    axes[1].from - axes[1].to + 3);
    cairo_clip(c);
    int code = 0;
    for (int i = 0; i < chart->curve_count && code == 0; i++)
        code = draw_curve(c, &chart->curves[i], i, axes);
    cairo_restore(c);
    draw_legend(c, chart, axes);
    return code;
}

int figure_write_chart(const char *path, const struct figure_chart *chart,
                       const struct image_text *texts, int count)
{
    struct axis axes[2];
    struct canvas canvas;
    int code = set_axes(chart, axes);
    if (code == 0)
        code = canvas_new(chart->width > 0 ? chart->width : 1200,
                          chart->height > 0 ? chart->height : 700, &canvas);
    if (code < 0)
        return fail_in(code, "%s", path);
    code = draw_chart(&canvas, chart, axes);
    code = code < 0 ? fail_in(code, "%s", path) : canvas_write(path, &canvas, texts, count);
    canvas_free(&canvas);
    return code;
}
