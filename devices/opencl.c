// The OpenCL backend: the verbs of device.h on any OpenCL 1.2 driver.
//
// Memory is one cl_mem an allocation; views are sub-buffers made from it, because kernels take no
// offsets. A stream is an in-order queue with profiling, so that events can time anything; the
// queue's order is the only ordering that a single stream needs.
#include "devices/opencl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PLATFORMS_MAX = 16, DEVICES_MAX = 64, ICD_FOUND_NO_PLATFORM = -1001 };

// ---- errors
// ----------------------------------------------------------------------------------------

const char *opencl_error_name(cl_int code)
{
    static const struct {
        cl_int code;
        const char *name;
    } names[] = {
#define NAME(code) {code, #code}
        NAME(CL_DEVICE_NOT_FOUND),
        NAME(CL_DEVICE_NOT_AVAILABLE),
        NAME(CL_COMPILER_NOT_AVAILABLE),
        NAME(CL_MEM_OBJECT_ALLOCATION_FAILURE),
        NAME(CL_OUT_OF_RESOURCES),
        NAME(CL_OUT_OF_HOST_MEMORY),
        NAME(CL_PROFILING_INFO_NOT_AVAILABLE),
        NAME(CL_MEM_COPY_OVERLAP),
        NAME(CL_BUILD_PROGRAM_FAILURE),
        NAME(CL_MAP_FAILURE),
        NAME(CL_MISALIGNED_SUB_BUFFER_OFFSET),
        NAME(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST),
        NAME(CL_COMPILE_PROGRAM_FAILURE),
        NAME(CL_LINKER_NOT_AVAILABLE),
        NAME(CL_LINK_PROGRAM_FAILURE),
        NAME(CL_DEVICE_PARTITION_FAILED),
        NAME(CL_KERNEL_ARG_INFO_NOT_AVAILABLE),
        NAME(CL_INVALID_VALUE),
        NAME(CL_INVALID_DEVICE_TYPE),
        NAME(CL_INVALID_PLATFORM),
        NAME(CL_INVALID_DEVICE),
        NAME(CL_INVALID_CONTEXT),
        NAME(CL_INVALID_QUEUE_PROPERTIES),
        NAME(CL_INVALID_COMMAND_QUEUE),
        NAME(CL_INVALID_HOST_PTR),
        NAME(CL_INVALID_MEM_OBJECT),
        NAME(CL_INVALID_BINARY),
        NAME(CL_INVALID_BUILD_OPTIONS),
        NAME(CL_INVALID_PROGRAM),
        NAME(CL_INVALID_PROGRAM_EXECUTABLE),
        NAME(CL_INVALID_KERNEL_NAME),
        NAME(CL_INVALID_KERNEL_DEFINITION),
        NAME(CL_INVALID_KERNEL),
        NAME(CL_INVALID_ARG_INDEX),
        NAME(CL_INVALID_ARG_VALUE),
        NAME(CL_INVALID_ARG_SIZE),
        NAME(CL_INVALID_KERNEL_ARGS),
        NAME(CL_INVALID_WORK_DIMENSION),
        NAME(CL_INVALID_WORK_GROUP_SIZE),
        NAME(CL_INVALID_WORK_ITEM_SIZE),
        NAME(CL_INVALID_GLOBAL_OFFSET),
        NAME(CL_INVALID_EVENT_WAIT_LIST),
        NAME(CL_INVALID_EVENT),
        NAME(CL_INVALID_OPERATION),
        NAME(CL_INVALID_BUFFER_SIZE),
        NAME(CL_INVALID_GLOBAL_WORK_SIZE),
        NAME(CL_INVALID_PROPERTY),
        NAME(CL_INVALID_COMPILER_OPTIONS),
        NAME(CL_INVALID_LINKER_OPTIONS),
#undef NAME
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].code == code)
            return names[i].name;
    return "an unknown code";
}

int opencl_fail(cl_int code, const char *what)
{
    bool memory = code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_HOST_MEMORY ||
                  code == CL_INVALID_BUFFER_SIZE;
    return fail(memory ? ERR_NOMEM : ERR_DRIVER, "OpenCL: %s failed: %s (%d)", what,
                opencl_error_name(code), code);
}

