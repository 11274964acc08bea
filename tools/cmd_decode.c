// ditmoe decode: pictures of latents.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/figure.h"
#include "tools/decoder.h"

struct decode_settings {
    struct vae_settings vae;
    struct device_options device;
    const char *latents, *out, *images, *raw;
};

#define AT(member) offsetof(struct decode_settings, member)
static const struct option_spec decode_options[] = {
    {"latents", 0, OPTION_STRING, "FILE", NULL,
     "safetensors file whose tensor latents [N,C,H,W] is decoded, as 'ditmoe sample --latents' "
     "writes it: scaled as diffusion models have it",
     AT(latents), 0, 0, NULL},
    {0},
};
static const struct option_spec output_options[] = {
    {"out", 'o', OPTION_STRING, "FILE.png", NULL, "all images in one grid", AT(out), 0, 0, NULL},
    {"images", 0, OPTION_STRING, "DIR", NULL, "each image as a PNG of its own", AT(images), 0, 0,
     NULL},
    {"raw", 0, OPTION_STRING, "FILE", NULL,
     "a safetensors file with images [N,C,H,W], as they leave the decoder", AT(raw), 0, 0, NULL},
    {0},
};
#undef AT

// ---- what is read -------------------------------------------------------------------------------

static int read_latents(const char *path, int64_t shape[4], float **out)
{
    struct safetensors *file = NULL;
    const struct st_tensor *t = NULL;
    TRY(safetensors_open(path, &file));
    int code = safetensors_expect(file, "latents", -1, 4, (int64_t[]){-1, -1, -1, -1}, &t);
    if (code == 0 && (t->count < 1 || t->shape[0] > 1 << 20 || t->shape[1] > 128 ||
                      t->shape[2] > 8192 || t->shape[3] > 8192))
        code = fail(ERR_INPUT, "%s: latents of this shape cannot be decoded", path);
    if (code == 0) {
        memcpy(shape, t->shape, 4 * sizeof *shape);
        *out = malloc((size_t)t->count * sizeof **out);
        code = *out ? safetensors_read_f32(file, t, *out, 0, t->count)
                    : fail(ERR_NOMEM, "%s: out of memory", path);
    }
    safetensors_close(file);
    return code;
}

// ---- what is written ----------------------------------------------------------------------------

static int picture(const struct pictures *p, int i, struct image *out)
{
    const int64_t each = (int64_t)p->channels * p->height * p->width;
    return image_from_floats(p->values + i * each, p->width, p->height, p->channels, out);
}

static int write_grid(const char *path, const struct pictures *p)
{
    const int columns = (int)ceil(sqrt(p->count)), rows = (p->count + columns - 1) / columns;
    struct image *images = calloc((size_t)rows * (size_t)columns, sizeof *images);
    const struct image_text text = {"Software", "ditmoe " DITMOE_VERSION};
    int code = images ? 0 : fail(ERR_NOMEM, "%s: out of memory", path);
    for (int i = 0; code == 0 && i < p->count; i++)
        code = picture(p, i, &images[i]);
    const struct figure_grid figure = {.images = images, .rows = rows, .columns = columns};
    if (code == 0)
        code = figure_write_grid(path, &figure, &text, 1);
    for (int i = 0; images && i < p->count; i++)
        image_free(&images[i]);
    free(images);
    return code;
}

static int write_images(const char *directory, const struct pictures *p)
{
    char path[4200];
    const struct image_text text = {"Software", "ditmoe " DITMOE_VERSION};
    if (mkdir(directory, 0777) != 0 && errno != EEXIST)
        return fail(ERR_IO, "%s: %s", directory, strerror(errno));
    for (int i = 0; i < p->count; i++) {
        struct image image = {0};
        if (snprintf(path, sizeof path, "%s/%05d.png", directory, i) >= (int)sizeof path)
            return fail(ERR_INPUT, "%.64s...: path too long", directory);
        int code = picture(p, i, &image);
        if (code == 0)
            code = image_write_png(path, &image, &text, 1);
        image_free(&image);
        TRY(code);
    }
    return 0;
}

static int write_raw(const char *path, const struct pictures *p)
{
    const int64_t shape[] = {p->count, p->channels, p->height, p->width};
    struct safetensors_writer *w = NULL;
    TRY(safetensors_create(path, &w));
    int code = safetensors_declare(w, "images", ST_F32, 4, shape);
    if (code == 0)
        code = safetensors_begin(w);
    if (code == 0)
        code = safetensors_write(
            w, p->values, sizeof(float) * (size_t)(shape[0] * shape[1] * shape[2] * shape[3]));
    if (code < 0) {
        safetensors_abort(w);
        return code;
    }
    return safetensors_commit(w);
}

static int write_results(const struct decode_settings *o, const struct pictures *p)
{
    if (o->raw) {
        TRY(write_raw(o->raw, p));
        printf("%s\n", o->raw);
    }
    if (o->out) {
        TRY(write_grid(o->out, p));
        printf("%s\n", o->out);
    }
    if (o->images) {
        TRY(write_images(o->images, p));
        printf("%s\n", o->images);
    }
    return 0;
}

// ---- the command --------------------------------------------------------------------------------

static int decode_run(const struct decode_settings *o)
{
    int64_t shape[4];
    float *latents = NULL;
    struct pictures pictures = {0};
    int code = read_latents(o->latents, shape, &latents);
    if (code == 0)
        code = pictures_decode(&o->vae, &o->device, latents, (int)shape[0], (int)shape[1],
                               (int)shape[2], (int)shape[3], &pictures);
    if (code == 0)
        code = write_results(o, &pictures);
    free(latents);
    free(pictures.values);
    return code;
}

int cmd_decode(int argc, char **argv)
{
    struct decode_settings o = {0};
    const struct option_group groups[] = {
        {"what to decode", decode_options, &o},
        {"the autoencoder", vae_option_list, &o.vae},
        {"what is written (at least one)", output_options, &o},
        {"device", device_option_list, &o.device},
        {0},
    };
    const struct command command = {
        .name = "decode",
        .summary = "Makes pictures of latents.",
        .about = "Decodes latents that 'ditmoe sample --latents' or another program wrote.",
        .example = "ditmoe decode --vae sd-vae-ft-ema --latents latents.safetensors --out grid.png",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.vae.vae || !o.latents)
        return usage_error("decode", "--vae FILE and --latents FILE are needed");
    if (!o.out && !o.images && !o.raw)
        return usage_error("decode", "nothing to write: give --out, --images or --raw");
    return decode_run(&o) < 0 ? report_failure("decode") : 0;
}
