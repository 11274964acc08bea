// numpy's archives (tests/eval/make_eval.py): what numpy writes is read, what is damaged or hostile
// is refused in one line, what is written is laid out as it says.
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

#include "model/npz.h"

#define ARCHIVE(name) TEST_DATA "/eval/" name

static const char *in_directory(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", test_directory(), name);
    return path;
}

static int read_images(const char *path)
{
    struct npz *z;
    struct npz_reader *r;
    struct npy_array a;
    uint8_t got[7 * 6 * 5 * 3];
    OK(npz_open(path, &z));
    CHECK(npz_has(z, "arr_0") && !npz_has(z, "arr_") && !npz_has(z, "arr_0.npy"), "names");
    OK(npz_read_open(z, "arr_0", &a, &r));
    CHECK(a.dtype == ST_U8 && a.ndim == 4 && a.count == 630 && a.shape[1] == 6 && !a.columns_first,
          "%d dimensions, %lld elements", a.ndim, (long long)a.count);
    for (int i = 0; i < 630; i += 90)
        OK(npz_read(r, got + i, 90));
    for (int i = 0; i < 630; i++)
        CHECK(got[i] == i * 37 % 251, "element %d is %d", i, got[i]);
    CHECK(npz_read(r, got, 1) == ERR_INPUT, "read past the end");
    npz_read_close(r);
    npz_close(z);
    return PASSED;
}

static int test_numpy(void)
{
    struct npz *z;
    struct npz_reader *r;
    struct npy_array a;
    CHECK(read_images(ARCHIVE("deflated.npz")) == PASSED, "deflated");
    CHECK(read_images(ARCHIVE("stored.npz")) == PASSED, "stored");
    OK(npz_open(ARCHIVE("stored.npz"), &z));
    OK(npz_read_open(z, "one", &a, &r));
    double one = 0;
    CHECK(a.ndim == 0 && a.count == 1, "a number has %d dimensions", a.ndim);
    OK(npz_read_doubles(r, &one, 1));
    CHECK(one == 7, "one is %g", one);
    npz_read_close(r);
    OK(npz_read_open(z, "columns", &a, &r));
    CHECK(a.columns_first && a.shape[0] == 2 && a.shape[1] == 3, "order of elements");
    npz_read_close(r);
    CHECK(npz_read_open(z, "arr_1", &a, &r) == ERR_INPUT && strstr(error_message(), "arr_1"),
          "an array that is not there");
    npz_close(z);
    OK(npz_open(ARCHIVE("version2.npz"), &z));
    for (int version = 2; version <= 3; version++) {
        double v[5];
        OK(npz_read_open(z, version == 2 ? "v2" : "v3", &a, &r));
        OK(npz_read_doubles(r, v, 5));
        CHECK(v[4] == 4, "version %d", version);
        npz_read_close(r);
    }
    npz_close(z);
    return PASSED;
}

// Reads everything that there is; 0 where all of it could be.
static int try_all(const char *path)
{
    static const char *const names[] = {"arr_0", "arr_1", "half", "one", "columns"};
    struct npz *z;
    TRY(npz_open(path, &z));
    int code = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names && code >= 0; i++) {
        struct npz_reader *r;
        struct npy_array a;
        uint8_t part[8192];
        if (!npz_has(z, names[i]))
            continue;
        code = npz_read_open(z, names[i], &a, &r);
        if (code >= 0 && a.count <= 1000)
            code = npz_read(r, part, a.count);
        npz_read_close(r);
    }
    npz_close(z);
    return code;
}

static uint8_t *load(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    uint8_t *data = f ? malloc(1 << 16) : NULL;
    *bytes = data ? fread(data, 1, 1 << 16, f) : 0;
    if (f)
        fclose(f);
    return data;
}

static const char *store(const uint8_t *data, size_t bytes)
{
    const char *path = in_directory("hostile.npz");
    FILE *f = fopen(path, "wb");
    fwrite(data, 1, bytes, f);
    fclose(f);
    return path;
}

// Cut anywhere, it is refused; with any byte changed it is read or refused, and never more than
// that (the sanitizers of tests/run.sh watch).
static int test_damaged(void)
{
    static const char *const files[] = {ARCHIVE("deflated.npz"), ARCHIVE("stored.npz")};
    for (int k = 0; k < 2; k++) {
        size_t bytes, refused = 0;
        uint8_t *data = load(files[k], &bytes);
        CHECK(bytes > 100, "%s cannot be read", files[k]);
        for (size_t n = 0; n < bytes; n += 1 + bytes / 150) {
            CHECK(try_all(store(data, n)) < 0, "cut after %zu bytes: accepted", n);
            CHECK(!strchr(error_message(), '\n') && strstr(error_message(), "hostile.npz"), "%s",
                  error_message());
        }
        for (size_t n = 0; n < bytes; n += 1 + bytes / 300) {
            data[n] ^= 0xff;
            refused += try_all(store(data, bytes)) < 0;
            data[n] ^= 0xff;
        }
        CHECK(refused > 100, "only %zu of some 300 changed bytes were noticed", refused);
        free(data);
    }
    CHECK(try_all(ARCHIVE("objects.npz")) == ERR_INPUT, "an array of Python objects");
    CHECK(try_all("/dev/null") == ERR_IO, "a device");
    CHECK(try_all(in_directory("none.npz")) == ERR_IO, "a missing file");
    return PASSED;
}

