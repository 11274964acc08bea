// Where the parts of one model live and work when several ranks (a process with one device each)
// share it: how many images of the global batch each rank computes, and which rank holds which
// expert. Attention, the shared expert, the router, embedding and head are on every rank; routed
// experts are where the placement says, and tokens travel to them (expert parallelism).
//
// Ranks form groups. Within a group tokens for expert e of layer l go to one rank, owner(group, l,
// e). One group: no expert exists twice. As many groups as ranks, each owning all: data
// parallelism. Between these, an expert has as many copies as there are different owners of it,
// whose gradients are summed; an owner need not be of the group that it serves.
#ifndef DITMOE_PLACEMENT_H
#define DITMOE_PLACEMENT_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

enum expert_home {
    HOME_DEVICE,   // in the owner's device memory
    HOME_STREAMED, // in the owner's host memory, copied to its device ahead of each use
    HOME_HOST,     // in the owner's host memory, computed there by the host's CPU
    HOMES
};
const char *expert_home_name(enum expert_home home); // "device", "streamed", "host"

enum { NO_OWNER = -1 };

struct placement {
    int ranks, groups, layers, experts;
    int batch;     // images of a step, all ranks together
    int *share;    // [ranks] images of each rank, the sum is `batch`; may be 0
    int *group;    // [ranks] the group of each rank
    int *owner;    // [groups, layers, experts] rank; NO_OWNER throughout layers without experts
    uint8_t *home; // [groups, layers, experts] enum expert_home, of the owner's copy
};

// One group of ranks, all shares 0, no layer with an owner yet, all homes HOME_DEVICE.
int placement_new(int ranks, int groups, int layers, int experts, struct placement *out);
void placement_free(struct placement *p); // also of a zeroed struct

// What needs no knowledge of the machine: equal shares (the first ranks one more where it does not
// divide), one group, a layer's experts in ranks' order in equal runs (where it does not divide,
// the runs move on by a rank from layer to layer). `moe` [layers]: which layers have experts; NULL:
// all.
int placement_uniform(int ranks, int layers, int experts, const bool *moe, int batch,
                      struct placement *out);

// Data parallelism: as uniform, but every rank is a group and holds all experts.
int placement_replicated(int ranks, int layers, int experts, const bool *moe, int batch,
                         struct placement *out);

// The shares of the same placement for another global batch: in the old proportions, largest
// remainders first, so that the sum is exact.
void placement_rescale(struct placement *p, int batch);

static inline int *placement_owner(const struct placement *p, int group, int layer, int expert)
{
    return &p->owner[((int64_t)group * p->layers + layer) * p->experts + expert];
}
static inline uint8_t *placement_home(const struct placement *p, int group, int layer, int expert)
{
    return &p->home[((int64_t)group * p->layers + layer) * p->experts + expert];
}
// Whether `rank` has a copy of the expert; *home (may be NULL) says where.
bool placement_holds(const struct placement *p, int rank, int layer, int expert,
                     enum expert_home *home);
// Whether experts of a layer that `rank` has are at home in host memory, of whichever kind.
bool placement_streams(const struct placement *p, int rank, int layer);
// Whether the i-th of `most` layers is one of `count` that are spread evenly among them.
static inline bool placement_spread(int i, int count, int most)
{
    return (int64_t)(i + 1) * count / most > (int64_t)i * count / most;
}
// Each rank's experts in host memory become all those of some layers, evenly spread and at least as
// many: a rank streams whole layers (model/streamed.h).
void placement_stream_whole(struct placement *p);
// The experts of a layer that `rank` has, ascending, in list[experts] (may be NULL); returns how
// many.
int placement_list(const struct placement *p, int rank, int layer, int *list);
int placement_held(const struct placement *p, int rank); // its experts, of all layers

// Has the rank neither images nor experts? Such a rank keeps out of the exchange, of sums and
// updates; never the first, which writes files.
bool placement_nothing(const struct placement *p, int rank);

// ERR_INPUT with one line that names the first thing that contradicts itself.
int placement_check(const struct placement *p);
// ERR_INPUT with one line when the placement is for another number of ranks or another model.
int placement_matches(const struct placement *p, int ranks, int layers, int experts,
                      const bool *moe);

// JSON, version 1:
//   {"ditmoe_placement": 1, "ranks": 3, "layers": 28, "experts": 8, "batch": 64,
//    "shares": [40,24,0], "groups": [{"ranks": [0,1,2],
//     "owner": [[0,0,0,0,1,1,2,2], ...], "home": ["ddddddss", ...]}]}
// `owner` has a row for each layer, null where a layer has no experts, or one row for all layers.
// `home` (may be left out: all on the device) has a letter for each expert: d, s or h, the first
// letters of the names. `ranks` of a group may be left out where there is one group.
json_t *placement_to_json(const struct placement *p);
int placement_from_json(const json_t *json, struct placement *out); // checked
int placement_read(const char *path, struct placement *out);        // checked; errors name the file

#endif
