#include "tools/options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/ranks.h"

enum { HELP_COLUMN = 30, HELP_WIDTH = 96, GIVEN_MAX = 128 };

static const struct option_spec *given[GIVEN_MAX];
static int given_count;
static char *restored[GIVEN_MAX]; // texts that string options point at until the program ends

int usage_error(const char *name, const char *format, ...)
{
    va_list args;
    char who[32];
    if (!ranks_tell(who))
        return 2;
    va_start(args, format);
    fprintf(stderr, "ditmoe %s: %s", name, who);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return 2;
}

// ---- spelling -----------------------------------------------------------------------------------

// Edit distance of two short words (insertions, deletions, substitutions).
static int distance(const char *a, const char *b)
{
    enum { MAX = 40 };
    int row[MAX + 1];
    int n = (int)strlen(a), m = (int)strlen(b);
    if (n > MAX || m > MAX)
        return MAX;
    for (int j = 0; j <= m; j++)
        row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            best = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

const char *nearest_word(const char *word, const char *(*next)(const void *from, int i),
                         const void *from)
{
    const char *best = NULL, *candidate;
    int least = (int)strlen(word) / 3 + 2;
    for (int i = 0; (candidate = next(from, i)) != NULL; i++) {
        int d = distance(word, candidate);
        if (d < least) {
            least = d;
            best = candidate;
        }
    }
    return best;
}

// ---- the table ----------------------------------------------------------------------------------

// Walks all options of a command: the i-th, and the struct its target lies in.
static const struct option_spec *option_at(const struct command *c, int i, void **base)
{
    for (const struct option_group *g = c->groups; g->list; g++) {
        for (const struct option_spec *o = g->list; o->name; o++) {
            if (i-- == 0) {
                *base = g->base;
                return o;
            }
        }
    }
    return NULL;
}

static const char *option_name_at(const void *command, int i)
{
    void *base;
    const struct option_spec *o = option_at(command, i, &base);
    return o ? o->name : NULL;
}

// Finds by name (length n) or, with n = 1 and a letter, by letter; *off: written as --no-name.
static const struct option_spec *option_find(const struct command *c, const char *name, size_t n,
                                             bool letter, void **base, bool *off)
{
    const struct option_spec *o;
    *off = false;
    for (int i = 0; (o = option_at(c, i, base)) != NULL; i++) {
        if (letter ? o->letter && o->letter == name[0]
                   : strlen(o->name) == n && !strncmp(o->name, name, n))
            return o;
        if (!letter && o->type == OPTION_FLAG && n > 3 && !strncmp(name, "no-", 3) &&
            strlen(o->name) == n - 3 && !strncmp(o->name, name + 3, n - 3)) {
            *off = true;
            return o;
        }
    }
    return NULL;
}

// ---- values -------------------------------------------------------------------------------------

static bool parse_bytes(const char *text, uint64_t *out)
{
    static const struct {
        const char *suffix;
        double factor;
    } units[] = {{"", 1},
                 {"B", 1},
                 {"K", 1024.},
                 {"KiB", 1024.},
                 {"kB", 1e3},
                 {"M", 1048576.},
                 {"MiB", 1048576.},
                 {"MB", 1e6},
                 {"G", 1073741824.},
                 {"GiB", 1073741824.},
                 {"GB", 1e9},
                 {"T", 1099511627776.},
                 {"TiB", 1099511627776.},
                 {"TB", 1e12}};
    char *end;
    double value = strtod(text, &end);
    if (end == text || !isfinite(value) || value < 0)
        return false;
    while (*end == ' ')
        end++;
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        if (!strcmp(end, units[i].suffix) && value * units[i].factor < 9e18) {
            *out = (uint64_t)(value * units[i].factor);
            return true;
        }
    }
    return false;
}

// True when strtoX consumed all of a text that starts like a number.
static bool whole(const char *text, const char *end)
{
    return end != text && *end == 0 && !isspace((unsigned char)text[0]);
}

static bool bounded(const struct option_spec *o)
{
    return o->min != 0 || o->max != 0;
}

static const char *parse_integer(const struct option_spec *o, const char *text, void *target)
{
    char *end;
    errno = 0;
    if (o->type == OPTION_UINT64) {
        uint64_t value = strtoull(text, &end, 0);
        if (!whole(text, end) || text[0] == '-')
            return "not a number from 0 up";
        if (errno)
            return "too large a number";
        *(uint64_t *)target = value;
        return NULL;
    }
    long long value = strtoll(text, &end, 10);
    if (!whole(text, end))
        return "not a number";
    if (errno || (o->type == OPTION_INT && (value > INT32_MAX || value < INT32_MIN)))
        return "too large a number";
    if (bounded(o) && ((double)value < o->min || (double)value > o->max))
        return "out of range";
    if (o->type == OPTION_INT)
        *(int *)target = (int)value;
    else
        *(int64_t *)target = value;
    return NULL;
}

