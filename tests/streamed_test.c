// Experts at home in host memory: the same bits as with all on the device, in sampling and
// training; as few of them as memory asks for; and what is wrong told in one line.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/sampler.h"
#include "model/train.h"

enum { BATCH = 3, IMAGE = 16 * 16, LAYERS = 5 };
static const struct config tiny = {.layers = LAYERS,
                                   .hidden = 32,
                                   .heads = 2,
                                   .patch = 4,
                                   .channels = 1,
                                   .size = 16,
                                   .classes = 10,
                                   .experts = 4,
                                   .topk = 2,
                                   .shared = 1,
                                   .moe = MOE_ALL,
                                   .learn_sigma = true,
                                   .balance = 0.01f,
                                   .class_dropout = 0.1f};

static float value_of(int parameter, int64_t element)
{
    return 0.1f * sinf((float)(parameter * 31 + element * 7));
}

// All of them: what is zero at the start would hide most of the network.
static int set_weights(struct dit *d)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const int64_t n = param_count(p);
        float *host = malloc((size_t)n * sizeof *host);
        for (int64_t k = 0; k < n; k++)
            host[k] = value_of(i, k);
        int code = p->frozen ? 0 : param_write(&d->ctx, &d->w, p, host);
        free(host);
        OK(code);
    }
    return PASSED;
}

// How many values differ between two models in one of their parts.
static int differ(struct dit *a, struct weights *of_a, struct dit *b, struct weights *of_b,
                  int64_t *count)
{
    *count = 0;
    for (int i = 0; i < a->params.count; i++) {
        const struct param *p = &a->params.list[i];
        const int64_t n = param_count(p);
        float *x = malloc(2 * (size_t)n * sizeof *x), *y = x + n;
        int code = p->frozen ? 0 : param_read(&a->ctx, of_a, p, x);
        if (code >= 0 && !p->frozen)
            code = param_read(&b->ctx, of_b, &b->params.list[i], y);
        for (int64_t k = 0; k < n && !p->frozen; k++)
            *count += memcmp(&x[k], &y[k], sizeof *x) != 0;
        free(x);
        OK(code);
    }
    return PASSED;
}

// ---- sampling -----------------------------------------------------------------------------------

static int sample(struct device *dev, const struct config *c, int blocks, uint64_t limit,
                  float *latents, int *streamed)
{
    static const int32_t classes[BATCH] = {3, 9, 0};
    const struct sample_options o = {.steps = 4,
                                     .cfg = 1.5f,
                                     .seed = 11,
                                     .limit = limit,
                                     .pack = true,
                                     .offload = {.blocks = blocks}};
    struct stream *stream;
    struct sampler *s;
    double waited;
    OK(dev->api->stream_new(dev, &stream));
    OK(sampler_new(dev, stream, c, 2, &o, &s)); // of three images in two batches
    *streamed = streamed_figures(s->dit).blocks;
    OK(dit_init(s->dit, 7));
    CHECK(set_weights(s->dit) == PASSED, "weights");
    const uint64_t before = dev->allocations;
    OK(sampler_run(s, BATCH, classes, NULL, latents, NULL, NULL));
    CHECK(dev->allocations == before, "%d allocations while sampling",
          (int)(dev->allocations - before));
    OK(streamed_waited(s->dit, &waited));
    CHECK(waited >= 0 && waited < 60, "waited %g s", waited);
    sampler_free(s);
    dev->api->stream_free(stream);
    return PASSED;
}

static int samples_alike(unsigned flags, const struct config *c)
{
    float plain[BATCH * IMAGE], streamed[BATCH * IMAGE];
    struct device *dev = test_device(flags);
    int blocks;
    if (!dev)
        return SKIPPED;
    CHECK(sample(dev, c, 0, 0, plain, &blocks) == PASSED && blocks == 0, "on the device");
    CHECK(isfinite(plain[0]) && plain[0] != 0, "%g", (double)plain[0]);
    for (int n = 1; n <= LAYERS; n++) {
        memset(streamed, 0, sizeof streamed);
        CHECK(sample(dev, c, n, 0, streamed, &blocks) == PASSED, "%d blocks", n);
        CHECK(blocks == n || c->moe != MOE_ALL, "%d blocks, %d asked for", blocks, n);
        CHECK(memcmp(plain, streamed, sizeof plain) == 0, "%d blocks: not the same bits", n);
    }
    return PASSED;
}

