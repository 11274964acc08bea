// Datasets, their errors, the loader, nearest neighbours.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#include "model/data.h"
#include "model/image.h"
#include "model/knn.h"

static const char *const fashion = "/usr/share/datasets/fashion-mnist";

// ---- helpers ------------------------------------------------------------------------------------

static const char *in_directory(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", test_directory(), name);
    return path;
}

static const char *new_directory(const char *name)
{
    const char *path = in_directory(name);
    mkdir(path, 0777);
    return path;
}

static void put(const char *directory, const char *name, const void *data, size_t bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f))
        abort();
}

static size_t zip(const uint8_t *data, size_t bytes, uint8_t *out, size_t room)
{
    z_stream z = {0};
    if (deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK)
        abort();
    z.next_in = (uint8_t *)data;
    z.avail_in = (uInt)bytes;
    z.next_out = out;
    z.avail_out = (uInt)room;
    if (deflate(&z, Z_FINISH) != Z_STREAM_END)
        abort();
    deflateEnd(&z);
    return room - z.avail_out;
}

static bool says(const char *what)
{
    const char *m = error_message();
    return strstr(m, what) && !strchr(m, '\n');
}

enum { COUNT = 37, SIDE = 28, PIXELS = COUNT * SIDE * SIDE };

// A small IDX dataset: label i%10, pixels i+x+y.
struct idx {
    uint8_t images[16 + PIXELS];
    uint8_t labels[8 + COUNT];
};

static struct idx *make_idx(void)
{
    static struct idx idx;
    memcpy(idx.images, (uint8_t[]){0, 0, 8, 3, 0, 0, 0, COUNT, 0, 0, 0, SIDE, 0, 0, 0, SIDE}, 16);
    memcpy(idx.labels, (uint8_t[]){0, 0, 8, 1, 0, 0, 0, COUNT}, 8);
    for (int i = 0; i < COUNT; i++)
        idx.labels[8 + i] = (uint8_t)(i % 10);
    for (int k = 0; k < PIXELS; k++)
        idx.images[16 + k] = (uint8_t)(k / (SIDE * SIDE) + k / SIDE % SIDE + k % SIDE);
    return &idx;
}

static const char *put_idx(const char *name, const struct idx *idx)
{
    const char *path = new_directory(name);
    put(path, "train-images-idx3-ubyte", idx->images, sizeof idx->images);
    put(path, "train-labels-idx1-ubyte", idx->labels, sizeof idx->labels);
    return path;
}

// ---- IDX ----------------------------------------------------------------------------------------

static int test_idx(void)
{
    const char *path = put_idx("idx", make_idx());
    static float image[3 * 32 * 32], flipped[3 * 32 * 32];
    struct dataset *d;
    OK(data_open(path, 0, 0, &d));
    CHECK(d->count == COUNT && d->classes == 10 && d->size == 32 && d->channels == 1, "shape");
    OK(data_image(d, 5, false, image));
    OK(data_image(d, 5, true, flipped));
    CHECK(data_label(d, 15) == 5, "label %d", data_label(d, 15));
    for (int y = 0; y < 32; y++) {
        for (int x = 0; x < 32; x++) {
            bool inside = x >= 2 && x < 30 && y >= 2 && y < 30;
            float expected = inside ? (float)(5 + x - 2 + y - 2) / 127.5f - 1.0f : -1.0f;
            CHECK(image[y * 32 + x] == expected, "pixel %d %d: %g", x, y,
                  (double)image[y * 32 + x]);
            CHECK(flipped[y * 32 + 31 - x] == expected, "flipped pixel %d %d", x, y);
        }
    }
    data_close(d);
    OK(data_open(path, 28, 3, &d));
    OK(data_image(d, 0, false, image));
    CHECK(image[27] == 27 / 127.5f - 1.0f && !memcmp(image, image + 2 * 784, 784 * 4),
          "3 channels");
    data_close(d);
    CHECK(data_open(path, 24, 1, &d) == ERR_INPUT && !d && says("too small"), "%s",
          error_message());
    CHECK(data_open(path, -1, 1, &d) == ERR_INPUT && data_open(path, 32, 2, &d) == ERR_INPUT,
          "options");
    CHECK(data_open_split(path, DATA_TEST, 0, 0, &d) == ERR_IO && says("t10k-images-idx3-ubyte"),
          "%s", error_message());
    return PASSED;
}

