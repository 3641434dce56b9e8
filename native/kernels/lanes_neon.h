/* Sixteen lanes in four q registers: ARMv8.2 with the dot product (sdot) and, compiled for it, i8mm,
 * ARMv8.6's products of unsigned with signed bytes. Words as in lanes_ref.h. */
#ifndef LANES_H
#define LANES_H

#include "../kernels.h"
#include "../panels.h"
#include "inline.h"
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#ifdef __ARM_FEATURE_MATMUL_INT8
#define ISA(name) name##_i8mm
#else
#define ISA(name) name##_neon
#endif
#undef COLS_MAX
#define COLS_MAX 4
#define ROWS_MAX 4
#define EACH_SIZE(X) X(1, 4, 4) X(2, 2, 2) X(3, 1, 1) X(4, 1, 1)
#define WIDEN 1
#define TOGETHER 4      /* columns that a load of weights serves */
/* Columns that float weights meet at once, and panels of them: sums in registers, and eight
 * chains of fma at least. */
#define FLOAT_COLS_MAX 6
#define FLOAT_PANELS(C) ((C) == 1 ? 4 : (C) == 2 ? 2 : 1)

typedef struct { float32x4_t q0, q1, q2, q3; } f32x16;
typedef struct { int32x4_t q0, q1, q2, q3; } i32x16;
typedef struct { uint32x4_t q0, q1, q2, q3; } u32x16;
typedef struct { uint8x16_t q0, q1, q2, q3; } u8x64;
typedef u8x64 codes_fn(const uint8_t *p, int g);

#define Q1(type, op, a) ((type){ op((a).q0), op((a).q1), op((a).q2), op((a).q3) })
#define Q2(type, op, a, b) \
    ((type){ op((a).q0, (b).q0), op((a).q1, (b).q1), op((a).q2, (b).q2), op((a).q3, (b).q3) })

INLINE u32x16 widen_u8(uint8x16_t x) {
    uint16x8_t lo = vmovl_u8(vget_low_u8(x)), hi = vmovl_high_u8(x);
    return (u32x16){ vmovl_u16(vget_low_u16(lo)), vmovl_high_u16(lo),
                     vmovl_u16(vget_low_u16(hi)), vmovl_high_u16(hi) };
}
INLINE i32x16 widen_i8(int8x16_t x) {
    int16x8_t lo = vmovl_s8(vget_low_s8(x)), hi = vmovl_high_s8(x);
    return (i32x16){ vmovl_s16(vget_low_s16(lo)), vmovl_high_s16(lo),
                     vmovl_s16(vget_low_s16(hi)), vmovl_high_s16(hi) };
}

