/* A text as its own drafter: what followed when its last tokens were there before. */
#ifndef NGRAM_H
#define NGRAM_H

#include <stdint.h>

struct ngrams;

struct ngrams *ngrams_new(void);                /* of an empty text; NULL: no memory */
void ngrams_free(struct ngrams *g);
/* 0 or BMC_ENOMEM, then nothing was added */
int ngrams_add(struct ngrams *g, const int32_t *tokens, int n);

/* Tokens that stand before the text, of an empty index: the text may repeat them. 0 or BMC_ENOMEM. */
int ngrams_hint(struct ngrams *g, const int32_t *tokens, int n);

/* Becomes the index of n tokens and one more. What it knows of their beginning is kept. 0 or BMC_ENOMEM. */
int ngrams_follow(struct ngrams *g, const int32_t *tokens, int n, int32_t last);

/* Up to k tokens that may come next, none where the last pair was never there before and no copy was left a
 * few tokens ago; how many. lengths, for each: how many tokens of the match it goes on, up to NGRAM_LONGEST;
 * 1 for the first after an edit. */
enum { NGRAM_LONGEST = 24 };
int ngrams_propose(const struct ngrams *g, int k, int32_t *ids, double *lengths);

#endif
