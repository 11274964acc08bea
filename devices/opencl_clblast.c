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
    if (g->swiglu != SWIGLU_NONE || g->bias || g->m < 1 || g->n < 1 || g->k < 1 ||
        dev->base.flags & OPEN_PORTABLE)
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
// It copies every matrix that does not begin its buffer, as no view does but the first.
size_t opencl_clblast_space(struct opencl_device *dev, const struct gemm *g)
{
    cl_int error;
    size_t bytes = 0, m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    cl_command_queue queue = clCreateCommandQueue(dev->context, dev->id, 0, &error);
    if (error != CL_SUCCESS)
        return 0;
    CLBlastStatusCode code = CLBlastSGemmTempBufferSize(
        CLBlastLayoutRowMajor, transpose(g->trans_a), transpose(g->trans_b), m, n, k, 1,
        g->trans_a ? m : k, 1, g->trans_b ? k : n, 1, n, &queue, &bytes);
    clReleaseCommandQueue(queue);
    return code == CLBlastSuccess ? bytes : 0;
}

// CLBlast takes its scratch without an offset. Products of a plan share theirs, so one sub-buffer
// is made once.
static int scratch_of(struct stream *s, const struct mem *space, cl_mem *out)
{
    *out = space ? space->cl : NULL;
    if (!space || space->offset == 0)
        return 0;
    if (!s->scratch || s->scratch_in != space->cl || s->scratch_at != space->offset ||
        s->scratch_bytes != space->bytes) {
        cl_int code;
        const cl_buffer_region region = {space->offset, space->bytes};
        if (s->scratch)
            clReleaseMemObject(s->scratch);
        s->scratch = clCreateSubBuffer(space->cl, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION,
                                       &region, &code);
        if (code != CL_SUCCESS)
            s->scratch = NULL;
        CL(code, "clCreateSubBuffer");
        s->scratch_in = space->cl;
        s->scratch_at = space->offset;
        s->scratch_bytes = space->bytes;
    }
    *out = s->scratch;
    return 0;
}

static size_t first_float(const struct mem *mem)
{
    return mem->offset / sizeof(float);
}

int opencl_clblast(struct stream *s, const struct gemm *g)
{
    cl_mem scratch;
    TRY(scratch_of(s, g->space, &scratch));
    size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    CLBlastStatusCode code = CLBlastSgemmWithTempBuffer(
        CLBlastLayoutRowMajor, transpose(g->trans_a), transpose(g->trans_b), m, n, k, 1.0f,
        g->a->cl, first_float(g->a), g->trans_a ? m : k, g->b->cl, first_float(g->b),
        g->trans_b ? k : n, g->accumulate ? 1.0f : 0.0f, g->c->cl, first_float(g->c), n, &s->queue,
        NULL, scratch);
    return code == CLBlastSuccess ? 0 : clblast_fail(code);
}
