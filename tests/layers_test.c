// The layer operations against naive double references that share no code with the kernels: every
// op in f32 and bf16, CPU and GPU forms, at shapes of 1, primes, the tile and one more. The
// references' own backward is proved by finite differences at the end.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Runs `body` for each of the four flags and stops at the first that fails.
typedef int case_fn(struct op_run *r, const int *shape);

static int for_all(case_fn *body, const int shapes[][6], int count)
{
    int failed = 0;
    for (int f = 0; f < 4; f++)
        for (int i = 0; i < count; i++) {
            struct op_run r;
            OK(op_begin(&r, op_flags[f], (uint64_t)i + 1));
            if (body(&r, shapes[i]) != PASSED)
                r.failures++;
            failed += op_end(&r) != PASSED;
        }
    return failed ? FAILED : PASSED;
}
#define FOR_ALL(body, shapes) for_all(body, shapes, (int)(sizeof shapes / sizeof shapes[0]))

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

// ---- embedding
// ---------------------------------------------------------------------------------------

// out[n*T + t, column] for each pixel, column order c,p,q or p,q,c
static void patch_reference(double *rows, double *image, const int *s, bool pqc, bool back)
{
    int images = s[0], channels = s[1], height = s[2], width = s[3], p = s[4];
    for (int n = 0; n < images; n++)
        for (int c = 0; c < channels; c++)
            for (int y = 0; y < height; y++)
                for (int x = 0; x < width; x++) {
                    int row = n * (height / p) * (width / p) + y / p * (width / p) + x / p;
                    int column =
                        pqc ? (y % p * p + x % p) * channels + c : (c * p + y % p) * p + x % p;
                    double *a = &rows[row * channels * p * p + column];
                    double *b = &image[((n * channels + c) * height + y) * width + x];
                    if (back)
                        *b = *a;
                    else
                        *a = *b;
                }
}

static int patch_case(struct op_run *r, const int *s)
{
    int rows = s[0] * (s[2] / s[4]) * (s[3] / s[4]), columns = s[1] * s[4] * s[4];
    struct operand *x = op_random(r, F32, -2, 2, DIMS(s[0], s[1], s[2], s[3]));
    struct operand *in = op_random(r, r->act, -2, 2, DIMS(rows, columns));
    double *want = op_doubles(r, x->count);
    for (int pqc = 0; pqc < 2; pqc++) {
        struct operand *out = op_output(r, r->act, DIMS(rows, columns));
        OK(OP_RUN(r, op_patchify(&r->c, &out->t, &x->t, s[4], pqc ? PATCH_PQC : PATCH_CPQ)));
        patch_reference(want, x->v, s, pqc, false);
        op_judge(r, out, want, op_tolerance(r, 1e-7), "patchify order %d", pqc);
    }
    struct operand *image = op_output(r, F32, DIMS(s[0], s[1], s[2], s[3]));
    OK(OP_RUN(r, op_unpatchify(&r->c, &image->t, &in->t, s[4])));
    patch_reference(in->v, want, s, true, true);
    op_judge_exact(r, image, want, "unpatchify");
    return PASSED;
}

static int test_patchify(void)
{
    static const int shapes[][6] = {
        {1, 1, 1, 1, 1}, {2, 3, 8, 4, 2}, {3, 4, 32, 32, 2}, {2, 1, 32, 32, 8}, {5, 7, 6, 9, 3}};
    return FOR_ALL(patch_case, shapes);
}

static int add_pos_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, r->act, -2, 2, DIMS(s[0] * s[1], s[2]));
    struct operand *pos = op_random(r, F32, -1, 1, DIMS(s[1], s[2]));
    double *want = op_doubles(r, x->count);
    for (int64_t i = 0; i < x->count; i++)
        want[i] = x->v[i] + pos->v[i % pos->count];
    OK(OP_RUN(r, op_add_pos(&r->c, &x->t, &pos->t)));
    op_judge(r, x, want, op_tolerance(r, 1e-6), "add_pos %d images %d x %d", s[0], s[1], s[2]);
    return PASSED;
}

