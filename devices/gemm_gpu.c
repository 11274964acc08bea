#include "devices/gemm_gpu.h"

#include <math.h>

enum { LARGE = 128, SMALL = 64 }; // tiles: GEMM_LARGE, GEMM_SMALL in kernels.cl

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
    const int groups = g->ragged == GEMM_PLAIN ? 1 : g->groups;
    BUG_IF(g->dots && (g->swiglu != SWIGLU_BACKWARD || groups > dev->swiglu_dots || g->k % 8));
}

// Work-groups in x, y, z of the kernels with square tiles of `tile`.
static void tiles_of(const struct gemm *g, int tile, int groups[3])
{
    const bool forward = g->swiglu == SWIGLU_FORWARD;
    groups[0] = forward ? gemm_cover(g->n / 2, tile / 2) : gemm_cover(g->n, tile);
    groups[1] = gemm_cover(g->m, tile);
    groups[2] = g->ragged == GEMM_RAGGED_K ? g->groups : 1;
    if (g->ragged == GEMM_RAGGED_M)
        groups[1] += g->groups; // every expert may end with a part of a tile
}

// The time of a product by one kind of tile. Compute units take `resident` tiles at a time, in
// waves; a wave takes `latency` and, for each tile, `work`.
static double tiles_time(const struct gemm *g, int tile, int units, int resident, double latency,
                         double work)
{
    int groups[3];
    tiles_of(g, tile, groups);
    double tiles = ceil((double)groups[0] * groups[1] * groups[2] / (units > 0 ? units : 1));
    return latency * ceil(tiles / resident) + work * tiles;
}

// Small tiles fill a device better, large ones read less. The numbers are those of an H100 at k =
// 384 (docs/opencl_gpu.md), in units of 37 us: what a large tile takes where there are many.
static bool suits_small(const struct device *dev, const struct gemm *g)
{
    const int units = dev->info.compute_units;
    return tiles_time(g, SMALL, units, 6, 0.55, 0.18) < tiles_time(g, LARGE, units, 2, 0.6, 0.7);
}

int gemm_gpu(const struct device *dev, struct stream *s, const struct gemm *g)
{
    enum kernel kernel = g->trans_a ? KERNEL_gemm_tn : g->trans_b ? KERNEL_gemm_nt : KERNEL_gemm_nn;
    const bool small = suits_small(dev, g);
    int groups[3];
    tiles_of(g, small ? SMALL : LARGE, groups);
    if (small)
        kernel = g->trans_a   ? KERNEL_gemm_small_tn
                 : g->trans_b ? KERNEL_gemm_small_nt
                              : KERNEL_gemm_small_nn;
    const union arg args[] = {{.b = g->a},
                              {.b = g->b},
                              {.b = g->c},
                              {.b = g->bias},
                              {.b = g->swiglu == SWIGLU_NONE ? NULL : g->h},
                              {.b = g->ragged == GEMM_PLAIN ? NULL : g->offsets},
                              {.i = g->groups},
                              {.i = g->m},
                              {.i = g->n},
                              {.i = g->k},
                              {.i = gemm_flags(g)}};
    return dev->api->launch(s, kernel, groups, args, sizeof args / sizeof args[0]);
}
