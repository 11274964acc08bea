// Writing PyTorch's .pt, the zip form; the .pt half of model/weights_writer.h.
#ifndef DITMOE_TORCH_WRITE_H
#define DITMOE_TORCH_WRITE_H

#include "model/safetensors.h"

struct torch_writer;

int torch_create(const char *path, bool bare, struct torch_writer **out);
int torch_declare(struct torch_writer *w, const char *name, enum st_dtype dtype, int ndim,
                  const int64_t *shape);
int torch_set_metadata(struct torch_writer *w, const char *key, const char *value);
int torch_begin(struct torch_writer *w);
int torch_write(struct torch_writer *w, const void *data, size_t bytes);
int torch_commit(struct torch_writer *w);
void torch_abort(struct torch_writer *w);

#endif
