// Matrix products of bf16 on Hopper by gemm_sm90.cu, for cuda_gemm.c; by conv_sm90.cu, for
// cuda_conv.c.
#ifndef DITMOE_CUDA_GEMM_SM90_H
#define DITMOE_CUDA_GEMM_SM90_H

#include "devices/cuda_tuned.h"
#include "devices/gemm_sm90.h"

// Whether this device has the kernels. They are loaded here, so that no product has to.
bool cuda_gemm_sm90_here(struct cuda_device *dev);
int cuda_gemm_sm90_groups(struct cuda_device *dev); // most groups of a product; 0: not here

// Whether g is for them: bf16 operands on such a device; C bf16, or f32 for A^T B and A B^T;
// columns and k multiples of 8; at most 320 groups. Not whether its memory is aligned to 16 bytes,
// which it is where views are made as device.h says.
bool cuda_gemm_sm90_suits(struct cuda_device *dev, const struct gemm *g);

// For a product that suits: the bytes of scratch it wants, and the product by tiles of `width`
// columns (64, 128, 192; 0: the best). NOT_MINE when there are no such.
size_t cuda_gemm_sm90_space(const struct cuda_device *dev, const struct gemm *g);
int cuda_gemm_sm90(struct stream *s, const struct gemm *g, int width);

// How many norms of parts of C it leaves by the best tiles (struct gemm): 0 unless A^T B.
int cuda_gemm_sm90_norms(const struct cuda_device *dev, const struct gemm *g);

// Whether they are expected to be faster than cuBLASLt, which balances better where there are but a
// few times as many tiles as multiprocessors, and long sums (plain A^T B).
bool cuda_gemm_sm90_wins(const struct cuda_device *dev, const struct gemm *g);

// A convolution as the product g (plain, of B^T; c: bf16, or f32 of rows of n): A is `pixels`, a
// map of pixels of so many channels by boxes of GEMM_SM90_ROWS, met as x says. Space is used where
// g's has room for the sums of parts. Only where the kernels are here.
bool cuda_conv_sm90_here(struct cuda_device *dev);
int cuda_conv_sm90(struct stream *s, const struct gemm *g, const struct gemm_sm90_pixels *x,
                   const struct cuda_map *pixels, int channels);

// By cuBLASLt (cuda_gemm.c); NOT_MINE where that has nothing for it. Into rows of C that are
// `pitch` elements apart, with ReLU behind it where wanted.
int cuda_gemm_by_library(struct stream *s, const struct gemm *g);
int cuda_gemm_into(struct stream *s, const struct gemm *g, int pitch, bool relu);

#endif
