#include "tools/grid.h"

#include <stdlib.h>

static int fill_images(const struct grid *g, struct image *images)
{
    size_t pixels = (size_t)g->channels * (size_t)g->size * (size_t)g->size;
    for (int i = 0; i < g->count; i++)
        TRY(image_from_floats(g->latents + pixels * (size_t)i, g->size, g->size, g->channels,
                              &images[i]));
    return 0;
}

int grid_write(const char *path, const struct grid *g, const struct image_text *texts, int count)
{
    size_t places = (size_t)g->rows * (size_t)g->columns;
    struct image *images = calloc(places, sizeof *images);
    if (!images)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    int code = fill_images(g, images);
    if (code >= 0) {
        struct figure_grid figure = {.images = images,
                                     .rows = g->rows,
                                     .columns = g->columns,
                                     .labels = g->labels,
                                     .title = g->title};
        code = figure_write_grid(path, &figure, texts, count);
    }
    for (size_t i = 0; i < places; i++)
        image_free(&images[i]);
    free(images);
    return code;
}