static int test_idx_gzip(void)
{
    static uint8_t zipped[PIXELS + 1000];
    struct idx *idx = make_idx();
    const char *path = new_directory("gz");
    struct dataset *d;
    size_t labels = zip(idx->labels, sizeof idx->labels, zipped, sizeof zipped);
    put(path, "train-labels-idx1-ubyte.gz", zipped, labels);
    size_t images = zip(idx->images, sizeof idx->images, zipped, sizeof zipped);
    put(path, "train-images-idx3-ubyte.gz", zipped, images);
    OK(data_open(path, 0, 0, &d));
    CHECK(!memcmp(d->pixels8, idx->images + 16, PIXELS), "pixels differ");
    data_close(d);
    for (size_t n = 0; n < images; n += n < 40 || n + 40 > images ? 1 : 211) {
        put(path, "train-images-idx3-ubyte.gz", zipped, n);
        CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && says("train-images-idx3-ubyte.gz"),
              "cut at %zu of %zu: %s", n, images, error_message());
    }
    put(path, "train-images-idx3-ubyte.gz", zipped, images + 1);
    CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && says("after the last"), "%s", error_message());
    zipped[images / 2] ^= 0x55;
    put(path, "train-images-idx3-ubyte.gz", zipped, images);
    CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && says("train-images"), "%s", error_message());
    zipped[images / 2] ^= 0x55;
    zipped[images - 8] ^= 1; // the checksum
    put(path, "train-images-idx3-ubyte.gz", zipped, images);
    CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && says("damaged gzip"), "%s", error_message());
    return PASSED;
}

// One byte of a good dataset changed, or its end cut or extended.
static int test_idx_errors(void)
{
    static const struct {
        int file;             // 0 images, 1 labels
        int at, value, bytes; // bytes: change of the file's length
        const char *says;
    } rows[] = {
        {0, 3, 1, 0, "magic number is 0x00000801, expected 0x00000803"},
        {0, 0, 0x50, 0, "magic"},
        {1, 3, 3, 0, "magic number is 0x00000803, expected 0x00000801"},
        {0, 7, COUNT + 1, 0, "cut short"},
        {0, 7, COUNT - 1, 0, "after the last"},
        {0, 7, 0, 0, "not possible"},
        {0, 4, 255, 0, "cut short"},
        {0, 8, 255, 0, "not possible"},
        {0, 11, 27, 0, "after the last"},
        {1, 7, COUNT + 1, 0, "38 labels, but there are 37 images"},
        {1, 7, COUNT - 1, 0, "36 labels, but there are 37 images"},
        {1, 20, 10, 0, "label 10 of image 12"},
        {1, 20, 255, 0, "label 255"},
        {0, 16, 0, -1, "cut short"},
        {1, 8, 0, -1, "cut short"},
        {0, 16, 0, -PIXELS - 3, "cut short"},
        {1, 8, 0, -COUNT - 1, "cut short"},
        {0, 16, 0, -PIXELS - 16, "cut short"},
        {0, 16, 0, 1, "after the last"},
        {1, 8, 0, 5, "after the last"},
    };
    struct dataset *d;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct idx *idx = make_idx();
        uint8_t *changed = rows[i].file ? idx->labels : idx->images;
        changed[rows[i].at] = (uint8_t)rows[i].value;
        const char *path = put_idx("wrong", idx);
        const char *name = rows[i].file ? "train-labels-idx1-ubyte" : "train-images-idx3-ubyte";
        size_t bytes = rows[i].file ? sizeof idx->labels : sizeof idx->images;
        uint8_t *longer = calloc(1, bytes + 100);
        memcpy(longer, changed, bytes);
        put(path, name, longer, (size_t)((int)bytes + rows[i].bytes));
        free(longer);
        CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && !d, "row %zu opens", i);
        CHECK(says(rows[i].says) && says(path) && says(name), "row %zu: %s", i, error_message());
    }
    const char *path = put_idx("half", make_idx());
    char labels[512];
    snprintf(labels, sizeof labels, "%s/train-labels-idx1-ubyte", path);
    unlink(labels);
    CHECK(data_open(path, 0, 0, &d) == ERR_IO && says("train-labels-idx1-ubyte"), "%s",
          error_message());
    CHECK(data_open(in_directory("nothing"), 0, 0, &d) == ERR_IO && says("no dataset"), "%s",
          error_message());
    CHECK(data_open("/dev/null", 0, 0, &d) == ERR_INPUT && says("not a directory"), "%s",
          error_message());
    return PASSED;
}

