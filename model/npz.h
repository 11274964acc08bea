// numpy's .npz: a zip archive of .npy files, one an array, stored or deflated (np.savez,
// np.savez_compressed).
//
// Reading streams an array in order and trusts nothing: an array whose bytes are not exactly what
// its header says, or whose size is more than the file can hold, is refused when it is opened. A
// bad file is ERR_INPUT, one that cannot be read ERR_IO, with one line naming the file and array.
#ifndef DITMOE_NPZ_H
#define DITMOE_NPZ_H

#include <stdbool.h>

#include "model/safetensors.h"

enum { NPY_DIMS = 8 };

struct npy_array {
    enum st_dtype dtype; // little-endian, as all of them
    bool columns_first;  // Fortran's order of the elements
    int ndim;
    int64_t shape[NPY_DIMS];
    int64_t count; // elements
};

// ---- reading ------------------------------------------------------------------------------------

struct npz;

int npz_open(const char *path, struct npz **out);
void npz_close(struct npz *z); // NULL is allowed
const char *npz_path(const struct npz *z);
bool npz_has(const struct npz *z, const char *name);

// A cursor over one array (missing: ERR_INPUT). `array` is filled.
struct npz_reader;
int npz_read_open(struct npz *z, const char *name, struct npy_array *array,
                  struct npz_reader **out);
// The next `count` elements, as they are stored, or converted from F32 or F64.
int npz_read(struct npz_reader *r, void *to, int64_t count);
int npz_read_doubles(struct npz_reader *r, double *to, int64_t count);
void npz_read_close(struct npz_reader *r); // NULL is allowed

// ---- writing ------------------------------------------------------------------------------------

// The archive is laid out before there is any data, so that arrays can be filled in any order, from
// several runs (tools/sample_npz.c). All arrays are stored, with 64-bit sizes.
enum { NPZ_ARRAYS = 8, NPZ_NAME = 32, NPZ_HEADER_MAX = 512 };

struct npz_entry {
    char name[NPZ_NAME];
    struct npy_array array;
    uint64_t start; // of the entry's header in the file
    uint64_t data;  // of the elements
    uint64_t bytes; // of the elements
};

struct npz_layout {
    int count;
    struct npz_entry entries[NPZ_ARRAYS];
    uint64_t end; // of the last element: where the directory goes
};

// Adds an array behind the others.
void npz_layout_add(struct npz_layout *l, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape);
// What lies in [entry->start, entry->data): the zip header and the .npy header. `crc` covers the
// entry: npz_layout_crc() with the elements appended (zlib's crc32). Returns the bytes.
size_t npz_entry_header(const struct npz_entry *e, uint32_t crc, uint8_t out[NPZ_HEADER_MAX]);
uint32_t npz_entry_crc(const struct npz_entry *e); // of the .npy header alone
// What lies behind layout->end. `crcs`: one an array. Returns the bytes.
size_t npz_directory(const struct npz_layout *l, const uint32_t *crcs,
                     uint8_t out[NPZ_ARRAYS * NPZ_HEADER_MAX]);

// Writes whole arrays at once; appears whole or not at all (model/atomic_file.h).
int npz_write(const char *path, const struct npz_layout *l, const void *const *data);

#endif
