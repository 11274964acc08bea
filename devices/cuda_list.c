// The CUDA backend: which devices there are, what they say of themselves, and the names of errors.
//
// A device that could not run this build's kernels is not listed; cuda_note() says why.
#include "devices/cuda.h"
#include "devices/cuda_tuned.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

// Set by CMake where there is nvcc: its version (13000 for 13.0) and the lowest architecture (80).
#ifndef DITMOE_CUDA_VERSION
#define DITMOE_CUDA_VERSION 0
#define DITMOE_CUDA_LOWEST 0
#endif

enum { MATRIX_ALIGN = 256 }; // what cuMemAlloc gives, and the widest loads of libraries expect

static char note[256];

// Errors that stay: every later call of the process on the device returns them too.
static bool is_lost(cuda_result code)
{
    static const cuda_result lost[] = {
        CUDA_ECC_UNCORRECTABLE,    CUDA_NVLINK_UNCORRECTABLE, CUDA_CONTAINED,
        CUDA_ILLEGAL_ADDRESS,      CUDA_LAUNCH_TIMEOUT,       CUDA_CONTEXT_IS_DESTROYED,
        CUDA_ASSERT,               CUDA_HARDWARE_STACK_ERROR, CUDA_ILLEGAL_INSTRUCTION,
        CUDA_MISALIGNED_ADDRESS,   CUDA_INVALID_ADDRESS_SPACE, CUDA_INVALID_PC,
        CUDA_LAUNCH_FAILED,        CUDA_UNKNOWN,
    };
    for (size_t i = 0; i < sizeof lost / sizeof lost[0]; i++)
        if (code == lost[i])
            return true;
    return false;
}

int cuda_fail(const struct cuda_api *api, cuda_result code, const char *what)
{
    const char *name = NULL;
    if (api->error_name(code, &name) != CUDA_OK || !name)
        name = "an unknown code";
    if (is_lost(code))
        return fail(ERR_LOST,
                    "the CUDA device failed: %s (%u), seen at %s; nothing on it can be used any "
                    "more, so start again",
                    name, code, what);
    return fail(code == CUDA_OUT_OF_MEMORY ? ERR_NOMEM : ERR_DRIVER, "CUDA: %s failed: %s (%u)",
                what, name, code);
}

static int attribute(const struct cuda_api *api, cuda_device_id id, unsigned which)
{
    int value = 0;
    return api->device_attribute(&value, which, id) == CUDA_OK ? value : 0;
}

// "13.0" of 13000
static void version_text(int version, char *out, size_t size)
{
    snprintf(out, size, "%d.%d", version / 1000, version % 1000 / 10);
}

// True when this driver takes what this build's nvcc made; otherwise the note says why not.
// A driver takes machine code of its own major version and older ones.
static bool driver_fits(const struct cuda_api *api, int *version)
{
    char has[16], needs[16];
    if (cuda_kernels_f32_size == 0) {
        snprintf(note, sizeof note, "cuda: this build has no CUDA kernels (there was no nvcc)");
        return false;
    }
    if (api->driver_version(version) != CUDA_OK)
        *version = 0;
    if (*version / 1000 >= DITMOE_CUDA_VERSION / 1000)
        return true;
    version_text(*version, has, sizeof has);
    version_text(DITMOE_CUDA_VERSION / 1000 * 1000, needs, sizeof needs);
    snprintf(note, sizeof note,
             "cuda: the NVIDIA driver is too old: it is for CUDA %s, this build needs %s", has,
             needs);
    return false;
}

static void describe(const struct cuda_api *api, cuda_device_id id, int index, int version,
                     struct device_info *info)
{
    char number[16], name[40];
    size_t memory = 0;
    memset(info, 0, sizeof *info);
    info->backend = &backend_cuda;
    info->index = index;
    snprintf(info->key, sizeof info->key, "cuda:%d", index);
    snprintf(info->platform, sizeof info->platform, "NVIDIA CUDA");
    snprintf(info->vendor, sizeof info->vendor, "NVIDIA Corporation");
    if (api->device_name(info->name, sizeof info->name, id) != CUDA_OK)
        snprintf(info->name, sizeof info->name, "NVIDIA GPU");
    const int major = attribute(api, id, CUDA_CAPABILITY_MAJOR);
    const int minor = attribute(api, id, CUDA_CAPABILITY_MINOR);
    version_text(version, number, sizeof number);
    cuda_driver_name(name, sizeof name);
    snprintf(info->driver, sizeof info->driver, "%s%s%s%s", number, name[0] ? " (driver " : "", name,
             name[0] ? ")" : "");
    snprintf(info->language, sizeof info->language, "compute capability %d.%d", major, minor);
    snprintf(info->library, sizeof info->library, "%s", cublaslt_text());
    cuda_tuned_text(10 * major + minor, info->tuned, sizeof info->tuned);
    info->kind = DEVICE_GPU;
    if (api->device_memory(&memory, id) == CUDA_OK)
        info->memory_driver = memory;
    info->memory = info->memory_driver;
    info->max_alloc = info->memory_driver;
    info->compute_units = attribute(api, id, CUDA_MULTIPROCESSORS);
    info->clock_mhz = attribute(api, id, CUDA_CLOCK_RATE) / 1000;
    info->vector_width = 1;
    info->align = MATRIX_ALIGN;
    info->fp16 = true;
    info->fp64 = true;
    info->unified = attribute(api, id, CUDA_INTEGRATED) != 0;
    if (api->device_pci(info->pci, sizeof info->pci, id) != CUDA_OK)
        info->pci[0] = 0;
    for (char *c = info->pci; *c; c++)
        *c = (char)tolower((unsigned char)*c);
    info->nvlinks = cuda_nvlinks(info->pci);
}

static bool capable(const struct device_info *info)
{
    int major = 0, minor = 0;
    sscanf(info->language, "compute capability %d.%d", &major, &minor);
    if (10 * major + minor >= DITMOE_CUDA_LOWEST)
        return true;
    snprintf(note, sizeof note, "cuda: %s has %s, this build's kernels need %d.%d", info->name,
             info->language, DITMOE_CUDA_LOWEST / 10, DITMOE_CUDA_LOWEST % 10);
    return false;
}

int cuda_list(struct device_info *out, int max)
{
    const char *why;
    const struct cuda_api *api = cuda_driver(&why);
    int found = 0, count = 0, version = 0;
    note[0] = 0;
    if (!api && why[0])
        snprintf(note, sizeof note, "cuda: %s", why);
    if (!api || !driver_fits(api, &version) || api->device_count(&found) != CUDA_OK)
        return 0;
    for (int i = 0; i < found && count < max; i++) {
        cuda_device_id id;
        if (api->device_get(&id, i) != CUDA_OK)
            continue;
        describe(api, id, i, version, &out[count]);
        if (capable(&out[count]))
            count++;
    }
    return count;
}

const char *cuda_note(void)
{
    return note;
}
