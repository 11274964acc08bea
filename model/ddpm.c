#include "model/ddpm.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/ops.h"

void ddpm_alpha_bars(double out[DDPM_STEPS])
{
    const double first = 1e-4, last = 2e-2;
    double product = 1;
    for (int t = 0; t < DDPM_STEPS; t++) {
        product *= 1 - (first + t * ((last - first) / (DDPM_STEPS - 1)));
        out[t] = product;
    }
}

// ---- respacing ----------------------------------------------------------------------------------

static int whole_strides(const char *text, int used[DDPM_STEPS])
{
    char *end;
    const long count = strtol(text + 4, &end, 10);
    if (end == text + 4 || *end)
        return fail(ERR_INPUT, "respacing '%s': 'ddim' wants a number of steps after it", text);
    for (int stride = 1; stride < DDPM_STEPS; stride++) {
        if ((DDPM_STEPS + stride - 1) / stride != count)
            continue;
        for (int i = 0; i < count; i++)
            used[i] = i * stride;
        return (int)count;
    }
    return fail(ERR_INPUT, "respacing '%s': no whole stride makes %ld of %d steps", text, count,
                DDPM_STEPS);
}

// `count` steps of the `size` from `start` on, both ends among them: positions add up in double and
// are rounded half to even, as in the original.
static int section(int start, int size, int count, int *used)
{
    const double stride = count > 1 ? (double)(size - 1) / (double)(count - 1) : 1;
    double at = 0;
    for (int i = 0; i < count; i++, at += stride)
        used[i] = start + (int)nearbyint(at);
    return count;
}

// Reads comma-separated numbers; returns how many, at most DDPM_STEPS.
static int section_counts(const char *text, int counts[DDPM_STEPS])
{
    int sections = 0;
    for (const char *at = text;; at++) {
        char *end;
        const long n = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || n < 0 || n > DDPM_STEPS || sections == DDPM_STEPS)
            return fail(
                ERR_INPUT,
                "respacing '%s': neither numbers of steps (up to %d), such as 250 or 10,20, "
                "nor ddimN",
                text, DDPM_STEPS);
        counts[sections++] = (int)n;
        at = end;
        if (!*end)
            return sections;
    }
}

int ddpm_respace(const char *text, int used[DDPM_STEPS])
{
    int counts[DDPM_STEPS], total = 0, start = 0;
    if (!strncmp(text, "ddim", 4))
        return whole_strides(text, used);
    const int sections = section_counts(text, counts);
    TRY(sections);
    for (int i = 0; i < sections; i++) {
        const int size = DDPM_STEPS / sections + (i < DDPM_STEPS % sections);
        if (counts[i] > size)
            return fail(ERR_INPUT, "respacing '%s': section %d has only %d steps", text, i + 1,
                        size);
        total += section(start, size, counts[i], used + total);
        start += size;
    }
    if (total == 1 && sections == 1)
        used[0] = DDPM_STEPS - 1; // the original says 0 here, where there is nothing left to do
    return total > 0 ? total : fail(ERR_INPUT, "respacing '%s': no step is left", text);
}

// ---- variance and training ----------------------------------------------------------------------

struct ddpm_variance ddpm_variance(const double *alpha_bar, int steps, int i)
{
    const int at = i == 0 && steps > 1 ? 1 : i;
    const double before = i > 0 ? alpha_bar[i - 1] : 1, before_at = at > 0 ? alpha_bar[at - 1] : 1;
    const double beta = 1 - alpha_bar[i] / before, beta_at = 1 - alpha_bar[at] / before_at;
    const double least = at > 0 ? beta_at * (1 - before_at) / (1 - alpha_bar[at]) : beta;
    return (struct ddpm_variance){.log_min = log(least), .log_max = log(beta)};
}

// The mean of x_{t-1} given x_t is sqrt(ab') beta / (1-ab) x0 + ... x_t, and the predicted x0 is
// off by sqrt((1-ab)/ab) times what the noise is off by: so the mean is off by GAIN deviations of
// the least variance for each unit of noise.
void ddpm_training(const float *t, int count, float *at)
{
    double ab[DDPM_STEPS];
    ddpm_alpha_bars(ab);
    for (int n = 0; n < count; n++, at += TIME_COLUMNS) {
        const int i = (int)t[n];
        const double now = ab[i], before = i > 0 ? ab[i - 1] : 1;
        const struct ddpm_variance v = ddpm_variance(ab, DDPM_STEPS, i);
        const double of_x0 = sqrt(before) * (1 - now / before) / (1 - now);
        const double least = exp(0.5 * v.log_min);
        at[TIME_SIGNAL] = (float)sqrt(now);
        at[TIME_NOISE] = (float)sqrt(1 - now);
        at[TIME_RANGE] = (float)(v.log_max - v.log_min);
        at[TIME_GAIN] = (float)(of_x0 * sqrt((1 - now) / now) / least);
        at[TIME_BIN] = i > 0 ? 0 : (float)(1 / (255 * least));
    }
}
