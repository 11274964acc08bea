// Attention and the LayerNorm of q and k against naive double references, as in layers_test.c.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void row_stats(const double *x, int n, double *mean, double *rstd)
{
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++)
        sum += x[i];
    *mean = sum / n;
    for (int i = 0; i < n; i++)
        squares += (x[i] - *mean) * (x[i] - *mean);
    *rstd = 1 / sqrt(squares / n + 1e-6);
}

// ---- LayerNorm of q and k -----------------------------------------------------------------------

struct heads {
    int images, tokens, heads, hd;
};

static void qk_forward(const struct heads *p, const double *qkv, const double *const w[4],
                       double *out)
{
    int vectors = p->images * p->tokens * 3 * p->heads;
    for (int v = 0; v < vectors; v++) {
        int part = v / p->heads % 3;
        double mean, rstd;
        row_stats(qkv + v * p->hd, p->hd, &mean, &rstd);
        for (int d = 0; d < p->hd; d++) {
            double x = qkv[v * p->hd + d];
            out[v * p->hd + d] =
                part == 2 ? x : (x - mean) * rstd * w[2 * part][d] + w[2 * part + 1][d];
        }
    }
}

// dqkv in place; dw[0..3]: wq, bq, wk, bk, added to
static void qk_backward(const struct heads *p, const double *qkv, const double *const w[4],
                        double *dqkv, double *const dw[4])
{
    int vectors = p->images * p->tokens * 3 * p->heads, hd = p->hd;
    for (int v = 0; v < vectors; v++) {
        int part = v / p->heads % 3;
        double mean, rstd, a = 0, b = 0, *g = dqkv + v * hd;
        if (part == 2)
            continue;
        row_stats(qkv + v * hd, hd, &mean, &rstd);
        for (int d = 0; d < hd; d++) {
            double h = (qkv[v * hd + d] - mean) * rstd;
            dw[2 * part][d] += g[d] * h;
            dw[2 * part + 1][d] += g[d];
            a += g[d] * w[2 * part][d] / hd;
            b += g[d] * w[2 * part][d] * h / hd;
        }
        for (int d = 0; d < hd; d++)
            g[d] = rstd * (g[d] * w[2 * part][d] - a - (qkv[v * hd + d] - mean) * rstd * b);
    }
}

static int qk_back_case(struct op_run *r, const struct heads *p, struct operand *qkv,
                        struct operand *stats, struct operand *const w[4])
{
    static const char *names[] = {"wq", "bq", "wk", "bk"};
    int rows = p->images * p->tokens;
    struct operand *dqkv = op_random(r, r->act, -1, 1, DIMS(rows, 3 * p->heads * p->hd)), *dw[4];
    double *want = op_doubles(r, dqkv->count), *dwant[4];
    memcpy(want, dqkv->v, (size_t)dqkv->count * sizeof *want);
    for (int i = 0; i < 4; i++) {
        dw[i] = op_random(r, F32, -1, 1, DIMS(p->hd));
        dwant[i] = op_doubles(r, p->hd);
        memcpy(dwant[i], dw[i]->v, (size_t)p->hd * sizeof(double));
    }
    OK(OP_RUN(r, op_qk_norm_bwd(&r->c, &dqkv->t, &dw[0]->t, &dw[1]->t, &dw[2]->t, &dw[3]->t,
                                &qkv->t, &stats->t, &w[0]->t, &w[2]->t, p->heads)));
    qk_backward(p, qkv->v, (const double *const[]){w[0]->v, w[1]->v, w[2]->v, w[3]->v}, want,
                dwant);
    op_judge(r, dqkv, want, op_tolerance(r, 1e-5), "qk_norm_bwd %d heads of %d", p->heads, p->hd);
    for (int i = 0; i < 4; i++)
        op_judge(r, dw[i], dwant[i], 1e-5, "qk_norm_bwd %s, %d rows, %d heads of %d", names[i],
                 rows, p->heads, p->hd);
    return PASSED;
}

