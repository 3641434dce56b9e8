/* The steps of a pass on a GPU. Each only queues launches; cuda_end hands the queue to the driver, as a graph where the same one came
 * before, and waits. What changes from token to token goes over in one copy before, so that a queue stays the same as long as no
 * session gets more rows. */
#include "cuda.h"

#include "../error.h"

#include <stdlib.h>
#include <string.h>

/* The queue. */

static void stop(struct cuda *c, int status) {
    if (!c->status)
        c->status = status;
}

/* Room for one more of n things; false without memory. */
static bool room_for(struct cuda *c, void *list, int n, int *room, size_t size) {
    void **place = list;
    if (n < *room)
        return true;
    void *more = realloc(*place, 2 * (size_t)larger(*room, 64) * size);
    if (!more) {
        stop(c, fail(BMC_ENOMEM, "no memory for the steps of a pass"));
        return false;
    }
    *place = more;
    *room = 2 * larger(*room, 64);
    return true;
}

static struct queued *push(struct cuda *c) {
    if (c->status || !room_for(c, &c->queue, c->n_queued, &c->n_queue, sizeof *c->queue))
        return NULL;
    return memset(&c->queue[c->n_queued++], 0, sizeof *c->queue);
}

static void launch(struct cuda *c, void *function, struct cuda_grid grid, const void *args, size_t bytes) {
    const size_t whole = (bytes + 15) / 16 * 16;
    if (c->status || !grid.x || !grid.y || !grid.z)
        return;
    if (c->arg_bytes + whole > c->args_room) {
        char *more = realloc(c->args, 2 * (c->args_room + whole));
        if (!more) {
            stop(c, fail(BMC_ENOMEM, "no memory for the steps of a pass"));
            return;
        }
        c->args = more;
        c->args_room = 2 * (c->args_room + whole);
    }
    struct queued *q = push(c);
    if (!q)
        return;
    memcpy(c->args + c->arg_bytes, args, bytes);
    memset(c->args + c->arg_bytes + bytes, 0, whole - bytes);
    *q = (struct queued){ .function = function, .grid = grid, .args = (uint32_t)c->arg_bytes, .bytes = (uint32_t)bytes };
    c->arg_bytes += whole;
}

static void copy_rows(struct cuda *c, float *to, const float *from, size_t floats) {
    struct queued *q = push(c);
    if (q)
        *q = (struct queued){ .bytes = (uint32_t)(floats * sizeof *to), .to = cuda_address(to), .from = cuda_address(from) };
}

static void fetch(struct cuda *c, void *to, const void *from, size_t bytes) {
    if (!c->status && room_for(c, &c->fetches, c->n_fetches, &c->n_fetch, sizeof *c->fetches))
        c->fetches[c->n_fetches++] = (struct fetched){ to, cuda_address(from), bytes, c->n_queued };
}

/* Bytes that go over with the pass; where they will be. There is room: cuda_begin counted. */
static const void *put(struct cuda *c, const void *data, size_t bytes) {
    const size_t at = (c->host_used + 63) / 64 * 64;
    if (c->status)
        return NULL;
    if (at + bytes > c->device_bytes) {
        stop(c, fail(BMC_EDEVICE, "a pass brings more with it than was counted: %zu of %zu bytes", at + bytes, c->device_bytes));
        return NULL;
    }
    memcpy(c->host + at, data, bytes);
    c->host_used = at + bytes;
    return c->device + at;
}

/* What the tokens of the pass are. */

static int number_of(struct cuda *c, bmc_session *s) {
    for (int i = c->n_sessions - 1; i >= 0; i--)
        if (c->sessions[i] == s)
            return i;
    c->sessions[c->n_sessions] = s;
    return c->n_sessions++;
}

static void put_tokens(struct cuda *c, const struct pass *p) {
    struct cuda_token *list = malloc((size_t)p->n_tok * sizeof *list);
    if (!list) {
        stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
        return;
    }
    for (int t = 0; t < p->n_tok; t++) {
        const struct place *at = &p->at[t];
        list[t] = (struct cuda_token){ at->pos, at->end, at->last, number_of(c, at->session), at->session->rope };
    }
    c->at = put(c, list, (size_t)p->n_tok * sizeof *list);
    c->n_tasks = 0;
    free(list);
}

