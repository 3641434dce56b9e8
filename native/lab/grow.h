#ifndef GROW_H
#define GROW_H

#include "arena.h"
#include "bmc_lab.h"

#include <stdbool.h>

/* bmc_session_grow, of an arena whose first rows_used rows are in use. */
int arena_grow(struct arena *a, int growth, int64_t rows, int64_t rows_used, bool touch,
               bmc_growth_cost *cost);

#endif
