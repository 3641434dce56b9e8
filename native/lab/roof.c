/* What the machine allows: how fast its memory can be read, and how fast our instructions multiply and
 * add. */
#include "bmc_lab.h"
#include "clock.h"
#include "cpu.h"
#include "error.h"
#include "kernels/inline.h"
#include "memory.h"
#include "spins.h"
#include "threads.h"

#include <stdbool.h>
#include <string.h>

/* Far larger than any cache, so that nothing of it is there when it is read again. Half of it is no power
 * of two: streams so far apart meet in the same banks, and one core of a Zen 4 reads 20 GB/s instead of
 * 34. */
static const int64_t ROOF_BYTES = 528 << 20;
enum { ROOF_RUNS = 5 };

struct roof { struct pool *pool; const char *memory; bool ahead; atomic_uint_fast64_t sum; };
typedef uint64_t line __attribute__((vector_size(64)));

/* Two streams: one alone is a tenth slower than our own passes, which read codes and scales. */
INLINE uint64_t read_lines(const char *memory, int64_t bytes, const bool ahead) {
    line sum = { 0 };
    for (int64_t i = 0, half = bytes / 2; i < half; i += 64)
        for (int stream = 0; stream < 2; stream++) {
            const char *from = memory + i + stream * half;
            line next;
            memcpy(&next, from, sizeof next);
            if (ahead)
                __builtin_prefetch(from + 2048);
            sum += next;
        }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

/* Prefetching helps some cores and slows others: every other run does without. */
static void read_share(void *arg, int thread) {
    struct roof *roof = arg;
    int64_t from, to;
    pool_share(roof->pool, thread, ROOF_BYTES, 1 << 21, &from, &to);
    const char *memory = roof->memory + from;
    atomic_fetch_add(&roof->sum, roof->ahead ? read_lines(memory, to - from, true)
                                             : read_lines(memory, to - from, false));
}

int bmc_read_bandwidth(int n_threads, double *bytes_per_second) {
    if (n_threads < 1 || n_threads > 1024 || !bytes_per_second)
        return fail(BMC_EINVAL, "bmc_read_bandwidth: expected 1 to 1024 threads, found %d", n_threads);
    char *memory = memory_map((size_t)ROOF_BYTES);
    struct roof roof = { .pool = pool_new(n_threads), .memory = memory };
    bool ready = memory && roof.pool;
    double best = 0;
    if (ready)
        memset(memory, 1, (size_t)ROOF_BYTES);
    for (int i = 0; ready && i < ROOF_RUNS; i++) {
        double start = seconds();
        roof.ahead = i % 2 == 0;
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

/* Those of the instruction set in use. */
static const struct spins *find_spins(const char *name) {
    static const struct { const char *name; const struct spins *spins; } known[] = {
        { "ref", &spins_ref },
#if defined(__x86_64__)
        { "avx2", &spins_avx2 }, { "avx512", &spins_avx512 },
#elif defined(__aarch64__)
        { "neon", &spins_neon }, { "i8mm", &spins_i8mm },
#endif
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, name))
            return known[i].spins;
    return NULL;
}

int bmc_arithmetic_rate(int n_threads, double *int8, double *f32) {
    if (n_threads < 1 || n_threads > 1024 || !int8 || !f32)
        return fail(BMC_EINVAL, "bmc_arithmetic_rate: expected 1 to 1024 threads, found %d", n_threads);
    const struct kernels *k = kernels_find();
    if (!k)
        return BMC_EINVAL;
    const struct spins *spins = find_spins(k->name);
    struct pool *pool = spins ? pool_new(n_threads) : NULL;
    if (!pool)
        return fail(BMC_ENOMEM, "no memory for %d threads", n_threads);
    *int8 = spin_rate(pool, spins->int8);
    *f32 = spin_rate(pool, spins->f32);
    pool_free(pool);
    return 0;
}
