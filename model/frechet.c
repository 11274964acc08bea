// See frechet.h.
#include "model/frechet.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/lapack.h"

enum { BLOCK_ROWS = 256 }; // rows that are added to the sums in one product

struct moments {
    int dim, held; // rows in block
    int64_t count;
    double *shift;   // [dim] the first row: subtracted from all, so that sums stay small
    double *sum;     // [dim] of shifted rows
    double *squares; // [dim,dim] upper triangle: of their products
    double *block;   // [BLOCK_ROWS,dim] shifted rows not yet in squares
};

int gaussian_new(int dim, struct gaussian *out)
{
    const size_t n = (size_t)dim;
    *out = (struct gaussian){.dim = dim};
    out->mean = calloc(n, sizeof *out->mean);
    out->covariance = calloc(n * n, sizeof *out->covariance);
    if (out->mean && out->covariance)
        return 0;
    gaussian_free(out);
    return fail(ERR_NOMEM, "out of memory for a covariance of %d x %d", dim, dim);
}

void gaussian_free(struct gaussian *g)
{
    free(g->mean);
    free(g->covariance);
    *g = (struct gaussian){0};
}

// ---- sums ---------------------------------------------------------------------------------------

int moments_new(int dim, struct moments **out)
{
    *out = NULL;
    TRY(lapack_open());
    const size_t n = (size_t)dim;
    struct moments *m = calloc(1, sizeof *m);
    if (m) {
        m->dim = dim;
        m->shift = calloc(n, sizeof(double));
        m->sum = calloc(n, sizeof(double));
        m->squares = calloc(n * n, sizeof(double));
        m->block = calloc(n * BLOCK_ROWS, sizeof(double));
    }
    if (!m || !m->shift || !m->sum || !m->squares || !m->block) {
        moments_free(m);
        return fail(ERR_NOMEM, "out of memory for a covariance of %d x %d", dim, dim);
    }
    *out = m;
    return 0;
}

void moments_free(struct moments *m)
{
    if (!m)
        return;
    free(m->shift), free(m->sum), free(m->squares), free(m->block);
    free(m);
}

static void add_block(struct moments *m)
{
    if (m->held)
        lapack_syrk(m->dim, m->held, m->block, m->squares);
    m->held = 0;
}

int moments_add(struct moments *m, const float *rows, int64_t count)
{
    const size_t dim = (size_t)m->dim;
    for (int64_t i = 0; i < count; i++, rows += dim) {
        double *to = m->block + (size_t)m->held * dim;
        for (size_t d = 0; d < dim; d++) {
            if (!isfinite(rows[d]))
                return fail(ERR_INPUT, "a feature of image %lld is not finite",
                            (long long)m->count);
            if (!m->count)
                m->shift[d] = (double)rows[d];
            to[d] = (double)rows[d] - m->shift[d];
            m->sum[d] += to[d];
        }
        m->count++;
        if (++m->held == BLOCK_ROWS)
            add_block(m);
    }
    return 0;
}

int moments_finish(struct moments *m, struct gaussian *out)
{
    const size_t dim = (size_t)m->dim;
    const double n = (double)m->count;
    if (m->count < 2)
        return fail(ERR_INPUT, "%lld images: a covariance needs two or more", (long long)m->count);
    TRY(gaussian_new(m->dim, out));
    add_block(m);
    out->count = m->count;
    for (size_t i = 0; i < dim; i++) {
        out->mean[i] = m->shift[i] + m->sum[i] / n;
        for (size_t j = 0; j <= i; j++) {
            const double v = (m->squares[i * dim + j] - m->sum[i] * m->sum[j] / n) / (n - 1);
            out->covariance[i * dim + j] = out->covariance[j * dim + i] = v;
        }
    }
    return 0;
}

// ---- distance -----------------------------------------------------------------------------------

// r[dim,*rank] = V sqrt(D) of S = V D V^T, without the columns that are zero but for rounding.
static int root(const struct gaussian *g, double *r, double *values, int *rank)
{
    const size_t dim = (size_t)g->dim;
    memcpy(r, g->covariance, dim * dim * sizeof *r);
    TRY(lapack_eigen(g->dim, 1, r, values));
    const double least = values[dim - 1] * (double)g->dim * DBL_EPSILON;
    size_t skip = 0;
    while (skip < dim && !(values[skip] > least))
        skip++;
    *rank = (int)(dim - skip);
    memmove(r, r + skip * dim, (dim - skip) * dim * sizeof *r);
    for (size_t k = skip; k < dim; k++)
        for (size_t i = 0; i < dim; i++)
            r[(k - skip) * dim + i] *= sqrt(values[k]);
    return 0;
}

