// What convolutional networks need (the VAE, Inception): convolution, GroupNorm, softmax, attention
// with one wide head.
//
// A convolution is a product: pixels are gathered into a matrix of what the kernel sees, in blocks
// that stay in the cache of the device, and the product, for which every device has tuned code,
// reads each block at once.
#include "runtime/ops_internal.h"

#include <math.h>
#include <string.h>

enum {
    CONV_ROWS = 16,            // rows an item of conv_gather takes, as in kernels.cl
    CONV_TILE = 128,           // rows and columns of the products' tiles on GPUs
    CONV_BLOCK_CPU = 4 << 20,  // bytes of gathered pixels at a time
    CONV_BLOCK_GPU = 64 << 20, // more where one product would not occupy the whole device
    SCORES_ROWS = 1024,        // queries at a time in op_attention_single
};

// ---- geometry -----------------------------------------------------------------------------------

static int64_t steps(int64_t length, int kernel, int stride)
{
    BUG_IF(kernel < 1 || stride < 1 || length < kernel);
    return (length - kernel) / stride + 1;
}

int64_t conv_height(const struct conv *g)
{
    return steps(((int64_t)g->height << g->doubled) + g->top + g->bottom, g->kernel_h, g->stride);
}

int64_t conv_width(const struct conv *g)
{
    return steps(((int64_t)g->width << g->doubled) + g->left + g->right, g->kernel_w, g->stride);
}

int64_t conv_columns(const struct conv *g, int64_t channels)
{
    return cover((int64_t)g->kernel_h * g->kernel_w * channels, 8) * 8;
}

void conv_weight(float *to, const float *from, int64_t out, int64_t channels, int kernel_h,
                 int kernel_w)
{
    const struct conv g = {.kernel_h = kernel_h, .kernel_w = kernel_w};
    const int64_t pitch = conv_columns(&g, channels), taps = (int64_t)kernel_h * kernel_w;
    memset(to, 0, (size_t)(out * pitch) * sizeof *to);
    for (int64_t o = 0; o < out; o++)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t t = 0; t < taps; t++)
                to[o * pitch + t * channels + c] = from[(o * channels + c) * taps + t];
}

// ---- convolution --------------------------------------------------------------------------------

// One convolution as it is done: all [rows, pitch] of gathered pixels, `block` rows at a time.
struct conv_plan {
    int64_t channels, out, out_height, out_width, rows, pitch, block;
    bool gather;             // false: x is that matrix already
    bool place;              // products go to scratch, conv_place() to y
    size_t gathered, placed; // bytes of scratch
};

