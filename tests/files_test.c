// Files in and out: safetensors, atomic replacement, PNG and JPEG, figures.
#include "tests/test.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <dirent.h>

#include "model/atomic_file.h"
#include "model/safetensors.h"

// ---- helpers ------------------------------------------------------------------------------------

static const char *in_directory(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", test_directory(), name);
    return path;
}

static int put(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f)
        return -1;
    size_t n = fwrite(data, 1, bytes, f);
    return fclose(f) || n != bytes ? -1 : 0;
}

static char *get(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    char *data = calloc(1, 1 << 20);
    *bytes = fread(data, 1, 1 << 20, f);
    fclose(f);
    return data;
}

// How many files of the test directory have `part` in their name.
static int files_with(const char *part)
{
    int count = 0;
    DIR *d = opendir(test_directory());
    for (struct dirent *e = readdir(d); e; e = readdir(d))
        count += strstr(e->d_name, part) != NULL;
    closedir(d);
    return count;
}

// A failure's message is one line that names the file.
static int one_line(const char *path)
{
    const char *m = error_message();
    return *m && !strchr(m, '\n') && strstr(m, path) == m;
}

// Writes a safetensors file from its JSON header and `bytes` bytes of data.
static const char *craft(const char *header, size_t bytes)
{
    const char *path = in_directory("crafted.safetensors");
    FILE *f = fopen(path, "wb");
    uint64_t length = strlen(header);
    fwrite(&length, 8, 1, f);
    fwrite(header, 1, (size_t)length, f);
    for (size_t i = 0; i < bytes; i++)
        fputc((int)i, f);
    fclose(f);
    return path;
}

// ---- safetensors --------------------------------------------------------------------------------

static const float weights[6] = {1.0f, -2.5f, 3e-20f, 4e20f, 0.0f, -0.0f};
static const int64_t numbers[3] = {-1, 5000000000, 7};

static int write_small(const char *path, float first)
{
    struct safetensors_writer *w;
    float values[6];
    memcpy(values, weights, sizeof values);
    values[0] = first;
    TRY(safetensors_create(path, &w));
    TRY(safetensors_declare(w, "a.weight", ST_F32, 2, (int64_t[]){2, 3}));
    TRY(safetensors_declare(w, "n", ST_I64, 1, (int64_t[]){3}));
    TRY(safetensors_declare(w, "empty", ST_F32, 2, (int64_t[]){0, 4}));
    TRY(safetensors_declare(w, "one", ST_U8, 0, NULL));
    TRY(safetensors_set_metadata(w, "config", "{\"depth\": 2, \"name\": \"\xc3\xa9\"}"));
    TRY(safetensors_begin(w));
    TRY(safetensors_write(w, values, 5)); // pieces need not respect tensors
    TRY(safetensors_write(w, (char *)values + 5, sizeof values - 5));
    TRY(safetensors_write(w, numbers, sizeof numbers));
    TRY(safetensors_write(w, "\x2a", 1));
    return safetensors_commit(w);
}

static int test_safetensors_round_trip(void)
{
    const char *path = in_directory("small.safetensors");
    struct safetensors *s;
    const struct st_tensor *t;
    OK(write_small(path, 1.0f));
    OK(safetensors_open(path, &s));
    CHECK(safetensors_count(s) == 4, "%d tensors", safetensors_count(s));
    OK(safetensors_expect(s, "a.weight", ST_F32, 2, (int64_t[]){2, -1}, &t));
    CHECK((uintptr_t)t->data % 8 == 0, "data is not aligned");
    float f[6];
    OK(safetensors_read_f32(s, t, f, 0, 6));
    CHECK(!memcmp(f, weights, sizeof f), "values differ");
    OK(safetensors_read_f32(s, t, f, 2, 3));
    CHECK(!memcmp(f, weights + 2, 12), "a part differs");
    CHECK(safetensors_read_f32(s, t, f, 4, 3) == ERR_INPUT && one_line(path), "read past the end");
    CHECK(safetensors_read_f32(s, t, f, INT64_MAX, 2) == ERR_INPUT, "read past the end");
    int64_t n[3];
    OK(safetensors_expect(s, "n", ST_I64, -1, NULL, &t));
    OK(safetensors_read_i64(s, t, n, 0, 3));
    CHECK(!memcmp(n, numbers, sizeof n), "values differ");
    t = safetensors_find(s, "one");
    CHECK(t && t->ndim == 0 && t->count == 1, "a single number");
    OK(safetensors_read_f32(s, t, f, 0, 1));
    CHECK(f[0] == 42.0f, "%g", (double)f[0]);
    CHECK(safetensors_find(s, "empty")->count == 0, "an empty tensor");
    CHECK(!safetensors_find(s, "b") && !safetensors_metadata(s, "none"), "found what is not there");
    CHECK(strstr(safetensors_metadata(s, "config"), "\xc3\xa9"), "metadata");
    CHECK(safetensors_expect(s, "a.bias", -1, -1, NULL, &t) == ERR_INPUT &&
              strstr(error_message(), "'a.bias' is missing"),
          "%s", error_message());
    CHECK(safetensors_expect(s, "a.weight", -1, 2, (int64_t[]){3, 2}, &t) == ERR_INPUT &&
              strstr(error_message(), "[2,3], expected [3,2]"),
          "%s", error_message());
    safetensors_close(s);
    return PASSED;
}

