// Matrix products against plain double-precision sums: every form of struct gemm, every storage
// type, odd shapes, in the CPU and the GPU form; and the operations built on them.
#include "tests/op_table.h"

#include <math.h>
#include <string.h>

enum { GROUPS_MAX = 16, LONG_SUM = 2048 };

// One product to test. counts: rows of each expert; spare: stored rows past the last expert's.
struct product {
    enum gemm_ragged ragged;
    int m, n, k;
    bool trans_a, trans_b, accumulate, bias;
    enum dtype a, b, c;
    int groups, counts[GROUPS_MAX], spare;
};

// The experts' first rows; offsets[groups] is the number of rows in use.
static void offsets_of(const struct product *p, double offsets[GROUPS_MAX + 1])
{
    offsets[0] = 0;
    for (int e = 0; e < p->groups; e++)
        offsets[e + 1] = offsets[e] + p->counts[e];
}

static double element(const double *v, bool transposed, int rows, int cols, int i, int j)
{
    return transposed ? v[(int64_t)j * rows + i] : v[(int64_t)i * cols + j];
}

// want[m,n] (+)= op(a) op(b) over rows [row0, row1) of C and [k0, k1) of the sum
static void reference(const struct product *p, double *want, const double *a, const double *b,
                      const double *bias, int row0, int row1, int k0, int k1)
{
    for (int i = row0; i < row1; i++)
        for (int j = 0; j < p->n; j++) {
            double sum = bias ? bias[j] : 0;
            for (int s = k0; s < k1; s++)
                sum += element(a, p->trans_a, p->m, p->k, i, s) *
                       element(b, p->trans_b, p->k, p->n, s, j);
            double *c = &want[(int64_t)i * p->n + j];
            *c = (p->accumulate ? *c : 0) + sum;
        }
}

static void expect(const struct product *p, double *want, const struct operand *a,
                   const struct operand *b, const struct operand *bias, const double *offsets)
{
    if (p->ragged == GEMM_PLAIN)
        reference(p, want, a->v, b->v, bias ? bias->v : NULL, 0, p->m, 0, p->k);
    for (int e = 0; e < p->groups; e++) {
        int from = (int)offsets[e], to = (int)offsets[e + 1];
        if (p->ragged == GEMM_RAGGED_M)
            reference(p, want, a->v, b->v + (int64_t)e * p->n * p->k, NULL, from, to, 0, p->k);
        else
            reference(p, want + (int64_t)e * p->m * p->n, a->v, b->v, NULL, 0, p->m, from, to);
    }
}

// Random values; NaN in the rows past the last expert's, which nothing may read.
static struct operand *rows_with_spare(struct op_run *r, enum dtype type, int64_t rows,
                                       int64_t cols, int spare)
{
    double *v = op_doubles(r, rows * cols);
    for (int64_t i = 0; i < rows * cols; i++)
        v[i] = i < (rows - spare) * cols ? op_uniform(r, -1, 1) : (double)NAN;
    return op_values(r, type, v, DIMS(rows, cols));
}

static int run_gemm(struct op_run *r, struct gemm *g)
{
    r->c.space_wanted = r->c.dev->api->gemm_space(r->c.dev, g);
    TRY(op_ready(r));
    g->space = r->c.space_wanted ? r->c.space.mem : NULL;
    return r->c.dev->api->gemm(r->c.stream, g);
}

static const char *describe(const struct product *p)
{
    static char text[200];
    int length = snprintf(text, sizeof text, "%s%s%s m=%d n=%d k=%d %s,%s->%s%s%s",
                          p->ragged == GEMM_PLAIN      ? "plain"
                          : p->ragged == GEMM_RAGGED_M ? "ragged m"
                                                       : "ragged k",
                          p->trans_a ? " A^T" : "", p->trans_b ? " B^T" : "", p->m, p->n, p->k,
                          dtype_name(p->a), dtype_name(p->b), dtype_name(p->c),
                          p->accumulate ? " accumulate" : "", p->bias ? " bias" : "");
    for (int e = 0; e < p->groups; e++)
        length += snprintf(text + length, sizeof text - (size_t)length, " %d", p->counts[e]);
    return text;
}

