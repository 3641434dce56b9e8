/* Attention with compressed keys and values (MLA, arXiv 2405.04434).
 *
 * A token keeps c (kv_rank values) and r (rope values), for all heads. A head's key would be [k_b c | r] and
 * its value v_b c, but k_b moves to the query and v_b behind the sum: scores are (k_b^T q) c + q_r r, and the
 * sum is over c. So heads of queries share one head of keys, [c | r], whose first values are the values too:
 * they are stored once. */
#include "../error.h"
#include "../machine.h"

static const struct role roles[] = {
    { "attn_q", IN_BLOCK(attention.q), MATRIX, Q, DIM, false, 0 },
    { "attn_q_a", IN_BLOCK(attention.q_a), MATRIX, Q_RANK, DIM, false, 0 },
    { "attn_q_a_norm", IN_BLOCK(attention.q_a_norm), VECTOR, ONE, Q_RANK, false, 0 },
    { "attn_q_b", IN_BLOCK(attention.q_b), MATRIX, Q, Q_RANK, false, 0 },
    { "attn_kv_a_mqa", IN_BLOCK(attention.kv_a), MATRIX, KV_A, DIM, true, 0 },
    { "attn_kv_a_norm", IN_BLOCK(attention.kv_a_norm), VECTOR, ONE, KV_RANK, true, 0 },
    { "attn_k_b", IN_BLOCK(attention.k_b), MATRICES, KV_RANK, NOPE, true, HEADS },
    { "attn_v_b", IN_BLOCK(attention.v_b), MATRICES, V_DIM, KV_RANK, true, HEADS },
    { "attn_output", IN_BLOCK(attention.output), MATRIX, DIM, O, true, 0 },
    { 0 },
};

static int turned(const bmc_model *m, const bmc_block *c) { return m->c.ropes[c->rope].dim; }

static int check(const bmc_model *m, const bmc_block *c) {
    if (c->n_heads < 1 || c->n_heads > 512 || c->n_kv_heads != 1 || c->rope_style == BMC_ROPE_NONE
        || c->rope < 0 || c->rope >= m->c.n_ropes)
        return fail(BMC_EFORMAT, "layer %d: compressed attention of %d heads: expected 1 to 512, with rope",
                    c->layer, c->n_heads);
    if (c->kv_rank < 1 || c->v_dim < 1 || c->v_dim > 1024 || c->q_rank < 0 || c->k_dim <= turned(m, c)
        || c->kv_rank + turned(m, c) > 1024)
        return fail(BMC_EFORMAT, "layer %d: compressed keys of %d values, queries of %d, rope of %d: "
                                 "expected at most 1024 together", c->layer,
                    c->kv_rank, c->k_dim, turned(m, c));
    return 0;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    e[HEADS] = c->n_heads;
    e[V_DIM] = c->v_dim;
    e[Q] = (int64_t)c->n_heads * c->k_dim;
    e[O] = (int64_t)c->n_heads * c->v_dim;
    e[Q_RANK] = c->q_rank;
    e[KV_RANK] = c->kv_rank;
    e[KV_A] = c->kv_rank + turned(m, c);
    e[NOPE] = c->k_dim - turned(m, c);
}

static const char *missing(const struct block *b) {
    const struct attention *a = &b->attention;
    if (b->c.q_rank && !a->q_a.data)
        return "attn_q_a";
    if (b->c.q_rank)
        return !a->q_a_norm.v ? "attn_q_a_norm" : !a->q_b.data ? "attn_q_b" : NULL;
    return a->q.data ? NULL : "attn_q";
}

static void stream(bmc_model *m, struct block *b) { add_rows(m, b, 1, (int)b->extent[KV_A], 0); }

static size_t lay_out(const bmc_model *m, const struct block *b, float *work, struct latents *w) {
    const size_t n = (size_t)m->pass_max;
    const int64_t heads = b->c.n_heads;
    float *next = work;
    const struct { float **place; int64_t dim; } parts[] = {
        { &w->q_a, b->c.q_rank }, { &w->q, b->extent[Q] }, { &w->kv, b->extent[KV_A] },
        { &w->nope, heads * b->extent[NOPE] },
        { &w->query, heads * b->extent[KV_A] }, { &w->sum, heads * b->c.kv_rank }, { &w->out, b->extent[O] },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = next;
        next += n * padded(parts[i].dim);
    }
    return (size_t)(next - work) / n;
}

static struct need need(const bmc_model *m, const struct block *b) {
    struct latents w;
    const int64_t widest = b->c.n_heads * (b->extent[NOPE] > b->c.kv_rank ? b->extent[NOPE] : b->c.kv_rank);
    return (struct need){
        .floats = lay_out(m, b, NULL, &w), .blocks = (size_t)(widest + b->c.q_rank + b->extent[O]) / 32 + 1,
        .scratch = attend_scratch(b, b->c.kv_rank),
    };
}

