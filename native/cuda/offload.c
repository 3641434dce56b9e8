/* Which blocks of a model run on a GPU, and how their weights get there. */
#include "chunk.h"

#include "../error.h"
#include "../pack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Bytes of weights on their way; floats at most for sums of chunks that wait to be merged: passes that need
 * more do not cut. */
enum { SENT_AT_ONCE = 16 << 20, CUT_FLOATS = 16 << 20 };

/* Planning. */

static int64_t copies_of(const struct block *b, const struct role *r) {
    return b->extent[r->count ? r->count : EXPERTS];
}

/* The matrices of a role that has several; else NULL. */
static const struct matrix *list_of(const struct block *b, const struct role *r) {
    const struct matrices *list = (const void *)((const char *)b + r->offset);
    return r->form == MATRICES ? list->of : NULL;
}

/* Why a block cannot run there; NULL: it can. Experts, and heads, are found by their number, so all of them
 * need to be alike in memory. */
static const char *cannot(const struct block *b) {
    for (const struct role *r = b->kind->roles; r->name; r++) {
        const struct matrix *of = list_of(b, r);
        for (int64_t i = 1; of && i < copies_of(b, r); i++)
            if (of[i].type != of->type || !of[i].bias != !of->bias)
                return "experts of several types";
    }
    return NULL;
}

static int layer_start(const bmc_model *m, int i) {
    while (i > 0 && m->blocks[i - 1].c.layer == m->blocks[i].c.layer)
        i--;
    return i;
}

/* Layers of blocks [first, n_blocks). */
static int layers_from(const bmc_model *m, int first) {
    int n = 0;
    for (int i = first; i < m->c.n_blocks; i++)
        n += i == first || m->blocks[i].c.layer != m->blocks[i - 1].c.layer;
    return n;
}

/* The block after the layer of block i. */
static int layer_end(const bmc_model *m, int i) {
    const int layer = m->blocks[i].c.layer;
    while (i < m->c.n_blocks && m->blocks[i].c.layer == layer)
        i++;
    return i;
}

/* The first block from `first` on that reads rows of one before it; n_blocks: there is none. */
static int reads_before(const bmc_model *m, int first) {
    int i = first;
    while (i < m->c.n_blocks && i - m->blocks[i].c.kv_from >= first)
        i++;
    return i;
}

/* How many layers can run there if those of the blocks from `first` on are to be among them. */
static int together(const bmc_model *m, int first) {
    while (reads_before(m, first) < m->c.n_blocks)
        first = layer_start(m, first - 1);
    return layers_from(m, first);
}

/* The first block of the last n_layers layers that can run there with all that follow. */
static int first_block(const bmc_model *m, int n_layers, char why[128]) {
    int first = m->c.n_blocks;
    why[0] = 0;
    for (int n = 0; n < n_layers && first > 0; n++)
        first = layer_start(m, first - 1);
    for (int i = m->c.n_blocks - 1; i >= first; i--)
        if (cannot(&m->blocks[i])) {
            snprintf(why, 128, "layer %d has %s, which pybmc computes on the CPU", (int)m->blocks[i].c.layer,
                     cannot(&m->blocks[i]));
            first = layer_end(m, i);
        }
    const int n = together(m, first);
    for (int i = reads_before(m, first); i < m->c.n_blocks; i = reads_before(m, first)) {
        const struct block *b = &m->blocks[i];
        snprintf(why, 128, "layer %d reads keys and values of layer %d; both go there with %d layers or more",
                 (int)b->c.layer, (int)(b - b->c.kv_from)->c.layer, n);
        first = layer_end(m, i);
    }
    return first;
}

/* Matrices of the blocks from `first` on, and the output matrix. */
struct visit {
    const bmc_model *m;
    int first;
    struct cuda *cuda;
    size_t bytes;
    int status;
    uint8_t *next;
    char *stage;
};

/* Whether it is one of a block's lists of matrices. */
static bool is_listed(const struct block *b, const struct matrix *w) {
    for (const struct role *r = b->kind->roles; r->name; r++) {
        const struct matrix *of = list_of(b, r);
        if (of && w >= of && w < of + copies_of(b, r))
            return true;
    }
    return false;
}

bool cuda_there(const bmc_model *m, int first, const struct matrix *w) {
    const char *p = (const char *)w;
    if (w == &m->output)
        return true;
    if (w == &m->per_layer_proj)
        return !first;
    if (w == &m->eh_proj)
        return false;
    for (const struct block *b = m->blocks + first; b < m->blocks + m->c.n_blocks; b++)
        if ((p >= (const char *)b && p < (const char *)(b + 1)) || is_listed(b, w))
            return true;
    return false;
}

