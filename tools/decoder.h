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
extern const struct option_spec vae_option_list[];

// 0, or exit status 2 after saying that an option goes with --vae only.
int vae_check(const char *command, const struct vae_settings *o); // --vae, --vae-batch, --vae-tile

// Images at a time: as asked, else what keeps a device of this kind busy.
int vae_batch(const struct vae_settings *o, const struct device *dev, int64_t pixels, int count);

// Images [count, channels, height, width] in [-1,1], or what a decoder makes for them.
struct pictures {
    float *values;
    int count, channels, height, width;
};

// A decoder on a device, for latents of one size.
struct decoder {
    struct vae_file file;
    struct vae *vae;
    int batch;                   // images at a time
    int channels, height, width; // of an image
    int64_t latent_size, size;   // values of a latent, of an image
};

// For up to `count` latents [channels, height, width] at once. Where memory does not do it takes
// fewer images at a time, then tiles, and says so.
int decoder_open(const struct session *session, const struct vae_settings *o, int count,
                 int channels, int height, int width, struct decoder *out);
void decoder_close(struct decoder *d); // also of a zeroed struct
// Latents [count] as a diffusion model has them -> images [count]; count <= batch.
int decoder_run(struct decoder *d, const float *latents, int count, float *images);

// Opens o->vae on the device and decodes latents [count, channels, height, width] as a diffusion
// model has them, with progress on stderr. The caller frees out->values.
int pictures_decode(const struct vae_settings *o, const struct device_options *device,
                    const float *latents, int count, int channels, int height, int width,
                    struct pictures *out);
// The same on a device that is open.
int pictures_decode_on(const struct session *session, const struct vae_settings *o,
                       const float *latents, int count, int channels, int height, int width,
                       struct pictures *out);

#endif
