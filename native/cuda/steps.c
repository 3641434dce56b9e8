/* The steps of a pass on a GPU: the arguments of each launch. */
#include "chunk.h"

#include "../error.h"
#include "../layers/recurrent.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct cuda_weights weights(struct vector weight, struct vector bias) {
    return (struct cuda_weights){ weight.v, bias.v };
}

static struct tokens norm(struct pass *p, const struct block *waits, struct vector weight, struct vector bias,
                          bool keep_input, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = p->buffers;
    struct cuda *c = m->cuda;
    struct cuda_norm a = {
        .n_tok = p->n_tok, .dim = m->c.dim, .stride = padded(m->c.dim), .x = b->x, .y = { b->y[0], b->y[1] },
        .scale = { 1, 1 }, .result_scale = 1, .sum_scale = 1, .input = keep_input ? b->input : NULL,
        .norm = weights(weight, bias), .out = b->xb, .act = b->act, .act_stride = p->n_tok, .kind = m->c.norm,
        .eps = m->c.norm_eps,
    };
    (void)thread;
    for (int i = 0; waits && i <= waits->c.beside; i++) {
        const struct block *block = waits - waits->c.beside + i;
        a.post[i] = weights(block->post_norm, block->post_norm_bias);
        a.scale[i] = block->c.scale;
        a.n_waits = i + 1;
    }
    if (waits) {
        a.sum = weights(waits->sum_norm, (struct vector){ 0 });
        a.result = weights(waits->out_norm, waits->out_norm_bias);
        a.sum_scale = waits->c.sum_scale;
        a.result_scale = waits->out_scale.v ? waits->out_scale.v[0] : 1;
    }
    if (waits && waits->c.others) {
        a.others = b->kept + m->c.dim;
        a.others_stride = b->kept_stride;
        a.n_others = waits->c.n_altup - 1;
    }
    cuda_launch(c, c->functions[CUDA_NORM], norm_grid(&a), &a, sizeof a);
    return (struct tokens){ b->xb, b->act, p->n_tok, 0, 0 };
}

/* Tokens [first, first + n) of a product. */
static struct cuda_product product_args(const struct product *r, int first, int n) {
    const struct matrix *w = r->w;
    const size_t wide = padded(r->in.wide ? r->in.wide : w->n_cols);
    return (struct cuda_product){
        .codes = w->codes, .scales = w->scales, .code_stride = w->code_stride,
        .scale_stride = w->scale_stride, .n_rows = (int)w->n_rows, .k = (int)w->n_cols, .n_tok = n,
        .act = r->in.act + (size_t)(r->in.from / 32) * (size_t)r->in.n + first, .act_stride = r->in.n,
        .x = r->in.x + (size_t)first * wide + r->in.from, .x_stride = wide, .bias = w->bias,
        .factor = w->factor, .out = r->y, .out_stride = r->y_stride, .add = r->add,
    };
}

static void launch_product(struct cuda *c, int type, const struct cuda_product *a) {
    const enum cuda_way way = product_way(type, a, c->gpu->mma);
    cuda_launch(c, c->products[way][type], product_grid(way, a), a, sizeof *a);
}

static void multiply_some(struct cuda *c, const struct product *r, int first, int n) {
    const struct cuda_product a = product_args(r, first, n);
    launch_product(c, r->w->type, &a);
}

/* Gate and up, keys and values: one launch where few tokens make the time of a launch, and the
 * multiprocessors that a small matrix leaves idle, a part of the whole. */
static bool together(const struct product *r, const struct product *s) {
    return r->in.n <= GRAPH_TOKENS && s->w->data && r->w->type == s->w->type && r->w->n_rows == s->w->n_rows
           && r->w->n_cols == s->w->n_cols && r->in.act == s->in.act && r->in.x == s->in.x
           && r->in.n == s->in.n && r->in.from == s->in.from && r->in.wide == s->in.wide
           && r->y_stride == s->y_stride && r->add == s->add;
}