/* Where the rows of all sessions are. */
static void put_rows(struct cuda *c) {
    struct cuda_rows *list = malloc((size_t)c->n_sessions * sizeof *list);
    for (int i = 0; list && i < 2; i++) {
        int64_t most = 0;
        for (int s = 0; s < c->n_sessions; s++) {
            const struct arena *a = &c->sessions[s]->arenas[GPU_ROWS + i];
            list[s] = (struct cuda_rows){ put(c, a->segments, (size_t)a->n_segments * sizeof *a->segments), a->segment_tiles };
            most = a->rows_reserved > most ? a->rows_reserved : most;
        }
        c->rows[i] = put(c, list, (size_t)c->n_sessions * sizeof *list);
        c->n_chunks[i] = (int)((most + CHUNK - 1) / CHUNK);
    }
    if (!list)
        stop(c, fail(BMC_ENOMEM, "no memory for %d sessions", c->n_sessions));
    free(list);
}

static void put_turns(struct cuda *c, const struct pass *p) {
    const bmc_model *m = p->model;
    const size_t row = (size_t)m->buffers->turns, n = (size_t)p->n_tok * row, all = (size_t)m->pass_max * row;
    const float *from[] = { m->buffers->cos, m->buffers->sin };
    const float **to[] = { &c->cos, &c->sin };
    float *values = malloc(((size_t)m->c.n_ropes * n + 1) * sizeof *values);
    for (int i = 0; values && i < 2; i++) {
        for (size_t table = 0; table < (size_t)m->c.n_ropes; table++)
            memcpy(values + table * n, from[i] + table * all, n * sizeof *values);
        *to[i] = put(c, values, (size_t)m->c.n_ropes * n * sizeof *values);
    }
    c->rope_rows = p->n_tok;
    if (!values)
        stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    free(values);
}

/* Queries side by side of one session, as many as a block of threads takes. */
static struct cuda_tasks put_tasks(struct cuda *c, const struct pass *p, int size) {
    for (int i = 0; i < c->n_tasks; i++)
        if (c->tasks[i].size == size)
            return c->tasks[i];
    struct cuda_task *list = malloc((size_t)p->n_tok * sizeof *list);
    struct cuda_tasks made = { .size = size };
    for (int t = 0, n; list && t < p->n_tok; t += n) {
        for (n = 1; n < size && t + n < p->n_tok && p->at[t + n].session == p->at[t].session; n++)
            ;
        list[made.n++] = (struct cuda_task){ t, n };
    }
    if (!list)
        stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    else
        made.list = put(c, list, (size_t)made.n * sizeof *list);
    free(list);
    if (c->n_tasks < (int)(sizeof c->tasks / sizeof *c->tasks))
        c->tasks[c->n_tasks++] = made;
    return made;
}

/* The steps. */

static struct cuda_weights weights(struct vector weight, struct vector bias) { return (struct cuda_weights){ weight.v, bias.v }; }

static struct tokens norm(struct pass *p, const struct block *waits, struct vector weight, struct vector bias, bool keep_input, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = p->buffers;
    struct cuda *c = m->cuda;
    struct cuda_norm a = {
        .n_tok = p->n_tok, .dim = m->c.dim, .stride = padded(m->c.dim), .x = b->x, .y = { b->y[0], b->y[1] }, .scale = { 1, 1 }, .result_scale = 1,
        .input = keep_input ? b->input : NULL, .norm = weights(weight, bias), .out = b->xb, .act = b->act, .act_stride = p->n_tok,
        .kind = m->c.norm, .eps = m->c.norm_eps,
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
        a.result_scale = waits->out_scale.v ? waits->out_scale.v[0] : 1;
    }
    launch(c, c->functions[CUDA_NORM], norm_grid(&a), &a, sizeof a);
    return (struct tokens){ b->xb, b->act, p->n_tok, 0, 0 };
}

