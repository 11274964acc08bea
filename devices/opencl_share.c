// The OpenCL backend: memory that other processes of the machine map. On a CPU device a buffer can
// be any memory of the host's: here a file without a name (memfd_create), which the other process
// opens by /proc/PID/fd. A GPU's buffers have no name that another process knows.
#include "devices/opencl.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct shared_id {
    uint64_t bytes, device, inode; // of the file, to know it again
    int32_t pid, file;
};

static size_t whole_pages(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

// A buffer over `bytes` of an open file.
static int wrap(struct opencl_device *dev, int file, size_t bytes, struct mem **out)
{
    cl_int code;
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    void *at = mmap(NULL, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) {
        free(mem);
        return fail(ERR_NOMEM, "no host memory for %zu bytes between ranks", bytes);
    }
    *mem = (struct mem){.dev = dev, .bytes = bytes, .mapped = at, .file = -1};
    mem->cl =
        clCreateBuffer(dev->context, CL_MEM_READ_WRITE | CL_MEM_USE_HOST_PTR, bytes, at, &code);
    if (code != CL_SUCCESS) {
        opencl_unmap(mem);
        free(mem);
        return opencl_fail(code, "clCreateBuffer");
    }
    *out = mem;
    return 0;
}

void opencl_unmap(struct mem *mem)
{
    munmap(mem->mapped, whole_pages(mem->bytes));
    if (mem->file >= 0)
        close(mem->file);
}

int opencl_alloc_shared(struct device *base, size_t bytes, struct mem **out,
                        unsigned char id[SHARE_ID])
{
    struct shared_id made = {.bytes = bytes, .pid = (int32_t)getpid()};
    struct stat is;
    _Static_assert(sizeof made <= SHARE_ID, "an id of shared memory");
    *out = NULL;
    if (base->info.kind != DEVICE_CPU)
        return fail(ERR_NODEVICE,
                    "%s: OpenCL shares a device's memory between processes only on CPUs",
                    base->info.key);
    TRY(device_fits(base, bytes));
    made.file = memfd_create("ditmoe", MFD_CLOEXEC);
    if (made.file < 0 || ftruncate(made.file, (off_t)whole_pages(bytes)) != 0 ||
        fstat(made.file, &is) != 0)
        return fail(ERR_NOMEM, "no host memory for %zu bytes between ranks", bytes);
    made.device = is.st_dev, made.inode = is.st_ino;
    const int code = wrap(opencl_device_of(base), made.file, bytes, out);
    if (code < 0) {
        close(made.file);
        return code;
    }
    (*out)->file = made.file;
    base->allocations++;
    base->allocated += bytes;
    memset(id, 0, SHARE_ID);
    memcpy(id, &made, sizeof made);
    return 0;
}

int opencl_reach(struct device *base, const unsigned char id[SHARE_ID], struct mem **out)
{
    struct shared_id given;
    struct stat is;
    char path[64];
    *out = NULL;
    memcpy(&given, id, sizeof given);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)given.pid, (int)given.file);
    const int file = open(path, O_RDWR | O_CLOEXEC);
    const bool good = file >= 0 && fstat(file, &is) == 0 && is.st_dev == given.device &&
                      is.st_ino == given.inode && (uint64_t)is.st_size >= given.bytes;
    int code = good ? wrap(opencl_device_of(base), file, given.bytes, out)
                    : fail(ERR_NODEVICE, "%s: memory of process %d cannot be seen", base->info.key,
                           (int)given.pid);
    if (file >= 0)
        close(file);
    if (code >= 0)
        (*out)->is_reached = true;
    return code;
}
