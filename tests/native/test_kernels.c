/* Panels, 8-bit blocks and attention, on every ISA this CPU has: the bits of the reference, and the values of
 * plain double arithmetic.
 *
 * Tolerances are worst cases of float32 rounding, in units of 2^-24 times the sum of magnitudes; each
 * is shown to fail for zeros and for a small error in the input. Buffers are as large as kernels may
 * use, for the sanitizer. */
#include "bmc.h"
#include "isas.h"
#include "pack.h"
#include "panels.h"
#include "types.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

/* Panels. */

/* Where a type's f16 fields are in its block; -1: none. */
static void f16_fields(int type, int at[2]) {
    at[0] = 0, at[1] = -1;
    switch (type) {
    case TYPE_Q4_1: at[1] = offsetof(block_q4_1, min); break;
    case TYPE_Q5_1: at[1] = offsetof(block_q5_1, min); break;
    case TYPE_Q2_K: at[0] = offsetof(block_q2_k, scale), at[1] = offsetof(block_q2_k, min); break;
    case TYPE_Q3_K: at[0] = offsetof(block_q3_k, scale); break;
    case TYPE_Q4_K: at[1] = offsetof(block_q4_k, min); break;
    case TYPE_Q5_K: at[1] = offsetof(block_q5_k, min); break;
    case TYPE_Q6_K: at[0] = offsetof(block_q6_k, scale); break;
    case TYPE_TQ1_0: at[0] = offsetof(block_tq1_0, scale); break;
    case TYPE_TQ2_0: at[0] = offsetof(block_tq2_0, scale); break;
    case TYPE_MXFP4: case TYPE_NVFP4: case TYPE_IQ1_M: at[0] = -1; break;
    }
}

/* IQ1_M's f16, four bits in the last of each four scales. */
static void set_iq1_m(uint8_t *block, uint16_t f16) {
    for (int i = 0; i < 4; i++) {
        uint8_t *last = block + offsetof(block_iq1_m, scales) + 2 * i + 1;
        *last = (uint8_t)((*last & 15) | (f16 >> 4 * i & 15) << 4);
    }
}

/* Of both signs, zero and subnormal now and then. */
static uint16_t random_f16(void) {
    return f32_to_f16(random_below(&state, 16) ? noise() : random_below(&state, 2) ? 3e-6f : 0.0f);
}

/* Any codes and small scales. */
static void random_block(int type, uint8_t *block) {
    int at[2];
    for (int i = 0; i < types[type].type_size; i++)
        block[i] = (uint8_t)random_bits(&state);
    f16_fields(type, at);
    for (int i = 0; i < 2; i++)
        if (at[i] >= 0) {
            uint16_t h = random_f16();
            memcpy(block + at[i], &h, 2);
        }
    if (type == TYPE_IQ1_M)
        set_iq1_m(block, random_f16());
    if (type == TYPE_MXFP4)
        block[0] = (uint8_t)(random_below(&state, 16) ? 120 + random_below(&state, 10)
                                                      : random_below(&state, 3));
}

static void random_row(int type, uint8_t *row, int k) {
    for (int i = 0; i < k / types[type].block_size; i++) {
        uint8_t *block = row + (size_t)i * (size_t)types[type].type_size;
        float x = noise();
        uint16_t f16 = f32_to_f16(x), bf16 = f32_to_bf16(x);
        switch (type) {
        case TYPE_F32: memcpy(block, &x, 4); break;
        case TYPE_F16: memcpy(block, &f16, 2); break;
        case TYPE_BF16: memcpy(block, &bf16, 2); break;
        default: random_block(type, block);
        }
    }
}

/* A matrix in both forms, activations, and what their product is. */
struct product {
    int type, rows, k;
    size_t row_bytes;
    uint8_t *file;
    struct panel_size size;
    uint8_t *codes, *scales;
    float *x;                   /* (TILE_COLS, k) */
    struct act_block *act;      /* [TILE_COLS][k / 32]: each column on its own */
    float *bias, *before;       /* (rows,), (TILE_COLS, rows) */
    double *exact, *slack;      /* (TILE_COLS, rows) without bias */
    float *ref;                 /* (TILE_COLS, rows) the reference's, one column at a time */
};

static void pack(struct product *p) {
    int panels = (p->rows + 15) / 16;
    p->size = panel_size(p->type, p->k);
    p->codes = get_memory((size_t)panels * p->size.codes);
    p->scales = get_memory((size_t)panels * p->size.scales);
    for (int i = 0; i < panels; i++)
        pack_panel(p->type, p->file + (size_t)i * 16 * p->row_bytes, p->row_bytes,
                   p->rows - 16 * i < 16 ? p->rows - 16 * i : 16, p->k, p->codes + (size_t)i * p->size.codes,
                   p->scales + (size_t)i * p->size.scales);
}

