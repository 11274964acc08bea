// ditmoe devices: what there is to run on, where it sits in the machine, and the key for --device.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/command.h"
#include "tools/topology_show.h"

enum { DEVICES_MAX = 64 };

struct devices_options {
    int json, topology;
    const char *xml, *png;
};

#define AT(member) offsetof(struct devices_options, member)
static const struct option_spec output_options[] = {
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON", AT(json), 0, 0, NULL},
    {"topology", 0, OPTION_FLAG, NULL, "no",
     "print the machine as hwloc sees it instead: packages, NUMA nodes, PCIe, NVLink, network",
     AT(topology), 0, 0, NULL},
    {"xml", 0, OPTION_STRING, "FILE", NULL,
     "with --topology: of the machine that this hwloc XML file (lstopo machine.xml) describes",
     AT(xml), 0, 0, NULL},
    {"png", 0, OPTION_STRING, "FILE", NULL, "with --topology: draw it too", AT(png), 0, 0, NULL},
    {0},
};
#undef AT

static double gib(uint64_t bytes)
{
    return (double)bytes / (1 << 30);
}

// ---- text: Machine, then its devices, by NUMA node where they have one -------------------------

static void print_memory(const char *margin, const struct device_info *d)
{
    printf("%smemory    %.2f GiB%s", margin, gib(d->memory),
           d->unified ? ", shared with the host" : "");
    if (d->memory != d->memory_driver)
        printf(" (the driver says %.2f GiB)", gib(d->memory_driver));
    printf("; %.2f GiB in one buffer\n", gib(d->max_alloc));
}

// "PCIe", "NVLink": how a device reaches another.
static const char *road(const struct device_link *l)
{
    return l->nvlink ? "NVLink" : l->peer ? "PCIe, directly" : "the host's memory";
}

// A line for each other device of the same backend, where the backend knows.
static void print_links(const char *margin, const struct device_info *d,
                        const struct device_info *list, int count)
{
    struct device_link l;
    for (int i = 0; i < count; i++)
        if (d->backend->link && list[i].backend == d->backend && list[i].index != d->index &&
            d->backend->link(d, &list[i], &l) >= 0)
            printf("%sto %-7s %s%s\n", margin, list[i].key, road(&l),
                   l.atomics ? ", with atomics" : "");
}

static void print_device(int depth, const struct device_info *d, bool is_auto,
                         const struct device_info *list, int count)
{
    char margin[64];
    printf("%*s%-10s %s%s\n", depth * 2, "", d->key, d->name,
           is_auto ? "  (taken by --device auto)" : "");
    snprintf(margin, sizeof margin, "%*s", depth * 2 + 11, "");
    printf("%skind      %s, %d compute units%s", margin, device_kind_name(d->kind),
           d->compute_units, d->clock_mhz ? "" : "\n");
    if (d->clock_mhz)
        printf(" at up to %d MHz\n", d->clock_mhz);
    print_memory(margin, d);
    printf("%sfloats    vectors of %d; fp16 %s, fp64 %s\n", margin, d->vector_width,
           d->fp16 ? "yes" : "no", d->fp64 ? "yes" : "no");
    printf("%splace     %s%s\n", margin, d->place, d->pci[0] ? "" : " (no PCI id)");
    if (d->twin[0])
        printf("%stwin      %s is the same device\n", margin, d->twin);
    printf("%sdriver    %s %s, %s, by %s\n", margin, d->platform, d->driver, d->language,
           d->vendor);
    if (d->library[0])
        printf("%slibrary   %s\n", margin, d->library);
    if (d->tuned[0])
        printf("%stuned     %s (with --precision bf16)\n", margin, d->tuned);
    if (d->nvlinks)
        printf("%snvlink    %d connections up\n", margin, d->nvlinks);
    print_links(margin, d, list, count);
}

static int compare_nodes(const void *a, const void *b)
{
    const struct device_info *x = *(const struct device_info *const *)a;
    const struct device_info *y = *(const struct device_info *const *)b;
    if (x->numa != y->numa)
        return x->numa < y->numa ? -1 : 1;
    return (x > y) - (x < y);
}

