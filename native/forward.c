/* The forward pass, once, for every architecture, batch and thread.
 *
 * All threads walk through the same steps, each does its share, and a barrier stands wherever a step reads what
 * another thread wrote. No sum is ever split between threads, so their number changes nothing.
 * Shapes are (tokens, values); weights of a projection are (values out, values in). */
#include "model.h"
#include "pack.h"
#include "panels.h"

#include <math.h>

/* Tokens of a pass lie in tiles of up to TILE_COLS columns, as even as can be. */
static int tile_width(int n_tok) {
    int tiles = (n_tok + TILE_COLS - 1) / TILE_COLS;
    return (n_tok + tiles - 1) / tiles;
}

static int smaller(int a, int b) { return a < b ? a : b; }

static int columns(int n_tok, int tile, int width) { return smaller(n_tok - tile * width, width); }

static void note(const struct pass *p, int thread, enum bmc_step step) {
    if (p->model->profile.laps)
        lap(&p->model->profile.laps[thread], step);
}

/* Ends a step: nobody goes on before all have done their share of it. */
static void barrier(const struct pass *p, int thread, enum bmc_step step) {
    note(p, thread, step);
    pool_barrier(p->model->pool);
    note(p, thread, BMC_STEP_WAIT);
}

static void share(const struct pass *p, int thread, int64_t n, int64_t *from, int64_t *to) {
    pool_share(p->model->pool, thread, n, 1, from, to);
}

/* 8-bit copies of blocks [from, to) of a row of k values, into column `tok` of its tile. */
static void quantize(const struct pass *p, const float *row, int k, int n_tok, int tok, int from, int to) {
    int width = tile_width(n_tok), tile = tok / width, cols = columns(n_tok, tile, width);
    struct act_block *act = p->model->buffers->act + (size_t)tile * (size_t)width * (size_t)(k / 32) + tok % width;
    p->model->k.quantize(act + (size_t)from * (size_t)cols, cols, row + 32 * from, to - from);
}

static void quantize_row(const struct pass *p, const float *row, int k, int n_tok, int tok) {
    quantize(p, row, k, n_tok, tok, 0, k / 32);
}

/* The same for all of x (n_tok, k), shared out by blocks; rows that are not whole blocks only meet float weights. */
static void quantize_all(const struct pass *p, const float *x, int k, int n_tok, int thread) {
    int64_t from, to, blocks = k / 32;
    share(p, thread, n_tok * blocks, &from, &to);
    while (from < to) {
        int64_t tok = from / blocks, first = from % blocks;
        int n = smaller((int)(blocks - first), (int)(to - from));
        quantize(p, x + (size_t)tok * padded(k), k, n_tok, (int)tok, (int)first, (int)first + n);
        from += n;
    }
}

/* The rows of n panels of y = W x, for one tile of columns. x and its 8-bit copy: (n_tok, n_cols); out starts at the
 * first of these rows. */
static void project(const struct pass *p, const struct matrix *w, int panel, int n, const float *x, int n_tok, int tile,
                    float *out, size_t out_stride, bool add) {
    int width = tile_width(n_tok), first = tile * width, row = panel * PANEL_ROWS;
    p->model->k.panel[w->type](&(struct panel_job){
        .codes = w->codes + (size_t)panel * w->code_stride, .code_stride = w->code_stride,
        .scales = w->scales + (size_t)panel * w->scale_stride, .scale_stride = w->scale_stride,
        .n_panels = n, .n_rows = smaller((int)w->n_rows - row, n * PANEL_ROWS),
        .k = (int)w->n_cols, .n_cols = columns(n_tok, tile, width),
        .act = p->model->buffers->act + (size_t)first * (size_t)(w->n_cols / 32),
        .x = x + (size_t)first * padded((int)w->n_cols), .x_stride = padded((int)w->n_cols),
        .bias = w->bias ? w->bias + row : NULL,
        .out = out + (size_t)first * out_stride, .out_stride = out_stride, .add = add,
    });
}

