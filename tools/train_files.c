// A run's directory: its lock and its checkpoints. Checkpoints appear whole or not at all
// (model/checkpoint.h), so the newest file by name is the place to go on from.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tools/train_run.h"

// mkdir -p
static int make_directories(const char *dir)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s", dir) >= (int)sizeof path)
        return fail(ERR_INPUT, "%s: name too long", dir);
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char kept = *p;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return fail(ERR_IO, "%s: %s", path, strerror(errno));
        *p = kept;
        if (!kept)
            return 0;
    }
}

// What killed processes left of checkpoints. Best effort; under the directory's lock no one writes
// one.
static void remove_leftovers(const char *dir)
{
    DIR *d = opendir(dir);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        long long step, process;
        int end = 0;
        if (sscanf(e->d_name, "step-%lld.safetensors.tmp.%lld%n", &step, &process, &end) == 2 &&
            end > 0 && !e->d_name[end])
            unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
}

int run_directory_open(const char *dir, int *fd)
{
    TRY(make_directories(dir));
    *fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*fd < 0)
        return fail(ERR_IO, "%s: %s", dir, strerror(errno));
    if (flock(*fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(*fd);
        *fd = -1;
        return fail(ERR_IO, "%s: another training run is writing here", dir);
    }
    remove_leftovers(dir);
    return 0;
}

void run_checkpoint_path(const char *dir, int64_t step, char *out, size_t size)
{
    snprintf(out, size, "%s/step-%08lld.safetensors", dir, (long long)step);
}

static int compare_steps(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// The steps of a directory's checkpoints, newest first: returns how many, *steps to be freed.
static int list_steps(const char *dir, int64_t **steps)
{
    int count = 0, room = 0;
    *steps = NULL;
    DIR *d = opendir(dir);
    if (!d)
        return 0;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        long long step;
        int end = 0;
        if (sscanf(e->d_name, "step-%lld.safetensors%n", &step, &end) != 1 || !end ||
            e->d_name[end])
            continue;
        if (count == room) {
            int64_t *more = realloc(*steps, sizeof **steps * (size_t)(room = 2 * room + 16));
            if (!more)
                break;
            *steps = more;
        }
        (*steps)[count++] = step;
    }
    closedir(d);
    if (count)
        qsort(*steps, (size_t)count, sizeof **steps, compare_steps);
    return count;
}

bool run_directory_has_checkpoint(const char *dir)
{
    int64_t *steps;
    int count = list_steps(dir, &steps);
    free(steps);
    return count > 0;
}

int run_checkpoint_open(const char *dir, struct checkpoint *out)
{
    int64_t *steps;
    char path[4096];
    int count = list_steps(dir, &steps), code = 0;
    for (int i = 0; i < count; i++) {
        run_checkpoint_path(dir, steps[i], path, sizeof path);
        code = checkpoint_open(path, NULL, out);
        if (code >= 0 && out->has_run && out->has_ema && out->has_moments) {
            code = 1;
            break;
        }
        if (code >= 0) {
            checkpoint_close(out);
            code = fail(ERR_INPUT, "%s: no training checkpoint (no moments, EMA or state)", path);
        }
        if (i + 1 < count)
            say("ditmoe train: passed over: %s\n", error_message());
    }
    free(steps);
    return code;
}

void run_checkpoint_prune(const char *dir, int keep)
{
    int64_t *steps;
    char path[4096];
    int count = list_steps(dir, &steps);
    for (int i = keep; keep > 0 && i < count; i++) {
        run_checkpoint_path(dir, steps[i], path, sizeof path);
        unlink(path);
    }
    free(steps);
}
