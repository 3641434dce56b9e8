/* What every ISA's lanes share: included by lanes_<isa>.h at its end. */

/* n and e^r - 1 with e^x = 2^n e^r. Cephes' polynomial on [-ln2/2, ln2/2]. */
INLINE f32x16 f_exp_parts(f32x16 x, f32x16 *n) {
    *n = f_round(f_mul(x, f_set(1.44269504f)));
    f32x16 r = f_fma(*n, f_set(-0.693359375f), x);
    r = f_fma(*n, f_set(2.12194440e-4f), r);
    f32x16 p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    return f_fma(p, f_mul(r, r), r);
}

/* e^x within 2 ulp for -87 < x < 88; 0 below. NaN stays NaN, here and down to f_sigmoid: it is the second
 * argument of f_min and f_max. */
INLINE f32x16 f_exp(f32x16 x) {
    f32x16 n, p = f_exp_parts(f_min(f_set(88.0f), x), &n);
    return f_zero_below(f_scale(f_add(p, f_set(1.0f)), n), x, -87.0f);
}

/* e^x - 1 within 2 ulp for x < 88, near 0 too. */
INLINE f32x16 f_expm1(f32x16 x) {
    f32x16 n, p = f_exp_parts(f_min(f_set(88.0f), f_max(f_set(-30.0f), x)), &n);
    f32x16 power = f_scale(f_set(1.0f), n);
    return f_fma(p, power, f_sub(power, f_set(1.0f)));
}

/* tanh x within 3 ulp, near 0 too: e / (e + 2), e = e^2x - 1. Beyond 10 it is 1. */
INLINE f32x16 f_tanh(f32x16 x) {
    f32x16 e = f_expm1(f_mul(f_set(2.0f), f_min(f_set(10.0f), f_max(f_set(-10.0f), x))));
    return f_div(e, f_add(e, f_set(2.0f)));
}

/* log(1 + x) within 2 ulp for 0 <= x <= 1: 2 atanh(s), s = x / (2 + x). The polynomial in s^2 is
 * (atanh(s) / s - 1) / s^2, its largest error 5e-9 of atanh(s). */
INLINE f32x16 f_log1p(f32x16 x) {
    f32x16 s = f_div(x, f_add(x, f_set(2.0f))), t = f_mul(s, s);
    f32x16 p = f_set(1.400599629e-1f);
    p = f_fma(p, t, f_set(1.400090158e-1f));
    p = f_fma(p, t, f_set(2.001076341e-1f));
    p = f_fma(p, t, f_set(3.333320916e-1f));
    s = f_add(s, s);
    return f_fma(f_mul(p, t), s, s);
}

/* 1 / (1 + e^-x) */
INLINE f32x16 f_sigmoid(f32x16 x) {
    return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x))));
}

/* e^x for x <= 0, a softmax's weight, with half the work of f_exp: within 1.3e-7, and within four roundings,
 * and one and a half for each unit of x, of its own size; 0 below -87. It is 2^(x log2 e): 2^f on [-1/2, 1/2]
 * has the polynomial whose largest relative error, 1e-7, is the least. */
INLINE f32x16 f_weight(f32x16 x) {
    f32x16 t = f_mul(x, f_set(1.44269504f)), n = f_round(t), f = f_sub(t, n);
    f32x16 p = f_set(1.326472731e-3f);
    p = f_fma(p, f, f_set(9.671512991e-3f));
    p = f_fma(p, f, f_set(5.550733581e-2f));
    p = f_fma(p, f, f_set(2.402224243e-1f));
    p = f_fma(p, f, f_set(6.931470037e-1f));
    p = f_fma(p, f, f_set(1.0f));
    return f_zero_below(f_scale(p, n), x, -87.0f);
}

/* for (i, m) over n in steps of 16, m lanes in the last one */
#define EACH_16(n) for (int i = 0, m; m = (n) - i < 16 ? (n) - i : 16, i < (n); i += 16)
