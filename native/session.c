/* Sessions, and the way from spans to passes. */
#include "cuda/cuda.h"
#include "error.h"
#include "sample.h"
#include "session.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int claim(bmc_session *s) {
    if (!atomic_flag_test_and_set_explicit(&s->busy, memory_order_acquire))
        return 0;
    return fail(BMC_EBUSY, "this session is in use by another thread");
}

static int evaluate_claimed(const bmc_span *spans, int n_spans, bool coarse);
static int go_back(bmc_session *s, int position);

void release(bmc_session *s) { atomic_flag_clear_explicit(&s->busy, memory_order_release); }

static int check_session(const bmc_model *m, int64_t cap, int r, int rope) {
    if (!m || !(m->panels || m->rooms))
        return fail(BMC_EINVAL, "bmc_session_new: the model has no panels yet");
    if (cap < 1 || cap > 1 << 30)
        return fail(BMC_EINVAL, "context: expected 1 to %d, found %lld", 1 << 30, (long long)cap);
    if (r < 0)
        return fail(BMC_EINVAL, "rows: expected 0 or more at a time, found %d", r);
    if (rope < 0 || rope > m->c.long_rope)
        return fail(BMC_EINVAL, "rope: the model has %d tables for long contexts, number %d is asked for",
                    (int)m->c.long_rope, rope);
    if (m->position_embd.data && cap > m->c.n_ctx)
        return fail(BMC_EINVAL, "context: the model has %d learned positions, %lld are asked for",
                    (int)m->c.n_ctx, (long long)cap);
    return 0;
}

static int init_arenas(bmc_session *s, int r) {
    const bmc_model *m = s->model;
    for (int i = 0; i < ARENAS; i++) {
        const struct arena_config config = {
            .memory = i >= GPU_ROWS && m->cuda ? &m->cuda->memory : NULL, .streams = m->streams[i],
            .n_streams = m->n_streams[i], .cap = s->cap, .r = r ? r : arena_auto_rows(m->row_bytes[i]),
        };
        int status = arena_init(&s->arenas[i], &config);
        if (status)
            return status;
    }
    return 0;
}

/* An empty session of a model, which is one of its users from now on. */
static bmc_session *make_session(bmc_model *m, int64_t cap, int rope) {
    bmc_session *s = calloc(1, sizeof *s);
    if (!s) {
        fail(BMC_ENOMEM, "no memory for a session");
        return NULL;
    }
    for (int i = 0; i < PLACES; i++)
        states_init(&s->states[i], m->state_sizes[i], m->n_states[i]);
    s->states[ON_GPU].on = m->cuda ? &m->cuda->memory : NULL;
    s->model = m;
    s->cap = cap;
    s->rope = rope;
    atomic_fetch_add(&m->n_users, 1);
    return s;
}

int bmc_session_new(bmc_model *m, int64_t cap, int r, int rope, bmc_session **session) {
    int status = check_session(m, cap, r, rope);
    if (status)
        return status;
    bmc_session *s = make_session(m, cap, rope);
    if (!s)
        return BMC_ENOMEM;
    status = init_arenas(s, r);
    if (status)
        bmc_session_free(s);
    else
        *session = s;
    return status;
}

/* What the child of a fork has in common with its parent, up to `position`. */
static int copy_session(bmc_session *s, bmc_session *parent, int position) {
    int status = 0;
    for (int i = 0; !status && i < ARENAS; i++) {
        status = arena_init(&s->arenas[i], &parent->arenas[i].config);
        if (!status)
            status = arena_fork(&s->arenas[i], &parent->arenas[i], position);
    }
    for (int i = 0; !status && i < PLACES; i++)
        status = states_copy(&s->states[i], &parent->states[i]);
    s->n_tokens = larger(position, 1);
    s->tokens = malloc((size_t)s->n_tokens * sizeof *s->tokens);
    if (!status && !s->tokens)
        status = fail(BMC_ENOMEM, "no memory for %d tokens", position);
    if (status)
        return status;
    if (position)
        memcpy(s->tokens, parent->tokens, (size_t)position * sizeof *s->tokens);
    s->offset = parent->offset;
    s->unchanged = parent->unchanged;
    return go_back(s, position);
}

