// The device interface: listing, memory, launches, events, and what is cached on disk.
#include "tests/test.h"

#include <dirent.h>
#include <ftw.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "devices/cache.h"
#include "devices/host.h"
#include "devices/opencl.h"
#include "devices/tune.h"

// ---- helpers -----------------------------------------------------------------------------------

static const char CHILD[] = "DITMOE_TEST_CHILD"; // set in a process that a test started

// Runs test `name` of this program again with `setting` in its environment; its output to `out`.
static int run_again(const char *setting, const char *name, char *out, size_t size)
{
    char program[PATH_MAX] = "", command[PATH_MAX + 512];
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0)
        return -1;
    snprintf(command, sizeof command, "%s=1 %s '%s' %s 2>&1", CHILD, setting, program, name);
    FILE *pipe = popen(command, "r");
    if (!pipe)
        return -1;
    size_t length = fread(out, 1, size - 1, pipe);
    out[length] = 0;
    return pclose(pipe);
}

static bool put_file(const char *path, const void *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    bool good = file && fwrite(data, 1, size, file) == size;
    return file && fclose(file) == 0 && good;
}

static char cache_before[PATH_MAX];

// The cache moves to a fresh folder `name` of the test's directory; returns its path.
static const char *use_cache(const char *name)
{
    static char path[PATH_MAX];
    const char *before = getenv("DITMOE_CACHE");
    snprintf(cache_before, sizeof cache_before, "%s", before ? before : "");
    snprintf(path, sizeof path, "%s/%s", test_directory(), name);
    setenv("DITMOE_CACHE", path, 1);
    return path;
}

static void restore_cache(void)
{
    if (cache_before[0])
        setenv("DITMOE_CACHE", cache_before, 1);
    else
        unsetenv("DITMOE_CACHE");
}

// The path of the only file in `dir` whose name starts with `prefix`; "" for none or several.
static const char *only_file(const char *dir, const char *prefix)
{
    static char path[PATH_MAX];
    int count = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d))
        if (!strncmp(e->d_name, prefix, strlen(prefix)) && ++count)
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    if (d)
        closedir(d);
    return count == 1 ? path : "";
}

// ---- discovery ---------------------------------------------------------------------------------

static int test_list(void)
{
    struct device_info list[16];
    int count = devices_list(list, 16);
    CHECK(count >= 1, "%s", error_message());
    for (int i = 0; i < count; i++) {
        const struct device_info *d = &list[i];
        char key[32];
        snprintf(key, sizeof key, "%s:%d", d->backend->name, d->index);
        CHECK(!strcmp(d->key, key), "device %d has key %s", d->index, d->key);
        CHECK(i == 0 || list[i - 1].backend != d->backend || list[i - 1].index < d->index, "order");
        for (int j = 0; j < i; j++)
            if (d->pci[0] && d->backend != list[j].backend && !strcmp(d->pci, list[j].pci))
                CHECK(!strcmp(d->twin, list[j].key) && !strcmp(list[j].twin, d->key), "%s", d->key);
        CHECK(d->name[0] && d->platform[0] && d->driver[0] && d->language[0], "%s", d->key);
        CHECK(d->memory > 0 && d->max_alloc > 0 && d->compute_units > 0, "%s", d->key);
        CHECK(d->align >= 64 && d->align % 64 == 0, "%zu", d->align);
        CHECK(d->place[0] && (d->pci[0] || d->numa == -1), "%s: %s", d->key, d->place);
        if (d->kind == DEVICE_CPU)
            CHECK(d->memory <= (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE),
                  "%llu bytes", (unsigned long long)d->memory);
        if (!d->pci[0])
            CHECK(!strcmp(d->place, "Machine"), "%s", d->place);
    }
    CHECK(devices_list(list, 0) == 0, "no room must give no device");
    return PASSED;
}

static int test_find(void)
{
    struct device_info by_null, by_auto, by_key;
    OK(devices_find(NULL, &by_null));
    OK(devices_find("auto", &by_auto));
    CHECK(!strcmp(by_null.key, by_auto.key), "%s, %s", by_null.key, by_auto.key);
    OK(devices_find("opencl:0", &by_key));
    CHECK(by_key.index == 0, "%d", by_key.index);
    CHECK(devices_find("cuda:77", &by_key) == ERR_NODEVICE, "found cuda:77");
    CHECK(strstr(error_message(), "'cuda:77'") && strstr(error_message(), "opencl:0") &&
              !strchr(error_message(), '\n'),
          "%s", error_message());
    return PASSED;
}

