#include "driver.h"

#include "../error.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct cuda_driver functions;
static struct gpu *opened;
static pid_t process;                           /* that opened the driver; 0: none yet */

static int open_driver(void) {
    const char *path = getenv("PYBMC_CUDA_DRIVER"), *text = NULL;
    void *library = dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fail(BMC_EDEVICE, "no GPU can be used: %s", dlerror());
    const struct { const char *name; void *place; } list[] = {
#define CUDA_ROW(name, args) { #name, &functions.name },
        CUDA_DRIVER(CUDA_ROW)
#undef CUDA_ROW
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *found = dlsym(library, list[i].name);
        if (!found) {
            dlclose(library);
            return fail(BMC_EDEVICE,
                        "no GPU can be used: the driver has no %s: expected version 470 or later, found an "
                        "older one",
                        list[i].name);
        }
        memcpy(list[i].place, &found, sizeof found);
    }
    const int code = functions.cuInit(0);
    if (code) {
        functions.cuGetErrorString(code, &text);
        return fail(BMC_EDEVICE, "no GPU can be used: the driver says \"%s\" (%d)",
                    text ? text : "unknown error", code);
    }
    return 0;
}

static const struct cuda_driver *driver_locked(void) {
    if (process && process != getpid()) {
        fail(BMC_EDEVICE, "a forked process cannot use the GPU that its parent has opened: open models in "
                          "the process that uses them");
        return NULL;
    }
    if (!process && open_driver())
        return NULL;
    process = getpid();
    return &functions;
}

const struct cuda_driver *cuda_driver(void) {
    pthread_mutex_lock(&lock);
    const struct cuda_driver *found = driver_locked();
    pthread_mutex_unlock(&lock);
    return found;
}

/* Errors of a kernel or of the chip, which the driver gives back from every call that follows. */
static bool is_final(int code) {
    return code == CUDA_ECC || code == CUDA_ILLEGAL_ADDRESS || code == CUDA_LAUNCH_TIMEOUT
           || (code >= CUDA_ASSERT && code <= CUDA_LAUNCH_FAILED);
}

int cuda_status(int gpu, const char *what, int code) {
    const char *text = NULL;
    if (!code)
        return 0;
    functions.cuGetErrorString(code, &text);
    return fail(code == CUDA_OUT_OF_MEMORY ? BMC_ENOMEM : BMC_EDEVICE, "GPU %d: %s: %s (%d)%s", gpu, what,
                text ? text : "unknown error", code,
                is_final(code) ? "; this process cannot use the GPU any more: start it again" : "");
}

/* Number i, checked. */
static int find_device(const struct cuda_driver *cu, int i, int *device) {
    int n = 0, status = cuda_status(i, "counting the GPUs", cu->cuDeviceGetCount(&n));
    if (!status && n < 1)
        status = fail(BMC_EDEVICE, "there is no GPU that the driver can use");
    if (!status && (i < 0 || i >= n))
        status = fail(BMC_EDEVICE, "GPU: expected 0 to %d, found %d", n - 1, i);
    return status ? status : cuda_status(i, "asking for it", cu->cuDeviceGet(device, i));
}

struct attribute { int number; int *value; };

static int ask(const struct cuda_driver *cu, int i, int device, const struct attribute *list, size_t n) {
    int status = 0;
    for (size_t j = 0; j < n && !status; j++)
        status = cuda_status(i, "asking what it can do",
                             cu->cuDeviceGetAttribute(list[j].value, list[j].number, device));
    return status;
}

/* How much of its memory is available: only a context can tell. The thread's own is back afterwards. */
static int ask_available(const struct cuda_driver *cu, int i, int device, size_t *available, size_t *total) {
    void *context, *before = NULL;
    int status = cuda_status(i, "using it", cu->cuDevicePrimaryCtxRetain(&context, device));
    if (status)
        return status;
    status = cuda_status(i, "using it", cu->cuCtxGetCurrent(&before));
    if (!status)
        status = cuda_status(i, "using it", cu->cuCtxSetCurrent(context));
    if (!status)
        status = cuda_status(i, "asking for its memory", cu->cuMemGetInfo_v2(available, total));
    const int back = cuda_status(i, "leaving it", cu->cuCtxSetCurrent(before));
    cu->cuDevicePrimaryCtxRelease_v2(device);
    return status ? status : back;
}

