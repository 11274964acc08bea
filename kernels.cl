// Every device kernel, once. OpenCL C 1.2 that nvcc also reads (devices/cl_cuda.h).
//
// In this order: storage types and helpers; matrix products; embedding, elementwise, norms, gated
// residual, attention; mixture of experts, between ranks, diffusion, optimiser; convolutional
// networks, pooling. GPU forms come before CPU forms within each part. devices/kernels.def lists
// them with their arguments.
//
// Defined by the backend when it compiles this:
//   ACT_BF16   activations are stored as bf16 (upper half of an f32, in a ushort); else as f32
//   CPU_FORMS  the device is a CPU: also compile the `name_cpu` forms (one work-item a tile,
//              float16 vectors, no barriers). Guard them, and everything that computes with
//              vectors, with it.
// Rules that keep both compilers content: outside CPU_FORMS vectors only move memory (float4,
// uint4, uint2, float2 by their .x .y .z .w) and there are no (type)(a,b) literals; LOCAL for
// arrays shared by a work-group (declared at kernel scope); pointers to them are LOCAL_PTR; a*b+c
// that must be fused is fma(), never mad(); arithmetic in float; kernel arguments are __global
// pointers, int, uint and float. No kernel's name begins another's: Oclgrind would add up their
// local memory.

#ifndef LOCAL
#define LOCAL __local
#define LOCAL_PTR __local
#endif
#define KERNEL(gx, gy) __kernel __attribute__((reqd_work_group_size(gx, gy, 1)))
// Two groups should have room on a compute unit at a time (CUDA: 65536 registers).
#ifndef KERNEL_DENSE
#define KERNEL_DENSE(gx, gy) KERNEL(gx, gy)
#endif
#define GLOBAL __global

// A kernel's buffers are views: a pointer to the allocation and how many bytes on the view begins,
// since sub-buffers are not to be trusted with every driver (docs/devices.md). VIEW(p) declares
// the argument p, and a kernel's first line moves all of them to where they begin. Where memory is
// an address (CUDA) views are plain pointers. POINTER: the same list of arguments for a function.
#define POINTER(p) p
#ifndef VIEW
#define VIEW(p) p, ulong p##_offset
#define OFFSETS1(p) p = (GLOBAL void *)((GLOBAL uchar *)p + p##_offset);
#endif
#define OFFSETS2(p, q) OFFSETS1(p) OFFSETS1(q)
#define OFFSETS3(p, q, r) OFFSETS2(p, q) OFFSETS1(r)
#define OFFSETS4(p, q, r, s) OFFSETS3(p, q, r) OFFSETS1(s)
#define OFFSETS5(p, q, r, s, t) OFFSETS4(p, q, r, s) OFFSETS1(t)
#define OFFSETS6(p, q, r, s, t, u) OFFSETS5(p, q, r, s, t) OFFSETS1(u)
#define OFFSETS7(p, q, r, s, t, u, v) OFFSETS6(p, q, r, s, t, u) OFFSETS1(v)
#define OFFSETS8(p, q, r, s, t, u, v, w) OFFSETS7(p, q, r, s, t, u, v) OFFSETS1(w)

// ---- storage types ------------------------------------------------------------------------------

inline float bf16_to_float(ushort h)
{
    return as_float((uint)h << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
inline ushort float_to_bf16(float f)
{
    uint u = as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (ushort)((u >> 16) | 0x40u);
    return (ushort)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Four neighbours at once, at a multiple of four.
inline void load4(float v[4], const GLOBAL void *p, size_t i, const int bf16)
{
    if (bf16) {
        const uint2 q = *(const GLOBAL uint2 *)((const GLOBAL ushort *)p + i);
        v[0] = as_float(q.x << 16);
        v[1] = as_float(q.x & 0xffff0000u);
        v[2] = as_float(q.y << 16);
        v[3] = as_float(q.y & 0xffff0000u);
    } else {
        const float4 q = *(const GLOBAL float4 *)((const GLOBAL float *)p + i);
        v[0] = q.x;
        v[1] = q.y;
        v[2] = q.z;
        v[3] = q.w;
    }
}

inline void store4(GLOBAL void *p, size_t i, const float v[4], const int bf16)
{
    if (bf16) {
        uint2 q;
        q.x = (uint)float_to_bf16(v[0]) | (uint)float_to_bf16(v[1]) << 16;
        q.y = (uint)float_to_bf16(v[2]) | (uint)float_to_bf16(v[3]) << 16;
        *(GLOBAL uint2 *)((GLOBAL ushort *)p + i) = q;
    } else {
        float4 q;
        q.x = v[0];
        q.y = v[1];
        q.z = v[2];
        q.w = v[3];
        *(GLOBAL float4 *)((GLOBAL float *)p + i) = q;
    }
}

#ifdef ACT_BF16
#define ACT_IS_BF16 1
typedef ushort act;
inline float act_load(const GLOBAL act *p, size_t i)
{
    return bf16_to_float(p[i]);
}
inline void act_store(GLOBAL act *p, size_t i, float v)
{
    p[i] = float_to_bf16(v);
}
#else
#define ACT_IS_BF16 0
typedef float act;
inline float act_load(const GLOBAL act *p, size_t i)
{
    return p[i];
}
inline void act_store(GLOBAL act *p, size_t i, float v)
{
    p[i] = v;
}
#endif

#ifdef CPU_FORMS
inline float16 bf16_to_float16(ushort16 h)
{
    return as_float16(convert_uint16(h) << 16);
}
inline ushort16 float16_to_bf16(float16 f)
{
    uint16 u = as_uint16(f);
    uint16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint16 quiet = (u >> 16) | 0x40u;
    return convert_ushort16(select(rounded, quiet, (u & 0x7fffffffu) > 0x7f800000u));
}
// PoCL's vstore16 of ushort16 writes one element at a time (measured: 4 times slower than this)
typedef ushort16 ushort16_unaligned __attribute__((aligned(2)));
#ifdef ACT_BF16
inline float16 act_load16(const GLOBAL act *p)
{
    return bf16_to_float16(vload16(0, p));
}
inline void act_store16(GLOBAL act *p, float16 v)
{
    *(GLOBAL ushort16_unaligned *)p = float16_to_bf16(v);
}
#else
inline float16 act_load16(const GLOBAL act *p)
{
    return vload16(0, p);
}
inline void act_store16(GLOBAL act *p, float16 v)
{
    vstore16(v, 0, p);
}
#endif

// ---- memory -------------------------------------------------------------------------------------

// p[i] = pattern for i in [first, first+count), a chunk a work-item. Drivers of CPU devices fill
// with one thread.
KERNEL(1, 1)
void fill_cpu(GLOBAL uint *VIEW(p), uint first, uint count, uint pattern, uint chunk)
{
    OFFSETS1(p)
    size_t i = get_group_id(0) * (size_t)chunk, to = min(i + chunk, (size_t)count);
    p += first;
    for (; i + 16 <= to; i += 16)
        vstore16((uint16)pattern, 0, p + i);
    for (; i < to; i++)
        p[i] = pattern;
}

#define INLINE inline __attribute__((always_inline))

// e^x to 2 ulp: 2^n * 2^f with a polynomial for f in [-1/2, 1/2]. Saturates at e^-87 and e^88; NaN
// stays NaN.
INLINE float16 exp16(float16 x)
{
    x = x < -87.0f ? (float16)(-87.0f) : x;
    x = x > 88.0f ? (float16)(88.0f) : x;
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    float16 shifted = fma(x, (float16)(1.44269504f), (float16)(magic));
    float16 n = shifted - magic;
    float16 r = fma(n, (float16)(-0.693359375f), x);
    r = fma(n, (float16)(2.12194440e-4f), r);
    float16 p = fma((float16)(1.9875691500e-4f), r, (float16)(1.3981999507e-3f));
    p = fma(p, r, (float16)(8.3334519073e-3f));
    p = fma(p, r, (float16)(4.1665795894e-2f));
    p = fma(p, r, (float16)(1.6666665459e-1f));
    p = fma(p, r, (float16)(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    int16 exponent = as_int16(shifted) - 0x4b400000 + 127;
    return p * as_float16(exponent << 23);
}

INLINE float16 sigmoid16(float16 x)
{
    return 1.0f / (1.0f + exp16(-x));
}
#endif // CPU_FORMS

inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exp(-x));
}

// ---- matrix products ----------------------------------------------------------------------------
//
// Every form of struct gemm (devices/device.h): C[m,n] (+)= op(A) op(B) (+ bias), plain or ragged.
// `flags` says the storage of the operands and whether to add to C (devices/opencl_gemm.c sets
// them):
#define GEMM_ACCUMULATE 1
#define GEMM_A_BF16 2
#define GEMM_B_BF16 4
#define GEMM_C_BF16 8
#define GEMM_SWIGLU_FORWARD 128 // SwiGLU within the product (devices/device.h)
#define GEMM_SWIGLU_BACKWARD 256

inline float gemm_load(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? bf16_to_float(((const GLOBAL ushort *)p)[i]) : ((const GLOBAL float *)p)[i];
}

inline void gemm_store(GLOBAL void *c, size_t i, float v, int flags)
{
    if (flags & GEMM_ACCUMULATE)
        v += gemm_load(c, i, flags & GEMM_C_BF16);
    if (flags & GEMM_C_BF16)
        ((GLOBAL ushort *)c)[i] = float_to_bf16(v);
    else
        ((GLOBAL float *)c)[i] = v;
}

// The rows [return, *end) of block `block`, when the rows of every group are cut into blocks of
// `size` rows; *group is set. Past the last block the range is empty. Without offsets: one group.
inline int gemm_block(const GLOBAL int *offsets, int groups, int block, int size, int m, int *group,
                      int *end)
{
    *group = 0;
    if (!offsets) {
        int first = block * size;
        *end = first + size < m ? first + size : m;
        return first;
    }
    for (int g = 0; g < groups; g++) {
        int first = offsets[g] + block * size, last = offsets[g + 1];
        if (first < last) {
            *group = g;
            *end = first + size < last ? first + size : last;
            return first;
        }
        block -= (last - offsets[g] + size - 1) / size;
    }
    *end = 0;
    return 0;
}

// ---- matrix products: the GPU form
//
// A work-group makes a tile of C: 128x128 by 128 items or, where there are too few of those to fill
// the device, 64x64 by 64. An item makes 16 or 8 rows and 8 columns of it, in fours: rows y.., y +
// 32.., and columns x.. in each half of the tile. Local memory is then read four words at a time,
// and 128 products cost six such reads: on NVIDIA's GPUs, where a read takes as long as 16
// products, 8x8 are bound by them. SwiGLU needs no more: the first half of its tiles are columns of
// g, the second half those of u that belong to them.
//
// K goes in steps of 8. An item brings twice four elements of A and of B from memory while it works
// on the step before, and puts them into the other of two local tiles [k][rows]: one barrier a
// step. Every sum runs over k in order, so results do not depend on the tile.
enum { GEMM_LARGE = 128, GEMM_SMALL = 64, GEMM_STEP = 8, GEMM_ROWS_MAX = 16 };
#define GEMM_ITEM_ROWS(tile) ((tile) / 8)
#define GEMM_TILE_PITCH(tile) ((tile) + 4)
#define GEMM_TILE_SIZE(tile) (GEMM_STEP * GEMM_TILE_PITCH(tile)) // floats

// Operands of other types than the activations' device are not brought 4 at a time.
#ifdef ACT_BF16
#define GEMM_QUADS(a_bf16, b_bf16) 1
#define GEMM_QUAD_BF16(bf16) (bf16)
#else
#define GEMM_QUADS(a_bf16, b_bf16) (!(a_bf16) && !(b_bf16))
#define GEMM_QUAD_BF16(bf16) 0
#endif

// One operand of a tile, stored in rows of `ld` elements: along k, or (not along_k) a row for each
// k.
struct gemm_side {
    const GLOBAL void *p; // the tile's first element of the present step
    int bf16, along_k, ld;
    int count;  // rows of the tile (columns, if it is B) that there are
    int halves; // SwiGLU: count is for each half of the tile,
    int jump;   // and so many rows of the operand lie between the halves
};

inline const GLOBAL void *gemm_at(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? (const GLOBAL void *)((const GLOBAL ushort *)p + i)
                : (const GLOBAL void *)((const GLOBAL float *)p + i);
}

// Which elements of a step an item brings: four, `which` = 0 or 1, from row *r and k *k on. Where
// they lie along k, 32 neighbours take 16 rows at 2 places of k, which are 32 banks when they are
// put down.
inline void gemm_quad(const int tile, const int along_k, int item, const int which, int *r, int *k)
{
    *r = along_k ? item / 2 + which * (tile / 2) : item % (tile / 4) * 4;
    *k = along_k ? item % 2 * 4 : item / (tile / 4) + which * 4;
}

// Row r of the tile as a row of the operand, counted from side->p; *there: is there such a row?
inline int gemm_row(const struct gemm_side *side, const int tile, int r, int *there)
{
    int second = side->halves && r >= tile / 2;
    *there = (second ? r - tile / 2 : r) < side->count;
    return second ? r + side->jump : r;
}

// The distance of an item's elements from side->p. A row that is not there is the last one again:
// what comes of it is not written.
inline uint gemm_quad_offset(const struct gemm_side *side, const int tile, int item,
                             const int which)
{
    int r, k, there;
    gemm_quad(tile, side->along_k, item, which, &r, &k);
    if (!side->along_k)
        return (uint)k * (uint)side->ld + (uint)min(r, side->count - 4);
    int row = gemm_row(side, tile, r, &there);
    if (!there)
        row = side->count - 1; // of the first half
    return (uint)row * (uint)side->ld + (uint)k;
}

inline void gemm_quad_offsets(uint at[2], const struct gemm_side *side, const int tile, int item)
{
    at[0] = gemm_quad_offset(side, tile, item, 0);
    at[1] = gemm_quad_offset(side, tile, item, 1);
}

// Four neighbours as they are stored: 4 words of f32, 2 of bf16.
inline void gemm_bring(uint quad[4], const GLOBAL void *p, size_t i, int bf16)
{
    if (bf16) {
        const uint2 v = *(const GLOBAL uint2 *)((const GLOBAL ushort *)p + i);
        quad[0] = v.x;
        quad[1] = v.y;
    } else {
        const uint4 v = *(const GLOBAL uint4 *)((const GLOBAL uint *)p + i);
        quad[0] = v.x;
        quad[1] = v.y;
        quad[2] = v.z;
        quad[3] = v.w;
    }
}

// An item's elements of a step.
inline void gemm_bring_step(uint quad[2][4], const struct gemm_side *side, const uint at[2],
                            int bf16)
{
    gemm_bring(quad[0], side->p, at[0], bf16);
    gemm_bring(quad[1], side->p, at[1], bf16);
}

inline void gemm_quad_floats(float v[4], const uint quad[4], int bf16)
{
    v[0] = as_float(bf16 ? quad[0] << 16 : quad[0]);
    v[1] = as_float(bf16 ? quad[0] & 0xffff0000u : quad[1]);
    v[2] = as_float(bf16 ? quad[1] << 16 : quad[2]);
    v[3] = as_float(bf16 ? quad[1] & 0xffff0000u : quad[3]);
}

inline void gemm_lay(LOCAL_PTR float *p, const float v[4])
{
    float4 q;
    q.x = v[0];
    q.y = v[1];
    q.z = v[2];
    q.w = v[3];
    *(LOCAL_PTR float4 *)p = q;
}

inline void gemm_take(float v[4], const LOCAL_PTR float *p)
{
    const float4 q = *(const LOCAL_PTR float4 *)p;
    v[0] = q.x;
    v[1] = q.y;
    v[2] = q.z;
    v[3] = q.w;
}

inline void gemm_put(LOCAL_PTR float *to, const int tile, const uint quad[4], int bf16,
                     const int along_k, int item, const int which)
{
    float v[4];
    int r, k;
    gemm_quad(tile, along_k, item, which, &r, &k);
    gemm_quad_floats(v, quad, bf16);
    to += k * GEMM_TILE_PITCH(tile) + r;
    if (along_k) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            to[j * GEMM_TILE_PITCH(tile)] = v[j];
    } else {
        gemm_lay(to, v);
    }
}

inline void gemm_put_step(LOCAL_PTR float *to, const int tile, uint quad[2][4], int bf16,
                          const int along_k, int item)
{
    gemm_put(to, tile, quad[0], bf16, along_k, item, 0);
    gemm_put(to, tile, quad[1], bf16, along_k, item, 1);
}

// The same element by element, for the last `left` of k and for odd matrices: zeros where there is
// nothing.
inline void gemm_put_singly(LOCAL_PTR float *to, const int tile, const struct gemm_side *side,
                            int left, int item)
{
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        int r, k, there;
        gemm_quad(tile, side->along_k, item, i / 4, &r, &k);
        r += side->along_k ? 0 : i % 4;
        k += side->along_k ? i % 4 : 0;
        int row = gemm_row(side, tile, r, &there);
        size_t at = side->along_k ? (size_t)row * side->ld + k : (size_t)k * side->ld + row;
        to[k * GEMM_TILE_PITCH(tile) + r] =
            there && k < left ? gemm_load(side->p, at, side->bf16) : 0.0f;
    }
}

inline void gemm_advance(struct gemm_side *side)
{
    size_t step = side->along_k ? (size_t)GEMM_STEP : (size_t)GEMM_STEP * side->ld;
    side->p = gemm_at(side->p, step, side->bf16);
}

// acc += the products at one k; ta, tb: the item's first row and column there.
inline void gemm_multiply_add(float acc[GEMM_ROWS_MAX][8], const int tile,
                              const LOCAL_PTR float *ta, const LOCAL_PTR float *tb)
{
    float a[GEMM_ROWS_MAX], b[8];
#pragma unroll
    for (int i = 0; i < GEMM_ROWS_MAX; i += 4)
        if (i < GEMM_ITEM_ROWS(tile))
            gemm_take(a + i, ta + i * 8);
    gemm_take(b, tb);
    gemm_take(b + 4, tb + tile / 2);
#pragma unroll
    for (int i = 0; i < GEMM_ROWS_MAX; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i < GEMM_ITEM_ROWS(tile))
                acc[i][j] = fma(a[i], b[j], acc[i][j]);
}

// An item's first row and column.
inline void gemm_place(const int tile, int *y, int *x)
{
    int item = (int)get_local_id(0);
    *x = item % (tile / 8) * 4;
    *y = item / (tile / 8) * 4;
}

inline void gemm_zero(float acc[GEMM_ROWS_MAX][8], const int tile)
{
#pragma unroll
    for (int i = 0; i < GEMM_ROWS_MAX; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i < GEMM_ITEM_ROWS(tile))
                acc[i][j] = 0.0f;
}

// acc = the sums over `left` of k of the item whose first row and column are y and x. ta, tb:
// local, 2 * GEMM_TILE_SIZE each. quads: the operands can be brought 4 elements at a time.
inline void gemm_sums(float acc[GEMM_ROWS_MAX][8], const int tile, LOCAL_PTR float *ta,
                      LOCAL_PTR float *tb, int y, int x, struct gemm_side *a, struct gemm_side *b,
                      int left, int quads)
{
    const int pitch = GEMM_TILE_PITCH(tile), size = GEMM_TILE_SIZE(tile);
    int item = (int)get_local_id(0);
    gemm_zero(acc, tile);
    if (quads && left >= GEMM_STEP) {
        const int a_bf16 = GEMM_QUAD_BF16(a->bf16), b_bf16 = GEMM_QUAD_BF16(b->bf16);
        uint at_a[2], at_b[2], quad_a[2][4], quad_b[2][4];
        int now = 0;
        gemm_quad_offsets(at_a, a, tile, item);
        gemm_quad_offsets(at_b, b, tile, item);
        gemm_bring_step(quad_a, a, at_a, a_bf16);
        gemm_bring_step(quad_b, b, at_b, b_bf16);
        for (;;) {
            gemm_put_step(ta + now, tile, quad_a, a_bf16, a->along_k, item);
            gemm_put_step(tb + now, tile, quad_b, b_bf16, b->along_k, item);
            barrier(CLK_LOCAL_MEM_FENCE);
            gemm_advance(a);
            gemm_advance(b);
            left -= GEMM_STEP;
            if (left >= GEMM_STEP) {
                gemm_bring_step(quad_a, a, at_a, a_bf16);
                gemm_bring_step(quad_b, b, at_b, b_bf16);
            }
#pragma unroll
            for (int s = 0; s < GEMM_STEP; s++)
                gemm_multiply_add(acc, tile, ta + now + s * pitch + y, tb + now + s * pitch + x);
            if (left < GEMM_STEP)
                break;
            now = size - now;
        }
    }
    for (; left > 0; left -= GEMM_STEP) {
        barrier(CLK_LOCAL_MEM_FENCE);
        gemm_put_singly(ta, tile, a, left, item);
        gemm_put_singly(tb, tile, b, left, item);
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll 1
        for (int s = 0; s < GEMM_STEP; s++)
            gemm_multiply_add(acc, tile, ta + s * pitch + y, tb + s * pitch + x);
        gemm_advance(a);
        gemm_advance(b);
    }
}

// Four neighbours of a result, of which `count` are there; quads: they may be moved at once.
inline void gemm_get(float v[4], const GLOBAL void *p, size_t i, int count, int quads, int bf16)
{
    if (quads && count >= 4) {
        load4(v, p, i, bf16);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] = j < count ? gemm_load(p, i + j, bf16) : 0.0f;
}

inline void gemm_set(GLOBAL void *p, size_t i, const float v[4], int count, int quads, int bf16)
{
    if (quads && count >= 4) {
        store4(p, i, v, bf16);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < count)
            gemm_store(p, i + j, v[j], bf16 ? GEMM_C_BF16 : 0);
}

inline void gemm_add4(float v[4], const float more[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] += more[j];
}

// Where the results go: C[rows, n], or what SwiGLU makes of it (devices/device.h).
struct gemm_result {
    GLOBAL void *c, *h;
    const GLOBAL float *bias;
    int n, flags;
};

// `count` sums of columns col.. of a row.
inline void gemm_finish_plain(float v[4], const struct gemm_result *to, size_t row, int col,
                              int count, int quads)
{
    int bf16 = to->flags & GEMM_C_BF16;
    size_t at = row * to->n + col;
    float more[4];
    if (to->bias) {
        gemm_get(more, to->bias, col, count, quads, 0);
        gemm_add4(v, more);
    }
    if (to->flags & GEMM_ACCUMULATE) {
        gemm_get(more, to->c, at, count, quads, bf16);
        gemm_add4(v, more);
    }
    gemm_set(to->c, at, v, count, quads, bf16);
}

// SWIGLU_FORWARD: columns f.. of g and u.
inline void gemm_finish_forward(const float g[4], const float u[4], const struct gemm_result *to,
                                size_t row, int f, int count, int quads)
{
    int bf16 = to->flags & GEMM_C_BF16, F = to->n / 2;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] = g[j] * sigmoid(g[j]) * u[j];
    gemm_set(to->h, row * F + f, v, count, quads, bf16);
    if (to->c) {
        gemm_set(to->c, row * to->n + f, g, count, quads, bf16);
        gemm_set(to->c, row * to->n + F + f, u, count, quads, bf16);
    }
}

// SWIGLU_BACKWARD: columns f.. of dh.
inline void gemm_finish_backward(const float dh[4], const struct gemm_result *to, size_t row, int f,
                                 int count, int quads)
{
    int bf16 = to->flags & GEMM_C_BF16, F = to->n;
    size_t at = row * 2 * F + f;
    float g[4], u[4], h[4];
    gemm_get(g, to->c, at, count, quads, bf16);
    gemm_get(u, to->c, at + F, count, quads, bf16);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float s = sigmoid(g[j]), ds = dh[j] * s;
        h[j] = g[j] * s * u[j];
        u[j] = ds * u[j] * fma(g[j], 1.0f - s, 1.0f);
        g[j] = ds * g[j];
    }
    gemm_set(to->c, at, u, count, quads, bf16);
    gemm_set(to->c, at + F, g, count, quads, bf16);
    if (to->h)
        gemm_set(to->h, row * F + f, h, count, quads, bf16);
}

// Writes the tile of rows [row0, end) and columns from col0 on (SWIGLU_FORWARD: of g and of u). The
// item's sums go through `room` in local memory, four rows at a time: 32 * tile floats in which it
// has its own places. So the code for a row is there once, not for each register.
inline void gemm_finish(float acc[GEMM_ROWS_MAX][8], const int tile, LOCAL_PTR float *room, int y,
                        int x, const struct gemm_result *to, int row0, int end, int col0)
{
    int forward = to->flags & GEMM_SWIGLU_FORWARD, columns = forward ? to->n / 2 : to->n;
    int quads = columns % 4 == 0, first = col0 + x, second = first + tile / 2;
    room += get_local_id(0) * 4;
    barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll 1
    for (int i = 0; i < GEMM_ITEM_ROWS(tile); i++) {
        float v[8];
#pragma unroll
        for (int from = 0; from < GEMM_ROWS_MAX; from += 4)
            if (i == from && from < GEMM_ITEM_ROWS(tile))
#pragma unroll
                for (int j = 0; j < 8; j++)
                    gemm_lay(room + j * 4 * tile, acc[from + j / 2] + j % 2 * 4);
        gemm_take(v, room + i % 4 * 8 * tile);
        gemm_take(v + 4, room + (i % 4 * 8 + 4) * tile);
        int row = row0 + y + i % 4 + i / 4 * 32;
        if (row >= end)
            continue;
        if (forward) {
            gemm_finish_forward(v, v + 4, to, row, first, columns - first, quads);
        } else if (to->flags & GEMM_SWIGLU_BACKWARD) {
            gemm_finish_backward(v, to, row, first, columns - first, quads);
            gemm_finish_backward(v + 4, to, row, second, columns - second, quads);
        } else {
            gemm_finish_plain(v, to, row, first, columns - first, quads);
            gemm_finish_plain(v + 4, to, row, second, columns - second, quads);
        }
    }
}

#define GEMM_ARGUMENTS(P)                                                                     \
    const GLOBAL float *P(a), const GLOBAL float *P(b), GLOBAL float *P(c),                   \
        const GLOBAL float *P(bias), GLOBAL float *P(h), const GLOBAL int *P(offsets),        \
        int groups, int m, int n, int k, int flags
#define GEMM_PASSED a, b, c, bias, h, offsets, groups, m, n, k, flags

// C = A B: A [m,k], B [groups][n,k] (along_k) or [k,n]; ragged over the rows of A where there are
// offsets. Groups: (columns / tile, row blocks: m / tile + number of groups); SWIGLU_FORWARD: a
// tile has half as many columns of g.
inline void gemm_rows(LOCAL_PTR float *tiles, const int tile, const int along_k,
                      GEMM_ARGUMENTS(POINTER))
{
    int group, end, row0 = gemm_block(offsets, groups, (int)get_group_id(1), tile, m, &group, &end);
    int forward = along_k && flags & GEMM_SWIGLU_FORWARD, columns = forward ? n / 2 : n;
    int col0 = (int)get_group_id(0) * (forward ? tile / 2 : tile);
    int a_bf16 = flags & GEMM_A_BF16, b_bf16 = flags & GEMM_B_BF16;
    if (row0 >= end)
        return;
    struct gemm_side sa, sb;
    struct gemm_result to;
    float acc[GEMM_ROWS_MAX][8];
    int y, x;
    gemm_place(tile, &y, &x);
    sa.p = gemm_at(a, (size_t)row0 * k, a_bf16);
    sa.bf16 = a_bf16;
    sa.along_k = 1;
    sa.ld = k;
    sa.count = end - row0;
    sa.halves = 0;
    sb.p = gemm_at(b, (size_t)group * n * k + (along_k ? (size_t)col0 * k : (size_t)col0), b_bf16);
    sb.bf16 = b_bf16;
    sb.along_k = along_k;
    sb.ld = along_k ? k : n;
    sb.count = columns - col0;
    sb.halves = forward;
    sb.jump = columns - tile / 2;
    gemm_sums(acc, tile, tiles, tiles + 2 * GEMM_TILE_SIZE(tile), y, x, &sa, &sb, k,
              k % 4 == 0 && sb.ld % 4 == 0 && GEMM_QUADS(a_bf16, b_bf16));
    to.c = c;
    to.h = h;
    to.bias = bias;
    to.n = n;
    to.flags = flags;
    gemm_finish(acc, tile, tiles, y, x, &to, row0, end, col0);
}

