// The model above its operations: counts, configuration errors, and what training promises:
// accumulation, recompute, resume and skipped steps are exact; nothing is allocated while it runs.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint.h"
#include "model/sampler.h"
#include "model/train.h"

static const struct config tiny = {.layers = 2, .hidden = 32, .heads = 2, .patch = 4, .channels = 1,
                                   .size = 16, .classes = 10, .experts = 4, .topk = 2, .shared = 2,
                                   .moe = MOE_ALL, .learn_sigma = true, .balance = 0.01f,
                                   .class_dropout = 0.1f};
enum { BATCH = 3, IMAGE = 16 * 16 };

struct rig {
    struct stream *stream;
    struct trainer *t;
};

static int open_rig(struct rig *r, unsigned flags, const struct config *c, struct train_options o)
{
    struct device *dev = test_device(flags);
    if (!dev)
        return SKIPPED;
    o.batch = BATCH;
    o.seed = 5;
    OK(dev->api->stream_new(dev, &r->stream));
    OK(trainer_new(dev, r->stream, c, &o, &r->t));
    OK(trainer_commit(r->t));
    OK(dit_init(r->t->dit, 7));
    return PASSED;
}

static void close_rig(struct rig *r)
{
    struct device *dev = r->t ? r->t->dit->ctx.dev : NULL;
    trainer_free(r->t);
    if (dev)
        dev->api->stream_free(r->stream);
}

// Weights that are zero at the start (adaLN, head) would hide most of the network: randomise all.
static int randomise(struct dit *d)
{
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        const int64_t n = param_count(p);
        float *host = malloc((size_t)n * sizeof *host);
        for (int64_t k = 0; k < n; k++)
            host[k] = 0.1f * sinf((float)(i * 31 + k * 7));
        int code = p->frozen ? 0 : param_write(&d->ctx, &d->w, p, host);
        free(host);
        OK(code);
    }
    return PASSED;
}

static void fill_batch(int64_t step, float *images, int32_t *labels)
{
    for (int i = 0; i < BATCH * IMAGE; i++)
        images[i] = sinf((float)(step * 1000 + i));
    for (int n = 0; n < BATCH; n++)
        labels[n] = (int32_t)((step + n) % 10);
}

static int train_steps(struct trainer *t, int64_t steps)
{
    float images[BATCH * IMAGE];
    int32_t labels[BATCH];
    bool done;
    for (int64_t end = t->step + steps; t->step < end;) {
        fill_batch(t->step * t->options.accumulate + t->micro, images, labels);
        OK(trainer_micro(t, images, labels, &done));
    }
    return PASSED;
}

static float *read_slab(struct dit *d, enum plan_class class, int64_t *count)
{
    const struct tensor *slabs;
    BUG_IF(plan_slabs(d->plan, class, &slabs) != 1);
    *count = tensor_count(&slabs[0]);
    float *host = malloc(tensor_bytes(&slabs[0]));
    return tensor_read(&d->ctx, &slabs[0], host) < 0 ? NULL : host;
}

static int same_slab(struct dit *a, struct dit *b, enum plan_class class)
{
    int64_t n, m;
    float *x = read_slab(a, class, &n), *y = read_slab(b, class, &m);
    CHECK(x && y && n == m, "%s", error_message());
    int64_t differ = 0;
    for (int64_t i = 0; i < n; i++)
        differ += memcmp(&x[i], &y[i], sizeof *x) != 0;
    free(x), free(y);
    CHECK(differ == 0, "%s: %lld of %lld values differ", plan_class_name(class), (long long)differ,
          (long long)n);
    return PASSED;
}

// ---- configuration ------------------------------------------------------------------------------

