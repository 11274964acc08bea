// Pooling and resampling of images for feature networks (Inception).
#include "runtime/ops_internal.h"

static int64_t pooled(int64_t length, const struct pool *p)
{
    return (length + 2 * p->padding - p->size) / p->stride + 1;
}

int64_t pool_height(const struct pool *p)
{
    return pooled(p->height, p);
}

int64_t pool_width(const struct pool *p)
{
    return pooled(p->width, p);
}

int op_pool(struct context *c, struct tensor *y, int64_t column, const struct tensor *x,
            const struct pool *p)
{
    const int64_t channels = x->shape[1], rows = p->images * pool_height(p) * pool_width(p);
    BUG_IF(p->size < 1 || p->stride < 1 || p->padding < 0 || 2 * p->padding > p->size);
    BUG_IF(p->height + 2 * p->padding < p->size || p->width + 2 * p->padding < p->size);
    BUG_IF(!is_act(c, x) || !has_shape2(x, (int64_t)p->images * p->height * p->width, channels));
    BUG_IF(!is_act(c, y) || y->ndim != 2 || y->shape[0] != rows || rows > INT32_MAX);
    BUG_IF(column < 0 || column + channels > y->shape[1]);
    const struct pool_forward a = {.y = y->mem,
                                   .x = x->mem,
                                   .images = p->images,
                                   .height = p->height,
                                   .width = p->width,
                                   .channels = arg_int(channels),
                                   .out_height = arg_int(pool_height(p)),
                                   .out_width = arg_int(pool_width(p)),
                                   .size = p->size,
                                   .stride = p->stride,
                                   .padding = p->padding,
                                   .maximum = p->maximum,
                                   .columns = arg_int(y->shape[1]),
                                   .column = arg_int(column)};
    const int code = ACCELERATE(c, ACCELERATE_POOL, &a, y, x);
    if (code != NOT_MINE)
        return code;
    const bool quads = channels % 4 == 0 && column % 4 == 0 && y->shape[1] % 4 == 0;
    const int64_t across = channels / (quads ? 4 : 1), chunk = op_chunk(c, rows, 1, 64);
    if (c->dev->cpu_forms)
        return LAUNCH(c, KERNEL_pool_cpu, cover(rows, chunk), 1, 1, BUF(y), BUF(x), INT(channels),
                      INT(p->height), INT(p->width), INT(pool_height(p)), INT(pool_width(p)),
                      INT(p->size), INT(p->stride), INT(p->padding), INT(p->maximum),
                      INT(y->shape[1]), INT(column), UINT(rows), UINT(chunk));
    return LAUNCH(c, KERNEL_pool, cover(rows * across, 64), 1, 1, BUF(y), BUF(x), INT(channels),
                  INT(p->height), INT(p->width), INT(pool_height(p)), INT(pool_width(p)),
                  INT(p->size), INT(p->stride), INT(p->padding), INT(p->maximum), INT(y->shape[1]),
                  INT(column), INT(quads ? 4 : 1), UINT(rows * across));
}

int op_pixel_mean(struct context *c, struct tensor *out, const struct tensor *x)
{
    const int64_t images = out->shape[0], channels = x->shape[1];
    BUG_IF(!has_shape2(out, images, channels) || out->dtype != F32 || !is_act(c, x));
    BUG_IF(x->ndim != 2 || x->shape[0] % images);
    return LAUNCH(c, KERNEL_pixel_mean, cover(images * channels, 64), 1, 1, BUF(out), BUF(x),
                  INT(channels), INT(x->shape[0] / images), UINT(images * channels));
}

int op_resample(struct context *c, struct tensor *out, const struct tensor *bytes,
                const struct tensor *taps, float scale, float shift)
{
    const int64_t images = taps->shape[0], side = taps->shape[2], rows = images * side * side;
    BUG_IF(taps->dtype != I32 || taps->ndim != 4 || taps->shape[1] != 2 || taps->shape[3] != 3);
    BUG_IF(!is_act(c, out) || !has_shape2(out, rows, 3) || bytes->dtype != I32);
    return LAUNCH(c, KERNEL_resample, cover(rows, 64), 1, 1, BUF(out), BUF(bytes), BUF(taps),
                  INT(side), FLOAT(scale), FLOAT(shift), UINT(rows));
}
