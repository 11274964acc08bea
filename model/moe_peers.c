// The exchange of routed rows by peer windows (runtime/peers.h): what moe_exchange.c does, with no
// host in it. A layer's journeys: counts of rows, rows to the experts, results back; backward
// gradients to the experts and back.
//
// Why windows can be used again without a word. What others write here in a journey must be free
// from this rank's part in the journey before on. Forward, `rows` are read before results leave,
// and `y` before the next layer's counts; the backward pass reads `y` before it sends d y and `dy`
// before it sends d rows, which arrive in `y` again. So one of each would do for all layers; in
// training without recomputation each layer keeps its rows and y for the backward pass.
#include "model/moe_exchange_internal.h"

#include <stdlib.h>
#include <string.h>

// ---- the plan -----------------------------------------------------------------------------------

// Has every layer its own?
static bool kept(const struct dit *d)
{
    return d->options.train && !d->options.recompute;
}

// The first layer that was planned, whose windows the others share.
static int first_layer(const struct dit *d)
{
    int l = 0;
    while (!config_is_moe(&d->config, l))
        l++;
    return l;
}

// A window [rows,D] of activations, or a part of one that is there already.
static int plan_rows(struct dit *d, const char *name, int64_t rows, struct tensor *shared,
                     int shared_number, struct tensor *out, int *number)
{
    const int64_t D = d->config.hidden;
    const int64_t shape[] = {rows, D};
    if (shared) {
        *number = shared_number;
        return out->ndim ? 0 : plan_view(d->plan, shared, 0, out, 2, shape);
    }
    TRY(PLAN_TENSOR(d->plan, name, PLAN_WINDOWS, d->ctx.dev->act, 0, PLAN_FOREVER, out, rows, D));
    *number = peer_windows_add(d->moe->windows, PLAN_WINDOWS, out);
    return *number < 0 ? *number : 0;
}

static int plan_map(struct dit *d, int layer)
{
    const struct moe_exchange *m = d->moe;
    const int M = m->ranks, E = m->experts;
    struct peer_map *map = &m->layers[layer].map;
    TRY(PLAN_TENSOR(d->plan, "counts", PLAN_WINDOWS, I32, 0, PLAN_FOREVER, &map->counts, M, E));
    TRY(PLAN_TENSOR(d->plan, "owner", PLAN_INPUT, I32, 0, PLAN_FOREVER, &map->owner, M, E));
    TRY(PLAN_TENSOR(d->plan, "segments", PLAN_INPUT, I32, 0, PLAN_FOREVER, &map->segments, 2, M, E,
                    3));
    TRY(PLAN_TENSOR(d->plan, "traffic", PLAN_INPUT, I32, 0, PLAN_FOREVER, &map->traffic, 4));
    map->counts_number = peer_windows_add(m->windows, PLAN_WINDOWS, &map->counts);
    return map->counts_number < 0 ? map->counts_number : 0;
}

// The kernels take rows in units of 16 bytes, and tables that fit a multiprocessor.
static int check_sizes(const struct dit *d)
{
    const size_t row = (size_t)d->config.hidden * dtype_size(d->ctx.dev->act);
    if (row % 16 == 0 && d->moe->ranks * d->moe->experts <= 2048 && d->options.ranks->headroom <= 0)
        return 0;
    return fail(ERR_INPUT,
                "peer windows want rows of a multiple of 16 bytes, ranks times experts of 2048 at "
                "most, and no --headroom: use --fabric nccl or mpi");
}

int moe_peers_plan(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer], *first = &m->layers[first_layer(d)];
    struct served *s = moe_served(d, layer);
    struct block_act *a = dit_act(d, layer), *first_a = dit_act(d, first_layer(d));
    const int64_t R = m->tokens[m->rank] * d->config.topk;
    struct tensor *rows = kept(d) ? NULL : &moe_served(d, first_layer(d))->rows;
    int64_t most = 0;
    for (int l = 0; l < d->config.layers; l++)
        most = m->layers[l].room > most ? m->layers[l].room : most;
    TRY(check_sizes(d));
    TRY(plan_map(d, layer));
    if (layer == first_layer(d) || kept(d)) {
        TRY(plan_rows(d, "served.rows", moe_room(d, layer), NULL, 0, &s->rows, &y->rows_number));
        TRY(plan_rows(d, "experts.y", R, NULL, 0, &a->y, &y->y_number));
    } else {
        TRY(plan_rows(d, "", moe_room(d, layer), rows, first->rows_number, &s->rows,
                      &y->rows_number));
        TRY(plan_rows(d, "", R, &first_a->y, first->y_number, &a->y, &y->y_number));
    }
    if (!d->options.train)
        return 0;
    return plan_rows(d, "served.dy", layer == first_layer(d) ? most : y->room,
                     layer == first_layer(d) ? NULL : &first->dy, first->dy_number, &y->dy,
                     &y->dy_number);
}

