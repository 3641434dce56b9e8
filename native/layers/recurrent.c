#include "recurrent.h"

#include "../error.h"

#include <math.h>

enum { SLICE = 16, CONV_MAX = 64 };

static size_t key_floats(const struct block *b) { return (size_t)(b->extent[GROUPS] * b->extent[STATE]); }
static size_t value_floats(const struct block *b) { return (size_t)b->extent[HEADS] * padded(b->extent[V_DIM]); }

void recurrent_measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    const int64_t keys = (int64_t)c->n_groups * c->state_dim;
    e[CONV] = c->conv;
    e[HEADS] = c->n_heads;
    e[GROUPS] = c->n_groups;
    e[STATE] = c->state_dim;
    e[INNER] = c->inner_dim;
    e[V_DIM] = c->inner_dim / c->n_heads;
    e[GROUP_DIM] = c->inner_dim / c->n_groups;
    e[CHANNELS] = e[INNER] + 2 * keys;
    e[IN] = e[INNER] + e[CHANNELS] + e[HEADS];
}

int recurrent_check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->conv < 1 || c->conv > CONV_MAX)
        return fail(BMC_EFORMAT, "layer %d: expected a convolution over 1 to %d tokens, found %d", c->layer, CONV_MAX, c->conv);
    if (c->n_heads < 1 || c->n_heads > 4096 || c->n_groups < 1 || c->n_heads % c->n_groups)
        return fail(BMC_EFORMAT, "layer %d: %d heads cannot share %d groups of keys", c->layer, c->n_heads, c->n_groups);
    if (c->state_dim < 1 || c->state_dim > 1024 || c->inner_dim < 1 || c->inner_dim > 1 << 20 || c->inner_dim % c->n_heads)
        return fail(BMC_EFORMAT, "layer %d: %d heads cannot share %d values, with keys of %d", c->layer, c->n_heads, c->inner_dim, c->state_dim);
    return 0;
}

/* Fills in where decay, k and d are; returns the floats of a row of the log. */
static size_t log_row(const struct block *b, struct work *w) {
    w->decay = (size_t)b->extent[CHANNELS];
    w->k = padded(b->extent[CHANNELS] + b->extent[HEADS]);
    w->d = w->k + padded((int64_t)key_floats(b));
    return w->d + value_floats(b);
}

void recurrent_stream(bmc_model *m, struct block *b) {
    struct work w;
    b->stream = m->n_states++;
    m->state_sizes[b->stream] = (struct state_size){
        .floats = value_floats(b) * (size_t)b->extent[STATE], .row = log_row(b, &w), .n_before = b->c.conv - 1,
    };
}

size_t recurrent_work(const bmc_model *m, const struct block *b, struct work *w) {
    const bool delta = b->c.kind == BMC_DELTA_NET;
    const size_t n = (size_t)m->pass_max, row = log_row(b, w), inner = padded(b->extent[INNER]), lead = delta ? 0 : (size_t)b->extent[INNER];
    float *next = m->buffers ? m->buffers->work : NULL, *first = next;
    w->stride = padded((int64_t)(lead + row));
    w->gate_stride = delta ? inner : w->stride;
    const struct { float **place; size_t size; } parts[] = {
        { &w->row, w->stride }, { &w->q, padded((int64_t)key_floats(b)) }, { &w->v, value_floats(b) }, { &w->o, value_floats(b) },
        { &w->out, inner }, { &w->beta, delta ? padded(b->extent[HEADS]) : 0 }, { &w->gate, delta ? inner : 0 },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = next;
        next += n * parts[i].size;
    }
    if (!delta)
        w->gate = w->row;
    w->row += lead;
    return (size_t)(next - first) / n;
}

struct need recurrent_need(const bmc_model *m, const struct block *b) {
    struct work w;
    return (struct need){ .floats = recurrent_work(m, b, &w), .blocks = (size_t)b->extent[INNER] / 32 + 1 };
}

void convolve(const struct pass *p, const struct block *b, const struct work *w, const struct run *run, int t, int from, int n, float *y) {
    const struct recurrent *r = &b->recurrent;
    const int k = b->c.conv, pos = p->at[t].pos;
    const float *rows[CONV_MAX];
    for (int i = 0; i < k; i++) {
        const int back = k - 1 - i;
        rows[i] = pos - back >= run->states.start ? w->row + (size_t)(t - back) * w->stride : state_row(&run->session->states, b->stream, pos - back);
        rows[i] += from;
    }
    p->model->k.conv(y, rows, r->conv.v + from, padded(b->extent[CHANNELS]), r->conv_bias.v ? r->conv_bias.v + from : NULL, k, n);
}

