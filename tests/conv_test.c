// Convolution, GroupNorm, softmax, one wide head's attention, against double precision.
#include "tests/op_table.h"

#include <math.h>
#include <string.h>

// ---- convolution --------------------------------------------------------------------------------

static double pixel(const double *x, const struct conv *g, int channels, int n, int y, int xx,
                    int c)
{
    const int height = g->height << g->doubled, width = g->width << g->doubled;
    if (y < 0 || xx < 0 || y >= height || xx >= width)
        return 0;
    y >>= g->doubled;
    xx >>= g->doubled;
    return x[((n * g->height + y) * g->width + xx) * channels + c];
}

// What the operation writes for pixel (n, oy, ox) and output channel o; w as published,
// [Co,C,kh,kw].
static double convolve(const double *x, const double *w, const struct conv *g, int channels, int n,
                       int oy, int ox, int o)
{
    double sum = 0;
    for (int c = 0; c < channels; c++)
        for (int ky = 0; ky < g->kernel_h; ky++)
            for (int kx = 0; kx < g->kernel_w; kx++)
                sum += w[((o * channels + c) * g->kernel_h + ky) * g->kernel_w + kx] *
                       pixel(x, g, channels, n, oy * g->stride + ky - g->top,
                             ox * g->stride + kx - g->left, c);
    return sum;
}

struct conv_case {
    struct conv g;
    int channels, out;
    int column, columns; // of y
    bool bias, y_f32;
};

enum { WEIGHTS_MAX = 60000 };

// The weight as op_conv2d takes it, of the device's type for weights, and as published in
// *published.
static struct operand *conv_weights(struct op_run *r, const struct conv_case *t, double **published)
{
    const int taps = t->g.kernel_h * t->g.kernel_w, count = t->out * t->channels * taps;
    const int64_t pitch = conv_columns(&t->g, t->channels);
    static float from[WEIGHTS_MAX], to[WEIGHTS_MAX];
    BUG_IF(count > WEIGHTS_MAX || t->out * pitch > WEIGHTS_MAX);
    double *laid = op_doubles(r, t->out * pitch);
    *published = op_doubles(r, count);
    for (int i = 0; i < count; i++)
        from[i] = (float)op_uniform(r, -1, 1);
    conv_weight(to, from, t->out, t->channels, t->g.kernel_h, t->g.kernel_w);
    for (int64_t i = 0; i < t->out * pitch; i++)
        laid[i] = (double)to[i];
    struct operand *w = op_values(r, r->act, laid, DIMS(t->out, pitch));
    for (int o = 0; o < t->out; o++)
        for (int c = 0; c < t->channels; c++)
            for (int k = 0; k < taps; k++)
                (*published)[(o * t->channels + c) * taps + k] =
                    w->v[o * pitch + k * t->channels + c];
    return w;
}

static int check_conv(struct op_run *r, const struct conv_case *t)
{
    const struct conv *g = &t->g;
    const int height = (int)conv_height(g), width = (int)conv_width(g);
    double *published;
    struct operand *x =
        op_random(r, r->act, -1, 1, DIMS(g->images * g->height * g->width, t->channels));
    struct operand *w = conv_weights(r, t, &published);
    struct operand *bias = t->bias ? op_random(r, F32, -1, 1, DIMS(t->out)) : NULL;
    enum dtype type = t->y_f32 ? F32 : r->act;
    struct operand *y = op_random(r, type, -2, 2, DIMS(g->images * height * width, t->columns));
    double *want = op_doubles(r, y->count);
    memcpy(want, y->v, (size_t)y->count * sizeof *want); // other columns stay
    for (int n = 0; n < g->images; n++)
        for (int oy = 0; oy < height; oy++)
            for (int ox = 0; ox < width; ox++)
                for (int o = 0; o < t->out; o++) {
                    double *at =
                        want + ((n * height + oy) * width + ox) * t->columns + t->column + o;
                    double v = convolve(x->v, published, g, t->channels, n, oy, ox, o);
                    v += (bias ? bias->v[o] : 0) + (g->add ? *at : 0);
                    *at = g->relu && v < 0 ? 0 : v;
                }
    OK(OP_RUN(r, op_conv2d(&r->c, &y->t, t->column, &x->t, &w->t, bias ? &bias->t : NULL, g)));
    op_judge(r, y, want, op_tolerance(r, 1e-5),
             "conv %dx%d stride %d, %d x %d x %d x %d to %d%s%s%s", g->kernel_h, g->kernel_w,
             g->stride, g->images, g->height, g->width, t->channels, t->out,
             g->doubled ? ", doubled" : "", g->relu ? ", relu" : "", g->add ? ", add" : "");
    return PASSED;
}

