// Matrix products on CPU devices: pack B, then multiply tiles in registers (kernels.cl).
//
// Scratch: B in panels; then, where k takes several steps and C cannot hold f32 sums between them
// (it is bf16, or SwiGLU makes it something else), those sums.
#include "devices/opencl_gemm.h"

// The number of kernels.cl.
enum { DEPTH = 384 }; // GEMM_DEPTH: steps of k at a time

// How a product is cut up.
struct cut {
    int panel;       // columns of a panel: GEMM_NR
    int strip;       // rows of a register tile: GEMM_MR
    int panels;      // of one B
    int copies;      // matrices B
    size_t b_floats; // of the packed B
    size_t sums;     // of the sums; 0: they lie in C
    int block, wide; // rows and panels of a work-group
    int depth;       // steps of k at a time
    bool in_place;   // B is read where it lies
};

static size_t round16(size_t count)
{
    return (count + 15) / 16 * 16;
}

// Estimated time of a product in work-groups of block x wide panels: what a core computes, and
// `traffic` times the elements of A and B that it brings into its cache for that.
static double cost(const struct cut *c, int block, int wide, int groups, int units)
{
    double columns = (double)wide * c->panel, rows = block, traffic = 20;
    double turns = gemm_cover(groups, units) + 0.25; // cores do not end at the same moment
    return turns * (rows * columns + traffic * (rows + columns));
}

// The cheapest way to cut C into blocks whose panels, one step deep, fill half a cache of 2 MiB.
static void cut_blocks(struct cut *c, const struct opencl_device *dev, const struct gemm *g)
{
    enum { CACHE_FLOATS = 1 << 18, BLOCKS_MAX = 64 };
    int units = dev->base.info.compute_units > 0 ? dev->base.info.compute_units : 1;
    int outer = g->ragged == GEMM_PLAIN || g->groups < 1 ? 1 : g->groups;
    int rows = g->ragged == GEMM_RAGGED_M ? gemm_cover(g->m, outer) : g->m;
    int strips = gemm_cover(rows, c->strip), depth = g->k < DEPTH ? g->k : DEPTH;
    c->depth =
        g->ragged == GEMM_RAGGED_K || g->k < 1 ? DEPTH : gemm_cover(g->k, gemm_cover(g->k, DEPTH));
    double best = 0;
    for (int x = 1; x <= c->panels; x++) {
        int wide = gemm_cover(c->panels, x);
        if (wide > 1 && (int64_t)wide * depth * c->panel > CACHE_FLOATS)
            continue;
        for (int y = 1; y <= strips && y <= BLOCKS_MAX; y++) {
            int block = gemm_cover(strips, y) * c->strip;
            int groups = outer * gemm_cover(c->panels, wide) * gemm_cover(rows, block);
            double time = cost(c, block, wide, groups, units);
            if (best == 0 || time < best) {
                best = time;
                c->block = block;
                c->wide = wide;
            }
        }
    }
}

// Packing B pays where many rows meet it. Where they are few, B [k,n] is read where it lies, unless
// its rows lie at distances that share few sets of the cache, or its last panel is not whole.
static bool reads_in_place(const struct gemm *g, const struct cut *c)
{
    int rows = g->ragged == GEMM_RAGGED_M && g->groups > 0 ? g->m / g->groups : g->m;
    return !g->trans_b && g->type_b == F32 && g->n % c->panel == 0 && g->n % 1024 != 0 &&
           rows < 1024;
}

int opencl_gemm_cpu_panel(const struct opencl_device *dev)
{
    return dev->base.info.vector_width >= 16 ? 32 : 16;
}

