/* The hot functions, chosen once for this CPU, and the promise each one makes.
 *
 * The promise of all: a value is a function of its own inputs. How many columns or rows share a call,
 * where a call begins and ends, which ISA runs it: none of this changes a bit. Sums run over 16 lanes
 * (element i into lane i % 16, in ascending order), folded 8, 4, 2, 1; products and sums are fused where
 * written fma, never otherwise. */
#ifndef KERNELS_H
#define KERNELS_H

#include "bmc.h"
#include "types.h"

#include <stddef.h>

/* 32 activations of one token in 8 bits, x = d * q, with what every weight format needs beside them. */
struct act_block {
    int8_t q[32];           /* -127..127 */
    float d;                /* max |x| / 127 */
    float sum[3];           /* sum of q[0..15], q[16..31], q[0..31]: FIRST, SECOND, WHOLE */
    int32_t neg_sum[3];     /* minus the same */
    int32_t unused;         /* a cache line, whole */
};
_Static_assert(sizeof(struct act_block) == 64, "an act_block is a cache line");
enum { FIRST, SECOND, WHOLE };

static inline void act_set(struct act_block *act, float d, int32_t first, int32_t second) {
    const int32_t sums[] = { first, second, first + second };
    act->d = d;
    for (int i = 0; i < 3; i++) {
        act->sum[i] = (float)sums[i];
        act->neg_sum[i] = -sums[i];
    }
    act->unused = 0;
}

/* y(n_cols, rows) = W(rows, k) * x(k, n_cols), for n_panels consecutive panels of W and one tile of columns
 * (tokens). Each output is sum over blocks of 32 columns, ascending, of fma(t, d, y) where t = scale * dot
 * (+ second half's) + min * sum, all in float32; the dot product is an exact integer.
 * Float weights: fma(w, x, y) over ascending k. */
struct panel_job {
    const uint8_t *codes;       /* of the first panel */
    const uint8_t *scales;      /* NULL for float types */
    size_t code_stride;         /* bytes from panel to panel */
    size_t scale_stride;
    int n_panels;
    int n_rows;                 /* outputs wanted of these panels: up to 16 * n_panels */
    int k;                      /* columns of W, a multiple of the type's block */
    int n_cols;                 /* tokens in this tile, 1 .. TILE_COLS */
    const struct act_block *act;    /* [k / 32][n_cols] */
    const float *x;             /* float types: (n_cols, x_stride) */
    size_t x_stride;            /* floats */
    const float *bias;          /* (n_rows,) or NULL, added to the sum */
    float *out;                 /* out[col * out_stride + row] */
    size_t out_stride;
    int add;                    /* 1: out += y, else out = y */
};
typedef void panel_fn(const struct panel_job *job);
enum { TILE_COLS = 16 };

/* Attention of n_rows queries of one KV head over one chunk: up to 256 rows of the cache, whose edges are
 * absolute multiples of 256. Row i sees cache rows first[i] <= t < limit[i] (relative to the chunk); at least
 * one. Tile: K as [head_dim][16 tokens] f16, then V as [16 tokens][v_dim] f16; tiles before the smallest
 * first and after the largest limit are not touched. Shared: V is the first v_dim values of K, and a tile has
 * K only. m, l, o carry the running softmax from chunk to chunk, in order. */
enum { CHUNK = 256, TILE = 16, ATTN_ROWS = 32 };
struct attn_job {
    const uint16_t *const *tiles;   /* [CHUNK / TILE] */
    const uint16_t *const *next;    /* the tiles after these, to be fetched meanwhile;
                                       NULL: all are in the cache */
    int head_dim;                   /* values in a row of K */
    int v_dim;                      /* values in a row of V, rounded up to 16 */
    int shared;                     /* 1: they are the first of K's */
    int n_rows;                     /* 1 .. ATTN_ROWS */
    const float *const *q;          /* n_rows x (head_dim,), scaled */
    const int *first, *limit;
    float *m, *l;                   /* (n_rows,) running maximum, sum; -inf and 0 at the start */
    float *o;                       /* (n_rows, v_dim) running weighted sum,
                                       not divided by l yet; 0 at the start */
    float softcap;                  /* scores become softcap * tanh(score / softcap); 0: off */
    const float *slope;             /* (n_rows,) ALiBi, after softcap:
                                       fma(-slope, |at - t|, score); NULL: off */
    const int *at;                  /* (n_rows,) the queries' own rows,
                                       relative to the chunk as t is; for slope */
};

