// Sums over columns, and the optimiser.
#include "devices/fused.cuh"

// ---- sums of columns ----------------------------------------------------------------------------

// partial[block y][column] = sum over the rows of the block; 32 threads side by side have 8 columns
// each, 8 warps share the rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums_rows(const column_sums a, int chunk)
{
    enum { AHEAD = 4 };
    __shared__ float shared[WARPS][WARP][V];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t vectors = a.columns / V, vector = blockIdx.x * WARP + lane;
    const int first = blockIdx.y * chunk, end = min(first + chunk, a.rows);
    float sums[V] = {};
    for (int row = first + warp; row < end && vector < vectors; row += AHEAD * WARPS) {
        uint4 in[AHEAD];
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
            in[r] = row + r * WARPS < end ? load16(a.a, (row + r * WARPS) * vectors + vector)
                                          : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            float v[V];
            unpack(v, in[r]);
#pragma unroll
            for (int i = 0; i < V; i++)
                sums[i] += v[i];
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++)
        shared[warp][lane][i] = sums[i];
    __syncthreads();
    // a thread a column
    const size_t column = (size_t)blockIdx.x * WARP * V + threadIdx.x;
    if (column >= a.columns)
        return;
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++)
        total += shared[w][threadIdx.x / V][threadIdx.x % V];
    static_cast<float *>(a.partial)[blockIdx.y * (size_t)a.columns + column] = total;
}

// out[i] (added: +)= sum over `parts` of partial[part][i]
extern "C" __global__ void __launch_bounds__(WARP *STRIPES)
    add_parts(float *out, const float *partial, int count, int parts, int added)
{
    const int i = blockIdx.x * WARP + threadIdx.x % WARP;
    const float sum = sum_parts(partial, count, parts, i);
    if (threadIdx.x < WARP && i < count)
        out[i] = added ? out[i] + sum : sum;
}

// ---- the norm of the gradients ------------------------------------------------------------------

INLINE float square(float4 v)
{
    return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
}

// The sum over the block's warps, for thread 0.
INLINE double block_sum(double sum)
{
    __shared__ double shared[WARPS];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0;
    for (int w = 0; w < WARPS; w++)
        sum += shared[w];
    return sum;
}

// partial[block] = sum of squares of every gridDim'th 4096 values; double: a thread adds thousands
extern "C" __global__ void __launch_bounds__(THREADS) norm2_rows(const norm2 a)
{
    const float4 *g = static_cast<const float4 *>(a.g);
    const size_t vectors = a.count / 4, stride = (size_t)gridDim.x * 4 * THREADS;
    double sum = 0.0;
    for (size_t i = (size_t)blockIdx.x * 4 * THREADS + threadIdx.x; i < vectors; i += stride) {
        float4 in[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            in[j] = i + j * THREADS < vectors ? g[i + j * THREADS] : make_float4(0, 0, 0, 0);
        sum += (double)(square(in[0]) + square(in[1]) + square(in[2]) + square(in[3]));
    }
    if (blockIdx.x == 0 && threadIdx.x < a.count % 4) {
        const float last = static_cast<const float *>(a.g)[vectors * 4 + threadIdx.x];
        sum += (double)(last * last);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        static_cast<float *>(a.partial)[blockIdx.x] = (float)sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) norm2_sum(const norm2 a, int parts)
{
    float *control = static_cast<float *>(a.control);
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += THREADS)
        sum += (double)static_cast<const float *>(a.partial)[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        control[0] = a.added ? control[0] + (float)sum : (float)sum;
}

// ---- AdamW --------------------------------------------------------------------------------------

// The entries of control, as enum control of runtime/ops.h has them.
struct adamw_scalars {
    float scale, rate, bias1, bias2, ema;
};

// Loshchilov and Hutter, arXiv 1711.05101, and the moving average of the weights. rest = 1 - beta.
INLINE void adamw_value(float &w, float &m, float &v, float &ema, float g, const adamw_step &a,
                        const adamw_scalars &c)
{
    g *= c.scale;
    m = fmaf(a.beta1, m, a.rest1 * g);
    v = fmaf(a.beta2, v, a.rest2 * g * g);
    w = fmaf(-c.rate * a.decay, w, w);
    w = fmaf(-c.rate / c.bias1, m / (sqrtf(v / c.bias2) + a.eps), w);
    ema = fmaf(1.0f - c.ema, w - ema, ema);
}

INLINE float4 load_weights(const adamw_step &a, size_t i)
{
    if (!a.low)
        return static_cast<const float4 *>(a.w)[i];
    const uint2 high = static_cast<const uint2 *>(a.w)[i];
    const uint2 low = static_cast<const uint2 *>(a.low)[i];
    const float2 first = join2(high.x, low.x), second = join2(high.y, low.y);
    return make_float4(first.x, first.y, second.x, second.y);
}

INLINE void store_weights(const adamw_step &a, size_t i, float4 w)
{
    if (!a.low) {
        static_cast<float4 *>(a.w)[i] = w;
        return;
    }
    static_cast<uint2 *>(a.w)[i] = make_uint2(high2(w.x, w.y), high2(w.z, w.w));
    static_cast<uint2 *>(a.low)[i] = make_uint2(low2(w.x, w.y), low2(w.z, w.w));
}

INLINE void adamw_vector(const adamw_step &a, const adamw_scalars &c, size_t i)
{
    float4 w = load_weights(a, i), m = static_cast<float4 *>(a.m)[i];
    float4 v = static_cast<float4 *>(a.v)[i], g = static_cast<const float4 *>(a.g)[i];
    float4 e = a.ema ? static_cast<float4 *>(a.ema)[i] : w;
    adamw_value(w.x, m.x, v.x, e.x, g.x, a, c);
    adamw_value(w.y, m.y, v.y, e.y, g.y, a, c);
    adamw_value(w.z, m.z, v.z, e.z, g.z, a, c);
    adamw_value(w.w, m.w, v.w, e.w, g.w, a, c);
    store_weights(a, i, w);
    static_cast<float4 *>(a.m)[i] = m;
    static_cast<float4 *>(a.v)[i] = v;
    if (a.ema)
        static_cast<float4 *>(a.ema)[i] = e;
}

// One of the last values, which fill no vector.
INLINE void adamw_single(const adamw_step &a, const adamw_scalars &c, size_t i)
{
    unsigned short *high = static_cast<unsigned short *>(a.w) + i;
    unsigned short *low = static_cast<unsigned short *>(a.low) + i;
    float *whole = static_cast<float *>(a.w) + i, *ema = static_cast<float *>(a.ema) + i;
    float w = a.low ? join2(*high, *low).x : *whole, e = a.ema ? *ema : w;
    adamw_value(w, static_cast<float *>(a.m)[i], static_cast<float *>(a.v)[i], e,
                static_cast<const float *>(a.g)[i], a, c);
    if (a.ema)
        *ema = e;
    if (!a.low) {
        *whole = w;
        return;
    }
    *high = (unsigned short)high2(w, w);
    *low = (unsigned short)low2(w, w);
}

// A thread 4 values; the first threads also the last values.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_rows(const adamw_step a)
{
    const float *control = static_cast<const float *>(a.control);
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, vectors = a.count / 4;
    if (control[6] != 0.0f)
        return;
    const adamw_scalars c = {control[1], control[2], control[3], control[4], control[5]};
    if (i < vectors)
        adamw_vector(a, c, i);
    if (i < a.count % 4)
        adamw_single(a, c, vectors * 4 + i);
}
