// The set's index and its reader; see latents.h.
#include "model/latents.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/data_kinds.h"
#include "model/latents_internal.h"
#include "model/vae.h"

int64_t latents_shards(const struct latents_info *info)
{
    return (info->count + info->shard - 1) / info->shard;
}

int64_t latents_shard_images(const struct latents_info *info, int64_t shard)
{
    const int64_t left = info->count - shard * info->shard;
    return left < info->shard ? left : info->shard;
}

int latents_path(const char *directory, int64_t shard, char out[LATENTS_PATH])
{
    const int n = shard < 0 ? snprintf(out, LATENTS_PATH, "%s/latents.json", directory)
                            : snprintf(out, LATENTS_PATH, "%s/shard-%05lld.safetensors", directory,
                                       (long long)shard);
    return n > 0 && n < LATENTS_PATH ? 0 : fail(ERR_INPUT, "%.64s...: path too long", directory);
}

// ---- the index ----------------------------------------------------------------------------------

json_t *latents_to_json(const struct latents_info *i, bool complete)
{
    json_t *names = i->class_names ? json_array() : json_null();
    for (int c = 0; i->class_names && c < i->classes; c++)
        json_array_append_new(names, json_string(i->class_names[c]));
    return json_pack(
        "{s:s,s:i,s:b,s:I,s:I,s:i,s:i,s:i,s:i,s:f,s:f,s:s,s:{s:s,s:s},s:{s:s,s:s},s:o}", "format",
        "ditmoe latents", "version", 1, "complete", complete, "images", (json_int_t)i->count,
        "shard", (json_int_t)i->shard, "channels", i->channels, "side", i->side, "image_size",
        i->image_size, "classes", i->classes, "scale", (double)i->scale, "shift", (double)i->shift,
        "dtype", i->f16 ? "F16" : "F32", "vae", "identity", i->vae, "name", i->vae_name, "data",
        "identity", i->data, "path", i->data_path, "class_names", names);
}

static int take_names(const json_t *names, struct latents_info *out)
{
    if (json_is_null(names))
        return 0;
    if ((int)json_array_size(names) != out->classes)
        return -1;
    out->class_names = calloc((size_t)out->classes, sizeof *out->class_names);
    for (int c = 0; out->class_names && c < out->classes; c++) {
        const char *name = json_string_value(json_array_get(names, (size_t)c));
        if (!name || !(out->class_names[c] = strdup(name)))
            return -1;
    }
    return out->class_names ? 0 : -1;
}

static int take_fields(json_t *json, struct latents_info *out, bool *complete)
{
    json_int_t count = 0, shard = 0;
    int version = 0, whole = 0;
    double scale = 0, shift = 0;
    const char *format, *dtype, *vae, *vae_name, *data, *path;
    json_t *names;
    if (json_unpack(json,
                    "{s:s,s:i,s:b,s:I,s:I,s:i,s:i,s:i,s:i,s:F,s:F,s:s,s:{s:s,s:s},s:{s:s,s:s},s:o}",
                    "format", &format, "version", &version, "complete", &whole, "images", &count,
                    "shard", &shard, "channels", &out->channels, "side", &out->side, "image_size",
                    &out->image_size, "classes", &out->classes, "scale", &scale, "shift", &shift,
                    "dtype", &dtype, "vae", "identity", &vae, "name", &vae_name, "data", "identity",
                    &data, "path", &path, "class_names", &names) < 0)
        return -1;
    if (strcmp(format, "ditmoe latents") || version != 1 || count < 1 || shard < 1 ||
        count > (json_int_t)1 << 40 || shard > 1 << 24 || out->channels < 1 || out->channels > 64 ||
        out->side < 1 || out->side > 4096 || out->classes < 1 || out->classes > 1000000 ||
        !(scale > 0) || (strcmp(dtype, "F16") && strcmp(dtype, "F32")))
        return -1;
    out->count = count;
    out->shard = shard;
    out->scale = (float)scale;
    out->shift = (float)shift;
    out->f16 = !strcmp(dtype, "F16");
    *complete = whole;
    snprintf(out->vae, sizeof out->vae, "%s", vae);
    snprintf(out->data, sizeof out->data, "%s", data);
    snprintf(out->vae_name, sizeof out->vae_name, "%s", vae_name);
    snprintf(out->data_path, sizeof out->data_path, "%s", path);
    return take_names(names, out);
}

int latents_read_index(const char *directory, struct latents_info *out, bool *complete)
{
    char path[LATENTS_PATH];
    json_error_t error;
    *out = (struct latents_info){0};
    TRY(latents_path(directory, -1, path));
    json_t *json = json_load_file(path, 0, &error);
    if (!json)
        return fail(ERR_INPUT, "%s: line %d: %s", path, error.line, error.text);
    const int code = take_fields(json, out, complete);
    json_decref(json);
    if (code == 0)
        return 0;
    latents_info_free(out);
    return fail(ERR_INPUT, "%s: is no index of a set of latents of this version", path);
}

void latents_info_free(struct latents_info *info)
{
    for (int c = 0; info->class_names && c < info->classes; c++)
        free(info->class_names[c]);
    free(info->class_names);
    info->class_names = NULL;
}

// ---- shards -------------------------------------------------------------------------------------

