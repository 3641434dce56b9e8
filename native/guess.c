/* Each text's source of guesses is chosen by the rate of tokens that it promises. Draft models guess
 * for all their texts in common passes. Then the likeliest guesses of all texts are taken, as many
 * as give the best rate. */
#include "guess.h"

#include "error.h"
#include "model.h"
#include "ngram.h"

#include <math.h>

static const int WIDER = 4;         /* times more text that a draft model reads once guessing earned it */
static const double LATENCY = 3;    /* passes without guesses that a round may take: tokens come evenly */

/* How many guesses its settings, its length and its context leave room for. */
static int room(const struct turn *t) {
    const bmc_item *item = t->item;
    int left = smaller(item->max_tokens - item->n, (int)item->session->cap - item->session->position) - 1;
    int most = smaller(left, t->drafter ? smaller(t->drafter->o.most, GUESSES) : GUESSES);
    bool few = most < 0 || (t->drafter && most < t->drafter->o.least);
    return few || !item->choose || t->n_pending > 1 ? 0 : most;
}

/* The first token of the text that the draft model could read: a draft head needs the hidden state before. */
static int earliest(const struct turn *t) {
    return t->drafter->hidden ? t->item->session->hidden.from + 1 : 0;
}

/* Whether a draft model, or the target with less attention, can be asked. */
static bool has_draft(const struct turn *t) {
    const bmc_drafter *d = t->drafter;
    if (!d || d->failed || room(t) < 1)
        return false;
    if (d->hidden && (!t->item->session->hidden.rows || earliest(t) >= t->length))
        return false;
    return d->o.draft || d->o.self_window;
}

/* ---- what a round gives by its guesses */

void measure_base(struct group *g) {
    g->base.tokens = g->base.width = g->drafting = 0;
    g->drafters = g->repetitions = 0;
    for (int i = 0; i < g->n; i++) {
        const struct turn *t = &g->turns[i];
        g->base.tokens += t->item->choose;
        g->base.width += t->n_pending;
        g->drafters += has_draft(t);
    }
    g->base.seconds = g->policy ? cost_at(&g->policy->target, g->base.width) : 0;
}

static double rate_of(const struct group *g, double more_tokens, double more_width, double drafting) {
    return (g->base.tokens + more_tokens)
         / (cost_at(&g->policy->target, g->base.width + more_width) + drafting);
}

double pass_seconds(const struct group *g, int guesses) {
    return cost_at(&g->policy->target, g->base.width + guesses);
}

/* Seconds of a draft model's pass for one of the turns that share it. */
static double draft_seconds(const struct group *g) {
    double n = larger(g->drafters, 1);
    return cost_at(&g->policy->draft, n) / n;
}

/* Passes of draft models that took `seconds`, for one of n turns. */
static void charge(struct group *g, struct turn *t, double width, double seconds, int n) {
    double usual = cost_at(&g->policy->draft, width) / n;
    t->spent += seconds / n;
    t->charged += usual;
    g->drafting += usual;
}

/* The chance that a guess of a source comes true in a turn's text; confidence < 0: any
 * guess, before it is made. */
static double chance_of(const struct group *g, const struct turn *t, enum source source, float confidence) {
    const struct acceptance *a = &g->policy->of[source];
    const struct recent none = { 0 }, *recent = t->drafter ? &t->drafter->recent[source] : &none;
    return confidence < 0 ? recent_mean(recent, acceptance_mean(a))
                          : recent_adjust(recent, acceptance_at(a, confidence));
}

static void add(const struct group *g, struct turn *t, int32_t id, float confidence) {
    double before = t->n ? t->right[t->n - 1] : 1;
    t->guesses[t->n] = id;
    t->confidence[t->n] = confidence;
    t->right[t->n++] = before * (g->policy ? chance_of(g, t, t->source, confidence) : 1);
}

/* The best rate that the first of a turn's guesses give, the other turns having none; *n: how many those are,
 * 0 where plain decoding is as good. */
