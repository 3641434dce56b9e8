#include "policy.h"

#include <math.h>
#include <string.h>

/* ---- what passes cost */

static const short KNOT[KNOTS] = { 1,  2,  3,  4,  5,  6,  7,  8,  9,  10,  11,  12,  13,  14,
                                   15, 16, 17, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512 };
enum { DENSE = 17 };                    /* up to here every width is a knot */

/* Standard deviations of logarithms. */
static const double NOISE = 0.08;                               /* of a single pass */
/* Of what all widths share, from pass to pass. */
static const double SPEED_WALK = 0.02;
static const double SHAPE = 0.12;                               /* of what an octave of width costs more */
static const double ODD = 2.5;          /* deviations beyond which a pass counts less:
                                           the machine did something else meanwhile */
static const int STREAK = 3;            /* odd passes in a row that may be accidents */
static const double PER_TOKEN = 0.05;   /* what a token more costs where nothing is known, in passes of one */

static const double UNKNOWN = 10;       /* deviation of a speed of which nothing is known */

static void widen(struct pass_cost *c, double speed, double shape) {
    for (int i = 0; i < KNOTS; i++)
        for (int j = 0; j < KNOTS; j++)
            c->covariance[i][j] += speed * speed + shape * shape * log2(KNOT[i < j ? i : j]);
}

static void find_seconds(struct pass_cost *c) {
    for (int i = 0; i < KNOTS; i++) {
        c->seconds[i] = exp(c->log[i]);
        if (i && c->seconds[i] < c->seconds[i - 1])
            c->seconds[i] = c->seconds[i - 1];
    }
}

void cost_init(struct pass_cost *c, double one) {
    memset(c, 0, sizeof *c);
    for (int i = 0; i < KNOTS; i++)
        c->log[i] = log(one * (1 + PER_TOKEN * (KNOT[i] - 1)));
    widen(c, UNKNOWN, SHAPE);
    find_seconds(c);
}

/* The knot below a width, and how far on the way to the next one it is. */
static int knot_below(double width, double *share) {
    int i = 0;
    if (width < DENSE)
        i = width > 1 ? (int)width - 1 : 0;
    else
        for (i = DENSE - 1; i < KNOTS - 2 && KNOT[i + 1] <= width; i++)
            ;
    *share = (width - KNOT[i]) / (KNOT[i + 1] - KNOT[i]);
    return i;
}

static bool odd_again(struct pass_cost *c, double deviations) {
    int way = (deviations > ODD) - (deviations < -ODD);
    c->streak = way * c->streak > 0 ? c->streak + way : way;
    return c->streak > STREAK || c->streak < -STREAK;
}

void cost_observe(struct pass_cost *c, double width, double seconds) {
    double share, common[KNOTS];
    if (width > KNOT[KNOTS - 1]) {                  /* several passes */
        seconds *= KNOT[KNOTS - 1] / width;
        width = KNOT[KNOTS - 1];
    }
    int k = knot_below(width, &share);
    double surprise = log(fmax(seconds, 1e-9)) - (1 - share) * c->log[k] - share * c->log[k + 1];
    double variance = 0;
    for (int again = 0; again < 2; again++) {
        for (int i = 0; i < KNOTS; i++)
            common[i] = (1 - share) * c->covariance[k][i] + share * c->covariance[k + 1][i];
        variance = (1 - share) * common[k] + share * common[k + 1] + NOISE * NOISE;
        if (again || !odd_again(c, surprise / sqrt(variance)))
            break;
        c->streak = 0;                  /* another machine, or another speed of it */
        widen(c, UNKNOWN, SHAPE);
    }
    variance = fmax(variance, surprise * surprise / (ODD * ODD));
    for (int i = 0; i < KNOTS; i++) {
        c->log[i] += common[i] * surprise / variance;
        for (int j = 0; j < KNOTS; j++)
            c->covariance[i][j] -= common[i] * common[j] / variance;
    }
    widen(c, SPEED_WALK, 0);
    find_seconds(c);
    c->known = true;
}

double cost_at(const struct pass_cost *c, double width) {
    double share;
    int k = knot_below(width, &share);
    return c->seconds[k] + share * (c->seconds[k + 1] - c->seconds[k]);
}

