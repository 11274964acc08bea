// Rows cut into segments of 384 columns, one a warp: a lane has 8 neighbouring columns of the first
// 256 and 4 of the last 128, so that widths that are multiples of 128 leave few lanes idle. The
// warps of a row are a group; a block has several groups, which go through different rows of one
// image.
#ifndef DITMOE_FUSED_SEGMENT_CUH
#define DITMOE_FUSED_SEGMENT_CUH

#include "devices/fused.cuh"

enum { SEGMENT = 384, VALUES = 12, WORDS = 6, QUADS = 3 }; // columns; values, words, float4 a lane
enum { ROW_WARPS = 4, ROW_THREADS = ROW_WARPS * WARP };    // of a block, at most

// WARPS of a row; FULL: the width is a multiple of 384, every warp has a whole segment.
template <int WARPS, bool FULL> struct segment {
    static constexpr int warps = WARPS, threads = WARPS * WARP; // of a group
    static constexpr int groups = ROW_WARPS / WARPS;            // of a block
    int lane, warp, group;
    bool has_vector, has_tail; // the lane's 8 columns and its 4: the same for all lanes
    int column, last;          // the first of the 8, and of the 4
    int first, end;            // rows of this block within its image, [first, end)

    __device__ __forceinline__ bool vector() const
    {
        return FULL || has_vector;
    }
    __device__ __forceinline__ bool tail() const
    {
        return FULL || has_tail;
    }
};

template <int WARPS, bool FULL>
INLINE segment<WARPS, FULL> find_segment(int width, int rows, int chunk)
{
    segment<WARPS, FULL> s;
    // the shuffle tells the compiler that all lanes have the same
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    s.lane = threadIdx.x % WARP;
    s.group = warp / WARPS;
    s.warp = warp % WARPS;
    const int start = s.warp * SEGMENT, units = FULL ? 3 : min(3, (width - start) / 128);
    s.has_vector = units >= 2;
    s.has_tail = units % 2 == 1;
    s.column = start + s.lane * 8;
    s.last = start + (s.vector() ? 256 : 0) + s.lane * 4;
    s.first = blockIdx.x * chunk;
    s.end = min(s.first + chunk, rows);
    return s;
}

// This lane's values of the row that begins at element `row`, packed; zeros where it has none.
template <class S>
INLINE void load_segment(unsigned (&words)[WORDS], const void *base, size_t row, const S &s)
{
    const unsigned short *from = static_cast<const unsigned short *>(base) + row;
    uint4 vector = make_uint4(0, 0, 0, 0);
    uint2 tail = make_uint2(0, 0);
    if (s.vector())
        vector = *reinterpret_cast<const uint4 *>(from + s.column);
    if (s.tail())
        tail = *reinterpret_cast<const uint2 *>(from + s.last);
    words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
    words[4] = tail.x, words[5] = tail.y;
}

// Keeps the compiler from unpacking these once for all turns of a loop, which takes twice the
// registers.
INLINE void stay_packed(unsigned (&words)[WORDS])
{
#pragma unroll
    for (int i = 0; i < WORDS; i++)
        asm volatile("" : "+r"(words[i]));
}

template <class S>
INLINE void store_segment(void *base, size_t row, const float (&v)[VALUES], const S &s)
{
    unsigned short *to = static_cast<unsigned short *>(base) + row;
    if (s.vector())
        *reinterpret_cast<uint4 *>(to + s.column) =
            make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    if (s.tail())
        *reinterpret_cast<uint2 *>(to + s.last) =
            make_uint2(pack2(v[8], v[9]), pack2(v[10], v[11]));
}

