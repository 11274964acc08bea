// Random numbers and the optimiser against double-precision references.
#include "runtime/rng.h"
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// These operations are f32 whatever the activations: one storage type, both forms, and bf16 once.
#define FOR_FLAGS(flags) for (const unsigned *flags = op_flags; flags < op_flags + 4; flags++)

// ---- random numbers -----------------------------------------------------------------------------

// The published answers of Philox 4x32-10 (Random123's kat_vectors).
static int philox(void)
{
    static const struct {
        uint64_t seed, stream, block;
        uint32_t words[4];
    } known[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {0x299f31d0a4093822,
         0x0370734413198a2e,
         0x85a308d3243f6a88,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t got[4];
        rng_philox(known[i].seed, known[i].stream, known[i].block, got);
        for (int k = 0; k < 4; k++)
            CHECK(got[k] == known[i].words[k], "vector %d word %d: %08x", i, k, got[k]);
    }
    for (uint64_t i = 0; i < 4; i++)
        CHECK(rng_u32(0, 0, i) == known[0].words[i], "word %d", (int)i);
    return PASSED;
}

static int uniform(void)
{
    double sum = 0, squares = 0;
    enum { COUNT = 200000 };
    int bins[64] = {0};
    for (int i = 0; i < COUNT; i++) {
        float u = rng_uniform(7, rng_stream(RNG_TIME, 1), (uint64_t)i);
        CHECK(u > 0 && u < 1, "%g", (double)u);
        bins[(int)(u * 64)]++;
        sum += (double)u;
        squares += (double)(u * u);
    }
    double chi = 0;
    for (int b = 0; b < 64; b++)
        chi += pow(bins[b] - COUNT / 64.0, 2) / (COUNT / 64.0);
    CHECK(fabs(sum / COUNT - 0.5) < 5 * sqrt(1.0 / 12 / COUNT), "mean %g", sum / COUNT);
    CHECK(fabs(squares / COUNT - 1.0 / 3) < 5 * sqrt(4.0 / 45 / COUNT), "%g", squares / COUNT);
    CHECK(chi > 20 && chi < 130, "chi-square of 63 degrees: %g", chi);
    return PASSED;
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// Moments, neighbours, tails, and the Kolmogorov-Smirnov distance (which sorts `z`).
static int looks_normal(float *z, int count)
{
    double n = count, m1 = 0, m2 = 0, m3 = 0, m4 = 0, next = 0, distance = 0;
    int beyond3 = 0, beyond4 = 0;
    for (int i = 0; i < count; i++) {
        double x = (double)z[i];
        CHECK(isfinite(x), "element %d is %g", i, x);
        m1 += x / n;
        m2 += x * x / n;
        m3 += x * x * x / n;
        m4 += x * x * x * x / n;
        next += i ? x * (double)z[i - 1] / n : 0;
        beyond3 += fabs(x) > 3;
        beyond4 += fabs(x) > 4;
    }
    CHECK(fabs(m1) < 4.5 / sqrt(n) && fabs(next) < 4.5 / sqrt(n), "mean %g, lag 1 %g", m1, next);
    CHECK(fabs(m2 - 1) < 4.5 * sqrt(2 / n), "variance %g", m2);
    CHECK(fabs(m3) < 4.5 * sqrt(15 / n), "third moment %g", m3);
    CHECK(fabs(m4 - 3) < 4.5 * sqrt(96 / n), "fourth moment %g", m4);
    CHECK(fabs(beyond3 - 2.699796e-3 * n) < 4.5 * sqrt(2.7e-3 * n), "%d beyond 3", beyond3);
    CHECK(fabs(beyond4 - 6.334248e-5 * n) < 4.5 * sqrt(6.4e-5 * n) + 1, "%d beyond 4", beyond4);
    qsort(z, (size_t)count, sizeof *z, ascending);
    for (int i = 0; i < count; i++) {
        double p = 0.5 * erfc(-(double)z[i] / sqrt(2));
        distance = fmax(distance, fmax(fabs(p - i / n), fabs(p - (i + 1) / n)));
    }
    CHECK(distance < 1.95 / sqrt(n), "Kolmogorov-Smirnov %g", distance * sqrt(n)); // p = 0.001
    return PASSED;
}

static int normal_case(unsigned flags, int64_t count, uint64_t seed, uint64_t stream, uint64_t first)
{
    struct op_run r;
    OK(op_begin(&r, flags, 1));
    struct operand *out = op_output(&r, F32, DIMS(count));
    double *want = op_doubles(&r, count);
    float *host = malloc((size_t)count * sizeof *host);
    rng_normal_fill(seed, stream, first, host, (size_t)count);
    for (int64_t i = 0; i < count; i++)
        want[i] = (double)host[i];
    OK(OP_RUN(&r, op_normal(&r.c, &out->t, seed, stream, first)));
    op_judge_exact(&r, out, want, "normal, seed %llx", (unsigned long long)seed);
    int odd = count >= 100000 ? looks_normal(host, (int)count) : PASSED;
    free(host);
    CHECK(odd == PASSED, "seed %llx", (unsigned long long)seed);
    return op_end(&r);
}

static int normal(void)
{
    int failed = 0;
    for (int64_t count = 1; count < 12; count++)
        failed |= normal_case(0, count, 5, 6, 4 * (uint64_t)(count % 3));
    failed |= normal_case(0, 1000003, 0x123456789abcdef0, rng_stream(RNG_NOISE, 17), 0);
    failed |= normal_case(OPEN_GPU_FORMS, 300001, UINT64_MAX, rng_stream(RNG_INIT, 3), 4004);
    return failed ? FAILED : PASSED;
}

// The same elements whichever way they are asked for, and nothing shared between streams.
static int normal_fill(void)
{
    float part[23];
    for (uint64_t first = 0; first < 9; first++)
        for (size_t count = 0; count < 23; count++) {
            rng_normal_fill(9, 8, first, part, count);
            for (size_t i = 0; i < count; i++)
                CHECK(part[i] == rng_normal(9, 8, first + i), "%zu of %zu", i, count);
        }
    CHECK(rng_normal(9, 8, 0) != rng_normal(9, 9, 0), "streams differ");
    CHECK(rng_normal(9, 8, 0) != rng_normal(10, 8, 0), "seeds differ");
    CHECK(rng_normal(9, 8, 0) != rng_normal(9, 8, (uint64_t)1 << 40), "blocks differ");
    return PASSED;
}

// ---- norm ---------------------------------------------------------------------------------------

static int norm2_case(unsigned flags, int64_t count, double low, double high)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)count));
    struct operand *g = op_random(&r, F32, low, high, DIMS(count));
    struct operand *control = op_output(&r, F32, DIMS(CONTROL_COUNT));
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += g->v[i] * g->v[i];
    OK(OP_RUN(&r, op_norm2(&r.c, &control->t, &g->t, false)));
    CHECK(op_read(&r, control) == 0, "guards");
    float once = (float)control->v[0];
    CHECK(fabs(control->v[0] / sum - 1) < 1e-6, "%.9g for %.9g", control->v[0], sum);
    OK(OP_RUN(&r, op_norm2(&r.c, &control->t, &g->t, true)));
    CHECK(op_read(&r, control) == 0, "guards");
    CHECK((float)control->v[0] == once + once, "accumulated: %.9g", control->v[0]);
    for (int i = 1; i < CONTROL_COUNT; i++)
        CHECK(isnan(control->v[i]), "entry %d was written", i);
    return op_end(&r);
}

