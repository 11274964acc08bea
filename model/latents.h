// A set of latents: what an encoder makes of a dataset, once, so that training need not.
//
// A directory with latents.json, which says what the set is, and shards of equal numbers of images:
// shard-00000.safetensors holds moments [n, 2, 2L, side, side] (of each image, then of its mirror
// image: mean and log variance of L channels; f16 or f32) and labels [n] (I32). Shards appear whole
// or not at all, so an interrupted encoding goes on where it was; latents.json says "complete" when
// they are all there. Shards are mapped, not read.
#ifndef DITMOE_LATENTS_H
#define DITMOE_LATENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "devices/error.h"

struct latents_info {
    int64_t count;      // images
    int64_t shard;      // of them in a shard; the last may have fewer
    int channels, side; // of a latent
    int image_size;     // of the images
    int classes;
    float scale, shift; // a diffusion model's latents are (latent - shift) * scale
    bool f16;
    char vae[17], data[17]; // identities: vae_file's, data_identity()'s
    char vae_name[256], data_path[256];
    char **class_names; // [classes], or NULL
};
int64_t latents_shards(const struct latents_info *info);

// ---- writing ------------------------------------------------------------------------------------

// Makes the directory, or finds there an interrupted encoding of the very same set; ERR_INPUT where
// there is another, or other files. *complete: there is nothing left to do. Locked until the
// returned descriptor is closed, against a second writer.
int latents_begin(const char *directory, const struct latents_info *info, bool *complete,
                  int *lock);
// Whether shard number `shard` is there, whole and of this set. A damaged one is written again.
bool latents_has_shard(const char *directory, const struct latents_info *info, int64_t shard);

// One shard: open, then all its images in order, then close. moments[2, 2L, side, side].
struct latents_writer;
int latents_writer_open(const char *directory, const struct latents_info *info, int64_t shard,
                        struct latents_writer **out);
int latents_writer_add(struct latents_writer *w, const float *moments, int label);
int latents_writer_close(struct latents_writer *w); // releases w also when it fails
void latents_writer_abort(struct latents_writer *w);

int latents_end(const char *directory, const struct latents_info *info); // all shards are there

// ---- reading ------------------------------------------------------------------------------------

struct latents;

// ERR_INPUT for a set that is not complete, or with a shard that is missing, cut or another's.
int latents_open(const char *directory, struct latents **out);
void latents_close(struct latents *l); // NULL is allowed
const struct latents_info *latents_info(const struct latents *l);

int latents_label(const struct latents *l, int64_t i);
// Image i, or its mirror image, as a diffusion model has it: [L, side, side]. noise: as many
// standard normal numbers, or NULL for the mean. Any thread, at the same time.
int latents_sample(const struct latents *l, int64_t i, bool flip, const float *noise, float *out);

#endif
