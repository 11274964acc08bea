// Files of autoencoders: what kind it is, and what its shapes say.
#include "model/vae.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "devices/hash.h"
#include "model/vae_net.h"
#include "model/weights_file.h"

static const struct st_tensor *find(const struct vae_file *f, const char *prefix, const char *name)
{
    char full[200];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return safetensors_find(f->file, full);
}

// ---- what kind of file --------------------------------------------------------------------------

static void set_part(struct vae_file *f, enum vae_part part, const char *prefix)
{
    f->has[part] = true;
    snprintf(f->prefix[part], sizeof f->prefix[part], "%s", prefix);
}

// A convolution's weight of 4 dimensions, or NULL.
static const struct st_tensor *kernel(const struct vae_file *f, const char *prefix,
                                      const char *name)
{
    const struct st_tensor *t = find(f, prefix, name);
    return t && t->ndim == 4 ? t : NULL;
}

static int find_parts(struct vae_file *f)
{
    if (kernel(f, "encoder.", "conv_in.weight"))
        set_part(f, VAE_ENCODER, "encoder.");
    if (kernel(f, "decoder.", "conv_in.weight"))
        set_part(f, VAE_DECODER, "decoder.");
    if (f->has[VAE_ENCODER] || f->has[VAE_DECODER])
        return 0;
    f->kind = VAE_TINY;
    if (kernel(f, "encoder.layers.", "0.weight"))
        set_part(f, VAE_ENCODER, "encoder.layers.");
    if (kernel(f, "decoder.layers.", "0.weight"))
        set_part(f, VAE_DECODER, "decoder.layers.");
    // TAESD's own files: the decoder's layer 0 clamps
    if (!f->has[VAE_ENCODER] && !f->has[VAE_DECODER] && kernel(f, "", "0.weight"))
        set_part(f, VAE_ENCODER, "");
    else if (!f->has[VAE_ENCODER] && !f->has[VAE_DECODER] && kernel(f, "", "1.weight"))
        set_part(f, VAE_DECODER, "");
    if (f->has[VAE_ENCODER] || f->has[VAE_DECODER])
        return 0;
    return fail(ERR_INPUT,
                "%s: no autoencoder: neither AutoencoderKL's decoder.conv_in.weight nor "
                "AutoencoderTiny's decoder.layers.0.weight is in it",
                f->path);
}

// ---- what the shapes say ------------------------------------------------------------------------

// The last convolution of a part, by its number of output channels.
static int64_t last_channels(const struct vae_net *n)
{
    const struct vae_step *s = &n->steps[n->step_count - 1];
    return n->weights[s->weight].out;
}

static int64_t first_channels(const struct vae_file *f, enum vae_part part)
{
    const struct st_tensor *t = NULL;
    if (f->kind == VAE_KL && part == VAE_DECODER)
        t = kernel(f, "", "post_quant_conv.weight");
    if (!t && f->kind == VAE_KL)
        t = kernel(f, f->prefix[part], "conv_in.weight");
    if (!t)
        t = kernel(f, f->prefix[part], "0.weight");
    if (!t)
        t = kernel(f, f->prefix[part], "1.weight");
    return t ? t->shape[1] : 0;
}

// 32 as diffusers has it, or, for narrow networks, the most groups that every width allows.
static int guess_groups(const struct vae_file *f)
{
    int64_t groups = 32;
    for (int i = 0; i < safetensors_count(f->file); i++) {
        const struct st_tensor *t = safetensors_at(f->file, i);
        if (!strstr(t->name, "norm") || t->ndim != 1)
            continue;
        while (t->shape[0] > 0 && t->shape[0] % groups)
            groups--;
    }
    return (int)groups;
}

// Builds a part to see that it is whole, and takes its channels and factor.
static int look_at_part(struct vae_file *f, enum vae_part part)
{
    struct vae_net net;
    const bool encoder = part == VAE_ENCODER;
    int64_t in = first_channels(f, part), out;
    if (in < 1 || in > 64)
        return fail(ERR_INPUT, "%s: an autoencoder with %lld channels at its entrance", f->path,
                    (long long)in);
    *(encoder ? &f->image_channels : &f->latent_channels) = (int)in;
    TRY(vae_net_build(f, part, &net));
    out = last_channels(&net);
    const int factor = 1 << (encoder ? net.halved : net.doubled);
    vae_net_free(&net);
    if (out < 1 || out > 128 || (encoder && f->kind == VAE_KL && out % 2))
        return fail(ERR_INPUT, "%s: an autoencoder with %lld channels at its exit", f->path,
                    (long long)out);
    const int64_t latents = encoder ? (f->kind == VAE_KL ? out / 2 : out) : in;
    const int64_t images = encoder ? in : out;
    if ((f->factor && f->factor != factor) ||
        (f->factor && (f->latent_channels != latents || f->image_channels != images)))
        return fail(ERR_INPUT, "%s: the autoencoder's decoder does not fit its encoder", f->path);
    f->factor = factor;
    f->latent_channels = (int)latents;
    f->image_channels = (int)images;
    if (images != 1 && images != 3)
        return fail(ERR_INPUT, "%s: the autoencoder's images have %lld channels, not 1 or 3",
                    f->path, (long long)images);
    return 0;
}

