// The backward of fused_norm.cuh, one pass over the rows, and the sums over an image's rows that it
// leaves in parts.
#include "devices/fused_segment.cuh"

// What a lane holds of ROWS rows.
template <int ROWS> struct back_rows {
    unsigned y[ROWS][WORDS], dx[ROWS][WORDS], z[ROWS][WORDS];
    float g[ROWS][VALUES]; // the gradient of h
    float2 stats[ROWS];
};

// Where the rows of ROWS tokens' first two experts are: known one turn ahead, so that their loads
// need not wait for it.
template <int ROWS> struct back_slots {
    int one[ROWS], two[ROWS];
};

template <int ROWS, class S>
INLINE void find_slots(back_slots<ROWS> &to, const norm_backward &a, const S &s, size_t at, int row)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (row + r < s.end) {
            const int *slot = static_cast<const int *>(a.slot) + (at + r) * a.choices;
            to.one[r] = slot[0];
            to.two[r] = slot[a.choices > 1 ? 1 : 0];
        }
}

// The rows of a token's first two experts: on their way from memory together with the others.
template <int ROWS> struct back_pairs {
    unsigned one[ROWS][WORDS], two[ROWS][WORDS];
};

template <int ROWS, class S>
INLINE void load_pairs(back_pairs<ROWS> &b, const back_slots<ROWS> &slots, const norm_backward &a,
                       const S &s)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        load_segment(b.one[r], a.drows, (size_t)slots.one[r] * a.width, s);
        load_segment(b.two[r], a.drows, (size_t)slots.two[r] * a.width, s);
    }
}

// g += the gradients that come back from the token's experts
template <int ROWS, class S>
INLINE void back_experts(back_rows<ROWS> &b, const back_pairs<ROWS> &pairs, const norm_backward &a,
                         const S &s, size_t at, int row)
{
    const float second = a.choices > 1 ? 1.0f : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            b.g[r][i] += value(pairs.one[r], i);
            b.g[r][i] = fmaf(second, value(pairs.two[r], i), b.g[r][i]);
        }
    for (int k = 2; k < a.choices; k++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const size_t pair = (row + r < s.end ? at + r : at) * a.choices + k;
            unsigned in[WORDS];
            load_segment(in, a.drows, (size_t) static_cast<const int *>(a.slot)[pair] * a.width, s);
#pragma unroll
            for (int i = 0; i < VALUES; i++)
                b.g[r][i] += value(in, i);
        }
}

// g += dlogits router_w
template <int ROWS, class S>
INLINE void back_router(back_rows<ROWS> &b, const norm_backward &a, const S &s, size_t at, int row,
                        const float4 *weights)
{
    const float *dlogits = static_cast<const float *>(a.dlogits);
#pragma unroll 4
    for (int e = 0; e < a.experts; e++) {
        float d[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            d[r] = dlogits[(row + r < s.end ? at + r : at) * a.experts + e];
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float4 w = router_quad(weights, e, q, s);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                b.g[r][4 * q] = fmaf(d[r], w.x, b.g[r][4 * q]);
                b.g[r][4 * q + 1] = fmaf(d[r], w.y, b.g[r][4 * q + 1]);
                b.g[r][4 * q + 2] = fmaf(d[r], w.z, b.g[r][4 * q + 2]);
                b.g[r][4 * q + 3] = fmaf(d[r], w.w, b.g[r][4 * q + 3]);
            }
        }
    }
}

// Rows past the end are row `at` again; what comes of them counts nothing.
template <int ROWS, class S>
INLINE void back_load(back_rows<ROWS> &b, const norm_backward &a, const S &s, size_t at, int row)
{
    unsigned dh[ROWS][WORDS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const size_t m = row + r < s.end ? at + r : at;
        load_segment(dh[r], a.dh, m * a.width, s);
        load_segment(b.y[r], a.y, m * a.width, s);
        load_segment(b.dx[r], a.dx, m * a.width, s);
        if (a.dz)
            load_segment(b.z[r], a.z, m * a.width, s);
        b.stats[r] = static_cast<const float2 *>(a.stats)[m];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            b.g[r][i] = value(dh[r], i);
}

// This lane's sums over rows: of g, of g (y - mean)/std, and of dx z.
struct back_sums {
    float shift[VALUES], scale[VALUES], gate[VALUES];
};

// Normalised y, from values that were packed. Lanes without columns have y 0, and g 0.
INLINE float normal(const unsigned (&y)[WORDS], int i, float2 stats)
{
    return (value(y, i) - stats.x) * stats.y;
}

// The means of p and p (y - mean)/std over each row, where p = g (1 + scale)
template <int ROWS, class S>
INLINE void back_means(float (&mean)[2 * ROWS], const back_rows<ROWS> &b, const S &s, int row,
                       int width, const unsigned (&scale)[WORDS], back_sums &sums,
                       float (&shared)[ROW_WARPS][2 * ROWS])
{
    float part[2 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float counts = row + r < s.end ? 1.0f : 0.0f;
        part[2 * r] = part[2 * r + 1] = 0.0f;
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const float n = normal(b.y[r], i, b.stats[r]), g = b.g[r][i];
            const float p = fmaf(g, value(scale, i), g);
            part[2 * r] += p;
            part[2 * r + 1] = fmaf(p, n, part[2 * r + 1]);
            sums.shift[i] = fmaf(counts, g, sums.shift[i]);
            sums.scale[i] = fmaf(counts * g, n, sums.scale[i]);
        }
    }
    row_sums(mean, part, s, shared);
#pragma unroll
    for (int i = 0; i < 2 * ROWS; i++)
        mean[i] *= 1.0f / (float)width;
}

