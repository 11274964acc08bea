#include "model/schedule.h"

#include <math.h>

int schedule_passes(enum sampler_kind kind)
{
    return kind == SAMPLER_HEUN ? 2 : 1;
}

bool schedule_keeps(enum sampler_kind kind)
{
    return kind != SAMPLER_EULER;
}

static double time_of(int steps, int step)
{
    return (double)(steps - step) / (double)steps;
}

// The slope at the start is kept; the second pass, dt further on, replaces half of it by its own.
static struct pass heun_pass(int steps, int index)
{
    const double dt = 1.0 / steps;
    if (index % 2 == 0)
        return (struct pass){.t = time_of(steps, index / 2), .z = 1, .v = -dt, .keep_v = 1};
    return (struct pass){.t = time_of(steps, index / 2 + 1), .z = 1, .v = -dt / 2, .kept = dt / 2};
}

static double log_ratio(double t)
{
    return log((1 - t) / t);
}

// How far x0 is extrapolated: 1 / (2 r), r = the length in lambda of the step before over this
// one's. The ends of the interval lie at infinite lambda. Step 0 has no step before; that of step 1
// is infinitely long, so r is too; the last step, infinitely long itself, ends at x0, of first order
// as everywhere in use: an extrapolation over it has no limit.
static double extrapolation(int steps, int step)
{
    if (step < 2 || step == steps - 1)
        return 0;
    const double now = log_ratio(time_of(steps, step));
    const double before = now - log_ratio(time_of(steps, step - 1));
    return (log_ratio(time_of(steps, step + 1)) - now) / (2 * before);
}

// z' = s/t z + (1 - s/t) D from t to s, D = x0 + e (x0 - the x0 before); alpha (1 - exp(-h)) of the
// published form is 1 - s/t here, without its differences of infinities. x0 = z - t v is kept.
static struct pass dpm_pass(int steps, int step)
{
    const double t = time_of(steps, step), ratio = time_of(steps, step + 1) / t;
    const double e = extrapolation(steps, step), of_x0 = (1 - ratio) * (1 + e);
    return (struct pass){.t = t,
                         .z = ratio + of_x0,
                         .v = -t * of_x0,
                         .kept = -(1 - ratio) * e,
                         .keep_z = 1,
                         .keep_v = -t};
}

struct pass schedule_pass(enum sampler_kind kind, int steps, int index)
{
    switch (kind) {
    case SAMPLER_HEUN:
        return heun_pass(steps, index);
    case SAMPLER_DPM:
        return dpm_pass(steps, index);
    case SAMPLER_EULER:
        break;
    }
    return (struct pass){.t = time_of(steps, index), .z = 1, .v = -1.0 / steps};
}
