/* Where the time of passes goes: each thread's nanoseconds, by step. */
#ifndef PROFILE_H
#define PROFILE_H

#include "bmc.h"

#include <stddef.h>
#include <time.h>

struct laps {
    _Alignas(64) int64_t last;          /* when this thread's step before this one ended */
    int64_t spent[BMC_STEPS];
};

struct profile {
    int64_t calls, n_passes;            /* nanoseconds in calls of the library, passes in them */
    struct laps *laps;                  /* (threads,), NULL: nobody asked */
};

static inline int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* What passed since the last lap was spent on `step`. */
static inline void lap(struct laps *laps, enum bmc_step step) {
    int64_t now = nanoseconds();
    laps->spent[step] += now - laps->last;
    laps->last = now;
}

#endif
