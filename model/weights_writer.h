// Writes weights as safetensors or as a .pt that torch.load(weights_only=True) and the published
// code read. Names, types and shapes first, then the data in that order and in pieces of any size,
// so that a model never exists twice in memory; the file appears whole or not at all
// (model/atomic_file.h).
//
// A .pt of a model is {"model": {...}, "ema": {...}, KEY: text of metadata...}: tensors named
// "ema.NAME" go into `ema`, and what it lacks of `model` (everything, where the file has one set of
// weights) is there too, as the same storage. `bare`: the dict of tensors itself, without metadata.
// Storages are aligned to 64 bytes, so that the file can be mapped.
#ifndef DITMOE_WEIGHTS_WRITER_H
#define DITMOE_WEIGHTS_WRITER_H

#include "model/safetensors.h"

enum weights_format { WEIGHTS_AS_SAFETENSORS, WEIGHTS_AS_TORCH, WEIGHTS_AS_TORCH_BARE };

struct weights_writer;

// As safetensors_create() and what follows it: create, declare and set_metadata, begin, write,
// commit; abort after an error.
int weights_create(const char *path, enum weights_format format, struct weights_writer **out);
int weights_declare(struct weights_writer *w, const char *name, enum st_dtype dtype, int ndim,
                    const int64_t *shape);
int weights_set_metadata(struct weights_writer *w, const char *key, const char *value);
int weights_begin(struct weights_writer *w);
int weights_write(struct weights_writer *w, const void *data, size_t bytes);
int weights_commit(struct weights_writer *w);
void weights_abort(struct weights_writer *w); // NULL is allowed; keeps the error message

// `count` numbers as f32, f16 or bf16, rounded to nearest even. ERR_INPUT where one is too large
// for f16, which has no room above 65504.
int weights_round(const float *from, int64_t count, enum st_dtype to, void *out);

#endif
