// The parameters: one table that gives every parameter its published name, shape, initial value and
// place in the device tensors; and the struct of device tensors that weights, gradients, both Adam
// moments and the EMA share.
//
// Experts of a layer lie one after the other in one tensor, gate and up projection together, so
// that a layer's experts are one ragged matrix product; the published names are slices of it.
#ifndef DITMOE_PARAMS_H
#define DITMOE_PARAMS_H

#include "model/config.h"
#include "runtime/placement.h"
#include "runtime/plan.h"

struct block_weights {
    struct tensor qkv_w, qkv_b, proj_w, proj_b;   // [3D,D] [3D] [D,D] [D]
    struct tensor q_norm_w, q_norm_b, k_norm_w, k_norm_b; // [D/H] each, with qk_norm
    struct tensor gate_w;                         // [E,D] router
    // [E,2F,D] (gate rows, then up rows), [E,D,F]; GELU experts: fc1 [E,F,D], fc2 [E,D,F] and
    // biases
    struct tensor experts_gu, experts_down;
    struct tensor experts_fc1_b, experts_fc2_b;   // [E*F] [E*D], GELU experts only
    struct tensor shared_gu, shared_down;         // [2Fs,D], [D,Fs], Fs = shared*D
    struct tensor fc1_w, fc1_b, fc2_w, fc2_b;     // plain MLP blocks: [4D,D] [4D] [D,4D] [D]
};

struct weights {
    struct tensor pos;                            // [T,D], fixed: exists once, in the weights
    struct tensor patch_w, patch_b;               // [D,C*p*p] [D]
    struct tensor t0_w, t0_b, t2_w, t2_b;         // [D,256] [D] [D,D] [D]
    struct tensor labels;                         // [classes+1,D]
    // All adaLN modulations, one product: W = (6L+2)D rows, for each block shift, scale, gate of
    // the attention, then of the MoE; then shift and scale of the head.
    struct tensor ada_w, ada_b;                   // [W,D] [W]
    struct tensor final_w, final_b;               // [p*p*Co,D] [p*p*Co]
    struct block_weights *blocks;                 // [L]
};

enum init {
    INIT_ZERO,
    INIT_ONE,
    INIT_XAVIER,  // uniform, +-sqrt(6/(fan in + fan out))
    INIT_KAIMING, // uniform, +-1/sqrt(fan in): the router
    INIT_NORMAL,  // N(0, 0.02)
    INIT_POSITION // 2-D sin-cos table
};

struct group;

enum { NO_EXPERT = -1, PARAM_ELSEWHERE = -1 };

struct param {
    char name[72]; // published name: "blocks.0.moe.experts.3.gate_proj.weight"
    int ndim;
    int64_t shape[4];
    enum init init;
    bool frozen;     // no gradient, moments or EMA of its own (pos_embed)
    int block;       // -1: in struct weights, else in blocks[block]
    size_t member;   // offset of the device tensor in that struct
    int64_t start;   // first element within it; PARAM_ELSEWHERE: another rank holds it
    int expert;      // that it belongs to, or NO_EXPERT
};

struct params {
    struct config config;
    int count;
    struct param *list;
    int group_count;
    struct group *groups; // the device tensors (params.c)
};

int params_new(const struct config *c, struct params *out);
// The same table where a rank holds only some of the experts: their tensors are [held,...], in
// ascending order of expert, and the others are PARAM_ELSEWHERE. place NULL: all.
int params_new_part(const struct config *c, const struct placement *place, int rank,
                    struct params *out);
// The experts' matrices of block `layer` live in host memory: weights_plan() and its likes give them a
// shape and no memory.
void params_stream(struct params *p, int layer);
void params_free(struct params *p);
int64_t param_count(const struct param *p); // elements
const struct param *params_find(const struct params *p, const char *name);

// The device tensor of `w` that holds the parameter.
struct tensor *param_tensor(struct weights *w, const struct param *p);

// Declares one copy of all parameters (class WEIGHTS, GRADIENTS, ...). `frozen` ones are declared
// (as PLAN_INPUT) only with PLAN_WEIGHTS. Those that products read come first in every class.
int weights_plan(struct weights *w, const struct params *p, struct plan *plan, enum plan_class class);
// Gradients that live only from .first to .last of their lives' entry: a block's of lives[block],
// those of ada_w of lives[layers], the others of lives[layers + 1].
struct block_life {
    int first, last;
};
int weights_plan_passing(struct weights *w, const struct params *p, struct plan *plan,
                         enum plan_class class, const struct block_life *lives);
// The weights on a device that wants them as bf16 for products: those are PLAN_HALF, the others,
// the router's among them (its logits are f32), PLAN_WEIGHTS. With `low`, which training wants,
// their low halves are declared in it as PLAN_LOW.
int weights_plan_half(struct weights *w, struct weights *low, const struct params *p,
                      struct plan *plan);
void weights_free(struct weights *w); // the block array; memory belongs to the plan

// Host transfers of one parameter; `host` holds param_count() floats. A bf16 weight is rounded and
// widened, or with its low half exact.
int param_write(struct context *c, struct weights *w, const struct param *p, const float *host);
int param_read(struct context *c, struct weights *w, const struct param *p, float *host);
// Of a weight that is bf16 and has no low half: as it lies there.
int param_write_bf16(struct context *c, struct weights *w, const struct param *p,
                     const uint16_t *host);

// A whole device tensor from another of the same shape, each f32, bf16 or bf16 with its low half;
// not from f32 to a pair.
int weight_copy(struct context *c, struct tensor *to, const struct tensor *from);

// Initial values as published, a pure function of (seed, parameter).
void param_init(const struct params *all, const struct param *p, uint64_t seed, float *host);

#endif
