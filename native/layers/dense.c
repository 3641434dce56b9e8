/* The feed-forward: down(act(gate x) * up x), arXiv 2002.05202, or down(act(up x)). */
#include "../error.h"
#include "../machine.h"

static const struct role roles[] = {
    { "ffn_gate", IN_BLOCK(dense.gate), MATRIX, HIDDEN, DIM, false, 0 },
    { "ffn_up", IN_BLOCK(dense.up), MATRIX, HIDDEN, DIM, true, 0 },
    { "ffn_down", IN_BLOCK(dense.down), MATRIX, DIM, HIDDEN, true, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->hidden_dim < 1 || c->hidden_dim > 1 << 22 || c->act < 0 || c->act >= BMC_ACTS)
        return fail(BMC_EFORMAT, "layer %d: feed-forward: expected 1 to %d values, found %d", c->layer, 1 << 22, c->hidden_dim);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[HIDDEN] = c->hidden_dim;
}

static struct need need(const bmc_model *m, const struct block *b) {
    (void)m;
    return (struct need){ .floats = 2 * padded(b->c.hidden_dim), .blocks = (size_t)b->c.hidden_dim / 32 + 1 };
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct dense *d = &b->dense;
    const struct machine *on = p->machine;
    const struct buffers *buffers = p->buffers;
    float *gate_out = buffers->work, *up = gate_out + (size_t)p->model->pass_max * padded(b->c.hidden_dim);
    const struct gate_up job = { &d->gate, &d->up, in, gate_out, { up, buffers->work_act, in.n, 0, 0 }, b->c.act, b->c.act_param };
    const struct product down = product_into(&d->down, job.hidden, out);
    on->gate_up(p, &job, thread);
    on->end(p, thread, BMC_STEP_ACTIVATION);
    on->multiply(p, &down, 1, thread);
}

const struct kind dense_kind = { "feed-forward", roles, check, measure, need, false, NULL, NULL, run };
