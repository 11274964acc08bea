// Opens what holds weights, whatever wrote it, behind the face of model/safetensors.h:
//
//   FILE.safetensors                 safetensors
//   FILE.pt, .pth, .bin              torch.save, both forms (model/torch_file.h)
//   FILE.index.json                  shards of either, as Hugging Face and zero_to_fp32 write them
//   DIRECTORY with an index file, or with model.safetensors, diffusion_pytorch_model.safetensors
//                or pytorch_model.bin
//   DIRECTORY that DeepSpeed wrote   (with `latest`, or one of its steps): ZeRO 0, 1 and 2
//
// Files are told apart by what they begin with, not by their names. Errors are one line that names
// the file.
#ifndef DITMOE_WEIGHTS_FILE_H
#define DITMOE_WEIGHTS_FILE_H

#include "model/safetensors.h"

int weights_file_open(const char *path, struct safetensors **out);

// One file, no directory and no index.
int weights_file_open_single(const char *path, struct safetensors **out);

#endif
