/* Rounds of decoding, for one sequence or many: the only place where tokens are guessed, verified, chosen, accepted and
 * taken back.
 *
 * A pass of the target over a text's last token and k guesses gives, row by row, what it chooses after each of them. As
 * long as a guess is that very token, the next row counts too. So the text is that of plain decoding, right or wrong as the guesses are. */
#include "round.h"

#include "clock.h"
#include "error.h"
#include "model.h"
#include "ngram.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAG = 16,                       /* tokens that a draft model may lack before it guesses: they share its first pass */
    WIDER = 4,                      /* how many times more of the text it reads, once guessing has earned that */
};
_Static_assert((int)GUESSES < (int)LOG_MAX && (int)GUESSES <= (int)LOG_KEPT, "guesses are taken back without evaluating tokens again");
_Static_assert((int)LAG + (int)GUESSES <= (int)LOG_MAX, "those of a draft model too");
static const double LATENCY = 3;                /* passes without guesses that a round may take: tokens come evenly */
static const double STRETCH_WEIGHT = 0.2;       /* of the last stretch in bmc_drafter.stretch */
static const double HICCUP = 3;                 /* a draft is charged at most this many times its expected time */

static double seconds_since(int64_t start) { return 1e-9 * (double)(nanoseconds() - start); }

/* ---- a turn: one item in one round */

struct turn {
    bmc_item *item;
    bmc_drafter *drafter;           /* NULL: plain decoding */
    int32_t pass[GUESSES + 1];      /* the text's last token, then the guesses */
    const int32_t *tokens;          /* what the pass evaluates: pass, or a piece of a prompt .. */
    int n_pending;                  /* .. tokens of it before the guesses */
    int length;                     /* tokens of the text, those included */
    int lacked;                     /* of them, those that the draft model had not read */
    bmc_sampler sampler;            /* the item's, as the draft model can use it */
    enum source source;
    double right[GUESSES];          /* chance that this guess and all before it come true */
    float confidence[GUESSES];
    int n;                          /* guesses */
    int looked_at, checked;         /* of them, those that a cut has looked at, and those in the pass */
    int planned;                    /* guesses to ask the draft model for */
    bool drafting;                  /* it is still guessing */
    bool probe;                     /* the draft model is asked although it is not expected to pay */
    int32_t shadow[GUESSES];        /* what repetitions said where the draft model was asked */
    float shadow_confidence[GUESSES];
    int n_shadow;
    double spent;                   /* seconds of the draft model, for this item */
};

static int32_t *guesses_of(struct turn *t) { return t->pass + 1; }

static bool drafted(const struct turn *t) { return t->source == MODEL || t->source == SELF; }

/* Token i of the text: what the session holds, then what is pending. */
static int32_t text_token(const struct turn *t, int i) {
    const bmc_session *s = t->item->session;
    return i < s->position ? s->tokens[i] : t->tokens[i - s->position];
}

/* How many guesses its settings, its length and its context leave room for. */
static int room(const struct turn *t) {
    const bmc_item *item = t->item;
    int left = smaller(item->max_tokens - item->n, (int)item->session->cap - item->session->position) - 1;
    int most = smaller(left, t->drafter ? smaller(t->drafter->o.most, GUESSES) : GUESSES);
    bool few = most < 0 || (t->drafter && most < t->drafter->o.least);
    return few || !item->choose || t->n_pending > 1 ? 0 : most;
}

/* ---- what a round gives by its guesses */

/* A round without guesses: tokens that it gives, and the width and seconds of its pass. */
struct base { double tokens, width, seconds; };

struct group {
    struct turn *turns;
    int n;
    bmc_policy *policy;             /* NULL: only guesses of the caller are taken, and all of them checked */
    struct base base;
    int drafters;                   /* turns that a draft model may guess for: a pass of it serves them all */
    double drafting;                /* seconds spent on guesses in this round */
};

static double rate_of(const struct group *g, double more_tokens, double more_width, double drafting) {
    return (g->base.tokens + more_tokens) / (cost_at(&g->policy->target, g->base.width + more_width) + drafting);
}

static double pass_seconds(const struct group *g, int guesses) { return cost_at(&g->policy->target, g->base.width + guesses); }

