#include "runtime/exchange.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "runtime/fabric.h"

// A rank as the others of its machine see it, in memory that they share.
struct notice {
    int32_t pid, rank;
    int32_t told;    // of the first entry: someone has told what went wrong
    int32_t leaving; // this rank ends in good order
    int64_t step;    // -1: none
    int32_t layer;   // -1: none
    char what[64];
    char unused[96]; // entries lie 192 bytes apart
};

struct exchange {
    const struct fabric *fabric;
    void *module;
    int rank, ranks, node_rank, node_ranks;
    struct notice *board;   // [node_ranks]
    struct transfers *once; // of the calls that wait
    double patience;        // seconds that a wait may take
    struct exchange_figures figures;
    struct watch *watch; // or NULL
    void (*late)(void);  // or NULL
    char library[FABRIC_LIBRARY];
};

struct transfers {
    struct exchange *x;
    struct pending *pending;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- start --------------------------------------------------------------------------------------

static int number_in(const char *name)
{
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

int exchange_launched(void)
{
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS",
                                        "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (number_in(sizes[i]) > 0)
            return number_in(sizes[i]);
    return getenv("PMIX_RANK") ? 2 : 1; // how many is not said
}

// Tries one place of the module. Returns the handle or NULL; *seen: a file is there.
static void *open_at(const char *path, bool *seen)
{
    if (access(path, R_OK) != 0)
        return NULL;
    *seen = true;
    return dlopen(path, RTLD_NOW | RTLD_GLOBAL); // global: MPI's own plugins look for its symbols
}

// $DITMOE_MPI, beside the program, in the library directory that belongs to it.
static int find_module(struct exchange *x)
{
    char self[PATH_MAX], path[PATH_MAX + 64];
    const char *asked = getenv("DITMOE_MPI");
    bool seen = false;
    if (asked && *asked) {
        x->module = open_at(asked, &seen);
    } else {
        ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
        self[n > 0 ? n : 0] = 0;
        char *slash = strrchr(self, '/');
        if (slash)
            *slash = 0;
        snprintf(path, sizeof path, "%s/ditmoe_mpi.so", self);
        x->module = open_at(path, &seen);
        snprintf(path, sizeof path, "%s/%s/ditmoe_mpi.so", self, DITMOE_MODULES);
        if (!x->module)
            x->module = open_at(path, &seen);
    }
    if (x->module)
        return 0;
    if (seen)
        return fail(ERR_NODEVICE, "the MPI module cannot be opened: %s", dlerror());
    return fail(ERR_NODEVICE,
                "started as one of %d ranks, but %s%s: install an MPI (Debian: libopenmpi-dev) and "
                "build again",
                exchange_launched(),
                asked ? "there is no MPI module " : "this build has no MPI module",
                asked ? asked : " (ditmoe_mpi.so)");
}

static int open_fabric(struct exchange *x)
{
    void *board = NULL;
    TRY(find_module(x));
    x->fabric = dlsym(x->module, FABRIC_SYMBOL);
    if (!x->fabric || x->fabric->version != FABRIC_VERSION ||
        strcmp(x->fabric->release, DITMOE_VERSION))
        return fail(ERR_NODEVICE, "the MPI module ditmoe_mpi.so is of another version of ditmoe");
    if (x->fabric->open(&x->rank, &x->ranks, &x->node_rank, &x->node_ranks, sizeof *x->board,
                        &board, x->library) < 0)
        return fail(ERR_NODEVICE, "MPI did not start: %s", x->fabric->error());
    x->board = board;
    struct notice *mine = &x->board[x->node_rank];
    mine->rank = x->rank;
    mine->step = mine->layer = -1;
    __atomic_store_n(&mine->pid, (int32_t)getpid(), __ATOMIC_RELEASE);
    return 0;
}

int exchange_open(struct exchange **out)
{
    *out = NULL;
    const int launched = exchange_launched();
    if (launched <= 1)
        return 0;
    struct exchange *x = calloc(1, sizeof *x);
    if (!x)
        return fail(ERR_NOMEM, "no host memory for an exchange");
    const int patience = number_in("DITMOE_PATIENCE");
    x->patience = patience > 0 ? patience : 1800;
    int code = open_fabric(x);
    if (code >= 0 && x->ranks == 1 && number_in("SLURM_STEP_NUM_TASKS") > 1)
        code = fail(ERR_NODEVICE,
                    "srun started %d tasks, but MPI sees one: use 'srun --mpi=pmix', or mpirun",
                    launched);
    if (code >= 0)
        code = transfers_new(x, &x->once);
    if (code < 0) {
        free(x);
        return code;
    }
    *out = x;
    if (x->ranks == 1) { // nobody to meet
        exchange_close(x);
        *out = NULL;
    }
    return 0;
}

void exchange_close(struct exchange *x)
{
    if (!x)
        return;
    transfers_free(x->once);
    x->board[x->node_rank].leaving = 1;
    x->fabric->close();
    free(x); // the module stays: MPI leaves threads behind
}

void exchange_abort(struct exchange *x, int status)
{
    if (x)
        x->fabric->abort(status);
}

int exchange_rank(const struct exchange *x)
{
    return x ? x->rank : 0;
}

int exchange_ranks(const struct exchange *x)
{
    return x ? x->ranks : 1;
}

int exchange_node_rank(const struct exchange *x)
{
    return x ? x->node_rank : 0;
}

int exchange_node_ranks(const struct exchange *x)
{
    return x ? x->node_ranks : 1;
}

int exchange_machine(const struct exchange *x)
{
    return x ? x->board[0].rank : 0;
}

const char *exchange_library(const struct exchange *x)
{
    return x ? x->library : "";
}

// ---- the board ----------------------------------------------------------------------------------

void exchange_doing(struct exchange *x, const char *what, int layer)
{
    if (!x)
        return;
    struct notice *mine = &x->board[x->node_rank];
    mine->layer = layer;
    strncpy(mine->what, what, sizeof mine->what - 1);
}

void exchange_step(struct exchange *x, int64_t step)
{
    if (x)
        x->board[x->node_rank].step = step;
}

bool exchange_first_to_tell(struct exchange *x)
{
    return !x || !__atomic_exchange_n(&x->board[0].told, 1, __ATOMIC_ACQ_REL);
}

// "step 12, layer 3: sent rows to experts" of a rank that cannot say so itself any more.
static void describe(const struct notice *n, char *out, size_t size)
{
    char step[40] = "", layer[24] = "";
    if (n->step >= 0)
        snprintf(step, sizeof step, " in step %lld", (long long)n->step + 1);
    if (n->layer >= 0)
        snprintf(layer, sizeof layer, ", layer %d", n->layer);
    snprintf(out, size, "%.63s%s%s", n->what[0] ? n->what : "starting", step, layer);
}

// Is rank number i of this machine's no more?
static bool is_gone(const struct exchange *x, int i)
{
    const int32_t pid = __atomic_load_n(&x->board[i].pid, __ATOMIC_ACQUIRE);
    return i != x->node_rank && pid > 0 && kill(pid, 0) != 0 && errno == ESRCH;
}

// Have all ranks of this machine been alive a moment ago?
static int look_around(const struct exchange *x)
{
    char was[160];
    for (int i = 0; i < x->node_ranks; i++) {
        const struct notice *n = &x->board[i];
        if (!is_gone(x, i))
            continue;
        describe(n, was, sizeof was);
        return fail(ERR_LOST, "rank %d (process %d) %s; it was: %s; start the run again", n->rank,
                    (int)n->pid, n->leaving ? "has left" : "has died", was);
    }
    return 0;
}

// ---- the watch ----------------------------------------------------------------------------------

struct watch {
    const struct exchange *x;
    void (*lost)(void *user);
    void *user;
    pthread_t thread;
    int32_t over, lost_one;
};

static bool is_over(const struct watch *w)
{
    return __atomic_load_n(&w->over, __ATOMIC_ACQUIRE);
}

static void wait_a_little(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
}

static void *watch(void *user)
{
    struct watch *w = user;
    bool lost = false;
    while (!lost && !is_over(w)) {
        wait_a_little();
        for (int i = 0; i < w->x->node_ranks; i++)
            lost = lost || (w->x->board[i].leaving ? false : is_gone(w->x, i));
    }
    if (lost) {
        __atomic_store_n(&w->lost_one, 1, __ATOMIC_RELEASE);
        w->lost(w->user);
        for (int i = 0; i < 6 && !is_over(w); i++)
            wait_a_little();
        if (!is_over(w) && w->x->late && look_around(w->x) < 0)
            w->x->late();
    }
    return NULL;
}

void exchange_when_late(struct exchange *x, void (*late)(void))
{
    if (x)
        x->late = late;
}

int exchange_watch(struct exchange *x, void (*lost)(void *user), void *user)
{
    struct watch *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "no host memory for a thread");
    *w = (struct watch){.x = x, .lost = lost, .user = user};
    if (pthread_create(&w->thread, NULL, watch, w) != 0) {
        free(w);
        return fail(ERR_NOMEM, "no thread to be had that watches the other ranks");
    }
    x->watch = w;
    return 0;
}

int exchange_watched(struct exchange *x)
{
    const bool lost = x && x->watch && __atomic_load_n(&x->watch->lost_one, __ATOMIC_ACQUIRE);
    return lost ? look_around(x) : 0;
}

void exchange_unwatch(struct exchange *x)
{
    if (!x || !x->watch)
        return;
    __atomic_store_n(&x->watch->over, 1, __ATOMIC_RELEASE);
    pthread_join(x->watch->thread, NULL);
    free(x->watch);
    x->watch = NULL;
}

// ---- waiting ------------------------------------------------------------------------------------

static int fabric_failed(const struct exchange *x)
{
    char was[160];
    describe(&x->board[x->node_rank], was, sizeof was);
    return fail(ERR_LOST, "rank %d, %s: %s", x->rank, was, x->fabric->error());
}

static int give_up(const struct exchange *x)
{
    char was[160];
    describe(&x->board[x->node_rank], was, sizeof was);
    return fail(ERR_LOST,
                "rank %d has waited %.0f s for another rank; it was: %s (DITMOE_PATIENCE=SECONDS "
                "makes it wait longer)",
                x->rank, x->patience, was);
}

// Waits are short when all goes well, so first by asking again and again, then, as cores may be
// shared by ranks, with pauses.
static void pause_a_little(int tries)
{
    if (tries < 200)
        return;
    if (tries < 1000)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = tries < 20000 ? 20000 : 200000}, NULL);
}

