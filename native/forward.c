/* The forward pass, once, for every architecture, batch and thread.
 *
 * All threads walk through the same steps, each does its share, and a barrier stands wherever a step reads what
 * another thread wrote. No sum is ever split between threads, so their number changes nothing.
 * Shapes are (tokens, values); weights of a projection are (values out, values in). */
#include "clock.h"
#include "model.h"
#include "pack.h"
#include "panels.h"
#include "sample.h"

#include <math.h>

/* Tokens of a pass lie in tiles of up to TILE_COLS columns, as even as can be. */
static int tile_width(int n_tok) {
    int tiles = (n_tok + TILE_COLS - 1) / TILE_COLS;
    return (n_tok + tiles - 1) / tiles;
}

static int smaller(int a, int b) { return a < b ? a : b; }

static int larger(int a, int b) { return a > b ? a : b; }

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

/* 8-bit copies of blocks [from, to) of a row of k values, into column `tok` of its tile in `act`. */
static void quantize(const struct pass *p, struct act_block *act, const float *row, int k, int n_tok, int tok, int from,
                     int to) {
    int width = tile_width(n_tok), tile = tok / width, cols = columns(n_tok, tile, width);
    act += (size_t)tile * (size_t)width * (size_t)(k / 32) + tok % width;
    p->model->k.quantize(act + (size_t)from * (size_t)cols, cols, row + 32 * from, to - from);
}

/* The same for all of x (n_tok, k), shared out by blocks; rows that are not whole blocks only meet float weights. */
static void quantize_all(const struct pass *p, const float *x, int k, int n_tok, int thread) {
    int64_t from, to, blocks = k / 32;
    share(p, thread, n_tok * blocks, &from, &to);
    while (from < to) {
        int64_t tok = from / blocks, first = from % blocks;
        int n = smaller((int)(blocks - first), (int)(to - from));
        quantize(p, p->model->buffers->act, x + (size_t)tok * padded(k), k, n_tok, (int)tok, (int)first,
                 (int)first + n);
        from += n;
    }
}

/* y = W x, or y += W x: x (n_tok, n_cols) and its 8-bit copy, y (n_tok, n_rows). */
struct product {
    const struct matrix *w;
    const float *x;
    const struct act_block *act;
    float *y;
    size_t y_stride;
    bool add;
};

static int n_panels(int64_t n_rows) { return (int)((n_rows + PANEL_ROWS - 1) / PANEL_ROWS); }

/* Panels [from, to) of a matrix. Where none are kept they are made now, in one of this thread's two rooms. */
static struct matrix slice(const struct pass *p, const struct matrix *w, int from, int to, int thread, int room) {
    struct matrix part = *w;
    part.n_rows = smaller((int)w->n_rows, to * PANEL_ROWS) - from * PANEL_ROWS;
    part.bias = w->bias ? w->bias + from * PANEL_ROWS : NULL;
    if (w->codes) {
        part.codes += (size_t)from * w->code_stride;
        part.scales += (size_t)from * w->scale_stride;
        return part;
    }
    size_t row_bytes = file_row_bytes(w);
    part.codes = (uint8_t *)p->model->rooms + (size_t)(2 * thread + room) * p->model->room_bytes;
    part.scales = part.codes + ROOM_PANELS * w->code_stride;
    for (int i = 0; i < to - from; i++)
        pack_panel(w->type, w->data + (size_t)(from + i) * PANEL_ROWS * row_bytes, row_bytes,
                   smaller((int)part.n_rows - i * PANEL_ROWS, PANEL_ROWS), w->n_cols,
                   part.codes + (size_t)i * w->code_stride, part.scales + (size_t)i * w->scale_stride);
    return part;
}

