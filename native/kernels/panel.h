/* Panels times activations: decode 32 columns of 16 rows once, multiply them with every token of the tile.
 *
 * A type is one codes_*, one *_scales and its row in PANEL_TYPES; the loop is the same for all. */

#include "codes.h"

/* y + W a for 32 columns and C tokens, up to TOGETHER. */
INLINE void dot_blocks(const struct format f, codes_fn *codes, const uint8_t *p, const struct scales *s,
                       const struct act_block *a, f32x16 *y, const int C) {
    f32x16 t[TOGETHER];
    terms(f, codes, p, s, a, t, C);
    UNROLL(4)
    for (int c = 0; c < C; c++)
        y[c] = f_fma(t[c], f_set(a[c].d), y[c]);
}

INLINE void put(const struct panel_job *j, int panel, int col, f32x16 y) {
    int row = PANEL_ROWS * panel, n = j->n_rows - row < 16 ? j->n_rows - row : 16;
    float *out = j->out + (size_t)col * j->out_stride + row;
    if (n == 16) {                          /* nearly always, and masks are slow */
        if (j->bias)
            y = f_add(y, f_load(j->bias + row));
        f_store(out, j->add ? f_add(f_load(out), y) : y);
        return;
    }
    if (j->bias)
        y = f_add(y, f_load_n(j->bias + row, n));
    if (j->add)
        y = f_add(f_load_n(out, n), y);
    f_store_n(out, y, n);
}

/* Weights stream from memory while columns keep the core busy for longer than it looks ahead, so they are
 * asked for early: for one or two columns into the first cache. More columns' activations fill that one (a
 * line for each block and column), so that what comes for them waits in the second, and can be asked for
 * earlier: with 4 columns of Q4_K that is 10% of a pass, with 8 of Q8_0 25% (Zen 4). */
enum { AHEAD = 2048, FAR_AHEAD = 6144 };

INLINE void ask_ahead(const uint8_t *p, const int C, int slower) {
    if (C <= 2)
        __builtin_prefetch(p + AHEAD / slower);
    else
        __builtin_prefetch(p + FAR_AHEAD / slower, 0, 2);
}

/* Walks through a panel and does the work for each block: p and sc are 32 columns of it, a the activations of
 * the C tokens they meet. */
#define EACH_BLOCK(C, work) \
    const uint8_t *p = j->codes + (size_t)panel * j->code_stride; \
    const uint8_t *s = j->scales + (size_t)panel * j->scale_stride; \
    for (int k = 0; k < j->k; k += f.super) { \
        const uint8_t *head = s; \
        s += f.head_bytes; \
        for (int b = 0; b < f.super; b += 32, p += f.code_bytes, s += f.scale_bytes, a += j->n_cols) { \
            struct scales sc; \
            for (int line = 0; line < f.code_bytes; line += 64) \
                ask_ahead(p + line, C, 1); \
            ask_ahead(s, C, 8);             /* scales take about an eighth of the codes' bytes */ \
            scales(&sc, head, s); \
            work \
        } \
    }

/* One panel times all C columns of the tile. */
INLINE void panel_cols(const struct panel_job *j, int panel, const int C, const struct format f,
                       codes_fn *codes, scales_fn *scales) {
    const struct act_block *a = j->act;
    f32x16 y[COLS_MAX];
    UNROLL(16)
    for (int c = 0; c < C; c++)
        y[c] = f_zero();
    EACH_BLOCK(C,
        if (COLS_MAX <= 4 && C > 2)
            __asm__("" : "+m"(sc));         /* no register is left for them beside the sums */
        UNROLL(16)
        for (int c = 0; c < C; c += TOGETHER)
            dot_blocks(f, codes, p, &sc, a + c, y + c, C - c < TOGETHER ? C - c : TOGETHER);
    )
    UNROLL(16)
    for (int c = 0; c < C; c++)
        put(j, panel, c, y[c]);
}

/* What a tile has left after groups of TOGETHER. */
#define REST(C) case C: if (C < TOGETHER) dot_blocks(f, codes_u8, w, &sc, a + c, y + c, C); break;

/* The block's weights in a byte each. */
INLINE const uint8_t *decoded(uint8_t kept[CODES_u8], const uint8_t *p, codes_fn *codes) {
    if (codes == codes_u8)
        return p;
    UNROLL(8)
    for (int g = 0; g < 8; g++)
        u_store(kept + 64 * g, codes(p, g));
    return kept;
}

/* One panel times all columns of a tile that is wider than COLS_MAX: there are no registers for their sums. A
 * block is decoded once for all groups of TOGETHER. */
INLINE void panel_all(const struct panel_job *j, int panel, const struct format f, codes_fn *codes,
                      scales_fn *scales) {
    const struct act_block *a = j->act;
    f32x16 y[TILE_COLS];
    uint8_t kept[CODES_u8] __attribute__((aligned(64)));
    int n = j->n_cols, c;
    for (c = 0; c < n; c++)
        y[c] = f_zero();
    EACH_BLOCK(TILE_COLS,
        const uint8_t *w = decoded(kept, p, codes);
        for (c = 0; c + TOGETHER <= n; c += TOGETHER)
            dot_blocks(f, codes_u8, w, &sc, a + c, y + c, TOGETHER);
        switch (n - c) { REST(1) REST(2) REST(3) }
    )
    for (c = 0; c < n; c++)
        put(j, panel, c, y[c]);
}