// The least count of rows whose bytes in t are a multiple of the device's alignment.
static int64_t aligned_rows(const struct context *c, const struct tensor *t)
{
    const int64_t align = (int64_t)op_aligned(c, 1);
    const int64_t bytes = t->shape[1] * (int64_t)dtype_size(t->dtype);
    int64_t a = align, b = bytes;
    while (b) { // greatest common divisor
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return align / a;
}

static int64_t conv_block(const struct context *c, const struct conv_plan *p, int64_t multiple)
{
    const int64_t bytes = p->pitch * (int64_t)dtype_size(c->dev->act);
    int64_t rows = (c->dev->cpu_forms ? CONV_BLOCK_CPU : CONV_BLOCK_GPU) / bytes;
    const int64_t wave =
        cover((int64_t)c->dev->info.compute_units, cover(p->out, CONV_TILE)) * CONV_TILE;
    if (!c->dev->cpu_forms && rows < wave)
        rows = wave;
    rows = cover(p->rows, cover(p->rows, rows < 1 ? 1 : rows)); // even blocks
    return cover(rows, multiple) * multiple;
}

static struct conv_plan conv_plan(const struct context *c, const struct tensor *y, int64_t column,
                                  const struct tensor *x, const struct tensor *w,
                                  const struct conv *g)
{
    struct conv_plan p = {.channels = x->shape[1],
                          .out = w->shape[0],
                          .out_height = conv_height(g),
                          .out_width = conv_width(g)};
    BUG_IF(!is_act(c, x) || x->ndim != 2 || y->ndim != 2 || w->ndim != 2 || g->images < 1);
    BUG_IF(x->shape[0] != (int64_t)g->images * g->height * g->width);
    p.pitch = conv_columns(g, p.channels);
    p.rows = g->images * p.out_height * p.out_width;
    BUG_IF(y->shape[0] != p.rows || w->shape[1] != p.pitch);
    BUG_IF(column < 0 || column + p.out > y->shape[1] || p.rows > INT32_MAX);
    p.gather = g->kernel_h != 1 || g->kernel_w != 1 || g->stride != 1 || g->top || g->bottom ||
               g->left || g->right || g->doubled || p.pitch != p.channels;
    p.place = g->relu || column > 0 || p.out < y->shape[1];
    BUG_IF(p.place && !is_act(c, y));
    int64_t multiple = p.place ? 1 : aligned_rows(c, y);
    if (!p.gather && aligned_rows(c, x) > multiple)
        multiple = aligned_rows(c, x); // both are powers of two
    p.block = p.gather || p.place ? conv_block(c, &p, multiple) : p.rows;
    p.gathered =
        p.gather ? op_aligned(c, (size_t)(p.block * p.pitch) * dtype_size(c->dev->act)) : 0;
    p.placed = p.place ? op_aligned(c, (size_t)(p.block * p.out) * dtype_size(c->dev->act)) : 0;
    return p;
}

static int gather(struct context *c, struct tensor *out, const struct tensor *x,
                  const struct conv *g, const struct conv_plan *p, int64_t first)
{
    const int64_t rows = out->shape[0], chunk = op_chunk(c, rows, 1, 256);
    const int64_t groups =
        c->dev->cpu_forms ? cover(rows, chunk) : cover(cover(rows, CONV_ROWS) * (p->pitch / 4), 64);
    return LAUNCH(c, FORM(c, conv_gather), groups, 1, 1, BUF(out), BUF(x), INT(p->channels),
                  INT(g->height), INT(g->width), INT(p->out_height), INT(p->out_width),
                  INT(g->kernel_h), INT(g->kernel_w), INT(g->stride), INT(g->top), INT(g->left),
                  INT(g->doubled), UINT(first), UINT(rows), UINT(chunk));
}

static int place(struct context *c, struct tensor *y, int64_t column, const struct tensor *t,
                 const struct conv *g, int64_t first)
{
    const int64_t count = tensor_count(t);
    return LAUNCH(c, KERNEL_conv_place, cover(count, 256), 1, 1, BUF(y), BUF(t), INT(y->shape[1]),
                  INT(column), INT(t->shape[1]), INT(g->relu), INT(g->add), UINT(first),
                  UINT(count));
}

// By the device's own convolution from row `first` of y on, or NOT_MINE.
static int conv_accelerated(struct context *c, struct tensor *y, int64_t first, int64_t column,
                            const struct tensor *x, const struct tensor *w,
                            const struct tensor *bias, const struct conv *g)
{
    const int64_t channels = x->shape[1], out = w->shape[0];
    if (c->dev->cpu_forms || !c->dev->api->accelerate || w->dtype != c->dev->act)
        return NOT_MINE;
    op_want_space(c, CONV_SPACE + (g->doubled ? (size_t)(32 * channels * out) : 0));
    const struct convolution a = {.y = y->mem,
                                  .x = x->mem,
                                  .w = w->mem,
                                  .bias = MEM(bias),
                                  .space = c->space.mem,
                                  .images = g->images,
                                  .height = g->height,
                                  .width = g->width,
                                  .channels = arg_int(channels),
                                  .out = arg_int(out),
                                  .columns = arg_int(y->shape[1]),
                                  .column = arg_int(column),
                                  .first = arg_int(first),
                                  .kernel_h = g->kernel_h,
                                  .kernel_w = g->kernel_w,
                                  .stride = g->stride,
                                  .top = g->top,
                                  .bottom = g->bottom,
                                  .left = g->left,
                                  .right = g->right,
                                  .out_height = arg_int(conv_height(g)),
                                  .out_width = arg_int(conv_width(g)),
                                  .doubled = g->doubled,
                                  .relu = g->relu,
                                  .add = g->add,
                                  .to_f32 = y->dtype == F32};
    return ACCELERATE(c, ACCELERATE_CONV2D, &a, y, x, w, bias);
}

// The product of a block of gathered pixels to rows of y by the device's own convolution, of 1 x 1;
// or NOT_MINE.
static int product_in_place(struct context *c, struct tensor *y, int64_t first, int64_t column,
                            const struct tensor *a, const struct tensor *w,
                            const struct tensor *bias, const struct conv *g)
{
    const struct conv one = {.images = 1,
                             .height = 1,
                             .width = (int)a->shape[0],
                             .kernel_h = 1,
                             .kernel_w = 1,
                             .stride = 1,
                             .relu = g->relu,
                             .add = g->add};
    return conv_accelerated(c, y, first, column, a, w, bias, &one);
}

// Rows [first, first + rows) of y; c: the context of the product.
static int conv_rows(struct context *outer, struct context *c, struct tensor *y, int64_t column,
                     const struct tensor *x, const struct tensor *w, const struct tensor *bias,
                     const struct conv *g, const struct conv_plan *p, int64_t first)
{
    const int64_t rows = p->rows - first < p->block ? p->rows - first : p->block;
    const size_t size = dtype_size(c->dev->act);
    struct tensor a = {0}, b = {0};
    int code;
    if (p->gather)
        code = op_view(c, &a, outer->space.mem, 0, c->dev->act, rows, p->pitch);
    else
        code = op_view(c, &a, x->mem, (size_t)(first * p->pitch) * size, x->dtype, rows, p->pitch);
    if (code == 0 && p->place)
        code = op_view(c, &b, outer->space.mem, p->gathered, c->dev->act, rows, p->out);
    else if (code == 0)
        code = op_view(c, &b, y->mem, (size_t)(first * p->out) * dtype_size(y->dtype), y->dtype,
                       rows, p->out);
    if (code == 0 && p->gather)
        code = gather(c, &a, x, g, p, first);
    const int own =
        code == 0 && p->place ? product_in_place(c, y, first, column, &a, w, bias, g) : NOT_MINE;
    if (own != NOT_MINE)
        code = own;
    if (code == 0 && own == NOT_MINE)
        code =
            g->add && !p->place ? op_linear_add(c, &b, &a, w, bias) : op_linear(c, &b, &a, w, bias);
    if (code == 0 && own == NOT_MINE && p->place)
        code = place(c, y, column, &b, g, first);
    op_view_end(c, &a);
    op_view_end(c, &b);
    return code;
}

int op_conv2d(struct context *c, struct tensor *y, int64_t column, const struct tensor *x,
              const struct tensor *w, const struct tensor *bias, const struct conv *g)
{
    const struct conv_plan p = conv_plan(c, y, column, x, w, g);
    struct context inner;
    int code = conv_accelerated(c, y, 0, column, x, w, bias, g);
    if (code != NOT_MINE)
        return code;
    code = op_inner_begin(c, p.gathered + p.placed, &inner);
    for (int64_t first = 0; code == 0 && first < p.rows; first += p.block)
        code = conv_rows(c, &inner, y, column, x, w, bias, g, &p, first);
    op_inner_end(c, p.gathered + p.placed, &inner);
    return code;
}

// ---- GroupNorm ----------------------------------------------------------------------------------

struct group_norm {
    int64_t images, channels, pixels, rows, parts; // `rows` pixels a part
    size_t part_bytes, total_bytes;
};

static struct group_norm group_norm_plan(const struct context *c, const struct tensor *x,
                                         int images)
{
    struct group_norm p = {.images = images, .channels = x->shape[1]};
    BUG_IF(images < 1 || x->ndim != 2 || x->shape[0] % images);
    p.pixels = x->shape[0] / images;
    p.rows = c->dev->cpu_forms ? op_chunk(c, x->shape[0], 16, 256) : p.pixels < 64 ? 8 : GROUP_ROWS;
    p.parts = cover(p.pixels, p.rows);
    p.part_bytes = op_aligned(c, (size_t)(images * p.parts * 2 * p.channels) * sizeof(float));
    p.total_bytes = op_aligned(c, (size_t)(images * 2 * p.channels) * sizeof(float));
    return p;
}

static int64_t channel_units(int64_t channels)
{
    return channels % 4 == 0 ? channels / 4 : channels;
}

static int group_norm_sums(struct context *c, struct tensor *part, const struct tensor *x,
                           const struct group_norm *p)
{
    const int64_t items = p->images * p->parts * channel_units(p->channels);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_group_norm_part_cpu, p->parts, p->images, 1, BUF(part), BUF(x),
                      INT(p->channels), INT(p->pixels), INT(p->rows), INT(p->parts));
    return LAUNCH(c, KERNEL_group_norm_part, cover(items, 64), 1, 1, BUF(part), BUF(x),
                  INT(p->channels), INT(p->pixels), INT(p->rows), INT(p->parts), UINT(items));
}

