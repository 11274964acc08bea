// THE interface between the system and a device: a table of verbs, not of operations.
//
// A backend (OpenCL; CUDA) lists its devices, opens one, moves memory, launches kernels by number
// and multiplies matrices. It knows nothing of layers. Operations are written once, above this
// line, in runtime/ops.h; kernels once, in kernels.cl; their names, group sizes and arguments once,
// in kernels.def. So a new backend costs these verbs and nothing else.
//
// Conventions: functions return 0 or a negative code of error.h. Memory is a handle, never a
// pointer. Work is put on a stream and runs in order; write/read return when the host memory may be
// reused / holds the data; everything else is asynchronous and reports late errors at sync().
// Objects are used by one thread at a time. Sizes and offsets are bytes unless said otherwise.
#ifndef DITMOE_DEVICE_H
#define DITMOE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

// Storage types. Arithmetic and accumulation are f32 whatever the storage.
enum dtype { F32, BF16, I32, I64 };
size_t dtype_size(enum dtype type);
const char *dtype_name(enum dtype type);

// For messages and tables.
static inline double mib(uint64_t bytes)
{
    return (double)bytes / (1 << 20);
}

enum device_kind { DEVICE_CPU, DEVICE_GPU, DEVICE_ACCELERATOR };
const char *device_kind_name(enum device_kind kind);

struct backend;
struct device;
struct mem;
struct stream;
struct event;
struct graph;
struct group;

// What `ditmoe devices` shows; filled by a backend's list() and completed from hwloc by devices.c.
struct device_info {
    const struct backend *backend;
    int index;             // number within its backend
    char key[24];          // what --device takes: "opencl:0"
    char name[128];        // as the driver says it; names repeat, keys do not
    char platform[128];    // OpenCL platform name
    char vendor[128];
    char driver[96];       // driver version
    char language[64];     // OpenCL C version, or compute capability
    enum device_kind kind;
    uint64_t memory;       // bytes we may plan with: the least of driver, hwloc and OS
    uint64_t memory_driver; // bytes the driver reports (PoCL misreports)
    uint64_t max_alloc;    // largest single allocation, bytes
    int compute_units;
    int clock_mhz;
    int vector_width;      // native float vector width
    size_t align;          // bytes; every view starts at a multiple of this
    bool fp16, fp64;
    bool unified;          // shares memory with the host (CPU devices, integrated GPUs)
    char pci[20];          // "0000:3b:00.0", or "" for devices without a PCI place (PoCL)
    int numa;              // NUMA node from hwloc, or -1: at the machine's root
    char place[64];        // hwloc's words for it: "NUMANode 0 / PCI 0000:3b:00.0" or "Machine"
    char twin[24];         // key of the same device (PCI id) through another backend, or ""
    char library[128];     // the library that multiplies matrices, or why there is none; or ""
    char tuned[96];        // the tuned kernels that it has: "attention, fused"; or ""
    int nvlinks;           // NVLink connections that are up; 0 also where that is not known
};

// How a device reaches another of its backend: what copies between them can use.
struct device_link {
    bool peer;    // reads and writes the other's memory itself
    bool nvlink;  // by NVLink, not PCIe alone
    bool atomics; // with atomic operations
    int rank;     // the driver's word for how fast links are, beside each other: 0 is the fastest
};

// Every device of every backend, in the order of their keys. Returns the count (<= max), 0 when
// there is none, or a negative code. A platform that fails to answer is skipped.
int devices_list(struct device_info *out, int max);

// Why the last devices_list() left devices out that seem to be there, in one line ("cuda: the
// NVIDIA driver is too old: ..."); "" when it did not.
const char *devices_note(void);

// Finds `key` ("opencl:1"; "auto" or NULL: the best device, GPUs first, CUDA before OpenCL where a
// device has both). ERR_NODEVICE names what there is.
int devices_find(const char *key, struct device_info *out);

// Kernel numbers: one per line of kernels.def.
enum kernel {
#define KERNEL(name, ...) KERNEL_##name,
#include "devices/kernels.def"
#undef KERNEL
    KERNEL_COUNT
};

enum kernel_form { FORM_ANY, FORM_GPU, FORM_CPU };