/* One tile of columns times a slice that begins at `row`. */
static void project(const struct pass *p, const struct product *r, const struct matrix *part, int row, int n_tok,
                    int tile) {
    int width = tile_width(n_tok), first = tile * width;
    p->model->k.panel[part->type](&(struct panel_job){
        .codes = part->codes, .code_stride = part->code_stride,
        .scales = part->scales, .scale_stride = part->scale_stride,
        .n_panels = n_panels(part->n_rows), .n_rows = (int)part->n_rows,
        .k = (int)part->n_cols, .n_cols = columns(n_tok, tile, width),
        .act = r->act + (size_t)first * (size_t)(part->n_cols / 32),
        .x = r->x + (size_t)first * padded((int)part->n_cols), .x_stride = padded((int)part->n_cols),
        .bias = part->bias, .out = r->y + (size_t)first * r->y_stride + row, .out_stride = r->y_stride, .add = r->add,
    });
}

/* Rows are taken by whoever is free, its own first, in groups of four panels: a multiple of a block of 32, and few enough to stay
 * cached while tiles take turns at them. Which thread computes a row changes nothing. */
enum { GROUP = 4, GROUP_ROWS = GROUP * PANEL_ROWS };

static int n_groups(const struct matrix *w) { return (int)((w->n_rows + GROUP_ROWS - 1) / GROUP_ROWS); }

static int n_tiles(int n_tok) { return (n_tok + TILE_COLS - 1) / TILE_COLS; }

/* How many groups are done at a time: a lone tile streams through all of them. */
static int stretch(const struct matrix *w, int n_tok, int groups) {
    return n_tiles(n_tok) > 1 || !w->codes ? 1 : groups;
}

static void project_groups(const struct pass *p, const struct product *r, int from, int to, int n_tok, int thread) {
    for (int step = stretch(r->w, n_tok, to - from); from < to; from += step) {
        int end = smaller((from + step) * GROUP, n_panels(r->w->n_rows));
        const struct matrix part = slice(p, r->w, from * GROUP, end, thread, 0);
        for (int tile = 0; tile < n_tiles(n_tok); tile++)
            project(p, r, &part, from * GROUP_ROWS, n_tok, tile);
    }
}

/* Products side by side. */
static void multiply(const struct pass *p, const struct product *list, int n, int n_tok, int thread) {
    int64_t total = 0, from, to;
    for (int i = 0; i < n; i++)
        total += n_groups(list[i].w);
    while (pool_take(p->model->pool, thread, total, &from, &to))
        for (int i = 0; i < n; i++) {
            int groups = n_groups(list[i].w), end = smaller((int)to, groups);
            if (from < end)
                project_groups(p, &list[i], (int)from, end, n_tok, thread);
            from = from > groups ? from - groups : 0;
            to -= groups;
        }
}

static struct product product(const struct matrix *w, const float *x, const struct act_block *act, float *y, bool add) {
    return (struct product){ w, x, act, y, padded((int)w->n_rows), add };
}

static void norm(const bmc_model *m, float *y, const float *x, const float *weight, const float *bias) {
    if (!weight) {
        if (y != x)
            memcpy(y, x, (size_t)m->c.dim * sizeof *y);
    } else if (m->c.norm == BMC_NORM_RMS)
        m->k.rmsnorm(y, x, weight, bias, m->c.dim, m->c.norm_eps);
    else
        m->k.layernorm(y, x, weight, bias, m->c.dim, m->c.norm_eps);
}

/* What a product reads: rows of floats, and the same in 8 bits. */
struct input { float *x; struct act_block *act; };

/* norm(x): of few tokens all, by every thread for itself, and otherwise each thread's share. With a post norm, x first
 * gains the normed y, which is no work to do twice. */