int exchange_wait(struct transfers *t)
{
    if (!t)
        return 0;
    struct exchange *x = t->x;
    const double start = now();
    double looked = start;
    bool done = false;
    int code = 0;
    for (int tries = 0; !done && code >= 0; tries += tries < INT_MAX) {
        if (x->fabric->test(t->pending, &done) < 0)
            return fabric_failed(x);
        if (done)
            break;
        pause_a_little(tries);
        const double at = now();
        if (at - looked > 0.1) {
            looked = at;
            code = look_around(x);
        }
        if (code >= 0 && at - start > x->patience)
            code = give_up(x);
    }
    x->figures.waited += now() - start;
    return code;
}

// ---- transfers ----------------------------------------------------------------------------------

int transfers_new(struct exchange *x, struct transfers **out)
{
    *out = NULL;
    if (!x)
        return 0;
    struct transfers *t = calloc(1, sizeof *t);
    if (!t || x->fabric->pending_new(&t->pending) < 0) {
        free(t);
        return fail(ERR_NOMEM, "no host memory for transfers");
    }
    t->x = x;
    *out = t;
    return 0;
}

void transfers_free(struct transfers *t)
{
    if (t)
        t->x->fabric->pending_free(t->pending);
    free(t);
}

int exchange_send(struct transfers *t, const void *at, size_t bytes, int peer, int tag)
{
    t->x->figures.sent += bytes;
    return t->x->fabric->send(t->pending, at, bytes, peer, tag) < 0 ? fabric_failed(t->x) : 0;
}

