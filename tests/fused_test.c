// Operations that are done as one: against the same mathematics in double precision, in every form
// and storage type, at widths and columns that devices with their own versions take and at others.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Whether the device has its own versions of these operations, and no portable kernel may run for
// widths that are multiples of 128.
static bool fuses(const struct op_run *r, int width)
{
    return width % 128 == 0 && width <= r->c.dev->fused_width;
}

#define CHECK_TAKEN(r, width, kernel, before)                           \
    CHECK(!fuses(r, width) || op_launches[KERNEL_##kernel] == (before), \
          "%d columns: " #kernel " was launched", width)

// ---- LayerNorm and what comes before it ---------------------------------------------------------

struct fused {
    int N, T, D, E, K; // images, tokens, width, experts, choices
    int M, W;
    struct norm_columns at;
};

static struct fused fused_shape(const int *s)
{
    struct fused f = {s[0], s[1], s[2], s[3], s[4], s[0] * s[1], 3 * s[2] + 32, {0, 0, 0}};
    f.at = (struct norm_columns){2 * f.D + 24, 8, f.D + 16};
    return f;
}

static const int shapes[][6] = {{1, 3, 8, 2, 1},    {2, 7, 40, 3, 2},     {3, 33, 128, 8, 2},
                                {2, 17, 384, 8, 2}, {2, 130, 1152, 8, 2}, {2, 5, 1408, 16, 3},
                                {1, 3, 512, 4, 1},  {2, 9, 37, 5, 2},     {37, 64, 256, 13, 4},
                                {1, 2, 1664, 8, 2}, {1, 600, 640, 9, 1},  {5, 31, 768, 8, 2},
                                {3, 256, 384, 8, 2}};

static const double *mod_row(const struct fused *f, const struct operand *mod, int m)
{
    return mod->v + m / f->T * f->W;
}

// y = x + gate z; mean and 1/std of its rows; h
static void ref_norm(const struct fused *f, const struct operand *mod, const double *x,
                     const double *z, double *y, double *stats, double *h)
{
    const int D = f->D;
    for (int m = 0; m < f->M; m++) {
        const double *a = mod_row(f, mod, m);
        double sum = 0, squares = 0;
        for (int d = 0; d < D; d++) {
            y[m * D + d] = x[m * D + d] + (z ? a[f->at.gate + d] * z[m * D + d] : 0);
            sum += y[m * D + d] / D;
        }
        for (int d = 0; d < D; d++)
            squares += pow(y[m * D + d] - sum, 2) / D;
        stats[2 * m] = sum;
        stats[2 * m + 1] = 1 / sqrt(squares + 1e-6);
        for (int d = 0; d < D; d++)
            h[m * D + d] = (y[m * D + d] - sum) * stats[2 * m + 1] * (1 + a[f->at.scale + d]) +
                           a[f->at.shift + d];
    }
}

// A random order of the M*K routed rows: slot[m,k].
static double *random_slots(struct op_run *r, int count)
{
    double *slot = op_doubles(r, count);
    for (int i = 0; i < count; i++) {
        const int j = (int)op_uniform(r, 0, i + 1);
        slot[i] = slot[j];
        slot[j] = i;
    }
    return slot;
}

// What a forward test needs.
struct forward {
    struct operand *x, *mod, *y, *h, *stats;
    double *want_y, *want_h, *want_stats;
};

static void forward_operands(struct op_run *r, const struct fused *f, struct forward *t)
{
    t->x = op_random(r, r->act, -1, 3, DIMS(f->M, f->D));
    t->mod = op_random(r, r->act, -1, 1, DIMS(f->N, f->W));
    t->y = op_output(r, r->act, DIMS(f->M, f->D));
    t->h = op_output(r, r->act, DIMS(f->M, f->D));
    t->stats = op_output(r, F32, DIMS(f->M, 2));
    t->want_y = op_doubles(r, t->y->count);
    t->want_h = op_doubles(r, t->h->count);
    t->want_stats = op_doubles(r, t->stats->count);
}

// A composition rounds to bf16 between its operations, too.
static double composed(const struct op_run *r)
{
    return 2 * op_tolerance(r, 1e-5);
}

static void judge_forward(struct op_run *r, const struct fused *f, struct forward *t,
                          const char *what)
{
    const double tolerance = composed(r);
    op_judge(r, t->y, t->want_y, tolerance, "%s y, %d x %d x %d", what, f->N, f->T, f->D);
    op_judge(r, t->h, t->want_h, tolerance, "%s h, %d x %d x %d", what, f->N, f->T, f->D);
    op_judge(r, t->stats, t->want_stats, tolerance, "%s stats, %d x %d x %d", what, f->N, f->T,
             f->D);
}

static int residual_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    struct forward t;
    const uint64_t before = op_launches[KERNEL_layernorm_mod_fwd];
    forward_operands(r, &f, &t);
    struct operand *z = op_random(r, r->act, -1, 1, DIMS(f.M, f.D));
    struct operand *w = op_random(r, F32, -1, 1, DIMS(f.E, f.D));
    struct operand *logits = op_output(r, F32, DIMS(f.M, f.E));
    double *want = op_doubles(r, logits->count);
    ref_norm(&f, t.mod, t.x->v, z->v, t.want_y, t.want_stats, t.want_h);
    for (int i = 0; i < f.M * f.E; i++)
        for (int d = 0; d < f.D; d++)
            want[i] += t.want_h[i / f.E * f.D + d] * w->v[i % f.E * f.D + d];
    OK(OP_RUN(r, op_residual_norm_fwd(&r->c, &t.y->t, &t.h->t, &t.stats->t, &logits->t, &t.x->t,
                                      &z->t, &t.mod->t, f.at, &w->t)));
    judge_forward(r, &f, &t, "residual_norm");
    op_judge(r, logits, want, composed(r), "router logits, %d x %d to %d", f.M, f.D, f.E);

    const bool fused = op_combine_norm_fuses(&r->c, f.D); // y is not kept
    OK(OP_RUN(r, op_residual_norm_fwd(&r->c, fused ? NULL : &t.y->t, &t.h->t, &t.stats->t,
                                      &logits->t, &t.x->t, &z->t, &t.mod->t, f.at, &w->t)));
    op_judge(r, t.h, t.want_h, composed(r), "residual_norm without y, h");
    op_judge(r, logits, want, composed(r), "residual_norm without y, logits");
    op_rewrite(r, t.y, z->v); // without router, onto z's own x
    OK(OP_RUN(r, op_residual_norm_fwd(&r->c, &t.x->t, &t.h->t, &t.stats->t, NULL, &t.x->t, &z->t,
                                      &t.mod->t, f.at, NULL)));
    op_judge(r, t.x, t.want_y, composed(r), "residual_norm in place");
    op_judge(r, t.h, t.want_h, composed(r), "residual_norm in place, h");
    CHECK_TAKEN(r, f.D, layernorm_mod_fwd, before);
    return PASSED;
}

static int residual_norm(void)
{
    return OP_FOR_ALL(residual_case, shapes);
}

static int plain_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    struct forward t;
    const uint64_t before = op_launches[KERNEL_layernorm_mod_fwd];
    forward_operands(r, &f, &t);
    ref_norm(&f, t.mod, t.x->v, NULL, t.want_y, t.want_stats, t.want_h);
    OK(OP_RUN(r, op_layernorm_mod_fwd(&r->c, &t.h->t, &t.stats->t, &t.x->t, &t.mod->t, f.at.shift,
                                      f.at.scale)));
    op_judge(r, t.h, t.want_h, op_tolerance(r, 1e-5), "layernorm, %d x %d", f.M, f.D);
    op_judge(r, t.stats, t.want_stats, 1e-5, "layernorm stats, %d x %d", f.M, f.D);
    CHECK_TAKEN(r, f.D, layernorm_mod_fwd, before);
    return PASSED;
}

