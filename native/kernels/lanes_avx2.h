/* Sixteen lanes in two ymm registers: AVX2, FMA and F16C. Words as in lanes_ref.h. */
#ifndef LANES_H
#define LANES_H

#include "../kernels.h"
#include "../panels.h"
#include "block_x86.h"
#include "inline.h"
#include <math.h>
#include <immintrin.h>

#define ISA(name) name##_avx2
#undef COLS_MAX
#define COLS_MAX 4
#define ROWS_MAX 6
#define EACH_SIZE(X) X(1, 4, 4) X(2, 2, 2) X(3, 2, 2) X(4, 1, 1) X(5, 1, 1) X(6, 1, 1)
#define WIDEN 1
/* Columns that float weights meet at once, and panels of them: sums in registers, and eight
 * chains of fma at least. */
#define FLOAT_COLS_MAX 6
#define FLOAT_PANELS(C) ((C) == 1 ? 4 : (C) == 2 ? 2 : 1)
#define TOGETHER 4      /* columns that a load of weights serves: there are too few registers to keep them */

typedef struct { __m256 lo, hi; } f32x16;
typedef struct { __m256i lo, hi; } i32x16;
typedef struct { __m256i lo, hi; } u8x64;
typedef u8x64 codes_fn(const uint8_t *p, int g);

#define F2(op, a, b) ((f32x16){ op((a).lo, (b).lo), op((a).hi, (b).hi) })
#define U2(op, a, b) ((u8x64){ op((a).lo, (b).lo), op((a).hi, (b).hi) })

/* Lanes below n, as masks for the low and the high half. */
INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE f32x16 f_set(float a) { return (f32x16){ _mm256_set1_ps(a), _mm256_set1_ps(a) }; }
INLINE f32x16 f_zero(void) { return f_set(0.0f); }
INLINE f32x16 f_load(const float *p) { return (f32x16){ _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) }; }
INLINE f32x16 f_load_n(const float *p, int n) {         /* masks are slow, most of all where they store */
    if (n >= 16)
        return f_load(p);
    return (f32x16){ _mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8)) };
}
INLINE f32x16 f_load_f16(const uint16_t *p) {
    return (f32x16){ _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                     _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8))) };
}
INLINE __m256 bf16_half(const uint16_t *p) {
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
INLINE f32x16 f_load_bf16(const uint16_t *p) { return (f32x16){ bf16_half(p), bf16_half(p + 8) }; }
INLINE f32x16 f_load_u8(const uint8_t *p) {
    return (f32x16){ _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p))),
                     _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p + 8)))) };
}
INLINE f32x16 f_load_i8(const int8_t *p) {
    return (f32x16){ _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))),
                     _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8)))) };
}
INLINE __m256 u4_half(const uint8_t *p, int shift) {
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
    x = _mm256_srl_epi32(x, _mm_cvtsi32_si128(shift));
    return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
}
INLINE f32x16 f_load_u4(const uint8_t *p, int shift) {
    return (f32x16){ u4_half(p, shift), u4_half(p + 8, shift) };
}
INLINE __m256 e8m0_ymm(const uint8_t *p) {
    __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
    __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, tiny, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
INLINE f32x16 f_load_e8m0_half(const uint8_t *p) { return (f32x16){ e8m0_ymm(p), e8m0_ymm(p + 8) }; }
INLINE __m256 e4m3_ymm(const uint8_t *p) {
    __m128i f16 = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)p)), 7);
    return _mm256_mul_ps(_mm256_cvtph_ps(f16), _mm256_set1_ps(128));
}
INLINE f32x16 f_load_e4m3_half(const uint8_t *p) { return (f32x16){ e4m3_ymm(p), e4m3_ymm(p + 8) }; }
INLINE void f_store(float *p, f32x16 a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
INLINE void f_store_n(float *p, f32x16 a, int n) {
    if (n >= 16) {
        f_store(p, a);
        return;
    }
    _mm256_maskstore_ps(p, first_lanes(n), a.lo);
    _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.hi);
}
INLINE void f_store_f16(uint16_t *p, f32x16 a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return F2(_mm256_add_ps, a, b); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return F2(_mm256_sub_ps, a, b); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return F2(_mm256_mul_ps, a, b); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return F2(_mm256_div_ps, a, b); }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return F2(_mm256_max_ps, a, b); }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return F2(_mm256_min_ps, a, b); }
INLINE f32x16 f_abs(f32x16 a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (f32x16){ _mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi) };
}
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16){ _mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi) };
}
INLINE f32x16 f_round(f32x16 a) {
    return (f32x16){ _mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                     _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) };
}
INLINE __m256 scale_half(__m256 a, __m256 n) {
    __m256i e = _mm256_cvttps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)));
    e = _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
