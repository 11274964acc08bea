// The Frechet distance: against closed forms, and against scipy's matrix root (make_eval.py).
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/frechet.h"
#include "model/lapack.h"

#define NEED_LAPACK()                            \
    do {                                         \
        if (lapack_open() < 0) {                 \
            printf("    %s\n", error_message()); \
            return SKIPPED;                      \
        }                                        \
    } while (0)

static int distance(int dim, const double *m1, const double *s1, const double *m2, const double *s2,
                    double *out)
{
    struct gaussian a = {dim, 0, (double *)m1, (double *)s1};
    struct gaussian b = {dim, 0, (double *)m2, (double *)s2};
    return frechet_distance(&a, &b, out);
}

static int test_closed_forms(void)
{
    NEED_LAPACK();
    const double zero[3] = {0}, ones[3] = {1, -1, 2};
    const double d1[9] = {4, 0, 0, 0, 9, 0, 0, 0, 1}, d2[9] = {1, 0, 0, 0, 25, 0, 0, 0, 0};
    double d;
    OK(distance(3, zero, d1, ones, d2, &d)); // 6 + (2-1)^2 + (3-5)^2 + 1
    CHECK(fabs(d - 12) < 1e-12, "diagonal: %.17g", d);
    OK(distance(3, ones, d2, zero, d1, &d));
    CHECK(fabs(d - 12) < 1e-12, "the other way round: %.17g", d);
    // two dimensions, not commuting: tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det A det B))
    const double a[4] = {3, 1, 1, 2}, b[4] = {5, -2, -2, 1};
    const double trace = 3 * 5 + 1 * -2 + 1 * -2 + 2 * 1, root = sqrt(trace + 2 * sqrt(5.0 * 1.0));
    OK(distance(2, zero, a, zero, b, &d));
    CHECK(fabs(d - (5 + 6 - 2 * root)) < 1e-12, "2x2: %.17g, not %.17g", d, 11 - 2 * root);
    const double nothing[9] = {0};
    OK(distance(3, zero, nothing, zero, d1, &d));
    CHECK(fabs(d - 14) < 1e-12, "a point: %.17g", d);
    const double nan[9] = {NAN};
    CHECK(distance(3, zero, nan, zero, d1, &d) == ERR_INPUT, "NaN is accepted");
    return PASSED;
}

// Rows [count,dim] of array `name` as floats.
static float *read_rows(struct npz *z, const char *name, int64_t *count)
{
    struct npz_reader *r = NULL;
    struct npy_array a;
    if (npz_read_open(z, name, &a, &r) < 0)
        return NULL;
    double *v = malloc(sizeof *v * (size_t)a.count);
    float *rows = malloc(sizeof *rows * (size_t)a.count);
    if (npz_read_doubles(r, v, a.count) == 0)
        for (int64_t i = 0; i < a.count; i++)
            rows[i] = (float)v[i];
    *count = a.shape[0];
    npz_read_close(r);
    free(v);
    return rows;
}

static int summarise(struct npz *z, const char *name, struct gaussian *out)
{
    int64_t count = 0;
    struct moments *m;
    float *rows = read_rows(z, name, &count);
    TRY(moments_new(20, &m));
    TRY(moments_add(m, rows, 1)); // the batches do not matter
    TRY(moments_add(m, rows + 20, count - 1));
    TRY(moments_finish(m, out));
    moments_free(m);
    free(rows);
    return 0;
}

static double worst(const double *a, const double *b, int count)
{
    double most = 0;
    for (int i = 0; i < count; i++)
        most = fmax(most, fabs(a[i] - b[i]));
    return most;
}

