/* Attention: every query over the rows of the cache that it sees.
 *
 * It is cut into tasks: a KV head and up to TASK_ROWS queries, rows (token, head of the group), token by
 * token. Where that makes too few for all threads, a task is cut into pieces, runs of chunks of the cache.
 * Chunks are summed up one by one and merged in their order either way: a cut changes nothing. */
#include "pass.h"

#include <math.h>

enum { TASK_ROWS = 64 };

struct cut {
    int n_tok, n_tasks, n_pieces;   /* tokens of the pass, tasks, pieces of each */
    int n_rows, n_chunks;           /* the most queries of a task, and chunks they see */
};

struct task {
    int number, h, first, n_rows;   /* KV head, first token, queries */
    int begin, end;                 /* chunks that they see */
};

/* What chunks sum up to for each query: weighted rows, not divided yet, the largest
 * score, the sum of weights. */
struct sums { float *o, *max, *sum; };

static int group_size(const struct block *b) { return b->c.n_heads / b->c.n_kv_heads; }

static int v_pad(const struct queries *a) { return (int)padded(a->v_dim); }

/* How many tokens from `first` on share a task: the same sequence, side by side. */
static int task_tokens(const struct pass *p, const struct queries *a, int first) {
    int n = 1, most = larger(TASK_ROWS / group_size(a->block), 1);
    while (n < most && first + n < p->n_tok && p->at[first + n].session == p->at[first].session)
        n++;
    return n;
}

/* The rows that a token sees up to itself: its block's, or fewer where the pass says so. The first chunk is
 * exempt: much of a model's attention rests on a text's first tokens (StreamingLLM, arXiv 2309.17453). */
static int window_of(const struct pass *p, const struct block *b, int tok, int chunk) {
    int window = b->c.window, last = p->at[tok].last;
    return chunk && last && (!window || last < window) ? last : window;
}

/* The first row that a token sees in a chunk, and the one after the last. */
static int first_seen(const struct pass *p, const struct block *b, int tok, int chunk) {
    int pos = p->at[tok].pos, window = window_of(p, b, tok, chunk);
    int back = p->model->c.causal ? window - 1 : window / 2;
    return window && pos > back ? pos - back : 0;
}

static int end_seen(const struct pass *p, const struct block *b, int tok) {
    const struct place *at = &p->at[tok];
    return p->model->c.causal || !b->c.window ? at->end : smaller(at->end, at->pos + b->c.window / 2 + 1);
}

static struct task make_task(const struct pass *p, const struct queries *a, int number, int first, int n) {
    const struct block *b = a->block;
    return (struct task){
        .number = number, .h = number % b->c.n_kv_heads, .first = first, .n_rows = n * group_size(b),
        .begin = first_seen(p, b, first, 1) / CHUNK, .end = (end_seen(p, b, first + n - 1) - 1) / CHUNK + 1,
    };
}

/* Floats that the sums of n queries take. */
static size_t sums_size(const struct queries *a, int rows) { return (size_t)rows * ((size_t)v_pad(a) + 2); }

static struct sums empty_sums(const struct queries *a, float *memory, int rows) {
    struct sums s = { .o = memory, .max = memory + (size_t)rows * (size_t)v_pad(a) };
    s.sum = s.max + rows;
    memset(memory, 0, sums_size(a, rows) * sizeof *memory);
    for (int r = 0; r < rows; r++)
        s.max[r] = -INFINITY;
    return s;
}

static struct cut make_cut(const struct pass *p, const struct queries *a) {
    const bmc_model *m = p->model;
    struct cut c = { .n_tok = p->n_tok, .n_pieces = 1 };
    bool whole = false;                                     /* chunks left out are not pieces */
    for (int first = 0, n; first < p->n_tok; first += n, c.n_tasks += a->block->c.n_kv_heads) {
        n = task_tokens(p, a, first);
        struct task t = make_task(p, a, 0, first, n);
        c.n_rows = larger(c.n_rows, t.n_rows);
        c.n_chunks = larger(c.n_chunks, t.end - t.begin);
        whole |= p->at[first].last > 0;
    }
    int most = TASKS_EACH * pool_size(m->pool);
    size_t parts = (size_t)c.n_tasks * (size_t)c.n_chunks * sums_size(a, c.n_rows);
    if (!whole && pool_size(m->pool) > 1 && c.n_tasks < most && parts <= PART_FLOATS)
        c.n_pieces = smaller(c.n_chunks, (most + c.n_tasks - 1) / c.n_tasks);
    return c;
}

