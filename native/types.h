/* The tensor types of GGUF: how their bytes lie and what they mean.
 *
 * A type is a block: block_size weights in type_size bytes. The diagrams below go from the first
 * byte to the last; 16-bit fields are little-endian. The structs are packed because a file may
 * start a tensor anywhere. */
#ifndef TYPES_H
#define TYPES_H

#include <stdint.h>
#include <string.h>

enum {                          /* ggml's numbers, as files carry them;
                                   a number that is missing was retired */
    TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7, TYPE_Q8_0 = 8,
    TYPE_Q8_1 = 9, TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14,
    TYPE_Q8_K = 15, TYPE_IQ2_XXS = 16, TYPE_IQ2_XS = 17, TYPE_IQ3_XXS = 18, TYPE_IQ1_S = 19,
    TYPE_IQ4_NL = 20, TYPE_IQ3_S = 21, TYPE_IQ2_S = 22, TYPE_IQ4_XS = 23, TYPE_I8 = 24, TYPE_I16 = 25,
    TYPE_I32 = 26, TYPE_I64 = 27, TYPE_F64 = 28, TYPE_IQ1_M = 29, TYPE_BF16 = 30, TYPE_TQ1_0 = 34,
    TYPE_TQ2_0 = 35, TYPE_MXFP4 = 39, TYPE_NVFP4 = 40, TYPE_Q1_0 = 41, TYPE_Q2_0 = 42,
    N_TYPES,
    TYPE_COARSE = N_TYPES,      /* ours, in no file: what block_coarse says */
    N_PANEL_TYPES
};

/* n weights, a multiple of block_size, from blocks at any address. */
typedef void dequantize_fn(const void *blocks, int64_t n, float *out);

struct type {
    const char *name;           /* ggml's spelling; NULL where the number was retired */
    int block_size;             /* weights in a block */
    int type_size;              /* bytes in a block */
    dequantize_fn *dequantize;  /* NULL: we know its size, and no more */
};

extern const struct type types[N_TYPES];

const struct type *type_find(int number);   /* NULL when ggml has no such type */

/* COARSE: floats, of which a panel keeps two bits: w = step * (q - 1.5), one step for all of a block. */
enum { COARSE_BLOCK = 64 };
typedef struct { float w[COARSE_BLOCK]; } block_coarse;

#pragma pack(push, 1)

/* Types of 32. w[j] is the low nibble of qs[j], w[j + 16] the high one; bit j of qh is
 * the fifth bit of w[j]. */

/* Q4_0: w = scale * (q - 8)
 *   | scale f16 | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale; uint8_t qs[16]; } block_q4_0;
_Static_assert(sizeof(block_q4_0) == 18, "Q4_0 is 18 bytes on disk");

/* Q4_1: w = scale * q + min
 *   | scale f16 | min f16 | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale, min; uint8_t qs[16]; } block_q4_1;
_Static_assert(sizeof(block_q4_1) == 20, "Q4_1 is 20 bytes on disk");

/* Q5_0: w = scale * (q - 16)
 *   | scale f16 | qh[0] .. qh[3] | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;
_Static_assert(sizeof(block_q5_0) == 22, "Q5_0 is 22 bytes on disk");

/* Q5_1: w = scale * q + min
 *   | scale f16 | min f16 | qh[0] .. qh[3] | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale, min; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;
_Static_assert(sizeof(block_q5_1) == 24, "Q5_1 is 24 bytes on disk");

/* Q8_0: w = scale * q
 *   | scale f16 | qs[0] .. qs[31] |  one signed byte per weight  */
typedef struct { uint16_t scale; int8_t qs[32]; } block_q8_0;
_Static_assert(sizeof(block_q8_0) == 34, "Q8_0 is 34 bytes on disk");

/* IQ4_NL: w = scale * iq4_values[q], nibbles as in Q4_0
 *   | scale f16 | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale; uint8_t qs[16]; } block_iq4_nl;
_Static_assert(sizeof(block_iq4_nl) == 18, "IQ4_NL is 18 bytes on disk");

/* MXFP4: w = 2^(exponent - 128) * mxfp4_values[q], nibbles as in Q4_0
 *   | exponent u8 | qs[0] .. qs[15] |  */
typedef struct { uint8_t exponent; uint8_t qs[16]; } block_mxfp4;
_Static_assert(sizeof(block_mxfp4) == 17, "MXFP4 is 17 bytes on disk");

/* Types of 256, cut into groups with small integer scales of their own. */

