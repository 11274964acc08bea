#include "model/weights_writer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/torch_write.h"

struct weights_writer {
    struct safetensors_writer *safetensors; // one of the two
    struct torch_writer *torch;
};

int weights_create(const char *path, enum weights_format format, struct weights_writer **out)
{
    *out = NULL;
    struct weights_writer *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = format == WEIGHTS_AS_SAFETENSORS
                   ? safetensors_create(path, &w->safetensors)
                   : torch_create(path, format == WEIGHTS_AS_TORCH_BARE, &w->torch);
    if (code < 0)
        free(w);
    else
        *out = w;
    return code;
}

int weights_declare(struct weights_writer *w, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape)
{
    return w->torch ? torch_declare(w->torch, name, dtype, ndim, shape)
                    : safetensors_declare(w->safetensors, name, dtype, ndim, shape);
}

int weights_set_metadata(struct weights_writer *w, const char *key, const char *value)
{
    return w->torch ? torch_set_metadata(w->torch, key, value)
                    : safetensors_set_metadata(w->safetensors, key, value);
}

int weights_begin(struct weights_writer *w)
{
    return w->torch ? torch_begin(w->torch) : safetensors_begin(w->safetensors);
}

int weights_write(struct weights_writer *w, const void *data, size_t bytes)
{
    return w->torch ? torch_write(w->torch, data, bytes)
                    : safetensors_write(w->safetensors, data, bytes);
}

int weights_commit(struct weights_writer *w)
{
    int code = w->torch ? torch_commit(w->torch) : safetensors_commit(w->safetensors);
    free(w);
    return code;
}

void weights_abort(struct weights_writer *w)
{
    if (!w)
        return;
    torch_abort(w->torch);
    safetensors_abort(w->safetensors);
    free(w);
}

// ---- rounding -----------------------------------------------------------------------------------

static uint16_t bf16_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (isnan(f))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Scaling by powers of two is exact, and adding a number whose last bit is that of the result
// rounds.
static uint16_t f16_of(float f)
{
    const uint16_t sign = signbit(f) ? 0x8000 : 0;
    const float a = fabsf(f);
    if (isnan(f))
        return sign | 0x7e00;
    if (a >= 65520) // halfway to what would come after the largest
        return sign | 0x7c00;
    if (a < 0x1p-14f) // subnormal: units of 2^-24
        return (uint16_t)(sign | (uint16_t)nearbyintf(a * 0x1p24f));
    int exponent;
    const float fraction = frexpf(a, &exponent);                  // [0.5, 1)
    const unsigned steps = (unsigned)nearbyintf(fraction * 2048); // 1024..2048
    return (uint16_t)(sign | (((unsigned)(exponent + 13) << 10) + steps));
}

int weights_round(const float *from, int64_t count, enum st_dtype to, void *out)
{
    uint16_t *half = out;
    switch (to) {
    case ST_F32:
        memcpy(out, from, (size_t)count * sizeof *from);
        return 0;
    case ST_BF16:
        for (int64_t i = 0; i < count; i++)
            half[i] = bf16_of(from[i]);
        return 0;
    case ST_F16:
        for (int64_t i = 0; i < count; i++) {
            half[i] = f16_of(from[i]);
            if ((half[i] & 0x7fff) >= 0x7c00 && isfinite(from[i]))
                return fail(ERR_INPUT, "%g is too large for f16; bf16 has room for it",
                            (double)from[i]);
        }
        return 0;
    default:
        BUG_IF(true);
        return 0;
    }
}
