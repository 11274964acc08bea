// ---- mixture of experts -------------------------------------------------------------------------
//
// Letters as in runtime/tensor.h: M tokens, K choices a token, R = M*K routed rows, D columns, E
// experts. GPU forms of row operations: x covers the columns, y strides over the rows, so that no
// index needs a division. CPU forms: a work-item takes `chunk` rows.

// h[R,F] = silu(g) * u, gu[R,2F] = g | u
KERNEL(256, 1)
void swiglu_fwd(GLOBAL act *h, const GLOBAL act *gu, uint R, uint F)
{
    size_t f = get_global_id(0);
    if (f >= F)
        return;
    for (size_t r = get_group_id(1); r < R; r += get_num_groups(1)) {
        float g = act_load(gu, r * 2 * F + f), u = act_load(gu, r * 2 * F + F + f);
        act_store(h, r * F + f, g * sigmoid(g) * u);
    }
}

// dg = dh u s (1 + g (1-s)), du = dh g s with s = sigmoid(g). dgu may be gu.
KERNEL(256, 1)
void swiglu_bwd(GLOBAL act *dgu, const GLOBAL act *dh, const GLOBAL act *gu, uint R, uint F)
{
    size_t f = get_global_id(0);
    if (f >= F)
        return;
    for (size_t r = get_group_id(1); r < R; r += get_num_groups(1)) {
        size_t at = r * 2 * F + f;
        float g = act_load(gu, at), u = act_load(gu, at + F), d = act_load(dh, r * F + f);
        float s = sigmoid(g);
        act_store(dgu, at, d * u * s * fma(g, 1.0f - s, 1.0f));
        act_store(dgu, at + F, d * g * s);
    }
}

// rows[R,D] = x[token[r],:]
KERNEL(256, 1)
void dispatch_fwd(GLOBAL act *rows, const GLOBAL act *x, const GLOBAL int *token, uint R, uint D)
{
    size_t d = get_global_id(0);
    if (d >= D)
        return;
    for (size_t r = get_group_id(1); r < R; r += get_num_groups(1))
        rows[r * D + d] = x[(size_t)token[r] * D + d];
}

// dx[M,D] += sum over k of drows[slot[m,k],:]
KERNEL(256, 1)
void dispatch_bwd(GLOBAL act *dx, const GLOBAL act *drows, const GLOBAL int *slot, uint M, uint K,
                  uint D)
{
    size_t d = get_global_id(0);
    if (d >= D)
        return;
    for (size_t m = get_group_id(1); m < M; m += get_num_groups(1)) {
        float sum = act_load(dx, m * D + d);
        for (uint k = 0; k < K; k++)
            sum += act_load(drows, (size_t)slot[m * K + k] * D + d);
        act_store(dx, m * D + d, sum);
    }
}

// out[M,D] = sum over k of weight[m,k] rows[slot[m,k],:] (+ shared[m,:] unless NULL)
KERNEL(256, 1)
void combine_fwd(GLOBAL act *out, const GLOBAL act *rows, const GLOBAL int *slot,
                 const GLOBAL float *weight, const GLOBAL act *shared, uint M, uint K, uint D)
{
    size_t d = get_global_id(0);
    if (d >= D)
        return;
    for (size_t m = get_group_id(1); m < M; m += get_num_groups(1)) {
        float sum = shared ? act_load(shared, m * D + d) : 0.0f;
        for (uint k = 0; k < K; k++)
            sum = fma(weight[m * K + k], act_load(rows, (size_t)slot[m * K + k] * D + d), sum);
        act_store(out, m * D + d, sum);
    }
}

