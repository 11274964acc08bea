// The CUDA backend: the verbs of device.h on NVIDIA's driver API.
//
// Memory is an address, so a view costs nothing. A stream is a CUDA stream that does not wait for
// the default one. Every verb makes the device's context current first: the program may use several
// devices from one thread, and one device from several.
#include "devices/cuda.h"
#include "devices/cuda_fused.h"
#include "devices/cuda_gemm_sm90.h"
#include "devices/cuda_tuned.h"
#include "devices/gemm_gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- open and close ----------------------------------------------------------------------------

static void cuda_close(struct device *base)
{
    struct cuda_device *dev = cuda_device_of(base);
    if (!dev)
        return;
    if (dev->context && enter(dev) == 0) {
        cuda_gemm_close(dev);
        cuda_tuned_close(dev);
        if (dev->module)
            dev->api->module_unload(dev->module);
    }
    if (dev->context)
        dev->api->context_release(dev->id);
    free(dev);
}

static int open_context(struct cuda_device *dev)
{
    const char *why;
    int count = 0, index = dev->base.info.index;
    dev->api = cuda_driver(&why);
    if (!dev->api)
        return fail(ERR_NODEVICE, "no CUDA device: %s", why);
    CU(dev->api, dev->api->device_count(&count), "cuDeviceGetCount");
    if (index < 0 || index >= count)
        return fail(ERR_NODEVICE, "the device is gone");
    CU(dev->api, dev->api->device_get(&dev->id, index), "cuDeviceGet");
    CU(dev->api, dev->api->context_retain(&dev->context, dev->id), "cuDevicePrimaryCtxRetain");
    return enter(dev);
}

// Plans with what is left: other programs, and the context and kernels of this one, use some.
static int note_free_memory(struct cuda_device *dev)
{
    size_t free = 0, all = 0;
    CU(dev->api, dev->api->memory(&free, &all), "cuMemGetInfo");
    if (free < dev->base.info.memory)
        dev->base.info.memory = free;
    return 0;
}

// Finds kernel `i`; appends what is wrong with it to `wrong`. That it has no more arguments than
// kernels.def says, and of which types, was checked when it was compiled (kernels.cu).
static void find_kernel(struct cuda_device *dev, int i, char *wrong, size_t size)
{
    const struct kernel_spec *spec = &kernel_specs[i];
    size_t length = strlen(wrong), last = strlen(spec->args) - 1, offset, bytes;
    const char *reason = NULL;
    if (spec->form == FORM_CPU)
        return;
    if (dev->api->module_function(&dev->kernels[i], dev->module, spec->name) != CUDA_OK)
        reason = "missing";
    else if (dev->api->parameter &&
             dev->api->parameter(dev->kernels[i], last, &offset, &bytes) != CUDA_OK)
        reason = "too few arguments";
    if (reason)
        snprintf(wrong + length, size - length, "%s%s (%s)", length ? ", " : "", spec->name,
                 reason);
}

static int open_kernels(struct cuda_device *dev)
{
    char wrong[900] = "";
    const void *image = dev->base.act == BF16 ? cuda_kernels_bf16 : cuda_kernels_f32;
    CU(dev->api, dev->api->module_load(&dev->module, image), "loading the kernels");
    for (int i = 0; i < KERNEL_COUNT; i++)
        find_kernel(dev, i, wrong, sizeof wrong);
    if (wrong[0])
        return fail(ERR_DRIVER, "kernels.cl does not match kernels.def: %s", wrong);
    return 0;
}

static int cuda_open(const struct device_info *info, unsigned flags, struct device **out)
{
    int code;
    *out = NULL;
    struct cuda_device *dev = calloc(1, sizeof *dev);
    if (!dev)
        return fail(ERR_NOMEM, "out of host memory while opening %s", info->key);
    dev->base.api = &backend_cuda;
    dev->base.info = *info;
    dev->base.flags = flags;
    dev->base.act = flags & OPEN_BF16 ? BF16 : F32;
    dev->base.half_weights = dev->base.act == BF16 && !(flags & OPEN_PORTABLE);
    TRY_OUT(open_context(dev));
    TRY_OUT(open_kernels(dev));
    TRY_OUT(note_free_memory(dev));
    dev->base.fused_width = cuda_fused_width(dev);
    dev->base.rebuilds_hidden = true;
    dev->base.swiglu_columns = GEMM_GPU_SWIGLU;
    dev->base.swiglu_dots = cuda_gemm_sm90_groups(dev);
    *out = &dev->base;
    return 0;
out:
    cuda_close(&dev->base);
    return fail_in(code, "%s", info->key);
}

// ---- memory ------------------------------------------------------------------------------------

