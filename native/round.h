/* Who guesses for a sequence, and what is known of how well. */
#ifndef ROUND_H
#define ROUND_H

#include "bmc.h"
#include "policy.h"

enum { GUESSES = 32 };                  /* of one sequence in a pass, at most */
/* MODEL: also the target itself with less attention. */
enum source { GIVEN = 0, NGRAMS = 1, MODEL = 2, N_SOURCES = 3 };

struct bmc_policy {
    struct pass_cost target, draft;     /* draft: of the draft model, or of the target with a window */
    struct acceptance of[N_SOURCES];
};

struct bmc_drafter {
    bmc_drafter_options o;              /* to_draft and to_target are copies of its own */
    struct ngrams *ngrams;              /* or NULL */
    float *hidden;                      /* (dim,) a draft head's own, after its last guess; or NULL */
    struct recent recent[N_SOURCES];        /* of this text's guesses */
    struct budget budget;               /* of the draft model; repetitions cost nothing to look for */
    int window;                         /* tokens from the end of the text that the draft model
                                           reads before it guesses */
    bool reading;                       /* it has begun to read them */
    bool failed;                        /* the draft model is not asked any more */
};

#endif
