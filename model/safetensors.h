// safetensors: named tensors in one file. Eight bytes of header length (little-endian), a JSON
// header {"name": {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {string: string}}, then
// the data, row-major, little-endian, without holes.
//
// The reader trusts nothing: every length, offset, shape product and name is checked when the file
// is opened, so a file that opens can be read. A bad file is ERR_INPUT, one that cannot be read
// ERR_IO, with one line that names the file and, where there is one, the tensor.
//
// The writer streams: names, types and shapes first, then the data in the same order and in pieces
// of any size, so that a checkpoint never exists twice in memory. The file appears whole or not at
// all (model/atomic_file.h).
#ifndef DITMOE_SAFETENSORS_H
#define DITMOE_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

// Storage types in files. More than devices know: published files hold F16 and F64 too.
#define ST_DTYPE_LIST(X) X(F32, 4) X(F16, 2) X(BF16, 2) X(F64, 8) X(I32, 4) X(I64, 8) X(U8, 1)
enum st_dtype {
#define X(name, size) ST_##name,
    ST_DTYPE_LIST(X)
#undef X
        ST_DTYPES
};
size_t st_dtype_size(enum st_dtype dtype);
const char *st_dtype_name(enum st_dtype dtype); // "F32", as in the file

enum { ST_DIMS = 8 };

struct st_piece {
    const void *data;
    int64_t count; // elements
};

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int ndim; // 0: a single number
    int64_t shape[ST_DIMS];
    int64_t count;    // elements: the product of shape
    uint64_t bytes;   // count * st_dtype_size()
    uint64_t offset;  // from the start of the data
    const void *data; // in the mapped file; may be unaligned: copy, do not cast
    // Of other formats only: elements not row-major from `data` on but `stride` elements apart; or
    // in pieces, one after the other, of several files (then data is NULL); and the name of a type
    // that cannot be read (then bytes is 0).
    bool strided;
    int64_t stride[ST_DIMS];
    const struct st_piece *pieces;
    int piece_count;
    const char *other;
};

// ---- reading ------------------------------------------------------------------------------------

struct safetensors;

int safetensors_open(const char *path, struct safetensors **out);
void safetensors_close(struct safetensors *s); // NULL is allowed; every st_tensor of it goes too

int safetensors_count(const struct safetensors *s);
const struct st_tensor *safetensors_at(const struct safetensors *s,
                                       int i); // in the order of the data
const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name); // or NULL
const char *safetensors_path(const struct safetensors *s);
const char *safetensors_format(const struct safetensors *s); // "safetensors", "PyTorch, zip", ...

// The value of a metadata key, or NULL when the file has none.
const char *safetensors_metadata(const struct safetensors *s, const char *key);

// As safetensors_find(), but absence, or another dtype or shape than wanted, is ERR_INPUT naming
// both. `dtype` < 0: any. `ndim` < 0: any shape; a shape entry < 0: any length there.
int safetensors_expect(const struct safetensors *s, const char *name, int dtype, int ndim,
                       const int64_t *shape, const struct st_tensor **out);

// Elements [first, first+count) of `t`, converted. To f32 from every type; to i64 from I32, I64,
// U8. A range outside the tensor, or a float tensor read as i64, is ERR_INPUT.
int safetensors_read_f32(const struct safetensors *s, const struct st_tensor *t, float *dst,
                         int64_t first, int64_t count);
int safetensors_read_i64(const struct safetensors *s, const struct st_tensor *t, int64_t *dst,
                         int64_t first, int64_t count);

// The same elements as they are in the file, st_dtype_size() bytes each.
int safetensors_read_raw(const struct safetensors *s, const struct st_tensor *t, void *dst,
                         int64_t first, int64_t count);

// ---- tensors of other readers (model/weights_file.h) --------------------------------------------

// Gives tensors that another reader found in a mapped file the face above. Takes over the mapping,
// `tensors` and `names` (malloc'ed; the tensors' names point into it), also when it fails.
int safetensors_adopt(const char *path, const char *format, const void *map, size_t size,
                      struct st_tensor *tensors, int count, char *names, struct safetensors **out);

// Files that are open together.
struct st_files {
    struct safetensors **list;
    int count;
};
void st_files_close(struct st_files *f); // also of a zeroed struct

// The same for tensors that lie in several files: `tensors` may point into those files, their names
// too or into `names`, their pieces into `pieces` (both malloc'ed or NULL). Takes over everything,
// also when it fails. Metadata is that of the first file that has the key.
struct st_joined {
    struct st_files files;
    struct st_tensor *tensors;
    int count;
    char *names;
    struct st_piece *pieces;
};
int safetensors_join(const char *path, const char *format, struct st_joined *joined,
                     struct safetensors **out);

// ---- writing ------------------------------------------------------------------------------------

struct safetensors_writer;

// create, then any number of declare and set_metadata, then begin, then write until every declared
// byte is there, then commit. After an error call abort. commit releases the writer whether it
// fails or not. Duplicate or empty names, too many or too few bytes are ERR_INPUT; a full disk and
// its like ERR_IO.
int safetensors_create(const char *path, struct safetensors_writer **out);
int safetensors_declare(struct safetensors_writer *w, const char *name, enum st_dtype dtype,
                        int ndim, const int64_t *shape);
int safetensors_set_metadata(struct safetensors_writer *w, const char *key, const char *value);
int safetensors_begin(struct safetensors_writer *w);
int safetensors_write(struct safetensors_writer *w, const void *data, size_t bytes);
// Values as F32, F16 or BF16, rounded to the nearest; F16 becomes its largest where they are too
// large.
int safetensors_write_as(struct safetensors_writer *w, enum st_dtype dtype, const float *values,
                         int64_t count);
int safetensors_commit(struct safetensors_writer *w);
void safetensors_abort(struct safetensors_writer *w); // NULL is allowed; keeps the error message

#endif