INLINE f32x16 f_set(float a) {
    float32x4_t q = vdupq_n_f32(a);
    return (f32x16){ q, q, q, q };
}
INLINE f32x16 f_zero(void) { return f_set(0.0f); }
INLINE f32x16 f_load(const float *p) {
    return (f32x16){ vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12) };
}
INLINE f32x16 f_load_n(const float *p, int n) {
    if (n >= 16)
        return f_load(p);
    float lanes[16] = { 0 };
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return f_load(lanes);
}
INLINE f32x16 f_load_f16(const uint16_t *p) {
    float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p)), hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (f32x16){ vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo),
                     vcvt_f32_f16(vget_low_f16(hi)), vcvt_high_f32_f16(hi) };
}
INLINE float32x4_t bf16_quarter(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
}
INLINE f32x16 f_load_bf16(const uint16_t *p) {
    return (f32x16){ bf16_quarter(p), bf16_quarter(p + 4), bf16_quarter(p + 8), bf16_quarter(p + 12) };
}
INLINE f32x16 f_load_u8(const uint8_t *p) {
    u32x16 x = widen_u8(vld1q_u8(p));
    return Q1(f32x16, vcvtq_f32_u32, x);
}
INLINE f32x16 f_load_i8(const int8_t *p) {
    i32x16 x = widen_i8(vld1q_s8(p));
    return Q1(f32x16, vcvtq_f32_s32, x);
}
INLINE f32x16 f_load_u4(const uint8_t *p, int shift) {
    uint8x16_t nibbles = vandq_u8(vshlq_u8(vld1q_u8(p), vdupq_n_s8((int8_t)-shift)), vdupq_n_u8(15));
    u32x16 x = widen_u8(nibbles);
    return Q1(f32x16, vcvtq_f32_u32, x);
}
INLINE float32x4_t e8m0_quarter(uint32x4_t e) {
    uint32x4_t normal = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
    uint32x4_t tiny = vshlq_u32(vdupq_n_u32(0x200000), vreinterpretq_s32_u32(e));
    return vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(e, vdupq_n_u32(2)), tiny, normal));
}
INLINE f32x16 f_load_e8m0_half(const uint8_t *p) {
    u32x16 e = widen_u8(vld1q_u8(p));
    return Q1(f32x16, e8m0_quarter, e);
}
INLINE float32x4_t e4m3_quarter(float16x4_t x) { return vmulq_n_f32(vcvt_f32_f16(x), 128); }
INLINE f32x16 f_load_e4m3_half(const uint8_t *p) {
    float16x8_t lo = vreinterpretq_f16_u16(vshll_n_u8(vld1_u8(p), 7));
    float16x8_t hi = vreinterpretq_f16_u16(vshll_n_u8(vld1_u8(p + 8), 7));
    return (f32x16){ e4m3_quarter(vget_low_f16(lo)), e4m3_quarter(vget_high_f16(lo)),
                     e4m3_quarter(vget_low_f16(hi)), e4m3_quarter(vget_high_f16(hi)) };
}
INLINE void f_store(float *p, f32x16 a) {
    vst1q_f32(p, a.q0);
    vst1q_f32(p + 4, a.q1);
    vst1q_f32(p + 8, a.q2);
    vst1q_f32(p + 12, a.q3);
}
INLINE void f_store_n(float *p, f32x16 a, int n) {
    if (n >= 16) {
        f_store(p, a);
        return;
    }
    float lanes[16];
    f_store(lanes, a);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
INLINE void f_store_f16(uint16_t *p, f32x16 a) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.q0), a.q1)));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.q2), a.q3)));
}
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return Q2(f32x16, vaddq_f32, a, b); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return Q2(f32x16, vsubq_f32, a, b); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return Q2(f32x16, vmulq_f32, a, b); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return Q2(f32x16, vdivq_f32, a, b); }
INLINE float32x4_t max_quarter(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float32x4_t min_quarter(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return Q2(f32x16, max_quarter, a, b); }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return Q2(f32x16, min_quarter, a, b); }
INLINE f32x16 f_abs(f32x16 a) { return Q1(f32x16, vabsq_f32, a); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16){ vfmaq_f32(c.q0, a.q0, b.q0), vfmaq_f32(c.q1, a.q1, b.q1),
                     vfmaq_f32(c.q2, a.q2, b.q2), vfmaq_f32(c.q3, a.q3, b.q3) };
}
INLINE f32x16 f_round(f32x16 a) { return Q1(f32x16, vrndnq_f32, a); }
INLINE float32x4_t scale_quarter(float32x4_t a, float32x4_t n) {
    int32x4_t e = vcvtq_s32_f32(max_quarter(n, vdupq_n_f32(-126.0f)));
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23)));
}
INLINE f32x16 f_scale(f32x16 a, f32x16 n) { return Q2(f32x16, scale_quarter, a, n); }
INLINE float32x4_t zero_below_quarter(float32x4_t a, float32x4_t x, float limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), vcltq_f32(x, vdupq_n_f32(limit))));
}
INLINE f32x16 f_zero_below(f32x16 a, f32x16 x, float limit) {
    return (f32x16){ zero_below_quarter(a.q0, x.q0, limit), zero_below_quarter(a.q1, x.q1, limit),
                     zero_below_quarter(a.q2, x.q2, limit), zero_below_quarter(a.q3, x.q3, limit) };
}
INLINE float32x4_t keep_quarter(float32x4_t a, float other, int lo, int hi) {
    const int32x4_t lane = { 0, 1, 2, 3 };
    uint32x4_t in = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(lo)), vcltq_s32(lane, vdupq_n_s32(hi)));
    return vbslq_f32(in, a, vdupq_n_f32(other));
}
INLINE f32x16 f_keep(f32x16 a, float other, int lo, int hi) {
    return (f32x16){ keep_quarter(a.q0, other, lo, hi), keep_quarter(a.q1, other, lo - 4, hi - 4),
                     keep_quarter(a.q2, other, lo - 8, hi - 8), keep_quarter(a.q3, other, lo - 12, hi - 12) };
}

