// The online softmax of attention forward: what a warp keeps of its 16 * m_tiles queries, as
// accumulators of m16n8k16 (tensor_core.cuh; wgmma's are the same).
#ifndef DITMOE_ATTENTION_SOFTMAX_CUH
#define DITMOE_ATTENTION_SOFTMAX_CUH

#include "devices/attention_tile.cuh"

// Sums of V weighted by exp(score - top), and of the weights (each lane its columns'), by row.
template <int width, int m_tiles, int keys> struct attention_softmax {
    using score_tile = accumulator<m_tiles, keys / 8>;

    accumulator<m_tiles, width / 8> o;
    float top[m_tiles][2], sum[m_tiles][2];

    __device__ __forceinline__ void start()
    {
        clear(o);
#pragma unroll
        for (int m = 0; m < m_tiles; m++) {
            top[m][0] = top[m][1] = -INFINITY;
            sum[m][0] = sum[m][1] = 0;
        }
    }

    // Keys past the last get no weight.
    __device__ __forceinline__ void mask(score_tile &s, int left)
    {
        const int column = 2 * (threadIdx.x % 4);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int n = 0; n < keys / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (8 * n + column + i % 2 >= left)
                        s[m][n][i] = -INFINITY;
    }

    // Scores become weights relative to a score near the row's largest so far. Sums are scaled to a
    // larger one only when some row's has grown by 2^8: weights stay far from overflow, and this is
    // rare after the first tile.
    __device__ __forceinline__ void add(score_tile &s, float scale)
    {
        float tops[m_tiles][2];
        bool grown = false;
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float t = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < keys / 8; n++)
                    t = fmaxf(t, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
                tops[m][half] = fmaxf(t, __shfl_xor_sync(~0u, t, 2));
                grown |= (tops[m][half] - top[m][half]) * scale > 8;
            }
        if (__any_sync(~0u, grown))
            shrink(tops, scale);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float base = top[m][half] * scale;
                float part = 0;
#pragma unroll
                for (int n = 0; n < keys / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        s[m][n][i] = exp2_fast(fmaf(s[m][n][i], scale, -base));
                        part += s[m][n][i];
                    }
                sum[m][half] += part;
            }
    }

    __device__ __forceinline__ void shrink(const float (&tops)[m_tiles][2], float scale)
    {
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = fmaxf(tops[m][half], top[m][half]);
                const float by = exp2_fast((top[m][half] - most) * scale);
                top[m][half] = most;
                sum[m][half] *= by;
#pragma unroll
                for (int n = 0; n < width / 8; n++) {
                    o[m][n][2 * half] *= by;
                    o[m][n][2 * half + 1] *= by;
                }
            }
    }

    // The inverse of each row's sum of weights; log sum exp of rows first.. to lse, unless that is
    // nullptr. shift: what each of the warp's rows' scores lack, unless that is nullptr.
    __device__ __forceinline__ void finish(float (&inverse)[m_tiles][2], float *lse, int first,
                                           int tokens, float scale, const float *shift = nullptr)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float all = sum[m][half];
                all += __shfl_xor_sync(~0u, all, 1);
                all += __shfl_xor_sync(~0u, all, 2);
                inverse[m][half] = 1 / all;
                const int r = 16 * m + 8 * half + lane / 4, t = first + r;
                const float most = top[m][half] + (shift ? shift[r] : 0);
                if (lse && lane % 4 == 0 && t < tokens)
                    lse[t] = 0.6931471805599453f * fmaf(most, scale, log2f(all));
            }
    }
};

#endif
