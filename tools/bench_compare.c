#include "tools/bench_compare.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "devices/error.h"

enum { PEERS_MAX = 64 };

// What a row of the file says about the work of one of ours.
struct rival {
    char name[96];
    double ratio;  // our speed over its
    double ms;     // or NAN
    double memory; // bytes, or NAN
};

static const char *text(const json_t *row, const char *key)
{
    const char *value = json_string_value(json_object_get(row, key));
    return value ? value : "";
}

static double number(const json_t *row, const char *key)
{
    const json_t *value = json_object_get(row, key);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

// ---- an earlier run of ours ---------------------------------------------------------------------

// What is larger when faster, under the names that the parts use.
static double speed_of(const json_t *row)
{
    static const char *const names[] = {"own", "gflops", "gbps", "speed"};
    if (number(row, "seconds") > 0)
        return 1 / number(row, "seconds");
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (!isnan(number(row, names[i])))
            return number(row, names[i]);
    return NAN;
}

// Of the same work. Files from before a key was written lack it, and match.
static bool same_work(const json_t *a, const json_t *b)
{
    static const char *const keys[] = {"bench", "name", "what", "type", "batch"};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const json_t *x = json_object_get(a, keys[i]), *y = json_object_get(b, keys[i]);
        if ((i < 2 || (x && y)) && !json_equal(x, y))
            return false;
    }
    return strcmp(text(a, "bench"), "ceilings") != 0;
}

static bool earlier(const json_t *row, const json_t *old, struct rival *out)
{
    if (!json_is_object(old) || !same_work(row, old))
        return false;
    *out = (struct rival){.ratio = speed_of(row) / speed_of(old)};
    snprintf(out->name, sizeof out->name, "earlier");
    out->ms = number(old, "ms");
    out->memory = number(old, "allocated");
    return isfinite(out->ratio);
}

// ---- a peer -------------------------------------------------------------------------------------

static const char *field(const json_t *list, size_t i)
{
    const char *value = json_string_value(json_array_get(list, i));
    return value ? value : "";
}

// "grouped, compiled" of "grouped" and "default", "True", "None" or another mode's name.
static void name_peer(const json_t *list, char *out, size_t size)
{
    const char *mode = field(list, 5);
    const bool eager = !strcmp(mode, "None") || !strcmp(mode, "False");
    const bool plain = !strcmp(mode, "default") || !strcmp(mode, "True");
    snprintf(out, size, "%s, %s%s%s", field(list, 3), eager ? "eager" : "compiled",
             eager || plain ? "" : " ", eager || plain ? "" : mode);
}

static bool peer(const json_t *row, const json_t *list, struct rival *out)
{
    char name[160];
    double ms, gib;
    const size_t preset = strlen(field(list, 1));
    if (!json_is_array(list) || strcmp(text(row, "bench"), "step") != 0 || preset == 0)
        return false;
    snprintf(name, sizeof name, "%s-%sE2A", field(list, 1), field(list, 2));
    if (strcmp(text(row, "what"), field(list, 0)) != 0 || strcmp(text(row, "name"), name) != 0 ||
        number(row, "batch") != atof(field(list, 4)) || sscanf(field(list, 6), "%lf ms", &ms) != 1)
        return false;
    *out = (struct rival){.ms = ms, .memory = NAN, .ratio = ms / number(row, "ms")};
    if (sscanf(field(list, 7), "%lf GiB", &gib) == 1)
        out->memory = gib * (1 << 30);
    name_peer(list, out->name, sizeof out->name);
    return true;
}

// ---- both ---------------------------------------------------------------------------------------

// Slowest of ours against it first: the rival that is hardest to beat.
static int hardest_first(const void *a, const void *b)
{
    double x = ((const struct rival *)a)->ratio, y = ((const struct rival *)b)->ratio;
    return (x > y) - (x < y);
}

static void note(json_t *row, const struct rival *r)
{
    json_t *list = json_object_get(row, "compared");
    if (!list) {
        list = json_array();
        json_object_set_new(row, "compared", list);
    }
    json_t *entry = json_pack("{s:s, s:f}", "with", r->name, "ratio", r->ratio);
    if (!isnan(r->ms))
        json_object_set_new(entry, "ms", json_real(r->ms));
    if (!isnan(r->memory))
        json_object_set_new(entry, "memory", json_real(r->memory));
    json_array_append_new(list, entry);
}

static void print_rivals(json_t *row, const struct rival *list, int count, FILE *table)
{
    char title[240];
    int n = snprintf(title, sizeof title, "%s %s", text(row, "name"), text(row, "what"));
    if (!isnan(number(row, "batch")) && n < (int)sizeof title)
        snprintf(title + n, sizeof title - (size_t)n, " batch %.0f", number(row, "batch"));
    for (int i = 0; i < count; i++) {
        fprintf(table, "%-34s", i ? "" : title);
        if (i == 0 && strlen(title) > 34)
            fprintf(table, "\n%-34s", "");
        fprintf(table, " %-34s %6.2fx", list[i].name, list[i].ratio);
        if (!isnan(list[i].ms))
            fprintf(table, "  %9.2f ms", list[i].ms);
        if (!isnan(list[i].memory) && number(row, "allocated") > 0)
            fprintf(table, "  memory %4.2f of its %.1f GiB",
                    number(row, "allocated") / list[i].memory, list[i].memory / (1 << 30));
        fprintf(table, "\n");
        note(row, &list[i]);
    }
}

static int compare_rows(const json_t *file, json_t *rows, FILE *table)
{
    int matches = 0;
    size_t i, k;
    json_t *row;
    const json_t *old;
    json_array_foreach(rows, i, row)
    {
        struct rival list[PEERS_MAX];
        int count = 0;
        json_array_foreach((json_t *)file, k, old)
        {
            if (count < PEERS_MAX &&
                (earlier(row, old, &list[count]) || peer(row, old, &list[count])))
                count++;
        }
        qsort(list, (size_t)count, sizeof *list, hardest_first);
        print_rivals(row, list, count, table);
        matches += count;
    }
    return matches;
}

int bench_compare(const char *path, json_t *rows, FILE *table)
{
    json_error_t wrong;
    json_t *file = json_load_file(path, 0, &wrong);
    if (!file)
        return fail(ERR_INPUT, "%s: %s", path, wrong.text);
    fprintf(table, "\nspeed over that in %s (the hardest to beat first)\n", path);
    int matches = json_is_array(file) ? compare_rows(file, rows, table) : 0;
    json_decref(file);
    if (matches == 0)
        return fail(ERR_INPUT, "%s has no row of what was measured here", path);
    return 0;
}
