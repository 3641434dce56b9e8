#include "recurrent.h"

#include "../error.h"
#include "../exp.h"

#include <math.h>

enum { SLICE = 16, CONV_MAX = 64 };

void recurrent_measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[CONV] = c->conv;
    e[HEADS] = c->n_heads;
    e[GROUPS] = c->n_groups;
    e[STATE] = c->state_dim;
    e[INNER] = c->inner_dim;
    e[V_DIM] = c->inner_dim / c->n_heads;
    e[GROUP_DIM] = c->inner_dim / c->n_groups;
    e[CHANNELS] = e[INNER] + 2 * (int64_t)c->n_groups * c->state_dim;
    e[IN] = e[INNER] + e[CHANNELS] + e[HEADS];
}

int recurrent_check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->conv < 1 || c->conv > CONV_MAX)
        return fail(BMC_EFORMAT, "layer %d: expected a convolution over 1 to %d tokens, found %d", c->layer,
                    CONV_MAX, c->conv);
    if (c->n_heads < 1 || c->n_heads > 4096 || c->n_groups < 1 || c->n_heads % c->n_groups)
        return fail(BMC_EFORMAT, "layer %d: %d heads cannot share %d groups of keys", c->layer, c->n_heads,
                    c->n_groups);
    if (c->inner_dim < 1 || c->inner_dim > 1 << 20 || c->inner_dim % c->n_heads)
        return fail(BMC_EFORMAT, "layer %d: %d heads cannot share %d values", c->layer, c->n_heads,
                    c->inner_dim);
    if (c->state_dim < 1 || c->state_dim > 1024)
        return fail(BMC_EFORMAT, "layer %d: expected keys of 1 to 1024 values, found %d", c->layer,
                    c->state_dim);
    return 0;
}

/* Fills in where things are in a row of the log; returns its floats. */
static size_t log_row(const struct block *b, struct work *w) {
    const int64_t *e = b->extent;
    w->keys = padded(e[GROUPS] * e[STATE]);
    w->values = (size_t)e[HEADS] * padded(e[V_DIM]);
    w->decay = (size_t)e[CHANNELS];
    w->k = padded(e[CHANNELS] + e[HEADS]);
    w->d = w->k + w->keys;
    return w->d + w->values;
}

void recurrent_stream(bmc_model *m, struct block *b) {
    struct work w;
    struct state_size size = { .row = log_row(b, &w), .n_before = b->c.conv - 1 };
    size.floats = w.values * (size_t)b->extent[STATE];
    add_state(m, b, size);
}

size_t recurrent_work(const bmc_model *m, const struct block *b, float *work, struct work *w) {
    const bool delta = b->c.kind == BMC_DELTA_NET;
    const size_t n = (size_t)m->pass_max, row = log_row(b, w), inner = padded(b->extent[INNER]);
    const size_t lead = delta ? 0 : (size_t)b->extent[INNER];
    float *next = work;
    w->stride = padded((int64_t)(lead + row));
    w->beta_stride = delta ? padded(b->extent[HEADS]) : 0;
    w->gate_stride = delta ? inner : w->stride;
    const struct { float **place; size_t size; } parts[] = {
        { &w->row, w->stride }, { &w->q, w->keys }, { &w->v, w->values }, { &w->o, w->values },
        { &w->out, inner }, { &w->beta, w->beta_stride }, { &w->gate, delta ? inner : 0 },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = next;
        next += n * parts[i].size;
    }
    if (!delta)
        w->gate = w->row;
    w->row += lead;
    return (size_t)(next - work) / n;
}

struct need recurrent_need(const bmc_model *m, const struct block *b) {
    struct work w;
    return (struct need){ .floats = recurrent_work(m, b, NULL, &w),
                          .blocks = (size_t)b->extent[INNER] / 32 + 1 };
}

void convolve(const struct pass *p, const struct block *b, const struct work *w, const struct run *run, int t,
              int from, int n, float *y) {
    const float *weight = b->recurrent.conv.v + from, *bias = b->recurrent.conv_bias.v;
    const struct states *states = &run->session->states[HERE];
    const int k = b->c.conv;
    const float *rows[CONV_MAX];
    for (int i = 0; i < k; i++) {
        const int back = k - 1 - i, pos = p->at[t].pos - back;
        const bool here = pos >= run->states[HERE].start;
        rows[i] = (here ? row_of(w->row, w->stride, t - back) : state_row(states, b->stream, pos)) + from;
    }
    p->model->k.conv(y, rows, weight, padded(b->extent[CHANNELS]), bias ? bias + from : NULL, k, n);
}

