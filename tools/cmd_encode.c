// ditmoe encode: a dataset of images becomes a set of latents (model/latents.h).
//
// Images are read by threads, one batch ahead of the device. A batch is images and their mirror
// images together.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/data.h"
#include "model/latents.h"
#include "tools/decoder.h"
#include "tools/progress.h"

struct encode_settings {
    const char *data, *out;
    struct vae_settings vae;
    struct device_options device;
    int image_size, dtype, threads;
    int64_t shard;
};

static const char *const dtype_choices[] = {"f16", "f32", NULL};
#define AT(member) offsetof(struct encode_settings, member)
static const struct option_spec encode_options[] = {
    {"data", 0, OPTION_STRING, "PATH", NULL,
     "the images: a folder of class folders, or MNIST-like IDX files", AT(data), 0, 0, NULL},
    {"image-size", 0, OPTION_INT, "N", "256", "side to which images are resized and cropped",
     AT(image_size), 1, 4096, NULL},
    {"vae", 0, OPTION_STRING, "FILE", NULL,
     "the autoencoder: AutoencoderKL or AutoencoderTiny of diffusers (a file, or its directory "
     "with "
     "config.json), or TAESD's own .pth",
     AT(vae.vae), 0, 0, NULL},
    {"batch", 0, OPTION_INT, "N", "0", "images that it takes at a time (0: chosen)", AT(vae.batch),
     0, 4096, NULL},
    {"threads", 0, OPTION_INT, "N", "0", "threads that read images (0: one a core)", AT(threads), 0,
     256, NULL},
    {0},
};
static const struct option_spec output_options[] = {
    {"out", 'o', OPTION_STRING, "DIR", NULL,
     "directory of the set; an interrupted encoding in it goes on where it was", AT(out), 0, 0,
     NULL},
    {"type", 0, OPTION_CHOICE, "TYPE", "f16", "storage of latents: f16 or f32", AT(dtype), 0, 0,
     dtype_choices},
    {"shard", 0, OPTION_INT64, "N", "4096", "images in a file", AT(shard), 1, 1 << 24, NULL},
    {0},
};
#undef AT

// ---- reading images -----------------------------------------------------------------------------

enum { THREADS_MAX = 256 };

// Images [first, first + count) of the dataset and their mirror images: [2 count, C, size, size].
struct reading {
    const struct dataset *data;
    int64_t first;
    int count, threads, started;
    float *images;
    pthread_t ids[THREADS_MAX];
    struct reader {
        struct reading *of;
        int number, code;
        char message[512];
    } readers[THREADS_MAX];
};

static void mirror(const float *from, float *to, int64_t rows, int width)
{
    for (int64_t y = 0; y < rows; y++)
        for (int x = 0; x < width; x++)
            to[y * width + x] = from[y * width + width - 1 - x];
}

static void read_images(struct reader *r)
{
    const struct reading *all = r->of;
    const struct dataset *d = all->data;
    const int64_t rows = (int64_t)d->channels * d->size, each = rows * d->size;
    r->code = 0;
    for (int i = r->number; i < all->count && r->code == 0; i += all->threads) {
        float *image = all->images + 2 * i * each;
        r->code = data_image(d, all->first + i, false, image);
        mirror(image, image + each, rows, d->size);
    }
    if (r->code < 0)
        snprintf(r->message, sizeof r->message, "%s", error_message());
}

static void *reader_main(void *argument)
{
    read_images(argument);
    return NULL;
}

static void reading_start(struct reading *r, int64_t first, int count)
{
    r->first = first;
    r->count = count;
    for (r->started = 0; r->started < r->threads; r->started++) {
        r->readers[r->started] = (struct reader){.of = r, .number = r->started};
        if (pthread_create(&r->ids[r->started], NULL, reader_main, &r->readers[r->started]))
            break;
    }
    for (int i = r->started; i < r->threads; i++) { // no more threads to be had
        r->readers[i] = (struct reader){.of = r, .number = i};
        read_images(&r->readers[i]);
    }
}

static int reading_wait(struct reading *r)
{
    int code = 0;
    for (int i = 0; i < r->started; i++)
        pthread_join(r->ids[i], NULL);
    r->started = 0;
    for (int i = 0; r->count > 0 && i < r->threads && code == 0; i++)
        if (r->readers[i].code < 0)
            code = fail(r->readers[i].code, "%s", r->readers[i].message);
    return code;
}

