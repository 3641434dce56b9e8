/* What decides how many tokens to guess, in three nouns: what passes cost by their width (pass_cost), how
 * often guesses come true (acceptance), and how much time guessing may lose (budget). Nothing here knows of
 * models: times and outcomes come in as numbers, so that a simulation can drive it. */
#ifndef POLICY_H
#define POLICY_H

#include <stdbool.h>

/* ---- what passes cost */

enum { KNOTS = 28 };

/* Seconds of a pass by its width in tokens: a Kalman filter over their logarithms at KNOTS widths. What all
 * widths share, the machine's speed and the depth of the text, may change from pass to pass; by how much a
 * wider pass costs more is taken for a random walk over the octaves of width, so that a width that was never
 * seen follows its neighbours. */
struct pass_cost {
    double log[KNOTS];
    double covariance[KNOTS][KNOTS];
    double seconds[KNOTS];              /* e^log, no less than a narrower pass */
    int streak;                         /* surprises in a row, with their sign */
    bool known;                         /* something was observed */
};

void cost_init(struct pass_cost *c, double one);            /* one: a guess at a pass of one token */
void cost_observe(struct pass_cost *c, double width, double seconds);
double cost_at(const struct pass_cost *c, double width);    /* width may be a mean */
void cost_recall(struct pass_cost *c);                      /* log holds what another run found */

/* ---- how often guesses come true */

enum { CLASSES = 24 };                  /* buckets of confidence, at most */

struct acceptance {
    int n_classes;
    float edge[CLASSES];                /* (n_classes - 1,) where a bucket ends */
    double prior[CLASSES];              /* chances where nothing was seen */
    double hits[CLASSES], seen[CLASSES];    /* what is older counts less */
};

void acceptance_init(struct acceptance *a, const float *edges, const double *priors, int n_classes);
void acceptance_learn(struct acceptance *a, float confidence, bool came_true);
/* The chance that such a guess comes true; that any does, before it is made. */
double acceptance_at(const struct acceptance *a, float confidence);
double acceptance_mean(const struct acceptance *a);
bool acceptance_known(const struct acceptance *a);      /* it has seen more than its priors count as */
void acceptance_recall(struct acceptance *a);           /* hits and seen are of another run */

/* Texts differ: how often a source's guesses came true in one text, against what was expected of them. */
struct recent { double hits, expected, seen; };

void recent_learn(struct recent *r, double expected, bool came_true);
/* A chance in this text; that of any guess, before it is made. mean: in all texts. */
double recent_adjust(const struct recent *r, double chance);
double recent_mean(const struct recent *r, double mean);

/* ---- how much may be lost */

/* In seconds. A sequence begins with a grant; a share of all its time and what guessing gains are added; what
 * it loses against plain decoding is taken off. */
struct budget {
    double balance;
    double probes_left;                 /* loss allowed for probes: guesses that are not expected to pay */
    bool begun;
};

/* Time that passed; one: seconds of a plain token. */
void budget_pass_time(struct budget *b, double seconds, double one);
/* Seconds that a round gained or lost. */
void budget_enter(struct budget *b, double gained, double one, bool probe);
bool budget_allows(const struct budget *b, double loss, bool probe);

#endif
