// Writing .pt files; see weights_writer.h. The pickle is that of torch.save: a dict of dicts of
//   torch._utils._rebuild_tensor_v2(('storage', torch.FloatStorage, KEY, 'cpu', ELEMENTS), 0,
//                                   SIZES, STRIDES, False, OrderedDict())
// and KEY names the archive's entry data/KEY.
#include "model/torch_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/zip_write.h"

struct declared {
    char *name;
    enum st_dtype dtype;
    int ndim;
    int64_t shape[ST_DIMS], count;
    uint64_t bytes;
};

struct text {
    char *key, *value;
};

// Values that a pickle uses again, by their place in its memo.
enum memo { MEMO_REBUILD, MEMO_STORAGE, MEMO_CPU, MEMO_ORDERED, MEMO_TYPES };

struct torch_writer {
    struct zip_writer *zip;
    char *path;
    bool bare, begun;
    struct declared *list;
    size_t count, room;
    struct text *texts;
    size_t text_count;
    size_t current;   // tensor that is being written
    uint64_t written; // bytes of it
    uint8_t *pickle;
    size_t length, pickle_room;
    bool no_memory; // of the pickle: seen when it is whole
    bool known[MEMO_TYPES + ST_DTYPES];
};

static const char *const storages[ST_DTYPES] = {
    [ST_F32] = "FloatStorage",  [ST_F16] = "HalfStorage", [ST_BF16] = "BFloat16Storage",
    [ST_F64] = "DoubleStorage", [ST_I32] = "IntStorage",  [ST_I64] = "LongStorage",
    [ST_U8] = "ByteStorage"};

// ---- declarations -------------------------------------------------------------------------------

int torch_create(const char *path, bool bare, struct torch_writer **out)
{
    *out = NULL;
    struct torch_writer *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    w->bare = bare;
    w->path = strdup(path);
    int code = w->path ? zip_create(path, &w->zip) : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code < 0)
        torch_abort(w);
    else
        *out = w;
    return code;
}

int torch_declare(struct torch_writer *w, const char *name, enum st_dtype dtype, int ndim,
                  const int64_t *shape)
{
    BUG_IF(w->begun || ndim < 0 || ndim > ST_DIMS);
    if (w->count == w->room) {
        const size_t room = 2 * w->room + 256;
        struct declared *more = realloc(w->list, room * sizeof *more);
        if (!more)
            return fail(ERR_NOMEM, "%s: out of memory", w->path);
        w->list = more;
        w->room = room;
    }
    struct declared d = {.name = strdup(name), .dtype = dtype, .ndim = ndim, .count = 1};
    if (!d.name)
        return fail(ERR_NOMEM, "%s: out of memory", w->path);
    bool overflow = false;
    for (int i = 0; i < ndim; i++) {
        overflow |= shape[i] < 0 || __builtin_mul_overflow(d.count, shape[i], &d.count);
        d.shape[i] = shape[i];
    }
    overflow |= __builtin_mul_overflow((uint64_t)d.count, st_dtype_size(dtype), &d.bytes);
    w->list[w->count++] = d;
    return overflow ? fail(ERR_INPUT, "%s: tensor '%s': its shape is negative or too large",
                           w->path, name)
                    : 0;
}

int torch_set_metadata(struct torch_writer *w, const char *key, const char *value)
{
    struct text *more = realloc(w->texts, (w->text_count + 1) * sizeof *more);
    if (!more)
        return fail(ERR_NOMEM, "%s: out of memory", w->path);
    w->texts = more;
    more[w->text_count++] = (struct text){strdup(key), strdup(value)};
    return more[w->text_count - 1].key && more[w->text_count - 1].value
               ? 0
               : fail(ERR_NOMEM, "%s: out of memory", w->path);
}

// ---- the pickle ---------------------------------------------------------------------------------

static void put(struct torch_writer *w, const void *data, size_t n)
{
    if (w->length + n > w->pickle_room) {
        const size_t room = 2 * (w->length + n) + 4096;
        uint8_t *more = realloc(w->pickle, room);
        if (!more) {
            w->no_memory = true;
            return;
        }
        w->pickle = more;
        w->pickle_room = room;
    }
    memcpy(w->pickle + w->length, data, n);
    w->length += n;
}

#define PUT(w, literal) put(w, literal, sizeof literal - 1)

static void put_number(struct torch_writer *w, uint64_t value, int bytes)
{
    uint8_t out[8];
    for (int i = 0; i < bytes; i++)
        out[i] = (uint8_t)(value >> 8 * i);
    put(w, out, (size_t)bytes);
}

static void put_text(struct torch_writer *w, const char *text)
{
    PUT(w, "X");
    put_number(w, strlen(text), 4);
    put(w, text, strlen(text));
}

static void put_int(struct torch_writer *w, int64_t value)
{
    if (value < INT32_MAX) {
        PUT(w, "J");
        put_number(w, (uint64_t)value, 4);
    } else {
        PUT(w, "\x8a\x8"); // 8 bytes, signed
        put_number(w, (uint64_t)value, 8);
    }
}

// The value from the memo; false: the caller puts it, and put_memo() after it.
static bool put_known(struct torch_writer *w, int which)
{
    if (w->known[which]) {
        PUT(w, "h");
        put_number(w, (uint64_t)which, 1);
    }
    return w->known[which];
}

static void put_memo(struct torch_writer *w, int which)
{
    PUT(w, "q");
    put_number(w, (uint64_t)which, 1);
    w->known[which] = true;
}

static void put_global(struct torch_writer *w, int which, const char *module, const char *name)
{
    if (put_known(w, which))
        return;
    PUT(w, "c");
    put(w, module, strlen(module));
    PUT(w, "\n");
    put(w, name, strlen(name));
    PUT(w, "\n");
    put_memo(w, which);
}

