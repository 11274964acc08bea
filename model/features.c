// See features.h.
#include "model/features.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Inception Score ----------------------------------------------------------------------------
//
// exp of the mean divergence of an image's classes p(y|x) from those of all p(y) (Salimans et al.
// 2016), which is mean sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y); the mean over parts.

struct score {
    int classes, split, in_part, parts;
    double *mean; // [classes] sum of the part's p
    double own;   // sum of the part's p log p
    double total; // over parts
};

static double entropy_term(double p)
{
    return p > 0 ? p * log(p) : 0;
}

static void end_part(struct score *s)
{
    double divergence = s->own / s->in_part;
    for (int y = 0; y < s->classes; y++)
        divergence -= entropy_term(s->mean[y] / s->in_part);
    s->total += exp(divergence);
    s->parts++;
    s->in_part = 0;
    s->own = 0;
    memset(s->mean, 0, (size_t)s->classes * sizeof *s->mean);
}

static void add_score(struct score *s, const float *logits)
{
    double most = -INFINITY, sum = 0;
    for (int y = 0; y < s->classes; y++)
        most = fmax(most, (double)logits[y]);
    for (int y = 0; y < s->classes; y++)
        sum += exp((double)logits[y] - most);
    for (int y = 0; y < s->classes; y++) {
        const double p = exp((double)logits[y] - most) / sum;
        s->mean[y] += p;
        s->own += entropy_term(p);
    }
    if (++s->in_part == s->split)
        end_part(s);
}

// ---- reading ahead ------------------------------------------------------------------------------

struct batch {
    struct image_source *source;
    int64_t skip, between; // images of other ranks: before the next batch, and from then on
    int most, count;       // count: images, or a negative code
    struct image *images;
    char message[1024];
};

static void *read_batch(void *argument)
{
    struct batch *b = argument;
    b->count = image_source_skip(b->source, b->skip);
    b->skip = b->between;
    if (b->count >= 0)
        b->count = image_source_next(b->source, b->most, b->images);
    if (b->count < 0)
        snprintf(b->message, sizeof b->message, "%s", error_message());
    return NULL;
}

static void free_batch(struct batch *b)
{
    for (int i = 0; i < b->count; i++)
        image_free(&b->images[i]);
    b->count = 0;
}

// ---- the walk through a set ---------------------------------------------------------------------

struct walk {
    struct inception *n;
    const struct feature_options *o;
    struct features *out;
    struct moments *pool, *spatial;
    struct score score;
    struct batch batch;
    float *pool_rows, *spatial_rows, *logits; // of a batch
    int64_t done, total;
    struct transfers *transfers; // with ranks
    int rank, ranks;
};

static int start_walk(struct walk *w, struct image_source *s)
{
    const size_t N = (size_t)w->n->batch, dim = (size_t)w->n->dim;
    struct exchange *x = w->o->exchange;
    const bool score = w->o->split > 0 && w->n->classes > 0;
    w->total = s->count - s->next;
    w->rank = exchange_rank(x);
    w->ranks = exchange_ranks(x);
    w->batch = (struct batch){.source = s,
                              .most = w->n->batch,
                              .skip = (int64_t)w->rank * w->n->batch,
                              .between = (int64_t)(w->ranks - 1) * w->n->batch};
    TRY(transfers_new(x, &w->transfers));
    w->batch.images = calloc(N, sizeof *w->batch.images);
    w->pool_rows = malloc(N * dim * sizeof(float));
    w->spatial_rows = malloc(N * (size_t)w->n->spatial_dim * sizeof(float));
    bool good = w->batch.images && w->pool_rows && w->spatial_rows;
    const int64_t keep = w->rank ? 0 : w->o->keep < s->count ? w->o->keep : s->count;
    if (keep > 0)
        good = good && (w->out->rows = malloc((size_t)keep * dim * sizeof(float)));
    if (score) {
        w->score = (struct score){.classes = w->n->classes, .split = w->o->split};
        w->score.mean = calloc((size_t)w->n->classes, sizeof(double));
        w->logits = malloc(N * (size_t)w->n->classes * sizeof(float));
        good = good && w->score.mean && w->logits;
    }
    if (!good)
        return fail(ERR_NOMEM, "%s: out of memory for features", s->path);
    TRY(moments_new(w->n->dim, &w->pool));
    return moments_new(w->n->spatial_dim, &w->spatial);
}

// Takes what read_batch() has read to the device and starts the network.
static int start_batch(struct walk *w)
{
    if (w->batch.count < 0)
        return fail(w->batch.count, "%s", w->batch.message);
    if (!w->batch.count)
        return 0;
    const int count = w->batch.count;
    int code = inception_put(w->n, w->batch.images, count);
    free_batch(&w->batch);
    TRY(code);
    TRY(inception_run(w->n));
    return count;
}

