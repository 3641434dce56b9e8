/* Products by cuBLAS of matrices that are larger than its buffer: slices of whole panels, every row once.
 * What is queued is looked at and not run. */
#include "check.h"
#include "cuda/chunk.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 70001, COLUMNS = 1056, CODE = 4096, SCALE = 512, STRIDE = 70016 };
enum { FIT = (64 << 20) / (2 * COLUMNS) / 16 * 16 };

static char halves, halve_tokens, finish;           /* as functions */
static uint8_t *const codes = (uint8_t *)4096, *const scales = (uint8_t *)8192;

static const struct matrix large = {
    .type = TYPE_Q4_0, .n_rows = ROWS, .n_cols = COLUMNS, .data = codes, .codes = codes, .scales = scales,
    .code_stride = CODE, .scale_stride = SCALE, .bias = (const float *)65536, .factor = 0.5f,
};

static struct cuda new_cuda(void) {
    struct cuda c = { .chunk = { .halve_tokens = &halve_tokens, .finish = &finish } };
    c.chunk.halves[TYPE_Q4_0] = &halves;
    c.chunk.blas = (struct cublas *)4096;
    return c;
}

static struct product of(const struct matrix *w, int n_tok, bool wide) {
    struct product r = { .w = w, .in = { .x = (float *)4096, .n = n_tok, .wide = wide ? 2 * COLUMNS : 0 },
                         .y = (float *)1048576, .y_stride = STRIDE, .add = true };
    return r;
}

static void slices_cover_each_row_once(void) {
    struct cuda c = new_cuda();
    bmc_model m = { .cuda = &c };
    struct pass p = { .model = &m, .chunk = true };
    const struct product list[] = { of(&large, BMC_PROMPT_CHUNK, false),
                                    of(&large, BMC_PROMPT_CHUNK, false) };
    int64_t rows = 0;
    CHECK(chunk_multiply(&p, list, 0) && chunk_multiply(&p, list, 1));
    /* The tokens once, three slices each. */
    CHECK(c.n_queued == 1 + 2 * 3 * 3 && c.queue[0].function == &halve_tokens);
    for (int i = 1; i < c.n_queued; i += 3) {
        struct cuda_halves a;
        struct cublas_product b;
        struct cuda_finish f;
        rows = rows == ROWS ? 0 : rows;
        memcpy(&a, c.args + c.queue[i].args, sizeof a);
        memcpy(&b, c.args + c.queue[i + 1].args, sizeof b);
        memcpy(&f, c.args + c.queue[i + 2].args, sizeof f);
        const int n = rows + FIT < ROWS ? FIT : (int)(ROWS - rows);
        CHECK(c.queue[i].function == &halves && !c.queue[i + 1].grid.threads
              && c.queue[i + 2].function == &finish);
        CHECK(a.of.n_rows == n && a.of.codes == codes + rows / 16 * CODE
              && a.of.scales == scales + rows / 16 * SCALE);
        CHECK(b.m == n && b.n == BMC_PROMPT_CHUNK && b.k == COLUMNS && b.stride >= n);
        CHECK(f.n_rows == n && f.out == list[0].y + rows && f.bias == large.bias + rows && f.add
              && f.factor == 0.5f);
        CHECK(f.sum_stride == (size_t)b.stride && f.out_stride == STRIDE);
        rows += n;
    }
    CHECK(rows == ROWS);
    free(c.queue);
    free(c.args);
}

static void other_products_are_left(void) {
    struct cuda c = new_cuda();
    bmc_model m = { .cuda = &c };
    struct pass p = { .model = &m, .chunk = true };
    const struct product list[] = { of(&large, BMC_PROMPT_CHUNK - 1, false),
                                    of(&large, BMC_PROMPT_CHUNK, true), of(&large, BMC_PROMPT_CHUNK, false) };
    CHECK(!chunk_multiply(&p, list, 0) && !chunk_multiply(&p, list, 1));
    p.chunk = false;
    CHECK(!chunk_multiply(&p, list, 2) && c.n_queued == 0);
}

int main(void) {
    slices_cover_each_row_once();
    other_products_are_left();
    return 0;
}
