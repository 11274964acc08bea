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

// ---- for readers that look into the pickle (model/deepspeed.c) ----------------------------------

struct torch_file;
struct pickle_value;

int torch_file_parse(const char *path, struct torch_file **out);
void torch_file_close(struct torch_file *f); // NULL is allowed
const struct pickle_value *torch_file_root(const struct torch_file *f);

// A PICKLE_TENSOR as the tensor `name`; anything else, or a view that leaves its storage, is
// ERR_INPUT. Messages do not name the file.
int torch_file_tensor(const struct torch_file *f, const struct pickle_value *v, const char *name,
                      struct st_tensor *out);

// A key of a dict as a name: ERR_INPUT unless it can be one; its copy, ended by 0, at *names, which
// moves behind it.
int torch_name_check(const struct pickle_value *key);
const char *torch_name_copy(const char *prefix, const struct pickle_value *key, char **names);

// Closes f but for its mapping, which goes with `tensors` and `names` into *out, as in
// safetensors_adopt().
int torch_file_finish(struct torch_file *f, const char *path, struct st_tensor *tensors, int count,
                      char *names, struct safetensors **out);

#endif
