// kernels.cl as bytes in the program (made by CMake from the .cl files at the root of the tree).
#ifndef DITMOE_KERNELS_H
#define DITMOE_KERNELS_H

#include <stddef.h>

extern const unsigned char kernels_cl[];
extern const size_t kernels_cl_size;

#endif
