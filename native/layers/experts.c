/* Experts (arXiv 2101.03961, 2401.06066): a router chooses n_active feed-forwards for each token.
 *
 * Tokens are grouped by expert, so that a pass reads the weights of each chosen expert once. A token's
 * experts are summed in ascending order of their number, whatever else is in the pass: groups of rows of
 * `down` go through all experts in that order. */
#include "../cuda/cuda.h"
#include "../error.h"
#include "../machine.h"
#include "../resident.h"
#include "../route.h"

#include <float.h>
#include <math.h>

static const struct role roles[] = {
    { "ffn_gate_inp", IN_BLOCK(experts.router), MATRIX, EXPERTS, DIM, true, 0 },
    { "ffn_gate_inp.scale", IN_BLOCK(experts.router_scale), VECTOR, ONE, DIM, false, 0 },
    { "exp_probs_b.bias", IN_BLOCK(experts.choice_bias), VECTOR, ONE, EXPERTS, false, 0 },
    { "ffn_gate_exps", IN_BLOCK(experts.gate), MATRICES, HIDDEN, EXPERT_IN, false, 0 },
    { "ffn_up_exps", IN_BLOCK(experts.up), MATRICES, HIDDEN, EXPERT_IN, true, 0 },
    { "ffn_down_exps", IN_BLOCK(experts.down), MATRICES, EXPERT_IN, HIDDEN, true, 0 },
    { "ffn_gate_shexp", IN_BLOCK(experts.shared.gate), MATRIX, SHARED, DIM, false, 0 },
    { "ffn_up_shexp", IN_BLOCK(experts.shared.up), MATRIX, SHARED, DIM, false, 0 },
    { "ffn_down_shexp", IN_BLOCK(experts.shared.down), MATRIX, DIM, SHARED, false, 0 },
    { "ffn_gate_inp_shexp", IN_BLOCK(experts.shared_gate), MATRIX, ONE, DIM, false, 0 },
    { "ffn_latent_down", IN_BLOCK(experts.latent_down), MATRIX, LATENT, DIM, false, 0 },
    { "ffn_latent_up", IN_BLOCK(experts.latent_up), MATRIX, DIM, LATENT, false, 0 },
    { 0 },
};

static int check(const bmc_model *m, const bmc_block *c) {
    (void)m;
    if (c->n_experts < 1 || c->n_experts > 4096 || c->n_active < 1 || c->n_active > c->n_experts
        || c->n_active > 256)
        return fail(BMC_EFORMAT, "layer %d: %d of %d experts: expected 1 to 256 of at most 4096", c->layer,
                    c->n_active, c->n_experts);
    if (c->hidden_dim < 1 || c->hidden_dim > 1 << 22 || c->shared_dim < 0 || c->shared_dim > 1 << 22
        || c->latent_dim < 0)
        return fail(BMC_EFORMAT, "layer %d: experts of %d values, a shared one of %d", c->layer,
                    c->hidden_dim, c->shared_dim);
    if (c->gating < BMC_GATING_SOFTMAX || c->gating > BMC_GATING_CHOSEN)
        return fail(BMC_EFORMAT, "layer %d: expert_gating_func: expected 1 to 3, found %d", c->layer,
                    c->gating);
    if (c->expert_groups > 1
        && (c->n_experts % c->expert_groups || c->groups_used < 1 || c->groups_used > c->expert_groups
            || c->n_experts / c->expert_groups * c->groups_used < c->n_active))
        return fail(BMC_EFORMAT, "layer %d: %d of %d groups of %d experts", c->layer, c->groups_used,
                    c->expert_groups, c->n_experts);
    return 0;
}

static const char *missing(const struct block *b) {
    const struct dense *d = &b->experts.shared;
    if (d->up.data && !d->down.data)
        return "ffn_down_shexp";
    const bool latent = b->experts.latent_down.data && b->experts.latent_up.data;
    return b->c.latent_dim && !latent ? "ffn_latent_down" : NULL;
}

