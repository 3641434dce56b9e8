/* Making and freeing what rounds are decided with, and keeping what was learned from run to run. */
#include "clock.h"
#include "error.h"
#include "model.h"
#include "ngram.h"
#include "round.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double NOT_KNOWN = 1e-2;           /* seconds of a pass before one was seen */
/* Tokens of a text that a draft model reads before its first guess. */
static const int FIRST_WINDOW = 32;

/* What buckets of confidence promise before anything was seen. Two models' best tokens are the same more
 * often than the draft model is sure; a match of many tokens goes on more often than one of two. */
static void init_model(struct acceptance *a) {
    static const float edges[] = { 0.02f, 0.05f, 0.1f, 0.15f, 0.2f, 0.3f, 0.4f, 0.5f,
                                   0.6f, 0.7f, 0.8f, 0.9f, 0.95f, 0.98f, 0.995f };
    enum { N = sizeof edges / sizeof *edges };
    double priors[N + 1];
    for (int i = 0; i <= N; i++) {
        double low = i ? edges[i - 1] : 0, high = i < N ? edges[i] : 1, unsure = 1 - (low + high) / 2;
        priors[i] = 1 - unsure * unsure;
    }
    acceptance_init(a, edges, priors, N + 1);
}

static void init_ngrams(struct acceptance *a) {
    static const float edges[] = { 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24 };
    static const double priors[] = { 0.5, 0.25, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.9, 0.9 };
    acceptance_init(a, edges, priors, sizeof priors / sizeof *priors);
}

static void init_given(struct acceptance *a) {
    acceptance_init(a, (const float[]){ 0 }, (const double[]){ 0.95 }, 1);
}

int bmc_policy_new(double target_seconds, double draft_seconds, bmc_policy **policy) {
    bmc_policy *p = calloc(1, sizeof *p);
    if (!p || !policy) {
        free(p);
        return fail(BMC_ENOMEM, "no memory for a policy");
    }
    cost_init(&p->target, target_seconds > 0 ? target_seconds : NOT_KNOWN);
    cost_init(&p->draft, draft_seconds > 0 ? draft_seconds : NOT_KNOWN);
    init_given(&p->of[GIVEN]);
    init_ngrams(&p->of[NGRAMS]);
    init_model(&p->of[MODEL]);
    *policy = p;
    return 0;
}

void bmc_policy_free(bmc_policy *policy) { free(policy); }

double bmc_policy_seconds(const bmc_policy *p, int of_draft, double width) {
    const struct pass_cost *cost = of_draft ? &p->draft : &p->target;
    return cost->known ? cost_at(cost, width) : 0;
}

double bmc_policy_chance(const bmc_policy *p, int source, float confidence) {
    if (source < 0 || source >= N_SOURCES)
        return 0;
    return confidence < 0 ? acceptance_mean(&p->of[source]) : acceptance_at(&p->of[source], confidence);
}

/* Costs are kept in seconds, acceptance as counts. */
static double *record(bmc_policy *p, int i) {
    struct pass_cost *costs[] = { &p->target, &p->draft };
    if (i < 2 * KNOTS)
        return &costs[i / KNOTS]->log[i % KNOTS];
    i -= 2 * KNOTS;
    struct acceptance *a = &p->of[i / (2 * CLASSES)];
    i %= 2 * CLASSES;
    return i < CLASSES ? &a->hits[i] : &a->seen[i - CLASSES];
}

enum { RECORD = 2 * KNOTS + 2 * CLASSES * N_SOURCES };

int bmc_policy_save(const bmc_policy *p, double *values, int n) {
    for (int i = 0; i < n && i < RECORD; i++)
        values[i] = *record((bmc_policy *)p, i);
    return RECORD;
}

int bmc_policy_load(bmc_policy *p, const double *values, int n) {
    if (n != RECORD)
        return fail(BMC_EINVAL, "a policy's record has %d numbers, found %d", RECORD, n);
    for (int i = 0; i < n; i++)
        if (!isfinite(values[i]) || fabs(values[i]) > 1e6 || (i >= 2 * KNOTS && values[i] < 0))
            return fail(BMC_EINVAL, "a policy's record: number %d is %g", i, values[i]);
    for (int i = 0; i < n; i++)
        *record(p, i) = values[i];
    for (int i = 0; i < N_SOURCES; i++)
        acceptance_recall(&p->of[i]);
    cost_recall(&p->target);
    cost_recall(&p->draft);
    return 0;
}

/* ---- drafters */