// The same of a row in two halves (runtime/tensor.h), `high` as store_segment leaves it; low may be
// NULL.
template <class S>
INLINE void store_halves(void *high, void *low, size_t row, const float (&v)[VALUES], const S &s)
{
    if (!low)
        return store_segment(high, row, v, s);
    unsigned short *to = static_cast<unsigned short *>(high) + row;
    unsigned short *rest = static_cast<unsigned short *>(low) + row;
    if (s.vector()) {
        *reinterpret_cast<uint4 *>(to + s.column) = make_uint4(
            high2(v[0], v[1]), high2(v[2], v[3]), high2(v[4], v[5]), high2(v[6], v[7]));
        *reinterpret_cast<uint4 *>(rest + s.column) =
            make_uint4(low2(v[0], v[1]), low2(v[2], v[3]), low2(v[4], v[5]), low2(v[6], v[7]));
    }
    if (s.tail()) {
        *reinterpret_cast<uint2 *>(to + s.last) =
            make_uint2(high2(v[8], v[9]), high2(v[10], v[11]));
        *reinterpret_cast<uint2 *>(rest + s.last) =
            make_uint2(low2(v[8], v[9]), low2(v[10], v[11]));
    }
}

// Value i of the packed ones.
INLINE float value(const unsigned (&words)[WORDS], int i)
{
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}

// Value i of those in two halves.
INLINE float value(const unsigned (&high)[WORDS], const unsigned (&low)[WORDS], int i)
{
    const float2 both = join2(high[i / 2], low[i / 2]);
    return i % 2 ? both.y : both.x;
}

// A barrier of the warps of a row.
template <class S> INLINE void row_barrier(const S &s)
{
    if constexpr (S::groups == 1)
        __syncthreads();
    else if constexpr (S::warps == 1)
        __syncwarp();
    else
        group_barrier(s.group, S::threads);
}

// Totals over a row of N values a lane. shared: 2 of them in turn, so that one barrier is enough.
template <int N, class S>
INLINE void row_sums(float (&total)[N], float (&v)[N], const S &s, float (&shared)[ROW_WARPS][N])
{
    const float sum = warp_sums(v);
    if constexpr (S::warps == 1) {
#pragma unroll
        for (int i = 0; i < N; i++)
            total[i] = __shfl_sync(~0u, sum, i * (WARP / N));
    } else {
        if (s.lane % (WARP / N) == 0)
            shared[s.group * S::warps + s.warp][s.lane / (WARP / N)] = sum;
        row_barrier(s);
#pragma unroll
        for (int i = 0; i < N; i++)
            total[i] = shared[s.group * S::warps][i];
#pragma unroll
        for (int w = 1; w < S::warps; w++)
#pragma unroll
            for (int i = 0; i < N; i++)
                total[i] += shared[s.group * S::warps + w][i];
    }
}

// ---- the router's weight in shared memory -------------------------------------------------------

// Copies router_w[experts,width] as segments see it: [expert][warp][quad][lane] float4.
INLINE void stage_router(float4 *shared, const void *router_w, int experts, int width, int warps)
{
    const float *w = static_cast<const float *>(router_w);
    for (int i = threadIdx.x; i < experts * warps * QUADS * WARP; i += blockDim.x) {
        const int lane = i % WARP, quad = i / WARP % QUADS, warp = i / (WARP * QUADS) % warps;
        const int e = i / (WARP * QUADS * warps), start = warp * SEGMENT;
        const int units = min(3, (width - start) / 128);
        const int column = quad < 2 ? lane * 8 + quad * 4 : (units >= 2 ? 256 : 0) + lane * 4;
        const bool there = quad < 2 ? units >= 2 : units % 2 == 1;
        shared[i] =
            there ? __ldg(reinterpret_cast<const float4 *>(w + (size_t)e * width + start + column))
                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

template <class S> INLINE float4 router_quad(const float4 *shared, int e, int quad, const S &s)
{
    return shared[((e * S::warps + s.warp) * QUADS + quad) * WARP + s.lane];
}

// K(warps of a row, whether all segments are whole): every width that is a multiple of 128.
#define SEGMENTS(K) K(1, 0) K(1, 1) K(2, 0) K(2, 1) K(3, 0) K(3, 1) K(4, 0) K(4, 1)

#endif
