// A part of an autoencoder as a list of steps, each one operation; for vae*.c.
//
// Steps read and write values: matrices of pixels (runtime/ops.h), numbered in the order in which
// they first appear. Building the list needs no device; sizes are filled in for any image.
#ifndef DITMOE_VAE_NET_H
#define DITMOE_VAE_NET_H

#include "model/vae.h"
#include "runtime/ops.h"
#include "runtime/profile.h"

enum { VAE_VALUES = 512, VAE_STEPS = 512, VAE_WEIGHTS = 512 };

struct vae_weight {
    const struct st_tensor *from;
    bool vector;           // as it is; else a convolution's [out, channels, kernel_h, kernel_w]
    int64_t out, channels; // vector: out alone
    int kernel_h, kernel_w;
    int64_t rows; // out, or more: rows of zeros
    struct tensor t;
    struct packed packed;
};

struct vae_value {
    int64_t columns;
    bool f32;          // else the device's type of activations
    int first, last;   // steps that write it first, and read it last
    int height, width; // for the present size
    struct tensor t;
};

enum vae_step_kind { VAE_CONV, VAE_NORM, VAE_ATTENTION };
struct vae_step {
    enum vae_step_kind kind;
    int in, out;      // values
    int keys, values; // of attention, whose `in` are the queries
    int weight, bias; // -1: none
    bool silu;        // of a norm
    struct conv conv; // without images, height and width
};

struct vae_net {
    const struct vae_file *file;
    struct vae_weight *weights;
    struct vae_value *values;
    struct vae_step *steps;
    int weight_count, value_count, step_count;
    int out;             // the last value
    int doubled, halved; // times that the sides are
};

// ERR_INPUT where the file lacks a tensor or has another shape. Frees itself when it fails.
int vae_net_build(const struct vae_file *f, enum vae_part part, struct vae_net *out);
void vae_net_free(struct vae_net *n);

// Sets the sizes of all values for an input of this size.
void vae_net_resize(struct vae_net *n, int images, int height, int width);

#endif
