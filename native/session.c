/* Sessions, and the way from spans to passes. */
#include "error.h"
#include "model.h"
#include "sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int claim(bmc_session *s) {
    if (!atomic_flag_test_and_set_explicit(&s->busy, memory_order_acquire))
        return 0;
    return fail(BMC_EBUSY, "this session is in use by another thread");
}

static void release(bmc_session *s) { atomic_flag_clear_explicit(&s->busy, memory_order_release); }

static int check_session(const bmc_model *m, int64_t cap, int r, int rope) {
    if (!m || !(m->panels || m->rooms))
        return fail(BMC_EINVAL, "bmc_session_new: the model has no panels yet");
    if (cap < 1 || cap > 1 << 30)
        return fail(BMC_EINVAL, "context: expected 1 to %d, found %lld", 1 << 30, (long long)cap);
    if (r < 0)
        return fail(BMC_EINVAL, "rows: expected 0 or more at a time, found %d", r);
    if (rope < 0 || rope > (m->c.n_ropes > 1))
        return fail(BMC_EINVAL, "rope: the model has %d tables, number %d is asked for", (int)m->c.n_ropes, rope);
    if (m->position_embd.data && cap > m->c.n_ctx)
        return fail(BMC_EINVAL, "context: the model has %d learned positions, %lld are asked for", (int)m->c.n_ctx,
                    (long long)cap);
    return 0;
}

int bmc_session_new(bmc_model *m, int64_t cap, int r, int rope, bmc_session **session) {
    int status = check_session(m, cap, r, rope);
    if (status)
        return status;
    bmc_session *s = calloc(1, sizeof *s);
    if (!s)
        return fail(BMC_ENOMEM, "no memory for a session");
    int64_t tile_bytes = (int64_t)TILE * (m->c.head_dim + m->v_dim) * (int64_t)sizeof(uint16_t);
    struct arena_config config = {
        .n_layers = m->c.n_layers, .n_heads = m->c.n_kv_heads, .tile_bytes = tile_bytes, .cap = cap,
        .r = r ? r : arena_auto_rows(tile_bytes / TILE * m->c.n_kv_heads * m->c.n_layers),
    };
    status = arena_init(&s->arena, &config);
    if (status) {
        free(s);
        return status;
    }
    s->model = m;
    s->rope = rope;
    atomic_fetch_add(&m->n_users, 1);
    *session = s;
    return 0;
}

void bmc_session_free(bmc_session *s) {
    if (!s || claim(s))             /* in use: by a thread of the parent of a forked process, which left it half changed */
        return;
    arena_free(&s->arena);
    free(s->tokens);
    model_release(s->model);
    free(s);
}

int bmc_session_position(const bmc_session *s) { return s->position; }

int bmc_session_rewind(bmc_session *s, int position) {
    int status = claim(s);
    if (status)
        return status;
    if (position < 0 || position > s->position)
        status = fail(BMC_EINVAL, "rewind: expected 0 to %d, found %d", s->position, position);
    else
        s->position = position;
    release(s);
    return status;
}

const int32_t *bmc_session_tokens(const bmc_session *s) { return s->tokens; }

int bmc_session_sync(bmc_session *s, const int32_t *tokens, int n) {
    int status = claim(s), kept = 0;
    if (status)
        return status;
    if (n < 0 || (n && !tokens))
        status = fail(BMC_EINVAL, "sync: expected 0 or more tokens, found %d", n);
    while (!status && kept < n && kept < s->position && tokens[kept] == s->tokens[kept])
        kept++;
    if (!status)
        s->position = kept;
    release(s);
    return status ? status : kept;
}

