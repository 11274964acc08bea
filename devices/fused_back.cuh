// The backward of fused_norm.cuh, one pass over the rows, and the sums over an image's rows that it
// leaves in parts.
#include "devices/fused.cuh"

// What a thread holds of R rows.
template <int R> struct back_rows {
    uint4 y[R], dx[R], z[R];
    float g[R][V]; // the gradient of h
    float mean[R], rstd[R];
};

// g += what comes back from the experts and from the router
template <int R>
INLINE void back_branches(back_rows<R> &b, const norm_backward &a, const place &p, size_t at,
                          int row)
{
    const size_t vectors = a.width / V;
    if (a.drows)
        for (int k = 0; k < a.choices; k++) {
            uint4 in[R];
#pragma unroll
            for (int r = 0; r < R; r++)
                if (row + r < p.end) {
                    const int slot = static_cast<const int *>(a.slot)[(at + r) * a.choices + k];
                    in[r] = load16(a.drows, slot * vectors + p.thread);
                }
#pragma unroll
            for (int r = 0; r < R; r++)
                if (row + r < p.end) {
                    float part[V];
                    unpack(part, in[r]);
#pragma unroll
                    for (int i = 0; i < V; i++)
                        b.g[r][i] += part[i];
                }
        }
    if (a.dlogits)
        for (int e = 0; e < a.experts; e++) {
            float w[V];
            load_parameters(w, static_cast<const float *>(a.router_w) + (size_t)e * a.width +
                                   p.thread * V);
#pragma unroll
            for (int r = 0; r < R; r++)
                if (row + r < p.end) {
                    const float d = static_cast<const float *>(a.dlogits)[(at + r) * a.experts + e];
#pragma unroll
                    for (int i = 0; i < V; i++)
                        b.g[r][i] = fmaf(d, w[i], b.g[r][i]);
                }
        }
}

template <int R, bool BRANCHES>
INLINE void back_load(back_rows<R> &b, const norm_backward &a, const place &p, size_t image,
                      int row)
{
    const size_t vectors = a.width / V, at = image * a.tokens + row;
    uint4 dh[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        b.mean[r] = b.rstd[r] = 0.0f;
        b.y[r] = b.dx[r] = b.z[r] = dh[r] = make_uint4(0, 0, 0, 0);
        if (row + r < p.end && p.works) {
            const float2 stats = static_cast<const float2 *>(a.stats)[at + r];
            dh[r] = load16(a.dh, (at + r) * vectors + p.thread);
            b.y[r] = load16(a.y, (at + r) * vectors + p.thread);
            b.dx[r] = load16(a.dx, (at + r) * vectors + p.thread);
            if (a.dz)
                b.z[r] = load16(a.z, (at + r) * vectors + p.thread);
            b.mean[r] = stats.x;
            b.rstd[r] = stats.y;
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
        unpack(b.g[r], dh[r]);
    if (BRANCHES && p.works)
        back_branches(b, a, p, at, row);
}

// The means of p and p (y - mean)/std over each row, where p = g (1 + scale); sums of g and of
// g (y - mean)/std are added to this thread's.
template <int R>
INLINE void back_means(float (&mean)[R][2], const back_rows<R> &b, const place &p, int width,
                       const float (&by)[V], float (&shift)[V], float (&scale)[V],
                       float (&shared)[WARPS][2 * R])
{
    const int warps = p.lanes / WARP, lane = p.thread % WARP, share = WARP / (2 * R);
    float sums[2 * R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float y[V];
        unpack(y, b.y[r]);
        sums[2 * r] = sums[2 * r + 1] = 0.0f;
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float normal = (y[i] - b.mean[r]) * b.rstd[r], g = b.g[r][i] * (1.0f + by[i]);
            shift[i] += b.g[r][i];
            scale[i] = fmaf(b.g[r][i], normal, scale[i]);
            sums[2 * r] += g;
            sums[2 * r + 1] = fmaf(g, normal, sums[2 * r + 1]);
        }
    }
    const float sum = warp_sums(sums);
    if (lane % share == 0)
        shared[p.group * warps + p.thread / WARP][lane / share] = sum;
    group_barrier(p.group, p.lanes);
#pragma unroll
    for (int i = 0; i < 2 * R; i++) {
        float total = 0.0f;
        for (int w = 0; w < warps; w++)
            total += shared[p.group * warps + w][i];
        mean[i / 2][i % 2] = total / (float)width;
    }
}

// dx and dz of R rows; this thread's sums of dx z
template <int R>
INLINE void back_store(const back_rows<R> &b, const norm_backward &a, const place &p, size_t image,
                       int row, const float (&mean)[R][2], const float (&by)[V], uint4 packed_gate,
                       float (&gate_sums)[V])
{
    const size_t vectors = a.width / V, at = image * a.tokens + row;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float y[V], dx[V], z[V], gate[V];
        if (row + r >= p.end || !p.works)
            continue;
        unpack(y, b.y[r]);
        unpack(dx, b.dx[r]);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float normal = (y[i] - b.mean[r]) * b.rstd[r], g = b.g[r][i] * (1.0f + by[i]);
            dx[i] = fmaf(b.rstd[r], g - mean[r][0] - normal * mean[r][1], dx[i]);
        }
        store16(a.dx, (at + r) * vectors + p.thread, pack(dx));
        if (!a.dz)
            continue;
        unpack(z, b.z[r]);
        unpack(gate, packed_gate);
#pragma unroll
        for (int i = 0; i < V; i++) {
            gate_sums[i] = fmaf(dx[i], z[i], gate_sums[i]);
            gate[i] *= dx[i];
        }
        store16(a.dz, (at + r) * vectors + p.thread, pack(gate));
    }
}

