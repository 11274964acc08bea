// Zip archives in memory (normally a mapped file): the directory with 32- or 64-bit sizes, entries
// stored or deflated. PyTorch's .pt and numpy's .npz are such archives.
//
// Nothing is trusted: an entry of a directory that was read lies within the archive, its sizes are
// what the archive says of it and no more. Messages (ERR_INPUT) do not name the file.
#ifndef DITMOE_ZIP_H
#define DITMOE_ZIP_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

enum zip_method { ZIP_STORED = 0, ZIP_DEFLATED = 8 };

struct zip_entry {
    const char *name; // in the archive, not ended by 0
    size_t length;    // of the name
    uint64_t offset;  // of the data in the archive
    uint64_t packed;  // bytes of it there
    uint64_t size;    // bytes of it unpacked; the same where stored
    uint32_t crc;     // CRC-32 of the unpacked data
    int method;       // enum zip_method, or another number, which cannot be read
};

// The entries in the order of the directory; the caller frees *entries. Encrypted ones are refused.
int zip_directory(const uint8_t *archive, size_t size, struct zip_entry **entries, size_t *count);

// ---- the data of one entry, in order ------------------------------------------------------------

struct zip_stream;

// ERR_INPUT where the entry is neither stored nor deflated. The archive must outlive the stream.
int zip_stream_open(const uint8_t *archive, const struct zip_entry *entry, struct zip_stream **out);
// The next `bytes`, all or ERR_INPUT; at the entry's end the checksum is compared.
int zip_stream_read(struct zip_stream *s, void *to, size_t bytes);
void zip_stream_close(struct zip_stream *s); // NULL is allowed

#endif
