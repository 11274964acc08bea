// ditmoe eval [knn]: do samples look like the class that was asked for? Each is put to the vote of
// its five nearest training images; real test images are judged beside them. (ditmoe eval fid:
// eval_fid.c.)
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/knn.h"
#include "tools/draw.h"
#include "tools/eval_fid.h"

struct eval_settings {
    struct draw_options draw;
    int knn, json, per_class, real;
    int64_t references;
    const char *data, *samples;
};

#define AT(member) offsetof(struct eval_settings, member)
static const struct option_spec eval_options[] = {
    {"knn", 0, OPTION_FLAG, NULL, "yes",
     "the vote, as 'ditmoe eval knn': of the 5 nearest training images",
     AT(knn), 0, 0, NULL},
    {"data", 0, OPTION_STRING, "PATH", NULL, "the training data, as for 'ditmoe train'", AT(data),
     0, 0, NULL},
    {"per-class", 0, OPTION_INT, "N", "20", "samples to draw of each class", AT(per_class), 1,
     100000, NULL},
    {"samples", 0, OPTION_STRING, "FILE", NULL,
     "judge these instead of drawing: latents [N,C,H,W] and labels [N], as "
     "'ditmoe sample --latents' writes them",
     AT(samples), 0, 0, NULL},
    {"references", 0, OPTION_INT64, "N", "10000", "training images that vote: the first N",
     AT(references), 5, 1e9, NULL},
    {"real", 0, OPTION_INT, "N", "1000", "test images judged for comparison; 0: none", AT(real), 0,
     1e6, NULL},
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON", AT(json), 0, 0, NULL},
    {0},
};
#undef AT

// Images with the classes they should show, and what the vote says.
struct judged {
    int count, channels, size;
    float *images;      // [count,C,S,S]
    int32_t *labels;    // [count]
    int32_t *predicted; // [count]
    float *nearest;     // [count]
};

static void judged_free(struct judged *j)
{
    free(j->images), free(j->labels), free(j->predicted), free(j->nearest);
    *j = (struct judged){0};
}

static int judged_new(struct judged *j, int count, int channels, int size)
{
    size_t n = (size_t)count;
    *j = (struct judged){.count = count, .channels = channels, .size = size};
    j->images = malloc(sizeof *j->images * n * (size_t)channels * (size_t)size * (size_t)size);
    j->labels = calloc(n, sizeof *j->labels);
    j->predicted = calloc(n, sizeof *j->predicted);
    j->nearest = calloc(n, sizeof *j->nearest);
    if (j->images && j->labels && j->predicted && j->nearest)
        return 0;
    judged_free(j);
    return fail(ERR_NOMEM, "out of memory for %d images", count);
}

// ---- where images come from ---------------------------------------------------------------------

static int read_samples(const struct safetensors *file, struct judged *out)
{
    const struct st_tensor *latents, *labels;
    TRY(safetensors_expect(file, "latents", -1, 4, (int64_t[]){-1, -1, -1, -1}, &latents));
    TRY(safetensors_expect(file, "labels", -1, 1, latents->shape, &labels));
    if (latents->shape[0] < 1 || latents->shape[0] > 10000000 || latents->shape[1] > 64 ||
        latents->shape[2] != latents->shape[3] || latents->shape[2] > 4096)
        return fail(
            ERR_INPUT,
            "%s: latents [%lld,%lld,%lld,%lld] are neither square images nor square latents",
            safetensors_path(file), (long long)latents->shape[0], (long long)latents->shape[1],
            (long long)latents->shape[2], (long long)latents->shape[3]);
    TRY(judged_new(out, (int)latents->shape[0], (int)latents->shape[1], (int)latents->shape[2]));
    TRY(safetensors_read_f32(file, latents, out->images, 0, latents->count));
    for (int i = 0; i < out->count; i++) {
        int64_t label;
        TRY(safetensors_read_i64(file, labels, &label, i, 1));
        if (label < 0 || label > INT32_MAX)
            return fail(ERR_INPUT, "%s: labels[%d] is %lld", safetensors_path(file), i,
                        (long long)label);
        out->labels[i] = (int32_t)label;
    }
    return 0;
}