/* Room for more rows and their tokens. */
static int reserve(bmc_session *s, int rows) {
    int64_t n = (int64_t)s->position + rows;
    int status = arena_reserve(&s->arena, n);
    if (status || n <= s->n_tokens)
        return status;
    int64_t wanted = n > 2 * (int64_t)s->n_tokens ? n : 2 * (int64_t)s->n_tokens;
    int32_t *tokens = realloc(s->tokens, (size_t)wanted * sizeof *tokens);
    if (!tokens)
        return fail(BMC_ENOMEM, "no memory for %lld tokens", (long long)wanted);
    s->tokens = tokens;
    s->n_tokens = (int)wanted;
    return 0;
}

int bmc_session_reserve(bmc_session *s, int rows) {
    int status = claim(s);
    if (status)
        return status;
    status = rows < 0 ? fail(BMC_EINVAL, "reserve: %d rows", rows) : reserve(s, rows);
    release(s);
    return status;
}

int bmc_session_stats(const bmc_session *s, bmc_arena_stats *stats) {
    const struct arena *a = &s->arena;
    *stats = (bmc_arena_stats){
        .rows_reserved = a->rows_reserved, .rows_used = s->position, .r = a->config.r,
        .bytes_reserved = a->n_segments * (int64_t)a->segment_bytes, .row_bytes = arena_row_bytes(a),
    };
    return 0;
}

static int check_span(const bmc_span *span, const bmc_model *m) {
    if (!span->session || !span->tokens)
        return fail(BMC_EINVAL, "a span needs a session and tokens");
    if (span->session->model != m)
        return fail(BMC_EINVAL, "the sessions of one call belong to different models");
    if (span->n_tok < 1)
        return fail(BMC_EINVAL, "a span needs at least one token, found %d", (int)span->n_tok);
    if (span->want < BMC_WANT_NONE || span->want > BMC_WANT_ALL)
        return fail(BMC_EINVAL, "want: expected 0 to 2, found %d", (int)span->want);
    if (span->last < 0)
        return fail(BMC_EINVAL, "last: expected 0 or more rows, found %d", (int)span->last);
    if (span->sampler && sampler_check(span->sampler, m->c.vocab_size))
        return BMC_EINVAL;
    if (span->n_top < 0 || span->n_top > m->c.vocab_size || (span->n_top && (!span->top_ids || !span->top_logprobs)))
        return fail(BMC_EINVAL, "n_top: expected 0 to %d and room for the results, found %d", (int)m->c.vocab_size, (int)span->n_top);
    if (span->given && !span->given_logprob)
        return fail(BMC_EINVAL, "given: the log-probabilities of these ids need room");
    int n_wanted = span->want == BMC_WANT_ALL ? span->n_tok : span->want == BMC_WANT_LAST;
    for (int i = 0; span->given && i < n_wanted; i++)
        if (span->given[i] < 0 || span->given[i] >= m->c.vocab_size)
            return fail(BMC_EINVAL, "given: token ids are 0 to %d, found %d", (int)m->c.vocab_size - 1, (int)span->given[i]);
    for (int i = 0; i < span->n_tok; i++)
        if (span->tokens[i] < 0 || span->tokens[i] >= m->c.vocab_size)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", (int)m->c.vocab_size - 1, (int)span->tokens[i]);
    return 0;
}

/* Claims every session, with room for its tokens. On failure none stays claimed and no position has moved. */
static int claim_all(const bmc_span *spans, int n) {
    int status = 0, claimed = 0;
    for (; claimed < n && !status; claimed++) {
        status = check_span(&spans[claimed], spans[0].session ? spans[0].session->model : NULL);
        if (!status)
            status = claim(spans[claimed].session);
        if (status)
            break;
    }
    for (int i = 0; i < n && !status; i++)
        status = reserve(spans[i].session, spans[i].n_tok);
    for (int i = 0; i < n && !status; i++)          /* penalties look at them during the pass */
        memcpy(spans[i].session->tokens + spans[i].session->position, spans[i].tokens, (size_t)spans[i].n_tok * sizeof(int32_t));
    for (int i = 0; status && i < claimed; i++)
        release(spans[i].session);
    return status;
}

