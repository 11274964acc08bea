// See streamed.h. Every buffer is guarded by two events: `full`, which its user waits for, and
// `used`, which who fills it waits for.
#include "model/streamed_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "devices/host.h"

// ---- which --------------------------------------------------------------------------------------

static int held(const struct dit *d, int layer)
{
    const struct dit_ranks *r = d->options.ranks;
    if (!config_is_moe(&d->config, layer))
        return 0;
    return r ? placement_list(r->placement, exchange_rank(r->exchange), layer, NULL)
             : d->config.experts;
}

int streamed_most(const struct dit *d)
{
    int count = 0;
    for (int l = 0; l < d->config.layers; l++)
        count += held(d, l) > 0;
    return count;
}

bool streamed_block(const struct dit *d, int layer)
{
    return d->streamed && d->streamed->blocks[layer].here;
}

int streamed_new(struct dit *d)
{
    const struct offload *o = &d->options.offload;
    const int most = streamed_most(d);
    const int wanted = o->blocks < most ? o->blocks : most;
    BUG_IF(o->blocks < 0);
    if (wanted == 0 && !o->which)
        return 0;
    struct streamed *s = d->streamed = calloc(1, sizeof *s);
    if (!s || !(s->blocks = calloc((size_t)d->config.layers, sizeof *s->blocks)))
        return fail(ERR_NOMEM, "no host memory for %d blocks", d->config.layers);
    for (int l = 0, i = 0; l < d->config.layers; l++) {
        if (held(d, l) == 0)
            continue;
        const bool chosen = placement_spread(i++, wanted, most);
        s->blocks[l].here = o->which ? o->which[l] : chosen;
        s->count += s->blocks[l].here;
        if (s->blocks[l].here)
            params_stream(&d->params, l);
    }
    for (int k = 0; k < TURNS; k++)
        s->weights[k].layer = s->gradients[k].layer = -1;
    if (s->count == 0) { // the placement streams other ranks' experts
        streamed_free(s);
        d->streamed = NULL;
    }
    return 0;
}

// ---- the plan -----------------------------------------------------------------------------------

struct weights *streamed_part(struct dit *d, enum part part)
{
    struct weights *all[PARTS] = {&d->w, &d->low, &d->g, &d->m, &d->v, &d->ema};
    return all[part]->blocks ? all[part] : NULL;
}

// Elements of the gu matrices of a block in a buffer: down begins at a multiple of the alignment.
static int64_t rounded(const struct dit *d, int64_t count, enum dtype type)
{
    const int64_t unit = (int64_t)(d->ctx.dev->info.align / dtype_size(type));
    return unit > 1 ? (count + unit - 1) / unit * unit : count;
}

static int64_t buffer_count(struct dit *d, enum dtype type)
{
    int64_t most = 0;
    for (int l = 0; l < d->config.layers; l++) {
        if (!d->streamed->blocks[l].here)
            continue;
        const int64_t count = rounded(d, tensor_count(streamed_gu(&d->w, l)), type) +
                              tensor_count(streamed_down(&d->w, l));
        most = count > most ? count : most;
    }
    return most;
}

static int view(struct dit *d, const struct tensor *buffer, int layer, struct matrices *out)
{
    const struct tensor *gu = streamed_gu(&d->w, layer), *down = streamed_down(&d->w, layer);
    TRY(plan_view(d->plan, buffer, 0, &out->gu, gu->ndim, gu->shape));
    return plan_view(d->plan, buffer, rounded(d, tensor_count(gu), buffer->dtype), &out->down,
                     down->ndim, down->shape);
}

static size_t page_round(uint64_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return ((size_t)bytes + page - 1) / page * page;
}

