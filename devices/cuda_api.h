// What this program uses of NVIDIA's driver API and of cuBLASLt, declared here and opened at run
// time, so that it builds without NVIDIA's headers and runs on machines without its libraries.
//
// tests/cuda/declarations.c compares every line with NVIDIA's own headers where they are installed.
#ifndef DITMOE_CUDA_API_H
#define DITMOE_CUDA_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef unsigned cuda_result; // CUresult
typedef int cuda_device_id;   // CUdevice
typedef unsigned long long cuda_address;
typedef struct CUctx_st *cuda_context;
typedef struct CUmod_st *cuda_module;
typedef struct CUfunc_st *cuda_function;
typedef struct CUstream_st *cuda_stream;
typedef struct CUevent_st *cuda_event;
typedef struct CUtensorMap_st cuda_tensor_map; // 128 bytes, aligned to 64
typedef struct {
    char bytes[64];
} cuda_ipc_memory; // CUipcMemHandle

// CUlaunchAttribute and CUlaunchConfig
typedef struct {
    unsigned id;
    union {
        uint64_t words[8];
        int value;
    };
} cuda_launch_attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    cuda_stream stream;
    cuda_launch_attribute *attributes;
    unsigned count;
} cuda_launch_config;
typedef struct CUgraph_st *cuda_graph;
typedef struct CUgraphExec_st *cuda_graph_exec;

enum {
    CUDA_OK = 0,
    CUDA_OUT_OF_MEMORY = 2,
    CUDA_NO_DEVICE = 100,

    // after these the driver refuses all further work of the process on the device
    CUDA_ECC_UNCORRECTABLE = 214,
    CUDA_NVLINK_UNCORRECTABLE = 220,
    CUDA_CONTAINED = 226,
    CUDA_ILLEGAL_ADDRESS = 700,
    CUDA_LAUNCH_TIMEOUT = 702,
    CUDA_CONTEXT_IS_DESTROYED = 709,
    CUDA_ASSERT = 710,
    CUDA_HARDWARE_STACK_ERROR = 714,
    CUDA_ILLEGAL_INSTRUCTION = 715,
    CUDA_MISALIGNED_ADDRESS = 716,
    CUDA_INVALID_ADDRESS_SPACE = 717,
    CUDA_INVALID_PC = 718,
    CUDA_LAUNCH_FAILED = 719,
    CUDA_UNKNOWN = 999,

    CUDA_P2P_RANK = 1, // attributes from device to device
    CUDA_P2P_ATOMICS = 3,

    CUDA_CLOCK_RATE = 13, // attributes of a device
    CUDA_MULTIPROCESSORS = 16,
    CUDA_INTEGRATED = 18,
    CUDA_CAPABILITY_MAJOR = 75,
    CUDA_CAPABILITY_MINOR = 76,

    CUDA_STREAM_NON_BLOCKING = 1, // does not wait for the default stream
    CUDA_HIGHEST_PRIORITY = -1000, // the driver takes the highest that there is
    CUDA_EVENT_DEFAULT = 0,       // can be timed
    CUDA_EVENT_NO_TIMING = 2,
    CUDA_CAPTURE_THREAD = 1,      // a capture forbids calls that would break it in this thread only

    CUDA_FUNCTION_MAX_SHARED = 8, // attribute of a function: dynamic shared memory, bytes

    CUDA_IPC_PEER_ACCESS = 1, // the device may read and write what is opened

    CUDA_LAUNCH_EARLY = 6, // attribute of a launch: it may start before the one before it ends

    CUDA_MAP_BF16 = 9, // of a tensor map: the type of its elements
    CUDA_MAP_SWIZZLE_NONE = 0,
    CUDA_MAP_SWIZZLE_64 = 2,
    CUDA_MAP_SWIZZLE_128 = 3,
    CUDA_MAP_PROMOTE_256 = 3, // what it reads comes into L2 in pieces of so many bytes
};

