// The memory plan, on a device that only keeps books: offsets, counts and what was zeroed.
#include "runtime/plan.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

// ---- a device without memory --------------------------------------------------------------------

struct mem {
    struct mem *parent; // NULL: an allocation
    size_t offset, bytes, zeroed;
    int views; // alive
};

static struct {
    int allocations, alive, views, faults;
    int fail_after; // allocations that succeed; < 0: all
} books;

static int book_alloc(struct device *dev, size_t bytes, struct mem **out)
{
    if (books.fail_after >= 0 && books.allocations >= books.fail_after)
        return fail(ERR_NOMEM, "no memory for %zu bytes", bytes);
    *out = calloc(1, sizeof **out);
    (*out)->bytes = bytes;
    books.allocations++;
    books.alive++;
    dev->allocations++;
    return 0;
}

static int book_view(struct mem *parent, size_t offset, size_t bytes, struct mem **out)
{
    books.faults += bytes == 0 || offset % 128 != 0 || offset + bytes > parent->bytes;
    *out = calloc(1, sizeof **out);
    **out = (struct mem){.parent = parent, .offset = offset, .bytes = bytes};
    parent->views++;
    books.views++;
    return 0;
}

static void book_free(struct mem *mem)
{
    books.faults += mem->views != 0; // freed before its views
    if (mem->parent) {
        mem->parent->views--;
        books.views--;
    } else {
        books.alive--;
    }
    free(mem);
}

static int book_stream_new(struct device *dev, struct stream **out)
{
    (void)dev;
    *out = NULL;
    return 0;
}

static void book_stream_free(struct stream *s)
{
    (void)s;
}

static int book_fill(struct stream *s, struct mem *dst, size_t offset, size_t bytes, uint32_t word)
{
    (void)s;
    books.faults += offset != 0 || word != 0 || bytes % 4 != 0;
    dst->zeroed = bytes;
    return 0;
}

static int book_sync(struct stream *s)
{
    (void)s;
    return 0;
}

static const struct backend bookkeeper = {
    .name = "books",
    .alloc = book_alloc,
    .view = book_view,
    .free = book_free,
    .stream_new = book_stream_new,
    .stream_free = book_stream_free,
    .fill = book_fill,
    .sync = book_sync,
};

static struct device new_device(uint64_t memory, uint64_t max_alloc)
{
    memset(&books, 0, sizeof books);
    books.fail_after = -1;
    struct device dev = {.api = &bookkeeper};
    dev.info.align = 64; // less than the plan's own least
    dev.info.memory = memory;
    dev.info.max_alloc = max_alloc;
    strcpy(dev.info.key, "books:0");
    strcpy(dev.info.name, "Bookkeeper");
    return dev;
}

static int books_closed(void)
{
    CHECK(books.faults == 0, "%d faults", books.faults);
    CHECK(books.views == 0 && books.alive == 0, "%d views and %d slabs left", books.views,
          books.alive);
    return PASSED;
}

// ---- lifetimes ----------------------------------------------------------------------------------

struct life {
    struct tensor t;
    int first, last;
};

static uint32_t dice(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static int declare_lives(struct plan *p, struct life *lives, int count, uint32_t seed)
{
    for (int i = 0; i < count; i++) {
        struct life *l = &lives[i];
        char name[24];
        snprintf(name, sizeof name, "t%d", i);
        l->first = (int)(dice(&seed) % 200);
        l->last = i % 17 == 0 ? PLAN_FOREVER : l->first + (int)(dice(&seed) % (i % 5 ? 8 : 120));
        OK(PLAN_TENSOR(p, name, PLAN_ACTIVATIONS, i % 3 ? F32 : BF16, l->first, l->last, &l->t,
                       1 + dice(&seed) % 5000, 1 + dice(&seed) % 3));
    }
    return PASSED;
}

static int pairs_apart(const struct life *lives, int count)
{
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < i; j++) {
            const struct life *a = &lives[i], *b = &lives[j];
            const struct mem *x = a->t.mem, *y = b->t.mem;
            bool meet = x->parent == y->parent && x->offset < y->offset + y->bytes &&
                        y->offset < x->offset + x->bytes;
            bool always = a->last == PLAN_FOREVER || b->last == PLAN_FOREVER;
            bool together = always || (a->first <= b->last && b->first <= a->last);
            CHECK(!meet || !together, "tensors %d and %d share bytes and live together", i, j);
        }
    }
    return PASSED;
}