/* Seconds of a draft model's pass for one of the turns that share it. */
static double draft_seconds(const struct group *g) {
    double n = larger(g->drafters, 1);
    return cost_at(&g->policy->draft, n) / n;
}

/* The chance that a guess of a source comes true in a turn's text; confidence < 0: any guess, before it is made. */
static double chance_of(const struct group *g, const struct turn *t, enum source source, float confidence) {
    const struct acceptance *a = &g->policy->of[source];
    const struct recent none = { 0 }, *recent = t->drafter ? &t->drafter->recent[source] : &none;
    return confidence < 0 ? recent_mean(recent, acceptance_mean(a)) : recent_adjust(recent, acceptance_at(a, confidence));
}

static void chances(const struct group *g, struct turn *t, enum source source) {
    double right = 1;
    for (int i = 0; i < t->n; i++)
        t->right[i] = right *= chance_of(g, t, source, t->confidence[i]);
    t->source = source;
}

/* The best rate that the first of a turn's guesses give, the other turns having none. */
static double rate_alone(const struct group *g, const struct turn *t) {
    double tokens = 0, best = 0;
    for (int i = 0; i < t->n; i++) {
        tokens += t->right[i];
        best = fmax(best, rate_of(g, tokens, i + 1, 0));
    }
    return best;
}

/* ---- repetitions in the text */

static void ask_ngrams(const struct group *g, struct turn *t) {
    double lengths[GUESSES];
    t->n = ngrams_propose(t->drafter->ngrams, room(t), guesses_of(t), lengths);
    for (int i = 0; i < t->n; i++)
        t->confidence[i] = (float)lengths[i];
    chances(g, t, NGRAMS);
}

/* ---- a draft model */

static int32_t in_draft(const bmc_drafter *d, int32_t token) {
    if (d->o.to_draft)
        return d->o.to_draft[token];
    return token < d->o.draft->model->c.vocab_size ? token : 0;
}

/* Tokens of the text that the draft model has not read. Its rows are the text's from `offset` on. */
static int lag(const struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft;
    return draft ? t->length - draft->offset - draft->position : t->n_pending;
}

/* Let the draft model begin anew with the last tokens of the text, `window` at most. */
static void restart(struct turn *t) {
    bmc_session *draft = t->drafter->o.draft;
    int most = smaller(t->drafter->window, (int)draft->cap / 2);
    bmc_session_rewind(draft, 0);
    draft->offset = larger(0, t->length - most);
}

/* Drop the rows that are not the text's any more. */
static void follow_text(struct turn *t) {
    const bmc_drafter *d = t->drafter;
    bmc_session *draft = d->o.draft;
    int kept = 0, n = t->length - 1 - draft->offset;
    while (kept < n && kept < draft->position && draft->tokens[kept] == in_draft(d, text_token(t, draft->offset + kept)))
        kept++;
    if (bmc_session_sync(draft, draft->tokens, kept) < 1)       /* what states cannot be taken back to is read again, as other text is */
        draft->offset = 0;
}

/* The draft model evaluates the next n tokens that it lacks of the text. */
static int read_text(struct turn *t, int n) {
    bmc_session *draft = t->drafter->o.draft;
    int32_t *tokens = malloc((size_t)n * sizeof *tokens);
    if (!tokens)
        return fail(BMC_ENOMEM, "no memory for %d tokens", n);
    for (int i = 0; i < n; i++)
        tokens[i] = in_draft(t->drafter, text_token(t, draft->offset + draft->position + i));
    bmc_span span = { .session = draft, .tokens = tokens, .n_tok = n, .want = BMC_WANT_NONE };
    int status = bmc_eval(&span, 1);
    free(tokens);
    return status;
}

/* Seconds that k guesses cost if none comes true. */
static double loss_of(const struct group *g, int k) {
    return pass_seconds(g, k) - g->base.seconds + k * draft_seconds(g);
}

/* How many guesses to ask the draft model for: those with the best rate, as far as the budget goes. catch_up: seconds that it
 * reads before, shared by the tokens of a usual stretch. The rate is 0 where it is not worth asking. */
