// ditmoe sample: images of chosen classes from a checkpoint.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/decoder.h"
#include "tools/draw.h"
#include "tools/grid.h"
#include "tools/sample_npz.h"

struct sample_settings {
    struct draw_options draw;
    struct vae_settings vae;
    struct npz_settings npz;
    const char *classes, *names, *out, *images, *latents, *noise;
    int per_class;
};

#define AT(member) offsetof(struct sample_settings, member)
static const struct option_spec sample_options[] = {
    {"classes", 0, OPTION_STRING, "LIST", "all", "classes to draw: 0,1,2 or 0-4,7 or all",
     AT(classes), 0, 0, NULL},
    {"per-class", 0, OPTION_INT, "N", "1", "images of each class", AT(per_class), 1, 1000000, NULL},
    {"noise", 0, OPTION_STRING, "FILE", NULL,
     "safetensors file whose tensor z [N,C,H,W] is the noise to start from; one class is taken for "
     "all N, else N images must be asked for. A tensor step_noise [S,N,C,H,W] is the noise that "
     "ddpm "
     "and ddim take in S (or S+1) steps, in the order of use",
     AT(noise), 0, 0, NULL},
    {0},
};
static const struct option_spec output_options[] = {
    {"out", 'o', OPTION_STRING, "FILE.png", NULL,
     "all images in one grid, a row a class; parameters and seed are in the PNG's text", AT(out), 0,
     0, NULL},
    {"images", 0, OPTION_STRING, "DIR", NULL, "each image as a PNG of its own", AT(images), 0, 0,
     NULL},
    {"latents", 0, OPTION_STRING, "FILE", NULL,
     "the raw result: a safetensors file with latents [N,C,H,W] and labels [N]", AT(latents), 0, 0,
     NULL},
    {"names", 0, OPTION_STRING, "LIST", NULL,
     "names of the classes for the grid, separated by commas (else from the run's run.json)",
     AT(names), 0, 0, NULL},
    {0},
};
#undef AT

// The classes and the images asked for.
struct request {
    int list_count, count;
    int *list;          // [list_count] as given
    int32_t *classes;   // [count]
    float *noise;       // [count,C,S,S] or NULL
    float *step_noise;  // [steps,count,C,S,S] or NULL
    float *latents;     // [count,C,S,S]
    char (*labels)[96]; // [list_count]
    struct pictures pictures; // of the latents; without an autoencoder these themselves
};

// ---- classes ------------------------------------------------------------------------------------

static bool add_class(struct request *q, int class)
{
    int *more = realloc(q->list, sizeof *more * (size_t)(q->list_count + 1));
    if (!more)
        return false;
    q->list = more;
    q->list[q->list_count++] = class;
    return true;
}

// Fills q->list; returns 0 or exit status 2 after saying what is wrong.
static int parse_classes(const char *text, int classes, struct request *q)
{
    char *end;
    if (!strcmp(text, "all")) {
        if (classes > 100 && !options_given("classes") && !options_given("npz"))
            return usage_error("sample", "the model has %d classes: choose some with --classes",
                               classes);
        for (int i = 0; i < classes; i++)
            if (!add_class(q, i))
                return usage_error("sample", "out of memory");
        return 0;
    }
    for (const char *at = text;; at = end + 1) {
        long first = strtol(at, &end, 10), last = first;
        bool good = end != at && *at != ' ';
        if (good && *end == '-') {
            at = end + 1;
            last = strtol(at, &end, 10);
            good = end != at && last >= first;
        }
        if (!good || (*end && *end != ','))
            return usage_error("sample", "--classes %s: not a list of numbers such as 0,1,2 or 0-4",
                               text);
        if (first < 0 || last >= classes)
            return usage_error("sample",
                               "--classes %s: class %ld is out of range; the model has 0 to %d",
                               text, first < 0 ? first : last, classes - 1);
        for (long i = first; i <= last; i++)
            if (!add_class(q, (int)i))
                return usage_error("sample", "out of memory");
        if (!*end)
            return 0;
    }
}

// The comma-separated item number `index` of a list; "" where there is none.
static void list_item(const char *list, int index, char *out, size_t size)
{
    while (index-- > 0 && list)
        list = (list = strchr(list, ',')) ? list + 1 : NULL;
    snprintf(out, size, "%.*s", list ? (int)strcspn(list, ",") : 0, list ? list : "");
}

