// Pooling over windows of 3 x 3 (op_pool). A thread makes eight channels of OUTS pixels side by
// side, so that it reads most pixels once for all windows that they lie in.
#include "devices/fused.cuh"

template <int STRIDE, bool MAXIMUM> INLINE void pool_3x3(const pool_forward &a)
{
    enum { OUTS = 4, SEEN = (OUTS - 1) * STRIDE + 3 };
    const int units = a.channels / V, strips = (a.out_width + OUTS - 1) / OUTS;
    const int i = blockIdx.x * THREADS + threadIdx.x, place = i / units, unit = i - place * units;
    const int line = place / strips, image = line / a.out_height, oy = line - image * a.out_height;
    const int ox = (place - line * strips) * OUTS;
    if (image >= a.images)
        return;
    const int x0 = ox * STRIDE - a.padding, y0 = oy * STRIDE - a.padding;
    float value[OUTS][V];
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int c = 0; c < V; c++)
            value[o][c] = MAXIMUM ? -INFINITY : 0.0f;
#pragma unroll
    for (int ky = 0; ky < 3; ky++) {
        const int y = y0 + ky;
        const size_t row = ((size_t)image * a.height + y) * a.width;
        uint4 in[SEEN];
        if (y < 0 || y >= a.height)
            continue;
#pragma unroll
        for (int k = 0; k < SEEN; k++)
            if (x0 + k >= 0 && x0 + k < a.width)
                in[k] = load16(a.x, (row + x0 + k) * units + unit);
#pragma unroll
        for (int k = 0; k < SEEN; k++) {
            float v[V];
            if (x0 + k < 0 || x0 + k >= a.width)
                continue;
            unpack(v, in[k]);
#pragma unroll
            for (int o = 0; o < OUTS; o++)
                if (k >= o * STRIDE && k < o * STRIDE + 3)
#pragma unroll
                    for (int c = 0; c < V; c++)
                        value[o][c] = MAXIMUM ? fmaxf(value[o][c], v[c]) : value[o][c] + v[c];
        }
    }
    const int rows = min(y0 + 3, a.height) - max(y0, 0);
    const size_t to = (size_t)line * a.out_width + ox;
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
        const int from = x0 + o * STRIDE, columns = min(from + 3, a.width) - max(from, 0);
        if (ox + o >= a.out_width)
            continue;
        const float share = MAXIMUM ? 1.0f : 1.0f / (float)(rows * columns);
#pragma unroll
        for (int c = 0; c < V; c++)
            value[o][c] *= share;
        store16(a.y, ((to + o) * a.columns + a.column) / V + unit, pack(value[o]));
    }
}

#define POOL(name, stride, maximum)                       \
    extern "C" __global__ void __launch_bounds__(THREADS) \
        name(const __grid_constant__ pool_forward a)      \
    {                                                     \
        pool_3x3<stride, maximum>(a);                     \
    }
POOL(pool_mean_1, 1, false)
POOL(pool_mean_2, 2, false)
POOL(pool_maximum_1, 1, true)
POOL(pool_maximum_2, 2, true)
#undef POOL
