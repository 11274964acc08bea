// Reading PyTorch files; see torch_file.h.
#include "model/torch_file.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/mapped_file.h"
#include "model/pickle.h"
#include "model/safetensors_internal.h"
#include "model/zip.h"

// A pickle's values cost some tens of bytes for each of its own. That of a model with 16000 tensors
// has 3 MB.
enum { PICKLE_MAX = 1 << 24 };

// A pickle can name one text many times over, so its length alone does not bound what names take.
enum { TENSORS_MAX = 1 << 17, NAME_MAX_BYTES = 512 };

struct region { // the bytes of one storage
    const char *key;
    size_t length;
    uint64_t offset, size;
};

struct torch_file {
    struct mapped_file file;
    const char *format;
    struct pickle *pickle;
    struct region *regions; // [count], by key
    size_t count;
};

static uint64_t number(const uint8_t *at, int bytes)
{
    uint64_t n = 0;
    for (int i = 0; i < bytes; i++)
        n |= (uint64_t)at[i] << 8 * i;
    return n;
}

static int by_key(const void *a, const void *b)
{
    const struct region *x = a, *y = b;
    const size_t shorter = x->length < y->length ? x->length : y->length;
    const int order = shorter ? memcmp(x->key, y->key, shorter) : 0;
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

static const struct region *find_region(const struct torch_file *f, const char *key, size_t length)
{
    const struct region want = {.key = key, .length = length};
    return f->count ? bsearch(&want, f->regions, f->count, sizeof want, by_key) : NULL;
}

// ---- the zip form -------------------------------------------------------------------------------

static int bad_file(const char *what)
{
    return fail(ERR_INPUT, "not a whole PyTorch file: %s", what);
}

static int read_directory(struct torch_file *f)
{
    struct zip_entry *entries;
    size_t count;
    int code = zip_directory(f->file.data, f->file.size, &entries, &count);
    if (code < 0)
        return fail_in(code, "not a whole PyTorch file");
    f->regions = malloc((count + 1) * sizeof *f->regions);
    if (!f->regions)
        code = fail(ERR_NOMEM, "out of memory for the zip directory");
    for (size_t i = 0; code >= 0 && i < count; i++) {
        const struct zip_entry *e = &entries[i];
        if (e->method != ZIP_STORED)
            code = bad_file("an entry is compressed, which torch.save does not do");
        else
            f->regions[f->count++] = (struct region){e->name, e->length, e->offset, e->size};
    }
    free(entries);
    return code;
}

static const struct region *entry_named(const struct torch_file *f, const char *name)
{
    const size_t length = strlen(name);
    for (size_t i = 0; i < f->count; i++) {
        const struct region *r = &f->regions[i];
        if (r->length > length && !memcmp(r->key + r->length - length, name, length) &&
            !memchr(r->key, '/', r->length - length))
            return r;
    }
    return NULL;
}

static int check_order(const struct torch_file *f)
{
    const struct region *order = entry_named(f, "/byteorder");
    if (order && (order->size != 6 || memcmp(f->file.data + order->offset, "little", 6)))
        return fail(ERR_INPUT, "its numbers are not little-endian, which is not supported");
    return 0;
}

// Leaves of the entries those under ROOT/data/, by what follows that.
static void keep_storages(struct torch_file *f, const char *root, size_t length)
{
    size_t kept = 0;
    for (size_t i = 0; i < f->count; i++) {
        struct region r = f->regions[i];
        if (r.length < length + 6 || memcmp(r.key, root, length) ||
            memcmp(r.key + length, "/data/", 6))
            continue;
        r.key += length + 6;
        r.length -= length + 6;
        f->regions[kept++] = r;
    }
    f->count = kept;
}

static int read_zip(struct torch_file *f)
{
    size_t used;
    TRY(read_directory(f));
    const struct region *entry = entry_named(f, "/data.pkl");
    if (!entry)
        return bad_file("a zip file without data.pkl");
    TRY(check_order(f));
    if (entry->size > PICKLE_MAX)
        return fail(ERR_INPUT, "its pickle has more than 16 MiB, which no model needs");
    const struct region pickle = *entry;
    keep_storages(f, pickle.key, pickle.length - strlen("/data.pkl"));
    return pickle_read(f->file.data + pickle.offset, (size_t)pickle.size, &f->pickle, &used);
}

// ---- the form before 1.6 ------------------------------------------------------------------------

// Five pickles (a magic number, a version, the system, the object, the storages' keys), then for
// each key the count of elements and the elements.
static const uint8_t magic[] = {0x80, 2,    0x8a, 10,   0x6c, 0xfc, 0x9c, 0x46,
                                0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, '.'};

static int read_pickle(const struct torch_file *f, size_t *at, struct pickle **out)
{
    size_t used = 0, left = f->file.size - *at;
    TRY(pickle_read(f->file.data + *at, left < PICKLE_MAX ? left : PICKLE_MAX, out, &used));
    *at += used;
    return 0;
}

static int check_system(const struct torch_file *f, size_t *at)
{
    struct pickle *p;
    TRY(read_pickle(f, at, &p));
    const struct pickle_value *version = pickle_root(p);
    const bool known = version->kind == PICKLE_INT && version->i == 1001;
    pickle_free(p);
    if (!known)
        return bad_file("a version of the old form other than 1001");
    TRY(read_pickle(f, at, &p));
    const struct pickle_value *little = pickle_get(pickle_root(p), "little_endian");
    const bool right = little && little->kind == PICKLE_INT && little->i == 1;
    pickle_free(p);
    return right ? 0 : fail(ERR_INPUT, "its numbers are not little-endian, which is not supported");
}

static int by_storage_key(const void *a, const void *b)
{
    const struct pickle_value *const x = (*(const struct pickle_value *const *)a)->storage->key;
    const struct pickle_value *const y = (*(const struct pickle_value *const *)b)->storage->key;
    return by_key(&(struct region){.key = x->text, .length = x->count},
                  &(struct region){.key = y->text, .length = y->count});
}

static int place_storage(struct torch_file *f, const struct pickle_value **known, size_t count,
                         const struct pickle_value *key, size_t *at)
{
    const struct pickle_storage at_key = {.key = key};
    const struct pickle_value probe = {.kind = PICKLE_STORAGE, .storage = &at_key}, *want = &probe;
    const struct pickle_value **found = NULL;
    if (key->kind == PICKLE_TEXT && count)
        found = bsearch(&want, known, count, sizeof *known, by_storage_key);
    if (!found)
        return bad_file("a storage that no tensor uses");
    if (f->file.size - *at < 8)
        return bad_file("it is cut short before a storage");
    uint64_t bytes = number(f->file.data + *at, 8);
    *at += 8;
    if (__builtin_mul_overflow(bytes, (*found)->storage->element, &bytes) ||
        bytes > f->file.size - *at)
        return bad_file("it is cut short within a storage");
    f->regions[f->count++] = (struct region){key->text, key->count, *at, bytes};
    *at += (size_t)bytes;
    return 0;
}

static int place_storages(struct torch_file *f, const struct pickle_value *keys, size_t at)
{
    size_t count;
    const struct pickle_value *const *storages = pickle_storages(f->pickle, &count);
    const struct pickle_value **known = malloc((count + 1) * sizeof *known);
    f->regions = malloc((keys->count + 1) * sizeof *f->regions);
    int code = known && f->regions ? 0 : fail(ERR_NOMEM, "out of memory for the storages");
    if (code >= 0 && count) {
        memcpy(known, storages, count * sizeof *known);
        qsort(known, count, sizeof *known, by_storage_key);
    }
    for (size_t i = 0; code >= 0 && i < keys->count; i++)
        code = place_storage(f, known, count, keys->items[i], &at);
    free(known);
    return code;
}

static int read_old(struct torch_file *f)
{
    size_t at = sizeof magic;
    TRY(check_system(f, &at));
    TRY(read_pickle(f, &at, &f->pickle));
    struct pickle *keys;
    TRY(read_pickle(f, &at, &keys));
    const struct pickle_value *list = pickle_root(keys);
    int code = list->kind == PICKLE_LIST ? place_storages(f, list, at)
                                         : bad_file("it has no list of storages");
    pickle_free(keys); // the regions' keys are in the file
    return code;
}

// ---- tensors ------------------------------------------------------------------------------------

static int bad_view(const char *name, const char *what)
{
    char shown[96];
    size_t n = 0;
    for (; name[n] && n < sizeof shown - 1; n++)
        shown[n] = (unsigned char)name[n] < 32 || name[n] == 127 ? '?' : name[n];
    shown[n] = 0;
    return fail(ERR_INPUT, "tensor '%s': %s", shown, what);
}

static int read_lengths(const struct pickle_value *v, const char *name, int64_t *to)
{
    if (v->count > ST_DIMS)
        return bad_view(name, "has more than 8 dimensions");
    for (size_t i = 0; i < v->count; i++) {
        if (v->items[i]->kind != PICKLE_INT || v->items[i]->i < 0)
            return bad_view(name, "a size or stride is no length");
        to[i] = v->items[i]->i;
    }
    return 0;
}

// `*last`: the last element's place in the storage.
static int check_view(struct st_tensor *t, int64_t offset, int64_t stored, int64_t *last)
{
    int64_t row = 1, way;
    *last = offset;
    t->count = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count))
            return bad_view(t->name, "its shape is too large");
        t->strided |= t->shape[i] > 1 && t->stride[i] != row;
        if (t->shape[i] > 0 && (__builtin_mul_overflow(t->shape[i] - 1, t->stride[i], &way) ||
                                __builtin_add_overflow(*last, way, last)))
            return bad_view(t->name, "it reaches outside its storage");
        row = t->count;
    }
    if (t->count > 0 && *last >= stored)
        return bad_view(t->name, "it reaches outside its storage");
    if (t->count > stored)
        return bad_view(t->name, "it repeats elements (an expanded view), which is not supported");
    return 0;
}