static int test_safetensors_conversions(void)
{
    static const char header[] =
        "{\"h\":{\"dtype\":\"F16\",\"shape\":[6],\"data_offsets\":[0,12]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[12,16]},"
        "\"i\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[16,20]}} ";
    static const uint16_t data[10] = {0x3c00, 0xc100, 0x0001, 0x7bff, 0x8000,
                                      0xfc00, 0x3fc0, 0xff80, 0xfffe, 0xffff};
    static const float h[6] = {1.0f, -2.5f, 0x1p-24f, 65504.0f, -0.0f, -INFINITY};
    const char *path = craft(header, 0);
    FILE *file = fopen(path, "ab");
    fwrite(data, sizeof data, 1, file);
    fclose(file);
    struct safetensors *s;
    float f[6];
    OK(safetensors_open(path, &s));
    OK(safetensors_read_f32(s, safetensors_find(s, "h"), f, 0, 6));
    CHECK(!memcmp(f, h, sizeof h), "F16");
    OK(safetensors_read_f32(s, safetensors_find(s, "b"), f, 0, 2));
    CHECK(f[0] == 1.5f && f[1] == -INFINITY, "BF16");
    OK(safetensors_read_f32(s, safetensors_find(s, "i"), f, 0, 1));
    CHECK(f[0] == -2.0f, "I32");
    safetensors_close(s);
    return PASSED;
}

static int test_safetensors_cut(void)
{
    const char *whole = in_directory("whole.safetensors"), *cut = in_directory("cut.safetensors");
    struct safetensors *s;
    size_t bytes = 0;
    OK(write_small(whole, 1.0f));
    char *data = get(whole, &bytes);
    CHECK(data && bytes > 100, "%zu bytes", bytes);
    for (size_t n = 0; n < bytes; n++) {
        CHECK(put(cut, data, n) == 0, "writing");
        CHECK(safetensors_open(cut, &s) < 0, "opened when cut at byte %zu", n);
        CHECK(one_line(cut), "cut at byte %zu: %s", n, error_message());
    }
    CHECK(strstr(error_message(), "'one'"), "the tensor is not named: %s", error_message());
    // Every byte of the header changed, one at a time: an error or a file that can be read, no
    // crash.
    float f[8];
    for (size_t i = 0; i < bytes; i++) {
        char old = data[i];
        data[i] = (char)(old ^ 0x11);
        CHECK(put(cut, data, bytes) == 0, "writing");
        if (safetensors_open(cut, &s) >= 0)
            for (int k = 0; k < safetensors_count(s); k++)
                OK(safetensors_read_f32(s, safetensors_at(s, k), f, 0,
                                        safetensors_at(s, k)->count));
        else
            CHECK(one_line(cut), "byte %zu: %s", i, error_message());
        safetensors_close(s);
        data[i] = old;
    }
    free(data);
    return PASSED;
}

