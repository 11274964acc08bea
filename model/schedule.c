#include "model/schedule.h"

#include <math.h>
#include <stdio.h>

#include "devices/error.h"

enum { MOST_STEPS = 1000000 };

int schedule_respace(struct schedule *s, const char *text)
{
    double all[DDPM_STEPS];
    if (s->diffusion != DIFFUSION_DDPM)
        return fail(ERR_INPUT, "respacing '%s': only DDPM models have steps to choose from", text);
    const int steps = ddpm_respace(text, s->used);
    TRY(steps);
    ddpm_alpha_bars(all);
    for (int i = 0; i < steps; i++)
        s->alpha_bar[i] = all[s->used[i]];
    s->steps = steps;
    return 0;
}

int schedule_init(struct schedule *s, enum diffusion diffusion, enum sampler_kind kind, int steps)
{
    const int most = diffusion == DIFFUSION_DDPM ? DDPM_STEPS : MOST_STEPS;
    char text[16];
    *s = (struct schedule){.diffusion = diffusion, .kind = kind, .steps = steps};
    if (steps < 1 || steps > most)
        return fail(ERR_INPUT, "%d sampling steps: must be 1 to %d", steps, most);
    snprintf(text, sizeof text, "%d", steps);
    return diffusion == DIFFUSION_DDPM ? schedule_respace(s, text) : 0;
}

int schedule_passes(const struct schedule *s)
{
    return s->kind != SAMPLER_HEUN          ? s->steps
           : s->diffusion == DIFFUSION_DDPM ? 2 * s->steps - 1
                                            : 2 * s->steps;
}

bool schedule_keeps(const struct schedule *s)
{
    return s->kind == SAMPLER_HEUN || s->kind == SAMPLER_DPM;
}

bool schedule_random(const struct schedule *s)
{
    return s->kind == SAMPLER_DDPM || (s->kind == SAMPLER_DDIM && s->eta > 0);
}

// ---- where a step is ----------------------------------------------------------------------------

struct point {
    double t, alpha, sigma;
};

// Before step number `step`; at `steps` the image.
static struct point point_at(const struct schedule *s, int step)
{
    if (s->diffusion == DIFFUSION_RF) {
        const double t = (double)(s->steps - step) / (double)s->steps;
        return (struct point){t, 1 - t, t};
    }
    if (step == s->steps)
        return (struct point){0, 1, 0};
    const int i = s->steps - 1 - step;
    return (struct point){s->used[i], sqrt(s->alpha_bar[i]), sqrt(1 - s->alpha_bar[i])};
}

// A sum of z and the network's answer.
struct sum {
    double z, v;
};

static struct sum image_at(const struct schedule *s, struct point p)
{
    if (s->diffusion == DIFFUSION_RF)
        return (struct sum){1, -p.t};
    return (struct sum){1 / p.alpha, -p.sigma / p.alpha};
}

static struct sum noise_at(const struct schedule *s, struct point p)
{
    return s->diffusion == DIFFUSION_RF ? (struct sum){1, 1 - p.t} : (struct sum){0, 1};
}

// ---- the samplers -------------------------------------------------------------------------------

// The deviation of z at `next` given z at `now` and the image.
static double posterior_deviation(struct point now, struct point next)
{
    const double r = now.alpha * next.sigma / (next.alpha * now.sigma);
    return next.sigma * sqrt(fmax(0, 1 - r * r));
}

static struct pass ddim_pass(const struct schedule *s, int step, double eta)
{
    const struct point now = point_at(s, step), next = point_at(s, step + 1);
    const struct sum x0 = image_at(s, now), e = noise_at(s, now);
    const double deviation = eta > 0 ? eta * posterior_deviation(now, next) : 0;
    const double of_e = sqrt(fmax(0, next.sigma * next.sigma - deviation * deviation));
    return (struct pass){.t = now.t,
                         .z = next.alpha * x0.z + of_e * e.z,
                         .v = next.alpha * x0.v + of_e * e.v,
                         .noise = deviation,
                         .ends = true};
}

