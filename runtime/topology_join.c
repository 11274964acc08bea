// The devices of this machine in its topology, and processes bound near them.
#include "runtime/topology_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <hwloc.h>

// ---- joining ------------------------------------------------------------------------------------

static int accelerator_at(const struct topology *t, const char *pci)
{
    for (int a = 0; a < t->accelerators && pci[0]; a++)
        if (!strcmp(t->objects[t->accelerator[a]].pci, pci))
            return a;
    return -1;
}

// The lists grow by the devices that hwloc does not show; matrices keep their old part.
static int make_room(struct topology *t, int more)
{
    const size_t count = (size_t)(t->count + more), a = (size_t)t->accelerators;
    const size_t wide = a + (size_t)more;
    struct topology_object *objects = realloc(t->objects, count * sizeof *objects);
    if (objects)
        t->objects = objects;
    int *accelerator = realloc(t->accelerator, (count + 1) * sizeof *accelerator);
    if (accelerator)
        t->accelerator = accelerator;
    double *nvlink = calloc(wide * wide + 1, sizeof *nvlink);
    if (!objects || !accelerator || !nvlink) {
        free(nvlink);
        return fail(ERR_NOMEM, "no host memory for a topology");
    }
    for (size_t i = 0; i < a; i++)
        memcpy(nvlink + i * wide, t->nvlink + i * a, a * sizeof *nvlink);
    free(t->nvlink);
    t->nvlink = nvlink;
    return 0;
}

static void add_at_root(struct topology *t, const struct device_info *d)
{
    struct topology_object *o = &t->objects[t->count];
    *o = (struct topology_object){.kind = TOPOLOGY_ACCELERATOR, .depth = 1, .accelerator = d->kind};
    snprintf(o->pci, sizeof o->pci, "%s", d->pci);
    if (d->kind == DEVICE_CPU)
        o->cores = topology_cores(t);
    t->accelerator[t->accelerators++] = t->count++;
}

static void take(struct topology_object *o, struct device_info *d)
{
    if (o->device) // a twin: the first, CUDA's, stays
        return;
    o->device = d;
    o->memory = d->memory;
    o->accelerator = d->kind;
    snprintf(o->key, sizeof o->key, "%s", d->key);
    snprintf(o->name, sizeof o->name, "%s", d->name);
}

// NVLink as the driver counts it: `nvlinks` connections, shared among the peers that they reach
// where hwloc's NVML does not say more. Each moves 25 GB/s one way (V100 to H200), by a switch all
// of them.
static void ask_drivers(struct topology *t)
{
    static const double per_link = 25e9;
    for (int a = 0; a < t->accelerators; a++) {
        const struct device_info *from = t->objects[t->accelerator[a]].device;
        for (int b = 0; b < t->accelerators; b++) {
            const struct device_info *to = t->objects[t->accelerator[b]].device;
            double *rate = &t->nvlink[a * t->accelerators + b];
            struct device_link l;
            if (a == b || !from || !to || *rate > 0 || !from->backend->link ||
                from->backend != to->backend || from->backend->link(from, to, &l) < 0 || !l.nvlink)
                continue;
            *rate = per_link * (from->nvlinks < to->nvlinks ? from->nvlinks : to->nvlinks);
        }
    }
}

int topology_join(struct topology *t, const struct device_info *list, int count)
{
    int missing = 0;
    t->here = true;
    t->devices = calloc((size_t)count + 1, sizeof *t->devices);
    if (!t->devices)
        return fail(ERR_NOMEM, "no host memory for a topology");
    memcpy(t->devices, list, (size_t)count * sizeof *list);
    t->device_count = count;
    for (int i = 0; i < count; i++)
        missing += accelerator_at(t, list[i].pci) < 0;
    TRY(make_room(t, missing));
    const int wide = t->accelerators + missing;
    for (int i = 0; i < count; i++) {
        int at = accelerator_at(t, list[i].pci);
        if (at < 0) {
            add_at_root(t, &list[i]);
            at = t->accelerators - 1;
        }
        take(&t->objects[t->accelerator[at]], &t->devices[i]);
    }
    BUG_IF(t->accelerators > wide);
    if (t->accelerators < wide) { // twins that hwloc does not show share one: the matrix shrinks
        const int a = t->accelerators;
        for (int i = 1; i < a; i++)
            memmove(t->nvlink + i * a, t->nvlink + i * wide, (size_t)a * sizeof *t->nvlink);
    }
    ask_drivers(t);
    return 0;
}

