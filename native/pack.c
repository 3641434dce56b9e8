#include "pack.h"

#include "kernels/inline.h"
#include "panels.h"
#include "split.h"

#include <math.h>

static uint16_t negative(uint16_t f16) { return f16 ^ 0x8000; }

static void fifth_bits(uint8_t *codes, const uint8_t qh[4]) {
    for (int j = 0; j < 32; j++)
        codes[j] |= (uint8_t)((qh[j / 8] >> j % 8 & 1) << 4);
}

static void split_q4_0(const void *block, struct split *s) {
    const block_q4_0 *b = block;
    s->d = b->scale;
    split_nibbles(s->codes, b->qs, 16);
}

static void split_q4_1(const void *block, struct split *s) {
    const block_q4_1 *b = block;
    s->d = b->scale;
    s->m = b->min;
    split_nibbles(s->codes, b->qs, 16);
}

static void split_q5_0(const void *block, struct split *s) {
    const block_q5_0 *b = block;
    s->d = b->scale;
    split_nibbles(s->codes, b->qs, 16);
    fifth_bits(s->codes, b->qh);
}

static void split_q5_1(const void *block, struct split *s) {
    const block_q5_1 *b = block;
    s->d = b->scale;
    s->m = b->min;
    split_nibbles(s->codes, b->qs, 16);
    fifth_bits(s->codes, b->qh);
}

static void split_q8_0(const void *block, struct split *s) {
    const block_q8_0 *b = block;
    s->d = b->scale;
    for (int j = 0; j < 32; j++)
        s->codes[j] = (uint8_t)b->qs[j] ^ 0x80;
}

static void split_iq4_nl(const void *block, struct split *s) {
    const block_iq4_nl *b = block;
    s->d = b->scale;
    split_nibbles(s->codes, b->qs, 16);
}

static void split_mxfp4(const void *block, struct split *s) {
    const block_mxfp4 *b = block;
    s->scales[0] = b->exponent;
    split_nibbles(s->codes, b->qs, 16);
}

/* A positive float to f16, within its normal numbers; halves away from zero. */
static uint16_t small_float(float x) {
    uint32_t bits;
    x = x < 6.2e-5f ? 6.2e-5f : x > 6e4f ? 6e4f : x;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x1000 - (112u << 23)) >> 13);
}

/* Of four equidistant levels, these are the best for a normal distribution: steps of its own
 * size (Max 1960, table II). */
static void split_coarse(const void *block, struct split *s) {
    const block_coarse *b = block;
    float squares[8] = { 0 }, sum = 0;
    for (int j = 0; j < COARSE_BLOCK; j += 8)
        for (int i = 0; i < 8; i++)
            squares[i] += b->w[j + i] * b->w[j + i];
    for (int i = 0; i < 8; i++)
        sum += squares[i];
    s->d = small_float(0.9957f * sqrtf(sum / COARSE_BLOCK));
    float inverse = 1 / f16_to_f32(s->d);
    for (int j = 0; j < COARSE_BLOCK; j++) {
        float level = b->w[j] * inverse + 2;
        level = level > 3 ? 3 : level > 0 ? level : 0;
        s->codes[j] = (uint8_t)(int)level;
    }
}

static void split_q2_k(const void *block, struct split *s) {
    const block_q2_k *b = block;
    s->d = b->scale;
    s->m = negative(b->min);
    memcpy(s->scales, b->scales, 16);
    split_pairs(s->codes, b->qs);
}

static void split_q3_k(const void *block, struct split *s) {
    const block_q3_k *b = block;
    s->d = b->scale;
    q3_k_scales(b->scales, (int8_t *)s->scales);
    split_pairs(s->codes, b->qs);
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 32; j++)
            s->codes[32 * i + j] |= (uint8_t)((b->hmask[j] >> i & 1) << 2);
}

static void split_q4_k(const void *block, struct split *s) {
    const block_q4_k *b = block;
    s->d = b->scale;
    s->m = negative(b->min);
    q4_k_scales(b->scales, s->scales, s->mins);
    for (int i = 0; i < 4; i++)
        split_nibbles(s->codes + 64 * i, b->qs + 32 * i, 32);
}

static void split_q5_k(const void *block, struct split *s) {
    const block_q5_k *b = block;
    s->d = b->scale;
    s->m = negative(b->min);
    q4_k_scales(b->scales, s->scales, s->mins);
    for (int i = 0; i < 4; i++)
        split_nibbles(s->codes + 64 * i, b->qs + 32 * i, 32);
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 32; j++)
            s->codes[32 * i + j] |= (uint8_t)((b->qh[j] >> i & 1) << 4);
}

