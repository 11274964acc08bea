// See cost.h. Letters as in model/config.h: T tokens, D hidden, E experts, K active ones, F = 4D.
#include "model/cost.h"

#include <stdlib.h>
#include <string.h>

#include "model/sampler.h"
#include "model/train.h"

enum { PASSES = 50 }; // of a sampler, where nobody has said how many

// ---- a device on paper --------------------------------------------------------------------------

// Products want scratch for their operands' other forms: about this much on GPUs; on CPUs the
// weight once more.
static size_t paper_space(struct device *dev, const struct gemm *g)
{
    return dev->cpu_forms ? (size_t)g->n * (size_t)g->k * sizeof(float) : 32 << 20;
}

static const struct backend paper = {.name = "paper", .gemm_space = paper_space};

static struct device paper_device(const struct cost_options *o)
{
    struct device dev = {.api = &paper, .act = o->bf16 ? BF16 : F32};
    dev.info.backend = &paper;
    dev.info.kind = o->kind;
    dev.info.align = 256;
    dev.info.memory = dev.info.max_alloc = UINT64_MAX / 4;
    strcpy(dev.info.key, "paper:0");
    dev.cpu_forms = o->kind == DEVICE_CPU;
    if (!dev.cpu_forms) {
        dev.swiglu_columns = 64;
        dev.rebuilds_hidden = true;
        dev.half_weights = o->bf16;
        dev.fused_width = o->bf16 ? 4096 : 0;
    }
    return dev;
}

static struct train_options training(const struct cost_options *o, int batch)
{
    struct train_options t = train_defaults();
    t.batch = batch;
    t.recompute = o->recompute;
    t.early = o->early;
    return t;
}

// *layers (may be NULL): how many stream. After ERR_NOMEM the figures are those of a plan beyond the
// limit, where there is one.
static int training_memory(struct device *dev, const struct config *c,
                           const struct train_options *t, int *layers, double *bytes)
{
    struct trainer *trainer = NULL;
    int code = trainer_new(dev, NULL, c, t, &trainer);
    if (!trainer)
        return code;
    *bytes = (double)plan_total(trainer->dit->plan);
    if (layers)
        *layers = streamed_figures(trainer->dit).blocks;
    trainer_free(trainer);
    return code;
}

static int sampling_memory(struct device *dev, const struct config *c,
                           const struct dit_options *options, double *bytes)
{
    struct dit *d = NULL;
    TRY(dit_new(dev, NULL, c, options, &d));
    int code = dit_layout(d);
    *bytes = (double)plan_total(d->plan);
    dit_free(d);
    return code;
}

// line: for a line through several plans, which one device's own, leaner or not by the batch, is
// not.
static int memory_with(const struct config *c, const struct cost_options *o, int batch,
                       const struct dit_ranks *ranks, const bool *streamed, bool line,
                       double *bytes)
{
    struct device dev = paper_device(o);
    if (o->train) {
        struct train_options t = training(o, batch);
        t.ranks = ranks;
        t.offload.which = streamed;
        t.as_ranks = line;
        return training_memory(&dev, c, &t, NULL, bytes);
    }
    const struct dit_options options = {.batch = batch,
                                        .ahead = line ? 0 : sampler_ahead(&dev, c, batch, PASSES),
                                        .ranks = ranks,
                                        .offload.which = streamed};
    return sampling_memory(&dev, c, &options, bytes);
}

int model_memory(const struct config *c, const struct cost_options *o, int batch, double *bytes)
{
    return memory_with(c, o, batch, NULL, NULL, true, bytes);
}

static int training_offload(const struct config *c, const struct cost_options *o, int batch,
                            uint64_t limit, int *layers, double *bytes)
{
    struct device dev = paper_device(o);
    struct train_options t = training(o, batch);
    t.limit = limit;
    t.offload.blocks = OFFLOAD_AUTO;
    *layers = -1;
    int code = training_memory(&dev, c, &t, layers, bytes);
    return *layers < 0 ? code : 0;
}

static int sampling_with(const struct config *c, const struct cost_options *o, int batch,
                         int layers, double *bytes)
{
    struct device dev = paper_device(o);
    const struct dit_options options = {.batch = batch,
                                        .ahead = sampler_ahead(&dev, c, batch, PASSES),
                                        .offload.blocks = layers};
    return sampling_memory(&dev, c, &options, bytes);
}

