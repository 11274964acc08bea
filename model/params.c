// The table is built by walking the network once; each device tensor is added whole, then the
// published parameters that lie in it.
#include "model/params.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/ops.h"
#include "runtime/rng.h"

// A device tensor: where it sits in the struct, and its shape.
struct group {
    int block;
    size_t member;
    bool frozen, streamed;
    int first; // its first parameter, whose name stands for it in the plan's table
    int ndim;
    int64_t shape[3];
};

struct builder {
    const struct config *config;
    const struct placement *place; // NULL: one rank has everything
    int rank;
    struct param *list;
    struct group *groups;
    int count, group_count;
    int64_t next; // first free element of the current group
};

static void add_group(struct builder *b, int block, size_t member, bool frozen, int ndim, int64_t s0,
                      int64_t s1, int64_t s2)
{
    if (b->groups)
        b->groups[b->group_count] =
            (struct group){block, member, frozen, false, b->count, ndim, {s0, s1, s2}};
    b->group_count++;
    b->next = 0;
}

// A published parameter in the current group.
static void add_param(struct builder *b, int block, size_t member, const char *name, enum init init,
                      int ndim, const int64_t *shape)
{
    struct param p = {.ndim = ndim,
                      .init = init,
                      .block = block,
                      .member = member,
                      .start = b->next,
                      .expert = NO_EXPERT};
    p.frozen = init == INIT_POSITION;
    snprintf(p.name, sizeof p.name, "%s", name);
    for (int i = 0; i < ndim; i++)
        p.shape[i] = shape[i];
    b->next += param_count(&p);
    if (b->list)
        b->list[b->count] = p;
    b->count++;
}

// A device tensor that is one parameter.
#define ADD(b, member, init, name, ...)                                                            \
    do {                                                                                           \
        const int64_t shape_[] = {__VA_ARGS__};                                                    \
        const int n_ = (int)(sizeof shape_ / sizeof *shape_);                                      \
        int64_t rest_ = 1;                                                                         \
        for (int i_ = 1; i_ < n_; i_++)                                                            \
            rest_ *= shape_[i_];                                                                   \
        add_group(b, -1, offsetof(struct weights, member), (init) == INIT_POSITION,                \
                  n_ > 1 ? 2 : 1, shape_[0], rest_, 1);                                            \
        add_param(b, -1, offsetof(struct weights, member), name, init, n_, shape_);                \
    } while (0)

static void add_embedding(struct builder *b)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, p = c->patch;
    // pos_embed is [1,T,D]; the device tensor is [T,D]
    add_group(b, -1, offsetof(struct weights, pos), true, 2, config_tokens(c), D, 1);
    add_param(b, -1, offsetof(struct weights, pos), "pos_embed", INIT_POSITION, 3,
              (int64_t[]){1, config_tokens(c), D});
    ADD(b, patch_w, INIT_XAVIER, "x_embedder.proj.weight", D, c->channels, p, p);
    ADD(b, patch_b, INIT_ZERO, "x_embedder.proj.bias", D);
    ADD(b, t0_w, INIT_NORMAL, "t_embedder.mlp.0.weight", D, TIMESTEP_FEATURES);
    ADD(b, t0_b, INIT_ZERO, "t_embedder.mlp.0.bias", D);
    ADD(b, t2_w, INIT_NORMAL, "t_embedder.mlp.2.weight", D, D);
    ADD(b, t2_b, INIT_ZERO, "t_embedder.mlp.2.bias", D);
    ADD(b, labels, INIT_NORMAL, "y_embedder.embedding_table.weight", config_label_rows(c), D);
}

static void add_head(struct builder *b)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, out = (int64_t)c->patch * c->patch * config_out_channels(c);
    ADD(b, final_w, INIT_ZERO, "final_layer.linear.weight", out, D);
    ADD(b, final_b, INIT_ZERO, "final_layer.linear.bias", out);
}

