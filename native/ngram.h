/* A text as its own drafter: what followed when its last tokens were there before. */
#ifndef NGRAM_H
#define NGRAM_H

#include <stdint.h>

#include "bmc.h"

/* Up to k tokens that may come next, none where the last pair was never there before and no copy was left a few tokens ago; how
 * many. lengths, for each: how many tokens of the match it goes on, up to NGRAM_LONGEST; 1 for the first after an edit. */
enum { NGRAM_LONGEST = 24 };
int ngrams_propose(const bmc_ngrams *g, int k, int32_t *ids, double *lengths);

#endif
