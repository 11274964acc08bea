// The figure of a machine: boxes in boxes, as its parts hang together, and the NVLink matrix below.
#include "tools/topology_show.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/canvas.h"

enum { PAD = 12, GAP = 10, TITLE = 26, LEAF_WIDTH = 216, LEAF_HEIGHT = 62, CELL = 34, HEAD = 64 };

struct box {
    double x, y, width, height; // relative to the parent's corner; later to the figure's
};

struct drawing {
    const struct topology *t;
    struct box *boxes; // [count]
};

// ---- layout -------------------------------------------------------------------------------------

static bool is_leaf(const struct topology_object *o)
{
    return o->kind == TOPOLOGY_NUMA || o->kind == TOPOLOGY_ACCELERATOR ||
           o->kind == TOPOLOGY_NETWORK || o->kind == TOPOLOGY_SWITCH;
}

// A row of the children is at most this wide: machines are wide, roots and switches narrow.
static double most_wide(const struct topology_object *o)
{
    return o->kind == TOPOLOGY_MACHINE ? 1800 : o->kind == TOPOLOGY_PACKAGE ? 960 : 430;
}

// Children flow in rows, left to right. They come after their parent in the list, so sizes are
// found from the end of the list, places from its start.
static void size_box(struct drawing *d, int i)
{
    const struct topology_object *o = &d->t->objects[i];
    double x = PAD, y = TITLE + PAD, row = 0, widest = 220;
    if (is_leaf(o)) {
        d->boxes[i].width = LEAF_WIDTH;
        d->boxes[i].height =
            o->kind == TOPOLOGY_SWITCH || o->kind == TOPOLOGY_NUMA ? 44 : LEAF_HEIGHT;
        return;
    }
    for (int c = i + 1; c < d->t->count; c++) {
        struct box *b = &d->boxes[c];
        if (d->t->objects[c].parent != i)
            continue;
        if (x > PAD && x + b->width > most_wide(o)) {
            x = PAD;
            y += row + GAP;
            row = 0;
        }
        b->x = x;
        b->y = y;
        x += b->width + GAP;
        widest = fmax(widest, x - GAP + PAD);
        row = fmax(row, b->height);
    }
    d->boxes[i].width = widest;
    d->boxes[i].height = y + row + PAD;
}

static void lay_out(struct drawing *d)
{
    for (int i = d->t->count - 1; i >= 0; i--)
        size_box(d, i);
    d->boxes[0].x = PAD;
    d->boxes[0].y = HEAD;
    for (int i = 1; i < d->t->count; i++) {
        d->boxes[i].x += d->boxes[d->t->objects[i].parent].x;
        d->boxes[i].y += d->boxes[d->t->objects[i].parent].y;
    }
}

// ---- boxes --------------------------------------------------------------------------------------

static void set_colour(cairo_t *c, const struct topology_object *o)
{
    static const double colours[][3] = {
        [TOPOLOGY_MACHINE] = {0.985, 0.985, 0.985},  [TOPOLOGY_PACKAGE] = {0.93, 0.95, 0.97},
        [TOPOLOGY_NUMA] = {0.80, 0.87, 0.95},        [TOPOLOGY_BRIDGE] = {1, 1, 1},
        [TOPOLOGY_ACCELERATOR] = {0.78, 0.90, 0.74}, [TOPOLOGY_NETWORK] = {0.99, 0.90, 0.72},
        [TOPOLOGY_SWITCH] = {0.88, 0.84, 0.94}};
    if (o->kind == TOPOLOGY_ACCELERATOR && o->accelerator == DEVICE_CPU)
        cairo_set_source_rgb(c, 0.86, 0.86, 0.90);
    else
        cairo_set_source_rgb(c, colours[o->kind][0], colours[o->kind][1], colours[o->kind][2]);
}