static void convolve_silu(const struct pass *p, const struct block *b, const struct work *w, const struct run *run, int t, int from, int n, float *y) {
    convolve(p, b, w, run, t, from, n, y);
    p->model->k.act[BMC_ACT_SILU](y, NULL, y, n, NULL);
}

float decay(const bmc_model *m, const struct block *b, const struct work *w, int t, int h) {
    float *x = w->row + (size_t)t * w->stride + w->decay + h, dt = *x + b->recurrent.dt_bias.v[h];
    m->k.act[BMC_ACT_SOFTPLUS](&dt, NULL, &dt, 1, NULL);
    *x = (float)exp((double)(b->recurrent.a.v[h] * dt));
    return dt;
}

/* Shared out by (token, part): a group's keys or queries, or a head's values. */
static void prepare(const struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w, int thread) {
    const int N = b->c.state_dim, G = b->c.n_groups, v_dim = (int)b->extent[V_DIM], parts = 2 * G + b->c.n_heads;
    const bool values_last = b->c.kind == BMC_DELTA_NET;            /* channels: q, k, v; Mamba 2: x, B, C, which are v, k, q */
    const int q_at = values_last ? 0 : b->c.inner_dim + G * N, k_at = values_last ? G * N : b->c.inner_dim, v_at = values_last ? 2 * G * N : 0;
    const struct run *run = p->runs;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * parts, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int t = (int)(i / parts), part = (int)(i % parts), g = part % G, h = part - 2 * G;
        run = run_of(run, t);
        if (h < 0) {
            const bool query = part >= G;
            float *y = (query ? w->q + (size_t)t * padded((int64_t)key_floats(b)) : w->row + (size_t)t * w->stride + w->k) + (size_t)(g * N);
            convolve_silu(p, b, w, run, t, (query ? q_at : k_at) + g * N, N, y);
            if (r->key)
                r->key(p->model, b, y, query);
        } else {
            float *y = w->v + (size_t)t * value_floats(b) + (size_t)h * padded(v_dim);
            convolve_silu(p, b, w, run, t, v_at + h * v_dim, v_dim, y);
            memset(y + v_dim, 0, (padded(v_dim) - (size_t)v_dim) * sizeof *y);
            r->value(p->model, b, w, t, h);
        }
    }
}

/* The tokens [from, to) of the text: those before the run stand in the log, the others in the pass. */
static void advance(const struct walk *w, float *s, int from, int to) {
    const int start = w->run->start;
    const size_t stride = w->states->sizes[w->stream].row;
    while (from < to && from < start) {
        float *row = state_row(w->states, w->stream, from);
        const struct recur_job job = {
            .s = s, .n_keys = w->job.n_keys, .n_tok = state_rows(w->states, w->stream, from, smaller(to, start) - from),
            .decay = row + w->decay, .k = row + w->k, .d = row + w->d, .decay_stride = stride, .k_stride = stride, .d_stride = stride,
        };
        w->kernels->recur(&job);
        from += job.n_tok;
    }
    if (from >= to)
        return;
    const size_t i = (size_t)(from - start);
    struct recur_job job = w->job;
    job.s = s;
    job.n_tok = to - from;
    job.decay += i * job.decay_stride;
    job.k += i * job.k_stride;
    job.q += i * job.q_stride;
    job.d += i * job.d_stride;
    job.o += i * job.o_stride;
    if (job.v) {
        job.v += i * job.v_stride;
        job.beta += i * job.beta_stride;
    }
    w->kernels->recur(&job);
}

void walk_slice(const struct walk *w) {
    const struct state_run *run = w->run;
    const size_t floats = (size_t)w->job.n_keys * SLICE;
    float *s = state_current(w->states, w->stream) + w->slice * floats, *anchor = state_anchor(w->states, w->stream) + w->slice * floats;
    int from = run->replay ? run->base : run->start;
    if (run->replay)
        memcpy(s, anchor, floats * sizeof *s);
    if (run->next_base > run->base && run->next_base < from)
        advance(w, anchor, run->base, run->next_base);
    else if (run->next_base > run->base) {
        advance(w, s, from, run->next_base);
        memcpy(anchor, s, floats * sizeof *s);
        from = run->next_base;
    }
    advance(w, s, from, run->start + run->n);
}

