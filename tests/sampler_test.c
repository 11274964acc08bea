// The sampler of the model against the rules of model/schedule.h by hand: ordinary forward passes,
// and updates in double.
#include "model/sampler.h"
#include "runtime/rng.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct config small = {.layers = 1,
                                    .hidden = 32,
                                    .heads = 2,
                                    .patch = 4,
                                    .channels = 4,
                                    .size = 8,
                                    .classes = 3,
                                    .experts = 2,
                                    .topk = 2,
                                    .shared = 1,
                                    .moe = MOE_ALL,
                                    .learn_sigma = true,
                                    .balance = 0.01f,
                                    .class_dropout = 0.1f};
// More images than fit into the conditioning of all passes at once.
enum { IMAGES = 150, IMAGE = 4 * 8 * 8, OUT = 2 * IMAGE, MODEL_STEPS = 4 };

// The initial network answers zero.
static int randomise(struct dit *d)
{
    OK(dit_init(d, 7));
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const int64_t count = param_count(p);
        float *values = malloc((size_t)count * sizeof *values);
        rng_normal_fill(7, (uint64_t)i, 0, values, (size_t)count);
        for (int64_t j = 0; j < count; j++)
            values[j] *= 0.2f;
        int code = p->frozen ? 0 : param_write(&d->ctx, &d->w, p, values);
        free(values);
        OK(code);
    }
    return PASSED;
}

struct by_hand {
    float noise[MODEL_STEPS][IMAGES * IMAGE]; // of the passes
    float input[2 * IMAGES * IMAGE], output[2 * IMAGES * OUT], t[2 * IMAGES];
    double z[IMAGES * IMAGE], kept[IMAGES * IMAGE];
};

static int evaluate(struct dit *d, struct by_hand *h, double t)
{
    for (int i = 0; i < 2 * IMAGES * IMAGE; i++)
        h->input[i] = (float)h->z[i % (IMAGES * IMAGE)];
    for (int n = 0; n < 2 * IMAGES; n++)
        h->t[n] = (float)t;
    OK(tensor_write(&d->ctx, &d->input, h->input));
    OK(tensor_write(&d->ctx, &d->t, h->t));
    OK(dit_forward(d));
    OK(tensor_read(&d->ctx, &d->output, h->output));
    return PASSED;
}

// Value j after pass p; see op_sample_step().
static void step_by_hand(const struct sample_options *o, const struct pass *p, bool inside,
                         int pass, struct by_hand *h, int j)
{
    const int n = j / IMAGE, at = j % IMAGE, channel = at / 64;
    const bool guided = inside && (!o->cfg_channels || channel < o->cfg_channels);
    const double with = h->output[n * OUT + at], without = h->output[(IMAGES + n) * OUT + at];
    const double z = h->z[j], w = h->output[n * OUT + IMAGE + at];
    double v = guided ? without + o->cfg * (with - without) : with;
    if (p->clip_v != 0)
        v = fmax(-1, fmin(1, p->clip_z * z + p->clip_v * v));
    h->z[j] = p->z * z + p->v * v + (p->kept != 0 ? p->kept * h->kept[j] : 0);
    if (p->noise != 0)
        h->z[j] += p->noise * exp(p->spread * (w + 1)) * (double)h->noise[pass][j];
    h->kept[j] = p->keep_z * z + p->keep_v * v;
}

// What sampler_run() should draw: each pass with an ordinary forward pass, in double.
static int draw_by_hand(struct dit *d, const struct config *c, const struct sample_options *o,
                        struct by_hand *h)
{
    struct schedule way;
    OK(sampler_schedule(c, o, &way));
    for (int i = 0; i < schedule_passes(&way); i++) {
        const struct pass p = schedule_pass(&way, i);
        const double t = c->diffusion == DIFFUSION_DDPM ? p.t / 1000 : p.t;
        const bool inside = !o->interval || (t >= o->cfg_from && t <= o->cfg_to);
        CHECK(evaluate(d, h, p.t) == PASSED, "pass %d", i);
        for (int j = 0; j < IMAGES * IMAGE; j++)
            step_by_hand(o, &p, inside, i, h, j);
    }
    return PASSED;
}

static double difference(const float *found, const double *want)
{
    double error = 0, size = 0;
    for (int i = 0; i < IMAGES * IMAGE; i++) {
        error += pow(found[i] - want[i], 2);
        size += want[i] * want[i];
    }
    return sqrt(error / size); // NaN is no number that passes
}

// The sampler's progress counts steps, whatever they take.
static int count_steps(void *user, int done, int total)
{
    int *count = user;
    return ++*count == done && total == 2 * MODEL_STEPS ? 0
                                                        : fail(ERR_INPUT, "%d of %d", done, total);
}

static void fill_noise(struct by_hand *h, float *start, const struct sample_options *o, bool given)
{
    for (int i = 0; i < IMAGES * IMAGE; i++)
        h->z[i] = start[i] = 1.5f * sinf((float)(i * i % 10007));
    for (int pass = 0; pass < MODEL_STEPS; pass++)
        for (int i = 0; i < IMAGES * IMAGE; i++)
            h->noise[pass][i] =
                given
                    ? cosf((float)(i * (pass + 3) % 1009))
                    : rng_normal(o->seed,
                                 rng_stream(RNG_STEP, (uint64_t)pass << 32) + (uint64_t)(i / IMAGE),
                                 (uint64_t)(i % IMAGE));
}