static double plan_draft(const struct group *g, struct turn *t, double catch_up) {
    bmc_drafter *d = t->drafter;
    double chance = chance_of(g, t, d->o.self_window ? SELF : MODEL, -1), right = 1, tokens = 0, best = 0;
    int most = room(t), k = 0;
    for (int i = 1; i <= most; i++) {
        tokens += right *= chance;
        double share = (1 + tokens) / fmax(d->stretch, 1 + tokens), drafting = i * draft_seconds(g) + catch_up * share;
        if (i > 1 && pass_seconds(g, i) + i * draft_seconds(g) > LATENCY * g->base.seconds)
            break;
        double rate = rate_of(g, tokens, i, drafting);
        if (rate > best) {
            best = rate;
            k = i;
        }
    }
    t->probe = best <= g->base.tokens / g->base.seconds;
    if (t->probe)
        k = smaller(k, larger(1, d->o.least));
    while (k > 0 && !budget_allows(&d->budget, catch_up + loss_of(g, k), t->probe))
        k = k > d->o.least ? k - 1 : 0;
    t->planned = k;
    return k && !t->probe ? best : 0;
}

/* Plans guesses of a draft model for a turn whose repetitions are known. They have to promise a better rate than those and than plain
 * decoding; a probe is made only where nothing is repeated. Returns how many; 0: none. */
static int choose_draft(const struct group *g, struct turn *t, double catch_up) {
    double rate = plan_draft(g, t, catch_up), others = fmax(rate_alone(g, t), g->base.tokens / g->base.seconds);
    if (t->probe ? t->n > 0 : rate <= others)
        t->planned = 0;
    return t->planned;
}

/* The draft model reads what it lacks, as much at a time as one pass of the target takes or a little more. */
static int read_piece(struct group *g, struct turn *t) {
    int n = lag(t) - 1, piece = smaller(n, PASS_MAX);
    while (piece > 8 && cost_at(&g->policy->draft, piece) > (LATENCY - 1) * g->base.seconds)
        piece -= piece / 4;
    int64_t start = nanoseconds();
    int status = read_text(t, piece);
    double seconds = seconds_since(start);
    if (!status)
        cost_observe(&g->policy->draft, piece, seconds);
    g->drafting += seconds;
    t->spent += seconds;
    t->lacked = piece;
    return status;
}

/* A wider window, once what guessing has gained pays for reading it. */
static void widen_window(const struct group *g, struct turn *t) {
    bmc_drafter *d = t->drafter;
    const bmc_session *draft = d->o.draft;
    int wanted = smaller(d->window * WIDER, t->length);
    if (draft->offset == 0 || wanted > (int)draft->cap / 2)
        return;
    if (!budget_allows(&d->budget, 2 * cost_at(&g->policy->draft, wanted), false))
        return;
    d->window *= WIDER;
    d->reading = true;
    restart(t);
}

/* Whether the draft model's session has to begin anew: it would read more than its window, or is full. */
static bool out_of_reach(const struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft;
    return lag(t) > larger(t->drafter->window, LAG) || t->length - draft->offset + GUESSES > draft->cap;
}

/* Whether and how the draft model takes part in a turn, whose repetitions are known: it guesses, or it reads a piece of what it
 * lacks of the text. Once that has begun it goes on until it knows the text. */
static int prepare_draft(struct group *g, struct turn *t) {
    bmc_drafter *d = t->drafter;
    if (!room(t) || d->failed)
        return 0;
    if (d->o.draft && !d->reading)
        widen_window(g, t);
    if (d->reading && lag(t) > LAG && !out_of_reach(t))
        return read_piece(g, t);
    d->reading = false;
    bool restarts = d->o.draft && out_of_reach(t), behind = restarts || lag(t) > LAG;
    double catch_up = behind ? cost_at(&g->policy->draft, smaller(restarts ? d->window : lag(t), t->length)) : 0;
    if (!choose_draft(g, t, catch_up))
        return 0;
    if (restarts)
        restart(t);
    if (behind) {
        d->reading = true;
        t->planned = 0;
        return read_piece(g, t);
    }
    memcpy(t->shadow, guesses_of(t), (size_t)t->n * sizeof *t->shadow);
    memcpy(t->shadow_confidence, t->confidence, (size_t)t->n * sizeof *t->confidence);
    t->n_shadow = t->n;
    t->n = 0;
    t->drafting = true;
    t->source = d->o.self_window ? SELF : MODEL;
    return 0;
}

