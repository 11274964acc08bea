// Reading sharded weights; see sharded.h. A shard's name comes from the index, so it must be a
// plain name: nothing outside the index's directory is opened.
#include "model/sharded.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/mapped_file.h"
#include "model/weights_file.h"

enum { INDEX_MAX = 1 << 24, SHARDS_MAX = 4096, PATH_SIZE = 4096 };

static int parse_index(const struct mapped_file *f, json_t **out)
{
    json_error_t error;
    if (f->size > INDEX_MAX)
        return fail(ERR_INPUT, "not an index of weights: it has more than 16 MiB");
    *out = json_loadb((const char *)f->data, f->size, JSON_REJECT_DUPLICATES, &error);
    return *out ? 0 : fail(ERR_INPUT, "not an index of weights: byte %d: not JSON", error.position);
}

static int read_index(const char *path, json_t **out)
{
    struct mapped_file f;
    TRY(mapped_file_open(path, &f));
    int code = parse_index(&f, out);
    mapped_file_close(&f);
    return code;
}

static bool is_plain(const char *name)
{
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            return false; // it would break a message into lines
    return *name && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..") &&
           strlen(name) < 256;
}

// The shard of that name, opened when it is first asked for. Shards are few: a list will do.
static int open_shard(const char *index, const char *name, struct st_files *files,
                      struct safetensors **out)
{
    const char *slash = strrchr(index, '/');
    char path[PATH_SIZE];
    if (!is_plain(name))
        return fail(ERR_INPUT, "a shard's name is no name of a file beside it");
    if (snprintf(path, sizeof path, "%.*s%s", slash ? (int)(slash - index + 1) : 0, index, name) >=
        (int)sizeof path)
        return fail(ERR_INPUT, "name too long");
    for (int i = files->count - 1; i >= 0; i--) { // tensors of a shard follow one another
        *out = files->list[i];
        if (!strcmp(safetensors_path(*out), path))
            return 0;
    }
    if (files->count == SHARDS_MAX)
        return fail(ERR_INPUT, "more than %d shards", SHARDS_MAX);
    TRY(weights_file_open_single(path, out));
    files->list[files->count++] = *out;
    return 0;
}

static int find_tensors(const char *index, const json_t *map, struct st_joined *j)
{
    const char *name;
    json_t *file;
    json_object_foreach((json_t *)map, name, file)
    {
        struct safetensors *shard;
        if (!json_is_string(file))
            return fail(ERR_INPUT, "its weight_map holds something other than names of files");
        TRY(open_shard(index, json_string_value(file), &j->files, &shard));
        const struct st_tensor *t = safetensors_find(shard, name);
        if (!t)
            return fail(ERR_INPUT, "a tensor that it places in %.255s is not there",
                        json_string_value(file));
        j->tensors[j->count++] = *t;
    }
    return 0;
}

static int join_shards(const char *index, const json_t *root, struct st_joined *j)
{
    const json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map) || !json_object_size(map))
        return fail(ERR_INPUT, "not an index of weights: it has no weight_map");
    j->tensors = calloc(json_object_size(map), sizeof *j->tensors);
    j->files.list = calloc(SHARDS_MAX, sizeof(struct safetensors *));
    if (!j->tensors || !j->files.list)
        return fail(ERR_NOMEM, "out of memory");
    return find_tensors(index, map, j);
}

int sharded_open(const char *index, struct safetensors **out)
{
    struct st_joined j = {0};
    json_t *root = NULL;
    char format[64];
    *out = NULL;
    int code = read_index(index, &root);
    if (code >= 0)
        code = join_shards(index, root, &j);
    json_decref(root);
    if (code >= 0) {
        snprintf(format, sizeof format, "%s in %d files", safetensors_format(j.files.list[0]),
                 j.files.count);
        return safetensors_join(index, format, &j, out);
    }
    st_files_close(&j.files);
    free(j.tensors);
    return fail_in(code, "%s", index);
}
