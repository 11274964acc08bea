// The operations of the network, each written once: check shapes, try the device's own version,
// else choose the groups and launch the portable kernel (CPU or GPU form by the device's kind).
//
// Outputs come first. ACT is the context's activation type (dev->act: f32 or bf16); parameters,
// their gradients, statistics and the router are f32. Operations write their outputs unless the
// text says "+=". Every backward op accumulates into parameter gradients (+=). All are
// deterministic: no float atomics, so the same inputs give the same bits on one device.
//
// `mod` arguments are the adaLN modulations [N, W] (ACT), of which an operation uses D columns that
// start at a given column; row m of a [M,D] tensor belongs to image m / (M/N).
//
// Returns 0 or a negative code; a wrong shape is a bug of the caller (BUG_IF), not an error.
#ifndef DITMOE_OPS_H
#define DITMOE_OPS_H

#include "runtime/tensor.h"

// ---- matrix products (devices/device.h struct gemm) ---------------------------------------------

// y[M,O] = x[M,I] w[O,I]^T + bias[O] (bias may be NULL). y: ACT or f32.
int op_linear(struct context *c, struct tensor *y, const struct tensor *x, const struct tensor *w,
              const struct tensor *bias);
// dx[M,I] (+)= dy[M,O] w[O,I]
int op_linear_dx(struct context *c, struct tensor *dx, const struct tensor *dy,
                 const struct tensor *w, bool accumulate);
// dw[O,I] += dy[M,O]^T x[M,I] (= with c->fresh_gradients, which saves reading and
// zeroing dw); dbias[O] += sum over rows of dy (dbias may be NULL)
int op_linear_dw(struct context *c, struct tensor *dw, struct tensor *dbias,
                 const struct tensor *dy, const struct tensor *x);

// The same for E matrices w[E,O,I] over rows sorted by expert; offsets[E+1] int32 on the device.
int op_experts(struct context *c, struct tensor *y, const struct tensor *x, const struct tensor *w,
               const struct tensor *offsets);
int op_experts_dx(struct context *c, struct tensor *dx, const struct tensor *dy,
                  const struct tensor *w, const struct tensor *offsets);
// norms: NULL, or op_experts_dw_norms() floats, of which op_norm2() makes the same as of dw; for a
// product of `rows` rows. 0: the device leaves none.
int op_experts_dw(struct context *c, struct tensor *dw, struct tensor *norms, const struct tensor *dy,
                  const struct tensor *x, const struct tensor *offsets);
int64_t op_experts_dw_norms(const struct context *c, const struct tensor *dw, int64_t rows);

// Biases of experts that have them, bias[E*O] f32: y[R,O] (ACT) += that of each row's expert.
// Backward: dbias += the sums of dy's rows expert by expert.
int op_expert_bias_fwd(struct context *c, struct tensor *y, const struct tensor *bias,
                       const struct tensor *offsets);
int op_expert_bias_bwd(struct context *c, struct tensor *dbias, const struct tensor *dy,
                       const struct tensor *offsets);

// The gate|up product of a SwiGLU layer with what follows it: h[M,F] = silu(g) * u, where
// g | u = x[M,I] w[2F,I]^T; and the gradient of gu[M,2F] = g | u in place, from dy[M,O] and the
// down projection w[O,F]: dh = dy w, then dg | du. Devices that do both in one pass for this F
// (op_swiglu_fuses) need no memory for gu in the first, which writes it only when it is given, nor
// for dh[M,F] in the second, which leaves it alone: either may be NULL there. Elsewhere both are
// written. All ACT.
bool op_swiglu_fuses(const struct context *c, int64_t columns);
// Whether the backward products below can write h[M,F] again beside their work; `h` is NULL
// elsewhere and where it is not wanted.
bool op_swiglu_rebuilds(const struct context *c, int64_t columns);
// Whether they can also write dots[F/64,R] (f32), the sums of dh h over each 64 of F, for experts
// of a layer of width D; `dots` is NULL elsewhere and where they are not wanted.
// op_combine_weight_bwd() makes the gradient of the choices' weights of them.
bool op_swiglu_dots(const struct context *c, int64_t experts, int64_t D, int64_t F);
int op_linear_swiglu(struct context *c, struct tensor *h, struct tensor *gu, const struct tensor *x,
                     const struct tensor *w);