int bmc_session_fork(bmc_session *parent, int position, bmc_session **session) {
    int status = parent && session ? claim(parent) : fail(BMC_EINVAL, "bmc_session_fork: needs a session");
    if (status)
        return status;
    if (position < 0 || position > parent->position)
        status = fail(BMC_EINVAL, "fork: expected 0 to %d, found %d", parent->position, position);
    bmc_session *s = status ? NULL : make_session(parent->model, parent->cap, parent->rope);
    if (s && !atomic_flag_test_and_set(&s->busy)) {
        status = copy_session(s, parent, position);
        release(s);
        if (status)
            bmc_session_free(s);
        else
            *session = s;
    }
    release(parent);
    return status ? status : s ? 0 : BMC_ENOMEM;
}

void bmc_session_free(bmc_session *s) {
    if (!s || claim(s))             /* in use: by a thread of the parent of a forked process,
                                       which left it half changed */
        return;
    for (int i = 0; i < ARENAS; i++)
        arena_free(&s->arenas[i]);
    for (int i = 0; i < PLACES; i++)
        states_free(&s->states[i]);
    free(s->tokens);
    free(s->hidden.rows);
    model_release(s->model);
    free(s);
}

int bmc_session_position(const bmc_session *s) { return s->position; }

/* Whether rows are gone that windows reach back to from a position. */
static bool lacks_rows(const bmc_session *s, int position) {
    for (int i = WINDOWS; i < ARENAS; i += GPU_WINDOWS - WINDOWS) {
        const struct arena *a = &s->arenas[i];
        if (a->first && position + 1 - s->model->window < a->first)
            return true;
    }
    return false;
}

/* How far back a session gets towards a position without evaluating tokens again: states may have to go
 * farther, and where rows of windows are gone it starts anew. */
static int nearest(const bmc_session *s, int position) {
    int found = position, before;
    /* Both places: one may have to go farther back than the other. */
    do {
        before = found;
        for (int i = 0; i < PLACES; i++)
            found = states_nearest(&s->states[i], found);
    } while (found < before);
    return lacks_rows(s, found) ? 0 : found;
}

static int reach(bmc_session *s, int position) {
    const int reached = nearest(s, position);
    if (lacks_rows(s, reached)) {
        arena_clear(&s->arenas[WINDOWS]);
        arena_clear(&s->arenas[GPU_WINDOWS]);
    }
    for (int i = 0; i < PLACES; i++)
        states_rewind(&s->states[i], reached);
    s->position = reached;
    s->unchanged = smaller(s->unchanged, reached);
    return reached;
}

int bmc_session_nearest(bmc_session *s, int position) {
    int status = claim(s);
    if (status)
        return status;
    if (position < 0 || position > s->position)
        status = fail(BMC_EINVAL, "nearest: expected 0 to %d, found %d", s->position, position);
    else
        status = nearest(s, position);
    release(s);
    return status;
}

/* Back to a position that is within the text. */
static int go_back(bmc_session *s, int position) {
    int reached = reach(s, position), status = 0;
    if (reached < position) {
        const bmc_span again = {
            .session = s, .tokens = s->tokens + reached, .n_tok = position - reached, .want = BMC_WANT_NONE
        };
        status = reserve(s, again.n_tok);
        if (!status)
            status = evaluate_claimed(&again, 1, false);
    }
    return status;
}

int bmc_session_rewind(bmc_session *s, int position) {
    int status = claim(s);
    if (status)
        return status;
    if (position < 0 || position > s->position)
        status = fail(BMC_EINVAL, "rewind: expected 0 to %d, found %d", s->position, position);
    else
        status = go_back(s, position);
    release(s);
    return status;
}

int bmc_session_snapshot(bmc_session *s) {
    int status = claim(s);
    if (status)
        return status;
    for (int i = 0; !status && i < PLACES; i++)
        status = states_snapshot(&s->states[i]);
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
        kept = reach(s, kept);
    release(s);
    return status ? status : kept;
}