/* Whether one more guess for a turn is expected to raise the round's rate. */
static bool goes_on(const struct group *g, const struct turn *t, double tokens, int guesses) {
    if (t->n >= t->planned)
        return false;
    if (t->probe || t->n < t->drafter->o.least)
        return true;
    double right = t->right[t->n - 1] * chance_of(g, t, t->source, -1), more = draft_seconds(g);
    return rate_of(g, tokens + right, guesses + 1, g->drafting + more) > rate_of(g, tokens, guesses, g->drafting);
}

/* A bias names ids of the target's vocabulary: a draft model with others does without it. */
static const bmc_sampler *draft_sampler(struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft;
    const bmc_session *s = t->item->session;
    bool mapped = t->drafter->o.to_draft;
    if (!t->item->sampler || !draft || (!mapped && draft->model->c.vocab_size == s->model->c.vocab_size))
        return t->item->sampler;
    t->sampler = *t->item->sampler;
    t->sampler.n_bias = 0;
    return &t->sampler;
}

/* One pass of the draft model for all turns that still guess. */
static int draft_pass(struct group *g, bmc_span *spans, int32_t (*lacking)[LAG + 1], int32_t *ids, float *logprobs, float *leads) {
    int n_spans = 0, width = 0;
    bool sampled = false;
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        if (!t->drafting)
            continue;
        bmc_drafter *d = t->drafter;
        bmc_session *s = d->o.self_window ? t->item->session : d->o.draft;
        int n = t->n ? 1 : lag(t), first = t->length - n;
        t->lacked = t->n ? t->lacked : n;
        for (int j = 0; j < n; j++)
            lacking[n_spans][j] = t->n ? guesses_of(t)[t->n - 1] : text_token(t, first + j);
        for (int j = 0; j < n && d->o.draft; j++)
            lacking[n_spans][j] = in_draft(d, lacking[n_spans][j]);
        spans[n_spans] = (bmc_span){
            .session = s, .tokens = lacking[n_spans], .n_tok = n, .want = BMC_WANT_LAST, .last = d->o.self_window,
            .sampler = draft_sampler(t), .names = d->o.to_target, .next = &ids[i], .logprob = &logprobs[i], .lead = &leads[i],
        };
        leads[i] = INFINITY;
        sampled = sampled || t->item->sampler;
        width += n;
        n_spans++;
    }
    int64_t start = nanoseconds();
    int status = n_spans ? evaluate(spans, n_spans, !sampled) : 0;
    double seconds = seconds_since(start);
    if (status || !n_spans)
        return status;
    cost_observe(&g->policy->draft, width, seconds);
    for (int i = 0; i < g->n; i++)
        g->turns[i].spent += g->turns[i].drafting ? seconds / n_spans : 0;
    g->drafting += seconds;
    return 0;
}

/* How sure a guess is, from 0 to 1: its probability, or with a sampler 1 - e^-lead, where lead is how far its score is ahead. */
static float confidence_of(const bmc_item *item, float logprob, float lead) {
    float sure = item->sampler && item->sampler->temperature > 0 ? -expm1f(-lead) : expf(logprob);
    return sure >= 0 ? sure : 0;
}

/* A guess in the target's vocabulary; -1: it does not know it. */
static int32_t in_target(const struct turn *t, int32_t id) {
    const bmc_drafter *d = t->drafter;
    if (id >= 0 && d->o.to_target)
        id = d->o.to_target[id];
    return id < t->item->session->model->c.vocab_size ? id : -1;
}