float decay(const bmc_model *m, const struct block *b, const struct work *w, int t, int h) {
    float *x = row_of(w->row, w->stride, t) + w->decay + h, dt = *x + b->recurrent.dt_bias.v[h];
    m->k.act[BMC_ACT_SOFTPLUS](&dt, NULL, &dt, 1, NULL);
    *x = (float)exp_exact((double)(b->recurrent.a.v[h] * dt));
    return dt;
}

/* Where queries, keys and values begin among the channels. Mamba 2 calls them C, B and x. */
struct channels { int q, k, v; };

static struct channels channels(const bmc_block *c) {
    const int keys = c->n_groups * c->state_dim;
    return c->kind == BMC_DELTA_NET ? (struct channels){ 0, keys, 2 * keys }
                                    : (struct channels){ c->inner_dim + keys, c->inner_dim, 0 };
}

/* Channels [from, from + n) of token t, to y. */
struct part { int t, from, n; float *y; };

static void convolve_silu(const struct pass *p, const struct block *b, const struct work *w,
                          const struct run *run, struct part part) {
    convolve(p, b, w, run, part.t, part.from, part.n, part.y);
    p->model->k.act[BMC_ACT_SILU](part.y, NULL, part.y, part.n, NULL);
}

/* Shared out by (token, part): a group's keys or queries, or a head's values. */
static void prepare(const struct pass *p, const struct block *b, const struct recurrence *r,
                    const struct work *w, int thread) {
    const struct channels at = channels(&b->c);
    const int n_keys = b->c.state_dim, groups = b->c.n_groups, v_dim = (int)b->extent[V_DIM];
    const int parts = 2 * groups + b->c.n_heads;
    const struct run *run = p->runs;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * parts, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int t = (int)(i / parts), part = (int)(i % parts), g = part % groups, h = part - 2 * groups;
        const bool query = part >= groups;
        run = run_of(run, t);
        if (h < 0) {
            float *y = (query ? row_of(w->q, w->keys, t) : row_of(w->row, w->stride, t) + w->k) + g * n_keys;
            convolve_silu(p, b, w, run, (struct part){ t, (query ? at.q : at.k) + g * n_keys, n_keys, y });
            if (r->key)
                r->key(p->model, b, y, query);
        } else {
            float *y = row_of(w->v, w->values, t) + (size_t)h * padded(v_dim);
            convolve_silu(p, b, w, run, (struct part){ t, at.v + h * v_dim, v_dim, y });
            memset(y + v_dim, 0, (padded(v_dim) - (size_t)v_dim) * sizeof *y);
            r->value(p->model, b, w, t, h);
        }
    }
}

/* Tokens of the log, which did to the state what their row says. */
static void advance_log(const struct walk *w, float *s, int from, int to) {
    const size_t stride = w->states->sizes[w->stream].row;
    while (from < to) {
        float *row = state_row(w->states, w->stream, from);
        const struct recur_job job = {
            .s = s, .n_keys = w->job.n_keys, .n_tok = state_rows(w->states, w->stream, from, to - from),
            .decay = row + w->decay, .k = row + w->k, .d = row + w->d,
            .decay_stride = stride, .k_stride = stride, .d_stride = stride,
        };
        w->kernels->recur(&job);
        from += job.n_tok;
    }
}

/* Tokens of the pass, counted from the run's first one. */
static void advance_run(const struct walk *w, float *s, int from, int to) {
    struct recur_job job = w->job;
    const size_t i = (size_t)from;
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
    if (from < to)
        w->kernels->recur(&job);
}

/* Tokens [from, to) of the text: those before the run stand in the log. */
static void advance(const struct walk *w, float *s, int from, int to) {
    const int start = w->run->start;
    advance_log(w, s, from, smaller(to, start));
    advance_run(w, s, larger(from, start) - start, larger(to, start) - start);
}

void walk_slice(const struct walk *w) {
    const struct state_run *run = w->run;
    const size_t floats = (size_t)w->job.n_keys * SLICE, at = w->slice * floats;
    float *s = state_current(w->states, w->stream) + at, *anchor = state_anchor(w->states, w->stream) + at;
    const bool moves = run->next_base > run->base;
    int from = run->replay ? run->base : run->start;
    if (run->replay)
        memcpy(s, anchor, floats * sizeof *s);
    if (moves && run->next_base < from)
        advance(w, anchor, run->base, run->next_base);
    else if (moves) {
        advance(w, s, from, run->next_base);
        memcpy(anchor, s, floats * sizeof *s);
        from = run->next_base;
    }
    advance(w, s, from, run->start + run->n);
}