struct kernel_spec {
    const char *name;
    int group[2];     // work-group size (x, y); z is always 1
    const char *args; // one letter an argument: b buffer, i int32, u uint32, f float
    enum kernel_form form;
};
extern const struct kernel_spec kernel_specs[KERNEL_COUNT];

// One kernel argument. `b` may be NULL for an operand that is absent.
union arg {
    struct mem *b;
    int32_t i;
    uint32_t u;
    float f;
};

// C[m,n] = op(A)[m,k] op(B)[k,n] (+ bias[n]) (+ C), row-major, f32 accumulation.
// trans_a: A is stored [k,m]. trans_b: B is stored [n,k] (the layout of a Linear weight).
//
// Ragged forms multiply by expert e of `groups`, rows split by the device array offsets[groups+1]
// (int32, ascending, offsets[0] = 0, offsets[groups] <= the stored number of rows):
//   GEMM_RAGGED_M: rows offsets[e]..offsets[e+1] of A and C belong to e; B is [groups] matrices,
//                  one after the other; m is the stored number of rows. (expert forward, dX)
//   GEMM_RAGGED_K: rows offsets[e].. of A (stored [k,m]) and of B (stored [k,n]) are summed over
//                  into C[e], [groups] matrices [m,n]; k is the stored number of rows. An expert
//                  without rows gets zero (or keeps C, when accumulating). (expert dW)
// Rows past offsets[groups] are never read into a result and never written.
enum gemm_ragged { GEMM_PLAIN, GEMM_RAGGED_M, GEMM_RAGGED_K };

// SwiGLU within a product, for devices and widths F that struct device's swiglu_columns allows;
// neither bias nor accumulate, ragged over rows or plain, h and C of one type:
//   SWIGLU_FORWARD:  trans_b, n = 2F: the product is g | u; h[m,F] = silu(g) * u, and C[m,2F] = g |
//                    u unless c is NULL.
//   SWIGLU_BACKWARD: not trans_b, n = F: the product is dh; C[m,2F] holds g | u and becomes dg |
//                    du; h[m,F] = silu(g) * u once more, unless NULL (backends with rebuilds_hidden
//                    only); dots[F/64,m] f32 the sums of dh h over each 64 columns, unless NULL
//                    (backends with swiglu_dots, for k a multiple of 8 and at most swiglu_dots
//                    groups).
enum gemm_swiglu { SWIGLU_NONE, SWIGLU_FORWARD, SWIGLU_BACKWARD };
struct gemm {
    enum gemm_ragged ragged;
    int m, n, k;
    bool trans_a, trans_b;
    bool accumulate;
    struct mem *a, *b, *c;
    enum dtype type_a, type_b, type_c; // F32 or BF16
    struct mem *bias;                  // [n] F32, or NULL; plain only
    int groups;
    struct mem *offsets;
    struct mem *space; // scratch of at least gemm_space() bytes; may be NULL when that is 0
    enum gemm_swiglu swiglu;
    struct mem *h;      // SWIGLU_FORWARD; SWIGLU_BACKWARD where wanted
    struct mem *dots;   // SWIGLU_BACKWARD where wanted
    struct mem *norms;  // where wanted: gemm_norms() floats, whose sum of squares is that of C
    struct mem *packed; // B as gemm_pack() left it, for the same B and swiglu; or NULL
};

