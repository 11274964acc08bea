// GroupNorm of images of pixels [images * pixels, channels]: sums over parts of an image, their
// total for each group, and the map of each pixel (with SiLU). A thread has eight neighbouring
// channels; a block goes through the pixels of one part, THREADS * 8 / channels at a time.
#include "devices/fused.cuh"

// ---- mean and squared distances -----------------------------------------------------------------

// Of `count` values: their mean, and the sum of their squared distances from it.
struct moments {
    float count, mean, squares;
};

// Chan, Golub, LeVeque 1979
INLINE moments join(const moments &a, const moments &b)
{
    const float count = a.count + b.count, share = count > 0.0f ? b.count / count : 0.0f;
    const float d = b.mean - a.mean;
    return {count, fmaf(d, share, a.mean), a.squares + b.squares + d * d * a.count * share};
}

INLINE moments join_lanes(moments m)
{
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const moments other = {__shfl_xor_sync(~0u, m.count, step),
                               __shfl_xor_sync(~0u, m.mean, step),
                               __shfl_xor_sync(~0u, m.squares, step)};
        // both lanes of a pair do the same sum, so that all agree in the end
        m = threadIdx.x & step ? join(other, m) : join(m, other);
    }
    return m;
}

// Where a thread is: `rows` pixels at a time, of which it has number `row`.
struct pixel_place {
    int units, unit, rows, row;
};

INLINE pixel_place find_pixel_place(int channels)
{
    pixel_place at;
    at.units = channels / V;
    at.unit = threadIdx.x % at.units;
    at.rows = THREADS / at.units;
    at.row = threadIdx.x / at.units;
    return at;
}

// partial[image, part, group] = (mean, squared distances). A thread's channels belong to GROUPS
// groups, or to part of one. Its sums are of distances from its first values, so that a large mean
// costs no digits.
template <int GROUPS> INLINE void group_sums(const group_norm_forward &a, int chunk)
{
    enum { EACH = V / GROUPS, AHEAD = 8 };
    __shared__ moments shared[THREADS * GROUPS];
    const pixel_place at = find_pixel_place(a.channels);
    const int per = a.channels / a.groups, wide = max(per / V, 1); // threads of a group
    const int first = blockIdx.x * chunk + at.row, end = min((blockIdx.x + 1) * chunk, a.pixels);
    const size_t image = (size_t)blockIdx.y * a.pixels;
    float base[GROUPS] = {}, sum[GROUPS] = {}, square[GROUPS] = {};
    int count = 0;
    for (int row = first; row < end && at.row < at.rows; row += AHEAD * at.rows) {
        uint4 in[AHEAD];
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
            in[r] = load16(a.x, (image + min(row + r * at.rows, end - 1)) * at.units + at.unit);
#pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            float v[V];
            unpack(v, in[r]);
            if (row + r * at.rows >= end)
                continue;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                if (count == 0)
                    base[g] = v[g * EACH];
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const float d = v[g * EACH + i] - base[g];
                    sum[g] += d;
                    square[g] = fmaf(d, d, square[g]);
                }
            }
            count++;
        }
    }
    const int slots = at.rows * wide, slot = at.row * wide + at.unit % wide;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const float n = (float)(count * EACH), mean = n > 0.0f ? sum[g] / n : 0.0f;
        if (at.row < at.rows)
            shared[(at.unit * GROUPS / wide + g) * slots + slot] = {
                n, base[g] + mean, fmaxf(fmaf(-sum[g], mean, square[g]), 0.0f)};
    }
    __syncthreads();
    float2 *partial =
        static_cast<float2 *>(a.partial) + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * a.groups;
    for (int g = threadIdx.x / WARP; g < a.groups; g += WARPS) {
        moments all = {};
        for (int i = threadIdx.x % WARP; i < slots; i += WARP)
            all = join(all, shared[g * slots + i]);
        all = join_lanes(all);
        if (threadIdx.x % WARP == 0)
            partial[g] = make_float2(all.mean, all.squares);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_sums_1(const __grid_constant__ group_norm_forward a, int chunk)
{
    group_sums<1>(a, chunk);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_sums_2(const __grid_constant__ group_norm_forward a, int chunk)
{
    group_sums<2>(a, chunk);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_sums_4(const __grid_constant__ group_norm_forward a, int chunk)
{
    group_sums<4>(a, chunk);
}

// total[image, 2, channels] = weight / std | mean. A block takes a group of an image.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_totals(const __grid_constant__ group_norm_forward a, int chunk, int chunks)
{
    __shared__ moments shared[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = blockIdx.x;
    const int per = a.channels / a.groups;
    const float2 *partial =
        static_cast<const float2 *>(a.partial) + (size_t)blockIdx.y * chunks * a.groups + group;
    moments all = {};
#pragma unroll 4
    for (int i = threadIdx.x; i < chunks; i += THREADS) {
        const float2 part = partial[(size_t)i * a.groups];
        const int pixels = min(chunk, a.pixels - i * chunk);
        all = join(all, {(float)pixels * (float)per, part.x, part.y});
    }
    all = join_lanes(all);
    if (lane == 0)
        shared[warp] = all;
    __syncthreads();
    all = shared[0];
    for (int w = 1; w < WARPS; w++)
        all = join(all, shared[w]);
    const float scale = rsqrtf(all.squares / all.count + a.eps);
    const float *weight = static_cast<const float *>(a.weight);
    float *total = static_cast<float *>(a.total) + (size_t)blockIdx.y * 2 * a.channels;
    for (int c = group * per + threadIdx.x; c < (group + 1) * per; c += THREADS) {
        total[c] = scale * weight[c];
        total[a.channels + c] = all.mean;
    }
}

// ---- the map ------------------------------------------------------------------------------------

// y = f((x - mean) * weight / std + bias), f: SiLU or nothing
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_map(const __grid_constant__ group_norm_forward a, int chunk)
{
    enum { AHEAD = 4 };
    const pixel_place at = find_pixel_place(a.channels);
    const int end = min((blockIdx.x + 1) * chunk, a.pixels);
    const size_t image = (size_t)blockIdx.y * a.pixels;
    const float *total = static_cast<const float *>(a.total) + (size_t)blockIdx.y * 2 * a.channels;
    float scale[V], mean[V], bias[V];
    if (at.row >= at.rows)
        return;
    load_parameters(scale, total + at.unit * V);
    load_parameters(mean, total + a.channels + at.unit * V);
    load_parameters(bias, static_cast<const float *>(a.bias) + at.unit * V);
    for (int row = blockIdx.x * chunk + at.row; row < end; row += AHEAD * at.rows) {
        uint4 in[AHEAD];
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
            if (row + r * at.rows < end)
                in[r] = load16(a.x, (image + row + r * at.rows) * at.units + at.unit);
#pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            if (row + r * at.rows >= end)
                continue;
            float v[V];
            unpack(v, in[r]);
#pragma unroll
            for (int i = 0; i < V; i++) {
                v[i] = fmaf(v[i] - mean[i], scale[i], bias[i]);
                if (a.silu)
                    v[i] = __fdividef(v[i], 1.0f + __expf(-v[i]));
            }
            store16(a.y, (image + row + r * at.rows) * at.units + at.unit, pack(v));
        }
    }
}
