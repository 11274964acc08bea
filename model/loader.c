// The loader: threads fill a ring of batches; see data.h.
//
// Work is handed out in chunks of positions, in order, as long as the batch they belong to has a
// slot in the ring. What a sample is depends on its position only, so the number of threads and who
// does what changes nothing. One mutex guards the counters; pixels are written outside it.
#include "model/data.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "runtime/rng.h"

enum { SLOTS = 4, CHUNK = 16, MAX_THREADS = 64 };

struct slot {
    float *images;
    int32_t *labels;
    int64_t *index;
    int done;        // samples finished
    int code;        // of the first sample that failed; 0: none
    uint64_t failed; // its position
    char message[512];
};

struct loader {
    const struct dataset *data;
    int batch, first, count; // of each batch, the samples first.. that are wanted here
    uint64_t seed, start;
    bool flip;
    size_t image_floats;

    pthread_mutex_t lock;
    pthread_cond_t work, ready; // there is room for work; a batch is complete
    uint64_t issued;            // samples handed out to threads, from start
    uint64_t given;             // batches given by loader_next()
    bool holding;               // the caller still reads the last batch given
    bool stop;
    double waited;
    struct slot slots[SLOTS];

    pthread_t threads[MAX_THREADS];
    int thread_count;
};

// ---- threads ------------------------------------------------------------------------------------

// Sample number `offset` from the loader's start.
static int make_sample(struct loader *l, struct slot *slot, uint64_t offset)
{
    uint64_t position = l->start + offset;
    int number = (int)(offset % (uint64_t)l->batch);
    if (number < l->first || number >= l->first + l->count)
        return 0; // another rank's
    size_t at = (size_t)(number - l->first);
    int64_t i = data_order(l->data->count, l->seed, position);
    bool flip = l->flip && (rng_u32(l->seed, rng_stream(RNG_FLIP, position), 0) & 1);
    slot->index[at] = i;
    slot->labels[at] = data_label(l->data, i);
    return data_sample(l->data, i, flip, l->seed, position, slot->images + at * l->image_floats);
}

static void note_failure(struct slot *slot, uint64_t offset, int code)
{
    if (slot->code < 0 && slot->failed <= offset)
        return;
    slot->code = code;
    slot->failed = offset;
    strncpy(slot->message, error_message(), sizeof slot->message - 1);
}

// Called and returns with the lock held; the lock is open while it works.
static void make_chunk(struct loader *l)
{
    uint64_t first = l->issued, batch = (uint64_t)l->batch;
    uint64_t rest = batch - first % batch, count = rest < CHUNK ? rest : CHUNK;
    struct slot *slot = &l->slots[first / batch % SLOTS];
    l->issued += count;
    pthread_mutex_unlock(&l->lock);
    int code = 0;
    uint64_t k = 0;
    for (; k < count && code >= 0; k++)
        code = make_sample(l, slot, first + k);
    pthread_mutex_lock(&l->lock);
    if (code < 0)
        note_failure(slot, first + k - 1, code);
    slot->done += (int)count;
    if (slot->done == l->batch)
        pthread_cond_signal(&l->ready);
}

// A slot may be filled when its last batch is no longer read.
static bool has_room(const struct loader *l)
{
    uint64_t freed = l->given - (l->holding ? 1 : 0);
    return l->issued < (freed + SLOTS) * (uint64_t)l->batch;
}

