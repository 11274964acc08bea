// The way out of gemm_sm90.cu: from the sums that threads hold, by bias, SwiGLU or its gradient, to
// rows of C and h.
#ifndef DITMOE_GEMM_SM90_FINISH_CUH
#define DITMOE_GEMM_SM90_FINISH_CUH

#include "devices/gemm_sm90_tiles.cuh"

namespace
{

// ---- storing ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&both;
}

__device__ __forceinline__ float2 unpack(uint32_t both)
{
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

__device__ __forceinline__ float sigmoid(float x)
{
    float e, s; // in the fewest instructions, since they take turns with the products
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
}

// 16 rows of COLUMNS that a warp holds as fragments: word[j][i] is columns 8 j + 2 (lane % 4) and
// the next, in row lane / 4 + 8 i. They go to shared memory, so that lanes then have 16 bytes each
// of whole rows.
template <int COLUMNS>
__device__ __forceinline__ void hand_around(uint32_t staging,
                                            const uint32_t (&word)[COLUMNS / 8][2])
{
    const int lane = threadIdx.x % 32;
    const uint32_t to = staging + lane % 16 * (2 * COLUMNS + 16) + lane / 16 * 16;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2)
        store_matrices(to + j * 16, word[j][0], word[j][1], word[j + 1][0], word[j + 1][1]);
    __syncwarp();
}

// Where this lane's first eight columns of those are; its next ones are STEP rows below.
template <int COLUMNS> struct place {
    static constexpr int STEP = 256 / COLUMNS, COUNT = 16 / STEP, PITCH = 2 * COLUMNS + 16;
    int row, column;
    __device__ __forceinline__ place()
    {
        row = threadIdx.x % 32 / (COLUMNS / 8);
        column = threadIdx.x % (COLUMNS / 8) * 8;
    }
    __device__ __forceinline__ uint32_t address(uint32_t staging) const
    {
        return staging + row * PITCH + column * 2;
    }
};

// Writes them to `out` (the first row and column), as far as `rows` and `columns` go.
template <int COLUMNS>
__device__ __forceinline__ void store_rows(uint32_t staging, const uint32_t (&word)[COLUMNS / 8][2],
                                           bf16 *out, size_t pitch, int rows, int columns)
{
    const place<COLUMNS> at;
    hand_around<COLUMNS>(staging, word);
    uint4 v[at.COUNT];
#pragma unroll
    for (int i = 0; i < at.COUNT; i++)
        v[i] = load_shared(at.address(staging) + i * at.STEP * at.PITCH);
    out += at.row * pitch + at.column;
    if (at.column >= columns)
        rows = 0;
#pragma unroll
    for (int i = 0; i < at.COUNT; i++)
        if (at.row + i * at.STEP < rows)
            store_global(out + i * at.STEP * pitch, v[i]);
}

// Where a warp's 16 rows of a tile go.
struct place_in_c {
    uint32_t staging;
    size_t row;        // of C
    int rows, columns; // how many of them there are; columns from the tile's first
    int column;
};

// sum += bias
template <int WIDTH>
__device__ __forceinline__ void add_bias(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                         const place_in_c &at)
{
    const int column = threadIdx.x % 4 * 2;
    const float *bias = p.bias + at.column + column;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
        if (8 * j < at.columns) {
            const float2 v = *(const float2 *)(bias + 8 * j);
            sum[4 * j] += v.x;
            sum[4 * j + 1] += v.y;
            sum[4 * j + 2] += v.x;
            sum[4 * j + 3] += v.y;
        }
}

// sum += C, bf16
template <int WIDTH>
__device__ __forceinline__ void add_bf16(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                         const place_in_c &at)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + 8 * i;
        const bf16 *c = (const bf16 *)p.c + (at.row + row) * p.n + at.column + lane % 4 * 2;
        const int columns = row < at.rows ? at.columns : 0;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            if (8 * j < columns) {
                const float2 v = unpack(*(const uint32_t *)(c + 8 * j));
                sum[4 * j + 2 * i] += v.x;
                sum[4 * j + 2 * i + 1] += v.y;
            }
    }
}

// C (+)= sum (+ bias), bf16
template <int WIDTH, int COUNT>
__device__ __forceinline__ void finish_bf16(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                            const place_in_c &at)
{
    bf16 *c = (bf16 *)p.c + at.row * p.n + at.column;
    if (p.bias)
        add_bias<WIDTH>(sum, p, at);
    if (p.accumulate)
        add_bf16<WIDTH>(sum, p, at);
#pragma unroll
    for (int from = 0; from < WIDTH; from += COUNT) {
        uint32_t word[COUNT / 8][2];
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++)
            word[i / 2][i % 2] = pack(sum[from / 2 + 2 * i], sum[from / 2 + 2 * i + 1]);
        store_rows<COUNT>(at.staging, word, c + from, p.n, at.rows, at.columns - from);
    }
}

