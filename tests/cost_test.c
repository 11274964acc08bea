// What a model is said to cost, against the model's own plans and counts.
#include "model/cost.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

static int open_model(const char *preset, struct config *c)
{
    OK(config_preset(preset, c));
    c->layers = c->layers < 4 ? c->layers : 4;
    return PASSED;
}

static const struct {
    const char *model;
    struct cost_options options;
} cases[] = {
    {"S/2-8E2A", {.kind = DEVICE_GPU, .bf16 = true, .train = true, .batch = 16, .overlap = 1}},
    {"S/2-8E2A", {.kind = DEVICE_CPU, .train = true, .batch = 4}},
    {"XL/2-8E2A", {.kind = DEVICE_GPU, .bf16 = true, .batch = 8, .guided = true}},
    {"B/4-8E2A", {.kind = DEVICE_GPU, .bf16 = true, .train = true, .batch = 8, .recompute = true}},
    {"G/2-16E2A", {.kind = DEVICE_GPU, .bf16 = true, .train = true, .batch = 4}},
};

// The line through the plan at one batch meets it at another, one device holding everything.
static int memory_of_one(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct cost_options o = cases[i].options;
        struct model_cost m;
        struct config c;
        double plan;
        o.alone = true;
        CHECK(open_model(cases[i].model, &c) == PASSED, "%s", cases[i].model);
        OK(model_cost_new(&c, &o, &m));
        const int images = 3 * o.batch, held = c.experts * c.layers;
        OK(model_memory(&c, &o, images * m.passes, &plan));
        const double line =
            forecast_memory(&m, images, held, 0, (double)images * m.passes * m.rows * c.layers);
        CHECK(fabs(line / plan - 1) < 0.03, "case %zu: %.4g bytes, the plan takes %.4g", i, line,
              plan);
        model_cost_free(&m);
    }
    return PASSED;
}

// And the plan of each rank, where experts and images are spread unevenly.
static int memory_of_ranks(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct cost_options o = cases[i].options;
        struct model_cost m;
        struct config c;
        struct placement p;
        o.headroom = 1.5; // below the worst case, which a line does not know
        CHECK(open_model(cases[i].model, &c) == PASSED, "%s", cases[i].model);
        OK(model_cost_new(&c, &o, &m));
        OK(placement_uniform(3, c.layers, c.experts, NULL, 6 * o.batch, &p));
        p.share[0] = 4 * o.batch, p.share[1] = 2 * o.batch, p.share[2] = 0;
        for (int rank = 0; rank < 3; rank++) {
            double plan, rows = 0;
            int held = 0;
            for (int l = 0; l < c.layers; l++)
                held += placement_list(&p, rank, l, NULL);
            rows = (double)held / c.experts * p.batch * m.passes * m.rows;
            OK(model_memory_rank(&c, &o, &p, rank, &plan));
            const double line = forecast_memory(&m, p.share[rank], held, 0, rows);
            CHECK(fabs(line / plan - 1) < 0.15,
                  "case %zu, rank %d: %.4g bytes, the plan takes %.4g", i, rank, line, plan);
            double away;
            int streamed = 0;
            for (int l = 0; l < c.layers; l++)
                for (int e = 0; e < c.experts; e++)
                    if (*placement_owner(&p, 0, l, e) == rank) {
                        *placement_home(&p, 0, l, e) = HOME_STREAMED;
                        streamed++;
                    }
            OK(model_memory_rank(&c, &o, &p, rank, &away));
            const double half = forecast_memory(&m, p.share[rank], held - streamed, streamed, rows);
            CHECK(fabs(half / away - 1) < 0.2 && (streamed == 0 || away < plan),
                  "case %zu, rank %d, %d streamed: %.4g bytes, the plan takes %.4g of %.4g", i, rank,
                  streamed, half, away, plan);
        }
        placement_free(&p);
        model_cost_free(&m);
    }
    return PASSED;
}

// A process by itself keeps experts of as few layers in host memory as it can: with a byte less, of one more.
static int offload_alone(void)
{
    for (int train = 0; train < 2; train++) {
        const struct cost_options o = {.kind = DEVICE_GPU, .bf16 = true, .train = train};
        struct config c;
        double all, bytes, limit;
        int layers;
        CHECK(open_model("B/4-8E2A", &c) == PASSED, "model");
        c.layers = 8;
        OK(model_offload(&c, &o, 4, 1e12, &layers, &all));
        CHECK(layers == 0, "all fits, but %d layers are streamed", layers);
        limit = 0.7 * all;
        for (int before = 0; before < c.layers; before = layers) {
            OK(model_offload(&c, &o, 4, limit, &layers, &bytes));
            CHECK(layers > before && (bytes <= limit || layers == c.layers),
                  "%d layers take %.4g of %.4g bytes", layers, bytes, limit);
            limit = bytes - 1;
        }
        CHECK(bytes < 0.7 * all, "%.4g of %.4g bytes", bytes, all);
    }
    return PASSED;
}

// Products and parameters are those that `ditmoe info` counts.
static int counts(void)
{
    static const char *const models[] = {"S/2-8E2A", "XL/2-8E2A", "G/2-16E2A"};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct config c;
        struct model_cost m;
        OK(config_preset(models[i], &c));
        const struct config_counts n = config_count(&c);
        const struct cost_options o = {.kind = DEVICE_GPU, .bf16 = true, .batch = 1};
        OK(model_cost_new(&c, &o, &m));
        const double flops =
            c.layers * (m.flops + m.shared_flops + m.rows * m.expert_flops) + m.image_flops;
        CHECK(m.expert_flops == 24.0 * c.hidden * c.hidden &&
                  m.expert_params == 12.0 * c.hidden * c.hidden,
              "%s: an expert is three matrices of 4D by D", models[i]);
        CHECK(fabs(flops / (2 * n.macs) - 1) < 0.01, "%s: %.4g, counted %.4g", models[i], flops,
              2 * n.macs);
        CHECK(fabs(c.layers * m.attention_flops / (2 * n.macs_attention) - 1) < 1e-6,
              "%s: attention", models[i]);
        const double params = m.dense_params + m.expert_params * c.experts * c.layers;
        CHECK(params == (double)n.total, "%s: %.0f parameters", models[i], params);
        model_cost_free(&m);
    }
    return PASSED;
}

const struct test cost_tests[] = {
    {"counts", counts},
    {"memory_of_one", memory_of_one},
    {"offload_alone", offload_alone},
    {"memory_of_ranks", memory_of_ranks},
    {0},
};
