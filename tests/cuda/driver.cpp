/* A CUDA driver without a GPU: a library of libcuda's names that runs the kernels on the grid of grid.h. It
 * is stricter than a real one.
 *
 * What is queued happens when the stream is awaited, or an event of it, so that a host buffer that is used
 * again too early shows. With "eager" copies to the device happen as soon as their stream's order allows, so
 * that one that does not wait for a kernel shows. Fresh memory is full of NaN. Addresses are checked, and so
 * is the context of the thread. Any call can be made to fail. Tests set it by fake_set() and ask
 * fake_get().
 *
 * A module is the kernels that are compiled into this library; but where it is loaded from the text of PTX,
 * those of the text, which ptx.h runs. */
#include "ptx_grid.h"

#include "../../native/cuda/kernels.cu"

#include <algorithm>
#include <deque>
#include <functional>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum {
    OK = 0,
    INVALID = 1,
    NO_MEMORY = 2,
    NOT_READY = 3,
    BUSY = 46,
    NO_CONTEXT = 201,
    NO_PTX = 222,
    NOT_FOUND = 500,
    CONTEXT_ENDED = 709,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALID = 901,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    UNKNOWN = 999
};
enum { POISON = 0xff, PAGE = 2 << 20 };

static std::recursive_mutex lock;

/* What tests set: how many GPUs there are, their capability and memory, whether they map memory, the order of
 * the grid, and which call from now on fails: 0: none. What they ask: calls so far, objects alive, launches
 * of graphs and of kernels. module_code: what loading kernels comes to. stays_broken: as a real one, all
 * calls fail after a queued operation has. busy: 1: another process has GPU 0 for itself. capture_us: how
 * long the beginning of a capture takes, so that other threads come in between. */
