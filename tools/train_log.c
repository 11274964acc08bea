// log.csv: a row a step, flushed at once, so that a kill loses nothing that a checkpoint has.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/figure.h"
#include "tools/train_run.h"

static void log_header(const struct config *c, char *out, size_t size)
{
    int n = snprintf(out, size,
                     "step,loss,grad_norm,lr,balance,load_max,images_per_second,seconds,"
                     "skipped%s",
                     c->diffusion == DIFFUSION_DDPM ? ",mse,vb" : "");
    for (int layer = 0; layer < c->layers && n < (int)size; layer++)
        if (config_is_moe(c, layer))
            n += snprintf(out + n, size - (size_t)n, ",entropy_%d", layer);
}

static char *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    char *text = NULL;
    size_t used = 0, room = 0, got = 1;
    while (got > 0) {
        if (room - used < 65536) {
            char *more = realloc(text, room += room / 2 + 131072);
            if (!more)
                break;
            text = more;
        }
        got = fread(text + used, 1, room - used - 1, f);
        used += got;
    }
    fclose(f);
    if (text)
        text[used] = 0;
    *bytes = used;
    return text;
}

// Length of the part of `text` that ends with the last whole row of a step <= `step`.
static size_t rows_until(const char *text, int64_t step)
{
    const char *end = strchr(text, '\n'); // of the header
    const char *kept = end ? end + 1 : text;
    for (const char *row = kept; (end = strchr(row, '\n')) != NULL; row = end + 1) {
        char *after;
        long long number = strtoll(row, &after, 10);
        if (after == row || *after != ',' || number > step)
            break;
        kept = end + 1;
    }
    return (size_t)(kept - text);
}

// Keeps the rows of an earlier run up to `step`; a log with other columns, of another version,
// becomes log.csv.old.
static int log_cut(const char *path, const char *header, int64_t step)
{
    size_t bytes = 0, n = strlen(header);
    char *text = step > 0 ? read_file(path, &bytes) : NULL;
    bool same = text && bytes > n && !strncmp(text, header, n) && text[n] == '\n';
    if (same) {
        bytes = rows_until(text, step);
    } else {
        char old[4200];
        snprintf(old, sizeof old, "%s.old", path);
        if (text && bytes && rename(path, old) < 0) {
            free(text);
            return fail(ERR_IO, "%s: cannot be renamed: %s", path, strerror(errno));
        }
        free(text);
        text = malloc(n + 2);
        if (!text)
            return fail(ERR_NOMEM, "out of memory");
        bytes = (size_t)snprintf(text, n + 2, "%s\n", header);
    }
    int code = write_text_file(path, text, bytes);
    free(text);
    return code;
}

int train_log_open(const char *dir, const struct config *c, int64_t step, struct train_log *out)
{
    size_t size = 256 + 20 * (size_t)c->layers;
    char *header = malloc(size);
    if (!header)
        return fail(ERR_NOMEM, "out of memory");
    log_header(c, header, size);
    out->file = NULL;
    out->terms = c->diffusion == DIFFUSION_DDPM;
    snprintf(out->path, sizeof out->path, "%s/log.csv", dir);
    int code = log_cut(out->path, header, step);
    free(header);
    TRY(code);
    out->file = fopen(out->path, "ab");
    return out->file ? 0 : fail(ERR_IO, "%s: %s", out->path, strerror(errno));
}

int train_log_row(struct train_log *log, int64_t step, const struct train_report *r, int images,
                  double seconds)
{
    fprintf(log->file, "%lld,%.9g,%.9g,%.9g,%.9g,%.6g,%.2f,%.6f,%d", (long long)step, r->loss,
            r->grad_norm, r->rate, r->balance, r->load_max, (double)images / seconds, seconds,
            r->skipped);
    if (log->terms)
        fprintf(log->file, ",%.9g,%.9g", r->mse, r->vb);
    for (int i = 0; i < r->layers; i++)
        fprintf(log->file, ",%.6f", r->entropy[i]);
    fprintf(log->file, "\n");
    if (fflush(log->file) != 0 || ferror(log->file))
        return fail(ERR_IO, "%s: %s", log->path, strerror(errno));
    return 0;
}

int train_log_close(struct train_log *log)
{
    FILE *f = log->file;
    log->file = NULL;
    if (f && fclose(f) != 0)
        return fail(ERR_IO, "%s: %s", log->path, strerror(errno));
    return 0;
}

// ---- loss.png -----------------------------------------------------------------------------------

// Columns step and loss of a log; returns the number of rows.
static int log_losses(const char *text, double *steps, double *losses)
{
    int count = 0;
    const char *row = strchr(text, '\n');
    while (row && *++row) {
        char *end;
        steps[count] = strtod(row, &end);
        if (end == row || *end != ',')
            break;
        losses[count] = strtod(end + 1, &end);
        count++;
        row = strchr(end, '\n');
    }
    return count;
}

int train_log_chart(const char *dir, const struct config *c, const char *title)
{
    char path[4200];
    size_t bytes = 0, rows = 0;
    snprintf(path, sizeof path, "%s/log.csv", dir);
    char *text = read_file(path, &bytes);
    if (!text)
        return fail(ERR_IO, "%s: %s", path, strerror(errno));
    for (size_t i = 0; i < bytes; i++)
        rows += text[i] == '\n';
    double *values = calloc(2 * rows + 2, sizeof *values);
    if (!values) {
        free(text);
        return fail(ERR_NOMEM, "out of memory");
    }
    double *steps = values, *losses = values + rows + 1;
    int count = log_losses(text, steps, losses), code = 0;
    if (count >= 2) {
        struct figure_curve curve = {.name = c->diffusion == DIFFUSION_DDPM ? "loss (DDPM, hybrid)"
                                                                           : "loss (rectified flow)",
                                     .x = steps,
                                     .y = losses,
                                     .count = count,
                                     .smooth = count >= 40 ? fmin(count / 20.0, 100) : 0};
        struct figure_chart chart = {.title = title,
                                     .x_label = "step",
                                     .y_label = "loss",
                                     .curves = &curve,
                                     .curve_count = 1};
        struct image_text version = {"Software", "ditmoe " DITMOE_VERSION};
        snprintf(path, sizeof path, "%s/loss.png", dir);
        code = figure_write_chart(path, &chart, &version, 1);
    }
    free(values);
    free(text);
    return code;
}
