// Opening a dataset of either kind, and the order of its images; see data.h.
#include "model/data.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "devices/hash.h"
#include "model/data_kinds.h"
#include "model/latents.h"
#include "runtime/rng.h"

// ---- open, close --------------------------------------------------------------------------------

static int open_either(struct dataset *d, enum data_split split)
{
    struct stat s;
    if (stat(d->path, &s) < 0)
        return fail(
            ERR_IO,
            "%s: no dataset: %s; give a directory with MNIST's IDX files or a folder of class "
            "folders",
            d->path, strerror(errno));
    if (!S_ISDIR(s.st_mode))
        return fail(ERR_INPUT,
                    "%s: no dataset: not a directory; give one with MNIST's IDX files, of class "
                    "folders, or of latents",
                    d->path);
    const bool latents = latents_present(d->path);
    if (!latents && d->channels != 0 && d->channels != 1 && d->channels != 3)
        return fail(ERR_INPUT, "%s: %d channels: images have 1 or 3", d->path, d->channels);
    if (idx_present(d->path))
        return idx_open(d, split);
    if (split == DATA_TEST)
        return fail(ERR_INPUT, "%s: has no test split; MNIST's IDX files have", d->path);
    if (latents)
        return latents_dataset(d);
    return folder_open(d);
}

int data_open_split(const char *path, enum data_split split, int size, int channels,
                    struct dataset **out)
{
    *out = NULL;
    if (size < 0 || size > 4096)
        return fail(ERR_INPUT, "image size %d: must be 1 to 4096", size);
    struct dataset *d = calloc(1, sizeof *d);
    if (!d || !(d->path = strdup(path))) {
        free(d);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    d->size = size;
    d->channels = channels;
    int code = open_either(d, split);
    if (code < 0) {
        data_close(d);
        return code;
    }
    *out = d;
    return 0;
}

int data_open(const char *path, int size, int channels, struct dataset **out)
{
    return data_open_split(path, DATA_TRAIN, size, channels, out);
}

void data_close(struct dataset *d)
{
    if (!d)
        return;
    for (int c = 0; c < d->classes; c++)
        free(d->class_names[c]);
    for (int64_t i = 0; d->files && i < d->count; i++)
        free(d->files[i].name);
    latents_close(d->latents);
    free(d->class_names);
    free(d->files);
    free(d->labels8);
    free(d->pixels8);
    free(d->path);
    free(d);
}

// ---- images -------------------------------------------------------------------------------------

int data_label(const struct dataset *d, int64_t i)
{
    BUG_IF(i < 0 || i >= d->count);
    if (d->latents)
        return latents_label(d->latents, i);
    return d->files ? d->files[i].label : d->labels8[i];
}

int data_image(const struct dataset *d, int64_t i, bool flip, float *out)
{
    BUG_IF(i < 0 || i >= d->count);
    if (d->latents)
        return latents_sample(d->latents, i, flip, NULL, out);
    if (d->files)
        return folder_image(d, i, flip, out);
    idx_image(d, i, flip, out);
    return 0;
}

int data_sample(const struct dataset *d, int64_t i, bool flip, uint64_t seed, uint64_t position,
                float *out)
{
    const size_t count = (size_t)d->channels * (size_t)d->size * (size_t)d->size;
    if (!d->latents)
        return data_image(d, i, flip, out);
    float *noise = malloc(count * sizeof *noise);
    if (!noise)
        return fail(ERR_NOMEM, "%s: out of memory", d->path);
    rng_normal_fill(seed, rng_stream(RNG_LATENT, position), 0, noise, count);
    const int code = latents_sample(d->latents, i, flip, noise, out);
    free(noise);
    return code;
}

void data_identity(const struct dataset *d, char out[17])
{
    uint64_t hash = hash_bytes(HASH_START, &d->count, sizeof d->count);
    for (int c = 0; d->class_names && c < d->classes; c++)
        hash = hash_bytes(hash, d->class_names[c], strlen(d->class_names[c]) + 1);
    for (int64_t i = 0; i < d->count; i++) {
        const int label = data_label(d, i);
        hash = hash_bytes(hash, &label, sizeof label);
        if (d->files)
            hash = hash_bytes(hash, d->files[i].name, strlen(d->files[i].name) + 1);
    }
    snprintf(out, 17, "%016llx", (unsigned long long)hash);
}

// ---- order --------------------------------------------------------------------------------------

// A balanced Feistel network with Philox as its round function permutes [0, 4^half), the smallest
// such range that holds `count`; walking its cycles until the value is below `count` permutes [0,
// count) (Black and Rogaway 2002). So an epoch's order needs no table, any position is found at
// once, and every thread finds the same.
static uint64_t feistel(uint64_t x, int half, uint64_t seed, uint64_t stream)
{
    enum { ROUNDS = 8 };
    uint64_t mask = ((uint64_t)1 << half) - 1, left = x >> half, right = x & mask;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint32_t word[4];
        rng_philox(seed, stream, round << 32 | right, word);
        uint64_t next = left ^ (word[0] & mask);
        left = right;
        right = next;
    }
    return left << half | right;
}

int64_t data_order(int64_t count, uint64_t seed, uint64_t position)
{
    BUG_IF(count < 1 || count > (int64_t)1 << 62);
    uint64_t n = (uint64_t)count, x = position % n;
    uint64_t stream = rng_stream(RNG_SHUFFLE, position / n);
    int half = 1;
    while ((uint64_t)1 << 2 * half < n)
        half++;
    do
        x = feistel(x, half, seed, stream);
    while (x >= n);
    return (int64_t)x;
}
