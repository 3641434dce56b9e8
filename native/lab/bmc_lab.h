/* Experiments and probes, in the same library as bmc.h and no part of its promises: other ways in which a
 * session's rows grow, rows of noise, what memory and arithmetic allow here, and an allocation that fails
 * on request. The library itself calls none of it. While one of these functions runs, no other thread
 * may use the session. */
#ifndef BMC_LAB_H
#define BMC_LAB_H

#include "bmc.h"

#pragma GCC visibility push(default)

/* <cffi> What stands between these two marks is read by Python as it is: plain declarations only. */

/* How an arena gets more rows. CHUNK is how sessions grow by themselves; the others are for comparison. */
enum bmc_growth {
    BMC_GROW_CHUNK = 0,             /* segments of r rows are appended; nothing moves */
    BMC_GROW_COPY = 1,              /* a larger segment is mapped, the rows in use are copied to it */
    BMC_GROW_RESERVE = 2,           /* address space for the cap, where segments of r rows become memory */
    BMC_GROW_REMAP = 3,             /* segments of r rows, moved together to where more fit (Linux) */
};

typedef struct bmc_growth_cost {    /* of one growth, in seconds */
    double allocate;                /* system calls */
    double copy;
    double touch;                   /* first touch of the new memory, where it was asked for */
    int64_t bytes_copied;
} bmc_growth_cost;

/* What memory costs here: seconds of doing this once to a number of bytes, the least of a few times. */
enum bmc_probe {
    BMC_PROBE_MAP = 0,              /* map and unmap, untouched */
    BMC_PROBE_TOUCH = 1,            /* touch what is new and in huge pages where there are any */
    BMC_PROBE_TOUCH_SMALL = 2,      /* .. in small ones */
    BMC_PROBE_UNMAP = 3,            /* unmap what was touched, huge pages */
    BMC_PROBE_UNMAP_SMALL = 4,
    BMC_PROBE_REMAP = 5,            /* move what was touched to other addresses, huge pages */
    BMC_PROBE_REMAP_SMALL = 6,
    BMC_PROBE_COPY = 7,             /* copy to memory touched just before, as a growth does */
};

/* Room for `rows` rows in all: that number with COPY, else whole segments. A session grows in one way
 * from its first row on. With COPY, RESERVE and REMAP the session's cap becomes what it has: it does not
 * grow by itself any more. touch 1: new memory is touched at once. BMC_ENOMEM, BMC_EFULL: the session is
 * as it was. */
int         bmc_session_grow(bmc_session *session, int growth, int64_t rows, int touch,
                             bmc_growth_cost *cost);
int         bmc_session_fill(bmc_session *session, int rows);       /* rows of noise, from this tile on */

/* After a pass of n tokens: the attention of those tokens on the rows that are reserved and not used,
 * which kernels over whole arrays do and then mask. Its results are thrown away. Returns how many pairs of
 * a query and a row there were. */
int64_t     bmc_session_attend_unused(bmc_session *session, int n_tok, double *seconds);

/* Takes a quarter of a second. probe: enum bmc_probe. */
int         bmc_read_bandwidth(int n_threads, double *bytes_per_second);
int         bmc_memory_seconds(int probe, int64_t bytes, double *seconds);
/* A type's kernel, from the cache; products a second, in registers. */
int         bmc_arithmetic(int type, int n_threads, double *ops_per_second);
int         bmc_arithmetic_rate(int n_threads, double *int8, double *f32);
/* For tests: the n-th allocation of the arenas from now on fails. */
void        bmc_fail_allocation(int n);
/* </cffi> */

#pragma GCC visibility pop

#endif
