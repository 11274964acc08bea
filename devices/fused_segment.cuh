// Rows cut into segments of 384 columns, one a warp: a lane has 8 neighbouring columns of the first
// 256 and 4 of the last 128, so that widths that are multiples of 128 leave few lanes idle. The
// warps of a row are a group; a block has several groups, which go through different rows of one
// image.
#ifndef DITMOE_FUSED_SEGMENT_CUH
#define DITMOE_FUSED_SEGMENT_CUH

#include "devices/fused.cuh"

enum { SEGMENT = 384, VALUES = 12, WORDS = 6, QUADS = 3 }; // columns; values, words, float4 a lane
enum { ROW_WARPS = 4, ROW_THREADS = ROW_WARPS * WARP };    // of a block, at most

struct segment {
    int lane, warp, warps;      // warp of the group's `warps`
    int group, groups, threads; // threads of a group
    bool vector, tail;          // are there the lane's 8 columns and its 4? The same for all lanes
    int column, last;           // the first of the 8, and of the 4
    int first, end;             // rows of this block within its image, [first, end)
};

INLINE segment find_segment(int width, int rows, int chunk)
{
    segment s;
    s.warps = (width + SEGMENT - 1) / SEGMENT;
    s.threads = s.warps * WARP;
    s.lane = threadIdx.x % WARP;
    s.group = threadIdx.x / s.threads;
    s.groups = blockDim.x / s.threads;
    s.warp = threadIdx.x / WARP - s.group * s.warps;
    const int start = s.warp * SEGMENT, units = min(3, (width - start) / 128);
    s.vector = units >= 2;
    s.tail = units % 2 == 1;
    s.column = start + s.lane * 8;
    s.last = start + (s.vector ? 256 : 0) + s.lane * 4;
    s.first = blockIdx.x * chunk;
    s.end = min(s.first + chunk, rows);
    return s;
}

// This lane's values of the row that begins at element `row`, packed; zeros where it has none.
INLINE void load_segment(unsigned (&words)[WORDS], const void *base, size_t row, const segment &s)
{
    const unsigned short *from = static_cast<const unsigned short *>(base) + row;
    uint4 vector = make_uint4(0, 0, 0, 0);
    uint2 tail = make_uint2(0, 0);
    if (s.vector)
        vector = *reinterpret_cast<const uint4 *>(from + s.column);
    if (s.tail)
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

INLINE void store_segment(void *base, size_t row, const float (&v)[VALUES], const segment &s)
{
    unsigned short *to = static_cast<unsigned short *>(base) + row;
    if (s.vector)
        *reinterpret_cast<uint4 *>(to + s.column) =
            make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    if (s.tail)
        *reinterpret_cast<uint2 *>(to + s.last) =
            make_uint2(pack2(v[8], v[9]), pack2(v[10], v[11]));
}

// Value i of the packed ones.
INLINE float value(const unsigned (&words)[WORDS], int i)
{
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}

// Totals over rows of N values a lane, of all lanes of the group. shared: 2 of them in turn, so
// that one barrier is enough.
template <int N>
INLINE void group_sums(float (&total)[N], float (&v)[N], const segment &s,
                       float (&shared)[ROW_WARPS][N])
{
    const float sum = warp_sums(v);
    if (s.lane % (WARP / N) == 0)
        shared[s.group * s.warps + s.warp][s.lane / (WARP / N)] = sum;
    group_barrier(s.group, s.threads);
#pragma unroll
    for (int i = 0; i < N; i++)
        total[i] = shared[s.group * s.warps][i];
    for (int w = 1; w < s.warps; w++)
#pragma unroll
        for (int i = 0; i < N; i++)
            total[i] += shared[s.group * s.warps + w][i];
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

INLINE float4 router_quad(const float4 *shared, int e, int quad, const segment &s)
{
    return shared[((e * s.warps + s.warp) * QUADS + quad) * WARP + s.lane];
}

#endif
