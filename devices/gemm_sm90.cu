// Matrix products of bf16 on Hopper (sm_90a), plain and ragged, with SwiGLU within (struct gemm in
// devices/device.h): copies by the tensor memory accelerator, wgmma, sums in f32.
//
// A block stays on its multiprocessor and takes every gridDim.x'th tile of C. Of its three warpgroups
// the first loads: one thread keeps a ring of stages full, each 64 of k of 128 rows of A and WIDTH of
// B, in the form in which the matrices are stored. The other two multiply. Each takes every second
// tile, so that one's way out (through registers, shared memory and whole rows) hides behind the
// other's products. Two blocks may work as a pair, a cluster: side by side, they load each half of the
// rows of A for both, since reading L2 is what limits large products.
//
// Tiles of a ragged product are found from offsets[] by every block alone. Rows of A past an
// expert's last are the next expert's or nobody's: they make rows of C that are not stored. Where k
// is ragged, they would be summed over, and are cleared in shared memory.
#include <cuda_bf16.h>

#include "devices/gemm_sm90.cuh"
#include "devices/gemm_sm90.h"

namespace
{

using namespace sm90;
typedef __nv_bfloat16 bf16;

constexpr int ROWS = GEMM_SM90_ROWS, DEPTH = GEMM_SM90_DEPTH;
constexpr int BLOCKS = ROWS / 64;     // of the rows that one wgmma takes
constexpr int BLOCK = 64 * DEPTH * 2; // bytes of 64 columns of a matrix that runs across
enum form { NT, NN, TN };             // which of A and B run along k: both, A, none
enum finish { TO_BF16, TO_F32, SWIGLU_FWD, SWIGLU_BWD };

// How a kernel is made up.
template <form FORM, finish FINISH, int WIDTH, bool PAIRED> struct kernel {
    static constexpr int PAIR = PAIRED ? 2 : 1; // blocks that share their rows of A
    static constexpr bool ACROSS_A = FORM == TN, ACROSS_B = FORM != NT, RAGGED_K = FORM == TN;
    static constexpr int UNITS = FINISH == SWIGLU_BWD ? 2 : 0; // of g | u: one a warpgroup
    static constexpr int STAGES = GEMM_SM90_STAGES(WIDTH, UNITS);
    static constexpr int STAGE = GEMM_SM90_STAGE(WIDTH);
    static constexpr int COLUMNS = FINISH == SWIGLU_FWD ? WIDTH / 2 : WIDTH; // of n in a tile
    static constexpr int CHUNK = COLUMNS % 64 == 0 ? 64 : 32; // that a warp hands around at once
};

struct shared {
    uint32_t stages, units, staging, full, empty, turn, unit_full, unit_empty; // addresses
    int *start, *first; // [groups + 1]: a group's first tile of rows; first row
};

struct tile {
    int group, row, end, column; // rows row .. end of C (at most 128) from `column`
    int k, length;               // the part of k that is summed over
};

__device__ __forceinline__ shared shared_of(int stages, int units)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    shared s;
    s.stages = (uint32_t)__cvta_generic_to_shared(memory);
    s.units = s.stages + (uint32_t)stages;
    s.staging = s.units + (uint32_t)units;
    s.full = s.staging + GEMM_SM90_STAGING;
    s.empty = s.full + 64;
    s.turn = s.empty + 64;
    s.unit_full = s.turn + 16;
    s.unit_empty = s.unit_full + 16;
    s.start = (int *)(memory + stages + units + GEMM_SM90_STAGING + GEMM_SM90_BARRIERS);
    s.first = s.start + GEMM_SM90_GROUPS + 4;
    return s;
}

// ---- tiles --------------------------------------------------------------------------------------

__device__ __forceinline__ int cover(int count, int size)
{
    return (count + size - 1) / size;
}

// Fills in the tables, by one warp.
__device__ __forceinline__ void find_groups(const shared &s, const gemm_sm90 &p, int lane)
{
    int tiles = 0;
    for (int e0 = 0; e0 < p.groups; e0 += 32) {
        int e = e0 + lane, from = 0, to = 0;
        if (e < p.groups) {
            from = p.offsets ? p.offsets[e] : e * p.part;
            to = p.offsets ? p.offsets[e + 1] : p.part ? min(p.k, from + p.part) : p.m;
        }
        int sum = cover(to - from, ROWS);
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? below : 0;
        }
        if (e < p.groups) {
            s.first[e] = from;
            s.first[e + 1] = to; // the same as the next one's `from`, unless k is split
            s.start[e + 1] = tiles + sum;
        }
        tiles += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0)
        s.start[0] = 0;
}

