// Transfers between host and device, and fills.
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

enum { WORDS = 4096 };

static int test_transfers(void)
{
    struct device *dev = test_device(0);
    struct mem *a, *b;
    struct stream *s;
    static uint32_t host[WORDS], back[WORDS];
    CHECK(dev, "no device");
    OK(dev->api->alloc(dev, sizeof host, &a));
    OK(dev->api->alloc(dev, sizeof host, &b));
    OK(dev->api->stream_new(dev, &s));
    for (uint32_t i = 0; i < WORDS; i++)
        host[i] = i * 2654435761u;
    OK(dev->api->write(s, a, 0, host, sizeof host));
    OK(dev->api->fill(s, b, 0, sizeof host, 0xdeadbeef));
    OK(dev->api->copy(s, b, 40, a, 12, 400));
    OK(dev->api->write(s, b, 800, host, 4));
    OK(dev->api->fill(s, b, 1000, 8, 7));
    OK(dev->api->write(s, b, 0, host, 0));
    OK(dev->api->read(s, b, 0, back, sizeof back));
    for (uint32_t i = 0; i < WORDS; i++) {
        uint32_t want = i >= 10 && i < 110 ? host[i - 7] : i == 200 ? host[0] : 0xdeadbeef;
        want = i == 250 || i == 251 ? 7 : want;
        CHECK(back[i] == want, "word %u is %x, not %x", i, back[i], want);
    }
    OK(dev->api->read(s, b, 44, back, 4));
    CHECK(back[0] == host[4], "read at an offset");
    dev->api->stream_free(s);
    dev->api->free(b);
    dev->api->free(a);
    return PASSED;
}

static int test_large_fill(void) // by a kernel on CPU devices: any offset, nothing beyond the end
{
    enum { WORDS = (1 << 20) + 37, FIRST = 3, FILLED = WORDS - 10 };
    struct device *dev = test_device(0);
    struct stream *s;
    struct mem *m;
    if (!dev)
        return SKIPPED;
    uint32_t *host = malloc(sizeof *host * WORDS);
    CHECK(host, "memory");
    for (int i = 0; i < WORDS; i++)
        host[i] = (uint32_t)i;
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->alloc(dev, sizeof *host * WORDS, &m));
    OK(dev->api->write(s, m, 0, host, sizeof *host * WORDS));
    OK(dev->api->fill(s, m, FIRST * 4, FILLED * 4, 0xabcd1234));
    OK(dev->api->read(s, m, 0, host, sizeof *host * WORDS));
    for (int i = 0; i < WORDS; i++) {
        uint32_t expected = i >= FIRST && i < FIRST + FILLED ? 0xabcd1234 : (uint32_t)i;
        CHECK(host[i] == expected, "word %d is %x", i, host[i]);
    }
    free(host);
    dev->api->free(m);
    dev->api->stream_free(s);
    return PASSED;
}

// The host's memory belongs to the caller again when write() returns, however busy the device is
// and however the writes fill and leave what the backend keeps between.
static int test_writes(void)
{
    enum { CHUNKS = 60, LARGEST = 5 << 20, BUSY = 64 << 20 };
    struct device *dev = test_device(0);
    struct mem *busy, *out;
    struct stream *s;
    CHECK(dev, "no device");
    uint32_t *host = malloc(LARGEST), *back = malloc(LARGEST), seed = 12345;
    CHECK(host && back, "memory");
    OK(dev->api->stream_new(dev, &s));
    OK(dev->api->alloc(dev, BUSY, &busy));
    OK(dev->api->alloc(dev, (size_t)CHUNKS * LARGEST / 4, &out));
    const int fills = dev->info.kind == DEVICE_CPU ? 1 : 100;
    size_t at = 0, starts[CHUNKS + 1];
    for (int i = 0; i < CHUNKS; i++) {
        const bool large = i % 12 == 5;
        seed = seed * 1664525u + 1013904223u;
        const size_t words = large ? LARGEST / 4 - (size_t)i : 1 + (seed >> 8) % (LARGEST / 32);
        for (int k = 0; k < fills && i % 4 == 0; k++)
            OK(dev->api->fill(s, busy, 0, BUSY, 1));
        for (size_t k = 0; k < words; k++)
            host[k] = (uint32_t)((size_t)i * 2654435761u + k);
        OK(dev->api->write(s, out, at, host, 4 * words));
        memset(host, 0xee, 4 * words);
        starts[i] = at;
        at += 4 * words;
    }
    starts[CHUNKS] = at;
    for (int i = 0; i < CHUNKS; i++) {
        const size_t bytes = starts[i + 1] - starts[i];
        OK(dev->api->read(s, out, starts[i], back, bytes));
        for (size_t k = 0; k < bytes / 4; k++)
            CHECK(back[k] == (uint32_t)((size_t)i * 2654435761u + k), "chunk %d, word %zu is %x", i,
                  k, back[k]);
    }
    free(host), free(back);
    dev->api->free(busy);
    dev->api->free(out);
    dev->api->stream_free(s);
    return PASSED;
}

// Begun copies between two streams and locked memory: in order, beside what the first stream does
// next.
static int test_begun(void)
{
    enum { BYTES = 4 << 20 };
    struct device *dev = test_device(0);
    struct stream *work, *copies;
    struct event *after;
    struct mem *m;
    CHECK(dev, "no device");
    const struct backend *api = dev->api;
    uint32_t *host = aligned_alloc(4096, 2 * BYTES), *back = host + BYTES / 4;
    CHECK(host, "memory");
    const bool pinned = api->pin && api->pin(dev, host, 2 * BYTES) == 0;
    OK(api->alloc(dev, 2 * BYTES, &m));
    OK(api->stream_new(dev, &work));
    OK(api->stream_new(dev, &copies));
    OK(api->event_new(dev, &after));
    for (uint32_t i = 0; i < BYTES / 4; i++)
        host[i] = i * 2654435761u;
    OK(api->fill(work, m, 0, 2 * BYTES, 5));
    OK(api->write_begin(work, m, 8, host, BYTES));
    OK(api->record(work, after));
    OK(api->wait(copies, after));
    OK(api->read_begin(copies, m, 4, back, BYTES));
    OK(api->fill(work, m, BYTES + 8, 8, 7)); // behind what is read
    OK(api->sync(copies));
    CHECK(back[0] == 5, "the word before is %x", back[0]);
    for (uint32_t i = 1; i < BYTES / 4; i++)
        CHECK(back[i] == host[i - 1], "word %u is %x", i, back[i]);
    OK(api->sync(work));
    if (pinned)
        api->unpin(dev, host);
    api->event_free(after);
    api->stream_free(copies);
    api->stream_free(work);
    api->free(m);
    free(host);
    return PASSED;
}

const struct test transfers_tests[] = {
    {"mixed", test_transfers},
    {"large_fill", test_large_fill},
    {"writes", test_writes},
    {"begun", test_begun},
    {0},
};
