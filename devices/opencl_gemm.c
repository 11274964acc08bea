// Matrix products on OpenCL: the project's own kernels in the form that suits the device, or
// CLBlast where it is faster.
#include "devices/opencl_gemm.h"

#include <stdio.h>

#include "devices/tune.h"

// ---- the GPU form -------------------------------------------------------------------------------

enum { TILE_M = 128, TILE_N = 64 }; // GEMM_TM, GEMM_TN in kernels_gemm.cl

static int gemm_gpu(struct stream *s, const struct gemm *g)
{
    enum kernel kernel = g->trans_a ? KERNEL_gemm_tn : g->trans_b ? KERNEL_gemm_nt : KERNEL_gemm_nn;
    int rows = gemm_cover(g->m, TILE_M);
    if (g->ragged == GEMM_RAGGED_M)
        rows += g->groups; // every expert may end with a part of a tile
    return GEMM_LAUNCH(s, kernel, gemm_cover(g->n, TILE_N), rows,
                       g->ragged == GEMM_RAGGED_K ? g->groups : 1, {.b = g->a}, {.b = g->b},
                       {.b = g->c}, {.b = g->bias},
                       {.b = g->ragged == GEMM_PLAIN ? NULL : g->offsets}, {.i = g->groups},
                       {.i = g->m}, {.i = g->n}, {.i = g->k}, {.i = gemm_flags(g)});
}

// ---- the verbs ----------------------------------------------------------------------------------

static void check(const struct device *dev, const struct gemm *g)
{
    BUG_IF(g->m < 0 || g->n < 0 || g->k < 0);
    BUG_IF(g->trans_a && g->trans_b);
    BUG_IF(g->ragged == GEMM_RAGGED_M && g->trans_a);
    BUG_IF(g->ragged == GEMM_RAGGED_K && !g->trans_a);
    BUG_IF(g->bias && g->ragged != GEMM_PLAIN);
    if (g->swiglu == SWIGLU_NONE)
        return;
    int columns = dev->swiglu_columns, F = g->swiglu == SWIGLU_FORWARD ? g->n / 2 : g->n;
    BUG_IF(columns == 0 || F % columns != 0 || g->trans_b != (g->swiglu == SWIGLU_FORWARD));
    BUG_IF(g->trans_a || g->bias || g->accumulate);
}

static size_t own_space(struct opencl_device *dev, const struct gemm *g)
{
    return dev->base.cpu_forms ? opencl_gemm_cpu_space(dev, g) : 0;
}

static int own_gemm(struct stream *s, const struct gemm *g)
{
    return s->dev->base.cpu_forms ? opencl_gemm_cpu(s, g) : gemm_gpu(s, g);
}

size_t opencl_gemm_space(struct device *base, const struct gemm *g)
{
    struct opencl_device *dev = opencl_device_of(base);
    bool forced;
    check(base, g);
    size_t own = own_space(dev, g);
    size_t clblast = opencl_clblast_wanted(dev, g, &forced) ? opencl_clblast_space(dev, g) : 0;
    return own > clblast ? own : clblast;
}

// ---- own kernels or CLBlast? --------------------------------------------------------------------

enum { OWN, CLBLAST, WAYS };

// Measured on a C of its own, so that the product's C is touched once, by the winner. It is made
// only when there is something to measure, and does not count among the run's allocations.
struct trial {
    struct stream *stream;
    struct gemm gemm; // c: NULL until the first run
};

static int run_trial(void *user, int way, int repeats)
{
    struct trial *t = user;
    struct device *dev = &t->stream->dev->base;
    size_t bytes = (size_t)t->gemm.m * (size_t)t->gemm.n * sizeof(float);
    if (!t->gemm.c) {
        TRY(dev->api->alloc(dev, bytes, &t->gemm.c));
        dev->allocations--;
    }
    for (int i = 0; i < repeats; i++)
        TRY(way == OWN ? own_gemm(t->stream, &t->gemm) : opencl_clblast(t->stream, &t->gemm));
    return dev->api->sync(t->stream);
}

static int choose(struct stream *s, const struct gemm *g)
{
    struct device *dev = &s->dev->base;
    struct trial trial = {s, *g};
    char key[80];
    snprintf(key, sizeof key, "gemm %c%c f32 %dx%dx%d%s", g->trans_a ? 't' : 'n',
             g->trans_b ? 't' : 'n', g->m, g->n, g->k, g->accumulate ? " +=" : "");
    trial.gemm.c = NULL;
    int way = tune_choose(dev, key, WAYS, run_trial, &trial);
    if (trial.gemm.c)
        dev->api->free(trial.gemm.c);
    return way;
}

int opencl_gemm(struct stream *s, const struct gemm *g)
{
    bool forced;
    check(&s->dev->base, g);
    if (!opencl_clblast_wanted(s->dev, g, &forced))
        return own_gemm(s, g);
    int way = forced ? CLBLAST : choose(s, g);
    TRY(way);
    return way == CLBLAST ? opencl_clblast(s, g) : own_gemm(s, g);
}

size_t opencl_gemm_packed(struct device *base, const struct gemm *g)
{
    bool forced, own = !opencl_clblast_wanted(opencl_device_of(base), g, &forced);
    check(base, g);
    return own && base->cpu_forms && g->trans_b ? opencl_gemm_cpu_packed(opencl_device_of(base), g)
                                                : 0;
}

int opencl_gemm_pack(struct stream *s, const struct gemm *g)
{
    check(&s->dev->base, g);
    BUG_IF(!s->dev->base.cpu_forms || !g->trans_b);
    return opencl_gemm_cpu_pack(s, g);
}

void opencl_gemm_close(struct opencl_device *dev)
{
    (void)dev;
}
