// The operations of a block, forward and backward, at a model's shapes: median time, and what that
// is as a share of the device's ceilings.
#include "tools/bench_ops.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/ops.h"

// Tensors of a model's shapes; M = N T rows, R = M K, F and Fs the widths of expert and shared
// expert. T(name, type, dimensions): weights are f32, or bf16 and low halves where models have
// that.
#define TENSORS(T)                        \
    T(X0, ACT, M, D)                      \
    T(X1, ACT, M, D)                      \
    T(X2, ACT, M, D)                      \
    T(X3, ACT, M, D)                      \
    T(X0_LOW, BF16, M, D)                 \
    T(X2_LOW, BF16, M, D)                 \
    T(STATS, F32, M, 2)                   \
    T(MOD, ACT, N, 6 * D)                 \
    T(DMOD, ACT, N, 6 * D)                \
    T(QKV, ACT, M, 3 * D)                 \
    T(DQKV, ACT, M, 3 * D)                \
    T(QK_STATS, F32, M, 4 * H)            \
    T(LSE, F32, M, H)                     \
    T(DELTA, F32, M, H)                   \
    T(Q_GAIN, F32, D / H)                 \
    T(Q_BIAS, F32, D / H)                 \
    T(K_GAIN, F32, D / H)                 \
    T(K_BIAS, F32, D / H)                 \
    T(LOGITS, F32, M, E)                  \
    T(DLOGITS, F32, M, E)                 \
    T(PROBS, F32, M, E)                   \
    T(WEIGHT, F32, M, K)                  \
    T(DWEIGHT, F32, M, K)                 \
    T(INDEX, I32, M, K)                   \
    T(SLOT, I32, M, K)                    \
    T(TOKEN, I32, R)                      \
    T(OFFSETS, I32, E + 1)                \
    T(FRACTION, F32, 1, E)                \
    T(MEAN_PROB, F32, 1, E)               \
    T(ROWS, ACT, R, D)                    \
    T(DROWS, ACT, R, D)                   \
    T(GU, ACT, R, 2 * F)                  \
    T(HIDDEN, ACT, R, F)                  \
    T(DHIDDEN, ACT, R, F)                 \
    T(SHARED_GU, ACT, M, 2 * Fs)          \
    T(SHARED_HIDDEN, ACT, M, Fs)          \
    T(SHARED_DHIDDEN, ACT, M, Fs)         \
    T(QKV_W, WEIGHTS, 3 * D, D)           \
    T(QKV_B, F32, 3 * D)                  \
    T(PROJ_W, WEIGHTS, D, D)              \
    T(PROJ_B, F32, D)                     \
    T(ROUTER_W, F32, E, D)                \
    T(EXPERTS_GU_W, WEIGHTS, E, 2 * F, D) \
    T(EXPERTS_DOWN_W, WEIGHTS, E, D, F)   \
    T(SHARED_GU_W, WEIGHTS, 2 * Fs, D)    \
    T(SHARED_DOWN_W, WEIGHTS, D, Fs)      \
    T(GRADIENT, F32, E, 2 * F, D)         \
    T(MOMENT1, F32, E, 2 * F, D)          \
    T(MOMENT2, F32, E, 2 * F, D)          \
    T(LOW, LOWS, E, 2 * F, D)             \
    T(EMA, F32, E, 2 * F, D)              \
    T(CONTROL, F32, CONTROL_COUNT)

enum { // their numbers
#define NAME(name, type, ...) name,
    TENSORS(NAME)
#undef NAME
        TENSOR_COUNT
};

enum { ROUNDS = 9, SETS_MAX = 4, ABSENT = -1 };
enum { ACT = -1, WEIGHTS = -2, LOWS = -3 }; // beside enum dtype

// One set of operands. GPUs take several by turns, so that caches do not hold them.
struct set {
    struct tensor t[TENSOR_COUNT];
};

