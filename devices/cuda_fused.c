// Memory-bound operations in one pass (fused.cu): which shapes, and how they are launched.
//
// Every kernel moves 16 bytes at a time, so widths and first columns are multiples of 8 and
// addresses of 16 bytes; what is not goes to the portable kernels.
#include "devices/cuda_fused.h"

#include <string.h>

#include "devices/accelerate.h"

enum {
    WARP = 32,
    THREADS = 256,
    ASIDE = 512,
    ASIDE_SHARED = 4 * ASIDE * 80,
    STRIPES = 16,
    VECTOR = 8,
    IMAGES_MAX = 65535
};

// The kernel `name` of fused.cu; `name` is a literal.
#define KERNEL_OF(s, name) cuda_tuned((s)->dev, IMAGE_fused, name, 0)

// ---- arguments ----------------------------------------------------------------------------------

// Turns the first `count` fields of a struct of accelerate.h into addresses. False when one that is
// not NULL does not start at a multiple of 16 bytes.
static bool to_addresses(void *fields, size_t count)
{
    bool aligned = true;
    for (size_t i = 0; i < count; i++) {
        char *field = (char *)fields + i * sizeof(void *);
        struct mem *mem;
        memcpy(&mem, field, sizeof mem);
        uintptr_t address = mem ? (uintptr_t)mem->address : 0;
        memcpy(field, &address, sizeof address);
        aligned = aligned && address % 16 == 0;
    }
    return aligned;
}

// a: a struct whose first member that is not memory is `scalar`
#define TO_ADDRESSES(a, scalar) to_addresses(&(a), offsetof(__typeof__(a), scalar) / sizeof(void *))

// The struct at `args`, a copy whose memories are addresses; else NOT_MINE.
#define TAKE(type, a, scalar)     \
    struct type a;                \
    memcpy(&a, args, sizeof a);   \
    if (!TO_ADDRESSES(a, scalar)) \
    return NOT_MINE

static int cover(int64_t count, int64_t size)
{
    return (int)((count + size - 1) / size);
}

// Threads of one group: whole warps that cover the columns; and of a block of as many groups as
// fit.
static int group_threads(int width)
{
    return cover(width / VECTOR, WARP) * WARP;
}

static int block_threads(int width)
{
    int group = group_threads(width);
    return THREADS / group * group;
}

static int launch(struct stream *s, cuda_function function, int x, int y, int threads, void **args)
{
    const unsigned grid[3] = {(unsigned)x, (unsigned)y, 1};
    return cuda_tuned_launch(s, function, grid, (unsigned)threads, 0, args);
}

// ---- LayerNorm with what comes before and after it ----------------------------------------------

// A row is cut into segments of 384 columns, one a warp (fused_segment.cuh); columns come in units
// of 128. A block has as many whole rows as fit.
enum { SEGMENT = 384, UNIT = 128, ROW_WARPS = 4, WIDTH_MAX = ROW_WARPS * SEGMENT };
enum {
    ROUTER_SHARED = 96 << 10
}; // shared memory for the router's weight, bytes: a device has as much

static bool good_rows(int width, int images, const int *columns, int count)
{
    for (int i = 0; i < count; i++)
        if (columns[i] % VECTOR != 0)
            return false;
    return width % UNIT == 0 && width <= WIDTH_MAX && images <= IMAGES_MAX;
}

static int row_warps(int width)
{
    return cover(width, SEGMENT);
}

static int row_groups(int width)
{
    return ROW_WARPS / row_warps(width);
}

// Bytes of shared memory that the router's weight takes; none without a router.
static unsigned router_bytes(int experts, int width)
{
    return (unsigned)(experts * row_warps(width) * SEGMENT) * (unsigned)sizeof(float);
}

static int launch_rows(struct stream *s, cuda_function function, void *a, int images, int tokens,
                       int width, int chunk, unsigned shared)
{
    const unsigned grid[3] = {(unsigned)cover(tokens, chunk), (unsigned)images, 1};
    const int threads = row_groups(width) * row_warps(width) * WARP;
    return cuda_tuned_launch(s, function, grid, (unsigned)threads, shared, (void *[]){a, &chunk});
}

