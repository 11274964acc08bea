// Biases of experts, against sums in double precision.
#include "tests/op_table.h"

#include <math.h>

// Rows sorted by expert: how many each has.
static const int counts[][5] = {
    {1, 0, 0, 0, 0}, {0, 0, 3, 0, 0}, {2, 5, 0, 1, 7}, {33, 0, 64, 1, 0}, {0, 0, 0, 0, 129}};

static int bias_case(struct op_run *r, const int *shape)
{
    const int *rows = counts[shape[0]], E = shape[1], O = shape[2];
    double offsets[6] = {0};
    for (int e = 0; e < E; e++)
        offsets[e + 1] = offsets[e] + rows[e];
    const int R = (int)offsets[E];
    struct operand *at = op_values(r, I32, offsets, DIMS(E + 1));
    struct operand *y = op_random(r, r->act, -2, 2, DIMS(R, O));
    struct operand *bias = op_random(r, F32, -1, 1, DIMS(E * O));
    struct operand *dbias = op_random(r, F32, -1, 1, DIMS(E * O));
    double *sums = op_doubles(r, E * O), *want = op_doubles(r, R * O);
    for (int i = 0; i < E * O; i++)
        sums[i] = dbias->v[i];
    for (int e = 0; e < E; e++)
        for (int m = (int)offsets[e]; m < (int)offsets[e + 1]; m++)
            for (int o = 0; o < O; o++) {
                sums[e * O + o] += y->v[m * O + o];
                want[m * O + o] = y->v[m * O + o] + bias->v[e * O + o];
            }
    OK(OP_RUN(r, op_expert_bias_bwd(&r->c, &dbias->t, &y->t, &at->t)));
    op_judge(r, dbias, sums, 1e-6, "expert_bias_bwd %dx%d of %d", R, O, E);
    OK(OP_RUN(r, op_expert_bias_fwd(&r->c, &y->t, &bias->t, &at->t)));
    op_judge(r, y, want, op_tolerance(r, 1e-6), "expert_bias_fwd %dx%d of %d", R, O, E);
    return PASSED;
}

static int biases(void)
{
    static const int shapes[][6] = {{0, 1, 1},  {1, 5, 16},  {2, 5, 17}, {3, 5, 385},
                                    {3, 4, 64}, {4, 5, 130}, {2, 2, 63}, {4, 5, 256}};
    return OP_FOR_ALL(bias_case, shapes);
}

const struct test experts_tests[] = {{"biases", biases}, {0}};
