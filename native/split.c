#include "split.h"

#include "grids.h"

/* Fields of a few bits each, lowest first, to a byte each. */

static uint64_t eight_bits(uint8_t fields) {
    uint64_t x = fields;
    x = (x | x << 28) & 0x0000000f0000000f;
    x = (x | x << 14) & 0x0003000300030003;
    return (x | x << 7) & 0x0101010101010101;
}

static uint64_t eight_pairs(uint16_t fields) {
    uint64_t x = fields;
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    return (x | x << 6) & 0x0303030303030303;
}

static uint64_t four_nibbles(uint16_t fields) {
    uint64_t x = fields;
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

/* The eight signs of seven. */
static uint8_t even_signs(uint32_t bits) {
    bits &= 127;
    return (uint8_t)(bits | (uint32_t)__builtin_parity(bits) << 7);
}

static void put_eight(uint8_t *codes, uint64_t x) { memcpy(codes, &x, 8); }

/* Eight weights of IQ2, and of IQ3 from two entries of its grids. */
static void put_iq2(uint8_t *codes, uint16_t levels, uint8_t signs) {
    put_eight(codes, eight_pairs(levels) | eight_bits(signs) << 2);
}

static void put_iq3(uint8_t *codes, uint16_t first, uint16_t second, uint8_t signs) {
    put_eight(codes, four_nibbles(first) | four_nibbles(second) << 32 | eight_bits(signs) << 3);
}

void split_iq2_xxs(const void *block, struct split *s) {
    const block_iq2_xxs *b = block;
    s->d = b->scale;
    for (int g = 0; g < 8; g++) {
        uint32_t signs = b->groups[g].signs;
        s->scales[g] = (uint8_t)(signs >> 28);
        for (int i = 0; i < 4; i++)
            put_iq2(s->codes + 32 * g + 8 * i, iq2_xxs_grid[b->groups[g].qs[i]], even_signs(signs >> 7 * i));
    }
}

void split_iq2_xs(const void *block, struct split *s) {
    const block_iq2_xs *b = block;
    s->d = b->scale;
    memcpy(s->scales, b->scales, 8);
    for (int i = 0; i < 32; i++)
        put_iq2(s->codes + 8 * i, iq2_xs_grid[b->qs[i] & 511], even_signs(b->qs[i] >> 9));
}

void split_iq2_s(const void *block, struct split *s) {
    const block_iq2_s *b = block;
    s->d = b->scale;
    memcpy(s->scales, b->scales, 8);
    for (int i = 0; i < 32; i++)
        put_iq2(s->codes + 8 * i, iq2_s_grid[b->qs[i] | (b->qh[i / 4] >> i % 4 * 2 & 3) << 8], b->signs[i]);
}

void split_iq3_xxs(const void *block, struct split *s) {
    const block_iq3_xxs *b = block;
    s->d = b->scale;
    for (int g = 0; g < 8; g++) {
        s->scales[g] = (uint8_t)(b->signs[g] >> 28);
        for (int i = 0; i < 4; i++) {
            const uint8_t *q = b->qs + 8 * g + 2 * i;
            uint8_t signs = even_signs(b->signs[g] >> 7 * i);
            put_iq3(s->codes + 32 * g + 8 * i, iq3_xxs_grid[q[0]], iq3_xxs_grid[q[1]], signs);
        }
    }
}

void split_iq3_s(const void *block, struct split *s) {
    const block_iq3_s *b = block;
    s->d = b->scale;
    for (int g = 0; g < 8; g++)
        s->scales[g] = b->scales[g / 2] >> g % 2 * 4 & 15;
    for (int i = 0; i < 32; i++) {
        int high = b->qh[i / 4] >> i % 4 * 2;
        int first = b->qs[2 * i] | (high & 1) << 8, second = b->qs[2 * i + 1] | (high & 2) << 7;
        put_iq3(s->codes + 8 * i, iq3_s_grid[first], iq3_s_grid[second], b->signs[i]);
    }
}

void split_iq1_s(const void *block, struct split *s) {
    const block_iq1_s *b = block;
    s->d = b->scale;
    for (int g = 0; g < 8; g++) {
        int qh = b->qh[g], scale = 2 * (qh >> 12 & 7) + 1;
        s->scales[g] = (uint8_t)(qh & 0x8000 ? -scale : scale);
        for (int i = 0; i < 4; i++) {
            int index = b->qs[4 * g + i] | (qh >> 3 * i & 7) << 8;
            put_eight(s->codes + 32 * g + 8 * i, eight_pairs(iq1_grid[index]));
        }
    }
}

void split_iq1_m(const void *block, struct split *s) {
    const block_iq1_m *b = block;
    s->d = 0;
    for (int i = 0; i < 4; i++) {
        int scales = b->scales[i];
        s->d |= (uint16_t)(scales >> 12 << 4 * i);
        s->scales[2 * i] = (uint8_t)((scales & 7) | (scales >> 3 & 7) << 4);
        s->scales[2 * i + 1] = (uint8_t)((scales >> 6 & 7) | (scales >> 9 & 7) << 4);
    }
    for (int i = 0; i < 32; i++) {
        int high = b->qh[i / 2] >> i % 2 * 4;
        put_iq2(s->codes + 8 * i, iq1_grid[b->qs[i] | (high & 7) << 8], high & 8 ? 255 : 0);
    }
}

/* The next digit of a fraction of 256 in base 3 is what three times the fraction has before the point. */
static void put_digits(uint8_t *codes, const uint8_t *qs, int n, int n_digits) {
    for (int i = 0, power = 1; i < n_digits; i++, power *= 3)
        for (int j = 0; j < n; j++)
            codes[n * i + j] = (uint8_t)((uint8_t)(qs[j] * power) * 3 >> 8);
}

void split_tq1_0(const void *block, struct split *s) {
    const block_tq1_0 *b = block;
    s->d = b->scale;
    put_digits(s->codes, b->qs, 32, 5);
    put_digits(s->codes + 160, b->qs + 32, 16, 5);
    put_digits(s->codes + 240, b->qh, 4, 4);
}

void split_tq2_0(const void *block, struct split *s) {
    const block_tq2_0 *b = block;
    s->d = b->scale;
    split_pairs(s->codes, b->qs);
}

void split_q1_0(const void *block, struct split *s) {
    const block_q1_0 *b = block;
    s->d = b->scale;
    for (int i = 0; i < 16; i++)
        put_eight(s->codes + 8 * i, eight_bits(b->qs[i]));
}

void split_q2_0(const void *block, struct split *s) {
    const block_q2_0 *b = block;
    s->d = b->scale;
    for (int i = 0; i < 8; i++)
        put_eight(s->codes + 8 * i, eight_pairs((uint16_t)(b->qs[2 * i] | b->qs[2 * i + 1] << 8)));
}
