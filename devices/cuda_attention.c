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
    const char *name;
    int width, queries, resident;
    unsigned threads, shared;
};

static const struct forward_kernel forward_kernels[] = {
#define FORWARD(width, queries, warps, tiles, keys, stages, resident) \
    {"attention_fwd_" #width "_" #queries,                            \
     width,                                                           \
     queries,                                                         \
     resident,                                                        \
     32 * (warps),                                                    \
     ATTENTION_FORWARD_SHARED(width, queries, keys, stages)},
    ATTENTION_FORWARD(FORWARD)
#undef FORWARD
};

enum { whole = 1, part = 0 };
struct backward_kernel {
    const char *name;
    int width, keys;
    bool is_whole;
    unsigned shared;
};

static const struct backward_kernel backward_kernels[] = {
#define BACKWARD(width, keys, which, tiles, sub, stages)                           \
    {"attention_bwd_" #width "_" #keys "_" #which "_" #stages, width, keys, which, \
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

// Rows are copied 16 bytes at a time.
static bool suits(struct stream *s, const union arg *args, int buffers, int hd)
{
    if (s->dev->base.act != BF16 || hd % 8 || hd > ATTENTION_WIDTH_MAX)
        return false;
    for (int i = 0; i < buffers; i++)
        if (args[i].b && args[i].b->address % 16)
            return false;
    return true;
}

// The narrowest kernel; of these, more queries a block where that still leaves every multiprocessor full.
static const struct forward_kernel *choose_forward(struct stream *s, int heads, int tokens, int hd)
{
    int units = s->dev->base.info.compute_units;
    const struct forward_kernel *best = NULL;
    for (int i = 0; i < COUNT(forward_kernels); i++) {
        const struct forward_kernel *k = &forward_kernels[i];
        if (k->width < hd || (best && k->width > best->width))
            continue;
        best = k;
        if ((int64_t)heads * cover(tokens, k->queries) >= (int64_t)units * k->resident)
            break;
    }
    return best;
}

int cuda_attention_fwd(struct stream *s, const union arg *args)
{
    int heads = args[FWD_HEADS].i, tokens = args[FWD_TOKENS].i, hd = args[FWD_HD].i;
    if (!suits(s, args, FWD_HEADS, hd))
        return NOT_MINE;
    const struct forward_kernel *kernel = choose_forward(s, args[FWD_ALL].i, tokens, hd);
    cuda_function function = cuda_tuned(s->dev, IMAGE_attention, kernel->name, kernel->shared);
    if (!function)
        return NOT_MINE;
    cuda_address o = args[FWD_O].b->address, qkv = args[FWD_QKV].b->address;
    cuda_address lse = args[FWD_WANTED].i ? args[FWD_LSE].b->address : 0;
    float scale = args[FWD_SCALE].f;
    int units = args[FWD_ALL].i * cover(tokens, kernel->queries);
    int places = s->dev->base.info.compute_units * kernel->resident;
    void *values[] = {&o, &lse, &qkv, &units, &heads, &tokens, &hd, &scale};
    const unsigned grid[3] = {(unsigned)(units < places ? units : places), 1, 1};
    return cuda_tuned_launch(s, function, grid, kernel->threads, kernel->shared, values);
}

// The first kernel for the shape whose shared memory this device has, and its function.
static const struct backward_kernel *choose_backward(struct stream *s, int tokens, int hd,
                                                     cuda_function *function)
{
    int width = 0;
    for (int i = 0; i < COUNT(backward_kernels); i++) {
        const struct backward_kernel *k = &backward_kernels[i];
        if (k->width < hd || (width && k->width != width) || (k->is_whole && tokens > k->keys))
            continue;
        width = k->width;
        *function = cuda_tuned(s->dev, IMAGE_attention, k->name, k->shared);
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
    if (!suits(s, args, BWD_IMAGES, hd))
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
        buffers[i] = args[i].b->address;
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
