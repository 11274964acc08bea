// The host's side of gemm_sm90.cu: which products it takes, with tiles of which width, and how A and
// B are described to the copy engine. Everything a launch needs goes by value, so that a captured
// graph keeps it.
#include "devices/cuda_gemm_sm90.h"

#include <math.h>

#include "devices/cuda_tuned.h"
#include "devices/gemm_gpu.h"
#include "devices/gemm_sm90.h"

enum { VARIANTS = 5, PARTS_MAX = 16, SPACE = 40 << 20 };

// A CUtensorMap.
struct tensor_map {
    _Alignas(64) uint64_t words[16];
};

enum kind { NT_BF16, NT_F32, NT_SWIGLU, NN_BF16, NN_SWIGLU, TN_F32, KINDS };

// How a kernel divides its work: the width of its tiles (columns of B), and whether blocks work in
// pairs, side by side, that share their rows of A.
static const struct variant {
    int width, pair;
} variants[VARIANTS] = {{64, 1}, {128, 1}, {192, 1}, {128, 2}, {192, 2}};

// Kernels by what they compute and how.
#define NAMES(name)                                                            \
    {                                                                          \
        name "_64", name "_128", name "_192", name "_pair128", name "_pair192" \
    }
static const char *const names[KINDS][VARIANTS] = {
    [NT_BF16] = NAMES("gemm_nt_bf16"),     [NT_F32] = NAMES("gemm_nt_f32"),
    [NT_SWIGLU] = NAMES("gemm_nt_swiglu"), [NN_BF16] = NAMES("gemm_nn_bf16"),
    [NN_SWIGLU] = NAMES("gemm_nn_swiglu"), [TN_F32] = NAMES("gemm_tn_f32"),
};

// ---- what is taken ------------------------------------------------------------------------------

static enum kind kind_of(const struct gemm *g)
{
    if (g->trans_a)
        return TN_F32;
    if (g->trans_b)
        return g->swiglu ? NT_SWIGLU : g->type_c == F32 ? NT_F32 : NT_BF16;
    return g->swiglu ? NN_SWIGLU : NN_BF16;
}

static unsigned shared_of(enum kind kind, int width)
{
    const int units = kind == NN_SWIGLU ? 2 : 0;
    return (unsigned)GEMM_SM90_BYTES(width, units);
}

bool cuda_gemm_sm90_here(struct cuda_device *dev)
{
    bool all = dev->api->tensor_map && dev->api->launch_with && dev->base.act == BF16;
    for (int i = 0; all && i < KINDS * VARIANTS; i++) {
        const char *name = names[i / VARIANTS][i % VARIANTS];
        const unsigned shared = shared_of((enum kind)(i / VARIANTS), variants[i % VARIANTS].width);
        all = !name || cuda_tuned(dev, IMAGE_gemm_sm90, name, shared);
    }
    return all && cuda_tuned(dev, IMAGE_gemm_sm90, "gemm_sum_parts", 0);
}

bool cuda_gemm_sm90_suits(struct cuda_device *dev, const struct gemm *g)
{
    const enum dtype out = g->trans_a ? F32 : BF16; // F32 of A B^T too
    if (g->type_a != BF16 || g->type_b != BF16 || g->m < 1 || g->n < 1 || g->k < 1)
        return false;
    if (g->type_c != out && !(g->type_c == F32 && g->trans_b && !g->swiglu))
        return false;
    if (g->n % 8 || (g->trans_a ? g->m : g->k) % 8 || g->groups > GEMM_SM90_GROUPS)
        return false;
    return (g->swiglu != SWIGLU_FORWARD || g->n % 16 == 0) && cuda_gemm_sm90_here(dev);
}

// ---- tiles --------------------------------------------------------------------------------------

// Columns that tiles divide: of h for a SwiGLU product.
static int columns_of(const struct gemm *g)
{
    return g->swiglu == SWIGLU_FORWARD ? g->n / 2 : g->n;
}

static int tile_columns(const struct gemm *g, int width)
{
    return g->swiglu == SWIGLU_FORWARD ? width / 2 : width;
}

// Units of work of one part of k, if every expert has its share of rows: tiles, or pairs of them.
static int units_of(const struct gemm *g, const struct variant *v)
{
    int rows = gemm_cover(g->m, GEMM_SM90_ROWS),
        columns = gemm_cover(columns_of(g), v->pair * tile_columns(g, v->width));
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups / 2;
    return rows * columns * (g->ragged == GEMM_RAGGED_K ? g->groups : 1);
}

// Bytes of C, h, g | u that a tile reads and writes.
static double bytes_out(const struct gemm *g, int width)
{
    const double elements = (double)GEMM_SM90_ROWS * width;
    if (g->swiglu == SWIGLU_FORWARD)
        return elements * (g->c ? 3 : 1);
    if (g->swiglu == SWIGLU_BACKWARD)
        return elements * (g->h ? 10 : 8);
    return elements * (g->type_c == F32 ? 4 : 2);
}