// images, height, width, channels, out, geometry (below)
static const int conv_shapes[][6] = {
    {1, 1, 1, 1, 1, 0},   {2, 5, 7, 3, 5, 0},   {1, 9, 8, 12, 16, 0}, {2, 6, 5, 8, 8, 1},
    {1, 12, 11, 4, 6, 2}, {1, 7, 9, 5, 3, 3},   {1, 9, 9, 16, 9, 4},  {2, 4, 6, 32, 40, 5},
    {1, 5, 4, 7, 4, 5},   {3, 3, 5, 8, 4, 6},   {1, 6, 5, 6, 8, 6},   {1, 37, 41, 4, 8, 0},
    {2, 4, 3, 3, 2, 7},   {1, 10, 10, 20, 7, 8}};

static struct conv geometry(const int *s)
{
    static const struct conv kinds[] = {
        {.kernel_h = 3, .kernel_w = 3, .stride = 1, .top = 1, .bottom = 1, .left = 1, .right = 1},
        {.kernel_h = 3, .kernel_w = 3, .stride = 2, .bottom = 1, .right = 1}, // the VAE's encoder
        {.kernel_h = 5, .kernel_w = 5, .stride = 1, .top = 2, .bottom = 2, .left = 2, .right = 2},
        {.kernel_h = 1, .kernel_w = 7, .stride = 1, .left = 3, .right = 3},
        {.kernel_h = 7, .kernel_w = 1, .stride = 1, .top = 3, .bottom = 3},
        {.kernel_h = 3,
         .kernel_w = 3,
         .stride = 1,
         .top = 1,
         .bottom = 1,
         .left = 1,
         .right = 1,
         .doubled = true},
        {.kernel_h = 1, .kernel_w = 1, .stride = 1},
        {.kernel_h = 2, .kernel_w = 3, .stride = 3, .top = 4, .bottom = 5, .left = 6, .right = 3},
        {.kernel_h = 3, .kernel_w = 3, .stride = 2}, // Inception's
    };
    struct conv g = kinds[s[5]];
    g.images = s[0];
    g.height = s[1];
    g.width = s[2];
    return g;
}