int torch_file_tensor(const struct torch_file *f, const struct pickle_value *v, const char *name,
                      struct st_tensor *t)
{
    *t = (struct st_tensor){.name = name};
    if (!v || v->kind != PICKLE_TENSOR)
        return bad_view(name, "it is no tensor");
    const struct pickle_value *offset = v->items[1];
    const struct pickle_storage *s = v->items[0]->storage;
    if (v->items[2]->count != v->items[3]->count)
        return bad_view(t->name, "has other numbers of sizes and strides");
    TRY(read_lengths(v->items[2], t->name, t->shape));
    TRY(read_lengths(v->items[3], t->name, t->stride));
    t->ndim = (int)v->items[2]->count;
    t->dtype = s->dtype;
    t->other = s->other;
    const struct region *r = find_region(f, s->key->text, s->key->count);
    if (!r)
        return bad_view(t->name, "its storage is not in the file");
    int64_t last;
    if ((uint64_t)s->count > r->size / s->element)
        return bad_view(t->name, "its storage is cut short");
    if (offset->i < 0 || offset->i > s->count)
        return bad_view(t->name, "it reaches outside its storage");
    TRY(check_view(t, offset->i, s->count, &last));
    t->bytes = t->other ? 0 : (uint64_t)t->count * s->element;
    t->offset = r->offset + (uint64_t)offset->i * s->element;
    t->data = f->file.data + t->offset;
    return 0;
}