/* Rounding, at worst: once a block for the running sum, and 6 times in what is added to it (scales
 * and mins made of two factors each). A weight is scale * code + min, each of which is at most 3 times
 * the largest of its block. */
static void compute_exact(struct product *p) {
    float *w = get_memory((size_t)p->k * sizeof *w);
    int quantized = panel_quantized(p->type);
    for (int row = 0; row < p->rows; row++) {
        types[p->type].dequantize(p->file + (size_t)row * p->row_bytes, p->k, w);
        for (int col = 0; col < TILE_COLS; col++) {
            double sum = 0, size = 0;
            for (int b = 0; b < p->k; b += 32) {
                const struct act_block *a = &p->act[(col * p->k + b) / 32];
                double top = 0, xs = 0;
                for (int i = b; i < b + 32; i++) {
                    double x = quantized ? (double)a->d * a->q[i - b] : (double)p->x[col * p->k + i];
                    sum += (double)w[i] * x;
                    size += quantized ? 0 : fabs((double)w[i] * x);
                    top = fmax(top, fabs((double)w[i]));
                    xs += fabs(x);
                }
                size += quantized ? 3 * top * xs : 0;
            }
            p->exact[col * p->rows + row] = sum;
            p->slack[col * p->rows + row] = ((quantized ? p->k / 32 : p->k) + 6) * ROUNDING * size + 1e-37;
        }
    }
    free(w);
}

static void run(const struct kernels *k, const struct product *p, int first_panel, int n_panels,
                const struct act_block *act, const float *x, int n_cols, int with_bias, int add, float *out,
                size_t stride) {
    int left = p->rows - 16 * first_panel;
    k->panel[p->type](&(struct panel_job){
        .codes = p->codes + (size_t)first_panel * p->size.codes,
        .scales = p->scales + (size_t)first_panel * p->size.scales,
        .code_stride = p->size.codes, .scale_stride = p->size.scales, .n_panels = n_panels,
        .n_rows = left < 16 * n_panels ? left : 16 * n_panels, .k = p->k, .n_cols = n_cols, .act = act,
        .x = x,
        .x_stride = (size_t)p->k, .bias = with_bias ? p->bias + 16 * first_panel : NULL,
        .out = out, .out_stride = stride, .add = add,
    });
}

/* The reference's y (TILE_COLS, rows), one column at a time. */
static void run_reference(const struct product *p, float *y) {
    for (int col = 0; col < TILE_COLS; col++)
        run(&isas[0], p, 0, (p->rows + 15) / 16, p->act + col * p->k / 32, p->x + col * p->k, 1, 0, 0,
            y + col * p->rows, (size_t)p->rows);
}

static struct product new_product(int type, int rows, int k) {
    struct product p = { .type = type, .rows = rows, .k = k };
    size_t outputs = (size_t)(TILE_COLS * rows);
    p.row_bytes = (size_t)(k / types[type].block_size) * (size_t)types[type].type_size;
    p.file = get_memory((size_t)rows * p.row_bytes);
    for (int row = 0; row < rows; row++)
        random_row(type, p.file + (size_t)row * p.row_bytes, k);
    pack(&p);
    p.x = noises(TILE_COLS * k);
    p.act = get_memory((size_t)(TILE_COLS * k / 32) * sizeof *p.act);
    isas[0].quantize(p.act, 1, p.x, TILE_COLS * k / 32);
    p.bias = noises(rows);
    p.before = noises(TILE_COLS * rows);
    p.exact = get_memory(outputs * sizeof *p.exact);
    p.slack = get_memory(outputs * sizeof *p.slack);
    p.ref = get_memory(outputs * sizeof *p.ref);
    compute_exact(&p);
    run_reference(&p, p.ref);
    return p;
}

static void free_product(struct product *p) {
    void *parts[] = { p->file, p->codes,  p->scales, p->x,     p->act,
                      p->bias, p->before, p->exact,  p->slack, p->ref };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
}

static int close_enough(const struct product *p, const float *y) {
    for (int i = 0; i < TILE_COLS * p->rows; i++)
        if (!(fabs((double)y[i] - p->exact[i]) <= p->slack[i]))
            return 0;
    return 1;
}

/* Does the tolerance notice one flipped bit of a row's code: an exponent's lowest or a nibble's lowest? */
static int notices(struct product *p, int row, float *y) {
    int size = panel_quantized(p->type) ? 4 : types[p->type].type_size;
    uint8_t *byte = p->codes + row * size + (size == 4 && panel_quantized(p->type) ? 1 : size - 1);
    *byte ^= 0x10;
    run_reference(p, y);
    *byte ^= 0x10;
    return !close_enough(p, y);
}

