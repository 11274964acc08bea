// A folder of class folders. Classes are the sub-folders in the order of their names; images are
// their files named *.png, *.jpg or *.jpeg in any case, whatever the content really is of the two.
// Names that start with a dot are not looked at.
#include "model/data_kinds.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/image.h"

// ---- names in a directory -----------------------------------------------------------------------

struct names {
    char **list;
    int64_t count, room;
};

static void names_free(struct names *n)
{
    for (int64_t i = 0; i < n->count; i++)
        free(n->list[i]);
    free(n->list);
}

static int names_add(struct names *n, const char *name)
{
    if (n->count == n->room) {
        int64_t room = n->room ? 2 * n->room : 64;
        char **list = realloc(n->list, (size_t)room * sizeof *list);
        if (!list)
            return fail(ERR_NOMEM, "out of memory listing '%s'", name);
        n->list = list;
        n->room = room;
    }
    n->list[n->count] = strdup(name);
    return n->list[n->count] ? (n->count++, 0)
                             : fail(ERR_NOMEM, "out of memory listing '%s'", name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool is_folder(const char *directory, const char *name)
{
    char path[4096];
    struct stat s;
    int n = snprintf(path, sizeof path, "%s/%s", directory, name);
    return n > 0 && (size_t)n < sizeof path && stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

static bool is_image_name(const char *directory, const char *name)
{
    (void)directory;
    const char *dot = strrchr(name, '.');
    return dot &&
           (!strcasecmp(dot, ".png") || !strcasecmp(dot, ".jpg") || !strcasecmp(dot, ".jpeg"));
}

// The names in `directory` that `wanted` accepts, sorted; added to `out`, which the caller frees.
static int list_names(const char *directory,
                      bool (*wanted)(const char *directory, const char *name), struct names *out)
{
    DIR *d = opendir(directory);
    if (!d)
        return fail(ERR_IO, "%s: cannot be listed: %s", directory, strerror(errno));
    int code = 0;
    for (struct dirent *e = readdir(d); e && code == 0; e = readdir(d))
        if (e->d_name[0] != '.' && wanted(directory, e->d_name))
            code = names_add(out, e->d_name);
    closedir(d);
    if (code == 0 && out->count)
        qsort(out->list, (size_t)out->count, sizeof *out->list, by_name);
    return code;
}

// ---- the dataset --------------------------------------------------------------------------------

static int no_classes(const struct dataset *d)
{
    struct names images = {0};
    int code = list_names(d->path, is_image_name, &images);
    int64_t count = images.count;
    names_free(&images);
    TRY(code);
    if (count)
        return fail(ERR_INPUT,
                    "%s: has images but no class folders; put them in a folder for each class",
                    d->path);
    return fail(ERR_INPUT, "%s: holds neither class folders with images nor MNIST's IDX files",
                d->path);
}

// Moves the names of one class to the end of d->files.
static int add_files(struct dataset *d, struct names *names, int label)
{
    size_t total = (size_t)(d->count + names->count);
    struct data_file *files = realloc(d->files, total * sizeof *files);
    if (!files)
        return fail(ERR_NOMEM, "%s: out of memory", d->path);
    d->files = files;
    for (int64_t i = 0; i < names->count; i++)
        d->files[d->count++] = (struct data_file){names->list[i], label};
    names->count = 0;
    return 0;
}

static int open_class(struct dataset *d, int label)
{
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/%s", d->path, d->class_names[label]);
    if (n < 0 || (size_t)n >= sizeof path)
        return fail(ERR_INPUT, "%.64s...: path too long", d->path);
    struct names images = {0};
    int code = list_names(path, is_image_name, &images);
    if (code == 0 && images.count == 0)
        code = fail(ERR_INPUT, "%s: class folder without a PNG or JPEG image", path);
    if (code == 0)
        code = add_files(d, &images, label);
    names_free(&images);
    return code;
}

int folder_open(struct dataset *d)
{
    struct names classes = {0};
    int code = list_names(d->path, is_folder, &classes);
    d->class_names = classes.list;
    d->classes = (int)classes.count;
    TRY(code);
    if (d->classes == 0)
        return no_classes(d);
    for (int c = 0; c < d->classes; c++)
        TRY(open_class(d, c));
    if (d->size == 0)
        return fail(ERR_INPUT, "%s: say to what size its images are cut (--image-size)", d->path);
    d->channels = d->channels ? d->channels : 3;
    return 0;
}

static void flip_rows(float *pixels, int rows, int width)
{
    for (int y = 0; y < rows; y++, pixels += width) {
        for (int x = 0; x < width / 2; x++) {
            float left = pixels[x];
            pixels[x] = pixels[width - 1 - x];
            pixels[width - 1 - x] = left;
        }
    }
}

int folder_image(const struct dataset *d, int64_t i, bool flip, float *out)
{
    char path[4096];
    const struct data_file *file = &d->files[i];
    int n =
        snprintf(path, sizeof path, "%s/%s/%s", d->path, d->class_names[file->label], file->name);
    if (n < 0 || (size_t)n >= sizeof path)
        return fail(ERR_INPUT, "%.64s...: path too long", d->path);
    struct image whole, cut;
    TRY(image_read(path, d->channels, &whole));
    int code = image_center_crop(&whole, d->size, &cut);
    image_free(&whole);
    if (code < 0)
        return fail_in(code, "%s", path);
    image_to_floats(&cut, out);
    image_free(&cut);
    if (flip)
        flip_rows(out, d->channels * d->size, d->size);
    return 0;
}