// Labels of the grid's rows: --names, else run.json beside the checkpoint, else numbers.
static void label_rows(const struct sample_settings *o, const char *ckpt, struct request *q)
{
    char path[4200];
    const char *slash = strrchr(ckpt, '/');
    snprintf(path, sizeof path, "%.*srun.json", slash ? (int)(slash - ckpt + 1) : 0, ckpt);
    json_t *run = json_load_file(path, 0, NULL);
    const json_t *names = json_object_get(json_object_get(run, "data"), "class_names");
    for (int i = 0; i < q->list_count; i++) {
        const char *name = json_string_value(json_array_get(names, (size_t)q->list[i]));
        if (o->names)
            list_item(o->names, q->list[i], q->labels[i], sizeof q->labels[i]);
        else if (name)
            snprintf(q->labels[i], sizeof q->labels[i], "%s", name);
        if (!q->labels[i][0])
            snprintf(q->labels[i], sizeof q->labels[i], "%d", q->list[i]);
    }
    json_decref(run);
}

// ---- noise --------------------------------------------------------------------------------------

static int read_floats(const struct safetensors *file, const struct st_tensor *t, float **out)
{
    *out = malloc(sizeof **out * (size_t)(t->count ? t->count : 1));
    if (!*out)
        return fail(ERR_NOMEM, "%s: out of memory", safetensors_path(file));
    return safetensors_read_f32(file, t, *out, 0, t->count);
}

// step_noise, where the file has it: of every step, or of all but the last, which takes none.
static int read_step_noise(const struct sample_settings *o, const struct config *c,
                           const struct safetensors *file, struct request *q)
{
    const int64_t shape[] = {-1, q->count, c->channels, c->size, c->size};
    const struct sample_options s = draw_sampling(&o->draw, c);
    const struct st_tensor *t;
    struct schedule way;
    if (!safetensors_find(file, "step_noise"))
        return 0;
    TRY(sampler_schedule(c, &s, &way));
    TRY(safetensors_expect(file, "step_noise", -1, 5, shape, &t));
    if (schedule_random(&way) && t->shape[0] != way.steps && t->shape[0] != way.steps - 1)
        return fail(ERR_INPUT, "%s: step_noise is for %lld steps, and there are %d", o->noise,
                    (long long)t->shape[0], way.steps);
    return read_floats(file, t, &q->step_noise);
}

static int read_start(const struct sample_settings *o, const struct config *c,
                      const struct safetensors *file, struct request *q)
{
    const int64_t shape[] = {-1, c->channels, c->size, c->size};
    const struct st_tensor *z;
    TRY(safetensors_expect(file, "z", -1, 4, shape, &z));
    const int64_t n = z->shape[0];
    if (q->list_count == 1 && !options_given("per-class") && n > 0 && n <= INT32_MAX)
        q->count = (int)n; // a single class is drawn from every row
    if (n != q->count)
        return fail(ERR_INPUT, "%s: z holds %lld images, but --classes and --per-class ask for %d",
                    o->noise, (long long)n, q->count);
    return read_floats(file, z, &q->noise);
}

static int read_noise(const struct sample_settings *o, const struct config *c, struct request *q)
{
    struct safetensors *file = NULL;
    int code = safetensors_open(o->noise, &file);
    if (code >= 0)
        code = read_start(o, c, file, q);
    if (code >= 0)
        code = read_step_noise(o, c, file, q);
    safetensors_close(file);
    return code;
}

static int prepare_request(const struct sample_settings *o, const struct config *c,
                           const char *ckpt, struct request *q)
{
    if ((int64_t)q->list_count * o->per_class > INT32_MAX / 2)
        return fail(ERR_INPUT, "%d classes x %d images are too many for one call", q->list_count,
                    o->per_class);
    q->count = q->list_count * o->per_class;
    if (o->noise)
        TRY(read_noise(o, c, q));
    q->classes = malloc(sizeof *q->classes * (size_t)q->count);
    q->latents = malloc(sizeof *q->latents * (size_t)q->count * image_elements(c));
    q->labels = calloc((size_t)q->list_count, sizeof *q->labels);
    if (!q->classes || !q->latents || !q->labels)
        return fail(ERR_NOMEM, "out of memory for %d images", q->count);
    for (int i = 0; i < q->count; i++)
        q->classes[i] = q->list_count == 1 ? q->list[0] : q->list[i / o->per_class];
    label_rows(o, ckpt, q);
    return 0;
}

// ---- what is written ----------------------------------------------------------------------------

enum { TEXTS = 10 };
struct texts {
    struct image_text list[TEXTS];
    char parameters[800], seed[24], steps[64], cfg[24], guidance[80], way[160], classes[400];
};

