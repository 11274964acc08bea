// Python pickles as torch.save writes them, read without executing anything. The reader knows the
// opcodes and the few globals that tensors, OrderedDicts, numpy scalars and argparse.Namespace
// need, DeepSpeed's among them; any other is ERR_INPUT naming it. There is no recursion, and memory
// is at most PICKLE_SLACK and PICKLE_FACTOR times the pickle's size: those of real models take 3
// times it, and one that takes more is refused.
#ifndef DITMOE_PICKLE_H
#define DITMOE_PICKLE_H

#include <stddef.h>
#include <stdint.h>

#include "model/safetensors.h"

enum { PICKLE_FACTOR = 8, PICKLE_SLACK = 1 << 20 };

enum pickle_kind {
    PICKLE_NONE,
    PICKLE_INT, // booleans too
    PICKLE_FLOAT,
    PICKLE_TEXT, // str and bytes
    PICKLE_TUPLE,
    PICKLE_LIST,
    PICKLE_DICT,    // items: key, value, key, value...
    PICKLE_GLOBAL,  // a known function or class
    PICKLE_STORAGE, // where a tensor's elements are
    PICKLE_TENSOR,
    PICKLE_OTHER, // known, of no use here: a Namespace, a numpy scalar
};

struct pickle_storage {
    enum st_dtype dtype;
    const char *other; // type name where it is none of st_dtype, else NULL
    int64_t count;     // elements
    size_t element;    // bytes of one
    const struct pickle_value *key;
};

// Small, as a pickle of many values is a matter of memory.
struct pickle_value {
    uint8_t kind;   // enum pickle_kind
    uint8_t global; // PICKLE_GLOBAL: which
    uint32_t count; // TUPLE, LIST, DICT, TENSOR: items; TEXT: bytes
    uint32_t room;
    union {
        int64_t i;
        double f;
        const char *text;            // in the pickle, not ended by 0
        struct pickle_value **items; // TENSOR: storage, offset, sizes, strides
        const struct pickle_storage *storage;
    };
};

struct pickle;

// Reads one pickle at `data`, which must outlive it. `*used`: bytes read. Messages do not name the
// file.
int pickle_read(const uint8_t *data, size_t size, struct pickle **out, size_t *used);
void pickle_free(struct pickle *p);
const struct pickle_value *pickle_root(const struct pickle *p);

// Every storage that the pickle names, in its order; one that tensors share may come more than
// once.
const struct pickle_value *const *pickle_storages(const struct pickle *p, size_t *count);

// The value of a text key (the last one given), or NULL; NULL too when `dict` is no dict.
const struct pickle_value *pickle_get(const struct pickle_value *dict, const char *key);

// The i-th pair of a dict that has a text for a key; NULL where it has not. *key: that text.
const struct pickle_value *pickle_entry(const struct pickle_value *dict, size_t i,
                                        const struct pickle_value **key);

#endif
