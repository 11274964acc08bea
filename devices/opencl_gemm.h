// Between opencl_gemm.c (which kernel multiplies) and the files that hold one way each.
#ifndef DITMOE_OPENCL_GEMM_H
#define DITMOE_OPENCL_GEMM_H

#include "devices/gemm_gpu.h"
#include "devices/opencl.h"

// Launches kernel `name` over gx * gy * gz groups with the arguments that follow.
#define GEMM_LAUNCH(s, kernel, gx, gy, gz, ...)                                            \
    (s)->dev->base.api->launch(                                                            \
        (s), (kernel), (const int[3]){(gx), (gy), (gz)}, (const union arg[]){__VA_ARGS__}, \
        (int)(sizeof((const union arg[]){__VA_ARGS__}) / sizeof(union arg)))

// opencl_gemm_cpu.c: the CPU forms (one work-item a tile, packed panels).
int opencl_gemm_cpu(struct stream *s, const struct gemm *g);
size_t opencl_gemm_cpu_space(struct opencl_device *dev, const struct gemm *g);
size_t opencl_gemm_cpu_packed(struct opencl_device *dev, const struct gemm *g);
int opencl_gemm_cpu_pack(struct stream *s, const struct gemm *g);
int opencl_gemm_cpu_panel(const struct opencl_device *dev); // columns of a packed panel

// opencl_clblast.c: CLBlast. wanted: may it take part in this product; *forced: it must.
bool opencl_clblast_wanted(const struct opencl_device *dev, const struct gemm *g, bool *forced);
size_t opencl_clblast_space(struct opencl_device *dev, const struct gemm *g);
int opencl_clblast(struct stream *s, const struct gemm *g);

#endif
