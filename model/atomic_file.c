// See atomic_file.h. The lock is flock(): it goes with the process, however that ends, so a
// temporary whose lock is free has lost its writer.
#include "model/atomic_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

struct atomic_file {
    int fd;
    char *path, *temporary, *directory;
};

// ---- names --------------------------------------------------------------------------------------

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static char *directory_of(const char *path)
{
    size_t n = (size_t)(base_name(path) - path);
    return n ? strndup(path, n) : strdup(".");
}

// Is `entry` the name of a temporary of `base`: BASE.tmp.DIGITS?
static int is_temporary(const char *entry, const char *base)
{
    size_t n = strlen(base);
    if (strncmp(entry, base, n) || strncmp(entry + n, ".tmp.", 5))
        return 0;
    const char *digits = entry + n + 5;
    return *digits && strspn(digits, "0123456789") == strlen(digits);
}

// ---- leftovers ----------------------------------------------------------------------------------

static void remove_if_dead(int directory, const char *name)
{
    int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        unlinkat(directory, name, 0);
    close(fd);
}

// Best effort: a leftover that cannot be removed is no reason not to write.
static void remove_leftovers(const struct atomic_file *f)
{
    DIR *d = opendir(f->directory);
    if (!d)
        return;
    for (struct dirent *e = readdir(d); e; e = readdir(d))
        if (is_temporary(e->d_name, base_name(f->path)))
            remove_if_dead(dirfd(d), e->d_name);
    closedir(d);
}

// ---- the file -----------------------------------------------------------------------------------

static void release(struct atomic_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    free(f->temporary);
    free(f->directory);
    free(f);
}

static int io_error(const struct atomic_file *f, const char *what)
{
    return fail(ERR_IO, "%s: cannot %s: %s", f->path, what, strerror(errno));
}

static int open_temporary(struct atomic_file *f)
{
    struct stat s;
    if (!stat(f->path, &s) && !S_ISREG(s.st_mode))
        return fail(ERR_IO, "%s: cannot be written: not a regular file", f->path);
    remove_leftovers(f);
    f->fd = open(f->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f->fd < 0)
        return io_error(f, "be created");
    if (flock(f->fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK)
        return fail(ERR_IO, "%s: another process is writing it", f->path);
    return 0;
}

int atomic_file_create(const char *path, struct atomic_file **out)
{
    *out = NULL;
    struct atomic_file *f = calloc(1, sizeof *f);
    if (!f)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    f->fd = -1;
    f->path = strdup(path);
    f->directory = directory_of(path);
    if (!f->path || !f->directory ||
        asprintf(&f->temporary, "%s.tmp.%ld", path, (long)getpid()) < 0) {
        f->temporary = NULL;
        release(f);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    int code = open_temporary(f);
    if (code < 0) {
        release(f);
        return code;
    }
    *out = f;
    return 0;
}

int atomic_file_write(struct atomic_file *f, const void *data, size_t bytes)
{
    const char *p = data;
    while (bytes > 0) {
        ssize_t n = write(f->fd, p, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(f, "be written");
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

int atomic_file_write_at(struct atomic_file *f, uint64_t offset, const void *data, size_t bytes)
{
    const char *p = data;
    while (bytes > 0) {
        ssize_t n = pwrite(f->fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return io_error(f, "be written");
        p += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return 0;
}

// The new name must outlast a power cut too. Some file systems cannot sync a directory: not an
// error.
static int sync_directory(const struct atomic_file *f)
{
    int fd = open(f->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    int result = fsync(fd);
    int failed = result < 0 && errno == EIO;
    close(fd);
    errno = EIO;
    return failed ? io_error(f, "be made durable") : 0;
}

int atomic_file_commit(struct atomic_file *f)
{
    int code = 0;
    if (fsync(f->fd) < 0)
        code = io_error(f, "be written");
    else if (rename(f->temporary, f->path) < 0)
        code = io_error(f, "be put in place");
    if (code < 0) {
        atomic_file_abort(f);
        return code;
    }
    code = sync_directory(f);
    release(f);
    return code;
}

void atomic_file_abort(struct atomic_file *f)
{
    if (!f)
        return;
    unlink(f->temporary);
    release(f);
}
