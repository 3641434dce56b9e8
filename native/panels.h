/* Panels: the layout the matmul kernels read. Made once from GGUF rows by pack.c, read by kernels/panel.h.
 *
 * A panel is 16 rows of a matrix, so that a row is a SIMD lane. It has two streams, so that the wide one
 * stays aligned to cache lines:
 *
 *   codes    for every 32 columns: 8 units of 64 bytes when a code has 8 bits, fewer when it has less.
 *            A unit holds 16 rows x 4 columns, row-major: what one vpdpbusd eats.
 *   scales   for every 256 columns (K types) a head, then for every 32 columns 16 scales (and mins).
 *
 * Codes are unsigned. A weight is scale * (code - zero), or scale * code + min. Byte counts are the file's
 * (K types with 6-bit scales: theirs take 8 bits here, 2.8% of the tensor). Rows beyond the last are zero
 * scales. Float types have no scales and one unit per column: 16 values. */
#ifndef PANELS_H
#define PANELS_H

enum { PANEL_ROWS = 16 };

/* Codes of 32 columns. u4: unit g in the low nibbles of byte block g, unit g + 4 in the high ones. u5: u4 and
 * a plane whose bit g is the fifth bit of unit g. u6: u4 and two planes of bit pairs, units 0-3 and 4-7. u2:
 * two planes of bit pairs. u3: u2 and a plane of third bits. u1: a plane whose bit g is unit g's; it stands
 * for 0 or 2. Codes that index a table of values: nl4 and fp4 (IQ4's and MXFP4's), iq3_xxs and iq3_s are
 * u4, iq1 and iq2 are u3. */
enum {      /* bytes */
    CODES_u1 = 64, CODES_u2 = 128, CODES_u3 = 192, CODES_u4 = 256, CODES_u5 = 320, CODES_u6 = 384,
    CODES_u8 = 512, CODES_nl4 = CODES_u4, CODES_fp4 = CODES_u4, CODES_iq1 = CODES_u3, CODES_iq2 = CODES_u3,
    CODES_iq3_xxs = CODES_u4, CODES_iq3_s = CODES_u4,
    BITS_u1 = 2, BITS_u2 = 2, BITS_u3 = 3, BITS_u4 = 4, BITS_u5 = 5, BITS_u6 = 6, BITS_u8 = 8, BITS_nl4 = 8,
    BITS_fp4 = 5, BITS_iq1 = 5, BITS_iq2 = 7, BITS_iq3_xxs = 6, BITS_iq3_s = 6,
};

/* Scales: bytes of a head (once per superblock), then bytes per 32 columns, for 16 rows.
 *   d    d f16                                   dm   d f16, m f16
 *   e8   exponent E8M0                           k    head d f16, -dmin f16; sc u8, m u8 per 32
 *   k16  head d f16; sc i8 per 16 columns        k32  head d f16; sc i8 per 32
 *   km16 head d f16, -dmin f16; sc u8, m u8 per 16 columns, both in one byte (sc the low nibble)
 *   s32  head d f16; s u8 per 32 columns: d (s + 1/2)
 *   q32  the same: d/4 (s + 1/2)
 *   q16  head d f16; s per 16 columns, a byte's two nibbles: d/4 (s + 1/2)
 *   b32  head d f16; sc i8 per 32 columns: scale d |sc|, m is d/8 sc
 *   one  head d f16                              e4m3 half of an unsigned E4M3 per 16 columns
 *   half head d f16, m is -1.5 d: codes of two bits stand for -1.5, -0.5, 0.5 and 1.5 */
