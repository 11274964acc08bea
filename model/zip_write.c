// Writing zip archives (PKWARE's APPNOTE 6.3); see zip_write.h. An entry's header is written with a
// checksum of zero, which is put right when its data are there. Numbers that do not fit 32 bits go
// into 64-bit records, and only those.
#include "model/zip_write.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "model/atomic_file.h"

enum { ALIGN = 64, LOCAL = 30, CENTRAL = 46, UTF8 = 1 << 11 };

struct entry {
    char *name;
    uint64_t offset, size; // of the header; of the data
    uint32_t crc;
};

struct zip_writer {
    struct atomic_file *file;
    struct entry *entries;
    size_t count, room;
    uint64_t at, left; // bytes written; of the current entry still to come
};

// ---- records ------------------------------------------------------------------------------------

struct record {
    uint8_t bytes[CENTRAL + 256 + 4 + 24 + 2 * ALIGN];
    size_t length;
};

static void put(struct record *r, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        r->bytes[r->length++] = (uint8_t)(value >> 8 * i);
}

static void put_bytes(struct record *r, const void *data, size_t n)
{
    memcpy(r->bytes + r->length, data, n);
    r->length += n;
}

static uint64_t fit32(uint64_t value)
{
    return value < UINT32_MAX ? value : UINT32_MAX;
}

static int emit(struct zip_writer *z, const void *data, size_t bytes)
{
    z->at += bytes;
    return atomic_file_write(z->file, data, bytes);
}

// What both headers of an entry have in common: version, flags, method, time, checksum, sizes.
static void put_common(struct record *r, const struct entry *e)
{
    put(r, 45, 2); // version 4.5: 64-bit sizes
    put(r, UTF8, 2);
    put(r, 0, 2);                // stored
    put(r, 0, 2), put(r, 33, 2); // midnight, 1 January 1980: the same input, the same file
    put(r, e->crc, 4);
    put(r, fit32(e->size), 4), put(r, fit32(e->size), 4);
    put(r, strlen(e->name), 2);
}

// The extra field: 64-bit sizes where they are needed, and padding up to the alignment.
static void put_local_extra(struct record *r, const struct entry *e, uint64_t at)
{
    const bool wide = e->size >= UINT32_MAX;
    const size_t fixed = LOCAL + strlen(e->name) + (wide ? 20u : 0u) + 4;
    const size_t padding = (size_t)(-(at + fixed) & (ALIGN - 1));
    static const uint8_t filler[ALIGN];
    put(r, (wide ? 20u : 0u) + 4 + padding, 2);
    put_bytes(r, e->name, strlen(e->name));
    if (wide)
        put(r, 1, 2), put(r, 16, 2), put(r, e->size, 8), put(r, e->size, 8);
    put(r, 0x4246, 2), put(r, padding, 2); // a private field, as PyTorch's own
    put_bytes(r, filler, padding);
}

static int write_local(struct zip_writer *z, const struct entry *e)
{
    struct record r = {.length = 0};
    put_bytes(&r, "PK\3\4", 4);
    put_common(&r, e);
    put_local_extra(&r, e, z->at);
    return emit(z, r.bytes, r.length);
}

static int write_central(struct zip_writer *z, const struct entry *e)
{
    struct record r = {.length = 0};
    const bool size = e->size >= UINT32_MAX, offset = e->offset >= UINT32_MAX;
    const unsigned extra = (size ? 16u : 0u) + (offset ? 8u : 0u);
    put_bytes(&r, "PK\1\2", 4);
    put(&r, 45, 2);
    put_common(&r, e);
    put(&r, extra ? extra + 4 : 0, 2);
    put(&r, 0, 2), put(&r, 0, 2), put(&r, 0, 2), put(&r, 0, 4); // comment, disk, attributes
    put(&r, fit32(e->offset), 4);
    put_bytes(&r, e->name, strlen(e->name));
    if (extra)
        put(&r, 1, 2), put(&r, extra, 2);
    if (size)
        put(&r, e->size, 8), put(&r, e->size, 8);
    if (offset)
        put(&r, e->offset, 8);
    return emit(z, r.bytes, r.length);
}

