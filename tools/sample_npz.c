// See sample_npz.h.
#include "tools/sample_npz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/image.h"
#include "model/npz.h"
#include "runtime/rng.h"
#include "tools/part_file.h"
#include "tools/progress.h"

#define AT(member) offsetof(struct npz_settings, member)
const struct option_spec npz_option_list[] = {
    {"npz", 0, OPTION_STRING, "FILE.npz", NULL,
     "images as ADM's evaluator and 'ditmoe eval fid' read them; a run that was stopped goes on "
     "when it is called again",
     AT(npz), 0, 0, NULL},
    {"count", 0, OPTION_INT, "N", "0", "how many, of classes chosen at random from --classes",
     AT(count), 0, 1e8, NULL},
    {"balanced", 0, OPTION_FLAG, NULL, "no", "classes by turns instead", AT(balanced), 0, 0, NULL},
    {0},
};
#undef AT

struct archive {
    const struct npz_settings *o;
    const struct draw_options *draw;
    const struct vae_settings *vae;
    const struct checkpoint *file;
    const int *classes;
    int class_count;
    int batch;
    int height, width; // of an image
    struct drawing drawing;
    struct decoder decoder; // with an autoencoder, on rank 0
    struct part_file part;
    struct progress progress;
    int32_t *labels; // [batch]
    float *latents;  // [batch, image_elements]
    float *decoded;  // [batch, channels, height, width]
    uint8_t *pixels; // [batch, height, width, 3]
};

static int32_t class_of(const struct archive *a, int i)
{
    const uint32_t at = a->o->balanced
                            ? (uint32_t)i
                            : rng_u32(a->draw->seed, rng_stream(RNG_CLASS, 0), (uint64_t)i);
    return a->classes[at % (uint32_t)a->class_count];
}

// ---- what is made -------------------------------------------------------------------------------

// Everything that the images depend on.
static char *describe(const struct archive *a, const char *vae)
{
    const struct sample_options s = draw_sampling(a->draw, &a->file->config);
    const char *slash = strrchr(a->file->path, '/');
    struct stat info = {0};
    if (stat(a->file->path, &info) < 0)
        info.st_size = 0;
    json_t *classes = json_array();
    for (int i = 0; i < a->class_count; i++)
        json_array_append_new(classes, json_integer(a->classes[i]));
    json_t *json = json_pack(
        "{s:s, s:I, s:i, s:I, s:b, s:s, s:i, s:s, s:f, s:b, s:f, s:i, s:b, s:f, s:f, s:i, s:s, "
        "s:o}",
        "checkpoint", slash ? slash + 1 : a->file->path, "bytes", (json_int_t)info.st_size,
        "weights", a->draw->from.weights, "seed", (json_int_t)s.seed, "balanced", a->o->balanced,
        "sampler", draw_sampler_title(s.kind), "steps", s.steps, "respacing",
        s.respacing ? s.respacing : "", "eta", (double)s.eta, "clip", s.clip, "cfg", (double)s.cfg,
        "cfg_channels", s.cfg_channels, "interval", s.interval, "from", (double)s.cfg_from, "to",
        (double)s.cfg_to, "width", a->width, "vae", vae, "classes", classes);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    return text;
}

// The size of the images, and the autoencoder's identity.
static int measure(struct archive *a, char identity[17])
{
    const struct config *c = &a->file->config;
    struct vae_file vae;
    identity[0] = '\0';
    a->height = a->width = c->size;
    if (!a->vae->vae)
        return 0;
    TRY(vae_file_open(a->vae->vae, &vae));
    a->height = a->width = c->size * vae.factor;
    memcpy(identity, vae.identity, sizeof vae.identity);
    vae_file_close(&vae);
    return 0;
}

static int open_first(struct archive *a, const char *identity, size_t item)
{
    char path[4200];
    char *description = describe(a, identity);
    if (!description)
        return fail(ERR_NOMEM, "out of memory");
    int code = (size_t)snprintf(path, sizeof path, "%s.part", a->o->npz) < sizeof path
                   ? part_file_open(path, description, a->o->count, item, &a->part)
                   : fail(ERR_INPUT, "%.64s...: path too long", a->o->npz);
    free(description);
    return code;
}

// Rank 0 has the file; all know what is in it.
static int open_part(struct archive *a)
{
    char identity[17];
    TRY(measure(a, identity));
    const size_t item = 3 * (size_t)a->height * (size_t)a->width;
    TRY(ranks_first() ? open_first(a, identity, item)
                      : part_file_follow(a->o->count, item, &a->part));
    if (!ranks_exchange())
        return 0;
    TRY(exchange_broadcast(ranks_exchange(), &a->part.left, sizeof a->part.left, 0));
    return exchange_broadcast(ranks_exchange(), a->part.done, (size_t)a->part.count, 0);
}

// ---- drawing ------------------------------------------------------------------------------------

static int show(void *user, int done, int total)
{
    struct archive *a = user;
    (void)done, (void)total;
    if (ranks_first())
        progress_update(&a->progress, a->part.count - a->part.left, "sampling");
    bool stop;
    TRY(ranks_stop(&stop));
    return stop ? fail(ERR_STOPPED, "stopped; call it again to go on") : 0;
}