// Plain; with relu into columns of a wider y; added to y; both; and to f32 without a bias.
static int conv_case(struct op_run *r, const int *s)
{
    const struct conv g = geometry(s);
    const int channels = s[3], out = s[4];
    struct conv relu = g, add = g, both = g;
    relu.relu = add.add = both.relu = both.add = true;
    const struct conv_case cases[] = {{g, channels, out, 0, out, true, false},
                                      {relu, channels, out, 3, out + 4, true, false},
                                      {add, channels, out, 0, out, true, false},
                                      {both, channels, out, 0, out, false, false},
                                      {g, channels, out, 0, out, false, true}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (check_conv(r, &cases[i]) != PASSED)
            return FAILED;
    return PASSED;
}

static int test_conv(void)
{
    return OP_FOR_ALL(conv_case, conv_shapes);
}

// What devices do without gathering: channels in units of eight, more of them than fit at a time,
// more rows than a tile, and sums long enough to be divided. Also into columns of a wider y.
static int wide_case(struct op_run *r, const int *s)
{
    const struct conv g = geometry(s);
    const int channels = s[3], out = s[4];
    struct conv relu = g, add = g;
    relu.relu = relu.add = add.add = true;
    const struct conv_case cases[] = {{g, channels, out, 0, out, true, false},
                                      {relu, channels, out, 8, out + 16, true, false},
                                      {add, channels, out, 0, out, false, false},
                                      {g, channels, out, 0, out, true, true}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (check_conv(r, &cases[i]) != PASSED)
            return FAILED;
    return PASSED;
}

static int test_conv_wide(void)
{
    static const int shapes[][6] = {
        {1, 1, 1, 8, 8, 0},     {2, 9, 13, 40, 24, 0},  {1, 12, 13, 128, 40, 0},
        {3, 9, 8, 72, 80, 0},   {1, 3, 5, 160, 16, 0},  {2, 7, 9, 72, 136, 6},
        {2, 7, 6, 40, 48, 2},   {2, 7, 9, 136, 8, 3},   {2, 10, 7, 40, 200, 4},
        {2, 6, 7, 72, 24, 5},   {1, 11, 13, 24, 72, 5}, {1, 4, 3, 136, 40, 5},
        {2, 11, 12, 72, 24, 8}, {2, 8, 11, 32, 40, 1},  {2, 4, 3, 24, 16, 7}};
    return OP_FOR_ALL(wide_case, shapes);
}

// More rows than a block: the blocks' seams lie within lines, and the last is shorter.
static int blocks_case(struct op_run *r, const int *s)
{
    const struct conv g = {.images = s[0],
                           .height = s[1],
                           .width = s[2],
                           .kernel_h = 3,
                           .kernel_w = 3,
                           .stride = 1,
                           .top = 1,
                           .bottom = 1,
                           .left = 1,
                           .right = 1};
    const struct conv_case t = {g, s[3], s[4], 0, s[4], true, false};
    return check_conv(r, &t);
}

static int test_conv_blocks(void)
{
    static const int shapes[][6] = {{2, 67, 131, 64, 3}};
    return OP_FOR_ALL(blocks_case, shapes);
}

// ---- GroupNorm ----------------------------------------------------------------------------------

static void group_norm(const double *x, const double *weight, const double *bias, double *y,
                       int images, int pixels, int channels, int groups, bool silu)
{
    const int per = channels / groups;
    for (int n = 0; n < images; n++)
        for (int g = 0; g < groups; g++) {
            double sum = 0, squares = 0;
            for (int i = 0; i < pixels * per; i++)
                sum += x[(n * pixels + i / per) * channels + g * per + i % per];
            const double mean = sum / (pixels * per);
            for (int i = 0; i < pixels * per; i++) {
                const double d = x[(n * pixels + i / per) * channels + g * per + i % per] - mean;
                squares += d * d;
            }
            const double rstd = 1 / sqrt(squares / (pixels * per) + 1e-6);
            for (int i = 0; i < pixels * per; i++) {
                const int c = g * per + i % per, at = (n * pixels + i / per) * channels + c;
                const double v = (x[at] - mean) * rstd * weight[c] + bias[c];
                y[at] = silu ? v / (1 + exp(-v)) : v;
            }
        }
}

// images, pixels, channels, groups, mean of x
static int group_norm_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, r->act, s[4] - 1, s[4] + 1, DIMS(s[0] * s[1], s[2]));
    struct operand *weight = op_random(r, F32, -2, 2, DIMS(s[2]));
    struct operand *bias = op_random(r, F32, -1, 1, DIMS(s[2]));
    struct operand *y = op_output(r, r->act, DIMS(s[0] * s[1], s[2]));
    double *want = op_doubles(r, y->count);
    for (int silu = 0; silu < 2; silu++) {
        OK(OP_RUN(
            r, op_group_norm(&r->c, &y->t, &x->t, &weight->t, &bias->t, s[0], s[3], 1e-6f, silu)));
        group_norm(x->v, weight->v, bias->v, want, s[0], s[1], s[2], s[3], silu);
        op_judge(r, y, want, op_tolerance(r, 1e-5), "group norm %d x %d x %d in %d, silu %d", s[0],
                 s[1], s[2], s[3], silu);
    }
    OK(OP_RUN(r,
              op_group_norm(&r->c, &x->t, &x->t, &weight->t, &bias->t, s[0], s[3], 1e-6f, true)));
    op_judge(r, x, want, op_tolerance(r, 1e-5), "group norm in place");
    return PASSED;
}

static int test_group_norm(void)
{
    static const int shapes[][6] = {{1, 2, 1, 1},      {2, 9, 32, 32},     {1, 65, 64, 32},
                                    {3, 257, 12, 4},   {2, 31, 6, 2},      {1, 300, 37, 1},
                                    {1, 81, 128, 32},  {2, 513, 8, 4, 50}, {2, 301, 512, 32, 3},
                                    {3, 1100, 256, 32}};
    return OP_FOR_ALL(group_norm_case, shapes);
}

// ---- softmax and attention ----------------------------------------------------------------------

