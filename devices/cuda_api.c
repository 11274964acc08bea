#include "devices/cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

// ---- the driver ---------------------------------------------------------------------------------

static struct cuda_api driver;
static char driver_wrong[160]; // what is wrong with it
static bool driver_good;

// ISO C has no cast from void * to a pointer to a function; POSIX lets the bytes be copied.
static bool find(void *library, const char *symbol, void *field)
{
    void *address = dlsym(library, symbol);
    memcpy(field, &address, sizeof address);
    return address != NULL;
}

static void open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return;
#define FIND(field, function, symbol, parameters)                                  \
    if (!find(library, symbol, &driver.field)) {                                   \
        snprintf(driver_wrong, sizeof driver_wrong,                                \
                 "the NVIDIA driver is too old: its libcuda.so.1 has no " symbol); \
        return;                                                                    \
    }
    CUDA_FUNCTIONS(FIND)
#undef FIND
#define FIND_OPTIONAL(field, function, symbol, parameters) find(library, symbol, &driver.field);
    CUDA_OPTIONAL_FUNCTIONS(FIND_OPTIONAL)
#undef FIND_OPTIONAL
    const char *name = "an unknown error";
    cuda_result code = driver.init(0);
    driver_good = code == CUDA_OK;
    if (driver_good || code == CUDA_NO_DEVICE)
        return;
    driver.error_name(code, &name);
    snprintf(driver_wrong, sizeof driver_wrong,
             "the NVIDIA driver does not start: cuInit failed: %s (%u)", name, code);
}

const struct cuda_api *cuda_driver(const char **why)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_driver);
    *why = driver_wrong;
    return driver_good ? &driver : NULL;
}

// ---- cuBLASLt -----------------------------------------------------------------------------------

static struct cublaslt_api cublaslt;
static bool cublaslt_good;

static void open_cublaslt(void)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12",
                                        "/usr/local/cuda/lib64/libcublasLt.so.13",
                                        "/usr/local/cuda/lib64/libcublasLt.so.12"};
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return;
    cublaslt_good = true;
#define FIND(field, function, parameters) \
    cublaslt_good = find(library, #function, &cublaslt.field) && cublaslt_good;
    CUBLASLT_FUNCTIONS(FIND)
#undef FIND
}

const struct cublaslt_api *cublaslt_library(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_cublaslt);
    return cublaslt_good ? &cublaslt : NULL;
}
