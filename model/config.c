#include "model/config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "devices/error.h"

static const struct preset {
    const char *size;
    int layers, hidden, heads, experts;
    bool qk_norm;
} presets[] = {
    {"S", 12, 384, 6, 8, false},   {"B", 12, 768, 12, 8, false},  {"L", 24, 1024, 16, 8, false},
    {"XL", 28, 1152, 16, 8, true}, {"G", 40, 1408, 16, 16, true},
};
enum { PRESETS = sizeof presets / sizeof presets[0] };

static const char *const moe_names[] = {"all", "alternate", "shallow", "deep", "none"};

const char *moe_blocks_name(enum moe_blocks m)
{
    return moe_names[m];
}

int moe_blocks_parse(const char *name, enum moe_blocks *out)
{
    for (int i = 0; i < (int)(sizeof moe_names / sizeof moe_names[0]); i++)
        if (!strcmp(name, moe_names[i])) {
            *out = (enum moe_blocks)i;
            return 0;
        }
    return fail(ERR_INPUT, "blocks with experts: '%s' is none of all, alternate, shallow, deep, none",
                name);
}

const char *expert_kind_name(enum expert_kind e)
{
    return e == EXPERT_GELU ? "gelu" : "swiglu";
}

static int expert_kind_parse(const char *name, enum expert_kind *out)
{
    *out = name && !strcmp(name, "gelu") ? EXPERT_GELU : EXPERT_SWIGLU;
    return !name || !strcmp(name, expert_kind_name(*out))
               ? 0
               : fail(ERR_INPUT, "expert '%.20s' is none of swiglu, gelu", name);
}

static const char *const diffusion_names[] = {"rf", "ddpm"};

const char *diffusion_name(enum diffusion d)
{
    return diffusion_names[d];
}

int diffusion_parse(const char *name, enum diffusion *out)
{
    for (int i = 0; i < (int)(sizeof diffusion_names / sizeof diffusion_names[0]); i++)
        if (!strcmp(name, diffusion_names[i])) {
            *out = (enum diffusion)i;
            return 0;
        }
    return fail(ERR_INPUT, "diffusion '%s' is none of rf, ddpm", name);
}

bool config_is_moe(const struct config *c, int layer)
{
    switch (c->moe) {
    case MOE_ALL:
        return true;
    case MOE_ALTERNATE:
        return layer % 2 == 1;
    case MOE_SHALLOW:
        return layer < c->layers / 2;
    case MOE_DEEP:
        return layer >= c->layers / 2;
    case MOE_NONE:
        break;
    }
    return false;
}

int config_preset(const char *name, struct config *c)
{
    const char *text = strncmp(name, "DiT-MoE-", 8) ? name : name + 8;
    int patch = 0, experts = 0, active = 2, used = 0, more = 0;
    char size[4] = "";
    int fields = sscanf(text, "%3[A-Z]/%2d%n-%4dE%2dA%n", size, &patch, &used, &experts, &active, &more);
    bool whole = fields == 2 ? text[used] == '\0' : fields == 4 && text[more] == '\0' && more > 0;
    const struct preset *p = NULL;
    for (int i = 0; i < PRESETS; i++)
        if (!strcmp(size, presets[i].size))
            p = &presets[i];
    if (!whole || !p || (patch != 1 && patch != 2 && patch != 4 && patch != 8))
        return fail(ERR_INPUT,
                    "model '%s': not a preset; they are SIZE/PATCH-eEkA with size S, B, L, XL or G and "
                    "patch 1, 2, 4 or 8, like S/2-8E2A",
                    name);
    *c = (struct config){
        .layers = p->layers,
        .hidden = p->hidden,
        .heads = p->heads,
        .patch = patch,
        .channels = 4,
        .size = 32,
        .classes = 1000,
        .experts = fields == 4 ? experts : p->experts,
        .topk = active,
        .shared = 2,
        .moe = MOE_ALL,
        .qk_norm = p->qk_norm,
        .learn_sigma = true,
        .balance = 0.01f,
        .class_dropout = 0.1f,
    };
    return config_check(c);
}

