/* Opening: check the settings, bind the tensors to their places, make the panels. */
#include "cuda/cuda.h"

#include "cpu.h"
#include "error.h"
#include "memory.h"
#include "pack.h"
#include "resident.h"
#include "sample.h"

#include <stdio.h>
#include <stdlib.h>

/* Settings: what is believed of a file before anything is multiplied or allocated. */

static int in_range(const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high)
        return 0;
    return fail(BMC_EFORMAT, "%s: expected %lld to %lld, found %lld", name, (long long)low, (long long)high,
                (long long)value);
}

static int check_ropes(const bmc_config *c) {
    for (int i = 0; i < c->n_ropes; i++)
        if (!c->ropes || !c->ropes[i].freq || in_range("rope.dim", c->ropes[i].dim, 2, 1024)
            || c->ropes[i].dim % 2)
            return fail(BMC_EFORMAT,
                        "rope table %d: expected 2 to 1024 values, an even number, and their frequencies", i);
    return 0;
}

static int check_config(const bmc_config *c) {
    const struct { const char *name; int64_t value, low, high; } limits[] = {
        { "dim", c->dim, 1, 1 << 20 },
        { "n_layers", c->n_layers, 1, 1024 },
        { "n_blocks", c->n_blocks, 1, 4096 },
        { "vocab_size", c->vocab_size, 1, 1 << 24 },
        { "n_ctx", c->n_ctx, 1, 1 << 30 },
        { "causal", c->causal, 0, 1 },
        { "norm", c->norm, BMC_NORM_RMS, BMC_NORM_LAYER },
        { "n_ropes", c->n_ropes, c->long_rope ? 2 : 0, 8 },
        { "per_layer_dim", c->per_layer_dim, 0, 1 << 16 },
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (in_range(limits[i].name, limits[i].value, limits[i].low, limits[i].high))
            return BMC_EFORMAT;
    return check_ropes(c);
}

static int check_block(const bmc_model *m, const struct block *b) {
    const bmc_block *c = &b->c;
    const struct block *rows = c->kv_from > 0 && c->kv_from <= b->number ? b - c->kv_from : NULL;
    if (!b->kind)
        return fail(BMC_EFORMAT, "layer %d: there is no kind %d of block", (int)c->layer, (int)c->kind);
    if (c->others && (c->kind != BMC_PER_LAYER || c->n_altup < 2 || c->n_altup > ALTUP_MAX))
        return fail(BMC_EFORMAT, "layer %d: only per-layer inputs go to 1 to 7 other versions of x",
                    (int)c->layer);
    if (c->act < 0 || c->act >= BMC_ACTS || c->route < BMC_ROUTE_NORMED || c->route > BMC_ROUTE_SCALED)
        return fail(BMC_EFORMAT, "layer %d: there is no activation %d, or no input %d of a router",
                    (int)c->layer, (int)c->act, (int)c->route);
    if (c->beside && (b == m->blocks || (b - 1)->c.beside))
        return fail(BMC_EFORMAT, "layer %d: at most two blocks stand side by side", (int)c->layer);
    int status = b->kind->check(m, c);
    if (status || !c->kv_from)
        return status;
    if (!rows || rows->c.kind != c->kind || rows->c.kv_from || rows->c.n_kv_heads != c->n_kv_heads
        || rows->c.k_dim != c->k_dim || rows->c.v_dim != c->v_dim)
        return fail(BMC_EFORMAT, "layer %d: it cannot read the keys and values of layer %d", (int)c->layer,
                    rows ? (int)rows->c.layer : -1);
    return 0;
}

/* A draft head is the target's in shape, and needs nothing but rows of what it has read: they can be
 * taken back to any position. */
static int check_head(const bmc_model *m) {
    const bmc_config *c = &m->c, *t = &m->target->c;
    const char *missing = !m->eh_proj.data ? "eh_proj" : !m->enorm.v ? "enorm" : !m->hnorm.v ? "hnorm" : NULL;
    if (c->dim != t->dim || c->vocab_size != t->vocab_size)
        return fail(BMC_EFORMAT,
                    "draft head: expected %d values and %d tokens as the model has, found %d and %d", t->dim,
                    t->vocab_size, c->dim, c->vocab_size);
    if (!c->causal || m->target->target || m->n_states[HERE] || m->n_states[ON_GPU] || m->window)
        return fail(BMC_EFORMAT,
                    "draft head: expected a layer of a model that writes text, with attention to all rows");
    return missing ? fail(BMC_EFORMAT, "draft head: nextn.%s is missing", missing) : 0;
}

/* Panels. */

static size_t bytes_of(const struct matrix *w) {
    return (size_t)matrix_panels(w) * (w->code_stride + w->scale_stride);
}

static void measure(struct matrix *w, void *bytes) {
    struct panel_size size = panel_size(w->type, w->n_cols);
    w->code_stride = size.codes;
    w->scale_stride = size.scales;
    *(size_t *)bytes += w->on_gpu ? 0 : bytes_of(w) + 64;
}

enum { SOME = 64 };                         /* bytes that are mapped where all weights are on a GPU */

void model_measure(bmc_model *m) {
    m->panel_bytes = 0;
    model_each_matrix(m, measure, &m->panel_bytes);
    m->panel_bytes = memory_whole(m->panel_bytes);
}

static void measure_early(struct matrix *w, void *bytes) {
    *(size_t *)bytes += w->late || w->on_gpu ? 0 : bytes_of(w) + 64;
}

/* Of the panels that are made here when the model is packed; some, even if there are none. */
static size_t early_bytes(bmc_model *m) {
    size_t bytes = SOME;
    model_each_matrix(m, measure_early, &bytes);
    return memory_whole(bytes);
}

static void place(struct matrix *w, void *next) {
    uint8_t **p = next;
    if (w->on_gpu || w->late)
        return;
    w->codes = *p;
    w->scales = w->codes + (size_t)matrix_panels(w) * w->code_stride;
    *p += (bytes_of(w) + 63) / 64 * 64;
}

/* Panels [from, to) of a matrix into those of another, whose type may be another one; floats:
 * room for PANEL_ROWS rows on their way, or NULL. The file's pages are given back as they are
 * done, a megabyte at a time. */
static void make_panels(const struct matrix *w, const struct matrix *out, int64_t from, int64_t to,
                        float *floats) {
    const size_t file_bytes = file_row_bytes(w), cols = (size_t)w->n_cols;
    int64_t kept = from * PANEL_ROWS;
    for (int64_t panel = from; panel < to; panel++) {
        const int64_t row = panel * PANEL_ROWS;
        const int n = w->n_rows - row < PANEL_ROWS ? (int)(w->n_rows - row) : PANEL_ROWS;
        const uint8_t *data = w->data + (size_t)row * file_bytes;
        for (int i = 0; floats && i < n; i++)
            type_find(w->type)->dequantize(data + (size_t)i * file_bytes, w->n_cols,
                                           floats + (size_t)i * cols);
        pack_panel(out->type, floats ? (const void *)floats : data,
                   floats ? cols * sizeof *floats : file_bytes, n, w->n_cols,
                   out->codes + (size_t)panel * out->code_stride,
                   out->scales + (size_t)panel * out->scale_stride);
        const size_t done = (size_t)(row + n - kept) * file_bytes;
        if (w->mapped && (done >= 1 << 20 || panel == to - 1)) {
            memory_give_back(w->data + (size_t)kept * file_bytes, done);
            kept = row + n;
        }
    }
}

void model_make_panels(const struct matrix *w, int64_t from, int64_t to) {
    make_panels(w, w, from, to, NULL);
}

/* floats: where the panels are of coarse weights, rows on their way, (threads, PANEL_ROWS, n_cols). */
struct packing { bmc_model *model; const struct matrix *file; struct matrix *panels; float *floats; };

/* This thread's panels, a megabyte at a time, so that others see how far it is. */
static void pack_share(void *arg, int thread) {
    struct packing *p = arg;
    const struct matrix *w = p->file;
    const int64_t bytes = (int64_t)(p->panels->code_stride + p->panels->scale_stride);
    const int64_t step = bytes < 1 << 20 ? (1 << 20) / bytes : 1;
    float *floats = p->floats ? p->floats + (size_t)(thread * PANEL_ROWS) * (size_t)w->n_cols : NULL;
    int64_t from, to;
    pool_share(p->model->pool, thread, matrix_panels(w), 1, &from, &to);
    for (int64_t end; from < to; from = end) {
        end = to - from < step ? to : from + step;
        make_panels(w, p->panels, from, end, floats);
        if (!p->floats)
            atomic_fetch_add(&p->model->packed, (end - from) * bytes);
    }
}

void model_pack_panels(bmc_model *m, const struct matrix *file, struct matrix *panels) {
    struct packing p = { m, file, panels, NULL };
    pool_run(m->pool, pack_share, &p);
}

static void pack_matrix(struct matrix *w, void *model) {
    if (!w->on_gpu && !w->late)
        model_pack_panels(model, w, w);
}

static void measure_file(struct matrix *w, void *bytes) {
    if (!w->on_gpu)
        *(size_t *)bytes += (size_t)w->n_rows * file_row_bytes(w);
}

static void measure_room(struct matrix *w, void *bytes) {
    size_t room = w->on_gpu ? 0 : (ROOM_PANELS * (w->code_stride + w->scale_stride) + 63) / 64 * 64;
    *(size_t *)bytes = room > *(size_t *)bytes ? room : *(size_t *)bytes;
}

/* What a draft head takes of its target, once its own panels are made or left out. */
static void share_output(bmc_model *m) {
    if (m->target && !m->output.data)
        m->output = m->target->output;
}

/* What is on a GPU is sent there, and counts in `packed`. */
static int finish_panels(bmc_model *m) {
    int status = m->cuda ? cuda_pack(m) : 0;
    if (!status && m->stage)
        status = cuda_stage_pack(m);
    if (!status)
        share_output(m);
    atomic_store(&m->packed, (int64_t)m->panel_bytes + (m->cuda ? (int64_t)m->cuda->weight_bytes : 0));
    return status;
}

/* Where panels are made for a few rows at a time. */
static int make_rooms(bmc_model *m) {
    /* Its output matrix is among those. */
    m->room_bytes = m->target && !m->cuda ? m->target->room_bytes : SOME;
    model_each_matrix(m, measure_room, &m->room_bytes);
    m->rooms_bytes = 2 * (size_t)pool_size(m->pool) * m->room_bytes;
    m->rooms = memory_map(m->rooms_bytes);
    return m->rooms ? 0 : fail(BMC_ENOMEM, "no memory for %.0f MB of panels", (double)m->rooms_bytes / 1e6);
}

/* The same output matrix is on one machine only. */
static int check_shared(const bmc_model *m) {
    if (!m->target || m->output.data || !m->target->cuda == !m->cuda)
        return 0;
    return fail(BMC_EINVAL, "draft head: its output matrix is the model's, which %s on a GPU",
                m->cuda ? "is not" : "is");
}

static int check_unready(const bmc_model *m, const char *who) {
    if (m->panels || m->rooms)
        return fail(BMC_EINVAL, "%s: the model is ready already", who);
    if (m->target && !m->target->rooms && !m->target->panels)
        return fail(BMC_EINVAL, "%s: the model of this draft head is not ready", who);
    return check_shared(m);
}

int bmc_model_map(bmc_model *m) {
    int status = check_unready(m, "bmc_model_map");
    if (status)
        return status;
    status = make_rooms(m);
    if (status)
        return status;
    m->panel_bytes = 0;
    model_each_matrix(m, measure_file, &m->panel_bytes);
    return finish_panels(m);
}

/* Panels of all matrices that are not late. */
static int pack(bmc_model *m) {
    m->early_bytes = early_bytes(m);
    m->panels = memory_map(m->early_bytes);
    if (!m->panels)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of weights", (double)m->early_bytes / 1e6);
    uint8_t *next = m->panels;
    model_each_matrix(m, place, &next);
    model_each_matrix(m, pack_matrix, m);
    return finish_panels(m);
}

int bmc_model_pack(bmc_model *m) {
    int status = check_unready(m, "bmc_model_pack");
    return status ? status : pack(m);
}

int bmc_model_pack_within(bmc_model *m, int64_t bytes) {
    int status = check_unready(m, "bmc_model_pack_within");
    if (status)
        return status;
    if (bytes >= (int64_t)m->panel_bytes)
        return pack(m);
    const size_t slot = residents_mark(m), early = early_bytes(m);
    if (!slot || bytes < (int64_t)(early + slot)) {
        status = bmc_model_map(m);
        return status ? status : BMC_IN_FILE;
    }
    status = residents_open(m, slot, (size_t)bytes - early);
    if (!status)
        status = make_rooms(m);
    if (!status)
        status = pack(m);
    return status ? status : BMC_EXPERTS_LATE;
}

/* Whether reading two bits a weight, and a few rows in full, saves a third of the bytes at
 * least, and many of them. */
static bool coarse_pays(const bmc_model *m) {
    const struct matrix *w = &m->output;
    struct panel_size size = panel_size(TYPE_COARSE, w->n_cols);
    return m->panels && !m->cuda && w->n_cols % COARSE_BLOCK == 0 && w->n_rows * w->n_cols >= COARSE_LEAST
           && 3 * (size.codes + size.scales) <= 2 * (w->code_stride + w->scale_stride);
}

static int coarsen(bmc_model *m) {
    const struct matrix *w = &m->output;
    m->coarse = (struct matrix){
        .type = TYPE_COARSE, .n_rows = w->n_rows, .n_cols = w->n_cols, .bias = w->bias,
    };
    m->coarse_bytes = 0;
    measure(&m->coarse, &m->coarse_bytes);
    m->coarse_bytes = memory_whole(m->coarse_bytes);
    uint8_t *next = m->coarse_panels = memory_map(m->coarse_bytes);
    struct packing p = { m, w, &m->coarse, NULL };
    p.floats = malloc((size_t)(pool_size(m->pool) * PANEL_ROWS) * (size_t)w->n_cols * sizeof *p.floats);
    if (next && p.floats) {
        place(&m->coarse, &next);
        pool_run(m->pool, pack_share, &p);
    } else {
        memory_unmap(m->coarse_panels, m->coarse_bytes);
        m->coarse_panels = NULL;
    }
    free(p.floats);
    if (!m->coarse.codes)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of a coarse head", (double)m->coarse_bytes / 1e6);
    return 1;
}

/* The target's coarse head, where a draft head has its output matrix. */
static int share_coarse(bmc_model *m) {
    int status = bmc_model_coarsen(m->target);
    if (status == 1)
        m->coarse = m->target->coarse;
    return status;
}

int bmc_model_coarsen(bmc_model *m) {
    pthread_mutex_lock(&m->lock);
    const bool shares = m->target && m->output.data == m->target->output.data;
    int status = m->coarse.codes ? 1 : shares ? share_coarse(m) : coarse_pays(m) ? coarsen(m) : 0;
    pthread_mutex_unlock(&m->lock);
    return status;
}

int bmc_model_pass(const bmc_model *m) { return m->pass_max; }

int64_t bmc_model_packed(const bmc_model *m, int64_t *total) {
    if (total)
        *total = (int64_t)m->panel_bytes + (m->cuda ? (int64_t)m->cuda->weight_bytes : 0);
    return atomic_load(&((bmc_model *)m)->packed);
}

/* Buffers: one block of address space, touched as far as a pass reaches. */

static void *take(char **next, size_t bytes) {
    void *p = *next;
    *next += (bytes + 63) / 64 * 64;
    return p;
}

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

/* The most that any block needs. */
static struct need needs(const bmc_model *m) {
    struct need all = { 0 };
    if (m->target)
        all = (struct need){ .floats = padded(2 * m->c.dim), .blocks = (size_t)m->c.dim / 16 + 1 };
    all.floats = largest(all.floats, padded(m->extent[PER_LAYERS]));
    for (const struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++) {
        const struct need n = b->kind->need(m, b);
        all = (struct need){ largest(all.floats, n.floats), largest(all.blocks, n.blocks),
                             largest(all.ids, n.ids), largest(all.kept, n.kept),
                             largest(all.scratch, n.scratch) };
    }
    return all;
}

static int most_turns(const bmc_config *c) {
    int turns = 0;
    for (int i = 0; i < c->n_ropes; i++)
        turns = larger(turns, c->ropes[i].dim / 2);
    return turns;
}

/* Whether a router reads what a layer reads. */
static bool keeps_input(const bmc_model *m) {
    for (int i = 0; i < m->c.n_blocks; i++)
        if (m->blocks[i].c.kind == BMC_EXPERTS && m->blocks[i].c.route == BMC_ROUTE_LAYER)
            return true;
    return false;
}

/* Lays the buffers out from `memory` on; returns the bytes they take. Called with NULL to learn how many. */
static size_t lay_out(const bmc_model *m, struct need need, struct buffers *b, char *memory) {
    const bmc_config *c = &m->c;
    char *next = memory;
    const size_t n = (size_t)m->pass_max, row = n * padded(c->dim) * sizeof(float);
    const size_t blocks = (size_t)c->dim / 32 + 1;
    const size_t threads = (size_t)pool_size(m->pool), block = sizeof(struct act_block);
    b->turns = most_turns(c);
    b->x = take(&next, row);
    b->y[0] = take(&next, row);
    b->y[1] = take(&next, row);
    b->input = keeps_input(m) ? take(&next, row) : NULL;
    b->kept_stride = padded((int64_t)need.kept);
    b->kept = need.kept ? take(&next, n * b->kept_stride * sizeof(float)) : NULL;
    b->xb = take(&next, row);
    b->own_xb = take(&next, threads * FEW * padded(c->dim) * sizeof(float));
    b->act = take(&next, n * blocks * block);
    b->own_act = take(&next, threads * FEW * blocks * block);
    b->per_layer = take(&next, n * padded(m->extent[PER_LAYERS]) * sizeof(float));
    b->work = take(&next, n * need.floats * sizeof(float));
    b->work_act = take(&next, n * need.blocks * block);
    b->work_ids = take(&next, n * need.ids * sizeof(int32_t));
    b->cos = take(&next, (size_t)(c->n_ropes * b->turns) * n * sizeof(float));
    b->sin = take(&next, (size_t)(c->n_ropes * b->turns) * n * sizeof(float));
    b->rows = take(&next, SAMPLED_MAX * (size_t)c->vocab_size * sizeof(float));
    b->scratch_stride = largest(padded((int64_t)need.scratch), n * HEAD_ROWS);
    b->scratch_stride = largest(b->scratch_stride,
                                padded((int64_t)(c->vocab_size * sizeof(struct candidate) / sizeof(float))));
    b->scratch = take(&next, threads * b->scratch_stride * sizeof(float));
    b->altered = take(&next, threads * padded(c->vocab_size) * sizeof(float));
    b->pieces_done = take(&next, threads * TASKS_EACH * sizeof *b->pieces_done);
    b->parts = take(&next, PART_FLOATS * sizeof(float));
    return (size_t)(next - memory);
}

static int make_buffers(bmc_model *m) {
    const struct need need = needs(m);
    struct buffers *b = model_own(m, sizeof *b);
    if (!b)
        return fail(BMC_ENOMEM, "no memory for a model");
    b->bytes = memory_whole(lay_out(m, need, b, NULL));
    b->memory = memory_map(b->bytes);
    if (!b->memory)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of buffers", (double)b->bytes / 1e6);
    lay_out(m, need, b, b->memory);
    m->buffers = b;
    return 0;
}

/* The rope tables, copied. */
static int copy_ropes(bmc_model *m, const bmc_config *config) {
    bmc_rope_table *ropes = model_own(m, (size_t)config->n_ropes * sizeof *ropes);
    if (!ropes)
        return fail(BMC_ENOMEM, "no memory for a model");
    for (int i = 0; i < config->n_ropes; i++) {
        size_t bytes = (size_t)config->ropes[i].dim / 2 * sizeof(float);
        float *freq = model_own(m, bytes);
        if (!freq)
            return fail(BMC_ENOMEM, "no memory for a model");
        ropes[i] = config->ropes[i];
        ropes[i].freq = memcpy(freq, config->ropes[i].freq, bytes);
    }
    m->c.ropes = ropes;
    return 0;
}

void add_rows(bmc_model *m, struct block *b, int n_heads, int k_dim, int v_dim) {
    b->rows = (b->c.window && m->c.causal ? WINDOWS : ALL_ROWS)
            + (m->cuda && b->number >= m->cuda->first ? GPU_ROWS : 0);
    b->stream = m->n_streams[b->rows]++;
    m->streams[b->rows][b->stream] = (struct arena_stream){
        .n_heads = n_heads,
        .tile_bytes = (int64_t)TILE * (int64_t)((size_t)k_dim + padded(v_dim)) * (int64_t)sizeof(uint16_t),
    };
    if (b->c.window && m->c.causal)
        m->window = larger(m->window, b->c.window);
}

void add_state(bmc_model *m, struct block *b, struct state_size size) {
    const int place = m->cuda && b->number >= m->cuda->first ? ON_GPU : HERE;
    b->stream = m->n_states[place]++;
    m->state_sizes[place][b->stream] = size;
}

void model_streams(bmc_model *m) {
    memset(m->n_streams, 0, sizeof m->n_streams);
    memset(m->n_states, 0, sizeof m->n_states);
    for (struct block *b = m->blocks; b < m->blocks + m->c.n_blocks; b++)
        if (b->kind->stream)
            b->kind->stream(m, b);
    for (int i = 0; i < ARENAS; i++)
        m->row_bytes[i] = arena_streams(m->streams[i], m->n_streams[i]) / TILE;
    for (int i = 0; i < PLACES; i++)
        states_measure(m->state_sizes[i], m->n_states[i]);
}

/* Blocks, and the streams of those that keep something of the tokens before. */
static int make_blocks(bmc_model *m, const bmc_config *config) {
    const size_t n = (size_t)config->n_blocks;
    m->c = *config;
    m->blocks = model_own(m, (n + 1) * sizeof *m->blocks);
    for (int i = 0; i < ARENAS; i++)
        m->streams[i] = model_own(m, n * sizeof *m->streams[i]);
    for (int i = 0; i < PLACES; i++)
        m->state_sizes[i] = model_own(m, n * sizeof *m->state_sizes[i]);
    for (int i = 0; i < ARENAS; i++)
        if (!m->streams[i])
            return fail(BMC_ENOMEM, "no memory for %zu blocks", n);
    if (!m->blocks || !m->state_sizes[HERE] || !m->state_sizes[ON_GPU] || copy_ropes(m, config))
        return fail(BMC_ENOMEM, "no memory for %zu blocks", n);
    m->c.blocks = NULL;
    m->last_mixer = -1;
    for (int i = 0; i < config->n_blocks; i++) {
        struct block *b = &m->blocks[i];
        b->c = config->blocks[i];
        b->kind = kind_find(b->c.kind);
        b->number = i;
        b->stream = -1;
        if (check_block(m, b))
            return BMC_EFORMAT;
        if (b->kind->mixes)
            m->last_mixer = i;
    }
    model_extents(m);
    model_streams(m);
    return 0;
}

static int build(bmc_model *m, const bmc_config *config, const bmc_tensor *tensors, int n_tensors,
                 int n_threads) {
    const struct kernels *kernels = kernels_find();
    int status = kernels ? check_config(config) : BMC_EINVAL;
    if (!status)
        status = make_blocks(m, config);
    if (status)
        return status;
    m->k = *kernels;
    m->pass_max = m->c.causal ? PASS_MAX : smaller(m->c.n_ctx, WHOLE_MAX);
    m->pool = pool_new(n_threads);
    if (!m->pool)
        return fail(BMC_ENOMEM, "no memory for %d threads", n_threads);
    for (int i = 0; !status && i < n_tensors; i++)
        status = model_bind(m, &tensors[i]);
    if (!status)
        status = model_check_bound(m);
    if (!status && m->target)
        status = check_head(m);
    if (!status)
        status = make_buffers(m);
    if (!status)
        model_measure(m);
    return status;
}

/* In a forked process: a pass of another thread is never finished. What it left in the buffers is overwritten
 * by the next pass, except for counters, which are 0 between passes. */
static void renew(struct forkable *f) {
    bmc_model *m = (bmc_model *)(void *)((char *)f - offsetof(bmc_model, forkable));
    pthread_mutex_init(&m->lock, NULL);
    residents_forget(m);
    for (int i = 0; m->buffers && m->buffers->memory && i < pool_size(m->pool) * TASKS_EACH; i++)
        atomic_init(&m->buffers->pieces_done[i], 0);
}

int bmc_model_new(const bmc_config *config, const bmc_tensor *tensors, int n_tensors, int n_threads,
                  bmc_model **model) {
    if (!config || !tensors || n_tensors < 1 || n_threads < 1 || n_threads > 1024 || !model)
        return fail(BMC_EINVAL, "bmc_model_new: needs settings, tensors and 1 to 1024 threads (%d)",
                    n_threads);
    bmc_model *m = calloc(1, sizeof *m);
    if (!m)
        return fail(BMC_ENOMEM, "no memory for a model");
    pthread_mutex_init(&m->lock, NULL);
    atomic_init(&m->n_users, 1);
    m->forkable.renew = renew;
    m->target = config->target;
    if (m->target)
        atomic_fetch_add(&m->target->n_users, 1);
    fork_hold();
    fork_add(&m->forkable);
    fork_release();
    int status = build(m, config, tensors, n_tensors, n_threads);
    if (status)
        bmc_model_free(m);
    else
        *model = m;
    return status;
}

void bmc_model_free(bmc_model *m) {
    if (m)
        model_release(m);
}

void model_release(bmc_model *m) {
    if (atomic_fetch_sub(&m->n_users, 1) > 1)
        return;
    fork_hold();
    fork_remove(&m->forkable);
    fork_release();
    pool_free(m->pool);
    cuda_free(m->cuda);
    cuda_stage_free(m->stage);
    memory_unmap(m->panels, m->early_bytes);
    residents_close(m);
    memory_unmap(m->coarse_panels, m->coarse_bytes);
    memory_unmap(m->rooms, m->rooms_bytes);
    if (m->buffers)
        memory_unmap(m->buffers->memory, m->buffers->bytes);
    for (int i = 0; i < m->owned.n; i++)
        free(m->owned.items[i]);
    free(m->owned.items);
    free(m->profile.laps);
    pthread_mutex_destroy(&m->lock);
    if (m->target)
        model_release(m->target);
    free(m);
}
