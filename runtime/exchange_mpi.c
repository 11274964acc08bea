// The MPI module (fabric.h): built as ditmoe_mpi.so beside the program where CMake finds an MPI.
//
// Nothing here waits except where MPI has no other way (starting, making a communicator, ending):
// waiting is exchange.c's, which can tell whom it waits for, and for how long.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/fabric.h"

enum { CHUNK = 1 << 30 }; // MPI counts are ints

struct pending {
    MPI_Request *list;
    int count, capacity;
};

// Communicators of the sets of ranks that have been summed over.
struct members {
    int count;
    int *list;
    MPI_Comm comm;
    struct members *next;
};

static struct {
    int rank, ranks;
    MPI_Comm world, node;
    MPI_Win window;
    struct members *members;
    char message[MPI_MAX_ERROR_STRING + 64];
} mpi;

static int failed(const char *what, int code)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    for (char *c = text; *c; c++)
        *c = *c == '\n' ? ' ' : *c;
    snprintf(mpi.message, sizeof mpi.message, "%s: %s", what, text);
    return -1;
}

static const char *fabric_error(void)
{
    return mpi.message;
}

#define CHECK(call)                      \
    do {                                 \
        int code_ = (call);              \
        if (code_ != MPI_SUCCESS)        \
            return failed(#call, code_); \
    } while (0)

// ---- start and end ------------------------------------------------------------------------------

// Shared memory of the node's ranks, so that they can see what the others are doing.
static int make_board(size_t bytes, void **board)
{
    void *mine;
    MPI_Aint size;
    int unit;
    CHECK(MPI_Win_allocate_shared((MPI_Aint)bytes, 1, MPI_INFO_NULL, mpi.node, &mine, &mpi.window));
    memset(mine, 0, bytes);
    CHECK(MPI_Barrier(mpi.node));
    CHECK(MPI_Win_shared_query(mpi.window, 0, &size, &unit, board));
    return 0;
}

static int fabric_open(int *rank, int *ranks, int *node_rank, int *node_ranks, size_t bytes,
                       void **board, char library[FABRIC_LIBRARY])
{
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0, provided = 0;
    CHECK(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided));
    CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &mpi.world));
    CHECK(MPI_Comm_set_errhandler(mpi.world, MPI_ERRORS_RETURN));
    CHECK(MPI_Comm_rank(mpi.world, &mpi.rank));
    CHECK(MPI_Comm_size(mpi.world, &mpi.ranks));
    CHECK(MPI_Comm_split_type(mpi.world, MPI_COMM_TYPE_SHARED, mpi.rank, MPI_INFO_NULL, &mpi.node));
    CHECK(MPI_Comm_rank(mpi.node, node_rank));
    CHECK(MPI_Comm_size(mpi.node, node_ranks));
    MPI_Get_library_version(text, &length);
    snprintf(library, FABRIC_LIBRARY, "%.*s", (int)strcspn(text, ",\n"), text);
    *rank = mpi.rank;
    *ranks = mpi.ranks;
    return make_board(bytes, board);
}

static void fabric_close(void)
{
    while (mpi.members) {
        struct members *m = mpi.members;
        mpi.members = m->next;
        MPI_Comm_free(&m->comm);
        free(m->list);
        free(m);
    }
    MPI_Win_free(&mpi.window);
    MPI_Comm_free(&mpi.node);
    MPI_Comm_free(&mpi.world);
    MPI_Finalize();
}

static void fabric_abort(int status)
{
    MPI_Abort(MPI_COMM_WORLD, status);
}

// ---- things under way ---------------------------------------------------------------------------

static int pending_new(struct pending **out)
{
    *out = calloc(1, sizeof **out);
    if (!*out)
        snprintf(mpi.message, sizeof mpi.message, "out of host memory");
    return *out ? 0 : -1;
}

static void pending_free(struct pending *p)
{
    if (p)
        free(p->list);
    free(p);
}

static int next_request(struct pending *p, MPI_Request **out)
{
    if (p->count == p->capacity) {
        const int wanted = p->capacity ? 2 * p->capacity : 64;
        MPI_Request *more = realloc(p->list, (size_t)wanted * sizeof *more);
        if (!more) {
            snprintf(mpi.message, sizeof mpi.message, "out of host memory");
            return -1;
        }
        p->list = more;
        p->capacity = wanted;
    }
    *out = &p->list[p->count++];
    **out = MPI_REQUEST_NULL;
    return 0;
}

