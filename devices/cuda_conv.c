// Which convolutions conv_sm90.cu does in place, and how they are described to it. Pixels come in
// units of eight channels, 16 bytes; what has others, other weights than bf16, or a geometry that
// the copy engine does not know, is gathered (runtime/ops_conv.c).
#include "devices/cuda_conv.h"

#include "devices/cuda_gemm_sm90.h"
#include "devices/gemm_gpu.h"

enum { UNIT = 8, OFFSET_MAX = 255, NARROW = 32, THREADS = 128 };

static bool aligned(const struct mem *mem)
{
    return !mem || mem->address % 16 == 0;
}

// Doubling is folded into kernels of 3 x 3 that keep the size alone.
static bool folds(const struct convolution *a)
{
    return a->kernel_h == 3 && a->kernel_w == 3 && a->stride == 1 && a->top == 1 &&
           a->bottom == 1 && a->left == 1 && a->right == 1;
}

static bool suits(struct cuda_device *dev, const struct convolution *a)
{
    if (a->channels % UNIT || a->out % UNIT || a->columns % UNIT || a->column % UNIT)
        return false;
    if (a->to_f32 && (a->relu || a->doubled || a->columns != a->out))
        return false;
    if (a->kernel_h > OFFSET_MAX || a->kernel_w > OFFSET_MAX || (a->doubled && !folds(a)))
        return false;
    return aligned(a->y) && aligned(a->x) && aligned(a->w) && aligned(a->space) &&
           cuda_conv_sm90_here(dev);
}

// The weights of a doubled convolution, behind the space for sums.
static int double_weights(struct stream *s, const struct convolution *a, struct mem *to)
{
    int units = a->channels / UNIT, out = a->out;
    const unsigned grid[3] = {(unsigned)gemm_cover(out * units, THREADS), 1, 1};
    cuda_function function = cuda_tuned(s->dev, IMAGE_conv_sm90, "conv_double_weights", 0);
    *to = (struct mem){.dev = s->dev, .address = a->space->address + CONV_SPACE};
    BUG_IF(!function);
    return cuda_tuned_launch(s, function, grid, THREADS, 0,
                             (void *[]){&to->address, &a->w->address, &out, &units});
}

int cuda_conv2d(struct stream *s, const struct convolution *a)
{
    struct cuda_map map;
    if (!suits(s->dev, a))
        return NOT_MINE;
    const int kernel_h = a->doubled ? 2 : a->kernel_h, kernel_w = a->doubled ? 2 : a->kernel_w;
    // channels in 32s where that leaves out half a stage of zeros
    const bool narrow = !a->to_f32 && gemm_cover(a->channels, NARROW) % 2;
    const int wide = narrow ? NARROW : GEMM_SM90_DEPTH, chunks = gemm_cover(a->channels, wide);
    const int after_w = a->doubled ? -1 : a->right - (kernel_w - 1);
    const int after_h = a->doubled ? -1 : a->bottom - (kernel_h - 1);
    if (!cuda_tuned_pixel_map(
            s->dev, &map, a->x->address, (int[]){a->channels, a->width, a->height, a->images},
            (int[]){a->left, a->top}, (int[]){after_w, after_h}, a->stride, wide, GEMM_SM90_ROWS))
        return NOT_MINE;
    struct mem w = *a->w, y = *a->y, space = {.dev = s->dev, .bytes = CONV_SPACE};
    if (a->doubled)
        TRY(double_weights(s, a, &w));
    space.address = a->space->address;
    y.address += ((cuda_address)a->first * (cuda_address)a->columns + (cuda_address)a->column) *
                 (a->to_f32 ? sizeof(float) : sizeof(uint16_t));
    const struct gemm_sm90_pixels x = {.width = a->doubled ? a->width : a->out_width,
                                       .height = a->doubled ? a->height : a->out_height,
                                       .stride = a->stride,
                                       .left = a->left,
                                       .top = a->top,
                                       .taps = kernel_h * kernel_w,
                                       .kernel_w = kernel_w,
                                       .chunks = chunks,
                                       .pitch = a->columns,
                                       .relu = a->relu,
                                       .doubled = a->doubled,
                                       .narrow = narrow};
    const struct gemm g = {.m = a->images * a->out_height * a->out_width,
                           .n = a->out,
                           .k = gemm_cover(x.taps * chunks * wide, GEMM_SM90_DEPTH) *
                                GEMM_SM90_DEPTH,
                           .trans_b = true,
                           .accumulate = a->add,
                           .a = a->x,
                           .b = &w,
                           .c = &y,
                           .type_a = BF16,
                           .type_b = BF16,
                           .type_c = a->to_f32 ? F32 : BF16,
                           .bias = a->bias,
                           .groups = 1,
                           .space = &space};
    return cuda_conv_sm90(s, &g, &x, &map, a->channels);
}
