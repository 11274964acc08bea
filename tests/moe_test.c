// Mixture of experts against naive double-precision references, in every form and storage type.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FOR_FLAGS(flags) for (const unsigned *flags = op_flags; flags < op_flags + 4; flags++)

// How the tokens choose their experts.
enum pattern { RANDOM, ALL_ON_ONE, ONE_EMPTY, EVERY };

struct shape {
    int M, K, E, D, G; // tokens, choices, experts, columns, balance groups
    enum pattern pattern;
};
static const struct shape shapes[] = {
    {1, 1, 1, 1, 1, RANDOM},     {1, 2, 3, 16, 1, RANDOM},        {37, 2, 8, 385, 37, RANDOM},
    {64, 1, 8, 64, 4, RANDOM},   {65, 2, 8, 65, 13, ONE_EMPTY},   {50, 2, 7, 48, 5, ALL_ON_ONE},
    {31, 5, 5, 17, 1, EVERY},    {129, 3, 33, 257, 43, RANDOM},   {40, 6, 64, 96, 2, RANDOM},
    {9, 64, 512, 33, 3, RANDOM}, {6, 64, 64, 20, 6, EVERY},       {1000, 2, 16, 24, 1, RANDOM},
    {300, 8, 300, 8, 2, RANDOM}, {257, 1, 2, 256, 1, ALL_ON_ONE},
};
#define FOR_SHAPES(s) \
    for (const struct shape *s = shapes; s < shapes + sizeof shapes / sizeof *shapes; s++)

// ---- inputs -------------------------------------------------------------------------------------

static bool chosen_before(const double *index, int count, double e)
{
    for (int k = 0; k < count; k++)
        if (index[k] == e)
            return true;
    return false;
}

// index[M,K]: distinct experts a token.
static double *choose(struct op_run *r, const struct shape *s)
{
    double *index = op_doubles(r, (int64_t)s->M * s->K);
    for (int m = 0; m < s->M; m++) {
        for (int k = 0; k < s->K; k++) {
            double e;
            do
                e = floor(op_uniform(r, 0, s->E));
            while (chosen_before(index + m * s->K, k, e) || (s->pattern == ONE_EMPTY && e == 1));
            if (s->pattern == ALL_ON_ONE)
                e = (s->E - 2 + k) % s->E;
            index[m * s->K + k] = e;
        }
    }
    return index;
}

struct route {
    double *offsets, *slot, *token;
};

// Sorts pair by pair: all of expert 0 in token order, then all of expert 1...
static struct route ref_route(struct op_run *r, const struct shape *s, const double *index)
{
    int R = s->M * s->K, row = 0;
    struct route to = {op_doubles(r, s->E + 1), op_doubles(r, R), op_doubles(r, R)};
    for (int e = 0; e < s->E; e++) {
        to.offsets[e] = row;
        for (int pair = 0; pair < R; pair++) {
            if (index[pair] != e)
                continue;
            to.slot[pair] = row;
            to.token[row++] = pair / s->K;
        }
    }
    to.offsets[s->E] = row;
    return to;
}

// ---- SwiGLU -------------------------------------------------------------------------------------

struct swiglu {
    int R, F;
};

static void ref_swiglu(const double *gu, double *h, const void *args)
{
    const struct swiglu *s = args;
    for (int r = 0; r < s->R; r++)
        for (int f = 0; f < s->F; f++) {
            double g = gu[(2 * r) * s->F + f], u = gu[(2 * r + 1) * s->F + f];
            h[r * s->F + f] = g / (1 + exp(-g)) * u;
        }
}

static void ref_swiglu_bwd(double *dgu, const double *dh, const double *gu, const struct swiglu *s)
{
    for (int r = 0; r < s->R; r++)
        for (int f = 0; f < s->F; f++) {
            int at = 2 * r * s->F + f;
            double g = gu[at], u = gu[at + s->F], q = 1 / (1 + exp(-g)), d = dh[r * s->F + f];
            dgu[at] = d * u * (q + g * q * (1 - q));
            dgu[at + s->F] = d * g * q;
        }
}

