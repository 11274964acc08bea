// The memory plan: see plan.h.
//
// Each class is a list of slabs, one unless the class is larger than the device's largest
// allocation. Tensors that live for ever are packed first, in the order of declaration. The others
// follow in descending size, each into the smallest gap, among the tensors alive at the same time,
// that holds it (greedy by size, Pisarchyk and Lee, arXiv 2001.03288); no gap: behind the last of
// them, where the slab grows least. Guests are packed before all of them.
#include "runtime/plan.h"

#include <stdlib.h>
#include <string.h>

struct entry {
    char *name;
    enum plan_class class;
    int first, last;
    struct tensor *tensor;
    size_t bytes; // rounded up to the alignment, never 0
    int slab;     // number within the class
    size_t offset;
};

struct slabs {
    struct tensor *flat; // every slab as one f32 tensor
    int count, capacity;
};

struct view {
    const struct tensor *of;
    int64_t start; // element
    struct tensor *out;
};

struct plan {
    struct device *dev;
    size_t align;
    struct entry *entries; // in the order of declaration
    int count, capacity;
    struct view *views;
    int view_count, view_capacity;
    struct slabs slabs[PLAN_CLASSES]; // a guest's are the first parts of its host's
    enum plan_class host[PLAN_CLASSES]; // itself where it is no guest
    struct entry *gaps;                 // that guests leave, alive for ever
    int gap_count;
    bool shared[PLAN_CLASSES];
    unsigned char share_id[PLAN_CLASSES][SHARE_ID]; // of the first slab
    struct mem **made; // every view, in the order they were made
    int made_count, made_capacity;
    bool laid_out, committed;
};

static const char *const class_names[PLAN_CLASSES] = {
    [PLAN_WEIGHTS] = "weights",         [PLAN_GRADIENTS] = "gradients",
    [PLAN_MOMENT1] = "first moments",   [PLAN_MOMENT2] = "second moments",
    [PLAN_EMA] = "EMA weights",         [PLAN_ACTIVATIONS] = "activations",
    [PLAN_INPUT] = "input and results", [PLAN_PACKED] = "packed weights",
    [PLAN_HALF] = "bf16 weights",       [PLAN_LOW] = "weights' low bits",
    [PLAN_STREAMED] = "expert buffers",
    [PLAN_WINDOWS] = "windows of others",
};

const char *plan_class_name(enum plan_class class)
{
    return class_names[class];
}

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

// Makes room for one more element of `size` bytes; `array` is the address of the pointer to them.
static int reserve(void *array, int count, int *capacity, size_t size)
{
    if (count < *capacity)
        return 0;
    int wanted = *capacity ? 2 * *capacity : 64;
    void *elements; // memcpy: the caller's pointer has another type
    memcpy(&elements, array, sizeof elements);
    elements = realloc(elements, (size_t)wanted * size);
    if (!elements)
        return fail(ERR_NOMEM, "memory plan: no host memory for %d entries", wanted);
    memcpy(array, &elements, sizeof elements);
    *capacity = wanted;
    return 0;
}

// ---- declaring ----------------------------------------------------------------------------------

int plan_new(struct device *dev, struct plan **out)
{
    struct plan *p = calloc(1, sizeof *p);
    if (!p)
        return fail(ERR_NOMEM, "memory plan: no host memory");
    p->dev = dev;
    p->align = dev->info.align > 128 ? dev->info.align : 128;
    for (int k = 0; k < PLAN_CLASSES; k++)
        p->host[k] = (enum plan_class)k;
    *out = p;
    return 0;
}

void plan_host(struct plan *p, enum plan_class host, enum plan_class guest)
{
    BUG_IF(p->host[host] != host || host == guest || p->committed);
    for (int k = 0; k < PLAN_CLASSES; k++) // one guest a host: so it begins where the slab does
        BUG_IF(k != (int)host && k != (int)guest && p->host[k] == host);
    p->host[guest] = host;
    p->laid_out = false;
}

void plan_share(struct plan *p, enum plan_class class)
{
    BUG_IF(p->committed || !p->dev->api->alloc_shared);
    p->shared[class] = true;
}

int plan_share_id(const struct plan *p, enum plan_class class, unsigned char id[SHARE_ID])
{
    BUG_IF(!p->committed || !p->shared[class]);
    if (p->slabs[class].count > 1)
        return fail(ERR_NODEVICE, "%s are too much for one allocation of %s, which other ranks could map",
                    class_names[class], p->dev->info.key);
    memcpy(id, p->share_id[class], SHARE_ID);
    return 0;
}