#define TENSOR(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static int test_safetensors_hostile(void)
{
    static const struct {
        const char *header;
        size_t bytes;
        const char *says;
    } rows[] = {
        {"{" TENSOR("a", "F32", "[2]", "[0,8]") "," TENSOR("b", "F32", "[2]", "[4,12]") "}", 12,
         "overlaps"},
        {"{" TENSOR("a", "F32", "[2]", "[0,8]") "," TENSOR("b", "F32", "[2]", "[0,8]") "}", 8,
         "overlaps"},
        {"{" TENSOR("a", "F32", "[1]", "[0,4]") "," TENSOR("b", "F32", "[1]", "[8,12]") "}", 12,
         "hole"},
        {"{" TENSOR("a", "F32", "[1]", "[4,8]") "}", 8, "hole"},
        {"{" TENSOR("a", "F32", "[1]", "[0,4]") "}", 5, "belong to none"},
        {"{}", 3, "belong to none"},
        {"{" TENSOR("a", "F32", "[1]", "[0,4]") "," TENSOR("a", "F32", "[1]", "[4,8]") "}", 8,
         "duplicate"},
        {"{" TENSOR("a", "F32", "[2]", "[0,4]") "}", 4, "needs 8"},
        {"{" TENSOR("a", "F32", "[1]", "[0,8]") "}", 4, "cut short"},
        {"{" TENSOR("a", "F32", "[1]", "[0,18446744073709551612]") "}", 4, "too big"},
        {"{" TENSOR("a", "F32", "[1]", "[9223372036854775804,9223372036854775807]") "}", 4,
         "cut short"},
        {"{" TENSOR("a", "F32", "[1]", "[4,0]") "}", 4, "no range"},
        {"{" TENSOR("a", "F32", "[1]", "[-4,0]") "}", 4, "no range"},
        {"{" TENSOR("a", "F32", "[1]", "[0,4,8]") "}", 4, "data_offsets"},
        {"{" TENSOR("a", "F32", "[1]", "[0.0,4.0]") "}", 4, "data_offsets"},
        {"{" TENSOR("a", "F32", "[4294967296,4294967296,4]", "[0,4]") "}", 4, "too large"},
        {"{" TENSOR("a", "F32", "[4611686018427387905]", "[0,4]") "}", 4, "too large"},
        {"{" TENSOR("a", "F32", "[9223372036854775807]", "[0,4]") "}", 4, "too large"},
        {"{" TENSOR("a", "F32", "[-1]", "[0,4]") "}", 4, "list of lengths"},
        {"{" TENSOR("a", "F32", "[1.5]", "[0,4]") "}", 4, "list of lengths"},
        {"{" TENSOR("a", "F32", "7", "[0,4]") "}", 4, "no shape"},
        {"{" TENSOR("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "8 dimensions"},
        {"{" TENSOR("a", "F31", "[1]", "[0,4]") "}", 4, "'F31' is not supported"},
        {"{" TENSOR("a\\n\\u001bb", "F31", "[1]", "[0,4]") "}", 4, "'a??b'"},
        {"{\"a\":{}}", 4, "no dtype"},
        {"{\"a\":5}", 4, "object"},
        {"{\"__metadata__\":{\"k\":1}}", 0, "strings"},
        {"{\"__metadata__\":[]}", 0, "not an object"},
        {"[1,2,3]", 0, "not a JSON object"},
        {"{\"a\"", 0, "header"},
        {"{} {}", 0, "header"},
        {"{\"\xff\":{}}", 0, "header"},
        {"", 0, "not a JSON object"},
    };
    struct safetensors *s;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *path = craft(rows[i].header, rows[i].bytes);
        CHECK(safetensors_open(path, &s) == ERR_INPUT && !s, "row %zu opens", i);
        CHECK(one_line(path) && strstr(error_message(), rows[i].says), "row %zu: %s", i,
              error_message());
    }
    static const uint64_t lengths[] = {UINT64_MAX, 100000001, 99999999, 1000, 1u << 31};
    const char *path = in_directory("length.safetensors");
    for (int i = 0; i < 5; i++) {
        uint64_t words[3] = {lengths[i], 0x7b7b7b7b7b7b7b7b, 0};
        CHECK(put(path, words, sizeof words) == 0, "writing");
        CHECK(safetensors_open(path, &s) == ERR_INPUT && one_line(path), "header length %d", i);
    }
    // Nesting as deep as the file is long must not exhaust the stack.
    char *deep = malloc(1000001);
    memset(deep, '[', 1000000);
    memcpy(deep, "{\"a\":", 5);
    deep[1000000] = 0;
    CHECK(safetensors_open(craft(deep, 0), &s) == ERR_INPUT, "deep nesting opens");
    free(deep);
    CHECK(safetensors_open(in_directory("none"), &s) == ERR_IO && one_line(in_directory("none")),
          "none");
    CHECK(safetensors_open(test_directory(), &s) == ERR_IO && one_line(test_directory()),
          "directory");
    CHECK(safetensors_open(craft("{}", 0), &s) == 0 && safetensors_count(s) == 0,
          "no tensors at all");
    safetensors_close(s);
    return PASSED;
}

// `count` times `each`, then `end`, in a header.
static const char *craft_many(const char *begin, const char *each, int count, const char *end)
{
    const size_t size = strlen(begin) + (size_t)count * (strlen(each) + 8) + strlen(end) + 1;
    char *text = malloc(size);
    size_t n = (size_t)sprintf(text, "%s", begin);
    for (int i = 0; i < count; i++)
        n += (size_t)sprintf(text + n, each, i);
    strcpy(text + n, end);
    const char *path = craft(text, 0);
    free(text);
    return path;
}

// In a process of its own, which gets room for eight times the file and no more: the code, or 1
// where there was not even a message.
static int open_within_memory(const char *path)
{
    long pages = 0;
    struct rlimit room;
    FILE *f = fopen(path, "rb"), *own = fopen("/proc/self/statm", "r");
    fseek(f, 0, SEEK_END);
    const long bytes = ftell(f);
    fclose(f);
    if (!own || fscanf(own, "%ld", &pages) != 1)
        return 1;
    fclose(own);
    room.rlim_cur = room.rlim_max =
        (rlim_t)(pages * sysconf(_SC_PAGESIZE) + 8 * bytes + (16 << 20));
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        struct safetensors *s;
        setrlimit(RLIMIT_AS, &room);
        _exit(-safetensors_open(path, &s));
    }
    int status = 0;
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? -WEXITSTATUS(status) : 1;
}