/* Zeros are far off, and a flipped bit is wherever the row's scale is not zero. */
static void tolerance_is_sharp(struct product *p) {
    float *y = calloc((size_t)(TILE_COLS * p->rows), sizeof *y);
    int noticed = 0;
    CHECK(y && close_enough(p, p->ref) && !close_enough(p, y));
    for (int row = 0; row < 5; row++)
        noticed += notices(p, row, y);
    CHECK(noticed >= 3);
    free(y);
}

/* Columns first .. first + n of the tile: all outputs as the reference has them,
 * everything round them untouched. */
static void check_tile(const struct kernels *k, const struct product *p, int first_panel, int n_panels,
                       int first, int n, int with_bias, int add) {
    int row = 16 * first_panel, left = p->rows - row, rows = left < 16 * n_panels ? left : 16 * n_panels;
    int stride = rows + 3;
    struct act_block *act = get_memory((size_t)(p->k / 32 * n) * sizeof *act);
    float *x = get_memory((size_t)(n * p->k) * sizeof *x), *out = guards((size_t)(n * stride + 16));
    for (int c = 0; c < n; c++) {
        memcpy(x + c * p->k, p->x + (first + c) * p->k, (size_t)p->k * sizeof *x);
        for (int b = 0; b < p->k / 32; b++)
            act[b * n + c] = p->act[(first + c) * p->k / 32 + b];
        for (int i = 0; i < rows && add; i++)
            out[16 + c * stride + i] = p->before[(first + c) * p->rows + row + i];
    }
    run(k, p, first_panel, n_panels, act, x, n, with_bias, add, out + 16, (size_t)stride);
    for (int c = 0; c < n; c++) {
        for (int i = 0; i < rows; i++) {
            int at = (first + c) * p->rows + row + i;
            float y = p->ref[at];
            if (with_bias)
                y = y + p->bias[row + i];
            if (add)
                y = p->before[at] + y;
            CHECK(f32_bits(out[16 + c * stride + i]) == f32_bits(y));
        }
        for (int i = rows; i < stride; i++)
            CHECK(out[16 + c * stride + i] == GUARD);
    }
    for (int i = 0; i < 16; i++)
        CHECK(out[i] == GUARD);
    free(act), free(x), free(out);
}

static void panels_of_type(int type) {
    static const int tails[] = { 5, 16, 1, 15, 9 };
    int block = types[type].block_size > 32 ? types[type].block_size : 32;
    for (int panels = 1; panels <= 5; panels++) {
        int rows = 16 * (panels - 1) + tails[panels - 1], blocks = panels == 2 ? 3 : 1 + panels % 2;
        struct product p = new_product(type, rows, blocks * block);
        tolerance_is_sharp(&p);
        for (int i = 0; i < n_isas; i++)
            for (int n = 1; n <= TILE_COLS; n++) {
                int mode = n + panels, first = (int)random_below(&state, TILE_COLS - n + 1);
                check_tile(&isas[i], &p, 0, panels, first, n, mode & 1, mode >> 1 & 1);
                check_tile(&isas[i], &p, panels / 2, panels - panels / 2, TILE_COLS - n, n, ~mode & 1,
                           mode >> 1 & 1);
            }
        free_product(&p);
    }
}

static void every_panel(void) {
    int n = 0;
    for (int type = 0; type < N_TYPES; type++)
        if (panel_runs(type)) {
            for (int i = 0; i < n_isas; i++)
                CHECK(isas[i].panel[type]);
            panels_of_type(type);
            n++;
        }
    CHECK(n == 28);
}

/* Coarse weights: the bits of the reference on every ISA, and the error of the best four equidistant
 * levels for a normal distribution, 0.119 of the variance; noise() is not quite normal. Zeros
 * would have an error of 1. */
static void coarse_panels(void) {
    enum { K = 512, PANELS = 3, ROWS = 16 * PANELS - 3, N = 5 };
    struct panel_size size = panel_size(TYPE_COARSE, K);
    uint8_t *codes = get_memory(PANELS * size.codes), *scales = get_memory(PANELS * size.scales);
    float *rows = noises(ROWS * K), *x = noises(N * K), out[2][N * ROWS], error = 0, sum = 0;
    struct act_block act[K / 32 * N];
    for (int i = 0; i < PANELS; i++)
        pack_panel(TYPE_COARSE, rows + 16 * i * K, K * sizeof *rows, i < PANELS - 1 ? 16 : ROWS % 16, K,
                   codes + (size_t)i * size.codes, scales + (size_t)i * size.scales);
    for (int c = 0; c < N; c++)
        isas[0].quantize(act + c, N, x + c * K, K / 32);
    for (int i = 0; i < n_isas; i++) {
        isas[i].panel[TYPE_COARSE](&(struct panel_job){
            .codes = codes, .scales = scales, .code_stride = size.codes, .scale_stride = size.scales,
            .n_panels = PANELS,
            .n_rows = ROWS, .k = K, .n_cols = N, .act = act, .out = out[i > 0], .out_stride = ROWS });
        CHECK(!memcmp(out[0], out[i > 0], sizeof out[0]));
    }
    for (int c = 0; c < N; c++)
        for (int row = 0; row < ROWS; row++) {
            float exact = 0;
            for (int k = 0; k < K; k++)
                exact += rows[row * K + k] * x[c * K + k];
            sum += exact * exact;
            error += (out[0][c * ROWS + row] - exact) * (out[0][c * ROWS + row] - exact);
        }
    CHECK(error < 0.14f * sum && error > 0.08f * sum);
    free(codes), free(scales), free(rows), free(x);
}

