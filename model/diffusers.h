// DiT as diffusers keeps it (DiTTransformer2DModel; Transformer2DModel before): a directory with
// config.json and diffusion_pytorch_model.safetensors or .bin. Plain DiT only: diffusers has no
// mixture of experts, and no normalised q and k, in one.
//
// diffusers divides the exponents of its time embedding's frequencies by F/2 - 1, DiT by F/2:
// models read from there have config.full_frequencies and answer as they do there. What is written
// of a model without keeps its weights, and a note that it is read again as it was; diffusers
// itself answers a little differently with them.
#ifndef DITMOE_DIFFUSERS_H
#define DITMOE_DIFFUSERS_H

#include "model/checkpoint.h"

bool diffusers_is(const struct safetensors *file);

// Gives an opened file under diffusers' names our names and a configuration ("ditmoe.config" in its
// metadata), which comes from the config.json beside it. Takes over *file, also when it fails.
// Every block has an embedding of t and class of its own there: ERR_INPUT where they differ.
int diffusers_adopt(struct safetensors **file);

int diffusers_write(const struct checkpoint *from, enum weights_choice which, int dtype,
                    const char *directory);

#endif
