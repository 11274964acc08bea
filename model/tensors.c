// Tensors in files, whatever format they came from: finding them, reading their elements; see
// safetensors.h.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model/safetensors_internal.h"

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
struct st_shown st_shown(const char *name)
{
    struct st_shown s;
    size_t n = 0;
    for (; name[n] && n < sizeof s.text - 4; n++)
        s.text[n] = (unsigned char)name[n] < 32 || name[n] == 127 ? '?' : name[n];
    strcpy(s.text + n, name[n] ? "..." : "");
    return s;
}

int st_bad_tensor(const struct safetensors *s, const char *name, const char *what)
{
    return fail(ERR_INPUT, "%s: tensor '%s': %s", s->path, st_shown(name).text, what);
}

// ---- order --------------------------------------------------------------------------------------

int st_by_offset(const void *a, const void *b)
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

int st_index_names(struct safetensors *s)
{
    s->by_name = calloc((size_t)s->count + 1, sizeof(void *));
    if (!s->by_name)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    for (int i = 0; i < s->count; i++)
        s->by_name[i] = &s->tensors[i];
    qsort(s->by_name, (size_t)s->count, sizeof(void *), by_name);
    return 0;
}

// ---- tensors of other readers -------------------------------------------------------------------

static int index_adopted(struct safetensors *s)
{
    TRY(st_index_names(s));
    for (int i = 1; i < s->count; i++)
        if (!strcmp(s->by_name[i - 1]->name, s->by_name[i]->name))
            return st_bad_tensor(s, s->by_name[i]->name, "is there twice");
    return 0;
}

static int finish_adopted(struct safetensors *s, const char *path, const char *format,
                          struct safetensors **out)
{
    s->path = strdup(path);
    snprintf(s->format, sizeof s->format, "%s", format);
    int code = s->path ? index_adopted(s) : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code < 0)
        safetensors_close(s);
    else
        *out = s;
    return code;
}

int safetensors_adopt(const char *path, const char *format, const void *map, size_t size,
                      struct st_tensor *tensors, int count, char *names, struct safetensors **out)
{
    *out = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s) {
        munmap((void *)map, size);
        free(tensors), free(names);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    *s = (struct safetensors){
        .map = map, .size = size, .tensors = tensors, .count = count, .names = names};
    if (count)
        qsort(tensors, (size_t)count, sizeof *tensors, st_by_offset);
    return finish_adopted(s, path, format, out);
}

int safetensors_join(const char *path, const char *format, struct st_joined *joined,
                     struct safetensors **out)
{
    *out = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s) {
        st_files_close(&joined->files);
        free(joined->tensors), free(joined->names), free(joined->pieces);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    *s = (struct safetensors){.files = joined->files,
                              .tensors = joined->tensors,
                              .count = joined->count,
                              .names = joined->names,
                              .pieces = joined->pieces};
    *joined = (struct st_joined){0};
    return finish_adopted(s, path, format, out);
}

int st_set_metadata(struct safetensors *s, const char *key, const char *text, size_t length)
{
    if (!s->header && !(s->header = json_pack("{s:{}}", "__metadata__")))
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    json_t *value = json_stringn(text, length);
    if (value)
        json_object_set_new(json_object_get(s->header, "__metadata__"), key, value);
    return 0;
}

