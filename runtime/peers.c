#include "runtime/peers.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// As in kernels.cl: words of flags and the one that ends all waiting; words of what journeys count.
enum { WORDS_STOP = PEER_LANES * PEERS_MOST, WORDS = WORDS_STOP + 1 };
enum { OWN = PEER_LANES * (1 + PEERS_MOST) };

struct peers {
    struct exchange *exchange;
    struct device *dev;
    int rank, ranks;
    struct stream *stop; // for the thread that ends waiting
    pthread_mutex_t lock;
    struct peer_windows *first; // all there are
};

struct window {
    enum plan_class class;
    const struct tensor *tensor;
};

// Where a rank has a window, in the memory of its class.
struct place {
    uint64_t class, offset, bytes;
};

struct peer_windows {
    struct peers *peers;
    struct plan *plan;
    struct tensor words, own;
    struct stream *beside; // on which rows travel
    struct event *start, *done;
    struct window *windows;
    int count, capacity;
    struct mem **at;                    // [ranks][count], made by peer_windows_meet()
    struct mem *(*slabs)[PLAN_CLASSES]; // [ranks]: other ranks'
    struct peer_windows *next;
};

// ---- start and end ------------------------------------------------------------------------------

// What a rank tells of itself in the trial.
struct offer {
    int32_t can, machine;
    unsigned char id[SHARE_ID];
    char why[160];
};

static int refuse(struct offer *o)
{
    o->can = 0;
    snprintf(o->why, sizeof o->why, "%.150s", error_message());
    return 0;
}

static int make_offer(struct exchange *x, struct device *dev, struct offer *o, struct mem **mem)
{
    *o = (struct offer){.can = 1, .machine = exchange_machine(x)};
    *mem = NULL;
    if (!dev->api->alloc_shared || !dev->api->reach) {
        fail(ERR_NODEVICE, "%s shares no memory between processes", dev->info.key);
        return refuse(o);
    }
    return dev->api->alloc_shared(dev, 4096, mem, o->id) < 0 ? refuse(o) : 0;
}

static bool reaches(struct device *dev, const struct offer *o)
{
    struct mem *there;
    if (dev->api->reach(dev, o->id, &there) < 0)
        return false;
    dev->api->free(there);
    return true;
}

// Reaches the memory of all others; the first that it does not takes mine->can away.
static void try_all(struct device *dev, const struct offer *all, int rank, int ranks,
                    struct offer *mine)
{
    for (int r = 0; r < ranks && mine->can; r++) {
        if (all[r].machine != mine->machine) {
            fail(ERR_NODEVICE, "it is not on the machine of rank %d", r);
            refuse(mine);
        } else if (r != rank && !reaches(dev, &all[r])) {
            refuse(mine);
        }
    }
}

// Gathers all offers before and after the trial. *good: all can.
static int trial(struct exchange *x, struct device *dev, bool *good, char *why, size_t size)
{
    const int ranks = exchange_ranks(x), rank = exchange_rank(x);
    struct offer mine, *all = calloc((size_t)ranks, sizeof *all);
    struct mem *mem;
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", ranks);
    int code = make_offer(x, dev, &mine, &mem);
    *good = ranks <= PEERS_MOST;
    if (!*good)
        snprintf(why, size, "%d ranks are more than %d", ranks, PEERS_MOST);
    for (int again = 0; again < 2 && code >= 0 && *good; again++) {
        code = exchange_gather(x, &mine, all, sizeof mine);
        for (int r = 0; r < ranks && *good && code >= 0; r++)
            if (!all[r].can) {
                *good = false;
                snprintf(why, size, "not rank %d: %s", r, all[r].why);
            }
        if (again == 0 && *good && code >= 0)
            try_all(dev, all, rank, ranks, &mine);
    }
    if (mem)
        dev->api->free(mem);
    free(all);
    return code;
}

// A rank has died: the devices' waits end. In a thread of its own.
static void stop_waiting(void *user)
{
    static const uint32_t stop = 1;
    struct peers *p = user;
    pthread_mutex_lock(&p->lock);
    for (struct peer_windows *w = p->first; w; w = w->next)
        if (w->words.mem)
            p->dev->api->write(p->stop, w->words.mem, WORDS_STOP * sizeof stop, &stop, sizeof stop);
    pthread_mutex_unlock(&p->lock);
}

