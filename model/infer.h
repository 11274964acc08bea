// The configuration of a model from the names and shapes of its tensors, for files that do not say
// it themselves: published DiT-MoE weights of both attention layouts, and plain DiT. Shapes do not
// tell the number of heads (unless q and k are normalised), of active experts, and the kind of
// diffusion: those come from who asks, from the table of published sizes, or are the published
// habit.
#ifndef DITMOE_INFER_H
#define DITMOE_INFER_H

#include "model/config.h"
#include "model/safetensors.h"

// What someone who knows a file says of it; heads and topk 0, diffusion -1: nothing.
struct config_hints {
    int heads, topk, diffusion;
};
#define NO_HINTS ((struct config_hints){0, 0, -1})

enum config_source {
    SOURCE_FILE,   // the file's own configuration
    SOURCE_SHAPES, // names and shapes
    SOURCE_TABLE,  // a published model has this width
    SOURCE_HABIT,  // what published models do: 2 active experts; rectified flow where q and k are
                   // normalised (XL, G), else DDPM
    SOURCE_GIVEN,  // a hint
};
struct config_sources {
    enum config_source others, heads, topk, diffusion;
};
const char *config_source_name(enum config_source s); // "shapes", ...

// `prefix` is that of the tensors' names: "" or "ema.". ERR_INPUT says what is missing, or which
// option must say what cannot be told.
int config_infer(const struct safetensors *s, const char *prefix, const struct config_hints *hints,
                 struct config *out, struct config_sources *sources);

#endif
