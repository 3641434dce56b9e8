/* Rounds without a model and without a clock: the real decisions (native/guess.c, round.c, policy.c, ngram.c)
 * on texts that are known in advance, where passes take what a curve says. tools/ablation.py compiles and
 * drives it. */
#include "bmc.h"
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { POINTS = 10 };               /* of a curve: seconds of passes of 1, 2, 4 .. 512 tokens */

struct task {
    int n_texts, parallel;          /* texts, and how many of them are written at a time */
    int prompt, n;                  /* tokens of each prompt and answer */
    const int32_t *tokens;          /* (n_texts, prompt + n) */
    const float *chance, *luck;     /* likewise: of the draft model at a token; it is right where luck is less */
    const float *sure;              /* likewise: what it says its probability is */
    double needs;                   /* tokens of context without which the draft model is worse */
    double target[POINTS], draft[POINTS];
    const double *speed;            /* (n_speed,) factors of all times, one for each 5 ms, over and over */
    int n_speed;
    int ngrams, drafts;             /* who guesses */
    int recalls;                    /* what was learned is saved and loaded between texts */
};

struct outcome {
    double seconds;                 /* for a token */
    double longest_gap;             /* between tokens, in passes without guesses */
};

enum { MOST = 8 };

struct member {
    bmc_session session, draft;
    bmc_drafter *drafter;
    bmc_item item;
    int32_t ids[64], last;
    float logprobs[64];
    uint8_t drafted[64];
    const struct task *task;
    int text, given;
};

static double now;                  /* seconds */
static struct member members[MOST];
static bmc_model target_model, draft_model;

int64_t nanoseconds(void) { return (int64_t)(now * 1e9); }

static double on_curve(const double *curve, double width) {
    double at = log2(width);
    int i = (int)at < POINTS - 1 ? (int)at : POINTS - 2;
    double share = at - i;
    return curve[i] * (1 - share) + curve[i + 1] * share;
}

static struct member *member_of(const bmc_session *s) {
    for (int i = 0; i < MOST; i++)
        if (&members[i].session == s || &members[i].draft == s)
            return &members[i];
    abort();
}

static int32_t token_at(const struct member *m, int i) {
    int length = m->task->prompt + m->task->n;
    return i < length ? m->task->tokens[m->text * length + i] : 0;
}

/* The draft model's guess after its last row, and how sure it is. */
static void guess_next(const struct member *m, const bmc_span *span) {
    const bmc_session *s = span->session;
    int at = s->offset + s->position, length = m->task->prompt + m->task->n;
    int32_t truth = token_at(m, at);
    size_t place = (size_t)(m->text * length + (at < length ? at : length - 1));
    double known = s->offset ? 1 - 0.3 * exp(-s->position / m->task->needs) : 1;
    bool follows = s->tokens[s->position - 1] == token_at(m, at - 1);
    bool right = follows && m->task->luck[place] < m->task->chance[place] * known;
    *span->next = right ? truth : (truth + 1) % target_model.c.vocab_size;
    *span->logprob = (float)log(fmax(m->task->sure[place] * known, 1e-6));
}

int evaluate(const bmc_span *spans, int n, bool coarse) {
    (void)coarse;
    int width = 0;
    const struct task *task = member_of(spans[0].session)->task;
    for (int i = 0; i < n; i++) {
        bmc_session *s = spans[i].session;
        struct member *m = member_of(s);
        if (s->position + spans[i].n_tok > s->n_tokens)
            return BMC_EFULL;
        memcpy(s->tokens + s->position, spans[i].tokens, (size_t)spans[i].n_tok * sizeof *s->tokens);
        s->position += spans[i].n_tok;
        width += spans[i].n_tok;
        if (s == &m->draft && spans[i].next)
            guess_next(m, &spans[i]);
        int rows = spans[i].want == BMC_WANT_ALL ? spans[i].n_tok : 1;
        for (int j = 0; s == &m->session && spans[i].next && j < rows; j++) {
            spans[i].next[j] = token_at(m, s->position - rows + j + 1);
            spans[i].logprob[j] = 0;
        }
    }
    const double *curve = spans[0].session->model == &target_model ? task->target : task->draft;
    for (; width > 0; width -= PASS_MAX) {
        double speed = task->speed[(int64_t)(now / 0.005) % task->n_speed];
        now += speed * on_curve(curve, width < PASS_MAX ? width : PASS_MAX);
    }
    return 0;
}

int bmc_eval(const bmc_span *spans, int n) { return evaluate(spans, n, false); }

