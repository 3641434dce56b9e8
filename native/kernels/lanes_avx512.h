/* Sixteen lanes in one zmm register: AVX512 F, BW, DQ, VL and VNNI. Words as in lanes_ref.h. */
#ifndef LANES_H
#define LANES_H

#include "../kernels.h"
#include "../panels.h"
#include "block_x86.h"
#include "inline.h"
#include <math.h>
#include <immintrin.h>

#define ISA(name) name##_avx512
#ifndef COLS_MAX            /* sanitizers take minutes over 16 */
#define COLS_MAX 16
#endif
#define ROWS_MAX 8
#define TOGETHER 4      /* columns that take turns */
#define EACH_SIZE(X) X(1, 4, 4) X(2, 2, 4) X(3, 1, 2) X(4, 1, 4) X(5, 1, 4) X(6, 1, 4) X(7, 1, 2) X(8, 1, 3)
#define WIDEN 0         /* eight queries hide what it takes to turn f16 into floats */
#define FLOAT_COLS_MAX (COLS_MAX < 16 ? 1 : 4)
#define FLOAT_PANELS(C) 4

typedef __m512 f32x16;
typedef __m512i i32x16;
typedef __m512i u8x64;
typedef u8x64 codes_fn(const uint8_t *p, int g);

INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }

INLINE f32x16 f_zero(void) { return _mm512_setzero_ps(); }
INLINE f32x16 f_set(float a) { return _mm512_set1_ps(a); }
INLINE f32x16 f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE f32x16 f_load_n(const float *p, int n) {
    return n >= 16 ? f_load(p) : _mm512_maskz_loadu_ps(first_lanes(n), p);
}
INLINE f32x16 f_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE f32x16 f_load_bf16(const uint16_t *p) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
INLINE f32x16 f_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE f32x16 f_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE f32x16 f_load_u4(const uint8_t *p, int shift) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    x = _mm512_srl_epi32(x, _mm_cvtsi32_si128(shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
}
INLINE f32x16 f_load_e8m0_half(const uint8_t *p) {
    __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    __m512i tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x200000), e);
    __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(small, normal, tiny));
}
INLINE f32x16 f_load_e4m3_half(const uint8_t *p) {
    __m256i f16 = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(f16), _mm512_set1_ps(128));
}
INLINE void f_store(float *p, f32x16 a) { _mm512_storeu_ps(p, a); }
INLINE void f_store_n(float *p, f32x16 a, int n) {
    if (n >= 16)
        f_store(p, a);
    else
        _mm512_mask_storeu_ps(p, first_lanes(n), a);
}
INLINE void f_store_f16(uint16_t *p, f32x16 a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
INLINE f32x16 f_abs(f32x16 a) { return _mm512_abs_ps(a); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE f32x16 f_round(f32x16 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE f32x16 f_scale(f32x16 a, f32x16 n) { return _mm512_scalef_ps(a, n); }
INLINE f32x16 f_zero_below(f32x16 a, f32x16 x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a);
}
INLINE f32x16 f_keep(f32x16 a, float other, int lo, int hi) {
    return _mm512_mask_blend_ps((__mmask16)(first_lanes(hi) & ~first_lanes(lo)), _mm512_set1_ps(other), a);
}

INLINE float f_sum(f32x16 a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

INLINE float f_max_lane(f32x16 a) { return _mm512_reduce_max_ps(a); }
INLINE uint32_t f_reaching(f32x16 a, float least) {
    return _mm512_cmp_ps_mask(a, _mm512_set1_ps(least), _CMP_GE_OQ);
}
INLINE void f_store_block(struct act_block *act, float d, f32x16 lo, f32x16 hi) {
    __m128i a = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(lo));
    __m128i b = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(hi));
    __m256i q = _mm256_set_m128i(b, a);
    __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
    act_store(act, d, q, fours);
}
INLINE f32x16 i_to_f(i32x16 a) { return _mm512_cvtepi32_ps(a); }

INLINE u8x64 u_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void u_store(uint8_t *p, u8x64 a) { _mm512_storeu_si512(p, a); }
INLINE u8x64 u_or(u8x64 a, u8x64 b) { return _mm512_or_si512(a, b); }
#define u_shr(a, s, mask) _mm512_and_si512(_mm512_srli_epi16(a, s), _mm512_set1_epi8(mask))
#define u_shl(a, s, mask) _mm512_and_si512(_mm512_slli_epi16(a, s), _mm512_set1_epi8(mask))
INLINE u8x64 u_lookup(const uint8_t table[16], u8x64 a) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), a);
}

INLINE i32x16 dot4(i32x16 sum, u8x64 w, const int8_t *a) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(*(const int32_t *)(const void *)a));
}

/* Columns take turns, and have two sums each where there are eight products: one waits four cycles for the
 * one before it in its sum. */
INLINE void i_dots(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, const int part,
                   const struct act_block *a, int zero, int bits) {
    const int from = part == SECOND ? 4 : 0, to = part == FIRST ? 4 : 8, split = part == WHOLE;
    i32x16 odd[TOGETHER];
    (void)bits;
    UNROLL(4)
    for (int c = 0; c < C; c++) {
        t[c] = zero ? _mm512_slli_epi32(_mm512_set1_epi32(a[c].neg_sum[part]), __builtin_ctz(zero))
                    : _mm512_setzero_si512();
        odd[c] = _mm512_setzero_si512();
    }
    UNROLL(8)
    for (int g = from; g < to; g++) {
        u8x64 w = codes(p, g);
        UNROLL(4)
        for (int c = 0; c < C; c++) {
            i32x16 *sum = split && g % 2 ? &odd[c] : &t[c];
            *sum = dot4(*sum, w, a[c].q + 4 * g);
        }
    }
    UNROLL(4)
    for (int c = 0; c < C && split; c++)
        t[c] = _mm512_add_epi32(t[c], odd[c]);
}

#include "lanes.h"

#endif