static void fill_texts(const struct sample_settings *o, const struct checkpoint *file,
                       struct texts *t)
{
    const struct draw_options *d = &o->draw;
    const struct sample_options s = draw_sampling(d, &file->config);
    const char *slash = strrchr(file->path, '/'), *name = slash ? slash + 1 : file->path;
    bool ema = d->from.weights == WEIGHTS_EMA || (d->from.weights == WEIGHTS_AUTO && file->has_ema);
    snprintf(t->seed, sizeof t->seed, "%llu", (unsigned long long)d->seed);
    snprintf(t->steps, sizeof t->steps, "%d", s.steps);
    if (s.respacing)
        snprintf(t->steps, sizeof t->steps, "%s", s.respacing);
    snprintf(t->cfg, sizeof t->cfg, "%g", (double)draw_cfg(d, &file->config));
    snprintf(t->classes, sizeof t->classes, "%s", o->classes);
    draw_guidance_text(&s, t->guidance, sizeof t->guidance);
    draw_way_text(&s, t->way, sizeof t->way);
    snprintf(t->parameters, sizeof t->parameters,
             "classes %.200s, %d each, %s, cfg %s%s, seed %s%s, %s weights of %.100s", o->classes,
             o->per_class, t->way, t->cfg, t->guidance, t->seed,
             o->noise ? " (noise from a file)" : "", ema ? "EMA" : "model", name);
    const struct image_text list[TEXTS] = {
        {"Software", "ditmoe " DITMOE_VERSION},
        {"parameters", t->parameters},
        {"seed", t->seed},
        {"classes", t->classes},
        {"steps", t->steps},
        {"sampler", draw_samplers[s.kind + 1]},
        {"cfg", t->cfg},
        {"guidance", t->guidance[0] ? t->guidance + 1 : "on all channels at every t"},
        {"weights", ema ? "ema" : "model"},
        {"checkpoint", name},
    };
    memcpy(t->list, list, sizeof list);
}

static int write_grid(const struct sample_settings *o, const struct request *q, const struct texts *t)
{
    bool labelled = q->list_count > 1;
    int columns = labelled ? o->per_class : (int)ceil(sqrt(q->count));
    const char **labels = calloc((size_t)q->list_count, sizeof *labels);
    if (!labels)
        return fail(ERR_NOMEM, "out of memory");
    for (int i = 0; i < q->list_count; i++)
        labels[i] = q->labels[i];
    struct grid grid = {.latents = q->pictures.values,
                        .count = q->count,
                        .channels = q->pictures.channels,
                        .size = q->pictures.width,
                        .rows = (q->count + columns - 1) / columns,
                        .columns = columns,
                        .labels = labelled ? labels : NULL};
    int code = grid_write(o->out, &grid, t->list, TEXTS);
    free(labels);
    return code;
}

static int write_images(const struct sample_settings *o, const struct request *q, struct texts *t)
{
    char path[4200];
    if (mkdir(o->images, 0777) != 0 && errno != EEXIST)
        return fail(ERR_IO, "%s: %s", o->images, strerror(errno));
    for (int i = 0; i < q->count; i++) {
        struct image image = {0};
        snprintf(t->classes, sizeof t->classes, "%d", q->classes[i]);
        snprintf(path, sizeof path, "%s/%05d-class-%d.png", o->images, i, q->classes[i]);
        const struct pictures *p = &q->pictures;
        const size_t each = (size_t)p->channels * (size_t)p->height * (size_t)p->width;
        int code = image_from_floats(p->values + each * (size_t)i, p->width, p->height, p->channels,
                                     &image);
        if (code >= 0)
            code = image_write_png(path, &image, t->list, TEXTS);
        image_free(&image);
        TRY(code);
    }
    return 0;
}

static int write_results(const struct sample_settings *o, const struct checkpoint *file,
                         const struct request *q)
{
    struct texts texts;
    fill_texts(o, file, &texts);
    if (o->latents) {
        TRY(draw_write_latents(o->latents, &file->config, q->count, q->classes, q->latents));
        printf("%s\n", o->latents);
    }
    if (o->out) {
        TRY(write_grid(o, q, &texts));
        printf("%s\n", o->out);
    }
    if (o->images) {
        TRY(write_images(o, q, &texts));
        printf("%s\n", o->images);
    }
    return 0;
}

// ---- the command --------------------------------------------------------------------------------

static int sample_archive(const struct sample_settings *o, const struct checkpoint *file,
                          const struct request *q)
{
    return sample_npz(&o->npz, &o->draw, &o->vae, file, q->list, q->list_count) < 0
               ? report_failure("sample")
               : 0;
}

static int make_pictures(const struct sample_settings *o, const struct config *c, struct request *q)
{
    if (o->vae.vae)
        return pictures_decode(&o->vae, &o->draw.device, q->latents, q->count, c->channels, c->size,
                               c->size, &q->pictures);
    q->pictures = (struct pictures){q->latents, q->count, c->channels, c->size, c->size};
    return 0;
}

