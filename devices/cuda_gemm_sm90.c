// The host's side of gemm_sm90.cu and conv_sm90.cu: which products it takes, with tiles of which
// width, and how A and B are described to the copy engine. Everything a launch needs goes by value,
// so that a captured graph keeps it.
#include "devices/cuda_gemm_sm90.h"

#include <math.h>

#include "devices/cuda_tuned.h"
#include "devices/gemm_gpu.h"
#include "devices/gemm_sm90.h"

enum { WIDTHS = 5 };

enum kind { NT_BF16, NT_F32, NT_SWIGLU, NN_BF16, NN_SWIGLU, TN_F32, CONV_BF16, CONV_F32, KINDS };

static const int widths[WIDTHS] = {32, 64, 96, 128, 192};

// Kernels by what they compute and the width of their tiles (columns of B); and those that finish
// what they divided along k.
#define NAMES(name, end)                                             \
    {                                                                \
        NULL, name "_64" end, NULL, name "_128" end, name "_192" end \
    }
#define ALL_NAMES(name, end)                                                             \
    {                                                                                    \
        name "_32" end, name "_64" end, name "_96" end, name "_128" end, name "_192" end \
    }
static const char *const names[KINDS][WIDTHS] = {
    [NT_BF16] = NAMES("gemm_nt_bf16", ""),
    [NT_F32] = NAMES("gemm_nt_f32", ""),
    [NT_SWIGLU] = NAMES("gemm_nt_swiglu", ""),
    [NN_BF16] = NAMES("gemm_nn_bf16", ""),
    [NN_SWIGLU] = {NULL, "gemm_nn_swiglu_64", NULL, "gemm_nn_swiglu_128", NULL},
    [TN_F32] = NAMES("gemm_tn_f32", ""),
    [CONV_BF16] = ALL_NAMES("conv_bf16", ""),
    [CONV_F32] = {"conv_f32_32", NULL, NULL, NULL, NULL},
};
static const char *const rests[KINDS][WIDTHS] = {
    [NT_BF16] = NAMES("gemm_nt_bf16", "_rest"),
    [NT_F32] = NAMES("gemm_nt_f32", "_rest"),
    [NN_BF16] = NAMES("gemm_nn_bf16", "_rest"),
    [TN_F32] = NAMES("gemm_tn_f32", "_rest"),
    [CONV_BF16] = ALL_NAMES("conv_bf16", "_rest"),
    [CONV_F32] = {"conv_f32_32_rest", NULL, NULL, NULL, NULL},
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
    const int strips = kind == NN_SWIGLU ? GEMM_SM90_STRIPS : 0;
    return (unsigned)GEMM_SM90_BYTES(width, strips);
}

// The kernel that does the whole tiles, and the one for the rest; NULL where there is none.
static cuda_function kernel(struct cuda_device *dev, enum kind kind, int w, bool rest)
{
    const enum cuda_image image = kind >= CONV_BF16 ? IMAGE_conv_sm90 : IMAGE_gemm_sm90;
    const char *name = rest ? rests[kind][w] : names[kind][w];
    return name ? cuda_tuned(dev, image, name, rest ? 0 : shared_of(kind, widths[w])) : NULL;
}

// Whether the kinds from `from` up to but not `to` are here.
static bool has_kernels(struct cuda_device *dev, int from, int to)
{
    bool all = dev->api->tensor_map && dev->api->launch_with && dev->base.act == BF16;
    for (int i = from * WIDTHS; all && i < to * WIDTHS; i++) {
        const int kind = i / WIDTHS, w = i % WIDTHS;
        all = (!names[kind][w] || kernel(dev, (enum kind)kind, w, false)) &&
              (!rests[kind][w] || kernel(dev, (enum kind)kind, w, true));
    }
    return all;
}

bool cuda_gemm_sm90_here(struct cuda_device *dev)
{
    return has_kernels(dev, NT_BF16, CONV_BF16);
}

