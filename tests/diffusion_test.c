// The operations of diffusion against double-precision references: what training adds to images,
// both losses, and a sampler's update.
#include "model/ddpm.h"
#include "runtime/rng.h"
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// These operations are f32 whatever the activations: one storage type, both forms, and bf16 once.
#define FOR_FLAGS(flags) for (const unsigned *flags = op_flags; flags < op_flags + 4; flags++)

struct images {
    int N, C, Co, H, W;
};
static const struct images images[] = {{1, 1, 1, 1, 1},  {3, 1, 2, 5, 7},   {2, 4, 8, 4, 4},
                                       {5, 3, 3, 11, 3}, {7, 4, 8, 17, 16}, {2, 1, 1, 32, 33}};
#define FOR_IMAGES(s) \
    for (const struct images *s = images; s < images + sizeof images / sizeof *images; s++)
#define NAME(s) (s)->N, (s)->C, (s)->H, (s)->W

// ---- what training adds to images ---------------------------------------------------------------

static int diffuse_case(unsigned flags, const struct images *s)
{
    struct op_run r;
    int P = s->C * s->H * s->W;
    OK(op_begin(&r, flags, (uint64_t)P));
    struct operand *x = op_random(&r, F32, -1, 1, DIMS(s->N, s->C, s->H, s->W));
    struct operand *noise = op_random(&r, F32, -3, 3, DIMS(s->N, s->C, s->H, s->W));
    struct operand *at = op_random(&r, F32, 0, 1, DIMS(s->N, TIME_COLUMNS));
    struct operand *xt = op_output(&r, F32, DIMS(s->N, s->C, s->H, s->W));
    double *want = op_doubles(&r, x->count);
    for (int i = 0; i < x->count; i++) {
        const double *a = at->v + i / P * TIME_COLUMNS;
        want[i] = a[TIME_SIGNAL] * x->v[i] + a[TIME_NOISE] * noise->v[i];
    }
    OK(OP_RUN(&r, op_diffuse(&r.c, &xt->t, &x->t, &noise->t, &at->t)));
    op_judge(&r, xt, want, 1e-6, "diffuse %dx%dx%dx%d", NAME(s));
    return op_end(&r);
}

static int diffuse(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_IMAGES(s)
    failed |= diffuse_case(*flags, s);
    return failed ? FAILED : PASSED;
}

// ---- rectified flow's loss ----------------------------------------------------------------------

struct flow {
    const struct images *s;
    const double *x, *noise;
};

static void ref_flow_loss(const double *out, double *loss, const void *args)
{
    const struct flow *a = args;
    int P = a->s->C * a->s->H * a->s->W, Q = a->s->Co * a->s->H * a->s->W;
    for (int n = 0; n < a->s->N; n++) {
        loss[n] = 0;
        for (int i = 0; i < P; i++)
            loss[n] += pow(out[n * Q + i] - a->noise[n * P + i] + a->x[n * P + i], 2) / P;
    }
}

// The gradient of sum over n of scale[n] * loss[n].
static void ref_flow_loss_bwd(double *dout, const double *out, const double *scale,
                              const struct flow *a)
{
    int P = a->s->C * a->s->H * a->s->W, Q = a->s->Co * a->s->H * a->s->W;
    for (int i = 0; i < a->s->N * Q; i++) {
        int n = i / Q, at = n * P + i % Q;
        dout[i] = i % Q < P ? 2 * scale[n] / P * (out[i] - a->noise[at] + a->x[at]) : 0;
    }
}