/* Codes and activations at their limits, where a sum of 16-bit products would overflow. */
static void extreme_codes(void) {
    for (int type = 0; type < N_TYPES; type++) {
        if (!panel_runs(type) || !panel_quantized(type))
            continue;
        for (int pattern = 0; pattern < 4; pattern++) {
            struct product p = new_product(type, 16, 256);
            int at[2];
            f16_fields(type, at);
            for (size_t i = 0; i < 16 * p.row_bytes; i++) {
                int byte = (int)(i % (size_t)types[type].type_size);
                int scale = at[0] >= 0 && byte / 2 == at[0] / 2, min = at[1] >= 0 && byte / 2 == at[1] / 2;
                if (!scale && !min)
                    p.file[i] = pattern & 1 ? 0xff : type == TYPE_Q8_0 ? 0x80 : 0;
                if (type == TYPE_MXFP4 && !byte)
                    p.file[i] = 127;
            }
            for (size_t i = 0; i < 16 * p.row_bytes && type == TYPE_IQ1_M; i += sizeof(block_iq1_m))
                set_iq1_m(p.file + i, f32_to_f16(noise()));
            for (int i = 0; i < TILE_COLS * 256; i++)
                p.x[i] = pattern & 2 ? -1.0f : i % 2 ? 1.0f : -1.0f;
            isas[0].quantize(p.act, 1, p.x, TILE_COLS * 8);
            free(p.codes), free(p.scales);
            pack(&p);
            compute_exact(&p);
            run_reference(&p, p.ref);
            CHECK(close_enough(&p, p.ref));
            for (int i = 0; i < n_isas; i++)
                for (int n = 1; n <= TILE_COLS; n += 5)
                    check_tile(&isas[i], &p, 0, 1, 0, n, 0, 0);
            free_product(&p);
        }
    }
}

/* Panels of equal bytes, so that every unit has the same code, those that no file gives too;
 * activations at their limits. */
static void equal_codes(void) {
    for (int type = 0; type < N_TYPES; type++) {
        if (!panel_runs(type) || !panel_quantized(type))
            continue;
        struct product p = new_product(type, 16, 256);
        for (int i = 0; i < TILE_COLS * 256; i++)
            p.x[i] = i / 256 % 2 ? 1.0f : -1.0f;
        isas[0].quantize(p.act, 1, p.x, TILE_COLS * 8);
        for (int byte = 0; byte < 256; byte += 17) {
            memset(p.codes, byte, p.size.codes);
            run_reference(&p, p.ref);
            for (int i = 0; i < n_isas; i++)
                for (int n = 1; n <= TILE_COLS; n += 5)
                    check_tile(&isas[i], &p, 0, 1, 0, n, 0, 0);
        }
        free_product(&p);
    }
}

/* Rows of floats. */

static void check_block(const struct act_block *a, const float *x) {
    double top = 0;
    int32_t sums[2] = { 0, 0 };
    for (int i = 0; i < 32; i++)
        /* fmax here breaks gcc 12 for arm64 */
        top = fabs((double)x[i]) > top ? fabs((double)x[i]) : top;
    CHECK(fabs((double)a->d - top / 127) <= ROUNDING * top / 127 + 1e-45);
    for (int i = 0; i < 32; i++) {
        CHECK(a->q[i] >= -127 && a->q[i] <= 127);
        CHECK(fabs((double)a->d * a->q[i] - (double)x[i]) <= 0.5001 * (double)a->d + 0x1p-119);
        sums[i / 16] += a->q[i];
    }
    const int32_t all[] = { sums[0], sums[1], sums[0] + sums[1] };
    for (int i = 0; i < 3; i++)
        CHECK(a->sum[i] == (float)all[i] && a->neg_sum[i] == -all[i]);
}