static int test_no_platform(void)
{
    char out[4096], setting[256];
    struct device_info info;
    if (getenv(CHILD)) {
        printf("count %d\n", devices_list(&info, 1));
        printf("find %d: %s\n", devices_find(NULL, &info) == ERR_NODEVICE, error_message());
        return PASSED;
    }
    if (devices_list(&info, 1) == 1 && strstr(info.platform, "Oclgrind"))
        return SKIPPED; // it stands in for the loader
    snprintf(setting, sizeof setting, "OCL_ICD_VENDORS=%s CUDA_VISIBLE_DEVICES=", test_directory());
    run_again(setting, "devices/no_platform", out, sizeof out);
    CHECK(strstr(out, "count 0\n"), "%s", out);
    CHECK(strstr(out, "find 1: no OpenCL device found; install an OpenCL driver"), "%s", out);
    return PASSED;
}

// Names repeat, keys do not: PoCL can show the same CPU twice.
static int test_twins(void)
{
    char out[4096];
    struct device_info list[4];
    struct device *dev;
    if (getenv(CHILD)) {
        int count = devices_list(list, 4);
        CHECK(count == 2, "%d devices", count);
        CHECK(!strcmp(list[0].name, list[1].name), "%s, %s", list[0].name, list[1].name);
        CHECK(!strcmp(list[1].key, "opencl:1"), "%s", list[1].key);
        OK(list[1].backend->open(&list[1], 0, &dev));
        printf("opened %s\n", dev->info.key);
        dev->api->close(dev);
        return PASSED;
    }
    OK(devices_list(list, 4));
    if (!strstr(list[0].platform, "Portable Computing Language"))
        return SKIPPED;
    run_again("POCL_DEVICES='pthread pthread'", "devices/twins", out, sizeof out);
    CHECK(strstr(out, "opened opencl:1\n") && strstr(out, "1 passed, 0 failed"), "%s", out);
    return PASSED;
}

static int put_host_file(const char *root, const char *name, const char *text)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    return put_file(path, text, strlen(text)) ? 0 : -1;
}

