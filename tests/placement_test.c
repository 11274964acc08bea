// Placements: making, checking, JSON both ways, and files that mean harm.
#include "runtime/placement.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

static int uniform(void)
{
    static const struct {
        int ranks, layers, experts, batch;
    } cases[] = {{1, 2, 8, 7}, {3, 5, 8, 64}, {4, 4, 8, 2}, {16, 3, 8, 128}, {5, 4, 3, 11}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct placement p;
        int most = 0, least = 1 << 20;
        OK(placement_uniform(cases[i].ranks, cases[i].layers, cases[i].experts, NULL,
                             cases[i].batch, &p));
        OK(placement_check(&p));
        for (int r = 0; r < p.ranks; r++) {
            int held = 0;
            for (int l = 0; l < p.layers; l++)
                held += placement_list(&p, r, l, NULL);
            most = held > most ? held : most;
            least = held < least ? held : least;
        }
        CHECK(most - least <= p.layers, "case %zu: from %d to %d experts a rank", i, least, most);
        CHECK(p.share[0] - p.share[p.ranks - 1] <= 1, "case %zu: shares differ", i);
        placement_free(&p);
    }
    return PASSED;
}

static int layers_without(void)
{
    const bool moe[] = {false, true, false, true};
    struct placement p;
    OK(placement_uniform(2, 4, 4, moe, 8, &p));
    OK(placement_matches(&p, 2, 4, 4, moe));
    CHECK(placement_list(&p, 0, 0, NULL) == 0, "layer 0 has no experts");
    CHECK(placement_list(&p, 1, 1, NULL) == 2, "rank 1 has two experts of layer 1");
    CHECK(placement_matches(&p, 2, 4, 4, NULL) == ERR_INPUT, "a model of experts everywhere");
    CHECK(placement_matches(&p, 3, 4, 4, moe) == ERR_INPUT, "three ranks");
    CHECK(strstr(error_message(), "2 ranks; this run has 3"), "%s", error_message());
    placement_free(&p);
    return PASSED;
}

static int rescale(void)
{
    struct placement p;
    OK(placement_uniform(3, 1, 2, NULL, 10, &p));
    p.share[0] = 7, p.share[1] = 3, p.share[2] = 0;
    for (int batch = 1; batch < 40; batch++) {
        int sum = 0;
        struct placement q;
        OK(placement_uniform(3, 1, 2, NULL, 10, &q));
        memcpy(q.share, p.share, 3 * sizeof *q.share);
        placement_rescale(&q, batch);
        for (int r = 0; r < 3; r++) {
            sum += q.share[r];
            CHECK(abs(10 * q.share[r] - batch * p.share[r]) < 10, "batch %d, rank %d", batch, r);
        }
        CHECK(sum == batch, "batch %d: %d images", batch, sum);
        placement_free(&q);
    }
    placement_free(&p);
    return PASSED;
}

// As many experts in host memory or a few more, in whole layers of a rank, evenly spread.
static int whole_layers(void)
{
    enum { RANKS = 2, LAYERS = 7, EXPERTS = 4 };
    struct placement p;
    for (int wanted = 0; wanted <= LAYERS * EXPERTS / RANKS; wanted++) {
        int left = wanted, streamed = 0, last = -1;
        OK(placement_uniform(RANKS, LAYERS, EXPERTS, NULL, 4, &p));
        for (int e = 0; e < EXPERTS; e++) // one of each layer in turn, of rank 1
            for (int l = 0; l < LAYERS; l++)
                if (*placement_owner(&p, 0, l, e) == 1 && left > 0) {
                    *placement_home(&p, 0, l, e) = HOME_STREAMED;
                    left--;
                }
        placement_stream_whole(&p);
        OK(placement_check(&p));
        for (int l = 0; l < LAYERS; l++) {
            int here = 0;
            enum expert_home home;
            for (int e = 0; e < EXPERTS; e++)
                here += placement_holds(&p, 1, l, e, &home) && home == HOME_STREAMED;
            CHECK(here == 0 || here == placement_list(&p, 1, l, NULL), "%d: layer %d in parts",
                  wanted, l);
            CHECK(!placement_streams(&p, 0, l), "%d: rank 0 streams", wanted);
            CHECK(placement_streams(&p, 1, l) == (here > 0), "%d: layer %d", wanted, l);
            streamed += here;
            last = here ? l : last;
        }
        CHECK(streamed >= wanted && streamed < wanted + EXPERTS / RANKS, "%d for %d", streamed,
              wanted);
        CHECK(wanted == 0 || last == LAYERS - 1, "%d: the last is layer %d", wanted, last);
        placement_free(&p);
    }
    return PASSED;
}

