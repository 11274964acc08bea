// Reading zip archives (PKWARE's APPNOTE 6.3.x); see zip.h.
#include "model/zip.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

struct archive {
    const uint8_t *data;
    size_t size;
};

struct directory {
    uint64_t offset, size;
};

static uint64_t number(const uint8_t *at, int bytes)
{
    uint64_t n = 0;
    for (int i = 0; i < bytes; i++)
        n |= (uint64_t)at[i] << 8 * i;
    return n;
}

static int damaged(const char *what)
{
    return fail(ERR_INPUT, "%s", what);
}

// ---- where the directory is ---------------------------------------------------------------------

// The 64-bit end record, which stands before the other where a number did not fit that.
static int read_end64(const struct archive *a, size_t end, struct directory *d)
{
    if (end < 20 || memcmp(a->data + end - 20, "PK\6\7", 4))
        return damaged("its zip directory has no 64-bit end");
    const uint64_t at = number(a->data + end - 20 + 8, 8);
    if (at > end || end - at < 56 || memcmp(a->data + at, "PK\6\6", 4))
        return damaged("its zip directory has no 64-bit end");
    d->size = number(a->data + at + 40, 8);
    d->offset = number(a->data + at + 48, 8);
    return 0;
}

static int find_directory(const struct archive *a, struct directory *d)
{
    if (a->size < 22)
        return damaged("it is cut short");
    const size_t last = a->size - 22, first = last > 65535 ? last - 65535 : 0;
    size_t at = last;
    while (at > first && memcmp(a->data + at, "PK\5\6", 4))
        at--;
    if (memcmp(a->data + at, "PK\5\6", 4))
        return damaged("it has no zip directory at its end: it is cut short");
    d->size = number(a->data + at + 12, 4);
    d->offset = number(a->data + at + 16, 4);
    if (d->size == UINT32_MAX || d->offset == UINT32_MAX || number(a->data + at + 10, 2) == 65535)
        TRY(read_end64(a, at, d));
    if (d->offset > a->size || d->size > a->size - d->offset)
        return damaged("its zip directory is outside of it");
    return 0;
}

// ---- entries ------------------------------------------------------------------------------------

// The 64-bit extra field holds, in this order, the sizes and the offset that do not fit 32 bits.
static int read_extra(const uint8_t *extra, size_t length, struct zip_entry *e)
{
    uint64_t *const wide[] = {&e->size, &e->packed, &e->offset};
    size_t at = 0;
    while (length - at >= 4) {
        const uint64_t id = number(extra + at, 2), size = number(extra + at + 2, 2);
        at += 4;
        if (size > length - at)
            return damaged("an extra field is cut short");
        for (size_t i = 0, used = 0; id == 1 && i < 3; i++) {
            if (*wide[i] != UINT32_MAX)
                continue;
            if (size - used < 8)
                return damaged("a 64-bit size is missing");
            *wide[i] = number(extra + at + used, 8);
            used += 8;
        }
        at += size;
    }
    return 0;
}

// From the local header that e->offset points to, to the data behind it.
static int find_data(const struct archive *a, struct zip_entry *e)
{
    if (e->offset > a->size || a->size - e->offset < 30 || memcmp(a->data + e->offset, "PK\3\4", 4))
        return damaged("an entry is outside of it");
    e->offset += 30 + number(a->data + e->offset + 26, 2) + number(a->data + e->offset + 28, 2);
    if (e->offset > a->size || e->packed > a->size - e->offset)
        return damaged("an entry is outside of it");
    return 0;
}

static int read_entry(const struct archive *a, const struct directory *d, uint64_t *at,
                      struct zip_entry *e)
{
    const uint64_t left = d->size - *at;
    const uint8_t *h = a->data + d->offset + *at;
    if (left < 46 || memcmp(h, "PK\1\2", 4))
        return damaged("its zip directory is damaged");
    const uint64_t name = number(h + 28, 2), extra = number(h + 30, 2), note = number(h + 32, 2);
    if (left - 46 < name + extra + note)
        return damaged("its zip directory is damaged");
    if (number(h + 8, 2) & 1)
        return damaged("an entry is encrypted");
    *e = (struct zip_entry){.name = (const char *)h + 46,
                            .length = (size_t)name,
                            .method = (int)number(h + 10, 2),
                            .crc = (uint32_t)number(h + 16, 4),
                            .packed = number(h + 20, 4),
                            .size = number(h + 24, 4),
                            .offset = number(h + 42, 4)};
    TRY(read_extra(h + 46 + name, (size_t)extra, e));
    if (e->method == ZIP_STORED && e->packed != e->size)
        return damaged("an entry has two sizes");
    TRY(find_data(a, e));
    *at += 46 + name + extra + note;
    return 0;
}

