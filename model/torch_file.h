// PyTorch's .pt and .pth, as torch.save writes them: the zip form and the one before PyTorch 1.6.
// The file is mapped, nothing of it is executed (model/pickle.h), and its tensors get the face of
// model/safetensors.h: those of `model` under their names, those of `ema` as "ema.NAME", as in a
// checkpoint; a file with neither is the dict of tensors itself.
//
// Views of any stride and shared storages are read; one that repeats elements (an expanded tensor)
// is refused, as its size would not be bounded by the file's.
#ifndef DITMOE_TORCH_FILE_H
#define DITMOE_TORCH_FILE_H

#include <stdbool.h>

#include "model/safetensors.h"

// Whether the file begins as one of the two forms does.
bool torch_file_is(const char *path);
int torch_file_open(const char *path, struct safetensors **out);

#endif
