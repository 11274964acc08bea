// Inside the CUDA backend: what its handles hold. Only devices/cuda*.c include this.
//
// cuda_api.c opens NVIDIA's libraries; cuda_list.c finds devices; cuda.c has the verbs;
// cuda_gemm.c multiplies matrices. Every driver call goes through CU(), which turns a code into a
// message that names it.
#ifndef DITMOE_CUDA_H
#define DITMOE_CUDA_H

#include "devices/cuda_api.h"
#include "devices/device.h"

// kernels.cl compiled as CUDA, with activations as f32 and as bf16: fat binaries of all
// architectures the build was asked for. Size 0: built without nvcc.
extern const unsigned char cuda_kernels_f32[], cuda_kernels_bf16[];
extern const size_t cuda_kernels_f32_size, cuda_kernels_bf16_size;

// A device opened. `base` is first: a struct device * of this backend is one of these.
struct cuda_device {
    struct device base;
    const struct cuda_api *api;
    cuda_device_id id;
    cuda_context context; // the device's primary context, shared with other users in this process
    cuda_module module;
    cuda_function kernels[KERNEL_COUNT]; // NULL: CPU forms
    struct cuda_gemm *gemm;              // cuda_gemm.c's own state
    struct cuda_tuned *tuned;            // cuda_tuned.c's
};

// An allocation, or a view of one.
struct mem {
    struct cuda_device *dev;
    cuda_address address;
    size_t bytes;
    bool is_view;
    bool is_reached; // another process's
};

struct stream {
    struct cuda_device *dev;
    cuda_stream cu;
    struct cuda_staging *staging; // cuda_staging.c's own state, or NULL
};

struct event {
    struct cuda_device *dev;
    cuda_event cu;
    bool recorded;
};

static inline struct cuda_device *cuda_device_of(struct device *dev)
{
    return (struct cuda_device *)(void *)dev;
}

// Sets the message "CUDA: WHAT failed: NAME (code)" and returns ERR_NOMEM or ERR_DRIVER; of errors
// after which the driver refuses all further work on the device it says so and returns ERR_LOST.
int cuda_fail(const struct cuda_api *api, cuda_result code, const char *what);

// Passes a failed driver call up: CU(api, api->stream_sync(s), "cuStreamSynchronize").
#define CU(api, call, what)                       \
    do {                                          \
        cuda_result cu_code = (call);             \
        if (cu_code != CUDA_OK)                   \
            return cuda_fail(api, cu_code, what); \
    } while (0)

// The device's context becomes this thread's: first of all in whatever calls the driver.
static inline int enter(const struct cuda_device *dev)
{
    CU(dev->api, dev->api->context_set(dev->context), "cuCtxSetCurrent");
    return 0;
}

// cuda_list.c: see list and note in device.h.
int cuda_list(struct device_info *out, int max);
const char *cuda_note(void);

// cuda_links.c: see link in device.h. NVLink connections of a device that are up, 0 where NVML is
// not installed; the driver's own version ("580.95.05"), or "".
int cuda_link(const struct device_info *from, const struct device_info *to,
              struct device_link *out);
int cuda_nvlinks(const char *pci);
void cuda_driver_name(char *out, size_t size);

// cuda_staging.c: a write that does not wait; CUDA_NOT_STAGED when it is too large for that, or
// there is no page-locked memory. The stream has no work left when its staging is freed.
enum { CUDA_STAGED_MAX = 4 << 20, CUDA_NOT_STAGED = 1 };
int cuda_write_staged(struct stream *s, cuda_address to, const void *from, size_t bytes);
void cuda_staging_free(struct stream *s);

// cuda_share.c: see alloc_shared and reach in device.h; release() is free() of what was reached.
int cuda_alloc_shared(struct device *dev, size_t bytes, struct mem **out,
                      unsigned char id[SHARE_ID]);
int cuda_reach(struct device *dev, const unsigned char id[SHARE_ID], struct mem **out);
void cuda_release(struct mem *mem);

// cuda_nccl.c: see the verbs of groups in device.h.
int cuda_group_can(void);
int cuda_group_id(struct device *dev, unsigned char id[GROUP_ID]);
int cuda_group_open(struct device *dev, const unsigned char id[GROUP_ID], int member, int members,
                    struct group **out);
void cuda_group_close(struct group *group);
int cuda_group_begin(struct group *group);
int cuda_group_end(struct group *group);
int cuda_group_send(struct group *group, struct stream *s, const struct mem *src, size_t offset,
                    size_t bytes, int member);
int cuda_group_receive(struct group *group, struct stream *s, struct mem *dst, size_t offset,
                       size_t bytes, int member);
int cuda_group_sum(struct group *group, struct stream *s, struct mem *at, size_t offset,
                   size_t count);

// cuda_gemm.c: see struct gemm and gemm_space in device.h.
int cuda_gemm(struct stream *s, const struct gemm *g);
size_t cuda_gemm_space(struct device *dev, const struct gemm *g);
int cuda_gemm_norms(struct device *dev, const struct gemm *g);
void cuda_gemm_close(struct cuda_device *dev);

#endif
