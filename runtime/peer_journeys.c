// Journeys between peer windows: peers.h; the kernels are in kernels.cl, "between ranks".
#include "runtime/ops_internal.h"
#include "runtime/peers.h"

#define WORDS(rank) ((union arg){.b = peer_windows_words(w, rank)})

enum { TABLE_MOST = 2048, EXPERTS_MOST = 512 };

// The ranks after this one, in turn, and itself last: so not all write to the same one at the same
// time.
static int nth(const struct peer_windows *w, int i)
{
    return (peer_windows_rank(w) + 1 + i) % peer_windows_ranks(w);
}

int peer_say(struct context *c, struct peer_windows *w, enum peer_lane lane)
{
    const struct tensor *own = peer_windows_own(w);
    for (int i = 0; i < peer_windows_ranks(w); i++)
        TRY(LAUNCH(c, KERNEL_peer_say, 1, 1, 1, WORDS(nth(w, i)), BUF(own),
                   UINT(peer_windows_rank(w)), UINT(lane)));
    return 0;
}

int peer_wait(struct context *c, struct peer_windows *w, enum peer_lane lane,
              const struct tensor *traffic)
{
    return LAUNCH(c, KERNEL_peer_wait, 1, 1, 1, WORDS(peer_windows_rank(w)),
                  BUF(peer_windows_own(w)), BUF_OR_NULL(traffic), UINT(peer_windows_ranks(w)),
                  UINT(lane));
}

static int64_t experts_of(const struct peer_windows *w, const struct peer_map *map)
{
    const int64_t M = peer_windows_ranks(w), E = map->counts.shape[1];
    BUG_IF(map->counts.shape[0] != M || M * E > TABLE_MOST || E > EXPERTS_MOST);
    BUG_IF(tensor_count(&map->owner) != M * E || tensor_count(&map->segments) != 2 * M * E * 3);
    return E;
}

int peer_send_counts(struct context *c, struct peer_windows *w, const struct peer_map *map,
                     const struct tensor *offsets)
{
    const int64_t E = experts_of(w, map);
    for (int i = 0; i < peer_windows_ranks(w); i++) {
        const int to = nth(w, i);
        const union arg counts = {.b = peer_windows_at(w, map->counts_number, to)};
        TRY(LAUNCH(c, KERNEL_peer_counts, 1, 1, 1, counts, BUF_OR_NULL(offsets), WORDS(to),
                   BUF(peer_windows_own(w)), UINT(peer_windows_rank(w)), UINT(E), UINT(PEER_ROWS)));
    }
    return 0;
}

int peer_take_counts(struct context *c, struct peer_windows *w, const struct peer_map *map,
                     struct tensor *offsets, struct tensor *fraction, float scale)
{
    const int rank = peer_windows_rank(w);
    return LAUNCH(c, KERNEL_peer_segments, 1, 1, 1, BUF(&map->segments), BUF(offsets),
                  BUF_OR_NULL(fraction), BUF(&map->traffic), WORDS(rank), BUF(peer_windows_own(w)),
                  BUF(&map->counts), BUF(&map->owner), UINT(rank), UINT(peer_windows_ranks(w)),
                  UINT(experts_of(w, map)), UINT(PEER_ROWS), FLOAT(scale));
}

// Compute units that copy rows to others: so many fill an NVLink of Hopper's (docs/exchange.md).
enum { UNITS = 16 };

static int units(const struct context *c)
{
    const int all = c->dev->info.compute_units;
    return all > 4 * UNITS ? UNITS : all / 4 + 1;
}

// To all ranks in one launch, where the device can.
static int send_to_all(struct context *c, struct peer_windows *w, const struct peer_map *map,
                       enum peer_way way, int to, const struct tensor *from,
                       const struct tensor *index)
{
    const int64_t E = experts_of(w, map), bytes = from->shape[1] * (int64_t)dtype_size(from->dtype);
    const int ranks = peer_windows_ranks(w);
    struct peer_rows a = {.from = from->mem,
                          .index = MEM(index),
                          .segments = map->segments.mem,
                          .own = peer_windows_own(w)->mem,
                          .rank = peer_windows_rank(w),
                          .ranks = ranks,
                          .part = way == PEER_OUT ? 0 : ranks,
                          .experts = (int)E,
                          .vectors = (int)(bytes / 16),
                          .lane = PEER_ROWS,
                          .blocks = units(c)};
    for (int r = 0; r < ranks && r < PEER_ROADS; r++) {
        a.to[r] = peer_windows_at(w, to, r);
        a.words[r] = peer_windows_words(w, r);
    }
    return ACCELERATE(c, ACCELERATE_PEER_ROWS, &a, from);
}