// Over names, shapes and a thousand bytes or so of every tensor: enough to tell files apart.
static void identify(struct vae_file *f)
{
    uint64_t hash = HASH_START;
    for (int i = 0; i < safetensors_count(f->file); i++) {
        const struct st_tensor *t = safetensors_at(f->file, i);
        const size_t bytes = t->strided ? 0 : t->bytes < 1024 ? (size_t)t->bytes : 1024;
        hash = hash_bytes(hash, t->name, strlen(t->name));
        hash = hash_bytes(hash, t->shape, (size_t)t->ndim * sizeof *t->shape);
        hash = hash_bytes(hash, t->data, bytes);
    }
    snprintf(f->identity, sizeof f->identity, "%016llx", (unsigned long long)hash);
}

// ---- config.json --------------------------------------------------------------------------------

static int take_number(const struct vae_file *f, const json_t *config, const char *key, double low,
                       double high, double *out)
{
    const json_t *v = json_object_get(config, key);
    if (!v || json_is_null(v))
        return 0;
    const double value = json_number_value(v);
    if (!json_is_number(v) || !(value >= low && value <= high))
        return fail(ERR_INPUT, "%s: config.json: %s is no number from %g to %g", f->path, key, low,
                    high);
    *out = value;
    return 0;
}

static int read_config(struct vae_file *f, const char *directory)
{
    char path[4200];
    json_error_t error;
    double scale = (double)f->scale, shift = 0, groups = f->groups;
    snprintf(path, sizeof path, "%s/config.json", directory);
    struct stat s;
    if (stat(path, &s) != 0)
        return 0;
    json_t *config = json_load_file(path, 0, &error);
    if (!config)
        return fail(ERR_INPUT, "%s: line %d: %s", path, error.line, error.text);
    int code = take_number(f, config, "scaling_factor", 1e-6, 1e6, &scale);
    if (code == 0)
        code = take_number(f, config, "shift_factor", -1e6, 1e6, &shift);
    if (code == 0)
        code = take_number(f, config, "norm_num_groups", 1, 4096, &groups);
    json_decref(config);
    f->scale = (float)scale;
    f->shift = (float)shift;
    f->groups = (int)groups;
    return code;
}

// ---- opening ------------------------------------------------------------------------------------

static int find_file(const char *directory, char *out, size_t size)
{
    static const char *const names[] = {"diffusion_pytorch_model.safetensors",
                                        "diffusion_pytorch_model.bin",
                                        "diffusion_pytorch_model.fp16.safetensors"};
    struct stat s;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const int n = snprintf(out, size, "%s/%s", directory, names[i]);
        if (n > 0 && (size_t)n < size && stat(out, &s) == 0)
            return 0;
    }
    return fail(ERR_IO, "%s: no autoencoder in it (%s or .bin)", directory, names[0]);
}

static int open_parts(struct vae_file *f, const char *directory)
{
    TRY(find_parts(f));
    f->scale = f->kind == VAE_KL ? 0.18215f : 1;
    f->groups = guess_groups(f);
    if (directory)
        TRY(read_config(f, directory));
    for (int part = VAE_ENCODER; part <= VAE_DECODER; part++)
        if (f->has[part])
            TRY(look_at_part(f, (enum vae_part)part));
    identify(f);
    return 0;
}

int vae_file_open(const char *path, struct vae_file *out)
{
    struct stat s;
    *out = (struct vae_file){0};
    if (stat(path, &s) != 0)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    const bool directory = S_ISDIR(s.st_mode);
    if (directory)
        TRY(find_file(path, out->path, sizeof out->path));
    else if ((size_t)snprintf(out->path, sizeof out->path, "%s", path) >= sizeof out->path)
        return fail(ERR_INPUT, "%.64s...: path too long", path);
    TRY(weights_file_open(out->path, &out->file));
    const int code = open_parts(out, directory ? path : NULL);
    if (code < 0)
        vae_file_close(out);
    return code;
}

void vae_file_close(struct vae_file *f)
{
    safetensors_close(f->file);
    *f = (struct vae_file){0};
}