static bool is_guest(const struct plan *p, int class)
{
    return (int)p->host[class] != class;
}

static bool holds_parameters(enum plan_class class)
{
    return class != PLAN_ACTIVATIONS && class != PLAN_INPUT && class != PLAN_PACKED &&
           class != PLAN_STREAMED;
}

static void set_shape(struct tensor *t, enum dtype type, int ndim, const int64_t *shape)
{
    BUG_IF(ndim < 1 || ndim > TENSOR_DIMS);
    *t = (struct tensor){.dtype = type, .ndim = ndim};
    for (int i = 0; i < ndim; i++) {
        BUG_IF(shape[i] < 0);
        t->shape[i] = shape[i];
    }
}

int plan_tensor(struct plan *p, const char *name, enum plan_class class, enum dtype type, int first,
                int last, struct tensor *t, int ndim, const int64_t *shape)
{
    BUG_IF(p->committed || first > last);
    TRY(reserve(&p->entries, p->count, &p->capacity, sizeof *p->entries));
    char *copy = strdup(name);
    if (!copy)
        return fail(ERR_NOMEM, "memory plan: no host memory");
    set_shape(t, type, ndim, shape);
    // parameters of 4 bytes take twice the alignment, so that those of 2 bytes lie alike
    const size_t align = holds_parameters(class) && type != BF16 ? 2 * p->align : p->align;
    size_t bytes = round_up(tensor_bytes(t), align);
    p->entries[p->count++] = (struct entry){.name = copy,
                                            .class = class,
                                            .first = first,
                                            .last = last,
                                            .tensor = t,
                                            .bytes = bytes ? bytes : align};
    p->laid_out = false;
    return 0;
}

// ---- laying out ---------------------------------------------------------------------------------

static size_t slab_bytes(const struct slabs *s, int i)
{
    return (size_t)s->flat[i].shape[0] * sizeof(float);
}

static int add_slab(struct slabs *s)
{
    TRY(reserve(&s->flat, s->count, &s->capacity, sizeof *s->flat));
    set_shape(&s->flat[s->count++], F32, 1, (int64_t[]){0});
    return 0;
}

// Gives `e` its place and lets the slab grow to hold it.
static void place(struct slabs *s, struct entry *e, int slab, size_t offset)
{
    e->slab = slab;
    e->offset = offset;
    size_t end = offset + e->bytes;
    if (end > slab_bytes(s, slab))
        s->flat[slab].shape[0] = (int64_t)(end / sizeof(float));
}

static bool forever(const struct entry *e)
{
    return e->last >= PLAN_FOREVER;
}

static bool alive_together(const struct entry *a, const struct entry *b)
{
    return forever(a) || forever(b) || (a->first <= b->last && b->first <= a->last);
}

// A place for a tensor: `waste` is the part of the gap left over; growth of the slab comes after
// every gap.
struct spot {
    int slab;
    size_t offset, growth, waste;
};

static bool better(const struct spot *a, const struct spot *b)
{
    if (b->slab < 0)
        return true;
    if (a->growth != b->growth)
        return a->growth < b->growth;
    return a->waste < b->waste;
}

// Looks for the best spot in slab `number`; `placed` are this class's tensors in ascending offset.
static void search_slab(const struct plan *p, const struct slabs *s, int number,
                        const struct entry *e, struct entry *const *placed, int count,
                        struct spot *best)
{
    size_t end = 0; // of the tensors seen so far that live with e
    for (int i = 0; i < count; i++) {
        const struct entry *other = placed[i];
        if (other->slab != number || !alive_together(e, other))
            continue;
        if (other->offset >= end + e->bytes) {
            struct spot gap = {number, end, 0, other->offset - end - e->bytes};
            if (better(&gap, best))
                *best = gap;
        }
        if (other->offset + other->bytes > end)
            end = other->offset + other->bytes;
    }
    if (end + e->bytes > p->dev->info.max_alloc)
        return;
    size_t size = slab_bytes(s, number);
    struct spot tail = {number, end, 0, 0};
    if (end + e->bytes > size)
        tail.growth = end + e->bytes - size;
    else
        tail.waste = size - end - e->bytes;
    if (better(&tail, best))
        *best = tail;
}

static void insert_by_offset(struct entry **placed, int count, struct entry *e)
{
    int i = count;
    for (; i > 0 && placed[i - 1]->offset > e->offset; i--)
        placed[i] = placed[i - 1];
    placed[i] = e;
}

