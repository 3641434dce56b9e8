#include "types.h"

#include "split.h"

const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* The order of the float operations is the definition of a type: scale times group scale
 * first, then the weight. */

static void dequantize_f32(const void *blocks, int64_t n, float *out) {
    memcpy(out, blocks, (size_t)n * sizeof *out);
}

static void dequantize_f16(const void *blocks, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, (const char *)blocks + 2 * i, 2);
        out[i] = f16_to_f32(h);
    }
}

static void dequantize_bf16(const void *blocks, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, (const char *)blocks + 2 * i, 2);
        out[i] = bf16_to_f32(h);
    }
}

static void dequantize_q4_0(const void *blocks, int64_t n, float *out) {
    for (const block_q4_0 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)((b->qs[j] & 15) - 8);
            out[j + 16] = scale * (float)((b->qs[j] >> 4) - 8);
        }
    }
}

static void dequantize_q4_1(const void *blocks, int64_t n, float *out) {
    for (const block_q4_1 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale), min = f16_to_f32(b->min);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)(b->qs[j] & 15) + min;
            out[j + 16] = scale * (float)(b->qs[j] >> 4) + min;
        }
    }
}

static int bit(const uint8_t *bits, int j) {
    return bits[j / 8] >> j % 8 & 1;
}

static void dequantize_q5_0(const void *blocks, int64_t n, float *out) {
    for (const block_q5_0 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)(((b->qs[j] & 15) | bit(b->qh, j) << 4) - 16);
            out[j + 16] = scale * (float)((b->qs[j] >> 4 | bit(b->qh, j + 16) << 4) - 16);
        }
    }
}

static void dequantize_q5_1(const void *blocks, int64_t n, float *out) {
    for (const block_q5_1 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale), min = f16_to_f32(b->min);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)((b->qs[j] & 15) | bit(b->qh, j) << 4) + min;
            out[j + 16] = scale * (float)(b->qs[j] >> 4 | bit(b->qh, j + 16) << 4) + min;
        }
    }
}

static void dequantize_q8_0(const void *blocks, int64_t n, float *out) {
    for (const block_q8_0 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale);
        for (int j = 0; j < 32; j++)
            out[j] = scale * (float)b->qs[j];
    }
}

static void dequantize_iq4_nl(const void *blocks, int64_t n, float *out) {
    for (const block_iq4_nl *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = f16_to_f32(b->scale);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)iq4_values[b->qs[j] & 15];
            out[j + 16] = scale * (float)iq4_values[b->qs[j] >> 4];
        }
    }
}

static void dequantize_mxfp4(const void *blocks, int64_t n, float *out) {
    for (const block_mxfp4 *b = blocks; n > 0; n -= 32, out += 32, b++) {
        float scale = e8m0_half(b->exponent);
        for (int j = 0; j < 16; j++) {
            out[j] = scale * (float)mxfp4_values[b->qs[j] & 15];
            out[j + 16] = scale * (float)mxfp4_values[b->qs[j] >> 4];
        }
    }
}

/* The two bits of weight j in the qs of Q2_K and Q3_K and the qh of Q6_K. */
static int pair(const uint8_t *qs, int j) {
    return qs[j / 128 * 32 + j % 32] >> j % 128 / 32 * 2 & 3;
}

static void dequantize_q2_k(const void *blocks, int64_t n, float *out) {
    for (const block_q2_k *b = blocks; n > 0; n -= 256, out += 256, b++) {
        float scale = f16_to_f32(b->scale), min = f16_to_f32(b->min);
        for (int j = 0; j < 256; j++) {
            uint8_t sm = b->scales[j / 16];
            out[j] = scale * (float)(sm & 15) * (float)pair(b->qs, j) - min * (float)(sm >> 4);
        }
    }
}

static void dequantize_q3_k(const void *blocks, int64_t n, float *out) {
    for (const block_q3_k *b = blocks; n > 0; n -= 256, out += 256, b++) {
        float scale = f16_to_f32(b->scale);
        int8_t scales[16];
        q3_k_scales(b->scales, scales);
        for (int j = 0; j < 256; j++) {
            int q = pair(b->qs, j) | (b->hmask[j % 32] >> j / 32 & 1) << 2;
            out[j] = scale * (float)scales[j / 16] * (float)(q - 4);
        }
    }
}

static void dequantize_q4_k(const void *blocks, int64_t n, float *out) {
    for (const block_q4_k *b = blocks; n > 0; n -= 256, out += 256, b++) {
        float scale = f16_to_f32(b->scale), min = f16_to_f32(b->min);
        uint8_t scales[8], mins[8];
        q4_k_scales(b->scales, scales, mins);
        for (int j = 0; j < 256; j++) {
            int g = j / 32, q = b->qs[j / 64 * 32 + j % 32] >> g % 2 * 4 & 15;
            out[j] = scale * (float)scales[g] * (float)q - min * (float)mins[g];
        }
    }
}

