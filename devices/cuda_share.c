// The CUDA backend: memory that other processes of the machine map (CUDA's interprocess handles),
// each for its own device: over NVLink or PCIe, where the driver lets one device reach the other's
// memory.
#include "devices/cuda.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// The driver's own unit: a smaller allocation may share one with others, which the handle would not
// tell apart.
enum { WHOLE = 2 << 20 };

// What an id holds: the driver's handle, and which process made it, of how many bytes.
struct shared_id {
    cuda_ipc_memory handle;
    uint64_t bytes;
    int32_t pid;
};

static bool has_functions(const struct cuda_api *api)
{
    return api->ipc_get && api->ipc_open && api->ipc_close;
}

int cuda_alloc_shared(struct device *base, size_t bytes, struct mem **out,
                      unsigned char id[SHARE_ID])
{
    const struct cuda_device *dev = cuda_device_of(base);
    struct shared_id made = {.pid = (int32_t)getpid()};
    _Static_assert(sizeof made <= SHARE_ID, "an id of shared memory");
    if (!has_functions(dev->api))
        return fail(ERR_NODEVICE, "%s: this driver cannot share memory between processes",
                    base->info.key);
    TRY(base->api->alloc(base, (bytes + WHOLE - 1) / WHOLE * WHOLE, out));
    made.bytes = (*out)->bytes;
    const cuda_result code = dev->api->ipc_get(&made.handle, (*out)->address);
    if (code != CUDA_OK) {
        base->api->free(*out);
        *out = NULL;
        cuda_fail(dev->api, code, "cuIpcGetMemHandle");
        return fail_in(ERR_NODEVICE, "%s", base->info.key);
    }
    memset(id, 0, SHARE_ID);
    memcpy(id, &made, sizeof made);
    return 0;
}

int cuda_reach(struct device *base, const unsigned char id[SHARE_ID], struct mem **out)
{
    struct cuda_device *dev = cuda_device_of(base);
    struct shared_id given;
    *out = NULL;
    memcpy(&given, id, sizeof given);
    if (!has_functions(dev->api) || given.pid == (int32_t)getpid())
        return fail(ERR_NODEVICE, "%s: no memory of another process", base->info.key);
    TRY(enter(dev));
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    *mem = (struct mem){.dev = dev, .bytes = given.bytes, .is_reached = true};
    const cuda_result code = dev->api->ipc_open(&mem->address, given.handle, CUDA_IPC_PEER_ACCESS);
    if (code != CUDA_OK) {
        free(mem);
        cuda_fail(dev->api, code, "cuIpcOpenMemHandle");
        return fail_in(ERR_NODEVICE, "%s", base->info.key);
    }
    *out = mem;
    return 0;
}

void cuda_release(struct mem *mem)
{
    if (enter(mem->dev) == 0)
        mem->dev->api->ipc_close(mem->address);
}