static int qk_norm_case(struct op_run *r, const int *s)
{
    struct heads p = {1, s[0], s[1], s[2]};
    int width = 3 * p.heads * p.hd;
    struct operand *qkv = op_random(r, r->act, -1, 3, DIMS(s[0], width)), *w[4];
    struct operand *out = op_output(r, r->act, DIMS(s[0], width));
    struct operand *stats = op_output(r, F32, DIMS(s[0], 2 * p.heads, 2));
    double *want = op_doubles(r, out->count);
    for (int i = 0; i < 4; i++)
        w[i] = op_random(r, F32, -1, 2, DIMS(p.hd));
    OK(OP_RUN(r, op_qk_norm_fwd(&r->c, &out->t, &stats->t, &qkv->t, &w[0]->t, &w[1]->t, &w[2]->t,
                                &w[3]->t, p.heads)));
    qk_forward(&p, qkv->v, (const double *const[]){w[0]->v, w[1]->v, w[2]->v, w[3]->v}, want);
    op_judge(r, out, want, op_tolerance(r, 1e-5), "qk_norm_fwd %d heads of %d", p.heads, p.hd);
    if (qk_back_case(r, &p, qkv, stats, w) != PASSED)
        return FAILED;
    OK(OP_RUN(r, op_qk_norm_fwd(&r->c, &qkv->t, &stats->t, &qkv->t, &w[0]->t, &w[1]->t, &w[2]->t,
                                &w[3]->t, p.heads)));
    op_judge(r, qkv, want, op_tolerance(r, 1e-5), "qk_norm_fwd in place");
    return PASSED;
}

static int test_qk_norm(void)
{
    static const int shapes[][6] = {{1, 1, 8},   {3, 2, 20},  {37, 3, 72}, {64, 6, 64},
                                    {19, 2, 88}, {70, 5, 32}, {5, 1, 128}};
    return OP_FOR_ALL(qk_norm_case, shapes);
}

// ---- attention ----------------------------------------------------------------------------------

static double qkv_at(const struct heads *p, const double *qkv, int n, int t, int part, int h, int d)
{
    return qkv[(((n * p->tokens + t) * 3 + part) * p->heads + h) * p->hd + d];
}

// probabilities of one query into prob[tokens]; returns log sum exp
static double attention_row(const struct heads *p, const double *qkv, int n, int h, int t,
                            double *prob)
{
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < p->tokens; j++) {
        prob[j] = 0;
        for (int d = 0; d < p->hd; d++)
            prob[j] += qkv_at(p, qkv, n, t, 0, h, d) * qkv_at(p, qkv, n, j, 1, h, d);
        prob[j] /= sqrt(p->hd);
        top = fmax(top, prob[j]);
    }
    for (int j = 0; j < p->tokens; j++)
        sum += exp(prob[j] - top);
    for (int j = 0; j < p->tokens; j++)
        prob[j] = exp(prob[j] - top) / sum;
    return top + log(sum);
}

static void attention_forward(const struct heads *p, const double *qkv, double *o, double *lse)
{
    double *prob = calloc((size_t)p->tokens, sizeof *prob);
    for (int n = 0; n < p->images; n++)
        for (int h = 0; h < p->heads; h++)
            for (int t = 0; t < p->tokens; t++) {
                double l = attention_row(p, qkv, n, h, t, prob);
                if (lse)
                    lse[(n * p->heads + h) * p->tokens + t] = l;
                for (int d = 0; d < p->hd; d++) {
                    double sum = 0;
                    for (int j = 0; j < p->tokens; j++)
                        sum += prob[j] * qkv_at(p, qkv, n, j, 2, h, d);
                    o[((n * p->tokens + t) * p->heads + h) * p->hd + d] = sum;
                }
            }
    free(prob);
}

