/* What every ISA's lanes share: included by lanes_<isa>.h at its end. */

/* e^x within 2 ulp for -87 < x < 88; 0 below. Cephes' polynomial on [-ln2/2, ln2/2]. */
INLINE f32x16 f_exp(f32x16 x) {
    f32x16 n = f_round(f_mul(f_min(x, f_set(88.0f)), f_set(1.44269504f)));
    n = f_max(n, f_set(-126.0f));
    f32x16 r = f_fma(n, f_set(-0.693359375f), f_min(x, f_set(88.0f)));
    r = f_fma(n, f_set(2.12194440e-4f), r);
    f32x16 p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_add(f_fma(p, f_mul(r, r), r), f_set(1.0f));
    return f_zero_below(f_mul(p, f_pow2(n)), x, -87.0f);
}

/* for (i, m) over n in steps of 16, m lanes in the last one */
#define EACH_16(n) for (int i = 0, m; m = (n) - i < 16 ? (n) - i : 16, i < (n); i += 16)
