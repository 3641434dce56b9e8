/* AltUp (arXiv 2301.13310, Gemma 3n): a token has n_altup versions of x. The blocks of a layer work on the
 * first, which is x; before them all versions are predicted from all, and after them each is corrected by
 * what the prediction of x missed.
 *
 * buffers->kept has a row of n_altup vectors for each token: what was predicted for x, and the other
 * versions. dim is a multiple of 32, so that a version begins with a whole block. */
#include "../error.h"
#include "../pass.h"

#include <math.h>

enum { MOST = 8 };

static const float LEAST_SQUARE = 1e-5f;            /* mean square of a vector whose length is divided by */

static const struct role begin_roles[] = {
    { "altup_proj", IN_BLOCK(altup.proj), MATRICES, DIM, DIM, true, OTHERS },
    { 0 },
};

static const struct role predict_roles[] = {
    { "altup_router", IN_BLOCK(altup.router), MATRIX, VERSIONS, DIM, true, 0 },
    { "altup_predict_coef", IN_BLOCK(altup.coef), VECTOR, PAIRS, VERSIONS, true, 0 },
    { 0 },
};

static const struct role correct_roles[] = {
    { "altup_router", IN_BLOCK(altup.router), MATRIX, VERSIONS, DIM, true, 0 },
    { "altup_correct_coef", IN_BLOCK(altup.coef), VECTOR, VERSIONS, VERSIONS, true, 0 },
    { 0 },
};

static const struct role end_roles[] = {
    { "altup_unembd_proj", IN_BLOCK(altup.proj), MATRICES, DIM, DIM, true, OTHERS },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    if (c->n_altup < 2 || c->n_altup > MOST)
        return fail(BMC_EFORMAT, "layer %d: AltUp: expected 2 to %d versions of x, found %d", c->layer, MOST,
                    c->n_altup);
    if (m->c.dim % 32)
        return fail(BMC_EFORMAT, "layer %d: AltUp: expected a multiple of 32 values, found %d", c->layer,
                    m->c.dim);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[VERSIONS] = c->n_altup;
    e[OTHERS] = c->n_altup - 1;
    e[PAIRS] = c->n_altup * c->n_altup;
}

/* Of the router: its scores, and for each thread all versions and a change. */
static struct need need(const bmc_model *m, const struct block *b) {
    const size_t dim = (size_t)m->c.dim, n = (size_t)b->c.n_altup;
    return (struct need){
        .floats = larger((int)padded(b->c.n_altup), (int)((n - 1) * dim)), .blocks = n * dim / 32,
        .scratch = (n + 1) * dim, .kept = n * dim,
    };
}

static float *version(const struct pass *p, int64_t t, int i) {
    const struct buffers *b = p->model->buffers;
    return b->kept + (size_t)t * b->kept_stride + (size_t)(i * p->model->c.dim);
}

static float *x_of(const struct pass *p, int64_t t) {
    return p->model->buffers->x + (size_t)t * padded(p->model->c.dim);
}

void altup_add(const bmc_model *m, int n_altup, const float *y, int64_t t) {
    float *row = m->buffers->kept + (size_t)t * m->buffers->kept_stride;
    for (int i = 1; i < n_altup; i++)
        m->k.add(row + i * m->c.dim, y, m->c.dim);
}

/* Values [at, at + n) of a token's result. */
static void put(const struct pass *p, struct sink out, int64_t t, int at, const float *y, int n) {
    float *place = out.y + (size_t)t * padded(p->model->c.dim) + at;
    if (out.add)
        p->model->k.add(place, y, n);
    else
        memcpy(place, y, (size_t)n * sizeof *y);
}

/* The first and the last block: from x to all versions, and back. A version is as long as x. */

static float mean_square(const float *x, int n) {
    double sums[4] = { 0 };
    for (int i = 0; i < n; i += 4)
        for (int j = 0; j < 4; j++)
            sums[j] += (double)x[i + j] * (double)x[i + j];
    return (float)((sums[0] + sums[1] + sums[2] + sums[3]) / n);
}

static void to_length_of(const struct pass *p, float *y, const float *x) {
    const int dim = p->model->c.dim;
    p->model->k.scale(y, sqrtf(mean_square(x, dim) / fmaxf(mean_square(y, dim), LEAST_SQUARE)), dim);
}

static void begin(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const int others = b->c.n_altup - 1, dim = p->model->c.dim;
    struct product list[MOST];
    int64_t from, to;
    const size_t stride = p->model->buffers->kept_stride;
    for (int i = 0; i < others; i++)
        list[i] = (struct product){ &b->altup.proj.of[i], in, version(p, 0, i + 1), stride, false };
    multiply(p, list, others, thread);
    barrier(p, thread, BMC_STEP_EMBED);
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        for (int i = 1; i <= others; i++)
            to_length_of(p, version(p, t, i), x_of(p, t));
        if (!out.add)
            memset(out.y + (size_t)t * padded(dim), 0, (size_t)dim * sizeof *out.y);
    }
}