enum {
    HEAD_d = 0,  SCALES_d = 32,     HALVES_d = 0,    MINS_d = 0,
    HEAD_dm = 0, SCALES_dm = 64,    HALVES_dm = 0,   MINS_dm = 1,
    HEAD_e8 = 0, SCALES_e8 = 16,    HALVES_e8 = 0,   MINS_e8 = 0,
    HEAD_k = 64, SCALES_k = 32,     HALVES_k = 0,    MINS_k = 1,
    HEAD_k16 = 32, SCALES_k16 = 32, HALVES_k16 = 1,  MINS_k16 = 0,
    HEAD_k32 = 32, SCALES_k32 = 16, HALVES_k32 = 0,  MINS_k32 = 0,
    HEAD_km16 = 64, SCALES_km16 = 32, HALVES_km16 = 1, MINS_km16 = 1,
    HEAD_s32 = 32, SCALES_s32 = 16, HALVES_s32 = 0,  MINS_s32 = 0,
    HEAD_q32 = 32, SCALES_q32 = 16, HALVES_q32 = 0,  MINS_q32 = 0,
    HEAD_q16 = 32, SCALES_q16 = 16, HALVES_q16 = 1,  MINS_q16 = 0,
    HEAD_b32 = 32, SCALES_b32 = 16, HALVES_b32 = 0,  MINS_b32 = 1,
    HEAD_one = 32, SCALES_one = 0,  HALVES_one = 0,  MINS_one = 0,
    HEAD_e4m3 = 0, SCALES_e4m3 = 32, HALVES_e4m3 = 1, MINS_e4m3 = 0,
    HEAD_half = 32, SCALES_half = 0, HALVES_half = 0, MINS_half = 1,
};

/* One row a quantized type: its number, name, columns in a superblock, codes, scales, zero point. */
#define PANEL_TYPES(X) \
    X(TYPE_Q4_0,   q4_0,    32, u4,  d,    8)  \
    X(TYPE_Q4_1,   q4_1,    32, u4,  dm,   0)  \
    X(TYPE_Q5_0,   q5_0,    32, u5,  d,    16) \
    X(TYPE_Q5_1,   q5_1,    32, u5,  dm,   0)  \
    X(TYPE_Q8_0,   q8_0,    32, u8,  d,    128) \
    X(TYPE_IQ4_NL, iq4_nl,  32, nl4, d,    128) \
    X(TYPE_MXFP4,  mxfp4,   32, fp4, e8,   16) \
    X(TYPE_Q2_K,   q2_k,   256, u2,  km16, 0)  \
    X(TYPE_Q3_K,   q3_k,   256, u3,  k16,  4)  \
    X(TYPE_Q4_K,   q4_k,   256, u4,  k,    0)  \
    X(TYPE_Q5_K,   q5_k,   256, u5,  k,    0)  \
    X(TYPE_Q6_K,   q6_k,   256, u6,  k16,  32) \
    X(TYPE_IQ4_XS, iq4_xs, 256, nl4, k32,  128) \
    X(TYPE_IQ1_S,   iq1_s,   256, u2,      b32,  1)  \
    X(TYPE_IQ1_M,   iq1_m,   256, iq1,     q16,  16) \
    X(TYPE_IQ2_XXS, iq2_xxs, 256, iq2,     q32,  64) \
    X(TYPE_IQ2_XS,  iq2_xs,  256, iq2,     q16,  64) \
    X(TYPE_IQ2_S,   iq2_s,   256, iq2,     q16,  64) \
    X(TYPE_IQ3_XXS, iq3_xxs, 256, iq3_xxs, s32,  32) \
    X(TYPE_IQ3_S,   iq3_s,   256, iq3_s,   s32,  32) \
    X(TYPE_TQ1_0,   tq1_0,   256, u2,      one,  1)  \
    X(TYPE_TQ2_0,   tq2_0,   256, u2,      one,  1)  \
    X(TYPE_Q1_0,    q1_0,    128, u1,      one,  1)  \
    X(TYPE_Q2_0,    q2_0,     64, u2,      one,  1)  \
    X(TYPE_NVFP4,   nvfp4,    64, fp4,     e4m3, 16) \
    X(TYPE_COARSE, coarse, COARSE_BLOCK, u2, half, 0)

/* One row a float type: its number, name, bytes of a value. */
#define FLOAT_PANEL_TYPES(X) \
    X(TYPE_F32,  f32,  4) \
    X(TYPE_F16,  f16,  2) \
    X(TYPE_BF16, bf16, 2)

#endif