static bool there(const struct visit *v, const struct matrix *w) { return cuda_there(v->m, v->first, w); }

static size_t matrix_bytes(const struct matrix *w) {
    const struct panel_size size = panel_size(w->type, w->n_cols);
    return ((size_t)matrix_panels(w) * (size.codes + size.scales) + 63) / 64 * 64;
}

static void add_bytes(struct matrix *w, void *visit) {
    struct visit *v = visit;
    if (there(v, w))
        v->bytes += matrix_bytes(w);
}

static void *take(char **next, size_t bytes) {
    void *p = *next;
    *next += (bytes + 255) / 256 * 256;
    return p;
}

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* Room for the sums of a pass that is not cut into chunks, and of one of few tokens over a whole context that
 * is. */
static size_t part_floats(const bmc_model *m, const bmc_block *b) {
    const size_t query = (size_t)b->n_heads * (padded(b->kind == BMC_MLA ? b->kv_rank : b->v_dim) + 2);
    const size_t cut = GRAPH_TOKENS * query * (size_t)((m->c.n_ctx + CHUNK - 1) / CHUNK);
    return most((size_t)m->pass_max * query, cut < CUT_FLOATS ? cut : CUT_FLOATS);
}

/* Lays the buffers of a pass out from `memory` on; returns the bytes they take. */
static size_t lay_out(const bmc_model *m, struct cuda *c, char *memory) {
    struct buffers *b = &c->buffers;
    const size_t n = (size_t)m->pass_max, row = n * padded(m->c.dim) * sizeof(float);
    struct need need = { 0 };
    size_t ids = 0;
    bool keeps_input = false;
    char *next = memory;
    c->part_floats = 0;
    c->inputs = c->first < m->c.n_blocks ? padded(m->extent[PER_LAYERS]) : 0;
    need.floats = c->first ? 0 : c->inputs;     /* per_layer_inputs makes them there */
    for (const struct block *block = m->blocks + c->first; block < m->blocks + m->c.n_blocks; block++) {
        const struct need own = block->kind->need(m, block);
        need = (struct need){ .floats = most(need.floats, own.floats),
                              .blocks = most(need.blocks, own.blocks),
                              .kept = most(need.kept, own.kept) };
        if (block->c.kind == BMC_EXPERTS) {
            ids = most(ids, cuda_mixture_ids(m, block));
            keeps_input |= block->c.route == BMC_ROUTE_LAYER;
        }
        if (block->c.kind == BMC_ATTENTION || block->c.kind == BMC_MLA)
            c->part_floats = most(c->part_floats, part_floats(m, &block->c));
    }
    b->x = take(&next, row);
    b->y[0] = take(&next, row);
    b->y[1] = take(&next, row);
    b->xb = take(&next, row);
    b->act = take(&next, n * (size_t)(m->c.dim / 32 + 1) * sizeof *b->act);
    b->work = take(&next, n * need.floats * sizeof *b->work);
    b->work_act = take(&next, n * need.blocks * sizeof *b->work_act);
    b->work_ids = take(&next, ids * sizeof *b->work_ids);
    b->input = keeps_input ? take(&next, row) : NULL;
    b->kept_stride = need.kept ? m->buffers->kept_stride : 0;
    b->kept = need.kept ? take(&next, n * b->kept_stride * sizeof *b->kept) : NULL;
    b->per_layer = take(&next, n * c->inputs * sizeof *b->per_layer);
    b->parts = take(&next, c->part_floats * sizeof *b->parts);
    b->rows = take(&next, c->n_parts ? SAMPLED_MAX * padded(m->c.vocab_size) * sizeof *b->rows : 0);
    c->best = take(&next, n * c->n_parts * sizeof *c->best);
    next += chunk_lay_out(m, c, next);
    return (size_t)(next - memory);
}

static bool has_head(const bmc_model *m) { return m->output.data || m->target; }