// C[group] = A^T B: A [k,m], B [k,n], summed over the group's rows (all k rows without offsets).
// Groups: (columns / tile, rows / tile, number of groups).
inline void gemm_columns(LOCAL_PTR float *tiles, const int tile, GEMM_ARGUMENTS(POINTER))
{
    int group = (int)get_group_id(2), a_bf16 = flags & GEMM_A_BF16, b_bf16 = flags & GEMM_B_BF16;
    int k0 = offsets ? offsets[group] : 0, k_end = offsets ? offsets[group + 1] : k;
    int row0 = (int)get_group_id(1) * tile, col0 = (int)get_group_id(0) * tile;
    struct gemm_side sa, sb;
    struct gemm_result to;
    float acc[GEMM_ROWS_MAX][8];
    int y, x;
    gemm_place(tile, &y, &x);
    sa.p = gemm_at(a, (size_t)k0 * m + row0, a_bf16);
    sa.bf16 = a_bf16;
    sa.along_k = 0;
    sa.ld = m;
    sa.count = m - row0;
    sa.halves = 0;
    sb.p = gemm_at(b, (size_t)k0 * n + col0, b_bf16);
    sb.bf16 = b_bf16;
    sb.along_k = 0;
    sb.ld = n;
    sb.count = n - col0;
    sb.halves = 0;
    gemm_sums(acc, tile, tiles, tiles + 2 * GEMM_TILE_SIZE(tile), y, x, &sa, &sb, k_end - k0,
              m % 4 == 0 && n % 4 == 0 && GEMM_QUADS(a_bf16, b_bf16));
    size_t skip = (size_t)group * m * n;
    to.c = flags & GEMM_C_BF16 ? (GLOBAL void *)((GLOBAL ushort *)c + skip)
                               : (GLOBAL void *)(c + skip);
    to.h = 0;
    to.bias = bias;
    to.n = n;
    to.flags = flags;
    gemm_finish(acc, tile, tiles, y, x, &to, row0, m, col0);
}

// Two tiles of A and two of B, or the room of gemm_finish.
#define GEMM_TILES(tile) LOCAL float4 tiles[GEMM_TILE_SIZE(tile)]

KERNEL_DENSE(128, 1)
void gemm_nt(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_LARGE);
    gemm_rows((LOCAL_PTR float *)tiles, GEMM_LARGE, 1, GEMM_PASSED);
}

KERNEL_DENSE(128, 1)
void gemm_nn(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_LARGE);
    gemm_rows((LOCAL_PTR float *)tiles, GEMM_LARGE, 0, GEMM_PASSED);
}

KERNEL_DENSE(128, 1)
void gemm_tn(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_LARGE);
    gemm_columns((LOCAL_PTR float *)tiles, GEMM_LARGE, GEMM_PASSED);
}

KERNEL(64, 1)
void gemm_small_nt(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_SMALL);
    gemm_rows((LOCAL_PTR float *)tiles, GEMM_SMALL, 1, GEMM_PASSED);
}

KERNEL(64, 1)
void gemm_small_nn(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_SMALL);
    gemm_rows((LOCAL_PTR float *)tiles, GEMM_SMALL, 0, GEMM_PASSED);
}

KERNEL(64, 1)
void gemm_small_tn(GEMM_ARGUMENTS(VIEW))
{
    OFFSETS6(a, b, c, bias, h, offsets)
    GEMM_TILES(GEMM_SMALL);
    gemm_columns((LOCAL_PTR float *)tiles, GEMM_SMALL, GEMM_PASSED);
}

// ---- matrix products: column sums (the gradient of a bias)
//
// part[chunk, n] = sum of rows [chunk*rows, (chunk+1)*rows) of a[m,n]; then column_sums adds up the
// parts in a fixed order. Groups: (n / 64, chunks); (n / 64).
KERNEL(64, 1)
void column_sums_part(GLOBAL float *VIEW(part), const GLOBAL float *VIEW(a), int bf16, int m, int n,
                      int rows)
{
    OFFSETS2(part, a)
    int col = (int)get_global_id(0), chunk = (int)get_group_id(1);
    if (col >= n)
        return;
    int first = chunk * rows, last = first + rows < m ? first + rows : m;
    float sum = 0.0f;
    for (int i = first; i < last; i++)
        sum += gemm_load(a, (size_t)i * n + col, bf16);
    part[(size_t)chunk * n + col] = sum;
}

#ifdef CPU_FORMS
// Groups: (1, chunks).
KERNEL(1, 1)
void column_sums_part_cpu(GLOBAL float *VIEW(part), const GLOBAL float *VIEW(a), int bf16, int m,
                          int n, int rows)
{
    OFFSETS2(part, a)
    int chunk = (int)get_group_id(1), col = 0;
    int first = chunk * rows, last = first + rows < m ? first + rows : m;
    part += (size_t)chunk * n;
    for (; col + 64 <= n; col += 64) {
        float16 sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int i = first; i < last; i++) {
            size_t at = (size_t)i * n + col;
            if (bf16) {
                const GLOBAL ushort *p = (const GLOBAL ushort *)a + at;
                sum0 += bf16_to_float16(vload16(0, p));
                sum1 += bf16_to_float16(vload16(1, p));
                sum2 += bf16_to_float16(vload16(2, p));
                sum3 += bf16_to_float16(vload16(3, p));
            } else {
                sum0 += vload16(0, a + at);
                sum1 += vload16(1, a + at);
                sum2 += vload16(2, a + at);
                sum3 += vload16(3, a + at);
            }
        }
        vstore16(sum0, 0, part + col);
        vstore16(sum1, 1, part + col);
        vstore16(sum2, 2, part + col);
        vstore16(sum3, 3, part + col);
    }
    for (; col < n; col++) {
        float sum = 0.0f;
        for (int i = first; i < last; i++)
            sum += gemm_load(a, (size_t)i * n + col, bf16);
        part[col] = sum;
    }
}
#endif

// out[n] += sum over chunks of part[chunks, n]
KERNEL(64, 1)
void column_sums(GLOBAL float *VIEW(out), const GLOBAL float *VIEW(part), int chunks, int n)
{
    OFFSETS2(out, part)
    int col = (int)get_global_id(0);
    if (col >= n)
        return;
    float sum = 0.0f;
    for (int i = 0; i < chunks; i++)
        sum += part[(size_t)i * n + col];
    out[col] += sum;
}

#ifdef CPU_FORMS
// ---- matrix products: the CPU form
//
// One work-item is one work-group. B is packed into panels of GEMM_NR columns, [panel][k][GEMM_NR]
// f32, so that a step of k is two vector loads; a tile of GEMM_MR rows by one panel lives in
// registers (12 x 2 of the 32 AVX-512 registers; 6 x 2 of the 16 AVX2 ones). A work-item copies
// each strip of GEMM_MR rows of A, GEMM_DEPTH of k at a time, into private memory, which stays in
// the first-level cache, and takes it through all panels of its block of C.
#ifndef VECTOR_WIDTH
#define VECTOR_WIDTH 16
#endif
#if VECTOR_WIDTH >= 16
typedef float16 vec;
#define VLOAD(p) vload16(0, p)
#define VSTORE(v, p) vstore16(v, 0, p)
enum { GEMM_VW = 16, GEMM_MR = 12, GEMM_NR = 32 };
inline vec gemm_bf16_vec(const GLOBAL ushort *p)
{
    return as_float16(convert_uint16(vload16(0, p)) << 16);
}
inline void gemm_vec_bf16(vec v, GLOBAL ushort *p)
{
    vstore16(float16_to_bf16(v), 0, p);
}
#else
typedef float8 vec;
#define VLOAD(p) vload8(0, p)
#define VSTORE(v, p) vstore8(v, 0, p)
enum { GEMM_VW = 8, GEMM_MR = 6, GEMM_NR = 16 };
inline vec gemm_bf16_vec(const GLOBAL ushort *p)
{
    return as_float8(convert_uint8(vload8(0, p)) << 16);
}
inline void gemm_vec_bf16(vec v, GLOBAL ushort *p)
{
    float16 wide = (float16)(v, v);
    vstore8(float16_to_bf16(wide).lo, 0, p);
}
#endif

// GEMM_PITCH: elements from row to row of a strip; a power of two would use few sets of the cache.
// GEMM_ROWS: GEMM_MR as the tails count it, in fours.
enum { GEMM_DEPTH = 384, GEMM_PITCH = GEMM_DEPTH + 16, GEMM_ROWS = (GEMM_MR + 3) / 4 * 4 };
#define GEMM_STRIP(name) float name[GEMM_ROWS * GEMM_PITCH] __attribute__((aligned(64)))

// A call with constant distances must become code with constant addresses.
#define ALWAYS_INLINE inline __attribute__((always_inline))

inline vec gemm_load_vec(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? gemm_bf16_vec((const GLOBAL ushort *)p + i) : VLOAD((const GLOBAL float *)p + i);
}

// Asks for a cache line ahead of its use. The built-in takes no __global pointer; on a CPU device
// all memory is the host's.
#ifdef __clang__
#define GEMM_PREFETCH(p) __builtin_prefetch((const void *)(size_t)(p))
#else
#define GEMM_PREFETCH(p)
#endif

// Elements from panel to panel: an odd number of cache lines, for the same reason.
inline size_t gemm_panel_pitch(int k)
{
    return (size_t)k * GEMM_NR + 16;
}

// strip[i][GEMM_PITCH] = `rows` rows of `k` elements of A; zeros up to a multiple of 4 rows.
inline void gemm_take_rows(float *strip, const GLOBAL void *a, size_t at, size_t lda, int rows, int k,
                           int bf16)
{
    for (int i = 0; i < rows; i++, at += lda, strip += GEMM_PITCH) {
        int s = 0;
        for (; s + GEMM_VW <= k; s += GEMM_VW)
            VSTORE(gemm_load_vec(a, at + s, bf16), strip + s);
        for (; s < k; s++)
            strip[s] = gemm_load(a, at + s, bf16);
    }
    for (int i = rows; i % 4; i++, strip += GEMM_PITCH)
        for (int s = 0; s < k; s++)
            strip[s] = 0.0f;
}

// strip[s][GEMM_MR] = `k` rows of `rows` elements of A, stored [k,m]; zeros up to GEMM_MR.
inline void gemm_take_columns(float *strip, const GLOBAL void *a, size_t at, size_t m, int rows, int k,
                              int bf16)
{
    for (int s = 0; s < k; s++, at += m, strip += GEMM_MR) {
        if (rows == GEMM_MR && !bf16) {
            const GLOBAL float *p = (const GLOBAL float *)a + at;
#if VECTOR_WIDTH >= 16
            vstore8(vload8(0, p), 0, strip);
            vstore4(vload4(0, p + 8), 0, strip + 8);
#else
            vstore4(vload4(0, p), 0, strip);
            vstore2(vload2(0, p + 4), 0, strip + 4);
#endif
        } else if (rows == GEMM_MR) {
            const GLOBAL ushort *p = (const GLOBAL ushort *)a + at;
#if VECTOR_WIDTH >= 16
            vstore8(as_float8(convert_uint8(vload8(0, p)) << 16), 0, strip);
            vstore4(as_float4(convert_uint4(vload4(0, p + 8)) << 16), 0, strip + 8);
#else
            vstore4(as_float4(convert_uint4(vload4(0, p)) << 16), 0, strip);
            vstore2(as_float2(convert_uint2(vload2(0, p + 4)) << 16), 0, strip + 4);
#endif
        } else {
            for (int i = 0; i < GEMM_MR; i++)
                strip[i] = i < rows ? gemm_load(a, at + i, bf16) : 0.0f;
        }
    }
}

// tile[GEMM_MR][2] (vectors) = sum over k of a[i*row + k*step] * b[k*b_step][GEMM_NR]
ALWAYS_INLINE void gemm_multiply(vec *tile, const float *a, int row, int step, const GLOBAL float *b,
                                 int b_step, int k)
{
    vec acc[GEMM_MR][2];
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++)
        acc[i][0] = acc[i][1] = 0.0f;
    const GLOBAL float *ahead = b + 16 * (size_t)b_step;
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < GEMM_MR; i++) {
            vec v = a[i * row];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        GEMM_PREFETCH(ahead);
        GEMM_PREFETCH(ahead + GEMM_VW);
        ahead += b_step;
        b += b_step;
    }
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++) {
        tile[2 * i] = acc[i][0];
        tile[2 * i + 1] = acc[i][1];
    }
}

// The same for 4 rows: the ends of blocks.
ALWAYS_INLINE void gemm_multiply_tail(vec *tile, const float *a, int row, int step, const GLOBAL float *b,
                                      int b_step, int k)
{
    vec acc[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        acc[i][0] = acc[i][1] = 0.0f;
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            vec v = a[i * row];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        b += b_step;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        tile[2 * i] = acc[i][0];
        tile[2 * i + 1] = acc[i][1];
    }
}

// B is not packed: it is stored [k,n] in f32 and n is whole panels.
#define GEMM_B_IN_PLACE 64

// SwiGLU: n and n/2 are whole panels. Forward: half a panel is columns of g, the other half those
// of u that belong to them.

// Where the sums of one step of k go. K is cut into steps, and between two of them the sums lie in
// `sums`, which is f32: C itself or, where C is bf16, a matrix of C's shape in scratch memory.
#define GEMM_FIRST 16 // of the steps: add the bias and, if asked, C; else the sums so far
#define GEMM_LAST 32  // write C; else the sums

// Writes `rows` rows of `cols` columns of a tile (two vectors a row).
inline void gemm_write_tile(const vec *tile, GLOBAL void *c, GLOBAL float *sums, size_t at,
                            size_t ldc, int rows, int cols, const GLOBAL float *bias, int flags)
{
    int bf16_in = flags & GEMM_FIRST ? flags & GEMM_C_BF16 : 0;
    int bf16_out = flags & GEMM_LAST ? flags & GEMM_C_BF16 : 0;
    int add = !(flags & GEMM_FIRST) || (flags & GEMM_ACCUMULATE);
    const GLOBAL void *in = flags & GEMM_FIRST ? c : (GLOBAL void *)sums;
    GLOBAL void *out = flags & GEMM_LAST ? c : (GLOBAL void *)sums;
    if (!(flags & GEMM_FIRST))
        bias = 0;
    for (int i = 0; i < rows; i++, at += ldc, tile += 2) {
        int j = 0;
        for (; j + GEMM_VW <= min(cols, (int)GEMM_NR); j += GEMM_VW) {
            vec v = tile[j / GEMM_VW];
            if (bias)
                v += VLOAD(bias + j);
            if (add)
                v += gemm_load_vec(in, at + j, bf16_in);
            if (bf16_out)
                gemm_vec_bf16(v, (GLOBAL ushort *)out + at + j);
            else
                VSTORE(v, (GLOBAL float *)out + at + j);
        }
        for (; j < min(cols, (int)GEMM_NR); j++) {
            float v = ((const float *)tile)[j] + (bias ? bias[j] : 0.0f);
            if (add)
                v += gemm_load(in, at + j, bf16_in);
            gemm_store(out, at + j, v, bf16_out);
        }
    }
}

inline void gemm_store_vec(GLOBAL void *p, size_t i, vec v, int bf16)
{
    if (bf16)
        gemm_vec_bf16(v, (GLOBAL ushort *)p + i);
    else
        VSTORE(v, (GLOBAL float *)p + i);
}

inline vec gemm_sigmoid(vec v)
{
#if VECTOR_WIDTH >= 16
    return sigmoid16(v);
#else
    return sigmoid16((float16)(v, v)).lo;
#endif
}

// The last step of SWIGLU_FORWARD: a tile is g and u of half a panel. ldh = F; `at` is the place in
// h, row + at that in c.
inline void gemm_write_swiglu(const vec *tile, GLOBAL void *c, GLOBAL void *h, size_t at, size_t row,
                              size_t ldh, int rows, int bf16)
{
    for (int i = 0; i < rows; i++, at += ldh, row += ldh) {
        vec g = tile[2 * i], u = tile[2 * i + 1];
        gemm_store_vec(h, at, g * gemm_sigmoid(g) * u, bf16);
        if (c) {
            gemm_store_vec(c, row + at, g, bf16);
            gemm_store_vec(c, row + at + ldh, u, bf16);
        }
    }
}

// The last step of SWIGLU_BACKWARD: a tile is dh; g at `at` of c and u `ld` further on become dg,
// du.
inline void gemm_write_swiglu_bwd(const vec *tile, GLOBAL void *c, size_t at, size_t ld, int rows,
                                  int bf16)
{
    for (int i = 0; i < rows; i++, at += 2 * ld)
        for (int j = 0; j < 2; j++) {
            size_t to = at + j * GEMM_VW;
            vec g = gemm_load_vec(c, to, bf16), u = gemm_load_vec(c, to + ld, bf16);
            vec s = gemm_sigmoid(g), ds = tile[2 * i + j] * s;
            gemm_store_vec(c, to, ds * u * fma(g, 1.0f - s, (vec)(1.0f)), bf16);
            gemm_store_vec(c, to + ld, ds * g, bf16);
        }
}

// Writes a tile whose first element is C[row, col] = C[at] (or its place in the sums).
inline void gemm_finish_tile(vec *tile, GLOBAL void *c, GLOBAL float *sums, GLOBAL void *h, size_t at,
                             int col, int n, int rows, const GLOBAL float *bias, int flags)
{
    int swiglu = flags & (GEMM_SWIGLU_FORWARD | GEMM_SWIGLU_BACKWARD);
    if (!swiglu || !(flags & GEMM_LAST)) {
        gemm_write_tile(tile, c, sums, at + col, n, rows, n - col, bias ? bias + col : bias, flags);
        return;
    }
    if (!(flags & GEMM_FIRST))
        for (int i = 0; i < rows; i++) {
            tile[2 * i] += VLOAD(sums + at + col + (size_t)i * n);
            tile[2 * i + 1] += VLOAD(sums + at + col + (size_t)i * n + GEMM_VW);
        }
    if (swiglu == GEMM_SWIGLU_FORWARD)
        gemm_write_swiglu(tile, c, h, at / 2 + col / 2, at / 2, n / 2, rows, flags & GEMM_C_BF16);
    else
        gemm_write_swiglu_bwd(tile, c, 2 * at + col, n, rows, flags & GEMM_C_BF16);
}

// Asks for what a later tile, `next` elements on from C[at], will be added to or made from: from
// far away, it takes as long as many steps of k.
inline void gemm_ask_tile(const GLOBAL float *c, const GLOBAL float *sums, size_t at, size_t next,
                          size_t n, int flags)
{
    size_t step = n;
    if ((flags & (GEMM_FIRST | GEMM_LAST)) == (GEMM_FIRST | GEMM_LAST)) {
        if (flags & GEMM_SWIGLU_FORWARD)
            return; // nothing
        if (flags & GEMM_SWIGLU_BACKWARD) {
            sums = c + at;
            next += next < n ? 0 : GEMM_MR * n;
            step = 2 * n;
            for (size_t i = 0; i < GEMM_MR; i++) {
                GEMM_PREFETCH(sums + at + next + n + i * step);
                GEMM_PREFETCH(sums + at + next + n + i * step + GEMM_VW);
            }
        }
    }
    for (size_t i = 0; i < GEMM_MR; i++) {
        GEMM_PREFETCH(sums + at + next + i * step);
        GEMM_PREFETCH(sums + at + next + i * step + GEMM_VW);
    }
}

// One strip of `rows` rows, through the panels [first, last) of B at its step of k. row and step:
// distances in the strip (constants at every call).
ALWAYS_INLINE void gemm_strip(const float *strip, int row, int step, const GLOBAL float *b, int b_step,
                              size_t pitch,
                              GLOBAL void *c, GLOBAL float *sums, GLOBAL void *h, size_t at, int n,
                              int rows, int first, int last, const GLOBAL float *bias, int k,
                              int flags)
{
    vec tile[GEMM_ROWS * 2];
    for (int p = first; p < last; p++) {
        int col = p * GEMM_NR;
        int next = p + 1 < last ? col + GEMM_NR : first * GEMM_NR + GEMM_MR * n;
        gemm_ask_tile(c, sums, at, next, n, flags);
        if (rows == GEMM_MR)
            gemm_multiply(tile, strip, row, step, b + p * pitch, b_step, k);
        else
            for (int i = 0; i < rows; i += 4)
                gemm_multiply_tail(tile + i * 2, strip + i * row, row, step, b + p * pitch, b_step, k);
        gemm_finish_tile(tile, c, sums, h, at, col, n, rows, bias, flags);
    }
}

// Work-items are as many as cores and take the blocks of a product by turns. A runtime hands out
// work-groups in large shares (PoCL: half of what is left), and blocks differ: an expert's last one
// is small, a core is slow for a while; with shares one core would wait for the other.
// turns[0]: the next block; turns[1]: work-items that are through. The last sets both back to 0.
inline int gemm_next_block(volatile GLOBAL int *turns)
{
    return atomic_inc(turns);
}

inline void gemm_no_more_blocks(volatile GLOBAL int *turns)
{
    if (atomic_inc(turns + 1) == (int)get_num_groups(0) - 1) {
        atomic_xchg(turns, 0);
        atomic_xchg(turns + 1, 0);
    }
}

// C = A B over blocks of `block` rows and `wide` panels: the parts of the panels that a step of k
// needs stay in the cache while all strips pass. A [m,k]; B packed, [groups] of them; ragged over
// rows where there are offsets; `sums` as above, from element 16*skip of its buffer on.
// depth <= GEMM_DEPTH.
// Blocks: x, rows: m / block + number of groups; y, panels / wide.
inline void gemm_rows_block(float *strip, const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c,
                            GLOBAL float *sums, GLOBAL float *h, const GLOBAL float *bias,
                            const GLOBAL int *offsets, int groups, int x, int y, int m, int n, int k,
                            int skip, int block, int wide, int depth, int flags)
{
    int group, end, panels = (n + GEMM_NR - 1) / GEMM_NR, k0 = 0;
    int row0 = gemm_block(offsets, groups, x, block, m, &group, &end);
    int first = y * wide, last = min(first + wide, panels);
    int b_step = flags & GEMM_B_IN_PLACE ? n : (int)GEMM_NR;
    size_t pitch = flags & GEMM_B_IN_PLACE ? (size_t)GEMM_NR : gemm_panel_pitch(k);
    if (row0 >= end)
        return;
    b += (size_t)group * (flags & GEMM_B_IN_PLACE ? (size_t)n * k : panels * pitch);
    sums += (size_t)skip * 16;
    flags |= GEMM_FIRST;
    do {
        int steps = min(depth, k - k0);
        if (k0 + steps == k)
            flags |= GEMM_LAST;
        for (int i = row0; i < end; i += GEMM_MR) {
            int rows = min((int)GEMM_MR, end - i);
            gemm_take_rows(strip, a, (size_t)i * k + k0, k, rows, steps, flags & GEMM_A_BF16);
            gemm_strip(strip, GEMM_PITCH, 1, b + (size_t)k0 * b_step, b_step, pitch, c, sums, h,
                       (size_t)i * n, n, rows, first, last, bias, steps, flags);
        }
        flags &= ~GEMM_FIRST;
        k0 += steps;
    } while (k0 < k);
}

// Groups: any number; there are across * down blocks.
KERNEL(1, 1)
void gemm_rows_cpu(volatile GLOBAL int *VIEW(turns), const GLOBAL float *VIEW(a),
                   const GLOBAL float *VIEW(b), GLOBAL float *VIEW(c), GLOBAL float *VIEW(sums),
                   GLOBAL float *VIEW(h), const GLOBAL float *VIEW(bias),
                   const GLOBAL int *VIEW(offsets), int groups, int down, int across, int m, int n,
                   int k, int skip, int block, int wide, int depth, int flags)
{
    OFFSETS8(turns, a, b, c, sums, h, bias, offsets)
    GEMM_STRIP(strip);
    for (int i = gemm_next_block(turns); i < down * across; i = gemm_next_block(turns))
        gemm_rows_block(strip, a, b, c, sums, h, bias, offsets, groups, i % down, i / down, m, n, k,
                        skip, block, wide, depth, flags);
    gemm_no_more_blocks(turns);
}

// C[group] = A^T B: A stored [k,m], summed over the group's rows of A and B; the rest as
// gemm_rows_block. Blocks: x, rows: m / block; y, panels / wide.
inline void gemm_columns_block(float *strip, const GLOBAL float *a, const GLOBAL float *b,
                               GLOBAL float *c, GLOBAL float *sums, const GLOBAL int *offsets,
                               int group, int x, int y, int m, int n, int k, int skip, int block,
                               int wide, int depth, int flags)
{
    int panels = (n + GEMM_NR - 1) / GEMM_NR;
    int row0 = x * block, end = min(row0 + block, m);
    int k0 = offsets ? offsets[group] : 0, k_end = offsets ? offsets[group + 1] : k;
    int first = y * wide, last = min(first + wide, panels);
    int b_step = flags & GEMM_B_IN_PLACE ? n : (int)GEMM_NR;
    size_t at = (size_t)group * m * n,
           pitch = flags & GEMM_B_IN_PLACE ? (size_t)GEMM_NR : gemm_panel_pitch(k);
    sums += (size_t)skip * 16;
    flags |= GEMM_FIRST;
    do {
        int steps = min(depth, k_end - k0);
        if (k0 + steps == k_end)
            flags |= GEMM_LAST;
        for (int i = row0; i < end; i += GEMM_MR) {
            int rows = min((int)GEMM_MR, end - i);
            gemm_take_columns(strip, a, (size_t)k0 * m + i, m, rows, steps, flags & GEMM_A_BF16);
            gemm_strip(strip, 1, GEMM_MR, b + (size_t)k0 * b_step, b_step, pitch, c, sums, 0,
                       at + (size_t)i * n, n, rows, first, last, 0, steps, flags);
        }
        flags &= ~GEMM_FIRST;
        k0 += steps;
    } while (k0 < k_end);
}

// Groups: any number; there are down * across * groups blocks.
KERNEL(1, 1)
void gemm_columns_cpu(volatile GLOBAL int *VIEW(turns), const GLOBAL float *VIEW(a),
                      const GLOBAL float *VIEW(b), GLOBAL float *VIEW(c), GLOBAL float *VIEW(sums),
                      const GLOBAL int *VIEW(offsets), int groups, int down, int across, int m,
                      int n, int k, int skip, int block, int wide, int depth, int flags)
{
    OFFSETS6(turns, a, b, c, sums, offsets)
    GEMM_STRIP(strip);
    int all = down * across * groups;
    for (int i = gemm_next_block(turns); i < all; i = gemm_next_block(turns))
        gemm_columns_block(strip, a, b, c, sums, offsets, i / (down * across), i % down,
                           i / down % across, m, n, k, skip, block, wide, depth, flags);
    gemm_no_more_blocks(turns);
}

// ---- matrix products: packing for the CPU form

// The elements of a and b in turn, from their first (second) halves.
#if VECTOR_WIDTH >= 16
inline vec gemm_zip(float8 a, float8 b)
{
    return (vec)(a.s0, b.s0, a.s1, b.s1, a.s2, b.s2, a.s3, b.s3, a.s4, b.s4, a.s5, b.s5, a.s6, b.s6,
                 a.s7, b.s7);
}
#else
inline vec gemm_zip(float4 a, float4 b)
{
    return (vec)(a.s0, b.s0, a.s1, b.s1, a.s2, b.s2, a.s3, b.s3);
}
#endif

