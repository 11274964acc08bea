// ---- helpers of the layer kernels ----------------------------------------------------------------------

// Sum over the work-group of `size` items (a power of two); every item gets the result.
inline float group_sum(LOCAL_PTR float *sums, float value, int size)
{
    int i = get_local_id(0);
    sums[i] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int half_size = size / 2; half_size > 0; half_size /= 2) {
        if (i < half_size)
            sums[i] += sums[i + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    float sum = sums[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

// A buffer that holds activations or f32, as `f32` says.
inline float any_load(const GLOBAL void *p, size_t i, int f32)
{
    return f32 ? ((const GLOBAL float *)p)[i] : act_load((const GLOBAL act *)p, i);
}
inline void any_store(GLOBAL void *p, size_t i, float v, int f32)
{
    if (f32)
        ((GLOBAL float *)p)[i] = v;
    else
        act_store((GLOBAL act *)p, i, v);
}

inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exp(-x));
}

// GELU, tanh form: x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), since 1 + tanh(u) = 2 sigmoid(2u)
#define GELU_LINEAR 1.5957691216057308f // 2 sqrt(2/pi)
#define GELU_CUBIC 0.071354816272600f   // the same times 0.044715

inline float gelu_slope(float x)
{
    float s = sigmoid(x * fma(GELU_CUBIC, x * x, GELU_LINEAR));
    return fma(x * s * (1.0f - s), fma(3.0f * GELU_CUBIC, x * x, GELU_LINEAR), s);
}

#ifdef CPU_FORMS

INLINE float sum16(float16 v)
{
    float8 a = v.lo + v.hi;
    float4 b = a.lo + a.hi;
    float2 c = b.lo + b.hi;
    return c.x + c.y;
}

INLINE float max16(float16 v)
{
    float8 a = fmax(v.lo, v.hi);
    float4 b = fmax(a.lo, a.hi);
    float2 c = fmax(b.lo, b.hi);
    return fmax(c.x, c.y);
}

// v in the first n lanes, 0 in the others.
INLINE float16 first_lanes(float16 v, int n)
{
    const int16 lane = (int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return select((float16)(0.0f), v, lane < (int16)(n));
}

#ifdef ACT_BF16
INLINE float8 act_load8(const GLOBAL act *p)
{
    return as_float8(convert_uint8(vload8(0, p)) << 16);
}
INLINE void act_store8(GLOBAL act *p, float16 v)
{
    typedef ushort8 ushort8_unaligned __attribute__((aligned(2)));
    *(GLOBAL ushort8_unaligned *)p = float16_to_bf16(v).lo;
}
#else
INLINE float8 act_load8(const GLOBAL act *p)
{
    return vload8(0, p);
}
INLINE void act_store8(GLOBAL act *p, float16 v)
{
    vstore8(v.lo, 0, p);
}
#endif

// Up to 16 values; lanes past n are 0 and are not stored. 8 has a short cut: head sizes 72 and 88.
INLINE float16 act_load_upto(const GLOBAL act *p, int n)
{
    if (n >= 16)
        return act_load16(p);
    if (n == 8)
        return (float16)(act_load8(p), (float8)(0.0f));
    float v[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < n; i++)
        v[i] = act_load(p, i);
    return vload16(0, v);
}
INLINE void act_store_upto(GLOBAL act *p, float16 value, int n)
{
    if (n >= 16) {
        act_store16(p, value);
        return;
    }
    if (n == 8) {
        act_store8(p, value);
        return;
    }
    float v[16];
    vstore16(value, 0, v);
    for (int i = 0; i < n; i++)
        act_store(p, i, v[i]);
}
INLINE float16 float_load_upto(const GLOBAL float *p, int n)
{
    if (n >= 16)
        return vload16(0, p);
    if (n == 8)
        return (float16)(vload8(0, p), (float8)(0.0f));
    float v[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return vload16(0, v);
}
INLINE void float_store_upto(GLOBAL float *p, float16 value, int n)
{
    if (n >= 16) {
        vstore16(value, 0, p);
        return;
    }
    float v[16];
    vstore16(value, 0, v);
    for (int i = 0; i < n; i++)
        p[i] = v[i];
}
#endif // CPU_FORMS

// ---- embedding -------------------------------------------------------------------------------------------

// One item a run of p pixels: (row, channel, line py of the patch).
// pqc: columns are ordered (py, q, c), else (c, py, q).
KERNEL(64, 1)
void patchify(GLOBAL act *out, const GLOBAL float *x, int channels, int height, int width, int p,
              int pqc, uint runs)
{
    uint i = get_global_id(0);
    if (i >= runs)
        return;
    int py = i % p, c = (i / p) % channels;
    uint row = i / p / channels;
    uint across = width / p, tokens = across * (height / p);
    uint n = row / tokens, token = row % tokens;
    uint ty = token / across, tx = token % across;
    const GLOBAL float *from =
        x + (((size_t)n * channels + c) * height + ty * p + py) * width + tx * p;
    size_t to = (size_t)row * channels * p * p + (pqc ? py * p * channels + c : (c * p + py) * p);
    for (int q = 0; q < p; q++)
        act_store(out, to + (pqc ? q * channels : q), from[q]);
}

KERNEL(64, 1)
void unpatchify(GLOBAL float *out, const GLOBAL act *in, int channels, int height, int width, int p,
                uint runs)
{
    uint i = get_global_id(0);
    if (i >= runs)
        return;
    int py = i % p, c = (i / p) % channels;
    uint row = i / p / channels;
    uint across = width / p, tokens = across * (height / p);
    uint n = row / tokens, token = row % tokens;
    uint ty = token / across, tx = token % across;
    GLOBAL float *to = out + (((size_t)n * channels + c) * height + ty * p + py) * width + tx * p;
    size_t from = (size_t)row * channels * p * p + py * p * channels + c;
    for (int q = 0; q < p; q++)
        to[q] = act_load(in, from + q * channels);
}

KERNEL(64, 1)
void timestep_embed(GLOBAL act *out, const GLOBAL float *t, int half_width, uint count)
{
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint n = i / half_width, k = i % half_width;
    float angle = t[n] * exp(-9.210340371976184f * (float)k / (float)half_width); // ln 10000
    act_store(out, (size_t)n * 2 * half_width + k, cos(angle));
    act_store(out, (size_t)n * 2 * half_width + half_width + k, sin(angle));
}

KERNEL(64, 1)
void embed_fwd(GLOBAL act *out, const GLOBAL float *table, const GLOBAL int *y, int width,
               uint count)
{
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint n = i / width, d = i % width;
    act_store(out, i, act_load(out, i) + table[(size_t)y[n] * width + d]);
}

// One item a column, images in order: the same label may come twice.
KERNEL(64, 1)
void embed_bwd(GLOBAL float *dtable, const GLOBAL act *dout, const GLOBAL int *y, int width,
               int images)
{
    int d = get_global_id(0);
    if (d >= width)
        return;
    for (int n = 0; n < images; n++)
        dtable[(size_t)y[n] * width + d] += act_load(dout, (size_t)n * width + d);
}

// ---- elementwise -----------------------------------------------------------------------------------------

// GPU forms: one item an element. CPU forms: one item `chunk` elements.
KERNEL(256, 1)
void silu_fwd(GLOBAL act *y, const GLOBAL act *x, uint count, uint chunk)
{
    uint i = get_global_id(0);
    if (i < count)
        act_store(y, i, act_load(x, i) * sigmoid(act_load(x, i)));
}

KERNEL(256, 1)
void silu_bwd(GLOBAL act *dx, const GLOBAL act *dy, const GLOBAL act *x, uint count, uint chunk)
{
    uint i = get_global_id(0);
    if (i >= count)
        return;
    float v = act_load(x, i), s = sigmoid(v);
    act_store(dx, i, act_load(dy, i) * s * fma(v, 1.0f - s, 1.0f));
}

KERNEL(256, 1)
void gelu_fwd(GLOBAL act *y, const GLOBAL act *x, uint count, uint chunk)
{
    uint i = get_global_id(0);
    if (i >= count)
        return;
    float v = act_load(x, i);
    act_store(y, i, v * sigmoid(v * fma(GELU_CUBIC, v * v, GELU_LINEAR)));
}

KERNEL(256, 1)
void gelu_bwd(GLOBAL act *dx, const GLOBAL act *dy, const GLOBAL act *x, uint count, uint chunk)
{
    uint i = get_global_id(0);
    if (i < count)
        act_store(dx, i, act_load(dy, i) * gelu_slope(act_load(x, i)));
}

// y[i] += x[i mod period]
KERNEL(256, 1)
void add(GLOBAL void *y, const GLOBAL void *x, uint count, uint period, int y_f32, int x_f32,
         uint chunk)
{
    uint i = get_global_id(0);
    if (i < count)
        any_store(y, i, any_load(y, i, y_f32) + any_load(x, i % period, x_f32), y_f32);
}

#ifdef CPU_FORMS
#define CHUNK_FROM (get_group_id(0) * (size_t)chunk)
#define CHUNK_TO min(CHUNK_FROM + chunk, (size_t)count)

// Runs a statement for i = from, from + 16.. with n = 16 elements, and once for the rest with n less:
// so the loop has no code for tails in it.
#define FOR_VECTORS(from, to, ...)                                                                 \
    {                                                                                              \
        size_t i = from, end = to;                                                                 \
        for (; i + 16 <= end; i += 16) {                                                           \
            const int n = 16;                                                                      \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
        if (i < end) {                                                                             \
            const int n = (int)(end - i);                                                          \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    }

KERNEL(1, 1)
void silu_fwd_cpu(GLOBAL act *y, const GLOBAL act *x, uint count, uint chunk)
{
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n);
                act_store_upto(y + i, v * sigmoid16(v), n))
}

KERNEL(1, 1)
void silu_bwd_cpu(GLOBAL act *dx, const GLOBAL act *dy, const GLOBAL act *x, uint count, uint chunk)
{
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n), s = sigmoid16(v);
                float16 slope = s * fma(v, 1.0f - s, (float16)(1.0f));
                act_store_upto(dx + i, act_load_upto(dy + i, n) * slope, n))
}

KERNEL(1, 1)
void gelu_fwd_cpu(GLOBAL act *y, const GLOBAL act *x, uint count, uint chunk)
{
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n);
                float16 u = v * fma((float16)(GELU_CUBIC), v * v, (float16)(GELU_LINEAR));
                act_store_upto(y + i, v * sigmoid16(u), n))
}

