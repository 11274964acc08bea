// Samplers against an exact solution, and the sampler of the model against the same rules by hand.
//
// Where the data are normal, N(m, s^2), the velocity is linear in z and the flow is known: with
// V(t) = (1-t)^2 s^2 + t^2, a point stays as many deviations sqrt(V) from the mean (1-t) m as it
// began.
#include "model/sampler.h"
#include "runtime/rng.h"
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const enum sampler_kind kinds[] = {SAMPLER_EULER, SAMPLER_HEUN, SAMPLER_DPM};
static const char *const names[] = {"euler", "heun", "dpm++"};
enum { KINDS = 3 };

static double velocity(double z, double t, double m, double s)
{
    const double V = (1 - t) * (1 - t) * s * s + t * t;
    return -m + (t - (1 - t) * s * s) / V * (z - (1 - t) * m);
}

// One point from t = 1 to 0 in double.
static double follow(enum sampler_kind kind, int steps, double z, double m, double s)
{
    double kept = NAN;
    for (int i = 0; i < steps * schedule_passes(kind); i++) {
        const struct pass p = schedule_pass(kind, steps, i);
        const double now = z, v = velocity(z, p.t, m, s);
        z = p.z * now + p.v * v + (p.kept != 0 ? p.kept * kept : 0);
        kept = p.keep_z * now + p.keep_v * v;
    }
    return z;
}

static double worst_error(enum sampler_kind kind, int steps)
{
    double worst = 0;
    for (int i = 0; i < 20; i++) {
        const double z = -2 + 0.23 * i, m = 0.7 - 0.1 * i, s = 0.4 + 0.05 * i;
        worst = fmax(worst, fabs(follow(kind, steps, z, m, s) - (m + s * z)));
    }
    return worst;
}

// Steps equal in t grow in lambda towards both ends: there DPM-Solver++(2M) loses a little, its error
// goes as dt^2 log(1/dt), and the logarithm is taken out.
static int order_of_convergence(void)
{
    static const double order[KINDS] = {1, 2, 2}, most[KINDS] = {4e-3, 1e-6, 2e-5};
    for (int k = 0; k < KINDS; k++) {
        const double coarse = worst_error(kinds[k], 640), fine = worst_error(kinds[k], 1280);
        const double logs = kinds[k] == SAMPLER_DPM ? log(1280) / log(640) : 1;
        const double found = log2(coarse / fine * logs);
        CHECK(fine < most[k], "%s: error %g in 1280 steps", names[k], fine);
        CHECK(fabs(found - order[k]) < 0.05, "%s: of order %.3f", names[k], found);
    }
    return PASSED;
}

// The published update in its own variables (lambda, h, r) where all of them are finite.
static int dpm_as_published(void)
{
    const int steps = 12;
    for (int i = 2; i < steps - 1; i++) {
        const struct pass p = schedule_pass(SAMPLER_DPM, steps, i);
        double t[3], lambda[3]; // before, now, next
        for (int j = 0; j < 3; j++) {
            t[j] = 1 - (double)(i + j - 1) / steps;
            lambda[j] = log(1 - t[j]) - log(t[j]);
        }
        const double h = lambda[2] - lambda[1], r = (lambda[1] - lambda[0]) / h;
        const double z = 0.3, v = -1.1, before = 0.8, x0 = z - t[1] * v;
        const double D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before;
        const double want = t[2] / t[1] * z - (1 - t[2]) * expm1(-h) * D;
        const double found = p.z * z + p.v * v + p.kept * before;
        CHECK(fabs(p.t - t[1]) < 1e-14 && fabs(found - want) < 1e-12, "step %d: %g", i,
              found - want);
        CHECK(fabs(p.keep_z * z + p.keep_v * v - x0) < 1e-14, "step %d keeps another image", i);
    }
    return PASSED;
}

// The ends: every number is finite, the first step needs nothing kept, the last one ends at x0.
static int ends_are_exact(void)
{
    for (int k = 0; k < KINDS; k++)
        for (int steps = 1; steps < 6; steps++)
            for (int i = 0; i < steps * schedule_passes(kinds[k]); i++) {
                const struct pass p = schedule_pass(kinds[k], steps, i);
                const double sum = p.t + p.z + p.v + p.kept + p.keep_z + p.keep_v;
                CHECK(isfinite(sum), "%s, pass %d of %d steps", names[k], i, steps);
                CHECK(i > 0 || (p.t == 1 && p.kept == 0), "%s: the start", names[k]);
            }
    for (int steps = 1; steps < 6; steps++) {
        const struct pass last = schedule_pass(SAMPLER_DPM, steps, steps - 1);
        CHECK(last.z == 1 && last.v == -last.t && last.kept == 0, "dpm++ in %d steps", steps);
    }
    return PASSED;
}

// ---- the same on a device -----------------------------------------------------------------------