static int try_product(unsigned flags, const struct product *given)
{
    struct product p = *given;
    struct op_run r;
    double offsets[GROUPS_MAX + 1];
    offsets_of(&p, offsets);
    int stored = (int)offsets[p.groups] + p.spare;
    if (p.ragged == GEMM_RAGGED_M)
        p.m = stored;
    if (p.ragged == GEMM_RAGGED_K)
        p.k = stored;
    OK(op_begin(&r, flags, (uint64_t)(p.m * 7919 + p.n * 31 + p.k)));
    int a_spare = p.ragged == GEMM_PLAIN ? 0 : p.spare;
    int matrices_b = p.ragged == GEMM_RAGGED_M ? p.groups : 1;
    int matrices_c = p.ragged == GEMM_RAGGED_K ? p.groups : 1;
    struct operand *a =
        rows_with_spare(&r, p.a, p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k, a_spare);
    struct operand *b = p.ragged == GEMM_RAGGED_K
                            ? rows_with_spare(&r, p.b, p.k, p.n, p.spare)
                            : op_random(&r, p.b, -1, 1, DIMS(matrices_b, p.n, p.k));
    struct operand *bias = p.bias ? op_random(&r, F32, -1, 1, DIMS(p.n)) : NULL;
    bool keeps = p.accumulate || (p.ragged == GEMM_RAGGED_M && p.spare);
    struct operand *c = keeps ? op_random(&r, p.c, -1, 1, DIMS(matrices_c, p.m, p.n))
                              : op_output(&r, p.c, DIMS(matrices_c, p.m, p.n));
    struct operand *o = op_values(&r, I32, offsets, DIMS(p.groups + 1));
    double *want = op_doubles(&r, c->count);
    if (keeps)
        memcpy(want, c->v, (size_t)c->count * sizeof *want);
    expect(&p, want, a, b, bias, offsets);
    struct gemm g = {.ragged = p.ragged,
                     .m = p.m,
                     .n = p.n,
                     .k = p.k,
                     .trans_a = p.trans_a,
                     .trans_b = p.trans_b,
                     .accumulate = p.accumulate,
                     .a = a->t.mem,
                     .b = b->t.mem,
                     .c = c->t.mem,
                     .type_a = p.a,
                     .type_b = p.b,
                     .type_c = p.c,
                     .bias = bias ? bias->t.mem : NULL,
                     .groups = p.groups,
                     .offsets = p.ragged == GEMM_PLAIN ? NULL : o->t.mem};
    OK(run_gemm(&r, &g));
    op_judge(&r, c, want, p.c == BF16 ? 4e-3 : 1e-6, "%s", describe(&p));
    return op_end(&r);
}

// The product with every meaningful set of storage types; with and without accumulation.
static int try_types(unsigned flags, struct product p)
{
    int failures = 0;
    for (int types = 0; types < 4; types++) {
        p.a = types & 1 ? BF16 : F32;
        p.c = types & 2 ? BF16 : F32;
        p.b = p.trans_a ? (types == 1 ? F32 : p.a) : F32;
        p.accumulate = types == 0 || types == 3 ? !p.bias : p.trans_a;
        failures += try_product(flags, &p) != PASSED;
        if (flags & OPEN_BF16)
            continue;
        p.accumulate = !p.accumulate && !p.bias;
        failures += try_product(flags, &p) != PASSED;
    }
    return failures ? FAILED : PASSED;
}

static const int shapes[][3] = {
    {1, 1, 1},    {37, 385, 41},  {385, 37, 23},  {128, 64, 32}, {129, 65, 33}, {8, 96, 512},
    {96, 8, 64},  {12, 32, 16},   {13, 33, 17},   {2, 96, 16},   {1, 130, 70},  {50, 16, 1},
    {5, 7, 1100}, {24, 64, 1025}, {100, 48, 100}, {33, 257, 12},
};

static int try_shapes(bool trans_a, bool trans_b, bool bias)
{
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct product p = {.m = shapes[i][0], .n = shapes[i][1], .k = shapes[i][2]};
            p.trans_a = trans_a;
            p.trans_b = trans_b;
            p.bias = bias && i % 2 == 1;
            failures += try_types(op_flags[f], p) != PASSED;
        }
    return failures ? FAILED : PASSED;
}

static int test_nt(void)
{
    return try_shapes(false, true, true);
}

static int test_nn(void)
{
    return try_shapes(false, false, false);
}

static int test_tn(void)
{
    return try_shapes(true, false, false);
}

static const struct product raggeds[] = {
    {.n = 33, .k = 20, .groups = 4, .counts = {13, 0, 1, 25}},
    {.n = 64, .k = 32, .groups = 8, .counts = {0, 0, 130, 0, 0, 0, 0, 0}}, // all on one
    {.n = 40, .k = 17, .groups = 3, .counts = {12, 24, 128}, .spare = 9},
    {.n = 96, .k = 48, .groups = 1, .counts = {37}},
    {.n = 7, .k = 5, .groups = 5, .counts = {1, 1, 0, 1, 2}, .spare = 1},
    {.n = 32, .k = 16, .groups = 2, .counts = {0, 0}, .spare = 3}, // nobody came
    {.n = 50,
     .k = 64,
     .groups = 16,
     .counts = {4, 97, 8, 11, 0, 12, 3, 2, 1, 96, 7, 6, 5, 0, 9, 10}},
};