// ---- discovery
// -------------------------------------------------------------------------------------

// All devices of all platforms in the drivers' order. Returns the count; 0 without any platform.
static int all_devices(cl_device_id *ids, cl_platform_id *owners)
{
    cl_platform_id platforms[PLATFORMS_MAX];
    cl_uint platform_count = 0;
    int count = 0;
    cl_int code = clGetPlatformIDs(PLATFORMS_MAX, platforms, &platform_count);
    if (code == ICD_FOUND_NO_PLATFORM)
        return 0;
    CL(code, "clGetPlatformIDs");
    for (cl_uint p = 0; p < platform_count && p < PLATFORMS_MAX; p++) {
        cl_uint found = 0, room = (cl_uint)(DEVICES_MAX - count);
        if (room == 0 || clGetDeviceIDs(platforms[p], CL_DEVICE_TYPE_ALL, room, ids + count,
                                        &found) != CL_SUCCESS)
            continue;
        for (cl_uint d = 0; d < found && d < room; d++)
            owners[count++] = platforms[p];
    }
    return count;
}

static void copy_trimmed(char *out, size_t size, const char *text)
{
    text += strspn(text, " \t\n");
    size_t length = strlen(text);
    while (length > 0 && strchr(" \t\n", text[length - 1]))
        length--;
    if (length >= size)
        length = size - 1;
    memcpy(out, text, length);
    out[length] = 0;
}

void opencl_device_string(cl_device_id id, cl_device_info what, char *out, size_t size)
{
    char text[1024] = "";
    if (clGetDeviceInfo(id, what, sizeof text - 1, text, NULL) != CL_SUCCESS)
        text[0] = 0;
    copy_trimmed(out, size, text);
}

static uint64_t device_number(cl_device_id id, cl_device_info what, size_t size)
{
    uint64_t value = 0; // little-endian hosts: the low bytes are the number
    if (clGetDeviceInfo(id, what, size, &value, NULL) != CL_SUCCESS)
        return 0;
    return value;
}

static bool has_extension(cl_device_id id, const char *name)
{
    size_t size = 0;
    if (clGetDeviceInfo(id, CL_DEVICE_EXTENSIONS, 0, NULL, &size) != CL_SUCCESS || size == 0)
        return false;
    char *text = calloc(size + 1, 1);
    bool found = text &&
                 clGetDeviceInfo(id, CL_DEVICE_EXTENSIONS, size, text, NULL) == CL_SUCCESS &&
                 strstr(text, name);
    free(text);
    return found;
}

static enum device_kind device_kind(cl_device_id id)
{
    uint64_t type = device_number(id, CL_DEVICE_TYPE, sizeof(cl_device_type));
    if (type & CL_DEVICE_TYPE_GPU)
        return DEVICE_GPU;
    return type & CL_DEVICE_TYPE_CPU ? DEVICE_CPU : DEVICE_ACCELERATOR;
}

static void describe(cl_platform_id platform, cl_device_id id, int index, struct device_info *info)
{
    char text[256] = "";
    memset(info, 0, sizeof *info);
    info->backend = &backend_opencl;
    info->index = index;
    snprintf(info->key, sizeof info->key, "opencl:%d", index);
    if (clGetPlatformInfo(platform, CL_PLATFORM_NAME, sizeof text - 1, text, NULL) == CL_SUCCESS)
        copy_trimmed(info->platform, sizeof info->platform, text);
    opencl_device_string(id, CL_DEVICE_NAME, info->name, sizeof info->name);
    opencl_device_string(id, CL_DEVICE_VENDOR, info->vendor, sizeof info->vendor);
    opencl_device_string(id, CL_DRIVER_VERSION, info->driver, sizeof info->driver);
    opencl_device_string(id, CL_DEVICE_OPENCL_C_VERSION, info->language, sizeof info->language);
    info->kind = device_kind(id);
    info->memory_driver = device_number(id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof(cl_ulong));
    info->memory = info->memory_driver;
    info->max_alloc = device_number(id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof(cl_ulong));
    info->compute_units = (int)device_number(id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof(cl_uint));
    info->clock_mhz = (int)device_number(id, CL_DEVICE_MAX_CLOCK_FREQUENCY, sizeof(cl_uint));
    info->vector_width =
        (int)device_number(id, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof(cl_uint));
    info->align = (size_t)device_number(id, CL_DEVICE_MEM_BASE_ADDR_ALIGN, sizeof(cl_uint)) / 8;
    if (info->align < 64)
        info->align = 64; // a cache line, and the widest vector load
    info->fp16 = has_extension(id, "cl_khr_fp16");
    info->fp64 = device_number(id, CL_DEVICE_DOUBLE_FP_CONFIG, sizeof(cl_device_fp_config)) != 0;
    info->unified = device_number(id, CL_DEVICE_HOST_UNIFIED_MEMORY, sizeof(cl_bool)) != 0;
    info->numa = -1;
    snprintf(info->place, sizeof info->place, "Machine");
}

