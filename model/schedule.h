// How samplers go from noise (t = 1) to an image (t = 0) through the velocity field of rectified
// flow: in passes, each one evaluation v of the network at (z, t) and then an update that is linear
// in z, v and one kept image. All in double and free of any model, so that the rules can be tested
// alone.
//
//   euler   one pass a step: z - dt v
//   heun    two passes a step, the second where the first one's step led: the mean of both slopes
//   dpm++   DPM-Solver++(2M) (Lu et al. 2022) with alpha = 1-t, sigma = t and
//           lambda = log(alpha/sigma): one pass a step, on the predicted image x0 = z - t v,
//           extrapolated from the pass before
#ifndef DITMOE_SCHEDULE_H
#define DITMOE_SCHEDULE_H

#include <stdbool.h>

enum sampler_kind { SAMPLER_EULER, SAMPLER_HEUN, SAMPLER_DPM };

// z' = z z + v v + kept kept; kept' = keep_z z + keep_v v. Where `kept` is 0, nothing is kept yet.
struct pass {
    double t; // where the network is evaluated
    double z, v, kept, keep_z, keep_v;
};

int schedule_passes(enum sampler_kind kind); // passes a step
bool schedule_keeps(enum sampler_kind kind); // is there a kept image?

// Pass number `index` of steps * schedule_passes(kind); the steps are equal in t.
struct pass schedule_pass(enum sampler_kind kind, int steps, int index);

#endif