/* Room for more rows and their tokens. */
int reserve(bmc_session *s, int rows) {
    int64_t n = (int64_t)s->position + rows;
    int status = 0;
    for (int i = 0; !status && i < PLACES; i++)
        status = states_reserve(&s->states[i]);
    for (int i = 0; !status && i < ARENAS; i++) {
        status = arena_reserve(&s->arenas[i], n);
        if (!status)
            status = arena_own(&s->arenas[i], s->position, n);
    }
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

int bmc_session_keep_hidden(bmc_session *s) {
    const bmc_model *m = s->model;
    int status = claim(s);
    if (status)
        return status;
    if (!m->c.causal || m->target)
        status = fail(BMC_EINVAL,
                      "hidden states are kept for a draft head only: expected a model that writes text");
    else if (!s->hidden.rows) {
        s->hidden.rows = malloc(HIDDEN_KEPT * padded(m->c.dim) * sizeof *s->hidden.rows);
        s->hidden.from = s->position;
        if (!s->hidden.rows)
            status = fail(BMC_ENOMEM, "no memory for hidden states of %d tokens", HIDDEN_KEPT);
    }
    release(s);
    return status;
}

/* Which hidden states are there after n tokens more. */
static void note_hidden(bmc_session *s, int n) {
    const int from = smaller(s->hidden.from, s->position);
    s->hidden.from = larger(from, s->position + n - HIDDEN_KEPT);
}

int bmc_session_stats(const bmc_session *s, bmc_arena_stats *stats) {
    static const int order[] = { ALL_ROWS, GPU_ROWS, WINDOWS, GPU_WINDOWS };
    const struct arena *a = &s->arenas[WINDOWS];
    for (int i = ARENAS - 1; i >= 0; i--)
        if (s->model->n_streams[order[i]])
            a = &s->arenas[order[i]];
    *stats = (bmc_arena_stats){
        .rows_reserved = a->rows_reserved, .rows_used = s->position, .r = a->config.r,
    };
    for (int i = 0; i < PLACES; i++) {
        stats->bytes_reserved += states_bytes(&s->states[i]);
        stats->state_bytes += (int64_t)(s->states[i].floats * sizeof(float));
    }
    if (s->hidden.rows)
        stats->bytes_reserved += (int64_t)(HIDDEN_KEPT * padded(s->model->c.dim) * sizeof(float));
    for (int i = 0; i < ARENAS; i++) {
        stats->bytes_reserved += arena_mapped(&s->arenas[i]);
        stats->row_bytes += arena_row_bytes(&s->arenas[i]);
    }
    return 0;
}

static int check_span(const bmc_span *span, const bmc_model *m) {
    if (!span->session || !span->tokens)
        return fail(BMC_EINVAL, "a span needs a session and tokens");
    if (span->session->model != m)
        return fail(BMC_EINVAL, "the sessions of one call belong to different models");
    if (span->n_tok < 1)
        return fail(BMC_EINVAL, "a span needs at least one token, found %d", (int)span->n_tok);
    if (span->want < BMC_WANT_NONE || span->want > BMC_WANT_FIRST)
        return fail(BMC_EINVAL, "want: expected 0 to 3, found %d", (int)span->want);
    if (span->last < 0)
        return fail(BMC_EINVAL, "last: expected 0 or more rows, found %d", (int)span->last);
    if (!span->before != !m->target)
        return m->target ? fail(BMC_EINVAL, "this model is a draft head: "
                                            "its tokens come with the hidden states before them")
                         : fail(BMC_EINVAL, "hidden states come with tokens of a draft head only");
    if (span->sampler && sampler_check(span->sampler, m->c.vocab_size))
        return BMC_EINVAL;
    if (span->n_top < 0 || span->n_top > m->c.vocab_size
        || (span->n_top && (!span->top_ids || !span->top_logprobs)))
        return fail(BMC_EINVAL, "n_top: expected 0 to %d and room for the results, found %d",
                    (int)m->c.vocab_size, (int)span->n_top);
    if (!m->c.causal && (span->session->position || span->n_tok > m->pass_max))
        return fail(BMC_EINVAL,
                    "this model reads a text as a whole: "
                    "expected 1 to %d tokens in an empty session, found %d", m->pass_max, (int)span->n_tok);
    if (!m->c.causal && (span->sampler || span->mask || span->n_top))
        return fail(BMC_EINVAL, "this model reads a text as a whole: no tokens are chosen after it");
    if (!m->output.data && span_has_logits(span))
        return fail(BMC_EINVAL, "this model has no logits, only hidden states");
    if (span->given && !span->given_logprob)
        return fail(BMC_EINVAL, "given: the log-probabilities of these ids need room");
    const int n_wanted = span->want == BMC_WANT_ALL ? span->n_tok : span->want != BMC_WANT_NONE;
    for (int i = 0; span->given && i < n_wanted; i++)
        if (span->given[i] < 0 || span->given[i] >= m->c.vocab_size)
            return fail(BMC_EINVAL, "given: token ids are 0 to %d, found %d", (int)m->c.vocab_size - 1,
                        (int)span->given[i]);
    for (int i = 0; i < span->n_tok; i++)
        if (span->tokens[i] < 0 || span->tokens[i] >= m->c.vocab_size)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", (int)m->c.vocab_size - 1,
                        (int)span->tokens[i]);
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
        memcpy(spans[i].session->tokens + spans[i].session->position, spans[i].tokens,
               (size_t)spans[i].n_tok * sizeof(int32_t));
    for (int i = 0; status && i < claimed; i++)
        release(spans[i].session);
    return status;
}

