/* The head: logits of the tokens that are wanted, and what is chosen by them. */
#include "pass.h"

#include "panels.h"
#include "sample.h"

#include <math.h>

static int n_panels(int rows) { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }

/* What a model does to its logits. */
static void finish(const bmc_model *m, float *logits, int n) {
    if (m->c.logit_scale != 1.0f)
        m->k.scale(logits, m->c.logit_scale, n);
    if (m->c.logit_softcap > 0)
        m->k.softcap(logits, m->c.logit_softcap, n);
}

static struct best best_of(const bmc_model *m, const float *logits, int n, int first) {
    float largest = m->k.largest(logits, n);
    struct best best = {
        .logit = largest, .seen = largest, .sum = m->k.sum_exp(logits, largest, n), .id = first
    };
    while (best.id < first + n - 1 && logits[best.id - first] != largest)
        best.id++;
    return best;
}

/* Logits of the wanted tokens, HEAD_ROWS of the vocabulary at a time: copied where they are asked for, or
 * only the best of them remembered, so that greedy decoding never writes a vocabulary's worth. */
static void logits(const struct pass *p, struct tokens in, int thread) {
    const bmc_model *m = p->model;
    const struct matrix *output = p->coarse ? &m->coarse : &m->output;
    float *part = scratch_of(p, thread);
    int64_t from = 0, to = 0;
    for (; from < to || pool_take(m->pool, thread, head_parts(m), &from, &to); from++) {
        int row = (int)from * HEAD_ROWS, rows = smaller(HEAD_ROWS, m->c.vocab_size - row);
        int panel = row / PANEL_ROWS;
        const struct matrix w = slice(p, output, panel, panel + n_panels(rows), thread, 0);
        const struct product r = { output, in, part, HEAD_ROWS, false };
        for (int tile = 0; tile * TILE_COLS < p->n_out; tile++)
            project(p, &r, &w, 0, tile);
        for (int i = 0; i < p->n_out; i++) {
            const struct wanted *out = &p->out[i];
            float *own = part + (size_t)i * HEAD_ROWS;
            finish(m, own, rows);
            if (out->logits)
                memcpy(out->logits + row, own, (size_t)rows * sizeof *own);
            const int32_t *given = out->span->given ? out->span->given + out->row : NULL;
            if (given && *given >= row && *given < row + rows)
                p->given[i] = own[*given - row];
            if (span_chooses(out->span))
                p->best[(int64_t)i * head_parts(m) + from] = best_of(m, own, rows, row);
        }
    }
}

/* Parts that get a second look. With 12, 24, 48 and 64 of them the best of 128k nearly equal logits was found
 * 258, 283, 293 and 293 times of 300. */
enum { LIKED = 48 };

/* The logit that LIKED parts reach, or all of them where there are fewer. */
static float liked_least(const struct best *parts, int n_parts) {
    float top[LIKED];                   /* descending */
    int n = 0;
    for (const struct best *part = parts; part < parts + n_parts; part++) {
        if (n == LIKED && part->seen <= top[LIKED - 1])
            continue;
        int at = n < LIKED ? n++ : LIKED - 1;
        for (; at > 0 && top[at - 1] < part->seen; at--)
            top[at] = top[at - 1];
        top[at] = part->seen;
    }
    return top[n - 1];
}

/* For each wanted token, the LIKED parts whose best the coarse head likes most get that one's true logit, the
 * threads taking turns; what else they sum up to stays coarse. */
static void rescore(const struct pass *p, struct tokens in, int thread) {
    const bmc_model *m = p->model;
    float *own = scratch_of(p, thread);      /* (n_out, PANEL_ROWS) */
    const struct product r = { &m->output, in, own, PANEL_ROWS, false };
    int liked = 0;
    for (int i = 0; i < p->n_out; i++) {
        struct best *parts = p->best + (int64_t)i * head_parts(m);
        float least = liked_least(parts, head_parts(m));
        for (struct best *part = parts; part < parts + head_parts(m); part++) {
            if (part->seen < least || liked++ % pool_size(m->pool) != thread)
                continue;
            int panel = part->id / PANEL_ROWS;
            const struct matrix w = slice(p, &m->output, panel, panel + 1, thread, 0);
            project(p, &r, &w, 0, i / tile_width(p->n_out));
            finish(m, &own[i * PANEL_ROWS + part->id % PANEL_ROWS], 1);
            part->logit = own[i * PANEL_ROWS + part->id % PANEL_ROWS];
        }
    }
}

/* The best of all parts, the first of equals; sum: of e^(logit - best) over all ids, each
 * logit as it is known best. */
