/* Blocks with a state, run without matrices: products that a model does not have are left out. */
#include "../../native/layers/recurrent.h"
#include "reference_model.h"

#include <stdlib.h>

enum { RUNS = 4 };
struct recurrent_scene {
    bmc_model m;
    struct buffers buffers;
    struct state_size size;
    struct block block;
    bmc_session sessions[RUNS];
    struct run runs[RUNS];
    struct place at[PASS_MAX];
    struct pass p;
};

static const struct kind *kind_of(const struct cuda_recur *a) {
    return a->dim ? &short_conv_kind : a->delta ? &delta_net_kind : &mamba2_kind;
}

static void set_scene(struct recurrent_scene *s, const struct cuda_recur *a, int pass_max, float *work) {
    memset(s, 0, sizeof *s);
    s->m = new_model(a->dim, BMC_NORM_RMS, a->eps, &s->buffers);
    s->m.pass_max = pass_max;
    s->m.state_sizes[HERE] = &s->size;
    s->buffers.work = work;
    s->block.c = (bmc_block){ .kind = a->dim     ? BMC_SHORT_CONV
                                      : a->delta ? BMC_DELTA_NET
                                                 : BMC_MAMBA2,
                              .conv = a->conv,
                              .state_dim = a->state_dim,
                              .n_groups = a->n_groups,
                              .n_heads = a->n_heads,
                              .interleaved = a->interleaved,
                              .inner_dim = a->n_heads * a->v_dim };
    s->block.extent[DIM] = a->dim;
    kind_of(a)->measure(&s->m, &s->block.c, s->block.extent);
    kind_of(a)->stream(&s->m, &s->block);
    states_measure(&s->size, 1);
}

size_t reference_recur_layout(struct cuda_recur *a, int pass_max, float *work, size_t *state_floats) {
    static struct recurrent_scene s;
    struct work w = { .row = work, .stride = padded(3 * (int64_t)a->dim) };
    size_t floats = w.stride + padded(a->dim);
    set_scene(&s, a, pass_max, work);
    w.out = work ? row_of(work, w.stride, pass_max) : NULL;
    if (!a->dim)
        floats = recurrent_work(&s.m, &s.block, work, &w);
    a->state_at = s.size.at, a->state_floats = s.size.floats, a->state_row = s.size.row,
    a->n_before = s.size.n_before;
    a->row = w.row, a->stride = w.stride, a->decay = w.decay, a->k = w.k, a->d = w.d, a->q = w.q, a->v = w.v,
    a->o = w.o;
    a->keys = w.keys, a->values = w.values, a->beta = w.beta, a->gate = w.gate, a->out = w.out;
    a->beta_stride = w.beta_stride, a->gate_stride = w.gate_stride,
    a->out_stride = padded(a->dim ? a->dim : s.block.c.inner_dim);
    a->weight_stride = padded(s.block.extent[CHANNELS]);
    *state_floats = states_measure(&s.size, 1);
    pool_free(s.m.pool);
    return floats * (size_t)pass_max;
}

struct recur_call { struct recurrent_scene *s; const struct kind *kind; };
static void recur_call(void *arg, int thread) {
    const struct recur_call *c = arg;
    c->kind->run(&c->s->p, &c->s->block, (struct tokens){ 0 }, (struct sink){ 0 }, thread);
}

void reference_recur(const struct cuda_recur *a, int pass_max, float *work) {
    static struct recurrent_scene s;
    set_scene(&s, a, pass_max, work);
    struct recurrent *r = &s.block.recurrent;
    r->conv = (struct vector){ a->weight, a->conv, (int)a->weight_stride };
    r->conv_bias.v = a->conv_bias, r->dt_bias.v = a->dt_bias, r->a.v = a->decay_rate, r->d.v = a->skip,
    r->norm.v = a->norm;
    s.buffers.work_act = malloc((size_t)a->n_tok * (a->out_stride / 32 + 1) * sizeof(struct act_block));
    for (int i = 0; i < a->n_runs; i++) {
        const struct cuda_run *run = &a->runs[i];
        s.sessions[i].states[HERE] = (struct states){ .sizes = &s.size, .n = 1, .memory = run->memory };
        s.runs[i] = (struct run){ .session = &s.sessions[i], .first = run->first };
        s.runs[i].states[HERE] =
            (struct state_run){ run->start, run->n, run->base, run->next_base, run->replay };
    }
    for (int t = 0; t < a->n_tok; t++)
        s.at[t] = (struct place){ .session = &s.sessions[a->run[t]], .pos = a->at[t].pos };
    s.p = (struct pass){ .model = &s.m, .machine = &cpu_machine, .buffers = &s.buffers, .n_tok = a->n_tok,
                           .at = s.at, .runs = s.runs, .n_runs = a->n_runs };
    struct recur_call call = { &s, kind_of(a) };
    pool_run(s.m.pool, recur_call, &call);
    pool_free(s.m.pool);
    free(s.buffers.work_act);
}