static struct input normed(const struct pass *p, const float *post, const float *weight, const float *bias, int n_tok,
                           int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    bool own = n_tok <= FEW && !post;
    struct input in = { b->xb, b->act };
    int64_t from = 0, to = n_tok;
    if (own)
        in = (struct input){ b->own_xb + (size_t)(thread * FEW) * padded(m->c.dim),
                             b->own_act + thread * FEW * (m->c.dim / 32 + 1) };
    else
        share(p, thread, n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *x = b->x + (size_t)t * padded(m->c.dim), *y = b->y + (size_t)t * padded(m->c.dim);
        float *xb = in.x + (size_t)t * padded(m->c.dim);
        if (post) {
            norm(m, y, y, post, NULL);
            m->k.add(x, y, m->c.dim);
        }
        norm(m, xb, x, weight, bias);
        quantize(p, in.act, xb, m->c.dim, n_tok, (int)t, 0, m->c.dim / 32);
    }
    if (own)
        note(p, thread, BMC_STEP_NORM);
    else
        barrier(p, thread, BMC_STEP_NORM);
    return in;
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
        m->k.rmsnorm(head, head, weight, NULL, m->c.head_dim, m->c.norm_eps);
    if (m->c.rope == BMC_ROPE_PAIRS)
        m->k.rope_pairs(head, m->buffers->cos + at, m->buffers->sin + at, m->c.rope_dim);
    else if (m->c.rope == BMC_ROPE_HALVES)
        m->k.rope_halves(head, m->buffers->cos + at, m->buffers->sin + at, m->c.rope_dim);
}

