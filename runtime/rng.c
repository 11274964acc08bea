// Random numbers on the host: see rng.h. The kernel `normal` computes the same function.
//
// Same bits everywhere: only integer operations, +, * and fma on floats, all correctly rounded by
// IEEE 754, and no a*b+c outside fma, so that a compiler's choice to fuse cannot matter. Logarithm,
// square root, sine and cosine are therefore written out below, as polynomials (relative error of
// the approximation under 1e-8) and Newton steps.
#include "runtime/rng.h"

#include <math.h>
#include <string.h>

void rng_philox(uint64_t seed, uint64_t stream, uint64_t block, uint32_t out[4])
{
    uint32_t c[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)stream,
                     (uint32_t)(stream >> 32)};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xd2511f53u * c[0], b = (uint64_t)0xcd9e8d57u * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ key0, (uint32_t)b,
                            (uint32_t)(a >> 32) ^ c[3] ^ key1, (uint32_t)a};
        memcpy(c, next, sizeof c);
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    memcpy(out, c, sizeof c);
}

uint32_t rng_u32(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    rng_philox(seed, stream, index / 4, words);
    return words[index % 4];
}

// 23 bits, so that adding a half is exact and 1 is never reached.
float rng_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    return ((float)(rng_u32(seed, stream, index) >> 9) + 0.5f) * 0x1p-23f;
}

// ---- normal numbers -----------------------------------------------------------------------------

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

// -2 ln u for u in (0,1]: u = 2^e (1+f) with 1+f in [sqrt(1/2), sqrt(2)).
static float minus_two_log(float u)
{
    uint32_t shifted = bits_of(u) - 0x3f3504f3u; // bits of sqrt(1/2)
    int32_t e = (int32_t)(shifted >> 23);
    e = e >= 256 ? e - 512 : e; // sign of a 9-bit number
    float f = float_of((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float q = -0x1.383e66p-4f;
    q = fmaf(q, f, 0x1.084e8ep-3f);
    q = fmaf(q, f, -0x1.0f3778p-3f);
    q = fmaf(q, f, 0x1.227084p-3f);
    q = fmaf(q, f, -0x1.542744p-3f);
    q = fmaf(q, f, 0x1.99a402p-3f);
    q = fmaf(q, f, -0x1.000428p-2f);
    q = fmaf(q, f, 0x1.555550p-2f);
    q = fmaf(q, f, -0x1.fffff8p-2f);
    float log_m = fmaf(f * f, q, f);
    return -2.0f * fmaf((float)e, 0x1.62e430p-1f, log_m);
}

// x >= 0: 1/sqrt from an estimate by its exponent and three Newton steps, then one step on the
// root.
static float square_root(float x)
{
    float y = float_of(0x5f3759dfu - (bits_of(x) >> 1));
    float h = 0.5f * x;
    for (int i = 0; i < 3; i++)
        y = y * fmaf(-(h * y), y, 1.5f);
    float r = x * y;
    return fmaf(fmaf(-r, r, x), 0.5f * y, r);
}

// Cosine and sine of 2 pi w / 2^32: quadrant, and the rest within +-pi/4.
static void cos_sin(uint32_t w, float *c, float *s)
{
    uint32_t quadrant = (w + 0x20000000u) >> 30;
    int32_t rest = (int32_t)(w - (quadrant << 30));
    float a = (float)rest * 0x1.921fb6p-30f;
    float z = a * a;
    float sine = fmaf(a * z, fmaf(fmaf(-0x1.994e58p-13f, z, 0x1.11076p-7f), z, -0x1.555546p-3f), a);
    float cosine = fmaf(z * z, fmaf(fmaf(0x1.9a0206p-16f, z, -0x1.6c0c8ap-10f), z, 0x1.55554ap-5f),
                        fmaf(z, -0.5f, 1.0f));
    float x = quadrant & 1 ? sine : cosine, y = quadrant & 1 ? cosine : sine;
    *c = quadrant == 1 || quadrant == 2 ? -x : x;
    *s = quadrant >= 2 ? -y : y;
}

static void normal_pair(const uint32_t w[2], float out[2])
{
    float radius = square_root(minus_two_log(fmaf((float)w[0], 0x1p-32f, 0x1p-33f)));
    float c, s;
    cos_sin(w[1], &c, &s);
    out[0] = radius * c;
    out[1] = radius * s;
}

float rng_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    float pair[2];
    rng_philox(seed, stream, index / 4, words);
    normal_pair(words + (index & 2), pair);
    return pair[index & 1];
}

void rng_normal_fill(uint64_t seed, uint64_t stream, uint64_t first, float *out, size_t count)
{
    size_t i = 0;
    for (; i < count && (first + i) % 4 != 0; i++)
        out[i] = rng_normal(seed, stream, first + i);
    for (; i + 4 <= count; i += 4) {
        uint32_t words[4];
        rng_philox(seed, stream, (first + i) / 4, words);
        normal_pair(words, out + i);
        normal_pair(words + 2, out + i + 2);
    }
    for (; i < count; i++)
        out[i] = rng_normal(seed, stream, first + i);
}