static int layernorm(void)
{
    return OP_FOR_ALL(plain_case, shapes);
}

// A mean a thousand times the deviation: only a careful variance survives.
static int far_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    struct forward t;
    forward_operands(r, &f, &t);
    for (int64_t i = 0; i < t.x->count; i++)
        t.x->v[i] = 256 + (double)(i * 7919 % 5) - 2;
    op_rewrite(r, t.x, t.x->v);
    ref_norm(&f, t.mod, t.x->v, NULL, t.want_y, t.want_stats, t.want_h);
    OK(OP_RUN(r, op_layernorm_mod_fwd(&r->c, &t.h->t, &t.stats->t, &t.x->t, &t.mod->t, f.at.shift,
                                      f.at.scale)));
    op_judge(r, t.h, t.want_h, op_tolerance(r, 1e-4), "layernorm far from 0, %d x %d", f.M, f.D);
    return PASSED;
}

static int layernorm_far(void)
{
    static const int far[][6] = {{2, 9, 384, 1, 1}, {1, 5, 1152, 1, 1}, {1, 7, 640, 1, 1}};
    return OP_FOR_ALL(far_case, far);
}

// ---- combination --------------------------------------------------------------------------------

static int combine_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    struct forward t;
    const uint64_t before = op_launches[KERNEL_combine_fwd];
    const int R = f.M * f.K;
    forward_operands(r, &f, &t);
    struct operand *rows = op_random(r, r->act, -1, 1, DIMS(R, f.D));
    struct operand *slot = op_values(r, I32, random_slots(r, R), DIMS(f.M, f.K));
    struct operand *weight = op_random(r, F32, 0, 1, DIMS(f.M, f.K));
    struct operand *shared = op_random(r, r->act, -1, 1, DIMS(f.M, f.D));
    struct operand *z = op_output(r, r->act, DIMS(f.M, f.D));
    struct operand *z1 = op_random(r, r->act, -1, 1, DIMS(f.M, f.D));
    double *want = op_doubles(r, z->count), *sum = op_doubles(r, z->count);
    const int gate1 = f.at.shift; // any column
    for (int with = 1; with >= 0;
         with--) { // the shared expert; then z1 instead, and no z where allowed
        for (int i = 0; i < f.M * f.D; i++) {
            want[i] = with ? shared->v[i] : 0;
            sum[i] = t.x->v[i];
            if (!with)
                sum[i] += mod_row(&f, t.mod, i / f.D)[gate1 + i % f.D] * z1->v[i];
            for (int k = 0; k < f.K; k++) {
                const int pair = i / f.D * f.K + k;
                want[i] += weight->v[pair] * rows->v[(int)slot->v[pair] * f.D + i % f.D];
            }
        }
        const bool kept = with || !op_combine_norm_fuses(&r->c, f.D);
        ref_norm(&f, t.mod, sum, want, t.want_y, t.want_stats, t.want_h);
        OK(OP_RUN(r, op_combine_norm_fwd(&r->c, &t.y->t, &t.h->t, &t.stats->t, kept ? &z->t : NULL,
                                         &t.x->t, with ? NULL : &z1->t, gate1, &rows->t, &slot->t,
                                         &weight->t, with ? &shared->t : NULL, &t.mod->t, f.at)));
        judge_forward(r, &f, &t, with ? "combine_norm" : "combine_norm onto two");
        if (kept)
            op_judge(r, z, want, op_tolerance(r, 1e-5), "combine_norm z, %d x %d", f.M, f.D);
    }
    CHECK_TAKEN(r, f.D, combine_fwd, before);
    return PASSED;
}