/* Tokens [first, first + n) of a product. */
static void multiply_some(struct cuda *c, const struct product *r, int first, int n) {
    const struct matrix *w = r->w;
    const struct cuda_product a = {
        .codes = w->codes, .scales = w->scales, .code_stride = w->code_stride, .scale_stride = w->scale_stride,
        .n_rows = (int)w->n_rows, .k = (int)w->n_cols, .n_tok = n, .act = r->in.act + first, .act_stride = r->in.n,
        .x = r->in.x + (size_t)first * padded(w->n_cols), .x_stride = padded(w->n_cols), .bias = w->bias, .factor = w->factor,
        .out = r->y, .out_stride = r->y_stride, .add = r->add,
    };
    const enum cuda_way way = product_way(w->type, &a, c->gpu->mma);
    launch(c, c->products[way][w->type], product_grid(way, &a), &a, sizeof a);
}

static void multiply_list(struct pass *p, const struct product *list, int n, int thread) {
    (void)thread;
    for (int i = 0; i < n; i++)
        if (list[i].w->data)
            multiply_some(p->model->cuda, &list[i], 0, list[i].in.n);
}

static void gate_up_rows(struct pass *p, const struct gate_up *job, int thread) {
    struct cuda *c = p->model->cuda;
    const struct product list[] = { product(job->gate, job->in, job->gate_out), product(job->up, job->in, job->hidden.x) };
    struct cuda_activate a = {
        .n_tok = job->in.n, .dim = (int)job->up->n_rows, .kind = job->act, .up = job->hidden.x, .gate = job->gate->data ? job->gate_out : NULL,
        .stride = padded(job->up->n_rows), .gate_stride = padded(job->up->n_rows), .act = job->hidden.act, .act_stride = job->in.n,
    };
    memcpy(a.param, job->param, sizeof a.param);
    multiply_list(p, list, 2, thread);
    launch(c, c->functions[CUDA_ACTIVATE], activate_grid(&a), &a, sizeof a);
}

static void norm_heads(struct pass *p, float *x, int n, struct vector weight, struct vector bias) {
    const bmc_model *m = p->model;
    const struct cuda_norm_rows a = {
        .n_tok = p->n_tok, .n_parts = 1, .n = n, .x = x, .y = x, .x_stride = padded(n), .y_stride = padded(n), .norm = weights(weight, bias), .scale = 1,
        .kind = m->c.norm, .eps = m->c.norm_eps,
    };
    launch(m->cuda, m->cuda->functions[CUDA_NORM_ROWS], norm_rows_grid(&a), &a, sizeof a);
}

static const float *put_scales(struct cuda *c, const struct pass *p, const struct block *b) {
    float *list = malloc((size_t)p->n_tok * sizeof *list);
    const float *put_there = NULL;
    for (int t = 0; list && t < p->n_tok; t++)
        list[t] = query_scale(b, p->at[t].pos);
    if (list)
        put_there = put(c, list, (size_t)p->n_tok * sizeof *list);
    else
        stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    free(list);
    return put_there;
}

static void place(struct pass *p, const struct block *b, const struct heads *w, int thread) {
    const bmc_model *m = p->model;
    const struct attention *a = &b->attention;
    const struct block *rows = b - b->c.kv_from;
    const struct arena_stream *stream = &m->streams[rows->rows][rows->stream];
    const bool q_whole = a->q_norm.v && a->q_norm.n_cols != b->c.k_dim, k_whole = a->k_norm.v && a->k_norm.n_cols != b->c.k_dim;
    const struct vector none = { 0 };
    struct cuda *c = m->cuda;
    (void)thread;
    if (q_whole)
        norm_heads(p, w->q, (int)b->extent[Q], a->q_norm, a->q_norm_bias);
    if (k_whole)
        norm_heads(p, w->k, (int)b->extent[K], a->k_norm, a->k_norm_bias);
    const struct cuda_place args = {
        .n_tok = p->n_tok, .n_heads = b->c.n_heads, .n_kv_heads = b->c.n_kv_heads, .k_dim = b->c.k_dim, .v_dim = b->c.v_dim,
        .q = w->q, .k = b->c.kv_from ? NULL : w->k, .v = a->v.data ? w->v : NULL, .q_stride = padded(b->extent[QUERY]), .k_stride = padded(b->extent[K]),
        .v_stride = padded(b->extent[V]), .q_pitch = (size_t)(b->extent[QUERY] / b->c.n_heads), .at = c->at, .rows = c->rows[rows->rows - GPU_ROWS],
        .before = stream->before, .tile_bytes = stream->tile_bytes, .cos = c->cos, .sin = c->sin, .turns = m->buffers->turns, .rope_rows = c->rope_rows,
        .rope_dims = c->rope_dims, .rope = b->c.rope, .rope_style = b->c.rope_style, .rope_late = b->c.rope_late,
        .q_norm = weights(q_whole ? none : a->q_norm, a->q_norm_bias), .k_norm = weights(k_whole ? none : a->k_norm, a->k_norm_bias),
        .q_norm_pitch = a->q_norm.n_rows > 1 ? (size_t)a->q_norm.n_cols : 0, .k_norm_pitch = a->k_norm.n_rows > 1 ? (size_t)a->k_norm.n_cols : 0,
        .v_norm = b->c.v_norm, .scale = b->c.attn_scale, .scales = b->c.scale_ctx > 0 ? put_scales(c, p, b) : NULL,
        .kind = m->c.norm, .eps = m->c.norm_eps,
    };
    launch(c, c->functions[CUDA_PLACE], place_grid(&args), &args, sizeof args);
}