static int counts(void)
{
    static const struct {
        const char *name;
        int64_t total, active;
        double macs, attention;
    } rows[] = {
        {"S/2-8E2A", 199307552, 71905568, 15.43, 16.03},
        {"S/2-16E2A", 369213728, 71942432, 15.44, 16.04},
        {"B/2-8E2A", 795861536, 286253600, 61.68, 62.89},
        {"L/2-8E2A", 2823764000, 1011824672, 219.3, 222.5},
        {"XL/2-8E2A", 4168172192, 1492730528, 323.7, 328.0},
        {"G/2-16E2A", 16503731232, 3181573152, 690.9, 698.3},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct config c;
        OK(config_preset(rows[i].name, &c));
        struct config_counts n = config_count(&c);
        CHECK(n.total == rows[i].total, "%s: %lld parameters", rows[i].name, (long long)n.total);
        CHECK(n.active == rows[i].active, "%s: %lld active", rows[i].name, (long long)n.active);
        double digits = rows[i].macs > 100 ? 0.05 : 0.005; // as many as the paper prints
        CHECK(fabs(n.macs / 1e9 - rows[i].macs) <= digits, "%s: %g GMAC", rows[i].name, n.macs / 1e9);
        CHECK(fabs((n.macs + n.macs_attention) / 1e9 - rows[i].attention) <= digits, "%s: %g GMAC",
              rows[i].name, (n.macs + n.macs_attention) / 1e9);
    }
    return PASSED;
}

static int counts_match_table(void) // config_count() against the parameter table, all kinds
{
    for (int m = MOE_ALL; m <= MOE_NONE; m++)
        for (int bits = 0; bits < 8; bits++) {
            struct config c = tiny;
            c.layers = 5;
            c.moe = (enum moe_blocks)m;
            c.qk_norm = bits & 1, c.learn_sigma = bits & 2, c.shared = bits & 4 ? 0 : 4;
            c.class_dropout = bits & 1 ? 0 : 0.1f;
            struct params p;
            OK(params_new(&c, &p));
            int64_t sum = 0;
            for (int i = 0; i < p.count; i++)
                sum += param_count(&p.list[i]);
            params_free(&p);
            CHECK(sum == config_count(&c).total, "%s: %lld in the table", moe_blocks_name(c.moe),
                  (long long)sum);
        }
    return PASSED;
}