/* y = W x (or y += W x), this thread's rows of y. Several tiles take turns at a few panels while those are cached. */
static void linear(const struct pass *p, const struct matrix *w, const float *x, float *y, int n_tok, bool add,
                   int thread) {
    int64_t from, to;
    int tiles = (n_tok + TILE_COLS - 1) / TILE_COLS;
    share(p, thread, (w->n_rows + PANEL_ROWS - 1) / PANEL_ROWS, &from, &to);
    int step = tiles > 1 ? 4 : (int)(to - from);
    for (int panel = (int)from; panel < to; panel += step)
        for (int tile = 0; tile < tiles; tile++)
            project(p, w, panel, smaller(step, (int)to - panel), x, n_tok, tile, y + panel * PANEL_ROWS,
                    padded((int)w->n_rows), add);
}

static void norm(const bmc_model *m, float *y, const float *x, const float *weight, const float *bias) {
    if (!weight) {
        if (y != x)
            memcpy(y, x, (size_t)m->c.dim * sizeof *y);
    } else if (m->c.norm == BMC_NORM_RMS)
        m->k.rmsnorm(y, x, weight, m->c.dim, m->c.norm_eps);
    else
        m->k.layernorm(y, x, weight, bias, m->c.dim, m->c.norm_eps);
}

/* xb = norm(x), in floats and 8 bits, this thread's tokens. With a post norm, x first gains the normed y. */
static void norm_rows(const struct pass *p, const float *post, const float *weight, const float *bias, int n_tok,
                      int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int64_t from, to;
    share(p, thread, n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *x = b->x + (size_t)t * padded(m->c.dim), *y = b->y + (size_t)t * padded(m->c.dim);
        float *xb = b->xb + (size_t)t * padded(m->c.dim);
        if (post) {
            norm(m, y, y, post, NULL);
            m->k.add(x, y, m->c.dim);
        }
        norm(m, xb, x, weight, bias);
        quantize_row(p, xb, m->c.dim, n_tok, (int)t);
    }
}

/* One row of a matrix of the file. */
static void read_row(const struct matrix *w, int64_t row, float *out) {
    const struct type *type = type_find(w->type);
    size_t row_bytes = (size_t)(w->n_cols / type->block_size) * (size_t)type->type_size;
    type->dequantize(w->data + (size_t)row * row_bytes, w->n_cols, out);
}

/* x = embedding(token) (+ embedding(position)); cos and sin of each position. */
static void embed(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int turns = m->c.rope_dim / 2;
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *x = b->x + (size_t)t * padded(m->c.dim);
        read_row(&m->token_embd, p->token[t], x);
        if (m->c.embedding_scale != 1.0f)
            m->k.scale(x, m->c.embedding_scale, m->c.dim);
        if (m->position_embd.data) {
            read_row(&m->position_embd, p->pos[t], b->xb + (size_t)t * padded(m->c.dim));
            m->k.add(x, b->xb + (size_t)t * padded(m->c.dim), m->c.dim);
        }
        for (int table = 0; table < m->c.n_ropes; table++)
            for (int i = 0; i < turns; i++) {
                size_t at = ((size_t)table * PASS_MAX + (size_t)t) * (size_t)turns + (size_t)i;
                double angle = (double)p->pos[t] * (double)m->c.rope_freq[table][i];
                b->cos[at] = (float)cos(angle) * m->c.rope_mscale[table];
                b->sin[at] = (float)sin(angle) * m->c.rope_mscale[table];
            }
    }
}

/* A head's values: its own norm, then the turn of its position. */
static void place_head(const struct pass *p, const struct layer *L, float *head, const float *weight, int t) {
    const bmc_model *m = p->model;
    size_t table = (size_t)(L->rope | p->session[t]->rope);
    size_t at = (table * PASS_MAX + (size_t)t) * (size_t)(m->c.rope_dim / 2);
    if (weight)
        m->k.rmsnorm(head, head, weight, m->c.head_dim, m->c.norm_eps);
    if (m->c.rope == BMC_ROPE_PAIRS)
        m->k.rope_pairs(head, m->buffers->cos + at, m->buffers->sin + at, m->c.rope_dim);
    else if (m->c.rope == BMC_ROPE_HALVES)
        m->k.rope_halves(head, m->buffers->cos + at, m->buffers->sin + at, m->c.rope_dim);
}

