/* A CUDA driver without a GPU: a library of libcuda's names that runs the kernels on the grid of grid.h. It
 * is stricter than a real one.
 *
 * What is queued happens when the stream is awaited, so that a host buffer that is used again too early
 * shows. Fresh memory is full of NaN. Addresses are checked, and so is the context of the thread. Any call
 * can be made to fail. Tests set it by fake_set() and ask fake_get(). */
#include "grid.h"

#include "../../native/cuda/kernels.cu"

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum {
    OK = 0,
    INVALID = 1,
    NO_MEMORY = 2,
    NOT_READY = 3,
    NO_CONTEXT = 201,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    UNKNOWN = 999
};
enum { POISON = 0xff, PAGE = 2 << 20 };

static std::recursive_mutex lock;

/* What tests set: how many GPUs there are, their capability and memory, whether they map memory, the order of
 * the grid, and which call from now on fails: 0: none. What they ask: calls so far, objects alive, launches
 * of graphs and of kernels. */
static std::map<std::string, long long> settings = {
    { "gpus", 1 },    { "major", 9 },           { "maps", 1 },           { "order", 0 },
    { "fail_in", 0 }, { "fail_code", UNKNOWN }, { "memory", 4ll << 30 }, { "calls", 0 },
    { "alive", 0 },   { "bytes", 0 },           { "graph_launches", 0 }, { "launches", 0 },
    { "graphs", 0 },
};

API void fake_set(const char *name, long long value) {
    std::lock_guard<std::recursive_mutex> held(lock);
    settings.at(name) = value;
}

API long long fake_get(const char *name) {
    std::lock_guard<std::recursive_mutex> held(lock);
    return settings.at(name);
}

static thread_local void *current;
static std::string failed;              /* the name of the call that was made to fail */
static int broken;                      /* a queued operation failed: so does everything after it */

API const char *fake_failed(void) { return failed.c_str(); }

/* Each call goes through here; `needs`: a context. */
static int begin(const char *name, bool needs) {
    settings["calls"]++;
    if (settings["fail_in"] > 0 && --settings["fail_in"] == 0) {
        failed = name;
        return (int)settings["fail_code"];
    }
    return needs && !current ? NO_CONTEXT : OK;
}

#define BEGIN(needs) \
    std::lock_guard<std::recursive_mutex> held(lock); \
    if (int code = begin(__func__, needs)) \
        return code

/* Memory. Device addresses are addresses here. */

static std::map<uint64_t, size_t> blocks;       /* that can be read and written */
static std::map<uint64_t, size_t> reserved;
static std::map<unsigned long long, size_t> handles;

static bool inside(uint64_t p, size_t n) {
    auto after = blocks.upper_bound(p);
    if (!n)
        return true;
    if (after == blocks.begin())
        return false;
    auto block = std::prev(after);
    return p + n <= block->first + block->second;
}

static void count(int n, long long bytes) {
    settings["alive"] += n;
    settings["bytes"] += bytes;
}

API int cuMemAlloc_v2(uint64_t *p, size_t n) {
    BEGIN(true);
    if (!n || settings["bytes"] + (long long)n > settings["memory"])
        return n ? NO_MEMORY : INVALID;
    void *memory = aligned_alloc(256, (n + 255) / 256 * 256);
    if (!memory)
        return NO_MEMORY;
    memset(memory, POISON, n);
    blocks[*p = (uint64_t)memory] = n;
    count(1, (long long)n);
    return OK;
}

API int cuMemFree_v2(uint64_t p) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (!blocks.count(p))
        return INVALID;
    count(-1, -(long long)blocks[p]);
    blocks.erase(p);
    free((void *)p);
    return OK;
}

API int cuMemHostAlloc(void **p, size_t n, unsigned) {
    BEGIN(true);
    if (!(*p = malloc(n)))
        return NO_MEMORY;
    memset(*p, POISON, n);
    count(1, 0);
    return OK;
}

API int cuMemFreeHost(void *p) {
    std::lock_guard<std::recursive_mutex> held(lock);
    free(p);
    count(-1, 0);
    return OK;
}

API int cuMemGetAllocationGranularity(size_t *n, const void *, int) {
    BEGIN(false);
    *n = PAGE;
    return OK;
}