// The modulations of the blocks and of the head, one below the other; `columns` 0: their biases.
static void add_modulations(struct builder *b, size_t member, const char *suffix, int64_t columns)
{
    const int L = b->config->layers, ndim = columns ? 2 : 1;
    const int64_t D = b->config->hidden;
    char name[72];
    add_group(b, -1, member, false, ndim, config_modulations(b->config), columns ? columns : 1, 1);
    for (int l = 0; l < L; l++) {
        snprintf(name, sizeof name, "blocks.%d.adaLN_modulation.1.%s", l, suffix);
        add_param(b, -1, member, name, INIT_ZERO, ndim, (int64_t[]){MODULATIONS * D, columns});
    }
    snprintf(name, sizeof name, "final_layer.adaLN_modulation.1.%s", suffix);
    add_param(b, -1, member, name, INIT_ZERO, ndim, (int64_t[]){2 * D, columns});
}

// Parameter `suffix` of block l: one [rows, columns] matrix, or a vector when columns is 0.
static void add_slice(struct builder *b, int l, size_t member, enum init init, const char *suffix,
                      int64_t rows, int64_t columns)
{
    char name[72];
    snprintf(name, sizeof name, "blocks.%d.%s", l, suffix);
    add_param(b, l, member, name, init, columns ? 2 : 1, (int64_t[]){rows, columns});
}

static void add_block_tensor(struct builder *b, int l, size_t member, enum init init,
                             const char *suffix, int64_t rows, int64_t columns)
{
    add_group(b, l, member, false, columns ? 2 : 1, rows, columns, 1);
    add_slice(b, l, member, init, suffix, rows, columns);
}
#define BLOCK(b, l, member, init, suffix, rows, columns)                                           \
    add_block_tensor(b, l, offsetof(struct block_weights, member), init, suffix, rows, columns)

static void add_attention(struct builder *b, int l)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, hd = D / c->heads;
    BLOCK(b, l, qkv_w, INIT_XAVIER, c->qk_norm ? "attn.Wqkv.weight" : "attn.qkv.weight", 3 * D, D);
    BLOCK(b, l, qkv_b, INIT_ZERO, c->qk_norm ? "attn.Wqkv.bias" : "attn.qkv.bias", 3 * D, 0);
    BLOCK(b, l, proj_w, INIT_XAVIER, c->qk_norm ? "attn.out_proj.weight" : "attn.proj.weight", D, D);
    BLOCK(b, l, proj_b, INIT_ZERO, c->qk_norm ? "attn.out_proj.bias" : "attn.proj.bias", D, 0);
    if (!c->qk_norm)
        return;
    BLOCK(b, l, q_norm_w, INIT_ONE, "attn.q_norm.weight", hd, 0);
    BLOCK(b, l, q_norm_b, INIT_ZERO, "attn.q_norm.bias", hd, 0);
    BLOCK(b, l, k_norm_w, INIT_ONE, "attn.k_norm.weight", hd, 0);
    BLOCK(b, l, k_norm_b, INIT_ZERO, "attn.k_norm.bias", hd, 0);
}

static bool held_here(const struct builder *b, int l, int e)
{
    return !b->place || placement_holds(b->place, b->rank, l, e, NULL);
}

// A slice that belongs to expert e (columns 0: a bias); one that another rank holds takes no room.
static void add_expert_slice(struct builder *b, int l, int e, size_t member, const char *what,
                             int64_t rows, int64_t columns)
{
    char suffix[48];
    const int64_t next = b->next;
    snprintf(suffix, sizeof suffix, "moe.experts.%d.%s.%s", e, what, columns ? "weight" : "bias");
    add_slice(b, l, member, columns ? INIT_XAVIER : INIT_ZERO, suffix, rows, columns);
    if (b->list)
        b->list[b->count - 1].expert = e;
    if (held_here(b, l, e))
        return;
    b->next = next;
    if (b->list)
        b->list[b->count - 1].start = PARAM_ELSEWHERE;
}

// A device tensor that is one slice of each expert.
static void add_expert_tensor(struct builder *b, int l, int held, size_t member, const char *what,
                              int64_t rows, int64_t columns)
{
    if (columns)
        add_group(b, l, member, false, 3, held, rows, columns);
    else
        add_group(b, l, member, false, 1, held * rows, 1, 1);
    for (int e = 0; e < b->config->experts; e++)
        add_expert_slice(b, l, e, member, what, rows, columns);
}

