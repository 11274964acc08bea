// Convolutions of the CUDA backend: accelerate()'s ACCELERATE_CONV2D.
#ifndef DITMOE_CUDA_CONV_H
#define DITMOE_CUDA_CONV_H

#include "devices/accelerate.h"
#include "devices/cuda_tuned.h"

// 0, a negative code, or NOT_MINE.
int cuda_conv2d(struct stream *s, const struct convolution *a);

#endif
