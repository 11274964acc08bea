// wgmma (Hopper, sm_90a) for attention: products of a warpgroup, 64 rows of the left side, sums in
// f32, and tiles in shared memory as it reads them.
//
// A tile is its first 64 columns, rows of 128 bytes whose chunks of 16 bytes are exchanged as
// wgmma's 128-byte swizzle wants (chunk c of row r at c ^ r % 8); then a plane of 16-byte rows for
// each further chunk. Products along a row take 16 columns at a time, so that an odd last plane is
// read with the `nothing` beside it: 64 rows of zeros, which lie behind all tiles.
#ifndef DITMOE_ATTENTION_WGMMA_CUH
#define DITMOE_ATTENTION_WGMMA_CUH

#include "devices/attention_tile.cuh"

__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int n> __device__ __forceinline__ void hold(float (&c)[n][4])
{
#pragma unroll
    for (int i = 0; i < n; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            asm volatile("" : "+f"(c[i][j])::"memory");
}

// Waits for all products. Their sums pass through, so that no use of them moves ahead of the wait.
template <int... n> __device__ __forceinline__ void products_wait(float (&...c)[n][4])
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    (hold(c), ...);
}

// What generic stores and cp.async wrote becomes visible to wgmma (after a barrier).
__device__ __forceinline__ void show_to_products()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of the thread's warpgroup alone.
__device__ __forceinline__ void group_sync()
{
    asm volatile("bar.sync %0, 128;" ::"r"(1 + static_cast<int>(threadIdx.x) / 128) : "memory");
}

// Descriptors of operands (PTX ISA, "matrix descriptor"): address, the two strides, swizzle of 128
// bytes or none.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride,
                                            bool swizzled)
{
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
           static_cast<uint64_t>(swizzled) << 62;
}

#define C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define C16(c, i) C4(c, i), C4(c, i + 1), C4(c, i + 2), C4(c, i + 3)
#define SUMS_4 "%0,%1,%2,%3"
#define SUMS_12 SUMS_4 ",%4,%5,%6,%7,%8,%9,%10,%11"
#define SUMS_16 SUMS_12 ",%12,%13,%14,%15"
#define SUMS_32 SUMS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// A product of k = 16 with both sides in shared memory, c[64 x n] = (or +=) A B. i0 to i2: the
// numbers of the operands after the sums. across: whether A and B are stored across k, else along
// it (B^T).
#define BOTH_SHARED(name, n, sums, i0, i1, i2, across, ...)                                       \
    __device__ __forceinline__ void name(float(*c)[4], uint64_t a, uint64_t b, bool add)          \
    {                                                                                             \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, %" #i0 \
                     ", %" #i1 ", p, 1, 1, " #across ", " #across ";\n}"                          \
                     : __VA_ARGS__                                                                \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)));                               \
    }
BOTH_SHARED(multiply_along, 64, SUMS_32, 32, 33, 34, 0, C16(c, 0), C16(c, 4))
BOTH_SHARED(multiply_along_32, 32, SUMS_16, 16, 17, 18, 0, C16(c, 0))
BOTH_SHARED(multiply_across_32, 32, SUMS_16, 16, 17, 18, 1, C16(c, 0))
BOTH_SHARED(multiply_across_8, 8, SUMS_4, 4, 5, 6, 1, C4(c, 0))
#undef BOTH_SHARED

