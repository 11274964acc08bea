// Runs on several devices: one rank (process) each, under mpirun; model/moe_exchange.h says how one
// model lies on them. Here: starting and ending together, which device a rank takes, who speaks,
// and the options that all commands have that run on ranks. A process by itself is rank 0 of 1.
#ifndef DITMOE_RANKS_H
#define DITMOE_RANKS_H

#include "model/moe_exchange.h"
#include "runtime/forecast.h"
#include "tools/options.h"

struct device_info;
struct config;

struct rank_options {
    const char *placement; // a policy, "replicated", "48:16/6:2", or a file
    const char *load;      // of experts, measured, or NULL
    float headroom;
    int fabric; // enum road_choice
    bool quiet; // says nothing of the plan
};
extern const struct option_spec rank_option_list[];
#define RANK_OPTIONS_TITLE "several devices: --device KEY,KEY,... (a rank on each), or mpirun"

// ---- the process --------------------------------------------------------------------------------

// First of all in main(): joins the other ranks where a launcher started some. 0, or exit status.
int ranks_open(const char *command);
// Last of all: leaves in good order, or, when this rank failed (status not 0), ends all.
int ranks_close(int status);

struct exchange *ranks_exchange(void); // NULL: one process
int ranks_count(void);
int ranks_number(void);
static inline bool ranks_first(void)
{
    return ranks_number() == 0;
}

// Progress and notes, on stderr, from rank 0 alone.
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Whether this rank tells what went wrong: true for one of those who failed at the same time. Puts
// "rank 1: " into `who` where that is of interest.
bool ranks_tell(char who[32]);
// *stop: has any rank been asked to stop? Then all stop, at this call: a rank that is asked later
// must not stop before the next one. A collective call.
int ranks_stop(bool *stop);

// ---- devices ------------------------------------------------------------------------------------

// --device A,B,...: not yet under mpirun, starts it with a rank for each; returns then only to tell
// why not (exit status). 0: nothing to start.
int ranks_launch(const char *devices, const char *command, int argc, char **argv);
// This rank's device: item of a list, or the best that no rank of this machine before it takes.
int ranks_device(const char *devices, struct device_info *out);

// ---- one run ------------------------------------------------------------------------------------

// ERR_INPUT when ranks were started with other builds or options, those of the device apart.
int ranks_same_start(const struct command *command);
// ERR_INPUT when ranks would go on from different files; `what` as in exchange_same().
int ranks_same(const void *data, size_t bytes, const char *what);

// Looks for straight roads between the ranks' devices and says which there are. A collective call,
// after the session's device is open; ranks_disconnect() before it closes.
int ranks_connect(const struct rank_options *o, struct device *dev, struct stream *stream);
void ranks_disconnect(const struct device *dev);
struct roads *ranks_roads(void); // NULL: none is straight
// "ranks   3: NCCL 0-1; windows 0-2, 1-2" on rank 0's stderr. A collective call (ranks_roads.c).
int ranks_say_roads(struct exchange *x, const struct roads *roads);

// What a run does, as far as its placement and forecast depend on it.
struct rank_work {
    bool train, recompute, early;
    int batch;       // images at a time, all ranks together
    int copies;      // as in struct dit_ranks
    int accumulate;  // batches of a step
    uint64_t memory; // of this rank's device to plan with; 0: what it has
};

// The placement that the options name; *out is nothing (ranks.exchange NULL) with one rank. Says on
// stderr what it is and what it should take. A collective call, after ranks_connect().
struct rank_plan {
    struct placement placement;
    bool *streamed; // [layers] whose experts of this rank live in host memory; NULL: none
    struct dit_ranks ranks;
    struct forecast forecast; // of rank 0 alone
    double predicted;         // seconds of a step or pass; NAN: not known
};
int ranks_plan(const struct rank_options *o, const struct config *c, const struct rank_work *w,
               struct rank_plan *out);
// The same placement for another number of images at a time.
int ranks_replan(const struct rank_plan *from, int batch, int copies, struct rank_plan *out);
void ranks_plan_free(struct rank_plan *p);
static inline const struct dit_ranks *ranks_of(const struct rank_plan *p)
{
    return p->ranks.exchange ? &p->ranks : NULL;
}
// Images of `batch` that are this rank's.
int ranks_share(const struct rank_plan *p, int batch);

#endif
