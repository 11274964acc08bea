#include "model/weights_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/deepspeed.h"
#include "model/sharded.h"
#include "model/torch_file.h"

static bool ends_in(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

int weights_file_open_single(const char *path, struct safetensors **out)
{
    return torch_file_is(path) ? torch_file_open(path, out) : safetensors_open(path, out);
}

// Opens the first of the usual names that is there.
static int open_in_directory(const char *path, struct safetensors **out)
{
    static const char *const names[] = {
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_model.bin",
        "diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.bin"};
    char full[4096];
    struct stat s;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (snprintf(full, sizeof full, "%s/%s", path, names[i]) >= (int)sizeof full)
            return fail(ERR_INPUT, "%s: name too long", path);
        if (!stat(full, &s))
            return weights_file_open(full, out);
    }
    return fail(ERR_IO,
                "%s: no weights in it: neither a run's (step-*.safetensors) nor DeepSpeed's, nor a file or "
                "index of the usual name (model.safetensors, pytorch_model.bin)",
                path);
}

int weights_file_open(const char *path, struct safetensors **out)
{
    struct stat s;
    *out = NULL;
    if (stat(path, &s))
        return fail(ERR_IO, "%s: cannot be opened: %s", path, strerror(errno));
    if (S_ISDIR(s.st_mode))
        return deepspeed_is(path) ? deepspeed_open(path, out) : open_in_directory(path, out);
    return ends_in(path, ".json") ? sharded_open(path, out) : weights_file_open_single(path, out);
}
