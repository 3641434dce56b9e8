/* AltUp (arXiv 2301.13310, Gemma 3n): a token has n_altup versions of x. The blocks of a layer work on the
 * first, which is x; before them all versions are predicted from all, and after them each is corrected by
 * what the prediction of x missed.
 *
 * buffers->kept has a row of n_altup vectors for each token: what was predicted for x, and the other
 * versions. dim is a multiple of 32, so that a version begins with a whole block. */
#include "../error.h"
#include "../machine.h"
#include "../sums.h"

#include <math.h>

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
    if (c->n_altup < 2 || c->n_altup > ALTUP_MAX)
        return fail(BMC_EFORMAT, "layer %d: AltUp: expected 2 to %d versions of x, found %d", c->layer,
                    ALTUP_MAX, c->n_altup);
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

static float mean_square(const float *x, int n) { return (float)(sum_squares(x, n, 0) / n); }

static void to_length_of(const struct pass *p, float *y, const float *x) {
    const int dim = p->model->c.dim;
    const float own = mean_square(y, dim);
    p->model->k.scale(y, sqrtf(mean_square(x, dim) / (own > ALTUP_LEAST ? own : ALTUP_LEAST)), dim);
}

static void begin(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const int others = b->c.n_altup - 1, dim = p->model->c.dim;
    const size_t stride = p->buffers->kept_stride;
    float *versions = p->buffers->kept + dim;
    struct product list[ALTUP_MAX];
    for (int i = 0; i < others; i++)
        list[i] = (struct product){ &b->altup.proj.of[i], in, versions + i * dim, stride, false };
    p->machine->multiply(p, list, others, thread);
    p->machine->end(p, thread, BMC_STEP_EMBED);
    p->machine->altup(p, b, out, thread);
}

static void begin_row(const struct pass *p, const struct block *b, struct sink out, int64_t t) {
    const int dim = p->model->c.dim;
    for (int i = 1; i < b->c.n_altup; i++)
        to_length_of(p, version(p, t, i), x_of(p, t));
    if (!out.add)
        memset(out.y + (size_t)t * padded(dim), 0, (size_t)dim * sizeof *out.y);
}

static void end(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct buffers *buffers = p->buffers;
    const struct machine *on = p->machine;
    const int others = b->c.n_altup - 1, dim = p->model->c.dim, wide = (int)buffers->kept_stride;
    const size_t stride = (size_t)(others * dim);
    struct tokens all = { .x = buffers->kept, .act = buffers->work_act, .n = in.n, .wide = wide };
    struct product list[ALTUP_MAX];
    on->quantize(p, all, wide, thread);
    on->end(p, thread, BMC_STEP_NORM);
    for (int i = 0; i < others; i++) {
        all.from = (i + 1) * dim;
        list[i] = (struct product){ &b->altup.proj.of[i], all, buffers->work + i * dim, stride, false };
    }
    on->multiply(p, list, others, thread);
    on->end(p, thread, BMC_STEP_HEAD);
    on->altup(p, b, out, thread);
}

static void end_row(const struct pass *p, const struct block *b, struct sink out, int64_t t, float *sum) {
    const int others = b->c.n_altup - 1, dim = p->model->c.dim;
    memset(sum, 0, (size_t)dim * sizeof *sum);
    for (int i = 0; i < others; i++) {
        float *y = p->model->buffers->work + (size_t)t * (size_t)(others * dim) + (size_t)(i * dim);
        to_length_of(p, y, x_of(p, t));
        p->model->k.add(sum, y, dim);
    }
    put(p, out, t, 0, sum, dim);
}

static void each_row(const struct pass *p, const struct block *b, struct sink out, int thread) {
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++)
        if (b->c.kind == BMC_ALTUP_BEGIN)
            begin_row(p, b, out, t);
        else
            end_row(p, b, out, t, scratch_of(p, thread));
}

/* Prediction and correction. */

/* The router's products with norm(x) first. */
static void route(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct product scores = product(&b->altup.router, in, p->buffers->work);
    p->machine->multiply(p, &scores, 1, thread);
    p->machine->end(p, thread, BMC_STEP_GATE_UP);
    p->machine->altup(p, b, out, thread);
}

/* A token's coefficients, one for each row of `coef`: their products with tanh(score / dim). */
static void coefficients(const struct pass *p, const struct block *b, int64_t t, float *c) {
    const bmc_model *m = p->model;
    const struct vector *coef = &b->altup.coef;
    const int n = b->c.n_altup;
    float router[ALTUP_MAX];
    memcpy(router, m->buffers->work + (size_t)t * padded(n), (size_t)n * sizeof *router);
    m->k.scale(router, 1.0f / (float)m->c.dim, n);
    m->k.softcap(router, 1.0f, n);
    for (int row = 0; row < coef->n_rows; row++) {
        c[row] = 0;
        for (int i = 0; i < n; i++)
            c[row] += coef->v[row * n + i] * router[i];
    }
}

/* Version i += sum of c[i][j] times version j. */
static void predict_part(const struct pass *p, const struct block *b, struct sink out, int64_t t, int at,
                         int n, float *scratch) {
    const struct kernels *k = &p->model->k;
    const int versions = b->c.n_altup;
    float c[ALTUP_MAX * ALTUP_MAX], *change = scratch, *old = scratch + n;
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
    float c[ALTUP_MAX], *missed = scratch, *change = scratch + n;
    coefficients(p, b, t, c);
    memcpy(missed, x_of(p, t) + at, (size_t)n * sizeof *missed);
    k->axpy(missed, -1.0f, version(p, t, 0) + at, n);
    for (int i = 1; i < b->c.n_altup; i++)
        k->axpy(version(p, t, i) + at, 1.0f + c[i], missed, n);
    memset(change, 0, (size_t)n * sizeof *change);
    k->axpy(change, c[0], missed, n);
    put(p, out, t, at, change, n);
}

/* Each value is on its own: what is done with values [at, at + n) of a token is shared out. */
static void each_part(const struct pass *p, const struct block *b, struct sink out, int thread) {
    const int64_t blocks = p->model->c.dim / 32;
    int64_t from, to;
    share(p, thread, p->n_tok * blocks, &from, &to);
    while (from < to) {
        const int64_t t = from / blocks, first = from % blocks;
        const int n = smaller((int)(blocks - first), (int)(to - from));
        (b->c.kind == BMC_ALTUP_PREDICT ? predict_part : correct_part)(p, b, out, t, 32 * (int)first, 32 * n,
                                                                       scratch_of(p, thread));
        from += n;
    }
}

void altup_step(struct pass *p, const struct block *b, struct sink out, int thread) {
    const bool whole = b->c.kind == BMC_ALTUP_BEGIN || b->c.kind == BMC_ALTUP_END;
    (whole ? each_row : each_part)(p, b, out, thread);
}

#define KIND(name, roles, run) { name, roles, check, measure, need, false, NULL, NULL, run }
const struct kind altup_begin_kind = KIND("AltUp's begin", begin_roles, begin);
const struct kind altup_predict_kind = KIND("AltUp's prediction", predict_roles, route);
const struct kind altup_correct_kind = KIND("AltUp's correction", correct_roles, route);
const struct kind altup_end_kind = KIND("AltUp's end", end_roles, end);
