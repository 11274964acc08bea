// Matrix products, what backends share: the check of a struct gemm, and the launch of the project's
// own kernels in their GPU form (kernels.cl).
#ifndef DITMOE_GEMM_GPU_H
#define DITMOE_GEMM_GPU_H

#include "devices/device.h"

// The `flags` argument of the gemm kernels (kernels.cl has the same numbers).
enum gemm_flags {
    GEMM_ACCUMULATE = 1,
    GEMM_A_BF16 = 2,
    GEMM_B_BF16 = 4,
    GEMM_C_BF16 = 8,
    GEMM_B_IN_PLACE = 64,
    GEMM_SWIGLU_FORWARD = 128,
    GEMM_SWIGLU_BACKWARD = 256,
};

static inline int gemm_flags(const struct gemm *g)
{
    return (g->accumulate ? GEMM_ACCUMULATE : 0) | (g->type_a == BF16 ? GEMM_A_BF16 : 0) |
           (g->type_b == BF16 ? GEMM_B_BF16 : 0) | (g->type_c == BF16 ? GEMM_C_BF16 : 0) |
           (g->swiglu == SWIGLU_FORWARD ? GEMM_SWIGLU_FORWARD : 0) |
           (g->swiglu == SWIGLU_BACKWARD ? GEMM_SWIGLU_BACKWARD : 0);
}

static inline int gemm_cover(int count, int size)
{
    return (int)(((int64_t)count + size - 1) / size);
}

// Aborts on a product that device.h does not define, or not for this device.
void gemm_check(const struct device *dev, const struct gemm *g);

// SwiGLU fits into the kernels where F is a multiple of this (4 numbers are moved at once).
enum { GEMM_GPU_SWIGLU = 4 };

// Any product, by the tiled kernels gemm_nt, gemm_nn and gemm_tn of the stream's device.
int gemm_gpu(const struct device *dev, struct stream *s, const struct gemm *g);

#endif