static int group_norm_apply(struct context *c, struct tensor *y, const struct tensor *x,
                            const struct tensor *total, const struct tensor *bias, bool silu,
                            const struct group_norm *p)
{
    const int64_t rows = p->images * p->pixels, chunk = op_chunk(c, rows, 1, 256);
    const int64_t items = rows * channel_units(p->channels);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_group_norm_apply_cpu, cover(rows, chunk), 1, 1, BUF(y), BUF(x),
                      BUF(total), BUF(bias), INT(p->channels), INT(p->pixels), INT(silu), INT(rows),
                      INT(chunk));
    return LAUNCH(c, KERNEL_group_norm_apply, cover(items, 256), 1, 1, BUF(y), BUF(x), BUF(total),
                  BUF(bias), INT(p->channels), INT(p->pixels), INT(silu), UINT(items));
}

// By the portable kernels.
static int group_norm_steps(struct context *c, struct tensor *y, const struct tensor *x,
                            const struct tensor *weight, const struct tensor *bias,
                            struct tensor *part, struct tensor *total, int groups, float eps,
                            bool silu, const struct group_norm *p)
{
    TRY(group_norm_sums(c, part, x, p));
    TRY(LAUNCH(c, KERNEL_group_norm_total, groups, p->images, 1, BUF(total), BUF(part), BUF(weight),
               INT(p->channels), INT(p->channels / groups), INT(p->pixels), INT(p->rows),
               INT(p->parts), FLOAT(eps)));
    return group_norm_apply(c, y, x, total, bias, silu, p);
}

