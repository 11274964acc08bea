// Vote of the nearest neighbours in pixel space (Euclidean distance): a judge of samples that needs
// no network. Says what class an image looks like, and how far it is from anything in the training
// set.
#ifndef DITMOE_KNN_H
#define DITMOE_KNN_H

#include "model/data.h"

enum { KNN_K = 5, KNN_REFERENCES = 10000, KNN_MAX_K = 64 };

struct knn {
    const float *references; // [reference_count, dim]
    const int32_t *labels;   // [reference_count], in [0, classes)
    int64_t reference_count;
    int64_t dim;
    int classes;
    int k;       // neighbours that vote, <= KNN_MAX_K; a tie goes to the smallest class
    int threads; // 0: chosen
};

// For each of queries[count, dim] its class, and (if `nearest` is not NULL) the distance to the
// nearest reference.
int knn_vote(const struct knn *knn, const float *queries, int64_t count, int32_t *predicted,
             float *nearest);

// The same with k = KNN_K over the first `references` images of a dataset (0: KNN_REFERENCES; fewer
// where it has fewer). Queries are [count, C, size, size] floats in [-1, 1].
int knn_vote_dataset(const struct dataset *d, int64_t references, const float *queries,
                     int64_t count, int32_t *predicted, float *nearest);

#endif
