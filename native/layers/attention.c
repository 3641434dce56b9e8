/* Attention (arXiv 1706.03762), with grouped heads (2305.13245) and all that models vary in it. */
#include "../error.h"
#include "../machine.h"

#include <math.h>

static const struct role roles[] = {
    { "attn_q", IN_BLOCK(attention.q), MATRIX, QUERY, DIM, true, 0 },
    { "attn_k", IN_BLOCK(attention.k), MATRIX, K, DIM, false, 0 },
    { "attn_v", IN_BLOCK(attention.v), MATRIX, V, DIM, false, 0 },
    { "attn_gate", IN_BLOCK(attention.gate), MATRIX, O, DIM, false, 0 },
    { "attn_gate", IN_BLOCK(attention.gate), MATRIX, HEADS, DIM, false, 0 },
    { "attn_output", IN_BLOCK(attention.output), MATRIX, DIM, O, true, 0 },
    { "attn_q_norm", IN_BLOCK(attention.q_norm), VECTOR, ONE, K_DIM, false, 0 },
    { "attn_q_norm", IN_BLOCK(attention.q_norm), VECTOR, ONE, Q, false, 0 },
    { "attn_q_norm", IN_BLOCK(attention.q_norm), VECTOR, HEADS, K_DIM, false, 0 },
    { "attn_q_norm.bias", IN_BLOCK(attention.q_norm_bias), VECTOR, ONE, K_DIM, false, 0 },
    { "attn_q_norm.bias", IN_BLOCK(attention.q_norm_bias), VECTOR, ONE, Q, false, 0 },
    { "attn_k_norm", IN_BLOCK(attention.k_norm), VECTOR, ONE, K_DIM, false, 0 },
    { "attn_k_norm", IN_BLOCK(attention.k_norm), VECTOR, ONE, K, false, 0 },
    { "attn_k_norm", IN_BLOCK(attention.k_norm), VECTOR, GROUPS, K_DIM, false, 0 },
    { "attn_k_norm.bias", IN_BLOCK(attention.k_norm_bias), VECTOR, ONE, K_DIM, false, 0 },
    { "attn_k_norm.bias", IN_BLOCK(attention.k_norm_bias), VECTOR, ONE, K, false, 0 },
    { "attn_sinks", IN_BLOCK(attention.sinks), VECTOR, ONE, HEADS, false, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    const struct bmc_config *g = &m->c;
    if (c->n_heads < 1 || c->n_heads > 4096 || c->n_kv_heads < 1 || c->n_heads % c->n_kv_heads)
        return fail(BMC_EFORMAT, "layer %d: %d heads cannot share %d heads of keys and values", c->layer,
                    c->n_heads, c->n_kv_heads);
    if (c->k_dim < 1 || c->k_dim > 1024 || c->v_dim < 1 || c->v_dim > 1024)
        return fail(BMC_EFORMAT, "layer %d: expected heads of 1 to 1024 values, found %d and %d", c->layer,
                    c->k_dim, c->v_dim);
    if (c->rope_style < BMC_ROPE_NONE || c->rope_style > BMC_ROPE_HALVES
        || (c->rope_style && (c->rope < 0 || c->rope >= g->n_ropes || g->ropes[c->rope].dim > c->k_dim)))
        return fail(BMC_EFORMAT, "layer %d: rope: expected one of %d tables of at most %d values", c->layer,
                    g->n_ropes, c->k_dim);
    if (c->window < 0 || c->gate < BMC_GATE_NONE || c->gate > BMC_GATE_SOFTPLUS)
        return fail(BMC_EFORMAT, "layer %d: window %d and gate %d are out of range", c->layer, c->window,
                    c->gate);
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[HEADS] = c->n_heads;
    e[GROUPS] = c->n_kv_heads;
    e[K_DIM] = c->k_dim;
    e[V_DIM] = c->v_dim;
    e[Q] = (int64_t)c->n_heads * c->k_dim;
    e[QUERY] = c->gate == BMC_GATE_QUERY ? 2 * e[Q] : e[Q];
    e[K] = (int64_t)c->n_kv_heads * c->k_dim;
    e[V] = (int64_t)c->n_kv_heads * c->v_dim;
    e[O] = (int64_t)c->n_heads * c->v_dim;
}

static const char *missing(const struct block *b) {
    const struct attention *a = &b->attention;
    if (!b->c.kv_from && !a->k.data)
        return "attn_k";
    if (!b->c.kv_from && !a->v.data && b->c.v_dim != b->c.k_dim)
        return "attn_v";
    const bool gated = b->c.gate == BMC_GATE_SIGMOID || b->c.gate == BMC_GATE_SOFTPLUS;
    return gated && !a->gate.data ? "attn_gate" : NULL;
}

/* Rows of keys and values, unless the block reads those of another. */
static void stream(bmc_model *m, struct block *b) {
    if (!b->c.kv_from)
        add_rows(m, b, b->c.n_kv_heads, b->c.k_dim, b->c.v_dim);
}

static size_t lay_out(const bmc_model *m, const struct block *b, float *work, struct heads *w) {
    const size_t n = (size_t)m->pass_max;
    float *next = work;
    const struct { float **place; int64_t dim; } parts[] = {
        { &w->q, b->extent[QUERY] }, { &w->k, b->extent[K] }, { &w->v, b->extent[V] },
        { &w->gate, b->attention.gate.data ? b->attention.gate.n_rows : 0 }, { &w->out, b->extent[O] },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = next;
        next += n * padded(parts[i].dim);
    }
    return (size_t)(next - work) / n;
}

static struct need need(const bmc_model *m, const struct block *b) {
    struct heads w;
    return (struct need){
        .floats = lay_out(m, b, NULL, &w), .blocks = (size_t)b->extent[O] / 32 + 1,
        .scratch = attend_scratch(b, b->c.v_dim),
    };
}

void turn(const struct pass *p, const struct block *b, float *head, int t) {
    const bmc_model *m = p->model;
    int table = b->c.rope | p->at[t].session->rope;
    size_t at = ((size_t)table * (size_t)m->pass_max + (size_t)t) * (size_t)m->buffers->turns;
    if (b->c.rope_style == BMC_ROPE_PAIRS)
        m->k.rope_pairs(head, m->buffers->cos + at, m->buffers->sin + at, m->c.ropes[table].dim);
    else if (b->c.rope_style == BMC_ROPE_HALVES)
        m->k.rope_halves(head, m->buffers->cos + at, m->buffers->sin + at, m->c.ropes[table].dim);
}

/* A head's values: its norm and the turn of its position. */
static void place_head(const struct pass *p, const struct block *b, float *head, int h, struct vector weight,
                       struct vector bias, int t) {
    if (weight.n_rows > 1)
        weight.v += (size_t)h * (size_t)weight.n_cols;
    if (b->c.rope_late)
        turn(p, b, head, t);
    if (weight.v && weight.n_cols == b->c.k_dim)
        norm_row(p->model, head, head, weight, bias, b->c.k_dim);
    if (!b->c.rope_late)
        turn(p, b, head, t);
}

float query_scale(const struct block *b, int pos) {
    float scale = b->c.attn_scale;
    if (b->c.scale_ctx > 0)
        scale *= 1 + b->c.scale_log * (float)log((double)(pos / b->c.scale_ctx) + 1);
    return scale;
}

/* Q and K get their positions; K and V go to the arena. Shared out by (KV head, token), as attention is. */
static void place_rows(const struct pass *p, const struct block *b, const struct heads *w, int thread) {
    const bmc_model *m = p->model;
    const struct vector none = { 0 };
    const int K_dim = b->c.k_dim, V_dim = b->c.v_dim, group = b->c.n_heads / b->c.n_kv_heads;
    const int pitch = (int)(b->extent[QUERY] / b->c.n_heads);
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * b->c.n_kv_heads, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int t = (int)(i % p->n_tok), h = (int)(i / p->n_tok), pos = p->at[t].pos;
        for (int g = h * group; g < (h + 1) * group; g++) {
            float *q = w->q + (size_t)t * padded(b->extent[QUERY]) + (size_t)(g * pitch);
            place_head(p, b, q, g, b->attention.q_norm, b->attention.q_norm_bias, t);
            m->k.scale(q, query_scale(b, pos), K_dim);
        }
        if (b->c.kv_from)
            continue;
        float *k = w->k + (size_t)t * padded(b->extent[K]) + (size_t)(h * K_dim);
        float *v = w->v + (size_t)t * padded(b->extent[V]) + (size_t)(h * V_dim);
        if (!b->attention.v.data)               /* values are the keys, before norm and turn */
            memcpy(v, k, (size_t)V_dim * sizeof *v);
        if (b->c.v_norm)
            norm_row(m, v, v, none, none, V_dim);
        place_head(p, b, k, h, b->attention.k_norm, b->attention.k_norm_bias, t);
        m->k.store_kv(tile_of(p->at[t].session, b, h, pos / TILE), pos % TILE, k, v, K_dim, V_dim);
    }
}