int op_group_norm(struct context *c, struct tensor *y, const struct tensor *x,
                  const struct tensor *weight, const struct tensor *bias, int images, int groups,
                  float eps, bool silu)
{
    const struct group_norm p = group_norm_plan(c, x, images);
    struct tensor part, total = {0};
    BUG_IF(!is_act(c, x) || !is_act(c, y) || !has_shape2(y, x->shape[0], p.channels));
    BUG_IF(groups < 1 || p.channels % groups || weight->dtype != F32 || bias->dtype != F32);
    BUG_IF(tensor_count(weight) != p.channels || tensor_count(bias) != p.channels);
    op_want_space(c, p.part_bytes + p.total_bytes);
    int code = op_view(c, &part, c->space.mem, 0, F32, images * p.parts, 2 * p.channels);
    if (code == 0)
        code = op_view(c, &total, c->space.mem, p.part_bytes, F32, images, 2 * p.channels);
    const struct group_norm_forward a = {.y = y->mem,
                                         .x = x->mem,
                                         .weight = weight->mem,
                                         .bias = bias->mem,
                                         .partial = part.mem,
                                         .total = total.mem,
                                         .images = images,
                                         .pixels = arg_int(p.pixels),
                                         .channels = arg_int(p.channels),
                                         .groups = groups,
                                         .silu = silu,
                                         .eps = eps};
    if (code == 0)
        code = ACCELERATE(c, ACCELERATE_GROUP_NORM, &a, y, x);
    if (code == NOT_MINE)
        code = group_norm_steps(c, y, x, weight, bias, &part, &total, groups, eps, silu, &p);
    op_view_end(c, &part);
    op_view_end(c, &total);
    return code;
}