static int try_raggeds(enum gemm_ragged ragged, bool trans_b)
{
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; i < sizeof raggeds / sizeof *raggeds; i++) {
            struct product p = raggeds[i];
            p.ragged = ragged;
            p.trans_a = ragged == GEMM_RAGGED_K;
            p.trans_b = trans_b;
            if (p.trans_a)
                p.m = p.k + 1;
            failures += try_types(op_flags[f], p) != PASSED;
        }
    return failures ? FAILED : PASSED;
}

static int test_ragged_nt(void)
{
    return try_raggeds(GEMM_RAGGED_M, true);
}

static int test_ragged_nn(void)
{
    return try_raggeds(GEMM_RAGGED_M, false);
}

static int test_ragged_tn(void)
{
    return try_raggeds(GEMM_RAGGED_K, false);
}

// ---- operations ---------------------------------------------------------------------------------

// A linear layer and its backward: y, dx, dw, dbias.
static int try_linear(unsigned flags, int m, int n, int k)
{
    struct op_run r;
    OK(op_begin(&r, flags, 11));
    struct operand *x = op_random(&r, r.act, -1, 1, DIMS(m, k));
    struct operand *w = op_random(&r, F32, -1, 1, DIMS(n, k));
    struct operand *bias = op_random(&r, F32, -1, 1, DIMS(n));
    struct operand *y = op_output(&r, r.act, DIMS(m, n));
    struct operand *logits = op_output(&r, F32, DIMS(m, n));
    struct operand *dy = op_random(&r, r.act, -1, 1, DIMS(m, n));
    struct operand *dx = op_output(&r, r.act, DIMS(m, k));
    struct operand *dw = op_random(&r, F32, -1, 1, DIMS(n, k));
    struct operand *dbias = op_random(&r, F32, -1, 1, DIMS(n));
    double *want_y = op_doubles(&r, y->count), *want_plain = op_doubles(&r, y->count);
    double *want_dx = op_doubles(&r, dx->count), *want_dw = op_doubles(&r, dw->count);
    double *want_db = op_doubles(&r, n);
    memcpy(want_dw, dw->v, (size_t)dw->count * sizeof(double));
    memcpy(want_db, dbias->v, (size_t)n * sizeof(double));
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double g = dy->v[i * n + j], *p = &want_plain[i * n + j];
            for (int s = 0; s < k; s++) {
                *p += x->v[i * k + s] * w->v[j * k + s];
                want_dx[i * k + s] += g * w->v[j * k + s];
                want_dw[j * k + s] += g * x->v[i * k + s];
            }
            want_db[j] += g;
            want_y[i * n + j] = *p + bias->v[j];
        }
    OK(OP_RUN(&r, op_linear(&r.c, &y->t, &x->t, &w->t, &bias->t)));
    OK(OP_RUN(&r, op_linear(&r.c, &logits->t, &x->t, &w->t, NULL)));
    OK(OP_RUN(&r, op_linear_dx(&r.c, &dx->t, &dy->t, &w->t, false)));
    OK(OP_RUN(&r, op_linear_dw(&r.c, &dw->t, &dbias->t, &dy->t, &x->t)));
    op_judge(&r, y, want_y, op_tolerance(&r, 1e-6), "linear y %d %d %d", m, n, k);
    op_judge(&r, logits, want_plain, 1e-6, "linear f32 y %d %d %d", m, n, k);
    op_judge(&r, dx, want_dx, op_tolerance(&r, 1e-6), "linear dx %d %d %d", m, n, k);
    op_judge(&r, dw, want_dw, 1e-6, "linear dw %d %d %d", m, n, k);
    op_judge(&r, dbias, want_db, 1e-6, "linear dbias %d %d %d", m, n, k);
    for (int i = 0; i < m * k; i++)
        want_dx[i] += dx->v[i];
    OK(OP_RUN(&r, op_linear_dx(&r.c, &dx->t, &dy->t, &w->t, true)));
    op_judge(&r, dx, want_dx, op_tolerance(&r, 1e-6), "linear dx += %d %d %d", m, n, k);
    return op_end(&r);
}

static int test_linear(void)
{
    static const int sizes[][3] = {{1, 1, 1},     {37, 385, 29}, {128, 64, 96},
                                   {129, 65, 97}, {601, 8, 40},  {64, 256, 12}};
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            failures += try_linear(op_flags[f], sizes[i][0], sizes[i][1], sizes[i][2]) != PASSED;
    return failures ? FAILED : PASSED;
}