// drows[slot[m,k],:] = weight[m,k] dout[m,:]; dweight[m,k] = <dout[m,:], rows[slot[m,k],:]>.
// drows may be rows: an element is read before the same work-item writes it. A work-group a pair
// (m,k).
KERNEL(64, 1)
void combine_bwd(GLOBAL act *drows, GLOBAL float *dweight, const GLOBAL act *dout,
                 const GLOBAL act *rows, const GLOBAL int *slot, const GLOBAL float *weight, uint R,
                 uint K, uint D)
{
    LOCAL float sums[64];
    uint i = get_local_id(0);
    for (size_t pair = get_group_id(0); pair < R; pair += get_num_groups(0)) {
        size_t row = (size_t)slot[pair] * D, m = pair / K * D;
        float w = weight[pair], sum = 0.0f;
        for (uint d = i; d < D; d += 64) {
            float g = act_load(dout, m + d);
            sum = fma(g, act_load(rows, row + d), sum);
            act_store(drows, row + d, w * g);
        }
        sums[i] = sum;
        for (uint step = 32; step > 0; step /= 2) {
            barrier(CLK_LOCAL_MEM_FENCE);
            if (i < step)
                sums[i] += sums[i + step];
        }
        if (i == 0)
            dweight[pair] = sums[0];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// ---- router

// The K largest probabilities of a row in descending order, ties to the lower expert. NaN counts as
// less than any probability, so that K distinct indices come out of every row.
inline void top_k(GLOBAL float *weight, GLOBAL int *index, const GLOBAL float *p, uint E, uint K,
                  int renormalise)
{
    float last = 2.0f, sum = 0.0f;
    int last_expert = -1;
    for (uint k = 0; k < K; k++) {
        float best = -2.0f;
        int expert = 0;
        for (int e = 0; e < (int)E; e++) {
            float q = p[e] >= 0.0f ? p[e] : -1.0f;
            int left = (q < last) | ((q == last) & (e > last_expert));
            int better = left & (q > best); // no branches: they would be guessed wrong
            best = better ? q : best;
            expert = better ? e : expert;
        }
        last = best;
        last_expert = expert;
        index[k] = expert;
        weight[k] = p[expert];
        sum += p[expert];
    }
    if (renormalise && K > 1)
        for (uint k = 0; k < K; k++)
            weight[k] = weight[k] / (sum + 1e-20f);
}

// probs[M,E] = softmax(logits); weight[M,K], index[M,K]. A work-item a row.
KERNEL(64, 1)
void router_fwd(GLOBAL float *probs, GLOBAL float *weight, GLOBAL int *index,
                const GLOBAL float *logits, uint M, uint E, uint K, int renormalise)
{
    size_t m = get_global_id(0);
    if (m >= M)
        return;
    const GLOBAL float *x = logits + m * E;
    GLOBAL float *p = probs + m * E;
    float most = -INFINITY, sum = 0.0f;
    for (uint e = 0; e < E; e++)
        most = x[e] > most ? x[e] : most;
    for (uint e = 0; e < E; e++) {
        p[e] = exp(x[e] - most);
        sum += p[e];
    }
    for (uint e = 0; e < E; e++)
        p[e] = p[e] / sum;
    top_k(weight + m * K, index + m * K, p, E, K, renormalise);
}

// The gradient of the k-th chosen probability of a row: of its weight, and where the weights are
// divided by their sum `s` (`mean` = sum_k dweight_k p_k / s), of that.
inline float choice_gradient(const GLOBAL float *dweight, uint k, float s, float mean)
{
    return s > 0.0f ? (dweight[k] - mean) / s : dweight[k];
}

// The sum that a row's weights were divided by, 0 when they were not; and `mean` as above.
inline float choice_sum(const GLOBAL float *dweight, const GLOBAL float *p, const GLOBAL int *index,
                        uint K, int renormalise, float *mean)
{
    float s = 0.0f, dot = 0.0f;
    *mean = 0.0f;
    if (!renormalise || K < 2)
        return 0.0f;
    for (uint k = 0; k < K; k++) {
        s += p[index[k]];
        dot = fma(dweight[k], p[index[k]], dot);
    }
    s += 1e-20f;
    *mean = dot / s;
    return s;
}

// dlogits[M,E] = p (dp - <p, dp>), dp = balance * fraction[g,:] plus the choices' gradients;
// balance is alpha / M, `rows` the rows of a group.
KERNEL(64, 1)
void router_bwd(GLOBAL float *dlogits, const GLOBAL float *dweight, const GLOBAL float *probs,
                const GLOBAL int *index, const GLOBAL float *fraction, float balance, uint M,
                uint E, uint K, uint rows, int renormalise)
{
    size_t m = get_global_id(0);
    if (m >= M)
        return;
    const GLOBAL float *p = probs + m * E, *dw = dweight + m * K;
    const GLOBAL float *f = fraction + m / rows * E;
    const GLOBAL int *chosen = index + m * K;
    GLOBAL float *out = dlogits + m * E;
    float mean, dot = 0.0f, s = choice_sum(dw, p, chosen, K, renormalise, &mean);
    if (balance != 0.0f)
        for (uint e = 0; e < E; e++)
            dot = fma(p[e] * balance, f[e], dot);
    for (uint k = 0; k < K; k++)
        dot = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), dot);
    for (uint e = 0; e < E; e++)
        out[e] = p[e] * (balance != 0.0f ? fma(balance, f[e], -dot) : -dot);
    for (uint k = 0; k < K; k++)
        out[chosen[k]] = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), out[chosen[k]]);
}

// ---- routing: a stable counting sort of the R pairs by expert
//
// Chunks of pairs are counted (count[chunk,E]), the counts of each expert are summed over the
// chunks before and the experts over the experts before, and every chunk then places its own pairs.

