// Parameters of a model that is spread over ranks, brought together on rank 0, which writes files.
#ifndef DITMOE_COLLECT_H
#define DITMOE_COLLECT_H

#include "model/dit.h"

// Called by every rank for the same parameter of the same kind of weights: rank 0 gets its values
// in `host` [param_count]; the rank that has what rank 0 lacks sends it. Without ranks:
// param_read().
int collect_param(struct dit *d, struct weights *from, const struct param *p, float *host);

// Is this the rank that writes files?
static inline bool collect_writes(const struct dit *d)
{
    return !d->options.ranks || exchange_rank(d->options.ranks->exchange) == 0;
}

#endif