// to[k][GEMM_NR] = from[i][k] transposed, a square of GEMM_VW. Each round of zipping rotates the
// bits of (row, column) by one place; after log2(GEMM_VW) rounds rows and columns have changed
// places.
inline void gemm_transpose(GLOBAL float *to, const GLOBAL void *from, size_t at, size_t ld, int bf16)
{
    vec v[GEMM_VW], t[GEMM_VW];
#pragma unroll
    for (int i = 0; i < GEMM_VW; i++)
        v[i] = gemm_load_vec(from, at + i * ld, bf16);
#pragma unroll
    for (int round = 1; round < GEMM_VW; round *= 2) {
#pragma unroll
        for (int i = 0; i < GEMM_VW / 2; i++) {
            t[2 * i] = gemm_zip(v[i].lo, v[i + GEMM_VW / 2].lo);
            t[2 * i + 1] = gemm_zip(v[i].hi, v[i + GEMM_VW / 2].hi);
        }
#pragma unroll
        for (int i = 0; i < GEMM_VW; i++)
            v[i] = t[i];
    }
#pragma unroll
    for (int i = 0; i < GEMM_VW; i++)
        VSTORE(v[i], to + i * GEMM_NR);
}

// Element by element: rows [k0, k_end) of half a panel from column `col`, zeros past column n.
inline void gemm_pack_slow(GLOBAL float *to, const GLOBAL void *b, size_t at, size_t column,
                           size_t step, int col, int n, int k0, int k_end, int bf16)
{
    for (int k = k0; k < k_end; k++)
        for (int j = 0; j < GEMM_VW; j++)
            to[(size_t)k * GEMM_NR + j] =
                col + j < n ? gemm_load(b, at + (col + j) * column + k * step, bf16) : 0.0f;
}

// Packs B, [groups] of [n,k] (along_k) or [k,n], into panels [groups][panel][k][GEMM_NR] f32,
// padded with zeros to whole panels. With GEMM_SWIGLU_FORWARD (along_k) the halves of a panel come
// from the halves of the columns.
// Groups: (k / depth, panels / wide, number of groups); depth a multiple of GEMM_VW.
KERNEL(1, 1)
void gemm_pack_cpu(GLOBAL float *VIEW(to), const GLOBAL float *VIEW(b), int along_k, int n, int k,
                   int depth, int wide, int flags)
{
    OFFSETS2(to, b)
    int bf16 = flags & GEMM_B_BF16, panels = (n + GEMM_NR - 1) / GEMM_NR;
    int k0 = (int)get_group_id(0) * depth, k_end = min(k0 + depth, k);
    int first = (int)get_group_id(1) * wide, last = min(first + wide, panels);
    size_t group = get_group_id(2), at = group * n * k, column = along_k ? k : 1,
           step = along_k ? 1 : n;
    size_t pitch = gemm_panel_pitch(k);
    to += group * panels * pitch;
    int whole = min(last, n / GEMM_NR), k_whole = k_end - (k_end - k0) % GEMM_VW;
    if (!along_k)
        for (int s = k0; s < k_end; s++)
            for (int p = first; p < whole; p++)
                for (int j = 0; j < GEMM_NR; j += GEMM_VW)
                    VSTORE(gemm_load_vec(b, at + (size_t)s * n + p * GEMM_NR + j, bf16),
                           to + p * pitch + (size_t)s * GEMM_NR + j);
    for (int p = first; p < last; p++)
        for (int side = 0; side < 2; side++) {
            GLOBAL float *panel = to + p * pitch + side * GEMM_VW;
            int slow = p < whole ? k_end : k0;
            int col = flags & GEMM_SWIGLU_FORWARD ? p * GEMM_VW + side * (n / 2)
                                                  : p * GEMM_NR + side * GEMM_VW;
            if (p < whole && along_k) {
                for (int s = k0; s < k_whole; s += GEMM_VW)
                    gemm_transpose(panel + (size_t)s * GEMM_NR, b, at + (size_t)col * k + s, k, bf16);
                slow = k_whole;
            }
            gemm_pack_slow(panel, b, at, column, step, col, n, slow, k_end, bf16);
        }
}

#endif // CPU_FORMS

// ---- helpers of the layer kernels ---------------------------------------------------------------

// Sum over the work-group of `size` items (a power of two); every item gets the result.
inline float group_sum(LOCAL_PTR float *sums, float value, int size)
{
    int i = get_local_id(0);
    sums[i] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int half_size = size / 2; half_size > 0; half_size /= 2) {
        if (i < half_size)
            sums[i] += sums[i + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    float sum = sums[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

// A buffer that holds activations or f32, as `f32` says.
inline float any_load(const GLOBAL void *p, size_t i, int f32)
{
    return f32 ? ((const GLOBAL float *)p)[i] : act_load((const GLOBAL act *)p, i);
}
inline void any_store(GLOBAL void *p, size_t i, float v, int f32)
{
    if (f32)
        ((GLOBAL float *)p)[i] = v;
    else
        act_store((GLOBAL act *)p, i, v);
}

// GELU, tanh form: x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), since 1 + tanh(u) = 2
// sigmoid(2u)
#define GELU_LINEAR 1.5957691216057308f // 2 sqrt(2/pi)
#define GELU_CUBIC 0.071354816272600f   // the same times 0.044715

inline float gelu_slope(float x)
{
    float s = sigmoid(x * fma(GELU_CUBIC, x * x, GELU_LINEAR));
    return fma(x * s * (1.0f - s), fma(3.0f * GELU_CUBIC, x * x, GELU_LINEAR), s);
}

#ifdef CPU_FORMS

INLINE float sum16(float16 v)
{
    float8 a = v.lo + v.hi;
    float4 b = a.lo + a.hi;
    float2 c = b.lo + b.hi;
    return c.x + c.y;
}

INLINE float max16(float16 v)
{
    float8 a = fmax(v.lo, v.hi);
    float4 b = fmax(a.lo, a.hi);
    float2 c = fmax(b.lo, b.hi);
    return fmax(c.x, c.y);
}

// v in the first n lanes, 0 in the others.
INLINE float16 first_lanes(float16 v, int n)
{
    const int16 lane = (int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return select((float16)(0.0f), v, lane < (int16)(n));
}

#ifdef ACT_BF16
INLINE float8 act_load8(const GLOBAL act *p)
{
    return as_float8(convert_uint8(vload8(0, p)) << 16);
}
INLINE void act_store8(GLOBAL act *p, float16 v)
{
    typedef ushort8 ushort8_unaligned __attribute__((aligned(2)));
    *(GLOBAL ushort8_unaligned *)p = float16_to_bf16(v).lo;
}
#else
INLINE float8 act_load8(const GLOBAL act *p)
{
    return vload8(0, p);
}
INLINE void act_store8(GLOBAL act *p, float16 v)
{
    vstore8(v.lo, 0, p);
}
#endif

// Up to 16 values; lanes past n are 0 and are not stored. 8 has a short cut: head sizes 72 and 88.
INLINE float16 act_load_upto(const GLOBAL act *p, int n)
{
    if (n >= 16)
        return act_load16(p);
    if (n == 8)
        return (float16)(act_load8(p), (float8)(0.0f));
    float v[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < n; i++)
        v[i] = act_load(p, i);
    return vload16(0, v);
}
INLINE void act_store_upto(GLOBAL act *p, float16 value, int n)
{
    if (n >= 16) {
        act_store16(p, value);
        return;
    }
    if (n == 8) {
        act_store8(p, value);
        return;
    }
    float v[16];
    vstore16(value, 0, v);
    for (int i = 0; i < n; i++)
        act_store(p, i, v[i]);
}
INLINE float16 float_load_upto(const GLOBAL float *p, int n)
{
    if (n >= 16)
        return vload16(0, p);
    if (n == 8)
        return (float16)(vload8(0, p), (float8)(0.0f));
    float v[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return vload16(0, v);
}
INLINE void float_store_upto(GLOBAL float *p, float16 value, int n)
{
    if (n >= 16) {
        vstore16(value, 0, p);
        return;
    }
    float v[16];
    vstore16(value, 0, v);
    for (int i = 0; i < n; i++)
        p[i] = v[i];
}
#endif // CPU_FORMS

// ---- embedding ----------------------------------------------------------------------------------

// One item a run of p pixels: (row, channel, line py of the patch).
// pqc: columns are ordered (py, q, c), else (c, py, q).
KERNEL(64, 1)
void patchify(GLOBAL act *VIEW(out), const GLOBAL float *VIEW(x), int channels, int height,
              int width, int p, int pqc, uint runs)
{
    OFFSETS2(out, x)
    uint i = get_global_id(0);
    if (i >= runs)
        return;
    int py = i % p, c = (i / p) % channels;
    uint row = i / p / channels;
    uint across = width / p, tokens = across * (height / p);
    uint n = row / tokens, token = row % tokens;
    uint ty = token / across, tx = token % across;
    const GLOBAL float *from =
        x + (((size_t)n * channels + c) * height + ty * p + py) * width + tx * p;
    size_t to = (size_t)row * channels * p * p + (pqc ? py * p * channels + c : (c * p + py) * p);
    for (int q = 0; q < p; q++)
        act_store(out, to + (pqc ? q * channels : q), from[q]);
}

KERNEL(64, 1)
void unpatchify(GLOBAL float *VIEW(out), const GLOBAL act *VIEW(in), int channels, int height,
                int width, int p, uint runs)
{
    OFFSETS2(out, in)
    uint i = get_global_id(0);
    if (i >= runs)
        return;
    int py = i % p, c = (i / p) % channels;
    uint row = i / p / channels;
    uint across = width / p, tokens = across * (height / p);
    uint n = row / tokens, token = row % tokens;
    uint ty = token / across, tx = token % across;
    GLOBAL float *to = out + (((size_t)n * channels + c) * height + ty * p + py) * width + tx * p;
    size_t from = (size_t)row * channels * p * p + py * p * channels + c;
    for (int q = 0; q < p; q++)
        to[q] = act_load(in, from + q * channels);
}

// exp(a) for a <= 0 of moderate size, rounded almost as well as can be: DDPM's t are up to 999 and
// multiply its error. Taken apart as 2^n exp(r), and exp(r) = 1 + r + r^2 q(r) with the rounding
// error of 1 + r added back.
inline float exp_rounded(float a)
{
    float n = rint(a * 0x1.715476p+0f);
    float whole = fma(-n, 0x1.62e400p-1f, a), r = fma(-n, 0x1.7f7d1cp-20f, whole);
    float rest = fma(-n, 0x1.7f7d1cp-20f, whole - r);
    float q = 0x1.a01a02p-13f;
    q = fma(q, r, 0x1.6c16c2p-10f);
    q = fma(q, r, 0x1.111112p-7f);
    q = fma(q, r, 0x1.555556p-5f);
    q = fma(q, r, 0x1.555556p-3f);
    q = fma(q, r, 0.5f);
    float high = 1.0f + r, low = ((1.0f - high) + r) + rest;
    return (high + fma(r * r, q, low)) * as_float((uint)((int)n + 127) << 23);
}

// Frequencies and angles are rounded to f32 as in the published code, so that its weights see
// theirs.
KERNEL(64, 1)
void timestep_embed(GLOBAL act *VIEW(out), const GLOBAL float *VIEW(t), int half_width, float steps,
                    uint count)
{
    OFFSETS2(out, t)
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint n = i / half_width, k = i % half_width;
    float angle = t[n] * exp_rounded(-9.210340371976184f * (float)k / steps); // ln 10000
    act_store(out, (size_t)n * 2 * half_width + k, cos(angle));
    act_store(out, (size_t)n * 2 * half_width + half_width + k, sin(angle));
}

KERNEL(64, 1)
void embed_fwd(GLOBAL act *VIEW(out), const GLOBAL float *VIEW(table), const GLOBAL int *VIEW(y),
               int width, uint count)
{
    OFFSETS3(out, table, y)
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint n = i / width, d = i % width;
    act_store(out, i, act_load(out, i) + table[(size_t)y[n] * width + d]);
}

// One item a column, images in order: the same label may come twice.
KERNEL(64, 1)
void embed_bwd(GLOBAL float *VIEW(dtable), const GLOBAL act *VIEW(dout), const GLOBAL int *VIEW(y),
               int width, int images)
{
    OFFSETS3(dtable, dout, y)
    int d = get_global_id(0);
    if (d >= width)
        return;
    for (int n = 0; n < images; n++)
        dtable[(size_t)y[n] * width + d] += act_load(dout, (size_t)n * width + d);
}

// ---- elementwise --------------------------------------------------------------------------------

// GPU forms: one item an element. CPU forms: one item `chunk` elements.
KERNEL(256, 1)
void silu_fwd(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), uint count, uint chunk)
{
    OFFSETS2(y, x)
    uint i = get_global_id(0);
    if (i < count)
        act_store(y, i, act_load(x, i) * sigmoid(act_load(x, i)));
}

KERNEL(256, 1)
void silu_bwd(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
              uint count, uint chunk)
{
    OFFSETS3(dx, dy, x)
    uint i = get_global_id(0);
    if (i >= count)
        return;
    float v = act_load(x, i), s = sigmoid(v);
    act_store(dx, i, act_load(dy, i) * s * fma(v, 1.0f - s, 1.0f));
}

KERNEL(256, 1)
void gelu_fwd(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), uint count, uint chunk)
{
    OFFSETS2(y, x)
    uint i = get_global_id(0);
    if (i >= count)
        return;
    float v = act_load(x, i);
    act_store(y, i, v * sigmoid(v * fma(GELU_CUBIC, v * v, GELU_LINEAR)));
}

KERNEL(256, 1)
void gelu_bwd(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
              uint count, uint chunk)
{
    OFFSETS3(dx, dy, x)
    uint i = get_global_id(0);
    if (i < count)
        act_store(dx, i, act_load(dy, i) * gelu_slope(act_load(x, i)));
}

// y[i] += x[i mod period]
KERNEL(256, 1)
void add(GLOBAL void *VIEW(y), const GLOBAL void *VIEW(x), uint count, uint period, int y_f32,
         int x_f32, uint chunk)
{
    OFFSETS2(y, x)
    uint i = get_global_id(0);
    if (i < count)
        any_store(y, i, any_load(y, i, y_f32) + any_load(x, i % period, x_f32), y_f32);
}

#ifdef CPU_FORMS
#define CHUNK_FROM (get_group_id(0) * (size_t)chunk)
#define CHUNK_TO min(CHUNK_FROM + chunk, (size_t)count)

// Runs a statement for i = from, from + 16.. with n = 16 elements, and once for the rest with n
// less: so the loop has no code for tails in it.
#define FOR_VECTORS(from, to, ...)                                                                 \
    {                                                                                              \
        size_t i = from, end = to;                                                                 \
        for (; i + 16 <= end; i += 16) {                                                           \
            const int n = 16;                                                                      \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
        if (i < end) {                                                                             \
            const int n = (int)(end - i);                                                          \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    }

KERNEL(1, 1)
void silu_fwd_cpu(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), uint count, uint chunk)
{
    OFFSETS2(y, x)
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n);
                act_store_upto(y + i, v * sigmoid16(v), n))
}

KERNEL(1, 1)
void silu_bwd_cpu(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
                  uint count, uint chunk)
{
    OFFSETS3(dx, dy, x)
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n), s = sigmoid16(v);
                float16 slope = s * fma(v, 1.0f - s, (float16)(1.0f));
                act_store_upto(dx + i, act_load_upto(dy + i, n) * slope, n))
}

KERNEL(1, 1)
void gelu_fwd_cpu(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), uint count, uint chunk)
{
    OFFSETS2(y, x)
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n);
                float16 u = v * fma((float16)(GELU_CUBIC), v * v, (float16)(GELU_LINEAR));
                act_store_upto(y + i, v * sigmoid16(u), n))
}

KERNEL(1, 1)
void gelu_bwd_cpu(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
                  uint count, uint chunk)
{
    OFFSETS3(dx, dy, x)
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n), square = v * v;
                float16 s = sigmoid16(v * fma((float16)(GELU_CUBIC), square, (float16)(GELU_LINEAR)));
                float16 du = fma((float16)(3.0f * GELU_CUBIC), square, (float16)(GELU_LINEAR));
                float16 slope = fma(v * s * (1.0f - s), du, s);
                act_store_upto(dx + i, act_load_upto(dy + i, n) * slope, n))
}

INLINE float16 any_load_upto(const GLOBAL void *p, size_t i, int n, int f32)
{
    return f32 ? float_load_upto((const GLOBAL float *)p + i, n)
               : act_load_upto((const GLOBAL act *)p + i, n);
}

KERNEL(1, 1)
void add_cpu(GLOBAL void *VIEW(y), const GLOBAL void *VIEW(x), uint count, uint period, int y_f32,
             int x_f32, uint chunk)
{
    OFFSETS2(y, x)
    size_t i = CHUNK_FROM, end = CHUNK_TO, k = i % period;
    while (i < end) {
        int n = (int)min((size_t)16, min(end - i, period - k));
        float16 v = any_load_upto(y, i, n, y_f32) + any_load_upto(x, k, n, x_f32);
        if (y_f32)
            float_store_upto((GLOBAL float *)y + i, v, n);
        else
            act_store_upto((GLOBAL act *)y + i, v, n);
        i += n;
        k = k + n == period ? 0 : k + n;
    }
}
#endif // CPU_FORMS

// ---- LayerNorm with adaLN modulation ------------------------------------------------------------

#define NORM_EPS 1e-6f
#define NORM_CHUNK 32 // GPU forms of backward: most rows a group

enum { NORM_LANES = 32, NORM_QUADS = 12 }; // items a row; fours of a row that an item keeps at most