int bmc_model_plan(const bmc_model *m, int n_layers, bmc_plan *plan) {
    if (!m || !plan || n_layers < 0)
        return fail(BMC_EINVAL, "bmc_model_plan: needs a model and 0 or more layers, found %d", n_layers);
    struct cuda c = { .n_parts = has_head(m) ? (size_t)head_parts(m) : 0 };
    c.first = first_block(m, n_layers, plan->why);
    struct visit v = { .m = m, .first = c.first };
    model_each_matrix((bmc_model *)m, add_bytes, &v);
    plan->n_layers = layers_from(m, c.first);
    plan->weight_bytes = (int64_t)v.bytes;
    plan->buffer_bytes = (int64_t)lay_out(m, &c, NULL);
    plan->stream_bytes = (int64_t)cuda_stage_bytes(m, c.first);
    plan->row_bytes = 0;
    for (const struct block *b = m->blocks + c.first; b < m->blocks + m->c.n_blocks; b++)
        if (b->stream >= 0 && (b->c.kind == BMC_ATTENTION || b->c.kind == BMC_MLA))
            plan->row_bytes +=
                m->streams[b->rows][b->stream].n_heads * m->streams[b->rows][b->stream].tile_bytes / TILE;
    return 0;
}

/* Norms, biases and tables. */

/* n values at *place, which gets their address on the GPU. */
typedef void each_fn(struct cuda *c, const float **place, size_t n, char *host);

static void each_vector(struct cuda *c, struct vector *v, each_fn *fn, char *host) {
    if (v->v)
        fn(c, &v->v, (size_t)v->n_rows * (size_t)v->n_cols, host);
}

/* Columns first, each of them padded: bind.c. */
static void each_transposed(struct cuda *c, struct vector *v, each_fn *fn, char *host) {
    if (v->v)
        fn(c, &v->v, padded(v->n_rows) * (size_t)v->n_cols, host);
}

static void each_of_block(struct cuda *c, struct block *b, each_fn *fn, char *host) {
    struct vector *own[] = { &b->norm,     &b->norm_bias, &b->post_norm,    &b->post_norm_bias,
                             &b->sum_norm, &b->out_norm,  &b->out_norm_bias };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        each_vector(c, own[i], fn, host);
    for (const struct role *r = b->kind->roles, *before = NULL; r->name; before = r++) {
        void *place = (char *)b + r->offset;
        if (before && before->offset == r->offset)
            continue;
        if (r->form == VECTOR)
            each_vector(c, place, fn, host);
        else if (r->form == TRANSPOSED)
            each_transposed(c, place, fn, host);
        else {
            struct matrix *list = r->form == MATRIX ? place : ((struct matrices *)place)->of;
            const int64_t n = r->form == MATRIX ? 1 : copies_of(b, r);
            for (int64_t i = 0; list && i < n; i++)
                if (list[i].bias)
                    fn(c, &list[i].bias, (size_t)list[i].n_rows, host);
        }
    }
}

static void each_value(bmc_model *m, struct cuda *c, each_fn *fn, char *host) {
    for (int i = c->first; i < m->c.n_blocks; i++) {
        each_of_block(c, &m->blocks[i], fn, host);
        const float **const tables[] = { &c->factors[i].gate, &c->factors[i].up, &c->factors[i].down };
        for (size_t j = 0; j < sizeof tables / sizeof *tables; j++)
            if (*tables[j])
                fn(c, tables[j], (size_t)m->blocks[i].c.n_experts, host);
        if (c->slopes[i])
            fn(c, &c->slopes[i], (size_t)m->blocks[i].c.n_heads, host);
    }
    if (!c->first)
        each_vector(c, &m->per_layer_norm, fn, host);
    each_vector(c, &m->output_norm, fn, host);
    each_vector(c, &m->output_norm_bias, fn, host);
    if (m->output.data && m->output.bias)
        fn(c, &m->output.bias, (size_t)m->output.n_rows, host);
    fn(c, (const float **)(void *)&c->rope_dims, (size_t)m->c.n_ropes, host);
}

static size_t value_bytes(size_t n) { return (n * sizeof(float) + 255) / 256 * 256; }

static void count_value(struct cuda *c, const float **place, size_t n, char *host) {
    (void)place, (void)host;
    c->vector_bytes += value_bytes(n);
}

/* To its place in the host's copy; from now on the address is the GPU's. */
static void move_value(struct cuda *c, const float **place, size_t n, char *host) {
    if (n)
        memcpy(host + c->vectors_used, *place, n * sizeof **place);
    *place = (const float *)(void *)((char *)c->vectors + c->vectors_used);
    c->vectors_used += value_bytes(n);
}