static struct pass ancestral_pass(const struct schedule *s, int step)
{
    struct pass p = ddim_pass(s, step, 1);
    if (s->diffusion == DIFFUSION_RF || step == s->steps - 1)
        return p;
    const struct ddpm_variance v = ddpm_variance(s->alpha_bar, s->steps, s->steps - 1 - step);
    p.noise = exp(0.5 * (s->learned ? v.log_min : v.log_max));
    p.spread = s->learned ? 0.25 * (v.log_max - v.log_min) : 0;
    return p;
}

// Of rectified flow's dz/dt = v, or of d(z/alpha)/d(sigma/alpha) = e, seen in z at the step's end.
static double slope_length(const struct schedule *s, struct point now, struct point next)
{
    if (s->diffusion == DIFFUSION_RF)
        return next.t - now.t;
    return next.sigma - next.alpha * now.sigma / now.alpha;
}

// The slope at the start is kept; the second pass replaces half of it by its own.
static struct pass heun_pass(const struct schedule *s, int index)
{
    const int step = index / 2;
    struct pass p = ddim_pass(s, step, 0);
    if (index % 2 == 0) {
        p.keep_v = 1;
        p.ends = index == schedule_passes(s) - 1;
        return p;
    }
    const struct point next = point_at(s, step + 1);
    const double half = 0.5 * slope_length(s, point_at(s, step), next);
    return (struct pass){.t = next.t, .z = 1, .v = half, .kept = -half, .ends = true};
}

static double lambda(struct point p)
{
    return log(p.alpha / p.sigma);
}

// How far x0 is extrapolated: 1 / (2 r), r = the length in lambda of the step before over this
// one's. Step 0 has no step before; where that began at infinity (rectified flow's t = 1), r is
// infinite; the last step, infinitely long itself, ends at x0, of first order as everywhere in use:
// an extrapolation over it has no limit.
static double extrapolation(const struct schedule *s, int step)
{
    if (step == 0 || step == s->steps - 1)
        return 0;
    const double now = lambda(point_at(s, step));
    const double before = now - lambda(point_at(s, step - 1));
    return (lambda(point_at(s, step + 1)) - now) / (2 * before);
}

// z' = sigma'/sigma z + (alpha' - alpha sigma'/sigma) D, D = x0 + e (x0 - the x0 before); alpha' (1
// - exp(-h)) of the published form is written without its differences of infinities. x0 is kept.
static struct pass dpm_pass(const struct schedule *s, int step)
{
    const struct point now = point_at(s, step), next = point_at(s, step + 1);
    const struct sum x0 = image_at(s, now);
    const double ratio = next.sigma / now.sigma, of_image = next.alpha - now.alpha * ratio;
    const double e = extrapolation(s, step);
    return (struct pass){.t = now.t,
                         .z = ratio + of_image * (1 + e) * x0.z,
                         .v = of_image * (1 + e) * x0.v,
                         .kept = -of_image * e,
                         .keep_z = x0.z,
                         .keep_v = x0.v,
                         .ends = true};
}

static struct pass plain_pass(const struct schedule *s, int index)
{
    switch (s->kind) {
    case SAMPLER_HEUN:
        return heun_pass(s, index);
    case SAMPLER_DPM:
        return dpm_pass(s, index);
    case SAMPLER_DDPM:
        return ancestral_pass(s, index);
    case SAMPLER_DDIM:
        return ddim_pass(s, index, s->eta);
    case SAMPLER_EULER:
        break;
    }
    return ddim_pass(s, index, 0);
}

// The same sums written with the image x0 = at.z z + at.v v in place of v.
static void by_image(struct pass *p, struct sum at)
{
    p->clip_z = at.z, p->clip_v = at.v;
    p->z -= p->v * at.z / at.v;
    p->v /= at.v;
    p->keep_z -= p->keep_v * at.z / at.v;
    p->keep_v /= at.v;
}

struct pass schedule_pass(const struct schedule *s, int index)
{
    struct pass p = plain_pass(s, index);
    if (s->clip) {
        const int step = s->kind == SAMPLER_HEUN ? (index + 1) / 2 : index;
        const struct sum x0 = image_at(s, point_at(s, step));
        if (x0.v != 0) // 0: rectified flow at t = 0, where z is the image
            by_image(&p, x0);
    }
    return p;
}
