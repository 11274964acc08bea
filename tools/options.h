// Command-line options: one table a command says everything about them. It parses, prints --help
// with defaults, and is echoed into run.json.
//
// An option is written --name value or --name=value (or -l value where it has a letter); a flag is
// --name or --no-name. -h and --help always help. What is wrong is one line on stderr,
// "ditmoe train: --experts x: not a number", and exit status 2.
#ifndef DITMOE_OPTIONS_H
#define DITMOE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

enum option_type {
    OPTION_FLAG,   // int: 0 or 1
    OPTION_INT,    // int
    OPTION_INT64,  // int64_t
    OPTION_UINT64, // uint64_t
    OPTION_FLOAT,  // float
    OPTION_STRING, // const char *
    OPTION_CHOICE, // int: index into choices
    OPTION_BYTES,  // uint64_t: 1048576, 512MiB, 1.5GiB, 2GB
};

struct option_spec {
    const char *name;
    char letter; // 0: none
    enum option_type type;
    const char *value;    // what --help calls the value; NULL for flags
    const char *fallback; // the default, parsed like a given value; NULL: the target is left alone
    const char *help;
    size_t offset;              // of the target in the group's base
    double min, max;            // for numbers; both 0: no bounds
    const char *const *choices; // ended by NULL
};

// Options that belong together in --help and whose targets lie in one struct.
struct option_group {
    const char *title;
    const struct option_spec *list; // ended by a NULL name
    void *base;
};

struct command {
    const char *name;
    const char *summary;               // one line
    const char *positional;            // "PRESET|FILE", or NULL: none allowed
    const char *about;                 // a paragraph for --help, or NULL
    const char *example;               // a command line for the end of --help
    const struct option_group *groups; // ended by a NULL list
    int positional_min, positional_max;
};

// Sets defaults, then what argv says. Positional arguments go to `positional` (as many as the
// command allows). True: go on. False: leave the program with *status (help was printed, or what
// was wrong).
bool options_parse(const struct command *command, int argc, char **argv, const char **positional,
                   int *status);

// Was the option on the command line (or taken over by options_restore)?
bool options_given(const char *name);

// The first of `names` (ended by NULL) that was given; NULL: none was. For options that say nothing
// without another one, so that they are not passed over in silence.
const char *options_given_of(const char *const *names);

// Every option's value as text, {"steps": "1000", ...}; options left unset are not in it.
json_t *options_to_json(const struct command *command);
// Sets the options that were not given on the command line to the values of an earlier run.
// False: one is no longer valid (the line is printed).
bool options_restore(const struct command *command, const json_t *values);

// Prints "ditmoe NAME: message" and returns 2: a mistake of usage that no table can find.
int usage_error(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The choice nearest in spelling to `word`, or NULL when none is near. `next` gives candidate i or
// NULL.
const char *nearest_word(const char *word, const char *(*next)(const void *from, int i),
                         const void *from);

#endif