static int opencl_list(struct device_info *out, int max)
{
    cl_device_id ids[DEVICES_MAX];
    cl_platform_id owners[DEVICES_MAX];
    int count = all_devices(ids, owners);
    TRY(count);
    if (count > max)
        count = max;
    for (int i = 0; i < count; i++)
        describe(owners[i], ids[i], i, &out[i]);
    return count;
}

// ---- open and close
// --------------------------------------------------------------------------------

static void opencl_close(struct device *base)
{
    struct opencl_device *dev = opencl_device_of(base);
    if (!dev)
        return;
    opencl_gemm_close(dev);
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
    cl_device_id ids[DEVICES_MAX];
    cl_platform_id owners[DEVICES_MAX];
    int code, count = all_devices(ids, owners);
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

// ---- memory
// ----------------------------------------------------------------------------------------

static double mib(uint64_t bytes)
{
    return (double)bytes / (1 << 20);
}

static int check_fits(const struct device *dev, size_t bytes)
{
    const struct device_info *info = &dev->info;
    if (bytes > info->max_alloc)
        return fail(ERR_NOMEM,
                    "%s: %.1f MiB in one buffer is more than this device allows (%.1f MiB)",
                    info->key, mib(bytes), mib(info->max_alloc));
    if (dev->allocated + bytes > info->memory)
        return fail(ERR_NOMEM, "%s: %.1f MiB more does not fit: %.1f of %.1f MiB are in use",
                    info->key, mib(bytes), mib(dev->allocated), mib(info->memory));
    return 0;
}

static int opencl_alloc(struct device *base, size_t bytes, struct mem **out)
{
    struct opencl_device *dev = opencl_device_of(base);
    cl_int code;
    *out = NULL;
    BUG_IF(bytes == 0);
    TRY(check_fits(base, bytes));
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
    mem->root = mem->cl;
    mem->bytes = bytes;
    base->allocations++;
    base->allocated += bytes;
    *out = mem;
    return 0;
}

// A sub-buffer of a sub-buffer is not allowed by OpenCL, so a view of a view is one of the root.
static int opencl_view(struct mem *parent, size_t offset, size_t bytes, struct mem **out)
{
    cl_int code;
    *out = NULL;
    BUG_IF(bytes == 0 || offset > parent->bytes || bytes > parent->bytes - offset);
    BUG_IF(offset % parent->dev->base.info.align != 0);
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    cl_buffer_region region = {parent->offset + offset, bytes};
    mem->cl = clCreateSubBuffer(parent->root, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION,
                                &region, &code);
    if (code != CL_SUCCESS) {
        free(mem);
        return opencl_fail(code, "clCreateSubBuffer");
    }
    mem->dev = parent->dev;
    mem->root = parent->root;
    mem->offset = region.origin;
    mem->bytes = bytes;
    mem->is_view = true;
    *out = mem;
    return 0;
}

static void opencl_free(struct mem *mem)
{
    if (!mem)
        return;
    if (!mem->is_view)
        mem->dev->base.allocated -= mem->bytes;
    clReleaseMemObject(mem->cl);
    free(mem);
}

// ---- streams and transfers
// -------------------------------------------------------------------------

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
    *out = s;
    return 0;
}

