// Writing a set of latents; see latents.h.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/atomic_file.h"
#include "model/latents_internal.h"

// ---- the index ----------------------------------------------------------------------------------

static int write_index(const char *directory, const struct latents_info *info, bool complete)
{
    char path[LATENTS_PATH];
    struct atomic_file *f = NULL;
    TRY(latents_path(directory, -1, path));
    json_t *json = latents_to_json(info, complete);
    char *text = json ? json_dumps(json, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(json);
    if (!text)
        return fail(ERR_NOMEM, "%s: out of memory, or a name that is not UTF-8", path);
    int code = atomic_file_create(path, &f);
    if (code == 0)
        code = atomic_file_write(f, text, strlen(text));
    if (code == 0)
        code = atomic_file_commit(f);
    else
        atomic_file_abort(f);
    free(text);
    return code;
}

static int lock_directory(const char *directory, int *lock)
{
    if (mkdir(directory, 0777) != 0 && errno != EEXIST)
        return fail(ERR_IO, "%s: %s", directory, strerror(errno));
    *lock = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*lock < 0)
        return fail(ERR_IO, "%s: %s", directory, strerror(errno));
    if (flock(*lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(*lock);
        return fail(ERR_IO, "%s: another program is writing here", directory);
    }
    return 0;
}

// What differs between what is there and what is to be, or NULL.
static const char *difference(const struct latents_info *a, const struct latents_info *b)
{
    if (strcmp(a->data, b->data) || a->count != b->count)
        return "other images";
    if (strcmp(a->vae, b->vae))
        return "another autoencoder";
    if (a->image_size != b->image_size)
        return "another image size";
    if (a->f16 != b->f16 || a->shard != b->shard || a->scale != b->scale || a->shift != b->shift)
        return "another form (number type, shard size or scale)";
    return NULL;
}

int latents_begin(const char *directory, const struct latents_info *info, bool *complete, int *lock)
{
    char path[LATENTS_PATH];
    struct stat s;
    struct latents_info there;
    *complete = false;
    TRY(latents_path(directory, -1, path));
    TRY(lock_directory(directory, lock));
    int code = 0;
    if (stat(path, &s) != 0) {
        code = write_index(directory, info, false);
    } else if ((code = latents_read_index(directory, &there, complete)) == 0) {
        const char *other = difference(&there, info);
        latents_info_free(&there);
        if (other)
            code = fail(ERR_INPUT, "%s: holds latents of %s: choose another directory", directory,
                        other);
    }
    if (code < 0)
        close(*lock);
    return code;
}

int latents_end(const char *directory, const struct latents_info *info)
{
    return write_index(directory, info, true);
}

bool latents_has_shard(const char *directory, const struct latents_info *info, int64_t shard)
{
    struct latents_shard s;
    if (latents_open_shard(directory, info, shard, &s) < 0)
        return false;
    latents_shard_close(&s);
    return true;
}

// ---- a shard ------------------------------------------------------------------------------------

struct latents_writer {
    struct safetensors_writer *file;
    enum st_dtype dtype;
    int64_t each, images, added; // floats of an image's moments
    int32_t *labels;
};

static int declare(struct latents_writer *w, const struct latents_info *info)
{
    const int64_t shape[] = {w->images, 2, 2 * (int64_t)info->channels, info->side, info->side};
    TRY(safetensors_declare(w->file, "moments", w->dtype, 5, shape));
    TRY(safetensors_declare(w->file, "labels", ST_I32, 1, shape));
    TRY(safetensors_set_metadata(w->file, "vae", info->vae));
    TRY(safetensors_set_metadata(w->file, "data", info->data));
    return safetensors_begin(w->file);
}

int latents_writer_open(const char *directory, const struct latents_info *info, int64_t shard,
                        struct latents_writer **out)
{
    char path[LATENTS_PATH];
    *out = NULL;
    TRY(latents_path(directory, shard, path));
    struct latents_writer *w = calloc(1, sizeof *w);
    if (!w)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    w->dtype = info->f16 ? ST_F16 : ST_F32;
    w->each = 4 * (int64_t)info->channels * info->side * info->side;
    w->images = latents_shard_images(info, shard);
    w->labels = calloc((size_t)w->images, sizeof *w->labels);
    int code =
        w->labels ? safetensors_create(path, &w->file) : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code == 0)
        code = declare(w, info);
    if (code < 0) {
        latents_writer_abort(w);
        return code;
    }
    *out = w;
    return 0;
}

int latents_writer_add(struct latents_writer *w, const float *moments, int label)
{
    BUG_IF(w->added == w->images);
    w->labels[w->added++] = label;
    return safetensors_write_as(w->file, w->dtype, moments, w->each);
}

int latents_writer_close(struct latents_writer *w)
{
    BUG_IF(w->added != w->images);
    int code = safetensors_write(w->file, w->labels, (size_t)w->images * sizeof *w->labels);
    if (code < 0) {
        latents_writer_abort(w);
        return code;
    }
    code = safetensors_commit(w->file);
    w->file = NULL;
    latents_writer_abort(w);
    return code;
}

void latents_writer_abort(struct latents_writer *w)
{
    if (!w)
        return;
    safetensors_abort(w->file);
    free(w->labels);
    free(w);
}