// F(field of struct cuda_api, function of cuda.h, symbol in the library, parameters)
#define CUDA_FUNCTIONS(F)                                                                        \
    F(init, cuInit, "cuInit", (unsigned))                                                        \
    F(driver_version, cuDriverGetVersion, "cuDriverGetVersion", (int *))                         \
    F(error_name, cuGetErrorName, "cuGetErrorName", (cuda_result, const char **))                \
    F(device_count, cuDeviceGetCount, "cuDeviceGetCount", (int *))                               \
    F(device_get, cuDeviceGet, "cuDeviceGet", (cuda_device_id *, int))                           \
    F(device_name, cuDeviceGetName, "cuDeviceGetName", (char *, int, cuda_device_id))            \
    F(device_memory, cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *, cuda_device_id))        \
    F(device_attribute, cuDeviceGetAttribute, "cuDeviceGetAttribute",                            \
      (int *, unsigned, cuda_device_id))                                                         \
    F(device_pci, cuDeviceGetPCIBusId, "cuDeviceGetPCIBusId", (char *, int, cuda_device_id))     \
    F(context_retain, cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain",                      \
      (cuda_context *, cuda_device_id))                                                          \
    F(context_release, cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2",                \
      (cuda_device_id))                                                                          \
    F(context_set, cuCtxSetCurrent, "cuCtxSetCurrent", (cuda_context))                           \
    F(module_load, cuModuleLoadData, "cuModuleLoadData", (cuda_module *, const void *))          \
    F(module_unload, cuModuleUnload, "cuModuleUnload", (cuda_module))                            \
    F(module_function, cuModuleGetFunction, "cuModuleGetFunction",                               \
      (cuda_function *, cuda_module, const char *))                                              \
    F(function_attribute, cuFuncSetAttribute, "cuFuncSetAttribute",                              \
      (cuda_function, unsigned, int))                                                            \
    F(alloc, cuMemAlloc, "cuMemAlloc_v2", (cuda_address *, size_t))                              \
    F(free, cuMemFree, "cuMemFree_v2", (cuda_address))                                           \
    F(write, cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2",                                          \
      (cuda_address, const void *, size_t, cuda_stream))                                         \
    F(memory, cuMemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *))                             \
    F(host_alloc, cuMemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                 \
    F(host_free, cuMemFreeHost, "cuMemFreeHost", (void *))                                       \
    F(host_register, cuMemHostRegister, "cuMemHostRegister_v2", (void *, size_t, unsigned))      \
    F(host_unregister, cuMemHostUnregister, "cuMemHostUnregister", (void *))                     \
    F(read, cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2",                                           \
      (void *, cuda_address, size_t, cuda_stream))                                               \
    F(copy, cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2",                                           \
      (cuda_address, cuda_address, size_t, cuda_stream))                                         \
    F(peer, cuMemcpyPeerAsync, "cuMemcpyPeerAsync",                                              \
      (cuda_address, cuda_context, cuda_address, cuda_context, size_t, cuda_stream))             \
    F(fill, cuMemsetD32Async, "cuMemsetD32Async", (cuda_address, unsigned, size_t, cuda_stream)) \
    F(stream_create, cuStreamCreate, "cuStreamCreate", (cuda_stream *, unsigned))                \
    F(stream_destroy, cuStreamDestroy, "cuStreamDestroy_v2", (cuda_stream))                      \
    F(stream_sync, cuStreamSynchronize, "cuStreamSynchronize", (cuda_stream))                    \
    F(stream_wait, cuStreamWaitEvent, "cuStreamWaitEvent", (cuda_stream, cuda_event, unsigned))  \
    F(launch, cuLaunchKernel, "cuLaunchKernel",                                                  \
      (cuda_function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,      \
       cuda_stream, void **, void **))                                                           \
    F(capture_begin, cuStreamBeginCapture, "cuStreamBeginCapture_v2", (cuda_stream, unsigned))   \
    F(capture_end, cuStreamEndCapture, "cuStreamEndCapture", (cuda_stream, cuda_graph *))        \
    F(graph_instantiate, cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags",             \
      (cuda_graph_exec *, cuda_graph, unsigned long long))                                       \
    F(graph_launch, cuGraphLaunch, "cuGraphLaunch", (cuda_graph_exec, cuda_stream))              \
    F(graph_destroy, cuGraphDestroy, "cuGraphDestroy", (cuda_graph))                             \
    F(graph_exec_destroy, cuGraphExecDestroy, "cuGraphExecDestroy", (cuda_graph_exec))           \
    F(event_create, cuEventCreate, "cuEventCreate", (cuda_event *, unsigned))                    \
    F(event_destroy, cuEventDestroy, "cuEventDestroy_v2", (cuda_event))                          \
    F(event_record, cuEventRecord, "cuEventRecord", (cuda_event, cuda_stream))                   \
    F(event_sync, cuEventSynchronize, "cuEventSynchronize", (cuda_event))                        \
    F(event_elapsed, cuEventElapsedTime, "cuEventElapsedTime", (float *, cuda_event, cuda_event))

