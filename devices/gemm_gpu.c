#include "devices/gemm_gpu.h"

enum { TILE_M = 128, TILE_N = 64 }; // GEMM_TM, GEMM_TN in kernels.cl

void gemm_check(const struct device *dev, const struct gemm *g)
{
    BUG_IF(g->m < 0 || g->n < 0 || g->k < 0);
    BUG_IF(g->trans_a && g->trans_b);
    BUG_IF(g->ragged == GEMM_RAGGED_M && g->trans_a);
    BUG_IF(g->ragged == GEMM_RAGGED_K && !g->trans_a);
    BUG_IF(g->bias && g->ragged != GEMM_PLAIN);
    if (g->swiglu == SWIGLU_NONE)
        return;
    int columns = dev->swiglu_columns, F = g->swiglu == SWIGLU_FORWARD ? g->n / 2 : g->n;
    BUG_IF(columns == 0 || F % columns != 0 || g->trans_b != (g->swiglu == SWIGLU_FORWARD));
    BUG_IF(g->trans_a || g->bias || g->accumulate);
}

int gemm_gpu(const struct backend *api, struct stream *s, const struct gemm *g)
{
    enum kernel kernel = g->trans_a ? KERNEL_gemm_tn : g->trans_b ? KERNEL_gemm_nt : KERNEL_gemm_nn;
    int rows = gemm_cover(g->m, TILE_M);
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups; // every expert may end with a part of a tile
    const int groups[3] = {gemm_cover(g->n, TILE_N), rows,
                           g->ragged == GEMM_RAGGED_K ? g->groups : 1};
    const union arg args[] = {{.b = g->a},
                              {.b = g->b},
                              {.b = g->c},
                              {.b = g->bias},
                              {.b = g->ragged == GEMM_PLAIN ? NULL : g->offsets},
                              {.i = g->groups},
                              {.i = g->m},
                              {.i = g->n},
                              {.i = g->k},
                              {.i = gemm_flags(g)}};
    return api->launch(s, kernel, groups, args, sizeof args / sizeof args[0]);
}
