/* A grid of threads on the CPU, for the source of CUDA kernels. Each thread of a block is a fiber; blocks run
 * one after the other. Fibers go in ascending order or in a shuffled one, so that a missing barrier shows; a
 * barrier that not all threads reach ends the launch. Shared memory is a block of its own size on the heap,
 * filled anew for each block of threads. */
#ifndef GRID_H
#define GRID_H

#undef _FORTIFY_SOURCE          /* its longjmp allows one stack only */

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __syncthreads() grid_barrier()

struct dim3 { unsigned x, y, z; };

/* A kernel: its name, how it is called, the bytes of its arguments and of its shared memory, threads at most.
 * ptx: see ptx_grid.h. */
struct grid_kernel {
    const char *name;
    void (*call)(const void *args, void *shared);
    size_t args, shared;
    unsigned threads;
    void *ptx;
};

enum { GRID_THREADS = 1024, GRID_STACK = 128 << 10, GRID_SLOTS = 8, GRID_COPIES = 64, GRID_KERNELS = 1024 };

struct grid_copy { void *to; const void *from; size_t bytes; int group; };

struct grid_fiber {
    enum { NEW, READY, IN_WARP, IN_BLOCK, ENDED } state;
    jmp_buf at;
    dim3 index;
    int barriers;                       /* that it has come to */
    uint32_t mask;                      /* of the threads that it waits for in its warp */
    uint32_t slot[GRID_SLOTS];          /* what it gives the others of its warp */
    grid_copy copies[GRID_COPIES];      /* that are not waited for yet */
    int n_copies, group;
    char *stack;
};

static struct {
    grid_fiber fibers[GRID_THREADS], *self;
    dim3 block, block_size, size;
    jmp_buf scheduler;
    const grid_kernel *kernel;
    const void *args;
    void *shared;
    unsigned serial;                    /* of the block that runs */
    char fault[600];                    /* what went wrong in this launch, or nothing */
    uint32_t order;                     /* 0: ascending; else what the next shuffle is made of */
    grid_kernel kernels[GRID_KERNELS];
    int n_kernels;
} grid;

#define threadIdx (grid.self->index)
#define blockIdx (grid.block)
#define blockDim (grid.block_size)
#define gridDim (grid.size)

static inline bool grid_add(const char *name, void (*call)(const void *, void *), size_t args, size_t shared,
                            unsigned threads) {
    if (grid.n_kernels == GRID_KERNELS)
        abort();
    grid.kernels[grid.n_kernels++] = { name, call, args, shared, threads, NULL };
    return true;
}

static inline const grid_kernel *grid_find(const char *name) {
    for (int i = 0; i < grid.n_kernels; i++)
        if (!strcmp(grid.kernels[i].name, name))
            return &grid.kernels[i];
    return NULL;
}

/* Ends the launch, from any of its threads. */
static inline void grid_stop(const char *what) {
    snprintf(grid.fault, sizeof grid.fault, "%s", what);
    _longjmp(grid.scheduler, 1);
}

static inline void grid_wait(int state, uint32_t mask) {
    grid.self->state = (decltype(grid_fiber::state))state;
    grid.self->mask = mask;
    if (!_setjmp(grid.self->at))
        _longjmp(grid.scheduler, 1);
}
static inline void grid_barrier(void) { grid.self->barriers++; grid_wait(grid_fiber::IN_BLOCK, 0); }
static inline void __syncwarp(uint32_t mask = ~0u) { grid_wait(grid_fiber::IN_WARP, mask); }

static inline void grid_give(int slot, uint32_t x) { grid.self->slot[slot] = x; }
static inline uint32_t grid_taken(unsigned lane, int slot) {
    return (grid.fibers + (grid.self - grid.fibers) / 32 * 32)[lane].slot[slot];
}

static inline void grid_copy(void *to, const void *from, size_t bytes) {
    if (grid.self->n_copies == GRID_COPIES)
        abort();
    grid.self->copies[grid.self->n_copies++] = { to, from, bytes, grid.self->group };
}
static inline void grid_end_copies(void) { grid.self->group++; }
/* A copy is made as late as it may be. */
static inline void grid_wait_copies(int left) {
    grid_fiber *f = grid.self;
    int n = 0;
    for (int i = 0; i < f->n_copies; i++)
        if (f->copies[i].group < f->group - left)
            memcpy(f->copies[i].to, f->copies[i].from, f->copies[i].bytes);
        else
            f->copies[n++] = f->copies[i];
    f->n_copies = n;
}