int model_offload(const struct config *c, const struct cost_options *o, int batch, double limit,
                  int *layers, double *bytes)
{
    if (o->train)
        return training_offload(c, o, batch, (uint64_t)limit, layers, bytes);
    int too_few = 0, enough = 0;
    for (int l = 0; l < c->layers; l++)
        enough += config_is_moe(c, l);
    *layers = 0;
    TRY(sampling_with(c, o, batch, 0, bytes));
    if (*bytes <= limit || enough == 0)
        return 0;
    while (enough - too_few > 1) {
        const int half = (too_few + enough) / 2;
        TRY(sampling_with(c, o, batch, half, bytes));
        *(*bytes > limit ? &too_few : &enough) = half;
    }
    *layers = enough;
    return sampling_with(c, o, batch, enough, bytes);
}

// Without an exchange a process is rank 0: so the rank in question changes places with it.
int model_memory_rank(const struct config *c, const struct cost_options *o,
                      const struct placement *place, int rank, double *bytes)
{
    const int copies = !o->train && o->guided ? 2 : 1;
    struct placement p;
    TRY(placement_new(place->ranks, place->groups, place->layers, place->experts, &p));
    const size_t places = (size_t)p.groups * (size_t)p.layers * (size_t)p.experts;
    p.batch = place->batch;
    for (int r = 0; r < p.ranks; r++) {
        const int from = r == 0 ? rank : r == rank ? 0 : r;
        p.share[r] = place->share[from];
        p.group[r] = place->group[from];
    }
    for (size_t i = 0; i < places; i++) {
        const int owner = place->owner[i];
        p.owner[i] = owner == rank ? 0 : owner == 0 ? rank : owner;
    }
    const struct dit_ranks ranks = {.placement = &p,
                                    .copies = copies,
                                    .headroom = o->alone          ? 0
                                                : o->headroom > 0 ? o->headroom
                                                                  : 1.5};
    bool *streamed = calloc((size_t)p.layers, sizeof *streamed), any = false;
    for (int l = 0; streamed && l < p.layers; l++)
        any |= streamed[l] = placement_streams(place, rank, l);
    int code = streamed ? memory_with(c, o, p.share[0] * copies, p.ranks > 1 ? &ranks : NULL,
                                      any ? streamed : NULL, false, bytes)
                        : fail(ERR_NOMEM, "no host memory for %d layers", p.layers);
    free(streamed);
    placement_free(&p);
    return code;
}

// ---- lines through the plan ---------------------------------------------------------------------

static int moe_layers(const struct config *c)
{
    int count = 0;
    for (int l = 0; l < c->layers; l++)
        count += config_is_moe(c, l);
    return count;
}

// Of what a rank keeps of its own images' routed rows while other ranks work on them: the rows that
// it sends and those that come back; in training the latter of every layer.
static double own_rows(const struct config *c, const struct cost_options *o, int layers)
{
    const double row = (double)c->hidden * (o->bf16 ? 2 : 4);
    return config_tokens(c) * c->topk * row * (1 + (o->train && !o->recompute ? layers : 1));
}

static int fill_memory(const struct config *c, const struct cost_options *o, struct model_cost *m)
{
    const int layers = moe_layers(c), b = o->batch > 0 ? o->batch : 1;
    double one, two, more = 0, wider = 0;
    struct config other = *c;
    TRY(model_memory(c, o, b, &one));
    TRY(model_memory(c, o, 2 * b, &two));
    m->image_memory = (two - one) / b;
    m->fixed_memory = one - b * m->image_memory;
    if (layers == 0)
        return 0;
    other.experts = 2 * c->experts;
    TRY(model_memory(&other, o, b, &more));
    m->expert_memory = (more - one) / c->experts / layers;
    m->fixed_memory -= m->expert_memory * c->experts * layers;
    other.topk = 2 * c->topk;
    TRY(model_memory(&other, o, b, &wider));
    const double rows = (double)b * config_tokens(c) * c->topk; // of one layer
    m->row_memory = (wider - more) / rows / layers;
    m->image_memory -= m->row_memory * config_tokens(c) * c->topk * layers;
    m->image_memory += o->alone ? 0 : own_rows(c, o, layers);
    return 0;
}

