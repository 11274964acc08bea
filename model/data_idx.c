// MNIST's IDX files, plain or gzipped. Format: a big-endian magic number (0x803 images, 0x801
// labels), the count, for images rows and columns, then a byte for every pixel or label.
#include "model/data_kinds.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

enum { MAGIC_IMAGES = 0x803, MAGIC_LABELS = 0x801, CLASSES = 10, DEFAULT_SIZE = 32 };

#define FRESH "get a fresh copy of the dataset"

int idx_present(const char *directory)
{
    DIR *d = opendir(directory);
    int found = 0;
    for (struct dirent *e = d ? readdir(d) : NULL; e && !found; e = readdir(d))
        found = !strncmp(e->d_name, "train-images-idx3-ubyte", 23) ||
                !strncmp(e->d_name, "t10k-images-idx3-ubyte", 22);
    if (d)
        closedir(d);
    return found;
}

// ---- a file's bytes, inflated where they are gzipped --------------------------------------------

struct source {
    char path[4096];
    FILE *file;
    uint64_t bytes; // of the file
    bool gzip, ended;
    z_stream z;
    uint8_t input[1 << 16];
};

static int try_path(struct source *s, const char *directory, const char *name, const char *suffix)
{
    int n = snprintf(s->path, sizeof s->path, "%s/%s%s", directory, name, suffix);
    if (n < 0 || (size_t)n >= sizeof s->path)
        return fail(ERR_INPUT, "%.64s...: path too long", directory);
    s->file = fopen(s->path, "rbe");
    return 0;
}

static int source_start(struct source *s)
{
    struct stat info;
    if (fstat(fileno(s->file), &info) < 0)
        return fail(ERR_IO, "%s: cannot be read: %s", s->path, strerror(errno));
    if (!S_ISREG(info.st_mode))
        return fail(ERR_IO, "%s: cannot be read: not a regular file", s->path);
    s->bytes = (uint64_t)info.st_size;
    int first = fgetc(s->file), second = fgetc(s->file);
    s->gzip = first == 0x1f && second == 0x8b;
    rewind(s->file);
    if (s->gzip && inflateInit2(&s->z, 15 + 16) != Z_OK)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    return 0;
}

static void source_close(struct source *s)
{
    if (s->gzip)
        inflateEnd(&s->z);
    if (s->file)
        fclose(s->file);
    free(s);
}

static int source_open(const char *directory, const char *name, struct source **out)
{
    *out = NULL;
    struct source *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "%s: out of memory", directory);
    int code = try_path(s, directory, name, "");
    if (code == 0 && !s->file)
        code = try_path(s, directory, name, ".gz");
    if (code == 0 && !s->file)
        code = fail(ERR_IO, "%s/%s[.gz]: cannot be opened: %s; " FRESH, directory, name,
                    strerror(errno));
    if (code == 0)
        code = source_start(s);
    if (code < 0) {
        source_close(s);
        return code;
    }
    *out = s;
    return 0;
}

static int refill(struct source *s)
{
    s->z.next_in = s->input;
    s->z.avail_in = (uInt)fread(s->input, 1, sizeof s->input, s->file);
    if (ferror(s->file))
        return fail(ERR_IO, "%s: cannot be read: %s", s->path, strerror(errno));
    if (s->z.avail_in == 0)
        return fail(ERR_INPUT, "%s: the file is cut short; " FRESH, s->path);
    return 0;
}

// Up to `bytes` bytes; fewer only at the end of the gzip stream.
static int64_t inflate_some(struct source *s, uint8_t *to, size_t bytes)
{
    size_t done = 0;
    while (done < bytes && !s->ended) {
        if (s->z.avail_in == 0)
            TRY(refill(s));
        size_t most = bytes - done < 1u << 30 ? bytes - done : 1u << 30;
        s->z.next_out = to + done;
        s->z.avail_out = (uInt)most;
        int result = inflate(&s->z, Z_NO_FLUSH);
        done += most - s->z.avail_out;
        s->ended = result == Z_STREAM_END;
        if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR)
            return fail(ERR_INPUT, "%s: damaged gzip data; " FRESH, s->path);
    }
    return (int64_t)done;
}

