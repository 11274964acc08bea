#include "runtime/roads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAUSES = 2048 }; // timed joins between two calls of roads_waited(); later ones are not timed

// A lane: its stream, and when it may start and is done.
struct lane {
    struct group *group;
    struct stream *stream;
    struct event *start, *done;
    struct event *before[PAUSES], *after[PAUSES]; // around joins, on the device's stream
    int pauses;
};

struct roads {
    struct device *dev;
    struct stream *stream;
    int ranks, members;
    int *member; // [ranks] number in the group, or -1
    struct lane lanes[LANES];
};

// What a rank tells of itself, so that all decide alike.
struct offer {
    int32_t can;
    char device[96]; // host and PCI place: one device cannot be two members
    char why[160];   // it cannot
};

// ---- who is in the group ------------------------------------------------------------------------

static struct offer make_offer(const struct device *dev)
{
    struct offer o = {0};
    char host[64] = "";
    gethostname(host, sizeof host - 1);
    snprintf(o.device, sizeof o.device, "%.60s %s %s", host, dev->info.backend->name,
             dev->info.pci);
    if (!dev->api->group_can)
        snprintf(o.why, sizeof o.why, "%s passes through the host", dev->info.key);
    else if (dev->api->group_can() < 0)
        snprintf(o.why, sizeof o.why, "%.150s", error_message());
    else
        o.can = 1;
    return o;
}

static void refuse_doubles(struct offer *all, int ranks)
{
    for (int a = 0; a < ranks; a++)
        for (int b = 0; b < a; b++)
            if (all[a].can && all[b].can && !strcmp(all[a].device, all[b].device)) {
                all[a].can = 0;
                snprintf(all[a].why, sizeof all[a].why, "it shares its device with rank %d", b);
            }
}

static int choose(struct roads *r, const struct offer *all, enum road_choice choice)
{
    r->members = 0;
    for (int i = 0; i < r->ranks; i++) {
        if (!all[i].can && choice == ROADS_STRAIGHT)
            return fail(ERR_NODEVICE, "--fabric nccl: not rank %d: %s", i, all[i].why);
        r->member[i] = all[i].can ? r->members++ : -1;
    }
    return 0;
}

// ---- start and end ------------------------------------------------------------------------------

static int open_lane(struct roads *r, struct exchange *x, struct lane *lane)
{
    const struct backend *api = r->dev->api;
    const int rank = exchange_rank(x);
    unsigned char id[GROUP_ID] = {0};
    int first = 0, code = 0;
    while (r->member[first] != 0)
        first++;
    if (rank == first)
        code = api->group_id(r->dev, id);
    bool failed;
    TRY(exchange_any(x, code < 0, &failed));
    if (failed)
        return code < 0 ? code
                        : fail(ERR_LOST, "rank %d could not start a group of devices", first);
    TRY(exchange_broadcast(x, id, sizeof id, first));
    if (r->member[rank] < 0)
        return 0;
    TRY(api->stream_new(r->dev, &lane->stream));
    TRY(api->event_new(r->dev, &lane->start));
    TRY(api->event_new(r->dev, &lane->done));
    for (int i = 0; i < PAUSES; i++) {
        TRY(api->event_new(r->dev, &lane->before[i]));
        TRY(api->event_new(r->dev, &lane->after[i]));
    }
    return api->group_open(r->dev, id, r->member[rank], r->members, &lane->group);
}

static int open_roads(struct roads *r, struct exchange *x, enum road_choice choice)
{
    struct offer mine = make_offer(r->dev), *all = calloc((size_t)r->ranks, sizeof *all);
    r->member = calloc((size_t)r->ranks, sizeof *r->member);
    int code = !all || !r->member ? fail(ERR_NOMEM, "no host memory for %d ranks", r->ranks) : 0;
    if (code == 0)
        code = exchange_gather(x, &mine, all, sizeof mine);
    if (code == 0) {
        refuse_doubles(all, r->ranks);
        code = choose(r, all, choice);
    }
    free(all);
    TRY(code);
    for (int i = 0; i < LANES && r->members > 1; i++)
        TRY(open_lane(r, x, &r->lanes[i]));
    return 0;
}