/* The factors of experts' products; NULL where there are none. */
static int make_factors(bmc_model *m, const struct matrices *list, int n, const float **table) {
    float *factors = NULL;
    for (int i = 0; list->of && i < n; i++) {
        if (list->of[i].factor != 0 && !factors)
            factors = model_own(m, (size_t)n * sizeof *factors);
        if (list->of[i].factor != 0 && !factors)
            return fail(BMC_ENOMEM, "no memory for a model");
        if (factors)
            factors[i] = list->of[i].factor;
    }
    *table = factors;
    return 0;
}

static int make_expert_tables(bmc_model *m, struct cuda *c) {
    int status = 0;
    for (int i = c->first; !status && i < m->c.n_blocks; i++) {
        const struct block *b = &m->blocks[i];
        const struct { const struct matrices *list; const float **table; } rows[] = {
            { &b->experts.gate, &c->factors[i].gate },
            { &b->experts.up, &c->factors[i].up },
            { &b->experts.down, &c->factors[i].down },
        };
        for (size_t j = 0; b->c.kind == BMC_EXPERTS && !status && j < sizeof rows / sizeof *rows; j++)
            status = make_factors(m, rows[j].list, b->c.n_experts, rows[j].table);
    }
    return status;
}

static int make_tables(bmc_model *m, struct cuda *c) {
    int32_t *dims = model_own(m, (size_t)m->c.n_ropes * sizeof *dims);
    c->slopes = model_own(m, (size_t)m->c.n_blocks * sizeof *c->slopes);
    c->factors = model_own(m, (size_t)m->c.n_blocks * sizeof *c->factors);
    if (!dims || !c->slopes || !c->factors)
        return fail(BMC_ENOMEM, "no memory for a model");
    if (make_expert_tables(m, c))
        return BMC_ENOMEM;
    for (int i = 0; i < m->c.n_ropes; i++)
        dims[i] = m->c.ropes[i].dim;
    c->rope_dims = dims;
    for (int i = c->first; i < m->c.n_blocks; i++) {
        const bmc_block *b = &m->blocks[i].c;
        if (b->kind != BMC_ATTENTION || !(b->alibi > 0))
            continue;
        float *slopes = model_own(m, (size_t)b->n_heads * sizeof *slopes);
        if (!slopes)
            return fail(BMC_ENOMEM, "no memory for a model");
        for (int h = 0; h < b->n_heads; h++)
            slopes[h] = attend_slope(b, h);
        c->slopes[i] = slopes;
    }
    return 0;
}

static int send(const struct cuda *c, void *to, const void *from, size_t bytes) {
    const struct cuda_driver *cu = c->gpu->cu;
    int status = cuda_status(c->gpu->index, "sending weights",
                             cu->cuMemcpyHtoDAsync_v2(cuda_address(to), from, bytes, c->stream));
    const int ended = cuda_status(c->gpu->index, "sending weights", cu->cuStreamSynchronize(c->stream));
    return status ? status : ended;
}

static int send_values(bmc_model *m, struct cuda *c) {
    int status = make_tables(m, c);
    if (status)
        return status;
    each_value(m, c, count_value, NULL);
    char *host = calloc(c->vector_bytes, 1);
    status = host ? gpu_alloc(c->gpu, c->vector_bytes, "norms", &c->vectors)
                  : fail(BMC_ENOMEM, "no memory for norms");
    if (!status) {
        each_value(m, c, move_value, host);
        status = send(c, c->vectors, host, c->vector_bytes);
    }
    free(host);
    return status;
}

/* Kernels. */

int cuda_find_products(const struct gpu *gpu, void *products[CUDA_WAYS][N_PANEL_TYPES], int type) {
    for (int way = 0; way < CUDA_WAYS; way++) {
        char name[64];
        if (cuda_is_float(type) != (way >= FLOATS) || (!gpu->mma && way > NARROW4 && way < FLOATS)
            || products[way][type])
            continue;
        snprintf(name, sizeof name, "%s_%s", cuda_way_name(way), cuda_type_name(type));
        products[way][type] = gpu_function(gpu, name);
        if (!products[way][type])
            return BMC_EDEVICE;
    }
    return 0;
}

static void find_matrix(struct matrix *w, void *visit) {
    struct visit *v = visit;
    if (!v->status && there(v, w))
        v->status = cuda_find_products(v->cuda->gpu, v->cuda->products, w->type);
}

