// Forecasts and policies, on clusters and models that are only numbers. `cost` is compared with
// every placement there is, on small random cases; and never may another policy beat it.
#include "runtime/policy.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- random cases -------------------------------------------------------------------------------

static uint64_t dice_state;

static double dice(double low, double high)
{
    dice_state ^= dice_state << 13;
    dice_state ^= dice_state >> 7;
    dice_state ^= dice_state << 17;
    return low + (high - low) * (double)(dice_state >> 11) * 0x1p-53;
}

static int dice_int(int low, int high) // both included
{
    const int n = (int)dice(low, high + 1);
    return n > high ? high : n;
}

struct scene {
    struct cluster c;
    struct model_cost m;
    bool moe[64];
    double load[64 * 16];
    int batch;
};

static struct device_rates random_rates(double speed)
{
    struct device_rates r = {.sample = 1, .train = dice(1, 1.3)};
    for (int i = 0; i < RATE_CLASSES; i++)
        r.dense[i] = r.ragged[i] = 1e12 * speed * (i + 1);
    r.attention = 2e12 * speed;
    r.memory = 1e11 * speed;
    r.launch = 5e-6;
    r.to_device = r.to_host = 1e10;
    return r;
}

static void random_load(struct scene *s)
{
    for (int l = 0; l < s->m.layers; l++) {
        double sum = 0, *row = s->load + l * s->m.experts;
        for (int e = 0; e < s->m.experts; e++)
            sum += row[e] = dice(0.2, 2);
        for (int e = 0; e < s->m.experts; e++)
            row[e] /= sum;
    }
}

static int make_scene(struct scene *s, int ranks, int layers, int experts, int batch, bool train)
{
    const double D = 256;
    memset(s, 0, sizeof *s);
    s->batch = batch;
    s->c = (struct cluster){.ranks = ranks, .nodes = 1, .copies = 1};
    s->c.rank = calloc((size_t)ranks, sizeof *s->c.rank);
    s->c.link = calloc((size_t)(ranks * ranks), sizeof *s->c.link);
    s->c.host_memory = calloc(1, sizeof *s->c.host_memory);
    s->c.host = calloc(1, sizeof *s->c.host);
    CHECK(s->c.rank && s->c.link && s->c.host && s->c.host_memory, "memory");
    s->m = (struct model_cost){.layers = layers, .experts = experts, .topk = 2, .moe = s->moe};
    s->m.train = train;
    s->m.backward = train ? 2 : 0;
    s->m.passes = 1;
    s->m.tokens = 64;
    s->m.rows = 128;
    s->m.row_bytes = 2 * D;
    s->m.flops = 64 * 8 * D * D;
    s->m.shared_flops = 64 * 12 * D * D;
    s->m.attention_flops = 4 * 64 * 64 * D;
    s->m.gpu.bytes = 64 * 28 * D;
    s->m.expert_flops = 24 * D * D;
    s->m.gpu.expert_bytes = 6 * D;
    s->m.gpu.launches = 12;
    s->m.gpu.expert_launches = 4;
    s->m.image_flops = 1e7;
    s->m.dense_params = 1e6;
    s->m.expert_params = 12 * D * D;
    s->m.gpu.weight_bytes = 2;
    s->m.gpu.update_bytes = 36;
    s->m.fixed_memory = 1e8;
    s->m.image_memory = 1e7;
    s->m.expert_memory = 1e8;
    s->m.row_memory = 100;
    s->m.headroom = 1.5;
    s->m.host_expert = 1e8;
    s->m.overlap = dice(0, 1) < 0.5 ? 0 : 1;
    s->c.host_memory[0] = 1ull << 40;
    for (int l = 0; l < layers; l++)
        s->moe[l] = true;
    for (int r = 0; r < ranks; r++) {
        s->c.rank[r].kind = DEVICE_GPU;
        s->c.rank[r].rates = random_rates(pow(10, dice(-1, 1)));
        s->c.rank[r].memory = 1ull << 40;
        for (int t = 0; t < ranks; t++)
            s->c.link[r * ranks + t] = (struct link_rate){.latency = dice(1e-6, 2e-5),
                                                          .bandwidth = 1e9 * pow(10, dice(0, 2)),
                                                          .staged = (r + t) % 2};
    }
    random_load(s);
    return PASSED;
}

// ---- all placements -----------------------------------------------------------------------------

struct brute {
    struct scene *s;
    struct placement p;
    double best;
    int homes; // 1: devices only; 2: streamed too
};

