// A folder of class folders. Classes are the sub-folders in the order of their names; images are
// their files named *.png, *.jpg or *.jpeg in any case, whatever the content really is of the two.
// Names that start with a dot are not looked at.
#include "model/data_kinds.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/image.h"
#include "model/names.h"

// ---- the dataset --------------------------------------------------------------------------------

static int no_classes(const struct dataset *d)
{
    struct names images = {0};
    int code = names_list(d->path, names_image, &images);
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
    int code = names_list(path, names_image, &images);
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
    int code = names_list(d->path, names_folder, &classes);
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
