// What the kinds of dataset give to data.c. Private to model/data*.c.
#ifndef DITMOE_DATA_KINDS_H
#define DITMOE_DATA_KINDS_H

#include "model/data.h"

struct data_file {
    char *name; // within its class folder
    int label;
};

// IDX files in the directory d->path. idx_present: 1 if the directory has image files of either
// split.
int idx_present(const char *directory);
int idx_open(struct dataset *d, enum data_split split);
void idx_image(const struct dataset *d, int64_t i, bool flip, float *out);

// A set of latents (model/latents.h).
int latents_present(const char *directory);
int latents_dataset(struct dataset *d);

// A folder of class folders.
int folder_open(struct dataset *d);
int folder_image(const struct dataset *d, int64_t i, bool flip, float *out);

#endif