// ---- encoding -----------------------------------------------------------------------------------

struct encoding {
    const struct encode_settings *o;
    struct vae_file file;
    struct dataset *data;
    struct latents_info info;
    struct session session;
    struct vae *vae;
    int batch; // images, without their mirror images
    struct reading readings[2];
    float *moments;
    struct progress progress;
    int64_t done; // images, with those of earlier runs
};

static int64_t moments_floats(const struct latents_info *i)
{
    return 2 * (int64_t)i->channels * i->side * i->side;
}

static int64_t shard_end(const struct latents_info *info, int64_t shard)
{
    const int64_t end = (shard + 1) * info->shard;
    return end < info->count ? end : info->count;
}

static int encode_batch(struct encoding *e, const struct reading *r, struct latents_writer *w)
{
    const int64_t each = moments_floats(&e->info);
    TRY(vae_encode(e->vae, r->images, 2 * r->count, e->moments));
    for (int i = 0; i < r->count; i++)
        TRY(latents_writer_add(w, e->moments + 2 * i * each, data_label(e->data, r->first + i)));
    e->done += r->count;
    progress_update(&e->progress, e->done, "encoding");
    return stop_wanted ? fail(ERR_STOPPED, "stopped; the same command goes on after the last whole "
                                           "shard")
                       : 0;
}

static int encode_shard(struct encoding *e, int64_t shard)
{
    struct latents_writer *w = NULL;
    const int64_t end = shard_end(&e->info, shard);
    int64_t first = shard * e->info.shard;
    TRY(latents_writer_open(e->o->out, &e->info, shard, &w));
    int code = 0, now = 0;
    reading_start(&e->readings[now], first, (int)(end - first < e->batch ? end - first : e->batch));
    while (first < end) {
        struct reading *r = &e->readings[now], *next = &e->readings[!now];
        code = code < 0 ? code : reading_wait(r);
        first += r->count;
        next->count = 0;
        if (code == 0 && first < end)
            reading_start(next, first, (int)(end - first < e->batch ? end - first : e->batch));
        if (code == 0)
            code = encode_batch(e, r, w);
        if (code < 0)
            break;
        now = !now;
    }
    if (code < 0) {
        char message[512];
        snprintf(message, sizeof message, "%s", error_message());
        reading_wait(&e->readings[!now]);
        latents_writer_abort(w);
        return fail(code, "%s", message);
    }
    return latents_writer_close(w);
}

static int encode_shards(struct encoding *e)
{
    const int64_t shards = latents_shards(&e->info);
    bool *there = calloc((size_t)shards, sizeof *there);
    if (!there)
        return fail(ERR_NOMEM, "out of memory");
    for (int64_t s = 0; s < shards; s++) {
        there[s] = latents_has_shard(e->o->out, &e->info, s);
        e->done += there[s] ? shard_end(&e->info, s) - s * e->info.shard : 0;
    }
    if (e->done)
        fprintf(stderr, "%lld images of an earlier run are there\n", (long long)e->done);
    progress_start(&e->progress, "image", e->done, e->info.count, 0);
    int code = 0;
    for (int64_t s = 0; s < shards && code == 0; s++)
        if (!there[s])
            code = encode_shard(e, s);
    progress_clear(&e->progress);
    free(there);
    return code;
}

// ---- preparations -------------------------------------------------------------------------------

// With fewer images at a time where memory does not do for e->batch.
static int open_encoder(struct encoding *e)
{
    struct vae_options options = {
        .part = VAE_ENCODER, .height = e->o->image_size, .width = e->o->image_size};
    for (;; e->batch /= 2) {
        options.batch = 2 * e->batch;
        const int code = vae_new(e->session.dev, e->session.stream, &e->file, &options, &e->vae);
        if (code != ERR_NOMEM || e->batch == 1)
            return code;
        fprintf(stderr, "note: %s; encoding %d at a time\n", error_message(), e->batch / 2);
    }
}