static int plan_buffers(struct dit *d)
{
    struct streamed *s = d->streamed;
    const enum dtype type = d->half ? BF16 : F32;
    const int end = time_backward(d, -1, PHASES);
    for (int k = 0; k < TURNS; k++) {
        TRY(PLAN_TENSOR(d->plan, "experts", PLAN_STREAMED, type, 0, PLAN_FOREVER,
                        &s->weights[k].whole, buffer_count(d, type)));
        if (d->options.train)
            TRY(PLAN_TENSOR(d->plan, "experts' gradients", PLAN_ACTIVATIONS, F32,
                            time_backward(d, d->config.layers, 0), end, &s->gradients[k].whole,
                            buffer_count(d, F32)));
    }
    for (int l = 0; l < d->config.layers; l++)
        for (int k = 0; s->blocks[l].here && k < TURNS; k++) {
            TRY(view(d, &s->weights[k].whole, l, &s->blocks[l].w[k]));
            if (d->options.train)
                TRY(view(d, &s->gradients[k].whole, l, &s->blocks[l].g[k]));
        }
    return 0;
}

int streamed_plan(struct dit *d)
{
    struct streamed *s = d->streamed;
    if (!s)
        return 0;
    for (int l = 0; l < d->config.layers; l++) {
        struct streamed_block *b = &s->blocks[l];
        if (!b->here)
            continue;
        b->count = tensor_count(streamed_gu(&d->w, l)) + tensor_count(streamed_down(&d->w, l));
        for (int part = 0; part < PARTS; part++) {
            struct weights *w = streamed_part(d, (enum part)part);
            if (!w)
                continue;
            streamed_gu(w, l)->home = &b->gu[part];
            streamed_down(w, l)->home = &b->down[part];
            s->bytes += (uint64_t)b->count * dtype_size(streamed_gu(w, l)->dtype);
            s->piece_count++;
        }
    }
    s->bytes += (uint64_t)s->piece_count * page_round(1); // each begins a page
    TRY(plan_buffers(d));
    return d->options.optimiser ? streamed_plan_update(d) : 0;
}

// ---- host memory --------------------------------------------------------------------------------

// DITMOE_HOST_MEMORY=BYTES: as if there were no more, for tests.
static uint64_t memory_of_host(void)
{
    const char *asked = getenv("DITMOE_HOST_MEMORY");
    return asked ? strtoull(asked, NULL, 10) : host_memory("");
}

struct wish {
    int32_t machine, padding;
    uint64_t bytes;
};

// What the ranks of this machine want of its memory in all. A collective call.
static int wanted_here(const struct dit *d, uint64_t *out)
{
    struct exchange *x = d->options.ranks ? d->options.ranks->exchange : NULL;
    struct wish mine = {.bytes = d->streamed ? d->streamed->bytes : 0};
    *out = mine.bytes;
    if (!x)
        return 0;
    struct wish *all = calloc((size_t)exchange_ranks(x), sizeof *all);
    if (!all)
        return fail(ERR_NOMEM, "no host memory for %d ranks", exchange_ranks(x));
    mine.machine = exchange_machine(x);
    int code = exchange_gather(x, &mine, all, sizeof mine);
    *out = 0;
    for (int r = 0; r < exchange_ranks(x); r++)
        *out += all[r].machine == mine.machine ? all[r].bytes : 0;
    free(all);
    return code;
}

// `have` and `wanted`: of the machine, before any of its ranks took some.
static int take_memory(const struct dit *d, uint64_t have, uint64_t wanted)
{
    struct streamed *s = d->streamed;
    const double gib = 1 << 30;
    if (wanted > have)
        return fail(ERR_NOMEM,
                    "experts of %d blocks need %.1f GiB of the host's memory%s, and %.1f GiB are "
                    "free: %.0f MiB are missing; stream fewer (--offload), or spread them over "
                    "more machines",
                    s->count, (double)wanted / gib,
                    wanted > s->bytes ? " with those of the machine's other ranks" : "",
                    (double)have / gib, mib(wanted - have));
    void *at = mmap(NULL, (size_t)s->bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return fail(ERR_NOMEM, "the host gives no %.1f GiB of memory for experts",
                    (double)s->bytes / gib);
    s->memory = at;
    madvise(at, (size_t)s->bytes, MADV_HUGEPAGE); // a wish
    return 0;
}

// What the device cannot lock is copied more slowly.
static void lock(const struct dit *d, unsigned char *at, size_t bytes)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    if (api->pin && api->pin(d->ctx.dev, at, bytes) >= 0)
        s->locked[s->locked_count++] = at;
}

