/* Rounds of decoding, for one sequence or many: the only place where tokens are verified, chosen,
 * accepted and taken back.
 *
 * A pass of the target over a text's last token and k guesses gives, row by row, what it chooses after each
 * of them. As long as a guess is that very token, the next row counts too. So the text is that of plain
 * decoding, right or wrong as the guesses are. */
#include "clock.h"
#include "error.h"
#include "guess.h"
#include "model.h"
#include "ngram.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

_Static_assert((int)GUESSES <= (int)LOG_KEPT, "guesses are taken back without evaluating tokens again");

/* ---- the target's pass */

static bool stops(const bmc_item *item, int32_t id) {
    for (int i = 0; i < item->n_stops; i++)
        if (item->stops[i] == id)
            return true;
    return false;
}

static void learn(const struct group *g, struct turn *t, const int32_t *ids, int given) {
    struct acceptance *a = &g->policy->of[t->source];
    for (int i = 0; i < t->n && i < given; i++) {
        bool came_true = t->guesses[i] == ids[i];
        recent_learn(&t->drafter->recent[t->source], acceptance_at(a, t->confidence[i]), came_true);
        acceptance_learn(a, t->confidence[i], came_true);
        if (!came_true)
            break;
    }
}

/* Who made a turn's guesses, as bmc_item.drafted tells it. */
static uint8_t guesser(const struct turn *t) {
    bool self = t->source == MODEL && t->drafter && t->drafter->o.self_window;
    return self ? 4 : (uint8_t)(t->source + 1);
}

/* What the round cost a turn, and gave it, against plain decoding. Passes count as what they usually take:
 * how long this very one took says more about the machine's other work. */
static void account(const struct group *g, struct turn *t, int given, int all_checked) {
    double plain = g->base.seconds / fmax(g->base.tokens, 1), gained = -t->charged;
    if (drafted(t) && all_checked)
        gained += (given - 1) * plain
                - (pass_seconds(g, all_checked) - g->base.seconds) * t->checked / all_checked;
    budget_pass_time(&t->drafter->budget, plain, plain);
    budget_enter(&t->drafter->budget, gained, plain, t->probe);
}

/* Accept what came true, take back the rest, learn. */
static void settle(const struct group *g, struct turn *t, int all_checked, double seconds) {
    bmc_item *item = t->item;
    bmc_session *s = item->session, *draft = t->drafter ? t->drafter->o.draft : NULL;
    int32_t *ids = item->ids + item->n;
    int accepted = 0;
    while (accepted < t->checked && t->guesses[accepted] == ids[accepted] && !stops(item, ids[accepted]))
        accepted++;
    int given = accepted + 1;
    bmc_session_rewind(s, s->position - (t->checked - accepted));
    if (draft && drafted(t)) {
        int known = t->length - draft->offset;                      /* rows of the text before the guesses */
        /* A draft head reads those that came true with the target's states. */
        if (!t->drafter->hidden)
            known += accepted;
        bmc_session_rewind(draft, smaller(known, draft->position));
    }
    for (int i = 0; i < given; i++)
        item->drafted[item->n + i] = i < accepted ? guesser(t) : 0;
    item->stats.rounds++;
    item->stats.checked += t->checked;
    item->stats.accepted += accepted;
    item->stats.lengths[t->checked]++;
    item->stats.draft_s += t->spent;
    item->stats.verify_s += seconds;
    item->n += given;
    item->ended = item->n >= item->max_tokens || stops(item, ids[accepted])
               || !isfinite(item->logprobs[item->n - 1]);
    if (!t->drafter)
        return;
    if (t->drafter->ngrams && t->n_pending == 1)            /* else it does not know the prompt yet */
        ngrams_add(t->drafter->ngrams, ids, given);
    learn(g, t, ids, given);
    item->stats.plain_s += given * g->base.seconds / fmax(g->base.tokens, 1);
    account(g, t, given, all_checked);
}

/* What the target's pass evaluates of a turn, and where its results go. */
static bmc_span target_span(struct turn *t) {
    bmc_item *item = t->item;
    size_t n = (size_t)item->n, top = (size_t)item->n_top;
    if (item->choose && item->allow)
        t->checked = smaller(t->checked, larger(0, item->allow(item->allow_for, t->guesses, t->checked)));
    memcpy(t->pass + 1, t->guesses, (size_t)t->checked * sizeof *t->pass);
    bmc_span span = { .session = item->session, .tokens = t->tokens, .n_tok = t->n_pending + t->checked };
    if (!item->choose)
        return span;
    span.want = t->n_pending > 1 ? BMC_WANT_LAST : BMC_WANT_ALL;
    span.sampler = item->sampler;
    span.mask = item->masks;
    span.next = item->ids + n;
    span.logprob = item->logprobs + n;
    span.n_top = item->n_top;
    span.as_drawn = item->as_drawn;
    span.top_ids = top ? item->top_ids + n * top : NULL;
    span.top_logprobs = top ? item->top_logprobs + n * top : NULL;
    return span;
}

