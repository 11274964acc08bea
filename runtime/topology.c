// See topology.h. hwloc's own tree has every cache and thread; what is kept here is what placement
// and people look at. A walk goes through everything and keeps some of it.
#include "runtime/topology.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <hwloc.h>

#include "runtime/topology_internal.h"

enum { OBJECTS_MOST = 1 << 14, XML_MOST = 64 << 20, DEVICES_MOST = 64 };
static const double GIGA = 1e9;

// ---- PCI classes --------------------------------------------------------------------------------

enum { CLASS_NETWORK = 0x02, CLASS_DISPLAY = 0x03, CLASS_3D = 0x0302, CLASS_ACCELERATOR = 0x12 };

static const char *info_of(hwloc_obj_t o, const char *name)
{
    const char *value = hwloc_obj_get_info_by_name(o, name);
    return value ? value : "";
}

// An OS device that a compute back end of hwloc found (not the kernel's "card0", which a board's
// management chip has too).
static bool is_compute(hwloc_obj_t os)
{
    const char *by = info_of(os, "Backend");
    return !strcmp(by, "CUDA") || !strcmp(by, "NVML") || !strcmp(by, "RSMI") ||
           !strcmp(by, "LevelZero") || !strcmp(by, "OpenCL");
}

static bool is_accelerator(hwloc_obj_t pci)
{
    const unsigned class = pci->attr->pcidev.class_id;
    if (class == CLASS_3D || class >> 8 == CLASS_ACCELERATOR)
        return true;
    for (hwloc_obj_t os = pci->io_first_child; os; os = os->next_sibling)
        if (is_compute(os))
            return true;
    return false;
}

static bool is_nvswitch(hwloc_obj_t pci)
{
    return pci->subtype && !strcmp(pci->subtype, "NVSwitch");
}

// ---- the list of objects ------------------------------------------------------------------------

// What a walk carries. `of` gives back hwloc's object of each of ours, for the matrices.
struct walk {
    hwloc_topology_t hwloc;
    struct topology *t;
    hwloc_obj_t *of;
    int room;
};

static struct topology_object *append(struct walk *w, enum topology_kind kind, int parent,
                                      hwloc_obj_t from)
{
    struct topology *t = w->t;
    if (t->count == OBJECTS_MOST)
        return NULL;
    if (t->count == w->room) {
        const int room = w->room ? 2 * w->room : 64;
        struct topology_object *objects = realloc(t->objects, (size_t)room * sizeof *objects);
        if (objects)
            t->objects = objects;
        hwloc_obj_t *of = realloc(w->of, (size_t)room * sizeof *of);
        if (of)
            w->of = of;
        if (!objects || !of)
            return NULL;
        w->room = room;
    }
    struct topology_object *o = &t->objects[t->count];
    *o = (struct topology_object){.kind = kind, .parent = parent};
    o->depth = parent < 0 ? 0 : t->objects[parent].depth + 1;
    o->number = from ? (int)from->os_index : 0;
    w->of[t->count++] = from;
    return o;
}

static void join(char *list, size_t size, const char *word)
{
    const size_t n = strlen(list);
    if (n + 1 < size)
        snprintf(list + n, size - n, "%s%s", n ? ", " : "", word);
}

// Bytes of a number of KiB in an information attribute, or 0.
static uint64_t kib_of(hwloc_obj_t o, const char *name)
{
    return strtoull(info_of(o, name), NULL, 10) << 10;
}

