/* What becomes of single values, in the words of lanes_<isa>.h, for the CPU's kernels and the GPU's:
 * activations, and blocks of 8 bits. */

/* Thirty-two values as a block. */
INLINE void quantize_block(struct act_block *act, f32x16 lo, f32x16 hi) {
    float top = f_max_lane(f_max(f_abs(lo), f_abs(hi)));
    f32x16 per = f_set(top > 0x1p-119f ? 127.0f / top : 0.0f); /* below, 127 / top would be infinite */
    f_store_block(act, top / 127.0f, f_mul(lo, per), f_mul(hi, per));
}

INLINE f32x16 within_f16(f32x16 x) { return f_min(f_max(x, f_set(-65504.0f)), f_set(65504.0f)); }

/* g * sigmoid(u) */
INLINE f32x16 gated(f32x16 g, f32x16 u) { return f_div(g, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), u)))); }

INLINE f32x16 of_silu(f32x16 g, const float *param) {
    (void)param;
    return gated(g, g);
}

/* 0.5 g (1 + tanh(u)) = g sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3) */
INLINE f32x16 of_gelu(f32x16 g, const float *param) {
    (void)param;
    f32x16 cubic = f_mul(g, f_fma(f_mul(g, g), f_set(0.044715f), f_set(1.0f)));
    return gated(g, f_mul(cubic, f_set(1.5957691216f)));
}

INLINE f32x16 of_relu(f32x16 g, const float *param) {
    (void)param;
    return f_max(f_zero(), g);
}

INLINE f32x16 of_relu2(f32x16 g, const float *param) {
    f32x16 v = of_relu(g, param);
    return f_mul(v, v);
}

/* p g^2 + b g where g > 0, else (expm1(min(g, e)) - g) n + b g */
INLINE f32x16 of_xielu(f32x16 g, const float *param) {
    f32x16 up = f_max(f_zero(), g), low = f_sub(f_expm1(f_min(f_set(param[3]), g)), g);
    f32x16 v = f_fma(f_mul(f_set(param[0]), up), up, f_mul(f_set(param[2]), g));
    return f_add(v, f_zero_below(f_mul(low, f_set(param[1])), f_sub(f_zero(), g), 0.0f));
}

INLINE f32x16 of_sigmoid(f32x16 g, const float *param) {
    (void)param;
    return f_sigmoid(g);
}

/* log(1 + e^g) = max(g, 0) + log(1 + e^-|g|) */
INLINE f32x16 of_softplus(f32x16 g, const float *param) {
    (void)param;
    return f_add(f_max(f_zero(), g), f_log1p(f_exp(f_sub(f_zero(), f_abs(g)))));
}

/* g sigmoid(1.702 g) (x + 1), g up to 7 and x within -7 .. 7 */
INLINE f32x16 swiglu_oai_of(f32x16 x, f32x16 g) {
    const f32x16 most = f_set(7.0f);
    g = f_min(most, g);
    x = f_min(most, f_max(f_set(-7.0f), x));
    return f_mul(gated(g, f_mul(f_set(1.702f), g)), f_add(x, f_set(1.0f)));
}

/* Activations that are f(gate), by enum bmc_act. */
#define GATE_ACTS(X) \
    X(BMC_ACT_SILU, silu) \
    X(BMC_ACT_GELU, gelu) \
    X(BMC_ACT_RELU, relu) \
    X(BMC_ACT_RELU2, relu2) \
    X(BMC_ACT_XIELU, xielu) \
    X(BMC_ACT_SIGMOID, sigmoid) \
    X(BMC_ACT_SOFTPLUS, softplus)
