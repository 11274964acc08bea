// Attention through the tuned kernels: which instance of attention_list.h takes a shape.
#include "devices/cuda_attention.h"

#include "devices/attention_list.h"

// accelerate()'s arguments (device.h), by place
enum { FWD_O, FWD_LSE, FWD_QKV, FWD_HEADS, FWD_TOKENS, FWD_HD, FWD_SCALE, FWD_WANTED, FWD_ALL };
enum {
    BWD_DQKV,
    BWD_DELTA,
    BWD_DOUT,
    BWD_O,
    BWD_LSE,
    BWD_QKV,
    BWD_IMAGES,
    BWD_HEADS,
    BWD_TOKENS,
    BWD_HD,
    BWD_SCALE
};

struct forward_kernel {
    const char *name, *norm; // norm: with the LayerNorm of q and k within, or NULL
    enum cuda_image image;
    int width, queries, resident;
    unsigned threads, shared, norm_shared;
};

// Of one width and as many queries, the most wanted first.
static const struct forward_kernel forward_kernels[] = {
#define FORWARD_SM90(width, queries, groups, stages, resident)     \
    {"attention_fwd_sm90_" #width "_" #queries,                    \
     "attention_fwd_sm90_norm_" #width "_" #queries,               \
     IMAGE_attention_sm90,                                         \
     width,                                                        \
     queries,                                                      \
     resident,                                                     \
     128 * (groups),                                               \
     ATTENTION_FORWARD_SM90_SHARED(width, queries, stages, false), \
     ATTENTION_FORWARD_SM90_SHARED(width, queries, stages, true)},
#define FORWARD(width, queries, warps, tiles, keys, stages, resident) \
    {"attention_fwd_" #width "_" #queries,                            \
     NULL,                                                            \
     IMAGE_attention,                                                 \
     width,                                                           \
     queries,                                                         \
     resident,                                                        \
     32 * (warps),                                                    \
     ATTENTION_FORWARD_SHARED(width, queries, keys, stages),          \
     0},
    ATTENTION_FORWARD_SM90(FORWARD_SM90) ATTENTION_FORWARD(FORWARD)
        ATTENTION_FORWARD_SM90_WIDE(FORWARD_SM90)
#undef FORWARD
#undef FORWARD_SM90
};

enum { whole = 1, part = 0 };
struct backward_kernel {
    const char *name;
    enum cuda_image image;
    int width, keys, tokens; // tokens: from how many on it is the best
    bool is_whole;
    unsigned shared;
};

// Of one width, the most wanted first.
static const struct backward_kernel backward_kernels[] = {
#define BACKWARD(width, sub)                                                            \
    {"attention_bwd_sm90_" #width,         IMAGE_attention_sm90, width, 256, 129, true, \
     ATTENTION_BACKWARD_SM90_SHARED(width)},
    ATTENTION_BACKWARD_SM90(BACKWARD)
#undef BACKWARD
#define BACKWARD(width, keys, which, tiles, sub, stages)       \
    {"attention_bwd_" #width "_" #keys "_" #which "_" #stages, \
     IMAGE_attention,                                          \
     width,                                                    \
     keys,                                                     \
     0,                                                        \
     which,                                                    \
     ATTENTION_BACKWARD_SHARED(width, keys, stages, which)},
        ATTENTION_BACKWARD(BACKWARD)
#undef BACKWARD
};

struct backward_q_kernel {
    const char *name;
    int width, queries;
    unsigned shared;
};

static const struct backward_q_kernel backward_q_kernels[] = {
#define BACKWARD_Q(width, tiles, keys)               \
    {"attention_bwd_q_" #width, width, 64 * (tiles), \
     ATTENTION_BACKWARD_Q_SHARED(width, tiles, keys)},
    ATTENTION_BACKWARD_Q(BACKWARD_Q)
#undef BACKWARD_Q
};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

static int cover(int count, int size)
{
    return (count + size - 1) / size;
}