static double rate_alone(const struct group *g, const struct turn *t, int *n) {
    double tokens = 0, best = rate_of(g, 0, 0, 0);
    *n = 0;
    for (int i = 0; i < t->n; i++) {
        tokens += t->right[i];
        double rate = rate_of(g, tokens, i + 1, 0);
        if (rate > best) {
            best = rate;
            *n = i + 1;
        }
    }
    return best;
}

static void ask_ngrams(const struct group *g, struct turn *t) {
    int32_t ids[GUESSES];
    double lengths[GUESSES];
    int n = ngrams_propose(t->drafter->ngrams, room(t), ids, lengths);
    t->source = NGRAMS;
    for (int i = 0; i < n; i++)
        add(g, t, ids[i], (float)lengths[i]);
}

/* ---- what a draft model has read */

static int32_t in_draft(const bmc_drafter *d, int32_t token) {
    if (d->o.to_draft)
        return d->o.to_draft[token];
    return !d->o.draft || token < d->o.draft->model->c.vocab_size ? token : 0;
}

/* Token i of the text, as the draft model writes it: what the session holds, then what is pending. */
static int32_t text_token(const struct turn *t, int i) {
    const bmc_session *s = t->item->session;
    return in_draft(t->drafter, i < s->position ? s->tokens[i] : t->tokens[i - s->position]);
}

/* Tokens of the text that the draft model has not read. Its rows are the text's from `offset` on. */
static int lag(const struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft;
    return draft ? t->length - draft->offset - draft->position : t->n_pending;
}

void draft_follow(struct turn *t) {
    bmc_session *draft = t->drafter->o.draft;
    int kept = 0, n = t->length - 1 - draft->offset;
    while (kept < n && kept < draft->position && draft->tokens[kept] == text_token(t, draft->offset + kept))
        kept++;
    /* What states cannot be taken back to is read again, as other text is. */
    if (bmc_session_sync(draft, draft->tokens, kept) < 1)
        draft->offset = earliest(t);
}

/* Let the draft model begin anew with the last tokens of the text, `most` of them. */
static void restart(struct turn *t, int most) {
    bmc_session *draft = t->drafter->o.draft;
    bmc_session_rewind(draft, 0);
    draft->offset = larger(earliest(t), t->length - smaller(most, (int)draft->cap / 2));
}

/* The next n tokens of the text that the draft model has not read; for a draft head also the
 * hidden states before them. */
static void read_from(const struct turn *t, int n, int32_t *tokens, const float **before) {
    const int first = t->length - lag(t);
    for (int i = 0; i < n; i++) {
        tokens[i] = text_token(t, first + i);
        before[i] = t->drafter->hidden ? hidden_row(t->item->session, first + i - 1) : NULL;
    }
}

/* The draft model reads the next n tokens of the text, PASS_MAX at most. */
static int read_text(struct group *g, struct turn *t, int n) {
    bmc_session *draft = t->drafter->o.draft;
    int32_t tokens[PASS_MAX];
    const float *before[PASS_MAX];
    read_from(t, n, tokens, before);
    bmc_span span = {
        .session = draft, .tokens = tokens, .n_tok = n, .want = BMC_WANT_NONE,
        .before = t->drafter->hidden ? before : NULL,
    };
    int64_t start = nanoseconds();
    int status = bmc_eval(&span, 1);
    double seconds = seconds_since(start);
    if (!status)
        cost_observe(&g->policy->draft, n, seconds);
    charge(g, t, n, seconds, 1);
    return status;
}

/* As much at a time as the round has time for besides its guesses. */
static int read_piece(struct group *g, struct turn *t) {
    int piece = smaller(lag(t) - 1, PASS_MAX);
    double left = LATENCY * g->base.seconds - pass_seconds(g, g->repetitions) - g->drafting;
    while (piece && cost_at(&g->policy->draft, piece) > left)
        piece -= (piece + 3) / 4;
    return piece ? read_text(g, t, piece) : 0;
}

