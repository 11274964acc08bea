#include "tools/offload.h"

#include <stdlib.h>
#include <string.h>

#include "tools/progress.h"

#define AT(member) offsetof(struct memory_options, member)
const struct option_spec memory_option_list[] = {
    {"memory", 0, OPTION_BYTES, "BYTES", "0",
     "device memory to use at most, such as 8GiB; 0: what the device has", AT(memory), 0, 0, NULL},
    {"offload", 0, OPTION_STRING, "N", "auto",
     "of how many blocks the experts live in the host's memory, copied to the device when they are "
     "used; auto: of as few as the device's memory allows",
     AT(offload), 0, 0, NULL},
    {0},
};
#undef AT

int offload_choose(const struct memory_options *o, const struct device *dev,
                   const struct rank_plan *ranks, struct offload *out)
{
    char *end;
    *out = (struct offload){.which = ranks ? ranks->streamed : NULL};
    if (!o->offload || out->which)
        return 0;
    if (!strcmp(o->offload, "auto")) {
        // what shares the host's memory anyway gains nothing by it
        out->blocks = dev->info.unified && !o->memory ? 0 : OFFLOAD_AUTO;
        return 0;
    }
    const long blocks = strtol(o->offload, &end, 10);
    if (end == o->offload || *end || blocks < 0 || blocks > 100000)
        return fail(ERR_INPUT, "--offload %s: neither auto nor a number of blocks", o->offload);
    out->blocks = (int)blocks;
    return 0;
}

int offload_say_waited(struct dit *d, double mean)
{
    double waited;
    TRY(streamed_waited(d, &waited));
    if (d->streamed)
        say("offload waited %.1f ms for copies in the last %s; a %s took %.1f ms\n", 1e3 * waited,
            d->options.train ? "step" : "pass", d->options.train ? "step" : "pass", 1e3 * mean);
    return 0;
}

void offload_say(const struct dit *d)
{
    const struct streamed_figures f = streamed_figures(d);
    char host[32], in[32], out[32], back[64] = "";
    if (f.blocks == 0)
        return;
    format_bytes((double)f.host, host);
    format_bytes((double)f.in, in);
    if (f.out)
        snprintf(back, sizeof back, " and %s back", format_bytes((double)f.out, out));
    say("offload %d experts, of %d of %d blocks, in %s of host memory%s; %s%s a %s\n", f.experts,
        f.blocks, f.of, host, f.locked ? "" : " (not page-locked: slow)", in, back,
        d->options.train ? "step" : "pass");
}
