/* Sixteen lanes in plain C: what every other lanes_<isa>.h must equal, bit for bit.
 *
 *   f32x16   16 floats                       i32x16   16 integers
 *   u8x64    a unit of weights: 16 rows x 4 consecutive columns, byte 4*row + column
 *
 * The kernels (attn.h, panel.h, vec.h) are written once in these words and compiled once per ISA. Each word
 * is one IEEE operation per lane, or an exact integer one, so all of them give the same bits. */
#ifndef LANES_H
#define LANES_H

#include "../kernels.h"
#include "../panels.h"
#include <math.h>
#include <string.h>

#define ISA(name) name##_ref
#undef COLS_MAX
#define COLS_MAX 2          /* sums a panel kernel keeps */
#define TOGETHER 1          /* tokens that i_dots takes */
#define ROWS_MAX 2          /* queries an attention kernel keeps */
/* Number of queries; then tiles of keys and vectors of values at a time. */
#define EACH_SIZE(X) X(1, 4, 4) X(2, 2, 1)
#define WIDEN 1
#define FLOAT_COLS_MAX 1
#define FLOAT_PANELS(C) 4
#define INLINE static inline
#define UNROLL(n)
#define UNROLL_BY(n)

typedef struct { float v[16]; } f32x16;
typedef struct { int32_t v[16]; } i32x16;
typedef struct { uint8_t v[64]; } u8x64;
typedef u8x64 codes_fn(const uint8_t *p, int g);    /* columns 4g to 4g + 3 of a block's 32, of 16 rows */

#define EACH(expr) f32x16 r; for (int i = 0; i < 16; i++) r.v[i] = (expr); return r