static int combine_norm(void)
{
    return OP_FOR_ALL(combine_case, shapes);
}

static int rows_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    const uint64_t before[] = {op_launches[KERNEL_dispatch_fwd], op_launches[KERNEL_combine_bwd]};
    const int R = f.M * f.K, D = f.D;
    double *slots = random_slots(r, R), *tokens = op_doubles(r, R);
    for (int i = 0; i < R; i++)
        tokens[(int)slots[i]] = i / f.K;
    struct operand *slot = op_values(r, I32, slots, DIMS(f.M, f.K));
    struct operand *token = op_values(r, I32, tokens, DIMS(R));
    struct operand *dout = op_random(r, r->act, -1, 1, DIMS(f.M, D));
    struct operand *weight = op_random(r, F32, 0, 1, DIMS(f.M, f.K));
    struct operand *rows = op_output(r, r->act, DIMS(R, D));
    struct operand *dweight = op_output(r, F32, DIMS(f.M, f.K));
    double *want = op_doubles(r, rows->count), *want_weight = op_doubles(r, R);
    OK(OP_RUN(r, op_dispatch_fwd(&r->c, &rows->t, &dout->t, &token->t, &slot->t)));
    for (int i = 0; i < R * D; i++)
        want[i] = dout->v[(int)tokens[i / D] * D + i % D];
    op_judge_exact(r, rows, want, "dispatch %d x %d", R, D);

    struct operand *y = op_random(r, r->act, -1, 1, DIMS(R, D));
    for (int pair = 0; pair < R; pair++)
        for (int d = 0; d < D; d++) {
            const double g = dout->v[pair / f.K * D + d];
            want[(int)slots[pair] * D + d] = weight->v[pair] * g;
            want_weight[pair] += g * y->v[(int)slots[pair] * D + d];
        }
    OK(OP_RUN(r, op_combine_bwd(&r->c, &y->t, &dweight->t, &dout->t, &y->t, &slot->t, &weight->t)));
    op_judge(r, y, want, op_tolerance(r, 1e-6), "combine_bwd %d x %d", R, D);
    op_judge(r, dweight, want_weight, 1e-5, "combine_bwd dweight %d x %d", R, D);
    CHECK_TAKEN(r, f.D, dispatch_fwd, before[0]);
    CHECK_TAKEN(r, f.D, combine_bwd, before[1]);
    return PASSED;
}

static int rows_moved(void)
{
    return OP_FOR_ALL(rows_case, shapes);
}

// ---- the stream in two halves -------------------------------------------------------------------

// An f32 tensor in two halves.
struct halves {
    struct operand *high, *low;
};