static void print_tree(const struct device_info *list, int count, const char *best)
{
    const struct device_info *sorted[DEVICES_MAX];
    int node = -1;
    for (int i = 0; i < count; i++)
        sorted[i] = &list[i];
    qsort(sorted, (size_t)count, sizeof sorted[0], compare_nodes);
    printf("Machine\n");
    for (int i = 0; i < count; i++) {
        const struct device_info *d = sorted[i];
        if (d->numa != node)
            printf("  NUMANode %d\n", node = d->numa);
        print_device(node < 0 ? 1 : 2, d, !strcmp(d->key, best), list, count);
    }
    if (devices_note()[0])
        printf("  %s\n", devices_note());
}

// ---- JSON --------------------------------------------------------------------------------------

static json_t *text_or_null(const char *text)
{
    return text[0] ? json_string(text) : json_null();
}

static json_t *links_json(const struct device_info *d, const struct device_info *list, int count)
{
    json_t *links = json_array();
    struct device_link l;
    for (int i = 0; i < count; i++)
        if (d->backend->link && list[i].backend == d->backend && list[i].index != d->index &&
            d->backend->link(d, &list[i], &l) >= 0)
            json_array_append_new(links, json_pack("{s:s, s:b, s:b, s:b, s:i}", "to", list[i].key,
                                                   "peer", l.peer, "nvlink", l.nvlink, "atomics",
                                                   l.atomics, "rank", l.rank));
    return links;
}

static json_t *device_json(const struct device_info *d, bool is_auto,
                           const struct device_info *list, int count)
{
    json_t *json = json_pack(
        "{s:s, s:s, s:b, s:s, s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:b, s:i, s:i, s:i, "
        "s:b, s:b, s:o, s:o, s:s, s:o}",
        "key", d->key, "backend", d->backend->name, "auto", is_auto, "kind",
        device_kind_name(d->kind), "name", d->name, "platform", d->platform, "vendor", d->vendor,
        "driver", d->driver, "language", d->language, "memory", (json_int_t)d->memory,
        "memory_driver", (json_int_t)d->memory_driver, "max_alloc", (json_int_t)d->max_alloc,
        "align", (json_int_t)d->align, "unified", d->unified, "compute_units", d->compute_units,
        "clock_mhz", d->clock_mhz, "vector_width", d->vector_width, "fp16", d->fp16, "fp64",
        d->fp64, "pci", text_or_null(d->pci), "numa",
        d->numa >= 0 ? json_integer(d->numa) : json_null(), "place", d->place, "twin",
        text_or_null(d->twin));
    json_object_set_new(json, "library", text_or_null(d->library));
    json_object_set_new(json, "tuned", text_or_null(d->tuned));
    json_object_set_new(json, "nvlinks", json_integer(d->nvlinks));
    json_object_set_new(json, "links", links_json(d, list, count));
    return json;
}

static void print_json(const struct device_info *list, int count, const char *best)
{
    json_t *devices = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(devices,
                              device_json(&list[i], !strcmp(list[i].key, best), list, count));
    json_t *root = json_pack("{s:o}", "devices", devices);
    json_dumpf(root, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(root);
}

static int show_topology(const struct devices_options *o)
{
    struct topology *t = NULL;
    int code = o->xml ? topology_read(o->xml, &t) : topology_here(&t);
    if (code >= 0 && o->png)
        code = topology_draw(o->png, t);
    if (code >= 0 && o->json) {
        json_t *json = topology_json(t);
        json_dumpf(json, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(json);
    } else if (code >= 0) {
        topology_print(t, stdout);
    }
    topology_free(t);
    return code < 0 ? report_failure("devices") : 0;
}

int cmd_devices(int argc, char **argv)
{
    struct devices_options o = {0};
    struct device_info list[DEVICES_MAX], best = {0};
    const struct option_group groups[] = {{"output", output_options, &o}, {0}};
    const struct command command = {
        .name = "devices",
        .summary = "Lists the devices that this machine has, and the keys for --device.",
        .about = "A device's key stays the same as long as the drivers do. Devices that have no "
                 "place on a PCI bus, such as CPUs, are shown at the root of the machine.",
        .example = "ditmoe devices --json",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if ((o.xml || o.png) && !o.topology)
        return usage_error("devices", "--%s needs --topology", o.xml ? "xml" : "png");
    if (o.topology)
        return show_topology(&o);
    int count = devices_list(list, DEVICES_MAX);
    if (count < 0)
        return report_failure("devices");
    int found = devices_find("auto", &best);
    if (o.json)
        print_json(list, count, best.key);
    else if (count > 0)
        print_tree(list, count, best.key);
    return found < 0 ? report_failure("devices") : 0;
}
