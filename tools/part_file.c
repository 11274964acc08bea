// See part_file.h. The file: a page of text, then a byte an item, then the items.
#include "tools/part_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "devices/hash.h"

enum { PAGE = 4096 };

static int io_error(const struct part_file *f, const char *what)
{
    return fail(ERR_IO, "%s: cannot %s: %s", f->path, what, strerror(errno));
}

static off_t items_at(const struct part_file *f, int64_t item)
{
    const int64_t pages = (f->count + PAGE - 1) / PAGE;
    return (off_t)(PAGE + pages * PAGE + item * (int64_t)f->item);
}

static int write_at(const struct part_file *f, off_t at, const void *data, size_t bytes)
{
    const char *p = data;
    while (bytes > 0) {
        const ssize_t n = pwrite(f->fd, p, bytes, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(f, "be written");
        p += n;
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int read_at(const struct part_file *f, off_t at, void *data, size_t bytes)
{
    char *p = data;
    while (bytes > 0) {
        const ssize_t n = pread(f->fd, p, bytes, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(f, "be read");
        if (n == 0)
            return fail(ERR_INPUT, "%s: cut short; remove it to start again", f->path);
        p += n;
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

// ---- opening ------------------------------------------------------------------------------------

// The first page: what the items are. A hash stands for a description that is longer.
static void make_page(const struct part_file *f, const char *description, char page[PAGE])
{
    const uint64_t hash = hash_bytes(HASH_START, description, strlen(description));
    memset(page, 0, PAGE);
    snprintf(page, PAGE, "ditmoe part 1\n%016llx %lld x %zu bytes\n%.3900s\n",
             (unsigned long long)hash, (long long)f->count, f->item, description);
}

static int start(struct part_file *f, const char page[PAGE])
{
    TRY(write_at(f, PAGE, f->done, (size_t)f->count));
    return write_at(f, 0, page, PAGE); // last, so that a file with it is whole
}

static int go_on(struct part_file *f, const char page[PAGE])
{
    char found[PAGE];
    TRY(read_at(f, 0, found, PAGE));
    if (memcmp(found, page, PAGE) != 0)
        return fail(ERR_INPUT,
                    "%s: holds part of a run with other settings (its first lines say which): "
                    "give those again, or remove it",
                    f->path);
    TRY(read_at(f, PAGE, f->done, (size_t)f->count));
    for (int64_t i = 0; i < f->count; i++)
        f->left -= f->done[i] == 1;
    return 0;
}

static int open_file(struct part_file *f, const char *description)
{
    char page[PAGE], first = 0;
    struct stat info;
    f->fd = open(f->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (f->fd < 0)
        return io_error(f, "be opened");
    if (flock(f->fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK)
        return fail(ERR_IO, "%s: another process is writing it", f->path);
    if (fstat(f->fd, &info) < 0 || !S_ISREG(info.st_mode))
        return fail(ERR_IO, "%s: cannot be written: not a regular file", f->path);
    make_page(f, description, page);
    if (info.st_size > 0)
        TRY(read_at(f, 0, &first, 1));
    return first ? go_on(f, page) : start(f, page);
}

int part_file_open(const char *path, const char *description, int64_t count, size_t item,
                   struct part_file *out)
{
    *out = (struct part_file){.fd = -1, .count = count, .item = item, .left = count};
    out->path = strdup(path);
    out->done = calloc((size_t)count, 1);
    int code = out->path && out->done ? open_file(out, description)
                                      : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code < 0)
        part_file_close(out);
    return code;
}

int part_file_follow(int64_t count, size_t item, struct part_file *out)
{
    *out = (struct part_file){.fd = -1, .count = count, .item = item, .left = count};
    out->done = calloc((size_t)count, 1);
    return out->done ? 0 : fail(ERR_NOMEM, "out of memory for %lld images", (long long)count);
}

void part_file_close(struct part_file *f)
{
    if (f->path && f->fd >= 0)
        close(f->fd);
    free(f->path);
    free(f->done);
    *f = (struct part_file){.fd = -1};
}

int part_file_remove(struct part_file *f)
{
    const int code = unlink(f->path) < 0 ? io_error(f, "be removed") : 0;
    part_file_close(f);
    return code;
}

// ---- items --------------------------------------------------------------------------------------

int part_file_put(struct part_file *f, int64_t first, int64_t count, const void *items)
{
    if (f->fd >= 0)
        TRY(write_at(f, items_at(f, first), items, (size_t)count * f->item));
    if (f->fd >= 0 && fdatasync(f->fd) < 0)
        return io_error(f, "be written");
    for (int64_t i = first; i < first + count; i++) {
        f->left -= !f->done[i];
        f->done[i] = 1;
    }
    return f->fd >= 0 ? write_at(f, PAGE + first, f->done + first, (size_t)count) : 0;
}

int part_file_get(const struct part_file *f, int64_t first, int64_t count, void *items)
{
    return read_at(f, items_at(f, first), items, (size_t)count * f->item);
}
