// Datasets of labelled images, and the loader that feeds training from them.
//
// Three kinds behind one struct: a directory with MNIST's IDX files (train-images-idx3-ubyte[.gz]
// and so on; Fashion-MNIST is one), held in memory; a folder of class folders of PNG and JPEG
// files, read when wanted; and a set of latents (model/latents.h), mapped. Pixels are given as [C,
// size, size] floats in [-1, 1]. IDX images are put in the middle of size x size with background
// -1; photos are resized and cropped (image_center_crop). Latents are [C, size, size] floats as
// diffusion models have them.
#ifndef DITMOE_DATA_H
#define DITMOE_DATA_H

#include <stdbool.h>
#include <stdint.h>

#include "devices/error.h"

enum data_split { DATA_TRAIN, DATA_TEST };

struct dataset {
    char *path;
    int64_t count; // images, > 0
    int classes;
    char *
        *class_names; // [classes]: folder names, or the names of Fashion-MNIST's or MNIST's classes
    int size, channels;
    uint8_t *labels8;        // IDX: [count]
    uint8_t *pixels8;        // IDX: [count, rows, columns]
    int rows, columns;       // IDX: as stored
    struct data_file *files; // folder: [count], sorted by class, then by name
    struct latents *latents; // latents: the set
};

// Opens what is at `path`. `size`: side of the images given (0: 32 for IDX; a folder needs it).
// `channels`: 1 or 3 (0: 1 for IDX, 3 for a folder). What is missing or wrong is one line: ERR_IO
// for a path or file that is not there or cannot be read, ERR_INPUT for contents.
int data_open(const char *path, int size, int channels, struct dataset **out);
// Latents have the size and channels they have: other ones asked for are ERR_INPUT.
// DATA_TEST: the t10k files of IDX; the others have no test split (ERR_INPUT).
int data_open_split(const char *path, enum data_split split, int size, int channels,
                    struct dataset **out);
void data_close(struct dataset *d); // NULL is allowed

int data_label(const struct dataset *d, int64_t i);
// Image i as [C, size, size] floats, mirrored left to right if `flip`. Any thread, at the same
// time.
int data_image(const struct dataset *d, int64_t i, bool flip, float *out);

// Image i as sample `position` of a run with this seed: latents are drawn from their distribution
// (data_image() gives its mean).
int data_sample(const struct dataset *d, int64_t i, bool flip, uint64_t seed, uint64_t position,
                float *out);
// 64 bits of a hash of classes, labels and file names, in hexadecimal.
void data_identity(const struct dataset *d, char out[17]);

// ---- order --------------------------------------------------------------------------------------

// The dataset index of position `p` of the endless stream of epochs: each epoch is a permutation of
// [0, count), a pure function of (seed, epoch).
int64_t data_order(int64_t count, uint64_t seed, uint64_t position);

// ---- loader -------------------------------------------------------------------------------------

// Background threads fill batches ahead of training. Sample number p of the run (p counts from 0
// over all epochs, nothing is dropped) is image data_order(count, seed, p), flipped by (seed, p):
// so a loader started at any cursor gives the same samples as one that came there by itself,
// whatever the number of threads. A batch may be larger than the dataset.
struct loader;
struct batch {
    const float *images;   // [B, C, H, W]
    const int32_t *labels; // [B]
    const int64_t *index;  // [B], the dataset's numbers
    uint64_t first;        // position of the first sample
};

// `cursor`: samples consumed before. `threads` 0: chosen. The dataset must outlive the loader.
int loader_start(const struct dataset *d, int batch, uint64_t seed, uint64_t cursor, bool flip,
                 int threads, struct loader **out);
// The same for one of several ranks: of each batch only samples first..first+count-1 are read and
// given (count 0: none); positions and the cursor are the whole batch's.
int loader_start_part(const struct dataset *d, int batch, int first, int count, uint64_t seed,
                      uint64_t cursor, bool flip, int threads, struct loader **out);
// The next batch, valid until the next call. What went wrong in a thread is returned here, when its
// batch is due.
int loader_next(struct loader *l, struct batch *out);
uint64_t loader_cursor(const struct loader *l); // samples given so far, to be put in a checkpoint
double loader_waited(const struct loader *l);   // seconds that loader_next() has waited, in all
void loader_stop(struct loader *l);             // joins the threads; NULL is allowed

#endif
