// Attention for bf16 activations: the instances of attention_list.h. Operands as in runtime/ops.h;
// all must start at multiples of 16 bytes, head sizes are multiples of 8.
#include "devices/attention_backward.cuh"
#include "devices/attention_forward.cuh"
#include "devices/attention_list.h"

#define FORWARD(width, rows, warps, m_tiles, keys, stages, resident)                               \
    extern "C" __global__ void __launch_bounds__(32 * warps, resident)                             \
        attention_fwd_##width##_##rows(bf16 *o, float *lse, const bf16 *qkv, int units, int heads, \
                                       int tokens, int hd, float scale)                            \
    {                                                                                              \
        using kernel = attention_forward<width, m_tiles, warps, keys, stages>;                     \
        static_assert(kernel::queries == rows, "as the name says");                                \
        static_assert(kernel::shared_bytes == ATTENTION_FORWARD_SHARED(width, rows, keys, stages), \
                      "");                                                                         \
        kernel::run({o, lse, qkv, units, heads, tokens, hd, scale * log2_e});                      \
    }
ATTENTION_FORWARD(FORWARD)

#define BACKWARD_ARGUMENTS                                                                        \
    bf16 *dqkv, float *delta, const bf16 *dout, const bf16 *o, const float *lse, const bf16 *qkv, \
        int images, int heads, int tokens, int hd, float scale
#define BACKWARD_VALUES                                                  \
    {                                                                    \
        dqkv, delta, dout, o, lse, qkv, images, heads, tokens, hd, scale \
    }
constexpr bool whole = true, part = false;

#define BACKWARD(width, owned, which, m_tiles, sub, stages)                                      \
    extern "C" __global__ void __launch_bounds__(ATTENTION_BACKWARD_THREADS, 1)                  \
        attention_bwd_##width##_##owned##_##which##_##stages(BACKWARD_ARGUMENTS)                 \
    {                                                                                            \
        using kernel = attention_backward_kv<width, m_tiles, sub, stages, which>;                \
        static_assert(kernel::keys == owned && kernel::threads == ATTENTION_BACKWARD_THREADS,    \
                      "as the name says");                                                       \
        static_assert(                                                                           \
            kernel::shared_bytes == ATTENTION_BACKWARD_SHARED(width, owned, stages, which), ""); \
        kernel::run(BACKWARD_VALUES);                                                            \
    }
ATTENTION_BACKWARD(BACKWARD)

#define BACKWARD_Q(width, m_tiles, keys)                                                         \
    extern "C" __global__ void __launch_bounds__(ATTENTION_BACKWARD_Q_THREADS, 2)                \
        attention_bwd_q_##width(BACKWARD_ARGUMENTS)                                              \
    {                                                                                            \
        using kernel = attention_backward_q<width, m_tiles, keys>;                               \
        static_assert(kernel::threads == ATTENTION_BACKWARD_Q_THREADS, "");                      \
        static_assert(kernel::shared_bytes == ATTENTION_BACKWARD_Q_SHARED(width, m_tiles, keys), \
                      "");                                                                       \
        kernel::run(BACKWARD_VALUES);                                                            \
    }
ATTENTION_BACKWARD_Q(BACKWARD_Q)
