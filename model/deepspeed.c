// Reading DeepSpeed's checkpoints; see deepspeed.h.
#include "model/deepspeed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/mapped_file.h"
#include "model/pickle.h"
#include "model/torch_file.h"

enum { RANKS_MAX = 4096, PATH_SIZE = 4096, TAG_MAX = 255, PARAMS_MAX = 1 << 17 };

#define MODEL_FILE "mp_rank_00_model_states.pt"

typedef const struct pickle_value value;

struct zero {
    char directory[PATH_SIZE - 128]; // of the step
    struct torch_file *model;
    struct torch_file **ranks; // [rank_count]; 0: no optimizer files
    int rank_count;
    int stage;
    struct st_joined joined;
    int piece_count;
    char *next_name; // in joined.names
};

static bool exists(const char *directory, const char *name)
{
    char path[PATH_SIZE];
    struct stat s;
    return snprintf(path, sizeof path, "%s/%s", directory, name) < (int)sizeof path &&
           !stat(path, &s);
}

bool deepspeed_is(const char *directory)
{
    return exists(directory, "latest") || exists(directory, MODEL_FILE) ||
           exists(directory, "zero_pp_rank_0_" MODEL_FILE);
}

// ---- the files ----------------------------------------------------------------------------------

// DIR/latest holds the name of a directory beside it; a step's directory has none.
static int find_step(const char *directory, struct zero *z)
{
    struct mapped_file f;
    char path[PATH_SIZE], tag[TAG_MAX + 1] = "";
    size_t n = 0;
    if (!exists(directory, "latest")) {
        if (snprintf(z->directory, sizeof z->directory, "%s", directory) >=
            (int)sizeof z->directory)
            return fail(ERR_INPUT, "name too long");
        return 0;
    }
    snprintf(path, sizeof path, "%s/latest", directory);
    int code = mapped_file_open(path, &f);
    if (code < 0)
        return fail_in(code, "latest");
    while (n < f.size && n < TAG_MAX && f.data[n] > 32) {
        tag[n] = (char)f.data[n];
        n++;
    }
    mapped_file_close(&f);
    tag[n] = 0;
    if (!n || n == TAG_MAX || strchr(tag, '/') || !strcmp(tag, ".."))
        return fail(ERR_INPUT, "latest: names no directory beside it");
    if (snprintf(z->directory, sizeof z->directory, "%s/%s", directory, tag) >=
        (int)sizeof z->directory)
        return fail(ERR_INPUT, "name too long");
    return 0;
}

static int open_named(const struct zero *z, const char *name, struct torch_file **out)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/%s", z->directory, name);
    return torch_file_parse(path, out);
}

static int open_ranks(struct zero *z, const char *prefix)
{
    char name[128];
    for (; z->rank_count < RANKS_MAX; z->rank_count++) {
        snprintf(name, sizeof name, "%szero_pp_rank_%d_mp_rank_00_optim_states.pt", prefix,
                 z->rank_count);
        if (!exists(z->directory, name))
            break;
        TRY(open_named(z, name, &z->ranks[z->rank_count]));
    }
    return z->rank_count;
}

static int open_files(struct zero *z)
{
    static const char *const prefixes[] = {"bf16_", "", "fp16_"};
    if (exists(z->directory, "zero_pp_rank_0_" MODEL_FILE))
        return fail(ERR_INPUT,
                    "ZeRO 3 is not read as it is: run the zero_to_fp32.py that DeepSpeed "
                    "put beside it, and open what that writes");
    if (exists(z->directory, "mp_rank_01_model_states.pt"))
        return fail(ERR_INPUT, "it is of a model cut into parallel parts (mp_rank_01), "
                               "which is not supported");
    TRY(open_named(z, MODEL_FILE, &z->model));
    z->ranks = calloc(RANKS_MAX, sizeof(struct torch_file *));
    if (!z->ranks)
        return fail(ERR_NOMEM, "out of memory");
    for (int i = 0, found = 0; i < 3 && !found; i++)
        TRY(found = open_ranks(z, prefixes[i]));
    return 0;
}