static void measure(const bmc_model *m, const bmc_block *c, int64_t *e) {
    (void)m;
    e[HIDDEN] = c->hidden_dim;
    e[EXPERTS] = c->n_experts;
    e[SHARED] = c->shared_dim;
    e[LATENT] = c->latent_dim;
    e[EXPERT_IN] = c->latent_dim ? c->latent_dim : e[DIM];
}

/* A token's expert; the lists of all experts stand one after the other. */
struct pick { int32_t tok; float weight; };

struct work {
    float *scores, *x, *gate, *up, *gathered, *sum;
    struct act_block *gathered_act, *hidden_act, *latent_act;
    struct pick *chosen;            /* (tokens, n_active) expert and weight, ascending */
    struct pick *list;              /* (tokens * n_active) by expert, tokens ascending */
    int32_t *first;                 /* (n_experts + 1,) where an expert's begin */
};

static size_t lay_out(const bmc_model *m, const struct block *b, struct work *w) {
    const size_t n = (size_t)m->pass_max, active = (size_t)b->c.n_active;
    const size_t hidden = padded(larger(b->c.hidden_dim, b->c.shared_dim));
    const struct buffers *buf = m->buffers;
    float *next = buf ? buf->work : NULL, *begin = next;
    struct act_block *act = buf ? buf->work_act : NULL;
    int32_t *ids = buf ? buf->work_ids : NULL;
    const size_t blocks_in = (size_t)b->extent[EXPERT_IN] / 32;
    const size_t blocks_hidden = (size_t)larger(b->c.hidden_dim, b->c.shared_dim) / 32;
    const struct { float **place; size_t size; } parts[] = {
        { &w->scores, padded(b->c.n_experts) }, { &w->x, padded(b->extent[DIM]) },
        { &w->gate, active * hidden }, { &w->up, active * hidden },
        { &w->gathered, active * padded(b->extent[EXPERT_IN]) }, { &w->sum, padded(b->extent[EXPERT_IN]) },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = next;
        next += n * parts[i].size;
    }
    w->gathered_act = act;
    w->hidden_act = act + n * active * blocks_in;
    w->latent_act = w->hidden_act + n * active * blocks_hidden;
    w->chosen = (struct pick *)(void *)ids;
    w->list = w->chosen + n * active;
    w->first = (int32_t *)(void *)(w->list + n * active);
    return (size_t)(next - begin) / n;
}

static struct need need(const bmc_model *m, const struct block *b) {
    struct work w;
    const size_t active = (size_t)b->c.n_active, blocks_in = (size_t)b->extent[EXPERT_IN] / 32;
    const size_t widest = (size_t)larger(b->c.hidden_dim, b->c.shared_dim);
    return (struct need){
        .floats = lay_out(m, b, &w), .blocks = active * (blocks_in + widest / 32) + blocks_in + 1,
        .ids = 4 * active + (size_t)b->c.n_experts / (size_t)m->pass_max + 2,
        .scratch = (size_t)m->pass_max * GROUP_ROWS + 2 * (size_t)b->c.n_experts,
    };
}

/* Choosing. */

/* What experts' scores are compared by: probabilities (of the chosen ones only where the gating says so),
 * with the bias. NaN is last, and chosen once. */
static void rate(const struct block *b, float *p, float *choice) {
    const bmc_block *c = &b->c;
    double largest = -INFINITY, sum = 0;
    for (int e = 0; e < c->n_experts; e++)
        largest = p[e] > largest ? p[e] : largest;
    if (c->gating == BMC_GATING_SOFTMAX) {
        for (int e = 0; e < c->n_experts; e++)
            sum += exp_exact(p[e] - largest);
        for (int e = 0; e < c->n_experts; e++)
            p[e] = (float)(exp_exact(p[e] - largest) / sum);
    } else if (c->gating == BMC_GATING_SIGMOID)
        for (int e = 0; e < c->n_experts; e++)
            p[e] = (float)(1 / (1 + exp_exact(-(double)p[e])));
    for (int e = 0; e < c->n_experts; e++)
        choice[e] = fmaxf(b->experts.choice_bias.v ? p[e] + b->experts.choice_bias.v[e] : p[e], -FLT_MAX);
}

