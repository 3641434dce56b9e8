/* The tensor types of GGUF: how their bytes lie and what they mean.
 *
 * A type is a block: block_size weights in type_size bytes. The diagrams below go from the first byte to the
 * last; 16-bit fields are little-endian. The structs are packed because a file may start a tensor anywhere. */
#ifndef TYPES_H
#define TYPES_H

#include <stdint.h>
#include <string.h>

enum {                          /* ggml's numbers, as files carry them; a number that is missing was retired */
    TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7, TYPE_Q8_0 = 8,
    TYPE_Q8_1 = 9, TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14,
    TYPE_Q8_K = 15, TYPE_IQ2_XXS = 16, TYPE_IQ2_XS = 17, TYPE_IQ3_XXS = 18, TYPE_IQ1_S = 19,
    TYPE_IQ4_NL = 20, TYPE_IQ3_S = 21, TYPE_IQ2_S = 22, TYPE_IQ4_XS = 23, TYPE_I8 = 24, TYPE_I16 = 25,
    TYPE_I32 = 26, TYPE_I64 = 27, TYPE_F64 = 28, TYPE_IQ1_M = 29, TYPE_BF16 = 30, TYPE_TQ1_0 = 34,
    TYPE_TQ2_0 = 35, TYPE_MXFP4 = 39, TYPE_NVFP4 = 40, TYPE_Q1_0 = 41,
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

/* Types of 32. w[j] is the low nibble of qs[j], w[j + 16] the high one; bit j of qh is the fifth bit of w[j]. */

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
 *   each 128 weights take 32 bytes of qs: bits 0-1 hold w[0..31], 2-3 w[32..63], 4-5 w[64..95], 6-7 w[96..127]  */
typedef struct { uint8_t scales[16]; uint8_t qs[64]; uint16_t scale, min; } block_q2_k;
_Static_assert(sizeof(block_q2_k) == 84, "Q2_K is 84 bytes on disk");

/* Q3_K: w = scale * scales[j / 16] * (q - 4)
 *   | hmask[0] .. hmask[31] | qs[0] .. qs[63] | scales[12]: sixteen of 6 bits, q3_k_scales | scale f16 |
 *   qs as in Q2_K; the third bit of w[j] is bit j / 32 of hmask[j % 32]  */
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; uint16_t scale; } block_q3_k;
_Static_assert(sizeof(block_q3_k) == 110, "Q3_K is 110 bytes on disk");

/* Q4_K: w = scale * scales[j / 32] * q - min * mins[j / 32]
 *   | scale f16 | min f16 | scales[12]: eight scales and eight mins of 6 bits, q4_k_scales | qs[0] .. qs[127] |
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
 *   and 32 bytes of qh: bits 0-1 belong to w[0..31], 2-3 to w[32..63], 4-5 to w[64..95], 6-7 to w[96..127]  */
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t scale; } block_q6_k;
_Static_assert(sizeof(block_q6_k) == 210, "Q6_K is 210 bytes on disk");

/* IQ4_XS: w = scale * scales[j / 32] * iq4_values[q]
 *   | scale f16 | scales_h u16 | scales_l[0] .. scales_l[3] | qs[0] .. qs[127] |  scales: iq4_xs_scales
 *   each 32 weights take 16 bytes of qs, nibbles as in Q4_0  */
typedef struct { uint16_t scale, scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs;
_Static_assert(sizeof(block_iq4_xs) == 136, "IQ4_XS is 136 bytes on disk");

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
    if (x >= f32_bits(65520.0f))                       /* halfway from the largest half to the next power of 2 */
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

/* Group j < 4 has its 6 bits in one byte; group j >= 4 has 4 in the last bytes and 2 on top of group j - 4. */
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
