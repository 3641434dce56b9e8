/* Products of a whole chunk of a prompt by cuBLAS: the matrix becomes f16 in slices of rows, the activations
 * too, and each slice is one call, whose shape depends on the matrix alone. */
#include "chunk.h"

#include "../error.h"

#include <stdio.h>
#include <string.h>

enum { SLICE_BYTES = 64 << 20 };

/* Rows of a slice: whole panels, as many as fit. */
static int64_t slice_rows(const struct matrix *w) {
    const int64_t row = (int64_t)(padded(w->n_cols) * sizeof(uint16_t)),
                  fit = SLICE_BYTES / row / PANEL_ROWS * PANEL_ROWS;
    const int64_t rows = fit > PANEL_ROWS ? fit : PANEL_ROWS;
    return rows < w->n_rows ? rows : w->n_rows;
}

/* Matrices of the blocks that are on the GPU, but for lists of them: those of experts, and of MLA's heads. */
typedef int each_fn(struct cuda *c, const struct matrix *w, void *arg);
static int each_matrix(const bmc_model *m, struct cuda *c, each_fn *fn, void *arg) {
    int status = 0;
    for (const struct block *b = m->blocks + c->first; b < m->blocks + m->c.n_blocks; b++)
        for (const struct role *r = b->kind->roles; r->name && !status; r++) {
            const struct matrix *w = (const void *)((const char *)b + r->offset);
            if (r->form == MATRIX && w->data)
                status = fn(c, w, arg);
        }
    return status;
}

struct sizes { size_t halves, sums, rows, columns; };

static int widen(struct cuda *c, const struct matrix *w, void *arg) {
    struct sizes *s = arg;
    const size_t rows = (size_t)slice_rows(w), columns = padded(w->n_cols);
    (void)c;
    s->halves = rows * columns > s->halves ? rows * columns : s->halves;
    s->rows = rows > s->rows ? rows : s->rows;
    s->columns = columns > s->columns ? columns : s->columns;
    return 0;
}

static void *take(char **next, size_t bytes) {
    void *p = *next;
    *next += (bytes + 255) / 256 * 256;
    return p;
}

size_t chunk_lay_out(const bmc_model *m, struct cuda *c, char *memory) {
    struct chunk *k = &c->chunk;
    struct sizes s = { 0 };
    char *next = memory;
    if (!m->cublas)
        return 0;
    each_matrix(m, c, widen, &s);
    k->rows = take(&next, s.halves * sizeof *k->rows);
    k->tokens = take(&next, BMC_PROMPT_CHUNK * s.columns * sizeof *k->tokens);
    k->sums = take(&next, BMC_PROMPT_CHUNK * padded((int64_t)s.rows) * sizeof *k->sums);
    k->row_powers = take(&next, s.rows * sizeof *k->row_powers);
    k->token_powers = take(&next, BMC_PROMPT_CHUNK * sizeof *k->token_powers);
    k->workspace = take(&next, CUBLAS_WORKSPACE);
    return (size_t)(next - memory);
}

static int find_halves(struct cuda *c, const struct matrix *w, void *arg) {
    char name[64];
    (void)arg;
    if (c->chunk.halves[w->type])
        return 0;
    snprintf(name, sizeof name, "halves_%s", cuda_type_name(w->type));
    c->chunk.halves[w->type] = gpu_function(c->gpu, name);
    return c->chunk.halves[w->type] ? 0 : BMC_EDEVICE;
}

int chunk_open(const bmc_model *m, struct cuda *c) {
    struct chunk *k = &c->chunk;
    if (!m->cublas)
        return 0;
    k->halve_tokens = gpu_function(c->gpu, "halve_tokens");
    k->finish = k->halve_tokens ? gpu_function(c->gpu, "finish") : NULL;
    if (!k->finish || each_matrix(m, c, find_halves, NULL))
        return BMC_EDEVICE;
    return cublas_open(c->gpu, m->cublas, c->stream, k->workspace, &k->blas);
}

