#include "model/mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int map(int fd, struct mapped_file *out)
{
    struct stat info;
    if (fstat(fd, &info) < 0 || !S_ISREG(info.st_mode))
        return fail(ERR_IO, "cannot be read: not a regular file");
    if (!info.st_size)
        return fail(ERR_INPUT, "it is empty");
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        return fail(ERR_IO, "cannot be mapped: %s", strerror(errno));
    *out = (struct mapped_file){data, (size_t)info.st_size};
    return 0;
}

int mapped_file_open(const char *path, struct mapped_file *out)
{
    *out = (struct mapped_file){0};
    // without O_NONBLOCK a named pipe would wait for its writer
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return fail(ERR_IO, "cannot be opened: %s", strerror(errno));
    int code = map(fd, out);
    close(fd);
    return code;
}

void mapped_file_close(struct mapped_file *f)
{
    if (f->data)
        munmap((void *)f->data, f->size);
    *f = (struct mapped_file){0};
}
