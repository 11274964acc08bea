#include "tools/decoder.h"

#include <stdio.h>
#include <stdlib.h>

#include "tools/progress.h"

#define AT(member) offsetof(struct vae_settings, member)
const struct option_spec vae_option_list[] = {
    {"vae", 0, OPTION_STRING, "FILE", NULL,
     "the autoencoder: AutoencoderKL or AutoencoderTiny of diffusers (a file, or its directory "
     "with "
     "config.json), or TAESD's own .pth",
     AT(vae), 0, 0, NULL},
    {"vae-batch", 0, OPTION_INT, "N", "0", "images that it takes at a time (0: chosen)", AT(batch),
     0, 4096, NULL},
    {"vae-tile", 0, OPTION_INT, "N", "0",
     "decode in overlapping tiles of N x N latents, for little memory (0: whole images, where they "
     "fit)",
     AT(tile), 0, 4096, NULL},
    {0},
};
#undef AT

int vae_batch(const struct vae_settings *o, const struct device *dev, int64_t pixels, int count)
{
    enum { GPU_PIXELS = 16 * 256 * 256 };
    int64_t batch = o->batch;
    if (batch == 0)
        batch = dev->cpu_forms || pixels > GPU_PIXELS ? 1 : GPU_PIXELS / pixels;
    return batch < count ? (int)batch : count;
}

static int open_that_fits(const struct session *s, const struct vae_file *f, struct vae_options *o,
                          struct vae **out)
{
    enum { FALLBACK_TILE = 32 };
    int code;
    while ((code = vae_new(s->dev, s->stream, f, o, out)) == ERR_NOMEM) {
        if (o->batch > 1)
            o->batch /= 2;
        else if (o->tile == 0 && (o->height > FALLBACK_TILE || o->width > FALLBACK_TILE))
            o->tile = FALLBACK_TILE;
        else
            break;
        fprintf(stderr, "note: %s; decoding %d at a time%s\n", error_message(), o->batch,
                o->tile ? ", in tiles" : "");
    }
    return code;
}

static int decode_all(struct vae *v, int batch, const float *latents, int64_t each,
                      const struct pictures *out)
{
    struct progress progress;
    const int64_t made = (int64_t)out->channels * out->height * out->width;
    int code = 0;
    progress_start(&progress, "image", 0, out->count, 0);
    for (int first = 0; code == 0 && first < out->count; first += batch) {
        const int n = out->count - first < batch ? out->count - first : batch;
        code = vae_decode(v, latents + first * each, n, out->values + first * made);
        progress_update(&progress, first + n, "decoding");
        if (code == 0 && stop_wanted)
            code = fail(ERR_STOPPED, "stopped; nothing was written");
    }
    progress_clear(&progress);
    return code;
}

// The autoencoder's own latents.
static float *unscale(const struct vae_file *f, const float *latents, int64_t count)
{
    float *own = malloc((size_t)count * sizeof *own);
    for (int64_t i = 0; own && i < count; i++)
        own[i] = latents[i] / f->scale + f->shift;
    return own;
}

static int decode_with(const struct session *s, const struct vae_file *f,
                       const struct vae_settings *o, const float *latents, int channels, int height,
                       int width, struct pictures *out)
{
    struct vae *v = NULL;
    const int64_t each = (int64_t)channels * height * width;
    if (channels != f->latent_channels)
        return fail(ERR_INPUT, "%s: takes latents of %d channels, not %d", f->path,
                    f->latent_channels, channels);
    out->channels = f->image_channels;
    out->height = height * f->factor;
    out->width = width * f->factor;
    const int64_t pixels = (int64_t)out->height * out->width;
    struct vae_options options = {.part = VAE_DECODER,
                                  .batch = vae_batch(o, s->dev, pixels, out->count),
                                  .height = height,
                                  .width = width,
                                  .tile = o->tile};
    TRY(open_that_fits(s, f, &options, &v));
    float *own = unscale(f, latents, out->count * each);
    out->values = malloc((size_t)(out->count * out->channels * pixels) * sizeof *out->values);
    int code = own && out->values ? 0 : fail(ERR_NOMEM, "out of memory for %d images", out->count);
    if (code == 0)
        code = decode_all(v, options.batch, own, each, out);
    free(own);
    vae_free(v);
    return code;
}

int pictures_decode_on(const struct session *session, const struct vae_settings *o,
                       const float *latents, int count, int channels, int height, int width,
                       struct pictures *out)
{
    struct vae_file file;
    *out = (struct pictures){.count = count};
    TRY(vae_file_open(o->vae, &file));
    const int code = decode_with(session, &file, o, latents, channels, height, width, out);
    vae_file_close(&file);
    if (code < 0) {
        free(out->values);
        out->values = NULL;
    }
    return code;
}

int pictures_decode(const struct vae_settings *o, const struct device_options *device,
                    const float *latents, int count, int channels, int height, int width,
                    struct pictures *out)
{
    struct session session;
    TRY(session_open(device, &session));
    stop_on_signals();
    const int code =
        pictures_decode_on(&session, o, latents, count, channels, height, width, out);
    session_close(&session);
    return code;
}
