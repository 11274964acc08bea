// Images in memory: conversion, resampling, cropping; see image.h. Files are in image_file.c.
//
// Resampling repeats Pillow's arithmetic, because training data prepared elsewhere was made with
// it: weights in double, normalised, rounded to 22 fractional bits; sums in 32-bit integers; 8-bit
// pixels between the horizontal and the vertical pass.
#include "model/image.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FRACTION_BITS = 22 };

static size_t image_bytes(const struct image *image)
{
    return (size_t)image->width * (size_t)image->height * (size_t)image->channels;
}

int image_new(int width, int height, int channels, struct image *out)
{
    *out = (struct image){0};
    BUG_IF(channels != 1 && channels != 3);
    if (width < 1 || height < 1 || width > IMAGE_MAX_SIDE || height > IMAGE_MAX_SIDE ||
        (int64_t)width * height > IMAGE_MAX_PIXELS)
        return fail(ERR_INPUT,
                    "an image of %d x %d pixels is beyond the limit of %d million pixels", width,
                    height, IMAGE_MAX_PIXELS / 1000000);
    struct image image = {width, height, channels, NULL};
    image.pixels = calloc(image_bytes(&image), 1);
    if (!image.pixels)
        return fail(ERR_NOMEM, "out of memory for an image of %d x %d pixels", width, height);
    *out = image;
    return 0;
}

void image_free(struct image *image)
{
    free(image->pixels);
    *image = (struct image){0};
}

static int image_copy(const struct image *in, struct image *out)
{
    TRY(image_new(in->width, in->height, in->channels, out));
    memcpy(out->pixels, in->pixels, image_bytes(in));
    return 0;
}

// ---- resampling ---------------------------------------------------------------------------------

static double box(double x)
{
    return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
}

// Keys 1981, a = -1/2.
static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0)
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}

// What one output sample is made of: inputs first .. first+count-1.
struct taps {
    int first, count;
    int32_t *weights;
};

static struct taps *taps_new(int in, int out, enum image_filter filter)
{
    double (*kernel)(double) = filter == IMAGE_BOX ? box : bicubic;
    double scale = (double)in / out, stretch = scale > 1.0 ? scale : 1.0;
    double support = (filter == IMAGE_BOX ? 0.5 : 2.0) * stretch;
    size_t most = (size_t)ceil(support) * 2 + 1;
    struct taps *taps = malloc((size_t)out * (sizeof *taps + most * sizeof(int32_t)));
    double *exact = malloc(most * sizeof *exact);
    for (int i = 0; taps && exact && i < out; i++) {
        double centre = (i + 0.5) * scale, sum = 0.0;
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        from = from < 0 ? 0 : from;
        to = to > in ? in : to;
        taps[i] = (struct taps){from, to - from, (int32_t *)(taps + out) + (size_t)i * most};
        for (int k = 0; k < taps[i].count; k++)
            sum += exact[k] = kernel((k + from - centre + 0.5) / stretch);
        for (int k = 0; k < taps[i].count; k++)
            taps[i].weights[k] = (int32_t)round(exact[k] / sum * (1 << FRACTION_BITS));
    }
    if (!exact) {
        free(taps);
        taps = NULL;
    }
    free(exact);
    return taps;
}