struct bench {
    struct context c;
    const struct config *config;
    int images;
    const struct ceilings *ceilings;
    const char *filter, *what;
    json_t *rows;
    FILE *table;
    struct set sets[SETS_MAX];
    int set_count, turn;
    const struct operation *now; // what is measured
    double bytes, flops;         // of it: operands once each
    char shape[48];
};

// ---- operands -----------------------------------------------------------------------------------

static struct tensor *tensor(struct bench *b, int name)
{
    return &b->sets[b->turn].t[name];
}

static int allocate(struct bench *b, size_t bytes, struct mem **out)
{
    return b->c.dev->api->alloc(b->c.dev, (bytes + 3) & ~(size_t)3, out);
}

static int new_tensor(struct bench *b, struct set *set, int name, int type, int ndim,
                      const int64_t *shape)
{
    struct tensor *t = &set->t[name];
    *t = (struct tensor){.ndim = ndim};
    const bool halves = b->c.dev->half_weights;
    t->dtype = type == ACT                       ? b->c.dev->act
               : type == LOWS || type == WEIGHTS ? (halves ? BF16 : F32)
                                                 : (enum dtype)type;
    memcpy(t->shape, shape, sizeof *shape * (size_t)ndim);
    if (tensor_count(t) == 0 || (type == LOWS && !halves)) // no shared expert, no halves
        return 0;
    TRY(allocate(b, tensor_bytes(t), &t->mem));
    if (t->dtype == I32)
        return 0;
    return noise_fill_device(b->c.dev, b->c.stream, t->mem, tensor_bytes(t), t->dtype);
}

// K different experts for each row, at random.
static int choose_experts(struct bench *b, struct set *set)
{
    enum { EXPERTS_MAX = 512 };
    const struct tensor *index = &set->t[INDEX];
    const int64_t rows = index->shape[0], topk = index->shape[1];
    int32_t *host = malloc(tensor_bytes(index)), order[EXPERTS_MAX];
    const uint32_t experts = (uint32_t)b->config->experts;
    uint32_t seed = 1;
    if (!host || experts > EXPERTS_MAX) {
        free(host);
        return fail(ERR_NOMEM, "out of host memory");
    }
    for (uint32_t e = 0; e < experts; e++)
        order[e] = (int32_t)e;
    for (int64_t m = 0; m < rows; m++)
        for (uint32_t k = 0; k < (uint32_t)topk; k++) { // goes on shuffling one order
            seed = seed * 1664525u + 1013904223u;
            const uint32_t other = k + (seed >> 12) % (experts - k);
            const int32_t chosen = order[other];
            order[other] = order[k];
            order[k] = chosen;
            host[m * topk + k] = chosen;
        }
    int code = tensor_write(&b->c, index, host);
    free(host);
    return code;
}

// Moments above zero, and a rate that changes nothing much.
static int start_optimiser(struct bench *b, struct set *set)
{
    static const float control[CONTROL_COUNT] = {[CONTROL_SCALE] = 1,
                                                 [CONTROL_RATE] = 1e-8f,
                                                 [CONTROL_BIAS1] = 1,
                                                 [CONTROL_BIAS2] = 1,
                                                 [CONTROL_EMA] = 0.999f};
    const struct tensor *v = &set->t[MOMENT2];
    TRY(tensor_write(&b->c, &set->t[CONTROL], control));
    return b->c.dev->api->fill(b->c.stream, v->mem, 0, tensor_bytes(v), 0x3e4ccccd); // 0.2
}

static int new_set(struct bench *b, struct set *set)
{
    const struct config *c = b->config;
    const int64_t N = b->images, D = c->hidden, H = c->heads, E = c->experts, K = c->topk;
    const int64_t M = N * config_tokens(c), R = M * K, F = 4 * D, Fs = c->shared * D;
#define NEW(name, type, ...)                                                                      \
    TRY(new_tensor(b, set, name, type, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
                   (const int64_t[]){__VA_ARGS__}));
    TENSORS(NEW)
#undef NEW
    TRY(start_optimiser(b, set));
    return choose_experts(b, set);
}