static int draw_judged(const struct eval_settings *o, struct judged *out)
{
    struct checkpoint *file = NULL;
    TRY(ckpt_open(&o->draw.from, &file));
    const struct config *c = &file->config;
    int code = 0;
    if ((int64_t)c->classes * o->per_class > 10000000)
        code = fail(ERR_INPUT, "%d classes x %d samples are too many", c->classes, o->per_class);
    if (code >= 0)
        code = judged_new(out, c->classes * o->per_class, c->channels, c->size);
    if (code >= 0) {
        for (int i = 0; i < out->count; i++)
            out->labels[i] = i / o->per_class;
        const struct sample_options s = draw_sampling(&o->draw, c);
        char way[160], guidance[80];
        draw_way_text(&s, way, sizeof way);
        draw_guidance_text(&s, guidance, sizeof guidance);
        fprintf(stderr, "%d samples, %s, cfg %g%s, seed %llu\n", out->count, way, (double)s.cfg,
                guidance, (unsigned long long)s.seed);
        code = draw_samples(&o->draw, file, out->count, out->labels, NULL, out->images);
    }
    ckpt_close(file);
    return code;
}

static int get_samples(const struct eval_settings *o, struct judged *out)
{
    struct safetensors *file = NULL;
    if (!o->samples)
        return draw_judged(o, out);
    TRY(safetensors_open(o->samples, &file));
    int code = read_samples(file, out);
    safetensors_close(file);
    return code;
}

// The first images of the test split; none where the data has no such split.
static int get_real(const struct eval_settings *o, const struct judged *like, struct judged *out)
{
    struct dataset *test = NULL;
    if (!o->real || data_open_split(o->data, DATA_TEST, like->size, like->channels, &test) < 0)
        return 0;
    int code = judged_new(out, test->count < o->real ? (int)test->count : o->real, like->channels,
                          like->size);
    size_t pixels = (size_t)like->channels * (size_t)like->size * (size_t)like->size;
    for (int i = 0; code >= 0 && i < out->count; i++) {
        out->labels[i] = data_label(test, i);
        code = data_image(test, i, false, out->images + pixels * (size_t)i);
    }
    data_close(test);
    return code;
}

// ---- the verdict --------------------------------------------------------------------------------

struct tally {
    int count, passed;
    double distance; // mean to the nearest reference
};

// Of one class, or of all (class < 0).
static struct tally count_votes(const struct judged *j, int class)
{
    struct tally t = {0};
    for (int i = 0; i < j->count; i++) {
        if (class >= 0 && j->labels[i] != class)
            continue;
        t.count++;
        t.passed += j->predicted[i] == j->labels[i];
        t.distance += (double)j->nearest[i];
    }
    if (t.count)
        t.distance /= t.count;
    return t;
}

static double share(struct tally t)
{
    return t.count ? (double)t.passed / t.count : 0;
}

static void print_tally(const char *name, struct tally samples, struct tally real)
{
    printf("%-16s %5d/%-5d %5.1f%%  %8.2f", name, samples.passed, samples.count,
           100 * share(samples), samples.distance);
    if (real.count)
        printf("   %5d/%-5d %5.1f%%  %8.2f", real.passed, real.count, 100 * share(real),
               real.distance);
    printf("\n");
}

static void print_text(const struct dataset *d, const struct judged *samples,
                       const struct judged *real)
{
    printf("vote of the %d nearest training images; distance: mean to the nearest one\n\n", KNN_K);
    printf("%-16s %11s %6s  %8s%s\n", "class", "samples", "", "distance",
           real->count ? "    real images            distance" : "");
    for (int c = 0; c < d->classes; c++) {
        struct tally s = count_votes(samples, c);
        if (s.count)
            print_tally(d->class_names ? d->class_names[c] : "", s, count_votes(real, c));
    }
    print_tally("all", count_votes(samples, -1), count_votes(real, -1));
}