/* Q2_K: w = scale * (sm & 15) * q - min * (sm >> 4), sm = scales[j / 16]
 *   | scales[0] .. scales[15] | qs[0] .. qs[63] | scale f16 | min f16 |
 *   each 128 weights take 32 bytes of qs: bits 0-1 hold w[0..31], 2-3 w[32..63], 4-5 w[64..95] and
 *   6-7 w[96..127]  */
typedef struct { uint8_t scales[16]; uint8_t qs[64]; uint16_t scale, min; } block_q2_k;
_Static_assert(sizeof(block_q2_k) == 84, "Q2_K is 84 bytes on disk");

/* Q3_K: w = scale * scales[j / 16] * (q - 4)
 *   | hmask[0] .. hmask[31] | qs[0] .. qs[63] | scales[12]: sixteen of 6 bits, q3_k_scales | scale f16 |
 *   qs as in Q2_K; the third bit of w[j] is bit j / 32 of hmask[j % 32]  */
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; uint16_t scale; } block_q3_k;
_Static_assert(sizeof(block_q3_k) == 110, "Q3_K is 110 bytes on disk");

/* Q4_K: w = scale * scales[j / 32] * q - min * mins[j / 32]
 *   | scale f16 | min f16 | scales[12] | qs[0] .. qs[127] |
 *   scales: eight scales and eight mins of 6 bits, q4_k_scales
 *   each 64 weights take 32 bytes of qs: low nibbles hold w[0..31], high ones w[32..63]  */
typedef struct { uint16_t scale, min; uint8_t scales[12]; uint8_t qs[128]; } block_q4_k;
_Static_assert(sizeof(block_q4_k) == 144, "Q4_K is 144 bytes on disk");

/* Q5_K: as Q4_K with a fifth bit: bit j / 32 of qh[j % 32]
 *   | scale f16 | min f16 | scales[12] | qh[0] .. qh[31] | qs[0] .. qs[127] |  */
typedef struct { uint16_t scale, min; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_k;
_Static_assert(sizeof(block_q5_k) == 176, "Q5_K is 176 bytes on disk");

/* Q6_K: w = scale * scales[j / 16] * (q - 32)
 *   | ql[0] .. ql[127] | qh[0] .. qh[63] | scales[0] .. scales[15], signed | scale f16 |
 *   each 128 weights take 64 bytes of ql: low nibbles hold w[0..63], high ones w[64..127];
 *   and 32 bytes of qh: bits 0-1 belong to w[0..31], 2-3 to w[32..63], 4-5 to w[64..95] and 6-7 to
 *   w[96..127]  */
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t scale; } block_q6_k;
_Static_assert(sizeof(block_q6_k) == 210, "Q6_K is 210 bytes on disk");

/* IQ4_XS: w = scale * scales[j / 32] * iq4_values[q]
 *   | scale f16 | scales_h u16 | scales_l[0] .. scales_l[3] | qs[0] .. qs[127] |  scales: iq4_xs_scales
 *   each 32 weights take 16 bytes of qs, nibbles as in Q4_0  */
