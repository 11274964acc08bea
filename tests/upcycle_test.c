// Upcycled models answer as the dense ones do, and say what cannot be upcycled.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/upcycle.h"
#include "runtime/rng.h"

enum { IMAGES = 2 };

static const char *scratch(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", test_directory(), name);
    return path;
}

// The answer to fixed noise, for the caller to free.
static int answer(const char *path, const struct config_hints *hints, float **out, int64_t *count)
{
    struct device *dev = test_device(0);
    if (!dev)
        return SKIPPED;
    struct checkpoint file;
    struct dit *d;
    struct stream *stream;
    const struct dit_options options = {.batch = IMAGES};
    OK(checkpoint_open(path, hints, &file));
    OK(dev->api->stream_new(dev, &stream));
    OK(dit_new(dev, stream, &file.config, &options, &d));
    OK(dit_layout(d));
    OK(dit_commit(d));
    OK(checkpoint_load(&file, d, WEIGHTS_AUTO));
    const size_t n = (size_t)tensor_count(&d->input);
    float *x = malloc(n * sizeof *x);
    rng_normal_fill(1, 2, 0, x, n);
    OK(tensor_write(&d->ctx, &d->input, x));
    OK(tensor_write(&d->ctx, &d->t, (float[IMAGES]){0.3f, 0.8f}));
    OK(tensor_write(&d->ctx, &d->labels, (int32_t[IMAGES]){1, file.config.classes}));
    OK(dit_forward(d));
    *count = tensor_count(&d->output);
    *out = malloc((size_t)*count * sizeof **out);
    OK(tensor_read(&d->ctx, &d->output, *out));
    free(x);
    dit_free(d);
    dev->api->stream_free(stream);
    checkpoint_close(&file);
    return PASSED;
}

// A model of one SwiGLU expert and a shared one, with no weight zero.
static int write_one_expert(const char *path)
{
    struct device *dev = test_device(0);
    if (!dev)
        return SKIPPED;
    const struct config c = {.layers = 2,
                             .hidden = 16,
                             .heads = 2,
                             .patch = 2,
                             .channels = 3,
                             .size = 4,
                             .classes = 3,
                             .experts = 1,
                             .topk = 1,
                             .shared = 1,
                             .balance = 0.01f,
                             .class_dropout = 0.1f};
    struct stream *stream;
    struct dit *d;
    const struct dit_options options = {.batch = 1};
    OK(dev->api->stream_new(dev, &stream));
    OK(dit_new(dev, stream, &c, &options, &d));
    OK(dit_layout(d));
    OK(dit_commit(d));
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const size_t n = (size_t)param_count(p);
        float *host = malloc(n * sizeof *host);
        rng_normal_fill(3, (uint64_t)i, 0, host, n);
        for (size_t k = 0; k < n; k++)
            host[k] *= 0.3f;
        OK(param_write(&d->ctx, &d->w, p, host));
        free(host);
    }
    OK(checkpoint_save(path, d, NULL));
    dit_free(d);
    dev->api->stream_free(stream);
    return PASSED;
}

// The dense model and what it becomes give the same answer.
static int same_answer(const char *dense, const struct config_hints *hints,
                       const struct upcycle_options *o, enum weights_format format)
{
    const char *path = scratch(format == WEIGHTS_AS_TORCH ? "up.pt" : "up.safetensors");
    struct checkpoint from, made;
    float *a, *b;
    int64_t n, m;
    OK(checkpoint_open(dense, hints, &from));
    OK(upcycle_model(&from, WEIGHTS_AUTO, o, path, format));
    checkpoint_close(&from);
    OK(checkpoint_open(path, NULL, &made));
    CHECK(made.config.experts == o->experts && made.config.topk == o->topk &&
              made.config.renormalise,
          "the configuration");
    checkpoint_close(&made);
    int result = answer(dense, hints, &a, &n);
    if (result == PASSED)
        result = answer(path, NULL, &b, &m);
    if (result != PASSED)
        return result;
    double error = 0, most = 0;
    CHECK(n == m, "%lld numbers, not %lld", (long long)m, (long long)n);
    for (int64_t i = 0; i < n; i++) {
        error = fmax(error, fabs((double)a[i] - (double)b[i]));
        most = fmax(most, fabs((double)a[i]));
    }
    free(a), free(b);
    CHECK(most > 0.01, "the dense model answers nothing");
    CHECK(error <= 1e-5 * most, "the answer is off by %g of %g", error, most);
    return PASSED;
}

static const struct upcycle_options plain = {
    .experts = 4, .topk = 2, .shared = -1, .seed = 7, .dtype = -1};

