// LayerNorm with modulation, with what comes before it: gated residual, combination of the experts'
// rows; and with the router's product after it.
#include "devices/fused_segment.cuh"

enum norm_input { INPUT_PLAIN, INPUT_RESIDUAL, INPUT_COMBINE };

// ROWS: what a group takes at a time. EXPERTS: what the router takes in one go.
enum { EXPERTS = 8 };

// The rows of a token's first two experts and of the shared one, on their way from memory together.
struct experts_rows {
    unsigned one[WORDS], two[WORDS], shared[WORDS];
    float first, second; // their weights
};

template <class S>
INLINE void load_experts(experts_rows &e, const norm_forward &a, size_t row, const S &s)
{
    const int *slot = static_cast<const int *>(a.slot) + row * a.choices;
    const float *weight = static_cast<const float *>(a.weight) + row * a.choices;
    const bool second = a.choices > 1; // else the first again, which counts nothing
    e.first = weight[0];
    e.second = second ? weight[1] : 0.0f;
    load_segment(e.one, a.rows, (size_t)slot[0] * a.width, s);
    load_segment(e.two, a.rows, (size_t)slot[second ? 1 : 0] * a.width, s);
    if (a.shared) {
        load_segment(e.shared, a.shared, row * a.width, s);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            e.shared[i] = 0;
    }
}

// sum_k weight[m,k] rows[slot[m,k],:] + shared[m,:]
template <class S>
INLINE void combine(float (&z)[VALUES], const experts_rows &e, const norm_forward &a, size_t row,
                    const S &s)
{
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        z[i] = fmaf(e.first, value(e.one, i), value(e.shared, i));
        z[i] = fmaf(e.second, value(e.two, i), z[i]);
    }
    for (int k = 2; k < a.choices; k++) {
        const size_t pair = row * a.choices + k;
        const float weight = static_cast<const float *>(a.weight)[pair];
        unsigned next[WORDS];
        load_segment(next, a.rows, (size_t) static_cast<const int *>(a.slot)[pair] * a.width, s);
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            z[i] = fmaf(weight, value(next, i), z[i]);
    }
}

// Rows past the end are row `at` again, and not stored. v = the values to be normalised: x, or y =
// x + gate z, or with combined z = x + gate1 z1 + gate z. y is stored unless it is NULL. x and y
// may be in two halves.
template <int ROWS, norm_input INPUT, class S>
INLINE void norm_inputs(float (&v)[ROWS][VALUES], const norm_forward &a, const S &s, size_t at,
                        int row, const unsigned (&gate)[WORDS], const unsigned (&gate1)[WORDS])
{
    unsigned x[ROWS][WORDS], low[ROWS][WORDS] = {}, z[ROWS][WORDS] = {};
    experts_rows experts[INPUT == INPUT_COMBINE ? ROWS : 1];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const size_t m = row + r < s.end ? at + r : at;
        if (INPUT == INPUT_COMBINE)
            load_experts(experts[r], a, m, s);
        load_segment(x[r], a.x, m * a.width, s);
        if (a.x_low)
            load_segment(low[r], a.x_low, m * a.width, s);
        if (INPUT == INPUT_RESIDUAL)
            load_segment(z[r], a.z, m * a.width, s);
        if (INPUT == INPUT_COMBINE && a.z1)
            load_segment(z[r], a.z1, m * a.width, s);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const bool there = row + r < s.end;
        float branch[VALUES];
        if (INPUT == INPUT_COMBINE) {
            combine(branch, experts[r], a, there ? at + r : at, s);
            if (a.kept && there)
                store_segment(a.kept, (at + r) * a.width, branch, s);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            v[r][i] = value(x[r], low[r], i);
            if (INPUT == INPUT_RESIDUAL)
                v[r][i] = fmaf(value(gate, i), value(z[r], i), v[r][i]);
            if (INPUT == INPUT_COMBINE)
                v[r][i] =
                    fmaf(value(gate, i), branch[i], fmaf(value(gate1, i), value(z[r], i), v[r][i]));
        }
        if (INPUT != INPUT_PLAIN && a.y && there)
            store_halves(a.y, a.y_low, (at + r) * a.width, v[r], s);
    }
}