KERNEL(1, 1)
void gelu_bwd_cpu(GLOBAL act *dx, const GLOBAL act *dy, const GLOBAL act *x, uint count, uint chunk)
{
    FOR_VECTORS(CHUNK_FROM, CHUNK_TO, float16 v = act_load_upto(x + i, n), square = v * v;
                float16 s = sigmoid16(v * fma((float16)(GELU_CUBIC), square, (float16)(GELU_LINEAR)));
                float16 du = fma((float16)(3.0f * GELU_CUBIC), square, (float16)(GELU_LINEAR));
                float16 slope = fma(v * s * (1.0f - s), du, s);
                act_store_upto(dx + i, act_load_upto(dy + i, n) * slope, n))
}

INLINE float16 any_load_upto(const GLOBAL void *p, size_t i, int n, int f32)
{
    return f32 ? float_load_upto((const GLOBAL float *)p + i, n)
               : act_load_upto((const GLOBAL act *)p + i, n);
}

KERNEL(1, 1)
void add_cpu(GLOBAL void *y, const GLOBAL void *x, uint count, uint period, int y_f32, int x_f32,
             uint chunk)
{
    size_t i = CHUNK_FROM, end = CHUNK_TO, k = i % period;
    while (i < end) {
        int n = (int)min((size_t)16, min(end - i, period - k));
        float16 v = any_load_upto(y, i, n, y_f32) + any_load_upto(x, k, n, x_f32);
        if (y_f32)
            float_store_upto((GLOBAL float *)y + i, v, n);
        else
            act_store_upto((GLOBAL act *)y + i, v, n);
        i += n;
        k = k + n == period ? 0 : k + n;
    }
}
#endif // CPU_FORMS

// ---- LayerNorm with adaLN modulation -----------------------------------------------------------------------

#define NORM_EPS 1e-6f
#define NORM_CHUNK 32 // GPU forms of backward: most rows a group