// Their squares add up to those of dw.
static void judge_norms(struct op_run *r, struct operand *norms, const double *dw, int64_t count)
{
    double sum = 0, want = 0;
    r->failures += op_read(r, norms);
    for (int64_t i = 0; i < norms->count; i++)
        sum += norms->v[i] * norms->v[i];
    for (int64_t i = 0; i < count; i++)
        want += dw[i] * dw[i];
    if (!(fabs(sum - want) <= 1e-5 * want)) {
        printf("    experts dw: norms give %g, not %g\n", sum, want);
        r->failures++;
    }
}

// The experts' forward and backward on given row counts.
static int try_experts(unsigned flags, const struct product *p)
{
    struct op_run r;
    int n = p->n, k = p->k, groups = p->groups;
    double first[GROUPS_MAX + 1];
    offsets_of(p, first);
    int rows = (int)first[groups];
    OK(op_begin(&r, flags, 12));
    struct operand *offsets = op_values(&r, I32, first, DIMS(groups + 1));
    struct operand *x = op_random(&r, r.act, -1, 1, DIMS(rows, k));
    struct operand *w = op_random(&r, F32, -1, 1, DIMS(groups, n, k));
    struct operand *y = op_output(&r, r.act, DIMS(rows, n));
    struct operand *dy = op_random(&r, r.act, -1, 1, DIMS(rows, n));
    struct operand *dx = op_output(&r, r.act, DIMS(rows, k));
    struct operand *dw = op_random(&r, F32, -1, 1, DIMS(groups, n, k));
    double *want_y = op_doubles(&r, y->count), *want_dx = op_doubles(&r, dx->count);
    double *want_dw = op_doubles(&r, dw->count);
    memcpy(want_dw, dw->v, (size_t)dw->count * sizeof(double));
    for (int e = 0; e < groups; e++)
        for (int i = (int)first[e]; i < (int)first[e + 1]; i++)
            for (int j = 0; j < n; j++)
                for (int s = 0; s < k; s++) {
                    double weight = w->v[(e * n + j) * k + s];
                    want_y[i * n + j] += x->v[i * k + s] * weight;
                    want_dx[i * k + s] += dy->v[i * n + j] * weight;
                    want_dw[(e * n + j) * k + s] += dy->v[i * n + j] * x->v[i * k + s];
                }
    OK(OP_RUN(&r, op_experts(&r.c, &y->t, &x->t, &w->t, &offsets->t)));
    OK(OP_RUN(&r, op_experts_dx(&r.c, &dx->t, &dy->t, &w->t, &offsets->t)));
    const int64_t parts = op_experts_dw_norms(&r.c, &dw->t, rows);
    struct operand *norms = op_output(&r, F32, DIMS(parts ? parts : 1));
    OK(OP_RUN(&r, op_experts_dw(&r.c, &dw->t, parts ? &norms->t : NULL, &dy->t, &x->t,
                                &offsets->t)));
    op_judge(&r, y, want_y, op_tolerance(&r, 1e-6), "experts y");
    op_judge(&r, dx, want_dx, op_tolerance(&r, 1e-6), "experts dx");
    op_judge(&r, dw, want_dw, 1e-6, "experts dw");
    if (parts)
        judge_norms(&r, norms, want_dw, dw->count);
    return op_end(&r);
}

static int test_experts(void)
{
    static const struct product halves = {
        .n = 136, .k = 200, .groups = 4, .counts = {130, 0, 1, 257}};
    int failures = 0;
    for (int f = 0; f < 4; f++) {
        failures += try_experts(op_flags[f], &raggeds[0]) != PASSED;
        failures += try_experts(op_flags[f], &raggeds[1]) != PASSED;
        failures += try_experts(op_flags[f], &raggeds[6]) != PASSED;
        failures += try_experts(op_flags[f], &halves) != PASSED;
    }
    return failures ? FAILED : PASSED;
}

// ---- products and SwiGLU ------------------------------------------------------------------------

// want_gu = x w^T and want_h = silu(g) * u; then the gradient of gu (as stored: `gu`) from dy and
// the down projection. Rows from..to, expert e.
struct swiglu_case {
    int F, inner, outer; // inner: columns of x; outer: columns of dy
    const double *x, *w, *down, *dy, *gu;
    double *want_gu, *want_h, *want_dgu;
};

// k: columns of x and of dy
static struct swiglu_case swiglu_operands(struct op_run *r, int k, const struct operand *x,
                                          const struct operand *w, const struct operand *down,
                                          const struct operand *dy, const struct operand *gu)
{
    return (struct swiglu_case){.F = (int)gu->t.shape[1] / 2,
                                .inner = k,
                                .outer = k,
                                .x = x->v,
                                .w = w->v,
                                .down = down->v,
                                .dy = dy->v,
                                .gu = gu->v,
                                .want_gu = op_doubles(r, gu->count),
                                .want_h = op_doubles(r, gu->count / 2),
                                .want_dgu = op_doubles(r, gu->count)};
}

