// Which whole operations the CUDA backend takes over (device.h: enum accelerated).
#include "devices/cuda_attention.h"
#include "devices/cuda_conv.h"
#include "devices/cuda_fused.h"

int cuda_accelerate(struct stream *s, enum accelerated op, const void *args)
{
    switch (op) {
    case ACCELERATE_ATTENTION_FWD:
        return cuda_attention_fwd(s, args);
    case ACCELERATE_ATTENTION_BWD:
        return cuda_attention_bwd(s, args);
    case ACCELERATE_QK_ATTENTION_FWD:
        return cuda_qk_attention_fwd(s, args);
    case ACCELERATE_CONV2D:
        return cuda_conv2d(s, args);
    case ACCELERATE_COUNT:
        break;
    default:
        return cuda_fused(s, op, args);
    }
    return NOT_MINE;
}
