// ditmoe sample --count N --npz FILE: as many images as an evaluation needs, in the form of ADM's
// evaluator and of 'ditmoe eval fid': arr_0, uint8 [N,H,W,3], and arr_1, int64 [N], their classes.
//
// Image i is a function of seed and i alone: its class and its noise depend on nothing else. Images
// go to FILE.part as they are made, so that a run that was stopped goes on where it was; when all
// are there FILE appears whole.
#ifndef DITMOE_SAMPLE_NPZ_H
#define DITMOE_SAMPLE_NPZ_H

#include "tools/decoder.h"
#include "tools/draw.h"

struct npz_settings {
    const char *npz;
    int count, balanced;
};
extern const struct option_spec npz_option_list[];

// `classes` [class_count]: those to choose from.
int sample_npz(const struct npz_settings *o, const struct draw_options *draw,
               const struct vae_settings *vae, const struct checkpoint *file, const int *classes,
               int class_count);

#endif