// GPU form: one group a row. CPU form: one item `chunk` rows. `tokens` rows share a row of mod.
KERNEL(128, 1)
void layernorm_mod_fwd(GLOBAL act *y, GLOBAL float *stats, const GLOBAL act *x,
                       const GLOBAL act *mod, int width, int tokens, int mod_width, int shift,
                       int scale, int rows, int chunk)
{
    LOCAL float sums[128];
    size_t row = get_group_id(0);
    const GLOBAL act *xr = x + row * width;
    const GLOBAL act *mr = mod + row / tokens * mod_width;
    float sum = 0.0f, squares = 0.0f;
    for (int d = get_local_id(0); d < width; d += 128)
        sum += act_load(xr, d);
    float mean = group_sum(sums, sum, 128) / width;
    for (int d = get_local_id(0); d < width; d += 128) {
        float v = act_load(xr, d) - mean;
        squares = fma(v, v, squares);
    }
    float rstd = 1.0f / sqrt(group_sum(sums, squares, 128) / width + NORM_EPS);
    for (int d = get_local_id(0); d < width; d += 128) {
        float v = (act_load(xr, d) - mean) * rstd;
        act_store(y, row * width + d,
                  fma(v, 1.0f + act_load(mr, scale + d), act_load(mr, shift + d)));
    }
    if (get_local_id(0) == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// Group (k, n): rows k*chunk.. of image n, chunk <= NORM_CHUNK. partial[n, k, 2, width]: sums of dy
// (for the shift) and of dy * xhat (for the scale) over these rows.
KERNEL(128, 1)
void layernorm_mod_bwd(GLOBAL act *dx, GLOBAL float *partial, const GLOBAL act *dy,
                       const GLOBAL act *x, const GLOBAL float *stats, const GLOBAL act *mod,
                       int width, int tokens, int mod_width, int scale, int chunk)
{
    LOCAL float sums[128];
    LOCAL float mean_g[NORM_CHUNK], mean_gx[NORM_CHUNK];
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first), item = get_local_id(0);
    size_t row = n * tokens + first;
    const GLOBAL act *mr = mod + n * mod_width + scale;
    for (int r = 0; r < count; r++) {
        float mean = stats[2 * (row + r)], rstd = stats[2 * (row + r) + 1], g = 0.0f, gx = 0.0f;
        for (int d = item; d < width; d += 128) {
            float v = act_load(dy, (row + r) * width + d) * (1.0f + act_load(mr, d));
            g += v;
            gx = fma(v, (act_load(x, (row + r) * width + d) - mean) * rstd, gx);
        }
        g = group_sum(sums, g, 128);
        gx = group_sum(sums, gx, 128);
        if (item == 0) {
            mean_g[r] = g / width;
            mean_gx[r] = gx / width;
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * 2 * width;
    for (int d = item; d < width; d += 128) {
        float factor = 1.0f + act_load(mr, d), dshift = 0.0f, dscale = 0.0f;
        for (int r = 0; r < count; r++) {
            size_t i = (row + r) * width + d;
            float rstd = stats[2 * (row + r) + 1], g = act_load(dy, i);
            float xhat = (act_load(x, i) - stats[2 * (row + r)]) * rstd;
            dshift += g;
            dscale = fma(g, xhat, dscale);
            float back = fma(g, factor, -mean_g[r]) - xhat * mean_gx[r];
            act_store(dx, i, fma(rstd, back, act_load(dx, i)));
        }
        out[d] = dshift;
        out[width + d] = dscale;
    }
}

// dmod[n, columns[part] + d] = sum over k of partial[n, k, part, d]; column1 is of part 1, if any.
KERNEL(64, 1)
void sum_partials(GLOBAL act *dmod, const GLOBAL float *partial, int width, int mod_width,
                  int column0, int column1, int chunks, int parts)
{
    int d = get_global_id(0), part = get_group_id(1);
    size_t n = get_group_id(2);
    if (d >= width)
        return;
    float sum = 0.0f;
    for (int k = 0; k < chunks; k++)
        sum += partial[((n * chunks + k) * parts + part) * width + d];
    act_store(dmod, n * mod_width + (part ? column1 : column0) + d, sum);
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void layernorm_mod_fwd_cpu(GLOBAL act *y, GLOBAL float *stats, const GLOBAL act *x,
                           const GLOBAL act *mod, int width, int tokens, int mod_width, int shift,
                           int scale, int rows, int chunk)
{
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    for (size_t row = from; row < to; row++) {
        const GLOBAL act *xr = x + row * width;
        const GLOBAL act *mr = mod + row / tokens * mod_width;
        float16 sum = 0.0f, squares = 0.0f;
        for (int d = 0; d < width; d += 16)
            sum += act_load_upto(xr + d, width - d);
        float mean = sum16(sum) / width;
        for (int d = 0; d < width; d += 16) {
            float16 v = first_lanes(act_load_upto(xr + d, width - d) - mean, width - d);
            squares = fma(v, v, squares);
        }
        float rstd = 1.0f / sqrt(sum16(squares) / width + NORM_EPS);
        for (int d = 0; d < width; d += 16) {
            float16 v = (act_load_upto(xr + d, width - d) - mean) * rstd;
            v = fma(v, 1.0f + act_load_upto(mr + scale + d, width - d),
                    act_load_upto(mr + shift + d, width - d));
            act_store_upto(y + row * width + d, v, width - d);
        }
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// `out` starts as what the first row gives it and is the running sum of both parts.
KERNEL(1, 1)
void layernorm_mod_bwd_cpu(GLOBAL act *dx, GLOBAL float *partial, const GLOBAL act *dy,
                           const GLOBAL act *x, const GLOBAL float *stats, const GLOBAL act *mod,
                           int width, int tokens, int mod_width, int scale, int chunk)
{
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + scale;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * 2 * width;
    for (int d = 0; d < 2 * width; d += 16)
        float_store_upto(out + d, 0.0f, 2 * width - d);
    for (int r = 0; r < count; r++) {
        size_t row = n * tokens + first + r;
        const GLOBAL act *xr = x + row * width, *gr = dy + row * width;
        float mean = stats[2 * row], rstd = stats[2 * row + 1];
        float16 sum_g = 0.0f, sum_gx = 0.0f;
        for (int d = 0; d < width; d += 16) {
            float16 g = act_load_upto(gr + d, width - d);
            float16 xhat = (act_load_upto(xr + d, width - d) - mean) * rstd;
            float16 v = fma(g, act_load_upto(mr + d, width - d), g);
            sum_g += v;
            sum_gx = fma(v, xhat, sum_gx);
            float_store_upto(out + d, float_load_upto(out + d, width - d) + g, width - d);
            float_store_upto(out + width + d,
                             fma(g, xhat, float_load_upto(out + width + d, width - d)), width - d);
        }
        float mean_g = sum16(sum_g) / width, mean_gx = sum16(sum_gx) / width;
        for (int d = 0; d < width; d += 16) {
            float16 g = act_load_upto(gr + d, width - d);
            float16 xhat = (act_load_upto(xr + d, width - d) - mean) * rstd;
            float16 v = fma(g, act_load_upto(mr + d, width - d), g);
            v = v - mean_g - xhat * mean_gx;
            v = fma((float16)(rstd), v, act_load_upto(dx + row * width + d, width - d));
            act_store_upto(dx + row * width + d, v, width - d);
        }
    }
}

KERNEL(1, 1)
void sum_partials_cpu(GLOBAL act *dmod, const GLOBAL float *partial, int width, int mod_width,
                      int column0, int column1, int chunks, int parts)
{
    int part = get_group_id(1);
    size_t n = get_group_id(2);
    const GLOBAL float *from = partial + (n * chunks * parts + part) * width;
    GLOBAL act *to = dmod + n * mod_width + (part ? column1 : column0);
    for (int d = 0; d < width; d += 16) {
        float16 sum = 0.0f;
        for (int k = 0; k < chunks; k++)
            sum += float_load_upto(from + (size_t)k * parts * width + d, width - d);
        act_store_upto(to + d, sum, width - d);
    }
}
#endif // CPU_FORMS

// ---- gated residual ------------------------------------------------------------------------------------------

// GPU form: one group a row. CPU form: one item `chunk` rows.
KERNEL(128, 1)
void gate_residual_fwd(GLOBAL act *y, const GLOBAL act *x, const GLOBAL act *z,
                       const GLOBAL act *mod, int width, int tokens, int mod_width, int gate,
                       int rows, int chunk)
{
    size_t row = get_group_id(0);
    const GLOBAL act *mr = mod + row / tokens * mod_width + gate;
    for (int d = get_local_id(0); d < width; d += 128) {
        size_t i = row * width + d;
        act_store(y, i, fma(act_load(mr, d), act_load(z, i), act_load(x, i)));
    }
}

// Group (k, n): rows k*chunk.. of image n; partial[n, k, width]: sums of dy * z.
KERNEL(128, 1)
void gate_residual_bwd(GLOBAL act *dz, GLOBAL float *partial, const GLOBAL act *dy,
                       const GLOBAL act *z, const GLOBAL act *mod, int width, int tokens,
                       int mod_width, int gate, int chunk)
{
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + gate;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * width;
    for (int d = get_local_id(0); d < width; d += 128) {
        float factor = act_load(mr, d), sum = 0.0f;
        for (int r = 0; r < count; r++) {
            size_t i = (n * tokens + first + r) * width + d;
            float g = act_load(dy, i);
            sum = fma(g, act_load(z, i), sum);
            act_store(dz, i, factor * g);
        }
        out[d] = sum;
    }
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void gate_residual_fwd_cpu(GLOBAL act *y, const GLOBAL act *x, const GLOBAL act *z,
                           const GLOBAL act *mod, int width, int tokens, int mod_width, int gate,
                           int rows, int chunk)
{
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    for (size_t row = from; row < to; row++) {
        const GLOBAL act *mr = mod + row / tokens * mod_width + gate;
        for (int d = 0; d < width; d += 16) {
            size_t i = row * width + d;
            float16 v = fma(act_load_upto(mr + d, width - d), act_load_upto(z + i, width - d),
                            act_load_upto(x + i, width - d));
            act_store_upto(y + i, v, width - d);
        }
    }
}

KERNEL(1, 1)
void gate_residual_bwd_cpu(GLOBAL act *dz, GLOBAL float *partial, const GLOBAL act *dy,
                           const GLOBAL act *z, const GLOBAL act *mod, int width, int tokens,
                           int mod_width, int gate, int chunk)
{
    size_t n = get_group_id(1);
    int first = get_group_id(0) * chunk, count = min(chunk, tokens - first);
    const GLOBAL act *mr = mod + n * mod_width + gate;
    GLOBAL float *out = partial + (n * get_num_groups(0) + get_group_id(0)) * width;
    for (int d = 0; d < width; d += 16)
        float_store_upto(out + d, 0.0f, width - d);
    for (int r = 0; r < count; r++) {
        for (int d = 0; d < width; d += 16) {
            size_t i = (n * tokens + first + r) * width + d;
            float16 g = act_load_upto(dy + i, width - d);
            float16 sum = float_load_upto(out + d, width - d);
            sum = fma(g, act_load_upto(z + i, width - d), sum);
            float_store_upto(out + d, sum, width - d);
            act_store_upto(dz + i, g * act_load_upto(mr + d, width - d), width - d);
        }
    }
}
#endif // CPU_FORMS

// ---- LayerNorm of q and k, per head ----------------------------------------------------------------------------

#define HEAD_MAX 128 // largest head size
#define LANES 8      // GPU forms: items a head vector; a group of 128 has 16 vectors

// Sum over the 8 items of one vector; all items of the group take part.
inline float lanes_sum(LOCAL_PTR float *sums, float value)
{
    int first = get_local_id(0) / LANES * LANES;
    float sum = 0.0f;
    sums[get_local_id(0)] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int i = 0; i < LANES; i++)
        sum += sums[first + i];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

// Vector v of qkv lies at v*hd and is head v % heads of part (v / heads) % 3: q, k or v.
// GPU form: 16 vectors a group. CPU form: one item `chunk` rows. copy: the v part is copied.
KERNEL(128, 1)
void qk_norm_fwd(GLOBAL act *out, GLOBAL float *stats, const GLOBAL act *qkv,
                 const GLOBAL float *wq, const GLOBAL float *bq, const GLOBAL float *wk,
                 const GLOBAL float *bk, int heads, int hd, int rows, int chunk, int copy)
{
    LOCAL float sums[128];
    size_t vector = get_group_id(0) * (size_t)(128 / LANES) + get_local_id(0) / LANES;
    int lane = get_local_id(0) % LANES, inside = vector < (size_t)rows * 3 * heads;
    int part = vector / heads % 3, normed = inside && part < 2;
    const GLOBAL act *from = qkv + vector * hd;
    float sum = 0.0f, squares = 0.0f;
    for (int d = lane; normed && d < hd; d += LANES)
        sum += act_load(from, d);
    float mean = lanes_sum(sums, sum) / hd;
    for (int d = lane; normed && d < hd; d += LANES) {
        float v = act_load(from, d) - mean;
        squares = fma(v, v, squares);
    }
    float rstd = 1.0f / sqrt(lanes_sum(sums, squares) / hd + NORM_EPS);
    const GLOBAL float *w = part ? wk : wq, *b = part ? bk : bq;
    for (int d = lane; normed && d < hd; d += LANES)
        act_store(out, vector * hd + d, fma((act_load(from, d) - mean) * rstd, w[d], b[d]));
    for (int d = lane; inside && !normed && copy && d < hd; d += LANES)
        act_store(out, vector * hd + d, act_load(from, d));
    if (normed && lane == 0) {
        size_t i = (vector / (3 * heads) * 2 + part) * heads + vector % heads;
        stats[2 * i] = mean;
        stats[2 * i + 1] = rstd;
    }
}

// Group k: rows k*chunk..; partial[k, 4, hd]: gradients of wq, bq, wk, bk from these rows.
KERNEL(128, 1)
void qk_norm_bwd(GLOBAL act *dqkv, GLOBAL float *partial, const GLOBAL act *qkv,
                 const GLOBAL float *stats, const GLOBAL float *wq, const GLOBAL float *wk,
                 int heads, int hd, int rows, int chunk)
{
    LOCAL float sums[128];
    LOCAL float slots[(128 / LANES) * HEAD_MAX];
    int slot = get_local_id(0) / LANES, lane = get_local_id(0) % LANES;
    int first = get_group_id(0) * chunk, count = min(chunk, rows - first) * heads;
    for (int part = 0; part < 2; part++) {
        const GLOBAL float *w = part ? wk : wq;
        float dw[HEAD_MAX / LANES], db[HEAD_MAX / LANES];
        for (int j = 0; j < HEAD_MAX / LANES; j++)
            dw[j] = db[j] = 0.0f;
        for (int start = 0; start < count; start += 128 / LANES) {
            int i = start + slot, inside = i < count;
            size_t row = first + (inside ? i / heads : 0), head = inside ? i % heads : 0;
            size_t at = ((row * 3 + part) * heads + head) * hd;
            float mean = stats[2 * ((row * 2 + part) * heads + head)];
            float rstd = stats[2 * ((row * 2 + part) * heads + head) + 1];
            float sum_g = 0.0f, sum_gx = 0.0f;
            for (int j = 0; j < HEAD_MAX / LANES; j++) {
                int d = j * LANES + lane;
                if (inside && d < hd) {
                    float g = act_load(dqkv, at + d);
                    float xhat = (act_load(qkv, at + d) - mean) * rstd;
                    dw[j] = fma(g, xhat, dw[j]);
                    db[j] += g;
                    sum_g = fma(g, w[d], sum_g);
                    sum_gx = fma(g * w[d], xhat, sum_gx);
                }
            }
            float mean_g = lanes_sum(sums, sum_g) / hd, mean_gx = lanes_sum(sums, sum_gx) / hd;
            for (int d = lane; inside && d < hd; d += LANES) {
                float xhat = (act_load(qkv, at + d) - mean) * rstd;
                float v = fma(act_load(dqkv, at + d), w[d], -mean_g) - xhat * mean_gx;
                act_store(dqkv, at + d, rstd * v);
            }
        }
        for (int which = 0; which < 2; which++) {
            for (int j = 0; j < HEAD_MAX / LANES; j++)
                slots[slot * HEAD_MAX + j * LANES + lane] = which ? db[j] : dw[j];
            barrier(CLK_LOCAL_MEM_FENCE);
            int d = get_local_id(0);
            float sum = 0.0f;
            for (int s = 0; s < 128 / LANES; s++)
                sum += slots[s * HEAD_MAX + d];
            if (d < hd)
                partial[((size_t)get_group_id(0) * 4 + part * 2 + which) * hd + d] = sum;
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
}

// Adds the partial sums of all chunks to the four parameter gradients.
KERNEL(64, 1)
void qk_norm_sum(GLOBAL float *dwq, GLOBAL float *dbq, GLOBAL float *dwk, GLOBAL float *dbk,
                 const GLOBAL float *partial, int hd, int chunks)
{
    int i = get_global_id(0), which = i / hd, d = i % hd;
    float sum = 0.0f;
    if (which >= 4)
        return;
    for (int k = 0; k < chunks; k++)
        sum += partial[(size_t)k * 4 * hd + i];
    GLOBAL float *to = which == 0 ? dwq : which == 1 ? dbq : which == 2 ? dwk : dbk;
    to[d] += sum;
}

#ifdef CPU_FORMS
KERNEL(1, 1)
void qk_norm_fwd_cpu(GLOBAL act *out, GLOBAL float *stats, const GLOBAL act *qkv,
                     const GLOBAL float *wq, const GLOBAL float *bq, const GLOBAL float *wk,
                     const GLOBAL float *bk, int heads, int hd, int rows, int chunk, int copy)
{
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    int width = heads * hd;
    for (size_t row = from; row < to; row++) {
        for (int vector = 0; vector < 2 * heads; vector++) {
            size_t at = row * 3 * width + (size_t)vector * hd;
            const GLOBAL float *w = vector < heads ? wq : wk, *b = vector < heads ? bq : bk;
            float16 sum = 0.0f, squares = 0.0f;
            for (int d = 0; d < hd; d += 16)
                sum += act_load_upto(qkv + at + d, hd - d);
            float mean = sum16(sum) / hd;
            for (int d = 0; d < hd; d += 16) {
                float16 v = first_lanes(act_load_upto(qkv + at + d, hd - d) - mean, hd - d);
                squares = fma(v, v, squares);
            }
            float rstd = 1.0f / sqrt(sum16(squares) / hd + NORM_EPS);
            for (int d = 0; d < hd; d += 16) {
                float16 v = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                v = fma(v, float_load_upto(w + d, hd - d), float_load_upto(b + d, hd - d));
                act_store_upto(out + at + d, v, hd - d);
            }
            stats[2 * (row * 2 * heads + vector)] = mean;
            stats[2 * (row * 2 * heads + vector) + 1] = rstd;
        }
        size_t at = row * 3 * width + 2 * (size_t)width;
        for (int d = 0; copy && d < width; d += 16)
            act_store_upto(out + at + d, act_load_upto(qkv + at + d, width - d), width - d);
    }
}

KERNEL(1, 1)
void qk_norm_bwd_cpu(GLOBAL act *dqkv, GLOBAL float *partial, const GLOBAL act *qkv,
                     const GLOBAL float *stats, const GLOBAL float *wq, const GLOBAL float *wk,
                     int heads, int hd, int rows, int chunk)
{
    size_t from = get_group_id(0) * (size_t)chunk, to = min(from + chunk, (size_t)rows);
    float16 sums[4][HEAD_MAX / 16];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HEAD_MAX / 16; j++)
            sums[i][j] = 0.0f;
    for (size_t row = from; row < to; row++) {
        for (int vector = 0; vector < 2 * heads; vector++) {
            size_t at = (row * 3 * heads + vector) * hd;
            int part = vector >= heads;
            const GLOBAL float *w = part ? wk : wq;
            float mean = stats[2 * (row * 2 * heads + vector)];
            float rstd = stats[2 * (row * 2 * heads + vector) + 1];
            float16 sum_g = 0.0f, sum_gx = 0.0f;
            for (int d = 0; d < hd; d += 16) {
                float16 g = act_load_upto(dqkv + at + d, hd - d);
                float16 xhat = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                float16 v = g * float_load_upto(w + d, hd - d);
                sums[2 * part][d / 16] = fma(g, xhat, sums[2 * part][d / 16]);
                sums[2 * part + 1][d / 16] += g;
                sum_g += v;
                sum_gx = fma(v, xhat, sum_gx);
            }
            float mean_g = sum16(sum_g) / hd, mean_gx = sum16(sum_gx) / hd;
            for (int d = 0; d < hd; d += 16) {
                float16 xhat = (act_load_upto(qkv + at + d, hd - d) - mean) * rstd;
                float16 v = act_load_upto(dqkv + at + d, hd - d) * float_load_upto(w + d, hd - d);
                act_store_upto(dqkv + at + d, rstd * (v - mean_g - xhat * mean_gx), hd - d);
            }
        }
    }
    GLOBAL float *to_sums = partial + get_group_id(0) * (size_t)(4 * hd);
    for (int i = 0; i < 4; i++)
        for (int d = 0; d < hd; d += 16)
            float_store_upto(to_sums + i * hd + d, sums[i][d / 16], hd - d);
}
#endif // CPU_FORMS

// ---- attention, GPU forms --------------------------------------------------------------------------------------
//
// Flash attention by tiles: a group of 256 items (16 x 16) holds 64 rows (queries, or keys in
// attention_bwd_kv) and walks over tiles of 64 rows of the other side. Item (ty, tx) owns rows
// ty*4 + i of its tile, i < 4, and columns tx + 16*j: of the scores (j < 4) and of the head (j < 8).
// A product goes through local memory in slices of 16 along the summed axis.

#define TILE 64
#define SLICE 16
#define PITCH (TILE + 1)

// Where a part (0 q, 1 k, 2 v) of a head starts in qkv; rows are 3*width apart.
inline size_t head_part(int part, int head_of_all, int heads, int tokens, int hd)
{
    size_t n = head_of_all / heads, h = head_of_all % heads;
    return ((n * tokens * 3 + part) * heads + h) * hd;
}

// s[i][j] = sum over d of a[first_a + ty*4 + i, d] * b[first_b + tx + 16*j, d]; rows from `tokens` on
// count as 0. a, b: heads with rows pitch_a, pitch_b apart; sa, sb: SLICE * PITCH each.
inline void tile_scores(float s[4][4], const GLOBAL act *a, size_t pitch_a, int first_a,
                        const GLOBAL act *b, size_t pitch_b, int first_b, int tokens, int hd,
                        LOCAL_PTR float *sa, LOCAL_PTR float *sb)
{
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            s[i][j] = 0.0f;
    for (int from = 0; from < hd; from += SLICE) {
        for (int row = ty; row < TILE; row += 16) {
            int d = from + tx, ra = first_a + row, rb = first_b + row;
            sa[tx * PITCH + row] = d < hd && ra < tokens ? act_load(a, ra * pitch_a + d) : 0.0f;
            sb[tx * PITCH + row] = d < hd && rb < tokens ? act_load(b, rb * pitch_b + d) : 0.0f;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int k = 0; k < SLICE; k++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    s[i][j] = fma(sa[k * PITCH + ty * 4 + i], sb[k * PITCH + tx + 16 * j], s[i][j]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// sum[i][j] += sum over k < TILE of p[ty*4 + i, k] * b[first_b + k, tx + 16*j]; p: TILE * PITCH in local
// memory, written by the group just before (this function waits); sb: SLICE * HEAD_MAX.
inline void tile_product(float sum[4][8], LOCAL_PTR float *p, const GLOBAL act *b, size_t pitch_b,
                         int first_b, int tokens, int hd, LOCAL_PTR float *sb)
{
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    for (int from = 0; from < TILE; from += SLICE) {
        int rb = first_b + from + ty;
        for (int d = tx; d < HEAD_MAX; d += 16)
            sb[ty * HEAD_MAX + d] = d < hd && rb < tokens ? act_load(b, rb * pitch_b + d) : 0.0f;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int k = 0; k < SLICE; k++)
            for (int j = 0; j < 8; j++)
                if (16 * j < hd)
                    for (int i = 0; i < 4; i++)
                        sum[i][j] = fma(p[(ty * 4 + i) * PITCH + from + k],
                                        sb[k * HEAD_MAX + tx + 16 * j], sum[i][j]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// Group (q, head): 64 queries of one head of one image.
KERNEL(256, 1)
void attention_fwd(GLOBAL act *o, GLOBAL float *lse, const GLOBAL act *qkv, int heads, int tokens,
                   int hd, float scale, int write_lse, int all_heads, int key_block, int query_block,
                   int per_item)
{
    LOCAL float slices[2 * SLICE * PITCH]; // or SLICE * HEAD_MAX, which is less
    LOCAL float p[TILE * PITCH];
    LOCAL float part[256], top[TILE], total[TILE], shrink[TILE];
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    int first = get_group_id(0) * TILE, head = get_group_id(1);
    size_t pitch = (size_t)3 * heads * hd;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    float s[4][4], sum[4][8];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            sum[i][j] = 0.0f;
    if (item < TILE) {
        top[item] = -INFINITY;
        total[item] = 0.0f;
    }
    for (int keys = 0; keys < tokens; keys += TILE) {
        tile_scores(s, q, pitch, first, k, pitch, keys, tokens, hd, slices, slices + SLICE * PITCH);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                p[(ty * 4 + i) * PITCH + tx + 16 * j] =
                    keys + tx + 16 * j < tokens ? s[i][j] * scale : -INFINITY;
        barrier(CLK_LOCAL_MEM_FENCE);
        int row = item / 4, quarter = item % 4 * 16; // softmax: 4 items a row
        float best = -INFINITY, mass = 0.0f;
        for (int j = 0; j < 16; j++)
            best = fmax(best, p[row * PITCH + quarter + j]);
        part[item] = best;
        barrier(CLK_LOCAL_MEM_FENCE);
        best = top[row];
        for (int j = 0; j < 4; j++)
            best = fmax(best, part[row * 4 + j]);
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int j = 0; j < 16; j++) {
            float e = exp(p[row * PITCH + quarter + j] - best);
            p[row * PITCH + quarter + j] = e;
            mass += e;
        }
        part[item] = mass;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (quarter == 0) {
            shrink[row] = exp(top[row] - best);
            top[row] = best;
            total[row] = fma(total[row], shrink[row],
                             part[item] + part[item + 1] + part[item + 2] + part[item + 3]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 8; j++)
                sum[i][j] *= shrink[ty * 4 + i];
        tile_product(sum, p, v, pitch, keys, tokens, hd, slices);
    }
    for (int i = 0; i < 4; i++) {
        int row = first + ty * 4 + i;
        size_t to = (((size_t)(head / heads) * tokens + row) * heads + head % heads) * hd;
        for (int j = 0; j < 8; j++)
            if (row < tokens && tx + 16 * j < hd)
                act_store(o, to + tx + 16 * j, sum[i][j] / total[ty * 4 + i]);
    }
    if (write_lse && item < TILE && first + item < tokens)
        lse[(size_t)head * tokens + first + item] = top[item] + log(total[item]);
}

// delta[n,h,t] = sum over d of do * o; one item a (n, t, h).
KERNEL(64, 1)
void attention_delta(GLOBAL float *delta, const GLOBAL act *dout, const GLOBAL act *o, int heads,
                     int tokens, int hd, uint count)
{
    uint i = get_global_id(0);
    if (i >= count)
        return;
    uint h = i % heads, t = i / heads % tokens, n = i / heads / tokens;
    float sum = 0.0f;
    for (int d = 0; d < hd; d++)
        sum = fma(act_load(dout, (size_t)i * hd + d), act_load(o, (size_t)i * hd + d), sum);
    delta[((size_t)n * heads + h) * tokens + t] = sum;
}

// Group (k, head): dk and dv of 64 keys, over all queries.
KERNEL(256, 1)
void attention_bwd_kv(GLOBAL act *dqkv, const GLOBAL float *delta, const GLOBAL act *dout,
                      const GLOBAL float *lse, const GLOBAL act *qkv, int heads, int tokens, int hd,
                      float scale)
{
    LOCAL float slices[2 * SLICE * PITCH];
    LOCAL float p[TILE * PITCH];
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    int first = get_group_id(0) * TILE, head = get_group_id(1);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    const GLOBAL act *g =
        dout + ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
    const GLOBAL float *lh = lse + (size_t)head * tokens, *dh = delta + (size_t)head * tokens;
    float s[4][4], ds[4][4], dk[4][8], dv[4][8];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            dk[i][j] = dv[i][j] = 0.0f;
    for (int queries = 0; queries < tokens; queries += TILE) {
        // transposed: rows are keys, columns queries
        tile_scores(s, k, pitch, first, q, pitch, queries, tokens, hd, slices,
                    slices + SLICE * PITCH);
        tile_scores(ds, v, pitch, first, g, pitch_o, queries, tokens, hd, slices,
                    slices + SLICE * PITCH);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                int t = queries + tx + 16 * j;
                s[i][j] = t < tokens ? exp(fma(s[i][j], scale, -lh[t])) : 0.0f;
                ds[i][j] = t < tokens ? s[i][j] * (ds[i][j] - dh[t]) * scale : 0.0f;
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = s[i][j];
            }
        tile_product(dv, p, g, pitch_o, queries, tokens, hd, slices);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = ds[i][j];
        tile_product(dk, p, q, pitch, queries, tokens, hd, slices);
    }
    GLOBAL act *to = dqkv + head_part(1, head, heads, tokens, hd);
    for (int i = 0; i < 4; i++) {
        int row = first + ty * 4 + i;
        for (int j = 0; j < 8; j++) {
            int d = tx + 16 * j;
            if (row < tokens && d < hd) {
                act_store(to, row * pitch + d, dk[i][j]);
                act_store(to, row * pitch + pitch_o + d, dv[i][j]);
            }
        }
    }
}

// Group (q, head): dq of 64 queries, over all keys.
KERNEL(256, 1)
void attention_bwd_q(GLOBAL act *dqkv, const GLOBAL float *delta, const GLOBAL act *dout,
                     const GLOBAL float *lse, const GLOBAL act *qkv, int heads, int tokens, int hd,
                     float scale)
{
    LOCAL float slices[2 * SLICE * PITCH];
    LOCAL float p[TILE * PITCH];
    int item = get_local_id(0), ty = item / 16, tx = item % 16;
    int first = get_group_id(0) * TILE, head = get_group_id(1);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    const GLOBAL act *q = qkv + head_part(0, head, heads, tokens, hd);
    const GLOBAL act *k = q + heads * hd, *v = k + heads * hd;
    const GLOBAL act *g =
        dout + ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
    const GLOBAL float *lh = lse + (size_t)head * tokens, *dh = delta + (size_t)head * tokens;
    float s[4][4], ds[4][4], dq[4][8];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            dq[i][j] = 0.0f;
    for (int keys = 0; keys < tokens; keys += TILE) {
        tile_scores(s, q, pitch, first, k, pitch, keys, tokens, hd, slices, slices + SLICE * PITCH);
        tile_scores(ds, g, pitch_o, first, v, pitch, keys, tokens, hd, slices,
                    slices + SLICE * PITCH);
        for (int i = 0; i < 4; i++) {
            int t = min(first + ty * 4 + i, tokens - 1);
            for (int j = 0; j < 4; j++) {
                float e = exp(fma(s[i][j], scale, -lh[t])) * (ds[i][j] - dh[t]) * scale;
                p[(ty * 4 + i) * PITCH + tx + 16 * j] = keys + tx + 16 * j < tokens ? e : 0.0f;
            }
        }
        tile_product(dq, p, k, pitch, keys, tokens, hd, slices);
    }
    GLOBAL act *to = dqkv + head_part(0, head, heads, tokens, hd);
    for (int i = 0; i < 4; i++) {
        int row = first + ty * 4 + i;
        for (int j = 0; j < 8; j++)
            if (row < tokens && tx + 16 * j < hd)
                act_store(to, row * pitch + tx + 16 * j, dq[i][j]);
    }
}

#ifdef CPU_FORMS
// ---- attention, CPU forms ------------------------------------------------------------------------------------
//
// One item = some heads, or a block of queries of one. All is done in private memory that stays in
// the core's L2: tiles are packed as f32, padded to vectors, and multiplied by small_product().

#define ARENA_FWD 57344 // floats of private memory an item; runtime/ops_attention.c fits blocks to it
#define ARENA_BWD 65536

// Functions of their own: inlined at every call they compile for twice as long and run no faster.
#define APART static __attribute__((noinline))

// c[m,n] (+)= a b. a is read at a[i*row + k*step], b at b[k*ldb + j]. m a multiple of 8, n of 16.
APART void small_product(float *c, int ldc, const float *a, int row, int step, const float *b,
                          int ldb, int m, int n, int depth, int add)
{
    int j = 0;
    for (; j + 32 <= n; j += 32) {
        for (int i = 0; i < m; i += 8) {
            float16 lo[8], hi[8];
#pragma unroll
            for (int r = 0; r < 8; r++)
                lo[r] = hi[r] = 0.0f;
            const float *ai = a + i * row, *bj = b + j;
            for (int k = 0; k < depth; k++) {
                float16 b0 = vload16(0, bj), b1 = vload16(1, bj);
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    lo[r] = fma((float16)(ai[r * row]), b0, lo[r]);
                    hi[r] = fma((float16)(ai[r * row]), b1, hi[r]);
                }
                ai += step;
                bj += ldb;
            }
            float *to = c + i * ldc + j;
#pragma unroll
            for (int r = 0; r < 8; r++) {
                vstore16(add ? lo[r] + vload16(0, to + r * ldc) : lo[r], 0, to + r * ldc);
                vstore16(add ? hi[r] + vload16(1, to + r * ldc) : hi[r], 1, to + r * ldc);
            }
        }
    }
    for (int i = 0; j < n && i < m; i += 8) {
        float16 sum[8];
#pragma unroll
        for (int r = 0; r < 8; r++)
            sum[r] = 0.0f;
        const float *ai = a + i * row, *bj = b + j;
        for (int k = 0; k < depth; k++) {
            float16 b0 = vload16(0, bj);
#pragma unroll
            for (int r = 0; r < 8; r++)
                sum[r] = fma((float16)(ai[r * row]), b0, sum[r]);
            ai += step;
            bj += ldb;
        }
        float *to = c + i * ldc + j;
#pragma unroll
        for (int r = 0; r < 8; r++)
            vstore16(add ? sum[r] + vload16(0, to + r * ldc) : sum[r], 0, to + r * ldc);
    }
}

// to[rows, ld] = factor * from[rows, hd], padded with 0 to `padded` rows and `ld` columns
APART void pack_rows(float *to, int ld, const GLOBAL act *from, size_t pitch, int rows, int padded,
                      int hd, float factor)
{
    for (int i = 0; i < padded; i++)
        for (int d = 0; d < ld; d += 16) {
            float16 v = i < rows ? act_load_upto(from + i * pitch + d, hd - d) : (float16)(0.0f);
            vstore16(v * factor, 0, to + i * ld + d);
        }
}

// to[d, ld] = from[rows, hd] transposed, padded with 0 to `ld` columns and a multiple of 16 rows: blocks
// of 16 x 16 go through four perfect shuffles of their rows.
APART void pack_columns(float *to, int ld, const GLOBAL act *from, size_t pitch, int rows, int hd)
{
    for (int i = 0; i < ld; i += 16)
        for (int d = 0; d < hd; d += 16) {
            float16 r[16], t[16];
#pragma unroll
            for (int k = 0; k < 16; k++)
                r[k] = i + k < rows ? act_load_upto(from + (i + k) * pitch + d, hd - d)
                                    : (float16)(0.0f);
#pragma unroll
            for (int stage = 0; stage < 4; stage++) {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    t[2 * k].even = r[k].lo;
                    t[2 * k].odd = r[k + 8].lo;
                    t[2 * k + 1].even = r[k].hi;
                    t[2 * k + 1].odd = r[k + 8].hi;
                }
#pragma unroll
                for (int k = 0; k < 16; k++)
                    r[k] = t[k];
            }
#pragma unroll
            for (int k = 0; k < 16; k++)
                vstore16(r[k], 0, to + (d + k) * ld + i);
        }
}

// One block of keys for 8 queries: scores -> probabilities, running maximum and sum, and the factor
// that earlier sums shrink by.
APART void softmax_step(float *s, int ld, int keys, float *top, float *total, float *shrink)
{
    for (int r = 0; r < 8; r++) {
        float *row = s + r * ld;
        float16 best = -INFINITY, mass = 0.0f;
        int j = 0;
        for (; j + 16 <= keys; j += 16)
            best = fmax(best, vload16(0, row + j));
        if (j < keys) { // lanes past the last key take no part
            for (int lane = keys; lane < ld; lane++)
                row[lane] = -INFINITY;
            best = fmax(best, vload16(0, row + j));
        }
        float m = fmax(top[r], max16(best));
        for (j = 0; j + 16 <= keys; j += 16) {
            float16 e = exp16(vload16(0, row + j) - m);
            vstore16(e, 0, row + j);
            mass += e;
        }
        if (j < keys) {
            float16 e = first_lanes(exp16(vload16(0, row + j) - m), keys - j);
            vstore16(e, 0, row + j);
            mass += e;
        }
        shrink[r] = exp(top[r] - m);
        total[r] = fma(total[r], shrink[r], sum16(mass));
        top[r] = m;
    }
}

KERNEL(1, 1)
void attention_fwd_cpu(GLOBAL act *o, GLOBAL float *lse, const GLOBAL act *qkv, int heads,
                       int tokens, int hd, float scale, int write_lse, int all_heads, int key_block,
                       int query_block, int per_item)
{
    float arena[ARENA_FWD];
    int ld = (hd + 15) / 16 * 16, last = min((int)get_group_id(1) * per_item + per_item, all_heads);
    int first = get_group_id(0) * query_block, queries = min(query_block, tokens - first);
    int padded = (queries + 7) / 8 * 8;
    size_t pitch = (size_t)3 * heads * hd;
    float *kt = arena, *v = kt + key_block * ld, *s = v + key_block * ld;
    float *q = s + 8 * key_block, *sum = q + padded * ld, *top = sum + padded * ld;
    float *total = top + padded;
    for (int head = get_group_id(1) * per_item; head < last; head++) {
        const GLOBAL act *from = qkv + head_part(0, head, heads, tokens, hd);
        pack_rows(q, ld, from + first * pitch, pitch, queries, padded, hd, scale);
        for (int i = 0; i < padded; i++) {
            top[i] = -INFINITY;
            total[i] = 0.0f;
        }
        for (int key = 0; key < tokens; key += key_block) {
            int keys = min(key_block, tokens - key), ldk = (keys + 15) / 16 * 16;
            const GLOBAL act *k = from + key * pitch + heads * hd;
            pack_columns(kt, ldk, k, pitch, keys, hd);
            pack_rows(v, ld, k + heads * hd, pitch, keys, keys, hd, 1.0f);
            for (int i = 0; i < padded; i += 8) {
                float shrink[8];
                small_product(s, ldk, q + i * ld, ld, 1, kt, ldk, 8, ldk, hd, 0);
                softmax_step(s, ldk, keys, top + i, total + i, shrink);
                for (int r = 0; key > 0 && r < 8; r++)
                    for (int d = 0; d < ld; d += 16) {
                        float *at = sum + (i + r) * ld + d;
                        vstore16(vload16(0, at) * shrink[r], 0, at);
                    }
                small_product(sum + i * ld, ld, s, ldk, 1, v, ld, 8, ld, keys, key > 0);
            }
        }
        size_t row = (size_t)(head / heads) * tokens + first;
        for (int i = 0; i < queries; i++) {
            for (int d = 0; d < hd; d += 16)
                act_store_upto(o + ((row + i) * heads + head % heads) * hd + d,
                               vload16(0, sum + i * ld + d) / total[i], hd - d);
            if (write_lse)
                lse[(size_t)head * tokens + first + i] = top[i] + log(total[i]);
        }
    }
}

// Probabilities from scores and lse, then ds from dp: s becomes p, dp becomes ds. Columns from `keys`
// and rows from `rows` on become 0.
APART void softmax_back(float *s, float *dp, int ld, int rows, int padded, int keys, float scale,
                         const GLOBAL float *lse, const float *delta)
{
    for (int i = 0; i < padded; i++) {
        float l = i < rows ? lse[i] : INFINITY, d = i < rows ? delta[i] : 0.0f;
        for (int j = 0; j < ld; j += 16) {
            float16 p = exp16(fma(vload16(0, s + i * ld + j), (float16)(scale), (float16)(-l)));
            if (i >= rows || j + 16 > keys)
                p = first_lanes(p, i < rows ? keys - j : 0);
            float16 ds = p * (vload16(0, dp + i * ld + j) - d) * scale;
            vstore16(p, 0, s + i * ld + j);
            vstore16(ds, 0, dp + i * ld + j);
        }
    }
}

// One item does `per_item` heads: for each block of keys, for each block of queries. dq sums over
// blocks of keys in `space`, [all heads, padded queries, ld] f32, when there is more than one.
KERNEL(1, 1)
void attention_bwd_cpu(GLOBAL act *dqkv, GLOBAL float *delta, const GLOBAL act *dout,
                       const GLOBAL act *o, const GLOBAL float *lse, const GLOBAL act *qkv,
                       GLOBAL float *space, int heads, int tokens, int hd, float scale,
                       int all_heads, int key_block, int query_block, int per_item)
{
    float arena[ARENA_BWD];
    int ld = (hd + 15) / 16 * 16, last = min((int)get_group_id(0) * per_item + per_item, all_heads);
    size_t pitch = (size_t)3 * heads * hd, pitch_o = (size_t)heads * hd;
    int blocks = (tokens + query_block - 1) / query_block;
    float *kt = arena, *vt = kt + key_block * ld, *k = vt + key_block * ld;
    float *dk = k + key_block * ld, *dv = dk + key_block * ld, *s = dv + key_block * ld;
    float *dp = s + key_block * query_block, *q = dp + key_block * query_block;
    float *g = q + query_block * ld, *dq = g + query_block * ld, *rowsum = dq + query_block * ld;
    for (int head = get_group_id(0) * per_item; head < last; head++) {
        size_t at = head_part(0, head, heads, tokens, hd);
        size_t at_o = ((size_t)(head / heads) * tokens * heads + head % heads) * hd;
        GLOBAL float *dq_sum = space + (size_t)head * blocks * query_block * ld;
        for (int key = 0; key < tokens; key += key_block) {
            int keys = min(key_block, tokens - key), ldk = (keys + 15) / 16 * 16;
            const GLOBAL act *from = qkv + at + key * pitch + pitch_o;
            pack_columns(kt, ldk, from, pitch, keys, hd);
            pack_columns(vt, ldk, from + pitch_o, pitch, keys, hd);
            pack_rows(k, ld, from, pitch, keys, ldk, hd, 1.0f);
            for (int query = 0; query < tokens; query += query_block) {
                int rows = min(query_block, tokens - query), padded = (rows + 7) / 8 * 8;
                pack_rows(q, ld, qkv + at + query * pitch, pitch, rows, padded, hd, 1.0f);
                pack_rows(g, ld, dout + at_o + query * pitch_o, pitch_o, rows, padded, hd, 1.0f);
                for (int i = 0; i < rows; i++) {
                    float16 sum = 0.0f;
                    for (int d = 0; key == 0 && d < ld; d += 16)
                        sum = fma(vload16(0, g + i * ld + d),
                                  act_load_upto(o + at_o + (query + i) * pitch_o + d, hd - d), sum);
                    if (key == 0)
                        delta[(size_t)head * tokens + query + i] = sum16(sum);
                    rowsum[i] = delta[(size_t)head * tokens + query + i];
                }
                small_product(s, ldk, q, ld, 1, kt, ldk, padded, ldk, hd, 0);
                small_product(dp, ldk, g, ld, 1, vt, ldk, padded, ldk, hd, 0);
                softmax_back(s, dp, ldk, rows, padded, keys, scale,
                             lse + (size_t)head * tokens + query, rowsum);
                small_product(dv, ld, s, 1, ldk, g, ld, ldk, ld, rows, query > 0);
                small_product(dk, ld, dp, 1, ldk, q, ld, ldk, ld, rows, query > 0);
                small_product(dq, ld, dp, ldk, 1, k, ld, padded, ld, keys, 0);
                for (int i = 0; i < rows; i++)
                    for (int d = 0; d < ld; d += 16) {
                        GLOBAL float *sum = dq_sum + (size_t)(query + i) * ld + d;
                        float16 v = vload16(0, dq + i * ld + d);
                        if (key > 0)
                            v += vload16(0, sum);
                        if (key + keys < tokens)
                            vstore16(v, 0, sum);
                        else
                            act_store_upto(dqkv + at + (query + i) * pitch + d, v, hd - d);
                    }
            }
            GLOBAL act *to = dqkv + at + key * pitch + pitch_o;
            for (int i = 0; i < keys; i++)
                for (int d = 0; d < hd; d += 16) {
                    act_store_upto(to + i * pitch + d, vload16(0, dk + i * ld + d), hd - d);
                    act_store_upto(to + i * pitch + pitch_o + d, vload16(0, dv + i * ld + d), hd - d);
                }
        }
    }
}
#endif // CPU_FORMS