// Memory is the least of what the OS and the control groups say, as recorded on other machines.
static int test_host_memory(void)
{
    char root[256];
    uint64_t mib = 1 << 20;
    snprintf(root, sizeof root, "%s/host", test_directory());
    CHECK(host_memory(root) == UINT64_MAX, "of nothing");
    OK(put_host_file(root, "proc/meminfo", "MemTotal:  1048576 kB\nMemFree: 5 kB\n"));
    CHECK(host_memory(root) == 1024 * mib, "installed");
    OK(put_host_file(root, "proc/meminfo", "MemTotal:  1048576 kB\nMemAvailable:  921600 kB\n"));
    CHECK(host_memory(root) == 900 * mib, "available");
    OK(put_host_file(root, "proc/self/cgroup", "0::/a/b\n"));
    OK(put_host_file(root, "sys/fs/cgroup/a/b/memory.max", "max\n"));
    CHECK(host_memory(root) == 900 * mib, "a group without limit");
    OK(put_host_file(root, "sys/fs/cgroup/a/memory.max", "536870912\n"));
    CHECK(host_memory(root) == 512 * mib, "the limit of the group above");
    OK(put_host_file(root, "proc/self/cgroup", "3:cpu:/x\n8:memory:/not/mounted\n0::/\n"));
    OK(put_host_file(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n"));
    CHECK(host_memory(root) == 256 * mib, "version 1, seen from inside a container");
    return PASSED;
}

// A machine of two packages, recorded as hwloc does: a GPU at each, and one at the root.
#define SET(mask)                                                      \
    "cpuset=\"" mask "\" complete_cpuset=\"" mask "\" nodeset=\"" mask \
    "\" complete_nodeset=\"" mask "\""
#define GPU_AT(busid, id)                                                                \
    "<object type=\"Bridge\" gp_index=\"" id                                             \
    "1\" bridge_type=\"0-1\" depth=\"0\" bridge_pci=\"0000:[" busid "-" busid            \
    "]\"><object type=\"PCIDev\" gp_index=\"" id "2\" pci_busid=\"0000:" busid ":00.0\"" \
    " pci_type=\"0302 [10de:2330] [10de:16c1] a1\" pci_link_speed=\"0.0\"/></object>"
#define PACKAGE(n, mask, gpu)                                                                      \
    "<object type=\"Package\" os_index=\"" n "\" gp_index=\"1" n                                   \
    "\" " SET(mask) ">"                                                                            \
                    "<object type=\"NUMANode\" os_index=\"" n "\" gp_index=\"2" n                  \
                    "\" local_memory=\"4194304\" " SET(mask) "/><object type=\"PU\" os_index=\"" n \
                                                             "\" gp_index=\"3" n                   \
                                                             "\" " SET(mask) "/>" gpu "</object>"
#define MACHINE(allowed)                                                                           \
    "<topology version=\"2.0\"><object type=\"Machine\" os_index=\"0\" gp_index=\"1\" " SET(       \
        "0x3") " allowed_cpuset=\"0x3\" allowed_nodeset=\"" allowed                                \
               "\">" PACKAGE("0", "0x1", GPU_AT("3b", "4")) PACKAGE("1", "0x2", GPU_AT("86", "5")) \
                   GPU_AT("c1", "6") "</object></topology>"

static void place_all(const char *xml, struct device_info list[4])
{
    char path[PATH_MAX];
    static const char *const pci[] = {"0000:86:00.0", "0000:3b:00.0", "0000:c1:00.0", ""};
    snprintf(path, sizeof path, "%s/machine.xml", test_directory());
    put_file(path, xml, strlen(xml));
    memset(list, 0, 4 * sizeof *list);
    for (int i = 0; i < 4; i++) {
        strcpy(list[i].pci, pci[i]);
        list[i].kind = i < 3 ? DEVICE_GPU : DEVICE_CPU;
        list[i].memory = list[i].memory_driver = 1000;
    }
    list[2].memory = UINT64_MAX;
    list[2].unified = true;
    setenv("HWLOC_XMLFILE", path, 1);
    host_complete(list, 4);
    unsetenv("HWLOC_XMLFILE");
}

static int test_places(void)
{
    struct device_info list[4];
    place_all(MACHINE("0x3"), list);
    CHECK(list[0].numa == 1 && !strcmp(list[0].place, "NUMANode 1 / PCI 0000:86:00.0"), "%d: %s",
          list[0].numa, list[0].place);
    CHECK(list[1].numa == 0 && !strcmp(list[1].place, "NUMANode 0 / PCI 0000:3b:00.0"), "%d: %s",
          list[1].numa, list[1].place);
    CHECK(list[2].numa == -1 && !strcmp(list[2].place, "Machine / PCI 0000:c1:00.0"), "%d: %s",
          list[2].numa, list[2].place);
    CHECK(list[3].numa == -1 && !strcmp(list[3].place, "Machine"), "%d: %s", list[3].numa,
          list[3].place);
    uint64_t host = host_memory(""), near = host / 8;
    CHECK(list[0].memory == 1000, "a card has its own memory");
    CHECK(list[3].memory > host - near && list[3].memory < host + near, "the host's: %llu",
          (unsigned long long)list[3].memory);
    CHECK(list[2].memory == list[3].memory, "an integrated GPU has no more than the host");
    place_all(MACHINE("0x1"), list); // a cpuset leaves this process one node of 4 MiB
    CHECK(list[3].memory == 4194304, "%llu", (unsigned long long)list[3].memory);
    return PASSED;
}

// ---- the list of kernels, opening --------------------------------------------------------------

static int test_kernel_specs(void)
{
    for (int i = 0; i < KERNEL_COUNT; i++) {
        const struct kernel_spec *k = &kernel_specs[i];
        size_t length = strlen(k->name);
        bool cpu_name = length > 4 && !strcmp(k->name + length - 4, "_cpu");
        CHECK(strspn(k->args, "biuf") == strlen(k->args) && k->args[0], "%s: %s", k->name, k->args);
        CHECK(k->group[0] >= 1 && k->group[1] >= 1, "%s", k->name);
        CHECK(k->group[0] * k->group[1] <= 256, "%s: some GPUs allow no more", k->name);
        CHECK(cpu_name == (k->form == FORM_CPU), "%s: name and form disagree", k->name);
        for (int j = 0; j < i; j++)
            CHECK(strcmp(k->name, kernel_specs[j].name) != 0, "%s is there twice", k->name);
    }
    return PASSED;
}

static int test_open(void)
{
    struct device *plain = test_device(0), *portable = test_device(OPEN_GPU_FORMS);
    struct device_info gone;
    struct device *none = NULL;
    CHECK(plain && portable, "no device");
    CHECK(plain->act == F32, "act");
    CHECK(plain->cpu_forms == (plain->info.kind == DEVICE_CPU), "cpu_forms");
    CHECK(!portable->cpu_forms, "OPEN_GPU_FORMS");
    for (int i = 0; i < KERNEL_COUNT && plain->info.backend == &backend_opencl; i++)
        CHECK(opencl_device_of(portable)->kernels[i] || kernel_specs[i].form == FORM_CPU,
              "%s is not made", kernel_specs[i].name);
    gone = plain->info;
    gone.index = 99;
    strcpy(gone.key, "there:99");
    CHECK(gone.backend->open(&gone, 0, &none) == ERR_NODEVICE && !none, "opened device 99");
    CHECK(strstr(error_message(), "there:99"), "%s", error_message());
    return PASSED;
}

static int test_names(void)
{
    CHECK(dtype_size(F32) == 4 && dtype_size(BF16) == 2 && dtype_size(I64) == 8, "sizes");
    CHECK(!strcmp(dtype_name(BF16), "bf16") && !strcmp(device_kind_name(DEVICE_GPU), "GPU"),
          "names");
    CHECK(!strcmp(opencl_error_name(CL_OUT_OF_RESOURCES), "CL_OUT_OF_RESOURCES"), "-5");
    CHECK(opencl_fail(CL_OUT_OF_RESOURCES, "clFinish") == ERR_DRIVER, "code");
    CHECK(!strcmp(error_message(), "OpenCL: clFinish failed: CL_OUT_OF_RESOURCES (-5)"), "%s",
          error_message());
    CHECK(opencl_fail(CL_MEM_OBJECT_ALLOCATION_FAILURE, "x") == ERR_NOMEM, "code");
    return PASSED;
}

// ---- memory ------------------------------------------------------------------------------------

// From the memory of one opened device to another's; here both are the same piece of hardware.
static int test_peer(void)
{
    struct device *here = test_device(0), *there = test_device(OPEN_BF16);
    struct mem *a, *b;
    struct stream *s, *t;
    uint32_t host[64], back[64];
    CHECK(here && there, "no device");
    if (!here->api->peer)
        return SKIPPED;
    OK(here->api->alloc(here, sizeof host, &a));
    OK(there->api->alloc(there, sizeof host, &b));
    OK(here->api->stream_new(here, &s));
    OK(there->api->stream_new(there, &t));
    for (uint32_t i = 0; i < 64; i++)
        host[i] = i * 2654435761u;
    OK(here->api->write(s, a, 0, host, sizeof host));
    OK(there->api->fill(t, b, 0, sizeof host, 7));
    OK(there->api->peer(t, b, 8, a, 16, 40));
    OK(there->api->read(t, b, 0, back, sizeof back));
    for (uint32_t i = 0; i < 64; i++)
        CHECK(back[i] == (i >= 2 && i < 12 ? host[i + 2] : 7), "word %u is %x", i, back[i]);
    here->api->stream_free(s);
    there->api->stream_free(t);
    here->api->free(a);
    there->api->free(b);
    return PASSED;
}

static int test_views(void)
{
    struct device *dev = test_device(0);
    struct mem *root, *view, *inner;
    struct stream *s;
    uint32_t back[64];
    CHECK(dev, "no device");
    size_t align = dev->info.align;
    uint64_t allocations = dev->allocations, allocated = dev->allocated;
    OK(dev->api->alloc(dev, 8 * align, &root));
    CHECK(dev->allocations == allocations + 1 && dev->allocated == allocated + 8 * align, "count");
    OK(dev->api->view(root, 2 * align, 5 * align, &view));
    OK(dev->api->view(view, align, 12, &inner)); // 3 words at 3*align, of an odd size
    CHECK(dev->allocations == allocations + 1, "a view is no allocation");
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->fill(s, root, 0, 8 * align, 1));
    OK(dev->api->fill(s, view, 0, 5 * align, 2));
    OK(dev->api->fill(s, inner, 0, 12, 3));
    OK(dev->api->read(s, root, 3 * align - 4, back, 20));
    CHECK(back[0] == 2 && back[1] == 3 && back[2] == 3 && back[3] == 3 && back[4] == 2,
          "%u %u %u %u %u", back[0], back[1], back[2], back[3], back[4]);
    OK(dev->api->read(s, root, 2 * align - 4, back, 8));
    CHECK(back[0] == 1 && back[1] == 2, "%u %u", back[0], back[1]);
    OK(dev->api->read(s, root, 7 * align - 4, back, 8));
    CHECK(back[0] == 2 && back[1] == 1, "%u %u", back[0], back[1]);
    dev->api->stream_free(s);
    dev->api->free(inner);
    dev->api->free(view);
    dev->api->free(root);
    CHECK(dev->allocated == allocated, "free() must give the bytes back");
    return PASSED;
}

static int test_too_large(void)
{
    struct device *dev = test_device(0);
    struct mem *mem = NULL;
    CHECK(dev, "no device");
    uint64_t allocations = dev->allocations, memory = dev->info.memory;
    CHECK(dev->api->alloc(dev, dev->info.max_alloc + 1, &mem) == ERR_NOMEM && !mem, "allocated");
    CHECK(strstr(error_message(), dev->info.key) && strstr(error_message(), "MiB in one buffer"),
          "%s", error_message());
    dev->info.memory = dev->allocated + 1000; // as if all but 1000 bytes were in use
    int code = dev->api->alloc(dev, 4096, &mem);
    dev->info.memory = memory;
    CHECK(code == ERR_NOMEM && !mem, "allocated more than there is");
    CHECK(strstr(error_message(), "does not fit"), "%s", error_message());
    CHECK(dev->allocations == allocations, "a failed allocation counts");
    return PASSED;
}

// ---- launches and events -----------------------------------------------------------------------

enum { COUNT = 600 };

static int launch_silu(struct device *dev, struct stream *s, int groups)
{
    static float x[COUNT], y[1024];
    struct mem *in, *out;
    for (int i = 0; i < COUNT; i++)
        x[i] = (float)(i - 300) * 0.02f;
    OK(dev->api->alloc(dev, sizeof x, &in));
    OK(dev->api->alloc(dev, sizeof y, &out));
    OK(dev->api->write(s, in, 0, x, sizeof x));
    OK(dev->api->fill(s, out, 0, sizeof y, 0x7fc00000)); // NaN
    const union arg args[] = {{.b = out}, {.b = in}, {.u = COUNT}, {.u = 0}};
    OK(dev->api->launch(s, KERNEL_silu_fwd, (const int[]){groups, 1, 1}, args, 4));
    OK(dev->api->read(s, out, 0, y, sizeof y));
    for (int i = 0; i < 1024; i++) {
        double want = i < COUNT && groups ? x[i] / (1 + exp(-(double)x[i])) : NAN;
        CHECK(isnan(want) ? isnan(y[i]) : fabs(want - (double)y[i]) < 1e-5, "y[%d] = %g, not %g", i,
              (double)y[i], want);
    }
    dev->api->free(in);
    dev->api->free(out);
    return PASSED;
}

static int test_launch(void)
{
    struct device *dev = test_device(0);
    struct stream *s;
    CHECK(dev, "no device");
    OK(dev->api->stream_new(dev, &s));
    int result = launch_silu(dev, s, 3);
    if (result == PASSED)
        result = launch_silu(dev, s, 0); // no groups: no launch
    dev->api->stream_free(s);
    return result;
}

// Thousands of views that overlap, some alive to the end and some gone while the launch that they
// were made for still waits: each launch adds one place to the next, so that all must take part, in
// order. NVIDIA's OpenCL crashes where views are sub-buffers.
static int test_many_views(void)
{
    enum { VIEWS = 4096, WORDS = 8 };
    struct device *dev = test_device(0);
    struct stream *s;
    struct mem *root, *to, **from = calloc(VIEWS, sizeof *from);
    float ends[WORDS + 1];
    CHECK(dev && from, "no device");
    const size_t align = dev->info.align;
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->alloc(dev, (VIEWS + 1) * align, &root));
    OK(dev->api->fill(s, root, 0, (VIEWS + 1) * align, 0x3f800000)); // 1
    for (size_t i = 0; i < VIEWS; i++) {
        OK(dev->api->view(root, i * align, (VIEWS - i + 1) * align, &from[i]));
        OK(dev->api->view(from[i], align, WORDS * sizeof(float), &to));
        const union arg args[] = {{.b = to}, {.b = from[i]}, {.u = WORDS}, {.u = WORDS},
                                  {.i = 1},  {.i = 1},       {.u = 0}};
        OK(dev->api->launch(s, KERNEL_add, (const int[]){1, 1, 1}, args, 7));
        dev->api->free(to);
    }
    OK(dev->api->read(s, from[VIEWS - 1], align, ends, sizeof ends));
    for (int i = 0; i < WORDS; i++)
        CHECK(ends[i] == VIEWS + 1, "word %d is %g", i, (double)ends[i]);
    CHECK(ends[WORDS] == 1, "written past the view's end");
    for (size_t i = 0; i < VIEWS; i++)
        dev->api->free(from[i]);
    dev->api->free(root);
    dev->api->stream_free(s);
    free(from);
    return PASSED;
}

