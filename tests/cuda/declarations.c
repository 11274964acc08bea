// Compiled where NVIDIA's headers are: does devices/cuda_api.h declare what they do? A build test;
// nothing here is linked or runs.
#include <cublasLt.h>
#include <cuda.h>
#if __has_include(<nccl.h>)
#include <nccl.h>
#define HAVE_NCCL
#endif

#include "devices/cuda_api.h"

#define SAME(type, ...)                                                                     \
    _Static_assert(__builtin_types_compatible_p(__typeof__(type), __typeof__(__VA_ARGS__)), \
                   #type " is not " #__VA_ARGS__)
#define EQUAL(a, b) _Static_assert((long long)(a) == (long long)(b), #a " is not " #b)

// ---- the driver API -----------------------------------------------------------------------------

SAME(cuda_result, CUresult);
SAME(cuda_device_id, CUdevice);
SAME(cuda_address, CUdeviceptr);
SAME(cuda_context, CUcontext);
SAME(cuda_module, CUmodule);
SAME(cuda_function, CUfunction);
SAME(cuda_stream, CUstream);
SAME(cuda_event, CUevent);
SAME(cuda_tensor_map, CUtensorMap);
EQUAL(sizeof(CUtensorMap), 128);
SAME(cuda_graph, CUgraph);
SAME(cuda_graph_exec, CUgraphExec);

EQUAL(CUDA_OK, CUDA_SUCCESS);
EQUAL(CUDA_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
EQUAL(CUDA_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
EQUAL(CUDA_ECC_UNCORRECTABLE, CUDA_ERROR_ECC_UNCORRECTABLE);
EQUAL(CUDA_NVLINK_UNCORRECTABLE, CUDA_ERROR_NVLINK_UNCORRECTABLE);
EQUAL(CUDA_CONTAINED, CUDA_ERROR_CONTAINED);
EQUAL(CUDA_ILLEGAL_ADDRESS, CUDA_ERROR_ILLEGAL_ADDRESS);
EQUAL(CUDA_LAUNCH_TIMEOUT, CUDA_ERROR_LAUNCH_TIMEOUT);
EQUAL(CUDA_CONTEXT_IS_DESTROYED, CUDA_ERROR_CONTEXT_IS_DESTROYED);
EQUAL(CUDA_ASSERT, CUDA_ERROR_ASSERT);
EQUAL(CUDA_HARDWARE_STACK_ERROR, CUDA_ERROR_HARDWARE_STACK_ERROR);
EQUAL(CUDA_ILLEGAL_INSTRUCTION, CUDA_ERROR_ILLEGAL_INSTRUCTION);
EQUAL(CUDA_MISALIGNED_ADDRESS, CUDA_ERROR_MISALIGNED_ADDRESS);
EQUAL(CUDA_INVALID_ADDRESS_SPACE, CUDA_ERROR_INVALID_ADDRESS_SPACE);
EQUAL(CUDA_INVALID_PC, CUDA_ERROR_INVALID_PC);
EQUAL(CUDA_LAUNCH_FAILED, CUDA_ERROR_LAUNCH_FAILED);
EQUAL(CUDA_UNKNOWN, CUDA_ERROR_UNKNOWN);
EQUAL(CUDA_P2P_RANK, CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK);
EQUAL(CUDA_P2P_ATOMICS, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED);
EQUAL(CUDA_EVENT_NO_TIMING, CU_EVENT_DISABLE_TIMING);
EQUAL(CUDA_CLOCK_RATE, CU_DEVICE_ATTRIBUTE_CLOCK_RATE);
EQUAL(CUDA_MULTIPROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
EQUAL(CUDA_INTEGRATED, CU_DEVICE_ATTRIBUTE_INTEGRATED);
EQUAL(CUDA_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
EQUAL(CUDA_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
EQUAL(CUDA_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
EQUAL(CUDA_EVENT_DEFAULT, CU_EVENT_DEFAULT);
EQUAL(CUDA_LAUNCH_EARLY, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
EQUAL(sizeof(cuda_launch_attribute), sizeof(CUlaunchAttribute));
EQUAL(offsetof(cuda_launch_attribute, value), offsetof(CUlaunchAttribute, value));
EQUAL(sizeof(cuda_launch_config), sizeof(CUlaunchConfig));
EQUAL(offsetof(cuda_launch_config, block), offsetof(CUlaunchConfig, blockDimX));
EQUAL(offsetof(cuda_launch_config, shared), offsetof(CUlaunchConfig, sharedMemBytes));
EQUAL(offsetof(cuda_launch_config, stream), offsetof(CUlaunchConfig, hStream));
EQUAL(offsetof(cuda_launch_config, attributes), offsetof(CUlaunchConfig, attrs));
EQUAL(offsetof(cuda_launch_config, count), offsetof(CUlaunchConfig, numAttrs));
EQUAL(sizeof(cuda_ipc_memory), sizeof(CUipcMemHandle));
EQUAL(CUDA_MAP_BF16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
EQUAL(CUDA_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE);
EQUAL(CUDA_MAP_SWIZZLE_128, CU_TENSOR_MAP_SWIZZLE_128B);
EQUAL(CUDA_MAP_PROMOTE_256, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
EQUAL(0, CU_TENSOR_MAP_INTERLEAVE_NONE);
EQUAL(0, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
EQUAL(CUDA_CAPTURE_THREAD, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
EQUAL(CUDA_FUNCTION_MAX_SHARED, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);

// cuda.h names the current version of a function by a macro; the symbol we look up must be the one
// whose type is compared. cuEventElapsedTime is left out: its two versions have the same type.
#define cuda_launch_config CUlaunchConfig // our names become the driver's own
#define cuda_ipc_memory CUipcMemHandle
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define CHECK(field, function, symbol, parameters)                      \
    SAME(&function, cuda_result(*) parameters);                         \
    _Static_assert(!__builtin_strcmp(TEXT(function), symbol) ||         \
                       !__builtin_strcmp(symbol, "cuEventElapsedTime"), \
                   symbol " is not the version that cuda.h declares");
CUDA_FUNCTIONS(CHECK)
CUDA_OPTIONAL_FUNCTIONS(CHECK)
#undef CHECK

// ---- cuBLASLt -----------------------------------------------------------------------------------

SAME(cublaslt_handle, cublasLtHandle_t);
EQUAL(sizeof(cublaslt_algorithm), sizeof(cublasLtMatmulAlgo_t));
EQUAL(sizeof(cublaslt_heuristic), sizeof(cublasLtMatmulHeuristicResult_t));
EQUAL(offsetof(cublaslt_heuristic, algorithm), offsetof(cublasLtMatmulHeuristicResult_t, algo));
EQUAL(offsetof(cublaslt_heuristic, workspace),
      offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
EQUAL(offsetof(cublaslt_heuristic, state), offsetof(cublasLtMatmulHeuristicResult_t, state));

EQUAL(CUBLASLT_R_32F, CUDA_R_32F);
EQUAL(CUBLASLT_R_16BF, CUDA_R_16BF);
EQUAL(CUBLASLT_COMPUTE_32F, CUBLAS_COMPUTE_32F);
EQUAL(CUBLASLT_OP_T, CUBLAS_OP_T);
EQUAL(CUBLASLT_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSA);
EQUAL(CUBLASLT_DESC_TRANSB, CUBLASLT_MATMUL_DESC_TRANSB);
EQUAL(CUBLASLT_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_EPILOGUE);
EQUAL(CUBLASLT_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
EQUAL(CUBLASLT_RELU, CUBLASLT_EPILOGUE_RELU);
EQUAL(CUBLASLT_ADD_BIAS, CUBLASLT_EPILOGUE_BIAS);
EQUAL(CUBLASLT_RELU | CUBLASLT_ADD_BIAS, CUBLASLT_EPILOGUE_RELU_BIAS);
EQUAL(CUBLASLT_PREF_ALIGNMENT_C, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
EQUAL(CUBLASLT_PREF_ALIGNMENT_D, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
EQUAL(CUBLASLT_PREF_WORKSPACE, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
EQUAL(CUBLASLT_PREF_REDUCTION, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
EQUAL(CUBLASLT_REDUCE_IN_F32, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);

// Our names of the library's pointers become the library's own before the types are compared.
#define cublaslt_desc cublasLtMatmulDesc_t
#define cublaslt_layout cublasLtMatrixLayout_t
#define cublaslt_preference cublasLtMatmulPreference_t
#define cublaslt_algorithm cublasLtMatmulAlgo_t
#define cublaslt_heuristic cublasLtMatmulHeuristicResult_t
#define CHECK(field, function, parameters) SAME(&function, unsigned(*) parameters);
CUBLASLT_FUNCTIONS(CHECK)
#undef CHECK

// ---- NCCL ---------------------------------------------------------------------------------------

#ifdef HAVE_NCCL
SAME(nccl_comm, ncclComm_t);
EQUAL(sizeof(nccl_id), sizeof(ncclUniqueId));
EQUAL(sizeof(nccl_type), sizeof(ncclDataType_t));
EQUAL(NCCL_UINT8, ncclUint8);
EQUAL(NCCL_FLOAT32, ncclFloat32);
EQUAL(NCCL_SUM, ncclSum);

#define nccl_id ncclUniqueId
#define nccl_type ncclDataType_t
#define nccl_operation ncclRedOp_t
#define CHECK(field, function, parameters) SAME(&function, unsigned(*) parameters);
NCCL_FUNCTIONS(CHECK)
#undef CHECK
SAME(&ncclGetErrorString, const char *(*)(ncclResult_t));
#endif
