/* Rows of floats on every ISA this CPU has: the bits of the reference, and the values of plain double
 * arithmetic, within worst cases of float32 rounding. */
#include "isas.h"

#include <math.h>

static const int sizes[] = { 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 80, 100, 257 };
enum { N_SIZES = sizeof sizes / sizeof *sizes };

typedef void row_fn(const struct kernels *k, float *y, const float *x, const float *a, const float *b, int n);

/* Every ISA gives the bits of the reference, in place too, and writes n values. Leaves them in y. */
static void check_row(row_fn *fn, float *y, const float *x, const float *a, const float *b, int n,
                      int in_place) {
    for (int i = 0; i < n_isas; i++) {
        float *out = guards((size_t)n + 2), *exact_size = get_memory((size_t)n * sizeof *y);
        fn(&isas[i], out + 1, x, a, b, n);
        CHECK(out[0] == GUARD && out[n + 1] == GUARD);
        if (i == 0)
            memcpy(y, out + 1, (size_t)n * sizeof *y);
        CHECK(same(out + 1, y, (size_t)n));
        memcpy(exact_size, x, (size_t)n * sizeof *y);
        if (in_place) {
            fn(&isas[i], exact_size, exact_size, a, b, n);
            CHECK(same(exact_size, y, (size_t)n));
        }
        free(out), free(exact_size);
    }
}

static void do_rmsnorm(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                       int n) {
    k->rmsnorm(y, x, a, b, n, 1e-5f);
}
static void do_layernorm(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                         int n) {
    k->layernorm(y, x, a, b, n, 1e-5f);
}
static int act;                                     /* of do_act: enum bmc_act */
static const float *param;
static void do_act(const struct kernels *k, float *y, const float *x, const float *a, const float *b, int n) {
    (void)b;
    k->act[act](y, a, x, n, param);
}
static void do_act_of(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                      int n) {
    (void)b;
    k->act[act](y, x, a, n, param);
}
static void do_add(const struct kernels *k, float *y, const float *x, const float *a, const float *b, int n) {
    (void)b;
    if (y != x)
        memcpy(y, x, (size_t)n * sizeof *y);
    k->add(y, a, n);
}
static void do_scale(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                     int n) {
    (void)a, (void)b;
    if (y != x)
        memcpy(y, x, (size_t)n * sizeof *y);
    k->scale(y, 1.7f, n);
}
static void do_mul(const struct kernels *k, float *y, const float *x, const float *a, const float *b, int n) {
    (void)b;
    if (y != x)
        memcpy(y, x, (size_t)n * sizeof *y);
    k->mul(y, a, n);
}
static void do_axpy(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                    int n) {
    (void)b;
    if (y != x)
        memcpy(y, x, (size_t)n * sizeof *y);
    k->axpy(y, 1.7f, a, n);
}
/* a: one value, the cap. */
static void do_softcap(const struct kernels *k, float *y, const float *x, const float *a, const float *b,
                       int n) {
    (void)b;
    if (y != x)
        memcpy(y, x, (size_t)n * sizeof *y);
    k->softcap(y, a[0], n);
}

/* Against mean and deviation in double. n roundings of the largest value move the mean, and
 * with it the deviation. */
static void norms(void) {
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        float *x = noises(n), *w = noises(n), *b = noises(n), *y = get_memory((size_t)n * sizeof *y);
        for (int kind = 0; kind < 8; kind++) {
            int layer = kind & 1;
            const float *weight = kind & 2 ? w : NULL, *bias = kind & 4 ? b : NULL;
            double mean = 0, square = 0, most = 0;
            for (int i = 0; i < n; i++)
                x[i] = noise() + (layer ? 3.0f : 0.0f), most = fmax(most, fabs((double)x[i]));
            for (int i = 0; i < n && layer; i++)
                mean += (double)x[i] / n;
            for (int i = 0; i < n; i++)
                square += ((double)x[i] - mean) * ((double)x[i] - mean) / n;
            check_row(layer ? do_layernorm : do_rmsnorm, y, x, weight, bias, n, 1);
            for (int i = 0; i < n; i++) {
                double scale = 1 / sqrt(square + (double)1e-5f);
                double by = weight ? (double)weight[i] : 1, add = bias ? (double)bias[i] : 0;
                double normed = ((double)x[i] - mean) * scale, right = normed * by + add;
                double size = (most * scale * (1 + fabs(normed)) + fabs(normed)) * fabs(by) + fabs(add);
                double slack = (n + 8) * ROUNDING * size;
                CHECK(fabs((double)y[i] - right) <= slack && slack < 0.05);
            }
        }
        free(x), free(w), free(b), free(y);
    }
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double within(double x, double low, double high) { return fmin(fmax(x, low), high); }

/* An activation in double: *size is what its roundings are relative to, *u the argument of e^u, whose own
 * rounding counts |u| times. up: what it is multiplied by. */
