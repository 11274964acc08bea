#include "model/moe_exchange_internal.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/window.h"

enum { COUNTS_TAG = 32766 };

// ---- who has what -------------------------------------------------------------------------------

int moe_owner(const struct moe_exchange *m, int source, int layer, int expert)
{
    return *placement_owner(m->place, m->place->group[source], layer, expert);
}

int64_t moe_all_tokens(const struct dit *d)
{
    return d->moe ? d->moe->all_tokens : d->options.batch * (int64_t)config_tokens(&d->config);
}

int moe_first_image(const struct dit *d)
{
    return d->moe ? d->moe->first_image : 0;
}

// Rows that can come to a rank in a layer at most, and when all experts are used alike.
static void bounds(const struct moe_exchange *m, int topk, int rank, int layer, int64_t *most,
                   double *even)
{
    *most = 0, *even = 0;
    for (int s = 0; s < m->ranks; s++) {
        int held = 0;
        for (int e = 0; e < m->experts; e++)
            held += moe_owner(m, s, layer, e) == rank;
        *most += m->tokens[s] * (held < topk ? held : topk);
        *even += (double)m->tokens[s] * topk * held / m->experts;
    }
}

static int64_t room_for(int64_t most, double even, double headroom)
{
    return headroom > 0 && headroom * even + 1 < (double)most ? (int64_t)(headroom * even) + 1
                                                              : most;
}

// ---- making it ----------------------------------------------------------------------------------

static int make_layers(struct moe_exchange *m, const struct config *c, double headroom)
{
    int64_t most;
    double even;
    for (int l = 0; l < c->layers; l++) {
        struct layer *y = &m->layers[l];
        if (!config_is_moe(c, l))
            continue;
        y->experts = calloc((size_t)m->experts, sizeof *y->experts);
        y->counts = calloc((size_t)m->ranks * (size_t)m->experts, sizeof *y->counts);
        if (!y->experts || !y->counts)
            return fail(ERR_NOMEM, "no host memory for the places of %d experts", m->experts);
        y->held = placement_list(m->place, m->rank, l, y->experts);
        y->own = calloc((size_t)m->experts, sizeof *y->own);
        y->served = calloc((size_t)y->held * (size_t)m->ranks + 1, sizeof *y->served);
        if (!y->own || !y->served)
            return fail(ERR_NOMEM, "no host memory for the rows of %d ranks", m->ranks);
        bounds(m, c->topk, m->rank, l, &most, &even);
        y->room = room_for(most, even, headroom);
    }
    return 0;
}

static int find_apart(struct moe_exchange *m)
{
    bool any = false;
    m->apart = calloc((size_t)m->ranks, sizeof *m->apart);
    if (!m->apart)
        return fail(ERR_NOMEM, "no host memory for %d ranks", m->ranks);
    for (int r = 0; r < m->ranks; r++)
        any |= m->apart[r] = placement_nothing(m->place, r);
    if (!any) {
        free(m->apart);
        m->apart = NULL;
    }
    return 0;
}

static int make(struct moe_exchange *m, struct dit *d, const struct dit_ranks *o)
{
    const struct config *c = &d->config;
    const size_t sets = d->options.recompute ? 1 : (size_t)c->layers;
    m->exchange = o->exchange;
    m->roads = o->roads;
    m->place = o->placement;
    m->rank = exchange_rank(o->exchange);
    m->ranks = o->placement->ranks;
    m->experts = c->experts;
    m->tokens = calloc((size_t)m->ranks, sizeof *m->tokens);
    m->layers = calloc((size_t)c->layers, sizeof *m->layers);
    m->served = calloc(sets, sizeof *m->served);
    m->numbers = calloc((size_t)m->experts + 1, sizeof *m->numbers);
    m->own_at = calloc((size_t)m->ranks, sizeof *m->own_at);
    m->served_at = calloc((size_t)m->ranks, sizeof *m->served_at);
    if (!m->tokens || !m->layers || !m->served || !m->numbers || !m->own_at || !m->served_at)
        return fail(ERR_NOMEM, "no host memory for an exchange of %d layers", c->layers);
    for (int r = 0; r < m->ranks; r++) {
        m->by_host = m->by_host || (r != m->rank && !roads_straight(m->roads, r));
        m->tokens[r] = (int64_t)o->placement->share[r] * o->copies * config_tokens(c);
        m->all_tokens += m->tokens[r];
        m->first_image += r < m->rank ? o->placement->share[r] : 0;
    }
    BUG_IF(o->placement->share[m->rank] * o->copies != d->options.batch);
    TRY(find_apart(m));
    TRY(make_layers(m, c, o->headroom));
    return transfers_new(m->exchange, &m->transfers);
}