static int refusals(void)
{
    static const char *const names[] = {"", "S", "S/3", "Q/2", "S/2-8E", "S/2-8E2Ax", "S/2-2E4A", "s/2"};
    struct config c;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        CHECK(config_preset(names[i], &c) == ERR_INPUT, "preset '%s' was taken", names[i]);
#define REFUSED(field, value)                                                                      \
    c = tiny;                                                                                      \
    c.field = value;                                                                               \
    CHECK(config_check(&c) == ERR_INPUT, #field " = " #value " was taken")
    REFUSED(topk, 5);
    REFUSED(heads, 3);
    REFUSED(patch, 3);
    REFUSED(hidden, 30);
    REFUSED(layers, 0);
    REFUSED(experts, 0);
    REFUSED(balance, NAN);
    REFUSED(class_dropout, 1);
#undef REFUSED
    return PASSED;
}

static int json_round_trip(void)
{
    struct config a = tiny, b;
    a.moe = MOE_DEEP, a.renormalise = true, a.balance = 0.005f, a.diffusion = DIFFUSION_DDPM;
    json_t *j = config_to_json(&a);
    OK(config_from_json(j, &b));
    CHECK(config_equal(&a, &b), "the configuration changed on its way through JSON");
    json_object_del(j, "diffusion"); // as files were before there was a choice
    OK(config_from_json(j, &b));
    CHECK(b.diffusion == DIFFUSION_RF && !config_equal(&a, &b), "a file that does not say is rf");
    json_object_set_new(j, "diffusion", json_string("edm"));
    CHECK(config_from_json(j, &b) == ERR_INPUT, "diffusion 'edm' was taken");
    json_decref(j);
    return PASSED;
}

// ---- training -----------------------------------------------------------------------------------

static int no_allocation(void)
{
    struct rig r = {0};
    int result = open_rig(&r, 0, &tiny, train_defaults());
    if (result == PASSED)
        result = train_steps(r.t, 1);
    uint64_t before = r.t ? r.t->dit->ctx.dev->allocations : 0;
    if (result == PASSED)
        result = train_steps(r.t, 3);
    uint64_t after = r.t ? r.t->dit->ctx.dev->allocations : 0;
    close_rig(&r);
    CHECK(before == after, "%d allocations in three steps", (int)(after - before));
    return result;
}

static int recompute_is_exact(void)
{
    struct config c = tiny;
    c.layers = 4, c.moe = MOE_ALTERNATE, c.qk_norm = true;
    struct rig keep = {0}, again = {0};
    struct train_options o = train_defaults();
    int result = open_rig(&keep, 0, &c, o);
    o.recompute = true;
    if (result == PASSED)
        result = open_rig(&again, 0, &c, o);
    if (result == PASSED)
        result = randomise(keep.t->dit) + randomise(again.t->dit);
    if (result == PASSED)
        result = train_steps(keep.t, 2) + train_steps(again.t, 2);
    if (result == PASSED)
        result = same_slab(keep.t->dit, again.t->dit, PLAN_WEIGHTS);
    if (result == PASSED &&
        plan_total(again.t->dit->plan) >= plan_total(keep.t->dit->plan)) {
        printf("    recompute plans no less memory\n");
        result = FAILED;
    }
    close_rig(&keep), close_rig(&again);
    return result;
}

// Updating each block at the end of its backward pass is the same step in less memory.
static int early_updates(unsigned flags)
{
    struct config c = tiny;
    c.layers = 4, c.moe = MOE_ALTERNATE, c.qk_norm = true;
    struct rig late = {0}, early = {0};
    struct train_options o = train_defaults();
    int result = open_rig(&late, flags, &c, o);
    o.early = true;
    if (result == PASSED)
        result = open_rig(&early, flags, &c, o);
    if (result != PASSED)
        return result;
    CHECK(randomise(late.t->dit) == PASSED && randomise(early.t->dit) == PASSED, "weights");
    CHECK(train_steps(late.t, 3) == PASSED && train_steps(early.t, 3) == PASSED, "steps");
    static const enum plan_class classes[] = {PLAN_WEIGHTS, PLAN_MOMENT1, PLAN_MOMENT2, PLAN_EMA};
    for (int i = 0; i < 4; i++)
        CHECK(same_slab(late.t->dit, early.t->dit, classes[i]) == PASSED, "another step");
    CHECK(2 * plan_class_bytes(early.t->dit->plan, PLAN_GRADIENTS) <
              plan_class_bytes(late.t->dit->plan, PLAN_GRADIENTS) * 3 / 2,
          "gradients take no less memory");
    struct train_report a, b;
    OK(trainer_report(late.t, &a));
    OK(trainer_report(early.t, &b));
    CHECK(fabs(a.grad_norm - b.grad_norm) <= 1e-5 * a.grad_norm, "norm %g, not %g", b.grad_norm,
          a.grad_norm);
    close_rig(&late), close_rig(&early);
    return PASSED;
}

static int early_is_the_same(void)
{
    return early_updates(0);
}

static int early_is_the_same_gpu_forms(void)
{
    return early_updates(OPEN_GPU_FORMS);
}

static int accumulation_averages(void)
{
    struct rig one = {0}, two = {0};
    struct train_options o = train_defaults();
    o.adamw.rate = 0; // the same weights in every step
    int result = open_rig(&one, 0, &tiny, o);
    o.accumulate = 2;
    if (result == PASSED)
        result = open_rig(&two, 0, &tiny, o);
    if (result != PASSED)
        return result;
    CHECK(randomise(one.t->dit) == PASSED && randomise(two.t->dit) == PASSED, "weights");
    int64_t n;
    CHECK(train_steps(one.t, 1) == PASSED, "step");
    float *first = read_slab(one.t->dit, PLAN_GRADIENTS, &n);
    CHECK(train_steps(one.t, 1) == PASSED, "step");
    float *second = read_slab(one.t->dit, PLAN_GRADIENTS, &n);
    CHECK(train_steps(two.t, 1) == PASSED, "step");
    float *both = read_slab(two.t->dit, PLAN_GRADIENTS, &n);
    CHECK(first && second && both, "%s", error_message());
    double worst = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double mean = 0.5 * ((double)first[i] + (double)second[i]);
        worst = fmax(worst, fabs(mean - (double)both[i]));
        sum += mean * mean;
    }
    free(first), free(second), free(both);
    close_rig(&one), close_rig(&two);
    CHECK(worst <= 1e-5 * sqrt(sum), "off by %g of a norm of %g", worst, sqrt(sum));
    return PASSED;
}

