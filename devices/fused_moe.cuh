// Gathering rows for the experts, the backward of combining theirs, and the router: choice, sort by
// expert and balance in two launches.
#include "devices/fused.cuh"

// ---- rows ---------------------------------------------------------------------------------------

// rows[slot[m,k],:] = x[m,:], K choices of a token at a time; a warp takes 4 tokens, so that 4
// loads are on their way at once, and each is read once (from rows, which lie apart, memory would
// be read again for each of a token's choices).
template <int K> INLINE void dispatch_rows(const dispatch &a)
{
    enum { TOKENS = 4 };
    const int token = TOKENS * (blockIdx.x * WARPS + threadIdx.x / WARP);
    const size_t vectors = a.width / V;
    for (int first = 0; first < a.choices; first += K) {
        size_t to[TOKENS][K];
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int k = 0; k < K; k++)
                to[t][k] = token + t < a.tokens
                               ? static_cast<const int *>(
                                     a.slot)[(token + t) * a.choices + first + k] *
                                     vectors
                               : 0;
        for (size_t v = threadIdx.x % WARP; v < vectors; v += WARP) {
            uint4 in[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (token + t < a.tokens)
                    in[t] = load16(a.x, (token + t) * vectors + v);
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (token + t < a.tokens)
#pragma unroll
                    for (int k = 0; k < K; k++)
                        store16(a.rows, to[t][k] + v, in[t]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) dispatch_rows_1(const dispatch a)
{
    dispatch_rows<1>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) dispatch_rows_2(const dispatch a)
{
    dispatch_rows<2>(a);
}

// drows[slot,:] = weight dout[m,:] and, where there are rows, the dot product of dout[m,:] and
// rows[slot,:], K choices of a token at a time; a warp a token. drows may be rows: a vector is read
// before it is written, by one thread.
template <int K> INLINE void combine_back(const combine_backward &a)
{
    enum { AHEAD = 2 };
    const size_t token = blockIdx.x * WARPS + threadIdx.x / WARP, vectors = a.width / V;
    const int lane = threadIdx.x % WARP;
    if (token >= a.tokens)
        return;
    for (int first = 0; first < a.choices; first += K) {
        const size_t pair = token * a.choices + first;
        float dots[K] = {}, weight[K];
        size_t slot[K];
#pragma unroll
        for (int k = 0; k < K; k++) {
            slot[k] = static_cast<const int *>(a.slot)[pair + k] * vectors;
            weight[k] = static_cast<const float *>(a.weight)[pair + k];
        }
        for (size_t v = lane; v < vectors; v += AHEAD * WARP) {
            uint4 dout[AHEAD], rows[AHEAD][K];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (v + i * WARP < vectors) {
                    dout[i] = load16(a.dout, token * vectors + v + i * WARP);
#pragma unroll
                    for (int k = 0; k < K; k++)
                        rows[i][k] = a.rows ? load16(a.rows, slot[k] + v + i * WARP)
                                            : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (v + i * WARP < vectors) {
                    float d[V], y[V];
                    unpack(d, dout[i]);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        unpack(y, rows[i][k]);
#pragma unroll
                        for (int j = 0; j < V; j++) {
                            dots[k] = fmaf(d[j], y[j], dots[k]);
                            y[j] = weight[k] * d[j];
                        }
                        store16(a.drows, slot[k] + v + i * WARP, pack(y));
                    }
                }
        }
        const float sum = warp_sums(dots);
        if (a.dweight && lane % (WARP / K) == 0)
            static_cast<float *>(a.dweight)[pair + lane / (WARP / K)] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) combine_back_1(const combine_backward a)
{
    combine_back<1>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) combine_back_2(const combine_backward a)
{
    combine_back<2>(a);
}

// ---- the router's gradient ----------------------------------------------------------------------

enum { GRADIENT_EXPERTS = 8, GRADIENT_ROWS = 4 }; // experts in one go; rows on their way at a time

// d = dlogits[row, first..first+8); zeros for experts that there are not. EIGHT: there are exactly
// 8.
template <bool EIGHT>
INLINE void load_dlogits(float (&d)[GRADIENT_EXPERTS], const router_gradient &a, size_t row,
                         int first)
{
    const float *dlogits = static_cast<const float *>(a.dlogits) + row * a.experts + first;
    if constexpr (EIGHT) {
        load_parameters(d, dlogits);
    } else {
#pragma unroll
        for (int e = 0; e < GRADIENT_EXPERTS; e++)
            d[e] = first + e < a.experts ? dlogits[e] : 0.0f;
    }
}

// partial[block][e][d] = sum over the block's rows of dlogits[row,e] h[row,d]; a thread has 8
// columns, the groups of threads share the rows.
template <bool EIGHT> INLINE void router_gradient_rows(const router_gradient &a, int chunk)
{
    __shared__ float shared[THREADS][V];
    const place p = find_place(a.width, a.rows, chunk);
    float *partial = static_cast<float *>(a.partial) + (size_t)blockIdx.x * a.experts * a.width;
    const size_t vectors = a.width / V;
    for (int first = 0; first < (EIGHT ? 1 : a.experts); first += GRADIENT_EXPERTS) {
        float sums[GRADIENT_EXPERTS][V] = {};
        for (int row = p.first + p.group; row < p.end; row += p.groups * GRADIENT_ROWS) {
            uint4 in[GRADIENT_ROWS];
#pragma unroll
            for (int r = 0; r < GRADIENT_ROWS; r++)
                in[r] = p.works && row + r * p.groups < p.end
                            ? load16(a.h, (row + r * p.groups) * vectors + p.thread)
                            : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int r = 0; r < GRADIENT_ROWS; r++) {
                float h[V], d[GRADIENT_EXPERTS];
                if (row + r * p.groups >= p.end)
                    break;
                load_dlogits<EIGHT>(d, a, row + r * p.groups, first);
                unpack(h, in[r]);
#pragma unroll
                for (int e = 0; e < GRADIENT_EXPERTS; e++)
#pragma unroll
                    for (int i = 0; i < V; i++)
                        sums[e][i] = fmaf(d[e], h[i], sums[e][i]);
            }
        }
#pragma unroll
        for (int e = 0; e < GRADIENT_EXPERTS; e++)
            if (first + e < a.experts)
                store_group_sums(partial + (size_t)(first + e) * a.width, p, sums[e], shared);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    router_gradient_8(const router_gradient a, int chunk)
{
    router_gradient_rows<true>(a, chunk);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    router_gradient_any(const router_gradient a, int chunk)
{
    router_gradient_rows<false>(a, chunk);
}

// ---- choice and sort ----------------------------------------------------------------------------

enum { CHOICES_MAX = 8 };

// Which of MOST experts are chosen, as bits: their K largest probabilities in descending order,
// ties to the lower expert. NaN counts as less than any probability.
template <int MOST> INLINE unsigned choose(const route &a, size_t row, const float (&p)[MOST])
{
    float *weight = static_cast<float *>(a.weight) + row * a.choices;
    int *index = static_cast<int *>(a.index) + row * a.choices;
    unsigned chosen = 0;
    float sum = 0.0f;
    for (int k = 0; k < a.choices; k++) {
        float best = -2.0f, probability = 0.0f;
        int expert = 0;
#pragma unroll
        for (int e = 0; e < MOST; e++) {
            const float q = p[e] >= 0.0f ? p[e] : -1.0f;
            const bool better = e < a.experts && !(chosen >> e & 1) && q > best;
            best = better ? q : best;
            probability = better ? p[e] : probability;
            expert = better ? e : expert;
        }
        chosen |= 1u << expert;
        sum += probability;
        weight[k] = probability;
        index[k] = expert;
    }
    if (a.renormalise && a.choices > 1)
        for (int k = 0; k < a.choices; k++)
            weight[k] /= sum + 1e-20f;
    return chosen;
}

// probs[row,:] = softmax(logits[row,:]), also in p
template <int MOST> INLINE void softmax(float (&p)[MOST], const route &a, size_t row)
{
    const float *logits = static_cast<const float *>(a.logits) + row * a.experts;
    float *probs = static_cast<float *>(a.probs) + row * a.experts;
    float most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int e = 0; e < MOST; e++)
        p[e] = e < a.experts ? logits[e] : -INFINITY;
#pragma unroll
    for (int e = 0; e < MOST; e++)
        most = p[e] > most ? p[e] : most;
#pragma unroll
    for (int e = 0; e < MOST; e++) {
        p[e] = e < a.experts ? expf(p[e] - most) : 0.0f;
        sum += p[e];
    }
#pragma unroll
    for (int e = 0; e < MOST; e++) {
        p[e] /= sum;
        if (e < a.experts)
            probs[e] = p[e];
    }
}

// A thread a token. Leaves in partial how often the block's tokens chose each expert,
// [blocks,experts] ints, then the sums of their probabilities, as many floats.
template <int MOST> INLINE void route_choose(const route &a)
{
    __shared__ int counts[WARPS][MOST];
    __shared__ float sums[WARPS][MOST];
    const size_t row = (size_t)blockIdx.x * ROUTE_ROWS + threadIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float p[MOST] = {};
    unsigned chosen = 0;
    if (row < a.rows) {
        softmax(p, a, row);
        chosen = choose(a, row, p);
    }
#pragma unroll
    for (int e = 0; e < MOST; e++) {
        const unsigned who = __ballot_sync(~0u, chosen >> e & 1);
        if (lane == e)
            counts[warp][e] = __popc(who);
    }
    const float sum = warp_sums(p);
    if (lane % (WARP / MOST) == 0)
        sums[warp][lane / (WARP / MOST)] = sum;
    __syncthreads();
    if (threadIdx.x >= a.experts)
        return;
    int count = 0;
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) {
        count += counts[w][threadIdx.x];
        total += sums[w][threadIdx.x];
    }
    const size_t at = (size_t)blockIdx.x * a.experts + threadIdx.x;
    static_cast<int *>(a.partial)[at] = count;
    static_cast<float *>(a.partial)[(size_t)gridDim.x * a.experts + at] = total;
}

// Sums over the partials of blocks [from, to), expert threadIdx.x % MOST; every thread of an expert
// gets them.
template <int MOST, class T>
INLINE T sum_blocks(const T *partial, int experts, int from, int to, T (&shared)[THREADS])
{
    const int e = threadIdx.x % MOST;
    T sum = 0;
#pragma unroll 4
    for (int b = from + threadIdx.x / MOST; b < to; b += THREADS / MOST)
        sum += e < experts ? partial[(size_t)b * experts + e] : 0;
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < THREADS / MOST; i++)
        sum += shared[i * MOST + e];
    return sum;
}

// fraction and mean_prob of the group whose first block this is
template <int MOST> INLINE void route_balance(const route &a)
{
    __shared__ int ints[THREADS];
    __shared__ float floats[THREADS];
    const int blocks = gridDim.x / a.groups, rows = a.rows / a.groups, from = blockIdx.x;
    const float *sums = static_cast<const float *>(a.partial) + (size_t)gridDim.x * a.experts;
    const int count =
        sum_blocks<MOST>(static_cast<const int *>(a.partial), a.experts, from, from + blocks, ints);
    const float sum = sum_blocks<MOST>(sums, a.experts, from, from + blocks, floats);
    if (threadIdx.x >= a.experts)
        return;
    const int at = from / blocks * a.experts + threadIdx.x;
    static_cast<float *>(a.fraction)[at] =
        (float)a.experts * (float)count / ((float)rows * (float)a.choices);
    static_cast<float *>(a.mean_prob)[at] = sum / (float)rows;
}

// Writes slot and token of this thread's token; `base`: the first row of each expert for this
// block.
template <int MOST> INLINE void route_place(const route &a, const int (&base)[MOST])
{
    __shared__ int before[WARPS][MOST];
    const size_t row = (size_t)blockIdx.x * ROUTE_ROWS + threadIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int *index = static_cast<const int *>(a.index) + row * a.choices;
    int mine[CHOICES_MAX], rank[CHOICES_MAX];
#pragma unroll
    for (int k = 0; k < CHOICES_MAX; k++)
        mine[k] = row < a.rows && k < a.choices ? index[k] : -1;
#pragma unroll
    for (int e = 0; e < MOST; e++) {
        bool has = false;
#pragma unroll
        for (int k = 0; k < CHOICES_MAX; k++)
            has |= mine[k] == e;
        const unsigned who = __ballot_sync(~0u, has);
#pragma unroll
        for (int k = 0; k < CHOICES_MAX; k++)
            rank[k] = mine[k] == e ? __popc(who & ((1u << lane) - 1)) : rank[k];
        if (lane == e)
            before[warp][e] = __popc(who);
    }
    __syncthreads();
    if (row >= a.rows)
        return;
#pragma unroll
    for (int k = 0; k < CHOICES_MAX; k++)
        if (k < a.choices) {
            int to = base[mine[k]] + rank[k];
            for (int w = 0; w < warp; w++)
                to += before[w][mine[k]];
            static_cast<int *>(a.slot)[row * a.choices + k] = to;
            static_cast<int *>(a.token)[to] = (int)row;
        }
}

template <int MOST> INLINE void route_sort(const route &a)
{
    __shared__ int ints[THREADS], total[MOST], base[MOST];
    const int *counts = static_cast<const int *>(a.partial);
    const int all = sum_blocks<MOST>(counts, a.experts, 0, gridDim.x, ints);
    const int earlier = sum_blocks<MOST>(counts, a.experts, 0, blockIdx.x, ints);
    if (threadIdx.x < MOST)
        total[threadIdx.x] = all;
    __syncthreads();
    if (threadIdx.x < MOST) {
        int first = 0;
        for (int e = 0; e < (int)threadIdx.x; e++)
            first += total[e];
        base[threadIdx.x] = first + earlier;
        if (blockIdx.x == 0 && threadIdx.x < a.experts) {
            static_cast<int *>(a.offsets)[threadIdx.x] = first;
            if (threadIdx.x == a.experts - 1)
                static_cast<int *>(a.offsets)[a.experts] = first + all;
        }
    }
    __syncthreads();
    route_place<MOST>(a, base);
    if (a.fraction && blockIdx.x % (gridDim.x / a.groups) == 0)
        route_balance<MOST>(a);
}

#define ROUTE(name, body, most)                                                  \
    extern "C" __global__ void __launch_bounds__(ROUTE_ROWS) name(const route a) \
    {                                                                            \
        body<most>(a);                                                           \
    }

ROUTE(route_choose_8, route_choose, 8)
ROUTE(route_choose_16, route_choose, 16)
ROUTE(route_sort_8, route_sort, 8)
ROUTE(route_sort_16, route_sort, 16)
