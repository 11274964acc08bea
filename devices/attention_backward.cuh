// Backward attention. For one head, with P = exp(S - lse), S = scale Q K^T:
//     dV = P^T dO;  dP = dO V^T;  dS = P o (dP - delta), delta = rowsum(dO o O);
//     dQ = scale dS K;  dK = scale dS^T Q
// (Dao et al. 2022, arXiv 2205.14135, algorithm 4). P and dS are rounded to bf16 for their
// products; sums are f32. No atomics: every sum has one owner and one order.
//
// attention_backward_kv: a block owns keys of a head, a warp 16 or 32 of them, and passes over the
// queries 64 at a time: S^T and dP^T, with queries as columns, so that P^T and dS^T are operands as
// they stand. Where a block owns all keys of a head (`whole`) it computes dQ as well: dS^T of a
// tile crosses over to all warps in shared memory. A block goes from one head to the next and loads
// ahead of its use.
// attention_backward_q: a block owns queries and passes over the keys: delta, and dQ of longer
// sequences.
#ifndef DITMOE_ATTENTION_BACKWARD_CUH
#define DITMOE_ATTENTION_BACKWARD_CUH

#include "devices/attention_tile.cuh"

struct attention_backward_args {
    bf16 *dqkv;           // [images * tokens, 3 * heads * hd]
    float *delta;         // [images, heads, tokens]; not used by a whole pass
    const bf16 *dout, *o; // [images * tokens, heads * hd]
    const float *lse;     // [images, heads, tokens]
    const bf16 *qkv;      // as dqkv
    int images, heads, tokens, hd;
    float scale;
};