static bool wanted(const bmc_span *span, int i) {
    return span->want == BMC_WANT_ALL || (span->want == BMC_WANT_LAST && i == span->n_tok - 1)
           || (span->want == BMC_WANT_FIRST && i == 0);
}

/* What the choice among logits needs beyond the best of them. */
static bool needs_all(const bmc_span *span, const uint32_t *mask) {
    return span->sampler || mask || span->n_top;
}

static void push_wanted(struct pass *p, const bmc_span *span, int i, struct wanted *out) {
    const size_t row = span->want == BMC_WANT_ALL ? (size_t)i : 0, n = (size_t)p->model->c.vocab_size;
    out->row = (int)row;
    out->hidden = span->hidden ? span->hidden + row * (size_t)p->model->c.dim : NULL;
    out->chooses = span_has_logits(span);
    p->n_choosing += out->chooses;
    out->mask = span->mask ? span->mask + row * ((n + 31) / 32) : NULL;
    if (span->logits)
        out->logits = span->logits + row * n;
    else if (out->chooses && needs_all(span, out->mask))
        out->logits = p->model->buffers->rows + (size_t)p->n_sampled++ * n;
}

static void push(struct pass *p, const bmc_span *span, int i) {
    const int pos = span->session->position + i;
    p->at[p->n_tok] = (struct place){
        .session = span->session, .token = span->tokens[i], .pos = pos, .last = span->last,
        .end = p->model->c.causal ? pos + 1 : span->n_tok, .before = span->before ? span->before[i] : NULL,
    };
    const bool kept = span->session->hidden.rows && i >= span->n_tok - HIDDEN_KEPT;
    if (kept || wanted(span, i)) {
        struct wanted *out = &p->out[p->n_out++];
        *out = (struct wanted){
            .span = span, .tok = p->n_tok, .kept = kept ? hidden_row(span->session, pos) : NULL,
        };
        if (wanted(span, i))
            push_wanted(p, span, i, out);
    }
    p->n_tok++;
}

/* Sequences of a pass whose blocks keep states: neighbours of the same session. */
static void plan_runs(struct pass *p) {
    p->n_runs = 0;
    for (int t = 0, n; p->model->n_states[HERE] + p->model->n_states[ON_GPU] && t < p->n_tok; t += n) {
        const struct place *at = &p->at[t];
        for (n = 1; t + n < p->n_tok && at[n].session == at->session; n++)
            ;
        struct run *run = &p->runs[p->n_runs++];
        *run = (struct run){ .session = at->session, .first = t };
        for (int i = 0; i < PLACES; i++)
            run->states[i] = states_plan(&at->session->states[i], at->pos, n);
    }
}

static int run_pass(struct pass *p) {
    plan_runs(p);
    const int status = forward(p);
    for (int i = 0; i < p->n_runs; i++)
        for (int j = 0; j < PLACES; j++)
            states_done(&p->runs[i].session->states[j], &p->runs[i].states[j]);
    p->n_tok = p->n_out = p->n_choosing = p->n_sampled = 0;
    p->chunk = false;
    return status;
}

/* Whether each token's logits are sampled from and have no other place to go. */
static bool takes_rows(const bmc_span *span) { return !span->logits && needs_all(span, span->mask); }

/* Whether a whole chunk for cuBLAS begins with token i of a span. Guesses are in none: they never come
 * with that many tokens. */
static bool chunk_begins(const bmc_model *m, const bmc_span *span, int i) {
    return m->cublas && m->cuda && (span->session->position + i) % BMC_PROMPT_CHUNK == 0
        && span->n_tok - i >= BMC_PROMPT_CHUNK && !(span->want == BMC_WANT_ALL && takes_rows(span));
}

/* Whether a span that has to stay whole would be cut by the end of a pass. The text of a model
 * that is not causal is read at once, and guesses are in one pass since states can be taken back to
 * where the last pass began. */
static bool would_split(const struct pass *p, const bmc_span *span) {
    const bool whole = !p->model->c.causal || (span->want == BMC_WANT_ALL && span->n_tok <= LOG_MAX);
    const int sampled = takes_rows(span) ? span->n_tok : 0;
    return whole && (p->n_tok + span->n_tok > p->model->pass_max || p->n_sampled + sampled > SAMPLED_MAX);
}

