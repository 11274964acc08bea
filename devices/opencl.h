// Inside the OpenCL backend: what its handles hold. Only devices/*.c include this.
//
// opencl_list.c finds devices; opencl.c has the verbs; opencl_program.c builds kernels.cl and keeps
// the result on disk; opencl_gemm.c multiplies matrices. Every driver call goes through CL(), which
// turns a code into a message that names it.
#ifndef DITMOE_OPENCL_H
#define DITMOE_OPENCL_H

#include <CL/cl.h>

#include "devices/device.h"

// A device opened. `base` is first: a struct device * of this backend is one of these.
struct opencl_device {
    struct device base;
    cl_platform_id platform;
    cl_device_id id;
    cl_context context;
    cl_program program;
    cl_kernel kernels[KERNEL_COUNT]; // NULL: a CPU form on a device that is no CPU
};

// An allocation (offset 0), or a view of one: the same driver's buffer, and where in it.
struct mem {
    struct opencl_device *dev;
    cl_mem cl;
    size_t offset; // bytes from the start of cl
    size_t bytes;
    bool is_view;
    void *mapped; // memory that processes share (opencl_share.c), or NULL
    int file;     // of it, by which others find it; -1: theirs
    bool is_reached; // another process's
};

// An in-order queue with profiling.
struct stream {
    struct opencl_device *dev;
    cl_command_queue queue;
    struct mem *turns; // CPU devices: two counters by which a product's work-items share its blocks
    cl_mem scratch;    // opencl_clblast.c: a view as CLBlast takes one, a sub-buffer; NULL: none yet
    cl_mem scratch_in; // the allocation it lies in, and where
    size_t scratch_at, scratch_bytes;
};

struct event {
    struct opencl_device *dev;
    cl_event cl; // NULL until recorded
};

static inline struct opencl_device *opencl_device_of(struct device *dev)
{
    return (struct opencl_device *)(void *)dev;
}

// "CL_OUT_OF_RESOURCES" for -5; "an unknown code" for what is not in the standard.
const char *opencl_error_name(cl_int code);

// Sets the message "OpenCL: WHAT failed: CL_NAME (code)" and returns ERR_NOMEM or ERR_DRIVER.
int opencl_fail(cl_int code, const char *what);

// All devices of all platforms in the drivers' order, and the platform each belongs to; both arrays
// hold OPENCL_DEVICES_MAX. Returns the count, 0 without any platform. opencl_list: see device.h.
enum { OPENCL_DEVICES_MAX = 64 };
int opencl_device_ids(cl_device_id *ids, cl_platform_id *owners);
int opencl_list(struct device_info *out, int max);

// The string of a device query, or "" ; the spaces around it taken off.
void opencl_device_string(cl_device_id id, cl_device_info what, char *out, size_t size);

// Passes a failed driver call up: CL(clFinish(queue), "clFinish").
#define CL(call, what)                         \
    do {                                       \
        cl_int cl_code = (call);               \
        if (cl_code != CL_SUCCESS)             \
            return opencl_fail(cl_code, what); \
    } while (0)

// opencl_program.c: builds kernels.cl for the device, from the disk cache where possible, and makes
// all kernels. ERR_DRIVER with the first errors of the build log, or with the names of the kernels
// that are missing or have another number of arguments than kernels.def says.
int opencl_program_open(struct opencl_device *dev);
void opencl_program_close(struct opencl_device *dev);

// The cache of program binaries, in the user's cache (devices/cache.h). `identity` is a text of all
// that the binary depends on. load sets dev->program and builds it: false when there is no file, or
// one that is corrupt, another's, or refused by the driver. save: false when it could not be kept.
bool opencl_binary_load(struct opencl_device *dev, const char *identity, const char *options);
bool opencl_binary_save(struct opencl_device *dev, const char *identity);

// opencl_share.c: see alloc_shared and reach in device.h; unmap() takes back what they mapped.
int opencl_alloc_shared(struct device *dev, size_t bytes, struct mem **out,
                        unsigned char id[SHARE_ID]);
int opencl_reach(struct device *dev, const unsigned char id[SHARE_ID], struct mem **out);
void opencl_unmap(struct mem *mem);

// opencl_gemm.c: see struct gemm and gemm_space in device.h.
int opencl_gemm(struct stream *s, const struct gemm *g);
size_t opencl_gemm_space(struct device *dev, const struct gemm *g);
size_t opencl_gemm_packed(struct device *dev, const struct gemm *g);
int opencl_gemm_pack(struct stream *s, const struct gemm *g);

#endif
