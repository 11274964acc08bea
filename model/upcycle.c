// See upcycle.h.
#include "model/upcycle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/weight_list.h"
#include "runtime/rng.h"

static const float deviation = 0.02f; // of what is drawn

int upcycle_config(const struct checkpoint *from, const struct upcycle_options *o,
                   struct config *out)
{
    const struct config *c = &from->config;
    const bool plain = c->moe == MOE_NONE;
    *out = *c;
    if (!plain && c->experts != 1)
        return fail(ERR_INPUT, "%s: has %d experts already; only a dense model can be upcycled",
                    from->path, c->experts);
    if (!plain && o->shared >= 0 && o->shared != c->shared)
        return fail(ERR_INPUT, "%s: its %d shared experts are kept; --shared %d is not possible",
                    from->path, c->shared, o->shared);
    if (plain && o->moe == MOE_NONE)
        return fail(ERR_INPUT, "a mixture of experts in no block is no upcycling");
    if (o->topk < 2)
        return fail(ERR_INPUT,
                    "with one active expert the result would not be the dense model's: the "
                    "weight of a single expert is its probability; use 2 or more");
    out->experts = o->experts;
    out->topk = o->topk;
    out->renormalise = true;
    if (plain) {
        out->expert = EXPERT_GELU;
        out->moe = o->moe;
        out->shared = o->shared > 0 ? o->shared : 0;
    }
    return config_check(out);
}

// The dense model's name for a parameter of an expert, "blocks.3.moe.experts.5.fc1.weight"; false:
// the parameter is none of an expert's.
static bool expert_source(const struct config *dense, const char *name, char out[WEIGHT_NAME])
{
    int block, expert, end = 0;
    if (sscanf(name, "blocks.%d.moe.experts.%d.%n", &block, &expert, &end) != 2 || !end)
        return false;
    snprintf(out, WEIGHT_NAME, "blocks.%d.%s%s", block,
             dense->moe == MOE_NONE ? "mlp." : "moe.experts.0.", name + end);
    return true;
}

struct making {
    const struct checkpoint *from;
    const char *prefix;
    const struct params *dense; // parameters of the dense model
    const struct upcycle_options *options;
    struct weight_list *list;
};

static int add_param(const struct making *m, const struct param *p, uint64_t index)
{
    char source[WEIGHT_NAME];
    struct weight_item *item;
    const bool expert = expert_source(&m->dense->config, p->name, source);
    const bool router = strstr(p->name, ".moe.gate.") != NULL;
    const struct param *q = router ? NULL : params_find(m->dense, expert ? source : p->name);
    const struct st_tensor *t = NULL;
    if (q)
        TRY(checkpoint_tensor(m->from, q, m->prefix, &t));
    TRY(weight_list_add(m->list, p->name, t, m->options->dtype, &item));
    if (t)
        return 0;
    // the router, and a shared expert that there was not
    item->ndim = p->ndim;
    memcpy(item->shape, p->shape, sizeof p->shape);
    item->deviation = strstr(p->name, "shared_experts.down_proj") ? 0 : deviation;
    item->seed = m->options->seed;
    item->stream = rng_stream(RNG_INIT, index);
    return 0;
}

static int write_list(const struct making *m, const struct config *c, const char *path,
                      enum weights_format format)
{
    json_t *json = config_to_json(c);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    const char *const metadata[][2] = {{"ditmoe.config", text}, {"format", "pt"}};
    int code = text ? weight_list_write(m->list, m->from->file, path, format, metadata,
                                        format == WEIGHTS_AS_SAFETENSORS ? 2 : 1)
                    : fail(ERR_NOMEM, "no host memory for the configuration");
    json_decref(json);
    free(text);
    return code;
}

int upcycle_model(const struct checkpoint *from, enum weights_choice which,
                  const struct upcycle_options *o, const char *path, enum weights_format format)
{
    struct config c;
    struct params dense = {0}, made = {0};
    struct weight_list list = {0};
    struct making m = {from, "", &dense, o, &list};
    TRY(upcycle_config(from, o, &c));
    TRY(checkpoint_prefix(from, which, &m.prefix));
    int code = params_new(&from->config, &dense);
    if (code >= 0)
        code = params_new(&c, &made);
    for (int i = 0; code >= 0 && i < made.count; i++)
        code = add_param(&m, &made.list[i], (uint64_t)i);
    if (code >= 0)
        code = write_list(&m, &c, path, format);
    weight_list_free(&list);
    params_free(&dense);
    params_free(&made);
    return code;
}
