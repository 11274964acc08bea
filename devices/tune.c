// Choices are one JSON object a device: {"identity": "...", "choices": {key: {"best": 1,
// "seconds": [..., null, ...]}}}; null is a candidate that could not be used. The file is read once
// for each device and written after each new choice, joined with what another process stored since.
#include "devices/tune.h"

#include "devices/cache.h"
#include "devices/hash.h"
#include "devices/kernels.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CANDIDATES_MAX = 32, ROUNDS = 5, REPEATS_MAX = 1000 };
static const double ROUND_SECONDS = 3e-3; // long against the clock and a launch, short for the user

// What is known of one kind of device; never freed, there is one for each device of the process.
struct table {
    char identity[640];
    char file[32];
    json_t *choices;
    struct table *next;
};
static struct table *tables;

// ---- the file ----------------------------------------------------------------------------------

// The choices of the device's file, a new reference; NULL if it is missing, corrupt or another's.
static json_t *load_choices(const struct table *t)
{
    size_t size = 0;
    unsigned char *text = cache_read(t->file, &size);
    json_t *root = text ? json_loadb((const char *)text, size, 0, NULL) : NULL;
    const char *identity = json_string_value(json_object_get(root, "identity"));
    json_t *choices = json_object_get(root, "choices");
    bool good = identity && !strcmp(identity, t->identity) && json_is_object(choices);
    json_t *result = good ? json_incref(choices) : NULL;
    json_decref(root);
    free(text);
    return result;
}

static void save_choices(const struct table *t)
{
    json_t *stored = load_choices(t);
    if (stored)
        json_object_update_missing(t->choices, stored);
    json_decref(stored);
    json_t *root = json_pack("{s:s, s:O}", "identity", t->identity, "choices", t->choices);
    char *text =
        root ? json_dumps(root, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(4)) : NULL;
    if (text)
        cache_write(t->file, text, strlen(text));
    free(text);
    json_decref(root);
}

static uint64_t kernels_hash(void)
{
    static uint64_t hash;
    if (!hash)
        hash = hash_bytes(HASH_START, kernels_cl, kernels_cl_size);
    return hash;
}

static struct table *table_of(const struct device_info *info)
{
    char identity[sizeof tables->identity];
    snprintf(identity, sizeof identity, "%s, %s, %s, driver %s, %d units, kernels %016llx",
             info->platform, info->vendor, info->name, info->driver, info->compute_units,
             (unsigned long long)kernels_hash());
    for (struct table *t = tables; t; t = t->next)
        if (!strcmp(t->identity, identity))
            return t;
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    strcpy(t->identity, identity);
    snprintf(t->file, sizeof t->file, "tune-%016llx.json",
             (unsigned long long)hash_bytes(HASH_START, identity, strlen(identity)));
    t->choices = load_choices(t);
    if (!t->choices)
        t->choices = json_object();
    t->next = tables;
    tables = t;
    return t;
}

// ---- measuring ---------------------------------------------------------------------------------

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// One run to compile and warm up, one to learn how many repeats fill a round; 0: cannot be used.
static int calibrate(tune_run *run, void *user, int candidate, int *repeats)
{
    *repeats = 0;
    TRY(run(user, candidate, 1));
    double from = seconds_now();
    TRY(run(user, candidate, 1));
    double once = seconds_now() - from, wanted = ceil(ROUND_SECONDS / fmax(once, 1e-9));
    *repeats = wanted < 1 ? 1 : wanted > REPEATS_MAX ? REPEATS_MAX : (int)wanted;
    return 0;
}

// Fills seconds[count] with medians, NaN for what failed. Rounds of all candidates are interleaved,
// so that a slow moment of the machine hits all alike. Returns the fastest or the last failure.
static int measure(tune_run *run, void *user, int count, double *seconds)
{
    double samples[CANDIDATES_MAX][ROUNDS];
    int repeats[CANDIDATES_MAX], code = ERR_INPUT, best = -1;
    for (int i = 0; i < count; i++) {
        int result = calibrate(run, user, i, &repeats[i]);
        if (result < 0)
            code = result;
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < count; i++) {
            if (!repeats[i])
                continue;
            double from = seconds_now();
            int result = run(user, i, repeats[i]);
            samples[i][round] = (seconds_now() - from) / repeats[i];
            if (result < 0) {
                code = result;
                repeats[i] = 0;
            }
        }
    }
    for (int i = 0; i < count; i++) {
        seconds[i] = NAN;
        if (!repeats[i])
            continue;
        qsort(samples[i], ROUNDS, sizeof samples[i][0], compare);
        seconds[i] = samples[i][ROUNDS / 2];
        if (best < 0 || seconds[i] < seconds[best])
            best = i;
    }
    return best >= 0 ? best : code;
}

// ---- choosing ----------------------------------------------------------------------------------

// The remembered choice, or -1. One made among another number of candidates does not count.
static int recall(const struct table *t, const char *key, int count)
{
    json_t *entry = json_object_get(t->choices, key), *best = json_object_get(entry, "best");
    json_int_t index = json_integer_value(best);
    if (!json_is_integer(best) || index < 0 || index >= count)
        return -1;
    return json_array_size(json_object_get(entry, "seconds")) == (size_t)count ? (int)index : -1;
}

static void remember(struct table *t, const char *key, int best, const double *seconds, int count)
{
    json_t *list = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(list, isnan(seconds[i]) ? json_null() : json_real(seconds[i]));
    json_t *entry = json_pack("{s:i, s:o}", "best", best, "seconds", list);
    if (entry && json_object_set_new(t->choices, key, entry) == 0)
        save_choices(t);
}

int tune_choose(struct device *dev, const char *key, int count, tune_run *run, void *user)
{
    const char *wish = getenv("DITMOE_TUNE");
    double seconds[CANDIDATES_MAX];
    BUG_IF(count < 1 || count > CANDIDATES_MAX);
    if (count == 1 || (wish && !strcmp(wish, "0")))
        return 0;
    struct table *t = table_of(&dev->info);
    int best = t ? recall(t, key, count) : -1;
    if (best >= 0)
        return best;
    best = measure(run, user, count, seconds);
    if (best >= 0 && t)
        remember(t, key, best, seconds, count);
    return best;
}
