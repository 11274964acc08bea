// See convert.h.
#include "model/convert.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/weight_list.h"

// ---- ours and PyTorch's -------------------------------------------------------------------------

// The weights under `prefix`, named with `named`.
static int list_set(const struct checkpoint *from, const struct params *p, const char *prefix,
                    const char *named, int dtype, struct weight_list *list)
{
    char name[WEIGHT_NAME];
    for (int i = 0; i < p->count; i++) {
        const struct st_tensor *t;
        if (*named && p->list[i].frozen)
            continue; // is there once
        TRY(checkpoint_tensor(from, &p->list[i], prefix, &t));
        snprintf(name, sizeof name, "%s%s", named, p->list[i].name);
        TRY(weight_list_add(list, name, t, dtype, NULL));
    }
    return 0;
}

static int list_model(const struct checkpoint *from, enum weights_choice which, int dtype,
                      struct weight_list *list)
{
    struct params p;
    const char *prefix = "";
    const bool both = which == WEIGHTS_AUTO && from->has_model && from->has_ema;
    TRY(checkpoint_prefix(from, both ? WEIGHTS_MODEL : which, &prefix));
    TRY(params_new(&from->config, &p));
    int code = list_set(from, &p, prefix, "", dtype, list);
    if (code >= 0 && both)
        code = list_set(from, &p, "ema.", "ema.", dtype, list);
    params_free(&p);
    return code;
}

int convert_model(const struct checkpoint *from, enum weights_choice which, int dtype,
                  const char *path, enum weights_format format)
{
    struct weight_list list = {0};
    json_t *json = config_to_json(&from->config);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    const char *const metadata[][2] = {{"ditmoe.config", text}, {"format", "pt"}};
    int code = text ? list_model(from, which, dtype, &list)
                    : fail(ERR_NOMEM, "no host memory for the configuration");
    if (code >= 0)
        code = weight_list_write(&list, from->file, path, format, metadata,
                                 format == WEIGHTS_AS_SAFETENSORS ? 2 : 1);
    weight_list_free(&list);
    json_decref(json);
    free(text);
    return code;
}

int convert_tensors(const struct safetensors *from, int dtype, const char *path,
                    enum weights_format format)
{
    static const char *const metadata[][2] = {{"format", "pt"}};
    struct weight_list list = {0};
    int code = 0;
    for (int i = 0; code >= 0 && i < safetensors_count(from); i++) {
        const struct st_tensor *t = safetensors_at(from, i);
        code = weight_list_add(&list, t->name, t, dtype, NULL);
    }
    if (code >= 0)
        code = weight_list_write(&list, from, path, format, metadata,
                                 format == WEIGHTS_AS_SAFETENSORS);
    weight_list_free(&list);
    return code;
}
