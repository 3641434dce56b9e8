/* Where the time of passes goes: each thread's nanoseconds, by step. */
#ifndef PROFILE_H
#define PROFILE_H

#include "bmc.h"
#include "clock.h"

#include <stddef.h>

struct laps {
    _Alignas(64) int64_t last;          /* when this thread's step before this one ended */
    int64_t spent[BMC_STEPS];
};

struct profile {
    int64_t calls, n_passes;            /* nanoseconds in calls of the library, passes in them */
    struct laps *laps;                  /* (threads,), NULL: off */
};

/* What passed since the last lap was spent on `step`. */
static inline void lap(struct laps *laps, enum bmc_step step) {
    int64_t now = nanoseconds();
    laps->spent[step] += now - laps->last;
    laps->last = now;
}

#endif