int op_linear_swiglu_dx(struct context *c, struct tensor *gu, struct tensor *dh, struct tensor *h,
                        const struct tensor *dy, const struct tensor *w);
int op_experts_swiglu(struct context *c, struct tensor *h, struct tensor *gu,
                      const struct tensor *x, const struct tensor *w, const struct tensor *offsets);
int op_experts_swiglu_dx(struct context *c, struct tensor *gu, struct tensor *dh, struct tensor *h,
                         struct tensor *dots, const struct tensor *dy, const struct tensor *w,
                         const struct tensor *offsets);

// Bytes of a packed copy (struct packed) of the weight w[O,I] or w[E,O,I] for the products y = x
// w^T above; 0 where the device reads weights as they are. A weight with a copy belongs to one
// operation.
size_t op_packed_bytes(const struct context *c, const struct tensor *w);

// y += x w^T + bias (bias may be NULL): a product that joins a residual stream. y: ACT or f32.
int op_linear_add(struct context *c, struct tensor *y, const struct tensor *x,
                  const struct tensor *w, const struct tensor *bias);

// ---- convolutional networks ---------------------------------------------------------------------
//
// Images are matrices of pixels: row (n*H + y)*W + x holds the channels of one pixel (ACT). So a
// 1x1 convolution is op_linear, and op_patchify with patch 1 turns [N,C,H,W] into this order.

// y[:, column..column+Co) = f(x * w + bias), or with `add` f(y + x * w + bias): cross-correlation
// with zero padding, as in torch.nn.Conv2d, where f is max(0, .) or nothing. y is [N*H'*W',
// columns], H' = conv_height(), W' = conv_width(); bias[Co] f32 or NULL.
// w[Co, conv_columns()] (f32 or bf16) holds the taps in the order (ky, kx, channel), then zeros up
// to a multiple of 8: conv_weight() brings a published [Co,C,kh,kw] into it. Rows of Co that are
// zero make columns that are zero; products are fastest where Co is a multiple of 8 too.
//
// Done as products of blocks of gathered pixels, or by the device in place (devices/conv_sm90.cu:
// bf16, channels in units of eight; doubled, weights are then added up and rounded first). Without
// relu, where y has no other columns, and in place, sums are rounded once.
struct conv {
    int images, height, width;      // of x[N*H*W, C]
    int kernel_h, kernel_w, stride;
    int top, bottom, left, right;   // padding
    bool doubled;                   // x counts twice as high and wide: each pixel is four
    bool relu, add;
};
int64_t conv_height(const struct conv *g);
int64_t conv_width(const struct conv *g);
int64_t conv_columns(const struct conv *g, int64_t channels);
void conv_weight(float *to, const float *from, int64_t out, int64_t channels, int kernel_h,
                 int kernel_w);
int op_conv2d(struct context *c, struct tensor *y, int64_t column, const struct tensor *x,
              const struct tensor *w, const struct tensor *bias, const struct conv *g);

// y = f((x - mean) / sqrt(var + eps) * weight + bias), mean and variance over the pixels of an
// image and over the channels of a group; x, y[N*P,C] (y may be x), C a multiple of `groups`;
// weight, bias[C] f32; f is SiLU or nothing.
int op_group_norm(struct context *c, struct tensor *y, const struct tensor *x,
                  const struct tensor *weight, const struct tensor *bias, int images, int groups,
                  float eps, bool silu);

// p[R,T] (ACT) = softmax(scale * s[R,T]) of each row; s f32
int op_softmax(struct context *c, struct tensor *p, const struct tensor *s, float scale);

// o = softmax(q k^T / sqrt(D)) v for each image, one head: all [N*T,D]. For any D, also those that
// are too wide for op_attention_fwd: blocks of scores go through memory.
int op_attention_single(struct context *c, struct tensor *o, const struct tensor *q,
                        const struct tensor *k, const struct tensor *v, int images);

// out[N,C,H,W] (f32) = the first C columns of in[N*H*W, columns] (ACT or f32)
int op_rows_to_images(struct context *c, struct tensor *out, const struct tensor *in);

// ---- embedding ----------------------------------------------------------------------------------

// Cuts images into patches: out[N*T, C*p*p] (ACT) from x[N,C,H,W] (f32).
// Column order PATCH_CPQ (c,p,q) is that of a convolution's weight; PATCH_PQC (p,q,c) that of the
// final layer. Used with PATCH_PQC it is the backward of op_unpatchify.
enum patch_order { PATCH_CPQ, PATCH_PQC };
int op_patchify(struct context *c, struct tensor *out, const struct tensor *x, int patch,
                enum patch_order order);
