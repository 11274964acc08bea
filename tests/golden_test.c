// The whole network against PyTorch in float64 (tests/golden/make_golden.py): outputs, chosen
// experts, loss, balance loss, every gradient, ten AdamW steps, and DDPM's terms and samplers, on
// small models of every kind.
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint.h"
#include "model/sampler.h"
#include "model/train.h"

struct golden {
    const char *name;
    struct checkpoint model;
    struct safetensors *input, *expect;
    struct stream *stream;
    struct trainer *trainer;
    float *x, *t, *noise;
    int32_t *y;
};

static float *read_floats(struct safetensors *s, const char *name, int64_t *count)
{
    const struct st_tensor *t = safetensors_find(s, name);
    float *values = t ? malloc((size_t)t->count * sizeof *values) : NULL;
    if (!values || safetensors_read_f32(s, t, values, 0, t->count) < 0)
        return NULL;
    *count = t->count;
    return values;
}

static int open_files(struct golden *g)
{
    char path[512];
    snprintf(path, sizeof path, "%s/golden/%s/model.safetensors", TEST_DATA, g->name);
    OK(checkpoint_open(path, NULL, &g->model));
    snprintf(path, sizeof path, "%s/golden/%s/input.safetensors", TEST_DATA, g->name);
    OK(safetensors_open(path, &g->input));
    snprintf(path, sizeof path, "%s/golden/%s/expect.safetensors", TEST_DATA, g->name);
    OK(safetensors_open(path, &g->expect));
    return PASSED;
}

static int open_golden(struct golden *g, unsigned flags, bool recompute)
{
    struct device *dev = test_device(flags);
    if (!dev)
        return SKIPPED;
    int result = open_files(g);
    if (result != PASSED)
        return result;
    int64_t n = 0, rows = 0;
    g->x = read_floats(g->input, "x", &n);
    g->noise = read_floats(g->input, "noise", &n);
    g->t = read_floats(g->input, "t", &rows);
    const struct st_tensor *labels = safetensors_find(g->input, "y");
    int64_t y64[64];
    CHECK(g->x && g->noise && g->t && labels && rows <= 64, "input is incomplete");
    OK(safetensors_read_i64(g->input, labels, y64, 0, rows));
    g->y = malloc((size_t)rows * sizeof *g->y);
    for (int64_t i = 0; i < rows; i++)
        g->y[i] = (int32_t)y64[i];

    struct train_options o = train_defaults();
    o.batch = (int)rows;
    o.recompute = recompute;
    o.adamw.rate = 1e-3f;
    OK(dev->api->stream_new(dev, &g->stream));
    OK(trainer_new(dev, g->stream, &g->model.config, &o, &g->trainer));
    OK(trainer_commit(g->trainer));
    OK(dit_init(g->trainer->dit, 1));
    OK(checkpoint_load(&g->model, g->trainer->dit, WEIGHTS_MODEL));
    OK(dit_copy_ema(g->trainer->dit));
    return PASSED;
}

static void close_golden(struct golden *g)
{
    struct device *dev = g->trainer ? g->trainer->dit->ctx.dev : NULL;
    trainer_free(g->trainer);
    if (dev)
        dev->api->stream_free(g->stream);
    if (g->model.file)
        checkpoint_close(&g->model);
    safetensors_close(g->input);
    safetensors_close(g->expect);
    free(g->x), free(g->t), free(g->noise), free(g->y);
}

// max |a-b| over the larger of rms(b) and `floor`
static double distance(const float *a, const float *b, int64_t n, double floor)
{
    double most = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        most = d > most || isnan(d) ? d : most;
        sum += (double)b[i] * (double)b[i];
    }
    double rms = sqrt(sum / (double)n);
    return most / (rms > floor ? rms : floor);
}

static int check_output(struct golden *g, double tolerance)
{
    struct dit *d = g->trainer->dit;
    int64_t n;
    float *expected = read_floats(g->expect, "out", &n);
    float *out = malloc(tensor_bytes(&d->output));
    CHECK(expected && out && n == tensor_count(&d->output), "output size");
    OK(tensor_write(&d->ctx, &d->input, g->x));
    OK(tensor_write(&d->ctx, &d->t, g->t));
    OK(tensor_write(&d->ctx, &d->labels, g->y));
    OK(dit_forward(d));
    OK(tensor_read(&d->ctx, &d->output, out));
    double error = distance(out, expected, n, 0);
    free(out), free(expected);
    CHECK(error <= tolerance, "output is off by %g", error);
    return PASSED;
}

static int compare_int(const void *a, const void *b)
{
    return *(const int32_t *)a - *(const int32_t *)b;
}

