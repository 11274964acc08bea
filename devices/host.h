// What hwloc and the operating system say of this machine: its memory, and where devices sit.
#ifndef DITMOE_HOST_H
#define DITMOE_HOST_H

#include <stdint.h>

#include "devices/device.h"

// Bytes that this process may plan to use: the least of installed memory, memory now available, and
// the limits of the control groups (v1 and v2) it is in. UINT64_MAX when nothing can be learnt.
// `root` stands before /proc and /sys: "" for this machine.
uint64_t host_memory(const char *root);

// Completes what drivers said: numa and place from the PCI id; memory, of devices that share the
// host's, from what the host has.
void host_complete(struct device_info *list, int count);

#endif