static int test(struct pending *p, bool *done)
{
    int flag = 1;
    *done = true;
    if (p->count == 0)
        return 0;
    CHECK(MPI_Testall(p->count, p->list, &flag, MPI_STATUSES_IGNORE));
    *done = flag != 0;
    if (flag)
        p->count = 0;
    return 0;
}

// ---- transfers ----------------------------------------------------------------------------------

#define NEXT(p, request)               \
    MPI_Request *request;              \
    if (next_request(p, &request) < 0) \
    return -1

static int piece(size_t left)
{
    return (int)(left < CHUNK ? left : CHUNK);
}

static int send(struct pending *p, const void *at, size_t bytes, int peer, int tag)
{
    for (size_t from = 0; from < bytes; from += CHUNK) {
        NEXT(p, r);
        CHECK(MPI_Isend((const char *)at + from, piece(bytes - from), MPI_BYTE, peer, tag,
                        mpi.world, r));
    }
    return 0;
}

static int receive(struct pending *p, void *at, size_t bytes, int peer, int tag)
{
    for (size_t from = 0; from < bytes; from += CHUNK) {
        NEXT(p, r);
        CHECK(MPI_Irecv((char *)at + from, piece(bytes - from), MPI_BYTE, peer, tag, mpi.world, r));
    }
    return 0;
}

static int communicator_of(const int *list, int count, MPI_Comm *out)
{
    struct members *m = mpi.members;
    MPI_Group all, group;
    for (; m; m = m->next) {
        if (m->count == count && !memcmp(m->list, list, (size_t)count * sizeof *list)) {
            *out = m->comm;
            return 0;
        }
    }
    m = calloc(1, sizeof *m);
    if (m)
        m->list = malloc((size_t)count * sizeof *list);
    if (!m || !m->list) {
        free(m);
        snprintf(mpi.message, sizeof mpi.message, "out of host memory");
        return -1;
    }
    memcpy(m->list, list, (size_t)count * sizeof *list);
    m->count = count;
    m->next = mpi.members;
    mpi.members = m;
    CHECK(MPI_Comm_group(mpi.world, &all));
    CHECK(MPI_Group_incl(all, count, list, &group));
    CHECK(MPI_Comm_create_group(mpi.world, group, 0, &m->comm));
    CHECK(MPI_Comm_set_errhandler(m->comm, MPI_ERRORS_RETURN));
    CHECK(MPI_Group_free(&group));
    CHECK(MPI_Group_free(&all));
    *out = m->comm;
    return 0;
}

static int sum(struct pending *p, void *at, size_t count, enum fabric_type type, const int *members,
               int member_count)
{
    static const struct {
        MPI_Datatype type;
        size_t size;
    } types[] = {[FABRIC_BYTES] = {MPI_BYTE, 1},
                 [FABRIC_FLOAT] = {MPI_FLOAT, sizeof(float)},
                 [FABRIC_DOUBLE] = {MPI_DOUBLE, sizeof(double)},
                 [FABRIC_INT64] = {MPI_INT64_T, sizeof(int64_t)}};
    MPI_Comm comm = mpi.world;
    if (members && member_count < mpi.ranks && communicator_of(members, member_count, &comm) < 0)
        return -1;
    for (size_t from = 0; from < count; from += CHUNK / 8) {
        const size_t left = count - from;
        NEXT(p, r);
        CHECK(MPI_Iallreduce(MPI_IN_PLACE, (char *)at + from * types[type].size,
                             (int)(left < CHUNK / 8 ? left : CHUNK / 8), types[type].type, MPI_SUM,
                             comm, r));
    }
    return 0;
}

static int gather(struct pending *p, const void *mine, void *all, size_t bytes)
{
    NEXT(p, r);
    CHECK(MPI_Iallgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, mpi.world, r));
    return 0;
}

static int broadcast(struct pending *p, void *at, size_t bytes, int root)
{
    for (size_t from = 0; from < bytes; from += CHUNK) {
        NEXT(p, r);
        CHECK(MPI_Ibcast((char *)at + from, piece(bytes - from), MPI_BYTE, root, mpi.world, r));
    }
    return 0;
}

extern const struct fabric ditmoe_fabric;
const struct fabric ditmoe_fabric = {
    .version = FABRIC_VERSION,
    .release = DITMOE_VERSION,
    .open = fabric_open,
    .close = fabric_close,
    .abort = fabric_abort,
    .error = fabric_error,
    .pending_new = pending_new,
    .pending_free = pending_free,
    .test = test,
    .send = send,
    .receive = receive,
    .sum = sum,
    .gather = gather,
    .broadcast = broadcast,
};