int zip_directory(const uint8_t *archive, size_t size, struct zip_entry **entries, size_t *count)
{
    const struct archive a = {archive, size};
    struct directory d = {0};
    *entries = NULL;
    *count = 0;
    TRY(find_directory(&a, &d));
    struct zip_entry *list = malloc((size_t)(d.size / 46 + 1) * sizeof *list);
    if (!list)
        return fail(ERR_NOMEM, "out of memory for the zip directory");
    size_t n = 0;
    for (uint64_t at = 0; at < d.size; n++) {
        int code = read_entry(&a, &d, &at, &list[n]);
        if (code < 0) {
            free(list);
            return code;
        }
    }
    *entries = list;
    *count = n;
    return 0;
}

// ---- data ---------------------------------------------------------------------------------------

struct zip_stream {
    const uint8_t *next; // packed bytes
    uint64_t packed;     // of them left
    uint64_t left;       // unpacked bytes left
    uint32_t crc, wanted;
    bool deflated;
    z_stream z;
};

int zip_stream_open(const uint8_t *archive, const struct zip_entry *e, struct zip_stream **out)
{
    *out = NULL;
    if (e->method != ZIP_STORED && e->method != ZIP_DEFLATED)
        return fail(ERR_INPUT, "an entry is compressed by method %d, which is not read", e->method);
    struct zip_stream *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "out of memory reading a zip archive");
    s->next = archive + e->offset;
    s->packed = e->packed;
    s->left = e->size;
    s->wanted = e->crc;
    s->deflated = e->method == ZIP_DEFLATED;
    if (s->deflated && inflateInit2(&s->z, -MAX_WBITS) != Z_OK) {
        free(s);
        return fail(ERR_NOMEM, "out of memory reading a zip archive");
    }
    *out = s;
    return 0;
}

// Unpacks up to `bytes`, which fit zlib's counters; returns how many.
static int64_t unpack(struct zip_stream *s, uint8_t *to, uint32_t bytes)
{
    const uint32_t given = s->packed < UINT32_MAX ? (uint32_t)s->packed : UINT32_MAX;
    s->z.next_in = (Bytef *)s->next;
    s->z.avail_in = given;
    s->z.next_out = to;
    s->z.avail_out = bytes;
    const int status = inflate(&s->z, Z_NO_FLUSH);
    s->next += given - s->z.avail_in;
    s->packed -= given - s->z.avail_in;
    if (status != Z_OK && status != Z_STREAM_END)
        return damaged("the compressed data of an entry is damaged or cut short");
    if (status == Z_STREAM_END && s->z.avail_out)
        return damaged("an entry holds less than its directory says");
    return bytes - s->z.avail_out;
}

static int64_t take(struct zip_stream *s, uint8_t *to, uint32_t bytes)
{
    if (s->deflated)
        return unpack(s, to, bytes);
    memcpy(to, s->next, bytes); // zip_directory() found packed equal to size
    s->next += bytes;
    return bytes;
}

int zip_stream_read(struct zip_stream *s, void *to, size_t bytes)
{
    uint8_t *at = to;
    if (bytes > s->left)
        return damaged("an entry is shorter than its contents");
    s->left -= bytes;
    while (bytes > 0) {
        const uint32_t piece = bytes < 1u << 30 ? (uint32_t)bytes : 1u << 30;
        const int64_t got = take(s, at, piece);
        TRY((int)got);
        s->crc = (uint32_t)crc32(s->crc, at, (uInt)got);
        at += got;
        bytes -= (size_t)got;
    }
    if (!s->left && s->crc != s->wanted)
        return damaged("an entry's checksum is wrong");
    return 0;
}

void zip_stream_close(struct zip_stream *s)
{
    if (s && s->deflated)
        inflateEnd(&s->z);
    free(s);
}
