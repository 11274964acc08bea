// What carries bytes between ranks: a table of verbs, like a device's. The only one so far is MPI
// (exchange_mpi.c), a module of its own that is opened at run time when the program was started
// under mpirun: the program itself needs no MPI, and as MPI implementations differ in their binary
// interface, only the module has to be built for the one at hand. NCCL between CUDA ranks would be
// a second table. Callers use runtime/exchange.h.
//
// Every transfer is put into a `struct pending`, a set of things under way, and done when test()
// says so for the set. Functions return 0 or a negative number after writing one line to error().
#ifndef DITMOE_FABRIC_H
#define DITMOE_FABRIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pending;

enum fabric_type { FABRIC_BYTES, FABRIC_FLOAT, FABRIC_DOUBLE, FABRIC_INT64 };

enum { FABRIC_VERSION = 1, FABRIC_LIBRARY = 128 };

struct fabric {
    int version;         // FABRIC_VERSION
    const char *release; // DITMOE_VERSION of the build that the module came from

    // Starts; `node_rank` of `node_ranks` on the same machine. `board` is zeroed memory that these
    // share, `bytes` for each of them, in order of their node_rank.
    int (*open)(int *rank, int *ranks, int *node_rank, int *node_ranks, size_t bytes, void **board,
                char library[FABRIC_LIBRARY]);
    void (*close)(void);
    void (*abort)(int status); // ends every rank
    const char *(*error)(void);

    int (*pending_new)(struct pending **out);
    void (*pending_free)(struct pending *p);
    int (*test)(struct pending *p, bool *done); // does not wait; makes progress

    // Point to point, matched by tag (0..32767) and order.
    int (*send)(struct pending *p, const void *at, size_t bytes, int peer, int tag);
    int (*receive)(struct pending *p, void *at, size_t bytes, int peer, int tag);
    // Sums in place over `members` (ascending, this rank among them; NULL: all). Every member names
    // the same ones. The result is the same bits on each.
    int (*sum)(struct pending *p, void *at, size_t count, enum fabric_type type, const int *members,
               int member_count);
    int (*gather)(struct pending *p, const void *mine, void *all, size_t bytes); // all: [ranks]
    int (*broadcast)(struct pending *p, void *at, size_t bytes, int root);
};

// The one symbol of a module: `const struct fabric ditmoe_fabric`.
#define FABRIC_SYMBOL "ditmoe_fabric"

#endif