static int alloc_fail(const struct cuda_device *dev, cuda_result code, size_t bytes)
{
    const struct device_info *info = &dev->base.info;
    size_t free = 0, all = 0;
    if (code != CUDA_OUT_OF_MEMORY || dev->api->memory(&free, &all) != CUDA_OK) {
        int failed = cuda_fail(dev->api, code, "cuMemAlloc");
        return fail_in(failed, "%s: %.1f MiB", info->key, mib(bytes));
    }
    return fail(ERR_NOMEM,
                "%s is out of memory: %.1f MiB more is wanted, %.1f of %.1f MiB are free; this "
                "program uses %.1f MiB",
                info->key, mib(bytes), mib(free), mib(all), mib(dev->base.allocated));
}

static int cuda_alloc(struct device *base, size_t bytes, struct mem **out)
{
    struct cuda_device *dev = cuda_device_of(base);
    *out = NULL;
    BUG_IF(bytes == 0);
    TRY(device_fits(base, bytes));
    TRY(enter(dev));
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    cuda_result code = dev->api->alloc(&mem->address, bytes);
    if (code != CUDA_OK) {
        free(mem);
        return alloc_fail(dev, code, bytes);
    }
    mem->dev = dev;
    mem->bytes = bytes;
    base->allocations++;
    base->allocated += bytes;
    *out = mem;
    return 0;
}

static int cuda_view(struct mem *parent, size_t offset, size_t bytes, struct mem **out)
{
    *out = NULL;
    BUG_IF(bytes == 0 || offset > parent->bytes || bytes > parent->bytes - offset);
    BUG_IF(offset % parent->dev->base.info.align != 0);
    struct mem *mem = calloc(1, sizeof *mem);
    if (!mem)
        return fail(ERR_NOMEM, "out of host memory");
    *mem = (struct mem){parent->dev, parent->address + offset, bytes, .is_view = true};
    *out = mem;
    return 0;
}

static void cuda_free(struct mem *mem)
{
    if (!mem)
        return;
    if (mem->is_reached && !mem->is_view) {
        cuda_release(mem);
    } else if (!mem->is_view) {
        mem->dev->base.allocated -= mem->bytes;
        if (enter(mem->dev) == 0)
            mem->dev->api->free(mem->address);
    }
    free(mem);
}

static size_t cuda_size(const struct mem *mem)
{
    return mem->bytes;
}

// ---- streams and transfers ---------------------------------------------------------------------

// Makes *out, a stream or an event of ours, around the driver's.
#define NEW_AROUND(base, out, create, flags, call)                   \
    do {                                                             \
        struct cuda_device *dev = cuda_device_of(base);              \
        *(out) = NULL;                                               \
        TRY(enter(dev));                                             \
        __typeof__(*(out)) made = calloc(1, sizeof *made);           \
        if (!made)                                                   \
            return fail(ERR_NOMEM, "out of host memory");            \
        made->dev = dev;                                             \
        cuda_result created = dev->api->create(&made->cu, flags);    \
        if (created != CUDA_OK) {                                    \
            free(made);                                              \
            return cuda_fail(dev->api, created, call);               \
        }                                                            \
        *(out) = made;                                               \
        return 0;                                                    \
    } while (0)

static int cuda_stream_new(struct device *base, struct stream **out)
{
    NEW_AROUND(base, out, stream_create, CUDA_STREAM_NON_BLOCKING, "cuStreamCreate");
}

static int cuda_stream_urgent(struct device *base, struct stream **out)
{
    const struct cuda_api *api = cuda_device_of(base)->api;
    cuda_stream urgent;
    TRY(cuda_stream_new(base, out));
    if (!api->stream_urgent || api->stream_urgent(&urgent, CUDA_STREAM_NON_BLOCKING,
                                                  CUDA_HIGHEST_PRIORITY) != CUDA_OK)
        return 0;
    api->stream_destroy((*out)->cu);
    (*out)->cu = urgent;
    return 0;
}

static int cuda_sync(struct stream *s)
{
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->stream_sync(s->cu), "cuStreamSynchronize");
    return 0;
}

static void cuda_stream_free(struct stream *s)
{
    if (!s)
        return;
    int code = cuda_sync(s);
    cuda_staging_free(s);
    if (code == 0)
        s->dev->api->stream_destroy(s->cu);
    free(s);
}

static bool inside(const struct mem *mem, size_t offset, size_t bytes)
{
    return offset <= mem->bytes && bytes <= mem->bytes - offset;
}

static int cuda_write_begin(struct stream *s, struct mem *dst, size_t offset, const void *src,
                            size_t bytes)
{
    BUG_IF(!inside(dst, offset, bytes));
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->write(dst->address + offset, src, bytes, s->cu),
       "cuMemcpyHtoDAsync");
    return 0;
}

