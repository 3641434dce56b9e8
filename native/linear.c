/* Products of weights and tokens: who computes which rows, in which order of tiles. */
#include "pass.h"

#include "pack.h"
#include "panels.h"

static int n_tiles(int n_tok) { return (n_tok + TILE_COLS - 1) / TILE_COLS; }

/* Tokens of a product lie in tiles of up to TILE_COLS columns, as even as can be. */
int tile_width(int n_tok) {
    int tiles = n_tiles(n_tok);
    return (n_tok + tiles - 1) / tiles;
}

static int columns(int n_tok, int tile, int width) { return smaller(n_tok - tile * width, width); }

void quantize(const struct pass *p, struct tokens in, int k, int tok, int from, int to) {
    int width = tile_width(in.n), tile = tok / width, cols = columns(in.n, tile, width);
    struct act_block *act = in.act + (size_t)tile * (size_t)width * (size_t)(k / 32) + tok % width;
    p->model->k.quantize(act + (size_t)from * (size_t)cols, cols, in.x + (size_t)tok * padded(k) + 32 * from,
                         to - from);
}

/* Rows that are not whole blocks only meet float weights. */
void quantize_rows(struct pass *p, struct tokens in, int k, int thread) {
    int64_t from, to, blocks = k / 32;
    share(p, thread, in.n * blocks, &from, &to);
    while (from < to) {
        int64_t tok = from / blocks, first = from % blocks;
        int n = smaller((int)(blocks - first), (int)(to - from));
        quantize(p, in, k, (int)tok, (int)first, (int)first + n);
        from += n;
    }
}

static int n_panels(int64_t n_rows) { return (int)((n_rows + PANEL_ROWS - 1) / PANEL_ROWS); }

