/* Products of long passes over the blocks that are on the CPU, done on a GPU.
 *
 * Their weights stay in the host's memory. A step of products sends them in slices of rows to two slots on
 * the GPU: the stream `copies` fills one while the stream `work` multiplies the other, and each slice's
 * results come back while the next one is sent. Events keep the order between the two streams: `sent` of a
 * slot is recorded behind its copies, `used` behind the kernel that reads it. Norms, attention and states
 * stay on the CPU, so rows of sessions do not move. Only thread 0 calls the driver; the others go on to the
 * barrier that follows the step.
 *
 * Panels, and the buffers of a pass, are pinned where the driver can do that; it copies other memory too,
 * only slower. */
#include "cuda.h"

#include "../error.h"
#include "../memory.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Slots; bytes of a slice's weights and of its results, at least those of the TILE_PANELS that a block of
 * threads takes; tokens from which on a pass may go there. */
enum { SLOTS = 2, SLICE = 16 << 20, RESULTS = 8 << 20, TILE_PANELS = 8, LEAST = 64 };

/* Bytes that a GPU is sent in a second (PCIe 4.0 x16, pinned memory), and products of a weight and a token
 * that a thread computes in a second, of 8 bits (with VNNI) and of floats: 64 tokens are worth sending Q4_0
 * for up to nine threads. */
static const double SENT = 25e9, QUANTIZED_RATE = 300e9, FLOAT_RATE = 50e9;

/* What products need there at most. */
struct stage_sizes {
    size_t slot, act, x;            /* bytes of a slot, and of what products read, in 8 bits and in floats */
    size_t out, hidden;             /* bytes of a slice's results, in floats and in 8 bits */
    size_t rows;                    /* of a slice */
    int64_t widest, widest_float;   /* values of a token that quantized and float weights read */
};

struct cuda_stage {
    struct gpu *gpu;
    void *work, *copies;
    void *sent[SLOTS], *used[SLOTS];
    void *products[CUDA_WAYS][N_PANEL_TYPES], *activate;
    struct stage_sizes sizes;
    void *room;                     /* all that follows, on the GPU */
    char *slots[SLOTS];
    struct act_block *act, *hidden; /* one tile each: block b of token t is act[b * n + t] */
    float *x, *out[2];              /* out: rows of a slice's results, its gates */
    void *pinned[2];                /* the panels, the buffers of a pass; NULL: not pinned */
    struct machine machine;
    int least;                      /* tokens of a pass; 0: LEAST, where it pays */
    int next;                       /* slot */
    int status;                     /* the pass's first failure */
    struct tokens there;            /* whose blocks and floats are in act and x; NULL: none */
};

/* Sizes. */

static size_t whole(size_t bytes) { return (bytes + 255) / 256 * 256; }
static size_t most(size_t a, size_t b) { return a > b ? a : b; }
static int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static size_t panel_bytes(const struct matrix *w) { return w->code_stride + w->scale_stride; }

/* Panels of a matrix at a time. */
static int64_t slice_panels(const bmc_model *m, const struct matrix *w) {
    const int64_t weights = (int64_t)(SLICE / panel_bytes(w)),
                  results = (int64_t)(RESULTS / ((size_t)m->pass_max * PANEL_ROWS * sizeof(float))),
                  n = least_of(weights, results) / TILE_PANELS * TILE_PANELS;
    return least_of(n ? n : TILE_PANELS, matrix_panels(w));
}

struct measured { const bmc_model *m; int first; struct stage_sizes sizes; };

/* Whether a matrix belongs to a block that is on the CPU. */
static bool is_here(const struct measured *v, const struct matrix *w) {
    const bmc_model *m = v->m;
    return w != &m->output && w != &m->per_layer_proj && w != &m->eh_proj && !cuda_there(m, v->first, w);
}

static void widen(struct stage_sizes *s, int type, int64_t n) {
    int64_t *widest = cuda_is_float(type) ? &s->widest_float : &s->widest;
    *widest = n > *widest ? n : *widest;
}

