// The kernels of gemm_sm90.cu and conv_sm90.cu: copies by the tensor memory accelerator, wgmma,
// sums in f32.
//
// A block stays on its multiprocessor and takes every gridDim.x'th tile of C. Of its three
// warpgroups the first loads: one thread keeps a ring of stages full, each 64 of k of 128 rows of A
// and WIDTH of B, in the form in which the matrices are stored. The other two multiply. Each takes
// every second tile, so that one's way out (through registers, shared memory and whole rows) hides
// behind the other's products.
//
// Tiles of a ragged product are found from offsets[] by every block alone. Rows of A past an
// expert's last are the next expert's or nobody's: they make rows of C that are not stored. Where k
// is ragged, they would be summed over, and are cleared in shared memory.
#ifndef DITMOE_GEMM_SM90_KERNEL_CUH
#define DITMOE_GEMM_SM90_KERNEL_CUH

#include "devices/gemm_sm90_finish.cuh"
#include "devices/gemm_sm90_pixels.cuh"

namespace
{

// ---- loading ------------------------------------------------------------------------------------

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void load_stage(uint32_t to, uint32_t barrier, const tensor_map *a,
                                           const tensor_map *b, const gemm_sm90 &p, const tile &t,
                                           int k)
{
    const uint32_t to_b = to + ROWS * DEPTH * 2;
    if (K::ACROSS_A) {
        load_box(to, a, barrier, t.row, k);
        load_box(to + BLOCK, a, barrier, t.row + 64, k);
    } else {
        load_box(to, a, barrier, k, t.row);
        if (t.end - t.row > 64)
            load_box(to + BLOCK, a, barrier, k, t.row + 64);
    }
    const int matrix = K::RAGGED_K ? 0 : t.group;
    if (K::ACROSS_B) {
#pragma unroll
        for (int j = 0; j < WIDTH / 64; j++)
            load_box(to_b + j * BLOCK, b, barrier, t.column + j * 64, k, matrix);
    } else if (FINISH == SWIGLU_FWD) { // columns of g, then the same columns of u
        load_box(to_b, b, barrier, k, t.column, matrix);
        load_box(to_b + WIDTH / 2 * DEPTH * 2, b, barrier, k, p.n + t.column, matrix);
    } else {
        load_box(to_b, b, barrier, k, t.column, matrix);
    }
}

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void load_tiles(const shared &s, const tensor_map *a,
                                           const tensor_map *b, const gemm_sm90 &p)
{
    if constexpr (K::PIXELS)
        return load_pixels<K, WIDTH>(s, a, b, p);
    ring<K::STAGES> at;
    int group = 0;
    const schedule of = find_schedule<K>(s, p);
    const int items = of.whole + of.rest * of.parts;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const tile t = find_tile<K>(s, p, of, i, &group);
        const bool half = !K::ACROSS_A && t.end - t.row <= 64; // no need of the other rows
        for (int k = 0; k < t.length; k += DEPTH, at.next()) {
            barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
            barrier_expect(s.full + 8 * at.stage, half ? K::STAGE - BLOCK : K::STAGE);
            load_stage<K, FINISH, WIDTH>(s.stages + at.stage * K::STAGE, s.full + 8 * at.stage, a,
                                         b, p, t, t.k + k);
        }
    }
}

// ---- multiplying --------------------------------------------------------------------------------

// Clears the rows of k from `valid` on, in a stage of two matrices that run across.
template <int WIDTH> __device__ __forceinline__ void clear_tail(uint32_t stage, int valid)
{
    const int thread = threadIdx.x % 128;
    for (int block = 0; block < (ROWS + WIDTH) / 64; block++)
        for (int row = valid + thread / 8; row < DEPTH; row += 16)
            clear_shared(stage + block * BLOCK + row * 128 + thread % 8 * 16);
    fence_async();
    named_barrier(1 + threadIdx.x / 128, 128);
}