// ---- headers ------------------------------------------------------------------------------------

// An archive of one stored array with this header and so many bytes behind it, 518 in all.
static const char *craft(const char *text, size_t bytes)
{
    enum { HEADER = 10, ALL = 518 };
    const char *path = in_directory("hostile.npz");
    uint8_t npy[ALL] = "\x93NUMPY\1";
    const size_t length = ALL - HEADER - bytes;
    struct zip_writer *z;
    npy[8] = (uint8_t)length;
    npy[9] = (uint8_t)(length >> 8);
    memset(npy + HEADER, ' ', length);
    memcpy(npy + HEADER, text, strlen(text));
    BUG_IF(zip_create(path, &z) < 0 || zip_entry_begin(z, "arr_0.npy", ALL) < 0 ||
           zip_write(z, npy, ALL) < 0 || zip_commit(z) < 0);
    return path;
}

static int open_crafted(const char *text, size_t bytes)
{
    struct npz *z;
    struct npz_reader *r;
    struct npy_array a;
    TRY(npz_open(craft(text, bytes), &z));
    int code = npz_read_open(z, "arr_0", &a, &r);
    npz_read_close(r);
    npz_close(z);
    return code;
}

static int test_headers(void)
{
    static const struct {
        const char *text;
        size_t bytes;
        int good;
    } rows[] = {
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (400,), }", 400, 1},
        {"{\"shape\": (20, 20), \"fortran_order\": False, \"descr\": \"|u1\"}", 400, 1},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (50L,), }", 400, 1},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (401,), }", 400, 0},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (399,), }", 400, 0},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (2305843009213693952, 8), }", 400, 0},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999,), }", 400, 0},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }", 400, 0},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,400), }", 400, 0},
        {"{'descr': '>f8', 'fortran_order': False, 'shape': (50,), }", 400, 0},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (50,), }", 400, 0},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (50,), }", 400, 0},
        {"{'descr': '|u1', 'fortran_order': False, }", 400, 0},
        {"{'shape': (400,), 'shape': (400,), 'descr': '|u1', }", 400, 0},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (400", 400, 0},
        {"{'descr': '|u1", 400, 0},
        {"", 400, 0},
        {"(", 400, 0},
        {"{{{{{{{{", 400, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const int code = open_crafted(rows[i].text, rows[i].bytes);
        CHECK(rows[i].good ? code == 0 : code == ERR_INPUT, "%s: %d (%s)", rows[i].text, code,
              error_message());
    }
    return PASSED;
}

// ---- writing ------------------------------------------------------------------------------------

static int test_write(void)
{
    const char *path = in_directory("written.npz");
    struct zip_writer *w;
    struct npz *z;
    struct npz_reader *r;
    struct npy_array a;
    const float values[6] = {1, -2, 3, 4.5f, 1e-30f, 6};
    const int64_t labels[2] = {3, -1};
    double back[6];
    OK(zip_create(path, &w));
    OK(npz_write_begin(w, "values", ST_F32, 2, (int64_t[]){2, 3}));
    OK(zip_write(w, values, sizeof values));
    OK(npz_write_begin(w, "labels", ST_I64, 1, (int64_t[]){2}));
    OK(zip_write(w, labels, sizeof labels));
    OK(npz_write_begin(w, "none", ST_F64, 3, (int64_t[]){0, 4, 4}));
    OK(zip_commit(w));
    OK(npz_open(path, &z));
    OK(npz_read_open(z, "values", &a, &r));
    CHECK(a.ndim == 2 && a.shape[0] == 2 && a.shape[1] == 3, "shape");
    OK(npz_read_doubles(r, back, 6));
    for (int i = 0; i < 6; i++)
        CHECK(back[i] == (double)values[i], "value %d is %g", i, back[i]);
    npz_read_close(r);
    OK(npz_read_open(z, "labels", &a, &r));
    CHECK(a.dtype == ST_I64 && a.ndim == 1, "labels");
    npz_read_close(r);
    OK(npz_read_open(z, "none", &a, &r));
    CHECK(a.count == 0 && a.ndim == 3, "an array without elements");
    npz_read_close(r);
    npz_close(z);
    return PASSED;
}

const struct test npz_tests[] = {
    {"numpy", test_numpy},
    {"damaged", test_damaged},
    {"headers", test_headers},
    {"write", test_write},
    {0},
};
