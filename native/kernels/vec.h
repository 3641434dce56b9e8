/* Rows of floats: norms, activations, quantization. Written in lanes, compiled once per ISA. */

static void quantize(struct act_block *act, int stride, const float *x, int n_blocks) {
    for (int b = 0; b < n_blocks; b++, x += 32, act += stride) {
        f32x16 lo = f_load(x), hi = f_load(x + 16);
        float top = f_max_lane(f_max(f_abs(lo), f_abs(hi)));
        f32x16 per = f_set(top > 0x1p-119f ? 127.0f / top : 0.0f);           /* below, 127 / top would be infinite */
        f_store_block(act, top / 127.0f, f_mul(lo, per), f_mul(hi, per));
    }
}

static void rmsnorm(float *y, const float *x, const float *weight, int n, float eps) {
    f32x16 sum = f_zero();
    EACH_16(n) {
        f32x16 v = f_load_n(x + i, m);
        sum = f_fma(v, v, sum);
    }
    f32x16 scale = f_set(1.0f / sqrtf(f_sum(sum) / (float)n + eps));
    EACH_16(n)
        f_store_n(y + i, f_mul(f_mul(f_load_n(x + i, m), scale), f_load_n(weight + i, m)), m);
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
    f32x16 scale = f_set(1.0f / sqrtf(f_sum(square) / (float)n + eps));
    EACH_16(n) {
        f32x16 v = f_mul(f_mul(f_sub(f_load_n(x + i, m), mean), scale), f_load_n(weight + i, m));
        f_store_n(y + i, bias ? f_add(v, f_load_n(bias + i, m)) : v, m);
    }
}

/* y = x * g * sigmoid(u) */
INLINE f32x16 gated(const float *x, int m, f32x16 g, f32x16 u) {
    f32x16 v = f_div(g, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), u))));
    return x ? f_mul(f_load_n(x, m), v) : v;
}

static void silu(float *y, const float *x, const float *gate, int n) {
    EACH_16(n) {
        f32x16 g = f_load_n(gate + i, m);
        f_store_n(y + i, gated(x ? x + i : NULL, m, g, g), m);
    }
}

/* 0.5 g (1 + tanh(u)) = g sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3) */
static void gelu(float *y, const float *x, const float *gate, int n) {
    EACH_16(n) {
        f32x16 g = f_load_n(gate + i, m);
        f32x16 cubic = f_mul(g, f_fma(f_mul(g, g), f_set(0.044715f), f_set(1.0f)));
        f_store_n(y + i, gated(x ? x + i : NULL, m, g, f_mul(cubic, f_set(1.5957691216f))), m);
    }
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

void ISA(vec)(struct kernels *k) {
    k->quantize = quantize;
    k->rmsnorm = rmsnorm;
    k->layernorm = layernorm;
    k->silu = silu;
    k->gelu = gelu;
    k->largest = largest;
    k->reaching = reaching;
    k->sum_exp = sum_exp;
    k->add = add;
    k->scale = scale;
    k->rope_pairs = rope_pairs;
    k->rope_halves = rope_halves;
}
