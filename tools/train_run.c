// A training run from the first file to the last: opens data, device and directory, plans memory,
// goes through the steps, and leaves a checkpoint whatever ends it.
#include "tools/train_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/train_move.h"

enum { SKIPPED_IN_A_ROW = 100 };

struct run {
    const struct train_settings *o;
    const struct command *command;
    struct config config;
    struct dataset *data;
    struct session session;
    struct offload samples_offload; // of the model that draws samples
    struct rank_plan plans[2], *ranks; // now one of them, the other when experts have moved
    struct train_ranks together;
    struct trainer *trainer;
    struct train_samples samples;
    struct loader *loader;
    struct train_log log;
    struct progress progress;
    struct checkpoint *from; // resumed from; NULL: from the beginning
    int lock;
    bool unlike;         // ranks have devices that may round differently
    int64_t first;       // step that this process began after
    int64_t saved;       // step of the last checkpoint written or resumed from
    double loss, weight; // running mean for the progress line
    int skipped_in_a_row;
    double began;
};

// ---- preparations -------------------------------------------------------------------------------

// The model's images are the data's; a dry run without data takes the preset's.
static int open_data(struct run *r)
{
    const struct train_settings *o = r->o;
    struct model_options overrides = o->overrides;
    overrides.diffusion = o->diffusion;
    if (o->data) {
        TRY(data_open(o->data, o->image_size, o->channels, &r->data));
        if (o->vae.vae && !r->data->latents)
            return fail(ERR_INPUT, "--vae shows samples of latents, and %s has images", o->data);
        overrides.size = r->data->size;
        overrides.channels = r->data->channels;
        overrides.classes = r->data->classes;
    } else {
        overrides.size = o->image_size ? o->image_size : -1;
        overrides.channels = o->channels ? o->channels : -1;
    }
    return train_config(o, &overrides, &r->config);
}

static int check_resumed(const struct run *r)
{
    const struct run_state *was = &r->from->run;
    const struct train_settings *o = r->o;
    if (!config_equal(&r->config, &r->from->config))
        return fail(
            ERR_INPUT,
            "%s holds another model than these options and data give ('ditmoe info' shows it)",
            r->from->path);
    if (was->seed != o->seed)
        return fail(ERR_INPUT, "--seed %llu: the run in %s has seed %llu",
                    (unsigned long long)o->seed, o->out, (unsigned long long)was->seed);
    if (was->batch != o->batch || was->accumulate != o->accumulate)
        say("note: batch %d x %d was %d x %d; the run goes on, but differs from one that "
            "never stopped\n",
            o->batch, o->accumulate, was->batch, was->accumulate);
    return 0;
}

// Rank 0 has the directory; the others read checkpoints in it.
static int open_directory(struct run *r)
{
    const struct train_settings *o = r->o;
    if (!o->out)
        return 0;
    if (ranks_first())
        TRY(run_directory_open(o->out, &r->lock));
    TRY(exchange_barrier(ranks_exchange()));
    if (!o->resume) {
        if (run_directory_has_checkpoint(o->out))
            return fail(ERR_INPUT,
                        "%s holds a run already: continue it with --resume, or choose "
                        "another --out",
                        o->out);
        return 0;
    }
    r->from = calloc(1, sizeof *r->from);
    if (!r->from)
        return fail(ERR_NOMEM, "out of memory");
    int found = run_checkpoint_open(o->out, r->from);
    if (found <= 0) {
        free(r->from);
        r->from = NULL;
        if (found == 0)
            say("no checkpoint in %s yet: starting from the beginning\n", o->out);
        return found;
    }
    return check_resumed(r);
}

// Ranks that go on together have found the same data, and the same checkpoint or none.
static int same_beginning(const struct run *r)
{
    static const struct run_state none = {.step = -1};
    const struct run_state *was = r->from ? &r->from->run : &none;
    const int64_t state[] = {was->step, was->applied, was->skipped, (int64_t)was->cursor};
    const int64_t data[] = {r->data ? r->data->count : 0, r->config.size, r->config.classes};
    TRY(ranks_same(data, sizeof data, "has found other data"));
    return ranks_same(state, sizeof state, "has found another checkpoint");
}

