// The layer operations against naive double references that share no code with the kernels: every
// op in f32 and bf16, CPU and GPU forms, at shapes of 1, primes, the tile and one more. The
// references' own backward is proved by finite differences at the end.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

// ---- embedding ----------------------------------------------------------------------------------

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
    return OP_FOR_ALL(patch_case, shapes);
}

static int add_pos_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, r->act, -2, 2, DIMS(s[0] * s[1], s[2]));
    struct operand *pos = op_random(r, F32, -1, 1, DIMS(s[1], s[2]));
    double *want = op_doubles(r, x->count);
    for (int64_t i = 0; i < x->count; i++)
        want[i] = x->v[i] + pos->v[i % pos->count];
    OK(OP_RUN(r, op_add_pos(&r->c, &x->t, &x->t, &pos->t)));
    op_judge(r, x, want, op_tolerance(r, 1e-6), "add_pos %d images %d x %d", s[0], s[1], s[2]);
    if (r->act != BF16)
        return PASSED;
    // into two halves
    struct operand *sum = op_random(r, F32, -2, 2, DIMS(s[0] * s[1], s[2]));
    struct operand *low = op_output(r, BF16, DIMS(s[0] * s[1], s[2]));
    struct operand *joined = op_output(r, F32, DIMS(s[0] * s[1], s[2]));
    for (int64_t i = 0; i < x->count; i++)
        want[i] = sum->v[i] + pos->v[i % pos->count];
    x->t.low = &low->t;
    OK(OP_RUN(r, op_add_pos(&r->c, &x->t, &sum->t, &pos->t)));
    OK(OP_RUN(r, op_widen(&r->c, &joined->t, &x->t, &low->t)));
    op_judge(r, joined, want, 1e-6, "add_pos into halves, %d images", s[0]);
    op_judge(r, x, want, op_tolerance(r, 1e-6), "add_pos into halves, the high one");
    return PASSED;
}

static int test_add_pos(void)
{
    static const int shapes[][6] = {{1, 1, 1}, {3, 7, 5}, {2, 64, 96}, {5, 37, 385}, {4, 256, 48}};
    return OP_FOR_ALL(add_pos_case, shapes);
}

static int timestep_case(struct op_run *r, const int *s)
{
    const bool steps = s[2] > 0; // DDPM's t: whole numbers up to 999
    const bool full = s[2] > 1;  // frequencies as in diffusers
    struct operand *t = op_random(r, F32, 0, 1, DIMS(s[0]));
    struct operand *out = op_output(r, r->act, DIMS(s[0], s[1]));
    double *times = op_doubles(r, s[0]);
    for (int n = 0; n < s[0]; n++)
        times[n] = steps ? n == 0 ? 999 : floor(1000 * t->v[n]) : t->v[n];
    op_rewrite(r, t, times);
    double *want = op_doubles(r, out->count);
    int half = s[1] / 2;
    for (int n = 0; n < s[0]; n++)
        for (int i = 0; i < half; i++) {
            // rounded to f32 where the published code rounds
            float frequency = (float)exp((double)(-9.210340371976184f * (float)i / (float)(full ? half - 1 : half)));
            double angle = (double)((float)times[n] * frequency);
            want[n * s[1] + i] = cos(angle);
            want[n * s[1] + half + i] = sin(angle);
        }
    OK(OP_RUN(r, op_timestep_embed(&r->c, &out->t, &t->t, full)));
    // a frequency may be the f32 next to the nearest, which 999 makes 6e-5 of the fastest angles
    op_judge(r, out, want, op_tolerance(r, full ? 8e-6 : steps ? 3e-6 : 1e-6), "timestep_embed %d x %d", s[0],
             s[1]);
    return PASSED;
}

static int test_timestep_embed(void)
{
    static const int shapes[][6] = {{1, 2}, {5, 256}, {64, 64}, {7, 26}, {5, 256, 1}, {5, 256, 2}};
    return OP_FOR_ALL(timestep_case, shapes);
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
    return OP_FOR_ALL(embed_case, shapes);
}

// ---- elementwise --------------------------------------------------------------------------------

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
    return OP_FOR_ALL(silu_case, flat_shapes);
}

static int test_gelu(void)
{
    return OP_FOR_ALL(gelu_case, flat_shapes);
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
    return OP_FOR_ALL(add_case, flat_shapes);
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
    return OP_FOR_ALL(nan_case, shapes);
}

// ---- LayerNorm with modulation, gated residual --------------------------------------------------

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
    return OP_FOR_ALL(norm_case, row_shapes);
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
    return OP_FOR_ALL(gate_case, row_shapes);
}

// ---- the references' own backward ---------------------------------------------------------------

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
    {NULL, NULL},
};