static void free_sets(struct bench *b)
{
    const struct backend *api = b->c.dev->api;
    for (int i = 0; i < b->set_count; i++)
        for (int k = 0; k < TENSOR_COUNT; k++)
            api->free(b->sets[i].t[k].mem);
    memset(b->sets, 0, sizeof b->sets);
    b->set_count = b->turn = 0;
    api->free(b->c.space.mem);
    b->c.space = (struct tensor){0};
}

// ---- what is measured ---------------------------------------------------------------------------

// Operands, those that are read and written twice; only while work is counted. -1: none.
#define USES(b, ...) \
    uses(b, (const int[]){__VA_ARGS__}, (int)(sizeof((const int[]){__VA_ARGS__}) / sizeof(int)))

static void uses(struct bench *b, const int *names, int count)
{
    if (!b->c.dry)
        return;
    const struct tensor *first = tensor(b, names[0]);
    int n = 0;
    for (int i = 0; i < first->ndim; i++)
        n += snprintf(b->shape + n, sizeof b->shape - (size_t)n, "%s%lld", i ? "x" : "",
                      (long long)first->shape[i]);
    for (int i = 0; i < count; i++) {
        const struct tensor *t = names[i] >= 0 ? tensor(b, names[i]) : NULL;
        if (t)
            b->bytes += (double)tensor_bytes(t);
    }
}

// A product of `rows` rows, n columns and k: names it by its shape.
static void multiplies(struct bench *b, int64_t m, int64_t n, int64_t k)
{
    if (!b->c.dry)
        return;
    b->flops += 2.0 * (double)m * (double)n * (double)k;
    snprintf(b->shape, sizeof b->shape, "%lldx%lldx%lld", (long long)m, (long long)n, (long long)k);
}

#define T(name) tensor(b, name)

static int64_t columns(struct bench *b, int name)
{
    return T(name)->shape[T(name)->ndim - 1];
}

// The gradient of a weight has its shape, and room in GRADIENT.
static struct tensor gradient(struct bench *b, int weight)
{
    struct tensor g = *T(weight);
    g.mem = T(GRADIENT)->mem;
    g.dtype = F32;
    if (b->c.dry) // written
        b->bytes += (double)tensor_bytes(&g);
    return g;
}

static int linear(struct bench *b, int y, int x, int w, int bias)
{
    USES(b, y, x, w, bias);
    multiplies(b, T(x)->shape[0], columns(b, y), columns(b, x));
    return op_linear(&b->c, T(y), T(x), T(w), bias >= 0 ? T(bias) : NULL);
}

static int linear_dx(struct bench *b, int dx, int dy, int w)
{
    USES(b, dx, dy, w);
    multiplies(b, T(dy)->shape[0], columns(b, dx), columns(b, dy));
    return op_linear_dx(&b->c, T(dx), T(dy), T(w), false);
}

static int linear_dw(struct bench *b, int w, int bias, int dy, int x)
{
    USES(b, dy, x);
    struct tensor g = gradient(b, w);
    multiplies(b, columns(b, dy), columns(b, x), T(x)->shape[0]);
    return op_linear_dw(&b->c, &g, bias >= 0 ? T(bias) : NULL, T(dy), T(x));
}

#define OPERATION(name, body)        \
    static int name(struct bench *b) \
    {                                \
        body;                        \
    }

OPERATION(run_qkv, return linear(b, QKV, X0, QKV_W, QKV_B))
OPERATION(run_qkv_dx, return linear_dx(b, X0, QKV, QKV_W))
OPERATION(run_qkv_dw, return linear_dw(b, QKV_W, QKV_B, QKV, X0))
OPERATION(run_proj, return linear(b, X1, X0, PROJ_W, PROJ_B))
OPERATION(run_proj_dx, return linear_dx(b, X0, X1, PROJ_W))
OPERATION(run_proj_dw, return linear_dw(b, PROJ_W, PROJ_B, X1, X0))
OPERATION(run_shared_down, return linear(b, X1, SHARED_HIDDEN, SHARED_DOWN_W, ABSENT))
OPERATION(run_shared_down_dw, return linear_dw(b, SHARED_DOWN_W, ABSENT, X1, SHARED_HIDDEN))
OPERATION(run_shared_gu_dx, return linear_dx(b, X0, SHARED_GU, SHARED_GU_W))
OPERATION(run_shared_gu_dw, return linear_dw(b, SHARED_GU_W, ABSENT, SHARED_GU, X0))

