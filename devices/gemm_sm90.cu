// Matrix products of bf16 on Hopper (sm_90a), plain and ragged, with SwiGLU within (struct gemm in
// devices/device.h).
#include "devices/gemm_sm90_kernel.cuh"

WIDTHS(GEMM, gemm_nt_bf16, NT, TO_BF16)
WIDTHS(GEMM, gemm_nt_f32, NT, TO_F32)
WIDTHS(GEMM, gemm_nt_swiglu, NT, SWIGLU_FWD)
WIDTHS(GEMM, gemm_nn_bf16, NN, TO_BF16)
GEMM(gemm_nn_swiglu, NN, SWIGLU_BWD, 64)
GEMM(gemm_nn_swiglu, NN, SWIGLU_BWD, 128)
WIDTHS(GEMM, gemm_tn_f32, TN, TO_F32)
WIDTHS(GEMM_REST, gemm_nt_bf16, NT, TO_BF16)
WIDTHS(GEMM_REST, gemm_nt_f32, NT, TO_F32)
WIDTHS(GEMM_REST, gemm_nn_bf16, NN, TO_BF16)
WIDTHS(GEMM_REST, gemm_tn_f32, TN, TO_F32)
