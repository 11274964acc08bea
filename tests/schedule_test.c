// The rules of samplers against exact solutions.
//
// Where the data are normal, N(m, s^2), the answer of a perfect network is linear in z and the flow
// without noise is known: at z = alpha x + sigma e the deviation is sqrt(V), V = alpha^2 s^2 +
// sigma^2, and a point stays as many deviations from the mean alpha m as it began.
#include "model/schedule.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const enum sampler_kind kinds[] = {SAMPLER_EULER, SAMPLER_HEUN, SAMPLER_DPM, SAMPLER_DDIM,
                                          SAMPLER_DDPM};
static const char *const names[] = {"euler", "heun", "dpm++", "ddim", "ddpm"};
enum { KINDS = 5 };
static const char *const families[] = {"rf", "ddpm"};

// alpha and sigma of the network's t.
static void scales(enum diffusion family, double t, double *alpha, double *sigma)
{
    double ab[DDPM_STEPS];
    *alpha = 1 - t, *sigma = t;
    if (family == DIFFUSION_RF)
        return;
    ddpm_alpha_bars(ab);
    *alpha = sqrt(ab[(int)t]), *sigma = sqrt(1 - ab[(int)t]);
}

// What a perfect network answers: the expectation of e, or of e - x, given z.
static double answer(enum diffusion family, double z, double t, double m, double s)
{
    double alpha, sigma;
    scales(family, t, &alpha, &sigma);
    const double V = alpha * alpha * s * s + sigma * sigma, away = z - alpha * m;
    const double e = sigma / V * away, x = m + alpha * s * s / V * away;
    return family == DIFFUSION_RF ? e - x : e;
}

// One point from noise to the image in double, without noise on the way.
static double follow(const struct schedule *way, double z, double m, double s)
{
    double kept = NAN;
    for (int i = 0; i < schedule_passes(way); i++) {
        const struct pass p = schedule_pass(way, i);
        const double now = z, v = answer(way->diffusion, z, p.t, m, s);
        z = p.z * now + p.v * v + (p.kept != 0 ? p.kept * kept : 0);
        kept = p.keep_z * now + p.keep_v * v;
    }
    return z;
}

// Where the flow leads: for DDPM to the lowest t, and from there to the image expected, as the
// samplers end.
static double exact(enum diffusion family, double z, double m, double s)
{
    double alpha, sigma;
    if (family == DIFFUSION_RF)
        return m + s * z;
    scales(family, 999, &alpha, &sigma);
    const double deviations = (z - alpha * m) / sqrt(alpha * alpha * s * s + sigma * sigma);
    scales(family, 0, &alpha, &sigma);
    const double V = alpha * alpha * s * s + sigma * sigma;
    return m + alpha * s * s / sqrt(V) * deviations;
}

static double worst_error(enum diffusion family, enum sampler_kind kind, int steps)
{
    double worst = 0;
    struct schedule way;
    if (schedule_init(&way, family, kind, steps) < 0)
        return NAN;
    for (int i = 0; i < 20; i++) {
        const double z = -2 + 0.23 * i, m = 0.7 - 0.1 * i, s = 0.4 + 0.05 * i;
        worst = fmax(worst, fabs(follow(&way, z, m, s) - exact(family, z, m, s)));
    }
    return worst;
}

// Steps equal in t grow in lambda towards both ends: there DPM-Solver++(2M) loses a little, its
// error goes as dt^2 log(1/dt), and the logarithm is taken out.
static int order_of_convergence(void)
{
    static const double order[] = {1, 2, 2, 1}, most[] = {4e-3, 1e-6, 2e-5, 4e-3};
    for (int k = 0; k < 4; k++) {
        const double coarse = worst_error(DIFFUSION_RF, kinds[k], 640);
        const double fine = worst_error(DIFFUSION_RF, kinds[k], 1280);
        const double logs = kinds[k] == SAMPLER_DPM ? log(1280) / log(640) : 1;
        const double found = log2(coarse / fine * logs);
        CHECK(fine < most[k], "%s: error %g in 1280 steps", names[k], fine);
        CHECK(fabs(found - order[k]) < 0.05, "%s: of order %.3f", names[k], found);
    }
    return PASSED;
}

