// What the figures of an evaluation are made of: Inception's features of a set of images, of which
// statistics are kept and, where wanted, the first rows.
#ifndef DITMOE_FEATURES_H
#define DITMOE_FEATURES_H

#include "model/frechet.h"
#include "model/image_source.h"
#include "model/inception.h"
#include "runtime/exchange.h"

struct features {
    struct gaussian pool, spatial; // spatial.dim 0: not known (a statistics file without it)
    double score;                  // Inception Score; NAN: not known
    float *rows;                   // [row_count, dim] pool features
    int64_t row_count;
};

struct feature_options {
    int64_t keep; // pool features of so many images are kept
    int split;    // images a part of the Inception Score, 0: none (5000 in ADM's evaluator)
    int (*progress)(void *user, int64_t done, int64_t total); // < 0 stops; may be NULL
    void *user;
    struct exchange *exchange; // NULL: one rank
};

// Files are read ahead in other threads while the device works; what memory is needed does not
// depend on the number of images, but for rows that are kept. With ranks each takes a batch in turn
// (all must have the same batch), and rank 0 adds up their features in the images' order: its *out
// has the bits that one rank alone would give, the others' is empty.
int features_of_images(struct inception *n, struct image_source *s, const struct feature_options *o,
                       struct features *out);
// Statistics from arrays mu, sigma and, where they are, mu_s, sigma_s.
int features_of_statistics(const struct inception *n, struct npz *z, struct features *out);
void features_free(struct features *f); // also of a zeroed struct

#endif
