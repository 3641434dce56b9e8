/* LFM2's short convolution: out(c * conv(b * x)), with b, c and x linear in the input. It has a log, and no
 * state. */
#include "recurrent.h"

#include "../error.h"

static const struct role roles[] = {
    { "shortconv.in_proj", IN_BLOCK(recurrent.in), MATRIX, IN, DIM, true, 0 },
    { "shortconv.conv", IN_BLOCK(recurrent.conv), TRANSPOSED, CHANNELS, CONV, true, 0 },
    { "shortconv.out_proj", IN_BLOCK(recurrent.out), MATRIX, DIM, DIM, true, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->conv < 1 || c->conv > 64)
        return fail(BMC_EFORMAT, "layer %d: expected a convolution over 1 to 64 tokens, found %d", c->layer,
                    c->conv);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[CONV] = c->conv;
    e[CHANNELS] = e[DIM];
    e[IN] = 3 * e[DIM];
}

static void stream(bmc_model *m, struct block *b) {
    add_state(m, b, (struct state_size){ .row = padded(m->c.dim), .n_before = b->c.conv - 1 });
}

static struct need need(const bmc_model *m, const struct block *b) {
    const size_t dim = (size_t)m->c.dim;
    return (struct need){ .floats = padded(b->extent[IN]) + padded(m->c.dim), .blocks = dim / 32 + 1 };
}

/* A thread's channels, of all tokens: b x stands in the place of b. */
static void mix(const struct pass *p, const struct block *b, const struct work *w, struct tokens out,
                int thread) {
    const bmc_model *m = p->model;
    const int dim = m->c.dim;
    const struct run *run = p->runs;
    int64_t from, to;
    share(p, thread, (dim + 31) / 32, &from, &to);
    const int first = 32 * (int)from, n = smaller(32 * (int)to, dim) - first;
    for (int t = 0; t < p->n_tok && n > 0; t++) {
        float *row = row_of(w->row, w->stride, t) + first, *y = row_of(out.x, padded(dim), t) + first;
        run = run_of(run, t);
        m->k.mul(row, row + 2 * dim, n);
        convolve(p, b, w, run, t, first, n, y);
        m->k.mul(y, row + dim, n);
        quantize(p, out, dim, t, first / 32, (first + n) / 32);
    }
}

void short_conv(struct pass *p, const struct block *b, const struct work *w, struct tokens out, int thread) {
    mix(p, b, w, out, thread);
    barrier(p, thread, BMC_STEP_STORE);
    keep_log(p, b, w, thread);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct buffers *buffers = p->buffers;
    const struct machine *on = p->machine;
    const struct work w = { .row = buffers->work, .stride = padded(b->extent[IN]) };
    const struct tokens mixed = {
        .x = row_of(w.row, w.stride, p->model->pass_max), .act = buffers->work_act, .n = p->n_tok,
    };
    const struct product all = product(&b->recurrent.in, in, w.row);
    const struct product output = product_into(&b->recurrent.out, mixed, out);
    on->multiply(p, &all, 1, thread);
    on->end(p, thread, BMC_STEP_QKV);
    on->short_conv(p, b, &w, mixed, thread);
    on->multiply(p, &output, 1, thread);
}

const struct kind short_conv_kind = {
    "short convolution", roles, check, measure, need, true, NULL, stream, run,
};
