#include "runtime/window.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MEETING_TAG = 32767 };

struct view {
    unsigned char *at; // or NULL
    size_t bytes;
    bool pinned;
    char said, heard; // what meetings pass
};

struct window {
    struct device *dev;
    struct stream *stream, *copies;
    struct event *after;
    int rank, ranks;
    bool all;
    struct view *views; // [ranks]
    const bool *apart;  // [ranks] or NULL
};

// How another process finds a rank's memory.
struct offer {
    int32_t machine, pid, file, good;
    uint64_t bytes, device, inode; // of the file, to know it again
};

// ---- memory -------------------------------------------------------------------------------------

static unsigned char *map(int file, size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, file, 0);
    return at == MAP_FAILED ? NULL : at;
}

// This rank's memory: a file without a name, or, where that cannot be had, memory that nobody else
// sees.
static int make_memory(struct window *w, size_t bytes, struct offer *mine)
{
    struct view *v = &w->views[w->rank];
    struct stat is;
    const char *share = getenv("DITMOE_SHARE");
    int file = share && !strcmp(share, "0") ? -1 : memfd_create("ditmoe", MFD_CLOEXEC);
    if (file >= 0 && (ftruncate(file, (off_t)bytes) != 0 || fstat(file, &is) != 0)) {
        close(file);
        file = -1;
    }
    v->at = map(file, bytes);
    v->bytes = bytes;
    mine->file = file;
    mine->bytes = bytes;
    mine->pid = (int32_t)getpid();
    mine->good = file >= 0;
    if (file >= 0)
        mine->device = is.st_dev, mine->inode = is.st_ino;
    return v->at ? 0 : fail(ERR_NOMEM, "no host memory for %zu bytes between ranks", bytes);
}

static bool see(struct view *v, const struct offer *o)
{
    char path[64];
    struct stat is;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)o->pid, (int)o->file);
    const int file = o->good ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0)
        return false;
    if (fstat(file, &is) == 0 && is.st_dev == o->device && is.st_ino == o->inode &&
        (uint64_t)is.st_size == o->bytes)
        v->at = map(file, (size_t)o->bytes);
    v->bytes = (size_t)o->bytes;
    close(file);
    return v->at != NULL;
}

// All ranks of a machine see each other, or, where one does not, none of the run does.
static int share(struct window *w, struct exchange *x, const struct offer *offers)
{
    bool good = offers[w->rank].good, apart = false, failed;
    for (int r = 0; r < w->ranks; r++) {
        if (offers[r].machine != offers[w->rank].machine)
            apart = true;
        else if (r != w->rank && good)
            good = see(&w->views[r], &offers[r]);
    }
    TRY(exchange_any(x, !good, &failed));
    w->all = !failed && !apart;
    for (int r = 0; r < w->ranks && failed; r++)
        if (r != w->rank && w->views[r].at) {
            munmap(w->views[r].at, w->views[r].bytes);
            w->views[r].at = NULL;
        }
    return 0;
}

static int make(struct window *w, struct exchange *x, size_t bytes)
{
    const struct backend *api = w->dev->api;
    struct offer mine = {.file = -1}, *offers = calloc((size_t)w->ranks, sizeof *offers);
    w->views = calloc((size_t)w->ranks, sizeof *w->views);
    int code = w->views && offers ? make_memory(w, bytes, &mine)
                                  : fail(ERR_NOMEM, "no host memory for %d ranks", w->ranks);
    mine.machine = exchange_machine(x);
    if (code >= 0)
        code = exchange_gather(x, &mine, offers, sizeof mine);
    if (code >= 0)
        code = share(w, x, offers);
    free(offers);
    if (mine.file >= 0)
        close(mine.file);
    TRY(code);
    for (int r = 0; r < w->ranks && api->pin; r++)
        if (w->views[r].at) // what cannot be locked is slower, not wrong
            w->views[r].pinned = api->pin(w->dev, w->views[r].at, w->views[r].bytes) == 0;
    TRY(api->stream_new(w->dev, &w->copies));
    return api->event_new(w->dev, &w->after);
}

int window_open(struct exchange *x, struct device *dev, struct stream *stream, size_t bytes,
                struct window **out)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    *out = NULL;
    if (!x) // ranks on paper (model/cost.h): nobody to see it
        return 0;
    struct window *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "no host memory for a window");
    *w = (struct window){.dev = dev, .stream = stream};
    w->rank = exchange_rank(x);
    w->ranks = exchange_ranks(x);
    const int code = make(w, x, (bytes / page + 1) * page);
    if (code < 0)
        window_close(w);
    else
        *out = w;
    return code;
}

void window_close(struct window *w)
{
    if (!w)
        return;
    const struct backend *api = w->dev->api;
    if (w->copies)
        api->stream_free(w->copies);
    if (w->after)
        api->event_free(w->after);
    for (int r = 0; w->views && r < w->ranks; r++) {
        if (w->views[r].pinned)
            api->unpin(w->dev, w->views[r].at);
        if (w->views[r].at)
            munmap(w->views[r].at, w->views[r].bytes);
    }
    free(w->views);
    free(w);
}

unsigned char *window_of(const struct window *w, int rank)
{
    return w->views[rank].at;
}

bool window_all(const struct window *w)
{
    return w && w->all;
}

// ---- copies -------------------------------------------------------------------------------------

int window_after(struct window *w)
{
    TRY(w->dev->api->record(w->stream, w->after));
    return w->dev->api->wait(w->copies, w->after);
}

int window_take(struct window *w, const struct mem *src, size_t offset, size_t at, size_t bytes)
{
    BUG_IF(at + bytes > w->views[w->rank].bytes);
    return w->dev->api->read_begin(w->copies, src, offset, w->views[w->rank].at + at, bytes);
}

int window_done(struct window *w)
{
    return w->dev->api->sync(w->copies);
}

int window_give(struct window *w, int rank, size_t at, struct mem *dst, size_t offset, size_t bytes)
{
    BUG_IF(!w->views[rank].at || at + bytes > w->views[rank].bytes);
    return w->dev->api->write_begin(w->stream, dst, offset, w->views[rank].at + at, bytes);
}

void window_apart(struct window *w, const bool *apart)
{
    w->apart = apart;
}

int window_meet(struct window *w, struct transfers *t)
{
    for (int r = 0; r < w->ranks; r++) {
        const bool apart = w->apart && (w->apart[r] || w->apart[w->rank]);
        if (r == w->rank || !w->views[r].at || apart)
            continue;
        TRY(exchange_receive(t, &w->views[r].heard, 1, r, MEETING_TAG));
        TRY(exchange_send(t, &w->views[r].said, 1, r, MEETING_TAG));
    }
    return 0;
}