static void multiply_two(struct cuda *c, const struct product *r, const struct product *s) {
    struct cuda_product a = product_args(r, 0, r->in.n);
    a.beside = (struct cuda_beside){ s->w->codes, s->w->scales, s->w->bias, s->w->factor, s->y };
    launch_product(c, r->w->type, &a);
}

static void multiply_list(struct pass *p, const struct product *list, int n, int thread) {
    struct cuda *c = p->model->cuda;
    (void)thread;
    for (int i = 0; i < n; i++) {
        if (!list[i].w->data || chunk_multiply(p, list, i))
            continue;
        if (i + 1 < n && together(&list[i], &list[i + 1])) {
            multiply_two(c, &list[i], &list[i + 1]);
            i++;
        } else
            multiply_some(c, &list[i], 0, list[i].in.n);
    }
}

static void gate_up_rows(struct pass *p, const struct gate_up *job, int thread) {
    struct cuda *c = p->model->cuda;
    const struct product list[] = { product(job->gate, job->in, job->gate_out),
                                    product(job->up, job->in, job->hidden.x) };
    struct cuda_activate a = {
        .n_tok = job->in.n, .dim = (int)job->up->n_rows, .kind = job->act, .up = job->hidden.x,
        .gate = job->gate->data ? job->gate_out : NULL, .stride = padded(job->up->n_rows),
        .gate_stride = padded(job->up->n_rows), .act = job->hidden.act, .act_stride = job->in.n,
    };
    memcpy(a.param, job->param, sizeof a.param);
    multiply_list(p, list, 2, thread);
    cuda_launch(c, c->functions[CUDA_ACTIVATE], activate_grid(&a), &a, sizeof a);
}

static void norm_heads(struct pass *p, float *x, int n, struct vector weight, struct vector bias) {
    const bmc_model *m = p->model;
    const struct cuda_norm_rows a = {
        .n_tok = p->n_tok, .n_parts = 1, .n = n, .x = x, .y = x, .x_stride = padded(n), .y_stride = padded(n),
        .norm = weights(weight, bias), .scale = 1, .kind = m->c.norm, .eps = m->c.norm_eps,
    };
    cuda_launch(m->cuda, m->cuda->functions[CUDA_NORM_ROWS], norm_rows_grid(&a), &a, sizeof a);
}

static void norm_tokens(struct pass *p, struct tokens in, int n, struct vector weight, int thread) {
    const bmc_model *m = p->model;
    const struct cuda_norm_rows a = {
        .n_tok = in.n, .n_parts = 1, .n = n, .x = in.x, .y = in.x, .x_stride = padded(n),
        .y_stride = padded(n), .norm = { weight.v, NULL }, .scale = 1, .kind = m->c.norm,
        .eps = m->c.norm_eps, .act = in.act, .act_stride = in.n,
    };
    (void)thread;
    cuda_launch(m->cuda, m->cuda->functions[CUDA_NORM_ROWS], norm_rows_grid(&a), &a, sizeof a);
}

static void quantize_tokens(struct cuda *c, struct tokens in, int k) {
    const struct cuda_quantize a = { in.n, k / 32, in.x, padded(k), in.act, in.n };
    cuda_launch(c, c->functions[CUDA_QUANTIZE], quantize_grid(&a), &a, sizeof a);
}

static void quantize_step(struct pass *p, struct tokens in, int n, int thread) {
    (void)thread;
    quantize_tokens(p->model->cuda, in, n);
}

static const float *put_scales(struct cuda *c, const struct pass *p, const struct block *b) {
    float *list = malloc((size_t)p->n_tok * sizeof *list);
    const float *put_there = NULL;
    for (int t = 0; list && t < p->n_tok; t++)
        list[t] = query_scale(b, p->at[t].pos);
    if (list)
        put_there = cuda_put(c, list, (size_t)p->n_tok * sizeof *list);
    else
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    free(list);
    return put_there;
}