static int check_range(const char *what, int value, int low, int high)
{
    if (value < low || value > high)
        return fail(ERR_INPUT, "%s: %d is outside %d..%d", what, value, low, high);
    return 0;
}

int config_check(const struct config *c)
{
    TRY(check_range("layers", c->layers, 1, 1024));
    TRY(check_range("hidden", c->hidden, 4, 65536));
    TRY(check_range("heads", c->heads, 1, 1024));
    TRY(check_range("patch", c->patch, 1, 64));
    TRY(check_range("channels", c->channels, 1, 1024));
    TRY(check_range("size", c->size, 1, 4096));
    TRY(check_range("classes", c->classes, 1, 1000000));
    TRY(check_range("shared experts", c->shared, 0, 64));
    if (c->hidden % c->heads)
        return fail(ERR_INPUT, "hidden %d is not divisible by %d heads", c->hidden, c->heads);
    if (c->hidden / c->heads > 128)
        return fail(ERR_INPUT, "head size %d (hidden %d / %d heads) is over 128: use more heads",
                    c->hidden / c->heads, c->hidden, c->heads);
    if (c->hidden % 4)
        return fail(ERR_INPUT, "hidden %d is not divisible by 4, as the position table needs", c->hidden);
    if (c->size % c->patch)
        return fail(ERR_INPUT, "image size %d is not divisible by patch %d", c->size, c->patch);
    if (c->moe != MOE_NONE) {
        TRY(check_range("experts", c->experts, 1, 512));
        TRY(check_range("active experts (top-k)", c->topk, 1, 64));
        if (c->experts < c->topk)
            return fail(ERR_INPUT, "%d active experts (top-k) of only %d experts", c->topk, c->experts);
    }
    if (!isfinite(c->balance) || c->balance < 0)
        return fail(ERR_INPUT, "balance loss factor %g: must be 0 or more", (double)c->balance);
    if (!(c->class_dropout >= 0 && c->class_dropout < 1))
        return fail(ERR_INPUT, "class dropout %g: must be in [0,1)", (double)c->class_dropout);
    return 0;
}

// ---- JSON ---------------------------------------------------------------------------------------

// One list of the integer and boolean fields keeps writing, reading and comparing in step.
#define CONFIG_INTS(X)                                                                             \
    X(layers) X(hidden) X(heads) X(patch) X(channels) X(size) X(classes) X(experts) X(topk) X(shared)
#define CONFIG_BOOLS(X) X(qk_norm) X(learn_sigma) X(renormalise) X(balance_per_sequence) \
    X(full_frequencies)
#define CONFIG_FLOATS(X) X(balance) X(class_dropout)