/* A chunk's tiles; where it is not full, the last of them again. */
static void find_tiles(const struct pass *p, const struct queries *a, const struct task *t, int h, int chunk,
                       const uint16_t *tiles[]) {
    int last = (p->at[t->first + t->n_rows / group_size(a->block) - 1].end - 1) / TILE;
    for (int i = 0; i < CHUNK / TILE; i++)
        tiles[i] = tile_of(p->at[t->first].session, a->rows, h, smaller(chunk * (CHUNK / TILE) + i, last));
}

/* What is likely to be read next: the head's next chunk, or the next head's first. */
static void find_next_tiles(const struct pass *p, const struct queries *a, const struct task *t, int chunk,
                            const uint16_t *tiles[]) {
    bool more = chunk + 1 < t->end || t->h + 1 == a->block->c.n_kv_heads;
    find_tiles(p, a, t, more ? t->h : t->h + 1, more ? chunk + 1 : t->begin, tiles);
}

/* ALiBi's slope of a head: powers of 2^(-8/n) for the n heads that are a power of two, and
 * for others those between. */
float attend_slope(const bmc_block *c, int head) {
    int n = 1;
    while (2 * n <= c->n_heads)
        n *= 2;
    double power = head < n ? (double)(head + 1) / n : (2.0 * (head - n) + 1) / (2.0 * n);
    return (float)exp2(-(double)c->alibi * power);
}

static void attend_chunk(const struct pass *p, const struct queries *a, const struct task *t, int chunk,
                         struct sums s) {
    const struct block *b = a->block;
    const uint16_t *tiles[CHUNK / TILE], *next[CHUNK / TILE];
    const int group = group_size(b), start = chunk * CHUNK, pad = v_pad(a);
    bool fetched = false;
    find_tiles(p, a, t, t->h, chunk, tiles);
    find_next_tiles(p, a, t, chunk, next);
    for (int r = 0; r < t->n_rows;) {
        const float *q[ATTN_ROWS];
        float slope[ATTN_ROWS];
        int from[ATTN_ROWS], to[ATTN_ROWS], at[ATTN_ROWS], row = r, taken = 0;
        for (; r < t->n_rows && taken < ATTN_ROWS; r++) {
            int token = t->first + r / group, head = t->h * group + r % group;
            int low = first_seen(p, b, token, chunk), high = end_seen(p, b, token);
            /* It sees nothing here; those that do stand together. */
            if (high <= start || low >= start + CHUNK) {
                if (taken)
                    break;
                row = r + 1;
                continue;
            }
            q[taken] = a->q + (size_t)token * a->q_stride + (size_t)head * a->q_pitch;
            at[taken] = p->at[token].pos - start;
            slope[taken] = b->c.alibi > 0 ? attend_slope(&b->c, head) : 0;
            from[taken] = low > start ? low - start : 0;
            to[taken++] = smaller(high - start, CHUNK);
        }
        if (!taken)
            break;
        p->model->k.attend(&(struct attn_job){
            .tiles = tiles, .next = fetched ? NULL : next,
            .head_dim = a->k_dim, .v_dim = pad, .shared = a->shared,
            .n_rows = taken, .q = q, .first = from, .limit = to, .softcap = b->c.attn_softcap,
            .slope = b->c.alibi > 0 ? slope : NULL, .at = at,
            .m = s.max + row, .l = s.sum + row, .o = s.o + (size_t)row * (size_t)pad,
        });
        fetched = true;
    }
}

/* One more score of a head, without a value. */
static void add_sink(const struct pass *p, const struct queries *a, struct sums s, int r, float sink) {
    const float nothing[1024] = { 0 };
    p->model->k.attend_merge(&s.max[r], &s.sum[r], s.o + (size_t)r * (size_t)v_pad(a), sink, 1, nothing,
                             v_pad(a));
}