int moe_exchange_new(struct dit *d)
{
    if (!d->options.ranks)
        return 0;
    d->moe = calloc(1, sizeof *d->moe);
    if (!d->moe)
        return fail(ERR_NOMEM, "no host memory for an exchange");
    return make(d->moe, d, d->options.ranks);
}

int moe_exchange_windows(struct dit *d)
{
    return d->moe ? peer_windows_new(d->options.ranks->peers, d->plan, &d->moe->windows) : 0;
}

struct peer_windows *moe_windows(const struct dit *d)
{
    return d->moe ? d->moe->windows : NULL;
}

bool moe_exchange_recorded(const struct dit *d)
{
    return !d->streamed && (!d->moe || d->moe->windows);
}

void moe_exchange_free(struct moe_exchange *m)
{
    if (!m)
        return;
    for (int l = 0; m->layers && l < m->place->layers; l++)
        free(m->layers[l].experts), free(m->layers[l].counts), free(m->layers[l].own),
            free(m->layers[l].served);
    transfers_free(m->transfers);
    peer_windows_free(m->windows);
    window_close(m->out), window_close(m->in);
    free(m->apart), free(m->tokens), free(m->layers), free(m->served), free(m->numbers);
    free(m->own_at), free(m->served_at);
    free(m);
}

// ---- the plan -----------------------------------------------------------------------------------

struct served *moe_served(struct dit *d, int layer)
{
    return &d->moe->served[d->options.recompute ? 0 : layer];
}

static size_t row_bytes(const struct dit *d)
{
    return (size_t)d->config.hidden * dtype_size(d->ctx.dev->act);
}

int64_t moe_room(const struct dit *d, int layer)
{
    const struct moe_exchange *m = d->moe;
    const bool shared = d->options.recompute || (m->windows && !d->options.train);
    int64_t most = 0;
    for (int l = 0; l < d->config.layers; l++)
        if ((l == layer || shared) && m->layers[l].room > most)
            most = m->layers[l].room;
    return most;
}

// Host memory for rows on their way: room for the layer with the most. Made at the first exchange,
// which all ranks reach.
static int open_windows(struct dit *d)
{
    struct moe_exchange *m = d->moe;
    struct context *c = &d->ctx;
    const size_t own = (size_t)(m->tokens[m->rank] * d->config.topk) * row_bytes(d);
    if (m->out || !m->by_host)
        return 0;
    TRY(window_open(m->exchange, c->dev, c->stream, own, &m->out));
    TRY(window_open(m->exchange, c->dev, c->stream, m->in_bytes, &m->in));
    window_apart(m->out, m->apart), window_apart(m->in, m->apart);
    return 0;
}

// The shared expert's work comes between sending rows and the experts' work on them, in the
// backward pass too: what is kept for that, and its scratch, lives through phases 0 to 4 there.
static int plan_backward(struct dit *d, int layer)
{
    struct layer *y = &d->moe->layers[layer];
    const enum dtype act = d->ctx.dev->act;
    const int from = time_backward(d, layer, 0), to = time_backward(d, layer, 4);
    const int64_t H = y->room, D = d->config.hidden, F = MLP_RATIO * D;
    if (!d->moe->windows)
        TRY(PLAN_TENSOR(d->plan, "served.dy", PLAN_ACTIVATIONS, act, from, to, &y->dy, H, D));
    const bool gelu = d->config.expert == EXPERT_GELU;
    if (gelu || !op_swiglu_fuses(&d->ctx, F))
        TRY(PLAN_TENSOR(d->plan, "served.dhidden", PLAN_ACTIVATIONS, act, from, to, &y->dhidden, H,
                        F));
    if (!gelu && d->lean && op_swiglu_rebuilds(&d->ctx, F))
        TRY(PLAN_TENSOR(d->plan, "served.hidden again", PLAN_ACTIVATIONS, act, from, to, &y->hidden,
                        H, F));
    return 0;
}

