/* Rounds of decoding, several in one call: a draft model, the text or nobody guesses, the target checks all guesses in one
 * pass.
 *
 * A pass of the target over the text's last token and k guesses gives, row by row, what it would choose after each of them.
 * As long as a guess is that very token, the next row counts too; so the text is plain decoding's, whatever the guesses. */
#include "clock.h"
#include "error.h"
#include "model.h"
#include "ngram.h"

#include <math.h>
#include <string.h>

enum { LACKING = 32, GUESSES = 64 };    /* at most: tokens that the draft lacks, guesses of a round */

static const double HOPELESS = 0.02;    /* chance of all guesses so far below which no more are looked at */

static double seconds_since(int64_t start) { return 1e-9 * (double)(nanoseconds() - start); }

static int smaller(int a, int b) { return a < b ? a : b; }

static int in_common(const int32_t *a, const int32_t *b, int n) {
    int i = 0;
    while (i < n && a[i] == b[i])
        i++;
    return i;
}

static double chance(const bmc_plan *plan, double sure) {
    int class = 0;
    while (class < plan->n_edges && plan->edges[class] <= sure)
        class++;
    return plan->chance[class];
}

/* How many of n guesses to check: as many as give the most tokens a second. drafting: the seconds that they took. */
static int worth(const bmc_plan *plan, const double *sure, int n, double drafting) {
    double tokens = 1, right = 1, best = 1 / (plan->cost[1] + drafting + plan->choosing);
    int found = 0;
    for (int i = 1; i <= n; i++) {
        right *= chance(plan, sure[i - 1]);
        tokens += right;
        double rate = tokens / (plan->cost[i + 1] + drafting + tokens * plan->choosing);
        if (i >= plan->least && rate > best) {
            best = rate;
            found = i;
        } else if (right < HOPELESS)
            break;
    }
    return found;
}

/* Who guesses. lack: what a draft lacks of the text, in its vocabulary: token 0 stands for those beyond it. */
struct guesser {
    bmc_session *draft;             /* or: */
    bmc_ngrams *ngrams;             /* or nobody */
    int32_t lack[LACKING];
    int n_lack, known;              /* known: rows of the draft that are the text's, once it has guessed */
    bool asked;                     /* this round */
};

static void lacks(struct guesser *g, const int32_t *ids, int n) {
    for (int i = 0; i < n; i++)
        g->lack[g->n_lack++] = ids[i] < g->draft->model->c.vocab_size ? ids[i] : 0;
}

/* How many guesses its context leaves room for. */
static int room(const struct guesser *g) {
    return g->draft ? (int)g->draft->arena.config.cap - g->draft->position - g->n_lack + 1 : GUESSES;
}

/* Up to k guesses that the target knows, and how sure each is; fewer than 0: a status. */
static int guess(struct guesser *g, const bmc_plan *plan, int k, int vocab_size, int32_t *ids, double *sure) {
    float logs[GUESSES];
    int fit = 0;
    if (!g->draft)
        return g->ngrams ? ngrams_propose(g->ngrams, k, ids, sure) : 0;
    g->known = g->draft->position + g->n_lack;
    int n = bmc_draft(g->draft, g->lack, g->n_lack, k, (float)plan->p_min, 0, plan->sampler, ids, logs);
    for (; fit < n && ids[fit] < vocab_size; fit++)
        sure[fit] = isfinite(logs[fit]) ? exp((double)logs[fit]) : 0;
    return n < 0 ? n : fit;
}

/* The text goes on with n ids, of which the first n_right were guessed. */
static int follow(struct guesser *g, const int32_t *ids, int n, int n_right) {
    if (!g->draft)
        return g->ngrams ? bmc_ngrams_add(g->ngrams, ids, n) : 0;
    if (!g->asked) {
        lacks(g, ids, n);
        return 0;
    }
    int kept = smaller(n_right, g->draft->position - g->known);         /* the last guess was not evaluated */
    g->n_lack = 0;
    lacks(g, ids + kept, n - kept);
    return bmc_session_rewind(g->draft, g->known + kept);
}

/* The seconds by which a round takes longer than plain decoding, as far as it goes by the costs: how long this very pass took
 * says more about the machine's other work. */
