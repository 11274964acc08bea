// LayerNorm with modulation, with what comes before it: gated residual, combination of the experts'
// rows; and with the router's product after it. And all of it backwards.
#include "devices/fused.cuh"

enum norm_input { INPUT_PLAIN, INPUT_RESIDUAL, INPUT_COMBINE };

enum { EXPERTS = 8 }; // that the router's product takes in one go

// Mean and 1/std of R rows, each held 8 values a thread by the p.lanes threads of a group. The
// variance is that of warps around their own means, merged (Chan, Golub and LeVeque 1983).
template <int R>
INLINE void row_moments(float (&mean)[R], float (&rstd)[R], const float (&v)[R][V], const place &p,
                        int width, float2 (&shared)[WARPS][R])
{
    const int warps = p.lanes / WARP, w = p.thread / WARP, vectors = width / V;
    const float inverse = 1.0f / (float)(V * min(WARP, vectors - w * WARP));
#pragma unroll
    for (int r = 0; r < R; r++) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < V; i++)
            sum += v[r][i];
        const float m = warp_sum(p.works ? sum : 0.0f) * inverse;
#pragma unroll
        for (int i = 0; i < V; i++)
            squares = fmaf(v[r][i] - m, v[r][i] - m, squares);
        squares = warp_sum(p.works ? squares : 0.0f);
        if (p.thread % WARP == 0)
            shared[p.group * warps + w][r] = make_float2(m, squares);
    }
    group_barrier(p.group, p.lanes);
#pragma unroll
    for (int r = 0; r < R; r++) {
        float sum = 0.0f, squares = 0.0f;
        for (int i = 0; i < warps; i++)
            sum = fmaf(shared[p.group * warps + i][r].x, (float)min(WARP, vectors - i * WARP), sum);
        mean[r] = sum / (float)vectors;
        for (int i = 0; i < warps; i++) {
            const float2 part = shared[p.group * warps + i][r];
            const float count = (float)(V * min(WARP, vectors - i * WARP)), d = part.x - mean[r];
            squares += fmaf(count * d, d, part.y);
        }
        rstd[r] = rsqrtf(squares / (float)width + 1e-6f);
    }
}

// sum_k weight[m,k] rows[slot[m,k],:] + shared[m,:], this thread's 8 columns
INLINE void combine(float (&z)[V], const norm_forward &a, size_t row, int thread)
{
    const int *slot = static_cast<const int *>(a.slot) + row * a.choices;
    const float *weight = static_cast<const float *>(a.weight) + row * a.choices;
    const size_t vectors = a.width / V;
    float part[V];
    uint4 shared = make_uint4(0, 0, 0, 0);
    if (a.shared)
        shared = load16(a.shared, row * vectors + thread);
    unpack(z, shared);
    int k = 0;
    for (; k + 2 <= a.choices; k += 2) {
        const uint4 one = load16(a.rows, slot[k] * vectors + thread);
        const uint4 two = load16(a.rows, slot[k + 1] * vectors + thread);
        unpack(part, one);
#pragma unroll
        for (int i = 0; i < V; i++)
            z[i] = fmaf(weight[k], part[i], z[i]);
        unpack(part, two);
#pragma unroll
        for (int i = 0; i < V; i++)
            z[i] = fmaf(weight[k + 1], part[i], z[i]);
    }
    if (k < a.choices) {
        unpack(part, load16(a.rows, slot[k] * vectors + thread));
#pragma unroll
        for (int i = 0; i < V; i++)
            z[i] = fmaf(weight[k], part[i], z[i]);
    }
}

