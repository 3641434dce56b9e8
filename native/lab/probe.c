/* What memory and arithmetic cost here: the constants of the model of growth, and a kernel's rate from the
 * cache. */
#include "bmc_lab.h"
#include "clock.h"
#include "cpu.h"
#include "error.h"
#include "memory.h"
#include "pack.h"
#include "space.h"
#include "threads.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { RUNS = 5, PAGE = 4096, PIECE = 512 << 10 };

static void touch(char *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i += PAGE)
        *(volatile char *)(memory + i) = 0;
}

static double probe_map(size_t bytes) {
    double began = seconds();
    char *memory = memory_map(bytes);
    memory_unmap(memory, bytes);
    return memory ? seconds() - began : -1;
}

/* Touch it, or unmap what was touched. */
static double probe_pages(size_t bytes, bool huge, bool unmap) {
    char *memory = memory_map(bytes);
    if (!memory)
        return -1;
    if (!huge)
        use_small_pages(memory, bytes);
    double began = seconds();
    touch(memory, bytes);
    double touched = seconds();
    memory_unmap(memory, bytes);
    return unmap ? seconds() - touched : touched - began;
}

/* One page more behind it is in use, so that it cannot grow where it is. */
static double probe_remap(size_t bytes, bool huge) {
    char *memory = memory_map(bytes + PAGE);
    if (!memory)
        return -1;
    if (!huge)
        use_small_pages(memory, bytes + PAGE);
    touch(memory, bytes);
    double began = seconds();
    char *moved = space_move(memory, bytes, bytes + PAGE);
    double spent = seconds() - began;
    if (!moved)
        memory_unmap(memory, bytes + PAGE);
    else {
        memory_unmap(moved, bytes + PAGE);
        memory_unmap(memory + bytes, PAGE);
    }
    return moved ? spent : -1;
}

/* By pieces as large as the rows of one head, about. */
static double probe_copy(size_t bytes) {
    char *memory = memory_map(2 * bytes);
    if (!memory)
        return -1;
    touch(memory + bytes, bytes);
    double spent = 0;
    for (size_t i = 0, n; i < bytes; i += n) {
        n = bytes - i < PIECE ? bytes - i : PIECE;
        touch(memory + i, n);
        double began = seconds();
        memcpy(memory + i, memory + bytes + i, n);
        spent += seconds() - began;
    }
    memory_unmap(memory, 2 * bytes);
    return spent;
}

static double run_probe(int probe, size_t bytes) {
    switch (probe) {
    case BMC_PROBE_MAP:         return probe_map(bytes);
    case BMC_PROBE_TOUCH:       return probe_pages(bytes, true, false);
    case BMC_PROBE_TOUCH_SMALL: return probe_pages(bytes, false, false);
    case BMC_PROBE_UNMAP:       return probe_pages(bytes, true, true);
    case BMC_PROBE_UNMAP_SMALL: return probe_pages(bytes, false, true);
    case BMC_PROBE_REMAP:       return probe_remap(bytes, true);
    case BMC_PROBE_REMAP_SMALL: return probe_remap(bytes, false);
    default:                    return probe_copy(bytes);
    }
}

int bmc_memory_seconds(int probe, int64_t bytes, double *least) {
    if (probe < BMC_PROBE_MAP || probe > BMC_PROBE_COPY || bytes < PAGE || bytes % PAGE || bytes > 1LL << 36
        || !least)
        return fail(BMC_EINVAL, "bmc_memory_seconds: no probe %d of %lld bytes", probe, (long long)bytes);
    if ((probe == BMC_PROBE_REMAP || probe == BMC_PROBE_REMAP_SMALL) && !space_moves())
        return fail(BMC_EINVAL, "bmc_memory_seconds: this system cannot remap memory");
    *least = 1e9;
    for (int i = 0; i < RUNS; i++) {
        double spent = run_probe(probe, (size_t)bytes);
        if (spent < 0)
            return fail(BMC_ENOMEM, "no memory for measuring what memory costs");
        if (spent < *least)
            *least = spent;
    }
    return 0;
}

/* ---- arithmetic ---- */

enum { COLUMNS = 2048, PANELS = 4, PANEL_HEIGHT = 16, ROUNDS = 8 };

struct work { panel_fn *panel; struct panel_job job; size_t out_stride; };

static void multiply(void *arg, int thread) {
    const struct work *w = arg;
    struct panel_job job = w->job;
    job.out += (size_t)thread * w->out_stride;
    for (int i = 0; i < ROUNDS; i++)
        w->panel(&job);
}

/* Zeros times zeros: kernels look at no value. Everything is in the second cache after the first run. */
static double arithmetic_rate(struct work *w, struct pool *pool) {
    const double ops = 2.0 * COLUMNS * PANELS * PANEL_HEIGHT * TILE_COLS * ROUNDS * pool_size(pool);
    double least = 1e9, end = seconds() + 0.1;
    do {
        double began = seconds();
        pool_run(pool, multiply, w);
        double spent = seconds() - began;
        least = spent < least ? spent : least;
    } while (seconds() < end);
    return ops / least;
}

int bmc_arithmetic(int type, int n_threads, double *ops_per_second) {
    if (n_threads < 1 || n_threads > 1024 || !panel_runs(type) || !ops_per_second)
        return fail(BMC_EINVAL,
                    "bmc_arithmetic: expected a type that computes and 1 to 1024 threads, found %d and %d",
                    type, n_threads);
    const struct kernels *kernels = kernels_find();
    if (!kernels)
        return BMC_EINVAL;
    struct work w = { .panel = kernels->panel[type], .out_stride = TILE_COLS * PANELS * PANEL_HEIGHT };
    struct panel_size size = panel_size(type, COLUMNS);
    size_t act = TILE_COLS * COLUMNS / 32 * sizeof(struct act_block), x = TILE_COLS * COLUMNS * sizeof(float);
    size_t out = (size_t)n_threads * w.out_stride * sizeof(float);
    size_t panels = PANELS * (size.codes + size.scales);
    char *memory = memory_map(panels + act + x + out);
    struct pool *pool = memory ? pool_new(n_threads) : NULL;
    if (pool) {
        /* Pages of its own: one page of zeros everywhere upsets the caches. Weights that are usual numbers
         * as any type. */
        memset(memory, 60, panels);
        memset(memory + panels, 0, act + x + out);
        w.job = (struct panel_job){
            .codes = (uint8_t *)memory, .scales = (uint8_t *)memory + PANELS * size.codes,
            .code_stride = size.codes,
            .scale_stride = size.scales, .n_panels = PANELS, .n_rows = PANELS * PANEL_HEIGHT, .k = COLUMNS,
            .n_cols = TILE_COLS, .act = (struct act_block *)(void *)(memory + panels),
            .x = (float *)(void *)(memory + panels + act), .x_stride = COLUMNS,
            .out = (float *)(void *)(memory + panels + act + x), .out_stride = PANELS * PANEL_HEIGHT,
        };
        *ops_per_second = arithmetic_rate(&w, pool);
    }
    pool_free(pool);
    memory_unmap(memory, panels + act + x + out);
    return pool ? 0 : fail(BMC_ENOMEM, "no memory for measuring arithmetic");
}