static int test_fashion_mnist(void)
{
    struct dataset *d;
    if (access(fashion, R_OK))
        return SKIPPED;
    OK(data_open(fashion, 0, 0, &d));
    CHECK(d->count == 60000 && d->rows == 28, "%lld images", (long long)d->count);
    CHECK(!strcmp(d->class_names[0], "T-shirt/top") && !strcmp(d->class_names[9], "Ankle boot"),
          "names");
    CHECK(data_label(d, 0) == 9, "the first is an ankle boot, not %d", data_label(d, 0));
    data_close(d);
    OK(data_open_split(fashion, DATA_TEST, 0, 0, &d));
    CHECK(d->count == 10000 && !strcmp(d->class_names[8], "Bag"), "the test split");
    data_close(d);
    return PASSED;
}

// ---- folders ------------------------------------------------------------------------------------

// An image whose red is `value`, left half brighter by 100.
static void put_image(const char *path, int width, int height, int value)
{
    struct image image;
    if (image_new(width, height, 3, &image) < 0)
        abort();
    for (int i = 0; i < width * height; i++)
        image.pixels[3 * i] = (uint8_t)(value + (i % width < width / 2 ? 100 : 0));
    if (image_write_png(path, &image, NULL, 0) < 0)
        abort();
    image_free(&image);
}

static int test_folder(void)
{
    const char *path = new_directory("folder");
    new_directory("folder/beta");
    new_directory("folder/Alpha");
    new_directory("folder/.hidden");
    put_image(in_directory("folder/beta/2.PNG"), 8, 8, 2);
    put_image(in_directory("folder/beta/1.jpg"), 16, 32, 1); // a PNG: content decides
    put_image(in_directory("folder/Alpha/x.JpEg"), 12, 9, 3);
    put(path, "beta/notes.txt", "hello", 5);
    struct dataset *d;
    CHECK(data_open(path, 0, 0, &d) == ERR_INPUT && says("--image-size"), "%s", error_message());
    OK(data_open(path, 8, 0, &d));
    CHECK(d->count == 3 && d->classes == 2 && d->channels == 3, "%lld images", (long long)d->count);
    CHECK(!strcmp(d->class_names[0], "Alpha") && !strcmp(d->class_names[1], "beta"), "names");
    static const int labels[3] = {0, 1, 1};
    float image[3 * 64], flipped[3 * 64];
    for (int i = 0; i < 3; i++) {
        CHECK(data_label(d, i) == labels[i], "label of %d", i);
        OK(data_image(d, i, false, image));
        OK(data_image(d, i, true, flipped));
        CHECK(image[0] > image[7] && image[64] == -1.0f, "image %d", i);
        for (int k = 0; k < 3 * 64; k++)
            CHECK(image[k] == flipped[k / 8 * 8 + 7 - k % 8], "image %d is not mirrored", i);
    }
    data_close(d);
    CHECK(data_open_split(path, DATA_TEST, 8, 0, &d) == ERR_INPUT && says("no test split"), "test");
    OK(data_open(path, 8, 1, &d));
    OK(data_image(d, 2, false, image));
    CHECK(image[7] == 1.0f / 127.5f - 1.0f, "grey of red 2 is 1: %g", (double)image[7]);
    data_close(d);
    return PASSED;
}

static int test_folder_errors(void)
{
    const char *path = new_directory("bad");
    struct dataset *d;
    float image[3 * 64];
    CHECK(data_open(path, 8, 0, &d) == ERR_INPUT && says("holds neither"), "%s", error_message());
    put_image(in_directory("bad/loose.png"), 8, 8, 0);
    CHECK(data_open(path, 8, 0, &d) == ERR_INPUT && says("no class folders"), "%s",
          error_message());
    new_directory("bad/a");
    CHECK(data_open(path, 8, 0, &d) == ERR_INPUT && says("bad/a"), "%s", error_message());
    put(path, "a/readme.txt", "x", 1);
    CHECK(data_open(path, 8, 0, &d) == ERR_INPUT && says("bad/a"), "%s", error_message());
    put(path, "a/fake.png", "this is text\n", 13);
    OK(data_open(path, 8, 0, &d));
    CHECK(data_image(d, 0, false, image) == ERR_INPUT && says("bad/a/fake.png"), "%s",
          error_message());
    struct loader *l;
    struct batch b;
    OK(loader_start(d, 4, 1, 0, false, 2, &l));
    CHECK(loader_next(l, &b) == ERR_INPUT && says("bad/a/fake.png"), "%s", error_message());
    CHECK(loader_next(l, &b) == ERR_INPUT && loader_cursor(l) == 0, "the error does not stay");
    loader_stop(l);
    data_close(d);
    return PASSED;
}