// v = the values to be normalised: x, or y = x + gate z, which is stored
template <int R, norm_input INPUT>
INLINE void norm_inputs(float (&v)[R][V], const norm_forward &a, const place &p, size_t image,
                        int row, uint4 packed_gate)
{
    const size_t vectors = a.width / V, at = (image * a.tokens + row) * vectors + p.thread;
    uint4 x[R], z[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        if (row + r < p.end) {
            x[r] = load16(a.x, at + r * vectors);
            if (INPUT == INPUT_RESIDUAL)
                z[r] = load16(a.z, at + r * vectors);
        }
#pragma unroll
    for (int r = 0; r < R; r++)
        if (row + r < p.end) {
            unpack(v[r], x[r]);
            if (INPUT == INPUT_PLAIN)
                continue;
            float gate[V], branch[V];
            if (INPUT == INPUT_RESIDUAL)
                unpack(branch, z[r]);
            else
                combine(branch, a, image * a.tokens + row + r, p.thread);
            if (INPUT == INPUT_COMBINE && a.kept)
                store16(a.kept, at + r * vectors, pack(branch));
            unpack(gate, packed_gate);
#pragma unroll
            for (int i = 0; i < V; i++)
                v[r][i] = fmaf(gate[i], branch[i], v[r][i]);
            store16(a.y, at + r * vectors, pack(v[r]));
        }
}

// logits[row..,:] = h router_w^T of R rows, EXPERTS of them at a time
template <int R>
INLINE void router_product(const norm_forward &a, const float (&h)[R][V], const place &p,
                           size_t image, int row, float (&shared)[WARPS][R * EXPERTS])
{
    const int warps = p.lanes / WARP, warp = p.group * warps + p.thread / WARP;
    const int lane = p.thread % WARP, share = WARP / (R * EXPERTS);
    for (int first = 0; first < a.experts; first += EXPERTS) {
        float sums[R * EXPERTS] = {};
        if (p.works)
#pragma unroll
            for (int e = 0; e < EXPERTS; e++)
                if (first + e < a.experts) {
                    float w[V];
                    load_parameters(w, static_cast<const float *>(a.router_w) +
                                           (size_t)(first + e) * a.width + p.thread * V);
#pragma unroll
                    for (int r = 0; r < R; r++)
#pragma unroll
                        for (int i = 0; i < V; i++)
                            sums[r * EXPERTS + e] = fmaf(h[r][i], w[i], sums[r * EXPERTS + e]);
                }
        const float sum = warp_sums(sums);
        if (first > 0)
            group_barrier(p.group, p.lanes); // the last ones were read
        if (lane % share == 0)
            shared[warp][lane / share] = sum;
        group_barrier(p.group, p.lanes);
        const int r = p.thread / EXPERTS, e = first + p.thread % EXPERTS;
        if (r < R && row + r < p.end && e < a.experts) {
            float logit = 0.0f;
            for (int i = 0; i < warps; i++)
                logit += shared[p.group * warps + i][p.thread];
            static_cast<float *>(a.logits)[(image * a.tokens + row + r) * a.experts + e] = logit;
        }
    }
}

// Blocks of whole groups of threads; x: chunks of an image's rows, y: images. A group takes R rows at
// a time.
template <int R, norm_input INPUT, bool ROUTER>
INLINE void norm_forward_rows(const norm_forward &a, int chunk)
{
    __shared__ float2 moments[2][WARPS][R];
    __shared__ float logits[ROUTER ? WARPS : 1][R * EXPERTS];
    const place p = find_place(a.width, a.tokens, chunk);
    const size_t image = blockIdx.y, vectors = a.width / V;
    uint4 gate = {}, shift = {}, scale = {};
    const size_t mod = image * a.mod_width / V + p.thread;
    if (p.works) {
        shift = load16(a.mod, mod + a.shift / V);
        scale = load16(a.mod, mod + a.scale / V);
        if (INPUT != INPUT_PLAIN)
            gate = load16(a.mod, mod + a.gate / V);
    }
    int turn = 0;
    for (int row = p.first + p.group * R; row < p.end; row += p.groups * R, turn ^= 1) {
        float v[R][V] = {}, mean[R], rstd[R];
        if (p.works)
            norm_inputs<R, INPUT>(v, a, p, image, row, gate);
        row_moments(mean, rstd, v, p, a.width, moments[turn]);
        const size_t at = image * a.tokens + row;
        float by[V], plus[V];
        unpack(by, scale);
        unpack(plus, shift);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < V; i++)
                v[r][i] = fmaf((v[r][i] - mean[r]) * rstd[r], 1.0f + by[i], plus[i]);
            if (row + r < p.end && p.works)
                store16(a.h, (at + r) * vectors + p.thread, pack(v[r]));
            if (row + r < p.end && p.thread == 0)
                static_cast<float2 *>(a.stats)[at + r] = make_float2(mean[r], rstd[r]);
        }
        if constexpr (ROUTER)
            router_product<R>(a, v, p, image, row, logits);
    }
}

#define NORM_FORWARD(name, rows, input, router)                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const norm_forward a, int chunk) \
    {                                                                                           \
        norm_forward_rows<rows, input, router>(a, chunk);                                       \
    }

NORM_FORWARD(layernorm_1, 1, INPUT_PLAIN, false)
NORM_FORWARD(layernorm_2, 2, INPUT_PLAIN, false)
NORM_FORWARD(layernorm_4, 4, INPUT_PLAIN, false)
NORM_FORWARD(residual_norm_1, 1, INPUT_RESIDUAL, false)
NORM_FORWARD(residual_norm_2, 2, INPUT_RESIDUAL, false)
NORM_FORWARD(residual_norm_4, 4, INPUT_RESIDUAL, false)
NORM_FORWARD(residual_norm_router_1, 1, INPUT_RESIDUAL, true)
NORM_FORWARD(residual_norm_router_2, 2, INPUT_RESIDUAL, true)
NORM_FORWARD(residual_norm_router_4, 4, INPUT_RESIDUAL, true)
NORM_FORWARD(combine_norm_1, 1, INPUT_COMBINE, false)
NORM_FORWARD(combine_norm_2, 2, INPUT_COMBINE, false)
NORM_FORWARD(combine_norm_4, 4, INPUT_COMBINE, false)