// The most bytes alive at one time, and the sum of all: no plan is below the first, none should be
// above the second.
static void bounds(const struct life *lives, int count, uint64_t *least, uint64_t *sum)
{
    *least = *sum = 0;
    for (int i = 0; i < count; i++)
        *sum += (tensor_bytes(&lives[i].t) + 127) / 128 * 128;
    for (int time = 0; time < 400; time++) {
        uint64_t alive = 0;
        for (int i = 0; i < count; i++)
            if (lives[i].last == PLAN_FOREVER || (lives[i].first <= time && time <= lives[i].last))
                alive += (tensor_bytes(&lives[i].t) + 127) / 128 * 128;
        *least = alive > *least ? alive : *least;
    }
}

static int lifetimes_with(int count, uint32_t seed, uint64_t max_alloc)
{
    struct device dev = new_device(UINT64_MAX, max_alloc);
    struct life *lives = calloc((size_t)count, sizeof *lives);
    struct plan *p;
    uint64_t least, sum;
    OK(plan_new(&dev, &p));
    CHECK(declare_lives(p, lives, count, seed) == PASSED, "declared");
    OK(plan_layout(p, 0));
    OK(plan_commit(p));
    bounds(lives, count, &least, &sum);
    CHECK(pairs_apart(lives, count) == PASSED, "apart, seed %u", seed);
    CHECK(plan_total(p) >= least && plan_total(p) <= sum, "%llu outside [%llu,%llu]",
          (unsigned long long)plan_total(p), (unsigned long long)least, (unsigned long long)sum);
    if (max_alloc == UINT64_MAX)
        CHECK((double)plan_total(p) < 1.2 * (double)least, "%llu, could be %llu",
              (unsigned long long)plan_total(p), (unsigned long long)least);
    plan_free(p);
    free(lives);
    return books_closed();
}

static int lifetimes(void)
{
    for (uint32_t seed = 1; seed <= 12; seed++)
        CHECK(lifetimes_with(1 + (int)seed * 37, seed, UINT64_MAX) == PASSED, "seed %u", seed);
    for (uint32_t seed = 1; seed <= 6; seed++)
        CHECK(lifetimes_with(200, seed, 100000) == PASSED, "split, seed %u", seed);
    return PASSED;
}

// No tensor of the host lies where rounding left a gap behind a guest.
static int gaps_are_empty(const struct life *guests, int count, const struct life *hosts, int others)
{
    for (int i = 0; i < count; i++) {
        const struct mem *g = guests[i].t.mem;
        const size_t from = g->offset + g->bytes, to = (from + 255) / 256 * 256;
        for (int j = 0; j < others && from < to; j++) {
            const struct mem *h = hosts[j].t.mem;
            CHECK(h->parent != g->parent || h->offset >= to || h->offset + h->bytes <= from,
                  "tensor %d lies behind guest %d", j, i);
        }
    }
    return PASSED;
}

// Gradients among activations: placed like the moments, in bytes that activations have at other
// times.
static int guests_with(uint32_t seed, uint64_t max_alloc)
{
    enum { GUESTS = 30, OTHERS = 150 };
    static struct life lives[GUESTS + OTHERS];
    static struct tensor moments[GUESTS];
    struct device dev = new_device(UINT64_MAX, max_alloc);
    const struct tensor *slabs, *alike;
    struct plan *p;
    OK(plan_new(&dev, &p));
    for (int i = 0; i < GUESTS; i++) {
        const int64_t shape[] = {9 + 31 * i, 1 + i % 4};
        lives[i].first = 190 - 5 * i, lives[i].last = 400;
        OK(plan_tensor(p, "gradient", PLAN_GRADIENTS, F32, lives[i].first, 400, &lives[i].t, 2, shape));
        OK(plan_tensor(p, "moment", PLAN_MOMENT1, F32, 0, PLAN_FOREVER, &moments[i], 2, shape));
    }
    CHECK(declare_lives(p, lives + GUESTS, OTHERS, seed) == PASSED, "declared");
    plan_host(p, PLAN_ACTIVATIONS, PLAN_GRADIENTS);
    OK(plan_layout(p, 0));
    OK(plan_commit(p));
    for (int i = 0; i < GUESTS; i++)
        CHECK(lives[i].t.mem->offset == moments[i].mem->offset, "gradient %d lies elsewhere", i);
    const int count = plan_slabs(p, PLAN_MOMENT1, &alike);
    CHECK(plan_slabs(p, PLAN_GRADIENTS, &slabs) == count, "slabs");
    for (int i = 0; i < count; i++)
        CHECK(slabs[i].mem->bytes == alike[i].mem->bytes && slabs[i].mem->zeroed == slabs[i].mem->bytes,
              "slab %d", i);
    CHECK(pairs_apart(lives, GUESTS + OTHERS) == PASSED, "apart");
    CHECK(gaps_are_empty(lives, GUESTS, lives + GUESTS, OTHERS) == PASSED, "gaps");
    plan_free(p);
    return books_closed();
}

