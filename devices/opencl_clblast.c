// Matrix products by CLBlast: f32 only (its half product accumulates in half), plain forms only.
//
// On a GPU it competes with the project's own kernels (tune.h), once for each shape. On a CPU
// device its first call compiles for 15 s and it loses by far, so it is used only where
// DITMOE_CLBLAST=1 asks for it. DITMOE_CLBLAST=0 switches it off, =1 always takes it, where it can
// do the product.
#include "devices/opencl_gemm.h"

#include <clblast_c.h>
#include <stdlib.h>
#include <string.h>

bool opencl_clblast_wanted(const struct opencl_device *dev, const struct gemm *g, bool *forced)
{
    const char *asked = getenv("DITMOE_CLBLAST");
    *forced = asked && !strcmp(asked, "1");
    if (g->ragged != GEMM_PLAIN || g->type_a != F32 || g->type_b != F32 || g->type_c != F32)
        return false;
    if (g->swiglu != SWIGLU_NONE || g->bias || g->m < 1 || g->n < 1 || g->k < 1 || dev->base.flags & OPEN_PORTABLE)
        return false;
    return *forced || (!asked && dev->base.info.kind != DEVICE_CPU);
}

static CLBlastTranspose transpose(bool yes)
{
    return yes ? CLBlastTransposeYes : CLBlastTransposeNo;
}

// What CLBlast's codes mean: its own, or OpenCL's.
static int clblast_fail(CLBlastStatusCode code)
{
    return fail(code == CLBlastTempBufferAllocFailure ? ERR_NOMEM : ERR_DRIVER,
                "CLBlast: the matrix product failed (code %d)", (int)code);
}

// The scratch that CLBlast wants; it can only say so with a queue, so one is made for the question.
size_t opencl_clblast_space(struct opencl_device *dev, const struct gemm *g)
{
    cl_int error;
    size_t bytes = 0, m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    cl_command_queue queue = clCreateCommandQueue(dev->context, dev->id, 0, &error);
    if (error != CL_SUCCESS)
        return 0;
    CLBlastStatusCode code = CLBlastSGemmTempBufferSize(
        CLBlastLayoutRowMajor, transpose(g->trans_a), transpose(g->trans_b), m, n, k, 0,
        g->trans_a ? m : k, 0, g->trans_b ? k : n, 0, n, &queue, &bytes);
    clReleaseCommandQueue(queue);
    return code == CLBlastSuccess ? bytes : 0;
}

int opencl_clblast(struct stream *s, const struct gemm *g)
{
    size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    CLBlastStatusCode code = CLBlastSgemmWithTempBuffer(
        CLBlastLayoutRowMajor, transpose(g->trans_a), transpose(g->trans_b), m, n, k, 1.0f,
        g->a->cl, 0, g->trans_a ? m : k, g->b->cl, 0, g->trans_b ? k : n,
        g->accumulate ? 1.0f : 0.0f, g->c->cl, 0, n, &s->queue, NULL,
        g->space ? g->space->cl : NULL);
    return code == CLBlastSuccess ? 0 : clblast_fail(code);
}
