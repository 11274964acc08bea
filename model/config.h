// The shape of a DiT-MoE (arXiv 2407.11633, table 1): everything that decides which parameters
// exist and what the network computes. Letters: N images, T tokens = (size/patch)^2, D hidden, H
// heads, E routed experts, K = topk active ones, F = 4D expert width, L layers.
#ifndef DITMOE_CONFIG_H
#define DITMOE_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

// Which blocks carry a mixture of experts; the others have DiT's plain MLP (GELU-tanh, width 4D,
// bias).
enum moe_blocks {
    MOE_ALL,
    MOE_ALTERNATE, // every second block: 1, 3, 5, ...
    MOE_SHALLOW,   // the first half of the blocks
    MOE_DEEP,      // the second half
    MOE_NONE,
};

// What the network is trained to answer, and what its t is.
enum diffusion {
    DIFFUSION_RF,   // rectified flow: v = noise - x at t in [0,1], 1 is noise
    DIFFUSION_DDPM, // 1000 steps, linear betas: noise (and, with learn_sigma, variance) at t = 0..999
};

// What an expert is.
enum expert_kind {
    EXPERT_SWIGLU, // down (silu(gate x) * up x), no biases: as published
    EXPERT_GELU,   // fc2 gelu(fc1 x), with biases: DiT's plain MLP, for upcycled models
};

struct config {
    int layers, hidden, heads, patch;
    int channels, size, classes; // images are [channels, size, size]; labels 0..classes-1
    int experts, topk, shared;   // shared experts: one SwiGLU of width shared*hidden; 0: none
    enum moe_blocks moe;
    bool qk_norm;     // per-head LayerNorm on q and k (XL and G); parameters named Wqkv, out_proj
    bool learn_sigma; // the head has 2*channels outputs; rectified flow ignores the second half, DDPM
                      // takes it for the variance
    bool renormalise; // gate weights divided by their sum after top-k (published: no)
    bool balance_per_sequence; // balance loss per image instead of per batch (published: no)
    bool full_frequencies; // of t's embedding: 1 to 1/10000, both among them, as in diffusers;
                           // published: without the last
    float balance;             // its factor: 0.01 in the published code, 0.005 in the paper
    float class_dropout;       // labels replaced by the null class in training
    enum diffusion diffusion;
    enum expert_kind expert; // of the routed experts; shared ones are SwiGLU always
};

enum { TIMESTEP_FEATURES = 256, MLP_RATIO = 4 };

// The adaLN modulations of a block, in the order of their D columns each: of the attention, of the
// MoE.
enum modulation { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2, MODULATIONS };

static inline int config_tokens(const struct config *c)
{
    return (c->size / c->patch) * (c->size / c->patch);
}
static inline int config_out_channels(const struct config *c)
{
    return c->learn_sigma ? 2 * c->channels : c->channels;
}
static inline int config_label_rows(const struct config *c) // the null class is the last row
{
    return c->classes + (c->class_dropout > 0);
}
static inline int config_modulations(const struct config *c) // columns: every block's, then the head's
{
    return (MODULATIONS * c->layers + 2) * c->hidden;
}
bool config_is_moe(const struct config *c, int layer);

// Fills *c from a preset: "S/2-8E2A" = size S, patch 2, 8 experts, 2 active. Sizes S, B, L, XL, G;
// patch 1, 2, 4, 8; without "-8E2A": 8 experts (G: 16), 2 active. ERR_INPUT names what is wrong.
int config_preset(const char *name, struct config *c);

// ERR_INPUT with one line that names the first pair of sizes that do not go together.
int config_check(const struct config *c);

json_t *config_to_json(const struct config *c);
int config_from_json(const json_t *json, struct config *c); // unknown keys are ignored, missing named
bool config_equal(const struct config *a, const struct config *b);

const char *moe_blocks_name(enum moe_blocks m);
int moe_blocks_parse(const char *name, enum moe_blocks *out);
const char *expert_kind_name(enum expert_kind e); // swiglu, gelu
const char *diffusion_name(enum diffusion d); // rf, ddpm
int diffusion_parse(const char *name, enum diffusion *out);

// What `ditmoe info` prints.
struct config_counts {
    int64_t total;  // parameters, position table counted, as published
    int64_t active; // parameters that one token meets
    double macs;    // multiply-accumulates an image and forward pass, without attention's products
    double macs_attention; // the products q k^T and p v
};
struct config_counts config_count(const struct config *c);

#endif
