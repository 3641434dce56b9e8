/* Which kernels this CPU can run. */
#ifndef CPU_H
#define CPU_H

#include "kernels.h"

#include <stdbool.h>

/* The kernels of this process, resolved at the first call: the best level of this CPU, or what PYBMC_CPU
 * names. NULL, with the reason in bmc_error(), where PYBMC_CPU names a level that is unknown or absent. */
const struct kernels *kernels_find(void);

/* The kernels of one level; PYBMC_CPU is ignored. Returns false if this CPU does not support the level. */
bool kernels_at(int level, struct kernels *k);

/* The levels of this CPU by name, from 0 up: ref avx2 avx512 on x86-64, ref neon i8mm
 * on arm64. NULL: absent. */
const char *cpu_level(int level);

#endif
