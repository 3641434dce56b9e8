/* The kernels of every ISA this CPU has, and what tests of them share. */
#ifndef ISAS_H
#define ISAS_H

#include "check.h"
#include "cpu.h"
#include "kernels.h"

#include <string.h>

static const double ROUNDING = 0x1p-24;
static const float GUARD = -7.25e33f;

static struct kernels isas[4];      /* the reference first */
static int n_isas;

static inline void load_isas(void) {
    while (kernels_at(n_isas, &isas[n_isas]))
        printf(" %s", isas[n_isas++].name);
    printf("\n");
    CHECK(n_isas && !strcmp(isas[0].name, "ref"));
}

static uint64_t state = 88172645463325252u;

static inline double uniform(double low, double high) {
    return low + (high - low) * (double)(random_bits(&state) >> 11) * 0x1p-53;
}

/* About normal. */
static inline float noise(void) {
    return (float)(uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1));
}

static void *get_memory(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    CHECK(p);
    return p;
}

static inline float *noises(int n) {
    float *x = get_memory((size_t)n * sizeof *x);
    for (int i = 0; i < n; i++)
        x[i] = noise();
    return x;
}

static inline float *guards(size_t n) {
    float *x = get_memory(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = GUARD;
    return x;
}

static inline int same(const float *a, const float *b, size_t n) { return !memcmp(a, b, n * sizeof *a); }

#endif