static void swiglu_rows(const struct swiglu_case *s, int e, int from, int to)
{
    const int F = s->F;
    const double *w = s->w + (int64_t)e * 2 * F * s->inner;
    const double *down = s->down + (int64_t)e * s->outer * F;
    for (int i = from; i < to; i++) {
        for (int j = 0; j < 2 * F; j++)
            for (int k = 0; k < s->inner; k++)
                s->want_gu[i * 2 * F + j] += s->x[i * s->inner + k] * w[j * s->inner + k];
        for (int f = 0; f < F; f++) {
            const double g = s->want_gu[i * 2 * F + f], u = s->want_gu[i * 2 * F + F + f];
            s->want_h[i * F + f] = g / (1 + exp(-g)) * u;
            double dh = 0;
            for (int o = 0; o < s->outer; o++)
                dh += s->dy[i * s->outer + o] * down[o * F + f];
            const double gs = s->gu[i * 2 * F + f], us = s->gu[i * 2 * F + F + f];
            const double q = 1 / (1 + exp(-gs));
            s->want_dgu[i * 2 * F + f] = dh * us * (q + gs * q * (1 - q));
            s->want_dgu[i * 2 * F + F + f] = dh * gs * q;
        }
    }
}

// All rows: those of expert e from first[e]; without groups `rows` rows of one matrix.
static void swiglu_all(const struct swiglu_case *s, int groups, const double *first, int rows)
{
    if (!groups)
        swiglu_rows(s, 0, 0, rows);
    for (int e = 0; e < groups; e++)
        swiglu_rows(s, e, (int)first[e], (int)first[e + 1]);
}

// p: n is F, k both other widths; without groups the plain operations.
static int try_swiglu(unsigned flags, const struct product *p)
{
    struct op_run r;
    const int F = p->n, k = p->k, groups = p->groups, matrices = groups ? groups : 1;
    double first[GROUPS_MAX + 1];
    offsets_of(p, first);
    const int rows = groups ? (int)first[groups] : p->m;
    OK(op_begin(&r, flags, 13));
    const bool fuses = op_swiglu_fuses(&r.c, F);
    struct operand *offsets = groups ? op_values(&r, I32, first, DIMS(groups + 1)) : NULL;
    struct operand *x = op_random(&r, r.act, -1, 1, DIMS(rows, k));
    struct operand *dy = op_random(&r, r.act, -1, 1, DIMS(rows, k));
    struct operand *w = groups ? op_random(&r, F32, -1, 1, DIMS(matrices, 2 * F, k))
                               : op_random(&r, F32, -1, 1, DIMS(2 * F, k));
    struct operand *down = groups ? op_random(&r, F32, -1, 1, DIMS(matrices, k, F))
                                  : op_random(&r, F32, -1, 1, DIMS(k, F));
    struct operand *old = op_random(&r, r.act, -3, 3, DIMS(rows, 2 * F));
    struct operand *gu = op_output(&r, r.act, DIMS(rows, 2 * F));
    struct operand *h = op_output(&r, r.act, DIMS(rows, F));
    struct operand *h_alone = op_output(&r, r.act, DIMS(rows, F));
    struct operand *dh = op_output(&r, r.act, DIMS(rows, F));
    struct swiglu_case s = swiglu_operands(&r, k, x, w, down, dy, old);
    swiglu_all(&s, groups, first, rows);
    struct tensor *scratch = fuses ? NULL : &dh->t;
    if (groups) {
        OK(OP_RUN(&r, op_experts_swiglu(&r.c, &h->t, &gu->t, &x->t, &w->t, &offsets->t)));
        if (fuses)
            OK(OP_RUN(&r, op_experts_swiglu(&r.c, &h_alone->t, NULL, &x->t, &w->t, &offsets->t)));
        OK(OP_RUN(
            &r, op_experts_swiglu_dx(&r.c, &old->t, scratch, NULL, NULL, &dy->t, &down->t, &offsets->t)));
    } else {
        OK(OP_RUN(&r, op_linear_swiglu(&r.c, &h->t, &gu->t, &x->t, &w->t)));
        if (fuses)
            OK(OP_RUN(&r, op_linear_swiglu(&r.c, &h_alone->t, NULL, &x->t, &w->t)));
        OK(OP_RUN(&r, op_linear_swiglu_dx(&r.c, &old->t, scratch, NULL, &dy->t, &down->t)));
    }
    const double tolerance = op_tolerance(&r, 1e-6);
    op_judge(&r, gu, s.want_gu, tolerance, "swiglu product gu %d %d %d", rows, F, k);
    op_judge(&r, h, s.want_h, 2 * tolerance, "swiglu product h %d %d %d", rows, F, k);
    if (fuses)
        op_judge(&r, h_alone, s.want_h, 2 * tolerance, "swiglu h alone %d %d %d", rows, F, k);
    op_judge(&r, old, s.want_dgu, 2 * tolerance, "swiglu product dgu %d %d %d", rows, F, k);
    return op_end(&r);
}

