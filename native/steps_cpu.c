/* The steps of a pass on the CPU: what the machine's table points to. Products are in linear.c, attention
 * in attend.c, the head in head.c. */
#include "layers/recurrent.h"

/* x += the results of the blocks up to `last` that wait for it: one, or two side by side. */
static void settle(const bmc_model *m, const struct block *last, int64_t t) {
    const struct buffers *buffers = m->buffers;
    const size_t row = (size_t)t * padded(m->c.dim);
    float *x = buffers->x + row, *sum = buffers->y[0] + row;
    for (int i = 0; i <= last->c.beside; i++) {
        const struct block *b = last - last->c.beside + i;
        float *y = buffers->y[i] + row;
        if (b->post_norm.v)
            norm_row(m, y, y, b->post_norm, b->post_norm_bias, m->c.dim);
        if (b->c.scale != 1.0f)
            m->k.scale(y, b->c.scale, m->c.dim);
        if (i)
            m->k.add(sum, y, m->c.dim);
    }
    if (last->sum_norm.v)
        norm_row(m, sum, sum, last->sum_norm, (struct vector){ 0 }, m->c.dim);
    if (last->c.others)
        altup_add(m, last->c.n_altup, sum, t);
    else
        m->k.add(x, sum, m->c.dim);
    if (last->c.sum_scale != 1.0f)
        m->k.scale(x, last->c.sum_scale, m->c.dim);
    if (last->out_norm.v)
        norm_row(m, x, x, last->out_norm, last->out_norm_bias, m->c.dim);
    if (last->out_scale.v)
        m->k.scale(x, last->out_scale.v[0], m->c.dim);
}

void settle_rows(struct pass *p, const struct block *waits, int thread) {
    int64_t from, to;
    share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++)
        settle(p->model, waits, t);
    barrier(p, thread, BMC_STEP_NORM);
}

/* norm(x): of few tokens all, by every thread for itself, and otherwise each thread's share. What waits is
 * added to x first, which is no work to do twice. */
static struct tokens normed(struct pass *p, const struct block *waits, struct vector weight,
                            struct vector bias, bool keep_input, int thread) {
    const bmc_model *m = p->model;
    const struct buffers *b = m->buffers;
    const int dim = m->c.dim;
    const size_t stride = padded(dim);
    const bool own = p->n_tok <= FEW && !waits && !keep_input;
    struct tokens in = { b->xb, b->act, p->n_tok, 0, 0 };
    int64_t from = 0, to = p->n_tok;
    if (own) {
        in.x = b->own_xb + (size_t)thread * FEW * stride;
        in.act = b->own_act + (size_t)thread * FEW * (size_t)(dim / 32 + 1);
    } else
        share(p, thread, p->n_tok, &from, &to);
    for (int64_t t = from; t < to; t++) {
        if (waits)
            settle(m, waits, t);
        const float *x = b->x + (size_t)t * stride;
        if (keep_input)
            memcpy(b->input + (size_t)t * stride, x, stride * sizeof *x);
        if (weight.v)
            norm_row(m, in.x + (size_t)t * stride, x, weight, bias, dim);
        else
            memcpy(in.x + (size_t)t * stride, x, (size_t)dim * sizeof *x);
        quantize(p, in, dim, (int)t, 0, dim / 32);
    }
    if (own)
        note(p, thread, BMC_STEP_NORM);
    else
        barrier(p, thread, BMC_STEP_NORM);
    return in;
}

static void norm_rows(struct pass *p, struct tokens in, int n, struct vector weight, int thread) {
    int64_t from, to;
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *row = in.x + (size_t)t * padded(n);
        norm_row(p->model, row, row, weight, (struct vector){ 0 }, n);
        quantize(p, in, n, (int)t, 0, n / 32);
    }
}

static void move_row(struct rows rows, int to, int from) {
    if (rows.stride)
        memmove(rows.x + (size_t)to * rows.stride, rows.x + (size_t)from * rows.stride,
                rows.stride * sizeof *rows.x);
}

static void keep(struct pass *p, const struct rows *rows, int n, int thread) {
    for (int i = 0; thread == 0 && i < p->n_out; i++)
        for (int j = 0; j < n; j++)
            move_row(rows[j], i, p->out[i].tok);
    pool_barrier(p->model->pool);
    if (thread == 0)
        pass_kept(p);
    barrier(p, thread, BMC_STEP_STORE);
}

const struct machine cpu_machine = {
    .name = "CPU", .norm = normed, .norm_rows = norm_rows, .quantize = quantize_rows, .multiply = multiply,
    .gate_up = gate_up_all, .place = place_heads, .compress = place_latents, .attend = attend_all,
    .recur = recur, .short_conv = short_conv, .experts = run_experts, .gate = gate_rows,
    .join_per_layer = join_per_layer, .scale_rows = scale_rows, .add_normed = add_normed_rows,
    .altup = altup_step, .keep = keep, .give = give_hidden,
    .head = head, .end = barrier,
};