// Those that a driver may lack; the field is then NULL.
#define CUDA_OPTIONAL_FUNCTIONS(F)                                                                \
    F(launch_with, cuLaunchKernelEx, "cuLaunchKernelEx", /* CUDA 11.8 */                          \
      (const cuda_launch_config *, cuda_function, void **, void **))                              \
    F(parameter, cuFuncGetParamInfo, "cuFuncGetParamInfo", /* CUDA 12.4 */                        \
      (cuda_function, size_t, size_t *, size_t *))                                                \
    F(tensor_map, cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled", /* for Hopper and later */    \
      (cuda_tensor_map *, unsigned, unsigned, void *, const uint64_t *, const uint64_t *,         \
       const uint32_t *, const uint32_t *, unsigned, unsigned, unsigned, unsigned))               \
    F(pixel_map, cuTensorMapEncodeIm2col, "cuTensorMapEncodeIm2col",                              \
      (cuda_tensor_map *, unsigned, unsigned, void *, const uint64_t *, const uint64_t *,         \
       const int *, const int *, uint32_t, uint32_t, const uint32_t *, unsigned, unsigned,        \
       unsigned, unsigned))                                                                       \
    F(stream_urgent, cuStreamCreateWithPriority, "cuStreamCreateWithPriority",                    \
      (cuda_stream *, unsigned, int))                                                             \
    F(ipc_get, cuIpcGetMemHandle, "cuIpcGetMemHandle", (cuda_ipc_memory *, cuda_address))         \
    F(ipc_open, cuIpcOpenMemHandle, "cuIpcOpenMemHandle_v2",                                      \
      (cuda_address *, cuda_ipc_memory, unsigned))                                                \
    F(ipc_close, cuIpcCloseMemHandle, "cuIpcCloseMemHandle", (cuda_address))                      \
    F(can_access_peer, cuDeviceCanAccessPeer, "cuDeviceCanAccessPeer",                            \
      (int *, cuda_device_id, cuda_device_id))                                                    \
    F(p2p_attribute, cuDeviceGetP2PAttribute, "cuDeviceGetP2PAttribute",                          \
      (int *, unsigned, cuda_device_id, cuda_device_id))

struct cuda_api {
#define CUDA_FIELD(field, function, symbol, parameters) cuda_result(*field) parameters;
    CUDA_FUNCTIONS(CUDA_FIELD)
    CUDA_OPTIONAL_FUNCTIONS(CUDA_FIELD)
#undef CUDA_FIELD
};

// Puts the address of `symbol` of an opened library into *field, a pointer to a function; false: it
// has none.
bool cuda_symbol(void *library, const char *symbol, void *field);

// The driver, opened and initialised once in a process, or NULL: then *why says in one line what is
// wrong with it, or is "" on a machine without an NVIDIA driver or GPU.
const struct cuda_api *cuda_driver(const char **why);

// ---- cuBLASLt -----------------------------------------------------------------------------------

typedef struct cublasLtContext *cublaslt_handle;

// What cublasLt...Create() returns.
typedef void *cublaslt_desc, *cublaslt_layout, *cublaslt_preference;

// cublasLtMatmulAlgo_t and cublasLtMatmulHeuristicResult_t
typedef struct {
    uint64_t data[8];
} cublaslt_algorithm;
typedef struct {
    cublaslt_algorithm algorithm;
    size_t workspace;
    unsigned state;
    float waves;
    int reserved[4];
} cublaslt_heuristic;

enum {
    CUBLASLT_R_32F = 0, // cudaDataType
    CUBLASLT_R_16BF = 14,
    CUBLASLT_COMPUTE_32F = 68, // true f32, never TF32
    CUBLASLT_OP_T = 1,
    CUBLASLT_DESC_TRANSA = 3,
    CUBLASLT_DESC_TRANSB = 4,
    CUBLASLT_DESC_EPILOGUE = 7,
    CUBLASLT_DESC_BIAS_POINTER = 8,
    CUBLASLT_RELU = 2, // epilogues, also together
    CUBLASLT_ADD_BIAS = 4,
    CUBLASLT_PREF_WORKSPACE = 1,
    CUBLASLT_PREF_REDUCTION = 3,
    CUBLASLT_PREF_ALIGNMENT_C = 7, // bytes, at least
    CUBLASLT_PREF_ALIGNMENT_D = 8,
    CUBLASLT_REDUCE_IN_F32 = 2,
};

// F(field, function of cublasLt.h, parameters)
#define CUBLASLT_FUNCTIONS(F)                                                                     \
    F(create, cublasLtCreate, (cublaslt_handle *))                                                \
    F(destroy, cublasLtDestroy, (cublaslt_handle))                                                \
    F(desc_create, cublasLtMatmulDescCreate, (cublaslt_desc *, unsigned, unsigned))               \
    F(desc_destroy, cublasLtMatmulDescDestroy, (cublaslt_desc))                                   \
    F(desc_set, cublasLtMatmulDescSetAttribute, (cublaslt_desc, unsigned, const void *, size_t))  \
    F(layout_create, cublasLtMatrixLayoutCreate,                                                  \
      (cublaslt_layout *, unsigned, uint64_t, uint64_t, int64_t))                                 \
    F(layout_destroy, cublasLtMatrixLayoutDestroy, (cublaslt_layout))                             \
    F(pref_create, cublasLtMatmulPreferenceCreate, (cublaslt_preference *))                       \
    F(pref_destroy, cublasLtMatmulPreferenceDestroy, (cublaslt_preference))                       \
    F(pref_set, cublasLtMatmulPreferenceSetAttribute,                                             \
      (cublaslt_preference, unsigned, const void *, size_t))                                      \
    F(heuristic, cublasLtMatmulAlgoGetHeuristic,                                                  \
      (cublaslt_handle, cublaslt_desc, cublaslt_layout, cublaslt_layout, cublaslt_layout,         \
       cublaslt_layout, cublaslt_preference, int, cublaslt_heuristic *, int *))                   \
    F(matmul, cublasLtMatmul,                                                                     \
      (cublaslt_handle, cublaslt_desc, const void *, const void *, cublaslt_layout, const void *, \
       cublaslt_layout, const void *, const void *, cublaslt_layout, void *, cublaslt_layout,     \
       const cublaslt_algorithm *, void *, size_t, cuda_stream))

struct cublaslt_api {
#define CUBLASLT_FIELD(field, function, parameters) unsigned(*field) parameters;
    CUBLASLT_FUNCTIONS(CUBLASLT_FIELD)
#undef CUBLASLT_FIELD
};

// cuBLASLt 13 or 12, or NULL on a machine without it.
const struct cublaslt_api *cublaslt_library(void);
// "cuBLASLt 13.0.0", or what is wrong with it: "no cuBLASLt 12 or 13: ...".
const char *cublaslt_text(void);

// ---- NCCL ---------------------------------------------------------------------------------------

typedef struct ncclComm *nccl_comm;
typedef struct {
    char bytes[128];
} nccl_id; // ncclUniqueId

enum {
    NCCL_OLDEST = 20700, // the first with sends and receives
    NCCL_UINT8 = 1,      // ncclDataType_t
    NCCL_FLOAT32 = 7,
    NCCL_SUM = 0, // ncclRedOp_t
};

// F(field, function of nccl.h, parameters); they return ncclResult_t, 0 for success
#define NCCL_FUNCTIONS(F)                                                                         \
    F(version, ncclGetVersion, (int *))                                                           \
    F(unique_id, ncclGetUniqueId, (nccl_id *))                                                    \
    F(comm_init, ncclCommInitRank, (nccl_comm *, int, nccl_id, int))                              \
    F(comm_destroy, ncclCommDestroy, (nccl_comm))                                                 \
    F(group_start, ncclGroupStart, (void))                                                        \
    F(group_end, ncclGroupEnd, (void))                                                            \
    F(send, ncclSend, (const void *, size_t, nccl_type, int, nccl_comm, cuda_stream))             \
    F(receive, ncclRecv, (void *, size_t, nccl_type, int, nccl_comm, cuda_stream))                \
    F(all_reduce, ncclAllReduce,                                                                  \
      (const void *, void *, size_t, nccl_type, nccl_operation, nccl_comm, cuda_stream))
typedef unsigned nccl_type, nccl_operation; // the compiler's types of ncclDataType_t, ncclRedOp_t

struct nccl_api {
#define NCCL_FIELD(field, function, parameters) unsigned(*field) parameters;
    NCCL_FUNCTIONS(NCCL_FIELD)
#undef NCCL_FIELD
    const char *(*error_text)(unsigned); // ncclGetErrorString
};

#endif
