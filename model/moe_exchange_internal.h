// Inside the exchange of routed rows: what moe_exchange.c (roads on which the host takes part) and
// moe_peers.c (peer windows, on which it does not) share.
#ifndef DITMOE_MOE_EXCHANGE_INTERNAL_H
#define DITMOE_MOE_EXCHANGE_INTERNAL_H

#include "model/dit.h"

struct window;

// What a rank keeps of a layer's received rows, H of them at most. With recompute one set serves
// all layers.
struct served {
    struct tensor rows, gu, hidden, y; // [H,D] [H,2F] [H,F] [H,D]
};

// A run of rows of one expert, that has come from or goes to `peer`, where it lies at row `there`.
struct segment {
    int expert, peer;
    int64_t at, rows, there;
};

struct layer {
    struct tensor offsets;             // [held+1] of the served rows, on the device
    struct tensor dy, dhidden, hidden; // backward: [H,D] [H,F] [H,F]
    int held, *experts;                // this rank's experts, ascending
    int32_t *counts;                   // [ranks,E] rows of each rank for each expert, this pass
    struct segment *own, *served; // of a->rows, by expert; of the served rows, by expert and source
    int own_count, served_count;
    int64_t rows, room; // served rows of this pass; H
    struct moe_traffic traffic;
    struct peer_map map; // with peer windows, and the numbers of rows, a->y and dy as windows
    int rows_number, y_number, dy_number;
};

struct moe_exchange {
    struct exchange *exchange;
    struct roads *roads;
    struct peer_windows *windows; // of the plan; or NULL: rows go by the other roads
    bool met;
    const struct placement *place;
    int rank, ranks, experts;
    int64_t *tokens; // [ranks]
    int64_t all_tokens;
    int first_image;
    struct layer *layers;
    struct served *served; // [L], or [1]
    struct transfers *transfers;
    struct window *out, *in; // host: a->rows and the served rows, laid out as on the device
    size_t in_bytes;
    bool *apart;      // [ranks] keep out: have neither images nor experts; NULL: none does
    bool by_host;                // not every rank is reached straight
    int32_t *numbers;            // host scratch [E+1]
    int64_t *own_at, *served_at; // host scratch [ranks]
};

struct served *moe_served(struct dit *d, int layer);
// The most rows that this rank has room for: in a layer, or where layers share memory in any.
int64_t moe_room(const struct dit *d, int layer);
int moe_owner(const struct moe_exchange *m, int source, int layer, int expert);

// The experts' work on a layer's served rows.
int moe_serve_forward(struct dit *d, int layer);  // rows -> y
int moe_serve_backward(struct dit *d, int layer); // dy -> gradients; dy becomes d rows

// The steps of moe_exchange.h by peer windows, and what the plan is to have for them.
int moe_peers_plan(struct dit *d, int layer);
int moe_peers_send(struct dit *d, int layer);
int moe_peers_serve(struct dit *d, int layer);
int moe_peers_send_back(struct dit *d, int layer);
int moe_peers_serve_back(struct dit *d, int layer);
int moe_peers_take(struct dit *d, int layer); // in both passes
int moe_peers_load(const struct dit *d, int layer, int32_t *load);
int moe_peers_traffic(struct dit *d, int layer, struct moe_traffic *out);

#endif