static int64_t read_some(struct source *s, uint8_t *to, size_t bytes)
{
    if (s->gzip)
        return inflate_some(s, to, bytes);
    size_t n = fread(to, 1, bytes, s->file);
    if (ferror(s->file))
        return fail(ERR_IO, "%s: cannot be read: %s", s->path, strerror(errno));
    return (int64_t)n;
}

static int source_read(struct source *s, uint8_t *to, uint64_t bytes)
{
    int64_t n = read_some(s, to, bytes);
    if (n < 0)
        return (int)n;
    return (uint64_t)n == bytes ? 0 : fail(ERR_INPUT, "%s: the file is cut short; " FRESH, s->path);
}

// Nothing may follow: neither in the stream nor, for gzip, behind it.
static int source_end(struct source *s)
{
    uint8_t more;
    int64_t n = read_some(s, &more, 1);
    if (n < 0)
        return (int)n;
    if (n > 0 || (s->gzip && (s->z.avail_in > 0 || fgetc(s->file) != EOF)))
        return fail(ERR_INPUT, "%s: there are bytes after the last entry; " FRESH, s->path);
    return 0;
}

// ---- IDX ----------------------------------------------------------------------------------------

static uint32_t big_endian(const uint8_t *b)
{
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

// Reads magic and `dims` lengths, and checks that the file can hold their product (deflate shrinks
// by 1032 at most), so that a wrong header never makes us allocate more than a file could fill.
static int read_header(struct source *s, uint32_t magic, int dims, uint32_t *lengths,
                       uint64_t *entries)
{
    uint8_t header[16];
    TRY(source_read(s, header, 4 + 4 * (size_t)dims));
    if (big_endian(header) != magic)
        return fail(ERR_INPUT, "%s: magic number is 0x%08x, expected 0x%08x: not an IDX file of %s",
                    s->path, big_endian(header), magic, dims == 3 ? "images" : "labels");
    *entries = 1;
    for (int i = 0; i < dims; i++) {
        lengths[i] = big_endian(header + 4 + 4 * i);
        if (lengths[i] == 0 || (i > 0 && lengths[i] > 4096))
            return fail(ERR_INPUT, "%s: length %u in its header is not possible; " FRESH, s->path,
                        lengths[i]);
        *entries *= lengths[i];
    }
    if (*entries > s->bytes * (s->gzip ? 1032 : 1))
        return fail(
            ERR_INPUT,
            "%s: %llu bytes of %s in its header, more than the file can hold: cut short; " FRESH,
            s->path, (unsigned long long)*entries, dims == 3 ? "pixels" : "labels");
    return 0;
}

static int read_body(struct source *s, uint64_t entries, uint8_t **out)
{
    *out = malloc((size_t)entries);
    if (!*out)
        return fail(ERR_NOMEM, "%s: out of memory for %llu bytes", s->path,
                    (unsigned long long)entries);
    TRY(source_read(s, *out, entries));
    return source_end(s);
}

static int read_images(struct dataset *d, struct source *s)
{
    uint32_t lengths[3] = {0};
    uint64_t entries = 0;
    TRY(read_header(s, MAGIC_IMAGES, 3, lengths, &entries));
    d->count = lengths[0];
    d->rows = (int)lengths[1];
    d->columns = (int)lengths[2];
    return read_body(s, entries, &d->pixels8);
}

static int read_labels(struct dataset *d, struct source *s)
{
    uint32_t length = 0;
    uint64_t entries = 0;
    TRY(read_header(s, MAGIC_LABELS, 1, &length, &entries));
    if (length != d->count)
        return fail(ERR_INPUT, "%s: %u labels, but there are %lld images; " FRESH, s->path, length,
                    (long long)d->count);
    TRY(read_body(s, entries, &d->labels8));
    for (int64_t i = 0; i < d->count; i++)
        if (d->labels8[i] >= CLASSES)
            return fail(ERR_INPUT, "%s: label %d of image %lld is not 0 to %d; " FRESH, s->path,
                        d->labels8[i], (long long)i, CLASSES - 1);
    return 0;
}

static int read_part(struct dataset *d, enum data_split split, const char *what,
                     int (*read)(struct dataset *d, struct source *s))
{
    char name[64];
    struct source *s;
    snprintf(name, sizeof name, "%s-%s-ubyte", split == DATA_TRAIN ? "train" : "t10k", what);
    TRY(source_open(d->path, name, &s));
    int code = read(d, s);
    source_close(s);
    return code;
}

// ---- names --------------------------------------------------------------------------------------

static const char *const garments[CLASSES] = {"T-shirt/top", "Trouser",   "Pullover", "Dress",
                                              "Coat",        "Sandal",    "Shirt",    "Sneaker",
                                              "Bag",         "Ankle boot"};
static const char *const digits[CLASSES] = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"};

// The files of MNIST and Fashion-MNIST look alike; their first labels (train, t10k) tell. Where
// they do not, the path is asked.
static const char *const *names_of(const struct dataset *d)
{
    static const uint8_t first[4][10] = {{9, 0, 0, 3, 0, 2, 7, 2, 5, 5},
                                         {9, 2, 1, 1, 6, 1, 4, 6, 5, 7},
                                         {5, 0, 4, 1, 9, 2, 1, 3, 1, 4},
                                         {7, 2, 1, 0, 4, 1, 4, 9, 5, 9}};
    for (int i = 0; i < 4; i++)
        if (d->count >= 10 && !memcmp(d->labels8, first[i], 10))
            return i < 2 ? garments : digits;
    return strcasestr(d->path, "fashion") ? garments : digits;
}

static int set_names(struct dataset *d)
{
    const char *const *names = names_of(d);
    d->class_names = calloc(CLASSES, sizeof *d->class_names);
    if (!d->class_names)
        return fail(ERR_NOMEM, "%s: out of memory", d->path);
    d->classes = CLASSES;
    for (int c = 0; c < CLASSES; c++)
        if (!(d->class_names[c] = strdup(names[c])))
            return fail(ERR_NOMEM, "%s: out of memory", d->path);
    return 0;
}

// ---- the dataset --------------------------------------------------------------------------------

int idx_open(struct dataset *d, enum data_split split)
{
    TRY(read_part(d, split, "images-idx3", read_images));
    TRY(read_part(d, split, "labels-idx1", read_labels));
    d->size = d->size ? d->size : DEFAULT_SIZE;
    d->channels = d->channels ? d->channels : 1;
    if (d->size < d->rows || d->size < d->columns)
        return fail(ERR_INPUT,
                    "%s: its images are %d x %d: image size %d is too small to hold them", d->path,
                    d->rows, d->columns, d->size);
    return set_names(d);
}

void idx_image(const struct dataset *d, int64_t i, bool flip, float *out)
{
    const size_t size = (size_t)d->size, rows = (size_t)d->rows, columns = (size_t)d->columns;
    const uint8_t *from = d->pixels8 + (size_t)i * rows * columns;
    for (size_t k = 0; k < size * size; k++)
        out[k] = -1.0f;
    float *to = out + (size - rows) / 2 * size + (size - columns) / 2;
    for (size_t y = 0; y < rows; y++)
        for (size_t x = 0; x < columns; x++)
            to[y * size + x] =
                (float)from[y * columns + (flip ? columns - 1 - x : x)] / 127.5f - 1.0f;
    for (int c = 1; c < d->channels; c++)
        memcpy(out + (size_t)c * size * size, out, size * size * sizeof *out);
}
