// See targets.h. Readers take paths, so bytes go to a file in memory first.
#include "tests/fuzz/targets.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/checkpoint.h"
#include "model/data.h"
#include "model/image.h"
#include "model/npz.h"
#include "model/pickle.h"
#include "model/weights_file.h"

// ---- files --------------------------------------------------------------------------------------

static const char *directory(void)
{
    static char path[64];
    if (!path[0]) {
        snprintf(path, sizeof path, "/dev/shm/ditmoe-fuzz-XXXXXX");
        if (!mkdtemp(path)) {
            snprintf(path, sizeof path, "/tmp/ditmoe-fuzz-XXXXXX");
            if (!mkdtemp(path))
                abort();
        }
    }
    return path;
}

static void leave(void);

static const char *put(const char *name, const uint8_t *data, size_t size)
{
    static char path[160];
    static int registered;
    if (!registered++)
        atexit(leave);
    snprintf(path, sizeof path, "%s/%s", directory(), name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f))
        abort();
    return path;
}

static void leave(void)
{
    static const char *const names[] = {
        "file.pt",  "file.safetensors",        "file.index.json",
        "file.npz", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"};
    char path[160];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", directory(), names[i]);
        unlink(path);
    }
    rmdir(directory());
}

// ---- weights ------------------------------------------------------------------------------------

// Every element of every tensor, a piece at a time: what opens can be read.
static void read_tensors(const struct safetensors *s)
{
    static float numbers[4096];
    for (int i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        for (int64_t at = 0; at < t->count && !t->other; at += 4096) {
            const int64_t n = t->count - at < 4096 ? t->count - at : 4096;
            if (safetensors_read_f32(s, t, numbers, at, n) < 0)
                abort();
        }
        if (safetensors_find(s, t->name) != t)
            abort();
    }
}

static int open_weights(const char *path)
{
    struct safetensors *s;
    if (weights_file_open(path, &s) >= 0)
        read_tensors(s);
    else if (strchr(error_message(), '\n') || !error_message()[0])
        abort(); // a failure is one line
    safetensors_close(s);
    return 0;
}

int fuzz_torch(const uint8_t *data, size_t size)
{
    return open_weights(put("file.pt", data, size));
}

int fuzz_safetensors(const uint8_t *data, size_t size)
{
    return open_weights(put("file.safetensors", data, size));
}

int fuzz_index(const uint8_t *data, size_t size)
{
    return open_weights(put("file.index.json", data, size));
}

int fuzz_pickle(const uint8_t *data, size_t size)
{
    struct pickle *p;
    size_t used;
    if (pickle_read(data, size, &p, &used) >= 0) {
        if (used > size)
            abort();
        pickle_get(pickle_root(p), "model");
        pickle_free(p);
    }
    return 0;
}

// The bytes are the text of our metadata, the run's state and the configuration alike.
int fuzz_checkpoint(const uint8_t *data, size_t size)
{
    json_t *json = json_loadb((const char *)data, size, 0, NULL), *again;
    struct config c, d;
    if (json && config_from_json(json, &c) >= 0) {
        again = config_to_json(&c);
        if (config_from_json(again, &d) < 0 || !config_equal(&c, &d))
            abort();
        config_count(&c);
        json_decref(again);
    }
    json_decref(json);
    struct safetensors_writer *w;
    struct checkpoint file;
    char *text = malloc(size + 1), path[160];
    memcpy(text, data, size);
    text[size] = 0;
    snprintf(path, sizeof path, "%s", put("file.safetensors", (const uint8_t *)"", 0));
    if (safetensors_create(path, &w) < 0)
        abort();
    int code = safetensors_set_metadata(w, "ditmoe.config", text);
    if (code >= 0)
        code = safetensors_set_metadata(w, "ditmoe.train", text);
    if (code >= 0)
        code = safetensors_begin(w);
    if (code < 0)
        safetensors_abort(w);
    else if (safetensors_commit(w) >= 0 && checkpoint_open(path, NULL, &file) >= 0)
        checkpoint_close(&file);
    free(text);
    return 0;
}

// ---- arrays and images --------------------------------------------------------------------------

int fuzz_npz(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"arr_0", "arr_1", "mu", "sigma", "a"};
    struct npz *z;
    if (npz_open(put("file.npz", data, size), &z) < 0)
        return 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        static double numbers[512];
        struct npy_array array;
        struct npz_reader *r;
        if (!npz_has(z, names[i]) || npz_read_open(z, names[i], &array, &r) < 0)
            continue;
        for (int64_t at = 0; at < array.count; at += 512) {
            const int64_t n = array.count - at < 512 ? array.count - at : 512;
            if (npz_read(r, numbers, n) < 0)
                break;
        }
        npz_read_close(r);
    }
    npz_close(z);
    return 0;
}

static int decode(const uint8_t *data, size_t size)
{
    for (int channels = 0; channels <= 3; channels += 3) {
        struct image image = {0};
        if (image_decode(data, size, "image", channels, &image) >= 0) {
            uint64_t sum = 0;
            const size_t n = (size_t)image.width * (size_t)image.height * (size_t)image.channels;
            for (size_t i = 0; i < n; i++)
                sum += image.pixels[i];
            if (sum > 255 * (uint64_t)n)
                abort();
        }
        image_free(&image);
    }
    return 0;
}

int fuzz_png(const uint8_t *data, size_t size)
{
    return decode(data, size);
}

int fuzz_jpeg(const uint8_t *data, size_t size)
{
    return decode(data, size);
}

// One file of images and one of labels: two bytes say where the first ends.
int fuzz_idx(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t cut = ((size_t)data[0] << 8 | data[1]) % (size - 1);
    put("train-images-idx3-ubyte", data + 2, cut);
    put("train-labels-idx1-ubyte", data + 2 + cut, size - 2 - cut);
    struct dataset *d;
    if (data_open(directory(), 32, 1, &d) >= 0) {
        static float image[32 * 32];
        for (int64_t i = 0; i < d->count && i < 64; i++) {
            if (data_image(d, i, i & 1, image) < 0 || data_label(d, i) < 0 ||
                data_label(d, i) >= d->classes)
                abort();
        }
        data_close(d);
    }
    return 0;
}