static int norm2(void)
{
    static const int64_t counts[] = {1, 31, 4096, 4097, 65536 + 17, 3000001};
    int failed = 0;
    for (int i = 0; i < 6; i++) {
        failed |= norm2_case(0, counts[i], -1, 1);
        failed |= norm2_case(OPEN_GPU_FORMS, counts[i], 0.9, 1.1);
    }
    return failed ? FAILED : PASSED;
}

// ---- AdamW --------------------------------------------------------------------------------------

// The state of one run in double: torch.optim.AdamW with torch.nn.utils.clip_grad_norm_ before it
// and an EMA after it.
struct adam_state {
    int count, t;
    double *w, *m, *v, *ema;
};

static void ref_adamw(struct adam_state *s, const double *g, const struct adamw *a)
{
    double norm = 0, scale = 1;
    for (int i = 0; i < s->count; i++)
        norm += g[i] * g[i];
    if (a->clip > 0)
        scale = fmin(1, a->clip / (sqrt(norm) + 1e-6));
    s->t++;
    double rate = a->rate * (a->warmup > 0 ? fmin(1, (double)s->t / a->warmup) : 1);
    double decay = fmin(a->ema, (1.0 + s->t) / (10.0 + s->t));
    for (int i = 0; i < s->count; i++) {
        s->w[i] *= 1 - rate * a->decay;
        s->m[i] = a->beta1 * s->m[i] + (1 - a->beta1) * g[i] * scale;
        s->v[i] = a->beta2 * s->v[i] + (1 - a->beta2) * pow(g[i] * scale, 2);
        double denominator = sqrt(s->v[i]) / sqrt(1 - pow(a->beta2, s->t)) + a->eps;
        s->w[i] -= rate / (1 - pow(a->beta1, s->t)) * s->m[i] / denominator;
        s->ema[i] = decay * s->ema[i] + (1 - decay) * s->w[i];
    }
}

