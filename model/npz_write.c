// Writing .npz: where everything lies, and the headers; see npz.h.
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "model/atomic_file.h"
#include "model/npz.h"

enum { LOCAL = 30, LOCAL_EXTRA = 20, CENTRAL = 46, CENTRAL_EXTRA = 28, VERSION = 45 };

// DOS dates cannot say less than 1980-01-01.
enum { DOS_DATE = 1 << 5 | 1 };

static const char *descr(enum st_dtype dtype)
{
    switch (dtype) {
    case ST_F16:
        return "<f2";
    case ST_F32:
        return "<f4";
    case ST_F64:
        return "<f8";
    case ST_I32:
        return "<i4";
    case ST_I64:
        return "<i8";
    default:
        return "|u1";
    }
}

static uint8_t *put(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        *at++ = (uint8_t)(value >> 8 * i);
    return at;
}

// The .npy header: padded with spaces to a multiple of 64, as numpy does.
static size_t npy_header(const struct npy_array *a, uint8_t out[NPZ_HEADER_MAX])
{
    char *text = (char *)out + 10;
    size_t n = (size_t)sprintf(text, "{'descr': '%s', 'fortran_order': False, 'shape': (",
                               descr(a->dtype));
    for (int i = 0; i < a->ndim; i++)
        n += (size_t)sprintf(text + n, i ? " %lld," : "%lld,", (long long)a->shape[i]);
    if (a->ndim > 1)
        n--; // the last comma is written for one dimension only
    n += (size_t)sprintf(text + n, "), }");
    while ((10 + n + 1) % 64)
        text[n++] = ' ';
    text[n++] = '\n';
    memcpy(out, "\x93NUMPY\1", 8); // version 1.0: the string's own 0 is the second number
    put(out + 8, n, 2);
    return 10 + n;
}

void npz_layout_add(struct npz_layout *l, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape)
{
    BUG_IF(l->count == NPZ_ARRAYS || ndim > NPY_DIMS || strlen(name) >= NPZ_NAME);
    struct npz_entry *e = &l->entries[l->count++];
    uint8_t header[NPZ_HEADER_MAX];
    strcpy(e->name, name);
    e->array = (struct npy_array){.dtype = dtype, .ndim = ndim, .count = 1};
    for (int i = 0; i < ndim; i++) {
        e->array.shape[i] = shape[i];
        e->array.count *= shape[i];
    }
    e->start = l->end;
    e->data = e->start + npz_entry_header(e, 0, header);
    e->bytes = (uint64_t)e->array.count * st_dtype_size(dtype);
    l->end = e->data + e->bytes;
}

uint32_t npz_entry_crc(const struct npz_entry *e)
{
    uint8_t header[NPZ_HEADER_MAX];
    return (uint32_t)crc32(0, header, (uInt)npy_header(&e->array, header));
}

// What local and central headers have in common, from "version needed" to the second size. Sizes
// are in the 64-bit field.
static uint8_t *common(uint8_t *at, uint32_t crc)
{
    at = put(at, VERSION, 2);
    at = put(at, 0, 2 + 2 + 2); // flags, stored, time
    at = put(at, DOS_DATE, 2);
    at = put(at, crc, 4);
    return put(at, UINT64_MAX, 8);
}

size_t npz_entry_header(const struct npz_entry *e, uint32_t crc, uint8_t out[NPZ_HEADER_MAX])
{
    uint8_t npy[NPZ_HEADER_MAX], *at = out;
    const size_t npy_bytes = npy_header(&e->array, npy), name = strlen(e->name) + 4;
    memcpy(at, "PK\3\4", 4);
    at = common(at + 4, crc);
    at = put(at, name, 2);
    at = put(at, LOCAL_EXTRA, 2);
    at += sprintf((char *)at, "%s.npy", e->name);
    at = put(at, 1, 2);
    at = put(at, LOCAL_EXTRA - 4, 2);
    at = put(at, npy_bytes + e->bytes, 8);
    at = put(at, npy_bytes + e->bytes, 8);
    BUG_IF((size_t)(at - out) + npy_bytes > NPZ_HEADER_MAX);
    memcpy(at, npy, npy_bytes);
    return (size_t)(at - out) + npy_bytes;
}

