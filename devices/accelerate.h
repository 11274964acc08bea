// The arguments of the operations that a backend may take over whole (enum accelerated in
// device.h), one struct each; the operations are those of runtime/ops.h, whose letters these are.
// In each the memories come first, so that a backend can turn them into addresses in place: device
// code includes this with ACCELERATE_MEM defined as void *. Tensors of activations are bf16 where
// the device was opened so, parameters and statistics f32, index, slot, token and offsets int32.
#ifndef DITMOE_ACCELERATE_H
#define DITMOE_ACCELERATE_H

#ifndef ACCELERATE_MEM
#include "devices/device.h"
#define ACCELERATE_MEM struct mem *
#endif

typedef ACCELERATE_MEM accelerate_mem;

enum {
    NORM_ROWS = 16,    // partial sums of norm_backward: one for so many rows of an image, or fewer
    SUM_PARTS = 256,   // the most partial sums of a column that column_sums and router_dw make
    ROUTE_ROWS = 256,  // rows a partial of `route` counts, or fewer
    QK_PART = 8,       // rows a partial of `qk_norm` sums over, or more
    GROUP_ROWS = 32,   // pixels a partial of `group_norm_forward` sums over, or more
    NORM2_PARTS = 4096, // the most partial sums of norm2
    PEER_ROADS = 8,    // the most ranks of peer_rows
    PEER_TABLE = 2048  // and of ranks times experts
};

// op_layernorm_mod_fwd (z and rows NULL), op_residual_norm_fwd (z), op_combine_norm_fwd (rows,
// slot, weight, shared, z1; kept: its z). y, kept, logits and router_w, shared, z1: NULL where
// absent. y_low, x_low: the low halves of y and x, or NULL.
struct norm_forward {
    accelerate_mem y, y_low, h, stats, logits, kept;
    accelerate_mem x, x_low, z, z1, rows, slot, weight, shared, mod, router_w;
    int images, tokens, width, mod_width, gate, gate1, shift, scale, experts, choices;
};

// op_layernorm_mod_bwd (dz NULL), op_norm_gate_bwd. partial: scratch of
// 3 * images * ceil(tokens / NORM_ROWS) * width floats.
struct norm_backward {
    accelerate_mem dx, dz, dmod, partial;
    accelerate_mem dh, drows, slot, dlogits, router_w, y, stats, z, mod;
    int images, tokens, width, mod_width, gate, shift, scale, experts, choices;
};

// op_dispatch_fwd, tokens = M
struct dispatch {
    accelerate_mem rows, x, slot;
    int tokens, choices, width;
};

// op_combine_bwd, tokens = M; dweight and rows may be NULL
struct combine_backward {
    accelerate_mem drows, dweight, dout, rows, slot, weight;
    int tokens, choices, width;
};

// op_qk_norm_fwd (out, qkv, stats, parameters), op_qk_norm_bwd (out: dqkv; gradients d*; partial:
// scratch of 4 * ceil(rows / QK_PART) * head size floats)
struct qk_norm {
    accelerate_mem out, qkv, stats, wq, bq, wk, bk, dwq, dbq, dwk, dbk, partial;
    int rows, heads, head;
};

// op_qk_attention_fwd; lse may be NULL
struct qk_attention {
    accelerate_mem o, lse, qkv, wq, bq, wk, bk;
    int images, heads, tokens, head;
    float scale;
};

// out[columns] f32 += the sum over the rows of a[rows,columns] (ACT). partial: SUM_PARTS * columns
// floats
struct column_sums {
    accelerate_mem out, a, partial;
    int rows, columns;
};

// op_router_dw; added: dw += instead of =. partial: SUM_PARTS * experts * width floats
struct router_gradient {
    accelerate_mem dw, dlogits, h, partial;
    int rows, width, experts, added;
};

// op_router_route. fraction and mean_prob [groups, experts] may be NULL. partial: scratch of
// 2 * ceil(rows / ROUTE_ROWS) * experts words.
struct route {
    accelerate_mem probs, weight, index, offsets, slot, token, fraction, mean_prob;
    accelerate_mem logits, partial;
    int rows, experts, choices, groups, renormalise;
};

// op_norm2: control[0] (added: +=) the sum of squares of g. partial: NORM2_PARTS floats
struct norm2 {
    accelerate_mem control, g, partial;
    unsigned long long count;
    int added;
};

// peer_send_rows (runtime/peers.h) to all ranks, number `rank` among them, by `blocks` compute units: to and
// words are the ranks' windows and flags, part the first of their parts of segments. index may be NULL.
struct peer_rows {
    accelerate_mem to[PEER_ROADS], words[PEER_ROADS], from, index, segments, own;
    int rank, ranks, part, experts, vectors, lane, blocks;
};

// op_adamw; ema may be NULL; low NULL: w is f32
struct adamw_step {
    accelerate_mem w, m, v, ema, g, control, low;
    unsigned long long count;
    float beta1, rest1, beta2, rest2, eps, decay;
};

// op_conv2d with weights of the type of activations; bias may be NULL. y: bf16, or f32 (to_f32) of
// its own columns alone and without ReLU, from row `first` on. space: CONV_SPACE bytes of scratch,
// and 32 * channels * out where doubled.
struct convolution {
    accelerate_mem y, x, w, bias, space;
    int images, height, width, channels, out, columns, column, first;
    int kernel_h, kernel_w, stride, top, bottom, left, right, out_height, out_width;
    int doubled, relu, add, to_f32;
};
enum { CONV_SPACE = 16 << 20 };

// op_group_norm. partial: scratch of 2 * images * groups floats for every GROUP_ROWS pixels of an
// image, or fewer; total: of 2 * images * channels.
struct group_norm_forward {
    accelerate_mem y, x, weight, bias, partial, total;
    int images, pixels, channels, groups, silu;
    float eps;
};

// op_pool
struct pool_forward {
    accelerate_mem y, x;
    int images, height, width, channels, out_height, out_width;
    int size, stride, padding, maximum, columns, column;
};

#endif
