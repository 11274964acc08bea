// The tiles of C that gemm_sm90.cu makes: how a kernel is made up, what lies in shared memory, and
// which part of which tile comes when.
#ifndef DITMOE_GEMM_SM90_TILES_CUH
#define DITMOE_GEMM_SM90_TILES_CUH

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
// Which of A and B run along k: both, A, none; CONV: both, and A is pixels (gemm_sm90_pixels.cuh).
enum form { NT, NN, TN, CONV };
enum finish { TO_BF16, TO_F32, SWIGLU_FWD, SWIGLU_BWD };

// How a kernel is made up.
template <form FORM, finish FINISH, int WIDTH> struct kernel {
    static constexpr bool ACROSS_A = FORM == TN, ACROSS_B = FORM == NN || FORM == TN;
    static constexpr bool RAGGED_K = FORM == TN, PIXELS = FORM == CONV;
    static constexpr int STRIPS = FINISH == SWIGLU_BWD ? GEMM_SM90_STRIPS : 0; // of g | u a warp
    static constexpr int STAGES = GEMM_SM90_STAGES(WIDTH, STRIPS);
    static constexpr bool DIVIDES = FINISH == TO_BF16 || FINISH == TO_F32; // tiles along k
    static constexpr int STAGE = GEMM_SM90_STAGE(WIDTH);
    static constexpr int COLUMNS = FINISH == SWIGLU_FWD ? WIDTH / 2 : WIDTH; // of n in a tile
};

// Columns that a warp hands around at once.
template <class K> constexpr int CHUNK = K::COLUMNS % 64 == 0 ? 64 : 32;

struct shared {
    uint32_t stages, strips, staging, full, empty, turn, strip_full; // addresses
    int *start, *first; // [groups + 1]: a group's first tile of rows; first row
};

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

struct tile {
    int number;
    int group, row, end, column; // rows row .. end of C (at most 128) from `column`
    int k, length;               // the part of k that is summed over
    int part;                    // where the sum is only a part: its number in space; else -1
};

// The last tiles, too few for all workers, are divided along k: a worker each for `parts` parts of
// `rest` tiles. Their sums go to memory, and finish_rest() makes C of them.
struct schedule {
    int whole, rest, parts;
};

__device__ __forceinline__ shared shared_of(int stages, int strips)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    shared s;
    s.stages = (uint32_t)__cvta_generic_to_shared(memory);
    s.strips = s.stages + (uint32_t)stages;
    s.staging = s.strips + (uint32_t)strips;
    s.full = s.staging + 8 * GEMM_SM90_STAGING;
    s.empty = s.full + 64;
    s.turn = s.empty + 64;
    s.strip_full = s.turn + 16;
    s.start = (int *)(memory + stages + strips + 8 * GEMM_SM90_STAGING + GEMM_SM90_BARRIERS);
    s.first = s.start + GEMM_SM90_GROUPS + 4;
    return s;
}

// ---- tiles --------------------------------------------------------------------------------------

__device__ __forceinline__ int cover(int count, int size)
{
    return (count + size - 1) / size;
}

// Fills in the tables, by one warp. across: groups are parts of k, not of C's rows.
__device__ __forceinline__ void find_groups(const shared &s, const gemm_sm90 &p, int lane,
                                            bool across)
{
    const int each = (across ? p.k : p.m) / p.groups; // without offsets
    int tiles = 0;
    for (int e0 = 0; e0 < p.groups; e0 += 32) {
        int e = e0 + lane, from = 0, to = 0;
        if (e < p.groups) {
            from = p.offsets ? p.offsets[e] : e * each;
            to = p.offsets ? p.offsets[e + 1] : from + each;
        }
        int sum = cover(to - from, ROWS);
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? below : 0;
        }
        if (e < p.groups) {
            s.first[e] = from;
            s.first[e + 1] = to; // the same as the next one's `from`
            s.start[e + 1] = tiles + sum;
        }
        tiles += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0)
        s.start[0] = 0;
}

template <class K>
__device__ __forceinline__ schedule find_schedule(const shared &s, const gemm_sm90 &p)
{
    const int columns = cover(p.n, K::COLUMNS);
    const int tiles = columns * (K::RAGGED_K ? p.groups * cover(p.m, ROWS) : s.start[p.groups]);
    const int stages = cover(p.k, DEPTH) / (K::RAGGED_K ? p.groups : 1);
    schedule out = {tiles, 0, 0};
    const int rest = tiles % p.workers;
    if (K::DIVIDES && p.space && rest > 0) {
        const int parts = min(min(p.workers / rest, stages / GEMM_SM90_PARTS), GEMM_SM90_PARTS);
        if (parts > 1)
            out = {tiles - rest, rest, parts};
    }
    return out;
}

// Tile number t; `at` is a group that is not past its group. Bands of rows
// are swept column by column: the blocks that run together share a few rows of A and of B.
template <class K>
__device__ __forceinline__ tile find_whole(const shared &s, const gemm_sm90 &p, int t, int *at)
{
    const int columns = cover(p.n, K::COLUMNS), rows = cover(p.m, ROWS);
    int e = *at, count = rows;
    tile out;
    out.number = t;
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
    out.group = e;
    out.column = in / high * K::COLUMNS;
    out.row = K::RAGGED_K ? row : s.first[e] + row;
    out.end = K::RAGGED_K ? p.m : s.first[e + 1];
    out.k = K::RAGGED_K ? s.first[e] : 0;
    out.length = K::RAGGED_K ? s.first[e + 1] - s.first[e] : p.k;
    out.part = -1;
    return out;
}

// Item number i of a schedule: a tile, or a part of one.
template <class K>
__device__ __forceinline__ tile find_tile(const shared &s, const gemm_sm90 &p, const schedule &of,
                                          int i, int *at)
{
    if (!K::DIVIDES || i < of.whole)
        return find_whole<K>(s, p, i, at);
    const int item = i - of.whole, part = item / of.rest;
    tile out = find_whole<K>(s, p, of.whole + item % of.rest, at);
    const int each = cover(cover(out.length, DEPTH), of.parts) * DEPTH;
    out.k += part * each;
    out.length = max(0, min(each, out.length - part * each));
    out.part = item;
    return out;
}

} // namespace

#endif