static void place(struct pass *p, const struct block *b, const struct heads *w, int thread) {
    const bmc_model *m = p->model;
    const struct attention *a = &b->attention;
    const struct block *rows = b - b->c.kv_from;
    const struct arena_stream *stream = &m->streams[rows->rows][rows->stream];
    const bool q_whole = a->q_norm.v && a->q_norm.n_cols != b->c.k_dim,
               k_whole = a->k_norm.v && a->k_norm.n_cols != b->c.k_dim;
    const struct vector none = { 0 };
    struct cuda *c = m->cuda;
    (void)thread;
    if (q_whole)
        norm_heads(p, w->q, (int)b->extent[Q], a->q_norm, a->q_norm_bias);
    if (k_whole)
        norm_heads(p, w->k, (int)b->extent[K], a->k_norm, a->k_norm_bias);
    const struct cuda_place args = {
        .n_tok = p->n_tok, .n_heads = b->c.n_heads, .n_kv_heads = b->c.n_kv_heads, .k_dim = b->c.k_dim,
        .v_dim = b->c.v_dim, .q = w->q, .k = b->c.kv_from ? NULL : w->k, .v = a->v.data ? w->v : NULL,
        .q_stride = padded(b->extent[QUERY]), .k_stride = padded(b->extent[K]),
        .v_stride = padded(b->extent[V]), .q_pitch = (size_t)(b->extent[QUERY] / b->c.n_heads), .at = c->at,
        .rows = c->rows[rows->rows - GPU_ROWS], .before = stream->before, .tile_bytes = stream->tile_bytes,
        .cos = c->cos, .sin = c->sin, .turns = m->buffers->turns, .rope_rows = c->rope_rows,
        .rope_dims = c->rope_dims, .rope = b->c.rope, .rope_style = b->c.rope_style,
        .rope_late = b->c.rope_late, .q_norm = weights(q_whole ? none : a->q_norm, a->q_norm_bias),
        .k_norm = weights(k_whole ? none : a->k_norm, a->k_norm_bias),
        .q_norm_pitch = a->q_norm.n_rows > 1 ? (size_t)a->q_norm.n_cols : 0,
        .k_norm_pitch = a->k_norm.n_rows > 1 ? (size_t)a->k_norm.n_cols : 0, .v_norm = b->c.v_norm,
        .scale = b->c.attn_scale, .scales = b->c.scale_ctx > 0 ? put_scales(c, p, b) : NULL,
        .kind = m->c.norm, .eps = m->c.norm_eps,
    };
    cuda_launch(c, c->functions[CUDA_PLACE], place_grid(&args), &args, sizeof args);
}

static void compress(struct pass *p, const struct block *b, const struct latents *w, int thread) {
    const bmc_model *m = p->model;
    const struct arena_stream *stream = &m->streams[b->rows][b->stream];
    const int64_t heads = b->c.n_heads;
    struct cuda *c = m->cuda;
    const struct cuda_place_compressed a = {
        .n_tok = p->n_tok, .n_heads = b->c.n_heads, .nope = (int)b->extent[NOPE], .rank = b->c.kv_rank,
        .turned = (int)b->extent[KV_A] - b->c.kv_rank, .q = w->q, .kv = w->kv, .nopes = w->nope,
        .query = w->query, .q_stride = padded(b->extent[Q]), .kv_stride = padded(b->extent[KV_A]),
        .nopes_stride = padded(heads * b->extent[NOPE]), .query_stride = padded(heads * b->extent[KV_A]),
        .at = {
            .n_tok = p->n_tok, .at = c->at, .rows = c->rows[b->rows - GPU_ROWS], .before = stream->before,
            .tile_bytes = stream->tile_bytes, .cos = c->cos, .sin = c->sin, .turns = m->buffers->turns,
            .rope_rows = c->rope_rows, .rope_dims = c->rope_dims, .rope = b->c.rope,
            .rope_style = b->c.rope_style, .k_norm = { b->attention.kv_a_norm.v, NULL },
            .scale = b->c.attn_scale, .kind = m->c.norm, .eps = m->c.norm_eps,
        },
    };
    (void)thread;
    cuda_launch(c, c->functions[CUDA_COMPRESS], place_compressed_grid(&a), &a, sizeof a);
}