static void measure(struct matrix *w, void *arg) {
    struct measured *v = arg;
    struct stage_sizes *s = &v->sizes;
    if (!is_here(v, w))
        return;
    const size_t n = (size_t)slice_panels(v->m, w);
    s->slot = most(s->slot, n * (panel_bytes(w) + PANEL_ROWS * sizeof(float)) + 64);
    s->rows = most(s->rows, n * PANEL_ROWS);
    widen(s, w->type, w->n_cols);
}

/* Heads of compressed attention read parts of wide rows. */
static void measure_heads(const bmc_model *m, int first, struct stage_sizes *s) {
    for (const struct block *b = m->blocks; b < m->blocks + first; b++)
        if (b->c.kind == BMC_MLA) {
            widen(s, b->attention.k_b.of->type, b->c.n_heads * b->extent[NOPE]);
            widen(s, b->attention.v_b.of->type, b->c.n_heads * (int64_t)b->c.kv_rank);
        }
}

static struct stage_sizes sizes_of(const bmc_model *m, int first) {
    struct measured v = { .m = m, .first = first };
    const size_t n = (size_t)m->pass_max;
    model_each_matrix((bmc_model *)m, measure, &v);
    if (!v.sizes.slot)
        return v.sizes;
    measure_heads(m, first, &v.sizes);
    v.sizes.slot = whole(v.sizes.slot);
    v.sizes.act = whole(n * (size_t)(v.sizes.widest / 32) * sizeof(struct act_block));
    v.sizes.x = whole(n * padded(v.sizes.widest_float) * sizeof(float));
    v.sizes.out = whole(n * v.sizes.rows * sizeof(float));
    v.sizes.hidden = whole(n * (v.sizes.rows / 32) * sizeof(struct act_block));
    return v.sizes;
}

static size_t bytes_of(const struct stage_sizes *s) {
    return s->slot ? SLOTS * s->slot + s->act + s->x + 2 * s->out + s->hidden : 0;
}

size_t cuda_stage_bytes(const bmc_model *m, int first) {
    const struct stage_sizes s = sizes_of(m, first);
    return bytes_of(&s);
}

static void lay_out(struct cuda_stage *s) {
    char *next = s->room;
    for (int i = 0; i < SLOTS; i++, next += s->sizes.slot)
        s->slots[i] = next;
    s->act = (struct act_block *)(void *)next;
    s->x = (float *)(void *)(next += s->sizes.act);
    s->out[0] = (float *)(void *)(next += s->sizes.x);
    s->out[1] = (float *)(void *)(next += s->sizes.out);
    s->hidden = (struct act_block *)(void *)(next + s->sizes.out);
}

/* The driver. After the first failure nothing is called any more. */

static bool did(struct cuda_stage *s, const char *what, int code) {
    s->status = cuda_status(s->gpu->index, what, code);
    return !s->status;
}

#define CALL(s, what, call) ((void)((s)->status || did(s, what, (s)->gpu->cu->call)))

static void send(struct cuda_stage *s, void *stream, void *to, const void *from, size_t bytes) {
    if (bytes)
        CALL(s, "sending weights", cuMemcpyHtoDAsync_v2(cuda_address(to), from, bytes, stream));
}

/* Rows of `width` bytes between the host and the GPU. */
struct rows_of { void *at; size_t pitch; };

static void send_rows(struct cuda_stage *s, struct rows_of to, struct rows_of from, size_t width, size_t n) {
    const struct cuda_copy2d copy = {
        { .type = 1, .host = cuda_address(from.at), .pitch = from.pitch },
        { .type = 2, .device = cuda_address(to.at), .pitch = to.pitch }, width, n,
    };
    if (width && n)
        CALL(s, "sending tokens", cuMemcpy2DAsync_v2(&copy, s->work));
}

