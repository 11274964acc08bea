// Names in a directory. Those that start with a dot are not looked at.
#ifndef DITMOE_NAMES_H
#define DITMOE_NAMES_H

#include <stdbool.h>
#include <stdint.h>

#include "devices/error.h"

struct names {
    char **list;
    int64_t count, room;
};
void names_free(struct names *n);

// The names in `directory` that `wanted` accepts, sorted; added to `out`, which the caller frees.
int names_list(const char *directory, bool (*wanted)(const char *directory, const char *name),
               struct names *out);

bool names_folder(const char *directory, const char *name);
bool names_image(const char *directory, const char *name); // *.png, *.jpg or *.jpeg in any case

#endif