int bmc_gpu(int i, bmc_gpu_info *info) {
    const struct cuda_driver *cu = cuda_driver();
    int n = 0, device = 0, major = 0, minor = 0;
    if (!cu)
        return BMC_EDEVICE;
    int status =
        info ? find_device(cu, i, &device) : cuda_status(0, "counting the GPUs", cu->cuDeviceGetCount(&n));
    if (!info)
        return status ? status : n;
    size_t total = 0, available = 0;
    *info = (bmc_gpu_info){ 0 };
    if (!status)
        status = cuda_status(i, "asking for its name",
                             cu->cuDeviceGetName(info->name, (int)sizeof info->name, device));
    if (!status)
        status = ask(cu, i, device,
                     (struct attribute[]){ { CUDA_ATTRIBUTE_MAJOR, &major },
                                           { CUDA_ATTRIBUTE_MINOR, &minor } },
                     2);
    if (!status)
        status = ask_available(cu, i, device, &available, &total);
    info->memory = (int64_t)total;
    info->available = (int64_t)available;
    info->major = major;
    info->minor = minor;
    return status;
}

/* A file's bytes and a 0 after them, as PTX wants it. NULL with the sentence recorded. */
static char *read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    char *bytes = NULL;
    long size = -1;
    if (file && !fseek(file, 0, SEEK_END) && (size = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET))
        bytes = calloc((size_t)size + 1, 1);
    if (bytes && fread(bytes, 1, (size_t)size, file) != (size_t)size) {
        free(bytes);
        bytes = NULL;
    }
    if (file)
        fclose(file);
    if (!bytes)
        fail(BMC_EDEVICE, "the kernels for GPUs cannot be read: %s", path);
    return bytes;
}

/* Kernels that this GPU cannot run, or this driver cannot load. */
static int unsuitable(const struct gpu *g, const char *path, int code) {
    const char *text = NULL;
    int version = 0, major = 0, minor = 0;
    g->cu->cuGetErrorString(code, &text);
    g->cu->cuDriverGetVersion(&version);
    g->cu->cuDeviceGetAttribute(&major, CUDA_ATTRIBUTE_MAJOR, g->device);
    g->cu->cuDeviceGetAttribute(&minor, CUDA_ATTRIBUTE_MINOR, g->device);
    return fail(BMC_EDEVICE,
                "GPU %d: loading the kernels of %s: %s (%d): expected compute capability 7.5 or later and a "
                "driver of the CUDA that compiled them (580 or later for CUDA 13), found capability %d.%d "
                "and a driver of CUDA %d.%d",
                g->index, path, text ? text : "unknown error", code, major, minor, version / 1000,
                version % 1000 / 10);
}

static int load_kernels(struct gpu *g, const char *path) {
    char *image = read_file(path);
    if (!image)
        return BMC_EDEVICE;
    const int code = g->cu->cuModuleLoadData(&g->module, image);
    free(image);
    switch (code) {
    case CUDA_INVALID_IMAGE: case CUDA_NO_BINARY: case CUDA_INVALID_PTX: case CUDA_NO_JIT:
    case CUDA_UNSUPPORTED_PTX:
        return unsuitable(g, path, code);
    }
    return cuda_status(g->index, "loading the kernels", code);
}

static struct cuda_allocation on_device(const struct gpu *g) {
    return (struct cuda_allocation){ .type = CUDA_PINNED, .location = { CUDA_ON_DEVICE, g->device } };
}