static inline void grid_begin(void) {
    grid.kernel->call(grid.args, grid.shared);
    grid.self->state = grid_fiber::ENDED;
    _longjmp(grid.scheduler, 1);
}

static inline void grid_go(grid_fiber *f) {
    ucontext_t start;
    grid.self = f;
    if (_setjmp(grid.scheduler))
        return;
    if (f->state != grid_fiber::NEW)
        _longjmp(f->at, 1);
    if (!f->stack)
        f->stack = (char *)malloc(GRID_STACK);
    getcontext(&start);
    start.uc_stack.ss_sp = f->stack;
    start.uc_stack.ss_size = GRID_STACK;
    makecontext(&start, grid_begin, 0);
    setcontext(&start);
}

/* Threads of a warp go on when all of the mask wait with it. */
static inline bool grid_release_warp(grid_fiber *warp, uint32_t mask) {
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && (warp[i].state != grid_fiber::IN_WARP || warp[i].mask != mask))
            return false;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            warp[i].state = grid_fiber::READY;
    return true;
}

/* Lets those go on who all have come where they wait; false when all threads have ended. */
static inline bool grid_release(int n) {
    bool any = false, whole = true, ended = true;
    for (int i = 0; i < n; i++) {
        grid_fiber *f = &grid.fibers[i];
        any |= f->state == grid_fiber::IN_WARP && grid_release_warp(grid.fibers + i / 32 * 32, f->mask);
        whole &= f->state == grid_fiber::IN_BLOCK && f->barriers == grid.fibers[0].barriers;
        ended &= f->state == grid_fiber::ENDED && f->barriers == grid.fibers[0].barriers;
    }
    for (int i = 0; whole && i < n; i++)
        grid.fibers[i].state = grid_fiber::READY;
    if (any || whole || ended)
        return !ended;
    snprintf(grid.fault, sizeof grid.fault, "%s: block %u, %u, %u: a barrier that not all threads reach",
             grid.kernel->name, grid.block.x, grid.block.y, grid.block.z);
    return false;
}

static inline void grid_run_block(int n) {
    int at[GRID_THREADS];
    grid.serial++;
    memset(grid.shared, 0xa5, grid.kernel->shared);
    for (int i = 0; i < n; i++) {
        grid_fiber *f = &grid.fibers[i];
        f->index = { (unsigned)i, 0, 0 };
        f->state = grid_fiber::NEW;
        f->barriers = f->n_copies = f->group = 0;
        at[i] = i;
    }
    for (int i = n - 1; grid.order && i > 0; i--) {
        grid.order = grid.order * 1664525 + 1013904223;
        int k = (int)(grid.order >> 8) % (i + 1), t = at[i];
        at[i] = at[k], at[k] = t;
    }
    do
        for (volatile int i = 0; i < n; i++)
            if (grid.fibers[at[i]].state <= grid_fiber::READY && !*grid.fault)
                grid_go(&grid.fibers[at[i]]);
    while (!*grid.fault && grid_release(n));
}

/* The blocks of a launch may run in any order, so they do. What went wrong, or an empty text. */
static inline const char *grid_launch(const grid_kernel *kernel, dim3 size, unsigned threads,
                                      const void *args) {
    const unsigned n = size.x * size.y * size.z;
    const bool backwards = grid.order & 1;
    grid.kernel = kernel, grid.args = args, grid.block_size = { threads, 1, 1 }, grid.size = size;
    grid.shared = malloc(kernel->shared);
    grid.fault[0] = 0;
    for (volatile unsigned i = 0; i < n && !*grid.fault; i++) {
        const unsigned at = backwards ? n - 1 - i : i;
        grid.block = { at % size.x, at / size.x % size.y, at / size.x / size.y };
        grid_run_block((int)threads);
    }
    free(grid.shared);
    for (int i = 0; *grid.fault && i < GRID_THREADS; i++) {     /* stacks that nobody came back to */
        free(grid.fibers[i].stack);
        grid.fibers[i].stack = NULL;
    }
    return grid.fault;
}

#endif