static int swiglu_case(unsigned flags, int R, int F, double range)
{
    struct op_run r;
    struct swiglu s = {R, F};
    OK(op_begin(&r, flags, (uint64_t)(R * 1000 + F)));
    struct operand *gu = op_random(&r, r.act, -range, range, DIMS(R, 2 * F));
    struct operand *dh = op_random(&r, r.act, -1, 1, DIMS(R, F));
    struct operand *h = op_output(&r, r.act, DIMS(R, F));
    struct operand *dgu = op_output(&r, r.act, DIMS(R, 2 * F));
    double *want = op_doubles(&r, gu->count);
    ref_swiglu(gu->v, want, &s);
    OK(OP_RUN(&r, op_swiglu_fwd(&r.c, &h->t, &gu->t)));
    op_judge(&r, h, want, op_tolerance(&r, 1e-6), "swiglu_fwd %dx%d", R, F);
    ref_swiglu_bwd(want, dh->v, gu->v, &s);
    OK(OP_RUN(&r, op_swiglu_bwd(&r.c, &dgu->t, &dh->t, &gu->t)));
    op_judge(&r, dgu, want, op_tolerance(&r, 1e-6), "swiglu_bwd %dx%d", R, F);
    OK(OP_RUN(&r, op_swiglu_bwd(&r.c, &gu->t, &dh->t, &gu->t)));
    op_judge(&r, gu, want, op_tolerance(&r, 1e-6), "swiglu_bwd in place %dx%d", R, F);
    return op_end(&r);
}

static int swiglu(void)
{
    static const int sizes[][2] = {{1, 1}, {3, 16}, {37, 17}, {5, 385}, {64, 256}, {131, 257}};
    int failed = 0;
    FOR_FLAGS(flags)
    for (int i = 0; i < 6; i++)
        failed |= swiglu_case(*flags, sizes[i][0], sizes[i][1], i % 2 ? 4 : 60);
    return failed ? FAILED : PASSED;
}

static int swiglu_reference(void)
{
    struct op_run r;
    struct swiglu s = {3, 5};
    OK(op_begin(&r, 0, 1));
    double *gu = op_doubles(&r, 30), *dh = op_doubles(&r, 15), *dgu = op_doubles(&r, 30);
    for (int i = 0; i < 30; i++)
        gu[i] = op_uniform(&r, -3, 3);
    for (int i = 0; i < 15; i++)
        dh[i] = op_uniform(&r, -1, 1);
    ref_swiglu_bwd(dgu, dh, gu, &s);
    double error = op_difference(ref_swiglu, &s, gu, 30, dh, 15, dgu);
    CHECK(error < 1e-7, "%g", error);
    return op_end(&r);
}

// ---- router -------------------------------------------------------------------------------------

static void ref_softmax(double *p, const double *x, int E)
{
    double most = x[0], sum = 0;
    for (int e = 0; e < E; e++)
        most = fmax(most, x[e]);
    for (int e = 0; e < E; e++)
        sum += p[e] = exp(x[e] - most);
    for (int e = 0; e < E; e++)
        p[e] /= sum;
}

// The rank of expert e in its row: how many come before it.
static int rank_of(const double *p, int E, int e)
{
    int rank = 0;
    for (int j = 0; j < E; j++)
        rank += p[j] > p[e] || (p[j] == p[e] && j < e);
    return rank;
}

// The choice among the device's own probabilities, which must be exact.
static void ref_choice(double *index, const double *p, int E, int K)
{
    for (int e = 0; e < E; e++) {
        int rank = rank_of(p, E, e);
        if (rank < K)
            index[rank] = e;
    }
}

static void ref_weights(double *weight, const double *p, const double *index, int K,
                        bool renormalise)
{
    double sum = 1;
    for (int k = 0; k < K; k++)
        weight[k] = p[(int)index[k]];
    if (renormalise && K > 1) {
        sum = 1e-20;
        for (int k = 0; k < K; k++)
            sum += weight[k];
    }
    for (int k = 0; k < K; k++)
        weight[k] /= sum;
}