json_t *config_to_json(const struct config *c)
{
    json_t *j = json_object();
#define X(f) json_object_set_new(j, #f, json_integer(c->f));
    CONFIG_INTS(X)
#undef X
    json_object_set_new(j, "moe", json_string(moe_blocks_name(c->moe)));
#define X(f) json_object_set_new(j, #f, json_boolean(c->f));
    CONFIG_BOOLS(X)
#undef X
// a float through a short decimal, so that 0.01f is written 0.01
#define X(f)                                                                                       \
    do {                                                                                           \
        char text[32];                                                                             \
        snprintf(text, sizeof text, "%.9g", (double)c->f);                                         \
        for (int digits = 1; digits < 9; digits++) {                                               \
            snprintf(text, sizeof text, "%.*g", digits, (double)c->f);                             \
            if (strtof(text, NULL) == c->f)                                                        \
                break;                                                                             \
        }                                                                                          \
        json_object_set_new(j, #f, json_real(strtod(text, NULL)));                                 \
    } while (0);
    CONFIG_FLOATS(X)
#undef X
    json_object_set_new(j, "expert", json_string(expert_kind_name(c->expert)));
    json_object_set_new(j, "diffusion", json_string(diffusion_name(c->diffusion)));
    return j;
}

static int json_int_field(const json_t *j, const char *key, int *out)
{
    const json_t *v = json_object_get(j, key);
    if (!json_is_integer(v))
        return fail(ERR_INPUT, "configuration: '%s' is missing or not an integer", key);
    json_int_t n = json_integer_value(v);
    if (n < 0 || n > 1000000000)
        return fail(ERR_INPUT, "configuration: '%s' is out of range", key);
    *out = (int)n;
    return 0;
}

int config_from_json(const json_t *j, struct config *c)
{
    if (!json_is_object(j))
        return fail(ERR_INPUT, "configuration: not a JSON object");
    memset(c, 0, sizeof *c);
#define X(f) TRY(json_int_field(j, #f, &c->f));
    CONFIG_INTS(X)
#undef X
    const char *moe = json_string_value(json_object_get(j, "moe"));
    TRY(moe_blocks_parse(moe ? moe : "all", &c->moe));
#define X(f) c->f = json_is_true(json_object_get(j, #f));
    CONFIG_BOOLS(X)
#undef X
    c->balance = 0.01f, c->class_dropout = 0.1f;
#define X(f)                                                                                       \
    if (json_is_number(json_object_get(j, #f)))                                                    \
        c->f = (float)json_number_value(json_object_get(j, #f));
    CONFIG_FLOATS(X)
#undef X
    const char *diffusion = json_string_value(json_object_get(j, "diffusion"));
    TRY(expert_kind_parse(json_string_value(json_object_get(j, "expert")), &c->expert));
    TRY(diffusion_parse(diffusion ? diffusion : "rf", &c->diffusion));
    return config_check(c);
}

bool config_equal(const struct config *a, const struct config *b)
{
#define X(f) &&a->f == b->f
    return a->moe == b->moe && a->diffusion == b->diffusion &&
           a->expert == b->expert CONFIG_INTS(X) CONFIG_BOOLS(X) CONFIG_FLOATS(X);
#undef X
}

// ---- counts -------------------------------------------------------------------------------------

// Products a token makes in one block, and in one image's conditioning; parameters likewise.
struct config_counts config_count(const struct config *c)
{
    const int64_t D = c->hidden, T = config_tokens(c), F = MLP_RATIO * D, hd = D / c->heads;
    const int64_t patch = (int64_t)c->channels * c->patch * c->patch;
    const int64_t head = (int64_t)config_out_channels(c) * c->patch * c->patch;
    const bool gelu = c->expert == EXPERT_GELU;
    const int64_t products = (gelu ? 2 : 3) * D * F, expert = products + (gelu ? F + D : 0);
    const int64_t shared = 3 * D * D * c->shared;
    struct config_counts n = {0};

    n.total = T * D + D * patch + D + TIMESTEP_FEATURES * D + D + D * D + D +
              config_label_rows(c) * D + 2 * D * D + 2 * D + head * D + head;
    n.active = n.total;
    int64_t token = patch * D + head * D;                      // a token's products outside blocks
    int64_t image = TIMESTEP_FEATURES * D + D * D + 2 * D * D; // an image's
    for (int l = 0; l < c->layers; l++) {
        int64_t common = 4 * D * D + 4 * D + 6 * D * D + 6 * D + (c->qk_norm ? 4 * hd : 0);
        n.total += common, n.active += common;
        token += 4 * D * D;
        image += 6 * D * D;
        if (config_is_moe(c, l)) {
            n.total += c->experts * expert + shared + c->experts * D;
            n.active += c->topk * expert + shared + c->experts * D;
            token += c->topk * products + shared + c->experts * D;
        } else {
            n.total += 2 * D * F + F + D, n.active += 2 * D * F + F + D;
            token += 2 * D * F;
        }
    }
    n.macs = (double)token * (double)T + (double)image;
    n.macs_attention = 2.0 * (double)T * (double)T * (double)D * c->layers;
    return n;
}
