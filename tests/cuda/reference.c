#include "reference_model.h"

#include "pack.h"

#include <stdlib.h>

void reference_norm_rows(const struct cuda_norm_rows *a) {
    bmc_model m = new_model(a->n, a->kind, a->eps, NULL);
    for (int t = 0; t < a->n_tok; t++)
        for (int p = 0; p < a->n_parts; p++) {
            const size_t skip = (size_t)p * a->weight_pitch;
            float *y = a->y + (size_t)t * a->y_stride + (size_t)p * a->pitch;
            norm_row(&m, y, a->x + (size_t)t * a->x_stride + (size_t)p * a->pitch,
                     vector(a->norm.weight ? a->norm.weight + skip : NULL, 1, a->n),
                     vector(a->norm.bias ? a->norm.bias + skip : NULL, 1, a->n), a->n);
            m.k.scale(y, a->scale, a->n);
            if (a->factors)
                m.k.mul(y, a->factors, a->n);
            if (a->act)
                quantize_column(&m.k, a->act + t, a->act_stride, y, a->n);
        }
    pool_free(m.pool);
}

void reference_quantize(const struct cuda_quantize *a) {
    for (int t = 0; t < a->n_tok; t++)
        quantize_column(kernels_find(), a->act + t, a->act_stride, a->x + (size_t)t * a->stride,
                        32 * a->n_blocks);
}

/* One matrix times columns: where column i's activations are, and where its results go. */
struct columns { const int32_t *tok; int from, n; };

struct call { struct pass *p; struct product r; };
static void multiply_call(void *arg, int thread) {
    const struct call *c = arg;
    multiply_alone(c->p, &c->r, thread);
}

static void product_of(int type, const struct cuda_product *a, struct columns columns, const uint8_t *codes,
                       const uint8_t *scales, const float *bias, float factor) {
    const int n = columns.n, blocks = cuda_is_float(type) ? 0 : a->k / 32;
    const size_t stride = padded(a->k);
    bmc_model m = new_model(a->k, 0, 0, NULL);
    struct pass p = { .model = &m, .machine = &cpu_machine, .n_tok = n };
    struct tokens in = { malloc((size_t)n * stride * sizeof(float)),
                         malloc((size_t)(n * (blocks + 1)) * sizeof(struct act_block)), n, 0, 0 };
    const struct matrix w = {
        .type = type,
        .n_rows = a->n_rows,
        .n_cols = a->k,
        .data = codes,
        .codes = (uint8_t *)codes,
        .scales = (uint8_t *)scales,
        .code_stride = a->code_stride,
        .scale_stride = a->scale_stride,
        .bias = bias,
        .factor = factor,
    };
    for (int t = 0, width = tile_width(n); t < n; t++) {
        const int from = columns.tok ? columns.tok[t] : columns.from + t, tile = t / width,
                  cols = smaller(n - tile * width, width);
        for (int b = 0; b < blocks; b++)
            in.act[(tile * width) * blocks + b * cols + t % width] =
                a->act[(size_t)b * (size_t)a->act_stride + (size_t)from];
        if (a->x)
            memcpy(in.x + (size_t)t * stride, a->x + (size_t)from * a->x_stride,
                   (size_t)a->k * sizeof(float));
    }
    struct call call = { &p,
                         { &w, in, a->out + (size_t)columns.from * a->out_stride, a->out_stride, a->add } };
    pool_run(m.pool, multiply_call, &call);
    pool_free(m.pool);
    free(in.x), free(in.act);
}

void reference_product(int type, const struct cuda_product *a) {
    if (!a->lists.used) {
        product_of(type, a, (struct columns){ NULL, 0, a->n_tok }, a->codes, a->scales, a->bias, a->factor);
        return;
    }
    for (int i = 0; i < a->lists.n_slots && a->lists.used[i] >= 0; i++) {
        const int e = a->lists.used[i], from = a->lists.first[e];
        const size_t at = (size_t)e;
        product_of(type, a,
                   (struct columns){ a->gathers ? a->lists.tok + from : NULL, from,
                                     a->lists.first[e + 1] - from },
                   a->codes + at * a->expert_codes, a->scales + at * a->expert_scales,
                   a->bias ? a->bias + at * a->expert_bias : NULL, a->factors ? a->factors[e] : a->factor);
    }
}

void reference_activate(const struct cuda_activate *a) {
    const struct kernels *k = kernels_find();
    for (int t = 0; t < a->n_tok; t++) {
        float *up = a->up + (size_t)t * a->stride;
        k->act[a->kind](up, a->gate ? up : NULL, a->gate ? a->gate + (size_t)t * a->gate_stride : up, a->dim,
                        a->param);
        if (a->act)
            quantize_column(k, a->act + t, a->act_stride, up, a->dim);
    }
}

