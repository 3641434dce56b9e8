/* norm_tokens: settle() is only known to its file. */
#define cpu_machine reference_machine
#define settle_rows reference_settle_rows
#include "../../native/steps_cpu.c"
#include "reference_model.h"

void reference_norm(const struct cuda_norm *a) {
    struct block blocks[3] = { 0 };
    struct buffers buffers = { .x = a->x, .y = { a->y[0], a->y[1] } };
    if (a->others) {
        buffers.kept = a->others - a->dim;
        buffers.kept_stride = a->others_stride;
    }
    bmc_model m = new_model(a->dim, a->kind, a->eps, &buffers);
    const float result_scale = a->result_scale;
    for (int i = 0; i < a->n_waits; i++) {
        blocks[i].c.beside = i;
        blocks[i].c.scale = a->scale[i];
        blocks[i].post_norm = vector(a->post[i].weight, 1, a->dim);
        blocks[i].post_norm_bias = vector(a->post[i].bias, 1, a->dim);
    }
    struct block *last = &blocks[a->n_waits > 1];
    last->c.sum_scale = a->sum_scale;
    last->c.others = a->n_others > 0;
    last->c.n_altup = a->n_others + 1;
    last->sum_norm = vector(a->sum.weight, 1, a->dim);
    last->out_norm = vector(a->result.weight, 1, a->dim);
    last->out_norm_bias = vector(a->result.bias, 1, a->dim);
    if (result_scale != 1.0f)
        last->out_scale = vector(&result_scale, 1, 1);
    for (int t = 0; t < a->n_tok; t++) {
        const size_t row = (size_t)t * a->stride;
        if (a->n_waits)
            settle(&m, last, t);
        if (a->input)
            memcpy(a->input + row, a->x + row, a->stride * sizeof(float));
        if (a->norm.weight)
            norm_row(&m, a->out + row, a->x + row, vector(a->norm.weight, 1, a->dim),
                     vector(a->norm.bias, 1, a->dim), a->dim);
        else
            memcpy(a->out + row, a->x + row, (size_t)a->dim * sizeof(float));
        if (a->act)
            quantize_column(&m.k, a->act + t, a->act_stride, a->out + row, a->dim);
    }
    pool_free(m.pool);
}
