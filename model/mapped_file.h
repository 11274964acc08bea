// A whole file mapped for reading.
#ifndef DITMOE_MAPPED_FILE_H
#define DITMOE_MAPPED_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct mapped_file {
    const uint8_t *data;
    size_t size; // > 0
};

// ERR_IO where it cannot be read or is no regular file, ERR_INPUT where it is empty. Messages do
// not name the file.
int mapped_file_open(const char *path, struct mapped_file *out);
void mapped_file_close(struct mapped_file *f); // also of a zeroed struct

#endif