static int flow_loss_case(unsigned flags, const struct images *s)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->H + s->W)));
    struct operand *x = op_random(&r, F32, -1, 1, DIMS(s->N, s->C, s->H, s->W));
    struct operand *noise = op_random(&r, F32, -3, 3, DIMS(s->N, s->C, s->H, s->W));
    struct operand *out = op_random(&r, F32, -2, 2, DIMS(s->N, s->Co, s->H, s->W));
    struct operand *dout = op_output(&r, F32, DIMS(s->N, s->Co, s->H, s->W));
    struct operand *loss = op_output(&r, F32, DIMS(s->N));
    struct operand *again = op_output(&r, F32, DIMS(s->N));
    struct flow a = {s, x->v, noise->v};
    double *want = op_doubles(&r, s->N), *dwant = op_doubles(&r, out->count);
    double *scale = op_doubles(&r, s->N);
    for (int n = 0; n < s->N; n++)
        scale[n] = 0.25;
    ref_flow_loss(out->v, want, &a);
    ref_flow_loss_bwd(dwant, out->v, scale, &a);
    OK(OP_RUN(&r, op_flow_loss(&r.c, &loss->t, &dout->t, &out->t, &x->t, &noise->t, 0.25f)));
    op_judge(&r, loss, want, 1e-6, "flow_loss %dx%dx%dx%d", NAME(s));
    op_judge(&r, dout, dwant, 1e-6, "flow_loss gradient %dx%dx%dx%d", NAME(s));
    OK(OP_RUN(&r, op_flow_loss(&r.c, &again->t, NULL, &out->t, &x->t, &noise->t, 0.25f)));
    op_judge(&r, again, want, 1e-6, "flow_loss alone %dx%dx%dx%d", NAME(s));
    return op_end(&r);
}

static int flow_loss(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_IMAGES(s)
    failed |= flow_loss_case(*flags, s);
    return failed ? FAILED : PASSED;
}

static int flow_reference(void)
{
    struct op_run r;
    const struct images s = {2, 1, 2, 3, 2};
    OK(op_begin(&r, 0, 4));
    double *v = op_doubles(&r, 24), *x = op_doubles(&r, 12), *noise = op_doubles(&r, 12);
    double *dout = op_doubles(&r, 24), scale[2] = {0.3, 1.7};
    for (int i = 0; i < 24; i++) {
        v[i] = op_uniform(&r, -1, 1);
        x[i / 2] = op_uniform(&r, -1, 1);
        noise[i / 2] = op_uniform(&r, -1, 1);
    }
    struct flow a = {&s, x, noise};
    ref_flow_loss_bwd(dout, v, scale, &a);
    double error = op_difference(ref_flow_loss, &a, v, 24, scale, 2, dout);
    CHECK(error < 1e-7, "%g", error);
    return op_end(&r);
}

// ---- DDPM's loss --------------------------------------------------------------------------------

struct ddpm {
    const struct images *s;
    const double *x, *noise;
    const int *t;
    bool bound; // its terms alone
};

// The distribution function of guided-diffusion's approximation.
static long double phi(long double u)
{
    return 0.5L * (1 + tanhl(sqrtl(2 / 3.14159265358979323846L) * (u + 0.044715L * u * u * u)));
}

// One value's term of the bound in bits, by its definition: the predicted image, the posterior's
// mean, two normals or the difference of two distribution functions, of which tails leave few
// digits: hence long double.
static long double ref_bound(const double *ab, int t, double x, double noise, double d,
                             long double w)
{
    const double now = ab[t], before = t ? ab[t - 1] : 1, beta = 1 - now / before;
    const double xt = sqrt(now) * x + sqrt(1 - now) * noise;
    const double x0 = (xt - sqrt(1 - now) * (noise + d)) / sqrt(now);
    const double of_x0 = beta * sqrt(before) / (1 - now);
    const double of_xt = (1 - before) * sqrt(1 - beta) / (1 - now);
    const double mean = of_x0 * x0 + of_xt * xt, truth = of_x0 * x + of_xt * xt;
    const double beta1 = 1 - ab[1] / ab[0];
    const double least =
        log(t ? beta * (1 - before) / (1 - now) : beta1 * (1 - ab[0]) / (1 - ab[1]));
    const long double variance = least + (w + 1) / 2 * (log(beta) - least);
    if (t)
        return 0.5 *
               (variance - least - 1 + expl(least - variance) +
                powl(truth - mean, 2) * expl(-variance)) /
               M_LN2;
    const long double above = phi((x - mean + 1.0 / 255) * expl(-0.5L * variance));
    const long double below = phi((x - mean - 1.0 / 255) * expl(-0.5L * variance));
    const long double mass = x < -0.999 ? above : x > 0.999 ? 1 - below : above - below;
    return -logl(fmaxl(mass, 1e-12L)) / M_LN2;
}