/* Q and K get their positions; K and V go to the arena. Shared out by (KV head, token), as attention is. */
static void place_rows(const struct pass *p, int l, int thread) {
    const bmc_model *m = p->model;
    const struct layer *L = &m->layers[l];
    const struct buffers *b = m->buffers;
    int D = m->c.head_dim, group = m->c.n_heads / m->c.n_kv_heads;
    int64_t from, to;
    share(p, thread, (int64_t)p->n_tok * m->c.n_kv_heads, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int t = (int)(i % p->n_tok), h = (int)(i / p->n_tok), pos = p->pos[t];
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

/* Attention is cut into tasks: a KV head and up to TASK_ROWS queries, rows (token, head of the group), token by token.
 * Where that makes too few for all threads, a task is cut into pieces, runs of chunks of the cache. Chunks are summed
 * up one by one and merged in their order either way: a cut changes nothing. */
enum { TASK_ROWS = 64 };

struct cut {
    int n_tok, n_tasks, n_pieces;   /* tokens of the pass, tasks, pieces of each */
    int n_rows, n_chunks;           /* the most queries of a task, and chunks they see */
};

struct task {
    int number, h, first, n_rows;   /* KV head, first token, queries */
    int begin, end;                 /* chunks that they see */
};

/* What chunks sum up to for each query: weighted rows, not divided yet, the largest score, the sum of weights. */
struct sums { float *o, *max, *sum; };

static int group_size(const bmc_model *m) { return m->c.n_heads / m->c.n_kv_heads; }

/* How many tokens from `first` on share a task: the same sequence, side by side. */
static int task_tokens(const struct pass *p, int first, int n_tok) {
    int n = 1, most = TASK_ROWS / group_size(p->model);
    while (n < most && first + n < n_tok && p->session[first + n] == p->session[first])
        n++;
    return n;
}

/* The first row that a token at `pos` sees. */
static int first_seen(int pos, int window) { return window && pos >= window ? pos + 1 - window : 0; }

/* The rows that a token sees up to itself: its layer's, or fewer where the pass says so. The first chunk is exempt: much
 * of a model's attention rests on a text's first tokens (StreamingLLM, arXiv 2309.17453). */
static int window_of(const struct pass *p, int l, int tok, int chunk) {
    int window = p->model->layers[l].window, last = p->last[tok];
    return chunk && last && (!window || last < window) ? last : window;
}

static struct task make_task(const struct pass *p, int l, int number, int first, int n) {
    const bmc_model *m = p->model;
    return (struct task){
        .number = number, .h = number % m->c.n_kv_heads, .first = first, .n_rows = n * group_size(m),
        .begin = first_seen(p->pos[first], window_of(p, l, first, 1)) / CHUNK, .end = p->pos[first + n - 1] / CHUNK + 1,
    };
}

/* Floats that the sums of n queries take. */
static size_t sums_size(const bmc_model *m, int rows) { return (size_t)rows * ((size_t)m->v_dim + 2); }

static struct sums empty_sums(const bmc_model *m, float *memory, int rows) {
    struct sums s = { .o = memory, .max = memory + (size_t)rows * (size_t)m->v_dim };
    s.sum = s.max + rows;
    memset(memory, 0, sums_size(m, rows) * sizeof *memory);
    for (int r = 0; r < rows; r++)
        s.max[r] = -INFINITY;
    return s;
}

static struct cut make_cut(const struct pass *p, int l, int n_tok) {
    const bmc_model *m = p->model;
    struct cut c = { .n_tok = n_tok, .n_pieces = 1 };
    bool whole = false;                                     /* chunks left out are not pieces */
    for (int first = 0, n; first < n_tok; first += n, c.n_tasks += m->c.n_kv_heads) {
        n = task_tokens(p, first, n_tok);
        struct task t = make_task(p, l, 0, first, n);
        c.n_rows = larger(c.n_rows, t.n_rows);
        c.n_chunks = larger(c.n_chunks, t.end - t.begin);
        whole |= p->last[first] > 0;
    }
    int wanted = TASKS_EACH * pool_size(m->pool);
    size_t parts = (size_t)c.n_tasks * (size_t)c.n_chunks * sums_size(m, c.n_rows);
    if (!whole && pool_size(m->pool) > 1 && c.n_tasks < wanted && parts <= PART_FLOATS)
        c.n_pieces = smaller(c.n_chunks, (wanted + c.n_tasks - 1) / c.n_tasks);
    return c;
}

/* A chunk's tiles; where it is not full, the last of them again. */
static void find_tiles(const struct pass *p, int l, const struct task *t, int h, int chunk, const uint16_t *tiles[]) {
    int last = p->pos[t->first + t->n_rows / group_size(p->model) - 1] / TILE;
    for (int i = 0; i < CHUNK / TILE; i++)
        tiles[i] = arena_tile(&p->session[t->first]->arena, l, h, smaller(chunk * (CHUNK / TILE) + i, last));
}

/* What is likely to be read next: the head's next chunk, or the next head's first. */
static void find_next_tiles(const struct pass *p, int l, const struct task *t, int chunk, const uint16_t *tiles[]) {
    bool more = chunk + 1 < t->end || t->h + 1 == p->model->c.n_kv_heads;
    find_tiles(p, l, t, more ? t->h : t->h + 1, more ? chunk + 1 : t->begin, tiles);
}

static void attend_chunk(const struct pass *p, int l, const struct task *t, int chunk, struct sums s) {
    const bmc_model *m = p->model;
    const uint16_t *tiles[CHUNK / TILE], *next[CHUNK / TILE];
    int D = m->c.head_dim, group = group_size(m), start = chunk * CHUNK;
    bool fetched = false;
    find_tiles(p, l, t, t->h, chunk, tiles);
    find_next_tiles(p, l, t, chunk, next);
    for (int r = 0; r < t->n_rows;) {
        const float *q[ATTN_ROWS];
        int from[ATTN_ROWS], to[ATTN_ROWS], row = r, taken = 0;
        for (; r < t->n_rows && taken < ATTN_ROWS; r++) {
            int token = t->first + r / group, pos = p->pos[token], low = first_seen(pos, window_of(p, l, token, chunk));
            if (pos < start || low >= start + CHUNK) {      /* sees nothing here; those that do stand together */
                if (taken)
                    break;
                row = r + 1;
                continue;
            }
            q[taken] = m->buffers->q + (size_t)token * padded(m->q_dim) + (t->h * group + r % group) * D;
            from[taken] = low > start ? low - start : 0;
            to[taken++] = smaller(pos + 1 - start, CHUNK);
        }
        if (!taken)
            break;
        m->k.attend(&(struct attn_job){
            .tiles = tiles, .next = fetched ? NULL : next, .head_dim = D, .v_dim = m->v_dim, .n_rows = taken, .q = q,
            .first = from, .limit = to,
            .m = s.max + row, .l = s.sum + row, .o = s.o + (size_t)row * (size_t)m->v_dim,
        });
        fetched = true;
    }
}

/* A task's heads are done: divided, and in 8 bits too where they are whole blocks. */
static void finish_task(const struct pass *p, const struct cut *c, const struct task *t, struct sums s) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int D = m->c.head_dim, group = group_size(m), width = group * D;
    for (int r = 0; r < t->n_rows; r++)
        m->k.attend_end(b->xb + (size_t)(t->first + r / group) * padded(m->q_dim) + t->h * width + r % group * D,
                        s.o + (size_t)r * (size_t)m->v_dim, s.sum[r], D);
    for (int i = 0; width % 32 == 0 && i < t->n_rows / group; i++)
        quantize(p, b->act, b->xb + (size_t)(t->first + i) * padded(m->q_dim), m->q_dim, c->n_tok, t->first + i,
                 t->h * width / 32, (t->h + 1) * width / 32);
}

static void attend(const struct pass *p, const struct cut *c, int l, const struct task *t, float *scratch) {
    struct sums s = empty_sums(p->model, scratch, t->n_rows);
    if (t->begin > 0 && p->last[t->first])
        attend_chunk(p, l, t, 0, s);
    for (int chunk = t->begin; chunk < t->end; chunk++)
        attend_chunk(p, l, t, chunk, s);
    finish_task(p, c, t, s);
}

/* The sums of every chunk of a piece, each on its own. Who finishes a task's last piece merges them all, in order. */
static void attend_piece(const struct pass *p, const struct cut *c, int l, const struct task *t, int piece,
                         float *scratch) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    size_t size = sums_size(m, t->n_rows), v_dim = (size_t)m->v_dim;
    float *parts = b->parts + (size_t)t->number * (size_t)c->n_chunks * sums_size(m, c->n_rows);
    int n = t->end - t->begin, from = n * piece / c->n_pieces, to = n * (piece + 1) / c->n_pieces;
    for (int i = from; i < to; i++)
        attend_chunk(p, l, t, t->begin + i, empty_sums(m, parts + (size_t)i * size, t->n_rows));
    if (atomic_fetch_add(&b->pieces_done[t->number], 1) < c->n_pieces - 1)
        return;
    atomic_store(&b->pieces_done[t->number], 0);
    struct sums s = empty_sums(m, scratch, t->n_rows);
    for (int i = 0; i < n; i++, parts += size)
        for (int r = 0; r < t->n_rows; r++) {
            const float *max = parts + (size_t)t->n_rows * v_dim + r, *sum = max + t->n_rows;
            m->k.attend_merge(&s.max[r], &s.sum[r], s.o + (size_t)r * v_dim, *max, *sum, parts + (size_t)r * v_dim,
                              m->v_dim);
        }
    finish_task(p, c, t, s);
}