// width: head sizes up to it. m_tiles: of 16 keys, a warp. sub: queries at once (16 or 32). stages:
// of keys and values, 2 to load the next head's while this one's are in use.
template <int width, int m_tiles, int sub, int stages, bool whole> struct attention_backward_kv {
    using shape = tile_rows<width>;
    using cross = tile_rows<64>; // dS^T: keys by 64 queries
    static constexpr int warps = 8, threads = 32 * warps, keys = 16 * m_tiles * warps, queries = 64;
    static constexpr uint32_t key_tile = keys * shape::bytes, query_tile = queries * shape::bytes;
    static constexpr uint32_t keys_at = 0, queries_at = stages * 2 * key_tile,
                              cross_at = queries_at + 4 * query_tile,
                              sums_at = cross_at + (whole ? keys * cross::bytes : 0),
                              shared_bytes = sums_at + 4 * queries * sizeof(float);
    static constexpr int quarter =
        (shape::chunks + 3) / 4; // chunks of a row for each of four lanes

    // A head, or a block of its keys.
    struct unit {
        const attention_backward_args &p;
        int head, first_key;
        size_t row; // of the image's first token

        __device__ __forceinline__ unit(const attention_backward_args &p, int index) : p(p)
        {
            const int blocks = whole ? 1 : (p.tokens + keys - 1) / keys;
            head = index / blocks;
            first_key = index % blocks * keys;
            row = static_cast<size_t>(head / p.heads) * p.tokens;
        }
        // where row t of q, k or v (part 0, 1, 2), or of o, begins
        __device__ __forceinline__ size_t qkv(int part, int t) const
        {
            return (((row + t) * 3 + part) * p.heads + head % p.heads) * p.hd;
        }
        __device__ __forceinline__ size_t o(int t) const
        {
            return ((row + t) * p.heads + head % p.heads) * p.hd;
        }
        static __device__ __forceinline__ int count(const attention_backward_args &p)
        {
            return p.images * p.heads * (whole ? 1 : (p.tokens + keys - 1) / keys);
        }
    };

    // The part of delta of a row that a thread sums, on its way.
    struct row_part {
        uint4 o[whole ? quarter : 1];
        float lse, delta;
    };

    template <int rows>
    static __device__ __forceinline__ void load_keys(const unit &u, uint32_t stage, int from)
    {
        const int stride = 3 * u.p.heads * u.p.hd;
#pragma unroll
        for (int part = 1; part < 3; part++)
            load_tile<width, rows, threads>(stage + (part - 1) * key_tile + from * shape::bytes,
                                            u.p.qkv + u.qkv(part, 0), stride, u.first_key + from,
                                            u.p.tokens, u.p.hd);
    }

    // Four lanes copy a row: the one that will sum delta of it.
    static __device__ __forceinline__ void load_queries(const unit &u, uint32_t stage, int first)
    {
        const int r = threadIdx.x / 4, t = first + r;
#pragma unroll
        for (int i = 0; i < quarter; i++) {
            const int c = threadIdx.x % 4 + 4 * i;
            if (c >= shape::chunks)
                break;
            const bool valid = t < u.p.tokens && 8 * c < u.p.hd;
            const int from = valid ? t : 0, column = valid ? 8 * c : 0;
            const uint32_t to = stage + r * shape::bytes + 16 * c;
            copy_async(to, u.p.qkv + u.qkv(0, from) + column, valid);
            copy_async(to + query_tile, u.p.dout + u.o(from) + column, valid);
        }
    }

    static __device__ __forceinline__ void start_sums(const unit &u, row_part &part, int first)
    {
        const int t = first + threadIdx.x / 4;
        const size_t at = static_cast<size_t>(u.head) * u.p.tokens + t;
        part.lse = t < u.p.tokens ? u.p.lse[at] : INFINITY; // no weight for rows that are not there
        part.delta = !whole && t < u.p.tokens ? u.p.delta[at] : 0;
        if constexpr (whole)
#pragma unroll
            for (int i = 0; i < quarter; i++) {
                const int c = threadIdx.x % 4 + 4 * i;
                part.o[i] = make_uint4(0, 0, 0, 0);
                if (t < u.p.tokens && 8 * c < u.p.hd)
                    part.o[i] = *reinterpret_cast<const uint4 *>(u.p.o + u.o(t) + 8 * c);
            }
    }

    // The thread's own copies must have arrived. sums: lse (of powers of two) and delta of a stage.
    static __device__ __forceinline__ void finish_sums(const row_part &part, const char *dout,
                                                       float *sums)
    {
        const int r = threadIdx.x / 4;
        float delta = part.delta;
        if constexpr (whole) {
#pragma unroll
            for (int i = 0; i < quarter; i++) {
                const int c = threadIdx.x % 4 + 4 * i;
                if (c < shape::chunks)
                    delta +=
                        dot8(part.o[i],
                             *reinterpret_cast<const uint4 *>(dout + r * shape::bytes + 16 * c));
            }
            delta += __shfl_xor_sync(~0u, delta, 1);
            delta += __shfl_xor_sync(~0u, delta, 2);
        }
        if (threadIdx.x % 4 == 0) {
            sums[r] = part.lse * log2_e;
            sums[queries + r] = delta;
        }
    }

    using scores = accumulator<m_tiles, sub / 8>;

    // S becomes P. left: keys of the sequence from the warp's first on.
    static __device__ __forceinline__ void weights(scores &s, const float *lse, float scale,
                                                   int left)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < sub / 8; n++) {
            const float2 l = *reinterpret_cast<const float2 *>(lse + 8 * n + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < m_tiles; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    s[m][n][i] = exp2_fast(fmaf(s[m][n][i], scale, i % 2 ? -l.y : -l.x));
        }
        if (left < 16 * m_tiles)
#pragma unroll
            for (int m = 0; m < m_tiles; m++)
#pragma unroll
                for (int n = 0; n < sub / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (16 * m + i / 2 * 8 + lane / 4 >= left)
                            s[m][n][i] = 0;
    }

    // P becomes dS.
    static __device__ __forceinline__ void score_gradients(scores &s, const scores &dp,
                                                           const float *delta)
    {
#pragma unroll
        for (int n = 0; n < sub / 8; n++) {
            const float2 d = *reinterpret_cast<const float2 *>(delta + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
            for (int m = 0; m < m_tiles; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    s[m][n][i] *= dp[m][n][i] - (i % 2 ? d.y : d.x);
        }
    }

    // Where a warp stands: its keys' and values' rows, the tile of queries.
    struct place {
        uint32_t keys, queries, cross; // shared memory addresses; cross: of the warp's rows
        const float *sums;
        int left; // keys of the sequence from the warp's first on
    };

    using gradient = accumulator<m_tiles, width / 8>;

    static __device__ __forceinline__ void visit_queries(const place &at, float scale, gradient &dk,
                                                         gradient &dv, char *shared)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int first = 0; first < queries; first += sub) {
            const uint32_t q = at.queries + first * shape::bytes;
            scores s, dp;
            multiply_rows<width>(s, at.keys, q);
            weights(s, at.sums + first, scale * log2_e, at.left);
#pragma unroll
            for (int k = 0; k < sub / 16; k++) {
                uint32_t a[m_tiles][4];
                pack_step(a, s, k);
                multiply_transposed<width>(dv, a, q + query_tile + k * 16 * shape::bytes);
            }
            multiply_rows<width>(dp, at.keys + key_tile, q + query_tile);
            score_gradients(s, dp, at.sums + queries + first);
#pragma unroll
            for (int k = 0; k < sub / 16; k++) {
                uint32_t a[m_tiles][4];
                pack_step(a, s, k);
                if constexpr (whole)
#pragma unroll
                    for (int m = 0; m < m_tiles; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            *reinterpret_cast<uint32_t *>(
                                shared + at.cross + (16 * m + i % 2 * 8 + lane / 4) * cross::bytes +
                                (first + 16 * k + i / 2 * 8) * 2 + lane % 4 * 4) = a[m][i];
                multiply_transposed<width>(dk, a, q + k * 16 * shape::bytes);
            }
        }
    }

    // dQ of 16 queries and columns 8 first_n.. of a warp, over all keys.
    template <int first_n, int n_tiles>
    static __device__ __forceinline__ void query_gradients(const unit &u, uint32_t base,
                                                           uint32_t k_rows, int first)
    {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 64 * 16;
        const uint32_t ds = base + cross_at + row * 2 + cross::lane_b();
        accumulator<1, n_tiles> dq;
        clear(dq);
#pragma unroll 4
        for (int k = 0; k < u.p.tokens; k += 16) {
            uint32_t a[1][4];
            load_matrix_transposed(a[0], ds + k * cross::bytes);
            multiply_transposed<width>(dq, a, k_rows + k * shape::bytes + first_n * 16);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + row + 8 * half + lane / 4;
            bf16 *to = u.p.dqkv + u.qkv(0, t < u.p.tokens ? t : 0) + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < n_tiles; n++)
                if (t < u.p.tokens && 8 * (first_n + n) < u.p.hd)
                    *reinterpret_cast<uint32_t *>(to + 8 * (first_n + n)) =
                        pack(dq[0][n][2 * half] * u.p.scale, dq[0][n][2 * half + 1] * u.p.scale);
        }
    }

    // dK and dV leave through the warp's own rows of V, which nobody else reads.
    static __device__ __forceinline__ void finish(const unit &u, const gradient &dk,
                                                  const gradient &dv, char *rows, int own)
    {
        float one[m_tiles][2], scale[m_tiles][2];
#pragma unroll
        for (int m = 0; m < m_tiles; m++) {
            one[m][0] = one[m][1] = 1;
            scale[m][0] = scale[m][1] = u.p.scale;
        }
        const int stride = 3 * u.p.heads * u.p.hd, left = u.p.tokens - own;
        store_rows<width, m_tiles>(u.p.dqkv + u.qkv(2, own), stride, left, u.p.hd, rows, dv, one);
        store_rows<width, m_tiles>(u.p.dqkv + u.qkv(1, own), stride, left, u.p.hd, rows, dk, scale);
    }

    static __device__ __forceinline__ void run(const attention_backward_args &p)
    {
        extern __shared__ __align__(16) char shared[];
        const uint32_t base = shared_address(shared);
        const int units = unit::count(p), step = gridDim.x, own = threadIdx.x / 32 * 16 * m_tiles;
        float *sums = reinterpret_cast<float *>(shared + sums_at);
        row_part part;
        {
            const unit u(p, blockIdx.x);
            load_keys<keys>(u, base, 0);
            load_queries(u, base + queries_at, 0);
            copy_commit();
            start_sums(u, part, 0);
            copy_wait<0>();
            finish_sums(part, shared + queries_at + query_tile, sums);
        }
        int stage = 0, kv = 0; // of queries and of keys
        for (int index = blockIdx.x; index < units; index += step) {
            const unit u(p, index);
            gradient dk, dv;
            clear(dk);
            clear(dv);
            for (int first = 0; first < p.tokens; first += queries) {
                const bool last = first + queries >= p.tokens;
                const int next = last ? index + step : index,
                          next_first = last ? 0 : first + queries;
                const uint32_t next_tile = queries_at + (1 - stage) * 2 * query_tile;
                const unit after(p, next < units ? next : index);
                __syncthreads(); // this tile is here; nobody reads the one before, nor its dS
                if (next < units)
                    load_queries(after, base + next_tile, next_first);
                if (stages == 2 && first < keys && index + step < units)
                    load_keys<queries>(unit(p, index + step), base + (1 - kv) * 2 * key_tile,
                                       first);
                copy_commit();
                const uint32_t k_tile = kv * 2 * key_tile;
                const place at = {base + k_tile + own * shape::bytes,
                                  base + queries_at + stage * 2 * query_tile,
                                  cross_at + own * cross::bytes, sums + stage * 2 * queries,
                                  p.tokens - u.first_key - own};
                if (at.left > 0)
                    visit_queries(at, p.scale, dk, dv, shared);
                start_sums(after, part, next_first);
                if constexpr (whole) {
                    constexpr int half = (shape::chunks + 1) / 2;
                    __syncthreads(); // dS is here
                    if (threadIdx.x / 32 % 2 == 0)
                        query_gradients<0, half>(u, base, base + k_tile, first);
                    else
                        query_gradients<half, shape::chunks - half>(u, base, base + k_tile, first);
                }
                copy_wait<0>();
                finish_sums(part, shared + next_tile + query_tile,
                            sums + (1 - stage) * 2 * queries);
                stage = 1 - stage;
            }
            finish(u, dk, dv, shared + kv * 2 * key_tile + key_tile + own * shape::bytes,
                   u.first_key + own);
            if (stages == 2) {
                kv = 1 - kv;
            } else if (index + step < units) {
                __syncthreads(); // nobody reads these keys any more
                load_keys<keys>(unit(p, index + step), base, 0);
                copy_commit();
                copy_wait<0>();
            }
        }
    }
};