static struct halves halves_output(struct op_run *r, int rows, int columns)
{
    struct halves h = {op_output(r, BF16, DIMS(rows, columns)),
                       op_output(r, BF16, DIMS(rows, columns))};
    h.high->t.low = &h.low->t;
    return h;
}

// Both halves against `want`; and the high one is the nearest bf16.
static int judge_halves(struct op_run *r, struct halves *y, const double *want, double tolerance,
                        const char *what)
{
    const int64_t rows = y->high->t.shape[0], columns = y->high->t.shape[1];
    struct operand *joined = op_output(r, F32, DIMS(rows, columns));
    OK(OP_RUN(r, op_widen(&r->c, &joined->t, &y->high->t, &y->low->t)));
    op_judge(r, joined, want, tolerance, "%s in halves, %lld x %lld", what, (long long)rows,
             (long long)columns);
    OK(op_read(r, y->high));
    for (int64_t i = 0; i < joined->count; i++)
        CHECK(fabs(y->high->v[i] - joined->v[i]) <= fabs(joined->v[i]) / 256,
              "%s: %g is not the nearest to %g", what, y->high->v[i], joined->v[i]);
    return PASSED;
}

static int halves_residual(struct op_run *r, const struct fused *f, struct forward *t,
                           struct halves *x, const double *stream)
{
    struct halves y = halves_output(r, f->M, f->D);
    struct operand *z = op_random(r, r->act, -1, 1, DIMS(f->M, f->D));
    struct operand *w = op_random(r, F32, -1, 1, DIMS(f->E, f->D));
    struct operand *logits = op_output(r, F32, DIMS(f->M, f->E));
    double *want = op_doubles(r, logits->count);
    ref_norm(f, t->mod, stream, z->v, t->want_y, t->want_stats, t->want_h);
    for (int i = 0; i < f->M * f->E; i++)
        for (int d = 0; d < f->D; d++)
            want[i] += t->want_h[i / f->E * f->D + d] * w->v[i % f->E * f->D + d];
    OK(OP_RUN(r, op_residual_norm_fwd(&r->c, &y.high->t, &t->h->t, &t->stats->t, &logits->t,
                                      &x->high->t, &z->t, &t->mod->t, f->at, &w->t)));
    CHECK(judge_halves(r, &y, t->want_y, 1e-6, "residual_norm") == PASSED, "y");
    op_judge(r, logits, want, 1e-5, "router logits from halves, %d x %d", f->M, f->D);
    op_judge(r, t->h, t->want_h, op_tolerance(r, 1e-5), "residual_norm from halves, h");
    // in place, without router
    OK(OP_RUN(r, op_residual_norm_fwd(&r->c, &x->high->t, &t->h->t, &t->stats->t, NULL, &x->high->t,
                                      &z->t, &t->mod->t, f->at, NULL)));
    CHECK(judge_halves(r, x, t->want_y, 1e-6, "residual_norm in place") == PASSED, "x");
    op_judge(r, t->h, t->want_h, op_tolerance(r, 1e-5), "residual_norm in place, h");
    op_judge(r, t->stats, t->want_stats, 1e-5, "residual_norm in place, stats");
    return PASSED;
}

// From x in halves into y in halves, with a second branch and no shared expert.
static int halves_combine(struct op_run *r, const struct fused *f, struct forward *t,
                          const struct halves *x, const double *stream)
{
    const int R = f->M * f->K, D = f->D, gate1 = f->at.shift;
    struct halves y = halves_output(r, f->M, D);
    struct operand *rows = op_random(r, r->act, -1, 1, DIMS(R, D));
    struct operand *slot = op_values(r, I32, random_slots(r, R), DIMS(f->M, f->K));
    struct operand *weight = op_random(r, F32, 0, 1, DIMS(f->M, f->K));
    struct operand *z1 = op_random(r, r->act, -1, 1, DIMS(f->M, D));
    double *sum = op_doubles(r, t->h->count), *branch = op_doubles(r, t->h->count);
    for (int i = 0; i < f->M * D; i++) {
        sum[i] = stream[i] + mod_row(f, t->mod, i / D)[gate1 + i % D] * z1->v[i];
        for (int k = 0; k < f->K; k++) {
            const int pair = i / D * f->K + k;
            branch[i] += weight->v[pair] * rows->v[(int)slot->v[pair] * D + i % D];
        }
    }
    ref_norm(f, t->mod, sum, branch, t->want_y, t->want_stats, t->want_h);
    OK(OP_RUN(r, op_combine_norm_fwd(&r->c, &y.high->t, &t->h->t, &t->stats->t, NULL, &x->high->t,
                                     &z1->t, gate1, &rows->t, &slot->t, &weight->t, NULL,
                                     &t->mod->t, f->at)));
    op_judge(r, t->h, t->want_h, op_tolerance(r, 1e-5), "combine_norm from halves, h");
    op_judge(r, t->stats, t->want_stats, 1e-5, "combine_norm from halves, stats");
    return judge_halves(r, &y, t->want_y, 1e-6, "combine_norm");
}