static void ref_ddpm_loss(const double *out, double *loss, const void *args)
{
    const struct ddpm *a = args;
    const int P = a->s->C * a->s->H * a->s->W, Q = a->s->Co * a->s->H * a->s->W;
    double ab[DDPM_STEPS];
    ddpm_alpha_bars(ab);
    for (int n = 0; n < a->s->N; n++) {
        loss[n] = 0;
        for (int i = 0; i < P; i++) {
            const int at = n * P + i;
            const double d = out[n * Q + i] - a->noise[at];
            if (!a->bound)
                loss[n] += d * d / P;
            if (Q == 2 * P)
                loss[n] +=
                    (double)ref_bound(ab, a->t[n], a->x[at], a->noise[at], d, out[n * Q + P + i]) /
                    P;
        }
    }
}

// The gradient of scale * the sum over n: of d^2 by hand, of the bound by a central difference of
// each value's own term, of fourth order.
static void ref_ddpm_bwd(double *dout, const double *out, double scale, const struct ddpm *a)
{
    const int P = a->s->C * a->s->H * a->s->W, Q = a->s->Co * a->s->H * a->s->W;
    const double h = 1e-3;
    double ab[DDPM_STEPS];
    ddpm_alpha_bars(ab);
    for (int i = 0; i < a->s->N * P; i++) {
        const int n = i / P, at = n * Q + i % P;
        const double d = out[at] - a->noise[i];
        dout[at] = scale * 2 * d / P;
        if (Q != 2 * P)
            continue;
        const double w = out[at + P];
#define TERM(move) ref_bound(ab, a->t[n], a->x[i], a->noise[i], d, w + (move)*h)
        const long double slope = (8 * (TERM(1) - TERM(-1)) - (TERM(2) - TERM(-2))) / (12 * h);
        dout[at + P] = scale * (double)slope / P;
#undef TERM
    }
}

// Images of which some values are at and beyond the ends of the grey scale, and predictions that
// are good, bad and beyond the least probability.
static void mark_corners(struct operand *x, struct operand *out, const struct operand *noise, int P,
                         int Q)
{
    for (int i = 0; i < x->count; i++) {
        const int at = i / P * Q + i % P;
        x->v[i] = i % 5 == 0 ? -1 : i % 5 == 1 ? 1 : x->v[i];
        out->v[at] = noise->v[i] + (i % 7 == 0   ? 40
                                    : i % 7 == 1 ? -9
                                                 : 1) *
                                       (out->v[at] - noise->v[i]);
    }
}