// Small writes go by way of page-locked memory and do not wait. Larger ones wait, because the
// driver does not promise on every machine that it is done with `src` earlier: where the GPU reads
// pageable host memory itself, it copies later.
static int cuda_write(struct stream *s, struct mem *dst, size_t offset, const void *src,
                      size_t bytes)
{
    BUG_IF(!inside(dst, offset, bytes));
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    int code = cuda_write_staged(s, dst->address + offset, src, bytes);
    if (code != CUDA_NOT_STAGED)
        return code;
    TRY(cuda_write_begin(s, dst, offset, src, bytes));
    return cuda_sync(s);
}

static int cuda_read_begin(struct stream *s, const struct mem *src, size_t offset, void *dst,
                           size_t bytes)
{
    BUG_IF(!inside(src, offset, bytes));
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->read(dst, src->address + offset, bytes, s->cu),
       "cuMemcpyDtoHAsync");
    return 0;
}

static int cuda_read(struct stream *s, const struct mem *src, size_t offset, void *dst,
                     size_t bytes)
{
    TRY(cuda_read_begin(s, src, offset, dst, bytes));
    return bytes ? cuda_sync(s) : 0;
}

static int cuda_pin(struct device *base, void *at, size_t bytes)
{
    struct cuda_device *dev = cuda_device_of(base);
    TRY(enter(dev));
    CU(dev->api, dev->api->host_register(at, bytes, 0), "cuMemHostRegister");
    return 0;
}

static void cuda_unpin(struct device *base, void *at)
{
    struct cuda_device *dev = cuda_device_of(base);
    if (enter(dev) == 0)
        dev->api->host_unregister(at);
}

static int cuda_copy(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                     size_t src_offset, size_t bytes)
{
    BUG_IF(!inside(dst, dst_offset, bytes) || !inside(src, src_offset, bytes));
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api,
       s->dev->api->copy(dst->address + dst_offset, src->address + src_offset, bytes, s->cu),
       "cuMemcpyDtoDAsync");
    return 0;
}

static int cuda_peer(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                     size_t src_offset, size_t bytes)
{
    BUG_IF(!inside(dst, dst_offset, bytes) || !inside(src, src_offset, bytes));
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api,
       s->dev->api->peer(dst->address + dst_offset, dst->dev->context, src->address + src_offset,
                         src->dev->context, bytes, s->cu),
       "cuMemcpyPeerAsync");
    return 0;
}

static int cuda_fill(struct stream *s, struct mem *dst, size_t offset, size_t bytes,
                     uint32_t pattern)
{
    BUG_IF(!inside(dst, offset, bytes) || offset % 4 || bytes % 4);
    if (bytes == 0)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->fill(dst->address + offset, pattern, bytes / 4, s->cu),
       "cuMemsetD32Async");
    return 0;
}

// ---- work --------------------------------------------------------------------------------------

enum {
    ARGUMENTS_MAX = 32,
    GROUPS_MAX_YZ = 65535, // CUDA's limit of a grid in y and z
};

static int cuda_launch(struct stream *s, enum kernel number, const int groups[3],
                       const union arg *args, int count)
{
    BUG_IF((unsigned)number >= KERNEL_COUNT);
    const struct kernel_spec *spec = &kernel_specs[number];
    const struct cuda_device *dev = s->dev;
    BUG_IF(!dev->kernels[number] || count != (int)strlen(spec->args) || count > ARGUMENTS_MAX);
    BUG_IF(groups[0] < 0 || groups[1] < 0 || groups[2] < 0);
    if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0)
        return 0;
    if (groups[1] > GROUPS_MAX_YZ || groups[2] > GROUPS_MAX_YZ)
        return fail(ERR_INPUT, "CUDA: %s: %dx%dx%d groups are too many; a smaller batch is needed",
                    spec->name, groups[0], groups[1], groups[2]);
    cuda_address buffers[ARGUMENTS_MAX];
    union arg values[ARGUMENTS_MAX];
    void *pointers[ARGUMENTS_MAX];
    for (int i = 0; i < count; i++) {
        values[i] = args[i];
        pointers[i] = &values[i];
        if (spec->args[i] == 'b') {
            buffers[i] = args[i].b ? args[i].b->address : 0;
            pointers[i] = &buffers[i];
        }
    }
    TRY(enter(dev));
    CU(dev->api,
       dev->api->launch(dev->kernels[number], (unsigned)groups[0], (unsigned)groups[1],
                        (unsigned)groups[2], (unsigned)spec->group[0], (unsigned)spec->group[1], 1,
                        0, s->cu, pointers, NULL),
       spec->name);
    return 0;
}

