// Matrix products on OpenCL: the project's own kernels in the form that suits the device, or
// CLBlast where it is faster.
#include "devices/opencl_gemm.h"

#include <stdio.h>

#include "devices/tune.h"

// ---- the verbs ----------------------------------------------------------------------------------

static size_t own_space(struct opencl_device *dev, const struct gemm *g)
{
    return dev->base.cpu_forms ? opencl_gemm_cpu_space(dev, g) : 0;
}

static int own_gemm(struct stream *s, const struct gemm *g)
{
    return s->dev->base.cpu_forms ? opencl_gemm_cpu(s, g) : gemm_gpu(&s->dev->base, s, g);
}

size_t opencl_gemm_space(struct device *base, const struct gemm *g)
{
    struct opencl_device *dev = opencl_device_of(base);
    bool forced;
    gemm_check(base, g);
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
    gemm_check(&s->dev->base, g);
    if (!opencl_clblast_wanted(s->dev, g, &forced))
        return own_gemm(s, g);
    int way = forced ? CLBLAST : choose(s, g);
    TRY(way);
    return way == CLBLAST ? opencl_clblast(s, g) : own_gemm(s, g);
}

size_t opencl_gemm_packed(struct device *base, const struct gemm *g)
{
    bool forced, own = !opencl_clblast_wanted(opencl_device_of(base), g, &forced);
    gemm_check(base, g);
    return own && base->cpu_forms && g->trans_b ? opencl_gemm_cpu_packed(opencl_device_of(base), g)
                                                : 0;
}

int opencl_gemm_pack(struct stream *s, const struct gemm *g)
{
    gemm_check(&s->dev->base, g);
    BUG_IF(!s->dev->base.cpu_forms || !g->trans_b);
    return opencl_gemm_cpu_pack(s, g);
}
