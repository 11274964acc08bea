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
    int strip; // number of these 16 rows of a tile among all
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

// sum as fragments of bf16
template <int COUNT>
__device__ __forceinline__ void pack_all(uint32_t (&word)[COUNT / 8][2], const float *sum)
{
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++)
        word[i / 2][i % 2] = pack(sum[2 * i], sum[2 * i + 1]);
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
        pack_all<COUNT>(word, &sum[from / 2]);
        store_rows<COUNT>(at.staging, word, c + from, p.n, at.rows, at.columns - from);
    }
}

// C (+)= sum (+ bias), f32: four lanes write the 32 bytes of a sector. Leaves its norm where
// wanted.
template <int WIDTH>
__device__ __forceinline__ void finish_f32(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                           const place_in_c &at)
{
    const int lane = threadIdx.x % 32;
    float squares = 0.0f;
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
            squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
        }
    }
    if (!p.norms)
        return;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        squares += __shfl_xor_sync(~0u, squares, step);
    if (lane == 0)
        p.norms[at.strip] = sqrtf(squares);
}

// h = silu(g) u of COUNT / 4 pairs of columns, packed as fragments
template <int COUNT>
__device__ __forceinline__ void swiglu(uint32_t (&word)[COUNT / 8][2], const float *g,
                                       const float *u)
{
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++)
        word[i / 2][i % 2] = pack(g[2 * i] * sigmoid(g[2 * i]) * u[2 * i],
                                  g[2 * i + 1] * sigmoid(g[2 * i + 1]) * u[2 * i + 1]);
}

// sum = g | u: h = silu(g) u
template <int WIDTH, int COUNT>
__device__ __forceinline__ void finish_swiglu(const float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                              const place_in_c &at)
{
#pragma unroll
    for (int from = 0; from < WIDTH / 2; from += COUNT) {
        uint32_t word[COUNT / 8][2];
        swiglu<COUNT>(word, &sum[from / 2], &sum[WIDTH / 4 + from / 2]);
        store_rows<COUNT>(at.staging, word, (bf16 *)p.h + at.row * p.n + at.column + from, p.n,
                          at.rows, at.columns - from);
    }
}

template <int WIDTH>
__device__ __forceinline__ void finish_pixels(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                              const place_in_c &at); // gemm_sm90_pixels.cuh

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void finish_rows(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                            const place_in_c &at)
{
    if constexpr (FINISH == TO_BF16 && K::PIXELS)
        finish_pixels<WIDTH>(sum, p, at);
    else if constexpr (FINISH == TO_BF16)
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
    at.staging = s.staging + warp * GEMM_SM90_STAGING;
    at.column = t.column;
    at.columns = p.n - t.column;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const int row = t.row + 64 * i + warp % 4 * 16;
        at.rows = t.end - row;
        at.row = row + (K::RAGGED_K ? (size_t)t.group * p.m : 0);
        at.strip = t.number * (ROWS / 16) + 4 * i + warp % 4;
        if (at.rows > 0 || (K::RAGGED_K && p.norms))
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

// ---- SwiGLU with g | u kept ---------------------------------------------------------------------

// 16 rows of 32 columns that a warp holds as fragments to shared memory, as a copy with the 64-byte
// swizzle wants them; row r starts at PITCH r.
template <int PITCH>
__device__ __forceinline__ void place_32(uint32_t at, const uint32_t (&word)[4][2])
{
    const int row = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
    const int swizzle = (row * PITCH >> 7) & 3;
#pragma unroll
    for (int j = 0; j < 4; j += 2)
        store_matrices(at + row * PITCH + (((j + half) ^ swizzle) << 4), word[j][0], word[j][1],
                       word[j + 1][0], word[j + 1][1]);
}

// The first `rows` of what place_32() left, to rows `pitch` apart.
template <int PITCH>
__device__ __forceinline__ void store_some_32(uint32_t at, bf16 *out, size_t pitch, int rows,
                                              int columns)
{
    const int chunk = threadIdx.x % 4;
    for (int row = threadIdx.x % 32 / 4; row < rows && chunk * 8 < columns; row += 8)
        store_global(out + row * pitch + chunk * 8,
                     load_shared(at + row * PITCH + ((chunk ^ ((row * PITCH >> 7) & 3)) << 4)));
}

// sum = g | u: C = g | u and h = silu(g) u. A warp sends 16 rows of 32 columns of all three at a
// time.
template <int WIDTH>
__device__ __forceinline__ void
finish_swiglu_kept(const float (&sum)[BLOCKS][WIDTH / 2], const shared &s, const tensor_map *c,
                   const tensor_map *h, const gemm_sm90 &p, const tile &t)
{
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const uint32_t at = s.staging + warp * GEMM_SM90_STAGING, at_h = at + 2048;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const int row = t.row + 64 * i + warp % 4 * 16, rows = t.end - row;
#pragma unroll
        for (int from = 0; from < WIDTH / 2; from += 32) {
            const int column = t.column + from;
            const float *sum_g = &sum[i][from / 2], *sum_u = &sum[i][WIDTH / 4 + from / 2];
            uint32_t word[4][2];
            if (rows <= 0 || column >= p.n)
                continue;
            swiglu<32>(word, sum_g, sum_u);
            if (lane == 0)
                store_wait();
            __syncwarp();
            place_32<64>(at_h, word);
            pack_all<32>(word, sum_g);
            place_32<128>(at, word);
            pack_all<32>(word, sum_u);
            place_32<128>(at + 64, word);
            fence_async();
            __syncwarp();
            if (rows < 16) {
                bf16 *out = (bf16 *)p.c + 2 * (size_t)row * p.n + column;
                store_some_32<128>(at, out, 2 * (size_t)p.n, rows, p.n - column);
                store_some_32<128>(at + 64, out + p.n, 2 * (size_t)p.n, rows, p.n - column);
                store_some_32<64>(at_h, (bf16 *)p.h + (size_t)row * p.n + column, p.n, rows,
                                  p.n - column);
            } else if (lane == 0) {
                store_box(c, at, column, 0, row);
                store_box(h, at_h, column, row);
                store_commit();
            }
        }
    }
}