static uint8_t *central(uint8_t *at, const struct npz_entry *e, uint32_t crc)
{
    const size_t name = strlen(e->name) + 4;
    const uint64_t size = e->data + e->bytes - e->start - LOCAL - LOCAL_EXTRA - name;
    memcpy(at, "PK\1\2", 4);
    at = common(put(at + 4, VERSION, 2), crc);
    at = put(at, name, 2);
    at = put(at, CENTRAL_EXTRA, 2);
    at = put(at, 0, 2 + 2 + 2 + 4); // note, disk, attributes
    at = put(at, UINT32_MAX, 4);    // offset: in the 64-bit field
    at += sprintf((char *)at, "%s.npy", e->name);
    at = put(at, 1, 2);
    at = put(at, CENTRAL_EXTRA - 4, 2);
    at = put(at, size, 8);
    at = put(at, size, 8);
    return put(at, e->start, 8);
}

size_t npz_directory(const struct npz_layout *l, const uint32_t *crcs,
                     uint8_t out[NPZ_ARRAYS * NPZ_HEADER_MAX])
{
    uint8_t *at = out;
    for (int i = 0; i < l->count; i++)
        at = central(at, &l->entries[i], crcs[i]);
    const uint64_t size = (uint64_t)(at - out), count = (uint64_t)l->count;
    memcpy(at, "PK\6\6", 4); // the 64-bit end
    at = put(at + 4, 44, 8);
    at = put(at, VERSION, 2);
    at = put(at, VERSION, 2);
    at = put(at, 0, 4 + 4); // disks
    at = put(at, count, 8);
    at = put(at, count, 8);
    at = put(at, size, 8);
    at = put(at, l->end, 8);
    memcpy(at, "PK\6\7", 4); // where that is
    at = put(at + 4, 0, 4);
    at = put(at, l->end + size, 8);
    at = put(at, 1, 4);
    memcpy(at, "PK\5\6", 4); // the end
    at = put(at + 4, 0, 4);
    at = put(at, count, 2);
    at = put(at, count, 2);
    at = put(at, size, 4);
    at = put(at, UINT32_MAX, 4);
    at = put(at, 0, 2);
    return (size_t)(at - out);
}

// crc32() counts in 32 bits.
static uint32_t crc_of(uint32_t crc, const uint8_t *data, uint64_t bytes)
{
    while (bytes > 0) {
        const uInt piece = bytes < 1u << 30 ? (uInt)bytes : 1u << 30;
        crc = (uint32_t)crc32(crc, data, piece);
        data += piece;
        bytes -= piece;
    }
    return crc;
}

static int write_all(struct atomic_file *f, const struct npz_layout *l, const void *const *data)
{
    uint8_t header[NPZ_ARRAYS * NPZ_HEADER_MAX];
    uint32_t crcs[NPZ_ARRAYS];
    for (int i = 0; i < l->count; i++) {
        const struct npz_entry *e = &l->entries[i];
        crcs[i] = crc_of(npz_entry_crc(e), data[i], e->bytes);
        TRY(atomic_file_write(f, header, npz_entry_header(e, crcs[i], header)));
        TRY(atomic_file_write(f, data[i], e->bytes));
    }
    return atomic_file_write(f, header, npz_directory(l, crcs, header));
}

int npz_write(const char *path, const struct npz_layout *l, const void *const *data)
{
    struct atomic_file *f;
    TRY(atomic_file_create(path, &f));
    int code = write_all(f, l, data);
    if (code < 0) {
        atomic_file_abort(f);
        return code;
    }
    return atomic_file_commit(f);
}
