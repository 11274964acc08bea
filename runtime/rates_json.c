// Rates as JSON: what calibrate keeps in the cache, what --rates reads. See rates.h.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "devices/cache.h"
#include "runtime/json_file.h"
#include "runtime/rates.h"

enum { VERSION = 1, ENTRIES_MOST = 4096 };
static const char file_name[] = "rates.json";

// ---- writing ------------------------------------------------------------------------------------

static json_t *classes(const double table[RATE_CLASSES])
{
    json_t *array = json_array();
    for (int i = 0; i < RATE_CLASSES; i++)
        json_array_append_new(array, json_real(table[i]));
    return array;
}

static json_t *device_to_json(const struct device_rates *d)
{
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "name",
        d->name, "driver", d->driver, "pci", d->pci, "key", d->key, "precision",
        d->bf16 ? "bf16" : "f32", "sharing", d->sharing, "width", d->width, "dense",
        classes(d->dense), "ragged", classes(d->ragged), "attention", d->attention, "memory",
        d->memory, "launch", d->launch, "to_device", d->to_device, "to_host", d->to_host, "sample",
        d->sample, "train", d->train);
}

json_t *rates_to_json(const struct rates *r)
{
    json_t *devices = json_array(), *links = json_array(), *rows = json_array();
    for (int i = 0; i < RATE_CLASSES; i++)
        json_array_append_new(rows, json_integer(rate_rows[i]));
    for (int i = 0; i < r->count; i++)
        json_array_append_new(devices, device_to_json(&r->list[i]));
    for (int i = 0; i < r->link_count; i++) {
        const struct rates_link *l = &r->links[i];
        const struct link_rate *k = &l->rate;
        json_array_append_new(links,
                              json_pack("{s:s, s:s, s:f, s:f, s:b, s:[f, f], s:[f, f]}", "from",
                                        l->from, "to", l->to, "latency", k->latency, "bandwidth",
                                        k->bandwidth, "staged", k->staged, "layer", k->layer[0],
                                        k->layer[1], "step", k->step[0], k->step[1]));
    }
    return json_pack("{s:i, s:o, s:o, s:o, s:{s:f, s:f}}", "ditmoe_rates", VERSION, "rows", rows,
                     "devices", devices, "links", links, "staged", "latency", r->staged.latency,
                     "bandwidth", r->staged.bandwidth);
}

// ---- reading ------------------------------------------------------------------------------------

// A number above 0 (or, if `optional`, one that is not there).
static int get_rate(const json_t *json, const char *key, bool optional, double *out)
{
    const json_t *value = json_object_get(json, key);
    if (!value && optional)
        return 0;
    *out = json_number_value(value);
    if (!json_is_number(value) || !isfinite(*out) || *out <= 0 || *out > 1e21)
        return fail(ERR_INPUT, "\"%s\" is not there or not a number above 0", key);
    return 0;
}

static int get_text(const json_t *json, const char *key, bool optional, char *out, size_t size)
{
    const char *text = json_string_value(json_object_get(json, key));
    if (!text && !optional)
        return fail(ERR_INPUT, "\"%s\" is not there or not a string", key);
    snprintf(out, size, "%s", text ? text : "");
    return 0;
}

static int get_classes(const json_t *json, const char *key, double out[RATE_CLASSES])
{
    const json_t *array = json_object_get(json, key);
    if (json_array_size(array) != RATE_CLASSES)
        return fail(ERR_INPUT, "\"%s\" is not an array of %d rates", key, RATE_CLASSES);
    for (size_t i = 0; i < RATE_CLASSES; i++) {
        out[i] = json_number_value(json_array_get(array, i));
        if (!isfinite(out[i]) || out[i] <= 0 || out[i] > 1e21)
            return fail(ERR_INPUT, "rate %zu of \"%s\" is not a number above 0", i, key);
    }
    return 0;
}

// Two numbers from 0 up, of sampling and training; not there: 0.
static int get_seconds(const json_t *json, const char *key, double out[2])
{
    const json_t *array = json_object_get(json, key);
    for (size_t i = 0; array && i < 2; i++) {
        out[i] = json_number_value(json_array_get(array, i));
        if (json_array_size(array) != 2 || !isfinite(out[i]) || out[i] < 0 || out[i] > 1e6)
            return fail(ERR_INPUT, "\"%s\" is not two numbers from 0 up", key);
    }
    return 0;
}