// Text that ends within `room` pixels, cut with an ellipsis where it would not.
static void draw_fitted(cairo_t *c, double x, double y, double room, const char *text)
{
    char cut[192];
    snprintf(cut, sizeof cut, "%.191s", text);
    for (size_t n = strlen(cut); n > 3 && text_width(c, cut) > room; n--)
        snprintf(cut + n - 3, 4, "...");
    draw_text(c, x, y, 0, cut);
}

static void leaf_lines(const struct topology_object *o, char lines[3][160])
{
    char a[32], b[32];
    lines[1][0] = lines[2][0] = 0;
    if (o->kind == TOPOLOGY_NUMA) {
        snprintf(lines[0], 160, "NUMA node %d", o->number);
        snprintf(lines[1], 160, "%s", format_memory(o->memory, a));
        return;
    }
    snprintf(lines[0], 160, "%s%s%s", o->key, o->key[0] ? "  " : "",
             o->name[0] ? o->name : object_title(o));
    if (o->kind == TOPOLOGY_SWITCH)
        snprintf(lines[0], 160, "NVSwitch");
    if (o->cores)
        snprintf(lines[1], 160, "%d cores, %s", o->cores, format_memory(o->memory, a));
    else
        snprintf(lines[1], 160, "%s%s%s", o->pci, o->memory ? ", " : "",
                 o->memory ? format_memory(o->memory, a) : "");
    if (o->link > 0 && o->kind != TOPOLOGY_SWITCH)
        snprintf(lines[2], 160, "PCIe %s%s%s", format_link(o->link, a),
                 o->slowest < o->link ? ", path " : "",
                 o->slowest < o->link ? format_link(o->slowest, b) : "");
    else if (o->kind == TOPOLOGY_ACCELERATOR && o->accelerator == DEVICE_CPU)
        snprintf(lines[2], 160, "shares the host's memory");
}

static void draw_box(cairo_t *c, const struct topology_object *o, const struct box *b)
{
    char lines[3][160], link[32];
    cairo_rectangle(c, round(b->x) + 0.5, round(b->y) + 0.5, round(b->width), round(b->height));
    set_colour(c, o);
    cairo_fill_preserve(c);
    cairo_set_source_rgb(c, 0.55, 0.58, 0.62);
    cairo_set_line_width(c, 1);
    cairo_stroke(c);
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    if (!is_leaf(o)) {
        set_font(c, 14, o->kind != TOPOLOGY_BRIDGE);
        if (o->kind == TOPOLOGY_MACHINE)
            snprintf(lines[0], 160, "Machine");
        else if (o->kind == TOPOLOGY_PACKAGE)
            snprintf(lines[0], 160, "Package %d  %.90s, %d cores", o->number, o->name, o->cores);
        else
            snprintf(lines[0], 160, "%s%s%s", o->name, o->link > 0 ? ", " : "",
                     o->link > 0 ? format_link(o->link, link) : "");
        draw_fitted(c, b->x + PAD, b->y + PAD / 2.0 + 12, b->width - 2 * PAD, lines[0]);
        return;
    }
    leaf_lines(o, lines);
    for (int i = 0; i < 3 && lines[i][0]; i++) {
        set_font(c, i ? 12 : 13, i == 0);
        draw_fitted(c, b->x + 8, b->y + 14 + 17 * i, b->width - 16, lines[i]);
    }
}

// ---- NVLink -------------------------------------------------------------------------------------

static int gpu_count(const struct topology *t)
{
    int count = 0;
    for (int a = 0; a < t->accelerators; a++)
        count += t->objects[t->accelerator[a]].accelerator != DEVICE_CPU;
    return count;
}

static double fastest(const struct topology *t)
{
    double most = 0;
    for (int i = 0; i < t->accelerators * t->accelerators; i++)
        most = fmax(most, t->nvlink[i]);
    return most;
}

// Of the pairs of GPUs.
static double slowest(const struct topology *t)
{
    double least = INFINITY;
    for (int a = 0; a < gpu_count(t); a++)
        for (int b = 0; b < gpu_count(t); b++)
            if (a != b)
                least = fmin(least, t->nvlink[a * t->accelerators + b]);
    return least;
}

