// Every kernel of kernels.def was launched by the tests of operations that ran before in this
// process.
#include "tests/op_table.h"

#include <string.h>

// Some kernels are launched inside a backend's verbs: gemm() (judged by gemm_test.c) and fill()
// (devices_test.c).
static bool inside_verb(const char *name)
{
    return !strncmp(name, "gemm_", 5) || !strncmp(name, "column_sums", 11) ||
           !strncmp(name, "fill_", 5);
}

static int test_every_kernel(void)
{
    const enum kernel suites[] = {KERNEL_silu_fwd_cpu, KERNEL_attention_fwd, KERNEL_swiglu_fwd_cpu,
                                  KERNEL_adamw};
    int missing = 0;
    for (size_t i = 0; i < sizeof suites / sizeof suites[0]; i++)
        if (op_launches[suites[i]] == 0)
            return SKIPPED; // not all suites of operations were asked for
    for (int k = 0; k < KERNEL_COUNT; k++)
        if (op_launches[k] == 0 && !inside_verb(kernel_specs[k].name)) {
            printf("    no test launched %s\n", kernel_specs[k].name);
            missing++;
        }
    return missing ? FAILED : PASSED;
}

const struct test coverage_tests[] = {
    {"every_kernel", test_every_kernel},
    {NULL, NULL},
};
