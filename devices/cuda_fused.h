// Inside the CUDA backend: memory-bound operations in one pass, the kernels of fused.cu.
#ifndef DITMOE_CUDA_FUSED_H
#define DITMOE_CUDA_FUSED_H

#include "devices/cuda_tuned.h"

// The widest model that combine and LayerNorm are fused for (device.h: fused_width); 0: none.
int cuda_fused_width(struct cuda_device *dev);

// accelerate() for the operations of accelerate.h
int cuda_fused(struct stream *s, enum accelerated op, const void *args);

#endif
