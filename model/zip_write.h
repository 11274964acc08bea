// Writing zip archives whose entries are stored and begin at multiples of 64 bytes, as PyTorch
// wants to map them. Sizes are said beforehand, checksums are computed while data go by.
#ifndef DITMOE_ZIP_WRITE_H
#define DITMOE_ZIP_WRITE_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct zip_writer;

int zip_create(const char *path, struct zip_writer **out);
// Starts an entry of `size` bytes, which zip_write() calls then bring.
int zip_entry_begin(struct zip_writer *z, const char *name, uint64_t size);
int zip_write(struct zip_writer *z, const void *data, size_t bytes);
int zip_commit(struct zip_writer *z); // releases z whether it fails or not
void zip_abort(struct zip_writer *z); // NULL is allowed; keeps the error message

#endif