// Adds one query's part to dqkv (zeroed before).
static void attention_row_back(const struct heads *p, const double *qkv, const double *prob,
                               const double *g, int n, int h, int t, double *dqkv)
{
    double dot = 0, *dp = calloc((size_t)p->tokens, sizeof *dp);
    int step = 3 * p->heads * p->hd, part = p->heads * p->hd;
    double *base = dqkv + n * p->tokens * step + h * p->hd;
    for (int j = 0; j < p->tokens; j++) {
        for (int d = 0; d < p->hd; d++) {
            dp[j] += g[d] * qkv_at(p, qkv, n, j, 2, h, d);
            base[j * step + 2 * part + d] += prob[j] * g[d];
        }
        dot += prob[j] * dp[j];
    }
    for (int j = 0; j < p->tokens; j++) {
        double ds = prob[j] * (dp[j] - dot) / sqrt(p->hd);
        for (int d = 0; d < p->hd; d++) {
            base[t * step + d] += ds * qkv_at(p, qkv, n, j, 1, h, d);
            base[j * step + part + d] += ds * qkv_at(p, qkv, n, t, 0, h, d);
        }
    }
    free(dp);
}

static void attention_backward(const struct heads *p, const double *qkv, const double *dout,
                               double *dqkv)
{
    double *prob = calloc((size_t)p->tokens, sizeof *prob);
    memset(dqkv, 0, (size_t)(p->images * p->tokens * 3 * p->heads * p->hd) * sizeof *dqkv);
    for (int n = 0; n < p->images; n++)
        for (int h = 0; h < p->heads; h++)
            for (int t = 0; t < p->tokens; t++) {
                attention_row(p, qkv, n, h, t, prob);
                attention_row_back(p, qkv, prob,
                                   dout + ((n * p->tokens + t) * p->heads + h) * p->hd, n, h, t,
                                   dqkv);
            }
    free(prob);
}

static int attention_case(struct op_run *r, const int *s)
{
    struct heads p = {s[0], s[1], s[2], s[3]};
    int rows = p.images * p.tokens, width = p.heads * p.hd;
    struct operand *qkv = op_random(r, r->act, -2, 2, DIMS(rows, 3 * width));
    struct operand *dout = op_random(r, r->act, -1, 1, DIMS(rows, width));
    struct operand *o = op_output(r, r->act, DIMS(rows, width));
    struct operand *lse = op_output(r, F32, DIMS(p.images, p.heads, p.tokens));
    struct operand *dqkv = op_output(r, r->act, DIMS(rows, 3 * width));
    struct operand *delta = op_output(r, F32, DIMS(p.images, p.heads, p.tokens));
    double *want = op_doubles(r, o->count), *want_lse = op_doubles(r, lse->count);
    double *dwant = op_doubles(r, dqkv->count);
    OK(OP_RUN(r, op_attention_fwd(&r->c, &o->t, &lse->t, &qkv->t, p.images, p.heads)));
    attention_forward(&p, qkv->v, want, want_lse);
    op_judge(r, o, want, op_tolerance(r, 1e-5), "attention_fwd N=%d T=%d H=%d hd=%d", s[0], s[1],
             s[2], s[3]);
    if (p.tokens > 1)
        op_judge(r, lse, want_lse, 1e-5, "lse N=%d T=%d H=%d hd=%d", s[0], s[1], s[2], s[3]);
    OK(OP_RUN(r, op_attention_bwd(&r->c, &dqkv->t, &delta->t, &dout->t, &o->t, &lse->t, &qkv->t,
                                  p.images, p.heads)));
    attention_backward(&p, qkv->v, dout->v, dwant);
    op_judge(r, dqkv, dwant, op_tolerance(r, 1e-5), "attention_bwd N=%d T=%d H=%d hd=%d", s[0],
             s[1], s[2], s[3]);
    struct operand *again = op_output(r, r->act, DIMS(rows, width)); // without lse
    OK(OP_RUN(r, op_attention_fwd(&r->c, &again->t, NULL, &qkv->t, p.images, p.heads)));
    op_judge(r, again, want, op_tolerance(r, 1e-5), "attention_fwd without lse");
    return PASSED;
}

static int test_attention(void)
{
    static const int shapes[][6] = {
        {1, 1, 1, 1},   {3, 1, 2, 32},  {2, 4, 3, 64},   {5, 16, 2, 64},  {1, 64, 2, 64},
        {2, 65, 1, 72}, {1, 37, 3, 20}, {1, 129, 1, 88}, {1, 256, 1, 64}, {1, 300, 1, 128}};
    return OP_FOR_ALL(attention_case, shapes);
}

