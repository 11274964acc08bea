// What does not depend on a backend: names, the list of kernels, and the list of devices.
#include "devices/device.h"

#include "devices/host.h"

#include <stdio.h>
#include <string.h>

#include <hwloc.h>

#define KERNEL(name, x, y, args, form) {#name, {x, y}, args, form},
const struct kernel_spec kernel_specs[KERNEL_COUNT] = {
#include "devices/kernels.def"
};
#undef KERNEL

enum { LIST_MAX = 64 };

static const struct backend *const backends[] = {&backend_opencl};

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

// ---- completing the list from hwloc ------------------------------------------------------------

// NULL when this machine cannot be looked at. hwloc's own search for OpenCL and GL devices is left
// out: it is slow, and the PCI id already joins a device to its place.
static hwloc_topology_t load_topology(void)
{
    hwloc_topology_t topology;
    if (hwloc_topology_init(&topology) != 0)
        return NULL;
    hwloc_topology_set_io_types_filter(topology, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    hwloc_topology_set_components(topology, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "opencl");
    hwloc_topology_set_components(topology, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "gl");
    if (hwloc_topology_load(topology) == 0)
        return topology;
    hwloc_topology_destroy(topology);
    return NULL;
}

// Where the device sits. One without a PCI place (a CPU device) is at the root.
static void find_place(hwloc_topology_t topology, struct device_info *info)
{
    hwloc_obj_t pci = NULL, near, node = NULL;
    info->numa = -1;
    snprintf(info->place, sizeof info->place, "Machine");
    if (topology && info->pci[0])
        pci = hwloc_get_pcidev_by_busidstring(topology, info->pci);
    if (!pci)
        return;
    near = hwloc_get_non_io_ancestor_obj(topology, pci);
    if (near && near->nodeset && hwloc_bitmap_weight(near->nodeset) == 1)
        node = hwloc_get_numanode_obj_by_os_index(topology,
                                                  (unsigned)hwloc_bitmap_first(near->nodeset));
    if (!node) {
        snprintf(info->place, sizeof info->place, "Machine / PCI %s", info->pci);
        return;
    }
    info->numa = (int)node->os_index;
    snprintf(info->place, sizeof info->place, "NUMANode %d / PCI %s", info->numa, info->pci);
}

// A CPU device has the host's memory, whatever its driver says (PoCL has said 3.6 to 10 of 23 GiB);
// an integrated GPU has no more than that; others have their own.
static void bound_memory(uint64_t host, struct device_info *info)
{
    if (info->kind == DEVICE_CPU)
        info->memory = host != UINT64_MAX ? host : info->memory_driver;
    else if (info->unified && host < info->memory)
        info->memory = host;
}

// Memory of the host to plan with. hwloc's total is a bound where it shows this process only a part
// of the machine (a cpuset). Otherwise it only repeats the kernel's figures for each NUMA node, and
// on machines with hot-plugged memory those lag: 12 of 23 GiB, until a program had touched 14.
static uint64_t host_bound(hwloc_topology_t topology)
{
    uint64_t host = host_memory("");
    if (!topology || hwloc_bitmap_isequal(hwloc_topology_get_topology_nodeset(topology),
                                          hwloc_topology_get_complete_nodeset(topology)))
        return host;
    uint64_t seen = hwloc_get_root_obj(topology)->total_memory;
    return seen > 0 && seen < host ? seen : host;
}

static void complete(struct device_info *list, int count)
{
    hwloc_topology_t topology = count > 0 ? load_topology() : NULL;
    uint64_t host = host_bound(topology);
    for (int i = 0; i < count; i++) {
        find_place(topology, &list[i]);
        bound_memory(host, &list[i]);
    }
    if (topology)
        hwloc_topology_destroy(topology);
}

// ---- the list ----------------------------------------------------------------------------------

int devices_list(struct device_info *out, int max)
{
    int count = 0;
    for (size_t b = 0; b < sizeof backends / sizeof backends[0]; b++) {
        int found = backends[b]->list(out + count, max - count);
        TRY(found);
        count += found;
    }
    complete(out, count);
    return count;
}

// GPUs before accelerators before CPUs; among equals more compute units, then the first.
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
    return fail(ERR_NODEVICE, "no device '%s'; there is: auto, %s", key, keys);
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