static int router_case(unsigned flags, const struct shape *s, bool renormalise, double range)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->M + s->E)));
    struct operand *logits = op_random(&r, F32, -range, range, DIMS(s->M, s->E));
    struct operand *probs = op_output(&r, F32, DIMS(s->M, s->E));
    struct operand *weight = op_output(&r, F32, DIMS(s->M, s->K));
    struct operand *index = op_output(&r, I32, DIMS(s->M, s->K));
    double *p = op_doubles(&r, probs->count), *i = op_doubles(&r, index->count);
    double *w = op_doubles(&r, index->count);
    OK(OP_RUN(&r, op_router_fwd(&r.c, &probs->t, &weight->t, &index->t, &logits->t, renormalise)));
    for (int m = 0; m < s->M; m++)
        ref_softmax(p + m * s->E, logits->v + m * s->E, s->E);
    op_judge(&r, probs, p, 1e-6, "router probabilities %dx%d", s->M, s->E);
    for (int m = 0; m < s->M; m++) {
        ref_choice(i + m * s->K, probs->v + m * s->E, s->E, s->K);
        ref_weights(w + m * s->K, p + m * s->E, i + m * s->K, s->K, renormalise);
    }
    op_judge_exact(&r, index, i, "router index %dx%d", s->M, s->E);
    op_judge(&r, weight, w, 2e-6, "router weight %dx%d", s->M, s->E);
    return op_end(&r);
}

static int router(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_SHAPES(s)
    {
        failed |= router_case(*flags, s, false, 3);
        failed |= router_case(*flags, s, true, 30);
    }
    return failed ? FAILED : PASSED;
}

static int valid_choices(const double *index, int E, int K)
{
    for (int k = 0; k < K; k++) {
        CHECK(index[k] >= 0 && index[k] < E, "choice %d is %g", k, index[k]);
        CHECK(!chosen_before(index, k, index[k]), "choice %d repeats %g", k, index[k]);
    }
    return PASSED;
}

// Rows that no training should meet: each gives K distinct experts all the same, and NaN weights
// where the probabilities are NaN.
static int router_odd_case(unsigned flags, int E, int K)
{
    enum { ROWS = 6 };
    struct op_run r;
    OK(op_begin(&r, flags, 3));
    double *x = op_doubles(&r, ROWS * E), *lowest = op_doubles(&r, K);
    for (int e = 0; e < E; e++) {
        x[e] = NAN;
        x[E + e] = e == 2 ? NAN : (double)e;
        x[2 * E + e] = e == 1 || e == 3 ? INFINITY : 0;
        x[3 * E + e] = -INFINITY;
        x[4 * E + e] = 0.25;
        x[5 * E + e] = e % 2 ? -INFINITY : 1.0;
    }
    for (int k = 0; k < K; k++)
        lowest[k] = k;
    struct operand *logits = op_values(&r, F32, x, DIMS(ROWS, E));
    struct operand *probs = op_output(&r, F32, DIMS(ROWS, E));
    struct operand *weight = op_output(&r, F32, DIMS(ROWS, K));
    struct operand *index = op_output(&r, I32, DIMS(ROWS, K));
    OK(OP_RUN(&r, op_router_fwd(&r.c, &probs->t, &weight->t, &index->t, &logits->t, true)));
    CHECK(op_read(&r, index) == 0 && op_read(&r, weight) == 0, "guards");
    for (int m = 0; m < ROWS; m++)
        CHECK(valid_choices(index->v + m * K, E, K) == PASSED, "row %d", m);
    for (int k = 0; k < K; k++) {
        CHECK(isnan(weight->v[k]) && isnan(weight->v[K + k]), "a NaN row has weights");
        CHECK(index->v[4 * K + k] == lowest[k], "a tie goes to the lower expert");
        CHECK(fabs(weight->v[4 * K + k] * K - 1) < 1e-6, "equal weights");
    }
    for (int k = 0; k < K && 2 * k < E; k++)
        CHECK(index->v[5 * K + k] == 2 * k, "-inf has probability 0");
    return op_end(&r);
}