// Where the device fuses SwiGLU, sampling needs no memory for gate and up.
static int run_shared_swiglu(struct bench *b)
{
    const bool fuses = op_swiglu_fuses(&b->c, columns(b, SHARED_HIDDEN));
    USES(b, SHARED_HIDDEN, X0, SHARED_GU_W);
    multiplies(b, T(X0)->shape[0], columns(b, SHARED_GU), columns(b, X0));
    return op_linear_swiglu(&b->c, T(SHARED_HIDDEN), fuses ? NULL : T(SHARED_GU), T(X0),
                            T(SHARED_GU_W));
}

static int run_experts_swiglu(struct bench *b)
{
    const bool fuses = op_swiglu_fuses(&b->c, columns(b, HIDDEN));
    USES(b, HIDDEN, ROWS, EXPERTS_GU_W);
    multiplies(b, T(ROWS)->shape[0], columns(b, GU), columns(b, ROWS));
    return op_experts_swiglu(&b->c, T(HIDDEN), fuses ? NULL : T(GU), T(ROWS), T(EXPERTS_GU_W),
                             T(OFFSETS));
}

// Training keeps gate and up.
static int run_experts_swiglu_kept(struct bench *b)
{
    USES(b, HIDDEN, GU, ROWS, EXPERTS_GU_W);
    multiplies(b, T(ROWS)->shape[0], columns(b, GU), columns(b, ROWS));
    return op_experts_swiglu(&b->c, T(HIDDEN), T(GU), T(ROWS), T(EXPERTS_GU_W), T(OFFSETS));
}

static int run_experts_down(struct bench *b)
{
    USES(b, ROWS, HIDDEN, EXPERTS_DOWN_W);
    multiplies(b, T(ROWS)->shape[0], columns(b, ROWS), columns(b, HIDDEN));
    return op_experts(&b->c, T(ROWS), T(HIDDEN), T(EXPERTS_DOWN_W), T(OFFSETS));
}

static int run_experts_swiglu_dx(struct bench *b)
{
    const bool fuses = op_swiglu_fuses(&b->c, columns(b, HIDDEN));
    const bool rebuilds = op_swiglu_rebuilds(&b->c, columns(b, HIDDEN));
    USES(b, GU, GU, DROWS, EXPERTS_DOWN_W, rebuilds ? HIDDEN : ABSENT);
    multiplies(b, T(ROWS)->shape[0], columns(b, HIDDEN), columns(b, DROWS));
    return op_experts_swiglu_dx(&b->c, T(GU), fuses ? NULL : T(DHIDDEN),
                                rebuilds ? T(HIDDEN) : NULL, NULL, T(DROWS), T(EXPERTS_DOWN_W),
                                T(OFFSETS));
}

static int run_shared_swiglu_dx(struct bench *b)
{
    const bool fuses = op_swiglu_fuses(&b->c, columns(b, SHARED_HIDDEN));
    const bool rebuilds = op_swiglu_rebuilds(&b->c, columns(b, SHARED_HIDDEN));
    USES(b, SHARED_GU, SHARED_GU, X1, SHARED_DOWN_W, rebuilds ? SHARED_HIDDEN : ABSENT);
    multiplies(b, T(X1)->shape[0], columns(b, SHARED_HIDDEN), columns(b, X1));
    return op_linear_swiglu_dx(&b->c, T(SHARED_GU), fuses ? NULL : T(SHARED_DHIDDEN),
                               rebuilds ? T(SHARED_HIDDEN) : NULL, T(X1), T(SHARED_DOWN_W));
}

