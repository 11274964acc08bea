#include "tools/progress.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "tools/command.h"
#include "tools/ranks.h"

static const double LINE_SECONDS = 5.0, DRAW_SECONDS = 0.1;

const char *format_seconds(double seconds, char out[32])
{
    long long s = seconds > 0 && seconds < 1e12 ? (long long)(seconds + 0.5) : 0;
    if (s >= 3600)
        snprintf(out, 32, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(out, 32, "%lld:%02lld", s / 60, s % 60);
    return out;
}

const char *format_bytes(double bytes, char out[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int u = 0;
    while (bytes >= 1024 && u < 4) {
        bytes /= 1024;
        u++;
    }
    snprintf(out, 32, u ? "%.1f %s" : "%.0f %s", bytes, units[u]);
    return out;
}

void progress_start(struct progress *p, const char *unit, int64_t first, int64_t total,
                    int64_t every)
{
    double now = now_seconds();
    const char *term_name = getenv("TERM");
    *p = (struct progress){.terminal =
                               isatty(STDERR_FILENO) && !(term_name && !strcmp(term_name, "dumb")),
                           .unit = unit,
                           .first = first,
                           .total = total,
                           .every = every,
                           .start = now,
                           .last = now - LINE_SECONDS,
                           .pace_time = now,
                           .done = first};
}

// The pace follows the last twenty units or so; the first, which compiles kernels, does not count
// once there is a second.
static void measure_pace(struct progress *p, int64_t done, double now)
{
    if (done <= p->done)
        return;
    double each = (now - p->pace_time) / (double)(done - p->done);
    int64_t seen = p->done - p->first;
    double weight = seen <= 1 ? 1 : seen < 20 ? 1 / (double)seen : 0.05;
    p->pace += weight * (each - p->pace);
    p->pace_time = now;
    p->done = done;
}

static int terminal_width(void)
{
    struct winsize w;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0 ? w.ws_col : 80;
}

static void draw_bar(const struct progress *p, const char *text, const char *left)
{
    char counts[64], line[1024];
    int width = terminal_width() - 1;
    snprintf(counts, sizeof counts, "%s %lld/%lld", p->unit, (long long)p->done,
             (long long)p->total);
    int rest = (int)(strlen(counts) + strlen(text) + strlen(left)) + 5;
    int bar = width - rest > 40 ? 40 : width - rest;
    int used = snprintf(line, sizeof line, "%s ", counts);
    if (bar >= 8) {
        int full = p->total > 0 ? (int)((double)bar * (double)p->done / (double)p->total) : bar;
        line[used++] = '[';
        for (int i = 0; i < bar; i++)
            line[used++] = i < full ? '=' : i == full ? '>' : ' ';
        line[used++] = ']';
        line[used++] = ' ';
    }
    snprintf(line + used, sizeof line - (size_t)used, " %s%s", text, left);
    fprintf(stderr, "\r%.*s\033[K", width, line);
    fflush(stderr);
}

void progress_update(struct progress *p, int64_t done, const char *text)
{
    double now = now_seconds();
    char left[48] = "", eta[32];
    measure_pace(p, done, now);
    bool last = done >= p->total;
    bool due = p->terminal    ? now - p->last >= DRAW_SECONDS
               : p->every > 0 ? done % p->every == 0
                              : now - p->last >= LINE_SECONDS;
    if ((!due && !last) || !ranks_first())
        return;
    p->last = now;
    if (p->pace > 0)
        snprintf(left, sizeof left, "  ETA %s",
                 format_seconds(p->pace * (double)(p->total - done), eta));
    if (p->terminal) {
        draw_bar(p, text, left);
        p->shown = true;
    } else {
        fprintf(stderr, "%s %lld/%lld  %s%s\n", p->unit, (long long)done, (long long)p->total, text,
                left);
    }
}

void progress_clear(struct progress *p)
{
    if (p->shown)
        fprintf(stderr, "\r\033[K");
    p->shown = false;
}