int bmc_session_rewind(bmc_session *s, int position) {
    s->position = position;
    return 0;
}

int bmc_session_sync(bmc_session *s, const int32_t *tokens, int n) {
    (void)tokens;
    s->position = n;
    return n;
}

static void open_session(bmc_session *s, bmc_model *model, int cap) {
    *s = (bmc_session){ .model = model, .tokens = malloc((size_t)cap * sizeof(int32_t)), .n_tokens = cap };
    s->cap = cap;
}

static void open_member(struct member *m, const struct task *task, int text) {
    int cap = task->prompt + task->n + 64;
    *m = (struct member){ .task = task, .text = text };
    open_session(&m->session, &target_model, cap);
    open_session(&m->draft, &draft_model, cap);
    bmc_drafter_options options = {
        .draft = task->drafts ? &m->draft : NULL, .ngrams = task->ngrams, .most = 16,
    };
    if (task->drafts || task->ngrams)
        bmc_drafter_new(&options, target_model.c.vocab_size, &m->drafter);
    m->item = (bmc_item){
        .session = &m->session, .ids = m->ids, .logprobs = m->logprobs, .drafted = m->drafted,
    };
}

static void close_member(struct member *m) {
    bmc_drafter_free(m->drafter);
    free(m->session.tokens);
    free(m->draft.tokens);
    m->session.tokens = NULL;
}

/* The prompt but for its last token, as the engine reads it: the first token comes without guesses. */
static void read_prompt(struct member *m, bmc_limits *limits) {
    const int32_t *tokens = m->task->tokens + m->text * (m->task->prompt + m->task->n);
    bmc_item *item = &m->item;
    for (int at = 0; at < m->task->prompt - 1; at += item->n_pending) {
        item->pending = tokens + at;
        item->n_pending = m->task->prompt - 1 - at < 256 ? m->task->prompt - 1 - at : 256;
        item->drafter = m->drafter;
        if (bmc_round(&item, 1, limits) < 0)
            abort();
    }
    m->last = tokens[m->task->prompt - 1];
    item->pending = &m->last;
    item->n_pending = item->choose = 1;
}

/* One call of the library for those who write; their tokens. */
static int step(const struct task *task, bmc_limits *limits, struct outcome *out) {
    bmc_item *items[MOST];
    int tokens = 0;
    for (int i = 0; i < task->parallel; i++) {
        items[i] = &members[i].item;
        items[i]->max_tokens = task->n - members[i].given < 64 ? task->n - members[i].given : 64;
    }
    double before = now;
    if (bmc_round(items, task->parallel, limits) < 0)
        abort();
    out->longest_gap = fmax(out->longest_gap, (now - before) / on_curve(task->target, task->parallel));
    for (int i = 0; i < task->parallel; i++) {
        struct member *m = &members[i];
        m->given += m->item.n;
        tokens += m->item.n;
        m->last = m->ids[m->item.n - 1];
    }
    out->seconds += now - before;
    return tokens;
}

static bmc_policy *recalled(bmc_policy *policy, const struct task *task) {
    double record[1024];
    int n = bmc_policy_save(policy, record, 1024);
    bmc_policy_free(policy);
    bmc_policy_new(task->target[0], task->draft[0], &policy);
    bmc_policy_load(policy, record, n);
    return policy;
}

__attribute__((visibility("default"))) struct outcome simulate(const struct task *task) {
    struct outcome out = { 0 };
    bmc_limits limits = { .n_rounds = 1 };
    target_model.c.vocab_size = draft_model.c.vocab_size = 1 << 16;
    target_model.c.causal = draft_model.c.causal = 1;
    now = 0;
    bmc_policy_new(task->target[0] * 0.7, task->draft[0], &limits.policy);
    int begun = 0, tokens = 0;
    for (bool all = true; all;) {
        for (int i = 0; i < task->parallel && all; i++) {
            struct member *m = &members[i];
            if (m->session.tokens && m->given < task->n)
                continue;
            if (m->session.tokens)
                close_member(m);
            all = begun < task->n_texts;
            if (task->recalls && begun)
                limits.policy = recalled(limits.policy, task);
            if (all) {
                open_member(m, task, begun++);
                read_prompt(m, &limits);
            }
        }
        if (all)
            tokens += step(task, &limits, &out);
    }
    for (int i = 0; i < task->parallel; i++)
        if (members[i].session.tokens)
            close_member(&members[i]);
    out.seconds /= tokens;
    bmc_policy_free(limits.policy);
    return out;
}