// ---- binding ------------------------------------------------------------------------------------

// Part `part` of `parts` of the NUMA nodes, where these can be so divided; otherwise all cores,
// since ranks on a CPU have unequal work and threads that move share it better than bound ones.
static void take_part(hwloc_topology_t h, hwloc_const_cpuset_t all, int part, int parts,
                      hwloc_bitmap_t out)
{
    const int nodes = hwloc_get_nbobjs_by_type(h, HWLOC_OBJ_NUMANODE);
    hwloc_bitmap_zero(out);
    for (int n = 0; nodes % parts == 0 && n < nodes / parts; n++) {
        hwloc_obj_t node =
            hwloc_get_obj_by_type(h, HWLOC_OBJ_NUMANODE, (unsigned)(part * (nodes / parts) + n));
        if (node)
            hwloc_bitmap_or(out, out, node->cpuset);
    }
    hwloc_bitmap_and(out, out, all);
    if (hwloc_bitmap_iszero(out))
        hwloc_bitmap_copy(out, all);
}

static void bind_to(hwloc_topology_t h, const struct device_info *d, int part, int parts,
                    char *words, size_t size)
{
    hwloc_obj_t pci = d->pci[0] ? hwloc_get_pcidev_by_busidstring(h, d->pci) : NULL;
    hwloc_obj_t near = pci ? hwloc_get_non_io_ancestor_obj(h, pci) : NULL;
    hwloc_bitmap_t set = hwloc_bitmap_dup(hwloc_topology_get_topology_cpuset(h));
    hwloc_bitmap_t mine = hwloc_bitmap_alloc();
    char text[128];
    if (!set || !mine) {
        snprintf(words, size, "not bound: no host memory");
    } else {
        hwloc_get_cpubind(h, set, HWLOC_CPUBIND_PROCESS); // not more than it may use now
        if (near && near->cpuset && hwloc_bitmap_intersects(near->cpuset, set))
            hwloc_bitmap_and(mine, near->cpuset, set);
        else
            take_part(h, set, near ? 0 : part, near ? 1 : parts, mine);
        hwloc_bitmap_list_snprintf(text, sizeof text, mine);
        if (hwloc_set_cpubind(h, mine, HWLOC_CPUBIND_PROCESS) == 0)
            snprintf(words, size, "cores %s%s%s", text, near ? ", near " : "", near ? d->pci : "");
        else
            snprintf(words, size, "not bound to cores %s: %s", text, strerror(errno));
    }
    hwloc_bitmap_free(set);
    hwloc_bitmap_free(mine);
}

int topology_bind(const struct device_info *device, int part, int parts, char *words, size_t size)
{
    hwloc_topology_t h;
    BUG_IF(part < 0 || parts < 1 || part >= parts);
    if (hwloc_topology_init(&h) != 0)
        return fail(ERR_NOMEM, "no host memory for a topology");
    hwloc_topology_set_io_types_filter(h, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    hwloc_topology_set_components(h, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "opencl");
    hwloc_topology_set_components(h, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "gl");
    if (hwloc_topology_load(h) == 0)
        bind_to(h, device, part, parts, words, size);
    else
        snprintf(words, size, "not bound: hwloc cannot look at this machine");
    hwloc_topology_destroy(h);
    return 0;
}