static int check_experts(struct golden *g)
{
    struct dit *d = g->trainer->dit;
    const int K = d->config.topk;
    for (int l = 0; l < d->config.layers; l++) {
        char name[32];
        snprintf(name, sizeof name, "experts.%d", l);
        const struct st_tensor *t = safetensors_find(g->expect, name);
        CHECK((t != NULL) == config_is_moe(&d->config, l), "%s", name);
        if (!t)
            continue;
        int64_t *expected = malloc((size_t)t->count * sizeof *expected);
        int32_t *index = malloc((size_t)t->count * sizeof *index);
        CHECK(t->count == tensor_count(&d->routes[l].index), "%s: size", name);
        OK(safetensors_read_i64(g->expect, t, expected, 0, t->count));
        OK(dit_read_experts(d, l, index));
        int64_t wrong = 0;
        for (int64_t m = 0; m < t->count; m += K)
            qsort(index + m, (size_t)K, sizeof *index, compare_int);
        for (int64_t i = 0; i < t->count; i++)
            wrong += index[i] != expected[i];
        free(expected), free(index);
        CHECK(wrong == 0, "%s: %lld differ", name, (long long)wrong);
    }
    return PASSED;
}

static int check_loss(struct golden *g, double tolerance)
{
    struct trainer *t = g->trainer;
    int64_t n;
    float *loss = read_floats(g->expect, "loss", &n), *aux = read_floats(g->expect, "aux", &n);
    CHECK(loss && aux, "loss or aux is missing");
    double got, balance = 0;
    OK(trainer_loss(t, g->x, g->t, g->y, g->noise, &got));
    for (int l = 0; l < t->dit->config.layers; l++)
        if (config_is_moe(&t->dit->config, l)) {
            double layer;
            OK(dit_read_balance(t->dit, l, &layer));
            balance += layer;
        }
    double wanted = (double)*loss, wanted_balance = (double)*aux;
    free(loss), free(aux);
    CHECK(fabs(got - wanted) <= tolerance * wanted, "loss %.8g, not %.8g", got, wanted);
    CHECK(fabs(balance - wanted_balance) <= tolerance * (wanted_balance + 1e-6), "balance loss %.8g, not %.8g",
          balance, wanted_balance);
    return PASSED;
}

// A hundredth of the root mean square over all gradients. Some gradients are zero in exact
// arithmetic (a bias on all keys of a head changes no softmax): their rounding is judged against
// the others.
static double gradient_floor(struct golden *g)
{
    double sum = 0, count = 0;
    for (int i = 0; i < safetensors_count(g->expect); i++) {
        const struct st_tensor *t = safetensors_at(g->expect, i);
        int64_t n = 0;
        float *v = strncmp(t->name, "grad.", 5) ? NULL : read_floats(g->expect, t->name, &n);
        for (int64_t k = 0; v && k < n; k++)
            sum += (double)v[k] * (double)v[k];
        count += v ? (double)n : 0;
        free(v);
    }
    return 0.01 * sqrt(sum / count);
}

static int check_gradients(struct golden *g, double tolerance)
{
    struct dit *d = g->trainer->dit;
    const double floor = gradient_floor(g);
    for (int i = 0; i < d->params.count; i++) {
        const struct param *p = &d->params.list[i];
        char name[96];
        snprintf(name, sizeof name, "grad.%s", p->name);
        if (p->frozen)
            continue;
        int64_t n = 0;
        float *expected = read_floats(g->expect, name, &n);
        CHECK(expected && n == param_count(p), "%s: missing or of another size", name);
        float *got = malloc((size_t)n * sizeof *got);
        OK(param_read(&d->ctx, &d->g, p, got));
        double error = distance(got, expected, n, floor);
        free(got), free(expected);
        CHECK(error <= tolerance, "%s is off by %g", name, error);
    }
    return PASSED;
}

// DDPM: what the loss is the sum of.
static int check_terms(struct golden *g, double tolerance)
{
    struct trainer *t = g->trainer;
    const int64_t N = t->options.batch;
    int64_t n = 0, m = 0;
    float *mse = read_floats(g->expect, "mse", &n), *vb = read_floats(g->expect, "vb", &m), got[128];
    if (t->dit->config.diffusion == DIFFUSION_RF)
        return PASSED;
    CHECK(mse && n == N && N <= 64, "mse is missing");
    CHECK(t->dit->config.learn_sigma == (vb != NULL), "vb");
    OK(tensor_read(&t->dit->ctx, &t->terms, got));
    for (int64_t i = 0; i < N; i++) {
        const double bound = vb ? (double)vb[i] : 0, a = (double)got[i], b = (double)got[N + i];
        CHECK(fabs(a - (double)mse[i]) <= tolerance * (double)mse[i], "mse %.8g", a);
        CHECK(fabs(b - bound) <= tolerance * bound, "vb %.8g, not %.8g", b, bound);
    }
    free(mse), free(vb);
    return PASSED;
}

