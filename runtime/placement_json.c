// See placement.h: placements as JSON. What a file makes this allocate is bounded by the file's
// size, except for one row of experts that stands for all layers, which is bounded by ROW_FOR_ALL.
#include "runtime/placement.h"
#include "runtime/json_file.h"

#include <stdlib.h>
#include <string.h>

#include "devices/error.h"

enum { VERSION = 1, MOST = 1 << 20, ROW_FOR_ALL = 1 << 20 };
static const char letters[HOMES] = {[HOME_DEVICE] = 'd', [HOME_STREAMED] = 's', [HOME_HOST] = 'h'};

// ---- writing ------------------------------------------------------------------------------------

static json_t *integers(const int *list, int count)
{
    json_t *array = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(array, json_integer(list[i]));
    return array;
}

static json_t *home_text(const struct placement *p, int g, int l)
{
    char *text = calloc((size_t)p->experts + 1, 1);
    for (int e = 0; text && e < p->experts; e++)
        text[e] = letters[*placement_home(p, g, l, e)];
    json_t *json = json_string(text ? text : "");
    free(text);
    return json;
}

static json_t *group_to_json(const struct placement *p, int g)
{
    json_t *group = json_object(), *ranks = json_array(), *owner = json_array();
    json_t *home = json_array();
    for (int r = 0; r < p->ranks; r++)
        if (p->group[r] == g)
            json_array_append_new(ranks, json_integer(r));
    for (int l = 0; l < p->layers; l++) {
        const int *row = p->experts ? placement_owner(p, g, l, 0) : NULL;
        const bool moe = row && row[0] != NO_OWNER;
        json_array_append_new(owner, moe ? integers(row, p->experts) : json_null());
        json_array_append_new(home, moe ? home_text(p, g, l) : json_null());
    }
    json_object_set_new(group, "ranks", ranks);
    json_object_set_new(group, "owner", owner);
    json_object_set_new(group, "home", home);
    return group;
}

json_t *placement_to_json(const struct placement *p)
{
    json_t *json = json_object(), *groups = json_array();
    json_object_set_new(json, "ditmoe_placement", json_integer(VERSION));
    json_object_set_new(json, "ranks", json_integer(p->ranks));
    json_object_set_new(json, "layers", json_integer(p->layers));
    json_object_set_new(json, "experts", json_integer(p->experts));
    json_object_set_new(json, "batch", json_integer(p->batch));
    json_object_set_new(json, "shares", integers(p->share, p->ranks));
    for (int g = 0; g < p->groups; g++)
        json_array_append_new(groups, group_to_json(p, g));
    json_object_set_new(json, "groups", groups);
    return json;
}

// ---- reading ------------------------------------------------------------------------------------

// A whole number from `least` to `most` under `key`.
static int get_number(const json_t *json, const char *key, int least, int most, int *out)
{
    const json_t *value = json_object_get(json, key);
    if (!json_is_integer(value))
        return fail(ERR_INPUT, "\"%s\" is not there or not a whole number", key);
    const json_int_t number = json_integer_value(value);
    if (number < least || number > most)
        return fail(ERR_INPUT, "\"%s\" is %lld; it must be from %d to %d", key, (long long)number,
                    least, most);
    *out = (int)number;
    return 0;
}

// An array of `count` whole numbers that an int holds; their meaning is checked later.
static int get_integers(const json_t *array, const char *what, int count, int *out)
{
    if (!json_is_array(array) || json_array_size(array) != (size_t)count)
        return fail(ERR_INPUT, "%s is not an array of %d numbers", what, count);
    for (int i = 0; i < count; i++) {
        const json_t *value = json_array_get(array, (size_t)i);
        const json_int_t number = json_integer_value(value);
        if (!json_is_integer(value) || number < -1 || number > INT32_MAX)
            return fail(ERR_INPUT, "number %d of %s is not a whole number from 0 up", i, what);
        out[i] = (int)number;
    }
    return 0;
}

static int get_homes(const json_t *value, const char *what, int count, uint8_t *out)
{
    const char *text = json_string_value(value);
    if (!text || strlen(text) != (size_t)count)
        return fail(ERR_INPUT, "%s is not a string of %d letters", what, count);
    for (int e = 0; e < count; e++) {
        const char *found = memchr(letters, text[e], HOMES);
        if (!found)
            return fail(ERR_INPUT, "%s has a letter '%c'; homes are d, s and h", what, text[e]);
        out[e] = (uint8_t)(found - letters);
    }
    return 0;
}

static int read_layer(const json_t *owner, const json_t *home, struct placement *p, int g, int l)
{
    char what[64];
    const size_t owner_row = json_array_size(owner) == 1 ? 0 : (size_t)l;
    const size_t home_row = json_array_size(home) == 1 ? 0 : (size_t)l;
    const json_t *row = json_array_get(owner, owner_row), *letter = json_array_get(home, home_row);
    if (json_is_null(row))
        return 0;
    snprintf(what, sizeof what, "\"owner\" of group %d, layer %d", g, l);
    TRY(get_integers(row, what, p->experts, placement_owner(p, g, l, 0)));
    if (!home)
        return 0;
    snprintf(what, sizeof what, "\"home\" of group %d, layer %d", g, l);
    return get_homes(letter, what, p->experts, placement_home(p, g, l, 0));
}

