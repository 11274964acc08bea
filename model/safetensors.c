// Reading safetensors; see safetensors.h. The writer is safetensors_write.c.
#include "model/safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model/json_members.h"
#include "model/mapped_file.h"
#include "model/safetensors_internal.h"

// Bytes of a header; of the shortest description of a tensor, {"dtype":"U8","shape":[],
// "data_offsets":[0,0]} with a name and what is around it; of the longest that is read.
enum { HEADER_MAX = 100000000, ENTRY_MIN = 48, ENTRY_MAX = 4096, METADATA_MAX = 65536 };

// ---- messages -----------------------------------------------------------------------------------

static int bad_file(const struct safetensors *s, const char *what)
{
    return fail(ERR_INPUT, "%s: not a whole safetensors file: %s", s->path, what);
}

// ---- the header ---------------------------------------------------------------------------------

static int parse_dtype(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    if (!name)
        return st_bad_tensor(s, t->name, "has no dtype");
    for (int i = 0; i < ST_DTYPES; i++) {
        if (!strcmp(name, st_dtype_name((enum st_dtype)i))) {
            t->dtype = (enum st_dtype)i;
            return 0;
        }
    }
    return fail(ERR_INPUT, "%s: tensor '%s': dtype '%s' is not supported", s->path,
                st_shown(t->name).text, st_shown(name).text);
}

// The product of the shape must fit, even where a later dimension is zero.
static int parse_shape(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape))
        return st_bad_tensor(s, t->name, "has no shape");
    if (json_array_size(shape) > ST_DIMS)
        return st_bad_tensor(s, t->name, "has more than 8 dimensions");
    t->ndim = (int)json_array_size(shape);
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        const json_t *length = json_array_get(shape, (size_t)i);
        if (!json_is_integer(length) || json_integer_value(length) < 0)
            return st_bad_tensor(s, t->name, "its shape is not a list of lengths");
        t->shape[i] = json_integer_value(length);
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count))
            return st_bad_tensor(s, t->name, "its shape is too large");
    }
    if (__builtin_mul_overflow((uint64_t)t->count, st_dtype_size(t->dtype), &t->bytes))
        return st_bad_tensor(s, t->name, "its shape is too large");
    return 0;
}

static int parse_range(const struct safetensors *s, const json_t *entry, struct st_tensor *t)
{
    const json_t *range = json_object_get(entry, "data_offsets");
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return st_bad_tensor(s, t->name, "has no data_offsets [begin, end]");
    json_int_t from = json_integer_value(begin), to = json_integer_value(end);
    if (from < 0 || to < from)
        return st_bad_tensor(s, t->name, "its data_offsets are no range");
    if ((uint64_t)to > s->data_size)
        return fail(ERR_INPUT,
                    "%s: tensor '%s': its data ends at byte %lld of %llu: the file is cut short",
                    s->path, st_shown(t->name).text, (long long)to, (unsigned long long)s->data_size);
    if ((uint64_t)(to - from) != t->bytes)
        return fail(ERR_INPUT, "%s: tensor '%s': %lld bytes of data, but its shape needs %llu",
                    s->path, st_shown(t->name).text, (long long)(to - from),
                    (unsigned long long)t->bytes);
    t->offset = (uint64_t)from;
    t->data = s->data + from;
    return 0;
}

static int bad_header(const struct safetensors *s, struct json_span header, const char *at,
                      const char *what)
{
    return fail(ERR_INPUT, "%s: not a whole safetensors file: header byte %lld: %s", s->path,
                (long long)(at - header.text), st_shown(what).text);
}