static const char *parse_float(const struct option_spec *o, const char *text, void *target)
{
    char *end;
    double value = strtod(text, &end);
    if (!whole(text, end) || !isfinite(value))
        return "not a number";
    if (bounded(o) && (value < o->min || value > o->max))
        return "out of range";
    *(float *)target = (float)value;
    return NULL;
}

// Sets the target; returns what is wrong with `text`, or NULL.
static const char *set_value(const struct option_spec *o, void *base, const char *text)
{
    void *target = (char *)base + o->offset;
    switch (o->type) {
    case OPTION_FLAG:
        *(int *)target = !strcmp(text, "yes");
        return strcmp(text, "yes") && strcmp(text, "no") ? "not yes or no" : NULL;
    case OPTION_INT:
    case OPTION_INT64:
    case OPTION_UINT64:
        return parse_integer(o, text, target);
    case OPTION_FLOAT:
        return parse_float(o, text, target);
    case OPTION_STRING:
        *(const char **)target = text;
        return text[0] ? NULL : "empty";
    case OPTION_CHOICE:
        for (int i = 0; o->choices[i]; i++) {
            if (!strcmp(o->choices[i], text)) {
                *(int *)target = i;
                return NULL;
            }
        }
        return "not one of";
    case OPTION_BYTES:
        return parse_bytes(text, target) ? NULL : "not a size such as 512MiB or 8GiB";
    }
    return "of an unknown type";
}

static bool set_or_complain(const struct command *c, const struct option_spec *o, void *base,
                            const char *text)
{
    const char *wrong = set_value(o, base, text);
    char more[256] = "";
    if (!wrong)
        return true;
    if (o->type == OPTION_CHOICE) {
        for (int i = 0; o->choices[i]; i++) {
            size_t n = strlen(more);
            snprintf(more + n, sizeof more - n, "%s%s", i ? ", " : " ", o->choices[i]);
        }
    } else if (!strcmp(wrong, "out of range")) {
        if (o->max >= 1e9)
            snprintf(more, sizeof more, " (at least %g)", o->min);
        else
            snprintf(more, sizeof more, " (%g to %g)", o->min, o->max);
    }
    usage_error(c->name, "--%s %s: %s%s", o->name, text, wrong, more);
    return false;
}

static void mark_given(const struct option_spec *o)
{
    if (given_count < GIVEN_MAX)
        given[given_count++] = o;
}

bool options_given(const char *name)
{
    for (int i = 0; i < given_count; i++)
        if (!strcmp(given[i]->name, name))
            return true;
    return false;
}

const char *options_given_of(const char *const *names)
{
    while (*names && !options_given(*names))
        names++;
    return *names;
}

// ---- help ---------------------------------------------------------------------------------------

// Prints text from column `column` on, wrapped at HELP_WIDTH; the cursor is at column `at`.
static void print_wrapped(const char *text, int column, int at)
{
    while (*text) {
        size_t n = strcspn(text, " ");
        if (at > column && at + 1 + (int)n > HELP_WIDTH) {
            printf("\n%*s", column, "");
            at = column;
        } else if (at > column) {
            putchar(' ');
            at++;
        } else {
            printf("%*s", column - at, "");
            at = column;
        }
        printf("%.*s", (int)n, text);
        at += (int)n;
        text += n;
        while (*text == ' ')
            text++;
    }
    putchar('\n');
}

static void print_option(const struct option_spec *o)
{
    char left[64], text[600];
    const bool on = o->type == OPTION_FLAG && o->fallback && !strcmp(o->fallback, "yes");
    int n = snprintf(left, sizeof left, "  %c%c%s --%s%s%s%s", o->letter ? '-' : ' ',
                     o->letter ? o->letter : ' ', o->letter ? "," : " ", on ? "[no-]" : "", o->name,
                     o->value ? " " : "", o->value ? o->value : "");
    bool show = o->fallback && strcmp(o->fallback, "no");
    snprintf(text, sizeof text, "%s%s%s%s", o->help, show ? " [" : "", show ? o->fallback : "",
             show ? "]" : "");
    printf("%s", left);
    if (n >= HELP_COLUMN) {
        printf("\n");
        n = 0;
    }
    print_wrapped(text, HELP_COLUMN, n);
}

static void print_help(const struct command *c)
{
    printf("usage: ditmoe %s%s%s%s\n\n", c->name, c->positional ? " " : "",
           c->positional ? c->positional : "", c->groups[0].list ? " [options]" : "");
    print_wrapped(c->about ? c->about : c->summary, 0, 0);
    for (const struct option_group *g = c->groups; g->list; g++) {
        printf("\n%s:\n", g->title);
        for (const struct option_spec *o = g->list; o->name; o++)
            print_option(o);
    }
    printf("  -h, --help                  print this and stop\n");
    if (c->example)
        printf("\nexample:\n  %s\n", c->example);
}

// ---- the command line ---------------------------------------------------------------------------

