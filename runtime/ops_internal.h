// What the ops_*.c files share: arguments and launches. Not for other layers.
//
//     TRY(LAUNCH(c, FORM(c, add), GROUPS(count, 256), 1, 1, BUF(y), BUF(x), UINT(count)));
#ifndef DITMOE_OPS_INTERNAL_H
#define DITMOE_OPS_INTERNAL_H

#include "devices/accelerate.h"
#include "runtime/ops.h"
#include "runtime/profile.h"

#define BUF(tensor) ((union arg){.b = (tensor)->mem})
#define BUF_OR_NULL(tensor) ((union arg){.b = (tensor) ? (tensor)->mem : NULL})
#define LOW(tensor) ((tensor) ? (tensor)->low : NULL)
#define MEM(tensor) ((tensor) ? (tensor)->mem : NULL) // for the structs of devices/accelerate.h
#define NO_BUF ((union arg){.b = NULL})
#define INT(value) ((union arg){.i = arg_int(value)})
#define UINT(value) ((union arg){.u = arg_uint(value)})
#define FLOAT(value) ((union arg){.f = (value)})

static inline int32_t arg_int(int64_t value)
{
    BUG_IF(value < INT32_MIN || value > INT32_MAX);
    return (int32_t)value;
}

static inline uint32_t arg_uint(int64_t value)
{
    BUG_IF(value < 0 || value > UINT32_MAX);
    return (uint32_t)value;
}

// Work-groups (or chunks) of `size` that cover `count`.
static inline int64_t cover(int64_t count, int64_t size)
{
    return (count + size - 1) / size;
}

// The number of the kernel's form for this device: KERNEL_name or KERNEL_name_cpu.
#define FORM(c, name) ((c)->dev->cpu_forms ? KERNEL_##name##_cpu : KERNEL_##name)

// Launches groups gx * gy * gz of a kernel; in a dry context does nothing and returns 0.
#define LAUNCH(c, kernel, gx, gy, gz, ...)                             \
    op_launch(c, kernel, gx, gy, gz, (const union arg[]){__VA_ARGS__}, \
              (int)(sizeof((const union arg[]){__VA_ARGS__}) / sizeof(union arg)))

static inline int op_launch(struct context *c, enum kernel kernel, int64_t gx, int64_t gy,
                            int64_t gz, const union arg *args, int count)
{
    if (c->dry)
        return 0;
    const int groups[3] = {arg_int(gx), arg_int(gy), arg_int(gz)};
    if (c->profile)
        TRY(profile_begin(c->profile));
    TRY(c->dev->api->launch(c->stream, kernel, groups, args, count));
    return c->profile ? profile_end_kernel(c->profile, kernel, args) : 0;
}

// Lets the device do the whole operation: 0, a negative code, or NOT_MINE, and in a dry context
// always NOT_MINE. The tensors that it reads and writes follow, for profiles (NULLs are left out):
//
//     int code = ACCELERATE(c, ACCELERATE_ATTENTION_FWD, args, o, lse, qkv);
//     if (code != NOT_MINE)
//         return code;
#define ACCELERATE(c, op, args, ...)                              \
    op_accelerate(c, op, args, (const struct tensor *const[]){__VA_ARGS__}, \
                  (int)(sizeof((const struct tensor *const[]){__VA_ARGS__}) / sizeof(void *)))

static inline int op_accelerate(struct context *c, enum accelerated op, const void *args,
                                const struct tensor *const *operands, int count)
{
    if (c->dry || !c->dev->api->accelerate)
        return NOT_MINE;
    if (c->profile)
        TRY(profile_begin(c->profile));
    int code = c->dev->api->accelerate(c->stream, op, args);
    if (code != 0 || !c->profile)
        return code;
    return profile_end_accelerated(c->profile, op, args, operands, count);
}

// Asks for `bytes` of c->space: notes the wish in a dry context; else it must be there.
static inline void op_want_space(struct context *c, size_t bytes)
{
    if (c->dry)
        c->space_wanted = bytes > c->space_wanted ? bytes : c->space_wanted;
    else
        BUG_IF(bytes > 0 && (!c->space.mem || tensor_bytes(&c->space) < bytes));
}

// An operation that is made of others has `own` bytes of c->space to itself; what is behind them is
// the others' scratch, in the context `inner`. op_inner_end() in any case; op_inner_begin() may
// fail.
static inline size_t op_aligned(const struct context *c, size_t bytes)
{
    const size_t align = c->dev->info.align > 64 ? c->dev->info.align : 64;
    return (bytes + align - 1) / align * align;
}

static inline int op_inner_begin(struct context *c, size_t own, struct context *inner)
{
    *inner = *c;
    inner->space_wanted = 0;
    inner->space = (struct tensor){.dtype = F32, .ndim = 1};
    op_want_space(c, own);
    const size_t all = c->dry || !c->space.mem ? 0 : tensor_bytes(&c->space);
    if (all <= own)
        return 0;
    inner->space.shape[0] = (int64_t)((all - own) / sizeof(float));
    return c->dev->api->view(c->space.mem, own, all - own, &inner->space.mem);
}

static inline void op_inner_end(struct context *c, size_t own, struct context *inner)
{
    if (c->dry)
        op_want_space(c, own + inner->space_wanted);
    if (inner->space.mem)
        c->dev->api->free(inner->space.mem);
}

// The matrix [rows, columns] that begins `offset` bytes into mem (a multiple of the device's
// alignment); op_view_end() when it was used. Without memory in a dry context.
static inline int op_view(const struct context *c, struct tensor *out, struct mem *mem,
                          size_t offset, enum dtype type, int64_t rows, int64_t columns)
{
    *out = (struct tensor){.dtype = type, .ndim = 2, .shape = {rows, columns}};
    return c->dry ? 0 : c->dev->api->view(mem, offset, tensor_bytes(out), &out->mem);
}

static inline void op_view_end(const struct context *c, struct tensor *view)
{
    if (view->mem)
        c->dev->api->free(view->mem);
    view->mem = NULL;
}

// A chunk size that gives every compute unit at least 8 chunks, within [least, most].
static inline int64_t op_chunk(const struct context *c, int64_t count, int64_t least, int64_t most)
{
    int units = c->dev->info.compute_units;
    int64_t chunk = cover(count, 8 * (int64_t)(units > 0 ? units : 1));
    return chunk < least ? least : chunk > most ? most : chunk;
}

// Where `wanted` is what op_combine_norm_fuses() promises, a device that has it must have taken the
// operation: only a dry context comes here.
static inline void op_only_fused(const struct context *c, bool wanted, int64_t width)
{
    BUG_IF(wanted && !(c->dry && op_combine_norm_fuses(c, width)));
}

// Asks for what a device that fuses the backward of LayerNorm wants (devices/accelerate.h).
static inline void op_want_norm_backward(struct context *c, const struct tensor *x,
                                         const struct tensor *mod)
{
    int64_t images = mod->shape[0], parts = cover(x->shape[0] / images, NORM_ROWS);
    if (c->dev->fused_width > 0)
        op_want_space(c, (size_t)(3 * images * parts * x->shape[1]) * sizeof(float));
}

static inline bool is_act(const struct context *c, const struct tensor *t)
{
    return t->dtype == c->dev->act;
}

static inline bool has_shape2(const struct tensor *t, int64_t rows, int64_t columns)
{
    return t->ndim == 2 && t->shape[0] == rows && t->shape[1] == columns;
}

#endif