static int router_odd(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    {
        failed |= router_odd_case(*flags, 8, 2);
        failed |= router_odd_case(*flags, 37, 37);
        failed |= router_odd_case(*flags, 512, 64);
    }
    return failed ? FAILED : PASSED;
}

struct gate {
    int E, K, rows; // rows: tokens a balance group
    int M;
    const double *index, *dweight, *fraction;
    double alpha;
    bool renormalise;
};

// out[0] = <dweight, weights(softmax(logits))> + balance loss with constant fractions.
static void ref_gate(const double *logits, double *out, const void *args)
{
    const struct gate *g = args;
    int groups = g->M / g->rows;
    out[0] = 0;
    for (int m = 0; m < g->M; m++) {
        double p[64], w[64];
        ref_softmax(p, logits + m * g->E, g->E);
        ref_weights(w, p, g->index + m * g->K, g->K, g->renormalise);
        for (int k = 0; k < g->K; k++)
            out[0] += g->dweight[m * g->K + k] * w[k];
        for (int e = 0; e < g->E; e++)
            out[0] += g->alpha / groups * g->fraction[m / g->rows * g->E + e] * p[e] / g->rows;
    }
}

// d weight_k / d p_j by the quotient rule, then the whole Jacobian of softmax.
static void ref_gate_bwd(double *dlogits, const double *probs, const struct gate *g)
{
    for (int m = 0; m < g->M; m++) {
        const double *p = probs + m * g->E, *index = g->index + m * g->K;
        double dp[512] = {0}, sum = 1e-20;
        for (int k = 0; k < g->K; k++)
            sum += p[(int)index[k]];
        for (int e = 0; e < g->E; e++)
            dp[e] = g->alpha * g->fraction[m / g->rows * g->E + e] / g->M;
        for (int k = 0; k < g->K; k++)
            for (int j = 0; j < g->K; j++) {
                double dw = g->dweight[m * g->K + k];
                if (!g->renormalise || g->K < 2)
                    dp[(int)index[j]] += j == k ? dw : 0;
                else
                    dp[(int)index[j]] += dw * ((j == k) * sum - p[(int)index[k]]) / (sum * sum);
            }
        for (int e = 0; e < g->E; e++) {
            dlogits[m * g->E + e] = 0;
            for (int j = 0; j < g->E; j++)
                dlogits[m * g->E + e] += dp[j] * p[j] * ((j == e) - p[e]);
        }
    }
}

static int router_bwd_case(unsigned flags, const struct shape *s, double alpha, bool renormalise)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->M + 7 * s->E)));
    double *p = op_doubles(&r, (int64_t)s->M * s->E), *x = op_doubles(&r, s->E);
    for (int m = 0; m < s->M; m++) {
        for (int e = 0; e < s->E; e++)
            x[e] = op_uniform(&r, -2, 2);
        ref_softmax(p + m * s->E, x, s->E);
    }
    struct operand *probs = op_values(&r, F32, p, DIMS(s->M, s->E));
    struct operand *index = op_values(&r, I32, choose(&r, s), DIMS(s->M, s->K));
    struct operand *dweight = op_random(&r, F32, -1, 1, DIMS(s->M, s->K));
    struct operand *fraction = op_random(&r, F32, 0, 2, DIMS(s->G, s->E));
    struct operand *dlogits = op_output(&r, F32, DIMS(s->M, s->E));
    struct gate g = {s->E,       s->K,        s->M / s->G,          s->M,       index->v,
                     dweight->v, fraction->v, (double)(float)alpha, renormalise};
    OK(OP_RUN(&r, op_router_bwd(&r.c, &dlogits->t, &dweight->t, &probs->t, &index->t,
                                alpha != 0 ? &fraction->t : NULL, (float)alpha, renormalise)));
    ref_gate_bwd(p, probs->v, &g);
    if (s->E > 1) // with one expert the answer is 0 but for rounding
        op_judge(&r, dlogits, p, 1e-5, "router_bwd %dx%d top %d", s->M, s->E, s->K);
    return op_end(&r);
}

