// Forward attention as attention_forward.cuh has it, for Hopper: products by wgmma, with Q, K and V
// as they lie in shared memory and P in registers; tiles come by the copy engine (TMA), asked for
// by one thread, and no barrier of the whole block is met after the start.
#ifndef DITMOE_ATTENTION_FORWARD_SM90_CUH
#define DITMOE_ATTENTION_FORWARD_SM90_CUH

#include "devices/attention_forward.cuh"
#include "devices/attention_wgmma.cuh"
#include "devices/gemm_sm90.cuh"

// qkv as an array [image][token][q, k or v, and head][column of a head], and boxes of 64 rows: of
// the first 64 columns, swizzled, and of the 8 from a later one.
struct attention_maps {
    sm90::tensor_map first, later;
};

// groups: warpgroups, of 64 queries each. keys: 64 a tile, `stages` tiles in shared memory.
template <int width, int groups, int stages, bool norm> struct attention_forward_sm90 {
    static constexpr int threads = 128 * groups, queries = 64 * groups, keys = 64;
    using q_tile = swizzled_tile<width, queries>;
    using k_tile = swizzled_tile<width, keys>;
    static constexpr int ahead_by = stages - 2; // products of the tile before may be under way
    static constexpr uint32_t stage_bytes = 2 * k_tile::bytes;
    static constexpr uint32_t nothing_at = 2 * q_tile::bytes + stages * stage_bytes;
    // Barriers of 8 bytes: a stage of keys is here, is free again; and so of queries.
    static constexpr uint32_t here_at = nothing_at + 1024, free_at = here_at + 8 * (stages + 2);
    static constexpr uint32_t loader_at = free_at + 8 * (stages + 2);
    // norm_weights, 1 / std of two tiles of keys for each warpgroup, and what scores of queries
    // lack
    static constexpr uint32_t norm_at = loader_at + 48,
                              norm_bytes = norm ? (3 * width + 4 + 2 * keys * groups + queries) *
                                                      sizeof(float)
                                                : 0;
    static constexpr uint32_t shared_bytes = norm_at + norm_bytes + 1024; // what aligns it
    using softmax = attention_softmax<width, 1, keys>;
    using unit = attention_unit<queries>;

    // Starts copying a tile of `rows` rows from row `first` of q, k or v of a head, `part`.
    template <class tile, int rows>
    static __device__ __forceinline__ void load(uint32_t to, const attention_maps &maps,
                                                uint32_t here, int part, int first, int image)
    {
        for (int r = 0; r < rows; r += 64) {
            sm90::load_box(to + tile::chunk(r, 0), &maps.first, here, 0, part, first + r, image);
            for (int c = 8; c < width / 8; c++)
                sm90::load_box(to + tile::chunk(r, c), &maps.later, here, 8 * c, part, first + r,
                               image);
        }
    }

    // Asks for tiles, ahead of those in use and into the next unit where that is: what one thread
    // knows of it, in shared memory, since registers are short.
    struct loader {
        int index, part, image, first, stage; // of the next keys: unit, its head's k, their tile
        int q_index, side;                    // of the next queries
        uint32_t turn, q_turn;                // parities: how often the two rings were filled

        __device__ __forceinline__ void find(const attention_forward_args &p, int unit_index)
        {
            const unit u(p, unit_index);
            index = unit_index;
            part = p.heads + u.head % p.heads;
            image = u.head / p.heads;
            first = 0;
        }

        __device__ __forceinline__ void start(const attention_forward_args &p)
        {
            find(p, blockIdx.x);
            q_index = blockIdx.x;
            stage = side = 0;
            turn = q_turn = 0;
        }

        // base: of the block's shared memory
        __device__ __forceinline__ void load_keys(const attention_forward_args &p,
                                                  const attention_maps &maps, uint32_t base)
        {
            if (index >= p.units)
                return;
            const uint32_t to = base + 2 * q_tile::bytes + stage * stage_bytes;
            const uint32_t here = base + here_at + 8 * stage;
            sm90::barrier_wait(base + free_at + 8 * stage, turn ^ 1);
            sm90::barrier_expect(here, stage_bytes);
            load<k_tile, keys>(to, maps, here, part, first, image);
            load<k_tile, keys>(to + k_tile::bytes, maps, here, part + p.heads, first, image);
            stage = stage + 1 == stages ? 0 : stage + 1;
            turn ^= stage == 0;
            first += keys;
            if (first >= p.tokens)
                find(p, index + gridDim.x);
        }

        __device__ __forceinline__ void load_queries(const attention_forward_args &p,
                                                     const attention_maps &maps, uint32_t base)
        {
            if (q_index >= p.units)
                return;
            const unit u(p, q_index);
            const uint32_t here = base + here_at + 8 * (stages + side);
            sm90::barrier_wait(base + free_at + 8 * (stages + side), q_turn ^ 1);
            sm90::barrier_expect(here, q_tile::bytes);
            load<q_tile, queries>(base + side * q_tile::bytes, maps, here, u.head % p.heads,
                                  u.first, u.head / p.heads);
            q_index += gridDim.x;
            side = 1 - side;
            q_turn ^= side == 0;
        }
    };

    // This warp does not read any more what the barrier guards.
    static __device__ __forceinline__ void release(uint32_t barrier)
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            sm90::barrier_arrive(barrier);
    }

    // LayerNorm of q and k (eps 1e-6) within: with q' = (q - mean) / std o wq + bq and k' so,
    //     q' . k' = (1 / std of k) c . k + q' . bk,   c = q' o wk less its mean over the head
    // (sum of c is 0, so that k's mean does not matter). c takes the place of q in shared memory;
    // q' . bk is the same for all of a row's scores, so that only lse wants to know of it.
    // Variances are E[x^2] - E[x]^2, in f32 of bf16.
    struct norm_weights {                 // zeros past the head's columns
        float u[width];                   // wq o wk
        float v[width];                   // bq o wk
        float l[width];                   // wq o bk
        float sum_u, sum_v, sum_l, sum_b; // b = bq o bk
    };

    // By the block's first warp.
    static __device__ __forceinline__ void prepare_norm(const attention_forward_args &p,
                                                        norm_weights &w)
    {
        float u = 0, v = 0, l = 0, b = 0;
        if (threadIdx.x >= 32)
            return;
        for (int i = threadIdx.x; i < width; i += 32) {
            const bool valid = i < p.hd;
            u += w.u[i] = valid ? p.wq[i] * p.wk[i] : 0;
            v += w.v[i] = valid ? p.bq[i] * p.wk[i] : 0;
            l += w.l[i] = valid ? p.wq[i] * p.bk[i] : 0;
            b += valid ? p.bq[i] * p.bk[i] : 0;
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) {
            u += __shfl_xor_sync(~0u, u, i);
            v += __shfl_xor_sync(~0u, v, i);
            l += __shfl_xor_sync(~0u, l, i);
            b += __shfl_xor_sync(~0u, b, i);
        }
        if (threadIdx.x == 0)
            w.sum_u = u, w.sum_v = v, w.sum_l = l, w.sum_b = b;
    }

    static __device__ __forceinline__ float inverse_std(float mean, float mean_square)
    {
        return rsqrtf(fmaxf(mean_square - mean * mean, 0) + 1e-6f);
    }

    // Rows of the thread's warpgroup, two threads a row, every second chunk each. lacks: q' . bk of
    // the tile's rows, unless nullptr.
    static __device__ __forceinline__ void norm_queries(char *q, const norm_weights &w,
                                                        float *lacks, int hd)
    {
        const float share = __fdividef(1, hd);
        constexpr int chunks = width / 8, half = (chunks + 1) / 2;
        const int row = threadIdx.x / 2, side = threadIdx.x % 2;
        uint4 x[half];
        float sum = 0, squares = 0, along = 0, lack = 0;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const int c = 2 * i + side;
            if (c >= chunks)
                continue;
            x[i] = *reinterpret_cast<const uint4 *>(q + q_tile::chunk(row, c));
            const eight u(w.u + 8 * c);
            each_of_8(x[i], [&](int j, float value) {
                sum += value;
                squares = fmaf(value, value, squares);
                along = fmaf(value, u.v[j], along);
            });
            if (lacks) {
                const eight l(w.l + 8 * c);
                each_of_8(x[i], [&](int j, float value) { lack = fmaf(value, l.v[j], lack); });
            }
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        squares += __shfl_xor_sync(~0u, squares, 1);
        along += __shfl_xor_sync(~0u, along, 1);
        lack += __shfl_xor_sync(~0u, lack, 1);
        const float mean = sum * share, inverse = inverse_std(mean, squares * share);
        const float center = fmaf(along - mean * w.sum_u, inverse, w.sum_v) * share;
        if (lacks && side == 0)
            lacks[row] = fmaf(lack - mean * w.sum_l, inverse, w.sum_b);
#pragma unroll
        for (int i = 0; i < half; i++) {
            const int c = 2 * i + side;
            if (c >= chunks)
                continue;
            const eight u(w.u + 8 * c), v(w.v + 8 * c);
            float y[8];
            each_of_8(x[i], [&](int j, float value) {
                y[j] = fmaf(fmaf(value, inverse, -mean * inverse), u.v[j], v.v[j] - center);
            });
            *reinterpret_cast<uint4 *>(q + q_tile::chunk(row, c)) =
                make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
        }
    }

    // 1 / std of a tile's keys for the thread's warpgroup, 8 a warp at a time: their product with
    // themselves has their squares in its diagonal, and with ones below them on its left side
    // their sums in its lower half.
    static __device__ __forceinline__ void key_norms(uint32_t k, float *inverse, int hd)
    {
        const float share = __fdividef(1, hd);
        constexpr int chunks = width / 8;
        constexpr uint32_t ones = 0x3f803f80;
        const int lane = threadIdx.x % 32, side = lane / 8 % 2, key = lane / 4;
#pragma unroll
        for (int i = 0; i < keys / 32; i++) {
            const int first = (4 * i + threadIdx.x / 32 % 4) * 8;
            float c[4] = {};
#pragma unroll
            for (int j = 0; j < chunks; j += 2) {
                const bool both = j + 1 < chunks;
                uint32_t x[2];
                load_matrix(x, k + k_tile::chunk(first + lane % 8, both ? j ^ side : j));
                if (both)
                    multiply(c, {x[0], ones, x[1], ones}, x[0], x[1]);
                else
                    multiply(c, {x[0], ones}, x[0]);
            }
            const bool odd = key % 2;
            if (lane % 4 == key / 2)
                inverse[first + key] =
                    inverse_std((odd ? c[3] : c[2]) * share, (odd ? c[1] : c[0]) * share);
        }
    }

    // Starts s = Q K^T of a tile.
    static __device__ __forceinline__ void start_scores(accumulator<1, keys / 8> &s, uint32_t q,
                                                        uint32_t k, uint32_t nothing)
    {
        products_begin();
        multiply_rows<q_tile, k_tile>(s[0], q, threadIdx.x / 128 * 64, k, 0, nothing);
        products_end();
    }

    // Waits for it and the tile before, whose stage is `before` (0: none), then starts o += P V.
    static __device__ __forceinline__ void visit_keys(softmax &rows, accumulator<1, keys / 8> &s,
                                                      uint32_t v, int left, float scale,
                                                      const float *inverse, uint32_t before)
    {
        products_wait(s[0], rows.o[0]);
        if (before)
            release(before);
        if constexpr (norm)
#pragma unroll
            for (int n = 0; n < keys / 8; n++) {
                const float2 by =
                    *reinterpret_cast<const float2 *>(inverse + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    s[0][n][i] *= i % 2 ? by.y : by.x;
            }
        if (left < keys)
            rows.mask(s, left);
        rows.add(s, scale);
        uint32_t a[4][1][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            pack_step(a[i], s, i);
        products_begin();
        multiply_rows_across<k_tile>(rows.o[0], a, v, 0);
        products_end();
    }

    // O leaves through the warp's rows of the Q tile. first: the warp's first query.
    static __device__ __forceinline__ void finish(const attention_forward_args &p, softmax &rows,
                                                  char *q, int row, int head, int first,
                                                  const float *lacks)
    {
        const int stride = p.heads * p.hd;
        float inverse[1][2];
        products_wait(rows.o[0]);
        rows.finish(inverse, p.lse ? p.lse + static_cast<size_t>(head) * p.tokens : nullptr, first,
                    p.tokens, p.scale, norm ? lacks : nullptr);
        group_sync(); // the warpgroup's products have read Q
        bf16 *to = p.o + (static_cast<size_t>(head / p.heads) * p.tokens + first) * stride +
                   head % p.heads * p.hd;
        store_swizzled<q_tile>(to, stride, p.tokens - first, p.hd, q, row, rows.o[0], inverse[0]);
        show_to_products(); // the next queries come here by the copy engine
    }

    static __device__ __forceinline__ void run(const attention_forward_args &p,
                                               const attention_maps &maps)
    {
        extern __shared__ char shared[];
        char *q = shared + (1024 - shared_address(shared) % 1024) % 1024;
        const uint32_t base = shared_address(q), ring = base + 2 * q_tile::bytes;
        const uint32_t here = base + here_at, free = base + free_at;
        norm_weights &w = *reinterpret_cast<norm_weights *>(q + norm_at);
        const int group = threadIdx.x / 128, own = threadIdx.x / 32 * 16;
        float *inverse = reinterpret_cast<float *>(&w + 1), *lacks = inverse + 2 * keys * groups;
        inverse += 2 * keys * group;
        clear_nothing(q + nothing_at);
        show_to_products();
        if constexpr (norm)
            prepare_norm(p, w);
        if (threadIdx.x == 0) {
            for (int i = 0; i < stages + 2; i++) {
                sm90::barrier_init(here + 8 * i, 1);
                sm90::barrier_init(free + 8 * i, threads / 32);
            }
            sm90::barrier_fence();
            sm90::prefetch_map(&maps.first);
        }
        __syncthreads();
        loader &ahead = *reinterpret_cast<loader *>(q + loader_at);
        if (threadIdx.x == 0) {
            ahead.start(p);
            ahead.load_queries(p, maps, base);
            for (int i = 0; i < ahead_by; i++)
                ahead.load_keys(p, maps, base);
        }
        int stage = 0, side = 0; // in use: of keys, of queries
        uint32_t turn = 0, q_turn = 0;
        for (int index = blockIdx.x; index < p.units; index += gridDim.x) {
            const uint32_t in_use = base + side * q_tile::bytes;
            sm90::barrier_wait(here + 8 * (stages + side), q_turn);
            if constexpr (norm) {
                norm_queries(q + side * q_tile::bytes, w, p.lse ? lacks : nullptr, p.hd);
                show_to_products();
                group_sync();
            }
            softmax rows;
            rows.start();
            hold(rows.o[0]);
            uint32_t before = 0;
            for (int first = 0; first < p.tokens; first += keys) {
                const uint32_t k = ring + stage * stage_bytes;
                sm90::barrier_wait(here + 8 * stage, turn);
                accumulator<1, keys / 8> s;
                start_scores(s, in_use, k, base + nothing_at);
                if (threadIdx.x == 0) {
                    if (first == keys || p.tokens <= keys) // the other queries are not in use now
                        ahead.load_queries(p, maps, base);
                    ahead.load_keys(p, maps, base);
                }
                // by turns: a slower warp may still read the others
                float *norms = inverse + first / keys % 2 * keys;
                if constexpr (norm) {
                    key_norms(k, norms, p.hd);
                    group_sync();
                }
                visit_keys(rows, s, k + k_tile::bytes, p.tokens - first, p.scale, norms, before);
                before = free + 8 * stage;
                stage = stage + 1 == stages ? 0 : stage + 1;
                turn ^= stage == 0;
            }
            const unit u(p, index);
            finish(p, rows, q + side * q_tile::bytes, own, u.head, u.first + own, lacks + own);
            release(before);
            release(free + 8 * (stages + side));
            side = 1 - side;
            q_turn ^= side == 0;
        }
    }
};

#endif
