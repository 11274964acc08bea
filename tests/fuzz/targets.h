// The readers of files from elsewhere, each fed with bytes: what a fuzzer calls, and what
// tests/fuzz_test.c calls with the files of tests/fuzz/corpus/NAME. A target reads to the end
// whatever opens; memory and time are for whoever calls it to watch.
#ifndef DITMOE_FUZZ_TARGETS_H
#define DITMOE_FUZZ_TARGETS_H

#include <stddef.h>
#include <stdint.h>

#define FUZZ_TARGETS(X)                                                                           \
    X(torch)       /* .pt, both forms: zip, pickle, views (model/torch_file.h) */                 \
    X(pickle)      /* a pickle by itself (model/pickle.h) */                                      \
    X(safetensors) /* model/safetensors.h */                                                      \
    X(index)       /* model.safetensors.index.json (model/sharded.h) */                           \
    X(checkpoint)  /* metadata and configuration of a checkpoint, as JSON (model/checkpoint.h) */ \
    X(npz)         /* model/npz.h */                                                              \
    X(png)         /* model/image.h */                                                            \
    X(jpeg)                                                                                       \
    X(idx) /* MNIST-like files (model/data.h) */

// Each returns 0, as libFuzzer wants it.
#define X(name) int fuzz_##name(const uint8_t *data, size_t size);
FUZZ_TARGETS(X)
#undef X

#endif