static double exact_act(double g, double up, double *size, double *u) {
    double right, low, p, n, b;
    *u = 0;
    switch (act) {
    case BMC_ACT_SILU: right = g * sigmoid(g) * up; break;
    case BMC_ACT_GELU:
        *u = 2 * 0.7978845608028654 * (g + 0.044715 * g * g * g), right = g * sigmoid(*u) * up;
        break;
    case BMC_ACT_RELU: right = fmax(g, 0) * up; break;
    case BMC_ACT_RELU2: right = fmax(g, 0) * fmax(g, 0) * up; break;
    case BMC_ACT_SIGMOID: right = sigmoid(g) * up; break;
    case BMC_ACT_SOFTPLUS: right = (fmax(g, 0) + log1p(exp(-fabs(g)))) * up; break;
    case BMC_ACT_SWIGLU_OAI:
        g = fmin(g, 7), *u = 1.702 * g, right = g * sigmoid(*u) * (within(up, -7, 7) + 1);
        break;
    default:
        CHECK(act == BMC_ACT_XIELU);
        p = (double)param[0], n = (double)param[1], b = (double)param[2];
        low = expm1(fmin(g, (double)param[3]));
        *size = (g > 0 ? p * g * g : n * (fabs(low) + fabs(g))) + fabs(b * g);
        *size *= fabs(up);
        return ((g > 0 ? p * g * g : n * (low - g)) + b * g) * up;
    }
    *size = fabs(right);
    return right;
}

/* Gates over all that they may be, near zero and at the ends too, against libm; NaN stays NaN. */
static void activation(const float *gate, const float *up, float *y, int n) {
    for (int with_up = act == BMC_ACT_SWIGLU_OAI; with_up < 2; with_up++) {
        check_row(do_act, y, gate, with_up ? up : NULL, NULL, n, 1);
        if (with_up)
            check_row(do_act_of, y, up, gate, NULL, n, 1);
        for (int i = 0; i < n; i++) {
            double size, u, g = (double)gate[i], by = with_up ? (double)up[i] : 1;
            double right = exact_act(g, by, &size, &u);
            double cut = fabs(g) * (fabs(by) + 1) * (u < -86 || g < -86 ? exp(-86) : 0) + fabs(by) * exp(-87);
            double slack = ROUNDING * (24 + 8 * fabs(u)) * size + cut + 1e-37;
            /* Both infinite. */
            CHECK(fabs((double)y[i] - right) <= slack || (double)y[i] == (double)(float)right);
        }
    }
    const float nan = NAN, one = 1;
    for (int i = 0; i < n_isas; i++) {
        isas[i].act[act](y, &one, &nan, 1, param);
        CHECK(isnan(y[0]));
    }
}

static void activations(void) {
    enum { N = 3400 };
    static const float xielu[] = { 0.8f, 1.3f, 0.5f, -1e-6f };
    float *x = get_memory(N * sizeof *x), *up = noises(N), *y = get_memory(N * sizeof *y);
    for (int i = 0; i < N; i++)
        x[i] = i < 2000 ? (float)(i - 1000) / 10
             : i < 2900 ? noise() * 4
             : i < 3000 ? ldexpf(noise(), i - 2990)
                        : ldexpf(noise(), (i - 3400) / 4);
    x[0] = 0, x[1] = -0.0f, x[2] = 1e30f, x[3] = -1e30f, x[4] = 1e12f, up[5] = 50, up[6] = -50;
    for (act = 0; act < BMC_ACTS; act++) {
        param = act == BMC_ACT_XIELU ? xielu : NULL;
        activation(x, up, y, N);
        for (int s = 0; s < N_SIZES; s++)
            check_row(do_act, y, x + 900, up, NULL, sizes[s], 1);
    }
    free(x), free(up), free(y);
}

/* Within 3 ulp of tanh and two roundings; saturates. */
static void softcaps(void) {
    enum { N = 4000 };
    static const float caps[] = { 1, 30, 50, 0.07f };
    float *x = get_memory(N * sizeof *x), *y = get_memory(N * sizeof *y);
    for (size_t c = 0; c < sizeof caps / sizeof *caps; c++) {
        for (int i = 0; i < N; i++)
            x[i] = i < 2000 ? (float)(i - 1000) / 70 * caps[c] : ldexpf(noise(), (i - 3600) / 16);
        x[0] = 0, x[1] = 1e38f, x[2] = -1e38f, x[3] = INFINITY, x[4] = -INFINITY;
        check_row(do_softcap, y, x, &caps[c], NULL, N, 1);
        for (int i = 0; i < N; i++) {
            double right = (double)caps[c] * tanh((double)x[i] / (double)caps[c]);
            CHECK(fabs((double)y[i] - right) <= 9 * ROUNDING * fabs(right) + 1e-37);
        }
        CHECK(y[0] == 0 && y[1] == caps[c] && y[2] == -caps[c] && y[3] == caps[c] && y[4] == -caps[c]);
        for (int s = 0; s < N_SIZES; s++)
            check_row(do_softcap, y, x + 900, &caps[c], NULL, sizes[s], 1);
    }
    x[0] = NAN;
    for (int i = 0; i < n_isas; i++) {
        isas[i].softcap(x, 30, 1);
        CHECK(isnan(x[0]));
    }
    free(x), free(y);
}

