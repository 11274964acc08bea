#include "runtime/profile.h"

#include "devices/accelerate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    BUFFERS_MAX = 32,
    HEAD_START_BYTES = 256 << 20, // filled HEAD_START times: some 10 ms of a fast GPU
    HEAD_START = 100,
};

static const struct backend *api_of(const struct profile *p)
{
    return p->c->dev->api;
}

int profile_new(struct context *c, struct profile **out)
{
    *out = calloc(1, sizeof **out);
    if (!*out)
        return fail(ERR_NOMEM, "out of host memory for a profile");
    (*out)->c = c;
    (*out)->layer = -1;
    return 0;
}

void profile_free(struct profile *p)
{
    if (!p)
        return;
    if (p->c->profile == p)
        p->c->profile = NULL;
    for (int i = 0; i < 2 * p->room; i++)
        api_of(p)->event_free(p->events[i]);
    free(p->events);
    free(p->list);
    free(p);
}

// ---- starting and stopping ----------------------------------------------------------------------

// Work in front of the first operation. Without memory for it the times are less exact, no more.
static int head_start(struct profile *p)
{
    const struct backend *api = api_of(p);
    struct mem *mem;
    if (p->c->dev->info.kind != DEVICE_GPU ||
        p->c->dev->info.memory < p->c->dev->allocated + 2 * (uint64_t)HEAD_START_BYTES ||
        api->alloc(p->c->dev, HEAD_START_BYTES, &mem) < 0)
        return 0;
    int code = 0;
    for (int i = 0; i < HEAD_START && code >= 0; i++)
        code = api->fill(p->c->stream, mem, 0, HEAD_START_BYTES, 0x3f800000);
    // freeing waits for the device on some backends: the memory goes when it is idle
    p->busy = mem;
    return code;
}

// The time between two events with nothing between them.
static int measure_events(struct profile *p)
{
    enum { TIMES = 5 };
    p->event_seconds = 0;
    for (int i = 0; i < TIMES; i++) {
        double seconds;
        TRY(profile_begin(p));
        TRY(profile_end(p, "", NULL, 0, 0));
        TRY(api_of(p)->sync(p->c->stream));
        TRY(api_of(p)->elapsed(p->events[0], p->events[1], &seconds));
        if (i == 0 || seconds < p->event_seconds)
            p->event_seconds = seconds;
        p->count = 0;
    }
    return 0;
}

int profile_start(struct profile *p)
{
    p->count = 0;
    p->layer = -1;
    TRY(measure_events(p));
    TRY(head_start(p));
    p->c->profile = p;
    return 0;
}

int profile_stop(struct profile *p)
{
    const struct backend *api = api_of(p);
    p->c->profile = NULL;
    int code = api->sync(p->c->stream);
    api->free(p->busy);
    p->busy = NULL;
    TRY(code);
    for (int i = 0; i < p->count; i++) {
        struct profile_op *op = &p->list[i];
        TRY(api->elapsed(p->events[0], p->events[2 * i], &op->start));
        TRY(api->elapsed(p->events[2 * i], p->events[2 * i + 1], &op->seconds));
        p->span = op->start + op->seconds;
    }
    return 0;
}

// ---- around an operation ------------------------------------------------------------------------

static int make_room(struct profile *p)
{
    const int room = p->room ? 2 * p->room : 512;
    if (p->count < p->room)
        return 0;
    struct profile_op *list = realloc(p->list, sizeof *list * (size_t)room);
    if (list)
        p->list = list;
    struct event **events = realloc(p->events, sizeof *events * 2 * (size_t)room);
    if (events)
        p->events = events;
    if (!list || !events)
        return fail(ERR_NOMEM, "out of host memory for a profile of %d operations", room);
    memset(p->events + 2 * p->room, 0, sizeof *events * 2 * (size_t)(room - p->room));
    for (int i = 2 * p->room; i < 2 * room; i++)
        TRY(api_of(p)->event_new(p->c->dev, &p->events[i]));
    p->room = room;
    return 0;
}