static void fetch_rows(struct cuda_stage *s, struct rows_of to, struct rows_of from, size_t width, size_t n) {
    const struct cuda_copy2d copy = {
        { .type = 2, .device = cuda_address(from.at), .pitch = from.pitch },
        { .type = 1, .host = cuda_address(to.at), .pitch = to.pitch }, width, n,
    };
    if (width && n)
        CALL(s, "fetching results", cuMemcpy2DAsync_v2(&copy, s->work));
}

static void launch(struct cuda_stage *s, void *function, struct cuda_grid g, void *args) {
    void *list[] = { args };
    CALL(s, "launching a kernel",
         cuLaunchKernel(function, g.x, g.y, g.z, g.threads, 1, 1, 0, s->work, list, NULL));
}

/* Tokens. */

static int64_t wide_of(const struct product *r) { return r->in.wide ? r->in.wide : r->w->n_cols; }

/* Blocks [from, to) of rows of k values between the CPU's tiles of columns and the GPU's one. */
static void move_blocks(struct cuda_stage *s, struct tokens in, int64_t k, int64_t from, int64_t to,
                        struct act_block *there, bool fetch) {
    const int width = tile_width(in.n);
    for (int first = 0; first < in.n; first += width) {
        const size_t cols = (size_t)smaller(in.n - first, width), size = sizeof(struct act_block);
        struct act_block *tile = in.act + (size_t)first * (size_t)(k / 32);
        const struct rows_of here = { tile + (size_t)from * cols, cols * size },
                             gpu = { there + first, (size_t)in.n * size };
        if (fetch)
            fetch_rows(s, here, gpu, cols * size, (size_t)(to - from));
        else
            send_rows(s, gpu, here, cols * size, (size_t)(to - from));
    }
}

/* What a product reads, unless it is there: products side by side have the same input. */
static void send_tokens(struct cuda_stage *s, const struct product *r) {
    const size_t row = padded(wide_of(r));
    if (cuda_is_float(r->w->type) && s->there.x != r->in.x) {
        send(s, s->work, s->x, r->in.x, (size_t)r->in.n * row * sizeof(float));
        s->there.x = r->in.x;
    } else if (!cuda_is_float(r->w->type) && s->there.act != r->in.act) {
        move_blocks(s, r->in, wide_of(r), 0, wide_of(r) / 32, s->act, false);
        s->there.act = r->in.act;
    }
}

/* Products. */

static int rows_between(const struct matrix *w, int64_t from, int64_t to) {
    return (int)(least_of(to * PANEL_ROWS, w->n_rows) - from * PANEL_ROWS);
}

/* Panels [from, to) of a matrix, and their biases, to the next slot. */
static struct cuda_product send_slice(struct cuda_stage *s, const struct matrix *w, int64_t from,
                                      int64_t to) {
    const int slot = s->next;
    const size_t n = (size_t)(to - from), codes = n * w->code_stride, scales = n * w->scale_stride;
    char *at = s->slots[slot], *bias = at + (codes + scales + 63) / 64 * 64;
    const struct cuda_product a = {
        .codes = (uint8_t *)at, .scales = (uint8_t *)at + codes, .code_stride = w->code_stride,
        .scale_stride = w->scale_stride, .n_rows = rows_between(w, from, to), .k = (int)w->n_cols,
        .bias = w->bias ? (float *)(void *)bias : NULL, .factor = w->factor,
    };
    CALL(s, "waiting for a kernel", cuStreamWaitEvent(s->copies, s->used[slot], 0));
    send(s, s->copies, at, w->codes + (size_t)from * w->code_stride, codes);
    send(s, s->copies, at + codes, w->scales + (size_t)from * w->scale_stride, scales);
    if (w->bias)
        send(s, s->copies, bias, w->bias + from * PANEL_ROWS, (size_t)a.n_rows * sizeof(float));
    CALL(s, "sending weights", cuEventRecord(s->sent[slot], s->copies));
    return a;
}