static double forecast_of(struct scene *s, const struct placement *p)
{
    struct forecast f;
    if (forecast_step(&s->c, &s->m, s->load, p, &f) < 0)
        return NAN;
    const double step = f.missing > 0 ? INFINITY : f.step;
    forecast_free(&f);
    return step;
}

static void try_experts(struct brute *b, int at)
{
    const int places = b->p.layers * b->p.experts;
    if (at == places) {
        b->best = fmin(b->best, forecast_of(b->s, &b->p));
        return;
    }
    for (int r = 0; r < b->p.ranks; r++)
        for (int home = 0; home < b->homes; home++) {
            b->p.owner[at] = r;
            b->p.home[at] = (uint8_t)home;
            try_experts(b, at + 1);
        }
}

// Every rank with images has all experts.
static void try_apart(struct brute *b)
{
    struct placement p;
    int some = 0;
    while (b->p.share[some] == 0)
        some++;
    if (placement_new(b->p.ranks, b->p.ranks, b->p.layers, b->p.experts, &p) < 0)
        return;
    p.batch = b->p.batch;
    for (int g = 0; g < p.ranks; g++) {
        p.group[g] = g;
        p.share[g] = b->p.share[g];
        for (int i = 0; i < p.layers * p.experts; i++)
            p.owner[g * p.layers * p.experts + i] = p.share[g] > 0 ? g : some;
    }
    b->best = fmin(b->best, forecast_of(b->s, &p));
    placement_free(&p);
}

static void try_all(struct brute *b, int rank, int left)
{
    if (rank == b->p.ranks - 1) {
        b->p.share[rank] = left;
        try_experts(b, 0);
        try_apart(b);
        return;
    }
    for (int n = 0; n <= left; n++) {
        b->p.share[rank] = n;
        try_all(b, rank + 1, left - n);
    }
}

static int brute_case(uint64_t seed, bool tight)
{
    struct scene s;
    struct placement p;
    dice_state = 88172645463325252u + seed * 7919;
    const int ranks = dice_int(2, 3), layers = ranks == 2 && !tight ? dice_int(1, 2) : 1;
    const int experts = tight ? 3 : layers == 2 ? 3 : dice_int(3, 5);
    const int batch = dice_int(1, tight ? 3 : 6);
    CHECK(make_scene(&s, ranks, layers, experts, batch, seed % 2) == PASSED, "scene");
    for (int r = 0; tight && r < ranks;
         r++) // the devices hold some experts, not always all together
        s.c.rank[r].memory = (uint64_t)dice(1.5e8, 3.6e8);
    struct brute b = {.s = &s, .best = INFINITY, .homes = tight ? 2 : 1};
    OK(placement_uniform(ranks, layers, experts, NULL, batch, &b.p));
    try_all(&b, 0, batch);
    OK(policy_place(POLICY_COST, &s.c, &s.m, s.load, batch, &p));
    OK(placement_check(&p));
    const double found = forecast_of(&s, &p);
    CHECK((isinf(found) && isinf(b.best)) || found <= b.best * (1 + 1e-9),
          "seed %d: found %.9g, best %.9g (%d ranks, %d layers, %d experts, batch %d)", (int)seed,
          found, b.best, ranks, layers, experts, batch);
    CHECK(isinf(found) || found >= b.best * (1 - 1e-9), "seed %d: better than the best", (int)seed);
    placement_free(&p);
    placement_free(&b.p);
    cluster_free(&s.c);
    return PASSED;
}

static int equals_brute_force(void)
{
    for (uint64_t seed = 1; seed <= 120; seed++)
        CHECK(brute_case(seed, false) == PASSED, "seed %d", (int)seed);
    return PASSED;
}

static int equals_brute_force_tight(void)
{
    for (uint64_t seed = 1; seed <= 60; seed++)
        CHECK(brute_case(seed, true) == PASSED, "seed %d", (int)seed);
    return PASSED;
}

// ---- larger cases -------------------------------------------------------------------------------

static int never_worse(void)
{
    for (uint64_t seed = 1; seed <= 12; seed++) {
        struct scene s;
        double steps[POLICIES];
        dice_state = 1234567 + seed * 104729;
        CHECK(make_scene(&s, dice_int(2, 6), dice_int(2, 6), 8, dice_int(4, 64), seed % 2) ==
                  PASSED,
              "scene");
        for (int r = 0; seed % 3 == 0 && r < s.c.ranks; r++)
            s.c.rank[r].memory = (uint64_t)dice(0.6e9, 2.5e9);
        for (int policy = 0; policy < POLICIES; policy++) {
            struct placement p;
            OK(policy_place((enum policy)policy, &s.c, &s.m, s.load, s.batch, &p));
            OK(placement_check(&p));
            steps[policy] = forecast_of(&s, &p);
            placement_free(&p);
        }
        for (int policy = 0; policy < POLICY_COST; policy++)
            CHECK(steps[POLICY_COST] <= steps[policy] || isinf(steps[policy]),
                  "seed %d: cost %g, %s %g", (int)seed, steps[POLICY_COST], policy_names[policy],
                  steps[policy]);
        cluster_free(&s.c);
    }
    return PASSED;
}