static void put_word(struct torch_writer *w, int which, const char *text)
{
    if (put_known(w, which))
        return;
    put_text(w, text);
    put_memo(w, which);
}

static void put_storage(struct torch_writer *w, const struct declared *d)
{
    char key[24];
    snprintf(key, sizeof key, "%zu", (size_t)(d - w->list));
    PUT(w, "(");
    put_word(w, MEMO_STORAGE, "storage");
    put_global(w, MEMO_TYPES + (int)d->dtype, "torch", storages[d->dtype]);
    put_text(w, key);
    put_word(w, MEMO_CPU, "cpu");
    put_int(w, d->count);
    PUT(w, "tQ");
}

static void put_tensor(struct torch_writer *w, const struct declared *d)
{
    int64_t stride[ST_DIMS], row = 1;
    for (int i = d->ndim - 1; i >= 0; i--) {
        stride[i] = row;
        row *= d->shape[i] > 1 ? d->shape[i] : 1;
    }
    put_global(w, MEMO_REBUILD, "torch._utils", "_rebuild_tensor_v2");
    PUT(w, "(");
    put_storage(w, d);
    put_int(w, 0);
    PUT(w, "(");
    for (int i = 0; i < d->ndim; i++)
        put_int(w, d->shape[i]);
    PUT(w, "t(");
    for (int i = 0; i < d->ndim; i++)
        put_int(w, stride[i]);
    PUT(w, "t\x89");
    put_global(w, MEMO_ORDERED, "collections", "OrderedDict");
    PUT(w, ")RtR");
}

static bool is_ema(const struct declared *d)
{
    return !strncmp(d->name, "ema.", 4);
}

// The average's tensor of that name, or the model's own.
static const struct declared *ema_of(const struct torch_writer *w, const struct declared *d)
{
    for (size_t i = 0; i < w->count; i++)
        if (is_ema(&w->list[i]) && !strcmp(w->list[i].name + 4, d->name))
            return &w->list[i];
    return d;
}

static void put_dict(struct torch_writer *w, bool ema)
{
    bool any_model = false;
    for (size_t i = 0; i < w->count; i++)
        any_model |= !is_ema(&w->list[i]);
    PUT(w, "}(");
    for (size_t i = 0; i < w->count; i++) {
        const struct declared *d = &w->list[i];
        if (is_ema(d) && any_model && !w->bare)
            continue; // comes with the model's of the same name
        put_text(w, is_ema(d) && !w->bare ? d->name + 4 : d->name);
        put_tensor(w, ema ? ema_of(w, d) : d);
    }
    PUT(w, "u");
}

static void put_root(struct torch_writer *w)
{
    PUT(w, "\x80\x02");
    if (w->bare) {
        put_dict(w, false);
    } else {
        PUT(w, "}(");
        put_text(w, "model");
        put_dict(w, false);
        put_text(w, "ema");
        put_dict(w, true);
        for (size_t i = 0; i < w->text_count; i++) {
            put_text(w, w->texts[i].key);
            put_text(w, w->texts[i].value);
        }
        PUT(w, "u");
    }
    PUT(w, ".");
}

// ---- the archive --------------------------------------------------------------------------------

static int write_entry(struct torch_writer *w, const char *name, const void *data, size_t bytes)
{
    TRY(zip_entry_begin(w->zip, name, bytes));
    return zip_write(w->zip, data, bytes);
}

static int next_tensor(struct torch_writer *w)
{
    char name[48];
    if (w->current == w->count)
        return 0;
    snprintf(name, sizeof name, "archive/data/%zu", w->current);
    w->written = 0;
    return zip_entry_begin(w->zip, name, w->list[w->current].bytes);
}

// Goes on to the next tensor with bytes to come.
static int skip_complete(struct torch_writer *w)
{
    while (w->current < w->count && w->written == w->list[w->current].bytes) {
        w->current++;
        TRY(next_tensor(w));
    }
    return 0;
}

int torch_begin(struct torch_writer *w)
{
    BUG_IF(w->begun);
    w->begun = true;
    put_root(w);
    if (w->no_memory)
        return fail(ERR_NOMEM, "%s: out of memory", w->path);
    TRY(write_entry(w, "archive/data.pkl", w->pickle, w->length));
    TRY(write_entry(w, "archive/byteorder", "little", 6));
    TRY(write_entry(w, "archive/version", "3\n", 2));
    TRY(next_tensor(w));
    return skip_complete(w);
}

int torch_write(struct torch_writer *w, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    BUG_IF(!w->begun);
    while (bytes > 0) {
        if (w->current == w->count)
            return fail(ERR_INPUT, "%s: more data than was declared", w->path);
        const uint64_t left = w->list[w->current].bytes - w->written;
        const size_t n = bytes < left ? bytes : (size_t)left;
        TRY(zip_write(w->zip, p, n));
        w->written += n;
        p += n;
        bytes -= n;
        TRY(skip_complete(w));
    }
    return 0;
}

static void release(struct torch_writer *w)
{
    for (size_t i = 0; i < w->count; i++)
        free(w->list[i].name);
    for (size_t i = 0; i < w->text_count; i++)
        free(w->texts[i].key), free(w->texts[i].value);
    free(w->list), free(w->texts), free(w->pickle), free(w->path);
    free(w);
}

int torch_commit(struct torch_writer *w)
{
    BUG_IF(!w->begun);
    if (w->current < w->count) {
        int code = fail(ERR_INPUT, "%s: less data than was declared", w->path);
        torch_abort(w);
        return code;
    }
    int code = zip_commit(w->zip);
    release(w);
    return code;
}

void torch_abort(struct torch_writer *w)
{
    if (!w)
        return;
    zip_abort(w->zip);
    release(w);
}