// Mean and 1/std of the rows.
template <int ROWS, class S>
INLINE void row_moments(float (&mean)[ROWS], float (&rstd)[ROWS], const float (&v)[ROWS][VALUES],
                        const S &s, int width, float (&shared)[2][ROW_WARPS][ROWS])
{
    const float inverse = 1.0f / (float)width;
    float part[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        part[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            part[r] += v[r][i];
    }
    row_sums(mean, part, s, shared[0]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        mean[r] *= inverse;
        part[r] = 0.0f;
        if (s.vector())
#pragma unroll
            for (int i = 0; i < 8; i++)
                part[r] = fmaf(v[r][i] - mean[r], v[r][i] - mean[r], part[r]);
        if (s.tail())
#pragma unroll
            for (int i = 8; i < VALUES; i++)
                part[r] = fmaf(v[r][i] - mean[r], v[r][i] - mean[r], part[r]);
    }
    row_sums(rstd, part, s, shared[1]);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        rstd[r] = rsqrtf(fmaf(rstd[r], inverse, 1e-6f));
}

// logits[row..,:] = h router_w^T, EXPERTS of them at a time
template <int ROWS, class S>
INLINE void router_product(const norm_forward &a, const float (&h)[ROWS][VALUES], const S &s,
                           size_t at, int row, const float4 *weights,
                           float (&shared)[ROW_WARPS][ROWS * EXPERTS])
{
    enum { share = WARP / (ROWS * EXPERTS) };
    for (int first = 0; first < a.experts; first += EXPERTS) {
        float sums[ROWS * EXPERTS] = {};
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
            if (first + e < a.experts)
#pragma unroll
                for (int q = 0; q < QUADS; q++) {
                    const float4 w = router_quad(weights, first + e, q, s);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float &sum = sums[r * EXPERTS + e];
                        sum = fmaf(h[r][4 * q], w.x, sum);
                        sum = fmaf(h[r][4 * q + 1], w.y, sum);
                        sum = fmaf(h[r][4 * q + 2], w.z, sum);
                        sum = fmaf(h[r][4 * q + 3], w.w, sum);
                    }
                }
        float logit = warp_sums(sums); // lane / share: row * EXPERTS + expert
        if constexpr (S::warps > 1) {
            if (s.lane % share == 0)
                shared[s.group * S::warps + s.warp][s.lane / share] = logit;
            row_barrier(s);
            logit = 0.0f;
#pragma unroll
            for (int w = 0; w < S::warps; w++)
                logit += shared[s.group * S::warps + w][s.lane / share];
            if (first + EXPERTS < a.experts)
                row_barrier(s); // they were read
        }
        const int r = s.lane / share / EXPERTS, e = first + s.lane / share % EXPERTS;
        if (s.warp == 0 && s.lane % share == 0 && row + r < s.end && e < a.experts)
            static_cast<float *>(a.logits)[(at + r) * a.experts + e] = logit;
    }
}

// x of the grid: chunks of an image's rows, y: images
template <int ROWS, norm_input INPUT, bool ROUTED, int W, bool FULL>
INLINE void norm_forward_rows(const norm_forward &a, int chunk)
{
    using S = segment<W, FULL>;
    extern __shared__ float4 weights[];
    __shared__ __align__(16) float moments[2][2][ROW_WARPS][ROWS];
    __shared__ float logits[ROUTED ? ROW_WARPS : 1][ROWS * EXPERTS];
    const S s = find_segment<W, FULL>(a.width, a.tokens, chunk);
    const size_t image = blockIdx.y, mod = image * a.mod_width;
    unsigned gate[WORDS] = {}, gate1[WORDS] = {}, shift[WORDS], scale[WORDS];
    load_segment(shift, a.mod, mod + a.shift, s);
    load_segment(scale, a.mod, mod + a.scale, s);
    if (INPUT != INPUT_PLAIN)
        load_segment(gate, a.mod, mod + a.gate, s);
    if (INPUT == INPUT_COMBINE && a.z1)
        load_segment(gate1, a.mod, mod + a.gate1, s);
    if (ROUTED) {
        stage_router(weights, a.router_w, a.experts, a.width, S::warps);
        __syncthreads();
    }
    int turn = 0;
    for (int row = s.first + s.group * ROWS; row < s.end; row += S::groups * ROWS, turn ^= 1) {
        float v[ROWS][VALUES] = {}, mean[ROWS], rstd[ROWS];
        const size_t at = image * a.tokens + row;
        stay_packed(gate);
        stay_packed(gate1);
        stay_packed(shift);
        stay_packed(scale);
        norm_inputs<ROWS, INPUT>(v, a, s, at, row, gate, gate1);
        row_moments(mean, rstd, v, s, a.width, moments[turn]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                const float by = fmaf(rstd[r], value(scale, i), rstd[r]);
                v[r][i] = fmaf(v[r][i] - mean[r], by, value(shift, i));
            }
            if (row + r >= s.end)
                continue;
            store_segment(a.h, (at + r) * a.width, v[r], s);
            if (s.warp == 0 && s.lane == 0)
                static_cast<float2 *>(a.stats)[at + r] = make_float2(mean[r], rstd[r]);
        }
        if constexpr (ROUTED)
            router_product(a, v, s, at, row, weights, logits);
    }
}

// blocks: how many must have room on a multiprocessor
#define NORM_FORWARD(name, rows, input, router, blocks, warps, full)   \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, blocks)  \
        name##_##warps##full(const norm_forward a, int chunk)          \
    {                                                                  \
        norm_forward_rows<rows, input, router, warps, full>(a, chunk); \
    }
#define LAYERNORM(warps, full) NORM_FORWARD(layernorm, 2, INPUT_PLAIN, false, 5, warps, full)
#define RESIDUAL(warps, full) NORM_FORWARD(residual_norm, 2, INPUT_RESIDUAL, false, 5, warps, full)
#define ROUTER(warps, full) \
    NORM_FORWARD(residual_norm_router, 4, INPUT_RESIDUAL, true, 3, warps, full)
#define COMBINE(warps, full) NORM_FORWARD(combine_norm, 2, INPUT_COMBINE, false, 4, warps, full)

SEGMENTS(LAYERNORM)
SEGMENTS(RESIDUAL)
SEGMENTS(ROUTER)
SEGMENTS(COMBINE)
