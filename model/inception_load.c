// Inception's weights: each convolution is followed by a normalisation with fixed statistics, which
// is an affine map of its channels and so part of its weights and bias.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/inception.h"
#include "runtime/ops.h"
#include "runtime/rng.h"

static const double EPS = 0.001;

enum { CHANNELS_MAX = 1 << 16 };

static int find_part(const struct safetensors *file, const struct inception_node *node,
                     const char *part, int ndim, const int64_t *shape, const struct st_tensor **out)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", node->name, part);
    int code = safetensors_expect(file, name, -1, ndim, shape, out);
    return code < 0 ? fail_in(code, "not FID's Inception weights") : 0;
}

int inception_weight_shape(const struct safetensors *file, const struct inception_node *node,
                           int64_t channels, int64_t *out)
{
    const struct st_tensor *w;
    const int64_t shape[] = {-1, channels, node->kernel_h, node->kernel_w};
    TRY(find_part(file, node, "conv.weight", 4, shape, &w));
    if (w->shape[0] < 1 || w->shape[0] > CHANNELS_MAX)
        return fail(ERR_INPUT, "%s: %s.conv.weight makes %lld channels", safetensors_path(file),
                    node->name, (long long)w->shape[0]);
    *out = w->shape[0];
    return 0;
}

// scale[O] and bias[O] of the normalisation.
static int read_norm(const struct safetensors *file, const struct inception_node *node, int64_t out,
                     float *scale, float *bias)
{
    static const char *const parts[] = {"bn.weight", "bn.bias", "bn.running_mean",
                                        "bn.running_var"};
    float *v = malloc(sizeof *v * 4 * (size_t)out);
    int code = v ? 0 : fail(ERR_NOMEM, "no host memory for Inception's weights");
    for (int i = 0; i < 4 && code >= 0; i++) {
        const struct st_tensor *t;
        code = find_part(file, node, parts[i], 1, &out, &t);
        if (code >= 0)
            code = safetensors_read_f32(file, t, v + i * out, 0, out);
    }
    for (int64_t o = 0; o < out && code >= 0; o++) {
        const double s = (double)v[o] / sqrt((double)v[3 * out + o] + EPS);
        scale[o] = (float)s;
        bias[o] = (float)((double)v[out + o] - (double)v[2 * out + o] * s);
        if (!isfinite(scale[o]) || !isfinite(bias[o]))
            code = fail(ERR_INPUT, "%s: %s.bn makes values that are not finite",
                        safetensors_path(file), node->name);
    }
    free(v);
    return code;
}

// To nearest even; there is no NaN here that matters.
static uint16_t to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static int write_weight(struct context *c, const struct tensor *t, float *values)
{
    if (t->dtype == F32)
        return tensor_write(c, t, values);
    const int64_t count = tensor_count(t);
    uint16_t *half = malloc(sizeof *half * (size_t)count);
    if (!half)
        return fail(ERR_NOMEM, "no host memory for Inception's weights");
    for (int64_t i = 0; i < count; i++)
        half[i] = to_bf16(values[i]);
    int code = tensor_write(c, t, half);
    free(half);
    return code;
}

static int load_conv(struct inception *n, const struct safetensors *file,
                     const struct inception_node *node, float *read, float *turned)
{
    const struct st_tensor *w;
    const int64_t out = node->channels;
    const int64_t shape[] = {out, n->values[node->from].channels, node->kernel_h, node->kernel_w};
    float *scale = turned, *bias = turned + out; // before it holds the weights
    TRY(find_part(file, node, "conv.weight", 4, shape, &w));
    TRY(safetensors_read_f32(file, w, read, 0, w->count));
    TRY(read_norm(file, node, out, scale, bias));
    const int64_t each = w->count / out;
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < each; i++)
            read[o * each + i] *= scale[o];
    TRY(tensor_write(&n->ctx, &node->bias, bias));
    conv_weight(turned, read, out, shape[1], node->kernel_h, node->kernel_w);
    return write_weight(&n->ctx, &node->w, turned);
}

static int load_classes(struct inception *n, const struct safetensors *file, float *read)
{
    const struct st_tensor *fc;
    TRY(safetensors_expect(file, "fc.weight", -1, 2, n->class_w.shape, &fc));
    TRY(safetensors_read_f32(file, fc, read, 0, fc->count));
    return tensor_write(&n->ctx, &n->class_w, read);
}

// The largest count of values that a weight and its normalisation need on their way.
static size_t most_values(const struct inception *n)
{
    int64_t most = n->classes ? tensor_count(&n->class_w) : 0;
    for (int i = 0; i < n->node_count; i++)
        if (n->nodes[i].op == OP_CONV) {
            const int64_t count = tensor_count(&n->nodes[i].w) + 2 * n->nodes[i].channels;
            most = count > most ? count : most;
        }
    return (size_t)most;
}

int inception_load(struct inception *n, const struct safetensors *file)
{
    const size_t most = most_values(n);
    float *read = malloc(most * sizeof *read), *turned = malloc(most * sizeof *read);
    int code = read && turned ? 0 : fail(ERR_NOMEM, "no host memory for Inception's weights");
    for (int i = 0; i < n->node_count && code >= 0; i++)
        if (n->nodes[i].op == OP_CONV)
            code = load_conv(n, file, &n->nodes[i], read, turned);
    if (code >= 0 && n->classes)
        code = load_classes(n, file, read);
    free(read);
    free(turned);
    return code;
}

int inception_fill(struct inception *n)
{
    float *values = malloc(most_values(n) * sizeof *values);
    int code = values ? 0 : fail(ERR_NOMEM, "no host memory for Inception's weights");
    for (int i = 0; i < n->node_count && code >= 0; i++) {
        const struct inception_node *node = &n->nodes[i];
        if (node->op != OP_CONV)
            continue;
        const size_t count = (size_t)tensor_count(&node->w);
        const float scale = sqrtf(2 / (float)node->w.shape[1]);
        rng_normal_fill(0, rng_stream(RNG_INIT, (uint64_t)i), 0, values, count);
        for (size_t k = 0; k < count; k++)
            values[k] *= scale;
        code = tensor_zero(&n->ctx, &node->bias);
        if (code >= 0)
            code = write_weight(&n->ctx, &node->w, values);
    }
    free(values);
    return code;
}