int profile_begin(struct profile *p)
{
    TRY(make_room(p));
    return api_of(p)->record(p->c->stream, p->events[2 * p->count]);
}

int profile_end(struct profile *p, const char *name, const struct mem *const *mems, int count,
                double flops)
{
    struct profile_op *op = &p->list[p->count];
    TRY(api_of(p)->record(p->c->stream, p->events[2 * p->count + 1]));
    *op = (struct profile_op){.layer = p->layer, .flops = flops};
    snprintf(op->name, sizeof op->name, "%s", name);
    for (int i = 0; i < count; i++) {
        bool counted = !mems[i] || mems[i] == p->c->space.mem;
        for (int k = 0; k < i && !counted; k++)
            counted = mems[k] == mems[i];
        op->bytes += counted ? 0 : (double)api_of(p)->size(mems[i]);
    }
    p->count++;
    return 0;
}

// Of an attention kernel over `elements` elements of q: multiply-adds twice, of the products that
// the mathematics needs (two forward; five backward, three of them for the gradients of k and v).
static double attention_flops(enum kernel kernel, double elements, double tokens)
{
    switch (kernel) {
    case KERNEL_attention_fwd:
    case KERNEL_attention_wide_fwd:
    case KERNEL_attention_fwd_cpu:
        return 4 * elements * tokens;
    case KERNEL_attention_bwd_cpu:
        return 10 * elements / 3 * tokens;
    case KERNEL_attention_bwd_kv:
        return 6 * elements / 3 * tokens;
    case KERNEL_attention_bwd_q:
        return 4 * elements / 3 * tokens;
    default:
        return 0;
    }
}

int profile_end_kernel(struct profile *p, enum kernel kernel, const union arg *args)
{
    const struct kernel_spec *spec = &kernel_specs[kernel];
    const struct mem *mems[BUFFERS_MAX];
    int count = 0, numbers = 0;
    double tokens = 0, elements = 0;
    for (int i = 0; spec->args[i]; i++) {
        if (spec->args[i] == 'b' && count < BUFFERS_MAX)
            mems[count++] = args[i].b;
        else if (spec->args[i] == 'i' && ++numbers == 2) // of attention: heads, tokens, head size
            tokens = args[i].i;
    }
    if (count > 0 && mems[0])
        elements = (double)(api_of(p)->size(mems[0]) / dtype_size(p->c->dev->act));
    return profile_end(p, spec->name, mems, count, attention_flops(kernel, elements, tokens));
}

int profile_end_gemm(struct profile *p, const struct gemm *g)
{
    static const char *const ragged[] = {"", " ragged", " ragged-k"};
    static const char *const swiglu[] = {"", " +swiglu", " +swiglu'"};
    const double m = g->m, n = g->n, k = g->k;
    const double c_columns = g->swiglu == SWIGLU_BACKWARD ? 2 * n : n;
    const double matrices = g->ragged == GEMM_PLAIN ? 1 : g->groups;
    char name[sizeof p->list->name];
    snprintf(name, sizeof name, "gemm%s %c%c %dx%dx%d%s%s%s", ragged[g->ragged],
             g->trans_a ? 't' : 'n', g->trans_b ? 't' : 'n', g->m, g->n, g->k, swiglu[g->swiglu],
             g->bias ? " +bias" : "", g->accumulate ? " +=" : "");
    TRY(profile_end(p, name, NULL, 0, 2 * m * n * k));
    p->list[p->count - 1].bytes =
        m * k * (double)dtype_size(g->type_a) +
        k * n * (g->ragged == GEMM_RAGGED_M ? matrices : 1) * (double)dtype_size(g->type_b) +
        (g->c ? m * c_columns : 0) * (g->ragged == GEMM_RAGGED_K ? matrices : 1) *
            (double)dtype_size(g->type_c) +
        (g->h ? m * n * (g->swiglu == SWIGLU_FORWARD ? 0.5 : 1) : 0) *
            (double)dtype_size(g->type_c);
    return 0;
}