struct slab {
    struct operand *w, *m, *v, *ema, *g, *control, *counts, *loss;
};

static void new_slab(struct op_run *r, struct slab *s, int count)
{
    double zero[CONTROL_COUNT] = {0};
    double *zeros = op_doubles(r, count);
    s->w = op_random(r, F32, -1, 1, DIMS(count));
    s->m = op_values(r, F32, zeros, DIMS(count));
    s->v = op_values(r, F32, zeros, DIMS(count));
    s->ema = op_values(r, F32, s->w->v, DIMS(count));
    s->g = op_random(r, F32, -1, 1, DIMS(count));
    s->control = op_output(r, F32, DIMS(CONTROL_COUNT));
    s->counts = op_values(r, I32, zero, DIMS(2));
    s->loss = op_random(r, F32, 0.5, 1.5, DIMS(13));
}

static int step(struct op_run *r, struct slab *s, const struct adamw *a, bool with_ema)
{
    OK(OP_RUN(r, op_norm2(&r->c, &s->control->t, &s->g->t, false)));
    OK(OP_RUN(r, op_adamw_control(&r->c, &s->control->t, &s->counts->t, &s->loss->t, a)));
    OK(OP_RUN(r, op_adamw(&r->c, &s->w->t, &s->m->t, &s->v->t, with_ema ? &s->ema->t : NULL,
                          &s->g->t, &s->control->t, NULL, a)));
    return PASSED;
}

static double *copy_of(struct op_run *r, const struct operand *o)
{
    double *copy = op_doubles(r, o->count);
    memcpy(copy, o->v, (size_t)o->count * sizeof *copy);
    return copy;
}

static int adamw_case(unsigned flags, int count, const struct adamw *a, int steps)
{
    struct op_run r;
    struct slab s;
    OK(op_begin(&r, flags, (uint64_t)(count + steps)));
    new_slab(&r, &s, count);
    struct adam_state want = {
        count, 0, copy_of(&r, s.w), op_doubles(&r, count), op_doubles(&r, count), copy_of(&r, s.w)};
    for (int t = 0; t < steps; t++) {
        for (int i = 0; i < count; i++) // sizes over six decades, some exact zeros
            s.g->v[i] =
                i % 11 == 3 ? 0 : op_uniform(&r, -1, 1) * pow(10, -(i % 7)) * (t % 3 ? 1 : 10);
        op_rewrite(&r, s.g, s.g->v);
        CHECK(step(&r, &s, a, true) == PASSED, "step %d", t);
        ref_adamw(&want, s.g->v, a);
    }
    op_judge(&r, s.w, want.w, 1e-6, "adamw weights, %d values, %d steps", count, steps);
    op_judge(&r, s.m, want.m, 1e-6, "adamw m, %d values, %d steps", count, steps);
    op_judge(&r, s.v, want.v, 1e-6, "adamw v, %d values, %d steps", count, steps);
    op_judge(&r, s.ema, want.ema, 1e-6, "adamw ema, %d values, %d steps", count, steps);
    op_judge_exact(&r, s.counts, (double[]){steps, 0}, "adamw counts");
    return op_end(&r);
}

static const struct adamw plain = {
    .rate = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .ema = 0.9999};
static const struct adamw full = {.rate = 1e-2,
                                  .beta1 = 0.8,
                                  .beta2 = 0.99,
                                  .eps = 1e-6,
                                  .decay = 0.1,
                                  .clip = 0.7,
                                  .warmup = 5,
                                  .ema = 0.5};

static int adamw(void)
{
    static const int counts[] = {1, 15, 257, 5003};
    int failed = 0;
    for (int gpu = 0; gpu < 2; gpu++)
        for (int i = 0; i < 4; i++) {
            unsigned flags = gpu ? OPEN_GPU_FORMS : 0;
            failed |= adamw_case(flags, counts[i], &plain, 1);
            failed |= adamw_case(flags, counts[i], &plain, 25);
            failed |= adamw_case(flags, counts[i], &full, 12);
        }
    return failed ? FAILED : PASSED;
}

