// Weights in several files and an index that says which tensor is where:
// {"metadata": {...}, "weight_map": {"NAME": "FILE", ...}}, with FILE in the index's directory.
#ifndef DITMOE_SHARDED_H
#define DITMOE_SHARDED_H

#include "model/safetensors.h"

int sharded_open(const char *index, struct safetensors **out);

#endif