// Microseconds of g by a variant, k in `parts`. What limits it, as measured on an H100: 62 KB that a
// multiprocessor gets from L2 in a microsecond, of A and B and of what goes out; or the products, for
// pairs. Some 20 KB stand for what a tile costs besides. Parts go through memory twice.
static double time_of(const struct cuda_device *dev, const struct gemm *g, const struct variant *v,
                      int parts)
{
    const double groups = g->ragged == GEMM_RAGGED_K ? g->groups : 1;
    const double stages = ceil(g->k / (GEMM_SM90_DEPTH * parts * groups));
    const double read = (128.0 / v->pair + v->width) * 128, product = 190.0 * v->width;
    const double tile =
        stages * (read > product ? read : product) + bytes_out(g, v->width) + (20 << 10);
    const int waves = gemm_cover(parts * units_of(g, v), dev->base.info.compute_units / v->pair);
    const double sums = parts > 1 ? (2.0 * parts + 1) * g->m * g->n * 4 : 0;
    return waves * tile / 62e3 + sums / 3e6;
}

// How g is done: a variant, in how many parts of k.
struct way {
    int variant, parts;
    double time;
};

// The best way for g, by variant `only` if that is one. A plain A^T B may be split over k, so that all
// multiprocessors have work.
static struct way choose(const struct cuda_device *dev, const struct gemm *g, int only)
{
    struct way best = {0, 1, INFINITY};
    const double each = (double)g->m * g->n * sizeof(float);
    for (int i = 0; i < VARIANTS; i++)
        for (int parts = 1; parts <= PARTS_MAX; parts++) {
            const double time = time_of(dev, g, &variants[i], parts);
            if (only >= 0 ? i != only : variants[i].pair > 1)
                break;
            if (parts > 1 && (!g->trans_a || g->ragged != GEMM_PLAIN || parts * each > SPACE ||
                              g->k / parts < 4 * GEMM_SM90_DEPTH))
                break;
            if (time < best.time)
                best = (struct way){i, parts, time};
        }
    return best;
}

bool cuda_gemm_sm90_wins(const struct cuda_device *dev, const struct gemm *g)
{
    const double ideal = 2.0 * g->m * g->n * g->k / 680e6;
    return g->ragged != GEMM_PLAIN || g->swiglu || g->bias || ideal < 10 ||
           choose(dev, g, -1).time < 1.3 * ideal;
}

// ---- maps ---------------------------------------------------------------------------------------

// Describes an array of bf16 and the boxes that are copied of it. sizes and box: innermost first;
// pitches: elements from one row, and one matrix, to the next.
static int describe(const struct cuda_device *dev, struct tensor_map *map, const struct mem *mem,
                    unsigned rank, const int sizes[3], const int64_t pitches[2], const int box[3])
{
    uint64_t size[3], bytes[2];
    uint32_t boxes[3], steps[3] = {1, 1, 1};
    for (int i = 0; i < 3; i++) {
        size[i] = (uint64_t)sizes[i];
        boxes[i] = (uint32_t)box[i];
    }
    for (int i = 0; i < 2; i++)
        bytes[i] = 2 * (uint64_t)pitches[i];
    CU(dev->api,
       dev->api->tensor_map((cuda_tensor_map *)(void *)map, CUDA_MAP_BF16, rank,
                            (void *)(uintptr_t)mem->address, size, bytes, boxes, steps, 0,
                            CUDA_MAP_SWIZZLE_128, CUDA_MAP_PROMOTE_256, 0),
       "cuTensorMapEncodeTiled");
    return 0;
}

static int describe_a(const struct cuda_device *dev, struct tensor_map *map, const struct gemm *g)
{
    const int columns = g->trans_a ? g->m : g->k, rows = g->trans_a ? g->k : g->m;
    return describe(dev, map, g->a, 2, (int[]){columns, rows, 1}, (int64_t[]){columns, 0},
                    (int[]){64, 64, 1}); // DEPTH of k by 64 of the rows of C
}

static int describe_b(const struct cuda_device *dev, struct tensor_map *map, const struct gemm *g,
                      int width)
{
    const int columns = g->trans_b ? g->k : g->n, rows = g->trans_b ? g->n : g->k;
    const int matrices = g->ragged == GEMM_RAGGED_M ? g->groups : 1;
    return describe(dev, map, g->b, 3, (int[]){columns, rows, matrices},
                    (int64_t[]){columns, (int64_t)columns * rows},
                    (int[]){64, g->trans_b ? tile_columns(g, width) : 64, 1});
}

