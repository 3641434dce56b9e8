/* What the CPU's functions ask of a model. */
#ifndef REFERENCE_MODEL_H
#define REFERENCE_MODEL_H

#include "cpu.h"
#include "machine.h"
#include "pass.h"
#include "reference.h"

/* A model of nothing but what the functions ask it for, one thread. */
static inline bmc_model new_model(int dim, int kind, float eps, struct buffers *buffers) {
    bmc_model m = { .c = { .dim = dim, .norm = kind, .norm_eps = eps, .causal = 1 },
                    .buffers = buffers,
                    .k = *kernels_find(),
                    .pool = pool_new(1) };
    return m;
}

static inline struct vector vector(const float *v, int rows, int cols) {
    return (struct vector){ v, rows, cols };
}

/* Column t of a tile of the GPU's. */
static inline void quantize_column(const struct kernels *k, struct act_block *act, int stride, const float *x,
                                   int n) {
    k->quantize(act, stride, x, n / 32);
}

#endif