static uint64_t memory_of(hwloc_obj_t os)
{
    static const char *const names[] = {"CUDAGlobalMemorySize", "OpenCLGlobalMemorySize",
                                        "RSMIVRAMSize",         "LevelZeroHBMSize",
                                        "LevelZeroDDRSize",     "LevelZeroMemorySize"};
    uint64_t most = 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const uint64_t bytes = kib_of(os, names[i]);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static void set_pci(struct topology_object *o, hwloc_obj_t pci)
{
    const struct hwloc_pcidev_attr_s *a = &pci->attr->pcidev;
    snprintf(o->pci, sizeof o->pci, "%04x:%02x:%02x.%01x", a->domain & 0xffff, a->bus, a->dev,
             a->func);
    o->link = o->slowest = (double)a->linkspeed * GIGA;
    if (pci->name && !o->name[0])
        snprintf(o->name, sizeof o->name, "%s", pci->name);
    for (hwloc_obj_t up = pci->parent; up && up->type == HWLOC_OBJ_BRIDGE; up = up->parent) {
        const double link = (double)up->attr->bridge.upstream.pci.linkspeed * GIGA;
        if (up->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_PCI && link > 0 &&
            (o->slowest == 0 || link < o->slowest))
            o->slowest = link;
    }
}

static bool add_accelerator(struct walk *w, int parent, hwloc_obj_t pci)
{
    struct topology_object *o = append(w, TOPOLOGY_ACCELERATOR, parent, pci);
    if (!o)
        return false;
    o->accelerator = DEVICE_GPU;
    for (hwloc_obj_t os = pci->io_first_child; os; os = os->next_sibling) {
        const uint64_t memory = memory_of(os);
        if (!is_compute(os))
            continue;
        join(o->drivers, sizeof o->drivers, os->name ? os->name : "?");
        o->memory = memory > o->memory ? memory : o->memory;
        if (!o->name[0])
            snprintf(o->name, sizeof o->name, "%s", info_of(os, "GPUModel"));
        if (!strcmp(info_of(os, "OpenCLDeviceType"), "Accelerator"))
            o->accelerator = DEVICE_ACCELERATOR;
    }
    set_pci(o, pci);
    if (!o->name[0])
        snprintf(o->name, sizeof o->name, "accelerator of vendor %04x",
                 pci->attr->pcidev.vendor_id);
    return true;
}

// The name that people know a network device by: of OpenFabrics before Ethernet.
static bool add_network(struct walk *w, int parent, hwloc_obj_t pci)
{
    struct topology_object *o = append(w, TOPOLOGY_NETWORK, parent, pci);
    if (!o)
        return false;
    for (hwloc_obj_t os = pci->io_first_child; os; os = os->next_sibling)
        if (os->name && (!o->name[0] || os->attr->osdev.type == HWLOC_OBJ_OSDEV_OPENFABRICS))
            snprintf(o->name, sizeof o->name, "%s", os->name);
    set_pci(o, pci);
    return true;
}

// ---- the walk -----------------------------------------------------------------------------------

// Whether anything that is kept hangs below.
static int kept_below(hwloc_obj_t o)
{
    int count = 0;
    for (hwloc_obj_t c = o->io_first_child; c; c = c->next_sibling) {
        if (c->type == HWLOC_OBJ_PCI_DEVICE)
            count += is_accelerator(c) || is_nvswitch(c) ||
                     c->attr->pcidev.class_id >> 8 == CLASS_NETWORK;
        else
            count += kept_below(c);
    }
    return count;
}

static bool walk_io(struct walk *w, hwloc_obj_t o, int parent)
{
    if (o->type == HWLOC_OBJ_PCI_DEVICE) {
        if (is_nvswitch(o)) {
            struct topology_object *s = append(w, TOPOLOGY_SWITCH, parent, o);
            if (s)
                set_pci(s, o);
            return s != NULL;
        }
        if (is_accelerator(o))
            return add_accelerator(w, parent, o);
        return o->attr->pcidev.class_id >> 8 != CLASS_NETWORK || add_network(w, parent, o);
    }
    if (o->type != HWLOC_OBJ_BRIDGE || kept_below(o) == 0)
        return true;
    int branches = 0, at = parent;
    for (hwloc_obj_t c = o->io_first_child; c; c = c->next_sibling)
        branches += c->type == HWLOC_OBJ_PCI_DEVICE || kept_below(c) > 0;
    const bool root = o->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_HOST;
    if (root || branches > 1) {
        struct topology_object *b = append(w, TOPOLOGY_BRIDGE, parent, o);
        if (!b)
            return false;
        at = w->t->count - 1;
        snprintf(b->name, sizeof b->name, root ? "PCIe root %04x:%02x" : "PCIe switch %04x:%02x",
                 o->attr->bridge.downstream.pci.domain & 0xffff,
                 o->attr->bridge.downstream.pci.secondary_bus);
        if (!root)
            b->link = (double)o->attr->bridge.upstream.pci.linkspeed * GIGA;
    }
    for (hwloc_obj_t c = o->io_first_child; c; c = c->next_sibling)
        if (!walk_io(w, c, at))
            return false;
    return true;
}

static bool walk(struct walk *w, hwloc_obj_t o, int parent)
{
    int at = parent;
    if (o->type == HWLOC_OBJ_PACKAGE) {
        struct topology_object *p = append(w, TOPOLOGY_PACKAGE, parent, o);
        if (!p)
            return false;
        snprintf(p->name, sizeof p->name, "%s", info_of(o, "CPUModel"));
        p->cores = hwloc_get_nbobjs_inside_cpuset_by_type(w->hwloc, o->cpuset, HWLOC_OBJ_CORE);
        at = w->t->count - 1;
    }
    for (hwloc_obj_t c = o->memory_first_child; c; c = c->next_sibling) {
        for (hwloc_obj_t n = c; n && n->type != HWLOC_OBJ_NUMANODE; n = n->memory_first_child)
            c = n->memory_first_child ? n->memory_first_child : c; // past memory-side caches
        struct topology_object *n = append(w, TOPOLOGY_NUMA, at, c);
        if (!n)
            return false;
        n->memory = c->attr->numanode.local_memory;
    }
    for (hwloc_obj_t c = o->first_child; c; c = c->next_sibling)
        if (!walk(w, c, at))
            return false;
    for (hwloc_obj_t c = o->io_first_child; c; c = c->next_sibling)
        if (!walk_io(w, c, at))
            return false;
    return true;
}

// The machine's CPUs as one accelerator: a rank can run on them.
static bool add_cpu(struct walk *w)
{
    struct topology_object *o = append(w, TOPOLOGY_ACCELERATOR, 0, NULL);
    if (!o)
        return false;
    const int package = hwloc_get_nbobjs_by_type(w->hwloc, HWLOC_OBJ_PACKAGE);
    hwloc_obj_t first = hwloc_get_obj_by_type(w->hwloc, HWLOC_OBJ_PACKAGE, 0);
    o->accelerator = DEVICE_CPU;
    o->cores = hwloc_get_nbobjs_by_type(w->hwloc, HWLOC_OBJ_CORE);
    o->memory = hwloc_get_root_obj(w->hwloc)->total_memory;
    snprintf(o->name, sizeof o->name, "%.90s%s", first ? info_of(first, "CPUModel") : "CPU",
             package > 1 ? ", all packages" : "");
    return true;
}

// ---- matrices -----------------------------------------------------------------------------------

static int index_lists(struct topology *t)
{
    t->node = calloc((size_t)t->count + 1, sizeof *t->node);
    t->accelerator = calloc((size_t)t->count + 1, sizeof *t->accelerator);
    if (!t->node || !t->accelerator)
        return fail(ERR_NOMEM, "no host memory for a topology");
    for (int i = 0; i < t->count; i++) {
        if (t->objects[i].kind == TOPOLOGY_NUMA)
            t->node[t->nodes++] = i;
        if (t->objects[i].kind == TOPOLOGY_ACCELERATOR)
            t->accelerator[t->accelerators++] = i;
    }
    const size_t a = (size_t)t->accelerators;
    t->nvlink = calloc(a * a + 1, sizeof *t->nvlink);
    return t->nvlink ? 0 : fail(ERR_NOMEM, "no host memory for a topology");
}

static int node_at(const struct walk *w, hwloc_obj_t o)
{
    for (int n = 0; n < w->t->nodes; n++)
        if (w->of[w->t->node[n]] == o)
            return n;
    return -1;
}

static int copy_latencies(struct walk *w, const struct hwloc_distances_s *d)
{
    struct topology *t = w->t;
    const size_t n = (size_t)t->nodes;
    int *at = calloc(n + 1, sizeof *at);
    t->latency = calloc(n * n + 1, sizeof *t->latency);
    for (size_t i = 0; at && i < n; i++)
        at[i] = node_at(w, d->objs[i]);
    for (size_t i = 0; at && t->latency && i < n * n; i++)
        if (at[i / n] >= 0 && at[i % n] >= 0)
            t->latency[(size_t)at[i / n] * n + (size_t)at[i % n]] = (double)d->values[i];
    free(at);
    return at && t->latency ? 0 : fail(ERR_NOMEM, "no host memory for a topology");
}

static int read_latencies(struct walk *w)
{
    struct hwloc_distances_s *d;
    unsigned count = 1;
    int code = 0;
    if (hwloc_distances_get_by_type(w->hwloc, HWLOC_OBJ_NUMANODE, &count, &d,
                                    HWLOC_DISTANCES_KIND_MEANS_LATENCY, 0) != 0 ||
        count == 0)
        return 0;
    if (d->nbobjs == (unsigned)w->t->nodes)
        code = copy_latencies(w, d);
    hwloc_distances_release(w->hwloc, d);
    return code;
}

// The accelerator that an object of a matrix is, or is part of; -1: none.
static int accelerator_of(const struct walk *w, hwloc_obj_t o)
{
    while (o && o->type == HWLOC_OBJ_OS_DEVICE)
        o = o->parent;
    for (int a = 0; o && a < w->t->accelerators; a++)
        if (w->of[w->t->accelerator[a]] == o)
            return a;
    return -1;
}

static bool is_switch_port(const struct hwloc_distances_s *d, unsigned i)
{
    return d->objs[i] && d->objs[i]->type == HWLOC_OBJ_PCI_DEVICE && is_nvswitch(d->objs[i]);
}

// Bytes a second from i to j of the matrix (in MB/s): directly, or by the switches, which pass on
// whatever comes to them, to each other too.
static double between(const struct hwloc_distances_s *d, unsigned i, unsigned j)
{
    const unsigned n = d->nbobjs;
    double in = 0, out = 0;
    if (d->values[i * n + j] > 0)
        return (double)d->values[i * n + j] * 1e6;
    for (unsigned s = 0; s < n; s++) {
        if (is_switch_port(d, s)) {
            in += (double)d->values[i * n + s];
            out += (double)d->values[s * n + j];
        }
    }
    return (in < out ? in : out) * 1e6;
}

static void read_nvlink(struct walk *w)
{
    struct topology *t = w->t;
    struct hwloc_distances_s *d;
    unsigned count = 1;
    if (hwloc_distances_get_by_name(w->hwloc, "NVLinkBandwidth", &count, &d, 0) != 0 || count == 0)
        return;
    for (unsigned i = 0; i < d->nbobjs; i++) {
        const int a = accelerator_of(w, d->objs[i]);
        for (unsigned j = 0; a >= 0 && j < d->nbobjs; j++) {
            const int b = accelerator_of(w, d->objs[j]);
            if (b >= 0 && b != a)
                t->nvlink[a * t->accelerators + b] = between(d, i, j);
            else if (d->objs[j] && d->objs[j]->type == HWLOC_OBJ_PACKAGE)
                t->objects[t->accelerator[a]].nvlink_host +=
                    (double)d->values[i * d->nbobjs + j] * 1e6;
        }
    }
    hwloc_distances_release(w->hwloc, d);
}

// ---- loading ------------------------------------------------------------------------------------

static hwloc_topology_t hwloc_new(void)
{
    hwloc_topology_t h;
    if (hwloc_topology_init(&h) != 0)
        return NULL;
    hwloc_topology_set_io_types_filter(h, HWLOC_TYPE_FILTER_KEEP_ALL);
    hwloc_topology_set_components(h, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "opencl");
    hwloc_topology_set_components(h, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, "gl");
    return h;
}

static int convert(hwloc_topology_t h, struct topology *t, bool with_cpu)
{
    struct walk w = {.hwloc = h, .t = t};
    hwloc_obj_t root = hwloc_get_root_obj(h);
    struct topology_object *machine = append(&w, TOPOLOGY_MACHINE, -1, root);
    if (machine)
        snprintf(machine->name, sizeof machine->name, "%s",
                 info_of(root, "DMIProductName")[0] ? info_of(root, "DMIProductName")
                                                    : info_of(root, "PlatformModel"));
    int code =
        machine && walk(&w, root, 0) && (!with_cpu || add_cpu(&w))
            ? 0
            : fail(ERR_NOMEM, "%s: no host memory for more than %d objects", t->source, t->count);
    if (code >= 0)
        code = index_lists(t);
    if (code >= 0)
        code = read_latencies(&w);
    if (code >= 0)
        read_nvlink(&w);
    free(w.of);
    return code;
}

// A regular file of a size that a topology may have: the parser is told nothing else.
static int check_file(const char *path)
{
    struct stat s;
    if (stat(path, &s) != 0)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(s.st_mode))
        return fail(ERR_INPUT, "%s: not a file", path);
    if (s.st_size == 0 || s.st_size > XML_MOST)
        return fail(ERR_INPUT, "%s: %lld bytes are not a topology", path, (long long)s.st_size);
    return 0;
}

