/* Which kernels this CPU can run, and how many cores this process may use. */
#ifndef CPU_H
#define CPU_H

#include "kernels.h"

/* Fills k with the best kernels; PYBMC_CPU in the environment asks for less by name. A negative status if it asks
 * for what is unknown or not there. */
int kernels_init(struct kernels *k);

/* The names, from "ref" up: ref avx2 avx512 on x86-64, ref neon i8mm on arm64. NULL beyond the last. */
const char *cpu_level(int i);

int cpu_count(void);        /* affinity and cgroup quota, at least 1 */

/* Cores' worth of time that the control groups of a process grant: the least on the way from its own group to the
 * root, or infinity. groups is the path of /proc/self/cgroup, mount where the groups are mounted. */
double cpu_quota(const char *groups, const char *mount);

#endif