// One stage: every block of 64 rows with all columns.
template <class K, int WIDTH>
__device__ __forceinline__ void multiply_stage(float (&sum)[BLOCKS][WIDTH / 2], uint32_t stage,
                                               int add)
{
    const uint64_t b = descriptor<K::ACROSS_B>(stage + ROWS * DEPTH * 2);
    const uint64_t a = descriptor<K::ACROSS_A>(stage);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++)
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
            wgmma<WIDTH, K::ACROSS_A, K::ACROSS_B>::run(
                sum[i], a + i * (BLOCK >> 4) + step * DESCRIPTOR_STEP<K::ACROSS_A>,
                b + step * DESCRIPTOR_STEP<K::ACROSS_B>, add | step);
    wgmma_commit();
}

// This warp has read a stage, if any.
__device__ __forceinline__ void release(const shared &s, int stage)
{
    if (stage >= 0 && threadIdx.x % 32 == 0)
        barrier_arrive(s.empty + 8 * stage);
}

template <class K, int WIDTH>
__device__ __forceinline__ void multiply_tile(float (&sum)[BLOCKS][WIDTH / 2], const shared &s,
                                              ring<K::STAGES> &at, int length)
{
    int done = -1; // the stage that is being read by products on their way
    for (int k = 0; k < length; k += DEPTH, at.next()) {
        const uint32_t stage = s.stages + at.stage * K::STAGE;
        barrier_wait(s.full + 8 * at.stage, at.phase);
        if (K::RAGGED_K && length - k < DEPTH)
            clear_tail<WIDTH>(stage, length - k);
        multiply_stage<K, WIDTH>(sum, stage, k);
        wgmma_wait<1>();
        release(s, done);
        done = at.stage;
    }
    if (threadIdx.x % 32 == 0) // every stage of this tile is here: the next one may be awaited
        barrier_arrive(s.turn + (threadIdx.x < 256 ? 8 : 0));
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < WIDTH / 2; j++)
            asm volatile("" : "+f"(sum[i][j])::"memory");
    release(s, done);
}

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void multiply_tiles(const shared &s, const tensor_map *c,
                                               const tensor_map *h, const gemm_sm90 &p)
{
    const int warpgroup = threadIdx.x / 128 - 1;
    ring<K::STAGES> at;
    int group = 0, turn = 0;
    // Barriers tell a phase only from the next one: a warpgroup waits for its tile's stages when
    // those of the tile before are there. The first tile has no such.
    int turn_phase = warpgroup == 0;
    const schedule of = find_schedule<K>(s, p);
    const int items = of.whole + of.rest * of.parts;
    strips<K, WIDTH> units;
    if constexpr (FINISH == SWIGLU_BWD)
        units.begin(s, c, p, items);
    for (int i = blockIdx.x; i < items; i += gridDim.x, turn ^= 1) {
        const tile t = find_tile<K>(s, p, of, i, &group);
        if (turn != warpgroup) {
            at.skip(cover(t.length, DEPTH));
            continue;
        }
        float sum[BLOCKS][WIDTH / 2];
        if ((K::DIVIDES || K::RAGGED_K) && t.length == 0) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int j = 0; j < WIDTH / 2; j++)
                    sum[b][j] = 0.0f;
        }
        barrier_wait(s.turn + 8 * warpgroup, turn_phase);
        turn_phase ^= 1;
        multiply_tile<K, WIDTH>(sum, s, at, t.length);
        if (K::DIVIDES && t.part >= 0)
            keep_part<WIDTH>(sum, p, t.part);
        else if constexpr (FINISH == SWIGLU_BWD)
            finish_swiglu_backward<K, WIDTH>(sum, units, s, c, h, p, t);
        else if (FINISH == SWIGLU_FWD && p.c)
            finish_swiglu_kept<WIDTH>(sum, s, c, h, p, t);
        else
            finish_tile<K, FINISH, WIDTH>(sum, s, p, t);
    }
    store_wait(); // shared memory may go when everything has been read from it
}

// ---- kernels ------------------------------------------------------------------------------------

