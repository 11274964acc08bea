// What the readers of tensor files share: not for others.
#ifndef DITMOE_SAFETENSORS_INTERNAL_H
#define DITMOE_SAFETENSORS_INTERNAL_H

#include <jansson.h>

#include "model/safetensors.h"

struct safetensors {
    char *path;
    char format[64];
    const uint8_t *map; // the whole file
    size_t size;
    const uint8_t *data;
    uint64_t data_size;
    json_t *header;                   // {"__metadata__": {...}}, or NULL
    struct st_tensor *tensors;        // [count], by offset
    const struct st_tensor **by_name; // [count]
    int count;
    char *names;             // of the tensors
    struct st_files files;   // of a set of files: opened for it, closed with it
    struct st_piece *pieces; // adopted
};

// A name from a file for a message: short, without control characters.
struct st_shown {
    char text[96];
};
struct st_shown st_shown(const char *name);
int st_bad_tensor(const struct safetensors *s, const char *name, const char *what);

// Metadata of a file of another format; a text that is not UTF-8 is left out.
int st_set_metadata(struct safetensors *s, const char *key, const char *text, size_t length);

int st_by_offset(const void *a, const void *b); // of struct st_tensor
int st_index_names(struct safetensors *s);      // fills by_name

#endif
