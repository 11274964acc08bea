// Lets nvcc read kernels.cl as CUDA: nvcc -x cu -include devices/cl_cuda.h kernels.cl
#ifndef DITMOE_CL_CUDA_H
#define DITMOE_CL_CUDA_H

#define __kernel extern "C" __global__
#define reqd_work_group_size(x, y, z) launch_bounds((x) * (y) * (z))
#define KERNEL_DENSE(gx, gy) __kernel __attribute__((launch_bounds((gx) * (gy), 2)))
#define __global
#define LOCAL __shared__
#define LOCAL_PTR
#define VIEW(p) p
#define OFFSETS1(p)
#define __constant static __device__ const
#define restrict __restrict__
#define inline static __device__ __forceinline__
#define barrier(fence) __syncthreads()

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

#define CL_CUDA_PICK(v, d) ((d) == 0 ? (v).x : (d) == 1 ? (v).y : (v).z)
#define get_local_id(d) ((size_t)CL_CUDA_PICK(threadIdx, d))
#define get_group_id(d) ((size_t)CL_CUDA_PICK(blockIdx, d))
#define get_local_size(d) ((size_t)CL_CUDA_PICK(blockDim, d))
#define get_num_groups(d) ((size_t)CL_CUDA_PICK(gridDim, d))
#define get_global_id(d) (get_group_id(d) * get_local_size(d) + get_local_id(d))
#define get_global_size(d) (get_num_groups(d) * get_local_size(d))

#define SYSTEM_FENCE() __threadfence_system()
#define ATOMIC_NEXT(p) atomicAdd(p, 1u)
#define FLAG_LOAD(p) cl_cuda_flag_load(p)
#define FLAG_STORE(p, v) cl_cuda_flag_store(p, v)
#define MICROSECONDS() cl_cuda_microseconds()
__device__ __forceinline__ unsigned cl_cuda_flag_load(const volatile unsigned *p)
{
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void cl_cuda_flag_store(volatile unsigned *p, unsigned v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned cl_cuda_microseconds()
{
    unsigned long long ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return (unsigned)(ns / 1000);
}

#define as_float(v) __uint_as_float(v)
#define as_uint(v) __float_as_uint(v)
#define mul_hi(a, b) __umulhi(a, b) // of uint; kernels.cl has no other
#define native_exp(v) __expf(v)
#define clamp(v, low, high) min(max(v, low), high)

#endif
