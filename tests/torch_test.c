// PyTorch files (tests/torch/make_torch.py): what torch.save writes is read, what it does not is
// refused in one line.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/checkpoint.h"
#include "model/pickle.h"
#include "model/torch_file.h"

// ---- helpers ------------------------------------------------------------------------------------

static const char *fixture(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/torch/%s", TEST_DATA, name);
    return path;
}

static const char *scratch(void)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/crafted.pt", test_directory());
    return path;
}

static int put(const void *data, size_t bytes)
{
    FILE *f = fopen(scratch(), "wb");
    if (!f)
        return -1;
    size_t n = fwrite(data, 1, bytes, f);
    return fclose(f) || n != bytes ? -1 : 0;
}

static uint8_t *get(const char *path, size_t *bytes)
{
    uint8_t *data = calloc(1, 1 << 20);
    FILE *f = fopen(path, "rb");
    *bytes = f && data ? fread(data, 1, 1 << 20, f) : 0;
    if (f)
        fclose(f);
    return data;
}

static int one_line(const char *path)
{
    const char *m = error_message();
    return *m && !strchr(m, '\n') && strstr(m, path) == m;
}

// Reads every tensor of an open file; what cannot be converted must say so.
static int read_all(struct safetensors *s)
{
    for (int i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        CHECK(t->count <= 1 << 20, "%lld elements in a small file", (long long)t->count);
        float *f = malloc((size_t)t->count * sizeof *f + 1);
        int code = safetensors_read_f32(s, t, f, 0, t->count);
        free(f);
        CHECK(code >= 0 || (t->other && one_line("/")), "%s", error_message());
    }
    return PASSED;
}

// ---- what torch.save writes ---------------------------------------------------------------------

static double base(int64_t i)
{
    return 0.5 * (double)i - 3;
}

static double base_transposed(int64_t i)
{
    return base(i % 4 * 6 + i / 4);
}

static double base_part(int64_t i) // rows 1 and 2, columns 1, 3, 5
{
    return base((1 + i / 3) * 6 + 1 + 2 * (i % 3));
}

static double base_model(int64_t i)
{
    return base(i) + 1;
}

static double wide(int64_t i)
{
    return (double)(i - 2) * 5e9;
}

static double same(int64_t i)
{
    return (double)i;
}

static double seven(int64_t i)
{
    return 7 + (double)i;
}

static double parameter(int64_t i)
{
    return 1 - 3 * (double)i;
}

static int expect_small(struct safetensors *s)
{
    static const struct {
        const char *name;
        enum st_dtype dtype;
        int ndim;
        int64_t shape[2];
        double (*value)(int64_t);
    } rows[] = {
        {"f32", ST_F32, 2, {4, 6}, base_model},
        {"ema.f32", ST_F32, 2, {4, 6}, base},
        {"ema.transposed", ST_F32, 2, {6, 4}, base_transposed},
        {"ema.part", ST_F32, 2, {2, 3}, base_part},
        {"ema.f16", ST_F16, 2, {4, 6}, base},
        {"ema.bf16", ST_BF16, 2, {4, 6}, base},
        {"ema.f64", ST_F64, 2, {4, 6}, base},
        {"ema.i64", ST_I64, 1, {5}, wide},
        {"ema.i32", ST_I32, 1, {4}, same},
        {"ema.empty", ST_F32, 2, {0, 4}, same},
        {"ema.one", ST_F32, 0, {0}, seven},
        {"ema.parameter", ST_F32, 1, {2}, parameter},
    };
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        const struct st_tensor *t;
        float f[24];
        OK(safetensors_expect(s, rows[r].name, (int)rows[r].dtype, rows[r].ndim, rows[r].shape,
                              &t));
        OK(safetensors_read_f32(s, t, f, 0, t->count));
        for (int64_t i = 0; i < t->count; i++)
            CHECK(f[i] == (float)rows[r].value(i), "%s[%d]: %g", rows[r].name, (int)i,
                  (double)f[i]);
    }
    CHECK(safetensors_count(s) == 13, "%d tensors", safetensors_count(s));
    return PASSED;
}

