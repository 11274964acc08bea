// The options of every command that reads a checkpoint, and opening it with them.
#ifndef DITMOE_CKPT_H
#define DITMOE_CKPT_H

#include "tools/command.h"

struct ckpt_options {
    const char *ckpt;
    int weights;     // enum weights_choice
    int heads, topk; // 0: not said
    int diffusion;   // 0: not said, else enum diffusion + 1
};
extern const char *const diffusion_hints[]; // auto, rf, ddpm
extern const struct option_spec ckpt_option_list[]; // --ckpt, --weights, and these
extern const struct option_spec hint_option_list[]; // --heads, --topk, --diffusion

struct config_hints ckpt_hints(const struct ckpt_options *o);

// Opens options.ckpt, a run's directory, or anything that model/weights_file.h opens, and says on
// stderr what of the configuration the file does not tell. The caller frees *out with ckpt_close().
int ckpt_open(const struct ckpt_options *o, struct checkpoint **out);
int ckpt_open_path(const char *path, const struct ckpt_options *o, struct checkpoint **out);
void ckpt_close(struct checkpoint *c); // NULL is allowed

// "6 heads (table), 2 active experts (habit), DDPM (given)": the values and where they come from.
const char *ckpt_assumed(const struct checkpoint *c, char out[200]);

#endif