// keys: a tile of them; four warps of 16 or 32 queries.
template <int width, int m_tiles, int keys> struct attention_backward_q {
    using shape = tile_rows<width>;
    static constexpr int warps = 4, threads = 32 * warps, queries = 16 * m_tiles * warps;
    static constexpr uint32_t key_tile = keys * shape::bytes, query_tile = queries * shape::bytes;
    static constexpr uint32_t shared_bytes = 2 * query_tile + 4 * key_tile;

    struct state {
        tile_operand<width, m_tiles> q, dout;
        accumulator<m_tiles, width / 8> dq;
        float lse[m_tiles][2], delta[m_tiles][2];
    };

    // delta of the warp's rows, from dO in shared memory; rows past the last get no weight.
    static __device__ __forceinline__ void start(const attention_backward_args &p, state &w,
                                                 int head, int first, const char *dout)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = 16 * m + 8 * half + lane / 4, t = first + r;
                const size_t at = static_cast<size_t>(head) * p.tokens + t;
                const size_t row = static_cast<size_t>(head / p.heads) * p.tokens + t;
                const bf16 *o = p.o + (row * p.heads + head % p.heads) * p.hd;
                float sum = 0;
                for (int c = lane % 4; t < p.tokens && 8 * c < p.hd; c += 4)
                    sum += dot8(*reinterpret_cast<const uint4 *>(o + 8 * c),
                                *reinterpret_cast<const uint4 *>(dout + r * shape::bytes + 16 * c));
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                w.delta[m][half] = sum;
                w.lse[m][half] = t < p.tokens ? p.lse[at] * log2_e : INFINITY;
                if (t < p.tokens && lane % 4 == 0)
                    p.delta[at] = sum;
            }
        clear(w.dq);
    }

    static __device__ __forceinline__ void visit_keys(state &w, uint32_t stage, float scale,
                                                      int left)
    {
        const int column = threadIdx.x % 4 * 2;
        accumulator<m_tiles, keys / 8> s, dp;
        multiply_rows<width>(s, w.q, stage);
        multiply_rows<width>(dp, w.dout, stage + key_tile);
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int n = 0; n < keys / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = exp2_fast(fmaf(s[m][n][i], scale, -w.lse[m][i / 2]));
                    s[m][n][i] = p * (dp[m][n][i] - w.delta[m][i / 2]);
                    if (left < keys && 8 * n + column + i % 2 >= left)
                        s[m][n][i] = 0;
                }
