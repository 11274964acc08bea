#include "devices/cuda_tuned.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FUNCTIONS_MAX = 512 };

#define DECLARE(name)                               \
    extern const unsigned char cuda_image_##name[]; \
    extern const size_t cuda_image_##name##_size;
CUDA_IMAGES(DECLARE)
#undef DECLARE

struct cuda_tuned {
    cuda_module modules[IMAGE_COUNT];
    bool looked[IMAGE_COUNT];
    struct {
        const char *name;
        cuda_function function; // NULL: not there
    } functions[FUNCTIONS_MAX];
    int count;
};

static const void *image_bytes(enum cuda_image image)
{
    switch (image) {
#define CASE(name)     \
    case IMAGE_##name: \
        return cuda_image_##name##_size ? cuda_image_##name : NULL;
        CUDA_IMAGES(CASE)
#undef CASE
    case IMAGE_COUNT:
        break;
    }
    return NULL;
}

static bool has_code_for(const char *image, int capability)
{
    const char *only = strstr(image, "_sm"); // code of one architecture, without PTX for later ones
    return !only || atoi(only + 3) == capability;
}

void cuda_tuned_text(int capability, char *out, size_t size)
{
    static const char *const names[] = {
#define NAME(name) #name,
        CUDA_IMAGES(NAME)
#undef NAME
    };
    size_t length = 0;
    out[0] = 0;
    for (int i = 0; i < IMAGE_COUNT; i++)
        if (image_bytes((enum cuda_image)i) && has_code_for(names[i], capability) && length < size)
            length +=
                (size_t)snprintf(out + length, size - length, "%s%s", length ? ", " : "", names[i]);
}

static cuda_module module(struct cuda_device *dev, enum cuda_image image)
{
    struct cuda_tuned *tuned = dev->tuned;
    const void *bytes = image_bytes(image);
    if (!tuned->looked[image] && bytes &&
        dev->api->module_load(&tuned->modules[image], bytes) != CUDA_OK)
        tuned->modules[image] = NULL; // no code for this device in it
    tuned->looked[image] = true;
    return tuned->modules[image];
}

static cuda_function find(struct cuda_device *dev, enum cuda_image image, const char *name,
                          unsigned shared)
{
    cuda_function function = NULL;
    cuda_module from = module(dev, image);
    if (!from || dev->api->module_function(&function, from, name) != CUDA_OK)
        return NULL;
    if (shared > 0 &&
        dev->api->function_attribute(function, CUDA_FUNCTION_MAX_SHARED, (int)shared) != CUDA_OK)
        return NULL;
    return function;
}

cuda_function cuda_tuned(struct cuda_device *dev, enum cuda_image image, const char *name,
                         unsigned shared)
{
    if (dev->base.flags & OPEN_PORTABLE)
        return NULL;
    if (!dev->tuned)
        dev->tuned = calloc(1, sizeof *dev->tuned);
    struct cuda_tuned *tuned = dev->tuned;
    if (!tuned)
        return NULL;
    for (int i = 0; i < tuned->count; i++)
        if (tuned->functions[i].name == name)
            return tuned->functions[i].function;
    BUG_IF(tuned->count == FUNCTIONS_MAX);
    cuda_function function = find(dev, image, name, shared);
    tuned->functions[tuned->count].name = name;
    tuned->functions[tuned->count++].function = function;
    return function;
}

int cuda_tuned_launch(struct stream *s, cuda_function function, const unsigned grid[3],
                      unsigned threads, unsigned shared, void **arguments)
{
    const struct cuda_api *api = s->dev->api;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0)
        return 0;
    TRY(enter(s->dev));
    CU(api,
       api->launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, s->cu, arguments,
                   NULL),
       "cuLaunchKernel");
    return 0;
}

int cuda_tuned_map(const struct cuda_device *dev, struct cuda_map *map, cuda_address address,
                   int rank, const int *sizes, const int64_t *pitches, const int *box,
                   bool swizzled)
{
    enum { RANK_MAX = 5 };
    uint64_t size[RANK_MAX], bytes[RANK_MAX];
    uint32_t boxes[RANK_MAX], steps[RANK_MAX];
    const unsigned swizzle = box[0] == 64 ? CUDA_MAP_SWIZZLE_128 : CUDA_MAP_SWIZZLE_64;
    BUG_IF(rank > RANK_MAX || (swizzled && box[0] != 64 && box[0] != 32));
    for (int i = 0; i < rank; i++) {
        size[i] = (uint64_t)sizes[i];
        boxes[i] = (uint32_t)box[i];
        steps[i] = 1;
        if (i + 1 < rank)
            bytes[i] = 2 * (uint64_t)pitches[i];
    }
    CU(dev->api,
       dev->api->tensor_map((cuda_tensor_map *)(void *)map, CUDA_MAP_BF16, (unsigned)rank,
                            (void *)(uintptr_t)address, size, bytes, boxes, steps, 0,
                            swizzled ? swizzle : CUDA_MAP_SWIZZLE_NONE, CUDA_MAP_PROMOTE_256, 0),
       "cuTensorMapEncodeTiled");
    return 0;
}

bool cuda_tuned_pixel_map(const struct cuda_device *dev, struct cuda_map *map, cuda_address address,
                          const int sizes[4], const int before[2], const int after[2], int stride,
                          int count)
{
    enum { CHANNELS = 64, STRIDE_MAX = 8, CORNER_MAX = 127 };
    uint64_t size[4], bytes[3], pitch = 2;
    const int lower[2] = {-before[0], -before[1]};
    const uint32_t steps[4] = {1, (uint32_t)stride, (uint32_t)stride, 1};
    for (int i = 0; i < 2; i++)
        if (abs(before[i]) > CORNER_MAX || abs(after[i]) > CORNER_MAX)
            return false;
    for (int i = 0; i < 4; i++) {
        size[i] = (uint64_t)sizes[i];
        pitch *= size[i];
        if (i < 3)
            bytes[i] = pitch;
    }
    return stride <= STRIDE_MAX &&
           dev->api->pixel_map((cuda_tensor_map *)(void *)map, CUDA_MAP_BF16, 4,
                               (void *)(uintptr_t)address, size, bytes, lower, after, CHANNELS,
                               (uint32_t)count, steps, 0, CUDA_MAP_SWIZZLE_128,
                               CUDA_MAP_PROMOTE_256, 0) == CUDA_OK;
}

void cuda_tuned_close(struct cuda_device *dev)
{
    if (!dev->tuned)
        return;
    for (int i = 0; i < IMAGE_COUNT; i++)
        if (dev->tuned->modules[i])
            dev->api->module_unload(dev->tuned->modules[i]);
    free(dev->tuned);
    dev->tuned = NULL;
}