/* The rows of panels [from, to) of a product, to `out`. */
static void multiply_slice(struct cuda_stage *s, const struct product *r, int64_t from, int64_t to,
                           float *out, size_t out_stride) {
    struct cuda_product a = send_slice(s, r->w, from, to);
    const int slot = s->next;
    a.n_tok = r->in.n;
    a.act = s->act + (size_t)(r->in.from / 32) * (size_t)r->in.n;
    a.act_stride = r->in.n;
    a.x = s->x + r->in.from;
    a.x_stride = padded(wide_of(r));
    a.out = out;
    a.out_stride = out_stride;
    a.add = r->add;
    const enum cuda_way way = product_way(r->w->type, &a, s->gpu->mma);
    CALL(s, "waiting for weights", cuStreamWaitEvent(s->work, s->sent[slot], 0));
    launch(s, s->products[way][r->w->type], product_grid(way, &a), &a);
    CALL(s, "launching a kernel", cuEventRecord(s->used[slot], s->work));
    s->next = (slot + 1) % SLOTS;
}

static void multiply_one(struct cuda_stage *s, const bmc_model *m, const struct product *r) {
    const int64_t n = matrix_panels(r->w), each = slice_panels(m, r->w);
    const size_t stride = (size_t)each * PANEL_ROWS, n_tok = (size_t)r->in.n;
    const struct rows_of there = { s->out[0], stride * sizeof(float) };
    send_tokens(s, r);
    for (int64_t from = 0; from < n; from += each) {
        const int64_t to = least_of(from + each, n), row = from * PANEL_ROWS;
        const size_t width = (size_t)rows_between(r->w, from, to) * sizeof(float);
        const struct rows_of here = { r->y + row, r->y_stride * sizeof(float) };
        if (r->add)
            send_rows(s, there, here, width, n_tok);
        multiply_slice(s, r, from, to, s->out[0], stride);
        fetch_rows(s, here, there, width, n_tok);
    }
}

/* Activation of `rows` rows that begin at `row`, and what comes of it. */
static void activate_slice(struct cuda_stage *s, const struct gate_up *job, int64_t row, int rows,
                           size_t stride) {
    const int64_t dim = job->up->n_rows;
    const struct rows_of here = { job->hidden.x + row, padded(dim) * sizeof(float) },
                         there = { s->out[0], stride * sizeof(float) };
    struct cuda_activate a = {
        .n_tok = job->in.n, .dim = rows, .kind = job->act, .up = s->out[0],
        .gate = job->gate->data ? s->out[1] : NULL, .stride = stride, .gate_stride = stride, .act = s->hidden,
        .act_stride = job->in.n,
    };
    memcpy(a.param, job->param, sizeof a.param);
    launch(s, s->activate, activate_grid(&a), &a);
    fetch_rows(s, here, there, (size_t)rows * sizeof(float), (size_t)job->in.n);
    move_blocks(s, job->hidden, dim, row / 32, (row + rows) / 32, s->hidden, true);
}

static void gate_up_one(struct cuda_stage *s, const bmc_model *m, const struct gate_up *job) {
    const struct product gate = product(job->gate, job->in, job->gate_out),
                         up = product(job->up, job->in, job->hidden.x);
    const bool gated = job->gate->data;
    const int64_t n = matrix_panels(job->up), most_up = slice_panels(m, job->up),
                  each = gated ? least_of(slice_panels(m, job->gate), most_up) : most_up;
    const size_t stride = (size_t)each * PANEL_ROWS;
    send_tokens(s, &up);
    if (gated)
        send_tokens(s, &gate);
    for (int64_t from = 0; from < n; from += each) {
        const int64_t to = least_of(from + each, n);
        if (gated)
            multiply_slice(s, &gate, from, to, s->out[1], stride);
        multiply_slice(s, &up, from, to, s->out[0], stride);
        activate_slice(s, job, from * PANEL_ROWS, rows_between(job->up, from, to), stride);
    }
}

/* Which products go there. */

static bool can(const struct cuda_stage *s, const struct product *r) {
    const int64_t widest = cuda_is_float(r->w->type) ? s->sizes.widest_float : s->sizes.widest;
    return r->w->codes && !r->w->late && wide_of(r) <= widest;
}