static int test_add_pos(void)
{
    static const int shapes[][6] = {{1, 1, 1}, {3, 7, 5}, {2, 64, 96}, {5, 37, 385}, {4, 256, 48}};
    return FOR_ALL(add_pos_case, shapes);
}

static int timestep_case(struct op_run *r, const int *s)
{
    struct operand *t = op_random(r, F32, 0, 1, DIMS(s[0]));
    struct operand *out = op_output(r, r->act, DIMS(s[0], s[1]));
    double *want = op_doubles(r, out->count);
    int half = s[1] / 2;
    for (int n = 0; n < s[0]; n++)
        for (int i = 0; i < half; i++) {
            double angle = t->v[n] * pow(10000, -(double)i / half);
            want[n * s[1] + i] = cos(angle);
            want[n * s[1] + half + i] = sin(angle);
        }
    OK(OP_RUN(r, op_timestep_embed(&r->c, &out->t, &t->t)));
    op_judge(r, out, want, op_tolerance(r, 1e-6), "timestep_embed %d x %d", s[0], s[1]);
    return PASSED;
}

static int test_timestep_embed(void)
{
    static const int shapes[][6] = {{1, 2}, {5, 256}, {64, 64}, {7, 26}};
    return FOR_ALL(timestep_case, shapes);
}

static int embed_case(struct op_run *r, const int *s)
{
    int images = s[0], classes = s[1], width = s[2];
    struct operand *table = op_random(r, F32, -1, 1, DIMS(classes, width));
    struct operand *dtable = op_random(r, F32, -1, 1, DIMS(classes, width));
    struct operand *out = op_random(r, r->act, -1, 1, DIMS(images, width));
    struct operand *dout = op_random(r, r->act, -1, 1, DIMS(images, width));
    double *labels = op_doubles(r, images);
    double *want = op_doubles(r, out->count), *dwant = op_doubles(r, table->count);
    memcpy(dwant, dtable->v, (size_t)table->count * sizeof *dwant);
    for (int n = 0; n < images; n++) {
        labels[n] = floor(op_uniform(r, 0, classes));
        for (int d = 0; d < width; d++) {
            int at = (int)labels[n] * width + d;
            want[n * width + d] = out->v[n * width + d] + table->v[at];
            dwant[at] += dout->v[n * width + d];
        }
    }
    struct operand *y = op_values(r, I32, labels, DIMS(images));
    OK(OP_RUN(r, op_embed_fwd(&r->c, &out->t, &table->t, &y->t)));
    OK(OP_RUN(r, op_embed_bwd(&r->c, &dtable->t, &dout->t, &y->t)));
    op_judge(r, out, want, op_tolerance(r, 1e-6), "embed_fwd %d of %d x %d", images, classes,
             width);
    op_judge(r, dtable, dwant, 1e-6, "embed_bwd %d of %d x %d", images, classes, width);
    return PASSED;
}

static int test_embed(void)
{
    static const int shapes[][6] = {{1, 1, 1}, {7, 3, 37}, {32, 11, 64}, {5, 1001, 385}};
    return FOR_ALL(embed_case, shapes);
}

// ---- elementwise
// -------------------------------------------------------------------------------------