static struct train_options trainer_options(const struct train_settings *o,
                                            const struct rank_plan *ranks, uint64_t limit)
{
    struct train_options t = train_defaults();
    t.accumulate = o->accumulate;
    t.recompute = o->recompute != 0;
    t.early = o->early != 0;
    t.time = (enum flow_time)o->time;
    t.seed = o->seed;
    t.limit = limit;
    t.ranks = ranks_of(ranks);
    t.batch = ranks_share(ranks, o->batch);
    t.adamw.rate = o->rate;
    t.adamw.beta1 = o->beta1;
    t.adamw.beta2 = o->beta2;
    t.adamw.decay = o->decay;
    t.adamw.clip = o->clip;
    t.adamw.warmup = o->warmup;
    t.adamw.ema = o->ema;
    return t;
}

static bool wants_samples(const struct run *r)
{
    const bool images = r->config.channels == 1 || r->config.channels == 3;
    return r->o->sample_every > 0 && (images || r->o->vae.vae);
}

// What each rank needs of what it has.
static int tell_memory(uint64_t need, uint64_t have)
{
    char a[32], b[32];
    const uint64_t mine[2] = {need, have};
    const int ranks = ranks_count();
    uint64_t *all = calloc((size_t)ranks, sizeof mine);
    if (!all)
        return fail(ERR_NOMEM, "out of memory");
    int code = exchange_gather(ranks_exchange(), mine, all, sizeof mine);
    for (int r = 0; r < ranks && code >= 0; r++) {
        char who[32] = "";
        if (ranks > 1)
            snprintf(who, sizeof who, "rank %d: ", r);
        say("memory  %s%s of %s\n", who, format_bytes((double)all[2 * r], a),
            format_bytes((double)all[2 * r + 1], b));
    }
    free(all);
    return code;
}

// Plans sampling and training within the limit, *sampling bytes for the former.
static int plan_both(struct run *r, uint64_t limit, const struct offload *samples,
                     const struct offload *training, uint64_t *sampling)
{
    *sampling = 0;
    r->samples_offload = *samples;
    if (wants_samples(r))
        TRY(train_samples_plan(&r->session, &r->config, r->o, r->ranks, samples, sampling));
    struct train_options t =
        trainer_options(r->o, r->ranks, limit > *sampling ? limit - *sampling : 1);
    t.offload = *training;
    if (r->trainer)
        trainer_free(r->trainer);
    return trainer_new(r->session.dev, r->session.stream, &r->config, &t, &r->trainer);
}

// With --offload auto: everything on the device; else no expert of the model that draws samples, which
// works rarely, and as many of the other as there is memory for.
static int plan_fitting(struct run *r, uint64_t limit, uint64_t *sampling)
{
    struct offload asked;
    const struct offload none = {0}, all = {.blocks = r->config.layers};
    TRY(offload_choose(&r->o->memory, r->session.dev, r->ranks, &asked));
    if (asked.blocks != OFFLOAD_AUTO)
        return plan_both(r, limit, &asked, &asked, sampling);
    int code = plan_both(r, limit, &none, &none, sampling);
    if (code != ERR_NOMEM || r->o->early)
        return code;
    return plan_both(r, limit, &all, &asked, sampling);
}

// Plans training, and sampling beside it, within the limit. The table goes to stdout in a dry run,
// to stderr when the plan does not fit.
static int plan_memory(struct run *r)
{
    const struct train_settings *o = r->o;
    const struct device *dev = r->session.dev;
    uint64_t limit = o->memory.memory ? o->memory.memory : dev->info.memory, sampling;
    char need[32], have[32];
    int code = plan_fitting(r, limit, &sampling);
    if (code < 0 && (code != ERR_NOMEM || !r->trainer))
        return code;
    uint64_t total = plan_total(r->trainer->dit->plan) + sampling;
    bool too_much = code < 0;
    FILE *table = o->dry_run && ranks_first() ? stdout : too_much ? stderr : NULL;
    format_bytes((double)total, need);
    format_bytes((double)limit, have);
    if (table) {
        plan_print(r->trainer->dit->plan, table, false);
        if (sampling)
            fprintf(table, "%-14s %s (--sample-every 0 does without)\n", "sample grids",
                    format_bytes((double)sampling, (char[32]){0}));
        fprintf(table, "%-14s %s of %s\n", "in all", need, have);
        fflush(table);
    }
    if (too_much && total > limit)
        return fail(ERR_NOMEM,
                    "not enough memory: needs %s, and %s has %s; a smaller --batch%s%s may help",
                    need, dev->info.key, have, o->recompute ? "" : " or --recompute",
                    ranks_exchange() ? ", or --headroom 2 (less room for other ranks' tokens),"
                    : o->early       ? ""
                                     : " or --early-update");
    if (!too_much) {
        TRY(tell_memory(total, limit));
        offload_say(r->trainer->dit);
    }
    return code;
}

