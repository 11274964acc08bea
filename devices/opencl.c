// The OpenCL backend: the verbs of device.h on any OpenCL 1.2 driver.
//
// Memory is one cl_mem an allocation; a view is an offset into it, which kernels take beside the
// buffer (VIEW in kernels.cl). A stream is an in-order queue with profiling, so that events can
// time anything; the queue's order is the only ordering that a single stream needs.
#include "devices/opencl.h"
#include "devices/opencl_gemm.h"

#include <stdlib.h>
#include <string.h>

// ---- open and close ----------------------------------------------------------------------------

static void opencl_close(struct device *base)
{
    struct opencl_device *dev = opencl_device_of(base);
    if (!dev)
        return;
    opencl_program_close(dev);
    if (dev->context)
        clReleaseContext(dev->context);
    free(dev);
}

static int open_context(struct opencl_device *dev)
{
    cl_context_properties properties[] = {CL_CONTEXT_PLATFORM, (cl_context_properties)dev->platform,
                                          0};
    cl_int code;
    dev->context = clCreateContext(properties, 1, &dev->id, NULL, NULL, &code);
    CL(code, "clCreateContext");
    return 0;
}

static int opencl_open(const struct device_info *info, unsigned flags, struct device **out)
{
    cl_device_id ids[OPENCL_DEVICES_MAX];
    cl_platform_id owners[OPENCL_DEVICES_MAX];
    int code, count = opencl_device_ids(ids, owners);
    *out = NULL;
    TRY(count);
    if (info->index < 0 || info->index >= count)
        return fail(ERR_NODEVICE, "device %s is gone", info->key);
    struct opencl_device *dev = calloc(1, sizeof *dev);
    if (!dev)
        return fail(ERR_NOMEM, "out of host memory while opening %s", info->key);
    dev->base.api = &backend_opencl;
    dev->base.info = *info;
    dev->base.flags = flags;
    dev->base.act = flags & OPEN_BF16 ? BF16 : F32;
    dev->base.cpu_forms = info->kind == DEVICE_CPU && !(flags & OPEN_GPU_FORMS);
    dev->base.swiglu_columns =
        dev->base.cpu_forms ? opencl_gemm_cpu_panel(dev) : GEMM_GPU_SWIGLU;
    dev->base.rebuilds_hidden = !dev->base.cpu_forms;
    dev->id = ids[info->index];
    dev->platform = owners[info->index];
    TRY_OUT(open_context(dev));
    TRY_OUT(opencl_program_open(dev));
    *out = &dev->base;
    return 0;
out:
    opencl_close(&dev->base);
    return fail_in(code, "%s", info->key);
}

// ---- memory ------------------------------------------------------------------------------------

