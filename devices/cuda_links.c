// The CUDA backend: how its devices are connected, and what NVIDIA's management library (NVML,
// where it is installed) says of driver and NVLink.
#include "devices/cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

// ---- NVML ---------------------------------------------------------------------------------------

// NVML's functions return 0 for success. Its own header comes with the driver's tools, not with the
// toolkit; these declarations have been the same since CUDA 8.
typedef struct nvmlDevice_st *nvml_device;

static struct {
    unsigned (*init)(void);
    unsigned (*driver)(char *version, unsigned length);
    unsigned (*device)(const char *pci, nvml_device *device);
    unsigned (*link_state)(nvml_device device, unsigned link, unsigned *active);
} nvml;
static bool nvml_good;

static void open_nvml(void)
{
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    nvml_good = library && cuda_symbol(library, "nvmlInit_v2", &nvml.init) &&
                cuda_symbol(library, "nvmlSystemGetDriverVersion", &nvml.driver) &&
                cuda_symbol(library, "nvmlDeviceGetHandleByPciBusId_v2", &nvml.device) &&
                cuda_symbol(library, "nvmlDeviceGetNvLinkState", &nvml.link_state) && nvml.init() == 0;
}

static bool have_nvml(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_nvml);
    return nvml_good;
}

void cuda_driver_name(char *out, size_t size)
{
    char version[80] = "";
    if (have_nvml() && nvml.driver(version, sizeof version) == 0)
        snprintf(out, size, "%s", version);
    else
        out[0] = 0;
}

int cuda_nvlinks(const char *pci)
{
    enum { LINKS_MAX = 18 };
    nvml_device device;
    int count = 0;
    if (!have_nvml() || !pci[0] || nvml.device(pci, &device) != 0)
        return 0;
    for (unsigned link = 0; link < LINKS_MAX; link++) {
        unsigned active = 0;
        if (nvml.link_state(device, link, &active) == 0 && active)
            count++;
    }
    return count;
}

// ---- from device to device ----------------------------------------------------------------------

static int attribute(const struct cuda_api *api, unsigned which, cuda_device_id from,
                     cuda_device_id to)
{
    int value = 0;
    return api->p2p_attribute && api->p2p_attribute(&value, which, from, to) == CUDA_OK ? value : 0;
}

int cuda_link(const struct device_info *from, const struct device_info *to, struct device_link *out)
{
    const char *why;
    const struct cuda_api *api = cuda_driver(&why);
    cuda_device_id a, b;
    int reaches = 0;
    *out = (struct device_link){0};
    if (!api)
        return fail(ERR_NODEVICE, "no CUDA device: %s", why);
    CU(api, api->device_get(&a, from->index), "cuDeviceGet");
    CU(api, api->device_get(&b, to->index), "cuDeviceGet");
    if (api->can_access_peer)
        CU(api, api->can_access_peer(&reaches, a, b), "cuDeviceCanAccessPeer");
    out->peer = reaches != 0;
    if (!out->peer)
        return 0;
    out->rank = attribute(api, CUDA_P2P_RANK, a, b);
    out->atomics = attribute(api, CUDA_P2P_ATOMICS, a, b) != 0;
    // devices that reach each other over PCIe alone have no atomics between them
    out->nvlink = out->atomics && from->nvlinks > 0 && to->nvlinks > 0;
    return 0;
}