static int test_plain(void)
{
    char dense[512];
    const struct config_hints hints = {2, 0, -1};
    snprintf(dense, sizeof dense, "%s/interop/dense.pt", TEST_DATA);
    struct upcycle_options rows[4] = {plain, plain, plain, plain};
    rows[1].shared = 2;
    rows[2].moe = MOE_ALTERNATE, rows[2].topk = 3;
    rows[3].topk = 4, rows[3].dtype = ST_F32;
    for (int i = 0; i < 4; i++) {
        int result = same_answer(dense, &hints, &rows[i],
                                 i == 1 ? WEIGHTS_AS_TORCH : WEIGHTS_AS_SAFETENSORS);
        CHECK(result == PASSED || result == SKIPPED, "row %d", i);
        if (result == SKIPPED)
            return SKIPPED;
    }
    return PASSED;
}

static int test_one_expert(void)
{
    const char *dense = scratch("one.safetensors");
    int result = write_one_expert(dense);
    return result == PASSED ? same_answer(dense, NULL, &plain, WEIGHTS_AS_SAFETENSORS) : result;
}

// The routers: N(0, 0.02), by the seed alone.
static int test_router(void)
{
    char dense[512];
    const struct config_hints hints = {2, 0, -1};
    struct checkpoint from;
    struct upcycle_options o = plain;
    static float gate[3][2][64 * 16];
    snprintf(dense, sizeof dense, "%s/interop/dense.pt", TEST_DATA);
    OK(checkpoint_open(dense, &hints, &from));
    o.experts = 64;
    for (int i = 0; i < 3; i++) {
        struct checkpoint made;
        o.seed = i == 2 ? 8 : 7;
        OK(upcycle_model(&from, WEIGHTS_AUTO, &o, scratch("gate.safetensors"),
                         WEIGHTS_AS_SAFETENSORS));
        OK(checkpoint_open(scratch("gate.safetensors"), NULL, &made));
        for (int l = 0; l < 2; l++) {
            const struct st_tensor *t;
            char name[64];
            snprintf(name, sizeof name, "blocks.%d.moe.gate.weight", l);
            OK(safetensors_expect(made.file, name, ST_F32, 2, (int64_t[]){64, 16}, &t));
            OK(safetensors_read_f32(made.file, t, gate[i][l], 0, t->count));
        }
        checkpoint_close(&made);
    }
    checkpoint_close(&from);
    double sum = 0, squares = 0;
    for (int k = 0; k < 64 * 16; k++)
        sum += (double)gate[0][0][k], squares += (double)gate[0][0][k] * (double)gate[0][0][k];
    CHECK(fabs(sum / 1024) < 0.0025 && fabs(sqrt(squares / 1024) - 0.02) < 0.002, "not N(0, 0.02)");
    CHECK(!memcmp(gate[0], gate[1], sizeof gate[0]), "the same seed, other routers");
    CHECK(memcmp(gate[0], gate[2], sizeof gate[0]), "another seed, the same routers");
    CHECK(memcmp(gate[0][0], gate[0][1], sizeof gate[0][0]), "two blocks have the same router");
    return PASSED;
}

static int refused(const char *path, const struct config_hints *hints,
                   const struct upcycle_options *o, const char *says)
{
    struct checkpoint from;
    OK(checkpoint_open(path, hints, &from));
    CHECK(upcycle_model(&from, WEIGHTS_AUTO, o, scratch("no.safetensors"),
                        WEIGHTS_AS_SAFETENSORS) == ERR_INPUT,
          "it is upcycled");
    CHECK(strstr(error_message(), says), "%s", error_message());
    checkpoint_close(&from);
    CHECK(checkpoint_open(scratch("no.safetensors"), NULL, &from) < 0, "a file was written");
    return PASSED;
}

static int test_refused(void)
{
    char dense[512], moe[512];
    const struct config_hints hints = {2, 0, -1};
    snprintf(dense, sizeof dense, "%s/interop/dense.pt", TEST_DATA);
    snprintf(moe, sizeof moe, "%s/golden/s_qkv/model.safetensors", TEST_DATA);
    struct upcycle_options one = plain, many = plain, nowhere = plain;
    one.topk = 1, many.topk = 5, nowhere.moe = MOE_NONE;
    CHECK(refused(dense, &hints, &one, "one active expert") == PASSED, "top-1");
    CHECK(refused(dense, &hints, &many, "5 active experts") == PASSED, "more than there are");
    CHECK(refused(dense, &hints, &nowhere, "in no block") == PASSED, "nowhere");
    return refused(moe, NULL, &plain, "has 4 experts already");
}

const struct test upcycle_tests[] = {{"plain", test_plain},
                                     {"one_expert", test_one_expert},
                                     {"router", test_router},
                                     {"refused", test_refused},
                                     {0}};
