// An autoencoder on the command line: its options, and latents made into pictures with them.
#ifndef DITMOE_DECODER_H
#define DITMOE_DECODER_H

#include "model/vae.h"
#include "tools/command.h"

struct vae_settings {
    const char *vae;
    int batch; // 0: chosen
    int tile;  // 0: none, unless memory does not do without
};
extern const struct option_spec vae_option_list[]; // --vae, --vae-batch, --vae-tile

// Images at a time: as asked, else what keeps a device of this kind busy.
int vae_batch(const struct vae_settings *o, const struct device *dev, int64_t pixels, int count);

// Images [count, channels, height, width] in [-1,1], or what a decoder makes for them.
struct pictures {
    float *values;
    int count, channels, height, width;
};

// Opens o->vae on the device and decodes latents [count, channels, height, width] as a diffusion
// model has them, with progress on stderr. Where memory does not do it takes fewer images at a time, then
// tiles, and says so. The caller frees out->values.
int pictures_decode(const struct vae_settings *o, const struct device_options *device,
                    const float *latents, int count, int channels, int height, int width,
                    struct pictures *out);
// The same on a device that is open.
int pictures_decode_on(const struct session *session, const struct vae_settings *o,
                       const float *latents, int count, int channels, int height, int width,
                       struct pictures *out);

#endif