static int sample_run(const struct sample_settings *o, const struct checkpoint *file,
                      struct request *q)
{
    const struct config *c = &file->config;
    if ((o->out || o->images || o->npz.npz) && !o->vae.vae && c->channels != 1 && c->channels != 3)
        return usage_error("sample",
                           "this model makes latents of %d channels: give the autoencoder that "
                           "makes images of them with --vae FILE, or use --latents FILE",
                           c->channels);
    int status = parse_classes(o->classes, c->classes, q);
    if (status)
        return status;
    if (o->npz.npz)
        return sample_archive(o, file, q);
    if (prepare_request(o, c, file->path, q) < 0)
        return report_failure("sample");
    char guidance[80], way[160];
    const struct sample_options s = draw_sampling(&o->draw, c);
    const struct sample_noise noise = {q->noise, q->step_noise};
    draw_guidance_text(&s, guidance, sizeof guidance);
    draw_way_text(&s, way, sizeof way);
    say("%d image%s, %s, cfg %g%s, seed %llu\n", q->count, q->count == 1 ? "" : "s", way, (double)s.cfg, guidance,
        (unsigned long long)o->draw.seed);
    if (draw_samples(&o->draw, file, q->count, q->classes, &noise, q->latents) < 0)
        return report_failure("sample");
    if (!ranks_first())
        return 0; // rank 0 has the images
    if (((o->out || o->images) && make_pictures(o, c, q) < 0) || write_results(o, file, q) < 0)
        return report_failure("sample");
    return 0;
}

int cmd_sample(int argc, char **argv)
{
    struct sample_settings o = {0};
    const struct option_group groups[] = {
        {"what to draw", sample_options, &o},
        {"the model", ckpt_option_list, &o.draw.from},
        {"how", draw_option_list, &o.draw},
        {"the way from noise to image", draw_way_list, &o.draw},
        {"the autoencoder", vae_option_list, &o.vae},
        {"what is written (at least one)", output_options, &o},
        {"many images for an evaluator", npz_option_list, &o.npz},
        {"device", device_option_list, &o.draw.device},
        {"memory", memory_option_list, &o.draw.memory},
        {RANK_OPTIONS_TITLE, rank_option_list, &o.draw.ranks},
        {0},
    };
    const struct command command = {
        .name = "sample",
        .summary = "Draws images from a checkpoint.",
        .about =
            "Draws images of the given classes, from noise to image by rectified flow or DDPM as "
            "the "
            "model was trained, with classifier-free guidance. The same seed gives the same noise "
            "everywhere.",
        .example =
            "ditmoe sample --ckpt run --classes 0-9 --per-class 8 --seed 1 --out samples.png",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.draw.from.ckpt)
        return usage_error("sample", "--ckpt FILE is needed");
    status = draw_check("sample", &o.draw);
    status = status ? status : vae_check("sample", &o.vae);
    if (status)
        return status;
    if (!o.out && !o.images && !o.latents && !o.npz.npz)
        return usage_error("sample", "nothing to write: give --out, --images, --latents or --npz");
    if (o.npz.npz && (o.out || o.images || o.latents || o.noise))
        return usage_error("sample", "--npz does not go with --out, --images, --latents, --noise");
    if (!o.npz.npz != !o.npz.count)
        return usage_error("sample", "--count N and --npz FILE go together");
    if (o.npz.npz && options_given("per-class"))
        return usage_error("sample", "--per-class does not go with --npz: --count says how many");
    if (!o.npz.npz && options_given("balanced"))
        return usage_error("sample", "--balanced goes with --npz FILE");
    if (o.names && !o.out)
        return usage_error("sample", "--names are for the grid: give --out FILE.png");
    if (o.vae.vae && !o.out && !o.images && !o.npz.npz)
        return usage_error("sample", "--vae makes images: give --out, --images or --npz for them");
    struct checkpoint *file = NULL;
    status = ranks_launch(o.draw.device.device, "sample", argc, argv);
    if (status)
        return status;
    if (ranks_same_start(&command) < 0 || ckpt_open(&o.draw.from, &file) < 0 ||
        ranks_same(&file->run, sizeof file->run, "has found another checkpoint") < 0)
        return report_failure("sample");
    struct request q = {0};
    status = sample_run(&o, file, &q);
    if (q.pictures.values != q.latents)
        free(q.pictures.values);
    free(q.list), free(q.classes), free(q.noise), free(q.step_noise), free(q.latents);
    free(q.labels);
    ckpt_close(file);
    return status;
}