// The tensor of the i-th pair of a dict, or NULL.
static const struct pickle_value *weight_at(const struct pickle_value *dict, size_t i,
                                            const struct pickle_value **key)
{
    const struct pickle_value *v = pickle_entry(dict, i, key);
    return v && v->kind == PICKLE_TENSOR ? v : NULL;
}

static size_t pairs(const struct pickle_value *dict)
{
    return dict && dict->kind == PICKLE_DICT ? dict->count / 2 : 0;
}

int torch_name_check(const struct pickle_value *key)
{
    if (!key->count || key->count > NAME_MAX_BYTES || memchr(key->text, 0, key->count))
        return fail(ERR_INPUT, "a tensor's name is empty, longer than %d bytes or no text",
                    NAME_MAX_BYTES);
    return 0;
}

const char *torch_name_copy(const char *prefix, const struct pickle_value *key, char **names)
{
    const size_t length = strlen(prefix);
    char *name = *names;
    memcpy(name, prefix, length);
    memcpy(name + length, key->text, key->count);
    name[length + key->count] = 0;
    *names += length + key->count + 1;
    return name;
}

// How many tensors a dict has, and the bytes of their names with `prefix` and a 0 each.
static int measure(const struct pickle_value *dict, size_t prefix, int *count, size_t *bytes)
{
    const struct pickle_value *key;
    for (size_t i = 0; i < pairs(dict); i++) {
        if (!weight_at(dict, i, &key))
            continue;
        TRY(torch_name_check(key));
        if (*count == TENSORS_MAX)
            return fail(ERR_INPUT, "it holds more than %d tensors", TENSORS_MAX);
        *count += 1;
        *bytes += prefix + key->count + 1;
    }
    return 0;
}