static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double gelu_derivative(double x)
{
    double c = sqrt(2 / M_PI), t = tanh(c * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
}

static double silu(double x)
{
    return x * sigmoid(x);
}

static double silu_derivative(double x)
{
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
}

typedef int forward_op(struct context *, struct tensor *, const struct tensor *);
typedef int backward_op(struct context *, struct tensor *, const struct tensor *,
                        const struct tensor *);

static int unary_case(struct op_run *r, int rows, int columns, const char *name, forward_op *fwd,
                      backward_op *bwd, double (*f)(double), double (*df)(double))
{
    struct operand *x = op_random(r, r->act, -8, 8, DIMS(rows, columns));
    struct operand *dy = op_random(r, r->act, -2, 2, DIMS(rows, columns));
    struct operand *y = op_output(r, r->act, DIMS(rows, columns));
    struct operand *dx = op_output(r, r->act, DIMS(rows, columns));
    double *want = op_doubles(r, x->count), *back = op_doubles(r, x->count);
    for (int64_t i = 0; i < x->count; i++) {
        want[i] = f(x->v[i]);
        back[i] = dy->v[i] * df(x->v[i]);
    }
    double tolerance = op_tolerance(r, 1e-6);
    OK(OP_RUN(r, fwd(&r->c, &y->t, &x->t)));
    OK(OP_RUN(r, bwd(&r->c, &dx->t, &dy->t, &x->t)));
    op_judge(r, y, want, tolerance, "%s_fwd %d x %d", name, rows, columns);
    op_judge(r, dx, back, tolerance, "%s_bwd %d x %d", name, rows, columns);
    OK(OP_RUN(r, bwd(&r->c, &dy->t, &dy->t, &x->t))); // in place
    OK(OP_RUN(r, fwd(&r->c, &x->t, &x->t)));
    op_judge(r, dy, back, tolerance, "%s_bwd in place", name);
    op_judge(r, x, want, tolerance, "%s_fwd in place", name);
    return PASSED;
}

static int silu_case(struct op_run *r, const int *s)
{
    return unary_case(r, s[0], s[1], "silu", op_silu_fwd, op_silu_bwd, silu, silu_derivative);
}

static int gelu_case(struct op_run *r, const int *s)
{
    return unary_case(r, s[0], s[1], "gelu", op_gelu_fwd, op_gelu_bwd, gelu, gelu_derivative);
}

static const int flat_shapes[][6] = {{1, 1}, {3, 5}, {37, 385}, {64, 256}, {64, 257}, {16384, 3}};

static int test_silu(void)
{
    return FOR_ALL(silu_case, flat_shapes);
}

static int test_gelu(void)
{
    return FOR_ALL(gelu_case, flat_shapes);
}

static int add_case(struct op_run *r, const int *s)
{
    for (int mix = 0; mix < 4; mix++) {
        enum dtype types[2] = {mix & 1 ? F32 : r->act, mix & 2 ? F32 : r->act};
        struct operand *y = op_random(r, types[0], -2, 2, DIMS(s[0], s[1]));
        struct operand *x = op_random(r, types[1], -2, 2, DIMS(s[0], s[1]));
        double *want = op_doubles(r, x->count);
        for (int64_t i = 0; i < x->count; i++)
            want[i] = y->v[i] + x->v[i];
        OK(OP_RUN(r, op_add(&r->c, &y->t, &x->t)));
        op_judge(r, y, want, types[0] == F32 ? 1e-6 : 4e-3, "add %d x %d, types %d", s[0], s[1],
                 mix);
    }
    return PASSED;
}

static int test_add(void)
{
    return FOR_ALL(add_case, flat_shapes);
}

// Infinities and NaN go through: a step that is not finite must be seen.
static int nan_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, r->act, -2, 2, DIMS(s[0]));
    struct operand *y = op_output(r, r->act, DIMS(s[0]));
    x->v[0] = NAN;
    x->v[1] = 1e30;
    x->v[2] = -1e5;
    op_rewrite(r, x, x->v);
    OK(OP_RUN(r, op_silu_fwd(&r->c, &y->t, &x->t)));
    op_read(r, y);
    CHECK(isnan(y->v[0]), "silu(NaN) = %g", y->v[0]);
    CHECK(fabs(y->v[1] / 1e30 - 1) < 0.01 && fabs(y->v[2]) < 1e-30, "silu: %g %g", y->v[1],
          y->v[2]);
    OK(OP_RUN(r, op_gelu_fwd(&r->c, &y->t, &x->t)));
    op_read(r, y);
    CHECK(isnan(y->v[0]), "gelu(NaN) = %g", y->v[0]);
    CHECK(fabs(y->v[2]) < 1e-30, "gelu: %g", y->v[2]);
    return PASSED;
}