static int run_experts_gu_dx(struct bench *b)
{
    USES(b, ROWS, GU, EXPERTS_GU_W);
    multiplies(b, T(ROWS)->shape[0], columns(b, ROWS), columns(b, GU));
    return op_experts_dx(&b->c, T(ROWS), T(GU), T(EXPERTS_GU_W), T(OFFSETS));
}

static int run_experts_gu_dw(struct bench *b)
{
    USES(b, GU, ROWS);
    struct tensor g = gradient(b, EXPERTS_GU_W);
    multiplies(b, columns(b, GU), columns(b, ROWS), T(ROWS)->shape[0]);
    return op_experts_dw(&b->c, &g, NULL, T(GU), T(ROWS), T(OFFSETS));
}

static int run_experts_down_dw(struct bench *b)
{
    USES(b, DROWS, HIDDEN);
    struct tensor g = gradient(b, EXPERTS_DOWN_W);
    multiplies(b, columns(b, DROWS), columns(b, HIDDEN), T(ROWS)->shape[0]);
    return op_experts_dw(&b->c, &g, NULL, T(DROWS), T(HIDDEN), T(OFFSETS));
}

static void attends(struct bench *b, double products)
{
    const double tokens = config_tokens(b->config);
    const struct config *c = b->config;
    if (!b->c.dry)
        return;
    b->flops += products * 2 * tokens * (double)tensor_count(T(X0));
    snprintf(b->shape, sizeof b->shape, "%dx%d of %dx%d", b->images, c->heads, config_tokens(c),
             c->hidden / c->heads);
}

static int run_attention(struct bench *b)
{
    USES(b, QKV, X1);
    attends(b, 2);
    return op_attention_fwd(&b->c, T(X1), NULL, T(QKV), b->images, b->config->heads);
}

static int run_qk_attention(struct bench *b)
{
    USES(b, QKV, X1);
    attends(b, 2);
    return op_qk_attention_fwd(&b->c, T(X1), NULL, T(QKV), T(QK_STATS), T(QKV), T(Q_GAIN),
                               T(Q_BIAS), T(K_GAIN), T(K_BIAS), b->images, b->config->heads);
}

static int run_attention_bwd(struct bench *b)
{
    USES(b, QKV, DQKV, X0, X1, LSE);
    attends(b, 5);
    return op_attention_bwd(&b->c, T(DQKV), T(DELTA), T(X0), T(X1), T(LSE), T(QKV), b->images,
                            b->config->heads);
}

static int run_qk_norm(struct bench *b)
{
    USES(b, QKV, DQKV, QK_STATS);
    return op_qk_norm_fwd(&b->c, T(DQKV), T(QK_STATS), T(QKV), T(Q_GAIN), T(Q_BIAS), T(K_GAIN),
                          T(K_BIAS), b->config->heads);
}

static int run_qk_norm_bwd(struct bench *b)
{
    USES(b, QKV, DQKV, DQKV, QK_STATS);
    return op_qk_norm_bwd(&b->c, T(DQKV), T(Q_BIAS), T(Q_BIAS), T(K_BIAS), T(K_BIAS), T(QKV),
                          T(QK_STATS), T(Q_GAIN), T(K_GAIN), b->config->heads);
}

static int run_norm(struct bench *b)
{
    USES(b, X1, X0, STATS);
    return op_layernorm_mod_fwd(&b->c, T(X1), T(STATS), T(X0), T(MOD), 0, b->config->hidden);
}

static struct norm_columns norm_columns(const struct bench *b)
{
    const int D = b->config->hidden;
    return (struct norm_columns){.gate = 0, .shift = D, .scale = 2 * D};
}

// These two as a sampling step has them: where the device has them in one pass, the stream is in
// two halves and the sum in mid-block is not kept.
static struct tensor stream(struct bench *b, int name, int low)
{
    struct tensor x = *T(name);
    x.low = op_combine_norm_fuses(&b->c, b->config->hidden) ? T(low) : NULL;
    return x;
}