/* All tasks or their pieces: which thread does one changes nothing. */
static void attention(const struct pass *p, int l, int n_tok, int thread) {
    const bmc_model *m = p->model;
    const struct cut c = make_cut(p, l, n_tok);
    float *scratch = m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride;
    int64_t from, to;
    while (pool_take(m->pool, thread, (int64_t)c.n_tasks * c.n_pieces, &from, &to))
        for (int first = 0, n = task_tokens(p, 0, n_tok), passed = 0; from < to; from++) {      /* passed: tasks before those of `first` */
            int number = (int)from / c.n_pieces;
            for (; number >= passed + m->c.n_kv_heads; passed += m->c.n_kv_heads) {
                first += n;
                n = task_tokens(p, first, n_tok);
            }
            const struct task t = make_task(p, l, number, first, n);
            if (c.n_pieces > 1)
                attend_piece(p, &c, l, &t, (int)from % c.n_pieces, scratch);
            else
                attend(p, &c, l, &t, scratch);
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
        p->last[i] = p->last[t];
    }
}

/* up = up * act(gate), or act(up) where there is no gate, floats and 8 bits: rows [first, last) of a tile's tokens. */
static void activate(const struct pass *p, const struct layer *L, int first, int last, int n_tok, int tile) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    int F = m->c.hidden_dim, width = tile_width(n_tok), begin = tile * width, end = begin + columns(n_tok, tile, width);
    void (*act)(float *, const float *, const float *, int, const float *) = m->k.act[m->c.act];
    for (int t = begin; t < end; t++) {
        float *up = b->up + (size_t)t * padded(F);
        if (L->ffn_gate.data)
            act(up + first, up + first, b->gate + (size_t)t * padded(F) + first, last - first, NULL);
        else
            act(up + first, NULL, up + first, last - first, NULL);
        quantize(p, b->hidden_act, up, F, n_tok, t, first / 32, last / 32);
    }
}