// A wrong number of arguments is a bug of the program: it says where and aborts.
static int test_arity(void)
{
    struct device *dev = test_device(0);
    struct stream *s;
    int status = 0;
    CHECK(dev, "no device");
    OK(dev->api->stream_new(dev, &s));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(1);
        const union arg args[3] = {{0}};
        dev->api->launch(s, KERNEL_silu_fwd, (const int[]){1, 1, 1}, args, 3);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "status %d", status);
    dev->api->stream_free(s);
    return PASSED;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int test_events(void)
{
    struct device *dev = test_device(0);
    struct mem *mem;
    struct stream *s, *other;
    struct event *from, *to;
    double seconds = -1;
    uint32_t word = 0;
    size_t bytes = 32 << 20;
    CHECK(dev, "no device");
    OK(dev->api->alloc(dev, bytes, &mem));
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->stream_new(dev, &other));
    OK(dev->api->event_new(dev, &from));
    OK(dev->api->event_new(dev, &to));
    OK(dev->api->wait(other, from)); // never recorded: nothing to wait for
    double start = now();
    OK(dev->api->record(s, from));
    for (uint32_t i = 1; i <= 4; i++)
        OK(dev->api->fill(s, mem, 0, bytes, i));
    OK(dev->api->record(s, to));
    OK(dev->api->wait(other, to));
    OK(dev->api->read(other, mem, bytes - 4, &word, 4));
    double wall = now() - start;
    CHECK(word == 4, "the other stream did not wait: %u", word);
    OK(dev->api->sync(s));
    OK(dev->api->elapsed(from, to, &seconds));
    CHECK(seconds > 1e-5 && seconds <= wall, "%g s of %g", seconds, wall);
    OK(dev->api->record(s, from)); // an event can be used again
    OK(dev->api->sync(s));
    OK(dev->api->elapsed(to, from, &seconds));
    CHECK(seconds >= 0, "%g", seconds);
    dev->api->event_free(from);
    dev->api->event_free(to);
    dev->api->stream_free(other);
    dev->api->stream_free(s);
    dev->api->free(mem);
    return PASSED;
}