// out[N,C,H,W] (f32) from in[N*T, p*p*C] (ACT), column order PATCH_PQC
int op_unpatchify(struct context *c, struct tensor *out, const struct tensor *in, int patch);

// x[N*T,D] (ACT) = sum + pos[T,D] (f32). sum: x itself; or f32, where x is in two halves.
int op_add_pos(struct context *c, struct tensor *x, const struct tensor *sum,
               const struct tensor *pos);

// out[N,F] (ACT): cos(t*w_i) for i < F/2, then sin(t*w_i); w_i = 10000^(-i/(F/2)), or with `full`
// 10000^(-i/(F/2-1)); t[N] f32, unscaled
int op_timestep_embed(struct context *c, struct tensor *out, const struct tensor *t, bool full);

// out[N,D] (ACT) += table[y[n],:] (f32); y[N] int32.  Backward: dtable[y[n],:] += dout[n,:]
int op_embed_fwd(struct context *c, struct tensor *out, const struct tensor *table,
                 const struct tensor *y);
int op_embed_bwd(struct context *c, struct tensor *dtable, const struct tensor *dout,
                 const struct tensor *y);

// ---- elementwise --------------------------------------------------------------------------------

// y = f(x), dx = dy * f'(x); any shape, ACT. y may be x; dx may be dy. GELU is the tanh form.
int op_silu_fwd(struct context *c, struct tensor *y, const struct tensor *x);
int op_silu_bwd(struct context *c, struct tensor *dx, const struct tensor *dy, const struct tensor *x);
int op_gelu_fwd(struct context *c, struct tensor *y, const struct tensor *x);
int op_gelu_bwd(struct context *c, struct tensor *dx, const struct tensor *dy, const struct tensor *x);

// SwiGLU: h[R,F] = silu(g) * u, gu[R,2F] = g | u.  Backward: dgu from dh and gu; dgu may be gu.
int op_swiglu_fwd(struct context *c, struct tensor *h, const struct tensor *gu);
int op_swiglu_bwd(struct context *c, struct tensor *dgu, const struct tensor *dh,
                  const struct tensor *gu);

// y += x (same shape; each ACT or f32)
int op_add(struct context *c, struct tensor *y, const struct tensor *x);

// ---- LayerNorm, adaLN, gated residual -----------------------------------------------------------

// y[M,D] = LN(x) * (1 + mod[n, scale+d]) + mod[n, shift+d], eps 1e-6, no affine;
// stats[M,2] f32 gets mean and 1/std. x may be in two halves where op_combine_norm_fuses.
int op_layernorm_mod_fwd(struct context *c, struct tensor *y, struct tensor *stats,
                         const struct tensor *x, const struct tensor *mod, int shift, int scale);
// dx[M,D] += ...; dmod[n, shift+d] and dmod[n, scale+d] are written (the other columns are not).
int op_layernorm_mod_bwd(struct context *c, struct tensor *dx, struct tensor *dmod,
                         const struct tensor *dy, const struct tensor *x,
                         const struct tensor *stats, const struct tensor *mod, int shift, int scale);

// y[M,D] = x + mod[n, gate+d] * z (y may be x).
// Backward: dz = mod[n, gate+d] * dy; dmod[n, gate+d] = sum over the image's rows of dy*z. (dx =
// dy; dz may be z.)
int op_gate_residual_fwd(struct context *c, struct tensor *y, const struct tensor *x,
                         const struct tensor *z, const struct tensor *mod, int gate);
int op_gate_residual_bwd(struct context *c, struct tensor *dz, struct tensor *dmod,
                         const struct tensor *dy, const struct tensor *z,
                         const struct tensor *mod, int gate);

// ---- attention ----------------------------------------------------------------------------------

// qkv[M,3*D] holds q, k, v of H heads of size D/H: column (which*H + h)*hd + d. No mask, scale
// 1/sqrt(hd). o[M,D]; lse[N,H,T] f32 = log sum exp of the scaled scores (NULL when not needed).
int op_attention_fwd(struct context *c, struct tensor *o, struct tensor *lse,
                     const struct tensor *qkv, int images, int heads);
