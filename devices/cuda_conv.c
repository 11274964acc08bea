// Which convolutions conv_sm90.cu does in place, and how they are described to it. Pixels come in
// units of eight channels, 16 bytes; what has others, other weights than bf16, or a geometry that
// the copy engine does not know, is gathered (runtime/ops_conv.c).
#include "devices/cuda_conv.h"

#include "devices/cuda_gemm_sm90.h"
#include "devices/gemm_gpu.h"

enum { UNIT = 8, OFFSET_MAX = 255, THREADS = 128 };

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

// In f32 convolutions of single pixels alone: products of cuBLASLt. Rows of weights have zeros up to
// a multiple of UNIT, which x does not have.
static int conv_f32(struct stream *s, const struct convolution *a, struct mem *y)
{
    if (a->kernel_h != 1 || a->kernel_w != 1 || a->stride != 1 || a->top || a->bottom || a->left ||
        a->right || a->doubled || a->channels % UNIT)
        return NOT_MINE;
    const struct gemm g = {.m = a->images * a->height * a->width,
                           .n = a->out,
                           .k = a->channels,
                           .trans_b = true,
                           .accumulate = a->add,
                           .a = a->x,
                           .b = a->w,
                           .c = y,
                           .type_a = F32,
                           .type_b = F32,
                           .type_c = F32,
                           .bias = a->bias,
                           .groups = 1,
                           .space = a->space};
    return cuda_gemm_into(s, &g, a->columns, a->relu);
}

// A doubled convolution is one of 2 x 2 for each of the four pixels of y at a pixel of x.
static struct gemm_sm90_pixels pixels_of(const struct convolution *a)
{
    const int kernel_h = a->doubled ? 2 : a->kernel_h, kernel_w = a->doubled ? 2 : a->kernel_w;
    return (struct gemm_sm90_pixels){.width = a->doubled ? a->width : a->out_width,
                                     .height = a->doubled ? a->height : a->out_height,
                                     .stride = a->stride,
                                     .left = a->left,
                                     .top = a->top,
                                     .taps = kernel_h * kernel_w,
                                     .kernel_w = kernel_w,
                                     .chunks = gemm_cover(a->channels, GEMM_SM90_DEPTH),
                                     .pitch = a->columns,
                                     .relu = a->relu,
                                     .doubled = a->doubled};
}

// Where the kernel can begin: of a doubled one up to a pixel before the last, for the first of its
// four pixels of y; the others' taps are moved by one.
static bool describe_pixels(struct cuda_device *dev, struct cuda_map *map,
                            const struct convolution *a)
{
    const int sizes[] = {a->channels, a->width, a->height, a->images};
    const int before[] = {a->left, a->top};
    const int after[] = {a->doubled ? -1 : a->right - (a->kernel_w - 1),
                         a->doubled ? -1 : a->bottom - (a->kernel_h - 1)};
    return cuda_tuned_pixel_map(dev, map, a->x->address, sizes, before, after, a->stride,
                                GEMM_SM90_ROWS);
}

static int conv_bf16(struct stream *s, const struct convolution *a, struct mem *y)
{
    struct cuda_map map;
    if (!suits(s->dev, a) || !describe_pixels(s->dev, &map, a))
        return NOT_MINE;
    struct mem w = *a->w, space = {.dev = s->dev, .address = a->space->address};
    space.bytes = CONV_SPACE;
    if (a->doubled)
        TRY(double_weights(s, a, &w));
    const struct gemm_sm90_pixels x = pixels_of(a);
    const struct gemm g = {.m = a->images * a->out_height * a->out_width,
                           .n = a->out,
                           .k = x.taps * x.chunks * GEMM_SM90_DEPTH,
                           .trans_b = true,
                           .accumulate = a->add,
                           .a = a->x,
                           .b = &w,
                           .c = y,
                           .type_a = BF16,
                           .type_b = BF16,
                           .type_c = a->to_f32 ? F32 : BF16,
                           .bias = a->bias,
                           .groups = 1,
                           .space = &space};
    return cuda_conv_sm90(s, &g, &x, &map, a->channels);
}

int cuda_conv2d(struct stream *s, const struct convolution *a)
{
    const bool f32 = s->dev->base.act == F32;
    const size_t size = f32 || a->to_f32 ? sizeof(float) : sizeof(uint16_t);
    struct mem y = *a->y;
    y.address +=
        ((cuda_address)a->first * (cuda_address)a->columns + (cuda_address)a->column) * size;
    return f32 ? conv_f32(s, a, &y) : conv_bf16(s, a, &y);
}