static struct best best_of_parts(const struct best *parts, size_t n, double *sum) {
    const struct best *best = parts;
    for (const struct best *part = parts; part < parts + n; part++)
        if (part->logit > best->logit)
            best = part;
    *sum = 0;
    for (const struct best *part = parts; part < parts + n; part++) {
        double seen = exp((double)part->seen - best->logit);
        *sum += part->sum * seen;
        if (part->logit != part->seen)
            *sum += exp((double)part->logit - best->logit) - seen;
    }
    return *best;
}

static const bmc_sampler GREEDY = { .top_k = 1, .top_p = 1, .repeat_penalty = 1 };

static const bmc_sampler *sampler_of(const bmc_span *span) { return span->sampler ? span->sampler : &GREEDY; }

static struct candidate *room_of(const struct pass *p, int thread) {
    return (struct candidate *)(void *)(scratch_of(p, thread));
}

/* The id that follows a token, chosen by a sampler from logits that bias, penalties and a mask may change
 * first. top: the largest logit. Without a sampler but with a mask it is the largest that is allowed. -1:
 * none is. n_left: of candidates, in room_of(). */
static int32_t chosen(const struct pass *p, int64_t i, float top, float *lead, int *n_left, int thread) {
    const bmc_model *m = p->model;
    const bmc_span *span = p->out[i].span;
    const bmc_session *session = p->at[i].session;
    const uint32_t *mask = p->out[i].mask;
    const float *logits = p->out[i].logits;
    const int n_vocab = m->c.vocab_size, n_read = p->at[i].pos + 1;
    struct candidate *room = room_of(p, thread);
    if (sampler_alters(span->sampler, mask)) {
        float *altered = m->buffers->altered + (size_t)thread * padded(n_vocab);
        top = sampler_alter(&m->k, span->sampler, mask, session->tokens, n_read, logits, n_vocab, altered,
                            room);
        logits = altered;
    }
    if (!isfinite(top))
        return -1;
    return sample(&m->k, sampler_of(span), logits, n_vocab, top, session->offset + n_read, span->names, room,
                  lead, n_left);
}

/* Each wanted token's next id, the best or the sampler's, its log-probability, and the likeliest ids. */
void choose_ids(const struct pass *p, int thread) {
    const bmc_model *m = p->model;
    const size_t n = (size_t)head_parts(m);
    struct candidate *room = room_of(p, thread);
    int64_t from, to;
    share(p, thread, p->n_out, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const struct wanted *out = &p->out[i];
        const bmc_span *span = out->span;
        const int row = out->row, n_top = span->n_top;
        if (!span_chooses(span))
            continue;
        double sum;
        struct best best = best_of_parts(p->best + (size_t)i * n, n, &sum);
        double log_sum = (double)best.logit + log(sum), logprob = -log(sum);
        int32_t id = best.id;
        int32_t *top_ids = n_top ? span->top_ids + (size_t)row * (size_t)n_top : NULL;
        float *top_logprobs = n_top ? span->top_logprobs + (size_t)row * (size_t)n_top : NULL;
        int n_left = 1;
        if (span->as_drawn)
            room[0] = (struct candidate){ best.logit, id };
        if ((span->sampler || out->mask) && isfinite(best.logit)) {
            id = chosen(p, i, best.logit, span->lead ? span->lead + row : NULL, &n_left, thread);
            logprob = id < 0 ? NAN : (double)out->logits[id] - best.logit - log(sum);
        }
        if (span->as_drawn)
            logprob = drawn_logprobs(sampler_of(span), room, id < 0 ? 0 : n_left, id, n_top, top_ids,
                                     top_logprobs);
        else if (n_top)
            likeliest(&m->k, out->logits, m->c.vocab_size, n_top, log_sum, top_ids, top_logprobs, room);
        if (span->next)
            span->next[row] = id;
        if (span->logprob)
            span->logprob[row] = (float)logprob;
        if (span->given)
            span->given_logprob[row] = (float)((double)p->given[i] - best.logit - log(sum));
    }
    note(p, thread, BMC_STEP_HEAD);
}

void give_hidden(struct pass *p, struct tokens in, int thread) {
    const size_t dim = (size_t)p->model->c.dim;
    int64_t from, to;
    share(p, thread, p->n_out, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const float *x = in.x + (size_t)i * padded((int64_t)dim);
        if (p->out[i].hidden)
            memcpy(p->out[i].hidden, x, dim * sizeof *x);
        if (p->out[i].kept)
            memcpy(p->out[i].kept, x, dim * sizeof *x);
    }
    note(p, thread, BMC_STEP_HEAD);
}

void head(struct pass *p, struct tokens in, int thread) {
    logits(p, in, thread);
    barrier(p, thread, BMC_STEP_HEAD);
    if (p->coarse) {
        rescore(p, in, thread);
        barrier(p, thread, BMC_STEP_HEAD);
    }
}