enum { POINTS = 24, STEPS = 7 };

// One pass by the operation: v of z as it is on the device, in f32.
static int device_pass(struct op_run *r, const struct pass *p, struct operand *z,
                       struct operand *kept, struct operand *v, struct operand *k)
{
    const double update[FLOW_STEP_COUNT] = {p->z, p->v, p->kept, p->keep_z, p->keep_v, 1};
    double slope[POINTS];
    CHECK(op_read(r, z) == 0, "guard bands");
    for (int i = 0; i < POINTS; i++)
        slope[i] = velocity(z->v[i], p->t, 0.3, 0.6);
    op_rewrite(r, v, slope);
    op_rewrite(r, k, update);
    OK(OP_RUN(r, op_flow_step(&r->c, &z->t, kept ? &kept->t : NULL, &v->t, &k->t, 1)));
    return PASSED;
}

static int device_case(unsigned flags, enum sampler_kind kind)
{
    static const double none[FLOW_STEP_COUNT];
    struct op_run r;
    OK(op_begin(&r, flags, 5));
    struct operand *z = op_random(&r, F32, -2, 2, DIMS(2, 1, 3, 4));
    struct operand *v = op_random(&r, F32, -2, 2, DIMS(2, 1, 3, 4));
    struct operand *kept = schedule_keeps(kind) ? op_output(&r, F32, DIMS(2, 1, 3, 4)) : NULL;
    struct operand *k = op_values(&r, F32, none, DIMS(FLOW_STEP_COUNT));
    double *want = op_doubles(&r, POINTS);
    for (int i = 0; i < POINTS; i++)
        want[i] = follow(kind, STEPS, z->v[i], 0.3, 0.6);
    for (int i = 0; i < STEPS * schedule_passes(kind); i++) {
        const struct pass p = schedule_pass(kind, STEPS, i);
        CHECK(device_pass(&r, &p, z, kept, v, k) == PASSED, "pass %d", i);
    }
    op_judge(&r, z, want, 3e-6, "%s", names[kind]);
    return op_end(&r);
}

static int device_follows(void)
{
    int failed = 0;
    for (int f = 0; f < 4; f++)
        for (int k = 0; k < KINDS; k++)
            failed |= device_case(op_flags[f], kinds[k]);
    return failed ? FAILED : PASSED;
}

// ---- the sampler of the model -------------------------------------------------------------------

static const struct config small = {.layers = 1,
                                    .hidden = 32,
                                    .heads = 2,
                                    .patch = 4,
                                    .channels = 4,
                                    .size = 8,
                                    .classes = 3,
                                    .experts = 2,
                                    .topk = 2,
                                    .shared = 1,
                                    .moe = MOE_ALL,
                                    .learn_sigma = true,
                                    .balance = 0.01f,
                                    .class_dropout = 0.1f};
// More images than fit into the conditioning of all passes at once.
enum { IMAGES = 150, IMAGE = 4 * 8 * 8, OUT = 2 * IMAGE, MODEL_STEPS = 4 };

// The initial network answers zero.
static int randomise(struct dit *d)
{
    OK(dit_init(d, 7));
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const int64_t count = param_count(p);
        float *values = malloc((size_t)count * sizeof *values);
        rng_normal_fill(7, (uint64_t)i, 0, values, (size_t)count);
        for (int64_t j = 0; j < count; j++)
            values[j] *= 0.2f;
        int code = p->frozen ? 0 : param_write(&d->ctx, &d->w, p, values);
        free(values);
        OK(code);
    }
    return PASSED;
}

struct by_hand {
    float input[2 * IMAGES * IMAGE], output[2 * IMAGES * OUT], t[2 * IMAGES];
    double z[IMAGES * IMAGE], kept[IMAGES * IMAGE];
};

static int evaluate(struct dit *d, struct by_hand *h, double t)
{
    for (int i = 0; i < 2 * IMAGES * IMAGE; i++)
        h->input[i] = (float)h->z[i % (IMAGES * IMAGE)];
    for (int n = 0; n < 2 * IMAGES; n++)
        h->t[n] = (float)t;
    OK(tensor_write(&d->ctx, &d->input, h->input));
    OK(tensor_write(&d->ctx, &d->t, h->t));
    OK(dit_forward(d));
    OK(tensor_read(&d->ctx, &d->output, h->output));
    return PASSED;
}