// What a file's dict has chosen for it.
struct chosen {
    struct st_tensor *tensors;
    int count;
    char *names;
};

static int read_tensors(const struct torch_file *f, const struct pickle_value *dict,
                        const char *prefix, char **names, struct chosen *c)
{
    const struct pickle_value *key;
    for (size_t i = 0; i < pairs(dict); i++) {
        const struct pickle_value *v = weight_at(dict, i, &key);
        if (v)
            TRY(torch_file_tensor(f, v, torch_name_copy(prefix, key, names),
                                  &c->tensors[c->count++]));
    }
    return 0;
}

static int by_tensor_name(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

// In our files an average whose every tensor is the model's own, in the same place, is none: one
// set of weights is there under both names (model/weights_writer.h).
static void drop_copies(struct chosen *c, int averages)
{
    struct st_tensor *model = c->tensors + averages;
    const size_t count = (size_t)(c->count - averages);
    if (!averages || (size_t)averages != count)
        return;
    qsort(model, count, sizeof *model, by_tensor_name);
    for (int i = 0; i < averages; i++) {
        const struct st_tensor *t = &c->tensors[i], want = {.name = t->name + 4};
        const struct st_tensor *same = bsearch(&want, model, count, sizeof want, by_tensor_name);
        if (!same || same->data != t->data || same->bytes != t->bytes)
            return;
    }
    memmove(c->tensors, model, count * sizeof *model);
    c->count = (int)count;
}

// 'ema' and 'model' of training scripts, 'module' of DeepSpeed, 'state_dict' of Lightning, else the
// dict itself.
static int choose_tensors(const struct torch_file *f, struct chosen *c)
{
    static const char *const keys[] = {"model", "module", "state_dict"};
    const struct pickle_value *root = pickle_root(f->pickle), *model = NULL;
    if (root->kind != PICKLE_DICT)
        return fail(ERR_INPUT, "it holds no dict of tensors (a whole pickled model is not read)");
    const struct pickle_value *ema = pickle_get(root, "ema");
    int count = 0;
    size_t bytes = 1;
    TRY(measure(ema, 4, &count, &bytes));
    for (int i = 0, before = count; i < 3 && count == before; i++) {
        model = pickle_get(root, keys[i]);
        TRY(measure(model, 0, &count, &bytes));
    }
    if (!count) {
        model = root;
        TRY(measure(model, 0, &count, &bytes));
    }
    if (!count)
        return fail(ERR_INPUT, "it holds no tensors: neither in 'ema' or 'model' nor directly");
    c->tensors = calloc((size_t)count, sizeof *c->tensors);
    char *names = c->names = malloc(bytes);
    if (!c->tensors || !c->names)
        return fail(ERR_NOMEM, "out of memory for %d tensors", count);
    TRY(read_tensors(f, ema, "ema.", &names, c));
    const int averages = c->count;
    TRY(read_tensors(f, model, "", &names, c));
    if (pickle_get(root, "ditmoe.config"))
        drop_copies(c, averages);
    return 0;
}

// ---- metadata -----------------------------------------------------------------------------------

// Ours (model/weights_writer.h puts it beside the dicts): texts by key.
static int read_metadata(const struct pickle_value *root, struct safetensors *s)
{
    static const char *const keys[] = {"ditmoe.config"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const struct pickle_value *v = pickle_get(root, keys[i]);
        if (v && v->kind == PICKLE_TEXT)
            TRY(st_set_metadata(s, keys[i], v->text, v->count));
    }
    return 0;
}

// ---- open ---------------------------------------------------------------------------------------

static int begins_as(const uint8_t *data, size_t size)
{
    if (size >= 4 && !memcmp(data, "PK\3\4", 4))
        return 'z';
    return size >= sizeof magic && !memcmp(data, magic, sizeof magic) ? 'o' : 0;
}

bool torch_file_is(const char *path)
{
    uint8_t head[sizeof magic];
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, head, sizeof head);
    close(fd);
    return n > 0 && begins_as(head, (size_t)n);
}

