// ditmoe eval fid: FID, sFID, Inception Score, precision and recall of images against reference
// images or their statistics (docs/evaluation.md).
#include "tools/eval_fid.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/features.h"
#include "model/lapack.h"
#include "model/manifold.h"
#include "model/weights_file.h"
#include "tools/command.h"
#include "tools/progress.h"
#include "tools/ranks.h"

enum { SCORE_SPLIT = 5000, FID_CLASSES = 1008, FEW_IMAGES = 10000 };

struct fid_settings {
    const char *samples, *reference, *inception, *save_stats;
    int input, batch, json;
    int64_t pr_images;
    struct device_options device;
};

static const char *const input_choices[] = {"pytorch-fid", "adm", NULL}; // as enum inception_input

#define AT(member) offsetof(struct fid_settings, member)
static const struct option_spec fid_options[] = {
    {"samples", 0, OPTION_STRING, "PATH", NULL,
     "images to judge: a directory of PNG and JPEG files, or an .npz with arr_0, uint8 [N,H,W,3]",
     AT(samples), 0, 0, NULL},
    {"reference", 0, OPTION_STRING, "PATH", NULL,
     "images to compare with, likewise, or an .npz of statistics: mu, sigma (and mu_s, sigma_s)",
     AT(reference), 0, 0, NULL},
    {"inception", 0, OPTION_STRING, "FILE", NULL,
     "FID's Inception weights: pt_inception-2015-12-05-6726825d.pth, as pytorch-fid has them",
     AT(inception), 0, 0, NULL},
    {"as", 0, OPTION_CHOICE, "WHOSE", "pytorch-fid",
     "whose way of resizing and scaling images: pytorch-fid's, or that of ADM's evaluator "
     "(TensorFlow's)",
     AT(input), 0, 0, input_choices},
    {"pr-images", 0, OPTION_INT64, "N", "50000",
     "precision and recall: of the first N images of either side; 0: neither", AT(pr_images), 0,
     1e7, NULL},
    {"save-stats", 0, OPTION_STRING, "FILE.npz", NULL,
     "keep the reference's statistics, to be a --reference later; without --samples that is all",
     AT(save_stats), 0, 0, NULL},
    {"batch", 'b', OPTION_INT, "N", "32", "images at a time; does not change the figures",
     AT(batch), 1, 1024, NULL},
    {"json", 0, OPTION_FLAG, NULL, "no", "print JSON", AT(json), 0, 0, NULL},
    {0},
};
#undef AT

struct figures {
    double fid, sfid, score, precision, recall; // NAN: not known
};

// ---- progress -----------------------------------------------------------------------------------

struct shown {
    struct progress bar;
    const char *text;
};

static int show(void *user, int64_t done, int64_t total)
{
    struct shown *s = user;
    (void)total;
    progress_update(&s->bar, done, s->text);
    return stop_wanted ? fail(ERR_STOPPED, "stopped; nothing was written") : 0;
}

// ---- a side of the comparison -------------------------------------------------------------------

static int features_of(const struct fid_settings *o, struct inception *n,
                       struct image_source *source, const char *what, bool score,
                       struct features *out)
{
    struct shown shown = {.text = what};
    const struct feature_options options = {.keep = o->samples ? o->pr_images : 0,
                                            .split = score ? SCORE_SPLIT : 0,
                                            .progress = ranks_first() ? show : NULL,
                                            .exchange = ranks_exchange(),
                                            .user = &shown};
    progress_start(&shown.bar, "image", 0, source->count, 0);
    int code = features_of_images(n, source, &options, out);
    progress_clear(&shown.bar);
    return code < 0 ? fail_in(code, "%s", source->path) : 0;
}

