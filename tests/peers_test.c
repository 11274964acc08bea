// Journeys between peer windows (runtime/peers.h): all ranks of a run on one device and one stream, on
// which every rank's part of a journey comes before the first wait for it. Rows are copied, so they
// must be equal.
#include "tests/op_table.h"

#include <math.h>
#include <stdlib.h>

#include "devices/accelerate.h"
#include "runtime/ops_internal.h"

enum { MOST = 4, WORDS = 129, OWN = 130, LANE = 0 };

// What a rank has.
struct rank {
    struct operand *words, *own, *count, *segment, *served_offsets, *fraction, *traffic;
    struct operand *offsets, *x, *index, *served, *y;
    int rows, held_rows;
};

struct run {
    struct op_run *r;
    int M, E, D;
    struct operand *owner;
    struct rank rank[MOST];
};

static struct operand *zeros(struct op_run *r, int64_t count)
{
    return op_values(r, I32, op_doubles(r, count), DIMS(count));
}

// Rows of rank s for expert e.
static int count_of(const struct run *t, int s, int e)
{
    const double *offsets = t->rank[s].offsets->v;
    return (int)(offsets[e + 1] - offsets[e]);
}

static int owner_of(const struct run *t, int s, int e)
{
    return (int)t->owner->v[s * t->E + e];
}

// Random rows: some ranks have none, some experts get none; small whole numbers, which bf16 holds.
static void make_rank(struct run *t, int s)
{
    struct op_run *r = t->r;
    struct rank *k = &t->rank[s];
    double *offsets = op_doubles(r, t->E + 1);
    for (int e = 0; e < t->E; e++)
        offsets[e + 1] =
            offsets[e] + (s == 1 && t->M > 2 ? 0 : fmax(0, floor(op_uniform(r, -3, 12))));
    k->rows = (int)offsets[t->E];
    double *x = op_doubles(r, (int64_t)(k->rows + 1) * t->D), *index = op_doubles(r, k->rows + 1);
    for (int64_t i = 0; i < (int64_t)(k->rows + 1) * t->D; i++)
        x[i] = floor(op_uniform(r, 0, 256));
    for (int i = 0; i < k->rows; i++)
        index[i] = floor(op_uniform(r, 0, k->rows + 1));
    k->offsets = op_values(r, I32, offsets, DIMS(t->E + 1));
    k->x = op_values(r, r->act, x, DIMS(k->rows + 1, t->D));
    k->index = op_values(r, I32, index, DIMS(k->rows + 1));
    k->words = zeros(r, WORDS);
    k->own = zeros(r, OWN);
    k->traffic = zeros(r, 4);
    k->count = op_output(r, I32, DIMS(t->M, t->E));
    k->segment = op_output(r, I32, DIMS(2, t->M, t->E, 3));
    k->served_offsets = op_output(r, I32, DIMS(t->E + 1));
    k->fraction = op_output(r, F32, DIMS(t->E));
    k->y = op_output(r, r->act, DIMS(k->rows + 1, t->D));
}

static void make_owners(struct run *t)
{
    double *owner = op_doubles(t->r, (int64_t)t->M * t->E);
    for (int e = 0; e < t->E; e++)
        for (int s = 0; s < t->M; s++) // a few experts have copies
            owner[s * t->E + e] = e % 3 == 2 ? s / 2 * 2 % t->M : e * 7 % t->M;
    t->owner = op_values(t->r, I32, owner, DIMS(t->M, t->E));
    for (int s = 0; s < t->M; s++) {
        struct rank *k = &t->rank[s];
        for (int e = 0; e < t->E; e++)
            for (int from = 0; from < t->M; from++)
                k->held_rows += owner_of(t, from, e) == s ? count_of(t, from, e) : 0;
        k->served = op_output(t->r, t->r->act, DIMS(k->held_rows + 1, t->D));
    }
}

// ---- counts -------------------------------------------------------------------------------------

static int send_counts(struct run *t)
{
    struct context *c = &t->r->c;
    for (int s = 0; s < t->M; s++)
        for (int to = 0; to < t->M; to++)
            TRY(LAUNCH(c, KERNEL_peer_counts, 1, 1, 1, BUF(&t->rank[to].count->t),
                       t->rank[s].rows ? BUF(&t->rank[s].offsets->t) : NO_BUF,
                       BUF(&t->rank[to].words->t), BUF(&t->rank[s].own->t), UINT(s), UINT(t->E),
                       UINT(LANE)));
    for (int s = 0; s < t->M; s++) {
        struct rank *k = &t->rank[s];
        TRY(LAUNCH(c, KERNEL_peer_segments, 1, 1, 1, BUF(&k->segment->t),
                   BUF(&k->served_offsets->t), BUF(&k->fraction->t), BUF(&k->traffic->t),
                   BUF(&k->words->t), BUF(&k->own->t), BUF(&k->count->t), BUF(&t->owner->t),
                   UINT(s), UINT(t->M), UINT(t->E), UINT(LANE), FLOAT(0.5f)));
    }
    return 0;
}