static int settle_in(struct dit *d)
{
    struct streamed *s = d->streamed;
    unsigned char *at = s->memory;
    s->locked = calloc((size_t)s->piece_count, sizeof *s->locked);
    if (!s->locked)
        return fail(ERR_NOMEM, "no host memory for %d pieces", s->piece_count);
    for (int l = 0; l < d->config.layers; l++) {
        struct streamed_block *b = &s->blocks[l];
        for (int part = 0; b->here && part < PARTS; part++) {
            struct weights *w = streamed_part(d, (enum part)part);
            if (!w)
                continue;
            b->gu[part].at = at;
            b->down[part].at = at + tensor_bytes(streamed_gu(w, l));
            const size_t bytes =
                page_round((uint64_t)b->count * dtype_size(streamed_gu(w, l)->dtype));
            lock(d, at, bytes);
            at += bytes;
        }
    }
    return 0;
}

static int new_events(struct dit *d)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    struct device *dev = d->ctx.dev;
    for (int k = 0; k < TURNS; k++)
        for (int g = 0; g < 2; g++) {
            struct buffer *b = g ? &s->gradients[k] : &s->weights[k];
            TRY(api->event_new(dev, &b->full));
            TRY(api->event_new(dev, &b->used));
        }
    for (int l = 0; l < d->config.layers; l++)
        for (int back = 0; s->blocks[l].here && back < 2; back++) {
            TRY(api->event_new(dev, &s->blocks[l].before[back]));
            TRY(api->event_new(dev, &s->blocks[l].after[back]));
        }
    TRY(api->event_new(dev, &s->free));
    return api->event_new(dev, &s->settled);
}

int streamed_commit(struct dit *d)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    const uint64_t have = memory_of_host();
    uint64_t wanted;
    TRY(wanted_here(d, &wanted));
    if (!s)
        return 0;
    TRY(take_memory(d, have, wanted));
    TRY(settle_in(d));
    s->layers = d->config.layers;
    s->dev = d->ctx.dev;
    TRY(api->stream_new(d->ctx.dev, &s->in));
    TRY(api->stream_new(d->ctx.dev, &s->out));
    TRY(new_events(d));
    return d->options.optimiser ? streamed_commit_update(d) : 0;
}

static void free_events(struct streamed *s, const struct backend *api)
{
    for (int k = 0; k < TURNS; k++) {
        api->event_free(s->weights[k].full), api->event_free(s->weights[k].used);
        api->event_free(s->gradients[k].full), api->event_free(s->gradients[k].used);
    }
    for (int l = 0; l < s->layers; l++)
        for (int back = 0; back < 2; back++) {
            api->event_free(s->blocks[l].before[back]);
            api->event_free(s->blocks[l].after[back]);
        }
    api->event_free(s->free), api->event_free(s->settled);
}

void streamed_free(struct streamed *s)
{
    if (!s)
        return;
    const struct backend *api = s->dev ? s->dev->api : NULL; // NULL: nothing was committed
    if (api) {
        if (s->in)
            api->stream_free(s->in);
        if (s->out)
            api->stream_free(s->out);
        free_events(s, api);
        streamed_free_update(s, api);
    }
    for (int i = 0; i < s->locked_count; i++)
        api->unpin(s->dev, s->locked[i]);
    if (s->memory)
        munmap(s->memory, (size_t)s->bytes);
    free(s->locked), free(s->blocks);
    free(s);
}