static int add_features(struct walk *w, int count)
{
    const size_t dim = (size_t)w->n->dim;
    TRY(moments_add(w->pool, w->pool_rows, count));
    TRY(moments_add(w->spatial, w->spatial_rows, count));
    for (int i = 0; w->logits && i < count; i++)
        add_score(&w->score, w->logits + (size_t)i * (size_t)w->n->classes);
    for (int i = 0; i < count && w->out->row_count < w->o->keep; i++)
        memcpy(w->out->rows + (size_t)w->out->row_count++ * dim, w->pool_rows + (size_t)i * dim,
               dim * sizeof(float));
    w->done += count;
    return w->o->progress ? w->o->progress(w->o->user, w->done, w->total) : 0;
}

enum { FEATURES_TAG = 1 };

// One array of a batch's features, to rank 0 or there from another rank.
static int pass(struct walk *w, float *rows, int count, int width, int peer)
{
    const size_t bytes = (size_t)count * (size_t)width * sizeof *rows;
    if (!rows)
        return 0;
    return w->rank ? exchange_send(w->transfers, rows, bytes, peer, FEATURES_TAG)
                   : exchange_receive(w->transfers, rows, bytes, peer, FEATURES_TAG);
}

static int pass_features(struct walk *w, int count, int peer)
{
    TRY(pass(w, w->pool_rows, count, w->n->dim, peer));
    TRY(pass(w, w->spatial_rows, count, w->n->spatial_dim, peer));
    TRY(pass(w, w->logits, count, w->n->classes, peer));
    return exchange_wait(w->transfers);
}

// After a turn, in which every rank has had a batch, or the last ones none. This rank's features
// are in memory.
static int add_turn(struct walk *w, int own)
{
    if (w->rank)
        return pass_features(w, own, 0);
    TRY(add_features(w, own));
    for (int r = 1; r < w->ranks && w->done < w->total; r++) {
        const int64_t left = w->total - w->done;
        const int count = left < w->n->batch ? (int)left : w->n->batch;
        TRY(pass_features(w, count, r));
        TRY(add_features(w, count));
    }
    return 0;
}

// While the device works on a batch, the next is read and the features of the one before are
// summed.
static int walk_images(struct walk *w)
{
    read_batch(&w->batch);
    int running = start_batch(w);
    TRY(running);
    while (running > 0) {
        pthread_t reader;
        const bool started = !pthread_create(&reader, NULL, read_batch, &w->batch);
        int code = inception_read(w->n, running, w->pool_rows, w->spatial_rows, w->logits);
        if (started)
            pthread_join(reader, NULL);
        else
            read_batch(&w->batch);
        TRY(code);
        const int next = start_batch(w);
        TRY(next);
        TRY(add_turn(w, running));
        running = next;
    }
    return 0;
}

static int finish_walk(struct walk *w)
{
    if (w->score.in_part)
        end_part(&w->score);
    w->out->score = w->score.parts ? w->score.total / w->score.parts : NAN;
    TRY(moments_finish(w->pool, &w->out->pool));
    return moments_finish(w->spatial, &w->out->spatial);
}

int features_of_images(struct inception *n, struct image_source *s, const struct feature_options *o,
                       struct features *out)
{
    struct walk w = {.n = n, .o = o, .out = out};
    *out = (struct features){.score = NAN};
    int code = start_walk(&w, s);
    if (code >= 0)
        code = walk_images(&w);
    if (code >= 0 && w.rank == 0)
        code = finish_walk(&w);
    transfers_free(w.transfers);
    free_batch(&w.batch);
    free(w.batch.images), free(w.pool_rows), free(w.spatial_rows), free(w.logits);
    free(w.score.mean);
    moments_free(w.pool);
    moments_free(w.spatial);
    if (code < 0)
        features_free(out);
    return code;
}

int features_of_statistics(const struct inception *n, struct npz *z, struct features *out)
{
    *out = (struct features){.score = NAN};
    TRY(gaussian_read(z, "mu", "sigma", n->dim, &out->pool));
    int code = 0;
    if (npz_has(z, "mu_s"))
        code = gaussian_read(z, "mu_s", "sigma_s", n->spatial_dim, &out->spatial);
    if (code < 0)
        features_free(out);
    return code;
}

void features_free(struct features *f)
{
    gaussian_free(&f->pool);
    gaussian_free(&f->spatial);
    free(f->rows);
    *f = (struct features){0};
}
