/* The pool: every thread runs, nobody passes a barrier early, every item is somebody's and only once, and all
 * of that in a forked process too. */
#include "check.h"
#include "cores.h"
#include "threads.h"

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 6, PHASES = 60, RUNS = 20 };

struct walk {
    struct pool *pool;
    int ran[MOST];
    int at[MOST];               /* each thread's phase: written by one, read by all between barriers */
    atomic_int wrong;
};

static void phases(void *arg, int thread) {
    struct walk *w = arg;
    w->ran[thread]++;
    for (int phase = 1; phase <= PHASES; phase++) {
        w->at[thread] = phase;
        pool_barrier(w->pool);
        for (int i = 0; i < pool_size(w->pool); i++)
            if (w->at[i] != phase)
                atomic_fetch_add(&w->wrong, 1);
        pool_barrier(w->pool);
    }
}

static void barriers_hold(int n) {
    struct walk w = { .pool = pool_new(n) };
    CHECK(w.pool && pool_size(w.pool) == n);
    for (int run = 1; run <= 5; run++) {
        pool_run(w.pool, phases, &w);
        for (int i = 0; i < MOST; i++)
            CHECK(w.ran[i] == (i < n ? run : 0));
    }
    CHECK(!w.wrong);
    pool_free(w.pool);
}

static void count(void *arg, int thread) { ((int *)arg)[64 * thread]++; }       /* no cache line in common */

/* Runs close on each other, and runs that find every worker asleep. */
static void runs_are_whole(int n) {
    struct pool *pool = pool_new(n);
    int counts[64 * MOST] = { 0 };
    for (int run = 1; run <= 120; run++) {
        pool_run(pool, count, counts);
        if (run % 30 == 0)
            nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
        for (int i = 0; i < n; i++)
            CHECK(counts[64 * i] == run);
    }
    pool_free(pool);
}

struct items { struct pool *pool; int64_t n, unit; int taken[300]; };

static void take(void *arg, int thread) {
    struct items *t = arg;
    int64_t from, to;
    pool_share(t->pool, thread, t->n, t->unit, &from, &to);
    for (int64_t i = from; i < to; i++)
        t->taken[i]++;
}

static void shares_are_whole(int n) {
    struct items t = { .pool = pool_new(n) };
    for (t.n = 0; t.n < 300; t.n += 1 + t.n / 5)
        for (t.unit = 1; t.unit <= 64; t.unit *= 4) {
            int64_t end = 0, from, to;
            memset(t.taken, 0, sizeof t.taken);
            pool_run(t.pool, take, &t);
            for (int i = 0; i < 300; i++)
                CHECK(t.taken[i] == (i < t.n));
            for (int thread = 0; thread < n; thread++) {
                pool_share(t.pool, thread, t.n, t.unit, &from, &to);
                CHECK(from <= to && (from == to || (from == end && from % t.unit == 0)));
                end = from == to ? end : to;
            }
            CHECK(end == t.n);
        }
    pool_free(t.pool);
}

static void take_in_turn(void *arg, int thread) {
    struct items *t = arg;
    int64_t from, to;
    for (int step = 0; step < 3; step++) {
        while (pool_take(t->pool, thread, t->n, &from, &to))
            for (; from < to; from++)
                t->taken[from]++;
        pool_barrier(t->pool);
        if (thread == 0)
            for (int i = 0; i < 300; i++)
                CHECK(t->taken[i] == (i < t->n ? step + 1 : 0));
        pool_barrier(t->pool);
    }
}

static void what_is_taken_is_whole(int n) {
    struct items t = { .pool = pool_new(n) };
    for (t.n = 0; t.n < 300; t.n += 1 + t.n / 5) {
        memset(t.taken, 0, sizeof t.taken);
        pool_run(t.pool, take_in_turn, &t);
    }
    pool_free(t.pool);
}

/* Nobody who has something of its own left takes from others, and with a barrier
 * everything is there again. */
static void take_once(void *arg, int thread) {
    struct items *t = arg;
    int64_t from, to, begin, end;
    pool_share(t->pool, thread, t->n, 1, &begin, &end);
    for (int step = 0; step < 3; step++) {
        CHECK(pool_take(t->pool, thread, t->n, &from, &to) && from == begin
              && to == begin + (end - begin + 1) / 2);
        pool_barrier(t->pool);
    }
}

static void ones_own_comes_first(int n) {
    struct items t = { .pool = pool_new(n) };
    for (t.n = n; t.n < 300; t.n += 1 + t.n / 3)
        for (int run = 0; run < 3; run++)
            pool_run(t.pool, take_once, &t);
    pool_free(t.pool);
}

/* Threads of this process that sleep, by the state that Linux gives each of them. */
static int sleeping(void) {
    int n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *task; tasks && (task = readdir(tasks));) {
        char path[300], state = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/stat", task->d_name);
        FILE *f = fopen(path, "r");
        if (f) {
            n += fscanf(f, "%*d (%*[^)]) %c", &state) == 1 && state == 'S';
            fclose(f);
        }
    }
    if (tasks)
        closedir(tasks);
    return n;
}

