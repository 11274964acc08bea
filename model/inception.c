// The network as a list of operations, from a table of its blocks; see inception.h.
#include "model/inception.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/ops.h"

// ---- the table ----------------------------------------------------------------------------------
//
// A block's steps read and write its input, its output, and two places for what lies between.
// What goes to the output is put beside what is there.

enum place { IN, OUT, A, B, PLACES };
enum kind { END, CONVOLVE, MAXIMUM, AVERAGE };

struct step {
    enum kind kind;
    const char *name;
    int width; // channels that a convolution makes, as published; 0: the block's own
    enum place from, to;
    int kernel_h, kernel_w, stride, pad_h, pad_w;
};

#define CONV(name, width, from, to, kh, kw, stride, ph, pw)     \
    {                                                           \
        CONVOLVE, name, width, from, to, kh, kw, stride, ph, pw \
    }
#define CONV_1X1(name, width, from, to) CONV(name, width, from, to, 1, 1, 1, 0, 0)
#define CONV_3X3(name, width, from, to) CONV(name, width, from, to, 3, 3, 1, 1, 1)
#define CONV_HALVE(name, width, from, to) CONV(name, width, from, to, 3, 3, 2, 0, 0)
#define CONV_1X7(name, width, from, to) CONV(name, width, from, to, 1, 7, 1, 0, 3)
#define CONV_7X1(name, width, from, to) CONV(name, width, from, to, 7, 1, 1, 3, 0)
#define CONV_1X3(name, width, from, to) CONV(name, width, from, to, 1, 3, 1, 0, 1)
#define CONV_3X1(name, width, from, to) CONV(name, width, from, to, 3, 1, 1, 1, 0)
#define MAX_HALVE(from, to)                     \
    {                                           \
        MAXIMUM, "", 0, from, to, 3, 3, 2, 0, 0 \
    }
#define POOL_3X3(kind, from, to)             \
    {                                        \
        kind, "", 0, from, to, 3, 3, 1, 1, 1 \
    }

static const struct step stem[] = {
    CONV_HALVE("Conv2d_1a_3x3", 32, IN, A),
    CONV("Conv2d_2a_3x3", 32, A, B, 3, 3, 1, 0, 0),
    CONV_3X3("Conv2d_2b_3x3", 64, B, A),
    MAX_HALVE(A, B),
    CONV_1X1("Conv2d_3b_1x1", 80, B, A),
    CONV("Conv2d_4a_3x3", 192, A, B, 3, 3, 1, 0, 0),
    MAX_HALVE(B, OUT),
    {0},
};
static const struct step block_a[] = {
    CONV_1X1("branch1x1", 64, IN, OUT),
    CONV_1X1("branch5x5_1", 48, IN, A),
    CONV("branch5x5_2", 64, A, OUT, 5, 5, 1, 2, 2),
    CONV_1X1("branch3x3dbl_1", 64, IN, A),
    CONV_3X3("branch3x3dbl_2", 96, A, B),
    CONV_3X3("branch3x3dbl_3", 96, B, OUT),
    POOL_3X3(AVERAGE, IN, A),
    CONV_1X1("branch_pool", 0, A, OUT),
    {0},
};
static const struct step block_b[] = {
    CONV_HALVE("branch3x3", 384, IN, OUT),
    CONV_1X1("branch3x3dbl_1", 64, IN, A),
    CONV_3X3("branch3x3dbl_2", 96, A, B),
    CONV_HALVE("branch3x3dbl_3", 96, B, OUT),
    MAX_HALVE(IN, OUT),
    {0},
};
static const struct step block_c[] = {
    CONV_1X1("branch1x1", 192, IN, OUT),     CONV_1X1("branch7x7_1", 0, IN, A),
    CONV_1X7("branch7x7_2", 0, A, B),        CONV_7X1("branch7x7_3", 192, B, OUT),
    CONV_1X1("branch7x7dbl_1", 0, IN, A),    CONV_7X1("branch7x7dbl_2", 0, A, B),
    CONV_1X7("branch7x7dbl_3", 0, B, A),     CONV_7X1("branch7x7dbl_4", 0, A, B),
    CONV_1X7("branch7x7dbl_5", 192, B, OUT), POOL_3X3(AVERAGE, IN, A),
    CONV_1X1("branch_pool", 192, A, OUT),    {0},
};
static const struct step block_d[] = {
    CONV_1X1("branch3x3_1", 192, IN, A),
    CONV_HALVE("branch3x3_2", 320, A, OUT),
    CONV_1X1("branch7x7x3_1", 192, IN, A),
    CONV_1X7("branch7x7x3_2", 192, A, B),
    CONV_7X1("branch7x7x3_3", 192, B, A),
    CONV_HALVE("branch7x7x3_4", 192, A, OUT),
    MAX_HALVE(IN, OUT),
    {0},
};
#define BLOCK_E(name, pool)                       \
    static const struct step name[] = {           \
        CONV_1X1("branch1x1", 320, IN, OUT),      \
        CONV_1X1("branch3x3_1", 384, IN, A),      \
        CONV_1X3("branch3x3_2a", 384, A, OUT),    \
        CONV_3X1("branch3x3_2b", 384, A, OUT),    \
        CONV_1X1("branch3x3dbl_1", 448, IN, A),   \
        CONV_3X3("branch3x3dbl_2", 384, A, B),    \
        CONV_1X3("branch3x3dbl_3a", 384, B, OUT), \
        CONV_3X1("branch3x3dbl_3b", 384, B, OUT), \
        POOL_3X3(pool, IN, A),                    \
        CONV_1X1("branch_pool", 192, A, OUT),     \
        {0},                                      \
    }