static int run_residual_norm(struct bench *b)
{
    const struct tensor x = stream(b, X0, X0_LOW);
    USES(b, X0, x.low ? X0_LOW : X2, X1, X3, STATS, LOGITS);
    return op_residual_norm_fwd(&b->c, x.low ? NULL : T(X2), T(X3), T(STATS), T(LOGITS), &x, T(X1),
                                T(MOD), norm_columns(b), T(ROUTER_W));
}

static int run_combine_norm(struct bench *b)
{
    const struct tensor x = stream(b, X0, X0_LOW);
    struct tensor y = stream(b, X2, X2_LOW);
    const bool one = x.low, shared = b->config->shared > 0;
    USES(b, X0, X1, X2, X3, ROWS, STATS, shared ? X0 : ABSENT, one ? X0_LOW : ABSENT,
         one ? X2_LOW : ABSENT);
    return op_combine_norm_fwd(&b->c, &y, T(X3), T(STATS), one ? NULL : T(X1), &x,
                               one ? T(X1) : NULL, 0, T(ROWS), T(SLOT), T(WEIGHT),
                               shared ? T(X0) : NULL, T(MOD), norm_columns(b));
}

static int run_norm_gate_bwd(struct bench *b)
{
    USES(b, X0, X0, X1, X1, X2, X3, DROWS, STATS, DLOGITS);
    return op_norm_gate_bwd(&b->c, T(X0), T(X1), T(DMOD), T(X2), T(DROWS), T(SLOT), T(DLOGITS),
                            T(ROUTER_W), T(X3), T(STATS), T(X1), T(MOD), norm_columns(b));
}

static int run_router(struct bench *b)
{
    USES(b, LOGITS, PROBS, WEIGHT, INDEX);
    return op_router_fwd(&b->c, T(PROBS), T(WEIGHT), T(INDEX), T(LOGITS), false);
}

static int run_route(struct bench *b)
{
    USES(b, INDEX, SLOT, TOKEN);
    return op_route(&b->c, T(OFFSETS), T(SLOT), T(TOKEN), T(INDEX));
}

static int run_router_route(struct bench *b)
{
    USES(b, LOGITS, PROBS, WEIGHT, INDEX, SLOT, TOKEN);
    return op_router_route(&b->c, T(PROBS), T(WEIGHT), T(INDEX), T(OFFSETS), T(SLOT), T(TOKEN),
                           T(FRACTION), T(MEAN_PROB), T(LOGITS), false);
}

static int run_router_bwd(struct bench *b)
{
    USES(b, DLOGITS, PROBS, DWEIGHT, INDEX);
    return op_router_bwd(&b->c, T(DLOGITS), T(DWEIGHT), T(PROBS), T(INDEX), T(FRACTION), 0.01f,
                         false);
}

static int run_router_dw(struct bench *b)
{
    USES(b, X0, DLOGITS);
    struct tensor g = gradient(b, ROUTER_W);
    return op_router_dw(&b->c, &g, T(DLOGITS), T(X0));
}

static int run_dispatch(struct bench *b)
{
    USES(b, X0, ROWS, TOKEN); // at best: some devices read a row for each of its copies
    return op_dispatch_fwd(&b->c, T(ROWS), T(X0), T(TOKEN), T(SLOT));
}

static int run_combine_bwd(struct bench *b)
{
    USES(b, ROWS, DROWS, X0, SLOT, WEIGHT, DWEIGHT);
    return op_combine_bwd(&b->c, T(DROWS), T(DWEIGHT), T(X0), T(ROWS), T(SLOT), T(WEIGHT));
}

static int run_norm2(struct bench *b)
{
    USES(b, GRADIENT);
    return op_norm2(&b->c, T(CONTROL), T(GRADIENT), false);
}

static int run_adamw(struct bench *b)
{
    const struct adamw a = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .ema = 0.999};
    struct tensor *w = T(EXPERTS_GU_W), *low = w->dtype == BF16 ? T(LOW) : NULL;
    USES(b, GRADIENT, MOMENT1, MOMENT1, MOMENT2, MOMENT2, EMA, EMA, EXPERTS_GU_W, EXPERTS_GU_W,
         low ? LOW : ABSENT, low ? LOW : ABSENT);
    return op_adamw(&b->c, w, T(MOMENT1), T(MOMENT2), T(EMA), T(GRADIENT), T(CONTROL), low, &a);
}