static int verify(struct group *g) {
    int all_checked = 0, width = 0, reading = 0;
    for (int i = 0; i < g->n; i++) {
        struct turn *t = &g->turns[i];
        g->spans[i] = target_span(t);
        all_checked += t->checked;
        reading += t->n_pending > 1;
        width += g->spans[i].n_tok;
    }
    int64_t start = nanoseconds();
    int status = bmc_eval(g->spans, g->n);
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
        draft_follow(t);
}

static void begin(struct turn *t, bmc_item *item, bool first) {
    *t = (struct turn){ .item = item, .drafter = item->drafter, .n_pending = first ? item->n_pending : 1 };
    t->pass[0] = first ? item->pending[0] : item->ids[item->n - 1];
    t->tokens = t->n_pending > 1 ? item->pending : t->pass;
    t->length = item->session->position + t->n_pending;
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
        if (!item->session->model->c.causal)
            return fail(BMC_EINVAL, "bmc_round: this model reads a text as a whole and writes none");
        if (item->drafter && !limits->policy)
            return fail(BMC_EINVAL, "bmc_round: item %d has a drafter, and there is no policy", i);
        if (item->drafter && item->drafter->hidden
            && item->drafter->o.draft->model->target != item->session->model)
            return fail(BMC_EINVAL, "bmc_round: item %d has the draft head of another model", i);
        if (item->choose && (item->max_tokens < 1 || !item->ids || !item->logprobs || !item->drafted))
            return fail(BMC_EINVAL, "bmc_round: item %d: expected room for 1 or more tokens, found %d", i,
                        (int)item->max_tokens);
        if (item->masks && item->drafter && !item->allow)
            return fail(BMC_EINVAL, "bmc_round: item %d has a drafter, whose guesses its masks do not know",
                        i);
        if (item->n_stops < 0 || (item->n_stops && !item->stops))
            return fail(BMC_EINVAL, "bmc_round: item %d has %d stops, and no ids of them", i,
                        (int)item->n_stops);
        if (item->n_guesses < 0 || item->n_guesses > GUESSES || (item->n_guesses && !item->guesses))
            return fail(BMC_EINVAL, "bmc_round: expected up to %d guesses, found %d", GUESSES,
                        (int)item->n_guesses);
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
static int one_round(struct group *g, bmc_item *const *items, bool first) {
    for (int i = 0; i < g->n; i++) {
        begin(&g->turns[i], items[i], first);
        if (first)
            follow(&g->turns[i]);
    }
    measure_base(g);
    bool wanted = false;
    for (int i = 0; i < g->n && g->policy; i++)
        if (!items[i]->guesses || items[i]->n)
            wanted = (items[i]->wanted = wanted_guesses(g, &g->turns[i])) > 0 || wanted;
    if (wanted)
        return 0;
    guess(g);
    int status = verify(g);
    return status ? status : 1;
}

/* Whether another round may follow one of this item. */
static bool goes_on(const struct turn *t) {
    const bmc_item *item = t->item;
    return item->choose && !item->ended && !item->masks && !item->allow && t->n_pending == 1;
}

int bmc_round(bmc_item *const *items, int n, const bmc_limits *limits) {
    int status = check_items(items, n, limits), done = 0;
    if (status)
        return status;
    const int64_t start = nanoseconds();
    struct group g = {
        .turns = malloc((size_t)n * sizeof *g.turns), .spans = malloc((size_t)n * sizeof *g.spans),
        .n = n, .policy = limits->policy,
    };
    for (int i = 0; i < n; i++)
        items[i]->n = items[i]->ended = items[i]->wanted = 0;
    bool more = g.turns && g.spans;
    if (!more)
        status = fail(BMC_ENOMEM, "no memory for a round of %d sequences", n);
    while (more && (status = one_round(&g, items, !done)) == 1) {
        done++;
        more = done != limits->n_rounds && seconds_since(start) < limits->seconds;
        for (int i = 0; i < n; i++)
            more = more && goes_on(&g.turns[i]);
    }
    free(g.turns);
    free(g.spans);
    return status < 0 && !done ? status : done;
}
