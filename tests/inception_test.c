// Inception and the figures made of its features, against torch, scipy and numpy on a network of
// the same structure with few channels and random weights, and real images
// (tests/eval/make_eval.py; full.py does the same with the full widths).
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/features.h"
#include "model/lapack.h"
#include "model/manifold.h"
#include "model/weights_file.h"

#define FILE_OF(name) TEST_DATA "/eval/" name

static const unsigned forms[4] = {0, OPEN_BF16, OPEN_GPU_FORMS, OPEN_BF16 | OPEN_GPU_FORMS};
static const char *const ways[2] = {"pytorch", "adm"};

struct network {
    struct stream *stream;
    struct device *dev;
    struct inception *n;
};

static int open_network(unsigned flags, int batch, enum inception_input input, struct network *out)
{
    struct safetensors *file;
    *out = (struct network){.dev = test_device(flags)};
    if (!out->dev)
        return fail(ERR_NODEVICE, "no device");
    TRY(weights_file_open(FILE_OF("narrow.pth"), &file));
    TRY(out->dev->api->stream_new(out->dev, &out->stream));
    int code = inception_new(out->dev, out->stream, file, batch, input, 0, &out->n);
    safetensors_close(file);
    return code;
}

static void close_network(struct network *w)
{
    inception_free(w->n);
    if (w->stream)
        w->dev->api->stream_free(w->stream);
}

static int open_source(const char *path, struct image_source *out)
{
    struct npz *z;
    TRY(npz_open(path, &z));
    return image_source_npz(z, out);
}

// Array NAME_WAY of expect.npz.
static double *expected(const char *name, int way, int64_t count)
{
    char full[64];
    struct npz *z;
    struct npz_reader *r = NULL;
    struct npy_array a;
    double *v = malloc((size_t)count * sizeof *v);
    snprintf(full, sizeof full, "%s_%s", name, ways[way]);
    BUG_IF(!v || npz_open(FILE_OF("expect.npz"), &z) < 0 || npz_read_open(z, full, &a, &r) < 0 ||
           a.count != count || npz_read_doubles(r, v, count) < 0);
    npz_read_close(r);
    npz_close(z);
    return v;
}

// ---- features -----------------------------------------------------------------------------------

static int wide_image(struct image *out)
{
    TRY(image_new(700, 40, 3, out));
    for (int y = 0; y < 40; y++)
        for (int x = 0; x < 700; x++)
            for (int c = 0; c < 3; c++)
                out->pixels[(y * 700 + x) * 3 + c] = (uint8_t)((x * 3 + y * 5 + c * 70) % 256);
    return 0;
}

// Distance of `got` from `want` over the spread of `want`.
static double nrmse(const float *got, const double *want, int64_t count)
{
    double error = 0, mean = 0, spread = 0;
    for (int64_t i = 0; i < count; i++)
        mean += want[i] / (double)count;
    for (int64_t i = 0; i < count; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        spread += (want[i] - mean) * (want[i] - mean);
    }
    return sqrt(error / spread);
}

static int check_features(unsigned flags, int way)
{
    enum { IMAGES = 3 };
    struct network w;
    struct image_source source;
    struct image images[IMAGES];
    OK(open_network(flags, IMAGES + 1, (enum inception_input)way, &w));
    const int dim = w.n->dim, spatial_dim = w.n->spatial_dim;
    CHECK(dim == 64 && spatial_dim == 17 * 17 * 7 && w.n->classes == 10, "%d features, %d, %d", dim,
          spatial_dim, w.n->classes);
    OK(open_source(FILE_OF("samples.npz"), &source));
    CHECK(image_source_next(&source, 2, images) == 2, "%s", error_message());
    OK(wide_image(&images[2]));
    float *pool = malloc(sizeof *pool * IMAGES * (size_t)dim);
    float *spatial = malloc(sizeof *pool * IMAGES * (size_t)spatial_dim);
    double *want = expected("pool", way, IMAGES * dim);
    double *want_spatial = expected("spatial", way, IMAGES * spatial_dim);
    const double tolerance = flags & OPEN_BF16 ? 3e-2 : 1e-5;
    for (int round = 0; round < 3; round++) { // as it is, recorded, replayed
        OK(inception_put(w.n, images, IMAGES));
        OK(inception_run(w.n));
        OK(inception_read(w.n, IMAGES, pool, spatial, NULL));
        const double off = nrmse(pool, want, IMAGES * dim);
        const double off_spatial = nrmse(spatial, want_spatial, IMAGES * spatial_dim);
        CHECK(off < tolerance && off_spatial < tolerance, "flags %u %s: off by %.2g, spatial %.2g",
              flags, ways[way], off, off_spatial);
    }
    for (int i = 0; i < IMAGES; i++)
        image_free(&images[i]);
    free(pool), free(spatial), free(want), free(want_spatial);
    image_source_close(&source);
    close_network(&w);
    return PASSED;
}

static int test_features(void)
{
    if (!test_device(0))
        return SKIPPED;
    for (int f = 0; f < 4; f++)
        for (int way = 0; way < (forms[f] & OPEN_GPU_FORMS ? 1 : 2); way++)
            if (check_features(forms[f], way) != PASSED)
                return FAILED;
    return PASSED;
}

// ---- figures ------------------------------------------------------------------------------------

