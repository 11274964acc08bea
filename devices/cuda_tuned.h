// Inside the CUDA backend: kernels that beat the portable ones. Each image is a file of CUDA C++
// beside this one, compiled by nvcc into a fat binary of its own and loaded at its first use. A
// device that an image has no code for, or that was opened as portable, runs kernels.cl instead.
#ifndef DITMOE_CUDA_TUNED_H
#define DITMOE_CUDA_TUNED_H

#include "devices/cuda.h"

// I(name): devices/NAME.cu; the architectures of each are in CMakeLists.txt.
#define CUDA_IMAGES(I) \
    I(attention)       \
    I(attention_sm90)  \
    I(conv_sm90)       \
    I(fused)           \
    I(gemm_sm90)

enum cuda_image {
#define IMAGE(name) IMAGE_##name,
    CUDA_IMAGES(IMAGE)
#undef IMAGE
    IMAGE_COUNT
};

// The function `name` of an image, with leave to use `shared` bytes of dynamic shared memory; NULL
// where this device has none. `name` is a literal: what was found is kept by its address.
cuda_function cuda_tuned(struct cuda_device *dev, enum cuda_image image, const char *name,
                         unsigned shared);

// Launches gx * gy * gz blocks of `threads`; `arguments` are addresses of the kernel's parameters.
int cuda_tuned_launch(struct stream *s, cuda_function function, const unsigned grid[3],
                      unsigned threads, unsigned shared, void **arguments);

// A CUtensorMap: an argument of kernels on Hopper, by value.
struct cuda_map {
    _Alignas(64) uint64_t words[16];
};

// Describes an array of bf16 and the boxes that are copied of it. sizes and box: `rank` of them,
// innermost first; pitches: rank - 1, elements from one row to the next, one matrix to the next ...
// swizzled: rows of a box, 128 bytes (as wgmma wants them) or 64, lie in shared memory with the
// swizzle of that width; else one after the other. Not for devices whose driver has no such maps
// (cuda_api: tensor_map is NULL).
int cuda_tuned_map(const struct cuda_device *dev, struct cuda_map *map, cuda_address address,
                   int rank, const int *sizes, const int64_t *pitches, const int *box,
                   bool swizzled);

// Describes images of bf16, channels innermost (`sizes`: channels, width, height, images; multiples
// of 8 channels), and how a convolution meets them: boxes of 64 channels of `count` pixels,
// swizzled as above, of those where the kernel can begin, from (-before[0], -before[1]) on, up to
// after[0] and after[1] beyond the last (both x, then y), `stride` apart. False where that is out
// of the engine's bounds.
bool cuda_tuned_pixel_map(const struct cuda_device *dev, struct cuda_map *map, cuda_address address,
                          const int sizes[4], const int before[2], const int after[2], int stride,
                          int count);

// The images that have code for a device of this compute capability (90 for 9.0): "attention,
// fused".
void cuda_tuned_text(int capability, char *out, size_t size);

void cuda_tuned_close(struct cuda_device *dev);

// accelerate() of device.h, one function an operation: 0, a negative code, or NOT_MINE.
int cuda_accelerate(struct stream *s, enum accelerated op, const void *args);

#endif
