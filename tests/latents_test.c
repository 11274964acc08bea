// Sets of latents: what is written is read, by the loader too; what is not whole is refused.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/data.h"
#include "model/latents.h"
#include "model/safetensors.h"
#include "model/vae.h"
#include "runtime/rng.h"

enum { COUNT = 7, SHARD = 3, CHANNELS = 2, SIDE = 4, EACH = CHANNELS * SIDE * SIDE };

// Moments of image i (0) or its mirror image (1): means around i, log variances around -2.
static float moment(int64_t i, int flip, int k)
{
    return k < EACH ? (float)i + (float)flip * 0.25f + (float)k / 64 : -2 + (float)(k - EACH) / 32;
}

static struct latents_info set_info(bool f16)
{
    static char *names[] = {"cat", "dog"};
    return (struct latents_info){.count = COUNT,
                                 .shard = SHARD,
                                 .channels = CHANNELS,
                                 .side = SIDE,
                                 .image_size = 8 * SIDE,
                                 .classes = 2,
                                 .scale = 0.5f,
                                 .shift = 0.25f,
                                 .f16 = f16,
                                 .vae = "0123456789abcdef",
                                 .data = "fedcba9876543210",
                                 .vae_name = "vae",
                                 .data_path = "data",
                                 .class_names = names};
}

static int write_shard(const char *directory, const struct latents_info *info, int64_t shard)
{
    struct latents_writer *w;
    TRY(latents_writer_open(directory, info, shard, &w));
    for (int64_t i = shard * SHARD; i < (shard + 1) * SHARD && i < COUNT; i++) {
        float moments[4 * EACH];
        for (int k = 0; k < 4 * EACH; k++)
            moments[k] = moment(i, k / (2 * EACH), k % (2 * EACH));
        TRY(latents_writer_add(w, moments, (int)(i % 2)));
    }
    return latents_writer_close(w);
}

// A fresh directory, with the index and the first `shards` shards.
static const char *new_set(bool f16, int shards, bool complete)
{
    static char path[500];
    static int number;
    const struct latents_info info = set_info(f16);
    bool done;
    int lock;
    snprintf(path, sizeof path, "%s/latents-%d", test_directory(), number++);
    BUG_IF(latents_begin(path, &info, &done, &lock) < 0 || done);
    for (int s = 0; s < shards; s++)
        BUG_IF(write_shard(path, &info, s) < 0);
    BUG_IF(complete && latents_end(path, &info) < 0);
    close(lock);
    return path;
}

// ---- reading ------------------------------------------------------------------------------------

static int check_set(bool f16)
{
    struct latents *l;
    float out[EACH], noise[EACH];
    OK(latents_open(new_set(f16, 3, true), &l));
    CHECK(latents_info(l)->count == COUNT && latents_info(l)->f16 == f16 &&
              !strcmp(latents_info(l)->class_names[1], "dog"),
          "info");
    rng_normal_fill(1, 2, 0, noise, EACH);
    for (int64_t i = 0; i < COUNT; i++)
        for (int flip = 0; flip < 2; flip++) {
            CHECK(latents_label(l, i) == i % 2, "label of image %lld", (long long)i);
            OK(latents_sample(l, i, flip, NULL, out));
            for (int k = 0; k < EACH; k++)
                CHECK(out[k] == (moment(i, flip, k) - 0.25f) * 0.5f, "mean %d of image %lld", k,
                      (long long)i);
            OK(latents_sample(l, i, flip, noise, out));
            for (int k = 0; k < EACH; k++) {
                const double std = exp((double)moment(i, flip, EACH + k) / 2);
                const double want =
                    ((double)moment(i, flip, k) + std * (double)noise[k] - 0.25) * 0.5;
                CHECK(fabs((double)out[k] - want) < 1e-5, "sample %d of image %lld: %g for %g", k,
                      (long long)i, (double)out[k], want);
            }
        }
    latents_close(l);
    return PASSED;
}

static int test_round_trip(void)
{
    return check_set(false) || check_set(true) ? FAILED : PASSED;
}