// A header costs a small multiple of its length, whatever is in it.
static int test_safetensors_costs(void)
{
    enum { MANY = 300000 };
    static const char each[] =
        ",\"t%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
    const char *path = craft_many("{\"x\":0", each, MANY, "}");
    CHECK(open_within_memory(path) == ERR_INPUT, "a number among the tensors");
    path = craft_many("{\"__metadata__\":{}", each, MANY, "}");
    CHECK(open_within_memory(path) == 0, "many tensors");
    path = craft_many("{\"t\":{\"shape\":[[]", ",[]", 8 * MANY, "]}}");
    CHECK(open_within_memory(path) == ERR_INPUT, "empty lists");
    path = craft_many("{\"__metadata__\":{\"k\":\"\"", ",\"%d\":\"\"", MANY, "}}");
    CHECK(open_within_memory(path) == ERR_INPUT, "much metadata");
    path = craft_many("{\"t\":{}", ",\"%d\":{}", 2 * MANY, "}");
    CHECK(open_within_memory(path) == ERR_INPUT, "empty objects");
    return PASSED;
}

static int test_safetensors_misuse(void)
{
    const char *path = in_directory("misuse.safetensors");
    struct safetensors_writer *w;
    OK(safetensors_create(path, &w));
    OK(safetensors_declare(w, "a", ST_F32, 1, (int64_t[]){2}));
    CHECK(safetensors_declare(w, "a", ST_F32, 1, (int64_t[]){2}) == ERR_INPUT, "declared twice");
    CHECK(safetensors_declare(w, "", ST_F32, 1, (int64_t[]){2}) == ERR_INPUT, "no name");
    CHECK(safetensors_declare(w, "b", ST_F32, 2, (int64_t[]){INT64_MAX / 2, 4}) == ERR_INPUT,
          "large");
    CHECK(safetensors_declare(w, "b", ST_F32, 1, (int64_t[]){-1}) == ERR_INPUT, "negative");
    OK(safetensors_begin(w));
    CHECK(safetensors_write(w, weights, 12) == ERR_INPUT && one_line(path), "too many bytes");
    OK(safetensors_write(w, weights, 4));
    CHECK(safetensors_commit(w) == ERR_INPUT && one_line(path), "too few bytes");
    CHECK(files_with("misuse") == 0, "something is left");
    CHECK(safetensors_create(in_directory("no/such/x"), &w) == ERR_IO && !w, "no such directory");
    return PASSED;
}

// ---- replacement --------------------------------------------------------------------------------