/* The experts of one token and their weights, ascending by expert; of equal ones the first is chosen. */
static void choose(const struct block *b, float *p, float *choice, struct pick *out) {
    const bmc_block *c = &b->c;
    double sum = 0;
    rate(b, p, choice);
    if (c->expert_groups > 1)
        keep_groups(choice, c->n_experts, c->expert_groups, c->groups_used);
    for (int n = 0; n < c->n_active; n++) {
        int best = 0, at = n;
        for (int e = 1; e < c->n_experts; e++)
            if (choice[e] > choice[best])
                best = e;
        choice[best] = -INFINITY;
        for (; at > 0 && out[at - 1].tok > best; at--)
            out[at] = out[at - 1];
        out[at] = (struct pick){ best, p[best] };
    }
    if (c->gating == BMC_GATING_CHOSEN) {
        float largest = -INFINITY;
        for (int n = 0; n < c->n_active; n++)
            largest = out[n].weight > largest ? out[n].weight : largest;
        for (int n = 0; n < c->n_active; n++)
            sum += exp_exact((double)out[n].weight - largest);
        for (int n = 0; n < c->n_active; n++)
            out[n].weight = (float)(exp_exact((double)out[n].weight - largest) / sum);
    }
    sum = 0;
    for (int n = 0; n < c->n_active; n++)
        sum += out[n].weight;
    for (int n = 0; n < c->n_active; n++)
        out[n].weight *= (c->renorm ? 1.0f / (float)fmax(sum, 6.103515625e-5) : 1.0f) * c->expert_scale;
}

/* Lists of tokens by expert. */
static void sort(const struct block *b, const struct work *w, int n_tok) {
    const int E = b->c.n_experts, n = n_tok * b->c.n_active;
    memset(w->first, 0, (size_t)(E + 1) * sizeof *w->first);
    for (int i = 0; i < n; i++)
        w->first[w->chosen[i].tok + 1]++;
    for (int e = 0; e < E; e++)
        w->first[e + 1] += w->first[e];
    for (int i = 0; i < n; i++)
        w->list[w->first[w->chosen[i].tok]++] = (struct pick){ i / b->c.n_active, w->chosen[i].weight };
    for (int e = E; e > 0; e--)
        w->first[e] = w->first[e - 1];
    w->first[0] = 0;
}

/* What the router reads. */
static struct tokens router_input(struct pass *p, const struct block *b, const struct work *w,
                                  struct tokens in, int thread) {
    const bmc_model *m = p->model;
    const size_t stride = padded(m->c.dim);
    int64_t from, to;
    if (b->c.route == BMC_ROUTE_NORMED)
        return in;
    const float *x = b->c.route == BMC_ROUTE_LAYER ? m->buffers->input : m->buffers->x;
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *row = w->x + (size_t)t * stride;
        if (b->c.route == BMC_ROUTE_SCALED) {
            m->k.rmsnorm(row, x + (size_t)t * stride, NULL, NULL, m->c.dim, m->c.norm_eps);
            m->k.scale(row, 1.0f / sqrtf((float)m->c.dim), m->c.dim);
            if (b->experts.router_scale.v)
                m->k.mul(row, b->experts.router_scale.v, m->c.dim);
        } else
            memcpy(row, x + (size_t)t * stride, (size_t)m->c.dim * sizeof *row);
    }
    barrier(p, thread, BMC_STEP_NORM);
    const struct tokens read = { w->x, w->gathered_act, in.n, 0, 0 };
    quantize_rows(p, read, m->c.dim, thread);
    barrier(p, thread, BMC_STEP_NORM);
    return read;
}