static uint8_t clamp(int32_t sum)
{
    sum >>= FRACTION_BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

// One row of `width` pixels; the loop over channels inside, so that each tap is read once.
static void resample_pixels(const uint8_t *in, uint8_t *out, int channels, int width,
                            const struct taps *taps)
{
    for (int x = 0; x < width; x++, out += channels) {
        int32_t sums[3] = {1 << (FRACTION_BITS - 1), 1 << (FRACTION_BITS - 1),
                           1 << (FRACTION_BITS - 1)};
        const uint8_t *p = in + (size_t)taps[x].first * (size_t)channels;
        const int32_t *weights = taps[x].weights;
        for (int k = 0; k < taps[x].count; k++, p += channels)
            for (int c = 0; c < channels; c++)
                sums[c] += p[c] * weights[k];
        for (int c = 0; c < channels; c++)
            out[c] = clamp(sums[c]);
    }
}

static void resample_line(const uint8_t *in, uint8_t *out, int channels, int width,
                          const struct taps *taps)
{
    if (channels == 3) // a constant, so that the compiler unrolls
        resample_pixels(in, out, 3, width, taps);
    else
        resample_pixels(in, out, 1, width, taps);
}

static int resample_width(const struct image *in, int width, enum image_filter filter,
                          struct image *out)
{
    TRY(image_new(width, in->height, in->channels, out));
    struct taps *taps = taps_new(in->width, width, filter);
    if (!taps) {
        image_free(out);
        return fail(ERR_NOMEM, "out of memory resizing an image");
    }
    size_t c = (size_t)in->channels;
    for (int y = 0; y < in->height; y++)
        resample_line(in->pixels + (size_t)y * (size_t)in->width * c,
                      out->pixels + (size_t)y * (size_t)width * c, in->channels, width, taps);
    free(taps);
    return 0;
}

// Rows are summed whole, so that memory is read in order.
static void resample_row(const struct image *in, const struct taps *taps, int32_t *sums,
                         uint8_t *out)
{
    size_t row = (size_t)in->width * (size_t)in->channels;
    for (size_t x = 0; x < row; x++)
        sums[x] = 1 << (FRACTION_BITS - 1);
    for (int k = 0; k < taps->count; k++) {
        const uint8_t *p = in->pixels + (size_t)(taps->first + k) * row;
        const int32_t weight = taps->weights[k];
        for (size_t x = 0; x < row; x++)
            sums[x] += p[x] * weight;
    }
    for (size_t x = 0; x < row; x++)
        out[x] = clamp(sums[x]);
}

static int resample_height(const struct image *in, int height, enum image_filter filter,
                           struct image *out)
{
    TRY(image_new(in->width, height, in->channels, out));
    size_t row = (size_t)in->width * (size_t)in->channels;
    struct taps *taps = taps_new(in->height, height, filter);
    int32_t *sums = malloc(row * sizeof *sums);
    int code = taps && sums ? 0 : fail(ERR_NOMEM, "out of memory resizing an image");
    for (int y = 0; code == 0 && y < height; y++)
        resample_row(in, &taps[y], sums, out->pixels + (size_t)y * row);
    if (code < 0)
        image_free(out);
    free(taps);
    free(sums);
    return code;
}

int image_resize(const struct image *in, int width, int height, enum image_filter filter,
                 struct image *out)
{
    *out = (struct image){0};
    if (width == in->width && height == in->height)
        return image_copy(in, out);
    if (height == in->height)
        return resample_width(in, width, filter, out);
    if (width == in->width)
        return resample_height(in, height, filter, out);
    struct image narrow;
    TRY(resample_width(in, width, filter, &narrow));
    int code = resample_height(&narrow, height, filter, out);
    image_free(&narrow);
    return code;
}

// ---- cropping -----------------------------------------------------------------------------------

static int crop(const struct image *in, int x0, int y0, int width, int height, struct image *out)
{
    TRY(image_new(width, height, in->channels, out));
    size_t c = (size_t)in->channels, row = (size_t)width * c;
    for (int y = 0; y < height; y++)
        memcpy(out->pixels + (size_t)y * row,
               in->pixels + ((size_t)(y0 + y) * (size_t)in->width + (size_t)x0) * c, row);
    return 0;
}

// Replaces *now by a resized copy; `in` itself is never freed.
static int replace_resized(struct image *now, int width, int height, enum image_filter filter,
                           const struct image *in)
{
    struct image next;
    TRY(image_resize(now, width, height, filter, &next));
    if (now->pixels != in->pixels)
        image_free(now);
    *now = next;
    return 0;
}

static int shorter_side(const struct image *image)
{
    return image->width < image->height ? image->width : image->height;
}

int image_center_crop(const struct image *in, int size, struct image *out)
{
    *out = (struct image){0};
    BUG_IF(size < 1);
    struct image now = *in;
    int code = 0;
    while (shorter_side(&now) >= 2 * size)
        TRY_OUT(replace_resized(&now, now.width / 2, now.height / 2, IMAGE_BOX, in));
    double scale = (double)size / shorter_side(&now);
    TRY_OUT(replace_resized(&now, (int)rint(now.width * scale), (int)rint(now.height * scale),
                            IMAGE_BICUBIC, in)); // rint: a half goes to the even number
    TRY_OUT(crop(&now, (now.width - size) / 2, (now.height - size) / 2, size, size, out));
out:
    if (now.pixels != in->pixels)
        image_free(&now);
    return code;
}

// ---- floats -------------------------------------------------------------------------------------

void image_to_floats(const struct image *in, float *out)
{
    size_t plane = (size_t)in->width * (size_t)in->height, c = (size_t)in->channels;
    for (size_t k = 0; k < c; k++)
        for (size_t i = 0; i < plane; i++)
            out[k * plane + i] = (float)in->pixels[i * c + k] / 127.5f - 1.0f;
}

int image_from_floats(const float *in, int width, int height, int channels, struct image *out)
{
    TRY(image_new(width, height, channels, out));
    size_t plane = (size_t)width * (size_t)height, c = (size_t)channels;
    for (size_t k = 0; k < c; k++) {
        for (size_t i = 0; i < plane; i++) {
            float v = (in[k * plane + i] + 1.0f) * 127.5f;
            v = v > 0.0f ? v : 0.0f; // NaN becomes 0
            out->pixels[i * c + k] = (uint8_t)lrintf(v < 255.0f ? v : 255.0f);
        }
    }
    return 0;
}
