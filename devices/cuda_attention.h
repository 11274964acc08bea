// Attention of the CUDA backend: accelerate()'s operations of that name (device.h has their
// arguments). Each returns 0, a negative code, or NOT_MINE.
#ifndef DITMOE_CUDA_ATTENTION_H
#define DITMOE_CUDA_ATTENTION_H

#include "devices/accelerate.h"
#include "devices/cuda_tuned.h"

int cuda_attention_fwd(struct stream *s, const union arg *args);
int cuda_qk_attention_fwd(struct stream *s, const struct qk_attention *args);
int cuda_attention_bwd(struct stream *s, const union arg *args);

#endif
