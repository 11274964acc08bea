// Checkpoints as DeepSpeed's save_checkpoint() writes them: DIR/latest names a step's directory,
// and in it lie mp_rank_00_model_states.pt and, with ZeRO stage 1 or 2, a file a rank of optimizer
// state ([bf16_|fp16_]zero_pp_rank_N_mp_rank_00_optim_states.pt), whose master weights are f32.
//
// The model's file holds weights in the type of training, and the names and shapes of the
// parameters of each optimizer group in their order; a group's parameters, flattened one after the
// other, are cut into as many parts as there are ranks (Rajbhandari et al. 2020). Here each
// parameter becomes its pieces in those parts, so nothing is copied or doubled. What is in no group
// (buffers, frozen parameters) is taken as the model's file has it.
//
// ZeRO 3 is read after zero_to_fp32.py, which DeepSpeed puts beside its files, has joined it
// (model/weights_file.h opens what that writes).
#ifndef DITMOE_DEEPSPEED_H
#define DITMOE_DEEPSPEED_H

#include <stdbool.h>

#include "model/safetensors.h"

bool deepspeed_is(const char *directory);
int deepspeed_open(const char *directory, struct safetensors **out);

#endif