INLINE float f_sum(f32x16 a) {
    float32x4_t b = vaddq_f32(vaddq_f32(a.q0, a.q2), vaddq_f32(a.q1, a.q3));
    float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
    return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}

INLINE float f_max_lane(f32x16 a) {
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.q0, a.q2), vmaxnmq_f32(a.q1, a.q3)));
}

INLINE uint32_t reaching_quarter(float32x4_t a, float least) {
    const uint32x4_t bits = { 1, 2, 4, 8 };
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, vdupq_n_f32(least)), bits));
}
INLINE uint32_t f_reaching(f32x16 a, float least) {
    return reaching_quarter(a.q0, least) | reaching_quarter(a.q1, least) << 4
         | reaching_quarter(a.q2, least) << 8 | reaching_quarter(a.q3, least) << 12;
}

INLINE int32_t store_sixteen(int8_t *p, f32x16 a) {
    i32x16 x = Q1(i32x16, vcvtnq_s32_f32, a);
    int16x8_t lo = vmovn_high_s32(vmovn_s32(x.q0), x.q1), hi = vmovn_high_s32(vmovn_s32(x.q2), x.q3);
    int8x16_t q = vmovn_high_s16(vmovn_s16(lo), hi);
    vst1q_s8(p, q);
    return vaddlvq_s8(q);
}
INLINE void f_store_block(struct act_block *act, float d, f32x16 lo, f32x16 hi) {
    int32_t first = store_sixteen(act->q, lo), second = store_sixteen(act->q + 16, hi);
    act_set(act, d, first, second);
}

INLINE f32x16 i_to_f(i32x16 a) { return Q1(f32x16, vcvtq_f32_s32, a); }

INLINE u8x64 u_load(const uint8_t *p) {
    return (u8x64){ vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48) };
}
INLINE void u_store(uint8_t *p, u8x64 a) {
    vst1q_u8(p, a.q0);
    vst1q_u8(p + 16, a.q1);
    vst1q_u8(p + 32, a.q2);
    vst1q_u8(p + 48, a.q3);
}
INLINE u8x64 u_or(u8x64 a, u8x64 b) { return Q2(u8x64, vorrq_u8, a, b); }
/* Bytes shift alone here: a mask is due only where it hides something of what the shift left. */
INLINE u8x64 u_mask(u8x64 a, int mask, int left) {
    uint8x16_t m = vdupq_n_u8((uint8_t)mask);
    return left & ~mask
             ? (u8x64){ vandq_u8(a.q0, m), vandq_u8(a.q1, m), vandq_u8(a.q2, m), vandq_u8(a.q3, m) }
             : a;
}
INLINE u8x64 u_shift(u8x64 a, int left) {
    int8x16_t s = vdupq_n_s8((int8_t)left);
    return (u8x64){ vshlq_u8(a.q0, s), vshlq_u8(a.q1, s), vshlq_u8(a.q2, s), vshlq_u8(a.q3, s) };
}
INLINE u8x64 u_shr(u8x64 a, int s, int mask) { return u_mask(s ? u_shift(a, -s) : a, mask, 255 >> s); }
INLINE u8x64 u_shl(u8x64 a, int s, int mask) { return u_mask(s ? u_shift(a, s) : a, mask, 255 << s & 255); }
INLINE u8x64 u_lookup(const uint8_t table[16], u8x64 a) {
    uint8x16_t t = vld1q_u8(table);
    return (u8x64){ vqtbl1q_u8(t, a.q0), vqtbl1q_u8(t, a.q1), vqtbl1q_u8(t, a.q2), vqtbl1q_u8(t, a.q3) };
}

#ifdef __ARM_FEATURE_MATMUL_INT8
#define DOT(sums, w, x, lane) vusdotq_laneq_s32(sums, w, x, lane)

/* Rows of eight columns, from two units side by side: two rows times the eight of two tokens are four sums an
 * instruction, [row 0 token 0, row 0 token 1, row 1 token 0, row 1 token 1]. */
#define MATRIX_QUARTER(q, r) { \
        uint32x4_t left = vreinterpretq_u32_u8(w[0].q), right = vreinterpretq_u32_u8(w[1].q); \
        uint8x16_t upper = vreinterpretq_u8_u32(vzip1q_u32(left, right)); \
        uint8x16_t lower = vreinterpretq_u8_u32(vzip2q_u32(left, right)); \
        UNROLL(2) \
        for (int pair = 0; pair < 2; pair++) { \
            sums[pair][r] = vusmmlaq_s32(sums[pair][r], upper, x[pair]); \
            sums[pair][r + 1] = vusmmlaq_s32(sums[pair][r + 1], lower, x[pair]); \
        } \
    }