static int send_to_each(struct context *c, struct peer_windows *w, const struct peer_map *map,
                        enum peer_way way, int to, const struct tensor *from,
                        const struct tensor *index)
{
    const int64_t E = experts_of(w, map), bytes = from->shape[1] * (int64_t)dtype_size(from->dtype);
    const int ranks = peer_windows_ranks(w), compute = c->dev->info.compute_units;
    for (int i = 0; i < ranks; i++) {
        const int other = nth(w, i), part = way == PEER_OUT ? other : ranks + other;
        const union arg there = {.b = peer_windows_at(w, to, other)};
        TRY(LAUNCH(c, KERNEL_peer_rows, c->dev->cpu_forms ? compute : 2 * compute, 1, 1, there,
                   BUF(from), BUF_OR_NULL(index), BUF(&map->segments), WORDS(other),
                   BUF(peer_windows_own(w)), UINT(part), UINT(E), UINT(bytes / 16),
                   UINT(peer_windows_rank(w)), UINT(other), UINT(PEER_ROWS)));
    }
    return 0;
}

int peer_send_rows(struct context *c, struct peer_windows *w, const struct peer_map *map,
                   enum peer_way way, int to, const struct tensor *from, const struct tensor *index)
{
    struct context beside;
    BUG_IF(from->shape[1] * (int64_t)dtype_size(from->dtype) % 16 != 0);
    c->dev->spare = units(c); // in a dry context too: products then ask for the same scratch
    if (c->dry)
        return 0;
    TRY(peer_beside(c, w, &beside));
    const int code = send_to_all(&beside, w, map, way, to, from, index);
    if (code < 0)
        return code;
    if (code == NOT_MINE)
        TRY(send_to_each(&beside, w, map, way, to, from, index));
    return peer_beside_end(w);
}

int peer_take_rows(struct context *c, struct peer_windows *w, const struct peer_map *map)
{
    c->dev->spare = 0;
    if (c->dry)
        return 0;
    TRY(peer_join(c, w));
    return peer_wait(c, w, PEER_ROWS, &map->traffic);
}

int peer_give_rows(struct context *c, struct peer_windows *w, int to, int64_t first,
                   const struct tensor *rows)
{
    const size_t row = (size_t)rows->shape[1] * dtype_size(rows->dtype);
    for (int i = 0; i < peer_windows_ranks(w); i++)
        TRY(c->dev->api->copy(c->stream, peer_windows_at(w, to, nth(w, i)), (size_t)first * row,
                              rows->mem, 0, tensor_bytes(rows)));
    return 0;
}

int peer_total(struct context *c, struct peer_windows *w, int number, const struct tensor *all,
               struct tensor *control, const struct tensor *losses, struct tensor *mean,
               float scale)
{
    const int ranks = peer_windows_ranks(w), rank = peer_windows_rank(w);
    for (int i = 0; i < ranks; i++) {
        const int to = nth(w, i);
        const union arg sums = {.b = peer_windows_at(w, number, to)};
        TRY(LAUNCH(c, KERNEL_peer_sums, 1, 1, 1, sums, BUF(control), BUF(losses), WORDS(to),
                   BUF(peer_windows_own(w)), UINT(tensor_count(losses)), UINT(rank),
                   UINT(PEER_SUMS)));
    }
    return LAUNCH(c, KERNEL_peer_total, 1, 1, 1, BUF(control), BUF(mean), BUF(all), WORDS(rank),
                  BUF(peer_windows_own(w)), UINT(ranks), UINT(PEER_SUMS), FLOAT(scale));
}