/* Ordinary blocks, zeros, one value alone, ties, and sizes at the ends of what a float holds. */
static void quantize_blocks(void) {
    enum { N = 24, STRIDE = 3 };
    static const float scales[] = {
        1, 1e-3f, 1e4f, 0, 1e30f, 3e38f, 1e-30f, 1e-36f, 1e-38f, 1e-40f, 1e-44f, 1
    };
    float *x = noises(N * 32);
    struct act_block *act = get_memory((N * STRIDE) * sizeof *act);
    struct act_block *first = get_memory((N * STRIDE) * sizeof *act);
    for (int i = 0; i < N * 32; i++)
        x[i] = i < 12 * 32 ? x[i] / 3 * scales[i / 32] : i < 20 * 32 ? (float)(i % 255 - 127) / 2 : x[i];
    for (int i = 20 * 32; i < 21 * 32; i++)
        x[i] = i % 32 == 9 ? -5.0f : 0.0f;
    for (int i = 21 * 32; i < 22 * 32; i++)
        x[i] = i % 32 == 9 ? 127.0f : (float)(i % 32) - 15.5f;
    for (int isa = 0; isa < n_isas; isa++) {
        memset(act, 0x55, (N * STRIDE) * sizeof *act);
        isas[isa].quantize(act, STRIDE, x, N);
        for (int b = 0; b < N * STRIDE; b++)
            if (b % STRIDE)
                for (size_t i = 0; i < sizeof *act; i++)
                    CHECK(((uint8_t *)&act[b])[i] == 0x55);
            else
                check_block(&act[b], x + b / STRIDE * 32);
        if (isa == 0)
            memcpy(first, act, (N * STRIDE) * sizeof *act);
        /* 0.5, 1.5, -1.5 */
        CHECK(act[21 * STRIDE].q[16] == 0 && act[21 * STRIDE].q[17] == 2 && act[21 * STRIDE].q[14] == -2);
        for (int b = 0; b < N; b++)
            CHECK(!memcmp(&act[b * STRIDE], &first[b * STRIDE], offsetof(struct act_block, unused)));
    }
    free(x), free(act), free(first);
}

/* Attention. */

enum { CHUNKS = 3, TOKENS = CHUNKS * CHUNK };

/* A cache of TOKENS rows for one head, written by store_kv; what no row may see is NaN. */
struct cache {
    int head_dim, v_dim, n_rows;
    uint16_t *tiles[TOKENS / TILE];
    float *k, *v;               /* (TOKENS, head_dim) as f16 has them */
    float *q;                   /* (ATTN_ROWS, head_dim) */
    int first[ATTN_ROWS], limit[ATTN_ROWS];     /* absolute */
    float softcap, sink;        /* 0 and -inf: off */
    float slope[ATTN_ROWS];     /* all 0: off */
    int at[ATTN_ROWS];          /* absolute */
};

static void store(const struct kernels *kernels, struct cache *c, int token, const float *k, const float *v) {
    kernels->store_kv(c->tiles[token / TILE], token % TILE, k, v, c->head_dim, c->head_dim);
}

static struct cache new_cache(int head_dim, int n_rows, int from, int to) {
    struct cache c = {
        .head_dim = head_dim, .v_dim = (head_dim + 15) / 16 * 16, .n_rows = n_rows, .sink = -INFINITY
    };
    size_t tile = (size_t)(TILE * (c.head_dim + c.v_dim));
    c.k = noises(TOKENS * head_dim);
    c.v = noises(TOKENS * head_dim);
    c.q = noises(ATTN_ROWS * head_dim);
    for (int i = 0; i < ATTN_ROWS * head_dim; i++)
        c.q[i] /= sqrtf((float)head_dim);               /* no token rules alone */
    for (int t = from / TILE * TILE; t < to; t++) {
        uint16_t *p = c.tiles[t / TILE];
        if (!p) {
            p = c.tiles[t / TILE] = get_memory(tile * sizeof *p);
            for (size_t i = 0; i < tile; i++)
                p[i] = 0x7e00;
        }
        if (t >= from)
            store(&isas[random_below(&state, n_isas)], &c, t, c.k + t * head_dim, c.v + t * head_dim);
        for (int d = 0; d < head_dim; d++) {
            c.k[t * head_dim + d] = f16_to_f32(f32_to_f16(c.k[t * head_dim + d]));
            c.v[t * head_dim + d] = f16_to_f32(f32_to_f16(c.v[t * head_dim + d]));
        }
    }
    for (int i = 0; i < n_rows; i++) {                  /* together they see from .. to, each a part of it */
        int most = to - from < 20 ? to - from - 1 : 19;
        c.first[i] = i ? from + (int)random_below(&state, most + 1) : from;
        c.limit[i] = i < n_rows - 1 ? to - (int)random_below(&state, to - c.first[i]) : to;
    }
    return c;
}

static void free_cache(struct cache *c) {
    for (int i = 0; i < TOKENS / TILE; i++)
        free(c->tiles[i]);
    free(c->k), free(c->v), free(c->q);
}

static int smaller(int a, int b) { return a < b ? a : b; }

