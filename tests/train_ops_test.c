#include "tests/test.h"
const struct test train_ops_tests[] = {{0}};