/* Q and K get their positions; K and V go to the arena. Shared out by (token, KV head). */
static void place_rows(const struct pass *p, int l, int thread) {
    const bmc_model *m = p->model;
    const struct layer *L = &m->layers[l];
    const struct buffers *b = m->buffers;
    int D = m->c.head_dim, group = m->c.n_heads / m->c.n_kv_heads;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * m->c.n_kv_heads, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int t = (int)(i / m->c.n_kv_heads), h = (int)(i % m->c.n_kv_heads), pos = p->pos[t];
        float *k = b->k + (size_t)t * padded(m->kv_dim) + h * D, *v = b->v + (size_t)t * padded(m->kv_dim) + h * D;
        for (int g = 0; g < group; g++) {
            float *q = b->q + (size_t)t * padded(m->q_dim) + (h * group + g) * D;
            place_head(p, L, q, L->attn_q_norm, t);
            m->k.scale(q, m->c.attn_scale, D);
        }
        place_head(p, L, k, L->attn_k_norm, t);
        m->k.store_kv(arena_tile(&p->session[t]->arena, l, h, pos / TILE), pos % TILE, k, v, D, m->v_dim);
    }
}

/* Queries of a task: rows are (token, head of the group), token by token. */
enum { TASK_ROWS = 64 };

/* How many tokens from `first` on share a task: the same sequence, side by side, TASK_ROWS queries at most. */
static int task_tokens(const struct pass *p, int first, int n_tok, int group) {
    int n = 1, most = TASK_ROWS / group;
    while (n < most && first + n < n_tok && p->session[first + n] == p->session[first])
        n++;
    return n;
}

/* The first row that a token at `pos` sees. */
static int first_seen(int pos, int window) { return window && pos >= window ? pos + 1 - window : 0; }

/* Attention of n tokens from `first` on, for one KV head: chunk by chunk of the cache, each for all queries. */
static void attend(const struct pass *p, int l, int h, int first, int n, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const struct arena *arena = &p->session[first]->arena;
    int D = m->c.head_dim, group = m->c.n_heads / m->c.n_kv_heads, rows = n * group, window = m->layers[l].window;
    float *o = b->scratch + (size_t)thread * b->scratch_stride;
    float *max = o + (size_t)rows * (size_t)m->v_dim, *sum = max + rows;
    int start = first_seen(p->pos[first], window), last = p->pos[first + n - 1] + 1;
    memset(o, 0, (size_t)rows * (size_t)m->v_dim * sizeof *o);
    for (int r = 0; r < rows; r++)
        max[r] = -INFINITY, sum[r] = 0;

    for (int chunk = start / CHUNK * CHUNK; chunk < last; chunk += CHUNK) {
        const uint16_t *tiles[CHUNK / TILE];
        for (int i = 0; i < CHUNK / TILE && chunk + i * TILE < last; i++)
            tiles[i] = arena_tile(arena, l, h, chunk / TILE + i);
        for (int r = 0; r < rows;) {
            const float *q[ATTN_ROWS];
            int from[ATTN_ROWS], to[ATTN_ROWS], row = r, taken = 0;
            for (; r < rows && taken < ATTN_ROWS; r++) {
                int t = first + r / group, pos = p->pos[t], low = first_seen(pos, window);
                if (pos < chunk || low >= chunk + CHUNK) {      /* sees nothing here; those that do stand together */
                    if (taken)
                        break;
                    row = r + 1;
                    continue;
                }
                q[taken] = b->q + (size_t)t * padded(m->q_dim) + (h * group + r % group) * D;
                from[taken] = low > chunk ? low - chunk : 0;
                to[taken++] = smaller(pos + 1 - chunk, CHUNK);
            }
            if (taken)
                m->k.attend(&(struct attn_job){
                    .tiles = tiles, .head_dim = D, .v_dim = m->v_dim, .n_rows = taken, .q = q,
                    .first = from, .limit = to, .m = max + row, .l = sum + row, .o = o + (size_t)row * (size_t)m->v_dim,
                });
        }
    }
    for (int r = 0; r < rows; r++)
        m->k.attend_end(b->xb + (size_t)(first + r / group) * padded(m->q_dim) + (h * group + r % group) * D,
                        o + (size_t)r * (size_t)m->v_dim, sum[r], D);
}

