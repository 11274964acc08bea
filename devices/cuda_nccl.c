// The CUDA backend: groups of devices that pass memory between them by NCCL, which is opened at run
// time.
#include "devices/cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct group {
    struct cuda_device *dev;
    nccl_comm comm;
    int member, members;
};

// ---- the library --------------------------------------------------------------------------------

static struct nccl_api nccl;
static char wrong[256] = "";
static bool good;

// DITMOE_NCCL: 0, no library; else the file to open instead of libnccl.so.2.
static void open_nccl(void)
{
    const char *asked = getenv("DITMOE_NCCL"), *missing = NULL;
    int version = 0;
    if (asked && !strcmp(asked, "0")) {
        snprintf(wrong, sizeof wrong, "NCCL is switched off by DITMOE_NCCL=0");
        return;
    }
    void *library = dlopen(asked && *asked ? asked : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(wrong, sizeof wrong, "no NCCL here (%.160s; DITMOE_NCCL=FILE names it)",
                 dlerror());
        return;
    }
#define FIND(field, function, parameters)       \
    if (!cuda_symbol(library, #function, &nccl.field)) \
        missing = #function;
    NCCL_FUNCTIONS(FIND)
#undef FIND
    if (!cuda_symbol(library, "ncclGetErrorString", &nccl.error_text))
        missing = "ncclGetErrorString";
    if (missing)
        snprintf(wrong, sizeof wrong, "NCCL is too old: it has no %s", missing);
    else if (nccl.version(&version) != 0 || version < NCCL_OLDEST)
        snprintf(wrong, sizeof wrong, "NCCL is too old: 2.7 or later is wanted");
    good = !wrong[0];
}

int cuda_group_can(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_nccl);
    return good ? 0 : fail(ERR_NODEVICE, "%s", wrong);
}

static int nccl_fail(const struct group *g, unsigned code, const char *what, int peer)
{
    char with[32] = "";
    if (peer >= 0)
        snprintf(with, sizeof with, " with member %d", peer);
    return fail(ERR_LOST, "member %d of %d NCCL devices: %s%s failed: %s", g->member, g->members,
                what, with, nccl.error_text(code));
}

#define NCCL(g, call, what, peer)                       \
    do {                                                \
        unsigned nccl_code = (call);                    \
        if (nccl_code != 0)                             \
            return nccl_fail(g, nccl_code, what, peer); \
    } while (0)

// ---- groups -------------------------------------------------------------------------------------

int cuda_group_id(struct device *dev, unsigned char id[GROUP_ID])
{
    nccl_id made;
    _Static_assert(sizeof made == GROUP_ID, "an id of NCCL");
    TRY(cuda_group_can());
    TRY(enter(cuda_device_of(dev)));
    const unsigned code = nccl.unique_id(&made);
    if (code != 0)
        return fail(ERR_LOST, "ncclGetUniqueId failed: %s", nccl.error_text(code));
    memcpy(id, &made, sizeof made);
    return 0;
}

int cuda_group_open(struct device *dev, const unsigned char id[GROUP_ID], int member, int members,
                    struct group **out)
{
    nccl_id given;
    *out = NULL;
    TRY(cuda_group_can());
    TRY(enter(cuda_device_of(dev)));
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return fail(ERR_NOMEM, "out of host memory");
    *g = (struct group){.dev = cuda_device_of(dev), .member = member, .members = members};
    memcpy(&given, id, sizeof given);
    const unsigned code = nccl.comm_init(&g->comm, members, given, member);
    if (code != 0) {
        nccl_fail(g, code, "ncclCommInitRank", -1);
        free(g);
        return ERR_LOST;
    }
    *out = g;
    return 0;
}

void cuda_group_close(struct group *g)
{
    if (!g)
        return;
    if (enter(g->dev) == 0)
        nccl.comm_destroy(g->comm);
    free(g);
}

int cuda_group_begin(struct group *g)
{
    TRY(enter(g->dev));
    NCCL(g, nccl.group_start(), "ncclGroupStart", -1);
    return 0;
}

int cuda_group_end(struct group *g)
{
    NCCL(g, nccl.group_end(), "ncclGroupEnd", -1);
    return 0;
}

static void *address(const struct mem *m, size_t offset)
{
    return (void *)(uintptr_t)(m->address + offset);
}

int cuda_group_send(struct group *g, struct stream *s, const struct mem *src, size_t offset,
                    size_t bytes, int member)
{
    BUG_IF(offset + bytes > src->bytes);
    NCCL(g, nccl.send(address(src, offset), bytes, NCCL_UINT8, member, g->comm, s->cu), "ncclSend",
         member);
    return 0;
}

int cuda_group_receive(struct group *g, struct stream *s, struct mem *dst, size_t offset,
                       size_t bytes, int member)
{
    BUG_IF(offset + bytes > dst->bytes);
    NCCL(g, nccl.receive(address(dst, offset), bytes, NCCL_UINT8, member, g->comm, s->cu),
         "ncclRecv", member);
    return 0;
}

int cuda_group_sum(struct group *g, struct stream *s, struct mem *at, size_t offset, size_t count)
{
    void *where = address(at, offset);
    BUG_IF(offset + count * sizeof(float) > at->bytes);
    NCCL(g, nccl.all_reduce(where, where, count, NCCL_FLOAT32, NCCL_SUM, g->comm, s->cu),
         "ncclAllReduce", -1);
    return 0;
}
