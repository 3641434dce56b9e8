/* The sampler against its definition: sort everything, drop what the filters drop, score the rest. */
#include "check.h"
#include "cpu.h"
#include "sample.h"

#include <math.h>
#include <string.h>

static int by_size(const void *a, const void *b) {
    const struct candidate *one = a, *other = b;
    if (one->logit != other->logit)
        return one->logit > other->logit ? -1 : 1;
    return one->id - other->id;
}

static uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int32_t defined(const bmc_sampler *s, const float *logits, int n, int position, float *lead) {
    struct candidate *all = malloc((size_t)n * sizeof *all);
    double total = 0, mass = 0, first = -INFINITY, second = -INFINITY;
    int kept = 0, k = s->top_k && s->top_k < n ? s->top_k : n;
    int32_t winner = -1;
    for (int i = 0; i < n; i++)
        all[i] = (struct candidate){ logits[i], i };
    qsort(all, (size_t)n, sizeof *all, by_size);
    for (int i = 0; i < k; i++)
        total += (double)expf(all[i].logit - all[0].logit);
    while (kept < k && (kept == 0 || s->top_p == 1 || mass < s->top_p * total)) {
        if (s->min_p > 0 && all[kept].logit < all[0].logit + log(s->min_p))
            break;
        mass += (double)expf(all[kept++].logit - all[0].logit);
    }
    for (int i = 0; i < kept; i++) {
        double x = ((double)(splitmix64(splitmix64(s->seed, (uint64_t)position), (uint64_t)all[i].id) >> 12) + 0.5) * 0x1p-52;
        double score = (double)(all[i].logit - all[0].logit) / s->temperature - log(-log1p(-x));
        if (score > first || (score == first && all[i].id < winner)) {
            second = first;
            first = score;
            winner = all[i].id;
        } else if (score > second)
            second = score;
    }
    *lead = second > -INFINITY ? (float)(first - second) : INFINITY;
    free(all);
    return winner;
}

static void choices_are_those_defined(const struct kernels *kernels) {
    static const double shares[] = { 0, 0.02, 0.3, 0.9, 1 };
    uint64_t state = 7;
    for (int round = 0; round < 2000; round++) {
        int n = 1 + (int)random_below(&state, round % 10 ? 300 : 3000), coarse = 1 + (int)random_below(&state, 40);
        float *logits = malloc((size_t)n * sizeof *logits), top = -INFINITY, lead, right;
        for (int i = 0; i < n; i++) {           /* with ties, now and then with ids that are banned */
            logits[i] = random_below(&state, 50) || i == 0 ? (float)random_below(&state, 8 * coarse) / (float)coarse : -INFINITY;
            top = logits[i] > top ? logits[i] : top;
        }
        bmc_sampler s = {
            .temperature = 0.05 + 0.1 * (double)random_below(&state, 40), .top_p = shares[random_below(&state, 5)],
            .min_p = shares[random_below(&state, 5)], .seed = random_bits(&state), .top_k = (int32_t)random_below(&state, 2) * (int32_t)random_below(&state, 400),
        };
        size_t left = (size_t)(s.top_k && s.top_k < n ? s.top_k : n);
        struct candidate *room = malloc(left * sizeof *room);
        int position = (int)random_below(&state, 100000);
        CHECK(sample(kernels, &s, logits, n, top, position, room, &lead) == defined(&s, logits, n, position, &right));
        CHECK(lead == right);
        int32_t id = -1, best = 0;
        CHECK(bmc_choose(logits, n, &s, position, &id) == 0 && id == sample(kernels, &s, logits, n, top, position, room, NULL));
        while (logits[best] != top)
            best++;
        s.temperature = 0;
        CHECK(bmc_choose(logits, n, &s, position, &id) == 0 && id == best);
        free(room);
        free(logits);
    }
}

static void what_is_wrong_is_refused(void) {
    float logits[3] = { 0, NAN, 1 };
    int32_t id;
    bmc_sampler s = { .temperature = 1, .top_p = 1 };
    CHECK(bmc_choose(logits, 3, &s, 0, &id) == BMC_EINVAL);
    CHECK(bmc_choose((const float[]){ 0, INFINITY }, 2, &s, 0, &id) == BMC_EINVAL);
    logits[1] = 0;
    CHECK(bmc_choose(logits, 3, &s, 0, &id) == 0);
    CHECK(bmc_choose(logits, 0, &s, 0, &id) == BMC_EINVAL && bmc_choose(logits, 3, NULL, 0, &id) == BMC_EINVAL);
    for (int i = 0; i < 4; i++) {
        const double wrong[][4] = { { -1, 0, 1, 0 }, { NAN, 0, 1, 0 }, { 1, -1, 1, 0 }, { 1, 0, 1.5, 0 } };
        s = (bmc_sampler){ .temperature = wrong[i][0], .top_k = (int32_t)wrong[i][1], .top_p = wrong[i][2], .min_p = wrong[i][3] };
        CHECK(bmc_choose(logits, 3, &s, 0, &id) == BMC_EINVAL);
    }
}

int main(void) {
    struct kernels kernels;
    for (int level = 0; kernels_at(level, &kernels); level++)
        choices_are_those_defined(&kernels);
    what_is_wrong_is_refused();
    return 0;
}