// Whether all ranks have devices of one name, driver and backend. (DITMOE_UNLIKE=1: as if not, for
// tests.)
static int compare_devices(struct run *r)
{
    const struct device_info *info = &r->session.dev->info;
    char mine[384] = "", first[384] = "";
    snprintf(mine, sizeof mine, "%s, %s, %s", info->backend->name, info->name, info->driver);
    memcpy(first, mine, sizeof first);
    TRY(exchange_broadcast(ranks_exchange(), first, sizeof first, 0));
    const char *wish = getenv("DITMOE_UNLIKE");
    return exchange_any(ranks_exchange(), strcmp(mine, first) != 0 || (wish && *wish == '1'),
                        &r->unlike);
}

static void print_header(const struct run *r)
{
    const struct config *c = &r->config;
    struct config_counts n = config_count(c);
    char title[160];
    say("model   %s: %.1f M parameters, %.1f M active, %d tokens of an image %dx%dx%d\n",
            model_title(r->o->model, c, title), 1e-6 * (double)n.total, 1e-6 * (double)n.active,
            config_tokens(c), c->size, c->size, c->channels);
    if (r->data)
        say( "data    %s: %lld images, %d classes\n", r->data->path,
                (long long)r->data->count, r->data->classes);
    say( "device  %s: %s, %s\n", r->session.dev->info.key, r->session.dev->info.name,
            dtype_name(r->session.dev->act));
    say( "seed    %llu\n", (unsigned long long)r->o->seed);
}

static int write_run_json(const struct run *r)
{
    char path[4200];
    const struct device_info *info = &r->session.dev->info;
    json_t *names = json_array();
    for (int i = 0; r->data->class_names && i < r->data->classes; i++)
        json_array_append_new(names, json_string(r->data->class_names[i]));
    json_t *json =
        json_pack("{s:s, s:o, s:o, s:{s:s, s:s}, s:{s:s, s:I, s:o}}", "version", DITMOE_VERSION,
                  "options", options_to_json(r->command), "config", config_to_json(&r->config),
                  "device", "key", info->key, "name", info->name, "data", "path", r->data->path,
                  "images", (json_int_t)r->data->count, "class_names", names);
    if (!json)
        return fail(ERR_INPUT, "run.json: a name is not valid UTF-8");
    snprintf(path, sizeof path, "%s/run.json", r->o->out);
    int code = write_json_file(path, json);
    json_decref(json);
    return code;
}

// ---- the steps ----------------------------------------------------------------------------------

static int load_or_init(struct run *r)
{
    if (!r->from) {
        TRY(dit_init(r->trainer->dit, r->o->seed));
        return r->o->init ? train_load_init(r->o, r->trainer->dit) : 0;
    }
    const struct run_state *was = &r->from->run;
    TRY(dit_init(r->trainer->dit, r->o->seed));
    TRY(checkpoint_load_training(r->from, r->trainer->dit));
    r->saved = was->step;
    return trainer_restore(r->trainer, was->step, was->applied, was->skipped);
}

static int save(struct run *r)
{
    char path[4200];
    struct trainer *t = r->trainer;
    struct run_state state = {.step = t->step,
                              .seed = r->o->seed,
                              .cursor = loader_cursor(r->loader),
                              .batch = r->o->batch,
                              .accumulate = r->o->accumulate};
    TRY(trainer_counts(t, &state.applied, &state.skipped));
    run_checkpoint_path(r->o->out, t->step, path, sizeof path);
    if (r->unlike)
        TRY(trainer_agree(t));
    TRY(checkpoint_save(path, t->dit, &state));
    r->saved = t->step;
    if (ranks_first())
        run_checkpoint_prune(r->o->out, r->o->keep);
    return 0;
}

// What sampling needs, without the optimiser's state: half the size of a checkpoint.
static int save_model(const struct run *r)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/model.safetensors", r->o->out);
    return checkpoint_save(path, r->trainer->dit, NULL);
}

static void show_progress(struct run *r, const struct train_report *report)
{
    char text[160], skips[40] = "";
    struct progress *p = &r->progress;
    int images = r->o->batch * r->o->accumulate;
    if (isfinite(report->loss)) {
        r->loss = 0.98 * r->loss + 0.02 * report->loss;
        r->weight = 0.98 * r->weight + 0.02;
    }
    if (report->skips)
        snprintf(skips, sizeof skips, "  skipped %d", report->skips);
    double pace = p->pace > 0 ? p->pace : now_seconds() - p->start;
    snprintf(text, sizeof text, "loss %.4f  %.*f images/s  balance %.2f%s",
             r->weight > 0 ? r->loss / r->weight : NAN, images / pace < 10, images / pace,
             report->load_max, skips);
    progress_update(p, r->trainer->step, text);
}