// The sum over the NORM_LANES items of a row; all items of the group take part.
inline float norm_sum(LOCAL_PTR float *sums, float value)
{
    LOCAL_PTR float *row = sums + get_local_id(0) / NORM_LANES * NORM_LANES;
    float sum[4], v[4];
    sums[get_local_id(0)] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    gemm_take(sum, row);
#pragma unroll
    for (int i = 4; i < NORM_LANES; i += 4) {
        gemm_take(v, row + i);
        gemm_add4(sum, v);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// GPU form: 4 rows a group. CPU form: one item `chunk` rows. `tokens` rows share a row of mod.
KERNEL(128, 1)
void layernorm_mod_fwd(GLOBAL act *VIEW(y), GLOBAL float *VIEW(stats), const GLOBAL act *VIEW(x),
                       const GLOBAL act *VIEW(mod), int width, int tokens, int mod_width, int shift,
                       int scale, int rows, int chunk)
{
    OFFSETS4(y, stats, x, mod)
    LOCAL float4 sums[128 / 4];
    int lane = get_local_id(0) % NORM_LANES;
    size_t row = get_group_id(0) * (size_t)(128 / NORM_LANES) + get_local_id(0) / NORM_LANES;
    int inside = row < (size_t)rows, end = inside ? width : 0;
    // fours: rows and columns are at multiples of four; and the row fits into its items' registers
    int fours = ((width | mod_width | shift | scale) & 3) == 0;
    fours = fours && width <= NORM_QUADS * 4 * NORM_LANES;
    const GLOBAL act *xr = x + row * width;
    const GLOBAL act *mr = mod + row / tokens * mod_width;
    float v[NORM_QUADS][4], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int q = 0; q < NORM_QUADS; q++) {
        int d = (q * NORM_LANES + lane) * 4;
        if (fours && d < end) {
            load4(v[q], xr, d, ACT_IS_BF16);
            sum += (v[q][0] + v[q][1]) + (v[q][2] + v[q][3]);
        }
    }
    for (int d = fours ? end : lane; d < end; d += NORM_LANES)
        sum += act_load(xr, d);
    float mean = norm_sum((LOCAL_PTR float *)sums, sum) / width;
#pragma unroll
    for (int q = 0; q < NORM_QUADS; q++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (fours && (q * NORM_LANES + lane) * 4 < end) {
                v[q][j] -= mean;
                squares = fma(v[q][j], v[q][j], squares);
            }
    for (int d = fours ? end : lane; d < end; d += NORM_LANES) {
        float away = act_load(xr, d) - mean;
        squares = fma(away, away, squares);
    }
    float rstd = 1.0f / sqrt(norm_sum((LOCAL_PTR float *)sums, squares) / width + NORM_EPS);
#pragma unroll
    for (int q = 0; q < NORM_QUADS; q++) {
        int d = (q * NORM_LANES + lane) * 4;
        if (fours && d < end) {
            float up[4], by[4];
            load4(by, mr, scale + d, ACT_IS_BF16);
            load4(up, mr, shift + d, ACT_IS_BF16);
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[q][j] = fma(v[q][j] * rstd, 1.0f + by[j], up[j]);
            store4(y, row * width + d, v[q], ACT_IS_BF16);
        }
    }
    for (int d = fours ? end : lane; d < end; d += NORM_LANES)
        act_store(y, row * width + d,
                  fma((act_load(xr, d) - mean) * rstd, 1.0f + act_load(mr, scale + d),
                      act_load(mr, shift + d)));
    if (inside && lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// Group (k, n): rows k*chunk.. of image n, chunk <= NORM_CHUNK. partial[n, k, 2, width]: sums of dy
// (for the shift) and of dy * xhat (for the scale) over these rows.
KERNEL(128, 1)
void layernorm_mod_bwd(GLOBAL act *VIEW(dx), GLOBAL float *VIEW(partial),
                       const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
                       const GLOBAL float *VIEW(stats), const GLOBAL act *VIEW(mod), int width,
                       int tokens, int mod_width, int scale, int chunk)
{
    OFFSETS6(dx, partial, dy, x, stats, mod)
    LOCAL float sums[128];
    LOCAL float mean_g[NORM_CHUNK], mean_gx[NORM_CHUNK];
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first), item = get_local_id(0);
    size_t row = n * tokens + first;
    const GLOBAL act *mr = mod + n * mod_width + scale;
    for (int r = 0; r < count; r++) {
        float mean = stats[2 * (row + r)], rstd = stats[2 * (row + r) + 1], g = 0.0f, gx = 0.0f;
        for (int d = item; d < width; d += 128) {
            float v = act_load(dy, (row + r) * width + d) * (1.0f + act_load(mr, d));
            g += v;
            gx = fma(v, (act_load(x, (row + r) * width + d) - mean) * rstd, gx);
        }
        g = group_sum(sums, g, 128);
        gx = group_sum(sums, gx, 128);
        if (item == 0) {
            mean_g[r] = g / width;
            mean_gx[r] = gx / width;
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * 2 * width;
    for (int d = item; d < width; d += 128) {
        float factor = 1.0f + act_load(mr, d), dshift = 0.0f, dscale = 0.0f;
        for (int r = 0; r < count; r++) {
            size_t i = (row + r) * width + d;
            float rstd = stats[2 * (row + r) + 1], g = act_load(dy, i);
            float xhat = (act_load(x, i) - stats[2 * (row + r)]) * rstd;
            dshift += g;
            dscale = fma(g, xhat, dscale);
            float back = fma(g, factor, -mean_g[r]) - xhat * mean_gx[r];
            act_store(dx, i, fma(rstd, back, act_load(dx, i)));
        }
        out[d] = dshift;
        out[width + d] = dscale;
    }
}

// dmod[n, columns[part] + d] = sum over k of partial[n, k, part, d]; column1 is of part 1, if any.
KERNEL(64, 1)
void sum_partials(GLOBAL act *VIEW(dmod), const GLOBAL float *VIEW(partial), int width,
                  int mod_width, int column0, int column1, int chunks, int parts)
{
    OFFSETS2(dmod, partial)
    int d = get_global_id(0), part = get_group_id(1);
    size_t n = get_group_id(2);
    if (d >= width)
        return;
    float sum = 0.0f;
    for (int k = 0; k < chunks; k++)
        sum += partial[((n * chunks + k) * parts + part) * width + d];
    act_store(dmod, n * mod_width + (part ? column1 : column0) + d, sum);
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void layernorm_mod_fwd_cpu(GLOBAL act *VIEW(y), GLOBAL float *VIEW(stats),
                           const GLOBAL act *VIEW(x), const GLOBAL act *VIEW(mod), int width,
                           int tokens, int mod_width, int shift, int scale, int rows, int chunk)
{
    OFFSETS4(y, stats, x, mod)
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    for (size_t row = from; row < to; row++) {
        const GLOBAL act *xr = x + row * width;
        const GLOBAL act *mr = mod + row / tokens * mod_width;
        float16 sum = 0.0f, squares = 0.0f;
        for (int d = 0; d < width; d += 16)
            sum += act_load_upto(xr + d, width - d);
        float mean = sum16(sum) / width;
        for (int d = 0; d < width; d += 16) {
            float16 v = first_lanes(act_load_upto(xr + d, width - d) - mean, width - d);
            squares = fma(v, v, squares);
        }
        float rstd = 1.0f / sqrt(sum16(squares) / width + NORM_EPS);
        for (int d = 0; d < width; d += 16) {
            float16 v = (act_load_upto(xr + d, width - d) - mean) * rstd;
            v = fma(v, 1.0f + act_load_upto(mr + scale + d, width - d),
                    act_load_upto(mr + shift + d, width - d));
            act_store_upto(y + row * width + d, v, width - d);
        }
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// `out` starts as what the first row gives it and is the running sum of both parts.
KERNEL(1, 1)
void layernorm_mod_bwd_cpu(GLOBAL act *VIEW(dx), GLOBAL float *VIEW(partial),
                           const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(x),
                           const GLOBAL float *VIEW(stats), const GLOBAL act *VIEW(mod), int width,
                           int tokens, int mod_width, int scale, int chunk)
{
    OFFSETS6(dx, partial, dy, x, stats, mod)
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + scale;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * 2 * width;
    for (int d = 0; d < 2 * width; d += 16)
        float_store_upto(out + d, 0.0f, 2 * width - d);
    for (int r = 0; r < count; r++) {
        size_t row = n * tokens + first + r;
        const GLOBAL act *xr = x + row * width, *gr = dy + row * width;
        float mean = stats[2 * row], rstd = stats[2 * row + 1];
        float16 sum_g = 0.0f, sum_gx = 0.0f;
        for (int d = 0; d < width; d += 16) {
            float16 g = act_load_upto(gr + d, width - d);
            float16 xhat = (act_load_upto(xr + d, width - d) - mean) * rstd;
            float16 v = fma(g, act_load_upto(mr + d, width - d), g);
            sum_g += v;
            sum_gx = fma(v, xhat, sum_gx);
            float_store_upto(out + d, float_load_upto(out + d, width - d) + g, width - d);
            float_store_upto(out + width + d,
                             fma(g, xhat, float_load_upto(out + width + d, width - d)), width - d);
        }
        float mean_g = sum16(sum_g) / width, mean_gx = sum16(sum_gx) / width;
        for (int d = 0; d < width; d += 16) {
            float16 g = act_load_upto(gr + d, width - d);
            float16 xhat = (act_load_upto(xr + d, width - d) - mean) * rstd;
            float16 v = fma(g, act_load_upto(mr + d, width - d), g);
            v = v - mean_g - xhat * mean_gx;
            v = fma((float16)(rstd), v, act_load_upto(dx + row * width + d, width - d));
            act_store_upto(dx + row * width + d, v, width - d);
        }
    }
}

KERNEL(1, 1)
void sum_partials_cpu(GLOBAL act *VIEW(dmod), const GLOBAL float *VIEW(partial), int width,
                      int mod_width, int column0, int column1, int chunks, int parts)
{
    OFFSETS2(dmod, partial)
    int part = get_group_id(1);
    size_t n = get_group_id(2);
    const GLOBAL float *from = partial + (n * chunks * parts + part) * width;
    GLOBAL act *to = dmod + n * mod_width + (part ? column1 : column0);
    for (int d = 0; d < width; d += 16) {
        float16 sum = 0.0f;
        for (int k = 0; k < chunks; k++)
            sum += float_load_upto(from + (size_t)k * parts * width + d, width - d);
        act_store_upto(to + d, sum, width - d);
    }
}
#endif // CPU_FORMS

// ---- gated residual -----------------------------------------------------------------------------

// GPU form: one group a row. CPU form: one item `chunk` rows.
KERNEL(128, 1)
void gate_residual_fwd(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), const GLOBAL act *VIEW(z),
                       const GLOBAL act *VIEW(mod), int width, int tokens, int mod_width, int gate,
                       int rows, int chunk)
{
    OFFSETS4(y, x, z, mod)
    size_t row = get_group_id(0);
    const GLOBAL act *mr = mod + row / tokens * mod_width + gate;
    if (((width | mod_width | gate) & 3) == 0) {
        for (int d = get_local_id(0) * 4; d < width; d += 4 * 128) {
            size_t i = row * width + d;
            float sum[4], by[4], add[4];
            load4(by, mr, d, ACT_IS_BF16);
            load4(add, z, i, ACT_IS_BF16);
            load4(sum, x, i, ACT_IS_BF16);
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum[j] = fma(by[j], add[j], sum[j]);
            store4(y, i, sum, ACT_IS_BF16);
        }
        return;
    }
    for (int d = get_local_id(0); d < width; d += 128) {
        size_t i = row * width + d;
        act_store(y, i, fma(act_load(mr, d), act_load(z, i), act_load(x, i)));
    }
}

// Group (k, n): rows k*chunk.. of image n; partial[n, k, width]: sums of dy * z.
KERNEL(128, 1)
void gate_residual_bwd(GLOBAL act *VIEW(dz), GLOBAL float *VIEW(partial),
                       const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(z),
                       const GLOBAL act *VIEW(mod), int width, int tokens, int mod_width, int gate,
                       int chunk)
{
    OFFSETS5(dz, partial, dy, z, mod)
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + gate;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * width;
    for (int d = get_local_id(0); d < width; d += 128) {
        float factor = act_load(mr, d), sum = 0.0f;
        for (int r = 0; r < count; r++) {
            size_t i = (n * tokens + first + r) * width + d;
            float g = act_load(dy, i);
            sum = fma(g, act_load(z, i), sum);
            act_store(dz, i, factor * g);
        }
        out[d] = sum;
    }
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void gate_residual_fwd_cpu(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x),
                           const GLOBAL act *VIEW(z), const GLOBAL act *VIEW(mod), int width,
                           int tokens, int mod_width, int gate, int rows, int chunk)
{
    OFFSETS4(y, x, z, mod)
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    for (size_t row = from; row < to; row++) {
        const GLOBAL act *mr = mod + row / tokens * mod_width + gate;
        for (int d = 0; d < width; d += 16) {
            size_t i = row * width + d;
            float16 v = fma(act_load_upto(mr + d, width - d), act_load_upto(z + i, width - d),
                            act_load_upto(x + i, width - d));
            act_store_upto(y + i, v, width - d);
        }
    }
}

KERNEL(1, 1)
void gate_residual_bwd_cpu(GLOBAL act *VIEW(dz), GLOBAL float *VIEW(partial),
                           const GLOBAL act *VIEW(dy), const GLOBAL act *VIEW(z),
                           const GLOBAL act *VIEW(mod), int width, int tokens, int mod_width,
                           int gate, int chunk)
{
    OFFSETS5(dz, partial, dy, z, mod)
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + gate;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * width;
    for (int d = 0; d < width; d += 16)
        float_store_upto(out + d, 0.0f, width - d);
    for (int r = 0; r < count; r++) {
        for (int d = 0; d < width; d += 16) {
            size_t i = (n * tokens + first + r) * width + d;
            float16 g = act_load_upto(dy + i, width - d);
            float16 sum = float_load_upto(out + d, width - d);
            sum = fma(g, act_load_upto(z + i, width - d), sum);
            float_store_upto(out + d, sum, width - d);
            act_store_upto(dz + i, g * act_load_upto(mr + d, width - d), width - d);
        }
    }
}
#endif // CPU_FORMS

// ---- LayerNorm of q and k, per head -------------------------------------------------------------

#define HEAD_MAX 128 // largest head size
#define LANES 8      // GPU forms: items a head vector; a group of 128 has 16 vectors

// Sum over the 8 items of one vector; all items of the group take part.
inline float lanes_sum(LOCAL_PTR float *sums, float value)
{
    int first = get_local_id(0) / LANES * LANES;
    float sum = 0.0f;
    sums[get_local_id(0)] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int i = 0; i < LANES; i++)
        sum += sums[first + i];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

// Vector v of qkv lies at v*hd and is head v % heads of part (v / heads) % 3: q, k or v.
// GPU form: 16 vectors a group. CPU form: one item `chunk` rows. copy: the v part is copied.
KERNEL(128, 1)
void qk_norm_fwd(GLOBAL act *VIEW(out), GLOBAL float *VIEW(stats), const GLOBAL act *VIEW(qkv),
                 const GLOBAL float *VIEW(wq), const GLOBAL float *VIEW(bq),
                 const GLOBAL float *VIEW(wk), const GLOBAL float *VIEW(bk), int heads, int hd,
                 int rows, int chunk, int copy)
{
    OFFSETS7(out, stats, qkv, wq, bq, wk, bk)
    LOCAL float sums[128];
    size_t vector = get_group_id(0) * (size_t)(128 / LANES) + get_local_id(0) / LANES;
    int lane = get_local_id(0) % LANES, inside = vector < (size_t)rows * 3 * heads;
    int part = vector / heads % 3, normed = inside && part < 2;
    const GLOBAL act *from = qkv + vector * hd;
    float sum = 0.0f, squares = 0.0f;
    for (int d = lane; normed && d < hd; d += LANES)
        sum += act_load(from, d);
    float mean = lanes_sum(sums, sum) / hd;
    for (int d = lane; normed && d < hd; d += LANES) {
        float v = act_load(from, d) - mean;
        squares = fma(v, v, squares);
    }
    float rstd = 1.0f / sqrt(lanes_sum(sums, squares) / hd + NORM_EPS);
    const GLOBAL float *w = part ? wk : wq, *b = part ? bk : bq;
    for (int d = lane; normed && d < hd; d += LANES)
        act_store(out, vector * hd + d, fma((act_load(from, d) - mean) * rstd, w[d], b[d]));
    for (int d = lane; inside && !normed && copy && d < hd; d += LANES)
        act_store(out, vector * hd + d, act_load(from, d));
    if (normed && lane == 0) {
        size_t i = (vector / (3 * heads) * 2 + part) * heads + vector % heads;
        stats[2 * i] = mean;
        stats[2 * i + 1] = rstd;
    }
}

// Group k: rows k*chunk..; partial[k, 4, hd]: gradients of wq, bq, wk, bk from these rows.
KERNEL(128, 1)
void qk_norm_bwd(GLOBAL act *VIEW(dqkv), GLOBAL float *VIEW(partial), const GLOBAL act *VIEW(qkv),
                 const GLOBAL float *VIEW(stats), const GLOBAL float *VIEW(wq),
                 const GLOBAL float *VIEW(wk), int heads, int hd, int rows, int chunk)
{
    OFFSETS6(dqkv, partial, qkv, stats, wq, wk)
    LOCAL float sums[128];
    LOCAL float slots[(128 / LANES) * HEAD_MAX];
    int slot = get_local_id(0) / LANES, lane = get_local_id(0) % LANES;
    int first = get_group_id(0) * chunk, count = min(chunk, rows - first) * heads;
    for (int part = 0; part < 2; part++) {
        const GLOBAL float *w = part ? wk : wq;
        float dw[HEAD_MAX / LANES], db[HEAD_MAX / LANES];
        for (int j = 0; j < HEAD_MAX / LANES; j++)
            dw[j] = db[j] = 0.0f;
        for (int start = 0; start < count; start += 128 / LANES) {
            int i = start + slot, inside = i < count;
            size_t row = first + (inside ? i / heads : 0), head = inside ? i % heads : 0;
            size_t at = ((row * 3 + part) * heads + head) * hd;
            float mean = stats[2 * ((row * 2 + part) * heads + head)];
            float rstd = stats[2 * ((row * 2 + part) * heads + head) + 1];
            float sum_g = 0.0f, sum_gx = 0.0f;
            for (int j = 0; j < HEAD_MAX / LANES; j++) {
                int d = j * LANES + lane;
                if (inside && d < hd) {
                    float g = act_load(dqkv, at + d);
                    float xhat = (act_load(qkv, at + d) - mean) * rstd;
                    dw[j] = fma(g, xhat, dw[j]);
                    db[j] += g;
                    sum_g = fma(g, w[d], sum_g);
                    sum_gx = fma(g * w[d], xhat, sum_gx);
                }
            }
            float mean_g = lanes_sum(sums, sum_g) / hd, mean_gx = lanes_sum(sums, sum_gx) / hd;
            for (int d = lane; inside && d < hd; d += LANES) {
                float xhat = (act_load(qkv, at + d) - mean) * rstd;
                float v = fma(act_load(dqkv, at + d), w[d], -mean_g) - xhat * mean_gx;
                act_store(dqkv, at + d, rstd * v);
            }
        }
        for (int which = 0; which < 2; which++) {
            for (int j = 0; j < HEAD_MAX / LANES; j++)
                slots[slot * HEAD_MAX + j * LANES + lane] = which ? db[j] : dw[j];
            barrier(CLK_LOCAL_MEM_FENCE);
            int d = get_local_id(0);
            float sum = 0.0f;
            for (int s = 0; s < 128 / LANES; s++)
                sum += slots[s * HEAD_MAX + d];
            if (d < hd)
                partial[((size_t)get_group_id(0) * 4 + part * 2 + which) * hd + d] = sum;
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
}

// Adds the partial sums of all chunks to the four parameter gradients.
KERNEL(64, 1)
void qk_norm_sum(GLOBAL float *VIEW(dwq), GLOBAL float *VIEW(dbq), GLOBAL float *VIEW(dwk),
                 GLOBAL float *VIEW(dbk), const GLOBAL float *VIEW(partial), int hd, int chunks)
{
    OFFSETS5(dwq, dbq, dwk, dbk, partial)
    int i = get_global_id(0), which = i / hd, d = i % hd;
    float sum = 0.0f;
    if (which >= 4)
        return;
    for (int k = 0; k < chunks; k++)
        sum += partial[(size_t)k * 4 * hd + i];
    GLOBAL float *to = which == 0 ? dwq : which == 1 ? dbq : which == 2 ? dwk : dbk;
    to[d] += sum;
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void qk_norm_fwd_cpu(GLOBAL act *VIEW(out), GLOBAL float *VIEW(stats), const GLOBAL act *VIEW(qkv),
                     const GLOBAL float *VIEW(wq), const GLOBAL float *VIEW(bq),
                     const GLOBAL float *VIEW(wk), const GLOBAL float *VIEW(bk), int heads, int hd,
                     int rows, int chunk, int copy)
{
    OFFSETS7(out, stats, qkv, wq, bq, wk, bk)
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    int width = heads * hd;
    for (size_t row = from; row < to; row++) {
        for (int vector = 0; vector < 2 * heads; vector++) {
            size_t at = row * 3 * width + (size_t)vector * hd;
            const GLOBAL float *w = vector < heads ? wq : wk, *b = vector < heads ? bq : bk;
            float16 sum = 0.0f, squares = 0.0f;
            for (int d = 0; d < hd; d += 16)
                sum += act_load_upto(qkv + at + d, hd - d);
            float mean = sum16(sum) / hd;
            for (int d = 0; d < hd; d += 16) {
                float16 v = first_lanes(act_load_upto(qkv + at + d, hd - d) - mean, hd - d);
                squares = fma(v, v, squares);
            }
            float rstd = 1.0f / sqrt(sum16(squares) / hd + NORM_EPS);
            for (int d = 0; d < hd; d += 16) {
                float16 v = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                v = fma(v, float_load_upto(w + d, hd - d), float_load_upto(b + d, hd - d));
                act_store_upto(out + at + d, v, hd - d);
            }
            stats[2 * (row * 2 * heads + vector)] = mean;
            stats[2 * (row * 2 * heads + vector) + 1] = rstd;
        }
        size_t at = row * 3 * width + 2 * (size_t)width;
        for (int d = 0; copy && d < width; d += 16)
            act_store_upto(out + at + d, act_load_upto(qkv + at + d, width - d), width - d);
    }
}

KERNEL(1, 1)
void qk_norm_bwd_cpu(GLOBAL act *VIEW(dqkv), GLOBAL float *VIEW(partial),
                     const GLOBAL act *VIEW(qkv), const GLOBAL float *VIEW(stats),
                     const GLOBAL float *VIEW(wq), const GLOBAL float *VIEW(wk), int heads, int hd,
                     int rows, int chunk)
{
    OFFSETS6(dqkv, partial, qkv, stats, wq, wk)
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    float16 sums[4][HEAD_MAX / 16];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HEAD_MAX / 16; j++)
            sums[i][j] = 0.0f;
    for (size_t row = from; row < to; row++) {
        for (int vector = 0; vector < 2 * heads; vector++) {
            size_t at = (row * 3 * heads + vector) * hd;
            int part = vector >= heads;
            const GLOBAL float *w = part ? wk : wq;
            float mean = stats[2 * (row * 2 * heads + vector)];
            float rstd = stats[2 * (row * 2 * heads + vector) + 1];
            float16 sum_g = 0.0f, sum_gx = 0.0f;
            for (int d = 0; d < hd; d += 16) {
                float16 g = act_load_upto(dqkv + at + d, hd - d);
                float16 xhat = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                float16 v = g * float_load_upto(w + d, hd - d);
                sums[2 * part][d / 16] = fma(g, xhat, sums[2 * part][d / 16]);
                sums[2 * part + 1][d / 16] += g;
                sum_g += v;
                sum_gx = fma(v, xhat, sum_gx);
            }
            float mean_g = sum16(sum_g) / hd, mean_gx = sum16(sum_gx) / hd;
            for (int d = 0; d < hd; d += 16) {
                float16 xhat = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                float16 v = act_load_upto(dqkv + at + d, hd - d) * float_load_upto(w + d, hd - d);
                act_store_upto(dqkv + at + d, rstd * (v - mean_g - xhat * mean_gx), hd - d);
            }
        }
    }
    GLOBAL float *to_sums = partial + get_group_id(0) * (size_t)(4 * hd);
    for (int i = 0; i < 4; i++)
        for (int d = 0; d < hd; d += 16)
            float_store_upto(to_sums + i * hd + d, sums[i][d / 16], hd - d);
}
#endif // CPU_FORMS

// ---- attention, GPU forms -----------------------------------------------------------------------
//
// Flash attention (arXiv 2205.14135) by tiles of 64 rows. Forward: a group of 64 items holds 64
// queries of one head of one image and walks over tiles of 64 keys. Both products are those of the
// matrix kernels' small tile: s = q k^T, an item's 8x8 of it, then o += p v, where p lies in local
// memory as [key][query]. Between them item i does the softmax of query i.

// Where a part (0 q, 1 k, 2 v) of a head starts in qkv; rows are 3*width apart.
inline size_t head_part(int part, int head_of_all, int heads, int tokens, int hd)
{
    size_t n = head_of_all / heads, h = head_of_all % heads;
    return ((n * tokens * 3 + part) * heads + h) * hd;
}

// Rows [first, rows) of a head, `pitch` elements apart; along_k: the sum runs over the head's size.
inline void head_side(struct gemm_side *side, const GLOBAL act *head, int first, int pitch,
                      int along_k, int count)
{
    side->p = head + (size_t)first * pitch;
    side->bf16 = ACT_IS_BF16;
    side->along_k = along_k;
    side->ld = pitch;
    side->count = count;
    side->halves = 0;
    side->jump = 0;
}

// acc += p b: p, in local memory, [k][GEMM_TILE_PITCH]; b by way of tb, 2 * GEMM_TILE_SIZE; `left`
// of k.
inline void gemm_add_sums(float acc[GEMM_ROWS_MAX][8], const LOCAL_PTR float *p,
                          LOCAL_PTR float *tb, int y, int x, struct gemm_side *b, int left,
                          int quads)
{
    const int pitch = GEMM_TILE_PITCH(GEMM_SMALL), size = GEMM_TILE_SIZE(GEMM_SMALL);
    int item = (int)get_local_id(0), now = 0;
    uint at[2], quad[2][4];
    gemm_quad_offsets(at, b, GEMM_SMALL, item);
    if (quads && left >= GEMM_STEP)
        gemm_bring_step(quad, b, at, ACT_IS_BF16);
    for (; left > 0; left -= GEMM_STEP) {
        if (quads && left >= GEMM_STEP)
            gemm_put_step(tb + now, GEMM_SMALL, quad, ACT_IS_BF16, 0, item);
        else
            gemm_put_singly(tb + now, GEMM_SMALL, b, left, item);
        barrier(CLK_LOCAL_MEM_FENCE);
        gemm_advance(b);
        if (quads && left >= 2 * GEMM_STEP)
            gemm_bring_step(quad, b, at, ACT_IS_BF16);
#pragma unroll
        for (int s = 0; s < GEMM_STEP; s++)
            gemm_multiply_add(acc, GEMM_SMALL, p + s * pitch + y, tb + now + s * pitch + x);
        p += size;
        now = size - now;
    }
}

// p[key][query] = the scores s of an item, times `scale`; keys from `keys` on count as impossible.
inline void attention_lay_scores(LOCAL_PTR float *p, float s[GEMM_ROWS_MAX][8], int y, int x,
                                 float scale, int keys)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int key = x + j % 4 + j / 4 * 32;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float v[4];
#pragma unroll
            for (int r = 0; r < 4; r++)
                v[r] = key < keys ? s[i + r][j] * scale : -INFINITY;
            gemm_lay(p + key * GEMM_TILE_PITCH(GEMM_SMALL) + y + i * 8, v);
        }
    }
}

// One query's column of p: scores (of 2^) become weights. *top: the largest score so far; *total:
// the sum of weights. Returns the factor by which what was summed before shrinks.
inline float attention_softmax(LOCAL_PTR float *p, float *top, float *total)
{
    const int pitch = GEMM_TILE_PITCH(GEMM_SMALL);
    float best[4], mass[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        best[j] = *top;
        mass[j] = 0.0f;
    }
    for (int key = 0; key < GEMM_SMALL; key += 4)
#pragma unroll
        for (int j = 0; j < 4; j++)
            best[j] = fmax(best[j], p[(key + j) * pitch]);
    best[0] = fmax(fmax(best[0], best[1]), fmax(best[2], best[3]));
    for (int key = 0; key < GEMM_SMALL; key += 4)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float e = exp2(p[(key + j) * pitch] - best[0]);
            p[(key + j) * pitch] = e;
            mass[j] += e;
        }
    float shrink = exp2(*top - best[0]);
    *top = best[0];
    *total = fma(*total, shrink, (mass[0] + mass[1]) + (mass[2] + mass[3]));
    return shrink;
}

inline void attention_scale_rows(float o[GEMM_ROWS_MAX][8], const LOCAL_PTR float *factor, int y)
{
    float f[8];
    gemm_take(f, factor + y);
    gemm_take(f + 4, factor + y + 32);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            o[i][j] *= f[i];
}

// Columns from `first` on of 64 rows of o.
inline void attention_store(GLOBAL act *o, float sum[GEMM_ROWS_MAX][8], int y, int x, int first,
                            int rows, int pitch, int hd)
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = y + i % 4 + i / 4 * 32;
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            int d = first + x + j * 8;
            if (row < rows)
                gemm_set(o, (size_t)row * pitch + d, sum[i] + j, hd - d, hd % 4 == 0, ACT_IS_BF16);
        }
    }
}

#define ATTENTION_ARGUMENTS(P)                                                            \
    GLOBAL act *P(o), GLOBAL float *P(lse), const GLOBAL act *P(qkv), int heads,          \
        int tokens, int hd, float scale, int write_lse, int all_heads, int key_block,     \
        int query_block, int per_item
#define ATTENTION_PASSED \
    o, lse, qkv, heads, tokens, hd, scale, write_lse, all_heads, key_block, query_block, per_item

// parts: of 64 columns of the head. tiles, p, factor: local; GEMM_SMALL's four tiles, 64 keys of 64
// queries, one factor a query.
inline void attention_rows(const int parts, LOCAL_PTR float *tiles, LOCAL_PTR float *p,
                           LOCAL_PTR float *factor, ATTENTION_ARGUMENTS(POINTER))
{
    int item = get_local_id(0), y = item % 8 * 4, x = item / 8 * 4; // p is written along queries
    int first = get_group_id(0) * GEMM_SMALL, head = get_group_id(1);
    int pitch = 3 * heads * hd, quads = hd % 4 == 0;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    struct gemm_side a, b;
    float s[GEMM_ROWS_MAX][8], sum[2][GEMM_ROWS_MAX][8], top = -INFINITY, total = 0.0f;
    gemm_zero(sum[0], GEMM_SMALL);
    if (parts > 1)
        gemm_zero(sum[1], GEMM_SMALL);
    for (int keys = 0; keys < tokens; keys += GEMM_SMALL) {
        head_side(&a, q, first, pitch, 1, tokens - first);
        head_side(&b, k, keys, pitch, 1, tokens - keys);
        gemm_sums(s, GEMM_SMALL, tiles, tiles + 2 * GEMM_TILE_SIZE(GEMM_SMALL), y, x, &a, &b, hd,
                  quads);
        attention_lay_scores(p, s, y, x, scale * 1.44269504f, tokens - keys);
        barrier(CLK_LOCAL_MEM_FENCE);
        factor[item] = attention_softmax(p + item, &top, &total);
        barrier(CLK_LOCAL_MEM_FENCE);
        attention_scale_rows(sum[0], factor, y);
        head_side(&b, v, keys, pitch, 0, hd);
        gemm_add_sums(sum[0], p, tiles, y, x, &b, min((int)GEMM_SMALL, tokens - keys), quads);
        barrier(CLK_LOCAL_MEM_FENCE);
        if (parts > 1) {
            attention_scale_rows(sum[1], factor, y);
            head_side(&b, v + GEMM_SMALL, keys, pitch, 0, hd - GEMM_SMALL);
            gemm_add_sums(sum[1], p, tiles, y, x, &b, min((int)GEMM_SMALL, tokens - keys), quads);
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
    factor[item] = 1.0f / total;
    barrier(CLK_LOCAL_MEM_FENCE);
    o += (((size_t)(head / heads) * tokens + first) * heads + head % heads) * hd;
    attention_scale_rows(sum[0], factor, y);
    attention_store(o, sum[0], y, x, 0, tokens - first, heads * hd, hd);
    if (parts > 1) {
        attention_scale_rows(sum[1], factor, y);
        attention_store(o, sum[1], y, x, GEMM_SMALL, tokens - first, heads * hd, hd);
    }
    if (write_lse && first + item < tokens)
        lse[(size_t)head * tokens + first + item] = fma(top, 0.69314718f, log(total));
}

#define ATTENTION_LOCAL                             \
    LOCAL float4 tiles[GEMM_TILE_SIZE(GEMM_SMALL)]; \
    LOCAL float4 p[GEMM_SMALL * GEMM_TILE_PITCH(GEMM_SMALL) / 4], factor[GEMM_SMALL / 4]

// Group (64 queries, head). Head sizes up to 64, and up to HEAD_MAX.
KERNEL(64, 1)
void attention_fwd(ATTENTION_ARGUMENTS(VIEW))
{
    OFFSETS3(o, lse, qkv)
    ATTENTION_LOCAL;
    attention_rows(1, (LOCAL_PTR float *)tiles, (LOCAL_PTR float *)p, (LOCAL_PTR float *)factor,
                   ATTENTION_PASSED);
}

KERNEL(64, 1)
void attention_wide_fwd(ATTENTION_ARGUMENTS(VIEW))
{
    OFFSETS3(o, lse, qkv)
    ATTENTION_LOCAL;
    attention_rows(2, (LOCAL_PTR float *)tiles, (LOCAL_PTR float *)p, (LOCAL_PTR float *)factor,
                   ATTENTION_PASSED);
}

// ---- attention, GPU forms: backward
//
// A group of 256 items (16 x 16) holds 64 rows (queries, or keys in attention_bwd_kv) and walks
// over tiles of 64 rows of the other side. Item (ty, tx) owns rows ty*4 + i of its tile, i < 4, and
// columns tx + 16*j: of the scores (j < 4) and of the head (j < 8). A product goes through local
// memory in slices of 16 along the summed axis.

#define TILE 64
#define SLICE 16
#define PITCH (TILE + 1)

// s[i][j] = sum over d of a[first_a + ty*4 + i, d] * b[first_b + tx + 16*j, d]; rows from `tokens`
// on count as 0. a, b: heads with rows pitch_a, pitch_b apart; sa, sb: SLICE * PITCH each.
inline void tile_scores(float s[4][4], const GLOBAL act *a, size_t pitch_a, int first_a,
                        const GLOBAL act *b, size_t pitch_b, int first_b, int tokens, int hd,
                        LOCAL_PTR float *sa, LOCAL_PTR float *sb)
{
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            s[i][j] = 0.0f;
    for (int from = 0; from < hd; from += SLICE) {
        for (int row = ty; row < TILE; row += 16) {
            int d = from + tx, ra = first_a + row, rb = first_b + row;
            sa[tx * PITCH + row] = d < hd && ra < tokens ? act_load(a, ra * pitch_a + d) : 0.0f;
            sb[tx * PITCH + row] = d < hd && rb < tokens ? act_load(b, rb * pitch_b + d) : 0.0f;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int k = 0; k < SLICE; k++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    s[i][j] = fma(sa[k * PITCH + ty * 4 + i], sb[k * PITCH + tx + 16 * j], s[i][j]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// sum[i][j] += sum over k < TILE of p[ty*4 + i, k] * b[first_b + k, tx + 16*j]; p: TILE * PITCH in
// local memory, written by the group just before (this function waits); sb: SLICE * HEAD_MAX.
inline void tile_product(float sum[4][8], LOCAL_PTR float *p, const GLOBAL act *b, size_t pitch_b,
                         int first_b, int tokens, int hd, LOCAL_PTR float *sb)
{
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    for (int from = 0; from < TILE; from += SLICE) {
        int rb = first_b + from + ty;
        for (int d = tx; d < HEAD_MAX; d += 16)
            sb[ty * HEAD_MAX + d] = d < hd && rb < tokens ? act_load(b, rb * pitch_b + d) : 0.0f;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int k = 0; k < SLICE; k++)
            for (int j = 0; j < 8; j++)
                if (16 * j < hd)
                    for (int i = 0; i < 4; i++)
                        sum[i][j] = fma(p[(ty * 4 + i) * PITCH + from + k],
                                        sb[k * HEAD_MAX + tx + 16 * j], sum[i][j]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// delta[n,h,t] = sum over d of do * o; one item a (n, t, h).
KERNEL(64, 1)
void attention_delta(GLOBAL float *VIEW(delta), const GLOBAL act *VIEW(dout),
                     const GLOBAL act *VIEW(o), int heads, int tokens, int hd, uint count)
{
    OFFSETS3(delta, dout, o)
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint h = i % heads, t = i / heads % tokens, n = i / heads / tokens;
    float sum = 0.0f;
    for (int d = 0; d < hd; d++)
        sum = fma(act_load(dout, (size_t)i * hd + d), act_load(o, (size_t)i * hd + d), sum);
    delta[((size_t)n * heads + h) * tokens + t] = sum;
}

// Group (k, head): dk and dv of 64 keys, over all queries.
KERNEL(256, 1)
void attention_bwd_kv(GLOBAL act *VIEW(dqkv), const GLOBAL float *VIEW(delta),
                      const GLOBAL act *VIEW(dout), const GLOBAL float *VIEW(lse),
                      const GLOBAL act *VIEW(qkv), int heads, int tokens, int hd, float scale)
{
    OFFSETS5(dqkv, delta, dout, lse, qkv)
    LOCAL float slices[2 * SLICE * PITCH];
    LOCAL float p[TILE * PITCH];
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    int first = get_group_id(0) * TILE, head = get_group_id(1);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    const GLOBAL act *g =
        dout + ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
    const GLOBAL float *lh = lse + (size_t)head * tokens, *dh = delta + (size_t)head * tokens;
    float s[4][4], ds[4][4], dk[4][8], dv[4][8];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            dk[i][j] = dv[i][j] = 0.0f;
    for (int queries = 0; queries < tokens; queries += TILE) {
        // transposed: rows are keys, columns queries
        tile_scores(s, k, pitch, first, q, pitch, queries, tokens, hd, slices,
                    slices + SLICE * PITCH);
        tile_scores(ds, v, pitch, first, g, pitch_o, queries, tokens, hd, slices,
                    slices + SLICE * PITCH);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                int t = queries + tx + 16 * j;
                s[i][j] = t < tokens ? exp(fma(s[i][j], scale, -lh[t])) : 0.0f;
                ds[i][j] = t < tokens ? s[i][j] * (ds[i][j] - dh[t]) * scale : 0.0f;
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = s[i][j];
            }
        tile_product(dv, p, g, pitch_o, queries, tokens, hd, slices);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = ds[i][j];
        tile_product(dk, p, q, pitch, queries, tokens, hd, slices);
    }
    GLOBAL act *to = dqkv + head_part(1, head, heads, tokens, hd);
    for (int i = 0; i < 4; i++) {
        int row = first + ty * 4 + i;
        for (int j = 0; j < 8; j++) {
            int d = tx + 16 * j;
            if (row < tokens && d < hd) {
                act_store(to, row * pitch + d, dk[i][j]);
                act_store(to, row * pitch + pitch_o + d, dv[i][j]);
            }
        }
    }
}

// Group (q, head): dq of 64 queries, over all keys.
KERNEL(256, 1)
void attention_bwd_q(GLOBAL act *VIEW(dqkv), const GLOBAL float *VIEW(delta),
                     const GLOBAL act *VIEW(dout), const GLOBAL float *VIEW(lse),
                     const GLOBAL act *VIEW(qkv), int heads, int tokens, int hd, float scale)
{
    OFFSETS5(dqkv, delta, dout, lse, qkv)
    LOCAL float slices[2 * SLICE * PITCH];
    LOCAL float p[TILE * PITCH];
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    int first = get_group_id(0) * TILE, head = get_group_id(1);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    const GLOBAL act *g =
        dout + ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
    const GLOBAL float *lh = lse + (size_t)head * tokens, *dh = delta + (size_t)head * tokens;
    float s[4][4], ds[4][4], dq[4][8];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            dq[i][j] = 0.0f;
    for (int keys = 0; keys < tokens; keys += TILE) {
        tile_scores(s, q, pitch, first, k, pitch, keys, tokens, hd, slices, slices + SLICE * PITCH);
        tile_scores(ds, g, pitch_o, first, v, pitch, keys, tokens, hd, slices,
                    slices + SLICE * PITCH);
        for (int i = 0; i < 4; i++) {
            int t = min(first + ty * 4 + i, tokens - 1);
            for (int j = 0; j < 4; j++) {
                float e = exp(fma(s[i][j], scale, -lh[t])) * (ds[i][j] - dh[t]) * scale;
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = keys + tx + 16 * j < tokens ? e : 0.0f;
            }
        }
        tile_product(dq, p, k, pitch, keys, tokens, hd, slices);
    }
    GLOBAL act *to = dqkv + head_part(0, head, heads, tokens, hd);
    for (int i = 0; i < 4; i++) {
        int row = first + ty * 4 + i;
        for (int j = 0; j < 8; j++)
            if (row < tokens && tx + 16 * j < hd)
                act_store(to, row * pitch + tx + 16 * j, dq[i][j]);
    }
}

#ifdef CPU_FORMS
// ---- attention, CPU forms -----------------------------------------------------------------------
//
// One item = some heads, or a block of queries of one. All is done in private memory that stays in
// the core's L2: tiles are packed as f32, padded to vectors, and multiplied by small_product().

#define ARENA_FWD 57344 // floats of private memory an item; runtime/ops_attention.c fits blocks to it
#define ARENA_BWD 65536

// Functions of their own: inlined at every call they compile for twice as long and run no faster.
#define APART static __attribute__((noinline))

// c[m,n] (+)= a b. a is read at a[i*row + k*step], b at b[k*ldb + j]. m a multiple of 8, n of 16.
APART void small_product(float *c, int ldc, const float *a, int row, int step, const float *b,
                          int ldb, int m, int n, int depth, int add)
{
    int j = 0;
    for (; j + 32 <= n; j += 32) {
        for (int i = 0; i < m; i += 8) {
            float16 lo[8], hi[8];
#pragma unroll
            for (int r = 0; r < 8; r++)
                lo[r] = hi[r] = 0.0f;
            const float *ai = a + i * row, *bj = b + j;
            for (int k = 0; k < depth; k++) {
                float16 b0 = vload16(0, bj), b1 = vload16(1, bj);
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    lo[r] = fma((float16)(ai[r * row]), b0, lo[r]);
                    hi[r] = fma((float16)(ai[r * row]), b1, hi[r]);
                }
                ai += step;
                bj += ldb;
            }
            float *to = c + i * ldc + j;
#pragma unroll
            for (int r = 0; r < 8; r++) {
                vstore16(add ? lo[r] + vload16(0, to + r * ldc) : lo[r], 0, to + r * ldc);
                vstore16(add ? hi[r] + vload16(1, to + r * ldc) : hi[r], 1, to + r * ldc);
            }
        }
    }
    for (int i = 0; j < n && i < m; i += 8) {
        float16 sum[8];
#pragma unroll
        for (int r = 0; r < 8; r++)
            sum[r] = 0.0f;
        const float *ai = a + i * row, *bj = b + j;
        for (int k = 0; k < depth; k++) {
            float16 b0 = vload16(0, bj);
#pragma unroll
            for (int r = 0; r < 8; r++)
                sum[r] = fma((float16)(ai[r * row]), b0, sum[r]);
            ai += step;
            bj += ldb;
        }
        float *to = c + i * ldc + j;
#pragma unroll
        for (int r = 0; r < 8; r++)
            vstore16(add ? sum[r] + vload16(0, to + r * ldc) : sum[r], 0, to + r * ldc);
    }
}

// to[rows, ld] = factor * from[rows, hd], padded with 0 to `padded` rows and `ld` columns
APART void pack_rows(float *to, int ld, const GLOBAL act *from, size_t pitch, int rows, int padded,
                      int hd, float factor)
{
    for (int i = 0; i < padded; i++)
        for (int d = 0; d < ld; d += 16) {
            float16 v = i < rows ? act_load_upto(from + i * pitch + d, hd - d) : (float16)(0.0f);
            vstore16(v * factor, 0, to + i * ld + d);
        }
}

// to[d, ld] = from[rows, hd] transposed, padded with 0 to `ld` columns and a multiple of 16 rows:
// blocks of 16 x 16 go through four perfect shuffles of their rows.
APART void pack_columns(float *to, int ld, const GLOBAL act *from, size_t pitch, int rows, int hd)
{
    for (int i = 0; i < ld; i += 16)
        for (int d = 0; d < hd; d += 16) {
            float16 r[16], t[16];
#pragma unroll
            for (int k = 0; k < 16; k++)
                r[k] = i + k < rows ? act_load_upto(from + (i + k) * pitch + d, hd - d)
                                    : (float16)(0.0f);
#pragma unroll
            for (int stage = 0; stage < 4; stage++) {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    t[2 * k].even = r[k].lo;
                    t[2 * k].odd = r[k + 8].lo;
                    t[2 * k + 1].even = r[k].hi;
                    t[2 * k + 1].odd = r[k + 8].hi;
                }
#pragma unroll
                for (int k = 0; k < 16; k++)
                    r[k] = t[k];
            }
#pragma unroll
            for (int k = 0; k < 16; k++)
                vstore16(r[k], 0, to + (d + k) * ld + i);
        }
}

// One block of keys for 8 queries: scores -> probabilities, running maximum and sum, and the factor
// that earlier sums shrink by.
APART void softmax_step(float *s, int ld, int keys, float *top, float *total, float *shrink)
{
    for (int r = 0; r < 8; r++) {
        float *row = s + r * ld;
        float16 best = -INFINITY, mass = 0.0f;
        int j = 0;
        for (; j + 16 <= keys; j += 16)
            best = fmax(best, vload16(0, row + j));
        if (j < keys) { // lanes past the last key take no part
            for (int lane = keys; lane < ld; lane++)
                row[lane] = -INFINITY;
            best = fmax(best, vload16(0, row + j));
        }
        float m = fmax(top[r], max16(best));
        for (j = 0; j + 16 <= keys; j += 16) {
            float16 e = exp16(vload16(0, row + j) - m);
            vstore16(e, 0, row + j);
            mass += e;
        }
        if (j < keys) {
            float16 e = first_lanes(exp16(vload16(0, row + j) - m), keys - j);
            vstore16(e, 0, row + j);
            mass += e;
        }
        shrink[r] = exp(top[r] - m);
        total[r] = fma(total[r], shrink[r], sum16(mass));
        top[r] = m;
    }
}

KERNEL(1, 1)
void attention_fwd_cpu(GLOBAL act *VIEW(o), GLOBAL float *VIEW(lse), const GLOBAL act *VIEW(qkv),
                       int heads, int tokens, int hd, float scale, int write_lse, int all_heads,
                       int key_block, int query_block, int per_item)
{
    OFFSETS3(o, lse, qkv)
    float arena[ARENA_FWD];
    int ld = (hd + 15) / 16 * 16, last = min((int)get_group_id(1) * per_item + per_item, all_heads);
    int first = get_group_id(0) * query_block, queries = min(query_block, tokens - first);
    int padded = (queries + 7) / 8 * 8;
    size_t pitch = (size_t)3 * heads * hd;
    float *kt = arena, *v = kt + key_block * ld, *s = v + key_block * ld;
    float *q = s + 8 * key_block, *sum = q + padded * ld, *top = sum + padded * ld;
    float *total = top + padded;
    for (int head = get_group_id(1) * per_item; head < last; head++) {
        const GLOBAL act *from = qkv + head_part(0, head, heads, tokens, hd);
        pack_rows(q, ld, from + first * pitch, pitch, queries, padded, hd, scale);
        for (int i = 0; i < padded; i++) {
            top[i] = -INFINITY;
            total[i] = 0.0f;
        }
        for (int key = 0; key < tokens; key += key_block) {
            int keys = min(key_block, tokens - key), ldk = (keys + 15) / 16 * 16;
            const GLOBAL act *k = from + key * pitch + heads * hd;
            pack_columns(kt, ldk, k, pitch, keys, hd);
            pack_rows(v, ld, k + heads * hd, pitch, keys, keys, hd, 1.0f);
            for (int i = 0; i < padded; i += 8) {
                float shrink[8];
                small_product(s, ldk, q + i * ld, ld, 1, kt, ldk, 8, ldk, hd, 0);
                softmax_step(s, ldk, keys, top + i, total + i, shrink);
                for (int r = 0; key > 0 && r < 8; r++)
                    for (int d = 0; d < ld; d += 16) {
                        float *at = sum + (i + r) * ld + d;
                        vstore16(vload16(0, at) * shrink[r], 0, at);
                    }
                small_product(sum + i * ld, ld, s, ldk, 1, v, ld, 8, ld, keys, key > 0);
            }
        }
        size_t row = (size_t)(head / heads) * tokens + first;
        for (int i = 0; i < queries; i++) {
            for (int d = 0; d < hd; d += 16)
                act_store_upto(o + ((row + i) * heads + head % heads) * hd + d,
                               vload16(0, sum + i * ld + d) / total[i], hd - d);
            if (write_lse)
                lse[(size_t)head * tokens + first + i] = top[i] + log(total[i]);
        }
    }
}

// Probabilities from scores and lse, then ds from dp: s becomes p, dp becomes ds. Columns from
// `keys` and rows from `rows` on become 0.
APART void softmax_back(float *s, float *dp, int ld, int rows, int padded, int keys, float scale,
                         const GLOBAL float *lse, const float *delta)
{
    for (int i = 0; i < padded; i++) {
        float l = i < rows ? lse[i] : INFINITY, d = i < rows ? delta[i] : 0.0f;
        for (int j = 0; j < ld; j += 16) {
            float16 p = exp16(fma(vload16(0, s + i * ld + j), (float16)(scale), (float16)(-l)));
            if (i >= rows || j + 16 > keys)
                p = first_lanes(p, i < rows ? keys - j : 0);
            float16 ds = p * (vload16(0, dp + i * ld + j) - d) * scale;
            vstore16(p, 0, s + i * ld + j);
            vstore16(ds, 0, dp + i * ld + j);
        }
    }
}

// One item does `per_item` heads: for each block of keys, for each block of queries. dq sums over
// blocks of keys in `space`, [all heads, padded queries, ld] f32, when there is more than one.
KERNEL(1, 1)
void attention_bwd_cpu(GLOBAL act *VIEW(dqkv), GLOBAL float *VIEW(delta),
                       const GLOBAL act *VIEW(dout), const GLOBAL act *VIEW(o),
                       const GLOBAL float *VIEW(lse), const GLOBAL act *VIEW(qkv),
                       GLOBAL float *VIEW(space), int heads, int tokens, int hd, float scale,
                       int all_heads, int key_block, int query_block, int per_item)
{
    OFFSETS7(dqkv, delta, dout, o, lse, qkv, space)
    float arena[ARENA_BWD];
    int ld = (hd + 15) / 16 * 16, last = min((int)get_group_id(0) * per_item + per_item, all_heads);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    int blocks = (tokens + query_block - 1) / query_block;
    float *kt = arena, *vt = kt + key_block * ld, *k = vt + key_block * ld;
    float *dk = k + key_block * ld, *dv = dk + key_block * ld, *s = dv + key_block * ld;
    float *dp = s + key_block * query_block, *q = dp + key_block * query_block;
    float *g = q + query_block * ld, *dq = g + query_block * ld, *rowsum = dq + query_block * ld;
    for (int head = get_group_id(0) * per_item; head < last; head++) {
        size_t at = head_part(0, head, heads, tokens, hd);
        size_t at_o = ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
        GLOBAL float *dq_sum = space + (size_t)head * blocks * query_block * ld;
        for (int key = 0; key < tokens; key += key_block) {
            int keys = min(key_block, tokens - key), ldk = (keys + 15) / 16 * 16;
            const GLOBAL act *from = qkv + at + key * pitch + pitch_o;
            pack_columns(kt, ldk, from, pitch, keys, hd);
            pack_columns(vt, ldk, from + pitch_o, pitch, keys, hd);
            pack_rows(k, ld, from, pitch, keys, ldk, hd, 1.0f);
            for (int query = 0; query < tokens; query += query_block) {
                int rows = min(query_block, tokens - query), padded = (rows + 7) / 8 * 8;
                pack_rows(q, ld, qkv + at + query * pitch, pitch, rows, padded, hd, 1.0f);
                pack_rows(g, ld, dout + at_o + query * pitch_o, pitch_o, rows, padded, hd, 1.0f);
                for (int i = 0; i < rows; i++) {
                    float16 sum = 0.0f;
                    for (int d = 0; key == 0 && d < ld; d += 16)
                        sum = fma(vload16(0, g + i * ld + d),
                                  act_load_upto(o + at_o + (query + i) * pitch_o + d, hd - d), sum);
                    if (key == 0)
                        delta[(size_t)head * tokens + query + i] = sum16(sum);
                    rowsum[i] = delta[(size_t)head * tokens + query + i];
                }
                small_product(s, ldk, q, ld, 1, kt, ldk, padded, ldk, hd, 0);
                small_product(dp, ldk, g, ld, 1, vt, ldk, padded, ldk, hd, 0);
                softmax_back(s, dp, ldk, rows, padded, keys, scale,
                             lse + (size_t)head * tokens + query, rowsum);
                small_product(dv, ld, s, 1, ldk, g, ld, ldk, ld, rows, query > 0);
                small_product(dk, ld, dp, 1, ldk, q, ld, ldk, ld, rows, query > 0);
                small_product(dq, ld, dp, ldk, 1, k, ld, padded, ld, keys, 0);
                for (int i = 0; i < rows; i++)
                    for (int d = 0; d < ld; d += 16) {
                        GLOBAL float *sum = dq_sum + (size_t)(query + i) * ld + d;
                        float16 v = vload16(0, dq + i * ld + d);
                        if (key > 0)
                            v += vload16(0, sum);
                        if (key + keys < tokens)
                            vstore16(v, 0, sum);
                        else
                            act_store_upto(dqkv + at + (query + i) * pitch + d, v, hd - d);
                    }
            }
            GLOBAL act *to = dqkv + at + key * pitch + pitch_o;
            for (int i = 0; i < keys; i++)
                for (int d = 0; d < hd; d += 16) {
                    act_store_upto(to + i * pitch + d, vload16(0, dk + i * ld + d), hd - d);
                    act_store_upto(to + i * pitch + pitch_o + d, vload16(0, dv + i * ld + d), hd - d);
                }
        }
    }
}
#endif // CPU_FORMS

// ---- mixture of experts -------------------------------------------------------------------------
//
// Letters as in runtime/tensor.h: M tokens, K choices a token, R = M*K routed rows, D columns, E
// experts. GPU forms of row operations: x covers the columns, y strides over the rows, so that no
// index needs a division. CPU forms: a work-item takes `chunk` rows.

// The expert that row r of rows sorted by expert belongs to.
inline uint expert_of(const GLOBAL int *offsets, uint E, uint r)
{
    uint e = 0, end = E;
    while (end - e > 1) {
        uint middle = (e + end) / 2;
        if ((uint)offsets[middle] <= r)
            e = middle;
        else
            end = middle;
    }
    return e;
}

// y[R,O] += bias[E,O] of each row's expert
KERNEL(256, 1)
void expert_bias_fwd(GLOBAL act *VIEW(y), const GLOBAL float *VIEW(bias),
                     const GLOBAL int *VIEW(offsets), uint R, uint O, uint E)
{
    OFFSETS3(y, bias, offsets)
    size_t o = get_global_id(0);
    if (o >= O)
        return;
    for (uint r = (uint)get_group_id(1); r < R; r += (uint)get_num_groups(1)) {
        size_t at = (size_t)r * O + o;
        act_store(y, at, act_load(y, at) + bias[(size_t)expert_of(offsets, E, r) * O + o]);
    }
}

// dbias[E,O] += sums of dy[R,O] over the rows of each expert. Groups: (O / 64, E).
KERNEL(64, 1)
void expert_bias_bwd(GLOBAL float *VIEW(dbias), const GLOBAL act *VIEW(dy),
                     const GLOBAL int *VIEW(offsets), uint O)
{
    OFFSETS3(dbias, dy, offsets)
    size_t o = get_global_id(0), e = get_group_id(1);
    if (o >= O)
        return;
    float sum = 0.0f;
    for (int r = offsets[e]; r < offsets[e + 1]; r++)
        sum += act_load(dy, (size_t)r * O + o);
    dbias[e * O + o] += sum;
}

// h[R,F] = silu(g) * u, gu[R,2F] = g | u
KERNEL(256, 1)
void swiglu_fwd(GLOBAL act *VIEW(h), const GLOBAL act *VIEW(gu), uint R, uint F)
{
    OFFSETS2(h, gu)
    size_t f = get_global_id(0);
    if (f >= F)
        return;
    for (size_t r = get_group_id(1); r < R; r += get_num_groups(1)) {
        float g = act_load(gu, r * 2 * F + f), u = act_load(gu, r * 2 * F + F + f);
        act_store(h, r * F + f, g * sigmoid(g) * u);
    }
}

// dg = dh u s (1 + g (1-s)), du = dh g s with s = sigmoid(g). dgu may be gu.
KERNEL(256, 1)
void swiglu_bwd(GLOBAL act *VIEW(dgu), const GLOBAL act *VIEW(dh), const GLOBAL act *VIEW(gu),
                uint R, uint F)
{
    OFFSETS3(dgu, dh, gu)
    size_t f = get_global_id(0);
    if (f >= F)
        return;
    for (size_t r = get_group_id(1); r < R; r += get_num_groups(1)) {
        size_t at = r * 2 * F + f;
        float g = act_load(gu, at), u = act_load(gu, at + F), d = act_load(dh, r * F + f);
        float s = sigmoid(g);
        act_store(dgu, at, d * u * s * fma(g, 1.0f - s, 1.0f));
        act_store(dgu, at + F, d * g * s);
    }
}

// Where items take an element of [.., D] each, or four where D allows: item i has row i / places(D)
// and columns from i % places(D) * (D / places(D)) on. The host counts the groups so (ops_moe.c).
inline uint places(uint D)
{
    return D % 4 == 0 ? D / 4 : D;
}

// rows[R,D] = x[token[r],:]. An item a place.
KERNEL(256, 1)
void dispatch_fwd(GLOBAL act *VIEW(rows), const GLOBAL act *VIEW(x), const GLOBAL int *VIEW(token),
                  uint R, uint D)
{
    OFFSETS3(rows, x, token)
    uint i = get_global_id(0);
    size_t r = i / places(D), d = i % places(D) * (D / places(D));
    if (r >= R)
        return;
    size_t from = (size_t)token[r] * D + d;
    if (D % 4 == 0) {
        float v[4];
        load4(v, x, from, ACT_IS_BF16);
        store4(rows, r * D + d, v, ACT_IS_BF16);
    } else {
        rows[r * D + d] = x[from];
    }
}

// dx[M,D] += sum over k of drows[slot[m,k],:]
KERNEL(256, 1)
void dispatch_bwd(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(drows), const GLOBAL int *VIEW(slot),
                  uint M, uint K, uint D)
{
    OFFSETS3(dx, drows, slot)
    size_t d = get_global_id(0);
    if (d >= D)
        return;
    for (size_t m = get_group_id(1); m < M; m += get_num_groups(1)) {
        float sum = act_load(dx, m * D + d);
        for (uint k = 0; k < K; k++)
            sum += act_load(drows, (size_t)slot[m * K + k] * D + d);
        act_store(dx, m * D + d, sum);
    }
}

// out[M,D] = sum over k of weight[m,k] rows[slot[m,k],:] (+ shared[m,:] unless NULL). An item a
// place.
KERNEL(256, 1)
void combine_fwd(GLOBAL act *VIEW(out), const GLOBAL act *VIEW(rows), const GLOBAL int *VIEW(slot),
                 const GLOBAL float *VIEW(weight), const GLOBAL act *VIEW(shared), uint M, uint K,
                 uint D)
{
    OFFSETS5(out, rows, slot, weight, shared)
    uint i = get_global_id(0);
    size_t m = i / places(D), d = i % places(D) * (D / places(D));
    if (m >= M)
        return;
    if (D % 4 == 0) {
        float sum[4], v[4];
        sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        if (shared)
            load4(sum, shared, m * D + d, ACT_IS_BF16);
        for (uint k = 0; k < K; k++) {
            float w = weight[m * K + k];
            load4(v, rows, (size_t)slot[m * K + k] * D + d, ACT_IS_BF16);
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum[j] = fma(w, v[j], sum[j]);
        }
        store4(out, m * D + d, sum, ACT_IS_BF16);
    } else {
        float sum = shared ? act_load(shared, m * D + d) : 0.0f;
        for (uint k = 0; k < K; k++)
            sum = fma(weight[m * K + k], act_load(rows, (size_t)slot[m * K + k] * D + d), sum);
        act_store(out, m * D + d, sum);
    }
}

// drows[slot[m,k],:] = weight[m,k] dout[m,:]; dweight[m,k] = <dout[m,:], rows[slot[m,k],:]>.
// drows may be rows: an element is read before the same work-item writes it. Without rows there is
// no dweight. A work-group a pair (m,k).
KERNEL(64, 1)
void combine_bwd(GLOBAL act *VIEW(drows), GLOBAL float *VIEW(dweight), const GLOBAL act *VIEW(dout),
                 const GLOBAL act *VIEW(rows), const GLOBAL int *VIEW(slot),
                 const GLOBAL float *VIEW(weight), uint R, uint K, uint D)
{
    OFFSETS6(drows, dweight, dout, rows, slot, weight)
    LOCAL float sums[64];
    uint i = get_local_id(0);
    for (size_t pair = get_group_id(0); pair < R; pair += get_num_groups(0)) {
        size_t row = (size_t)slot[pair] * D, m = pair / K * D;
        float w = weight[pair], sum = 0.0f;
        for (uint d = i; d < D; d += 64) {
            float g = act_load(dout, m + d);
            if (rows)
                sum = fma(g, act_load(rows, row + d), sum);
            act_store(drows, row + d, w * g);
        }
        sums[i] = sum;
        for (uint step = 32; step > 0; step /= 2) {
            barrier(CLK_LOCAL_MEM_FENCE);
            if (i < step)
                sums[i] += sums[i + step];
        }
        if (i == 0 && rows)
            dweight[pair] = sums[0];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// dweight[pair] = sum over parts of dots[part,slot[pair]] / weight[pair], 0 where the weight is 0:
// what comes of it is multiplied by the choice's probability. A work-item a pair.
KERNEL(64, 1)
void combine_weight_bwd(GLOBAL float *VIEW(dweight), const GLOBAL float *VIEW(dots),
                        const GLOBAL int *VIEW(slot), const GLOBAL float *VIEW(weight), uint R,
                        uint parts)
{
    OFFSETS4(dweight, dots, slot, weight)
    size_t pair = get_global_id(0);
    if (pair >= R)
        return;
    size_t row = (size_t)slot[pair];
    float sum = 0.0f, w = weight[pair];
    for (uint i = 0; i < parts; i++)
        sum += dots[(size_t)i * R + row];
    dweight[pair] = w != 0.0f ? sum / w : 0.0f;
}

// ---- router

// The K largest probabilities of a row in descending order, ties to the lower expert. NaN counts as
// less than any probability, so that K distinct indices come out of every row.
inline void top_k(GLOBAL float *weight, GLOBAL int *index, const GLOBAL float *p, uint E, uint K,
                  int renormalise)
{
    float last = 2.0f, sum = 0.0f;
    int last_expert = -1;
    for (uint k = 0; k < K; k++) {
        float best = -2.0f;
        int expert = 0;
        for (int e = 0; e < (int)E; e++) {
            float q = p[e] >= 0.0f ? p[e] : -1.0f;
            int left = (q < last) | ((q == last) & (e > last_expert));
            int better = left & (q > best); // no branches: they would be guessed wrong
            best = better ? q : best;
            expert = better ? e : expert;
        }
        last = best;
        last_expert = expert;
        index[k] = expert;
        weight[k] = p[expert];
        sum += p[expert];
    }
    if (renormalise && K > 1)
        for (uint k = 0; k < K; k++)
            weight[k] = weight[k] / (sum + 1e-20f);
}

// probs[M,E] = softmax(logits); weight[M,K], index[M,K]. A work-item a row.
KERNEL(64, 1)
void router_fwd(GLOBAL float *VIEW(probs), GLOBAL float *VIEW(weight), GLOBAL int *VIEW(index),
                const GLOBAL float *VIEW(logits), uint M, uint E, uint K, int renormalise)
{
    OFFSETS4(probs, weight, index, logits)
    size_t m = get_global_id(0);
    if (m >= M)
        return;
    const GLOBAL float *x = logits + m * E;
    GLOBAL float *p = probs + m * E;
    float most = -INFINITY, sum = 0.0f;
    for (uint e = 0; e < E; e++)
        most = x[e] > most ? x[e] : most;
    for (uint e = 0; e < E; e++) {
        p[e] = exp(x[e] - most);
        sum += p[e];
    }
    for (uint e = 0; e < E; e++)
        p[e] = p[e] / sum;
    top_k(weight + m * K, index + m * K, p, E, K, renormalise);
}

// The gradient of the k-th chosen probability of a row: of its weight, and where the weights are
// divided by their sum `s` (`mean` = sum_k dweight_k p_k / s), of that.
inline float choice_gradient(const GLOBAL float *dweight, uint k, float s, float mean)
{
    return s > 0.0f ? (dweight[k] - mean) / s : dweight[k];
}

// The sum that a row's weights were divided by, 0 when they were not; and `mean` as above.
inline float choice_sum(const GLOBAL float *dweight, const GLOBAL float *p, const GLOBAL int *index,
                        uint K, int renormalise, float *mean)
{
    float s = 0.0f, dot = 0.0f;
    *mean = 0.0f;
    if (!renormalise || K < 2)
        return 0.0f;
    for (uint k = 0; k < K; k++) {
        s += p[index[k]];
        dot = fma(dweight[k], p[index[k]], dot);
    }
    s += 1e-20f;
    *mean = dot / s;
    return s;
}

// dlogits[M,E] = p (dp - <p, dp>), dp = balance * fraction[g,:] plus the choices' gradients;
// balance is alpha / M, `rows` the rows of a group.
KERNEL(64, 1)
void router_bwd(GLOBAL float *VIEW(dlogits), const GLOBAL float *VIEW(dweight),
                const GLOBAL float *VIEW(probs), const GLOBAL int *VIEW(index),
                const GLOBAL float *VIEW(fraction), float balance, uint M, uint E, uint K,
                uint rows, int renormalise)
{
    OFFSETS5(dlogits, dweight, probs, index, fraction)
    size_t m = get_global_id(0);
    if (m >= M)
        return;
    const GLOBAL float *p = probs + m * E, *dw = dweight + m * K;
    const GLOBAL float *f = fraction + m / rows * E;
    const GLOBAL int *chosen = index + m * K;
    GLOBAL float *out = dlogits + m * E;
    float mean, dot = 0.0f, s = choice_sum(dw, p, chosen, K, renormalise, &mean);
    if (balance != 0.0f)
        for (uint e = 0; e < E; e++)
            dot = fma(p[e] * balance, f[e], dot);
    for (uint k = 0; k < K; k++)
        dot = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), dot);
    for (uint e = 0; e < E; e++)
        out[e] = p[e] * (balance != 0.0f ? fma(balance, f[e], -dot) : -dot);
    for (uint k = 0; k < K; k++)
        out[chosen[k]] = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), out[chosen[k]]);
}

// ---- routing: a stable counting sort of the R pairs by expert
//
// Chunks of pairs are counted (count[chunk,E]), the counts of each expert are summed over the
// chunks before and the experts over the experts before, and every chunk then places its own pairs.

// `chunk` is a multiple of 256. Counting and ranking compare with a tile in local memory: no
// atomics.
KERNEL(256, 1)
void route_count(GLOBAL int *VIEW(count), const GLOBAL int *VIEW(index), uint R, uint E, uint chunk)
{
    OFFSETS2(count, index)
    LOCAL int tile[256];
    uint i = get_local_id(0);
    int low = 0, high = 0; // of experts i and i + 256
    size_t from = get_group_id(0) * (size_t)chunk;
    for (size_t at = from; at < from + chunk && at < R; at += 256) {
        tile[i] = at + i < R ? index[at + i] : -1;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint j = 0; j < 256; j++) {
            low += tile[j] == (int)i;
            high += tile[j] == (int)i + 256;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (i < E)
        count[get_group_id(0) * E + i] = low;
    if (i + 256 < E)
        count[get_group_id(0) * E + i + 256] = high;
}

// count[chunk,e] becomes the number of e in the chunks before; offsets[E+1]. One work-group.
KERNEL(64, 1)
void route_scan(GLOBAL int *VIEW(offsets), GLOBAL int *VIEW(count), uint chunks, uint E)
{
    OFFSETS2(offsets, count)
    LOCAL int total[512];
    for (uint e = get_local_id(0); e < E; e += 64) {
        int sum = 0;
        for (uint c = 0; c < chunks; c++) {
            int n = count[c * E + e];
            count[c * E + e] = sum;
            sum += n;
        }
        total[e] = sum;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        int sum = 0;
        for (uint e = 0; e < E; e++) {
            offsets[e] = sum;
            sum += total[e];
        }
        offsets[E] = sum;
    }
}

KERNEL(256, 1)
void route_place(GLOBAL int *VIEW(slot), GLOBAL int *VIEW(token), const GLOBAL int *VIEW(index),
                 const GLOBAL int *VIEW(offsets), const GLOBAL int *VIEW(count), uint R, uint K,
                 uint E, uint chunk)
{
    OFFSETS5(slot, token, index, offsets, count)
    LOCAL int tile[256];
    LOCAL int next[512]; // the next free row of each expert
    uint i = get_local_id(0);
    size_t from = get_group_id(0) * (size_t)chunk;
    for (uint e = i; e < E; e += 256)
        next[e] = offsets[e] + count[get_group_id(0) * E + e];
    for (size_t at = from; at < from + chunk && at < R; at += 256) {
        int expert = at + i < R ? index[at + i] : -1;
        int rank = 0, low = 0, high = 0;
        tile[i] = expert;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint j = 0; j < 256; j++) {
            rank += j < i && tile[j] == expert;
            low += tile[j] == (int)i;
            high += tile[j] == (int)i + 256;
        }
        if (expert >= 0) {
            slot[at + i] = next[expert] + rank;
            token[next[expert] + rank] = (int)((at + i) / K);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < E)
            next[i] += low;
        if (i + 256 < E)
            next[i + 256] += high;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// ---- balance statistics

// Sums of a chunk of rows of one group: count[group,chunk,E] of choices and, behind these `entries`
// numbers, sum[group,chunk,E] of probabilities. Work-groups: x the chunk, y the group. Items side
// by side take the experts of several rows.
KERNEL(256, 1)
void balance_sum(GLOBAL int *VIEW(count), uint entries, const GLOBAL int *VIEW(index),
                 const GLOBAL float *VIEW(probs), uint rows, uint E, uint K, uint chunk)
{
    OFFSETS3(count, index, probs)
    GLOBAL float *sum = (GLOBAL float *)count + entries;
    LOCAL float sums[256];
    LOCAL int counts[256];
    uint i = get_local_id(0);
    size_t out = (get_group_id(1) * get_num_groups(0) + get_group_id(0)) * E;
    size_t first = get_group_id(1) * (size_t)rows;
    uint from = (uint)get_group_id(0) * chunk, to = from + chunk < rows ? from + chunk : rows;
    for (uint e0 = 0; e0 < E; e0 += 256) {
        uint width = E - e0 < 256 ? E - e0 : 256, side = 256 / width;
        uint e = e0 + i % width;
        float s = 0.0f;
        int n = 0;
        for (uint r = from + i / width; i / width < side && r < to; r += side) {
            s += probs[(first + r) * E + e];
            for (uint k = 0; k < K; k++)
                n += index[(first + r) * K + k] == (int)e;
        }
        sums[i] = s;
        counts[i] = n;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < width) {
            for (uint j = 1; j < side; j++) {
                s += sums[j * width + i];
                n += counts[j * width + i];
            }
            count[out + e] = n;
            sum[out + e] = s;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// fraction[G,E] = E * count / (rows K), mean_prob[G,E] = sum / rows. A work-item an entry.
KERNEL(64, 1)
void balance_mean(GLOBAL float *VIEW(fraction), GLOBAL float *VIEW(mean_prob),
                  const GLOBAL int *VIEW(count), uint entries, uint means, uint rows, uint E,
                  uint K, uint chunks)
{
    OFFSETS3(fraction, mean_prob, count)
    const GLOBAL float *sum = (const GLOBAL float *)count + entries;
    size_t i = get_global_id(0);
    if (i >= means)
        return;
    size_t at = i / E * chunks * E + i % E;
    float s = 0.0f;
    int n = 0;
    for (uint c = 0; c < chunks; c++) {
        n += count[at + c * E];
        s += sum[at + c * E];
    }
    fraction[i] = (float)n * (float)E / ((float)rows * (float)K);
    mean_prob[i] = s / (float)rows;
}

// ---- between ranks (runtime/peers.h) --------------------------------------------------------------
//
// `words` of a rank: a flag for each lane and rank, which that rank sets, and WORDS_STOP. `own` of
// a rank: of each lane the number of journeys that are over, and of each rank a count of
// work-groups. A journey of a lane ends at a rank when all flags of the lane say its number; they
// are never set back.

#ifndef SYSTEM_FENCE // orders this work-item's memory operations for all devices and the host
#define SYSTEM_FENCE() mem_fence(CLK_GLOBAL_MEM_FENCE)
#define ATOMIC_NEXT(p) atomic_inc(p)
#define FLAG_LOAD(p) (*(p))
#define FLAG_STORE(p, v) atomic_xchg(p, v)
#define MICROSECONDS() 0u
#endif
#define PEERS_MOST 64
#define PEERS_TABLE 2048 // ranks * experts at most
#define WORDS_STOP (2 * PEERS_MOST) // the host gives up: nobody waits any more
#define OWN_LANE (1 + PEERS_MOST)   // words of `own` a lane

// After all that this work-item's group did: its rank's flag in another's `words`.
inline void peer_signal(volatile GLOBAL uint *words, const GLOBAL uint *own, uint rank, uint lane)
{
    SYSTEM_FENCE();
    FLAG_STORE(words + lane * PEERS_MOST + rank, own[lane * OWN_LANE] + 1);
}

// Waits for all ranks' flags of this journey; at the end of the work that it was for, peer_over().
// One work-group of 64.
inline void peer_await(volatile GLOBAL uint *words, const GLOBAL uint *own, uint ranks, uint lane)
{
    const uint wanted = own[lane * OWN_LANE] + 1;
    for (uint r = get_local_id(0); r < ranks; r += 64)
        while ((int)(FLAG_LOAD(words + lane * PEERS_MOST + r) - wanted) < 0)
            if (FLAG_LOAD(words + WORDS_STOP) != 0)
                break;
    SYSTEM_FENCE();
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
}

inline void peer_over(GLOBAL uint *own, uint lane)
{
    if (get_local_id(0) == 0)
        own[lane * OWN_LANE]++;
}

// Says that this rank has come so far.
KERNEL(64, 1)
void peer_say(volatile GLOBAL uint *VIEW(words), const GLOBAL uint *VIEW(own), uint rank, uint lane)
{
    OFFSETS2(words, own)
    if (get_local_id(0) == 0)
        peer_signal(words, own, rank, lane);
}

// Waits for the end of a journey; traffic[2] += microseconds of it, where there is a clock.
KERNEL(64, 1)
void peer_wait(volatile GLOBAL uint *VIEW(words), GLOBAL uint *VIEW(own),
               GLOBAL uint *VIEW(traffic), uint ranks, uint lane)
{
    OFFSETS3(words, own, traffic)
    const uint start = MICROSECONDS();
    peer_await(words, own, ranks, lane);
    peer_over(own, lane);
    if (traffic && get_local_id(0) == 0)
        traffic[2] += MICROSECONDS() - start;
}

// This rank's rows by expert, from the offsets of its own (NULL: it has none), into another's
// count[ranks,E].
KERNEL(64, 1)
void peer_counts(GLOBAL int *VIEW(count), const GLOBAL int *VIEW(offsets),
                 volatile GLOBAL uint *VIEW(words), const GLOBAL uint *VIEW(own), uint rank, uint E,
                 uint lane)
{
    OFFSETS4(count, offsets, words, own)
    for (uint e = get_local_id(0); e < E; e += 64)
        count[rank * E + e] = offsets ? offsets[e + 1] - offsets[e] : 0;
    SYSTEM_FENCE();
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (get_local_id(0) == 0)
        peer_signal(words, own, rank, lane);
}

// The segment of expert e between a rank's rows, sorted by expert, and its owner's,
// [expert][source]: as segment[way, rank, e] its first row here, its first row there, rows. Way 0:
// this rank's rows, at owner `rank`; way 1: the rows of `rank` that this one owns.
#define SEGMENT 3

// Waits for all counts. Then where rows go and come back to, offsets of the owned rows, the
// fractions of the balance loss (scale: experts / choices of all ranks; or NULL), traffic += rows
// to others and from them. owner[ranks,E]. One work-group.
KERNEL(64, 1)
void peer_segments(GLOBAL int *VIEW(segment), GLOBAL int *VIEW(offsets),
                   GLOBAL float *VIEW(fraction), GLOBAL uint *VIEW(traffic),
                   volatile GLOBAL uint *VIEW(words), GLOBAL uint *VIEW(own),
                   const GLOBAL int *VIEW(count), const GLOBAL int *VIEW(owner), uint rank,
                   uint ranks, uint E, uint lane, float scale)
{
    OFFSETS8(segment, offsets, fraction, traffic, words, own, count, owner)
    LOCAL int rows[PEERS_TABLE], by[PEERS_TABLE];
    LOCAL uint moved[2 * PEERS_MOST];
    const uint start = MICROSECONDS(), other = get_local_id(0);
    peer_await(words, own, ranks, lane);
    for (uint i = get_local_id(0); i < ranks * E; i += 64) {
        rows[i] = count[i];
        by[i] = owner[i];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (other < ranks) {
        GLOBAL int *out = segment + other * E * SEGMENT;
        GLOBAL int *back = segment + (ranks + other) * E * SEGMENT;
        int mine = 0, theirs = 0, at_them = 0, at_me = 0, held = 0;
        uint sent = 0, received = 0;
        for (uint e = 0; e < E; e++) {
            const int to = by[rank * E + e] == (int)other, from = by[other * E + e] == (int)rank;
            int holds = 0;
            const int first = at_me;
            out[e * SEGMENT] = mine;
            out[e * SEGMENT + 2] = to ? rows[rank * E + e] : 0;
            back[e * SEGMENT + 1] = theirs;
            back[e * SEGMENT + 2] = from ? rows[other * E + e] : 0;
            for (uint s = 0; s < ranks; s++) {
                if (s == rank)
                    out[e * SEGMENT + 1] = at_them;
                if (s == other)
                    back[e * SEGMENT] = at_me;
                at_them += by[s * E + e] == (int)other ? rows[s * E + e] : 0;
                at_me += by[s * E + e] == (int)rank ? rows[s * E + e] : 0;
                holds |= by[s * E + e] == (int)rank;
            }
            if (holds && other == rank)
                offsets[held++] = first;
            mine += rows[rank * E + e];
            theirs += rows[other * E + e];
            sent += (uint)out[e * SEGMENT + 2];
            received += (uint)back[e * SEGMENT + 2];
        }
        if (other == rank)
            offsets[held] = at_me;
        moved[other] = other == rank ? 0 : sent;
        moved[PEERS_MOST + other] = other == rank ? 0 : received;
    }
    for (uint e = get_local_id(0); fraction && e < E; e += 64) {
        float sum = 0.0f;
        for (uint s = 0; s < ranks; s++)
            sum += (float)rows[s * E + e];
        fraction[e] = sum * scale;
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    peer_over(own, lane);
    if (get_local_id(0) == 0) {
        for (uint r = 0; r < ranks; r++) {
            traffic[0] += moved[r];
            traffic[1] += moved[PEERS_MOST + r];
        }
        traffic[2] += MICROSECONDS() - start;
    }
}

// Rows of `vectors` 16 bytes from here into another rank's memory, by its part of `segment`; row i
// is from[i], or from[index[i]] where there is an index. The last work-group says that they are
// there. A row is copied by 32 work-items.
KERNEL(256, 1)
void peer_rows(GLOBAL uint4 *VIEW(to), const GLOBAL uint4 *VIEW(from),
               const GLOBAL int *VIEW(index), const GLOBAL int *VIEW(segment),
               volatile GLOBAL uint *VIEW(words), GLOBAL uint *VIEW(own), uint part, uint E,
               uint vectors, uint rank, uint other, uint lane)
{
    OFFSETS6(to, from, index, segment, words, own)
    LOCAL int first[513]; // row of this journey at which an expert's begin
    const GLOBAL int *segments = segment + part * E * SEGMENT;
    const uint item = get_local_id(0) % 32, groups = (uint)get_num_groups(0);
    for (uint e = get_local_id(0); e < E; e += 256)
        first[e + 1] = segments[e * SEGMENT + 2];
    barrier(CLK_LOCAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        first[0] = 0;
        for (uint e = 0; e < E; e++)
            first[e + 1] += first[e];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const int rows = first[E];
    uint e = 0;
    int i = (int)(get_group_id(0) * 8 + get_local_id(0) / 32);
    for (; i < rows; i += (int)groups * 8) {
        while (first[e + 1] <= i)
            e++;
        const int here = segments[e * SEGMENT] + i - first[e];
        const GLOBAL uint4 *in = from + (size_t)(index ? index[here] : here) * vectors;
        GLOBAL uint4 *out = to + (size_t)(segments[e * SEGMENT + 1] + i - first[e]) * vectors;
        uint v = item;
        for (; v + 96 < vectors; v += 128) {
            const uint4 a = in[v], b = in[v + 32], c = in[v + 64], d = in[v + 96];
            out[v] = a;
            out[v + 32] = b;
            out[v + 64] = c;
            out[v + 96] = d;
        }
        for (; v < vectors; v += 32)
            out[v] = in[v];
    }
    SYSTEM_FENCE();
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (get_local_id(0) == 0 && ATOMIC_NEXT(own + lane * OWN_LANE + 1 + other) == groups - 1) {
        own[lane * OWN_LANE + 1 + other] = 0;
        peer_signal(words, own, rank, lane);
    }
}

// Two sums of a rank into another's table[ranks,2]: the squared norm from control[0] and the sum of
// its losses.
KERNEL(64, 1)
void peer_sums(GLOBAL float *VIEW(table), const GLOBAL float *VIEW(control),
               const GLOBAL float *VIEW(loss), volatile GLOBAL uint *VIEW(words),
               const GLOBAL uint *VIEW(own), uint count, uint rank, uint lane)
{
    OFFSETS5(table, control, loss, words, own)
    LOCAL float sums[64];
    float sum = 0.0f;
    for (uint i = get_local_id(0); i < count; i += 64)
        sum += loss[i];
    sums[get_local_id(0)] = sum;
    for (uint step = 32; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (get_local_id(0) < step)
            sums[get_local_id(0)] += sums[get_local_id(0) + step];
    }
    if (get_local_id(0) == 0) {
        table[2 * rank] = control[0];
        table[2 * rank + 1] = sums[0];
        peer_signal(words, own, rank, lane);
    }
}

// Waits for all ranks' sums: control[0] is the whole norm, mean[0] the sum of all losses times
// `scale`.
KERNEL(64, 1)
void peer_total(GLOBAL float *VIEW(control), GLOBAL float *VIEW(mean),
                const GLOBAL float *VIEW(table), volatile GLOBAL uint *VIEW(words),
                GLOBAL uint *VIEW(own), uint ranks, uint lane, float scale)
{
    OFFSETS5(control, mean, table, words, own)
    peer_await(words, own, ranks, lane);
    if (get_local_id(0) == 0) {
        float norm = 0.0f, loss = 0.0f;
        for (uint r = 0; r < ranks; r++) {
            norm += table[2 * r];
            loss += table[2 * r + 1];
        }
        control[0] = norm;
        mean[0] = loss * scale;
    }
    peer_over(own, lane);
}

// ---- diffusion ----------------------------------------------------------------------------------

// A row of `at`: what training at an image's t takes (runtime/ops.h).
#define TIME_SIGNAL 0
#define TIME_NOISE 1
#define TIME_RANGE 2
#define TIME_GAIN 3
#define TIME_BIN 4
#define TIME_COLUMNS 5

// xt[N,P] = signal[n] x + noise[n] noise
KERNEL(256, 1)
void diffuse(GLOBAL float *VIEW(xt), const GLOBAL float *VIEW(x), const GLOBAL float *VIEW(noise),
             const GLOBAL float *VIEW(at), uint N, uint P)
{
    OFFSETS4(xt, x, noise, at)
    size_t i = get_global_id(0);
    if (i >= P)
        return;
    for (size_t n = get_group_id(1); n < N; n += get_num_groups(1)) {
        const GLOBAL float *a = at + n * TIME_COLUMNS;
        xt[n * P + i] = fma(a[TIME_NOISE], noise[n * P + i], a[TIME_SIGNAL] * x[n * P + i]);
    }
}

// One image: loss[n] = mean of (out - (noise - x))^2 over its P values; dout = factor * the
// difference, 0 from P to Q, unless dout is NULL. out and dout have Q values an image.
KERNEL(256, 1)
void flow_loss(GLOBAL float *VIEW(loss), GLOBAL float *VIEW(dout), const GLOBAL float *VIEW(out),
               const GLOBAL float *VIEW(x), const GLOBAL float *VIEW(noise), uint P, uint Q,
               float factor)
{
    OFFSETS5(loss, dout, out, x, noise)
    LOCAL float sums[256];
    uint i = get_local_id(0);
    size_t n = get_group_id(0);
    float sum = 0.0f;
    for (size_t p = i; p < P; p += 256) {
        float d = out[n * Q + p] - (noise[n * P + p] - x[n * P + p]);
        sum = fma(d, d, sum);
        if (dout)
            dout[n * Q + p] = factor * d;
    }
    for (size_t p = P + i; dout && p < Q; p += 256)
        dout[n * Q + p] = 0.0f;
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        loss[n] = sums[0] / (float)P;
}

// One value's term of DDPM's bound in nats: the KL of two normals whose means are d GAIN deviations
// apart; w says how much wider the second is. Its slope with respect to w.
inline float ddpm_kl(float d, float w, float range, float gain, float *slope)
{
    float h = 0.5f * range * (w + 1.0f), shrink = expm1(-h);
    float moved = (gain * d) * (gain * d);
    *slope = -0.25f * range * fma(shrink, moved, shrink + moved);
    return 0.5f * (h + fma(shrink, moved, shrink + moved));
}

// At t = 0: -ln of the probability of x's grey value. With the approximate distribution
// S(2 a(u)), S(x) = 1/(1+exp(-x)), the probability between u and v is S(2a) S(-2b) (1 -
// exp(-2(a-b))), a = a(u), b = a(v): nothing cancels; towards the ends the first or second factor
// alone is left.
inline float ddpm_nll(float d, float w, float x, float range, float gain, float bin, float *slope)
{
    const float root = 0.7978845608028654f, cubic = 0.044715f, least = -27.631021115928547f;
    float scale = exp(-0.25f * range * (w + 1.0f));
    float u = scale * fma(gain, d, bin), v = scale * fma(gain, d, -bin);
    float a = root * u * fma(cubic, u * u, 1.0f), b = root * v * fma(cubic, v * v, 1.0f);
    float width = root * 2.0f * scale * bin * fma(cubic, fma(u, u + v, v * v), 1.0f); // a - b
    float da = root * u * fma(3.0f * cubic, u * u, 1.0f); // u a'(u); scale' = -range/4 scale
    float db = root * v * fma(3.0f * cubic, v * v, 1.0f);
    float log_p = 0.0f, dp = 0.0f;
    if (!(x > 0.999f)) {
        log_p -= log1p(exp(-2.0f * a));
        dp += 2.0f * da / (1.0f + exp(2.0f * a));
    }
    if (!(x < -0.999f)) {
        log_p -= log1p(exp(2.0f * b));
        dp -= 2.0f * db / (1.0f + exp(-2.0f * b));
    }
    if (!(x > 0.999f) && !(x < -0.999f)) {
        log_p += log(-expm1(-2.0f * width));
        dp += 2.0f * (da - db) / expm1(2.0f * width);
    }
    *slope = log_p < least ? 0.0f : 0.25f * range * dp;
    return log_p < least ? -least : -log_p;
}

// One image: terms[n] = mean of d^2, d = out - noise, terms[N+n] = mean of the bound's terms in
// bits (0 without a second half of out, Q == P), loss[n] their sum; dout = scale times the gradient
// of the sum over the values, unless dout is NULL.
KERNEL(256, 1)
void ddpm_loss(GLOBAL float *VIEW(loss), GLOBAL float *VIEW(terms), GLOBAL float *VIEW(dout),
               const GLOBAL float *VIEW(out), const GLOBAL float *VIEW(x),
               const GLOBAL float *VIEW(noise), const GLOBAL float *VIEW(at), uint N, uint P,
               uint Q, float scale)
{
    OFFSETS7(loss, terms, dout, out, x, noise, at)
    LOCAL float squares[256];
    LOCAL float bounds[256];
    uint i = get_local_id(0);
    size_t n = get_group_id(0);
    const float bits = 1.4426950408889634f;
    const float range = at[n * TIME_COLUMNS + TIME_RANGE], gain = at[n * TIME_COLUMNS + TIME_GAIN];
    const float bin = at[n * TIME_COLUMNS + TIME_BIN];
    float square = 0.0f, bound = 0.0f;
    for (size_t p = i; p < P; p += 256) {
        float d = out[n * Q + p] - noise[n * P + p], slope;
        square = fma(d, d, square);
        if (dout)
            dout[n * Q + p] = 2.0f * scale * d;
        if (Q == P)
            continue;
        float w = out[n * Q + P + p];
        bound += bin > 0.0f ? ddpm_nll(d, w, x[n * P + p], range, gain, bin, &slope)
                            : ddpm_kl(d, w, range, gain, &slope);
        if (dout)
            dout[n * Q + P + p] = scale * bits * slope;
    }
    squares[i] = square;
    bounds[i] = bound;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step) {
            squares[i] += squares[i + step];
            bounds[i] += bounds[i + step];
        }
    }
    if (i == 0) {
        terms[n] = squares[0] / (float)P;
        terms[N + n] = bits * bounds[0] / (float)P;
        loss[n] = terms[n] + terms[N + n];
    }
}

// A sampler's update: see op_sample_step() in runtime/ops.h for what k holds. The first `guided`
// values of an image's answer are guided; it has Q values, the unconditional one N images further
// on. With k[5] 1 these are not read, and kept and noise are not where their factor is 0: they may
// hold anything.
KERNEL(256, 1)
void sample_step(GLOBAL float *VIEW(z), GLOBAL float *VIEW(kept), const GLOBAL float *VIEW(out),
                 const GLOBAL float *VIEW(noise), const GLOBAL float *VIEW(k), uint guided, uint N,
                 uint P, uint Q)
{
    OFFSETS5(z, kept, out, noise, k)
    size_t i = get_global_id(0);
    const float cfg = k[5], clip_z = k[6], clip_v = k[7], spread = k[9];
    if (i >= P)
        return;
    for (size_t n = get_group_id(1); n < N; n += get_num_groups(1)) {
        const GLOBAL float *with = out + n * Q, *without = out + (N + n) * Q;
        float v = with[i], now = z[n * P + i];
        if (i < guided && cfg != 1.0f)
            v = fma(cfg, v - without[i], without[i]);
        if (clip_v != 0.0f)
            v = clamp(fma(clip_v, v, clip_z * now), -1.0f, 1.0f);
        float next = fma(k[1], v, k[0] * now);
        if (noise && k[8] != 0.0f) {
            float deviation = k[8];
            if (spread != 0.0f) {
                float w = with[P + i];
                if (P + i < guided && cfg != 1.0f)
                    w = fma(cfg, w - without[P + i], without[P + i]);
                deviation *= exp(spread * (w + 1.0f));
            }
            next = fma(deviation, noise[n * P + i], next);
        }
        if (kept) {
            if (k[2] != 0.0f)
                next = fma(k[2], kept[n * P + i], next);
            kept[n * P + i] = fma(k[4], v, k[3] * now);
        }
        z[n * P + i] = next;
    }
}

// ---- random numbers (the same function as runtime/rng.c; see there) -----------------------------

inline float minus_two_log(float u)
{
    uint shifted = as_uint(u) - 0x3f3504f3u;
    int e = (int)(shifted >> 23);
    e = e >= 256 ? e - 512 : e;
    float f = as_float((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float q = -0x1.383e66p-4f;
    q = fma(q, f, 0x1.084e8ep-3f);
    q = fma(q, f, -0x1.0f3778p-3f);
    q = fma(q, f, 0x1.227084p-3f);
    q = fma(q, f, -0x1.542744p-3f);
    q = fma(q, f, 0x1.99a402p-3f);
    q = fma(q, f, -0x1.000428p-2f);
    q = fma(q, f, 0x1.555550p-2f);
    q = fma(q, f, -0x1.fffff8p-2f);
    float log_m = fma(f * f, q, f);
    return -2.0f * fma((float)e, 0x1.62e430p-1f, log_m);
}

inline float square_root(float x)
{
    float y = as_float(0x5f3759dfu - (as_uint(x) >> 1));
    float h = 0.5f * x;
    y = y * fma(-(h * y), y, 1.5f);
    y = y * fma(-(h * y), y, 1.5f);
    y = y * fma(-(h * y), y, 1.5f);
    float r = x * y;
    return fma(fma(-r, r, x), 0.5f * y, r);
}

// Two normal numbers at p, the second where `both`.
inline void normal_pair(GLOBAL float *p, uint w0, uint w1, int both)
{
    float radius = square_root(minus_two_log(fma((float)w0, 0x1p-32f, 0x1p-33f)));
    uint quadrant = (w1 + 0x20000000u) >> 30;
    int rest = (int)(w1 - (quadrant << 30));
    float a = (float)rest * 0x1.921fb6p-30f;
    float z = a * a;
    float sine = fma(a * z, fma(fma(-0x1.994e58p-13f, z, 0x1.11076p-7f), z, -0x1.555546p-3f), a);
    float cosine = fma(z * z, fma(fma(0x1.9a0206p-16f, z, -0x1.6c0c8ap-10f), z, 0x1.55554ap-5f),
                       fma(z, -0.5f, 1.0f));
    float x = quadrant & 1 ? sine : cosine, y = quadrant & 1 ? cosine : sine;
    p[0] = radius * (quadrant == 1 || quadrant == 2 ? -x : x);
    if (both)
        p[1] = radius * (quadrant >= 2 ? -y : y);
}

// Numbers at..at+3 (those below count), at a multiple of 4.
inline void normal_block(GLOBAL float *out, size_t at, size_t count, uint seed_low, uint seed_high,
                         uint stream_low, uint stream_high)
{
    ulong block = at / 4;
    uint c0 = (uint)block, c1 = (uint)(block >> 32), c2 = stream_low, c3 = stream_high;
    for (uint round = 0; round < 10; round++) {
        ulong a = (ulong)0xd2511f53u * c0, b = (ulong)0xcd9e8d57u * c2;
        c0 = (uint)(b >> 32) ^ c1 ^ (seed_low + round * 0x9e3779b9u);
        c1 = (uint)b;
        c2 = (uint)(a >> 32) ^ c3 ^ (seed_high + round * 0xbb67ae85u);
        c3 = (uint)a;
    }
    normal_pair(out + at, c0, c1, at + 1 < count);
    if (at + 2 < count)
        normal_pair(out + at + 2, c2, c3, at + 3 < count);
}

// out[i] from (seed, stream, 4 first + i), given as 32-bit halves. A work-item a block of four numbers.
KERNEL(64, 1)
void normal(GLOBAL float *VIEW(out), uint count_low, uint count_high, uint seed_low, uint seed_high,
            uint stream_low, uint stream_high, uint first)
{
    OFFSETS1(out)
    size_t count = (size_t)count_high << 32 | count_low, at = 4 * get_global_id(0);
    size_t before = 4 * (size_t)first;
    if (at < count)
        normal_block(out - before, before + at, before + count, seed_low, seed_high, stream_low,
                     stream_high);
}

// out[n, i] from (seed, stream + image[n], i), where the stream's low half is 0.
KERNEL(64, 1)
void normal_images(GLOBAL float *VIEW(out), const GLOBAL int *VIEW(image), uint N, uint P,
                   uint seed_low, uint seed_high, uint stream_high)
{
    OFFSETS2(out, image)
    size_t at = 4 * get_global_id(0);
    if (at >= P)
        return;
    for (size_t n = get_group_id(1); n < N; n += get_num_groups(1))
        normal_block(out + n * P, at, P, seed_low, seed_high, (uint)image[n], stream_high);
}

// ---- optimiser ----------------------------------------------------------------------------------

// partial[group] = sum of squares of the 4096 values of g that belong to it
KERNEL(256, 1)
void norm2_partial(GLOBAL float *VIEW(partial), const GLOBAL float *VIEW(g), uint count_low,
                   uint count_high)
{
    OFFSETS2(partial, g)
    LOCAL float sums[256];
    uint i = get_local_id(0);
    size_t count = (size_t)count_high << 32 | count_low;
    size_t from = (size_t)get_group_id(0) * 4096;
    float sum = 0.0f;
    for (size_t at = from + i; at < from + 4096 && at < count; at += 256)
        sum = fma(g[at], g[at], sum);
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        partial[get_group_id(0)] = sums[0];
}

// control[0] (+)= sum of the partials: compensated (Kahan) sums of every 256th, then pairwise. One
// work-group.
KERNEL(256, 1)
void norm2_total(GLOBAL float *VIEW(control), const GLOBAL float *VIEW(partial), uint count,
                 int accumulate)
{
    OFFSETS2(control, partial)
    LOCAL float sums[256];
    uint i = get_local_id(0);
    float sum = 0.0f, lost = 0.0f;
    for (size_t at = i; at < count; at += 256) {
        float term = partial[at] - lost;
        float next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        control[0] = accumulate ? control[0] + sums[0] : sums[0];
}

// The step's scalars; control's entries are enum control of runtime/ops.h. log_beta = ln(beta), so
// that 1 - beta^t keeps its digits. One work-group.
KERNEL(64, 1)
void adamw_control(GLOBAL float *VIEW(control), GLOBAL int *VIEW(counts),
                   const GLOBAL float *VIEW(loss), uint N, float rate, float log_beta1,
                   float log_beta2, float clip, float warmup, float ema)
{
    OFFSETS3(control, counts, loss)
    LOCAL float sums[64];
    uint i = get_local_id(0);
    float sum = 0.0f;
    for (uint n = i; n < N; n += 64)
        sum += loss[n];
    sums[i] = sum;
    for (uint step = 32; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i > 0)
        return;
    float mean = sums[0] / (float)N, norm2 = control[0];
    control[7] = mean;
    if (!isfinite(mean) || !isfinite(norm2)) {
        control[1] = 0.0f;
        control[6] = 1.0f;
        counts[1] += 1;
        return;
    }
    float t = (float)(counts[0] + 1), warm = (1.0f + t) / (10.0f + t);
    float fit = clip / (sqrt(norm2) + 1e-6f);
    control[1] = clip > 0.0f && fit < 1.0f ? fit : 1.0f;
    control[2] = t < warmup ? rate * (t / warmup) : rate;
    control[3] = -expm1(t * log_beta1);
    control[4] = -expm1(t * log_beta2);
    control[5] = ema < warm ? ema : warm;
    control[6] = 0.0f;
    counts[0] += 1;
}

// For updates tensor by tensor, which begin before all gradients are known: a gradient that is not
// finite ends the step's updates here.
KERNEL(64, 1)
void adamw_guard(GLOBAL float *VIEW(control), GLOBAL int *VIEW(counts))
{
    OFFSETS2(control, counts)
    if (get_global_id(0) > 0 || control[6] != 0.0f || isfinite(control[0]))
        return;
    control[6] = 1.0f;
    counts[0] -= 1;
    counts[1] += 1;
}

// An f32 in two halves: the nearest bf16, and the 16 bits that rounding took away (signed: the
// difference of their bits).
inline float join_halves(ushort high, ushort low)
{
    return as_float(((uint)high << 16) + (uint)(int)(short)low);
}

inline void split_halves(GLOBAL ushort *high, GLOBAL ushort *low, float value)
{
    uint bits = as_uint(value), nearest = (bits + 0x8000u) >> 16;
    *high = (ushort)nearest;
    *low = (ushort)(bits - (nearest << 16));
}

// w rounded to bf16, or in both halves where low is not NULL; where `added` is not NULL w and it,
// repeated after `period`
KERNEL(256, 1)
void round_bf16(GLOBAL ushort *VIEW(high), GLOBAL ushort *VIEW(low), const GLOBAL float *VIEW(w),
                const GLOBAL float *VIEW(added), uint period, uint count_low, uint count_high)
{
    OFFSETS4(high, low, w, added)
    size_t i = get_global_id(0);
    if (i >= ((size_t)count_high << 32 | count_low))
        return;
    float value = added ? w[i] + added[i % period] : w[i];
    if (low)
        split_halves(high + i, low + i, value);
    else
        high[i] = float_to_bf16(value);
}

// out = the f32 of both halves; of bf16 alone where low is NULL
KERNEL(256, 1)
void widen_bf16(GLOBAL float *VIEW(out), const GLOBAL ushort *VIEW(high),
                const GLOBAL ushort *VIEW(low), uint count_low, uint count_high)
{
    OFFSETS3(out, high, low)
    size_t i = get_global_id(0);
    if (i < ((size_t)count_high << 32 | count_low))
        out[i] = join_halves(high[i], low ? low[i] : (ushort)0);
}

// AdamW (Loshchilov and Hutter, arXiv 1711.05101) and EMA. rest = 1 - beta, rounded once. With
// `low`, w is bf16 and low the other half of the weights.
KERNEL(256, 1)
void adamw(GLOBAL float *VIEW(w), GLOBAL float *VIEW(m), GLOBAL float *VIEW(v),
           GLOBAL float *VIEW(ema), const GLOBAL float *VIEW(g), const GLOBAL float *VIEW(control),
           GLOBAL ushort *VIEW(low), uint count_low, uint count_high, float beta1, float rest1,
           float beta2, float rest2, float eps, float decay)
{
    OFFSETS7(w, m, v, ema, g, control, low)
    GLOBAL ushort *high = (GLOBAL ushort *)w;
    size_t i = get_global_id(0);
    size_t count = (size_t)count_high << 32 | count_low;
    if (i >= count || control[6] != 0.0f)
        return;
    float rate = control[2], gradient = g[i] * control[1];
    float m1 = fma(beta1, m[i], rest1 * gradient);
    float v1 = fma(beta2, v[i], rest2 * gradient * gradient);
    float divisor = sqrt(v1 / control[4]) + eps;
    float w1 = low ? join_halves(high[i], low[i]) : w[i];
    w1 = fma(-rate * decay, w1, w1);
    w1 = fma(-rate / control[3], m1 / divisor, w1);
    m[i] = m1;
    v[i] = v1;
    if (low)
        split_halves(high + i, low + i, w1);
    else
        w[i] = w1;
    if (ema)
        ema[i] = fma(1.0f - control[5], w1 - ema[i], ema[i]);
}

#ifdef CPU_FORMS
// ---- CPU forms ----------------------------------------------------------------------------------

#ifdef ACT_BF16
typedef ushort16 act16;
#else
typedef float16 act16;
#endif

// The rows [*from, to) of this work-item's chunk; returns `to`.
inline size_t chunk_rows(uint chunk, size_t rows, size_t *from)
{
    *from = get_global_id(0) * chunk;
    return *from + chunk < rows ? *from + chunk : rows;
}

KERNEL(1, 1)
void expert_bias_fwd_cpu(GLOBAL act *VIEW(y), const GLOBAL float *VIEW(bias),
                         const GLOBAL int *VIEW(offsets), uint R, uint O, uint E, uint chunk)
{
    OFFSETS3(y, bias, offsets)
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL float *b = bias + (size_t)expert_of(offsets, E, (uint)r) * O;
        GLOBAL act *row = y + r * O;
        uint o = 0;
        for (; o + 16 <= O; o += 16)
            act_store16(row + o, act_load16(row + o) + vload16(0, b + o));
        for (; o < O; o++)
            act_store(row, o, act_load(row, o) + b[o]);
    }
}

// Groups: (O / 64, E).
KERNEL(1, 1)
void expert_bias_bwd_cpu(GLOBAL float *VIEW(dbias), const GLOBAL act *VIEW(dy),
                         const GLOBAL int *VIEW(offsets), uint O)
{
    OFFSETS3(dbias, dy, offsets)
    size_t o = 64 * get_group_id(0), e = get_group_id(1), to = o + 64 < O ? o + 64 : O;
    int first = offsets[e], last = offsets[e + 1];
    for (; o + 16 <= to; o += 16) {
        float16 sum = 0.0f;
        for (int r = first; r < last; r++)
            sum += act_load16(dy + (size_t)r * O + o);
        vstore16(vload16(0, dbias + e * O + o) + sum, 0, dbias + e * O + o);
    }
    for (; o < to; o++) {
        float sum = 0.0f;
        for (int r = first; r < last; r++)
            sum += act_load(dy, (size_t)r * O + o);
        dbias[e * O + o] += sum;
    }
}

KERNEL(1, 1)
void swiglu_fwd_cpu(GLOBAL act *VIEW(h), const GLOBAL act *VIEW(gu), uint R, uint F, uint chunk)
{
    OFFSETS2(h, gu)
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *g = gu + r * 2 * F, *u = g + F;
        GLOBAL act *out = h + r * F;
        uint f = 0;
        for (; f + 16 <= F; f += 16) {
            float16 a = act_load16(g + f);
            act_store16(out + f, a * sigmoid16(a) * act_load16(u + f));
        }
        for (; f < F; f++) {
            float a = act_load(g, f);
            act_store(out, f, a * sigmoid(a) * act_load(u, f));
        }
    }
}

KERNEL(1, 1)
void swiglu_bwd_cpu(GLOBAL act *VIEW(dgu), const GLOBAL act *VIEW(dh), const GLOBAL act *VIEW(gu),
                    uint R, uint F, uint chunk)
{
    OFFSETS3(dgu, dh, gu)
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *from = gu + r * 2 * F, *d = dh + r * F;
        GLOBAL act *out = dgu + r * 2 * F;
        uint f = 0;
        for (; f + 16 <= F; f += 16) {
            float16 g = act_load16(from + f), u = act_load16(from + F + f);
            float16 s = sigmoid16(g), ds = act_load16(d + f) * s;
            act_store16(out + f, ds * u * fma(g, 1.0f - s, (float16)1.0f));
            act_store16(out + F + f, ds * g);
        }
        for (; f < F; f++) {
            float g = act_load(from, f), u = act_load(from, F + f);
            float s = sigmoid(g), ds = act_load(d, f) * s;
            act_store(out, f, ds * u * fma(g, 1.0f - s, 1.0f));
            act_store(out, F + f, ds * g);
        }
    }
}

KERNEL(1, 1)
void dispatch_fwd_cpu(GLOBAL act *VIEW(rows), const GLOBAL act *VIEW(x),
                      const GLOBAL int *VIEW(token), uint R, uint D, uint chunk)
{
    OFFSETS3(rows, x, token)
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *in = x + (size_t)token[r] * D;
        GLOBAL act *out = rows + r * D;
        uint d = 0;
        for (; d + 16 <= D; d += 16)
            vstore16(vload16(0, in + d), 0, out + d);
        for (; d < D; d++)
            out[d] = in[d];
    }
}

KERNEL(1, 1)
void dispatch_bwd_cpu(GLOBAL act *VIEW(dx), const GLOBAL act *VIEW(drows),
                      const GLOBAL int *VIEW(slot), uint M, uint K, uint D, uint chunk)
{
    OFFSETS3(dx, drows, slot)
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL int *at = slot + m * K;
        GLOBAL act *out = dx + m * D;
        uint d = 0;
        for (; d + 16 <= D; d += 16) {
            float16 sum = act_load16(out + d);
            for (uint k = 0; k < K; k++)
                sum += act_load16(drows + (size_t)at[k] * D + d);
            act_store16(out + d, sum);
        }
        for (; d < D; d++) {
            float sum = act_load(out, d);
            for (uint k = 0; k < K; k++)
                sum += act_load(drows, (size_t)at[k] * D + d);
            act_store(out, d, sum);
        }
    }
}

KERNEL(1, 1)
void combine_fwd_cpu(GLOBAL act *VIEW(out), const GLOBAL act *VIEW(rows),
                     const GLOBAL int *VIEW(slot), const GLOBAL float *VIEW(weight),
                     const GLOBAL act *VIEW(shared), uint M, uint K, uint D, uint chunk)
{
    OFFSETS5(out, rows, slot, weight, shared)
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL int *at = slot + m * K;
        const GLOBAL float *w = weight + m * K;
        uint d = 0;
        for (; d + 16 <= D; d += 16) {
            float16 sum = 0.0f;
            if (shared)
                sum = act_load16(shared + m * D + d);
            for (uint k = 0; k < K; k++)
                sum = fma((float16)w[k], act_load16(rows + (size_t)at[k] * D + d), sum);
            act_store16(out + m * D + d, sum);
        }
        for (; d < D; d++) {
            float sum = shared ? act_load(shared, m * D + d) : 0.0f;
            for (uint k = 0; k < K; k++)
                sum = fma(w[k], act_load(rows, (size_t)at[k] * D + d), sum);
            act_store(out, m * D + d, sum);
        }
    }
}

KERNEL(1, 1)
void combine_bwd_cpu(GLOBAL act *VIEW(drows), GLOBAL float *VIEW(dweight),
                     const GLOBAL act *VIEW(dout), const GLOBAL act *VIEW(rows),
                     const GLOBAL int *VIEW(slot), const GLOBAL float *VIEW(weight), uint R, uint K,
                     uint D, uint chunk)
{
    OFFSETS6(drows, dweight, dout, rows, slot, weight)
    size_t m, to = chunk_rows(chunk, R / K, &m);
    for (; m < to; m++) {
        const GLOBAL act *in = dout + m * D;
        for (size_t pair = m * K; pair < m * K + K; pair++) {
            const GLOBAL act *row = rows ? rows + (size_t)slot[pair] * D : in;
            GLOBAL act *out = drows + (size_t)slot[pair] * D;
            float w = weight[pair], tail = 0.0f;
            float16 sum = 0.0f;
            uint d = 0;
            for (; d + 16 <= D; d += 16) {
                float16 g = act_load16(in + d);
                sum = fma(g, act_load16(row + d), sum);
                act_store16(out + d, w * g);
            }
            for (; d < D; d++) {
                float g = act_load(in, d);
                tail = fma(g, act_load(row, d), tail);
                act_store(out, d, w * g);
            }
            if (rows)
                dweight[pair] = sum16(sum) + tail;
        }
    }
}

// The first n of sixteen floats, the rest `fill`; and back.
inline float16 load_some(const GLOBAL float *p, uint n, float fill)
{
    float v[16];
    if (n >= 16)
        return vload16(0, p);
    for (uint i = 0; i < 16; i++)
        v[i] = i < n ? p[i] : fill;
    return vload16(0, v);
}

inline void store_some(GLOBAL float *p, uint n, float16 value)
{
    float v[16];
    if (n >= 16) {
        vstore16(value, 0, p);
        return;
    }
    vstore16(value, 0, v);
    for (uint i = 0; i < n; i++)
        p[i] = v[i];
}

KERNEL(1, 1)
void router_fwd_cpu(GLOBAL float *VIEW(probs), GLOBAL float *VIEW(weight), GLOBAL int *VIEW(index),
                    const GLOBAL float *VIEW(logits), uint M, uint E, uint K, int renormalise,
                    uint chunk)
{
    OFFSETS4(probs, weight, index, logits)
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL float *x = logits + m * E;
        GLOBAL float *p = probs + m * E;
        float most = -INFINITY;
        float16 sums = 0.0f;
        for (uint e = 0; e < E; e++)
            most = x[e] > most ? x[e] : most;
        for (uint e = 0; e < E; e += 16) {
            float16 q = exp(load_some(x + e, E - e, -INFINITY) - most);
            sums += q;
            store_some(p + e, E - e, q);
        }
        float sum = sum16(sums);
        for (uint e = 0; e < E; e++)
            p[e] = p[e] / sum;
        top_k(weight + m * K, index + m * K, p, E, K, renormalise);
    }
}

KERNEL(1, 1)
void router_bwd_cpu(GLOBAL float *VIEW(dlogits), const GLOBAL float *VIEW(dweight),
                    const GLOBAL float *VIEW(probs), const GLOBAL int *VIEW(index),
                    const GLOBAL float *VIEW(fraction), float balance, uint M, uint E, uint K,
                    uint rows, int renormalise, uint chunk)
{
    OFFSETS5(dlogits, dweight, probs, index, fraction)
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL float *p = probs + m * E, *dw = dweight + m * K;
        const GLOBAL float *f = fraction + m / rows * E;
        const GLOBAL int *chosen = index + m * K;
        GLOBAL float *out = dlogits + m * E;
        float mean, dot = 0.0f, s = choice_sum(dw, p, chosen, K, renormalise, &mean);
        if (balance != 0.0f)
            for (uint e = 0; e < E; e++)
                dot = fma(p[e] * balance, f[e], dot);
        for (uint k = 0; k < K; k++)
            dot = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), dot);
        if (balance != 0.0f)
            for (uint e = 0; e < E; e++)
                out[e] = p[e] * fma(balance, f[e], -dot);
        else
            for (uint e = 0; e < E; e++)
                out[e] = p[e] * -dot;
        for (uint k = 0; k < K; k++)
            out[chosen[k]] = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), out[chosen[k]]);
    }
}

KERNEL(1, 1)
void route_count_cpu(GLOBAL int *VIEW(count), const GLOBAL int *VIEW(index), uint R, uint E,
                     uint chunk)
{
    OFFSETS2(count, index)
    size_t i, to = chunk_rows(chunk, R, &i);
    GLOBAL int *mine = count + get_global_id(0) * E;
    for (uint e = 0; e < E; e++)
        mine[e] = 0;
    for (; i < to; i++)
        mine[index[i]]++;
}

KERNEL(1, 1)
void route_place_cpu(GLOBAL int *VIEW(slot), GLOBAL int *VIEW(token), const GLOBAL int *VIEW(index),
                     const GLOBAL int *VIEW(offsets), const GLOBAL int *VIEW(count), uint R, uint K,
                     uint E, uint chunk)
{
    OFFSETS5(slot, token, index, offsets, count)
    int next[512];
    size_t i, to = chunk_rows(chunk, R, &i);
    for (uint e = 0; e < E; e++)
        next[e] = offsets[e] + count[get_global_id(0) * E + e];
    size_t m = i / K;
    uint k = (uint)(i % K);
    for (; i < to; i++) {
        int at = next[index[i]]++;
        slot[i] = at;
        token[at] = (int)m;
        k++;
        if (k == K) {
            k = 0;
            m++;
        }
    }
}

KERNEL(1, 1)
void balance_sum_cpu(GLOBAL int *VIEW(count), uint entries, const GLOBAL int *VIEW(index),
                     const GLOBAL float *VIEW(probs), uint rows, uint E, uint K, uint chunk)
{
    OFFSETS3(count, index, probs)
    GLOBAL float *sum = (GLOBAL float *)count + entries;
    size_t out = (get_group_id(1) * get_num_groups(0) + get_group_id(0)) * E;
    size_t first = get_group_id(1) * (size_t)rows;
    size_t r, to = chunk_rows(chunk, rows, &r);
    GLOBAL int *n = count + out;
    GLOBAL float *s = sum + out;
    for (uint e = 0; e < E; e++) {
        n[e] = 0;
        s[e] = 0.0f;
    }
    for (; r < to; r++) {
        const GLOBAL float *p = probs + (first + r) * E;
        uint e = 0;
        for (uint k = 0; k < K; k++)
            n[index[(first + r) * K + k]]++;
        for (; e + 16 <= E; e += 16)
            vstore16(vload16(0, s + e) + vload16(0, p + e), 0, s + e);
        for (; e < E; e++)
            s[e] += p[e];
    }
}

KERNEL(1, 1)
void diffuse_cpu(GLOBAL float *VIEW(xt), const GLOBAL float *VIEW(x),
                 const GLOBAL float *VIEW(noise), const GLOBAL float *VIEW(at), uint P, uint chunk)
{
    OFFSETS4(xt, x, noise, at)
    size_t n = get_group_id(1);
    size_t i, to = chunk_rows(chunk, P, &i);
    float signal = at[n * TIME_COLUMNS + TIME_SIGNAL], strength = at[n * TIME_COLUMNS + TIME_NOISE];
    for (; i + 16 <= to; i += 16)
        vstore16(fma((float16)strength, vload16(0, noise + n * P + i),
                     signal * vload16(0, x + n * P + i)),
                 0, xt + n * P + i);
    for (; i < to; i++)
        xt[n * P + i] = fma(strength, noise[n * P + i], signal * x[n * P + i]);
}

KERNEL(1, 1)
void flow_loss_cpu(GLOBAL float *VIEW(loss), GLOBAL float *VIEW(dout),
                   const GLOBAL float *VIEW(out), const GLOBAL float *VIEW(x),
                   const GLOBAL float *VIEW(noise), uint P, uint Q, float factor)
{
    OFFSETS5(loss, dout, out, x, noise)
    size_t n = get_group_id(0), p = 0;
    const GLOBAL float *o = out + n * Q, *a = x + n * P, *b = noise + n * P;
    float16 sums = 0.0f;
    float sum = 0.0f;
    for (; p + 16 <= P; p += 16) {
        float16 d = vload16(0, o + p) - (vload16(0, b + p) - vload16(0, a + p));
        sums = fma(d, d, sums);
        if (dout)
            vstore16(factor * d, 0, dout + n * Q + p);
    }
    for (; p < P; p++) {
        float d = o[p] - (b[p] - a[p]);
        sum = fma(d, d, sum);
        if (dout)
            dout[n * Q + p] = factor * d;
    }
    for (; dout && p < Q; p++)
        dout[n * Q + p] = 0.0f;
    loss[n] = (sum16(sums) + sum) / (float)P;
}

// The KL terms sixteen at a time; t = 0 is a thousandth of the images.
KERNEL(1, 1)
void ddpm_loss_cpu(GLOBAL float *VIEW(loss), GLOBAL float *VIEW(terms), GLOBAL float *VIEW(dout),
                   const GLOBAL float *VIEW(out), const GLOBAL float *VIEW(x),
                   const GLOBAL float *VIEW(noise), const GLOBAL float *VIEW(at), uint N, uint P,
                   uint Q, float scale)
{
    OFFSETS7(loss, terms, dout, out, x, noise, at)
    size_t n = get_group_id(0), p = 0;
    const GLOBAL float *o = out + n * Q, *e = noise + n * P;
    GLOBAL float *g = dout ? dout + n * Q : 0;
    const float bits = 1.4426950408889634f;
    const float range = at[n * TIME_COLUMNS + TIME_RANGE], gain = at[n * TIME_COLUMNS + TIME_GAIN];
    const float bin = at[n * TIME_COLUMNS + TIME_BIN];
    float16 squares = 0.0f, bounds = 0.0f;
    float square = 0.0f, bound = 0.0f;
    for (; p + 16 <= P && bin == 0.0f; p += 16) {
        float16 d = vload16(0, o + p) - vload16(0, e + p);
        squares = fma(d, d, squares);
        if (g)
            vstore16(2.0f * scale * d, 0, g + p);
        if (Q == P)
            continue;
        float16 h = 0.5f * range * (vload16(0, o + P + p) + 1.0f), shrink = expm1(-h);
        float16 moved = (gain * d) * (gain * d), both = fma(shrink, moved, shrink + moved);
        bounds += 0.5f * (h + both);
        if (g)
            vstore16(scale * bits * -0.25f * range * both, 0, g + P + p);
    }
    for (; p < P; p++) {
        float d = o[p] - e[p], slope;
        square = fma(d, d, square);
        if (g)
            g[p] = 2.0f * scale * d;
        if (Q == P)
            continue;
        bound += bin > 0.0f ? ddpm_nll(d, o[P + p], x[n * P + p], range, gain, bin, &slope)
                            : ddpm_kl(d, o[P + p], range, gain, &slope);
        if (g)
            g[P + p] = scale * bits * slope;
    }
    terms[n] = (sum16(squares) + square) / (float)P;
    terms[N + n] = bits * (sum16(bounds) + bound) / (float)P;
    loss[n] = terms[n] + terms[N + n];
}

// ---- random numbers, sixteen blocks of four at a time

inline float16 minus_two_log16(float16 u)
{
    uint16 shifted = as_uint16(u) - 0x3f3504f3u;
    int16 e = as_int16(shifted) >> 23;
    float16 f = as_float16((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float16 q = -0x1.383e66p-4f;
    q = fma(q, f, (float16)0x1.084e8ep-3f);
    q = fma(q, f, (float16)-0x1.0f3778p-3f);
    q = fma(q, f, (float16)0x1.227084p-3f);
    q = fma(q, f, (float16)-0x1.542744p-3f);
    q = fma(q, f, (float16)0x1.99a402p-3f);
    q = fma(q, f, (float16)-0x1.000428p-2f);
    q = fma(q, f, (float16)0x1.555550p-2f);
    q = fma(q, f, (float16)-0x1.fffff8p-2f);
    float16 log_m = fma(f * f, q, f);
    return -2.0f * fma(convert_float16(e), (float16)0x1.62e430p-1f, log_m);
}

inline float16 square_root16(float16 x)
{
    float16 y = as_float16(0x5f3759dfu - (as_uint16(x) >> 1));
    float16 h = 0.5f * x;
    y = y * fma(-(h * y), y, (float16)1.5f);
    y = y * fma(-(h * y), y, (float16)1.5f);
    y = y * fma(-(h * y), y, (float16)1.5f);
    float16 r = x * y;
    return fma(fma(-r, r, x), 0.5f * y, r);
}

inline void normal_pairs(float16 *first, float16 *second, uint16 w0, uint16 w1)
{
    float16 radius = square_root16(
        minus_two_log16(fma(convert_float16(w0), (float16)0x1p-32f, (float16)0x1p-33f)));
    uint16 quadrant = (w1 + 0x20000000u) >> 30;
    float16 a = convert_float16(as_int16(w1 - (quadrant << 30))) * 0x1.921fb6p-30f;
    float16 z = a * a;
    float16 s = fma((float16)-0x1.994e58p-13f, z, (float16)0x1.11076p-7f);
    float16 sine = fma(a * z, fma(s, z, (float16)-0x1.555546p-3f), a);
    float16 c = fma((float16)0x1.9a0206p-16f, z, (float16)-0x1.6c0c8ap-10f);
    float16 cosine =
        fma(z * z, fma(c, z, (float16)0x1.55554ap-5f), fma(z, (float16)-0.5f, (float16)1.0f));
    int16 odd = (quadrant & 1u) != 0u;
    uint16 sign_x = ((quadrant + 1u) & 2u) << 30, sign_y = (quadrant & 2u) << 30;
    float16 x = select(cosine, sine, odd), y = select(sine, cosine, odd);
    *first = radius * as_float16(as_uint16(x) ^ sign_x);
    *second = radius * as_float16(as_uint16(y) ^ sign_y);
}

// Numbers 4b..4b+63 into out[0..63], b the first block.
inline void normal_blocks(GLOBAL float *out, ulong b, uint seed_low, uint seed_high,
                          uint stream_low, uint stream_high)
{
    ulong16 block = b + (ulong16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint16 c0 = convert_uint16(block), c1 = convert_uint16(block >> 32);
    uint16 c2 = stream_low, c3 = stream_high;
    for (uint round = 0; round < 10; round++) {
        ulong16 x = convert_ulong16(c0) * 0xd2511f53ul, y = convert_ulong16(c2) * 0xcd9e8d57ul;
        c0 = convert_uint16(y >> 32) ^ c1 ^ (seed_low + round * 0x9e3779b9u);
        c1 = convert_uint16(y);
        c2 = convert_uint16(x >> 32) ^ c3 ^ (seed_high + round * 0xbb67ae85u);
        c3 = convert_uint16(x);
    }
    float16 p, q, r, s;
    normal_pairs(&p, &q, c0, c1);
    normal_pairs(&r, &s, c2, c3);
    float16 pr_low, pr_high, qs_low, qs_high; // interleave p,r and q,s, then these two
    pr_low.even = p.lo, pr_low.odd = r.lo, pr_high.even = p.hi, pr_high.odd = r.hi;
    qs_low.even = q.lo, qs_low.odd = s.lo, qs_high.even = q.hi, qs_high.odd = s.hi;
    float16 line;
    line.even = pr_low.lo, line.odd = qs_low.lo;
    vstore16(line, 0, out);
    line.even = pr_low.hi, line.odd = qs_low.hi;
    vstore16(line, 1, out);
    line.even = pr_high.lo, line.odd = qs_high.lo;
    vstore16(line, 2, out);
    line.even = pr_high.hi, line.odd = qs_high.hi;
    vstore16(line, 3, out);
}

// `chunk` is a number of values, a multiple of 64; what is left over after the last 64 goes through
// the scalar code.
KERNEL(1, 1)
void normal_cpu(GLOBAL float *VIEW(out), uint count_low, uint count_high, uint seed_low,
                uint seed_high, uint stream_low, uint stream_high, uint first, uint chunk)
{
    OFFSETS1(out)
    size_t count = (size_t)count_high << 32 | count_low, before = 4 * (size_t)first;
    size_t i, to = chunk_rows(chunk, count, &i);
    for (; i + 64 <= to; i += 64)
        normal_blocks(out + i, first + i / 4, seed_low, seed_high, stream_low, stream_high);
    for (; i < to; i += 4)
        normal_block(out - before, before + i, before + count, seed_low, seed_high, stream_low,
                     stream_high);
}

// ---- optimiser

// `chunk` partials of 4096 values each
KERNEL(1, 1)
void norm2_partial_cpu(GLOBAL float *VIEW(partial), const GLOBAL float *VIEW(g), uint count_low,
                       uint count_high, uint chunk)
{
    OFFSETS2(partial, g)
    size_t count = (size_t)count_high << 32 | count_low;
    size_t c, to = chunk_rows(chunk, (count + 4095) / 4096, &c);
    for (; c < to; c++) {
        size_t i = c * 4096, end = i + 4096 < count ? i + 4096 : count;
        float16 a = 0.0f, b = 0.0f;
        float tail = 0.0f;
        for (; i + 32 <= end; i += 32) {
            float16 x = vload16(0, g + i), y = vload16(0, g + i + 16);
            a = fma(x, x, a);
            b = fma(y, y, b);
        }
        for (; i < end; i++)
            tail = fma(g[i], g[i], tail);
        partial[c] = sum16(a + b) + tail;
    }
}

KERNEL(1, 1)
void adamw_cpu(GLOBAL float *VIEW(w), GLOBAL float *VIEW(m), GLOBAL float *VIEW(v),
               GLOBAL float *VIEW(ema), const GLOBAL float *VIEW(g),
               const GLOBAL float *VIEW(control), uint count_low, uint count_high, float beta1,
               float rest1, float beta2, float rest2, float eps, float decay, uint chunk)
{
    OFFSETS6(w, m, v, ema, g, control)
    size_t count = (size_t)count_high << 32 | count_low;
    size_t i, to = chunk_rows(chunk, count, &i);
    float scale = control[1], rate = control[2], stride = -rate / control[3], bias2 = control[4];
    float shrink = -rate * decay, towards = 1.0f - control[5];
    if (control[6] != 0.0f)
        return;
    for (; i + 16 <= to; i += 16) {
        float16 gradient = vload16(0, g + i) * scale, w0 = vload16(0, w + i);
        float16 m1 = fma((float16)beta1, vload16(0, m + i), rest1 * gradient);
        float16 v1 = fma((float16)beta2, vload16(0, v + i), rest2 * gradient * gradient);
        float16 divisor = sqrt(v1 / bias2) + eps;
        float16 w1 = fma((float16)stride, m1 / divisor, fma((float16)shrink, w0, w0));
        vstore16(m1, 0, m + i);
        vstore16(v1, 0, v + i);
        vstore16(w1, 0, w + i);
        if (ema) {
            float16 e = vload16(0, ema + i);
            vstore16(fma((float16)towards, w1 - e, e), 0, ema + i);
        }
    }
    for (; i < to; i++) {
        float gradient = g[i] * scale;
        float m1 = fma(beta1, m[i], rest1 * gradient);
        float v1 = fma(beta2, v[i], rest2 * gradient * gradient);
        float w1 = fma(stride, m1 / (sqrt(v1 / bias2) + eps), fma(shrink, w[i], w[i]));
        m[i] = m1;
        v[i] = v1;
        w[i] = w1;
        if (ema)
            ema[i] = fma(towards, w1 - ema[i], ema[i]);
    }
}
#endif // CPU_FORMS

// ---- convolutional networks ---------------------------------------------------------------------
//
// Images are matrices of pixels in the order n, y, x (runtime/ops.h). A convolution is the product
// of a matrix of gathered pixels, whose row holds what the kernel sees of x at one pixel of y (ky,
// kx, channel; zeros outside of the image and up to a multiple of 8), with the weights.
#define CONV_GATHERED(taps, channels) (((taps) * (channels) + 7) / 8 * 8)

// Pixel number `row` of images of height x width.
#define CONV_PIXEL(row, height, width, n, y, x)                                                    \
    const uint line_ = (row) / (uint)(width);                                                      \
    int x = (int)((row) % (uint)(width)), y = (int)(line_ % (uint)(height));                       \
    uint n = line_ / (uint)(height)

// GPU form: an item takes four columns of CONV_ROWS rows, which lie in one tap where the number of
// channels is a multiple of four. Items go through the columns, then through the rows.
enum { CONV_ROWS = 16, CONV_NOWHERE = -(1 << 28) };

KERNEL(64, 1)
void conv_gather(GLOBAL act *VIEW(out), const GLOBAL act *VIEW(x), int channels, int height,
                 int width, int out_height, int out_width, int kernel_h, int kernel_w, int stride,
                 int top, int left, int doubled, uint first, uint rows, uint chunk)
{
    OFFSETS2(out, x)
    const int columns = kernel_h * kernel_w * channels;
    const int pitch = CONV_GATHERED(kernel_h * kernel_w, channels), whole = channels % 4 == 0;
    const uint item = get_global_id(0), quads = (uint)(pitch / 4);
    const int k = (int)(item % quads) * 4;
    uint row = item / quads * CONV_ROWS;
    const uint end = min(row + CONV_ROWS, rows);
    int ky[4], kx[4], c[4]; // of each column: its tap and channel
    if (row >= rows)
        return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int tap = (k + i) / channels;
        ky[i] = k + i < columns ? tap / kernel_w : CONV_NOWHERE;
        kx[i] = tap % kernel_w;
        c[i] = (k + i) % channels;
    }
    CONV_PIXEL(first + row, out_height, out_width, n, oy, ox);
    for (; row < end; row++) {
        const int y = oy * stride - top, xx = ox * stride - left;
        const size_t image = (size_t)n * height * width;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int vy = y + ky[i], vx = xx + kx[i];
            const size_t at =
                (image + (size_t)(vy >> doubled) * width + (vx >> doubled)) * channels + c[i];
            if (vy < 0 || vx < 0 || vy >= height << doubled || vx >= width << doubled)
                continue;
            if (!whole)
                v[i] = act_load(x, at);
            else if (i == 0)
                load4(v, x, at, ACT_IS_BF16);
        }
        store4(out, (size_t)row * pitch + k, v, ACT_IS_BF16);
        if (++ox == out_width) {
            ox = 0;
            if (++oy == out_height) {
                oy = 0;
                n++;
            }
        }
    }
}

// y[first+r, column+o] = t[r,o], or y + t; and no less than 0 with relu
KERNEL(256, 1)
void conv_place(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(t), int width, int column, int columns,
                int relu, int add, uint first, uint count)
{
    OFFSETS2(y, t)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    const size_t to = ((size_t)first + i / (uint)columns) * width + column + i % (uint)columns;
    float v = act_load(t, i);
    if (add)
        v += act_load(y, to);
    act_store(y, to, relu && v < 0.0f ? 0.0f : v);
}

// GroupNorm, first: mean and sum of squared distances from it of each channel over `rows` pixels of
// an image, part[n, part, 2, C]. The sums are of distances from the first of them, so that a large
// mean costs no digits. GPU form: an item takes four channels (one, where they are no multiple of
// four).
KERNEL(64, 1)
void group_norm_part(GLOBAL float *VIEW(out), const GLOBAL act *VIEW(x), int channels, int pixels,
                     int rows, int parts, uint count)
{
    OFFSETS2(out, x)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    const int wide = channels % 4 == 0 ? 4 : 1;
    const uint units = (uint)(channels / wide), slot = i / units;
    const int c = (int)(i % units) * wide, part = (int)(slot % (uint)parts);
    const int from = part * rows, to = min(from + rows, pixels);
    float base[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, square[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    x += (size_t)(slot / (uint)parts) * pixels * channels + c;
    for (int r = from; r < to; r++) {
        if (wide == 4)
            load4(v, x, (size_t)r * channels, ACT_IS_BF16);
        else
            v[0] = act_load(x, (size_t)r * channels);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (r == from)
                base[j] = v[j];
            const float d = v[j] - base[j];
            sum[j] += d;
            square[j] = fma(d, d, square[j]);
        }
    }
    out += (size_t)slot * 2 * channels + c;
    const float each = 1.0f / (float)(to - from);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < wide) {
            const float mean = sum[j] * each;
            out[j] = base[j] + mean;
            out[channels + j] = fma(-sum[j], mean, square[j]);
        }
}

// Joins two such (count, mean, squares): Chan, Golub, LeVeque 1979.
inline void group_norm_join(float a[3], float count, float mean, float squares)
{
    const float all = a[0] + count, share = all > 0.0f ? count / all : 0.0f, d = mean - a[1];
    a[2] += squares + d * d * a[0] * share;
    a[1] += d * share;
    a[0] = all;
}

// Second, a work-group each group of an image: coefficients[n, 2, C] = weight / std | mean.
enum { GROUP_NORM_ITEMS = 256 };
KERNEL(256, 1)
void group_norm_total(GLOBAL float *VIEW(coefficients), const GLOBAL float *VIEW(part),
                      const GLOBAL float *VIEW(weight), int channels, int per, int pixels, int rows,
                      int parts, float eps)
{
    OFFSETS3(coefficients, part, weight)
    LOCAL float counts[GROUP_NORM_ITEMS], means[GROUP_NORM_ITEMS], squares[GROUP_NORM_ITEMS];
    const int item = (int)get_local_id(0), c = (int)get_group_id(0) * per;
    float all[3] = {0.0f, 0.0f, 0.0f};
    part += get_group_id(1) * (size_t)parts * 2 * channels + c;
    coefficients += get_group_id(1) * 2 * (size_t)channels;
    for (int i = item; i < parts * per; i += GROUP_NORM_ITEMS) {
        const size_t at = (size_t)(i / per) * 2 * channels + i % per;
        const int there = min(rows, pixels - i / per * rows);
        group_norm_join(all, (float)there, part[at], part[at + channels]);
    }
    for (int step = GROUP_NORM_ITEMS / 2; step > 0; step /= 2) {
        counts[item] = all[0];
        means[item] = all[1];
        squares[item] = all[2];
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < step)
            group_norm_join(all, counts[item + step], means[item + step], squares[item + step]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (item == 0) {
        means[0] = all[1];
        squares[0] = 1.0f / sqrt(all[2] / all[0] + eps);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int i = item; i < per; i += GROUP_NORM_ITEMS) {
        coefficients[c + i] = squares[0] * weight[c + i];
        coefficients[channels + c + i] = means[0];
    }
}

// Third: y = f((x - mean) * coefficient + bias). GPU form: an item takes four channels, or one.
KERNEL(256, 1)
void group_norm_apply(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x),
                      const GLOBAL float *VIEW(coefficients), const GLOBAL float *VIEW(bias),
                      int channels, int pixels, int silu, uint count)
{
    OFFSETS4(y, x, coefficients, bias)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    const int wide = channels % 4 == 0 ? 4 : 1;
    const uint units = (uint)(channels / wide), c = i % units * (uint)wide;
    const size_t at = (size_t)i * (size_t)wide;
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    coefficients += (size_t)(i / units / (uint)pixels) * 2 * channels + c;
    bias += c;
    if (wide == 4)
        load4(v, x, at, ACT_IS_BF16);
    else
        v[0] = act_load(x, at);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < wide) {
            v[j] = fma(v[j] - coefficients[channels + j], coefficients[j], bias[j]);
            if (silu)
                v[j] *= sigmoid(v[j]);
        }
    if (wide == 4)
        store4(y, at, v, ACT_IS_BF16);
    else
        act_store(y, at, v[0]);
}

// A work-group a row.
enum { SOFTMAX_ITEMS = 128 };
inline float softmax_fold(LOCAL_PTR float *values, float value, const int maximum)
{
    const int item = (int)get_local_id(0);
    values[item] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int step = SOFTMAX_ITEMS / 2; step > 0; step /= 2) {
        if (item < step)
            values[item] = maximum ? fmax(values[item], values[item + step])
                                   : values[item] + values[item + step];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    value = values[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return value;
}

KERNEL(128, 1)
void softmax_rows(GLOBAL act *VIEW(p), const GLOBAL float *VIEW(s), int columns, float scale)
{
    OFFSETS2(p, s)
    LOCAL float values[SOFTMAX_ITEMS];
    const int item = (int)get_local_id(0);
    float most = -INFINITY, sum = 0.0f;
    p += get_group_id(0) * (size_t)columns;
    s += get_group_id(0) * (size_t)columns;
    for (int i = item; i < columns; i += SOFTMAX_ITEMS)
        most = fmax(most, s[i] * scale);
    most = softmax_fold((LOCAL_PTR float *)values, most, 1);
    for (int i = item; i < columns; i += SOFTMAX_ITEMS)
        sum += exp(fma(s[i], scale, -most));
    sum = 1.0f / softmax_fold((LOCAL_PTR float *)values, sum, 0);
    for (int i = item; i < columns; i += SOFTMAX_ITEMS)
        act_store(p, i, exp(fma(s[i], scale, -most)) * sum);
}

// out[n,c,pixel] = in[n*pixels + pixel, c]
KERNEL(256, 1)
void rows_to_images(GLOBAL float *VIEW(out), const GLOBAL void *VIEW(in), int channels, int pixels,
                    int columns, int in_f32, uint count)
{
    OFFSETS2(out, in)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    const uint plane = i / (uint)pixels, pixel = i % (uint)pixels;
    const size_t row = (size_t)(plane / (uint)channels) * pixels + pixel;
    out[i] = any_load(in, row * columns + plane % (uint)channels, in_f32);
}

#ifdef CPU_FORMS
#ifdef ACT_BF16
typedef ushort16 act16_unaligned __attribute__((aligned(2)));
#else
typedef float16 act16_unaligned __attribute__((aligned(4)));
#endif

// to[0..n) = from[0..n), or zeros
INLINE void conv_copy(GLOBAL act *to, const GLOBAL act *from, int n)
{
    int i = 0;
    for (; i + 16 <= n; i += 16)
        *(GLOBAL act16_unaligned *)(to + i) = *(const GLOBAL act16_unaligned *)(from + i);
    for (; i < n; i++)
        to[i] = from[i];
}

INLINE void conv_zero(GLOBAL act *to, int n)
{
    int i = 0;
    for (; i + 16 <= n; i += 16)
        *(GLOBAL act16_unaligned *)(to + i) = (act16_unaligned)(0);
    for (; i < n; i++)
        to[i] = 0;
}

// One item `chunk` rows. The taps of a line of the kernel are neighbours in x too, unless x is
// doubled.
KERNEL(1, 1)
void conv_gather_cpu(GLOBAL act *VIEW(out), const GLOBAL act *VIEW(x), int channels, int height,
                     int width, int out_height, int out_width, int kernel_h, int kernel_w,
                     int stride, int top, int left, int doubled, uint first, uint rows, uint chunk)
{
    OFFSETS2(out, x)
    const int columns = kernel_h * kernel_w * channels;
    const int pitch = CONV_GATHERED(kernel_h * kernel_w, channels);
    uint row = (uint)get_group_id(0) * chunk;
    const uint end = min(row + chunk, rows);
    for (out += (size_t)row * pitch; row < end; row++, out += pitch) {
        CONV_PIXEL(first + row, out_height, out_width, n, oy, ox);
        const int from = ox * stride - left, seen = width << doubled;
        // the taps [before, after) of a line lie in the image
        const int before = min(max(-from, 0), kernel_w);
        const int after = max(min(kernel_w, seen - from), before);
        GLOBAL act *to = out;
        for (int ky = 0; ky < kernel_h; ky++, to += kernel_w * channels) {
            const int y = oy * stride - top + ky;
            if (y < 0 || y >= height << doubled) {
                conv_zero(to, kernel_w * channels);
                continue;
            }
            const GLOBAL act *line =
                x + ((size_t)n * height + (size_t)(y >> doubled)) * width * channels;
            conv_zero(to, before * channels);
            if (doubled)
                for (int kx = before; kx < after; kx++)
                    conv_copy(to + kx * channels, line + ((from + kx) >> 1) * channels, channels);
            else
                conv_copy(to + before * channels, line + (from + before) * channels,
                          (after - before) * channels);
            conv_zero(to + after * channels, (kernel_w - after) * channels);
        }
        conv_zero(out + columns, pitch - columns);
    }
}

// One item a part of an image.
KERNEL(1, 1)
void group_norm_part_cpu(GLOBAL float *VIEW(out), const GLOBAL act *VIEW(x), int channels,
                         int pixels, int rows, int parts)
{
    OFFSETS2(out, x)
    const int part = (int)get_group_id(0), from = part * rows, to = min(from + rows, pixels);
    const float each = 1.0f / (float)(to - from);
    x += (get_group_id(1) * (size_t)pixels + from) * channels;
    out += (get_group_id(1) * (size_t)parts + part) * 2 * channels;
    for (int c = 0; c < channels; c += 16) {
        const int n = min(16, channels - c);
        const float16 base = act_load_upto(x + c, n);
        float16 sum = (float16)(0.0f), square = (float16)(0.0f);
        for (int r = 1; r < to - from; r++) {
            const float16 d = act_load_upto(x + (size_t)r * channels + c, n) - base;
            sum += d;
            square = fma(d, d, square);
        }
        const float16 mean = sum * each;
        float_store_upto(out + c, base + mean, n);
        float_store_upto(out + channels + c, fma(-sum, mean, square), n);
    }
}

// One item `chunk` rows.
KERNEL(1, 1)
void group_norm_apply_cpu(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x),
                          const GLOBAL float *VIEW(coefficients), const GLOBAL float *VIEW(bias),
                          int channels, int pixels, int silu, int rows, int chunk)
{
    OFFSETS4(y, x, coefficients, bias)
    const int from = (int)get_group_id(0) * chunk, to = min(from + chunk, rows);
    for (int row = from; row < to; row++) {
        const GLOBAL float *a = coefficients + (size_t)(row / pixels) * 2 * channels;
        const size_t at = (size_t)row * channels;
        for (int c = 0; c < channels; c += 16) {
            const int n = min(16, channels - c);
            float16 v = act_load_upto(x + at + c, n) - float_load_upto(a + channels + c, n);
            v = fma(v, float_load_upto(a + c, n), float_load_upto(bias + c, n));
            act_store_upto(y + at + c, silu ? v * sigmoid16(v) : v, n);
        }
    }
}

// One item `chunk` rows.
KERNEL(1, 1)
void softmax_rows_cpu(GLOBAL act *VIEW(p), const GLOBAL float *VIEW(s), int columns, float scale,
                      int rows, int chunk)
{
    OFFSETS2(p, s)
    const int from = (int)get_group_id(0) * chunk, to = min(from + chunk, rows);
    const int16 lane = (int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int row = from; row < to; row++) {
        const GLOBAL float *in = s + (size_t)row * columns;
        GLOBAL act *out = p + (size_t)row * columns;
        float16 most = (float16)(-INFINITY), sum = (float16)(0.0f);
        for (int i = 0; i < columns; i += 16) {
            const int n = min(16, columns - i);
            const float16 v = float_load_upto(in + i, n) * scale;
            most = fmax(most, select((float16)(-INFINITY), v, lane < (int16)(n)));
        }
        const float top = max16(most);
        for (int i = 0; i < columns; i += 16) {
            const int n = min(16, columns - i);
            const float16 v = exp16(float_load_upto(in + i, n) * scale - top);
            sum += select((float16)(0.0f), v, lane < (int16)(n));
        }
        const float share = 1.0f / sum16(sum);
        for (int i = 0; i < columns; i += 16) {
            const int n = min(16, columns - i);
            act_store_upto(out + i, exp16(float_load_upto(in + i, n) * scale - top) * share, n);
        }
    }
}
#endif // CPU_FORMS

// ---- pooling and resampling of images -----------------------------------------------------------
//
// Images are matrices of pixels in the order n, y, x (runtime/ops.h).

// The pixels [*from, *to) of a line that lie in a window.
inline void pool_window(int at, int stride, int padding, int size, int length, int *from, int *to)
{
    const int first = at * stride - padding;
    *from = max(first, 0);
    *to = min(first + size, length);
}

// GPU form: an item takes `wide` (4 or 1) channels of an output pixel.
KERNEL(64, 1)
void pool(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), int channels, int height, int width,
          int out_height, int out_width, int size, int stride, int padding, int maximum,
          int columns, int column, int wide, uint count)
{
    OFFSETS2(y, x)
    const uint i = get_global_id(0), units = (uint)(channels / wide), row = i / units;
    if (i >= count)
        return;
    const int c = (int)(i % units) * wide, ox = (int)(row % (uint)out_width);
    const uint line = row / (uint)out_width;
    int y0, y1, x0, x1;
    pool_window((int)(line % (uint)out_height), stride, padding, size, height, &y0, &y1);
    pool_window(ox, stride, padding, size, width, &x0, &x1);
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum[4];
    for (int j = 0; j < 4; j++)
        sum[j] = maximum ? -INFINITY : 0.0f;
    x += (size_t)(line / (uint)out_height) * height * width * channels + c;
    for (int py = y0; py < y1; py++)
        for (int px = x0; px < x1; px++) {
            const size_t at = ((size_t)py * width + px) * channels;
            if (wide == 4)
                load4(v, x, at, ACT_IS_BF16);
            else
                v[0] = act_load(x, at);
            for (int j = 0; j < 4; j++)
                sum[j] = maximum ? fmax(sum[j], v[j]) : sum[j] + v[j];
        }
    const float share = maximum ? 1.0f : 1.0f / (float)((y1 - y0) * (x1 - x0));
    const size_t to = (size_t)row * columns + column + c;
    for (int j = 0; j < 4; j++)
        sum[j] *= share;
    if (wide == 4)
        store4(y, to, sum, ACT_IS_BF16);
    else
        act_store(y, to, sum[0]);
}

