// Reading .npz; see npz.h. The writer is npz_write.c.
#include "model/npz.h"

#include <stdlib.h>
#include <string.h>

#include "model/mapped_file.h"
#include "model/zip.h"

enum { HEADER_MAX = 65536, NPY_PREFIX = 12 };

// Deflate makes at most 1032 bytes of one.
enum { DEFLATE_MOST = 1032 };

struct npz {
    char *path;
    struct mapped_file file;
    struct zip_entry *entries;
    size_t count;
};

struct npz_reader {
    struct npz *npz;
    char name[64];
    struct npy_array array;
    struct zip_stream *stream;
    int64_t left; // elements
};

// ---- the archive --------------------------------------------------------------------------------

int npz_open(const char *path, struct npz **out)
{
    *out = NULL;
    struct npz *z = calloc(1, sizeof *z);
    if (!z || !(z->path = strdup(path))) {
        free(z);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    int code = mapped_file_open(path, &z->file);
    if (code >= 0)
        code = zip_directory(z->file.data, z->file.size, &z->entries, &z->count);
    if (code < 0) {
        npz_close(z);
        return code == ERR_INPUT ? fail_in(code, "%s: not a whole .npz file", path)
                                 : fail_in(code, "%s", path);
    }
    *out = z;
    return 0;
}

void npz_close(struct npz *z)
{
    if (!z)
        return;
    mapped_file_close(&z->file);
    free(z->entries);
    free(z->path);
    free(z);
}

const char *npz_path(const struct npz *z)
{
    return z->path;
}

static const struct zip_entry *find(const struct npz *z, const char *name)
{
    const size_t length = strlen(name);
    for (size_t i = 0; i < z->count; i++) {
        const struct zip_entry *e = &z->entries[i];
        if (e->length == length + 4 && !memcmp(e->name, name, length) &&
            !memcmp(e->name + length, ".npy", 4))
            return e;
    }
    return NULL;
}

bool npz_has(const struct npz *z, const char *name)
{
    return find(z, name);
}

// ---- the header of an array ---------------------------------------------------------------------
//
// {'descr': '<f4', 'fortran_order': False, 'shape': (50000, 2048), }: a Python literal, of which
// the part is read that such headers use.

struct text {
    const char *at, *end;
};

static int bad_array(const struct npz_reader *r, const char *what)
{
    return fail(ERR_INPUT, "%s: array '%s': %s", r->npz->path, r->name, what);
}

static void skip_spaces(struct text *t)
{
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\n'))
        t->at++;
}

static bool take(struct text *t, const char *word)
{
    const size_t length = strlen(word);
    skip_spaces(t);
    if ((size_t)(t->end - t->at) < length || memcmp(t->at, word, length) != 0)
        return false;
    t->at += length;
    return true;
}

static bool take_string(struct text *t, char *out, size_t size)
{
    skip_spaces(t);
    if (t->at == t->end || (*t->at != '\'' && *t->at != '"'))
        return false;
    const char quote = *t->at++;
    const char *close = memchr(t->at, quote, (size_t)(t->end - t->at));
    if (!close || (size_t)(close - t->at) >= size)
        return false;
    memcpy(out, t->at, (size_t)(close - t->at));
    out[close - t->at] = '\0';
    t->at = close + 1;
    return true;
}

static bool take_length(struct text *t, int64_t *out)
{
    skip_spaces(t);
    const char *first = t->at;
    *out = 0;
    for (; t->at < t->end && *t->at >= '0' && *t->at <= '9'; t->at++)
        if (__builtin_mul_overflow(*out, 10, out) ||
            __builtin_add_overflow(*out, *t->at - '0', out))
            return false;
    take(t, "L"); // Python 2 wrote long integers so
    return t->at > first;
}

static bool take_shape(struct text *t, struct npy_array *a)
{
    if (!take(t, "("))
        return false;
    while (!take(t, ")")) {
        if (a->ndim == NPY_DIMS || !take_length(t, &a->shape[a->ndim++]))
            return false;
        if (!take(t, ",") && !(take(t, ")") && (t->at--, true)))
            return false;
    }
    return true;
}

static bool read_type(const char *descr, enum st_dtype *out)
{
    static const struct {
        const char *name;
        enum st_dtype dtype;
    } types[] = {{"|u1", ST_U8},  {"<u1", ST_U8},  {"<f2", ST_F16}, {"<f4", ST_F32},
                 {"<f8", ST_F64}, {"<i4", ST_I32}, {"<i8", ST_I64}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (!strcmp(descr, types[i].name)) {
            *out = types[i].dtype;
            return true;
        }
    }
    return false;
}

static int parse_header(const struct npz_reader *r, struct text t, struct npy_array *a)
{
    char key[24], descr[24] = "";
    bool shaped = false;
    if (!take(&t, "{"))
        return bad_array(r, "its header is not one that numpy writes");
    while (!take(&t, "}")) {
        bool good = take_string(&t, key, sizeof key) && take(&t, ":");
        if (good && !strcmp(key, "descr"))
            good = take_string(&t, descr, sizeof descr);
        else if (good && !strcmp(key, "fortran_order"))
            good = (a->columns_first = take(&t, "True")) || take(&t, "False");
        else if (good && !strcmp(key, "shape") && !shaped)
            good = shaped = take_shape(&t, a);
        else
            good = false;
        take(&t, ",");
        if (!good)
            return bad_array(r, "its header is not one that numpy writes, or its type is none of "
                                "u1, f2, f4, f8, i4, i8");
    }
    if (!shaped || !read_type(descr, &a->dtype))
        return bad_array(r, "its type is none of u1, f2, f4, f8, i4, i8 (little-endian)");
    return 0;
}

static int count_elements(const struct npz_reader *r, uint64_t stored, struct npy_array *a)
{
    uint64_t bytes;
    a->count = 1;
    for (int i = 0; i < a->ndim; i++)
        if (__builtin_mul_overflow(a->count, a->shape[i], &a->count))
            return bad_array(r, "its shape is too large");
    if (__builtin_mul_overflow((uint64_t)a->count, st_dtype_size(a->dtype), &bytes) ||
        bytes != stored)
        return bad_array(r, "it has not the bytes that its shape needs");
    return 0;
}

// Versions 1 (two bytes of length) and 2 and 3 (four).
static int read_header(struct npz_reader *r, const struct zip_entry *e, char *header)
{
    uint8_t prefix[NPY_PREFIX];
    if (e->size < sizeof prefix)
        return bad_array(r, "it is cut short");
    TRY(zip_stream_read(r->stream, prefix, 10));
    if (memcmp(prefix, "\x93NUMPY", 6) != 0 || prefix[6] < 1 || prefix[6] > 3)
        return bad_array(r, "it is no .npy of version 1, 2 or 3");
    uint64_t used = 10, length = prefix[8] | (uint64_t)prefix[9] << 8;
    if (prefix[6] > 1) {
        TRY(zip_stream_read(r->stream, prefix + 10, 2));
        length |= (uint64_t)prefix[10] << 16 | (uint64_t)prefix[11] << 24;
        used = 12;
    }
    if (length > HEADER_MAX || length > e->size - used)
        return bad_array(r, "its header is too long");
    TRY(zip_stream_read(r->stream, header, (size_t)length));
    TRY(parse_header(r, (struct text){header, header + length}, &r->array));
    return count_elements(r, e->size - used - length, &r->array);
}

// ---- the elements -------------------------------------------------------------------------------

static int open_entry(struct npz_reader *r, const struct zip_entry *e)
{
    if (e->method == ZIP_DEFLATED && e->size / DEFLATE_MOST > e->packed)
        return bad_array(r, "it claims more than its compressed bytes can hold");
    char *header = malloc(HEADER_MAX);
    int code = header ? zip_stream_open(r->npz->file.data, e, &r->stream)
                      : fail(ERR_NOMEM, "out of memory");
    if (code < 0)
        code = fail_in(code, "%s", r->npz->path);
    if (code >= 0)
        code = read_header(r, e, header);
    free(header);
    return code;
}

int npz_read_open(struct npz *z, const char *name, struct npy_array *array, struct npz_reader **out)
{
    *out = NULL;
    *array = (struct npy_array){0};
    const struct zip_entry *e = find(z, name);
    if (!e)
        return fail(ERR_INPUT, "%s: there is no array '%s' in it", z->path, name);
    struct npz_reader *r = calloc(1, sizeof *r);
    if (!r)
        return fail(ERR_NOMEM, "%s: out of memory", z->path);
    r->npz = z;
    strncat(r->name, name, sizeof r->name - 1);
    int code = open_entry(r, e);
    if (code < 0) {
        npz_read_close(r);
        return code;
    }
    r->left = r->array.count;
    *array = r->array;
    *out = r;
    return 0;
}

int npz_read(struct npz_reader *r, void *to, int64_t count)
{
    if (count > r->left)
        return bad_array(r, "it has fewer elements than are wanted");
    r->left -= count;
    int code = zip_stream_read(r->stream, to, (size_t)count * st_dtype_size(r->array.dtype));
    return code < 0 ? fail_in(code, "%s: array '%s'", r->npz->path, r->name) : 0;
}

int npz_read_doubles(struct npz_reader *r, double *to, int64_t count)
{
    float part[1024];
    if (r->array.dtype == ST_F64)
        return npz_read(r, to, count);
    if (r->array.dtype != ST_F32)
        return bad_array(r, "its type is neither f4 nor f8");
    while (count > 0) {
        const int64_t n = count < 1024 ? count : 1024;
        TRY(npz_read(r, part, n));
        for (int64_t i = 0; i < n; i++)
            *to++ = (double)part[i];
        count -= n;
    }
    return 0;
}

void npz_read_close(struct npz_reader *r)
{
    if (r)
        zip_stream_close(r->stream);
    free(r);
}