int latents_open_shard(const char *directory, const struct latents_info *info, int64_t shard,
                       struct latents_shard *out)
{
    char path[LATENTS_PATH];
    const int64_t n = latents_shard_images(info, shard);
    const int64_t shape[] = {n, 2, 2 * (int64_t)info->channels, info->side, info->side};
    *out = (struct latents_shard){0};
    TRY(latents_path(directory, shard, path));
    TRY(safetensors_open(path, &out->file));
    int code = safetensors_expect(out->file, "moments", info->f16 ? ST_F16 : ST_F32, 5, shape,
                                  &out->moments);
    if (code == 0)
        code = safetensors_expect(out->file, "labels", ST_I32, 1, shape, &out->labels);
    const char *vae = safetensors_metadata(out->file, "vae");
    const char *data = safetensors_metadata(out->file, "data");
    if (code == 0 && (!vae || !data || strcmp(vae, info->vae) || strcmp(data, info->data)))
        code = fail(ERR_INPUT, "%s: is a shard of another set of latents", path);
    for (int64_t i = 0; code == 0 && i < n; i++) {
        const int label = latents_shard_label(out, i);
        if (label < 0 || label >= info->classes)
            code = fail(ERR_INPUT, "%s: label %d of image %lld; the set has %d classes", path,
                        label, (long long)i, info->classes);
    }
    if (code < 0)
        latents_shard_close(out);
    return code;
}

void latents_shard_close(struct latents_shard *s)
{
    safetensors_close(s->file);
    *s = (struct latents_shard){0};
}

int latents_shard_label(const struct latents_shard *s, int64_t i)
{
    int32_t label;
    memcpy(&label, (const char *)s->labels->data + i * (int64_t)sizeof label, sizeof label);
    return label;
}

// ---- reading ------------------------------------------------------------------------------------

struct latents {
    struct latents_info info;
    struct latents_shard *shards;
};

int latents_open(const char *directory, struct latents **out)
{
    bool complete = false;
    *out = NULL;
    struct latents *l = calloc(1, sizeof *l);
    if (!l)
        return fail(ERR_NOMEM, "%s: out of memory", directory);
    int code = latents_read_index(directory, &l->info, &complete);
    if (code == 0 && !complete)
        code = fail(ERR_INPUT,
                    "%s: the set is not complete: 'ditmoe encode' with the same options goes on "
                    "with it",
                    directory);
    // a file for every shard that is named: the index alone makes nothing large
    int64_t count = code == 0 ? latents_shards(&l->info) : 0, room = 0;
    for (int64_t s = 0; code == 0 && s < count; s++) {
        if (s == room) {
            room = room ? 2 * room : 16;
            struct latents_shard *more = realloc(l->shards, (size_t)room * sizeof *more);
            if (!more) {
                code = fail(ERR_NOMEM, "%s: out of memory", directory);
                break;
            }
            memset(more + s, 0, (size_t)(room - s) * sizeof *more);
            l->shards = more;
        }
        code = latents_open_shard(directory, &l->info, s, &l->shards[s]);
    }
    if (code < 0) {
        if (l->shards)
            for (int64_t s = 0; s < room && s < count; s++)
                latents_shard_close(&l->shards[s]);
        free(l->shards);
        latents_info_free(&l->info);
        free(l);
        return code;
    }
    *out = l;
    return 0;
}

void latents_close(struct latents *l)
{
    if (!l)
        return;
    for (int64_t s = 0; s < latents_shards(&l->info); s++)
        latents_shard_close(&l->shards[s]);
    free(l->shards);
    latents_info_free(&l->info);
    free(l);
}

const struct latents_info *latents_info(const struct latents *l)
{
    return &l->info;
}

int latents_label(const struct latents *l, int64_t i)
{
    return latents_shard_label(&l->shards[i / l->info.shard], i % l->info.shard);
}

int latents_sample(const struct latents *l, int64_t i, bool flip, const float *noise, float *out)
{
    const struct latents_info *info = &l->info;
    const struct latents_shard *s = &l->shards[i / info->shard];
    const int64_t each = (int64_t)info->channels * info->side * info->side;
    float *moments = malloc((size_t)(2 * each) * sizeof *moments);
    if (!moments)
        return fail(ERR_NOMEM, "out of memory for a latent");
    const int code = safetensors_read_f32(s->file, s->moments, moments,
                                          (i % info->shard * 2 + flip) * 2 * each, 2 * each);
    if (code == 0)
        vae_sample(moments, noise, each, info->scale, info->shift, out);
    free(moments);
    return code;
}

// ---- as a dataset -------------------------------------------------------------------------------

int latents_present(const char *directory)
{
    char path[LATENTS_PATH];
    struct stat s;
    return latents_path(directory, -1, path) == 0 && stat(path, &s) == 0;
}

int latents_dataset(struct dataset *d)
{
    TRY(latents_open(d->path, &d->latents));
    const struct latents_info *info = latents_info(d->latents);
    if (d->size && d->size != info->side && d->size != info->image_size)
        return fail(ERR_INPUT, "%s: holds latents of side %d, of images of %d, not %d", d->path,
                    info->side, info->image_size, d->size);
    if (d->channels && d->channels != info->channels)
        return fail(ERR_INPUT, "%s: holds latents of %d channels, not %d", d->path, info->channels,
                    d->channels);
    d->count = info->count;
    d->classes = info->classes;
    d->size = info->side;
    d->channels = info->channels;
    d->class_names = calloc((size_t)d->classes, sizeof *d->class_names);
    if (!d->class_names)
        return fail(ERR_NOMEM, "%s: out of memory", d->path);
    for (int c = 0; c < d->classes; c++) {
        const char *name = info->class_names ? info->class_names[c] : "";
        if (!(d->class_names[c] = strdup(name)))
            return fail(ERR_NOMEM, "%s: out of memory", d->path);
    }
    return 0;
}