static void dequantize_q5_k(const void *blocks, int64_t n, float *out) {
    for (const block_q5_k *b = blocks; n > 0; n -= 256, out += 256, b++) {
        float scale = f16_to_f32(b->scale), min = f16_to_f32(b->min);
        uint8_t scales[8], mins[8];
        q4_k_scales(b->scales, scales, mins);
        for (int j = 0; j < 256; j++) {
            int g = j / 32;
            int q = (b->qs[j / 64 * 32 + j % 32] >> g % 2 * 4 & 15) | (b->qh[j % 32] >> g & 1) << 4;
            out[j] = scale * (float)scales[g] * (float)q - min * (float)mins[g];
        }
    }
}

static void dequantize_q6_k(const void *blocks, int64_t n, float *out) {
    for (const block_q6_k *b = blocks; n > 0; n -= 256, out += 256, b++) {
        for (int g = 0; g < 16; g++) {          /* 16 at a time, so that a compiler may do them at once */
            const uint8_t *ql = b->ql + g / 8 * 64 + g % 4 * 16, *qh = b->qh + g / 8 * 32 + g % 2 * 16;
            int low = g % 8 / 4 * 4, high = g % 8 / 2 * 2;
            float scale = f16_to_f32(b->scale) * (float)b->scales[g];
            for (int i = 0; i < 16; i++)
                out[16 * g + i] = scale * (float)(((ql[i] >> low & 15) | (qh[i] >> high & 3) << 4) - 32);
        }
    }
}

static void dequantize_iq4_xs(const void *blocks, int64_t n, float *out) {
    for (const block_iq4_xs *b = blocks; n > 0; n -= 256, out += 256, b++) {
        float scale = f16_to_f32(b->scale);
        int8_t scales[8];
        iq4_xs_scales(b, scales);
        for (int j = 0; j < 256; j++) {
            int g = j / 32, q = b->qs[g * 16 + j % 16] >> j % 32 / 16 * 4 & 15;
            out[j] = scale * (float)scales[g] * (float)iq4_values[q];
        }
    }
}

/* w = d * (step * code - 1) */
static inline void plain_codes(const void *blocks, int64_t n, float *out, split_fn *split, int block_size,
                               size_t bytes, int step) {
    struct split s;
    for (const char *b = blocks; n > 0; n -= block_size, out += block_size, b += bytes) {
        split(b, &s);
        float scale = f16_to_f32(s.d);
        for (int j = 0; j < block_size; j++)
            out[j] = scale * (float)(step * s.codes[j] - 1);
    }
}

#define PLAIN_CODES(name, block_size, step) \
    static void dequantize_##name(const void *blocks, int64_t n, float *out) { \
        plain_codes(blocks, n, out, split_##name, block_size, sizeof(block_##name), step); \
    }
PLAIN_CODES(q1_0, 128, 2)
PLAIN_CODES(q2_0, 64, 1)
PLAIN_CODES(tq1_0, 256, 1)
PLAIN_CODES(tq2_0, 256, 1)

/* w = d * unit * (s + 1/2) * values[code], s per 16 or 32 weights */
static inline void grid_codes(const void *blocks, int64_t n, float *out, split_fn *split, size_t bytes,
                              int per, float unit, const float *values) {
    struct split s;
    for (const char *b = blocks; n > 0; n -= 256, out += 256, b += bytes) {
        split(b, &s);
        for (int g = 0; g < 16; g++) {
            int sc = per == 32 ? s.scales[g / 2] : s.scales[g / 2] >> g % 2 * 4 & 15;
            float scale = f16_to_f32(s.d) * unit * ((float)sc + 0.5f);
            for (int j = 16 * g; j < 16 * g + 16; j++)
                out[j] = scale * values[s.codes[j]];
        }
    }
}

#define GRID_CODES(name, per, unit, ...) \
    static void dequantize_##name(const void *blocks, int64_t n, float *out) { \
        static const float values[16] = { __VA_ARGS__ }; \
        grid_codes(blocks, n, out, split_##name, sizeof(block_##name), per, unit, values); \
    }