#define EXPERTS(b, l, held, member, what, rows, columns)                                           \
    add_expert_tensor(b, l, held, offsetof(struct block_weights, member), what, rows, columns)

static void add_swiglu_experts(struct builder *b, int l, int held)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, F = MLP_RATIO * D;
    const size_t gu = offsetof(struct block_weights, experts_gu);
    add_group(b, l, gu, false, 3, held, 2 * F, D);
    for (int e = 0; e < c->experts; e++) {
        add_expert_slice(b, l, e, gu, "gate_proj", F, D);
        add_expert_slice(b, l, e, gu, "up_proj", F, D);
    }
    EXPERTS(b, l, held, experts_down, "down_proj", D, F);
}

static void add_gelu_experts(struct builder *b, int l, int held)
{
    const int64_t D = b->config->hidden, F = MLP_RATIO * D;
    EXPERTS(b, l, held, experts_gu, "fc1", F, D);
    EXPERTS(b, l, held, experts_fc1_b, "fc1", F, 0);
    EXPERTS(b, l, held, experts_down, "fc2", D, F);
    EXPERTS(b, l, held, experts_fc2_b, "fc2", D, 0);
}

static void add_moe(struct builder *b, int l)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, Fs = D * c->shared;
    const int held = b->place ? placement_list(b->place, b->rank, l, NULL) : c->experts;

    BLOCK(b, l, gate_w, INIT_KAIMING, "moe.gate.weight", c->experts, D);
    if (c->expert == EXPERT_GELU)
        add_gelu_experts(b, l, held);
    else
        add_swiglu_experts(b, l, held);
    if (!c->shared)
        return;
    const size_t shared_gu = offsetof(struct block_weights, shared_gu);
    add_group(b, l, shared_gu, false, 2, 2 * Fs, D, 1);
    add_slice(b, l, shared_gu, INIT_XAVIER, "moe.shared_experts.gate_proj.weight", Fs, D);
    add_slice(b, l, shared_gu, INIT_XAVIER, "moe.shared_experts.up_proj.weight", Fs, D);
    BLOCK(b, l, shared_down, INIT_XAVIER, "moe.shared_experts.down_proj.weight", D, Fs);
}

static void add_block(struct builder *b, int l)
{
    const struct config *c = b->config;
    const int64_t D = c->hidden, F = MLP_RATIO * D;
    add_attention(b, l);
    if (config_is_moe(c, l)) {
        add_moe(b, l);
    } else {
        BLOCK(b, l, fc1_w, INIT_XAVIER, "mlp.fc1.weight", F, D);
        BLOCK(b, l, fc1_b, INIT_ZERO, "mlp.fc1.bias", F, 0);
        BLOCK(b, l, fc2_w, INIT_XAVIER, "mlp.fc2.weight", D, F);
        BLOCK(b, l, fc2_b, INIT_ZERO, "mlp.fc2.bias", D, 0);
    }
}

static void walk(struct builder *b)
{
    add_embedding(b);
    for (int l = 0; l < b->config->layers; l++)
        add_block(b, l);
    add_head(b);
    add_modulations(b, offsetof(struct weights, ada_w), "weight", b->config->hidden);
    add_modulations(b, offsetof(struct weights, ada_b), "bias", 0);
}

int params_new(const struct config *c, struct params *out)
{
    return params_new_part(c, NULL, 0, out);
}

int params_new_part(const struct config *c, const struct placement *place, int rank,
                    struct params *out)
{
    struct builder b = {.config = c, .place = place, .rank = rank};
    walk(&b); // counts
    *out = (struct params){.config = *c, .count = b.count, .group_count = b.group_count};
    out->list = calloc((size_t)b.count, sizeof *out->list);
    out->groups = calloc((size_t)b.group_count, sizeof *out->groups);
    if (!out->list || !out->groups) {
        params_free(out);
        return fail(ERR_NOMEM, "no host memory for a table of %d parameters", b.count);
    }
    b = (struct builder){
        .config = c, .place = place, .rank = rank, .list = out->list, .groups = out->groups};
    walk(&b);
    return 0;
}