static int features_of(struct network *w, const char *path, struct features *out)
{
    struct image_source source;
    const struct feature_options o = {.keep = 1000, .split = 5000};
    TRY(open_source(path, &source));
    int code = features_of_images(w->n, &source, &o, out);
    image_source_close(&source);
    return code;
}

static int near(const char *name, double got, double want, double tolerance)
{
    CHECK(fabs(got - want) <= tolerance * fabs(want), "%s is %.9g, not %.9g", name, got, want);
    return PASSED;
}

static int check_figures(int way, int batch)
{
    struct network w;
    struct features reference, samples;
    double fid, sfid, precision, recall, *want = expected("figures", way, 5);
    OK(open_network(0, batch, (enum inception_input)way, &w));
    OK(features_of(&w, FILE_OF("reference.npz"), &reference));
    OK(features_of(&w, FILE_OF("samples.npz"), &samples));
    OK(frechet_distance(&reference.pool, &samples.pool, &fid));
    OK(frechet_distance(&reference.spatial, &samples.spatial, &sfid));
    OK(manifold_compare(w.dev, w.stream, reference.pool.dim,
                        &(struct feature_rows){reference.rows, reference.row_count},
                        &(struct feature_rows){samples.rows, samples.row_count}, &precision,
                        &recall, NULL, NULL));
    int failed = near("FID", fid, want[0], 1e-3) | near("sFID", sfid, want[1], 1e-3) |
                 near("Inception Score", samples.score - 1, want[2] - 1, 1e-3) |
                 near("precision", precision, want[3], 1e-9) |
                 near("recall", recall, want[4], 1e-9);
    features_free(&reference);
    features_free(&samples);
    close_network(&w);
    free(want);
    return failed ? FAILED : PASSED;
}

// Batches that do and do not divide the sets.
static int test_figures(void)
{
    if (lapack_open() < 0 || !test_device(0)) {
        printf("    %s\n", error_message());
        return SKIPPED;
    }
    CHECK(check_figures(0, 13) == PASSED, "as pytorch-fid");
    CHECK(check_figures(1, 32) == PASSED, "as ADM");
    return PASSED;
}

// ---- precision and recall -----------------------------------------------------------------------

// Against every distance in double, with several blocks a set and a part of one.
static double distance(const float *a, const float *b, int dim)
{
    double sum = 0;
    for (int d = 0; d < dim; d++)
        sum += ((double)a[d] - (double)b[d]) * ((double)a[d] - (double)b[d]);
    return sum;
}

static double radius(const float *rows, int count, int dim, int i)
{
    double nearest[MANIFOLD_NEIGHBOUR + 1];
    for (int k = 0; k <= MANIFOLD_NEIGHBOUR; k++)
        nearest[k] = INFINITY;
    for (int j = 0; j < count; j++) {
        double d = distance(rows + i * dim, rows + j * dim, dim);
        for (int k = 0; k <= MANIFOLD_NEIGHBOUR; k++)
            if (d < nearest[k]) {
                const double other = nearest[k];
                nearest[k] = d;
                d = other;
            }
    }
    return nearest[MANIFOLD_NEIGHBOUR];
}

static double share_within(const float *of, int count, const float *in, const double *radii, int n,
                           int dim)
{
    int inside = 0;
    for (int i = 0; i < count; i++) {
        bool found = false;
        for (int j = 0; j < n && !found; j++)
            found = distance(of + i * dim, in + j * dim, dim) <= radii[j];
        inside += found;
    }
    return (double)inside / count;
}

static int test_manifold(void)
{
    enum { N = 4200, M = 1030, DIM = 5 };
    static float a[N * DIM], b[M * DIM];
    static double radius_a[N], radius_b[M];
    struct device *dev = test_device(0);
    struct stream *stream;
    double precision, recall;
    if (!dev)
        return SKIPPED;
    uint32_t state = 1;
    for (int i = 0; i < (N + M) * DIM; i++) {
        state = state * 1664525u + 1013904223u;
        const float v = (float)(state >> 8) / (1 << 24);
        *(i < N * DIM ? &a[i] : &b[i - N * DIM]) = i < N * DIM ? v : 0.3f + v;
    }
    for (int i = 0; i < N; i++)
        radius_a[i] = radius(a, N, DIM, i);
    for (int i = 0; i < M; i++)
        radius_b[i] = radius(b, M, DIM, i);
    OK(dev->api->stream_new(dev, &stream));
    OK(manifold_compare(dev, stream, DIM, &(struct feature_rows){a, N},
                        &(struct feature_rows){b, M}, &precision, &recall, NULL, NULL));
    CHECK(fabs(precision - share_within(b, M, a, radius_a, N, DIM)) < 2.0 / M, "precision %g",
          precision);
    CHECK(fabs(recall - share_within(a, N, b, radius_b, M, DIM)) < 2.0 / N, "recall %g", recall);
    CHECK(precision > 0.05 && precision < 0.95, "precision %g shows nothing", precision);
    CHECK(manifold_compare(dev, stream, DIM, &(struct feature_rows){a, 3},
                           &(struct feature_rows){b, M}, &precision, &recall, NULL,
                           NULL) == ERR_INPUT,
          "three images");
    dev->api->stream_free(stream);
    return PASSED;
}

const struct test inception_tests[] = {
    {"features", test_features},
    {"figures", test_figures},
    {"manifold", test_manifold},
    {0},
};