// The ways of golden/ddpm.py, by their names there.
static const struct {
    const char *name;
    struct sample_options o;
} ways[] = {
    {"ddpm", {.kind = SAMPLER_DDPM, .respacing = "5", .cfg = 2.5f, .cfg_channels = 3}},
    {"ddpm_all", {.kind = SAMPLER_DDPM, .respacing = "ddim5", .cfg = 2.5f}},
    {"ddpm_clip", {.kind = SAMPLER_DDPM, .respacing = "5", .cfg = 1, .clip = true}},
    {"ddim", {.kind = SAMPLER_DDIM, .respacing = "5", .cfg = 2.5f, .cfg_channels = 3}},
    {"ddim_eta", {.kind = SAMPLER_DDIM, .respacing = "2,3", .cfg = 1.5f, .eta = 0.7f}},
    {"heun", {.kind = SAMPLER_HEUN, .respacing = "5", .cfg = 2.5f}},
    {"dpm++", {.kind = SAMPLER_DPM, .respacing = "5", .cfg = 2.5f}},
};

static int check_way(struct golden *g, int way, const struct sample_noise *noise, int64_t count,
                     double tolerance)
{
    char name[32];
    struct sampler *s;
    int64_t n = 0;
    const struct config *c = &g->model.config;
    const int32_t label = c->classes / 2, labels[] = {label, label};
    snprintf(name, sizeof name, "latents.%s", ways[way].name);
    float *expected = read_floats(g->expect, name, &n), *got = malloc((size_t)count * sizeof *got);
    CHECK(expected && got && n == count, "%s: missing or of another size", name);
    OK(sampler_new(g->trainer->dit->ctx.dev, g->stream, c, 2, &ways[way].o, &s));
    OK(checkpoint_load(&g->model, s->dit, WEIGHTS_MODEL));
    OK(sampler_run(s, 2, labels, noise, got, NULL, NULL));
    sampler_free(s);
    const double error = distance(got, expected, n, 0);
    free(got), free(expected);
    CHECK(error <= tolerance, "%s is off by %g", name, error);
    return PASSED;
}

static int check_trajectories(struct golden *g, double tolerance)
{
    int64_t n = 0, m;
    int result = PASSED;
    float *z = read_floats(g->input, "z", &n), *steps = read_floats(g->input, "step_noise", &m);
    const struct sample_noise noise = {z, steps};
    for (int i = 0; z && steps && i < (int)(sizeof ways / sizeof ways[0]); i++)
        result |= check_way(g, i, &noise, n, tolerance);
    CHECK((g->model.config.diffusion == DIFFUSION_DDPM) == (z && steps), "z or step_noise");
    free(z), free(steps);
    return result;
}

static int check_steps(struct golden *g, double tolerance)
{
    int64_t n;
    float *expected = read_floats(g->expect, "losses", &n);
    if (!expected)
        return PASSED;
    for (int64_t i = 0; i < n; i++) {
        double loss;
        OK(trainer_loss(g->trainer, g->x, g->t, g->y, g->noise, &loss));
        OK(trainer_apply(g->trainer));
        CHECK(fabs(loss - (double)expected[i]) <= tolerance * loss, "loss of step %d: %.8g, not %.8g",
              (int)i, loss, (double)expected[i]);
    }
    free(expected);
    return PASSED;
}

static int check_all(struct golden *g, double tolerance)
{
    int result = check_output(g, tolerance);
    if (result == PASSED)
        result = check_experts(g);
    if (result == PASSED)
        result = check_loss(g, tolerance);
    if (result == PASSED)
        result = check_terms(g, tolerance);
    if (result == PASSED)
        result = check_gradients(g, 4 * tolerance);
    if (result == PASSED)
        result = check_trajectories(g, tolerance);
    return result == PASSED ? check_steps(g, 4 * tolerance) : result;
}

static int run(const char *name, unsigned flags, bool recompute, double tolerance)
{
    struct golden g = {.name = name};
    int result = open_golden(&g, flags, recompute);
    if (result == PASSED)
        result = check_all(&g, tolerance);
    close_golden(&g);
    return result;
}

// f32 rounding over a few blocks; bf16 has 8 bits and choices of experts may flip, so only f32
// here: the operations themselves are judged in bf16 one by one.
enum { F32_FLAGS = 0 };
#define CASE(case_name)                                                                            \
    static int case_name(void)                                                                     \
    {                                                                                              \
        return run(#case_name, F32_FLAGS, false, 5e-5);                                            \
    }                                                                                              \
    static int case_name##_recompute(void)                                                         \
    {                                                                                              \
        return run(#case_name, F32_FLAGS, true, 5e-5);                                             \
    }                                                                                              \
    static int case_name##_gpu_forms(void)                                                         \
    {                                                                                              \
        return run(#case_name, OPEN_GPU_FORMS, false, 5e-5);                                       \
    }
CASE(s_qkv)
CASE(xl_wqkv)
CASE(dense)
CASE(alternate)
CASE(ddpm_latent)
CASE(ddpm_grey)
CASE(ddpm_fixed)
CASE(gelu)

#define ROWS(name) {#name, name}, {#name "_recompute", name##_recompute}, {#name "_gpu_forms", name##_gpu_forms}
const struct test golden_tests[] = {ROWS(s_qkv), ROWS(xl_wqkv), ROWS(dense), ROWS(alternate),
                                    ROWS(ddpm_latent), ROWS(ddpm_grey), ROWS(ddpm_fixed), ROWS(gelu), {0}};