void reference_best(const struct cuda_best_of *a) {
    const struct kernels *k = kernels_find();
    for (int t = 0; t < a->n_tok; t++)
        for (int part = 0; part < best_parts(a->vocab_size); part++) {
            const int first = part * 256, n = smaller(a->vocab_size - first, 256);
            float *x = a->logits + (size_t)t * a->stride + first;
            if (a->scale != 1.0f)
                k->scale(x, a->scale, n);
            if (a->softcap > 0)
                k->softcap(x, a->softcap, n);
            struct cuda_best best = { .logit = k->largest(x, n), .id = first };
            best.seen = best.logit;
            best.sum = k->sum_exp(x, best.logit, n);
            while (best.id < first + n - 1 && x[best.id - first] != best.logit)
                best.id++;
            a->best[t * best_parts(a->vocab_size) + part] = best;
        }
}

void reference_combine(const struct cuda_combine *a) {
    const struct kernels *k = kernels_find();
    for (int t = 0; t < a->n_tok; t++) {
        float *y = a->y + (size_t)t * a->y_stride;
        if (!a->add)
            memset(y, 0, (size_t)a->dim * sizeof *y);
        for (int i = t * a->n_active; i < (t + 1) * a->n_active; i++)
            k->axpy(y, a->weight[i], a->rows + (size_t)a->entry[i] * a->rows_stride, a->dim);
    }
}

void reference_switch(const struct cuda_switch *a) {
    const struct kernels *k = kernels_find();
    for (int t = 0; t < a->n_tok; t++) {
        float on;
        k->act[BMC_ACT_SIGMOID](&on, NULL, a->gate + (size_t)t * a->gate_stride, 1, NULL);
        k->axpy(a->y + (size_t)t * a->y_stride, on, a->x + (size_t)t * a->x_stride, a->dim);
    }
}

/* ---- random weights ---- */

uint64_t random_number(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* About normal. */
float noise(void) {
    float sum = 0;
    for (int i = 0; i < 3; i++)
        sum += (float)((double)(random_number() >> 11) * 0x1p-52 - 1);
    return sum;
}

/* Of both signs, zero and subnormal now and then. */
static uint16_t random_f16(void) {
    return f32_to_f16(random_number() % 16 ? noise() : random_number() % 2 ? 3e-6f : 0.0f);
}

/* The layout of a type's panels (panels.h): what its scales' bytes are. */
enum {
    BYTES,
    HALVES_FLOAT,
    EXPONENTS,
    E4M3,
    SCALES_d_ARE = HALVES_FLOAT,
    SCALES_dm_ARE = HALVES_FLOAT,
    SCALES_e8_ARE = EXPONENTS,
    SCALES_k_ARE = BYTES,
    SCALES_k16_ARE = BYTES,
    SCALES_k32_ARE = BYTES,
    SCALES_km16_ARE = BYTES,
    SCALES_s32_ARE = BYTES,
    SCALES_q32_ARE = BYTES,
    SCALES_q16_ARE = BYTES,
    SCALES_b32_ARE = BYTES,
    SCALES_one_ARE = BYTES,
    SCALES_e4m3_ARE = E4M3,
    SCALES_half_ARE = BYTES
};
struct layout { int super, head, scales, what; };
static struct layout layout_of(int type) {
#define LAYOUT(TYPE, name, super, codes, scales, zero) \
    case TYPE: return (struct layout){ super, HEAD_##scales, SCALES_##scales, SCALES_##scales##_ARE };
    switch (type) { PANEL_TYPES(LAYOUT) }
    return (struct layout){ 0 };
}

static void random_scales(uint8_t *p, int n, int what) {
    for (int i = 0; i < n; i++) {
        const uint16_t f16 = random_f16();
        const uint8_t byte = (uint8_t)random_number();
        if (what == HALVES_FLOAT)
            memcpy(p + i / 2 * 2, &f16, 2);
        else
            p[i] = what == BYTES       ? byte
                   : what == EXPONENTS ? (uint8_t)(random_number() % 16 ? 120 + byte % 10 : byte % 3)
                                       : byte % 0x7f;
    }
}

struct packed random_panels(int type, int n_rows, int n_cols) {
    const struct panel_size size = panel_size(type, n_cols);
    const size_t panels = (size_t)(n_rows + 15) / 16, value = type == TYPE_F32 ? 4 : 2;
    const struct layout l = layout_of(type);
    struct packed p = { aligned_alloc(64, (panels * size.codes + 63) / 64 * 64),
                        malloc(panels * size.scales + 1), size.codes, size.scales };
    for (size_t i = 0; i < panels * size.codes; i++)
        p.codes[i] = (uint8_t)random_number();
    for (size_t i = 0; cuda_is_float(type) && i < panels * size.codes; i += value) {
        const float x = noise();
        const uint16_t half = type == TYPE_F16 ? f32_to_f16(x) : f32_to_bf16(x);
        memcpy(p.codes + i, value == 4 ? (const void *)&x : &half, value);
    }
    uint8_t *at = p.scales;
    for (size_t panel = 0; l.super && panel < panels; panel++)
        for (int k = 0; k < n_cols; k += l.super) {
            random_scales(at, l.head, HALVES_FLOAT);
            at += l.head;
            random_scales(at, l.super / 32 * l.scales, l.what);
            at += l.super / 32 * l.scales;
        }
    return p;
}