static int ddpm_loss_case(unsigned flags, const struct images *s, const int *t)
{
    struct op_run r;
    float rows[64 * TIME_COLUMNS], times[64];
    double at_rows[64 * TIME_COLUMNS];
    const int P = s->C * s->H * s->W, Q = s->Co * s->H * s->W;
    const double scale = 0.25;
    OK(op_begin(&r, flags, (uint64_t)(s->H + s->W)));
    struct operand *x = op_random(&r, F32, -1.2, 1.2, DIMS(s->N, s->C, s->H, s->W));
    struct operand *noise = op_random(&r, F32, -3, 3, DIMS(s->N, s->C, s->H, s->W));
    struct operand *out = op_random(&r, F32, -1.5, 1.5, DIMS(s->N, s->Co, s->H, s->W));
    struct operand *dout = op_output(&r, F32, DIMS(s->N, s->Co, s->H, s->W));
    struct operand *loss = op_output(&r, F32, DIMS(s->N)),
                   *terms = op_output(&r, F32, DIMS(2, s->N));
    struct operand *again = op_output(&r, F32, DIMS(s->N));
    for (int n = 0; n < s->N; n++)
        times[n] = (float)t[n];
    ddpm_training(times, s->N, rows);
    for (int i = 0; i < s->N * TIME_COLUMNS; i++)
        at_rows[i] = (double)rows[i];
    struct operand *at = op_values(&r, F32, at_rows, DIMS(s->N, TIME_COLUMNS));
    if (t[0] == 0) {
        mark_corners(x, out, noise, P, Q);
        op_rewrite(&r, x, x->v), op_rewrite(&r, out, out->v);
    }
    struct ddpm a = {.s = s, .x = x->v, .noise = noise->v, .t = t};
    double *want = op_doubles(&r, s->N), *both = op_doubles(&r, 2 * s->N);
    double *dwant = op_doubles(&r, out->count);
    ref_ddpm_loss(out->v, want, &a);
    a.bound = true;
    ref_ddpm_loss(out->v, both + s->N, &a);
    for (int n = 0; n < s->N; n++)
        both[n] = want[n] - both[s->N + n];
    ref_ddpm_bwd(dwant, out->v, scale, &a);
    OK(OP_RUN(&r, op_ddpm_loss(&r.c, &loss->t, &terms->t, &dout->t, &out->t, &x->t, &noise->t,
                               &at->t, (float)scale)));
    op_judge(&r, loss, want, 2e-6, "ddpm_loss %dx%dx%dx%d", NAME(s));
    op_judge(&r, terms, both, 2e-6, "ddpm_loss terms %dx%dx%dx%d", NAME(s));
    op_judge(&r, dout, dwant, 3e-6, "ddpm_loss gradient %dx%dx%dx%d", NAME(s));
    OK(OP_RUN(&r, op_ddpm_loss(&r.c, &again->t, &terms->t, NULL, &out->t, &x->t, &noise->t, &at->t,
                               (float)scale)));
    op_judge(&r, again, want, 2e-6, "ddpm_loss alone %dx%dx%dx%d", NAME(s));
    return op_end(&r);
}

static int ddpm_loss(void)
{
    static const int late[] = {999, 1, 500, 100, 2, 10, 700}, first[] = {0, 0, 1, 0, 0, 0, 999};
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_IMAGES(s)
    {
        if (s->Co != s->C && s->Co != 2 * s->C)
            continue;
        failed |= ddpm_loss_case(*flags, s, late);
        failed |= ddpm_loss_case(*flags, s, first);
    }
    return failed ? FAILED : PASSED;
}

// Values of the variance's gradient one at a time, where a mean over an image would hide them: the
// last steps, whose two bounds are all but equal, and tails of t = 0 where a difference of two
// distribution functions in f32 would have no digit left.
static int ddpm_alone(void)
{
    static const int times[] = {999, 998, 900, 300, 50, 5, 1, 0};
    static const double off[] = {0, 1e-3, 0.1, 1, 3, 5, -6};
    const struct images s = {1, 1, 2, 1, 1};
    int failed = 0;
    FOR_FLAGS(flags)
    for (int i = 0; i < 8 * 7; i++) {
        struct op_run r;
        const int t = times[i % 8];
        const double x = 0.3, e = -0.7, out[] = {e + off[i / 8], 0.4};
        double want = 0, both[2] = {0, 0}, dwant[2];
        float row[TIME_COLUMNS];
        double at_row[TIME_COLUMNS];
        struct ddpm a = {.s = &s, .x = &x, .noise = &e, .t = &t};
        OK(op_begin(&r, *flags, 1));
        ddpm_training(&(float){(float)t}, 1, row);
        for (int k = 0; k < TIME_COLUMNS; k++)
            at_row[k] = (double)row[k];
        struct operand *xs = op_values(&r, F32, &x, DIMS(1, 1, 1, 1));
        struct operand *noise = op_values(&r, F32, &e, DIMS(1, 1, 1, 1));
        struct operand *outs = op_values(&r, F32, out, DIMS(1, 2, 1, 1));
        struct operand *dout = op_output(&r, F32, DIMS(1, 2, 1, 1));
        struct operand *loss = op_output(&r, F32, DIMS(1)), *terms = op_output(&r, F32, DIMS(2, 1));
        struct operand *at = op_values(&r, F32, at_row, DIMS(1, TIME_COLUMNS));
        a.x = xs->v, a.noise = noise->v;
        ref_ddpm_loss(outs->v, &want, &a);
        a.bound = true;
        ref_ddpm_loss(outs->v, both + 1, &a);
        both[0] = want - both[1];
        ref_ddpm_bwd(dwant, outs->v, 1, &a);
        OK(OP_RUN(&r, op_ddpm_loss(&r.c, &loss->t, &terms->t, &dout->t, &outs->t, &xs->t, &noise->t,
                                   &at->t, 1)));
        CHECK(op_read(&r, dout) == 0 && op_read(&r, terms) == 0, "guard bands");
        const double slope = fabs(dout->v[1] - dwant[1]), bound = fabs(terms->v[1] - both[1]);
        CHECK(slope <= 1e-4 * fabs(dwant[1]) + 1e-9, "t %d, off by %g: gradient %g, not %g", t,
              off[i / 8], dout->v[1], dwant[1]);
        CHECK(bound <= 1e-5 * both[1] + 1e-7, "t %d, off by %g: bound %g, not %g", t, off[i / 8],
              terms->v[1], both[1]);
        failed |= op_end(&r);
    }
    return failed ? FAILED : PASSED;
}

