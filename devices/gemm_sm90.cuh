// The instructions of Hopper (PTX ISA: wgmma, mbarrier, cp.async.bulk.tensor) that gemm_sm90.cu is
// made of, and in part attention_forward_sm90.cuh. Shared memory is named by its 32-bit address.
#ifndef DITMOE_GEMM_SM90_CUH
#define DITMOE_GEMM_SM90_CUH

#include <stdint.h>

namespace sm90
{

// A CUtensorMap: an argument of a kernel, by value.
struct alignas(64) tensor_map {
    uint64_t words[16];
};

// ---- barriers -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Makes initialised barriers known to copies.
__device__ __forceinline__ void barrier_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` of copies too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ bool barrier_done(uint32_t barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
    while (!barrier_done(barrier, parity))
        ;
}

// What ordinary stores to shared memory left becomes visible to copies and to wgmma.
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- launches -----------------------------------------------------------------------------------

// Lets the next kernel on the stream start where multiprocessors become free, if it was launched
// to; and waits until the one before has ended and what it wrote is there.
__device__ __forceinline__ void launch_next()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void await_previous()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- copies -------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const tensor_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (x, y[, z[, w]]) of an array to shared memory; what lies outside of it is zero.
__device__ __forceinline__ void load_box(uint32_t to, const tensor_map *map, uint32_t barrier,
                                         int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y)
                 : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const tensor_map *map, uint32_t barrier,
                                         int x, int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const tensor_map *map, uint32_t barrier,
                                         int x, int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

// A map of pixels (cuTensorMapEncodeIm2col): the channels of a box from c on, of as many pixels as
// a box has, from (x, y) of image n on, line by line and image by image, each moved by (kx, ky).
// Outside of an image are zeros.
__device__ __forceinline__ void load_pixel_box(uint32_t to, const tensor_map *map, uint32_t barrier,
                                               int c, int x, int y, int n, int kx, int ky)
{
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(n), "h"((uint16_t)kx), "h"((uint16_t)ky)
        : "memory");
}

// The other way, for a box that lies inside; asynchronously, in a group of its thread's copies.
__device__ __forceinline__ void store_box(const tensor_map *map, uint32_t from, int x, int y, int z)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        "r"(from), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void store_box(const tensor_map *map, uint32_t from, int x, int y)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(from), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void store_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread stores has been read from shared memory.
__device__ __forceinline__ void store_wait()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements from fragments to rows; each lane gives a row's address.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

// One store of 16 bytes: what the compiler makes of a uint4 is four of 4 as often as not.
__device__ __forceinline__ void store_global(void *to, uint4 v)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t at)
{
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void store_word(uint32_t at, uint32_t v)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

__device__ __forceinline__ void clear_shared(uint32_t at)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

// ---- products of warpgroups ---------------------------------------------------------------------

// A matrix in shared memory with the 128-byte swizzle. Its rows of 128 bytes run along k (64
// elements of a row), eight rows to 1024 bytes; or, across, along m or n (64 of them for one k), 64
// such rows to a block of 8192 bytes.
template <bool ACROSS> __device__ __forceinline__ uint64_t descriptor(uint32_t address)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(ACROSS ? 8192 >> 4 : 1) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// What a descriptor grows by for the next 16 of k.
template <bool ACROSS> constexpr int DESCRIPTOR_STEP = (ACROSS ? 16 * 128 : 16 * 2) >> 4;

__device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most PENDING of the latest groups are still running.
template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int WARPGROUPS_REGISTERS> __device__ __forceinline__ void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS_REGISTERS));
}

template <int WARPGROUPS_REGISTERS> __device__ __forceinline__ void registers_less()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS_REGISTERS));
}

#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_48 \
    REGISTERS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64                                                                   \
    REGISTERS_32                                                                       \
    ", "                                                                               \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_96                                                                   \
    REGISTERS_64                                                                       \
    ", "                                                                               \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128                                                                      \
    REGISTERS_96                                                                           \
    ", "                                                                                   \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

#define IN_OUT_8(d, i)                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define IN_OUT_16(d, i) IN_OUT_8(d, i), IN_OUT_8(d, i + 8)
#define IN_OUT_32(d, i) IN_OUT_8(d, i), IN_OUT_8(d, i + 8), IN_OUT_8(d, i + 16), IN_OUT_8(d, i + 24)
#define IN_OUT_48(d) IN_OUT_32(d, 0), IN_OUT_16(d, 32)
#define IN_OUT_64(d) IN_OUT_32(d, 0), IN_OUT_32(d, 32)
#define IN_OUT_96(d) IN_OUT_64(d), IN_OUT_32(d, 64)
#define IN_OUT_128(d) IN_OUT_96(d), IN_OUT_32(d, 96)

// d[64, N] (+)= A[64, 16] B[N, 16]^T in f32: thread t of the warpgroup holds in d[4 j + i] the
// element of row 16 (t / 32) + t % 32 / 4 + 8 (i / 2) and column 8 j + 2 (t % 4) + i % 2. `add`: 0
// to set.
template <int N, bool ACROSS_A, bool ACROSS_B> struct wgmma;

// a, b, add, across_a, across_b: the numbers of the operands after the registers.
#define WGMMA(N, COUNT, INS, OUTS, a, b, add_, across_a, across_b)                                \
    template <bool ACROSS_A, bool ACROSS_B> struct wgmma<N, ACROSS_A, ACROSS_B> {                 \
        static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t da, uint64_t db,   \
                                                   int add)                                       \
        {                                                                                         \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_ ", 0;\n"                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" INS "}, " a \
                         ", " b ", p, 1, 1, " across_a ", " across_b ";\n}"                       \
                         : OUTS                                                                   \
                         : "l"(da), "l"(db), "r"(add), "n"((int)ACROSS_A), "n"((int)ACROSS_B));   \
        }                                                                                         \
    };
WGMMA(32, 16, REGISTERS_16, IN_OUT_16(d, 0), "%16", "%17", "%18", "%19", "%20")
WGMMA(64, 32, REGISTERS_32, IN_OUT_32(d, 0), "%32", "%33", "%34", "%35", "%36")
WGMMA(96, 48, REGISTERS_48, IN_OUT_48(d), "%48", "%49", "%50", "%51", "%52")
WGMMA(128, 64, REGISTERS_64, IN_OUT_64(d), "%64", "%65", "%66", "%67", "%68")
WGMMA(192, 96, REGISTERS_96, IN_OUT_96(d), "%96", "%97", "%98", "%99", "%100")
WGMMA(256, 128, REGISTERS_128, IN_OUT_128(d), "%128", "%129", "%130", "%131", "%132")

#undef WGMMA
#undef IN_OUT_128
#undef IN_OUT_96
#undef IN_OUT_64
#undef IN_OUT_48
#undef IN_OUT_32
#undef IN_OUT_16
#undef IN_OUT_8
#undef REGISTERS_128
#undef REGISTERS_96
#undef REGISTERS_64
#undef REGISTERS_48
#undef REGISTERS_32
#undef REGISTERS_16

} // namespace sm90

#endif