static int opencl_alloc(struct device *base, size_t bytes, struct mem **out)
{
    struct opencl_device *dev = opencl_device_of(base);
    cl_int code;
    *out = NULL;
    BUG_IF(bytes == 0);
    TRY(device_fits(base, bytes));
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    mem->cl = clCreateBuffer(dev->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    if (code != CL_SUCCESS) {
        free(mem);
        opencl_fail(code, "clCreateBuffer");
        return fail_in(ERR_NOMEM, "%s: %.1f MiB", base->info.key, mib(bytes));
    }
    mem->dev = dev;
    mem->bytes = bytes;
    base->allocations++;
    base->allocated += bytes;
    *out = mem;
    return 0;
}

static int opencl_view(struct mem *parent, size_t offset, size_t bytes, struct mem **out)
{
    *out = NULL;
    BUG_IF(bytes == 0 || offset > parent->bytes || bytes > parent->bytes - offset);
    BUG_IF(offset % parent->dev->base.info.align != 0);
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    mem->dev = parent->dev;
    mem->cl = parent->cl;
    mem->offset = parent->offset + offset;
    mem->bytes = bytes;
    mem->is_view = true;
    *out = mem;
    return 0;
}

static void opencl_free(struct mem *mem)
{
    if (!mem)
        return;
    if (!mem->is_view) {
        mem->dev->base.allocated -= mem->is_reached ? 0 : mem->bytes;
        clReleaseMemObject(mem->cl);
        if (mem->mapped)
            opencl_unmap(mem);
    }
    free(mem);
}

static size_t opencl_size(const struct mem *mem)
{
    return mem->bytes;
}

// ---- streams and transfers ---------------------------------------------------------------------

static void opencl_stream_free(struct stream *s)
{
    if (!s)
        return;
    clFinish(s->queue);
    if (s->scratch)
        clReleaseMemObject(s->scratch);
    clReleaseCommandQueue(s->queue);
    if (s->turns)
        opencl_free(s->turns);
    free(s);
}

static int make_turns(struct stream *s)
{
    static const cl_int zeros[2];
    TRY(opencl_alloc(&s->dev->base, sizeof zeros, &s->turns));
    CL(clEnqueueWriteBuffer(s->queue, s->turns->cl, CL_TRUE, 0, sizeof zeros, zeros, 0, NULL, NULL),
       "clEnqueueWriteBuffer");
    return 0;
}

static int opencl_stream_new(struct device *base, struct stream **out)
{
    struct opencl_device *dev = opencl_device_of(base);
    cl_int code;
    *out = NULL;
    struct stream *s = calloc(1, sizeof *s);
    if (!s)
        return fail(ERR_NOMEM, "out of host memory");
    s->dev = dev;
    s->queue = clCreateCommandQueue(dev->context, dev->id, CL_QUEUE_PROFILING_ENABLE, &code);
    if (code != CL_SUCCESS) {
        free(s);
        return opencl_fail(code, "clCreateCommandQueue");
    }
    int made = dev->base.cpu_forms ? make_turns(s) : 0;
    if (made < 0) {
        opencl_stream_free(s);
        return made;
    }
    *out = s;
    return 0;
}

static bool inside(const struct mem *mem, size_t offset, size_t bytes)
{
    return offset <= mem->bytes && bytes <= mem->bytes - offset;
}

static int enqueue_write(struct stream *s, struct mem *dst, size_t offset, const void *src,
                         size_t bytes, cl_bool wait)
{
    BUG_IF(!inside(dst, offset, bytes));
    if (bytes)
        CL(clEnqueueWriteBuffer(s->queue, dst->cl, wait, dst->offset + offset, bytes, src, 0, NULL,
                                NULL),
           "clEnqueueWriteBuffer");
    return 0;
}

static int enqueue_read(struct stream *s, const struct mem *src, size_t offset, void *dst,
                        size_t bytes, cl_bool wait)
{
    BUG_IF(!inside(src, offset, bytes));
    if (bytes)
        CL(clEnqueueReadBuffer(s->queue, src->cl, wait, src->offset + offset, bytes, dst, 0, NULL,
                               NULL),
           "clEnqueueReadBuffer");
    return 0;
}

static int opencl_write(struct stream *s, struct mem *dst, size_t offset, const void *src,
                        size_t bytes)
{
    return enqueue_write(s, dst, offset, src, bytes, CL_TRUE);
}

static int opencl_read(struct stream *s, const struct mem *src, size_t offset, void *dst,
                       size_t bytes)
{
    return enqueue_read(s, src, offset, dst, bytes, CL_TRUE);
}

static int opencl_write_begin(struct stream *s, struct mem *dst, size_t offset, const void *src,
                              size_t bytes)
{
    return enqueue_write(s, dst, offset, src, bytes, CL_FALSE);
}

static int opencl_read_begin(struct stream *s, const struct mem *src, size_t offset, void *dst,
                             size_t bytes)
{
    TRY(enqueue_read(s, src, offset, dst, bytes, CL_FALSE));
    CL(clFlush(s->queue), "clFlush");
    return 0;
}

static int opencl_copy(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                       size_t src_offset, size_t bytes)
{
    BUG_IF(!inside(dst, dst_offset, bytes) || !inside(src, src_offset, bytes));
    if (bytes)
        CL(clEnqueueCopyBuffer(s->queue, src->cl, dst->cl, src->offset + src_offset,
                               dst->offset + dst_offset, bytes, 0, NULL, NULL),
           "clEnqueueCopyBuffer");
    return 0;
}

// ---- work --------------------------------------------------------------------------------------

// A buffer is two arguments of the kernel: the driver's buffer and the offset in it.
static cl_int set_buffer(cl_kernel kernel, cl_uint index, const struct mem *mem)
{
    const cl_ulong offset = mem ? mem->offset : 0;
    cl_int code = clSetKernelArg(kernel, index, sizeof(cl_mem), mem ? &mem->cl : NULL);
    return code != CL_SUCCESS ? code : clSetKernelArg(kernel, index + 1, sizeof offset, &offset);
}

// Moves *index past the argument.
static cl_int set_arg(cl_kernel kernel, cl_uint *index, char letter, const union arg *arg)
{
    const cl_uint at = *index;
    *index += letter == 'b' ? 2 : 1;
    switch (letter) {
    case 'b':
        return set_buffer(kernel, at, arg->b);
    case 'i':
        return clSetKernelArg(kernel, at, sizeof arg->i, &arg->i);
    case 'u':
        return clSetKernelArg(kernel, at, sizeof arg->u, &arg->u);
    default:
        BUG_IF(letter != 'f');
        return clSetKernelArg(kernel, at, sizeof arg->f, &arg->f);
    }
}

static int opencl_launch(struct stream *s, enum kernel number, const int groups[3],
                         const union arg *args, int count)
{
    BUG_IF((unsigned)number >= KERNEL_COUNT);
    const struct kernel_spec *spec = &kernel_specs[number];
    cl_kernel kernel = s->dev->kernels[number];
    BUG_IF(!kernel || count != (int)strlen(spec->args));
    BUG_IF(groups[0] < 0 || groups[1] < 0 || groups[2] < 0);
    if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0)
        return 0;
    cl_uint index = 0;
    for (int i = 0; i < count; i++)
        CL(set_arg(kernel, &index, spec->args[i], &args[i]), spec->name);
    size_t local[3] = {(size_t)spec->group[0], (size_t)spec->group[1], 1};
    size_t global[3];
    for (int i = 0; i < 3; i++)
        global[i] = (size_t)groups[i] * local[i];
    CL(clEnqueueNDRangeKernel(s->queue, kernel, 3, NULL, global, local, 0, NULL, NULL), spec->name);
    return 0;
}