static int test_not_finite(void)
{
    static const int shapes[][6] = {{35}};
    return FOR_ALL(nan_case, shapes);
}

// ---- LayerNorm with modulation, gated residual
// ---------------------------------------------------------

struct norm {
    int images, tokens, width, mod_width, shift, scale;
};

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

static void norm_forward(const struct norm *p, const double *x, const double *mod, double *y,
                         double *stats)
{
    for (int row = 0; row < p->images * p->tokens; row++) {
        const double *m = mod + row / p->tokens * p->mod_width;
        double mean, rstd;
        row_stats(x + row * p->width, p->width, &mean, &rstd);
        for (int d = 0; d < p->width; d++)
            y[row * p->width + d] =
                (x[row * p->width + d] - mean) * rstd * (1 + m[p->scale + d]) + m[p->shift + d];
        if (stats) {
            stats[2 * row] = mean;
            stats[2 * row + 1] = rstd;
        }
    }
}

// dx += ..., the columns of dmod are set
static void norm_backward(const struct norm *p, const double *x, const double *mod,
                          const double *dy, double *dx, double *dmod)
{
    int D = p->width;
    for (int n = 0; n < p->images; n++)
        for (int d = 0; d < D; d++)
            dmod[n * p->mod_width + p->shift + d] = dmod[n * p->mod_width + p->scale + d] = 0;
    for (int row = 0; row < p->images * p->tokens; row++) {
        const double *m = mod + row / p->tokens * p->mod_width, *g = dy + row * D;
        double *dm = dmod + row / p->tokens * p->mod_width;
        double mean, rstd, a = 0, b = 0;
        row_stats(x + row * D, D, &mean, &rstd);
        for (int d = 0; d < D; d++) {
            double h = (x[row * D + d] - mean) * rstd;
            a += g[d] * (1 + m[p->scale + d]) / D;
            b += g[d] * (1 + m[p->scale + d]) * h / D;
            dm[p->shift + d] += g[d];
            dm[p->scale + d] += g[d] * h;
        }
        for (int d = 0; d < D; d++) {
            double h = (x[row * D + d] - mean) * rstd;
            dx[row * D + d] += rstd * (g[d] * (1 + m[p->scale + d]) - a - h * b);
        }
    }
}

static int norm_case(struct op_run *r, const int *s)
{
    struct norm p = {s[0], s[1], s[2], 3 * s[2] + 5, s[2] + 5, 3};
    int rows = p.images * p.tokens;
    struct operand *x = op_random(r, r->act, -1, 3, DIMS(rows, p.width));
    struct operand *mod = op_random(r, r->act, -1, 1, DIMS(p.images, p.mod_width));
    struct operand *y = op_output(r, r->act, DIMS(rows, p.width));
    struct operand *stats = op_output(r, F32, DIMS(rows, 2));
    double *want = op_doubles(r, y->count), *want_stats = op_doubles(r, stats->count);
    OK(OP_RUN(r, op_layernorm_mod_fwd(&r->c, &y->t, &stats->t, &x->t, &mod->t, p.shift, p.scale)));
    norm_forward(&p, x->v, mod->v, want, want_stats);
    op_judge(r, y, want, op_tolerance(r, 1e-5), "layernorm_mod_fwd %d x %d x %d", s[0], s[1], s[2]);
    if (p.width > 1)
        op_judge(r, stats, want_stats, 1e-5, "layernorm stats %d x %d x %d", s[0], s[1], s[2]);

    struct operand *dy = op_random(r, r->act, -1, 1, DIMS(rows, p.width));
    struct operand *dx = op_random(r, r->act, -1, 1, DIMS(rows, p.width));
    struct operand *dmod = op_random(r, r->act, -1, 1, DIMS(p.images, p.mod_width));
    double *dx_want = op_doubles(r, dx->count), *dmod_want = op_doubles(r, dmod->count);
    memcpy(dx_want, dx->v, (size_t)dx->count * sizeof *dx_want);
    memcpy(dmod_want, dmod->v, (size_t)dmod->count * sizeof *dmod_want); // other columns stay
    OK(OP_RUN(r, op_layernorm_mod_bwd(&r->c, &dx->t, &dmod->t, &dy->t, &x->t, &stats->t, &mod->t,
                                      p.shift, p.scale)));
    norm_backward(&p, x->v, mod->v, dy->v, dx_want, dmod_want);
    op_judge(r, dx, dx_want, op_tolerance(r, 1e-5), "layernorm_mod_bwd dx %d x %d x %d", s[0], s[1],
             s[2]);
    op_judge(r, dmod, dmod_want, op_tolerance(r, 1e-5), "layernorm_mod_bwd dmod %d x %d x %d", s[0],
             s[1], s[2]);
    return PASSED;
}

