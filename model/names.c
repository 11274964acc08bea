// See names.h.
#include "model/names.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

void names_free(struct names *n)
{
    for (int64_t i = 0; i < n->count; i++)
        free(n->list[i]);
    free(n->list);
}

static int names_add(struct names *n, const char *name)
{
    if (n->count == n->room) {
        int64_t room = n->room ? 2 * n->room : 64;
        char **list = realloc(n->list, (size_t)room * sizeof *list);
        if (!list)
            return fail(ERR_NOMEM, "out of memory listing '%s'", name);
        n->list = list;
        n->room = room;
    }
    n->list[n->count] = strdup(name);
    return n->list[n->count] ? (n->count++, 0)
                             : fail(ERR_NOMEM, "out of memory listing '%s'", name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

bool names_folder(const char *directory, const char *name)
{
    char path[4096];
    struct stat s;
    int n = snprintf(path, sizeof path, "%s/%s", directory, name);
    return n > 0 && (size_t)n < sizeof path && stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

bool names_image(const char *directory, const char *name)
{
    (void)directory;
    const char *dot = strrchr(name, '.');
    return dot &&
           (!strcasecmp(dot, ".png") || !strcasecmp(dot, ".jpg") || !strcasecmp(dot, ".jpeg"));
}

int names_list(const char *directory, bool (*wanted)(const char *directory, const char *name),
               struct names *out)
{
    DIR *d = opendir(directory);
    if (!d)
        return fail(ERR_IO, "%s: cannot be listed: %s", directory, strerror(errno));
    int code = 0;
    for (struct dirent *e = readdir(d); e && code == 0; e = readdir(d))
        if (e->d_name[0] != '.' && wanted(directory, e->d_name))
            code = names_add(out, e->d_name);
    closedir(d);
    if (code == 0 && out->count)
        qsort(out->list, (size_t)out->count, sizeof *out->list, by_name);
    return code;
}
