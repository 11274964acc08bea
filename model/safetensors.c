// Reading safetensors; see safetensors.h. The writer is safetensors_write.c.
#include "model/safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model/mapped_file.h"

enum { HEADER_MAX = 100000000 };

struct safetensors {
    char *path;
    const uint8_t *map; // the whole file
    size_t size;
    const uint8_t *data;
    uint64_t data_size;
    json_t *header;                   // owns the tensors' names and the metadata
    struct st_tensor *tensors;        // [count], by offset
    const struct st_tensor **by_name; // [count]
    int count;
    char *names; // adopted
};

// ---- types --------------------------------------------------------------------------------------

static const struct {
    const char *name;
    size_t size;
} dtypes[ST_DTYPES] = {
#define X(name, size) {#name, size},
    ST_DTYPE_LIST(X)
#undef X
};

size_t st_dtype_size(enum st_dtype dtype)
{
    return dtypes[dtype].size;
}

const char *st_dtype_name(enum st_dtype dtype)
{
    return dtypes[dtype].name;
}

// ---- messages -----------------------------------------------------------------------------------

// Names come from the file: kept short and free of control characters, so that a message stays a
// line.
struct shown {
    char text[96];
};

static struct shown shown(const char *name)
{
    struct shown s;
    size_t n = 0;
    for (; name[n] && n < sizeof s.text - 4; n++)
        s.text[n] = (unsigned char)name[n] < 32 || name[n] == 127 ? '?' : name[n];
    strcpy(s.text + n, name[n] ? "..." : "");
    return s;
}

static int bad_file(const struct safetensors *s, const char *what)
{
    return fail(ERR_INPUT, "%s: not a whole safetensors file: %s", s->path, what);
}

static int bad_tensor(const struct safetensors *s, const char *name, const char *what)
{
    return fail(ERR_INPUT, "%s: tensor '%s': %s", s->path, shown(name).text, what);
}

// ---- the header ---------------------------------------------------------------------------------

static int parse_dtype(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    if (!name)
        return bad_tensor(s, t->name, "has no dtype");
    for (int i = 0; i < ST_DTYPES; i++) {
        if (!strcmp(name, dtypes[i].name)) {
            t->dtype = (enum st_dtype)i;
            return 0;
        }
    }
    return fail(ERR_INPUT, "%s: tensor '%s': dtype '%s' is not supported", s->path,
                shown(t->name).text, shown(name).text);
}

// The product of the shape must fit, even where a later dimension is zero.
static int parse_shape(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape))
        return bad_tensor(s, t->name, "has no shape");
    if (json_array_size(shape) > ST_DIMS)
        return bad_tensor(s, t->name, "has more than 8 dimensions");
    t->ndim = (int)json_array_size(shape);
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        const json_t *length = json_array_get(shape, (size_t)i);
        if (!json_is_integer(length) || json_integer_value(length) < 0)
            return bad_tensor(s, t->name, "its shape is not a list of lengths");
        t->shape[i] = json_integer_value(length);
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count))
            return bad_tensor(s, t->name, "its shape is too large");
    }
    if (__builtin_mul_overflow((uint64_t)t->count, st_dtype_size(t->dtype), &t->bytes))
        return bad_tensor(s, t->name, "its shape is too large");
    return 0;
}

static int parse_range(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *range = json_object_get(entry, "data_offsets");
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return bad_tensor(s, t->name, "has no data_offsets [begin, end]");
    json_int_t from = json_integer_value(begin), to = json_integer_value(end);
    if (from < 0 || to < from)
        return bad_tensor(s, t->name, "its data_offsets are no range");
    if ((uint64_t)to > s->data_size)
        return fail(ERR_INPUT,
                    "%s: tensor '%s': its data ends at byte %lld of %llu: the file is cut short",
                    s->path, shown(t->name).text, (long long)to, (unsigned long long)s->data_size);
    if ((uint64_t)(to - from) != t->bytes)
        return fail(ERR_INPUT, "%s: tensor '%s': %lld bytes of data, but its shape needs %llu",
                    s->path, shown(t->name).text, (long long)(to - from),
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
            return bad_tensor(s, name, "is not described by an object");
        TRY(parse_dtype(s, entry, t));
        TRY(parse_shape(s, entry, t));
        TRY(parse_range(s, entry, t));
        s->count++;
    }
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->bytes != y->bytes ? (x->bytes < y->bytes ? -1 : 1) : strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const struct st_tensor *const *)a)->name,
                  (*(const struct st_tensor *const *)b)->name);
}

