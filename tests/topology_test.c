// Topologies of machines that are not here, from tests/topologies, of this one, and files that are
// none.
#include "runtime/topology.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int open_machine(const char *name, struct topology **out)
{
    char path[512];
    snprintf(path, sizeof path, "%s/topologies/%s", TEST_DATA, name);
    return topology_read(path, out);
}

static int count_kind(const struct topology *t, enum topology_kind kind)
{
    int count = 0;
    for (int i = 0; i < t->count; i++)
        count += t->objects[i].kind == kind;
    return count;
}

static int machines(void)
{
    static const struct {
        const char *file;
        int packages, accelerators, networks, switches; // accelerators with the CPU
        double nvlink;                                  // of the first two GPUs, GB/s
        uint64_t memory;                                // of the first accelerator, GiB
    } cases[] = {{"power8.xml", 2, 5, 0, 0, 40, 15},
                 {"dgx2.xml", 2, 17, 0, 12, 150, 0},
                 {"hgx8.xml", 2, 9, 8, 0, 450, 79},
                 {"mixed.xml", 1, 3, 1, 0, 0, 79}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct topology *t;
        OK(open_machine(cases[i].file, &t));
        const struct topology_object *first = &t->objects[t->accelerator[0]];
        CHECK(count_kind(t, TOPOLOGY_PACKAGE) == cases[i].packages, "%s", cases[i].file);
        CHECK(t->nodes == cases[i].packages, "%s: %d NUMA nodes", cases[i].file, t->nodes);
        CHECK(t->accelerators == cases[i].accelerators, "%s: %d", cases[i].file, t->accelerators);
        CHECK(count_kind(t, TOPOLOGY_NETWORK) == cases[i].networks, "%s", cases[i].file);
        CHECK(count_kind(t, TOPOLOGY_SWITCH) == cases[i].switches, "%s", cases[i].file);
        CHECK(t->nvlink[1] == cases[i].nvlink * 1e9, "%s: %g", cases[i].file, t->nvlink[1]);
        CHECK(first->memory >> 30 == cases[i].memory, "%s: %g GiB", cases[i].file,
              (double)first->memory / (1 << 30));
        CHECK(t->objects[t->accelerator[t->accelerators - 1]].accelerator == DEVICE_CPU, "the CPU");
        CHECK(!first->key[0] && !t->here, "nothing of it is here");
        for (int k = 1; k < t->count; k++)
            CHECK(t->objects[k].parent >= 0 && t->objects[k].parent < k, "object %d", k);
        topology_free(t);
    }
    return PASSED;
}

// Two packages, two GPUs in each: NVLink within a pair only, and to the host.
static int power8(void)
{
    struct topology *t;
    OK(open_machine("power8.xml", &t));
    for (int a = 0; a < 4; a++) {
        const struct topology_object *o = &t->objects[t->accelerator[a]];
        CHECK(topology_node_of(t, t->accelerator[a]) == a / 2, "GPU %d", a);
        CHECK(o->nvlink_host == 40e9 && fabs(o->link / 1e9 - 15.75) < 0.01, "GPU %d's links", a);
        CHECK(!strcmp(o->name, "Tesla P100-SXM2-16GB"), "%s", o->name);
        for (int b = 0; b < 4; b++)
            CHECK(t->nvlink[a * t->accelerators + b] == (a != b && a / 2 == b / 2 ? 40e9 : 0),
                  "NVLink %d to %d", a, b);
    }
    CHECK(t->latency[1] == 40 && t->latency[0] == 10, "NUMA distances");
    topology_free(t);
    return PASSED;
}

// Every device that can be opened is in the tree once, twins together.
static int here(void)
{
    struct topology *t;
    OK(topology_here(&t));
    CHECK(t->here && t->accelerators > 0, "%d accelerators", t->accelerators);
    for (int i = 0; i < t->device_count; i++) {
        int found = 0;
        for (int a = 0; a < t->accelerators; a++) {
            const struct topology_object *o = &t->objects[t->accelerator[a]];
            found += !strcmp(o->key, t->devices[i].key) || !strcmp(o->key, t->devices[i].twin);
        }
        CHECK(found == 1, "%s is there %d times", t->devices[i].key, found);
    }
    topology_free(t);
    return PASSED;
}

static int binding(void)
{
    struct device_info cpu = {.kind = DEVICE_CPU};
    char words[160] = "";
    OK(topology_bind(&cpu, 0, 1, words,
                     sizeof words)); // all cores: nothing changes for other tests
    CHECK(!strncmp(words, "cores ", 6) || !strncmp(words, "not bound", 9), "%s", words);
    return PASSED;
}

// ---- files that are none ------------------------------------------------------------------------

static int write_bytes(const char *path, const char *bytes, size_t size)
{
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(bytes, 1, size, file) == size && fclose(file) == 0, "%s", path);
    return PASSED;
}

static int refused(const char *path, const char *what)
{
    struct topology *t = NULL;
    int code = topology_read(path, &t);
    CHECK(code == ERR_INPUT || code == ERR_IO, "%s was taken (%d)", what, code);
    CHECK(strstr(error_message(), path) && !strchr(error_message(), '\n'), "%s: %s", what,
          error_message());
    return PASSED;
}

static int not_a_topology(void)
{
    static const char *const texts[] = {
        "",
        "hello",
        "{}",
        "<html><body/></html>",
        "<?xml version=\"1.0\"?>\n<topology version=\"9.0\"/>",
        "<topology version=\"2.0\"></topology>",
        "<topology version=\"2.0\"><object type=\"Machine\"/></topology>",
        "<topology version=\"2.0\"><object type=\"Machine\" cpuset=\"0x1\"><object type=\"PU\"/>",
    };
    char path[256];
    snprintf(path, sizeof path, "%s/machine.xml", test_directory());
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        CHECK(write_bytes(path, texts[i], strlen(texts[i])) == PASSED, "written");
        CHECK(refused(path, texts[i]) == PASSED, "text %zu", i);
    }
    CHECK(refused("/nowhere/machine.xml", "no file") == PASSED, "no file");
    CHECK(refused(test_directory(), "a directory") == PASSED, "a directory");
    return PASSED;
}

// A real file cut short anywhere, or with bytes changed: refused or read, never a crash.
static int damaged(void)
{
    char from[512], path[256];
    static char text[1 << 16], changed[1 << 16];
    uint32_t dice = 1;
    snprintf(from, sizeof from, "%s/topologies/mixed.xml", TEST_DATA);
    snprintf(path, sizeof path, "%s/damaged.xml", test_directory());
    FILE *file = fopen(from, "rb");
    CHECK(file, "%s", from);
    const size_t size = fread(text, 1, sizeof text, file);
    fclose(file);
    for (size_t cut = 50; cut < size - 20; cut += size / 40) {
        CHECK(write_bytes(path, text, cut) == PASSED, "written");
        CHECK(refused(path, "a part") == PASSED, "the first %zu bytes", cut);
    }
    for (int round = 0; round < 60; round++) {
        struct topology *t = NULL;
        memcpy(changed, text, size);
        for (int k = 0; k < 4; k++) {
            dice = dice * 1664525u + 1013904223u;
            changed[(dice >> 8) % size] = (char)('0' + (dice >> 4) % 64);
        }
        CHECK(write_bytes(path, changed, size) == PASSED, "written");
        if (topology_read(path, &t) >= 0)
            topology_free(t);
    }
    return PASSED;
}

const struct test topology_tests[] = {
    {"machines", machines},
    {"power8", power8},
    {"here", here},
    {"binding", binding},
    {"not_a_topology", not_a_topology},
    {"damaged", damaged},
    {0},
};