// Of one update, every weight's change is right to 1e-6 of itself (not only the weight): from zero
// weights, so that the weight is the change.
static int adamw_update(void)
{
    FOR_FLAGS(flags)
    {
        struct op_run r;
        struct slab s;
        OK(op_begin(&r, *flags, 6));
        new_slab(&r, &s, 1000);
        op_rewrite(&r, s.w, op_doubles(&r, 1000));
        struct adam_state want = {1000,
                                  0,
                                  op_doubles(&r, 1000),
                                  op_doubles(&r, 1000),
                                  op_doubles(&r, 1000),
                                  op_doubles(&r, 1000)};
        for (int t = 1; t < 4; t++) {
            CHECK(step(&r, &s, &full, true) == PASSED, "step %d", t);
            ref_adamw(&want, s.g->v, &full);
            CHECK(op_read(&r, s.w) == 0, "guards");
            for (int i = 0; i < 1000; i++)
                CHECK(fabs(s.w->v[i] - want.w[i]) <= 1e-6 * fabs(want.w[i]),
                      "step %d: %.9g for %.9g", t, s.w->v[i], want.w[i]);
        }
        CHECK(op_end(&r) == PASSED, "end");
    }
    return PASSED;
}

static int control_case(unsigned flags, const struct adamw *a, int t, double norm2)
{
    struct op_run r;
    double in[CONTROL_COUNT] = {norm2}, mean = 0;
    OK(op_begin(&r, flags, (uint64_t)t));
    struct operand *control = op_values(&r, F32, in, DIMS(CONTROL_COUNT));
    struct operand *counts = op_values(&r, I32, (double[]){t - 1, 4}, DIMS(2));
    struct operand *loss = op_random(&r, F32, 0.5, 1.5, DIMS(201));
    for (int i = 0; i < 201; i++)
        mean += loss->v[i] / 201;
    double want[CONTROL_COUNT] = {
        [CONTROL_NORM2] = control->v[0],
        [CONTROL_SCALE] = a->clip > 0 ? fmin(1, a->clip / (sqrt(norm2) + 1e-6)) : 1,
        [CONTROL_RATE] = a->rate * (t < a->warmup ? (double)t / a->warmup : 1),
        [CONTROL_BIAS1] = 1 - pow(a->beta1, t),
        [CONTROL_BIAS2] = 1 - pow(a->beta2, t),
        [CONTROL_EMA] = fmin(a->ema, (1.0 + t) / (10.0 + t)),
        [CONTROL_SUM] = mean,
    };
    OK(OP_RUN(&r, op_adamw_control(&r.c, &control->t, &counts->t, &loss->t, a)));
    op_judge_exact(&r, counts, (double[]){t, 4}, "control counts");
    CHECK(op_read(&r, control) == 0, "guards");
    for (int i = 0; i < CONTROL_COUNT; i++)
        CHECK(fabs(control->v[i] - want[i]) <= 5e-7 * fabs(want[i]),
              "t %d: control[%d]: %.9g for %.9g", t, i, control->v[i], want[i]);
    return op_end(&r);
}

static int control(void)
{
    static const int steps[] = {1, 2, 4, 5, 6, 100, 9999, 1000000};
    int failed = 0;
    FOR_FLAGS(flags)
    for (int i = 0; i < 8; i++) {
        failed |= control_case(*flags, &plain, steps[i], 3.7);
        failed |= control_case(*flags, &full, steps[i], 1e-6);
        failed |= control_case(*flags, &full, steps[i], 1e9);
    }
    return failed ? FAILED : PASSED;
}

// A step with a NaN gradient, an infinite one, or a NaN loss changes nothing but the count.
static int skipped_case(unsigned flags, double gradient, double loss)
{
    struct op_run r;
    struct slab s;
    OK(op_begin(&r, flags, 8));
    new_slab(&r, &s, 300);
    CHECK(step(&r, &s, &full, true) == PASSED, "first step");
    struct operand *kept[] = {s.w, s.m, s.v, s.ema};
    double *before[4];
    for (int i = 0; i < 4; i++) {
        CHECK(op_read(&r, kept[i]) == 0, "guards");
        before[i] = copy_of(&r, kept[i]);
    }
    s.g->v[299] = gradient;
    s.loss->v[5] = loss;
    op_rewrite(&r, s.g, s.g->v);
    op_rewrite(&r, s.loss, s.loss->v);
    CHECK(step(&r, &s, &full, true) == PASSED, "skipped step");
    for (int i = 0; i < 4; i++)
        op_judge_exact(&r, kept[i], before[i], "skipped step, tensor %d", i);
    op_judge_exact(&r, s.counts, (double[]){1, 1}, "skipped step, counts");
    CHECK(op_read(&r, s.control) == 0, "guards");
    CHECK(s.control->v[CONTROL_SKIPPED] == 1 && s.control->v[CONTROL_SCALE] == 0, "control");
    s.g->v[299] = 0.5;
    s.loss->v[5] = 1;
    op_rewrite(&r, s.g, s.g->v);
    op_rewrite(&r, s.loss, s.loss->v);
    CHECK(step(&r, &s, &full, true) == PASSED, "step after");
    op_judge_exact(&r, s.counts, (double[]){2, 1}, "step after, counts");
    CHECK(op_read(&r, s.control) == 0 && s.control->v[CONTROL_SKIPPED] == 0, "applied again");
    return op_end(&r);
}