// An item takes a channel of an image.
KERNEL(64, 1)
void pixel_mean(GLOBAL float *VIEW(out), const GLOBAL act *VIEW(x), int channels, int pixels,
                uint count)
{
    OFFSETS2(out, x)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    x += (size_t)(i / (uint)channels) * pixels * channels + i % (uint)channels;
    float sum = 0.0f;
    for (int p = 0; p < pixels; p++)
        sum += act_load(x, (size_t)p * channels);
    out[i] = sum / (float)pixels;
}

// An item takes a pixel.
KERNEL(64, 1)
void resample(GLOBAL act *VIEW(out), const GLOBAL uchar *VIEW(bytes), const GLOBAL int *VIEW(taps),
              int side, float scale, float shift, uint count)
{
    OFFSETS3(out, bytes, taps)
    const uint i = get_global_id(0);
    if (i >= count)
        return;
    const uint line = i / (uint)side;
    const GLOBAL int *down = taps + ((size_t)(line / (uint)side) * 2 * side + line % (uint)side) * 3;
    const GLOBAL int *across =
        taps + (((size_t)(line / (uint)side) * 2 + 1) * side + i % (uint)side) * 3;
    const GLOBAL uchar *above = bytes + down[0], *below = bytes + down[1];
    const float ty = as_float((uint)down[2]), tx = as_float((uint)across[2]);
    for (int c = 0; c < 3; c++) {
        const int left = across[0] + c, right = across[1] + c;
        const float a = (float)above[left] * (1.0f - tx) + (float)above[right] * tx;
        const float b = (float)below[left] * (1.0f - tx) + (float)below[right] * tx;
        act_store(out, (size_t)i * 3 + c, (a * (1.0f - ty) + b * ty) * scale + shift);
    }
}