static int test_swiglu(void)
{
    static const struct product cases[] = {
        {.m = 37, .n = 64, .k = 48},
        {.m = 13, .n = 32, .k = 801}, // several steps of k
        {.m = 8, .n = 20, .k = 33},
        {.m = 5, .n = 37, .k = 12},
        {.n = 32, .k = 21, .groups = 4, .counts = {13, 0, 1, 25}},
        {.n = 96, .k = 400, .groups = 3, .counts = {12, 24, 30}},
        {.n = 37, .k = 16, .groups = 3, .counts = {3, 0, 14}},
    };
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            failures += try_swiglu(op_flags[f], &cases[i]) != PASSED;
    return failures ? FAILED : PASSED;
}

// ---- products of bf16 alone, as tuned kernels take them ---------------------------------------

// Columns and k in eighths; more than one tile of 128 rows, of 192 columns, of 64 of k.
static const struct product halves[] = {
    {.m = 1, .n = 8, .k = 8},       {.m = 37, .n = 264, .k = 72},   {.m = 128, .n = 192, .k = 64},
    {.m = 129, .n = 200, .k = 584}, {.m = 300, .n = 392, .k = 136}, {.m = 520, .n = 64, .k = 1032},
    {.m = 2180, .n = 1544, .k = 8}, // more tiles than a GPU has multiprocessors
    {.m = 20, .n = 64, .k = 8200},  // k is divided
};

static const struct product ragged_halves[] = {
    {.n = 72, .k = 40, .groups = 4, .counts = {13, 0, 1, 25}},
    {.n = 64, .k = 32, .groups = 8, .counts = {0, 0, 330, 0, 0, 0, 0, 0}}, // all on one
    {.n = 200, .k = 136, .groups = 5, .counts = {129, 0, 1, 128, 300}, .spare = 70},
    {.n = 32, .k = 16, .groups = 2, .counts = {0, 0}, .spare = 3},         // nobody came
    {.n = 64, .k = 1032, .groups = 3, .counts = {13, 0, 200}, .spare = 7}, // k may be divided
    {.n = 72, .k = 64, .groups = 2, .counts = {1100, 1050}},
    {.n = 64, .k = 8200, .groups = 3, .counts = {13, 0, 7}}, // k is divided
    {.n = 776,
     .k = 136,
     .groups = 16,
     .counts = {4, 97, 8, 11, 0, 12, 3, 2, 1, 96, 7, 65, 64, 0, 9, 200}},
};

// p as A B^T, A B and A^T B, into bf16 and f32, added and not.
static int try_halves(unsigned flags, struct product p, enum gemm_ragged ragged)
{
    int failures = 0;
    p.ragged = ragged;
    p.a = p.b = BF16;
    for (int i = 0; i < 8; i++) {
        p.trans_b = i & 1;
        p.accumulate = i & 2;
        p.c = i & 4 ? F32 : BF16;
        p.trans_a = !p.trans_b && p.c == F32;
        if (p.trans_a != (ragged == GEMM_RAGGED_K) && ragged != GEMM_PLAIN)
            continue;
        if (p.c == F32 && p.k > LONG_SUM && ragged != GEMM_RAGGED_K)
            continue; // tensor cores add so many products to 1e-5, not to 1e-6
        p.m = ragged == GEMM_RAGGED_K ? p.k + 8 : p.m;
        p.bias = ragged == GEMM_PLAIN && p.trans_b && !p.accumulate;
        failures += try_product(flags, &p) != PASSED;
    }
    return failures ? FAILED : PASSED;
}

static int test_halves(void)
{
    int failures = 0;
    for (int f = 0; f < 4; f++) {
        if (!(op_flags[f] & OPEN_BF16))
            continue;
        for (size_t i = 0; i < sizeof halves / sizeof *halves; i++)
            failures += try_halves(op_flags[f], halves[i], GEMM_PLAIN) != PASSED;
        for (size_t i = 0; i < sizeof ragged_halves / sizeof *ragged_halves; i++) {
            failures += try_halves(op_flags[f], ragged_halves[i], GEMM_RAGGED_M) != PASSED;
            failures += try_halves(op_flags[f], ragged_halves[i], GEMM_RAGGED_K) != PASSED;
        }
    }
    return failures ? FAILED : PASSED;
}

