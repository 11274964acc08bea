// Backward attention of up to 256 tokens for Hopper, as attention_backward_kv does where a block
// holds a whole head: products by wgmma on Q, K, V and dO as they lie in shared memory, P^T and
// dS^T in registers.
#ifndef DITMOE_ATTENTION_BACKWARD_SM90_CUH
#define DITMOE_ATTENTION_BACKWARD_SM90_CUH

#include "devices/attention_backward.cuh"
#include "devices/attention_wgmma.cuh"

// width: 64 or 72. sub: queries at once. Two warpgroups, each of 128 keys in blocks of 64.
template <int width, int sub> struct attention_backward_sm90 {
    using plain = attention_backward_kv<width, 2, 16, 2, true>; // for its units and sums
    using unit = typename plain::unit;
    using row_part = typename plain::row_part;
    static constexpr int threads = 256, keys = 256, queries = 64, columns = width / 8;
    using key_tile = swizzled_tile<width, keys>;
    using query_tile = swizzled_tile<width, queries>;
    using cross_tile = swizzled_tile<64, keys>; // dS^T: keys by 64 queries
    static constexpr uint32_t queries_at = 4 * key_tile::bytes,
                              cross_at = queries_at + 4 * query_tile::bytes,
                              nothing_at = cross_at + cross_tile::bytes,
                              sums_at = nothing_at + 1024,
                              shared_bytes =
                                  sums_at + 4 * queries * sizeof(float) + 1024; // what aligns it
    static_assert(key_tile::rest <= 1, "the products below");

    template <int part>
    static __device__ __forceinline__ void load_keys(const unit &u, uint32_t stage, int from)
    {
        const int stride = 3 * u.p.heads * u.p.hd;
#pragma unroll
        for (int i = 1; i < 3; i++)
            key_tile::template load<threads, part>(stage + (i - 1) * key_tile::bytes,
                                                   u.p.qkv + u.qkv(i, 0), stride, from, u.p.tokens,
                                                   u.p.hd, from);
    }

    // Four lanes copy a row: those that will sum delta of it.
    static __device__ __forceinline__ void load_queries(const unit &u, uint32_t stage, int first)
    {
        const int r = threadIdx.x / 4, t = first + r;
#pragma unroll
        for (int i = 0; i < plain::quarter; i++) {
            const int c = threadIdx.x % 4 + 4 * i;
            if (c >= columns)
                break;
            const bool valid = t < u.p.tokens && 8 * c < u.p.hd;
            const int from = valid ? t : 0, column = valid ? 8 * c : 0;
            const uint32_t to = stage + query_tile::chunk(r, c);
            copy_async(to, u.p.qkv + u.qkv(0, from) + column, valid);
            copy_async(to + query_tile::bytes, u.p.dout + u.o(from) + column, valid);
        }
    }

    static __device__ __forceinline__ void finish_sums(const row_part &part, const char *dout,
                                                       float *sums)
    {
        const int r = threadIdx.x / 4;
        float delta = 0;
#pragma unroll
        for (int i = 0; i < plain::quarter; i++) {
            const int c = threadIdx.x % 4 + 4 * i;
            if (c < columns)
                delta += dot8(part.o[i],
                              *reinterpret_cast<const uint4 *>(dout + query_tile::chunk(r, c)));
        }
        delta += __shfl_xor_sync(~0u, delta, 1);
        delta += __shfl_xor_sync(~0u, delta, 2);
        if (threadIdx.x % 4 == 0) {
            sums[r] = part.lse * log2_e;
            sums[queries + r] = delta;
        }
    }

    using scores = accumulator<1, sub / 8>;

    // P^T (packed) and dS^T (in place) of 64 keys by queries, from S^T and dP^T. sums: of the
    // queries. left: keys of the sequence from the first of these.
    static __device__ __forceinline__ void gradients(scores &s, const scores &dp,
                                                     uint32_t (&p)[sub / 16][1][4],
                                                     const float *sums, float scale, int left)
    {
        const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
        for (int n = 0; n < sub / 8; n++) {
            const float2 l = *reinterpret_cast<const float2 *>(sums + 8 * n + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[0][n][i] = exp2_fast(fmaf(s[0][n][i], scale, i % 2 ? -l.y : -l.x));
        }
        if (left < 64)
#pragma unroll
            for (int n = 0; n < sub / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (row + i / 2 * 8 >= left)
                        s[0][n][i] = 0;
#pragma unroll
        for (int k = 0; k < sub / 16; k++)
            pack_step(p[k], s, k);
#pragma unroll
        for (int n = 0; n < sub / 8; n++) {
            const float2 d =
                *reinterpret_cast<const float2 *>(sums + queries + 8 * n + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[0][n][i] *= dp[0][n][i] - (i % 2 ? d.y : d.x);
        }
    }

    struct gradient {
        float k[2][columns][4], v[2][columns][4]; // of the warpgroup's blocks of 64 keys
    };

    // Where a block of keys meets queries: shared memory addresses of the tiles, the rows they
    // begin at.
    struct place {
        uint32_t k_tile, q_tile;
        int key, first;
    };

    // Starts S^T and dP^T.
    static __device__ __forceinline__ void start_scores(scores &s, scores &dp, const place &at,
                                                        uint32_t nothing)
    {
        products_begin();
        multiply_rows<key_tile, query_tile>(s[0], at.k_tile, at.key, at.q_tile, at.first, nothing);
        multiply_rows<key_tile, query_tile>(dp[0], at.k_tile + key_tile::bytes, at.key,
                                            at.q_tile + query_tile::bytes, at.first, nothing);
        products_end();
    }

    // Waits for them, leaves dS^T in shared memory and starts dV += P^T dO, dK += dS^T Q.
    static __device__ __forceinline__ void visit_queries(float (&dk)[columns][4],
                                                         float (&dv)[columns][4], scores &s,
                                                         scores &dp, const place &at, char *cross,
                                                         const float *sums, float scale, int left)
    {
        const int lane = threadIdx.x % 32, row = at.key + threadIdx.x % 128 / 32 * 16 + lane / 4;
        products_wait(s[0], dp[0], dk, dv);
        uint32_t p[sub / 16][1][4], ds[sub / 16][1][4];
        gradients(s, dp, p, sums + at.first, scale, left);
#pragma unroll
        for (int k = 0; k < sub / 16; k++) {
            pack_step(ds[k], s, k);
#pragma unroll
            for (int i = 0; i < 4; i++)
                *reinterpret_cast<uint32_t *>(
                    cross + cross_tile::chunk(row + i % 2 * 8, at.first / 8 + 2 * k + i / 2) +
                    lane % 4 * 4) = ds[k][0][i];
        }
        products_begin();
        multiply_rows_across<query_tile>(dv, p, at.q_tile + query_tile::bytes, at.first);
        multiply_rows_across<query_tile>(dk, ds, at.q_tile, at.first);
        products_end();
    }

    // All of a tile but dQ; `load` asks for what comes next, while the first products run.
    template <class loads>
    static __device__ __forceinline__ void visit_tile(const unit &u, gradient &g, char *shared,
                                                      uint32_t k_tile, uint32_t q_tile,
                                                      const float *sums, const loads &load)
    {
        const uint32_t nothing = shared_address(shared) + nothing_at;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int first = 0; first < queries; first += sub) {
                const place at = {k_tile, q_tile,
                                  static_cast<int>(threadIdx.x) / 128 * 128 + b * 64, first};
                scores s, dp;
                start_scores(s, dp, at, nothing);
                if (b == 0 && first == 0)
                    load();
                visit_queries(g.k[b], g.v[b], s, dp, at, shared + cross_at, sums,
                              u.p.scale * log2_e, u.p.tokens - at.key);
            }
    }

    // dQ of a tile of queries, over all keys; a warpgroup has 32 columns, and both those past 64.
    static __device__ __forceinline__ void query_gradients(const unit &u, uint32_t base,
                                                           uint32_t k_tile, int first, gradient &g)
    {
        const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
        float dq[4][4], rest[1][4];
#pragma unroll
        for (int k = 0; k < keys; k += 16) { // keys that are not there have a dS of zero
            if (k == 0)
                products_begin();
            const uint64_t ds = cross_tile::across(base + cross_at, k);
            multiply_across_32(dq, ds, key_tile::across(k_tile, k, 32 * group), k > 0);
            if constexpr (key_tile::rest == 1)
                multiply_across_8(rest, ds, key_tile::across_rest(k_tile, k), k > 0);
        }
        products_end();
        if constexpr (key_tile::rest == 1)
            products_wait(dq, rest, g.k[0], g.k[1], g.v[0], g.v[1]);
        else
            products_wait(dq, g.k[0], g.k[1], g.v[0], g.v[1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + threadIdx.x % 128 / 32 * 16 + 8 * half + lane / 4;
            bf16 *to = u.p.dqkv + u.qkv(0, t < u.p.tokens ? t : 0) + lane % 4 * 2;
            const float scale = u.p.scale;
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (t < u.p.tokens && 32 * group + 8 * n < u.p.hd)
                    *reinterpret_cast<uint32_t *>(to + 32 * group + 8 * n) =
                        pack(dq[n][2 * half] * scale, dq[n][2 * half + 1] * scale);
            if constexpr (key_tile::rest == 1)
                if (t < u.p.tokens && group == 0 && 64 < u.p.hd)
                    *reinterpret_cast<uint32_t *>(to + 64) =
                        pack(rest[0][2 * half] * scale, rest[0][2 * half + 1] * scale);
        }
    }

    // dK and dV leave through the warp's own rows of V, which no product reads any more.
    static __device__ __forceinline__ void finish(const unit &u, const gradient &g, char *v)
    {
        const float one[2] = {1, 1}, scale[2] = {u.p.scale, u.p.scale};
        const int stride = 3 * u.p.heads * u.p.hd;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const int row = threadIdx.x / 128 * 128 + b * 64 + threadIdx.x % 128 / 32 * 16;
            const int left = u.p.tokens - row;
            store_swizzled<key_tile>(u.p.dqkv + u.qkv(2, row), stride, left, u.p.hd, v, row, g.v[b],
                                     one);
            store_swizzled<key_tile>(u.p.dqkv + u.qkv(1, row), stride, left, u.p.hd, v, row, g.k[b],
                                     scale);
        }
    }

    static __device__ __forceinline__ void visit_tile(const unit &u, gradient &g, uint32_t base,
                                                      char *shared, uint32_t k_tile,
                                                      uint32_t q_tile, const float *sums)
    {
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const int key = threadIdx.x / 128 * 128 + b * 64;
#pragma unroll
            for (int first = 0; first < queries; first += sub)
                visit_queries(g.k[b], g.v[b], base, shared, k_tile, q_tile, first, sums, key,
                              u.p.scale * log2_e, u.p.tokens - key);
        }
    }

    static __device__ __forceinline__ void run(const attention_backward_args &p)
    {
        extern __shared__ char memory[];
        char *shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
        const uint32_t base = shared_address(shared);
        const int units = p.images * p.heads, step = gridDim.x;
        float *sums = reinterpret_cast<float *>(shared + sums_at);
        clear_nothing(shared + nothing_at);
        row_part part;
        {
            const unit u(p, blockIdx.x);
            load_keys<keys>(u, base, 0);
            load_queries(u, base + queries_at, 0);
            copy_commit();
            plain::start_sums(u, part, 0);
            copy_wait<0>();
            finish_sums(part, shared + queries_at + query_tile::bytes, sums);
        }
        int stage = 0, kv = 0; // of queries and of keys
        for (int index = blockIdx.x; index < units; index += step) {
            const unit u(p, index);
            gradient g;
            clear(g.k);
            clear(g.v);
            const uint32_t k_tile = base + kv * 2 * key_tile::bytes;
            for (int first = 0; first < p.tokens; first += queries) {
                const bool last = first + queries >= p.tokens;
                const int next = last ? index + step : index,
                          next_first = last ? 0 : first + queries;
                const uint32_t next_tile = queries_at + (1 - stage) * 2 * query_tile::bytes;
                const unit after(p, next < units ? next : index);
                show_to_products();
                __syncthreads(); // this tile is here; nobody reads the one before, nor its dS
                const auto load = [&] {
                    if (next < units)
                        load_queries(after, base + next_tile, next_first);
                    if (index + step < units)
                        for (int from = first; from < (last ? keys : first + 1); from += queries)
                            load_keys<queries>(unit(p, index + step),
                                               base + (1 - kv) * 2 * key_tile::bytes, from);
                    copy_commit();
                };
                visit_tile(u, g, shared, k_tile, base + queries_at + stage * 2 * query_tile::bytes,
                           sums + stage * 2 * queries, load);
                plain::start_sums(after, part, next_first);
                show_to_products();
                __syncthreads(); // dS is here
                query_gradients(u, base, k_tile, first, g);
                copy_wait<0>();
                finish_sums(part, shared + next_tile + query_tile::bytes,
                            sums + (1 - stage) * 2 * queries);
                stage = 1 - stage;
            }
            finish(u, g, shared + (2 * kv + 1) * key_tile::bytes);
            kv = 1 - kv;
        }
    }
};

#endif