static int read_group(const json_t *group, struct placement *p, int g)
{
    const json_t *ranks = json_object_get(group, "ranks"), *owner = json_object_get(group, "owner");
    const json_t *home = json_object_get(group, "home");
    const size_t rows = json_array_size(owner), home_rows = json_array_size(home);
    if (!json_is_object(group) || !json_is_array(owner))
        return fail(ERR_INPUT, "group %d is not an object with an array \"owner\"", g);
    if ((rows != 1 && rows != (size_t)p->layers) ||
        (home && home_rows != 1 && home_rows != (size_t)p->layers))
        return fail(ERR_INPUT, "\"%s\" of group %d has %zu rows; there are %d layers",
                    rows != 1 && rows != (size_t)p->layers ? "owner" : "home", g,
                    rows != 1 && rows != (size_t)p->layers ? rows : home_rows, p->layers);
    if (!ranks && p->groups == 1)
        memset(p->group, 0, (size_t)p->ranks * sizeof *p->group);
    else if (!json_is_array(ranks))
        return fail(ERR_INPUT, "group %d does not say which \"ranks\" it has", g);
    for (size_t i = 0; i < json_array_size(ranks); i++) {
        const json_t *value = json_array_get(ranks, i);
        const json_int_t r = json_integer_value(value);
        if (!json_is_integer(value) || r < 0 || r >= p->ranks)
            return fail(ERR_INPUT, "\"ranks\" of group %d names something else than ranks 0 to %d",
                        g, p->ranks - 1);
        if (p->group[r] >= 0)
            return fail(ERR_INPUT, "rank %d is in two groups, %d and %d", (int)r, p->group[r], g);
        p->group[r] = g;
    }
    for (int l = 0; l < p->layers; l++)
        TRY(read_layer(owner, home, p, g, l));
    return 0;
}

static int read_all(const json_t *json, const json_t *groups, struct placement *p)
{
    TRY(get_number(json, "batch", 1, INT32_MAX, &p->batch));
    TRY(get_integers(json_object_get(json, "shares"), "\"shares\"", p->ranks, p->share));
    for (int r = 0; r < p->ranks; r++)
        p->group[r] = -1;
    for (int g = 0; g < p->groups; g++)
        TRY(read_group(json_array_get(groups, (size_t)g), p, g));
    for (int r = 0; r < p->ranks; r++)
        if (p->group[r] < 0)
            return fail(ERR_INPUT, "rank %d is in no group", r);
    return placement_check(p);
}

// What the file's own size must bear out before anything of that size is made.
static int check_sizes(const json_t *json, const json_t *groups, int ranks, int layers, int experts)
{
    const double places = (double)json_array_size(groups) * layers * experts;
    double numbers = 0;
    if (json_array_size(groups) == 0)
        return fail(ERR_INPUT, "\"groups\" is not there or empty");
    if (json_array_size(json_object_get(json, "shares")) != (size_t)ranks)
        return fail(ERR_INPUT, "\"shares\" is not an array of %d numbers", ranks);
    for (size_t g = 0; g < json_array_size(groups); g++) {
        const json_t *owner = json_object_get(json_array_get(groups, g), "owner");
        for (size_t l = 0; l < json_array_size(owner); l++)
            numbers += (double)json_array_size(json_array_get(owner, l));
    }
    if (places > ROW_FOR_ALL && places > 16 * numbers) // many layers may be without experts
        return fail(ERR_INPUT, "%d layers of %d experts, but only %.0f owners", layers, experts,
                    numbers);
    return 0;
}

int placement_from_json(const json_t *json, struct placement *out)
{
    const json_t *groups = json_object_get(json, "groups");
    int version, ranks = 0, layers = 0, experts = 0;
    *out = (struct placement){0};
    if (!json_object_get(json, "ditmoe_placement"))
        return fail(ERR_INPUT, "not a placement (no \"ditmoe_placement\")");
    TRY(get_number(json, "ditmoe_placement", VERSION, VERSION, &version));
    TRY(get_number(json, "ranks", 1, MOST, &ranks));
    TRY(get_number(json, "layers", 1, MOST, &layers));
    TRY(get_number(json, "experts", 1, MOST, &experts));
    TRY(check_sizes(json, groups, ranks, layers, experts));
    TRY(placement_new(ranks, (int)json_array_size(groups), layers, experts, out));
    int code = read_all(json, groups, out);
    if (code < 0)
        placement_free(out);
    return code;
}

int placement_read(const char *path, struct placement *out)
{
    json_t *json;
    *out = (struct placement){0};
    TRY(json_read(path, &json));
    int code = placement_from_json(json, out);
    json_decref(json);
    return code < 0 ? fail_in(code, "%s", path) : 0;
}
