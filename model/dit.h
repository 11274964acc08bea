// The network: DiT with mixture-of-experts blocks, forward and backward, written once for every
// device. Each layer file has X_forward and X_backward side by side; backward accumulates into the
// gradients. A dit owns its memory plan: nothing is allocated after dit_commit().
//
//     struct dit *d;
//     dit_new(ctx, &config, &(struct dit_options){.batch = 64, .train = true}, &d); // plans
//     dit_commit(d); dit_init(d, seed);                                             // allocates
//     dit_forward(d);  dit_backward(d);                                             // often
#ifndef DITMOE_DIT_H
#define DITMOE_DIT_H

#include "model/moe_exchange.h"
#include "model/params.h"
#include "model/streamed.h"
#include "runtime/ops.h"

// What a block remembers between its forward and its backward. M = N*T, R = M*K.
struct block_act {
    struct tensor stats1, h1, qkv, qk, qk_stats;    // LN1, its output [M,D], [M,3D], after q/k norm
    struct tensor lse, o, attn;                     // [N,H,T], [M,D], [M,D]
    struct tensor mid, mid_low;                     // [M,D] after attention, and its low half
    struct tensor stats2, h2;                       // LN2 and its output [M,D]
    struct tensor logits, probs, weight;            // router: [M,E] [M,E] [M,K]
    struct tensor slot, token;                      // [M,K] [R]
    struct tensor rows, gu, hidden, y;              // [R,D] [R,2F] [R,F] [R,D]
    struct tensor shared_gu, shared_hidden, shared; // [M,2Fs] [M,Fs] [M,D]
    struct tensor fc1, act;                         // plain MLP: [M,4D] [M,4D]
    struct tensor out;                              // [M,D] of the MoE or MLP
};
// The backward pass writes gradients over what is no longer needed: d attn over attn, d out over
// out, d gu over gu, d rows over y. So one forward serves one backward. What is made again (enum
// lean) lies in struct block_grad.

// Kept per layer even when the block is recomputed: what logs and the parity door read.
struct block_route {
    struct tensor index;               // [M,K] int32, the experts chosen
    struct tensor offsets;             // [E+1] int32
    struct tensor fraction, mean_prob; // [G,E], training only
};

// Scratch of a block's backward pass (lifetimes end with it, so blocks share the bytes).
struct block_grad {
    struct tensor dh;                       // [M,D]
    struct tensor h1, h2, mid, qk, rows, hidden; // made again (lean)
    struct tensor shared_gu, shared_hidden;      // too
    struct tensor dy, dots;                 // [R,D] d y, then d rows, where y is not kept; [F/64,R]
    struct tensor norms_gu, norms_down;     // parts of dit.norms
    struct tensor dqkv, delta;              // [M,3D] [N,H,T]
    struct tensor dhidden, dshared_hidden;  // [R,F] [M,Fs]
    struct tensor dweight, dlogits;         // [M,K] [M,E]
    struct tensor dact;                     // [M,4D]
};

struct embed_act {
    struct tensor patches;            // [M,C*p*p]
    struct tensor sum;                // [M,D] f32, where the stream is in two halves
    struct tensor features, t0, ts;   // [N,256] [N,D] [N,D]
    struct tensor cond, cs;           // [N,D] conditioning and its SiLU
    struct tensor dcs, dts;           // [N,D] gradients
    // In sampling these hold the rows of several steps, and so do:
    struct tensor mods;               // [N,W] modulations of all layers
    struct tensor all_dmod, all_cs;   // windows: d modulations and cs of all ranks' images
    int dmod_number, cs_number;
};

struct final_act {
    struct tensor stats, h, patches; // [M,2] [M,D] [M,p*p*Co]
    struct tensor dh;
};

// What the backward pass makes again from what is kept anyway: nothing; what one pass over memory
// makes (h1, h2, mid, qk, rows), or a product beside its work (hidden, and what y is kept for); a
// product of its own too (the shared expert's g | u). Each is used where it saves much of the
// whole: see dit_new().
enum lean { LEAN_NOTHING, LEAN_PASSES, LEAN_PRODUCTS };