// One argument that starts with '-'. Returns how many words it took, or 0 after complaining.
static int parse_option(const struct command *c, int argc, char **argv, int i)
{
    const char *word = argv[i];
    bool is_long = word[1] == '-', off;
    const char *name = word + (is_long ? 2 : 1);
    size_t n = is_long ? strcspn(name, "=") : 1;
    void *base;
    const struct option_spec *o = option_find(c, name, n, !is_long, &base, &off);
    if (!o) {
        char shown[64];
        snprintf(shown, sizeof shown, "%.*s", (int)(is_long ? n : strlen(name)), name);
        const char *near = nearest_word(shown, option_name_at, c);
        usage_error(c->name, "unknown option %s%s%s%s%s (ditmoe %s --help lists them)",
                    is_long ? "--" : "-", shown, near ? "; did you mean --" : "", near ? near : "",
                    near ? "?" : "", c->name);
        return 0;
    }
    const char *value =
        is_long ? (name[n] == '=' ? name + n + 1 : NULL) : (name[1] ? name + 1 : NULL);
    mark_given(o);
    if (o->type == OPTION_FLAG) {
        if (value) {
            usage_error(c->name, "--%s takes no value", o->name);
            return 0;
        }
        return set_or_complain(c, o, base, off ? "no" : "yes");
    }
    if (value)
        return set_or_complain(c, o, base, value);
    if (i + 1 >= argc) {
        usage_error(c->name, "--%s needs a value: %s", o->name, o->value);
        return 0;
    }
    return set_or_complain(c, o, base, argv[i + 1]) ? 2 : 0;
}

static bool set_defaults(const struct command *c)
{
    void *base;
    const struct option_spec *o;
    for (int i = 0; (o = option_at(c, i, &base)) != NULL; i++)
        if (o->fallback && !set_or_complain(c, o, base, o->fallback))
            return false;
    return true;
}

static bool wants_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help"))
            return true;
    return false;
}

bool options_parse(const struct command *c, int argc, char **argv, const char **positional,
                   int *status)
{
    int count = 0;
    bool options_end = false;
    given_count = 0;
    *status = 2;
    if (wants_help(argc, argv)) {
        print_help(c);
        *status = 0;
        return false;
    }
    if (!set_defaults(c))
        return false;
    for (int i = 1; i < argc;) {
        if (!options_end && !strcmp(argv[i], "--")) {
            options_end = true;
            i++;
        } else if (!options_end && argv[i][0] == '-' && argv[i][1]) {
            int taken = parse_option(c, argc, argv, i);
            if (!taken)
                return false;
            i += taken;
        } else if (count >= c->positional_max) {
            usage_error(c->name, "unexpected argument '%s'", argv[i]);
            return false;
        } else {
            positional[count++] = argv[i++];
        }
    }
    if (count < c->positional_min) {
        usage_error(c->name, "missing argument: %s", c->positional);
        return false;
    }
    return true;
}

// ---- echo ---------------------------------------------------------------------------------------

static void value_text(const struct option_spec *o, const void *base, char *out, size_t size)
{
    const void *target = (const char *)base + o->offset;
    switch (o->type) {
    case OPTION_FLAG:
        snprintf(out, size, "%s", *(const int *)target ? "yes" : "no");
        break;
    case OPTION_INT:
        snprintf(out, size, "%d", *(const int *)target);
        break;
    case OPTION_INT64:
        snprintf(out, size, "%lld", (long long)*(const int64_t *)target);
        break;
    case OPTION_UINT64:
    case OPTION_BYTES:
        snprintf(out, size, "%llu", (unsigned long long)*(const uint64_t *)target);
        break;
    case OPTION_FLOAT:
        snprintf(out, size, "%.6g", (double)*(const float *)target);
        if (strtof(out, NULL) != *(const float *)target) // a float always survives nine digits
            snprintf(out, size, "%.9g", (double)*(const float *)target);
        break;
    case OPTION_CHOICE:
        snprintf(out, size, "%s", o->choices[*(const int *)target]);
        break;
    case OPTION_STRING:
        snprintf(out, size, "%s", *(const char *const *)target ? *(const char *const *)target : "");
        break;
    }
}

json_t *options_to_json(const struct command *c)
{
    json_t *json = json_object();
    void *base;
    const struct option_spec *o;
    for (int i = 0; (o = option_at(c, i, &base)) != NULL; i++) {
        char text[4096];
        if (!o->fallback && !options_given(o->name))
            continue;
        value_text(o, base, text, sizeof text);
        if (text[0])
            json_object_set_new(json, o->name, json_string(text));
    }
    return json;
}

bool options_restore(const struct command *c, const json_t *values)
{
    void *base;
    const struct option_spec *o;
    for (int i = 0; (o = option_at(c, i, &base)) != NULL; i++) {
        const char *text = json_string_value(json_object_get(values, o->name));
        if (!text || options_given(o->name))
            continue;
        char **kept = &restored[i < GIVEN_MAX ? i : GIVEN_MAX - 1];
        *kept = strdup(text);
        if (!*kept || !set_or_complain(c, o, base, *kept))
            return false;
        if (!o->fallback)
            mark_given(o);
    }
    return true;
}
