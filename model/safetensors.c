// Reading safetensors; see safetensors.h. The writer is safetensors_write.c.
#include "model/safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model/mapped_file.h"
#include "model/safetensors_internal.h"

enum { HEADER_MAX = 100000000 };

// ---- messages -----------------------------------------------------------------------------------

static int bad_file(const struct safetensors *s, const char *what)
{
    return fail(ERR_INPUT, "%s: not a whole safetensors file: %s", s->path, what);
}

// ---- the header ---------------------------------------------------------------------------------

static int parse_dtype(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    if (!name)
        return st_bad_tensor(s, t->name, "has no dtype");
    for (int i = 0; i < ST_DTYPES; i++) {
        if (!strcmp(name, st_dtype_name((enum st_dtype)i))) {
            t->dtype = (enum st_dtype)i;
            return 0;
        }
    }
    return fail(ERR_INPUT, "%s: tensor '%s': dtype '%s' is not supported", s->path,
                st_shown(t->name).text, st_shown(name).text);
}

// The product of the shape must fit, even where a later dimension is zero.
static int parse_shape(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape))
        return st_bad_tensor(s, t->name, "has no shape");
    if (json_array_size(shape) > ST_DIMS)
        return st_bad_tensor(s, t->name, "has more than 8 dimensions");
    t->ndim = (int)json_array_size(shape);
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        const json_t *length = json_array_get(shape, (size_t)i);
        if (!json_is_integer(length) || json_integer_value(length) < 0)
            return st_bad_tensor(s, t->name, "its shape is not a list of lengths");
        t->shape[i] = json_integer_value(length);
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count))
            return st_bad_tensor(s, t->name, "its shape is too large");
    }
    if (__builtin_mul_overflow((uint64_t)t->count, st_dtype_size(t->dtype), &t->bytes))
        return st_bad_tensor(s, t->name, "its shape is too large");
    return 0;
}

static int parse_range(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *range = json_object_get(entry, "data_offsets");
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return st_bad_tensor(s, t->name, "has no data_offsets [begin, end]");
    json_int_t from = json_integer_value(begin), to = json_integer_value(end);
    if (from < 0 || to < from)
        return st_bad_tensor(s, t->name, "its data_offsets are no range");
    if ((uint64_t)to > s->data_size)
        return fail(ERR_INPUT,
                    "%s: tensor '%s': its data ends at byte %lld of %llu: the file is cut short",
                    s->path, st_shown(t->name).text, (long long)to, (unsigned long long)s->data_size);
    if ((uint64_t)(to - from) != t->bytes)
        return fail(ERR_INPUT, "%s: tensor '%s': %lld bytes of data, but its shape needs %llu",
                    s->path, st_shown(t->name).text, (long long)(to - from),
                    (unsigned long long)t->bytes);
    t->offset = (uint64_t)from;
    t->data = s->data + from;
    return 0;
}

static int parse_metadata(const struct safetensors *s, const json_t *metadata)
{
    if (!json_is_object(metadata))
        return bad_file(s, "__metadata__ is not an object");
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)metadata, key, value) if (!json_is_string(value)) return bad_file(
        s, "__metadata__ holds something other than strings");
    return 0;
}

static int parse_tensors(struct safetensors *s)
{
    s->tensors = calloc(json_object_size(s->header) + 1, sizeof *s->tensors);
    if (!s->tensors)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    const char *name;
    json_t *entry;
    json_object_foreach(s->header, name, entry)
    {
        if (!strcmp(name, "__metadata__")) {
            TRY(parse_metadata(s, entry));
            continue;
        }
        struct st_tensor *t = &s->tensors[s->count];
        t->name = name;
        if (!json_is_object(entry))
            return st_bad_tensor(s, name, "is not described by an object");
        TRY(parse_dtype(s, entry, t));
        TRY(parse_shape(s, entry, t));
        TRY(parse_range(s, entry, t));
        s->count++;
    }
    return 0;
}

// The tensors must cover the data, each byte once: the format allows neither holes nor overlaps.
static int check_cover(const struct safetensors *s)
{
    uint64_t end = 0;
    for (int i = 0; i < s->count; i++) {
        const struct st_tensor *t = &s->tensors[i];
        if (t->offset != end)
            return st_bad_tensor(s, t->name,
                              t->offset < end ? "its data overlaps that of another tensor"
                                              : "there is a hole in the file before its data");
        end += t->bytes;
    }
    if (end != s->data_size)
        return fail(ERR_INPUT, "%s: %llu bytes after the last tensor '%s' belong to none", s->path,
                    (unsigned long long)(s->data_size - end),
                    s->count ? st_shown(s->tensors[s->count - 1].name).text : "");
    return 0;
}

static int index_tensors(struct safetensors *s)
{
    qsort(s->tensors, (size_t)s->count, sizeof *s->tensors, st_by_offset);
    TRY(check_cover(s));
    return st_index_names(s);
}

static int parse_header(struct safetensors *s)
{
    if (s->size < 8)
        return bad_file(s, "shorter than 8 bytes");
    uint64_t length = 0;
    for (int i = 0; i < 8; i++)
        length |= (uint64_t)s->map[i] << 8 * i;
    if (length > HEADER_MAX)
        return bad_file(s, "its header would be longer than 100 MB");
    if (length > s->size - 8)
        return bad_file(s, "it ends within the header");
    const char *text = (const char *)s->map + 8;
    if (length < 2 || text[0] != '{')
        return bad_file(s, "its header is not a JSON object");
    json_error_t error;
    s->header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &error);
    if (!s->header)
        return fail(ERR_INPUT, "%s: not a whole safetensors file: header byte %d: %s", s->path,
                    error.position, st_shown(error.text).text);
    s->data = s->map + 8 + length;
    s->data_size = s->size - 8 - length;
    TRY(parse_tensors(s));
    return index_tensors(s);
}

// ---- open, close --------------------------------------------------------------------------------

static int open_file(struct safetensors *s)
{
    struct mapped_file file;
    int code = mapped_file_open(s->path, &file);
    if (code < 0)
        return code == ERR_INPUT ? fail_in(code, "%s: not a whole safetensors file", s->path)
                                 : fail_in(code, "%s", s->path);
    s->map = file.data;
    s->size = file.size;
    return parse_header(s);
}

int safetensors_open(const char *path, struct safetensors **out)
{
    *out = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s || !(s->path = strdup(path))) {
        free(s);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    int code = open_file(s);
    if (code < 0) {
        safetensors_close(s);
        return code;
    }
    *out = s;
    return 0;
}

