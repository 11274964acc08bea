#include "devices/host.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include <hwloc.h>

// ---- memory ------------------------------------------------------------------------------------

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

// MemTotal and MemAvailable, whichever is less.
static uint64_t meminfo(const char *root)
{
    char path[PATH_MAX], line[256];
    uint64_t result = UINT64_MAX, kib;
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemTotal: %" SCNu64 " kB", &kib) == 1 ||
            sscanf(line, "MemAvailable: %" SCNu64 " kB", &kib) == 1)
            result = least(result, kib * 1024);
    if (file)
        fclose(file);
    return result;
}

// The number in a file; UINT64_MAX when there is none (also for "max").
static uint64_t file_number(const char *path)
{
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "r");
    if (file && fscanf(file, "%" SCNu64, &value) != 1)
        value = UINT64_MAX;
    if (file)
        fclose(file);
    return value;
}

// A group's limit holds for the groups below it: the least on the way from `group` up to the mount.
// Inside a container the path may not exist, but the mount's own file does.
static uint64_t group_limit(const char *root, const char *mount, const char *group,
                            const char *name)
{
    char dir[512], path[PATH_MAX];
    uint64_t result = UINT64_MAX;
    snprintf(dir, sizeof dir, "%s", group);
    for (;;) {
        snprintf(path, sizeof path, "%s%s%s/%s", root, mount, dir, name);
        result = least(result, file_number(path));
        char *slash = strrchr(dir, '/');
        if (!slash)
            return result;
        *slash = 0;
    }
}

// Lines of /proc/self/cgroup are "number:controllers:path"; v2 has number 0 and no controllers.
static uint64_t cgroups(const char *root)
{
    char path[PATH_MAX], line[512], controllers[128], group[384];
    uint64_t result = UINT64_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "0::%383[^\n]", group) == 1)
            result = least(result, group_limit(root, "/sys/fs/cgroup", group, "memory.max"));
        else if (sscanf(line, "%*d:%127[^:]:%383[^\n]", controllers, group) == 2 &&
                 strstr(controllers, "memory"))
            result = least(
                result, group_limit(root, "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes"));
    }
    if (file)
        fclose(file);
    return result;
}

uint64_t host_memory(const char *root)
{
    return least(meminfo(root), cgroups(root));
}

// ---- devices in the machine --------------------------------------------------------------------

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

void host_complete(struct device_info *list, int count)
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