static int run_draft(struct group *g) {
    int active = 0, status = 0, guesses = 0;
    double tokens = 0;
    for (int i = 0; i < g->n; i++)
        active += g->turns[i].drafting;
    if (!active)
        return 0;
    bmc_span *spans = malloc((size_t)active * sizeof *spans);
    int32_t (*lacking)[LAG + 1] = malloc((size_t)active * sizeof *lacking), *ids = malloc((size_t)g->n * sizeof *ids);
    float *logs = malloc(2 * (size_t)g->n * sizeof *logs);
    if (!spans || !lacking || !ids || !logs)
        status = fail(BMC_ENOMEM, "no memory for a draft of %d sequences", active);
    while (active && !status) {
        status = draft_pass(g, spans, lacking, ids, logs, logs + g->n);
        active = 0;
        for (int i = 0; i < g->n && !status; i++) {
            struct turn *t = &g->turns[i];
            int32_t id = t->drafting ? in_target(t, ids[i]) : -1;
            t->drafting = t->drafting && id >= 0;
            if (!t->drafting)
                continue;
            guesses_of(t)[t->n] = id;
            t->confidence[t->n] = confidence_of(t->item, logs[i], logs[g->n + i]);
            double chance = chance_of(g, t, t->source, t->confidence[t->n]);
            t->right[t->n] = t->n ? t->right[t->n - 1] * chance : chance;
            tokens += t->right[t->n++];
            guesses++;
            t->drafting = goes_on(g, t, tokens, guesses);
            active += t->drafting;
        }
    }
    free(spans);
    free(lacking);
    free(ids);
    free(logs);
    return status;
}

/* The target's own drafts, also those that failed, stand in rows that its pass writes anew. */
static void take_back_self(struct group *g, const int *positions) {
    for (int i = 0; i < g->n; i++)
        if (g->turns[i].item->session->position > positions[i])
            bmc_session_rewind(g->turns[i].item->session, positions[i]);
}

/* ---- how many guesses to check */

/* The next guess goes to the turn whose next guess is likeliest to come true; as many as give the best rate are checked. */
static void cut(struct group *g) {
    double tokens = 0, best = rate_of(g, 0, 0, g->drafting);
    for (int n = 1;; n++) {
        struct turn *next = NULL;
        for (int i = 0; i < g->n; i++) {
            struct turn *t = &g->turns[i];
            if (t->looked_at < t->n && (!next || t->right[t->looked_at] > next->right[next->looked_at]))
                next = t;
        }
        if (!next || (n > 1 && pass_seconds(g, n) + g->drafting > LATENCY * g->base.seconds))
            break;
        tokens += next->right[next->looked_at++];
        double rate = rate_of(g, tokens, n, g->drafting);
        if (rate <= best && !(next->probe && drafted(next)))
            continue;
        best = fmax(rate, best);
        for (int i = 0; i < g->n; i++)
            g->turns[i].checked = g->turns[i].looked_at;
    }
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        if (t->source != GIVEN && t->checked && t->checked < t->drafter->o.least)
            t->checked = t->n < t->drafter->o.least ? 0 : t->drafter->o.least;
    }
}

/* ---- the target's pass */

static bool stops(const bmc_item *item, int32_t id) {
    for (int i = 0; i < item->n_stops; i++)
        if (item->stops[i] == id)
            return true;
    return false;
}

static void learn(const struct group *g, struct turn *t, enum source source, const int32_t *guesses, const float *confidence,
                  int n, const int32_t *ids, int given) {
    for (int i = 0; i < n && i < given; i++) {
        bool came_true = guesses[i] == ids[i];
        recent_learn(&t->drafter->recent[source], acceptance_at(&g->policy->of[source], confidence[i]), came_true);
        acceptance_learn(&g->policy->of[source], confidence[i], came_true);
        if (!came_true)
            break;
    }
}

/* What the round cost a turn, and gave it, against plain decoding. Passes count as what they usually take: how long this very
 * one took says more about the machine's other work. */
static void account(const struct group *g, struct turn *t, int given, int all_checked) {
    bmc_drafter *d = t->drafter;
    double plain = g->base.seconds / fmax(g->base.tokens, 1), share = all_checked ? (double)t->checked / all_checked : 0;
    double marginal = share * (pass_seconds(g, all_checked) - g->base.seconds);
    double expected = HICCUP * ((drafted(t) ? t->n : 0) * draft_seconds(g) + cost_at(&g->policy->draft, larger(t->lacked, 1)));
    budget_pass_time(&d->budget, plain, plain);
    if (drafted(t))
        budget_enter(&d->budget, (given - 1) * plain - marginal - fmin(t->spent, expected), plain, t->probe);
    else if (t->spent > 0)
        budget_enter(&d->budget, -fmin(t->spent, expected), plain, t->probe);
    bool repeated = t->source == NGRAMS && given > 1;
    if (repeated)
        d->stretch += STRETCH_WEIGHT * (d->run - d->stretch);
    d->run = repeated ? 0 : d->run + given;
}