#define IQ2_VALUES 8, 25, 43, 0, -8, -25, -43
GRID_CODES(iq1_m,   16, 2, -0.875f, 0.125f, 1.125f, 0, -1.125f, -0.125f, 0.875f)
GRID_CODES(iq2_xxs, 32, 0.25f, IQ2_VALUES)
GRID_CODES(iq2_xs,  16, 0.25f, IQ2_VALUES)
GRID_CODES(iq2_s,   16, 0.25f, IQ2_VALUES)
GRID_CODES(iq3_xxs, 32, 0.5f, 4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
GRID_CODES(iq3_s,   32, 2, 1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)

static void dequantize_iq1_s(const void *blocks, int64_t n, float *out) {
    struct split s;
    for (const block_iq1_s *b = blocks; n > 0; n -= 256, out += 256, b++) {
        split_iq1_s(b, &s);
        for (int j = 0; j < 256; j++) {
            int scale = (int8_t)s.scales[j / 32], size = scale < 0 ? -scale : scale;
            float shift = scale < 0 ? -0.125f : 0.125f;
            out[j] = f16_to_f32(s.d) * (float)size * ((float)(s.codes[j] - 1) + shift);
        }
    }
}

static void dequantize_nvfp4(const void *blocks, int64_t n, float *out) {
    for (const block_nvfp4 *b = blocks; n > 0; n -= 64, out += 64, b++)
        for (int j = 0; j < 64; j++) {
            int g = j / 16, q = b->qs[8 * g + j % 8] >> j % 16 / 8 * 4 & 15;
            out[j] = e4m3_half(nvfp4_scale(b->scales[g])) * (float)mxfp4_values[q];
        }
}

const struct type types[N_TYPES] = {
    [TYPE_F32]     = {"f32",       1, 4,                    dequantize_f32},
    [TYPE_F16]     = {"f16",       1, 2,                    dequantize_f16},
    [TYPE_BF16]    = {"bf16",      1, 2,                    dequantize_bf16},
    [TYPE_Q8_0]    = {"q8_0",     32, sizeof(block_q8_0),   dequantize_q8_0},
    [TYPE_Q4_0]    = {"q4_0",     32, sizeof(block_q4_0),   dequantize_q4_0},
    [TYPE_Q4_1]    = {"q4_1",     32, sizeof(block_q4_1),   dequantize_q4_1},
    [TYPE_Q5_0]    = {"q5_0",     32, sizeof(block_q5_0),   dequantize_q5_0},
    [TYPE_Q5_1]    = {"q5_1",     32, sizeof(block_q5_1),   dequantize_q5_1},
    [TYPE_IQ4_NL]  = {"iq4_nl",   32, sizeof(block_iq4_nl), dequantize_iq4_nl},
    [TYPE_MXFP4]   = {"mxfp4",    32, sizeof(block_mxfp4),  dequantize_mxfp4},
    [TYPE_Q2_K]    = {"q2_K",    256, sizeof(block_q2_k),   dequantize_q2_k},
    [TYPE_Q3_K]    = {"q3_K",    256, sizeof(block_q3_k),   dequantize_q3_k},
    [TYPE_Q4_K]    = {"q4_K",    256, sizeof(block_q4_k),   dequantize_q4_k},
    [TYPE_Q5_K]    = {"q5_K",    256, sizeof(block_q5_k),   dequantize_q5_k},
    [TYPE_Q6_K]    = {"q6_K",    256, sizeof(block_q6_k),   dequantize_q6_k},
    [TYPE_IQ4_XS]  = {"iq4_xs",  256, sizeof(block_iq4_xs), dequantize_iq4_xs},
    [TYPE_IQ1_S]   = {"iq1_s",    256, sizeof(block_iq1_s),   dequantize_iq1_s},
    [TYPE_IQ1_M]   = {"iq1_m",    256, sizeof(block_iq1_m),   dequantize_iq1_m},
    [TYPE_IQ2_XXS] = {"iq2_xxs",  256, sizeof(block_iq2_xxs), dequantize_iq2_xxs},
    [TYPE_IQ2_XS]  = {"iq2_xs",   256, sizeof(block_iq2_xs),  dequantize_iq2_xs},
    [TYPE_IQ2_S]   = {"iq2_s",    256, sizeof(block_iq2_s),   dequantize_iq2_s},
    [TYPE_IQ3_XXS] = {"iq3_xxs",  256, sizeof(block_iq3_xxs), dequantize_iq3_xxs},
    [TYPE_IQ3_S]   = {"iq3_s",    256, sizeof(block_iq3_s),   dequantize_iq3_s},
    [TYPE_TQ1_0]   = {"tq1_0",    256, sizeof(block_tq1_0),   dequantize_tq1_0},
    [TYPE_TQ2_0]   = {"tq2_0",    256, sizeof(block_tq2_0),   dequantize_tq2_0},
    [TYPE_Q1_0]    = {"q1_0",     128, sizeof(block_q1_0),    dequantize_q1_0},
    [TYPE_Q2_0]    = {"q2_0",      64, sizeof(block_q2_0),    dequantize_q2_0},
    [TYPE_NVFP4]   = {"nvfp4",     64, sizeof(block_nvfp4),   dequantize_nvfp4},

    [TYPE_Q8_1]    = {"q8_1",     32,  40, NULL},
    [TYPE_Q8_K]    = {"q8_K",    256, 292, NULL},
    [TYPE_I8]      = {"i8",        1,   1, NULL},
    [TYPE_I16]     = {"i16",       1,   2, NULL},
    [TYPE_I32]     = {"i32",       1,   4, NULL},
    [TYPE_I64]     = {"i64",       1,   8, NULL},
    [TYPE_F64]     = {"f64",       1,   8, NULL},
};

const struct type *type_find(int number) {
    if (number < 0 || number >= N_TYPES || !types[number].name)
        return NULL;
    return &types[number];
}