// Every device splits and joins; those with one pass for these operations take x so.
static int halves_case(struct op_run *r, const int *s)
{
    struct fused f = fused_shape(s);
    struct forward t;
    if (r->c.dev->cpu_forms)
        return PASSED; // f32 only
    forward_operands(r, &f, &t);
    struct operand *stream = op_random(r, F32, -1, 3, DIMS(f.M, f.D));
    stream->v[0] = 1 + 1.0 / 256; // a tie
    stream->v[1] = -stream->v[0];
    op_rewrite(r, stream, stream->v);
    struct halves x = halves_output(r, f.M, f.D);
    OK(OP_RUN(r, op_round(&r->c, &x.high->t, &x.low->t, &stream->t)));
    CHECK(judge_halves(r, &x, stream->v, 1e-9, "round") == PASSED, "round");
    if (r->act != BF16 || !op_combine_norm_fuses(&r->c, f.D))
        return PASSED;
    ref_norm(&f, t.mod, stream->v, NULL, t.want_y, t.want_stats, t.want_h);
    OK(OP_RUN(r, op_layernorm_mod_fwd(&r->c, &t.h->t, &t.stats->t, &x.high->t, &t.mod->t,
                                      f.at.shift, f.at.scale)));
    op_judge(r, t.h, t.want_h, op_tolerance(r, 1e-5), "layernorm from halves, h");
    op_judge(r, t.stats, t.want_stats, 1e-6, "layernorm from halves, stats");
    CHECK(halves_combine(r, &f, &t, &x, stream->v) == PASSED, "combine");
    return halves_residual(r, &f, &t, &x, stream->v);
}

static int stream_halves(void)
{
    return OP_FOR_ALL(halves_case, shapes);
}

// ---- backward -----------------------------------------------------------------------------------

struct backward {
    struct operand *dx, *dz, *dmod, *dh, *drows, *slot, *dlogits, *w, *y, *stats, *z, *mod;
    double *want_dx, *want_dz, *want_dmod;
};

static void backward_operands(struct op_run *r, const struct fused *f, struct backward *t)
{
    const int R = f->M * f->K;
    t->dx = op_random(r, r->act, -1, 1, DIMS(f->M, f->D));
    t->dz = op_output(r, r->act, DIMS(f->M, f->D));
    t->dmod = op_random(r, r->act, -1, 1, DIMS(f->N, f->W));
    t->dh = op_random(r, r->act, -1, 1, DIMS(f->M, f->D));
    t->drows = op_random(r, r->act, -1, 1, DIMS(R, f->D));
    t->slot = op_values(r, I32, random_slots(r, R), DIMS(f->M, f->K));
    t->dlogits = op_random(r, F32, -1, 1, DIMS(f->M, f->E));
    t->w = op_random(r, F32, -1, 1, DIMS(f->E, f->D));
    t->y = op_random(r, r->act, -1, 3, DIMS(f->M, f->D));
    t->z = op_random(r, r->act, -1, 1, DIMS(f->M, f->D));
    t->mod = op_random(r, r->act, -1, 1, DIMS(f->N, f->W));
    t->want_dx = op_doubles(r, t->dx->count);
    t->want_dz = op_doubles(r, t->dz->count);
    t->want_dmod = op_doubles(r, t->dmod->count);
    double *y = op_doubles(r, t->y->count), *h = op_doubles(r, t->y->count);
    double *stats = op_doubles(r, 2 * f->M);
    ref_norm(f, t->mod, t->y->v, NULL, y, stats, h);
    t->stats = op_values(r, F32, stats, DIMS(f->M, 2));
    memcpy(t->want_dx, t->dx->v, (size_t)t->dx->count * sizeof *t->want_dx);
    memcpy(t->want_dmod, t->dmod->v, (size_t)t->dmod->count * sizeof *t->want_dmod);
}

// One row: g is its completed dh.
static void ref_backward_row(const struct fused *f, const struct backward *t, int m,
                             const double *g, bool gated)
{
    const int D = f->D;
    const double *a = mod_row(f, t->mod, m), *y = t->y->v + m * D;
    const double mean = t->stats->v[2 * m], rstd = t->stats->v[2 * m + 1];
    double *dmod = t->want_dmod + m / f->T * f->W, sum = 0, slope = 0;
    for (int d = 0; d < D; d++) {
        const double p = g[d] * (1 + a[f->at.scale + d]), normal = (y[d] - mean) * rstd;
        sum += p / D;
        slope += p * normal / D;
        dmod[f->at.shift + d] += g[d];
        dmod[f->at.scale + d] += g[d] * normal;
    }
    for (int d = 0; d < D; d++) {
        const double p = g[d] * (1 + a[f->at.scale + d]), normal = (y[d] - mean) * rstd;
        double *dx = &t->want_dx[m * D + d];
        *dx += rstd * (p - sum - normal * slope);
        t->want_dz[m * D + d] = a[f->at.gate + d] * *dx;
        if (gated)
            dmod[f->at.gate + d] += *dx * t->z->v[m * D + d];
    }
}