// Small enough for a simulator (oclgrind --data-races).
static int test_attention_small(void)
{
    static const int shapes[][6] = {{1, 3, 1, 20}, {2, 17, 1, 8}};
    return OP_FOR_ALL(attention_case, shapes);
}

// More keys than one block holds, on the CPU forms (the GPU forms have met more than one tile
// above).
static int long_case(struct op_run *r, const int *s)
{
    return r->c.dev->flags & OPEN_GPU_FORMS ? PASSED : attention_case(r, s);
}

static int test_attention_long(void)
{
    static const int shapes[][6] = {{1, 1024, 1, 16}, {1, 521, 2, 72}};
    return OP_FOR_ALL(long_case, shapes);
}

// What CUDA devices have tuned kernels for, and that these ran: bf16, head sizes of a multiple of
// 8.
static bool has_tuned(const struct op_run *r)
{
    const struct device *dev = r->c.dev;
    return r->act == BF16 && !strcmp(dev->api->name, "cuda") && !(dev->flags & OPEN_PORTABLE) &&
           (strstr(dev->info.language, " 9.0") || strstr(dev->info.language, " 8.0"));
}

static uint64_t portable_launches(void)
{
    return op_launches[KERNEL_attention_fwd] + op_launches[KERNEL_attention_fwd_cpu] +
           op_launches[KERNEL_attention_bwd_kv] + op_launches[KERNEL_attention_bwd_q] +
           op_launches[KERNEL_attention_bwd_cpu];
}

static int tuned_case(struct op_run *r, const int *s)
{
    if (r->act != BF16 || (s[1] > 300 && r->c.dev->flags & OPEN_GPU_FORMS))
        return PASSED;
    uint64_t before = portable_launches();
    if (attention_case(r, s) != PASSED)
        return FAILED;
    CHECK((portable_launches() == before) == has_tuned(r),
          "the tuned kernels %s: N=%d T=%d H=%d hd=%d",
          has_tuned(r) ? "were not used" : "seem to be used", s[0], s[1], s[2], s[3]);
    return PASSED;
}

// Head sizes and tiles of the tuned kernels, and one more; enough heads that a multiprocessor gets
// several.
static int test_tuned(void)
{
    static const int shapes[][6] = {
        {2, 64, 2, 64},  {1, 100, 2, 64},  {1, 256, 2, 64},  {1, 257, 1, 64}, {1, 1024, 1, 64},
        {1, 64, 1, 72},  {2, 100, 1, 72},  {1, 256, 2, 72},  {1, 257, 1, 72}, {1, 1024, 1, 72},
        {1, 100, 1, 88}, {1, 256, 1, 88},  {1, 257, 1, 88},  {1, 100, 3, 32}, {1, 257, 1, 32},
        {1, 64, 2, 128}, {1, 256, 1, 128}, {1, 257, 1, 128}, {1, 70, 2, 80},  {1, 65, 1, 104},
        {36, 64, 8, 64}, {30, 33, 10, 72}, {30, 33, 5, 88},  {9, 257, 8, 8},  {15, 17, 20, 128}};
    return OP_FOR_ALL(tuned_case, shapes);
}

// The backward pass of attention after q and k were normalised within the forward: from q and k
// normalised again, o and lse of the forward; against double.
static int qk_attention_back(struct op_run *r, const struct heads *p, struct operand *qkv,
                             struct operand *const w[4], const double *normal, struct operand *o,
                             struct operand *lse)
{
    int rows = p->images * p->tokens, width = p->heads * p->hd;
    struct operand *qk = op_output(r, r->act, DIMS(rows, 3 * width));
    struct operand *stats = op_output(r, F32, DIMS(rows, 2 * p->heads, 2));
    struct operand *dout = op_random(r, r->act, -1, 1, DIMS(rows, width));
    struct operand *dqkv = op_output(r, r->act, DIMS(rows, 3 * width));
    struct operand *delta = op_output(r, F32, DIMS(p->images, p->heads, p->tokens));
    double *want = op_doubles(r, dqkv->count);
    OK(OP_RUN(r, op_qk_norm_fwd(&r->c, &qk->t, &stats->t, &qkv->t, &w[0]->t, &w[1]->t, &w[2]->t,
                                &w[3]->t, p->heads)));
    OK(OP_RUN(r, op_attention_bwd(&r->c, &dqkv->t, &delta->t, &dout->t, &o->t, &lse->t, &qk->t,
                                  p->images, p->heads)));
    attention_backward(p, normal, dout->v, want);
    op_judge(r, dqkv, want, r->act == BF16 ? 1.5e-2 : 2e-5, "attention_bwd after qk_attention_fwd");
    return PASSED;
}

