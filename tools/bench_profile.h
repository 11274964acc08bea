// Profiles of steps, for people: where the time went as a table, and as a trace file.
#ifndef DITMOE_BENCH_PROFILE_H
#define DITMOE_BENCH_PROFILE_H

#include "runtime/profile.h"
#include "tools/measure.h"

struct bench_profile {
    const struct ceilings *ceilings;
    struct step_profile *list;
    int count;
};

// Keeps what p noted of `steps` steps of a kind.
int bench_profile_add(struct bench_profile *b, const struct profile *p, const char *model,
                      const char *what, int batch, int steps);
void bench_profile_free(struct bench_profile *b);

// A table for each step: operations of one name and size together, those that take longest first;
// calls and milliseconds are those of one step.
void bench_profile_print(const struct bench_profile *b, FILE *out);

// All operations as a file for chrome://tracing and Perfetto (the Trace Event Format, as JSON),
// each step a process of its own. ERR_IO when it cannot be written.
int bench_profile_trace(const struct bench_profile *b, const char *path);

#endif