static int place_best(struct plan *p, struct slabs *s, struct entry *e, struct entry **placed,
                      int *count)
{
    struct spot best = {.slab = -1};
    for (int i = 0; i < s->count; i++)
        search_slab(p, s, i, e, placed, *count, &best);
    if (best.slab < 0) {
        TRY(add_slab(s));
        best = (struct spot){.slab = s->count - 1};
    }
    place(s, e, best.slab, best.offset);
    insert_by_offset(placed, (*count)++, e);
    return 0;
}

static int place_next(struct plan *p, struct slabs *s, struct entry *e)
{
    int last = s->count - 1;
    if (last < 0 || slab_bytes(s, last) + e->bytes > p->dev->info.max_alloc)
        TRY(add_slab(s));
    place(s, e, s->count - 1, slab_bytes(s, s->count - 1));
    return 0;
}

// Descending size, then order of declaration (entries lie in that order in memory).
static int by_size(const void *a, const void *b)
{
    const struct entry *x = *(struct entry *const *)a, *y = *(struct entry *const *)b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? 1 : -1;
    return x < y ? -1 : 1;
}

// The end of a guest's bytes that its tensor does not fill, from the last multiple of the
// alignment.
static void keep_gap(struct plan *p, const struct entry *e, struct entry **placed, int *count)
{
    const size_t used = tensor_bytes(e->tensor) / p->align * p->align;
    if (tensor_bytes(e->tensor) == e->bytes)
        return;
    struct entry *gap = &p->gaps[p->gap_count++];
    *gap = (struct entry){.last = PLAN_FOREVER,
                          .bytes = e->bytes - used,
                          .slab = e->slab,
                          .offset = e->offset + used};
    insert_by_offset(placed, (*count)++, gap);
}

// Places the guest of `class`, if it has one: its slabs end where they do now.
static int layout_guest(struct plan *p, enum plan_class class, struct entry **placed, int *count)
{
    struct slabs *s = &p->slabs[class];
    for (int i = 0; i < p->count; i++) {
        struct entry *e = &p->entries[i];
        if (e->class == class || p->host[e->class] != class)
            continue;
        TRY(place_next(p, s, e));
        insert_by_offset(placed, (*count)++, e);
        keep_gap(p, e, placed, count);
    }
    for (int k = 0; k < PLAN_CLASSES; k++) {
        if (k == (int)class || p->host[k] != class)
            continue;
        p->slabs[k].count = 0;
        for (int i = 0; i < s->count; i++) {
            TRY(add_slab(&p->slabs[k]));
            p->slabs[k].flat[i].shape[0] = s->flat[i].shape[0];
        }
    }
    return 0;
}

// `sorted` and `placed` have room for every entry and gap.
static int layout_class(struct plan *p, enum plan_class class, struct entry **sorted,
                        struct entry **placed)
{
    struct slabs *s = &p->slabs[class];
    int waiting = 0, count = 0;
    s->count = 0;
    TRY(layout_guest(p, class, placed, &count));
    for (int i = 0; i < p->count; i++) {
        struct entry *e = &p->entries[i];
        if (e->class != class)
            continue;
        if (forever(e)) {
            TRY(place_next(p, s, e));
            insert_by_offset(placed, count++, e);
        } else {
            sorted[waiting++] = e;
        }
    }
    qsort(sorted, (size_t)waiting, sizeof *sorted, by_size);
    for (int i = 0; i < waiting; i++)
        TRY(place_best(p, s, sorted[i], placed, &count));
    return 0;
}

static uint64_t memory_left(const struct plan *p)
{
    const struct device *dev = p->dev;
    return dev->info.memory > dev->allocated ? dev->info.memory - dev->allocated : 0;
}

static int check_fit(const struct plan *p, uint64_t limit)
{
    const char *remedy = "a smaller --batch, --recompute or bf16 activations would need less";
    for (int i = 0; i < p->count; i++) {
        const struct entry *e = &p->entries[i];
        if (e->bytes > p->dev->info.max_alloc)
            return fail(ERR_NOMEM,
                        "the tensor %s needs %.1f MiB, but the largest single allocation on %s is "
                        "%.1f MiB; %s",
                        e->name, mib(e->bytes), p->dev->info.key, mib(p->dev->info.max_alloc),
                        remedy);
    }
    uint64_t most = limit ? limit : memory_left(p);
    if (plan_total(p) > most)
        return fail(ERR_NOMEM, "the plan needs %.1f MiB, but %s has %.1f MiB for it; %s",
                    mib(plan_total(p)), p->dev->info.key, mib(most), remedy);
    return 0;
}