// ---- the cache of programs ---------------------------------------------------------------------

static int make_program(struct opencl_device *dev)
{
    const char *text = "__kernel void one(__global int *x) { x[0] = 1; }";
    cl_int code;
    dev->program = clCreateProgramWithSource(dev->context, 1, &text, NULL, &code);
    CHECK(code == CL_SUCCESS, "%s", opencl_error_name(code));
    code = clBuildProgram(dev->program, 1, &dev->id, "", NULL, NULL);
    CHECK(code == CL_SUCCESS, "%s", opencl_error_name(code));
    return PASSED;
}

static bool loads(struct opencl_device *dev, const char *identity)
{
    dev->program = NULL;
    if (!opencl_binary_load(dev, identity, ""))
        return false;
    cl_int code;
    cl_kernel kernel = clCreateKernel(dev->program, "one", &code);
    if (code == CL_SUCCESS)
        clReleaseKernel(kernel);
    clReleaseProgram(dev->program);
    return code == CL_SUCCESS;
}

// Corrupt, cut and foreign files must not even reach the driver.
static int damage(struct opencl_device *dev, const char *dir)
{
    const char *name = strrchr(only_file(dir, "program-"), '/');
    CHECK(name, "not one file in %s", dir);
    char path[PATH_MAX], identity[] = "good";
    snprintf(path, sizeof path, "%s", only_file(dir, "program-"));
    size_t size = 0;
    unsigned char *data = cache_read(name + 1, &size);
    CHECK(data && size > 1024, "%zu bytes", size);
    data[size - 5] ^= 1;
    bool written = put_file(path, data, size), flipped = loads(dev, identity);
    data[size - 5] ^= 1;
    written = written && put_file(path, data, size - 1);
    bool cut = loads(dev, identity);
    written = written && put_file(path, data, 10);
    bool stub = loads(dev, identity);
    data[40] ^= 1; // another identity under this name
    written = written && put_file(path, data, size);
    bool foreign = loads(dev, identity);
    data[40] ^= 1;
    written = written && put_file(path, data, size);
    bool whole = loads(dev, identity);
    free(data);
    CHECK(written && !flipped && !cut && !stub && !foreign && whole, "%d %d %d %d %d %d", written,
          flipped, cut, stub, foreign, whole);
    return PASSED;
}

