/* Steps of per-layer inputs, LAuReL, sparse gates and AltUp. */
#include "reference_model.h"

#include <stdlib.h>

/* A pass of one thread, and the step that it takes. */
struct altup_scene {
    bmc_model m;
    struct buffers buffers;
    struct block block;
    struct pass p;
    struct tokens in, made;
    struct sink out;
    float *y;
    struct vector weight;
    struct gating gating;
};
typedef void altup_call(struct altup_scene *s, int thread);

static void set_scene(struct altup_scene *s, int dim, int n_tok, int kind, float eps) {
    *s = (struct altup_scene){ .m = new_model(dim, kind, eps, &s->buffers) };
    s->p = (struct pass){ .model = &s->m, .machine = &cpu_machine, .buffers = &s->buffers, .n_tok = n_tok };
}

struct scene_run { struct altup_scene *s; altup_call *call; };
static void run_call(void *arg, int thread) {
    const struct scene_run *r = arg;
    r->call(r->s, thread);
}

static void run_scene(struct altup_scene *s, altup_call *call) {
    struct scene_run r = { s, call };
    pool_run(s->m.pool, run_call, &r);
    pool_free(s->m.pool);
}

/* Blocks of 8 bits that a step makes, one tile of up to TILE_COLS tokens; where they go afterwards. */
static void give_blocks(const struct tokens *made, struct act_block *act, int stride, int n) {
    for (int b = 0; act && b < n / 32; b++)
        for (int t = 0; t < made->n; t++)
            act[(size_t)b * (size_t)stride + (size_t)t] = made->act[b * made->n + t];
    free(made->act);
}

static struct tokens tile(float *x, int n_tok, int n) {
    struct act_block *act = malloc((size_t)(n_tok * (n / 32 + 1)) * sizeof *act);
    return (struct tokens){ x, act, n_tok, 0, 0 };
}

static void join_call(struct altup_scene *s, int thread) { join_per_layer(&s->p, s->y, thread); }

/* The step takes its factors from the sizes of a model, as the arguments do. */
void reference_join(const struct cuda_join *a, int dim) {
    struct altup_scene s;
    set_scene(&s, dim, a->n_tok, BMC_NORM_RMS, a->eps);
    s.m.c.per_layer_dim = a->dim;
    s.m.extent[PER_LAYERS] = a->n_layers * a->dim;
    s.m.per_layer_norm = vector(a->norm, 1, a->dim);
    s.buffers.per_layer = a->inputs;
    s.y = a->projected;
    run_scene(&s, join_call);
}

static void scale_call(struct altup_scene *s, int thread) {
    scale_rows(&s->p, s->in, s->weight, s->made, thread);
}

void reference_scale_rows(const struct cuda_scale_rows *a) {
    struct altup_scene s;
    set_scene(&s, a->dim, a->n_tok, 0, 0);
    s.in = (struct tokens){ (float *)a->x, NULL, a->n_tok, 0, 0 };
    s.made = tile(a->y, a->n_tok, a->dim);
    s.weight = vector(a->by, 1, a->dim);
    run_scene(&s, scale_call);
    give_blocks(&s.made, a->act, a->act_stride, a->dim);
}

static void add_call(struct altup_scene *s, int thread) {
    add_normed_rows(&s->p, s->in, s->y, s->weight, s->out, thread);
}

void reference_add_normed(const struct cuda_add_normed *a) {
    struct altup_scene s;
    set_scene(&s, a->dim, a->n_tok, a->kind, a->eps);
    s.in = (struct tokens){ (float *)a->x, NULL, a->n_tok, 0, 0 };
    s.y = a->y;
    s.weight = vector(a->norm, 1, a->dim);
    s.out = (struct sink){ a->out, a->add };
    run_scene(&s, add_call);
}

static void gate_call(struct altup_scene *s, int thread) { gate_rows(&s->p, &s->gating, thread); }

void reference_gate(const struct cuda_thin *thin, const struct cuda_activate *a) {
    struct altup_scene s;
    set_scene(&s, a->dim, a->n_tok, 0, 0);
    s.made = tile(a->up, a->n_tok, a->dim);
    s.gating = (struct gating){ thin->gate, a->x,    a->x_stride, s.made,
                                a->dim,     a->kind, a->param,    thin->sparsity };
    run_scene(&s, gate_call);
    give_blocks(&s.made, a->act, a->act_stride, a->dim);
}

static void altup_block(struct altup_scene *s, int thread) { altup_step(&s->p, &s->block, s->out, thread); }

void reference_altup(int kind, const struct cuda_altup *a) {
    struct altup_scene s;
    const bool begins = kind == BMC_ALTUP_BEGIN, ends = kind == BMC_ALTUP_END;
    set_scene(&s, a->dim, a->n_tok, BMC_NORM_RMS, 0);
    s.block.c = (bmc_block){ .kind = kind, .n_altup = a->n };
    s.block.altup.coef = vector(a->coef, kind == BMC_ALTUP_PREDICT ? a->n * a->n : a->n, a->n);
    s.buffers.x = (float *)a->x;
    s.buffers.work = ends ? a->rows : (float *)a->scores;
    s.buffers.kept = begins ? a->rows - a->dim : a->rows;
    s.buffers.kept_stride = a->rows_stride;
    s.buffers.scratch = malloc((size_t)((a->n + 1) * a->dim) * sizeof(float));
    s.out = (struct sink){ a->out, a->add };
    run_scene(&s, altup_block);
    free(s.buffers.scratch);
}