/* A wider window, once what guessing has gained pays for reading it. */
static void widen_window(const struct group *g, struct turn *t) {
    bmc_drafter *d = t->drafter;
    const bmc_session *draft = d->o.draft;
    int wanted = smaller(d->window * WIDER, t->length);
    if (draft->offset <= earliest(t) || wanted > (int)draft->cap / 2)
        return;
    if (!budget_allows(&d->budget, 2 * cost_at(&g->policy->draft, wanted), false))
        return;
    d->window *= WIDER;
    d->reading = true;
    restart(t, d->window);
}

/* Whether what the draft model has to read next is not there any more. */
static bool forgotten(const struct turn *t) { return t->length - lag(t) < earliest(t); }

/* Whether the draft model's session has to begin anew: it would read more than its window, or is full. */
static bool out_of_reach(const struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft;
    return forgotten(t) || lag(t) > larger(t->drafter->window, LAG)
        || t->length - draft->offset + GUESSES > draft->cap;
}

/* ---- how many guesses to ask a draft model for */

/* Seconds that k guesses cost if none comes true. */
static double loss_of(const struct group *g, int k) {
    return pass_seconds(g, k) - g->base.seconds + k * draft_seconds(g);
}

/* Those with the best rate, as far as the budget goes, which also pays what the draft model reads before:
 * catch_up seconds. The rate is 0 where it is not worth asking. */