void streamed_zero_moments(struct dit *d)
{
    for (int l = 0; l < d->config.layers; l++)
        for (int part = PART_MOMENT1; streamed_block(d, l) && part <= PART_MOMENT2; part++) {
            struct streamed_block *b = &d->streamed->blocks[l];
            if (streamed_part(d, (enum part)part))
                memset(b->gu[part].at, 0, (size_t)b->count * sizeof(float));
        }
}

// ---- weights ------------------------------------------------------------------------------------

static uint64_t version_of(const struct streamed *s, int layer)
{
    const struct streamed_block *b = &s->blocks[layer];
    return b->gu[PART_WEIGHT].version + b->down[PART_WEIGHT].version;
}

// The buffer that has the weights of a block as they are now, or -1.
static int find(const struct streamed *s, int layer)
{
    for (int k = 0; k < TURNS; k++)
        if (s->weights[k].layer == layer && s->weights[k].version == version_of(s, layer))
            return k;
    return -1;
}

static int load(struct dit *d, int layer, int k)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    struct streamed_block *b = &s->blocks[layer];
    struct buffer *to = &s->weights[k];
    const struct matrices *m = &b->w[k];
    to->layer = layer;
    to->version = version_of(s, layer);
    TRY(api->wait(s->in, to->used));
    TRY(api->write_begin(s->in, m->gu.mem, 0, b->gu[PART_WEIGHT].at, tensor_bytes(&m->gu)));
    TRY(api->write_begin(s->in, m->down.mem, 0, b->down[PART_WEIGHT].at, tensor_bytes(&m->down)));
    return api->record(s->in, to->full);
}

// The block that is used after `layer`, or -1: none that can be known. A sampler's next pass begins
// again.
static int next_block(const struct dit *d, int layer)
{
    const struct streamed *s = d->streamed;
    const int layers = d->config.layers, step = s->backward ? -1 : 1;
    for (int l = layer + step; l >= 0 && l < layers; l += step)
        if (s->blocks[l].here)
            return l;
    if (d->options.train)
        return -1;
    int l = 0;
    while (!s->blocks[l].here)
        l++;
    return l;
}

int streamed_begin(struct dit *d, bool backward)
{
    struct streamed *s = d->streamed;
    if (!s || d->ctx.dry)
        return 0;
    s->backward = backward;
    const int first = next_block(d, backward ? d->config.layers : -1);
    return first >= 0 && find(s, first) < 0 ? load(d, first, s->last ^ 1) : 0;
}

int streamed_use(struct dit *d, int layer)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    if (!streamed_block(d, layer) || d->ctx.dry)
        return 0;
    struct streamed_block *b = &s->blocks[layer];
    int k = find(s, layer);
    if (k < 0)
        TRY(load(d, layer, k = s->last ^ 1));
    TRY(api->record(d->ctx.stream, b->before[s->backward]));
    TRY(api->wait(d->ctx.stream, s->weights[k].full));
    TRY(api->record(d->ctx.stream, b->after[s->backward]));
    b->waited[s->backward] = true;
    streamed_gu(&d->w, layer)->mem = b->w[k].gu.mem;
    streamed_down(&d->w, layer)->mem = b->w[k].down.mem;
    s->last = k;
    const int next = next_block(d, layer);
    return next >= 0 && find(s, next) < 0 ? load(d, next, k ^ 1) : 0;
}

int streamed_used(struct dit *d, int layer)
{
    struct streamed *s = d->streamed;
    if (!streamed_block(d, layer) || d->ctx.dry)
        return 0;
    return d->ctx.dev->api->record(d->ctx.stream, s->weights[s->last].used);
}

// ---- gradients ----------------------------------------------------------------------------------