// A kernel's instances, SEGMENTS of fused_segment.cuh: by warps of a row and whether the width is a
// multiple of 384.
#define INSTANCES(name)                                                                     \
    {                                                                                       \
        name "_10", name "_11", name "_20", name "_21", name "_30", name "_31", name "_40", \
            name "_41"                                                                      \
    }

static cuda_function instance(struct stream *s, const char *const names[2 * ROW_WARPS], int width,
                              unsigned shared)
{
    const char *name = names[2 * (row_warps(width) - 1) + (width % SEGMENT == 0)];
    return cuda_tuned(s->dev, IMAGE_fused, name, shared);
}

// The kernel, and how many rows a group of warps takes at a time in it.
static cuda_function forward_kernel(struct stream *s, const struct norm_forward *a, int *rows)
{
    static const char *const plain[] = INSTANCES("layernorm"), *const sum[] =
                                                                   INSTANCES("residual_norm");
    static const char *const router[] = INSTANCES("residual_norm_router");
    static const char *const combine[] = INSTANCES("combine_norm");
    *rows = a->logits ? 4 : 2;
    if (a->logits)
        return instance(s, router, a->width, ROUTER_SHARED);
    return instance(s, a->rows ? combine : a->z ? sum : plain, a->width, 0);
}

// Rows a block takes when it first copies the router's weight, which is long for wide rows: then as
// many blocks as have room at a time. A multiple of `least`.
static int router_chunk(const struct stream *s, const struct norm_forward *a, int least)
{
    int blocks = (row_warps(a->width) == 1 ? 8 : 4) * s->dev->base.info.compute_units;
    int chunks = blocks / a->images > 0 ? blocks / a->images : 1; // of an image
    return cover(cover(a->tokens, chunks), least) * least;
}

static int norm_forward(struct stream *s, const void *args)
{
    TAKE(norm_forward, a, images);
    const int columns[] = {a.mod_width, a.gate, a.gate1, a.shift, a.scale};
    const unsigned shared = a.logits ? router_bytes(a.experts, a.width) : 0;
    if (!good_rows(a.width, a.images, columns, 5) || shared > ROUTER_SHARED)
        return NOT_MINE;
    int rows;
    cuda_function function = forward_kernel(s, &a, &rows);
    if (!function)
        return NOT_MINE;
    int chunk = row_groups(a.width) * rows;
    if (a.logits)
        chunk = router_chunk(s, &a, chunk);
    return launch_rows(s, function, &a, a.images, a.tokens, a.width, chunk, shared);
}

static cuda_function backward_kernel(struct stream *s, const struct norm_backward *a)
{
    static const char *const plain[] = INSTANCES("norm_back");
    static const char *const branches[] = INSTANCES("norm_back_branches");
    return a->drows || a->dlogits ? instance(s, branches, a->width, ROUTER_SHARED)
                                  : instance(s, plain, a->width, 0);
}

static int norm_backward(struct stream *s, const void *args)
{
    TAKE(norm_backward, a, images);
    const int columns[] = {a.mod_width, a.gate, a.shift, a.scale};
    const unsigned shared = a.dlogits ? router_bytes(a.experts, a.width) : 0;
    if (!good_rows(a.width, a.images, columns, 4) || shared > ROUTER_SHARED)
        return NOT_MINE;
    // long chunks make few partial sums, but every multiprocessor must have blocks enough
    int64_t units = s->dev->base.info.compute_units;
    int chunk =
        (int64_t)a.images * cover(a.tokens, 2 * NORM_ROWS) >= 3 * units ? 2 * NORM_ROWS : NORM_ROWS;
    cuda_function function = backward_kernel(s, &a), sums = KERNEL_OF(s, "norm_back_sums");
    if (!function || !sums)
        return NOT_MINE;
    int chunks = cover(a.tokens, chunk);
    TRY(launch_rows(s, function, &a, a.images, a.tokens, a.width, chunk, shared));
    const unsigned grid[3] = {(unsigned)cover(a.width, 4 * 64), a.dz ? 3 : 2, (unsigned)a.images};
    return cuda_tuned_launch(s, sums, grid, 64, 0, (void *[]){&a, &chunks});
}

