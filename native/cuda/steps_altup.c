/* Steps of per-layer inputs, LAuReL, sparse gates and AltUp on a GPU. */
#include "cuda.h"

#include <string.h>

void cuda_gate(struct pass *p, const struct gating *g, int thread) {
    struct cuda *c = p->model->cuda;
    const struct cuda_thin thin = { g->out.n, g->n, g->gate, padded(g->n), g->sparsity };
    struct cuda_activate a = {
        .n_tok = g->out.n, .dim = g->n, .kind = g->act, .up = g->out.x, .gate = g->gate,
        .stride = padded(g->n), .gate_stride = padded(g->n), .act = g->out.act, .act_stride = g->out.n,
        .x = g->up, .x_stride = g->up_stride,
    };
    (void)thread;
    memcpy(a.param, g->param, sizeof a.param);
    if (g->sparsity > 0)
        cuda_launch(c, c->functions[CUDA_THIN_OUT], thin_grid(&thin), &thin, sizeof thin);
    cuda_launch(c, c->functions[CUDA_ACTIVATE], activate_grid(&a), &a, sizeof a);
}

void cuda_join_per_layer(struct pass *p, float *projected, int thread) {
    const bmc_model *m = p->model;
    const struct per_layer_factors by = per_layer_factors(m);
    const struct cuda_join a = {
        .n_tok = p->n_tok, .n_layers = m->c.n_layers, .dim = m->c.per_layer_dim, .projected = projected,
        .inputs = p->buffers->per_layer, .stride = padded(m->extent[PER_LAYERS]), .norm = m->per_layer_norm.v,
        .by_projected = by.projected, .by_row = by.row, .by_sum = by.sum, .eps = m->c.norm_eps,
    };
    (void)thread;
    cuda_launch(m->cuda, m->cuda->functions[CUDA_JOIN_PER_LAYER], join_grid(&a), &a, sizeof a);
}

void cuda_scale_rows(struct pass *p, struct tokens in, struct vector by, struct tokens out, int thread) {
    struct cuda *c = p->model->cuda;
    const struct cuda_scale_rows a = {
        in.n, by.n_cols, in.x, by.v, out.x, padded(by.n_cols), out.act, out.n,
    };
    (void)thread;
    cuda_launch(c, c->functions[CUDA_SCALE_ROWS], scale_rows_grid(&a), &a, sizeof a);
}

void cuda_add_normed(struct pass *p, struct tokens in, float *y, struct vector norm, struct sink out,
                     int thread) {
    const bmc_model *m = p->model;
    const struct cuda_add_normed a = {
        .n_tok = in.n, .dim = m->c.dim, .add = out.add, .x = in.x, .y = y, .out = out.y,
        .stride = padded(m->c.dim), .norm = norm.v, .kind = m->c.norm, .eps = m->c.norm_eps,
    };
    (void)thread;
    cuda_launch(m->cuda, m->cuda->functions[CUDA_ADD_NORMED], add_normed_grid(&a), &a, sizeof a);
}

void cuda_altup(struct pass *p, const struct block *b, struct sink out, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *buffers = p->buffers;
    struct cuda *c = m->cuda;
    const bool ends = b->c.kind == BMC_ALTUP_END, begins = b->c.kind == BMC_ALTUP_BEGIN;
    const struct cuda_altup a = {
        .n_tok = p->n_tok, .dim = m->c.dim, .n = b->c.n_altup, .add = out.add, .sums = ends, .x = buffers->x,
        .rows = ends ? buffers->work : buffers->kept + (begins ? m->c.dim : 0), .out = out.y,
        .stride = padded(m->c.dim),
        .rows_stride = ends ? (size_t)((b->c.n_altup - 1) * m->c.dim) : buffers->kept_stride,
        .scores = buffers->work, .coef = b->altup.coef.v, .scores_stride = padded(b->c.n_altup),
        .by = 1.0f / (float)m->c.dim,
    };
    (void)thread;
    if (begins || ends)
        cuda_launch(c, c->functions[CUDA_ALTUP_LENGTHS], altup_lengths_grid(&a), &a, sizeof a);
    else if (b->c.kind == BMC_ALTUP_PREDICT)
        cuda_launch(c, c->functions[CUDA_ALTUP_PREDICT], altup_grid(&a), &a, sizeof a);
    else
        cuda_launch(c, c->functions[CUDA_ALTUP_CORRECT], altup_grid(&a), &a, sizeof a);
}
