// Inception v3 (Szegedy et al. 2016) with the weights and the departures of the FID world: the
// network of inception-2015-12-05 in the names of torchvision, as pytorch-fid distributes it.
// Averages leave out padding, and the last block takes maxima where the paper has averages. Widths
// follow the file.
//
// Of each image: pool, the mean of the last block (2048, what FID is of); spatial, the first 7
// channels of the 1x1 branch of Mixed_6d at its 17 x 17 pixels (2023 in the order y, x, channel;
// what sFID is of, "mixed_6/conv" in the original graph); and logits, pool times the class weights
// without their bias (what the Inception Score of ADM's evaluator is of).
#ifndef DITMOE_INCEPTION_H
#define DITMOE_INCEPTION_H

#include "model/image.h"
#include "model/safetensors.h"
#include "runtime/plan.h"
#include "runtime/recording.h"

// How images come to 299 x 299 and to the network's range, both linear and without antialiasing:
// centres of pixels correspond and 2 v/255 - 1 (pytorch-fid), or corners correspond, as in
// TensorFlow 1, and (v - 128)/128 (ADM's evaluator, and the original FID).
enum inception_input { INCEPTION_PYTORCH_FID, INCEPTION_ADM };

enum { INCEPTION_SIDE = 299, INCEPTION_SPATIAL = 7 };

struct inception_node;  // one operation
struct inception_value; // what operations read and write

struct inception {
    struct context ctx;
    struct plan *plan;
    enum inception_input input;
    int batch;                     // images at a time
    int dim, spatial_dim, classes; // 2048, 2023, 1008 (0: the file has no class weights)

    struct inception_node *nodes;
    struct inception_value *values;
    int node_count, value_count;
    struct tensor bytes, taps;           // the batch as it came, and how it is resampled
    struct tensor pool, spatial, logits; // [N,dim], [N,7,17,17], [N,classes] f32
    struct tensor class_w;               // [classes,dim] f32
    struct recording recording;

    uint8_t *host_bytes;
    int32_t *host_taps;
    float *host_spatial;
};

// Plans, allocates and loads the network of an open file. A missing tensor or a shape that does not
// fit is ERR_INPUT naming it. Without a file: the published widths and random weights, to measure
// with. `limit`: device memory to plan with, 0: all.
int inception_new(struct device *dev, struct stream *stream, const struct safetensors *file,
                  int batch, enum inception_input input, uint64_t limit, struct inception **out);
void inception_free(struct inception *n); // NULL is allowed

// Brings up to `batch` RGB images of any sizes to the device. Then the network runs, without being
// waited for; then the features of the first `count` are read: pool [count,dim], spatial
// [count,spatial_dim], logits [count,classes] (NULL: not wanted).
int inception_put(struct inception *n, const struct image *images, int count);
int inception_run(struct inception *n);
double inception_flops(const struct inception *n); // of a run: those of the convolutions
int inception_read(struct inception *n, int count, float *pool, float *spatial, float *logits);

// The most bytes that an image takes on the device: of larger ones only the pixels that count go
// there.
enum { INCEPTION_IMAGE_BYTES = 4 * INCEPTION_SIDE * INCEPTION_SIDE * 3 };

// ---- for inception.c alone ----------------------------------------------------------------------

enum inception_op { OP_CONV, OP_POOL, OP_SPATIAL, OP_MEAN };

struct inception_node {
    enum inception_op op;
    char name[64]; // of a convolution: "Mixed_5b.branch1x1"
    int from, to;  // values
    int64_t column, channels; // that it writes in `to`
    int kernel_h, kernel_w, stride, pad_h, pad_w;
    bool maximum;
    struct tensor w, bias;
};

struct inception_value {
    char name[64];
    int height, width;
    int64_t channels;
    int first, last; // nodes that write it first and read it last
    struct tensor t; // [N*H*W, channels]
};

// inception_load.c: the shape of a convolution's weight [O,C,kh,kw], and its weights with the
// normalisation after it folded in.
int inception_weight_shape(const struct safetensors *file, const struct inception_node *node,
                           int64_t channels, int64_t *out);
int inception_load(struct inception *n, const struct safetensors *file);
int inception_fill(struct inception *n); // random weights

#endif