// A CPU's driver fills with one thread (PoCL: 7 GB/s); the kernel uses them all.
static int fill_by_kernel(struct stream *s, struct mem *dst, size_t offset, size_t bytes,
                          uint32_t pattern)
{
    enum { CHUNK = 1 << 16 };
    const size_t count = bytes / 4;
    const int groups[3] = {(int)((count + CHUNK - 1) / CHUNK), 1, 1};
    const union arg args[] = {{.b = dst}, {.u = (uint32_t)(offset / 4)}, {.u = (uint32_t)count},
                              {.u = pattern}, {.u = CHUNK}};
    return opencl_launch(s, KERNEL_fill_cpu, groups, args, 5);
}

static int opencl_fill(struct stream *s, struct mem *dst, size_t offset, size_t bytes,
                       uint32_t pattern)
{
    BUG_IF(!inside(dst, offset, bytes) || offset % 4 || bytes % 4);
    const bool large = bytes >= 1 << 20 && (offset + bytes) / 4 <= UINT32_MAX;
    if (large && s->dev->base.cpu_forms)
        return fill_by_kernel(s, dst, offset, bytes, pattern);
    if (bytes)
        CL(clEnqueueFillBuffer(s->queue, dst->cl, &pattern, sizeof pattern,
                               dst->offset + offset, bytes, 0, NULL, NULL),
           "clEnqueueFillBuffer");
    return 0;
}

static int opencl_accelerate(struct stream *s, enum accelerated op, const void *args)
{
    (void)s, (void)op, (void)args;
    return NOT_MINE;
}

// ---- events ------------------------------------------------------------------------------------

static int opencl_event_new(struct device *base, struct event **out)
{
    *out = calloc(1, sizeof **out);
    if (!*out)
        return fail(ERR_NOMEM, "out of host memory");
    (*out)->dev = opencl_device_of(base);
    return 0;
}

static void opencl_event_free(struct event *event)
{
    if (!event)
        return;
    if (event->cl)
        clReleaseEvent(event->cl);
    free(event);
}

static int opencl_record(struct stream *s, struct event *event)
{
    cl_event cl;
    CL(clEnqueueMarkerWithWaitList(s->queue, 0, NULL, &cl), "clEnqueueMarkerWithWaitList");
    if (event->cl)
        clReleaseEvent(event->cl);
    event->cl = cl;
    CL(clFlush(s->queue), "clFlush"); // or another queue could wait for ever
    return 0;
}

static int opencl_wait(struct stream *s, struct event *event)
{
    if (event->cl)
        CL(clEnqueueBarrierWithWaitList(s->queue, 1, &event->cl, NULL),
           "clEnqueueBarrierWithWaitList");
    return 0;
}

static int opencl_elapsed(struct event *from, struct event *to, double *seconds)
{
    cl_ulong start = 0, end = 0;
    BUG_IF(!from->cl || !to->cl);
    CL(clGetEventProfilingInfo(from->cl, CL_PROFILING_COMMAND_END, sizeof start, &start, NULL),
       "clGetEventProfilingInfo");
    CL(clGetEventProfilingInfo(to->cl, CL_PROFILING_COMMAND_END, sizeof end, &end, NULL),
       "clGetEventProfilingInfo");
    *seconds = 1e-9 * ((double)end - (double)start);
    return 0;
}

static int opencl_sync(struct stream *s)
{
    CL(clFinish(s->queue), "clFinish");
    return 0;
}

const struct backend backend_opencl = {
    .name = "opencl",
    .list = opencl_list,
    .open = opencl_open,
    .close = opencl_close,
    .alloc = opencl_alloc,
    .view = opencl_view,
    .free = opencl_free,
    .size = opencl_size,
    .alloc_shared = opencl_alloc_shared,
    .reach = opencl_reach,
    .stream_new = opencl_stream_new,
    .stream_free = opencl_stream_free,
    .write = opencl_write,
    .read = opencl_read,
    .write_begin = opencl_write_begin,
    .read_begin = opencl_read_begin,
    .copy = opencl_copy,
    .fill = opencl_fill,
    .launch = opencl_launch,
    .gemm_space = opencl_gemm_space,
    .gemm_packed = opencl_gemm_packed,
    .gemm_pack = opencl_gemm_pack,
    .gemm = opencl_gemm,
    .accelerate = opencl_accelerate,
    .event_new = opencl_event_new,
    .event_free = opencl_event_free,
    .record = opencl_record,
    .wait = opencl_wait,
    .elapsed = opencl_elapsed,
    .sync = opencl_sync,
};