// What the rules promise.
static int rules(void)
{
    struct scene s;
    struct placement p;
    dice_state = 99;
    CHECK(make_scene(&s, 2, 4, 8, 30, true) == PASSED, "scene");
    s.c.rank[0].memory = 6ull << 30;
    s.c.rank[1].memory = 3ull << 30;
    OK(policy_place(POLICY_MEMORY, &s.c, &s.m, s.load, 30, &p));
    CHECK(p.share[0] == 20 && p.share[1] == 10, "shares %d and %d", p.share[0], p.share[1]);
    int held = 0;
    for (int l = 0; l < 4; l++)
        held += placement_list(&p, 0, l, NULL);
    CHECK(abs(held - 21) <= 1, "%d of 32 experts where two thirds of the memory is", held);
    placement_free(&p);
    OK(policy_place(POLICY_FREQUENCY, &s.c, &s.m, s.load, 30, &p));
    for (int l = 0; l < 4; l++) {
        double sum = 0, most = 0;
        for (int e = 0; e < 8; e++) {
            sum += *placement_owner(&p, 0, l, e) == 0 ? s.load[l * 8 + e] : 0;
            most = fmax(most, s.load[l * 8 + e]);
        }
        CHECK(fabs(sum - 0.5) <= most / 2 + 1e-9, "layer %d: rank 0 gets %g", l, sum);
    }
    placement_free(&p);
    cluster_free(&s.c);
    return PASSED;
}

// Experts that no device holds are streamed; what fits nowhere is counted.
static int memory_short(void)
{
    struct scene s;
    struct placement p;
    struct forecast f;
    dice_state = 5;
    CHECK(make_scene(&s, 2, 4, 8, 8, false) == PASSED, "scene");
    s.c.rank[0].memory = s.c.rank[1].memory = (uint64_t)9e8; // 32 experts of 1e8
    for (int policy = 0; policy < POLICIES; policy++) {
        OK(policy_place((enum policy)policy, &s.c, &s.m, s.load, 8, &p));
        OK(forecast_step(&s.c, &s.m, s.load, &p, &f));
        CHECK(f.missing == 0 && f.rank[0].host_memory + f.rank[1].host_memory > 1e9,
              "%s: %g missing", policy_names[policy], f.missing);
        placement_free(&p);
        forecast_free(&f);
    }
    s.c.host_memory[0] = (uint64_t)1e9;
    OK(policy_place(POLICY_COST, &s.c, &s.m, s.load, 8, &p));
    OK(forecast_step(&s.c, &s.m, s.load, &p, &f));
    CHECK(f.missing > 1e8 && f.missing < 2.5e9, "%g bytes are missing", f.missing);
    placement_free(&p);
    forecast_free(&f);
    cluster_free(&s.c);
    return PASSED;
}

// A rank's parts add up to the step, whatever the placement.
static int parts_add_up(void)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct scene s;
        struct placement p;
        struct forecast f;
        dice_state = 31 * seed + 7;
        CHECK(make_scene(&s, dice_int(1, 5), 3, 8, 16, seed % 2) == PASSED, "scene");
        s.moe[1] = false;
        OK(policy_place(seed % 3 ? POLICY_UNIFORM : POLICY_COST, &s.c, &s.m, s.load, 16, &p));
        OK(forecast_step(&s.c, &s.m, s.load, &p, &f));
        for (int r = 0; r < s.c.ranks; r++) {
            const struct rank_forecast *k = &f.rank[r];
            const double sum =
                k->dense + k->expert + k->exchange + k->reduce + k->stream + k->update + k->wait;
            CHECK(sum <= f.step * (1 + 1e-9) && k->wait >= -1e-12, "rank %d: %g of %g", r, sum,
                  f.step);
            if (s.c.ranks == 1)
                CHECK(k->exchange == 0 && k->reduce == 0 && fabs(sum - f.step) < 1e-9 * f.step,
                      "alone");
        }
        forecast_free(&f);
        placement_free(&p);
        cluster_free(&s.c);
    }
    return PASSED;
}

// ---- rates --------------------------------------------------------------------------------------

