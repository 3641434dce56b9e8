/* Opening: check the settings, bind the tensors to their places, make the panels. */
#include "model.h"

#include "cpu.h"
#include "error.h"
#include "memory.h"
#include "pack.h"
#include "panels.h"
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

static int check_config(const bmc_config *c) {
    const struct { const char *name; int64_t value, low, high; } limits[] = {
        { "dim", c->dim, 1, 1 << 20 },
        { "hidden_dim", c->hidden_dim, 1, 1 << 22 },
        { "head_dim", c->head_dim, 1, 1024 },
        { "n_layers", c->n_layers, 1, 1024 },
        { "n_heads", c->n_heads, 1, 4096 },
        { "n_kv_heads", c->n_kv_heads, 1, c->n_heads },
        { "vocab_size", c->vocab_size, 1, 1 << 24 },
        { "n_ctx", c->n_ctx, 1, 1 << 30 },
        { "norm", c->norm, BMC_NORM_RMS, BMC_NORM_LAYER },
        { "act", c->act, BMC_ACT_SILU, BMC_ACT_GELU },
        { "rope", c->rope, BMC_ROPE_NONE, BMC_ROPE_HALVES },
        { "rope_dim", c->rope_dim, 0, c->head_dim },
        { "n_heads % n_kv_heads", c->n_heads % c->n_kv_heads, 0, 0 },
        { "n_ropes", c->n_ropes, c->rope != BMC_ROPE_NONE, 2 },
        { "rope_dim % 2", c->rope_dim % 2, 0, 0 },
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (in_range(limits[i].name, limits[i].value, limits[i].low, limits[i].high))
            return BMC_EFORMAT;
    for (int i = 0; i < c->n_layers; i++)
        if (in_range("layer_window", c->layer_window[i], 0, 1 << 30) ||
            in_range("layer_rope", c->layer_rope[i], 0, c->n_ropes > 1))
            return BMC_EFORMAT;
    for (int i = 0; i < c->n_ropes; i++)
        if (!c->rope_freq[i])
            return fail(BMC_EINVAL, "rope_freq: table %d is missing", i);
    return 0;
}

/* Roles: where a tensor belongs and what shape it has there. */

enum extent { ONE, DIM, HIDDEN, HEAD, Q, KV, VOCAB, CTX };

static int64_t extent(const bmc_model *m, enum extent e) {
    const bmc_config *c = &m->c;
    const int64_t values[] = { 1, c->dim, c->hidden_dim, c->head_dim, m->q_dim, m->kv_dim, c->vocab_size, c->n_ctx };
    return values[e];
}

struct role { const char *name; size_t offset; enum extent cols, rows; bool required; };

#define IN_LAYER(field) offsetof(struct layer, field)
#define IN_MODEL(field) offsetof(bmc_model, field)

static const struct role layer_matrices[] = {
    { "attn_q", IN_LAYER(attn_q), DIM, Q, true },
    { "attn_k", IN_LAYER(attn_k), DIM, KV, true },
    { "attn_v", IN_LAYER(attn_v), DIM, KV, true },
    { "attn_output", IN_LAYER(attn_output), Q, DIM, true },
    { "ffn_gate", IN_LAYER(ffn_gate), DIM, HIDDEN, false },
    { "ffn_up", IN_LAYER(ffn_up), DIM, HIDDEN, true },
    { "ffn_down", IN_LAYER(ffn_down), HIDDEN, DIM, true },
    { 0 },
};

static const struct role layer_vectors[] = {
    { "attn_norm", IN_LAYER(attn_norm), DIM, ONE, false },
    { "attn_norm.bias", IN_LAYER(attn_norm_bias), DIM, ONE, false },
    { "attn_q.bias", IN_LAYER(attn_q.bias), Q, ONE, false },
    { "attn_k.bias", IN_LAYER(attn_k.bias), KV, ONE, false },
    { "attn_v.bias", IN_LAYER(attn_v.bias), KV, ONE, false },
    { "attn_output.bias", IN_LAYER(attn_output.bias), DIM, ONE, false },
    { "attn_q_norm", IN_LAYER(attn_q_norm), HEAD, ONE, false },
    { "attn_k_norm", IN_LAYER(attn_k_norm), HEAD, ONE, false },
    { "attn_post_norm", IN_LAYER(attn_post_norm), DIM, ONE, false },
    { "ffn_norm", IN_LAYER(ffn_norm), DIM, ONE, false },
    { "ffn_norm.bias", IN_LAYER(ffn_norm_bias), DIM, ONE, false },
    { "ffn_gate.bias", IN_LAYER(ffn_gate.bias), HIDDEN, ONE, false },
    { "ffn_up.bias", IN_LAYER(ffn_up.bias), HIDDEN, ONE, false },
    { "ffn_down.bias", IN_LAYER(ffn_down.bias), DIM, ONE, false },
    { "ffn_post_norm", IN_LAYER(ffn_post_norm), DIM, ONE, false },
    { 0 },
};

static const struct role model_matrices[] = {
    { "token_embd", IN_MODEL(token_embd), DIM, VOCAB, true },
    { "position_embd", IN_MODEL(position_embd), DIM, CTX, false },
    { "output", IN_MODEL(output), DIM, VOCAB, true },
    { 0 },
};

static const struct role model_vectors[] = {
    { "output_norm", IN_MODEL(output_norm), DIM, ONE, true },
    { "output_norm.bias", IN_MODEL(output_norm_bias), DIM, ONE, false },
    { "output.bias", IN_MODEL(output.bias), VOCAB, ONE, false },
    { 0 },
};

static const struct role *find_role(const struct role *roles, const char *name) {
    for (; roles->name; roles++)
        if (!strcmp(roles->name, name))
            return roles;
    return NULL;
}

/* The file's name for it, nearly always. */
static const char *full_name(const bmc_tensor *t, char text[64]) {
    const char *end = strchr(t->role, '.') ? "" : ".weight";
    if (t->layer >= 0)
        snprintf(text, 64, "blk.%d.%s%s", (int)t->layer, t->role, end);
    else
        snprintf(text, 64, "%s%s", t->role, end);
    return text;
}

static int check_tensor(const bmc_model *m, const bmc_tensor *t, const struct role *role, bool matrix) {
    char name[64];
    const struct type *type = type_find(t->type);
    int64_t cols = extent(m, role->cols), rows = extent(m, role->rows);
    full_name(t, name);
    if (!type || !type->dequantize || (matrix && !panel_runs(t->type)))
        return fail(BMC_EFORMAT, "%s: pybmc does not compute with type %s", name, type ? type->name : "unknown");
    if (t->n_cols != cols || t->n_rows != rows)
        return fail(BMC_EFORMAT, "%s: expected %lld rows of %lld values, found %lld of %lld (%s)", name,
                    (long long)rows, (long long)cols, (long long)t->n_rows, (long long)t->n_cols, type->name);
    if (cols % type->block_size)
        return fail(BMC_EFORMAT, "%s: rows of %lld are not whole blocks of %s (%d)", name, (long long)cols, type->name,
                    type->block_size);
    return t->data ? 0 : fail(BMC_EINVAL, "%s: data is NULL", name);
}

/* Memory that lives as long as the model. */
static void *own(bmc_model *m, size_t bytes) {
    void **items = realloc(m->owned.items, ((size_t)m->owned.n + 1) * sizeof *items);
    if (!items)
        return NULL;
    m->owned.items = items;
    void *item = calloc(1, bytes ? bytes : 1);
    if (item)
        items[m->owned.n++] = item;
    return item;
}

static int bind_vector(bmc_model *m, const bmc_tensor *t, const float **place) {
    float *values = own(m, padded((int)t->n_cols) * sizeof *values);
    if (!values)
        return fail(BMC_ENOMEM, "no memory for %s", t->role);
    type_find(t->type)->dequantize(t->data, t->n_cols, values);
    *place = values;
    return 0;
}

static void bind_matrix(const bmc_tensor *t, struct matrix *place) {
    place->type = t->type;
    place->mapped = t->mapped;
    place->n_rows = t->n_rows;
    place->n_cols = t->n_cols;
    place->data = t->data;
}

static int bind(bmc_model *m, const bmc_tensor *t) {
    char name[64];
    bool in_layer = t->layer >= 0;
    if (t->layer < -1 || t->layer >= m->c.n_layers)
        return fail(BMC_EFORMAT, "%s: the model has %d layers", full_name(t, name), (int)m->c.n_layers);
    char *base = in_layer ? (char *)&m->layers[t->layer] : (char *)m;
    const struct role *matrix = find_role(in_layer ? layer_matrices : model_matrices, t->role);
    const struct role *role = matrix ? matrix : find_role(in_layer ? layer_vectors : model_vectors, t->role);
    if (!role)
        return fail(BMC_EFORMAT, "%s: there is no such role", full_name(t, name));
    int status = check_tensor(m, t, role, matrix);
    if (status)
        return status;
    if (!matrix)
        return bind_vector(m, t, (const float **)(void *)(base + role->offset));
    bind_matrix(t, (struct matrix *)(void *)(base + role->offset));
    return 0;
}

static int check_bound(const char *base, const struct role *roles, int layer, bool matrix) {
    char name[64];
    for (; roles->name; roles++) {
        const void *place = base + roles->offset;
        bool bound = matrix ? ((const struct matrix *)place)->data != NULL : *(float *const *)place != NULL;
        if (roles->required && !bound)
            return fail(BMC_EFORMAT, "%s is missing",
                        full_name(&(bmc_tensor){ .role = roles->name, .layer = layer }, name));
    }
    return 0;
}

static int check_all_bound(const bmc_model *m) {
    int status = check_bound((const char *)m, model_matrices, -1, true);
    if (!status)
        status = check_bound((const char *)m, model_vectors, -1, false);
    for (int i = 0; !status && i < m->c.n_layers; i++)
        status = check_bound((const char *)&m->layers[i], layer_matrices, i, true);
    return status;
}

/* Panels. */

static void each_matrix(bmc_model *m, void (*fn)(struct matrix *, void *), void *arg) {
    for (int i = 0; i < m->c.n_layers; i++)
        for (const struct role *r = layer_matrices; r->name; r++) {
            struct matrix *matrix = (void *)((char *)&m->layers[i] + r->offset);
            if (matrix->data)
                fn(matrix, arg);
        }
    fn(&m->output, arg);
}

static int64_t n_panels(const struct matrix *w) { return (w->n_rows + PANEL_ROWS - 1) / PANEL_ROWS; }

static void measure(struct matrix *w, void *bytes) {
    struct panel_size size = panel_size(w->type, w->n_cols);
    w->code_stride = size.codes;
    w->scale_stride = size.scales;
    *(size_t *)bytes += (size_t)n_panels(w) * (size.codes + size.scales) + 64;
}

static void place(struct matrix *w, void *next) {
    uint8_t **p = next;
    size_t codes = (size_t)n_panels(w) * w->code_stride, scales = (size_t)n_panels(w) * w->scale_stride;
    w->codes = *p;
    w->scales = w->codes + codes;
    *p += (codes + scales + 63) / 64 * 64;
}

/* floats: where the panels are of coarse weights, rows on their way, (threads, PANEL_ROWS, n_cols). */
struct packing { bmc_model *model; const struct matrix *file; struct matrix *panels; float *floats; };

/* Rows of a panel as pack_panel reads them: the file's, or floats made of them. */
static const void *panel_rows(const struct packing *p, int thread, int64_t row, int n, size_t *row_bytes) {
    const struct matrix *w = p->file;
    const uint8_t *data = w->data + (size_t)row * file_row_bytes(w);
    *row_bytes = file_row_bytes(w);
    if (!p->floats)
        return data;
    float *rows = p->floats + (size_t)(thread * PANEL_ROWS) * (size_t)w->n_cols;
    for (int i = 0; i < n; i++)
        type_find(w->type)->dequantize(data + (size_t)i * *row_bytes, w->n_cols, rows + (size_t)i * (size_t)w->n_cols);
    *row_bytes = (size_t)w->n_cols * sizeof *rows;
    return rows;
}

/* This thread's panels; the file's pages are given back as they are done, a megabyte at a time. */
static void pack_share(void *arg, int thread) {
    struct packing *p = arg;
    const struct matrix *w = p->file, *out = p->panels;
    int64_t from, to, kept;
    pool_share(p->model->pool, thread, n_panels(w), 1, &from, &to);
    kept = from * PANEL_ROWS;
    for (int64_t panel = from; panel < to; panel++) {
        int64_t row = panel * PANEL_ROWS;
        int n = w->n_rows - row < PANEL_ROWS ? (int)(w->n_rows - row) : PANEL_ROWS;
        size_t row_bytes;
        const void *rows = panel_rows(p, thread, row, n, &row_bytes);
        pack_panel(out->type, rows, row_bytes, n, w->n_cols, out->codes + (size_t)panel * out->code_stride,
                   out->scales + (size_t)panel * out->scale_stride);
        if (!p->floats)
            atomic_fetch_add(&p->model->packed, (int64_t)(out->code_stride + out->scale_stride));
        size_t done = (size_t)(row + n - kept) * file_row_bytes(w);
        if (w->mapped && (done >= 1 << 20 || panel == to - 1)) {
            memory_give_back(w->data + (size_t)kept * file_row_bytes(w), done);
            kept = row + n;
        }
    }
}

static void pack_matrix(struct matrix *w, void *model) {
    struct packing p = { model, w, w, NULL };
    pool_run(p.model->pool, pack_share, &p);
}

static void measure_file(struct matrix *w, void *bytes) {
    *(size_t *)bytes += (size_t)w->n_rows * file_row_bytes(w);
}

static void measure_room(struct matrix *w, void *bytes) {
    size_t room = (ROOM_PANELS * (w->code_stride + w->scale_stride) + 63) / 64 * 64;
    *(size_t *)bytes = room > *(size_t *)bytes ? room : *(size_t *)bytes;
}

int bmc_model_map(bmc_model *m) {
    if (m->panels || m->rooms)
        return fail(BMC_EINVAL, "bmc_model_map: the model is ready already");
    each_matrix(m, measure_room, &m->room_bytes);
    m->rooms_bytes = 2 * (size_t)pool_size(m->pool) * m->room_bytes;
    m->rooms = memory_map(m->rooms_bytes);
    if (!m->rooms)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of panels", (double)m->rooms_bytes / 1e6);
    m->panel_bytes = 0;
    each_matrix(m, measure_file, &m->panel_bytes);
    atomic_store(&m->packed, (int64_t)m->panel_bytes);
    return 0;
}

int bmc_model_pack(bmc_model *m) {
    if (m->panels || m->rooms)
        return fail(BMC_EINVAL, "bmc_model_pack: done already");
    m->panels = memory_map(m->panel_bytes);
    if (!m->panels)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of weights", (double)m->panel_bytes / 1e6);
    uint8_t *next = m->panels;
    each_matrix(m, place, &next);
    each_matrix(m, pack_matrix, m);
    atomic_store(&m->packed, (int64_t)m->panel_bytes);
    return 0;
}

/* Whether reading two bits a weight, and a few rows in full, saves a third of the bytes at least, and many of them. */
static bool coarse_pays(const bmc_model *m) {
    const struct matrix *w = &m->output;
    struct panel_size size = panel_size(TYPE_COARSE, w->n_cols);
    return m->panels && w->n_cols % COARSE_BLOCK == 0 && w->n_rows * w->n_cols >= COARSE_LEAST
           && 3 * (size.codes + size.scales) <= 2 * (w->code_stride + w->scale_stride);
}

static int coarsen(bmc_model *m) {
    m->coarse = (struct matrix){ .type = TYPE_COARSE, .n_rows = m->output.n_rows, .n_cols = m->output.n_cols, .bias = m->output.bias };
    m->coarse_bytes = 0;
    measure(&m->coarse, &m->coarse_bytes);
    m->coarse_bytes = memory_whole(m->coarse_bytes);
    uint8_t *next = m->coarse_panels = memory_map(m->coarse_bytes);
    struct packing p = { m, &m->output, &m->coarse, NULL };
    p.floats = malloc((size_t)(pool_size(m->pool) * PANEL_ROWS) * (size_t)m->output.n_cols * sizeof *p.floats);
    if (next && p.floats) {
        place(&m->coarse, &next);
        pool_run(m->pool, pack_share, &p);
    } else {
        memory_unmap(m->coarse_panels, m->coarse_bytes);
        m->coarse_panels = NULL;
    }
    free(p.floats);
    return m->coarse.codes ? 1 : fail(BMC_ENOMEM, "no memory for %.0f MB of a coarse head", (double)m->coarse_bytes / 1e6);
}

int bmc_model_coarsen(bmc_model *m) {
    pthread_mutex_lock(&m->lock);
    int status = m->coarse.codes ? 1 : coarse_pays(m) ? coarsen(m) : 0;
    pthread_mutex_unlock(&m->lock);
    return status;
}

int64_t bmc_model_packed(const bmc_model *m, int64_t *total) {
    if (total)
        *total = (int64_t)m->panel_bytes;
    return atomic_load(&((bmc_model *)m)->packed);
}

/* Buffers: one block of address space, touched as far as a pass reaches. */

static void *take(char **next, size_t bytes) {
    void *p = *next;
    *next += (bytes + 63) / 64 * 64;
    return p;
}

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

/* Lays the buffers out from `memory` on; returns the bytes they take. Called with NULL to learn how many. */
static size_t lay_out(const bmc_model *m, struct buffers *b, char *memory) {
    const bmc_config *c = &m->c;
    char *next = memory;
    const size_t row = PASS_MAX * sizeof(float), turns = (size_t)c->rope_dim / 2;
    const size_t threads = (size_t)pool_size(m->pool), block = sizeof(struct act_block);
    size_t heads = largest(64, (size_t)(c->n_heads / c->n_kv_heads));
    b->x = take(&next, row * padded(c->dim));
    b->xb = take(&next, row * largest(padded(c->dim), padded(m->q_dim)));
    b->own_xb = take(&next, threads * FEW * padded(c->dim) * sizeof(float));
    b->y = take(&next, row * padded(c->dim));
    b->q = take(&next, row * padded(m->q_dim));
    b->k = take(&next, row * padded(m->kv_dim));
    b->v = take(&next, row * padded(m->kv_dim));
    b->gate = take(&next, row * padded(c->hidden_dim));
    b->up = take(&next, row * padded(c->hidden_dim));
    b->act = take(&next, PASS_MAX * (largest((size_t)c->dim, (size_t)m->q_dim) / 32 + 1) * block);
    b->own_act = take(&next, threads * FEW * ((size_t)c->dim / 32 + 1) * block);
    b->hidden_act = take(&next, PASS_MAX * ((size_t)c->hidden_dim / 32 + 1) * block);
    b->cos = take(&next, 2 * row * turns);
    b->sin = take(&next, 2 * row * turns);
    b->rows = take(&next, SAMPLED_MAX * (size_t)c->vocab_size * sizeof(float));
    b->scratch_stride = largest(heads * (size_t)m->v_dim + 2 * heads, (size_t)PASS_MAX * HEAD_ROWS);
    b->scratch_stride = largest(b->scratch_stride, (size_t)c->vocab_size * sizeof(struct candidate) / sizeof(float));
    b->scratch = take(&next, threads * b->scratch_stride * sizeof(float));
    b->altered = take(&next, threads * padded(c->vocab_size) * sizeof(float));
    b->pieces_done = take(&next, threads * TASKS_EACH * sizeof *b->pieces_done);
    b->parts = take(&next, PART_FLOATS * sizeof(float));
    return (size_t)(next - memory);
}

static int make_buffers(bmc_model *m) {
    struct buffers *b = m->buffers = own(m, sizeof *b);
    if (!b)
        return fail(BMC_ENOMEM, "no memory for a model");
    b->bytes = memory_whole(lay_out(m, b, NULL));
    b->memory = memory_map(b->bytes);
    if (!b->memory)
        return fail(BMC_ENOMEM, "no memory for %.0f MB of buffers", (double)b->bytes / 1e6);
    lay_out(m, b, b->memory);
    return 0;
}

/* The configuration with its arrays copied. */
static int copy_config(bmc_model *m, const bmc_config *config) {
    bmc_config *c = &m->c;
    size_t layers = (size_t)config->n_layers * sizeof(int32_t), turns = (size_t)config->rope_dim / 2 * sizeof(float);
    int32_t *window = own(m, layers), *rope = own(m, layers);
    float *freq[2] = { own(m, turns), own(m, turns) };
    *c = *config;
    if (!window || !rope || !freq[0] || !freq[1])
        return fail(BMC_ENOMEM, "no memory for a model");
    c->layer_window = memcpy(window, config->layer_window, layers);
    c->layer_rope = memcpy(rope, config->layer_rope, layers);
    for (int i = 0; i < 2; i++) {
        if (config->rope_freq[i])
            memcpy(freq[i], config->rope_freq[i], turns);
        c->rope_freq[i] = freq[i];
    }
    m->q_dim = c->n_heads * c->head_dim;
    m->kv_dim = c->n_kv_heads * c->head_dim;
    m->v_dim = (int)padded(c->head_dim);
    return 0;
}

static int build(bmc_model *m, const bmc_config *config, const bmc_tensor *tensors, int n_tensors, int n_threads) {
    const struct kernels *kernels = kernels_find();
    int status = kernels ? check_config(config) : BMC_EINVAL;
    if (!status)
        status = copy_config(m, config);
    if (status)
        return status;
    m->k = *kernels;
    m->layers = own(m, (size_t)config->n_layers * sizeof *m->layers);
    m->pool = pool_new(n_threads);
    if (!m->layers || !m->pool)
        return fail(BMC_ENOMEM, "no memory for %d layers and %d threads", (int)config->n_layers, n_threads);
    for (int i = 0; i < config->n_layers; i++) {
        m->layers[i].window = config->layer_window[i];
        m->layers[i].rope = config->layer_rope[i];
    }
    for (int i = 0; !status && i < n_tensors; i++)
        status = bind(m, &tensors[i]);
    if (!status)
        status = check_all_bound(m);
    if (!status)
        status = make_buffers(m);
    if (!status)
        each_matrix(m, measure, &m->panel_bytes);
    m->panel_bytes = memory_whole(m->panel_bytes);
    return status;
}

/* In a forked process: a pass of another thread is never finished. What it left in the buffers is overwritten by the
 * next pass, except for counters, which are 0 between passes. */
static void renew(struct forkable *f) {
    bmc_model *m = (bmc_model *)(void *)((char *)f - offsetof(bmc_model, forkable));
    pthread_mutex_init(&m->lock, NULL);
    for (int i = 0; m->buffers && m->buffers->memory && i < pool_size(m->pool) * TASKS_EACH; i++)
        atomic_init(&m->buffers->pieces_done[i], 0);
}

int bmc_model_new(const bmc_config *config, const bmc_tensor *tensors, int n_tensors, int n_threads, bmc_model **model) {
    if (!config || !tensors || n_tensors < 1 || n_threads < 1 || n_threads > 1024 || !model)
        return fail(BMC_EINVAL, "bmc_model_new: needs settings, tensors and 1 to 1024 threads (%d)", n_threads);
    bmc_model *m = calloc(1, sizeof *m);
    if (!m)
        return fail(BMC_ENOMEM, "no memory for a model");
    pthread_mutex_init(&m->lock, NULL);
    atomic_init(&m->n_users, 1);
    m->forkable.renew = renew;
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
    memory_unmap(m->panels, m->panel_bytes);
    memory_unmap(m->coarse_panels, m->coarse_bytes);
    memory_unmap(m->rooms, m->rooms_bytes);
    if (m->buffers)
        memory_unmap(m->buffers->memory, m->buffers->bytes);
    for (int i = 0; i < m->owned.n; i++)
        free(m->owned.items[i]);
    free(m->owned.items);
    free(m->profile.laps);
    pthread_mutex_destroy(&m->lock);
    free(m);
}