INLINE f32x16 f_scale(f32x16 a, f32x16 n) { return F2(scale_half, a, n); }
INLINE f32x16 f_zero_below(f32x16 a, f32x16 x, float limit) {
    __m256 l = _mm256_set1_ps(limit);
    return (f32x16){ _mm256_and_ps(_mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ), a.lo),
                     _mm256_and_ps(_mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ), a.hi) };
}
INLINE __m256 keep_half(__m256 a, float other, int lo, int hi) {
    __m256i in = _mm256_andnot_si256(first_lanes(lo), first_lanes(hi));
    return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(in));
}
INLINE f32x16 f_keep(f32x16 a, float other, int lo, int hi) {
    return (f32x16){ keep_half(a.lo, other, lo, hi), keep_half(a.hi, other, lo - 8, hi - 8) };
}

INLINE float f_sum(f32x16 a) {
    __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

INLINE float f_max_lane(f32x16 a) {
    __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

INLINE uint32_t f_reaching(f32x16 a, float least) {
    __m256 b = _mm256_set1_ps(least);
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b, _CMP_GE_OQ))
           | (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b, _CMP_GE_OQ)) << 8;
}

INLINE void f_store_block(struct act_block *act, float d, f32x16 lo, f32x16 hi) {
    __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(lo.lo), _mm256_cvtps_epi32(lo.hi));
    __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(hi.lo), _mm256_cvtps_epi32(hi.hi));
    /* In fours: a0 a8 b0 b8 a4 a12 b4 b12. */
    __m256i q = _mm256_packs_epi16(a, b);
    q = _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
    act_store(act, d, q, fours);
}

INLINE f32x16 i_to_f(i32x16 a) { return (f32x16){ _mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi) }; }

INLINE u8x64 u_load(const uint8_t *p) {
    return (u8x64){ _mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32)) };
}
INLINE void u_store(uint8_t *p, u8x64 a) {
    _mm256_storeu_si256((void *)p, a.lo);
    _mm256_storeu_si256((void *)(p + 32), a.hi);
}
INLINE u8x64 u_or(u8x64 a, u8x64 b) { return U2(_mm256_or_si256, a, b); }
#define u_shift_(op, a, s, mask) ((u8x64){ _mm256_and_si256(op((a).lo, s), _mm256_set1_epi8(mask)), \
                                           _mm256_and_si256(op((a).hi, s), _mm256_set1_epi8(mask)) })
#define u_shr(a, s, mask) u_shift_(_mm256_srli_epi16, a, s, mask)
#define u_shl(a, s, mask) u_shift_(_mm256_slli_epi16, a, s, mask)
INLINE u8x64 u_lookup(const uint8_t table[16], u8x64 a) {
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return (u8x64){ _mm256_shuffle_epi8(t, a.lo), _mm256_shuffle_epi8(t, a.hi) };
}

INLINE __m256i spread(const int8_t *a) { return _mm256_set1_epi32(*(const int32_t *)(const void *)a); }

/* sum += products, words of 16 or 32 bits. In assembly, since gcc otherwise computes all products of a block
 * before it adds the first two. */
