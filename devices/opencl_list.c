// The OpenCL backend: which devices there are, what they say of themselves, and the names of
// errors.
#include "devices/opencl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <CL/cl_ext.h>
#include <hwloc.h>
#include <hwloc/opencl.h>

enum { PLATFORMS_MAX = 16, ICD_FOUND_NO_PLATFORM = -1001 };

// ---- errors ------------------------------------------------------------------------------------

const char *opencl_error_name(cl_int code)
{
    static const struct {
        cl_int code;
        const char *name;
    } names[] = {
#define NAME(code) {code, #code}
        NAME(CL_DEVICE_NOT_FOUND),
        NAME(CL_DEVICE_NOT_AVAILABLE),
        NAME(CL_COMPILER_NOT_AVAILABLE),
        NAME(CL_MEM_OBJECT_ALLOCATION_FAILURE),
        NAME(CL_OUT_OF_RESOURCES),
        NAME(CL_OUT_OF_HOST_MEMORY),
        NAME(CL_PROFILING_INFO_NOT_AVAILABLE),
        NAME(CL_MEM_COPY_OVERLAP),
        NAME(CL_BUILD_PROGRAM_FAILURE),
        NAME(CL_MAP_FAILURE),
        NAME(CL_MISALIGNED_SUB_BUFFER_OFFSET),
        NAME(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST),
        NAME(CL_COMPILE_PROGRAM_FAILURE),
        NAME(CL_LINKER_NOT_AVAILABLE),
        NAME(CL_LINK_PROGRAM_FAILURE),
        NAME(CL_DEVICE_PARTITION_FAILED),
        NAME(CL_KERNEL_ARG_INFO_NOT_AVAILABLE),
        NAME(CL_INVALID_VALUE),
        NAME(CL_INVALID_DEVICE_TYPE),
        NAME(CL_INVALID_PLATFORM),
        NAME(CL_INVALID_DEVICE),
        NAME(CL_INVALID_CONTEXT),
        NAME(CL_INVALID_QUEUE_PROPERTIES),
        NAME(CL_INVALID_COMMAND_QUEUE),
        NAME(CL_INVALID_HOST_PTR),
        NAME(CL_INVALID_MEM_OBJECT),
        NAME(CL_INVALID_BINARY),
        NAME(CL_INVALID_BUILD_OPTIONS),
        NAME(CL_INVALID_PROGRAM),
        NAME(CL_INVALID_PROGRAM_EXECUTABLE),
        NAME(CL_INVALID_KERNEL_NAME),
        NAME(CL_INVALID_KERNEL_DEFINITION),
        NAME(CL_INVALID_KERNEL),
        NAME(CL_INVALID_ARG_INDEX),
        NAME(CL_INVALID_ARG_VALUE),
        NAME(CL_INVALID_ARG_SIZE),
        NAME(CL_INVALID_KERNEL_ARGS),
        NAME(CL_INVALID_WORK_DIMENSION),
        NAME(CL_INVALID_WORK_GROUP_SIZE),
        NAME(CL_INVALID_WORK_ITEM_SIZE),
        NAME(CL_INVALID_GLOBAL_OFFSET),
        NAME(CL_INVALID_EVENT_WAIT_LIST),
        NAME(CL_INVALID_EVENT),
        NAME(CL_INVALID_OPERATION),
        NAME(CL_INVALID_BUFFER_SIZE),
        NAME(CL_INVALID_GLOBAL_WORK_SIZE),
        NAME(CL_INVALID_PROPERTY),
        NAME(CL_INVALID_COMPILER_OPTIONS),
        NAME(CL_INVALID_LINKER_OPTIONS),
#undef NAME
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].code == code)
            return names[i].name;
    return "an unknown code";
}

int opencl_fail(cl_int code, const char *what)
{
    bool memory = code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_HOST_MEMORY ||
                  code == CL_INVALID_BUFFER_SIZE;
    return fail(memory ? ERR_NOMEM : ERR_DRIVER, "OpenCL: %s failed: %s (%d)", what,
                opencl_error_name(code), code);
}

// ---- discovery ---------------------------------------------------------------------------------

int opencl_device_ids(cl_device_id *ids, cl_platform_id *owners)
{
    cl_platform_id platforms[PLATFORMS_MAX];
    cl_uint platform_count = 0;
    int count = 0;
    cl_int code = clGetPlatformIDs(PLATFORMS_MAX, platforms, &platform_count);
    if (code == ICD_FOUND_NO_PLATFORM)
        return 0;
    CL(code, "clGetPlatformIDs");
    for (cl_uint p = 0; p < platform_count && p < PLATFORMS_MAX; p++) {
        cl_uint found = 0, room = (cl_uint)(OPENCL_DEVICES_MAX - count);
        if (room == 0 || clGetDeviceIDs(platforms[p], CL_DEVICE_TYPE_ALL, room, ids + count,
                                        &found) != CL_SUCCESS)
            continue;
        for (cl_uint d = 0; d < found && d < room; d++)
            owners[count++] = platforms[p];
    }
    return count;
}