// branches: with the experts' rows and the router's gradient; gated: with dz
static void ref_backward(struct op_run *r, const struct fused *f, const struct backward *t,
                         bool branches, bool gated)
{
    double *g = op_doubles(r, f->D);
    for (int n = 0; n < f->N; n++)
        for (int d = 0; d < f->D; d++) {
            double *dmod = t->want_dmod + n * f->W;
            dmod[f->at.shift + d] = dmod[f->at.scale + d] = 0;
            if (gated)
                dmod[f->at.gate + d] = 0;
        }
    for (int m = 0; m < f->M; m++) {
        for (int d = 0; d < f->D; d++) {
            g[d] = t->dh->v[m * f->D + d];
            for (int k = 0; branches && k < f->K; k++)
                g[d] += t->drows->v[(int)t->slot->v[m * f->K + k] * f->D + d];
            for (int e = 0; branches && e < f->E; e++)
                g[d] += t->dlogits->v[m * f->E + e] * t->w->v[e * f->D + d];
        }
        ref_backward_row(f, t, m, g, gated);
    }
}

static int backward_variant(struct op_run *r, const struct fused *f, bool branches, bool gated)
{
    struct backward t;
    const double tolerance = op_tolerance(r, 2e-5) > 1e-4 ? 1e-2 : 2e-5;
    backward_operands(r, f, &t);
    ref_backward(r, f, &t, branches, gated);
    OK(OP_RUN(r, op_norm_gate_bwd(&r->c, &t.dx->t, gated ? &t.dz->t : NULL, &t.dmod->t, &t.dh->t,
                                  branches ? &t.drows->t : NULL, branches ? &t.slot->t : NULL,
                                  branches ? &t.dlogits->t : NULL, branches ? &t.w->t : NULL,
                                  &t.y->t, &t.stats->t, gated ? &t.z->t : NULL, &t.mod->t, f->at)));
    op_judge(r, t.dx, t.want_dx, tolerance, "norm_gate_bwd dx %d x %d x %d, %d %d", f->N, f->T,
             f->D, branches, gated);
    if (gated)
        op_judge(r, t.dz, t.want_dz, tolerance, "norm_gate_bwd dz %d x %d x %d, %d", f->N, f->T,
                 f->D, branches);
    op_judge(r, t.dmod, t.want_dmod, tolerance, "norm_gate_bwd dmod %d x %d x %d, %d %d", f->N,
             f->T, f->D, branches, gated);
    return PASSED;
}

static int backward_case(struct op_run *r, const int *s)
{
    const struct fused f = fused_shape(s);
    const uint64_t before = op_launches[KERNEL_layernorm_mod_bwd];
    for (int branches = 0; branches < 2; branches++)
        for (int gated = 0; gated < 2; gated++)
            CHECK(backward_variant(r, &f, branches, gated) == PASSED, "%d %d", branches, gated);
    struct backward t; // dz in place of z
    backward_operands(r, &f, &t);
    ref_backward(r, &f, &t, false, true);
    OK(OP_RUN(r, op_norm_gate_bwd(&r->c, &t.dx->t, &t.z->t, &t.dmod->t, &t.dh->t, NULL, NULL, NULL,
                                  NULL, &t.y->t, &t.stats->t, &t.z->t, &t.mod->t, f.at)));
    op_judge(r, t.z, t.want_dz, op_tolerance(r, 2e-5) * 2, "norm_gate_bwd in place");
    CHECK_TAKEN(r, f.D, layernorm_mod_bwd, before);
    return PASSED;
}

static int norm_gate_bwd(void)
{
    return OP_FOR_ALL(backward_case, shapes);
}

// ---- sums over rows -----------------------------------------------------------------------------