static int read_file(const char *path, struct torch_file *f)
{
    int code = mapped_file_open(path, &f->file);
    if (code < 0)
        return code == ERR_INPUT ? fail_in(code, "not a whole PyTorch file") : code;
    switch (begins_as(f->file.data, f->file.size)) {
    case 'z':
        f->format = "PyTorch";
        TRY(read_zip(f));
        break;
    case 'o':
        f->format = "PyTorch, as before 1.6";
        TRY(read_old(f));
        break;
    default:
        return bad_file("it begins as neither form of torch.save does");
    }
    if (f->count)
        qsort(f->regions, f->count, sizeof *f->regions, by_key);
    return 0;
}

int torch_file_parse(const char *path, struct torch_file **out)
{
    *out = NULL;
    struct torch_file *f = calloc(1, sizeof *f);
    if (!f)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = read_file(path, f);
    if (code < 0) {
        torch_file_close(f);
        return fail_in(code, "%s", path);
    }
    *out = f;
    return 0;
}

void torch_file_close(struct torch_file *f)
{
    if (!f)
        return;
    pickle_free(f->pickle);
    free(f->regions);
    mapped_file_close(&f->file);
    free(f);
}

const struct pickle_value *torch_file_root(const struct torch_file *f)
{
    return pickle_root(f->pickle);
}

int torch_file_finish(struct torch_file *f, const char *path, struct st_tensor *tensors, int count,
                      char *names, struct safetensors **out)
{
    const struct mapped_file file = f->file;
    const char *format = f->format;
    f->file = (struct mapped_file){0};
    torch_file_close(f);
    return safetensors_adopt(path, format, file.data, file.size, tensors, count, names, out);
}

int torch_file_open(const char *path, struct safetensors **out)
{
    struct torch_file *f;
    struct chosen c = {0};
    *out = NULL;
    TRY(torch_file_parse(path, &f));
    int code = choose_tensors(f, &c);
    if (code < 0) {
        torch_file_close(f);
        free(c.tensors);
        free(c.names);
        return fail_in(code, "%s", path);
    }
    struct pickle *pickle = f->pickle; // texts of metadata lie in the mapping, which stays
    f->pickle = NULL;
    code = torch_file_finish(f, path, c.tensors, c.count, c.names, out);
    if (code >= 0)
        code = read_metadata(pickle_root(pickle), *out);
    pickle_free(pickle);
    if (code < 0) {
        safetensors_close(*out);
        *out = NULL;
    }
    return code;
}
