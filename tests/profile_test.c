// Profiles: which operations are noted, with what work, and that times add up.
#include "tests/test.h"

#include <string.h>

#include "runtime/ops.h"
#include "runtime/profile.h"

enum { M = 96, D = 64, O = 128 };

struct scene {
    struct context c;
    struct tensor x, y, w, z;
};

static int matrix(struct scene *s, struct tensor *t, enum dtype type, int64_t rows, int64_t columns)
{
    *t = (struct tensor){.dtype = type, .ndim = 2, .shape = {rows, columns}};
    TRY(s->c.dev->api->alloc(s->c.dev, tensor_bytes(t), &t->mem));
    return s->c.dev->api->fill(s->c.stream, t->mem, 0, tensor_bytes(t), 0x3f803f80);
}

static int open_scene(struct scene *s, struct device *dev)
{
    *s = (struct scene){.c.dev = dev};
    TRY(dev->api->stream_new(dev, &s->c.stream));
    TRY(matrix(s, &s->x, dev->act, M, D));
    TRY(matrix(s, &s->y, dev->act, M, O));
    TRY(matrix(s, &s->w, F32, O, D));
    TRY(matrix(s, &s->z, dev->act, M, D));
    s->c.dry = true;
    TRY(op_linear(&s->c, &s->y, &s->x, &s->w, NULL));
    s->c.dry = false;
    if (s->c.space_wanted)
        TRY(matrix(s, &s->c.space, F32, 1, (int64_t)(s->c.space_wanted + 3) / 4));
    return 0;
}

static void close_scene(struct scene *s)
{
    const struct backend *api = s->c.dev->api;
    api->free(s->x.mem);
    api->free(s->y.mem);
    api->free(s->w.mem);
    api->free(s->z.mem);
    if (s->c.space.mem)
        api->free(s->c.space.mem);
    api->stream_free(s->c.stream);
}

static int run(struct scene *s)
{
    TRY(tensor_zero(&s->c, &s->y));
    profile_layer(&s->c, 3);
    TRY(op_linear(&s->c, &s->y, &s->x, &s->w, NULL));
    TRY(op_silu_fwd(&s->c, &s->x, &s->x));
    return tensor_copy(&s->c, &s->z, &s->x);
}

static int check(const struct profile *p, enum dtype act)
{
    const double size = (double)dtype_size(act);
    const struct {
        const char *name;
        double bytes, flops;
        int layer;
    } wanted[] = {
        {"zero", M * O * size, 0, -1},
        {"gemm nt 96x128x64", (M * D + M * O) * size + O * D * 4, 2.0 * M * O * D, 3},
        {"silu_fwd", M * D * size, 0, 3}, // in place: one operand
        {"copy", 2 * M * D * size, 0, 3},
    };
    double sum = 0, end = 0;
    CHECK(p->count == 4, "%d operations", p->count);
    for (int i = 0; i < p->count; i++) {
        const struct profile_op *op = &p->list[i];
        CHECK(!strncmp(op->name, wanted[i].name, strlen(wanted[i].name)), "%d is %s", i, op->name);
        CHECK(op->bytes == wanted[i].bytes && op->flops == wanted[i].flops &&
                  op->layer == wanted[i].layer,
              "%s: %g bytes, %g flops, layer %d", op->name, op->bytes, op->flops, op->layer);
        CHECK(op->seconds >= 0 && op->start >= end - 1e-5, "%s from %g for %g s", op->name,
              op->start, op->seconds);
        sum += op->seconds;
        end = op->start + op->seconds;
    }
    CHECK(sum > 0 && sum <= p->span + 1e-5 && p->span < 60, "%g s in %g s", sum, p->span);
    return PASSED;
}

static int test_notes(void)
{
    struct device *dev = test_device(0);
    struct scene s;
    struct profile *p;
    CHECK(dev, "no device");
    OK(open_scene(&s, dev));
    OK(run(&s));
    OK(profile_new(&s.c, &p));
    CHECK(!s.c.profile, "noted before the start");
    for (int round = 0; round < 2; round++) { // and again with the same events
        OK(profile_start(p));
        OK(run(&s));
        OK(profile_stop(p));
        OK(run(&s)); // not noted
        int result = check(p, dev->act);
        if (result != PASSED)
            return result;
    }
    profile_free(p);
    close_scene(&s);
    return PASSED;
}

static int test_many(void) // more than the first room for events
{
    enum { COUNT = 1500 };
    struct device *dev = test_device(0);
    struct scene s;
    struct profile *p;
    CHECK(dev, "no device");
    OK(open_scene(&s, dev));
    OK(profile_new(&s.c, &p));
    OK(profile_start(p));
    for (int i = 0; i < COUNT; i++)
        OK(op_silu_fwd(&s.c, &s.x, &s.x));
    OK(profile_stop(p));
    CHECK(p->count == COUNT, "%d", p->count);
    for (int i = 1; i < COUNT; i++)
        CHECK(p->list[i].start >= p->list[i - 1].start, "operation %d", i);
    profile_free(p);
    close_scene(&s);
    return PASSED;
}

static int test_names(void)
{
    for (int op = 0; op < ACCELERATE_COUNT; op++)
        CHECK(accelerated_name((enum accelerated)op), "operation %d has no name", op);
    return PASSED;
}

const struct test profile_tests[] = {
    {"notes", test_notes},
    {"many", test_many},
    {"names", test_names},
    {0},
};