// dqkv is written; it may not be qkv. delta[N,H,T] f32 is scratch: sum_d do*o.
int op_attention_bwd(struct context *c, struct tensor *dqkv, struct tensor *delta,
                     const struct tensor *dout, const struct tensor *o, const struct tensor *lse,
                     const struct tensor *qkv, int images, int heads);

// LayerNorm per head (affine, eps 1e-6) of the q and k parts; v is copied. out may be in (but the
// backward needs the input). Parameters [hd] f32. stats[M,2*H,2] f32 (mean, 1/std).
int op_qk_norm_fwd(struct context *c, struct tensor *out, struct tensor *stats,
                   const struct tensor *qkv, const struct tensor *wq, const struct tensor *bq,
                   const struct tensor *wk, const struct tensor *bk, int heads);
// Attention of what op_qk_norm_fwd makes of qkv, where that is not wanted itself: qk and stats, as
// there, are scratch; qk may be qkv where that is not wanted any more either. lse as in
// op_attention_fwd, of scores whose q and k are not rounded where a device does all at once.
int op_qk_attention_fwd(struct context *c, struct tensor *o, struct tensor *lse, struct tensor *qk,
                        struct tensor *stats, const struct tensor *qkv, const struct tensor *wq,
                        const struct tensor *bq, const struct tensor *wk, const struct tensor *bk,
                        int images, int heads);
// dqkv is changed in place (gradient of the output in, of the input out).
int op_qk_norm_bwd(struct context *c, struct tensor *dqkv, struct tensor *dwq, struct tensor *dbq,
                   struct tensor *dwk, struct tensor *dbk, const struct tensor *qkv,
                   const struct tensor *stats, const struct tensor *wq, const struct tensor *wk,
                   int heads);

// ---- mixture of experts -------------------------------------------------------------------------

// From logits[M,E] f32: probs[M,E] = softmax; index[M,K] int32 = the K largest, in descending order
// (a tie goes to the lower expert); weight[M,K] = their probabilities, divided by their sum
// (+1e-20) when `renormalise` and K > 1. A row with NaN still gets valid, distinct indices. E <=
// 512, K <= 64.
int op_router_fwd(struct context *c, struct tensor *probs, struct tensor *weight,
                  struct tensor *index, const struct tensor *logits, bool renormalise);

// Sorts the M*K (token, choice) pairs by expert, stable in token order: offsets[E+1];
// slot[M,K] = row of the pair in the sorted order; token[M*K] = the token of each sorted row.
int op_route(struct context *c, struct tensor *offsets, struct tensor *slot, struct tensor *token,
             const struct tensor *index);

// rows[R,D] = x[token[r],:], that is rows[slot[m,k],:] = x[m,:]: token and slot as op_route makes
// them say the same, and devices read the one that suits them.
// Backward: dx[m,:] += sum_k drows[slot[m,k],:]
int op_dispatch_fwd(struct context *c, struct tensor *rows, const struct tensor *x,
                    const struct tensor *token, const struct tensor *slot);
int op_dispatch_bwd(struct context *c, struct tensor *dx, const struct tensor *drows,
                    const struct tensor *slot);

// out[m,:] = sum_k weight[m,k] * rows[slot[m,k],:] (+ shared[m,:] when not NULL)
int op_combine_fwd(struct context *c, struct tensor *out, const struct tensor *rows,
                   const struct tensor *slot, const struct tensor *weight,
                   const struct tensor *shared);
// drows[slot[m,k],:] = weight[m,k] * dout[m,:];
// dweight[m,k] = <dout[m,:], rows[slot[m,k],:]> (f32)
// drows may be rows. dweight and rows are NULL where dweight comes from op_combine_weight_bwd().
int op_combine_bwd(struct context *c, struct tensor *drows, struct tensor *dweight,
                   const struct tensor *dout, const struct tensor *rows,
                   const struct tensor *slot, const struct tensor *weight);
// The same dweight from what op_experts_swiglu_dx() left in dots: rows = h W^T and drows = weight
// dout give <dout[m,:], rows[r,:]> = <drows[r,:] W, h[r,:]> / weight, so that rows need not be
// kept.
int op_combine_weight_bwd(struct context *c, struct tensor *dweight, const struct tensor *dots,
                          const struct tensor *slot, const struct tensor *weight);