static void judge_counts(struct run *t, int s)
{
    struct rank *k = &t->rank[s];
    double *count = op_doubles(t->r, (int64_t)t->M * t->E), *offsets = op_doubles(t->r, t->E + 1);
    double *fraction = op_doubles(t->r, t->E), *traffic = op_doubles(t->r, 4);
    int held = 0;
    double at = 0;
    for (int e = 0; e < t->E; e++) {
        bool holds = false;
        const double first = at;
        for (int from = 0; from < t->M; from++) {
            const double rows = count_of(t, from, e);
            count[from * t->E + e] = rows;
            fraction[e] += 0.5 * rows;
            const bool here = owner_of(t, from, e) == s;
            holds = holds || here;
            at += here ? rows : 0;
            traffic[1] += here && from != s ? rows : 0;
        }
        traffic[0] += owner_of(t, s, e) != s ? count_of(t, s, e) : 0;
        if (holds)
            offsets[held++] = first;
    }
    offsets[held] = at;
    op_read(t->r, k->served_offsets); // those behind [held] are not written
    for (int e = held + 1; e <= t->E; e++)
        offsets[e] = k->served_offsets->v[e];
    op_read(t->r, k->traffic);
    traffic[2] = k->traffic->v[2]; // microseconds
    op_judge_exact(t->r, k->count, count, "counts at rank %d of %d", s, t->M);
    op_judge_exact(t->r, k->served_offsets, offsets, "offsets at rank %d of %d", s, t->M);
    op_judge_exact(t->r, k->fraction, fraction, "fractions at rank %d of %d", s, t->M);
    op_judge_exact(t->r, k->traffic, traffic, "traffic at rank %d of %d", s, t->M);
}

// ---- rows ---------------------------------------------------------------------------------------

// As peer_send_rows(): one launch for every rank, or, where the device can, one for all.
static int send_rows(struct run *t, int s, bool back, bool at_once)
{
    struct context *c = &t->r->c;
    struct rank *k = &t->rank[s];
    const struct operand *from = back ? k->served : k->x;
    const int64_t vectors = t->D * (int64_t)dtype_size(t->r->act) / 16;
    struct peer_rows a = {.from = from->t.mem,
                          .index = back ? NULL : k->index->t.mem,
                          .segments = k->segment->t.mem,
                          .own = k->own->t.mem,
                          .rank = s,
                          .ranks = t->M,
                          .part = back ? t->M : 0,
                          .experts = t->E,
                          .vectors = (int)vectors,
                          .lane = LANE,
                          .blocks = 3};
    for (int to = 0; to < t->M; to++) {
        a.to[to] = (back ? t->rank[to].y : t->rank[to].served)->t.mem;
        a.words[to] = t->rank[to].words->t.mem;
    }
    const int code = at_once ? ACCELERATE(c, ACCELERATE_PEER_ROWS, &a, &from->t) : NOT_MINE;
    if (code != NOT_MINE || at_once)
        return code;
    for (int to = 0; to < t->M; to++)
        TRY(LAUNCH(c, KERNEL_peer_rows, 3, 1, 1, (union arg){.b = a.to[to]}, BUF(&from->t),
                   (union arg){.b = a.index}, BUF(&k->segment->t), (union arg){.b = a.words[to]},
                   BUF(&k->own->t), UINT(back ? t->M + to : to), UINT(t->E), UINT(vectors), UINT(s),
                   UINT(to), UINT(LANE)));
    return 0;
}

// A journey of all ranks; NOT_MINE where the device cannot do it at once.
static int journey(struct run *t, bool back, bool at_once)
{
    for (int s = 0; s < t->M; s++) {
        const int code = send_rows(t, s, back, at_once);
        if (code != 0)
            return code;
    }
    for (int s = 0; s < t->M; s++)
        TRY(LAUNCH(&t->r->c, KERNEL_peer_wait, 1, 1, 1, BUF(&t->rank[s].words->t),
                   BUF(&t->rank[s].own->t), BUF(&t->rank[s].traffic->t), UINT(t->M), UINT(LANE)));
    return 0;
}

static void set_row(const struct run *t, double *to, int row, const struct rank *from, int i)
{
    for (int d = 0; d < t->D; d++)
        to[(int64_t)row * t->D + d] = from->x->v[(int64_t)from->index->v[i] * t->D + d];
}

// What is behind the rows must stay as it was: NaN.
static void judge_rows(struct run *t, struct operand *o, double *want, int rows, const char *what)
{
    op_read(t->r, o);
    int wrong = 0;
    for (int64_t i = 0; i < o->count; i++)
        wrong += i < (int64_t)rows * t->D ? !(o->v[i] == want[i]) : !isnan(o->v[i]);
    if (wrong > 0) {
        printf("    %s: %d of %d ranks' values are wrong\n", what, wrong, t->M);
        t->r->failures++;
    }
}

