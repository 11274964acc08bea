// Matrix products on CPU devices: pack B, then multiply tiles in registers (kernels_gemm.cl).
//
// Scratch: first a copy of A in f32, where A cannot be read in place, then B in panels.
#include "devices/opencl_gemm.h"

// How a product is cut up.
struct cut {
    int panel;       // columns of a panel: GEMM_NR in kernels_gemm.cl
    int strip;       // rows of a register tile: GEMM_MR
    int panels;      // of one B
    int copies;      // matrices B
    int ld;          // elements a row of A as the kernel reads it
    size_t a_floats; // of the copy of A; 0: in place
    size_t b_floats; // of the packed B
    int block, wide; // rows and panels of a work-group
};

static size_t round16(size_t count)
{
    return (count + 15) / 16 * 16;
}

// Blocks of about 96 rows x 4 panels, smaller ones until each core has 8 work-groups.
static void cut_blocks(struct cut *c, const struct opencl_device *dev, const struct gemm *g)
{
    int wanted = 8 * dev->base.info.compute_units;
    int outer = g->ragged == GEMM_PLAIN ? 1 : g->groups > 0 ? g->groups : 1;
    int rows = g->ragged == GEMM_RAGGED_M ? gemm_cover(g->m, outer) : g->m;
    c->block = 8 * c->strip;
    c->wide = 4;
    while (outer * gemm_cover(rows, c->block) * gemm_cover(c->panels, c->wide) < wanted) {
        if (c->wide > 2)
            c->wide--;
        else if (c->block > 2 * c->strip)
            c->block -= c->strip;
        else if (c->wide > 1)
            c->wide--;
        else
            break;
    }
}

static struct cut cut_up(const struct opencl_device *dev, const struct gemm *g)
{
    bool wide = dev->base.info.vector_width >= 16;
    struct cut c = {.panel = wide ? 32 : 16, .strip = wide ? 12 : 6};
    c.panels = gemm_cover(g->n, c.panel);
    c.copies = g->ragged == GEMM_RAGGED_M ? g->groups : 1;
    c.ld = g->trans_a ? g->m : g->k;
    if (g->trans_a)
        c.a_floats = round16((size_t)gemm_cover(g->m, c.strip) * (size_t)c.strip * (size_t)g->k);
    else if (g->type_a == BF16)
        c.a_floats = round16((size_t)g->m * (size_t)c.ld);
    c.b_floats = (size_t)c.copies * (size_t)c.panels * (size_t)g->k * (size_t)c.panel;
    cut_blocks(&c, dev, g);
    return c;
}

size_t opencl_gemm_cpu_space(struct opencl_device *dev, const struct gemm *g)
{
    struct cut c = cut_up(dev, g);
    return (c.a_floats + c.b_floats) * sizeof(float);
}

static int convert_a(struct stream *s, const struct gemm *g, const struct cut *c)
{
    int some = 1 + 16384 / (g->k + 1);
    if (g->trans_a)
        return GEMM_LAUNCH(s, KERNEL_gemm_strips_cpu, gemm_cover(g->k, 64), 1, 1, {.b = g->space},
                           {.b = g->a}, {.i = g->m}, {.i = g->k}, {.i = 64}, {.i = gemm_flags(g)});
    return GEMM_LAUNCH(s, KERNEL_gemm_convert_cpu, gemm_cover(g->m, some), 1, 1, {.b = g->space},
                       {.b = g->a}, {.i = g->m}, {.i = g->k}, {.i = c->ld}, {.i = some},
                       {.i = gemm_flags(g)});
}

static int pack_b(struct stream *s, const struct gemm *g, const struct cut *c, int skip)
{
    enum { DEPTH = 64, WIDE = 8 };
    return GEMM_LAUNCH(s, KERNEL_gemm_pack_cpu, gemm_cover(g->k, DEPTH),
                       gemm_cover(c->panels, WIDE), c->copies, {.b = g->space}, {.b = g->b},
                       {.i = g->trans_b}, {.i = g->n}, {.i = g->k}, {.i = skip}, {.i = DEPTH},
                       {.i = WIDE}, {.i = gemm_flags(g)});
}

static int multiply_rows(struct stream *s, const struct gemm *g, const struct cut *c, int skip,
                         struct mem *a)
{
    bool ragged = g->ragged == GEMM_RAGGED_M;
    int blocks = gemm_cover(g->m, c->block) + (ragged ? g->groups : 0);
    return GEMM_LAUNCH(s, KERNEL_gemm_rows_cpu, blocks, gemm_cover(c->panels, c->wide), 1, {.b = a},
                       {.b = g->space}, {.b = g->c}, {.b = g->bias},
                       {.b = ragged ? g->offsets : NULL}, {.i = g->groups}, {.i = g->m},
                       {.i = g->n}, {.i = g->k}, {.i = c->ld}, {.i = skip}, {.i = c->block},
                       {.i = c->wide}, {.i = gemm_flags(g)});
}

static int multiply_columns(struct stream *s, const struct gemm *g, const struct cut *c, int skip,
                            struct mem *a)
{
    bool ragged = g->ragged == GEMM_RAGGED_K;
    int depth = g->type_c == BF16 ? INT32_MAX : 512; // sums must not pass through bf16
    return GEMM_LAUNCH(s, KERNEL_gemm_columns_cpu, gemm_cover(g->m, c->block),
                       gemm_cover(c->panels, c->wide), ragged ? g->groups : 1, {.b = a},
                       {.b = g->space}, {.b = g->c}, {.b = ragged ? g->offsets : NULL}, {.i = g->m},
                       {.i = g->n}, {.i = g->k}, {.i = skip}, {.i = c->block}, {.i = c->wide},
                       {.i = depth}, {.i = gemm_flags(g)});
}

int opencl_gemm_cpu(struct stream *s, const struct gemm *g)
{
    struct cut c = cut_up(s->dev, g);
    struct mem *a = c.a_floats ? g->space : g->a;
    int skip = (int)(c.a_floats / 16);
    BUG_IF(c.a_floats + c.b_floats > 0 && !g->space);
    if (c.a_floats)
        TRY(convert_a(s, g, &c));
    TRY(pack_b(s, g, &c, skip));
    return g->trans_a ? multiply_columns(s, g, &c, skip, a) : multiply_rows(s, g, &c, skip, a);
}