int streamed_use_gradients(struct dit *d, int layer)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    if (!streamed_block(d, layer) || d->ctx.dry)
        return 0;
    const int k = s->last_gradient ^= 1;
    const struct matrices *m = &s->blocks[layer].g[k];
    struct tensor *gu = streamed_gu(&d->g, layer), *down = streamed_down(&d->g, layer);
    gu->mem = m->gu.mem;
    down->mem = m->down.mem;
    TRY(api->wait(d->ctx.stream, s->gradients[k].used)); // copied out
    if (d->ctx.fresh_gradients)
        return 0;
    // added to what earlier micro-batches left
    TRY(api->write_begin(s->out, gu->mem, 0, gu->home->at, tensor_bytes(gu)));
    TRY(api->write_begin(s->out, down->mem, 0, down->home->at, tensor_bytes(down)));
    TRY(api->record(s->out, s->gradients[k].used));
    return api->wait(d->ctx.stream, s->gradients[k].used);
}

int streamed_gradients(struct dit *d, int layer, struct tensor *control, bool complete)
{
    struct streamed *s = d->streamed;
    struct context *c = &d->ctx;
    const struct backend *api = c->dev->api;
    if (!streamed_block(d, layer))
        return 0;
    struct buffer *b = &s->gradients[s->last_gradient];
    const struct tensor *gu = streamed_gu(&d->g, layer), *down = streamed_down(&d->g, layer);
    if (complete) {
        TRY(op_norm2(c, control, gu, s->normed));
        TRY(op_norm2(c, control, down, true));
    }
    s->normed = complete;
    TRY(api->record(c->stream, b->full));
    TRY(api->wait(s->out, b->full));
    TRY(api->read_begin(s->out, gu->mem, 0, gu->home->at, tensor_bytes(gu)));
    TRY(api->read_begin(s->out, down->mem, 0, down->home->at, tensor_bytes(down)));
    return api->record(s->out, b->used);
}

int streamed_end_backward(struct dit *d)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    if (!s || d->ctx.dry)
        return 0;
    s->normed = false;
    TRY(api->record(d->ctx.stream, s->free));
    TRY(api->record(s->out, s->settled));
    return api->wait(d->ctx.stream, s->settled);
}

// ---- figures ------------------------------------------------------------------------------------

struct streamed_figures streamed_figures(const struct dit *d)
{
    const struct streamed *s = d->streamed;
    struct streamed_figures f = {0};
    if (!s)
        return f;
    const uint64_t weight = d->half ? 2 : 4;
    uint64_t kept = 0; // of the last blocks, which are still there when the backward pass begins
    for (int l = d->config.layers - 1, seen = 0; l >= 0; l--) {
        if (!s->blocks[l].here)
            continue;
        const uint64_t count = (uint64_t)s->blocks[l].count;
        f.experts += held(d, l);
        f.in += weight * count;
        kept += seen++ < TURNS ? weight * count : 0;
        if (!d->options.train)
            continue;
        f.in += weight * count;
        f.out += 4 * count;
        if (d->options.optimiser)
            f.in += 20 * count, f.out += 16 * count;
    }
    if (d->options.train || s->count <= TURNS)
        f.in -= kept;
    f.blocks = s->count;
    f.of = streamed_most(d);
    f.host = s->bytes;
    f.locked = !d->ctx.dev->api->pin || !s->dev || s->locked_count == s->piece_count;
    return f;
}

int streamed_waited(struct dit *d, double *seconds)
{
    struct streamed *s = d->streamed;
    const struct backend *api = d->ctx.dev->api;
    double part = 0;
    *seconds = 0;
    if (!s)
        return 0;
    for (int l = 0; l < d->config.layers; l++)
        for (int back = 0; back < 2; back++) {
            if (!s->blocks[l].waited[back])
                continue;
            TRY(api->elapsed(s->blocks[l].before[back], s->blocks[l].after[back], &part));
            *seconds += part;
            s->blocks[l].waited[back] = false;
        }
    if (s->updated) {
        TRY(api->elapsed(s->update_began, s->update_ended, &part));
        *seconds += part;
        s->updated = false;
    }
    return 0;
}