void chunk_close(struct cuda *c) { cublas_close(c->chunk.blas); }

static void halve_tokens(struct cuda *c, const struct product *r) {
    const struct chunk *k = &c->chunk;
    const int columns = (int)r->w->n_cols;
    const struct cuda_halve_tokens a = {
        r->in.n, columns, r->in.x, padded(columns), k->tokens, padded(columns), k->token_powers,
    };
    cuda_launch(c, k->halve_tokens, halve_tokens_grid(&a), &a, sizeof a);
}

/* Rows [from, from + n). */
static void multiply_slice(struct cuda *c, const struct product *r, int64_t from, int64_t n) {
    const struct matrix *w = r->w;
    const struct chunk *k = &c->chunk;
    const int64_t panel = from / PANEL_ROWS;
    const size_t columns = padded(w->n_cols), stride = padded(n);
    const struct cuda_halves halves = {
        .of = {
            .codes = w->codes + (size_t)panel * w->code_stride, .code_stride = w->code_stride,
            .scales = w->scales + (size_t)panel * w->scale_stride, .scale_stride = w->scale_stride,
            .n_rows = (int)n, .k = (int)w->n_cols,
        },
        .out = k->rows, .stride = columns, .powers = k->row_powers,
    };
    const struct cublas_product product = { k->rows,   k->tokens,    k->sums,    (int)n,
                                            r->in.n, (int)columns, (int)stride };
    const struct cuda_finish finish = {
        .n_tok = r->in.n, .n_rows = (int)n, .sums = k->sums, .sum_stride = stride,
        .row_powers = k->row_powers, .token_powers = k->token_powers, .bias = w->bias ? w->bias + from : NULL,
        .factor = w->factor, .out = r->y + from, .out_stride = r->y_stride, .add = r->add,
    };
    cuda_launch(c, k->halves[w->type], halves_grid(&halves), &halves, sizeof halves);
    cuda_multiply(c, k->blas, &product);
    cuda_launch(c, k->finish, finish_grid(&finish), &finish, sizeof finish);
}

/* Parts of rows are products of MLA's heads, which stay ours. */
static bool suits(const struct product *r) { return r->in.n == BMC_PROMPT_CHUNK && !r->in.wide; }

static bool same_input(const struct product *a, const struct product *b) {
    return suits(a) && a->w->data && a->in.x == b->in.x && a->w->n_cols == b->w->n_cols;
}

bool chunk_multiply(struct pass *p, const struct product *list, int i) {
    struct cuda *c = p->model->cuda;
    const struct product *r = &list[i];
    if (!p->chunk || !suits(r))
        return false;
    if (!i || !same_input(r - 1, r))
        halve_tokens(c, r);
    const int64_t each = slice_rows(r->w);
    for (int64_t from = 0; from < r->w->n_rows; from += each)
        multiply_slice(c, r, from, from + each < r->w->n_rows ? each : r->w->n_rows - from);
    return true;
}

int bmc_model_prompts(bmc_model *m, const char *cublas) {
    struct cublas_functions found;
    if (!m || !cublas)
        return fail(BMC_EINVAL, "bmc_model_prompts: needs a model, and a file of cuBLAS or \"\"");
    if (m->panels || m->rooms || m->cuda)
        return fail(BMC_EINVAL, "bmc_model_prompts: the model is ready already");
    if (!m->c.causal || m->target)
        return fail(BMC_EINVAL, "prompts by cuBLAS: expected a model that writes text, found %s",
                    m->target ? "a draft head" : "an encoder");
    const int status = cublas_find(cublas, &found);
    if (status)
        return status;
    char *path = model_own(m, strlen(cublas) + 1);
    if (!path)
        return fail(BMC_ENOMEM, "no memory for a model");
    m->cublas = strcpy(path, cublas);
    return 0;
}