static int router_bwd(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_SHAPES(s)
    for (int i = 0; i < 4; i++)
        failed |= router_bwd_case(*flags, s, i & 1 ? 20 : 0, i & 2);
    return failed ? FAILED : PASSED;
}

static int router_reference(void)
{
    struct op_run r;
    const struct shape s = {6, 3, 5, 0, 2, RANDOM};
    OK(op_begin(&r, 0, 5));
    double *logits = op_doubles(&r, 30), *p = op_doubles(&r, 30), *d = op_doubles(&r, 30);
    double *dweight = op_doubles(&r, 18), *fraction = op_doubles(&r, 10);
    for (int i = 0; i < 30; i++)
        logits[i] = op_uniform(&r, -2, 2);
    for (int i = 0; i < 18; i++)
        dweight[i] = op_uniform(&r, -1, 1);
    for (int i = 0; i < 10; i++)
        fraction[i] = op_uniform(&r, 0, 2);
    for (int m = 0; m < 6; m++)
        ref_softmax(p + 5 * m, logits + 5 * m, 5);
    for (int i = 0; i < 2; i++) {
        struct gate g = {5, 3, 3, 6, choose(&r, &s), dweight, fraction, 0.7, i};
        ref_gate_bwd(d, p, &g);
        double error = op_difference(ref_gate, &g, logits, 30, (double[]){1}, 1, d);
        CHECK(error < 1e-7, "%g with renormalise %d", error, i);
    }
    return op_end(&r);
}

// ---- routing ------------------------------------------------------------------------------------

static int route_case(unsigned flags, const struct shape *s)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->M * 3 + s->E)));
    struct operand *index = op_values(&r, I32, choose(&r, s), DIMS(s->M, s->K));
    struct operand *offsets = op_output(&r, I32, DIMS(s->E + 1));
    struct operand *slot = op_output(&r, I32, DIMS(s->M, s->K));
    struct operand *token = op_output(&r, I32, DIMS(s->M * s->K));
    struct route want = ref_route(&r, s, index->v);
    OK(OP_RUN(&r, op_route(&r.c, &offsets->t, &slot->t, &token->t, &index->t)));
    op_judge_exact(&r, offsets, want.offsets, "route offsets %dx%d of %d", s->M, s->K, s->E);
    op_judge_exact(&r, slot, want.slot, "route slot %dx%d of %d", s->M, s->K, s->E);
    op_judge_exact(&r, token, want.token, "route token %dx%d of %d", s->M, s->K, s->E);
    return op_end(&r);
}

static int route(void)
{
    static const struct shape large[] = {{35001, 2, 8, 0, 1, RANDOM},
                                         {66000, 1, 3, 0, 1, ALL_ON_ONE},
                                         {12800, 2, 300, 0, 1, ONE_EMPTY}};
    int failed = 0;
    for (int gpu = 0; gpu < 2; gpu++) {
        FOR_SHAPES(s)
        failed |= route_case(gpu ? OPEN_GPU_FORMS : 0, s);
        for (int i = 0; i < 3; i++)
            failed |= route_case(gpu ? OPEN_GPU_FORMS : 0, &large[i]);
    }
    return failed ? FAILED : PASSED;
}

// ---- dispatch and combine -----------------------------------------------------------------------

static void ref_dispatch_bwd(double *dx, const double *drows, const double *slot,
                             const struct shape *s)
{
    for (int pair = 0; pair < s->M * s->K; pair++)
        for (int d = 0; d < s->D; d++)
            dx[pair / s->K * s->D + d] += drows[(int)slot[pair] * s->D + d];
}