/* Every token's experts, and every expert's tokens. */
static void route(struct pass *p, const struct block *b, const struct work *w, struct tokens in, int thread) {
    const struct product scores = product(&b->experts.router, router_input(p, b, w, in, thread), w->scores);
    int64_t from, to;
    multiply(p, &scores, 1, thread);
    barrier(p, thread, BMC_STEP_GATE_UP);
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++)
        choose(b, w->scores + (size_t)t * padded(b->c.n_experts), scratch_of(p, thread),
               w->chosen + (size_t)t * (size_t)b->c.n_active);
    barrier(p, thread, BMC_STEP_GATE_UP);
    if (thread == 0)
        sort(b, w, in.n);
    barrier(p, thread, BMC_STEP_GATE_UP);
}

/* Computing. */

/* An expert's tokens side by side: the pass's own where it has one. */
static struct tokens tokens_of(const struct block *b, const struct work *w, struct tokens in, int e) {
    const int first = w->first[e], n = w->first[e + 1] - first;
    if (in.n == 1)
        return (struct tokens){ in.x, in.act, n, 0, 0 };
    return (struct tokens){ w->gathered + (size_t)first * padded(b->extent[EXPERT_IN]),
                            w->gathered_act + (size_t)first * (size_t)(b->extent[EXPERT_IN] / 32), n, 0, 0 };
}

/* Columns of the pass's tiles into those of their experts. */
static void gather(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                   int thread) {
    const int64_t blocks = b->extent[EXPERT_IN] / 32;
    const size_t stride = padded(b->extent[EXPERT_IN]);
    const int wide = tile_width(in.n);
    int64_t from, to;
    share(p, thread, w->first[b->c.n_experts], &from, &to);
    for (int e = 0; e < b->c.n_experts; e++) {
        const struct tokens own = tokens_of(b, w, in, e);
        const int width = own.n ? tile_width(own.n) : 1;
        for (int i = larger(0, (int)from - w->first[e]); i < own.n && w->first[e] + i < to; i++) {
            const int tok = w->list[w->first[e] + i].tok;
            const int tile = tok / wide, cols = smaller(in.n - tile * wide, wide);
            const int to_tile = i / width, to_cols = smaller(own.n - to_tile * width, width);
            const struct act_block *a = in.act + (size_t)tile * (size_t)wide * (size_t)blocks + tok % wide;
            struct act_block *y = own.act + (size_t)to_tile * (size_t)width * (size_t)blocks + i % width;
            for (int64_t k = 0; k < blocks; k++)
                y[k * to_cols] = a[k * cols];
            memcpy(own.x + (size_t)i * stride, in.x + (size_t)tok * stride,
                   (size_t)b->extent[EXPERT_IN] * sizeof *own.x);
        }
    }
    barrier(p, thread, BMC_STEP_NORM);
}

static struct gate_up job_of(const struct block *b, const struct work *w, struct tokens in, int e) {
    static const struct matrix none;
    const struct experts *x = &b->experts;
    const size_t first = (size_t)w->first[e], stride = padded(b->c.hidden_dim);
    const struct tokens own = tokens_of(b, w, in, e);
    return (struct gate_up){
        x->gate.of ? &x->gate.of[e] : &none, &x->up.of[e], own, w->gate + first * stride,
        { w->up + first * stride, w->hidden_act + first * (size_t)(b->c.hidden_dim / 32), own.n, 0, 0 },
        b->c.act, b->c.act_param,
    };
}

static struct product down_of(const struct block *b, const struct work *w, struct tokens in, int e) {
    float *rows = w->gathered + (size_t)w->first[e] * padded(b->extent[EXPERT_IN]);
    return product(&b->experts.down.of[e], job_of(b, w, in, e).hidden, rows);
}

static bool used(const struct work *w, int e) { return w->first[e + 1] > w->first[e]; }

