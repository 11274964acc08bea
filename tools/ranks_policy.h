// The placement of ranks that are here, as --placement names it, and what a step with it should
// take. Rank 0 plans, from what ditmoe calibrate has measured of every rank's device and of the
// roads between them (runtime/forecast.h, runtime/policy.h); all take its placement.
#ifndef DITMOE_RANKS_POLICY_H
#define DITMOE_RANKS_POLICY_H

#include "runtime/forecast.h"
#include "runtime/roads.h"
#include "tools/ranks.h"

struct rank_place {
    struct placement placement;
    struct forecast forecast; // of rank 0 alone
    double
        predicted; // seconds of a step (sampling: of a pass), on every rank; NAN: rates are missing
};

// A collective call. ERR_INPUT: a policy that needs rates which nobody has measured, a file that is
// not a placement of these ranks and this model, "48:16/6:2" that does not add up.
int ranks_place(struct exchange *x, const struct device *dev, const struct roads *roads,
                const struct rank_options *o, const struct config *c, const struct rank_work *w,
                struct rank_place *out);

// "cost: images 48:16, experts 48:16; predicted 31.2 ms a step" on rank 0's stderr.
void ranks_place_say(const struct rank_options *o, const struct rank_work *w,
                     const struct rank_place *p);

#endif