// DDPM's steps are 1000 at most; of 112, 334 and 1000 they are 9, 3 and 1 apart.
static int order_of_convergence_ddpm(void)
{
    static const double order[] = {1, 2, 2, 1};
    for (int k = 0; k < 4; k++) {
        double error[3];
        for (int i = 0; i < 3; i++)
            error[i] = worst_error(DIFFUSION_DDPM, kinds[k], (int[]){112, 334, 1000}[i]);
        const double early = log(error[0] / error[1]) / log(3),
                     late = log(error[1] / error[2]) / log(3);
        CHECK(fabs(late - order[k]) < 0.1, "%s: of order %.3f, then %.3f", names[k], early, late);
    }
    return PASSED;
}

// ---- with noise ---------------------------------------------------------------------------------

// Mean and variance of z through passes with a perfect network, whose second half answers w.
struct law {
    double mean, variance;
};

static struct law next_law(const struct schedule *way, const struct pass *p, struct law now,
                           double m, double s, double w)
{
    const double slope =
        answer(way->diffusion, 1, p->t, m, s) - answer(way->diffusion, 0, p->t, m, s);
    const double factor = p->z + p->v * slope, noise = p->noise * exp(p->spread * (w + 1));
    return (struct law){factor * now.mean + p->v * answer(way->diffusion, 0, p->t, m, s),
                        factor * factor * now.variance + noise * noise};
}

