// Images on their way to the device: packed one after the other as 8-bit RGB, with the places and
// weights of the pixels that each of the network's pixels lies between (op_resample).
#include <string.h>

#include "model/inception.h"

enum { SIDE = INCEPTION_SIDE };

// The two neighbours of each output pixel along one axis, and where they are after packing.
struct axis {
    int source[2][SIDE], packed[2][SIDE];
    float weight[SIDE];
    int length;  // packed
    bool picked; // only the pixels that count are packed
};

// Arithmetic in float, as in the programs that are followed.
static void place_pixels(int length, enum inception_input input, struct axis *a)
{
    const float scale = (float)length / (float)SIDE;
    a->picked = length > 2 * SIDE;
    a->length = a->picked ? 2 * SIDE : length;
    for (int o = 0; o < SIDE; o++) {
        float at = input == INCEPTION_ADM ? (float)o * scale : scale * ((float)o + 0.5f) - 0.5f;
        at = at < 0 ? 0 : at;
        int first = (int)at;
        first = first < length ? first : length - 1;
        a->source[0][o] = first;
        a->source[1][o] = first + (first < length - 1);
        a->weight[o] = at - (float)first;
        for (int k = 0; k < 2; k++)
            a->packed[k][o] = a->picked ? 2 * o + k : a->source[k][o];
    }
}

static int source_of(const struct axis *a, int packed)
{
    return a->picked ? a->source[packed % 2][packed / 2] : packed;
}

static void pack_line(const struct axis *x, const uint8_t *from, uint8_t *to)
{
    if (!x->picked)
        memcpy(to, from, 3 * (size_t)x->length);
    for (int i = 0; x->picked && i < x->length; i++)
        memcpy(to + 3 * i, from + 3 * (size_t)source_of(x, i), 3);
}

static void write_taps(const struct axis *a, size_t base, int unit, int32_t *taps)
{
    for (int o = 0; o < SIDE; o++, taps += 3) {
        for (int k = 0; k < 2; k++)
            taps[k] = (int32_t)base + unit * a->packed[k][o];
        memcpy(taps + 2, &a->weight[o], sizeof *taps);
    }
}

// Returns the bytes used.
static size_t pack_image(const struct image *image, enum inception_input input, size_t base,
                         uint8_t *bytes, int32_t *taps)
{
    struct axis y, x;
    place_pixels(image->height, input, &y);
    place_pixels(image->width, input, &x);
    const size_t line = 3 * (size_t)x.length;
    for (int i = 0; i < y.length; i++)
        pack_line(&x, image->pixels + 3 * (size_t)image->width * (size_t)source_of(&y, i),
                  bytes + base + line * (size_t)i);
    write_taps(&y, base, (int)line, taps);
    write_taps(&x, 0, 3, taps + 3 * SIDE);
    return line * (size_t)y.length;
}

int inception_put(struct inception *n, const struct image *images, int count)
{
    struct context *c = &n->ctx;
    const size_t each = 2 * SIDE * 3;
    size_t used = 0;
    BUG_IF(count < 1 || count > n->batch);
    for (int i = 0; i < count; i++) {
        BUG_IF(images[i].channels != 3);
        used +=
            pack_image(&images[i], n->input, used, n->host_bytes, n->host_taps + each * (size_t)i);
    }
    for (int i = count; i < n->batch; i++) // the rest of the batch repeats the first image
        memcpy(n->host_taps + each * (size_t)i, n->host_taps, each * sizeof *n->host_taps);
    TRY(c->dev->api->write(c->stream, n->bytes.mem, 0, n->host_bytes, used));
    return tensor_write(c, &n->taps, n->host_taps);
}