static int test_program_cache(void)
{
    struct device *base = test_device(0);
    CHECK(base, "no device");
    if (base->info.backend != &backend_opencl)
        return SKIPPED; // nothing is compiled at run time
    struct opencl_device dev = {.context = opencl_device_of(base)->context,
                                .id = opencl_device_of(base)->id};
    const char *dir = use_cache("programs");
    CHECK(!loads(&dev, "good"), "loaded from nothing");
    if (make_program(&dev) != PASSED)
        return FAILED;
    cl_program program = dev.program;
    CHECK(opencl_binary_save(&dev, "good"), "not saved");
    CHECK(loads(&dev, "good") && !loads(&dev, "other"), "by identity");
    int result = damage(&dev, dir);
    setenv("DITMOE_CACHE", "/dev/null/nowhere", 1);
    dev.program = program;
    CHECK(!opencl_binary_save(&dev, "good") && !loads(&dev, "good"), "in no directory");
    clReleaseProgram(program);
    restore_cache();
    return result;
}

static uint64_t cached; // of all compiled files: changes when one is added or written again

static int add_file(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)ftw;
    const char *dot = strrchr(path, '.');
    if (type == FTW_F && dot && (!strcmp(dot, ".so") || !strcmp(dot, ".bin")))
        cached += 1 + (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec;
    return 0;
}

