/* What the machine allows: how fast its memory can be read, and how fast our instructions multiply and add. */
#include "bmc.h"
#include "clock.h"
#include "cpu.h"
#include "error.h"
#include "memory.h"
#include "threads.h"

#include <stdbool.h>
#include <string.h>

/* Far larger than any cache, so that nothing of it is there when it is read again. */
static const int64_t ROOF_BYTES = 512 << 20;
enum { ROOF_RUNS = 5 };

struct roof { struct pool *pool; const char *memory; atomic_uint_fast64_t sum; };

/* Two streams a thread: one alone is a tenth slower than our own passes, which read codes and scales. */
static void read_share(void *arg, int thread) {
    struct roof *roof = arg;
    int64_t from, to;
    uint64_t sums[8] = { 0 };
    pool_share(roof->pool, thread, ROOF_BYTES, 1 << 21, &from, &to);
    for (int64_t i = from, half = (to - from) / 2; i < from + half; i += 64)
        for (int stream = 0; stream < 2; stream++) {
            uint64_t line[8];
            memcpy(line, roof->memory + i + stream * half, sizeof line);
            __builtin_prefetch(roof->memory + i + stream * half + 2048);
            for (int j = 0; j < 8; j++)
                sums[j] += line[j];
        }
    for (int j = 0; j < 8; j++)
        atomic_fetch_add(&roof->sum, sums[j]);
}

int bmc_read_bandwidth(int n_threads, double *bytes_per_second) {
    if (n_threads < 1 || n_threads > 1024 || !bytes_per_second)
        return fail(BMC_EINVAL, "bmc_read_bandwidth: expected 1 to 1024 threads, found %d", n_threads);
    char *memory = memory_map((size_t)ROOF_BYTES, true);
    struct roof roof = { .pool = pool_new(n_threads), .memory = memory };
    bool ready = memory && roof.pool;
    double best = 0;
    if (ready)
        memset(memory, 1, (size_t)ROOF_BYTES);
    for (int i = 0; ready && i < ROOF_RUNS; i++) {
        double start = seconds();
        pool_run(roof.pool, read_share, &roof);
        double rate = (double)ROOF_BYTES / (seconds() - start);
        best = rate > best ? rate : best;
    }
    pool_free(roof.pool);
    memory_unmap(memory, (size_t)ROOF_BYTES);
    *bytes_per_second = best;
    return ready ? 0 : fail(BMC_ENOMEM, "no memory for measuring the bandwidth");
}

struct spin { int64_t (*fn)(int64_t n, float *sink); int64_t rounds; atomic_int_fast64_t products; };

static void spin_share(void *arg, int thread) {
    struct spin *spin = arg;
    float sink[16];
    (void)thread;
    atomic_fetch_add(&spin->products, spin->fn(spin->rounds, sink));
}

/* Long enough that the system has spread the threads over the cores. */
static const double SPIN_SECONDS = 0.04;

/* Products a second, the best of some runs. */
static double spin_rate(struct pool *pool, int64_t (*fn)(int64_t n, float *sink)) {
    double best = 0, took = 0;
    struct spin spin = { .fn = fn, .rounds = 1000 };
    for (int i = 0; i < ROOF_RUNS; i += took >= SPIN_SECONDS) {
        double start = seconds();
        atomic_store(&spin.products, 0);
        pool_run(pool, spin_share, &spin);
        took = seconds() - start;
        if (took < SPIN_SECONDS)
            spin.rounds *= 2;
        else if ((double)spin.products / took > best)
            best = (double)spin.products / took;
    }
    return best;
}

int bmc_arithmetic_rate(int n_threads, double *int8, double *f32) {
    struct kernels k;
    if (n_threads < 1 || n_threads > 1024 || !int8 || !f32)
        return fail(BMC_EINVAL, "bmc_arithmetic_rate: expected 1 to 1024 threads, found %d", n_threads);
    int status = kernels_init(&k);
    if (status)
        return status;
    struct pool *pool = pool_new(n_threads);
    if (!pool)
        return fail(BMC_ENOMEM, "no memory for %d threads", n_threads);
    *int8 = spin_rate(pool, k.spin_int8);
    *f32 = spin_rate(pool, k.spin_f32);
    pool_free(pool);
    return 0;
}
