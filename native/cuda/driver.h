/* NVIDIA's driver, opened when it is asked for: libcuda.so.1, or what PYBMC_CUDA_DRIVER names. Declared
 * here, so that neither a header nor a library of CUDA is needed to build pybmc. Handles are pointers,
 * results 0 or an error code. */
#ifndef CUDA_DRIVER_H
#define CUDA_DRIVER_H

#include "../memory.h"
#include "args.h"

#include <stdbool.h>
#include <sys/types.h>

/* Values and structs of the driver. tests/cuda/abi.cpp compares all of this file with cuda.h. */
enum {
    CUDA_OUT_OF_MEMORY = 2,
    CUDA_INVALID_IMAGE = 200, CUDA_NO_BINARY = 209, CUDA_INVALID_PTX = 218, CUDA_NO_JIT = 221,
    CUDA_UNSUPPORTED_PTX = 222,
    CUDA_ECC = 214, CUDA_ILLEGAL_ADDRESS = 700, CUDA_LAUNCH_TIMEOUT = 702, CUDA_ASSERT = 710,
    CUDA_HARDWARE_STACK = 714, CUDA_ILLEGAL_INSTRUCTION = 715, CUDA_MISALIGNED = 716,
    CUDA_ADDRESS_SPACE = 717, CUDA_INVALID_PC = 718, CUDA_LAUNCH_FAILED = 719,
};
enum {
    CUDA_ATTRIBUTE_SMS = 16, CUDA_ATTRIBUTE_MAJOR = 75, CUDA_ATTRIBUTE_MINOR = 76, CUDA_ATTRIBUTE_MAPS = 102
};
enum { CUDA_STREAM_NON_BLOCKING = 1, CUDA_CAPTURE_THREAD = 1 };
enum { CUDA_ON_DEVICE = 1, CUDA_PINNED = 1, CUDA_READ_WRITE = 3, CUDA_GRANULARITY_LEAST = 0 };

/* Places for memory of the device: where it is, and who may use it. */
struct cuda_location { int32_t type, id; };                         /* type: CUDA_ON_DEVICE */
struct cuda_access { struct cuda_location location; int32_t flags; };       /* flags: CUDA_READ_WRITE */
struct cuda_allocation {
    int32_t type, handle_types;                                 /* type: CUDA_PINNED: it stays where it is */
    struct cuda_location location;
    void *win32;
    uint8_t flags[8];
};

#define CUDA_DRIVER(X) \
    X(cuInit, (unsigned flags)) \
    X(cuDriverGetVersion, (int *version)) \
    X(cuGetErrorString, (int code, const char **text)) \
    X(cuDeviceGetCount, (int *n)) \
    X(cuDeviceGet, (int *device, int i)) \
    X(cuDeviceGetName, (char *name, int n, int device)) \
    X(cuDeviceTotalMem_v2, (size_t *bytes, int device)) \
    X(cuDeviceGetAttribute, (int *value, int attribute, int device)) \
    X(cuDevicePrimaryCtxRetain, (void **context, int device)) \
    X(cuDevicePrimaryCtxRelease_v2, (int device)) \
    X(cuCtxGetCurrent, (void **context)) \
    X(cuCtxSetCurrent, (void *context)) \
    X(cuMemGetInfo_v2, (size_t *unused, size_t *total)) \
    X(cuMemAlloc_v2, (uint64_t *memory, size_t bytes)) \
    X(cuMemFree_v2, (uint64_t memory)) \
    X(cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags)) \
    X(cuMemFreeHost, (void *memory)) \
    X(cuMemHostRegister_v2, (void *memory, size_t bytes, unsigned flags)) \
    X(cuMemHostUnregister, (void *memory)) \
    X(cuMemcpy2DAsync_v2, (const struct cuda_copy2d *copy, void *stream)) \
    X(cuMemcpyHtoDAsync_v2, (uint64_t to, const void *from, size_t bytes, void *stream)) \
    X(cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t bytes, void *stream)) \
    X(cuMemcpyDtoDAsync_v2, (uint64_t to, uint64_t from, size_t bytes, void *stream)) \
    X(cuMemsetD8Async, (uint64_t memory, unsigned char value, size_t bytes, void *stream)) \
    X(cuMemGetAllocationGranularity, (size_t *bytes, const struct cuda_allocation *kind, int recommended)) \
    X(cuMemAddressReserve, (uint64_t *address, size_t bytes, size_t alignment, uint64_t wished, \
                            unsigned long long flags)) \
    X(cuMemAddressFree, (uint64_t address, size_t bytes)) \
    X(cuMemCreate, (unsigned long long *memory, size_t bytes, const struct cuda_allocation *kind, \
                    unsigned long long flags)) \
    X(cuMemRelease, (unsigned long long memory)) \
    X(cuMemMap, (uint64_t address, size_t bytes, size_t offset, unsigned long long memory, \
                 unsigned long long flags)) \
    X(cuMemUnmap, (uint64_t address, size_t bytes)) \
    X(cuMemSetAccess, (uint64_t address, size_t bytes, const struct cuda_access *access, size_t n)) \
    X(cuStreamCreate, (void **stream, unsigned flags)) \
    X(cuStreamDestroy_v2, (void *stream)) \
    X(cuStreamSynchronize, (void *stream)) \
    X(cuStreamWaitEvent, (void *stream, void *event, unsigned flags)) \
    X(cuEventCreate, (void **event, unsigned flags)) \
    X(cuEventRecord, (void *event, void *stream)) \
    X(cuEventDestroy_v2, (void *event)) \
    X(cuModuleLoadData, (void **module, const void *image)) \
    X(cuModuleUnload, (void *module)) \
    X(cuModuleGetFunction, (void **function, void *module, const char *name)) \
    X(cuLaunchKernel, (void *function, unsigned gx, unsigned gy, unsigned gz, \
                       unsigned bx, unsigned by, unsigned bz, unsigned shared, \
                       void *stream, void **args, void **extra)) \
    X(cuStreamBeginCapture_v2, (void *stream, int mode)) \
    X(cuStreamEndCapture, (void *stream, void **graph)) \
    X(cuGraphInstantiateWithFlags, (void **program, void *graph, unsigned long long flags)) \
    X(cuGraphLaunch, (void *program, void *stream)) \
    X(cuGraphExecDestroy, (void *program)) \
    X(cuGraphDestroy, (void *graph))