// The tensors must cover the data, each byte once: the format allows neither holes nor overlaps.
static int check_cover(const struct safetensors *s)
{
    uint64_t end = 0;
    for (int i = 0; i < s->count; i++) {
        const struct st_tensor *t = &s->tensors[i];
        if (t->offset != end)
            return bad_tensor(s, t->name,
                              t->offset < end ? "its data overlaps that of another tensor"
                                              : "there is a hole in the file before its data");
        end += t->bytes;
    }
    if (end != s->data_size)
        return fail(ERR_INPUT, "%s: %llu bytes after the last tensor '%s' belong to none", s->path,
                    (unsigned long long)(s->data_size - end),
                    s->count ? shown(s->tensors[s->count - 1].name).text : "");
    return 0;
}

static int index_names(struct safetensors *s)
{
    s->by_name = calloc((size_t)s->count + 1, sizeof(void *));
    if (!s->by_name)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    for (int i = 0; i < s->count; i++)
        s->by_name[i] = &s->tensors[i];
    qsort(s->by_name, (size_t)s->count, sizeof(void *), by_name);
    return 0;
}

static int index_tensors(struct safetensors *s)
{
    qsort(s->tensors, (size_t)s->count, sizeof *s->tensors, by_offset);
    TRY(check_cover(s));
    return index_names(s);
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
                    error.position, shown(error.text).text);
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

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    json_decref(s->header);
    if (s->map)
        munmap((void *)s->map, s->size);
    free(s->tensors);
    free(s->by_name);
    free(s->path);
    free(s->names);
    free(s);
}

// ---- tensors of another reader ------------------------------------------------------------------

static int adopt(struct safetensors *s)
{
    qsort(s->tensors, (size_t)s->count, sizeof *s->tensors, by_offset);
    TRY(index_names(s));
    for (int i = 1; i < s->count; i++)
        if (!strcmp(s->by_name[i - 1]->name, s->by_name[i]->name))
            return bad_tensor(s, s->by_name[i]->name, "is there twice");
    return 0;
}

int safetensors_adopt(const char *path, const void *map, size_t size, struct st_tensor *tensors,
                      int count, char *names, struct safetensors **out)
{
    *out = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s) {
        munmap((void *)map, size);
        free(tensors), free(names);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    *s = (struct safetensors){.path = strdup(path),
                              .map = map,
                              .size = size,
                              .tensors = tensors,
                              .count = count,
                              .names = names};
    int code = s->path ? adopt(s) : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code < 0) {
        safetensors_close(s);
        return code;
    }
    *out = s;
    return 0;
}

// ---- access -------------------------------------------------------------------------------------

int safetensors_count(const struct safetensors *s)
{
    return s->count;
}

const struct st_tensor *safetensors_at(const struct safetensors *s, int i)
{
    BUG_IF(i < 0 || i >= s->count);
    return &s->tensors[i];
}

const char *safetensors_path(const struct safetensors *s)
{
    return s->path;
}

const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct st_tensor wanted = {.name = name};
    const struct st_tensor *key = &wanted;
    const struct st_tensor **found =
        bsearch(&key, s->by_name, (size_t)s->count, sizeof(void *), by_name);
    return found ? *found : NULL;
}

const char *safetensors_metadata(const struct safetensors *s, const char *key)
{
    return json_string_value(json_object_get(json_object_get(s->header, "__metadata__"), key));
}

static void format_shape(char *text, size_t size, int ndim, const int64_t *shape)
{
    size_t n = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim && n < size; i++)
        n += (size_t)snprintf(text + n, size - n, shape[i] < 0 ? "%s*" : "%s%lld", i ? "," : "",
                              (long long)shape[i]);
    if (n < size)
        snprintf(text + n, size - n, "]");
}

static bool shape_agrees(const struct st_tensor *t, int ndim, const int64_t *shape)
{
    if (ndim < 0)
        return true;
    for (int i = 0; i < ndim && i < t->ndim; i++)
        if (shape[i] >= 0 && shape[i] != t->shape[i])
            return false;
    return ndim == t->ndim;
}

int safetensors_expect(const struct safetensors *s, const char *name, int dtype, int ndim,
                       const int64_t *shape, const struct st_tensor **out)
{
    const struct st_tensor *t = safetensors_find(s, name);
    if (!t)
        return fail(ERR_INPUT, "%s: tensor '%s' is missing", s->path, shown(name).text);
    if (t->other)
        return fail(ERR_INPUT, "%s: tensor '%s': its type %s is not supported", s->path,
                    shown(name).text, t->other);
    if (dtype >= 0 && t->dtype != (enum st_dtype)dtype)
        return fail(ERR_INPUT, "%s: tensor '%s': dtype is %s, expected %s", s->path,
                    shown(name).text, st_dtype_name(t->dtype), st_dtype_name((enum st_dtype)dtype));
    if (!shape_agrees(t, ndim, shape)) {
        char is[192], expected[192];
        format_shape(is, sizeof is, t->ndim, t->shape);
        format_shape(expected, sizeof expected, ndim, shape);
        return fail(ERR_INPUT, "%s: tensor '%s': shape is %s, expected %s", s->path,
                    shown(name).text, is, expected);
    }
    *out = t;
    return 0;
}