#define TOKENS_APART(q, r) { \
        t[2 * pair].q = vuzp1q_s32(sums[pair][r], sums[pair][r + 1]); \
        t[2 * pair + 1].q = vuzp2q_s32(sums[pair][r], sums[pair][r + 1]); \
    }

/* i_dots for TOGETHER tokens: in 24 instructions instead of 32. With fewer the zips take
 * what the products save. */
INLINE void matrix_dots(i32x16 *t, codes_fn *codes, const uint8_t *p, const int part,
                        const struct act_block *a, int zero) {
    const int from = part == SECOND ? 4 : 0, end = part == FIRST ? 4 : 8;
    int32x4_t sums[2][8];
    UNROLL(2)
    for (int pair = 0; pair < 2; pair++) {
        int32_t even = a[2 * pair].neg_sum[part] * zero, odd = a[2 * pair + 1].neg_sum[part] * zero;
        UNROLL(8)
        for (int r = 0; r < 8; r++)
            sums[pair][r] = (int32x4_t){ even, odd, even, odd };
    }
    UNROLL(4)
    for (int g = from; g < end; g += 2) {
        u8x64 w[2] = { codes(p, g), codes(p, g + 1) };
        int8x16_t x[2];
        UNROLL(2)
        for (int pair = 0; pair < 2; pair++)
            x[pair] = vcombine_s8(vld1_s8(a[2 * pair].q + 4 * g), vld1_s8(a[2 * pair + 1].q + 4 * g));
        MATRIX_QUARTER(q0, 0)
        MATRIX_QUARTER(q1, 2)
        MATRIX_QUARTER(q2, 4)
        MATRIX_QUARTER(q3, 6)
    }
    UNROLL(2)
    for (int pair = 0; pair < 2; pair++) {
        TOKENS_APART(q0, 0)
        TOKENS_APART(q1, 2)
        TOKENS_APART(q2, 4)
        TOKENS_APART(q3, 6)
    }
}
#else
/* sdot multiplies signed bytes only. Codes of 7 bits are the same signed; those of 8 all have zero == 128:
 * with their top bit turned round they are code - 128, and nothing is left to subtract. */
INLINE int8x16_t signed_codes(uint8x16_t w, int bits) {
    return vreinterpretq_s8_u8(bits < 8 ? w : veorq_u8(w, vdupq_n_u8(0x80)));
}
#define DOT(sums, w, x, lane) vdotq_laneq_s32(sums, signed_codes(w, bits), x, lane)
#endif

#define DOT_UNIT(lane) { \
        u8x64 w = codes(p, g + lane); \
        UNROLL(4) \
        for (int c = 0; c < C; c++) { \
            t[c].q0 = DOT(t[c].q0, w.q0, x[c], lane); \
            t[c].q1 = DOT(t[c].q1, w.q1, x[c], lane); \
            t[c].q2 = DOT(t[c].q2, w.q2, x[c], lane); \
            t[c].q3 = DOT(t[c].q3, w.q3, x[c], lane); \
        } \
    }

/* Activations come 16 at a time. */
INLINE void i_dots(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, const int part,
                   const struct act_block *a, int zero, int bits) {
    const int from = part == SECOND ? 4 : 0, end = part == FIRST ? 4 : 8;
#ifdef __ARM_FEATURE_MATMUL_INT8
    bits = 0;                               /* no width needs a sign */
    if (C == TOGETHER) {
        matrix_dots(t, codes, p, part, a, zero);
        return;
    }
#endif
    UNROLL(4)
    for (int c = 0; c < C; c++) {
        int32x4_t start = vdupq_n_s32(bits < 8 ? a[c].neg_sum[part] * zero : 0);
        t[c] = (i32x16){ start, start, start, start };
    }
    UNROLL(2)
    for (int g = from; g < end; g += 4) {
        int8x16_t x[TOGETHER];
        UNROLL(4)
        for (int c = 0; c < C; c++)
            x[c] = vld1q_s8(a[c].q + 4 * g);
        DOT_UNIT(0)
        DOT_UNIT(1)
        DOT_UNIT(2)
        DOT_UNIT(3)
    }
}

#include "lanes.h"

#endif