struct operation {
    const char *name;
    int (*run)(struct bench *b);
    bool spoils; // changes GU or SHARED_GU: not to be done again on the same numbers
};

static const struct operation operations[] = {
    {"route", run_route, false}, // first: the others need its results
    {"qkv", run_qkv, false},
    {"qkv dx", run_qkv_dx, false},
    {"qkv dw, dbias", run_qkv_dw, false},
    {"projection", run_proj, false},
    {"projection dx", run_proj_dx, false},
    {"projection dw, dbias", run_proj_dw, false},
    {"attention_fwd", run_attention, false},
    {"qk_norm, attention_fwd", run_qk_attention, false},
    {"attention_bwd", run_attention_bwd, false},
    {"qk_norm_fwd", run_qk_norm, false},
    {"qk_norm_bwd", run_qk_norm_bwd, false},
    {"layernorm_mod_fwd", run_norm, false},
    {"residual, norm_fwd", run_residual_norm, false},
    {"combine, norm_fwd", run_combine_norm, false},
    {"norm, gate_bwd", run_norm_gate_bwd, false},
    {"router_fwd", run_router, false},
    {"router, route, balance", run_router_route, false},
    {"router_bwd", run_router_bwd, false},
    {"router dw", run_router_dw, false},
    {"dispatch_fwd", run_dispatch, false},
    {"combine_bwd", run_combine_bwd, false},
    {"experts gate, up, swiglu", run_experts_swiglu, false},
    {"same, gate and up kept", run_experts_swiglu_kept, false},
    {"experts down", run_experts_down, false},
    {"experts down dx, swiglu", run_experts_swiglu_dx, true},
    {"experts gate, up dx", run_experts_gu_dx, false},
    {"experts gate, up dw", run_experts_gu_dw, false},
    {"experts down dw", run_experts_down_dw, false},
    {"shared gate, up, swiglu", run_shared_swiglu, false},
    {"shared down", run_shared_down, false},
    {"shared down dx, swiglu", run_shared_swiglu_dx, true},
    {"shared down dw", run_shared_down_dw, false},
    {"shared gate, up dx", run_shared_gu_dx, false},
    {"shared gate, up dw", run_shared_gu_dw, false},
    {"norm2", run_norm2, false},
    {"adamw", run_adamw, false},
};

static bool applies(const struct bench *b, const struct operation *op)
{
    if (b->filter && !strstr(op->name, b->filter))
        return false;
    return b->config->shared > 0 || strncmp(op->name, "shared", strlen("shared")) != 0;
}

// ---- timing -------------------------------------------------------------------------------------

static int run_now(void *user)
{
    struct bench *b = user;
    b->turn = (b->turn + 1) % b->set_count;
    return b->now->run(b);
}

// For operations that spoil their operand: each set once, then new numbers.
static int time_spoiling(struct bench *b, double *seconds)
{
    const struct backend *api = b->c.dev->api;
    double times[ROUNDS];
    for (int i = -1; i < ROUNDS; i++) {
        for (int k = 0; k < 2 * b->set_count; k++) {
            const struct tensor *t = &b->sets[k / 2].t[k % 2 ? SHARED_GU : GU];
            if (t->mem)
                TRY(noise_fill_device(b->c.dev, b->c.stream, t->mem, tensor_bytes(t), t->dtype));
        }
        TRY(api->sync(b->c.stream));
        double start = now_seconds();
        for (int k = 0; k < b->set_count; k++)
            TRY(run_now(b));
        TRY(api->sync(b->c.stream));
        if (i >= 0)
            times[i] = (now_seconds() - start) / b->set_count;
    }
    *seconds = median_of(times, ROUNDS);
    return 0;
}