static const int row_shapes[][6] = {{1, 1, 2},    {3, 7, 5},    {2, 33, 37},  {2, 64, 128},
                                    {1, 65, 129}, {37, 3, 385}, {17, 16, 64}, {1, 31, 1152}};

static int test_layernorm(void)
{
    return FOR_ALL(norm_case, row_shapes);
}

static void gate_backward(const struct norm *p, const double *z, const double *mod,
                          const double *dy, double *dz, double *dmod)
{
    for (int n = 0; n < p->images; n++)
        for (int d = 0; d < p->width; d++) {
            double sum = 0;
            for (int t = 0; t < p->tokens; t++) {
                int i = (n * p->tokens + t) * p->width + d;
                sum += dy[i] * z[i];
                dz[i] = mod[n * p->mod_width + p->shift + d] * dy[i];
            }
            dmod[n * p->mod_width + p->shift + d] = sum;
        }
}

static int gate_case(struct op_run *r, const int *s)
{
    struct norm p = {s[0], s[1], s[2], 2 * s[2] + 3, s[2] + 1, 0};
    int rows = p.images * p.tokens;
    struct operand *x = op_random(r, r->act, -1, 1, DIMS(rows, p.width));
    struct operand *z = op_random(r, r->act, -1, 1, DIMS(rows, p.width));
    struct operand *mod = op_random(r, r->act, -1, 1, DIMS(p.images, p.mod_width));
    struct operand *y = op_output(r, r->act, DIMS(rows, p.width));
    double *want = op_doubles(r, y->count), tolerance = op_tolerance(r, 1e-5);
    for (int64_t i = 0; i < y->count; i++)
        want[i] = x->v[i] +
                  z->v[i] * mod->v[i / p.width / p.tokens * p.mod_width + p.shift + i % p.width];
    OK(OP_RUN(r, op_gate_residual_fwd(&r->c, &y->t, &x->t, &z->t, &mod->t, p.shift)));
    op_judge(r, y, want, op_tolerance(r, 1e-6), "gate_residual_fwd %d x %d x %d", s[0], s[1], s[2]);

    struct operand *dy = op_random(r, r->act, -1, 1, DIMS(rows, p.width));
    struct operand *dz = op_output(r, r->act, DIMS(rows, p.width));
    struct operand *dmod = op_random(r, r->act, -1, 1, DIMS(p.images, p.mod_width));
    double *dmod_want = op_doubles(r, dmod->count), *dz_want = op_doubles(r, dz->count);
    memcpy(dmod_want, dmod->v, (size_t)dmod->count * sizeof *dmod_want);
    gate_backward(&p, z->v, mod->v, dy->v, dz_want, dmod_want);
    OK(OP_RUN(r, op_gate_residual_bwd(&r->c, &dz->t, &dmod->t, &dy->t, &z->t, &mod->t, p.shift)));
    op_judge(r, dz, dz_want, tolerance, "gate_residual_bwd dz %d x %d x %d", s[0], s[1], s[2]);
    op_judge(r, dmod, dmod_want, tolerance, "gate_residual_bwd dmod %d x %d x %d", s[0], s[1],
             s[2]);
    OK(OP_RUN(r, op_gate_residual_bwd(&r->c, &z->t, &dmod->t, &dy->t, &z->t, &mod->t, p.shift)));
    op_judge(r, z, dz_want, tolerance, "gate_residual_bwd in place");
    op_judge(r, dmod, dmod_want, tolerance, "gate_residual_bwd in place, dmod");
    return PASSED;
}