// ---- a sampler's update -------------------------------------------------------------------------

struct step {
    double k[STEP_COUNT];
    int channels; // guided; 0: the image's
    bool guided, keeps, noisy;
};

// What the step should make of value i; `keep` what it keeps.
static double ref_step(const struct images *s, const struct step *a, int i, const double *k,
                       const double *z, const double *out, const double *kept, const double *noise,
                       double *keep)
{
    const int area = s->H * s->W, P = s->C * area, Q = s->Co * area, n = i / P, p = i % P;
    const int channels = a->channels ? a->channels : s->C;
    double answer[2] = {0, 0};
    for (int half = 0; half < (a->noisy && k[STEP_SPREAD] != 0 ? 2 : 1); half++) {
        const int at = half * P + p;
        answer[half] = out[n * Q + at];
        if (a->guided && at / area < channels) {
            const double free = out[(s->N + n) * Q + at];
            answer[half] = free + k[STEP_CFG] * (answer[half] - free);
        }
    }
    double v = answer[0];
    const double image = k[STEP_CLIP_Z] * z[i] + k[STEP_CLIP_V] * v;
    if (k[STEP_CLIP_V] != 0)
        v = fmax(-1, fmin(1, image));
    double next = k[STEP_Z] * z[i] + k[STEP_V] * v;
    if (k[STEP_KEPT] != 0)
        next += k[STEP_KEPT] * kept[i];
    if (a->noisy)
        next += k[STEP_NOISE] * exp(k[STEP_SPREAD] * (answer[1] + 1)) * noise[i];
    *keep = k[STEP_KEEP_Z] * z[i] + k[STEP_KEEP_V] * v;
    return next;
}

// kept and noise start as NaN where they are not read.
static int sample_step_case(unsigned flags, const struct images *s, const struct step *a)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->H * s->W + a->channels)));
#define IMAGES DIMS(s->N, s->C, s->H, s->W)
    struct operand *z = op_random(&r, F32, -2, 2, IMAGES);
    struct operand *out =
        op_random(&r, F32, -2, 2, DIMS(a->guided ? 2 * s->N : s->N, s->Co, s->H, s->W));
    struct operand *k = op_values(&r, F32, a->k, DIMS(STEP_COUNT));
    struct operand *kept =
        a->k[STEP_KEPT] != 0 ? op_random(&r, F32, -2, 2, IMAGES) : op_output(&r, F32, IMAGES);
    struct operand *noise =
        a->noisy ? op_random(&r, F32, -3, 3, IMAGES) : op_output(&r, F32, IMAGES);
