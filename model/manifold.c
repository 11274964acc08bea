// See manifold.h.
#include "model/manifold.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/ops.h"
#include "runtime/plan.h"

enum { ROWS = 4096, COLUMNS = 8192, NEAREST = MANIFOLD_NEIGHBOUR + 1 }; // itself is the nearest

struct set {
    const float *rows;
    int64_t count;
    float *norms; // [count] squared
    float *radii; // [count] squared
    bool *inside; // [count] of the other's manifold
};

struct manifold {
    struct context c;
    struct plan *plan;
    struct tensor u, v, products; // [ROWS,dim], [COLUMNS,dim], [ROWS,COLUMNS] f32
    int rows, columns, dim;
    float *host;         // [rows,columns]
    int64_t done, total; // blocks
    manifold_progress progress;
    void *user;
};

// ---- distances ----------------------------------------------------------------------------------

static int write_rows(struct manifold *m, const struct tensor *to, const struct set *s,
                      int64_t first, int64_t count)
{
    return m->c.dev->api->write(m->c.stream, to->mem, 0, s->rows + first * m->dim,
                                (size_t)count * (size_t)m->dim * sizeof(float));
}

// Squared distances of rows [i, i+n) of a, which are in m->u, to [j, j+k) of b, to m->host
// [n, columns].
static int distances(struct manifold *m, const struct set *a, int64_t i, int64_t n,
                     const struct set *b, int64_t j, int64_t k)
{
    struct context *c = &m->c;
    TRY(write_rows(m, &m->v, b, j, k));
    TRY(op_linear(c, &m->products, &m->u, &m->v, NULL));
    TRY(c->dev->api->read(c->stream, m->products.mem, 0, m->host,
                          (size_t)n * (size_t)m->columns * sizeof(float)));
    for (int64_t r = 0; r < n; r++) {
        float *d = m->host + r * m->columns;
        const float own = a->norms[i + r], *norms = b->norms + j;
        for (int64_t s = 0; s < k; s++) {
            const float squared = own - 2 * d[s] + norms[s];
            d[s] = squared > 0 ? squared : 0;
        }
    }
    return m->progress ? m->progress(m->user, ++m->done, m->total) : 0;
}

// ---- the two passes -----------------------------------------------------------------------------

// Keeps the NEAREST smallest, ascending.
static void keep_nearest(float *nearest, const float *d, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (!(d[i] < nearest[NEAREST - 1]))
            continue;
        int at = NEAREST - 1;
        for (; at > 0 && nearest[at - 1] > d[i]; at--)
            nearest[at] = nearest[at - 1];
        nearest[at] = d[i];
    }
}

static int find_radii(struct manifold *m, struct set *s)
{
    float nearest[ROWS][NEAREST];
    for (int64_t i = 0; i < s->count; i += m->rows) {
        const int64_t n = s->count - i < m->rows ? s->count - i : m->rows;
        for (int64_t r = 0; r < n; r++)
            for (int q = 0; q < NEAREST; q++)
                nearest[r][q] = INFINITY;
        TRY(write_rows(m, &m->u, s, i, n));
        for (int64_t j = 0; j < s->count; j += m->columns) {
            const int64_t k = s->count - j < m->columns ? s->count - j : m->columns;
            TRY(distances(m, s, i, n, s, j, k));
            for (int64_t r = 0; r < n; r++)
                keep_nearest(nearest[r], m->host + r * m->columns, k);
        }
        for (int64_t r = 0; r < n; r++)
            s->radii[i + r] = nearest[r][MANIFOLD_NEIGHBOUR];
    }
    return 0;
}

static int find_inside(struct manifold *m, struct set *a, struct set *b)
{
    for (int64_t i = 0; i < a->count; i += m->rows) {
        const int64_t n = a->count - i < m->rows ? a->count - i : m->rows;
        TRY(write_rows(m, &m->u, a, i, n));
        for (int64_t j = 0; j < b->count; j += m->columns) {
            const int64_t k = b->count - j < m->columns ? b->count - j : m->columns;
            TRY(distances(m, a, i, n, b, j, k));
            for (int64_t r = 0; r < n; r++) {
                const float *d = m->host + r * m->columns, radius = a->radii[i + r];
                bool in = false;
                for (int64_t s = 0; s < k; s++) {
                    in |= d[s] <= b->radii[j + s];
                    b->inside[j + s] |= d[s] <= radius;
                }
                a->inside[i + r] |= in;
            }
        }
    }
    return 0;
}