/* Whether the weights and tokens are sent sooner than the threads compute the products. */
static bool pays(const bmc_model *m, const struct product *list, int n) {
    double bytes = 0, seconds = 0;
    const struct product *before = NULL;
    for (int i = 0; i < n; i++) {
        const struct product *r = &list[i];
        const bool floats = cuda_is_float(r->w->type);
        if (!r->w->data)
            continue;
        bytes += (double)matrix_panels(r->w) * (double)panel_bytes(r->w);
        if (!before || before->in.act != r->in.act)
            bytes += (double)wide_of(r) * r->in.n * (floats ? 4.0 : sizeof(struct act_block) / 32.0);
        seconds += (double)r->w->n_rows * (double)r->w->n_cols * r->in.n
                   / (floats ? FLOAT_RATE : QUANTIZED_RATE);
        before = r;
    }
    return bytes / SENT < seconds / pool_size(m->pool);
}

bool cuda_stage_takes(const struct pass *p, const struct product *list, int n) {
    const struct cuda_stage *s = p->model->stage;
    for (int i = 0; i < n; i++)
        if (list[i].w->data && !can(s, &list[i]))
            return false;
    return s->least ? p->n_tok >= s->least : p->n_tok >= LEAST && pays(p->model, list, n);
}

void cuda_stage_multiply(struct pass *p, const struct product *r) {
    if (r->w->data && !p->model->stage->status)
        multiply_one(p->model->stage, p->model, r);
}

void cuda_stage_gate_up(struct pass *p, const struct gate_up *job) {
    if (!p->model->stage->status)
        gate_up_one(p->model->stage, p->model, job);
}

/* The buffers are the CPU's again; after a failure too, when what was queued may still be written to them. */
void cuda_stage_await(struct pass *p) {
    struct cuda_stage *s = p->model->stage;
    CALL(s, "computing", cuStreamSynchronize(s->work));
    if (s->status) {
        s->gpu->cu->cuStreamSynchronize(s->copies);
        s->gpu->cu->cuStreamSynchronize(s->work);
    }
    s->there = (struct tokens){ 0 };
}

static void multiply_there(struct pass *p, const struct product *list, int n, int thread) {
    if (!cuda_stage_takes(p, list, n)) {
        multiply(p, list, n, thread);
        return;
    }
    for (int i = 0; thread == 0 && i < n; i++)
        cuda_stage_multiply(p, &list[i]);
    if (thread == 0)
        cuda_stage_await(p);
}

static void gate_up_there(struct pass *p, const struct gate_up *job, int thread) {
    const struct product list[] = { product(job->gate, job->in, job->gate_out),
                                    product(job->up, job->in, job->hidden.x) };
    if (!cuda_stage_takes(p, list, 2)) {
        gate_up_all(p, job, thread);
        return;
    }
    if (thread == 0) {
        cuda_stage_gate_up(p, job);
        cuda_stage_await(p);
    }
}

/* A pass. A forked process, which cannot use the GPU, computes all of it. */
const struct machine *cuda_stage_begin(struct pass *p) {
    struct cuda_stage *s = p->model->stage;
    s->status = 0;
    if (p->n_tok < (s->least ? s->least : LEAST) || s->gpu->process != getpid())
        return &cpu_machine;
    s->status = gpu_enter(s->gpu);
    return &s->machine;
}

int cuda_stage_end(struct pass *p) { return p->model->stage->status; }

/* Opening. */

static void find_kernels(struct matrix *w, void *arg) {
    struct measured *v = arg;
    struct cuda_stage *s = v->m->stage;
    if (!s->status && is_here(v, w))
        s->status = cuda_find_products(s->gpu, s->products, w->type);
}

