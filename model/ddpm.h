// DDPM as the published models were trained (Ho et al. 2020, Nichol & Dhariwal 2021): 1000 steps,
// betas linear from 1e-4 to 2e-2, t = 0..999 where 999 is noise, x_t = sqrt(ab) x + sqrt(1-ab) e
// with ab = alpha_bar(t) = prod over s <= t of (1 - beta_s). The network predicts e and, in a
// second half of its output, where between its two bounds the logarithm of each step's variance
// lies. In double and free of any model.
#ifndef DITMOE_DDPM_H
#define DITMOE_DDPM_H

enum { DDPM_STEPS = 1000 };

void ddpm_alpha_bars(double out[DDPM_STEPS]);

// Which of the 1000 steps a shorter process keeps, by the rule of guided-diffusion: "N", or "A,B,C"
// for A steps of the first third, B of the second and C of the last; "ddimN": N steps a whole
// number apart, from 0 on. Fills `used` in ascending order and returns how many, or ERR_INPUT.
int ddpm_respace(const char *text, int used[DDPM_STEPS]);

// Step i of a process with the given alpha_bar[steps]: the variance of x_{i-1} given x_i lies
// between exp(log_min), that of the posterior given x (at i = 0 that of i = 1: its own is 0), and
// exp(log_max), the step's beta.
struct ddpm_variance {
    double log_min, log_max;
};
struct ddpm_variance ddpm_variance(const double *alpha_bar, int steps, int i);

// What training at t = 0..999 (whole numbers) takes: see op_ddpm_loss(). at [count,TIME_COLUMNS].
void ddpm_training(const float *t, int count, float *at);

#endif
