// The CUDA backend: transfers from the host that do not wait for the device.
//
// Bytes go to page-locked memory first, from which the driver copies in the stream's order; the
// caller's memory is free at once. A ring of blocks: a block is used again when the event recorded
// behind its last copy has passed.
#include "devices/cuda.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCKS = 4, BLOCK_BYTES = CUDA_STAGED_MAX, ALIGN = 64 };

struct cuda_staging {
    char *memory; // BLOCKS * BLOCK_BYTES; NULL: there is none to be had
    cuda_event passed[BLOCKS];
    bool recorded[BLOCKS];
    int block;   // being filled
    size_t used; // of it, bytes
};

static struct cuda_staging *staging_new(const struct cuda_api *api)
{
    struct cuda_staging *staging = calloc(1, sizeof *staging);
    void *memory = NULL;
    bool good = staging != NULL;
    for (int i = 0; i < BLOCKS && good; i++)
        good = api->event_create(&staging->passed[i], CUDA_EVENT_NO_TIMING) == CUDA_OK;
    if (good && api->host_alloc(&memory, (size_t)BLOCKS * BLOCK_BYTES, 0) == CUDA_OK)
        staging->memory = memory;
    return staging;
}

void cuda_staging_free(struct stream *s)
{
    const struct cuda_api *api = s->dev->api;
    struct cuda_staging *staging = s->staging;
    if (!staging)
        return;
    for (int i = 0; i < BLOCKS; i++)
        if (staging->passed[i])
            api->event_destroy(staging->passed[i]);
    if (staging->memory)
        api->host_free(staging->memory);
    free(staging);
    s->staging = NULL;
}

// Room for `bytes`, after what is already in the block or in the next block.
static int make_room(struct stream *s, size_t bytes)
{
    struct cuda_staging *staging = s->staging;
    if (staging->used + bytes <= BLOCK_BYTES)
        return 0;
    staging->block = (staging->block + 1) % BLOCKS;
    staging->used = 0;
    if (staging->recorded[staging->block])
        CU(s->dev->api, s->dev->api->event_sync(staging->passed[staging->block]),
           "cuEventSynchronize");
    return 0;
}

int cuda_write_staged(struct stream *s, cuda_address to, const void *from, size_t bytes)
{
    const struct cuda_api *api = s->dev->api;
    if (bytes > BLOCK_BYTES)
        return CUDA_NOT_STAGED;
    if (!s->staging)
        s->staging = staging_new(api);
    struct cuda_staging *staging = s->staging;
    if (!staging || !staging->memory)
        return CUDA_NOT_STAGED;
    TRY(make_room(s, bytes));
    char *place = staging->memory + (size_t)staging->block * BLOCK_BYTES + staging->used;
    memcpy(place, from, bytes);
    CU(api, api->write(to, place, bytes, s->cu), "cuMemcpyHtoDAsync");
    CU(api, api->event_record(staging->passed[staging->block], s->cu), "cuEventRecord");
    staging->recorded[staging->block] = true;
    staging->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return 0;
}