void params_stream(struct params *p, int layer)
{
    for (int i = 0; i < p->group_count; i++) {
        struct group *g = &p->groups[i];
        if (g->block == layer && (g->member == offsetof(struct block_weights, experts_gu) ||
                                  g->member == offsetof(struct block_weights, experts_down)))
            g->streamed = true;
    }
}

void params_free(struct params *p)
{
    free(p->list);
    free(p->groups);
    *p = (struct params){0};
}

int64_t param_count(const struct param *p)
{
    int64_t n = 1;
    for (int i = 0; i < p->ndim; i++)
        n *= p->shape[i];
    return n;
}

const struct param *params_find(const struct params *p, const char *name)
{
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->list[i].name, name))
            return &p->list[i];
    return NULL;
}

// ---- device tensors -----------------------------------------------------------------------------

static struct tensor *member_of(struct weights *w, int block, size_t member)
{
    char *base = block < 0 ? (char *)w : (char *)&w->blocks[block];
    return (struct tensor *)(void *)(base + member);
}

struct tensor *param_tensor(struct weights *w, const struct param *p)
{
    return member_of(w, p->block, p->member);
}

static int new_blocks(struct weights *w, const struct params *p)
{
    w->blocks = calloc((size_t)p->config.layers, sizeof *w->blocks);
    return w->blocks ? 0 : fail(ERR_NOMEM, "no host memory for %d blocks", p->config.layers);
}

// Is a device tensor read by matrix products, which may want it as bf16?
static bool in_products(const struct group *g)
{
    const bool labels = g->block < 0 && g->member == offsetof(struct weights, labels);
    const bool router = g->block >= 0 && g->member == offsetof(struct block_weights, gate_w);
    return g->ndim > 1 && !g->frozen && !labels && !router;
}

static struct block_life life_of(const struct group *g, const struct params *p,
                                 const struct block_life *lives)
{
    const int layers = p->config.layers;
    if (!lives)
        return (struct block_life){0, PLAN_FOREVER};
    if (g->block >= 0)
        return lives[g->block];
    return lives[g->member == offsetof(struct weights, ada_w) ? layers : layers + 1];
}

static void shape_only(struct tensor *t, enum dtype type, const struct group *g)
{
    *t = (struct tensor){.dtype = type, .ndim = g->ndim};
    memcpy(t->shape, g->shape, sizeof g->shape);
}

// Declares the tensors that products read, or the others.
static int plan_groups(struct weights *w, const struct params *p, struct plan *plan, bool products,
                       enum plan_class class, enum dtype type, const struct block_life *lives)
{
    for (int i = 0; i < p->group_count; i++) {
        const struct group *g = &p->groups[i];
        const struct block_life life = life_of(g, p, lives);
        if (in_products(g) != products || (g->frozen && class != PLAN_WEIGHTS))
            continue;
        if (g->streamed) {
            shape_only(member_of(w, g->block, g->member), type, g);
            continue;
        }
        TRY(plan_tensor(plan, p->list[g->first].name, g->frozen ? PLAN_INPUT : class, type,
                        life.first, life.last, member_of(w, g->block, g->member), g->ndim,
                        g->shape));
    }
    return 0;
}

int weights_plan_passing(struct weights *w, const struct params *p, struct plan *plan,
                         enum plan_class class, const struct block_life *lives)
{
    TRY(new_blocks(w, p));
    TRY(plan_groups(w, p, plan, true, class, F32, lives));
    return plan_groups(w, p, plan, false, class, F32, lives);
}

int weights_plan(struct weights *w, const struct params *p, struct plan *plan, enum plan_class class)
{
    return weights_plan_passing(w, p, plan, class, NULL);
}