/* A task's heads are done: divided, through their gates, and in 8 bits too where they are whole blocks. */
static void finish_task(const struct pass *p, const struct queries *a, const struct task *t, struct sums s) {
    const struct kernels *k = &p->model->k;
    const int D = a->v_dim, group = group_size(a->block), width = group * D, all = a->block->c.n_heads * D;
    for (int r = 0; r < t->n_rows; r++) {
        const int head = t->h * group + r % group;
        const size_t token = (size_t)(t->first + r / group);
        float *out = a->out.x + token * padded(all) + (size_t)(head * D);
        if (a->block->attention.sinks.v)
            add_sink(p, a, s, r, a->block->attention.sinks.v[head]);
        k->attend_end(out, s.o + (size_t)r * (size_t)v_pad(a), s.sum[r], D);
        if (!a->gate)
            continue;
        const float *gate = a->gate + token * a->gate_stride + (size_t)head * a->gate_pitch;
        if (a->gate_pitch > 1)
            k->act[a->gate_act](out, out, gate, D, NULL);
        else {
            float factor;
            k->act[a->gate_act](&factor, NULL, gate, 1, NULL);
            k->scale(out, factor, D);
        }
    }
    for (int i = 0; width % 32 == 0 && i < t->n_rows / group; i++)
        quantize(p, a->out, all, t->first + i, t->h * width / 32, (t->h + 1) * width / 32);
}

static void attend(const struct pass *p, const struct queries *a, const struct task *t, float *scratch) {
    struct sums s = empty_sums(a, scratch, t->n_rows);
    if (t->begin > 0 && p->at[t->first].last)
        attend_chunk(p, a, t, 0, s);
    for (int chunk = t->begin; chunk < t->end; chunk++)
        attend_chunk(p, a, t, chunk, s);
    finish_task(p, a, t, s);
}

/* The sums of every chunk of a piece, each on its own. Who finishes a task's last piece
 * merges them all, in order. */
static void attend_piece(const struct pass *p, const struct cut *c, const struct queries *a,
                         const struct task *t, int piece, float *scratch) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    size_t size = sums_size(a, t->n_rows), pad = (size_t)v_pad(a);
    float *parts = b->parts + (size_t)t->number * (size_t)c->n_chunks * sums_size(a, c->n_rows);
    int n = t->end - t->begin, from = n * piece / c->n_pieces, to = n * (piece + 1) / c->n_pieces;
    for (int i = from; i < to; i++)
        attend_chunk(p, a, t, t->begin + i, empty_sums(a, parts + (size_t)i * size, t->n_rows));
    if (atomic_fetch_add(&b->pieces_done[t->number], 1) < c->n_pieces - 1)
        return;
    atomic_store(&b->pieces_done[t->number], 0);
    struct sums s = empty_sums(a, scratch, t->n_rows);
    for (int i = 0; i < n; i++, parts += size)
        for (int r = 0; r < t->n_rows; r++) {
            const float *max = parts + (size_t)t->n_rows * pad + r, *sum = max + t->n_rows;
            m->k.attend_merge(&s.max[r], &s.sum[r], s.o + (size_t)r * pad, *max, *sum,
                              parts + (size_t)r * pad, (int)pad);
        }
    finish_task(p, a, t, s);
}

/* All tasks or their pieces: which thread does one changes nothing. */
static void attend_tasks(const struct pass *p, const struct queries *a, int thread) {
    const struct cut c = make_cut(p, a);
    const int n_heads = a->block->c.n_kv_heads;
    int64_t from, to;
    while (pool_take(p->model->pool, thread, (int64_t)c.n_tasks * c.n_pieces, &from, &to))
        /* passed: tasks before those of `first` */
        for (int first = 0, n = task_tokens(p, a, 0), passed = 0; from < to; from++) {
            int number = (int)from / c.n_pieces;
            for (; number >= passed + n_heads; passed += n_heads) {
                first += n;
                n = task_tokens(p, a, first);
            }
            const struct task t = make_task(p, a, number, first, n);
            if (c.n_pieces > 1)
                attend_piece(p, &c, a, &t, (int)from % c.n_pieces, scratch_of(p, thread));
            else
                attend(p, a, &t, scratch_of(p, thread));
        }
}

void attend_all(struct pass *p, const struct queries *a, int thread) {
    attend_tasks(p, a, thread);
    barrier(p, thread, BMC_STEP_ATTENTION);
    if (group_size(a->block) * a->v_dim % 32) {
        quantize_rows(p, a->out, a->block->c.n_heads * a->v_dim, thread);
        barrier(p, thread, BMC_STEP_NORM);
    }
}

size_t attend_scratch(const struct block *b, int v_dim) {
    size_t rows = (size_t)larger(TASK_ROWS, group_size(b));
    return rows * (padded(v_dim) + 2);
}