// ---- conversion ---------------------------------------------------------------------------------

static float float_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float float_of_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (uint32_t)h >> 10 & 31,
             fraction = h & 0x3ffu;
    if (exponent == 31)
        return float_of_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent > 0)
        return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float magnitude = (float)fraction * 0x1p-24f; // subnormal
    return sign ? -magnitude : magnitude;
}

static int check_range(const struct safetensors *s, const struct st_tensor *t, int64_t first,
                       int64_t count)
{
    if (first < 0 || count < 0 || first > t->count || count > t->count - first)
        return fail(ERR_INPUT, "%s: tensor '%s': elements %lld + %lld are not within its %lld",
                    s->path, shown(t->name).text, (long long)first, (long long)count,
                    (long long)t->count);
    if (t->other)
        return fail(ERR_INPUT, "%s: tensor '%s': its type %s is not supported", s->path,
                    shown(t->name).text, t->other);
    return 0;
}

// The byte offset of element i, counted row-major.
static size_t strided_at(const struct st_tensor *t, int64_t i)
{
    int64_t at = 0;
    for (int k = t->ndim - 1; k >= 0; k--) {
        at += i % t->shape[k] * t->stride[k];
        i /= t->shape[k];
    }
    return (size_t)at * st_dtype_size(t->dtype);
}

// Elements [first, first+count) of a strided tensor, one after the other, for the caller to free.
static uint8_t *gather(const struct st_tensor *t, int64_t first, int64_t count)
{
    const size_t size = st_dtype_size(t->dtype);
    uint8_t *to = malloc((size_t)count * size + 1);
    for (int64_t i = 0; to && i < count; i++)
        memcpy(to + (size_t)i * size, (const uint8_t *)t->data + strided_at(t, first + i), size);
    return to;
}

// read() on a strided tensor: the same on a copy of the elements wanted.
static int read_gathered(const struct safetensors *s, const struct st_tensor *t, float *f,
                         int64_t *n, int64_t first, int64_t count)
{
    uint8_t *copy = gather(t, first, count);
    if (!copy)
        return fail(ERR_NOMEM, "%s: out of memory for tensor '%s'", s->path, shown(t->name).text);
    struct st_tensor plain = *t;
    plain.strided = false;
    plain.data = copy;
    plain.count = count;
    int code = f ? safetensors_read_f32(s, &plain, f, 0, count)
                 : safetensors_read_i64(s, &plain, n, 0, count);
    free(copy);
    return code;
}

#define CONVERT(TYPE, TO, EXPRESSION)                      \
    for (int64_t i = 0; i < count; i++) {                  \
        TYPE v;                                            \
        memcpy(&v, from + (size_t)i * sizeof v, sizeof v); \
        dst[i] = (TO)(EXPRESSION);                         \
    }                                                      \
    break

int safetensors_read_f32(const struct safetensors *s, const struct st_tensor *t, float *dst,
                         int64_t first, int64_t count)
{
    TRY(check_range(s, t, first, count));
    if (t->strided)
        return read_gathered(s, t, dst, NULL, first, count);
    const uint8_t *from = (const uint8_t *)t->data + (size_t)first * st_dtype_size(t->dtype);
    switch (t->dtype) {
    case ST_F32:
        if (count)
            memcpy(dst, from, (size_t)count * sizeof *dst);
        break;
    case ST_F16:
        CONVERT(uint16_t, float, float_of_half(v));
    case ST_BF16:
        CONVERT(uint16_t, float, float_of_bits((uint32_t)v << 16));
    case ST_F64:
        CONVERT(double, float, v);
    case ST_I32:
        CONVERT(int32_t, float, v);
    case ST_I64:
        CONVERT(int64_t, float, v);
    case ST_U8:
        CONVERT(uint8_t, float, v);
    case ST_DTYPES:
        BUG_IF(true);
    }
    return 0;
}

int safetensors_read_i64(const struct safetensors *s, const struct st_tensor *t, int64_t *dst,
                         int64_t first, int64_t count)
{
    TRY(check_range(s, t, first, count));
    if (t->strided)
        return read_gathered(s, t, NULL, dst, first, count);
    const uint8_t *from = (const uint8_t *)t->data + (size_t)first * st_dtype_size(t->dtype);
    switch (t->dtype) {
    case ST_I32:
        CONVERT(int32_t, int64_t, v);
    case ST_I64:
        CONVERT(int64_t, int64_t, v);
    case ST_U8:
        CONVERT(uint8_t, int64_t, v);
    default:
        return fail(ERR_INPUT, "%s: tensor '%s': dtype is %s, expected whole numbers", s->path,
                    shown(t->name).text, st_dtype_name(t->dtype));
    }
    return 0;
}