// The loader's samples: another draw at each position, the same for the same position.
static int test_loader(void)
{
    struct dataset *d;
    struct loader *a, *b;
    struct batch first, second, again;
    float kept[COUNT * EACH], mean[EACH];
    OK(data_open(new_set(true, 3, true), 0, 0, &d));
    CHECK(d->count == COUNT && d->channels == CHANNELS && d->size == SIDE && d->classes == 2 &&
              !strcmp(d->class_names[0], "cat"),
          "dataset");
    OK(loader_start(d, COUNT, 5, 0, true, 3, &a));
    OK(loader_next(a, &first));
    memcpy(kept, first.images, sizeof kept);
    const int64_t index = first.index[2];
    OK(loader_next(a, &second));
    for (int i = 0; i < COUNT; i++) // the same image in the next epoch
        if (second.index[i] == index)
            CHECK(memcmp(second.images + i * EACH, kept + 2 * EACH, EACH * sizeof *kept),
                  "the same sample again");
    OK(loader_start(d, COUNT, 5, 0, true, 1, &b));
    OK(loader_next(b, &again));
    CHECK(!memcmp(again.images, kept, sizeof kept), "threads change samples");
    OK(data_image(d, index, false, mean));
    CHECK(mean[3] == (moment(index, 0, 3) - 0.25f) * 0.5f, "data_image is not the mean");
    loader_stop(a), loader_stop(b);
    data_close(d);
    return PASSED;
}

static int test_options(void)
{
    struct dataset *d;
    const char *path = new_set(true, 3, true);
    OK(data_open(path, SIDE, 0, &d));
    data_close(d);
    OK(data_open(path, 8 * SIDE, 0, &d)); // the images' size
    data_close(d);
    CHECK(data_open(path, 16, 0, &d) == ERR_INPUT && strstr(error_message(), "not 16"), "%s",
          error_message());
    CHECK(data_open(path, 0, 3, &d) == ERR_INPUT && strstr(error_message(), "2 channels"), "%s",
          error_message());
    CHECK(data_open_split(path, DATA_TEST, 0, 0, &d) == ERR_INPUT, "a test split");
    return PASSED;
}

// ---- going on -----------------------------------------------------------------------------------

static int test_going_on(void)
{
    struct latents_info info = set_info(true), other = info;
    struct latents *l;
    bool complete;
    int lock, second;
    char cut[600];
    const char *path = new_set(true, 2, false);
    CHECK(latents_open(path, &l) == ERR_INPUT && strstr(error_message(), "not complete"), "%s",
          error_message());
    snprintf(cut, sizeof cut, "%s/shard-00001.safetensors", path);
    CHECK(truncate(cut, 300) == 0, "truncate");
    OK(latents_begin(path, &info, &complete, &lock));
    CHECK(!complete && latents_has_shard(path, &info, 0) && !latents_has_shard(path, &info, 1) &&
              !latents_has_shard(path, &info, 2),
          "which shards are there");
    CHECK(latents_begin(path, &info, &complete, &second) == ERR_IO &&
              strstr(error_message(), "another program"),
          "two writers");
    OK(write_shard(path, &info, 1));
    OK(write_shard(path, &info, 2));
    OK(latents_end(path, &info));
    close(lock);
    OK(latents_open(path, &l));
    latents_close(l);
    OK(latents_begin(path, &info, &complete, &lock));
    CHECK(complete, "not complete");
    close(lock);
    strcpy(other.vae, "0");
    CHECK(latents_begin(path, &other, &complete, &lock) == ERR_INPUT &&
              strstr(error_message(), "another autoencoder"),
          "%s", error_message());
    other = info;
    other.count++;
    CHECK(latents_begin(path, &other, &complete, &lock) == ERR_INPUT, "other images");
    other = info;
    other.shard++;
    CHECK(latents_begin(path, &other, &complete, &lock) == ERR_INPUT, "another shard size");
    return PASSED;
}

// ---- what is damaged ----------------------------------------------------------------------------

static int put_index(const char *path, const char *text)
{
    char name[600];
    snprintf(name, sizeof name, "%s/latents.json", path);
    FILE *f = fopen(name, "w");
    return f && fputs(text, f) >= 0 && fclose(f) == 0 ? 0 : -1;
}

static int test_damaged(void)
{
    struct latents *l;
    char name[600], other[600];
    const char *path = new_set(true, 3, true);
    snprintf(name, sizeof name, "%s/shard-00002.safetensors", path);
    snprintf(other, sizeof other, "%s/shard-00000.safetensors", path);
    struct stat s;
    CHECK(stat(name, &s) == 0, "stat");
    for (off_t bytes = s.st_size - 1; bytes >= 0; bytes -= 37) {
        CHECK(truncate(name, bytes) == 0, "truncate");
        CHECK(latents_open(path, &l) < 0 && strstr(error_message(), "shard-00002"),
              "%lld bytes: %s", (long long)bytes, error_message());
    }
    CHECK(unlink(name) == 0 && latents_open(path, &l) == ERR_IO, "%s", error_message());
    CHECK(rename(other, name) == 0, "rename"); // 3 images where 1 is to be
    CHECK(latents_open(path, &l) < 0, "%s", error_message());
    static const char *const texts[] = {
        "", "{", "[]", "{\"format\": \"ditmoe latents\", \"version\": 1}",
        "{\"format\":\"ditmoe latents\",\"version\":1,\"complete\":true,\"images\":1e30}"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        CHECK(put_index(path, texts[i]) == 0, "put");
        CHECK(latents_open(path, &l) == ERR_INPUT && strstr(error_message(), "latents.json"), "%s",
              error_message());
    }
    return PASSED;
}