// ---- softmax, attention -------------------------------------------------------------------------

int op_softmax(struct context *c, struct tensor *p, const struct tensor *s, float scale)
{
    const int64_t rows = s->shape[0], columns = s->shape[1], chunk = op_chunk(c, rows, 1, 64);
    BUG_IF(!is_act(c, p) || s->dtype != F32 || s->ndim != 2 || !has_shape2(p, rows, columns));
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_softmax_rows_cpu, cover(rows, chunk), 1, 1, BUF(p), BUF(s),
                      INT(columns), FLOAT(scale), INT(rows), INT(chunk));
    return LAUNCH(c, KERNEL_softmax_rows, rows, 1, 1, BUF(p), BUF(s), INT(columns), FLOAT(scale));
}

// What op_attention_single works on: keys and values of one image, a block of queries and of
// outputs, their scores and probabilities. Scores and probabilities are scratch; so are the others,
// as copies, where rows of an image do not begin where a view may.
enum { AT_KEYS, AT_VALUES, AT_QUERIES, AT_OUTPUTS, AT_SCORES, AT_SHARES, AT_COUNT };
struct attention_blocks {
    int64_t tokens, width, block;
    bool in_place;
    size_t offset[AT_COUNT + 1];
};

static struct attention_blocks attention_blocks(const struct context *c, const struct tensor *q,
                                                int images)
{
    struct attention_blocks b = {.width = q->shape[1]};
    BUG_IF(images < 1 || q->shape[0] % images);
    b.tokens = q->shape[0] / images;
    b.block = cover(b.tokens, cover(b.tokens, SCORES_ROWS));
    const size_t size = dtype_size(c->dev->act), row = (size_t)b.width * size;
    const int64_t multiple = aligned_rows(c, q);
    b.in_place = b.tokens % multiple == 0 && b.block % multiple == 0;
    const size_t copied = b.in_place ? 0 : row;
    const size_t bytes[AT_COUNT] = {
        [AT_KEYS] = (size_t)b.tokens * copied,
        [AT_VALUES] = (size_t)b.tokens * copied,
        [AT_QUERIES] = (size_t)b.block * copied,
        [AT_OUTPUTS] = (size_t)b.block * copied,
        [AT_SCORES] = (size_t)(b.block * b.tokens) * sizeof(float),
        [AT_SHARES] = (size_t)(b.block * b.tokens) * size,
    };
    for (int i = 0; i < AT_COUNT; i++)
        b.offset[i + 1] = b.offset[i] + op_aligned(c, bytes[i]);
    return b;
}

// Rows between a tensor [rows, width] and the start of a block of scratch.
static int copy_rows(struct context *c, struct tensor *to, int64_t to_row,
                     const struct tensor *from, int64_t from_row, int64_t rows)
{
    const size_t row = (size_t)to->shape[1] * dtype_size(to->dtype);
    if (c->dry)
        return 0;
    return c->dev->api->copy(c->stream, to->mem, (size_t)to_row * row, from->mem,
                             (size_t)from_row * row, (size_t)rows * row);
}

// out: rows [first, first + rows) of t, in place; else room number `at` of scratch for them, filled
// with them where `read`.
static int block_of(struct context *c, struct tensor *out, const struct tensor *t,
                    const struct attention_blocks *b, int at, int64_t first, int64_t rows,
                    bool read)
{
    const size_t row = (size_t)b->width * dtype_size(t->dtype);
    if (b->in_place)
        return op_view(c, out, t->mem, (size_t)first * row, t->dtype, rows, b->width);
    TRY(op_view(c, out, c->space.mem, b->offset[at], t->dtype, rows, b->width));
    return read ? copy_rows(c, out, 0, t, first, rows) : 0;
}