// One value of the header. What jansson makes of it goes away with it.
static int load(const struct safetensors *s, struct json_span header, struct json_span value,
                json_t **out)
{
    json_error_t error;
    *out = json_loadb(value.text, value.length, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    return *out ? 0 : bad_header(s, header, value.text + error.position, error.text);
}

// Kept whole, as strings: so they must not be very many.
static int parse_metadata(struct safetensors *s, struct json_span header, struct json_span text)
{
    struct json_members members = json_members(text);
    struct json_span key, value;
    int count = 0;
    if (!text.length || *text.text != '{')
        return bad_file(s, "__metadata__ is not an object");
    if (s->header)
        return bad_file(s, "duplicate __metadata__");
    while (json_members_next(&members, &key, &value)) {
        if (!value.length || *value.text != '"')
            return bad_file(s, "__metadata__ holds something other than strings");
        if (++count > METADATA_MAX)
            return bad_file(s, "__metadata__ has more than 65536 entries");
    }
    if (members.wrong)
        return bad_header(s, header, members.at, members.wrong);
    json_t *metadata;
    TRY(load(s, header, text, &metadata));
    s->header = json_pack("{s:o}", "__metadata__", metadata);
    return s->header ? 0 : fail(ERR_NOMEM, "%s: out of memory", s->path);
}

// The name goes to *names, which has room for it: it is no longer than it is in the header.
static int parse_name(struct safetensors *s, struct json_span header, struct json_span key,
                      char **names)
{
    json_t *name;
    TRY(load(s, header, key, &name));
    const size_t length = json_string_length(name);
    memcpy(*names, json_string_value(name), length + 1);
    *names += length + 1;
    json_decref(name);
    return 0;
}

static int parse_tensor(struct safetensors *s, struct json_span header, struct json_span value,
                        const char *name)
{
    struct st_tensor *t = &s->tensors[s->count];
    json_t *entry;
    if (!value.length || *value.text != '{')
        return st_bad_tensor(s, name, "is not described by an object");
    if (value.length > ENTRY_MAX)
        return st_bad_tensor(s, name, "its description is longer than 4096 bytes");
    *t = (struct st_tensor){.name = name};
    TRY(load(s, header, value, &entry));
    int code = parse_dtype(s, entry, t);
    if (code >= 0)
        code = parse_shape(s, entry, t);
    if (code >= 0)
        code = parse_range(s, entry, t);
    json_decref(entry);
    s->count += code >= 0;
    return code;
}

// A tensor costs its name and a struct of four times the shortest description: what a header costs
// is a small multiple of its length, whatever is in it.
static int parse_tensors(struct safetensors *s, struct json_span header)
{
    struct json_members members = json_members(header);
    struct json_span key, value;
    s->tensors = calloc(header.length / ENTRY_MIN + 1, sizeof *s->tensors);
    char *names = s->names = malloc(header.length + 1);
    if (!s->tensors || !names)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    while (json_members_next(&members, &key, &value)) {
        char *name = names;
        TRY(parse_name(s, header, key, &names));
        if (!strcmp(name, "__metadata__"))
            TRY(parse_metadata(s, header, value));
        else
            TRY(parse_tensor(s, header, value, name));
    }
    return members.wrong ? bad_header(s, header, members.at, members.wrong) : 0;
}

// The tensors must cover the data, each byte once: the format allows neither holes nor overlaps.
static int check_cover(const struct safetensors *s)
{
    uint64_t end = 0;
    for (int i = 0; i < s->count; i++) {
        const struct st_tensor *t = &s->tensors[i];
        if (t->offset != end)
            return st_bad_tensor(s, t->name,
                              t->offset < end ? "its data overlaps that of another tensor"
                                              : "there is a hole in the file before its data");
        end += t->bytes;
    }
    if (end != s->data_size)
        return fail(ERR_INPUT, "%s: %llu bytes after the last tensor '%s' belong to none", s->path,
                    (unsigned long long)(s->data_size - end),
                    s->count ? st_shown(s->tensors[s->count - 1].name).text : "");
    return 0;
}

static int index_tensors(struct safetensors *s)
{
    qsort(s->tensors, (size_t)s->count, sizeof *s->tensors, st_by_offset);
    TRY(check_cover(s));
    TRY(st_index_names(s));
    for (int i = 1; i < s->count; i++)
        if (!strcmp(s->by_name[i - 1]->name, s->by_name[i]->name))
            return st_bad_tensor(s, s->by_name[i]->name, "duplicate: it is there twice");
    return 0;
}

static int parse_header(struct safetensors *s)
{
    if (s->size < 8)
        return bad_file(s, "shorter than 8 bytes");
    uint64_t length = 0;
    for (int i = 0; i < 8; i++)
        length |= (uint64_t)s->map[i] << 8 * i;
    if (length > HEADER_MAX)
        return bad_file(s, "its header would be longer than 100 MB");
    if (length > s->size - 8)
        return bad_file(s, "it ends within the header");
    const char *text = (const char *)s->map + 8;
    if (length < 2 || text[0] != '{')
        return bad_file(s, "its header is not a JSON object");
    s->data = s->map + 8 + length;
    s->data_size = s->size - 8 - length;
    TRY(parse_tensors(s, (struct json_span){text, (size_t)length}));
    return index_tensors(s);
}

// ---- open, close --------------------------------------------------------------------------------

static int open_file(struct safetensors *s)
{
    struct mapped_file file;
    int code = mapped_file_open(s->path, &file);
    if (code < 0)
        return code == ERR_INPUT ? fail_in(code, "%s: not a whole safetensors file", s->path)
                                 : fail_in(code, "%s", s->path);
    s->map = file.data;
    s->size = file.size;
    return parse_header(s);
}

int safetensors_open(const char *path, struct safetensors **out)
{
    *out = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s || !(s->path = strdup(path))) {
        free(s);
        return fail(ERR_NOMEM, "%s: out of memory", path);
    }
    int code = open_file(s);
    if (code < 0) {
        safetensors_close(s);
        return code;
    }
    *out = s;
    return 0;
}

