#include "runtime/tensor.h"

int64_t tensor_count(const struct tensor *t)
{
    int64_t count = 1;
    for (int i = 0; i < t->ndim; i++)
        count *= t->shape[i];
    return count;
}

size_t tensor_bytes(const struct tensor *t)
{
    return (size_t)tensor_count(t) * dtype_size(t->dtype);
}

int tensor_write(struct context *c, const struct tensor *t, const void *host)
{
    if (c->dry || tensor_bytes(t) == 0)
        return 0;
    tensor_changed(t);
    return c->dev->api->write(c->stream, t->mem, 0, host, tensor_bytes(t));
}

int tensor_read(struct context *c, const struct tensor *t, void *host)
{
    if (c->dry || tensor_bytes(t) == 0)
        return 0;
    return c->dev->api->read(c->stream, t->mem, 0, host, tensor_bytes(t));
}

int tensor_zero(struct context *c, const struct tensor *t)
{
    size_t bytes = tensor_bytes(t);
    if (c->dry || bytes == 0)
        return 0;
    tensor_changed(t);
    // fill() works in 4-byte words; an odd number of bf16 values leaves two bytes over
    TRY(c->dev->api->fill(c->stream, t->mem, 0, bytes & ~(size_t)3, 0));
    const uint16_t zero = 0;
    if (bytes & 3)
        TRY(c->dev->api->write(c->stream, t->mem, bytes & ~(size_t)3, &zero, bytes & 3));
    return 0;
}

int tensor_copy(struct context *c, const struct tensor *to, const struct tensor *from)
{
    BUG_IF(tensor_bytes(to) != tensor_bytes(from) || to->dtype != from->dtype);
    if (c->dry || tensor_bytes(to) == 0)
        return 0;
    tensor_changed(to);
    return c->dev->api->copy(c->stream, to->mem, 0, from->mem, 0, tensor_bytes(to));
}