// C = g | u: columns, which of the two, rows.
static int describe_gu(const struct cuda_device *dev, struct tensor_map *map, const struct gemm *g)
{
    return describe(dev, map, g->c, 3, (int[]){g->n, 2, g->m}, (int64_t[]){g->n, 2 * (int64_t)g->n},
                    (int[]){64, 1, 16});
}

// ---- the product --------------------------------------------------------------------------------

static void *pointer(const struct mem *mem)
{
    return mem ? (void *)(uintptr_t)mem->address : NULL;
}

static struct gemm_sm90 arguments(const struct gemm *g, int parts)
{
    struct gemm_sm90 p = {.c = pointer(parts > 1 ? g->space : g->c),
                          .h = pointer(g->h),
                          .bias = pointer(g->bias),
                          .offsets = g->ragged == GEMM_PLAIN ? NULL : pointer(g->offsets),
                          .groups = g->ragged == GEMM_PLAIN ? parts : g->groups,
                          .m = g->m,
                          .n = columns_of(g),
                          .k = g->k,
                          .accumulate = g->accumulate && parts == 1};
    if (g->trans_a && g->ragged == GEMM_PLAIN) // whole stages
        p.part = gemm_cover(gemm_cover(g->k, parts), GEMM_SM90_DEPTH) * GEMM_SM90_DEPTH;
    if (p.part)
        p.groups = gemm_cover(g->k, p.part);
    return p;
}

static int sum_parts(struct stream *s, const struct gemm *g, int parts)
{
    cuda_function function = cuda_tuned(s->dev, IMAGE_gemm_sm90, "gemm_sum_parts", 0);
    void *c = pointer(g->c), *from = pointer(g->space);
    int count = g->m * g->n, accumulate = g->accumulate;
    const unsigned grid[3] = {(unsigned)gemm_cover(count / 4, 256), 1, 1};
    void *values[] = {&c, &from, &parts, &count, &accumulate};
    return cuda_tuned_launch(s, function, grid, 256, 0, values);
}

size_t cuda_gemm_sm90_space(const struct cuda_device *dev, const struct gemm *g)
{
    const int parts = choose(dev, g, -1).parts;
    return parts > 1 ? (size_t)parts * (size_t)g->m * (size_t)g->n * sizeof(float) : 0;
}

// Launches `blocks` blocks, which may start while the kernel before has some that run: they wait for
// its end before they read anything.
static int launch_early(struct stream *s, cuda_function function, unsigned blocks, unsigned shared,
                        void **values)
{
    const struct cuda_api *api = s->dev->api;
    cuda_launch_attribute early = {.id = CUDA_LAUNCH_EARLY, .value = 1};
    const cuda_launch_config config = {.grid = {blocks, 1, 1},
                                       .block = {GEMM_SM90_THREADS, 1, 1},
                                       .shared = shared,
                                       .stream = s->cu,
                                       .attributes = &early,
                                       .count = 1};
    CU(api, api->context_set(s->dev->context), "cuCtxSetCurrent");
    CU(api, api->launch_with(&config, function, values, NULL), "cuLaunchKernelEx");
    return 0;
}

static int launch(struct stream *s, const struct gemm *g, const struct way *way)
{
    const struct variant *v = &variants[way->variant];
    const char *name = names[kind_of(g)][way->variant];
    const unsigned shared = shared_of(kind_of(g), v->width);
    cuda_function function = cuda_tuned(s->dev, IMAGE_gemm_sm90, name, shared);
    const int parts = g->space ? way->parts : 1;
    const int columns = gemm_cover(columns_of(g), v->pair * tile_columns(g, v->width));
    int rows = gemm_cover(g->m, GEMM_SM90_ROWS);
    struct tensor_map a, b, c = {{0}};
    struct gemm_sm90 p = arguments(g, parts);
    p.band = columns > 40 ? 2 : 1; // a wave of blocks shares all of a narrow B
    TRY(describe_a(s->dev, &a, g));
    TRY(describe_b(s->dev, &b, g, v->width));
    if (g->swiglu == SWIGLU_BACKWARD)
        TRY(describe_gu(s->dev, &c, g));
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups;
    const int64_t units = (int64_t)rows * columns * (g->trans_a ? p.groups : 1);
    const struct device *dev = &s->dev->base;
    const int64_t most = (dev->info.compute_units - dev->reserved_units) / v->pair;
    void *values[] = {&a, &b, &c, &p};
    TRY(launch_early(s, function, (unsigned)(v->pair * (units < most ? units : most)), shared,
                     values));
    return parts > 1 ? sum_parts(s, g, p.groups) : 0;
}

int cuda_gemm_sm90(struct stream *s, const struct gemm *g, int width)
{
    int only = width ? VARIANTS - 1 : -1;
    while (only >= 0 && variants[only].pair * (variants[only].width + 1) - 1 != width)
        only--;
    if (width && only < 0)
        return NOT_MINE;
    const struct way way = choose(s->dev, g, only);
    return launch(s, g, &way);
}