/* Few tasks are cut into chunks of rows, so that all multiprocessors have something to do. */
static bool cut(const struct cuda *c, const struct cuda_attend *a) {
    const struct cuda_grid whole = attend_grid(&(struct cuda_attend){
        .n_tasks = a->n_tasks, .n_heads = a->n_heads, .n_kv_heads = a->n_kv_heads, .direct = 1,
    });
    return a->n_chunks > 1 && whole.x * whole.y < 2 * (unsigned)c->gpu->n_sms
           && attend_parts(a) <= c->part_floats;
}

static void attend_rows(struct pass *p, const struct queries *q, int thread) {
    const bmc_model *m = p->model;
    const struct block *b = q->block;
    const struct arena_stream *stream = &m->streams[q->rows->rows][q->rows->stream];
    const int which = q->rows->rows - GPU_ROWS, width = b->c.n_heads * q->v_dim;
    struct cuda *c = m->cuda;
    const struct cuda_tasks tasks = cuda_put_tasks(c, p, attend_tokens(b->c.n_heads / b->c.n_kv_heads));
    struct cuda_attend a = {
        .n_tasks = tasks.n, .n_tok = p->n_tok, .n_heads = b->c.n_heads, .n_kv_heads = b->c.n_kv_heads,
        .k_dim = q->k_dim, .v_dim = q->v_dim, .shared = q->shared,
        .tasks = tasks.list, .at = c->at, .rows = c->rows[which],
        .before = stream->before, .tile_bytes = stream->tile_bytes, .q = q->q, .q_stride = q->q_stride,
        .q_pitch = q->q_pitch, .window = b->c.window, .causal = m->c.causal, .softcap = b->c.attn_softcap,
        .slopes = c->slopes[b->number], .sinks = b->attention.sinks.v, .n_chunks = c->n_chunks[which],
        .parts = p->buffers->parts, .out = q->out.x, .out_stride = padded(width), .gate = q->gate,
        .gate_stride = q->gate_stride, .gate_pitch = q->gate_pitch, .gate_act = q->gate_act,
        .act = q->v_dim % 32 ? NULL : q->out.act, .act_stride = q->out.n,
    };
    (void)thread;
    a.direct = !cut(c, &a);
    cuda_launch(c, c->functions[CUDA_ATTEND], attend_grid(&a), &a, sizeof a);
    if (!a.direct)
        cuda_launch(c, c->functions[CUDA_ATTEND_MERGE], attend_merge_grid(&a), &a, sizeof a);
    if (a.act)
        return;
    const struct cuda_quantize blocks = {
        p->n_tok, width / 32, q->out.x, padded(width), q->out.act, q->out.n
    };
    cuda_launch(c, c->functions[CUDA_QUANTIZE], quantize_grid(&blocks), &blocks, sizeof blocks);
}

static void keep(struct pass *p, const struct rows *rows, int n, int thread) {
    struct cuda *c = p->model->cuda;
    int32_t *tok = malloc(((size_t)p->n_out + 1) * sizeof *tok);
    const int32_t *list = NULL;
    (void)thread;
    for (int i = 0; tok && i < p->n_out; i++)
        tok[i] = p->out[i].tok;
    if (tok)
        list = cuda_put(c, tok, (size_t)p->n_out * sizeof *tok);
    else
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_out));
    free(tok);
    for (int i = 0; i < n && p->n_out; i++) {
        const struct cuda_keep_rows a = { rows[i].x, rows[i].stride, list, p->n_out };
        if (rows[i].stride)
            cuda_launch(c, c->functions[CUDA_KEEP_ROWS], keep_rows_grid(&a), &a, sizeof a);
    }
    pass_kept(p);
    if (p->n_tok)
        cuda_put_tokens(c, p);
}