// q and k normalised within: against the two operations in double. Where that is one kernel, qk
// is not written.
static int qk_attention_case(struct op_run *r, const int *s)
{
    struct heads p = {s[0], s[1], s[2], s[3]};
    int rows = p.images * p.tokens, width = p.heads * p.hd;
    struct operand *qkv = op_random(r, r->act, -1, 3, DIMS(rows, 3 * width)), *w[4];
    struct operand *o = op_output(r, r->act, DIMS(rows, width));
    struct operand *qk = op_output(r, r->act, DIMS(rows, 3 * width));
    struct operand *stats = op_output(r, F32, DIMS(rows, 2 * p.heads, 2));
    struct operand *lse = op_output(r, F32, DIMS(p.images, p.heads, p.tokens));
    double *normal = op_doubles(r, qkv->count);
    double *want = op_doubles(r, o->count), *want_lse = op_doubles(r, lse->count);
    for (int i = 0; i < 4; i++)
        w[i] = op_random(r, F32, -1, 2, DIMS(p.hd));
    OK(OP_RUN(r, op_qk_attention_fwd(&r->c, &o->t, &lse->t, &qk->t, &stats->t, &qkv->t, &w[0]->t,
                                     &w[1]->t, &w[2]->t, &w[3]->t, p.images, p.heads)));
    qk_forward(&p, qkv->v, (const double *const[]){w[0]->v, w[1]->v, w[2]->v, w[3]->v}, normal);
    attention_forward(&p, normal, want, want_lse);
    // bf16: q and k are rounded before their product
    op_judge(r, o, want, r->act == BF16 ? 1e-2 : 2e-5, "qk_attention_fwd N=%d T=%d H=%d hd=%d",
             s[0], s[1], s[2], s[3]);
    op_judge(r, lse, want_lse, r->act == BF16 ? 2e-3 : 1e-5, "lse of qk_attention_fwd");
    if (has_tuned(r) && strstr(r->c.dev->info.language, " 9.0") && p.hd <= 88) {
        op_read(r, qk);
        CHECK(isnan(qk->v[0]) && isnan(qk->v[qk->count - 1]), "q and k were normalised apart");
    }
    return qk_attention_back(r, &p, qkv, w, normal, o, lse);
}

static int test_qk_attention(void)
{
    static const int shapes[][6] = {{2, 64, 2, 72},  {1, 100, 2, 72}, {1, 257, 2, 72},
                                    {1, 256, 2, 64}, {1, 130, 1, 88}, {30, 33, 10, 72},
                                    {1, 65, 2, 56},  {2, 20, 2, 32},  {1, 40, 1, 128}};
    return OP_FOR_ALL(qk_attention_case, shapes);
}

// Large scores: the softmax must not overflow. NaN in one head must reach that head's output.
static int extreme_case(struct op_run *r, const int *s)
{
    struct heads p = {1, s[1], 2, s[3]};
    struct operand *qkv = op_random(r, r->act, -60, 60, DIMS(s[1], 6 * s[3]));
    struct operand *o = op_output(r, r->act, DIMS(s[1], 2 * s[3]));
    double *want = op_doubles(r, o->count);
    OK(OP_RUN(r, op_attention_fwd(&r->c, &o->t, NULL, &qkv->t, 1, 2)));
    attention_forward(&p, qkv->v, want, NULL);
    op_judge(r, o, want, op_tolerance(r, 2e-3), "attention_fwd with large scores");
    qkv->v[0] = NAN; // q of the first query, first head
    op_rewrite(r, qkv, qkv->v);
    OK(OP_RUN(r, op_attention_fwd(&r->c, &o->t, NULL, &qkv->t, 1, 2)));
    op_read(r, o);
    CHECK(isnan(o->v[0]) && !isnan(o->v[s[3]]), "NaN: %g %g", o->v[0], o->v[s[3]]);
    return PASSED;
}