/* Accept what came true, take back the rest, learn. */
static void settle(const struct group *g, struct turn *t, int all_checked, double seconds) {
    bmc_item *item = t->item;
    bmc_session *s = item->session;
    int32_t *ids = item->ids + item->n;
    int accepted = 0;
    while (accepted < t->checked && guesses_of(t)[accepted] == ids[accepted] && !stops(item, ids[accepted]))
        accepted++;
    int given = accepted + 1;
    bmc_session_rewind(s, s->position - (t->checked - accepted));
    if (t->source == MODEL && t->drafter->o.draft) {
        bmc_session *draft = t->drafter->o.draft;
        int known = t->length - draft->offset;                      /* rows of the text before the guesses */
        bmc_session_rewind(draft, known + smaller(accepted, draft->position - known));
    }
    for (int i = 0; i < given; i++)
        item->drafted[item->n + i] = i < accepted;
    item->stats.rounds++;
    item->stats.checked += t->checked;
    item->stats.accepted += accepted;
    item->stats.lengths[t->checked]++;
    item->stats.draft_s += t->spent;
    item->stats.verify_s += seconds;
    item->n += given;
    item->ended = item->n >= item->max_tokens || stops(item, ids[accepted]) || !isfinite(item->logprobs[item->n - 1]);
    if (!t->drafter)
        return;
    if (t->drafter->ngrams && t->n_pending == 1)            /* else it does not know the prompt yet */
        ngrams_add(t->drafter->ngrams, ids, given);
    if (t->source)
        learn(g, t, t->source, guesses_of(t), t->confidence, t->n, ids, given);
    learn(g, t, NGRAMS, t->shadow, t->shadow_confidence, t->n_shadow, ids, given);
    item->stats.plain_s += given * g->base.seconds / fmax(g->base.tokens, 1);
    account(g, t, given, all_checked);
}

static int verify(struct group *g, bmc_span *spans) {
    int all_checked = 0, width = 0, reading = 0;
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        bmc_item *item = t->item;
        size_t n = (size_t)item->n, top = (size_t)item->n_top;
        spans[i] = (bmc_span){
            .session = item->session, .tokens = t->tokens, .n_tok = t->n_pending + t->checked, .sampler = item->sampler,
            .want = !item->choose ? BMC_WANT_NONE : t->n_pending > 1 ? BMC_WANT_LAST : BMC_WANT_ALL, .mask = item->masks,
        };
        if (item->choose) {
            spans[i].next = item->ids + n;
            spans[i].logprob = item->logprobs + n;
            spans[i].n_top = item->n_top;
            spans[i].top_ids = top ? item->top_ids + n * top : NULL;
            spans[i].top_logprobs = top ? item->top_logprobs + n * top : NULL;
        }
        all_checked += t->checked;
        reading += t->n_pending > 1;
        width += spans[i].n_tok;
    }
    int64_t start = nanoseconds();
    int status = bmc_eval(spans, g->n);
    double seconds = seconds_since(start);
    if (status)
        return status;
    if (g->policy && (!reading || g->base.tokens == 0 || width > PASS_MAX / 2))
        cost_observe(&g->policy->target, width, seconds);
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        if (t->item->choose)
            settle(g, t, all_checked, seconds);
        else if (t->drafter)
            budget_pass_time(&t->drafter->budget, seconds / g->n, cost_at(&g->policy->target, 1));
    }
    return 0;
}

/* ---- rounds */

/* Before the first round: drafters follow what happened to the text since the last one. */
static void follow(struct turn *t) {
    const bmc_session *s = t->item->session;
    bmc_drafter *d = t->drafter;
    if (!d || !t->item->choose || t->n_pending > 1)
        return;
    if (d->ngrams && ngrams_follow(d->ngrams, s->tokens, s->position, t->tokens[0])) {
        ngrams_free(d->ngrams);                     /* no memory for them: the text goes on without */
        d->ngrams = NULL;
    }
    if (d->o.draft && !d->failed)
        follow_text(t);
}