static double plan_draft(const struct group *g, struct turn *t, double catch_up) {
    bmc_drafter *d = t->drafter;
    double chance = chance_of(g, t, MODEL, -1), right = 1, tokens = 0, best = 0;
    int most = room(t), k = 0;
    for (int i = 1; i <= most; i++) {
        tokens += right *= chance;
        double drafting = i * draft_seconds(g);
        if (i > 1 && pass_seconds(g, i) + drafting > LATENCY * g->base.seconds)
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
    /* Early probes find what guesses cost and give. */
    bool first = t == g->turns && !acceptance_known(&g->policy->of[MODEL]);
    while (k > 0 && !budget_allows(&d->budget, catch_up + loss_of(g, k), t->probe && !first))
        k = k > d->o.least ? k - 1 : 0;
    t->planned = k;
    return k && !t->probe ? best : 0;
}

/* Plans guesses of a draft model for a turn whose repetitions are known. They have to promise a
 * better rate than those and than plain decoding; a probe is made only where nothing is repeated.
 * Returns how many; 0: none. */
static int choose_draft(const struct group *g, struct turn *t, double catch_up) {
    int n;
    double rate = plan_draft(g, t, catch_up);
    if (t->probe ? t->n > 0 : rate <= rate_alone(g, t, &n))
        t->planned = 0;
    return t->planned;
}

int wanted_guesses(const struct group *g, struct turn *t) {
    const bmc_drafter *d = t->drafter;
    if (!d || !d->o.external || d->failed)
        return 0;
    if (d->o.fixed)
        return smaller(d->o.fixed, room(t));
    if (d->ngrams && room(t))
        ask_ngrams(g, t);
    int k = choose_draft(g, t, 0);
    t->planned = t->n = 0;
    return k;
}

static void begin_draft(struct turn *t) {
    t->n = 0;
    t->source = MODEL;
    t->drafting = true;
}

/* Whether and how the draft model takes part in a turn, whose repetitions are known: it guesses, or it reads
 * a piece of the text. Once it has begun to read, it goes on to the end of the text before it guesses. */
static int prepare_draft(struct group *g, struct turn *t) {
    bmc_drafter *d = t->drafter;
    if (d->o.draft && !d->reading)
        widen_window(g, t);
    if (d->reading && lag(t) > LAG && !out_of_reach(t))
        return read_piece(g, t);
    d->reading = false;
    bool restarts = d->o.draft && out_of_reach(t), behind = restarts || lag(t) > LAG;
    double catch_up = behind ? cost_at(&g->policy->draft, smaller(restarts ? d->window : lag(t), t->length))
                             : 0;
    if (!choose_draft(g, t, catch_up))
        return 0;
    if (restarts)
        restart(t, d->window);
    if (!behind) {
        begin_draft(t);
        return 0;
    }
    d->reading = true;
    t->planned = 0;
    return read_piece(g, t);
}

/* Guesses of a set length, for proofs and comparisons. */
static int prepare_fixed(struct group *g, struct turn *t) {
    t->planned = smaller(t->drafter->o.fixed, room(t));
    t->n = smaller(t->n, t->planned);
    if (!has_draft(t) || (t->item->n_guesses && t->item->n == 0))
        return 0;
    int status = 0;
    if (forgotten(t))
        restart(t, HIDDEN_KEPT);
    while (!status && lag(t) > LAG)
        status = read_text(g, t, smaller(lag(t) - 1, PASS_MAX));
    if (!status) {
        begin_draft(t);
        t->probe = true;
    }
    return status;
}

/* ---- passes of draft models */

/* A bias names ids of the target's vocabulary: a draft model with others does without it. */
static const bmc_sampler *draft_sampler(struct turn *t) {
    const bmc_session *draft = t->drafter->o.draft, *s = t->item->session;
    bool same = !draft || (!t->drafter->o.to_draft && draft->model->c.vocab_size >= s->model->c.vocab_size);
    if (!t->item->sampler || same)
        return t->item->sampler;
    t->sampler = *t->item->sampler;
    t->sampler.n_bias = 0;
    return &t->sampler;
}

static bmc_span draft_span(struct turn *t) {
    bmc_drafter *d = t->drafter;
    int n = t->n ? 1 : lag(t);
    if (t->n) {
        t->lacking[0] = in_draft(d, t->guesses[t->n - 1]);
        t->before[0] = d->hidden;
    } else
        read_from(t, n, t->lacking, t->before);
    t->lead = INFINITY;
    return (bmc_span){
        .session = d->o.self_window ? t->item->session : d->o.draft, .last = d->o.self_window,
        .tokens = t->lacking, .n_tok = n, .before = d->hidden ? t->before : NULL,
        .want = BMC_WANT_LAST, .sampler = draft_sampler(t), .names = d->o.to_target,
        .hidden = d->hidden, .next = &t->next, .logprob = &t->logprob, .lead = &t->lead,
    };
}

/* One pass for all turns that still guess. */
static int draft_pass(struct group *g) {
    int n = 0, width = 0;
    bool sampled = false;
    for (int i = 0; i < g->n; i++)
        if (g->turns[i].drafting) {
            g->spans[n] = draft_span(&g->turns[i]);
            sampled = sampled || g->turns[i].item->sampler;
            width += g->spans[n++].n_tok;
        }
    int64_t start = nanoseconds();
    int status = evaluate(g->spans, n, !sampled);
    double seconds = seconds_since(start);
    if (status)
        return status;
    cost_observe(&g->policy->draft, width, seconds);
    for (int i = 0; i < g->n; i++)
        if (g->turns[i].drafting)
            charge(g, &g->turns[i], width, seconds, n);
    return 0;
}

/* How sure a guess is, from 0 to 1: its probability, or with a sampler 1 - e^-lead, where lead is how
 * far its score is ahead. */
static float confidence_of(const struct turn *t) {
    const bmc_sampler *s = t->item->sampler;
    float sure = s && s->temperature > 0 ? -expm1f(-t->lead) : expf(t->logprob);
    return sure >= 0 ? sure : 0;
}

/* A guess in the target's vocabulary; -1: it does not know it. */
static int32_t in_target(const struct turn *t, int32_t id) {
    const bmc_drafter *d = t->drafter;
    if (id >= 0 && d->o.to_target)
        id = d->o.to_target[id];
    return id < t->item->session->model->c.vocab_size ? id : -1;
}

/* Whether one more guess for a turn is expected to raise the round's rate. */
static bool goes_on(const struct group *g, const struct turn *t, double tokens, int guesses) {
    if (t->n >= t->planned)
        return false;
    if (t->probe || t->n < t->drafter->o.least)
        return true;
    double right = t->right[t->n - 1] * chance_of(g, t, MODEL, -1), more = draft_seconds(g);
    return rate_of(g, tokens + right, guesses + 1, g->drafting + more)
         > rate_of(g, tokens, guesses, g->drafting);
}

static bool anyone_drafts(const struct group *g) {
    for (int i = 0; i < g->n; i++)
        if (g->turns[i].drafting)
            return true;
    return false;
}

static int run_draft(struct group *g) {
    int status = 0, guesses = 0;
    double tokens = 0;
    while (!status && anyone_drafts(g)) {
        status = draft_pass(g);
        for (int i = 0; i < g->n && !status; i++) {
            struct turn *t = &g->turns[i];
            int32_t id = t->drafting ? in_target(t, t->next) : -1;
            if (id < 0) {
                t->drafting = false;
                continue;
            }
            add(g, t, id, confidence_of(t));
            tokens += t->right[t->n - 1];
            t->drafting = goes_on(g, t, tokens, ++guesses);
        }
    }
    return status;
}

/* A draft model that fails is a draft model less: the text goes on without it. */
static void give_up(struct turn *t) {
    t->drafter->failed = true;
    t->drafting = false;
    t->n = 0;
}

/* ---- how many guesses to check */

static bool checks_all(const struct group *g, const struct turn *t) {
    return !g->policy || (t->drafter && t->drafter->o.fixed);
}

/* The next guess goes to the turn whose next guess is likeliest to come true; as many as give the
 * best rate are checked. */
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
        if (t->source != GIVEN && !checks_all(g, t) && t->checked && t->checked < t->drafter->o.least)
            t->checked = t->n < t->drafter->o.least ? 0 : t->drafter->o.least;
    }
}

