#include "devices/cache.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool directory(char *out, size_t size)
{
    const char *own = getenv("DITMOE_CACHE"), *xdg = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    int n;
    if (own && own[0])
        n = snprintf(out, size, "%s", own);
    else if (xdg && xdg[0])
        n = snprintf(out, size, "%s/ditmoe", xdg);
    else if (home && home[0])
        n = snprintf(out, size, "%s/.cache/ditmoe", home);
    else
        return false;
    return n > 0 && (size_t)n < size;
}

static bool file_path(char *out, size_t size, const char *name)
{
    char dir[PATH_MAX];
    if (!directory(dir, sizeof dir))
        return false;
    int n = snprintf(out, size, "%s/%s", dir, name);
    return n > 0 && (size_t)n < size;
}

// mkdir -p of the directory part of `path`.
static bool make_directories(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        bool made = mkdir(path, 0700) == 0 || errno == EEXIST;
        *slash = '/';
        if (!made)
            return false;
    }
    return true;
}

unsigned char *cache_read(const char *name, size_t *size)
{
    char path[PATH_MAX];
    struct stat s;
    unsigned char *data = NULL;
    FILE *file = file_path(path, sizeof path, name) ? fopen(path, "rb") : NULL;
    if (!file)
        return NULL;
    if (fstat(fileno(file), &s) == 0 && S_ISREG(s.st_mode)) {
        size_t wanted = (size_t)s.st_size;
        data = malloc(wanted + 1);
        if (data && fread(data, 1, wanted, file) == wanted) {
            data[wanted] = 0;
            *size = wanted;
        } else {
            free(data);
            data = NULL;
        }
    }
    fclose(file);
    return data;
}

bool cache_write(const char *name, const void *data, size_t size)
{
    char path[PATH_MAX], temporary[PATH_MAX];
    if (!file_path(path, sizeof path, name))
        return false;
    int n = snprintf(temporary, sizeof temporary, "%s.XXXXXX", path);
    if (n < 0 || (size_t)n >= sizeof temporary || !make_directories(path))
        return false;
    int descriptor = mkstemp(temporary);
    if (descriptor < 0)
        return false;
    FILE *file = fdopen(descriptor, "wb");
    bool good = file && fwrite(data, 1, size, file) == size;
    if (file)
        good = fclose(file) == 0 && good;
    else
        close(descriptor);
    good = good && rename(temporary, path) == 0;
    if (!good)
        unlink(temporary);
    return good;
}