static void take_given(const struct group *g, struct turn *t) {
    const bmc_item *item = t->item;
    t->n = smaller(item->n_guesses, room(t));
    memcpy(guesses_of(t), item->guesses, (size_t)t->n * sizeof *item->guesses);
    for (int i = 0; i < t->n; i++)
        t->confidence[i] = item->confidence ? item->confidence[i] : 1;
    t->source = t->drafter && t->drafter->o.external ? MODEL : GIVEN;
    t->spent = item->guess_s;
    if (g->policy && t->n && item->guess_s > 0)
        cost_observe(&g->policy->draft, 1, item->guess_s / t->n);
    if (g->policy && t->source == MODEL && !t->drafter->o.fixed) {
        plan_draft(g, t, 0);                        /* whether they are a probe */
        t->planned = 0;
    }
    if (g->policy)
        chances(g, t, t->source);
    else
        for (int i = 0; i < t->n; i++)
            t->right[i] = 1;
}

static void begin(struct turn *t, bmc_item *item, bool first) {
    int32_t last = item->n ? item->ids[item->n - 1] : 0;
    *t = (struct turn){ .item = item, .drafter = item->drafter, .n_pending = 1 };
    t->tokens = t->pass;
    t->pass[0] = last;
    if (first) {
        t->n_pending = item->n_pending;
        t->pass[0] = item->pending[0];
        if (item->n_pending > 1)
            t->tokens = item->pending;
    }
    t->length = item->session->position + t->n_pending;
}

static void measure_base(struct group *g) {
    g->base = (struct base){ 0 };
    g->drafters = 0;
    for (int i = 0; i < g->n; i++) {
        const struct turn *t = &g->turns[i];
        g->base.tokens += t->item->choose;
        g->base.width += t->n_pending;
        g->drafters += t->drafter && (t->drafter->o.draft || t->drafter->o.self_window) && room(t) > 0;
    }
    if (g->policy)
        g->base.seconds = cost_at(&g->policy->target, g->base.width);
    g->drafting = 0;
}

/* A draft model that fails is a draft model less: the text goes on without it. */
static void give_up_drafts(struct group *g) {
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        if (t->drafting || drafted(t)) {
            t->drafter->failed = true;
            t->drafting = false;
            t->n = 0;
            t->source = NOBODY;
        }
    }
}

/* Guesses of a set length, all of them checked: for proofs and comparisons. */
static bool fix(struct group *g) {
    bool fixed = false;
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        if (!t->drafter || !t->drafter->o.fixed)
            continue;
        fixed = true;
        t->planned = smaller(t->drafter->o.fixed, room(t));
        t->n = smaller(t->n, t->planned);
        const bmc_drafter_options *o = &t->drafter->o;
        bool given = t->item->n_guesses && t->item->n == 0;
        bool asks = !given && (o->draft || o->self_window) && !t->drafter->failed && t->planned;
        if (asks && t->drafter->o.draft && lag(t) > LAG && read_text(t, lag(t) - 1))
            asks = false;
        if (asks) {
            t->n = 0;
            t->drafting = t->probe = true;
            t->source = t->drafter->o.self_window ? SELF : MODEL;
        }
    }
    return fixed;
}

static void guess(struct group *g, int *positions) {
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        positions[i] = t->item->session->position;
        if (t->item->guesses && t->item->n == 0)
            take_given(g, t);
        else if (t->drafter && t->drafter->ngrams && room(t))
            ask_ngrams(g, t);
    }
    if (!g->policy) {
        for (int i = 0; i < g->n; i++)
            g->turns[i].checked = g->turns[i].n;
        return;
    }
    bool fixed = fix(g);
    for (int i = 0; i < g->n && !fixed; i++) {
        struct turn *t = &g->turns[i];
        if (t->drafter && !t->spent && (t->drafter->o.draft || t->drafter->o.self_window) && prepare_draft(g, t))
            t->drafter->failed = true;
    }
    if (run_draft(g))
        give_up_drafts(g);
    take_back_self(g, positions);
    if (fixed)
        for (int i = 0; i < g->n; i++)
            g->turns[i].checked = g->turns[i].n;
    else
        cut(g);
}