BLOCK_E(block_e, AVERAGE);
BLOCK_E(block_e_maximum, MAXIMUM);

static const struct block {
    const char *name;
    const struct step *steps;
    int width; // of its convolutions that have none of their own
} blocks[] = {
    {"", stem, 0},
    {"Mixed_5b", block_a, 32},
    {"Mixed_5c", block_a, 64},
    {"Mixed_5d", block_a, 64},
    {"Mixed_6a", block_b, 0},
    {"Mixed_6b", block_c, 128},
    {"Mixed_6c", block_c, 160},
    {"Mixed_6d", block_c, 160}, // the spatial features are the first channels of its output
    {"Mixed_6e", block_c, 192},
    {"Mixed_7a", block_d, 0},
    {"Mixed_7b", block_e, 0},
    {"Mixed_7c", block_e_maximum, 0},
};
enum { BLOCKS = sizeof blocks / sizeof *blocks, STEPS_MAX = 12, SPATIAL_BLOCK = 7 };
enum { NODES_MAX = BLOCKS * STEPS_MAX + 2, VALUES_MAX = BLOCKS * STEPS_MAX + 1 };

// ---- from the table to operations ---------------------------------------------------------------

static int new_value(struct inception *n, const char *name, int height, int width, int64_t channels)
{
    struct inception_value *v = &n->values[n->value_count];
    snprintf(v->name, sizeof v->name, "%s", name);
    v->height = height;
    v->width = width;
    v->channels = channels;
    v->first = v->last = n->node_count;
    return n->value_count++;
}

static struct conv node_conv(const struct inception *n, const struct inception_node *node)
{
    const struct inception_value *x = &n->values[node->from];
    return (struct conv){.images = n->batch,
                         .height = x->height,
                         .width = x->width,
                         .kernel_h = node->kernel_h,
                         .kernel_w = node->kernel_w,
                         .stride = node->stride,
                         .top = node->pad_h,
                         .bottom = node->pad_h,
                         .left = node->pad_w,
                         .right = node->pad_w,
                         .relu = true};
}