void cost_recall(struct pass_cost *c) {
    memset(c->covariance, 0, sizeof c->covariance);
    widen(c, UNKNOWN, SHAPE);
    find_seconds(c);
    c->known = true;
}

/* ---- how often guesses come true */

static const double FADE = 0.95;        /* weight of what was seen one guess ago, within a bucket or a text */
static const double PRIOR = 4;          /* guesses that a prior counts as */
static const double FIRST_MEAN = 0.75;  /* share of a draft model's guesses that come true,
                                           before any was made: worth a try */

void acceptance_init(struct acceptance *a, const float *edges, const double *priors, int n_classes) {
    *a = (struct acceptance){ .n_classes = n_classes };
    memcpy(a->edge, edges, (size_t)(n_classes - 1) * sizeof *edges);
    memcpy(a->prior, priors, (size_t)n_classes * sizeof *priors);
}

static int bucket(const struct acceptance *a, float confidence) {
    int i = 0;
    while (i < a->n_classes - 1 && a->edge[i] <= confidence)
        i++;
    return i;
}

void acceptance_learn(struct acceptance *a, float confidence, bool came_true) {
    int i = bucket(a, confidence);
    a->hits[i] = FADE * a->hits[i] + came_true;
    a->seen[i] = FADE * a->seen[i] + 1;
}

void recent_learn(struct recent *r, double expected, bool came_true) {
    r->hits = FADE * r->hits + came_true;
    r->expected = FADE * r->expected + expected;
    r->seen = FADE * r->seen + 1;
}

double recent_mean(const struct recent *r, double mean) {
    return (r->hits + PRIOR * mean) / (r->seen + PRIOR);
}

/* The odds of a chance are multiplied by the odds ratio of `hits` to `expected` out of `seen` guesses. What
 * is added to all counts lets few outcomes change little. */
double recent_adjust(const struct recent *r, double chance) {
    const double w = PRIOR / 2;
    double odds = (r->hits + w) / (r->seen - r->hits + w) * (r->seen - r->expected + w) / (r->expected + w);
    return chance * odds / (1 - chance * (1 - odds));
}

/* Where a bucket has seen little its prior counts. */
double acceptance_at(const struct acceptance *a, float confidence) {
    int i = bucket(a, confidence);
    return (a->hits[i] + PRIOR * a->prior[i]) / (a->seen[i] + PRIOR);
}

bool acceptance_known(const struct acceptance *a) {
    double seen = 0;
    for (int i = 0; i < a->n_classes; i++)
        seen += a->seen[i];
    return seen > PRIOR;
}

double acceptance_mean(const struct acceptance *a) {
    double hits = FIRST_MEAN * PRIOR, seen = PRIOR;
    for (int i = 0; i < a->n_classes; i++) {
        hits += a->hits[i];
        seen += a->seen[i];
    }
    return hits / seen;
}

/* Counts of an earlier run are reduced to PRIOR guesses a bucket, so that this run's
 * texts soon outweigh them. */
void acceptance_recall(struct acceptance *a) {
    for (int i = 0; i < a->n_classes; i++) {
        double share = a->seen[i] > PRIOR ? PRIOR / a->seen[i] : 1;
        a->seen[i] *= share;
        a->hits[i] = fmin(a->hits[i] * share, a->seen[i]);
    }
}

/* ---- how much may be lost */

/* Plain tokens: what a sequence begins with, the most it keeps. */
static const double GRANT = 4, BANK = 16;
static const double SHARE = 0.01;               /* of all time */

void budget_pass_time(struct budget *b, double seconds, double one) {
    b->balance = fmin(b->balance + (b->begun ? 0 : GRANT * one) + SHARE * seconds, BANK * one);
    b->probes_left += SHARE * seconds;
    b->begun = true;
}

void budget_enter(struct budget *b, double gained, double one, bool probe) {
    b->balance = fmin(b->balance + gained, BANK * one);
    if (probe && gained < 0)
        b->probes_left += gained;
}

bool budget_allows(const struct budget *b, double loss, bool probe) {
    return loss <= b->balance && (!probe || loss <= b->probes_left);
}
