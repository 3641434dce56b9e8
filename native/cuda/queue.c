/* The queue of a pass on a GPU. Steps only queue launches; cuda_end hands the queue to the driver, as a graph
 * where the same one came before, and waits. What changes from token to token goes over in one copy before,
 * so that a queue stays the same as long as no session gets more rows. */
#include "cuda.h"

#include "../error.h"

#include <stdlib.h>
#include <string.h>

void cuda_stop(struct cuda *c, int status) {
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
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for the steps of a pass"));
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

/* A function with its arguments. */
static void push_call(struct cuda *c, void *function, struct cuda_grid grid, const void *args, size_t bytes) {
    const size_t whole = (bytes + 15) / 16 * 16;
    if (c->status)
        return;
    if (c->arg_bytes + whole > c->args_room) {
        char *more = realloc(c->args, 2 * (c->args_room + whole));
        if (!more) {
            cuda_stop(c, fail(BMC_ENOMEM, "no memory for the steps of a pass"));
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
    *q = (struct queued){
        .function = function, .grid = grid, .args = (uint32_t)c->arg_bytes, .bytes = (uint32_t)bytes
    };
    c->arg_bytes += whole;
}

void cuda_launch(struct cuda *c, void *function, struct cuda_grid grid, const void *args, size_t bytes) {
    if (grid.x && grid.y && grid.z)
        push_call(c, function, grid, args, bytes);
}

void cuda_multiply(struct cuda *c, struct cublas *blas, const struct cublas_product *p) {
    push_call(c, blas, (struct cuda_grid){ 0 }, p, sizeof *p);
}

void cuda_copy(struct cuda *c, float *to, const float *from, size_t floats) {
    struct queued *q = push(c);
    if (q)
        *q = (struct queued){ .bytes = (uint32_t)(floats * sizeof *to),
                              .to = cuda_address(to),
                              .from = cuda_address(from) };
}

void cuda_fetch(struct cuda *c, void *to, const void *from, size_t bytes) {
    if (!c->status && room_for(c, &c->fetches, c->n_fetches, &c->n_fetch, sizeof *c->fetches))
        c->fetches[c->n_fetches++] = (struct fetched){ to, cuda_address(from), bytes, c->n_queued };
}

/* Bytes that go over with the pass; where they will be. There is room: cuda_begin counted. */
const void *cuda_put(struct cuda *c, const void *data, size_t bytes) {
    const size_t at = (c->host_used + 63) / 64 * 64;
    if (c->status)
        return NULL;
    if (at + bytes > c->device_bytes) {
        cuda_stop(c, fail(BMC_EDEVICE, "a pass brings more with it than was counted: %zu of %zu bytes",
                          at + bytes, c->device_bytes));
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

void cuda_put_tokens(struct cuda *c, const struct pass *p) {
    struct cuda_token *list = malloc((size_t)p->n_tok * sizeof *list);
    if (!list) {
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
        return;
    }
    for (int t = 0; t < p->n_tok; t++) {
        const struct place *at = &p->at[t];
        list[t] =
            (struct cuda_token){ at->pos, at->end, at->last, number_of(c, at->session), at->session->rope };
    }
    c->at = cuda_put(c, list, (size_t)p->n_tok * sizeof *list);
    memset(c->tasks, 0, sizeof c->tasks);
    free(list);
}

/* Where the rows of all sessions are. */
static void put_rows(struct cuda *c) {
    struct cuda_rows *list = malloc((size_t)c->n_sessions * sizeof *list);
    for (int i = 0; list && i < 2; i++) {
        int64_t most = 0;
        for (int s = 0; s < c->n_sessions; s++) {
            const struct arena *a = &c->sessions[s]->arenas[GPU_ROWS + i];
            list[s] =
                (struct cuda_rows){ cuda_put(c, a->segments, (size_t)a->n_segments * sizeof *a->segments),
                                    a->segment_tiles };
            most = a->rows_reserved > most ? a->rows_reserved : most;
        }
        c->rows[i] = cuda_put(c, list, (size_t)c->n_sessions * sizeof *list);
        c->n_chunks[i] = (int)((most + CHUNK - 1) / CHUNK);
    }
    if (!list)
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d sessions", c->n_sessions));
    free(list);
}

/* What a pass does with the states of its sessions. */
static void put_runs(struct cuda *c, const struct pass *p) {
    struct cuda_run *list = malloc((size_t)p->n_tok * (sizeof *list + sizeof(int32_t)));
    int32_t *of = (int32_t *)(void *)(list + p->n_tok);
    if (!list) {
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
        return;
    }
    for (int i = 0; i < p->n_runs; i++) {
        const struct run *run = &p->runs[i];
        const struct state_run *s = &run->states[ON_GPU];
        list[i] = (struct cuda_run){
            run->session->states[ON_GPU].memory, run->first, s->start, s->n, s->base, s->next_base, s->replay
        };
        for (int t = 0; t < s->n; t++)
            of[run->first + t] = i;
    }
    c->runs = cuda_put(c, list, (size_t)p->n_runs * sizeof *list);
    c->run_of = cuda_put(c, of, (size_t)p->n_tok * sizeof *of);
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
        *to[i] = cuda_put(c, values, (size_t)m->c.n_ropes * n * sizeof *values);
    }
    c->rope_rows = p->n_tok;
    if (!values)
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    free(values);
}

/* Queries side by side of one session, as many as a block of threads takes. */
struct cuda_tasks cuda_put_tasks(struct cuda *c, const struct pass *p, int size) {
    struct cuda_tasks *made = &c->tasks[size];
    if (made->n)
        return *made;
    struct cuda_task *list = malloc((size_t)p->n_tok * sizeof *list);
    for (int t = 0, n; list && t < p->n_tok; t += n) {
        for (n = 1; n < size && t + n < p->n_tok && p->at[t + n].session == p->at[t].session; n++)
            ;
        list[made->n++] = (struct cuda_task){ t, n };
    }
    if (!list)
        cuda_stop(c, fail(BMC_ENOMEM, "no memory for %d tokens", p->n_tok));
    else
        made->list = cuda_put(c, list, (size_t)made->n * sizeof *list);
    free(list);
    return *made;
}

/* The pass. */

static float *hidden_results(const bmc_model *m) {
    return (float *)(void *)(m->cuda->results + (size_t)m->pass_max * m->cuda->n_parts * sizeof(struct best));
}

/* Rows of its tokens that it brings with it: x, what blocks on the CPU kept for later ones, vectors of each
 * layer. stride 0: none. */
struct brought { const float *from; float *to; size_t stride; };
enum { BROUGHT = 3 };
static void find_brought(const struct pass *p, struct brought list[BROUGHT]) {
    const bmc_model *m = p->model;
    const struct buffers *here = m->buffers, *there = &m->cuda->buffers;
    list[0] = (struct brought){ here->x, there->x, padded(m->c.dim) };
    list[1] = (struct brought){ here->kept, there->kept, m->cuda->first ? there->kept_stride : 0 };
    list[2] = (struct brought){ here->per_layer, there->per_layer, m->cuda->inputs };
}

/* Room for what it brings with it. Whoever had addresses there is gone: a queue that has them never comes
 * again. */
static int make_room(struct cuda *c, const struct pass *p) {
    const bmc_model *m = p->model;
    const size_t scaled = 2 * (size_t)m->c.n_blocks * sizeof(float),
                 turns = 2 * (size_t)(m->c.n_ropes * m->buffers->turns) * sizeof(float);
    size_t each = sizeof(struct cuda_run) + sizeof(int32_t) + 2 * sizeof(struct cuda_token)
                  + 2 * (ATTEND_ROWS + 1) * sizeof(struct cuda_task) + 2 * sizeof(int32_t)
                  + 2 * sizeof(struct cuda_rows) + scaled + turns + 4 * 64;
    size_t bytes = (size_t)p->n_tok * each + 64 * (size_t)(m->c.n_blocks + 64);
    for (int i = 0; i < c->n_sessions; i++)
        for (int j = GPU_ROWS; j < ARENAS; j++)
            bytes += (size_t)c->sessions[i]->arenas[j].n_segments * sizeof(char *) + 64;
    struct brought rows[BROUGHT];
    size_t x = 0;
    find_brought(p, rows);
    for (int i = 0; i < BROUGHT; i++)
        x += (size_t)p->n_tok * rows[i].stride * sizeof(float);
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
    cuda_put_tokens(c, p);
    put_turns(c, p);
    put_rows(c);
    if (p->model->n_states[ON_GPU])
        put_runs(c, p);
}

static int check(const struct cuda *c, const char *what, int code) {
    return cuda_status(c->gpu->index, what, code);
}

static int send(const struct cuda *c, const struct pass *p) {
    struct brought rows[BROUGHT];
    char *at = c->host + c->device_bytes;
    find_brought(p, rows);
    int status =
        check(c, "sending",
              c->gpu->cu->cuMemcpyHtoDAsync_v2(cuda_address(c->device), c->host, c->host_used, c->stream));
    for (int i = 0; i < BROUGHT && !status; i++) {
        const size_t bytes = (size_t)c->n_began * rows[i].stride * sizeof(float);
        if (!bytes)
            continue;
        memcpy(at, rows[i].from, bytes);
        status =
            check(c, "sending",
                  c->gpu->cu->cuMemcpyHtoDAsync_v2(cuda_address(rows[i].to), at, bytes, c->stream));
        at += bytes;
    }
    return status;
}

static int queue_one(const struct cuda *c, const struct queued *q) {
    const struct cuda_driver *cu = c->gpu->cu;
    if (!q->function)
        return check(c, "copying", cu->cuMemcpyDtoDAsync_v2(q->to, q->from, q->bytes, c->stream));
    if (!q->grid.threads)
        return cublas_multiply(q->function, (const void *)(c->args + q->args));
    void *args[] = { c->args + q->args };
    return check(c, "launching a kernel",
                 cu->cuLaunchKernel(q->function, q->grid.x, q->grid.y, q->grid.z, q->grid.threads, 1, 1, 0,
                                    c->stream, args, NULL));
}

/* All that is queued, results as soon as they are there. */
static int queue_all(const struct cuda *c) {
    const struct fetched *f = c->fetches, *last = f + c->n_fetches;
    int status = 0;
    for (int i = 0; i <= c->n_queued && !status; i++) {
        for (; f < last && f->after == i && !status; f++)
            status =
                check(c, "fetching", c->gpu->cu->cuMemcpyDtoHAsync_v2(f->to, f->from, f->bytes, c->stream));
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

/* Queues that are not the same differ in their first bytes, so this costs less than a hash of the whole. */
static struct graph *find_graph(struct cuda *c) {
    for (struct graph *g = c->graphs; g < c->graphs + GRAPHS; g++)
        if (g->program && g->n == c->n_queued && g->arg_bytes == c->arg_bytes
            && !memcmp(g->queue, c->queue, (size_t)g->n * sizeof *g->queue)
            && !memcmp(g->args, c->args, g->arg_bytes))
            return g;
    return NULL;
}

/* What is queued becomes a graph, in the place of the one that was not used for longest. */
static int make_graph(struct cuda *c, struct graph **made) {
    const struct cuda_driver *cu = c->gpu->cu;
    struct graph *g = c->graphs, new = { .n = c->n_queued, .arg_bytes = c->arg_bytes };
    void *captured = NULL;
    for (struct graph *other = c->graphs; other < c->graphs + GRAPHS; other++)
        if (other->used < g->used)
            g = other;
    int status = check(c, "capturing a graph", cu->cuStreamBeginCapture_v2(c->stream, CUDA_CAPTURE_THREAD));
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

/* Whether this queue equals the last one of a pass of the same width that had no graph. */
static bool comes_again(struct cuda *c) {
    const uint64_t hash =
        hash_of(hash_of(0, c->queue, (size_t)c->n_queued * sizeof *c->queue), c->args, c->arg_bytes);
    const bool again = c->last_hash[c->n_began] == hash;
    c->last_hash[c->n_began] = hash;
    return again;
}

/* A queue that comes a second time becomes a graph; false: it is none yet, and nothing has happened. */
static bool as_graph(struct cuda *c, int *status) {
    const bool last = !c->n_fetches || c->fetches[0].after == c->n_queued;
    if (c->n_began > GRAPH_TOKENS || !last || !c->n_queued)
        return false;
    struct graph *g = find_graph(c);
    if (!g && !comes_again(c))
        return false;
    *status = g ? 0 : make_graph(c, &g);
    if (*status)
        return true;
    g->used = c->n_passes;
    *status = check(c, "launching a graph", c->gpu->cu->cuGraphLaunch(g->program, c->stream));
    for (int i = 0; i < c->n_fetches && !*status; i++)
        *status = check(c, "fetching",
                        c->gpu->cu->cuMemcpyDtoHAsync_v2(c->fetches[i].to, c->fetches[i].from,
                                                         c->fetches[i].bytes, c->stream));
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
        cuda_fetch(c, hidden_results(m), c->buffers.y[0],
                   (size_t)c->n_hidden * padded(m->c.dim) * sizeof(float));
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