static std::map<std::string, long long> settings = {
    { "gpus", 1 },    { "major", 9 },           { "maps", 1 },           { "order", 0 },
    { "fail_in", 0 }, { "fail_code", UNKNOWN }, { "memory", 4ll << 30 }, { "calls", 0 },
    { "alive", 0 },   { "bytes", 0 },           { "graph_launches", 0 }, { "launches", 0 },
    { "graphs", 0 },  { "module_code", 0 },     { "stays_broken", 0 },   { "capture_us", 0 },
    { "busy", 0 },    { "eager", 0 },           { "registers", 1 },      { "registered", 0 },
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
static int contexts;                    /* how often the GPU's is retained */
static std::string failed;              /* the name of the call that was made to fail */
static std::string fault;               /* what stopped a kernel last */
static int broken;                      /* a queued operation failed: so does everything after it */

API const char *fake_failed(void) { return failed.c_str(); }

/* Each call goes through here; `needs`: a context. */
static int begin(const char *name, bool needs) {
    settings["calls"]++;
    if (settings["fail_in"] > 0 && --settings["fail_in"] == 0) {
        failed = name;
        return (int)settings["fail_code"];
    }
    if (broken && settings["stays_broken"])
        return broken;
    return !needs ? OK : !current ? NO_CONTEXT : !contexts ? CONTEXT_ENDED : OK;
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

/* The same for kernels, which ask often: the block that was found last is tried first. */
static struct { uint64_t from, to; } nearest;
static bool inside_nearest(uint64_t p, size_t n) {
    if (p >= nearest.from && p + n <= nearest.to)
        return true;
    const auto after = blocks.upper_bound(p);
    nearest = {};
    if (after != blocks.begin())
        nearest = { std::prev(after)->first, std::prev(after)->first + std::prev(after)->second };
    return p >= nearest.from && p + n <= nearest.to;
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

static std::map<uint64_t, size_t> pinned;

/* No copy may begin in pinned memory and end outside. */
static bool straddles(uint64_t p, size_t n) {
    auto after = pinned.upper_bound(p);
    if (after == pinned.begin())
        return after != pinned.end() && p + n > after->first;
    auto before = std::prev(after);
    const uint64_t end = before->first + before->second;
    return (p < end && p + n > end) || (after != pinned.end() && p < after->first && p + n > after->first);
}

/* With "registers" 0: memory that the driver cannot pin. */
API int cuMemHostRegister_v2(void *p, size_t n, unsigned) {
    BEGIN(true);
    if (!settings["registers"] || !n || pinned.count((uint64_t)p))
        return settings["registers"] ? INVALID : NO_MEMORY;
    pinned[(uint64_t)p] = n;
    settings["registered"] += (long long)n;
    count(1, 0);
    return OK;
}

API int cuMemHostUnregister(void *p) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (!pinned.count((uint64_t)p))
        return INVALID;
    settings["registered"] -= (long long)pinned[(uint64_t)p];
    pinned.erase((uint64_t)p);
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

API int cuDriverGetVersion(int *version) {
    BEGIN(false);
    *version = 12040;
    return OK;
}

API int cuInit(unsigned) {
    BEGIN(false);
    return OK;
}

API int cuGetErrorString(int code, const char **text) {
    const std::map<int, const char *> names = {
        { OK, "no error" },
        { INVALID, "invalid argument" },
        { NO_MEMORY, "out of memory" },
        { NO_CONTEXT, "invalid device context" },
        { BUSY, "CUDA-capable device(s) is/are busy or unavailable" },
        { NO_PTX, "the provided PTX was compiled with an unsupported toolchain." },
        { NOT_FOUND, "named symbol not found" },
        { CONTEXT_ENDED, "context is destroyed" },
        { CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing" },
        { CAPTURE_INVALID, "operation failed due to a previous error during capture" },
        { ILLEGAL_ADDRESS, "an illegal memory access was encountered" },
        { LAUNCH_FAILED, fault.c_str() },
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

API int cuDevicePrimaryCtxRetain(void **context, int device) {
    BEGIN(false);
    if (settings["busy"] && !device)
        return BUSY;
    count(1, 0);
    contexts++;
    *context = &settings;
    return OK;
}

API int cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard<std::recursive_mutex> held(lock);
    count(-1, 0);
    if (!--contexts)
        broken = 0;
    return OK;
}

API int cuCtxGetCurrent(void **context) {
    BEGIN(false);
    *context = current;
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

API int cuModuleLoadData(void **module, const void *image) {
    BEGIN(true);
    if (settings["module_code"])
        return (int)settings["module_code"];
    ptx_module *loaded = new ptx_module;
    if (!memcmp(image, "//", 2))
        fault = ptx_load("PTX", (const char *)image, *loaded);
    if (!memcmp(image, "//", 2) && !fault.empty()) {
        delete loaded;
        return LAUNCH_FAILED;
    }
    count(1, 0);
    *module = loaded;
    return OK;
}

API int cuModuleUnload(void *module) {
    std::lock_guard<std::recursive_mutex> held(lock);
    delete (ptx_module *)module;
    count(-1, 0);
    return OK;
}

API int cuModuleGetFunction(void **function, void *module, const char *name) {
    BEGIN(true);
    const ptx_module *of = (const ptx_module *)module;
    *function = (void *)(of->kernels.empty() ? grid_find(name) : of->find(name));
    return *function ? OK : NOT_FOUND;
}

/* Streams and graphs. */

/* A step with `of` waits until that event was recorded `wait` times, and all before it is done. */
using operation = std::function<int()>;
struct event { struct stream *in = NULL; long long recorded = 0, done = 0; };
struct step { operation run; event *of = NULL; long long wait = 0; bool eager = false, records = false; };
struct stream {
    std::deque<step> queue;
    struct graph *capturing = NULL;
    std::thread::id by;                 /* the thread that captures */
    bool spoiled = false;
};
struct graph { std::vector<operation> operations; };

static bool ready(const step &s) { return !s.of || s.of->done >= s.wait; }

/* Does the first step of a stream, after those of other streams that it waits for. */
static void advance(stream *s) {
    const step first = s->queue.front();
    s->queue.pop_front();
    while (!ready(first) && !first.of->in->queue.empty())
        advance(first.of->in);
    if (!broken && first.run)
        broken = first.run();
}

/* Copies whose turn it is. */
static void hurry(stream *s) {
    while (settings["eager"] && !s->queue.empty() && s->queue.front().eager && ready(s->queue.front()))
        advance(s);
}

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
    std::lock_guard<std::recursive_mutex> held(lock);
    stream *of = (stream *)s;
    if (int code = begin(__func__, true)) {         /* what was queued is lost, and nothing waits for it */
        for (const step &each : of->queue)
            if (each.records)
                each.run();
        of->queue.clear();
        return code;
    }
    if (of->capturing) {
        of->spoiled = true;
        return CAPTURE_UNSUPPORTED;
    }
    while (!of->queue.empty())
        advance(of);
    const int code = broken;
    if (!settings["stays_broken"])
        broken = 0;                     /* most tests go on */
    return code;
}

static int enqueue(void *s, operation o, bool eager = false) {
    stream *to = (stream *)s;
    if (to->capturing && to->by != std::this_thread::get_id())
        to->spoiled = true;             /* a real one makes it a part of the graph, which is worse */
    if (to->capturing)
        to->capturing->operations.push_back(o);
    else
        to->queue.push_back({ o, NULL, 0, eager });
    hurry(to);
    return OK;
}

API int cuEventCreate(void **e, unsigned) {
    BEGIN(true);
    *e = new event;
    count(1, 0);
    return OK;
}

API int cuEventDestroy_v2(void *e) {
    std::lock_guard<std::recursive_mutex> held(lock);
    delete (event *)e;
    count(-1, 0);
    return OK;
}

API int cuEventRecord(void *e, void *s) {
    BEGIN(true);
    event *of = (event *)e;
    const long long n = ++of->recorded;
    of->in = (stream *)s;
    of->in->queue.push_back({ [=] { return of->done = n, OK; }, NULL, 0, true, true });
    hurry(of->in);
    return OK;
}

/* Of an event that was never recorded: nothing. */
API int cuStreamWaitEvent(void *s, void *e, unsigned) {
    BEGIN(true);
    ((stream *)s)->queue.push_back({ NULL, (event *)e, ((event *)e)->recorded, true });
    hurry((stream *)s);
    return OK;
}

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s) {
    BEGIN(true);
    if (straddles((uint64_t)from, n))
        return INVALID;
    const operation copy = [=] { return inside(to, n) ? memmove((void *)to, from, n), OK : ILLEGAL_ADDRESS; };
    return enqueue(s, copy, true);
}

/* Rows between the host (1) and the device (2). */
API int cuMemcpy2DAsync_v2(const cuda_copy2d *copy, void *s) {
    BEGIN(true);
    const cuda_copy2d c = *copy;
    const cuda_side sides[] = { c.from, c.to };
    for (const cuda_side &side : sides)
        if (side.pitch < c.width || (side.type != 1 && side.type != 2) || side.x || side.y
            || (side.type == 1 && straddles(side.host, (c.height - 1) * side.pitch + c.width)))
            return INVALID;
    return enqueue(s, [=] {
        uint64_t at[2];
        for (size_t i = 0; i < c.height; i++) {
            for (int k = 0; k < 2; k++) {
                const cuda_side &side = k ? c.to : c.from;
                at[k] = (side.type == 1 ? side.host : side.device) + i * side.pitch;
                if (side.type == 2 && !inside(at[k], c.width))
                    return ILLEGAL_ADDRESS;
            }
            memmove((void *)at[1], (void *)at[0], c.width);
        }
        return OK;
    }, c.from.type == 1);
}

API int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *s) {
    BEGIN(true);
    if (straddles((uint64_t)to, n))
        return INVALID;
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
    if (!gx || !gy || !gz || gx > 0x7fffffff || gy > 65535 || gz > 65535 || !threads
        || threads > kernel->threads)
        return INVALID;
    std::vector<char> copy((char *)args[0], (char *)args[0] + kernel->args);
    return enqueue(s, [=] {
        settings["launches"]++;
        grid.order = (uint32_t)settings["order"];
        nearest = {};
        ptx_is_global = inside_nearest;
        const char *wrong = grid_launch(kernel, { gx, gy, gz }, threads, copy.data());
        if (*wrong)
            fault = wrong;
        return *wrong ? LAUNCH_FAILED : OK;
    });
}

API int cuStreamBeginCapture_v2(void *s, int) {
    {
        BEGIN(true);
        stream *of = (stream *)s;
        of->capturing = new graph;
        of->by = std::this_thread::get_id();
        of->spoiled = false;
        count(1, 0);
    }
    if (settings["capture_us"])
        std::this_thread::sleep_for(std::chrono::microseconds(settings["capture_us"]));
    return OK;
}

API int cuStreamEndCapture(void *s, void **g) {
    std::lock_guard<std::recursive_mutex> held(lock);
    graph *captured = ((stream *)s)->capturing;
    ((stream *)s)->capturing = NULL;
    int code = begin(__func__, true);
    if (!code && ((stream *)s)->spoiled)
        code = CAPTURE_INVALID;
    if (code) {                                     /* what was captured is lost */
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
        ((stream *)s)->queue.push_back({ each });
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