// Grey becomes RGB.
static int to_pixels(const struct archive *a, const float *values, int channels, uint8_t *out)
{
    struct image image;
    const size_t samples = 3 * (size_t)a->height * (size_t)a->width;
    TRY(image_from_floats(values, a->width, a->height, channels, &image));
    for (size_t k = 0; k < samples; k++)
        out[k] = image.pixels[channels == 3 ? k : k / 3];
    image_free(&image);
    return 0;
}

// What rank 0 does with latents that are drawn.
static int make_pixels(struct archive *a, int count)
{
    struct decoder *d = &a->decoder;
    const float *values = a->latents;
    int channels = a->file->config.channels;
    if (d->vae) {
        for (int i = 0; i < count; i += d->batch)
            TRY(decoder_run(d, a->latents + i * d->latent_size,
                            count - i < d->batch ? count - i : d->batch, a->decoded + i * d->size));
        values = a->decoded;
        channels = d->channels;
    }
    const size_t each = (size_t)channels * (size_t)a->height * (size_t)a->width;
    for (int i = 0; i < count; i++)
        TRY(to_pixels(a, values + (size_t)i * each, channels,
                      a->pixels + (size_t)i * a->part.item));
    return 0;
}

static int draw_batch(struct archive *a, int first, int count)
{
    for (int i = 0; i < count; i++)
        a->labels[i] = class_of(a, first + i);
    a->drawing.sampler->number = first;
    TRY(sampler_run(a->drawing.sampler, count, a->labels, NULL, a->latents, show, a));
    if (ranks_first())
        TRY(make_pixels(a, count));
    return part_file_put(&a->part, first, count, a->pixels);
}

// The next images that are not there: returns how many, from *first on.
static int next_batch(const struct archive *a, int *first)
{
    const uint8_t *done = a->part.done;
    int n = 0;
    while (*first < a->o->count && done[*first])
        ++*first;
    while (n < a->batch && *first + n < a->o->count && !done[*first + n])
        n++;
    return n;
}

static int prepare(struct archive *a)
{
    const struct config *c = &a->file->config;
    a->batch = a->draw->batch < a->part.left ? a->draw->batch : (int)a->part.left;
    const size_t batch = (size_t)a->batch;
    TRY(drawing_open(a->draw, a->file, a->batch, &a->drawing));
    if (a->vae->vae && ranks_first()) {
        TRY(decoder_open(&a->drawing.session, a->vae, a->batch, c->channels, c->size, c->size,
                         &a->decoder));
        a->decoded = malloc(batch * (size_t)a->decoder.size * sizeof *a->decoded);
        if (!a->decoded)
            return fail(ERR_NOMEM, "out of memory for images");
    }
    a->labels = malloc(batch * sizeof *a->labels);
    a->latents = malloc(batch * image_elements(c) * sizeof *a->latents);
    a->pixels = malloc(batch * a->part.item);
    return a->labels && a->latents && a->pixels ? 0 : fail(ERR_NOMEM, "out of memory for images");
}

static int draw_all(struct archive *a)
{
    int code = prepare(a);
    progress_start(&a->progress, "image", a->part.count - a->part.left, a->part.count, 0);
    for (int first = 0, n; code >= 0 && (n = next_batch(a, &first)) > 0; first += n)
        code = draw_batch(a, first, n);
    progress_clear(&a->progress);
    return code;
}

// ---- the archive --------------------------------------------------------------------------------

static int write_arrays(struct archive *a, struct zip_writer *z)
{
    const int count = a->o->count;
    TRY(npz_write_begin(z, "arr_0", ST_U8, 4, (int64_t[]){count, a->height, a->width, 3}));
    for (int i = 0; i < count; i++) {
        TRY(part_file_get(&a->part, i, 1, a->pixels));
        TRY(zip_write(z, a->pixels, a->part.item));
    }
    TRY(npz_write_begin(z, "arr_1", ST_I64, 1, (int64_t[]){count}));
    for (int i = 0; i < count; i++) {
        const int64_t label = class_of(a, i);
        TRY(zip_write(z, &label, sizeof label));
    }
    return 0;
}

static int write_archive(struct archive *a)
{
    struct zip_writer *z;
    if (!a->pixels && !(a->pixels = malloc(a->part.item)))
        return fail(ERR_NOMEM, "out of memory for images");
    TRY(zip_create(a->o->npz, &z));
    int code = write_arrays(a, z);
    if (code < 0) {
        zip_abort(z);
        return code;
    }
    TRY(zip_commit(z));
    TRY(part_file_remove(&a->part));
    printf("%s\n", a->o->npz);
    return 0;
}

int sample_npz(const struct npz_settings *o, const struct draw_options *draw,
               const struct vae_settings *vae, const struct checkpoint *file, const int *classes,
               int class_count)
{
    struct archive a = {.o = o,
                        .draw = draw,
                        .vae = vae,
                        .file = file,
                        .classes = classes,
                        .class_count = class_count,
                        .part = {.fd = -1}};
    int code = open_part(&a);
    if (code >= 0) {
        say("%d images, %lld to draw\n", o->count, (long long)a.part.left);
        code = a.part.left ? draw_all(&a) : 0;
    }
    decoder_close(&a.decoder);
    drawing_close(&a.drawing);
    if (code >= 0 && ranks_first())
        code = write_archive(&a);
    if (code < 0 && a.part.fd >= 0 && a.part.left == a.part.count)
        unlink(a.part.path); // nothing is lost with it
    part_file_close(&a.part);
    free(a.labels), free(a.latents), free(a.decoded), free(a.pixels);
    return code;
}
