/* The forward pass, once, for every architecture, batch and thread: a model is a list of blocks, and each
 * adds to the residual stream x what it makes of norm(x). What attention, feed-forwards and the other
 * kinds do is in layers/. */
#include "clock.h"
#include "cuda/cuda.h"
#include "machine.h"

#include <math.h>

/* One row of a matrix of the file. */
static void read_row(const struct matrix *w, int64_t row, float *out) {
    type_find(w->type)->dequantize(w->data + (size_t)row * file_row_bytes(w), w->n_cols, out);
}

/* Cosines and sines of a token's position. */
static void turns(const struct pass *p, int64_t t) {
    const bmc_model *m = p->model;
    for (int table = 0; table < m->c.n_ropes; table++) {
        const bmc_rope_table *rope = &m->c.ropes[table];
        size_t at = ((size_t)table * (size_t)m->pass_max + (size_t)t) * (size_t)m->buffers->turns;
        for (int i = 0; i < rope->dim / 2; i++) {
            double angle = (double)p->at[t].pos * (double)rope->freq[i];
            m->buffers->cos[at + (size_t)i] = (float)cos(angle) * rope->mscale;
            m->buffers->sin[at + (size_t)i] = (float)sin(angle) * rope->mscale;
        }
    }
}

/* x = embedding(token) (+ embedding(position) + embedding(type 0)), normed where the model does that. */
static void embed(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *x = b->x + (size_t)t * padded(m->c.dim), *row = b->xb + (size_t)t * padded(m->c.dim);
        read_row(&m->token_embd, p->at[t].token, x);
        if (m->c.embedding_scale != 1.0f)
            m->k.scale(x, m->c.embedding_scale, m->c.dim);
        if (m->token_types.data) {
            read_row(&m->token_types, 0, row);
            m->k.add(x, row, m->c.dim);
        }
        if (m->position_embd.data) {
            read_row(&m->position_embd, p->at[t].pos, row);
            m->k.add(x, row, m->c.dim);
        }
        if (m->embd_norm.v)
            norm_row(m, x, x, m->embd_norm, m->embd_norm_bias, m->c.dim);
        turns(p, t);
    }
    per_layer_rows(p, thread);
    barrier(p, thread, BMC_STEP_EMBED);
}

/* A draft head's x: eh_proj [norm(embedding); norm(hidden state of the token before)]. */
static void join_hidden(struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const int dim = m->c.dim;
    const struct tokens joined = { .x = b->work, .act = b->work_act, .n = p->n_tok };
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *row = joined.x + (size_t)t * padded(2 * dim);
        norm_row(m, row, b->x + (size_t)t * padded(dim), m->enorm, (struct vector){ 0 }, dim);
        norm_row(m, row + dim, p->at[t].before, m->hnorm, (struct vector){ 0 }, dim);
        quantize(p, joined, 2 * dim, (int)t, 0, 2 * dim / 32);
    }
    barrier(p, thread, BMC_STEP_EMBED);
    const struct product r = product(&m->eh_proj, joined, b->x);
    multiply(p, &r, 1, thread);
    barrier(p, thread, BMC_STEP_EMBED);
}

/* Where a block's result goes: to x, if it is added to it as it is, or to a row of its own. */
static bool direct(const struct block *b) {
    const bool alone = !b->c.beside && !(b + 1)->c.beside && !b->c.others;
    const bool scaled = b->c.scale != 1.0f || b->c.sum_scale != 1.0f || b->out_scale.v;
    return alone && !scaled && !b->post_norm.v && !b->out_norm.v;
}

static struct sink sink_of(const struct pass *p, const struct block *b) {
    const struct buffers *buffers = p->buffers;
    return direct(b) ? (struct sink){ buffers->x, true } : (struct sink){ buffers->y[b->c.beside], false };
}

void pass_kept(struct pass *p) {
    for (int i = 0; i < p->n_out; i++) {
        p->at[i] = p->at[p->out[i].tok];
        p->out[i].tok = i;
    }
    p->n_tok = p->n_out;
}

void keep_wanted(struct pass *p, const struct block *b, const struct rows own[2], int thread) {
    const bmc_model *m = p->model;
    const struct buffers *buffers = p->buffers;
    const size_t dim = padded(m->c.dim);
    const struct rows rows[] = {
        { buffers->x, dim }, { buffers->y[0], dim }, { buffers->y[1], dim },
        { buffers->input, buffers->input ? dim : 0 },
        { buffers->kept, buffers->kept_stride },
        { buffers->per_layer, padded(m->extent[PER_LAYERS]) },
        own[0], own[1],
    };
    if (b->number != m->last_mixer)
        return;
    if (thread == 0)
        p->chunk = false;               /* what follows is the same whether all tokens are wanted or a few */
    if (p->n_out < p->n_tok)
        p->machine->keep(p, rows, sizeof rows / sizeof *rows, thread);
}