struct cuda_driver {
#define CUDA_FIELD(name, args) int (*name) args;
    CUDA_DRIVER(CUDA_FIELD)
#undef CUDA_FIELD
};

/* The driver, opened by the first call; NULL with the sentence recorded. */
const struct cuda_driver *cuda_driver(void);

/* 0, or what a code of the driver means, with its sentence: "GPU 0: WHAT: out of memory". After some of them
 * the driver computes nothing more for this process: the sentence says so. */
int cuda_status(int gpu, const char *what, int code);

/* A GPU that is in use, with the kernels loaded: shared by all who open it. */
struct gpu {
    const struct cuda_driver *cu;
    int index, users;
    int device;
    void *context, *module;
    void *memory_stream;            /* of segments: no pass is captured there */
    int n_sms;                      /* multiprocessors */
    bool mma;                       /* multiplies 8-bit matrices */
    size_t granularity;             /* of memory that is mapped; 0: it cannot be */
    pid_t process;                  /* a forked one cannot use it */
    struct gpu *next;
};

int gpu_open(int index, const char *kernels, struct gpu **gpu);     /* kernels: their file */
void gpu_close(struct gpu *gpu);
int gpu_enter(const struct gpu *gpu);       /* before calls of the driver, on each thread; 0 or BMC_EDEVICE */
void *gpu_function(const struct gpu *gpu, const char *name);        /* NULL with the sentence recorded */

/* Memory of the GPU. 0, or BMC_ENOMEM or BMC_EDEVICE; what: for the sentence. */
int gpu_alloc(const struct gpu *gpu, size_t bytes, const char *what, void **memory);
void gpu_free(const struct gpu *gpu, void *memory);

/* Pieces of segments on their way to the host or from it, by a buffer of pinned memory (transfer.c). */
enum { STAGE_BYTES = 4 << 20, STAGE_PIECES = 1024 };
struct gpu_stage {
    char *bytes;                    /* pinned, STAGE_BYTES; NULL until it is used */
    size_t begun, used;             /* those from `begun` on belong to a copy that is not queued yet */
    uint64_t there;                 /* the address of their first one on the GPU */
    bool up;                        /* they go to the GPU */
    struct { void *to; size_t at, bytes; } pieces[STAGE_PIECES];       /* for the host, once they are there */
    int n_pieces, status;
};

/* Segments of arenas, which grow where they stand, and states: each is memory mapped to addresses of its
 * own, or where the GPU cannot do that an allocation. The stream does the zeroing and copying, all of which
 * is done on return. It is not the stream of passes: sessions come and go on other threads while a pass is
 * captured, and what they queue there would become part of its graph. */
struct gpu_segments { const struct gpu *gpu; void *stream; struct gpu_stage stage; };
struct memory gpu_memory(struct gpu_segments *of);
int gpu_fetch(void *of, void *to, const void *from, size_t bytes);     /* memory.fetch, send and wait */
int gpu_send(void *of, void *to, const void *from, size_t bytes);
int gpu_wait(void *of);

_Static_assert(sizeof(struct cuda_copy2d) == 128, "CUDA_MEMCPY2D has 128 bytes");
static inline uint64_t cuda_address(const void *p) { return (uint64_t)(uintptr_t)p; }

#endif
