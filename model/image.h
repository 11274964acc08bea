// Images in memory, 8 bits a sample, and their files: PNG and JPEG in, PNG out.
//
// Files are recognised by content, never by name. Errors are one line naming the file: ERR_INPUT
// for what is no image, damaged, cut short or absurdly large, ERR_IO for what cannot be read or
// written.
#ifndef DITMOE_IMAGE_H
#define DITMOE_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct image {
    int width, height;
    int channels;    // 1 grey, 3 RGB
    uint8_t *pixels; // [height, width, channels]
};

enum { IMAGE_MAX_SIDE = 65500, IMAGE_MAX_PIXELS = 100000000 };

int image_new(int width, int height, int channels, struct image *out); // pixels are zero
void image_free(struct image *image);                                  // also of a zeroed struct

// Reads a PNG (all colour types, depths and interlacing) or JPEG (grey, YCbCr, RGB, CMYK).
// `channels`: 1 or 3 converts (grey: ITU-R 601-2 luma), 0 keeps what the file has. Transparency is
// dropped, as in the published preprocessing.
int image_read(const char *path, int channels, struct image *out);
// The same from memory; `name` is what error messages call it.
int image_decode(const void *data, size_t bytes, const char *name, int channels, struct image *out);

// Antialiased separable resampling, the same to the bit as Pillow's Image.resize: the filter's
// support grows with the reduction; bicubic has a = -0.5; sums are fixed point, rounded after each
// direction.
enum image_filter { IMAGE_BOX, IMAGE_BICUBIC };
int image_resize(const struct image *in, int width, int height, enum image_filter filter,
                 struct image *out);

// Centre crop of size x size as in ADM (Dhariwal and Nichol 2021): halve by box while the shorter
// side is at least twice `size`, resize it to `size` by bicubic, then cut out the middle.
int image_center_crop(const struct image *in, int size, struct image *out);

// Conversion between 8-bit pixels and a model's [channels, height, width] floats in [-1, 1].
void image_to_floats(const struct image *in, float *out);
int image_from_floats(const float *in, int width, int height, int channels, struct image *out);

// A key and value kept in a PNG's text chunks (tEXt, or iTXt where the value is not ASCII). Keys
// have 1 to 79 ASCII characters.
struct image_text {
    const char *key, *value;
};

// Appears whole or not at all (model/atomic_file.h).
int image_write_png(const char *path, const struct image *image, const struct image_text *texts,
                    int count);
// The value of a text chunk, to be freed, or NULL in *value when the file has no such key.
int image_read_text(const char *path, const char *key, char **value);

#endif