// tr (S1 S2)^1/2 from the eigenvalues of r^T S2 r, with r r^T = S1.
static int trace_of_root(const struct gaussian *a, const struct gaussian *b, double *r,
                         double *product, double *values, double *out)
{
    int rank;
    *out = 0;
    TRY(root(a, r, values, &rank));
    if (!rank)
        return 0;
    lapack_gemm(b->dim, rank, b->dim, 0, b->covariance, r, product);
    double *inner = malloc(sizeof *inner * (size_t)rank * (size_t)rank);
    if (!inner)
        return fail(ERR_NOMEM, "out of memory for a product of covariances");
    lapack_gemm(rank, rank, b->dim, 1, r, product, inner);
    int code = lapack_eigen(rank, 0, inner, values);
    for (int i = 0; code >= 0 && i < rank; i++)
        *out += values[i] > 0 ? sqrt(values[i]) : 0;
    free(inner);
    return code;
}

static int check(const struct gaussian *g)
{
    const size_t dim = (size_t)g->dim;
    for (size_t i = 0; i < dim; i++)
        if (!isfinite(g->mean[i]))
            return fail(ERR_INPUT, "a mean is not finite");
    for (size_t i = 0; i < dim * dim; i++)
        if (!isfinite(g->covariance[i]))
            return fail(ERR_INPUT, "a covariance is not finite");
    return 0;
}

int frechet_distance(const struct gaussian *a, const struct gaussian *b, double *out)
{
    BUG_IF(a->dim != b->dim);
    const size_t dim = (size_t)a->dim;
    TRY(lapack_open());
    TRY(check(a));
    TRY(check(b));
    if (b->count && b->count < a->dim && (!a->count || b->count < a->count)) {
        const struct gaussian *few = b; // of lower rank: less to do
        b = a;
        a = few;
    }
    double *r = malloc(dim * dim * sizeof *r), *product = malloc(dim * dim * sizeof *r);
    double *values = malloc(dim * sizeof *values), trace = 0;
    int code = r && product && values ? trace_of_root(a, b, r, product, values, &trace)
                                      : fail(ERR_NOMEM, "out of memory for a distance");
    free(r), free(product), free(values);
    TRY(code);
    *out = -2 * trace;
    for (size_t i = 0; i < dim; i++) {
        const double d = a->mean[i] - b->mean[i];
        *out += d * d + a->covariance[i * dim + i] + b->covariance[i * dim + i];
    }
    *out = *out > 0 ? *out : 0; // it is, but for rounding
    return 0;
}

// ---- statistics files ---------------------------------------------------------------------------

static int read_array(struct npz *z, const char *name, int ndim, int dim, double *to)
{
    struct npy_array array;
    struct npz_reader *r;
    TRY(npz_read_open(z, name, &array, &r));
    int code = 0;
    bool right = array.ndim == ndim; // the order of a symmetric matrix's elements does not matter
    for (int i = 0; i < array.ndim; i++)
        right = right && array.shape[i] == dim;
    if (!right)
        code = fail(ERR_INPUT, "%s: array '%s' is not [%d%s], as many as the network's features",
                    npz_path(z), name, dim, ndim == 2 ? ",same" : "");
    if (code >= 0)
        code = npz_read_doubles(r, to, array.count);
    npz_read_close(r);
    return code;
}

int gaussian_read(struct npz *z, const char *mean, const char *covariance, int dim,
                  struct gaussian *out)
{
    TRY(gaussian_new(dim, out));
    int code = read_array(z, mean, 1, dim, out->mean);
    if (code >= 0)
        code = read_array(z, covariance, 2, dim, out->covariance);
    if (code >= 0 && (code = check(out)) < 0)
        code = fail_in(code, "%s", npz_path(z));
    if (code < 0)
        gaussian_free(out);
    return code;
}

static int write_doubles(struct zip_writer *z, const char *name, const double *values, int ndim,
                         int dim)
{
    const size_t n = (size_t)dim;
    TRY(npz_write_begin(z, name, ST_F64, ndim, (int64_t[]){dim, dim}));
    return zip_write(z, values, (ndim == 2 ? n * n : n) * sizeof *values);
}

int gaussian_write(struct zip_writer *z, const char *mean, const char *covariance,
                   const struct gaussian *g)
{
    TRY(write_doubles(z, mean, g->mean, 1, g->dim));
    return write_doubles(z, covariance, g->covariance, 2, g->dim);
}