// The second start finds everything compiled, in PoCL's cache or in ours.
static int test_warm_start(void)
{
    char dir[256], setting[1024], name[64], out[4096];
    uint64_t seen[2];
    if (getenv(CHILD))
        return test_launch();
    struct device *dev = test_device(0);
    CHECK(dev, "no device");
    if (dev->info.backend != &backend_opencl)
        return SKIPPED; // nothing is compiled at run time
    snprintf(name, sizeof name, "--device %s devices/warm_start", dev->info.key);
    snprintf(dir, sizeof dir, "%s/warm", test_directory());
    snprintf(setting, sizeof setting, "DITMOE_CACHE=%s/own POCL_CACHE_DIR=%s/pocl", dir, dir);
    for (int i = 0; i < 2; i++) {
        run_again(setting, name, out, sizeof out);
        CHECK(strstr(out, "1 passed, 0 failed"), "%s", out);
        cached = 0;
        nftw(dir, add_file, 16, FTW_PHYS);
        seen[i] = cached;
    }
    CHECK(seen[0] > 0, "nothing was kept");
    CHECK(seen[1] == seen[0], "the second start compiled again");
    return PASSED;
}

// ---- the tuner ---------------------------------------------------------------------------------

struct job {
    int runs[3];
    int broken; // a candidate that fails
};