// An index that promises a trillion images in shards of one opens nothing and allocates little.
static int test_hostile_index(void)
{
    struct latents *l;
    const char *path = new_set(true, 3, true);
    const char *text =
        "{\"format\":\"ditmoe latents\",\"version\":1,\"complete\":true,\"images\":1000000000000,"
        "\"shard\":1,\"channels\":2,\"side\":4,\"image_size\":32,\"classes\":1000000,\"scale\":1,"
        "\"shift\":0,\"dtype\":\"F16\",\"vae\":{\"identity\":\"x\",\"name\":\"x\"},"
        "\"data\":{\"identity\":\"x\",\"path\":\"x\"},\"class_names\":null}";
    CHECK(put_index(path, text) == 0, "put");
    CHECK(latents_open(path, &l) == ERR_INPUT && strstr(error_message(), "shard-00000"), "%s",
          error_message());
    return PASSED;
}

// ---- numbers ------------------------------------------------------------------------------------

// f16 and bf16 in files: nearest, ties to even, and back.
static int test_rounding(void)
{
    static const struct {
        float value, f16, bf16;
    } rows[] = {
        {1, 1, 1},
        {-0.0f, -0.0f, -0.0f},
        {1 + 0x1p-11f, 1, 1},
        {1 + 0x1p-11f + 0x1p-20f, 1 + 0x1p-10f, 1},
        {1 + 0x3p-11f, 1 + 0x1p-9f, 1},
        {1 + 0x3p-8f, 1 + 0x3p-8f, 1 + 0x1p-6f},
        {65519, 65504, 65536},
        {1e6f, 65504, 999424},
        {-70000, -65504, -70144},
        {0x1p-14f, 0x1p-14f, 0x1p-14f},
        {0x1p-24f, 0x1p-24f, 0x1p-24f},
        {0x1p-25f, 0, 0x1p-25f},
        {0x1.8p-25f, 0x1p-24f, 0x1.8p-25f},
        {-0x3p-25f, -0x1p-23f, -0x3p-25f},
        {0x1.ff8p-15f, 0x1.ff8p-15f, 0x1p-14f},
        {INFINITY, INFINITY, INFINITY},
    };
    enum { ROWS = sizeof rows / sizeof rows[0] };
    char path[500];
    float values[ROWS], f16[ROWS], bf16[ROWS];
    struct safetensors_writer *w;
    struct safetensors *s;
    for (int i = 0; i < ROWS; i++)
        values[i] = rows[i].value;
    snprintf(path, sizeof path, "%s/rounding.safetensors", test_directory());
    OK(safetensors_create(path, &w));
    OK(safetensors_declare(w, "f16", ST_F16, 1, (int64_t[]){ROWS}));
    OK(safetensors_declare(w, "bf16", ST_BF16, 1, (int64_t[]){ROWS}));
    OK(safetensors_begin(w));
    OK(safetensors_write_as(w, ST_F16, values, ROWS));
    OK(safetensors_write_as(w, ST_BF16, values, ROWS));
    OK(safetensors_commit(w));
    OK(safetensors_open(path, &s));
    OK(safetensors_read_f32(s, safetensors_find(s, "f16"), f16, 0, ROWS));
    OK(safetensors_read_f32(s, safetensors_find(s, "bf16"), bf16, 0, ROWS));
    for (int i = 0; i < ROWS; i++) {
        CHECK(!memcmp(&f16[i], &rows[i].f16, 4), "%a as f16: %a", (double)values[i],
              (double)f16[i]);
        CHECK(!memcmp(&bf16[i], &rows[i].bf16, 4), "%a as bf16: %a", (double)values[i],
              (double)bf16[i]);
    }
    safetensors_close(s);
    return PASSED;
}

const struct test latents_tests[] = {
    {"round_trip", test_round_trip}, {"loader", test_loader},
    {"options", test_options},       {"going_on", test_going_on},
    {"damaged", test_damaged},       {"hostile_index", test_hostile_index},
    {"rounding", test_rounding},     {NULL, NULL},
};