static int add_step(struct inception *n, const struct safetensors *file, const struct block *block,
                    const struct step *s, int at[PLACES])
{
    struct inception_node *node = &n->nodes[n->node_count];
    struct inception_value *x = &n->values[at[s->from]];
    *node = (struct inception_node){.op = s->kind == CONVOLVE ? OP_CONV : OP_POOL,
                                    .from = at[s->from],
                                    .kernel_h = s->kernel_h,
                                    .kernel_w = s->kernel_w,
                                    .stride = s->stride,
                                    .pad_h = s->pad_h,
                                    .pad_w = s->pad_w,
                                    .maximum = s->kind == MAXIMUM};
    snprintf(node->name, sizeof node->name, "%s%s%s", block->name, *block->name ? "." : "",
             s->kind == CONVOLVE ? s->name : "pool");
    const struct conv g = node_conv(n, node); // pools have the same geometry
    const int height = (int)conv_height(&g), width = (int)conv_width(&g);
    node->channels = x->channels;
    if (s->kind == CONVOLVE)
        node->channels = s->width ? s->width : block->width;
    if (s->kind == CONVOLVE && file)
        TRY(inception_weight_shape(file, node, x->channels, &node->channels));
    if (s->to != OUT || at[OUT] < 0)
        at[s->to] = new_value(n, s->to == OUT ? block->name : node->name, height, width, 0);
    struct inception_value *y = &n->values[at[s->to]];
    BUG_IF(y->height != height || y->width != width);
    node->to = at[s->to];
    node->column = y->channels;
    y->channels += node->channels;
    n->values[at[s->from]].last = n->node_count++;
    return 0;
}

static void add_reader(struct inception *n, enum inception_op op, int value)
{
    n->nodes[n->node_count] = (struct inception_node){.op = op, .from = value};
    n->values[value].last = n->node_count++;
}

static int build(struct inception *n, const struct safetensors *file)
{
    int at[PLACES] = {new_value(n, "pixels", INCEPTION_SIDE, INCEPTION_SIDE, 3), -1, -1, -1};
    for (int b = 0; b < BLOCKS; b++) {
        at[OUT] = -1;
        for (const struct step *s = blocks[b].steps; s->kind != END; s++)
            TRY(add_step(n, file, &blocks[b], s, at));
        const struct inception_value *out = &n->values[at[OUT]];
        if (b == SPATIAL_BLOCK) {
            if (out->channels < INCEPTION_SPATIAL)
                return fail(ERR_INPUT, "%s: Mixed_6d has fewer than 7 channels",
                            safetensors_path(file));
            n->spatial_dim = out->height * out->width * INCEPTION_SPATIAL;
            add_reader(n, OP_SPATIAL, at[OUT]);
        }
        at[IN] = at[OUT];
    }
    n->dim = (int)n->values[at[IN]].channels;
    add_reader(n, OP_MEAN, at[IN]);
    return 0;
}

// ---- memory -------------------------------------------------------------------------------------

static int plan_inputs(struct inception *n)
{
    struct plan *p = n->plan;
    const int64_t N = n->batch, S = INCEPTION_SIDE;
    TRY(PLAN_TENSOR(p, "images", PLAN_INPUT, I32, 0, PLAN_FOREVER, &n->bytes,
                    N * INCEPTION_IMAGE_BYTES / 4));
    TRY(PLAN_TENSOR(p, "taps", PLAN_INPUT, I32, 0, PLAN_FOREVER, &n->taps, N, 2, S, 3));
    TRY(PLAN_TENSOR(p, "pool", PLAN_INPUT, F32, 0, PLAN_FOREVER, &n->pool, N, n->dim));
    const struct inception_value *v = n->values;
    for (int i = 0; i < n->node_count; i++)
        if (n->nodes[i].op == OP_SPATIAL)
            v = &n->values[n->nodes[i].from];
    TRY(PLAN_TENSOR(p, "spatial", PLAN_INPUT, F32, 0, PLAN_FOREVER, &n->spatial, N,
                    INCEPTION_SPATIAL, v->height, v->width));
    if (!n->classes)
        return 0;
    TRY(PLAN_TENSOR(p, "fc.weight", PLAN_WEIGHTS, F32, 0, PLAN_FOREVER, &n->class_w, n->classes,
                    n->dim));
    return PLAN_TENSOR(p, "logits", PLAN_INPUT, F32, 0, PLAN_FOREVER, &n->logits, N, n->classes);
}