/* Few tasks are cut into chunks of rows, so that all multiprocessors have something to do. */
static bool cut(const struct cuda *c, const struct cuda_attend *a) {
    const struct cuda_grid whole = attend_grid(&(struct cuda_attend){
        .n_tasks = a->n_tasks, .n_heads = a->n_heads, .n_kv_heads = a->n_kv_heads, .direct = 1,
    });
    return a->n_chunks > 1 && whole.x * whole.y < 2 * (unsigned)c->gpu->n_sms && attend_parts(a) <= c->part_floats;
}

static void attend_rows(struct pass *p, const struct queries *q, int thread) {
    const bmc_model *m = p->model;
    const struct block *b = q->block;
    const struct arena_stream *stream = &m->streams[q->rows->rows][q->rows->stream];
    const int which = q->rows->rows - GPU_ROWS, width = b->c.n_heads * q->v_dim;
    struct cuda *c = m->cuda;
    const struct cuda_tasks tasks = put_tasks(c, p, attend_tokens(b->c.n_heads / b->c.n_kv_heads));
    struct cuda_attend a = {
        .n_tasks = tasks.n, .n_tok = p->n_tok, .n_heads = b->c.n_heads, .n_kv_heads = b->c.n_kv_heads, .k_dim = q->k_dim, .v_dim = q->v_dim,
        .tasks = tasks.list, .at = c->at, .rows = c->rows[which], .before = stream->before, .tile_bytes = stream->tile_bytes,
        .q = q->q, .q_stride = q->q_stride, .q_pitch = q->q_pitch, .window = b->c.window, .causal = m->c.causal, .softcap = b->c.attn_softcap,
        .slopes = c->slopes[b->number], .sinks = b->attention.sinks.v, .n_chunks = c->n_chunks[which], .parts = p->buffers->parts,
        .out = q->out.x, .out_stride = padded(width), .gate = q->gate, .gate_stride = q->gate_stride, .gate_pitch = q->gate_pitch, .gate_act = q->gate_act,
        .act = q->v_dim % 32 ? NULL : q->out.act, .act_stride = q->out.n,
    };
    (void)thread;
    a.direct = !cut(c, &a);
    launch(c, c->functions[CUDA_ATTEND], attend_grid(&a), &a, sizeof a);
    if (!a.direct)
        launch(c, c->functions[CUDA_ATTEND_MERGE], attend_merge_grid(&a), &a, sizeof a);
    if (a.act)
        return;
    const struct cuda_quantize blocks = { p->n_tok, width / 32, q->out.x, padded(width), q->out.act, q->out.n };
    launch(c, c->functions[CUDA_QUANTIZE], quantize_grid(&blocks), &blocks, sizeof blocks);
}