static int there_and_back(void)
{
    struct placement p, q;
    OK(placement_new(4, 2, 3, 4, &p));
    p.batch = 9;
    for (int r = 0; r < 4; r++) {
        p.share[r] = (int[]){5, 0, 3, 1}[r];
        p.group[r] = r / 2;
    }
    for (int g = 0; g < 2; g++)
        for (int l = 0; l < 3; l += 2)
            for (int e = 0; e < 4; e++) {
                *placement_owner(&p, g, l, e) = 2 * g + e % 2;
                *placement_home(&p, g, l, e) = (uint8_t)((l + e) % HOMES);
            }
    OK(placement_check(&p));
    json_t *json = placement_to_json(&p);
    OK(placement_from_json(json, &q));
    json_decref(json);
    CHECK(q.ranks == 4 && q.groups == 2 && q.layers == 3 && q.experts == 4 && q.batch == 9,
          "sizes");
    CHECK(!memcmp(p.share, q.share, sizeof(int[4])) && !memcmp(p.group, q.group, sizeof(int[4])),
          "ranks");
    CHECK(!memcmp(p.owner, q.owner, sizeof(int[24])) && !memcmp(p.home, q.home, 24), "experts");
    enum expert_home home = HOMES;
    CHECK(placement_holds(&q, 3, 2, 3, &home) && home == HOME_HOST, "home of a copy");
    CHECK(!placement_holds(&q, 2, 2, 3, NULL), "no copy");
    placement_free(&p);
    placement_free(&q);
    return PASSED;
}

// ---- files that mean harm -----------------------------------------------------------------------

#define HEAD "{\"ditmoe_placement\":1,\"ranks\":2,\"layers\":2,\"experts\":2,\"batch\":4,"
static const struct {
    const char *text, *message; // a part of the line
} bad[] = {
    {"", "not JSON"},
    {"{", "not JSON"},
    {"[]", "not a placement"},
    {"{\"ditmoe_placement\":2}", "\"ditmoe_placement\" is 2"},
    {"{\"ditmoe_placement\":1,\"ranks\":1e9}", "\"ranks\" is not there or not a whole number"},
    {"{\"ditmoe_placement\":1,\"ranks\":1000000000}", "\"ranks\" is 1000000000"},
    {"{\"ditmoe_placement\":1,\"ranks\":-1}", "\"ranks\" is -1"},
    {"{\"ditmoe_placement\":1,\"ranks\":1000000,\"layers\":1000000,\"experts\":1000000,"
     "\"shares\":[1],\"groups\":[{}]}",
     "not an array of 1000000"},
    {"{\"ditmoe_placement\":1,\"ranks\":1,\"layers\":1000000,\"experts\":1000000,"
     "\"shares\":[1],\"groups\":[{\"owner\":[[0]]}]}",
     "only 1 owners"},
    {HEAD "\"shares\":[2,2]}", "\"groups\""},
    {HEAD "\"shares\":[2,2],\"groups\":[]}", "\"groups\""},
    {HEAD "\"shares\":[2,\"2\"],\"groups\":[{\"owner\":[[0,1]]}]}", "number 1 of \"shares\""},
    {HEAD "\"shares\":[5,-1],\"groups\":[{\"owner\":[[0,1]]}]}", "share of -1"},
    {HEAD "\"shares\":[2,3],\"groups\":[{\"owner\":[[0,1]]}]}", "make 5 images"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,2]]}]}", "on rank 2"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,-1]]}]}", "no owner"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,1],[0,1],[0,1]]}]}", "3 rows"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,1,1]]}]}", "array of 2"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,1]],\"home\":[\"dx\"]}]}", "letter 'x'"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"owner\":[[0,1]],\"home\":[\"d\"]}]}", "2 letters"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"ranks\":[0],\"owner\":[[0,1]]}]}", "rank 1 is in no"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"ranks\":[0,0],\"owner\":[[0,1]]}]}", "in two groups"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"ranks\":[0,7],\"owner\":[[0,1]]}]}", "ranks 0 to 1"},
    {HEAD "\"shares\":[2,2],\"groups\":[{\"ranks\":[0],\"owner\":[[0,1]],\"home\":[\"ss\"]},"
          "{\"ranks\":[1],\"owner\":[[0,1]],\"home\":[\"dd\"]}]}",
     "two homes on rank 0"},
};

static int hostile(void)
{
    char path[256];
    struct placement p;
    snprintf(path, sizeof path, "%s/placement.json", test_directory());
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        FILE *file = fopen(path, "w");
        CHECK(file && fputs(bad[i].text, file) >= 0 && fclose(file) == 0, "%s", path);
        CHECK(placement_read(path, &p) == ERR_INPUT, "file %zu was taken: %s", i, bad[i].text);
        CHECK(strstr(error_message(), bad[i].message) && strstr(error_message(), path),
              "file %zu: %s", i, error_message());
        CHECK(!p.owner && !p.share, "file %zu leaves memory", i);
    }
    CHECK(placement_read(test_directory(), &p) < 0, "a directory");
    CHECK(placement_read("/nowhere/placement.json", &p) == ERR_IO, "no file");
    return PASSED;
}

// One row stands for all layers, ranks of the only group and homes go without saying.
static int short_form(void)
{
    struct placement p;
    json_t *json = json_loads(HEAD "\"shares\":[4,0],\"groups\":[{\"owner\":[[1,0]]}]}", 0, NULL);
    OK(placement_from_json(json, &p));
    json_decref(json);
    CHECK(*placement_owner(&p, 0, 1, 0) == 1 && *placement_home(&p, 0, 1, 0) == HOME_DEVICE, "row");
    placement_free(&p);
    return PASSED;
}

const struct test placement_tests[] = {
    {"uniform", uniform},
    {"layers_without", layers_without},
    {"rescale", rescale},
    {"there_and_back", there_and_back},
    {"short_form", short_form},
    {"hostile", hostile},
    {"whole_layers", whole_layers},
    {0},
};
