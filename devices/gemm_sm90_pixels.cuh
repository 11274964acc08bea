// A product whose A is the pixels of images as a convolution's kernel meets them (struct
// gemm_sm90_pixels): which of them a stage has, and the way out to rows that may be those of a
// wider matrix or lie among others'.
#ifndef DITMOE_GEMM_SM90_PIXELS_CUH
#define DITMOE_GEMM_SM90_PIXELS_CUH

#include "devices/gemm_sm90_finish.cuh"

namespace
{

// ---- loading ------------------------------------------------------------------------------------

// Where a tile's first row meets x with the kernel's first tap; and the tap and channels of a
// stage.
struct walk {
    int x, y, image;
    int channel, kx, ky, tap;

    __device__ __forceinline__ void begin(const gemm_sm90 &p, const tile &t)
    {
        const gemm_sm90_pixels &g = p.pixels;
        const int row = t.row - t.group * (p.m / p.groups), line = row / g.width;
        const int stage = t.k / DEPTH;
        image = line / g.height;
        x = (row - line * g.width) * g.stride - g.left;
        y = (line - image * g.height) * g.stride - g.top;
        tap = stage / g.chunks;
        channel = (stage - tap * g.chunks) * DEPTH;
        ky = tap / g.kernel_w;
        kx = tap - ky * g.kernel_w;
    }
    __device__ __forceinline__ void next(const gemm_sm90_pixels &g)
    {
        channel += DEPTH;
        if (channel < g.chunks * DEPTH)
            return;
        channel = 0;
        tap++;
        if (++kx == g.kernel_w) {
            kx = 0;
            ky++;
        }
    }
};

template <class K, int WIDTH>
__device__ __forceinline__ void load_pixels(const shared &s, const tensor_map *a,
                                            const tensor_map *b, const gemm_sm90 &p)
{
    ring<K::STAGES> at;
    int group = 0;
    const schedule of = find_schedule<K>(s, p);
    const int items = of.whole + of.rest * of.parts;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const tile t = find_tile<K>(s, p, of, i, &group);
        walk w;
        w.begin(p, t);
        for (int k = 0; k < t.length; k += DEPTH, at.next(), w.next(p.pixels)) {
            const uint32_t to = s.stages + at.stage * K::STAGE, full = s.full + 8 * at.stage;
            barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
            barrier_expect(full, K::STAGE);
            load_pixel_box(to, a, full, w.channel, w.x, w.y, w.image, w.kx + t.group % 2,
                           w.ky + t.group / 2);
            load_box(to + ROWS * DEPTH * 2, b, full, w.channel, w.tap + t.group * p.pixels.taps,
                     t.column);
        }
    }
}

// ---- the way out --------------------------------------------------------------------------------

// Of row `row` of the product: the row of C.
__device__ __forceinline__ size_t pixel_row(const gemm_sm90 &p, int row)
{
    if (!p.pixels.doubled)
        return row;
    const int each = p.m / 4, group = row / each, at = row - group * each;
    const int line = at / p.pixels.width, x = at - line * p.pixels.width;
    return (size_t)(2 * line + group / 2) * 2 * p.pixels.width + 2 * x + group % 2;
}

// sum += C
template <int WIDTH>
__device__ __forceinline__ void add_pixels(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                           const place_in_c &at)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + 8 * i, columns = row < at.rows ? at.columns : 0;
        const bf16 *c = (const bf16 *)p.c + pixel_row(p, (int)at.row + row) * p.pixels.pitch +
                        at.column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            if (8 * j < columns) {
                const float2 v = unpack(*(const uint32_t *)(c + 8 * j));
                sum[4 * j + 2 * i] += v.x;
                sum[4 * j + 2 * i + 1] += v.y;
            }
    }
}

// 16 rows of COUNT columns, as far as `columns` go, to rows of C from column `from` of the tile.
template <int COUNT>
__device__ __forceinline__ void store_pixels(const uint32_t (&word)[COUNT / 8][2],
                                             const gemm_sm90 &p, const place_in_c &to, int from)
{
    const place<COUNT> at;
    hand_around<COUNT>(to.staging, word);
    uint4 v[at.COUNT];
#pragma unroll
    for (int i = 0; i < at.COUNT; i++)
        v[i] = load_shared(at.address(to.staging) + i * at.STEP * at.PITCH);
    const int rows = from + at.column < to.columns ? to.rows : 0;
    bf16 *c = (bf16 *)p.c + to.column + from + at.column;
#pragma unroll
    for (int i = 0; i < at.COUNT; i++) {
        const int row = at.row + i * at.STEP;
        if (row < rows)
            store_global(c + pixel_row(p, (int)to.row + row) * p.pixels.pitch, v[i]);
    }
}

// C = f(sum (+ bias) (+ C)), bf16, f: ReLU or nothing
template <int WIDTH>
__device__ __forceinline__ void finish_pixels(float (&sum)[WIDTH / 2], const gemm_sm90 &p,
                                              const place_in_c &at)
{
    constexpr int COUNT = WIDTH % 64 == 0 ? 64 : 32;
    if (p.bias)
        add_bias<WIDTH>(sum, p, at);
    if (p.accumulate)
        add_pixels<WIDTH>(sum, p, at);
    if (p.pixels.relu)
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++)
            sum[i] = sum[i] < 0.0f ? 0.0f : sum[i];
#pragma unroll
    for (int from = 0; from < WIDTH; from += COUNT) {
        uint32_t word[COUNT / 8][2];
        pack_all<COUNT>(word, &sum[from / 2]);
        store_pixels<COUNT>(word, p, at, from);
    }
}

} // namespace

#endif
