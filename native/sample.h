/* From logits to a token: what bmc_sampler says, then a draw that depends on nothing but its inputs. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include "bmc.h"
#include "kernels.h"

#include <stdbool.h>

struct candidate { float logit; int32_t id; };

int sampler_check(const bmc_sampler *s, int n_vocab);

/* Whether logits change before the filters: by a bias, a penalty or a mask of allowed ids. */
bool sampler_alters(const bmc_sampler *s, const uint32_t *mask);

/* altered: (n,) the logits after bias, penalties and mask; returns the largest. history: the tokens before.
 * mask: a bit an id, or NULL. room: (n,). */
float sampler_alter(const struct kernels *kernels, const bmc_sampler *s, const uint32_t *mask,
                    const int32_t *history, int n_history, const float *logits, int n, float *altered,
                    struct candidate *room);

/* The id that follows `position` tokens. logits: (n,), the largest of them is `top`, finite. room: (n,), or
 * (top_k,) where that is less. names: (n,) the ids whose noise counts, where they are others; or NULL. lead,
 * if not NULL: how far the score is ahead of the second's; INFINITY where there is no second. n_left, if not
 * NULL: how many candidates the filters leave, which are in room then. */
int32_t sample(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, float top,
               int position, const int32_t *names, struct candidate *room, float *lead, int *n_left);

/* What a draw among n candidates goes by: the log-probabilities of the k likeliest in descending order, -1
 * for ids where there are fewer; returns that of an id among them. Changes their order. */
float drawn_logprobs(const bmc_sampler *s, struct candidate *c, int n, int32_t id, int k, int32_t *ids,
                     float *logprobs);

/* The k largest logits in descending order, k <= n: ids and logit - log_sum. room: (k,). */
void likeliest(const struct kernels *kernels, const float *logits, int n, int k, double log_sum, int32_t *ids,
               float *logprobs, struct candidate *room);

#endif