// ---- operations ---------------------------------------------------------------------------------

// What one more active expert adds to a token's multiply-accumulates, in operations; and what one
// more expert of each layer adds to the parameters, without its row of the router. Of whatever kind
// experts are.
static double flops_of_expert(const struct config *c)
{
    struct config other = *c;
    const int layers = moe_layers(c);
    other.topk = 2 * c->topk;
    const double more = config_count(&other).macs - config_count(c).macs;
    return layers ? 2 * more / layers / config_tokens(c) / c->topk : 0;
}

static double parameters_of_expert(const struct config *c)
{
    struct config other = *c;
    const int layers = moe_layers(c);
    other.experts = 2 * c->experts;
    const double more = (double)(config_count(&other).total - config_count(c).total);
    return layers ? more / layers / c->experts - c->hidden : 0;
}

static void fill_kind(const struct config *c, const struct cost_options *o, bool fused,
                      struct kind_cost *k)
{
    const double T = config_tokens(c), D = c->hidden, F = MLP_RATIO * D;
    const double act = o->bf16 ? 2 : 4, shared = c->shared * D;
    const bool half = o->bf16 && fused;
    // LayerNorm, attention's operands, two residual sums, combination; SwiGLU where products leave it
    k->bytes = T * act * (14 * D + (fused ? 0 : 3 * shared));
    k->expert_bytes = act * (3 * D + (fused ? 0 : 3 * F));
    k->launches = fused ? 12 : 20;
    k->expert_launches = fused ? 3 : 6;
    k->weight_bytes = half ? 2 : 4;
    k->update_bytes = half ? 36 : 40;
}

static void fill_work(const struct config *c, const struct cost_options *o, struct model_cost *m)
{
    const double T = config_tokens(c), D = c->hidden, E = c->experts, F = MLP_RATIO * D;
    const double act = o->bf16 ? 2 : 4;
    const double patch = (double)c->patch * c->patch;
    m->tokens = T;
    m->rows = T * c->topk;
    m->row_bytes = D * act;
    m->flops = T * (8 * D * D + 2 * D * E);
    m->shared_flops = 6 * T * D * c->shared * D;
    m->plain_flops = 4 * T * D * F;
    m->attention_flops = 4 * T * T * D;
    m->expert_flops = flops_of_expert(c);
    fill_kind(c, o, true, &m->gpu);
    fill_kind(c, o, false, &m->cpu);
    m->image_flops = 2 * config_modulations(c) * D + 2 * D * (TIMESTEP_FEATURES + D) +
                     2 * T * D * patch * (c->channels + config_out_channels(c));
    m->image_bytes = act * 8 * T * D;
    m->backward = o->train ? (o->recompute ? 3 : 2) : 0;
    m->passes = !o->train && o->guided ? 2 : 1;
}

static void fill_parameters(const struct config *c, const struct cost_options *o,
                            struct model_cost *m)
{
    const double total = (double)config_count(c).total;
    m->expert_params = parameters_of_expert(c);
    m->dense_params = total - m->expert_params * c->experts * moe_layers(c);
    m->host_expert = m->expert_params * (o->train                ? 20
                                         : o->kind == DEVICE_CPU ? m->cpu.weight_bytes
                                                                 : m->gpu.weight_bytes);
}

int model_cost_new(const struct config *c, const struct cost_options *o, struct model_cost *out)
{
    struct model_cost m = {.layers = c->layers, .experts = c->experts, .topk = c->topk};
    *out = (struct model_cost){0};
    TRY(config_check(c));
    bool *moe = calloc((size_t)c->layers, sizeof *moe);
    if (!moe)
        return fail(ERR_NOMEM, "no host memory for a model of %d layers", c->layers);
    for (int l = 0; l < c->layers; l++)
        moe[l] = config_is_moe(c, l);
    m.moe = moe;
    m.train = o->train;
    m.headroom = o->alone ? 1 : o->headroom > 0 ? o->headroom : 2;
    m.overlap = o->overlap;
    fill_work(c, o, &m);
    fill_parameters(c, o, &m);
    int code = fill_memory(c, o, &m);
    if (code < 0)
        model_cost_free(&m);
    else
        *out = m;
    return code;
}

void model_cost_free(struct model_cost *m)
{
    free((void *)m->moe);
    *m = (struct model_cost){0};
}