#pragma unroll
        for (int k = 0; k < keys / 16; k++) {
            uint32_t a[m_tiles][4];
            pack_step(a, s, k);
            multiply_transposed<width>(w.dq, a, stage + k * 16 * shape::bytes);
        }
    }

    static __device__ __forceinline__ void load_keys(const attention_backward_args &p,
                                                     const bf16 *head, uint32_t stage, int first)
    {
        const int row = p.heads * p.hd;
        load_tile<width, keys, threads>(stage, head + row, 3 * row, first, p.tokens, p.hd);
        load_tile<width, keys, threads>(stage + key_tile, head + 2 * row, 3 * row, first, p.tokens,
                                        p.hd);
        copy_commit();
    }

    static __device__ __forceinline__ void run(const attention_backward_args &p)
    {
        extern __shared__ __align__(16) char shared[];
        const int q_tiles = (p.tokens + queries - 1) / queries, row = p.heads * p.hd;
        const int head = blockIdx.x / q_tiles, first = blockIdx.x % q_tiles * queries;
        const int k_tiles = (p.tokens + keys - 1) / keys, own = threadIdx.x / 32 * 16 * m_tiles;
        const size_t image = static_cast<size_t>(head / p.heads) * p.tokens * row;
        const int column = head % p.heads * p.hd;
        const bf16 *from = p.qkv + 3 * image + column;
        const uint32_t q = shared_address(shared), stages = q + 2 * query_tile;
        load_tile<width, queries, threads>(q, from, 3 * row, first, p.tokens, p.hd);
        load_tile<width, queries, threads>(q + query_tile, p.dout + image + column, row, first,
                                           p.tokens, p.hd);
        load_keys(p, from, stages, 0);
        state w;
        for (int j = 0; j < k_tiles; j++) {
            copy_wait<0>();
            __syncthreads(); // tile j is here, and nobody reads tile j - 1 any more
            if (j + 1 < k_tiles)
                load_keys(p, from, stages + (~j & 1) * 2 * key_tile, (j + 1) * keys);
            if (j == 0) {
                w.q.load(q + own * shape::bytes);
                w.dout.load(q + query_tile + own * shape::bytes);
                start(p, w, head, first + own, shared + query_tile + own * shape::bytes);
            }
            visit_keys(w, stages + (j & 1) * 2 * key_tile, p.scale * log2_e, p.tokens - j * keys);
        }
        float scale[m_tiles][2];
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
            scale[m][0] = scale[m][1] = p.scale;
        store_rows<width, m_tiles>(
            p.dqkv + 3 * image + static_cast<size_t>(first + own) * 3 * row + column, 3 * row,
            p.tokens - first - own, p.hd, shared + own * shape::bytes, w.dq, scale);
    }
};

#endif
