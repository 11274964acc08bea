// Figures of plans: what each rank does with its time and memory and where the experts are; and how
// throughput grows with the number of machines. See plan.h.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/canvas.h"
#include "tools/plan.h"

static const double INK[3] = {0.13, 0.13, 0.13}, GREY[3] = {0.40, 0.40, 0.40},
                    LINE[3] = {0.88, 0.88, 0.88};

static void ink(cairo_t *c, const double colour[3])
{
    cairo_set_source_rgb(c, colour[0], colour[1], colour[2]);
}

static void fill(cairo_t *c, double x, double y, double width, double height)
{
    cairo_rectangle(c, x, y, width, height);
    cairo_fill(c);
}

// ---- one plan: time -----------------------------------------------------------------------------

enum { ROW = 26, BAR = 18, LABEL = 250, TIME_WIDTH = 620, GAP = 60, MEMORY_WIDTH = 260, TOP = 128 };
enum { PARTS = 7, RANKS_SHOWN = 32 };

static const char *const part_names[PARTS] = {
    "dense", "experts", "exchange", "streaming", "sums of gradients", "optimiser", "waiting"};
static const double part_colours[PARTS][3] = {
    {0.20, 0.44, 0.69}, {0.32, 0.62, 0.42}, {0.85, 0.42, 0.15}, {0.76, 0.26, 0.29},
    {0.90, 0.67, 0.20}, {0.55, 0.42, 0.67}, {0.90, 0.90, 0.90}};

static void parts_of(const struct rank_forecast *f, double out[PARTS])
{
    const double parts[PARTS] = {f->dense,  f->expert, f->exchange, f->stream,
                                 f->reduce, f->update, f->wait};
    memcpy(out, parts, sizeof parts);
}

static void draw_legend(cairo_t *c, double x, double y, bool train)
{
    set_font(c, 13, false);
    for (int i = 0; i < PARTS; i++) {
        if (!train && (i == 4 || i == 5))
            continue;
        ink(c, part_colours[i]);
        fill(c, x, y - 7, 14, 14);
        ink(c, INK);
        draw_text(c, x + 20, y, 0, part_names[i]);
        x += 44 + text_width(c, part_names[i]);
    }
}

static void draw_rank(cairo_t *c, const struct plan_result *r, int i, double most)
{
    const struct rank_forecast *f = &r->forecast.rank[i];
    const double y = TOP + ROW * i, limit = (double)r->cluster.rank[i].memory;
    double parts[PARTS], x = LABEL;
    char text[256];
    ink(c, INK);
    set_font(c, 13, false);
    snprintf(text, sizeof text, "%d  %.28s", i, r->cluster.rank[i].name);
    draw_text(c, 14, y + BAR / 2.0, 0, text);
    parts_of(f, parts);
    for (int k = 0; k < PARTS; k++) {
        const double width = TIME_WIDTH * fmax(0, parts[k]) / r->forecast.step;
        ink(c, part_colours[k]);
        fill(c, x, y, width, BAR);
        x += width;
    }
    x = LABEL + TIME_WIDTH + GAP;
    ink(c, LINE);
    fill(c, x, y, MEMORY_WIDTH * limit / most, BAR);
    const bool over = f->memory > limit;
    cairo_set_source_rgb(c, over ? 0.76 : 0.45, over ? 0.26 : 0.58, over ? 0.29 : 0.70);
    fill(c, x, y, MEMORY_WIDTH * f->memory / most, BAR);
    ink(c, INK);
    set_font(c, 12, false);
    snprintf(text, sizeof text, "%.1f of %.1f", f->memory / (1 << 30), limit / (1 << 30));
    draw_text(c, x + 6, y + BAR / 2.0, 0, text);
}

