/* What a panel's bytes mean: codes of 32 columns, their scales and mins, and what a block adds to a sum. In
 * the words of lanes_<isa>.h, for the CPU's kernels and the GPU's. */

/* Scales and mins of 16 rows: one pair per 32 columns, or one for each half of them. */
struct scales { f32x16 scale[2], min[2]; };

/* Columns 4g to 4g + 3 of a block's 32, of 16 rows: a byte each. */
INLINE u8x64 codes_u4(const uint8_t *p, int g) { return u_shr(u_load(p + 64 * (g % 4)), g / 4 * 4, 15); }

INLINE u8x64 codes_u5(const uint8_t *p, int g) {
    u8x64 plane = u_load(p + 256);
    return u_or(codes_u4(p, g), g < 4 ? u_shl(plane, 4 - g, 16) : u_shr(plane, g - 4, 16));
}

INLINE u8x64 codes_u6(const uint8_t *p, int g) {
    u8x64 plane = u_load(p + 256 + 64 * (g / 4));
    return u_or(codes_u4(p, g),
                g % 4 < 2 ? u_shl(plane, 4 - g % 4 * 2, 48) : u_shr(plane, g % 4 * 2 - 4, 48));
}

INLINE u8x64 codes_u8(const uint8_t *p, int g) { return u_load(p + 64 * g); }

INLINE u8x64 codes_u2(const uint8_t *p, int g) { return u_shr(u_load(p + 64 * (g / 4)), g % 4 * 2, 3); }

INLINE u8x64 codes_u3(const uint8_t *p, int g) {
    u8x64 plane = u_load(p + 128);
    return u_or(codes_u2(p, g), g < 2 ? u_shl(plane, 2 - g, 4) : u_shr(plane, g - 2, 4));
}

INLINE u8x64 codes_nl4(const uint8_t *p, int g) {
    static const uint8_t values[16] = {         /* + 128 */
        1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241,
    };
    return u_lookup(values, codes_u4(p, g));
}

INLINE u8x64 codes_fp4(const uint8_t *p, int g) {
    /* 2x + 16 */
    static const uint8_t values[16] = { 16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4 };
    return u_lookup(values, codes_u4(p, g));
}

INLINE u8x64 codes_u1(const uint8_t *p, int g) {
    u8x64 plane = u_load(p);
    return g ? u_shr(plane, g - 1, 2) : u_shl(plane, 1, 2);
}

/* Codes that no file gives stand for zero. */
INLINE u8x64 codes_iq1(const uint8_t *p, int g) {      /* 8 (level - 1 + shift) + 16 */
    static const uint8_t values[16] = { 9, 17, 25, 16, 7, 15, 23, 16 };
    return u_lookup(values, codes_u3(p, g));
}

INLINE u8x64 codes_iq2(const uint8_t *p, int g) {      /* + 64 */
    static const uint8_t values[16] = { 72, 89, 107, 64, 56, 39, 21, 64 };
    return u_lookup(values, codes_u3(p, g));
}

INLINE u8x64 codes_iq3_xxs(const uint8_t *p, int g) {  /* half of a level, + 32 */
    static const uint8_t values[16] = { 34, 38, 42, 46, 50, 54, 58, 63, 30, 26, 22, 18, 14, 10, 6, 1 };
    return u_lookup(values, codes_u4(p, g));
}

INLINE u8x64 codes_iq3_s(const uint8_t *p, int g) {    /* twice a level, + 32 */
    static const uint8_t values[16] = { 34, 38, 42, 46, 50, 54, 58, 62, 30, 26, 22, 18, 14, 10, 6, 2 };
    return u_lookup(values, codes_u4(p, g));
}

/* Each fills s from p (this block of 32) and the head of the superblock. */
INLINE void d_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    (void)head;
    s->scale[0] = f_load_f16((const uint16_t *)(const void *)p);
}

INLINE void dm_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    d_scales(s, head, p);
    s->min[0] = f_load_f16((const uint16_t *)(const void *)(p + 32));
}

