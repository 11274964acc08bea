// What a model costs, for the forecast of runtime/forecast.h: operations from its sizes, memory
// from its own plan. The plan is made on a device that exists on paper, for a few batches, experts
// and active experts; straight lines through these give what any rank would need.
#ifndef DITMOE_COST_H
#define DITMOE_COST_H

#include "model/config.h"
#include "runtime/forecast.h"

struct cost_options {
    enum device_kind kind; // of the devices whose plan counts: GPUs fuse more than CPUs
    bool bf16, train, recompute, early;
    bool guided;     // sampling: the null class is computed beside each image
    int batch;       // images of a rank, about: the plan's line goes through it
    bool alone;      // one rank has all experts: no rows are sent or received
    double headroom; // as in struct model_cost; 0: 2
    double overlap;
};

int model_cost_new(const struct config *c, const struct cost_options *o, struct model_cost *out);
void model_cost_free(struct model_cost *m); // also of a zeroed struct

// Bytes that the model's plan takes on one device of the kind, everything on it, planned as ranks
// plan (a trainer of one rank may need less: plan_host(), enum lean).
int model_memory(const struct config *c, const struct cost_options *o, int batch, double *bytes);
// Bytes of its device that it takes on a rank of a placement; experts in host memory are streamed.
int model_memory_rank(const struct config *c, const struct cost_options *o,
                      const struct placement *place, int rank, double *bytes);

// What a process by itself does with `batch` images at a time (guidance's copies included) and `limit`
// bytes: of how many layers it keeps experts in host memory, and the bytes of its plan, which are more
// than `limit` where all of them are too few.
int model_offload(const struct config *c, const struct cost_options *o, int batch, double limit,
                  int *layers, double *bytes);

#endif
