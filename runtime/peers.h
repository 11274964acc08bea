// Peer windows: device memory of each rank that the other ranks' devices write and read themselves,
// over NVLink or PCIe, so that the host takes no part in a step and a step on ranks can be recorded
// like one on a single device. For ranks of one machine whose backend shares memory between
// processes (struct backend: alloc_shared, reach); all ranks or none.
//
// A plan has windows: tensors of shared classes (runtime/plan.h) that every rank declares in the
// same order. Work passes in journeys, each on a lane: every rank writes what it has for the others
// where they want it and says so by a flag there; a journey is over for a rank when all have said
// so (op_peer_*, runtime/ops.h). A lane's journeys follow each other on one stream, on all ranks in
// the same order. What others write in a journey must not be in use here from this rank's part in
// the journey before it on.
//
// When a rank dies, a thread of the others lets their devices stop waiting; what these then compute
// has no meaning, and their next call that waits for a rank (runtime/exchange.h) says what
// happened.
#ifndef DITMOE_PEERS_H
#define DITMOE_PEERS_H

#include "runtime/exchange.h"
#include "runtime/plan.h"

struct peers;
struct peer_windows;

enum { PEERS_MOST = 64 }; // ranks
enum peer_lane { PEER_ROWS, PEER_SUMS, PEER_LANES };

// A collective call: tries whether every rank reaches every other's memory. *out NULL: not all do;
// `why` then says which and what is missing.
int peers_open(struct exchange *x, struct device *dev, struct peers **out, char *why, size_t size);
void peers_close(struct peers *p);
int peers_count(const struct peers *p); // ranks

// Before the plan's layout: declares what flags need. `p` NULL: *out NULL.
int peer_windows_new(struct peers *p, struct plan *plan, struct peer_windows **out);
void peer_windows_free(struct peer_windows *w); // before the plan
// Makes t, of a shared class of the plan, known to others; its number, or a negative code.
int peer_windows_add(struct peer_windows *w, enum plan_class class, const struct tensor *t);
// After the commit, before the first journey; collective. Nothing when it was called before.
int peer_windows_meet(struct peer_windows *w);
// Tensor `number` as `rank` has it.
struct mem *peer_windows_at(const struct peer_windows *w, int number, int rank);

// ---- journeys, on c's stream ----------------------------------------------------------------------

// What a layer's rows need to find their way: all i32, on the device; M ranks, E experts, M * E <=
// 2048.
struct peer_map {
    struct tensor counts;   // [M,E] window: rows of each rank by expert
    int counts_number;      // as a window
    struct tensor owner;    // [M,E] the rank that has the expert for a rank's rows
    struct tensor segments; // [2,M,E,3] where rows go to (0) and come back to (1): kernels.cl
    struct tensor traffic;  // [4] rows to other ranks and from them, microseconds waited
};

// Every rank says that it has come so far; and waits until all have.
int peer_say(struct context *c, struct peer_windows *w, enum peer_lane lane);
int peer_wait(struct context *c, struct peer_windows *w, enum peer_lane lane,
              const struct tensor *traffic);
// Begins: this rank's rows by expert (offsets[E+1], NULL: none) go to all; ends: how all rows lie
// is in map->segments, offsets[held+1] of the served rows, and fraction[E] (or NULL) = scale * rows
// of each expert.
int peer_send_counts(struct context *c, struct peer_windows *w, const struct peer_map *map,
                     const struct tensor *offsets);
int peer_take_counts(struct context *c, struct peer_windows *w, const struct peer_map *map,
                     struct tensor *offsets, struct tensor *fraction, float scale);
// Rows go from `from` to window `to` of the owners (PEER_OUT), row i being from[index[i]] where
// there is an index; or of their sources (PEER_BACK). They travel beside what the device's stream
// is given next, to whose products struct device.spare leaves all but a few compute units; until
// peer_take_rows(), which ends the journey. Both in dry contexts, too.
enum peer_way { PEER_OUT, PEER_BACK };
int peer_send_rows(struct context *c, struct peer_windows *w, const struct peer_map *map,
                   enum peer_way way, int to, const struct tensor *from,
                   const struct tensor *index);
int peer_take_rows(struct context *c, struct peer_windows *w, const struct peer_map *map);
// Copies `rows`, a matrix, into window `to` of every rank, from its row `first` on. After the next
// peer_wait() all ranks' are there.
int peer_give_rows(struct context *c, struct peer_windows *w, int to, int64_t first,
                   const struct tensor *rows);
// control[0] = the sum over ranks of control[0]; mean[1] = scale * the sum of all ranks' losses.
// `all` [M,2] f32 is window `number`.
int peer_total(struct context *c, struct peer_windows *w, int number, const struct tensor *all,
               struct tensor *control, const struct tensor *losses, struct tensor *mean,
               float scale);

int peer_windows_rank(const struct peer_windows *w);
int peer_windows_ranks(const struct peer_windows *w);
// A stream of the device whose work goes before others', where it has such; NULL on CPU devices,
// whose few threads must not all wait in kernels: there everything goes on one stream.
int peer_stream(struct device *dev, struct stream **out);
// For journeys: what is put on `beside` comes after what c's stream holds now; until
// peer_beside_end(), which peer_join() makes c's stream wait for.
int peer_beside(const struct context *c, struct peer_windows *w, struct context *beside);
int peer_beside_end(struct peer_windows *w);
int peer_join(const struct context *c, struct peer_windows *w);
struct mem *peer_windows_words(const struct peer_windows *w, int rank); // flags that others set
struct tensor *peer_windows_own(struct peer_windows *w);                // what journeys count here

#endif
