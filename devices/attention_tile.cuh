// Tiles of q, k, v and their gradients in shared memory, and a warp's products with them, for
// attention_forward.cuh and attention_backward.cuh. A tile's rows belong to one head, bf16; its
// products' left sides are 16 * m_tiles rows of a warp.
#ifndef DITMOE_ATTENTION_TILE_CUH
#define DITMOE_ATTENTION_TILE_CUH

#include "devices/tensor_core.cuh"

constexpr float log2_e = 1.4426950408889634f;

// sum of the products of eight pairs
__device__ __forceinline__ float dot8(uint4 a, uint4 b)
{
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum = fmaf(unpack_low(x[i]), unpack_low(y[i]),
                   fmaf(unpack_high(x[i]), unpack_high(y[i]), sum));
    return sum;
}

// f(j, value) for each of eight values
template <class function> __device__ __forceinline__ void each_of_8(uint4 a, const function &f)
{
    const uint32_t x[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f(2 * i, unpack_low(x[i]));
        f(2 * i + 1, unpack_high(x[i]));
    }
}

// eight floats from a multiple of 16 bytes
struct eight {
    float v[8];

    __device__ __forceinline__ explicit eight(const float *from)
    {
        const float4 a = reinterpret_cast<const float4 *>(from)[0],
                     b = reinterpret_cast<const float4 *>(from)[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
};

// A row takes an odd number of 16-byte chunks, so that eight rows of one column (what ldmatrix
// reads at once) lie in different banks.
template <int width> struct tile_rows {
    static_assert(width % 8 == 0, "rows are copied in chunks of 8 columns");
    static constexpr int chunks = width / 8;
    static constexpr uint32_t bytes = (chunks | 1) * 16;
    static constexpr int steps = width / 16;           // products of k = 16 along a row,
    static constexpr bool half_step = width % 16 != 0; // and one of k = 8

    // Where a lane points ldmatrix, from the tile's corner. For A stored [m][k] (also B stored
    // [k][n], transposed on the way): 16 rows, then the next 8 columns.
    static __device__ __forceinline__ uint32_t lane_a()
    {
        const uint32_t lane = threadIdx.x % 32;
        return lane % 16 * bytes + lane / 16 * 16;
    }

    // For B stored [n][k] (also A stored [k][m], transposed): 8 rows, the next 8 columns, then the
    // next 8 rows.
    static __device__ __forceinline__ uint32_t lane_b()
    {
        const uint32_t lane = threadIdx.x % 32;
        return (lane % 8 + lane / 16 * 8) * bytes + lane / 8 % 2 * 16;
    }

    // 32 rows of 8 columns
    static __device__ __forceinline__ uint32_t lane_row()
    {
        return threadIdx.x % 32 * bytes;
    }
};

// Starts copying chunks from..from+chunks-1 of rows first..first+count-1, `lanes` lanes a row.
// checked: zeros for rows past `rows` and columns from hd on.
template <int width, int count, int threads, int from, int chunks, int lanes, bool checked>
__device__ __forceinline__ void load_chunks(uint32_t tile, const bf16 *source, int stride,
                                            int first, int rows, int hd)
{
    constexpr int step = threads / lanes; // rows at once
    const int r = threadIdx.x / lanes, c = from + threadIdx.x % lanes;
    if (chunks < lanes && c >= from + chunks)
        return;
    const bf16 *at = source + static_cast<size_t>(first + r) * stride + 8 * c;
    const uint32_t to = tile + r * tile_rows<width>::bytes + 16 * c;
#pragma unroll
    for (int i = 0; i < (count + step - 1) / step; i++) {
        if (count % step != 0 && r + i * step >= count)
            break;
        const bool valid = !checked || (first + r + i * step < rows && 8 * c < hd);
        copy_async(to + i * step * tile_rows<width>::bytes,
                   valid ? at + static_cast<size_t>(i * step) * stride : source, valid);
    }
}

template <int width, int count, int threads, bool checked>
__device__ __forceinline__ void load_rows(uint32_t tile, const bf16 *source, int stride, int first,
                                          int rows, int hd)
{
    constexpr int most = width / 64 * 8,
                  rest = width / 8 - most; // chunks: a power of two, the others
    static_assert(width >= 64, "narrower heads use this width");
    load_chunks<width, count, threads, 0, most, most, checked>(tile, source, stride, first, rows,
                                                               hd);
    if constexpr (rest > 0)
        load_chunks<width, count, threads, most, rest, rest == 1 ? 1 : 4, checked>(
            tile, source, stride, first, rows, hd);
}

// Starts copying rows first..first+count-1 (zeros past `rows`, and in columns from hd on).
template <int width, int count, int threads>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16 *source, int stride, int first,
                                          int rows, int hd)
{
    if (first + count <= rows && hd == width)
        load_rows<width, count, threads, false>(tile, source, stride, first, rows, hd);
    else
        load_rows<width, count, threads, true>(tile, source, stride, first, rows, hd);
}

template <int m_tiles, int n_tiles> using accumulator = float[m_tiles][n_tiles][4];

template <int m_tiles, int n_tiles>
__device__ __forceinline__ void clear(accumulator<m_tiles, n_tiles> &c)
{
#pragma unroll
    for (int m = 0; m < m_tiles; m++)
#pragma unroll
        for (int n = 0; n < n_tiles; n++)
            c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
}

// A warp's rows of a tile, in registers.
template <int width, int m_tiles> struct tile_operand {
    using shape = tile_rows<width>;
    uint32_t a[m_tiles][shape::steps][4], half[m_tiles][2];

    __device__ __forceinline__ void load(uint32_t rows)
    {
#pragma unroll
        for (int m = 0; m < m_tiles; m++) {
            const uint32_t at = rows + m * 16 * shape::bytes + shape::lane_a();
#pragma unroll
            for (int k = 0; k < shape::steps; k++)
                load_matrix(a[m][k], at + k * 32);
            if constexpr (shape::half_step)
                load_matrix(half[m], at + shape::steps * 32);
        }
    }
};

// c[8 n_tiles columns] += a B^T, with B's rows at `b`: one step of k = 16 ...
template <int width, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_step(accumulator<m_tiles, n_tiles> &c,
                                              const uint32_t (&a)[m_tiles][4], uint32_t b)
{
    static_assert(n_tiles % 2 == 0, "two tiles a load");
#pragma unroll
    for (int n = 0; n < n_tiles / 2; n++) {
        uint32_t r[4];
        load_matrix(r, b + tile_rows<width>::lane_b() + n * 16 * tile_rows<width>::bytes);
#pragma unroll
        for (int m = 0; m < m_tiles; m++) {
            multiply(c[m][2 * n], a[m], r[0], r[1]);
            multiply(c[m][2 * n + 1], a[m], r[2], r[3]);
        }
    }
}

// ... and of k = 8
template <int width, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_half_step(accumulator<m_tiles, n_tiles> &c,
                                                   const uint32_t (&a)[m_tiles][2], uint32_t b)
{
#pragma unroll
    for (int n = 0; n < n_tiles / 4; n++) {
        uint32_t r[4];
        load_matrix(r, b + tile_rows<width>::lane_row() + n * 32 * tile_rows<width>::bytes);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply(c[m][4 * n + i], a[m], r[i]);
    }
    if constexpr (n_tiles % 4 != 0) {
        uint32_t r[2];
        load_matrix(r,
                    b + tile_rows<width>::lane_row() + n_tiles / 4 * 32 * tile_rows<width>::bytes);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                multiply(c[m][n_tiles - 2 + i], a[m], r[i]);
    }
}

// c = A B^T over a whole row's width, A in registers.
template <int width, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_rows(accumulator<m_tiles, n_tiles> &c,
                                              const tile_operand<width, m_tiles> &a, uint32_t b)
{
    using shape = tile_rows<width>;
    clear(c);
#pragma unroll
    for (int k = 0; k < shape::steps; k++) {
        uint32_t step[m_tiles][4];
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                step[m][i] = a.a[m][k][i];
        multiply_step<width>(c, step, b + k * 32);
    }
    if constexpr (shape::half_step)
        multiply_half_step<width>(c, a.half, b + shape::steps * 32);
}

// The same, with A's rows at `a`.
template <int width, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_rows(accumulator<m_tiles, n_tiles> &c, uint32_t a,
                                              uint32_t b)
{
    using shape = tile_rows<width>;
    clear(c);
#pragma unroll
    for (int k = 0; k < shape::steps; k++) {
        uint32_t step[m_tiles][4];
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
            load_matrix(step[m], a + shape::lane_a() + m * 16 * shape::bytes + k * 32);
        multiply_step<width>(c, step, b + k * 32);
    }
    if constexpr (shape::half_step) {
        uint32_t step[m_tiles][2];
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
            load_matrix(step[m], a + shape::lane_a() + m * 16 * shape::bytes + shape::steps * 32);
        multiply_half_step<width>(c, step, b + shape::steps * 32);
    }
}

// c += a B, B 16 rows stored [k][n] at `b`, in a tile of rows of `width`.
template <int width, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_transposed(accumulator<m_tiles, n_tiles> &c,
                                                    const uint32_t (&a)[m_tiles][4], uint32_t b)
{
    const uint32_t at = b + tile_rows<width>::lane_a();
#pragma unroll
    for (int n = 0; n < n_tiles / 2; n++) {
        uint32_t r[4];
        load_matrix_transposed(r, at + n * 32);
#pragma unroll
        for (int m = 0; m < m_tiles; m++) {
            multiply(c[m][2 * n], a[m], r[0], r[1]);
            multiply(c[m][2 * n + 1], a[m], r[2], r[3]);
        }
    }
    if constexpr (n_tiles % 2 != 0) {
        uint32_t r[2];
        load_matrix_transposed(r, at + n_tiles / 2 * 32);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
            multiply(c[m][n_tiles - 1], a[m], r[0], r[1]);
    }
}

// A of a product from C of another: two neighbouring tiles of 8 columns.
template <int m_tiles, int n_tiles>
__device__ __forceinline__ void pack_step(uint32_t (&a)[m_tiles][4],
                                          const accumulator<m_tiles, n_tiles> &c, int k)
{
#pragma unroll
    for (int m = 0; m < m_tiles; m++) {
        a[m][0] = pack(c[m][2 * k][0], c[m][2 * k][1]);
        a[m][1] = pack(c[m][2 * k][2], c[m][2 * k][3]);
        a[m][2] = pack(c[m][2 * k + 1][0], c[m][2 * k + 1][1]);
        a[m][3] = pack(c[m][2 * k + 1][2], c[m][2 * k + 1][3]);
    }
}

// Writes a warp's rows, times factor[m][upper or lower half], to device memory: through `rows` of a
// tile, which must be the warp's own by now, so that lanes write 16 bytes each. Row r goes to to +
// r * stride, r < count.
template <int width, int m_tiles>
__device__ __forceinline__ void store_rows(bf16 *to, int stride, int count, int hd, char *rows,
                                           const accumulator<m_tiles, width / 8> &c,
                                           const float (&factor)[m_tiles][2])
{
    using shape = tile_rows<width>;
    const int lane = threadIdx.x % 32;
    uint32_t *words = reinterpret_cast<uint32_t *>(rows);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < m_tiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < shape::chunks; n++)
                words[(16 * m + 8 * half + lane / 4) * (shape::bytes / 4) + 4 * n + lane % 4] =
                    pack(c[m][n][2 * half] * factor[m][half],
                         c[m][n][2 * half + 1] * factor[m][half]);
    __syncwarp();
    constexpr int lanes = width / 64 * 8; // a row; then the chunks left over
    const int chunk = lane % lanes;
    bf16 *at = to + static_cast<size_t>(lane / lanes) * stride + 8 * chunk;
#pragma unroll
    for (int r = lane / lanes; r < 16 * m_tiles; r += 32 / lanes) {
        if (r < count && 8 * chunk < hd)
            *reinterpret_cast<uint4 *>(at) =
                *reinterpret_cast<const uint4 *>(rows + r * shape::bytes + 16 * chunk);
        at += 32 / lanes * stride;
    }
    if constexpr (lanes < shape::chunks)
        for (int i = lane; i < 16 * m_tiles * (shape::chunks - lanes); i += 32) {
            const int r = i % (16 * m_tiles), column = lanes + i / (16 * m_tiles);
            if (r < count && 8 * column < hd)
                *reinterpret_cast<uint4 *>(to + static_cast<size_t>(r) * stride + 8 * column) =
                    *reinterpret_cast<const uint4 *>(rows + r * shape::bytes + 16 * column);
        }
}

#endif