int moe_exchange_plan(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct served *s = moe_served(d, layer);
    const enum dtype act = d->ctx.dev->act;
    const int64_t H = moe_room(d, layer), D = d->config.hidden, F = MLP_RATIO * D;
    const bool train = d->options.train;
    const bool gelu = d->config.expert == EXPERT_GELU;
    const bool again = !gelu && d->lean && op_swiglu_rebuilds(&d->ctx, F);
    if ((size_t)H * row_bytes(d) > m->in_bytes)
        m->in_bytes = (size_t)H * row_bytes(d);
    TRY(PLAN_TENSOR(d->plan, "served.offsets", PLAN_ACTIVATIONS, I32, 0, PLAN_FOREVER,
                    &m->layers[layer].offsets, m->layers[layer].held + 1));
    if (train)
        TRY(plan_backward(d, layer));
    if (m->windows)
        TRY(moe_peers_plan(d, layer));
    if (s->hidden.ndim)
        return 0;
    if (!m->windows)
        ACTIVATION(d, layer, "served.rows", act, 3, 3, 4, &s->rows, H, D);
    if (train || (!gelu && !op_swiglu_fuses(&d->ctx, F)))
        ACTIVATION(d, layer, "served.gu", act, 3, 3, 4, &s->gu, H, gelu ? F : 2 * F);
    ACTIVATION(d, layer, "served.hidden", act, 3, 4, again ? NEVER : 4, &s->hidden, H, F);
    ACTIVATION(d, layer, "served.y", act, 4, 4, NEVER, &s->y, H, D);
    return 0;
}

// ---- counts -------------------------------------------------------------------------------------

// How the rows of this pass lie: at their sources by expert, at the owners by expert and source.
static void list_segments(struct moe_exchange *m, int layer)
{
    struct layer *y = &m->layers[layer];
    const int E = m->experts;
    int held = 0;
    y->own_count = y->served_count = 0;
    memset(m->own_at, 0, (size_t)m->ranks * sizeof *m->own_at);
    memset(m->served_at, 0, (size_t)m->ranks * sizeof *m->served_at);
    for (int e = 0; e < E; e++) {
        if (held < y->held && y->experts[held] == e)
            m->numbers[held++] = (int32_t)m->served_at[m->rank];
        for (int s = 0; s < m->ranks; s++) {
            const int64_t rows = y->counts[s * E + e];
            const int owner = moe_owner(m, s, layer, e);
            int64_t *own = &m->own_at[s], *served = &m->served_at[owner];
            if (rows && s == m->rank)
                y->own[y->own_count++] = (struct segment){e, owner, *own, rows, *served};
            if (rows && owner == m->rank)
                y->served[y->served_count++] = (struct segment){e, s, *served, rows, *own};
            *own += rows;
            *served += rows;
        }
    }
    y->rows = m->served_at[m->rank];
    m->numbers[y->held] = (int32_t)y->rows;
}

// Every rank knows all counts, so all say the same when the rows of one have no room.
static int check_room(const struct dit *d, int layer)
{
    const struct moe_exchange *m = d->moe;
    const struct layer *y = &m->layers[layer];
    const double headroom = d->options.ranks->headroom;
    for (int r = 0; r < m->ranks && headroom > 0; r++) {
        int64_t most, rows = 0;
        double even;
        bounds(m, d->config.topk, r, layer, &most, &even);
        for (int s = 0; s < m->ranks; s++)
            for (int e = 0; e < m->experts; e++)
                rows += moe_owner(m, s, layer, e) == r ? y->counts[s * m->experts + e] : 0;
        const int64_t room = room_for(most, even, headroom);
        if (rows > room)
            return fail(ERR_NOMEM,
                        "layer %d: %lld rows for the experts of rank %d, which has room for %lld; "
                        "--headroom %.1f or more is needed (0: room for any)",
                        layer, (long long)rows, r, (long long)room, (double)rows / even + 0.05);
    }
    return 0;
}

// fraction[E] of the balance loss (op_balance) over all ranks' tokens, in place of this rank's own.
static int write_fractions(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    const struct layer *y = &m->layers[layer];
    struct block_route *r = &d->routes[layer];
    const int E = m->experts;
    const double choices = (double)m->all_tokens * d->config.topk;
    float *fraction = (float *)(void *)m->numbers; // [E], 4 bytes each as well
    if (!r->fraction.ndim || d->config.balance_per_sequence || d->options.batch == 0)
        return 0;
    for (int e = 0; e < E; e++) {
        double sum = 0;
        for (int s = 0; s < m->ranks; s++)
            sum += y->counts[s * E + e];
        fraction[e] = (float)(sum * E / choices);
    }
    return tensor_write(&d->ctx, &r->fraction, fraction);
}