static int test_small(void)
{
    static const char *const names[] = {"small.pt", "small_old.pth", "small64.pt"};
    for (int i = 0; i < 3; i++) {
        struct safetensors *s;
        const struct st_tensor *t;
        float f[4];
        CHECK(torch_file_is(fixture(names[i])), "%s is not recognised", names[i]);
        OK(torch_file_open(fixture(names[i]), &s));
        CHECK(expect_small(s) == PASSED, "%s", names[i]);
        t = safetensors_find(s, "ema.transposed");
        OK(safetensors_read_f32(s, t, f, 5, 4));
        CHECK(f[0] == (float)base_transposed(5) && f[3] == (float)base_transposed(8), "a range");
        CHECK(t->data == safetensors_find(s, "ema.f32")->data, "a shared storage is two");
        int64_t n[5];
        OK(safetensors_read_i64(s, safetensors_find(s, "ema.i64"), n, 0, 5));
        CHECK(n[0] == -10000000000 && n[4] == 10000000000, "int64");
        CHECK(safetensors_expect(s, "ema.bool", -1, -1, NULL, &t) == ERR_INPUT &&
                  one_line(fixture(names[i])) && strstr(error_message(), "BoolStorage"),
              "%s", error_message());
        safetensors_close(s);
    }
    CHECK(!torch_file_is(fixture("make_torch.py")) && !torch_file_is(fixture("none")), "no .pt");
    return PASSED;
}

static int expect_golden(const char *file, const char *model, bool ema)
{
    char path[512];
    snprintf(path, sizeof path, "%s/golden/%s/model.safetensors", TEST_DATA, model);
    struct checkpoint known, read;
    OK(checkpoint_open(path, NULL, &known));
    struct config_hints hints = {known.config.heads, known.config.topk, DIFFUSION_RF};
    OK(checkpoint_open(fixture(file), &hints, &read));
    CHECK(read.has_ema == ema && !read.has_config, "EMA: %d", read.has_ema);
    CHECK(config_equal(&known.config, &read.config), "the configuration is inferred wrongly");
    static float a[1 << 16], b[1 << 16];
    for (int i = 0; i < safetensors_count(known.file); i++) {
        const struct st_tensor *t = safetensors_at(known.file, i), *u;
        char name[160];
        snprintf(name, sizeof name, "%s%s", ema ? "ema." : "", t->name);
        OK(safetensors_expect(read.file, name, ST_F16, t->ndim, t->shape, &u));
        OK(safetensors_read_f32(known.file, t, a, 0, t->count));
        OK(safetensors_read_f32(read.file, u, b, 0, u->count));
        for (int64_t k = 0; k < t->count; k++)
            CHECK(fabsf(a[k] - b[k]) <= 5e-4f * fabsf(a[k]) + 1e-7f, "%s[%d]", name, (int)k);
    }
    checkpoint_close(&known), checkpoint_close(&read);
    return PASSED;
}

static int test_models(void)
{
    int result = expect_golden("s_qkv.pt", "s_qkv", true);
    return result ? result : expect_golden("xl_wqkv_old.pth", "xl_wqkv", false);
}

// ---- what it does not ---------------------------------------------------------------------------

