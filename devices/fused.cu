// Memory-bound operations of a block as one pass over memory each: what lies between its products.
#include "devices/fused_norm.cuh"
#include "devices/fused_back.cuh"