typedef struct { uint16_t scale, scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs;
_Static_assert(sizeof(block_iq4_xs) == 136, "IQ4_XS is 136 bytes on disk");

/* Types of up to three bits. */

/* Q1_0: w = scale * (bit j of qs ? 1 : -1)
 *   | scale f16 | qs[0] .. qs[15] |  */
typedef struct { uint16_t scale; uint8_t qs[16]; } block_q1_0;
_Static_assert(sizeof(block_q1_0) == 18, "Q1_0 is 18 bytes on disk");

/* Q2_0: w = scale * (q - 1)
 *   | scale f16 | qs[0] .. qs[15] |  w[4i] is bits 0-1 of qs[i], w[4i + 1] bits 2-3 and so on  */
typedef struct { uint16_t scale; uint8_t qs[16]; } block_q2_0;
_Static_assert(sizeof(block_q2_0) == 18, "Q2_0 is 18 bytes on disk");

/* TQ2_0: w = scale * (q - 1)
 *   | qs[0] .. qs[63] | scale f16 |  qs as in Q2_K  */
typedef struct { uint8_t qs[64]; uint16_t scale; } block_tq2_0;
_Static_assert(sizeof(block_tq2_0) == 66, "TQ2_0 is 66 bytes on disk");

/* TQ1_0: w = scale * (t - 1)
 *   | qs[0] .. qs[47] | qh[0] .. qh[3] | scale f16 |
 *   a byte is 256 times the fraction 0.t0 t1 t2 t3 t4 of base 3 (of qh: four digits), rounded up.
 *   Digit i of qs[j] is w[32i + j], of qs[32 + j] w[160 + 16i + j], of qh[j] w[240 + 4i + j].  */
typedef struct { uint8_t qs[48]; uint8_t qh[4]; uint16_t scale; } block_tq1_0;
_Static_assert(sizeof(block_tq1_0) == 54, "TQ1_0 is 54 bytes on disk");

/* The IQ types of up to three bits: an index of a grid (grids.h) stands for 8 levels (IQ3: 4), and s is a
 * scale of four bits (IQ1: three). IQ2 and IQ3 have a sign bit for each weight, 1 where it is negative. "7
 * signs" are those of eight weights: an even number of the eight is set, so that the last one is left out. */

/* IQ2_XXS: w = scale / 4 * (s + 1/2) * (8, 25 or 43, with its sign)
 *   | scale f16 | 8 times, for 32 weights: qs[0] .. qs[3], indices | signs u32: 4 times 7 signs, then s |  */
typedef struct { uint16_t scale; struct { uint8_t qs[4]; uint32_t signs; } groups[8]; } block_iq2_xxs;
_Static_assert(sizeof(block_iq2_xxs) == 66, "IQ2_XXS is 66 bytes on disk");

/* IQ2_XS: as IQ2_XXS, s per 16 weights
 *   | scale f16 | qs u16 [32]: index of 9 bits, then 7 signs | scales[0] .. scales[7] |
 *   scales: two s in a byte, the low nibble first  */
typedef struct { uint16_t scale, qs[32]; uint8_t scales[8]; } block_iq2_xs;
_Static_assert(sizeof(block_iq2_xs) == 74, "IQ2_XS is 74 bytes on disk");

/* IQ2_S: as IQ2_XS
 *   | scale f16 | qs[0] .. qs[31] | signs[0] .. signs[31] | qh[0] .. qh[7] | scales[0] .. scales[7] |
 *   the two high bits of index i are bits 2 (i % 4) and up of qh[i / 4]  */
typedef struct { uint16_t scale; uint8_t qs[32], signs[32], qh[8], scales[8]; } block_iq2_s;
_Static_assert(sizeof(block_iq2_s) == 82, "IQ2_S is 82 bytes on disk");

/* IQ3_XXS: w = scale / 2 * (s + 1/2) * (4, 12, 20, 28, 36, 44, 52 or 62, with its sign)
 *   | scale f16 | qs[0] .. qs[63] | signs u32 [8]: 4 times 7 signs, then s |  */
typedef struct { uint16_t scale; uint8_t qs[64]; uint32_t signs[8]; } block_iq3_xxs;
_Static_assert(sizeof(block_iq3_xxs) == 98, "IQ3_XXS is 98 bytes on disk");

/* IQ3_S: w = scale * (2s + 1) * (1, 3, 5 .. 15, with its sign)
 *   | scale f16 | qs[0] .. qs[63] | qh[0] .. qh[7] | signs[0] .. signs[31] | scales[0] .. scales[3] |
 *   bit j % 8 of qh[j / 8] is the highest of index j; scales: an s per 32 weights, the low nibble first  */
typedef struct { uint16_t scale; uint8_t qs[64], qh[8], signs[32], scales[4]; } block_iq3_s;
_Static_assert(sizeof(block_iq3_s) == 110, "IQ3_S is 110 bytes on disk");

/* IQ1_S: w = scale * (2s + 1) * (level - 1 + shift)
 *   | scale f16 | qs[0] .. qs[31] | qh u16 [8] |
 *   qh, for 32 weights: 4 times the three high bits of an index, then s, then the shift: 0 for 1/8,
 *   1 for -1/8  */
typedef struct { uint16_t scale; uint8_t qs[32]; uint16_t qh[8]; } block_iq1_s;
_Static_assert(sizeof(block_iq1_s) == 50, "IQ1_S is 50 bytes on disk");

/* IQ1_M: as IQ1_S, the shift per 8 weights and s per 16
 *   | qs[0] .. qs[31] | qh[0] .. qh[15] | scales u16 [4] |
 *   each nibble of qh: three high bits of an index, then the bit of the shift
 *   scales: four s, then four bits of the scale f16, the lowest first  */
typedef struct { uint8_t qs[32], qh[16]; uint16_t scales[4]; } block_iq1_m;
_Static_assert(sizeof(block_iq1_m) == 56, "IQ1_M is 56 bytes on disk");

/* NVFP4: w = scales[j / 16] / 2 * mxfp4_values[q], 64 a block
 *   | scales[0] .. scales[3], unsigned E4M3 | qs[0] .. qs[31] |
 *   each 16 weights take 8 bytes of qs: low nibbles hold w[0..7], high ones w[8..15]  */
typedef struct { uint8_t scales[4], qs[32]; } block_nvfp4;
_Static_assert(sizeof(block_nvfp4) == 36, "NVFP4 is 36 bytes on disk");

#pragma pack(pop)

extern const int8_t iq4_values[16];         /* ascending, denser near zero */
extern const int8_t mxfp4_values[16];       /* twice the value of an e2m1 float, so that all are whole */

static inline float f32_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31)
        return f32_from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0)
        return f32_from_bits(sign | f32_bits((float)mantissa * 0x1p-24f));
    return f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* To the nearest, ties to even; NaNs become quiet and keep their upper bits, as x86 does it. */