static struct cut cut_up(const struct opencl_device *dev, const struct gemm *g)
{
    struct cut c = {.panel = opencl_gemm_cpu_panel(dev), .block = 1, .wide = 1};
    c.strip = c.panel == 32 ? 12 : 6;
    c.panels = gemm_cover(g->n, c.panel);
    c.copies = g->ragged == GEMM_RAGGED_M ? g->groups : 1;
    size_t pitch = (size_t)g->k * (size_t)c.panel + 16; // gemm_panel_pitch()
    c.in_place = reads_in_place(g, &c);
    if (!c.in_place)
        c.b_floats = round16((size_t)c.copies * (size_t)c.panels * pitch);
    if ((g->type_c == BF16 || g->swiglu != SWIGLU_NONE) && g->k > DEPTH)
        c.sums = (size_t)g->m * (size_t)g->n * (g->ragged == GEMM_RAGGED_K ? (size_t)g->groups : 1);
    cut_blocks(&c, dev, g);
    return c;
}

size_t opencl_gemm_cpu_space(struct opencl_device *dev, const struct gemm *g)
{
    struct cut c = cut_up(dev, g);
    return (c.b_floats + c.sums) * sizeof(float);
}

size_t opencl_gemm_cpu_packed(struct opencl_device *dev, const struct gemm *g)
{
    struct cut c = cut_up(dev, g);
    return c.b_floats * sizeof(float);
}

static int pack_b(struct stream *s, const struct gemm *g, const struct cut *c, struct mem *to)
{
    enum { ROWS = 256, WIDE = 1 }; // long runs of k: each line of B is read once, in order
    return GEMM_LAUNCH(s, KERNEL_gemm_pack_cpu, gemm_cover(g->k, ROWS), gemm_cover(c->panels, WIDE),
                       c->copies, {.b = to}, {.b = g->b}, {.i = g->trans_b}, {.i = g->n},
                       {.i = g->k}, {.i = ROWS}, {.i = WIDE}, {.i = gemm_flags(g)});
}

int opencl_gemm_cpu_pack(struct stream *s, const struct gemm *g)
{
    struct cut c = cut_up(s->dev, g);
    return pack_b(s, g, &c, g->packed);
}

int opencl_gemm_cpu(struct stream *s, const struct gemm *g)
{
    struct cut c = cut_up(s->dev, g);
    struct mem *offsets = g->ragged == GEMM_PLAIN ? NULL : g->offsets;
    struct mem *b = c.in_place ? g->b : g->packed ? g->packed : g->space;
    int flags = gemm_flags(g) | (c.in_place ? GEMM_B_IN_PLACE : 0);
    struct mem *sums = c.sums ? g->space : g->c;
    int skip = c.sums ? (int)(c.b_floats / 16) : 0, down = gemm_cover(g->m, c.block);
    int across = gemm_cover(c.panels, c.wide), workers = s->dev->base.info.compute_units;
    BUG_IF(c.b_floats + c.sums > 0 && !g->space);
    if (!c.in_place && !g->packed)
        TRY(pack_b(s, g, &c, g->space));
    if (g->trans_a)
        return GEMM_LAUNCH(s, KERNEL_gemm_columns_cpu, workers, 1, 1, {.b = s->turns},
                           {.b = g->a}, {.b = b}, {.b = g->c}, {.b = sums}, {.b = offsets},
                           {.i = offsets ? g->groups : 1}, {.i = down}, {.i = across}, {.i = g->m},
                           {.i = g->n}, {.i = g->k}, {.i = skip}, {.i = c.block}, {.i = c.wide},
                           {.i = c.depth}, {.i = flags});
    down += offsets ? g->groups : 0; // every expert may end with a part of a block
    return GEMM_LAUNCH(s, KERNEL_gemm_rows_cpu, workers, 1, 1, {.b = s->turns}, {.b = g->a},
                       {.b = b}, {.b = g->c}, {.b = sums}, {.b = g->h}, {.b = g->bias},
                       {.b = offsets}, {.i = g->groups}, {.i = down}, {.i = across}, {.i = g->m},
                       {.i = g->n}, {.i = g->k}, {.i = skip}, {.i = c.block}, {.i = c.wide},
                       {.i = c.depth}, {.i = flags});
}