bool plan_has_room(const struct plan *p, uint64_t limit, uint64_t bytes)
{
    const uint64_t most = limit ? limit : memory_left(p), total = plan_total(p);
    return total <= most && bytes <= most - total;
}

int plan_layout(struct plan *p, uint64_t limit)
{
    BUG_IF(p->committed);
    int code = 0;
    size_t room = (size_t)p->count + 1;
    struct entry **sorted = calloc(3 * room, sizeof *sorted);
    free(p->gaps);
    p->gaps = calloc(room, sizeof *p->gaps);
    p->gap_count = 0;
    if (!sorted || !p->gaps)
        TRY_OUT(fail(ERR_NOMEM, "memory plan: no host memory"));
    for (int k = 0; k < PLAN_CLASSES; k++)
        if (!is_guest(p, k))
            TRY_OUT(layout_class(p, (enum plan_class)k, sorted, sorted + room));
    p->laid_out = true;
    code = check_fit(p, limit);
out:
    free(sorted);
    return code;
}

// ---- committing ---------------------------------------------------------------------------------

static int make_view(struct plan *p, struct mem *parent, size_t offset, struct tensor *t)
{
    size_t bytes = tensor_bytes(t);
    TRY(reserve(&p->made, p->made_count, &p->made_capacity, sizeof(struct mem *)));
    TRY(p->dev->api->view(parent, offset, bytes ? bytes : p->align, &t->mem));
    p->made[p->made_count++] = t->mem;
    return 0;
}

static int make_part(struct plan *p, const struct view *v)
{
    return make_view(p, v->of->mem, (size_t)v->start * dtype_size(v->of->dtype), v->out);
}

// A guest's slabs: the first parts of its host's.
static int view_guests(struct plan *p)
{
    for (int k = 0; k < PLAN_CLASSES; k++)
        for (int i = 0; is_guest(p, k) && i < p->slabs[k].count; i++)
            TRY(make_view(p, p->slabs[p->host[k]].flat[i].mem, 0, &p->slabs[k].flat[i]));
    return 0;
}

static int allocate_slabs(struct plan *p, struct stream *stream)
{
    const struct backend *api = p->dev->api;
    for (int k = 0; k < PLAN_CLASSES; k++) {
        struct slabs *s = &p->slabs[k];
        if (is_guest(p, k))
            continue;
        for (int i = 0; i < s->count; i++) {
            const size_t bytes = slab_bytes(s, i);
            const int code = p->shared[k] && i == 0
                                 ? api->alloc_shared(p->dev, bytes, &s->flat[i].mem, p->share_id[k])
                                 : api->alloc(p->dev, bytes, &s->flat[i].mem);
            if (code < 0)
                return fail_in(code, "%s", class_names[k]);
        }
    }
    TRY(view_guests(p));
    for (int k = 0; k < PLAN_CLASSES; k++)
        for (int i = 0; holds_parameters((enum plan_class)k) && i < p->slabs[k].count; i++)
            TRY(api->fill(stream, p->slabs[k].flat[i].mem, 0, slab_bytes(&p->slabs[k], i), 0));
    return api->sync(stream);
}

int plan_commit(struct plan *p)
{
    BUG_IF(!p->laid_out || p->committed);
    struct stream *stream;
    TRY(p->dev->api->stream_new(p->dev, &stream));
    p->committed = true;
    int code = 0;
    TRY_OUT(allocate_slabs(p, stream));
    for (int i = 0; i < p->count; i++) {
        const struct entry *e = &p->entries[i];
        const struct slabs *s = &p->slabs[p->host[e->class]];
        TRY_OUT(make_view(p, s->flat[e->slab].mem, e->offset, e->tensor));
    }
    for (int i = 0; i < p->view_count; i++)
        TRY_OUT(make_part(p, &p->views[i]));
out:
    p->dev->api->stream_free(stream);
    return code;
}

int plan_view(struct plan *p, const struct tensor *t, int64_t start, struct tensor *out, int ndim,
              const int64_t *shape)
{
    struct view v = {t, start, out};
    set_shape(out, t->dtype, ndim, shape);
    BUG_IF(start < 0 || start + tensor_count(out) > tensor_count(t));
    BUG_IF((size_t)start * dtype_size(t->dtype) % p->dev->info.align != 0);
    if (p->committed)
        return make_part(p, &v);
    TRY(reserve(&p->views, p->view_count, &p->view_capacity, sizeof *p->views));
    p->views[p->view_count++] = v;
    return 0;
}