static inline uint16_t f32_to_f16(float f) {
    uint32_t bits = f32_bits(f), sign = bits >> 16 & 0x8000, x = bits & 0x7fffffff;
    if (x > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (x >> 13 & 0x3ff));
    /* Halfway from the largest half to the next power of 2. */
    if (x >= f32_bits(65520.0f))
        return (uint16_t)(sign | 0x7c00);
    if (x < f32_bits(0x1p-14f))                        /* 0.5's last bit weighs what a subnormal's does */
        return (uint16_t)(sign | (f32_bits(f32_from_bits(x) + 0.5f) - f32_bits(0.5f)));
    x += 0xfff + (x >> 13 & 1);
    return (uint16_t)(sign | (x - (112u << 23)) >> 13);
}

static inline float bf16_to_f32(uint16_t h) {
    return f32_from_bits((uint32_t)h << 16);
}

/* To the nearest, ties to even; NaNs become quiet. */
static inline uint16_t f32_to_bf16(float f) {
    uint32_t x = f32_bits(f);
    if ((x & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(x >> 16 | 0x40);
    return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

/* 2^(exponent - 128): half of an e8m0 scale, to go with mxfp4_values. */
static inline float e8m0_half(uint8_t exponent) {
    return f32_from_bits(exponent < 2 ? 0x00200000u << exponent : (uint32_t)(exponent - 1) << 23);
}

/* Half of an unsigned e4m3 scale, to go with mxfp4_values. As an f16 its bits stand for 2^8 times less. */
static inline float e4m3_half(uint8_t x) { return f16_to_f32((uint16_t)(x << 7)) * 128; }

/* A file's scale as e4m3_half takes it: NaN counts as 0, and bit 7 is ignored. */
static inline uint8_t nvfp4_scale(uint8_t x) { return x == 0x7f ? 0 : x & 0x7f; }

/* Group j < 4 has its 6 bits in one byte; group j >= 4 has 4 in the last bytes and 2
 * on top of group j - 4. */
static inline void q4_k_scales(const uint8_t packed[12], uint8_t scales[8], uint8_t mins[8]) {
    for (int j = 0; j < 4; j++) {
        scales[j] = packed[j] & 63;
        mins[j] = packed[j + 4] & 63;
        scales[j + 4] = (uint8_t)((packed[j + 8] & 15) | packed[j] >> 6 << 4);
        mins[j + 4] = (uint8_t)(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
    }
}

/* Four bits in the nibbles of the first 8 bytes, two in the bit pairs of the last 4; minus 32. */
static inline void q3_k_scales(const uint8_t packed[12], int8_t scales[16]) {
    for (int j = 0; j < 16; j++) {
        int low = packed[j % 8] >> (j < 8 ? 0 : 4) & 15, high = packed[8 + j % 4] >> 2 * (j / 4) & 3;
        scales[j] = (int8_t)((low | high << 4) - 32);
    }
}

/* Four bits in the nibbles of scales_l, two in the bit pairs of scales_h; minus 32. */
static inline void iq4_xs_scales(const block_iq4_xs *block, int8_t scales[8]) {
    for (int j = 0; j < 8; j++) {
        int low = block->scales_l[j / 2] >> 4 * (j % 2) & 15, high = block->scales_h >> 2 * j & 3;
        scales[j] = (int8_t)((low | high << 4) - 32);
    }
}

#endif
