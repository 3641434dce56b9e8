/* Prompts by cuBLAS: weights and activations as f16, each row multiplied by a power of two so that its
 * largest value is in [2^14, 2^15). So nothing overflows, and values down to 2^-29 of the largest keep all 11
 * bits: as many as TF32 has, and BF16 weights lose none. "finish" takes the powers off again. */

/* The power of two that a row's values are multiplied by, and its inverse, from the largest of them. */
struct power { float by, inverse; };
DEVICE struct power power_of(float largest) {
    union { float f; uint32_t bits; } x;
    x.f = largest;
    const int exponent = most((int)(x.bits >> 23 & 255), 15);       /* the inverse is normal */
    return { bits_to_float((uint32_t)(268 - exponent) << 23),
             bits_to_float((uint32_t)(exponent - 14) << 23) };
}

DEVICE void store_halves(uint16_t *out, const float *x, float by) {
    uint64_t four = 0;
    UNROLL(4)
    for (int i = 0; i < 4; i++)
        four |= (uint64_t)float_to_half(x[i] * by) << 16 * i;
    *(uint64_t *)(void *)out = four;
}

/* A panel a block of threads: each sixteen take 32 columns of its rows in turn, once for the largest value
 * and once to store them. decode(b, w): columns 32 b and on of this thread's row, 0 beyond the last. */
struct halves_room { float largest[2 * WARPS][PANEL_ROWS]; };

template <class D> DEVICE void halves(const struct cuda_halves &a, struct halves_room &s, D decode) {
    const int columns = (int)a.stride, row = (int)blockIdx.x * PANEL_ROWS + lane();
    float w[32], largest = 0;
    for (int b = half_warp(); 32 * b < a.of.k; b += 2 * WARPS) {
        decode(b, w);
        UNROLL(32)
        for (int i = 0; i < 32; i++)
            largest = f_max(fabsf(w[i]), largest);
    }
    s.largest[half_warp()][lane()] = largest;
    __syncthreads();
    for (int i = 0; i < 2 * WARPS; i++)
        largest = f_max(s.largest[i][lane()], largest);
    if (row >= a.of.n_rows)
        return;
    const struct power p = power_of(largest);
    if (half_warp() == 0)
        a.powers[row] = p.inverse;
    for (int b = half_warp(); 32 * b < columns; b += 2 * WARPS) {
        decode(b, w);
        UNROLL(8)
        for (int i = 0; i < 32; i += 4)
            if (32 * b + i < columns)
                store_halves(a.out + (size_t)row * a.stride + 32 * b + i, w + i, p.by);
    }
}

/* 32 columns of a quantized panel: what a product with a single 1 gives. */
DEVICE void weights_of(const struct format f, codes_fn *codes, scales_fn *scales, const struct block_at at,
                       float *w) {
    struct scales sc = {};
    scales(&sc, at.head, at.scales);
    UNROLL(8)
    for (int g = 0; g < 8; g++) {
        const u8x64 u = codes(at.codes, g);
        const int half = f.halves && g >= 4;
        UNROLL(4)
        for (int i = 0; i < 4; i++) {
            const float x = (float)((int)(u >> 8 * i & 255) - f.zero) * sc.scale[half];
            w[4 * g + i] = f.mins ? sc.min[half] + x : x;
        }
    }
}

#define HALVES_KERNEL(TYPE, name, super, code, scaling, zero) \
    KERNEL(halves_##name, 32 * WARPS, struct cuda_halves, struct halves_room) { \
        const struct format f = FORMAT(super, code, scaling, zero); \
        const struct share of = { a.of.codes, a.of.scales, NULL, NULL, 0, 0, 0 }; \
        halves(a, s, [&](int b, float *w) { \
            weights_of(f, codes_##code, scaling##_scales, find_block(a.of, of, (int)blockIdx.x, b, f), w); \
        }); \
    }
CUDA_TYPES(HALVES_KERNEL)

#define FLOAT_HALVES_KERNEL(TYPE, name, size) \
    KERNEL(halves_##name, 32 * WARPS, struct cuda_halves, struct halves_room) { \
        const uint8_t *panel = a.of.codes + blockIdx.x * a.of.code_stride; \
        halves(a, s, [&](int b, float *w) { \
            UNROLL(32) \
            for (int i = 0, k = 32 * b; i < 32; i++, k++) \
                w[i] = k < a.of.k ? value_##name(panel + (size_t)(k * PANEL_ROWS + lane()) * size) : 0.0f; \
        }); \
    }
FLOAT_PANEL_TYPES(FLOAT_HALVES_KERNEL)

/* A token a block of threads. */
struct token_room { float largest[32 * WARPS], part[PANEL_ROWS]; };
KERNEL(halve_tokens, 32 * WARPS, struct cuda_halve_tokens, struct token_room) {
    const float *x = a.x + blockIdx.x * a.x_stride;
    const int t = (int)threadIdx.x;
    float largest = 0;
    for (int i = t; i < a.k; i += 32 * WARPS)
        largest = f_max(fabsf(x[i]), largest);
    s.largest[t] = largest;
    __syncthreads();
    if (t < PANEL_ROWS) {
        for (int i = t; i < 32 * WARPS; i += PANEL_ROWS)
            largest = f_max(s.largest[i], largest);
        s.part[t] = largest;
    }
    __syncthreads();
    for (int i = 0; i < PANEL_ROWS; i++)
        largest = f_max(s.part[i], largest);
    const struct power p = power_of(largest);
    if (t == 0)
        a.powers[blockIdx.x] = p.inverse;
    for (int i = 4 * t; i < (int)a.stride; i += 4 * 32 * WARPS) {
        float four[4];
        UNROLL(4)
        for (int j = 0; j < 4; j++)
            four[j] = i + j < a.k ? x[i + j] : 0.0f;
        store_halves(a.out + blockIdx.x * a.stride + i, four, p.by);
    }
}

/* As put() ends a product. */
KERNEL(finish, 256, struct cuda_finish, struct no_room) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i % (unsigned)a.n_rows;
    const size_t tok = i / (unsigned)a.n_rows;
    (void)s;
    if (tok >= (size_t)a.n_tok)
        return;
    float y = a.sums[tok * a.sum_stride + row] * a.row_powers[row] * a.token_powers[tok];
    float *out = a.out + tok * a.out_stride + row;
    if (a.factor != 0)
        y = a.factor * y + (a.bias ? a.bias[row] : 0.0f);
    else if (a.bias)
        y = y + a.bias[row];
    *out = a.add ? *out + y : y;
}
