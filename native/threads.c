#include "threads.h"

#include "cores.h"
#include "fork.h"

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define pause_cpu() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_cpu() __asm__ volatile("yield")
#else
#define pause_cpu() ((void)0)
#endif

/* How often a waiting thread polls before it sleeps. Within a run about 50 us: on a busy machine the thread
 * it waits for may need this core. Between runs about 2 ms: that covers showing tokens and preparing the next
 * call, and waking up takes longer than a barrier of a small model, on a core that has slowed down. With more
 * threads than cores a spinning thread occupies the core that the other one needs, so it sleeps at once. */
enum { PATIENCE = 1500, IDLE_PATIENCE = 60000 };

struct pool {
    int n;
    pthread_t *workers;
    void (*fn)(void *, int);
    void *arg;
    bool stop;
    bool crowded;                           /* more threads than cores */
    bool alone;                             /* forked: the workers stayed in the parent */
    int users;                              /* counted, as `next` is set, while forks are held */
    struct pool *next;                      /* in `shared` */
    struct forkable forkable;
    pthread_mutex_t turn;                   /* held during a run */
    _Alignas(64) atomic_uint run;           /* number of the current run */
    _Alignas(64) atomic_uint done;          /* workers that finished it */
    _Alignas(64) atomic_uint arrived;       /* at the barrier */
    _Alignas(64) atomic_uint passed;        /* barriers gone through */
    _Alignas(64) pthread_mutex_t lock;      /* for sleeping only */
    pthread_cond_t wake;
    atomic_int asleep;
    /* Of each thread's own things: step << 32 | how many. */
    struct own { _Alignas(64) atomic_uint_fast64_t taken; } own[];
};

struct worker { struct pool *pool; int thread; };

static struct pool *shared;

static bool comes(atomic_uint *value, unsigned old, int patience) {
    for (int i = 0; i < patience; i++) {
        if (atomic_load_explicit(value, memory_order_acquire) != old)
            return true;
        pause_cpu();
    }
    return false;
}

/* Waits until *value is no longer old. */
static void await(struct pool *p, atomic_uint *value, unsigned old, int patience) {
    if (comes(value, old, p->crowded ? 1 : patience))
        return;
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->asleep, 1);
    while (atomic_load(value) == old)
        pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->asleep, 1);
    pthread_mutex_unlock(&p->lock);
}