int cuda_gemm_sm90_groups(struct cuda_device *dev)
{
    return cuda_gemm_sm90_here(dev) ? GEMM_SM90_GROUPS : 0;
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

// Multiprocessors that a product takes.
static int units_of(const struct cuda_device *dev)
{
    const int units = dev->base.info.compute_units;
    return units > dev->base.spare ? units - dev->base.spare : 1;
}

// Columns that tiles divide: of h for a SwiGLU product.
static int columns_of(const struct gemm *g)
{
    return g->swiglu == SWIGLU_FORWARD ? g->n / 2 : g->n;
}

static int tile_columns(const struct gemm *g, int width)
{
    return g->swiglu == SWIGLU_FORWARD ? width / 2 : width;
}

// Tiles, if every expert has its share of rows.
static int tiles_of(const struct gemm *g, int width)
{
    int rows = gemm_cover(g->m, GEMM_SM90_ROWS),
        columns = gemm_cover(columns_of(g), tile_columns(g, width));
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups / 2;
    return rows * columns * (g->ragged == GEMM_RAGGED_K ? g->groups : 1);
}

// Stages of k that a tile takes, about, if groups of k are equal.
static int stages_of(const struct gemm *g)
{
    return gemm_cover(g->k, GEMM_SM90_DEPTH) / (g->ragged == GEMM_RAGGED_K ? g->groups : 1);
}

// Into how many parts of k the last `rest` tiles are divided; as find_schedule() does it.
static int parts_of(const struct gemm *g, int rest, int blocks)
{
    int parts = rest > 0 ? blocks / rest : 1;
    const int most = stages_of(g) / GEMM_SM90_PARTS;
    parts = parts < most ? parts : most;
    parts = parts < GEMM_SM90_PARTS ? parts : GEMM_SM90_PARTS;
    return parts > 1 ? parts : 1;
}

// Microseconds of g by tiles of width number w, as measured on an H100 and an H200 (but those of 32
// and 96): of a stage; 0.3 of a tile besides; 4 of finishing what was divided, and its way through
// memory.
static double time_of(const struct cuda_device *dev, const struct gemm *g, int w, bool divide)
{
    static const double stage[WIDTHS] = {0.32, 0.35, 0.39, 0.42, 0.63};
    const int tiles = tiles_of(g, widths[w]), blocks = units_of(dev);
    const int rest = tiles % blocks, parts = parts_of(g, rest, blocks);
    const double tile = stages_of(g) * stage[w] + 0.3;
    if (!divide || parts == 1)
        return gemm_cover(tiles, blocks) * tile;
    const double sums = 2.0 * sizeof(float) * rest * parts * widths[w] * GEMM_SM90_ROWS;
    return tiles / blocks * tile + tile / parts + 4 + sums / 3e6;
}

// Where the last tiles leave multiprocessors idle for long. With more tiles than this the others
// gain as much from the power that those do not draw.
static bool few_tiles(const struct cuda_device *dev, const struct gemm *g, int w)
{
    return tiles_of(g, widths[w]) < 3 * units_of(dev);
}

// How g is done: tiles of which width; whether the last ones may be divided along k.
struct way {
    int w;
    bool divide;
    double time;
};

// The best way for g; by width number `only` if that is one.
static struct way choose(const struct cuda_device *dev, const struct gemm *g, enum kind kind,
                         int only)
{
    struct way best = {0, false, INFINITY};
    for (int i = 0; i < 2 * WIDTHS; i++) {
        const int w = i / 2;
        const bool divide = i % 2, there = divide ? rests[kind][w] : names[kind][w];
        if (!there || (only >= 0 && w != only) || (divide && !few_tiles(dev, g, w)))
            continue;
        const double time = time_of(dev, g, w, divide);
        if (time < (divide ? 0.92 : 1) * best.time)
            best = (struct way){w, divide, time};
    }
    return best;
}

bool cuda_gemm_sm90_wins(const struct cuda_device *dev, const struct gemm *g)
{
    const double ideal = 2.0 * g->m * g->n * g->k / 700e6;
    if (g->ragged != GEMM_PLAIN || g->swiglu || g->bias)
        return true;
    return !g->trans_a && (ideal < 10 || choose(dev, g, kind_of(g), -1).time < 1.25 * ideal);
}

// ---- maps ---------------------------------------------------------------------------------------

static int describe(const struct cuda_device *dev, struct cuda_map *map, const struct mem *mem,
                    int rank, const int sizes[3], const int64_t pitches[2], const int box[3])
{
    return cuda_tuned_map(dev, map, mem->address, rank, sizes, pitches, box, true);
}

static int describe_a(const struct cuda_device *dev, struct cuda_map *map, const struct gemm *g)
{
    const int columns = g->trans_a ? g->m : g->k, rows = g->trans_a ? g->k : g->m;
    return describe(dev, map, g->a, 2, (int[]){columns, rows, 1}, (int64_t[]){columns, 0},
                    (int[]){64, 64, 1}); // DEPTH of k by 64 of the rows of C
}

static int describe_b(const struct cuda_device *dev, struct cuda_map *map, const struct gemm *g,
                      int width)
{
    const int columns = g->trans_b ? g->k : g->n, rows = g->trans_b ? g->n : g->k;
    const int matrices = g->ragged == GEMM_RAGGED_M ? g->groups : 1;
    return describe(dev, map, g->b, 3, (int[]){columns, rows, matrices},
                    (int64_t[]){columns, (int64_t)columns * rows},
                    (int[]){64, g->trans_b ? tile_columns(g, width) : 64, 1});
}

// C = g | u: columns, which of the two, rows; and h. Forward both halves go at once.
static int describe_swiglu(const struct cuda_device *dev, struct cuda_map *gu, struct cuda_map *h,
                           const struct gemm *g)
{
    const bool forward = g->swiglu == SWIGLU_FORWARD;
    const int F = columns_of(g), columns = forward ? 32 : 64, both = forward ? 2 : 1;
    if (g->c)
        TRY(describe(dev, gu, g->c, 3, (int[]){F, 2, g->m}, (int64_t[]){F, 2 * (int64_t)F},
                     (int[]){columns, both, 16}));
    if (!g->h)
        return 0;
    return describe(dev, h, g->h, 2, (int[]){F, g->m, 1}, (int64_t[]){F, 0},
                    (int[]){columns, 16, 1});
}

// ---- the product --------------------------------------------------------------------------------

static void *pointer(const struct mem *mem)
{
    return mem ? (void *)(uintptr_t)mem->address : NULL;
}

static struct gemm_sm90 arguments(const struct cuda_device *dev, const struct gemm *g,
                                  const struct way *way)
{
    const bool plain = g->ragged == GEMM_PLAIN;
    const int columns = gemm_cover(columns_of(g), tile_columns(g, widths[way->w]));
    return (struct gemm_sm90){
        .c = pointer(g->c),
        .h = pointer(g->h),
        .dots = pointer(g->dots),
        .norms = pointer(g->norms),
        .bias = pointer(g->bias),
        .offsets = plain ? NULL : pointer(g->offsets),
        .space = way->divide ? pointer(g->space) : NULL,
        .groups = plain ? 1 : g->groups,
        .m = g->m,
        .n = columns_of(g),
        .k = g->k,
        .accumulate = g->accumulate,
        .band = columns > 40 ? 2 : 1, // a wave of blocks shares all of a narrow B
        .workers = units_of(dev),
    };
}

size_t cuda_gemm_sm90_space(const struct cuda_device *dev, const struct gemm *g)
{
    const struct way way = choose(dev, g, kind_of(g), -1);
    const size_t row = sizeof(float) * GEMM_SM90_ROWS, units = (size_t)units_of(dev);
    if (g->ragged != GEMM_PLAIN) // with fewer rows, as ranks send them, the way may be another
        return row * (size_t)widths[sizeof widths / sizeof *widths - 1] * units;
    return way.divide ? row * (size_t)widths[way.w] * units : 0;
}

int cuda_gemm_sm90_norms(const struct cuda_device *dev, const struct gemm *g)
{
    const struct way way = choose(dev, g, kind_of(g), -1);
    return g->trans_a ? tiles_of(g, widths[way.w]) * (GEMM_SM90_ROWS / 16) : 0;
}

// Launches `blocks` blocks, which may start while the kernel before has some that run: they wait
// for its end before they read anything.
static int launch_early(struct stream *s, cuda_function function, int blocks, unsigned threads,
                        unsigned shared, void **values)
{
    const struct cuda_api *api = s->dev->api;
    cuda_launch_attribute early = {.id = CUDA_LAUNCH_EARLY, .value = 1};
    const cuda_launch_config config = {.grid = {(unsigned)blocks, 1, 1},
                                       .block = {threads, 1, 1},
                                       .shared = shared,
                                       .stream = s->cu,
                                       .attributes = &early,
                                       .count = 1};
    TRY(enter(s->dev));
    CU(api, api->launch_with(&config, function, values, NULL), "cuLaunchKernelEx");
    return 0;
}

// Launches the kernels for what is described; `tiles`: how many there are at most.
static int launch(struct stream *s, enum kind kind, const struct way *way, struct cuda_map map[4],
                  struct gemm_sm90 *p, int64_t tiles)
{
    const int blocks = p->space || tiles > p->workers ? p->workers : (int)tiles;
    void *values[] = {&map[0], &map[1], &map[2], &map[3], p}, *rest[] = {p};
    TRY(launch_early(s, kernel(s->dev, kind, way->w, false), blocks, GEMM_SM90_THREADS,
                     shared_of(kind, widths[way->w]), values));
    if (!p->space)
        return 0;
    // at most half of the blocks had a divided tile: 8 strips of rows each, 4 to a block
    return launch_early(s, kernel(s->dev, kind, way->w, true), blocks, 128, 0, rest);
}

static int multiply(struct stream *s, const struct gemm *g, const struct way *way)
{
    const int width = widths[way->w];
    struct cuda_map map[4] = {{{0}}};
    struct gemm_sm90 p = arguments(s->dev, g, way);
    TRY(describe_a(s->dev, &map[0], g));
    TRY(describe_b(s->dev, &map[1], g, width));
    if (g->swiglu)
        TRY(describe_swiglu(s->dev, &map[2], &map[3], g));
    int rows = gemm_cover(g->m, GEMM_SM90_ROWS);
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups;
    return launch(s, kind_of(g), way, map, &p,
                  (int64_t)rows * (g->trans_a ? p.groups : 1) *
                      gemm_cover(p.n, tile_columns(g, width)));
}

int cuda_gemm_sm90(struct stream *s, const struct gemm *g, int width)
{
    int only = width ? WIDTHS - 1 : -1;
    while (only >= 0 && widths[only] != width)
        only--;
    if (width && (only < 0 || !names[kind_of(g)][only]))
        return NOT_MINE;
    const struct way way = choose(s->dev, g, kind_of(g), only);
    return multiply(s, g, &way);
}

// ---- convolutions -------------------------------------------------------------------------------

bool cuda_conv_sm90_here(struct cuda_device *dev)
{
    return dev->api->pixel_map && has_kernels(dev, CONV_BF16, KINDS);
}

int cuda_conv_sm90(struct stream *s, const struct gemm *g, const struct gemm_sm90_pixels *x,
                   const struct cuda_map *pixels, int channels)
{
    const enum kind kind = g->type_c == F32 ? CONV_F32 : CONV_BF16;
    const struct way way = choose(s->dev, g, kind, -1);
    const int width = widths[way.w], groups = x->doubled ? 4 : 1, taps = groups * x->taps;
    const size_t parts =
        sizeof(float) * GEMM_SM90_ROWS * (size_t)width * (size_t)s->dev->base.info.compute_units;
    struct cuda_map map[4] = {*pixels};
    struct gemm_sm90 p = arguments(s->dev, g, &way);
    p.groups = groups;
    p.pixels = *x;
    if (p.space && parts > g->space->bytes)
        p.space = NULL;
    TRY(describe(s->dev, &map[1], g->b, 3, (int[]){channels, taps, g->n},
                 (int64_t[]){channels, (int64_t)channels * taps}, (int[]){64, 1, width}));
    return launch(s, kind, &way, map, &p,
                  (int64_t)groups * gemm_cover(g->m / groups, GEMM_SM90_ROWS) *
                      gemm_cover(g->n, width));
}
