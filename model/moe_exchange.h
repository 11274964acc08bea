// The routed experts of a model that is spread over ranks (runtime/placement.h): the rows of each
// token's experts travel to the ranks that hold them and come back, in both passes.
//
// A rank sorts its rows by expert (model/moe.c). Each expert's rows, a segment, go to its owner,
// which puts them [expert][source rank], so that one ragged product does all; results return the
// same way to where the rows lay, so the rest of the layer knows nothing of this. Rows are copied,
// never changed: R ranks compute the same products as one, in another order of rows.
//
// Bytes go from device to device where there is a straight road (runtime/roads.h), else device,
// host, MPI, host, device (runtime/exchange.h); while they travel the device computes the shared
// expert.
#ifndef DITMOE_MOE_EXCHANGE_H
#define DITMOE_MOE_EXCHANGE_H

#include "runtime/exchange.h"
#include "runtime/placement.h"
#include "runtime/roads.h"
#include "runtime/tensor.h"

struct dit;
struct moe_exchange;

// In struct dit_options: which ranks share the model. Owned by the caller; outlives the model.
struct dit_ranks {
    struct exchange *exchange;
    const struct placement *placement; // `share` as images of one pass
    int copies;      // of each image in a pass: 2 where a sampler computes both guidance classes
    struct roads *roads; // straight ones, or NULL
    double headroom; // room for received rows, as a multiple of an even load; 0: for the worst case
};

// Rows (tokens) of all ranks in a pass, and those of the ranks before this one; without ranks N*T
// and 0.
int64_t moe_all_tokens(const struct dit *d);
int moe_first_image(const struct dit *d);

int moe_exchange_new(struct dit *d); // from d->options.ranks
void moe_exchange_free(struct moe_exchange *m);

// Declares what this rank keeps of the rows it receives in layer `layer`.
int moe_exchange_plan(struct dit *d, int layer);

// Forward, the layer's routing and a->rows being on the device: tells the others how many rows
// come, writes the balance loss's fractions over all ranks' tokens, and sends the rows; and later
// a->y = what the experts made of them. The device may work in between on what does not touch
// these.
int moe_exchange_send(struct dit *d, int layer);
int moe_exchange_forward(struct dit *d, int layer);
// Backward: sends d y (in a->y); gradients of the experts held here, and a->y becomes d rows.
int moe_exchange_send_back(struct dit *d, int layer);
int moe_exchange_backward(struct dit *d, int layer);

// Tokens of all ranks that each expert got in the last forward pass: load[E].
void moe_exchange_load(const struct dit *d, int layer, int32_t *load);

// What a layer's transfers were since the last call with `reset`: rows sent to other ranks and
// received, forward; seconds waited, both passes.
struct moe_traffic {
    int64_t sent, received;
    double waited;
};
struct moe_traffic moe_exchange_traffic(struct dit *d, int layer, bool reset);

#endif