// ---- the gradient of SwiGLU ---------------------------------------------------------------------

// g | u on its way to a warp: strips of 16 rows and 64 columns, those of its tiles in order, each
// in one of STRIPS places in shared memory. A warp asks for its own as soon as a place is free, so
// the first ones of a tile come during its products.
template <class K, int WIDTH> struct strips {
    static constexpr int COUNT = BLOCKS * WIDTH / 64; // of a tile
    int item, items, group, number;                   // of the next strip to ask for
    int row, end, column;                             // of its tile: this warp's first row
    uint32_t asked, used;                             // how many

    __device__ __forceinline__ uint32_t place(const shared &s, uint32_t strip) const
    {
        const int warp = threadIdx.x / 32 - 4;
        return s.strips + (warp * K::STRIPS + strip % K::STRIPS) * GEMM_SM90_STRIP;
    }
    __device__ __forceinline__ uint32_t barrier(const shared &s, uint32_t strip) const
    {
        const int warp = threadIdx.x / 32 - 4;
        return s.strip_full + 8 * (warp * K::STRIPS + strip % K::STRIPS);
    }
    __device__ __forceinline__ void begin(const shared &s, const tensor_map *c, const gemm_sm90 &p,
                                          int all)
    {
        item = blockIdx.x + (threadIdx.x / 128 - 1) * gridDim.x;
        items = all;
        group = number = 0;
        asked = used = 0;
        enter(s, p);
        for (int i = 0; i < K::STRIPS; i++)
            ask(s, c, p);
    }
    __device__ __forceinline__ void enter(const shared &s, const gemm_sm90 &p)
    {
        if (item >= items)
            return;
        const tile t = find_whole<K>(s, p, item, &group);
        row = t.row + threadIdx.x / 32 % 4 * 16;
        end = t.end;
        column = t.column;
    }
    // Starts the copy of the next strip, if there is one, to a place that is free.
    __device__ __forceinline__ void ask(const shared &s, const tensor_map *c, const gemm_sm90 &p)
    {
        while (item < items) {
            const int at_row = row + 64 * (number % BLOCKS);
            const int at_column = column + 64 * (number / BLOCKS);
            if (++number == COUNT) {
                const bool there = at_row < end;
                if (there)
                    load(s, c, at_row, at_column);
                number = 0;
                item += 2 * gridDim.x;
                enter(s, p);
                if (there)
                    return;
            } else if (at_row < end) {
                load(s, c, at_row, at_column);
                return;
            }
        }
    }
    __device__ __forceinline__ void load(const shared &s, const tensor_map *c, int at_row,
                                         int at_column)
    {
        if (threadIdx.x % 32 == 0) {
            const uint32_t to = place(s, asked), full = barrier(s, asked);
            barrier_expect(full, GEMM_SM90_STRIP);
            load_box(to, c, full, at_column, 0, at_row);
            load_box(to + GEMM_SM90_STRIP / 2, c, full, at_column, 1, at_row);
        }
        asked++;
    }
    // Waits for the next strip.
    __device__ __forceinline__ uint32_t take(const shared &s)
    {
        barrier_wait(barrier(s, used), used / K::STRIPS & 1);
        return place(s, used++);
    }
};

// dh, g, u -> dg (in g), du (in u), and h: two columns. dot += dh h
__device__ __forceinline__ uint32_t swiglu_backward(float dh_x, float dh_y, uint32_t *g,
                                                    uint32_t *u, float *dot)
{
    const float2 gate = unpack(*g), up = unpack(*u);
    const float sx = sigmoid(gate.x), sy = sigmoid(gate.y);
    const float hx = gate.x * sx, hy = gate.y * sy; // silu(g)
    *u = pack(dh_x * hx, dh_y * hy);
    *g = pack(dh_x * up.x * (sx + hx * (1.0f - sx)), dh_y * up.y * (sy + hy * (1.0f - sy)));
    *dot = fmaf(dh_x, hx * up.x, fmaf(dh_y, hy * up.y, *dot));
    return pack(hx * up.x, hy * up.y);
}