/* Whether a GPU does an expert's products in this pass. */
static bool there(const struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                  int e) {
    if (p->machine == &cpu_machine || !used(w, e))
        return false;
    const struct gate_up job = job_of(b, w, in, e);
    const struct product list[] = { product(job.gate, job.in, job.gate_out),
                                    product(job.up, job.in, job.hidden.x), down_of(b, w, in, e) };
    return cuda_stage_takes(p, list, 3);
}

static void gate_up_there(struct pass *p, const struct block *b, const struct work *w, struct tokens in) {
    for (int e = 0; e < b->c.n_experts; e++)
        if (there(p, b, w, in, e)) {
            const struct gate_up job = job_of(b, w, in, e);
            cuda_stage_gate_up(p, &job);
        }
}

/* Results of each token's expert go where its input was. */
static void down_there(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                       int thread) {
    if (p->machine == &cpu_machine)
        return;
    for (int e = 0; thread == 0 && e < b->c.n_experts; e++)
        if (there(p, b, w, in, e)) {
            const struct product down = down_of(b, w, in, e);
            cuda_stage_multiply(p, &down);
        }
    if (thread == 0)
        cuda_stage_await(p);
    barrier(p, thread, BMC_STEP_DOWN);
}

/* Parts of all chosen experts' first halves, one expert after the other. */
static void gate_up_chosen(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                           int thread) {
    const int each = n_groups(&b->experts.up.of[0]);
    int64_t total = 0, from, to;
    for (int e = 0; e < b->c.n_experts; e++)
        total += used(w, e) && !there(p, b, w, in, e) ? each : 0;
    if (thread == 0 && p->machine != &cpu_machine)
        gate_up_there(p, b, w, in);
    while (pool_take(p->model->pool, thread, total, &from, &to)) {
        int64_t begin = 0;
        for (int e = 0; e < b->c.n_experts && begin < to; e++) {
            if (!used(w, e) || there(p, b, w, in, e))
                continue;
            if (begin + each > from) {
                const struct gate_up job = job_of(b, w, in, e);
                gate_up(p, &job, larger(0, (int)(from - begin)), smaller(each, (int)(to - begin)), thread);
            }
            begin += each;
        }
    }
    if (thread == 0 && p->machine != &cpu_machine)
        cuda_stage_await(p);
    barrier(p, thread, BMC_STEP_ACTIVATION);
}

/* How many groups of `down` are done at a time: all where that is best for each chosen expert, and its
 * results fit. */
static int down_stretch(const struct pass *p, const struct block *b, const struct work *w) {
    int groups = n_groups(b->experts.down.of);
    for (int e = 0; e < b->c.n_experts; e++) {
        const int n = w->first[e + 1] - w->first[e];
        if (n) {
            groups = smaller(groups, larger(1, p->model->pass_max / n));
            groups = stretch(&b->experts.down.of[e], n, groups);
        }
    }
    return groups;
}

/* y += weight * down(hidden), experts ascending, for groups [from, to) of rows. */
static void down_groups(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                        struct sink out, int from, int to, int thread) {
    const struct matrix *down = b->experts.down.of;
    const size_t stride = padded(b->extent[EXPERT_IN]);
    const size_t row = (size_t)from * GROUP_ROWS, wide = (size_t)(to - from) * GROUP_ROWS;
    const int rows = smaller((int)wide, (int)(down->n_rows - (int64_t)row));
    float *part = scratch_of(p, thread);
    for (int t = 0; !out.add && t < in.n; t++)
        memset(out.y + (size_t)t * stride + row, 0, (size_t)rows * sizeof *out.y);
    for (int e = 0; e < b->c.n_experts; e++) {
        if (!used(w, e))
            continue;
        const bool done = there(p, b, w, in, e);
        const float *y = done ? down_of(b, w, in, e).y + row : part;
        if (!done)
            multiply_groups(p, &down[e], job_of(b, w, in, e).hidden, from, to, part, thread);
        for (int i = w->first[e]; i < w->first[e + 1]; i++, y += done ? stride : wide)
            p->model->k.axpy(out.y + (size_t)w->list[i].tok * stride + row, w->list[i].weight, y, rows);
    }
}

