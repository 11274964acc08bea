// The tuner: which of several ways to do the same thing is fastest on this device?
//
// Measured once, then remembered: in the process, and in the user's cache (tune-HASH.json, one file
// a device, driver and version of kernels.cl). DITMOE_TUNE=0 switches measuring off: candidate 0 is
// taken, whatever is remembered. Results may differ in rounding between candidates, so what must be
// the same bit for bit from run to run sets it.
#ifndef DITMOE_TUNE_H
#define DITMOE_TUNE_H

#include "devices/device.h"

// Does the work of `candidate` `repeats` times and waits for the end (sync). A negative code means
// that this candidate cannot be used here.
typedef int tune_run(void *user, int candidate, int repeats);

// The index of the fastest of `count` candidates for the work that `key` names, e.g.
// "gemm nt f32 512x1536x384". The first call for a key runs each candidate once to warm up, then
// takes the median of interleaved rounds of some milliseconds each; later calls cost a look-up.
// Returns the index, or the code of the last failure when no candidate can be used.
int tune_choose(struct device *dev, const char *key, int count, tune_run *run, void *user);

#endif
