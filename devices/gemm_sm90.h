// What the host (cuda_gemm_sm90.c) and the kernels (gemm_sm90.cu) agree on: the arguments of a
// product and the shared memory that a tile width needs. C and CUDA C++.
#ifndef DITMOE_GEMM_SM90_H
#define DITMOE_GEMM_SM90_H

enum {
    GEMM_SM90_ROWS = 128,      // rows of a tile
    GEMM_SM90_DEPTH = 64,      // elements of k in a stage: 128 bytes, the width of the swizzle
    GEMM_SM90_THREADS = 384,   // a warpgroup that loads and two that multiply
    GEMM_SM90_GROUPS = 512,    // most experts
    GEMM_SM90_PARTS = 8,       // most parts of a tile's sum over k, and fewest stages of each
    GEMM_SM90_SHARED = 232448, // bytes of shared memory that a block may have
};

// A product C[m,n] = op(A) op(B) as a kernel sees it; see struct gemm. The matrices A and B come as
// tensor maps. Addresses are the device's.
struct gemm_sm90 {
    void *c;
    void *h;
    const float *bias;
    const int *offsets; // NULL: one group of all rows
    void *space;        // sums of parts of tiles; NULL: no tile is divided
    int groups;
    int m, n, k; // n: columns of h for SWIGLU_FORWARD, of dh for SWIGLU_BACKWARD
    int accumulate;
    int band;    // tiles of rows that are swept column by column
    int workers; // blocks that take tiles
};

// Bytes: of a stage; of the rows that the eight warps hand around on their way out (16 of 64
// columns each); of g | u that a warpgroup turns into dg | du (64 columns of a tile); of the
// barriers and the tables of groups. How many stages fit beside `units` of g | u, and the bytes of
// it all.
#define GEMM_SM90_STAGE(width) ((GEMM_SM90_ROWS + (width)) * GEMM_SM90_DEPTH * 2)
#define GEMM_SM90_STAGING (8 * 16 * (2 * 64 + 16))
#define GEMM_SM90_UNIT (2 * GEMM_SM90_ROWS * 128)
#define GEMM_SM90_BARRIERS 192
#define GEMM_SM90_BESIDES(units)                                       \
    ((units)*GEMM_SM90_UNIT + GEMM_SM90_STAGING + GEMM_SM90_BARRIERS + \
     2 * (GEMM_SM90_GROUPS + 4) * 4)
#define GEMM_SM90_FIT(width, units) \
    ((GEMM_SM90_SHARED - GEMM_SM90_BESIDES(units)) / GEMM_SM90_STAGE(width))
#define GEMM_SM90_STAGES(width, units) \
    (GEMM_SM90_FIT(width, units) > 8 ? 8 : GEMM_SM90_FIT(width, units))
#define GEMM_SM90_BYTES(width, units) \
    (GEMM_SM90_STAGES(width, units) * GEMM_SM90_STAGE(width) + GEMM_SM90_BESIDES(units))

#endif