// c[64 x n] += A B, k = 16, A in registers, B stored across k. i0 to i4 as above.
#define LEFT_IN_REGISTERS(name, n, sums, i0, i1, i2, i3, i4, ...)                                  \
    __device__ __forceinline__ void name(float(*c)[4], const uint32_t(&a)[4], uint64_t b)          \
    {                                                                                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, {%" #i0 \
                     ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", 1, 1, 1, 1;"                         \
                     : __VA_ARGS__                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
LEFT_IN_REGISTERS(multiply_64, 64, SUMS_32, 32, 33, 34, 35, 36, C16(c, 0), C16(c, 4))
LEFT_IN_REGISTERS(multiply_24, 24, SUMS_12, 12, 13, 14, 15, 16, C4(c, 0), C4(c, 1), C4(c, 2))
LEFT_IN_REGISTERS(multiply_8, 8, SUMS_4, 4, 5, 6, 7, 8, C4(c, 0))
#undef LEFT_IN_REGISTERS

#undef C4
#undef C16
#undef SUMS_4
#undef SUMS_12
#undef SUMS_16
#undef SUMS_32

// Tiles of `rows` rows, a multiple of 8.
template <int width, int rows> struct swizzled_tile {
    static constexpr int rest = width / 8 - 8;      // chunks after the first eight
    static constexpr int steps = (width + 15) / 16; // of 16 columns
    static_assert(rest == 0 || rest == 1 || rest == 3, "the products below");
    static constexpr uint32_t plane = rows * 16, planes_at = rows * 128;
    static constexpr uint32_t bytes = planes_at + rest * plane;

    static __device__ __forceinline__ uint32_t chunk(int r, int c)
    {
        return c < 8 ? r * 128 + (c ^ r % 8) * 16 : planes_at + (c - 8) * plane + r * 16;
    }

    template <int threads, int part, int from, int chunks, int lanes, bool checked>
    static __device__ __forceinline__ void load_chunks(uint32_t to, const bf16 *source, int stride,
                                                       int first, int count, int hd, int row)
    {
        constexpr int step = threads / lanes;
        const int r = threadIdx.x / lanes, c = from + threadIdx.x % lanes;
        if (chunks < lanes && c >= from + chunks)
            return;
        const bf16 *at = source + static_cast<size_t>(first + r) * stride + 8 * c;
#pragma unroll
        for (int i = 0; i < (part + step - 1) / step; i++) {
            if (part % step != 0 && r + i * step >= part)
                break;
            const bool valid = !checked || (first + r + i * step < count && 8 * c < hd);
            copy_async(to + chunk(row + r, c) + i * step * (from == 0 ? 128 : 16),
                       valid ? at + static_cast<size_t>(i * step) * stride : source, valid);
        }
    }

    template <int threads, int part, bool checked>
    static __device__ __forceinline__ void load_rows(uint32_t to, const bf16 *source, int stride,
                                                     int first, int count, int hd, int row)
    {
        load_chunks<threads, part, 0, 8, 8, checked>(to, source, stride, first, count, hd, row);
        if constexpr (rest > 0)
            load_chunks<threads, part, 8, rest, rest == 1 ? 1 : 4, checked>(to, source, stride,
                                                                            first, count, hd, row);
    }

    // Starts copying `part` rows of the source from row `first`, to row `at` (a multiple of 8) and
    // on; zeros from row `count` and column hd on.
    template <int threads, int part = rows>
    static __device__ __forceinline__ void load(uint32_t to, const bf16 *source, int stride,
                                                int first, int count, int hd, int at = 0)
    {
        if (first + part <= count && hd == width)
            load_rows<threads, part, false>(to, source, stride, first, count, hd, at);
        else
            load_rows<threads, part, true>(to, source, stride, first, count, hd, at);
    }

    // Operands: 16 columns of rows from row.., and 16 rows of the first 64 columns from `column`,
    // or of the others.
    static __device__ __forceinline__ uint64_t along(uint32_t tile, int row, int step,
                                                     uint32_t nothing)
    {
        if (step < 4)
            return operand(tile + row * 128 + step * 32, 16, 1024, true);
        const uint32_t at = tile + planes_at + (2 * step - 8) * plane + row * 16;
        return operand(at, 2 * step - 7 < rest ? plane : nothing - at, 128, false);
    }
    static __device__ __forceinline__ uint64_t across(uint32_t tile, int row, int column = 0)
    {
        return operand(tile + row * 128 + column * 2, 1024, 1024, true);
    }
    static __device__ __forceinline__ uint64_t across_rest(uint32_t tile, int row)
    {
        return operand(tile + planes_at + row * 16, 128, plane, false);
    }
};

// The zeros that operands of odd planes end in.
__device__ __forceinline__ void clear_nothing(char *at)
{
    if (threadIdx.x < 64)
        reinterpret_cast<uint4 *>(at)[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

// c = A B^T over a whole row: A's 64 rows from row_a, B's 64 or 32 from row_b.
template <class tile_a, class tile_b, int n_tiles>
__device__ __forceinline__ void multiply_rows(float (&c)[n_tiles][4], uint32_t a, int row_a,
                                              uint32_t b, int row_b, uint32_t nothing)
{
    static_assert(n_tiles == 8 || n_tiles == 4, "");
#pragma unroll
    for (int i = 0; i < tile_a::steps; i++) {
        const uint64_t left = tile_a::along(a, row_a, i, nothing);
        const uint64_t right = tile_b::along(b, row_b, i, nothing);
        if constexpr (n_tiles == 8)
            multiply_along(c, left, right, i > 0);
        else
            multiply_along_32(c, left, right, i > 0);
    }
}

// c += A B, A 64 x 16 * steps in registers, B the rows of a tile from row_b.
template <class tile_b, int n_tiles, int steps>
__device__ __forceinline__ void multiply_rows_across(float (&c)[n_tiles][4],
                                                     const uint32_t (&a)[steps][1][4], uint32_t b,
                                                     int row_b)
{
#pragma unroll
    for (int k = 0; k < steps; k++) {
        multiply_64(c, a[k][0], tile_b::across(b, row_b + 16 * k));
        if constexpr (tile_b::rest == 1)
            multiply_8(c + 8, a[k][0], tile_b::across_rest(b, row_b + 16 * k));
        if constexpr (tile_b::rest == 3)
            multiply_24(c + 8, a[k][0], tile_b::across_rest(b, row_b + 16 * k));
    }
}

// Writes a warp's 16 rows times factor[upper or lower half] to device memory, through rows row.. of
// a tile, by then the warp's own: 16 bytes a lane. Row r goes to to + r * stride, r < count.
template <class tile, int n_tiles>
__device__ __forceinline__ void store_swizzled(bf16 *to, int stride, int count, int hd,
                                               char *shared, int row, const float (&c)[n_tiles][4],
                                               const float (&factor)[2])
{
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < n_tiles; n++)
            *reinterpret_cast<uint32_t *>(shared + tile::chunk(row + 8 * half + lane / 4, n) +
                                          lane % 4 * 4) =
                pack(c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half]);
    __syncwarp();
    const bool all = count >= 16 && hd == 8 * n_tiles;
#pragma unroll
    for (int i = 0; i < (n_tiles + 1) / 2;
         i++) { // eight chunks of four rows; then 16 rows of two chunks
        const int r = i < 4 ? i * 4 + lane / 8 : lane % 16;
        const int chunk = i < 4 ? lane % 8 : 2 * i + lane / 16;
        if ((2 * i + 1 < n_tiles || lane < 16) && (all || (r < count && 8 * chunk < hd)))
            *reinterpret_cast<uint4 *>(to + static_cast<size_t>(r) * stride + 8 * chunk) =
                *reinterpret_cast<const uint4 *>(shared + tile::chunk(row + r, chunk));
    }
}

#endif