// A strip of g | u in place; word: h, as fragments; dots: this lane's sums of dh h in its two rows.
// A few words at a time are on their way from shared memory.
__device__ __forceinline__ void change_strip(uint32_t strip, const float *sum,
                                             uint32_t (&word)[8][2], float (&dots)[2])
{
    const int lane = threadIdx.x % 32;
    const uint32_t row = strip + lane / 4 * 128 + lane % 4 * 4;
#pragma unroll
    for (int from = 0; from < 8; from += 4) {
        uint32_t g[4][2], u[4][2];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t at = row + k % 2 * 1024 + (((from + k / 2) ^ lane / 4) << 4);
            g[k / 2][k % 2] = load_word(at);
            u[k / 2][k % 2] = load_word(at + GEMM_SM90_STRIP / 2);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int j = from + k / 2, i = k % 2;
            word[j][i] = swiglu_backward(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1], &g[k / 2][i],
                                         &u[k / 2][i], &dots[i]);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t at = row + k % 2 * 1024 + (((from + k / 2) ^ lane / 4) << 4);
            store_word(at, g[k / 2][k % 2]);
            store_word(at + GEMM_SM90_STRIP / 2, u[k / 2][k % 2]);
        }
    }
}

// The sums over a strip's columns; `rows` of its 16 from `row` there are.
__device__ __forceinline__ void store_dots(const gemm_sm90 &p, float (&dots)[2], int row, int rows,
                                           int column)
{
    const int lane = threadIdx.x % 32;
    float *out = p.dots + column / 64 * (size_t)p.m + row;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        dots[i] += __shfl_xor_sync(~0u, dots[i], 1);
        dots[i] += __shfl_xor_sync(~0u, dots[i], 2);
        if (lane % 4 == 0 && lane / 4 + 8 * i < rows)
            out[lane / 4 + 8 * i] = dots[i];
    }
}

// 16 rows of 64 columns as fragments to shared memory, with the 128-byte swizzle.
__device__ __forceinline__ void place_64(uint32_t at, const uint32_t (&word)[8][2])
{
    const int row = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(at + row * 128 + (((j + half) ^ row % 8) << 4), word[j][0], word[j][1],
                       word[j + 1][0], word[j + 1][1]);
}

// The first `rows` of 16 rows of 64 columns in shared memory, to rows `pitch` apart.
__device__ __forceinline__ void store_some_64(uint32_t at, bf16 *out, size_t pitch, int rows,
                                              int columns)
{
    const int chunk = threadIdx.x % 8;
    for (int row = threadIdx.x % 32 / 8; row < rows && chunk * 8 < columns; row += 4)
        store_global(out + row * pitch + chunk * 8,
                     load_shared(at + row * 128 + ((chunk ^ row % 8) << 4)));
}

// sum = dh: g | u in C becomes dg | du; h again when wanted
template <class K, int WIDTH>
__device__ __forceinline__ void
finish_swiglu_backward(const float (&sum)[BLOCKS][WIDTH / 2], strips<K, WIDTH> &units,
                       const shared &s, const tensor_map *c, const tensor_map *h,
                       const gemm_sm90 &p, const tile &t)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
    const uint32_t at_h = s.staging + warp * GEMM_SM90_STAGING;
#pragma unroll
    for (int j = 0; j < WIDTH; j += 64)
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            const int row = t.row + 64 * i + warp % 4 * 16, rows = t.end - row;
            const int column = t.column + j;
            uint32_t word[8][2];
            if (rows <= 0)
                continue;
            const uint32_t at = units.take(s);
            float dots[2] = {};
            change_strip(at, &sum[i][j / 2], word, dots);
            if (p.h)
                place_64(at_h, word);
            fence_async();
            __syncwarp();
            if (rows < 16) {
                bf16 *out = (bf16 *)p.c + 2 * (size_t)row * p.n + column;
                store_some_64(at, out, 2 * (size_t)p.n, rows, p.n - column);
                store_some_64(at + GEMM_SM90_STRIP / 2, out + p.n, 2 * (size_t)p.n, rows,
                              p.n - column);
                if (p.h)
                    store_some_64(at_h, (bf16 *)p.h + (size_t)row * p.n + column, p.n, rows,
                                  p.n - column);
            } else if (lane == 0) {
                store_box(c, at, column, 0, row);
                store_box(c, at + GEMM_SM90_STRIP / 2, column, 1, row);
                if (p.h)
                    store_box(h, at_h, column, row);
                store_commit();
            }
            if (p.dots && column < p.n)
                store_dots(p, dots, row, rows, column);
            if (lane == 0)
                store_wait();
            __syncwarp();
            units.ask(s, c, p);
        }
}

} // namespace

#endif
