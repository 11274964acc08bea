// Builds kernels.cl for a device and makes its kernels.
#include "devices/opencl.h"

#include "devices/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- building
// --------------------------------------------------------------------------------------

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
    snprintf(out, size, "-cl-std=CL1.2%s%s", dev->base.act == BF16 ? " -DACT_BF16" : "",
             dev->base.info.kind == DEVICE_CPU ? " -DCPU_FORMS" : "");
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

// ---- kernels
// ---------------------------------------------------------------------------------------

// Makes kernel `i`; appends what is wrong with it to `wrong`.
static void make_kernel(struct opencl_device *dev, int i, char *wrong, size_t size)
{
    const struct kernel_spec *spec = &kernel_specs[i];
    size_t length = strlen(wrong);
    cl_uint count = 0;
    cl_int code;
    if (spec->form == FORM_CPU && dev->base.info.kind != DEVICE_CPU)
        return;
    dev->kernels[i] = clCreateKernel(dev->program, spec->name, &code);
    if (code != CL_SUCCESS) {
        dev->kernels[i] = NULL;
        snprintf(wrong + length, size - length, "%s%s (%s)", length ? ", " : "", spec->name,
                 code == CL_INVALID_KERNEL_NAME ? "missing" : opencl_error_name(code));
        return;
    }
    clGetKernelInfo(dev->kernels[i], CL_KERNEL_NUM_ARGS, sizeof count, &count, NULL);
    if (count != strlen(spec->args))
        snprintf(wrong + length, size - length, "%s%s (%u arguments, kernels.def says %zu)",
                 length ? ", " : "", spec->name, count, strlen(spec->args));
}

int opencl_program_open(struct opencl_device *dev)
{
    char options[64], wrong[900] = "";
    build_options(dev, options, sizeof options);
    TRY(build_source(dev, options));
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
