// Matrix products on CUDA: those of bf16 on Hopper by its own kernels (cuda_gemm_sm90.h); cuBLASLt
// for other plain products of two matrices of one type, where the library is there; kernels.cl for
// everything else and for devices opened as portable. DITMOE_CUBLASLT=0 switches the library off.
//
// cuBLASLt takes column-major matrices: a row-major C = op(A) op(B) is C^T = op(B)^T op(A)^T of the
// same bytes, so B goes first and m and n change places. It finds the algorithm for a shape once;
// what it found is kept for the next product of the same shape. Sums over parts of k are f32.
#include "devices/cuda.h"

#include <stdlib.h>
#include <string.h>

#include "devices/cuda_gemm_sm90.h"
#include "devices/gemm_gpu.h"

enum { SPACE = 8 << 20, PLANS_MAX = 512, C_ALIGNMENT = 16 };

// A product made ready: the shape it is for, and cuBLASLt's objects.
struct plan {
    int m, n, k;
    int pitch; // elements from one row of C to the next
    bool trans_a, trans_b, bias, spacious, relu;
    enum dtype type_ab, type_c;
    bool usable; // false: cuBLASLt has no algorithm, the own kernels do it
    cublaslt_desc desc;
    cublaslt_layout a, b, c;
    cublaslt_algorithm algorithm;
};

struct cuda_gemm {
    bool looked;
    const struct cublaslt_api *api; // NULL: not there
    cublaslt_handle handle;
    int count;
    struct plan plans[PLANS_MAX];
};

// ---- the library --------------------------------------------------------------------------------

// cuBLASLt for this device, opened at its first use, or NULL: the own kernels do everything.
static struct cuda_gemm *library(struct cuda_device *dev)
{
    const char *asked = getenv("DITMOE_CUBLASLT");
    if (!dev->gemm)
        dev->gemm = calloc(1, sizeof *dev->gemm);
    if (!dev->gemm || dev->gemm->looked)
        return dev->gemm && dev->gemm->api ? dev->gemm : NULL;
    struct cuda_gemm *gemm = dev->gemm;
    gemm->looked = true;
    if (dev->base.flags & OPEN_PORTABLE || (asked && !strcmp(asked, "0")))
        return NULL;
    gemm->api = cublaslt_library();
    if (gemm->api &&
        (dev->api->context_set(dev->context) != CUDA_OK || gemm->api->create(&gemm->handle) != 0))
        gemm->api = NULL;
    return gemm->api ? gemm : NULL;
}

static void plan_free(const struct cublaslt_api *api, struct plan *p)
{
    if (p->desc)
        api->desc_destroy(p->desc);
    if (p->a)
        api->layout_destroy(p->a);
    if (p->b)
        api->layout_destroy(p->b);
    if (p->c)
        api->layout_destroy(p->c);
}

void cuda_gemm_close(struct cuda_device *dev)
{
    struct cuda_gemm *gemm = dev->gemm;
    if (!gemm)
        return;
    for (int i = 0; i < gemm->count; i++)
        plan_free(gemm->api, &gemm->plans[i]);
    if (gemm->api)
        gemm->api->destroy(gemm->handle);
    free(gemm);
    dev->gemm = NULL;
}

// ---- plans --------------------------------------------------------------------------------------

static unsigned data_type(enum dtype type)
{
    return type == BF16 ? CUBLASLT_R_16BF : CUBLASLT_R_32F;
}

static bool suits(const struct gemm *g)
{
    if (g->ragged != GEMM_PLAIN || g->swiglu || g->type_a != g->type_b || g->m < 1 || g->n < 1 ||
        g->k < 1)
        return false;
    if (g->type_a == F32)
        return g->type_c == F32;
    return !g->bias || g->type_c == F32; // a bias is f32, and has C's type in cuBLASLt
}

static struct plan plan_key(const struct gemm *g, int pitch, bool relu)
{
    return (struct plan){.m = g->m,
                         .n = g->n,
                         .k = g->k,
                         .pitch = pitch,
                         .relu = relu,
                         .trans_a = g->trans_a,
                         .trans_b = g->trans_b,
                         .bias = g->bias != NULL,
                         .spacious = g->space != NULL,
                         .type_ab = g->type_a,
                         .type_c = g->type_c};
}

static bool same(const struct plan *a, const struct plan *b)
{
    return a->m == b->m && a->n == b->n && a->k == b->k && a->pitch == b->pitch &&
           a->relu == b->relu && a->trans_a == b->trans_a && a->trans_b == b->trans_b &&
           a->bias == b->bias && a->spacious == b->spacious && a->type_ab == b->type_ab &&
           a->type_c == b->type_c;
}

// The operation and the three matrices; false when the library refuses.
static bool describe(const struct cublaslt_api *api, struct plan *p)
{
    unsigned transpose = CUBLASLT_OP_T, ab = data_type(p->type_ab);
    unsigned epilogue = (p->bias ? CUBLASLT_ADD_BIAS : 0) | (p->relu ? CUBLASLT_RELU : 0);
    uint64_t m = (uint64_t)p->m, n = (uint64_t)p->n, k = (uint64_t)p->k;
    bool good = api->desc_create(&p->desc, CUBLASLT_COMPUTE_32F, CUBLASLT_R_32F) == 0;
    if (good && p->trans_b)
        good = api->desc_set(p->desc, CUBLASLT_DESC_TRANSA, &transpose, sizeof transpose) == 0;
    if (good && p->trans_a)
        good = api->desc_set(p->desc, CUBLASLT_DESC_TRANSB, &transpose, sizeof transpose) == 0;
    if (good && epilogue)
        good = api->desc_set(p->desc, CUBLASLT_DESC_EPILOGUE, &epilogue, sizeof epilogue) == 0;
    return good &&
           api->layout_create(&p->b, ab, p->trans_b ? k : n, p->trans_b ? n : k,
                              p->trans_b ? p->k : p->n) == 0 &&
           api->layout_create(&p->a, ab, p->trans_a ? m : k, p->trans_a ? k : m,
                              p->trans_a ? p->m : p->k) == 0 &&
           api->layout_create(&p->c, data_type(p->type_c), n, m, p->pitch) == 0;
}