// ---- what the pickles hold ----------------------------------------------------------------------

static size_t pairs(value *dict)
{
    return dict && dict->kind == PICKLE_DICT ? dict->count / 2 : 0;
}

static size_t items(value *list)
{
    return list && (list->kind == PICKLE_LIST || list->kind == PICKLE_TUPLE) ? list->count : 0;
}

static value *state_of(const struct zero *z, int rank, const char *key)
{
    value *state = pickle_get(torch_file_root(z->ranks[rank]), "optimizer_state_dict");
    return pickle_get(state, key);
}

static value *of_model(const struct zero *z, const char *key)
{
    return pickle_get(torch_file_root(z->model), key);
}

// One number, or one an optimizer group, of which the largest counts.
static int64_t largest(value *v)
{
    int64_t most = v && v->kind == PICKLE_INT ? v->i : 0;
    for (size_t i = 0; i < items(v); i++)
        if (v->items[i]->kind == PICKLE_INT && v->items[i]->i > most)
            most = v->items[i]->i;
    return most;
}

static int check_ranks(struct zero *z)
{
    if (!z->rank_count)
        return 0;
    value *stage = state_of(z, 0, "zero_stage");
    const int64_t parts = largest(state_of(z, 0, "partition_count"));
    z->stage = stage && stage->kind == PICKLE_INT ? (int)stage->i : 1;
    if (z->stage < 1 || z->stage > 2)
        return fail(ERR_INPUT, "its optimizer state is of ZeRO stage %d; 1 and 2 are read",
                    z->stage);
    if (parts != z->rank_count)
        return fail(ERR_INPUT, "%d optimizer files (*_optim_states.pt), but %lld ranks wrote some",
                    z->rank_count, (long long)parts);
    if (!items(of_model(z, "param_shapes")))
        return fail(ERR_INPUT, "%s has no param_shapes", MODEL_FILE);
    return 0;
}

// ---- room ---------------------------------------------------------------------------------------

struct room {
    size_t tensors, names, pieces;
};

static int add_names(value *dict, struct room *r)
{
    value *key;
    for (size_t i = 0; i < pairs(dict); i++) {
        if (!pickle_entry(dict, i, &key))
            continue;
        TRY(torch_name_check(key));
        if (++r->tensors > PARAMS_MAX)
            return fail(ERR_INPUT, "it holds more than %d tensors", PARAMS_MAX);
        r->names += key->count + 1;
    }
    return 0;
}

static int make_room(struct zero *z)
{
    struct room r = {0};
    value *groups = of_model(z, "param_shapes");
    for (size_t g = 0; z->rank_count && g < items(groups); g++) {
        TRY(add_names(groups->items[g], &r));
        r.pieces += pairs(groups->items[g]) + (size_t)z->rank_count; // cut at most once a rank
        if (r.pieces > 4 * PARAMS_MAX)
            return fail(ERR_INPUT, "it has too many optimizer groups");
    }
    TRY(add_names(of_model(z, "frozen_param_fragments"), &r));
    TRY(add_names(of_model(z, "module"), &r));
    z->joined.tensors = calloc(r.tensors + 1, sizeof *z->joined.tensors);
    z->joined.names = z->next_name = malloc(r.names + 1);
    z->joined.pieces = calloc(r.pieces + 1, sizeof *z->joined.pieces);
    z->joined.files.list = calloc((size_t)z->rank_count + 1, sizeof(struct safetensors *));
    return z->joined.tensors && z->joined.names && z->joined.pieces && z->joined.files.list
               ? 0
               : fail(ERR_NOMEM, "out of memory for %zu tensors", r.tensors);
}

// ---- parameters of a group ----------------------------------------------------------------------