static int bad_steps_are_skipped(void)
{
    struct rig r = {0}, clean = {0};
    float images[BATCH * IMAGE];
    int32_t labels[BATCH];
    bool done;
    struct train_report report;
    int result = open_rig(&r, 0, &tiny, train_defaults());
    if (result == PASSED)
        result = open_rig(&clean, 0, &tiny, train_defaults());
    if (result != PASSED)
        return result;
    fill_batch(0, images, labels);
    images[100] = NAN;
    OK(trainer_micro(r.t, images, labels, &done));
    OK(trainer_report(r.t, &report));
    CHECK(report.skipped && report.skips == 1 && report.applied == 0, "the step was not skipped");
    CHECK(same_slab(r.t->dit, clean.t->dit, PLAN_WEIGHTS) == PASSED, "weights changed");
    CHECK(same_slab(r.t->dit, clean.t->dit, PLAN_MOMENT1) == PASSED, "moments changed");
    CHECK(same_slab(r.t->dit, clean.t->dit, PLAN_EMA) == PASSED, "EMA changed");
    CHECK(train_steps(r.t, 1) == PASSED, "step");
    OK(trainer_report(r.t, &report));
    CHECK(!report.skipped && report.applied == 1 && isfinite(report.loss), "no recovery");
    close_rig(&r), close_rig(&clean);
    return PASSED;
}

static int resume_is_exact(void)
{
    struct rig whole = {0}, half = {0}, rest = {0};
    struct checkpoint c;
    char path[256];
    snprintf(path, sizeof path, "%s/resume.safetensors", test_directory());
    int result = open_rig(&whole, 0, &tiny, train_defaults());
    if (result != PASSED)
        return result;
    CHECK(train_steps(whole.t, 6) == PASSED, "steps");
    CHECK(open_rig(&half, 0, &tiny, train_defaults()) == PASSED, "second");
    CHECK(train_steps(half.t, 3) == PASSED, "steps");
    struct run_state run = {.step = half.t->step, .seed = 5, .cursor = 9, .batch = BATCH, .accumulate = 1};
    OK(trainer_counts(half.t, &run.applied, &run.skipped));
    OK(checkpoint_save(path, half.t->dit, &run));
    CHECK(open_rig(&rest, 0, &tiny, train_defaults()) == PASSED, "third");
    OK(checkpoint_open(path, NULL, &c));
    CHECK(config_equal(&c.config, &tiny), "configuration changed in the file");
    OK(checkpoint_load_training(&c, rest.t->dit));
    OK(trainer_restore(rest.t, c.run.step, c.run.applied, c.run.skipped));
    checkpoint_close(&c);
    CHECK(train_steps(rest.t, 3) == PASSED, "steps");
    static const enum plan_class classes[] = {PLAN_WEIGHTS, PLAN_MOMENT1, PLAN_MOMENT2, PLAN_EMA};
    for (int i = 0; i < 4; i++)
        CHECK(same_slab(whole.t->dit, rest.t->dit, classes[i]) == PASSED, "resumed run differs");
    close_rig(&whole), close_rig(&half), close_rig(&rest);
    return PASSED;
}

static int bf16_tracks_f32(void)
{
    struct rig full = {0}, half = {0};
    struct train_report a, b;
    int result = open_rig(&full, 0, &tiny, train_defaults());
    if (result == PASSED)
        result = open_rig(&half, OPEN_BF16, &tiny, train_defaults());
    if (result != PASSED)
        return result;
    CHECK(randomise(full.t->dit) == PASSED && randomise(half.t->dit) == PASSED, "weights");
    for (int i = 0; i < 4; i++) {
        CHECK(train_steps(full.t, 1) == PASSED && train_steps(half.t, 1) == PASSED, "steps");
        OK(trainer_report(full.t, &a));
        OK(trainer_report(half.t, &b));
        CHECK(fabs(a.loss - b.loss) <= 0.02 * a.loss, "bf16 loss %g, f32 %g", b.loss, a.loss);
        CHECK(a.loss != b.loss, "bf16 storage changed nothing");
    }
    CHECK(plan_class_bytes(half.t->dit->plan, PLAN_ACTIVATIONS) <
              plan_class_bytes(full.t->dit->plan, PLAN_ACTIVATIONS),
          "bf16 saves no memory");
    close_rig(&full), close_rig(&half);
    return PASSED;
}