static void draw_nvlink(cairo_t *c, const struct topology *t, double x, double y)
{
    const int n = gpu_count(t);
    const double most = fastest(t);
    char text[96];
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    set_font(c, 14, true);
    if (slowest(t) == most) {
        snprintf(text, sizeof text, "NVLink: %.0f GB/s one way between any two of %d GPUs",
                 most / 1e9, n);
        draw_text(c, x, y, 0, text);
        return;
    }
    draw_text(c, x, y, 0, "NVLink between GPUs in this order, GB/s one way");
    set_font(c, 12, false);
    for (int a = 0; a < n; a++) {
        snprintf(text, sizeof text, "%d", a);
        cairo_set_source_rgb(c, 0.35, 0.35, 0.35);
        draw_text(c, x + 14, y + 40 + CELL * a + CELL / 2.0, 1, text);
        draw_text(c, x + 22 + CELL * a + CELL / 2.0, y + 26, 0.5, text);
        for (int b = 0; b < n; b++) {
            const double rate = t->nvlink[a * t->accelerators + b], k = 0.75 * rate / most;
            const double left = x + 22 + CELL * b, top = y + 38 + CELL * a;
            cairo_rectangle(c, left, top, CELL - 1, CELL - 1);
            if (a == b)
                cairo_set_source_rgb(c, 0.92, 0.92, 0.92);
            else
                cairo_set_source_rgb(c, 1 - k, 1 - 0.45 * k, 1 - k);
            cairo_fill(c);
            cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
            snprintf(text, sizeof text, "%.0f", rate / 1e9);
            if (a != b)
                draw_text(c, left + CELL / 2.0, top + CELL / 2.0, 0.5, text);
        }
    }
}

static void draw_all(struct canvas *canvas, const struct drawing *d)
{
    char title[512], memory[32];
    cairo_t *c = canvas->cairo;
    cairo_set_source_rgb(c, 0.13, 0.13, 0.13);
    set_font(c, 20, true);
    snprintf(title, sizeof title, "%s",
             d->t->objects[0].name[0] ? d->t->objects[0].name : d->t->source);
    draw_text(c, PAD, 22, 0, title);
    set_font(c, 14, false);
    snprintf(title, sizeof title, "%d cores, %s, %d accelerators (%s)", topology_cores(d->t),
             format_memory(topology_memory(d->t), memory), gpu_count(d->t), d->t->source);
    cairo_set_source_rgb(c, 0.4, 0.4, 0.4);
    draw_text(c, PAD, 46, 0, title);
    for (int i = 0; i < d->t->count; i++)
        draw_box(c, &d->t->objects[i], &d->boxes[i]);
    if (fastest(d->t) > 0)
        draw_nvlink(c, d->t, PAD, d->boxes[0].y + d->boxes[0].height + 26);
}

int topology_draw(const char *path, const struct topology *t)
{
    struct drawing d = {.t = t, .boxes = calloc((size_t)t->count, sizeof *d.boxes)};
    struct canvas canvas;
    if (!d.boxes)
        return fail(ERR_NOMEM, "no host memory for a figure");
    lay_out(&d);
    const int side = 60 + CELL * gpu_count(t);
    const int below = fastest(t) == 0 ? 0 : slowest(t) == fastest(t) ? 40 : side;
    const double width = fmax(d.boxes[0].width + 2 * PAD, below == side ? side : 0);
    int code =
        canvas_new((int)fmax(width, 520), (int)d.boxes[0].height + HEAD + PAD + below, &canvas);
    if (code >= 0) {
        draw_all(&canvas, &d);
        code = canvas_write(path, &canvas, NULL, 0);
        canvas_free(&canvas);
    }
    free(d.boxes);
    return code < 0 ? fail_in(code, "%s", path) : 0;
}