// An .npz with statistics: they are taken, and images beside them (as in ADM's reference batches)
// are looked at for precision and recall, and where there are no spatial statistics.
static int open_statistics(const struct fid_settings *o, struct inception *n, struct npz *z,
                           const char *what, bool score, struct features *out)
{
    struct features images = {0};
    int code = features_of_statistics(n, z, out);
    const bool more = npz_has(z, "arr_0") && o->samples &&
                      (score || o->pr_images || (code >= 0 && !out->spatial.dim));
    if (code < 0 || !more) {
        npz_close(z);
        return code;
    }
    struct image_source source;
    code = image_source_npz(z, &source);
    if (code >= 0)
        code = features_of(o, n, &source, what, score, &images);
    if (code >= 0) {
        out->score = images.score;
        out->rows = images.rows;
        out->row_count = images.row_count;
        images.rows = NULL;
        if (!out->spatial.dim) {
            out->spatial = images.spatial;
            images.spatial = (struct gaussian){0};
        }
        image_source_close(&source);
    }
    features_free(&images);
    return code;
}

static int open_images(const struct fid_settings *o, struct inception *n, const char *path,
                       const char *what, bool score, struct features *out)
{
    struct stat info;
    struct npz *z = NULL;
    struct image_source source;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        TRY(image_source_folder(path, &source));
    } else {
        TRY(npz_open(path, &z));
        if (npz_has(z, "mu"))
            return open_statistics(o, n, z, what, score, out);
        TRY(image_source_npz(z, &source));
    }
    int code = features_of(o, n, &source, what, score, out);
    image_source_close(&source);
    return code;
}

// ---- the figures --------------------------------------------------------------------------------

static void warn_of(const char *what, const struct features *f)
{
    if (f->pool.count && f->pool.count < FEW_IMAGES)
        fprintf(stderr,
                "note: %lld %s: with so few FID and sFID are far above those of many (50000 are "
                "usual)\n",
                (long long)f->pool.count, what);
}

static int compare(const struct fid_settings *o, struct session *session,
                   const struct features *reference, const struct features *samples,
                   struct figures *out)
{
    const struct feature_rows r = {reference->rows, reference->row_count};
    const struct feature_rows s = {samples->rows, samples->row_count};
    struct shown shown = {.text = "distances"};
    *out = (struct figures){NAN, NAN, samples->score, NAN, NAN};
    TRY(frechet_distance(&reference->pool, &samples->pool, &out->fid));
    if (reference->spatial.dim && samples->spatial.dim)
        TRY(frechet_distance(&reference->spatial, &samples->spatial, &out->sfid));
    if (!o->pr_images || !r.count || !s.count)
        return 0;
    progress_start(&shown.bar, "block", 0, manifold_blocks(r.count, s.count), 0);
    int code = manifold_compare(session->dev, session->stream, reference->pool.dim, &r, &s,
                                &out->precision, &out->recall, show, &shown);
    progress_clear(&shown.bar);
    return code;
}

static void print_line(const char *name, double value, const char *why)
{
    if (isnan(value))
        printf("%-16s %10s  (%s)\n", name, "-", why);
    else
        printf("%-16s %10.4f\n", name, value);
}

static json_t *number(double v)
{
    return isnan(v) ? json_null() : json_real(v);
}