INLINE void half_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    d_scales(s, p, head);
    s->min[0] = f_mul(s->scale[0], f_set(-1.5f));
}

INLINE void e8_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    (void)head;
    s->scale[0] = f_load_e8m0_half(p);
}

INLINE f32x16 head_f16(const uint8_t *head, int i) {
    return f_load_f16((const uint16_t *)(const void *)head + 16 * i);
}

INLINE void k_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    s->scale[0] = f_mul(head_f16(head, 0), f_load_u8(p));
    s->min[0] = f_mul(head_f16(head, 1), f_load_u8(p + 16));
}

INLINE void k16_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    for (int h = 0; h < 2; h++)
        s->scale[h] = f_mul(head_f16(head, 0), f_load_i8((const int8_t *)p + 16 * h));
}

INLINE void k32_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    s->scale[0] = f_mul(head_f16(head, 0), f_load_i8((const int8_t *)p));
}

/* unit * d * (s + 1/2) */
INLINE f32x16 half_more(const uint8_t *head, float unit, f32x16 s) {
    return f_mul(f_mul(head_f16(head, 0), f_set(unit)), f_add(s, f_set(0.5f)));
}

INLINE void s32_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    s->scale[0] = half_more(head, 1, f_load_u8(p));
}

INLINE void q32_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    s->scale[0] = half_more(head, 0.25f, f_load_u8(p));
}

INLINE void q16_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    for (int h = 0; h < 2; h++)
        s->scale[h] = half_more(head, 0.25f, f_load_u4(p, 4 * h));
}

INLINE void b32_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    f32x16 sc = f_load_i8((const int8_t *)p);
    s->scale[0] = f_mul(head_f16(head, 0), f_abs(sc));
    s->min[0] = f_mul(f_mul(head_f16(head, 0), f_set(0.125f)), sc);
}

INLINE void one_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    (void)p;
    s->scale[0] = head_f16(head, 0);
}

INLINE void e4m3_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    (void)head;
    for (int h = 0; h < 2; h++)
        s->scale[h] = f_load_e4m3_half(p + 16 * h);
}

INLINE void km16_scales(struct scales *s, const uint8_t *head, const uint8_t *p) {
    for (int h = 0; h < 2; h++) {
        s->scale[h] = f_mul(head_f16(head, 0), f_load_u4(p + 16 * h, 0));
        s->min[h] = f_mul(head_f16(head, 1), f_load_u4(p + 16 * h, 4));
    }
}

/* What the compiler knows of a type while it writes its loop. */
struct format { int super, code_bytes, scale_bytes, head_bytes, halves, mins, zero, bits; };
typedef void scales_fn(struct scales *s, const uint8_t *head, const uint8_t *p);

/* What 32 columns add to the sums of C tokens, up to TOGETHER, but for the activations' own scale. */
INLINE void terms(const struct format f, codes_fn *codes, const uint8_t *p, const struct scales *s,
                  const struct act_block *a, f32x16 *t, const int C) {
    i32x16 dots[TOGETHER];
    i_dots(dots, C, codes, p, f.halves ? FIRST : WHOLE, a, f.zero, f.bits);
    UNROLL(4)
    for (int c = 0; c < C; c++)
        t[c] = f_mul(i_to_f(dots[c]), s->scale[0]);
    if (f.halves) {
        i_dots(dots, C, codes, p, SECOND, a, f.zero, f.bits);
        UNROLL(4)
        for (int c = 0; c < C; c++)
            t[c] = f_fma(i_to_f(dots[c]), s->scale[1], t[c]);
    }
    UNROLL(4)
    for (int c = 0; c < C; c++)
        if (f.mins && f.halves)
            t[c] = f_fma(s->min[1], f_set(a[c].sum[SECOND]), f_fma(s->min[0], f_set(a[c].sum[FIRST]), t[c]));
        else if (f.mins)
            t[c] = f_fma(s->min[0], f_set(a[c].sum[WHOLE]), t[c]);
}