static int begin_gpu(struct gpu *g, const char *kernels) {
    const struct cuda_allocation kind = on_device(g);
    int major = 0, maps = 0;
    int status = cuda_status(g->index, "using it", g->cu->cuDevicePrimaryCtxRetain(&g->context, g->device));
    if (!status)
        status = cuda_status(g->index, "using it", g->cu->cuCtxSetCurrent(g->context));
    if (!status)
        status = load_kernels(g, kernels);
    if (!status)
        status = cuda_status(g->index, "making a stream",
                             g->cu->cuStreamCreate(&g->memory_stream, CUDA_STREAM_NON_BLOCKING));
    if (!status)
        status = ask(g->cu, g->index, g->device,
                     (struct attribute[]){ { CUDA_ATTRIBUTE_SMS, &g->n_sms },
                                           { CUDA_ATTRIBUTE_MAJOR, &major },
                                           { CUDA_ATTRIBUTE_MAPS, &maps } },
                     3);
    if (!status && maps)
        status = cuda_status(
            g->index, "asking what it can do",
            g->cu->cuMemGetAllocationGranularity(&g->granularity, &kind, CUDA_GRANULARITY_LEAST));
    g->mma = major >= 8;
    return status;
}

/* The context may end here, so the thread no longer has it. */
static void end_gpu(struct gpu *g) {
    if (g->memory_stream)
        g->cu->cuStreamDestroy_v2(g->memory_stream);
    if (g->module)
        g->cu->cuModuleUnload(g->module);
    g->cu->cuCtxSetCurrent(NULL);
    if (g->context)
        g->cu->cuDevicePrimaryCtxRelease_v2(g->device);
    free(g);
}

static int open_locked(int index, const char *kernels, struct gpu **gpu) {
    const struct cuda_driver *cu = driver_locked();
    int device = 0, status = cu ? find_device(cu, index, &device) : BMC_EDEVICE;
    if (status)
        return status;
    for (struct gpu *g = opened; g; g = g->next)
        if (g->index == index) {
            g->users++;
            *gpu = g;
            return 0;
        }
    struct gpu *g = calloc(1, sizeof *g);
    if (!g)
        return fail(BMC_ENOMEM, "no memory for a GPU");
    *g = (struct gpu){
        .cu = cu, .index = index, .users = 1, .device = device, .process = process, .next = opened
    };
    status = begin_gpu(g, kernels);
    if (status) {
        end_gpu(g);
        return status;
    }
    *gpu = opened = g;
    return 0;
}

int gpu_open(int index, const char *kernels, struct gpu **gpu) {
    pthread_mutex_lock(&lock);
    const int status = open_locked(index, kernels, gpu);
    pthread_mutex_unlock(&lock);
    return status;
}

void gpu_close(struct gpu *g) {
    struct gpu **link = &opened;
    if (!g || g->process != getpid())
        return;
    pthread_mutex_lock(&lock);
    if (--g->users == 0) {
        while (*link != g)
            link = &(*link)->next;
        *link = g->next;
        g->cu->cuCtxSetCurrent(g->context);
        end_gpu(g);
    }
    pthread_mutex_unlock(&lock);
}

int gpu_enter(const struct gpu *g) {
    if (g->process != getpid())
        return fail(BMC_EDEVICE, "a forked process cannot use the model on GPU %d that its parent has opened",
                    g->index);
    return cuda_status(g->index, "using it", g->cu->cuCtxSetCurrent(g->context));
}

void *gpu_function(const struct gpu *g, const char *name) {
    void *function = NULL;
    char what[96];
    snprintf(what, sizeof what, "finding the kernel %s", name);
    return cuda_status(g->index, what, g->cu->cuModuleGetFunction(&function, g->module, name)) ? NULL
                                                                                               : function;
}

int gpu_alloc(const struct gpu *g, size_t bytes, const char *what, void **memory) {
    uint64_t address = 0;
    char text[128];
    *memory = NULL;
    snprintf(text, sizeof text, "%.0f MB for %s", (double)bytes / 1e6, what);
    const int status = cuda_status(g->index, text, g->cu->cuMemAlloc_v2(&address, bytes ? bytes : 1));
    *memory = status ? NULL : (void *)(uintptr_t)address;
    return status;
}

void gpu_free(const struct gpu *g, void *memory) {
    if (memory && !gpu_enter(g))
        g->cu->cuMemFree_v2(cuda_address(memory));
}

/* Segments. */