// ---- experts' rows and the router ---------------------------------------------------------------

static int dispatch(struct stream *s, const void *args)
{
    TAKE(dispatch, a, tokens);
    cuda_function function =
        a.choices % 2 == 0 ? KERNEL_OF(s, "dispatch_rows_2") : KERNEL_OF(s, "dispatch_rows_1");
    if (!function || a.width % VECTOR != 0)
        return NOT_MINE;
    return launch(s, function, cover(a.tokens, 4 * THREADS / WARP), 1, THREADS, (void *[]){&a});
}

static int combine_backward(struct stream *s, const void *args)
{
    TAKE(combine_backward, a, tokens);
    cuda_function function =
        a.choices % 2 == 0 ? KERNEL_OF(s, "combine_back_2") : KERNEL_OF(s, "combine_back_1");
    if (!function || a.width % VECTOR != 0)
        return NOT_MINE;
    return launch(s, function, cover(a.tokens, THREADS / WARP), 1, THREADS, (void *[]){&a});
}

static int router_gradient(struct stream *s, const void *args)
{
    TAKE(router_gradient, a, rows);
    cuda_function rows =
        a.experts == 8 ? KERNEL_OF(s, "router_gradient_8") : KERNEL_OF(s, "router_gradient_any");
    cuda_function add = KERNEL_OF(s, "add_parts");
    if (!rows || !add || a.width % VECTOR != 0 || a.width > THREADS * VECTOR)
        return NOT_MINE;
    int chunk = cover(a.rows, SUM_PARTS), count = a.experts * a.width;
    chunk = cover(chunk, 16) * 16;
    int parts = cover(a.rows, chunk);
    TRY(launch(s, rows, parts, 1, block_threads(a.width), (void *[]){&a, &chunk}));
    return launch(s, add, cover(count, WARP), 1, WARP * STRIPES,
                  (void *[]){&a.dw, &a.partial, &count, &parts, &a.added});
}

static int route(struct stream *s, const void *args)
{
    TAKE(route, a, rows);
    cuda_function choose =
        a.experts <= 8 ? KERNEL_OF(s, "route_choose_8") : KERNEL_OF(s, "route_choose_16");
    cuda_function sort =
        a.experts <= 8 ? KERNEL_OF(s, "route_sort_8") : KERNEL_OF(s, "route_sort_16");
    if (!choose || !sort || a.experts > 16 || a.choices > 8)
        return NOT_MINE;
    if (a.groups > 1 && a.rows / a.groups % ROUTE_ROWS != 0)
        return NOT_MINE;
    int blocks = cover(a.rows, ROUTE_ROWS);
    TRY(launch(s, choose, blocks, 1, ROUTE_ROWS, (void *[]){&a}));
    return launch(s, sort, blocks, 1, ROUTE_ROWS, (void *[]){&a});
}

// ---- LayerNorm of q and k -----------------------------------------------------------------------

enum { QK_MAX = 2048 };

static bool good_heads(const struct qk_norm *a)
{
    return a->head % VECTOR == 0 && a->heads * a->head <= QK_MAX;
}

static cuda_function qk_kernel(struct stream *s, int head, bool back)
{
    switch (head / VECTOR) {
    case 8:
        return back ? KERNEL_OF(s, "qk_norm_back_8") : KERNEL_OF(s, "qk_norm_rows_8");
    case 9:
        return back ? KERNEL_OF(s, "qk_norm_back_9") : KERNEL_OF(s, "qk_norm_rows_9");
    case 11:
        return back ? KERNEL_OF(s, "qk_norm_back_11") : KERNEL_OF(s, "qk_norm_rows_11");
    default:
        return back ? KERNEL_OF(s, "qk_norm_back_0") : KERNEL_OF(s, "qk_norm_rows_0");
    }
}