static int router_dw_case(struct op_run *r, const int *s)
{
    const int M = s[0], E = s[1], D = s[2];
    struct operand *dlogits = op_random(r, F32, -1, 1, DIMS(M, E));
    struct operand *h = op_random(r, r->act, -1, 1, DIMS(M, D));
    struct operand *dw = op_random(r, F32, -1, 1, DIMS(E, D));
    struct operand *dy = op_random(r, r->act, -1, 1, DIMS(M, D));
    struct operand *bias = op_random(r, F32, -1, 1, DIMS(D)),
                   *x = op_random(r, r->act, -1, 1, DIMS(M, 8));
    struct operand *unused = op_random(r, F32, -1, 1, DIMS(D, 8));
    double *want = op_doubles(r, dw->count), *product = op_doubles(r, dw->count);
    double *sums = op_doubles(r, D);
    for (int i = 0; i < E * D; i++) {
        for (int m = 0; m < M; m++)
            product[i] += dlogits->v[m * E + i / D] * h->v[m * D + i % D];
        want[i] = dw->v[i] + product[i];
    }
    for (int d = 0; d < D; d++) {
        sums[d] = bias->v[d];
        for (int m = 0; m < M; m++)
            sums[d] += dy->v[m * D + d];
    }
    OK(OP_RUN(r, op_router_dw(&r->c, &dw->t, &dlogits->t, &h->t)));
    op_judge(r, dw, want, 1e-5, "router_dw %d x %d x %d", M, E, D);
    r->c.fresh_gradients = true;
    OK(OP_RUN(r, op_router_dw(&r->c, &dw->t, &dlogits->t, &h->t)));
    r->c.fresh_gradients = false;
    op_judge(r, dw, product, 1e-5, "router_dw written %d x %d x %d", M, E, D);
    OK(OP_RUN(r, op_linear_dw(&r->c, &unused->t, &bias->t, &dy->t, &x->t)));
    op_judge(r, bias, sums, 1e-5, "column sums %d x %d", M, D);
    return PASSED;
}

static int router_dw(void)
{
    static const int sizes[][6] = {{1, 1, 8},      {100, 8, 384}, {1000, 16, 64}, {300, 3, 40},
                                   {700, 8, 1152}, {5000, 9, 16}, {33, 2, 2048},  {65, 5, 37}};
    return OP_FOR_ALL(router_dw_case, sizes);
}

// ---- the router ---------------------------------------------------------------------------------

struct routed {
    double *probs, *weight, *index, *offsets, *slot, *token, *fraction, *mean;
};

static void ref_choose(const double *logits, int E, int K, bool renormalise, double *probs,
                       double *weight, double *index)
{
    double most = -1e300, sum = 0;
    for (int e = 0; e < E; e++)
        most = fmax(most, logits[e]);
    for (int e = 0; e < E; e++)
        sum += probs[e] = exp(logits[e] - most);
    for (int e = 0; e < E; e++)
        probs[e] /= sum;
    sum = 0;
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int e = 0; e < E; e++) {
            bool taken = false;
            for (int j = 0; j < k; j++)
                taken |= index[j] == e;
            if (!taken && (best < 0 || logits[e] > logits[best]))
                best = e;
        }
        index[k] = best;
        sum += weight[k] = probs[best];
    }
    for (int k = 0; k < K && renormalise && K > 1; k++)
        weight[k] /= sum;
}

// M, E, K, G
static struct routed ref_router(struct op_run *r, const int *s, const double *logits,
                                bool renormalise)
{
    const int M = s[0], E = s[1], K = s[2], G = s[3];
    struct routed t = {op_doubles(r, M * E), op_doubles(r, M * K), op_doubles(r, M * K),
                       op_doubles(r, E + 1), op_doubles(r, M * K), op_doubles(r, M * K),
                       op_doubles(r, G * E), op_doubles(r, G * E)};
    int row = 0;
    for (int m = 0; m < M; m++)
        ref_choose(logits + m * E, E, K, renormalise, t.probs + m * E, t.weight + m * K,
                   t.index + m * K);
    for (int e = 0; e < E; e++) {
        t.offsets[e] = row;
        for (int pair = 0; pair < M * K; pair++)
            if (t.index[pair] == e) {
                t.slot[pair] = row;
                t.token[row++] = pair / K;
                t.fraction[pair / K / (M / G) * E + e] += (double)E / (M / G * K);
            }
        for (int m = 0; m < M; m++)
            t.mean[m / (M / G) * E + e] += t.probs[m * E + e] / (M / G);
    }
    t.offsets[E] = row;
    return t;
}