/* A thread that spins is never seen asleep. */
static void wait_for_sleep(int workers) {
    for (int looks = 0; access("/proc/self/task", R_OK) == 0 && sleeping() < workers; looks++) {
        CHECK(looks < 10000);
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
}

static void idle_workers_sleep(void) {
    enum { WORKERS = 3 };
    struct pool *pool = pool_new(WORKERS + 1);
    int counts[64 * MOST] = { 0 };
    pool_run(pool, count, counts);
    wait_for_sleep(WORKERS);
    pool_free(pool);
}

struct caller { struct walk walk; atomic_bool stop; };

static void *call(void *arg) {
    struct caller *c = arg;
    for (int run = 0; run < RUNS; run++)
        pool_run(c->walk.pool, phases, &c->walk);
    return NULL;
}

/* Two models of as many threads: the same workers, and their runs take turns. */
static void users_take_turns(void) {
    struct caller callers[2] = { { .walk.pool = pool_new(3) }, { .walk.pool = pool_new(3) } };
    struct pool *other = pool_new(2);
    CHECK(callers[0].walk.pool == callers[1].walk.pool && other != callers[0].walk.pool);
    pool_free(other);
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, call, &callers[0]));
    call(&callers[1]);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++) {
        CHECK(!callers[i].walk.wrong && callers[i].walk.ran[2] == RUNS);
        pool_free(callers[i].walk.pool);
    }
}

static void *take_alone(void *arg) {
    struct items t = { .pool = pool_new(1), .n = 300 };
    (void)arg;
    for (int run = 0; run < 5000; run++) {
        memset(t.taken, 0, sizeof t.taken);
        pool_run(t.pool, take_in_turn, &t);
    }
    pool_free(t.pool);
    return NULL;
}

/* Two models of one thread each, used at the same time: neither takes the other's items. */
static void single_threads_are_apart(void) {
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, take_alone, NULL));
    take_alone(NULL);
    pthread_join(thread, NULL);
}

static void more_threads_than_cores_take_turns(void) {
    struct pool *pool = pool_new(cpu_count() + 4);
    int *counts = calloc((size_t)pool_size(pool), 64 * sizeof *counts);
    for (int run = 1; run <= 40; run++)
        pool_run(pool, count, counts);
    wait_for_sleep(pool_size(pool) - 1);
    for (int i = 0; i < pool_size(pool); i++)
        CHECK(counts[64 * i] == 40);
    free(counts);
    pool_free(pool);
}

static void *call_until_stopped(void *arg) {
    struct caller *c = arg;
    while (!atomic_load(&c->stop))
        pool_run(c->walk.pool, phases, &c->walk);
    return NULL;
}

static void in_the_child(struct pool *pool) {
    alarm(20);
    struct walk w = { .pool = pool }, own = { .pool = pool_new(4) };
    for (int run = 1; run <= 3; run++) {
        pool_run(w.pool, phases, &w);
        pool_run(own.pool, phases, &own);
    }
    CHECK(w.ran[2] == 3 && !w.wrong && own.ran[3] == 3 && !own.wrong);
    pool_free(own.pool);
    pool_free(pool);
    _exit(0);
}

/* A process forked while another thread runs something, and a fork of that one, have workers of their own. */
static void forks_go_on(void) {
    struct caller caller = { .walk.pool = pool_new(3) };
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, call_until_stopped, &caller));
    for (int i = 0; i < 20; i++) {
        int status;
        pid_t child = fork();
        if (!child && i % 2) {
            pid_t grandchild = fork();
            if (grandchild) {
                CHECK(waitpid(grandchild, &status, 0) == grandchild && !status);
                _exit(0);
            }
        }
        if (!child)
            in_the_child(caller.walk.pool);
        CHECK(waitpid(child, &status, 0) == child && !status);
    }
    atomic_store(&caller.stop, true);
    pthread_join(thread, NULL);
    CHECK(!caller.walk.wrong);
    pool_free(caller.walk.pool);
}

/* Argument no-fork: emulators and ThreadSanitizer do not support threads in a forked process. */
int main(int argc, char **argv) {
    for (int n = 1; n <= MOST; n++) {
        barriers_hold(n);
        runs_are_whole(n);
        shares_are_whole(n);
        what_is_taken_is_whole(n);
        ones_own_comes_first(n);
    }
    users_take_turns();
    single_threads_are_apart();
    more_threads_than_cores_take_turns();
    if (argc < 2 || strcmp(argv[1], "no-fork"))
        forks_go_on();
    idle_workers_sleep();
    for (int i = 0; i < 50; i++)
        pool_free(pool_new(1 + i % MOST));          /* before a worker has run at all */
    pool_free(NULL);
    return 0;
}