/* Increments *value and wakes the threads that wait for it. */
static void announce(struct pool *p, atomic_uint *value) {
    atomic_fetch_add(value, 1);
    if (!atomic_load(&p->asleep))
        return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void *work(void *arg) {
    struct worker me = *(struct worker *)arg;
    struct pool *p = me.pool;
    free(arg);
    for (unsigned seen = 0;; seen++) {
        await(p, &p->run, seen, IDLE_PATIENCE);
        if (p->stop)
            return NULL;
        p->fn(p->arg, me.thread);
        announce(p, &p->done);
    }
}

static bool start_worker(struct pool *p, int thread) {
    struct worker *w = malloc(sizeof *w);
    if (!w)
        return false;
    *w = (struct worker){ p, thread };
    if (!pthread_create(&p->workers[thread], NULL, work, w))
        return true;
    free(w);
    return false;
}

/* Workers for threads 1 to wanted - 1; n is how many threads there are then. */
static void start_workers(struct pool *p, int wanted) {
    sigset_t all, before;                       /* the caller's thread handles signals */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (p->n = 1; p->n < wanted && start_worker(p, p->n); p->n++)
        ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Locks and counters of a pool without workers. */
static void prepare(struct pool *p) {
    pthread_mutex_init(&p->turn, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    atomic_uint *const counters[] = { &p->run, &p->done, &p->arrived, &p->passed };
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        atomic_init(counters[i], 0);
    atomic_init(&p->asleep, 0);
    for (int i = 0; i < p->n; i++)
        atomic_init(&p->own[i].taken, 0);
}

/* In a forked process there are no workers, and no run is under way. */
static void renew(struct forkable *f) {
    struct pool *p = (struct pool *)(void *)((char *)f - offsetof(struct pool, forkable));
    prepare(p);
    p->alone = true;
}

void pool_run(struct pool *p, void (*fn)(void *, int), void *arg) {
    pthread_mutex_lock(&p->turn);
    if (p->alone) {
        p->alone = false;
        /* If the system refuses some: results do not depend on their number. */
        start_workers(p, p->n);
    }
    if (p->n == 1) {
        atomic_fetch_add_explicit(&p->run, 1, memory_order_relaxed);
        fn(arg, 0);
        pthread_mutex_unlock(&p->turn);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    atomic_store(&p->done, 0);
    announce(p, &p->run);
    fn(arg, 0);
    for (unsigned done; (done = atomic_load(&p->done)) < (unsigned)p->n - 1;)
        await(p, &p->done, done, PATIENCE);
    pthread_mutex_unlock(&p->turn);
}

void pool_barrier(struct pool *p) {
    unsigned pass = atomic_load_explicit(&p->passed, memory_order_relaxed);
    if (p->n == 1)
        atomic_store_explicit(&p->passed, pass + 1, memory_order_relaxed);
    else if (atomic_fetch_add(&p->arrived, 1) + 1 == (unsigned)p->n) {
        atomic_store(&p->arrived, 0);
        announce(p, &p->passed);
    } else
        await(p, &p->passed, pass, PATIENCE);
}

void pool_share(const struct pool *p, int thread, int64_t n, int64_t unit, int64_t *from, int64_t *to) {
    int64_t units = (n + unit - 1) / unit;
    *from = units * thread / p->n * unit;
    *to = units * (thread + 1) / p->n * unit;
    if (*to > n)
        *to = n;
    if (*from > *to)
        *from = *to;
}

/* Half of what is left of a thread's own share of n things. A count from an earlier step is ignored: steps
 * are separated by a barrier or by the end of the run. */
static bool take_of(struct pool *p, int thread, uint64_t step, int64_t n, int64_t *from, int64_t *to) {
    atomic_uint_fast64_t *taken = &p->own[thread].taken;
    uint_fast64_t seen = atomic_load_explicit(taken, memory_order_relaxed);
    int64_t begin, end, at;
    pool_share(p, thread, n, 1, &begin, &end);
    do {
        at = begin + (seen >> 32 == step ? (int64_t)(seen & UINT32_MAX) : 0);
        if (at >= end)
            return false;
        *to = at + (end - at + 1) / 2;
    } while (!atomic_compare_exchange_weak_explicit(taken, &seen, step << 32 | (uint64_t)(*to - begin),
                                                    memory_order_relaxed, memory_order_relaxed));
    *from = at;
    return true;
}

bool pool_take(struct pool *p, int thread, int64_t n, int64_t *from, int64_t *to) {
    uint64_t step = (uint32_t)(atomic_load_explicit(&p->run, memory_order_relaxed)
                               + atomic_load_explicit(&p->passed, memory_order_relaxed));
    for (int i = 0; i < p->n; i++)
        if (take_of(p, (thread + i) % p->n, step, n, from, to))
            return true;
    return false;
}

int pool_size(const struct pool *p) { return p->n; }

/* Ends the workers and frees what there is. */
static void dissolve(struct pool *p) {
    if (!p->alone) {
        p->stop = true;
        announce(p, &p->run);
        for (int i = 1; i < p->n; i++)
            pthread_join(p->workers[i], NULL);
    }
    pthread_mutex_destroy(&p->turn);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    free(p->workers);
    free(p);
}

static struct pool *gather(int n_threads) {
    struct pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64 + (size_t)n_threads * sizeof *p->own);
    if (!p)
        return NULL;
    *p = (struct pool){ .n = n_threads, .crowded = n_threads > cpu_count(), .forkable = { .renew = renew },
                        .workers = calloc((size_t)n_threads, sizeof(pthread_t)) };
    prepare(p);
    start_workers(p, p->workers ? n_threads : 1);
    if (p->workers && p->n == n_threads)
        return p;
    dissolve(p);
    return NULL;
}

struct pool *pool_new(int n_threads) {
    fork_hold();
    struct pool *p = n_threads > 1 ? shared : NULL;
    while (p && p->n != n_threads)
        p = p->next;
    if (!p && (p = gather(n_threads))) {
        p->next = shared;
        shared = p;
        fork_add(&p->forkable);
    }
    if (p)
        p->users++;
    fork_release();
    return p;
}

void pool_free(struct pool *p) {
    if (!p)
        return;
    fork_hold();
    bool last = --p->users == 0;
    if (last) {
        struct pool **link = &shared;
        while (*link != p)
            link = &(*link)->next;
        *link = p->next;
        fork_remove(&p->forkable);
    }
    fork_release();
    if (last)
        dissolve(p);
}
