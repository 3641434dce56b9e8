/* LAuReL (arXiv 2411.07501, Gemma 3n): what the block reads, plus norm(R L of it), L and R of low rank. */
#include "../error.h"
#include "../machine.h"

static const struct role roles[] = {
    { "laurel_l", IN_BLOCK(laurel.l), MATRIX, HIDDEN, DIM, true, 0 },
    { "laurel_r", IN_BLOCK(laurel.r), MATRIX, DIM, HIDDEN, true, 0 },
    { "laurel_post_norm", IN_BLOCK(laurel.norm), VECTOR, ONE, DIM, true, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->hidden_dim < 1 || c->hidden_dim > 1 << 20)
        return fail(BMC_EFORMAT, "layer %d: LAuReL: expected a rank of 1 to %d, found %d", c->layer, 1 << 20,
                    c->hidden_dim);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[HIDDEN] = c->hidden_dim;
}

static struct need need(const bmc_model *m, const struct block *b) {
    return (struct need){
        .floats = padded(b->c.hidden_dim) + padded(m->c.dim), .blocks = (size_t)b->c.hidden_dim / 32 + 1,
    };
}

void add_normed_rows(struct pass *p, struct tokens in, float *y, struct vector norm, struct sink out,
                     int thread) {
    const bmc_model *m = p->model;
    const int dim = m->c.dim;
    int64_t from, to;
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        const size_t row = (size_t)t * padded(dim);
        norm_row(m, y + row, y + row, norm, (struct vector){ 0 }, dim);
        m->k.add(y + row, in.x + row, dim);
        if (out.add)
            m->k.add(out.y + row, y + row, dim);
        else
            memcpy(out.y + row, y + row, (size_t)dim * sizeof *y);
    }
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct machine *on = p->machine;
    const int rank = b->c.hidden_dim;
    const struct tokens low = { .x = p->buffers->work, .act = p->buffers->work_act, .n = in.n };
    float *y = low.x + (size_t)p->model->pass_max * padded(rank);
    const struct product l = product(&b->laurel.l, in, low.x), r = product(&b->laurel.r, low, y);
    on->multiply(p, &l, 1, thread);
    on->end(p, thread, BMC_STEP_GATE_UP);
    on->quantize(p, low, rank, thread);
    on->end(p, thread, BMC_STEP_NORM);
    on->multiply(p, &r, 1, thread);
    on->end(p, thread, BMC_STEP_DOWN);
    on->add_normed(p, in, y, b->laurel.norm, out, thread);
}

const struct kind laurel_kind = { "LAuReL", roles, check, measure, need, false, NULL, NULL, run };
