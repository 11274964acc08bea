#include "model/weight_list.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/rng.h"

enum { PIECE = 1 << 16 };

struct piece {
    float numbers[PIECE];
    uint8_t bytes[PIECE * 8];
};

static bool is_float(enum st_dtype d)
{
    return d == ST_F32 || d == ST_F16 || d == ST_BF16 || d == ST_F64;
}

int weight_list_add(struct weight_list *list, const char *name, const struct st_tensor *from,
                    int dtype, struct weight_item **out)
{
    if (list->count == list->room) {
        const int room = 2 * list->room + 256;
        struct weight_item *more = realloc(list->items, (size_t)room * sizeof *more);
        if (!more)
            return fail(ERR_NOMEM, "no host memory for a list of weights");
        list->items = more;
        list->room = room;
    }
    if (strlen(name) >= WEIGHT_NAME)
        return fail(ERR_INPUT, "tensor '%.60s...': its name is too long", name);
    struct weight_item *item = &list->items[list->count++];
    *item = (struct weight_item){.dtype = dtype < 0 ? ST_F32 : (enum st_dtype)dtype, .from = from};
    snprintf(item->name, sizeof item->name, "%s", name);
    if (from) {
        if (dtype < 0 || !is_float(from->dtype))
            item->dtype = from->dtype;
        item->ndim = from->ndim;
        memcpy(item->shape, from->shape, sizeof item->shape);
    }
    if (out)
        *out = item;
    return 0;
}

void weight_list_free(struct weight_list *list)
{
    free(list->items);
    *list = (struct weight_list){0};
}

static int64_t item_count(const struct weight_item *item)
{
    int64_t n = 1;
    for (int i = 0; i < item->ndim; i++)
        n *= item->shape[i];
    return n;
}

// Elements [first, first + n) of the item, as they are to be in the file.
static int fill(const struct weight_item *item, const struct safetensors *source, int64_t first,
                int64_t n, struct piece *p)
{
    if (item->from && item->from->dtype == item->dtype)
        return safetensors_read_raw(source, item->from, p->bytes, item->first + first, n);
    if (item->from) {
        TRY(safetensors_read_f32(source, item->from, p->numbers, item->first + first, n));
    } else {
        rng_normal_fill(item->seed, item->stream, (uint64_t)first, p->numbers, (size_t)n);
        for (int64_t i = 0; i < n; i++)
            p->numbers[i] = item->deviation > 0 ? item->deviation * p->numbers[i] : 0;
    }
    return weights_round(p->numbers, n, item->dtype, p->bytes);
}

static int write_item(struct weights_writer *w, const struct weight_item *item,
                      const struct safetensors *source, struct piece *p)
{
    const int64_t count = item_count(item);
    for (int64_t at = 0; at < count; at += PIECE) {
        const int64_t n = count - at < PIECE ? count - at : PIECE;
        int code = fill(item, source, at, n, p);
        if (code < 0)
            return fail_in(code, "%s", item->name);
        TRY(weights_write(w, p->bytes, (size_t)n * st_dtype_size(item->dtype)));
    }
    return 0;
}

static int write_all(struct weights_writer *w, const struct weight_list *list,
                     const struct safetensors *source, const char *const metadata[][2], int count)
{
    for (int i = 0; i < list->count; i++) {
        const struct weight_item *item = &list->items[i];
        TRY(weights_declare(w, item->name, item->dtype, item->ndim, item->shape));
    }
    for (int i = 0; i < count; i++)
        TRY(weights_set_metadata(w, metadata[i][0], metadata[i][1]));
    TRY(weights_begin(w));
    struct piece *p = malloc(sizeof *p);
    int code = p ? 0 : fail(ERR_NOMEM, "out of memory");
    for (int i = 0; code >= 0 && i < list->count; i++)
        code = write_item(w, &list->items[i], source, p);
    free(p);
    return code;
}

int weight_list_write(const struct weight_list *list, const struct safetensors *source,
                      const char *path, enum weights_format format, const char *const metadata[][2],
                      int count)
{
    struct weights_writer *w;
    TRY(weights_create(path, format, &w));
    int code = write_all(w, list, source, metadata, count);
    if (code < 0) {
        weights_abort(w);
        return code;
    }
    return weights_commit(w);
}
