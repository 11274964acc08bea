// Counter-based random numbers (Philox 4x32-10, Salmon et al. 2011): every number is a pure
// function of (seed, stream, index), the same on the host and on every device, so a run needs no
// generator state: seed and step are enough to continue it.
#ifndef DITMOE_RNG_H
#define DITMOE_RNG_H

#include <stddef.h>
#include <stdint.h>

// Streams: what a number is for, in the top byte; the rest is the caller's (a step, a tensor...).
enum rng_purpose {
    RNG_INIT = 1,   // initial weights; low bits: parameter index
    RNG_SHUFFLE,    // order of the data; low bits: epoch
    RNG_FLIP,       // horizontal flips; low bits: position in the run
    RNG_TIME,       // t; low bits: micro-step
    RNG_NOISE,      // training noise; low bits: micro-step
    RNG_DROP,       // label dropout; low bits: micro-step
    RNG_SAMPLE,     // sampling noise; low bits: image number
    RNG_STEP,       // noise of a sampler's passes; low bits: pass (24 bits), image number (32 bits)
    RNG_LATENT,     // samples of stored latents; low bits: position in the run
    RNG_CLASS,      // classes of samples, where they are drawn; index: image number
};
static inline uint64_t rng_stream(enum rng_purpose purpose, uint64_t low)
{
    return (uint64_t)purpose << 56 | (low & 0xffffffffffffffu);
}

// Four 32-bit words for (seed, stream, block): key = seed, counter = (block, stream).
void rng_philox(uint64_t seed, uint64_t stream, uint64_t block, uint32_t out[4]);

uint32_t rng_u32(uint64_t seed, uint64_t stream, uint64_t index);     // word index%4 of block index/4
float rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);    // (0,1): (u32>>9 + 0.5) / 2^23

// Standard normal, bit for bit as op_normal gives it: Box and Muller's method on words 0,1 and 2,3
// of block index/4. The tails end at 6.8. rng_normal_fill() gives out[i] = element first+i and
// computes every block once.
float rng_normal(uint64_t seed, uint64_t stream, uint64_t index);
void rng_normal_fill(uint64_t seed, uint64_t stream, uint64_t first, float *out, size_t count);

#endif
