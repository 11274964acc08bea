// Every device kernel, once. OpenCL C 1.2 that nvcc also reads (devices/cl_cuda.h).
//
// Defined by the backend when it compiles this:
//   ACT_BF16   activations are stored as bf16 (upper half of an f32, in a ushort); else as f32
//   CPU_FORMS  the device is a CPU: also compile the `name_cpu` forms (one work-item a tile, float16
//              vectors, no barriers). Guard them, and everything with vector types, with it.
// Rules that keep both compilers content: no vector types and no (type)(a,b) literals outside
// CPU_FORMS; LOCAL for arrays shared by a work-group (declared at kernel scope); pointers to them are
// LOCAL_PTR; a*b+c that must be fused is fma(), never mad(); arithmetic in float; kernel arguments are
// __global pointers, int, uint and float.

#ifndef LOCAL
#define LOCAL __local
#define LOCAL_PTR __local
#endif
#define KERNEL(gx, gy) __kernel __attribute__((reqd_work_group_size(gx, gy, 1)))
#define GLOBAL __global

// ---- storage types -----------------------------------------------------------------------------------

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

#ifdef ACT_BF16
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
#ifdef ACT_BF16
// PoCL's vstore16 of ushort16 writes one element at a time (measured: 4 times slower than this)
typedef ushort16 ushort16_unaligned __attribute__((aligned(2)));
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

// ---- memory ------------------------------------------------------------------------------------------

// p[i] = pattern for i in [first, first+count), a chunk a work-item. Drivers of CPU devices fill with
// one thread.
KERNEL(1, 1)
void fill_cpu(GLOBAL uint *p, uint first, uint count, uint pattern, uint chunk)
{
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
