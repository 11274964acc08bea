// A machine as hwloc sees it: packages, NUMA nodes, PCIe bridges, accelerators, network devices,
// and how accelerators reach each other. Of this machine, its accelerators joined to the devices
// that can be opened (by PCI id); or of a machine that is not here, from the XML file that
// `lstopo machine.xml` writes there.
#ifndef DITMOE_TOPOLOGY_H
#define DITMOE_TOPOLOGY_H

#include "devices/device.h"

enum topology_kind {
    TOPOLOGY_MACHINE,
    TOPOLOGY_PACKAGE,
    TOPOLOGY_NUMA,
    TOPOLOGY_BRIDGE, // a PCIe root, or a switch with more than one thing behind it
    TOPOLOGY_ACCELERATOR,
    TOPOLOGY_NETWORK,
    TOPOLOGY_SWITCH, // an NVSwitch
};

// What is the same for all of a kind is empty or 0; so is what is not known.
struct topology_object {
    enum topology_kind kind;
    int parent, depth;  // index in objects, -1 and 0 of the machine; parents come before children
    char name[128];     // "NVIDIA H200", "mlx5_0", "Intel(R) Xeon(R) ..."
    char drivers[64];   // of an accelerator: what hwloc's back ends call it: "cuda0, nvml0"
    char pci[20];       // "0000:3b:00.0"
    int number;         // package or NUMA node: the system's number
    int cores;          // of a package
    uint64_t memory;    // of a NUMA node or accelerator, bytes
    double link;        // bytes/s of the PCIe link to it, one way, as linked now
    double slowest;     // and of the slowest link from it up to its root
    double nvlink_host; // bytes/s one way of NVLink to the host (POWER8, POWER9, Grace)
    enum device_kind accelerator;
    struct device_info *device; // of this machine: what can be opened there, or NULL
    char key[24];               // its key, or, where it cannot be opened, "": of XML always
};

struct topology {
    char source[256]; // "this machine" or the file's name
    bool here;
    int count;
    struct topology_object *objects; // in the order of a walk, children after their parent
    int nodes;                       // NUMA nodes, in the order of `objects`
    int *node;                       // [nodes] index in objects
    double *latency;                 // [nodes, nodes] relative, 10 is local; NULL: not known
    int accelerators;
    int *accelerator; // [accelerators] index in objects; the CPU comes last
    double *nvlink;   // [accelerators, accelerators] bytes/s one way, through switches; 0: none
    struct device_info *devices; // [device_count] of this machine
    int device_count;
};

int topology_here(struct topology **out);
// ERR_IO: cannot be read. ERR_INPUT: not XML, not hwloc's, or a version that hwloc cannot read.
int topology_read(const char *path, struct topology **out);
void topology_free(struct topology *t); // NULL is allowed

// The NUMA node (index in node[]) that an object hangs on, or -1: none or several.
int topology_node_of(const struct topology *t, int object);
// The package that an object hangs on (index in objects), or -1.
int topology_package_of(const struct topology *t, int object);
// Memory of all NUMA nodes, cores of all packages.
uint64_t topology_memory(const struct topology *t);
int topology_cores(const struct topology *t);
const char *topology_kind_name(enum topology_kind kind);

// Binds this process, and the threads that it starts from now on, to the cores near `device`. One
// without a PCI place (a CPU) gets part `part` of `parts` of the NUMA nodes, or all cores where
// these cannot be so divided. What was done goes to `words` ("cores 0-23, near 0000:3b:00.0").
// Where the system does not allow it, that is said there and is no error.
int topology_bind(const struct device_info *device, int part, int parts, char *words, size_t size);

#endif