#define COLS(C) case C: panel_cols(j, panel, C, f, codes, scales); break;

INLINE void panels(const struct panel_job *j, const struct format f, codes_fn *codes, scales_fn *scales) {
    for (int panel = 0; panel < j->n_panels; panel++) {
        switch (j->n_cols) {
            COLS(1) COLS(2)
#if COLS_MAX > 2
            COLS(3) COLS(4)
#endif
#if COLS_MAX > 4
            COLS(5) COLS(6) COLS(7) COLS(8) COLS(9) COLS(10)
            COLS(11) COLS(12) COLS(13) COLS(14) COLS(15) COLS(16)
#endif
        default: panel_all(j, panel, f, codes, scales);
        }
    }
}

#define QUANTIZED(TYPE, name, super, codes, scales, zero) \
    static void panel_##name(const struct panel_job *j) { \
        const struct format f = { super, CODES_##codes, SCALES_##scales, HEAD_##scales, HALVES_##scales, \
                                  MINS_##scales, zero, BITS_##codes }; \
        panels(j, f, codes_##codes, scales##_scales); \
    }
PANEL_TYPES(QUANTIZED)

/* Float weights: P panels times C columns, so that enough chains of fma run at once. */
enum { P_MAX = 4 };
typedef f32x16 load_fn(const uint8_t *p);
INLINE f32x16 load_f32(const uint8_t *p) { return f_load((const float *)(const void *)p); }
INLINE f32x16 load_f16(const uint8_t *p) { return f_load_f16((const uint16_t *)(const void *)p); }
INLINE f32x16 load_bf16(const uint8_t *p) { return f_load_bf16((const uint16_t *)(const void *)p); }

INLINE void float_cols(const struct panel_job *j, int panel, const int P, int col, const int C, int unit,
                       load_fn *load) {
    const uint8_t *p = j->codes + (size_t)panel * j->code_stride;
    const float *x = j->x + (size_t)col * j->x_stride;
    const size_t ahead = C <= 2 ? AHEAD / 2 : 2 * AHEAD;
    f32x16 y[P_MAX][6];
    UNROLL(4)
    for (int i = 0; i < P; i++)
        UNROLL(8)
        for (int c = 0; c < C; c++)
            y[i][c] = f_zero();
    for (int k = 0; k < j->k; k++, p += unit)
        UNROLL(4)
        for (int i = 0; i < P; i++) {
            /* P streams: to the second level. */
            __builtin_prefetch(p + (size_t)i * j->code_stride + ahead, 0, 2);
            f32x16 w = load(p + (size_t)i * j->code_stride);
            UNROLL(8)
            for (int c = 0; c < C; c++)
                y[i][c] = f_fma(w, f_set(x[(size_t)c * j->x_stride + (size_t)k]), y[i][c]);
        }
    UNROLL(4)
    for (int i = 0; i < P; i++)
        UNROLL(8)
        for (int c = 0; c < C; c++)
            put(j, panel + i, col + c, y[i][c]);
}

/* P_MAX panels, or one, times C columns; fewer at a time where there are too few registers for all. */
INLINE void float_block(const struct panel_job *j, int panel, const int many, int col, const int C, int unit,
                        load_fn *load) {
    const int P = many ? FLOAT_PANELS(C) : 1;
    for (int i = 0; i < (many ? P_MAX : 1); i += P)
        float_cols(j, panel + i, P, col, C, unit, load);
}

#define FLOAT_COLS(C) \
    case C: \
        if (many) float_block(j, panel, 1, col, C, unit, load); \
        else float_block(j, panel, 0, col, C, unit, load); \
        break;

INLINE void float_panels(const struct panel_job *j, int unit, load_fn *load) {
    for (int panel = 0, many; panel < j->n_panels; panel += many ? P_MAX : 1) {
        many = j->n_panels - panel >= P_MAX;
        for (int col = 0, n; col < j->n_cols; col += n) {
            n = j->n_cols - col < FLOAT_COLS_MAX ? j->n_cols - col : FLOAT_COLS_MAX;
            switch (n) {
                FLOAT_COLS(1) FLOAT_COLS(2) FLOAT_COLS(3) FLOAT_COLS(4) FLOAT_COLS(5) FLOAT_COLS(6)
            }
        }
    }
}

#define FLOAT(TYPE, name, size) \
    static void panel_##name(const struct panel_job *j) { float_panels(j, PANEL_ROWS * size, load_##name); }
FLOAT_PANEL_TYPES(FLOAT)

#define INSTALL(TYPE, name, ...) k->panel[TYPE] = panel_##name;

void ISA(panel)(struct kernels *k) {
    PANEL_TYPES(INSTALL)
    FLOAT_PANEL_TYPES(INSTALL)
}
