/* Which kernels this CPU can run, and how many cores this process may use. */
#ifndef CPU_H
#define CPU_H

#include "kernels.h"

/* Fills k with the best kernels; PYBMC_CPU=ref|avx2|avx512 in the environment asks for less. A negative status
 * if it asks for what is unknown or not there. */
int kernels_init(struct kernels *k);

int cpu_count(void);        /* affinity and cgroup quota, at least 1 */

#endif