/* They wait in y, which is free now, while the head may go on with other rows. */
static void give(struct pass *p, struct tokens in, int thread) {
    const bmc_model *m = p->model;
    struct cuda *c = m->cuda;
    const size_t floats = (size_t)p->n_out * padded(m->c.dim);
    bool wanted = false;
    (void)thread;
    for (int i = 0; i < p->n_out; i++)
        wanted |= p->out[i].hidden || p->out[i].kept;
    if (!wanted)
        return;
    cuda_copy(c, p->buffers->y[0], in.x, floats);
    for (int i = 0; i < p->n_out; i++)
        c->hidden[i] = (struct hidden){ p->out[i].hidden, p->out[i].kept };
    c->n_hidden = p->n_out;
}

/* Logits of SAMPLED_MAX tokens at a time. */
static void logits(struct pass *p, struct tokens in, int thread) {
    const bmc_model *m = p->model;
    struct cuda *c = m->cuda;
    const size_t stride = padded(m->c.vocab_size);
    const struct product r = { &m->output, in, p->buffers->rows, stride, false };
    (void)thread;
    for (int first = 0; first < p->n_out; first += SAMPLED_MAX) {
        const int n = smaller(SAMPLED_MAX, p->n_out - first);
        const struct cuda_best_of a = {
            n,
            m->c.vocab_size,
            p->buffers->rows,
            stride,
            m->c.logit_scale,
            m->c.logit_softcap,
            c->best + (size_t)first * c->n_parts,
        };
        multiply_some(c, &r, first, n);
        cuda_launch(c, c->functions[CUDA_BEST], best_grid(&a), &a, sizeof a);
        for (int i = 0; i < n; i++) {
            const struct wanted *out = &p->out[first + i];
            const float *row = p->buffers->rows + (size_t)i * stride;
            if (out->logits)
                cuda_fetch(c, out->logits, row, (size_t)m->c.vocab_size * sizeof *row);
            if (out->span->given && out->span->given[out->row] >= 0
                && out->span->given[out->row] < m->c.vocab_size)
                cuda_fetch(c, &p->given[first + i], row + out->span->given[out->row], sizeof *row);
        }
    }
    _Static_assert(sizeof(struct best) == sizeof(struct cuda_best), "both say the same");
    cuda_fetch(c, c->results, c->best, (size_t)p->n_out * c->n_parts * sizeof(struct best));
}

/* Blocks with a state. */

static struct cuda_recur recur_of(const struct pass *p, const struct block *b, const struct work *w,
                                  struct tokens out) {
    const bmc_model *m = p->model;
    const struct cuda *c = m->cuda;
    const struct state_size *size = &m->state_sizes[ON_GPU][b->stream];
    const struct recurrent *r = &b->recurrent;
    return (struct cuda_recur){
        .n_tok = p->n_tok, .n_runs = p->n_runs, .runs = c->runs, .run = c->run_of, .at = c->at,
        .state_at = size->at, .state_floats = size->floats, .state_row = size->row,
        .n_before = size->n_before, .row = w->row, .stride = w->stride, .decay = w->decay, .k = w->k,
        .d = w->d, .q = w->q, .v = w->v, .o = w->o, .keys = w->keys, .values = w->values, .beta = w->beta,
        .gate = w->gate, .out = out.x, .beta_stride = w->beta_stride, .gate_stride = w->gate_stride,
        .delta = b->c.kind == BMC_DELTA_NET, .conv = b->c.conv, .n_heads = b->c.n_heads,
        .n_groups = b->c.n_groups, .state_dim = b->c.state_dim, .interleaved = b->c.interleaved,
        .dim = m->c.dim, .weight = r->conv.v, .weight_stride = padded(b->extent[CHANNELS]),
        .conv_bias = r->conv_bias.v, .dt_bias = r->dt_bias.v, .decay_rate = r->a.v, .skip = r->d.v,
        .norm = r->norm.v, .eps = m->c.norm_eps,
    };
}