/* All tasks, taken in turn: which thread does one changes nothing. */
static void attention(struct pass *p, int l, int n_tok, int thread) {
    const bmc_config *c = &p->model->c;
    int task = 0, mine = atomic_fetch_add(&p->next_task, 1);
    for (int first = 0, n; first < n_tok; first += n) {
        n = task_tokens(p, first, n_tok, c->n_heads / c->n_kv_heads);
        for (int h = 0; h < c->n_kv_heads; h++, task++)
            if (task == mine) {
                attend(p, l, h, first, n, thread);
                mine = atomic_fetch_add(&p->next_task, 1);
            }
    }
}

static void move_row(float *x, int to, int from, size_t n) {
    memmove(x + (size_t)to * n, x + (size_t)from * n, n * sizeof *x);
}

/* After the last keys and values are stored, only tokens whose logits are wanted have anything left to do. */
static void keep_wanted(struct pass *p) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    for (int i = 0; i < p->n_out; i++) {
        int t = p->out[i];
        move_row(b->x, i, t, padded(m->c.dim));
        move_row(b->q, i, t, padded(m->q_dim));
        p->session[i] = p->session[t];
        p->pos[i] = p->pos[t];
    }
}

/* up = up * act(gate), or act(up) where there is no gate: floats and 8 bits, shared out by blocks. */
static void activate(const struct pass *p, const struct layer *L, int n_tok, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int F = m->c.hidden_dim;
    int64_t from, to, pieces = (F + 31) / 32;
    void (*act)(float *, const float *, const float *, int) = m->c.act == BMC_ACT_SILU ? m->k.silu : m->k.gelu;
    share(p, thread, n_tok * pieces, &from, &to);
    while (from < to) {
        int t = (int)(from / pieces), first = (int)(from % pieces), n = smaller((int)pieces - first, (int)(to - from));
        size_t row = (size_t)t * padded(F), at = row + (size_t)first * 32;
        int count = smaller(n * 32, F - first * 32);
        if (L->ffn_gate.data)
            act(b->up + at, b->up + at, b->gate + at, count);
        else
            act(b->up + at, NULL, b->up + at, count);
        quantize(p, b->up + row, F, n_tok, t, first, smaller(first + n, F / 32));
        from += n;
    }
}

static struct best best_of(const bmc_model *m, const float *logits, int n, int first) {
    struct best best = { .logit = m->k.largest(logits, n), .id = first };
    best.sum = m->k.sum_exp(logits, best.logit, n);
    while (best.id < first + n - 1 && logits[best.id - first] != best.logit)
        best.id++;
    return best;
}

/* Logits of the wanted tokens, HEAD_ROWS of the vocabulary at a time: copied where they are asked for, or only the best
 * of them remembered, so that greedy decoding never writes a vocabulary's worth. */
static void head(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    float *part = m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride;
    int64_t from, to;
    share(p, thread, head_parts(m), &from, &to);
    for (; from < to; from++) {
        int row = (int)from * HEAD_ROWS, rows = smaller(HEAD_ROWS, m->c.vocab_size - row);
        int panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
        for (int tile = 0; tile < (p->n_out + TILE_COLS - 1) / TILE_COLS; tile++)
            project(p, &m->output, row / PANEL_ROWS, panels, m->buffers->xb, p->n_out, tile, part, HEAD_ROWS, false);
        for (int i = 0; i < p->n_out; i++) {
            const float *logits = part + (size_t)i * HEAD_ROWS;
            if (p->logits[i])
                memcpy(p->logits[i] + row, logits, (size_t)rows * sizeof *logits);
            if (p->argmax[i] || p->logprob[i])
                p->best[(int64_t)i * head_parts(m) + from] = best_of(m, logits, rows, row);
        }
    }
}

