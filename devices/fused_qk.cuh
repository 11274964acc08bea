// LayerNorm per head of q and k, whose rows are q | k | v of 3 * heads * head columns. A thread has
// 8 columns of every row; the threads of a head exchange their sums through shared memory.
#include "devices/fused.cuh"

// Threads of a block at most, with v and without; rows at a time
enum { QKV_THREADS = 768, QK_THREADS = 512, QK_ROWS = 2 };

// Where a thread works: vector `vector` of head `head` (k's heads come after q's).
struct qk_place {
    int width; // vectors of q and k of a row: where v begins
    int head, vector, vectors;
    bool works; // has columns of q or k
};

// VECTORS of a head; 0: found at run time
template <int VECTORS> INLINE qk_place find_qk(const qk_norm &a)
{
    qk_place p;
    p.vectors = VECTORS ? VECTORS : a.head / V;
    p.width = 2 * a.heads * p.vectors;
    p.head = threadIdx.x / p.vectors;
    p.vector = threadIdx.x % p.vectors;
    p.works = (int)threadIdx.x < p.width;
    return p;
}

// This thread's 8 of a head's parameters.
INLINE void qk_parameters(float (&out)[V], const qk_norm &a, const qk_place &p, const void *q,
                          const void *k)
{
    load_parameters(out, static_cast<const float *>(p.head < a.heads ? q : k) + p.vector * V);
}

// Mean and 1/std of this thread's head from means and squared deviations of 8 values each.
template <int VECTORS> INLINE float2 qk_moments(const float2 *parts, const qk_place &p)
{
    float mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < (VECTORS ? VECTORS : p.vectors); i++) {
        mean += parts[i].x;
        squares += parts[i].y;
    }
    mean *= 1.0f / (float)p.vectors;
#pragma unroll
    for (int i = 0; i < (VECTORS ? VECTORS : p.vectors); i++) {
        const float d = parts[i].x - mean;
        squares = fmaf((float)V * d, d, squares);
    }
    return make_float2(mean, rsqrtf(fmaf(squares, 1.0f / (float)(p.vectors * V), 1e-6f)));
}

INLINE float2 vector_moments(const float (&v)[V])
{
    float mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < V; i++)
        mean += v[i];
    mean *= 1.0f / V;
#pragma unroll
    for (int i = 0; i < V; i++)
        squares = fmaf(v[i] - mean, v[i] - mean, squares);
    return make_float2(mean, squares);
}

// Blocks of whole warps that cover q, k and v of a row; `chunk` rows a block.
template <int VECTORS> INLINE void qk_forward(const qk_norm &a, int chunk)
{
    __shared__ float2 shared[2][QK_ROWS][QKV_THREADS];
    const qk_place p = find_qk<VECTORS>(a);
    const int end = min((int)(blockIdx.x + 1) * chunk, a.rows);
    const size_t vectors = p.width / 2 * 3;
    const bool there = threadIdx.x < vectors && (p.works || a.out != a.qkv);
    float w[V] = {}, bias[V] = {};
    if (p.works) {
        qk_parameters(w, a, p, a.wq, a.wk);
        qk_parameters(bias, a, p, a.bq, a.bk);
    }
    int turn = 0;
    for (int row = blockIdx.x * chunk; row < end; row += QK_ROWS, turn ^= 1) {
        uint4 in[QK_ROWS];
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (there && row + r < end)
                in[r] = load16(a.qkv, (row + r) * vectors + threadIdx.x);
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (p.works && row + r < end) {
                float v[V];
                unpack(v, in[r]);
                shared[turn][r][threadIdx.x] = vector_moments(v);
            }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (there && row + r < end) {
                if (p.works) {
                    const float2 m = qk_moments<VECTORS>(&shared[turn][r][p.head * p.vectors], p);
                    float v[V];
                    unpack(v, in[r]);
#pragma unroll
                    for (int i = 0; i < V; i++)
                        v[i] = fmaf((v[i] - m.x) * m.y, w[i], bias[i]);
                    in[r] = pack(v);
                    if (p.vector == 0)
                        static_cast<float2 *>(a.stats)[(size_t)(row + r) * 2 * a.heads + p.head] =
                            m;
                }
                store16(a.out, (row + r) * vectors + threadIdx.x, in[r]);
            }
    }
}