// Products that read bf16 weights, of which training keeps the f32 in two halves: no change beyond
// the rounding of weights.
static int half_weights(void)
{
    struct rig plain = {0}, half = {0};
    struct train_report a, b;
    struct device *dev = test_device(OPEN_BF16 | OPEN_GPU_FORMS);
    if (!dev)
        return SKIPPED;
    const bool before = dev->half_weights;
    dev->half_weights = false;
    int result = open_rig(&plain, OPEN_BF16 | OPEN_GPU_FORMS, &tiny, train_defaults());
    dev->half_weights = true;
    if (result == PASSED)
        result = open_rig(&half, OPEN_BF16 | OPEN_GPU_FORMS, &tiny, train_defaults());
    dev->half_weights = before;
    if (result != PASSED)
        return result;
    CHECK(randomise(plain.t->dit) == PASSED && randomise(half.t->dit) == PASSED, "weights");
    for (int i = 0; i < 4; i++) {
        CHECK(train_steps(plain.t, 1) == PASSED && train_steps(half.t, 1) == PASSED, "steps");
        OK(trainer_report(plain.t, &a));
        OK(trainer_report(half.t, &b));
        CHECK(fabs(a.loss - b.loss) <= 0.02 * a.loss, "loss %g, without copies %g", b.loss, a.loss);
    }
    // what products read is the nearest bf16 of the f32 that checkpoints get
    const struct param *p = params_find(&half.t->dit->params, "blocks.0.attn.qkv.weight");
    const struct tensor *w = p ? param_tensor(&half.t->dit->w, p) : NULL;
    CHECK(w && w->dtype == BF16 && w->low, "weights are not in two halves");
    const int64_t n = param_count(p);
    float *whole = malloc((size_t)n * sizeof *whole);
    uint16_t *high = malloc((size_t)n * sizeof *high);
    OK(param_read(&half.t->dit->ctx, &half.t->dit->w, p, whole));
    OK(tensor_read(&half.t->dit->ctx, w, high));
    int finer = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &whole[i], sizeof bits);
        CHECK(high[i] == (uint16_t)((bits + 0x8000u) >> 16), "weight %lld", (long long)i);
        finer += (bits & 0xffff) != 0;
    }
    CHECK(finer > n / 2, "the low halves are empty");
    free(whole), free(high);
    close_rig(&plain), close_rig(&half);
    return PASSED;
}

// ---- initial values, inference, sampling --------------------------------------------------------

static int initial_output_is_zero(void)
{
    struct rig r = {0};
    int result = open_rig(&r, 0, &tiny, train_defaults());
    if (result != PASSED)
        return result;
    struct train_report report;
    CHECK(train_steps(r.t, 1) == PASSED, "step");
    float *out = malloc(tensor_bytes(&r.t->dit->output));
    OK(tensor_read(&r.t->dit->ctx, &r.t->dit->output, out));
    OK(trainer_report(r.t, &report));
    for (int64_t i = 0; i < tensor_count(&r.t->dit->output); i++)
        CHECK(out[i] == 0, "adaLN-Zero: the untrained output is not zero");
    // so the loss is the mean of (noise - x)^2: 1 + mean x^2
    CHECK(fabs(report.loss - 1.5) < 0.2, "loss of a zero output: %g", report.loss);
    free(out);
    close_rig(&r);
    return PASSED;
}

static int config_is_inferred(void) // from a file without our metadata
{
    static const char *const cases[] = {"s_qkv", "xl_wqkv", "dense", "alternate"};
    for (int i = 0; i < 4; i++) {
        char path[512], bare[512];
        struct checkpoint known, guessed;
        snprintf(path, sizeof path, "%s/golden/%s/model.safetensors", TEST_DATA, cases[i]);
        snprintf(bare, sizeof bare, "%s/bare.safetensors", test_directory());
        OK(checkpoint_open(path, NULL, &known));
        struct safetensors_writer *w;
        OK(safetensors_create(bare, &w));
        const int n = safetensors_count(known.file);
        for (int k = 0; k < n; k++) {
            const struct st_tensor *t = safetensors_at(known.file, k);
            OK(safetensors_declare(w, t->name, t->dtype, t->ndim, t->shape));
        }
        OK(safetensors_begin(w));
        for (int k = 0; k < n; k++)
            OK(safetensors_write(w, safetensors_at(known.file, k)->data, safetensors_at(known.file, k)->bytes));
        OK(safetensors_commit(w));
        struct config_hints hints = {known.config.heads, known.config.topk, DIFFUSION_RF};
        OK(checkpoint_open(bare, &hints, &guessed));
        CHECK(!guessed.has_config, "the copy still has metadata");
        struct config c = known.config; // what no tensor shows
        c.renormalise = false, c.balance_per_sequence = false, c.balance = 0.01f;
        if (c.moe == MOE_NONE)
            c.experts = guessed.config.experts, c.topk = guessed.config.topk, c.shared = guessed.config.shared;
        CHECK(config_equal(&c, &guessed.config), "%s is inferred wrongly", cases[i]);
        checkpoint_close(&known), checkpoint_close(&guessed);
    }
    return PASSED;
}

