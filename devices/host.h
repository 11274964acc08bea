// What the operating system says of this machine's memory.
#ifndef DITMOE_HOST_H
#define DITMOE_HOST_H

#include <stdint.h>

// Bytes that this process may plan to use: the least of installed memory, memory now available, and
// the limits of the control groups (v1 and v2) it is in. UINT64_MAX when nothing can be learnt.
// `root` stands before /proc and /sys: "" for this machine.
uint64_t host_memory(const char *root);

#endif