static void split_q6_k(const void *block, struct split *s) {
    const block_q6_k *b = block;
    s->d = b->scale;
    memcpy(s->scales, b->scales, 16);
    for (int h = 0; h < 2; h++) {
        split_nibbles(s->codes + 128 * h, b->ql + 64 * h, 64);
        for (int p = 0; p < 4; p++)
            for (int j = 0; j < 32; j++)
                s->codes[128 * h + 32 * p + j] |= (uint8_t)((b->qh[32 * h + j] >> 2 * p & 3) << 4);
    }
}

static void split_iq4_xs(const void *block, struct split *s) {
    const block_iq4_xs *b = block;
    s->d = b->scale;
    iq4_xs_scales(b, (int8_t *)s->scales);
    for (int i = 0; i < 8; i++)
        split_nibbles(s->codes + 32 * i, b->qs + 16 * i, 16);
}

static void split_nvfp4(const void *block, struct split *s) {
    const block_nvfp4 *b = block;
    for (int i = 0; i < 4; i++) {
        s->scales[i] = nvfp4_scale(b->scales[i]);
        split_nibbles(s->codes + 16 * i, b->qs + 8 * i, 8);
    }
}

/* Four columns of one row, a byte each. */
static inline uint32_t quad(const uint8_t *codes, int unit) {
    uint32_t x;
    memcpy(&x, codes + 4 * unit, 4);
    return x;
}

static inline void put(uint8_t *out, uint32_t x) { memcpy(out, &x, 4); }

/* One row's 32 codes into its block of the panel; out points to the row's quad of the first unit. */
static inline void put_u8(uint8_t *out, const uint8_t *codes) {
    for (int g = 0; g < 8; g++)
        put(out + 64 * g, quad(codes, g));
}

static inline void put_u4(uint8_t *out, const uint8_t *codes) {
    for (int g = 0; g < 4; g++)
        put(out + 64 * g, (quad(codes, g) & 0x0f0f0f0f) | (quad(codes, g + 4) & 0x0f0f0f0f) << 4);
}

static inline uint32_t bit_plane(const uint8_t *codes, int bit) {
    uint32_t plane = 0;
    for (int g = 0; g < 8; g++)
        plane |= (quad(codes, g) >> bit & 0x01010101) << g;
    return plane;
}

static inline uint32_t pair_plane(const uint8_t *codes, int half, int bit) {
    uint32_t plane = 0;
    for (int g = 0; g < 4; g++)
        plane |= (quad(codes, 4 * half + g) >> bit & 0x03030303) << 2 * g;
    return plane;
}

static inline void put_u5(uint8_t *out, const uint8_t *codes) {
    put_u4(out, codes);
    put(out + 256, bit_plane(codes, 4));
}

static inline void put_u6(uint8_t *out, const uint8_t *codes) {
    put_u4(out, codes);
    put(out + 256, pair_plane(codes, 0, 4));
    put(out + 320, pair_plane(codes, 1, 4));
}

static inline void put_u2(uint8_t *out, const uint8_t *codes) {
    put(out, pair_plane(codes, 0, 0));
    put(out + 64, pair_plane(codes, 1, 0));
}

static inline void put_u3(uint8_t *out, const uint8_t *codes) {
    put_u2(out, codes);
    put(out + 128, bit_plane(codes, 2));
}

static inline void put_u1(uint8_t *out, const uint8_t *codes) { put(out, bit_plane(codes, 0)); }
static inline void put_iq1(uint8_t *out, const uint8_t *codes) { put_u3(out, codes); }
static inline void put_iq2(uint8_t *out, const uint8_t *codes) { put_u3(out, codes); }
static inline void put_iq3_xxs(uint8_t *out, const uint8_t *codes) { put_u4(out, codes); }
static inline void put_iq3_s(uint8_t *out, const uint8_t *codes) { put_u4(out, codes); }
static inline void put_nl4(uint8_t *out, const uint8_t *codes) { put_u4(out, codes); }
static inline void put_fp4(uint8_t *out, const uint8_t *codes) { put_u4(out, codes); }

static inline void put_f16(uint8_t *out, int row, uint16_t x) { memcpy(out + 2 * row, &x, 2); }

/* One row's head of a superblock, and its scales of 32 columns (block b of the superblock). */
static inline void head_none(uint8_t *out, int row, const struct split *s) { (void)out, (void)row, (void)s; }
static inline void head_d(uint8_t *out, int row, const struct split *s) { put_f16(out, row, s->d); }
static inline void head_dm(uint8_t *out, int row, const struct split *s) {
    put_f16(out, row, s->d);
    put_f16(out + 32, row, s->m);
}
static inline void scales_d(uint8_t *out, int row, const struct split *s, int b) {
    (void)b, head_d(out, row, s);
}
static inline void scales_dm(uint8_t *out, int row, const struct split *s, int b) {
    (void)b, head_dm(out, row, s);
}
static inline void scales_none(uint8_t *out, int row, const struct split *s, int b) {
    (void)b, head_none(out, row, s);
}
static inline void scales_k32(uint8_t *out, int row, const struct split *s, int b) {
    out[row] = s->scales[b];
}
static inline void scales_k(uint8_t *out, int row, const struct split *s, int b) {
    out[row] = s->scales[b];
    out[16 + row] = s->mins[b];
}
static inline void scales_k16(uint8_t *out, int row, const struct split *s, int b) {
    out[row] = s->scales[2 * b];
    out[16 + row] = s->scales[2 * b + 1];
}