// A gradient that is written when the activation is no longer read costs nothing.
static int guest_shares(void)
{
    struct device dev = new_device(UINT64_MAX, UINT64_MAX);
    struct tensor activation, gradient;
    struct plan *p;
    OK(plan_new(&dev, &p));
    OK(PLAN_TENSOR(p, "activation", PLAN_ACTIVATIONS, F32, 0, 9, &activation, 4096));
    OK(PLAN_TENSOR(p, "gradient", PLAN_GRADIENTS, F32, 10, 20, &gradient, 4096));
    OK(plan_layout(p, 0));
    CHECK(plan_total(p) == 2 * 4 * 4096, "apart: %llu", (unsigned long long)plan_total(p));
    plan_host(p, PLAN_ACTIVATIONS, PLAN_GRADIENTS);
    OK(plan_layout(p, 0));
    CHECK(plan_total(p) == 4 * 4096, "together: %llu", (unsigned long long)plan_total(p));
    plan_free(p);
    return books_closed();
}

static int guests(void)
{
    for (uint32_t seed = 1; seed <= 4; seed++) {
        CHECK(guests_with(seed, UINT64_MAX) == PASSED, "seed %u", seed);
        CHECK(guests_with(seed, 100000) == PASSED, "split, seed %u", seed);
    }
    return PASSED;
}

// A chain of equal tensors, each alive with the next only, needs two of them.
static int chain(void)
{
    struct device dev = new_device(UINT64_MAX, UINT64_MAX);
    struct tensor t[20];
    struct plan *p;
    OK(plan_new(&dev, &p));
    for (int i = 0; i < 20; i++)
        OK(PLAN_TENSOR(p, "link", PLAN_ACTIVATIONS, F32, i, i + 1, &t[i], 1000));
    OK(plan_layout(p, 0));
    CHECK(plan_total(p) == 2 * 4096, "%llu bytes", (unsigned long long)plan_total(p));
    plan_free(p);
    return books_closed();
}

// ---- parameters ---------------------------------------------------------------------------------

enum { PARAMETERS = 40 };
static const enum plan_class alike[] = {PLAN_WEIGHTS, PLAN_GRADIENTS, PLAN_MOMENT1, PLAN_MOMENT2,
                                        PLAN_EMA};

static int declare_parameters(struct plan *p, struct tensor t[5][PARAMETERS])
{
    for (int k = 0; k < 5; k++)
        for (int i = 0; i < PARAMETERS; i++)
            OK(PLAN_TENSOR(p, "parameter", alike[k], F32, 0, PLAN_FOREVER, &t[k][i], 7 + 31 * i,
                           1 + i % 4));
    return PASSED;
}

static int same_slabs(const struct plan *p, int k, size_t max_alloc)
{
    const struct tensor *first, *slabs;
    int count = plan_slabs(p, PLAN_WEIGHTS, &first);
    CHECK(count > 1, "%d slabs", count);
    CHECK(plan_slabs(p, alike[k], &slabs) == count, "class %d", k);
    for (int i = 0; i < count; i++) {
        CHECK(slabs[i].dtype == F32 && tensor_count(&slabs[i]) == tensor_count(&first[i]), "%d", i);
        CHECK(slabs[i].mem->bytes == tensor_bytes(&slabs[i]), "slab %d", i);
        CHECK(slabs[i].mem->bytes <= max_alloc, "slab %d has %zu bytes", i, slabs[i].mem->bytes);
        CHECK(slabs[i].mem->zeroed == slabs[i].mem->bytes, "slab %d is not zeroed", i);
    }
    return PASSED;
}