// Balance statistics over G groups of M/G rows (G = 1: the whole batch; G = N: per sequence):
// fraction[G,E] = share of the group's choices that fell on e, times E; mean_prob[G,E].
// Balance loss = alpha/G * sum_{g,e} fraction*mean_prob.
int op_balance(struct context *c, struct tensor *fraction, struct tensor *mean_prob,
               const struct tensor *index, const struct tensor *probs);

// dlogits[M,E] f32 from dweight[M,K] (through top-k, renormalisation and softmax) and, where
// `alpha` is not 0, from alpha times the balance loss (fraction[G,E] taken as a constant).
int op_router_bwd(struct context *c, struct tensor *dlogits, const struct tensor *dweight,
                  const struct tensor *probs, const struct tensor *index,
                  const struct tensor *fraction, float alpha, bool renormalise);

// op_router_fwd, op_route and op_balance (unless fraction and mean_prob are NULL) together: all
// that lies between the router's logits and the experts. Two launches where a device has it in one.
int op_router_route(struct context *c, struct tensor *probs, struct tensor *weight,
                    struct tensor *index, struct tensor *offsets, struct tensor *slot,
                    struct tensor *token, struct tensor *fraction, struct tensor *mean_prob,
                    const struct tensor *logits, bool renormalise);

// dw[E,D] f32 += dlogits[M,E]^T h[M,D]: the gradient of the router's weight, where dlogits are f32
// and h ACT. (Written instead of added where the context has fresh_gradients.)
int op_router_dw(struct context *c, struct tensor *dw, const struct tensor *dlogits,
                 const struct tensor *h);

// ---- residual branch and LayerNorm as one -------------------------------------------------------

// What lies between two branches of a block: a branch's gated output joins the residual stream, and
// the next branch starts with LayerNorm and modulation. Each is one pass over memory on devices
// that have it, else the operations above one after the other. Sums and the router's product are
// f32 of values before they are rounded to ACT, where the device does it in one pass.
struct norm_columns {
    int gate, shift, scale; // first columns in mod; they may belong to different layers
};

// Whether for this width D a sum may be left out (NULL): it is then used, in f32, but not kept; and
// whether x and y below may be in two halves (struct tensor: low), so that the stream is f32
// between blocks. The backward pass reads the high halves alone.
bool op_combine_norm_fuses(const struct context *c, int64_t width);

// y[M,D] = x + mod[n, gate+d] z (y may be x; NULL: see above);
// h = LN(y) (1 + mod[n, scale+d]) + mod[n, shift+d]; stats[M,2] f32 of LN;
// logits[M,E] f32 = h router_w^T, router_w[E,D] f32 (both NULL: no router).
int op_residual_norm_fwd(struct context *c, struct tensor *y, struct tensor *h,
                         struct tensor *stats, struct tensor *logits, const struct tensor *x,
                         const struct tensor *z, const struct tensor *mod, struct norm_columns at,
                         const struct tensor *router_w);

// z[m,:] = sum_k weight[m,k] rows[slot[m,k],:] (+ shared[m,:] when not NULL; z NULL: see above);
// then y, h and stats as above, where x + mod[n, gate1+d] z1 takes the place of x (z1 NULL: x
// itself).
int op_combine_norm_fwd(struct context *c, struct tensor *y, struct tensor *h, struct tensor *stats,
                        struct tensor *z, const struct tensor *x, const struct tensor *z1, int gate1,
                        const struct tensor *rows, const struct tensor *slot,
                        const struct tensor *weight, const struct tensor *shared,
                        const struct tensor *mod, struct norm_columns at);

// Backward of either. First dh[M,D] is completed: + sum_k drows[slot[m,k],:] (both NULL: none)
// + dlogits[M,E] router_w (both NULL: none). Then dx += the backward of h from y and stats, and the
// shift and scale columns of dmod are written. Then, unless dz is NULL, with the new dx:
// dz = mod[n, gate+d] dx, dmod[n, gate+d] = sum over the image's rows of dx z (dz may be z).
// dh is scratch afterwards.
int op_norm_gate_bwd(struct context *c, struct tensor *dx, struct tensor *dz, struct tensor *dmod,
                     struct tensor *dh, const struct tensor *drows, const struct tensor *slot,
                     const struct tensor *dlogits, const struct tensor *router_w,
                     const struct tensor *y, const struct tensor *stats, const struct tensor *z,
                     const struct tensor *mod, struct norm_columns at);

// ---- diffusion ----------------------------------------------------------------------------------