/* Panels [from, to) of a matrix. Where none are kept they are made now, in one of this thread's two rooms. */
struct matrix slice(const struct pass *p, const struct matrix *w, int from, int to, int thread, int room) {
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

static struct panel_job job_of(const struct product *r, const struct matrix *part, int row, int tile) {
    int width = tile_width(r->in.n), first = tile * width, n_cols = columns(r->in.n, tile, width);
    const size_t wide = (size_t)(r->in.wide ? r->in.wide : part->n_cols);
    return (struct panel_job){
        .codes = part->codes, .code_stride = part->code_stride,
        .scales = part->scales, .scale_stride = part->scale_stride,
        .n_panels = n_panels(part->n_rows), .n_rows = (int)part->n_rows,
        .k = (int)part->n_cols, .n_cols = n_cols,
        .act = r->in.act + (size_t)first * (wide / 32) + (size_t)(r->in.from / 32 * n_cols),
        .x = r->in.x + (size_t)first * padded((int64_t)wide) + r->in.from, .x_stride = padded((int64_t)wide),
        .bias = part->bias, .out = r->y + (size_t)first * r->y_stride + row, .out_stride = r->y_stride,
        .add = r->add,
    };
}

/* The same where the product has a factor: it comes before the bias. */
static void project_scaled(const struct pass *p, struct panel_job job, const struct matrix *part) {
    float t[TILE_COLS * GROUP_ROWS], *out = job.out;
    const size_t stride = job.out_stride;
    const bool add = job.add;
    job.out = t;
    job.out_stride = GROUP_ROWS;
    job.bias = NULL;
    job.add = false;
    p->model->k.panel[part->type](&job);
    for (int col = 0; col < job.n_cols; col++)
        for (int i = 0; i < job.n_rows; i++) {
            float y = part->factor * t[col * GROUP_ROWS + i] + (part->bias ? part->bias[i] : 0);
            out[(size_t)col * stride + (size_t)i] = add ? out[(size_t)col * stride + (size_t)i] + y : y;
        }
}

/* One tile of columns times a slice that begins at `row`. */
void project(const struct pass *p, const struct product *r, const struct matrix *part, int row, int tile) {
    const struct panel_job job = job_of(r, part, row, tile);
    if (part->factor != 0)
        project_scaled(p, job, part);
    else
        p->model->k.panel[part->type](&job);
}

/* Rows are shared out in groups of four panels: a multiple of a block of 32, and few enough to stay
 * cached while several tiles use them. A thread computes its own groups first, then takes those that
 * no other has begun. Which thread computes a row changes nothing. */
int n_groups(const struct matrix *w) { return (int)((w->n_rows + GROUP_ROWS - 1) / GROUP_ROWS); }

/* How many groups are done at a time: a lone tile streams through all of them. */
int stretch(const struct matrix *w, int n_tok, int groups) {
    return n_tiles(n_tok) > 1 || !w->codes || w->factor != 0 ? 1 : groups;
}

static void project_groups(const struct pass *p, const struct product *r, int from, int to, int thread) {
    for (int step = stretch(r->w, r->in.n, to - from); from < to; from += step) {
        int end = smaller((from + step) * GROUP, n_panels(r->w->n_rows));
        const struct matrix part = slice(p, r->w, from * GROUP, end, thread, 0);
        for (int tile = 0; tile < n_tiles(r->in.n); tile++)
            project(p, r, &part, from * GROUP_ROWS, tile);
    }
}

void multiply(struct pass *p, const struct product *list, int n, int thread) {
    int64_t total = 0, from, to;
    for (int i = 0; i < n; i++)
        total += list[i].w->data ? n_groups(list[i].w) : 0;
    while (pool_take(p->model->pool, thread, total, &from, &to))
        for (int i = 0; i < n; i++) {
            int groups = list[i].w->data ? n_groups(list[i].w) : 0, end = smaller((int)to, groups);
            if (from < end)
                project_groups(p, &list[i], (int)from, end, thread);
            from = from > groups ? from - groups : 0;
            to -= groups;
        }
}

void multiply_alone(const struct pass *p, const struct product *r, int thread) {
    project_groups(p, r, 0, n_groups(r->w), thread);
}

void multiply_groups(const struct pass *p, const struct matrix *w, struct tokens in, int from, int to,
                     float *part, int thread) {
    const struct product r = { w, in, part, (size_t)(to - from) * GROUP_ROWS, false };
    const struct matrix rows = slice(p, w, from * GROUP, smaller(to * GROUP, n_panels(w->n_rows)), thread, 0);
    for (int tile = 0; tile < n_tiles(in.n); tile++)
        project(p, &r, &rows, 0, tile);
}

int gate_up_groups(const struct gate_up *job) { return n_groups(job->up); }

/* hidden = act(gate) * up, floats and 8 bits: rows [first, last) of a tile's tokens. */
static void activate(const struct pass *p, const struct gate_up *job, int first, int last, int tile) {
    const struct kernels *k = &p->model->k;
    int dim = (int)job->up->n_rows, n = job->in.n, width = tile_width(n), begin = tile * width;
    int end = begin + columns(n, tile, width);
    for (int t = begin; t < end; t++) {
        float *up = job->hidden.x + (size_t)t * padded(dim) + first;
        if (job->gate->data)
            k->act[job->act](up, up, job->gate_out + (size_t)t * padded(dim) + first, last - first,
                             job->param);
        else
            k->act[job->act](up, NULL, up, last - first, job->param);
        quantize(p, job->hidden, dim, t, first / 32, last / 32);
    }
}

/* Groups of both matrices: their rows meet while they are cached. */
static void gate_up_part(const struct pass *p, const struct gate_up *job, int from, int to, int thread) {
    const struct product gate = product(job->gate, job->in, job->gate_out);
    const struct product up = product(job->up, job->in, job->hidden.x);
    struct matrix gate_part = { 0 };
    int panel = from * GROUP, end = smaller(to * GROUP, n_panels(up.w->n_rows)), row = panel * PANEL_ROWS;
    if (gate.w->data)
        gate_part = slice(p, gate.w, panel, end, thread, 0);
    const struct matrix up_part = slice(p, up.w, panel, end, thread, 1);
    for (int tile = 0; tile < n_tiles(job->in.n); tile++) {
        if (gate.w->data)
            project(p, &gate, &gate_part, row, tile);
        project(p, &up, &up_part, row, tile);
        note(p, thread, BMC_STEP_GATE_UP);
        activate(p, job, row, row + (int)up_part.n_rows, tile);
        note(p, thread, BMC_STEP_ACTIVATION);
    }
}

void gate_up(const struct pass *p, const struct gate_up *job, int from, int to, int thread) {
    for (int step = smaller(stretch(job->up, job->in.n, to - from),
                            job->gate->data ? stretch(job->gate, job->in.n, to - from) : 1 << 20);
         from < to; from += step)
        gate_up_part(p, job, from, smaller(from + step, to), thread);
}

void gate_up_all(struct pass *p, const struct gate_up *job, int thread) {
    int64_t from, to;
    while (pool_take(p->model->pool, thread, gate_up_groups(job), &from, &to))
        gate_up(p, job, (int)from, (int)to, thread);
}