static void walk(struct pass *p, const struct block *b, const struct recurrence *r, const struct work *w,
                 struct tokens out, int thread) {
    struct cuda *c = p->model->cuda;
    struct cuda_recur a = recur_of(p, b, w, out);
    (void)r, (void)thread;
    a.out_stride = padded(b->extent[INNER]);
    a.v_dim = (int)b->extent[V_DIM];
    cuda_launch(c, c->functions[CUDA_RECUR_PREPARE], recur_prepare_grid(&a), &a, sizeof a);
    cuda_launch(c, c->functions[CUDA_RECUR_WALK], recur_walk_grid(&a), &a, sizeof a);
    cuda_launch(c, c->functions[CUDA_RECUR_FINISH], recur_finish_grid(&a), &a, sizeof a);
    cuda_launch(c, c->functions[CUDA_RECUR_KEEP], recur_keep_grid(&a), &a, sizeof a);
    quantize_tokens(c, out, b->c.inner_dim);
}

static void convolve_rows(struct pass *p, const struct block *b, const struct work *w, struct tokens out,
                          int thread) {
    struct cuda *c = p->model->cuda;
    struct cuda_recur a = recur_of(p, b, w, out);
    (void)thread;
    a.out_stride = padded(p->model->c.dim);
    cuda_launch(c, c->functions[CUDA_SHORT_CONV], short_conv_grid(&a), &a, sizeof a);
    cuda_launch(c, c->functions[CUDA_RECUR_KEEP], recur_keep_grid(&a), &a, sizeof a);
    quantize_tokens(c, out, p->model->c.dim);
}

/* Experts. */

/* An expert block's rows and lists in the work buffers. An entry is a token's expert; all entries of an
 * expert stand together. */
struct mixture {
    float *scores, *x, *gate, *up, *rows, *sum, *weight;
    struct act_block *read_act, *hidden_act, *latent_act;
    int32_t *chosen, *used, *first, *tok, *entry;
};

size_t cuda_mixture_ids(const bmc_model *m, const struct block *b) {
    return 5 * (size_t)m->pass_max * (size_t)b->c.n_active + 2 * (size_t)b->c.n_experts + 64;
}

/* Floats and blocks fit what experts.c needs for the same. */
static struct mixture mixture_of(const struct pass *p, const struct block *b) {
    const struct buffers *buffers = p->buffers;
    const bmc_block *c = &b->c;
    const size_t n = (size_t)p->model->pass_max, entries = n * (size_t)c->n_active,
                 hidden = padded(larger(c->hidden_dim, c->shared_dim));
    const size_t blocks_in = (size_t)b->extent[EXPERT_IN] / 32;
    struct mixture w = { .scores = buffers->work,
                         .read_act = buffers->work_act,
                         .chosen = buffers->work_ids };
    w.x = w.scores + n * padded(c->n_experts);
    w.gate = w.x + n * padded(b->extent[DIM]);
    w.up = w.gate + entries * hidden;
    w.rows = w.up + entries * hidden;
    w.sum = w.rows + entries * padded(b->extent[EXPERT_IN]);
    w.hidden_act = w.read_act + entries * blocks_in;
    w.latent_act = w.hidden_act + entries * (size_t)(larger(c->hidden_dim, c->shared_dim) / 32);
    w.weight = (float *)(void *)(w.chosen + entries);
    w.tok = w.chosen + 2 * entries;
    w.entry = w.tok + entries;
    w.used = w.entry + entries;
    w.first = w.used + c->n_experts;
    return w;
}

/* What the router reads. */
static struct tokens router_input(const struct pass *p, const struct block *b, const struct mixture *w,
                                  struct tokens in) {
    const bmc_model *m = p->model;
    struct cuda *c = m->cuda;
    struct tokens read = { w->x, w->read_act, in.n, 0, 0 };
    if (b->c.route == BMC_ROUTE_NORMED)
        return in;
    if (b->c.route == BMC_ROUTE_LAYER) {
        read.x = p->buffers->input;
        quantize_tokens(c, read, m->c.dim);
        return read;
    }
    const struct cuda_norm_rows a = {
        .n_tok = in.n, .n_parts = 1, .n = m->c.dim, .x = p->buffers->x, .y = w->x,
        .x_stride = padded(m->c.dim), .y_stride = padded(m->c.dim), .scale = 1.0f / sqrtf((float)m->c.dim),
        .factors = b->experts.router_scale.v, .kind = BMC_NORM_RMS, .eps = m->c.norm_eps, .act = w->read_act,
        .act_stride = in.n,
    };
    cuda_launch(c, c->functions[CUDA_NORM_ROWS], norm_rows_grid(&a), &a, sizeof a);
    return read;
}