static int prepare(struct encoding *e)
{
    const struct encode_settings *o = e->o;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const int threads = o->threads ? o->threads : cores < 1 ? 1 : cores > 64 ? 64 : (int)cores;
    const int64_t pixels = (int64_t)o->image_size * o->image_size;
    TRY(session_open(&o->device, &e->session));
    e->batch = vae_batch(&o->vae, e->session.dev, 2 * pixels,
                         (int)(e->info.shard < e->info.count ? e->info.shard : e->info.count));
    TRY(open_encoder(e));
    const size_t images = 2 * (size_t)e->batch;
    for (int i = 0; i < 2; i++) {
        struct reading *r = &e->readings[i];
        r->data = e->data;
        r->threads = threads < e->batch ? threads : e->batch;
        r->images = malloc(images * (size_t)(e->data->channels * pixels) * sizeof *r->images);
        if (!r->images)
            return fail(ERR_NOMEM, "out of memory for %zu images", images);
    }
    e->moments = malloc(images * (size_t)moments_floats(&e->info) * sizeof *e->moments);
    return e->moments ? 0 : fail(ERR_NOMEM, "out of memory for %zu images", images);
}

static int describe(struct encoding *e)
{
    const struct encode_settings *o = e->o;
    struct latents_info *i = &e->info;
    TRY(vae_file_open(o->vae.vae, &e->file));
    if (o->image_size % e->file.factor)
        return fail(ERR_INPUT, "--image-size %d: %s takes multiples of %d", o->image_size,
                    e->file.path, e->file.factor);
    TRY(data_open(o->data, o->image_size, e->file.image_channels, &e->data));
    if (e->data->latents)
        return fail(ERR_INPUT, "%s: is a set of latents already", o->data);
    *i = (struct latents_info){.count = e->data->count,
                               .shard = o->shard,
                               .channels = e->file.latent_channels,
                               .side = o->image_size / e->file.factor,
                               .image_size = o->image_size,
                               .classes = e->data->classes,
                               .scale = e->file.scale,
                               .shift = e->file.shift,
                               .f16 = o->dtype == 0,
                               .class_names = e->data->class_names};
    const char *slash = strrchr(e->file.path, '/');
    snprintf(i->vae_name, sizeof i->vae_name, "%.250s", slash ? slash + 1 : e->file.path);
    snprintf(i->data_path, sizeof i->data_path, "%.250s", o->data);
    memcpy(i->vae, e->file.identity, sizeof i->vae);
    data_identity(e->data, i->data);
    return 0;
}

static int encode_run(struct encoding *e)
{
    bool complete;
    int lock;
    TRY(describe(e));
    TRY(latents_begin(e->o->out, &e->info, &complete, &lock));
    int code = 0;
    if (complete)
        fprintf(stderr, "%s is complete already\n", e->o->out);
    else if ((code = prepare(e)) == 0 && (code = encode_shards(e)) == 0)
        code = latents_end(e->o->out, &e->info);
    close(lock);
    if (code == 0)
        printf("%s: latents [%d,%d,%d] of %lld images and their mirror images\n", e->o->out,
               e->info.channels, e->info.side, e->info.side, (long long)e->info.count);
    return code;
}

// ---- the command --------------------------------------------------------------------------------

int cmd_encode(int argc, char **argv)
{
    struct encode_settings o = {0};
    const struct option_group groups[] = {
        {"what to encode", encode_options, &o},
        {"what is written", output_options, &o},
        {"device", device_option_list, &o.device},
        {0},
    };
    const struct command command = {
        .name = "encode",
        .summary = "Makes latents of images, for training.",
        .about = "Encodes every image of a dataset and its mirror image, and writes means and "
                 "variances of their latents in shards. 'ditmoe train --data DIR' draws from them. "
                 "A run that was stopped goes on when it is started again.",
        .example = "ditmoe encode --data imagenet/train --vae sd-vae-ft-ema --out latents",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.data || !o.vae.vae || !o.out)
        return usage_error("encode", "--data PATH, --vae FILE and --out DIR are needed");
    struct encoding *e = calloc(1, sizeof *e);
    if (!e)
        return usage_error("encode", "out of memory");
    e->o = &o;
    stop_on_signals();
    status = encode_run(e) < 0 ? report_failure("encode") : 0;
    vae_free(e->vae);
    session_close(&e->session);
    data_close(e->data);
    vae_file_close(&e->file);
    for (int i = 0; i < 2; i++)
        free(e->readings[i].images);
    free(e->moments);
    free(e);
    return status;
}