API int cuMemAddressReserve(uint64_t *p, size_t n, size_t, uint64_t, unsigned long long) {
    BEGIN(true);
    void *memory =
        n % PAGE ? MAP_FAILED : mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return INVALID;
    reserved[*p = (uint64_t)memory] = n;
    count(1, 0);
    return OK;
}

API int cuMemAddressFree(uint64_t p, size_t n) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (!reserved.count(p) || reserved[p] != n || blocks.count(p))
        return INVALID;
    reserved.erase(p);
    munmap((void *)p, n);
    count(-1, 0);
    return OK;
}

API int cuMemCreate(unsigned long long *handle, size_t n, const void *, unsigned long long) {
    static unsigned long long next;
    BEGIN(true);
    if (n % PAGE || settings["bytes"] + (long long)n > settings["memory"])
        return n % PAGE ? INVALID : NO_MEMORY;
    handles[*handle = ++next] = n;
    count(1, 0);
    return OK;
}

API int cuMemRelease(unsigned long long handle) {
    std::lock_guard<std::recursive_mutex> held(lock);
    count(-1, 0);
    return handles.erase(handle) ? OK : INVALID;
}

API int cuMemMap(uint64_t p, size_t n, size_t, unsigned long long handle, unsigned long long) {
    BEGIN(true);
    if (!reserved.count(p) || !handles.count(handle) || handles[handle] != n)
        return INVALID;
    blocks[p] = n;
    count(1, (long long)n);
    return OK;
}

API int cuMemUnmap(uint64_t p, size_t n) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (!blocks.count(p) || blocks[p] != n)
        return INVALID;
    blocks.erase(p);
    madvise((void *)p, n, MADV_DONTNEED);
    mprotect((void *)p, n, PROT_NONE);
    count(-1, -(long long)n);
    return OK;
}

API int cuMemSetAccess(uint64_t p, size_t n, const void *, size_t) {
    BEGIN(true);
    if (!inside(p, n) || mprotect((void *)p, n, PROT_READ | PROT_WRITE))
        return INVALID;
    memset((void *)p, POISON, n);
    return OK;
}

/* Devices. */

API int cuInit(unsigned) {
    BEGIN(false);
    return OK;
}

API int cuGetErrorString(int code, const char **text) {
    static const std::map<int, const char *> names = {
        { OK, "no error" },
        { INVALID, "invalid argument" },
        { NO_MEMORY, "out of memory" },
        { NO_CONTEXT, "invalid device context" },
        { NOT_FOUND, "named symbol not found" },
        { ILLEGAL_ADDRESS, "an illegal memory access was encountered" },
        { UNKNOWN, "unknown error" },
    };
    auto found = names.find(code);
    *text = found == names.end() ? NULL : found->second;
    return found == names.end() ? INVALID : OK;
}

API int cuDeviceGetCount(int *n) {
    BEGIN(false);
    *n = (int)settings["gpus"];
    return OK;
}

API int cuDeviceGet(int *device, int i) {
    BEGIN(false);
    *device = i;
    return i < settings["gpus"] ? OK : INVALID;
}

API int cuDeviceGetName(char *name, int n, int) {
    BEGIN(false);
    snprintf(name, (size_t)n, "CPU grid");
    return OK;
}

API int cuDeviceTotalMem_v2(size_t *n, int) {
    BEGIN(false);
    *n = (size_t)settings["memory"];
    return OK;
}

API int cuDeviceGetAttribute(int *value, int attribute, int) {
    BEGIN(false);
    *value = attribute == 16    ? 4
             : attribute == 75  ? (int)settings["major"]
             : attribute == 102 ? (int)settings["maps"]
                                : 0;
    return OK;
}

API int cuDevicePrimaryCtxRetain(void **context, int) {
    BEGIN(false);
    count(1, 0);
    *context = &settings;
    return OK;
}

API int cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard<std::recursive_mutex> held(lock);
    count(-1, 0);
    return OK;
}

API int cuCtxSetCurrent(void *context) {
    BEGIN(false);
    current = context;
    return OK;
}

API int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    BEGIN(true);
    *total = (size_t)settings["memory"];
    *unused = *total - (size_t)settings["bytes"];
    return OK;
}

API int cuModuleLoadData(void **module, const void *) {
    BEGIN(true);
    count(1, 0);
    *module = &settings;
    return OK;
}