#undef IMAGES
    double *want = op_doubles(&r, z->count), *keep = op_doubles(&r, z->count);
    for (int i = 0; i < z->count; i++)
        want[i] = ref_step(s, a, i, k->v, z->v, out->v, kept->v, noise->v, &keep[i]);
    const int channels = a->channels ? a->channels : s->C;
    OK(OP_RUN(&r, op_sample_step(&r.c, &z->t, a->keeps ? &kept->t : NULL, &out->t, &noise->t, &k->t,
                                 channels < s->Co ? channels : s->Co)));
    op_judge(&r, z, want, 3e-6, "sample_step %dx%dx%dx%d", NAME(s));
    if (a->keeps)
        op_judge(&r, kept, keep, 3e-6, "sample_step kept %dx%dx%dx%d", NAME(s));
    return op_end(&r);
}

static int sample_step(void)
{
    static const struct step cases[] = {
        {.k = {1, -0.02, 0, 0, 0, 4}, .guided = true},
        {.k = {1, -0.02, 0, 0, 0, 1}},
        {.k = {1, -0.02, 0, 0, 0, 1}, .guided = true},
        {.k = {0.9, -0.1, 0, 1, -0.7, 1.5}, .channels = 3, .guided = true, .keeps = true},
        {.k = {0.9, -0.1, 0.3, 0.5, -0.7, 1.5}, .channels = 3, .guided = true, .keeps = true},
        {.k = {0.9, -0.1, 0.3, 0.5, -0.7, 1.5}, .keeps = true},
        {.k = {0.9, -0.1, 0, 0, 0, 1.5, 1.2, -0.6}, .guided = true},
        {.k = {0.9, -0.1, 0.2, 1, -0.7, 1.5, 1.2, -0.6}, .guided = true, .keeps = true},
        {.k = {0.9, -0.1, 0, 0, 0, 1.5, 0, 0, 0.3}, .guided = true, .noisy = true},
    };
    static const struct step learned[] = {
        {.k = {0.9, -0.1, 0, 0, 0, 1.5, 0, 0, 0.3, 0.2}, .guided = true, .noisy = true},
        {.k = {0.9, -0.1, 0, 0, 0, 1.5, 1.2, -0.6, 0.3, 0.2}, .noisy = true},
        {.k = {0.9, -0.1, 0, 0, 0, 1.5, 0, 0, 0.3, 0.2},
         .channels = 3,
         .guided = true,
         .noisy = true},
    };
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_IMAGES(s)
    {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
            failed |= sample_step_case(*flags, s, &cases[i]);
        for (size_t i = 0; i < sizeof learned / sizeof learned[0] && s->Co == 2 * s->C; i++)
            failed |= sample_step_case(*flags, s, &learned[i]);
    }
    return failed ? FAILED : PASSED;
}

// Every image's noise is that of its own stream, wherever it stands in the batch.
static int normal_images(void)
{
    static const double number[] = {4, 70000, 5, 0, 2147483647};
    static const int sizes[] = {1, 7, 48, 301};
    int failed = 0;
    FOR_FLAGS(flags)
    for (int i = 0; i < 4; i++) {
        struct op_run r;
        const uint64_t seed = 77, stream = rng_stream(RNG_STEP, (uint64_t)3 << 32);
        OK(op_begin(&r, *flags, 1));
        struct operand *image = op_values(&r, I32, number, DIMS(5));
        struct operand *out = op_output(&r, F32, DIMS(5, sizes[i]));
        double *want = op_doubles(&r, out->count);
        for (int j = 0; j < out->count; j++)
            want[j] = (double)rng_normal(seed, stream + (uint64_t)number[j / sizes[i]],
                                         (uint64_t)(j % sizes[i]));
        OK(OP_RUN(&r, op_normal_images(&r.c, &out->t, &image->t, seed, stream)));
        op_judge_exact(&r, out, want, "normal_images 5x%d", sizes[i]);
        failed |= op_end(&r);
    }
    return failed ? FAILED : PASSED;
}

const struct test diffusion_tests[] = {
    {"diffuse", diffuse},
    {"flow_reference", flow_reference},
    {"flow_loss", flow_loss},
    {"ddpm_loss", ddpm_loss},
    {"ddpm_alone", ddpm_alone},
    {"sample_step", sample_step},
    {"normal_images", normal_images},
    {0},
};
