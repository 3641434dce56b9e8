/* The feed-forward: down(act(gate x) * up x), arXiv 2002.05202, or down(act(up x)). */
#include "../error.h"
#include "../machine.h"
#include "../sums.h"

#include <math.h>

static const struct role roles[] = {
    { "ffn_gate", IN_BLOCK(dense.gate), MATRIX, HIDDEN, DIM, false, 0 },
    { "ffn_up", IN_BLOCK(dense.up), MATRIX, HIDDEN, DIM, true, 0 },
    { "ffn_down", IN_BLOCK(dense.down), MATRIX, DIM, HIDDEN, true, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->hidden_dim < 1 || c->hidden_dim > 1 << 22)
        return fail(BMC_EFORMAT, "layer %d: feed-forward: expected 1 to %d values, found %d", c->layer,
                    1 << 22, c->hidden_dim);
    if (!(c->sparsity >= 0 && c->sparsity < 1e3f))
        return fail(BMC_EFORMAT, "layer %d: feed-forward: expected a sparsity from 0 to 1000, found %g",
                    c->layer, (double)c->sparsity);
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

static const char *missing(const struct block *b) {
    return b->c.sparsity > 0 && !b->dense.gate.data ? "ffn_gate" : NULL;
}

/* Gates lose their mean + sparsity * their standard deviation (arXiv 2506.06644), and those below it count
 * nothing. */
static void thin_out(float *gate, int n, float sparsity) {
    const double mean = sum_values(gate, n) / n;
    const double deviation = sqrt(sum_squares(gate, n, mean) / larger(n - 1, 1));
    const float least = (float)(mean + sparsity * deviation);
    for (int i = 0; i < n; i++)
        gate[i] = gate[i] > least ? gate[i] - least : 0.0f;
}

void gate_rows(struct pass *p, const struct gating *g, int thread) {
    int64_t from, to;
    share(p, thread, g->out.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *gate = g->gate + (size_t)t * padded(g->n), *out = g->out.x + (size_t)t * padded(g->n);
        if (g->sparsity > 0)
            thin_out(gate, g->n, g->sparsity);
        p->model->k.act[g->act](out, g->up + (size_t)t * g->up_stride, gate, g->n, g->param);
        quantize(p, g->out, g->n, (int)t, 0, g->n / 32);
    }
}

/* The first half where a gate depends on all others: the products first, all of them. */
static void gate_up_sparse(struct pass *p, const struct block *b, const struct gate_up *job, int thread) {
    const struct product list[] = {
        product(job->gate, job->in, job->gate_out), product(job->up, job->in, job->hidden.x),
    };
    const int n = b->c.hidden_dim;
    const struct gating gates = {
        job->gate_out, job->hidden.x, padded(n), job->hidden, n, job->act, job->param, b->c.sparsity,
    };
    p->machine->multiply(p, list, 2, thread);
    p->machine->end(p, thread, BMC_STEP_GATE_UP);
    p->machine->gate(p, &gates, thread);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct dense *d = &b->dense;
    const struct machine *on = p->machine;
    const struct buffers *buffers = p->buffers;
    float *gate_out = buffers->work, *up = gate_out + (size_t)p->model->pass_max * padded(b->c.hidden_dim);
    const struct gate_up job = {
        &d->gate, &d->up, in, gate_out, { up, buffers->work_act, in.n, 0, 0 }, b->c.act, b->c.act_param,
    };
    const struct product down = product_into(&d->down, job.hidden, out);
    if (b->c.sparsity > 0)
        gate_up_sparse(p, b, &job, thread);
    else
        on->gate_up(p, &job, thread);
    on->end(p, thread, BMC_STEP_ACTIVATION);
    on->multiply(p, &down, 1, thread);
}

const struct kind dense_kind = { "feed-forward", roles, check, measure, need, false, missing, NULL, run };