// This block's number in its pair, and in what takes tiles: a pair or itself.
template <class K> __device__ __forceinline__ int rank_of()
{
    return K::PAIR == 2 ? (int)cluster_rank() : 0;
}

template <class K> __device__ __forceinline__ int tile_count(const shared &s, const gemm_sm90 &p)
{
    int columns = cover(p.n, K::PAIR * K::COLUMNS);
    return columns * (K::RAGGED_K ? p.groups * cover(p.m, ROWS) : s.start[p.groups]);
}

// Tile number t; `at` is a group that is not past its group. Bands of rows are swept column by
// column: the blocks that run together share a few rows of A and of B.
template <class K>
__device__ __forceinline__ tile find_tile(const shared &s, const gemm_sm90 &p, int t, int *at)
{
    const int columns = cover(p.n, K::PAIR * K::COLUMNS), rows = cover(p.m, ROWS);
    int e = *at, count = rows;
    if (K::RAGGED_K) {
        e = t / (rows * columns);
        t -= e * rows * columns;
    } else {
        while (t >= s.start[e + 1] * columns)
            e++;
        t -= s.start[e] * columns;
        count = s.start[e + 1] - s.start[e];
    }
    *at = e;
    const int band = t / (p.band * columns), high = min(p.band, count - band * p.band);
    const int in = t - band * p.band * columns, row = ROWS * (band * p.band + in % high);
    tile out;
    out.group = e;
    out.column = in / high * K::COLUMNS * K::PAIR + rank_of<K>() * K::COLUMNS;
    out.row = K::RAGGED_K ? row : s.first[e] + row;
    out.end = K::RAGGED_K ? p.m : s.first[e + 1];
    out.k = K::RAGGED_K ? s.first[e] : 0;
    out.length = K::RAGGED_K ? s.first[e + 1] - s.first[e] : p.k;
    return out;
}

// ---- loading ------------------------------------------------------------------------------------

