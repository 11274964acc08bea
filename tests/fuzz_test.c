// The fuzzers' corpora (tests/fuzz/corpus/NAME: small good files, and every case that once was a
// finding) through their targets, as they are and cut short. tests/fuzz/run.sh looks for new ones.
#include "tests/test.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "model/image.h"
#include "tests/fuzz/targets.h"

enum { CASE_MAX = 1 << 16 };

static int replay_file(const char *path, int (*target)(const uint8_t *, size_t))
{
    uint8_t *data = malloc(CASE_MAX);
    FILE *f = fopen(path, "rb");
    CHECK(f && data, "%s: cannot be opened", path);
    const size_t n = fread(data, 1, CASE_MAX, f);
    fclose(f);
    CHECK(n < CASE_MAX, "%s: a case of %d bytes and more is too large to keep", path, CASE_MAX);
    uint8_t *exact = malloc(n + 1); // a read beyond it is seen by the sanitizer
    memcpy(exact, data, n);
    target(exact, n);
    free(exact);
    for (int i = 1; i <= 8; i++) {
        const size_t cut = n * (size_t)i / 9;
        exact = malloc(cut + 1);
        memcpy(exact, data, cut);
        target(exact, cut);
        free(exact);
    }
    free(data);
    return PASSED;
}

static int replay(const char *name, int (*target)(const uint8_t *, size_t))
{
    char directory[512], path[1024];
    int cases = 0;
    snprintf(directory, sizeof directory, "%s/fuzz/corpus/%s", TEST_DATA, name);
    DIR *d = opendir(directory);
    CHECK(d, "%s: no corpus", directory);
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", directory, e->d_name);
        CHECK(replay_file(path, target) == PASSED, "%s", path);
        cases++;
    }
    closedir(d);
    CHECK(cases > 0, "%s: no cases", directory);
    return PASSED;
}

// What was a finding: a header of many pixels with no picture behind it is refused before there
// is memory for them.
static int large_header(void)
{
    static uint8_t png[] = "\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x27\x10\0\0\x27\x10\x08\2\0\0\0";
    uint8_t data[4096];
    struct image image;
    char path[512];
    snprintf(path, sizeof path, "%s/fuzz/corpus/jpeg/large-header", TEST_DATA);
    FILE *f = fopen(path, "rb");
    CHECK(f, "%s: cannot be opened", path);
    const size_t n = fread(data, 1, sizeof data, f);
    fclose(f);
    CHECK(image_decode(data, n, "jpeg", 0, &image) == ERR_INPUT &&
              strstr(error_message(), "cut short"),
          "%s", error_message());
    memcpy(data, png, 29);
    const uint32_t crc = (uint32_t)crc32(0, png + 12, 17);
    for (int i = 0; i < 4; i++)
        data[29 + i] = (uint8_t)(crc >> (24 - 8 * i));
    static const uint8_t body[] = "\0\0\0\1IDAT\x78\x33\x05\x7c\xd1";
    memcpy(data + 33, body, sizeof body - 1);
    CHECK(image_decode(data, 33 + sizeof body - 1, "png", 0, &image) == ERR_INPUT &&
              strstr(error_message(), "cut short"),
          "%s", error_message());
    return PASSED;
}

#define X(name)                            \
    static int replay_##name(void)         \
    {                                      \
        return replay(#name, fuzz_##name); \
    }
FUZZ_TARGETS(X)
#undef X

#define X(name) {#name, replay_##name},
const struct test fuzz_tests[] = {FUZZ_TARGETS(X){"large_header", large_header}, {0}};
#undef X