static float first_weight(const char *path)
{
    struct safetensors *s;
    float f = NAN;
    if (safetensors_open(path, &s) >= 0)
        safetensors_read_f32(s, safetensors_find(s, "a.weight"), &f, 0, 1);
    safetensors_close(s);
    return f;
}

// A disk that is full at any byte, simulated by the limit on a file's size.
static int test_full_disk(void)
{
    const char *path = in_directory("full.safetensors");
    size_t bytes = 0;
    OK(write_small(path, 1.0f));
    free(get(path, &bytes));
    void (*before)(int) = signal(SIGXFSZ, SIG_IGN);
    struct rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    int failures = 0, survived = 0, lines = 0;
    for (size_t n = 0; n < bytes; n++) {
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){n, old.rlim_max});
        struct safetensors_writer *w = NULL;
        int code = safetensors_create(path, &w);
        float zero[13] = {2.0f};
        if (code >= 0)
            code = safetensors_declare(w, "a.weight", ST_F32, 1, (int64_t[]){(int64_t)bytes / 4});
        if (code >= 0)
            code = safetensors_begin(w);
        for (size_t k = 0; code >= 0 && k < bytes / 4; k++)
            code = safetensors_write(w, zero, 4);
        code < 0 ? safetensors_abort(w) : (void)(code = safetensors_commit(w));
        failures += code == ERR_IO;
        lines += one_line(path);
        survived += first_weight(path) == 1.0f;
    }
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, before);
    CHECK(failures == (int)bytes, "%d of %zu limits reported as ERR_IO", failures, bytes);
    CHECK(lines == (int)bytes && strstr(error_message(), "too large"), "%s", error_message());
    CHECK(survived == (int)bytes, "the previous file was lost");
    CHECK(files_with("full.safetensors") == 1, "temporaries are left");
    return PASSED;
}

static int test_really_full_device(void)
{
    struct safetensors_writer *w;
    CHECK(safetensors_create("/dev/full", &w) == ERR_IO, "a device was taken for a file");
    CHECK(!w && one_line("/dev/full"), "%s", error_message());
    return PASSED;
}

// kill -9 in the middle of writing: the previous file stays, the next writer clears the leftovers
// of the dead, and only those.
static int test_killed_writer(void)
{
    const char *path = in_directory("killed.safetensors");
    OK(write_small(path, 1.0f));
    for (int i = 0; i < 2; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            struct atomic_file *f;
            if (atomic_file_create(path, &f) >= 0 && atomic_file_write(f, "half", 4) >= 0)
                kill(getpid(), SIGKILL);
            _exit(1);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status), "the writer was not killed");
        CHECK(files_with("killed.safetensors.tmp.") == 1, "leftovers do not go");
        CHECK(first_weight(path) == 1.0f, "the previous file was lost");
    }
    CHECK(put(in_directory("killed.safetensors.tmp.mine"), "x", 1) == 0, "writing");
    CHECK(put(in_directory("other.tmp.123"), "x", 1) == 0, "writing");
    struct atomic_file *live;
    OK(atomic_file_create(in_directory("live"), &live));
    OK(write_small(path, 3.0f));
    CHECK(first_weight(path) == 3.0f, "not replaced");
    CHECK(files_with("killed.safetensors.tmp.") == 1,
          "leftovers are still there, or too much is gone");
    CHECK(files_with("other.tmp.123") == 1 && files_with("live.tmp.") == 1, "too much is gone");
    struct atomic_file *second;
    CHECK(atomic_file_create(in_directory("live"), &second) == ERR_IO, "two writers of one file");
    OK(atomic_file_write(live, "whole", 5));
    OK(atomic_file_commit(live));
    CHECK(files_with("live") == 1, "the temporary of a finished writer is left");
    return PASSED;
}

// ---- the suite ----------------------------------------------------------------------------------

const struct test files_tests[] = {
    {"safetensors_round_trip", test_safetensors_round_trip},
    {"safetensors_conversions", test_safetensors_conversions},
    {"safetensors_cut", test_safetensors_cut},
    {"safetensors_hostile", test_safetensors_hostile},
    {"safetensors_costs", test_safetensors_costs},
    {"safetensors_misuse", test_safetensors_misuse},
    {"full_disk", test_full_disk},
    {"device_for_file", test_really_full_device},
    {"killed_writer", test_killed_writer},
    {0},
};
