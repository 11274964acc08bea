// Builds kernels.cl for a device and makes its kernels, without compiling twice what has not
// changed.
//
// A driver that compiles everything in clBuildProgram gets a cache: its binary is stored under a
// name hashed from all that it depends on, with that text and a checksum in front, and tried first
// at the next start. PoCL is left to its own cache, measured with 100 small kernels on two cores:
// it compiles a kernel at its first launch (0.07 s each; only those that are used) and opens in
// 0.04-0.06 s when it has seen the source before, whereas asking it for a binary compiles every
// kernel: 15 s, to save 0.02 s a start.
#include "devices/opencl.h"

#include "devices/cache.h"
#include "devices/hash.h"
#include "devices/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the cache of binaries ---------------------------------------------------------------------

enum { HEADER_SIZE = 1024 }; // a text, padded with 0: version, checksum, identity

static void binary_name(const char *identity, char *out, size_t size)
{
    snprintf(out, size, "program-%016llx.bin",
             (unsigned long long)hash_bytes(HASH_START, identity, strlen(identity)));
}

static void binary_header(const char *identity, const unsigned char *binary, size_t size, char *out)
{
    memset(out, 0, HEADER_SIZE);
    snprintf(out, HEADER_SIZE, "ditmoe program 1\n%016llx\n%s\n",
             (unsigned long long)hash_bytes(HASH_START, binary, size), identity);
}

bool opencl_binary_load(struct opencl_device *dev, const char *identity, const char *options)
{
    char name[64], header[HEADER_SIZE];
    size_t size = 0;
    cl_int code = CL_INVALID_BINARY;
    binary_name(identity, name, sizeof name);
    unsigned char *file = cache_read(name, &size);
    if (file && size > HEADER_SIZE) {
        const unsigned char *binary = file + HEADER_SIZE;
        size -= HEADER_SIZE;
        binary_header(identity, binary, size, header);
        if (!memcmp(header, file, HEADER_SIZE))
            dev->program =
                clCreateProgramWithBinary(dev->context, 1, &dev->id, &size, &binary, NULL, &code);
    }
    free(file);
    if (code == CL_SUCCESS &&
        clBuildProgram(dev->program, 1, &dev->id, options, NULL, NULL) == CL_SUCCESS)
        return true;
    if (code == CL_SUCCESS)
        clReleaseProgram(dev->program);
    dev->program = NULL;
    return false;
}

bool opencl_binary_save(struct opencl_device *dev, const char *identity)
{
    char name[64];
    size_t size = 0;
    bool saved = false;
    binary_name(identity, name, sizeof name);
    if (clGetProgramInfo(dev->program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL) !=
            CL_SUCCESS ||
        size == 0)
        return false;
    unsigned char *file = malloc(HEADER_SIZE + size);
    unsigned char *binary = file ? file + HEADER_SIZE : NULL;
    if (file && clGetProgramInfo(dev->program, CL_PROGRAM_BINARIES, sizeof binary, &binary, NULL) ==
                    CL_SUCCESS) {
        binary_header(identity, binary, size, (char *)file);
        saved = cache_write(name, file, HEADER_SIZE + size);
    }
    free(file);
    return saved;
}

// All that a binary depends on.
static void binary_identity(const struct opencl_device *dev, const char *options, char *out,
                            size_t size)
{
    const struct device_info *info = &dev->base.info;
    char version[128] = "";
    clGetPlatformInfo(dev->platform, CL_PLATFORM_VERSION, sizeof version - 1, version, NULL);
    snprintf(out, size, "%s, %s, %s, %s, driver %s, source %016llx, options %s", info->platform,
             version, info->vendor, info->name, info->driver,
             (unsigned long long)hash_bytes(HASH_START, kernels_cl, kernels_cl_size), options);
}

// ---- building ----------------------------------------------------------------------------------

// The first `max` lines of the log that speak of an error, joined by " | ".
static void first_errors(const char *log, char *out, size_t size, int max)
{
    size_t length = 0;
    out[0] = 0;
    while (*log && max > 0) {
        int line = (int)strcspn(log, "\n");
        const char *error = strstr(log, "error");
        if (error && error < log + line) {
            int n = snprintf(out + length, size - length, "%s%.*s", length ? " | " : "", line, log);
            length += (size_t)n;
            if (length >= size)
                return;
            max--;
        }
        log += line;
        log += strspn(log, "\n");
    }
}