/* Rows row .. row + n over all chunks, `group` at a time where they see something; out: (n, head_dim). */
static void attend(const struct kernels *k, const struct cache *c, int row, int n, int group, float *out) {
    float *o = calloc((size_t)(n * c->v_dim), sizeof *o), m[ATTN_ROWS], l[ATTN_ROWS] = { 0 };
    int alibi = c->slope[0] > 0;
    CHECK(o);
    for (int i = 0; i < n; i++)
        m[i] = -INFINITY;
    for (int chunk = 0; chunk < TOKENS; chunk += CHUNK)
        for (int at = 0, taken; at < n; at += taken ? taken : 1) {
            const float *q[ATTN_ROWS];
            int first[ATTN_ROWS], limit[ATTN_ROWS], own[ATTN_ROWS];
            for (taken = 0; taken < group && at + taken < n; taken++) {
                int i = row + at + taken;
                if (c->limit[i] <= chunk || c->first[i] >= chunk + CHUNK)
                    break;
                q[taken] = c->q + i * c->head_dim;
                first[taken] = c->first[i] > chunk ? c->first[i] - chunk : 0;
                limit[taken] = smaller(c->limit[i] - chunk, CHUNK);
                own[taken] = c->at[i] - chunk;
            }
            if (taken)
                k->attend(&(struct attn_job){
                    .tiles = (const uint16_t *const *)c->tiles + chunk / TILE,
                    .head_dim = c->head_dim, .v_dim = c->v_dim, .n_rows = taken, .q = q, .first = first,
                    .limit = limit, .m = m + at, .l = l + at, .o = o + at * c->v_dim,
                    .softcap = c->softcap, .slope = alibi ? c->slope + row + at : NULL,
                    .at = alibi ? own : NULL,
                });
        }
    /* A sink: a chunk of one token without a value. */
    float *nothing = calloc((size_t)c->v_dim, sizeof *nothing);
    CHECK(nothing);
    for (int i = 0; i < n; i++) {
        k->attend_merge(&m[i], &l[i], o + i * c->v_dim, c->sink, 1, nothing, c->v_dim);
        k->attend_end(out + i * c->head_dim, o + i * c->v_dim, l[i], c->head_dim);
    }
    free(o), free(nothing);
}

static double score(const struct cache *c, int row, int t, double *size) {
    double s = 0;
    *size = 0;
    for (int d = 0; d < c->head_dim; d++) {
        double product = (double)c->q[row * c->head_dim + d] * (double)c->k[t * c->head_dim + d];
        s += product;
        *size += fabs(product);
    }
    if (c->softcap > 0)
        s = (double)c->softcap * tanh(s / (double)c->softcap);
    double bias = (double)c->slope[row] * abs(c->at[row] - t);
    *size += fabs(bias) / c->head_dim;                  /* one rounding, not head_dim */
    return s - bias;
}

/* A score is off by head_dim roundings of its size, and so is its weight, relatively;
 * every sum adds one a token. */
static double naive(const struct cache *c, int row, double *out) {
    double top = (double)c->sink, total, most = 0, size;
    for (int t = c->first[row]; t < c->limit[row]; t++)
        top = fmax(top, score(c, row, t, &size)), most = fmax(most, size);
    for (int d = 0; d < c->head_dim; d++)
        out[d] = 0;
    total = exp((double)c->sink - top);
    for (int t = c->first[row]; t < c->limit[row]; t++) {
        double p = exp(score(c, row, t, &size) - top);
        total += p;
        for (int d = 0; d < c->head_dim; d++)
            out[d] += p * (double)c->v[t * c->head_dim + d];
    }
    for (int d = 0; d < c->head_dim; d++)
        out[d] /= total;
    return 3 * ROUNDING * (2 * (c->head_dim + 2) * most + 2 * (c->limit[row] - c->first[row]) + 20);
}

static int near(const struct cache *c, int row, const float *out) {
    double *right = get_memory((size_t)c->head_dim * sizeof *right), slack = naive(c, row, right);
    int good = slack < 0.01;
    for (int d = 0; d < c->head_dim; d++)
        good &= fabs((double)out[d] - right[d]) <= slack;
    free(right);
    return good;
}

static int noticed;         /* wrong masks; a token of little weight may escape */

/* Every ISA and every grouping of rows gives `first`, and that is near what doubles give. */
static void check_cache(const struct cache *c, float *first) {
    int n_rows = c->n_rows, head_dim = c->head_dim;
    size_t n = (size_t)(n_rows * head_dim);
    float *out = get_memory(n * sizeof *out);
    for (int i = 0; i < n_isas; i++) {
        attend(&isas[i], c, 0, n_rows, 1, out);
        if (i == 0)
            memcpy(first, out, n * sizeof *out);
        CHECK(same(out, first, n));
        for (int group = 2; group <= n_rows; group += n_rows > 4 && group == 2 ? n_rows - 2 : 1) {
            attend(&isas[i], c, 0, n_rows, group, out);
            CHECK(same(out, first, n));
        }
        attend(&isas[i], c, n_rows - 1, 1, 1, out);
        CHECK(same(out, first + n - head_dim, (size_t)head_dim));
    }
    for (int row = 0; row < n_rows; row++)
        CHECK(near(c, row, first + row * head_dim));
    memset(out, 0, n * sizeof *out);
    CHECK(!near(c, 0, out));
    free(out);
}