// all[ranks][E] from every rank's mine[E]; where some keep out, the others tell each other.
static int gather_counts(struct moe_exchange *m, const int32_t *mine, int32_t *all)
{
    const int E = m->experts;
    const size_t bytes = (size_t)E * sizeof *mine;
    if (!m->apart)
        return exchange_gather(m->exchange, mine, all, bytes);
    memcpy(all + m->rank * E, mine, bytes);
    for (int r = 0; r < m->ranks; r++) {
        if (r == m->rank || m->apart[r] || m->apart[m->rank])
            continue;
        TRY(exchange_receive(m->transfers, all + r * E, bytes, r, COUNTS_TAG));
        TRY(exchange_send(m->transfers, mine, bytes, r, COUNTS_TAG));
    }
    return exchange_wait(m->transfers);
}

static int exchange_counts(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer];
    const int E = m->experts;
    int32_t mine[512] = {0};
    BUG_IF(E > 512);
    if (d->options.batch > 0) {
        TRY(tensor_read(&d->ctx, &d->routes[layer].offsets, m->numbers));
        for (int e = 0; e < E; e++)
            mine[e] = m->numbers[e + 1] - m->numbers[e];
    }
    exchange_doing(m->exchange, "waiting for the counts of rows", layer);
    TRY(gather_counts(m, mine, y->counts));
    TRY(check_room(d, layer));
    TRY(write_fractions(d, layer));
    list_segments(m, layer);
    TRY(open_windows(d));
    return tensor_write(&d->ctx, &y->offsets, m->numbers);
}

int moe_exchange_load(const struct dit *d, int layer, int32_t *load)
{
    const struct moe_exchange *m = d->moe;
    if (m->windows)
        return moe_peers_load(d, layer, load);
    for (int e = 0; e < m->experts; e++) {
        load[e] = 0;
        for (int s = 0; s < m->ranks; s++)
            load[e] += m->layers[layer].counts[s * m->experts + e];
    }
    return 0;
}

// ---- rows on their way --------------------------------------------------------------------------

// One end of a journey: segments in a device tensor, and the host memory that they pass through.
struct end {
    const struct segment *list;
    int count;
    struct tensor *rows;
    struct window *host;
};

static struct end own_end(struct dit *d, int layer, struct tensor *rows)
{
    const struct layer *y = &d->moe->layers[layer];
    return (struct end){y->own, y->own_count, rows, d->moe->out};
}

static struct end served_end(struct dit *d, int layer, struct tensor *rows)
{
    const struct layer *y = &d->moe->layers[layer];
    return (struct end){y->served, y->served_count, rows, d->moe->in};
}

// The peer of a segment is this rank, or reached straight, or by a window, or by messages.
enum road { OWN, STRAIGHT, WINDOW, MESSAGES };

static enum road road_of(const struct moe_exchange *m, const struct segment *s)
{
    if (s->peer == m->rank)
        return OWN;
    if (roads_straight(m->roads, s->peer))
        return STRAIGHT;
    return window_of(m->out, s->peer) ? WINDOW : MESSAGES;
}

static bool any_on(const struct moe_exchange *m, const struct end *e, enum road road)
{
    bool any = false;
    for (int i = 0; i < e->count; i++)
        any = any || road_of(m, &e->list[i]) == road;
    return any;
}

// Both ends list what passes between two ranks by expert: so it is matched by its order.
static int depart_straight(struct dit *d, const struct end *from, const struct end *to)
{
    struct moe_exchange *m = d->moe;
    const size_t row = row_bytes(d);
    int code = roads_begin(m->roads, LANE_ROWS);
    for (int i = 0; i < to->count && code >= 0; i++) {
        const struct segment *s = &to->list[i];
        if (road_of(m, s) == STRAIGHT)
            code = roads_receive(m->roads, LANE_ROWS, to->rows->mem, (size_t)s->at * row,
                                 (size_t)s->rows * row, s->peer);
    }
    for (int i = 0; i < from->count && code >= 0; i++) {
        const struct segment *s = &from->list[i];
        if (road_of(m, s) == STRAIGHT)
            code = roads_send(m->roads, LANE_ROWS, from->rows->mem, (size_t)s->at * row,
                              (size_t)s->rows * row, s->peer);
    }
    TRY(code);
    return roads_end(m->roads, LANE_ROWS);
}

