// The test frame: a suite is an array of {name, function} ended by {0}, named in suites.def.
// A test returns 0 (passed), SKIPPED, or anything else (failed, having printed why).
#ifndef DITMOE_TEST_H
#define DITMOE_TEST_H

#include <stdio.h>
#include "devices/device.h"

enum { PASSED = 0, FAILED = 1, SKIPPED = 77 };

struct test {
    const char *name; // "suite/name" is what the command line filters by substring
    int (*run)(void);
};

// The device under test (--device, default the best found) opened with `flags`; opened once per
// flags value and closed at the end. Returns NULL, having said why, when there is none.
struct device *test_device(unsigned flags);
// A fresh directory for this process, removed at the end.
const char *test_directory(void);

// Fails the test unless the condition holds; the rest is a printf message.
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("    %s:%d: %s: ", __FILE__, __LINE__, #condition);                             \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
            return FAILED;                                                                         \
        }                                                                                          \
    } while (0)
// Fails the test when a call of the library fails; prints its message.
#define OK(call) CHECK((call) >= 0, "%s", error_message())

#endif