// The algorithm that the library thinks fastest.
static bool find_algorithm(const struct cuda_gemm *gemm, struct plan *p)
{
    const struct cublaslt_api *api = gemm->api;
    cublaslt_preference preference = NULL;
    cublaslt_heuristic found;
    size_t space = p->spacious ? SPACE : 0;
    unsigned reduction = CUBLASLT_REDUCE_IN_F32, aligned = C_ALIGNMENT;
    int count = 0;
    memset(&found, 0, sizeof found);
    if (api->pref_create(&preference) != 0)
        return false;
    bool good =
        api->pref_set(preference, CUBLASLT_PREF_WORKSPACE, &space, sizeof space) == 0 &&
        api->pref_set(preference, CUBLASLT_PREF_REDUCTION, &reduction, sizeof reduction) == 0 &&
        api->pref_set(preference, CUBLASLT_PREF_ALIGNMENT_C, &aligned, sizeof aligned) == 0 &&
        api->pref_set(preference, CUBLASLT_PREF_ALIGNMENT_D, &aligned, sizeof aligned) == 0 &&
        api->heuristic(gemm->handle, p->desc, p->b, p->a, p->c, p->c, preference, 1, &found,
                       &count) == 0;
    api->pref_destroy(preference);
    p->algorithm = found.algorithm;
    return good && count == 1 && found.state == 0 && found.workspace <= space;
}

// The plan for g, made at its first use; NULL when there is no room for another.
static struct plan *plan_for(struct cuda_gemm *gemm, const struct gemm *g, int pitch, bool relu)
{
    struct plan key = plan_key(g, pitch, relu);
    for (int i = 0; i < gemm->count; i++)
        if (same(&gemm->plans[i], &key))
            return &gemm->plans[i];
    if (gemm->count == PLANS_MAX)
        return NULL;
    struct plan *p = &gemm->plans[gemm->count++];
    *p = key;
    p->usable = describe(gemm->api, p) && find_algorithm(gemm, p);
    return p;
}

// ---- the verbs ----------------------------------------------------------------------------------

static const void *pointer(cuda_address address)
{
    return (const void *)(uintptr_t)address;
}

static int multiply(struct stream *s, const struct cuda_gemm *gemm, const struct plan *p,
                    const struct gemm *g)
{
    const float one = 1, beta = g->accumulate ? 1 : 0;
    void *c = (void *)(uintptr_t)g->c->address;
    void *space = g->space ? (void *)(uintptr_t)g->space->address : NULL;
    unsigned code = 0;
    if (g->bias) {
        const void *bias = pointer(g->bias->address);
        code = gemm->api->desc_set(p->desc, CUBLASLT_DESC_BIAS_POINTER, &bias, sizeof bias);
    }
    TRY(enter(s->dev));
    if (code == 0)
        code = gemm->api->matmul(gemm->handle, p->desc, &one, pointer(g->b->address), p->b,
                                 pointer(g->a->address), p->a, &beta, c, p->c, c, p->c,
                                 &p->algorithm, space, space ? SPACE : 0, s->cu);
    return code == 0 ? 0
                     : fail(ERR_DRIVER, "cuBLASLt: the product %dx%dx%d failed (code %u)", g->m,
                            g->n, g->k, code);
}

int cuda_gemm_into(struct stream *s, const struct gemm *g, int pitch, bool relu)
{
    struct cuda_gemm *gemm = suits(g) && g->c->address % C_ALIGNMENT == 0 ? library(s->dev) : NULL;
    struct plan *p = gemm ? plan_for(gemm, g, pitch, relu) : NULL;
    return p && p->usable ? multiply(s, gemm, p, g) : NOT_MINE;
}

int cuda_gemm_by_library(struct stream *s, const struct gemm *g)
{
    return cuda_gemm_into(s, g, g->n, false);
}

// ---- the verbs ----------------------------------------------------------------------------------

size_t cuda_gemm_space(struct device *base, const struct gemm *g)
{
    struct cuda_device *dev = cuda_device_of(base);
    gemm_check(base, g);
    const size_t by_library = suits(g) && library(dev) ? SPACE : 0;
    const size_t own = cuda_gemm_sm90_suits(dev, g) ? cuda_gemm_sm90_space(dev, g) : 0;
    return own > by_library ? own : by_library;
}

int cuda_gemm_norms(struct device *base, const struct gemm *g)
{
    struct cuda_device *dev = cuda_device_of(base);
    const bool own = cuda_gemm_sm90_suits(dev, g) && cuda_gemm_sm90_wins(dev, g);
    return own ? cuda_gemm_sm90_norms(dev, g) : 0;
}

int cuda_gemm(struct stream *s, const struct gemm *g)
{
    gemm_check(&s->dev->base, g);
    const bool own = cuda_gemm_sm90_suits(s->dev, g);
    int code = own && cuda_gemm_sm90_wins(s->dev, g) ? NOT_MINE : cuda_gemm_by_library(s, g);
    if (code == NOT_MINE)
        code = own ? cuda_gemm_sm90(s, g, 0) : gemm_gpu(&s->dev->base, s, g);
    return code;
}
