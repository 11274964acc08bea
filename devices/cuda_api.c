#include "devices/cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the driver ---------------------------------------------------------------------------------

static struct cuda_api driver;
static char driver_wrong[160]; // what is wrong with it
static bool driver_good;

// ISO C has no cast from void * to a pointer to a function; POSIX lets the bytes be copied.
bool cuda_symbol(void *library, const char *symbol, void *field)
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
    if (!cuda_symbol(library, symbol, &driver.field)) {                                   \
        snprintf(driver_wrong, sizeof driver_wrong,                                \
                 "the NVIDIA driver is too old: its libcuda.so.1 has no " symbol); \
        return;                                                                    \
    }
    CUDA_FUNCTIONS(FIND)
#undef FIND
#define FIND_OPTIONAL(field, function, symbol, parameters) cuda_symbol(library, symbol, &driver.field);
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
static char cublaslt_says[128];

static void *open_first(const char *const *names)
{
    void *library = NULL;
    for (; *names && !library; names++)
        library = dlopen(*names, RTLD_NOW | RTLD_LOCAL);
    return library;
}

// "cuBLASLt 13.1.0" of 130100
static void name_version(void *library)
{
    size_t (*version)(void);
    if (cuda_symbol(library, "cublasLtGetVersion", &version)) {
        const size_t number = version();
        snprintf(cublaslt_says, sizeof cublaslt_says, "cuBLASLt %zu.%zu.%zu", number / 10000,
                 number / 100 % 100, number % 100);
    } else {
        snprintf(cublaslt_says, sizeof cublaslt_says, "cuBLASLt");
    }
}

// DITMOE_CUBLASLT: 0, no library; else the file to open instead of the usual ones.
static void *find_cublaslt(void)
{
    static const char *const usual[] = {
        "libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so.13",
        "/usr/local/cuda/lib64/libcublasLt.so.12", NULL};
    static const char *const old[] = {"libcublasLt.so.11", "libcublasLt.so.10", NULL};
    const char *asked = getenv("DITMOE_CUBLASLT"), *why = "no cuBLASLt 12 or 13 found";
    void *library = NULL;
    if (asked && !strcmp(asked, "0"))
        why = "cuBLASLt is switched off by DITMOE_CUBLASLT=0";
    else if (asked && !(library = open_first((const char *const[]){asked, NULL})))
        why = "the file named by DITMOE_CUBLASLT cannot be opened";
    else if (!asked && !(library = open_first(usual)) && open_first(old))
        why = "cuBLASLt is too old: 12 or 13 is wanted";
    if (!library)
        snprintf(cublaslt_says, sizeof cublaslt_says, "%s; own kernels multiply matrices", why);
    return library;
}

static void open_cublaslt(void)
{
    const char *missing = NULL;
    void *library = find_cublaslt();
    if (!library)
        return;
#define FIND(field, function, parameters)              \
    if (!cuda_symbol(library, #function, &cublaslt.field)) \
        missing = #function;
    CUBLASLT_FUNCTIONS(FIND)
#undef FIND
    cublaslt_good = !missing;
    if (missing)
        snprintf(cublaslt_says, sizeof cublaslt_says,
                 "cuBLASLt is too old: it has no %s; own kernels multiply matrices", missing);
    else
        name_version(library);
}

static void open_cublaslt_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_cublaslt);
}

const struct cublaslt_api *cublaslt_library(void)
{
    open_cublaslt_once();
    return cublaslt_good ? &cublaslt : NULL;
}

const char *cublaslt_text(void)
{
    open_cublaslt_once();
    return cublaslt_says;
}