static int sample_latents(int batch, float cfg, float *latents)
{
    struct device *dev = test_device(0);
    struct stream *stream;
    struct sampler *s;
    const struct sample_options o = {.steps = 3, .cfg = cfg, .seed = 11};
    const int32_t classes[5] = {0, 3, 9, 3, 1};
    OK(dev->api->stream_new(dev, &stream));
    OK(sampler_new(dev, stream, &tiny, batch, &o, &s));
    OK(dit_init(s->dit, 7));
    CHECK(randomise(s->dit) == PASSED, "weights");
    OK(sampler_run(s, 5, classes, NULL, latents, NULL, NULL));
    sampler_free(s);
    dev->api->stream_free(stream);
    return PASSED;
}

static int batch_size_does_not_matter(void)
{
    float a[5 * IMAGE], b[5 * IMAGE];
    if (!test_device(0))
        return SKIPPED;
    CHECK(sample_latents(5, 1.5f, a) == PASSED && sample_latents(2, 1.5f, b) == PASSED, "sampling");
    double worst = 0, size = 0;
    for (int i = 0; i < 5 * IMAGE; i++) {
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
        size = fmax(size, fabs((double)a[i]));
    }
    CHECK(isfinite(size) && worst <= 1e-4 * size, "images differ by %g with the batch size", worst);
    for (int i = 0; i < IMAGE; i++) // the same class twice is two different images
        if (a[IMAGE + i] != a[3 * IMAGE + i])
            return PASSED;
    CHECK(false, "two images of one class are the same");
    return PASSED;
}

static int open_sampler(struct device *dev, struct stream *stream, bool pack, uint64_t limit,
                        struct sampler **out)
{
    const struct sample_options o = {.steps = 2, .cfg = 1.5f, .seed = 11, .limit = limit, .pack = pack};
    OK(sampler_new(dev, stream, &tiny, 2, &o, out));
    OK(dit_init((*out)->dit, 7));
    return PASSED;
}

static int copy_weights(struct dit *to, struct dit *from)
{
    for (int i = 0; i < from->params.count; i++) {
        const struct param *p = &from->params.list[i];
        if (p->start == 0)
            OK(tensor_copy(&to->ctx, param_tensor(&to->w, p), param_tensor(&from->w, p)));
    }
    return PASSED;
}