int peers_open(struct exchange *x, struct device *dev, struct peers **out, char *why, size_t size)
{
    bool good = false;
    *out = NULL;
    if (!x)
        return 0;
    TRY(trial(x, dev, &good, why, size));
    if (!good)
        return 0;
    struct peers *p = calloc(1, sizeof *p);
    if (!p)
        return fail(ERR_NOMEM, "no host memory for peers");
    *p = (struct peers){.exchange = x, .dev = dev};
    p->rank = exchange_rank(x);
    p->ranks = exchange_ranks(x);
    pthread_mutex_init(&p->lock, NULL);
    int code = dev->api->stream_new(dev, &p->stop);
    if (code >= 0)
        code = exchange_watch(x, stop_waiting, p);
    if (code < 0) {
        peers_close(p);
        return code;
    }
    *out = p;
    return 0;
}

void peers_close(struct peers *p)
{
    if (!p)
        return;
    exchange_unwatch(p->exchange);
    if (p->stop)
        p->dev->api->stream_free(p->stop);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

int peers_count(const struct peers *p)
{
    return p ? p->ranks : 0;
}

// ---- the windows of a plan ----------------------------------------------------------------------

int peer_windows_new(struct peers *p, struct plan *plan, struct peer_windows **out)
{
    *out = NULL;
    if (!p)
        return 0;
    struct peer_windows *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "no host memory for windows");
    *w = (struct peer_windows){.peers = p, .plan = plan};
    pthread_mutex_lock(&p->lock);
    w->next = p->first;
    p->first = w;
    pthread_mutex_unlock(&p->lock);
    *out = w;
    plan_share(plan, PLAN_WINDOWS);
    TRY(peer_stream(p->dev, &w->beside));
    TRY(p->dev->api->event_new(p->dev, &w->start));
    TRY(p->dev->api->event_new(p->dev, &w->done));
    TRY(PLAN_TENSOR(plan, "flags", PLAN_WINDOWS, I32, 0, PLAN_FOREVER, &w->words, WORDS));
    TRY(PLAN_TENSOR(plan, "journeys", PLAN_WINDOWS, I32, 0, PLAN_FOREVER, &w->own, OWN));
    return peer_windows_add(w, PLAN_WINDOWS, &w->words) < 0 ? ERR_NOMEM : 0;
}

static void leave_list(struct peer_windows *w)
{
    struct peers *p = w->peers;
    pthread_mutex_lock(&p->lock);
    struct peer_windows **at = &p->first;
    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    pthread_mutex_unlock(&p->lock);
}

void peer_windows_free(struct peer_windows *w)
{
    if (!w)
        return;
    const struct peers *p = w->peers;
    leave_list(w);
    if (w->beside)
        p->dev->api->stream_free(w->beside);
    if (w->start)
        p->dev->api->event_free(w->start);
    if (w->done)
        p->dev->api->event_free(w->done);
    for (int i = 0; w->at && i < p->ranks * w->count; i++)
        if (i / w->count != p->rank)
            p->dev->api->free(w->at[i]);
    for (int r = 0; w->slabs && r < p->ranks; r++)
        for (int k = 0; k < PLAN_CLASSES; k++)
            p->dev->api->free(w->slabs[r][k]);
    free(w->windows), free(w->at), free(w->slabs);
    free(w);
}

int peer_windows_add(struct peer_windows *w, enum plan_class class, const struct tensor *t)
{
    BUG_IF(w->at);
    if (w->count == w->capacity) {
        const int wanted = w->capacity ? 2 * w->capacity : 64;
        struct window *more = realloc(w->windows, (size_t)wanted * sizeof *more);
        if (!more)
            return fail(ERR_NOMEM, "no host memory for %d windows", wanted);
        w->windows = more;
        w->capacity = wanted;
    }
    w->windows[w->count] = (struct window){class, t};
    return w->count++;
}

