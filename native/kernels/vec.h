/* Rows of floats: norms, activations, quantization, convolutions, recurrences. Written in lanes,
 * compiled once per ISA. */
#include "values.h"

static void quantize(struct act_block *act, int stride, const float *x, int n_blocks) {
    for (int b = 0; b < n_blocks; b++, x += 32, act += stride)
        quantize_block(act, f_load(x), f_load(x + 16));
}

/* y = (x - mean) * by * weight + bias; weight or bias NULL: without it. */
INLINE void normalize(float *y, const float *x, f32x16 mean, float by, const float *weight, const float *bias,
                      int n) {
    EACH_16(n) {
        f32x16 v = f_mul(f_sub(f_load_n(x + i, m), mean), f_set(by));
        v = weight ? f_mul(v, f_load_n(weight + i, m)) : v;
        f_store_n(y + i, bias ? f_add(v, f_load_n(bias + i, m)) : v, m);
    }
}

static void rmsnorm(float *y, const float *x, const float *weight, const float *bias, int n, float eps) {
    f32x16 sum = f_zero();
    EACH_16(n) {
        f32x16 v = f_load_n(x + i, m);
        sum = f_fma(v, v, sum);
    }
    normalize(y, x, f_zero(), 1.0f / sqrtf(f_sum(sum) / (float)n + eps), weight, bias, n);
}

static void layernorm(float *y, const float *x, const float *weight, const float *bias, int n, float eps) {
    f32x16 sum = f_zero(), square = f_zero();
    EACH_16(n)
        sum = f_add(sum, f_load_n(x + i, m));
    f32x16 mean = f_set(f_sum(sum) / (float)n);
    EACH_16(n) {
        f32x16 v = f_keep(f_sub(f_load_n(x + i, m), mean), 0.0f, 0, m);
        square = f_fma(v, v, square);
    }
    normalize(y, x, mean, 1.0f / sqrtf(f_sum(square) / (float)n + eps), weight, bias, n);
}

/* Activations. Each is f(gate) in lanes, and the loop below makes a kernel of it. */

typedef f32x16 act_fn(f32x16 g, const float *param);