// The narrowest width of the kernels that holds a head.
static int width_for(int hd)
{
    return hd <= 64 ? 64 : hd <= 72 ? 72 : hd <= 88 ? 88 : ATTENTION_WIDTH_MAX;
}

// Rows are copied 16 bytes at a time.
static bool suits(struct stream *s, struct mem *const *buffers, int count, int hd)
{
    if (s->dev->base.act != BF16 || hd % 8 || hd > ATTENTION_WIDTH_MAX)
        return false;
    for (int i = 0; i < count; i++)
        if (buffers[i] && buffers[i]->address % 16)
            return false;
    return true;
}

struct forward {
    cuda_address o, lse, qkv,
        parameters[4];          // parameters: wq, bq, wk, bk; 0: no LayerNorm of q and k
    int all, heads, tokens, hd; // all: images * heads
    float scale;
};

// The most queries a block that still leave every multiprocessor full; else the fewest.
static const struct forward_kernel *choose_forward(struct stream *s, const struct forward *f,
                                                   cuda_function *function)
{
    const bool norm = f->parameters[0] != 0;
    const struct forward_kernel *best = NULL;
    for (int i = 0; i < COUNT(forward_kernels); i++) {
        const struct forward_kernel *k = &forward_kernels[i];
        const char *name = norm ? k->norm : k->name;
        if (!name || k->width != width_for(f->hd) || (best && k->queries >= best->queries))
            continue;
        if (k->image == IMAGE_attention_sm90 && !s->dev->api->tensor_map)
            continue;
        cuda_function found = cuda_tuned(s->dev, k->image, name, norm ? k->norm_shared : k->shared);
        if (!found)
            continue;
        best = k;
        *function = found;
        if ((int64_t)f->all * cover(f->tokens, k->queries) >=
            (int64_t)s->dev->base.info.compute_units * k->resident)
            break;
    }
    return best;
}

// As attention_forward_sm90.cuh has it.
struct maps {
    struct cuda_map first, later;
};

static int describe(struct stream *s, const struct forward *f, struct maps *maps)
{
    const int sizes[] = {f->hd, 3 * f->heads, f->tokens, f->all / f->heads};
    const int64_t row = (int64_t)3 * f->heads * f->hd, pitches[] = {f->hd, row, row * f->tokens};
    TRY(cuda_tuned_map(s->dev, &maps->first, f->qkv, 4, sizes, pitches, (int[]){64, 1, 64, 1},
                       true));
    return cuda_tuned_map(s->dev, &maps->later, f->qkv, 4, sizes, pitches, (int[]){8, 1, 64, 1},
                          false);
}

static int forward(struct stream *s, struct forward *f)
{
    cuda_function function = NULL;
    const struct forward_kernel *kernel = choose_forward(s, f, &function);
    if (!kernel)
        return NOT_MINE;
    int units = f->all * cover(f->tokens, kernel->queries);
    int places = s->dev->base.info.compute_units * kernel->resident;
    cuda_address *w = f->parameters;
    struct maps maps;
    void *values[] = {&maps,      &f->o,  &f->lse,   &f->qkv, &units, &f->heads,
                      &f->tokens, &f->hd, &f->scale, &w[0],   &w[1],  &w[2],    &w[3]};
    const bool mapped = kernel->image == IMAGE_attention_sm90; // the others have no such argument
    if (mapped)
        TRY(describe(s, f, &maps));
    const unsigned grid[3] = {(unsigned)(units < places ? units : places), 1, 1};
    return cuda_tuned_launch(s, function, grid, kernel->threads,
                             w[0] ? kernel->norm_shared : kernel->shared,
                             mapped ? values : values + 1);
}