/* The best of all parts, the first of equals, and its log-probability: minus the log of the sum of e^(logit - best). */
static void choose(const struct pass *p) {
    size_t n = (size_t)head_parts(p->model);
    for (int i = 0; i < p->n_out; i++) {
        const struct best *parts = p->best + (size_t)i * n, *best = parts;
        double sum = 0;
        if (!p->argmax[i] && !p->logprob[i])
            continue;
        for (const struct best *part = parts; part < parts + n; part++)
            if (part->logit > best->logit)
                best = part;
        for (const struct best *part = parts; part < parts + n; part++)
            sum += part->sum * exp((double)part->logit - best->logit);
        if (p->argmax[i])
            *p->argmax[i] = best->id;
        if (p->logprob[i])
            *p->logprob[i] = (float)-log(sum);
    }
}

static void run(void *arg, int thread) {
    struct pass *p = arg;
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const float *post = NULL;                           /* a post norm that waits for the next sum */
    int n_tok = p->n_tok;

    embed(p, thread);
    note(p, thread, BMC_STEP_EMBED);
    for (int l = 0; l < m->c.n_layers; l++) {
        const struct layer *L = &m->layers[l];
        norm_rows(p, post, L->attn_norm, L->attn_norm_bias, n_tok, thread);
        barrier(p, thread, BMC_STEP_NORM);
        linear(p, &L->attn_q, b->xb, b->q, n_tok, false, thread);
        linear(p, &L->attn_k, b->xb, b->k, n_tok, false, thread);
        linear(p, &L->attn_v, b->xb, b->v, n_tok, false, thread);
        barrier(p, thread, BMC_STEP_QKV);
        place_rows(p, l, thread);
        if (thread == 0)
            atomic_store(&p->next_task, 0);
        barrier(p, thread, BMC_STEP_STORE);
        if (l == m->c.n_layers - 1 && p->n_out < n_tok) {
            if (thread == 0)
                keep_wanted(p);
            n_tok = p->n_out;
            if (!n_tok)
                return;
            barrier(p, thread, BMC_STEP_STORE);
        }
        attention(p, l, n_tok, thread);
        barrier(p, thread, BMC_STEP_ATTENTION);
        quantize_all(p, b->xb, m->q_dim, n_tok, thread);
        barrier(p, thread, BMC_STEP_NORM);
        post = L->attn_post_norm;
        linear(p, &L->attn_output, b->xb, post ? b->y : b->x, n_tok, !post, thread);
        barrier(p, thread, BMC_STEP_ATTN_OUTPUT);

        norm_rows(p, post, L->ffn_norm, L->ffn_norm_bias, n_tok, thread);
        barrier(p, thread, BMC_STEP_NORM);
        if (L->ffn_gate.data)
            linear(p, &L->ffn_gate, b->xb, b->gate, n_tok, false, thread);
        linear(p, &L->ffn_up, b->xb, b->up, n_tok, false, thread);
        barrier(p, thread, BMC_STEP_GATE_UP);
        activate(p, L, n_tok, thread);
        barrier(p, thread, BMC_STEP_ACTIVATION);
        post = L->ffn_post_norm;
        linear(p, &L->ffn_down, b->up, post ? b->y : b->x, n_tok, !post, thread);
        barrier(p, thread, BMC_STEP_DOWN);
    }
    norm_rows(p, post, m->output_norm, m->output_norm_bias, n_tok, thread);
    barrier(p, thread, BMC_STEP_NORM);
    head(p, thread);
    barrier(p, thread, BMC_STEP_HEAD);
    if (thread == 0)
        choose(p);
    note(p, thread, BMC_STEP_HEAD);
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
