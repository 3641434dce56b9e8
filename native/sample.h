/* From logits to a token: what bmc_sampler says, then a draw that depends on nothing but its inputs. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include "bmc.h"
#include "kernels.h"

struct candidate { float logit; int32_t id; };

int sampler_check(const bmc_sampler *s);

/* The id that follows `position` tokens. logits: (n,), the largest of them is `top`, finite. room: (n,), or (top_k,) where
 * that is less. lead, if not NULL: how far the score is ahead of the second's; INFINITY where there is no second. */
int32_t sample(const struct kernels *kernels, const bmc_sampler *s, const float *logits, int n, float top, int position,
               struct candidate *room, float *lead);

#endif