/* up = W_up x * act(W_gate x), for groups [from, to): their rows meet while they are cached. */
static void gate_up_groups(const struct pass *p, const struct layer *L, struct input in, int from, int to, int n_tok,
                           int thread) {
    const struct buffers *b = p->model->buffers;
    const struct product gate = product(&L->ffn_gate, in.x, in.act, b->gate, false);
    const struct product up = product(&L->ffn_up, in.x, in.act, b->up, false);
    struct matrix gate_part = { 0 };
    int panel = from * GROUP, end = smaller(to * GROUP, n_panels(up.w->n_rows)), row = panel * PANEL_ROWS;
    if (L->ffn_gate.data)
        gate_part = slice(p, gate.w, panel, end, thread, 0);
    const struct matrix up_part = slice(p, up.w, panel, end, thread, 1);
    for (int tile = 0; tile < n_tiles(n_tok); tile++) {
        if (L->ffn_gate.data)
            project(p, &gate, &gate_part, row, n_tok, tile);
        project(p, &up, &up_part, row, n_tok, tile);
        note(p, thread, BMC_STEP_GATE_UP);
        activate(p, L, row, row + (int)up_part.n_rows, n_tok, tile);
        note(p, thread, BMC_STEP_ACTIVATION);
    }
}

static void gate_up(const struct pass *p, const struct layer *L, struct input in, int n_tok, int thread) {
    int64_t from, to;
    while (pool_take(p->model->pool, thread, n_groups(&L->ffn_up), &from, &to))
        for (int step = stretch(&L->ffn_up, n_tok, (int)(to - from)); from < to; from += step)
            gate_up_groups(p, L, in, (int)from, (int)from + step, n_tok, thread);
}

static struct best best_of(const bmc_model *m, const float *logits, int n, int first) {
    float largest = m->k.largest(logits, n);
    struct best best = { .logit = largest, .seen = largest, .sum = m->k.sum_exp(logits, largest, n), .id = first };
    while (best.id < first + n - 1 && logits[best.id - first] != largest)
        best.id++;
    return best;
}

static bool chooses(const struct pass *p, int64_t i) {
    const bmc_span *span = p->out_span[i];
    return span->next || span->logprob || span->n_top;
}

/* Logits of the wanted tokens, HEAD_ROWS of the vocabulary at a time: copied where they are asked for, or only the best
 * of them remembered, so that greedy decoding never writes a vocabulary's worth. */