static void print_figures(const struct fid_settings *o, const struct features *reference,
                          const struct features *samples, const struct figures *f)
{
    if (o->json) {
        json_t *json = json_pack("{s:o, s:o, s:o, s:o, s:o, s:I, s:I, s:s}", "fid", number(f->fid),
                                 "sfid", number(f->sfid), "inception_score", number(f->score),
                                 "precision", number(f->precision), "recall", number(f->recall),
                                 "samples", (json_int_t)samples->pool.count, "reference",
                                 (json_int_t)reference->pool.count, "as", input_choices[o->input]);
        json_dumpf(json, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(json);
        return;
    }
    const char *no_rows = o->pr_images ? "needs images on both sides" : "not asked for";
    print_line("FID", f->fid, "");
    print_line("sFID", f->sfid, "the reference has no mu_s, sigma_s");
    print_line("Inception Score", f->score, "needs images, and fc.weight in the weights");
    print_line("precision", f->precision, no_rows);
    print_line("recall", f->recall, no_rows);
}

// ---- the command --------------------------------------------------------------------------------

static int open_inception(const struct fid_settings *o, const struct session *session,
                          struct inception **out)
{
    struct safetensors *file;
    TRY(weights_file_open(o->inception, &file));
    int code = inception_new(session->dev, session->stream, file, o->batch,
                             (enum inception_input)o->input, 0, out);
    safetensors_close(file);
    TRY(code);
    if ((*out)->classes && (*out)->classes != FID_CLASSES)
        say("note: %s has %d classes, not the %d of FID's network: its figures compare with none "
            "published\n",
            o->inception, (*out)->classes, FID_CLASSES);
    return 0;
}

struct state {
    struct session session;
    struct inception *n;
    struct features reference, samples;
    struct zip_writer *stats;
};

static int save_stats(struct state *s, const char *path)
{
    const struct features *f = &s->reference;
    TRY(gaussian_write(s->stats, "mu", "sigma", &f->pool));
    if (f->spatial.dim)
        TRY(gaussian_write(s->stats, "mu_s", "sigma_s", &f->spatial));
    const int code = zip_commit(s->stats);
    s->stats = NULL;
    if (code >= 0)
        fprintf(stderr, "%s\n", path);
    return code;
}

static int run(const struct fid_settings *o, struct state *s)
{
    struct figures figures;
    struct stat info;
    TRY(lapack_open());
    if (o->samples && stat(o->samples, &info) < 0) // before the reference is looked at
        return fail(ERR_IO, "%s: cannot be opened: %s", o->samples, strerror(errno));
    if (o->save_stats && ranks_first()) // first of all: a place that cannot be written is told before the work
        TRY(zip_create(o->save_stats, &s->stats));
    TRY(session_open(&o->device, &s->session));
    TRY(open_inception(o, &s->session, &s->n));
    stop_on_signals();
    TRY(open_images(o, s->n, o->reference, "reference", false, &s->reference));
    if (s->stats)
        TRY(save_stats(s, o->save_stats));
    if (!o->samples)
        return 0;
    TRY(open_images(o, s->n, o->samples, "samples", true, &s->samples));
    if (!ranks_first())
        return 0; // rank 0 has all features
    warn_of("reference images", &s->reference);
    warn_of("samples", &s->samples);
    TRY(compare(o, &s->session, &s->reference, &s->samples, &figures));
    print_figures(o, &s->reference, &s->samples, &figures);
    return 0;
}

int eval_fid(int argc, char **argv)
{
    struct fid_settings o = {0};
    const struct option_group groups[] = {
        {"what", fid_options, &o},
        {"device", device_option_list, &o.device},
        {0},
    };
    const struct command command = {
        .name = "eval fid",
        .summary = "Compares images with reference images.",
        .about = "Prints FID as pytorch-fid defines it, and sFID, Inception Score, precision and "
                 "recall as ADM's evaluator does, from the features of FID's Inception network.",
        .example = "ditmoe eval fid --samples samples.npz --reference imagenet/train --inception "
                   "pt_inception-2015-12-05-6726825d.pth",
        .groups = groups,
    };
    int status;
    if (!options_parse(&command, argc, argv, NULL, &status))
        return status;
    if (!o.inception)
        return usage_error("eval fid", "--inception FILE is needed");
    if (!o.reference)
        return usage_error("eval fid", "--reference PATH is needed");
    if (!o.samples && !o.save_stats)
        return usage_error("eval fid", "--samples PATH or --save-stats FILE is needed");
    if (!o.samples && options_given("pr-images"))
        return usage_error("eval fid", "--pr-images goes with --samples PATH");
    status = ranks_launch(o.device.device, "eval", argc + 1, argv - 1); // with "fid"
    if (status)
        return status;
    struct state s = {0};
    const int code = ranks_same_start(&command) < 0 ? ERR_INPUT : run(&o, &s);
    zip_abort(s.stats);
    features_free(&s.reference);
    features_free(&s.samples);
    inception_free(s.n);
    session_close(&s.session);
    return code < 0 ? report_failure("eval fid") : 0;
}