static void check_attention(int head_dim, int n_rows, int from, int to) {
    struct cache c = new_cache(head_dim, n_rows, from, to);
    float *out = get_memory((size_t)(n_rows * head_dim) * sizeof *out);
    check_cache(&c, out);
    c.limit[0]--;                                       /* one token less is seen */
    noticed += c.limit[0] > c.first[0] && !near(&c, 0, out);
    free(out);
    free_cache(&c);
}

static void attention(void) {
    static const int dims[] = { 32, 64, 80, 96, 128, 256 };
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        for (int rows = 1; rows <= ATTN_ROWS; rows++) {
            int to = 1 + (int)random_below(&state, CHUNK);
            check_attention(dims[d], rows, 0, to);
            check_attention(dims[d], rows, (int)random_below(&state, to), to);
        }
        check_attention(dims[d], 5, 0, TOKENS);
        check_attention(dims[d], 3, 100, CHUNK + 1);
        check_attention(dims[d], 8, CHUNK - 1, 2 * CHUNK + 16);
    }
    for (int to = 1; to <= CHUNK; to += to < 40 ? 1 : 27)
        check_attention(16 * (1 + to % 3), 1 + to % 8, 0, to);
    check_attention(8, 3, 0, 70);                       /* not whole vectors */
    check_attention(20, 8, 3, 40);
    check_attention(CHUNK + 16, ATTN_ROWS, 5, 300);     /* too many floats to be kept for all rows */
    for (int tile = 0; tile < CHUNK; tile += TILE)      /* one tile, anywhere */
        check_attention(32, 4, tile, tile + TILE);
    CHECK(noticed > 100);
}

/* With a softcap, ALiBi and a sink, alone and together; without one of them the result is mostly a different
 * one. Queries stand before, among and after the rows they see. */
static void attention_with_extras(void) {
    int told[3] = { 0 };
    for (int round = 0; round < 48; round++) {
        int kind = 1 + round % 7, n_rows = 1 + round % ATTN_ROWS, head_dim = 16 * (1 + round % 5);
        int from = round % 3 ? round * 5 : 0, n_seen = 3 + round * (round % 2 ? 1 : 11) % (TOKENS - 300);
        struct cache c = new_cache(head_dim, n_rows, from, from + n_seen);
        float *out = get_memory((size_t)(n_rows * head_dim) * sizeof *out);
        if (kind & 1)
            c.softcap = round % 2 ? 1.5f : 0.4f;
        for (int i = 0; i < n_rows && kind & 2; i++) {
            c.slope[i] = ldexpf(1, -2 - i % 4);
            c.at[i] = c.first[i] - 20 + (int)random_below(&state, c.limit[i] - c.first[i] + 40);
        }
        if (kind & 4)
            c.sink = (float)(2 + round % 3 * 2);
        check_cache(&c, out);
        struct cache others[] = { c, c, c };            /* each without one of the three */
        others[0].softcap = 0;
        memset(others[1].slope, 0, sizeof c.slope);
        others[2].sink = -INFINITY;
        for (int i = 0; i < 3; i++) {
            int differs = !near(&others[i], 0, out);
            CHECK(!differs || kind >> i & 1);
            told[i] += differs;
        }
        free(out);
        free_cache(&c);
    }
    for (int i = 0; i < 3; i++)
        CHECK(told[i] > 20);
}

/* Scores so large that only the best token counts, or all alike. */
static void attention_at_the_edges(void) {
    for (int sign = -1; sign <= 1; sign++) {
        struct cache c = new_cache(32, 1, 0, 100);
        float out[32], first[32];
        for (int t = 0; t < 100; t++) {
            for (int d = 0; d < 32; d++)
                c.k[t * 32 + d] = d == 0 ? (float)t : 0.0f;
            store(&isas[0], &c, t, c.k + t * 32, c.v + t * 32);
        }
        for (int d = 0; d < 32; d++)
            c.q[d] = (float)sign * 1e4f;
        int best = sign > 0 ? 99 : 0;
        for (int i = 0; i < n_isas; i++) {
            attend(&isas[i], &c, 0, 1, 1, out);
            if (i == 0)
                memcpy(first, out, sizeof out);
            CHECK(same(out, first, 32));
            CHECK(!sign ? near(&c, 0, out) : same(out, c.v + best * 32, 32));
        }
        free_cache(&c);
    }
}

/* Values that are the first of the keys give the bits of a cache that has them twice, and nothing beyond
 * a tile of keys is read. */