#define scales_km16 scales_k16
#define scales_e4m3 scales_k16
#define scales_one scales_none
#define scales_e8 scales_k32
#define scales_s32 scales_k32
#define scales_q32 scales_k32
#define scales_q16 scales_k32
#define scales_b32 scales_k32
#define head_one head_d
#define head_s32 head_d
#define head_q32 head_d
#define head_q16 head_d
#define head_b32 head_d
#define head_e4m3 head_none
#define head_e8 head_none
#define head_k head_dm
#define head_k16 head_d
#define head_k32 head_d
#define head_half head_d
#define scales_half scales_none
#define head_km16 head_dm

struct layout { int super, code_bytes, head_bytes, scale_bytes; };
typedef void put_fn(uint8_t *out, const uint8_t *codes);
typedef void head_fn(uint8_t *out, int row, const struct split *s);
typedef void scales_fn(uint8_t *out, int row, const struct split *s, int b);

/* Where from and where to. */
struct packing {
    const uint8_t *rows;
    size_t row_bytes;
    int n_rows;
    int64_t n_cols;
    uint8_t *codes, *scales;
};
typedef void pack_fn(struct packing p);

INLINE void pack_rows(struct packing p, const struct layout f, size_t block_bytes, split_fn *split,
                      put_fn *put_codes, head_fn *put_head, scales_fn *put_scales) {
    struct split s = { 0 };
    int blocks = f.super / 32;
    for (int64_t k = 0; k < p.n_cols; k += f.super, p.rows += block_bytes) {
        for (int row = 0; row < p.n_rows; row++) {
            split(p.rows + (size_t)row * p.row_bytes, &s);
            if (f.head_bytes)
                put_head(p.scales, row, &s);
            for (int b = 0; b < blocks; b++) {
                put_codes(p.codes + b * f.code_bytes + 4 * row, s.codes + 32 * b);
                put_scales(p.scales + f.head_bytes + b * f.scale_bytes, row, &s, b);
            }
        }
        p.codes += blocks * f.code_bytes;
        p.scales += f.head_bytes + blocks * f.scale_bytes;
    }
}

/* A type without a head per superblock has its d in every block of 32. */
#define PACK(TYPE, name, super, kind, scale, zero) \
    static void pack_##name(struct packing p) { \
        const struct layout f = { super, CODES_##kind, HEAD_##scale, SCALES_##scale }; \
        pack_rows(p, f, sizeof(block_##name), split_##name, put_##kind, head_##scale, scales_##scale); \
    }
PANEL_TYPES(PACK)

#define PACK_FLOAT(TYPE, name, size) \
    static void pack_##name(struct packing p) { \
        for (int row = 0; row < p.n_rows; row++, p.rows += p.row_bytes) \
            for (int64_t k = 0; k < p.n_cols; k++) \
                memcpy(p.codes + (k * PANEL_ROWS + row) * size, p.rows + k * size, size); \
    }
FLOAT_PANEL_TYPES(PACK_FLOAT)

/* Bytes per superblock of 16 rows (float types: per column). */
static const struct panel_type { int super, codes, scales; pack_fn *pack; } panel_types[N_PANEL_TYPES] = {
#define ROW(TYPE, name, super, kind, scale, zero) \
    [TYPE] = { super, super / 32 * CODES_##kind, HEAD_##scale + super / 32 * SCALES_##scale, pack_##name },
    PANEL_TYPES(ROW)
#define FLOAT_ROW(TYPE, name, size) [TYPE] = { 1, PANEL_ROWS * size, 0, pack_##name },
    FLOAT_PANEL_TYPES(FLOAT_ROW)
};

int panel_runs(int type) { return type >= 0 && type < N_TYPES && panel_types[type].pack; }
int panel_quantized(int type) { return panel_types[type].scales > 0; }

struct panel_size panel_size(int type, int64_t n_cols) {
    const struct panel_type *t = &panel_types[type];
    size_t n = (size_t)(n_cols / t->super);
    return (struct panel_size){ n * (size_t)t->codes, n * (size_t)t->scales };
}

void pack_panel(int type, const void *rows, size_t row_bytes, int n_rows, int64_t n_cols, uint8_t *codes,
                uint8_t *scales) {
    struct panel_size size = panel_size(type, n_cols);
    if (n_rows < PANEL_ROWS) {
        memset(codes, 0, size.codes);
        memset(scales, 0, size.scales);
    }
    panel_types[type].pack((struct packing){ rows, row_bytes, n_rows, n_cols, codes, scales });
}