/* Whether guesses of the caller's, made with a draft model of another vocabulary, are worth asking for; how many. */
static int external_guesses(const struct group *g, struct turn *t) {
    if (!t->drafter || !t->drafter->o.external || !t->item->choose || t->drafter->failed)
        return 0;
    if (t->drafter->o.fixed)
        return smaller(t->drafter->o.fixed, room(t));
    if (t->drafter->ngrams && room(t))
        ask_ngrams(g, t);
    int k = choose_draft(g, t, 0);
    t->planned = t->n = 0;
    t->source = NOBODY;
    return k;
}

/* Before a drafter looks them up in its tables. */
static int check_ids(const int32_t *ids, int n, int n_vocab) {
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return fail(BMC_EINVAL, "token ids are 0 to %d, found %d", n_vocab - 1, (int)ids[i]);
    return 0;
}

static int check_items(bmc_item *const *items, int n, const bmc_limits *limits) {
    if (!items || n < 1 || !limits)
        return fail(BMC_EINVAL, "bmc_round: needs items and limits");
    for (int i = 0; i < n; i++) {
        const bmc_item *item = items[i];
        if (!item || !item->session || !item->pending || item->n_pending < 1)
            return fail(BMC_EINVAL, "bmc_round: item %d needs a session and at least one token", i);
        if (item->session->model != items[0]->session->model)
            return fail(BMC_EINVAL, "the sessions of one call belong to different models");
        if (item->drafter && !limits->policy)
            return fail(BMC_EINVAL, "bmc_round: item %d has a drafter, and there is no policy", i);
        if (item->choose && (item->max_tokens < 1 || !item->ids || !item->logprobs || !item->drafted))
            return fail(BMC_EINVAL, "bmc_round: item %d: expected room for 1 or more tokens, found %d", i, (int)item->max_tokens);
        if ((item->masks && item->drafter) || item->n_stops < 0 || (item->n_stops && !item->stops))
            return fail(BMC_EINVAL, "bmc_round: item %d has masks and a drafter, or stops without ids", i);
        if (item->n_guesses < 0 || item->n_guesses > GUESSES || (item->n_guesses && !item->guesses))
            return fail(BMC_EINVAL, "bmc_round: expected up to %d guesses, found %d", GUESSES, (int)item->n_guesses);
        int n_vocab = item->session->model->c.vocab_size;
        int status = check_ids(item->pending, item->n_pending, n_vocab);
        if (!status)
            status = check_ids(item->guesses, item->n_guesses, n_vocab);
        if (status)
            return status;
    }
    return 0;
}

/* One round. 1: done; 0: nothing was, since an item wants guesses of the caller; negative: a status. */
static int one_round(struct group *g, bmc_item *const *items, bool first, bmc_span *spans, int *positions) {
    for (int i = 0; i < g->n; i++) {
        begin(&g->turns[i], items[i], first);
        if (first)
            follow(&g->turns[i]);
    }
    measure_base(g);
    bool wanted = false;
    for (int i = 0; i < g->n && g->policy; i++)
        if (!items[i]->guesses || items[i]->n)
            wanted = (items[i]->wanted = external_guesses(g, &g->turns[i])) > 0 || wanted;
    if (wanted)
        return 0;
    guess(g, positions);
    int status = verify(g, spans);
    return status ? status : 1;
}

int bmc_round(bmc_item *const *items, int n, const bmc_limits *limits) {
    int status = check_items(items, n, limits), done = 0;
    if (status)
        return status;
    const int64_t start = nanoseconds();
    struct turn *turns = malloc((size_t)n * sizeof *turns);
    bmc_span *spans = malloc((size_t)n * sizeof *spans);
    int *positions = malloc((size_t)n * sizeof *positions);
    struct group g = { .turns = turns, .n = n, .policy = limits->policy };
    for (int i = 0; i < n; i++)
        items[i]->n = items[i]->ended = items[i]->wanted = 0;
    if (!turns || !spans || !positions)
        status = fail(BMC_ENOMEM, "no memory for a round of %d sequences", n);
    bool more = !status;
    while (more) {
        status = one_round(&g, items, !done, spans, positions);
        if (status != 1)
            break;
        done++;
        more = done != limits->n_rounds && seconds_since(start) < limits->seconds;
        for (int i = 0; i < n; i++)
            more = more && items[i]->choose && !items[i]->ended && !items[i]->masks && turns[i].n_pending == 1;
    }
    free(turns);
    free(spans);
    free(positions);
    return status < 0 && !done ? status : done;
}