// All micro-batches of one step.
static int take_step(struct run *r, struct train_report *report)
{
    double began = now_seconds();
    bool done = false;
    exchange_step(ranks_exchange(), r->trainer->step);
    while (!done) {
        struct batch batch;
        TRY(loader_next(r->loader, &batch));
        TRY(trainer_micro(r->trainer, batch.images, batch.labels, &done));
    }
    TRY(trainer_report(r->trainer, report));
    train_ranks_step(&r->together, now_seconds() - began);
    TRY(train_ranks_load(&r->together, r->trainer));
    if (ranks_first())
        TRY(train_log_row(&r->log, r->trainer->step, report, r->o->batch * r->o->accumulate,
                      now_seconds() - began));
    r->skipped_in_a_row = report->skipped ? r->skipped_in_a_row + 1 : 0;
    if (r->skipped_in_a_row >= SKIPPED_IN_A_ROW)
        return fail(ERR_INPUT,
                    "step %lld: loss or gradients were not finite for %d steps in a row; "
                    "try a smaller --lr or --clip 1",
                    (long long)r->trainer->step, SKIPPED_IN_A_ROW);
    return 0;
}

// Moves experts between ranks where their load asks for it.
static int replan(struct run *r)
{
    const struct train_settings *o = r->o;
    struct rank_plan *next = r->ranks == &r->plans[0] ? &r->plans[1] : &r->plans[0];
    bool moved;
    if (!ranks_exchange() || !o->replan || r->trainer->step % o->replan != 0)
        return 0;
    TRY(train_ranks_note(&r->together, r->trainer, true));
    TRY(train_ranks_move(&r->together, r->ranks, o->seed, r->trainer->step, next, &moved));
    if (!moved)
        return 0;
    const bool samples = r->samples.sampler != NULL;
    train_samples_free(&r->samples);
    TRY(trainer_move(&r->trainer, ranks_of(next)));
    ranks_plan_free(r->ranks);
    r->ranks = next;
    return samples ? train_samples_new(&r->session, &r->config, o, next, &r->samples_offload,
                                       &r->samples) : 0;
}

static int take_steps(struct run *r)
{
    const struct train_settings *o = r->o;
    bool stop = stop_wanted != 0 && ranks_count() == 1;
    while (r->trainer->step < o->steps && !stop) {
        struct train_report report;
        TRY(take_step(r, &report));
        TRY(ranks_stop(&stop));
        show_progress(r, &report);
        const int64_t step = r->trainer->step;
        const bool last = step == o->steps;
        if (o->checkpoint_every && step % o->checkpoint_every == 0)
            TRY(save(r));
        if (r->samples.sampler && !stop && (last || step % o->sample_every == 0)) {
            int code = train_samples_write(&r->samples, r->trainer, r->data, o->out);
            if (code < 0 && code != ERR_STOPPED)
                return code;
            stop = code == ERR_STOPPED;
            r->progress.pace_time = now_seconds(); // sampling is no part of a step's time
        }
        TRY(train_ranks_note(&r->together, r->trainer, last || stop));
        if (!last && !stop)
            TRY(replan(r));
    }
    progress_clear(&r->progress);
    if (r->saved != r->trainer->step)
        TRY(save(r));
    return 0;
}

static void print_summary(const struct run *r)
{
    char took[32];
    double seconds = now_seconds() - r->began, wait = loader_waited(r->loader);
    say("%s in %s; waited %.1f s (%.1f%%) for data\n", stop_wanted ? "stopped" : "done",
            format_seconds(seconds, took), wait, 100 * wait / (seconds > 0 ? seconds : 1));
    const struct config *c = &r->config;
    int64_t layers = 0;
    for (int l = 0; l < c->layers; l++)
        layers += config_is_moe(c, l);
    train_ranks_say(&r->together, (r->trainer->step - r->first) * r->o->accumulate * r->o->batch *
                                      config_tokens(c) * c->topk * layers *
                                      (r->o->recompute ? 2 : 1)); // rows then travel again
    int32_t applied = 0, skipped = 0;
    if (trainer_counts(r->trainer, &applied, &skipped) >= 0 && skipped)
        say("%d steps of %d were skipped: loss or gradients were not finite\n", skipped,
                applied + skipped);
}