static int sampling(void)
{
    return samples_alike(0, &tiny);
}

static int sampling_bf16(void)
{
    return samples_alike(OPEN_BF16, &tiny);
}

static int sampling_gpu_forms(void)
{
    struct config c = tiny;
    c.moe = MOE_ALTERNATE;
    c.shared = 0;
    return samples_alike(OPEN_GPU_FORMS, &c);
}

static int sampling_gelu(void)
{
    struct config c = tiny;
    c.expert = EXPERT_GELU;
    return samples_alike(0, &c);
}

// As few as memory asks for: with one byte less than a plan takes, more blocks; with less than the
// buffers of all take, one line.
static int automatic(void)
{
    float plain[BATCH * IMAGE], streamed[BATCH * IMAGE];
    struct device *dev = test_device(0);
    struct stream *stream;
    uint64_t need[LAYERS + 1];
    int blocks;
    if (!dev)
        return SKIPPED;
    OK(dev->api->stream_new(dev, &stream));
    struct sample_options o = {.steps = 4, .cfg = 1.5f, .seed = 11};
    for (int n = 0; n <= LAYERS; n++) {
        struct sampler *s;
        o.offload.blocks = n;
        OK(sampler_new(dev, stream, &tiny, 2, &o, &s));
        need[n] = plan_total(s->dit->plan);
        sampler_free(s);
    }
    CHECK(need[LAYERS] < need[3] && need[3] < need[0], "no memory is saved");
    CHECK(sample(dev, &tiny, 0, 0, plain, &blocks) == PASSED, "on the device");
    CHECK(sample(dev, &tiny, OFFLOAD_AUTO, need[0], streamed, &blocks) == PASSED && blocks == 0,
          "all fits, but %d are streamed", blocks);
    for (int n = 3; n <= LAYERS; n++) {
        CHECK(sample(dev, &tiny, OFFLOAD_AUTO, need[n], streamed, &blocks) == PASSED && blocks == n,
              "%d blocks, not %d", blocks, n);
        CHECK(memcmp(plain, streamed, sizeof plain) == 0, "%d blocks: not the same bits", n);
    }
    struct sampler *none;
    o.offload.blocks = OFFLOAD_AUTO;
    o.limit = need[LAYERS] - 1;
    CHECK(sampler_new(dev, stream, &tiny, 2, &o, &none) == ERR_NOMEM, "too little is enough");
    CHECK(strstr(error_message(), "MiB for it"), "%s", error_message());
    dev->api->stream_free(stream);
    return PASSED;
}

// ---- training -----------------------------------------------------------------------------------

static int train(struct device *dev, struct stream *stream, const struct config *c,
                 struct train_options o, int blocks, struct trainer **out, double *loss)
{
    float images[BATCH * IMAGE];
    int32_t labels[BATCH];
    struct train_report report;
    bool done;
    o.batch = BATCH;
    o.seed = 5;
    o.offload.blocks = blocks;
    OK(trainer_new(dev, stream, c, &o, out));
    OK(trainer_commit(*out));
    OK(dit_init((*out)->dit, 7));
    CHECK(set_weights((*out)->dit) == PASSED, "weights");
    OK(dit_copy_ema((*out)->dit));
    const uint64_t before = dev->allocations;
    for (int i = 0; i < 4 * o.accumulate; i++) {
        for (int k = 0; k < BATCH * IMAGE; k++)
            images[k] = sinf((float)(i * 1000 + k));
        for (int n = 0; n < BATCH; n++)
            labels[n] = (int32_t)((i + n) % 10);
        OK(trainer_micro(*out, images, labels, &done));
    }
    CHECK(dev->allocations == before, "%d allocations", (int)(dev->allocations - before));
    OK(trainer_report(*out, &report));
    *loss = report.loss;
    CHECK(isfinite(*loss) && !report.skipped, "loss %g", *loss);
    return PASSED;
}

static int same_training(struct trainer *a, struct trainer *b)
{
    struct dit *x = a->dit, *y = b->dit;
    struct {
        const char *name;
        struct weights *of_x, *of_y;
    } parts[] = {{"weights", &x->w, &y->w},
                 {"gradients", &x->g, &y->g},
                 {"first moments", &x->m, &y->m},
                 {"second moments", &x->v, &y->v},
                 {"EMA", &x->ema, &y->ema}};
    for (int i = 0; i < 5; i++) {
        int64_t count;
        if (i == 1 && (a->options.accumulate == 1 || x->half))
            continue; // they lie among the activations, which the update uses
        CHECK(differ(x, parts[i].of_x, y, parts[i].of_y, &count) == PASSED, "%s", parts[i].name);
        CHECK(count == 0, "%s: %lld values differ", parts[i].name, (long long)count);
    }
    return PASSED;
}

