/* Convolutions and recurrences on every ISA: the bits that kernels.h promises, and the values of plain double
 * arithmetic. */
#include "isas.h"

#include <math.h>

/* conv. */

/* y (n,) of rows (k, n), each in memory of its own size; in_place: y is the last row. */
static void run_conv(const struct kernels *kernels, float *y, const float *rows, const float *weight,
                     const float *bias, int k, int n, int in_place) {
    float *copies[8], *out = guards((size_t)n + 2);
    for (int i = 0; i < k; i++) {
        copies[i] = get_memory((size_t)n * sizeof *rows);
        memcpy(copies[i], rows + i * n, (size_t)n * sizeof *rows);
    }
    float *to = in_place ? copies[k - 1] : out + 1;
    kernels->conv(to, (const float *const *)copies, weight, (size_t)(n + 15) / 16 * 16, bias, k, n);
    memcpy(y, to, (size_t)n * sizeof *y);
    CHECK(out[0] == GUARD && out[n + 1] == GUARD);
    for (int i = 0; i < k; i++)
        free(copies[i]);
    free(out);
}

static void check_conv(int k, int n, int with_bias) {
    int stride = (n + 15) / 16 * 16;
    float *rows = noises(k * n), *weight = noises(k * stride), *bias = noises(n);
    float *y = get_memory((size_t)n * sizeof *y);
    for (int isa = 0; isa < n_isas; isa++)
        for (int in_place = 0; in_place < 2; in_place++) {
            run_conv(&isas[isa], y, rows, weight, with_bias ? bias : NULL, k, n, in_place);
            for (int c = 0; c < n; c++) {
                float chain = with_bias ? bias[c] : 0;
                double sum = (double)chain, size = fabs(sum);
                for (int i = 0; i < k; i++) {
                    double product = (double)weight[i * stride + c] * (double)rows[i * n + c];
                    chain = fmaf(weight[i * stride + c], rows[i * n + c], chain);
                    sum += product, size += fabs(product);
                }
                CHECK(f32_bits(y[c]) == f32_bits(chain) && fabs((double)y[c] - sum) <= k * ROUNDING * size);
            }
        }
    free(rows), free(weight), free(bias), free(y);
}

static void convolutions(void) {
    static const int sizes[] = { 1, 2, 15, 16, 17, 31, 32, 100, 257 };
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int k = 1; k <= 5; k++)
            check_conv(k, sizes[s], k % 2), check_conv(k, sizes[s], (k + 1) % 2);
}

/* recur. */

enum { MOST_TOK = 11, MOST_KEYS = 256, GAP = 3 };
enum kind { DELTA, GIVEN };         /* v and beta are given, or d */

struct recurrence {
    enum kind kind;
    int n_keys, n_tok, stride;      /* stride: of k and q */
    float *start;                   /* (n_keys, 16) the state before */
    float *decay, *beta;            /* (n_tok, 1 + GAP) */
    float *k, *q;                   /* (n_tok, stride) */
    float *v, *d;                   /* (n_tok, 16 + GAP) */
};

struct outcome {                    /* guards between and around the values that a call may write */
    float s[MOST_KEYS * 16 + 1];
    float d[MOST_TOK * (16 + GAP)], o[MOST_TOK * (16 + GAP)];
};

static struct recurrence new_recurrence(enum kind kind, int n_keys, int n_tok) {
    struct recurrence r = { .kind = kind, .n_keys = n_keys, .n_tok = n_tok, .stride = n_keys + GAP };
    r.start = noises(n_keys * 16);
    r.k = noises(n_tok * r.stride);
    r.q = noises(n_tok * r.stride);
    r.v = noises(n_tok * (16 + GAP));
    r.d = noises(n_tok * (16 + GAP));
    r.decay = noises(n_tok * (1 + GAP));
    r.beta = noises(n_tok * (1 + GAP));
    /* A key of length 1 and beta below 1: the state stays small. */
    for (int t = 0; t < n_tok; t++) {
        double square = 0;
        for (int i = 0; i < n_keys; i++)
            square += (double)r.k[t * r.stride + i] * (double)r.k[t * r.stride + i];
        for (int i = 0; i < n_keys; i++) {
            r.k[t * r.stride + i] /= (float)sqrt(square);
            r.q[t * r.stride + i] /= sqrtf((float)n_keys);
        }
        r.decay[t * (1 + GAP)] = (float)uniform(0.8, 1);
        r.beta[t * (1 + GAP)] = (float)uniform(0, 1);
    }
    return r;
}

static void free_recurrence(struct recurrence *r) {
    float *parts[] = { r->start, r->decay, r->beta, r->k, r->q, r->v, r->d };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
}

static struct outcome begin(const struct recurrence *r) {
    struct outcome out;
    float *all = (float *)&out;
    for (size_t i = 0; i < sizeof out / sizeof *all; i++)
        all[i] = GUARD;
    memcpy(out.s, r->start, (size_t)(r->n_keys * 16) * sizeof *out.s);
    for (int t = 0; t < r->n_tok && r->kind == GIVEN; t++)
        memcpy(out.d + t * (16 + GAP), r->d + t * (16 + GAP), 16 * sizeof *out.d);
    return out;
}