#define ADD(bits, sum, products) __asm__("vpadd" bits " %1, %0, %0" : "+x"(sum) : "x"(products))
/* Keeps both in registers at this point: otherwise gcc decodes ahead, spills, and reloads for each column. */
#define NOW(a, b) __asm__ volatile("" : "+x"(a), "+x"(b))

/* Products of 8 bits come as pairs summed in 16. With |a| <= 127 several units of narrow weights fit before
 * they overflow: 8 units of 4 bits (8*2*15*127 = 30480), 4 of 5, 2 of 6, 1 of 7. Eight bits do not fit
 * even once: they all have zero == 128, so w - 128 is multiplied, its sign moved to the activation, and
 * nothing is left to subtract. */
INLINE void dots_narrow(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, int g0, int n,
                        const struct act_block *a, const int run) {
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL(8)
    for (int u = g0; u < g0 + n; u += run) {
        __m256i lo[TOGETHER], hi[TOGETHER];
        UNROLL(8)
        for (int i = u; i < u + run; i++) {
            u8x64 w = codes(p, i);
            if (C > 1)
                NOW(w.lo, w.hi);
            UNROLL(4)
            for (int c = 0; c < C; c++) {
                __m256i x = spread(a[c].q + 4 * i);
                __m256i pl = _mm256_maddubs_epi16(w.lo, x), ph = _mm256_maddubs_epi16(w.hi, x);
                if (i == u) {
                    lo[c] = pl;
                    hi[c] = ph;
                } else {
                    ADD("w", lo[c], pl);
                    ADD("w", hi[c], ph);
                }
            }
        }
        UNROLL(4)
        for (int c = 0; c < C; c++) {
            lo[c] = _mm256_madd_epi16(lo[c], ones);
            hi[c] = _mm256_madd_epi16(hi[c], ones);
            t[c].lo = u > g0 ? _mm256_add_epi32(t[c].lo, lo[c]) : lo[c];
            t[c].hi = u > g0 ? _mm256_add_epi32(t[c].hi, hi[c]) : hi[c];
        }
    }
}

/* Half the rows at a time: a weight and its size, eight sums, and what is between them fit the registers. */
#define DOT_SIGNED(half) { \
        __m256i v = _mm256_xor_si256(w.half, flip), size = _mm256_abs_epi8(v); \
        NOW(v, size); \
        UNROLL(4) \
        for (int c = 0; c < C; c++) { \
            __m256i x = _mm256_maddubs_epi16(size, _mm256_sign_epi8(spread(a[c].q + 4 * i), v)); \
            x = _mm256_madd_epi16(x, ones); \
            if (i == g0) \
                t[c].half = x; \
            else \
                ADD("d", t[c].half, x); \
        } \
    }
INLINE void dots_signed(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, int g0, int n,
                        const struct act_block *a) {
    const __m256i flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    UNROLL(8)
    for (int i = g0; i < g0 + n; i++) {
        u8x64 w = codes(p, i);
        DOT_SIGNED(lo)
        DOT_SIGNED(hi)
    }
}

INLINE void i_dots(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, const int part,
                   const struct act_block *a, int zero, int bits) {
    const int n = part == WHOLE ? 8 : 4, g0 = part == SECOND ? 4 : 0;
    if (bits > 7) {
        dots_signed(t, C, codes, p, g0, n, a);
        return;
    }
    dots_narrow(t, C, codes, p, g0, n, a, bits <= 4 ? n : bits == 5 ? 4 : bits == 6 ? 2 : 1);
    UNROLL(4)
    /* Loaded as a float, or gcc shifts it before it is spread: slower. */
    for (int c = 0; zero && c < C; c++) {
        const float *sum = (const float *)(const void *)&a[c].neg_sum[part];
        __m256i neg = _mm256_castps_si256(_mm256_broadcast_ss(sum));
        neg = _mm256_slli_epi32(neg, __builtin_ctz(zero));
        t[c] = (i32x16){ _mm256_add_epi32(t[c].lo, neg), _mm256_add_epi32(t[c].hi, neg) };
    }
}

#include "lanes.h"

#endif