/* Whether no token more goes into the pass. */
static bool is_full(const struct pass *p) {
    return p->n_tok == (p->chunk ? BMC_PROMPT_CHUNK : p->model->pass_max) || p->n_sampled == SAMPLED_MAX;
}

/* Passes of up to pass_max tokens, SAMPLED_MAX of them with a sampler, over all spans, one after the other. A
 * chunk for cuBLAS is a pass of its own. */
static int run_passes(struct pass *p, const bmc_span *spans, int n) {
    int status = 0;
    for (int s = 0; s < n && !status; s++) {
        if (p->n_tok && would_split(p, &spans[s]))
            status = run_pass(p);
        for (int i = 0; i < spans[s].n_tok && !status; i++) {
            if (!p->chunk && chunk_begins(p->model, &spans[s], i)) {
                status = p->n_tok ? run_pass(p) : 0;
                p->chunk = true;
            }
            if (status)
                break;
            push(p, &spans[s], i);
            if (is_full(p) || (s == n - 1 && i == spans[s].n_tok - 1))
                status = run_pass(p);
        }
    }
    return status;
}

/* The sessions after their tokens. */
static void advance(const bmc_model *m, const bmc_span *spans, int n) {
    for (int s = 0; s < n; s++) {
        bmc_session *session = spans[s].session;
        note_hidden(session, spans[s].n_tok);
        session->position += spans[s].n_tok;
        for (int i = WINDOWS; m->window && i < ARENAS; i += GPU_WINDOWS - WINDOWS)
            arena_drop(&session->arenas[i], session->position - m->window - WINDOW_SPARE);
    }
}

/* The sessions as they were, after a pass that failed: states that it changed go back, and hidden states
 * that it overwrote are gone. How far states on a GPU got is not known: they go back to a snapshot, and
 * the session with them. */
static void undo(const bmc_span *spans, int n) {
    for (int s = 0; s < n; s++) {
        bmc_session *session = spans[s].session;
        session->hidden.from = session->position;
        states_doubt(&session->states[ON_GPU]);
        reach(session, session->position);
    }
}

/* What a pass notes down, made for one call. */
static struct pass *make_pass(bmc_model *m, int n_tok) {
    const size_t n = (size_t)smaller(n_tok, m->pass_max), parts = m->output.data ? (size_t)head_parts(m) : 0;
    const size_t each = sizeof(struct place) + sizeof(struct wanted) + sizeof(struct run)
                      + parts * sizeof(struct best) + sizeof(float);
    struct pass *p = malloc(sizeof *p + n * each + 64);
    if (!p) {
        fail(BMC_ENOMEM, "no memory for a pass over %d tokens", n_tok);
        return NULL;
    }
    *p = (struct pass){ .model = m };
    p->at = (struct place *)(void *)(p + 1);
    p->out = (struct wanted *)(void *)(p->at + n);
    p->runs = (struct run *)(void *)(p->out + n);
    p->best = (struct best *)(void *)(p->runs + n);
    p->given = (float *)(void *)(p->best + n * parts);
    return p;
}

/* Spans whose sessions are claimed and have room. */
static int evaluate_claimed(const bmc_span *spans, int n_spans, bool coarse) {
    bmc_model *m = spans[0].session->model;
    int64_t start = nanoseconds();
    int n_tok = 0;
    for (int i = 0; i < n_spans && n_tok < m->pass_max; i++)
        n_tok += smaller(spans[i].n_tok, m->pass_max);
    struct pass *p = make_pass(m, n_tok);
    if (!p)
        return BMC_ENOMEM;
    pthread_mutex_lock(&m->lock);
    p->coarse = coarse && m->coarse.codes;
    const int status = run_passes(p, spans, n_spans);
    if (status)
        undo(spans, n_spans);
    else
        advance(m, spans, n_spans);
    m->profile.calls += m->profile.laps ? nanoseconds() - start : 0;
    pthread_mutex_unlock(&m->lock);
    free(p);
    return status;
}

int evaluate(const bmc_span *spans, int n_spans, bool coarse) {
    if (!spans || n_spans < 1)
        return fail(BMC_EINVAL, "bmc_eval: needs at least one span");
    int status = claim_all(spans, n_spans);
    if (status)
        return status;
    status = evaluate_claimed(spans, n_spans, coarse);
    for (int i = 0; i < n_spans; i++)
        release(spans[i].session);
    return status;
}

int bmc_eval(const bmc_span *spans, int n_spans) { return evaluate(spans, n_spans, false); }
