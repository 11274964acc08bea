#include "runtime/tensor.h"
#include "runtime/profile.h"

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

// Before and after a transfer, for profiles.
static int begin(struct context *c)
{
    return c->profile ? profile_begin(c->profile) : 0;
}

static int end(struct context *c, const char *name, const struct tensor *a, const struct tensor *b)
{
    return c->profile ? profile_end(c->profile, name,
                                    (const struct mem *const[]){a->mem, b ? b->mem : NULL}, 2, 0)
                      : 0;
}

int tensor_write(struct context *c, const struct tensor *t, const void *host)
{
    if (c->dry || tensor_bytes(t) == 0)
        return 0;
    tensor_changed(t);
    TRY(begin(c));
    TRY(c->dev->api->write(c->stream, t->mem, 0, host, tensor_bytes(t)));
    return end(c, "write", t, NULL);
}

int tensor_read(struct context *c, const struct tensor *t, void *host)
{
    if (c->dry || tensor_bytes(t) == 0)
        return 0;
    TRY(begin(c));
    TRY(c->dev->api->read(c->stream, t->mem, 0, host, tensor_bytes(t)));
    return end(c, "read", t, NULL);
}

int tensor_zero(struct context *c, const struct tensor *t)
{
    size_t bytes = tensor_bytes(t);
    if (c->dry || bytes == 0)
        return 0;
    tensor_changed(t);
    TRY(begin(c));
    // fill() works in 4-byte words; an odd number of bf16 values leaves two bytes over
    TRY(c->dev->api->fill(c->stream, t->mem, 0, bytes & ~(size_t)3, 0));
    const uint16_t zero = 0;
    if (bytes & 3)
        TRY(c->dev->api->write(c->stream, t->mem, bytes & ~(size_t)3, &zero, bytes & 3));
    return end(c, "zero", t, NULL);
}

int tensor_copy(struct context *c, const struct tensor *to, const struct tensor *from)
{
    BUG_IF(tensor_bytes(to) != tensor_bytes(from) || to->dtype != from->dtype);
    if (c->dry || tensor_bytes(to) == 0)
        return 0;
    tensor_changed(to);
    TRY(begin(c));
    TRY(c->dev->api->copy(c->stream, to->mem, 0, from->mem, 0, tensor_bytes(to)));
    return end(c, "copy", to, from);
}
