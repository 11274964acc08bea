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
#include "model/zip_write.h"

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

// Starts an array in an archive (model/zip_write.h); zip_write() then brings its elements,
// little-endian and row by row.
int npz_write_begin(struct zip_writer *z, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape);

#endif