// Begins to send what lies at `from` to other ranks and expects what comes to `to`. What does not
// go straight is copied to the host's memory beside what the device is given next.
static int depart(struct dit *d, const struct end *from, const struct end *to)
{
    struct moe_exchange *m = d->moe;
    const size_t row = row_bytes(d);
    if (any_on(m, from, STRAIGHT) || any_on(m, to, STRAIGHT))
        TRY(depart_straight(d, from, to));
    if (!m->by_host)
        return 0;
    for (int i = 0; i < to->count; i++) {
        const struct segment *s = &to->list[i];
        if (road_of(m, s) == MESSAGES)
            TRY(exchange_receive(m->transfers,
                                 window_of(to->host, m->rank) + (size_t)s->at * row,
                                 (size_t)s->rows * row, s->peer, s->expert));
    }
    TRY(window_after(from->host));
    for (int i = 0; i < from->count; i++) {
        const struct segment *s = &from->list[i];
        const size_t at = (size_t)s->at * row;
        if (road_of(m, s) >= WINDOW)
            TRY(window_take(from->host, from->rows->mem, at, at, (size_t)s->rows * row));
    }
    return 0;
}

// What depart() copied is there: sends it, or says so. Every rank that sees this one's windows
// meets it here in every journey, also with no rows for it. So a window is free again when its next
// turn comes: between its two turns lies a journey the other way, of which nobody speaks before his
// device has done with this one.
static int send_off(struct moe_exchange *m, const struct end *from, size_t row)
{
    if (!m->by_host)
        return 0;
    TRY(window_done(from->host));
    TRY(window_meet(from->host, m->transfers));
    for (int i = 0; i < from->count; i++) {
        const struct segment *s = &from->list[i];
        if (road_of(m, s) == MESSAGES)
            TRY(exchange_send(m->transfers,
                              window_of(from->host, m->rank) + (size_t)s->at * row,
                              (size_t)s->rows * row, s->peer, s->expert));
    }
    return 0;
}

// Rows that this rank has for its own experts: both ends list them by expert.
static int copy_own(struct dit *d, const struct end *from, const struct end *to)
{
    const struct moe_exchange *m = d->moe;
    struct context *c = &d->ctx;
    const size_t row = row_bytes(d);
    int j = 0;
    for (int i = 0; i < from->count; i++) {
        const struct segment *s = &from->list[i];
        if (s->peer != m->rank)
            continue;
        while (to->list[j].peer != m->rank)
            j++;
        BUG_IF(to->list[j].expert != s->expert || to->list[j].rows != s->rows);
        TRY(c->dev->api->copy(c->stream, to->rows->mem, (size_t)to->list[j++].at * row,
                              from->rows->mem, (size_t)s->at * row, (size_t)s->rows * row));
    }
    return 0;
}

// Waits for what depart() began and has it put on the device.
static int arrive(struct dit *d, int layer, const struct end *from, const struct end *to)
{
    struct moe_exchange *m = d->moe;
    const size_t row = row_bytes(d);
    const double before = exchange_figures(m->exchange).waited;
    TRY(copy_own(d, from, to));
    TRY(send_off(m, from, row));
    if (any_on(m, from, STRAIGHT) || any_on(m, to, STRAIGHT))
        TRY(roads_join(m->roads, LANE_ROWS));
    TRY(exchange_wait(m->transfers));
    m->layers[layer].traffic.waited += exchange_figures(m->exchange).waited - before;
    for (int i = 0; i < to->count; i++) {
        const struct segment *s = &to->list[i];
        const size_t at = (size_t)s->at * row, there = (size_t)s->there * row;
        const size_t bytes = (size_t)s->rows * row;
        const enum road road = road_of(m, s);
        if (road == WINDOW) // the peer's memory of the same journey
            TRY(window_give(from->host, s->peer, there, to->rows->mem, at, bytes));
        else if (road == MESSAGES)
            TRY(window_give(to->host, m->rank, at, to->rows->mem, at, bytes));
    }
    return 0;
}