/* Guesses of the caller's: of its draft model where it says how sure that is. */
static void take_given(struct group *g, struct turn *t) {
    const bmc_item *item = t->item;
    int n = smaller(item->n_guesses, room(t));
    t->source = item->confidence ? MODEL : GIVEN;
    t->spent = t->charged = item->guess_s;
    if (g->policy && n && item->guess_s > 0)
        cost_observe(&g->policy->draft, 1, item->guess_s / n);
    if (g->policy && drafted(t) && !checks_all(g, t))
        plan_draft(g, t, 0);                        /* whether they are a probe */
    for (int i = 0; i < n; i++)
        add(g, t, item->guesses[i], item->confidence ? item->confidence[i] : 1);
}

void guess(struct group *g) {
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        bool given = t->item->guesses && t->item->n == 0;
        if (given)
            take_given(g, t);
        else if (t->drafter && t->drafter->ngrams && room(t))
            ask_ngrams(g, t);
        int n = 0;
        if (g->policy)
            rate_alone(g, t, &n);
        g->repetitions += n;
    }
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        bool given = t->item->guesses && t->item->n == 0;
        int status = 0;
        if (t->drafter && t->drafter->o.fixed)
            status = prepare_fixed(g, t);
        else if (has_draft(t) && !given)
            status = prepare_draft(g, t);
        if (status)
            t->drafter->failed = true;
    }
    bool failed = run_draft(g);
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        bmc_session *s = t->item->session;
        int before = t->length - t->n_pending;
        if (failed && (t->drafting || (drafted(t) && has_draft(t))))
            give_up(t);
        /* The target's own drafts are in rows that its pass writes anew. */
        if (s->position > before)
            bmc_session_rewind(s, before);
    }
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        t->checked = t->looked_at = checks_all(g, t) ? t->n : 0;
    }
    if (g->policy)
        cut(g);
}