/* A recurrence over n_tok tokens, for 16 values of one head's state s (n_keys, 16). For each token in order:
 *     s = decay * s
 *     d = beta * (v - s^T k)              where v is given
 *     s_i = fma(k_i, d, s_i)              for every key i
 *     o = s^T q                           where q is given
 * A dot product is four sums over ascending keys, key i in sum i % 4, each a chain of fma, folded
 * (0 + 1) + (2 + 3).
 * Tokens in one call or in several give the same bits; k, d and decay of a token update an older s again. */
struct recur_job {
    float *s;
    int n_keys, n_tok;
    const float *decay;             /* one a token, the factor itself */
    const float *k;                 /* (n_keys,) a token */
    const float *q;                 /* likewise; NULL: no output */
    const float *v, *beta;          /* 16 values and one a token; NULL: d is given */
    float *d;                       /* 16 values a token: written where v is given, else read */
    float *o;                       /* 16 values a token */
    /* Floats, token to token. */
    size_t decay_stride, k_stride, q_stride, v_stride, beta_stride, d_stride, o_stride;
};

/* AltUp: versions of x at most; the mean square of a vector, at least, whose length is divided by. */
enum { ALTUP_MAX = 8 };
#define ALTUP_LEAST 1e-5f

struct kernels {
    const char *name;
    panel_fn *panel[N_PANEL_TYPES];

    void (*attend)(const struct attn_job *job);
    /* m, l and o go on with what a chunk alone came to, as if attend had seen it next. */
    void (*attend_merge)(float *m, float *l, float *o, float m_chunk, float l_chunk, const float *o_chunk,
                         int v_dim);
    void (*attend_end)(float *out, const float *o, float l, int n);     /* out = o / l */
    /* A row's K (k_dim) and V (v_dim) into their slot of a tile; what f16 cannot hold becomes its largest. */
    void (*store_kv)(uint16_t *tile, int slot, const float *k, const float *v, int k_dim, int v_dim);

    /* 8-bit blocks; block i goes to act[i * stride]. */
    void (*quantize)(struct act_block *act, int stride, const float *x, int n_blocks);

    /* y may be x in all of these. Norms: weight NULL is 1, bias NULL is 0. */
    void (*rmsnorm)(float *y, const float *x, const float *weight, const float *bias, int n, float eps);
    void (*layernorm)(float *y, const float *x, const float *weight, const float *bias, int n, float eps);
    /* By enum bmc_act: y = x * f(gate), x NULL: f(gate). y may be gate too. param is NULL but for
     * XIELU: p, n, b, e of f(g) = p g^2 + b g where g > 0, else (expm1(min(g, e)) - g) n + b g.
     * SWIGLU_OAI: g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = x within -7 .. 7; x is not NULL. */
    void (*act[BMC_ACTS])(float *y, const float *x, const float *gate, int n, const float *param);
    void (*softcap)(float *x, float cap, int n);                        /* x = cap * tanh(x / cap) */
    void (*add)(float *y, const float *x, int n);
    void (*mul)(float *y, const float *x, int n);
    void (*scale)(float *y, float s, int n);
    void (*axpy)(float *y, float a, const float *x, int n);             /* y = fma(a, x, y) */
    /* cos and sin: (n / 2,) */
    void (*rope_pairs)(float *x, const float *cos, const float *sin, int n);
    void (*rope_halves)(float *x, const float *cos, const float *sin, int n);

    /* y[c] = bias[c] (NULL: 0), then y[c] = fma(weight[i][c], rows[i][c], y[c]) for i = 0 .. k - 1. y may be
     * one of the rows. weight: k rows, `stride` floats apart, each readable up to n rounded up to 16. */
    void (*conv)(float *y, const float *const *rows, const float *weight, size_t stride, const float *bias,
                 int k, int n);
    void (*recur)(const struct recur_job *job);

    float (*largest)(const float *x, int n);
    uint64_t (*reaching)(const float *x, int n, float least);           /* bit i: x[i] >= least; n <= 64 */
    float (*sum_exp)(const float *x, float max, int n);                 /* sum of e^(x - max) */
};

/* Each fills its family: kernels/<family>_<isa>.c. */
void vec_ref(struct kernels *k), attn_ref(struct kernels *k), panel_ref(struct kernels *k);
void vec_avx2(struct kernels *k), attn_avx2(struct kernels *k), panel_avx2(struct kernels *k);
void vec_avx512(struct kernels *k), attn_avx512(struct kernels *k), panel_avx512(struct kernels *k);
void vec_neon(struct kernels *k), attn_neon(struct kernels *k);
void panel_neon(struct kernels *k), panel_i8mm(struct kernels *k);

#endif