static int device_from_json(const json_t *json, struct device_rates *d)
{
    char precision[16];
    double width = 1152, sharing = 1;
    *d = (struct device_rates){.sample = 1, .train = 1, .measured = true};
    TRY(get_text(json, "name", false, d->name, sizeof d->name));
    TRY(get_text(json, "driver", true, d->driver, sizeof d->driver));
    TRY(get_text(json, "pci", true, d->pci, sizeof d->pci));
    TRY(get_text(json, "key", true, d->key, sizeof d->key));
    TRY(get_text(json, "precision", false, precision, sizeof precision));
    if (strcmp(precision, "bf16") && strcmp(precision, "f32"))
        return fail(ERR_INPUT, "\"precision\" is '%s'; it is bf16 or f32", precision);
    d->bf16 = !strcmp(precision, "bf16");
    TRY(get_rate(json, "sharing", true, &sharing));
    d->sharing = sharing < 1e6 ? (int)sharing : 1;
    TRY(get_rate(json, "width", true, &width));
    d->width = width < 1e6 ? (int)width : 0;
    TRY(get_classes(json, "dense", d->dense));
    TRY(get_classes(json, "ragged", d->ragged));
    TRY(get_rate(json, "attention", false, &d->attention));
    TRY(get_rate(json, "memory", false, &d->memory));
    TRY(get_rate(json, "launch", false, &d->launch));
    TRY(get_rate(json, "to_device", false, &d->to_device));
    TRY(get_rate(json, "to_host", false, &d->to_host));
    TRY(get_rate(json, "sample", true, &d->sample));
    return get_rate(json, "train", true, &d->train);
}

static int link_from_json(const json_t *json, struct rates *out)
{
    char from[160], to[160];
    struct link_rate rate = {.staged = json_is_true(json_object_get(json, "staged"))};
    TRY(get_text(json, "from", false, from, sizeof from));
    TRY(get_text(json, "to", false, to, sizeof to));
    TRY(get_rate(json, "latency", false, &rate.latency));
    TRY(get_rate(json, "bandwidth", false, &rate.bandwidth));
    TRY(get_seconds(json, "layer", rate.layer));
    TRY(get_seconds(json, "step", rate.step));
    return rates_put_link(out, from, to, rate);
}

static int read_all(const json_t *json, struct rates *out)
{
    const json_t *devices = json_object_get(json, "devices"),
                 *links = json_object_get(json, "links");
    const json_t *staged = json_object_get(json, "staged");
    if (json_integer_value(json_object_get(json, "ditmoe_rates")) != VERSION)
        return fail(ERR_INPUT, "not a file of rates (no \"ditmoe_rates\": %d)", VERSION);
    if (json_array_size(devices) > ENTRIES_MOST || json_array_size(links) > ENTRIES_MOST)
        return fail(ERR_INPUT, "more than %d entries", ENTRIES_MOST);
    for (size_t i = 0; i < json_array_size(devices); i++) {
        struct device_rates d;
        int code = device_from_json(json_array_get(devices, i), &d);
        if (code < 0)
            return fail_in(code, "device %zu", i);
        TRY(rates_put(out, &d));
    }
    for (size_t i = 0; i < json_array_size(links); i++) {
        int code = link_from_json(json_array_get(links, i), out);
        if (code < 0)
            return fail_in(code, "link %zu", i);
    }
    out->staged.staged = true;
    if (json_number_value(json_object_get(staged, "bandwidth")) > 0) {
        TRY(get_rate(staged, "latency", false, &out->staged.latency));
        TRY(get_rate(staged, "bandwidth", false, &out->staged.bandwidth));
    }
    return 0;
}

int rates_from_json(const json_t *json, struct rates *out)
{
    *out = (struct rates){0};
    int code = read_all(json, out);
    if (code < 0)
        rates_free(out);
    return code;
}

int rates_read(const char *path, struct rates *out)
{
    json_t *json;
    *out = (struct rates){0};
    TRY(json_read(path, &json));
    int code = rates_from_json(json, out);
    json_decref(json);
    return code < 0 ? fail_in(code, "%s", path) : 0;
}

void rates_load(struct rates *out)
{
    size_t size;
    unsigned char *text = cache_read(file_name, &size);
    json_t *json = text ? json_loadb((const char *)text, size, 0, NULL) : NULL;
    free(text);
    *out = (struct rates){0};
    if (json && rates_from_json(json, out) < 0)
        *out = (struct rates){0};
    json_decref(json);
}

bool rates_store(const struct rates *r)
{
    json_t *json = rates_to_json(r);
    char *text = json ? json_dumps(json, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) : NULL;
    bool stored = text && cache_write(file_name, text, strlen(text));
    free(text);
    json_decref(json);
    return stored;
}