static int write_end(struct zip_writer *z, uint64_t from)
{
    struct record r = {.length = 0};
    const uint64_t size = z->at - from, end = z->at;
    if (z->count >= 65535 || from >= UINT32_MAX || size >= UINT32_MAX) {
        put_bytes(&r, "PK\6\6", 4), put(&r, 44, 8), put(&r, 45, 2), put(&r, 45, 2);
        put(&r, 0, 4), put(&r, 0, 4);
        put(&r, z->count, 8), put(&r, z->count, 8), put(&r, size, 8), put(&r, from, 8);
        put_bytes(&r, "PK\6\7", 4), put(&r, 0, 4), put(&r, end, 8), put(&r, 1, 4);
    }
    const uint64_t count = z->count < 65535 ? z->count : 65535;
    put_bytes(&r, "PK\5\6", 4), put(&r, 0, 2), put(&r, 0, 2), put(&r, count, 2), put(&r, count, 2);
    put(&r, fit32(size), 4), put(&r, fit32(from), 4), put(&r, 0, 2);
    return emit(z, r.bytes, r.length);
}

// ---- entries ------------------------------------------------------------------------------------

int zip_create(const char *path, struct zip_writer **out)
{
    *out = NULL;
    struct zip_writer *z = calloc(1, sizeof *z);
    if (!z)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = atomic_file_create(path, &z->file);
    if (code < 0)
        zip_abort(z);
    else
        *out = z;
    return code;
}

// Puts the checksum of the entry that is complete into its header.
static int finish_entry(struct zip_writer *z)
{
    struct record r = {.length = 0};
    BUG_IF(z->left > 0);
    if (!z->count)
        return 0;
    const struct entry *e = &z->entries[z->count - 1];
    put(&r, e->crc, 4);
    return atomic_file_write_at(z->file, e->offset + 14, r.bytes, 4);
}

int zip_entry_begin(struct zip_writer *z, const char *name, uint64_t size)
{
    BUG_IF(strlen(name) > 255);
    TRY(finish_entry(z));
    if (z->count == z->room) {
        const size_t room = 2 * z->room + 64;
        struct entry *more = realloc(z->entries, room * sizeof *more);
        if (!more)
            return fail(ERR_NOMEM, "out of memory");
        z->entries = more;
        z->room = room;
    }
    struct entry *e = &z->entries[z->count];
    *e = (struct entry){strdup(name), z->at, size, 0};
    if (!e->name)
        return fail(ERR_NOMEM, "out of memory");
    z->count++;
    z->left = size;
    return write_local(z, e);
}

int zip_write(struct zip_writer *z, const void *data, size_t bytes)
{
    struct entry *e = &z->entries[z->count - 1];
    const uint8_t *p = data;
    BUG_IF(bytes > z->left);
    z->left -= bytes;
    e->crc = (uint32_t)crc32_z(e->crc, p, bytes);
    return emit(z, data, bytes);
}

static void release(struct zip_writer *z)
{
    for (size_t i = 0; i < z->count; i++)
        free(z->entries[i].name);
    free(z->entries);
    free(z);
}

static int write_directory(struct zip_writer *z)
{
    TRY(finish_entry(z));
    const uint64_t from = z->at;
    for (size_t i = 0; i < z->count; i++)
        TRY(write_central(z, &z->entries[i]));
    return write_end(z, from);
}

int zip_commit(struct zip_writer *z)
{
    int code = write_directory(z);
    if (code < 0) {
        zip_abort(z);
        return code;
    }
    code = atomic_file_commit(z->file);
    release(z);
    return code;
}

void zip_abort(struct zip_writer *z)
{
    if (!z)
        return;
    atomic_file_abort(z->file);
    release(z);
}