// What sampler_run() should draw from noise: each pass with an ordinary forward pass, in double.
static int draw_by_hand(struct dit *d, const struct sample_options *o, struct by_hand *h)
{
    for (int i = 0; i < o->steps * schedule_passes(o->kind); i++) {
        const struct pass p = schedule_pass(o->kind, o->steps, i);
        const bool inside = !o->interval || (p.t >= o->cfg_from && p.t <= o->cfg_to);
        CHECK(evaluate(d, h, p.t) == PASSED, "pass %d", i);
        for (int j = 0; j < IMAGES * IMAGE; j++) {
            const int n = j / IMAGE, at = j % IMAGE, channel = at / 64;
            const bool guided = inside && (!o->cfg_channels || channel < o->cfg_channels);
            const double class = h->output[n * OUT + at], z = h->z[j];
            const double null = h->output[(IMAGES + n) * OUT + at];
            const double v = guided ? null + o->cfg * (class - null) : class;
            h->z[j] = p.z * z + p.v * v + (p.kept != 0 ? p.kept * h->kept[j] : 0);
            h->kept[j] = p.keep_z * z + p.keep_v * v;
        }
    }
    return PASSED;
}

static double difference(const float *found, const double *want)
{
    double error = 0, size = 0;
    for (int i = 0; i < IMAGES * IMAGE; i++) {
        error += pow(found[i] - want[i], 2);
        size += want[i] * want[i];
    }
    return sqrt(error / size); // NaN is no number that passes
}

// The sampler's progress counts steps, whatever they take.
static int count_steps(void *user, int done, int total)
{
    int *count = user;
    return ++*count == done && total == MODEL_STEPS ? 0 : fail(ERR_INPUT, "%d of %d", done, total);
}

static int draw_both(struct device *dev, struct stream *stream, struct dit *plain,
                     const struct sample_options *o, struct by_hand *h, float *latents)
{
    static int32_t classes[IMAGES], labels[2 * IMAGES];
    static float noise[IMAGES * IMAGE];
    struct sampler *s;
    int done = 0;
    for (int i = 0; i < IMAGES * IMAGE; i++)
        h->z[i] = noise[i] = 1.5f * sinf((float)(i * i % 10007));
    for (int n = 0; n < IMAGES; n++) {
        classes[n] = labels[n] = n % small.classes;
        labels[IMAGES + n] = small.classes;
    }
    OK(tensor_write(&plain->ctx, &plain->labels, labels));
    CHECK(draw_by_hand(plain, o, h) == PASSED, "by hand");
    OK(sampler_new(dev, stream, &small, IMAGES, o, &s));
    CHECK(randomise(s->dit) == PASSED, "weights");
    CHECK(o->cfg == 1 || s->dit->options.ahead < s->passes, "all passes are conditioned at once");
    OK(sampler_run(s, IMAGES, classes, noise, latents, NULL, NULL)); // leaves something kept behind
    OK(sampler_run(s, IMAGES, classes, noise, latents, count_steps, &done));
    sampler_free(s);
    CHECK(done == MODEL_STEPS, "%d steps", done);
    return PASSED;
}

static const struct sample_options guidance[] = {
    {.cfg = 1},
    {.cfg = 3},
    {.cfg = 3, .cfg_channels = 3},
    {.cfg = 3, .interval = true, .cfg_from = 0.5f, .cfg_to = 0.75f},
};
enum { WAYS = sizeof guidance / sizeof guidance[0] };

static int draw_all(struct device *dev, struct stream *stream, struct dit *plain)
{
    static struct by_hand hand;
    static float found[KINDS * WAYS][IMAGES * IMAGE];
    for (int i = 0; i < KINDS * WAYS; i++) {
        struct sample_options o = guidance[i % WAYS];
        o.kind = kinds[i / WAYS];
        o.steps = MODEL_STEPS;
        CHECK(draw_both(dev, stream, plain, &o, &hand, found[i]) == PASSED, "%s", names[o.kind]);
        const double error = difference(found[i], hand.z);
        CHECK(error < 1e-4, "%s, guidance %d: differs by %g", names[o.kind], i % WAYS, error);
        for (int other = 0; other < i; other++) { // no two ways lead to the same images
            const double gap = difference(found[other], hand.z);
            CHECK(gap > 1e-3, "%d and %d differ by %g only", i, other, gap);
        }
    }
    return PASSED;
}

static int model_follows(void)
{
    const struct dit_options o = {.batch = 2 * IMAGES};
    struct device *dev = test_device(0);
    struct stream *stream;
    struct dit *plain;
    if (!dev)
        return SKIPPED;
    OK(dev->api->stream_new(dev, &stream));
    OK(dit_new(dev, stream, &small, &o, &plain));
    OK(dit_layout(plain));
    OK(dit_commit(plain));
    CHECK(randomise(plain) == PASSED, "weights");
    int result = draw_all(dev, stream, plain);
    dit_free(plain);
    dev->api->stream_free(stream);
    return result;
}

const struct test sampler_tests[] = {
    {"order_of_convergence", order_of_convergence},
    {"dpm_as_published", dpm_as_published},
    {"ends_are_exact", ends_are_exact},
    {"device_follows", device_follows},
    {"model_follows", model_follows},
    {0},
};
