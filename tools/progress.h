// Progress on stderr: in a terminal one live line with a bar, elsewhere a plain line now and then.
#ifndef DITMOE_PROGRESS_H
#define DITMOE_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct progress {
    bool terminal, shown;
    const char *unit; // "step"
    int64_t first, total, every;
    double start, last, pace_time; // when begun, last drawn, last moved
    double pace;                   // seconds a unit, smoothed; 0: not known yet
    int64_t done;
};

// Counts from `first` to `total`. `every` > 0: without a terminal, a line every so many units
// instead of every five seconds.
void progress_start(struct progress *p, const char *unit, int64_t first, int64_t total,
                    int64_t every);
// `done` units are done; `text` follows the bar.
void progress_update(struct progress *p, int64_t done, const char *text);
// Takes the live line away, before something else is printed; the next update draws it again.
void progress_clear(struct progress *p);

// "4:07", "2:10:33"
const char *format_seconds(double seconds, char out[32]);
// "512 B", "3.1 MiB", "12.0 GiB"
const char *format_bytes(double bytes, char out[32]);

#endif
