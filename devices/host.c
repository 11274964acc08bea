#include "devices/host.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

// MemTotal and MemAvailable, whichever is less.
static uint64_t meminfo(const char *root)
{
    char path[PATH_MAX], line[256];
    uint64_t result = UINT64_MAX, kib;
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemTotal: %" SCNu64 " kB", &kib) == 1 ||
            sscanf(line, "MemAvailable: %" SCNu64 " kB", &kib) == 1)
            result = least(result, kib * 1024);
    if (file)
        fclose(file);
    return result;
}

// The number in a file; UINT64_MAX when there is none (also for "max").
static uint64_t file_number(const char *path)
{
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "r");
    if (file && fscanf(file, "%" SCNu64, &value) != 1)
        value = UINT64_MAX;
    if (file)
        fclose(file);
    return value;
}

// A group's limit holds for the groups below it: the least on the way from `group` up to the mount.
// Inside a container the path may not exist, but the mount's own file does.
static uint64_t group_limit(const char *root, const char *mount, const char *group,
                            const char *name)
{
    char dir[512], path[PATH_MAX];
    uint64_t result = UINT64_MAX;
    snprintf(dir, sizeof dir, "%s", group);
    for (;;) {
        snprintf(path, sizeof path, "%s%s%s/%s", root, mount, dir, name);
        result = least(result, file_number(path));
        char *slash = strrchr(dir, '/');
        if (!slash)
            return result;
        *slash = 0;
    }
}

// Lines of /proc/self/cgroup are "number:controllers:path"; v2 has number 0 and no controllers.
static uint64_t cgroups(const char *root)
{
    char path[PATH_MAX], line[512], controllers[128], group[384];
    uint64_t result = UINT64_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "0::%383[^\n]", group) == 1)
            result = least(result, group_limit(root, "/sys/fs/cgroup", group, "memory.max"));
        else if (sscanf(line, "%*d:%127[^:]:%383[^\n]", controllers, group) == 2 &&
                 strstr(controllers, "memory"))
            result = least(
                result, group_limit(root, "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes"));
    }
    if (file)
        fclose(file);
    return result;
}

uint64_t host_memory(const char *root)
{
    return least(meminfo(root), cgroups(root));
}