static void head(const struct pass *p, struct input in, int thread) {
    const bmc_model *m = p->model;
    const struct matrix *output = p->coarse ? &m->coarse : &m->output;
    float *part = m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride;
    int64_t from = 0, to = 0;
    for (; from < to || pool_take(m->pool, thread, head_parts(m), &from, &to); from++) {
        int row = (int)from * HEAD_ROWS, rows = smaller(HEAD_ROWS, m->c.vocab_size - row);
        int panel = row / PANEL_ROWS;
        const struct matrix w = slice(p, output, panel, panel + n_panels(rows), thread, 0);
        const struct product r = { output, in.x, in.act, part, HEAD_ROWS, false };
        for (int tile = 0; tile < n_tiles(p->n_out); tile++)
            project(p, &r, &w, 0, p->n_out, tile);
        for (int i = 0; i < p->n_out; i++) {
            const float *logits = part + (size_t)i * HEAD_ROWS;
            if (p->logits[i])
                memcpy(p->logits[i] + row, logits, (size_t)rows * sizeof *logits);
            if (chooses(p, i))
                p->best[(int64_t)i * head_parts(m) + from] = best_of(m, logits, rows, row);
        }
    }
}

/* Parts that get a second look. With 12, 24, 48 and 64 of them the best of 128k nearly equal logits was found 258, 283, 293 and
 * 293 times of 300. */
enum { LIKED = 48 };

/* The logit that LIKED parts reach, or all of them where there are fewer. */
static float liked_least(const struct best *parts, int n_parts) {
    float top[LIKED];                   /* descending */
    int n = 0;
    for (const struct best *part = parts; part < parts + n_parts; part++) {
        if (n == LIKED && part->seen <= top[LIKED - 1])
            continue;
        int at = n < LIKED ? n++ : LIKED - 1;
        for (; at > 0 && top[at - 1] < part->seen; at--)
            top[at] = top[at - 1];
        top[at] = part->seen;
    }
    return top[n - 1];
}

/* For each wanted token, the LIKED parts whose best the coarse head likes most get that one's true logit, the threads taking
 * turns; what else they sum up to stays coarse. */
static void rescore(const struct pass *p, struct input in, int thread) {
    const bmc_model *m = p->model;
    float *logits = m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride;     /* (n_out, PANEL_ROWS) */
    const struct product r = { &m->output, in.x, in.act, logits, PANEL_ROWS, false };
    int liked = 0;
    for (int i = 0; i < p->n_out; i++) {
        struct best *parts = p->best + (int64_t)i * head_parts(m);
        float least = liked_least(parts, head_parts(m));
        for (struct best *part = parts; part < parts + head_parts(m); part++) {
            if (part->seen < least || liked++ % pool_size(m->pool) != thread)
                continue;
            int panel = part->id / PANEL_ROWS;
            const struct matrix w = slice(p, &m->output, panel, panel + 1, thread, 0);
            project(p, &r, &w, 0, p->n_out, i / tile_width(p->n_out));
            part->logit = logits[i * PANEL_ROWS + part->id % PANEL_ROWS];
        }
    }
}

/* The best of all parts, the first of equals; sum: of e^(logit - best) over all ids, each logit as it is known best. */
static struct best best_of_parts(const struct best *parts, size_t n, double *sum) {
    const struct best *best = parts;
    for (const struct best *part = parts; part < parts + n; part++)
        if (part->logit > best->logit)
            best = part;
    *sum = 0;
    for (const struct best *part = parts; part < parts + n; part++) {
        double seen = exp((double)part->seen - best->logit);
        *sum += part->sum * seen;
        if (part->logit != part->seen)
            *sum += exp((double)part->logit - best->logit) - seen;
    }
    return *best;
}

/* The id that follows a token, chosen by a sampler from logits that bias, penalties and a mask may change first. top: the
 * largest logit. Without a sampler but with a mask it is the largest that is allowed. -1: none is. */
static int32_t chosen(const struct pass *p, int64_t i, float top, float *lead, int thread) {
    static const bmc_sampler best = { .top_k = 1, .top_p = 1, .repeat_penalty = 1 };
    const bmc_model *m = p->model;
    const bmc_span *span = p->out_span[i];
    const bmc_session *session = p->session[i];
    struct candidate *room = (struct candidate *)(void *)(m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride);
    const float *logits = p->logits[i];
    if (sampler_alters(span->sampler, p->mask[i])) {
        float *altered = m->buffers->altered + (size_t)thread * padded(m->c.vocab_size);
        top = sampler_alter(&m->k, span->sampler, p->mask[i], session->tokens, p->pos[i] + 1, logits, m->c.vocab_size, altered, room);
        logits = altered;
    }
    if (!isfinite(top))
        return -1;
    return sample(&m->k, span->sampler ? span->sampler : &best, logits, m->c.vocab_size, top, session->offset + p->pos[i] + 1,
                  span->names, room, lead);
}