static json_t *tally_json(struct tally t)
{
    return json_pack("{s:i, s:i, s:f, s:f}", "count", t.count, "passed", t.passed, "share",
                     share(t), "distance", t.distance);
}

static void print_json(const struct dataset *d, const struct judged *samples,
                       const struct judged *real)
{
    json_t *classes = json_array();
    for (int c = 0; c < d->classes; c++) {
        json_t *row = tally_json(count_votes(samples, c));
        json_object_set_new(row, "class", json_integer(c));
        json_object_set_new(row, "name", json_string(d->class_names ? d->class_names[c] : ""));
        json_array_append_new(classes, row);
    }
    json_t *json = json_pack("{s:o, s:o, s:o}", "samples", tally_json(count_votes(samples, -1)),
                             "real", real->count ? tally_json(count_votes(real, -1)) : json_null(),
                             "classes", classes);
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(json);
}

static int judge(const struct eval_settings *o, const struct dataset *d, struct judged *j)
{
    return j->count
               ? knn_vote_dataset(d, o->references, j->images, j->count, j->predicted, j->nearest)
               : 0;
}

static int eval_run(const struct eval_settings *o, struct judged *samples, struct judged *real,
                    struct dataset **data)
{
    TRY(get_samples(o, samples));
    TRY(data_open(o->data, samples->size, samples->channels, data));
    for (int i = 0; i < samples->count; i++)
        if (samples->labels[i] >= (*data)->classes)
            return fail(ERR_INPUT, "samples of class %d, but %s has %d classes", samples->labels[i],
                        o->data, (*data)->classes);
    TRY(get_real(o, samples, real));
    TRY(judge(o, *data, samples));
    TRY(judge(o, *data, real));
    (o->json ? print_json : print_text)(*data, samples, real);
    return 0;
}

static int eval_knn(int argc, char **argv)
{
    struct eval_settings o = {0};
    const struct option_group groups[] = {
        {"judge", eval_options, &o},
        {"the model", ckpt_option_list, &o.draw.from},
        {"drawing", draw_option_list, &o.draw},
        {"the way from noise to image", draw_way_list, &o.draw},
        {"device", device_option_list, &o.draw.device},
        {"memory", memory_option_list, &o.draw.memory},
        {0},
    };
    const struct command command = {
        .name = "eval",
        .summary = "Judges samples.",
        .about = "Draws samples of every class and prints the share that the nearest training "
                 "images put into the class that was asked for, beside the same figure for real "
                 "test images. "
                 "'ditmoe eval fid' compares images by FID and its kin.",
        .example = "ditmoe eval knn --ckpt run --data /usr/share/datasets/fashion-mnist",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.data)
        return usage_error("eval", "--data PATH is needed");
    if (!o.draw.from.ckpt && !o.samples)
        return usage_error("eval", "--ckpt FILE or --samples FILE is needed");
    static const char *const drawing[] = {
        "ckpt", "weights", "heads", "topk", "diffusion", "per-class", "steps", "cfg", "seed",
        "batch", "sampler", "respacing", "eta", "clip", "cfg-channels", "cfg-from", "cfg-to", NULL};
    const char *extra = options_given_of(drawing);
    if (o.samples && extra)
        return usage_error("eval", "--%s is for drawing, and --samples are drawn already", extra);
    if (ranks_count() > 1)
        return usage_error("eval", "knn runs on one device; 'eval fid' on several");
    status = draw_check("eval", &o.draw);
    if (status)
        return status;
    struct judged samples = {0}, real = {0};
    struct dataset *data = NULL;
    int code = eval_run(&o, &samples, &real, &data);
    judged_free(&samples);
    judged_free(&real);
    data_close(data);
    return code < 0 ? report_failure("eval") : 0;
}

int cmd_eval(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "fid"))
        return eval_fid(argc - 1, argv + 1);
    if (argc > 1 && !strcmp(argv[1], "knn"))
        return eval_knn(argc - 1, argv + 1);
    return eval_knn(argc, argv);
}
