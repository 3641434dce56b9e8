/* e^x in double by operations that every machine rounds alike, the GPU too: a library's own exp differs in
 * its last bit. */
#ifndef EXP_H
#define EXP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define EVERYWHERE static __device__ inline
#else
#define EVERYWHERE static inline
#endif

/* 2^n, n within -1022 .. 1023 */
EVERYWHERE double power_of_two(int n) {
    const uint64_t bits = (uint64_t)(n + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Within 2 ulp for -708 < x < 709; 0 below, infinite above, NaN for NaN. e^x = 2^n e^r, |r| <= ln 2 / 2:
 * Taylor's polynomial, whose first term left out is 4e-18. n times the leading 32 bits of ln 2 is exact. */
EVERYWHERE double exp_exact(double x) {
    if (x < -708)
        return 0;
    if (x > 709)
        return INFINITY;
    const double n = rint(x * 1.4426950408889634),
                 r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
    double p = 1.0 / 6227020800;
    if (!(x == x))
        return x;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r * r + r;
    return (1 + p) * power_of_two((int)n);
}

#endif
