// Forward attention over one tile of queries of one head: O = softmax(Q K^T scale) V, by the online
// softmax of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1). A warp keeps 16 or 32
// queries, their sums of V and their softmax in registers; tiles of keys and values pass through
// shared memory, one ahead of their use.
#ifndef DITMOE_ATTENTION_FORWARD_CUH
#define DITMOE_ATTENTION_FORWARD_CUH

#include "devices/attention_softmax.cuh"

struct attention_forward_args {
    bf16 *o;         // [images * tokens, heads * hd]
    float *lse;      // [images, heads, tokens], or nullptr
    const bf16 *qkv; // [images * tokens, 3 * heads * hd]
    int units;       // images * heads * tiles of queries
    int heads, tokens, hd;
    float scale; // of the scores, times log2(e): exponentials are powers of two
    const float *wq, *bq, *wk,
        *bk; // [hd]: of the LayerNorm of q and k, where a kernel takes that in
};

// A block's work: units (a tile of queries of a head) one grid apart, of which each passes over all
// key tiles.
template <int queries> struct attention_unit {
    int head, first; // its first query
    const bf16 *q;   // the head's first row

    __device__ __forceinline__ attention_unit(const attention_forward_args &p, int index)
    {
        const int q_tiles = (p.tokens + queries - 1) / queries;
        head = index / q_tiles;
        first = index % q_tiles * queries;
        q = p.qkv +
            (static_cast<size_t>(head / p.heads) * p.tokens * 3 * p.heads + head % p.heads) * p.hd;
    }
};

// width: head sizes up to it, a multiple of 8. m_tiles: of 16 queries, a warp. keys: a tile of
// them, of which `stages` fit shared memory.
template <int width, int m_tiles, int warps, int keys, int stages> struct attention_forward {
    using shape = tile_rows<width>;
    static constexpr int threads = 32 * warps, queries = 16 * m_tiles * warps;
    static constexpr uint32_t query_tile = queries * shape::bytes, key_tile = keys * shape::bytes;
    static constexpr uint32_t stage_bytes = 2 * key_tile;
    static constexpr uint32_t shared_bytes = 2 * query_tile + stages * stage_bytes;
    using unit = attention_unit<queries>;

    struct state {
        tile_operand<width, m_tiles> q;
        attention_softmax<width, m_tiles, keys> rows;
    };

    // Divides by the sums. `q`: the warp's own rows of the Q tile; `first`: the warp's first query.
    static __device__ __forceinline__ void finish(const attention_forward_args &p, state &w,
                                                  char *q, int head, int first)
    {
        const int row = p.heads * p.hd;
        float inverse[m_tiles][2];
        w.rows.finish(inverse, p.lse ? p.lse + static_cast<size_t>(head) * p.tokens : nullptr,
                      first, p.tokens, p.scale);
        bf16 *to = p.o + (static_cast<size_t>(head / p.heads) * p.tokens + first) * row +
                   head % p.heads * p.hd;
        store_rows<width, m_tiles>(to, row, p.tokens - first, p.hd, q, w.rows.o, inverse);
    }

    static __device__ __forceinline__ void load_queries(const attention_forward_args &p,
                                                        const unit &u, uint32_t to)
    {
        load_tile<width, queries, threads>(to, u.q, 3 * p.heads * p.hd, u.first, p.tokens, p.hd);
    }

    static __device__ __forceinline__ void load_keys(const attention_forward_args &p,
                                                     const bf16 *head, uint32_t stage, int first)
    {
        const int row = p.heads * p.hd;
        load_tile<width, keys, threads>(stage, head + row, 3 * row, first, p.tokens, p.hd);
        load_tile<width, keys, threads>(stage + key_tile, head + 2 * row, 3 * row, first, p.tokens,
                                        p.hd);
    }

    static __device__ __forceinline__ void visit_keys(const attention_forward_args &p, state &w,
                                                      uint32_t stage, int left)
    {
        accumulator<m_tiles, keys / 8> s;
        multiply_rows<width>(s, w.q, stage);
        if (left < keys)
            w.rows.mask(s, left);
        w.rows.add(s, p.scale);
#pragma unroll
        for (int k = 0; k < keys / 16; k++) {
            uint32_t a[m_tiles][4];
            pack_step(a, s, k);
            multiply_transposed<width>(w.rows.o, a, stage + key_tile + k * 16 * shape::bytes);
        }
    }

    // The next tile of keys to ask for: ahead of the one in use, into the next unit where that is.
    struct cursor {
        int index, first, stage;
        const bf16 *head;

        __device__ __forceinline__ void load_next(const attention_forward_args &p, uint32_t ring)
        {
            if (index < p.units) {
                load_keys(p, head, ring + stage * stage_bytes, first);
                stage = stage + 1 == stages ? 0 : stage + 1;
                first += keys;
                if (first >= p.tokens) {
                    first = 0;
                    index += gridDim.x;
                    if (index < p.units)
                        head = unit(p, index).q;
                }
            }
            copy_commit();
        }
    };

    static __device__ __forceinline__ void run(const attention_forward_args &p)
    {
        extern __shared__ __align__(16) char shared[];
        const int own = threadIdx.x / 32 * 16 * m_tiles;
        const uint32_t base = shared_address(shared), ring = base + 2 * query_tile;
        cursor ahead = {static_cast<int>(blockIdx.x), 0, 0, unit(p, blockIdx.x).q};
        load_queries(p, unit(p, blockIdx.x), base);
        for (int i = 0; i < stages - 1; i++)
            ahead.load_next(p, ring);
        int stage = 0, side = 0; // in use: of keys, of queries
        for (int index = blockIdx.x; index < p.units; index += gridDim.x) {
            state w;
            w.rows.start();
            for (int first = 0; first < p.tokens; first += keys) {
                if (p.tokens <= (stages - 2) * keys) // queries came with a later tile of keys
                    copy_wait<0>();
                else
                    copy_wait<stages - 2>();
                __syncthreads(); // this tile is here, and nobody reads the one before
                if (first == 0 && index + gridDim.x < p.units)
                    load_queries(p, unit(p, index + gridDim.x), base + (1 - side) * query_tile);
                ahead.load_next(p, ring);
                if (first == 0)
                    w.q.load(base + side * query_tile + own * shape::bytes);
                visit_keys(p, w, ring + stage * stage_bytes, p.tokens - first);
                stage = stage + 1 == stages ? 0 : stage + 1;
            }
            const unit u(p, index);
            finish(p, w, shared + side * query_tile + own * shape::bytes, u.head, u.first + own);
            side = 1 - side;
        }
    }
};

#endif