static int build_failed(struct opencl_device *dev, cl_int code)
{
    char errors[600] = "";
    size_t size = 0;
    clGetProgramBuildInfo(dev->program, dev->id, CL_PROGRAM_BUILD_LOG, 0, NULL, &size);
    char *log = calloc(size + 1, 1);
    if (log && clGetProgramBuildInfo(dev->program, dev->id, CL_PROGRAM_BUILD_LOG, size, log,
                                     NULL) == CL_SUCCESS)
        first_errors(log, errors, sizeof errors, 3);
    free(log);
    return fail(ERR_DRIVER, "OpenCL: building the kernels failed: %s (%d): %s",
                opencl_error_name(code), code,
                errors[0] ? errors : "the driver's log says nothing");
}

static void build_options(const struct opencl_device *dev, char *out, size_t size)
{
    const char *cpu = dev->base.info.kind != DEVICE_CPU    ? ""
                      : dev->base.info.vector_width >= 16 ? " -DCPU_FORMS -DVECTOR_WIDTH=16"
                                                          : " -DCPU_FORMS -DVECTOR_WIDTH=8";
    snprintf(out, size, "-cl-std=CL1.2%s%s", dev->base.act == BF16 ? " -DACT_BF16" : "", cpu);
}

static int build_source(struct opencl_device *dev, const char *options)
{
    const char *text = (const char *)kernels_cl;
    cl_int code;
    dev->program = clCreateProgramWithSource(dev->context, 1, &text, &kernels_cl_size, &code);
    CL(code, "clCreateProgramWithSource");
    code = clBuildProgram(dev->program, 1, &dev->id, options, NULL, NULL);
    return code == CL_SUCCESS ? 0 : build_failed(dev, code);
}

static int build(struct opencl_device *dev)
{
    char options[64], identity[800];
    build_options(dev, options, sizeof options);
    if (!strcmp(dev->base.info.platform, "Portable Computing Language"))
        return build_source(dev, options);
    binary_identity(dev, options, identity, sizeof identity);
    if (opencl_binary_load(dev, identity, options))
        return 0;
    TRY(build_source(dev, options));
    opencl_binary_save(dev, identity);
    return 0;
}

// ---- kernels -----------------------------------------------------------------------------------

static size_t letters(const char *text, char letter)
{
    size_t count = 0;
    for (; *text; text++)
        count += *text == letter;
    return count;
}

// What is wrong with kernel `i` just made, in words; "" if nothing.
static void check_kernel(const struct opencl_device *dev, int i, char *out, size_t size)
{
    const struct kernel_spec *spec = &kernel_specs[i];
    const cl_uint wanted = (cl_uint)(strlen(spec->args) + letters(spec->args, 'b'));
    cl_uint count = 0;
    size_t group[3] = {0};
    out[0] = 0;
    clGetKernelInfo(dev->kernels[i], CL_KERNEL_NUM_ARGS, sizeof count, &count, NULL);
    clGetKernelWorkGroupInfo(dev->kernels[i], dev->id, CL_KERNEL_COMPILE_WORK_GROUP_SIZE,
                             sizeof group, group, NULL);
    if (count != wanted)
        snprintf(out, size, "%u arguments, kernels.def says %u: one each, and an offset a buffer",
                 count, wanted);
    else if (group[0] != (size_t)spec->group[0] || group[1] != (size_t)spec->group[1])
        snprintf(out, size, "groups of %zux%zu, kernels.def says %dx%d", group[0], group[1],
                 spec->group[0], spec->group[1]);
}

// Makes kernel `i`; appends what is wrong with it to `wrong`.
static void make_kernel(struct opencl_device *dev, int i, char *wrong, size_t size)
{
    const struct kernel_spec *spec = &kernel_specs[i];
    size_t length = strlen(wrong);
    char reason[128] = "missing";
    cl_int code;
    if (spec->form == FORM_CPU && dev->base.info.kind != DEVICE_CPU)
        return;
    dev->kernels[i] = clCreateKernel(dev->program, spec->name, &code);
    if (code == CL_SUCCESS)
        check_kernel(dev, i, reason, sizeof reason);
    else if (code != CL_INVALID_KERNEL_NAME)
        snprintf(reason, sizeof reason, "%s", opencl_error_name(code));
    if (code != CL_SUCCESS)
        dev->kernels[i] = NULL;
    if (reason[0])
        snprintf(wrong + length, size - length, "%s%s (%s)", length ? ", " : "", spec->name,
                 reason);
}

int opencl_program_open(struct opencl_device *dev)
{
    char wrong[900] = "";
    TRY(build(dev));
    for (int i = 0; i < KERNEL_COUNT; i++)
        make_kernel(dev, i, wrong, sizeof wrong);
    if (wrong[0])
        return fail(ERR_DRIVER, "kernels.cl does not match kernels.def: %s", wrong);
    return 0;
}

void opencl_program_close(struct opencl_device *dev)
{
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (dev->kernels[i])
            clReleaseKernel(dev->kernels[i]);
    if (dev->program)
        clReleaseProgram(dev->program);
}