static int test_scipy(void)
{
    NEED_LAPACK();
    struct npz *z;
    struct npy_array array;
    struct npz_reader *r;
    struct gaussian a, b, file;
    double want, got;
    OK(npz_open(TEST_DATA "/eval/frechet.npz", &z));
    OK(summarise(z, "a", &a));
    OK(summarise(z, "b", &b));
    CHECK(a.count == 60 && b.count == 15, "counts");
    OK(gaussian_read(z, "mu", "sigma", 20, &file));
    CHECK(worst(a.mean, file.mean, 20) < 1e-6, "mean");
    CHECK(worst(a.covariance, file.covariance, 400) < 1e-5, "covariance");
    gaussian_free(&file);
    OK(gaussian_read(z, "mu_s", "sigma_s", 20, &file));
    CHECK(worst(b.covariance, file.covariance, 400) < 1e-5, "singular covariance");
    OK(npz_read_open(z, "distance", &array, &r));
    OK(npz_read_doubles(r, &want, 1));
    npz_read_close(r);
    OK(frechet_distance(&a, &b, &got));
    CHECK(fabs(got - want) < 1e-6 * want, "%.9g, scipy has %.9g", got, want);
    OK(frechet_distance(&a, &file, &got)); // the number of images not known
    CHECK(fabs(got - want) < 1e-6 * want, "%.9g, scipy has %.9g", got, want);
    gaussian_free(&file);
    OK(frechet_distance(&b, &b, &got));
    CHECK(fabs(got) < 1e-6, "of itself: %g", got);
    CHECK(gaussian_read(z, "mu", "sigma", 21, &file) == ERR_INPUT, "another size");
    CHECK(gaussian_read(z, "mu", "a", 20, &file) == ERR_INPUT, "no square");
    CHECK(gaussian_read(z, "mu", "none", 20, &file) == ERR_INPUT, "none");
    gaussian_free(&a), gaussian_free(&b);
    npz_close(z);
    return PASSED;
}

// 700 rows: three blocks and a part. A large mean costs no digits.
static int test_sums(void)
{
    NEED_LAPACK();
    enum { DIM = 3, ROWS = 700 };
    static float rows[ROWS][DIM];
    struct moments *m;
    struct gaussian g;
    OK(moments_new(DIM, &m));
    CHECK(moments_finish(m, &g) == ERR_INPUT, "no rows");
    double mean[DIM] = {0}, cov[DIM][DIM] = {{0}};
    for (int i = 0; i < ROWS; i++)
        for (int d = 0; d < DIM; d++) {
            rows[i][d] = 4096 + (float)(i * (d + 7) % 101) / 128;
            mean[d] += (double)rows[i][d] / ROWS;
        }
    for (int i = 0; i < ROWS; i++)
        for (int d = 0; d < DIM; d++)
            for (int e = 0; e < DIM; e++)
                cov[d][e] +=
                    ((double)rows[i][d] - mean[d]) * ((double)rows[i][e] - mean[e]) / (ROWS - 1);
    for (int i = 0; i < ROWS; i += 70)
        OK(moments_add(m, rows[i], 70));
    OK(moments_finish(m, &g));
    CHECK(worst(g.mean, mean, DIM) < 1e-9, "mean off by %g", worst(g.mean, mean, DIM));
    CHECK(worst(g.covariance, cov[0], DIM * DIM) < 1e-12, "covariance off by %g",
          worst(g.covariance, cov[0], DIM * DIM));
    char written[512];
    snprintf(written, sizeof written, "%s/stats.npz", test_directory());
    struct zip_writer *w;
    struct npz *z;
    struct gaussian back;
    OK(zip_create(written, &w));
    OK(gaussian_write(w, "mu", "sigma", &g));
    OK(gaussian_write(w, "mu_s", "sigma_s", &g));
    OK(zip_commit(w));
    OK(npz_open(written, &z));
    OK(gaussian_read(z, "mu_s", "sigma_s", DIM, &back));
    CHECK(!memcmp(back.covariance, g.covariance, sizeof cov), "written and read: differs");
    npz_close(z);
    gaussian_free(&back), gaussian_free(&g);
    rows[3][1] = NAN;
    CHECK(moments_add(m, rows[0], 10) == ERR_INPUT, "NaN is accepted");
    moments_free(m);
    return PASSED;
}

const struct test frechet_tests[] = {
    {"closed_forms", test_closed_forms},
    {"scipy", test_scipy},
    {"sums", test_sums},
    {0},
};