static void sums_and_scales(void) {
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        float *x = noises(n), *a = noises(n), *y = get_memory((size_t)n * sizeof *y);
        check_row(do_add, y, x, a, NULL, n, 1);
        for (int i = 0; i < n; i++)
            CHECK(y[i] == x[i] + a[i]);
        check_row(do_scale, y, x, NULL, NULL, n, 1);
        for (int i = 0; i < n; i++)
            CHECK(y[i] == x[i] * 1.7f);
        check_row(do_mul, y, x, a, NULL, n, 1);
        for (int i = 0; i < n; i++)
            CHECK(y[i] == x[i] * a[i]);
        check_row(do_axpy, y, x, a, NULL, n, 1);
        for (int i = 0; i < n; i++)
            CHECK(y[i] == fmaf(1.7f, a[i], x[i]));
        free(x), free(a), free(y);
    }
}

/* e^x alone, as a sum of one: within 1.3e-7 of libm, and an error of the exponent's size
 * where it is not cut to 0. */
static void exponentials(void) {
    for (int isa = 0; isa < n_isas; isa++)
        for (int i = 0; i <= 8800; i++) {
            float x = -(float)i / 100, ours = isas[isa].sum_exp(&x, 0, 1);
            double right = exp((double)x);
            double slack = fmin(1.3e-7, (4 - 1.5 * (double)x) * ROUNDING * right);
            CHECK(x < -87 ? ours == 0 : fabs((double)ours - right) <= slack);
        }
}

/* Of a row of logits, ties and -inf among them. */
static void best_of_a_row(void) {
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        float *x = noises(n), sum = 0;
        x[n / 2] = n > 3 ? -INFINITY : x[n / 2];
        x[n - 1] = x[0];
        double top = -INFINITY, right = 0;
        for (int i = 0; i < n; i++)
            x[i] *= 10, top = fmax(top, (double)x[i]);
        for (int i = 0; i < n; i++)
            right += exp((double)x[i] - top);
        for (int i = 0; i < n_isas; i++) {
            CHECK(isas[i].largest(x, n) == (float)top);
            float ours = isas[i].sum_exp(x, (float)top, n);
            CHECK(fabs((double)ours - right) <= (n + 60) * ROUNDING * right);       /* x - top is up to 60 */
            sum = i ? sum : ours;
            CHECK(ours == sum);
            for (int at = 0; at < n; at += 64) {
                int some = n - at < 64 ? n - at : 64;
                for (int j = 0; j < some; j += 7) {
                    uint64_t found = isas[i].reaching(x + at, some, x[at + j]);
                    for (int k = 0; k < 64; k++)
                        CHECK((found >> k & 1) == (k < some && x[at + k] >= x[at + j]));
                }
            }
        }
        free(x);
    }
}

static void rope(void) {
    static const int dims[] = { 2, 4, 10, 32, 48, 64, 80, 96, 128, 256 };
    for (size_t s = 0; s < sizeof dims / sizeof *dims; s++) {
        int n = dims[s];
        float *x = noises(n), *cs = get_memory((size_t)n * sizeof *cs);
        float *first = get_memory((size_t)n * sizeof *first);
        for (int i = 0; i < n / 2; i++)
            cs[i] = (float)cos(0.1 + i), cs[n / 2 + i] = (float)sin(0.1 + i);
        for (int halves = 0; halves < 2; halves++)
            for (int isa = 0; isa < n_isas; isa++) {
                float *y = guards((size_t)n + 2);
                memcpy(y + 1, x, (size_t)n * sizeof *y);
                (halves ? isas[isa].rope_halves : isas[isa].rope_pairs)(y + 1, cs, cs + n / 2, n);
                CHECK(y[0] == GUARD && y[n + 1] == GUARD);
                for (int i = 0; i < n / 2; i++) {
                    int a = halves ? i : 2 * i, b = halves ? i + n / 2 : 2 * i + 1;
                    double c = (double)cs[i], d = (double)cs[n / 2 + i];
                    double slack = 3 * ROUNDING * (fabs((double)x[a]) + fabs((double)x[b]));
                    CHECK(fabs((double)y[1 + a] - ((double)x[a] * c - (double)x[b] * d)) <= slack);
                    CHECK(fabs((double)y[1 + b] - ((double)x[a] * d + (double)x[b] * c)) <= slack);
                }
                if (isa == 0)
                    memcpy(first, y + 1, (size_t)n * sizeof *y);
                CHECK(same(y + 1, first, (size_t)n));
                free(y);
            }
        free(x), free(cs), free(first);
    }
}

int main(void) {
    load_isas();
    norms();
    activations();
    softcaps();
    sums_and_scales();
    exponentials();
    best_of_a_row();
    rope();
    return 0;
}
