// Attention for bf16 activations on Hopper: the instances of attention_list.h that only it has.
// Operands as in attention.cu; the forward kernels read q, k and v through `maps`.
#include "devices/attention_backward_sm90.cuh"
#include "devices/attention_forward_sm90.cuh"
#include "devices/attention_list.h"

#define FORWARD(width, rows, groups, stages, resident)                                             \
    extern "C" __global__ void __launch_bounds__(128 * groups, resident)                           \
        attention_fwd_sm90_##width##_##rows(const __grid_constant__ attention_maps maps, bf16 *o,  \
                                            float *lse, const bf16 *qkv, int units, int heads,     \
                                            int tokens, int hd, float scale)                       \
    {                                                                                              \
        using kernel = attention_forward_sm90<width, groups, stages, false>;                       \
        static_assert(kernel::queries == rows, "as the name says");                                \
        static_assert(kernel::shared_bytes ==                                                      \
                          ATTENTION_FORWARD_SM90_SHARED(width, rows, stages, false),               \
                      "");                                                                         \
        kernel::run({o, lse, qkv, units, heads, tokens, hd, scale * log2_e}, maps);                \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128 * groups, resident)                           \
        attention_fwd_sm90_norm_##width##_##rows(                                                  \
            const __grid_constant__ attention_maps maps, bf16 *o, float *lse, const bf16 *qkv,     \
            int units, int heads, int tokens, int hd, float scale, const float *wq,                \
            const float *bq, const float *wk, const float *bk)                                     \
    {                                                                                              \
        using kernel = attention_forward_sm90<width, groups, stages, true>;                        \
        static_assert(                                                                             \
            kernel::shared_bytes == ATTENTION_FORWARD_SM90_SHARED(width, rows, stages, true), ""); \
        kernel::run({o, lse, qkv, units, heads, tokens, hd, scale * log2_e, wq, bq, wk, bk},       \
                    maps);                                                                         \
    }
ATTENTION_FORWARD_SM90(FORWARD)
ATTENTION_FORWARD_SM90_WIDE(FORWARD)

#define BACKWARD(width, sub)                                                                  \
    extern "C" __global__ void __launch_bounds__(ATTENTION_BACKWARD_THREADS, 1)               \
        attention_bwd_sm90_##width(bf16 *dqkv, float *delta, const bf16 *dout, const bf16 *o, \
                                   const float *lse, const bf16 *qkv, int images, int heads,  \
                                   int tokens, int hd, float scale)                           \
    {                                                                                         \
        using kernel = attention_backward_sm90<width, sub>;                                   \
        static_assert(kernel::shared_bytes == ATTENTION_BACKWARD_SM90_SHARED(width), "");     \
        kernel::run({dqkv, delta, dout, o, lse, qkv, images, heads, tokens, hd, scale});      \
    }
ATTENTION_BACKWARD_SM90(BACKWARD)