// C (+)= sum (+ bias), f32: four lanes write the 32 bytes of a sector
template <int WIDTH>
__device__ __forceinline__ void finish_f32(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                           const place_in_c &at)
{
    const int lane = threadIdx.x % 32;
    if (p.bias)
        add_bias<WIDTH>(sum, p, at);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + 8 * i, columns = row < at.rows ? at.columns : 0;
        float *c = (float *)p.c + (at.row + row) * p.n + at.column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
            if (8 * j >= columns)
                continue;
            float2 v = make_float2(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
            if (p.accumulate) {
                const float2 old = *(const float2 *)(c + 8 * j);
                v = make_float2(v.x + old.x, v.y + old.y);
            }
            *(float2 *)(c + 8 * j) = v;
        }
    }
}

// sum = g | u: h = silu(g) u, and C = g | u when wanted
template <int WIDTH, int COUNT>
__device__ __forceinline__ void finish_swiglu(const float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                              const place_in_c &at)
{
#pragma unroll
    for (int from = 0; from < WIDTH / 2; from += COUNT) {
        uint32_t word[COUNT / 8][2];
        const float *g = &sum[from / 2], *u = &sum[WIDTH / 4 + from / 2];
        bf16 *h = (bf16 *)p.h + at.row * p.n + at.column + from;
        bf16 *c = (bf16 *)p.c + 2 * at.row * p.n + at.column + from;
        const int columns = at.columns - from;
        if (p.c) {
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++)
                word[i / 2][i % 2] = pack(g[2 * i], g[2 * i + 1]);
            store_rows<COUNT>(at.staging, word, c, 2 * (size_t)p.n, at.rows, columns);
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++)
                word[i / 2][i % 2] = pack(u[2 * i], u[2 * i + 1]);
            store_rows<COUNT>(at.staging, word, c + p.n, 2 * (size_t)p.n, at.rows, columns);
        }
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++)
            word[i / 2][i % 2] = pack(g[2 * i] * sigmoid(g[2 * i]) * u[2 * i],
                                      g[2 * i + 1] * sigmoid(g[2 * i + 1]) * u[2 * i + 1]);
        store_rows<COUNT>(at.staging, word, h, p.n, at.rows, columns);
    }
}

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void finish_rows(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                            const place_in_c &at)
{
    if constexpr (FINISH == TO_BF16)
        finish_bf16<WIDTH, CHUNK<K>>(sum, p, at);
    else if constexpr (FINISH == TO_F32)
        finish_f32<WIDTH>(sum, p, at);
    else if constexpr (FINISH == SWIGLU_FWD)
        finish_swiglu<WIDTH, CHUNK<K>>(sum, p, at);
}

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void finish_tile(float (&sum)[BLOCKS][WIDTH / 2], const shared &s,
                                            const gemm_sm90 &p, const tile &t)
{
    const int warp = threadIdx.x / 32 - 4;
    place_in_c at;
    at.staging = s.staging + warp * (GEMM_SM90_STAGING / 8);
    at.column = t.column;
    at.columns = p.n - t.column;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const int row = t.row + 64 * i + warp % 4 * 16;
        at.rows = t.end - row;
        at.row = row + (K::RAGGED_K ? (size_t)t.group * p.m : 0);
        if (at.rows > 0)
            finish_rows<K, FINISH, WIDTH>(sum[i], p, at);
    }
}

// The sum of a part of a tile, as its threads have it; and a strip of 16 rows of it added to
// another.
template <int WIDTH>
__device__ __forceinline__ void keep_part(const float (&sum)[BLOCKS][WIDTH / 2], const gemm_sm90 &p,
                                          int part)
{
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        float4 *to =
            (float4 *)p.space + ((size_t)part * 8 + 4 * i + warp) * (WIDTH / 8) * 32 + lane;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            to[j * 32] =
                make_float4(sum[i][4 * j], sum[i][4 * j + 1], sum[i][4 * j + 2], sum[i][4 * j + 3]);
    }
}

template <int WIDTH>
__device__ __forceinline__ void add_part(float (&sum)[WIDTH / 2], const gemm_sm90 &p, int part,
                                         int strip)
{
    const float4 *from =
        (const float4 *)p.space + ((size_t)part * 8 + strip) * (WIDTH / 8) * 32 + threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++) {
        const float4 v = from[j * 32];
        sum[4 * j] += v.x;
        sum[4 * j + 1] += v.y;
        sum[4 * j + 2] += v.z;
        sum[4 * j + 3] += v.w;
    }
}

// ---- the gradient of SwiGLU ---------------------------------------------------------------------

