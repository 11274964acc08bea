// The headers of numpy's arrays; see npz.h.
#include <stdio.h>

#include "model/npz.h"

enum { PREFIX = 10, HEADER_MAX = 512, NAME_MAX_BYTES = 64 };

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

// Version 1.0, padded with spaces to a multiple of 64, as numpy does. Returns its bytes.
static size_t npy_header(enum st_dtype dtype, int ndim, const int64_t *shape, char *out)
{
    char *text = out + PREFIX;
    size_t n =
        (size_t)sprintf(text, "{'descr': '%s', 'fortran_order': False, 'shape': (", descr(dtype));
    for (int i = 0; i < ndim; i++)
        n += (size_t)sprintf(text + n, i ? " %lld," : "%lld,", (long long)shape[i]);
    if (ndim > 1)
        n--; // the last comma is written for one dimension only
    n += (size_t)sprintf(text + n, "), }");
    while ((PREFIX + n + 1) % 64)
        text[n++] = ' ';
    text[n++] = '\n';
    sprintf(out, "\x93NUMPY\1"); // the string's end is the second number of the version
    out[8] = (char)n;
    out[9] = (char)(n >> 8);
    return PREFIX + n;
}

int npz_write_begin(struct zip_writer *z, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape)
{
    char header[HEADER_MAX], file[NAME_MAX_BYTES];
    const size_t bytes = npy_header(dtype, ndim, shape, header);
    uint64_t elements = 1;
    BUG_IF(ndim > NPY_DIMS || dtype == ST_BF16);
    for (int i = 0; i < ndim; i++)
        elements *= (uint64_t)shape[i];
    snprintf(file, sizeof file, "%s.npy", name);
    TRY(zip_entry_begin(z, file, bytes + elements * st_dtype_size(dtype)));
    return zip_write(z, header, bytes);
}