int weights_plan_half(struct weights *w, struct weights *low, const struct params *p,
                      struct plan *plan)
{
    TRY(new_blocks(w, p));
    TRY(plan_groups(w, p, plan, true, PLAN_HALF, BF16, NULL));
    TRY(plan_groups(w, p, plan, false, PLAN_WEIGHTS, F32, NULL));
    if (!low)
        return 0;
    TRY(new_blocks(low, p));
    TRY(plan_groups(low, p, plan, true, PLAN_LOW, BF16, NULL));
    for (int i = 0; i < p->group_count; i++) {
        const struct group *g = &p->groups[i];
        if (in_products(g))
            member_of(w, g->block, g->member)->low = member_of(low, g->block, g->member);
    }
    return 0;
}

void weights_free(struct weights *w)
{
    free(w->blocks);
    w->blocks = NULL;
}

// ---- host transfers -----------------------------------------------------------------------------

// Of a tensor at home in host memory, there, as soon as the device has put there what it was to put.
static int write_at(struct context *c, const struct tensor *t, int64_t start, const void *host,
                    int64_t count)
{
    const size_t size = dtype_size(t->dtype);
    if (!t->home)
        return c->dev->api->write(c->stream, t->mem, (size_t)start * size, host,
                                  (size_t)count * size);
    TRY(c->dev->api->sync(c->stream));
    memcpy(t->home->at + (size_t)start * size, host, (size_t)count * size);
    return 0;
}

static int read_at(struct context *c, const struct tensor *t, int64_t start, void *host,
                   int64_t count)
{
    const size_t size = dtype_size(t->dtype);
    if (!t->home)
        return c->dev->api->read(c->stream, t->mem, (size_t)start * size, host,
                                 (size_t)count * size);
    TRY(c->dev->api->sync(c->stream));
    memcpy(host, t->home->at + (size_t)start * size, (size_t)count * size);
    return 0;
}

// The nearest bf16, of two the even one, as the device rounds (op_round). NaN stays one.
static uint16_t nearest_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(isnan(value) ? bits >> 16 | 0x40u
                                   : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// An f32 as its nearest bf16 and what is left (struct tensor). NaN stays one.
static void split(float value, uint16_t *high, uint16_t *low)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = isnan(value) ? bits >> 16 : (bits + 0x8000u) >> 16;
    *high = (uint16_t)nearest;
    *low = (uint16_t)(bits - (nearest << 16));
}

