/* Inputs of a layer's own for each token (Gemma 3n and 4): x += norm(proj(gelu(gate x) * p)), p the layer's
 * vector of the token. Gemma 3n multiplies what the gate reads by a vector, and adds the result to the other
 * versions of x. */
#include "../error.h"
#include "../pass.h"

#include <math.h>

static const struct role roles[] = {
    { "inp_gate", IN_BLOCK(per_layer.gate), MATRIX, PER_LAYER_DIM, DIM, true, 0 },
    { "proj", IN_BLOCK(per_layer.proj), MATRIX, DIM, PER_LAYER_DIM, true, 0 },
    { "altup_correct_scale", IN_BLOCK(per_layer.scale), VECTOR, ONE, DIM, false, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    if (c->per_layer < 0 || c->per_layer >= m->c.n_layers || m->c.per_layer_dim < 1)
        return fail(BMC_EFORMAT, "layer %d: there is no vector %d of each token", c->layer, c->per_layer);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) { (void)m, (void)c, (void)e; }

static struct need need(const bmc_model *m, const struct block *b) {
    (void)b;
    const int dim = b->per_layer.scale.v ? m->c.dim : 0;
    return (struct need){
        .floats = padded(m->c.per_layer_dim) + padded(dim),
        .blocks = (size_t)(m->c.per_layer_dim + dim) / 32 + 2,
        .kept = b->c.others ? (size_t)(b->c.n_altup * m->c.dim) : 0,
    };
}

/* What the gate reads, where it is multiplied first. */
static struct tokens scaled(const struct pass *p, const struct block *b, struct tokens in, int thread) {
    const bmc_model *m = p->model;
    const size_t n = (size_t)m->pass_max, dim = (size_t)m->c.per_layer_dim;
    const struct tokens y = {
        m->buffers->work + n * padded((int64_t)dim), m->buffers->work_act + n * (dim / 32 + 1), in.n, 0, 0,
    };
    int64_t from, to;
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        const size_t row = (size_t)t * padded(m->c.dim);
        memcpy(y.x + row, in.x + row, (size_t)m->c.dim * sizeof *y.x);
        m->k.mul(y.x + row, b->per_layer.scale.v, m->c.dim);
        quantize(p, y, m->c.dim, (int)t, 0, m->c.dim / 32);
    }
    barrier(p, thread, BMC_STEP_NORM);
    return y;
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const bmc_model *m = p->model;
    const int dim = m->c.per_layer_dim;
    const struct tokens gated = { m->buffers->work, m->buffers->work_act, in.n, 0, 0 };
    const struct tokens read = b->per_layer.scale.v ? scaled(p, b, in, thread) : in;
    const struct product gate = product(&b->per_layer.gate, read, gated.x);
    int64_t from, to;
    multiply(p, &gate, 1, thread);
    barrier(p, thread, BMC_STEP_GATE_UP);
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *y = gated.x + (size_t)t * padded(dim);
        const float *own = m->buffers->per_layer + (size_t)t * padded(m->extent[PER_LAYERS])
            + (size_t)(b->c.per_layer * dim);
        m->k.act[b->c.act](y, own, y, dim, NULL);
        quantize(p, gated, dim, (int)t, 0, dim / 32);
    }
    barrier(p, thread, BMC_STEP_ACTIVATION);
    const struct product proj = product_into(&b->per_layer.proj, gated, out);
    multiply(p, &proj, 1, thread);
}

const struct kind per_layer_kind = { "per-layer input", roles, check, measure, need, false, NULL, NULL, run };

/* Each token's vectors of all layers: (its row of a table of their own, times sqrt(dim) + norm(projection of
 * its embedding)) / sqrt(2). */
void per_layer_inputs(struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const int dim = m->c.per_layer_dim, n = (int)m->extent[PER_LAYERS];
    const struct matrix *table = &m->per_layer_embd;
    const struct tokens in = { m->buffers->x, m->buffers->act, p->n_tok, 0, 0 };
    int64_t from, to;
    if (!dim)
        return;
    quantize_rows(p, in, m->c.dim, thread);
    barrier(p, thread, BMC_STEP_EMBED);
    const struct product proj = product(&m->per_layer_proj, in, m->buffers->per_layer);
    multiply(p, &proj, 1, thread);
    barrier(p, thread, BMC_STEP_EMBED);
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *own = m->buffers->per_layer + (size_t)t * padded(n), *row = scratch_of(p, thread);
        const uint8_t *data = table->data + (size_t)p->at[t].token * file_row_bytes(table);
        type_find(table->type)->dequantize(data, n, row);
        m->k.scale(own, 1.0f / sqrtf((float)m->c.dim), n);
        for (int i = 0; i < n; i += dim)
            m->k.rmsnorm(own + i, own + i, m->per_layer_norm.v, NULL, dim, m->c.norm_eps);
        m->k.axpy(own, sqrtf((float)dim), row, n);
        m->k.scale(own, (float)sqrt(0.5), n);
    }
    barrier(p, thread, BMC_STEP_EMBED);
}