static int plan_network(struct inception *n)
{
    const struct device *dev = n->ctx.dev;
    for (int i = 0; i < n->value_count; i++) {
        struct inception_value *v = &n->values[i];
        TRY(PLAN_TENSOR(n->plan, v->name, PLAN_ACTIVATIONS, dev->act, v->first, v->last, &v->t,
                        (int64_t)n->batch * v->height * v->width, v->channels));
    }
    for (int i = 0; i < n->node_count; i++) {
        struct inception_node *node = &n->nodes[i];
        if (node->op != OP_CONV)
            continue;
        const int64_t channels = n->values[node->from].channels;
        const struct conv g = node_conv(n, node);
        TRY(PLAN_TENSOR(n->plan, node->name, PLAN_WEIGHTS, dev->half_weights ? BF16 : F32, 0,
                        PLAN_FOREVER, &node->w, node->channels, conv_columns(&g, channels)));
        TRY(PLAN_TENSOR(n->plan, node->name, PLAN_WEIGHTS, F32, 0, PLAN_FOREVER, &node->bias,
                        node->channels));
    }
    return 0;
}

// ---- running ------------------------------------------------------------------------------------

static int run_node(struct inception *n, struct inception_node *node)
{
    struct context *c = &n->ctx;
    const struct inception_value *x = &n->values[node->from];
    if (node->op == OP_SPATIAL)
        return op_rows_to_images(c, &n->spatial, &x->t);
    if (node->op == OP_MEAN)
        return op_pixel_mean(c, &n->pool, &x->t);
    struct tensor *y = &n->values[node->to].t;
    if (node->op == OP_POOL) {
        const struct pool p = {n->batch,     x->height,   x->width,     node->kernel_h,
                               node->stride, node->pad_h, node->maximum};
        return op_pool(c, y, node->column, &x->t, &p);
    }
    const struct conv g = node_conv(n, node);
    return op_conv2d(c, y, node->column, &x->t, &node->w, &node->bias, &g);
}

static int run_all(void *user)
{
    struct inception *n = user;
    struct context *c = &n->ctx;
    const bool adm = n->input == INCEPTION_ADM;
    TRY(op_resample(c, &n->values[0].t, &n->bytes, &n->taps, adm ? 1 / 128.0f : 2 / 255.0f, -1));
    for (int i = 0; i < n->node_count; i++)
        TRY(run_node(n, &n->nodes[i]));
    return n->classes ? op_linear(c, &n->logits, &n->pool, &n->class_w, NULL) : 0;
}

int inception_run(struct inception *n)
{
    return recording_run(&n->ctx, &n->recording, run_all, n);
}

int inception_read(struct inception *n, int count, float *pool, float *spatial, float *logits)
{
    struct context *c = &n->ctx;
    const size_t size = sizeof(float), rows = (size_t)count;
    const size_t pixels = (size_t)(n->spatial.shape[2] * n->spatial.shape[3]);
    TRY(c->dev->api->read(c->stream, n->pool.mem, 0, pool, size * rows * (size_t)n->dim));
    if (logits)
        TRY(c->dev->api->read(c->stream, n->logits.mem, 0, logits,
                              size * rows * (size_t)n->classes));
    TRY(c->dev->api->read(c->stream, n->spatial.mem, 0, n->host_spatial,
                          size * rows * (size_t)n->spatial_dim));
    const float *from = n->host_spatial; // [N,7,pixels]
    for (size_t i = 0; i < rows; i++, spatial += n->spatial_dim)
        for (size_t ch = 0; ch < INCEPTION_SPATIAL; ch++)
            for (size_t p = 0; p < pixels; p++)
                spatial[p * INCEPTION_SPATIAL + ch] = *from++;
    return 0;
}

