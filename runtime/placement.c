// See placement.h: making, changing and checking placements. Their JSON is placement_json.c,
// choosing a good one placement_policy.c.
#include "runtime/placement.h"

#include <stdlib.h>
#include <string.h>

#include "devices/error.h"

const char *expert_home_name(enum expert_home home)
{
    static const char *const names[] = {
        [HOME_DEVICE] = "device", [HOME_STREAMED] = "streamed", [HOME_HOST] = "host"};
    BUG_IF((unsigned)home >= HOMES);
    return names[home];
}

// ---- making -------------------------------------------------------------------------------------

int placement_new(int ranks, int groups, int layers, int experts, struct placement *out)
{
    BUG_IF(ranks < 1 || groups < 1 || layers < 0 || experts < 0);
    const size_t places = (size_t)groups * (size_t)layers * (size_t)experts;
    struct placement p = {.ranks = ranks, .groups = groups, .layers = layers, .experts = experts};
    *out = (struct placement){0};
    p.share = calloc((size_t)ranks, sizeof *p.share);
    p.group = calloc((size_t)ranks, sizeof *p.group);
    p.owner = malloc((places + 1) * sizeof *p.owner);
    p.home = calloc(places + 1, sizeof *p.home);
    if (!p.share || !p.group || !p.owner || !p.home) {
        placement_free(&p);
        return fail(ERR_NOMEM, "no host memory for a placement on %d ranks", ranks);
    }
    for (size_t i = 0; i < places; i++)
        p.owner[i] = NO_OWNER;
    *out = p;
    return 0;
}

void placement_free(struct placement *p)
{
    free(p->share);
    free(p->group);
    free(p->owner);
    free(p->home);
    *p = (struct placement){0};
}

static void even_shares(struct placement *p, int batch)
{
    p->batch = batch;
    for (int r = 0; r < p->ranks; r++)
        p->share[r] = batch / p->ranks + (r < batch % p->ranks);
}

int placement_uniform(int ranks, int layers, int experts, const bool *moe, int batch,
                      struct placement *out)
{
    TRY(placement_new(ranks, 1, layers, experts, out));
    even_shares(out, batch);
    for (int l = 0; l < layers; l++) {
        int turn = experts % ranks == 0 ? 0 : l;
        for (int e = 0; e < experts && (!moe || moe[l]); e++)
            *placement_owner(out, 0, l, e) = (int)(((int64_t)e * ranks / experts + turn) % ranks);
    }
    return 0;
}

int placement_replicated(int ranks, int layers, int experts, const bool *moe, int batch,
                         struct placement *out)
{
    TRY(placement_new(ranks, ranks, layers, experts, out));
    even_shares(out, batch);
    for (int r = 0; r < ranks; r++) {
        out->group[r] = r;
        for (int l = 0; l < layers; l++)
            for (int e = 0; e < experts && (!moe || moe[l]); e++)
                *placement_owner(out, r, l, e) = r;
    }
    return 0;
}

// Whole parts first; what is left goes to the largest remainders, the lower rank first among
// equals.
void placement_rescale(struct placement *p, int batch)
{
    const int64_t old = p->batch;
    int left = batch;
    if (old == batch)
        return;
    BUG_IF(old < 1 || batch < 0);
    int64_t *rest = calloc((size_t)p->ranks, sizeof *rest);
    for (int r = 0; r < p->ranks; r++) {
        const int64_t exact = (int64_t)p->share[r] * batch;
        p->share[r] = (int)(exact / old);
        left -= p->share[r];
        if (rest)
            rest[r] = exact % old;
    }
    for (; left > 0; left--) {
        int best = 0;
        for (int r = 1; rest && r < p->ranks; r++)
            if (rest[r] > rest[best])
                best = r;
        p->share[best]++;
        if (rest)
            rest[best] = -1;
    }
    free(rest);
    p->batch = batch;
}

// ---- asking -------------------------------------------------------------------------------------

bool placement_holds(const struct placement *p, int rank, int layer, int expert,
                     enum expert_home *home)
{
    for (int g = 0; g < p->groups; g++) {
        if (*placement_owner(p, g, layer, expert) == rank) {
            if (home)
                *home = (enum expert_home) * placement_home(p, g, layer, expert);
            return true;
        }
    }
    return false;
}

bool placement_streams(const struct placement *p, int rank, int layer)
{
    enum expert_home home;
    for (int e = 0; e < p->experts; e++)
        if (placement_holds(p, rank, layer, e, &home) && home != HOME_DEVICE)
            return true;
    return false;
}

static void set_homes(struct placement *p, int rank, int layer, enum expert_home home)
{
    for (int g = 0; g < p->groups; g++)
        for (int e = 0; e < p->experts; e++)
            if (*placement_owner(p, g, layer, e) == rank &&
                *placement_home(p, g, layer, e) != HOME_HOST)
                *placement_home(p, g, layer, e) = (uint8_t)home;
}

// Streams `count` of the `most` layers in which a rank has experts; returns how many experts that are.
static int stream_layers(struct placement *p, int rank, int count, int most)
{
    int experts = 0, i = 0;
    for (int l = 0; l < p->layers; l++) {
        const int held = placement_list(p, rank, l, NULL);
        if (held == 0)
            continue;
        const bool streamed = placement_spread(i++, count, most);
        set_homes(p, rank, l, streamed ? HOME_STREAMED : HOME_DEVICE);
        experts += streamed ? held : 0;
    }
    return experts;
}