int cuda_attention_fwd(struct stream *s, const union arg *args)
{
    struct mem *const buffers[] = {args[FWD_O].b, args[FWD_LSE].b, args[FWD_QKV].b};
    struct forward f = {.o = args[FWD_O].b->address,
                        .lse = args[FWD_WANTED].i ? args[FWD_LSE].b->address : 0,
                        .qkv = args[FWD_QKV].b->address,
                        .all = args[FWD_ALL].i,
                        .heads = args[FWD_HEADS].i,
                        .tokens = args[FWD_TOKENS].i,
                        .hd = args[FWD_HD].i,
                        .scale = args[FWD_SCALE].f};
    return suits(s, buffers, COUNT(buffers), f.hd) ? forward(s, &f) : NOT_MINE;
}

int cuda_qk_attention_fwd(struct stream *s, const struct qk_attention *a)
{
    struct mem *const buffers[] = {a->o, a->qkv};
    struct forward f = {
        .o = a->o->address,
        .lse = a->lse ? a->lse->address : 0,
        .qkv = a->qkv->address,
        .parameters = {a->wq->address, a->bq->address, a->wk->address, a->bk->address},
        .all = a->images * a->heads,
        .heads = a->heads,
        .tokens = a->tokens,
        .hd = a->head,
        .scale = a->scale};
    return suits(s, buffers, COUNT(buffers), f.hd) ? forward(s, &f) : NOT_MINE;
}

// The first kernel for the shape that this device has, and its function.
static const struct backward_kernel *choose_backward(struct stream *s, int tokens, int hd,
                                                     cuda_function *function)
{
    for (int i = 0; i < COUNT(backward_kernels); i++) {
        const struct backward_kernel *k = &backward_kernels[i];
        if (k->width != width_for(hd) || tokens < k->tokens || (k->is_whole && tokens > k->keys))
            continue;
        *function = cuda_tuned(s->dev, k->image, k->name, k->shared);
        if (*function)
            return k;
    }
    return NULL;
}

static const struct backward_q_kernel *backward_q(int width)
{
    for (int i = 0; i < COUNT(backward_q_kernels); i++)
        if (backward_q_kernels[i].width == width)
            return &backward_q_kernels[i];
    return NULL;
}

int cuda_attention_bwd(struct stream *s, const union arg *args)
{
    int images = args[BWD_IMAGES].i, heads = args[BWD_HEADS].i, tokens = args[BWD_TOKENS].i;
    int hd = args[BWD_HD].i, units = s->dev->base.info.compute_units;
    struct mem *memories[BWD_IMAGES];
    for (int i = 0; i < BWD_IMAGES; i++)
        memories[i] = args[i].b;
    if (!suits(s, memories, BWD_IMAGES, hd))
        return NOT_MINE;
    cuda_function function = NULL;
    const struct backward_kernel *kernel = choose_backward(s, tokens, hd, &function);
    if (!kernel)
        return NOT_MINE;
    cuda_address buffers[BWD_IMAGES];
    float scale = args[BWD_SCALE].f;
    void *values[BWD_SCALE + 1] = {[BWD_IMAGES] = &images,
                                   [BWD_HEADS] = &heads,
                                   [BWD_TOKENS] = &tokens,
                                   [BWD_HD] = &hd,
                                   [BWD_SCALE] = &scale};
    for (int i = 0; i < BWD_IMAGES; i++) {
        buffers[i] = memories[i]->address;
        values[i] = &buffers[i];
    }
    int all = images * heads, blocks = all;
    if (!kernel->is_whole) {
        const struct backward_q_kernel *q = backward_q(kernel->width);
        cuda_function first = cuda_tuned(s->dev, IMAGE_attention, q->name, q->shared);
        if (!first)
            return NOT_MINE;
        const unsigned grid[3] = {(unsigned)(all * cover(tokens, q->queries)), 1, 1};
        TRY(cuda_tuned_launch(s, first, grid, ATTENTION_BACKWARD_Q_THREADS, q->shared, values));
        blocks = all * cover(tokens, kernel->keys);
    }
    const unsigned grid[3] = {(unsigned)(blocks < units ? blocks : units), 1, 1};
    return cuda_tuned_launch(s, function, grid, ATTENTION_BACKWARD_THREADS, kernel->shared, values);
}
