// Instances of the tuned attention kernels: attention.cu compiles them, cuda_attention.c chooses
// among them. C and CUDA C++ read this.
#ifndef DITMOE_ATTENTION_LIST_H
#define DITMOE_ATTENTION_LIST_H

// attention_fwd_WIDTH_QUERIES: head sizes up to WIDTH, QUERIES a block; of a width, more queries
// first.
// I(width, queries, warps, 16-query tiles a warp, keys a tile, tiles of keys held, blocks a
//   multiprocessor)
#define ATTENTION_FORWARD(I)   \
    I(64, 128, 4, 2, 64, 3, 2) \
    I(64, 64, 4, 1, 64, 3, 3)  \
    I(72, 128, 4, 2, 64, 3, 2) \
    I(72, 64, 4, 1, 64, 2, 3)  \
    I(88, 128, 4, 2, 32, 3, 2) \
    I(88, 64, 4, 1, 64, 2, 2)  \
    I(128, 64, 4, 1, 64, 2, 2)

// attention_bwd_WIDTH_KEYS_whole_STAGES (dqkv at once, where a block holds all keys) or _part_ (dK
// and dV, after attention_bwd_q of the same width); of a width, the most wanted first.
// I(width, keys, whole or part, 16-key tiles a warp, queries at once, stages of keys)
#define ATTENTION_BACKWARD(I)   \
    I(64, 256, whole, 2, 32, 2) \
    I(64, 256, part, 2, 32, 2)  \
    I(64, 128, part, 1, 32, 1)  \
    I(72, 256, whole, 2, 16, 2) \
    I(72, 256, part, 2, 32, 2)  \
    I(72, 128, part, 1, 32, 1)  \
    I(88, 256, whole, 2, 16, 1) \
    I(88, 256, part, 2, 16, 1)  \
    I(88, 128, part, 1, 32, 1)  \
    I(128, 128, part, 1, 32, 2) \
    I(128, 128, part, 1, 16, 1)

// attention_bwd_q_WIDTH. I(width, 16-query tiles a warp, keys a tile)
#define ATTENTION_BACKWARD_Q(I) \
    I(64, 2, 32)                \
    I(72, 2, 32)                \
    I(88, 1, 64)                \
    I(128, 1, 32)

// Hopper's own (image attention_sm90). attention_fwd_sm90_WIDTH_QUERIES, and
// attention_fwd_sm90_norm_WIDTH_QUERIES with the LayerNorm of q and k within. The wide ones are
// slower than attention_fwd's, but for the LayerNorm.
// I(width, queries, warpgroups, tiles of 64 keys held, blocks a multiprocessor)
#define ATTENTION_FORWARD_SM90(I) \
    I(64, 128, 2, 4, 2)           \
    I(64, 64, 1, 3, 3)            \
    I(72, 128, 2, 4, 2)           \
    I(72, 64, 1, 3, 3)
#define ATTENTION_FORWARD_SM90_WIDE(I) \
    I(88, 128, 2, 4, 1)                \
    I(88, 64, 1, 4, 2)

// attention_bwd_sm90_WIDTH: dqkv at once, 256 keys. I(width, queries at once)
#define ATTENTION_BACKWARD_SM90(I) I(64, 64)

enum {
    ATTENTION_BACKWARD_THREADS = 256,
    ATTENTION_BACKWARD_Q_THREADS = 128,
    ATTENTION_WIDTH_MAX = 128,
};

// Bytes of dynamic shared memory.
#define ATTENTION_ROW(width) (((width) / 8 | 1) * 16)
#define ATTENTION_FORWARD_SHARED(width, queries, keys, stages) \
    (2 * ((queries) + (stages) * (keys)) * ATTENTION_ROW(width))
#define ATTENTION_BACKWARD_SHARED(width, keys, stages, is_whole) \
    ((2 * (stages) * (keys) + 4 * 64) * ATTENTION_ROW(width) +   \
     ((is_whole) ? (keys)*ATTENTION_ROW(64) : 0) + 4 * 64 * 4)
#define ATTENTION_BACKWARD_Q_SHARED(width, tiles, keys) \
    ((2 * 64 * (tiles) + 4 * (keys)) * ATTENTION_ROW(width))

// Rows of these tiles are not padded; 1024 bytes of zeros, and as many to begin at a multiple of
// that; forward: barriers, and 48 for the thread that asks for tiles.
#define ATTENTION_FORWARD_SM90_SHARED(width, queries, stages, norm)             \
    (4 * ((queries) + 64 * (stages)) * (width) + 2096 + 16 * ((stages) + 2) +   \
     ((norm) ? (3 * (width) + 4 + 2 * (queries) + (queries)) * 4 : 0))
#define ATTENTION_BACKWARD_SM90_SHARED(width) \
    (2 * (4 * 256 + 4 * 64) * (width) + 256 * 128 + 4 * 64 * 4 + 2048)

#endif