// A group's parts, rank by rank.
struct group {
    struct st_piece *parts; // [rank_count]
    int64_t total;
};

static int read_parts(const struct zero *z, size_t g, struct group *out)
{
    for (int r = 0; r < z->rank_count; r++) {
        value *list = state_of(z, r, "single_partition_of_fp32_groups");
        struct st_tensor t;
        if (g >= items(list))
            return fail(ERR_INPUT, "rank %d has no part of optimizer group %zu", r, g);
        TRY(torch_file_tensor(z->ranks[r], list->items[g], "a rank's part", &t));
        if (t.dtype != ST_F32 || t.other || t.strided || t.ndim != 1)
            return fail(ERR_INPUT, "rank %d: its part of optimizer group %zu is no row of f32", r,
                        g);
        out->parts[r] = (struct st_piece){t.data, t.count};
        out->total += t.count;
    }
    return 0;
}

static int read_shape(value *shape, struct st_tensor *t)
{
    t->count = 1;
    t->dtype = ST_F32;
    t->ndim = (int)items(shape);
    if (!shape || shape->kind != PICKLE_TUPLE || items(shape) > ST_DIMS)
        return fail(ERR_INPUT, "param_shapes: '%s' has no shape", t->name);
    for (int i = 0; i < t->ndim; i++) {
        value *n = shape->items[i];
        if (n->kind != PICKLE_INT || n->i < 0 || __builtin_mul_overflow(t->count, n->i, &t->count))
            return fail(ERR_INPUT, "param_shapes: '%s' has a size that is no length", t->name);
        t->shape[i] = n->i;
    }
    return 0;
}

// Elements [at, at + t->count) of the group, cut where the parts are.
static void cut(struct zero *z, const struct group *group, int64_t at, struct st_tensor *t)
{
    int64_t left = t->count;
    struct st_piece *pieces = z->joined.pieces + z->piece_count;
    for (int r = 0; r < z->rank_count && left > 0; r++) {
        const struct st_piece *part = &group->parts[r];
        if (at < part->count) {
            const int64_t n = left < part->count - at ? left : part->count - at;
            pieces[t->piece_count++] = (struct st_piece){(const float *)part->data + at, n};
            left -= n;
            at = 0;
        } else {
            at -= part->count;
        }
    }
    z->piece_count += t->piece_count;
    t->pieces = pieces;
    t->bytes = (uint64_t)t->count * sizeof(float);
    if (t->piece_count == 1) {
        t->data = pieces->data;
        t->pieces = NULL;
    }
}

static int read_group(struct zero *z, size_t g, struct group *group)
{
    value *shapes = of_model(z, "param_shapes")->items[g], *key;
    int64_t at = 0;
    TRY(read_parts(z, g, group));
    for (size_t i = 0; i < pairs(shapes); i++) {
        value *shape = pickle_entry(shapes, i, &key);
        struct st_tensor *t = &z->joined.tensors[z->joined.count];
        if (!shape)
            continue;
        t->name = torch_name_copy("", key, &z->next_name);
        TRY(read_shape(shape, t));
        if (t->count > group->total - at)
            return fail(ERR_INPUT, "'%s' lies outside its optimizer group: parts are missing",
                        t->name);
        cut(z, group, at, t);
        at += t->count;
        z->joined.count++;
    }
    // what is left is padding: DeepSpeed aligns a group to twice the number of ranks
    if (group->total - at >= 2 * (int64_t)z->rank_count)
        return fail(ERR_INPUT, "optimizer group %zu has %lld elements, but its parameters %lld", g,
                    (long long)group->total, (long long)at);
    return 0;
}

static int read_groups(struct zero *z)
{
    for (size_t g = 0; z->rank_count && g < items(of_model(z, "param_shapes")); g++) {
        struct group group = {calloc((size_t)z->rank_count, sizeof *group.parts), 0};
        int code = group.parts ? read_group(z, g, &group) : fail(ERR_NOMEM, "out of memory");
        free(group.parts);
        TRY(code);
    }
    return 0;
}