// dx, dz and this lane's sums of dx z
template <int ROWS, class S>
INLINE void back_store(const back_rows<ROWS> &b, const norm_backward &a, const S &s, size_t at,
                       int row, const float (&mean)[2 * ROWS], const unsigned (&scale)[WORDS],
                       const unsigned (&gate)[WORDS], back_sums &sums)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (row + r >= s.end)
            continue;
        float dx[VALUES], dz[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const float n = normal(b.y[r], i, b.stats[r]), g = b.g[r][i];
            const float p = fmaf(g, value(scale, i), g);
            dx[i] =
                fmaf(b.stats[r].y, p - fmaf(n, mean[2 * r + 1], mean[2 * r]), value(b.dx[r], i));
        }
        store_segment(a.dx, (at + r) * a.width, dx, s);
        if (!a.dz)
            continue;
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            sums.gate[i] = fmaf(dx[i], value(b.z[r], i), sums.gate[i]);
            dz[i] = value(gate, i) * dx[i];
        }
        store_segment(a.dz, (at + r) * a.width, dz, s);
    }
}

// out[this lane's columns] = the sums of a block's groups, added in their order
template <class S>
INLINE void store_block_sums(float *out, const float (&sums)[VALUES], const S &s,
                             float (&shared)[ROW_THREADS][VALUES + 1])
{
    float total[VALUES];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VALUES; i++)
        shared[threadIdx.x][i] = total[i] = sums[i];
    __syncthreads();
    if (s.group > 0)
        return;
    for (int g = 1; g < S::groups; g++)
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            total[i] += shared[g * S::threads + threadIdx.x][i];
    float4 *vector = reinterpret_cast<float4 *>(out + s.column);
    if (s.vector()) {
        vector[0] = make_float4(total[0], total[1], total[2], total[3]);
        vector[1] = make_float4(total[4], total[5], total[6], total[7]);
    }
    if (s.tail())
        *reinterpret_cast<float4 *>(out + s.last) =
            make_float4(total[8], total[9], total[10], total[11]);
}

template <int ROWS, bool BRANCHED, int W, bool FULL>
INLINE void norm_backward_rows(const norm_backward &a, int chunk)
{
    using S = segment<W, FULL>;
    extern __shared__ float4 weights[];
    __shared__ __align__(16) float moments[2][ROW_WARPS][2 * ROWS];
    __shared__ float shared[ROW_THREADS][VALUES + 1];
    const S s = find_segment<W, FULL>(a.width, a.tokens, chunk);
    const size_t image = blockIdx.y, mod = image * a.mod_width;
    back_sums sums = {};
    unsigned gate[WORDS] = {}, scale[WORDS];
    load_segment(scale, a.mod, mod + a.scale, s);
    if (a.dz)
        load_segment(gate, a.mod, mod + a.gate, s);
    if (BRANCHED && a.dlogits) {
        stage_router(weights, a.router_w, a.experts, a.width, S::warps);
        __syncthreads();
    }
    back_slots<ROWS> slots = {};
    const int start = s.first + s.group * ROWS;
    if (BRANCHED && a.drows)
        find_slots(slots, a, s, image * a.tokens + start, start);
    int turn = 0;
    for (int row = start; row < s.end; row += S::groups * ROWS, turn ^= 1) {
        const size_t at = image * a.tokens + row;
        back_rows<ROWS> b;
        float mean[2 * ROWS];
        stay_packed(gate);
        stay_packed(scale);
        back_pairs<ROWS> pairs;
        if (BRANCHED && a.drows) {
            load_pairs(pairs, slots, a, s);
            find_slots(slots, a, s, at + S::groups * ROWS, row + S::groups * ROWS);
        }
        back_load(b, a, s, at, row);
        if (BRANCHED && a.drows)
            back_experts(b, pairs, a, s, at, row);
        if (BRANCHED && a.dlogits)
            back_router(b, a, s, at, row, weights);
        back_means(mean, b, s, row, a.width, scale, sums, moments[turn]);
        back_store(b, a, s, at, row, mean, scale, gate, sums);
    }
    float *out = static_cast<float *>(a.partial) + (image * gridDim.x + blockIdx.x) * 3 * a.width;
    store_block_sums(out, sums.shift, s, shared);
    store_block_sums(out + a.width, sums.scale, s, shared);
    if (a.dz)
        store_block_sums(out + 2 * a.width, sums.gate, s, shared);
}

#define NORM_BACKWARD(name, rows, branches, blocks, warps, full)      \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, blocks) \
        name##_##warps##full(const norm_backward a, int chunk)        \
    {                                                                 \
        norm_backward_rows<rows, branches, warps, full>(a, chunk);    \
    }
#define BACK(warps, full) NORM_BACKWARD(norm_back, 2, false, 3, warps, full)
#define BRANCHES(warps, full) NORM_BACKWARD(norm_back_branches, 2, true, 3, warps, full)

SEGMENTS(BACK)
SEGMENTS(BRANCHES)

// dmod's columns of each part (shift, scale, gate) from the chunks' partial sums. x: 4 columns a
// thread, y: parts, z: images
extern "C" __global__ void __launch_bounds__(64) norm_back_sums(const norm_backward a, int chunks)
{
    const int column = 4 * (blockIdx.x * blockDim.x + threadIdx.x), part = blockIdx.y;
    const size_t image = blockIdx.z;
    if (column >= a.width)
        return;
    const float *in =
        static_cast<const float *>(a.partial) + (image * chunks * 3 + part) * a.width + column;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int c = 0; c < chunks; c++, in += 3 * a.width) {
        const float4 v = *reinterpret_cast<const float4 *>(in);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int to = (part == 0 ? a.shift : part == 1 ? a.scale : a.gate) + column;
    static_cast<uint2 *>(a.dmod)[(image * a.mod_width + to) / 4] =
        make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
}