static int open_stage(bmc_model *m, struct cuda_stage *s, int first) {
    struct measured v = { .m = m, .first = first };
    s->status = gpu_enter(s->gpu);
    CALL(s, "making a stream", cuStreamCreate(&s->work, CUDA_STREAM_NON_BLOCKING));
    CALL(s, "making a stream", cuStreamCreate(&s->copies, CUDA_STREAM_NON_BLOCKING));
    for (int i = 0; i < SLOTS; i++) {
        CALL(s, "making an event", cuEventCreate(&s->sent[i], 2));
        CALL(s, "making an event", cuEventCreate(&s->used[i], 2));
    }
    model_each_matrix(m, find_kernels, &v);
    if (!s->status && !(s->activate = gpu_function(s->gpu, "activate")))
        s->status = BMC_EDEVICE;
    if (!s->status)
        s->status = gpu_alloc(s->gpu, bytes_of(&s->sizes), "weights of long passes", &s->room);
    return s->status;
}

int bmc_model_stream(bmc_model *m, int gpu, const char *kernels, int least) {
    if (!m || !kernels || least < 0)
        return fail(BMC_EINVAL,
                    "bmc_model_stream: needs a model, a file of kernels, and 0 or more tokens, found %d",
                    least);
    if (m->panels || m->rooms || m->stage)
        return fail(BMC_EINVAL, "bmc_model_stream: the model is ready already");
    const int first = m->cuda ? m->cuda->first : m->c.n_blocks;
    const struct stage_sizes sizes = sizes_of(m, first);
    if (!sizes.slot)
        return 0;
    struct cuda_stage *s = m->stage = calloc(1, sizeof *s);
    if (!s)
        return fail(BMC_ENOMEM, "no memory for a model");
    s->sizes = sizes;
    s->least = least;
    s->machine = cpu_machine;
    s->machine.multiply = multiply_there;
    s->machine.gate_up = gate_up_there;
    int status = gpu_open(gpu, kernels, &s->gpu);
    if (!status)
        status = open_stage(m, s, first);
    if (status) {
        cuda_stage_free(s);
        m->stage = NULL;
        return status;
    }
    lay_out(s);
    return 1;
}

static void *pin(struct cuda_stage *s, void *memory, size_t bytes) {
    return memory && bytes && !s->gpu->cu->cuMemHostRegister_v2(memory, bytes, 0) ? memory : NULL;
}

/* Products read and write the buffers of a pass up to its cosines. Whole pages are pinned, since a copy may
 * not begin in pinned memory and end outside. Without panels there is nothing to send. */
int cuda_stage_pack(bmc_model *m) {
    struct cuda_stage *s = m->stage;
    const size_t buffers = memory_whole((size_t)((char *)m->buffers->cos - (char *)m->buffers->memory));
    if (!m->panels) {
        cuda_stage_free(s);
        m->stage = NULL;
        return 0;
    }
    const int status = gpu_enter(s->gpu);
    if (!status) {
        s->pinned[0] = pin(s, m->panels, m->early_bytes);
        s->pinned[1] = pin(s, m->buffers->memory, buffers < m->buffers->bytes ? buffers : m->buffers->bytes);
    }
    return status;
}

void cuda_stage_free(struct cuda_stage *s) {
    if (!s)
        return;
    if (s->gpu && s->gpu->process == getpid() && !gpu_enter(s->gpu)) {
        const struct cuda_driver *cu = s->gpu->cu;
        void *const streams[] = { s->copies, s->work };
        for (int i = 0; i < 2; i++)
            if (streams[i])
                cu->cuStreamSynchronize(streams[i]);
        for (int i = 0; i < 2; i++)
            if (s->pinned[i])
                cu->cuMemHostUnregister(s->pinned[i]);
        for (int i = 0; i < SLOTS; i++) {
            if (s->sent[i])
                cu->cuEventDestroy_v2(s->sent[i]);
            if (s->used[i])
                cu->cuEventDestroy_v2(s->used[i]);
        }
        for (int i = 0; i < 2; i++)
            if (streams[i])
                cu->cuStreamDestroy_v2(streams[i]);
        gpu_free(s->gpu, s->room);
    }
    gpu_close(s->gpu);
    free(s);
}
