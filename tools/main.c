// ditmoe COMMAND ...: one file a command (tools/cmd_*.c), listed in commands.def.
// Exit status: 0 done, 1 failed (one line says why), 2 wrong usage.
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "tools/command.h"
#include "tools/ranks.h"

static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
#define COMMAND(name, summary) {#name, summary, cmd_##name},
#include "tools/commands.def"
#undef COMMAND
    {NULL, NULL, NULL},
};

static void print_commands(FILE *out)
{
    fprintf(out, "usage: ditmoe COMMAND [options]\n\n"
                 "Trains and samples DiT-MoE diffusion transformers on NVIDIA GPUs and OpenCL devices.\n\n");
    for (int i = 0; commands[i].name; i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\n  --version  print the version\n"
                 "  --help     print this; 'ditmoe COMMAND --help' says more of a command\n");
}

static const char *command_name_at(const void *unused, int i)
{
    (void)unused;
    return commands[i].name;
}

// Alone, or as one of several ranks.
static int run(int command, int argc, char **argv)
{
    const char *name = commands[command].name;
    int status = ranks_open(name);
    if (status == 0)
        status = finish_output(name, commands[command].run(argc, argv));
    return ranks_close(status);
}

int main(int argc, char **argv)
{
    // A limit on file sizes then is an error like a full disk, and not a sudden end.
    signal(SIGXFSZ, SIG_IGN);
    if (argc < 2) {
        print_commands(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        print_commands(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("ditmoe %s\n", DITMOE_VERSION);
        return 0;
    }
    for (int i = 0; commands[i].name; i++)
        if (!strcmp(argv[1], commands[i].name))
            return run(i, argc - 1, argv + 1);
    const char *near = nearest_word(argv[1], command_name_at, NULL);
    fprintf(stderr, "ditmoe: unknown command '%s'%s%s%s ('ditmoe --help' lists them)\n", argv[1],
            near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
    return 2;
}
