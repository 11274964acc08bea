// See topology_show.h: text and JSON.
#include "tools/topology_show.h"

#include <string.h>

const char *object_title(const struct topology_object *o)
{
    static const char *const titles[] = {
        [TOPOLOGY_MACHINE] = "Machine", [TOPOLOGY_PACKAGE] = "Package",
        [TOPOLOGY_NUMA] = "NUMA node",  [TOPOLOGY_BRIDGE] = "",
        [TOPOLOGY_NETWORK] = "Network", [TOPOLOGY_SWITCH] = "NVSwitch"};
    if (o->kind != TOPOLOGY_ACCELERATOR)
        return titles[o->kind];
    return o->accelerator == DEVICE_CPU   ? "CPU"
           : o->accelerator == DEVICE_GPU ? "GPU"
                                          : "Accelerator";
}

const char *format_memory(uint64_t bytes, char out[32])
{
    const double gib = (double)bytes / (1 << 30);
    snprintf(out, 32, "%.*f GiB", gib < 100 ? 1 : 0, gib);
    return out;
}

const char *format_link(double bytes_per_second, char out[32])
{
    const double rate = bytes_per_second / 1e9;
    snprintf(out, 32, "%.*f GB/s", rate < 100 ? 1 : 0, rate);
    return out;
}

// ---- text ---------------------------------------------------------------------------------------

static void print_machine(const struct topology *t, FILE *out)
{
    char memory[32];
    const struct topology_object *m = &t->objects[0];
    fprintf(out, "Machine%s%s (%s): %d cores, %s\n", m->name[0] ? " " : "", m->name, t->source,
            topology_cores(t), format_memory(topology_memory(t), memory));
}

static void print_object(const struct topology_object *o, FILE *out)
{
    char text[32];
    fprintf(out, "%*s%s", 2 * o->depth, "", object_title(o));
    if (o->kind == TOPOLOGY_PACKAGE || o->kind == TOPOLOGY_NUMA)
        fprintf(out, " %d", o->number);
    if (o->name[0])
        fprintf(out, "%s%s", o->kind == TOPOLOGY_BRIDGE ? "" : " ", o->name);
    if (o->pci[0])
        fprintf(out, ", %s", o->pci);
    if (o->cores)
        fprintf(out, ", %d cores", o->cores);
    if (o->memory)
        fprintf(out, "%s%s", o->kind == TOPOLOGY_NUMA ? ": " : ", ",
                format_memory(o->memory, text));
    if (o->link > 0)
        fprintf(out, ", PCIe %s", format_link(o->link, text));
    if (o->slowest > 0 && o->slowest < o->link)
        fprintf(out, " (%s on the way)", format_link(o->slowest, text));
    if (o->nvlink_host > 0)
        fprintf(out, ", NVLink to the host %s", format_link(o->nvlink_host, text));
    if (o->drivers[0])
        fprintf(out, " (%s)", o->drivers);
    if (o->key[0])
        fprintf(out, "  [%s%s%s]", o->key, o->device && o->device->twin[0] ? ", " : "",
                o->device ? o->device->twin : "");
    fprintf(out, "\n");
}

static void print_latencies(const struct topology *t, FILE *out)
{
    fprintf(out, "NUMA distances (10: local)\n      ");
    for (int a = 0; a < t->nodes; a++)
        fprintf(out, "%5d", t->objects[t->node[a]].number);
    for (int a = 0; a < t->nodes; a++) {
        fprintf(out, "\n  %4d", t->objects[t->node[a]].number);
        for (int b = 0; b < t->nodes; b++)
            fprintf(out, "%5.0f", t->latency[a * t->nodes + b]);
    }
    fprintf(out, "\n");
}