// What training at an image's t takes, a row of `at` [N,TIME_COLUMNS] f32: see op_diffuse,
// op_ddpm_loss.
enum {
    TIME_SIGNAL,
    TIME_NOISE,
    TIME_RANGE, // ln of the step's largest variance over its smallest
    TIME_GAIN,  // deviations of the smallest variance that one unit of noise moves the step's mean by
    TIME_BIN,   // half the width of a grey value, 1/255, in these deviations at t = 0; 0 elsewhere
    TIME_COLUMNS
};
// xt = at[n,SIGNAL] x + at[n,NOISE] noise; all [N,C,H,W] f32
int op_diffuse(struct context *c, struct tensor *xt, const struct tensor *x,
               const struct tensor *noise, const struct tensor *at);
// Rectified flow: loss[n] = mean over (C,H,W) of (out[:, :C] - (noise - x))^2; out [N,Co,H,W] f32,
// Co >= C. dout [N,Co,H,W] = scale * d loss[n] / d out; channels from C on get zero. dout may be
// NULL.
int op_flow_loss(struct context *c, struct tensor *loss, struct tensor *dout,
                 const struct tensor *out, const struct tensor *x, const struct tensor *noise,
                 float scale);
// DDPM's hybrid loss (Nichol & Dhariwal 2021, unscaled): loss[n] = mse + vb, terms [2,N] their
// values. mse = mean of d^2, d = out[:, :C] - noise. vb, where out has 2C channels, else 0: the
// step's term of the variational bound, mean over (C,H,W) in bits, with w = out[:, C:], h = RANGE
// (w + 1) / 2 and d taken as a constant (RANGE, GAIN, BIN of the image's row of `at`):
//   BIN == 0   KL of the posterior and the model's normal: (h - 1 + exp(-h) (1 + (GAIN d)^2)) / 2
//   BIN > 0    t = 0: -ln of the model's probability of the grey value of x, between
//              exp(-h/2) (GAIN d -+ BIN) (below -0.999 and above 0.999 to the end), at least 1e-12,
//              the normal distribution being approximated by
//              (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) / 2
// dout [N,Co,H,W] = scale * d loss[n] / d out; may be NULL.
int op_ddpm_loss(struct context *c, struct tensor *loss, struct tensor *terms, struct tensor *dout,
                 const struct tensor *out, const struct tensor *x, const struct tensor *noise,
                 const struct tensor *at, float scale);
// A sampler's update with classifier-free guidance. out[2N,Co,H,W]: rows n conditional, N+n
// unconditional (or out[N,...]: no guidance). v = vu + k[CFG] (vc - vu) on channels < `channels` of
// all Co, vc elsewhere; v is out's first C channels, w the C after them.
//   where k[CLIP_V]:  v = k[CLIP_Z] z + k[CLIP_V] v clipped to [-1,1]
//   z[N,C,H,W] = k[Z] z + k[V] v + k[KEPT] kept + k[NOISE] exp(k[SPREAD] (w + 1)) noise
//   kept       = k[KEEP_Z] z + k[KEEP_V] v, of the z before
// Coefficients are in device memory, k [STEP_COUNT] f32, so that a recorded update is replayed with
// others. kept and noise [N,C,H,W] may be NULL; where k[KEPT], k[NOISE] or k[SPREAD] is 0, kept,
// noise or w is not read.
enum {
    STEP_Z,
    STEP_V,
    STEP_KEPT,
    STEP_KEEP_Z,
    STEP_KEEP_V,
    STEP_CFG,
    STEP_CLIP_Z,
    STEP_CLIP_V,
    STEP_NOISE,
    STEP_SPREAD,
    STEP_COUNT
};
int op_sample_step(struct context *c, struct tensor *z, struct tensor *kept,
                   const struct tensor *out, const struct tensor *noise, const struct tensor *k,
                   int channels);

// Standard normal noise: element i of out (f32) depends on (seed, stream, first + i) alone, and has
// the same bits on every device and on the host (runtime/rng.h rng_normal). first: a multiple of 4.
int op_normal(struct context *c, struct tensor *out, uint64_t seed, uint64_t stream,
              uint64_t first);
// The same for a batch, where the stream is an image's own: element i of row n of out[N,...] is
// that of (seed, stream + image[n], i); image [N] int32, and the stream's low 32 bits are 0.
int op_normal_images(struct context *c, struct tensor *out, const struct tensor *image,
                     uint64_t seed, uint64_t stream);