#ifdef CPU_FORMS
// An item takes `chunk` output pixels.
KERNEL(1, 1)
void pool_cpu(GLOBAL act *VIEW(y), const GLOBAL act *VIEW(x), int channels, int height, int width,
              int out_height, int out_width, int size, int stride, int padding, int maximum,
              int columns, int column, uint rows, uint chunk)
{
    OFFSETS2(y, x)
    uint row = (uint)get_group_id(0) * chunk;
    const uint end = min(row + chunk, rows);
    for (; row < end; row++) {
        const uint line = row / (uint)out_width;
        int y0, y1, x0, x1;
        pool_window((int)(line % (uint)out_height), stride, padding, size, height, &y0, &y1);
        pool_window((int)(row % (uint)out_width), stride, padding, size, width, &x0, &x1);
        const float share = maximum ? 1.0f : 1.0f / (float)((y1 - y0) * (x1 - x0));
        const GLOBAL act *image = x + (size_t)(line / (uint)out_height) * height * width * channels;
        for (int c = 0; c < channels; c += 16) {
            const int n = min(16, channels - c);
            float16 sum = maximum ? (float16)(-INFINITY) : (float16)(0.0f);
            for (int py = y0; py < y1; py++)
                for (int px = x0; px < x1; px++) {
                    const float16 v =
                        act_load_upto(image + ((size_t)py * width + px) * channels + c, n);
                    sum = maximum ? fmax(sum, v) : sum + v;
                }
            act_store_upto(y + (size_t)row * columns + column + c, sum * share, n);
        }
    }
}
#endif // CPU_FORMS