static int train(struct run *r)
{
    char path[4200], title[160];
    const struct train_settings *o = r->o;
    TRY(trainer_commit(r->trainer));
    TRY(load_or_init(r));
    if (wants_samples(r))
        TRY(train_samples_new(&r->session, &r->config, o, r->ranks, &r->samples_offload,
                              &r->samples));
    if (ranks_first()) {
        TRY(write_run_json(r));
        TRY(train_log_open(o->out, &r->config, r->trainer->step, &r->log));
    }
    uint64_t cursor = r->from ? r->from->run.cursor : 0;
    TRY(loader_start_part(r->data, o->batch, r->trainer->first, r->trainer->options.batch, o->seed,
                          cursor, o->flip != 0, o->threads, &r->loader));
    if (r->from)
        say("resume  at step %lld of %lld\n", (long long)r->trainer->step, (long long)o->steps);
    TRY(train_ranks_new(&r->config, o->out, &r->together));
    r->together.noted = r->first = r->trainer->step;
    r->together.predicted = r->ranks->predicted;
    stop_on_signals();
    r->began = now_seconds();
    progress_start(&r->progress, "step", r->trainer->step, o->steps, o->log_every);
    progress_update(&r->progress, r->trainer->step,
                    "starting: a device's first run compiles kernels");
    int code = take_steps(r);
    progress_clear(&r->progress);
    TRY(code);
    print_summary(r);
    if (r->trainer->step > r->first)
        TRY(offload_say_waited(r->trainer->dit, (now_seconds() - r->began) /
                                                    (double)(r->trainer->step - r->first)));
    TRY(train_ranks_write_load(&r->together, &r->config, o->out));
    TRY(train_log_close(&r->log));
    if (ranks_first())
        TRY(train_log_chart(o->out, &r->config, model_title(o->model, &r->config, title)));
    if (r->trainer->step == o->steps)
        TRY(save_model(r));
    else
        say("stopped at step %lld of %lld; continue with --resume\n", (long long)r->trainer->step,
            (long long)o->steps);
    run_checkpoint_path(o->out, r->saved, path, sizeof path);
    if (ranks_first())
        printf("%s\n", path);
    return 0;
}

// ---- the run ------------------------------------------------------------------------------------

static int prepare_and_train(struct run *r)
{
    char path[4200];
    const struct train_settings *o = r->o;
    TRY(ranks_same_start(r->command));
    TRY(open_data(r));
    if (!o->dry_run)
        TRY(open_directory(r));
    TRY(same_beginning(r));
    r->ranks = &r->plans[0];
    if (r->from && r->from->run.step >= o->steps) {
        run_checkpoint_path(o->out, r->from->run.step, path, sizeof path);
        say("all %lld steps are done already (--steps N for more)\n", (long long)o->steps);
        if (ranks_first())
            printf("%s\n", path);
        return 0;
    }
    TRY(session_open(&o->device, &r->session));
    TRY(compare_devices(r));
    TRY(ranks_connect(&o->ranks, r->session.dev, r->session.stream));
    print_header(r);
    const struct rank_work work = {.train = true,
                                   .recompute = o->recompute != 0,
                                   .early = o->early != 0,
                                   .batch = o->batch,
                                   .copies = 1,
                                   .accumulate = o->accumulate,
                                   .memory = o->memory.memory};
    TRY(ranks_plan(&o->ranks, &r->config, &work, r->ranks));
    TRY(plan_memory(r));
    return o->dry_run ? 0 : train(r);
}

// A device that fails loses the steps since the last checkpoint, no more.
static int say_what_is_kept(const struct run *r)
{
    char what[600];
    snprintf(what, sizeof what, "%s", error_message());
    if (r->saved < 0)
        return fail(ERR_LOST, "%s", what);
    return fail(ERR_LOST, "%s with --resume, which goes on from step %lld", what,
                (long long)r->saved);
}

int train_run(const struct train_settings *o, const struct command *command)
{
    struct run r = {.o = o, .command = command, .lock = -1, .saved = -1};
    int code = prepare_and_train(&r);
    if (code == ERR_LOST)
        code = say_what_is_kept(&r);
    if (r.loader)
        loader_stop(r.loader);
    train_log_close(&r.log);
    train_samples_free(&r.samples);
    if (r.trainer)
        trainer_free(r.trainer);
    ranks_plan_free(&r.plans[0]), ranks_plan_free(&r.plans[1]);
    train_ranks_free(&r.together);
    session_close(&r.session);
    if (r.from) {
        checkpoint_close(r.from);
        free(r.from);
    }
    data_close(r.data);
    if (r.lock >= 0)
        close(r.lock);
    return code;
}