// `chunk` is a multiple of 256. Counting and ranking compare with a tile in local memory: no
// atomics.
KERNEL(256, 1)
void route_count(GLOBAL int *count, const GLOBAL int *index, uint R, uint E, uint chunk)
{
    LOCAL int tile[256];
    uint i = get_local_id(0);
    int low = 0, high = 0; // of experts i and i + 256
    size_t from = get_group_id(0) * (size_t)chunk;
    for (size_t at = from; at < from + chunk && at < R; at += 256) {
        tile[i] = at + i < R ? index[at + i] : -1;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint j = 0; j < 256; j++) {
            low += tile[j] == (int)i;
            high += tile[j] == (int)i + 256;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (i < E)
        count[get_group_id(0) * E + i] = low;
    if (i + 256 < E)
        count[get_group_id(0) * E + i + 256] = high;
}

// count[chunk,e] becomes the number of e in the chunks before; offsets[E+1]. One work-group.
KERNEL(64, 1)
void route_scan(GLOBAL int *offsets, GLOBAL int *count, uint chunks, uint E)
{
    LOCAL int total[512];
    for (uint e = get_local_id(0); e < E; e += 64) {
        int sum = 0;
        for (uint c = 0; c < chunks; c++) {
            int n = count[c * E + e];
            count[c * E + e] = sum;
            sum += n;
        }
        total[e] = sum;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        int sum = 0;
        for (uint e = 0; e < E; e++) {
            offsets[e] = sum;
            sum += total[e];
        }
        offsets[E] = sum;
    }
}

KERNEL(256, 1)
void route_place(GLOBAL int *slot, GLOBAL int *token, const GLOBAL int *index,
                 const GLOBAL int *offsets, const GLOBAL int *count, uint R, uint K, uint E,
                 uint chunk)
{
    LOCAL int tile[256];
    LOCAL int next[512]; // the next free row of each expert
    uint i = get_local_id(0);
    size_t from = get_group_id(0) * (size_t)chunk;
    for (uint e = i; e < E; e += 256)
        next[e] = offsets[e] + count[get_group_id(0) * E + e];
    for (size_t at = from; at < from + chunk && at < R; at += 256) {
        int expert = at + i < R ? index[at + i] : -1;
        int rank = 0, low = 0, high = 0;
        tile[i] = expert;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint j = 0; j < 256; j++) {
            rank += j < i && tile[j] == expert;
            low += tile[j] == (int)i;
            high += tile[j] == (int)i + 256;
        }
        if (expert >= 0) {
            slot[at + i] = next[expert] + rank;
            token[next[expert] + rank] = (int)((at + i) / K);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < E)
            next[i] += low;
        if (i + 256 < E)
            next[i + 256] += high;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// ---- balance statistics

// Sums of a chunk of rows of one group: count[group,chunk,E] of choices and, behind these `entries`
// numbers, sum[group,chunk,E] of probabilities. Work-groups: x the chunk, y the group. Items side
// by side take the experts of several rows.
KERNEL(256, 1)
void balance_sum(GLOBAL int *count, uint entries, const GLOBAL int *index,
                 const GLOBAL float *probs, uint rows, uint E, uint K, uint chunk)
{
    GLOBAL float *sum = (GLOBAL float *)count + entries;
    LOCAL float sums[256];
    LOCAL int counts[256];
    uint i = get_local_id(0);
    size_t out = (get_group_id(1) * get_num_groups(0) + get_group_id(0)) * E;
    size_t first = get_group_id(1) * (size_t)rows;
    uint from = (uint)get_group_id(0) * chunk, to = from + chunk < rows ? from + chunk : rows;
    for (uint e0 = 0; e0 < E; e0 += 256) {
        uint width = E - e0 < 256 ? E - e0 : 256, side = 256 / width;
        uint e = e0 + i % width;
        float s = 0.0f;
        int n = 0;
        for (uint r = from + i / width; i / width < side && r < to; r += side) {
            s += probs[(first + r) * E + e];
            for (uint k = 0; k < K; k++)
                n += index[(first + r) * K + k] == (int)e;
        }
        sums[i] = s;
        counts[i] = n;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < width) {
            for (uint j = 1; j < side; j++) {
                s += sums[j * width + i];
                n += counts[j * width + i];
            }
            count[out + e] = n;
            sum[out + e] = s;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// fraction[G,E] = E * count / (rows K), mean_prob[G,E] = sum / rows. A work-item an entry.
KERNEL(64, 1)
void balance_mean(GLOBAL float *fraction, GLOBAL float *mean_prob, const GLOBAL int *count,
                  uint entries, uint means, uint rows, uint E, uint K, uint chunks)
{
    const GLOBAL float *sum = (const GLOBAL float *)count + entries;
    size_t i = get_global_id(0);
    if (i >= means)
        return;
    size_t at = i / E * chunks * E + i % E;
    float s = 0.0f;
    int n = 0;
    for (uint c = 0; c < chunks; c++) {
        n += count[at + c * E];
        s += sum[at + c * E];
    }
    fraction[i] = (float)n * (float)E / ((float)rows * (float)K);
    mean_prob[i] = s / (float)rows;
}

// ---- rectified flow -----------------------------------------------------------------------------

// xt[N,P] = (1-t[n]) x + t[n] noise
KERNEL(256, 1)
void flow_mix(GLOBAL float *xt, const GLOBAL float *x, const GLOBAL float *noise,
              const GLOBAL float *t, uint N, uint P)
{
    size_t i = get_global_id(0);
    if (i >= P)
        return;
    for (size_t n = get_group_id(1); n < N; n += get_num_groups(1))
        xt[n * P + i] = fma(t[n], noise[n * P + i], (1.0f - t[n]) * x[n * P + i]);
}

// One image: loss[n] = mean of (out - (noise - x))^2 over its P values; dout = factor * the
// difference, 0 from P to Q, unless dout is NULL. out and dout have Q values an image.
KERNEL(256, 1)
void flow_loss(GLOBAL float *loss, GLOBAL float *dout, const GLOBAL float *out,
               const GLOBAL float *x, const GLOBAL float *noise, uint P, uint Q, float factor)
{
    LOCAL float sums[256];
    uint i = get_local_id(0);
    size_t n = get_group_id(0);
    float sum = 0.0f;
    for (size_t p = i; p < P; p += 256) {
        float d = out[n * Q + p] - (noise[n * P + p] - x[n * P + p]);
        sum = fma(d, d, sum);
        if (dout)
            dout[n * Q + p] = factor * d;
    }
    for (size_t p = P + i; dout && p < Q; p += 256)
        dout[n * Q + p] = 0.0f;
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        loss[n] = sums[0] / (float)P;
}

// z[N,P] -= dt v', v' = vu + cfg (vc - vu) on the first `guided` values of an image, vc elsewhere;
// v has Q values an image, the unconditional ones N images further on (when guided > 0).
KERNEL(256, 1)
void flow_euler(GLOBAL float *z, const GLOBAL float *v, float cfg, uint guided, float dt, uint N,
                uint P, uint Q)
{
    size_t i = get_global_id(0);
    if (i >= P)
        return;
    for (size_t n = get_group_id(1); n < N; n += get_num_groups(1)) {
        float step = v[n * Q + i];
        if (i < guided) {
            float unconditional = v[(N + n) * Q + i];
            step = fma(cfg, step - unconditional, unconditional);
        }
        z[n * P + i] = fma(-dt, step, z[n * P + i]);
    }
}

// ---- random numbers (the same function as runtime/rng.c; see there) -----------------------------

inline float minus_two_log(float u)
{
    uint shifted = as_uint(u) - 0x3f3504f3u;
    int e = (int)(shifted >> 23);
    e = e >= 256 ? e - 512 : e;
    float f = as_float((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float q = -0x1.383e66p-4f;
    q = fma(q, f, 0x1.084e8ep-3f);
    q = fma(q, f, -0x1.0f3778p-3f);
    q = fma(q, f, 0x1.227084p-3f);
    q = fma(q, f, -0x1.542744p-3f);
    q = fma(q, f, 0x1.99a402p-3f);
    q = fma(q, f, -0x1.000428p-2f);
    q = fma(q, f, 0x1.555550p-2f);
    q = fma(q, f, -0x1.fffff8p-2f);
    float log_m = fma(f * f, q, f);
    return -2.0f * fma((float)e, 0x1.62e430p-1f, log_m);
}

inline float square_root(float x)
{
    float y = as_float(0x5f3759dfu - (as_uint(x) >> 1));
    float h = 0.5f * x;
    y = y * fma(-(h * y), y, 1.5f);
    y = y * fma(-(h * y), y, 1.5f);
    y = y * fma(-(h * y), y, 1.5f);
    float r = x * y;
    return fma(fma(-r, r, x), 0.5f * y, r);
}

// Two normal numbers at p, the second where `both`.
inline void normal_pair(GLOBAL float *p, uint w0, uint w1, int both)
{
    float radius = square_root(minus_two_log(fma((float)w0, 0x1p-32f, 0x1p-33f)));
    uint quadrant = (w1 + 0x20000000u) >> 30;
    int rest = (int)(w1 - (quadrant << 30));
    float a = (float)rest * 0x1.921fb6p-30f;
    float z = a * a;
    float sine = fma(a * z, fma(fma(-0x1.994e58p-13f, z, 0x1.11076p-7f), z, -0x1.555546p-3f), a);
    float cosine = fma(z * z, fma(fma(0x1.9a0206p-16f, z, -0x1.6c0c8ap-10f), z, 0x1.55554ap-5f),
                       fma(z, -0.5f, 1.0f));
    float x = quadrant & 1 ? sine : cosine, y = quadrant & 1 ? cosine : sine;
    p[0] = radius * (quadrant == 1 || quadrant == 2 ? -x : x);
    if (both)
        p[1] = radius * (quadrant >= 2 ? -y : y);
}

// Numbers at..at+3 (those below count), at a multiple of 4.
inline void normal_block(GLOBAL float *out, size_t at, size_t count, uint seed_low, uint seed_high,
                         uint stream_low, uint stream_high)
{
    ulong block = at / 4;
    uint c0 = (uint)block, c1 = (uint)(block >> 32), c2 = stream_low, c3 = stream_high;
    for (uint round = 0; round < 10; round++) {
        ulong a = (ulong)0xd2511f53u * c0, b = (ulong)0xcd9e8d57u * c2;
        c0 = (uint)(b >> 32) ^ c1 ^ (seed_low + round * 0x9e3779b9u);
        c1 = (uint)b;
        c2 = (uint)(a >> 32) ^ c3 ^ (seed_high + round * 0xbb67ae85u);
        c3 = (uint)a;
    }
    normal_pair(out + at, c0, c1, at + 1 < count);
    if (at + 2 < count)
        normal_pair(out + at + 2, c2, c3, at + 3 < count);
}

// out[i] from (seed, stream, i), given as 32-bit halves. A work-item a block of four numbers.
KERNEL(64, 1)
void normal(GLOBAL float *out, uint count_low, uint count_high, uint seed_low, uint seed_high,
            uint stream_low, uint stream_high)
{
    size_t count = (size_t)count_high << 32 | count_low, at = 4 * get_global_id(0);
    if (at < count)
        normal_block(out, at, count, seed_low, seed_high, stream_low, stream_high);
}

// ---- optimiser ----------------------------------------------------------------------------------

// partial[group] = sum of squares of the 4096 values of g that belong to it
KERNEL(256, 1)
void norm2_partial(GLOBAL float *partial, const GLOBAL float *g, uint count_low, uint count_high)
{
    LOCAL float sums[256];
    uint i = get_local_id(0);
    size_t count = (size_t)count_high << 32 | count_low;
    size_t from = (size_t)get_group_id(0) * 4096;
    float sum = 0.0f;
    for (size_t at = from + i; at < from + 4096 && at < count; at += 256)
        sum = fma(g[at], g[at], sum);
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        partial[get_group_id(0)] = sums[0];
}

// control[0] (+)= sum of the partials: compensated (Kahan) sums of every 256th, then pairwise. One
// work-group.
KERNEL(256, 1)
void norm2_total(GLOBAL float *control, const GLOBAL float *partial, uint count, int accumulate)
{
    LOCAL float sums[256];
    uint i = get_local_id(0);
    float sum = 0.0f, lost = 0.0f;
    for (size_t at = i; at < count; at += 256) {
        float term = partial[at] - lost;
        float next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sums[i] = sum;
    for (uint step = 128; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i == 0)
        control[0] = accumulate ? control[0] + sums[0] : sums[0];
}

// The step's scalars; control's entries are enum control of runtime/ops.h. log_beta = ln(beta), so
// that 1 - beta^t keeps its digits. One work-group.
KERNEL(64, 1)
void adamw_control(GLOBAL float *control, GLOBAL int *counts, const GLOBAL float *loss, uint N,
                   float rate, float log_beta1, float log_beta2, float clip, float warmup,
                   float ema)
{
    LOCAL float sums[64];
    uint i = get_local_id(0);
    float sum = 0.0f;
    for (uint n = i; n < N; n += 64)
        sum += loss[n];
    sums[i] = sum;
    for (uint step = 32; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < step)
            sums[i] += sums[i + step];
    }
    if (i > 0)
        return;
    float mean = sums[0] / (float)N, norm2 = control[0];
    control[7] = mean;
    if (!isfinite(mean) || !isfinite(norm2)) {
        control[1] = 0.0f;
        control[6] = 1.0f;
        counts[1] += 1;
        return;
    }
    float t = (float)(counts[0] + 1), warm = (1.0f + t) / (10.0f + t);
    float fit = clip / (sqrt(norm2) + 1e-6f);
    control[1] = clip > 0.0f && fit < 1.0f ? fit : 1.0f;
    control[2] = t < warmup ? rate * (t / warmup) : rate;
    control[3] = -expm1(t * log_beta1);
    control[4] = -expm1(t * log_beta2);
    control[5] = ema < warm ? ema : warm;
    control[6] = 0.0f;
    counts[0] += 1;
}

// AdamW (Loshchilov and Hutter, arXiv 1711.05101) and EMA. rest = 1 - beta, rounded once.
KERNEL(256, 1)
void adamw(GLOBAL float *w, GLOBAL float *m, GLOBAL float *v, GLOBAL float *ema,
           const GLOBAL float *g, const GLOBAL float *control, uint count_low, uint count_high,
           float beta1, float rest1, float beta2, float rest2, float eps, float decay)
{
    size_t i = get_global_id(0);
    size_t count = (size_t)count_high << 32 | count_low;
    if (i >= count || control[6] != 0.0f)
        return;
    float rate = control[2], gradient = g[i] * control[1];
    float m1 = fma(beta1, m[i], rest1 * gradient);
    float v1 = fma(beta2, v[i], rest2 * gradient * gradient);
    float divisor = sqrt(v1 / control[4]) + eps;
    float w1 = fma(-rate * decay, w[i], w[i]);
    w1 = fma(-rate / control[3], m1 / divisor, w1);
    m[i] = m1;
    v[i] = v1;
    w[i] = w1;
    if (ema)
        ema[i] = fma(1.0f - control[5], w1 - ema[i], ema[i]);
}

#ifdef CPU_FORMS
// ---- CPU forms ----------------------------------------------------------------------------------

#ifdef ACT_BF16
typedef ushort16 act16;
#else
typedef float16 act16;
#endif

// The rows [*from, to) of this work-item's chunk; returns `to`.
inline size_t chunk_rows(uint chunk, size_t rows, size_t *from)
{
    *from = get_global_id(0) * chunk;
    return *from + chunk < rows ? *from + chunk : rows;
}

KERNEL(1, 1)
void swiglu_fwd_cpu(GLOBAL act *h, const GLOBAL act *gu, uint R, uint F, uint chunk)
{
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *g = gu + r * 2 * F, *u = g + F;
        GLOBAL act *out = h + r * F;
        uint f = 0;
        for (; f + 16 <= F; f += 16) {
            float16 a = act_load16(g + f);
            act_store16(out + f, a * sigmoid16(a) * act_load16(u + f));
        }
        for (; f < F; f++) {
            float a = act_load(g, f);
            act_store(out, f, a * sigmoid(a) * act_load(u, f));
        }
    }
}

KERNEL(1, 1)
void swiglu_bwd_cpu(GLOBAL act *dgu, const GLOBAL act *dh, const GLOBAL act *gu, uint R, uint F,
                    uint chunk)
{
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *from = gu + r * 2 * F, *d = dh + r * F;
        GLOBAL act *out = dgu + r * 2 * F;
        uint f = 0;
        for (; f + 16 <= F; f += 16) {
            float16 g = act_load16(from + f), u = act_load16(from + F + f);
            float16 s = sigmoid16(g), ds = act_load16(d + f) * s;
            act_store16(out + f, ds * u * fma(g, 1.0f - s, (float16)1.0f));
            act_store16(out + F + f, ds * g);
        }
        for (; f < F; f++) {
            float g = act_load(from, f), u = act_load(from, F + f);
            float s = sigmoid(g), ds = act_load(d, f) * s;
            act_store(out, f, ds * u * fma(g, 1.0f - s, 1.0f));
            act_store(out, F + f, ds * g);
        }
    }
}

KERNEL(1, 1)
void dispatch_fwd_cpu(GLOBAL act *rows, const GLOBAL act *x, const GLOBAL int *token, uint R,
                      uint D, uint chunk)
{
    size_t r, to = chunk_rows(chunk, R, &r);
    for (; r < to; r++) {
        const GLOBAL act *in = x + (size_t)token[r] * D;
        GLOBAL act *out = rows + r * D;
        uint d = 0;
        for (; d + 16 <= D; d += 16)
            vstore16(vload16(0, in + d), 0, out + d);
        for (; d < D; d++)
            out[d] = in[d];
    }
}

KERNEL(1, 1)
void dispatch_bwd_cpu(GLOBAL act *dx, const GLOBAL act *drows, const GLOBAL int *slot, uint M,
                      uint K, uint D, uint chunk)
{
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL int *at = slot + m * K;
        GLOBAL act *out = dx + m * D;
        uint d = 0;
        for (; d + 16 <= D; d += 16) {
            float16 sum = act_load16(out + d);
            for (uint k = 0; k < K; k++)
                sum += act_load16(drows + (size_t)at[k] * D + d);
            act_store16(out + d, sum);
        }
        for (; d < D; d++) {
            float sum = act_load(out, d);
            for (uint k = 0; k < K; k++)
                sum += act_load(drows, (size_t)at[k] * D + d);
            act_store(out, d, sum);
        }
    }
}

KERNEL(1, 1)
void combine_fwd_cpu(GLOBAL act *out, const GLOBAL act *rows, const GLOBAL int *slot,
                     const GLOBAL float *weight, const GLOBAL act *shared, uint M, uint K, uint D,
                     uint chunk)
{
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL int *at = slot + m * K;
        const GLOBAL float *w = weight + m * K;
        uint d = 0;
        for (; d + 16 <= D; d += 16) {
            float16 sum = 0.0f;
            if (shared)
                sum = act_load16(shared + m * D + d);
            for (uint k = 0; k < K; k++)
                sum = fma((float16)w[k], act_load16(rows + (size_t)at[k] * D + d), sum);
            act_store16(out + m * D + d, sum);
        }
        for (; d < D; d++) {
            float sum = shared ? act_load(shared, m * D + d) : 0.0f;
            for (uint k = 0; k < K; k++)
                sum = fma(w[k], act_load(rows, (size_t)at[k] * D + d), sum);
            act_store(out, m * D + d, sum);
        }
    }
}

KERNEL(1, 1)
void combine_bwd_cpu(GLOBAL act *drows, GLOBAL float *dweight, const GLOBAL act *dout,
                     const GLOBAL act *rows, const GLOBAL int *slot, const GLOBAL float *weight,
                     uint R, uint K, uint D, uint chunk)
{
    size_t m, to = chunk_rows(chunk, R / K, &m);
    for (; m < to; m++) {
        const GLOBAL act *in = dout + m * D;
        for (size_t pair = m * K; pair < m * K + K; pair++) {
            const GLOBAL act *row = rows + (size_t)slot[pair] * D;
            GLOBAL act *out = drows + (size_t)slot[pair] * D;
            float w = weight[pair], tail = 0.0f;
            float16 sum = 0.0f;
            uint d = 0;
            for (; d + 16 <= D; d += 16) {
                float16 g = act_load16(in + d);
                sum = fma(g, act_load16(row + d), sum);
                act_store16(out + d, w * g);
            }
            for (; d < D; d++) {
                float g = act_load(in, d);
                tail = fma(g, act_load(row, d), tail);
                act_store(out, d, w * g);
            }
            dweight[pair] = sum16(sum) + tail;
        }
    }
}

// The first n of sixteen floats, the rest `fill`; and back.
inline float16 load_some(const GLOBAL float *p, uint n, float fill)
{
    float v[16];
    if (n >= 16)
        return vload16(0, p);
    for (uint i = 0; i < 16; i++)
        v[i] = i < n ? p[i] : fill;
    return vload16(0, v);
}

inline void store_some(GLOBAL float *p, uint n, float16 value)
{
    float v[16];
    if (n >= 16) {
        vstore16(value, 0, p);
        return;
    }
    vstore16(value, 0, v);
    for (uint i = 0; i < n; i++)
        p[i] = v[i];
}

KERNEL(1, 1)
void router_fwd_cpu(GLOBAL float *probs, GLOBAL float *weight, GLOBAL int *index,
                    const GLOBAL float *logits, uint M, uint E, uint K, int renormalise, uint chunk)
{
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL float *x = logits + m * E;
        GLOBAL float *p = probs + m * E;
        float most = -INFINITY;
        float16 sums = 0.0f;
        for (uint e = 0; e < E; e++)
            most = x[e] > most ? x[e] : most;
        for (uint e = 0; e < E; e += 16) {
            float16 q = exp(load_some(x + e, E - e, -INFINITY) - most);
            sums += q;
            store_some(p + e, E - e, q);
        }
        float sum = sum16(sums);
        for (uint e = 0; e < E; e++)
            p[e] = p[e] / sum;
        top_k(weight + m * K, index + m * K, p, E, K, renormalise);
    }
}

KERNEL(1, 1)
void router_bwd_cpu(GLOBAL float *dlogits, const GLOBAL float *dweight, const GLOBAL float *probs,
                    const GLOBAL int *index, const GLOBAL float *fraction, float balance, uint M,
                    uint E, uint K, uint rows, int renormalise, uint chunk)
{
    size_t m, to = chunk_rows(chunk, M, &m);
    for (; m < to; m++) {
        const GLOBAL float *p = probs + m * E, *dw = dweight + m * K;
        const GLOBAL float *f = fraction + m / rows * E;
        const GLOBAL int *chosen = index + m * K;
        GLOBAL float *out = dlogits + m * E;
        float mean, dot = 0.0f, s = choice_sum(dw, p, chosen, K, renormalise, &mean);
        if (balance != 0.0f)
            for (uint e = 0; e < E; e++)
                dot = fma(p[e] * balance, f[e], dot);
        for (uint k = 0; k < K; k++)
            dot = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), dot);
        if (balance != 0.0f)
            for (uint e = 0; e < E; e++)
                out[e] = p[e] * fma(balance, f[e], -dot);
        else
            for (uint e = 0; e < E; e++)
                out[e] = p[e] * -dot;
        for (uint k = 0; k < K; k++)
            out[chosen[k]] = fma(p[chosen[k]], choice_gradient(dw, k, s, mean), out[chosen[k]]);
    }
}

