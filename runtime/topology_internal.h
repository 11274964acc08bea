// Between topology.c, which reads hwloc, and topology_join.c, which knows devices.
#ifndef DITMOE_TOPOLOGY_INTERNAL_H
#define DITMOE_TOPOLOGY_INTERNAL_H

#include "runtime/topology.h"

// Joins the devices of this machine to its accelerators by PCI id, and adds those that hwloc does
// not show (a container's, or a CPU device) at the root. Sizes and matrices are completed from the
// drivers.
int topology_join(struct topology *t, const struct device_info *list, int count);

#endif
