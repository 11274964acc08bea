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

int vae_check(const char *command, const struct vae_settings *o)
{
    static const char *const details[] = {"vae-batch", "vae-tile", NULL};
    const char *extra = options_given_of(details);
    return extra && !o->vae ? usage_error(command, "--%s goes with --vae FILE", extra) : 0;
}

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

static int make_decoder(const struct session *s, const struct vae_settings *o, int count,
                        int channels, int height, int width, struct decoder *d)
{
    const struct vae_file *f = &d->file;
    if (channels != f->latent_channels)
        return fail(ERR_INPUT, "%s: takes latents of %d channels, not %d", f->path,
                    f->latent_channels, channels);
    d->channels = f->image_channels;
    d->height = height * f->factor;
    d->width = width * f->factor;
    d->latent_size = (int64_t)channels * height * width;
    d->size = (int64_t)d->channels * d->height * d->width;
    struct vae_options options = {.part = VAE_DECODER,
                                  .batch =
                                      vae_batch(o, s->dev, (int64_t)d->height * d->width, count),
                                  .height = height,
                                  .width = width,
                                  .tile = o->tile};
    TRY(open_that_fits(s, f, &options, &d->vae));
    d->batch = options.batch;
    return 0;
}

int decoder_open(const struct session *session, const struct vae_settings *o, int count,
                 int channels, int height, int width, struct decoder *out)
{
    *out = (struct decoder){0};
    TRY(vae_file_open(o->vae, &out->file));
    const int code = make_decoder(session, o, count, channels, height, width, out);
    if (code < 0)
        decoder_close(out);
    return code;
}

void decoder_close(struct decoder *d)
{
    vae_free(d->vae);
    vae_file_close(&d->file);
    *d = (struct decoder){0};
}

int decoder_run(struct decoder *d, const float *latents, int count, float *images)
{
    const int64_t values = count * d->latent_size;
    float *own = malloc((size_t)values * sizeof *own); // the autoencoder's latents
    if (!own)
        return fail(ERR_NOMEM, "out of memory for %d latents", count);
    for (int64_t i = 0; i < values; i++)
        own[i] = latents[i] / d->file.scale + d->file.shift;
    const int code = vae_decode(d->vae, own, count, images);
    free(own);
    return code;
}

static int decode_all(struct decoder *d, const float *latents, const struct pictures *out)
{
    struct progress progress;
    int code = 0;
    progress_start(&progress, "image", 0, out->count, 0);
    for (int first = 0; code == 0 && first < out->count; first += d->batch) {
        const int n = out->count - first < d->batch ? out->count - first : d->batch;
        code = decoder_run(d, latents + first * d->latent_size, n, out->values + first * d->size);
        progress_update(&progress, first + n, "decoding");
        if (code == 0 && stop_wanted)
            code = fail(ERR_STOPPED, "stopped; nothing was written");
    }
    progress_clear(&progress);
    return code;
}

int pictures_decode_on(const struct session *session, const struct vae_settings *o,
                       const float *latents, int count, int channels, int height, int width,
                       struct pictures *out)
{
    struct decoder d;
    *out = (struct pictures){.count = count};
    TRY(decoder_open(session, o, count, channels, height, width, &d));
    out->channels = d.channels;
    out->height = d.height;
    out->width = d.width;
    out->values = malloc((size_t)(count * d.size) * sizeof *out->values);
    const int code = out->values ? decode_all(&d, latents, out)
                                 : fail(ERR_NOMEM, "out of memory for %d images", count);
    decoder_close(&d);
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
    const int code = pictures_decode_on(&session, o, latents, count, channels, height, width, out);
    session_close(&session);
    return code;
}
