/* The gated delta net (arXiv 2412.06464): a head's state S maps keys to values. A token makes it decay * S,
 * corrects by beta what that says of its key, and reads it with its query. */
#include "recurrent.h"

#include <math.h>

static const struct role roles[] = {
    { "attn_qkv", IN_BLOCK(recurrent.qkv), MATRIX, CHANNELS, DIM, true, 0 },
    { "attn_gate", IN_BLOCK(recurrent.gate), MATRIX, INNER, DIM, true, 0 },
    { "ssm_alpha", IN_BLOCK(recurrent.alpha), MATRIX, HEADS, DIM, true, 0 },
    { "ssm_beta", IN_BLOCK(recurrent.beta), MATRIX, HEADS, DIM, true, 0 },
    { "ssm_out", IN_BLOCK(recurrent.out), MATRIX, DIM, INNER, true, 0 },
    { "ssm_conv1d", IN_BLOCK(recurrent.conv), TRANSPOSED, CHANNELS, CONV, true, 0 },
    { "ssm_conv1d.bias", IN_BLOCK(recurrent.conv_bias), VECTOR, ONE, CHANNELS, false, 0 },
    { "ssm_dt.bias", IN_BLOCK(recurrent.dt_bias), VECTOR, ONE, HEADS, true, 0 },
    { "ssm_a", IN_BLOCK(recurrent.a), VECTOR, ONE, HEADS, true, 0 },
    { "ssm_norm", IN_BLOCK(recurrent.norm), VECTOR, ONE, V_DIM, true, 0 },
    { 0 },
};

/* x / sqrt(sum x^2 + eps), of queries / sqrt(n) too. */
static void key(const bmc_model *m, const struct block *b, float *x, bool query) {
    const int n = b->c.state_dim;
    m->k.rmsnorm(x, x, NULL, NULL, n, m->c.norm_eps / (float)n);
    m->k.scale(x, query ? 1.0f / (float)n : 1.0f / sqrtf((float)n), n);
}

static void value(const bmc_model *m, const struct block *b, const struct work *w, int t, int h) {
    float *beta = row_of(w->beta, w->beta_stride, t) + h;
    m->k.act[BMC_ACT_SIGMOID](beta, NULL, beta, 1, NULL);
    decay(m, b, w, t, h);
}

/* norm(o) silu(gate) */
static void finish(const bmc_model *m, const struct block *b, const struct work *w, int t, int h) {
    const int v_dim = (int)b->extent[V_DIM];
    const float *o = row_of(w->o, w->values, t) + (size_t)h * padded(v_dim);
    float *y = row_of(w->out, padded(b->c.inner_dim), t) + h * v_dim;
    m->k.rmsnorm(y, o, b->recurrent.norm.v, NULL, v_dim, m->c.norm_eps);
    m->k.act[BMC_ACT_SILU](y, y, row_of(w->gate, w->gate_stride, t) + h * v_dim, v_dim, NULL);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    static const struct recurrence delta = { HEADS, key, value, finish };
    const struct recurrent *r = &b->recurrent;
    struct work w;
    recurrent_work(p->model, b, p->buffers->work, &w);
    const struct product list[] = {
        { .w = &r->qkv, .in = in, .y = w.row, .y_stride = w.stride },
        { .w = &r->alpha, .in = in, .y = w.row + w.decay, .y_stride = w.stride },
        product(&r->gate, in, w.gate), product(&r->beta, in, w.beta),
    };
    p->machine->multiply(p, list, 4, thread);
    p->machine->end(p, thread, BMC_STEP_QKV);
    recurrent_run(p, b, &delta, &w, out, thread);
}

const struct kind delta_net_kind = {
    "delta net", roles, recurrent_check, recurrent_measure, recurrent_need, true, NULL, recurrent_stream, run,
};
