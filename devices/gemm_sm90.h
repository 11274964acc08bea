// What the host (cuda_gemm_sm90.c) and the kernels (gemm_sm90.cu) agree on: the arguments of a
// product and the shared memory that a tile width needs. C and CUDA C++.
#ifndef DITMOE_GEMM_SM90_H
#define DITMOE_GEMM_SM90_H

enum {
    GEMM_SM90_ROWS = 128,      // rows of a tile
    GEMM_SM90_DEPTH = 64,      // elements of k in a stage: 128 bytes, the width of the swizzle
    GEMM_SM90_THREADS = 384,   // a warpgroup that loads and two that multiply
    GEMM_SM90_GROUPS = 320,    // most experts
    GEMM_SM90_PARTS = 8,       // most parts of a tile's sum over k, and fewest stages of each
    GEMM_SM90_STRIPS = 2,      // pieces of g | u that a warp has in shared memory
    GEMM_SM90_SHARED = 232448, // bytes of shared memory that a block may have
};

// What A of a product is that is a convolution: a row of it holds what the kernel meets of x at one
// pixel of y, tap by tap (ky, kx), 64 channels `chunks` times for each, zeros behind the last: k =
// taps * chunks * 64. B is [n, taps, channels].
//
// Doubled (a kernel of 3 x 3 on pixels that count four times): the four pixels of y at one pixel of
// x meet 2 x 2 pixels of x each, with weights that are sums of the kernel's. They are four groups
// of rows, number 2 (y odd) + (x odd), with taps of their own in B.
struct gemm_sm90_pixels {
    int width, height;     // pixels of y in a line and lines of an image; doubled: of x
    int stride, left, top; // the first pixel of y meets x from (-left, -top)
    int taps, kernel_w, chunks;
    int pitch; // elements from one row of C to the next, where that is bf16
    int relu, doubled;
};

// A product C[m,n] = op(A) op(B) as a kernel sees it; see struct gemm. The matrices A and B, and
// for SwiGLU C and h, come as tensor maps too. Addresses are the device's.
struct gemm_sm90 {
    void *c;
    void *h;
    float *dots;
    float *norms; // of 16 rows of each tile of A^T B; or NULL
    const float *bias;
    const int *offsets; // NULL: one group of all rows
    void *space;        // sums of parts of tiles; NULL: no tile is divided
    int groups; // without offsets: of as many rows each
    int m, n, k; // n: columns of h for SWIGLU_FORWARD, of dh for SWIGLU_BACKWARD
    int accumulate;
    int band;    // tiles of rows that are swept column by column
    int workers; // blocks that take tiles
    struct gemm_sm90_pixels pixels;
};

// Bytes: of a stage; of what one of the eight warps hands around on its way out (16 rows of 32
// columns of g, u and h, or of 64 of one matrix); of 16 rows of 64 columns of g | u that a warp
// turns into dg | du; of the barriers and the tables of groups. How many stages fit beside `strips`
// of g | u a warp, and the bytes of it all.
#define GEMM_SM90_STAGE(width) ((GEMM_SM90_ROWS + (width)) * GEMM_SM90_DEPTH * 2)
#define GEMM_SM90_STAGING 3072
#define GEMM_SM90_STRIP (2 * 16 * 128)
#define GEMM_SM90_BARRIERS 272
#define GEMM_SM90_BESIDES(strips)                                                  \
    (8 * (GEMM_SM90_STAGING + (strips)*GEMM_SM90_STRIP) + GEMM_SM90_BARRIERS + \
     2 * (GEMM_SM90_GROUPS + 4) * 4)
#define GEMM_SM90_FIT(width, strips) \
    ((GEMM_SM90_SHARED - GEMM_SM90_BESIDES(strips)) / GEMM_SM90_STAGE(width))
#define GEMM_SM90_STAGES(width, strips) \
    (GEMM_SM90_FIT(width, strips) > 8 ? 8 : GEMM_SM90_FIT(width, strips))
#define GEMM_SM90_BYTES(width, strips) \
    (GEMM_SM90_STAGES(width, strips) * GEMM_SM90_STAGE(width) + GEMM_SM90_BESIDES(strips))

#endif
