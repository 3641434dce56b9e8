/* The step of a router that is the same on every machine: experts in groups. */
#ifndef ROUTE_H
#define ROUTE_H

#include "exp.h"

/* Leaves only the experts of the groups_used groups whose two best come to most: -inf for the others. */
EVERYWHERE void keep_groups(float *choice, int n_experts, int groups, int groups_used) {
    const int size = n_experts / groups;
    for (int left = groups - groups_used; left > 0; left--) {
        int worst = -1;
        float least = INFINITY;
        for (int g = 0; g < groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (const float *x = choice + g * size; x < choice + (g + 1) * size; x++)
                if (*x > first) {
                    second = first;
                    first = *x;
                } else if (*x > second)
                    second = *x;
            const float both = size > 1 ? first + second : first;
            if (first > -INFINITY && both <= least) {
                least = both;
                worst = g;
            }
        }
        for (int e = 0; worst >= 0 && e < size; e++)
            choice[worst * size + e] = -INFINITY;
    }
}

#endif
