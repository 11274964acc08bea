// The networks of AutoencoderKL and AutoencoderTiny, read off the names in the file.
#include "model/vae_net.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- names --------------------------------------------------------------------------------------

struct builder {
    struct vae_net *n;
    const char *prefix; // "decoder."
};

static const struct st_tensor *find(const struct builder *b, const char *name, const char *what)
{
    char full[256];
    snprintf(full, sizeof full, "%s%s.%s", b->prefix, name, what);
    return safetensors_find(b->n->file->file, full);
}

static bool there(const struct builder *b, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static bool there(const struct builder *b, const char *format, ...)
{
    char name[200];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return find(b, name, "weight") != NULL;
}

static int wrong(const struct builder *b, const char *name, const char *what, const char *why)
{
    return fail(ERR_INPUT, "%s: autoencoder: tensor %s%s.%s %s", b->n->file->path, b->prefix, name,
                what, why);
}

// ---- values and weights -------------------------------------------------------------------------

static int new_value(struct builder *b, int64_t columns)
{
    struct vae_net *n = b->n;
    if (n->value_count == VAE_VALUES)
        return fail(ERR_INPUT, "%s: an autoencoder of more than %d layers", n->file->path,
                    VAE_VALUES);
    n->values[n->value_count] = (struct vae_value){.columns = columns, .first = n->step_count};
    return n->value_count++;
}

static void reads(struct builder *b, int value)
{
    b->n->values[value].last = b->n->step_count;
}

static int add_step(struct builder *b, struct vae_step step)
{
    struct vae_net *n = b->n;
    if (n->step_count == VAE_STEPS)
        return fail(ERR_INPUT, "%s: an autoencoder of more than %d layers", n->file->path,
                    VAE_STEPS);
    reads(b, step.in);
    reads(b, step.out);
    n->steps[n->step_count++] = step;
    return step.out;
}

static int add_weight(struct builder *b, struct vae_weight w)
{
    struct vae_net *n = b->n;
    if (n->weight_count == VAE_WEIGHTS)
        return fail(ERR_INPUT, "%s: an autoencoder of more than %d tensors", n->file->path,
                    VAE_WEIGHTS);
    n->weights[n->weight_count] = w;
    return n->weight_count++;
}

// A vector of `count`; without `needed` -1 where there is none.
static int add_vector(struct builder *b, const char *name, const char *what, int64_t count,
                      int64_t rows, bool needed, int *out)
{
    const struct st_tensor *t = find(b, name, what);
    *out = -1;
    if (!t)
        return needed ? wrong(b, name, what, "is missing") : 0;
    if (t->ndim != 1 || t->count != count)
        return wrong(b, name, what, "has another shape than its layer");
    *out =
        add_weight(b, (struct vae_weight){.from = t, .vector = true, .out = count, .rows = rows});
    return *out < 0 ? *out : 0;
}

// ---- layers: each returns the number of its output, or a negative code --------------------------

// The weight of a convolution of `channels`, or of a linear layer: [out, channels] or with 1 x 1.
static int add_kernel(struct builder *b, const char *name, int64_t channels, bool pad,
                      struct vae_weight *w)
{
    const struct st_tensor *t = find(b, name, "weight");
    if (!t)
        return wrong(b, name, "weight", "is missing");
    if ((t->ndim != 4 && t->ndim != 2) || t->shape[1] != channels || t->shape[0] < 1)
        return wrong(b, name, "weight", "has another shape than its layer");
    *w = (struct vae_weight){
        .from = t, .out = t->shape[0], .channels = channels, .kernel_h = 1, .kernel_w = 1};
    if (t->ndim == 4) {
        if ((t->shape[2] != 1 && t->shape[2] != 3) || t->shape[2] != t->shape[3])
            return wrong(b, name, "weight", "has another shape than its layer");
        w->kernel_h = w->kernel_w = (int)t->shape[2];
    }
    w->rows = pad ? (w->out + 7) / 8 * 8 : w->out;
    return add_weight(b, *w);
}

// A convolution with the geometry `like`, whose kernel and padding ("same", unless stride is 2 as
// the KL encoder's) come from the weight. `into`: the value to add to, or -1.
static int conv_like(struct builder *b, int in, const char *name, struct conv like, bool pad,
                     bool asymmetric, int into)
{
    struct vae_weight w;
    struct vae_step step = {.kind = VAE_CONV, .in = in, .conv = like};
    step.weight = add_kernel(b, name, b->n->values[in].columns, pad, &w);
    TRY(step.weight);
    TRY(add_vector(b, name, "bias", w.out, w.rows, false, &step.bias));
    step.conv.kernel_h = w.kernel_h;
    step.conv.kernel_w = w.kernel_w;
    step.conv.bottom = step.conv.right = w.kernel_h / 2;
    step.conv.top = step.conv.left = asymmetric ? 0 : w.kernel_h / 2;
    step.conv.add = into >= 0;
    step.out = into >= 0 ? into : new_value(b, w.rows);
    TRY(step.out);
    if (b->n->values[step.out].columns != w.rows)
        return wrong(b, name, "weight", "does not fit the residual it joins");
    b->n->halved += like.stride == 2;
    b->n->doubled += like.doubled;
    return add_step(b, step);
}

static int conv(struct builder *b, int in, const char *name)
{
    return conv_like(b, in, name, (struct conv){.stride = 1}, false, false, -1);
}

static int norm(struct builder *b, int in, const char *name, bool silu)
{
    struct vae_step step = {.kind = VAE_NORM, .in = in, .silu = silu};
    const int64_t channels = b->n->values[in].columns;
    if (channels % b->n->file->groups)
        return fail(ERR_INPUT, "%s: autoencoder: %s%s normalises %lld channels in %d groups",
                    b->n->file->path, b->prefix, name, (long long)channels, b->n->file->groups);
    TRY(add_vector(b, name, "weight", channels, channels, true, &step.weight));
    TRY(add_vector(b, name, "bias", channels, channels, true, &step.bias));
    TRY(step.out = new_value(b, channels));
    return add_step(b, step);
}

// ---- AutoencoderKL ------------------------------------------------------------------------------

enum { NAME_MAX_BYTES = 200 };
static void format_name(char out[NAME_MAX_BYTES], const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void format_name(char out[NAME_MAX_BYTES], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(out, NAME_MAX_BYTES, format, args);
    va_end(args);
}

#define NAME(name, ...)        \
    char name[NAME_MAX_BYTES]; \
    format_name(name, __VA_ARGS__)

static int resnet(struct builder *b, int x, const char *at)
{
    NAME(norm1, "%s.norm1", at);
    NAME(conv1, "%s.conv1", at);
    NAME(norm2, "%s.norm2", at);
    NAME(conv2, "%s.conv2", at);
    NAME(shortcut, "%s.conv_shortcut", at);
    int h, y = x;
    TRY(h = norm(b, x, norm1, true));
    TRY(h = conv(b, h, conv1));
    TRY(h = norm(b, h, norm2, true));
    if (there(b, "%s", shortcut))
        TRY(y = conv(b, x, shortcut));
    return conv_like(b, h, conv2, (struct conv){.stride = 1}, false, false, y);
}

// The newer name of an attention layer's product, or the older one, in `out`.
static void attention_name(const struct builder *b, const char *at, const char *newer,
                           const char *older, char out[NAME_MAX_BYTES])
{
    format_name(out, "%s.%s", at, newer);
    if (!there(b, "%s", out) && there(b, "%s.%s", at, older))
        format_name(out, "%s.%s", at, older);
}

static int attention(struct builder *b, int x, const char *at)
{
    char name[NAME_MAX_BYTES];
    NAME(group_norm, "%s.group_norm", at);
    struct vae_step step = {.kind = VAE_ATTENTION, .weight = -1, .bias = -1};
    int h;
    TRY(h = norm(b, x, group_norm, false));
    attention_name(b, at, "to_q", "query", name);
    TRY(step.in = conv(b, h, name));
    attention_name(b, at, "to_k", "key", name);
    TRY(step.keys = conv(b, h, name));
    attention_name(b, at, "to_v", "value", name);
    TRY(step.values = conv(b, h, name));
    const struct vae_value *v = b->n->values;
    if (v[step.in].columns != v[step.keys].columns || v[step.in].columns != v[step.values].columns)
        return wrong(b, at, "to_v.weight", "has another width than queries or keys");
    TRY(step.out = new_value(b, v[step.in].columns));
    reads(b, step.keys);
    reads(b, step.values);
    TRY(h = add_step(b, step));
    attention_name(b, at, "to_out.0", "proj_attn", name);
    return conv_like(b, h, name, (struct conv){.stride = 1}, false, false, x);
}

static int resnets(struct builder *b, int x, const char *at)
{
    for (int j = 0;; j++) {
        NAME(name, "%s.resnets.%d", at, j);
        if (!there(b, "%s.conv1", name))
            return j ? x : wrong(b, name, "conv1.weight", "is missing");
        TRY(x = resnet(b, x, name));
    }
}

static int mid_block(struct builder *b, int x)
{
    TRY(x = resnet(b, x, "mid_block.resnets.0"));
    if (there(b, "mid_block.attentions.0.group_norm"))
        TRY(x = attention(b, x, "mid_block.attentions.0"));
    return resnet(b, x, "mid_block.resnets.1");
}

static int kl_head(struct builder *b, int x, bool pad)
{
    TRY(x = norm(b, x, "conv_norm_out", true));
    return conv_like(b, x, "conv_out", (struct conv){.stride = 1}, pad, false, -1);
}

// quant_conv and post_quant_conv lie outside of the parts' names.
static int quantise(struct builder *b, int x, const char *name)
{
    struct builder outer = {b->n, ""};
    return there(&outer, "%s", name) ? conv(&outer, x, name) : x;
}

static int kl_encoder(struct builder *b, int x)
{
    TRY(x = conv(b, x, "conv_in"));
    for (int i = 0; there(b, "down_blocks.%d.resnets.0.conv1", i); i++) {
        NAME(block, "down_blocks.%d", i);
        NAME(down, "down_blocks.%d.downsamplers.0.conv", i);
        TRY(x = resnets(b, x, block));
        if (there(b, "%s", down)) // padded to the right and below alone
            TRY(x = conv_like(b, x, down, (struct conv){.stride = 2}, false, true, -1));
    }
    TRY(x = mid_block(b, x));
    TRY(x = kl_head(b, x, false));
    return quantise(b, x, "quant_conv");
}

static int kl_decoder(struct builder *b, int x)
{
    TRY(x = quantise(b, x, "post_quant_conv"));
    TRY(x = conv(b, x, "conv_in"));
    TRY(x = mid_block(b, x));
    for (int i = 0; there(b, "up_blocks.%d.resnets.0.conv1", i); i++) {
        NAME(block, "up_blocks.%d", i);
        NAME(up, "up_blocks.%d.upsamplers.0.conv", i);
        TRY(x = resnets(b, x, block));
        if (there(b, "%s", up))
            TRY(x = conv_like(b, x, up, (struct conv){.stride = 1, .doubled = true}, false, false,
                              -1));
    }
    return kl_head(b, x, true);
}

// ---- AutoencoderTiny ----------------------------------------------------------------------------

static int tiny_block(struct builder *b, int x, int layer)
{
    const struct conv relu = {.stride = 1, .relu = true};
    NAME(conv0, "%d.conv.0", layer);
    NAME(conv2, "%d.conv.2", layer);
    NAME(conv4, "%d.conv.4", layer);
    NAME(skip, "%d.skip", layer);
    int h, y = x;
    TRY(h = conv_like(b, x, conv0, relu, false, false, -1));
    TRY(h = conv_like(b, h, conv2, relu, false, false, -1));
    if (there(b, "%s", skip))
        TRY(y = conv(b, x, skip));
    return conv_like(b, h, conv4, relu, false, false, y);
}

// Layers are numbered with those that have no weights. What these are follows from the
// convolutions' places: all but the first and the last halve (encoder: by their stride) or double
// (decoder: before them) the sides; the decoder's first is followed by ReLU.
static int tiny(struct builder *b, int x, enum vae_part part)
{
    int first = -1, last = -1;
    for (int i = 0; i < 100; i++)
        if (there(b, "%d", i)) {
            first = first < 0 ? i : first;
            last = i;
        }
    if (first < 0 || first == last)
        return fail(ERR_INPUT, "%s: autoencoder: no convolutions named %sN.weight",
                    b->n->file->path, b->prefix);
    for (int i = first; i <= last; i++) {
        NAME(name, "%d", i);
        struct conv like = {.stride = 1};
        const bool inner = i > first && i < last, decoder = part == VAE_DECODER;
        if (there(b, "%d.conv.0", i)) {
            TRY(x = tiny_block(b, x, i));
        } else if (there(b, "%d", i)) {
            like.stride = inner && !decoder ? 2 : 1;
            like.doubled = inner && decoder;
            like.relu = i == first && decoder;
            TRY(x = conv_like(b, x, name, like, i == last && decoder, false, -1));
        }
    }
    return x;
}

// ---- the list -----------------------------------------------------------------------------------

int vae_net_build(const struct vae_file *f, enum vae_part part, struct vae_net *out)
{
    struct builder b = {out, f->prefix[part]};
    *out = (struct vae_net){.file = f};
    if (!f->has[part])
        return fail(ERR_INPUT, "%s: holds no %s", f->path,
                    part == VAE_ENCODER ? "encoder" : "decoder");
    out->weights = calloc(VAE_WEIGHTS, sizeof *out->weights);
    out->values = calloc(VAE_VALUES, sizeof *out->values);
    out->steps = calloc(VAE_STEPS, sizeof *out->steps);
    int code = 0, x = 0;
    if (!out->weights || !out->values || !out->steps)
        code = fail(ERR_NOMEM, "no host memory for the layers of an autoencoder");
    if (code == 0)
        code = x = new_value(&b, part == VAE_ENCODER ? f->image_channels : f->latent_channels);
    if (code >= 0 && f->kind == VAE_TINY)
        code = tiny(&b, x, part);
    else if (code >= 0)
        code = part == VAE_ENCODER ? kl_encoder(&b, x) : kl_decoder(&b, x);
    if (code < 0) {
        vae_net_free(out);
        return code;
    }
    out->out = code;
    out->values[code].last = out->step_count;
    out->values[code].f32 = true; // what leaves the network is not rounded
    return 0;
}

void vae_net_free(struct vae_net *n)
{
    free(n->weights);
    free(n->values);
    free(n->steps);
    *n = (struct vae_net){0};
}

void vae_net_resize(struct vae_net *n, int images, int height, int width)
{
    n->values[0].height = height;
    n->values[0].width = width;
    for (int i = 0; i < n->step_count; i++) {
        struct vae_step *s = &n->steps[i];
        const struct vae_value *in = &n->values[s->in];
        struct vae_value *out = &n->values[s->out];
        s->conv.images = images;
        s->conv.height = in->height;
        s->conv.width = in->width;
        out->height = s->kind == VAE_CONV ? (int)conv_height(&s->conv) : in->height;
        out->width = s->kind == VAE_CONV ? (int)conv_width(&s->conv) : in->width;
    }
    for (int i = 0; i < n->value_count; i++) {
        struct vae_value *v = &n->values[i];
        v->t.shape[0] = (int64_t)images * v->height * v->width;
    }
}