static int test_gate_residual(void)
{
    return FOR_ALL(gate_case, row_shapes);
}

// ---- LayerNorm of q and k
// ----------------------------------------------------------------------------------

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
    return FOR_ALL(qk_norm_case, shapes);
}

// ---- attention
// -----------------------------------------------------------------------------------------------

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
    return FOR_ALL(attention_case, shapes);
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
    return FOR_ALL(long_case, shapes);
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
    return FOR_ALL(extreme_case, shapes);
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
    return FOR_ALL(repeat_case, shapes);
}

// ---- the references' own backward
// ----------------------------------------------------------------------------

static double weights[4096], analytic[4096], point[4096];

static void fill(double *v, int count, uint64_t seed, double low, double high)
{
    struct op_run r = {.state = seed};
    for (int i = 0; i < count; i++)
        v[i] = op_uniform(&r, low, high);
}

// x: x | mod
static void norm_f(const double *x, double *out, const void *args)
{
    const struct norm *p = args;
    norm_forward(p, x, x + p->images * p->tokens * p->width, out, NULL);
}

static void gate_f(const double *x, double *out, const void *args)
{
    const struct norm *p = args;
    const double *mod = x + p->images * p->tokens * p->width;
    for (int i = 0; i < p->images * p->tokens * p->width; i++)
        out[i] = x[i] * mod[i / p->width / p->tokens * p->mod_width + p->shift + i % p->width];
}

static int test_reference_norm(void)
{
    struct norm p = {2, 3, 7, 17, 9, 1};
    int rows = p.images * p.tokens * p.width, inputs = rows + p.images * p.mod_width;
    fill(point, inputs, 1, -1, 2);
    fill(weights, rows, 2, -1, 1);
    memset(analytic, 0, sizeof analytic);
    norm_backward(&p, point, point + rows, weights, analytic, analytic + rows);
    double error = op_difference(norm_f, &p, point, inputs, weights, rows, analytic);
    CHECK(error < 1e-7, "layernorm_mod: %.3g", error);
    memset(analytic, 0, sizeof analytic);
    gate_backward(&p, point, point + rows, weights, analytic, analytic + rows);
    error = op_difference(gate_f, &p, point, inputs, weights, rows, analytic);
    CHECK(error < 1e-7, "gate_residual: %.3g", error);
    return PASSED;
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

static int test_reference_elementwise(void)
{
    for (double x = -6; x < 6; x += 0.37) {
        double h = 1e-4, g = (gelu(x + h) - gelu(x - h)) / (2 * h);
        double s = (silu(x + h) - silu(x - h)) / (2 * h);
        CHECK(fabs(g - gelu_derivative(x)) < 1e-7, "gelu'(%g)", x);
        CHECK(fabs(s - silu_derivative(x)) < 1e-7, "silu'(%g)", x);
    }
    return PASSED;
}

const struct test layers_tests[] = {
    {"reference_elementwise", test_reference_elementwise},
    {"reference_norm", test_reference_norm},
    {"reference_attention", test_reference_attention},
    {"patchify", test_patchify},
    {"add_pos", test_add_pos},
    {"timestep_embed", test_timestep_embed},
    {"embed", test_embed},
    {"silu", test_silu},
    {"gelu", test_gelu},
    {"add", test_add},
    {"not_finite", test_not_finite},
    {"layernorm_mod", test_layernorm},
    {"gate_residual", test_gate_residual},
    {"qk_norm", test_qk_norm},
    {"attention", test_attention},
    {"attention_long", test_attention_long},
    {"attention_extreme", test_attention_extreme},
    {"repeat", test_repeat},
    {NULL, NULL},
};
