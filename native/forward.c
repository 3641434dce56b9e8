/* The forward pass, once, for every architecture, batch and thread: a model is a list of blocks, and each adds to the residual
 * stream x what it makes of norm(x). What attention, feed-forwards and the other kinds do is in layers/. */
#include "clock.h"
#include "pass.h"

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
    barrier(p, thread, BMC_STEP_EMBED);
}

/* A draft head's x: eh_proj [norm(embedding); norm(hidden state of the token before)]. */
static void join_hidden(const struct pass *p, int thread) {
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

static struct sink sink_of(const bmc_model *m, const struct block *b) {
    const struct buffers *buffers = m->buffers;
    return direct(b) ? (struct sink){ buffers->x, true } : (struct sink){ buffers->y[b->c.beside], false };
}

/* x += the results of the blocks up to `last` that wait for it: one, or two side by side. */
static void settle(const bmc_model *m, const struct block *last, int64_t t) {
    const struct buffers *buffers = m->buffers;
    const size_t row = (size_t)t * padded(m->c.dim);
    float *x = buffers->x + row, *sum = buffers->y[0] + row;
    for (int i = 0; i <= last->c.beside; i++) {
        const struct block *b = last - last->c.beside + i;
        float *y = buffers->y[i] + row;
        if (b->post_norm.v)
            norm_row(m, y, y, b->post_norm, b->post_norm_bias, m->c.dim);
        if (b->c.scale != 1.0f)
            m->k.scale(y, b->c.scale, m->c.dim);
        if (i)
            m->k.add(sum, y, m->c.dim);
    }
    if (last->sum_norm.v)
        norm_row(m, sum, sum, last->sum_norm, (struct vector){ 0 }, m->c.dim);
    if (last->c.others)
        altup_add(m, last->c.n_altup, sum, t);
    else
        m->k.add(x, sum, m->c.dim);
    if (last->c.sum_scale != 1.0f)
        m->k.scale(x, last->c.sum_scale, m->c.dim);
    if (last->out_norm.v)
        norm_row(m, x, x, last->out_norm, last->out_norm_bias, m->c.dim);
    if (last->out_scale.v)
        m->k.scale(x, last->out_scale.v[0], m->c.dim);
}

/* norm(x): of few tokens all, by every thread for itself, and otherwise each thread's share. What waits is added to x first, which
 * is no work to do twice. */
static struct tokens normed(const struct pass *p, const struct block *waits, struct vector weight, struct vector bias, bool keep_input, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const int dim = m->c.dim;
    const size_t stride = padded(dim);
    const bool own = p->n_tok <= FEW && !waits && !keep_input;
    struct tokens in = { b->xb, b->act, p->n_tok, 0, 0 };
    int64_t from = 0, to = p->n_tok;
    if (own) {
        in.x = b->own_xb + (size_t)thread * FEW * stride;
        in.act = b->own_act + (size_t)thread * FEW * (size_t)(dim / 32 + 1);
    } else
        share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        if (waits)
            settle(m, waits, t);
        const float *x = b->x + (size_t)t * stride;
        if (keep_input)
            memcpy(b->input + (size_t)t * stride, x, stride * sizeof *x);
        if (weight.v)
            norm_row(m, in.x + (size_t)t * stride, x, weight, bias, dim);
        else
            memcpy(in.x + (size_t)t * stride, x, (size_t)dim * sizeof *x);
        quantize(p, in, dim, (int)t, 0, dim / 32);
    }
    if (own)
        note(p, thread, BMC_STEP_NORM);
    else
        barrier(p, thread, BMC_STEP_NORM);
    return in;
}

static void move_row(struct rows rows, int to, int from) {
    memmove(rows.x + (size_t)to * rows.stride, rows.x + (size_t)from * rows.stride, rows.stride * sizeof *rows.x);
}

void keep_wanted(struct pass *p, const struct block *b, const struct rows *more, int n_more, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *buffers = m->buffers;
    const size_t stride = padded(m->c.dim);
    if (b->number != m->last_mixer || p->n_out == p->n_tok)
        return;
    for (int i = 0; thread == 0 && i < p->n_out; i++) {
        int t = p->out[i].tok;
        move_row((struct rows){ buffers->x, stride }, i, t);
        move_row((struct rows){ buffers->y[0], stride }, i, t);
        move_row((struct rows){ buffers->y[1], stride }, i, t);
        if (buffers->input)
            move_row((struct rows){ buffers->input, stride }, i, t);
        if (buffers->kept)
            move_row((struct rows){ buffers->kept, buffers->kept_stride }, i, t);
        if (m->c.per_layer_dim)
            move_row((struct rows){ buffers->per_layer, padded(m->extent[PER_LAYERS]) }, i, t);
        for (int j = 0; j < n_more; j++)
            move_row(more[j], i, t);
        p->at[i] = p->at[t];
    }
    pool_barrier(m->pool);
    if (thread == 0)
        p->n_tok = p->n_out;
    barrier(p, thread, BMC_STEP_STORE);
}

/* Of tokens whose hidden states are given, only those for which the head runs go on. */
static void keep_choosing(struct pass *p, int thread) {
    const struct rows x = { p->model->buffers->x, padded(p->model->c.dim) };
    pool_barrier(p->model->pool);
    for (int i = 0, n = 0; thread == 0 && i < p->n_out; i++)
        if (p->out[i].chooses) {
            move_row(x, n, i);
            p->at[n] = p->at[i];
            p->out[n++] = p->out[i];
        }
    if (thread == 0)
        p->n_tok = p->n_out = p->n_choosing;
    barrier(p, thread, BMC_STEP_HEAD);
}

static void run(void *arg, int thread) {
    struct pass *p = arg;
    const bmc_model *m = p->model;
    const struct block *waits = NULL;                       /* the block whose result is not in x yet */
    embed(p, thread);
    if (m->target)
        join_hidden(p, thread);
    per_layer_inputs(p, thread);
    for (const struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++) {
        const struct tokens in = normed(p, b->c.beside ? NULL : waits, b->norm, b->norm_bias, m->buffers->input && b->kind->mixes, thread);
        b->kind->run(p, b, in, sink_of(m, b), thread);
        barrier(p, thread, BMC_STEP_DOWN);
        keep_wanted(p, b, NULL, 0, thread);
        if (!p->n_tok)
            return;
        waits = direct(b) ? NULL : b;
    }
    struct tokens in = normed(p, waits, m->output_norm, m->output_norm_bias, false, thread);
    give_hidden(p, in, thread);
    if (!p->n_choosing)
        return;
    if (p->n_choosing < p->n_out) {
        keep_choosing(p, thread);
        in = normed(p, NULL, m->output_norm, m->output_norm_bias, false, thread);
    }
    head(p, in, thread);
}

/* Times begin and end with the pass: a thread that comes late or is done early has waited. */
void forward(struct pass *p) {
    struct profile *profile = &p->model->profile;
    int n_laps = profile->laps ? pool_size(p->model->pool) : 0;
    for (int i = 0; i < n_laps; i++)
        profile->laps[i].last = nanoseconds();
    pool_run(p->model->pool, run, p);
    for (int i = 0; i < n_laps; i++)
        lap(&profile->laps[i], BMC_STEP_WAIT);
    profile->n_passes += n_laps > 0;
}