static int find_kernels(bmc_model *m, struct cuda *c) {
    static const char *const names[CUDA_KERNELS] = {
        [CUDA_NORM] = "norm_tokens",
        [CUDA_NORM_ROWS] = "norm_rows",
        [CUDA_QUANTIZE] = "quantize",
        [CUDA_PLACE] = "place",
        [CUDA_ATTEND] = "attend",
        [CUDA_ATTEND_MERGE] = "attend_merge",
        [CUDA_ACTIVATE] = "activate",
        [CUDA_KEEP_ROWS] = "keep_rows",
        [CUDA_BEST] = "best",
        [CUDA_ROUTE] = "route",
        [CUDA_SORT] = "sort_experts",
        [CUDA_COMBINE] = "combine",
        [CUDA_SWITCH] = "switch_on",
        [CUDA_COMPRESS] = "place_compressed",
        [CUDA_RECUR_PREPARE] = "recur_prepare",
        [CUDA_RECUR_WALK] = "recur_walk",
        [CUDA_RECUR_FINISH] = "recur_finish",
        [CUDA_RECUR_KEEP] = "recur_keep",
        [CUDA_SHORT_CONV] = "short_conv",
        [CUDA_JOIN_PER_LAYER] = "join_per_layer",
        [CUDA_SCALE_ROWS] = "scale_rows",
        [CUDA_ADD_NORMED] = "add_normed",
        [CUDA_THIN_OUT] = "thin_out",
        [CUDA_ALTUP_LENGTHS] = "altup_lengths",
        [CUDA_ALTUP_PREDICT] = "altup_predict",
        [CUDA_ALTUP_CORRECT] = "altup_correct",
    };
    struct visit v = { .m = m, .first = c->first, .cuda = c };
    for (int i = 0; i < CUDA_KERNELS; i++) {
        c->functions[i] = gpu_function(c->gpu, names[i]);
        if (!c->functions[i])
            return BMC_EDEVICE;
    }
    model_each_matrix(m, find_matrix, &v);
    if (!v.status && m->target && !m->output.data)
        v.status = cuda_find_products(c->gpu, c->products, m->target->output.type);
    return v.status;
}

/* Offloading. */

static int make_buffers(bmc_model *m, struct cuda *c) {
    const struct cuda_driver *cu = c->gpu->cu;
    void *results = NULL;
    c->room_bytes = lay_out(m, c, NULL);
    int status = gpu_alloc(c->gpu, c->room_bytes, "buffers", &c->room);
    if (status)
        return status;
    lay_out(m, c, c->room);
    const size_t bytes =
        (size_t)m->pass_max * (c->n_parts * sizeof(struct best) + padded(m->c.dim) * sizeof(float));
    status = cuda_status(c->gpu->index, "pinned memory", cu->cuMemHostAlloc(&results, bytes, 0));
    if (status)
        return status;
    c->results = results;
    c->sessions = model_own(m, (size_t)m->pass_max * sizeof *c->sessions);
    c->hidden = model_own(m, (size_t)m->pass_max * sizeof *c->hidden);
    return c->sessions && c->hidden ? 0 : fail(BMC_ENOMEM, "no memory for a model");
}

static int open_on(bmc_model *m, struct cuda *c, int gpu, const char *kernels) {
    int status = gpu_open(gpu, kernels, &c->gpu);
    if (!status)
        status = gpu_enter(c->gpu);
    if (!status)
        status = cuda_status(gpu, "making a stream",
                             c->gpu->cu->cuStreamCreate(&c->stream, CUDA_STREAM_NON_BLOCKING));
    if (!status)
        status = find_kernels(m, c);
    if (!status)
        status = make_buffers(m, c);
    if (!status)
        status = chunk_open(m, c);
    return status ? status : send_values(m, c);
}

static void mark(struct matrix *w, void *visit) {
    struct visit *v = visit;
    w->on_gpu = there(v, w);
    v->bytes += w->on_gpu ? matrix_bytes(w) : 0;
}