void plan_free(struct plan *p)
{
    if (!p)
        return;
    for (int i = p->made_count; i > 0; i--)
        p->dev->api->free(p->made[i - 1]);
    for (int k = 0; k < PLAN_CLASSES; k++) {
        struct slabs *s = &p->slabs[k];
        for (int i = 0; i < s->count; i++)
            if (s->flat[i].mem && !is_guest(p, k)) // guests' are views
                p->dev->api->free(s->flat[i].mem);
        free(s->flat);
    }
    for (int i = 0; i < p->count; i++)
        free(p->entries[i].name);
    free(p->entries);
    free(p->gaps);
    free(p->views);
    free(p->made);
    free(p);
}

// ---- looking ------------------------------------------------------------------------------------

uint64_t plan_class_bytes(const struct plan *p, enum plan_class class)
{
    uint64_t bytes = 0;
    for (int i = 0; i < p->slabs[class].count; i++)
        bytes += slab_bytes(&p->slabs[class], i);
    return bytes;
}

uint64_t plan_total(const struct plan *p)
{
    uint64_t bytes = 0;
    for (int k = 0; k < PLAN_CLASSES; k++)
        bytes += is_guest(p, k) ? 0 : plan_class_bytes(p, (enum plan_class)k);
    return bytes;
}

int plan_slabs(const struct plan *p, enum plan_class class, const struct tensor **slabs)
{
    *slabs = p->slabs[class].flat;
    return p->slabs[class].count;
}

int plan_place(const struct plan *p, const struct tensor *t, int64_t *start, int64_t *end)
{
    int i = 0;
    while (i < p->count && p->entries[i].tensor != t)
        i++;
    BUG_IF(i == p->count || !p->laid_out);
    *start = (int64_t)(p->entries[i].offset / sizeof(float));
    *end = *start + (int64_t)(p->entries[i].bytes / sizeof(float));
    return p->entries[i].slab;
}

static int class_tensors(const struct plan *p, enum plan_class class, uint64_t *bytes)
{
    int count = 0;
    *bytes = 0;
    for (int i = 0; i < p->count; i++) {
        if (p->entries[i].class == class) {
            count++;
            *bytes += p->entries[i].bytes;
        }
    }
    return count;
}

static void print_tensor(const struct entry *e, FILE *out)
{
    char shape[128] = "", life[32] = "always";
    size_t used = 0;
    for (int i = 0; i < e->tensor->ndim; i++)
        used += (size_t)snprintf(shape + used, sizeof shape - used, "%s%lld", i ? "x" : "",
                                 (long long)e->tensor->shape[i]);
    if (!forever(e))
        snprintf(life, sizeof life, "%d..%d", e->first, e->last);
    fprintf(out, "%-18s %-34s %-22s %-5s %12.3f  %s\n", class_names[e->class], e->name, shape,
            dtype_name(e->tensor->dtype), mib(tensor_bytes(e->tensor)), life);
}

void plan_print(const struct plan *p, FILE *out, bool every_tensor)
{
    if (every_tensor) {
        fprintf(out, "%-18s %-34s %-22s %-5s %12s  %s\n", "class", "tensor", "shape", "type", "MiB",
                "life");
        for (int i = 0; i < p->count; i++)
            print_tensor(&p->entries[i], out);
        fputc('\n', out);
    }
    uint64_t apart, all_apart = 0;
    fprintf(out, "%-18s %8s %6s %12s %14s\n", "class", "tensors", "slabs", "MiB", "unshared MiB");
    for (int k = 0; k < PLAN_CLASSES; k++) {
        int count = class_tensors(p, (enum plan_class)k, &apart);
        if (count == 0)
            continue;
        all_apart += apart;
        fprintf(out, "%-18s %8d %6d ", class_names[k], count, p->slabs[k].count);
        if (is_guest(p, k))
            fprintf(out, "%12s %14.1f  (within %s)\n", "-", mib(apart), class_names[p->host[k]]);
        else
            fprintf(out, "%12.1f %14.1f\n", mib(plan_class_bytes(p, (enum plan_class)k)), mib(apart));
    }
    fprintf(out, "%-18s %8d %6s %12.1f %14.1f\n", "total", p->count, "", mib(plan_total(p)),
            mib(all_apart));
    fprintf(out, "%s has %.1f MiB, %.1f MiB a single allocation (%s)\n", p->dev->info.key,
            mib(p->dev->info.memory), mib(p->dev->info.max_alloc), p->dev->info.name);
}
