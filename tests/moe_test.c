#include "tests/test.h"
const struct test moe_tests[] = {{0}};
