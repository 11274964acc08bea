// See infer.h.
#include "model/infer.h"

#include <math.h>
#include <stdio.h>

#include "devices/error.h"

const char *config_source_name(enum config_source s)
{
    static const char *const names[] = {"file", "shapes", "published size", "assumed", "given"};
    return names[s];
}

static const struct st_tensor *find(const struct safetensors *s, const char *prefix,
                                    const char *name)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return safetensors_find(s, full);
}

static const struct st_tensor *find_block(const struct safetensors *s, const char *prefix,
                                          int block, const char *suffix)
{
    char name[112];
    snprintf(name, sizeof name, "blocks.%d.%s", block, suffix);
    return find(s, prefix, name);
}

static bool is_matrix(const struct st_tensor *t, int ndim)
{
    if (!t || t->ndim != ndim)
        return false;
    for (int i = 0; i < ndim; i++)
        if (t->shape[i] < 1 || t->shape[i] > 1 << 24)
            return false;
    return true;
}

// How many experts a block has that hold `what`.
static int count_experts(const struct safetensors *s, const char *prefix, int block,
                         const char *what)
{
    int n = 0;
    char suffix[64];
    do
        snprintf(suffix, sizeof suffix, "moe.experts.%d.%s.weight", n++, what);
    while (n < 1024 && find_block(s, prefix, block, suffix));
    return n - 1;
}

static int infer_moe(const struct safetensors *s, const char *prefix, struct config *c)
{
    c->moe = MOE_NONE;
    c->experts = 1, c->topk = 1;
    for (int l = 0; l < c->layers; l++) {
        const int swiglu = count_experts(s, prefix, l, "gate_proj");
        const int experts = swiglu ? swiglu : count_experts(s, prefix, l, "fc1");
        if (!experts)
            continue;
        c->expert = swiglu ? EXPERT_SWIGLU : EXPERT_GELU;
        c->renormalise = !swiglu; // only upcycled models have such experts (model/upcycle.h)
        const struct st_tensor *shared =
            find_block(s, prefix, l, "moe.shared_experts.gate_proj.weight");
        c->experts = experts;
        c->shared = is_matrix(shared, 2) ? (int)(shared->shape[0] / c->hidden) : 0;
        break;
    }
    for (int m = MOE_ALL; m < MOE_NONE; m++) {
        bool same = true;
        for (int l = 0; l < c->layers && same; l++) {
            c->moe = (enum moe_blocks)m;
            same = config_is_moe(c, l) == (find_block(s, prefix, l, "moe.gate.weight") != NULL);
        }
        if (same)
            return 0;
    }
    c->moe = MOE_NONE;
    return 0;
}

static void infer_heads(const struct safetensors *s, const char *prefix,
                        const struct config_hints *hints, struct config *c,
                        struct config_sources *from)
{
    static const int known[][2] = {{384, 6}, {768, 12}, {1024, 16}, {1152, 16}, {1408, 16}};
    const struct st_tensor *q = find_block(s, prefix, 0, "attn.q_norm.weight");
    c->qk_norm = q != NULL;
    c->heads = 0;
    from->heads = SOURCE_SHAPES;
    if (is_matrix(q, 1))
        c->heads = (int)(c->hidden / q->shape[0]);
    for (int i = 0; i < 5 && !c->heads; i++) {
        from->heads = SOURCE_TABLE;
        if (known[i][0] == c->hidden)
            c->heads = known[i][1];
    }
    if (hints->heads > 0) {
        c->heads = hints->heads;
        from->heads = SOURCE_GIVEN;
    }
}

static void infer_habits(const struct config_hints *hints, struct config *c,
                         struct config_sources *from)
{
    c->topk = c->experts < 2 ? 1 : 2;
    from->topk = c->experts < 2 ? SOURCE_SHAPES : SOURCE_HABIT;
    c->diffusion = c->qk_norm ? DIFFUSION_RF : DIFFUSION_DDPM;
    from->diffusion = SOURCE_HABIT;
    if (hints->topk > 0) {
        c->topk = hints->topk;
        from->topk = SOURCE_GIVEN;
    }
    if (hints->diffusion >= 0) {
        c->diffusion = (enum diffusion)hints->diffusion;
        from->diffusion = SOURCE_GIVEN;
    }
}

static int infer_sizes(const struct safetensors *s, const char *prefix, struct config *c)
{
    const struct st_tensor *patch = find(s, prefix, "x_embedder.proj.weight");
    const struct st_tensor *pos = find(s, "", "pos_embed");
    if (!pos)
        pos = find(s, prefix, "pos_embed");
    const struct st_tensor *labels = find(s, prefix, "y_embedder.embedding_table.weight");
    const struct st_tensor *head = find(s, prefix, "final_layer.linear.weight");
    if (!is_matrix(patch, 4) || !is_matrix(pos, 3) || !is_matrix(labels, 2) || !is_matrix(head, 2))
        return fail(ERR_INPUT, "not a DiT: %s is missing or has another rank",
                    !is_matrix(patch, 4)    ? "x_embedder.proj.weight"
                    : !is_matrix(pos, 3)    ? "pos_embed"
                    : !is_matrix(labels, 2) ? "y_embedder.embedding_table.weight"
                                            : "final_layer.linear.weight");
    *c = (struct config){.hidden = (int)patch->shape[0],
                         .channels = (int)patch->shape[1],
                         .patch = (int)patch->shape[2],
                         .classes = (int)labels->shape[0] - 1,
                         .balance = 0.01f,
                         .class_dropout = 0.1f};
    const double side = round(sqrt((double)pos->shape[1]));
    if (side * c->patch > 4096)
        return fail(ERR_INPUT, "its images would be %g wide, more than the 4096 that are possible",
                    side * c->patch);
    c->size = (int)side * c->patch;
    while (c->layers < 1024 && find_block(s, prefix, c->layers, "adaLN_modulation.1.weight"))
        c->layers++;
    c->learn_sigma = head->shape[0] == 2 * (int64_t)c->channels * c->patch * c->patch;
    return 0;
}

int config_infer(const struct safetensors *s, const char *prefix, const struct config_hints *hints,
                 struct config *out, struct config_sources *sources)
{
    *sources = (struct config_sources){.others = SOURCE_SHAPES};
    TRY(infer_sizes(s, prefix, out));
    infer_heads(s, prefix, hints, out, sources);
    if (!out->heads)
        return fail(ERR_INPUT,
                    "the number of heads cannot be told from the file (hidden %d is no preset's): "
                    "give --heads",
                    out->hidden);
    TRY(infer_moe(s, prefix, out));
    infer_habits(hints, out, sources);
    return config_check(out);
}