static void keep(struct pass *p, const struct rows *rows, int n, int thread) {
    struct cuda *c = p->model->cuda;
    int32_t *tok = malloc(((size_t)p->n_out + 1) * sizeof *tok);
    const int32_t *list = NULL;
    (void)thread;
    for (int i = 0; tok && i < p->n_out; i++)
        tok[i] = p->out[i].tok;
    if (tok)
        list = put(c, tok, (size_t)p->n_out * sizeof *tok);
    else
        stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_out));
    free(tok);
    for (int i = 0; i < n && p->n_out; i++) {
        const struct cuda_keep_rows a = { rows[i].x, rows[i].stride, list, p->n_out };
        if (rows[i].stride)
            launch(c, c->functions[CUDA_KEEP_ROWS], keep_rows_grid(&a), &a, sizeof a);
    }
    pass_kept(p);
    if (p->n_tok)
        put_tokens(c, p);
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
    copy_rows(c, p->buffers->y[0], in.x, floats);
    for (int i = 0; i < p->n_out; i++)
        c->hidden[i] = (struct hidden){ p->out[i].hidden, p->out[i].kept };
    c->n_hidden = p->n_out;
}

static float *hidden_results(const bmc_model *m) {
    return (float *)(void *)(m->cuda->results + (size_t)m->pass_max * m->cuda->n_parts * sizeof(struct best));
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
            n, m->c.vocab_size, p->buffers->rows, stride, m->c.logit_scale, m->c.logit_softcap, c->best + (size_t)first * c->n_parts,
        };
        multiply_some(c, &r, first, n);
        launch(c, c->functions[CUDA_BEST], best_grid(&a), &a, sizeof a);
        for (int i = 0; i < n; i++) {
            const struct wanted *out = &p->out[first + i];
            const float *row = p->buffers->rows + (size_t)i * stride;
            if (out->logits)
                fetch(c, out->logits, row, (size_t)m->c.vocab_size * sizeof *row);
            if (out->span->given && out->span->given[out->row] >= 0 && out->span->given[out->row] < m->c.vocab_size)
                fetch(c, &p->given[first + i], row + out->span->given[out->row], sizeof *row);
        }
    }
    _Static_assert(sizeof(struct best) == sizeof(struct cuda_best), "both say the same");
    fetch(c, c->results, c->best, (size_t)p->n_out * c->n_parts * sizeof(struct best));
}

static void end(const struct pass *p, int thread, enum bmc_step step) { (void)p, (void)thread, (void)step; }

const struct machine cuda_machine = {
    .name = "GPU", .norm = norm, .multiply = multiply_list, .gate_up = gate_up_rows, .place = place, .attend = attend_rows, .keep = keep, .give = give,
    .head = logits, .end = end,
};

/* The pass. */

/* Room for what it brings with it. Whoever had addresses there is gone: a queue that has them never comes again. */
static int make_room(struct cuda *c, const struct pass *p) {
    const bmc_model *m = p->model;
    const size_t scaled = 2 * (size_t)m->c.n_blocks * sizeof(float), turns = 2 * (size_t)(m->c.n_ropes * m->buffers->turns) * sizeof(float);
    size_t each = 2 * sizeof(struct cuda_token) + 8 * sizeof(struct cuda_task) + 2 * sizeof(int32_t) + 2 * sizeof(struct cuda_rows) + scaled + turns + 4 * 64;
    size_t bytes = (size_t)p->n_tok * each + 64 * (size_t)(m->c.n_blocks + 64);
    for (int i = 0; i < c->n_sessions; i++)
        for (int j = GPU_ROWS; j < ARENAS; j++)
            bytes += (size_t)c->sessions[i]->arenas[j].n_segments * sizeof(char *) + 64;
    const size_t x = (size_t)p->n_tok * padded(m->c.dim) * sizeof(float);
    const struct cuda_driver *cu = c->gpu->cu;
    int status = 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes > c->device_bytes) {
        void *memory;
        gpu_free(c->gpu, c->device);
        c->device = NULL;
        c->device_bytes = 0;
        status = gpu_alloc(c->gpu, 2 * bytes, "what a pass brings with it", &memory);
        if (status)
            return status;
        c->device = memory;
        c->device_bytes = 2 * bytes;
    }
    if (c->device_bytes + x <= c->host_bytes)
        return 0;
    if (c->host)
        cu->cuMemFreeHost(c->host);
    c->host = NULL;
    c->host_bytes = 0;
    void *memory = NULL;
    status = cuda_status(c->gpu->index, "pinned memory", cu->cuMemHostAlloc(&memory, c->device_bytes + x, 0));
    if (!status) {
        c->host = memory;
        c->host_bytes = c->device_bytes + x;
    }
    return status;
}

