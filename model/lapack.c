#include "model/lapack.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Fortran: everything by address.
typedef void syrk_function(const char *uplo, const char *trans, const int *n, const int *k,
                           const double *alpha, const double *a, const int *lda, const double *beta,
                           double *c, const int *ldc);
typedef void gemm_function(const char *transa, const char *transb, const int *m, const int *n,
                           const int *k, const double *alpha, const double *a, const int *lda,
                           const double *b, const int *ldb, const double *beta, double *c,
                           const int *ldc);
typedef void syevd_function(const char *jobz, const char *uplo, const int *n, double *a,
                            const int *lda, double *w, double *work, const int *lwork, int *iwork,
                            const int *liwork, int *info);

static struct {
    syrk_function *syrk;
    gemm_function *gemm;
    syevd_function *syevd;
} library;

static pthread_once_t once = PTHREAD_ONCE_INIT;

// ISO C has no conversion from an object's address to a function's; POSIX promises that it works.
static int find(void *handle, const char *name, void *to)
{
    void *symbol = dlsym(handle, name);
    memcpy(to, &symbol, sizeof symbol);
    return symbol != NULL;
}

static void open_library(void)
{
    static const char *const names[] = {"liblapack.so.3", "libopenblas.so.0", "libopenblas.so",
                                        "liblapack.so", "libmkl_rt.so.2"};
    for (size_t i = 0; i < sizeof names / sizeof *names && !library.syevd; i++) {
        void *handle = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
        if (!handle)
            continue;
        if (!find(handle, "dsyrk_", &library.syrk) || !find(handle, "dgemm_", &library.gemm) ||
            !find(handle, "dsyevd_", &library.syevd))
            library.syevd = NULL;
    }
}

int lapack_open(void)
{
    pthread_once(&once, open_library);
    if (library.syevd)
        return 0;
    return fail(ERR_NODEVICE, "there is no LAPACK here, which these statistics need: install "
                              "libopenblas0-pthread or liblapack3");
}

void lapack_syrk(int n, int k, const double *a, double *c)
{
    const double one = 1;
    library.syrk("U", "N", &n, &k, &one, a, &n, &one, c, &n);
}

void lapack_gemm(int m, int n, int k, int transpose, const double *a, const double *b, double *c)
{
    const double one = 1, zero = 0;
    library.gemm(transpose ? "T" : "N", "N", &m, &n, &k, &one, a, transpose ? &k : &m, b, &k, &zero,
                 c, &m);
}

int lapack_eigen(int n, int vectors, double *a, double *values)
{
    const char *job = vectors ? "V" : "N";
    const int ask = -1;
    int info = 0, integers;
    double doubles;
    library.syevd(job, "U", &n, a, &n, values, &doubles, &ask, &integers, &ask, &info);
    const int room = (int)doubles;
    double *work = malloc(sizeof *work * (size_t)room);
    int *more = malloc(sizeof *more * (size_t)integers);
    if (work && more)
        library.syevd(job, "U", &n, a, &n, values, work, &room, more, &integers, &info);
    const int code = !work || !more ? fail(ERR_NOMEM, "out of memory for %d eigenvalues", n)
                     : info != 0 ? fail(ERR_INPUT, "the eigenvalues of a covariance were not found")
                                 : 0;
    free(work);
    free(more);
    return code;
}