static int from_hwloc(hwloc_topology_t h, const char *source, bool with_cpu, struct topology **out)
{
    struct topology *t = calloc(1, sizeof *t);
    if (!t)
        return fail(ERR_NOMEM, "no host memory for a topology");
    snprintf(t->source, sizeof t->source, "%s", source);
    int code = convert(h, t, with_cpu);
    if (code < 0)
        topology_free(t);
    else
        *out = t;
    return code;
}

static int load_xml(const char *path, struct topology **out)
{
    hwloc_topology_t h = hwloc_new();
    int code = ERR_INPUT;
    if (!h)
        return fail(ERR_NOMEM, "no host memory for a topology");
    if (hwloc_topology_set_xml(h, path) == 0 && hwloc_topology_load(h) == 0)
        code = from_hwloc(h, path, true, out);
    hwloc_topology_destroy(h);
    return code;
}

// hwloc trusts its files: a damaged one can crash it, hang it, or make it print boxes of asterisks.
// So a child tries first; true when it could read the file in peace.
static bool child_can_read(const char *path)
{
    enum { SECONDS_MOST = 30 };
    int pipes[2], status = -1;
    char byte;
    if (pipe(pipes) != 0)
        return false;
    const pid_t child = fork();
    if (child == 0) {
        struct topology *t = NULL;
        alarm(SECONDS_MOST);
        dup2(pipes[1], STDERR_FILENO);
        close(pipes[1]);
        _exit(load_xml(path, &t) < 0);
    }
    close(pipes[1]);
    bool printed = false;
    while (child > 0 && read(pipes[0], &byte, 1) == 1)
        printed = true;
    close(pipes[0]);
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    return child > 0 && !printed && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int topology_read(const char *path, struct topology **out)
{
    TRY(check_file(path));
    if (!child_can_read(path))
        return fail(
            ERR_INPUT,
            "%s: not a topology that hwloc %d reads (lstopo machine.xml writes one; that of "
            "hwloc 3: lstopo --export-xml-flags v2 machine.xml)",
            path, HWLOC_API_VERSION >> 16);
    return load_xml(path, out);
}

int topology_here(struct topology **out)
{
    struct device_info list[DEVICES_MOST];
    int count = devices_list(list, DEVICES_MOST), code;
    TRY(count);
    hwloc_topology_t h = hwloc_new();
    if (h && hwloc_topology_load(h) == 0)
        code = from_hwloc(h, "this machine", false, out);
    else
        code = fail(ERR_NODEVICE, "hwloc cannot look at this machine");
    if (h)
        hwloc_topology_destroy(h);
    TRY(code);
    code = topology_join(*out, list, count);
    if (code < 0)
        topology_free(*out);
    return code;
}

void topology_free(struct topology *t)
{
    if (!t)
        return;
    free(t->objects);
    free(t->node);
    free(t->latency);
    free(t->accelerator);
    free(t->nvlink);
    free(t->devices);
    free(t);
}

// ---- questions ----------------------------------------------------------------------------------

const char *topology_kind_name(enum topology_kind kind)
{
    static const char *const names[] = {[TOPOLOGY_MACHINE] = "machine",
                                        [TOPOLOGY_PACKAGE] = "package",
                                        [TOPOLOGY_NUMA] = "NUMA node",
                                        [TOPOLOGY_BRIDGE] = "bridge",
                                        [TOPOLOGY_ACCELERATOR] = "accelerator",
                                        [TOPOLOGY_NETWORK] = "network",
                                        [TOPOLOGY_SWITCH] = "switch"};
    BUG_IF((unsigned)kind > TOPOLOGY_SWITCH);
    return names[kind];
}

int topology_package_of(const struct topology *t, int object)
{
    while (object >= 0 && t->objects[object].kind != TOPOLOGY_PACKAGE)
        object = t->objects[object].parent;
    return object;
}

// The only node of its package, or of the machine.
int topology_node_of(const struct topology *t, int object)
{
    const int package = topology_package_of(t, object);
    int found = -1;
    for (int n = 0; n < t->nodes; n++) {
        if (package >= 0 && topology_package_of(t, t->node[n]) != package)
            continue;
        if (found >= 0)
            return -1;
        found = n;
    }
    return found;
}

uint64_t topology_memory(const struct topology *t)
{
    uint64_t sum = 0;
    for (int n = 0; n < t->nodes; n++)
        sum += t->objects[t->node[n]].memory;
    return sum;
}

int topology_cores(const struct topology *t)
{
    int sum = 0;
    for (int i = 0; i < t->count; i++)
        if (t->objects[i].kind == TOPOLOGY_PACKAGE)
            sum += t->objects[i].cores;
    return sum;
}