struct dit_options {
    int batch;
    bool train;     // plan gradients and everything a backward pass needs
    bool optimiser; // Adam moments
    bool ema;
    bool pack;      // not with train: keep packed copies of weights, where there is memory for them
    int ahead;      // not with train: conditioning is computed for this many steps at once (0: for
                    // each forward pass by itself); see dit_condition
    enum lean lean; // at least so much is made again, on devices that have little memory for their speed
    bool recompute; // keep only each block's input; run its forward again in the backward pass
    // A block's gradients live only until this is called, at the end of its backward pass (NULL:
    // all gradients stay). They must then start from zero by themselves, so: one backward pass a
    // step.
    int (*block_done)(void *user, int layer);
    // Not NULL: called when the gradients of a block are complete (on the stream), and for the
    // rest, -1.
    int (*block_ready)(void *user, int layer);
    void *user;
    const struct dit_ranks *ranks; // the model is spread over these (moe_exchange.h); NULL: one rank.
                                   // `batch` is this rank's, and may then be 0
    // With train: every dit_backward comes after a dit_zero_gradients of its own. So gradients are
    // there from their block's backward pass to the next forward pass only, and lie where
    // activations were.
    bool one_backward;
    bool as_ranks; // lean as ranks are, which is alike for every batch
    uint64_t limit; // bytes of device memory to plan with; 0: what the device has
    struct offload offload; // experts that live in host memory (streamed.h)
};

struct dit {
    struct config config;
    struct dit_options options;
    struct params params;
    struct context ctx;
    struct plan *plan;
    struct weights w, g, m, v, ema;
    struct weights low; // with an optimiser, where products read bf16 (struct tensor)

    enum lean lean;
    bool half; // products read weights as bf16 (struct tensor)

    // t and labels: [N] f32, int32; with `ahead` the rows of every step, one after the other
    struct tensor input, t, labels; // input [N,C,H,W] f32
    struct tensor output, doutput;  // [N,Co,H,W] f32

    struct embed_act embed;
    struct tensor mod, dmod;     // [N,W] modulations of this pass (struct weights: ada_w)
    struct tensor *x;            // [L+1] residual stream [M,D] before each block, and after the last
    struct tensor *x_low;        // [L] in the forward pass: low halves of the first L (dit_stream)
    struct tensor dx;            // [M,D]
    struct tensor norms;         // of parts of the experts' gradients, where products leave them; or none
    float balance_scale;         // on the balance loss's gradient: 1 / micro-batches a step
    struct block_act *acts;      // [L], or [1] shared by all blocks with recompute
    struct block_route *routes;  // [L]
    struct block_grad *grads;    // [L]
    struct moe_exchange *moe;    // where other ranks have experts of this model; or NULL
    struct streamed *streamed;   // experts in host memory, or NULL
    struct packed *packed;       // of the weights, or NULL
    int packed_count;
    struct final_act final;
};

// Plans a model on ctx's device: sets every shape, lays memory out, allocates nothing. The caller
// may declare tensors of its own in (*out)->plan before dit_layout().
int dit_new(struct device *dev, struct stream *stream, const struct config *c,
            const struct dit_options *options, struct dit **out);
int dit_layout(struct dit *d); // ERR_NOMEM: does not fit; plan_print(d->plan) says what is needed
int dit_commit(struct dit *d);
void dit_free(struct dit *d);

int dit_init(struct dit *d, uint64_t seed); // weights (and EMA = weights, moments = 0) as published
int dit_copy_ema(struct dit *d);            // EMA = weights

// input, t, labels -> output. With options.ahead: input and the modulations of dit_use_step ->
// output.
int dit_forward(struct dit *d);
// With options.ahead: t, labels -> modulations of `ahead` steps; and those of step `at` for what
// follows.
int dit_condition(struct dit *d);
int dit_use_step(struct dit *d, int at);
// doutput -> gradients, added to d->g. After a dit_forward with the same input.
int dit_backward(struct dit *d);
// Before the first dit_backward of a step: gradients start from zero. Those of weight matrices are
// not touched but written by the next backward pass; it ends with the gradients as if all had been
// zeroed.
int dit_zero_gradients(struct dit *d);

// Host copies for the parity door and for logs: sizes [N*T*K] and [E] (tokens that each expert
// got).
int dit_read_experts(struct dit *d, int layer, int32_t *index);
int dit_read_load(struct dit *d, int layer, int32_t *load);
// Balance loss of a layer in the last training forward (alpha included).
int dit_read_balance(struct dit *d, int layer, double *loss);

// ---- layers (each in its own file) --------------------------------------------------------------

int embed_plan(struct dit *d);
int embed_forward(struct dit *d);     // input -> x[0]
int condition_forward(struct dit *d); // t, labels -> embed.mods
int embed_backward(struct dit *d);    // dx, dmod -> gradients
// Whether embed_backward() leaves the gradient of all ranks' images of a tensor, not of this one's
// alone; the part of it that a rank without images has, too.
bool embed_gathers(const struct dit *d, const struct tensor *gradient);
int embed_serve_backward(struct dit *d);

