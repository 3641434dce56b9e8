/* What every ISA's lanes share: included by lanes_<isa>.h at its end. */

/* e^x within 2 ulp for -87 < x < 88; 0 below. Cephes' polynomial on [-ln2/2, ln2/2]. */
INLINE f32x16 f_exp(f32x16 x) {
    f32x16 n = f_round(f_mul(f_min(x, f_set(88.0f)), f_set(1.44269504f)));
    f32x16 r = f_fma(n, f_set(-0.693359375f), f_min(x, f_set(88.0f)));
    r = f_fma(n, f_set(2.12194440e-4f), r);
    f32x16 p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_add(f_fma(p, f_mul(r, r), r), f_set(1.0f));
    return f_zero_below(f_scale(p, n), x, -87.0f);
}

/* e^x for x <= 0, a softmax's weight, with half the work of f_exp: within 1.3e-7, and within four roundings, and one and a half for
 * each unit of x, of its own size; 0 below -87. It is 2^(x log2 e): 2^f on [-1/2, 1/2] has the polynomial whose largest relative
 * error, 1e-7, is the least. */
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