// SwiGLU within a product of bf16; with and without what may be left out. p: n is F.
static int try_swiglu_halves(unsigned flags, const struct product *p, bool whole)
{
    struct op_run r;
    const int F = p->n, k = p->k, groups = p->groups, matrices = groups ? groups : 1;
    double first[GROUPS_MAX + 1];
    offsets_of(p, first);
    const int used = groups ? (int)first[groups] : p->m, rows = used + p->spare;
    OK(op_begin(&r, flags, 14));
    if (!r.c.dev->rebuilds_hidden || !op_swiglu_fuses(&r.c, F))
        return op_end(&r);
    struct operand *offsets = groups ? op_values(&r, I32, first, DIMS(groups + 1)) : NULL;
    struct operand *x = rows_with_spare(&r, BF16, rows, k, p->spare);
    struct operand *dy = rows_with_spare(&r, BF16, rows, k, p->spare);
    struct operand *w = op_random(&r, BF16, -1, 1, DIMS(matrices, 2 * F, k));
    struct operand *down = op_random(&r, BF16, -1, 1, DIMS(matrices, k, F));
    struct operand *old = op_random(&r, BF16, -3, 3, DIMS(rows, 2 * F));
    struct operand *gu = op_random(&r, BF16, -3, 3, DIMS(rows, 2 * F));
    struct operand *h = op_random(&r, BF16, -3, 3, DIMS(rows, F));
    struct operand *again = op_random(&r, BF16, -3, 3, DIMS(rows, F));
    struct swiglu_case s = swiglu_operands(&r, k, x, w, down, dy, old);
    const bool with_dots = whole && k % 8 == 0 && matrices <= r.c.dev->swiglu_dots;
    struct operand *dots = op_random(&r, F32, -3, 3, DIMS(F / 64, rows));
    double *want_again = op_doubles(&r, h->count), *want_dots = op_doubles(&r, dots->count);
    swiglu_all(&s, groups, first, rows);
    for (int i = 0; i < rows * F; i++) {
        const double g = old->v[i / F * 2 * F + i % F], u = old->v[i / F * 2 * F + i % F + F];
        want_again[i] = g / (1 + exp(-g)) * u;
        // d u = dh silu(g)
        const double dot = s.want_dgu[i / F * 2 * F + i % F + F] * u;
        want_dots[i % F / 64 * rows + i / F] += i < used * F ? dot : 0;
        if (i < used * F)
            continue;
        want_dots[i % F / 64 * rows + i / F] = dots->v[i % F / 64 * rows + i / F];
        want_again[i] = again->v[i]; // rows that stay as they are
        s.want_h[i] = h->v[i];
        s.want_gu[2 * i] = gu->v[2 * i];
        s.want_gu[2 * i + 1] = gu->v[2 * i + 1];
        s.want_dgu[2 * i] = old->v[2 * i];
        s.want_dgu[2 * i + 1] = old->v[2 * i + 1];
    }
    struct gemm g = {.ragged = groups ? GEMM_RAGGED_M : GEMM_PLAIN,
                     .m = rows,
                     .n = 2 * F,
                     .k = k,
                     .trans_b = true,
                     .a = x->t.mem,
                     .b = w->t.mem,
                     .c = whole ? gu->t.mem : NULL,
                     .type_a = BF16,
                     .type_b = BF16,
                     .type_c = BF16,
                     .groups = groups,
                     .offsets = groups ? offsets->t.mem : NULL,
                     .swiglu = SWIGLU_FORWARD,
                     .h = h->t.mem};
    OK(run_gemm(&r, &g));
    g.trans_b = false;
    g.n = F;
    g.a = dy->t.mem;
    g.b = down->t.mem;
    g.c = old->t.mem;
    g.swiglu = SWIGLU_BACKWARD;
    g.h = whole ? again->t.mem : NULL;
    g.dots = with_dots ? dots->t.mem : NULL;
    OK(run_gemm(&r, &g));
    op_judge(&r, h, s.want_h, 8e-3, "bf16 swiglu h %d %d %d", rows, F, k);
    op_judge(&r, old, s.want_dgu, 8e-3, "bf16 swiglu dgu %d %d %d", rows, F, k);
    if (whole) {
        op_judge(&r, gu, s.want_gu, 4e-3, "bf16 swiglu gu %d %d %d", rows, F, k);
        op_judge(&r, again, want_again, 4e-3, "bf16 swiglu h again %d %d %d", rows, F, k);
    }
    if (with_dots)
        op_judge(&r, dots, want_dots, 1e-5, "bf16 swiglu dots %d %d %d", rows, F, k);
    return op_end(&r);
}