static void draw_time_axis(cairo_t *c, const struct plan_result *r, double bottom)
{
    char text[32];
    set_font(c, 12, false);
    for (int i = 0; i <= 4; i++) {
        const double x = LABEL + TIME_WIDTH * i / 4.0, ms = 1e3 * r->forecast.step * i / 4;
        ink(c, GREY);
        cairo_set_line_width(c, 1);
        cairo_move_to(c, round(x) + 0.5, bottom);
        cairo_rel_line_to(c, 0, 5);
        cairo_stroke(c);
        snprintf(text, sizeof text, "%.*f%s",
                 ms < 10    ? 2
                 : ms < 100 ? 1
                            : 0,
                 ms, i == 4 ? " ms" : "");
        draw_text(c, x, bottom + 16, 0.5, text);
    }
}

// ---- one plan: experts --------------------------------------------------------------------------

enum { CELL = 15, ROW_CELL = 13 };

// Colours of ranks go round the circle of hues, neighbours far apart.
static void rank_colour(cairo_t *c, int rank, int ranks)
{
    const double hue = 6 * fmod(rank * 0.618034, 1), light = ranks > 8 && rank % 2 ? 0.62 : 0.78;
    const double x = 1 - fabs(fmod(hue, 2) - 1);
    const double rgb[6][3] = {{1, x, 0}, {x, 1, 0}, {0, 1, x}, {0, x, 1}, {x, 0, 1}, {1, 0, x}};
    const double *k = rgb[(int)hue % 6];
    cairo_set_source_rgb(c, light * (0.45 + 0.55 * k[0]), light * (0.45 + 0.55 * k[1]),
                         light * (0.45 + 0.55 * k[2]));
}

static void draw_expert(cairo_t *c, const struct plan_result *r, double x, double y, int l, int e)
{
    const int owner = *placement_owner(&r->one, 0, l, e);
    char text[16];
    if (owner == NO_OWNER) {
        ink(c, LINE);
        fill(c, x, y, 2 * CELL - 2, ROW_CELL - 2);
        return;
    }
    rank_colour(c, owner, r->cluster.ranks);
    fill(c, x, y, 2 * CELL - 2, ROW_CELL - 2);
    ink(c, INK);
    snprintf(text, sizeof text, "%d%s", owner,
             (const char *[]){"", "s", "h"}[*placement_home(&r->one, 0, l, e)]);
    draw_text(c, x + CELL - 1, y + ROW_CELL / 2.0 - 1, 0.5, text);
}

static void draw_experts(cairo_t *c, const struct plan_result *r, double top)
{
    char text[96];
    ink(c, INK);
    set_font(c, 14, true);
    draw_text(c, 14, top, 0,
              "Where the experts are: rank (s: streamed from host memory, h: at the host)");
    for (int l = 0; l < r->one.layers; l++) {
        const double y = top + 40 + ROW_CELL * l;
        set_font(c, 10, false);
        ink(c, GREY);
        snprintf(text, sizeof text, "layer %d", l);
        if (l % 4 == 0)
            draw_text(c, 70, y + ROW_CELL / 2.0 - 1, 1, text);
        for (int e = 0; e < r->one.experts; e++) {
            const double x = 84 + 2 * CELL * e;
            if (l == 0) {
                ink(c, GREY);
                snprintf(text, sizeof text, "%d", e);
                draw_text(c, x + CELL, top + 28, 0.5, text);
            }
            draw_expert(c, r, x, y, l, e);
        }
    }
}

static void draw_plan(struct canvas *canvas, const struct plan_settings *o,
                      const struct plan_result *r)
{
    cairo_t *c = canvas->cairo;
    const int shown = r->cluster.ranks < RANKS_SHOWN ? r->cluster.ranks : RANKS_SHOWN;
    const double bottom = TOP + ROW * shown;
    double most = 1;
    char text[256];
    for (int i = 0; i < r->cluster.ranks; i++)
        most = fmax(most, fmax((double)r->cluster.rank[i].memory, r->forecast.rank[i].memory));
    ink(c, INK);
    set_font(c, 20, true);
    snprintf(text, sizeof text, "%s, %s, %d images, %d ranks", r->title,
             o->what ? "a pass" : "a step", r->batch, r->cluster.ranks * r->cluster.copies);
    draw_text(c, 14, 26, 0, text);
    set_font(c, 14, false);
    ink(c, GREY);
    snprintf(text, sizeof text,
             "%.1f ms by the policy %s, %.1f images/s; groups of %d ranks: %d; one is shown",
             1e3 * r->forecast.step, o->placement ? "manual" : policy_names[o->policy],
             o->what ? r->forecast.images_per_second / o->steps : r->forecast.images_per_second,
             r->cluster.ranks, r->cluster.copies);
    draw_text(c, 14, 52, 0, text);
    draw_legend(c, LABEL, 84, !o->what);
    set_font(c, 13, true);
    ink(c, INK);
    draw_text(c, LABEL + TIME_WIDTH + GAP, TOP - 16, 0, "memory, GiB");
    draw_text(c, LABEL, TOP - 16, 0, "time");
    for (int i = 0; i < shown; i++)
        draw_rank(c, r, i, most);
    draw_time_axis(c, r, bottom);
    draw_experts(c, r, bottom + 56);
}

