// Which road bytes take between each pair of ranks, in words.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/ranks.h"

enum road { BY_NCCL, BY_WINDOWS, BY_MESSAGES, ROADS };
static const char *const road_names[ROADS] = {"NCCL", "windows", "messages"};

struct place {
    int32_t machine, straight, shares;
};

static enum road road_of(const struct place *a, const struct place *b)
{
    if (a->straight && b->straight)
        return BY_NCCL;
    return a->machine == b->machine && a->shares && b->shares ? BY_WINDOWS : BY_MESSAGES;
}

// "0-1, 0-2" of all pairs with this road; returns how many there are.
static int list_pairs(const struct place *all, int ranks, enum road road, char *out, size_t size)
{
    int count = 0;
    size_t n = 0;
    out[0] = 0;
    for (int a = 0; a < ranks; a++)
        for (int b = a + 1; b < ranks; b++) {
            if (road_of(&all[a], &all[b]) != road)
                continue;
            if (n + 16 < size)
                n += (size_t)snprintf(out + n, size - n, "%s%d-%d", count ? ", " : "", a, b);
            count++;
        }
    return count;
}

static void say_pairs(const struct place *all, int ranks)
{
    enum { MOST = 15 }; // pairs that are listed one by one
    char pairs[ROADS][256], line[800];
    int counts[ROADS], kinds = 0;
    size_t n = 0;
    for (int r = 0; r < ROADS; r++) {
        counts[r] = list_pairs(all, ranks, (enum road)r, pairs[r], sizeof pairs[r]);
        kinds += counts[r] > 0;
    }
    line[0] = 0;
    for (int r = 0; r < ROADS; r++) {
        if (counts[r] == 0)
            continue;
        n += (size_t)snprintf(line + n, sizeof line - n, "%s%s ", n ? "; " : "", road_names[r]);
        if (kinds == 1)
            n += (size_t)snprintf(line + n, sizeof line - n, "between all");
        else if (counts[r] > MOST)
            n += (size_t)snprintf(line + n, sizeof line - n, "between %d pairs", counts[r]);
        else
            n += (size_t)snprintf(line + n, sizeof line - n, "%s", pairs[r]);
    }
    say("ranks   %d: %s\n", ranks, line);
}

int ranks_say_roads(struct exchange *x, const struct roads *roads)
{
    const char *share = getenv("DITMOE_SHARE");
    const struct place mine = {.machine = exchange_machine(x),
                               .straight = roads_members(roads) > 1,
                               .shares = !share || strcmp(share, "0") != 0};
    const int ranks = exchange_ranks(x);
    struct place *all = calloc((size_t)ranks, sizeof *all);
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    int code = exchange_gather(x, &mine, all, sizeof mine);
    if (code >= 0)
        say_pairs(all, ranks);
    free(all);
    return code;
}