// One line where all pairs of GPUs are alike, else the matrix.
static void print_nvlink(const struct topology *t, FILE *out)
{
    double most = 0, least = 1e300;
    int gpus = 0;
    for (int a = 0; a < t->accelerators; a++)
        gpus += t->objects[t->accelerator[a]].accelerator == DEVICE_GPU;
    for (int a = 0; a < gpus; a++)
        for (int b = 0; b < gpus; b++)
            if (a != b) {
                const double rate = t->nvlink[a * t->accelerators + b];
                most = rate > most ? rate : most;
                least = rate < least ? rate : least;
            }
    if (most == 0)
        return;
    if (most == least) {
        fprintf(out, "NVLink: %.0f GB/s one way between any two of %d GPUs\n", most / 1e9, gpus);
        return;
    }
    fprintf(out, "NVLink, GB/s one way\n      ");
    for (int a = 0; a < gpus; a++)
        fprintf(out, "%5d", a);
    for (int a = 0; a < gpus; a++) {
        fprintf(out, "\n  %4d", a);
        for (int b = 0; b < gpus; b++)
            if (a == b)
                fprintf(out, "%5s", "-");
            else
                fprintf(out, "%5.0f", t->nvlink[a * t->accelerators + b] / 1e9);
    }
    fprintf(out, "\n");
}

void topology_print(const struct topology *t, FILE *out)
{
    print_machine(t, out);
    for (int i = 1; i < t->count; i++)
        print_object(&t->objects[i], out);
    if (t->latency && t->nodes > 1)
        print_latencies(t, out);
    print_nvlink(t, out);
}

// ---- JSON ---------------------------------------------------------------------------------------

static json_t *matrix_json(const double *values, int n)
{
    json_t *rows = json_array();
    for (int a = 0; a < n; a++) {
        json_t *row = json_array();
        for (int b = 0; b < n; b++)
            json_array_append_new(row, json_real(values[a * n + b]));
        json_array_append_new(rows, row);
    }
    return rows;
}

static void set_text(json_t *json, const char *key, const char *text)
{
    if (text[0])
        json_object_set_new(json, key, json_string(text));
}

static void set_rate(json_t *json, const char *key, double value)
{
    if (value > 0)
        json_object_set_new(json, key, json_real(value));
}

// Names come from files: what is not UTF-8 is left out by jansson.
static json_t *object_json(const struct topology_object *o)
{
    json_t *json =
        json_pack("{s:s, s:i}", "kind", topology_kind_name(o->kind), "parent", o->parent);
    set_text(json, "name", o->name);
    set_text(json, "pci", o->pci);
    set_text(json, "drivers", o->drivers);
    set_text(json, "key", o->key);
    if (o->kind == TOPOLOGY_PACKAGE || o->kind == TOPOLOGY_NUMA)
        json_object_set_new(json, "number", json_integer(o->number));
    if (o->kind == TOPOLOGY_ACCELERATOR)
        set_text(json, "device", device_kind_name(o->accelerator));
    if (o->cores)
        json_object_set_new(json, "cores", json_integer(o->cores));
    if (o->memory)
        json_object_set_new(json, "memory", json_integer((json_int_t)o->memory));
    set_rate(json, "pcie", o->link);
    set_rate(json, "pcie_slowest", o->slowest);
    set_rate(json, "nvlink_host", o->nvlink_host);
    return json;
}

json_t *topology_json(const struct topology *t)
{
    json_t *objects = json_array(), *accelerators = json_array();
    for (int i = 0; i < t->count; i++)
        json_array_append_new(objects, object_json(&t->objects[i]));
    for (int a = 0; a < t->accelerators; a++)
        json_array_append_new(accelerators, json_integer(t->accelerator[a]));
    json_t *json = json_pack("{s:s, s:o, s:o}", "source", t->source, "objects", objects,
                             "accelerators", accelerators);
    if (t->latency)
        json_object_set_new(json, "numa_distances", matrix_json(t->latency, t->nodes));
    json_object_set_new(json, "nvlink", matrix_json(t->nvlink, t->accelerators));
    return json;
}
