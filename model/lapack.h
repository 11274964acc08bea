// The few routines of BLAS and LAPACK that statistics need, from whatever library the machine has
// (OpenBLAS, the reference one, MKL by its interface), opened when the first of them is wanted:
// nothing else of this program needs one, and an optimised one starts a thread a core.
//
// Matrices are column-major, as there; of symmetric ones the upper triangle is read and written.
#ifndef DITMOE_LAPACK_H
#define DITMOE_LAPACK_H

#include "devices/error.h"

// 0, or ERR_NODEVICE saying what to install. The others may be called after that.
int lapack_open(void);

// c[n,n] += a[n,k] a^T
void lapack_syrk(int n, int k, const double *a, double *c);
// c[m,n] = op(a) b: a is [m,k], or [k,m] where it is to be transposed; b [k,n].
void lapack_gemm(int m, int n, int k, int transpose, const double *a, const double *b, double *c);
// Eigenvalues of the symmetric a[n,n], ascending; with `vectors` a becomes the eigenvectors, a
// column each, else it is scratch.
int lapack_eigen(int n, int vectors, double *a, double *values);

#endif