INLINE f32x16 f_zero(void) { EACH(0.0f); }
INLINE f32x16 f_set(float a) { EACH(a); }
INLINE f32x16 f_load(const float *p) { EACH(p[i]); }
INLINE f32x16 f_load_n(const float *p, int n) { EACH(i < n ? p[i] : 0.0f); }     /* zero from lane n on */
INLINE f32x16 f_load_f16(const uint16_t *p) { EACH(f16_to_f32(p[i])); }
INLINE f32x16 f_load_bf16(const uint16_t *p) { EACH(bf16_to_f32(p[i])); }
INLINE f32x16 f_load_u8(const uint8_t *p) { EACH((float)p[i]); }
INLINE f32x16 f_load_i8(const int8_t *p) { EACH((float)p[i]); }
/* One nibble of each byte. */
INLINE f32x16 f_load_u4(const uint8_t *p, int shift) { EACH((float)(p[i] >> shift & 15)); }
INLINE f32x16 f_load_e8m0_half(const uint8_t *p) { EACH(e8m0_half(p[i])); }
INLINE f32x16 f_load_e4m3_half(const uint8_t *p) { EACH(e4m3_half(p[i])); }
INLINE void f_store(float *p, f32x16 a) { memcpy(p, a.v, sizeof a); }
INLINE void f_store_n(float *p, f32x16 a, int n) { memcpy(p, a.v, (size_t)n * sizeof(float)); }
INLINE void f_store_f16(uint16_t *p, f32x16 a) { for (int i = 0; i < 16; i++) p[i] = f32_to_f16(a.v[i]); }
INLINE f32x16 f_add(f32x16 a, f32x16 b) { EACH(a.v[i] + b.v[i]); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { EACH(a.v[i] - b.v[i]); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { EACH(a.v[i] * b.v[i]); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { EACH(a.v[i] / b.v[i]); }
/* b where either is NaN */
INLINE f32x16 f_max(f32x16 a, f32x16 b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE f32x16 f_abs(f32x16 a) { EACH(fabsf(a.v[i])); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) { EACH(fmaf(a.v[i], b.v[i], c.v[i])); }
/* To nearest, ties to even. */
INLINE f32x16 f_round(f32x16 a) { EACH(rintf(a.v[i])); }
/* a 2^n, n whole; n below -126 is taken for that */
INLINE float scale_one(float a, float n) {
    return a * f32_from_bits((uint32_t)((int32_t)(n > -126 ? n : -126) + 127) << 23);
}
INLINE f32x16 f_scale(f32x16 a, f32x16 n) { EACH(scale_one(a.v[i], n.v[i])); }
INLINE f32x16 f_zero_below(f32x16 a, f32x16 x, float limit) { EACH(x.v[i] < limit ? 0.0f : a.v[i]); }
INLINE f32x16 f_keep(f32x16 a, float other, int lo, int hi) { EACH(i >= lo && i < hi ? a.v[i] : other); }

/* The one fold of sixteen lanes: halves onto halves, 8, 4, 2, 1. */
INLINE float f_sum(f32x16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            a.v[i] += a.v[i + half];
    return a.v[0];
}

INLINE float f_max_lane(f32x16 a) {
    float m = a.v[0];
    for (int i = 1; i < 16; i++)
        m = a.v[i] > m ? a.v[i] : m;
    return m;
}

/* Bit i: lane i is at least so large. */
INLINE uint32_t f_reaching(f32x16 a, float least) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++)
        bits |= (uint32_t)(a.v[i] >= least) << i;
    return bits;
}

/* 32 lanes, to the nearest whole number, ties to even, as an act_block: bytes, and their sums. */
INLINE int32_t store_sixteen(int8_t *p, f32x16 a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++)
        sum += p[i] = (int8_t)rintf(a.v[i]);
    return sum;
}
INLINE void f_store_block(struct act_block *act, float d, f32x16 lo, f32x16 hi) {
    int32_t first = store_sixteen(act->q, lo), second = store_sixteen(act->q + 16, hi);
    act_set(act, d, first, second);
}

INLINE f32x16 i_to_f(i32x16 a) { EACH((float)a.v[i]); }

#define EACH_BYTE(expr) u8x64 r; for (int i = 0; i < 64; i++) r.v[i] = (uint8_t)(expr); return r

INLINE u8x64 u_load(const uint8_t *p) { EACH_BYTE(p[i]); }
INLINE void u_store(uint8_t *p, u8x64 a) { memcpy(p, a.v, sizeof a.v); }
INLINE u8x64 u_or(u8x64 a, u8x64 b) { EACH_BYTE(a.v[i] | b.v[i]); }
/* Bytes shifted, then masked. The mask must hide what a wider shift would carry over from the next byte. */
#define u_shr(a, s, mask) u_shr_(a, s, mask)
#define u_shl(a, s, mask) u_shl_(a, s, mask)
INLINE u8x64 u_shr_(u8x64 a, int s, int mask) { EACH_BYTE((a.v[i] >> s) & mask); }
INLINE u8x64 u_shl_(u8x64 a, int s, int mask) { EACH_BYTE((a.v[i] << s) & mask); }
INLINE u8x64 u_lookup(const uint8_t table[16], u8x64 a) { EACH_BYTE(table[a.v[i] & 15]); }

/* Dot products of a block's weights, the WHOLE or its FIRST or SECOND 16 columns, with C tokens,
 * up to TOGETHER: row i of t[c] is the sum of (code - zero) * a[c].q over those columns. zero is
 * 0 or a power of two; bits, how wide a weight is at most, decides how ISAs without a four-way dot
 * product go about it. Exact. */
INLINE void i_dots(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, const int part,
                   const struct act_block *a, int zero, int bits) {
    const int from = part == SECOND ? 4 : 0, n = part == WHOLE ? 8 : 4;
    (void)bits;
    for (int c = 0; c < C; c++) {
        for (int i = 0; i < 16; i++)
            t[c].v[i] = a[c].neg_sum[part] * zero;
        for (int g = from; g < from + n; g++) {
            u8x64 w = codes(p, g);
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < 4; j++)
                    t[c].v[i] += w.v[4 * i + j] * a[c].q[4 * g + j];
        }
    }
}

#include "lanes.h"

#endif
