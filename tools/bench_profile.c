#include "tools/bench_profile.h"

#include <stdlib.h>
#include <string.h>

#define LEAST_SHARE 0.001 // of a step: less has no line of its own

struct step_profile {
    char title[256];
    int steps, count;
    double span, event_seconds;
    struct profile_op *ops;
};

int bench_profile_add(struct bench_profile *b, const struct profile *p, const char *model,
                      const char *what, int batch, int steps)
{
    struct step_profile *list = realloc(b->list, sizeof *list * (size_t)(b->count + 1));
    struct profile_op *ops = malloc(sizeof *ops * (size_t)(p->count + 1));
    if (list)
        b->list = list;
    if (!list || !ops) {
        free(ops);
        return fail(ERR_NOMEM, "out of host memory for a profile");
    }
    memcpy(ops, p->list, sizeof *ops * (size_t)p->count);
    struct step_profile *s = &b->list[b->count++];
    *s = (struct step_profile){.steps = steps, .count = p->count, .span = p->span};
    s->event_seconds = p->event_seconds;
    s->ops = ops;
    snprintf(s->title, sizeof s->title, "%s, %s, batch %d", model, what, batch);
    return 0;
}

void bench_profile_free(struct bench_profile *b)
{
    for (int i = 0; i < b->count; i++)
        free(b->list[i].ops);
    free(b->list);
    b->list = NULL;
    b->count = 0;
}

// ---- the table ----------------------------------------------------------------------------------

struct class
{
    const struct profile_op *like; // name and size
    int calls;
    double seconds;
};

static bool alike(const struct profile_op *a, const struct profile_op *b)
{
    return a->bytes == b->bytes && a->flops == b->flops && !strcmp(a->name, b->name);
}

static int slowest_first(const void *a, const void *b)
{
    double x = ((const struct class *)a)->seconds, y = ((const struct class *)b)->seconds;
    return (x < y) - (x > y);
}

static int classify(const struct step_profile *s, struct class *classes)
{
    int count = 0;
    for (int i = 0; i < s->count; i++) {
        int k = 0;
        while (k < count && !alike(classes[k].like, &s->ops[i]))
            k++;
        if (k == count)
            classes[count++] = (struct class){.like = &s->ops[i]};
        classes[k].calls++;
        classes[k].seconds += s->ops[i].seconds;
    }
    qsort(classes, (size_t)count, sizeof *classes, slowest_first);
    return count;
}

// What the class's operations reach, as a rate and as a share of the ceiling that they meet first.
static void print_rate(const struct class *c, const struct ceilings *top, FILE *out)
{
    const double flops = c->like->flops * c->calls / c->seconds;
    const double bytes = c->like->bytes * c->calls / c->seconds;
    char rate[32];
    if (c->seconds <= 0 || (flops <= 0 && bytes <= 0))
        fprintf(out, "\n");
    else if (flops / top->flops > bytes / top->copy)
        fprintf(out, " %14s %5.0f%% of product\n", format_rate(flops, "FLOP", rate),
                100 * flops / top->flops);
    else
        fprintf(out, " %14s %5.0f%% of copy\n", format_rate(bytes, "B", rate),
                100 * bytes / top->copy);
}

static void print_step(const struct step_profile *s, const struct ceilings *top, FILE *out)
{
    struct class *classes = malloc(sizeof *classes * (size_t)(s->count + 1));
    struct class small = {0};
    double total = 0;
    int calls = 0, kinds = 0, count = classes ? classify(s, classes) : 0;
    for (int i = 0; i < count; i++)
        total += classes[i].seconds;
    fprintf(out, "\nprofile: %s", s->title);
    if (s->steps > 1)
        fprintf(out, ", mean of the %d steps of a run", s->steps);
    fprintf(out, "\n%-52s %8s %10s %7s %14s  %s\n", "operation", "calls", "ms", "share", "rate",
            "share of ceiling");
    for (int i = 0; i < count; i++) {
        const struct class *c = &classes[i];
        calls += c->calls;
        if (c->seconds < LEAST_SHARE * total) {
            small.seconds += c->seconds, small.calls += c->calls, kinds++;
            continue;
        }
        fprintf(out, "%-52s %8.4g %10.4f %6.1f%%", c->like->name, (double)c->calls / s->steps,
                1e3 * c->seconds / s->steps, 100 * c->seconds / total);
        print_rate(c, top, out);
    }
    if (kinds > 0) {
        char name[64];
        snprintf(name, sizeof name, "%d smaller kinds", kinds);
        fprintf(out, "%-52s %8.4g %10.4f %6.1f%%\n", name, (double)small.calls / s->steps,
                1e3 * small.seconds / s->steps, 100 * small.seconds / total);
    }
    fprintf(out, "%-52s %8.4g %10.4f\n", "all operations", (double)calls / s->steps,
            1e3 * total / s->steps);
    fprintf(out, "%-52s %8s %10.4f\n", "between them", "", 1e3 * (s->span - total) / s->steps);
    fprintf(out, "(each time includes %.1f us of the two events around it)\n",
            1e6 * s->event_seconds);
    free(classes);
}

void bench_profile_print(const struct bench_profile *b, FILE *out)
{
    for (int i = 0; i < b->count; i++)
        print_step(&b->list[i], b->ceilings, out);
}

// ---- the trace ----------------------------------------------------------------------------------

static json_t *trace_event(const struct profile_op *op, int process)
{
    json_t *args = json_object();
    if (op->layer >= 0)
        json_object_set_new(args, "layer", json_integer(op->layer));
    if (op->bytes > 0)
        json_object_set_new(args, "bytes", json_integer((json_int_t)op->bytes));
    if (op->flops > 0)
        json_object_set_new(args, "flops", json_integer((json_int_t)op->flops));
    return json_pack("{s:s, s:s, s:f, s:f, s:i, s:i, s:o}", "name", op->name, "ph", "X", "ts",
                     1e6 * op->start, "dur", 1e6 * op->seconds, "pid", process, "tid", 0, "args",
                     args);
}

int bench_profile_trace(const struct bench_profile *b, const char *path)
{
    json_t *events = json_array();
    for (int i = 0; i < b->count; i++) {
        const struct step_profile *s = &b->list[i];
        json_array_append_new(events,
                              json_pack("{s:s, s:s, s:i, s:i, s:{s:s}}", "name", "process_name",
                                        "ph", "M", "pid", i, "tid", 0, "args", "name", s->title));
        for (int k = 0; k < s->count; k++)
            json_array_append_new(events, trace_event(&s->ops[k], i));
    }
    json_t *root = json_pack("{s:s, s:o}", "displayTimeUnit", "ms", "traceEvents", events);
    int code = root ? write_json_file(path, root) : fail(ERR_NOMEM, "out of host memory");
    json_decref(root);
    return code;
}