static int trains_alike(unsigned flags, const struct config *c, struct train_options o)
{
    struct device *dev = test_device(flags);
    struct stream *stream;
    struct trainer *plain, *streamed;
    double loss, other;
    if (!dev)
        return SKIPPED;
    OK(dev->api->stream_new(dev, &stream));
    CHECK(train(dev, stream, c, o, 0, &plain, &loss) == PASSED, "on the device");
    for (int n = 1; n <= LAYERS; n += 2) {
        CHECK(train(dev, stream, c, o, n, &streamed, &other) == PASSED, "%d blocks", n);
        CHECK(loss == other, "%d blocks: loss %.9g, not %.9g", n, other, loss);
        CHECK(same_training(plain, streamed) == PASSED, "%d blocks", n);
        trainer_free(streamed);
    }
    trainer_free(plain);
    dev->api->stream_free(stream);
    return PASSED;
}

static int training(void)
{
    return trains_alike(0, &tiny, train_defaults());
}

static int training_bf16(void)
{
    struct config c = tiny;
    c.expert = EXPERT_GELU;
    return trains_alike(OPEN_BF16, &c, train_defaults());
}

static int training_gpu_forms(void)
{
    return trains_alike(OPEN_GPU_FORMS | OPEN_BF16, &tiny, train_defaults());
}

static int accumulating(void)
{
    struct train_options o = train_defaults();
    o.accumulate = 3;
    o.recompute = true;
    return trains_alike(0, &tiny, o);
}

// The clipped norm is a sum in another order.
static int clipping(void)
{
    struct device *dev = test_device(0);
    struct stream *stream;
    struct trainer *plain, *streamed;
    struct train_options o = train_defaults();
    double loss, other;
    if (!dev)
        return SKIPPED;
    o.adamw.clip = 0.01f;
    OK(dev->api->stream_new(dev, &stream));
    CHECK(train(dev, stream, &tiny, o, 0, &plain, &loss) == PASSED, "on the device");
    CHECK(train(dev, stream, &tiny, o, 4, &streamed, &other) == PASSED, "streamed");
    CHECK(fabs(loss - other) <= 1e-6 * fabs(loss), "loss %.9g, not %.9g", other, loss);
    trainer_free(plain), trainer_free(streamed);
    dev->api->stream_free(stream);
    return PASSED;
}

// ---- what is wrong ------------------------------------------------------------------------------

static int too_little_host_memory(void)
{
    struct device *dev = test_device(0);
    struct stream *stream;
    struct trainer *t;
    struct train_options o = train_defaults();
    if (!dev)
        return SKIPPED;
    o.batch = BATCH;
    o.offload.blocks = 4;
    OK(dev->api->stream_new(dev, &stream));
    OK(trainer_new(dev, stream, &tiny, &o, &t));
    const struct streamed_figures f = streamed_figures(t->dit);
    CHECK(f.blocks == 4 && f.experts == 16 && f.host > 0 && f.in > 0 && f.out > 0, "figures");
    setenv("DITMOE_HOST_MEMORY", "1000000", 1);
    CHECK(trainer_commit(t) == ERR_NOMEM && strstr(error_message(), "are missing"), "%s",
          error_message());
    unsetenv("DITMOE_HOST_MEMORY");
    trainer_free(t);
    o.early = true;
    CHECK(trainer_new(dev, stream, &tiny, &o, &t) == ERR_INPUT, "early updates");
    dev->api->stream_free(stream);
    return PASSED;
}

const struct test streamed_tests[] = {
    {"sampling", sampling},
    {"sampling_bf16", sampling_bf16},
    {"sampling_gpu_forms", sampling_gpu_forms},
    {"sampling_gelu", sampling_gelu},
    {"automatic", automatic},
    {"training", training},
    {"training_bf16", training_bf16},
    {"training_gpu_forms", training_gpu_forms},
    {"accumulating", accumulating},
    {"clipping", clipping},
    {"too_little_host_memory", too_little_host_memory},
    {0},
};