// ---- order and loader ---------------------------------------------------------------------------

static int test_order(void)
{
    static const int64_t counts[] = {1, 2, 3, 4, 5, 16, 17, 1000, 4097};
    uint8_t *seen = malloc(4097);
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        int64_t n = counts[c], fixed = 0, same = 0;
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            memset(seen, 0, (size_t)n);
            for (int64_t i = 0; i < n; i++) {
                int64_t x = data_order(n, 7, epoch * (uint64_t)n + (uint64_t)i);
                CHECK(x >= 0 && x < n && !seen[x]++, "count %lld is not permuted", (long long)n);
                fixed += x == i;
                same += x == data_order(n, 8, epoch * (uint64_t)n + (uint64_t)i);
            }
        }
        CHECK(n < 100 || (fixed < 20 && same < 20), "%lld fixed, %lld alike", (long long)fixed,
              (long long)same);
    }
    free(seen);
    // Mean displacement of a random permutation is n/3; neighbours must be unrelated too.
    double shift = 0, step = 0;
    enum { N = 60000 };
    for (int64_t i = 0; i < N; i++) {
        int64_t x = data_order(N, 3, (uint64_t)i), y = data_order(N, 3, (uint64_t)((i + 1) % N));
        shift += fabs((double)(x - i)) / N / N;
        step += fabs((double)(x - y)) / N / N;
    }
    CHECK(fabs(shift - 1.0 / 3) < 0.005 && fabs(step - 1.0 / 3) < 0.005, "%g %g", shift, step);
    return PASSED;
}

// Hashes what the loader gives for positions [from, to), in batches of `batch`.
static int run_loader(const struct dataset *d, int batch, uint64_t from, uint64_t to, int threads,
                      uint64_t *hashes)
{
    struct loader *l;
    struct batch b;
    size_t floats = (size_t)(d->size * d->size * d->channels);
    TRY(loader_start(d, batch, 42, from, true, threads, &l));
    for (uint64_t p = from; p < to; p += (uint64_t)batch) {
        TRY(loader_next(l, &b));
        BUG_IF(b.first != p);
        for (size_t i = 0; i < (size_t)batch && p + i < to; i++) {
            uint64_t h = (uint64_t)b.labels[i] * 1000003 + (uint64_t)b.index[i];
            for (size_t k = 0; k < floats; k++) {
                uint32_t bits;
                memcpy(&bits, &b.images[i * floats + k], 4);
                h = (h ^ bits) * 0x100000001b3u;
            }
            hashes[p + i] = h;
        }
        BUG_IF(loader_cursor(l) != p + (uint64_t)batch);
    }
    BUG_IF(loader_waited(l) < 0.0);
    loader_stop(l);
    return 0;
}

static int test_loader(void)
{
    enum { TOTAL = 200 }; // of 37 images: more than five epochs
    struct dataset *d;
    OK(data_open(put_idx("loader", make_idx()), 32, 1, &d));
    uint64_t expected[TOTAL], got[TOTAL];
    OK(run_loader(d, 10, 0, TOTAL, 1, expected));
    for (int threads = 1; threads <= 8; threads += threads < 3 ? 1 : 5) {
        static const int batches[] = {1, 10, 37, 64, 150, 200};
        for (int k = 0; k < 6; k++) {
            memset(got, 0, sizeof got);
            OK(run_loader(d, batches[k], 0, TOTAL, threads, got));
            CHECK(!memcmp(got, expected, sizeof got), "%d threads, batch %d", threads, batches[k]);
        }
    }
    for (uint64_t cursor = 1; cursor < TOTAL; cursor += 23) {
        OK(run_loader(d, 10, cursor, TOTAL, 3, got));
        CHECK(!memcmp(got + cursor, expected + cursor, (TOTAL - cursor) * 8), "resumed at %d",
              (int)cursor);
    }
    // Flips: about half, and not by image.
    int changed = 0;
    static float image[1024];
    struct loader *l;
    struct batch b;
    OK(loader_start(d, TOTAL, 42, 0, true, 2, &l));
    OK(loader_next(l, &b));
    for (int i = 0; i < TOTAL; i++) {
        OK(data_image(d, b.index[i], false, image));
        changed += memcmp(image, b.images + i * 1024, sizeof image) != 0;
    }
    loader_stop(l);
    CHECK(changed > 70 && changed < 130, "%d of 200 flipped", changed);
    CHECK(loader_start(d, 0, 1, 0, false, 1, &l) == ERR_INPUT, "batch 0");
    // A batch stays as it is while its reader is slow.
    static float kept[4 * 1024];
    OK(loader_start(d, 4, 1, 0, false, 2, &l));
    for (int i = 0; i < 3; i++) {
        OK(loader_next(l, &b));
        memcpy(kept, b.images, sizeof kept);
        usleep(10000);
        CHECK(!memcmp(kept, b.images, sizeof kept), "a batch changed while it was held");
    }
    loader_stop(l);
    for (int i = 0; i < 20; i++) { // stopped at any moment
        OK(loader_start(d, 50, 1, 0, false, 4, &l));
        if (i % 2)
            OK(loader_next(l, &b));
        loader_stop(l);
    }
    data_close(d);
    return PASSED;
}