static int qk_norm_forward(struct stream *s, const void *args)
{
    TAKE(qk_norm, a, rows);
    cuda_function function = qk_kernel(s, a.head, false);
    if (!function || !good_heads(&a))
        return NOT_MINE;
    int threads = cover(3 * a.heads * a.head / VECTOR, WARP) * WARP;
    int chunk = a.rows >= 32 * s->dev->base.info.compute_units ? 8 : 2;
    return launch(s, function, cover(a.rows, chunk), 1, threads, (void *[]){&a, &chunk});
}

static int qk_norm_backward(struct stream *s, const void *args)
{
    TAKE(qk_norm, a, rows);
    cuda_function function = qk_kernel(s, a.head, true), sums = KERNEL_OF(s, "qk_norm_sums");
    if (!function || !sums || !good_heads(&a))
        return NOT_MINE;
    int threads = cover(2 * a.heads * a.head / VECTOR, WARP) * WARP;
    int chunk = a.rows >= 64 * s->dev->base.info.compute_units ? 2 * QK_PART : QK_PART;
    int parts = cover(a.rows, chunk);
    TRY(launch(s, function, parts, 1, threads, (void *[]){&a, &chunk}));
    return launch(s, sums, cover(4 * a.head, WARP), 1, WARP * STRIPES, (void *[]){&a, &parts});
}

// ---- GroupNorm, pooling -------------------------------------------------------------------------

static cuda_function group_sums_kernel(struct stream *s, int per)
{
    if (per % VECTOR == 0)
        return KERNEL_OF(s, "group_norm_sums_1");
    return per == 4   ? KERNEL_OF(s, "group_norm_sums_2")
           : per == 2 ? KERNEL_OF(s, "group_norm_sums_4")
                      : NULL;
}

// Pixels of an image that a block takes: of all, some eight blocks for every multiprocessor; at
// least `least`, and as many as its threads take at a time.
static int group_chunk(const struct stream *s, const struct group_norm_forward *a, int least)
{
    const int64_t blocks = 8 * (int64_t)s->dev->base.info.compute_units;
    const int at_a_time = THREADS * VECTOR / a->channels;
    const int chunk = cover((int64_t)a->images * a->pixels, blocks);
    const int rounds = cover(chunk > least ? chunk : least, at_a_time);
    return rounds * at_a_time;
}

static int group_norm(struct stream *s, const void *args)
{
    TAKE(group_norm_forward, a, images);
    cuda_function totals = KERNEL_OF(s, "group_norm_totals"), map = KERNEL_OF(s, "group_norm_map");
    cuda_function sums = group_sums_kernel(s, a.channels / a.groups);
    if (!sums || !totals || !map || a.channels % VECTOR || a.channels > THREADS * VECTOR ||
        a.images > IMAGES_MAX)
        return NOT_MINE;
    int chunk = group_chunk(s, &a, GROUP_ROWS), part = group_chunk(s, &a, 1);
    int chunks = cover(a.pixels, chunk);
    TRY(launch(s, sums, chunks, a.images, THREADS, (void *[]){&a, &chunk}));
    TRY(launch(s, totals, a.groups, a.images, THREADS, (void *[]){&a, &chunk, &chunks}));
    return launch(s, map, cover(a.pixels, part), a.images, THREADS, (void *[]){&a, &part});
}

static int pool(struct stream *s, const void *args)
{
    enum { OUTS = 4 };
    TAKE(pool_forward, a, images);
    if (a.size != 3 || a.stride > 2 || a.channels % VECTOR || a.columns % VECTOR ||
        a.column % VECTOR)
        return NOT_MINE;
    cuda_function function =
        a.maximum ? a.stride == 1 ? KERNEL_OF(s, "pool_maximum_1") : KERNEL_OF(s, "pool_maximum_2")
        : a.stride == 1 ? KERNEL_OF(s, "pool_mean_1")
                        : KERNEL_OF(s, "pool_mean_2");
    const int64_t items =
        (int64_t)a.images * a.out_height * cover(a.out_width, OUTS) * (a.channels / VECTOR);
    if (!function || items > INT32_MAX)
        return NOT_MINE;
    return launch(s, function, cover(items, THREADS), 1, THREADS, (void *[]){&a});
}

// ---- sums and the optimiser ---------------------------------------------------------------------

