// What the kernels of fused.cu share: 16-byte vectors of 8 bf16, sums over warps, barriers of a few
// warps.
#ifndef DITMOE_FUSED_CUH
#define DITMOE_FUSED_CUH

#define ACCELERATE_MEM void *
#include "devices/accelerate.h"

#define INLINE static __device__ __forceinline__

enum { WARP = 32, WARPS = 8, THREADS = WARP * WARPS, V = 8 }; // V: bf16 of a 16-byte vector

INLINE uint4 load16(const void *base, size_t vector)
{
    return static_cast<const uint4 *>(base)[vector];
}

INLINE void store16(void *base, size_t vector, uint4 value)
{
    static_cast<uint4 *>(base)[vector] = value;
}

INLINE void unpack(float (&out)[V], uint4 in)
{
    const unsigned words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Two floats rounded to nearest even, the first in the lower half.
INLINE unsigned pack2(float low, float high)
{
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

INLINE uint4 pack(const float (&in)[V])
{
    return make_uint4(pack2(in[0], in[1]), pack2(in[2], in[3]), pack2(in[4], in[5]),
                      pack2(in[6], in[7]));
}

// Two f32 that lie in memory in two halves, as runtime/tensor.h has it, from two words of each:
// `high` their nearest bf16, `low` the lower 16 bits. Where those are 0x8000 or more, bf16 was
// rounded away from zero, and the upper bits are one less.
INLINE float2 join2(unsigned high, unsigned low)
{
    const unsigned upper = high - (low >> 15 & 0x00010001u);
    return make_float2(__uint_as_float(__byte_perm(low, upper, 0x5410)),
                       __uint_as_float(__byte_perm(low, upper, 0x7632)));
}

INLINE unsigned low2(float first, float second)
{
    return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x5410);
}

INLINE unsigned high2(float first, float second)
{
    return __byte_perm(__float_as_uint(first) + 0x8000u, __float_as_uint(second) + 0x8000u, 0x7632);
}

// 8 floats at p, 16-byte aligned, of a parameter that nothing writes meanwhile
INLINE void load_parameters(float (&out)[V], const float *p)
{
    float4 low = __ldg(reinterpret_cast<const float4 *>(p));
    float4 high = __ldg(reinterpret_cast<const float4 *>(p) + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// Sums N values (a power of 2, at most 32) over the warp. Lane l returns the sum of v[l * N / 32]:
// each step halves the number of values a lane works on.
template <int N, int STEP = WARP / 2> INLINE float warp_sums(float (&v)[N])
{
    if constexpr (N == 1) {
#pragma unroll
        for (int step = STEP; step > 0; step /= 2)
            v[0] += __shfl_xor_sync(~0u, v[0], step);
        return v[0];
    } else {
        const bool upper = threadIdx.x & STEP;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float keep = upper ? v[i + N / 2] : v[i], give = upper ? v[i] : v[i + N / 2];
            half[i] = keep + __shfl_xor_sync(~0u, give, STEP);
        }
        return warp_sums<N / 2, STEP / 2>(half);
    }
}

// A barrier of the `threads` threads that share row group `group` (hardware barriers 1 to 15).
INLINE void group_barrier(int group, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}

// Where a thread works: blocks go through rows in groups of whole warps, a thread on the same 8
// columns of every row.
struct place {
    int lanes; // threads of a group
    int group, groups;
    int thread;     // within the group
    bool works;     // has columns
    int first, end; // rows of this block within its image, [first, end)
};

// `chunk` rows a block, the x grid goes through an image's rows
INLINE place find_place(int width, int rows, int chunk)
{
    place p;
    p.lanes = (width / V + WARP - 1) / WARP * WARP;
    p.group = threadIdx.x / p.lanes;
    p.groups = blockDim.x / p.lanes;
    p.thread = threadIdx.x % p.lanes;
    p.works = p.thread < width / V;
    p.first = blockIdx.x * chunk;
    p.end = min(p.first + chunk, rows);
    return p;
}

// Adds the sums of a block's groups, in their order, and stores the total: out[this thread's
// columns].
INLINE void store_group_sums(float *out, const place &p, const float (&sums)[V],
                             float (&shared)[THREADS][V])
{
    __syncthreads();
    if (p.group > 0)
#pragma unroll
        for (int i = 0; i < V; i++)
            shared[threadIdx.x][i] = sums[i];
    __syncthreads();
    float total[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        total[i] = sums[i];
        for (int g = 1; g < p.groups && p.group == 0; g++)
            total[i] += shared[g * p.lanes + p.thread][i];
    }
    if (p.group == 0 && p.works) { // no return: the warp must be whole at the next barrier
        float4 *to = reinterpret_cast<float4 *>(out + p.thread * V);
        to[0] = make_float4(total[0], total[1], total[2], total[3]);
        to[1] = make_float4(total[4], total[5], total[6], total[7]);
    }
}

enum { STRIPES = 16 };

// The sum over `parts` of partial[part][i] for the first warp of a block of STRIPES warps: each
// sums every STRIPES'th part, then they are added in their order. i is the same lane by lane in all
// warps.
INLINE float sum_parts(const float *partial, int count, int parts, int i)
{
    __shared__ float shared[STRIPES][WARP];
    const int lane = threadIdx.x % WARP, stripe = threadIdx.x / WARP;
    float sum = 0.0f;
    if (i < count)
#pragma unroll 8
        for (int p = stripe; p < parts; p += STRIPES)
            sum += partial[(size_t)p * count + i];
    shared[stripe][lane] = sum;
    __syncthreads();
    if (stripe == 0)
        for (int s = 1; s < STRIPES; s++)
            sum += shared[s][lane];
    return sum;
}

#endif