int bmc_model_offload(bmc_model *m, int gpu, const char *kernels, int n_layers) {
    char why[128];
    if (!m || !kernels || n_layers < 0)
        return fail(BMC_EINVAL,
                    "bmc_model_offload: needs a model, a file of kernels, and 0 or more layers, found %d",
                    n_layers);
    if (m->panels || m->rooms || m->cuda)
        return fail(BMC_EINVAL, "bmc_model_offload: the model is ready already");
    if (m->target && (!m->target->cuda || m->target->cuda->gpu->index != gpu))
        return fail(BMC_EINVAL, "draft head: its model is not on GPU %d", gpu);
    const int first = first_block(m, n_layers, why), n = layers_from(m, first);
    if (!n && !m->target)
        return 0;
    struct cuda *c = calloc(1, sizeof *c);
    if (!c)
        return fail(BMC_ENOMEM, "no memory for a model");
    c->first = first;
    c->n_parts = has_head(m) ? (size_t)head_parts(m) : 0;
    int status = open_on(m, c, gpu, kernels);
    if (status) {                           /* vectors may be there already: the model is of no use */
        cuda_free(c);
        return status;
    }
    c->segments.gpu = c->gpu;
    c->segments.stream = c->gpu->memory_stream;
    c->memory = gpu_memory(&c->segments);
    struct visit v = { .m = m, .first = first };
    model_each_matrix(m, mark, &v);
    c->weight_bytes = v.bytes;
    m->cuda = c;
    model_streams(m);
    model_measure(m);
    return n;
}

/* Weights. */

/* Panels [from, to) of a matrix, made in `stage`. */
static int send_panels(struct visit *v, const struct matrix *w, int64_t from, int64_t to) {
    bmc_model *m = (bmc_model *)v->m;
    const size_t codes = (size_t)(to - from) * w->code_stride, scales = (size_t)(to - from) * w->scale_stride;
    struct matrix file = *w, panels;
    file.data += (size_t)from * PANEL_ROWS * file_row_bytes(w);
    file.n_rows = (to * PANEL_ROWS < w->n_rows ? to * PANEL_ROWS : w->n_rows) - from * PANEL_ROWS;
    panels = file;
    panels.codes = (uint8_t *)v->stage;
    panels.scales = panels.codes + codes;
    model_pack_panels(m, &file, &panels);
    const int status = send(v->cuda, w->codes + (size_t)from * w->code_stride, panels.codes, codes);
    return status || !scales
               ? status
               : send(v->cuda, w->scales + (size_t)from * w->scale_stride, panels.scales, scales);
}

static void send_matrix(struct matrix *w, void *visit) {
    struct visit *v = visit;
    if (v->status || !w->on_gpu)
        return;
    const int64_t n = matrix_panels(w),
                  each = larger(1, (int)(SENT_AT_ONCE / (w->code_stride + w->scale_stride)));
    w->codes = v->next;
    w->scales = w->codes + (size_t)n * w->code_stride;
    v->next += matrix_bytes(w);
    for (int64_t from = 0; from < n && !v->status; from += each)
        v->status = send_panels(v, w, from, from + each < n ? from + each : n);
}

static void measure_stage(struct matrix *w, void *visit) {
    struct visit *v = visit;
    const size_t panel = w->code_stride + w->scale_stride;
    if (w->on_gpu)
        v->bytes = most(v->bytes, most(panel, SENT_AT_ONCE));
}

int cuda_pack(bmc_model *m) {
    struct cuda *c = m->cuda;
    struct visit v = { .m = m, .cuda = c };
    void *stage = NULL;
    v.status = gpu_enter(c->gpu);
    model_each_matrix(m, measure_stage, &v);
    if (!v.status)
        v.status = gpu_alloc(c->gpu, c->weight_bytes, "weights", &c->weights);
    if (!v.status)
        v.status =
            cuda_status(c->gpu->index, "pinned memory", c->gpu->cu->cuMemHostAlloc(&stage, v.bytes + 1, 0));
    v.next = c->weights;
    v.stage = stage;
    model_each_matrix(m, send_matrix, &v);
    if (stage)
        c->gpu->cu->cuMemFreeHost(stage);
    return v.status;
}

void cuda_free(struct cuda *c) {
    if (!c)
        return;
    const bool alive = c->gpu && c->gpu->process == getpid() && !gpu_enter(c->gpu);
    if (alive && c->stream)
        c->gpu->cu->cuStreamSynchronize(c->stream);
    cuda_drop_queue(c, alive);
    if (alive)
        chunk_close(c);
    void *const memory[] = { c->weights, c->vectors, c->room, c->device };
    for (size_t i = 0; alive && i < sizeof memory / sizeof *memory; i++)
        gpu_free(c->gpu, memory[i]);
    if (alive && c->host)
        c->gpu->cu->cuMemFreeHost(c->host);
    if (alive && c->results)
        c->gpu->cu->cuMemFreeHost(c->results);
    if (alive && c->segments.stage.bytes)
        c->gpu->cu->cuMemFreeHost(c->segments.stage.bytes);
    if (alive && c->stream)
        c->gpu->cu->cuStreamDestroy_v2(c->stream);
    gpu_close(c->gpu);
    free(c);
}