// ---- making it ----------------------------------------------------------------------------------

static int make_set(const struct feature_rows *f, int dim, struct set *s)
{
    const size_t n = (size_t)f->count;
    if (f->count <= MANIFOLD_NEIGHBOUR)
        return fail(ERR_INPUT, "%lld images: precision and recall need more than %d",
                    (long long)f->count, MANIFOLD_NEIGHBOUR);
    s->rows = f->rows;
    s->count = f->count;
    s->norms = malloc(n * sizeof *s->norms);
    s->radii = malloc(n * sizeof *s->radii);
    s->inside = calloc(n, sizeof *s->inside);
    if (!s->norms || !s->radii || !s->inside)
        return fail(ERR_NOMEM, "out of memory for the distances of %lld images",
                    (long long)f->count);
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (int d = 0; d < dim; d++)
            sum += (double)s->rows[i * (size_t)dim + (size_t)d] *
                   (double)s->rows[i * (size_t)dim + (size_t)d];
        s->norms[i] = (float)sum;
    }
    return 0;
}

static void free_set(struct set *s)
{
    free(s->norms), free(s->radii), free(s->inside);
}

static int64_t blocks(int64_t rows, int64_t columns)
{
    return (rows + ROWS - 1) / ROWS * ((columns + COLUMNS - 1) / COLUMNS);
}

int64_t manifold_blocks(int64_t reference, int64_t samples)
{
    return blocks(reference, reference) + blocks(samples, samples) + blocks(reference, samples);
}

static int plan_blocks(struct manifold *m, int64_t most)
{
    struct context *c = &m->c;
    m->rows = most < ROWS ? (int)most : ROWS;
    m->columns = most < COLUMNS ? (int)most : COLUMNS;
    TRY(plan_new(c->dev, &m->plan));
    TRY(PLAN_TENSOR(m->plan, "rows", PLAN_INPUT, F32, 0, PLAN_FOREVER, &m->u, m->rows, m->dim));
    TRY(PLAN_TENSOR(m->plan, "columns", PLAN_INPUT, F32, 0, PLAN_FOREVER, &m->v, m->columns,
                    m->dim));
    TRY(PLAN_TENSOR(m->plan, "products", PLAN_INPUT, F32, 0, PLAN_FOREVER, &m->products, m->rows,
                    m->columns));
    c->dry = true;
    TRY(op_linear(c, &m->products, &m->u, &m->v, NULL));
    if (c->space_wanted)
        TRY(PLAN_TENSOR(m->plan, "scratch", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &c->space,
                        (int64_t)((c->space_wanted + 3) / 4)));
    TRY(plan_layout(m->plan, 0));
    TRY(plan_commit(m->plan));
    c->dry = false;
    TRY(tensor_zero(c, &m->u)); // rows past a short block are multiplied, too, and left alone
    TRY(tensor_zero(c, &m->v));
    m->host = malloc((size_t)m->rows * (size_t)m->columns * sizeof *m->host);
    return m->host ? 0 : fail(ERR_NOMEM, "out of memory for distances");
}

static double share_inside(const struct set *s)
{
    int64_t inside = 0;
    for (int64_t i = 0; i < s->count; i++)
        inside += s->inside[i];
    return (double)inside / (double)s->count;
}

int manifold_compare(struct device *dev, struct stream *stream, int dim,
                     const struct feature_rows *reference, const struct feature_rows *samples,
                     double *precision, double *recall, manifold_progress progress, void *user)
{
    struct manifold m = {.dim = dim, .progress = progress, .user = user};
    struct set r = {0}, s = {0};
    int code;
    m.c.dev = dev;
    m.c.stream = stream;
    TRY_OUT(make_set(reference, dim, &r));
    TRY_OUT(make_set(samples, dim, &s));
    TRY_OUT(plan_blocks(&m, r.count > s.count ? r.count : s.count));
    m.total = manifold_blocks(r.count, s.count);
    TRY_OUT(find_radii(&m, &r));
    TRY_OUT(find_radii(&m, &s));
    TRY_OUT(find_inside(&m, &r, &s));
    *precision = share_inside(&s);
    *recall = share_inside(&r);
out:
    free_set(&r);
    free_set(&s);
    if (m.plan)
        plan_free(m.plan);
    free(m.host);
    return code;
}
