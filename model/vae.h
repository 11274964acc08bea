// Autoencoders between images and the latents that a diffusion model works on.
//
// AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752; sd-vae-ft-ema and -mse are such): a
// convolutional encoder to the mean and log variance of a normal distribution for each latent, and
// a decoder. AutoencoderTiny (TAESD): a small one that approximates both. Files are those of
// diffusers, as safetensors or PyTorch's .bin/.pt, with either generation of attention names, and
// TAESD's own taesd_encoder.pth and taesd_decoder.pth. Widths, depths and channels are read from
// names and shapes.
//
// Latents here are the autoencoder's own; a diffusion model's are (latent - shift) * scale (0.18215
// for Stable Diffusion's).
#ifndef DITMOE_VAE_H
#define DITMOE_VAE_H

#include "model/safetensors.h"
#include "runtime/plan.h"

enum vae_kind { VAE_KL, VAE_TINY };
enum vae_part { VAE_ENCODER, VAE_DECODER };

struct vae_file {
    struct safetensors *file;
    char path[4096];
    enum vae_kind kind;
    bool has[2];        // enum vae_part: TAESD's own files hold one each
    char prefix[2][16]; // of the names of a part
    int image_channels, latent_channels;
    int factor; // pixels of an image's side for one of the latent's
    int groups; // of GroupNorm
    float scale, shift;
    char identity[17]; // 64 bits of a hash of names, shapes and values, in hexadecimal
};

// `path`: a file, or diffusers' directory of one (its config.json gives scale, shift and groups,
// else they are Stable Diffusion's, or 1 and 0 for TAESD). ERR_INPUT names the first tensor that is
// missing or has another shape.
int vae_file_open(const char *path, struct vae_file *out);
void vae_file_close(struct vae_file *f); // also of a zeroed struct

// One part on a device, ready to run.
struct vae_options {
    enum vae_part part;
    int batch;         // images at a time
    int height, width; // of the part's input: pixels (multiples of `factor`), or latents
    int tile;       // decoder: side of tiles in latents, a multiple of 4 from 8 on; 0: whole images
    uint64_t limit; // bytes of device memory to plan with; 0: what the device has
};
struct vae;
int vae_new(struct device *dev, struct stream *stream, const struct vae_file *f,
            const struct vae_options *options, struct vae **out);
void vae_free(struct vae *v);             // NULL is allowed
uint64_t vae_memory(const struct vae *v); // bytes of device memory

// images[N,C,H,W] in [-1,1] -> moments[N,2L,h,w]: mean, then log variance, within -30 and 20
// (TAESD: -30). Any N.
int vae_encode(struct vae *v, const float *images, int count, float *moments);
// latents[N,L,h,w] -> images[N,C,H,W], not clamped to [-1,1]. Any N.
//
// In tiles: as diffusers' tiled_decode. Tiles overlap by a quarter; each is decoded by itself and
// blended linearly with the ones above and to the left. That is not the whole image's decoding:
// GroupNorm and attention see one tile.
int vae_decode(struct vae *v, const float *latents, int count, float *images);

// For benchmarks: the network alone, whole images, on what the last run left in the device's
// memory; its floating-point operations (2 a multiply-accumulate of convolutions and attention);
// its context.
int vae_run(struct vae *v);
double vae_flops(const struct vae *v);
struct context *vae_context(struct vae *v);

// A sample of `count` latents of one image as the diffusion model wants them: (mean + exp(logvar /
// 2) * noise - shift) * scale. noise NULL: the mean. moments: mean [count], log variance [count].
void vae_sample(const float *moments, const float *noise, int64_t count, float scale, float shift,
                float *out);

#endif
