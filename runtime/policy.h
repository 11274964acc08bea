// Choosing a placement: which rank computes which images and holds which experts.
//
//   uniform    equal shares of the batch, equal runs of experts: needs to know nothing
//   memory     shares and experts in proportion to memory
//   frequency  equal shares; experts so that each rank gets the same measured load
//   cost       what the forecast says is fastest: the best of these, and of a start by speed,
//              improved move by move (an expert elsewhere, two exchanged, images from one rank to
//              another); or every rank with all experts, where they fit and nothing need travel
//
// Every policy first puts experts on devices; where a device has not the memory, some of its
// experts live in host memory and are streamed. cost also moves them to ranks that have room.
#ifndef DITMOE_POLICY_H
#define DITMOE_POLICY_H

#include "runtime/forecast.h"

enum policy { POLICY_UNIFORM, POLICY_MEMORY, POLICY_FREQUENCY, POLICY_COST, POLICIES };
extern const char *const policy_names[]; // ended by NULL

// One group of c->ranks ranks (cost: or as many groups as ranks); load as in forecast_step(). A
// placement is made also where it does not fit: forecast_step() tells what is missing. The same
// input gives the same placement.
int policy_place(enum policy policy, const struct cluster *c, const struct model_cost *m,
                 const double *load, int batch, struct placement *out);

// Homes of experts in host memory for every rank whose device has not the room (the others keep
// theirs).
int policy_fit(const struct cluster *c, const struct model_cost *m, const double *load,
               struct placement *p);

// The local search of `cost`, from where p is (policy_search.c).
int policy_improve(const struct cluster *c, const struct model_cost *m, const double *load,
                   struct placement *p);

#endif
