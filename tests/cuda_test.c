// What only NVIDIA GPUs show: memory that others have taken, a device that fails, links. Skipped on
// other devices.
#include "tests/test.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char CHILD[] = "DITMOE_TEST_CHILD"; // set in a process that a test started

static bool is_cuda(const struct device *dev)
{
    return dev && !strcmp(dev->api->name, "cuda");
}

// Two users of one device, each of which thinks that the memory seen free is its own.
static int test_memory_full(void)
{
    struct device *dev = test_device(0), *other;
    struct mem *most = NULL, *more = NULL;
    if (!is_cuda(dev))
        return SKIPPED;
    OK(dev->api->open(&dev->info, 0, &other));
    size_t bytes = (size_t)(other->info.memory * 6 / 10);
    OK(other->api->alloc(other, bytes, &most));
    uint64_t memory = dev->info.memory;
    dev->info.memory = dev->info.memory_driver;
    int code = dev->api->alloc(dev, bytes, &more);
    dev->info.memory = memory;
    other->api->free(most);
    other->api->close(other);
    CHECK(code == ERR_NOMEM && !more, "code %d", code);
    CHECK(strstr(error_message(), "is out of memory") && strstr(error_message(), "are free"), "%s",
          error_message());
    OK(dev->api->alloc(dev, bytes, &more)); // and goes on when there is room again
    dev->api->free(more);
    return PASSED;
}

// A kernel that writes far beyond its memory: in this process the device is lost. Exit status 0:
// all was said as it should be.
static int lose_device(void)
{
    struct device *dev = test_device(0);
    struct stream *s;
    struct mem *x;
    enum { GROUPS = 1 << 24 };
    CHECK(dev, "no device");
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->alloc(dev, 4096, &x));
    const union arg args[] = {{.b = x}, {.b = x}, {.u = UINT32_MAX}, {.u = 0}};
    OK(dev->api->launch(s, KERNEL_silu_fwd, (const int[]){GROUPS, 1, 1}, args, 4));
    int code = dev->api->sync(s);
    CHECK(code == ERR_LOST, "code %d: %s", code, error_message());
    CHECK(strstr(error_message(), "the CUDA device failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)") &&
              strstr(error_message(), "start again"),
          "%s", error_message());
    code = dev->api->fill(s, x, 0, 4096, 0); // and so says everything after it
    CHECK(code == ERR_LOST, "code %d: %s", code, error_message());
    dev->api->free(x);
    dev->api->stream_free(s);
    return PASSED;
}

// Runs the test `name` of this program again with `setting` in its environment, on the same device.
static int again_with(const char *setting, const char *name)
{
    char program[PATH_MAX] = "", command[PATH_MAX + 256], output[2000];
    struct device *dev = test_device(0);
    if (!is_cuda(dev))
        return SKIPPED;
    CHECK(readlink("/proc/self/exe", program, sizeof program - 1) > 0, "no /proc");
    snprintf(command, sizeof command, "%s=1 %s '%s' --device %s %s 2>&1", CHILD, setting, program,
             dev->info.key, name);
    FILE *pipe = popen(command, "r");
    CHECK(pipe, "cannot start %s", command);
    size_t length = fread(output, 1, sizeof output - 1, pipe);
    output[length] = 0;
    int status = pclose(pipe);
    CHECK(status == 0, "status %d: %s", status, output);
    return PASSED;
}

static int test_device_lost(void)
{
    return getenv(CHILD) ? lose_device() : again_with("", "cuda/device_lost");
}

static int multiply_without_library(void)
{
    enum { N = 64 };
    struct device *dev = test_device(0);
    struct stream *s;
    struct mem *x, *y;
    static float ones[N * N], out[N * N];
    CHECK(dev, "no device");
    CHECK(strstr(dev->info.library, "cannot be opened; own kernels multiply"), "%s",
          dev->info.library);
    for (int i = 0; i < N * N; i++)
        ones[i] = 1;
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->alloc(dev, sizeof ones, &x));
    OK(dev->api->alloc(dev, sizeof ones, &y));
    OK(dev->api->write(s, x, 0, ones, sizeof ones));
    const struct gemm g = {.m = N, .n = N, .k = N, .trans_b = true, .a = x, .b = x, .c = y};
    CHECK(dev->api->gemm_space(dev, &g) == 0, "own kernels want no scratch");
    OK(dev->api->gemm(s, &g));
    OK(dev->api->read(s, y, 0, out, sizeof out));
    for (int i = 0; i < N * N; i++)
        CHECK(out[i] == N, "element %d is %g", i, (double)out[i]);
    dev->api->free(x);
    dev->api->free(y);
    dev->api->stream_free(s);
    return PASSED;
}

static int test_without_library(void)
{
    return getenv(CHILD) ? multiply_without_library()
                         : again_with("DITMOE_CUBLASLT=/nowhere.so", "cuda/without_library");
}

static int test_links(void)
{
    struct device_info list[64];
    int count = devices_list(list, 64), pairs = 0;
    OK(count);
    for (int i = 0; i < count; i++)
        for (int k = 0; k < count; k++) {
            struct device_link there, back;
            if (i == k || list[i].backend != &backend_cuda || list[k].backend != &backend_cuda)
                continue;
            OK(backend_cuda.link(&list[i], &list[k], &there));
            OK(backend_cuda.link(&list[k], &list[i], &back));
            CHECK(there.peer == back.peer && there.nvlink == back.nvlink, "%s and %s", list[i].key,
                  list[k].key);
            CHECK(there.peer || (!there.nvlink && !there.atomics), "%s to %s", list[i].key,
                  list[k].key);
            pairs++;
        }
    return pairs ? PASSED : SKIPPED;
}

// What `ditmoe devices` tells of each.
static int test_told(void)
{
    const struct device *dev = test_device(0);
    if (!is_cuda(dev))
        return SKIPPED;
    CHECK(dev->info.pci[0] && strstr(dev->info.language, "compute capability "), "%s",
          dev->info.language);
    CHECK(strstr(dev->info.library, "cuBLASLt"), "%s", dev->info.library);
    CHECK(strstr(dev->info.tuned, "attention") && strstr(dev->info.tuned, "fused"), "%s",
          dev->info.tuned);
    CHECK(!strstr(dev->info.tuned, "gemm_sm90") == !strstr(dev->info.language, " 9.0"), "%s on %s",
          dev->info.tuned, dev->info.language);
    return PASSED;
}

const struct test cuda_tests[] = {
    {"told", test_told},
    {"memory_full", test_memory_full},
    {"device_lost", test_device_lost},
    {"without_library", test_without_library},
    {"links", test_links},
    {0},
};