static int dispatch_case(unsigned flags, const struct shape *s)
{
    struct op_run r;
    int R = s->M * s->K;
    OK(op_begin(&r, flags, (uint64_t)(s->M + s->D)));
    struct route to = ref_route(&r, s, choose(&r, s));
    struct operand *slot = op_values(&r, I32, to.slot, DIMS(s->M, s->K));
    struct operand *token = op_values(&r, I32, to.token, DIMS(R));
    struct operand *x = op_random(&r, r.act, -1, 1, DIMS(s->M, s->D));
    struct operand *rows = op_output(&r, r.act, DIMS(R, s->D));
    double *want = op_doubles(&r, (int64_t)R * s->D), *dx = op_doubles(&r, x->count);
    for (int row = 0; row < R; row++)
        memcpy(want + row * s->D, x->v + (int)to.token[row] * s->D, (size_t)s->D * sizeof *want);
    OK(OP_RUN(&r, op_dispatch_fwd(&r.c, &rows->t, &x->t, &token->t, &slot->t)));
    op_judge_exact(&r, rows, want, "dispatch_fwd %dx%d top %d", s->M, s->D, s->K);
    struct operand *drows = op_random(&r, r.act, -1, 1, DIMS(R, s->D));
    memcpy(dx, x->v, (size_t)x->count * sizeof *dx);
    ref_dispatch_bwd(dx, drows->v, to.slot, s);
    OK(OP_RUN(&r, op_dispatch_bwd(&r.c, &x->t, &drows->t, &slot->t)));
    op_judge(&r, x, dx, op_tolerance(&r, 1e-6), "dispatch_bwd %dx%d top %d", s->M, s->D, s->K);
    return op_end(&r);
}

static int dispatch(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_SHAPES(s)
    failed |= dispatch_case(*flags, s);
    return failed ? FAILED : PASSED;
}

struct combine {
    const struct shape *s;
    const double *slot, *weight, *rows,
        *shared; // of weight and rows, the one that varies is not read
};

static void ref_combine(double *out, const struct combine *a)
{
    const struct shape *s = a->s;
    for (int m = 0; m < s->M; m++)
        for (int d = 0; d < s->D; d++) {
            double sum = a->shared ? a->shared[m * s->D + d] : 0;
            for (int k = 0; k < s->K; k++)
                sum += a->weight[m * s->K + k] * a->rows[(int)a->slot[m * s->K + k] * s->D + d];
            out[m * s->D + d] = sum;
        }
}

static void ref_combine_bwd(double *drows, double *dweight, const double *dout,
                            const struct combine *a)
{
    const struct shape *s = a->s;
    for (int pair = 0; pair < s->M * s->K; pair++) {
        int row = (int)a->slot[pair] * s->D, m = pair / s->K * s->D;
        dweight[pair] = 0;
        for (int d = 0; d < s->D; d++) {
            drows[row + d] = a->weight[pair] * dout[m + d];
            dweight[pair] += dout[m + d] * a->rows[row + d];
        }
    }
}