/* Every token's experts, and every expert's tokens. */
static struct cuda_lists route(struct pass *p, const struct block *b, const struct mixture *w,
                               struct tokens in) {
    const bmc_block *g = &b->c;
    struct cuda *c = p->model->cuda;
    const struct product scores = product(&b->experts.router, router_input(p, b, w, in), w->scores);
    const struct cuda_route chosen = {
        .n_tok = in.n, .n_experts = g->n_experts, .n_active = g->n_active, .scores = w->scores,
        .stride = padded(g->n_experts), .choice_bias = b->experts.choice_bias.v, .gating = g->gating,
        .renorm = g->renorm, .groups = g->expert_groups, .groups_used = g->groups_used,
        .scale = g->expert_scale, .chosen = w->chosen, .weight = w->weight,
    };
    const struct cuda_sort sort = {
        .n_tok = in.n, .n_experts = g->n_experts, .n_active = g->n_active,
        .n_slots = smaller(g->n_experts, in.n * g->n_active), .chosen = w->chosen, .used = w->used,
        .first = w->first, .tok = w->tok, .entry = w->entry,
    };
    multiply_some(c, &scores, 0, in.n);
    cuda_launch(c, c->functions[CUDA_ROUTE], route_grid(&chosen), &chosen, sizeof chosen);
    cuda_launch(c, c->functions[CUDA_SORT], sort_grid(&sort), &sort, sizeof sort);
    return (struct cuda_lists){ w->used, w->first, w->tok, sort.n_slots, in.n };
}

/* Every chosen expert's matrix times its entries; gathers: `in` is the pass's tokens, not entries. */
static void multiply_experts(struct cuda *c, const struct matrix *of, int n_experts, const float *factors,
                             struct tokens in, const struct cuda_lists *lists, bool gathers, float *out) {
    const bool more = n_experts > 1;
    const struct cuda_product a = {
        .codes = of->codes, .scales = of->scales, .code_stride = of->code_stride,
        .scale_stride = of->scale_stride, .n_rows = (int)of->n_rows, .k = (int)of->n_cols, .n_tok = in.n,
        .act = in.act, .act_stride = in.n, .x = in.x, .x_stride = padded(of->n_cols), .bias = of->bias,
        .out = out, .out_stride = padded(of->n_rows), .lists = *lists, .gathers = gathers,
        .expert_codes = more ? (size_t)(of[1].codes - of->codes) : 0,
        .expert_scales = more ? (size_t)(of[1].scales - of->scales) : 0,
        .expert_bias = more && of->bias ? (size_t)(of[1].bias - of->bias) : 0, .factors = factors,
    };
    launch_product(c, of->type, &a);
}

static void activate(struct cuda *c, const bmc_block *b, int n, int dim, float *gate, struct tokens up) {
    struct cuda_activate a = {
        .n_tok = n, .dim = dim, .kind = b->act, .up = up.x, .gate = gate, .stride = padded(dim),
        .gate_stride = padded(dim), .act = up.act, .act_stride = n,
    };
    memcpy(a.param, b->act_param, sizeof a.param);
    cuda_launch(c, c->functions[CUDA_ACTIVATE], activate_grid(&a), &a, sizeof a);
}