API int cuModuleUnload(void *) {
    std::lock_guard<std::recursive_mutex> held(lock);
    count(-1, 0);
    return OK;
}

API int cuModuleGetFunction(void **function, void *, const char *name) {
    BEGIN(true);
    *function = (void *)grid_find(name);
    return *function ? OK : NOT_FOUND;
}

/* Streams and graphs. */

using operation = std::function<int()>;
struct stream { std::vector<operation> queue; struct graph *capturing = NULL; };
struct graph { std::vector<operation> operations; };

API int cuStreamCreate(void **s, unsigned) {
    BEGIN(true);
    *s = new stream;
    count(1, 0);
    return OK;
}

API int cuStreamDestroy_v2(void *s) {
    std::lock_guard<std::recursive_mutex> held(lock);
    delete (stream *)s;
    count(-1, 0);
    return OK;
}

API int cuStreamSynchronize(void *s) {
    BEGIN(true);
    std::vector<operation> queue;
    queue.swap(((stream *)s)->queue);
    for (const operation &each : queue)
        if (!broken)
            broken = each();
    const int code = broken;
    broken = 0;                         /* a real one stays broken; tests go on */
    return code;
}

static int enqueue(void *s, operation o) {
    stream *to = (stream *)s;
    (to->capturing ? to->capturing->operations : to->queue).push_back(o);
    return OK;
}

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s) {
    BEGIN(true);
    return enqueue(s, [=] { return inside(to, n) ? memmove((void *)to, from, n), OK : ILLEGAL_ADDRESS; });
}

API int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *s) {
    BEGIN(true);
    return enqueue(s, [=] { return inside(from, n) ? memmove(to, (void *)from, n), OK : ILLEGAL_ADDRESS; });
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *s) {
    BEGIN(true);
    return enqueue(s, [=] {
        return inside(to, n) && inside(from, n) ? memmove((void *)to, (void *)from, n), OK : ILLEGAL_ADDRESS;
    });
}

API int cuMemsetD8Async(uint64_t p, unsigned char value, size_t n, void *s) {
    BEGIN(true);
    return enqueue(s, [=] { return inside(p, n) ? memset((void *)p, value, n), OK : ILLEGAL_ADDRESS; });
}

API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned,
                       unsigned, unsigned, void *s, void **args, void **) {
    BEGIN(true);
    const grid_kernel *kernel = (const grid_kernel *)function;
    if (!gx || !gy || !gz || !threads || threads > 1024 || gy > 65535 || gz > 65535)
        return INVALID;
    std::vector<char> copy((char *)args[0], (char *)args[0] + kernel->args);
    return enqueue(s, [=] {
        settings["launches"]++;
        grid.order = (uint32_t)settings["order"];
        grid_launch(kernel, { gx, gy, gz }, threads, copy.data());
        return OK;
    });
}

API int cuStreamBeginCapture_v2(void *s, int) {
    BEGIN(true);
    ((stream *)s)->capturing = new graph;
    count(1, 0);
    return OK;
}

API int cuStreamEndCapture(void *s, void **g) {
    std::lock_guard<std::recursive_mutex> held(lock);
    graph *captured = ((stream *)s)->capturing;
    ((stream *)s)->capturing = NULL;
    if (int code = begin(__func__, true)) {         /* what was captured is lost */
        delete captured;
        count(-1, 0);
        return code;
    }
    *g = captured;
    return captured ? OK : INVALID;
}

API int cuGraphInstantiateWithFlags(void **program, void *g, unsigned long long) {
    BEGIN(true);
    *program = new graph(*(graph *)g);
    count(1, 0);
    settings["graphs"]++;
    return OK;
}

API int cuGraphLaunch(void *program, void *s) {
    BEGIN(true);
    settings["graph_launches"]++;
    for (const operation &each : ((graph *)program)->operations)
        ((stream *)s)->queue.push_back(each);
    return OK;
}

static int delete_graph(void *g) {
    std::lock_guard<std::recursive_mutex> held(lock);
    delete (graph *)g;
    count(-1, 0);
    return OK;
}

API int cuGraphExecDestroy(void *program) { return delete_graph(program); }
API int cuGraphDestroy(void *g) { return delete_graph(g); }

#include "cublas.cpp"