// Packed copies change no bit, follow the weights however these are written, and stay away where
// there is no memory for them.
static int packed_weights(void)
{
    static const int32_t classes[2] = {3, 9};
    float first[2 * IMAGE], plain[2 * IMAGE], packed[2 * IMAGE];
    struct device *dev = test_device(0);
    struct stream *stream;
    struct sampler *a, *b, *poor;
    if (!dev || !dev->cpu_forms)
        return SKIPPED;
    OK(dev->api->stream_new(dev, &stream));
    CHECK(open_sampler(dev, stream, false, 0, &a) == PASSED, "without copies");
    CHECK(open_sampler(dev, stream, true, 0, &b) == PASSED, "with copies");
    const uint64_t least = plan_total(a->dit->plan), extra = plan_class_bytes(b->dit->plan, PLAN_PACKED);
    CHECK(extra > 0 && plan_total(b->dit->plan) == least + extra, "no copies are planned");
    CHECK(open_sampler(dev, stream, true, least + extra - 1, &poor) == PASSED, "little memory");
    CHECK(plan_total(poor->dit->plan) == least, "copies without memory for them");
    sampler_free(poor);

    OK(sampler_run(b, 2, classes, NULL, first, NULL, NULL)); // packs the initial weights
    CHECK(randomise(a->dit) == PASSED && randomise(b->dit) == PASSED, "weights");
    OK(sampler_run(a, 2, classes, NULL, plain, NULL, NULL));
    OK(sampler_run(b, 2, classes, NULL, packed, NULL, NULL));
    CHECK(memcmp(first, plain, sizeof plain) != 0, "these weights do nothing");
    CHECK(memcmp(packed, plain, sizeof plain) == 0, "after param_write: not the same bits");
    OK(dit_init(b->dit, 8));
    OK(sampler_run(b, 2, classes, NULL, packed, NULL, NULL));
    CHECK(memcmp(packed, plain, sizeof plain) != 0, "after dit_init: the old weights");
    CHECK(copy_weights(b->dit, a->dit) == PASSED, "copying");
    OK(sampler_run(b, 2, classes, NULL, packed, NULL, NULL));
    CHECK(memcmp(packed, plain, sizeof plain) == 0, "after tensor_copy: not the same bits");
    sampler_free(a), sampler_free(b);
    dev->api->stream_free(stream);
    return PASSED;
}

// One step and one sample of the smallest model with every kind of block: what oclgrind can
// simulate in a minute, for races and accesses out of bounds.
static int smallest(unsigned flags)
{
    static const struct config c = {.layers = 2, .hidden = 8, .heads = 2, .patch = 2, .channels = 1,
                                    .size = 4, .classes = 2, .experts = 3, .topk = 2, .shared = 1,
                                    .moe = MOE_ALTERNATE, .qk_norm = true, .balance = 0.01f,
                                    .class_dropout = 0.1f};
    static const int32_t label[1] = {1};
    float image[16], latent[16];
    struct device *dev = test_device(flags);
    struct stream *stream;
    struct trainer *t;
    struct sampler *s;
    struct train_report report;
    struct train_options o = train_defaults();
    const struct sample_options draw = {.steps = 1, .cfg = 2, .seed = 3, .pack = true};
    bool done;
    if (!dev)
        return SKIPPED;
    o.batch = 1;
    for (int i = 0; i < 16; i++)
        image[i] = sinf((float)i);
    OK(dev->api->stream_new(dev, &stream));
    OK(trainer_new(dev, stream, &c, &o, &t));
    OK(trainer_commit(t));
    OK(dit_init(t->dit, 1));
    CHECK(randomise(t->dit) == PASSED, "weights");
    OK(trainer_micro(t, image, label, &done));
    OK(trainer_report(t, &report));
    CHECK(done && !report.skipped && report.grad_norm > 0, "loss %g", report.loss);
    trainer_free(t);
    OK(sampler_new(dev, stream, &c, 1, &draw, &s));
    OK(dit_init(s->dit, 1));
    OK(sampler_run(s, 1, label, NULL, latent, NULL, NULL));
    CHECK(isfinite(latent[0]), "sample");
    sampler_free(s);
    dev->api->stream_free(stream);
    return PASSED;
}

static int smallest_step(void)
{
    return smallest(0);
}

static int smallest_step_gpu_forms(void)
{
    return smallest(OPEN_GPU_FORMS);
}

const struct test model_tests[] = {
    {"counts", counts},
    {"counts_match_table", counts_match_table},
    {"refusals", refusals},
    {"json_round_trip", json_round_trip},
    {"initial_output_is_zero", initial_output_is_zero},
    {"no_allocation", no_allocation},
    {"recompute_is_exact", recompute_is_exact},
    {"early_is_the_same", early_is_the_same},
    {"early_is_the_same_gpu_forms", early_is_the_same_gpu_forms},
    {"accumulation_averages", accumulation_averages},
    {"bad_steps_are_skipped", bad_steps_are_skipped},
    {"resume_is_exact", resume_is_exact},
    {"bf16_tracks_f32", bf16_tracks_f32},
    {"half_weights", half_weights},
    {"config_is_inferred", config_is_inferred},
    {"batch_size_does_not_matter", batch_size_does_not_matter},
    {"packed_weights", packed_weights},
    {"smallest_step", smallest_step},
    {"smallest_step_gpu_forms", smallest_step_gpu_forms},
    {0},
};