static int route_case(struct op_run *r, const int *s)
{
    const int M = s[0], E = s[1], K = s[2], G = s[3];
    const bool renormalise = M % 2 == 0;
    const uint64_t before = op_launches[KERNEL_route_place];
    struct operand *logits = op_random(r, F32, -4, 4, DIMS(M, E));
    for (int m = 0; m < M; m++) // some rows are ties; in the last rows expert E-1 is never chosen
        for (int e = 0; e < E; e++)
            logits->v[m * E + e] = m % 5 == 3            ? e / 2
                                   : e == E - 1 && E > K ? -20
                                                         : logits->v[m * E + e];
    op_rewrite(r, logits, logits->v);
    struct operand *probs = op_output(r, F32, DIMS(M, E)), *weight = op_output(r, F32, DIMS(M, K));
    struct operand *index = op_output(r, I32, DIMS(M, K)), *slot = op_output(r, I32, DIMS(M, K));
    struct operand *offsets = op_output(r, I32, DIMS(E + 1)),
                   *token = op_output(r, I32, DIMS(M * K));
    struct operand *fraction = op_output(r, F32, DIMS(G, E)), *mean = op_output(r, F32, DIMS(G, E));
    struct routed want = ref_router(r, s, logits->v, renormalise);
    for (int balance = 1; balance >= 0; balance--) {
        OK(OP_RUN(r, op_router_route(&r->c, &probs->t, &weight->t, &index->t, &offsets->t, &slot->t,
                                     &token->t, balance ? &fraction->t : NULL,
                                     balance ? &mean->t : NULL, &logits->t, renormalise)));
        op_judge(r, probs, want.probs, 1e-5, "probs %d x %d", M, E);
        op_judge(r, weight, want.weight, 1e-5, "weight %d x %d", M, K);
        op_judge_exact(r, index, want.index, "index %d x %d of %d", M, K, E);
        op_judge_exact(r, offsets, want.offsets, "offsets %d x %d of %d", M, K, E);
        op_judge_exact(r, slot, want.slot, "slot %d x %d of %d", M, K, E);
        op_judge_exact(r, token, want.token, "token %d x %d of %d", M, K, E);
    }
    op_judge(r, fraction, want.fraction, 1e-5, "fraction %d x %d of %d", M, K, E);
    op_judge(r, mean, want.mean, 1e-5, "mean_prob %d x %d of %d", M, K, E);
    if (E <= 16 && K <= 8 && (G == 1 || M / G % 256 == 0))
        CHECK_TAKEN(r, 128, route_place, before);
    return PASSED;
}

static int router_route(void)
{
    static const int sizes[][6] = {{1, 8, 2, 1},   {257, 8, 2, 1},   {512, 8, 2, 2},
                                   {300, 4, 1, 3}, {1000, 16, 8, 1}, {700, 33, 3, 1},
                                   {256, 2, 2, 1}, {5001, 13, 2, 1}, {1536, 8, 2, 3},
                                   {64, 1, 1, 1},  {20000, 8, 2, 1}};
    return OP_FOR_ALL(route_case, sizes);
}

// A row that is not finite still gets distinct experts, and the sort stays a permutation.
static int nan_case(struct op_run *r, const int *s)
{
    const int M = s[0], E = s[1], K = s[2];
    struct operand *logits = op_random(r, F32, -4, 4, DIMS(M, E));
    for (int e = 0; e < E; e++) {
        logits->v[e] = (double)NAN;
        logits->v[E + e] = e == 1 ? (double)NAN : e;
    }
    op_rewrite(r, logits, logits->v);
    struct operand *probs = op_output(r, F32, DIMS(M, E)), *weight = op_output(r, F32, DIMS(M, K));
    struct operand *index = op_output(r, I32, DIMS(M, K)), *slot = op_output(r, I32, DIMS(M, K));
    struct operand *offsets = op_output(r, I32, DIMS(E + 1)),
                   *token = op_output(r, I32, DIMS(M * K));
    OK(OP_RUN(r, op_router_route(&r->c, &probs->t, &weight->t, &index->t, &offsets->t, &slot->t,
                                 &token->t, NULL, NULL, &logits->t, true)));
    CHECK(op_read(r, index) == 0 && op_read(r, slot) == 0 && op_read(r, token) == 0, "guards");
    for (int i = 0; i < M * K; i++) {
        const int to = (int)slot->v[i];
        CHECK(to >= 0 && to < M * K && token->v[to] == i / K, "slot[%d] = %d", i, to);
        CHECK(index->v[i] >= 0 && index->v[i] < E, "index[%d] = %g", i, index->v[i]);
        CHECK(i % K == 0 || index->v[i] != index->v[i - 1], "index[%d] twice", i);
    }
    return PASSED;
}

static int router_nan(void)
{
    static const int sizes[][6] = {{40, 8, 2}, {300, 16, 2}};
    return OP_FOR_ALL(nan_case, sizes);
}

const struct test fused_tests[] = {
    {"layernorm", layernorm},
    {"layernorm_far", layernorm_far},
    {"residual_norm", residual_norm},
    {"combine_norm", combine_norm},
    {"stream_halves", stream_halves},
    {"rows_moved", rows_moved},
    {"norm_gate_bwd", norm_gate_bwd},
    {"router_dw", router_dw},
    {"router_route", router_route},
    {"router_nan", router_nan},
    {NULL, NULL},
};