KERNEL(1, 1)
void route_count_cpu(GLOBAL int *count, const GLOBAL int *index, uint R, uint E, uint chunk)
{
    size_t i, to = chunk_rows(chunk, R, &i);
    GLOBAL int *mine = count + get_global_id(0) * E;
    for (uint e = 0; e < E; e++)
        mine[e] = 0;
    for (; i < to; i++)
        mine[index[i]]++;
}

KERNEL(1, 1)
void route_place_cpu(GLOBAL int *slot, GLOBAL int *token, const GLOBAL int *index,
                     const GLOBAL int *offsets, const GLOBAL int *count, uint R, uint K, uint E,
                     uint chunk)
{
    int next[512];
    size_t i, to = chunk_rows(chunk, R, &i);
    for (uint e = 0; e < E; e++)
        next[e] = offsets[e] + count[get_global_id(0) * E + e];
    size_t m = i / K;
    uint k = (uint)(i % K);
    for (; i < to; i++) {
        int at = next[index[i]]++;
        slot[i] = at;
        token[at] = (int)m;
        k++;
        if (k == K) {
            k = 0;
            m++;
        }
    }
}

KERNEL(1, 1)
void balance_sum_cpu(GLOBAL int *count, uint entries, const GLOBAL int *index,
                     const GLOBAL float *probs, uint rows, uint E, uint K, uint chunk)
{
    GLOBAL float *sum = (GLOBAL float *)count + entries;
    size_t out = (get_group_id(1) * get_num_groups(0) + get_group_id(0)) * E;
    size_t first = get_group_id(1) * (size_t)rows;
    size_t r, to = chunk_rows(chunk, rows, &r);
    GLOBAL int *n = count + out;
    GLOBAL float *s = sum + out;
    for (uint e = 0; e < E; e++) {
        n[e] = 0;
        s[e] = 0.0f;
    }
    for (; r < to; r++) {
        const GLOBAL float *p = probs + (first + r) * E;
        uint e = 0;
        for (uint k = 0; k < K; k++)
            n[index[(first + r) * K + k]]++;
        for (; e + 16 <= E; e += 16)
            vstore16(vload16(0, s + e) + vload16(0, p + e), 0, s + e);
        for (; e < E; e++)
            s[e] += p[e];
    }
}