static bool wanted(const bmc_span *span, int i) {
    return span->want == BMC_WANT_ALL || (span->want == BMC_WANT_LAST && i == span->n_tok - 1);
}

static void push(struct pass *p, const bmc_span *span, int i) {
    p->session[p->n_tok] = span->session;
    p->token[p->n_tok] = span->tokens[i];
    p->pos[p->n_tok] = span->session->position + i;
    p->last[p->n_tok] = span->last;
    if (wanted(span, i)) {
        int row = span->want == BMC_WANT_ALL ? i : 0;
        size_t n = (size_t)p->model->c.vocab_size;
        p->out[p->n_out] = p->n_tok;
        const uint32_t *mask = span->mask ? span->mask + (size_t)row * ((n + 31) / 32) : NULL;
        bool whole = span->sampler || mask || span->n_top;          /* the choice needs all logits */
        p->out_span[p->n_out] = span;
        p->out_row[p->n_out] = row;
        p->mask[p->n_out] = mask;
        p->logits[p->n_out++] = span->logits ? span->logits + (size_t)row * n
                              : whole ? p->model->buffers->rows + (size_t)p->n_sampled++ * n : NULL;
    }
    p->n_tok++;
}

/* Passes of up to PASS_MAX tokens, SAMPLED_MAX of them with a sampler, over all spans, one after the other. */
static void run_passes(struct pass *p, const bmc_span *spans, int n) {
    for (int s = 0; s < n; s++)
        for (int i = 0; i < spans[s].n_tok; i++) {
            push(p, &spans[s], i);
            if (p->n_tok == PASS_MAX || p->n_sampled == SAMPLED_MAX || (s == n - 1 && i == spans[s].n_tok - 1)) {
                forward(p);
                p->n_tok = p->n_out = p->n_sampled = 0;
            }
        }
    for (int s = 0; s < n; s++)
        spans[s].session->position += spans[s].n_tok;
}

/* What a pass notes down, made for one call. */
static struct pass *make_pass(bmc_model *m, int n_tok) {
    size_t outs = (size_t)(n_tok < PASS_MAX ? n_tok : PASS_MAX), parts = (size_t)head_parts(m);
    struct pass *p = malloc(sizeof *p);
    struct best *best = malloc(outs * parts * sizeof *best);
    float *given = malloc(outs * sizeof *given);
    if (p && best && given) {
        p->model = m;
        p->best = best;
        p->given = given;
        p->n_tok = p->n_out = p->n_sampled = 0;
        return p;
    }
    free(p);
    free(best);
    free(given);
    fail(BMC_ENOMEM, "no memory for a pass over %d tokens", n_tok);
    return NULL;
}

static void free_pass(struct pass *p) {
    if (p) {
        free(p->best);
        free(p->given);
    }
    free(p);
}

int evaluate(const bmc_span *spans, int n_spans, bool coarse) {
    if (!spans || n_spans < 1)
        return fail(BMC_EINVAL, "bmc_eval: needs at least one span");
    int64_t start = nanoseconds();
    int status = claim_all(spans, n_spans), n_tok = 0;
    if (status)
        return status;
    bmc_model *m = spans[0].session->model;
    for (int i = 0; i < n_spans && n_tok < PASS_MAX; i++)
        n_tok += spans[i].n_tok < PASS_MAX ? spans[i].n_tok : PASS_MAX;
    struct pass *p = make_pass(m, n_tok);
    if (p) {
        pthread_mutex_lock(&m->lock);
        p->coarse = coarse && m->coarse.codes;
        run_passes(p, spans, n_spans);
        m->profile.calls += m->profile.laps ? nanoseconds() - start : 0;
        pthread_mutex_unlock(&m->lock);
    }
    free_pass(p);
    for (int i = 0; i < n_spans; i++)
        release(spans[i].session);
    return p ? 0 : BMC_ENOMEM;
}

int bmc_eval(const bmc_span *spans, int n_spans) { return evaluate(spans, n_spans, false); }
