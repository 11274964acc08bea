// f32 in two halves (runtime/tensor.h): rounding, joining, and the optimiser's weights. The
// residual stream in two halves is tested in fused_test.c.
#include "tests/op_table.h"

#include <math.h>
#include <string.h>

static double nearest_bf16(double value)
{
    const float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    float out;
    memcpy(&out, &bits, 4);
    return (double)out;
}

static int round_case(struct op_run *r, const int *s)
{
    struct operand *w = op_random(r, F32, -2, 2, DIMS(s[0]));
    struct operand *half = op_output(r, BF16, DIMS(s[0])), *wide = op_output(r, F32, DIMS(s[0]));
    double *want = op_doubles(r, s[0]);
    for (int i = 0; i < s[0]; i++)
        want[i] = nearest_bf16(w->v[i]);
    OK(OP_RUN(r, op_round(&r->c, &half->t, NULL, &w->t)));
    op_judge_exact(r, half, want, "round %d", s[0]);
    OK(OP_RUN(r, op_widen(&r->c, &wide->t, &half->t, NULL)));
    op_judge_exact(r, wide, want, "widen %d", s[0]);

    struct operand *low = op_output(r, BF16, DIMS(s[0])); // raw bits
    w->v[0] = 1 + 1.0 / 256;                              // a tie
    w->v[s[0] - 1] = -1 - 3.0 / 256;
    op_rewrite(r, w, w->v);
    OK(OP_RUN(r, op_round(&r->c, &half->t, &low->t, &w->t)));
    OK(OP_RUN(r, op_widen(&r->c, &wide->t, &half->t, &low->t)));
    op_judge_exact(r, wide, w->v, "both halves of %d", s[0]);
    OK(op_read(r, half));
    for (int i = 0; i < s[0]; i++)
        CHECK(fabs(half->v[i] - w->v[i]) == fabs(nearest_bf16(w->v[i]) - w->v[i]),
              "%g is not the nearest to %g", half->v[i], w->v[i]);
    return PASSED;
}

static int rounding(void)
{
    static const int sizes[][6] = {{1}, {1023}, {4097}};
    return OP_FOR_ALL(round_case, sizes);
}

// The optimiser's state beside its control words.
struct slab {
    struct operand *w, *low, *m, *v, *ema, *g, *control;
};

static int update(struct op_run *r, struct slab *s, const struct adamw *a)
{
    OK(OP_RUN(r, op_norm2(&r->c, &s->control->t, &s->g->t, false)));
    OK(op_read(r, s->control));
    double norm2 = 0, control[CONTROL_COUNT] = {0};
    for (int64_t i = 0; i < s->g->count; i++)
        norm2 += s->g->v[i] * s->g->v[i];
    CHECK(fabs(s->control->v[0] / norm2 - 1) < 1e-6, "norm2 %.9g for %.9g", s->control->v[0],
          norm2);
    control[CONTROL_SCALE] = 0.5;
    control[CONTROL_RATE] = a->rate;
    control[CONTROL_BIAS1] = 1 - a->beta1;
    control[CONTROL_BIAS2] = 1 - a->beta2;
    control[CONTROL_EMA] = 0.75;
    op_rewrite(r, s->control, control);
    OK(OP_RUN(r, op_adamw(&r->c, &s->w->t, &s->m->t, &s->v->t, &s->ema->t, &s->g->t, &s->control->t,
                          s->low ? &s->low->t : NULL, a)));
    return PASSED;
}

// The same update of f32 weights and of weights in two halves has the same bits.
static int adamw_case(struct op_run *r, const int *s)
{
    const struct adamw a = {.rate = 1e-2, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .decay = 0.1};
    if (r->c.dev->cpu_forms)
        return PASSED; // f32 only
    struct slab one = {.w = op_random(r, F32, -1, 1, DIMS(s[0])),
                       .m = op_random(r, F32, -1, 1, DIMS(s[0])),
                       .v = op_random(r, F32, 0, 1, DIMS(s[0])),
                       .ema = op_random(r, F32, -1, 1, DIMS(s[0])),
                       .g = op_random(r, F32, -1, 1, DIMS(s[0])),
                       .control = op_output(r, F32, DIMS(CONTROL_COUNT))};
    struct slab two = one;
    two.w = op_output(r, BF16, DIMS(s[0]));
    two.low = op_random(r, BF16, 0, 0, DIMS(s[0]));
    two.m = op_values(r, F32, one.m->v, DIMS(s[0]));
    two.v = op_values(r, F32, one.v->v, DIMS(s[0]));
    two.ema = op_values(r, F32, one.ema->v, DIMS(s[0]));
    OK(OP_RUN(r, op_round(&r->c, &two.w->t, NULL, &one.w->t)));
    OK(OP_RUN(r, op_widen(&r->c, &one.w->t, &two.w->t, NULL))); // start from bf16
    for (int t = 0; t < 3; t++) {
        CHECK(update(r, &one, &a) == PASSED && update(r, &two, &a) == PASSED, "step %d", t);
        op_read(r, one.w);
    }
    struct operand *joined = op_output(r, F32, DIMS(s[0]));
    OK(OP_RUN(r, op_widen(&r->c, &joined->t, &two.w->t, &two.low->t)));
    op_judge_exact(r, joined, one.w->v, "adamw in halves, %d", s[0]);
    double *want = op_doubles(r, s[0]);
    op_read(r, two.w);
    for (int i = 0; i < s[0]; i++)
        want[i] =
            fabs(two.w->v[i] - one.w->v[i]) <= fabs(one.w->v[i]) / 256 ? two.w->v[i] : (double)NAN;
    op_judge_exact(r, two.w, want, "adamw: the upper half is the nearest, %d", s[0]);
    op_read(r, one.ema);
    op_judge_exact(r, two.ema, one.ema->v, "adamw ema in halves, %d", s[0]);
    return PASSED;
}

static int adamw(void)
{
    static const int sizes[][6] = {{1}, {1023}, {4096}, {70001}};
    return OP_FOR_ALL(adamw_case, sizes);
}

const struct test halves_tests[] = {
    {"rounding", rounding},
    {"adamw", adamw},
    {NULL, NULL},
};