// ---- nearest neighbours -------------------------------------------------------------------------

static int test_knn_small(void)
{
    float references[12 * 3], queries[2 * 3], nearest[2];
    int32_t labels[12], predicted[2];
    for (int i = 0; i < 12; i++) {
        labels[i] = i / 4;
        for (int k = 0; k < 3; k++)
            references[3 * i + k] = (float)(10 * (i / 4)) + (k == 0 ? (float)(i % 4) : 0.0f);
    }
    memcpy(queries, (float[]){1, 2, 0, 21, 20, 22}, sizeof queries);
    struct knn knn = {references, labels, 12, 3, 3, 5, 2};
    OK(knn_vote(&knn, queries, 2, predicted, nearest));
    CHECK(predicted[0] == 0 && predicted[1] == 2, "%d %d", predicted[0], predicted[1]);
    CHECK(nearest[0] == 2.0f && nearest[1] == 2.0f, "%g %g", (double)nearest[0],
          (double)nearest[1]);
    knn.k = 2; // one vote each: the smaller class wins
    memcpy(labels, (int32_t[]){0, 1}, 8);
    knn.reference_count = 2;
    memcpy(queries, (float[]){0.6f, 0, 0, 0.4f, 0, 0}, sizeof queries);
    OK(knn_vote(&knn, queries, 2, predicted, NULL));
    CHECK(predicted[0] == 0 && predicted[1] == 0, "a tie: %d %d", predicted[0], predicted[1]);
    queries[4] = NAN;
    CHECK(knn_vote(&knn, queries, 2, predicted, NULL) == ERR_INPUT && says("image 1"), "NaN");
    return PASSED;
}

// Instrumented code is slow here: fewer images do.
#if !defined __has_feature
#define __has_feature(name) 0
#endif
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__ || __has_feature(address_sanitizer)
enum { QUERIES = 100 };
#else
enum { QUERIES = 1000 };
#endif

// Real test images: the judge must know them, and be fast.
static int test_knn_fashion(void)
{
    struct dataset *train, *test;
    if (access(fashion, R_OK))
        return SKIPPED;
    OK(data_open(fashion, 0, 0, &train));
    OK(data_open_split(fashion, DATA_TEST, 0, 0, &test));
    float *queries = calloc(QUERIES, 1024 * sizeof *queries);
    static int32_t predicted[QUERIES];
    static float nearest[QUERIES];
    for (int i = 0; i < QUERIES; i++)
        OK(data_image(test, i, false, queries + i * 1024));
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    OK(knn_vote_dataset(train, 0, queries, QUERIES, predicted, nearest));
    clock_gettime(CLOCK_MONOTONIC, &to);
    int right = 0;
    for (int i = 0; i < QUERIES; i++)
        right += predicted[i] == data_label(test, i);
    printf("    %d of %d test images in their class, %.2f s\n", right, QUERIES,
           (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec));
    CHECK(QUERIES < 1000 || right == 836, "scikit-learn has 836 right");
    CHECK(nearest[0] > 1.0f, "%g", (double)nearest[0]);
    OK(data_image(train, 77, false, queries));
    OK(knn_vote_dataset(train, 100, queries, 1, predicted, nearest));
    CHECK(nearest[0] == 0.0f, "a training image is at distance %g from itself", (double)nearest[0]);
    free(queries);
    data_close(train);
    data_close(test);
    return PASSED;
}

// ---- the suite ----------------------------------------------------------------------------------

const struct test data_tests[] = {
    {"idx", test_idx},
    {"idx_gzip", test_idx_gzip},
    {"idx_errors", test_idx_errors},
    {"fashion_mnist", test_fashion_mnist},
    {"folder", test_folder},
    {"folder_errors", test_folder_errors},
    {"order", test_order},
    {"loader", test_loader},
    {"knn_small", test_knn_small},
    {"knn_fashion", test_knn_fashion},
    {0},
};
