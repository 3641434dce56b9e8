/* Loops of arithmetic for each instruction set: n rounds; returns how many products were summed up. */
#ifndef SPINS_H
#define SPINS_H

#include <stdint.h>

struct spins {
    int64_t (*int8)(int64_t n, float *sink);        /* sink: 16 floats */
    int64_t (*f32)(int64_t n, float *sink);
};

extern const struct spins spins_ref, spins_avx2, spins_avx512, spins_neon, spins_i8mm;

#endif
