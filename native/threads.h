/* A fixed pool: the calling thread and n - 1 workers run the same function side by side.
 *
 * Callers with the same number of threads, two or more, share a pool, so that a model and its draft do not
 * each have workers that sleep while the other computes. Runs of one pool take turns. Threads of a pool
 * with more threads than cores sleep while they wait, instead of spinning. A forked process starts its own
 * workers with its first run. */
#ifndef THREADS_H
#define THREADS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct pool;

struct pool *pool_new(int n_threads);       /* NULL if the system refuses a thread */
void pool_free(struct pool *pool);
int pool_size(const struct pool *pool);

/* fn(arg, thread) on every thread, 0 being the caller; returns when all have. Not from inside a run. */
void pool_run(struct pool *pool, void (*fn)(void *arg, int thread), void *arg);

/* Within a run: no thread passes before all have arrived. */
void pool_barrier(struct pool *pool);

/* This thread's part of n things, in units of `unit`: [*from, *to). Contiguous, ascending with the thread. */
void pool_share(const struct pool *pool, int thread, int64_t n, int64_t unit, int64_t *from, int64_t *to);

/* Within a run: a part [*from, *to) of n things that no thread has taken since the last barrier; false: none
 * is left. A thread's own share comes first and is always the same, so that its core's cache holds what it
 * wrote the last time; then what others left. Parts shrink towards the end, so that a thread whose core is
 * shared with other programs does not delay the others. */
bool pool_take(struct pool *pool, int thread, int64_t n, int64_t *from, int64_t *to);

#endif