static void opencl_stream_free(struct stream *s)
{
    if (!s)
        return;
    clFinish(s->queue);
    clReleaseCommandQueue(s->queue);
    free(s);
}

static bool inside(const struct mem *mem, size_t offset, size_t bytes)
{
    return offset <= mem->bytes && bytes <= mem->bytes - offset;
}

static int opencl_write(struct stream *s, struct mem *dst, size_t offset, const void *src,
                        size_t bytes)
{
    BUG_IF(!inside(dst, offset, bytes));
    if (bytes)
        CL(clEnqueueWriteBuffer(s->queue, dst->cl, CL_TRUE, offset, bytes, src, 0, NULL, NULL),
           "clEnqueueWriteBuffer");
    return 0;
}

static int opencl_read(struct stream *s, const struct mem *src, size_t offset, void *dst,
                       size_t bytes)
{
    BUG_IF(!inside(src, offset, bytes));
    if (bytes)
        CL(clEnqueueReadBuffer(s->queue, src->cl, CL_TRUE, offset, bytes, dst, 0, NULL, NULL),
           "clEnqueueReadBuffer");
    return 0;
}

static int opencl_copy(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                       size_t src_offset, size_t bytes)
{
    BUG_IF(!inside(dst, dst_offset, bytes) || !inside(src, src_offset, bytes));
    if (bytes)
        CL(clEnqueueCopyBuffer(s->queue, src->cl, dst->cl, src_offset, dst_offset, bytes, 0, NULL,
                               NULL),
           "clEnqueueCopyBuffer");
    return 0;
}

static int opencl_fill(struct stream *s, struct mem *dst, size_t offset, size_t bytes,
                       uint32_t pattern)
{
    BUG_IF(!inside(dst, offset, bytes) || offset % 4 || bytes % 4);
    if (bytes)
        CL(clEnqueueFillBuffer(s->queue, dst->cl, &pattern, sizeof pattern, offset, bytes, 0, NULL,
                               NULL),
           "clEnqueueFillBuffer");
    return 0;
}

// ---- work
// ------------------------------------------------------------------------------------------

static cl_int set_arg(cl_kernel kernel, cl_uint index, char letter, const union arg *arg)
{
    switch (letter) {
    case 'b':
        return clSetKernelArg(kernel, index, sizeof(cl_mem), arg->b ? &arg->b->cl : NULL);
    case 'i':
        return clSetKernelArg(kernel, index, sizeof arg->i, &arg->i);
    case 'u':
        return clSetKernelArg(kernel, index, sizeof arg->u, &arg->u);
    default:
        BUG_IF(letter != 'f');
        return clSetKernelArg(kernel, index, sizeof arg->f, &arg->f);
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
    for (int i = 0; i < count; i++)
        CL(set_arg(kernel, (cl_uint)i, spec->args[i], &args[i]), spec->name);
    size_t local[3] = {(size_t)spec->group[0], (size_t)spec->group[1], 1};
    size_t global[3];
    for (int i = 0; i < 3; i++)
        global[i] = (size_t)groups[i] * local[i];
    CL(clEnqueueNDRangeKernel(s->queue, kernel, 3, NULL, global, local, 0, NULL, NULL), spec->name);
    return 0;
}

static int opencl_accelerate(struct stream *s, enum accelerated op, const void *args)
{
    (void)s, (void)op, (void)args;
    return NOT_MINE;
}

// ---- events
// ----------------------------------------------------------------------------------------

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
    .stream_new = opencl_stream_new,
    .stream_free = opencl_stream_free,
    .write = opencl_write,
    .read = opencl_read,
    .copy = opencl_copy,
    .fill = opencl_fill,
    .launch = opencl_launch,
    .gemm_space = opencl_gemm_space,
    .gemm = opencl_gemm,
    .accelerate = opencl_accelerate,
    .event_new = opencl_event_new,
    .event_free = opencl_event_free,
    .record = opencl_record,
    .wait = opencl_wait,
    .elapsed = opencl_elapsed,
    .sync = opencl_sync,
};