static int skipped(void)
{
    int failed = 0;
    for (int gpu = 0; gpu < 2; gpu++) {
        unsigned flags = gpu ? OPEN_GPU_FORMS : 0;
        failed |= skipped_case(flags, NAN, 1);
        failed |= skipped_case(flags, -INFINITY, 1);
        failed |= skipped_case(flags, 3e38, 1); // its square overflows
        failed |= skipped_case(flags, 0.5, NAN);
        failed |= skipped_case(flags, 0.5, INFINITY);
    }
    return failed ? FAILED : PASSED;
}

// Without an EMA; and zeros in padding stay zeros.
static int adamw_padding(void)
{
    for (int gpu = 0; gpu < 2; gpu++) {
        struct op_run r;
        struct slab s;
        OK(op_begin(&r, gpu ? OPEN_GPU_FORMS : 0, 2));
        new_slab(&r, &s, 64);
        double *zeros = op_doubles(&r, 64);
        op_rewrite(&r, s.w, zeros);
        op_rewrite(&r, s.g, zeros);
        double *ema = copy_of(&r, s.ema);
        CHECK(step(&r, &s, &full, false) == PASSED, "step");
        op_judge_exact(&r, s.w, zeros, "padding w");
        op_judge_exact(&r, s.m, zeros, "padding m");
        op_judge_exact(&r, s.v, zeros, "padding v");
        op_judge_exact(&r, s.ema, ema, "no EMA given");
        CHECK(op_end(&r) == PASSED, "end");
    }
    return PASSED;
}

// Updates tensor by tensor: a norm that is not finite ends the step's updates and is counted; a
// finite one, or a step that is skipped already, changes nothing.
static int guard_case(unsigned flags, double norm2, double skipped_before, bool ends)
{
    struct op_run r;
    double in[CONTROL_COUNT] = {[CONTROL_SCALE] = 1, [CONTROL_SKIPPED] = skipped_before};
    double out[CONTROL_COUNT] = {[CONTROL_SCALE] = 1, [CONTROL_SKIPPED] = skipped_before};
    in[CONTROL_NORM2] = out[CONTROL_NORM2] = norm2;
    OK(op_begin(&r, flags, 3));
    struct operand *control = op_values(&r, F32, in, DIMS(CONTROL_COUNT));
    struct operand *counts = op_values(&r, I32, (double[]){7, 2}, DIMS(2));
    OK(OP_RUN(&r, op_adamw_guard(&r.c, &control->t, &counts->t)));
    op_judge_exact(&r, counts, ends ? (double[]){6, 3} : (double[]){7, 2}, "guard's counts");
    if (ends)
        out[CONTROL_SKIPPED] = 1;
    CHECK(op_read(&r, control) == 0, "guards");
    for (int i = 0; i < CONTROL_COUNT; i++)
        CHECK(i == CONTROL_NORM2 || control->v[i] == out[i], "control[%d] is %g", i, control->v[i]);
    return op_end(&r);
}

static int adamw_guard(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    {
        failed |= guard_case(*flags, 5, 0, false);
        failed |= guard_case(*flags, INFINITY, 0, true);
        failed |= guard_case(*flags, NAN, 0, true);
        failed |= guard_case(*flags, NAN, 1, false);
    }
    return failed ? FAILED : PASSED;
}

const struct test train_ops_tests[] = {
    {"philox", philox},
    {"uniform", uniform},
    {"normal", normal},
    {"normal_fill", normal_fill},
    {"norm2", norm2},
    {"adamw", adamw},
    {"adamw_update", adamw_update},
    {"adamw_control", control},
    {"adamw_skipped", skipped},
    {"adamw_padding", adamw_padding},
    {"adamw_guard", adamw_guard},
    {0},
};