static int test_attention_extreme(void)
{
    static const int shapes[][6] = {{1, 40, 2, 24}};
    return OP_FOR_ALL(extreme_case, shapes);
}

// The same inputs give the same bits.
static int repeat_case(struct op_run *r, const int *s)
{
    int rows = s[0] * s[1], width = s[2] * s[3];
    struct operand *qkv = op_random(r, r->act, -2, 2, DIMS(rows, 3 * width));
    struct operand *o = op_output(r, r->act, DIMS(rows, width));
    struct operand *lse = op_output(r, F32, DIMS(s[0], s[2], s[1]));
    struct operand *delta = op_output(r, F32, DIMS(s[0], s[2], s[1]));
    struct operand *dqkv = op_output(r, r->act, DIMS(rows, 3 * width));
    double *first = op_doubles(r, dqkv->count);
    for (int i = 0; i < 3; i++) {
        OK(OP_RUN(r, op_attention_fwd(&r->c, &o->t, &lse->t, &qkv->t, s[0], s[2])));
        OK(OP_RUN(r, op_attention_bwd(&r->c, &dqkv->t, &delta->t, &o->t, &o->t, &lse->t, &qkv->t,
                                      s[0], s[2])));
        if (i == 0) {
            op_read(r, dqkv);
            memcpy(first, dqkv->v, (size_t)dqkv->count * sizeof *first);
        }
        op_judge_exact(r, dqkv, first, "attention again");
    }
    return PASSED;
}

static int test_repeat(void)
{
    static const int shapes[][6] = {{3, 64, 4, 32}};
    return OP_FOR_ALL(repeat_case, shapes);
}

// ---- the references' own backward ---------------------------------------------------------------

static double weights[4096], analytic[4096], point[4096];

static void fill(double *v, int count, uint64_t seed, double low, double high)
{
    struct op_run r = {.state = seed};
    for (int i = 0; i < count; i++)
        v[i] = op_uniform(&r, low, high);
}

static void attention_f(const double *x, double *out, const void *args)
{
    attention_forward(args, x, out, NULL);
}

// x: qkv | wq bq wk bk
static void qk_f(const double *x, double *out, const void *args)
{
    const struct heads *p = args;
    const double *w = x + p->images * p->tokens * 3 * p->heads * p->hd;
    qk_forward(p, x, (const double *const[]){w, w + p->hd, w + 2 * p->hd, w + 3 * p->hd}, out);
}

static int test_reference_attention(void)
{
    struct heads p = {2, 5, 2, 3};
    int outputs = p.images * p.tokens * p.heads * p.hd, inputs = 3 * outputs;
    fill(point, inputs + 4 * p.hd, 3, -1, 1);
    fill(weights, inputs, 4, -1, 1);
    attention_backward(&p, point, weights, analytic);
    double error = op_difference(attention_f, &p, point, inputs, weights, outputs, analytic);
    CHECK(error < 1e-7, "attention: %.3g", error);
    double *w = point + inputs, *dw = analytic + inputs;
    int hd = p.hd;
    memset(analytic, 0, sizeof analytic);
    memcpy(analytic, weights, (size_t)inputs * sizeof *analytic);
    qk_backward(&p, point, (const double *const[]){w, w + hd, w + 2 * hd, w + 3 * hd}, analytic,
                (double *const[]){dw, dw + hd, dw + 2 * hd, dw + 3 * hd});
    error = op_difference(qk_f, &p, point, inputs + 4 * hd, weights, inputs, analytic);
    CHECK(error < 1e-7, "qk_norm: %.3g", error);
    return PASSED;
}

const struct test attention_tests[] = {
    {"reference", test_reference_attention},
    {"qk_norm", test_qk_norm},
    {"small", test_attention_small},
    {"tiles", test_attention},
    {"long", test_attention_long},
    {"tuned", test_tuned},
    {"qk_attention", test_qk_attention},
    {"extreme", test_attention_extreme},
    {"repeat", test_repeat},
    {NULL, NULL},
};