int exchange_receive(struct transfers *t, void *at, size_t bytes, int peer, int tag)
{
    t->x->figures.received += bytes;
    return t->x->fabric->receive(t->pending, at, bytes, peer, tag) < 0 ? fabric_failed(t->x) : 0;
}

int exchange_sum_floats(struct transfers *t, float *at, size_t count, const int *members,
                        int member_count)
{
    if (!t)
        return 0;
    t->x->figures.summed += count * sizeof *at;
    const struct fabric *f = t->x->fabric;
    return f->sum(t->pending, at, count, FABRIC_FLOAT, members, member_count) < 0
               ? fabric_failed(t->x)
               : 0;
}

// ---- at once ------------------------------------------------------------------------------------

int exchange_sum(struct exchange *x, double *at, size_t count)
{
    if (!x)
        return 0;
    if (x->fabric->sum(x->once->pending, at, count, FABRIC_DOUBLE, NULL, 0) < 0)
        return fabric_failed(x);
    return exchange_wait(x->once);
}

int exchange_gather(struct exchange *x, const void *mine, void *all, size_t bytes)
{
    if (!x) {
        memcpy(all, mine, bytes);
        return 0;
    }
    if (x->fabric->gather(x->once->pending, mine, all, bytes) < 0)
        return fabric_failed(x);
    return exchange_wait(x->once);
}

int exchange_broadcast(struct exchange *x, void *at, size_t bytes, int root)
{
    if (!x)
        return 0;
    if (x->fabric->broadcast(x->once->pending, at, bytes, root) < 0)
        return fabric_failed(x);
    return exchange_wait(x->once);
}

int exchange_barrier(struct exchange *x)
{
    double nothing = 0;
    return exchange_sum(x, &nothing, 1);
}

int exchange_any(struct exchange *x, bool mine, bool *any)
{
    double sum = mine;
    TRY(exchange_sum(x, &sum, 1));
    *any = sum > 0;
    return 0;
}

int exchange_same(struct exchange *x, uint64_t value, const char *what)
{
    if (!x)
        return 0;
    uint64_t *all = calloc((size_t)x->ranks, sizeof *all);
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", x->ranks);
    int code = exchange_gather(x, &value, all, sizeof value);
    for (int r = 1; r < x->ranks && code >= 0; r++)
        if (all[r] != all[0])
            code = fail(ERR_INPUT, "rank %d %s than rank 0", r, what);
    free(all);
    return code;
}

struct exchange_figures exchange_figures(const struct exchange *x)
{
    return x ? x->figures : (struct exchange_figures){0};
}
