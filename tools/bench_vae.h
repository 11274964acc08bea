// `ditmoe bench vae`: an autoencoder's two parts.
#ifndef DITMOE_BENCH_VAE_H
#define DITMOE_BENCH_VAE_H

#include "tools/bench_step.h"

struct bench_vae_settings {
    const char *vae;   // a file, or NULL: Stable Diffusion's architecture with random weights
    const char *sizes; // of images, separated by commas
    int part;          // 0 decode, 1 encode, 2 both
};

// Every size at every batch of `o`: the network alone, without transfers, as the median over
// rounds. Appends one object a row: {"bench": "vae", "name": kind and size, "what": part, "type",
// "batch", "seconds", "images_per_s", "gflops", "of_product", "memory"}. `o` also says whether to
// profile.
int bench_vae(struct device *dev, struct stream *stream, const struct bench_vae_settings *v,
              const struct step_settings *o, const struct ceilings *ceilings, json_t *rows,
              FILE *table);

#endif
