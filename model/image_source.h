// Images one after the other, for programs that look at each of them once: a directory of PNG and
// JPEG files (those of its sub-directories after its own, in the order of their names), or the
// array arr_0, uint8 [N,H,W,3], of an .npz as ADM's evaluator takes it.
#ifndef DITMOE_IMAGE_SOURCE_H
#define DITMOE_IMAGE_SOURCE_H

#include <stdint.h>

#include "model/image.h"
#include "model/npz.h"

struct image_source {
    char *path;
    int64_t count, next;
    char **files; // [count] of a directory
    struct npz *npz;
    struct npz_reader *reader;
    int height, width; // of an .npz's images
};

// No images: ERR_INPUT.
int image_source_folder(const char *path, struct image_source *out);
// Takes over `npz`, also when it fails.
int image_source_npz(struct npz *npz, struct image_source *out);
void image_source_close(struct image_source *s); // also of a zeroed struct

// The next images as RGB, up to `most` (files by several threads), which the caller frees with
// image_free(). Returns how many, 0 at the end. After a failure `out` holds none.
int image_source_next(struct image_source *s, int most, struct image *out);
// Passes over `count` images, or all that are left.
int image_source_skip(struct image_source *s, int64_t count);

#endif