int roads_open(struct exchange *x, struct device *dev, struct stream *stream,
               enum road_choice choice, struct roads **out)
{
    *out = NULL;
    if (!x || choice == ROADS_HOST)
        return 0;
    struct roads *r = calloc(1, sizeof *r);
    if (!r)
        return fail(ERR_NOMEM, "no host memory for roads");
    *r = (struct roads){.dev = dev, .stream = stream, .ranks = exchange_ranks(x)};
    int code = open_roads(r, x, choice);
    if (code < 0 || r->members < 2 || r->member[exchange_rank(x)] < 0) {
        roads_close(r);
        return code;
    }
    *out = r;
    return 0;
}

void roads_close(struct roads *r)
{
    if (!r)
        return;
    const struct backend *api = r->dev->api;
    for (int i = 0; i < LANES; i++) {
        struct lane *lane = &r->lanes[i];
        if (!lane->stream)
            continue;
        if (lane->group)
            api->group_close(lane->group);
        for (int k = 0; k < PAUSES; k++)
            api->event_free(lane->before[k]), api->event_free(lane->after[k]);
        api->event_free(lane->start), api->event_free(lane->done);
        api->stream_free(lane->stream);
    }
    free(r->member);
    free(r);
}

bool roads_straight(const struct roads *r, int rank)
{
    return r && r->member[rank] >= 0;
}

bool roads_all(const struct roads *r)
{
    return r && r->members == r->ranks;
}

int roads_members(const struct roads *r)
{
    return r ? r->members : 0;
}

// ---- transfers ----------------------------------------------------------------------------------

int roads_begin(struct roads *r, enum road_lane lane)
{
    struct lane *l = &r->lanes[lane];
    TRY(r->dev->api->record(r->stream, l->start));
    TRY(r->dev->api->wait(l->stream, l->start));
    return r->dev->api->group_begin(l->group);
}

int roads_send(struct roads *r, enum road_lane lane, const struct mem *src, size_t offset,
               size_t bytes, int rank)
{
    struct lane *l = &r->lanes[lane];
    return r->dev->api->group_send(l->group, l->stream, src, offset, bytes, r->member[rank]);
}

int roads_receive(struct roads *r, enum road_lane lane, struct mem *dst, size_t offset,
                  size_t bytes, int rank)
{
    struct lane *l = &r->lanes[lane];
    return r->dev->api->group_receive(l->group, l->stream, dst, offset, bytes, r->member[rank]);
}

int roads_sum(struct roads *r, enum road_lane lane, struct mem *at, size_t offset, size_t count)
{
    struct lane *l = &r->lanes[lane];
    return r->dev->api->group_sum(l->group, l->stream, at, offset, count);
}

int roads_end(struct roads *r, enum road_lane lane)
{
    struct lane *l = &r->lanes[lane];
    TRY(r->dev->api->group_end(l->group));
    return r->dev->api->record(l->stream, l->done);
}

int roads_join(struct roads *r, enum road_lane lane)
{
    if (!r)
        return 0;
    struct lane *l = &r->lanes[lane];
    const bool timed = l->pauses < PAUSES;
    if (timed)
        TRY(r->dev->api->record(r->stream, l->before[l->pauses]));
    TRY(r->dev->api->wait(r->stream, l->done));
    return timed ? r->dev->api->record(r->stream, l->after[l->pauses++]) : 0;
}

int roads_waited(struct roads *r, enum road_lane lane, double *seconds)
{
    *seconds = 0;
    if (!r)
        return 0;
    struct lane *l = &r->lanes[lane];
    TRY(r->dev->api->sync(r->stream));
    for (int i = 0; i < l->pauses; i++) {
        double pause;
        TRY(r->dev->api->elapsed(l->before[i], l->after[i], &pause));
        *seconds += pause;
    }
    l->pauses = 0;
    return 0;
}