static int parameters(void)
{
    enum { MOST = 60000 };
    struct device dev = new_device(UINT64_MAX, MOST);
    static struct tensor t[5][PARAMETERS];
    struct plan *p;
    OK(plan_new(&dev, &p));
    CHECK(declare_parameters(p, t) == PASSED, "declared");
    OK(plan_layout(p, 0));
    CHECK(t[0][0].mem == NULL, "no memory before the commit");
    OK(plan_commit(p));
    for (int k = 0; k < 5; k++) {
        size_t end = 0;
        CHECK(same_slabs(p, k, MOST) == PASSED, "class %d", k);
        for (int i = 0; i < PARAMETERS; i++) {
            CHECK(t[k][i].mem->offset == t[0][i].mem->offset, "class %d, parameter %d", k, i);
            CHECK(t[k][i].mem->offset == (t[k][i].mem->offset ? end : 0), "gap before %d", i);
            end = (t[k][i].mem->offset + tensor_bytes(&t[k][i]) + 255) / 256 * 256;
        }
        CHECK(plan_class_bytes(p, alike[k]) == plan_class_bytes(p, PLAN_WEIGHTS), "class %d", k);
    }
    CHECK(plan_total(p) == 5 * plan_class_bytes(p, PLAN_EMA), "total");
    plan_free(p);
    return books_closed();
}

// The bf16 copies of parameters lie as the parameters do, element by element.
static int half_copies(void)
{
    struct device dev = new_device(UINT64_MAX, UINT64_MAX);
    static struct tensor whole[PARAMETERS], half[PARAMETERS];
    const struct tensor *slab;
    struct plan *p;
    OK(plan_new(&dev, &p));
    for (int i = 0; i < PARAMETERS; i++) {
        OK(PLAN_TENSOR(p, "w", PLAN_WEIGHTS, F32, 0, PLAN_FOREVER, &whole[i], 7 + 31 * i));
        OK(PLAN_TENSOR(p, "h", PLAN_HALF, BF16, 0, PLAN_FOREVER, &half[i], 7 + 31 * i));
    }
    OK(plan_layout(p, 0));
    OK(plan_commit(p));
    for (int i = 0; i < PARAMETERS; i++)
        CHECK(whole[i].mem->offset == 2 * half[i].mem->offset, "parameter %d", i);
    CHECK(plan_class_bytes(p, PLAN_WEIGHTS) == 2 * plan_class_bytes(p, PLAN_HALF), "slabs");
    CHECK(plan_slabs(p, PLAN_HALF, &slab) == 1, "one slab");
    plan_free(p);
    return books_closed();
}

// ---- views and counts ---------------------------------------------------------------------------

static int views(void)
{
    struct device dev = new_device(UINT64_MAX, UINT64_MAX);
    struct tensor whole, empty, early, late, inner;
    struct plan *p;
    OK(plan_new(&dev, &p));
    OK(PLAN_TENSOR(p, "empty", PLAN_INPUT, I32, 0, 3, &empty, 0, 4));
    OK(PLAN_TENSOR(p, "whole", PLAN_INPUT, BF16, 0, 3, &whole, 10, 128));
    OK(plan_view(p, &whole, 128, &early, 2, (int64_t[]){8, 128}));
    OK(plan_view(p, &early, 256, &inner, 1, (int64_t[]){5}));
    OK(plan_layout(p, 0));
    OK(plan_commit(p));
    OK(plan_view(p, &whole, 1280 - 64, &late, 1, (int64_t[]){64}));
    CHECK(books.allocations == 1 && dev.allocations == 1, "%d allocations", books.allocations);
    CHECK(books.views == 5, "%d views", books.views);
    CHECK(early.dtype == BF16 && early.ndim == 2 && early.shape[0] == 8, "shape");
    CHECK(early.mem->parent == whole.mem && early.mem->offset == 256, "early view");
    CHECK(inner.mem->parent == early.mem && inner.mem->offset == 512 && inner.mem->bytes == 10,
          "view of a view");
    CHECK(late.mem->parent == whole.mem && late.mem->offset == 2432, "late view");
    CHECK(whole.mem->parent->zeroed == 0, "input is zeroed without need");
    plan_free(p);
    return books_closed();
}

