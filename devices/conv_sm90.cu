// Convolutions of bf16 pixels on Hopper (sm_90a): a product whose A the copy engine reads from the
// images themselves, tap by tap, so that no matrix of gathered pixels is written.
#include "devices/gemm_sm90_kernel.cuh"

#define ALL_WIDTHS(KERNEL)               \
    KERNEL(conv_bf16, CONV, TO_BF16, 32) \
    KERNEL(conv_bf16, CONV, TO_BF16, 96) \
    WIDTHS(KERNEL, conv_bf16, CONV, TO_BF16)

ALL_WIDTHS(GEMM)
ALL_WIDTHS(GEMM_REST)
GEMM(conv_f32, CONV, TO_F32, 32)
GEMM_REST(conv_f32, CONV, TO_F32, 32)

// The weights of struct gemm_sm90_pixels, doubled: v[out, 4, 2, 2, channels] of w[out, 3, 3,
// channels]. Of an even line of y (or place in it) the first tap of two meets what the kernel's
// first does, the second what the others do; of an odd one the first meets what its first two do.
// A thread takes eight channels.
extern "C" __global__ void __launch_bounds__(128)
    conv_double_weights(uint4 *v, const uint4 *w, int out, int units)
{
    const int i = blockIdx.x * 128 + threadIdx.x, o = i / units, unit = i - o * units;
    if (o >= out)
        return;
    uint4 in[9];
    w += (size_t)o * 9 * units + unit;
    v += (size_t)o * 16 * units + unit;
#pragma unroll
    for (int k = 0; k < 9; k++)
        in[k] = w[k * units];
#pragma unroll
    for (int k = 0; k < 16; k++) {
        const int py = k / 8, px = k / 4 % 2, a = k / 2 % 2, b = k % 2;
        const int y0 = a ? 1 + py : 0, y1 = a ? 2 : py, x0 = b ? 1 + px : 0, x1 = b ? 2 : px;
        float2 sum[4] = {};
#pragma unroll
        for (int y = y0; y <= y1; y++)
#pragma unroll
            for (int x = x0; x <= x1; x++) {
                const uint4 u = in[3 * y + x];
                const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 f = unpack(words[j]);
                    sum[j] = make_float2(sum[j].x + f.x, sum[j].y + f.y);
                }
            }
        v[k * units] = make_uint4(pack(sum[0].x, sum[0].y), pack(sum[1].x, sum[1].y),
                                  pack(sum[2].x, sum[2].y), pack(sum[3].x, sum[3].y));
    }
}