static void down_all(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                     struct sink out, int thread) {
    const int step = down_stretch(p, b, w);
    int64_t from, to;
    while (pool_take(p->model->pool, thread, n_groups(b->experts.down.of), &from, &to))
        for (; from < to; from += step)
            down_groups(p, b, w, in, out, (int)from, smaller((int)from + step, (int)to), thread);
}

/* The expert that is always on, on top of what the others came to. */
static void shared(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                   struct sink out, int thread) {
    const struct dense *d = &b->experts.shared;
    const struct gate_up job = {
        &d->gate, &d->up, in, w->gate, { w->up, w->hidden_act, in.n, 0, 0 }, b->c.act, b->c.act_param,
    };
    const struct matrix *gate = &b->experts.shared_gate;
    const struct product switch_on = product(gate, in, w->scores);
    const size_t stride = padded(p->model->c.dim);
    int64_t from, to;
    barrier(p, thread, BMC_STEP_DOWN);
    p->machine->gate_up(p, &job, thread);
    if (gate->data && thread == 0)
        multiply_alone(p, &switch_on, thread);
    barrier(p, thread, BMC_STEP_ACTIVATION);
    struct product down = product_into(&d->down, job.hidden, (struct sink){ out.y, true });
    if (gate->data) {
        down.y = w->x;
        down.add = false;
    }
    p->machine->multiply(p, &down, 1, thread);
    if (!gate->data)
        return;
    barrier(p, thread, BMC_STEP_DOWN);
    share(p, thread, in.n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float on;
        p->model->k.act[BMC_ACT_SIGMOID](&on, NULL, w->scores + (size_t)t * padded(1), 1, NULL);
        p->model->k.axpy(out.y + (size_t)t * stride, on, w->x + (size_t)t * stride, p->model->c.dim);
    }
}

/* Experts that work on fewer values than the model has: theirs are made, and their sum goes back. */
static struct tokens to_latent(struct pass *p, const struct block *b, const struct work *w, struct tokens in,
                               int thread) {
    const struct tokens latent = { w->sum, w->latent_act, in.n, 0, 0 };
    const struct product down = product(&b->experts.latent_down, in, latent.x);
    p->machine->multiply(p, &down, 1, thread);
    barrier(p, thread, BMC_STEP_GATE_UP);
    quantize_rows(p, latent, b->c.latent_dim, thread);
    barrier(p, thread, BMC_STEP_NORM);
    return latent;
}

static void from_latent(struct pass *p, const struct block *b, const struct work *w, struct sink out, int n,
                        int thread) {
    const struct tokens sum = { w->x, w->latent_act, n, 0, 0 };
    barrier(p, thread, BMC_STEP_DOWN);
    quantize_rows(p, sum, b->c.latent_dim, thread);
    barrier(p, thread, BMC_STEP_NORM);
    const struct product up = product_into(&b->experts.latent_up, sum, out);
    p->machine->multiply(p, &up, 1, thread);
}

void run_experts(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    struct work w;
    struct tokens read = in;
    const bool latent = b->experts.latent_down.data;
    lay_out(p->model, b, &w);
    route(p, b, &w, in, thread);
    residents_want(p, b, w.first, thread);
    if (latent)
        read = to_latent(p, b, &w, in, thread);
    if (in.n > 1)
        gather(p, b, &w, read, thread);
    gate_up_chosen(p, b, &w, read, thread);
    down_there(p, b, &w, read, thread);
    down_all(p, b, &w, read, latent ? (struct sink){ w.x, false } : out, thread);
    if (latent)
        from_latent(p, b, &w, out, in.n, thread);
    if (b->experts.shared.up.data)
        shared(p, b, &w, in, out, thread);
}

static void run(struct pass *p, const struct block *b, struct tokens in, struct sink out, int thread) {
    p->machine->experts(p, b, in, out, thread);
}

const struct kind experts_kind = { "experts", roles, check, measure, need, false, missing, NULL, run };