// ---- failures -----------------------------------------------------------------------------------

static int too_large(void)
{
    struct device dev = new_device(3 << 20, 2 << 20);
    struct tensor a, b;
    struct plan *p;
    OK(plan_new(&dev, &p));
    OK(PLAN_TENSOR(p, "table", PLAN_WEIGHTS, F32, 0, PLAN_FOREVER, &a, 400, 1024));
    OK(plan_layout(p, 0));
    CHECK(plan_layout(p, 1 << 20) == ERR_NOMEM, "a limit of 1 MiB");
    CHECK(strstr(error_message(), "1.6 MiB") && strstr(error_message(), "1.0 MiB") &&
              strstr(error_message(), "--batch") && strstr(error_message(), "books:0"),
          "%s", error_message());
    OK(PLAN_TENSOR(p, "other", PLAN_INPUT, F32, 0, 1, &b, 400, 1024));
    CHECK(plan_layout(p, 0) == ERR_NOMEM, "more than the device's memory");
    OK(plan_layout(p, 4 << 20));
    dev.allocated = 2 << 20;
    CHECK(plan_layout(p, 0) == ERR_NOMEM, "memory in use counts");
    plan_free(p);
    return books_closed();
}

static int too_large_for_one(void)
{
    struct device dev = new_device(64 << 20, 1 << 20);
    struct tensor a, b;
    struct plan *p;
    OK(plan_new(&dev, &p));
    OK(PLAN_TENSOR(p, "fits", PLAN_ACTIVATIONS, F32, 0, 9, &a, 512, 512));
    OK(plan_layout(p, 0));
    OK(PLAN_TENSOR(p, "scores", PLAN_ACTIVATIONS, F32, 0, 9, &b, 512, 513));
    CHECK(plan_layout(p, 0) == ERR_NOMEM, "larger than the largest allocation");
    CHECK(strstr(error_message(), "scores") && strstr(error_message(), "single allocation"), "%s",
          error_message());
    plan_free(p);
    return books_closed();
}

static int allocation_fails(void)
{
    struct device dev = new_device(64 << 20, 1 << 20);
    static struct tensor t[5][PARAMETERS];
    struct plan *p;
    books.fail_after = 3;
    OK(plan_new(&dev, &p));
    CHECK(declare_parameters(p, t) == PASSED, "declared");
    OK(plan_layout(p, 0));
    CHECK(plan_commit(p) == ERR_NOMEM, "the fourth allocation fails");
    CHECK(strstr(error_message(), "moments: no memory"), "%s", error_message());
    plan_free(p);
    return books_closed();
}

static int table(void)
{
    struct device dev = new_device(64 << 20, 32 << 20);
    struct tensor a, b;
    struct plan *p;
    char text[4096] = "";
    FILE *out = tmpfile();
    CHECK(out, "temporary file");
    OK(plan_new(&dev, &p));
    OK(PLAN_TENSOR(p, "blocks.0.w", PLAN_WEIGHTS, F32, 0, PLAN_FOREVER, &a, 512, 1024));
    OK(PLAN_TENSOR(p, "x", PLAN_ACTIVATIONS, BF16, 3, 9, &b, 2, 512, 1024));
    CHECK(plan_layout(p, 1 << 20) == ERR_NOMEM, "does not fit, prints all the same");
    plan_print(p, out, true);
    rewind(out);
    CHECK(fread(text, 1, sizeof text - 1, out) > 0, "printed");
    fclose(out);
    for (const char *const *word =
             (const char *const[]){"weights", "blocks.0.w", "512x1024", "always", "3..9", "total",
                                   "4.0", "64.0 MiB", "books:0", NULL};
         *word; word++)
        CHECK(strstr(text, *word), "no \"%s\" in\n%s", *word, text);
    plan_free(p);
    return books_closed();
}

const struct test plan_tests[] = {
    {"lifetimes", lifetimes},
    {"guests", guests},
    {"guest_shares", guest_shares},
    {"chain", chain},
    {"parameters", parameters},
    {"half_copies", half_copies},
    {"views", views},
    {"too_large", too_large},
    {"too_large_for_one", too_large_for_one},
    {"allocation_fails", allocation_fails},
    {"table", table},
    {0},
};