static int rates_both_ways(void)
{
    struct rates r = {0}, back;
    struct device_rates d = {0};
    struct device_info info = {0};
    OK(rates_guess("NVIDIA H200", DEVICE_GPU, 0, true, 0, &d));
    snprintf(d.driver, sizeof d.driver, "580");
    snprintf(d.pci, sizeof d.pci, "0000:3b:00.0");
    OK(rates_put(&r, &d));
    OK(rates_put(&r, &d)); // in its own place
    OK(rates_put_link(&r, "a", "b",
                      (struct link_rate){.latency = 1e-5, .bandwidth = 1e10, .staged = true}));
    json_t *json = rates_to_json(&r);
    OK(rates_from_json(json, &back));
    json_decref(json);
    CHECK(back.count == 1 && back.link_count == 1, "%d devices", back.count);
    CHECK(fabs(back.list[0].dense[3] / d.dense[3] - 1) < 1e-6 && back.list[0].bf16, "rates");
    CHECK(rates_link(&back, "a", "b")->staged && !rates_link(&back, "b", "a"), "links");
    snprintf(info.name, sizeof info.name, "NVIDIA H200");
    snprintf(info.pci, sizeof info.pci, "0000:3b:00.0");
    snprintf(info.driver, sizeof info.driver, "580");
    CHECK(rates_find(&back, &info, true, 1) != NULL, "the device");
    CHECK(rates_find(&back, &info, false, 1) == NULL, "another precision");
    CHECK(rates_find(&back, &info, true, 2) == NULL, "another number of ranks on it");
    snprintf(info.driver, sizeof info.driver, "590");
    CHECK(rates_find(&back, &info, true, 1) == NULL, "a new driver");
    rates_free(&r);
    rates_free(&back);
    return PASSED;
}

#define RATES "{\"ditmoe_rates\":1,\"devices\":["
static int hostile_rates(void)
{
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"[", "not JSON"},
        {"{}", "not a file of rates"},
        {RATES "{}]}", "device 0: \"name\""},
        {RATES "7]}", "device 0: \"name\""},
        {RATES "{\"name\":\"x\",\"precision\":\"f8\"}]}", "it is bf16 or f32"},
        {RATES "{\"name\":\"x\",\"precision\":\"f32\",\"dense\":[1,2]}]}", "array of 6 rates"},
        {RATES "{\"name\":\"x\",\"precision\":\"f32\",\"dense\":[1,2,3,4,5,-6]}]}", "rate 5"},
        {RATES "{\"name\":\"x\",\"precision\":\"f32\",\"dense\":[1,2,3,4,5,6],"
               "\"ragged\":[1,2,3,4,5,6],\"attention\":0}]}",
         "\"attention\""},
        {RATES "],\"links\":[{\"from\":\"a\"}]}", "link 0: \"to\""},
    };
    char path[256];
    struct rates r;
    snprintf(path, sizeof path, "%s/rates.json", test_directory());
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        FILE *file = fopen(path, "w");
        CHECK(file && fputs(bad[i].text, file) >= 0 && fclose(file) == 0, "%s", path);
        CHECK(rates_read(path, &r) == ERR_INPUT, "file %zu was taken", i);
        CHECK(strstr(error_message(), bad[i].message) && strstr(error_message(), path),
              "file %zu: %s", i, error_message());
    }
    CHECK(rates_guess("Voodoo 2", DEVICE_GPU, 0, true, 0, &(struct device_rates){0}) == ERR_INPUT &&
              strstr(error_message(), "Voodoo 2"),
          "%s", error_message());
    return PASSED;
}

static int rates_by_rows(void)
{
    struct device_rates d;
    OK(rates_guess("NVIDIA H100 80GB HBM3", DEVICE_GPU, 0, true, 0, &d));
    for (double rows = 1; rows < 40000; rows *= 1.1)
        CHECK(rate_at(d.dense, rows) <= rate_at(d.dense, rows * 1.1) &&
                  rows / rate_at(d.dense, rows) <=
                      rows * 1.1 / rate_at(d.dense, rows * 1.1) * (1 + 1e-9),
              "%g rows: rates and times rise with rows", rows);
    CHECK(!strcmp(rates_published("NVIDIA A100 80GB PCIe")->name, "A100 80GB PCIe"),
          "longest name");
    return PASSED;
}

const struct test policy_tests[] = {
    {"rates_both_ways", rates_both_ways},
    {"hostile_rates", hostile_rates},
    {"rates_by_rows", rates_by_rows},
    {"parts_add_up", parts_add_up},
    {"rules", rules},
    {"memory_short", memory_short},
    {"never_worse", never_worse},
    {"equals_brute_force", equals_brute_force},
    {"equals_brute_force_tight", equals_brute_force_tight},
    {0},
};