// g | u of every tile of a warpgroup, 64 columns of both at a time, in boxes of 16 rows.
template <class K, int WIDTH>
__device__ __forceinline__ void load_units(const shared &s, const tensor_map *c, const gemm_sm90 &p,
                                           int warpgroup)
{
    const uint32_t full = s.unit_full + 8 * warpgroup, empty = s.unit_empty + 8 * warpgroup;
    const uint32_t unit = s.units + warpgroup * GEMM_SM90_UNIT;
    int group = 0, phase = 1;
    const schedule of = find_schedule<K>(s, p);
    const int items = of.whole + of.rest * of.parts;
    const int step = gridDim.x;
    for (int i = blockIdx.x + warpgroup * step; i < items; i += 2 * step) {
        const tile t = find_tile<K>(s, p, of, i, &group);
        const int boxes = min(ROWS / 16, cover(t.end - t.row, 16));
        for (int j = 0; j < WIDTH; j += 64, phase ^= 1) {
            barrier_wait(empty, phase);
            barrier_expect(full, boxes * 4096);
            for (int box = 0; box < boxes; box++)
                for (int half = 0; half < 2; half++)
                    load_box(unit + half * (GEMM_SM90_UNIT / 2) + box * 2048, c, full, t.column + j,
                             half, t.row + box * 16);
        }
    }
}

// dh, g, u -> dg (in g), du (in u), and h: two columns
__device__ __forceinline__ uint32_t swiglu_backward(float dh_x, float dh_y, uint32_t *g,
                                                    uint32_t *u)
{
    const float2 gate = unpack(*g), up = unpack(*u);
    const float sx = sigmoid(gate.x), sy = sigmoid(gate.y);
    const float hx = gate.x * sx, hy = gate.y * sy; // silu(g)
    *u = pack(dh_x * hx, dh_y * hy);
    *g = pack(dh_x * up.x * (sx + hx * (1.0f - sx)), dh_y * up.y * (sy + hy * (1.0f - sy)));
    return pack(hx * up.x, hy * up.y);
}

// 16 rows of 64 columns of g, and of u half a unit on, in place; word: h, as fragments. A few at a
// time are on their way from shared memory.
__device__ __forceinline__ void change_unit(uint32_t rows_at, const float *sum,
                                            uint32_t (&word)[8][2])
{
    const int lane = threadIdx.x % 32;
    const uint32_t row = rows_at + lane / 4 * 128 + lane % 4 * 4;
#pragma unroll
    for (int from = 0; from < 8; from += 4) {
        uint32_t g[4][2], u[4][2];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t at = row + k % 2 * 1024 + (((from + k / 2) ^ lane / 4) << 4);
            g[k / 2][k % 2] = load_word(at);
            u[k / 2][k % 2] = load_word(at + GEMM_SM90_UNIT / 2);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int j = from + k / 2, i = k % 2;
            word[j][i] = swiglu_backward(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1], &g[k / 2][i],
                                         &u[k / 2][i]);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t at = row + k % 2 * 1024 + (((from + k / 2) ^ lane / 4) << 4);
            store_word(at, g[k / 2][k % 2]);
            store_word(at + GEMM_SM90_UNIT / 2, u[k / 2][k % 2]);
        }
    }
    fence_async();
    __syncwarp();
}

// `rows` of 16 rows of a unit to C, when they are not all.
__device__ __forceinline__ void store_some(uint32_t rows_at, const gemm_sm90 &p, size_t row,
                                           int column, int rows)
{
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    bf16 *c = (bf16 *)p.c + 2 * row * p.n + column + chunk * 8;
    if (column + chunk * 8 >= p.n)
        return;
    for (int i = lane / 8; i < rows; i += 4) {
        const uint32_t at = rows_at + i * 128 + ((chunk ^ i % 8) << 4);
        store_global(c + 2 * i * (size_t)p.n, load_shared(at));
        store_global(c + 2 * i * (size_t)p.n + p.n, load_shared(at + GEMM_SM90_UNIT / 2));
    }
}

// sum = dh: g | u in C becomes dg | du; h again when wanted
template <int WIDTH>
__device__ __forceinline__ void
finish_swiglu_backward(const float (&sum)[BLOCKS][WIDTH / 2], const shared &s, const tensor_map *c,
                       const gemm_sm90 &p, const tile &t, int *phase)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, warpgroup = warp / 4;
    const uint32_t staging = s.staging + warp * (GEMM_SM90_STAGING / 8);
#pragma unroll
    for (int j = 0; j < WIDTH; j += 64, *phase ^= 1) {
        const int column = t.column + j;
        barrier_wait(s.unit_full + 8 * warpgroup, *phase);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            const int from = 64 * i + warp % 4 * 16, row = t.row + from, rows = t.end - row;
            const uint32_t at = s.units + warpgroup * GEMM_SM90_UNIT + from * 128;
            uint32_t word[8][2];
            if (rows <= 0)
                continue;
            change_unit(at, &sum[i][j / 2], word);
            if (rows < 16) {
                store_some(at, p, row, column, rows);
            } else if (lane == 0) {
                store_box(c, at, column, 0, row);
                store_box(c, at + GEMM_SM90_UNIT / 2, column, 1, row);
            }
            if (p.h)
                store_rows<64>(staging, word, (bf16 *)p.h + row * (size_t)p.n + column, p.n, rows,
                               p.n - column);
        }
        __syncwarp();
        if (lane == 0) {
            store_wait();
            barrier_arrive(s.unit_empty + 8 * warpgroup);
        }
    }
}

} // namespace

#endif