static double loss(const bmc_plan *plan, const bmc_round *r) {
    return fmin(r->draft_s, plan->drafting) + plan->cost[r->n_checked + 1] - r->n_tokens * plan->cost[1];
}

/* Two in a row: the first one meets caches that hold other things. */
static bool is_plain(const bmc_plan *plan, int round) {
    return plan->every > 2 && (plan->since + round) % plan->every >= plan->every - 2;
}

static int rows_left(const bmc_session *target) { return (int)target->arena.config.cap - target->position; }

static int check_plan(const bmc_session *target, const bmc_session *draft, const bmc_ngrams *ngrams, const bmc_plan *p,
                      const int32_t *text, int n_text, bool results) {
    if (!results || !target || (draft && ngrams) || target == draft || !p || !text)
        return fail(BMC_EINVAL, "bmc_speculate: needs a session, at most one who guesses, a plan, a text and room for results");
    if (n_text < 1 || n_text > LACKING)
        return fail(BMC_EINVAL, "bmc_speculate: expected 1 to %d tokens that the draft lacks, found %d", LACKING, n_text);
    int least = draft || ngrams, most = least ? GUESSES : 0;
    if (p->n_rounds < 1 || p->k < least || p->k > most)
        return fail(BMC_EINVAL, "bmc_speculate: expected rounds of %d to %d guesses, found %d of %d", least, most, (int)p->n_rounds,
                    (int)p->k);
    if (p->cost && (p->n_edges < 0 || (p->n_edges && !p->edges) || !p->chance))
        return fail(BMC_EINVAL, "bmc_speculate: costs without chances");
    return 0;
}

int bmc_speculate(bmc_session *target, bmc_session *draft, bmc_ngrams *ngrams, const bmc_plan *plan, const int32_t *text, int n_text,
                  int32_t *ids, float *logprobs, double *sure, bmc_round *rounds) {
    int status = check_plan(target, draft, ngrams, plan, text, n_text, ids && logprobs && sure && rounds);
    if (status)
        return status;
    int done = 0, left = plan->n_tokens;
    double lost = 0;
    const int64_t began = nanoseconds();
    struct guesser g = { .draft = draft, .ngrams = ngrams };
    int32_t pass[GUESSES + 1] = { text[n_text - 1] }, *guesses = pass + 1;
    if (draft)
        lacks(&g, text, n_text);
    while (done < plan->n_rounds && (!done || seconds_since(began) < plan->seconds)) {
        int k = smaller(smaller(plan->k, room(&g)), smaller(left, rows_left(target)) - 1);
        if (k < 0 || (k < 1 && plan->k))
            break;
        int64_t start = nanoseconds();
        g.asked = !is_plain(plan, done);
        int n = g.asked ? guess(&g, plan, k, target->model->c.vocab_size, guesses, sure) : 0;
        if (n < 0)
            return done ? done : n;
        double drafting = seconds_since(start);
        int checked = plan->cost ? worth(plan, sure, n, drafting) : n;
        bmc_span span = { .session = target, .tokens = pass, .n_tok = checked + 1, .want = BMC_WANT_ALL,
                          .sampler = plan->sampler, .next = ids, .logprob = logprobs };
        start = nanoseconds();
        if ((status = bmc_eval(&span, 1))) {
            if (draft)
                bmc_session_rewind(draft, g.known);
            return done ? done : status;
        }
        if (plan->script)
            memcpy(ids, plan->script + plan->n_tokens - left, (size_t)(checked + 1) * sizeof *ids);
        int accepted = in_common(guesses, ids, checked), given = accepted + 1;
        bmc_session_rewind(target, target->position - (checked - accepted));
        rounds[done++] = (bmc_round){
            .n_asked = g.asked ? k : 0, .n_drafted = n, .n_checked = checked, .n_right = in_common(guesses, ids, smaller(n, given)),
            .n_tokens = given, .draft_s = drafting, .verify_s = seconds_since(start),
        };
        status = follow(&g, ids, given, accepted);
        pass[0] = ids[accepted];
        lost += plan->cost ? loss(plan, &rounds[done - 1]) : 0;
        if (status || !isfinite(logprobs[accepted]) || (!checked && g.asked && !plan->patient) || lost > plan->stake)
            break;
        left -= given;
        ids += given;
        logprobs += given;
        sure += plan->k;
    }
    return done;
}