static int test_refused(void)
{
    static const char *const rows[][2] = {{"evil.pt", "posix.system"},
                                          {"expanded.pt", "'wide': it repeats elements"},
                                          {"none.pt", "No such file"},
                                          {"", "not a regular file"},
                                          {"make_torch.py", "neither form"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct safetensors *s;
        CHECK(torch_file_open(fixture(rows[i][0]), &s) < 0 && !s, "%s opens", rows[i][0]);
        CHECK(one_line(fixture(rows[i][0])) && strstr(error_message(), rows[i][1]), "%s",
              error_message());
    }
    CHECK(access("executed", F_OK) != 0, "the file was executed");
    return PASSED;
}

// Cuts and changed bytes all over the file: refused in one line, or read to the end.
static int damage(const char *name)
{
    size_t n;
    struct safetensors *s;
    uint8_t *data = get(fixture(name), &n);
    for (size_t cut = 0; cut < n; cut += 17) {
        CHECK(put(data, cut) == 0, "cannot write");
        CHECK(torch_file_open(scratch(), &s) < 0 && one_line(scratch()), "%s cut at %zu", name,
              cut);
    }
    static const uint8_t flips[] = {0x01, 0x80, 0xff};
    for (size_t i = 0; i < n; i += 5) {
        data[i] ^= flips[i % 3];
        CHECK(put(data, n) == 0, "cannot write");
        if (torch_file_open(scratch(), &s) >= 0)
            CHECK(read_all(s) == PASSED, "%s byte %zu", name, i);
        else
            CHECK(one_line(scratch()), "%s byte %zu: %s", name, i, error_message());
        safetensors_close(s);
        data[i] ^= flips[i % 3];
    }
    free(data);
    return PASSED;
}

static int test_damaged(void)
{
    static const char *const names[] = {"small.pt", "small_old.pth", "small64.pt"};
    for (int i = 0; i < 3; i++)
        CHECK(damage(names[i]) == PASSED, "%s", names[i]);
    return PASSED;
}

#define TEXT(n, s) "X" n "\0\0\0" s
#define STORAGE(count)                                                                             \
    "(" TEXT("\7", "storage") "ctorch\nFloatStorage\n" TEXT("\1", "0") TEXT("\3", "cpu") count "t" \
                                                                                               "Q"
#define TENSOR(count, offset, sizes, strides)                                              \
    "\x80\2}" TEXT("\1", "w") "ctorch._utils\n_rebuild_tensor_v2\n(" STORAGE(count) offset \
        "(" sizes "t(" strides "t\x89}tRs."

// A file of the old form around `object`, with one storage '0' of four floats.
static int put_old(const char *object, size_t bytes)
{
    static const char head[] = "\x80\2\x8a\nl\xfc\x9c"
                               "F\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}"
                               "X\r\0\0\0little_endian\x88s.";
    static const char tail[] = "\x80\2]" TEXT("\1", "0") "a.\4\0\0\0\0\0\0\0"
                                                         "0123456789abcdef";
    static char file[1 << 20];
    memcpy(file, head, sizeof head - 1);
    memcpy(file + sizeof head - 1, object, bytes);
    memcpy(file + sizeof head - 1 + bytes, tail, sizeof tail - 1);
    return put(file, sizeof head - 1 + bytes + sizeof tail - 1);
}

static int test_views(void)
{
#define BIG "\x8a\10\0\0\0\0\0\0\0\x40" // 2^62
    static const struct {
        const char *object;
        size_t bytes;
        const char *says; // NULL: opens
    } rows[] = {
#define ROW(says, ...) {TENSOR(__VA_ARGS__), sizeof(TENSOR(__VA_ARGS__)) - 1, says}
        ROW(NULL, "K\4", "K\0", "K\2K\2", "K\2K\1"),
        ROW(NULL, "K\4", "K\4", "K\0", "K\1"),
        ROW("outside its storage", "K\4", "K\1", "K\2K\2", "K\2K\1"),
        ROW("outside its storage", "K\4", "K\5", "K\0", "K\1"),
        ROW("outside its storage", "K\4", "J\xff\xff\xff\xff", "K\1", "K\1"),
        ROW("outside its storage", "K\4", BIG, "K\1", "K\1"),
        ROW("outside its storage", "K\4", "K\0", "K\2", BIG),
        ROW("outside its storage", "K\4", "K\0", "K\4", BIG),
        ROW("too large", "K\4", "K\0", BIG "K\4", "K\0K\0"),
        ROW("repeats elements", "K\4", "K\0", BIG, "K\0"),
        ROW("cut short", "K\5", "K\0", "K\1", "K\1"),
        ROW("cut short", BIG, "K\0", "K\1", "K\1"),
        ROW("no length", "K\4", "K\0", "J\xff\xff\xff\xff", "K\1"),
        ROW("no length", "K\4", "K\0", "K\1", "N"),
        ROW("sizes and strides", "K\4", "K\0", "K\1", ""),
        ROW("8 dimensions", "K\4", "K\0", "K\1K\1K\1K\1K\1K\1K\1K\1K\1",
            "K\1K\1K\1K\1K\1K\1K\1K\1K\1"),
        ROW("no tensor storage", "J\xff\xff\xff\xff", "K\0", "K\1", "K\1"),
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct safetensors *s;
        CHECK(put_old(rows[i].object, rows[i].bytes) == 0, "cannot write");
        int code = torch_file_open(scratch(), &s);
        CHECK((code >= 0) == !rows[i].says, "row %zu: %s", i, error_message());
        if (code >= 0)
            CHECK(read_all(s) == PASSED, "row %zu", i);
        else
            CHECK(one_line(scratch()) && strstr(error_message(), rows[i].says), "row %zu: %s", i,
                  error_message());
        safetensors_close(s);
    }
    return PASSED;
}

// One text or tensor named over and over costs the pickle two bytes each time, not memory each.
static int test_names(void)
{
    enum { TIMES = 200000, LONG = 600 };
    static const char tensor[] =
        "ctorch._utils\n_rebuild_tensor_v2\n(" STORAGE("K\4") "K\0(K\1t(K\1t\x89}tRq\1";
    static char object[4096 + 5 * TIMES] = "\x80\2}X";
    for (int length = 1; length <= LONG; length += LONG - 1) {
        size_t n = 4;
        memcpy(object + n, (const char[]){(char)length, (char)(length >> 8), 0, 0}, 4);
        memset(object + n + 4, 'n', (size_t)length);
        n += 4 + (size_t)length;
        memcpy(object + n, "q\0", 2);
        memcpy(object + n + 2, tensor, sizeof tensor - 1);
        n += 2 + sizeof tensor - 1;
        memcpy(object + n, "00", 2), n += 2;
        for (int i = 0; i < TIMES; i++, n += 5)
            memcpy(object + n, "h\0h\1s", 5);
        object[n] = '.';
        CHECK(put_old(object, n + 1) == 0, "cannot write");
        struct safetensors *s;
        CHECK(torch_file_open(scratch(), &s) == ERR_INPUT && one_line(scratch()), "it opens");
        CHECK(strstr(error_message(), length == 1 ? "more than 131072 tensors" : "longer than 512"),
              "%s", error_message());
    }
    return PASSED;
}

static int test_pickles(void)
{
    static const struct {
        const char *text;
        size_t bytes;
        const char *says;
    } rows[] = {
#define P(text, says) {text, sizeof text - 1, says}
        P("\x80\2]q\0h\0a.", NULL),                    // a list within itself
        P("\x80\2}q\0" TEXT("\1", "m") "h\0s.", NULL), // a dict within itself
        P("\x80\2X\xff\xff\xff\xff"
          "a.",
          "cut short"),                                   // 4 GB of text
        P("\x80\5\x95\0\0\0\0\0\0\0\x7fN.", "cut short"), // a frame of 2^62 bytes
        P("\x80\2Nr\xff\xff\xff\x7f.", "memo index"),     // 2^31 memos
        P("\x80\2h\7.", "never put"),
        P("\x80\2.", "empty stack"),
        P("\x80\2NN.", "leaves values"),
        P("\x80\2N", "cut short"),
        P("\x80\2(.", "empty stack"),
        P("\x80\2t.", "no mark"),
        P("\x80\2}(Nu.", "key without a value"),
        P("\x80\2Na.", "no list or dict"),
        P("\x80\2NNa.", "no list or dict"),
        P("\x80\2N)R.", "no function"),
        P("\x80\2cos\nsystem\n(" TEXT("\2", "ls") "tR.", "refused: it wants Python's os.system"),
        P("\x80\2cbuiltins\neval\n.", "refused: it wants Python's builtins.eval"),
        P("\x80\4"
          "\x8c\2os\x8c\6sy\nt\x1bm\x93.",
          "os.sy?t?m"),
        P("\x80\2(S'a'\ni__main__\nX\n.", "opcode"),
        P("\x80\2\x82\1.", "opcode 0x82"), // an extension
        P("\x80\7N.", "protocol"),
        P("\x80\2NQ.", "no tensor storage"),
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct pickle *p;
        size_t used;
        int code = pickle_read((const uint8_t *)rows[i].text, rows[i].bytes, &p, &used);
        CHECK((code >= 0) == !rows[i].says, "row %zu: %s", i, error_message());
        CHECK(code >= 0 || (one_line("") && strstr(error_message(), rows[i].says)), "row %zu: %s",
              i, error_message());
        pickle_free(p);
    }
    return PASSED;
}

// Tuples, each within the next: nothing may recurse into them. And each costs memory, which is
// bounded by the pickle's size.
static int test_deep(void)
{
    enum { MOST = 4000000 };
    static const struct {
        const char *op;
        int count;
        bool opens;
    } rows[] = {{"\x85", 30000, true},  {"\x85", 1000000, false}, {"]", 30000, true},
                {"]", MOST, false},      {"}", MOST, false},        {"(", MOST, false},
                {"N", MOST, false},       {"K\1", MOST / 2, false}, {"\x94", 30000, true},
                {"\x94", MOST, false}};
    uint8_t *data = malloc(MOST + 8);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        struct pickle *p;
        size_t n = 3, used;
        memcpy(data, "\x80\2N", 3);
        for (int i = 0; i < rows[r].count; i++, n += strlen(rows[r].op))
            memcpy(data + n, rows[r].op, strlen(rows[r].op));
        memcpy(data + n, "(.", 2);
        int code = pickle_read(data, n + 2, &p, &used);
        CHECK(code == ERR_INPUT, "row %zu opens", r);
        CHECK(rows[r].opens == !strstr(error_message(), "more memory"), "row %zu: %s", r,
              error_message());
    }
    free(data);
    return PASSED;
}

const struct test torch_tests[] = {
    {"small", test_small},     {"models", test_models}, {"refused", test_refused},
    {"damaged", test_damaged}, {"views", test_views},   {"names", test_names},
    {"pickles", test_pickles}, {"deep", test_deep},     {0},
};