static float join(uint16_t high, uint16_t low)
{
    const uint32_t bits = ((uint32_t)high << 16) + (uint32_t)(int16_t)low;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int halves_write(struct context *c, const struct tensor *t, int64_t start, int64_t count,
                        const float *host, uint16_t *high, uint16_t *low)
{
    for (int64_t i = 0; i < count && t->low; i++)
        split(host[i], &high[i], &low[i]);
    for (int64_t i = 0; i < count && !t->low; i++)
        high[i] = nearest_bf16(host[i]);
    TRY(write_at(c, t, start, high, count));
    return t->low ? write_at(c, t->low, start, low, count) : 0;
}

static int halves_read(struct context *c, const struct tensor *t, int64_t start, int64_t count,
                       float *host, uint16_t *high, uint16_t *low)
{
    TRY(read_at(c, t, start, high, count));
    if (t->low)
        TRY(read_at(c, t->low, start, low, count));
    for (int64_t i = 0; i < count; i++)
        host[i] = join(high[i], t->low ? low[i] : 0);
    return 0;
}

static int new_halves(int64_t count, uint16_t **high, uint16_t **low)
{
    *high = malloc((size_t)count * 2 * sizeof **high);
    if (!*high)
        return fail(ERR_NOMEM, "no host memory for %lld weights", (long long)count);
    *low = *high + count;
    return 0;
}

// [count] elements of t from `start` on, as f32.
static int write_floats(struct context *c, const struct tensor *t, int64_t start, int64_t count,
                        const float *host)
{
    uint16_t *high = NULL, *low = NULL;
    tensor_changed(t);
    if (t->dtype == F32)
        return write_at(c, t, start, host, count);
    TRY(new_halves(count, &high, &low));
    int code = halves_write(c, t, start, count, host, high, low);
    free(high);
    return code;
}

static int read_floats(struct context *c, const struct tensor *t, int64_t start, int64_t count,
                       float *host)
{
    uint16_t *high = NULL, *low = NULL;
    if (t->dtype == F32)
        return read_at(c, t, start, host, count);
    TRY(new_halves(count, &high, &low));
    int code = halves_read(c, t, start, count, host, high, low);
    free(high);
    return code;
}

int param_write(struct context *c, struct weights *w, const struct param *p, const float *host)
{
    return write_floats(c, param_tensor(w, p), p->start, param_count(p), host);
}

int param_write_bf16(struct context *c, struct weights *w, const struct param *p,
                     const uint16_t *host)
{
    const struct tensor *t = param_tensor(w, p);
    BUG_IF(t->dtype != BF16 || t->low);
    tensor_changed(t);
    return write_at(c, t, p->start, host, param_count(p));
}

int param_read(struct context *c, struct weights *w, const struct param *p, float *host)
{
    return read_floats(c, param_tensor(w, p), p->start, param_count(p), host);
}

// By the host, where one of the two lives there.
static int copy_floats(struct context *c, struct tensor *to, const struct tensor *from)
{
    enum { PART = 1 << 20 };
    const int64_t all = tensor_count(to);
    float *host = malloc(PART * sizeof *host);
    int code = host ? 0 : fail(ERR_NOMEM, "no host memory for %d weights", PART);
    for (int64_t at = 0; at < all && code >= 0; at += PART) {
        const int64_t count = all - at < PART ? all - at : PART;
        code = read_floats(c, from, at, count, host);
        if (code >= 0)
            code = write_floats(c, to, at, count, host);
    }
    free(host);
    return code;
}

int weight_copy(struct context *c, struct tensor *to, const struct tensor *from)
{
    BUG_IF(to->low && !from->low);
    if (to->home || from->home)
        return copy_floats(c, to, from);
    tensor_changed(to);
    if (to->low)
        TRY(tensor_copy(c, to->low, from->low));
    if (to->dtype == from->dtype)
        return tensor_copy(c, to, from);
    return to->dtype == F32 ? op_widen(c, to, from, from->low) : op_round(c, to, NULL, from);
}

// ---- initial values -----------------------------------------------------------------------------

// 2-D sin-cos table (He et al. 2022, appendix; as in DiT): the first half of the features encodes
// the column, the second the row; each half is sin then cos of position * 10000^(-i/(D/4)).
static void init_position(const struct param *p, float *host)
{
    const int64_t T = p->shape[1], D = p->shape[2], quarter = D / 4;
    const int64_t side = (int64_t)lround(sqrt((double)T));
    for (int64_t token = 0; token < T; token++)
        for (int64_t i = 0; i < quarter; i++) {
            double omega = pow(10000.0, -(double)i / (double)quarter);
            double x = (double)(token % side) * omega, y = (double)(token / side) * omega;
            float *row = host + token * D;
            row[i] = (float)sin(x), row[quarter + i] = (float)cos(x);
            row[2 * quarter + i] = (float)sin(y), row[3 * quarter + i] = (float)cos(y);
        }
}

void param_init(const struct params *all, const struct param *p, uint64_t seed, float *host)
{
    const int64_t n = param_count(p);
    const int64_t rows = p->shape[0], columns = p->ndim > 1 ? n / rows : 1;
    const uint64_t stream = rng_stream(RNG_INIT, (uint64_t)(p - all->list));
    float bound = 0;
    switch (p->init) {
    case INIT_POSITION:
        init_position(p, host);
        return;
    case INIT_ZERO:
    case INIT_ONE:
        for (int64_t i = 0; i < n; i++)
            host[i] = p->init == INIT_ONE;
        return;
    case INIT_NORMAL:
        rng_normal_fill(seed, stream, 0, host, (size_t)n);
        for (int64_t i = 0; i < n; i++)
            host[i] *= 0.02f;
        return;
    case INIT_XAVIER:
        bound = sqrtf(6.0f / (float)(rows + columns));
        break;
    case INIT_KAIMING:
        bound = 1.0f / sqrtf((float)columns);
        break;
    }
    for (int64_t i = 0; i < n; i++)
        host[i] = bound * (2.0f * rng_uniform(seed, stream, (uint64_t)i) - 1.0f);
}