int plan_draw(const char *path, const struct plan_settings *o, const struct plan_result *r)
{
    struct canvas canvas;
    const int shown = r->cluster.ranks < RANKS_SHOWN ? r->cluster.ranks : RANKS_SHOWN;
    const int width = LABEL + TIME_WIDTH + GAP + MEMORY_WIDTH + 30,
              map = 100 + 2 * CELL * r->one.experts;
    int code = canvas_new(width > map ? width : map,
                          TOP + ROW * shown + 56 + 60 + ROW_CELL * r->one.layers, &canvas);
    if (code < 0)
        return fail_in(code, "%s", path);
    draw_plan(&canvas, o, r);
    code = canvas_write(path, &canvas, NULL, 0);
    canvas_free(&canvas);
    return code;
}

// ---- many machines ------------------------------------------------------------------------------

// A panel: x is the logarithm of machines; y is linear from `low` to `high`, or logarithmic.
struct panel {
    double left, right, top, bottom;
    double x0, x1, low, high;
    bool log;
};

static double at_x(const struct panel *p, double nodes)
{
    const double span = log2(p->x1) - log2(p->x0);
    return p->left + (span > 0 ? (log2(nodes) - log2(p->x0)) / span : 0.5) * (p->right - p->left);
}

static double at_y(const struct panel *p, double value)
{
    const double k = p->log ? log(value / p->low) / log(p->high / p->low)
                            : (value - p->low) / (p->high - p->low);
    return p->bottom + k * (p->top - p->bottom);
}

static void draw_panel(cairo_t *c, const struct panel *p, const char *title, const double *ticks,
                       int count, const char *format, const struct plan_point *list, int points)
{
    char text[32];
    cairo_set_line_width(c, 1);
    set_font(c, 13, false);
    for (int i = 0; i < count; i++) {
        const double y = round(at_y(p, ticks[i])) + 0.5;
        ink(c, LINE);
        cairo_move_to(c, p->left, y);
        cairo_line_to(c, p->right, y);
        cairo_stroke(c);
        ink(c, GREY);
        if (ticks[i] >= 1e6)
            snprintf(text, sizeof text, "%g million", ticks[i] / 1e6);
        else
            snprintf(text, sizeof text, format, ticks[i]);
        draw_text(c, p->left - 8, y, 1, text);
    }
    for (int i = 0; i < points; i++) {
        ink(c, GREY);
        snprintf(text, sizeof text, "%d", list[i].nodes);
        draw_text(c, at_x(p, list[i].nodes), p->bottom + 16, 0.5, text);
    }
    draw_text(c, (p->left + p->right) / 2, p->bottom + 40, 0.5, "machines");
    ink(c, INK);
    set_font(c, 14, true);
    draw_text(c, p->left, p->top - 18, 0, title);
}

// `name` (may be empty) is written at the height of `at`, where no curve is.
static void draw_series(cairo_t *c, const struct panel *p, const struct plan_point *list, int count,
                        const double *values, const double colour[3], const char *name, double at)
{
    ink(c, colour);
    cairo_set_line_width(c, 2.5);
    for (int i = 0; i < count; i++)
        cairo_line_to(c, at_x(p, list[i].nodes), at_y(p, values[i]));
    cairo_stroke(c);
    for (int i = 0; i < count; i++) {
        cairo_arc(c, at_x(p, list[i].nodes), at_y(p, values[i]), 3.5, 0, 2 * M_PI);
        cairo_fill(c);
    }
    if (!name[0])
        return;
    fill(c, p->left + 20, at_y(p, at) - 1.5, 26, 3);
    set_font(c, 13, false);
    draw_text(c, p->left + 54, at_y(p, at), 0, name);
}