// ---- making it ----------------------------------------------------------------------------------

static int find_classes(struct inception *n, const struct safetensors *file)
{
    const struct st_tensor *fc = file ? safetensors_find(file, "fc.weight") : NULL;
    if (!fc)
        return 0;
    TRY(safetensors_expect(file, "fc.weight", -1, 2, (int64_t[]){-1, n->dim}, &fc));
    if (fc->shape[0] < 1 || fc->shape[0] > 1 << 20)
        return fail(ERR_INPUT, "%s: fc.weight has %lld classes", safetensors_path(file),
                    (long long)fc->shape[0]);
    n->classes = (int)fc->shape[0];
    return 0;
}

static int prepare(struct inception *n, const struct safetensors *file, uint64_t limit)
{
    struct context *c = &n->ctx;
    TRY(build(n, file));
    TRY(find_classes(n, file));
    TRY(plan_new(c->dev, &n->plan));
    TRY(plan_inputs(n));
    TRY(plan_network(n));
    c->dry = true;
    TRY(run_all(n));
    if (c->space_wanted)
        TRY(PLAN_TENSOR(n->plan, "scratch", PLAN_ACTIVATIONS, F32, 0, PLAN_FOREVER, &c->space,
                        (int64_t)((c->space_wanted + 3) / 4)));
    TRY(plan_layout(n->plan, limit));
    TRY(plan_commit(n->plan));
    c->dry = false;
    return file ? inception_load(n, file) : inception_fill(n);
}

double inception_flops(const struct inception *n)
{
    double sum = 0;
    for (int i = 0; i < n->node_count; i++) {
        const struct inception_node *node = &n->nodes[i];
        const struct inception_value *y = &n->values[node->to];
        if (node->op == OP_CONV)
            sum += 2.0 * n->batch * y->height * y->width * (double)node->channels * node->kernel_h *
                   node->kernel_w * (double)n->values[node->from].channels;
    }
    return sum;
}

int inception_new(struct device *dev, struct stream *stream, const struct safetensors *file,
                  int batch, enum inception_input input, uint64_t limit, struct inception **out)
{
    *out = NULL;
    BUG_IF(batch < 1 || batch > INT32_MAX / INCEPTION_IMAGE_BYTES);
    const size_t images = (size_t)batch;
    struct inception *n = calloc(1, sizeof *n);
    if (!n)
        return fail(ERR_NOMEM, "no host memory for Inception");
    n->ctx.dev = dev;
    n->ctx.stream = stream;
    n->batch = batch;
    n->input = input;
    n->nodes = calloc(NODES_MAX, sizeof *n->nodes);
    n->values = calloc(VALUES_MAX, sizeof *n->values);
    n->host_bytes = malloc(images * INCEPTION_IMAGE_BYTES);
    n->host_taps = malloc(images * 2 * INCEPTION_SIDE * 3 * sizeof *n->host_taps);
    int code = n->nodes && n->values && n->host_bytes && n->host_taps
                   ? prepare(n, file, limit)
                   : fail(ERR_NOMEM, "no host memory for Inception");
    if (code >= 0) {
        n->host_spatial = malloc(images * (size_t)n->spatial_dim * sizeof(float));
        code = n->host_spatial ? 0 : fail(ERR_NOMEM, "no host memory for Inception");
    }
    if (code < 0) {
        inception_free(n);
        return code;
    }
    *out = n;
    return 0;
}

void inception_free(struct inception *n)
{
    if (!n)
        return;
    recording_reset(&n->ctx, &n->recording);
    if (n->plan)
        plan_free(n->plan);
    free(n->nodes), free(n->values);
    free(n->host_bytes), free(n->host_taps), free(n->host_spatial);
    free(n);
}