// Of a convolution as published, doubled or not; and its name, by which the like are told apart.
static double conv_flops(const struct convolution *a, char *name, size_t size)
{
    const double pixels = (double)a->images * a->out_height * a->out_width;
    snprintf(name, size, "conv %dx%d%s %.0fx%dx%d", a->kernel_h, a->kernel_w,
             a->doubled      ? " doubled"
             : a->stride > 1 ? " strided"
                             : "",
             pixels, a->out, a->channels);
    return 2 * pixels * a->out * a->kernel_h * a->kernel_w * a->channels;
}

const char *accelerated_name(enum accelerated op)
{
    static const char *const names[ACCELERATE_COUNT] = {
        [ACCELERATE_ATTENTION_FWD] = "attention_fwd",
        [ACCELERATE_ATTENTION_BWD] = "attention_bwd",
        [ACCELERATE_NORM_FWD] = "residual, norm_fwd",
        [ACCELERATE_NORM_BWD] = "residual, norm_bwd",
        [ACCELERATE_DISPATCH_FWD] = "dispatch_fwd",
        [ACCELERATE_COMBINE_BWD] = "combine_bwd",
        [ACCELERATE_QK_NORM_FWD] = "qk_norm_fwd",
        [ACCELERATE_QK_NORM_BWD] = "qk_norm_bwd",
        [ACCELERATE_QK_ATTENTION_FWD] = "qk_norm, attention_fwd",
        [ACCELERATE_COLUMN_SUMS] = "column_sums",
        [ACCELERATE_ROUTER_DW] = "router_dw",
        [ACCELERATE_ROUTE] = "route",
        [ACCELERATE_NORM2] = "norm2",
        [ACCELERATE_ADAMW] = "adamw",
        [ACCELERATE_CONV2D] = "conv2d",
        [ACCELERATE_GROUP_NORM] = "group_norm",
        [ACCELERATE_PEER_ROWS] = "peer_rows",
        [ACCELERATE_POOL] = "pool",
    };
    return names[op];
}

int profile_end_accelerated(struct profile *p, enum accelerated op, const void *args,
                            const struct tensor *const *operands, int count)
{
    const struct mem *mems[BUFFERS_MAX];
    const union arg *list = args;
    char name[sizeof p->list->name];
    double flops = 0;
    int used = 0;
    for (int i = 0; i < count && used < BUFFERS_MAX; i++)
        if (operands[i])
            mems[used++] = operands[i]->mem;
    if (op == ACCELERATE_ATTENTION_FWD) // list[4]: tokens
        flops = attention_flops(KERNEL_attention_fwd, (double)tensor_count(operands[0]), list[4].i);
    if (op == ACCELERATE_QK_ATTENTION_FWD)
        flops = attention_flops(KERNEL_attention_fwd, (double)tensor_count(operands[0]),
                                ((const struct qk_attention *)args)->tokens);
    if (op == ACCELERATE_ATTENTION_BWD)
        flops =
            attention_flops(KERNEL_attention_bwd_cpu, (double)tensor_count(operands[0]), list[8].i);
    snprintf(name, sizeof name, "%s (tuned)", accelerated_name(op) ? accelerated_name(op) : "?");
    if (op == ACCELERATE_CONV2D)
        flops = conv_flops(args, name, sizeof name);
    TRY(profile_end(p, name, mems, used, flops));
    if (op == ACCELERATE_ADAMW) // all but g and control are written too
        p->list[p->count - 1].bytes = 2 * p->list[p->count - 1].bytes -
                                      (double)tensor_bytes(operands[4]) -
                                      (double)tensor_bytes(operands[5]);
    return 0;
}
