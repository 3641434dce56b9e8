/* Mamba 2 (arXiv 2405.21060): a head's state decays, takes in dt x by the key B, and is read with the query
 * C. */
#include "recurrent.h"

static const struct role roles[] = {
    { "ssm_in", IN_BLOCK(recurrent.in), MATRIX, IN, DIM, true, 0 },
    { "ssm_out", IN_BLOCK(recurrent.out), MATRIX, DIM, INNER, true, 0 },
    { "ssm_conv1d", IN_BLOCK(recurrent.conv), TRANSPOSED, CHANNELS, CONV, true, 0 },
    { "ssm_conv1d.bias", IN_BLOCK(recurrent.conv_bias), VECTOR, ONE, CHANNELS, false, 0 },
    { "ssm_dt.bias", IN_BLOCK(recurrent.dt_bias), VECTOR, ONE, HEADS, true, 0 },
    { "ssm_a", IN_BLOCK(recurrent.a), VECTOR, HEADS, ONE, true, 0 },
    { "ssm_d", IN_BLOCK(recurrent.d), VECTOR, HEADS, ONE, true, 0 },
    { "ssm_norm", IN_BLOCK(recurrent.norm), VECTOR, GROUPS, GROUP_DIM, false, 0 },
    { 0 },
};

/* d = dt x */
static void value(const bmc_model *m, const struct block *b, const struct work *w, int t, int h) {
    const size_t n = padded(b->extent[V_DIM]);
    float *d = row_of(w->row, w->stride, t) + w->d + (size_t)h * n;
    memcpy(d, row_of(w->v, w->values, t) + (size_t)h * n, n * sizeof *d);
    m->k.scale(d, decay(m, b, w, t, h), (int)n);
}

/* norm((o + D x) silu(gate)) */
static void finish(const bmc_model *m, const struct block *b, const struct work *w, int t, int g) {
    const int v_dim = (int)b->extent[V_DIM], heads = b->c.n_heads / b->c.n_groups, size = heads * v_dim;
    float *out = row_of(w->out, padded(b->c.inner_dim), t), *y = out + g * size;
    for (int h = g * heads; h < (g + 1) * heads; h++) {
        const size_t at = (size_t)h * padded(v_dim);
        memcpy(out + h * v_dim, row_of(w->o, w->values, t) + at, (size_t)v_dim * sizeof *out);
        m->k.axpy(out + h * v_dim, b->recurrent.d.v[h], row_of(w->v, w->values, t) + at, v_dim);
    }
    m->k.act[BMC_ACT_SILU](y, y, row_of(w->gate, w->gate_stride, t) + g * size, size, NULL);
    if (b->recurrent.norm.v)
        m->k.rmsnorm(y, y, b->recurrent.norm.v + g * size, NULL, size, m->c.norm_eps);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    static const struct recurrence mamba2 = { GROUPS, NULL, value, finish };
    struct work w;
    recurrent_work(p->model, b, p->buffers->work, &w);
    const struct product all = { .w = &b->recurrent.in, .in = in, .y = w.gate, .y_stride = w.stride };
    p->machine->multiply(p, &all, 1, thread);
    p->machine->end(p, thread, BMC_STEP_QKV);
    recurrent_run(p, b, &mamba2, &w, out, thread);
}

const struct kind mamba2_kind = {
    "Mamba 2", roles, recurrent_check, recurrent_measure, recurrent_need, true, NULL, recurrent_stream, run,
};