// ---- everything else ----------------------------------------------------------------------------

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

static const struct st_tensor *known(const struct zero *z, const char *name, int sorted)
{
    const struct st_tensor want = {.name = name};
    return sorted ? bsearch(&want, z->joined.tensors, (size_t)sorted, sizeof want, by_name) : NULL;
}

// The name of the parameter whose weights `name` shares, copied to `out`; or NULL.
static const char *shared_with(const struct zero *z, const char *name, char out[1024])
{
    value *other = pickle_get(of_model(z, "shared_params"), name);
    if (!other || other->kind != PICKLE_TEXT || other->count >= 1024)
        return NULL;
    memcpy(out, other->text, other->count);
    out[other->count] = 0;
    return out;
}

// Adds the tensors of a dict of the model's file that are not there yet.
static int add_rest(struct zero *z, const char *which)
{
    value *dict = of_model(z, which), *key;
    const int sorted = z->joined.count;
    if (sorted)
        qsort(z->joined.tensors, (size_t)sorted, sizeof *z->joined.tensors, by_name);
    for (size_t i = 0; i < pairs(dict); i++) {
        value *v = pickle_entry(dict, i, &key);
        char shared[1024];
        if (!v || v->kind != PICKLE_TENSOR)
            continue;
        const char *name = torch_name_copy("", key, &z->next_name);
        if (known(z, name, sorted))
            continue;
        const char *other = shared_with(z, name, shared);
        const struct st_tensor *same = other ? known(z, other, sorted) : NULL;
        struct st_tensor *t = &z->joined.tensors[z->joined.count++];
        if (same) {
            *t = *same;
            t->name = name;
        } else {
            TRY(torch_file_tensor(z->model, v, name, t));
        }
    }
    return 0;
}

static int read_all(const char *directory, struct zero *z)
{
    TRY(find_step(directory, z));
    TRY(open_files(z));
    TRY(check_ranks(z));
    TRY(make_room(z));
    TRY(read_groups(z));
    TRY(add_rest(z, "frozen_param_fragments"));
    TRY(add_rest(z, "module"));
    return z->joined.count ? 0 : fail(ERR_INPUT, "%s holds no tensors", MODEL_FILE);
}

// The mappings go to the joined file.
static int keep_file(struct zero *z, struct torch_file **f)
{
    struct torch_file *taken = *f;
    *f = NULL;
    struct st_files *files = &z->joined.files;
    TRY(torch_file_finish(taken, z->directory, NULL, 0, NULL, &files->list[files->count]));
    files->count++;
    return 0;
}

static int keep_files(struct zero *z)
{
    TRY(keep_file(z, &z->model));
    for (int r = 0; r < z->rank_count; r++)
        TRY(keep_file(z, &z->ranks[r]));
    return 0;
}

static void release(struct zero *z)
{
    torch_file_close(z->model);
    for (int r = 0; z->ranks && r < RANKS_MAX; r++)
        torch_file_close(z->ranks[r]);
    free(z->ranks);
    st_files_close(&z->joined.files);
    free(z->joined.tensors), free(z->joined.names), free(z->joined.pieces);
}

int deepspeed_open(const char *directory, struct safetensors **out)
{
    struct zero z = {0};
    char format[64];
    *out = NULL;
    int code = read_all(directory, &z);
    if (code >= 0)
        code = keep_files(&z);
    if (code >= 0) {
        snprintf(format, sizeof format, "DeepSpeed, ZeRO %d of %d ranks", z.stage,
                 z.rank_count ? z.rank_count : 1);
        code = safetensors_join(directory, format, &z.joined, out);
    }
    release(&z);
    return code < 0 && !strstr(error_message(), directory) ? fail_in(code, "%s", directory) : code;
}