static int draw_both(struct device *dev, struct stream *stream, struct dit *plain,
                     const struct config *c, const struct sample_options *o, bool given,
                     struct by_hand *h, float *latents)
{
    static int32_t classes[IMAGES], labels[2 * IMAGES];
    static float start[IMAGES * IMAGE];
    struct sampler *s;
    int done = 0;
    fill_noise(h, start, o, given);
    for (int n = 0; n < IMAGES; n++) {
        classes[n] = labels[n] = n % small.classes;
        labels[IMAGES + n] = small.classes;
    }
    const struct sample_noise noise = {start, given ? h->noise[0] : NULL};
    OK(tensor_write(&plain->ctx, &plain->labels, labels));
    CHECK(draw_by_hand(plain, c, o, h) == PASSED, "by hand");
    OK(sampler_new(dev, stream, c, IMAGES - 10, o, &s)); // the last batch is not full
    CHECK(randomise(s->dit) == PASSED, "weights");
    CHECK(o->cfg == 1 || s->dit->options.ahead < s->passes, "all passes are conditioned at once");
    OK(sampler_run(s, 2, classes, &noise, latents, NULL, NULL)); // leaves something kept behind
    OK(sampler_run(s, IMAGES, classes, &noise, latents, count_steps, &done));
    sampler_free(s);
    CHECK(done == 2 * MODEL_STEPS, "%d steps", done);
    return PASSED;
}

// Every sampler of both families, every kind of guidance, noise from a file and drawn.
static const struct {
    enum diffusion family;
    bool given;
    struct sample_options o;
} ways[] = {
    {DIFFUSION_RF, true, {.kind = SAMPLER_EULER, .cfg = 1}},
    {DIFFUSION_RF, true, {.kind = SAMPLER_EULER, .cfg = 3}},
    {DIFFUSION_RF, true, {.kind = SAMPLER_HEUN, .cfg = 3, .cfg_channels = 3}},
    {DIFFUSION_RF, true, {.kind = SAMPLER_DPM, .cfg = 3}},
    {DIFFUSION_RF,
     true,
     {.kind = SAMPLER_DPM, .cfg = 3, .interval = true, .cfg_from = 0.5f, .cfg_to = 0.75f}},
    {DIFFUSION_RF, true, {.kind = SAMPLER_DDIM, .cfg = 3, .eta = 0.6f}},
    {DIFFUSION_RF, false, {.kind = SAMPLER_DDPM, .cfg = 3, .seed = 5}},
    {DIFFUSION_DDPM, true, {.kind = SAMPLER_DDPM, .cfg = 1}},
    {DIFFUSION_DDPM, true, {.kind = SAMPLER_DDPM, .cfg = 3, .cfg_channels = 3}},
    {DIFFUSION_DDPM, false, {.kind = SAMPLER_DDPM, .cfg = 3, .seed = 5, .clip = true}},
    {DIFFUSION_DDPM, true, {.kind = SAMPLER_DDIM, .cfg = 3, .cfg_channels = 3}},
    {DIFFUSION_DDPM, false, {.kind = SAMPLER_DDIM, .cfg = 3, .eta = 0.6f, .seed = 5}},
    {DIFFUSION_DDPM,
     true,
     {.kind = SAMPLER_HEUN, .cfg = 3, .interval = true, .cfg_from = 0.2f, .cfg_to = 0.7f}},
    {DIFFUSION_DDPM, true, {.kind = SAMPLER_DPM, .cfg = 3, .respacing = "ddim4"}},
};
enum { WAYS = sizeof ways / sizeof ways[0] };

static int draw_all(struct device *dev, struct stream *stream, struct dit *plain)
{
    static struct by_hand hand;
    static float found[WAYS][IMAGES * IMAGE];
    for (int i = 0; i < WAYS; i++) {
        struct sample_options o = ways[i].o;
        struct config c = small;
        c.diffusion = ways[i].family;
        o.steps = MODEL_STEPS;
        CHECK(draw_both(dev, stream, plain, &c, &o, ways[i].given, &hand, found[i]) == PASSED,
              "way %d", i);
        const double error = difference(found[i], hand.z);
        CHECK(error < 1e-4, "way %d: differs by %g", i, error);
        for (int other = 0; other < i; other++) { // no two ways lead to the same images
            const double gap = difference(found[other], hand.z);
            CHECK(gap > 1e-3, "%d and %d differ by %g only", i, other, gap);
        }
    }
    return PASSED;
}

static int model_follows(void)
{
    const struct dit_options o = {.batch = 2 * IMAGES};
    struct device *dev = test_device(0);
    struct stream *stream;
    struct dit *plain;
    if (!dev)
        return SKIPPED;
    OK(dev->api->stream_new(dev, &stream));
    OK(dit_new(dev, stream, &small, &o, &plain));
    OK(dit_layout(plain));
    OK(dit_commit(plain));
    CHECK(randomise(plain) == PASSED, "weights");
    int result = draw_all(dev, stream, plain);
    dit_free(plain);
    dev->api->stream_free(stream);
    return result;
}

const struct test sampler_tests[] = {
    {"model_follows", model_follows},
    {0},
};