/* Tokens from .. to. given: d is what `out` has; silent: without an output. */
static void advance(const struct kernels *k, const struct recurrence *r, struct outcome *out, int from,
                    int to, int given, int silent) {
    k->recur(&(struct recur_job){
        .s = out->s, .n_keys = r->n_keys, .n_tok = to - from, .decay = r->decay + from * (1 + GAP),
        .k = r->k + from * r->stride, .q = silent ? NULL : r->q + from * r->stride,
        .v = given ? NULL : r->v + from * (16 + GAP), .beta = given ? NULL : r->beta + from * (1 + GAP),
        .d = out->d + from * (16 + GAP), .o = out->o + from * (16 + GAP), .decay_stride = 1 + GAP,
        .k_stride = (size_t)r->stride, .q_stride = (size_t)r->stride, .v_stride = 16 + GAP,
        .beta_stride = 1 + GAP,
        .d_stride = 16 + GAP, .o_stride = 16 + GAP,
    });
}

/* s^T x in the order that kernels.h gives. */
static float dot(const float *s, const float *x, int n, int lane) {
    float sum[4] = { 0 };
    for (int i = 0; i < n; i++)
        sum[i % 4] = fmaf(x[i], s[i * 16 + lane], sum[i % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The words of kernels.h in scalar floats, a lane after the other. */
static struct outcome plain(const struct recurrence *r) {
    struct outcome out = begin(r);
    for (int lane = 0; lane < 16; lane++)
        for (int t = 0; t < r->n_tok; t++) {
            float *s = out.s, *d = out.d + t * (16 + GAP) + lane;
            const float *k = r->k + t * r->stride;
            for (int i = 0; i < r->n_keys; i++)
                s[i * 16 + lane] *= r->decay[t * (1 + GAP)];
            if (r->kind == DELTA)
                *d = r->beta[t * (1 + GAP)] * (r->v[t * (16 + GAP) + lane] - dot(s, k, r->n_keys, lane));
            for (int i = 0; i < r->n_keys; i++)
                s[i * 16 + lane] = fmaf(k[i], *d, s[i * 16 + lane]);
            out.o[t * (16 + GAP) + lane] = dot(s, r->q + t * r->stride, r->n_keys, lane);
        }
    return out;
}

/* Is every output near the same in doubles? A token adds n_keys roundings of values
 * that are about 10 at most. */
static int near(const struct recurrence *r, const struct outcome *out) {
    double *s = get_memory((size_t)r->n_keys * sizeof *s), worst = 0;
    double slack = 10 * r->n_tok * (r->n_keys + 8) * ROUNDING;
    for (int lane = 0; lane < 16; lane++) {
        for (int i = 0; i < r->n_keys; i++)
            s[i] = (double)r->start[i * 16 + lane];
        for (int t = 0; t < r->n_tok; t++) {
            double known = 0, o = 0, d = (double)r->d[t * (16 + GAP) + lane];
            const float *k = r->k + t * r->stride, *q = r->q + t * r->stride;
            for (int i = 0; i < r->n_keys; i++) {
                s[i] *= (double)r->decay[t * (1 + GAP)];
                known += s[i] * (double)k[i];
            }
            if (r->kind == DELTA)
                d = (double)r->beta[t * (1 + GAP)] * ((double)r->v[t * (16 + GAP) + lane] - known);
            for (int i = 0; i < r->n_keys; i++) {
                s[i] += (double)k[i] * d;
                o += s[i] * (double)q[i];
            }
            worst = fmax(worst, fabs((double)out->o[t * (16 + GAP) + lane] - o));
        }
    }
    free(s);
    return worst <= slack && slack < 0.02;
}

static int equal(const struct outcome *a, const struct outcome *b) { return !memcmp(a, b, sizeof *a); }

/* All tokens in one call, in several, and again from the d and decay that the first time left. */
static void check_recurrence(enum kind kind, int n_keys, int n_tok) {
    struct recurrence r = new_recurrence(kind, n_keys, n_tok);
    const struct outcome right = plain(&r);
    CHECK(near(&r, &right));
    for (int isa = 0; isa < n_isas; isa++) {
        struct outcome whole = begin(&r), pieces = begin(&r), again = begin(&r);
        advance(&isas[isa], &r, &whole, 0, n_tok, kind == GIVEN, 0);
        CHECK(equal(&whole, &right));
        for (int t = 0, n; t < n_tok; t += n) {
            n = 1 + (int)random_below(&state, n_tok - t);
            advance(&isas[isa], &r, &pieces, t, t + n, kind == GIVEN, 0);
        }
        CHECK(equal(&pieces, &right));
        memcpy(again.d, whole.d, sizeof again.d);
        advance(&isas[isa], &r, &again, 0, n_tok / 2, 1, 1);
        advance(&isas[isa], &r, &again, n_tok / 2, n_tok, 1, 1);
        CHECK(!memcmp(again.s, right.s, sizeof right.s) && !memcmp(again.d, right.d, sizeof right.d));
        for (size_t i = 0; i < sizeof again.o / sizeof *again.o; i++)
            CHECK(again.o[i] == GUARD);
    }
    r.decay[(n_tok - 1) * (1 + GAP)] *= 1.01f;      /* a small error is noticed */
    CHECK(!near(&r, &right));
    free_recurrence(&r);
}

static void recurrences(void) {
    static const int keys[] = { 1, 2, 3, 4, 5, 6, 7, 8, 16, 63, 64, 100, 128, MOST_KEYS };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (int n_tok = 1; n_tok <= MOST_TOK; n_tok += 1 + n_tok / 3)
            check_recurrence(DELTA, keys[i], n_tok), check_recurrence(GIVEN, keys[i], n_tok);
}

int main(void) {
    load_isas();
    convolutions();
    recurrences();
    return 0;
}
