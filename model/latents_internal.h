// What latents.c and latents_write.c share.
#ifndef DITMOE_LATENTS_INTERNAL_H
#define DITMOE_LATENTS_INTERNAL_H

#include <jansson.h>

#include "model/latents.h"
#include "model/safetensors.h"

enum { LATENTS_PATH = 4200 };

// Path of a shard; of the index for shard -1.
int latents_path(const char *directory, int64_t shard, char out[LATENTS_PATH]);
int64_t latents_shard_images(const struct latents_info *info, int64_t shard);

json_t *latents_to_json(const struct latents_info *info, bool complete);
int latents_read_index(const char *directory, struct latents_info *out, bool *complete);
void latents_info_free(struct latents_info *info); // its class names

struct latents_shard {
    struct safetensors *file;
    const struct st_tensor *moments, *labels;
};
int latents_open_shard(const char *directory, const struct latents_info *info, int64_t shard,
                       struct latents_shard *out);
void latents_shard_close(struct latents_shard *s); // also of a zeroed one
int latents_shard_label(const struct latents_shard *s, int64_t i);

#endif
