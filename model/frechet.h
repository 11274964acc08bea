// The Frechet distance between two sets of feature vectors, each taken as a normal distribution
// (Heusel et al. 2017, FID):
//     |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)
// Means and covariances are summed in double, a batch at a time, so that memory does not depend on
// the number of images.
#ifndef DITMOE_FRECHET_H
#define DITMOE_FRECHET_H

#include <stdint.h>

#include "model/npz.h"

struct gaussian {
    int dim;
    int64_t count;      // images it was made of; 0: not known
    double *mean;       // [dim]
    double *covariance; // [dim,dim], divided by count - 1
};
int gaussian_new(int dim, struct gaussian *out);
void gaussian_free(struct gaussian *g); // also of a zeroed struct

// ---- sums ---------------------------------------------------------------------------------------

struct moments;

// ERR_NODEVICE where there is no LAPACK (model/lapack.h).
int moments_new(int dim, struct moments **out);
void moments_free(struct moments *m); // NULL is allowed
// Adds rows [count,dim]; a value that is not finite is ERR_INPUT.
int moments_add(struct moments *m, const float *rows, int64_t count);
// Mean and covariance of two rows or more.
int moments_finish(struct moments *m, struct gaussian *out);

// ---- distance -----------------------------------------------------------------------------------

// The trace of the root is the sum of the roots of the eigenvalues of R S2 R, where R = S1^1/2:
// real and not negative whatever the ranks, so that singular covariances need no term on their
// diagonals. Its error for singular ones is that of R's small eigenvalues, which are left out.
int frechet_distance(const struct gaussian *a, const struct gaussian *b, double *out);

// ---- statistics files ---------------------------------------------------------------------------

// Arrays `mean` [D] and `covariance` [D,D] of an .npz: "mu", "sigma" as pytorch-fid and ADM have
// them (ADM's of the spatial features: "mu_s", "sigma_s"). `dim`: what D must be.
int gaussian_read(struct npz *z, const char *mean, const char *covariance, int dim,
                  struct gaussian *out);
// Writes such arrays.
int gaussian_write(struct zip_writer *z, const char *mean, const char *covariance,
                   const struct gaussian *g);

#endif