static void end(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct buffers *buffers = p->model->buffers;
    const int others = b->c.n_altup - 1, dim = p->model->c.dim, wide = (int)buffers->kept_stride;
    const size_t stride = (size_t)(others * dim);
    struct tokens all = { .x = buffers->kept, .act = buffers->work_act, .n = in.n, .wide = wide };
    struct product list[MOST];
    int64_t from, to;
    quantize_rows(p, all, wide, thread);
    barrier(p, thread, BMC_STEP_NORM);
    for (int i = 0; i < others; i++) {
        all.from = (i + 1) * dim;
        list[i] = (struct product){ &b->altup.proj.of[i], all, buffers->work + i * dim, stride, false };
    }
    multiply(p, list, others, thread);
    barrier(p, thread, BMC_STEP_HEAD);
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *sum = scratch_of(p, thread);
        memset(sum, 0, (size_t)dim * sizeof *sum);
        for (int i = 0; i < others; i++) {
            float *y = buffers->work + (size_t)t * stride + (size_t)(i * dim);
            to_length_of(p, y, x_of(p, t));
            p->model->k.add(sum, y, dim);
        }
        put(p, out, t, 0, sum, dim);
    }
}

/* Prediction and correction. */

/* The router's products with norm(x). */
static void route(struct pass *p, const struct block *b, struct tokens in, int thread) {
    const struct product scores = product(&b->altup.router, in, p->model->buffers->work);
    multiply(p, &scores, 1, thread);
    barrier(p, thread, BMC_STEP_GATE_UP);
}

/* A token's coefficients, one for each row of `coef`: their products with tanh(score / dim). */
static void coefficients(const struct pass *p, const struct block *b, int64_t t, float *c) {
    const bmc_model *m = p->model;
    const struct vector *coef = &b->altup.coef;
    const int n = b->c.n_altup;
    float router[MOST];
    memcpy(router, m->buffers->work + (size_t)t * padded(n), (size_t)n * sizeof *router);
    m->k.scale(router, 1.0f / (float)m->c.dim, n);
    m->k.softcap(router, 1.0f, n);
    for (int row = 0; row < coef->n_rows; row++) {
        c[row] = 0;
        for (int i = 0; i < n; i++)
            c[row] += coef->v[row * n + i] * router[i];
    }
}

typedef void step(const struct pass *p, const struct block *b, struct sink out, int64_t t, int at, int n,
                  float *scratch);

/* Each value is on its own: what a step does with values [at, at + n) of a token is shared out. */
static void each_part(struct pass *p, const struct block *b, struct tokens in, struct sink out, step *fn,
                      int thread) {
    const int64_t blocks = p->model->c.dim / 32;
    int64_t from, to;
    route(p, b, in, thread);
    share(p, thread, in.n * blocks, &from, &to);
    while (from < to) {
        const int64_t t = from / blocks, first = from % blocks;
        const int n = smaller((int)(blocks - first), (int)(to - from));
        fn(p, b, out, t, 32 * (int)first, 32 * n, scratch_of(p, thread));
        from += n;
    }
}

/* Version i += sum of c[i][j] times version j. */
static void predict_part(const struct pass *p, const struct block *b, struct sink out, int64_t t, int at,
                         int n, float *scratch) {
    const struct kernels *k = &p->model->k;
    const int versions = b->c.n_altup;
    float c[MOST * MOST], *change = scratch, *old = scratch + n;
    coefficients(p, b, t, c);
    memcpy(version(p, t, 0) + at, x_of(p, t) + at, (size_t)n * sizeof *old);
    for (int i = 0; i < versions; i++)
        memcpy(old + i * n, version(p, t, i) + at, (size_t)n * sizeof *old);
    for (int i = 0; i < versions; i++) {
        memset(change, 0, (size_t)n * sizeof *change);
        for (int j = 0; j < versions; j++)
            k->axpy(change, c[i * versions + j], old + j * n, n);
        k->add(version(p, t, i) + at, change, n);
        if (!i)
            put(p, out, t, at, change, n);
    }
}

/* Version i = its prediction + (1 + c[i]) (x - the prediction of x). */
static void correct_part(const struct pass *p, const struct block *b, struct sink out, int64_t t, int at,
                         int n, float *scratch) {
    const struct kernels *k = &p->model->k;
    float c[MOST], *missed = scratch, *change = scratch + n;
    coefficients(p, b, t, c);
    memcpy(missed, x_of(p, t) + at, (size_t)n * sizeof *missed);
    k->axpy(missed, -1.0f, version(p, t, 0) + at, n);
    for (int i = 1; i < b->c.n_altup; i++)
        k->axpy(version(p, t, i) + at, 1.0f + c[i], missed, n);
    memset(change, 0, (size_t)n * sizeof *change);
    k->axpy(change, c[0], missed, n);
    put(p, out, t, at, change, n);
}

static void predict(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    each_part(p, b, in, out, predict_part, thread);
}

static void correct(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    each_part(p, b, in, out, correct_part, thread);
}

#define KIND(name, roles, run) { name, roles, check, measure, need, false, NULL, NULL, run }
const struct kind altup_begin_kind = KIND("AltUp's begin", begin_roles, begin);
const struct kind altup_predict_kind = KIND("AltUp's prediction", predict_roles, predict);
const struct kind altup_correct_kind = KIND("AltUp's correction", correct_roles, correct);
const struct kind altup_end_kind = KIND("AltUp's end", end_roles, end);