static void check_shared(int head_dim, int v_dim, int n_rows, int n_seen) {
    const int pad = (v_dim + 15) / 16 * 16, from = (int)random_below(&state, n_seen);
    const uint16_t *both[CHUNK / TILE], *keys[CHUNK / TILE];
    const float *q[ATTN_ROWS];
    float *query = noises(n_rows * head_dim), *k = noises(head_dim), m[2][ATTN_ROWS], l[2][ATTN_ROWS] = { 0 };
    float *o[2] = { calloc((size_t)(n_rows * pad), sizeof **o), calloc((size_t)(n_rows * pad), sizeof **o) };
    int first[ATTN_ROWS], limit[ATTN_ROWS];
    for (int i = 0; i < CHUNK / TILE; i++) {
        uint16_t *b = get_memory((size_t)(TILE * (head_dim + pad)) * sizeof *b);
        uint16_t *a = get_memory((size_t)(TILE * head_dim) * sizeof *a);
        memset(a, 0x7e, (size_t)(TILE * head_dim) * sizeof *a);                 /* NaN */
        for (int t = 0; t < TILE && i * TILE + t < n_seen; t++) {
            for (int d = 0; d < head_dim; d++)
                k[d] = noise();
            isas[0].store_kv(b, t, k, k, head_dim, v_dim);
            isas[0].store_kv(a, t, k, NULL, head_dim, 0);
        }
        both[i] = b;
        keys[i] = a;
    }
    for (int r = 0; r < n_rows; r++) {
        q[r] = query + r * head_dim;
        first[r] = r ? (int)random_below(&state, n_seen) : from;
        limit[r] = first[r] + 1 + (int)random_below(&state, n_seen - first[r]);
    }
    for (int isa = 0; isa < n_isas; isa++) {
        for (int shared = 0; shared < 2; shared++) {
            memset(o[shared], 0, (size_t)(n_rows * pad) * sizeof **o);
            for (int r = 0; r < n_rows; r++) {
                m[shared][r] = -INFINITY;
                l[shared][r] = 0;
            }
            isas[isa].attend(&(struct attn_job){
                .tiles = shared ? keys : both, .head_dim = head_dim, .v_dim = pad, .shared = shared,
                .n_rows = n_rows, .q = q, .first = first, .limit = limit, .m = m[shared], .l = l[shared],
                .o = o[shared],
            });
        }
        for (int r = 0; r < n_rows; r++)
            CHECK(same(o[0] + r * pad, o[1] + r * pad, (size_t)v_dim) && m[0][r] == m[1][r]
                  && l[0][r] == l[1][r]);
    }
    for (int i = 0; i < CHUNK / TILE; i++)
        free((void *)both[i]), free((void *)keys[i]);
    free(query), free(k), free(o[0]), free(o[1]);
}

static void attention_with_shared_values(void) {
    static const int dims[][2] = { { 48, 32 }, { 40, 40 }, { 35, 33 }, { 20, 3 }, { 576, 512 } };
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        for (int rows = 1; rows <= ATTN_ROWS; rows += dims[i][0] > 100 ? 7 : 1)
            check_shared(dims[i][0], dims[i][1], rows, 1 + (int)random_below(&state, CHUNK));
}

/* store_kv writes one slot of a tile and nothing else, within f16's range. */
static void stores_one_slot(void) {
    static const int dims[] = { 4, 20, 32, 64, 80, 256 };
    for (size_t s = 0; s < sizeof dims / sizeof *dims; s++)
        for (int isa = 0; isa < n_isas; isa++) {
            int dim = dims[s], v_dim = (dim + 15) / 16 * 16, n = TILE * (dim + v_dim);
            int slot = (int)random_below(&state, TILE);
            uint16_t *tile = get_memory((size_t)n * sizeof *tile);
            float *k = noises(dim), *v = noises(dim);
            k[1] = 1e6f, v[2] = -INFINITY, v[3] = 3e-6f;
            memset(tile, 0x5a, (size_t)n * sizeof *tile);
            isas[isa].store_kv(tile, slot, k, v, dim, dim);
            for (int i = 0; i < n; i++) {
                int at = i - dim * TILE, mine = i < dim * TILE ? i % TILE == slot : at / v_dim == slot;
                if (!mine)
                    CHECK(tile[i] == 0x5a5a);
                else if (i < dim * TILE || at % v_dim < dim) {
                    float x = i < dim * TILE ? k[i / TILE] : v[at % v_dim];
                    CHECK(tile[i] == f32_to_f16(x > 65504 ? 65504 : x < -65504 ? -65504 : x));
                } else
                    CHECK(tile[i] == 0);
            }
            free(tile), free(k), free(v);
        }
}

int main(void) {
    load_isas();
    every_panel();
    coarse_panels();
    extreme_codes();
    equal_codes();
    quantize_blocks();
    attention();
    attention_with_extras();
    attention_at_the_edges();
    attention_with_shared_values();
    stores_one_slot();
    return 0;
}
