#include "runtime/recording.h"

#include <stdlib.h>
#include <string.h>

// DITMOE_GRAPHS=0: every run step by step, to look for errors.
static bool wanted(const struct context *c)
{
    const char *asked = getenv("DITMOE_GRAPHS");
    return c->dev->api->capture && !c->profile && !(asked && !strcmp(asked, "0"));
}

static int record(struct context *c, struct recording *r, int (*work)(void *), void *user)
{
    const struct backend *api = c->dev->api;
    struct graph *graph;
    TRY(api->capture(c->stream));
    int code = work(user);
    int ended = api->capture_end(c->stream, &graph); // also after a failure: the stream must go on
    if (code < 0 && graph)
        api->graph_free(graph);
    TRY(code);
    TRY(ended);
    r->graph = graph;
    return 0;
}

int recording_run(struct context *c, struct recording *r, int (*work)(void *user), void *user)
{
    if (!wanted(c) || !r->warm) {
        r->warm = true;
        return work(user);
    }
    if (!r->graph)
        TRY(record(c, r, work, user));
    return c->dev->api->replay(c->stream, r->graph);
}

void recording_reset(struct context *c, struct recording *r)
{
    if (r->graph)
        c->dev->api->graph_free(r->graph);
    *r = (struct recording){0};
}