/* q = W x, or W_b norm(W_a x); and [c | r]. */
static void project_all(struct pass *p, const struct block *b, const struct latents *w, struct tokens in,
                        int thread) {
    const struct attention *a = &b->attention;
    const struct machine *on = p->machine;
    const struct tokens low = { .x = w->q_a, .act = p->buffers->work_act, .n = in.n };
    const struct product list[] = {
        product(&a->q, in, w->q), product(&a->q_a, in, w->q_a), product(&a->kv_a, in, w->kv),
    };
    on->multiply(p, list, 3, thread);
    on->end(p, thread, BMC_STEP_QKV);
    if (!b->c.q_rank)
        return;
    on->norm_rows(p, low, b->c.q_rank, a->q_a_norm, thread);
    on->end(p, thread, BMC_STEP_NORM);
    const struct product q = product(&a->q_b, low, w->q);
    on->multiply(p, &q, 1, thread);
    on->end(p, thread, BMC_STEP_QKV);
}

/* Each head's query apart: what k_b is for, and what turns; [c | r] goes to the arena. */
void place_latents(struct pass *p, const struct block *b, const struct latents *w, int thread) {
    const bmc_model *m = p->model;
    const int heads = b->c.n_heads, nope = (int)b->extent[NOPE];
    const int row = (int)b->extent[KV_A], rank = b->c.kv_rank, rope = row - rank;
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        for (int h = 0; h < heads; h++) {
            float *q = w->q + (size_t)t * padded(b->extent[Q]) + (size_t)(h * b->c.k_dim);
            turn(p, b, q + nope, (int)t);
            m->k.scale(q, b->c.attn_scale, b->c.k_dim);
            memcpy(w->nope + (size_t)t * padded(heads * nope) + (size_t)(h * nope), q,
                   (size_t)nope * sizeof *q);
            memcpy(w->query + (size_t)t * padded(heads * row) + (size_t)(h * row + rank), q + nope,
                   (size_t)rope * sizeof *q);
        }
        float *kv = w->kv + (size_t)t * padded(row);
        const int pos = p->at[t].pos;
        norm_row(m, kv, kv, b->attention.kv_a_norm, (struct vector){ 0 }, rank);
        turn(p, b, kv + rank, (int)t);
        m->k.store_kv(tile_of(p->at[t].session, b, 0, pos / TILE), pos % TILE, kv, NULL, row, 0);
    }
}

/* Each head's matrix times its own part of the rows of `in`, into its own part of the rows of y. */
static void multiply_heads(struct pass *p, const struct block *b, const struct matrix *of, struct tokens in,
                           float *y, size_t y_stride, int y_pitch, int thread) {
    struct product list[512];
    for (int h = 0; h < b->c.n_heads; h++) {
        in.from = h * (int)of->n_cols;
        list[h] = (struct product){ &of[h], in, y + h * y_pitch, y_stride, false };
    }
    p->machine->multiply(p, list, b->c.n_heads, thread);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct attention *a = &b->attention;
    const int heads = b->c.n_heads, nope = heads * (int)b->extent[NOPE];
    const int row = (int)b->extent[KV_A], rank = b->c.kv_rank;
    struct act_block *act = p->buffers->work_act;
    const struct machine *on = p->machine;
    struct latents w;
    lay_out(p->model, b, p->buffers->work, &w);
    project_all(p, b, &w, in, thread);
    on->compress(p, b, &w, thread);
    on->end(p, thread, BMC_STEP_STORE);
    const struct rows own[] = { { w.nope, padded(nope) }, { w.query, padded(heads * row) } };
    keep_wanted(p, b, own, thread);
    if (!p->n_tok)
        return;
    const struct tokens parts = { .x = w.nope, .act = act, .n = p->n_tok, .wide = nope };
    on->quantize(p, parts, nope, thread);
    on->end(p, thread, BMC_STEP_NORM);
    multiply_heads(p, b, a->k_b.of, parts, w.query, padded(heads * row), row, thread);
    on->end(p, thread, BMC_STEP_QKV);
    const struct queries q = {
        .block = b, .rows = b, .k_dim = row, .v_dim = rank, .shared = 1,
        .q = w.query, .q_stride = padded(heads * row), .q_pitch = (size_t)row,
        .out = { .x = w.sum, .act = act, .n = p->n_tok, .wide = heads * rank },
    };
    on->attend(p, &q, thread);
    multiply_heads(p, b, a->v_b.of, q.out, w.out, padded(b->extent[O]), b->c.v_dim, thread);
    on->end(p, thread, BMC_STEP_ATTENTION);
    const struct tokens values = { .x = w.out, .act = act, .n = p->n_tok };
    on->quantize(p, values, (int)b->extent[O], thread);
    on->end(p, thread, BMC_STEP_NORM);
    const struct product output = product_into(&a->output, values, out);
    on->multiply(p, &output, 1, thread);
    note(p, thread, BMC_STEP_ATTN_OUTPUT);
}

const struct kind mla_kind = {
    "compressed attention", roles, check, measure, need, true, missing, stream, run,
};
