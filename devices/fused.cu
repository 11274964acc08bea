// Memory-bound operations of a block, of the router, of the optimiser and of convolutional
// networks, one pass over memory each.
#include "devices/fused_back.cuh"
#include "devices/fused_group.cuh"
#include "devices/fused_moe.cuh"
#include "devices/fused_norm.cuh"
#include "devices/fused_peers.cuh"
#include "devices/fused_pool.cuh"
#include "devices/fused_qk.cuh"
#include "devices/fused_train.cuh"
