// See image_source.h.
#include "model/image_source.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/names.h"

enum { THREADS_MAX = 32, DEPTH_MAX = 16 };

// ---- a directory --------------------------------------------------------------------------------

static int add_file(struct image_source *s, const char *folder, const char *name)
{
    if ((s->count & (s->count + 1)) == 0) { // room doubles: 1, 3, 7, ...
        char **more = realloc(s->files, (size_t)(2 * s->count + 1) * sizeof *more);
        if (!more)
            return fail(ERR_NOMEM, "%s: out of memory", s->path);
        s->files = more;
    }
    if (asprintf(&s->files[s->count], "%s/%s", folder, name) < 0)
        return fail(ERR_NOMEM, "%s: out of memory", s->path);
    s->count++;
    return 0;
}

static int add_folder(struct image_source *s, const char *folder, int depth)
{
    struct names images = {0}, folders = {0};
    int code = depth < DEPTH_MAX ? 0 : fail(ERR_INPUT, "%s: folders too deep", folder);
    if (code >= 0)
        code = names_list(folder, names_image, &images);
    for (int64_t i = 0; i < images.count && code >= 0; i++)
        if (!names_folder(folder, images.list[i]))
            code = add_file(s, folder, images.list[i]);
    if (code >= 0)
        code = names_list(folder, names_folder, &folders);
    for (int64_t i = 0; i < folders.count && code >= 0; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", folder, folders.list[i]) < 0)
            path = NULL; // it is not defined then
        code =
            path ? add_folder(s, path, depth + 1) : fail(ERR_NOMEM, "%s: out of memory", s->path);
        free(path);
    }
    names_free(&images);
    names_free(&folders);
    return code;
}

int image_source_folder(const char *path, struct image_source *out)
{
    *out = (struct image_source){.path = strdup(path)};
    int code = out->path ? add_folder(out, path, 0) : fail(ERR_NOMEM, "%s: out of memory", path);
    if (code >= 0 && !out->count)
        code = fail(ERR_INPUT, "%s: holds no PNG or JPEG images", path);
    if (code < 0)
        image_source_close(out);
    return code;
}

// ---- an archive ---------------------------------------------------------------------------------

static int open_array(struct image_source *s)
{
    struct npy_array a;
    TRY(npz_read_open(s->npz, "arr_0", &a, &s->reader));
    if (a.dtype != ST_U8 || a.ndim != 4 || a.shape[3] != 3 || a.columns_first || a.count < 1)
        return fail(ERR_INPUT, "%s: array 'arr_0' is not uint8 [N,H,W,3] images", s->path);
    if (a.shape[1] > IMAGE_MAX_SIDE || a.shape[2] > IMAGE_MAX_SIDE ||
        a.shape[1] * a.shape[2] > IMAGE_MAX_PIXELS)
        return fail(ERR_INPUT, "%s: images of %lld x %lld are too large", s->path,
                    (long long)a.shape[2], (long long)a.shape[1]);
    s->count = a.shape[0];
    s->height = (int)a.shape[1];
    s->width = (int)a.shape[2];
    return 0;
}

int image_source_npz(struct npz *npz, struct image_source *out)
{
    *out = (struct image_source){.npz = npz, .path = strdup(npz_path(npz))};
    int code = out->path ? open_array(out) : fail(ERR_NOMEM, "out of memory");
    if (code < 0)
        image_source_close(out);
    return code;
}

void image_source_close(struct image_source *s)
{
    for (int64_t i = 0; s->files && i < s->count; i++)
        free(s->files[i]);
    free(s->files);
    npz_read_close(s->reader);
    npz_close(s->npz);
    free(s->path);
    *s = (struct image_source){0};
}

// ---- reading ------------------------------------------------------------------------------------

static int next_of_array(struct image_source *s, int count, struct image *out)
{
    for (int i = 0; i < count; i++) {
        TRY(image_new(s->width, s->height, 3, &out[i]));
        TRY(npz_read(s->reader, out[i].pixels, 3 * (int64_t)s->width * s->height));
    }
    return 0;
}

// One thread's share: images first, first + step, ... below count.
struct share {
    const struct image_source *s;
    struct image *out;
    int first, step, count, code;
    char message[512];
};

static void *read_share(void *argument)
{
    struct share *h = argument;
    for (int i = h->first; i < h->count && h->code >= 0; i += h->step)
        h->code = image_read(h->s->files[h->s->next + i], 3, &h->out[i]);
    if (h->code < 0)
        snprintf(h->message, sizeof h->message, "%s", error_message());
    return NULL;
}

static int next_files(struct image_source *s, int count, struct image *out)
{
    struct share shares[THREADS_MAX];
    pthread_t threads[THREADS_MAX];
    bool started[THREADS_MAX] = {false};
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int n = cores < 1 ? 1 : cores > THREADS_MAX ? THREADS_MAX : (int)cores;
    n = n < count ? n : count;
    for (int i = 0; i < n; i++) {
        shares[i] = (struct share){.s = s, .out = out, .first = i, .step = n, .count = count};
        started[i] = i > 0 && !pthread_create(&threads[i], NULL, read_share, &shares[i]);
    }
    for (int i = 0; i < n; i++)
        if (!started[i])
            read_share(&shares[i]);
    for (int i = 0; i < n; i++)
        if (started[i])
            pthread_join(threads[i], NULL);
    for (int i = 0; i < n; i++)
        if (shares[i].code < 0)
            return fail(shares[i].code, "%s", shares[i].message);
    return 0;
}

int image_source_next(struct image_source *s, int most, struct image *out)
{
    const int count = s->count - s->next < most ? (int)(s->count - s->next) : most;
    memset(out, 0, (size_t)count * sizeof *out);
    int code = s->npz ? next_of_array(s, count, out) : next_files(s, count, out);
    if (code < 0) {
        for (int i = 0; i < count; i++)
            image_free(&out[i]);
        return code;
    }
    s->next += count;
    return count;
}

int image_source_skip(struct image_source *s, int64_t count)
{
    if (count > s->count - s->next)
        count = s->count - s->next;
    if (s->npz && count > 0) { // its bytes come one after the other
        struct image image;
        int code = image_new(s->width, s->height, 3, &image);
        for (int64_t i = 0; i < count && code >= 0; i++)
            code = npz_read(s->reader, image.pixels, 3 * (int64_t)s->width * s->height);
        image_free(&image);
        TRY(code);
    }
    s->next += count;
    return 0;
}