// Whole operations that a backend may take over with its own library or its own launch shape.
// accelerate()'s `args` for attention are an array of union arg, in the order in which
// runtime/ops_attention.c lists them: o, lse (NULL: not wanted), qkv, heads, tokens, head size,
// scale, lse wanted, images * heads, and three block sizes of the CPU form; dqkv, delta, dout, o,
// lse, qkv, images, heads, tokens, head size, scale.
// Those of the others are structs of devices/accelerate.h.
enum accelerated {
    ACCELERATE_ATTENTION_FWD,
    ACCELERATE_ATTENTION_BWD,
    ACCELERATE_NORM_FWD,     // struct norm_forward
    ACCELERATE_NORM_BWD,     // struct norm_backward
    ACCELERATE_DISPATCH_FWD, // struct dispatch
    ACCELERATE_COMBINE_BWD,  // struct combine_backward
    ACCELERATE_QK_NORM_FWD,  // struct qk_norm
    ACCELERATE_QK_NORM_BWD,
    ACCELERATE_QK_ATTENTION_FWD, // struct qk_attention
    ACCELERATE_COLUMN_SUMS, // struct column_sums
    ACCELERATE_ROUTER_DW,   // struct router_gradient
    ACCELERATE_ROUTE,       // struct route
    ACCELERATE_NORM2,       // struct norm2
    ACCELERATE_ADAMW,       // struct adamw_step
    ACCELERATE_CONV2D,      // struct convolution
    ACCELERATE_GROUP_NORM,  // struct group_norm_forward
    ACCELERATE_PEER_ROWS,   // struct peer_rows
    ACCELERATE_POOL,        // struct pool_forward
    ACCELERATE_COUNT
};
enum { NOT_MINE = 1 }; // accelerate()'s polite refusal: the portable kernel runs instead

// What one member of a group of devices gives to the others, so that they find each other; what
// names memory to another process.
enum { GROUP_ID = 128, SHARE_ID = 96 };

enum open_flags {
    OPEN_BF16 = 1,      // activations are stored as bf16 (compiled into the kernels); f32 otherwise
    OPEN_GPU_FORMS = 2, // use the GPU forms of kernels on a CPU device (tests)
    OPEN_PORTABLE = 4,  // accelerate() always answers NOT_MINE; gemm uses the project's own kernels
};

struct backend {
    const char *name; // "opencl"

    // devices
    int (*list)(struct device_info *out, int max);
    const char *(*note)(void); // optional: why the last list() left devices out, one line, or ""
    int (*link)(const struct device_info *from, const struct device_info *to,
                struct device_link *out); // optional; both of this backend
    int (*open)(const struct device_info *info, unsigned flags, struct device **out);
    void (*close)(struct device *dev);

    // memory; a view must start at a multiple of info.align and is freed before its parent.
    // A view of a view is allowed.
    int (*alloc)(struct device *dev, size_t bytes, struct mem **out);
    int (*view)(struct mem *parent, size_t offset, size_t bytes, struct mem **out);
    void (*free)(struct mem *mem);
    size_t (*size)(const struct mem *mem); // bytes, as asked for
    // Optional: memory that devices of this backend in other processes of the machine read and
    // write as their own. alloc_shared() is alloc() of such memory and gives its id; reach() makes
    // another process's known here (ERR_NODEVICE: this device cannot). free() of what was reached
    // leaves the memory alone.
    int (*alloc_shared)(struct device *dev, size_t bytes, struct mem **out,
                        unsigned char id[SHARE_ID]);
    int (*reach)(struct device *dev, const unsigned char id[SHARE_ID], struct mem **out);

    // streams, transfers (offsets in bytes); fill repeats a 32-bit pattern, bytes a multiple of 4
    int (*stream_new)(struct device *dev, struct stream **out);
    int (*stream_urgent)(struct device *dev, struct stream **out); // optional: goes before others
    void (*stream_free)(struct stream *stream);
    int (*write)(struct stream *s, struct mem *dst, size_t offset, const void *src, size_t bytes);
    int (*read)(struct stream *s, const struct mem *src, size_t offset, void *dst, size_t bytes);
    // The same, only begun: the host's memory belongs to the stream until it is there.
    int (*write_begin)(struct stream *s, struct mem *dst, size_t offset, const void *src,
                       size_t bytes);
    int (*read_begin)(struct stream *s, const struct mem *src, size_t offset, void *dst,
                      size_t bytes);
    // Optional: locks pages of the host's memory (`at` starts one), so that such copies need none
    // in between.
    int (*pin)(struct device *dev, void *at, size_t bytes);
    void (*unpin)(struct device *dev, void *at);
    int (*copy)(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                size_t src_offset, size_t bytes);
    int (*peer)(struct stream *s, struct mem *dst, size_t dst_offset, const struct mem *src,
                size_t src_offset, size_t bytes); // optional: from another device's memory
    int (*fill)(struct stream *s, struct mem *dst, size_t offset, size_t bytes, uint32_t pattern);

