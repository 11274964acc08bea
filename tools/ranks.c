#include "tools/ranks.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "devices/hash.h"
#include "model/config.h"
#include "runtime/topology.h"
#include "tools/command.h"
#include "tools/ranks_policy.h"

enum { MOST_DEVICES = 64 };

static const char *const fabric_choices[] = {"auto", "mpi", "nccl", "peer", NULL}; // as in enum road_choice

#define AT(member) offsetof(struct rank_options, member)
const struct option_spec rank_option_list[] = {
    {"placement", 0, OPTION_STRING, "WHICH", "uniform",
     "which rank has which experts and how many images: cost (what the forecast says is fastest, "
     "from "
     "what 'ditmoe calibrate' measured), memory, frequency or uniform (docs/placement.md), "
     "replicated "
     "(all experts on every rank), 48:16/6:2 (images of each rank / experts of a layer), or a file "
     "of "
     "'ditmoe plan'",
     AT(placement), 0, 0, NULL},
    {"load", 0, OPTION_STRING, "FILE", NULL,
     "load of experts for cost and frequency: RUN_DIR/load.json of a run on ranks; otherwise even",
     AT(load), 0, 0, NULL},
    {"headroom", 0, OPTION_FLOAT, "X", "0",
     "memory for tokens that come from other ranks, as a multiple of an even load; 0: for any load",
     AT(headroom), 0, 1e6, NULL},
    {"fabric", 0, OPTION_CHOICE, "ROAD", "auto",
     "how bytes pass between devices: peer (straight into each other's memory: devices of one machine that "
     "can), nccl (NVIDIA GPUs only), mpi (through the hosts), auto (peer between GPUs "
     "of one machine, else nccl for every pair that can)",
     AT(fabric), 0, 0, fabric_choices},
    {0},
};
#undef AT

// ---- the process --------------------------------------------------------------------------------

static struct exchange *exchange;
static struct roads *roads;
static struct peers *peers;
static struct device *connected; // the device that they begin at
static bool told;                // this rank has said what went wrong

// mpirun binds a rank to one core unless told otherwise, and a CPU device's threads, which start
// with its driver, would all share it. A wider binding is meant and stays.
static void widen_binding(void)
{
    cpu_set_t set;
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) > 2 ||
        cores < 2L * exchange_node_ranks(exchange))
        return;
    CPU_ZERO(&set);
    for (long i = 0; i < cores && i < CPU_SETSIZE; i++)
        CPU_SET((size_t)i, &set);
    sched_setaffinity(0, sizeof set, &set); // where this is not allowed it stays as it was
}

static const char *running; // the command

static void tell_late(void)
{
    char what[600];
    snprintf(what, sizeof what, "%s", error_message());
    fail(ERR_LOST, "%s%s", what, strcmp(running, "train") ? "" : " with --resume");
    report_failure(running);
}

int ranks_open(const char *command)
{
    static const char *const on_ranks[] = {"train", "sample", "bench", "calibrate", "eval"};
    bool wanted = false;
    for (size_t i = 0; i < sizeof on_ranks / sizeof *on_ranks; i++)
        wanted = wanted || !strcmp(command, on_ranks[i]);
    if (!wanted)
        return 0;
    if (exchange_open(&exchange) < 0)
        return report_failure(command);
    if (!exchange)
        return 0;
    running = command;
    exchange_when_late(exchange, tell_late);
    widen_binding();
    stop_on_signals();
    return 0;
}

int ranks_close(int status)
{
    if (!exchange)
        return status;
    fflush(stdout);
    fflush(stderr);
    if (status != 0) {
        if (!told) // who tells has a second for it
            usleep(1000000);
        exchange_abort(exchange, status);
    }
    exchange_close(exchange);
    exchange = NULL;
    return status;
}

struct exchange *ranks_exchange(void)
{
    return exchange;
}

int ranks_count(void)
{
    return exchange_ranks(exchange);
}

int ranks_number(void)
{
    return exchange_rank(exchange);
}

void say(const char *format, ...)
{
    va_list args;
    if (!ranks_first())
        return;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
}

bool ranks_tell(char who[32])
{
    who[0] = 0;
    if (ranks_number() > 0)
        usleep(200000); // what goes wrong on all ranks is rank 0's to tell
    if (!exchange_first_to_tell(exchange))
        return false;
    if (ranks_number() > 0)
        snprintf(who, 32, "rank %d: ", ranks_number());
    told = true;
    return true;
}