static int at_most(int value, int most)
{
    return value < most ? value : most;
}

static int column_sums(struct stream *s, const void *args)
{
    TAKE(column_sums, a, rows);
    cuda_function rows = KERNEL_OF(s, "column_sums_rows"), add = KERNEL_OF(s, "add_parts");
    if (!rows || !add || a.columns % VECTOR != 0)
        return NOT_MINE;
    int wide = cover(a.columns, WARP * VECTOR), one = 1;
    int wanted = at_most(cover(8 * s->dev->base.info.compute_units, wide), SUM_PARTS);
    int chunk = cover(cover(a.rows, wanted), 32) * 32, parts = cover(a.rows, chunk);
    TRY(launch(s, rows, wide, parts, THREADS, (void *[]){&a, &chunk}));
    return launch(s, add, cover(a.columns, WARP), 1, WARP * STRIPES,
                  (void *[]){&a.out, &a.partial, &a.columns, &parts, &one});
}

static int norm2(struct stream *s, const void *args)
{
    TAKE(norm2, a, count);
    cuda_function rows = KERNEL_OF(s, "norm2_rows"), sum = KERNEL_OF(s, "norm2_sum");
    if (!rows || !sum)
        return NOT_MINE;
    int wanted = at_most(8 * s->dev->base.info.compute_units, NORM2_PARTS);
    int parts = at_most(cover((int64_t)(a.count / (16 * THREADS)) + 1, 1), wanted);
    TRY(launch(s, rows, parts, 1, THREADS, (void *[]){&a}));
    return launch(s, sum, 1, 1, THREADS, (void *[]){&a, &parts});
}

static int adamw(struct stream *s, const void *args)
{
    TAKE(adamw_step, a, count);
    cuda_function function = KERNEL_OF(s, "adamw_rows");
    if (!function)
        return NOT_MINE;
    int blocks = cover((int64_t)(a.count / 4) + 1, THREADS);
    return launch(s, function, blocks, 1, THREADS, (void *[]){&a});
}

// ---- between ranks ------------------------------------------------------------------------------

static int peer_rows(struct stream *s, const void *args)
{
    TAKE(peer_rows, a, rank);
    cuda_function function = KERNEL_OF(s, "peer_rows_all");
    if (!function || a.ranks > PEER_ROADS || a.ranks * a.experts > PEER_TABLE)
        return NOT_MINE;
    return launch(s, function, a.blocks, 1, 1024, (void *[]){&a});
}

// ---- the door -----------------------------------------------------------------------------------

int cuda_fused_width(struct cuda_device *dev)
{
    const bool there = dev->base.act == BF16 && cuda_tuned(dev, IMAGE_fused, "combine_norm_10", 0);
    return there ? WIDTH_MAX : 0;
}

int cuda_fused(struct stream *s, enum accelerated op, const void *args)
{
    if (op == ACCELERATE_PEER_ROWS) // which are bytes
        return peer_rows(s, args);
    if (s->dev->base.act != BF16)
        return NOT_MINE;
    switch (op) {
    case ACCELERATE_NORM_FWD:
        return norm_forward(s, args);
    case ACCELERATE_NORM_BWD:
        return norm_backward(s, args);
    case ACCELERATE_DISPATCH_FWD:
        return dispatch(s, args);
    case ACCELERATE_COMBINE_BWD:
        return combine_backward(s, args);
    case ACCELERATE_QK_NORM_FWD:
        return qk_norm_forward(s, args);
    case ACCELERATE_QK_NORM_BWD:
        return qk_norm_backward(s, args);
    case ACCELERATE_COLUMN_SUMS:
        return column_sums(s, args);
    case ACCELERATE_ROUTER_DW:
        return router_gradient(s, args);
    case ACCELERATE_ROUTE:
        return route(s, args);
    case ACCELERATE_NORM2:
        return norm2(s, args);
    case ACCELERATE_ADAMW:
        return adamw(s, args);
    case ACCELERATE_GROUP_NORM:
        return group_norm(s, args);
    case ACCELERATE_POOL:
        return pool(s, args);
    default:
        return NOT_MINE;
    }
}
