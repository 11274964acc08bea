// A dense model becomes a mixture of experts that computes the same (Komatsuzaki et al. 2023,
// "Sparse Upcycling"; DiT-MoE section 3.3): every expert is a copy of the block's MLP, the router
// is drawn from N(0, 0.02), and training goes on from there.
//
//   plain DiT          -> experts are its GELU MLPs with biases (EXPERT_GELU)
//   DiT-MoE, 1 expert  -> experts are copies of that one; its shared expert stays as it is
//
// The answer is the dense model's, to rounding: the weights of a token's experts are made to sum to
// 1 (config.renormalise; hence 2 active experts or more, as the weight of a single one is its
// probability), and a shared expert that the dense model has not got starts with a down projection
// of zeros.
#ifndef DITMOE_UPCYCLE_H
#define DITMOE_UPCYCLE_H

#include "model/checkpoint.h"
#include "model/weights_writer.h"

struct upcycle_options {
    int experts, topk;
    int shared;          // of a plain DiT; < 0: none, or what the one-expert model has
    enum moe_blocks moe; // which blocks of a plain DiT get experts
    uint64_t seed;       // of the router
    int dtype;           // < 0: weights as they are, the router f32
};

// The configuration of what is to be made, or ERR_INPUT saying why it cannot be.
int upcycle_config(const struct checkpoint *from, const struct upcycle_options *o,
                   struct config *out);

int upcycle_model(const struct checkpoint *from, enum weights_choice which,
                  const struct upcycle_options *o, const char *path, enum weights_format format);

#endif