/* The expert that is always on, on top of what the others came to. */
static void add_shared(struct pass *p, const struct block *b, const struct mixture *w, struct tokens in,
                       struct sink out) {
    const struct dense *d = &b->experts.shared;
    const struct matrix *gate = &b->experts.shared_gate;
    struct cuda *c = p->model->cuda;
    const struct tokens hidden = { w->up, w->hidden_act, in.n, 0, 0 };
    const struct gate_up job = { &d->gate, &d->up, in, w->gate, hidden, b->c.act, b->c.act_param };
    const struct product switch_on = product(gate, in, w->scores), whole = product(&d->down, hidden, w->x);
    gate_up_rows(p, &job, 0);
    if (!gate->data) {
        const struct product down = product_into(&d->down, hidden, (struct sink){ out.y, true });
        multiply_list(p, &down, 1, 0);
        return;
    }
    const struct cuda_switch a = {
        .n_tok = in.n, .dim = p->model->c.dim, .gate = w->scores, .x = w->x, .y = out.y,
        .gate_stride = padded(1), .x_stride = padded(p->model->c.dim), .y_stride = padded(p->model->c.dim),
    };
    multiply_some(c, &switch_on, 0, in.n);
    multiply_list(p, &whole, 1, 0);
    cuda_launch(c, c->functions[CUDA_SWITCH], switch_grid(&a), &a, sizeof a);
}

static void experts(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    const struct experts *x = &b->experts;
    const bmc_block *g = &b->c;
    struct cuda *c = p->model->cuda;
    const struct mixture w = mixture_of(p, b);
    const struct cuda_lists lists = route(p, b, &w, in);
    const struct expert_factors *factors = &c->factors[b->number];
    const int entries = in.n * g->n_active, width = (int)b->extent[EXPERT_IN];
    const bool latent = x->latent_down.data;
    const struct tokens low = { w.sum, w.latent_act, in.n, 0, 0 }, up = { w.up, w.hidden_act, entries, 0, 0 };
    const struct product to_low = product(&x->latent_down, in, low.x);
    const struct tokens read = latent ? low : in;
    (void)thread;
    if (latent) {
        multiply_some(c, &to_low, 0, in.n);
        quantize_tokens(c, low, g->latent_dim);
    }
    if (x->gate.of)
        multiply_experts(c, x->gate.of, g->n_experts, factors->gate, read, &lists, true, w.gate);
    multiply_experts(c, x->up.of, g->n_experts, factors->up, read, &lists, true, w.up);
    activate(c, g, entries, g->hidden_dim, x->gate.of ? w.gate : NULL, up);
    multiply_experts(c, x->down.of, g->n_experts, factors->down, up, &lists, false, w.rows);
    const struct cuda_combine sum = {
        .n_tok = in.n, .n_active = g->n_active, .dim = width, .add = !latent && out.add, .entry = w.entry,
        .weight = w.weight, .rows = w.rows, .rows_stride = padded(width), .y = latent ? w.x : out.y,
        .y_stride = padded(width),
    };
    cuda_launch(c, c->functions[CUDA_COMBINE], combine_grid(&sum), &sum, sizeof sum);
    if (latent) {
        const struct tokens summed = { w.x, w.latent_act, in.n, 0, 0 };
        const struct product from_low = product_into(&x->latent_up, summed, out);
        quantize_tokens(c, summed, g->latent_dim);
        multiply_some(c, &from_low, 0, in.n);
    }
    if (x->shared.up.data)
        add_shared(p, b, &w, in, out);
}

static void end(const struct pass *p, int thread, enum bmc_step step) { (void)p, (void)thread, (void)step; }

const struct machine cuda_machine = {
    .name = "GPU", .norm = norm, .norm_rows = norm_tokens, .quantize = quantize_step,
    .multiply = multiply_list, .gate_up = gate_up_rows, .place = place, .compress = compress,
    .attend = attend_rows, .keep = keep, .give = give, .head = logits, .recur = walk,
    .short_conv = convolve_rows, .experts = experts, .gate = cuda_gate, .join_per_layer = cuda_join_per_layer,
    .scale_rows = cuda_scale_rows, .add_normed = cuda_add_normed, .altup = cuda_altup, .end = end,
};