static int softmax_case(struct op_run *r, const int *s)
{
    struct operand *x = op_random(r, F32, -s[2], s[2], DIMS(s[0], s[1]));
    struct operand *p = op_output(r, r->act, DIMS(s[0], s[1]));
    double *want = op_doubles(r, p->count);
    for (int row = 0; row < s[0]; row++) {
        double most = -INFINITY, sum = 0;
        for (int i = 0; i < s[1]; i++)
            most = fmax(most, x->v[row * s[1] + i] * 0.25);
        for (int i = 0; i < s[1]; i++)
            sum += exp(x->v[row * s[1] + i] * 0.25 - most);
        for (int i = 0; i < s[1]; i++)
            want[row * s[1] + i] = exp(x->v[row * s[1] + i] * 0.25 - most) / sum;
    }
    OK(OP_RUN(r, op_softmax(&r->c, &p->t, &x->t, 0.25f)));
    op_judge(r, p, want, op_tolerance(r, 1e-5), "softmax %d x %d", s[0], s[1]);
    return PASSED;
}

static int test_softmax(void)
{
    static const int shapes[][6] = {{1, 1, 1}, {3, 7, 4}, {37, 385, 8}, {5, 128, 2}, {2, 129, 300}};
    return OP_FOR_ALL(softmax_case, shapes);
}

// images, tokens, width
static int attention_case(struct op_run *r, const int *s)
{
    const int T = s[1], D = s[2];
    struct operand *q = op_random(r, r->act, -1, 1, DIMS(s[0] * T, D));
    struct operand *k = op_random(r, r->act, -1, 1, DIMS(s[0] * T, D));
    struct operand *v = op_random(r, r->act, -1, 1, DIMS(s[0] * T, D));
    struct operand *o = op_output(r, r->act, DIMS(s[0] * T, D));
    double *want = op_doubles(r, o->count), *row = op_doubles(r, T);
    for (int i = 0; i < s[0] * T; i++) {
        const int n = i / T;
        double sum = 0;
        for (int j = 0; j < T; j++) {
            double score = 0;
            for (int d = 0; d < D; d++)
                score += q->v[i * D + d] * k->v[(n * T + j) * D + d];
            sum += row[j] = exp(score / sqrt(D));
        }
        for (int j = 0; j < T; j++)
            for (int d = 0; d < D; d++)
                want[i * D + d] += row[j] / sum * v->v[(n * T + j) * D + d];
    }
    OK(OP_RUN(r, op_attention_single(&r->c, &o->t, &q->t, &k->t, &v->t, s[0])));
    op_judge(r, o, want, op_tolerance(r, 1e-5), "attention, one head, %d x %d x %d", s[0], T, D);
    return PASSED;
}

static int test_attention_single(void)
{
    static const int shapes[][6] = {{1, 1, 8},    {3, 1, 32},   {2, 37, 40},
                                    {1, 64, 512}, {2, 65, 136}, {1, 1030, 8}};
    return OP_FOR_ALL(attention_case, shapes);
}

// ---- out of the network -------------------------------------------------------------------------

// images, channels, height, width, columns
static int images_case(struct op_run *r, const int *s)
{
    const int pixels = s[2] * s[3];
    for (int f32 = 0; f32 < 2; f32++) {
        struct operand *in = op_random(r, f32 ? F32 : r->act, -1, 1, DIMS(s[0] * pixels, s[4]));
        struct operand *out = op_output(r, F32, DIMS(s[0], s[1], s[2], s[3]));
        double *want = op_doubles(r, out->count);
        for (int i = 0; i < out->count; i++)
            want[i] = in->v[(i / pixels / s[1] * pixels + i % pixels) * s[4] + i / pixels % s[1]];
        OK(OP_RUN(r, op_rows_to_images(&r->c, &out->t, &in->t)));
        op_judge(r, out, want, 1e-7, "rows_to_images %d x %d x %d x %d", s[0], s[1], s[2], s[3]);
    }
    return PASSED;
}

static int test_rows_to_images(void)
{
    static const int shapes[][6] = {{1, 1, 1, 1, 1}, {2, 3, 5, 7, 8}, {3, 8, 16, 17, 8}};
    return OP_FOR_ALL(images_case, shapes);
}

const struct test conv_tests[] = {
    {"conv", test_conv},
    {"conv_wide", test_conv_wide},
    {"conv_blocks", test_conv_blocks},
    {"group_norm", test_group_norm},
    {"softmax", test_softmax},
    {"attention_single", test_attention_single},
    {"rows_to_images", test_rows_to_images},
    {NULL, NULL},
};
