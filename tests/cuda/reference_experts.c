/* route: choose() is only known to its file. */
#define experts_kind reference_experts_kind
#define run_experts reference_run_experts
#include "../../native/layers/experts.c"
#include "reference_model.h"

#include <stdlib.h>

void reference_route(const struct cuda_route *a) {
    struct block b = { .c = { .n_experts = a->n_experts,
                              .n_active = a->n_active,
                              .expert_groups = a->groups,
                              .groups_used = a->groups_used,
                              .gating = a->gating,
                              .renorm = a->renorm,
                              .expert_scale = a->scale } };
    float *choice = malloc((size_t)a->n_experts * sizeof *choice),
          *p = malloc((size_t)a->n_experts * sizeof *p);
    struct pick *chosen = malloc((size_t)a->n_active * sizeof *chosen);
    b.experts.choice_bias = vector(a->choice_bias, 1, a->n_experts);
    for (int t = 0; t < a->n_tok; t++) {
        memcpy(p, a->scores + (size_t)t * a->stride, (size_t)a->n_experts * sizeof *p);
        choose(&b, p, choice, chosen);
        for (int i = 0; i < a->n_active; i++) {
            a->chosen[t * a->n_active + i] = chosen[i].tok;
            a->weight[t * a->n_active + i] = chosen[i].weight;
        }
    }
    free(choice), free(p), free(chosen);
}