static void judge_served(struct run *t, int s)
{
    struct rank *k = &t->rank[s];
    double *want = op_doubles(t->r, k->served->count);
    int row = 0;
    for (int e = 0; e < t->E; e++)
        for (int from = 0; from < t->M; from++)
            for (int i = 0; i < count_of(t, from, e) && owner_of(t, from, e) == s; i++)
                set_row(t, want, row++, &t->rank[from], (int)t->rank[from].offsets->v[e] + i);
    judge_rows(t, k->served, want, row, "rows at their owners");
}

static void judge_back(struct run *t, int s)
{
    struct rank *k = &t->rank[s];
    double *want = op_doubles(t->r, k->y->count);
    for (int i = 0; i < k->rows; i++)
        set_row(t, want, i, k, i);
    judge_rows(t, k->y, want, k->rows, "rows back at their sources");
}

static int ranks_case(struct op_run *r, const int *shape)
{
    struct run t = {.r = r, .M = shape[0], .E = shape[1], .D = shape[2]};
    const bool at_once = shape[3];
    for (int s = 0; s < t.M; s++)
        make_rank(&t, s);
    make_owners(&t);
    OK(send_counts(&t));
    for (int s = 0; s < t.M; s++)
        judge_counts(&t, s);
    int code = journey(&t, false, at_once);
    if (code == NOT_MINE)
        return PASSED;
    OK(code);
    OK(journey(&t, true, at_once));
    for (int s = 0; s < t.M; s++)
        judge_served(&t, s), judge_back(&t, s);
    return PASSED;
}

static int rows(void)
{
    static const int shapes[][6] = {{1, 1, 8, 0},    {2, 8, 64, 0}, {3, 5, 72, 0},
                                    {4, 16, 640, 0}, {2, 8, 64, 1}, {4, 40, 1160, 1}};
    return OP_FOR_ALL(ranks_case, shapes);
}

// ---- sums ---------------------------------------------------------------------------------------

static int sums_case(struct op_run *r, const int *shape)
{
    const int M = shape[0], N = shape[1];
    struct operand *words[MOST], *own[MOST], *table[MOST], *control[MOST], *loss[MOST], *mean[MOST];
    double norm = 0, all = 0;
    for (int s = 0; s < M; s++) {
        words[s] = zeros(r, WORDS), own[s] = zeros(r, OWN);
        table[s] = op_output(r, F32, DIMS(M, 2)), mean[s] = op_output(r, F32, DIMS(1));
        control[s] = op_random(r, F32, 0, 1, DIMS(CONTROL_COUNT));
        loss[s] = op_random(r, F32, 0, 1, DIMS(N));
        norm += control[s]->v[0];
        for (int i = 0; i < N; i++)
            all += loss[s]->v[i];
    }
    struct context *c = &r->c;
    for (int s = 0; s < M; s++) // a journey without anything, on another lane
        for (int to = 0; to < M; to++)
            OK(LAUNCH(c, KERNEL_peer_say, 1, 1, 1, BUF(&words[to]->t), BUF(&own[s]->t), UINT(s),
                      UINT(1)));
    for (int s = 0; s < M; s++)
        OK(LAUNCH(c, KERNEL_peer_wait, 1, 1, 1, BUF(&words[s]->t), BUF(&own[s]->t), NO_BUF, UINT(M),
                  UINT(1)));
    for (int s = 0; s < M; s++)
        for (int to = 0; to < M; to++)
            OK(LAUNCH(c, KERNEL_peer_sums, 1, 1, 1, BUF(&table[to]->t), BUF(&control[s]->t),
                      BUF(&loss[s]->t), BUF(&words[to]->t), BUF(&own[s]->t), UINT(N), UINT(s),
                      UINT(1)));
    for (int s = 0; s < M; s++)
        OK(LAUNCH(c, KERNEL_peer_total, 1, 1, 1, BUF(&control[s]->t), BUF(&mean[s]->t),
                  BUF(&table[s]->t), BUF(&words[s]->t), BUF(&own[s]->t), UINT(M), UINT(1),
                  FLOAT(0.25f)));
    for (int s = 0; s < M; s++) {
        double *want = op_doubles(r, CONTROL_COUNT), *want_mean = op_doubles(r, 1);
        for (int i = 1; i < CONTROL_COUNT; i++)
            want[i] = control[s]->v[i];
        want[0] = norm, *want_mean = 0.25 * all;
        op_judge(r, control[s], want, 1e-6, "norm of %d ranks", M);
        op_judge(r, mean[s], want_mean, 1e-6, "mean of %d ranks", M);
    }
    return PASSED;
}

static int sums(void)
{
    static const int shapes[][6] = {{1, 1}, {2, 63}, {3, 64}, {4, 1000}};
    return OP_FOR_ALL(sums_case, shapes);
}

const struct test peers_tests[] = {
    {"rows", rows},
    {"sums", sums},
    {0},
};