// Blocks meet at a residual sum followed by the next LayerNorm, which are one operation: so a block
// begins at its h1 and ends at the next block's h1 (the last: at the head's h); backward, it begins
// at d out and ends at the d out of the block below. `h1` of the first block is block_enter's.
int block_plan(struct dit *d, int layer);
int block_enter(struct dit *d, int layer);    // x[layer] -> h1
int block_forward(struct dit *d, int layer);  // h1 -> x[layer+1], the next h1
int block_backward(struct dit *d, int layer); // dx, out (now d out) -> dx, d out of layer-1
// dx, d of the LayerNorm that follows block `layer` -> dx, d out (the residual step in reverse):
// from dh with y, stats of that LayerNorm and its shift in column `shift` (scale next to it).
int block_leave_backward(struct dit *d, int layer, struct tensor *dh, const struct tensor *y,
                         const struct tensor *stats, int shift);

int attention_forward(struct dit *d, int layer);  // h1 -> attn
int attention_backward(struct dit *d, int layer); // attn (now d attn) -> grad.dh (d h1)

// The experts' rows stay apart (y, shared): what follows combines them. In reverse, too: grad.dh is
// the shared expert's part of d h2, y and grad.dlogits hold the rest (dh alone where there is no
// shared expert: with the router's part).
int moe_forward(struct dit *d, int layer);  // h2 -> y, shared; router.logits is there already
int moe_backward(struct dit *d, int layer); // out (now d out) -> grad.dh, y, grad.dlogits
// Experts of the kind EXPERT_GELU over `rows`, sorted by expert (experts_gelu.c). pre [R,F] may be
// hidden [R,F] where no backward pass follows. That takes d y in y and leaves d rows there; dhidden
// [R,F] is scratch.
struct expert_rows {
    struct tensor *rows, *pre, *hidden, *y;
    const struct tensor *offsets;
};
int gelu_experts_forward(struct context *c, const struct block_weights *w,
                         const struct expert_rows *r);
int gelu_experts_backward(struct context *c, struct block_weights *g,
                          const struct block_weights *w, const struct expert_rows *r,
                          struct tensor *dhidden);
int mlp_forward(struct dit *d, int layer);  // h2 -> out of a plain block
int mlp_backward(struct dit *d, int layer); // out (now d out) -> grad.dh (d h2)

// Declares packed copies of the weights (packed.c), if the plan, laid out before, has room for
// them.
int packed_plan(struct dit *d);

int final_plan(struct dit *d);
int final_forward(struct dit *d);
int final_backward(struct dit *d);

// ---- times of the dry pass ----------------------------------------------------------------------

// Block l's forward, its backward; the embedding is block -1, the head block L. Phases within a
// block let its tensors share bytes: forward 0 qkv, 1 attention, 2 projection and router, 3 gate
// and up, 4 down, 5 combine; backward 0 gate, 1 down, 2 gate and up, 3 shared and router, 4
// projection, 5 attention, 6 qkv, 7 modulation.
enum { PHASES = 8, NEVER = -1 };
int time_forward(const struct dit *d, int layer, int phase);
int time_backward(const struct dit *d, int layer, int phase);

// Declares an activation that lives from forward phase `from` to `to` of its block, or, when
// training, to backward phase `back` (NEVER: not needed there).
int plan_activation(struct dit *d, int layer, const char *name, enum dtype type, int from, int to,
                    int back, struct tensor *t, int ndim, const int64_t *shape);
#define ACTIVATION(d, layer, name, type, from, to, back, t, ...)                                   \
    TRY(plan_activation(d, layer, name, type, from, to, back, t,                                   \
                        (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                 \
                        (int64_t[]){__VA_ARGS__}))

// The first of the D columns of a modulation of block `layer`; SHIFT1 of block L is the head's.
static inline int dit_column(const struct dit *d, int layer, enum modulation which)
{
    return (layer * MODULATIONS + (int)which) * d->config.hidden;
}

// The residual stream before block `layer` as the forward pass reads and writes it: in two halves
// (struct tensor) where the device's operations take them. Forward and recomputation only:
// otherwise the low half does not live until the backward pass, which reads x alone.
static inline struct tensor dit_stream(struct dit *d, int layer)
{
    struct tensor x = d->x[layer];
    if (layer < d->config.layers && d->x_low[layer].ndim)
        x.low = &d->x_low[layer];
    return x;
}

// What the backward pass reads of the forward's: kept, or made again (lean).
static inline struct tensor *dit_kept(struct tensor *in_forward, struct tensor *again)
{
    return again->ndim ? again : in_forward;
}

static inline struct block_act *dit_act(struct dit *d, int layer)
{
    return &d->acts[d->options.recompute ? 0 : layer];
}

#endif