static int test_swiglu_halves(void)
{
    static const struct product cases[] = {
        {.m = 1, .n = 64, .k = 8},
        {.m = 300, .n = 192, .k = 136},
        {.m = 129, .n = 320, .k = 72},
        {.n = 192, .k = 200, .groups = 5, .counts = {130, 0, 1, 257, 3}, .spare = 9},
        {.n = 64, .k = 64, .groups = 3, .counts = {0, 390, 0}},
        {.n = 1024, .k = 72, .groups = 3, .counts = {900, 500, 1}},
        {.m = 13, .n = 64, .k = 33}, // no kernel of ours: two steps
    };
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; op_flags[f] & OPEN_BF16 && i < sizeof cases / sizeof *cases; i++) {
            failures += try_swiglu_halves(op_flags[f], &cases[i], true) != PASSED;
            failures += try_swiglu_halves(op_flags[f], &cases[i], false) != PASSED;
        }
    return failures ? FAILED : PASSED;
}

// Products so large that a GPU form cuts C into its larger tiles (devices/gemm_gpu.c), whose last
// ones are not full: u of them down, or with every expert's own end, and two across.
static int try_large(unsigned flags, int k)
{
    const struct device *dev = test_device(flags);
    const int units = dev && dev->info.compute_units > 1 ? dev->info.compute_units : 2;
    const int u = units > 8 ? units : 2 * units, e = u > 8 ? 3 : 1, rows = 128 * (u - e) - 4 * e;
    const enum dtype act = flags & OPEN_BF16 ? BF16 : F32;
    struct product p = {.m = 128 * u - 4, .n = 252, .k = k, .a = act, .b = F32, .c = act};
    struct product ragged = p;
    int failures = 0;
    ragged.groups = e;
    ragged.spare = 2;
    for (int i = 0; i < e; i++) // one takes what the others leave
        ragged.counts[i] = i > 0 ? 128 + 4 * i : rows - (e - 1) * 128 - (e > 1 ? 12 : 0);
    p.trans_b = true;
    p.bias = true;
    failures += try_product(flags, &p) != PASSED;
    p.bias = p.trans_b = false;
    p.accumulate = true;
    failures += try_product(flags, &p) != PASSED;
    p.trans_a = true;
    p.b = act;
    failures += try_product(flags, &p) != PASSED;
    ragged.ragged = GEMM_RAGGED_M;
    failures += try_product(flags, &ragged) != PASSED;
    ragged.trans_b = true;
    failures += try_product(flags, &ragged) != PASSED;
    p = (struct product){.m = 128 * u - 3, .n = 124, .k = k};
    failures += try_swiglu(flags, &p) != PASSED;
    return failures ? FAILED : PASSED;
}

static int test_large(void)
{
    int failures = 0;
    for (int f = 0; f < 4; f++) {
        failures += try_large(op_flags[f], 20) != PASSED; // two steps of k and a half
        failures += try_large(op_flags[f], 13) != PASSED;
    }
    return failures ? FAILED : PASSED;
}

// Every form once on a handful of elements: what a simulator of devices can run in a minute.
static int test_tiny(void)
{
    static const struct product tiny[] = {
        {.m = 5, .n = 7, .k = 3, .trans_b = true, .bias = 1},
        {.m = 13, .n = 33, .k = 5, .accumulate = true},
        {.m = 7, .n = 5, .k = 9, .trans_a = true, .accumulate = true},
        {GEMM_RAGGED_M, .n = 5, .k = 3, .trans_b = true, .groups = 3, .counts = {2, 0, 1},
         .spare = 1},
        {GEMM_RAGGED_M, .n = 5, .k = 3, .groups = 3, .counts = {0, 3, 1}},
        {GEMM_RAGGED_K, .m = 3, .n = 5, .trans_a = true, .groups = 3, .counts = {2, 0, 1},
         .spare = 1},
    };
    int failures = 0;
    for (int f = 0; f < 4; f++)
        for (size_t i = 0; i < sizeof tiny / sizeof *tiny; i++)
            failures += try_product(op_flags[f], &tiny[i]) != PASSED;
    return failures ? FAILED : PASSED;
}

const struct test gemm_tests[] = {
    {"tiny", test_tiny},
    {"nt", test_nt},
    {"nn", test_nn},
    {"tn", test_tn},
    {"ragged_nt", test_ragged_nt},
    {"ragged_nn", test_ragged_nn},
    {"ragged_tn", test_ragged_tn},
    {"linear", test_linear},
    {"experts", test_experts},
    {"swiglu", test_swiglu},
    {"halves", test_halves},
    {"swiglu_halves", test_swiglu_halves},
    {"large", test_large},
    {0},
};
