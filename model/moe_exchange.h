// The routed experts of a model that is spread over ranks (runtime/placement.h): the rows of each
// token's experts travel to the ranks that hold them and come back, in both passes.
//
// A rank sorts its rows by expert (model/moe.c). Each expert's rows, a segment, go to its owner,
// which puts them [expert][source rank], so that one ragged product does all; results return the
// same way to where the rows lay, so the rest of the layer knows nothing of this. Rows are copied,
// never changed: R ranks compute the same products as one, in another order of rows.
//
// With peer windows (runtime/peers.h) devices write each other's rows themselves, and what to write
// and where is known to them alone: the host only puts the work on their streams. Else bytes go
// from device to device where there is a straight road (runtime/roads.h), or device, host, MPI,
// host, device (runtime/exchange.h); while they travel the device computes the shared expert.
#ifndef DITMOE_MOE_EXCHANGE_H
#define DITMOE_MOE_EXCHANGE_H

#include "runtime/exchange.h"
#include "runtime/peers.h"
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
    struct peers *peers; // peer windows; or NULL. They leave room for the worst case
    double headroom; // room for received rows, as a multiple of an even load; 0: for the worst case
};

// Rows (tokens) of all ranks in a pass, and those of the ranks before this one; without ranks N*T
// and 0.
int64_t moe_all_tokens(const struct dit *d);
int moe_first_image(const struct dit *d);

int moe_exchange_new(struct dit *d); // from d->options.ranks
int moe_exchange_windows(struct dit *d); // after plan_new
void moe_exchange_free(struct moe_exchange *m);
struct peer_windows *moe_windows(const struct dit *d); // or NULL
// Can a pass be recorded? Not where the host takes part, or copies go on between passes.
bool moe_exchange_recorded(const struct dit *d);

// Declares what this rank keeps of the rows it receives in layer `layer`.
int moe_exchange_plan(struct dit *d, int layer);

// Forward, the layer's routing and a->rows being on the device (with peer windows h2 does instead
// of rows): tells the others how many rows come, writes the balance loss's fractions over all
// ranks' tokens, and sends the rows; then computes what the experts of this rank make of theirs,
// and sends it; then a->y = what all experts made of this rank's rows. In between the device may
// work on what does not touch these.
int moe_exchange_send(struct dit *d, int layer);
int moe_exchange_serve(struct dit *d, int layer);
int moe_exchange_take(struct dit *d, int layer);
// Backward: sends d y (in a->y); gradients of the experts held here; and a->y becomes d rows.
int moe_exchange_send_back(struct dit *d, int layer);
int moe_exchange_serve_back(struct dit *d, int layer);
int moe_exchange_take_back(struct dit *d, int layer);

// Tokens of all ranks that each expert got in the last forward pass: load[E].
int moe_exchange_load(const struct dit *d, int layer, int32_t *load);

// What a layer's transfers were since the last call: rows sent to other ranks and received,
// forward; seconds waited, both passes.
struct moe_traffic {
    int64_t sent, received;
    double waited;
};
int moe_exchange_traffic(struct dit *d, int layer, struct moe_traffic *out);
// Seconds that the device has stood still for other ranks' rows since the last call; waits for it.
int moe_exchange_waited(struct dit *d, double *seconds);

#endif
