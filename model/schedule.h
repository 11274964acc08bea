// How samplers go from noise to an image: in passes, each one answer v of the network at (z, t) and
// then an update that is linear in z, v, one kept image and fresh noise. All in double and free of
// any model, so that the rules can be tested alone.
//
// Both families of models are the same to a sampler: z = alpha x + sigma e, and the answer gives
// the image x0 and the noise e at z:
//
//   rectified flow   alpha = 1-t, sigma = t           x0 = z - t v, e = z + (1-t) v
//                    steps equal in t
//   DDPM             alpha = sqrt(ab), sigma = sqrt(1-ab)   x0 = (z - sigma v) / alpha, e = v
//                    steps by the published respacing of the 1000 (model/ddpm.h)
//
//   ddim    z' = alpha' x0 + sqrt(sigma'^2 - s^2) e + s noise, s = eta times the deviation of z'
//           given z and x0 (Song et al. 2021)
//   ddpm    ancestral: the mean of ddim with eta 1; deviation as learned, or that of beta where the
//           model has learned none, or of ddim with eta 1 for rectified flow
//   euler   ddim with eta 0: Euler's rule in t on v (rectified flow), in sigma/alpha on e (DDPM)
//   heun    two passes a step, the second where the first one's step led: the mean of both slopes
//           of the same equation; for DDPM the last step, to where no network answers, is Euler's
//   dpm++   DPM-Solver++(2M) (Lu et al. 2022): one pass a step, on x0, extrapolated in
//           lambda = log(alpha/sigma) from the pass before
#ifndef DITMOE_SCHEDULE_H
#define DITMOE_SCHEDULE_H

#include <stdbool.h>

#include "model/config.h"
#include "model/ddpm.h"

enum sampler_kind { SAMPLER_EULER, SAMPLER_HEUN, SAMPLER_DPM, SAMPLER_DDIM, SAMPLER_DDPM };

struct schedule {
    enum diffusion diffusion;
    enum sampler_kind kind;
    int steps;
    double eta;                   // of ddim
    bool learned;                 // DDPM: the variance is in the network's answer
    bool clip;                    // x0 is clipped to [-1,1] in every pass
    int used[DDPM_STEPS];         // [steps] DDPM: t of the steps, ascending
    double alpha_bar[DDPM_STEPS]; // [steps] DDPM: there
};

// z' = z z + v v + kept kept + noise exp(spread (w + 1)) e; kept' = keep_z z + keep_v v, where w is
// the answer's second half and e fresh noise. Where `kept` is 0, nothing is kept yet. With clip_v,
// v stands for the image clip_z z + clip_v v, clipped to [-1,1], in place of the answer.
struct pass {
    double t; // where the network is evaluated: what it takes for t
    double z, v, kept, keep_z, keep_v, clip_z, clip_v, noise, spread;
    bool ends; // a step
};

// Equal steps, with DDPM as by the respacing "STEPS". ERR_INPUT where there are too many.
int schedule_init(struct schedule *s, enum diffusion diffusion, enum sampler_kind kind, int steps);
// Then, for DDPM: other steps, as ddpm_respace() has it.
int schedule_respace(struct schedule *s, const char *text);

int schedule_passes(const struct schedule *s);  // of the network in all
bool schedule_keeps(const struct schedule *s);  // is there a kept image?
bool schedule_random(const struct schedule *s); // does any pass take noise?

struct pass schedule_pass(const struct schedule *s, int index);

#endif