// Reaches the memory of the classes that windows lie in.
static int reach_slabs(struct peer_windows *w)
{
    const struct peers *p = w->peers;
    bool wanted[PLAN_CLASSES] = {false};
    unsigned char id[SHARE_ID], *all = calloc((size_t)p->ranks, SHARE_ID);
    int code = all ? 0 : fail(ERR_NOMEM, "no host memory for %d ranks", p->ranks);
    for (int i = 0; i < w->count; i++)
        wanted[w->windows[i].class] = true;
    for (int k = 0; k < PLAN_CLASSES && code >= 0; k++) {
        if (!wanted[k])
            continue;
        code = plan_share_id(w->plan, (enum plan_class)k, id);
        if (code >= 0)
            code = exchange_gather(p->exchange, id, all, SHARE_ID);
        for (int r = 0; r < p->ranks && code >= 0; r++)
            if (r != p->rank)
                code = p->dev->api->reach(p->dev, all + (size_t)r * SHARE_ID, &w->slabs[r][k]);
    }
    free(all);
    return code;
}

static int make_views(struct peer_windows *w, const struct place *all)
{
    const struct peers *p = w->peers;
    for (int r = 0; r < p->ranks; r++)
        for (int i = 0; i < w->count; i++) {
            const struct place *at = &all[r * w->count + i];
            struct mem **out = &w->at[r * w->count + i];
            if (r == p->rank)
                *out = w->windows[i].tensor->mem;
            else
                TRY(p->dev->api->view(w->slabs[r][at->class], at->offset, at->bytes, out));
        }
    return 0;
}

static int find_places(struct peer_windows *w, struct place *mine)
{
    for (int i = 0; i < w->count; i++) {
        int64_t start, end;
        const size_t bytes = tensor_bytes(w->windows[i].tensor);
        if (plan_place(w->plan, w->windows[i].tensor, &start, &end) != 0)
            return fail(ERR_NODEVICE, "windows of other ranks lie in more than one allocation");
        mine[i] = (struct place){w->windows[i].class, (uint64_t)start * sizeof(float),
                                 bytes ? bytes : sizeof(float)};
    }
    return 0;
}

int peer_windows_meet(struct peer_windows *w)
{
    if (!w || w->at)
        return 0;
    const struct peers *p = w->peers;
    const size_t count = (size_t)w->count, ranks = (size_t)p->ranks;
    struct place *mine = calloc(count, sizeof *mine), *all = calloc(count * ranks, sizeof *all);
    w->at = calloc(count * ranks, sizeof *w->at);
    w->slabs = calloc(ranks, sizeof *w->slabs);
    int code = mine && all && w->at && w->slabs ? find_places(w, mine)
                                                : fail(ERR_NOMEM, "no host memory for windows");
    if (code >= 0)
        code = exchange_gather(p->exchange, mine, all, count * sizeof *mine);
    if (code >= 0)
        code = reach_slabs(w);
    if (code >= 0)
        code = make_views(w, all);
    if (code >= 0) // nobody writes before all are here
        code = exchange_barrier(p->exchange);
    free(mine), free(all);
    return code;
}

struct mem *peer_windows_at(const struct peer_windows *w, int number, int rank)
{
    BUG_IF(!w->at || number < 0 || number >= w->count);
    return w->at[rank * w->count + number];
}

int peer_windows_rank(const struct peer_windows *w)
{
    return w->peers->rank;
}

int peer_windows_ranks(const struct peer_windows *w)
{
    return w->peers->ranks;
}

struct mem *peer_windows_words(const struct peer_windows *w, int rank)
{
    return peer_windows_at(w, 0, rank);
}

struct tensor *peer_windows_own(struct peer_windows *w)
{
    return &w->own;
}

int peer_stream(struct device *dev, struct stream **out)
{
    const struct backend *api = dev->api;
    *out = NULL;
    if (dev->info.kind == DEVICE_CPU)
        return 0;
    return api->stream_urgent ? api->stream_urgent(dev, out) : api->stream_new(dev, out);
}

int peer_beside(const struct context *c, struct peer_windows *w, struct context *beside)
{
    *beside = *c;
    if (!w->beside)
        return 0;
    beside->stream = w->beside;
    beside->profile = NULL;
    TRY(c->dev->api->record(c->stream, w->start));
    return c->dev->api->wait(w->beside, w->start);
}

int peer_beside_end(struct peer_windows *w)
{
    return w->beside ? w->peers->dev->api->record(w->beside, w->done) : 0;
}

int peer_join(const struct context *c, struct peer_windows *w)
{
    return w->beside ? c->dev->api->wait(c->stream, w->done) : 0;
}
