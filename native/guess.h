/* Guesses at how texts go on: who makes them, and how many are worth checking. round.c verifies them. */
#ifndef GUESS_H
#define GUESS_H

#include "clock.h"
#include "round.h"

/* Tokens that a draft model may lack before it guesses: they share its first pass. */
enum { LAG = GUESSES };

/* One item in one round. */
struct turn {
    bmc_item *item;
    bmc_drafter *drafter;           /* NULL: plain decoding */
    int32_t pass[GUESSES + 1];      /* the text's last token; the guesses that are checked */
    const int32_t *tokens;          /* what the target evaluates: pass, or a piece of a prompt .. */
    int n_pending;                  /* .. tokens of it before the guesses */
    int length;                     /* tokens of the text, those included */
    enum source source;             /* of its guesses */
    int n;                          /* guesses made */
    int32_t guesses[GUESSES];
    float confidence[GUESSES];
    double right[GUESSES];          /* chance that this guess and all before it come true */
    int looked_at, checked;         /* of them, those that a cut has looked at, and those in the pass */
    int planned;                    /* guesses to ask the draft model for */
    bool drafting;                  /* it is still guessing */
    bool probe;                     /* the draft model is asked although it is not expected to pay */
    double spent, charged;          /* seconds of the draft model for this item, and what they usually are */
    bmc_sampler sampler;            /* the item's, as the draft model can use it */
    int32_t lacking[LAG + 1];       /* what the draft model evaluates .. */
    const float *before[LAG + 1];   /* a draft head: with these hidden states .. */
    int32_t next;                   /* .. and what it says comes next: as in bmc_span */
    float logprob, lead;
};

struct group {
    struct turn *turns;             /* (n,) */
    bmc_span *spans;                /* (n,) room for those of a pass */
    int n;
    bmc_policy *policy;             /* NULL: only guesses of the caller are taken, and all of them checked */
    struct { double tokens, width, seconds; } base;     /* of a round without guesses, and its pass */
    int drafters;                   /* turns that a draft model may guess for: a pass of it serves them all */
    int repetitions;                /* guesses of other sources that are expected to pay */
    double drafting;                /* seconds that the guesses of this round usually take */
};

static inline bool drafted(const struct turn *t) { return t->source == MODEL; }

static inline double seconds_since(int64_t start) { return 1e-9 * (double)(nanoseconds() - start); }

/* Of the target's pass, with this number of guesses in all. */
double pass_seconds(const struct group *g, int guesses);
/* The draft model forgets what is not the text's any more. */
void draft_follow(struct turn *t);
void measure_base(struct group *g);
/* How many to ask the caller for, who has a draft model. */
int wanted_guesses(const struct group *g, struct turn *t);
/* Makes guesses for all turns, and says how many of each are checked. */
void guess(struct group *g);

#endif