// The sums over heads of what the block's threads hold for w and for bias, to
// partial[block][wq, bq, wk, bk][head].
INLINE void qk_partial(const qk_norm &a, const qk_place &p, const float (&dw)[V],
                       const float (&dbias)[V], float (&shared)[QK_THREADS][V])
{
    float *out = static_cast<float *>(a.partial) + (size_t)blockIdx.x * 4 * a.head;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        __syncthreads();
        if (p.works)
#pragma unroll
            for (int i = 0; i < V; i++)
                shared[threadIdx.x][i] = which ? dbias[i] : dw[i];
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * a.head; i += blockDim.x) { // of q, of k
            const int k = i / a.head, column = i % a.head;
            float sum = 0.0f;
            for (int h = 0; h < a.heads; h++)
                sum += shared[(k * a.heads + h) * p.vectors + column / V][column % V];
            out[(2 * k + which) * a.head + column] = sum;
        }
    }
}

// Blocks of whole warps that cover q and k of a row.
template <int VECTORS> INLINE void qk_backward(const qk_norm &a, int chunk)
{
    __shared__ float2 sums[2][QK_ROWS][QK_THREADS];
    __shared__ float partial[QK_THREADS][V];
    const qk_place p = find_qk<VECTORS>(a);
    const int end = min((int)(blockIdx.x + 1) * chunk, a.rows);
    const size_t vectors = p.width / 2 * 3;
    float w[V] = {}, dw[V] = {}, dbias[V] = {};
    if (p.works)
        qk_parameters(w, a, p, a.wq, a.wk);
    int turn = 0;
    for (int row = blockIdx.x * chunk; row < end; row += QK_ROWS, turn ^= 1) {
        uint4 in[QK_ROWS], gradient[QK_ROWS];
        float2 stats[QK_ROWS];
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (p.works && row + r < end) {
                in[r] = load16(a.qkv, (row + r) * vectors + threadIdx.x);
                gradient[r] = load16(a.out, (row + r) * vectors + threadIdx.x);
                stats[r] =
                    static_cast<const float2 *>(a.stats)[(size_t)(row + r) * 2 * a.heads + p.head];
            }
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (p.works && row + r < end) {
                float x[V], g[V];
                float2 sum = make_float2(0.0f, 0.0f);
                unpack(x, in[r]);
                unpack(g, gradient[r]);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    const float normal = (x[i] - stats[r].x) * stats[r].y;
                    dbias[i] += g[i];
                    dw[i] = fmaf(g[i], normal, dw[i]);
                    sum.x = fmaf(g[i], w[i], sum.x);
                    sum.y = fmaf(g[i] * w[i], normal, sum.y);
                }
                sums[turn][r][threadIdx.x] = sum;
            }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < QK_ROWS; r++)
            if (p.works && row + r < end) {
                float x[V], g[V], mean = 0.0f, slope = 0.0f;
#pragma unroll
                for (int i = 0; i < (VECTORS ? VECTORS : p.vectors); i++) {
                    const float2 part = sums[turn][r][p.head * p.vectors + i];
                    mean += part.x;
                    slope += part.y;
                }
                mean *= 1.0f / (float)(p.vectors * V);
                slope *= 1.0f / (float)(p.vectors * V);
                unpack(x, in[r]);
                unpack(g, gradient[r]);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    const float normal = (x[i] - stats[r].x) * stats[r].y;
                    g[i] = stats[r].y * (g[i] * w[i] - mean - normal * slope);
                }
                store16(a.out, (row + r) * vectors + threadIdx.x, pack(g));
            }
    }
    qk_partial(a, p, dw, dbias, partial);
}

#define QK_NORM(vectors)                                      \
    extern "C" __global__ void __launch_bounds__(QKV_THREADS) \
        qk_norm_rows_##vectors(const qk_norm a, int chunk)    \
    {                                                         \
        qk_forward<vectors>(a, chunk);                        \
    }                                                         \
    extern "C" __global__ void __launch_bounds__(QK_THREADS)  \
        qk_norm_back_##vectors(const qk_norm a, int chunk)    \
    {                                                         \
        qk_backward<vectors>(a, chunk);                       \
    }

QK_NORM(0)
QK_NORM(8)
QK_NORM(9)
QK_NORM(11)

// dwq, dbq, dwk, dbk += the sums over the blocks' partials
extern "C" __global__ void __launch_bounds__(WARP *STRIPES) qk_norm_sums(const qk_norm a, int parts)
{
    const int i = blockIdx.x * WARP + threadIdx.x % WARP, count = 4 * a.head;
    const float sum = sum_parts(static_cast<const float *>(a.partial), count, parts, i);
    if (threadIdx.x >= WARP || i >= count)
        return;
    const int which = i / a.head, column = i % a.head;
    void *out = which == 0 ? a.dwq : which == 1 ? a.dbq : which == 2 ? a.dwk : a.dbk;
    static_cast<float *>(out)[column] += sum;
}