/* Norms of all heads together, where the model has those: before any is placed. */
static void norm_whole(const struct pass *p, const struct block *b, const struct heads *w, int thread) {
    const struct attention *a = &b->attention;
    const bool q_whole = a->q_norm.v && a->q_norm.n_cols != b->c.k_dim;
    const bool k_whole = a->k_norm.v && a->k_norm.n_cols != b->c.k_dim;
    int64_t from, to;
    if (!q_whole && !k_whole)
        return;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *q = w->q + (size_t)t * padded(b->extent[Q]), *k = w->k + (size_t)t * padded(b->extent[K]);
        if (q_whole)
            norm_row(p->model, q, q, a->q_norm, a->q_norm_bias, (int)b->extent[Q]);
        if (k_whole)
            norm_row(p->model, k, k, a->k_norm, a->k_norm_bias, (int)b->extent[K]);
    }
    barrier(p, thread, BMC_STEP_NORM);
}

void place_heads(struct pass *p, const struct block *b, const struct heads *w, int thread) {
    norm_whole(p, b, w, thread);
    place_rows(p, b, w, thread);
}

static struct queries queries(const struct pass *p, const struct block *b, const struct heads *w) {
    const struct buffers *buffers = p->buffers;
    struct queries a = {
        .block = b, .rows = b - b->c.kv_from, .k_dim = b->c.k_dim, .v_dim = b->c.v_dim,
        .q = w->q, .q_stride = padded(b->extent[QUERY]), .q_pitch = (size_t)(b->extent[QUERY] / b->c.n_heads),
        .out = { w->out, buffers->work_act, p->n_tok, 0, 0 },
        .gate_act = b->c.gate == BMC_GATE_SOFTPLUS ? BMC_ACT_SOFTPLUS : BMC_ACT_SIGMOID,
    };
    if (b->c.gate == BMC_GATE_QUERY) {
        a.gate = w->q + b->c.k_dim;
        a.gate_stride = a.q_stride;
        a.gate_pitch = a.q_pitch;
    } else if (b->c.gate) {
        a.gate = w->gate;
        a.gate_stride = padded(b->attention.gate.n_rows);
        a.gate_pitch = (size_t)(b->attention.gate.n_rows / b->c.n_heads);
    }
    return a;
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct attention *a = &b->attention;
    const struct machine *on = p->machine;
    struct heads w;
    lay_out(p->model, b, p->buffers->work, &w);
    const struct product list[] = {
        product(&a->q, in, w.q), product(&a->k, in, w.k), product(&a->v, in, w.v),
        product(&a->gate, in, w.gate),
    };
    on->multiply(p, list, 4, thread);
    on->end(p, thread, BMC_STEP_QKV);
    on->place(p, b, &w, thread);
    on->end(p, thread, BMC_STEP_STORE);
    const size_t gate_stride = a->gate.data ? padded(a->gate.n_rows) : 0;
    const struct rows own[] = { { w.q, padded(b->extent[QUERY]) }, { w.gate, gate_stride } };
    keep_wanted(p, b, own, thread);
    if (!p->n_tok)
        return;
    const struct queries q = queries(p, b, &w);
    on->attend(p, &q, thread);
    const struct product output = product_into(&a->output, q.out, out);
    on->multiply(p, &output, 1, thread);
    note(p, thread, BMC_STEP_ATTN_OUTPUT);
}

const struct kind attention_kind = { "attention", roles, check, measure, need, true, missing, stream, run };