// Without the spaces around it, and in printable ASCII, as terminals and JSON want it.
static void copy_trimmed(char *out, size_t size, const char *text)
{
    text += strspn(text, " \t\n");
    size_t length = strlen(text);
    while (length > 0 && strchr(" \t\n", text[length - 1]))
        length--;
    if (length >= size)
        length = size - 1;
    for (size_t i = 0; i < length; i++)
        out[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    out[length] = 0;
}

void opencl_device_string(cl_device_id id, cl_device_info what, char *out, size_t size)
{
    char text[1024] = "";
    if (clGetDeviceInfo(id, what, sizeof text - 1, text, NULL) != CL_SUCCESS)
        text[0] = 0;
    copy_trimmed(out, size, text);
}

static uint64_t device_number(cl_device_id id, cl_device_info what, size_t size)
{
    uint64_t value = 0; // little-endian hosts: the low bytes are the number
    if (clGetDeviceInfo(id, what, size, &value, NULL) != CL_SUCCESS)
        return 0;
    return value;
}

static bool has_extension(cl_device_id id, const char *name)
{
    size_t size = 0;
    if (clGetDeviceInfo(id, CL_DEVICE_EXTENSIONS, 0, NULL, &size) != CL_SUCCESS || size == 0)
        return false;
    char *text = calloc(size + 1, 1);
    bool found = text &&
                 clGetDeviceInfo(id, CL_DEVICE_EXTENSIONS, size, text, NULL) == CL_SUCCESS &&
                 strstr(text, name);
    free(text);
    return found;
}

static enum device_kind device_kind(cl_device_id id)
{
    uint64_t type = device_number(id, CL_DEVICE_TYPE, sizeof(cl_device_type));
    if (type & CL_DEVICE_TYPE_GPU)
        return DEVICE_GPU;
    return type & CL_DEVICE_TYPE_CPU ? DEVICE_CPU : DEVICE_ACCELERATOR;
}

// "0000:3b:00.0" by whatever query this driver answers, or "": no place on a PCI bus.
static void pci_id(cl_device_id id, char *out, size_t size)
{
    cl_device_pci_bus_info_khr khr;
    unsigned domain, bus, device, function;
    out[0] = 0;
    if (clGetDeviceInfo(id, CL_DEVICE_PCI_BUS_INFO_KHR, sizeof khr, &khr, NULL) == CL_SUCCESS) {
        domain = khr.pci_domain;
        bus = khr.pci_bus;
        device = khr.pci_device;
        function = khr.pci_function;
    } else if (hwloc_opencl_get_device_pci_busid(id, &domain, &bus, &device, &function) != 0) {
        return;
    }
    snprintf(out, size, "%04x:%02x:%02x.%x", domain & 0xffff, bus & 0xff, device & 0xff,
             function & 0xf);
}

static void describe(cl_platform_id platform, cl_device_id id, int index, struct device_info *info)
{
    char text[256] = "";
    memset(info, 0, sizeof *info);
    info->backend = &backend_opencl;
    info->index = index;
    snprintf(info->key, sizeof info->key, "opencl:%d", index);
    if (clGetPlatformInfo(platform, CL_PLATFORM_NAME, sizeof text - 1, text, NULL) == CL_SUCCESS)
        copy_trimmed(info->platform, sizeof info->platform, text);
    opencl_device_string(id, CL_DEVICE_NAME, info->name, sizeof info->name);
    opencl_device_string(id, CL_DEVICE_VENDOR, info->vendor, sizeof info->vendor);
    opencl_device_string(id, CL_DRIVER_VERSION, info->driver, sizeof info->driver);
    opencl_device_string(id, CL_DEVICE_OPENCL_C_VERSION, info->language, sizeof info->language);
    info->kind = device_kind(id);
    info->memory_driver = device_number(id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof(cl_ulong));
    info->memory = info->memory_driver;
    info->max_alloc = device_number(id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof(cl_ulong));
    info->compute_units = (int)device_number(id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof(cl_uint));
    info->clock_mhz = (int)device_number(id, CL_DEVICE_MAX_CLOCK_FREQUENCY, sizeof(cl_uint));
    info->vector_width =
        (int)device_number(id, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof(cl_uint));
    info->align = (size_t)device_number(id, CL_DEVICE_MEM_BASE_ADDR_ALIGN, sizeof(cl_uint)) / 8;
    if (info->align < 64)
        info->align = 64; // a cache line, and the widest vector load
    info->fp16 = has_extension(id, "cl_khr_fp16");
    info->fp64 = device_number(id, CL_DEVICE_DOUBLE_FP_CONFIG, sizeof(cl_device_fp_config)) != 0;
    info->unified = device_number(id, CL_DEVICE_HOST_UNIFIED_MEMORY, sizeof(cl_bool)) != 0;
    pci_id(id, info->pci, sizeof info->pci);
}

int opencl_list(struct device_info *out, int max)
{
    cl_device_id ids[OPENCL_DEVICES_MAX];
    cl_platform_id owners[OPENCL_DEVICES_MAX];
    int count = opencl_device_ids(ids, owners);
    TRY(count);
    if (count > max)
        count = max;
    for (int i = 0; i < count; i++)
        describe(owners[i], ids[i], i, &out[i]);
    return count;
}