// Candidate 1 takes 0.1 ms, the others 1 ms.
static int run_job(void *user, int candidate, int repeats)
{
    struct job *job = user;
    job->runs[candidate]++;
    if (candidate == job->broken)
        return fail(ERR_DRIVER, "candidate %d cannot", candidate);
    struct timespec t = {0, (candidate == 1 ? 100000L : 1000000L) * repeats};
    nanosleep(&t, NULL);
    return 0;
}

static int runs_of(struct device *dev, const char *key, int broken, int *choice)
{
    struct job job = {.broken = broken};
    *choice = tune_choose(dev, key, 3, run_job, &job);
    return job.runs[0] + job.runs[1] + job.runs[2];
}

// Another process measures for `dev`, so that this one can only know it from the file.
static int tune_elsewhere(struct device *dev)
{
    int status = 0, choice;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(runs_of(dev, "k", 0, &choice) > 3 && choice == 1 ? 0 : 1);
    return child > 0 && waitpid(child, &status, 0) == child ? status : -1;
}

static int test_tuner(void)
{
    struct device dev = {.info = {.name = "A", .platform = "tuner test"}};
    int choice;
    const char *dir = use_cache("tune");
    CHECK(runs_of(&dev, "k", -1, &choice) > 9 && choice == 1, "candidate %d", choice);
    CHECK(runs_of(&dev, "k", -1, &choice) == 0 && choice == 1, "not remembered");
    CHECK(only_file(dir, "tune-")[0], "no file");
    CHECK(runs_of(&dev, "k2", 1, &choice) > 6 && choice != 1, "took a candidate that fails");
    struct job job = {.broken = 0};
    CHECK(tune_choose(&dev, "k3", 1, run_job, &job) == 0 && job.runs[0] == 0, "only one");
    setenv("DITMOE_TUNE", "0", 1);
    CHECK(runs_of(&dev, "k", -1, &choice) == 0 && choice == 0, "DITMOE_TUNE=0");
    unsetenv("DITMOE_TUNE");
    restore_cache();
    return PASSED;
}

static int all_fail(void *user, int candidate, int repeats)
{
    (void)user, (void)repeats;
    return fail(ERR_NOMEM, "candidate %d", candidate);
}

static int test_tuner_file(void)
{
    struct device dev = {.info = {.name = "B", .platform = "tuner test"}};
    struct device twin = {.info = {.name = "C", .platform = "tuner test"}};
    int choice;
    const char *dir = use_cache("tune2");
    CHECK(tune_elsewhere(&dev) == 0, "the child");
    CHECK(runs_of(&dev, "k", -1, &choice) == 0 && choice == 1, "not read from the file");
    CHECK(unlink(only_file(dir, "tune-")) == 0 && tune_elsewhere(&twin) == 0, "the child");
    CHECK(put_file(only_file(dir, "tune-"), "{\"choices\": 3", 13), "write");
    CHECK(runs_of(&twin, "k", -1, &choice) > 9 && choice == 1, "believed a corrupt file");
    CHECK(tune_choose(&twin, "none", 2, all_fail, NULL) == ERR_NOMEM, "all candidates fail");
    setenv("DITMOE_CACHE", "/dev/null/nowhere", 1);
    CHECK(runs_of(&twin, "k4", -1, &choice) > 9 && choice == 1, "without a directory");
    CHECK(runs_of(&twin, "k4", -1, &choice) == 0 && choice == 1, "not remembered in memory");
    restore_cache();
    return PASSED;
}

const struct test devices_tests[] = {
    {"list", test_list},
    {"find", test_find},
    {"no_platform", test_no_platform},
    {"twins", test_twins},
    {"host_memory", test_host_memory},
    {"places", test_places},
    {"kernel_specs", test_kernel_specs},
    {"open", test_open},
    {"names", test_names},
    {"peer", test_peer},
    {"views", test_views},
    {"too_large", test_too_large},
    {"launch", test_launch},
    {"many_views", test_many_views},
    {"arity", test_arity},
    {"events", test_events},
    {"program_cache", test_program_cache},
    {"warm_start", test_warm_start},
    {"tuner", test_tuner},
    {"tuner_file", test_tuner_file},
    {0},
};