static void draw_growth(cairo_t *c, const struct plan_settings *o, const struct plan_point *list,
                        int count, struct panel p)
{
    double values[64] = {0}, ideal[64] = {0}, ticks[16], power;
    int n = 0;
    const double divide = o->what ? o->steps : 1;
    for (int i = 0; i < count; i++) {
        values[i] = list[i].images_per_second / divide;
        ideal[i] = values[0] * list[i].ranks / list[0].ranks;
    }
    p.log = true;
    p.low = pow(10, floor(log10(values[0])));
    p.high = pow(10, ceil(log10(ideal[count - 1] * 1.001)));
    for (power = p.low; power <= p.high * 1.001 && n < 16; power *= 10)
        ticks[n++] = power;
    draw_panel(c, &p, "images a second", ticks, n, "%g", list, count);
    draw_series(c, &p, list, count, ideal, (const double[]){0.72, 0.72, 0.72}, "", 0);
    draw_series(c, &p, list, count, values, part_colours[0], "", 0);
    set_font(c, 13, false);
    ink(c, GREY);
    draw_text(c, p.right - 4, p.bottom - 20, 1, "grey: in proportion to the machines");
}

static void draw_shares(cairo_t *c, const struct plan_point *list, int count, struct panel p)
{
    static const double ticks[] = {0, 20, 40, 60, 80, 100};
    double efficiency[64] = {0}, exchange[64] = {0}, reduce[64] = {0};
    const double one = list[0].images_per_second / list[0].ranks;
    for (int i = 0; i < count; i++) {
        efficiency[i] = 100 * list[i].images_per_second / list[i].ranks / one;
        exchange[i] = 100 * list[i].exchange;
        reduce[i] = 100 * list[i].reduce;
    }
    p.low = 0;
    p.high = 105;
    draw_panel(c, &p, "per cent", ticks, 6, "%g%%", list, count);
    draw_series(c, &p, list, count, efficiency, part_colours[1], "efficiency", 62);
    draw_series(c, &p, list, count, exchange, part_colours[2], "exchange of rows, share of a step",
                54);
    draw_series(c, &p, list, count, reduce, part_colours[4], "sums of gradients, share of a step",
                46);
}

int points_draw(const char *path, const struct plan_settings *o, const struct machines *m,
                const struct plan_point *list, int count)
{
    struct canvas canvas;
    struct config config;
    char text[256], title[160];
    struct panel p = {.top = 130, .bottom = 470, .x0 = list[0].nodes, .x1 = list[count - 1].nodes};
    TRY(model_config(o->model, &o->overrides, &config));
    TRY(canvas_new(1300, 540, &canvas));
    cairo_t *c = canvas.cairo;
    ink(c, INK);
    set_font(c, 20, true);
    snprintf(text, sizeof text, "%s, %s, %d images for each %s",
             model_title(o->model, &config, title), o->what ? "sampling" : "training",
             o->batch / (list[0].nodes / m->count), m->count > 1 ? "set of machines" : "machine");
    draw_text(c, 20, 28, 0, text);
    set_font(c, 14, false);
    ink(c, GREY);
    snprintf(text, sizeof text,
             "forecast, policy %s; each machine: %.60s, %d ranks; network %.1f GB/s",
             policy_names[o->policy], m->list[0]->objects[0].name, list[0].ranks / list[0].nodes,
             m->network / 1e9);
    draw_text(c, 20, 54, 0, text);
    p.left = 100, p.right = 620;
    draw_growth(c, o, list, count, p);
    p.left = 750, p.right = 1270;
    draw_shares(c, list, count, p);
    int code = canvas_write(path, &canvas, NULL, 0);
    canvas_free(&canvas);
    return code;
}