static int combine_case(unsigned flags, const struct shape *s)
{
    struct op_run r;
    int R = s->M * s->K;
    OK(op_begin(&r, flags, (uint64_t)(s->M + 5 * s->D)));
    struct route to = ref_route(&r, s, choose(&r, s));
    struct operand *slot = op_values(&r, I32, to.slot, DIMS(s->M, s->K));
    struct operand *weight = op_random(&r, F32, 0, 1, DIMS(s->M, s->K));
    struct operand *rows = op_random(&r, r.act, -1, 1, DIMS(R, s->D));
    struct operand *shared = op_random(&r, r.act, -1, 1, DIMS(s->M, s->D));
    struct operand *out = op_output(&r, r.act, DIMS(s->M, s->D));
    double *want = op_doubles(&r, rows->count + R), *dweights = want + rows->count;
    struct combine a = {s, to.slot, weight->v, rows->v, shared->v};
    ref_combine(want, &a);
    OK(OP_RUN(&r, op_combine_fwd(&r.c, &out->t, &rows->t, &slot->t, &weight->t, &shared->t)));
    op_judge(&r, out, want, op_tolerance(&r, 2e-6), "combine_fwd shared %dx%d", s->M, s->D);
    a.shared = NULL;
    ref_combine(want, &a);
    OK(OP_RUN(&r, op_combine_fwd(&r.c, &out->t, &rows->t, &slot->t, &weight->t, NULL)));
    op_judge(&r, out, want, op_tolerance(&r, 2e-6), "combine_fwd %dx%d", s->M, s->D);

    struct operand *drows = op_output(&r, r.act, DIMS(R, s->D));
    struct operand *dweight = op_output(&r, F32, DIMS(s->M, s->K));
    ref_combine_bwd(want, dweights, shared->v, &a);
    OK(OP_RUN(&r, op_combine_bwd(&r.c, &drows->t, &dweight->t, &shared->t, &rows->t, &slot->t,
                                 &weight->t)));
    op_judge(&r, drows, want, op_tolerance(&r, 1e-6), "combine_bwd rows %dx%d", s->M, s->D);
    op_judge(&r, dweight, dweights, 1e-5, "combine_bwd weight %dx%d", s->M, s->D);
    struct operand *alone = op_output(&r, r.act, DIMS(R, s->D));
    OK(OP_RUN(&r, op_combine_bwd(&r.c, &alone->t, NULL, &shared->t, NULL, &slot->t, &weight->t)));
    op_judge(&r, alone, want, op_tolerance(&r, 1e-6), "combine_bwd rows alone %dx%d", s->M, s->D);
    OK(OP_RUN(&r, op_combine_bwd(&r.c, &rows->t, &dweight->t, &shared->t, &rows->t, &slot->t,
                                 &weight->t)));
    op_judge(&r, rows, want, op_tolerance(&r, 1e-6), "combine_bwd in place %dx%d", s->M, s->D);
    op_judge(&r, dweight, dweights, 1e-5, "combine_bwd weight in place %dx%d", s->M, s->D);
    return op_end(&r);
}

// dweight from sums over parts of the experts' columns, in the order of rows.
static int combine_weight_case(unsigned flags, const struct shape *s)
{
    enum { PARTS = 5 };
    struct op_run r;
    const int R = s->M * s->K;
    OK(op_begin(&r, flags, (uint64_t)(s->M + 7 * s->D)));
    struct route to = ref_route(&r, s, choose(&r, s));
    struct operand *slot = op_values(&r, I32, to.slot, DIMS(s->M, s->K));
    double *weights = op_doubles(&r, R), *want = op_doubles(&r, R);
    for (int i = 0; i < R; i++)
        weights[i] = i % 7 == 3 ? 0 : op_uniform(&r, 0.1, 1);
    struct operand *weight = op_values(&r, F32, weights, DIMS(s->M, s->K));
    struct operand *dots = op_random(&r, F32, -1, 1, DIMS(PARTS, R));
    struct operand *dweight = op_output(&r, F32, DIMS(s->M, s->K));
    for (int i = 0; i < R; i++)
        for (int part = 0; part < PARTS && weight->v[i] != 0; part++)
            want[i] += dots->v[part * R + (int)to.slot[i]] / weight->v[i];
    OK(OP_RUN(&r, op_combine_weight_bwd(&r.c, &dweight->t, &dots->t, &slot->t, &weight->t)));
    op_judge(&r, dweight, want, 1e-6, "combine_weight_bwd %dx%d", s->M, s->K);
    return op_end(&r);
}

static int combine_weight(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_SHAPES(s)
    failed |= combine_weight_case(*flags, s);
    return failed ? FAILED : PASSED;
}

static int combine(void)
{
    int failed = 0;
    FOR_FLAGS(flags)
    FOR_SHAPES(s)
    failed |= combine_case(*flags, s);
    return failed ? FAILED : PASSED;
}

static void combine_of_rows(const double *rows, double *out, const void *args)
{
    struct combine a = *(const struct combine *)args;
    a.rows = rows;
    ref_combine(out, &a);
}

static void combine_of_weight(const double *weight, double *out, const void *args)
{
    struct combine a = *(const struct combine *)args;
    a.weight = weight;
    ref_combine(out, &a);
}

// x -> rows: the adjoint of ref_dispatch_bwd.
static void dispatch_of_x(const double *x, double *rows, const void *args)
{
    const struct combine *a = args;
    for (int pair = 0; pair < a->s->M * a->s->K; pair++)
        for (int d = 0; d < a->s->D; d++)
            rows[(int)a->slot[pair] * a->s->D + d] = x[pair / a->s->K * a->s->D + d];
}