    // work; groups counts work-groups in x, y, z; a launch with a zero count does nothing
    int (*launch)(struct stream *s, enum kernel kernel, const int groups[3], const union arg *args,
                  int count);
    size_t (*gemm_space)(struct device *dev, const struct gemm *g); // scratch bytes that gemm wants
    int (*gemm)(struct stream *s, const struct gemm *g);
    int (*gemm_norms)(struct device *dev, const struct gemm *g); // optional; 0: it leaves none
    // Optional, for a B [n,k] that many products meet: the bytes of the form in which gemm wants it
    // (0: as it is), which does not depend on m nor on swiglu; and making it, in g->packed from
    // g->b.
    size_t (*gemm_packed)(struct device *dev, const struct gemm *g);
    int (*gemm_pack)(struct stream *s, const struct gemm *g);
    int (*accelerate)(struct stream *s, enum accelerated op, const void *args); // optional

    // Optional: work recorded once and replayed as a whole. Between capture() and capture_end() the
    // stream takes launches, products, copies and fills without doing them; nothing may be read,
    // written from the host or waited for. The graph uses the memory that was named then.
    int (*capture)(struct stream *s);
    int (*capture_end)(struct stream *s, struct graph **out); // *out NULL: the capture failed
    int (*replay)(struct stream *s, struct graph *graph);
    void (*graph_free)(struct graph *graph);

    // Optional: devices of this backend as one group that passes memory between its members, each
    // opened by a process of its own, without the host (NCCL). group_can(): 0, or ERR_NODEVICE and
    // why not. One member makes an id, all open the group with it at the same time. Transfers
    // between begin and end are one step for all of them: what one member sends, another receives
    // in it, in the same order pair by pair. sum: [count] f32 in place, over all members, the same
    // bits on each.
    int (*group_can)(void);
    int (*group_id)(struct device *dev, unsigned char id[GROUP_ID]);
    int (*group_open)(struct device *dev, const unsigned char id[GROUP_ID], int member, int members,
                      struct group **out);
    void (*group_close)(struct group *group);
    int (*group_begin)(struct group *group);
    int (*group_end)(struct group *group);
    int (*group_send)(struct group *group, struct stream *s, const struct mem *src, size_t offset,
                      size_t bytes, int member);
    int (*group_receive)(struct group *group, struct stream *s, struct mem *dst, size_t offset,
                         size_t bytes, int member);
    int (*group_sum)(struct group *group, struct stream *s, struct mem *at, size_t offset,
                     size_t count);

    // events (for timing and for ordering streams) and the host's wait
    int (*event_new)(struct device *dev, struct event **out);
    void (*event_free)(struct event *event);
    int (*record)(struct stream *s, struct event *event);
    int (*wait)(struct stream *s, struct event *event);
    int (*elapsed)(struct event *from, struct event *to, double *seconds); // both recorded and done
    int (*sync)(struct stream *s);
};

extern const struct backend backend_cuda, backend_opencl;

// Every backend's device starts with this.
struct device {
    const struct backend *api;
    struct device_info info;
    enum dtype act;       // storage type of activations: F32 or BF16
    bool cpu_forms;       // launch `name_cpu` kernels where there are any
    int swiglu_columns;   // gemm() takes SwiGLU in where F is a multiple of this; 0: never
    int fused_width;      // accelerate() fuses combine and LayerNorm for multiples of 128 up to this
    bool rebuilds_hidden; // SWIGLU_BACKWARD can write h again, so that it need not be kept
    int swiglu_dots;      // SWIGLU_BACKWARD can write dots, for at most so many groups; 0: never
    bool half_weights;    // products want weights as bf16 (runtime/tensor.h: in two halves)
    int spare;            // compute units that products leave to work on another stream; set by its caller
    unsigned flags;       // as opened
    uint64_t allocations; // alloc() calls so far; tests assert that training makes none
    uint64_t allocated;   // bytes allocated now
};

// For a backend's alloc(): ERR_NOMEM with one line when `bytes` more are too many for the device,
// in one buffer or in all.
int device_fits(const struct device *dev, size_t bytes);

#endif