// Two kinds of data make each step exact, however long: one image (s = 0), where the posterior's
// variance is that of z, and normal data N(0, 1) in DDPM, where beta is.
static int noise_is_exact(void)
{
    static const struct {
        enum diffusion family;
        enum sampler_kind kind;
        bool learned;
        double eta, s, w;
    } cases[] = {
        {DIFFUSION_DDPM, SAMPLER_DDPM, true, 0, 0, -1},
        {DIFFUSION_DDPM, SAMPLER_DDPM, true, 0, 1, 1},
        {DIFFUSION_DDPM, SAMPLER_DDPM, false, 0, 1, 0},
        {DIFFUSION_DDPM, SAMPLER_DDIM, true, 0, 0, 0},
        {DIFFUSION_DDPM, SAMPLER_DDIM, true, 0.4, 0, 0},
        {DIFFUSION_DDPM, SAMPLER_DDIM, true, 1, 0, 0},
        {DIFFUSION_RF, SAMPLER_DDPM, false, 0, 0, 0},
        {DIFFUSION_RF, SAMPLER_DDIM, false, 0.4, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int steps = 2; steps < 500; steps += 83) {
            struct schedule way;
            double alpha, sigma, m = cases[i].s > 0 ? 0 : 0.7;
            OK(schedule_init(&way, cases[i].family, cases[i].kind, steps));
            way.eta = cases[i].eta, way.learned = cases[i].learned;
            scales(cases[i].family, schedule_pass(&way, 0).t, &alpha, &sigma);
            struct law z = {alpha * m, pow(alpha * cases[i].s, 2) + sigma * sigma};
            for (int j = 0; j + 1 < steps; j++) {
                const struct pass p = schedule_pass(&way, j), next = schedule_pass(&way, j + 1);
                z = next_law(&way, &p, z, m, cases[i].s, cases[i].w);
                scales(cases[i].family, next.t, &alpha, &sigma);
                const double variance = pow(alpha * cases[i].s, 2) + sigma * sigma;
                CHECK(fabs(z.mean - alpha * m) < 1e-12 && fabs(z.variance - variance) < 1e-12,
                      "case %d, %d steps, step %d: %g and %g, not %g and %g", (int)i, steps, j,
                      z.mean, z.variance, alpha * m, variance);
            }
            const struct pass last = schedule_pass(&way, steps - 1);
            CHECK(last.noise == 0, "case %d: noise in the last step", (int)i);
        }
    return PASSED;
}

// ---- the rules themselves -----------------------------------------------------------------------

// The published update in its own variables (lambda, h, r) where all of them are finite.
static int dpm_as_published(void)
{
    const int steps = 12;
    for (int family = 0; family < 2; family++) {
        struct schedule way;
        OK(schedule_init(&way, (enum diffusion)family, SAMPLER_DPM, steps));
        for (int i = 2; i < steps - 1; i++) {
            double alpha[3], sigma[3], lambda[3]; // before, now, next
            for (int j = 0; j < 3; j++) {
                scales((enum diffusion)family, schedule_pass(&way, i + j - 1).t, &alpha[j],
                       &sigma[j]);
                lambda[j] = log(alpha[j]) - log(sigma[j]);
            }
            const struct pass p = schedule_pass(&way, i);
            const double h = lambda[2] - lambda[1], r = (lambda[1] - lambda[0]) / h;
            const double z = 0.3, v = -1.1, before = 0.8;
            const double x0 = family ? (z - sigma[1] * v) / alpha[1] : z - p.t * v;
            const double D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before;
            const double want = sigma[2] / sigma[1] * z - alpha[2] * expm1(-h) * D;
            const double found = p.z * z + p.v * v + p.kept * before;
            CHECK(fabs(found - want) < 1e-11, "step %d: %g", i, found - want);
            CHECK(fabs(p.keep_z * z + p.keep_v * v - x0) < 1e-12, "step %d keeps another image", i);
        }
    }
    return PASSED;
}

// The ends: every number is finite, the first step needs nothing kept, the last one ends at x0;
// steps are counted; and euler is ddim.
static int check_way(enum diffusion family, int k, int steps)
{
    struct schedule way, other;
    int ends = 0;
    OK(schedule_init(&way, family, kinds[k], steps));
    OK(schedule_init(&other, family, SAMPLER_EULER, steps));
    const int passes = schedule_passes(&way);
    for (int i = 0; i < passes; i++) {
        const struct pass p = schedule_pass(&way, i);
        const double sum = p.t + p.z + p.v + p.kept + p.keep_z + p.keep_v + p.noise + p.spread;
        CHECK(isfinite(sum), "%s, pass %d of %d steps", names[k], i, steps);
        CHECK(i > 0 || (p.t == (family ? 999 : 1) && p.kept == 0), "%s: the start", names[k]);
        CHECK(p.noise == 0 || schedule_random(&way), "%s takes noise", names[k]);
        ends += p.ends;
        if (kinds[k] == SAMPLER_DDIM) {
            const struct pass e = schedule_pass(&other, i);
            CHECK(p.t == e.t && p.z == e.z && p.v == e.v, "ddim without noise is not euler");
        }
    }
    CHECK(ends == steps && schedule_pass(&way, passes - 1).ends, "%s ends %d steps of %d", names[k],
          ends, steps);
    const struct pass last = schedule_pass(&way, passes - 1);
    const double alpha = family ? sqrt(way.alpha_bar[0]) : 1;
    const double sigma = family ? sqrt(1 - way.alpha_bar[0]) : 1.0 / steps;
    if (kinds[k] != SAMPLER_HEUN || family)
        CHECK(fabs(last.z - 1 / alpha) < 1e-12 / alpha &&
                  fabs(last.v + sigma / alpha) < 1e-12 / alpha && last.kept == 0,
              "%s in %d steps does not end at the image", names[k], steps);
    return PASSED;
}

static int ends_are_exact(void)
{
    for (int family = 0; family < 2; family++)
        for (int k = 0; k < KINDS; k++)
            for (int steps = 1; steps < 6; steps++)
                CHECK(check_way((enum diffusion)family, k, steps) == PASSED, "%s of %s", names[k],
                      families[family]);
    return PASSED;
}

// The image that clipping looks at is the one that the sampler predicts, and where nothing is
// clipped nothing changes.
static int clip_case(const struct schedule *plain, const struct schedule *clipped, int i)
{
    const struct pass p = schedule_pass(plain, i), c = schedule_pass(clipped, i);
    const double z = 0.9, v = -0.4;
    double alpha, sigma;
    scales(plain->diffusion, p.t, &alpha, &sigma);
    const double x0 = plain->diffusion == DIFFUSION_RF ? z - p.t * v : (z - sigma * v) / alpha;
    if (c.clip_v == 0) {
        CHECK(p.t == 0 && p.z == c.z && p.v == c.v, "pass %d is not clipped", i);
        return PASSED;
    }
    const double image = c.clip_z * z + c.clip_v * v;
    CHECK(fabs(image - x0) < 1e-12 * fabs(x0), "pass %d clips %g, not %g", i, image, x0);
    CHECK(fabs(p.z * z + p.v * v - c.z * z - c.v * image) < 1e-10, "pass %d differs", i);
    CHECK(fabs(p.keep_z * z + p.keep_v * v - c.keep_z * z - c.keep_v * image) < 1e-10,
          "pass %d keeps something else", i);
    return PASSED;
}

static int clipping(void)
{
    for (int family = 0; family < 2; family++)
        for (int k = 0; k < KINDS; k++) {
            struct schedule plain, clipped;
            OK(schedule_init(&plain, (enum diffusion)family, kinds[k], 5));
            clipped = plain, clipped.clip = true;
            for (int i = 0; i < schedule_passes(&plain); i++)
                CHECK(clip_case(&plain, &clipped, i) == PASSED, "%s of %s", names[k],
                      families[family]);
        }
    return PASSED;
}

// Lists that guided-diffusion's space_timesteps() gives.
static int respacing(void)
{
    static const struct {
        const char *text;
        int count, first[8]; // the first few
        int sum;
    } known[] = {
        {"5", 5, {0, 250, 500, 749, 999}, 2498},
        {"7", 7, {0, 166, 333, 500, 666, 832, 999}, 3496},
        {"10", 10, {0, 111, 222, 333, 444, 555, 666, 777}, 4995},
        {"250", 250, {0, 4, 8, 12, 16, 20, 24, 28}, 124875},
        {"1000", 1000, {0, 1, 2, 3, 4, 5, 6, 7}, 499500},
        {"3,1,4", 8, {0, 166, 333, 334, 667, 778, 888, 999}, 4165},
        {"0,2", 2, {500, 999}, 1499},
        {"ddim25", 25, {0, 40, 80, 120, 160, 200, 240, 280}, 12000},
        {"ddim334", 334, {0, 3, 6, 9, 12, 15, 18, 21}, 166833},
        {"ddim1000", 1000, {0, 1, 2, 3, 4, 5, 6, 7}, 499500},
    };
    static const char *const bad[] = {"",       "x",     "5,",   ",5",      "5;6",
                                      "1001",   "-3",    "ddim", "ddim999", "ddim0",
                                      "ddim-5", "501,1", "0",    "5 6",     "99999999999999"};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        int used[DDPM_STEPS], sum = 0;
        const int count = ddpm_respace(known[i].text, used);
        CHECK(count == known[i].count, "'%s': %d steps", known[i].text, count);
        for (int j = 0; j < count; j++) {
            CHECK(j >= 8 || used[j] == known[i].first[j], "'%s': step %d is %d", known[i].text, j,
                  used[j]);
            sum += used[j];
        }
        CHECK(sum == known[i].sum, "'%s': sum %d", known[i].text, sum);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int used[DDPM_STEPS];
        CHECK(ddpm_respace(bad[i], used) == ERR_INPUT, "respacing '%s' was taken", bad[i]);
    }
    struct schedule way;
    CHECK(schedule_init(&way, DIFFUSION_DDPM, SAMPLER_DDIM, 1001) == ERR_INPUT,
          "1001 steps of 1000");
    CHECK(schedule_init(&way, DIFFUSION_RF, SAMPLER_DDIM, 0) == ERR_INPUT, "no steps");
    OK(schedule_init(&way, DIFFUSION_RF, SAMPLER_DDIM, 1001));
    CHECK(schedule_respace(&way, "5") == ERR_INPUT, "rectified flow has no steps to choose from");
    return PASSED;
}

const struct test schedule_tests[] = {
    {"order_of_convergence", order_of_convergence},
    {"order_of_convergence_ddpm", order_of_convergence_ddpm},
    {"noise_is_exact", noise_is_exact},
    {"dpm_as_published", dpm_as_published},
    {"ends_are_exact", ends_are_exact},
    {"clipping", clipping},
    {"respacing", respacing},
    {0},
};