/* Of tokens whose hidden states are given, only those for which the head runs go on. */
static void keep_choosing(struct pass *p, int thread) {
    const struct rows x = { p->buffers->x, padded(p->model->c.dim) };
    p->machine->end(p, thread, BMC_STEP_HEAD);
    for (int i = 0, n = 0; thread == 0 && i < p->n_out; i++)
        if (p->out[i].chooses)
            p->out[n++] = p->out[i];
    if (thread == 0)
        p->n_out = p->n_choosing;
    p->machine->keep(p, &x, 1, thread);
}

/* Blocks [from, to); returns the one whose result is not in x yet, or NULL. */
static const struct block *run_blocks(struct pass *p, const struct block *from, const struct block *to,
                                      int thread) {
    static const struct rows none[2];
    const struct machine *on = p->machine;
    const struct block *waits = NULL;
    for (const struct block *b = from; b < to; b++) {
        const struct tokens in = on->norm(p, b->c.beside ? NULL : waits, b->norm, b->norm_bias,
                                          p->buffers->input && b->kind->mixes, thread);
        b->kind->run(p, b, in, sink_of(p, b), thread);
        on->end(p, thread, BMC_STEP_DOWN);
        keep_wanted(p, b, none, thread);
        if (!p->n_tok)
            return NULL;
        waits = direct(b) ? NULL : b;
    }
    return waits;
}

/* What comes after the blocks. */
static void run_head(struct pass *p, const struct block *waits, int thread) {
    const bmc_model *m = p->model;
    struct tokens in = p->machine->norm(p, waits, m->output_norm, m->output_norm_bias, false, thread);
    p->machine->give(p, in, thread);
    if (!p->n_choosing)
        return;
    if (p->n_choosing < p->n_out) {
        keep_choosing(p, thread);
        in = p->machine->norm(p, NULL, m->output_norm, m->output_norm_bias, false, thread);
    }
    p->machine->head(p, in, thread);
}

static void run(void *arg, int thread) {
    struct pass *p = arg;
    const bmc_model *m = p->model;
    embed(p, thread);
    if (m->target)
        join_hidden(p, thread);
    if (!m->cuda || m->cuda->first)
        per_layer_inputs(p, thread);
    const int n_here = m->cuda ? m->cuda->first : m->c.n_blocks;
    const struct block *waits = run_blocks(p, m->blocks, m->blocks + n_here, thread);
    if (!p->n_tok)
        return;
    if (m->cuda) {
        if (waits)
            settle_rows(p, waits, thread);
        return;
    }
    run_head(p, waits, thread);
    if (p->n_choosing)
        choose_ids(p, thread);
}

static void choose(void *pass, int thread) { choose_ids(pass, thread); }

/* What passed since the last lap of each thread was spent on a step. */
static void lap_all(const struct pass *p, enum bmc_step step) {
    struct laps *laps = p->model->profile.laps;
    for (int i = 0; laps && i < pool_size(p->model->pool); i++)
        lap(&laps[i], step);
}

/* The blocks that are on a GPU and the head; ids are chosen here. */
static int run_on_gpu(struct pass *p) {
    const bmc_model *m = p->model;
    if (!m->cuda || !p->n_tok)
        return 0;
    lap_all(p, BMC_STEP_WAIT);
    cuda_begin(p);
    if (!m->cuda->first)
        per_layer_inputs(p, 0);
    const struct block *waits = run_blocks(p, m->blocks + m->cuda->first, m->blocks + m->c.n_blocks, 0);
    if (p->n_tok)
        run_head(p, waits, 0);
    const int status = cuda_end(p);
    lap_all(p, BMC_STEP_GPU);
    if (!status && p->n_tok && p->n_choosing)
        pool_run(m->pool, choose, p);
    return status;
}

/* Times begin and end with the pass: a thread that comes late or is done early has waited. */
int forward(struct pass *p) {
    struct profile *profile = &p->model->profile;
    int n_laps = profile->laps ? pool_size(p->model->pool) : 0;
    for (int i = 0; i < n_laps; i++)
        profile->laps[i].last = nanoseconds();
    p->machine = p->model->stage ? cuda_stage_begin(p) : &cpu_machine;
    p->buffers = p->model->buffers;
    pool_run(p->model->pool, run, p);
    int status = p->model->stage ? cuda_stage_end(p) : 0;
    if (!status)
        status = run_on_gpu(p);
    lap_all(p, BMC_STEP_WAIT);
    profile->n_passes += n_laps > 0;
    return status;
}
