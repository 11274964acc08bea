// ditmoe_test [--list] [--device KEY] [--portable] [NAME...]: runs the tests whose "suite/name"
// contains a NAME. --portable: on devices opened without what was tuned for them.
// Exit 0: none failed; 1: some failed; 2: usage. The last line is "N passed, N failed, N skipped".
#include "tests/test.h"

#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SUITE(name) extern const struct test name##_tests[];
#include "tests/suites.def"
#undef SUITE

static const struct {
    const char *name;
    const struct test *tests;
} suites[] = {
#define SUITE(name) {#name, name##_tests},
#include "tests/suites.def"
#undef SUITE
    {NULL, NULL},
};

static const char *device_key;
static unsigned always; // flags of every device
static struct device *opened[8];
static char directory[64];

struct device *test_device(unsigned flags)
{
    flags |= always;
    BUG_IF(flags >= 8);
    if (!opened[flags]) {
        struct device_info info;
        if (devices_find(device_key, &info) < 0 ||
            info.backend->open(&info, flags, &opened[flags]) < 0)
            printf("    no device: %s\n", error_message());
    }
    return opened[flags];
}

static int remove_entry(const char *path, const struct stat *s, int type, struct FTW *ftw)
{
    (void)s, (void)type, (void)ftw;
    return remove(path);
}

const char *test_directory(void)
{
    if (!directory[0]) {
        strcpy(directory, "/tmp/ditmoe-test-XXXXXX");
        if (!mkdtemp(directory))
            abort();
    }
    return directory;
}

static void clean_up(void)
{
    for (int i = 0; i < 8; i++)
        if (opened[i])
            opened[i]->api->close(opened[i]);
    if (directory[0])
        nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static int wanted(const char *name, char **filters, int count)
{
    for (int i = 0; i < count; i++)
        if (strstr(name, filters[i]))
            return 1;
    return count == 0;
}

int main(int argc, char **argv)
{
    int list = 0, first = 1, tally[3] = {0};
    for (; first < argc && argv[first][0] == '-'; first++) {
        if (!strcmp(argv[first], "--list"))
            list = 1;
        else if (!strcmp(argv[first], "--device") && first + 1 < argc)
            device_key = argv[++first];
        else if (!strcmp(argv[first], "--portable"))
            always = OPEN_PORTABLE;
        else {
            fprintf(stderr, "usage: ditmoe_test [--list] [--device KEY] [--portable] [NAME...]\n");
            return 2;
        }
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int s = 0; suites[s].name; s++) {
        for (const struct test *t = suites[s].tests; t->name; t++) {
            char name[128];
            snprintf(name, sizeof name, "%s/%s", suites[s].name, t->name);
            if (!wanted(name, argv + first, argc - first))
                continue;
            if (list) {
                printf("%s\n", name);
                continue;
            }
            struct timespec from, to;
            clock_gettime(CLOCK_MONOTONIC, &from);
            int result = t->run();
            clock_gettime(CLOCK_MONOTONIC, &to);
            double seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
            int kind = result == PASSED ? 0 : result == SKIPPED ? 2 : 1;
            tally[kind]++;
            printf("%-7s %s (%.1f s)\n", (const char *[]){"ok", "FAILED", "skipped"}[kind], name, seconds);
        }
    }
    clean_up();
    if (!list)
        printf("%d passed, %d failed, %d skipped\n", tally[0], tally[1], tally[2]);
    return tally[1] > 0;
}