static int64_t remote_rows(const struct moe_exchange *m, const struct segment *list, int count)
{
    int64_t rows = 0;
    for (int i = 0; i < count; i++)
        rows += list[i].peer != m->rank ? list[i].rows : 0;
    return rows;
}

int moe_exchange_traffic(struct dit *d, int layer, struct moe_traffic *out)
{
    struct moe_traffic *t = &d->moe->layers[layer].traffic;
    if (d->moe->windows)
        return moe_peers_traffic(d, layer, out);
    *out = *t;
    *t = (struct moe_traffic){0};
    return 0;
}

int moe_exchange_waited(struct dit *d, double *seconds)
{
    *seconds = 0;
    if (!d->moe || !d->moe->windows)
        return d->moe ? roads_waited(d->moe->roads, LANE_ROWS, seconds) : 0;
    for (int l = 0; l < d->config.layers; l++) {
        struct moe_traffic m = {0};
        if (config_is_moe(&d->config, l))
            TRY(moe_peers_traffic(d, l, &m));
        *seconds += m.waited;
    }
    return 0;
}

// ---- the passes ---------------------------------------------------------------------------------

// The first `rows` rows of a tensor that has room for more.
static struct tensor first_rows(const struct tensor *t, int64_t rows)
{
    struct tensor part = *t;
    part.shape[0] = rows;
    return part;
}

static struct tensor *if_planned(struct tensor *t)
{
    return t->ndim ? t : NULL;
}

// Rows of the pass; all there is room for where only memory is planned or the host does not know. On
// GPUs in sixteenths of that, the last ones without meaning: products that are chosen by their
// shape then meet few of them.
static int64_t rows_now(const struct dit *d, int layer)
{
    const struct layer *y = &d->moe->layers[layer];
    const int64_t step = y->room / 16 + 1;
    if (d->ctx.dry || d->moe->windows)
        return y->room;
    if (d->ctx.dev->cpu_forms || y->rows == 0)
        return y->rows;
    const int64_t rows = (y->rows + step - 1) / step * step;
    return rows < y->room ? rows : y->room;
}

int moe_exchange_send(struct dit *d, int layer)
{
    struct layer *y = &d->moe->layers[layer];
    if (d->moe->windows)
        return moe_peers_send(d, layer);
    if (d->ctx.dry)
        return 0;
    TRY(exchange_counts(d, layer));
    y->traffic.sent += remote_rows(d->moe, y->own, y->own_count);
    y->traffic.received += remote_rows(d->moe, y->served, y->served_count);
    const struct end from = own_end(d, layer, &dit_act(d, layer)->rows);
    const struct end to = served_end(d, layer, &moe_served(d, layer)->rows);
    exchange_doing(d->moe->exchange, "sending rows to the experts", layer);
    return depart(d, &from, &to);
}

int moe_serve_forward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct served *s = moe_served(d, layer);
    const struct block_weights *w = &d->w.blocks[layer];
    const struct tensor *offsets = &d->moe->layers[layer].offsets;
    const int64_t n = rows_now(d, layer);
    struct tensor rows = first_rows(&s->rows, n), gu = first_rows(&s->gu, n);
    struct tensor hidden = first_rows(&s->hidden, n), y = first_rows(&s->y, n);
    if (n == 0)
        return 0;
    TRY(streamed_use(d, layer));
    if (d->config.expert == EXPERT_GELU) {
        const struct expert_rows r = {&rows, gu.ndim ? &gu : &hidden, &hidden, &y, offsets};
        TRY(gelu_experts_forward(c, w, &r));
        return streamed_used(d, layer);
    }
    TRY(op_experts_swiglu(c, &hidden, if_planned(&gu), &rows, &w->experts_gu, offsets));
    TRY(op_experts(c, &y, &hidden, &w->experts_down, offsets));
    return streamed_used(d, layer);
}

int moe_exchange_serve(struct dit *d, int layer)
{
    struct served *s = moe_served(d, layer);
    const struct end rows = own_end(d, layer, &dit_act(d, layer)->rows);
    const struct end y = own_end(d, layer, &dit_act(d, layer)->y);
    const struct end served = served_end(d, layer, &s->rows), done = served_end(d, layer, &s->y);
    if (d->moe->windows)
        return moe_peers_serve(d, layer);
    if (d->ctx.dry)
        return moe_serve_forward(d, layer);
    exchange_doing(d->moe->exchange, "waiting for rows for its experts", layer);
    TRY(arrive(d, layer, &rows, &served));
    TRY(moe_serve_forward(d, layer));
    return depart(d, &done, &y);
}