KERNEL(1, 1)
void flow_mix_cpu(GLOBAL float *xt, const GLOBAL float *x, const GLOBAL float *noise,
                  const GLOBAL float *t, uint P, uint chunk)
{
    size_t n = get_group_id(1);
    size_t i, to = chunk_rows(chunk, P, &i);
    float a = t[n];
    for (; i + 16 <= to; i += 16)
        vstore16(
            fma((float16)a, vload16(0, noise + n * P + i), (1.0f - a) * vload16(0, x + n * P + i)),
            0, xt + n * P + i);
    for (; i < to; i++)
        xt[n * P + i] = fma(a, noise[n * P + i], (1.0f - a) * x[n * P + i]);
}

KERNEL(1, 1)
void flow_loss_cpu(GLOBAL float *loss, GLOBAL float *dout, const GLOBAL float *out,
                   const GLOBAL float *x, const GLOBAL float *noise, uint P, uint Q, float factor)
{
    size_t n = get_group_id(0), p = 0;
    const GLOBAL float *o = out + n * Q, *a = x + n * P, *b = noise + n * P;
    float16 sums = 0.0f;
    float sum = 0.0f;
    for (; p + 16 <= P; p += 16) {
        float16 d = vload16(0, o + p) - (vload16(0, b + p) - vload16(0, a + p));
        sums = fma(d, d, sums);
        if (dout)
            vstore16(factor * d, 0, dout + n * Q + p);
    }
    for (; p < P; p++) {
        float d = o[p] - (b[p] - a[p]);
        sum = fma(d, d, sum);
        if (dout)
            dout[n * Q + p] = factor * d;
    }
    for (; dout && p < Q; p++)
        dout[n * Q + p] = 0.0f;
    loss[n] = (sum16(sums) + sum) / (float)P;
}

