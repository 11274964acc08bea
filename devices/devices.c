// What does not depend on a backend: names, the list of kernels, and the list of devices.
#include "devices/device.h"

#include "devices/host.h"

#include <stdio.h>
#include <string.h>

#define KERNEL(name, x, y, args, form) {#name, {x, y}, args, form},
const struct kernel_spec kernel_specs[KERNEL_COUNT] = {
#include "devices/kernels.def"
};
#undef KERNEL

enum { LIST_MAX = 64 };

static const struct backend *const backends[] = {&backend_cuda, &backend_opencl};

size_t dtype_size(enum dtype type)
{
    static const size_t sizes[] = {[F32] = 4, [BF16] = 2, [I32] = 4, [I64] = 8};
    BUG_IF((unsigned)type > I64);
    return sizes[type];
}

const char *dtype_name(enum dtype type)
{
    static const char *const names[] = {
        [F32] = "f32", [BF16] = "bf16", [I32] = "i32", [I64] = "i64"};
    BUG_IF((unsigned)type > I64);
    return names[type];
}

const char *device_kind_name(enum device_kind kind)
{
    static const char *const names[] = {
        [DEVICE_CPU] = "CPU", [DEVICE_GPU] = "GPU", [DEVICE_ACCELERATOR] = "accelerator"};
    BUG_IF((unsigned)kind > DEVICE_ACCELERATOR);
    return names[kind];
}

// ---- the list ----------------------------------------------------------------------------------

// Devices that are the same one, through two backends, learn of each other.
static void join_twins(struct device_info *list, int count)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            if (list[i].backend != list[j].backend && list[i].pci[0] &&
                !strcmp(list[i].pci, list[j].pci))
                memcpy(list[i].twin, list[j].key, sizeof list[i].twin);
}

const char *devices_note(void)
{
    for (size_t b = 0; b < sizeof backends / sizeof backends[0]; b++)
        if (backends[b]->note && backends[b]->note()[0])
            return backends[b]->note();
    return "";
}

int devices_list(struct device_info *out, int max)
{
    int count = 0;
    for (size_t b = 0; b < sizeof backends / sizeof backends[0]; b++) {
        int found = backends[b]->list(out + count, max - count);
        TRY(found);
        count += found;
    }
    host_complete(out, count);
    join_twins(out, count);
    return count;
}

// GPUs before accelerators before CPUs; among equals more compute units, then the first: of twins
// the one through CUDA.
static bool better(const struct device_info *a, const struct device_info *b)
{
    static const int rank[] = {[DEVICE_CPU] = 0, [DEVICE_ACCELERATOR] = 1, [DEVICE_GPU] = 2};
    if (rank[a->kind] != rank[b->kind])
        return rank[a->kind] > rank[b->kind];
    return a->compute_units > b->compute_units;
}

static int no_such_device(const char *key, const struct device_info *list, int count)
{
    char keys[512] = "";
    size_t length = 0;
    for (int i = 0; i < count && length < sizeof keys; i++)
        length += (size_t)snprintf(keys + length, sizeof keys - length, "%s%s", i ? ", " : "",
                                   list[i].key);
    const char *note = devices_note();
    return fail(ERR_NODEVICE, "no device '%s'; there is: auto, %s%s%s%s", key, keys,
                note[0] ? " (" : "", note, note[0] ? ")" : "");
}

int devices_find(const char *key, struct device_info *out)
{
    struct device_info list[LIST_MAX];
    int count = devices_list(list, LIST_MAX), best = 0;
    TRY(count);
    if (count == 0)
        return fail(ERR_NODEVICE, "no OpenCL device found; install an OpenCL driver, "
                                  "for example the package pocl-opencl-icd");
    if (!key || !strcmp(key, "auto")) {
        for (int i = 1; i < count; i++)
            if (better(&list[i], &list[best]))
                best = i;
        *out = list[best];
        return 0;
    }
    for (int i = 0; i < count; i++) {
        if (!strcmp(key, list[i].key)) {
            *out = list[i];
            return 0;
        }
    }
    return no_such_device(key, list, count);
}

// ---- for backends -------------------------------------------------------------------------------

int device_fits(const struct device *dev, size_t bytes)
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