INLINE void activate(float *y, const float *x, const float *gate, int n, const float *param, act_fn *f) {
    EACH_16(n) {
        f32x16 v = f(f_load_n(gate + i, m), param);
        f_store_n(y + i, x ? f_mul(f_load_n(x + i, m), v) : v, m);
    }
}
#define ACT(KIND, name)                                                                                 \
    static void name(float *y, const float *x, const float *gate, int n, const float *param) {          \
        activate(y, x, gate, n, param, of_##name);                                                      \
    }
GATE_ACTS(ACT)

static void swiglu_oai(float *y, const float *x, const float *gate, int n, const float *param) {
    (void)param;
    EACH_16(n)
        f_store_n(y + i, swiglu_oai_of(f_load_n(x + i, m), f_load_n(gate + i, m)), m);
}

static void softcap(float *x, float cap, int n) {
    EACH_16(n)
        f_store_n(x + i, f_mul(f_set(cap), f_tanh(f_div(f_load_n(x + i, m), f_set(cap)))), m);
}

static float largest(const float *x, int n) {
    f32x16 top = f_set(-INFINITY);
    EACH_16(n)
        top = f_max(f_keep(f_load_n(x + i, m), -INFINITY, 0, m), top);
    return f_max_lane(top);
}

static uint64_t reaching(const float *x, int n, float least) {
    uint64_t found = 0;
    EACH_16(n)
        found |= (uint64_t)(f_reaching(f_load_n(x + i, m), least) & ((1u << m) - 1)) << i;
    return found;
}

static float sum_exp(const float *x, float max, int n) {
    f32x16 sum = f_zero();
    EACH_16(n)
        sum = f_add(sum, f_weight(f_sub(f_keep(f_load_n(x + i, m), -INFINITY, 0, m), f_set(max))));
    return f_sum(sum);
}

static void add(float *y, const float *x, int n) {
    EACH_16(n)
        f_store_n(y + i, f_add(f_load_n(y + i, m), f_load_n(x + i, m)), m);
}

static void scale(float *y, float s, int n) {
    EACH_16(n)
        f_store_n(y + i, f_mul(f_load_n(y + i, m), f_set(s)), m);
}

static void mul(float *y, const float *x, int n) {
    EACH_16(n)
        f_store_n(y + i, f_mul(f_load_n(y + i, m), f_load_n(x + i, m)), m);
}

static void axpy(float *y, float a, const float *x, int n) {
    EACH_16(n)
        f_store_n(y + i, f_fma(f_set(a), f_load_n(x + i, m), f_load_n(y + i, m)), m);
}

static void rope_pairs(float *x, const float *cos, const float *sin, int n) {
    for (int i = 0; i < n / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

static void rope_halves(float *x, const float *cos, const float *sin, int n) {
    float *y = x + n / 2;
    for (int i = 0; i < n / 2; i++) {
        float a = x[i], b = y[i];
        x[i] = a * cos[i] - b * sin[i];
        y[i] = a * sin[i] + b * cos[i];
    }
}

static void conv(float *y, const float *const *rows, const float *weight, size_t stride, const float *bias,
                 int k, int n) {
    EACH_16(n) {
        f32x16 sum = bias ? f_load_n(bias + i, m) : f_zero();
        for (int j = 0; j < k; j++)
            sum = f_fma(f_load(weight + (size_t)j * stride + i), f_load_n(rows[j] + i, m), sum);
        f_store_n(y + i, sum, m);
    }
}

/* A recurrence's state, key by key. */

/* Key i: v = decay * s; with k it is fma(k, d, v), and stored. Returns fma(x, v, sum),
 * or sum where x is NULL. */
INLINE f32x16 visit_key(float *s, int i, f32x16 decay, const float *k, f32x16 d, const float *x, f32x16 sum) {
    f32x16 v = f_mul(decay, f_load(s + i * 16));
    if (k) {
        v = f_fma(f_set(k[i]), d, v);
        f_store(s + i * 16, v);
    }
    return x ? f_fma(f_set(x[i]), v, sum) : sum;
}

/* All keys: with k an update of s, then s^T x; without it (decay s)^T x, and s stays as it is. */
INLINE f32x16 sweep(float *s, int n, f32x16 decay, const float *k, f32x16 d, const float *x) {
    f32x16 sum[4] = { f_zero(), f_zero(), f_zero(), f_zero() };
    int i = 0;
    for (; i + 4 <= n; i += 4)
        UNROLL(4)
        for (int c = 0; c < 4; c++)
            sum[c] = visit_key(s, i + c, decay, k, d, x, sum[c]);
    UNROLL(4)
    for (int c = 0; c < 3; c++)
        if (i + c < n)
            sum[c] = visit_key(s, i + c, decay, k, d, x, sum[c]);
    return f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3]));
}

static void recur(const struct recur_job *job) {
    const struct recur_job j = *job;
    for (size_t t = 0; t < (size_t)j.n_tok; t++) {
        const float *k = j.k + t * j.k_stride;
        float *d = j.d + t * j.d_stride;
        f32x16 decay = f_set(j.decay[t * j.decay_stride]);
        if (j.v) {
            f32x16 known = sweep(j.s, j.n_keys, decay, NULL, decay, k);
            f_store(d, f_mul(f_set(j.beta[t * j.beta_stride]), f_sub(f_load(j.v + t * j.v_stride), known)));
        }
        if (j.q)
            f_store(j.o + t * j.o_stride, sweep(j.s, j.n_keys, decay, k, f_load(d), j.q + t * j.q_stride));
        else
            sweep(j.s, j.n_keys, decay, k, f_load(d), NULL);
    }
}

void ISA(vec)(struct kernels *k) {
    k->quantize = quantize;
    k->rmsnorm = rmsnorm;
    k->layernorm = layernorm;
#define INSTALL_ACT(KIND, name) k->act[KIND] = name;
    GATE_ACTS(INSTALL_ACT)
    k->act[BMC_ACT_SWIGLU_OAI] = swiglu_oai;
    k->softcap = softcap;
    k->largest = largest;
    k->reaching = reaching;
    k->sum_exp = sum_exp;
    k->add = add;
    k->scale = scale;
    k->mul = mul;
    k->axpy = axpy;
    k->rope_pairs = rope_pairs;
    k->rope_halves = rope_halves;
    k->conv = conv;
    k->recur = recur;
}
