// What `ditmoe plan` is made of: the machines that a plan is for, the plans, and how they are
// shown.
#ifndef DITMOE_PLAN_TOOL_H
#define DITMOE_PLAN_TOOL_H

#include "model/cost.h"
#include "runtime/policy.h"
#include "runtime/topology.h"
#include "tools/command.h"

enum { MACHINES_MOST = 64 };
// Of a device's memory for a plan; drivers and contexts keep the rest.
#define DEVICE_USABLE 0.95
enum plan_road { ROAD_NCCL, ROAD_HOST }; // between CUDA ranks

struct plan_settings {
    const char *model, *load, *rates, *placement, *out, *png, *nodes, *devices;
    const char *topology; // files, separated by commas
    int here, cpu, host, batch, policy, precision, recompute, early, guided, json, group, exchange;
    int what, train, steps;  // what: 0 train, 1 sample; steps of a sample
    float network, headroom; // GB/s a machine and direction, 0: guessed
    uint64_t memory;         // of a device at most; 0: what it has
    int overlap;
    struct model_options overrides;
};

// ---- machines (plan_cluster.c) ------------------------------------------------------------------

// The machines of a plan: topologies in order, all of them `times` over.
struct machines {
    int count;
    struct topology *list[MACHINES_MOST];
    struct rates rates; // of --rates and of the cache
    double network;     // bytes/s of a machine, one way
    bool guessed;       // a device's rates are published, not measured
    char words[256];    // the network, in words
};

int machines_open(const struct plan_settings *o, struct machines *out);
void machines_close(struct machines *m);
// Ranks that one set of these machines has.
int machines_ranks(const struct machines *m, const struct plan_settings *o);
// A group of `ranks` ranks, from the first on, in `nodes` sets of machines. ranks divides, or is a
// multiple of, those of one set.
int machines_cluster(struct machines *m, const struct plan_settings *o, int nodes, int ranks,
                     struct cluster *out);

// ---- a plan (plan_make.c) -----------------------------------------------------------------------

struct plan_result {
    struct cluster cluster; // of one group
    struct model_cost cost;
    struct config config;
    struct cost_options options; // that `cost` was made with
    double *load;                // [layers, experts] or NULL
    struct placement one;        // of the group
    struct forecast forecast;
    int nodes, batch;          // sets of machines; images of all groups
    char title[160];           // of the model
    double policies[POLICIES]; // seconds with each policy on this group; INFINITY: does not fit
};

// One plan on `nodes` sets of machines for `batch` images, with the best size of group (or
// --group). `compare`: with every policy, for plan_result.policies.
int plan_make(const struct plan_settings *o, struct machines *m, int nodes, int batch, bool compare,
              struct plan_result *out);
void plan_result_free(struct plan_result *r); // also of a zeroed struct
// The placement of all ranks: the group's, once a copy.
int plan_expand(const struct plan_result *r, struct placement *out);

// Expert load: {"ditmoe_load": 1, "load": [[tokens of expert 0, ...] a layer, ...]}, normalised.
int load_read(const char *path, int layers, int experts, double **out);

// ---- showing it (plan_show.c, plan_figure.c) ----------------------------------------------------

void plan_show(const struct plan_settings *o, const struct machines *m, const struct plan_result *r,
               FILE *out);
json_t *plan_to_json(const struct plan_settings *o, const struct plan_result *r);
int plan_draw(const char *path, const struct plan_settings *o, const struct plan_result *r);

// One row of a table over numbers of nodes.
struct plan_point {
    int nodes, ranks, group, batch;
    double step, images_per_second, exchange, reduce, missing;
};
void points_print(const struct plan_settings *o, const struct plan_point *list, int count,
                  FILE *out);
int points_draw(const char *path, const struct plan_settings *o, const struct machines *m,
                const struct plan_point *list, int count);

#endif