void cuda_begin(struct pass *p) {
    struct cuda *c = p->model->cuda;
    c->n_queued = c->n_fetches = c->n_sessions = c->n_hidden = 0;
    c->arg_bytes = c->host_used = 0;
    c->n_began = p->n_tok;
    c->n_passes++;
    p->machine = &cuda_machine;
    p->buffers = &c->buffers;
    for (int t = 0; t < p->n_tok; t++)
        if (!t || p->at[t].session != p->at[t - 1].session)
            number_of(c, p->at[t].session);
    c->status = gpu_enter(c->gpu);
    if (!c->status)
        c->status = make_room(c, p);
    if (c->status)
        return;
    put_tokens(c, p);
    put_turns(c, p);
    put_rows(c);
}

static int check(const struct cuda *c, const char *what, int code) { return cuda_status(c->gpu->index, what, code); }

static int send(const struct cuda *c, const struct pass *p) {
    const size_t bytes = (size_t)c->n_began * padded(p->model->c.dim) * sizeof(float);
    char *x = c->host + c->device_bytes;
    memcpy(x, p->model->buffers->x, bytes);
    int status = check(c, "sending", c->gpu->cu->cuMemcpyHtoDAsync_v2(cuda_address(c->device), c->host, c->host_used, c->stream));
    return status ? status : check(c, "sending", c->gpu->cu->cuMemcpyHtoDAsync_v2(cuda_address(c->buffers.x), x, bytes, c->stream));
}

static int queue_one(const struct cuda *c, const struct queued *q) {
    const struct cuda_driver *cu = c->gpu->cu;
    if (!q->function)
        return check(c, "copying", cu->cuMemcpyDtoDAsync_v2(q->to, q->from, q->bytes, c->stream));
    void *args[] = { c->args + q->args };
    return check(c, "launching a kernel", cu->cuLaunchKernel(q->function, q->grid.x, q->grid.y, q->grid.z, q->grid.threads, 1, 1, 0, c->stream, args, NULL));
}

/* All that is queued, results as soon as they are there. */
static int queue_all(const struct cuda *c) {
    const struct fetched *f = c->fetches, *last = f + c->n_fetches;
    int status = 0;
    for (int i = 0; i <= c->n_queued && !status; i++) {
        for (; f < last && f->after == i && !status; f++)
            status = check(c, "fetching", c->gpu->cu->cuMemcpyDtoHAsync_v2(f->to, f->from, f->bytes, c->stream));
        if (i < c->n_queued && !status)
            status = queue_one(c, &c->queue[i]);
    }
    return status;
}

/* Graphs. */

