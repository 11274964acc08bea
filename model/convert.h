// Weights from one format to another, in pieces: memory does not grow with the model. Moments and
// the state of training are left out.
#ifndef DITMOE_CONVERT_H
#define DITMOE_CONVERT_H

#include "model/checkpoint.h"
#include "model/weights_writer.h"

// What to write of a model: auto: the model's weights and their average, as far as there are both;
// else the one set asked for, as the weights of the new file. dtype < 0: as they are.
int convert_model(const struct checkpoint *from, enum weights_choice which, int dtype,
                  const char *path, enum weights_format format);

// Any file's tensors, under their names.
int convert_tensors(const struct safetensors *from, int dtype, const char *path,
                    enum weights_format format);

#endif
