/* Inputs of a layer's own for each token (Gemma 3n and 4): x += norm(proj(gelu(gate x) * p)), p the layer's
 * vector of the token. Gemma 3n multiplies what the gate reads by a vector, and adds the result to the other
 * versions of x. */
#include "../error.h"
#include "../machine.h"

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
    const int dim = b->per_layer.scale.v ? m->c.dim : 0;
    return (struct need){
        .floats = padded(m->c.per_layer_dim) + padded(dim),
        .blocks = (size_t)(m->c.per_layer_dim + dim) / 32 + 2,
        .kept = b->c.others ? (size_t)(b->c.n_altup * m->c.dim) : 0,
    };
}

void scale_rows(struct pass *p, struct tokens in, struct vector by, struct tokens out, int thread) {
    const bmc_model *m = p->model;
    int64_t from, to;
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *y = out.x + (size_t)t * padded(by.n_cols);
        memcpy(y, in.x + (size_t)t * padded(by.n_cols), (size_t)by.n_cols * sizeof *y);
        m->k.mul(y, by.v, by.n_cols);
        quantize(p, out, by.n_cols, (int)t, 0, by.n_cols / 32);
    }
}

/* What the gate reads, where it is multiplied first. */
static struct tokens scaled(struct pass *p, const struct block *b, struct tokens in, int thread) {
    const size_t n = (size_t)p->model->pass_max, dim = (size_t)p->model->c.per_layer_dim;
    const struct tokens y = {
        p->buffers->work + n * padded((int64_t)dim), p->buffers->work_act + n * (dim / 32 + 1), in.n, 0, 0,
    };
    p->machine->scale_rows(p, in, b->per_layer.scale, y, thread);
    p->machine->end(p, thread, BMC_STEP_NORM);
    return y;
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const bmc_model *m = p->model;
    const struct machine *on = p->machine;
    const int dim = m->c.per_layer_dim;
    const struct tokens gated = { p->buffers->work, p->buffers->work_act, in.n, 0, 0 };
    const struct tokens read = b->per_layer.scale.v ? scaled(p, b, in, thread) : in;
    const struct product gate = product(&b->per_layer.gate, read, gated.x);
    const struct product proj = product_into(&b->per_layer.proj, gated, out);
    const struct gating gates = {
        .gate = gated.x, .up = p->buffers->per_layer + (size_t)(b->c.per_layer * dim),
        .up_stride = padded(m->extent[PER_LAYERS]), .out = gated, .n = dim, .act = b->c.act,
        .param = b->c.act_param,
    };
    on->multiply(p, &gate, 1, thread);
    on->end(p, thread, BMC_STEP_GATE_UP);
    on->gate(p, &gates, thread);
    on->end(p, thread, BMC_STEP_ACTIVATION);
    on->multiply(p, &proj, 1, thread);
}

const struct kind per_layer_kind = { "per-layer input", roles, check, measure, need, false, NULL, NULL, run };

/* Each token's vectors of all layers: (its row of a table of their own, times sqrt(dim) + norm(projection of
 * its embedding)) / sqrt(2). First the rows, as the file has them. */
void per_layer_rows(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const struct matrix *table = &m->per_layer_embd;
    int64_t from, to;
    share(p, thread, m->c.per_layer_dim ? p->n_tok : 0, &from, &to);
    for (int64_t t = from; t < to; t++) {
        const uint8_t *data = table->data + (size_t)p->at[t].token * file_row_bytes(table);
        float *row = m->buffers->per_layer + (size_t)t * padded(table->n_cols);
        type_find(table->type)->dequantize(data, table->n_cols, row);
    }
}

struct per_layer_factors per_layer_factors(const bmc_model *m) {
    return (struct per_layer_factors){
        1.0f / sqrtf((float)m->c.dim), sqrtf((float)m->c.per_layer_dim), (float)sqrt(0.5),
    };
}

void join_per_layer(struct pass *p, float *projected, int thread) {
    const bmc_model *m = p->model;
    const struct per_layer_factors by = per_layer_factors(m);
    const int dim = m->c.per_layer_dim, n = (int)m->extent[PER_LAYERS];
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *y = projected + (size_t)t * padded(n), *row = m->buffers->per_layer + (size_t)t * padded(n);
        m->k.scale(y, by.projected, n);
        for (int i = 0; i < n; i += dim)
            m->k.rmsnorm(y + i, y + i, m->per_layer_norm.v, NULL, dim, m->c.norm_eps);
        m->k.axpy(y, by.row, row, n);
        m->k.scale(y, by.sum, n);
        memcpy(row, y, (size_t)n * sizeof *y);
    }
}

void per_layer_inputs(struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const struct machine *on = p->machine;
    const struct tokens in = { p->buffers->x, p->buffers->act, p->n_tok, 0, 0 };
    const struct product proj = product(&m->per_layer_proj, in, p->buffers->work);
    if (!m->c.per_layer_dim)
        return;
    on->quantize(p, in, m->c.dim, thread);
    on->end(p, thread, BMC_STEP_EMBED);
    on->multiply(p, &proj, 1, thread);
    on->end(p, thread, BMC_STEP_EMBED);
    on->join_per_layer(p, proj.y, thread);
    on->end(p, thread, BMC_STEP_EMBED);
}