static int combine_reference(void)
{
    struct op_run r;
    const struct shape s = {5, 2, 4, 3, 1, RANDOM};
    OK(op_begin(&r, 0, 9));
    struct route to = ref_route(&r, &s, choose(&r, &s));
    double *rows = op_doubles(&r, 30), *weight = op_doubles(&r, 10), *dout = op_doubles(&r, 30);
    double *drows = op_doubles(&r, 30), *dweight = op_doubles(&r, 10), *dx = op_doubles(&r, 15);
    double *x = op_doubles(&r, 15);
    for (int i = 0; i < 30; i++) {
        rows[i] = op_uniform(&r, -1, 1);
        dout[i] = op_uniform(&r, -1, 1);
        weight[i / 3] = op_uniform(&r, 0, 1);
        x[i / 2] = op_uniform(&r, -1, 1);
    }
    struct combine a = {&s, to.slot, weight, rows, NULL};
    ref_combine_bwd(drows, dweight, dout, &a);
    CHECK(op_difference(combine_of_rows, &a, rows, 30, dout, 15, drows) < 1e-7, "rows");
    CHECK(op_difference(combine_of_weight, &a, weight, 10, dout, 15, dweight) < 1e-7, "weight");
    ref_dispatch_bwd(dx, dout, to.slot, &s);
    CHECK(op_difference(dispatch_of_x, &a, x, 15, dout, 30, dx) < 1e-7, "dispatch");
    return op_end(&r);
}

// ---- balance ------------------------------------------------------------------------------------

static int balance_case(unsigned flags, const struct shape *s)
{
    struct op_run r;
    OK(op_begin(&r, flags, (uint64_t)(s->M + 11 * s->E)));
    struct operand *index = op_values(&r, I32, choose(&r, s), DIMS(s->M, s->K));
    struct operand *probs = op_random(&r, F32, 0, 1, DIMS(s->M, s->E));
    struct operand *fraction = op_output(&r, F32, DIMS(s->G, s->E));
    struct operand *mean = op_output(&r, F32, DIMS(s->G, s->E));
    double *f = op_doubles(&r, fraction->count), *p = op_doubles(&r, fraction->count);
    int rows = s->M / s->G;
    for (int m = 0; m < s->M; m++) {
        for (int k = 0; k < s->K; k++)
            f[m / rows * s->E + (int)index->v[m * s->K + k]] += (double)s->E / rows / s->K;
        for (int e = 0; e < s->E; e++)
            p[m / rows * s->E + e] += probs->v[m * s->E + e] / rows;
    }
    OK(OP_RUN(&r, op_balance(&r.c, &fraction->t, &mean->t, &index->t, &probs->t)));
    op_judge(&r, fraction, f, 1e-6, "balance fraction %dx%d/%d", s->M, s->E, s->G);
    op_judge(&r, mean, p, 2e-6, "balance mean %dx%d/%d", s->M, s->E, s->G);
    return op_end(&r);
}

static int balance(void)
{
    static const struct shape large = {6000, 2, 8, 0, 2, RANDOM};
    int failed = 0;
    for (int gpu = 0; gpu < 2; gpu++) {
        FOR_SHAPES(s)
        failed |= balance_case(gpu ? OPEN_GPU_FORMS : 0, s);
        failed |= balance_case(gpu ? OPEN_GPU_FORMS : 0, &large);
    }
    return failed ? FAILED : PASSED;
}

const struct test moe_tests[] = {
    {"swiglu_reference", swiglu_reference},
    {"swiglu", swiglu},
    {"router", router},
    {"router_odd", router_odd},
    {"router_reference", router_reference},
    {"router_bwd", router_bwd},
    {"route", route},
    {"dispatch", dispatch},
    {"combine_reference", combine_reference},
    {"combine", combine},
    {"combine_weight", combine_weight},
    {"balance", balance},
    {0},
};
