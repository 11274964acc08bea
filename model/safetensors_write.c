// Writing safetensors; see safetensors.h.
#include "model/safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "model/atomic_file.h"

struct safetensors_writer {
    struct atomic_file *file;
    char *path;
    json_t *header;
    json_t *metadata;
    uint64_t declared, written; // bytes of data
    bool begun;
};

int safetensors_create(const char *path, struct safetensors_writer **out)
{
    *out = NULL;
    struct safetensors_writer *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    w->path = strdup(path);
    w->header = json_object();
    w->metadata = json_object();
    int code = w->path && w->header && w->metadata ? atomic_file_create(path, &w->file)
                                                   : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    *out = w;
    return 0;
}

static int refuse(const struct safetensors_writer *w, const char *name, const char *what)
{
    return fail(ERR_INPUT, "%s: tensor '%s': %s", w->path, name, what);
}

int safetensors_declare(struct safetensors_writer *w, const char *name, enum st_dtype dtype,
                        int ndim, const int64_t *shape)
{
    BUG_IF(w->begun || ndim < 0 || ndim > ST_DIMS);
    if (!*name || !strcmp(name, "__metadata__") || json_object_get(w->header, name))
        return refuse(w, name, "cannot be declared: empty, reserved or declared before");
    json_t *lengths = json_array();
    int64_t bytes = (int64_t)st_dtype_size(dtype), end;
    bool overflow = false;
    for (int i = 0; i < ndim; i++) {
        overflow |= shape[i] < 0 || __builtin_mul_overflow(bytes, shape[i], &bytes);
        json_array_append_new(lengths, json_integer(shape[i]));
    }
    if (overflow || __builtin_add_overflow((int64_t)w->declared, bytes, &end)) {
        json_decref(lengths);
        return refuse(w, name, "its shape is negative or too large");
    }
    json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", st_dtype_name(dtype), "shape",
                              lengths, "data_offsets", (json_int_t)w->declared, (json_int_t)end);
    if (json_object_set_new(w->header, name, entry) < 0)
        return refuse(w, name, "its name is not UTF-8, or memory is short");
    w->declared = (uint64_t)end;
    return 0;
}

int safetensors_set_metadata(struct safetensors_writer *w, const char *key, const char *value)
{
    BUG_IF(w->begun);
    if (json_object_set_new(w->metadata, key, json_string(value)) < 0)
        return fail(ERR_INPUT, "%s: metadata '%s' is not UTF-8, or memory is short", w->path, key);
    return 0;
}

// The header is padded with spaces so that the data, and so every f32 tensor, starts aligned.
static int write_header(struct safetensors_writer *w, const char *text)
{
    static const char spaces[8] = "        ";
    size_t length = strlen(text), padded = (length + 7) & ~(size_t)7;
    uint8_t size[8];
    for (int i = 0; i < 8; i++)
        size[i] = (uint8_t)((uint64_t)padded >> 8 * i);
    TRY(atomic_file_write(w->file, size, sizeof size));
    TRY(atomic_file_write(w->file, text, length));
    return atomic_file_write(w->file, spaces, padded - length);
}

int safetensors_begin(struct safetensors_writer *w)
{
    BUG_IF(w->begun);
    w->begun = true;
    if (json_object_size(w->metadata))
        json_object_set(w->header, "__metadata__", w->metadata);
    char *text = json_dumps(w->header, JSON_COMPACT);
    if (!text)
        return fail(ERR_NOMEM, "%s: out of memory", w->path);
    int code = write_header(w, text);
    free(text);
    return code;
}

int safetensors_write(struct safetensors_writer *w, const void *data, size_t bytes)
{
    BUG_IF(!w->begun);
    if (bytes > w->declared - w->written)
        return fail(ERR_INPUT, "%s: more data than the declared %llu bytes", w->path,
                    (unsigned long long)w->declared);
    w->written += bytes;
    return atomic_file_write(w->file, data, bytes);
}

static void release(struct safetensors_writer *w)
{
    json_decref(w->header);
    json_decref(w->metadata);
    free(w->path);
    free(w);
}

static uint16_t bf16_of(float value)
{
    uint32_t u;
    memcpy(&u, &value, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Adding 2^k, where k puts the last bit of f16 at the last of f32, rounds to it.
static uint16_t f16_of(float value)
{
    uint32_t u;
    memcpy(&u, &value, sizeof u);
    const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00); // NaN
    if (magnitude == 0x7f800000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude >= 0x477ff000)
        return (uint16_t)(sign | 0x7bff);
    if (magnitude >= 0x38800000) // normal
        return (uint16_t)(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
    float f, half = 0.5f;
    memcpy(&f, &magnitude, sizeof f);
    f += half; // 0.5 has its last bit at 2^-24, as f16's smallest numbers
    memcpy(&u, &f, sizeof u);
    return (uint16_t)(sign | (u - 0x3f000000));
}

int safetensors_write_as(struct safetensors_writer *w, enum st_dtype dtype, const float *values,
                         int64_t count)
{
    enum { PIECE = 4096 };
    uint16_t piece[PIECE];
    BUG_IF(dtype != ST_F32 && dtype != ST_F16 && dtype != ST_BF16);
    if (dtype == ST_F32)
        return safetensors_write(w, values, (size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i += PIECE) {
        const int64_t n = count - i < PIECE ? count - i : PIECE;
        for (int64_t k = 0; k < n; k++)
            piece[k] = dtype == ST_F16 ? f16_of(values[i + k]) : bf16_of(values[i + k]);
        TRY(safetensors_write(w, piece, (size_t)n * sizeof *piece));
    }
    return 0;
}

int safetensors_commit(struct safetensors_writer *w)
{
    BUG_IF(!w->begun);
    if (w->written != w->declared) {
        int code = fail(ERR_INPUT, "%s: %llu bytes of data written, but %llu declared", w->path,
                        (unsigned long long)w->written, (unsigned long long)w->declared);
        safetensors_abort(w);
        return code;
    }
    int code = atomic_file_commit(w->file);
    release(w);
    return code;
}

void safetensors_abort(struct safetensors_writer *w)
{
    if (!w)
        return;
    atomic_file_abort(w->file);
    release(w);
}