void st_files_close(struct st_files *f)
{
    for (int i = 0; i < f->count; i++)
        safetensors_close(f->list[i]);
    free(f->list);
    *f = (struct st_files){0};
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
    free(s->pieces);
    st_files_close(&s->files);
    free(s);
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

const char *safetensors_format(const struct safetensors *s)
{
    return s->format[0] ? s->format : "safetensors";
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
    const char *value =
        json_string_value(json_object_get(json_object_get(s->header, "__metadata__"), key));
    for (int i = 0; i < s->files.count && !value; i++)
        value = safetensors_metadata(s->files.list[i], key);
    return value;
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
        return fail(ERR_INPUT, "%s: tensor '%s' is missing", s->path, st_shown(name).text);
    if (t->other)
        return fail(ERR_INPUT, "%s: tensor '%s': its type %s is not supported", s->path,
                    st_shown(name).text, t->other);
    if (dtype >= 0 && t->dtype != (enum st_dtype)dtype)
        return fail(ERR_INPUT, "%s: tensor '%s': dtype is %s, expected %s", s->path,
                    st_shown(name).text, st_dtype_name(t->dtype),
                    st_dtype_name((enum st_dtype)dtype));
    if (!shape_agrees(t, ndim, shape)) {
        char is[192], expected[192];
        format_shape(is, sizeof is, t->ndim, t->shape);
        format_shape(expected, sizeof expected, ndim, shape);
        return fail(ERR_INPUT, "%s: tensor '%s': shape is %s, expected %s", s->path,
                    st_shown(name).text, is, expected);
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
                    s->path, st_shown(t->name).text, (long long)first, (long long)count,
                    (long long)t->count);
    if (t->other)
        return fail(ERR_INPUT, "%s: tensor '%s': its type %s is not supported", s->path,
                    st_shown(t->name).text, t->other);
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

static void gather_strided(const struct st_tensor *t, int64_t first, int64_t count, uint8_t *to)
{
    const size_t size = st_dtype_size(t->dtype);
    for (int64_t i = 0; i < count; i++)
        memcpy(to + (size_t)i * size, (const uint8_t *)t->data + strided_at(t, first + i), size);
}

static void gather_pieces(const struct st_tensor *t, int64_t first, int64_t count, uint8_t *to)
{
    const size_t size = st_dtype_size(t->dtype);
    const struct st_piece *p = t->pieces;
    for (; count > 0; p++) {
        if (first >= p->count) {
            first -= p->count;
            continue;
        }
        const int64_t n = count < p->count - first ? count : p->count - first;
        memcpy(to, (const uint8_t *)p->data + (size_t)first * size, (size_t)n * size);
        to += (size_t)n * size;
        count -= n;
        first = 0;
    }
}

// Elements [first, first+count) one after the other.
static void gather(const struct st_tensor *t, int64_t first, int64_t count, uint8_t *to)
{
    const size_t size = st_dtype_size(t->dtype);
    if (t->pieces)
        gather_pieces(t, first, count, to);
    else if (t->strided)
        gather_strided(t, first, count, to);
    else if (count)
        memcpy(to, (const uint8_t *)t->data + (size_t)first * size, (size_t)count * size);
}

int safetensors_read_raw(const struct safetensors *s, const struct st_tensor *t, void *dst,
                         int64_t first, int64_t count)
{
    TRY(check_range(s, t, first, count));
    gather(t, first, count, dst);
    return 0;
}

#define CONVERT(TYPE, TO, EXPRESSION)                      \
    for (int64_t i = 0; i < count; i++) {                  \
        TYPE v;                                            \
        memcpy(&v, from + (size_t)i * sizeof v, sizeof v); \
        ((TO *)dst)[i] = (TO)(EXPRESSION);                 \
    }                                                      \
    break

static void to_f32(enum st_dtype dtype, const uint8_t *from, void *dst, int64_t count)
{
    switch (dtype) {
    case ST_F32:
        if (count)
            memcpy(dst, from, (size_t)count * sizeof(float));
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
}

static void to_i64(enum st_dtype dtype, const uint8_t *from, void *dst, int64_t count)
{
    switch (dtype) {
    case ST_I32:
        CONVERT(int32_t, int64_t, v);
    case ST_I64:
        CONVERT(int64_t, int64_t, v);
    case ST_U8:
        CONVERT(uint8_t, int64_t, v);
    default:
        BUG_IF(true);
    }
}
#undef CONVERT

// Converts elements to `size` bytes each: from where they lie, or by way of a small copy.
static void convert(const struct st_tensor *t, uint8_t *dst, size_t size, int64_t first,
                    int64_t count,
                    void (*how)(enum st_dtype dtype, const uint8_t *from, void *to, int64_t n))
{
    enum { CHUNK = 4096 };
    uint8_t copy[CHUNK * 8];
    if (!t->strided && !t->pieces) {
        how(t->dtype, (const uint8_t *)t->data + (size_t)first * st_dtype_size(t->dtype), dst,
            count);
        return;
    }
    for (int64_t i = 0; i < count; i += CHUNK) {
        const int64_t n = count - i < CHUNK ? count - i : CHUNK;
        gather(t, first + i, n, copy);
        how(t->dtype, copy, dst + (size_t)i * size, n);
    }
}

int safetensors_read_f32(const struct safetensors *s, const struct st_tensor *t, float *dst,
                         int64_t first, int64_t count)
{
    TRY(check_range(s, t, first, count));
    convert(t, (uint8_t *)dst, sizeof *dst, first, count, to_f32);
    return 0;
}

int safetensors_read_i64(const struct safetensors *s, const struct st_tensor *t, int64_t *dst,
                         int64_t first, int64_t count)
{
    TRY(check_range(s, t, first, count));
    if (t->dtype != ST_I32 && t->dtype != ST_I64 && t->dtype != ST_U8)
        return fail(ERR_INPUT, "%s: tensor '%s': dtype is %s, expected whole numbers", s->path,
                    st_shown(t->name).text, st_dtype_name(t->dtype));
    convert(t, (uint8_t *)dst, sizeof *dst, first, count, to_i64);
    return 0;
}
