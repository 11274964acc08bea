// Pooling and resampling against double references: f32 and bf16, CPU and GPU forms.
#include "tests/op_table.h"

#include <math.h>
#include <string.h>

// ---- pooling ------------------------------------------------------------------------------------

static double window(const double *x, const struct pool *p, int channels, int n, int oy, int ox,
                     int c)
{
    double sum = 0, most = -INFINITY;
    int count = 0;
    for (int ky = 0; ky < p->size; ky++)
        for (int kx = 0; kx < p->size; kx++) {
            const int py = oy * p->stride + ky - p->padding, px = ox * p->stride + kx - p->padding;
            if (py < 0 || px < 0 || py >= p->height || px >= p->width)
                continue;
            const double v = x[((n * p->height + py) * p->width + px) * channels + c];
            sum += v;
            most = fmax(most, v);
            count++;
        }
    return p->maximum ? most : sum / count;
}

// shape: images, height, width, channels, columns before and after, window as
// size*100+stride*10+padding
static int pool_case(struct op_run *r, const int *s)
{
    const int channels = s[3], before = s[4] / 100, columns = before + channels + s[4] % 100;
    struct pool p = {s[0], s[1], s[2], s[5] / 100, s[5] / 10 % 10, s[5] % 10, false};
    struct operand *x = op_random(r, r->act, -2, 2, DIMS(s[0] * s[1] * s[2], channels));
    const int height = (int)pool_height(&p), width = (int)pool_width(&p);
    double *old = op_doubles(r, (int64_t)s[0] * height * width * columns);
    double *want = op_doubles(r, (int64_t)s[0] * height * width * columns);
    for (int maximum = 0; maximum < 2; maximum++) {
        p.maximum = maximum;
        for (int64_t i = 0; i < (int64_t)s[0] * height * width * columns; i++)
            old[i] = want[i] = 3;
        struct operand *y = op_values(r, r->act, old, DIMS(s[0] * height * width, columns));
        OK(OP_RUN(r, op_pool(&r->c, &y->t, before, &x->t, &p)));
        for (int row = 0; row < s[0] * height * width; row++)
            for (int c = 0; c < channels; c++)
                want[row * columns + before + c] = window(x->v, &p, channels, row / width / height,
                                                          row / width % height, row % width, c);
        op_judge(r, y, want, op_tolerance(r, 1e-6), "pool %dx%dx%d c%d %d", s[0], s[1], s[2],
                 channels, maximum);
    }
    return PASSED;
}

static int test_pool(void)
{
    static const int shapes[][6] = {
        {1, 3, 3, 1, 0, 320},    {2, 5, 7, 3, 0, 320},       {1, 9, 9, 16, 0, 320},
        {2, 6, 5, 20, 0, 311},   {1, 8, 8, 32, 1604, 311},   {3, 4, 6, 17, 508, 311},
        {2, 7, 7, 4, 4, 220},    {1, 17, 17, 48, 1600, 320}, {2, 9, 11, 24, 816, 311},
        {2, 10, 13, 16, 0, 320}, {1, 7, 6, 40, 1608, 321},
    };
    return OP_FOR_ALL(pool_case, shapes);
}

static int mean_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, r->act, -1, 3, DIMS(s[0] * s[1], s[2]));
    struct operand *y = op_output(r, F32, DIMS(s[0], s[2]));
    double *want = op_doubles(r, y->count);
    OK(OP_RUN(r, op_pixel_mean(&r->c, &y->t, &x->t)));
    for (int n = 0; n < s[0]; n++)
        for (int p = 0; p < s[1]; p++)
            for (int c = 0; c < s[2]; c++)
                want[n * s[2] + c] += x->v[(n * s[1] + p) * s[2] + c] / s[1];
    op_judge(r, y, want, 1e-6, "mean of %d pixels", s[1]);
    return PASSED;
}

static int test_mean(void)
{
    static const int shapes[][6] = {{1, 1, 1}, {3, 64, 2048}, {2, 7, 33}};
    return OP_FOR_ALL(mean_case, shapes);
}

// ---- resampling ---------------------------------------------------------------------------------

enum { MOST = 1 << 14 };

// shape: images, side of the output, height and width of the first image; the others grow
static int resample_case(struct op_run *r, const int *s)
{
    const int images = s[0], side = s[1];
    static uint8_t bytes[MOST];
    static int32_t words[MOST / 4];
    double *taps = op_doubles(r, (int64_t)images * 2 * side * 3);
    double *raw = op_doubles(r, MOST / 4);
    double *want = op_doubles(r, (int64_t)images * side * side * 3);
    const float scale = 2 / 255.0f, shift = -1;
    for (int i = 0; i < MOST; i++)
        bytes[i] = (uint8_t)op_uniform(r, 0, 256);
    memcpy(words, bytes, MOST);
    for (int i = 0; i < MOST / 4; i++)
        raw[i] = words[i];
    for (int n = 0, at = 0; n < images; n++) {
        const int lengths[2] = {s[2] + n, s[3] + 2 * n};
        for (int axis = 0; axis < 2; axis++)
            for (int o = 0; o < side; o++) {
                const int first = (int)op_uniform(r, 0, lengths[axis]);
                const int second = first + (first + 1 < lengths[axis]);
                const int unit = axis ? 3 : 3 * lengths[1];
                const float weight = (float)op_uniform(r, 0, 1);
                int32_t bits;
                double *tap = taps + ((n * 2 + axis) * side + o) * 3;
                memcpy(&bits, &weight, sizeof bits);
                tap[0] = first * unit + (axis ? 0 : at);
                tap[1] = second * unit + (axis ? 0 : at);
                tap[2] = bits;
            }
        at += 3 * lengths[0] * lengths[1];
    }
    for (int n = 0; n < images; n++)
        for (int i = 0; i < side * side; i++) {
            const double *y = taps + (n * 2 * side + i / side) * 3;
            const double *x = taps + ((n * 2 + 1) * side + i % side) * 3;
            float wy, wx;
            memcpy(&wy, &(int32_t){(int32_t)y[2]}, 4);
            memcpy(&wx, &(int32_t){(int32_t)x[2]}, 4);
            for (int c = 0; c < 3; c++) {
                double v = 0;
                for (int corner = 0; corner < 4; corner++)
                    v += (corner / 2 ? (double)wy : 1 - (double)wy) *
                         (corner % 2 ? (double)wx : 1 - (double)wx) *
                         bytes[(int)y[corner / 2] + (int)x[corner % 2] + c];
                want[((int64_t)n * side * side + i) * 3 + c] = (double)scale * v + (double)shift;
            }
        }
    struct operand *in = op_values(r, I32, raw, DIMS(MOST / 4));
    struct operand *at = op_values(r, I32, taps, DIMS(images, 2, side, 3));
    struct operand *out = op_output(r, r->act, DIMS(images * side * side, 3));
    OK(OP_RUN(r, op_resample(&r->c, &out->t, &in->t, &at->t, scale, shift)));
    op_judge(r, out, want, op_tolerance(r, 1e-6), "resample to %d", side);
    return PASSED;
}

static int test_resample(void)
{
    static const int shapes[][6] = {{1, 1, 1, 1}, {3, 7, 4, 9}, {2, 33, 32, 28}, {1, 13, 40, 50}};
    return OP_FOR_ALL(resample_case, shapes);
}

const struct test pool_tests[] = {
    {"pool", test_pool},
    {"mean", test_mean},
    {"resample", test_resample},
    {0},
};