// ---- optimiser ----------------------------------------------------------------------------------

// The step's scalars live on the device, so that no step waits for the host.
enum control {
    CONTROL_NORM2,   // out: sum of squares of all gradients (unscaled)
    CONTROL_SCALE,   // factor on gradients: clip * 1, 0 for a skipped step
    CONTROL_RATE,    // learning rate of this step
    CONTROL_BIAS1,   // 1 - beta1^t, t = applied steps
    CONTROL_BIAS2,   // 1 - beta2^t
    CONTROL_EMA,     // EMA decay of this step, warmed up
    CONTROL_SKIPPED, // 1 when this step's loss or gradient was not finite, else 0
    CONTROL_SUM,     // mean loss of the step
    CONTROL_COUNT
};

// double: 1 - beta must keep its digits (1 - 0.999f is off by 1e-5).
struct adamw {
    double rate, beta1, beta2, eps, decay; // 1e-4, 0.9, 0.999, 1e-8, 0
    double clip;                           // gradient norm to clip to; 0: no clipping
    int warmup;                            // steps of linear warm-up of the rate
    double ema;                            // EMA decay (0.9999), warmed up as min(ema, (1+t)/(10+t))
};

// control[CONTROL_NORM2] (+)= sum of squares of g (deterministic order)
int op_norm2(struct context *c, struct tensor *control, const struct tensor *g, bool accumulate);
// Fills control from norm2, the per-image losses [N] and the hyperparameters. counts [2] int32 on
// the device: steps applied, steps skipped; a step whose loss or norm is not finite is not applied.
int op_adamw_control(struct context *c, struct tensor *control, struct tensor *counts,
                     const struct tensor *loss, const struct adamw *a);
// One pass over one slab of parameters: w, m, v, ema updated from g and control; nothing is touched
// when the step is skipped. ema may be NULL. All f32 [count], low NULL; or w is bf16 and low
// [count] the 16 bits beside it that make it f32 (struct tensor), not on CPU devices.
int op_adamw(struct context *c, struct tensor *w, struct tensor *m, struct tensor *v,
             struct tensor *ema, const struct tensor *g, const struct tensor *control,
             struct tensor *low, const struct adamw *a);

// For updates tensor by tensor while gradients are still being computed: marks the step as skipped
// from here on when CONTROL_NORM2, the sum so far, is not finite.
int op_adamw_guard(struct context *c, struct tensor *control, struct tensor *counts);

// high (bf16) = w (f32) rounded to nearest, ties to even; or, where low is not NULL, w in two
// halves (struct tensor), ties away from zero; same count
int op_round(struct context *c, struct tensor *high, struct tensor *low, const struct tensor *w);
// out (f32) = high (bf16), with the low halves where low is not NULL; same count
int op_widen(struct context *c, struct tensor *out, const struct tensor *high,
             const struct tensor *low);

// ---- pooling and resampling of images -----------------------------------------------------------

// Images as matrices of pixels [N*H*W, C] (ACT), rows in the order n, y, x.
// y[:, column..column+C) = the largest value, or the mean, over the pixels of x that lie in a
// window of size x size; a window's pixels outside of the image count for nothing (in the mean,
// too). y is [N*H'*W', columns], H' = pool_height(), W' = pool_width().
struct pool {
    int images, height, width; // of x
    int size, stride, padding; // padding <= size / 2
    bool maximum;
};
int64_t pool_height(const struct pool *p);
int64_t pool_width(const struct pool *p);
int op_pool(struct context *c, struct tensor *y, int64_t column, const struct tensor *x,
            const struct pool *p);

// out[N,C] (f32) = the mean over an image's pixels of x[N*P,C]
int op_pixel_mean(struct context *c, struct tensor *out, const struct tensor *x);

// out[N*S*S,3] (ACT) = scale * v + shift, v linear between 2 x 2 pixels of 8-bit RGB in `bytes`
// (I32, raw). taps[N,2,S,3] int32 give, for line y of image n ([n,0,y]) and column x ([n,1,x]), the
// place of two neighbours in bytes, that of a line and of a pixel within it, and the bits of the
// f32 weight of the second. So images of a batch may differ in size.
int op_resample(struct context *c, struct tensor *out, const struct tensor *bytes,
                const struct tensor *taps, float scale, float shift);

#endif