static void *thread_main(void *argument)
{
    struct loader *l = argument;
    pthread_mutex_lock(&l->lock);
    while (!l->stop) {
        if (has_room(l))
            make_chunk(l);
        else
            pthread_cond_wait(&l->work, &l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

// ---- start, stop --------------------------------------------------------------------------------

static int choose_threads(int wanted)
{
    long n = wanted > 0 ? wanted : sysconf(_SC_NPROCESSORS_ONLN) / 2;
    return (int)(n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n > 8 && wanted <= 0 ? 8 : n);
}

static int make_slots(struct loader *l)
{
    size_t batch = (size_t)l->count + 1;
    for (int i = 0; i < SLOTS; i++) {
        struct slot *s = &l->slots[i];
        s->images = calloc(batch * l->image_floats, sizeof *s->images);
        s->labels = calloc(batch, sizeof *s->labels);
        s->index = calloc(batch, sizeof *s->index);
        if (!s->images || !s->labels || !s->index)
            return fail(ERR_NOMEM, "%s: out of memory for batches of %d images", l->data->path,
                        l->batch);
    }
    return 0;
}

// Signals are the main thread's business: ours are started with all of them blocked.
static int start_threads(struct loader *l, int wanted)
{
    int count = choose_threads(wanted);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; l->thread_count < count; l->thread_count++)
        if (pthread_create(&l->threads[l->thread_count], NULL, thread_main, l))
            break; // fewer do as well
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return l->thread_count ? 0 : fail(ERR_NOMEM, "cannot start a thread to load data");
}

int loader_start(const struct dataset *d, int batch, uint64_t seed, uint64_t cursor, bool flip,
                 int threads, struct loader **out)
{
    return loader_start_part(d, batch, 0, batch, seed, cursor, flip, threads, out);
}

int loader_start_part(const struct dataset *d, int batch, int first, int count, uint64_t seed,
                      uint64_t cursor, bool flip, int threads, struct loader **out)
{
    *out = NULL;
    if (batch < 1)
        return fail(ERR_INPUT, "batch %d: must be at least 1", batch);
    struct loader *l = calloc(1, sizeof *l);
    if (!l)
        return fail(ERR_NOMEM, "%s: out of memory", d->path);
    l->data = d;
    l->batch = batch;
    l->first = first;
    l->count = count;
    l->seed = seed;
    l->start = cursor;
    l->flip = flip;
    l->image_floats = (size_t)d->channels * (size_t)d->size * (size_t)d->size;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->work, NULL);
    pthread_cond_init(&l->ready, NULL);
    int code = make_slots(l);
    if (code == 0)
        code = start_threads(l, threads);
    if (code < 0) {
        loader_stop(l);
        return code;
    }
    *out = l;
    return 0;
}

void loader_stop(struct loader *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_broadcast(&l->work);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->thread_count; i++)
        pthread_join(l->threads[i], NULL);
    for (int i = 0; i < SLOTS; i++) {
        free(l->slots[i].images);
        free(l->slots[i].labels);
        free(l->slots[i].index);
    }
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->work);
    pthread_cond_destroy(&l->ready);
    free(l);
}

// ---- batches ------------------------------------------------------------------------------------

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void release_held(struct loader *l)
{
    if (!l->holding)
        return;
    struct slot *held = &l->slots[(l->given - 1) % SLOTS];
    held->done = 0;
    held->code = 0;
    l->holding = false;
    pthread_cond_broadcast(&l->work);
}

int loader_next(struct loader *l, struct batch *out)
{
    pthread_mutex_lock(&l->lock);
    release_held(l);
    struct slot *slot = &l->slots[l->given % SLOTS];
    if (slot->done < l->batch) {
        double from = now();
        while (slot->done < l->batch)
            pthread_cond_wait(&l->ready, &l->lock);
        l->waited += now() - from;
    }
    int code = slot->code < 0 ? fail(slot->code, "%s", slot->message) : 0;
    if (code == 0) {
        *out = (struct batch){slot->images, slot->labels, slot->index,
                              l->start + l->given * (uint64_t)l->batch};
        l->given++;
        l->holding = true;
    }
    pthread_mutex_unlock(&l->lock);
    return code;
}

uint64_t loader_cursor(const struct loader *l)
{
    return l->start + l->given * (uint64_t)l->batch;
}

double loader_waited(const struct loader *l)
{
    return l->waited;
}