int ranks_stop(bool *stop)
{
    TRY(exchange_any(exchange, stop_wanted != 0, stop));
    if (*stop)
        stop_wanted = 1;
    return 0;
}

// ---- devices ------------------------------------------------------------------------------------

static int count_items(const char *list)
{
    int count = 1;
    for (const char *c = list; *c; c++)
        count += *c == ',';
    return count;
}

static void item_of(const char *list, int index, char *out, size_t size)
{
    while (index-- > 0)
        list = strchr(list, ',') + 1;
    snprintf(out, size, "%.*s", (int)strcspn(list, ","), list);
}

// Open MPI refuses to run as root, and more ranks than cores, unless told that this is meant; it
// binds each rank to a core, which a CPU device would then have alone; when a rank has failed it
// waits so many seconds for the others, twice, also when they are gone; of a failure our own line
// says all. Other MPIs do not read these.
static void set_environment(void)
{
    if (geteuid() == 0) {
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
        setenv("PRTE_ALLOW_RUN_AS_ROOT", "1", 0);
        setenv("PRTE_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    }
    setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
    setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 0);
    setenv("OMPI_MCA_odls_base_sigkill_timeout", "1", 0);
    setenv("OMPI_MCA_orte_execute_quiet", "1", 0);
    setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe", 0);
    setenv("PRTE_MCA_hwloc_default_binding_policy", "none", 0);
}

static pid_t launcher; // mpirun

// Asks all ranks to stop after their step: mpirun passes SIGUSR1 on, while of SIGTERM and SIGINT it
// makes an end.
static void pass_on(int signal)
{
    static volatile sig_atomic_t asked;
    (void)signal;
    kill(launcher, asked ? SIGTERM : SIGUSR1);
    asked = 1;
}

// Runs mpirun out of reach of the terminal's Ctrl-C; does not return unless it cannot be started
// (errno).
static void run_launcher(char **words)
{
    int failure[2], why = 0, status = 0;
    const struct sigaction action = {.sa_handler = pass_on};
    if (pipe2(failure, O_CLOEXEC) != 0 || (launcher = fork()) < 0)
        return;
    if (launcher == 0) {
        const int nothing = open("/dev/null", O_RDONLY);
        setpgid(0, 0);
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (nothing >= 0)
            dup2(nothing, STDIN_FILENO);
        execvp(words[0], words);
        why = errno;
        if (write(failure[1], &why, sizeof why) < 0)
            why = 0;
        _exit(127);
    }
    close(failure[1]);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    const bool failed = read(failure[0], &why, sizeof why) == (ssize_t)sizeof why;
    while (waitpid(launcher, &status, 0) < 0 && errno == EINTR)
        continue;
    if (!failed)
        exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    errno = why;
}

int ranks_launch(const char *devices, const char *command, int argc, char **argv)
{
    char count[16], self[4096];
    if (exchange || !strchr(devices, ','))
        return 0;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    char **words = calloc((size_t)argc + 6, sizeof *words);
    if (n < 0 || !words) {
        free(words);
        return usage_error(command, "cannot start mpirun: %s", strerror(errno));
    }
    self[n] = 0;
    snprintf(count, sizeof count, "%d", count_items(devices));
    char *head[] = {"mpirun", "-n", count, self, (char *)(uintptr_t)command};
    memcpy(words, head, sizeof head);
    for (int i = 1; i < argc; i++)
        words[4 + i] = argv[i];
    set_environment();
    run_launcher(words);
    int why = errno;
    free(words);
    return usage_error(command,
                       "--device %s: several devices need mpirun, which cannot be started: "
                       "%s (Debian: openmpi-bin)",
                       devices, strerror(why));
}

static int kind_rank(const struct device_info *d)
{
    return d->kind == DEVICE_GPU ? 2 : d->kind == DEVICE_ACCELERATOR ? 1 : 0;
}

// Is there a better way to the same device?
static bool second_way(const struct device_info *d, const struct device_info *list, int count)
{
    for (int i = 0; i < count && d->twin[0]; i++)
        if (!strcmp(list[i].key, d->twin))
            return &list[i] < d;
    return false;
}

// The device number `index` in order of preference.
static int nth_device(int index, struct device_info *out)
{
    struct device_info list[MOST_DEVICES];
    int count = devices_list(list, MOST_DEVICES), seen = 0;
    TRY(count);
    for (int kind = 2; kind >= 0; kind--) {
        for (int i = 0; i < count; i++) {
            if (kind_rank(&list[i]) != kind || second_way(&list[i], list, count))
                continue;
            if (seen++ == index) {
                *out = list[i];
                return 0;
            }
        }
    }
    return fail(ERR_NODEVICE,
                "%d ranks on this machine, but %d device%s: start fewer, or name a device for each "
                "(--device KEY,KEY,...; one CPU device may be shared: --device %s)",
                exchange_node_ranks(exchange), seen, seen == 1 ? "" : "s",
                count > 0 ? list[count - 1].key : "KEY");
}

static int choose_device(const char *devices, struct device_info *out)
{
    const int here = exchange_node_ranks(exchange), mine = exchange_node_rank(exchange);
    char key[64];
    if (here == 1 && !strchr(devices, ','))
        return devices_find(devices, out);
    if (!strcmp(devices, "auto"))
        return nth_device(mine, out);
    const int items = count_items(devices);
    if (items > 1 && items != here)
        return fail(ERR_INPUT, "--device %s names %d devices for %d ranks on this machine", devices,
                    items, here);
    item_of(devices, items > 1 ? mine : 0, key, sizeof key);
    TRY(devices_find(key, out));
    if (items == 1 && out->kind != DEVICE_CPU)
        return fail(ERR_INPUT,
                    "%d ranks on this machine were all given %s: name a device for each (--device "
                    "KEY,KEY,...), or leave --device out",
                    here, devices);
    return 0;
}

// Several ranks on one machine: the threads of each stay near its device (the drivers' own, too, as
// they are started later). Ranks that share one CPU divide its NUMA nodes.
int ranks_device(const char *devices, struct device_info *out)
{
    const int here = exchange_node_ranks(exchange), mine = exchange_node_rank(exchange);
    const bool shared = !strcmp(devices, "auto") || !strchr(devices, ',');
    char words[160];
    TRY(choose_device(devices, out));
    if (here > 1 && out->pci[0])
        return topology_bind(out, 0, 1, words, sizeof words);
    return here > 1 && shared ? topology_bind(out, mine, here, words, sizeof words) : 0;
}

// ---- one run ------------------------------------------------------------------------------------

static uint64_t hash_of_program(void)
{
    unsigned char buffer[65536];
    uint64_t h = HASH_START;
    FILE *f = fopen("/proc/self/exe", "rb");
    for (size_t n; f && (n = fread(buffer, 1, sizeof buffer, f)) > 0;)
        h = hash_bytes(h, buffer, n);
    if (f)
        fclose(f);
    return h;
}

int ranks_same(const void *data, size_t bytes, const char *what)
{
    return exchange_same(exchange, hash_bytes(HASH_START, data, bytes), what);
}

int ranks_same_start(const struct command *command)
{
    static const char *const own[] = {"device", "memory", "offload", "threads", "portable"};
    if (!exchange)
        return 0;
    TRY(exchange_same(exchange, hash_of_program(), "runs another build of ditmoe"));
    json_t *options = options_to_json(command);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        json_object_del(options, own[i]);
    char *text = json_dumps(options, JSON_SORT_KEYS | JSON_COMPACT);
    json_decref(options);
    if (!text)
        return fail(ERR_NOMEM, "out of memory");
    uint64_t h = hash_bytes(HASH_START, text, strlen(text));
    h = hash_bytes(h, command->name, strlen(command->name));
    free(text);
    return exchange_same(exchange, h, "was started with other options");
}

// Notes the blocks whose experts of this rank live in host memory. Blocks are streamed whole, and
// what a plan wants computed by the host's own CPU is streamed too: for that, the CPU is made a
// rank.
static int note_streamed(struct rank_plan *p, const char *name)
{
    const struct placement *q = &p->placement;
    const int places = q->groups * q->layers * q->experts;
    int at_host = 0, away = 0;
    for (int i = 0; i < places; i++) {
        away += q->home[i] != HOME_DEVICE;
        at_host += q->home[i] == HOME_HOST;
    }
    if (away == 0)
        return 0;
    if (at_host)
        say("note: %s: %d experts for the host's CPU are streamed to devices instead; for it to "
            "compute them, make it a rank (--device cuda:0,opencl:0) and plan with that\n",
            name, at_host);
    p->streamed = calloc((size_t)q->layers, sizeof *p->streamed);
    if (!p->streamed)
        return fail(ERR_NOMEM, "out of memory");
    for (int l = 0; l < q->layers; l++)
        p->streamed[l] = placement_streams(q, ranks_number(), l);
    return 0;
}

// Has an expert more than one home?
static bool has_copies(const struct placement *p)
{
    for (int l = 0; l < p->layers; l++)
        for (int e = 0; e < p->experts; e++)
            for (int g = 1; g < p->groups; g++)
                if (*placement_owner(p, g, l, e) != *placement_owner(p, 0, l, e))
                    return true;
    return false;
}

int ranks_plan(const struct rank_options *o, const struct config *c, const struct rank_work *w,
               struct rank_plan *out)
{
    const char *name = o->placement ? o->placement : "uniform";
    struct rank_place place;
    *out = (struct rank_plan){.predicted = NAN};
    if (!exchange && (!strcmp(name, "uniform") || !strcmp(name, "replicated")))
        return 0;
    const int code = ranks_place(exchange, connected, roads, o, c, w, &place);
    out->placement = place.placement;
    out->forecast = place.forecast;
    out->predicted = place.predicted;
    TRY(code);
    ranks_place_say(o, w, &place);
    TRY(note_streamed(out, name));
    if (exchange)
        out->ranks = (struct dit_ranks){exchange, &out->placement, w->copies, roads,
                                        has_copies(&out->placement) ? NULL : peers,
                                        (double)o->headroom};
    return 0;
}

int ranks_replan(const struct rank_plan *from, int batch, int copies, struct rank_plan *out)
{
    const struct placement *p = &from->placement;
    const size_t places = (size_t)p->groups * (size_t)p->layers * (size_t)p->experts;
    *out = (struct rank_plan){.predicted = NAN};
    if (from->streamed) {
        out->streamed = calloc((size_t)p->layers, sizeof *out->streamed);
        if (!out->streamed)
            return fail(ERR_NOMEM, "out of memory");
        memcpy(out->streamed, from->streamed, (size_t)p->layers * sizeof *out->streamed);
    }
    if (!from->ranks.exchange)
        return 0;
    TRY(placement_new(p->ranks, p->groups, p->layers, p->experts, &out->placement));
    struct placement *q = &out->placement;
    memcpy(q->share, p->share, (size_t)p->ranks * sizeof *p->share);
    memcpy(q->group, p->group, (size_t)p->ranks * sizeof *p->group);
    memcpy(q->owner, p->owner, places * sizeof *p->owner);
    memcpy(q->home, p->home, places * sizeof *p->home);
    q->batch = p->batch;
    placement_rescale(q, batch);
    out->ranks =
        (struct dit_ranks){exchange, q, copies, roads, from->ranks.peers, from->ranks.headroom};
    return 0;
}

// Peer windows where they are asked for, and by themselves between GPUs, whose waiting costs nobody
// anything; not for experts with copies nor with --headroom.
static int open_peers(const struct rank_options *o, struct device *dev)
{
    const bool suits = o->headroom <= 0 && !(o->placement && !strcmp(o->placement, "replicated"));
    char why[200] = "there are none for --headroom and --placement replicated";
    const bool asked = o->fabric == ROADS_PEER;
    bool other;
    TRY(exchange_any(exchange, dev->info.kind != DEVICE_GPU, &other));
    if (!asked && (o->fabric != ROADS_AUTO || other))
        return 0;
    if (suits)
        TRY(peers_open(exchange, dev, &peers, why, sizeof why));
    return peers || !asked ? 0 : fail(ERR_NODEVICE, "--fabric peer: %s", why);
}

int ranks_connect(const struct rank_options *o, struct device *dev, struct stream *stream)
{
    connected = dev;
    if (!exchange)
        return 0;
    TRY(open_peers(o, dev));
    if (peers)
        say("ranks   %d: each other's memory, between all\n", ranks_count());
    if (peers && (!o->placement || !strcmp(o->placement, "uniform")))
        return 0; // nothing else asks how fast other roads are
    TRY(roads_open(exchange, dev, stream, (enum road_choice)o->fabric, &roads));
    return peers ? 0 : ranks_say_roads(exchange, roads);
}

struct roads *ranks_roads(void)
{
    return roads;
}

void ranks_disconnect(const struct device *dev)
{
    if (dev != connected)
        return;
    roads_close(roads);
    roads = NULL;
    peers_close(peers);
    peers = NULL;
    connected = NULL;
}

void ranks_plan_free(struct rank_plan *p)
{
    placement_free(&p->placement);
    free(p->streamed);
    forecast_free(&p->forecast);
    *p = (struct rank_plan){0};
}

int ranks_share(const struct rank_plan *p, int batch)
{
    return p->ranks.exchange ? p->placement.share[ranks_number()] : batch;
}