/* Slice number `slice` of a run; those of a head are neighbours. */
static struct walk walk_of(const struct pass *p, const struct block *b, const struct work *w,
                           const struct run *run, int slice) {
    const int heads = b->c.n_heads, groups = b->c.n_groups, h = slice * SLICE / (int)padded(b->extent[V_DIM]);
    const int g = b->c.interleaved ? h % groups : h / (heads / groups), t = run->first;
    const size_t key = (size_t)(g * b->c.state_dim), value = (size_t)(slice * SLICE);
    float *row = row_of(w->row, w->stride, t);
    struct walk walk = {
        .kernels = &p->model->k, .states = &run->session->states[HERE], .run = &run->states[HERE],
        .stream = b->stream,
        .slice = (size_t)slice, .decay = w->decay + (size_t)h, .k = w->k + key, .d = w->d + value,
    };
    walk.job = (struct recur_job){
        .n_keys = b->c.state_dim, .decay = row + walk.decay, .k = row + walk.k, .d = row + walk.d,
        .q = row_of(w->q, w->keys, t) + key, .o = row_of(w->o, w->values, t) + value,
        .decay_stride = w->stride, .k_stride = w->stride, .d_stride = w->stride,
        .q_stride = w->keys, .o_stride = w->values,
    };
    if (b->c.kind == BMC_DELTA_NET) {
        walk.job.v = row_of(w->v, w->values, t) + value;
        walk.job.v_stride = w->values;
        walk.job.beta = row_of(w->beta, w->beta_stride, t) + h;
        walk.job.beta_stride = w->beta_stride;
    }
    return walk;
}

static void walk_all(const struct pass *p, const struct block *b, const struct work *w, int thread) {
    const int slices = (int)w->values / SLICE;
    int64_t from, to;
    while (pool_take(p->model->pool, thread, (int64_t)p->n_runs * slices, &from, &to))
        for (; from < to; from++) {
            const struct walk walk = walk_of(p, b, w, p->runs + from / slices, (int)(from % slices));
            walk_slice(&walk);
        }
}

/* Shared out by pieces, those that are not whole blocks of 32 values by tokens. */
static void finish(const struct pass *p, const struct block *b, const struct recurrence *r,
                   const struct work *w, struct tokens out, int thread) {
    const int inner = b->c.inner_dim, pieces = (int)b->extent[r->pieces], size = inner / pieces;
    const int each = size % 32 ? pieces : 1, n = pieces / each;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * n, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int t = (int)(i / n), first = (int)(i % n) * each;
        for (int piece = first; piece < first + each; piece++)
            r->finish(p->model, b, w, t, piece);
        quantize(p, out, inner, t, first * size / 32, (first + each) * size / 32);
    }
}

/* Columns [from, to) of the rows that a run leaves. */
static void keep_columns(const struct run *run, int stream, const struct work *w, int from, int to) {
    const struct states *states = &run->session->states[HERE];
    const int start = run->states[HERE].start, end = start + run->states[HERE].n;
    for (int pos = state_first_kept(states, stream, &run->states[HERE]); pos < end; pos++) {
        const float *row = row_of(w->row, w->stride, run->first + pos - start);
        memcpy(state_row(states, stream, pos) + from, row + from, (size_t)(to - from) * sizeof *row);
    }
}

void keep_log(const struct pass *p, const struct block *b, const struct work *w, int thread) {
    const int units = (int)(p->model->state_sizes[HERE][b->stream].row / SLICE);
    int64_t from, to;
    share(p, thread, (int64_t)p->n_runs * units, &from, &to);
    for (int64_t end; from < to; from = end) {
        const int64_t run = from / units, first = run * units;
        end = to < first + units ? to : first + units;
        keep_columns(p->runs + run, b->stream, w, (int)(from - first) * SLICE, (int)(end - first) * SLICE);
    }
}

void recur(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
           struct tokens out, int thread) {
    prepare(p, b, r, w, thread);
    barrier(p, thread, BMC_STEP_STORE);
    walk_all(p, b, w, thread);
    barrier(p, thread, BMC_STEP_STATES);
    finish(p, b, r, w, out, thread);
    keep_log(p, b, w, thread);
}

void recurrent_run(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
                   struct sink out, int thread) {
    const struct tokens made = { .x = w->out, .act = p->buffers->work_act, .n = p->n_tok };
    const struct product product = product_into(&b->recurrent.out, made, out);
    p->machine->recur(p, b, r, w, made, thread);
    p->machine->end(p, thread, BMC_STEP_ACTIVATION);
    p->machine->multiply(p, &product, 1, thread);
}