template <int R, bool BRANCHES> INLINE void norm_backward_rows(const norm_backward &a, int chunk)
{
    __shared__ float moments[2][WARPS][2 * R];
    __shared__ float partial[THREADS][V];
    const place p = find_place(a.width, a.tokens, chunk);
    const size_t image = blockIdx.y, mod = image * a.mod_width / V + p.thread;
    float by[V], shift[V] = {}, scale[V] = {}, gate_sums[V] = {};
    uint4 gate = {}, packed = {};
    if (p.works) {
        packed = load16(a.mod, mod + a.scale / V);
        if (a.dz)
            gate = load16(a.mod, mod + a.gate / V);
    }
    unpack(by, packed);
    int turn = 0;
    for (int row = p.first + p.group * R; row < p.end; row += p.groups * R, turn ^= 1) {
        back_rows<R> b;
        float mean[R][2];
        back_load<R, BRANCHES>(b, a, p, image, row);
        back_means(mean, b, p, a.width, by, shift, scale, moments[turn]);
        back_store(b, a, p, image, row, mean, by, gate, gate_sums);
    }
    const size_t part = (image * gridDim.x + blockIdx.x) * 3;
    float *out = static_cast<float *>(a.partial) + part * a.width;
    store_group_sums(out, p, shift, partial);
    store_group_sums(out + a.width, p, scale, partial);
    if (a.dz)
        store_group_sums(out + 2 * a.width, p, gate_sums, partial);
}

#define NORM_BACKWARD(name, rows, branches)                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const norm_backward a, int chunk) \
    {                                                                                            \
        norm_backward_rows<rows, branches>(a, chunk);                                            \
    }

NORM_BACKWARD(norm_back_1, 1, false)
NORM_BACKWARD(norm_back_2, 2, false)
NORM_BACKWARD(norm_back_4, 4, false)
NORM_BACKWARD(norm_back_branches_1, 1, true)
NORM_BACKWARD(norm_back_branches_2, 2, true)
NORM_BACKWARD(norm_back_branches_4, 4, true)

// dmod's columns of each part (shift, scale, gate) from the chunks' partial sums. x: 4 columns a
// thread, y: parts, z: images
extern "C" __global__ void __launch_bounds__(64) norm_back_sums(const norm_backward a, int chunks)
{
    const int column = 4 * (blockIdx.x * blockDim.x + threadIdx.x), part = blockIdx.y;
    const size_t image = blockIdx.z;
    if (column >= a.width)
        return;
    const float *in =
        static_cast<const float *>(a.partial) + (image * chunks * 3 + part) * a.width + column;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int c = 0; c < chunks; c++, in += 3 * a.width) {
        const float4 v = *reinterpret_cast<const float4 *>(in);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int to = (part == 0 ? a.shift : part == 1 ? a.scale : a.gate) + column;
    static_cast<uint2 *>(a.dmod)[(image * a.mod_width + to) / 4] =
        make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
}