static int copy_ids(const int32_t *ids, int n, int limit, const int32_t **kept) {
    for (int i = 0; i < n; i++)
        if (ids[i] < -1 || ids[i] >= limit)
            return fail(BMC_EINVAL, "a vocabulary's ids are 0 to %d, found %d", limit - 1, (int)ids[i]);
    int32_t *copy = malloc((size_t)n * sizeof *copy);
    if (!copy)
        return fail(BMC_ENOMEM, "no memory for %d ids", n);
    *kept = memcpy(copy, ids, (size_t)n * sizeof *copy);
    return 0;
}

static int copy_vocabulary(bmc_drafter *d, const bmc_drafter_options *o, int n_vocab) {
    int n_draft = o->draft->model->c.vocab_size;
    int status = copy_ids(o->to_draft, n_vocab, n_draft, &d->o.to_draft);
    return status ? status : copy_ids(o->to_target, n_draft, n_vocab, &d->o.to_target);
}

static int check_options(const bmc_drafter_options *o) {
    if (o->most < 0 || o->least < 0 || o->least > o->most || o->fixed < 0 || o->self_window < 0)
        return fail(BMC_EINVAL, "bmc_drafter_new: expected 0 <= least <= most, found %d and %d",
                    (int)o->least, (int)o->most);
    if (!!o->draft + !!o->self_window + !!o->external > 1)
        return fail(BMC_EINVAL, "bmc_drafter_new: expected one of a draft model, "
                                "the model itself and guesses of the caller");
    return 0;
}

int bmc_drafter_new(const bmc_drafter_options *options, int n_vocab, bmc_drafter **drafter) {
    int status = options && drafter ? check_options(options)
                                    : fail(BMC_EINVAL, "bmc_drafter_new: needs options");
    if (status)
        return status;
    bmc_drafter *d = calloc(1, sizeof *d);
    if (!d)
        return fail(BMC_ENOMEM, "no memory for a drafter");
    d->o = *options;
    d->o.to_draft = d->o.to_target = d->o.hint = NULL;
    d->window = FIRST_WINDOW;
    if (!!options->to_draft != !!options->to_target)
        status = fail(BMC_EINVAL, "bmc_drafter_new: expected ids both ways, or none");
    if (!status && options->ngrams && !(d->ngrams = ngrams_new()))
        status = BMC_ENOMEM;
    if (!status && d->ngrams && options->n_hint > 0)
        status = ngrams_hint(d->ngrams, options->hint, options->n_hint);
    if (!status && options->draft && options->to_draft)
        status = copy_vocabulary(d, options, n_vocab);
    if (!status && options->draft && options->draft->model->target
        && !(d->hidden = malloc((size_t)options->draft->model->c.dim * sizeof *d->hidden)))
        status = fail(BMC_ENOMEM, "no memory for a drafter");
    if (status)
        bmc_drafter_free(d);
    else
        *drafter = d;
    return status;
}

void bmc_drafter_free(bmc_drafter *d) {
    if (!d)
        return;
    ngrams_free(d->ngrams);
    free(d->hidden);
    free((void *)d->o.to_draft);
    free((void *)d->o.to_target);
    free(d);
}

/* Seconds of a guess; hidden: of a draft head, the state before it. */
static int time_guess(bmc_session *draft, const float *hidden, double *seconds) {
    int32_t token = 0, next;
    float logprob;
    const bmc_span span = {
        .session = draft, .tokens = &token, .n_tok = 1, .want = BMC_WANT_LAST,
        .before = hidden ? &hidden : NULL, .next = &next, .logprob = &logprob,
    };
    *seconds = INFINITY;
    for (int i = 0; i < 4; i++) {                   /* the first ones touch the model's memory */
        int64_t start = nanoseconds();
        int status = evaluate(&span, 1, true);
        if (status)
            return status;
        *seconds = fmin(*seconds, 1e-9 * (double)(nanoseconds() - start));
    }
    return bmc_session_rewind(draft, draft->position - 4);
}

int bmc_draft_seconds(bmc_session *draft, double *seconds) {
    if (!draft || !seconds)
        return fail(BMC_EINVAL, "bmc_draft_seconds: needs a session and room for the result");
    float *zeros = draft->model->target ? calloc((size_t)draft->model->c.dim, sizeof *zeros) : NULL;
    int status = draft->model->target && !zeros ? fail(BMC_ENOMEM, "no memory for a hidden state")
                                                : time_guess(draft, zeros, seconds);
    free(zeros);
    return status;
}

int bmc_drafter_failed(const bmc_drafter *d) { return d->failed; }