static size_t segment_whole(void *of, size_t bytes) {
    const struct gpu *g = ((struct gpu_segments *)of)->gpu;
    const size_t unit = g->granularity ? g->granularity : 512;
    return (bytes + unit - 1) / unit * unit;
}

/* What the thread's last segment failed of, where it is not for lack of memory. */
static _Thread_local int failure;

/* Whether a call worked. */
static bool did(const struct gpu *g, int code) {
    if (code && code != CUDA_OUT_OF_MEMORY)
        failure = cuda_status(g->index, "making memory of a session", code);
    return !code;
}

static int take_failure(void *of) {
    const int taken = failure;
    (void)of;
    failure = 0;
    return taken;
}

/* Memory at addresses of its own; 0 without. */
static uint64_t map_segment(const struct gpu *g, size_t bytes) {
    const struct cuda_allocation kind = on_device(g);
    const struct cuda_access access = { kind.location, CUDA_READ_WRITE };
    unsigned long long memory = 0;
    uint64_t address = 0;
    if (!did(g, g->cu->cuMemAddressReserve(&address, bytes, 0, 0, 0)))
        return 0;
    bool made = did(g, g->cu->cuMemCreate(&memory, bytes, &kind, 0)),
         mapped = made && did(g, g->cu->cuMemMap(address, bytes, 0, memory, 0));
    if (made)
        g->cu->cuMemRelease(memory);            /* it lives as long as it is mapped */
    if (mapped && did(g, g->cu->cuMemSetAccess(address, bytes, &access, 1)))
        return address;
    if (mapped)
        g->cu->cuMemUnmap(address, bytes);
    g->cu->cuMemAddressFree(address, bytes);
    return 0;
}

static void unmap_segment(void *of, void *memory, size_t bytes) {
    const struct gpu_segments *s = of;
    const struct gpu *g = s->gpu;
    if (!memory || gpu_enter(g))
        return;
    g->cu->cuStreamSynchronize(s->stream);      /* it may be zeroed still, where waiting for that failed */
    if (!g->granularity) {
        g->cu->cuMemFree_v2(cuda_address(memory));
        return;
    }
    g->cu->cuMemUnmap(cuda_address(memory), bytes);
    g->cu->cuMemAddressFree(cuda_address(memory), bytes);
}

/* 0, or -1. */
static int zero(const struct gpu_segments *s, uint64_t address, size_t bytes) {
    const struct cuda_driver *cu = s->gpu->cu;
    return did(s->gpu, cu->cuMemsetD8Async(address, 0, bytes, s->stream))
                   && did(s->gpu, cu->cuStreamSynchronize(s->stream)) ? 0 : -1;
}

static void *new_segment(void *of, size_t bytes) {
    const struct gpu_segments *s = of;
    const struct gpu *g = s->gpu;
    uint64_t address = 0;
    failure = gpu_enter(g);
    if (failure)
        return NULL;
    if (g->granularity)
        address = map_segment(g, bytes);
    else if (!did(g, g->cu->cuMemAlloc_v2(&address, bytes)))
        address = 0;
    if (address && zero(s, address, bytes)) {
        unmap_segment(of, (void *)(uintptr_t)address, bytes);
        address = 0;
    }
    return (void *)(uintptr_t)address;
}

static int copy_segment(void *of, void *to, const void *from, size_t bytes) {
    const struct gpu_segments *s = of;
    const struct gpu *g = s->gpu;
    failure = gpu_enter(g);
    return !failure
                   && did(g, g->cu->cuMemcpyDtoDAsync_v2(cuda_address(to), cuda_address(from), bytes,
                                                         s->stream))
                   && did(g, g->cu->cuStreamSynchronize(s->stream)) ? 0 : -1;
}

static int zero_segment(void *of, void *memory, size_t bytes) {
    const struct gpu_segments *s = of;
    return gpu_enter(s->gpu) ? -1 : zero(s, cuda_address(memory), bytes);
}

struct memory gpu_memory(struct gpu_segments *of) {
    return (struct memory){ of,           segment_whole, new_segment, unmap_segment, copy_segment,
                            zero_segment, take_failure,  gpu_fetch,   gpu_send,      gpu_wait };
}
