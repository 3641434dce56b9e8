/* A block of a file, taken apart: what it says before it is spread over a panel. */
#ifndef SPLIT_H
#define SPLIT_H

#include "types.h"

struct split {
    uint8_t codes[256];     /* unsigned, one a byte */
    uint8_t scales[16];     /* per 32 or 16 columns; of IQ1_M, IQ2_XS,
                               IQ2_S two in a byte, the low nibble first */
    uint8_t mins[16];
    uint16_t d, m;          /* f16; m is what code 0 stands for, so that w = d*scale*code + m*min */
};

typedef void split_fn(const void *block, struct split *s);

/* The types of up to three bits. dequantize and panels both start from these:
 *   IQ2, IQ3       scales: the s of types.h. codes: levels, plus 4 (IQ3: 8) where the weight is negative
 *   IQ1_M          the same, plus 4 where the shift is negative
 *   IQ1_S          scales: 2s + 1, negative where the shift is. codes: levels
 *   others         codes: w / d + 1, of Q1_0 half of it */
split_fn split_iq1_s, split_iq1_m, split_iq2_xxs, split_iq2_xs, split_iq2_s, split_iq3_xxs, split_iq3_s;
split_fn split_tq1_0, split_tq2_0, split_q1_0, split_q2_0;

/* Low nibbles first, then high ones. */
static inline void split_nibbles(uint8_t *codes, const uint8_t *qs, int n) {
    for (int j = 0; j < n; j++) {
        codes[j] = qs[j] & 15;
        codes[j + n] = qs[j] >> 4;
    }
}

/* Two bits of 256 weights: half h, plane p, then 32 columns. */
static inline void split_pairs(uint8_t *codes, const uint8_t qs[64]) {
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < 4; p++)
            for (int j = 0; j < 32; j++)
                codes[128 * h + 32 * p + j] = qs[32 * h + j] >> 2 * p & 3;
}

#endif