// A dry call counts the work and tells the scratch that is wanted; then that is made.
static int prepare(struct bench *b)
{
    b->bytes = b->flops = 0;
    b->shape[0] = 0;
    b->c.space_wanted = 0;
    b->c.dry = true;
    int code = b->now->run(b);
    b->c.dry = false;
    TRY(code);
    if (b->c.space_wanted <= (b->c.space.mem ? tensor_bytes(&b->c.space) : 0))
        return 0;
    b->c.dev->api->free(b->c.space.mem);
    b->c.space = (struct tensor){.dtype = F32, .ndim = 1};
    b->c.space.shape[0] = (int64_t)(b->c.space_wanted + 3) / 4;
    return b->c.dev->api->alloc(b->c.dev, tensor_bytes(&b->c.space), &b->c.space.mem);
}

static void report(struct bench *b, double seconds)
{
    const struct ceilings *top = b->ceilings;
    const double of_product = b->flops / seconds / top->flops;
    const double of_copy = b->bytes / seconds / top->copy;
    const bool computes = of_product > of_copy;
    char rate[32];
    fprintf(b->table, "%-26s %-22s %9.1f us %14s %4.0f%% of %s\n", b->now->name, b->shape,
            seconds * 1e6,
            computes ? format_rate(b->flops / seconds, "FLOP", rate)
                     : format_rate(b->bytes / seconds, "B", rate),
            100 * (computes ? of_product : of_copy), computes ? "product" : "copy");
    fflush(b->table);
    json_t *row = json_pack("{s:s, s:s, s:s, s:s, s:i, s:s, s:f, s:f, s:f}", "bench", "ops", "name",
                            b->now->name, "what", b->what, "type", dtype_name(b->c.dev->act),
                            "batch", b->images, "shape", b->shape, "seconds", seconds, "gbps",
                            1e-9 * b->bytes / seconds, "of_copy", of_copy);
    if (b->flops > 0) {
        json_object_set_new(row, "gflops", json_real(1e-9 * b->flops / seconds));
        json_object_set_new(row, "of_product", json_real(of_product));
    }
    json_array_append_new(b->rows, row);
}

static int bench_shapes(struct bench *b)
{
    double seconds;
    for (b->set_count = 0; b->set_count < SETS_MAX;) {
        b->turn = b->set_count++; // so that half a set is freed too
        TRY(new_set(b, &b->sets[b->turn]));
        b->now = &operations[0];
        TRY(prepare(b));
        TRY(run_route(b));
        if (b->c.dev->info.kind == DEVICE_CPU ||
            (double)b->c.dev->allocated * (1 + 1.5 / b->set_count) > (double)b->c.dev->info.memory)
            break;
    }
    for (size_t i = 0; i < sizeof operations / sizeof operations[0]; i++) {
        b->now = &operations[i];
        if (!applies(b, b->now))
            continue;
        TRY(prepare(b));
        TRY(b->now->spoils
                ? time_spoiling(b, &seconds)
                : measure_calls(b->c.dev, b->c.stream, ROUNDS, 5e-3, run_now, b, &seconds));
        report(b, seconds);
    }
    return 0;
}

int bench_ops(struct device *dev, struct stream *stream, const struct config *c, const char *model,
              int batch, const struct ceilings *ceilings, const char *filter, json_t *rows,
              FILE *table)
{
    char what[192];
    struct bench *b = calloc(1, sizeof *b);
    if (!b)
        return fail(ERR_NOMEM, "out of host memory");
    if (c->moe == MOE_NONE) {
        free(b);
        return fail(ERR_INPUT, "bench ops needs a model with experts");
    }
    *b = (struct bench){.c = {.dev = dev, .stream = stream}, .config = c, .images = batch};
    b->ceilings = ceilings, b->filter = filter, b->rows = rows, b->table = table, b->what = what;
    snprintf(what, sizeof what, "%s", model);
    fprintf(table, "\n%s, batch %d, %s\n", model, batch, dtype_name(dev->act));
    int code = bench_shapes(b);
    free_sets(b);
    free(b);
    return code < 0 ? fail_in(code, "%s, batch %d", model, batch) : 0;
}
