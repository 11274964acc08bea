// What a step would take, and what memory, with a given placement on a given set of devices: the
// model that `ditmoe plan` prints and that the policies of runtime/policy.h minimise. A pure
// function of numbers; no device is asked. docs/placement.md derives it.
//
// A layer is two phases, each as long as its slowest rank: attention, router and, beside the
// sending of rows to experts, the shared expert; then experts and the sending back. The backward
// pass mirrors it. Gradients of what several ranks hold are summed beside the backward pass.
#ifndef DITMOE_FORECAST_H
#define DITMOE_FORECAST_H

#include "runtime/placement.h"
#include "runtime/rates.h"

// ---- the devices --------------------------------------------------------------------------------

struct cluster_rank {
    char name[160]; // "cuda:0 NVIDIA H200", for people
    int node;       // the machine it is in
    enum device_kind kind;
    struct device_rates rates;
    uint64_t memory; // bytes of the device to plan with
    int cores;       // ranks of the same number share cores; 0: these are its own
};

// The ranks that share one set of experts, and how many such sets work side by side.
struct cluster {
    int ranks;
    struct cluster_rank *rank;
    int nodes;
    uint64_t *host_memory;     // [nodes] bytes for experts that do not live on devices
    struct device_rates *host; // [nodes] the CPU, for experts at home there; memory 0: not known
    struct link_rate *link;    // [ranks, ranks]
    int copies;                // of all this; 1: no others
    struct link_rate between;  // of a rank and its likes in other copies
};

void cluster_free(struct cluster *c); // also of a zeroed struct
static inline const struct link_rate *cluster_link(const struct cluster *c, int from, int to)
{
    return &c->link[from * c->ranks + to];
}

// ---- the model ----------------------------------------------------------------------------------

// What depends on the kind of a device: GPUs fuse more operations than CPUs.
struct kind_cost {
    double bytes, expert_bytes;    // moved by what is not a product: of an image, of a routed row
    int launches, expert_launches; // operations
    double weight_bytes;           // of one parameter as products read it
    double update_bytes;           // moved by the optimiser, a parameter
};

// Sizes and costs of a model and what is done with it; model/cost.h fills it. Costs are of one
// forward pass, of one image and one layer unless said otherwise.
struct model_cost {
    char name[96];
    int layers, experts, topk;
    const bool *moe; // [layers] which have experts
    bool train;
    int passes;  // forward passes over an image: 2 where sampling is guided
    double rows; // routed rows of an image: tokens * topk
    double tokens;
    double row_bytes; // of one row on its way
    double flops, shared_flops,
        plain_flops; // of products: before the exchange; of the shared expert; the MLP
                     // of a layer without experts
    double attention_flops;
    double expert_flops; // of one routed row
    struct kind_cost gpu, cpu;
    double image_flops, image_bytes; // outside of layers, the whole pass
    double
        backward; // work of a backward pass in forward passes: 2, or 3 with recompute; 0 in sampling
    double dense_params;  // that every rank holds
    double expert_params; // of one expert
    // Bytes of device memory (the model's own plan, in a straight line): fixed + images * image
    // + experts held * expert + received rows of all layers * row.
    double fixed_memory, image_memory, expert_memory, row_memory;
    double headroom;    // room for received rows, as a multiple of what is expected
    double host_expert; // bytes of host memory of an expert that lives there
    double overlap;     // share of transfers that can hide behind work beside them, 0 to 1
};

// ---- the forecast -------------------------------------------------------------------------------

struct rank_forecast {
    double dense, expert;       // seconds of work in a step, all layers
    double exchange;            // of rows on their way that nothing hides
    double reduce;              // summing gradients, what the backward pass does not hide
    double stream;              // waiting for experts that come from host memory
    double update;              // the optimiser
    double wait;                // for slower ranks
    double rows;                // received a layer, mean
    double memory, host_memory; // bytes needed
};

struct forecast {
    int ranks;
    struct rank_forecast *rank;
    double step; // seconds
    double
        exchange_share; // of the step, mean over ranks: rows on their way that nothing hides, and waits
    double reduce_share;
    double images_per_second; // training: images; sampling: images' passes
    double missing;           // bytes that do not fit, on all devices and hosts together; 0: fits
    int missing_rank;         // the one that misses most, or -1
};

void forecast_free(struct forecast *f); // also of a zeroed struct

// `place` has as many ranks as the cluster; load [layers, experts] is each expert's share of a
// layer's rows (sums to 1), NULL: even.
int forecast_step(const struct cluster *c, const struct model_cost *m, const double *load,
                  const struct placement *place, struct forecast *out);

// ---- for policies -------------------------------------------------------------------------------

// One layer alone, seconds of a step; load [experts]. `parts` [ranks] (may be NULL) are added to;
// *work (may be NULL) is the sum of all ranks' own seconds, which falls where the slowest rank's
// time does not yet.
double forecast_layer(const struct cluster *c, const struct model_cost *m, const double *load,
                      const struct placement *place, int layer, struct rank_forecast *parts,
                      double *work);
// What a step takes beside its layers; held[ranks] experts of each rank, away[ranks] of these not
// on its device; `twice`: experts that several ranks hold, whose gradients are summed too.
double forecast_rest(const struct cluster *c, const struct model_cost *m, const int *share,
                     const int *held, const int *away, int twice, double layers_seconds,
                     struct rank_forecast *parts);
// Bytes of device memory of a rank; `rows` received in all layers together, expected.
double forecast_memory(const struct model_cost *m, int share, int held, int streamed, double rows);

#endif
