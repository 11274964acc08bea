// How the ranks of a run meet. A rank is one process that drives one device; mpirun starts them.
// One process by itself has no exchange: `struct exchange *` is then NULL, of which every function
// here knows that it is rank 0 of 1 and that sums, gathers and broadcasts are done already. So
// callers have no second path, and the program needs no MPI to run on one device.
//
// Memory is the host's: callers bring bytes from and to their device (runtime/window.h). Between
// CUDA devices NCCL can carry them without the host (runtime/roads.h).
//
// A transfer is begun in a set and done after exchange_wait() of the set; until then its memory
// belongs to it. Collective calls (sum, gather, broadcast, barrier) are made by all ranks in the
// same order. Functions return 0 or a negative code. When a rank ends before its time, or does not
// answer, the wait of the others fails (ERR_LOST) with its number and what it was doing. One thread
// calls.
#ifndef DITMOE_EXCHANGE_H
#define DITMOE_EXCHANGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "devices/error.h"

struct exchange;
struct transfers;

// ---- start and end ------------------------------------------------------------------------------

// The number of processes that a launcher (mpirun, srun) says it started; 1 without one.
int exchange_launched(void);
// Joins the others; *out NULL where this process is alone. ERR_NODEVICE when MPI cannot be had.
int exchange_open(struct exchange **out);
void exchange_close(struct exchange *x);
// Ends all ranks at once, with this exit status; of NULL: does nothing.
void exchange_abort(struct exchange *x, int status);

int exchange_rank(const struct exchange *x);
int exchange_ranks(const struct exchange *x);
int exchange_node_rank(const struct exchange *x); // among the ranks of this machine
int exchange_node_ranks(const struct exchange *x);
int exchange_machine(const struct exchange *x); // a number of this machine: its first rank
const char *exchange_library(const struct exchange *x); // "Open MPI v4.1.4"

// What this rank is doing, for those who will miss it: "sends rows to experts". A step of -1 and a
// layer of -1 are left out. Kept until the next call.
void exchange_doing(struct exchange *x, const char *what, int layer);
void exchange_step(struct exchange *x, int64_t step);

// True for the first rank of a machine that asks: it tells what went wrong, the others are silent.
bool exchange_first_to_tell(struct exchange *x);

// Starts a thread that looks 20 times a second whether the other ranks of this machine live,
// and calls lost(user) there, once, when one has died: for what waits elsewhere than in
// exchange_wait().
int exchange_watch(struct exchange *x, void (*lost)(void *user), void *user);
void exchange_unwatch(struct exchange *x);
// late() is called in the watch's thread, with error_message() set, when 0.3 seconds after that the watch
// still goes on: the thread that should tell may wait long for its device, and mpirun ends all in a second.
void exchange_when_late(struct exchange *x, void (*late)(void));
// ERR_LOST, with who and what it was doing, once the watch has seen that; does not look itself.
int exchange_watched(struct exchange *x);

// ---- transfers ----------------------------------------------------------------------------------

int transfers_new(struct exchange *x, struct transfers **out); // of NULL: *out NULL
void transfers_free(struct transfers *t);

// Point to point; matched in order by tag, 0 to 32767. Not with NULL.
int exchange_send(struct transfers *t, const void *at, size_t bytes, int peer, int tag);
int exchange_receive(struct transfers *t, void *at, size_t bytes, int peer, int tag);
// Adds up [count] floats in place, over all ranks or `members` of them (ascending, this one among
// them). Every rank gets the same bits.
int exchange_sum_floats(struct transfers *t, float *at, size_t count, const int *members,
                        int member_count);
int exchange_wait(struct transfers *t);

// ---- at once ------------------------------------------------------------------------------------

int exchange_sum(struct exchange *x, double *at, size_t count); // in place
// all[ranks][bytes] from every rank's mine[bytes]
int exchange_gather(struct exchange *x, const void *mine, void *all, size_t bytes);
int exchange_broadcast(struct exchange *x, void *at, size_t bytes, int root);
int exchange_barrier(struct exchange *x);
// *any: was `mine` true on a rank?
int exchange_any(struct exchange *x, bool mine, bool *any);
// Fails on all ranks when `value` (a hash) differs from rank 0's on one: "rank 2 WHAT than rank 0".
int exchange_same(struct exchange *x, uint64_t value, const char *what);

// ---- figures ------------------------------------------------------------------------------------

struct exchange_figures {
    double waited;           // seconds in exchange_wait() and the calls that wait, so far
    uint64_t sent, received; // bytes point to point
    uint64_t summed;         // bytes given to sums
};
struct exchange_figures exchange_figures(const struct exchange *x); // of NULL: zeros

#endif
