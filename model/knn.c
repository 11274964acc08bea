// Nearest neighbours by exhaustive search; see knn.h.
//
// A squared distance is summed in blocks of dimensions and given up as soon as it exceeds that of
// the worst of the k nearest so far, which changes no result: partial sums only grow. LANES
// independent sums let the compiler use vector instructions without reordering float additions on
// its own.
#include "model/knn.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { LANES = 16, BLOCK = 128, MAX_THREADS = 64 };

struct neighbour {
    float distance; // squared
    int32_t label;
};

// One thread's share of the queries.
struct share {
    const struct knn *knn;
    const float *queries;
    int64_t first, end;
    int32_t *predicted;
    float *nearest;
};

// ---- distance -----------------------------------------------------------------------------------

static float block_distance(const float *restrict a, const float *restrict b, int64_t dim)
{
    float sums[LANES] = {0}, total = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) {
        for (int k = 0; k < LANES; k++) {
            float d = a[i + k] - b[i + k];
            sums[k] += d * d;
        }
    }
    for (; i < dim; i++)
        total += (a[i] - b[i]) * (a[i] - b[i]);
    for (int k = 0; k < LANES; k++)
        total += sums[k];
    return total;
}

// The squared distance, or something larger than `limit` where the distance is.
static float squared_distance(const float *a, const float *b, int64_t dim, float limit)
{
    float sum = 0.0f;
    for (int64_t i = 0; i < dim && sum <= limit; i += BLOCK)
        sum += block_distance(a + i, b + i, dim - i < BLOCK ? dim - i : BLOCK);
    return sum;
}

// ---- vote ---------------------------------------------------------------------------------------

// Inserts into the ascending list of the `count` nearest, dropping the last of `k`. Returns the
// count.
static int insert(struct neighbour *list, int count, int k, struct neighbour n)
{
    int at = count < k ? count : k - 1;
    for (; at > 0 && list[at - 1].distance > n.distance; at--)
        list[at] = list[at - 1];
    list[at] = n;
    return count < k ? count + 1 : k;
}

static int find_nearest(const struct knn *knn, const float *query, struct neighbour *list)
{
    int count = 0;
    for (int64_t i = 0; i < knn->reference_count; i++) {
        float limit = count < knn->k ? INFINITY : list[count - 1].distance;
        float d = squared_distance(query, knn->references + i * knn->dim, knn->dim, limit);
        if (count < knn->k || d < limit)
            count = insert(list, count, knn->k, (struct neighbour){d, knn->labels[i]});
    }
    return count;
}

// A tie goes to the smallest class number, as in scikit-learn, so that figures can be compared.
static int32_t vote(const struct neighbour *list, int count)
{
    int32_t winner = 0;
    int most = 0;
    for (int i = 0; i < count; i++) {
        int votes = 0;
        for (int j = 0; j < count; j++)
            votes += list[j].label == list[i].label;
        if (votes > most || (votes == most && list[i].label < winner)) {
            most = votes;
            winner = list[i].label;
        }
    }
    return winner;
}

static void *thread_main(void *argument)
{
    const struct share *s = argument;
    struct neighbour list[KNN_MAX_K];
    for (int64_t q = s->first; q < s->end; q++) {
        int count = find_nearest(s->knn, s->queries + q * s->knn->dim, list);
        s->predicted[q] = vote(list, count);
        if (s->nearest)
            s->nearest[q] = sqrtf(list[0].distance);
    }
    return NULL;
}

// ---- calls --------------------------------------------------------------------------------------

static int check(const struct knn *knn, const float *queries, int64_t count)
{
    if (knn->reference_count < 1 || knn->dim < 1)
        return fail(ERR_INPUT, "nearest neighbours: there is nothing to compare with");
    if (knn->k < 1 || knn->k > KNN_MAX_K)
        return fail(ERR_INPUT, "nearest neighbours: k = %d: must be 1 to %d", knn->k, KNN_MAX_K);
    for (int64_t i = 0; i < count * knn->dim; i++)
        if (!isfinite(queries[i]))
            return fail(ERR_INPUT, "nearest neighbours: image %lld has values that are not finite",
                        (long long)(i / knn->dim));
    return 0;
}

static int64_t choose_threads(int wanted, int64_t count)
{
    int64_t n = wanted > 0 ? wanted : sysconf(_SC_NPROCESSORS_ONLN);
    n = n < count ? n : count;
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

int knn_vote(const struct knn *knn, const float *queries, int64_t count, int32_t *predicted,
             float *nearest)
{
    TRY(check(knn, queries, count));
    struct share shares[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    bool started[MAX_THREADS] = {false};
    int64_t n = choose_threads(knn->threads, count);
    for (int64_t i = 0; i < n; i++) {
        shares[i] =
            (struct share){knn, queries, count * i / n, count * (i + 1) / n, predicted, nearest};
        started[i] = i > 0 && pthread_create(&threads[i], NULL, thread_main, &shares[i]) == 0;
    }
    for (int64_t i = 0; i < n; i++)
        if (!started[i])
            thread_main(&shares[i]);
    for (int64_t i = 0; i < n; i++)
        if (started[i])
            pthread_join(threads[i], NULL);
    return 0;
}

static int read_references(const struct dataset *d, int64_t count, int64_t dim, float *images,
                           int32_t *labels)
{
    for (int64_t i = 0; i < count; i++) {
        TRY(data_image(d, i, false, images + i * dim));
        labels[i] = data_label(d, i);
    }
    return 0;
}

int knn_vote_dataset(const struct dataset *d, int64_t references, const float *queries,
                     int64_t count, int32_t *predicted, float *nearest)
{
    int64_t n = references > 0 ? references : KNN_REFERENCES;
    n = n < d->count ? n : d->count;
    int64_t dim = (int64_t)d->channels * d->size * d->size;
    float *images = calloc((size_t)n, (size_t)dim * sizeof *images);
    int32_t *labels = calloc((size_t)n, sizeof *labels);
    int code = images && labels
                   ? read_references(d, n, dim, images, labels)
                   : fail(ERR_NOMEM, "%s: out of memory for %lld images", d->path, (long long)n);
    if (code == 0) {
        struct knn knn = {images, labels, n, dim, d->classes, KNN_K, 0};
        code = knn_vote(&knn, queries, count, predicted, nearest);
    }
    free(images);
    free(labels);
    return code;
}