/* Each wanted token's next id, the best or the sampler's, its log-probability, and the likeliest ids. */
static void choose(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const size_t n = (size_t)head_parts(m);
    int64_t from, to;
    share(p, thread, p->n_out, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const bmc_span *span = p->out_span[i];
        const int row = p->out_row[i];
        if (!chooses(p, i))
            continue;
        double sum;
        struct best best = best_of_parts(p->best + (size_t)i * n, n, &sum);
        double log_sum = (double)best.logit + log(sum), logprob = -log(sum);
        int32_t id = best.id;
        if ((span->sampler || p->mask[i]) && isfinite(best.logit)) {
            id = chosen(p, i, best.logit, span->lead ? span->lead + row : NULL, thread);
            logprob = id < 0 ? NAN : (double)p->logits[i][id] - best.logit - log(sum);
        }
        if (span->next)
            span->next[row] = id;
        if (span->logprob)
            span->logprob[row] = (float)logprob;
        if (span->n_top)
            likeliest(&m->k, p->logits[i], m->c.vocab_size, span->n_top, log_sum, span->top_ids + (size_t)row * (size_t)span->n_top,
                      span->top_logprobs + (size_t)row * (size_t)span->n_top,
                      (struct candidate *)(void *)(m->buffers->scratch + (size_t)thread * m->buffers->scratch_stride));
    }
}

static void run(void *arg, int thread) {
    struct pass *p = arg;
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const float *post = NULL;                           /* a post norm that waits for the next sum */
    int n_tok = p->n_tok;

    embed(p, thread);
    barrier(p, thread, BMC_STEP_EMBED);
    for (int l = 0; l < m->c.n_layers; l++) {
        const struct layer *L = &m->layers[l];
        struct input in = normed(p, post, L->attn_norm, L->attn_norm_bias, n_tok, thread);
        const struct product qkv[] = { product(&L->attn_q, in.x, in.act, b->q, false),
                                       product(&L->attn_k, in.x, in.act, b->k, false),
                                       product(&L->attn_v, in.x, in.act, b->v, false) };
        multiply(p, qkv, 3, n_tok, thread);
        barrier(p, thread, BMC_STEP_QKV);
        place_rows(p, l, thread);
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
        if (group_size(m) * m->c.head_dim % 32) {
            quantize_all(p, b->xb, m->q_dim, n_tok, thread);
            barrier(p, thread, BMC_STEP_NORM);
        }
        post = L->attn_post_norm;
        const struct product output = product(&L->attn_output, b->xb, b->act, post ? b->y : b->x, !post);
        multiply(p, &output, 1, n_tok, thread);
        barrier(p, thread, BMC_STEP_ATTN_OUTPUT);

        in = normed(p, post, L->ffn_norm, L->ffn_norm_bias, n_tok, thread);
        gate_up(p, L, in, n_tok, thread);
        barrier(p, thread, BMC_STEP_ACTIVATION);
        post = L->ffn_post_norm;
        const struct product down = product(&L->ffn_down, b->up, b->hidden_act, post ? b->y : b->x, !post);
        multiply(p, &down, 1, n_tok, thread);
        barrier(p, thread, BMC_STEP_DOWN);
    }
    const struct input last = normed(p, post, m->output_norm, m->output_norm_bias, n_tok, thread);
    head(p, last, thread);
    barrier(p, thread, BMC_STEP_HEAD);
    if (p->coarse) {
        rescore(p, last, thread);
        barrier(p, thread, BMC_STEP_HEAD);
    }
    choose(p, thread);
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
