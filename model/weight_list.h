// A list of weights to write, each taken from a tensor of an open file or drawn at random: what
// converting and upcycling have in common. Written in pieces, so that memory is that of one piece.
#ifndef DITMOE_WEIGHT_LIST_H
#define DITMOE_WEIGHT_LIST_H

#include "model/weights_writer.h"

enum { WEIGHT_NAME = 144 };

struct weight_item {
    char name[WEIGHT_NAME];
    enum st_dtype dtype; // to write it as
    int ndim;
    int64_t shape[ST_DIMS];
    const struct st_tensor *from; // its elements from `first` on; NULL: drawn
    int64_t first;
    float deviation; // drawn: from N(0, deviation); 0: zeros
    uint64_t seed, stream;
};

struct weight_list {
    struct weight_item *items;
    int count, room;
};

// Adds an item like a whole tensor, under `name`, as `dtype` (< 0: as it is; whole numbers stay).
// The item may be changed until the list is written.
int weight_list_add(struct weight_list *list, const char *name, const struct st_tensor *from,
                    int dtype, struct weight_item **out);
void weight_list_free(struct weight_list *list);

// Writes all items to a new file with metadata of `count` pairs key, value.
int weight_list_write(const struct weight_list *list, const struct safetensors *source,
                      const char *path, enum weights_format format, const char *const metadata[][2],
                      int count);

#endif