// ---- random numbers, sixteen blocks of four at a time

inline float16 minus_two_log16(float16 u)
{
    uint16 shifted = as_uint16(u) - 0x3f3504f3u;
    int16 e = as_int16(shifted) >> 23;
    float16 f = as_float16((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float16 q = -0x1.383e66p-4f;
    q = fma(q, f, (float16)0x1.084e8ep-3f);
    q = fma(q, f, (float16)-0x1.0f3778p-3f);
    q = fma(q, f, (float16)0x1.227084p-3f);
    q = fma(q, f, (float16)-0x1.542744p-3f);
    q = fma(q, f, (float16)0x1.99a402p-3f);
    q = fma(q, f, (float16)-0x1.000428p-2f);
    q = fma(q, f, (float16)0x1.555550p-2f);
    q = fma(q, f, (float16)-0x1.fffff8p-2f);
    float16 log_m = fma(f * f, q, f);
    return -2.0f * fma(convert_float16(e), (float16)0x1.62e430p-1f, log_m);
}

inline float16 square_root16(float16 x)
{
    float16 y = as_float16(0x5f3759dfu - (as_uint16(x) >> 1));
    float16 h = 0.5f * x;
    y = y * fma(-(h * y), y, (float16)1.5f);
    y = y * fma(-(h * y), y, (float16)1.5f);
    y = y * fma(-(h * y), y, (float16)1.5f);
    float16 r = x * y;
    return fma(fma(-r, r, x), 0.5f * y, r);
}

inline void normal_pairs(float16 *first, float16 *second, uint16 w0, uint16 w1)
{
    float16 radius = square_root16(
        minus_two_log16(fma(convert_float16(w0), (float16)0x1p-32f, (float16)0x1p-33f)));
    uint16 quadrant = (w1 + 0x20000000u) >> 30;
    float16 a = convert_float16(as_int16(w1 - (quadrant << 30))) * 0x1.921fb6p-30f;
    float16 z = a * a;
    float16 s = fma((float16)-0x1.994e58p-13f, z, (float16)0x1.11076p-7f);
    float16 sine = fma(a * z, fma(s, z, (float16)-0x1.555546p-3f), a);
    float16 c = fma((float16)0x1.9a0206p-16f, z, (float16)-0x1.6c0c8ap-10f);
    float16 cosine =
        fma(z * z, fma(c, z, (float16)0x1.55554ap-5f), fma(z, (float16)-0.5f, (float16)1.0f));
    int16 odd = (quadrant & 1u) != 0u;
    uint16 sign_x = ((quadrant + 1u) & 2u) << 30, sign_y = (quadrant & 2u) << 30;
    float16 x = select(cosine, sine, odd), y = select(sine, cosine, odd);
    *first = radius * as_float16(as_uint16(x) ^ sign_x);
    *second = radius * as_float16(as_uint16(y) ^ sign_y);
}

// Numbers 4b..4b+63 into out[0..63], b the first block.
inline void normal_blocks(GLOBAL float *out, ulong b, uint seed_low, uint seed_high,
                          uint stream_low, uint stream_high)
{
    ulong16 block = b + (ulong16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint16 c0 = convert_uint16(block), c1 = convert_uint16(block >> 32);
    uint16 c2 = stream_low, c3 = stream_high;
    for (uint round = 0; round < 10; round++) {
        ulong16 x = convert_ulong16(c0) * 0xd2511f53ul, y = convert_ulong16(c2) * 0xcd9e8d57ul;
        c0 = convert_uint16(y >> 32) ^ c1 ^ (seed_low + round * 0x9e3779b9u);
        c1 = convert_uint16(y);
        c2 = convert_uint16(x >> 32) ^ c3 ^ (seed_high + round * 0xbb67ae85u);
        c3 = convert_uint16(x);
    }
    float16 p, q, r, s;
    normal_pairs(&p, &q, c0, c1);
    normal_pairs(&r, &s, c2, c3);
    float16 pr_low, pr_high, qs_low, qs_high; // interleave p,r and q,s, then these two
    pr_low.even = p.lo, pr_low.odd = r.lo, pr_high.even = p.hi, pr_high.odd = r.hi;
    qs_low.even = q.lo, qs_low.odd = s.lo, qs_high.even = q.hi, qs_high.odd = s.hi;
    float16 line;
    line.even = pr_low.lo, line.odd = qs_low.lo;
    vstore16(line, 0, out);
    line.even = pr_low.hi, line.odd = qs_low.hi;
    vstore16(line, 1, out);
    line.even = pr_high.lo, line.odd = qs_high.lo;
    vstore16(line, 2, out);
    line.even = pr_high.hi, line.odd = qs_high.hi;
    vstore16(line, 3, out);
}

// `chunk` is a number of values, a multiple of 64; what is left over after the last 64 goes through
// the scalar code.
KERNEL(1, 1)
void normal_cpu(GLOBAL float *out, uint count_low, uint count_high, uint seed_low, uint seed_high,
                uint stream_low, uint stream_high, uint chunk)
{
    size_t count = (size_t)count_high << 32 | count_low;
    size_t i, to = chunk_rows(chunk, count, &i);
    for (; i + 64 <= to; i += 64)
        normal_blocks(out + i, i / 4, seed_low, seed_high, stream_low, stream_high);
    for (; i < to; i += 4)
        normal_block(out, i, count, seed_low, seed_high, stream_low, stream_high);
}

// ---- optimiser

// `chunk` partials of 4096 values each
KERNEL(1, 1)
void norm2_partial_cpu(GLOBAL float *partial, const GLOBAL float *g, uint count_low,
                       uint count_high, uint chunk)
{
    size_t count = (size_t)count_high << 32 | count_low;
    size_t c, to = chunk_rows(chunk, (count + 4095) / 4096, &c);
    for (; c < to; c++) {
        size_t i = c * 4096, end = i + 4096 < count ? i + 4096 : count;
        float16 a = 0.0f, b = 0.0f;
        float tail = 0.0f;
        for (; i + 32 <= end; i += 32) {
            float16 x = vload16(0, g + i), y = vload16(0, g + i + 16);
            a = fma(x, x, a);
            b = fma(y, y, b);
        }
        for (; i < end; i++)
            tail = fma(g[i], g[i], tail);
        partial[c] = sum16(a + b) + tail;
    }
}

KERNEL(1, 1)
void adamw_cpu(GLOBAL float *w, GLOBAL float *m, GLOBAL float *v, GLOBAL float *ema,
               const GLOBAL float *g, const GLOBAL float *control, uint count_low, uint count_high,
               float beta1, float rest1, float beta2, float rest2, float eps, float decay,
               uint chunk)
{
    size_t count = (size_t)count_high << 32 | count_low;
    size_t i, to = chunk_rows(chunk, count, &i);
    float scale = control[1], rate = control[2], stride = -rate / control[3], bias2 = control[4];
    float shrink = -rate * decay, towards = 1.0f - control[5];
    if (control[6] != 0.0f)
        return;
    for (; i + 16 <= to; i += 16) {
        float16 gradient = vload16(0, g + i) * scale, w0 = vload16(0, w + i);
        float16 m1 = fma((float16)beta1, vload16(0, m + i), rest1 * gradient);
        float16 v1 = fma((float16)beta2, vload16(0, v + i), rest2 * gradient * gradient);
        float16 divisor = sqrt(v1 / bias2) + eps;
        float16 w1 = fma((float16)stride, m1 / divisor, fma((float16)shrink, w0, w0));
        vstore16(m1, 0, m + i);
        vstore16(v1, 0, v + i);
        vstore16(w1, 0, w + i);
        if (ema) {
            float16 e = vload16(0, ema + i);
            vstore16(fma((float16)towards, w1 - e, e), 0, ema + i);
        }
    }
    for (; i < to; i++) {
        float gradient = g[i] * scale;
        float m1 = fma(beta1, m[i], rest1 * gradient);
        float v1 = fma(beta2, v[i], rest2 * gradient * gradient);
        float w1 = fma(stride, m1 / (sqrt(v1 / bias2) + eps), fma(shrink, w[i], w[i]));
        m[i] = m1;
        v[i] = v1;
        w[i] = w1;
        if (ema)
            ema[i] = fma(towards, w1 - ema[i], ema[i]);
    }
}
#endif // CPU_FORMS