int moe_exchange_take(struct dit *d, int layer)
{
    const struct end y = own_end(d, layer, &dit_act(d, layer)->y);
    const struct end done = served_end(d, layer, &moe_served(d, layer)->y);
    if (d->moe->windows)
        return moe_peers_take(d, layer);
    if (d->ctx.dry)
        return 0;
    exchange_doing(d->moe->exchange, "waiting for the experts' results", layer);
    return arrive(d, layer, &done, &y);
}

int moe_exchange_send_back(struct dit *d, int layer)
{
    const struct end from = own_end(d, layer, &dit_act(d, layer)->y);
    const struct end to = served_end(d, layer, &d->moe->layers[layer].dy);
    if (d->moe->windows)
        return moe_peers_send_back(d, layer);
    if (d->ctx.dry)
        return 0;
    exchange_doing(d->moe->exchange, "sending gradients to the experts", layer);
    return depart(d, &from, &to);
}

// An expert without rows has a gradient of zero, also where products write gradients.
static int no_gradients(struct dit *d, int layer)
{
    struct block_weights *g = &d->g.blocks[layer];
    if (d->ctx.dry || !d->ctx.fresh_gradients || d->moe->layers[layer].held == 0)
        return 0;
    TRY(tensor_zero(&d->ctx, &g->experts_gu));
    return tensor_zero(&d->ctx, &g->experts_down);
}

// dy -> gradients; dy becomes d rows.
int moe_serve_backward(struct dit *d, int layer)
{
    struct context *c = &d->ctx;
    struct layer *l = &d->moe->layers[layer];
    struct served *s = moe_served(d, layer);
    struct block_weights *g = &d->g.blocks[layer];
    const struct block_weights *w = &d->w.blocks[layer];
    const int64_t n = rows_now(d, layer);
    struct tensor dy = first_rows(&l->dy, n), gu = first_rows(&s->gu, n);
    struct tensor rows = first_rows(&s->rows, n), dhidden = first_rows(&l->dhidden, n);
    struct tensor again = first_rows(&l->hidden, n), kept = first_rows(&s->hidden, n);
    TRY(streamed_use_gradients(d, layer));
    if (n == 0)
        return no_gradients(d, layer);
    TRY(streamed_use(d, layer));
    if (d->config.expert == EXPERT_GELU) {
        const struct expert_rows r = {&rows, &gu, &kept, &dy, &l->offsets};
        TRY(gelu_experts_backward(c, g, w, &r, &dhidden));
        return streamed_used(d, layer);
    }
    TRY(op_experts_swiglu_dx(c, &gu, if_planned(&dhidden), if_planned(&again), NULL, &dy,
                             &w->experts_down, &l->offsets));
    TRY(op_experts_dw(c, &g->experts_down, NULL, &dy, dit_kept(&kept, &again), &l->offsets));
    TRY(op_experts_dw(c, &g->experts_gu, NULL, &gu, &rows, &l->offsets));
    TRY(op_experts_dx(c, &dy, &gu, &w->experts_gu, &l->offsets));
    return streamed_used(d, layer);
}

int moe_exchange_serve_back(struct dit *d, int layer)
{
    const struct end y = own_end(d, layer, &dit_act(d, layer)->y);
    const struct end dy = served_end(d, layer, &d->moe->layers[layer].dy);
    if (d->moe->windows)
        return moe_peers_serve_back(d, layer);
    if (d->ctx.dry)
        return moe_serve_backward(d, layer);
    exchange_doing(d->moe->exchange, "waiting for gradients of its experts", layer);
    TRY(arrive(d, layer, &y, &dy));
    TRY(moe_serve_backward(d, layer));
    return depart(d, &dy, &y);
}

int moe_exchange_take_back(struct dit *d, int layer)
{
    const struct end y = own_end(d, layer, &dit_act(d, layer)->y);
    const struct end dy = served_end(d, layer, &d->moe->layers[layer].dy);
    if (d->moe->windows)
        return moe_peers_take(d, layer);
    if (d->ctx.dry)
        return 0;
    exchange_doing(d->moe->exchange, "waiting for the experts' gradients", layer);
    return arrive(d, layer, &dy, &y);
}