// ---- the passes ---------------------------------------------------------------------------------

// At the first exchange, which all ranks reach: finds the others' windows, and tells the device who
// owns what.
static int meet(struct dit *d)
{
    struct moe_exchange *m = d->moe;
    if (m->met)
        return 0;
    TRY(peer_windows_meet(m->windows));
    int32_t *owner = calloc((size_t)m->ranks * (size_t)m->experts, sizeof *owner);
    int code = owner ? 0 : fail(ERR_NOMEM, "no host memory for %d experts", m->experts);
    for (int l = 0; l < d->config.layers && code >= 0; l++) {
        if (!config_is_moe(&d->config, l))
            continue;
        for (int s = 0; s < m->ranks; s++)
            for (int e = 0; e < m->experts; e++)
                owner[s * m->experts + e] = moe_owner(m, s, l, e);
        code = tensor_write(&d->ctx, &m->layers[l].map.owner, owner);
        if (code >= 0)
            code = tensor_zero(&d->ctx, &m->layers[l].map.traffic);
    }
    free(owner);
    m->met = code >= 0;
    return code;
}

int moe_peers_send(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer];
    struct block_route *r = &d->routes[layer];
    struct block_act *a = dit_act(d, layer);
    struct context *c = &d->ctx;
    const bool any = d->options.batch > 0;
    const bool balance = r->fraction.ndim && !d->config.balance_per_sequence && any;
    const float scale = (float)((double)m->experts / ((double)m->all_tokens * d->config.topk));
    if (!c->dry) {
        TRY(meet(d));
        TRY(peer_send_counts(c, m->windows, &y->map, any ? &r->offsets : NULL));
        TRY(peer_take_counts(c, m->windows, &y->map, &y->offsets, balance ? &r->fraction : NULL,
                             scale));
    }
    return peer_send_rows(c, m->windows, &y->map, PEER_OUT, y->rows_number, &a->h2, &a->token);
}

int moe_peers_serve(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer];
    TRY(peer_take_rows(&d->ctx, m->windows, &y->map));
    TRY(moe_serve_forward(d, layer));
    return peer_send_rows(&d->ctx, m->windows, &y->map, PEER_BACK, y->y_number,
                          &moe_served(d, layer)->y, NULL);
}

int moe_peers_send_back(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer];
    return peer_send_rows(&d->ctx, m->windows, &y->map, PEER_OUT, y->dy_number,
                          &dit_act(d, layer)->y, NULL);
}

int moe_peers_serve_back(struct dit *d, int layer)
{
    struct moe_exchange *m = d->moe;
    struct layer *y = &m->layers[layer];
    TRY(peer_take_rows(&d->ctx, m->windows, &y->map));
    TRY(moe_serve_backward(d, layer));
    return peer_send_rows(&d->ctx, m->windows, &y->map, PEER_BACK, y->y_number, &y->dy, NULL);
}

int moe_peers_take(struct dit *d, int layer)
{
    return peer_take_rows(&d->ctx, d->moe->windows, &d->moe->layers[layer].map);
}

// ---- what the host may look at ------------------------------------------------------------------

int moe_peers_load(const struct dit *d, int layer, int32_t *load)
{
    const struct moe_exchange *m = d->moe;
    struct context c = d->ctx;
    const int E = m->experts;
    int32_t *counts = m->layers[layer].counts;
    TRY(tensor_read(&c, &m->layers[layer].map.counts, counts));
    for (int e = 0; e < E; e++) {
        load[e] = 0;
        for (int s = 0; s < m->ranks; s++)
            load[e] += counts[s * E + e];
    }
    return 0;
}

int moe_peers_traffic(struct dit *d, int layer, struct moe_traffic *out)
{
    const struct tensor *traffic = &d->moe->layers[layer].map.traffic;
    uint32_t words[4] = {0};
    *out = (struct moe_traffic){0};
    if (!d->moe->met)
        return 0;
    TRY(tensor_read(&d->ctx, traffic, words));
    *out = (struct moe_traffic){words[0], words[1], 1e-6 * words[2]};
    return tensor_zero(&d->ctx, traffic);
}