template <form FORM, finish FINISH, int WIDTH>
__device__ __forceinline__ void run(const tensor_map &a, const tensor_map &b, const tensor_map &c,
                                    const tensor_map &h, const gemm_sm90 &p)
{
    typedef kernel<FORM, FINISH, WIDTH> K;
    const shared s = shared_of(K::STAGES * K::STAGE, 8 * K::STRIPS * GEMM_SM90_STRIP);
    if (threadIdx.x == 0) {
        prefetch_map(&a);
        prefetch_map(&b);
        for (int i = 0; i < K::STAGES; i++) {
            barrier_init(s.full + 8 * i, 1);
            barrier_init(s.empty + 8 * i, 4); // warps that read it
        }
        for (int i = 0; i < 2; i++)
            barrier_init(s.turn + 8 * i, 4);
        for (int i = 0; i < 8 * K::STRIPS; i++)
            barrier_init(s.strip_full + 8 * i, 1);
        barrier_fence();
    }
    await_previous();
    launch_next();
    if (threadIdx.x / 32 == 1)
        find_groups(s, p, threadIdx.x % 32, K::RAGGED_K);
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_less<24>();
        if (threadIdx.x == 0)
            load_tiles<K, FINISH, WIDTH>(s, &a, &b, p);
    } else {
        registers_more<240>();
        multiply_tiles<K, FINISH, WIDTH>(s, &c, &h, p);
    }
}

// C of the tiles whose sums were left in parts. A warp for 16 rows of a tile.
template <form FORM, finish FINISH, int WIDTH>
__device__ __forceinline__ void finish_rest(const gemm_sm90 &p)
{
    typedef kernel<FORM, FINISH, WIDTH> K;
    __shared__ __align__(16) unsigned char staging[4 * GEMM_SM90_STAGING];
    __shared__ int tables[2 * (GEMM_SM90_GROUPS + 4)];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    shared s = {};
    s.start = tables;
    s.first = tables + GEMM_SM90_GROUPS + 4;
    await_previous();
    launch_next();
    if (warp == 0)
        find_groups(s, p, lane, K::RAGGED_K);
    __syncthreads();
    const schedule of = find_schedule<K>(s, p);
    const int strip = blockIdx.x * 4 + warp, item = strip / 8;
    if (item >= of.rest)
        return;
    int group = 0;
    const tile t = find_whole<K>(s, p, of.whole + item, &group);
    const int row = t.row + strip % 8 * 16;
    float sum[WIDTH / 2] = {};
    for (int part = 0; part < of.parts; part++)
        add_part<WIDTH>(sum, p, part * of.rest + item, strip % 8);
    place_in_c at;
    at.staging = (uint32_t)__cvta_generic_to_shared(staging) + warp * GEMM_SM90_STAGING;
    at.row = row + (K::RAGGED_K ? (size_t)t.group * p.m : 0);
    at.rows = t.end - row;
    at.column = t.column;
    at.columns = p.n - t.column;
    at.strip = t.number * (ROWS / 16) + strip % 8;
    if (at.rows > 0 || (K::RAGGED_K && p.norms))
        finish_rows<K, FINISH, WIDTH>(sum, p, at);
}

} // namespace

#define ARGUMENTS                                                                               \
    const __grid_constant__ sm90::tensor_map a, const __grid_constant__ sm90::tensor_map b,     \
        const __grid_constant__ sm90::tensor_map c, const __grid_constant__ sm90::tensor_map h, \
        const __grid_constant__ gemm_sm90 p
#define GEMM(name, form, finish, width)                                                          \
    extern "C" __global__ void __launch_bounds__(GEMM_SM90_THREADS, 1) name##_##width(ARGUMENTS) \
    {                                                                                            \
        run<form, finish, width>(a, b, c, h, p);                                                 \
    }
#define GEMM_REST(name, form, finish, width)                       \
    extern "C" __global__ void __launch_bounds__(128)              \
        name##_##width##_rest(const __grid_constant__ gemm_sm90 p) \
    {                                                              \
        finish_rest<form, finish, width>(p);                       \
    }
#define WIDTHS(KERNEL, name, form, finish) \
    KERNEL(name, form, finish, 64)         \
    KERNEL(name, form, finish, 128)        \
    KERNEL(name, form, finish, 192)

#endif