// Queries [first, first + rows) of all, of the image whose keys and values t[] holds.
static int attend(struct context *outer, struct context *c, struct tensor *o,
                  const struct tensor *q, struct tensor t[AT_COUNT],
                  const struct attention_blocks *b, int64_t first, int64_t rows)
{
    struct tensor *scores = &t[AT_SCORES], *shares = &t[AT_SHARES], *out = &t[AT_OUTPUTS];
    int code = block_of(outer, &t[AT_QUERIES], q, b, AT_QUERIES, first, rows, true);
    if (code == 0)
        code = block_of(outer, out, o, b, AT_OUTPUTS, first, rows, false);
    if (code == 0)
        code = op_view(c, scores, outer->space.mem, b->offset[AT_SCORES], F32, rows, b->tokens);
    if (code == 0)
        code = op_view(c, shares, outer->space.mem, b->offset[AT_SHARES], c->dev->act, rows,
                       b->tokens);
    if (code == 0)
        code = op_linear(c, scores, &t[AT_QUERIES], &t[AT_KEYS], NULL);
    if (code == 0)
        code = op_softmax(c, shares, scores, 1.0f / sqrtf((float)b->width));
    if (code == 0)
        code = op_linear_dx(c, out, shares, &t[AT_VALUES], false);
    if (code == 0 && !b->in_place)
        code = copy_rows(c, o, first, out, 0, rows);
    for (int i = AT_QUERIES; i < AT_COUNT; i++)
        op_view_end(c, &t[i]);
    return code;
}

// Image n of all.
static int attend_image(struct context *outer, struct context *c, struct tensor *o,
                        const struct tensor *q, const struct tensor *k, const struct tensor *v,
                        const struct attention_blocks *b, int64_t n)
{
    struct tensor t[AT_COUNT] = {0};
    const int64_t first = n * b->tokens;
    int code = block_of(outer, &t[AT_KEYS], k, b, AT_KEYS, first, b->tokens, true);
    if (code == 0)
        code = block_of(outer, &t[AT_VALUES], v, b, AT_VALUES, first, b->tokens, true);
    for (int64_t i = 0; code == 0 && i < b->tokens; i += b->block)
        code = attend(outer, c, o, q, t, b, first + i,
                      b->tokens - i < b->block ? b->tokens - i : b->block);
    op_view_end(c, &t[AT_KEYS]);
    op_view_end(c, &t[AT_VALUES]);
    return code;
}

int op_attention_single(struct context *c, struct tensor *o, const struct tensor *q,
                        const struct tensor *k, const struct tensor *v, int images)
{
    const struct attention_blocks b = attention_blocks(c, q, images);
    const int64_t rows = q->shape[0];
    struct context inner;
    BUG_IF(!is_act(c, o) || !is_act(c, q) || !is_act(c, k) || !is_act(c, v));
    BUG_IF(!has_shape2(o, rows, b.width) || !has_shape2(q, rows, b.width) ||
           !has_shape2(k, rows, b.width) || !has_shape2(v, rows, b.width));
    int code = op_inner_begin(c, b.offset[AT_COUNT], &inner);
    for (int64_t n = 0; code == 0 && n < images; n++)
        code = attend_image(c, &inner, o, q, k, v, &b, n);
    op_inner_end(c, b.offset[AT_COUNT], &inner);
    return code;
}

// ---- out of the network -------------------------------------------------------------------------

int op_rows_to_images(struct context *c, struct tensor *out, const struct tensor *in)
{
    const int64_t pixels = out->shape[2] * out->shape[3], count = tensor_count(out);
    BUG_IF(out->ndim != 4 || out->dtype != F32 || in->ndim != 2);
    BUG_IF(in->shape[0] != out->shape[0] * pixels || in->shape[1] < out->shape[1]);
    BUG_IF(!is_act(c, in) && in->dtype != F32);
    return LAUNCH(c, KERNEL_rows_to_images, cover(count, 256), 1, 1, BUF(out), BUF(in),
                  INT(out->shape[1]), INT(pixels), INT(in->shape[1]), INT(in->dtype == F32),
                  UINT(count));
}
