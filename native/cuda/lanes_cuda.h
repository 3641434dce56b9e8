/* Sixteen lanes as threads of a warp: an f32x16 is one float of each, and ROW is this thread's lane. Words as
 * in lanes_ref.h.
 *
 * kernels.cu includes it several times, each time in a namespace and with a ROW of its own, so it has no
 * guard. */
typedef float f32x16;
typedef int32_t i32x16;
typedef uint32_t u8x64;
typedef u8x64 codes_fn(const uint8_t *p, int g);

INLINE f32x16 f_zero(void) { return 0.0f; }
INLINE f32x16 f_set(float a) { return a; }
INLINE f32x16 f_load(const float *p) { return p[ROW]; }
INLINE f32x16 f_load_n(const float *p, int n) { return ROW < n ? p[ROW] : 0.0f; }
INLINE f32x16 f_load_f16(const uint16_t *p) { return half_to_float(p[ROW]); }
INLINE f32x16 f_load_bf16(const uint16_t *p) { return bits_to_float((uint32_t)p[ROW] << 16); }
INLINE f32x16 f_load_u8(const uint8_t *p) { return (float)p[ROW]; }
INLINE f32x16 f_load_i8(const int8_t *p) { return (float)p[ROW]; }
INLINE f32x16 f_load_u4(const uint8_t *p, int shift) { return (float)(p[ROW] >> shift & 15); }
INLINE f32x16 f_load_e8m0_half(const uint8_t *p) {
    return bits_to_float(p[ROW] < 2 ? 0x00200000u << p[ROW] : (uint32_t)(p[ROW] - 1) << 23);
}
INLINE f32x16 f_load_e4m3_half(const uint8_t *p) { return half_to_float((uint16_t)(p[ROW] << 7)) * 128.0f; }
INLINE void f_store(float *p, f32x16 a) { p[ROW] = a; }
INLINE void f_store_n(float *p, f32x16 a, int n) { if (ROW < n) p[ROW] = a; }
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return a + b; }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return a - b; }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return a * b; }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return a / b; }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return a < b ? a : b; }
INLINE f32x16 f_abs(f32x16 a) { return fabsf(a); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) { return fmaf(a, b, c); }
INLINE f32x16 f_round(f32x16 a) { return rintf(a); }
INLINE f32x16 f_scale(f32x16 a, f32x16 n) {
    return a * bits_to_float((uint32_t)((int32_t)(n > -126 ? n : -126) + 127) << 23);
}
INLINE f32x16 f_zero_below(f32x16 a, f32x16 x, float limit) { return x < limit ? 0.0f : a; }
INLINE f32x16 f_keep(f32x16 a, float other, int lo, int hi) { return ROW >= lo && ROW < hi ? a : other; }

INLINE f32x16 f_other(f32x16 a, int lane) {
    union { float f; uint32_t bits; } x;
    x.f = a;
    return bits_to_float(shuffle_bits(x.bits, lane));
}
INLINE float f_sum(f32x16 a) {
    for (int half = 8; half; half /= 2)
        a += f_other(a, half);
    return a;
}
INLINE float f_max_lane(f32x16 a) {
    for (int half = 8; half; half /= 2)
        a = f_max(f_other(a, half), a);
    return a;
}
INLINE int32_t i_sum(int32_t a) {
    for (int half = 8; half; half /= 2)
        a += (int32_t)shuffle_bits((uint32_t)a, half);
    return a;
}
INLINE int32_t i_min(int32_t a) {
    for (int half = 8; half; half /= 2) {
        const int32_t b = (int32_t)shuffle_bits((uint32_t)a, half);
        a = b < a ? b : a;
    }
    return a;
}

INLINE void f_store_block(struct act_block *act, float d, f32x16 lo, f32x16 hi) {
    const int32_t a = (int32_t)rintf(lo), b = (int32_t)rintf(hi), first = i_sum(a), second = i_sum(b);
    act->q[ROW] = (int8_t)a;
    act->q[16 + ROW] = (int8_t)b;
    if (ROW < 3) {
        const int32_t sum = ROW == FIRST ? first : ROW == SECOND ? second : first + second;
        act->sum[ROW] = (float)sum;
        act->neg_sum[ROW] = -sum;
    } else if (ROW == 3) {
        act->d = d;
        act->unused = 0;
    }
}

INLINE f32x16 i_to_f(i32x16 a) { return (float)a; }

INLINE u8x64 u_load(const uint8_t *p) { return *(const uint32_t *)(const void *)(p + 4 * ROW); }
INLINE u8x64 u_or(u8x64 a, u8x64 b) { return a | b; }

/* Two of the table's words are looked up by the low three bits of four codes, and the other two; the fourth
 * bit says which counts. */
INLINE uint32_t table_word(const uint8_t *t) {
    return t[0] | (uint32_t)t[1] << 8 | (uint32_t)t[2] << 16 | (uint32_t)t[3] << 24;
}
INLINE u8x64 u_lookup(const uint8_t table[16], u8x64 a) {
    const uint32_t low = a & 0x07070707, pairs = low | low >> 4,
                   which = (pairs & 255) | (pairs >> 8 & 0xff00);
    const uint32_t first = choose_bytes(table_word(table), table_word(table + 4), which);
    const uint32_t second = choose_bytes(table_word(table + 8), table_word(table + 12), which);
    return first ^ ((first ^ second) & (a >> 3 & 0x01010101) * 255);
}

INLINE void i_dots(i32x16 *t, const int C, codes_fn *codes, const uint8_t *p, const int part,
                   const struct act_block *a, int zero, int) {
    const int from = part == SECOND ? 4 : 0, n = part == WHOLE ? 8 : 4;
    for (int c = 0; c < C; c++)
        t[c] = a[c].neg_sum[part] * zero;
    UNROLL(8)
    for (int g = from; g < from + n; g++) {
        const u8x64 w = codes(p, g);
        for (int c = 0; c < C; c++)
            t[c] = dot4(w, ((const int32_t *)(const void *)a[c].q)[g], t[c]);
    }
}

#include "../kernels/lanes.h"
#include "../kernels/codes.h"
#include "../kernels/values.h"
