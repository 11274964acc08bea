// Matrix products on OpenCL: the project's own kernels in the form that suits the device.
#include "devices/opencl_gemm.h"

// ---- the GPU form
// --------------------------------------------------------------------------------------

enum { TILE_M = 128, TILE_N = 64 }; // GEMM_TM, GEMM_TN in kernels_gemm.cl

static int gemm_gpu(struct stream *s, const struct gemm *g)
{
    enum kernel kernel = g->trans_a ? KERNEL_gemm_tn : g->trans_b ? KERNEL_gemm_nt : KERNEL_gemm_nn;
    int rows = gemm_cover(g->m, TILE_M);
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups; // every expert may end with a part of a tile
    return GEMM_LAUNCH(s, kernel, gemm_cover(g->n, TILE_N), rows,
                       g->ragged == GEMM_RAGGED_K ? g->groups : 1, {.b = g->a}, {.b = g->b},
                       {.b = g->c}, {.b = g->bias},
                       {.b = g->ragged == GEMM_PLAIN ? NULL : g->offsets}, {.i = g->groups},
                       {.i = g->m}, {.i = g->n}, {.i = g->k}, {.i = gemm_flags(g)});
}

// ---- the verbs
// -----------------------------------------------------------------------------------------

static void check(const struct gemm *g)
{
    BUG_IF(g->m < 0 || g->n < 0 || g->k < 0);
    BUG_IF(g->trans_a && g->trans_b);
    BUG_IF(g->ragged == GEMM_RAGGED_M && g->trans_a);
    BUG_IF(g->ragged == GEMM_RAGGED_K && !g->trans_a);
    BUG_IF(g->bias && g->ragged != GEMM_PLAIN);
}

size_t opencl_gemm_space(struct device *base, const struct gemm *g)
{
    check(g);
    return base->cpu_forms ? opencl_gemm_cpu_space(opencl_device_of(base), g) : 0;
}

int opencl_gemm(struct stream *s, const struct gemm *g)
{
    check(g);
    return s->dev->base.cpu_forms ? opencl_gemm_cpu(s, g) : gemm_gpu(s, g);
}

void opencl_gemm_close(struct opencl_device *dev)
{
    (void)dev;
}