void placement_stream_whole(struct placement *p)
{
    for (int r = 0; r < p->ranks; r++) {
        int wanted = 0, most = 0, count = 1;
        enum expert_home home;
        for (int l = 0; l < p->layers; l++) {
            most += placement_list(p, r, l, NULL) > 0;
            for (int e = 0; e < p->experts; e++)
                wanted += placement_holds(p, r, l, e, &home) && home == HOME_STREAMED;
        }
        while (wanted > 0 && stream_layers(p, r, count, most) < wanted && count < most)
            count++;
    }
}

int placement_list(const struct placement *p, int rank, int layer, int *list)
{
    int count = 0;
    for (int e = 0; e < p->experts; e++) {
        if (!placement_holds(p, rank, layer, e, NULL))
            continue;
        if (list)
            list[count] = e;
        count++;
    }
    return count;
}

int placement_held(const struct placement *p, int rank)
{
    int held = 0;
    for (int l = 0; l < p->layers; l++)
        held += placement_list(p, rank, l, NULL);
    return held;
}

bool placement_nothing(const struct placement *p, int rank)
{
    return rank > 0 && p->share[rank] == 0 && placement_held(p, rank) == 0;
}

// ---- checking -----------------------------------------------------------------------------------

static int check_ranks(const struct placement *p)
{
    int64_t sum = 0;
    for (int r = 0; r < p->ranks; r++) {
        if (p->share[r] < 0)
            return fail(ERR_INPUT, "placement: rank %d has a share of %d images", r, p->share[r]);
        if (p->group[r] < 0 || p->group[r] >= p->groups)
            return fail(ERR_INPUT, "placement: rank %d is in group %d; there are groups 0 to %d", r,
                        p->group[r], p->groups - 1);
        sum += p->share[r];
    }
    if (sum != p->batch)
        return fail(ERR_INPUT, "placement: the shares make %lld images; the batch is of %d",
                    (long long)sum, p->batch);
    return 0;
}

static int check_layer(const struct placement *p, int g, int l)
{
    const bool moe = *placement_owner(p, 0, l, 0) != NO_OWNER;
    for (int e = 0; e < p->experts; e++) {
        const int owner = *placement_owner(p, g, l, e);
        if ((owner != NO_OWNER) != moe)
            return fail(ERR_INPUT, "placement: expert %d of layer %d has %s owner in group %d", e,
                        l, moe ? "no" : "an", g);
        if (owner != NO_OWNER && (owner < 0 || owner >= p->ranks))
            return fail(ERR_INPUT,
                        "placement: expert %d of layer %d is on rank %d; there are ranks 0 to %d",
                        e, l, owner, p->ranks - 1);
        if (*placement_home(p, g, l, e) >= HOMES)
            return fail(ERR_INPUT, "placement: expert %d of layer %d has no such home", e, l);
    }
    return 0;
}

// One copy has one home, whichever groups it serves.
static int check_homes(const struct placement *p, int l, int e, int *home_of)
{
    for (int r = 0; r < p->ranks; r++)
        home_of[r] = -1;
    for (int g = 0; g < p->groups; g++) {
        const int owner = *placement_owner(p, g, l, e), home = *placement_home(p, g, l, e);
        if (owner == NO_OWNER)
            continue;
        if (home_of[owner] >= 0 && home_of[owner] != home)
            return fail(ERR_INPUT,
                        "placement: expert %d of layer %d is at two homes on rank %d: %s and %s", e,
                        l, owner, expert_home_name((enum expert_home)home_of[owner]),
                        expert_home_name((enum expert_home)home));
        home_of[owner] = home;
    }
    return 0;
}

int placement_check(const struct placement *p)
{
    int code = check_ranks(p);
    for (int g = 0; g < p->groups && code >= 0; g++)
        for (int l = 0; l < p->layers && code >= 0; l++)
            code = check_layer(p, g, l);
    if (p->groups == 1 || code < 0)
        return code;
    int *home_of = calloc((size_t)p->ranks, sizeof *home_of);
    if (!home_of)
        return fail(ERR_NOMEM, "no host memory to check a placement");
    for (int l = 0; l < p->layers && code >= 0; l++)
        for (int e = 0; e < p->experts && code >= 0; e++)
            code = check_homes(p, l, e, home_of);
    free(home_of);
    return code;
}

int placement_matches(const struct placement *p, int ranks, int layers, int experts,
                      const bool *moe)
{
    if (p->ranks != ranks)
        return fail(ERR_INPUT, "the placement is for %d ranks; this run has %d", p->ranks, ranks);
    if (p->layers != layers || p->experts != experts)
        return fail(ERR_INPUT,
                    "the placement is for %d layers of %d experts; this model has %d layers of %d",
                    p->layers, p->experts, layers, experts);
    for (int l = 0; l < layers && experts > 0; l++) {
        const bool placed = *placement_owner(p, 0, l, 0) != NO_OWNER, there = !moe || moe[l];
        if (placed != there)
            return fail(ERR_INPUT, "the placement has %s experts in layer %d; this model has %s",
                        placed ? "" : "no", l, there ? "some" : "none");
    }
    return 0;
}