// ---- graphs ------------------------------------------------------------------------------------

struct graph {
    struct cuda_device *dev;
    cuda_graph_exec exec;
};

static int cuda_capture(struct stream *s)
{
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->capture_begin(s->cu, CUDA_CAPTURE_THREAD), "cuStreamBeginCapture");
    return 0;
}

static void cuda_graph_free(struct graph *graph)
{
    if (!graph)
        return;
    if (graph->exec && enter(graph->dev) == 0)
        graph->dev->api->graph_exec_destroy(graph->exec);
    free(graph);
}

static int cuda_capture_end(struct stream *s, struct graph **out)
{
    const struct cuda_api *api = s->dev->api;
    cuda_graph recorded = NULL;
    *out = NULL;
    TRY(enter(s->dev));
    CU(api, api->capture_end(s->cu, &recorded), "cuStreamEndCapture");
    struct graph *graph = calloc(1, sizeof *graph);
    cuda_result code = CUDA_OK;
    if (graph) {
        graph->dev = s->dev;
        code = api->graph_instantiate(&graph->exec, recorded, 0);
    }
    api->graph_destroy(recorded);
    if (!graph)
        return fail(ERR_NOMEM, "out of host memory");
    if (code != CUDA_OK) {
        cuda_graph_free(graph);
        return cuda_fail(api, code, "cuGraphInstantiate");
    }
    *out = graph;
    return 0;
}

static int cuda_replay(struct stream *s, struct graph *graph)
{
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->graph_launch(graph->exec, s->cu), "cuGraphLaunch");
    return 0;
}

// ---- events ------------------------------------------------------------------------------------

static int cuda_event_new(struct device *base, struct event **out)
{
    NEW_AROUND(base, out, event_create, CUDA_EVENT_DEFAULT, "cuEventCreate");
}

static void cuda_event_free(struct event *event)
{
    if (!event)
        return;
    if (enter(event->dev) == 0)
        event->dev->api->event_destroy(event->cu);
    free(event);
}

static int cuda_record(struct stream *s, struct event *event)
{
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->event_record(event->cu, s->cu), "cuEventRecord");
    event->recorded = true;
    return 0;
}

static int cuda_wait(struct stream *s, struct event *event)
{
    if (!event->recorded)
        return 0;
    TRY(enter(s->dev));
    CU(s->dev->api, s->dev->api->stream_wait(s->cu, event->cu, 0), "cuStreamWaitEvent");
    return 0;
}

static int cuda_elapsed(struct event *from, struct event *to, double *seconds)
{
    float milliseconds = 0;
    BUG_IF(!from->recorded || !to->recorded);
    TRY(enter(from->dev));
    CU(from->dev->api, from->dev->api->event_elapsed(&milliseconds, from->cu, to->cu),
       "cuEventElapsedTime");
    *seconds = 1e-3 * (double)milliseconds;
    return 0;
}

const struct backend backend_cuda = {
    .name = "cuda",
    .list = cuda_list,
    .note = cuda_note,
    .link = cuda_link,
    .open = cuda_open,
    .close = cuda_close,
    .alloc = cuda_alloc,
    .view = cuda_view,
    .free = cuda_free,
    .size = cuda_size,
    .alloc_shared = cuda_alloc_shared,
    .reach = cuda_reach,
    .stream_new = cuda_stream_new,
    .stream_urgent = cuda_stream_urgent,
    .stream_free = cuda_stream_free,
    .write = cuda_write,
    .read = cuda_read,
    .write_begin = cuda_write_begin,
    .read_begin = cuda_read_begin,
    .pin = cuda_pin,
    .unpin = cuda_unpin,
    .copy = cuda_copy,
    .peer = cuda_peer,
    .fill = cuda_fill,
    .launch = cuda_launch,
    .gemm_space = cuda_gemm_space,
    .gemm_norms = cuda_gemm_norms,
    .gemm = cuda_gemm,
    .accelerate = cuda_accelerate,
    .capture = cuda_capture,
    .capture_end = cuda_capture_end,
    .replay = cuda_replay,
    .graph_free = cuda_graph_free,
    .group_can = cuda_group_can,
    .group_id = cuda_group_id,
    .group_open = cuda_group_open,
    .group_close = cuda_group_close,
    .group_begin = cuda_group_begin,
    .group_end = cuda_group_end,
    .group_send = cuda_group_send,
    .group_receive = cuda_group_receive,
    .group_sum = cuda_group_sum,
    .event_new = cuda_event_new,
    .event_free = cuda_event_free,
    .record = cuda_record,
    .wait = cuda_wait,
    .elapsed = cuda_elapsed,
    .sync = cuda_sync,
};