// The place in the ring of stages.
template <int STAGES> struct ring {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void next()
    {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ void skip(int count)
    {
        int sum = stage + count;
        stage = sum % STAGES;
        phase ^= sum / STAGES & 1;
    }
};

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void load_stage(uint32_t to, uint32_t barrier, const tensor_map *a,
                                           const tensor_map *b, const gemm_sm90 &p, const tile &t,
                                           int k)
{
    const uint32_t to_b = to + ROWS * DEPTH * 2;
    if (K::PAIR == 2) { // 64 rows for both
        const int half = rank_of<K>() * 64;
        if (K::ACROSS_A)
            load_box_twice(to + half * 128, a, barrier, t.row + half, k);
        else if (t.end - t.row > half)
            load_box_twice(to + half * 128, a, barrier, k, t.row + half);
    } else if (K::ACROSS_A) {
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
    ring<K::STAGES> at;
    int group = 0;
    const int tiles = tile_count<K>(s, p);
    for (int i = blockIdx.x / K::PAIR; i < tiles; i += gridDim.x / K::PAIR) {
        const tile t = find_tile<K>(s, p, i, &group);
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

// This warp has read a stage, if any: those who fill it may know.
template <class K> __device__ __forceinline__ void release(const shared &s, int stage)
{
    const int lane = threadIdx.x % 32;
    if (K::PAIR == 2 && stage >= 0 && lane < 2)
        barrier_arrive_at(s.empty + 8 * stage, lane);
    else if (K::PAIR == 1 && stage >= 0 && lane == 0)
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
        release<K>(s, done);
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
    release<K>(s, done);
}

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
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// 16 rows of COLUMNS that a warp holds as fragments: word[j][i] is columns 8 j + 2 (lane % 4) and the
// next, in row lane / 4 + 8 i. They go to shared memory, so that lanes then have 16 bytes each of
// whole rows.
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
    out += at.row * pitch + at.column;
    if (at.column >= columns)
        rows = 0;
#pragma unroll
    for (int i = 0; i < at.COUNT; i++) {
        const uint4 v = load_shared(at.address(staging) + i * at.STEP * at.PITCH);
        if (at.row + i * at.STEP < rows)
            *(uint4 *)out = v;
        out += at.STEP * pitch;
    }
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
template <int WIDTH, int CHUNK>
__device__ __forceinline__ void finish_bf16(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                            const place_in_c &at)
{
    bf16 *c = (bf16 *)p.c + at.row * p.n + at.column;
    if (p.bias)
        add_bias<WIDTH>(sum, p, at);
    if (p.accumulate)
        add_bf16<WIDTH>(sum, p, at);
#pragma unroll
    for (int from = 0; from < WIDTH; from += CHUNK) {
        uint32_t word[CHUNK / 8][2];
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++)
            word[i / 2][i % 2] = pack(sum[from / 2 + 2 * i], sum[from / 2 + 2 * i + 1]);
        store_rows<CHUNK>(at.staging, word, c + from, p.n, at.rows, at.columns - from);
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
template <int WIDTH, int CHUNK>
__device__ __forceinline__ void finish_swiglu(const float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                              const place_in_c &at)
{
#pragma unroll
    for (int from = 0; from < WIDTH / 2; from += CHUNK) {
        uint32_t word[CHUNK / 8][2];
        const float *g = &sum[from / 2], *u = &sum[WIDTH / 4 + from / 2];
        bf16 *h = (bf16 *)p.h + at.row * p.n + at.column + from;
        bf16 *c = (bf16 *)p.c + 2 * at.row * p.n + at.column + from;
        const int columns = at.columns - from;
        if (p.c) {
#pragma unroll
            for (int i = 0; i < CHUNK / 4; i++)
                word[i / 2][i % 2] = pack(g[2 * i], g[2 * i + 1]);
            store_rows<CHUNK>(at.staging, word, c, 2 * (size_t)p.n, at.rows, columns);
#pragma unroll
            for (int i = 0; i < CHUNK / 4; i++)
                word[i / 2][i % 2] = pack(u[2 * i], u[2 * i + 1]);
            store_rows<CHUNK>(at.staging, word, c + p.n, 2 * (size_t)p.n, at.rows, columns);
        }
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++)
            word[i / 2][i % 2] = pack(g[2 * i] * sigmoid(g[2 * i]) * u[2 * i],
                                      g[2 * i + 1] * sigmoid(g[2 * i + 1]) * u[2 * i + 1]);
        store_rows<CHUNK>(at.staging, word, h, p.n, at.rows, columns);
    }
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
        if (at.rows <= 0)
            continue;
        if (FINISH == TO_BF16)
            finish_bf16<WIDTH, K::CHUNK>(sum[i], p, at);
        else if (FINISH == TO_F32)
            finish_f32<WIDTH>(sum[i], p, at);
        else
            finish_swiglu<WIDTH, K::CHUNK>(sum[i], p, at);
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
    const int tiles = tile_count<K>(s, p);
    const int step = gridDim.x / K::PAIR;
    for (int i = blockIdx.x / K::PAIR + warpgroup * step; i < tiles; i += 2 * step) {
        const tile t = find_tile<K>(s, p, i, &group);
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

// 16 rows of 64 columns of g, and of u half a unit on, in place; word: h, as fragments.
__device__ __forceinline__ void change_unit(uint32_t rows_at, const float *sum,
                                            uint32_t (&word)[8][2])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t at =
                rows_at + (lane / 4 + 8 * i) * 128 + ((j ^ lane / 4) << 4) + lane % 4 * 4;
            uint32_t g = load_word(at), u = load_word(at + GEMM_SM90_UNIT / 2);
            word[j][i] = swiglu_backward(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1], &g, &u);
            store_word(at, g);
            store_word(at + GEMM_SM90_UNIT / 2, u);
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
        *(uint4 *)(c + 2 * i * (size_t)p.n) = load_shared(at);
        *(uint4 *)(c + 2 * i * (size_t)p.n + p.n) = load_shared(at + GEMM_SM90_UNIT / 2);
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

template <class K, finish FINISH, int WIDTH>
__device__ __forceinline__ void multiply_tiles(const shared &s, const tensor_map *c,
                                               const gemm_sm90 &p)
{
    const int warpgroup = threadIdx.x / 128 - 1;
    ring<K::STAGES> at;
    int group = 0, turn = 0;
    // Barriers tell a phase only from the next one: a warpgroup waits for its tile's stages when those
    // of the tile before are there. The first tile has no such.
    int turn_phase = warpgroup == 0, unit_phase = 0;
    const int tiles = tile_count<K>(s, p);
    for (int i = blockIdx.x / K::PAIR; i < tiles; i += gridDim.x / K::PAIR, turn ^= 1) {
        const tile t = find_tile<K>(s, p, i, &group);
        if (turn != warpgroup) {
            at.skip(cover(t.length, DEPTH));
            continue;
        }
        float sum[BLOCKS][WIDTH / 2];
        if (K::RAGGED_K && t.length == 0) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int j = 0; j < WIDTH / 2; j++)
                    sum[b][j] = 0.0f;
        }
        barrier_wait(s.turn + 8 * warpgroup, turn_phase);
        turn_phase ^= 1;
        multiply_tile<K, WIDTH>(sum, s, at, t.length);
        if (FINISH == SWIGLU_BWD)
            finish_swiglu_backward<WIDTH>(sum, s, c, p, t, &unit_phase);
        else
            finish_tile<K, FINISH, WIDTH>(sum, s, p, t);
    }
}

// ---- kernels ------------------------------------------------------------------------------------

template <form FORM, finish FINISH, int WIDTH, bool PAIRED>
__device__ __forceinline__ void run(const tensor_map &a, const tensor_map &b, const tensor_map &c,
                                    const gemm_sm90 &p)
{
    typedef kernel<FORM, FINISH, WIDTH, PAIRED> K;
    const shared s = shared_of(K::STAGES * K::STAGE, K::UNITS * GEMM_SM90_UNIT);
    if (threadIdx.x == 0) {
        prefetch_map(&a);
        prefetch_map(&b);
        for (int i = 0; i < K::STAGES; i++) {
            barrier_init(s.full + 8 * i, 1);
            barrier_init(s.empty + 8 * i, 4 * K::PAIR); // warps that read it
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(s.turn + 8 * i, 4);
            barrier_init(s.unit_full + 8 * i, 1);
            barrier_init(s.unit_empty + 8 * i, 4);
        }
        barrier_fence();
    }
    await_previous();
    launch_next();
    if (threadIdx.x / 32 == 1)
        find_groups(s, p, threadIdx.x % 32);
    __syncthreads();
    if (K::PAIR == 2)
        cluster_barrier();
    if (threadIdx.x < 128) {
        registers_less<24>();
        if (threadIdx.x == 0)
            load_tiles<K, FINISH, WIDTH>(s, &a, &b, p);
        else if (FINISH == SWIGLU_BWD && (threadIdx.x == 32 || threadIdx.x == 64))
            load_units<K, WIDTH>(s, &c, p, threadIdx.x / 32 - 1);
    } else {
        registers_more<240>();
        multiply_tiles<K, FINISH, WIDTH>(s, &c, p);
    }
    if (K::PAIR == 2) { // the other one may still write here
        __syncwarp();
        cluster_barrier();
    }
}

} // namespace

#define ARGUMENTS                                                                           \
    const __grid_constant__ sm90::tensor_map a, const __grid_constant__ sm90::tensor_map b, \
        const __grid_constant__ sm90::tensor_map c, const __grid_constant__ gemm_sm90 p
#define GEMM(name, form, finish, width)                                                          \
    extern "C" __global__ void __launch_bounds__(GEMM_SM90_THREADS, 1) name##_##width(ARGUMENTS) \
    {                                                                                            \
        run<form, finish, width, false>(a, b, c, p);                                             \
    }
#define GEMM_PAIR(name, form, finish, width)                                                     \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(GEMM_SM90_THREADS, 1) \
        name##_pair##width(ARGUMENTS)                                                            \
    {                                                                                            \
        run<form, finish, width, true>(a, b, c, p);                                              \
    }
#define WIDTHS(name, form, finish)     \
    GEMM(name, form, finish, 64)       \
    GEMM(name, form, finish, 128)      \
    GEMM(name, form, finish, 192)      \
    GEMM_PAIR(name, form, finish, 128) \
    GEMM_PAIR(name, form, finish, 192)

WIDTHS(gemm_nt_bf16, NT, TO_BF16)
WIDTHS(gemm_nt_f32, NT, TO_F32)
WIDTHS(gemm_nt_swiglu, NT, SWIGLU_FWD)
WIDTHS(gemm_nn_bf16, NN, TO_BF16)
WIDTHS(gemm_nn_swiglu, NN, SWIGLU_BWD)
WIDTHS(gemm_tn_f32, TN, TO_F32)

// C (+)= the sum of `parts` matrices of `count` elements, in their order; count is a multiple of 4.
extern "C" __global__ void gemm_sum_parts(float4 *c, const float4 *parts_of, int parts, int count,
                                          int accumulate)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count / 4)
        return;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int part = 0; part < parts; part++) {
        const float4 v = parts_of[(size_t)part * (count / 4) + i];
        sum.x += v.x;
        sum.y += v.y;
        sum.z += v.z;
        sum.w += v.w;
    }
    if (accumulate) {
        const float4 old = c[i];
        sum = make_float4(sum.x + old.x, sum.y + old.y, sum.z + old.z, sum.w + old.w);
    }
    c[i] = sum;
}