static uint64_t hash_of(uint64_t hash, const void *bytes, size_t n) {
    const unsigned char *from = bytes;
    uint64_t word;
    for (; n >= sizeof word; n -= sizeof word, from += sizeof word) {
        memcpy(&word, from, sizeof word);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    for (; n; n--)
        hash = (hash ^ *from++) * 0x100000001b3u;
    return hash;
}

static void drop(const struct cuda *c, struct graph *g) {
    if (g->program)
        c->gpu->cu->cuGraphExecDestroy(g->program);
    free(g->queue);
    free(g->args);
    *g = (struct graph){ 0 };
}

static struct graph *find_graph(struct cuda *c, uint64_t hash) {
    for (struct graph *g = c->graphs; g < c->graphs + GRAPHS; g++)
        if (g->program && g->hash == hash && g->n == c->n_queued && g->arg_bytes == c->arg_bytes
            && !memcmp(g->queue, c->queue, (size_t)g->n * sizeof *g->queue) && !memcmp(g->args, c->args, g->arg_bytes))
            return g;
    return NULL;
}

/* What is queued becomes a graph, in the place of the one that was not used for longest. */
static int make_graph(struct cuda *c, uint64_t hash, struct graph **made) {
    const struct cuda_driver *cu = c->gpu->cu;
    struct graph *g = c->graphs, new = { .n = c->n_queued, .arg_bytes = c->arg_bytes, .hash = hash };
    void *captured = NULL;
    for (struct graph *other = c->graphs; other < c->graphs + GRAPHS; other++)
        if (other->used < g->used)
            g = other;
    int status = check(c, "capturing a graph", cu->cuStreamBeginCapture_v2(c->stream, 1));
    if (status)
        return status;
    for (int i = 0; i < c->n_queued && !status; i++)
        status = queue_one(c, &c->queue[i]);
    const int ended = check(c, "capturing a graph", cu->cuStreamEndCapture(c->stream, &captured));
    status = status ? status : ended;
    if (!status)
        status = check(c, "making a graph", cu->cuGraphInstantiateWithFlags(&new.program, captured, 0));
    if (captured)
        cu->cuGraphDestroy(captured);
    if (status)
        return status;
    new.queue = malloc((size_t)c->n_queued * sizeof *new.queue);
    new.args = malloc(c->arg_bytes);
    if (!new.queue || !new.args) {
        drop(c, &new);
        return fail(BMC_ENOMEM, "no memory for a graph of %d steps", c->n_queued);
    }
    memcpy(new.queue, c->queue, (size_t)c->n_queued * sizeof *new.queue);
    memcpy(new.args, c->args, c->arg_bytes);
    drop(c, g);
    *g = new;
    *made = g;
    return 0;
}

/* A queue that comes a second time becomes a graph; false: it is none yet, and nothing has happened. */
static bool as_graph(struct cuda *c, int *status) {
    const bool last = !c->n_fetches || c->fetches[0].after == c->n_queued;
    if (c->n_began > GRAPH_TOKENS || !last || !c->n_queued)
        return false;
    const uint64_t hash = hash_of(hash_of(0, c->queue, (size_t)c->n_queued * sizeof *c->queue), c->args, c->arg_bytes);
    const bool again = c->last_hash[c->n_began] == hash;
    struct graph *g = find_graph(c, hash);
    c->last_hash[c->n_began] = hash;
    if (!g && !again)
        return false;
    *status = g ? 0 : make_graph(c, hash, &g);
    if (*status)
        return true;
    g->used = c->n_passes;
    *status = check(c, "launching a graph", c->gpu->cu->cuGraphLaunch(g->program, c->stream));
    for (int i = 0; i < c->n_fetches && !*status; i++)
        *status = check(c, "fetching", c->gpu->cu->cuMemcpyDtoHAsync_v2(c->fetches[i].to, c->fetches[i].from, c->fetches[i].bytes, c->stream));
    return true;
}

/* Results to whom they are for. */
static void hand_out(const struct pass *p) {
    const bmc_model *m = p->model;
    const struct cuda *c = m->cuda;
    const size_t stride = padded(m->c.dim), dim = (size_t)m->c.dim;
    for (int i = 0; i < c->n_hidden; i++) {
        const float *x = hidden_results(m) + (size_t)i * stride;
        if (c->hidden[i].hidden)
            memcpy(c->hidden[i].hidden, x, dim * sizeof *x);
        if (c->hidden[i].kept)
            memcpy(c->hidden[i].kept, x, dim * sizeof *x);
    }
    if (p->n_choosing)
        memcpy(p->best, c->results, (size_t)p->n_out * c->n_parts * sizeof *p->best);
}

/* Results may still be on their way to memory of the caller's after a failure: it waits in any case. */
int cuda_end(struct pass *p) {
    const bmc_model *m = p->model;
    struct cuda *c = m->cuda;
    if (c->n_hidden)
        fetch(c, hidden_results(m), c->buffers.y[0], (size_t)c->n_hidden * padded(m->c.dim) * sizeof(float));
    int status = c->status;
    if (status)
        return status;
    status = send(c, p);
    if (!status && !as_graph(c, &status))
        status = queue_all(c);
    const int ended = c->gpu->cu->cuStreamSynchronize(c->stream);
    if (!status)
        status = check(c, "computing", ended);
    if (!status)
        hand_out(p);
    return status;
}

void cuda_drop_queue(struct cuda *c, bool alive) {
    for (struct graph *g = c->graphs; g < c->graphs + GRAPHS; g++) {
        if (!alive)
            g->program = NULL;
        drop(c, g);
    }
    free(c->queue);
    free(c->fetches);
    free(c->args);
}