/* The slice `unit` of a run, heads one after the other. */
static struct walk walk_of(const struct pass *p, const struct block *b, const struct work *w, const struct run *run, int unit) {
    const size_t v_dim = padded(b->extent[V_DIM]), values = value_floats(b), t = (size_t)run->first, keys = padded((int64_t)key_floats(b));
    const int h = unit / (int)(v_dim / SLICE), G = b->c.n_groups, g = b->c.interleaved ? h % G : h / (b->c.n_heads / G);
    const size_t key = (size_t)(g * b->c.state_dim), value = (size_t)unit * SLICE;
    float *row = w->row + t * w->stride;
    struct walk walk = {
        .kernels = &p->model->k, .states = &run->session->states, .run = &run->states, .stream = b->stream, .slice = (size_t)unit,
        .decay = w->decay + (size_t)h, .k = w->k + key, .d = w->d + value,
        .job = {
            .n_keys = b->c.state_dim, .decay = row + w->decay + h, .k = row + w->k + key, .q = w->q + t * keys + key, .d = row + w->d + value,
            .o = w->o + t * values + value, .decay_stride = w->stride, .k_stride = w->stride, .d_stride = w->stride, .q_stride = keys, .o_stride = values,
        },
    };
    if (b->c.kind == BMC_DELTA_NET) {
        walk.job.v = w->v + t * values + value;
        walk.job.v_stride = values;
        walk.job.beta = w->beta + t * padded(b->c.n_heads) + h;
        walk.job.beta_stride = padded(b->c.n_heads);
    }
    return walk;
}

static void walk_all(const struct pass *p, const struct block *b, const struct work *w, int thread) {
    const int units = (int)(value_floats(b) / SLICE);
    int64_t from, to;
    while (pool_take(p->model->pool, thread, (int64_t)p->n_runs * units, &from, &to))
        for (; from < to; from++) {
            const struct walk walk = walk_of(p, b, w, p->runs + from / units, (int)(from % units));
            walk_slice(&walk);
        }
}

/* Pieces of whole blocks of 32 values, where there are such. */
static void finish(const struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w, struct tokens out, int thread) {
    const int inner = b->c.inner_dim, pieces = (int)b->extent[r->pieces], size = inner / pieces, each = size % 32 ? pieces : 1, n = pieces / each;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * n, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int t = (int)(i / n), first = (int)(i % n) * each;
        for (int piece = first; piece < first + each; piece++)
            r->finish(p->model, b, w, t, piece);
        quantize(p, out, inner, t, first * size / 32, (first + each) * size / 32);
    }
}

void keep_log(const struct pass *p, const struct block *b, const struct work *w, int thread) {
    const int columns = (int)(p->model->state_sizes[b->stream].row / SLICE);
    int64_t from, to;
    share(p, thread, (int64_t)p->n_runs * columns, &from, &to);
    for (int i = 0; i < p->n_runs; i++) {
        const struct run *run = &p->runs[i];
        const struct states *states = &run->session->states;
        const int64_t first = from - (int64_t)i * columns, begin = first > 0 ? first : 0, end = smaller((int)(to - (int64_t)i * columns), columns);
        for (int pos = state_first_kept(states, b->stream, &run->states); begin < end && pos < run->states.start + run->states.n; pos++)
            memcpy(state_row(states, b->stream, pos) + begin * SLICE,
                   w->row + (size_t)(run->first + pos - run->states.start) * w->stride + begin * SLICE, (size_t)(end - begin) * SLICE * sizeof(float));
    }
}

void recurrent_run(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w, struct sink out, int thread) {
    const struct tokens made = { .x = w->out, .act = p->model->buffers->work_act, .n = p->n_tok };
    prepare(p, b, r, w, thread);
    barrier(p, thread, BMC_STEP_STORE);
    walk_all(p, b, w, thread);
    barrier(p, thread, BMC_STEP_STATES);
    finish(p, b, r, w, made, thread);
    keep_log(p, b, w, thread);
    barrier(p, thread, BMC_STEP_ACTIVATION);
    const struct product product = product_into(&b->recurrent.out, made, out);
    multiply(p, &product, 1, thread);
}
